"""Tests of mokd.py, eval_knn.py and eval_linear.py. Each compares with an independent naive computation, with
stored numbers of the released code, or with a property that the paper states.

    python -m pytest -q test_mokd.py                  # all
    python -m pytest -q test_mokd.py -m "not slow"    # without full-size networks

The sections follow mokd.py, and so the paper: settings, images and views, backbones, heads and search,
losses, schedules, the two models, Algorithm 1, k-NN. Then come whole runs, and the two evaluations.
"""
import argparse
import copy
import itertools
import json
import math
import os
import runpy
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import timm
import torch
import torch.cuda.amp.common
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset
from torchvision.transforms.v2 import functional as TF

import eval_knn
import eval_linear
import mokd

# The tests compare digits of the CPU, and start more processes than a machine may have GPUs. One test asks
# for the GPU, in a process of its own.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

HERE = os.path.dirname(os.path.abspath(mokd.__file__))
CPU = torch.device("cpu")

# A pair so small that a step takes milliseconds, at views of 32 and 16 pixels. The ViT is as wide as the
# T-Heads, so T-Head 2 has no 1x1 convolution, and T-Head 1 has one.
CNN = "layers=1,1,1,1 channels=8,8,16,16".split()
VIT = "img_size=32 patch_size=8 embed_dim=24 depth=2 num_heads=2".split()
ONE, TWO = ["--arch1", "resnet18", "--model_kwargs1", *CNN], ["--arch2", "vit_tiny", "--model_kwargs2", *VIT]
PAIR = ONE + TWO
SMALL = """--data toy --out_dim 32 --hidden_dim 16 --bottleneck_dim 8 --t_dim 24 --t_heads 2 --t_depth 1
    --global_size 32 --local_size 16 --local_crops 2 --batch_size 8 --epochs 1 --warmup_epochs 0
    --teacher_temp_epochs 1 --workers 0 --freeze_last_layer 0 --cnn_lr 1 --vit_lr 0.03
    --blur 0.1 0.5""".split()

def config(*args):
    """Settings of the small pair, with `args` on top."""
    cfg = mokd.parse_args([*SMALL, *PAIR, *map(str, args)])
    if cfg.dtype == "auto":
        cfg.dtype = "fp32"
    return cfg

def models_of(cfg):
    return mokd.build_models(cfg, CPU)

def views_of(cfg, step=0):
    """Noise in place of views, in the form of make_views."""
    g = torch.Generator().manual_seed(step)
    kinds = [(2, cfg.global_size), (cfg.local_crops, cfg.local_size)]
    return [torch.randn(n * cfg.batch_size, 3, size, size, generator=g) for n, size in kinds if n]

def now_of(cfg, step=1, per_epoch=10):
    return mokd.schedule(cfg, step, per_epoch)

def close(a, b, relative):
    """Is the largest difference at most `relative` of the largest value?"""
    a = torch.as_tensor(a).detach().double()
    b = torch.as_tensor(b).detach().double()
    return a.shape == b.shape and (a - b).abs().max() <= relative * b.abs().max().clamp_min(1e-30)

def gradients_of_step(cfg, models, x, now, scaler=None):
    """Run a step -> losses, and the gradients that it had before clipping, by (model, name)."""
    grads, update = {}, mokd.Model.update
    def record_and_update(m, now, scaler):
        for name, p in m.net.named_parameters():
            if p.grad is not None:
                grads[m.i, name] = p.grad.clone()
        update(m, now, scaler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mokd.Model, "update", record_and_update)
        losses, _ = mokd.train_step(*models, x, cfg, now, scaler)
    return losses, grads

def few_images(n=16):
    return TensorDataset(*mokd.draw_toy(n, "few"))

def stopped(capsys, *args):
    """Run a command line that fails -> exit code, what it said."""
    with pytest.raises(SystemExit) as error:
        mokd.main([*map(str, args)])
    return error.value.code, capsys.readouterr().err

# --------------------------------------------------------------------------------------------- settings (A.1)
PAPER = dict(   # sections 3.4, 4 and A.1
    arch1="resnet50", arch2="vit_small", epochs=100, batch_size=256, out_dim=65536, t_depth=3, t_dim=384,
    t_heads=6, global_size=224, global_scale=(0.25, 1.0), local_size=96, local_scale=(0.05, 0.25),
    local_crops=8, cnn_lr=0.1, vit_lr=0.0003, warmup_epochs=10, cnn_optimizer="sgd", vit_optimizer="adamw",
    cnn_wd=1e-4, vit_wd=0.04, student_temp=0.1, teacher_temp_start=0.04, teacher_temp=0.07,
    teacher_temp_epochs=30)
DINO = dict(   # where the paper says no more than that all else is mostly DINO's
    ema=0.996, center_momentum=0.9, hidden_dim=2048, bottleneck_dim=256, clip_grad=3.0, freeze_last_layer=1,
    drop_path=0.1, jitter=(0.4, 0.4, 0.2, 0.1), grayscale=0.2, blur=(0.1, 2.0), solarize=0.2)

def test_every_default_is_the_papers():
    cfg = mokd.parse_args([])
    assert cfg == mokd.Config()
    assert {name: getattr(cfg, name) for name in PAPER | DINO} == PAPER | DINO
    assert set(cfg.losses.split(",")) == {"sm", "st", "cm", "ct"}
    assert (cfg.vit_pool, cfg.search, cfg.search_center, cfg.t_norm) == ("mean", "all", True, False)

def test_flags_are_read_as_given():
    cfg = config("--t_norm", "--no-search_center", "--epochs", 7, "--epochs", 8, "--blur", 0.1, 0.2)
    assert (cfg.t_norm, cfg.search_center, cfg.epochs) == (True, False, 8)   # the last of two counts
    assert cfg.blur == (0.1, 0.2) and cfg.jitter == (0.4, 0.4, 0.2, 0.1)
    assert cfg.model_kwargs1 == dict(layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
    assert config("--model_kwargs1", "act_layer=gelu").model_kwargs1 == dict(act_layer="gelu")
    demo = mokd.parse_args(["--demo", "--out_dim", "77", "--arch1", "resnet34"])
    assert (demo.data, demo.out_dim, demo.arch1, demo.arch2) == ("toy", 77, "resnet34", "vit_tiny")
    assert demo.model_kwargs1 is None and demo.model_kwargs2["patch_size"] == 4

WRONG = {   # command line -> words of the sentence
    "--out_dim x": "--out_dim", "--ema 1.5": "--ema: 1.5 is not from 0 to 1", "--cnn_lr -1": "--cnn_lr: -1",
    "--vit_lr nan": "--vit_lr: nan", "--drop_path 1": "--drop_path: 1", "--lambda1 2": "--lambda1: 2",
    "--local_scale 0.5 2": "--local_scale: 2", "--blur 0.1": "--blur: expected 2",
    "--search some": "--search", "--model_kwargs1 depth": "--model_kwargs1", "--t_norm maybe": "maybe",
    "--no_such_flag 1": "--no_such_flag", "--demos": "--demos", "--losses cm,st": "--losses cm,st",
    "--losses sm,xx": "--losses sm,xx", "--losses sm,contrast": "--losses sm,contrast",
    "--batch_size 0": "--batch_size 0", "--epochs 0": "--epochs 0", "--student_temp 0": "--student_temp 0",
    "--teacher_temp 0": "--teacher_temp 0", "--jitter 0.4": "--jitter: expected 4",
    "--warmup_epochs 101": "--warmup_epochs 101 is more",
    "--data nowhere": "--data nowhere: no such folder",
    "--data toy --batch_size 5000": "--batch_size 5000 is more than the 4096 images"}

@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_gets_a_sentence(line, capsys):
    code, said = stopped(capsys, *line.split())
    assert code == 2 and WRONG[line] in said

def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(mokd, "WORLD", 3)
    code, said = stopped(capsys, "--data", "toy")
    assert code == 2 and "--batch_size 256 is no multiple of 3" in said

def test_mokd_is_small_and_names_every_equation():
    with open(os.path.join(HERE, "mokd.py")) as file:
        source = file.read()
    assert source.count("\n") <= 1160
    assert [line for line in source.splitlines() if len(line) > 110] == []
    for number in range(1, 10):
        assert f"eq. ({number})" in source.lower()

# ----------------------------------------------------------------------------------------------- data: images
def picture(seed=0, size=(60, 80)):
    """(60, 80, 3) uint8: squares of random colors."""
    colors = np.random.default_rng(seed).integers(0, 256, (size[0] // 10, size[1] // 10, 3))
    return colors.repeat(10, 0).repeat(10, 1).astype(np.uint8)

def test_any_image_of_8_bits_becomes_rgb(tmp_path):
    color = picture()
    gray = np.asarray(Image.fromarray(color).convert("L"))
    gray_rgb = gray[..., None].repeat(3, 2)
    alpha = color[..., :1] // 2 + 100
    on_white = color * (alpha / 255) + 255 * (1 - alpha / 255)
    files = {"rgb.png": (Image.fromarray(color), color),
             "gray.png": (Image.fromarray(gray), gray_rgb),
             "alpha.png": (Image.fromarray(np.concatenate([color, alpha], 2)), on_white),
             "palette.png": (Image.fromarray(color).quantize(256), color),
             "cmyk.jpg": (Image.fromarray(color).convert("CMYK"), color)}
    for name, (image, expected) in files.items():
        image.save(tmp_path / name)
        read = mokd.read_image(str(tmp_path / name))
        assert read.dtype == torch.uint8 and read.shape == (3, 60, 80), name
        difference = np.abs(read.numpy().transpose(1, 2, 0).astype(int) - expected).mean()
        assert difference < (1 if name.endswith("png") else 6), name

def test_a_folder_holds_train_and_val_or_the_classes_themselves(tmp_path, capsys):
    for c in "ab":
        (tmp_path / "data" / "train" / c).mkdir(parents=True)
        Image.fromarray(picture()).save(tmp_path / "data" / "train" / c / "0.jpg")
    for folder in (tmp_path / "data", tmp_path / "data" / "train"):
        images = mokd.get_images(config("--data", folder), "train")
        assert images.classes == ["a", "b"] and len(images) == 2 and images[1][1] == 1
    (tmp_path / "data" / "train").rename(tmp_path / "data" / "val")
    code, said = stopped(capsys, *SMALL, "--data", tmp_path / "data")
    assert code == 2 and "has val/ but no train/" in said

def test_fashion_mnist_trains_gray_28_pixels(tmp_path):
    """In the files that torchvision keeps: a header of types and sizes, then the bytes."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28)).astype(np.uint8)
    labels = (np.arange(20) % 10).astype(np.uint8)
    for part, shown in (("train", pixels), ("t10k", 255 - pixels)):
        for kind, values in (("images-idx3", shown), ("labels-idx1", labels)):
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + values.tobytes())
    cfg = config("--data", "fashion_mnist", "--data_root", tmp_path)
    images = mokd.get_images(cfg, "train")
    assert len(images) == 20 and images[13][1] == 3
    for part, shown in (("train", pixels), ("val", 255 - pixels)):
        assert (np.asarray(mokd.get_images(cfg, part)[4][0]) == shown[4]).all()
    batch = [mokd.MultiCrop(images, cfg)[0, i][0] for i in range(8)]
    x = mokd.make_views([torch.stack(crops) for crops in zip(*batch)], cfg, CPU, 0)
    losses, _ = mokd.train_step(*models_of(cfg), x, cfg, now_of(cfg))
    assert all(math.isfinite(loss) for loss in losses.values())

def test_stl10_trains_on_its_unlabeled_images_too(monkeypatch):
    def data_set(root, split, download):
        splits = "train", "test", "unlabeled", "train+unlabeled"
        return torchvision.datasets.utils.verify_str_arg(split, "split", splits)
    monkeypatch.setattr(torchvision.datasets, "STL10", data_set)
    cfg = config("--data", "stl10")
    assert [mokd.get_images(cfg, part) for part in ("train", "val")] == ["train+unlabeled", "test"]

# ------------------------------------------------------------------------------------------ data: views (A.1)
def test_crops_depend_on_seed_epoch_and_index_alone():
    cfg = config("--local_crops", 3)
    crops = mokd.MultiCrop(few_images(), cfg)
    first, _ = crops[3, 5]
    torch.manual_seed(99)   # as another worker has it
    state = torch.random.get_rng_state()
    again, _ = crops[3, 5]
    assert torch.equal(torch.random.get_rng_state(), state) and all(map(torch.equal, first, again))
    assert [c.shape for c in first] == [(2, 32, 32, 3), (3, 16, 16, 3)] and first[0].dtype == torch.uint8
    other_seed = mokd.MultiCrop(few_images(), config("--seed", 1))
    for other in (crops[4, 5], crops[3, 6], other_seed[3, 5]):
        assert not torch.equal(first[0], other[0][0])
    assert not torch.equal(first[0][0], first[0][1])   # two views, two crops

def test_views_have_the_papers_number_sizes_and_scales(monkeypatch):
    asked = []
    monkeypatch.setattr(mokd, "crop", lambda image, size, scale: asked.append((size, scale)) or image)
    mokd.MultiCrop(few_images(), mokd.Config())[0, 0]
    assert asked == [(224, (0.25, 1.0))] * 2 + [(96, (0.05, 0.25))] * 8

def test_a_crop_is_torchvisions_random_resized_crop():
    image = torch.from_numpy(picture()).permute(2, 0, 1)
    theirs = torchvision.transforms.v2.RandomResizedCrop(
        32, (0.25, 1.0), interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    torch.manual_seed(3)
    ours = mokd.crop(image, 32, (0.25, 1.0))
    torch.manual_seed(3)
    assert torch.equal(ours, theirs(image))

def test_an_epoch_shows_each_image_once_in_its_own_order(monkeypatch):
    cfg = config("--epochs", 3)
    whole = list(mokd.batches(27, cfg))
    assert len(whole) == 9
    orders = []
    for epoch in range(3):
        keys = sum(whole[3 * epoch:3 * epoch + 3], [])
        assert {e for e, _ in keys} == {epoch}
        orders.append([i for _, i in keys])
        assert len(set(orders[-1])) == 24   # the last three images make no batch
    assert orders[0] != orders[1] != orders[2]
    assert list(mokd.batches(27, cfg, 4)) == whole[4:]   # as a resumed run goes on
    assert list(mokd.batches(27, config("--epochs", 3, "--seed", 1))) != whole
    monkeypatch.setattr(mokd, "WORLD", 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(mokd, "RANK", rank)
        shares.append(list(mokd.batches(27, cfg)))
    assert [a + b for a, b in zip(*shares)] == whole

def test_photometric_operations_equal_torchvisions_image_by_image():
    cfg = config("--batch_size", 64, "--blur", 0.1, 2, "--solarize", 0.7)
    x = torch.randint(256, (128, 3, 40, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x[:, :, 10:20, 10:20] = torch.randint(256, (128, 1, 1, 1), dtype=torch.uint8)   # gray: no hue
    p = {name: values[..., :2, :].flatten(-2) for name, values in mokd.draw_photometric(cfg, 7).items()}
    ours = mokd.photometric(x, p)
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for i in range(128):
        own = {name: values[..., i] for name, values in p.items()}
        y = x[i].float() / 255
        if own["flip"]:
            y = TF.horizontal_flip(y)
        if own["jitter"]:
            for operation in own["order"].tolist():
                y = adjust[operation](y, own["amount"][operation].item())
        if own["grayscale"]:
            y = TF.rgb_to_grayscale(y, 3)
        if own["blur"]:
            y = TF.gaussian_blur(y, [13, 13], [own["sigma"].item()] * 2)
        difference = (ours[i] - y).abs()
        if own["solarize"]:
            difference = (ours[i] - TF.solarize(y, 128 / 255)).abs()
            difference[(y - 128 / 255).abs() < 1e-4] = 0   # rounding may take such a pixel to either side
        assert difference.max() <= 1e-4, (i, own)
    assert all(p[name].sum() > 5 for name in ("flip", "jitter", "grayscale", "blur", "solarize"))

def test_photometric_parameters_follow_the_recipe():
    B = 2000
    cfg = mokd.parse_args(["--batch_size", str(B), "--local_crops", "2"])
    p = mokd.draw_photometric(cfg, 0)
    rates = dict(flip=[0.5] * 4, jitter=[0.8] * 4, grayscale=[0.2] * 4, blur=[1, 0.1, 0.5, 0.5],
                 solarize=[0, 0.2, 0, 0])
    for name, expected in rates.items():
        assert p[name].float().mean(1).tolist() == pytest.approx(expected, abs=0.05), name
        a, b = expected[1:3]   # each view has its own draw
        alike = (p[name][1] == p[name][2]).float().mean()
        assert alike == pytest.approx(a * b + (1 - a) * (1 - b), abs=0.06), name
    assert p["amount"].amin((1, 2)).tolist() == pytest.approx([0.6, 0.6, 0.8, -0.1], abs=0.01)
    assert p["amount"].amax((1, 2)).tolist() == pytest.approx([1.4, 1.4, 1.2, 0.1], abs=0.01)
    assert 0.1 <= p["sigma"].min() < 0.15 and 1.95 < p["sigma"].max() <= 2
    assert len(p["order"].flatten(1).unique(dim=1).T) == 24   # all orders of four
    assert not torch.equal(mokd.draw_photometric(cfg, 1)["sigma"], p["sigma"])   # of each step

def test_views_are_normalized_crops_view_by_view_and_only_flipped_where_all_else_is_off():
    cfg = config("--jitter", 0, 0, 0, 0, "--grayscale", 0, "--blur", 0, 0, "--solarize", 0)
    crops = [torch.randint(256, (8, 2, size, size, 3), dtype=torch.uint8) for size in (32, 16)]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])   # of ImageNet
    mirrored = 0
    for x, batch in zip(mokd.make_views(crops, cfg, CPU, 0), crops):
        views = ((batch / 255 - mean) / std).permute(1, 0, 4, 2, 3).flatten(0, 1)
        for ours, view in zip(x, views, strict=True):
            flipped = close(ours, view.flip(-1), 1e-5)
            assert flipped or close(ours, view, 1e-5)
            mirrored += int(flipped)
    assert 5 < mirrored < 27   # of 32

def test_two_processes_draw_what_one_does(monkeypatch):
    cfg = config()
    whole = mokd.draw_photometric(cfg, 3)
    monkeypatch.setattr(mokd, "WORLD", 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(mokd, "RANK", rank)
        parts.append(mokd.draw_photometric(cfg, 3))
    for name, values in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts], -1), values)

def test_each_view_gets_its_own_photometric_parameters(monkeypatch):
    cfg, seen = config("--local_crops", 3), []
    monkeypatch.setattr(mokd, "photometric", lambda x, p: seen.append(p) or x.float())
    crops = [torch.zeros(8, n, size, size, 3, dtype=torch.uint8) for n, size in ((2, 32), (3, 16))]
    mokd.make_views(crops, cfg, CPU, 4)
    for name, drawn in mokd.draw_photometric(cfg, 4).items():   # (..., V, B)
        views = torch.cat([p[name].unflatten(-1, (-1, 8)) for p in seen], -2)
        assert torch.equal(views, drawn), name

# -------------------------------------------------------------------------------------------- backbones (3.1)
TINY_VIT = ["img_size=32", "patch_size=8", "num_heads=2"]
NARROW = {   # the paper's backbones, narrow and shallow, for 32 pixels
    "resnet18": CNN, "resnet34": CNN, "resnet50": CNN, "resnet101": CNN,
    "vit_tiny": [*TINY_VIT, "embed_dim=16", "depth=1"], "vit_small": [*TINY_VIT, "embed_dim=24", "depth=1"],
    "vit_base": [*TINY_VIT, "embed_dim=32", "depth=2"],
    "efficientnet_b0": ["drop_rate=0.0"], "mobilenetv3_large_100": ["drop_rate=0.0"]}
PAIRS = [("resnet50", "vit_small"), ("resnet101", "vit_base"), ("resnet34", "vit_small"),
         ("resnet18", "vit_tiny"), ("resnet18", "resnet50"), ("resnet50", "efficientnet_b0"),
         ("mobilenetv3_large_100", "vit_small"), ("efficientnet_b0", "mobilenetv3_large_100"),
         ("vit_tiny", "vit_base"), ("resnet50", "resnet50"), ("vit_small", "vit_small")]

@pytest.mark.parametrize("arch1, arch2", PAIRS)
def test_every_kind_of_pair_learns_one_batch(arch1, arch2):
    """The losses fall on one repeated batch, while targets stand still."""
    cfg = config("--arch1", arch1, "--model_kwargs1", *NARROW[arch1], "--arch2", arch2, "--model_kwargs2",
                 *NARROW[arch2], "--drop_path", 0, "--ema", 1, "--center_momentum", 1, "--batch_size", 4,
                 "--cnn_lr", 3, "--vit_lr", 0.2)
    models, x = models_of(cfg), views_of(cfg)
    history = []
    while len(history) < 20 and (not history or history[-1] > 0.97 * history[0]):
        losses, _ = mokd.train_step(*models, x, cfg, now_of(cfg, 1, 100))
        assert all(math.isfinite(loss) for loss in losses.values())
        history.append(float(losses["loss1"] + losses["loss2"]))
    assert history[-1] < 0.97 * history[0], history

@pytest.mark.slow
def test_the_papers_pair_steps_at_full_size():
    """ResNet-50 and ViT-Small with K = 65536, at 224 and 96 pixels."""
    cfg = mokd.parse_args(["--batch_size", "2", "--local_crops", "2", "--dtype", "fp32"])
    models = models_of(cfg)
    assert [m.net.backbone.num_tokens for m in models] == [49, 196]
    losses, _ = mokd.train_step(*models, views_of(cfg), cfg, now_of(cfg))
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values())
    assert all(m.n_.C_m.shape == (1, 65536) and m.n_.C_t.any() for m in models)

@pytest.mark.parametrize("arch, kwargs, shape", [
    ("convnext_tiny", dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), (9, 16)),   # maps, channels first
    ("swin_tiny_patch4_window7_224",
     dict(depths=(1, 1, 1, 1), embed_dim=12, num_heads=(1, 1, 2, 2)), (9, 96)),   # maps, channels last
    ("vit_small_patch16_224", dict(depth=1, reg_tokens=3), (36, 384)),            # four prefix tokens
    ("deit3_small_patch16_224", dict(depth=1), (36, 384)), ("mobilenetv3_large_100", {}, (9, 960))])
def test_other_timm_models_give_local_features_at_both_sizes(arch, kwargs, shape):
    b = mokd.Backbone(arch, kwargs).eval()
    pooled, tokens = b(torch.rand(2, 3, 96, 96))
    assert tokens.shape == (2, *shape) and b.dim == shape[1]
    assert torch.allclose(pooled, tokens.mean(1), atol=1e-6)
    frozen = [name for name, p in b.model.named_parameters() if not p.requires_grad]
    assert all(name.startswith(("conv_head", "norm_head", "head")) for name in frozen)   # a classifier's

def test_a_vits_pooled_feature_is_the_mean_of_its_patches_or_cls():
    x = torch.rand(2, 3, 32, 32)
    kwargs = dict(map(mokd.key_value, VIT))
    for pool in ("mean", "cls"):
        b = mokd.Backbone("vit_tiny", kwargs, pool, size=32).eval()
        cls, patches = b.model.forward_features(x).split([1, 16], 1)
        expected = patches.mean(1) if pool == "mean" else cls[:, 0]
        assert torch.allclose(b(x)[0], expected, atol=1e-6) and torch.equal(b(x)[1], patches)
    # This one has four registers, and no CLS token to pool.
    b = mokd.Backbone("vit_medium_patch16_reg4_gap_256", kwargs, "cls", size=32).eval()
    assert torch.equal(b(x)[0], b.model.forward_features(x)[:, 4:].mean(1))

def test_a_misspelled_argument_is_an_error_but_our_own_options_are_left_out():
    with pytest.raises(TypeError, match="dept"):
        mokd.Backbone("vit_small", dict(dept=3))
    b = mokd.Backbone("resnet18", drop_path=0.1)   # which knows no dynamic_img_size
    assert (b.model.layer1[0].bn2.weight == 1).all()   # torchvision's start of a residual branch, not timm's

def test_weights_load_into_timm_and_torchvision_and_theirs_here(tmp_path):
    models = models_of(config("--model_kwargs1"))   # a whole ResNet-18
    for m in models:   # a momentum net has its own weights
        for tensor in (*m.params_, *m.n_.buffers()):
            tensor.data += 1 if tensor.dtype == torch.long else 0.02 * torch.rand(tensor.shape)
    mokd.save(config("--out", tmp_path), models, 1, torch.amp.GradScaler(enabled=False), range(10))
    x = torch.rand(2, 3, 32, 32)
    files = [str(tmp_path / f"model{m.i}.pth") for m in models]
    kwargs = dict(map(mokd.key_value, VIT))
    theirs = [timm.create_model("resnet18", num_classes=0, checkpoint_path=files[0]),
              timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=files[1], **kwargs)]
    expected = [m.n_.backbone.eval().model.forward_features(x) for m in models]
    assert all(close(net.eval().forward_features(x), y, 1e-5) for net, y in zip(theirs, expected))
    resnet = torchvision.models.resnet18().eval()
    missing, unexpected = resnet.load_state_dict(torch.load(files[0], weights_only=True), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    assert close(nn.Sequential(*list(resnet.children())[:-2])(x), expected[0], 1e-4)
    torch.save(resnet.state_dict(), tmp_path / "torchvision.pth")
    b = mokd.Backbone("resnet18", size=32).eval()
    mokd.load_weights(b, tmp_path / "torchvision.pth", "--init1")
    assert close(b.model.forward_features(x), expected[0], 1e-5)

def renamed(state, prefix, more=0):
    return {prefix + name: w + more if w.is_floating_point() else w for name, w in state.items()}

def test_init_takes_files_of_timm_dino_moco_and_the_released_code_and_starts_both_nets(tmp_path):
    cnn, vit = [m.net.backbone.model.state_dict() for m in models_of(config())]
    files = {   # the number is what was added to the weights that are to be taken
        "timm": renamed(vit, "", 1),
        "DINO": dict(teacher=renamed(vit, "backbone.", 1), student=renamed(vit, "module.backbone."),
                     args=argparse.Namespace(arch="vit_tiny"), epoch=9),
        "released": dict(teacher_vit=renamed(vit, "backbone.", 1), teacher_cnn=renamed(cnn, "backbone."),
                         student_vit=renamed(vit, "module.backbone.")),
        "MoCo v3": dict(state_dict=renamed(vit, "module.base_encoder.") |
                        renamed(vit, "module.momentum_encoder.", 1)),
        "compiled": dict(model=renamed(vit, "_orig_mod.", 1))}
    for name, content in files.items():
        torch.save(content, tmp_path / "w.pth")
        m = models_of(config("--init2", tmp_path / "w.pth"))[1]
        for net in (m.net, m.n_):
            assert all(torch.equal(w, vit[k] + 1) for k, w in net.backbone.model.state_dict().items()), name
    moco = renamed(cnn, "module.encoder_q.", 1) | dict(queue=torch.ones(3))   # v1 and v2
    torch.save(dict(state_dict=moco, epoch=1), tmp_path / "w.pth")
    m = models_of(config("--init1", tmp_path / "w.pth"))[0]
    assert torch.equal(m.n_.backbone.model.bn1.running_var, cnn["bn1.running_var"] + 1)

def test_init_refuses_another_architecture(tmp_path, capsys):
    torch.save(models_of(config())[1].net.backbone.model.state_dict(), tmp_path / "w.pth")
    code, said = stopped(capsys, *SMALL, *PAIR, "--init1", tmp_path / "w.pth")
    assert code == 2 and f"--init1 {tmp_path}" in said

def test_init_refuses_a_deeper_net_whose_first_blocks_would_fit(tmp_path):
    for arch, deeper, shallower in (("resnet18", dict(layers=(1, 2, 1, 1)), dict(layers=(1, 1, 1, 1))),
                                    ("vit_tiny_patch16_224", dict(depth=2), dict(depth=1))):
        torch.save(mokd.Backbone(arch, deeper, size=32).model.state_dict(), tmp_path / "w.pth")
        with pytest.raises(SystemExit):
            mokd.load_weights(mokd.Backbone(arch, shallower, size=32), tmp_path / "w.pth", "--init1")

# --------------------------------------------------------------------------- heads (3.4) and the search (3.3)
def test_a_search_drops_the_query_before_the_mean_over_tokens():
    Z, query = torch.randn(3, 4, 8), torch.randn(3, 12)
    no_attention = mokd.THead(8, 16, dim=12, depth=0, num_heads=2, num_tokens=4)   # to the query
    assert torch.equal(no_attention(Z, query), no_attention(Z))
    head = mokd.THead(8, 16, dim=12, depth=1, num_heads=2, num_tokens=4)
    assert not torch.allclose(head(Z, query), head(Z))

def test_an_mlp_head_has_four_linear_layers_and_its_logits_are_cosines():
    head = mokd.MLPHead(9, 30, 16, 8)
    assert [tuple(m.weight.shape) for m in head.modules() if isinstance(m, nn.Linear)] == [
        (16, 9), (16, 16), (8, 16), (30, 8)]
    assert head(1e9 * torch.randn(5, 9)).abs().max() <= 1 + 1e-5

def test_gains_are_fixed_for_a_cnn_and_learned_for_a_vit_and_in_t_heads():
    for m in models_of(config()):
        gains = [head.last.parametrizations.weight.original0 for head in (m.net.mlp_head, m.net.t_head)]
        assert all((gain == 1).all() for gain in gains)
        assert [gain.requires_grad for gain in gains] == [m.family == "vit", True]

# ------------------------------------------------------------------------------------------ losses (3.2, 3.3)
def naive_H(t, s, center, tau_, tau):
    """Cross entropy of eq. (2) for one pair of views, by eq. (1)."""
    p = torch.softmax((t.detach() - center) / tau_, -1)
    return -(p * torch.log_softmax(s / tau, -1)).sum(-1).mean()

@pytest.mark.parametrize("pairs", [
    [(g, v) for g in range(2) for v in range(5) if v != g], [(0, 2), (0, 3), (0, 4)],
    [(0, 1), (1, 3), (0, 3)]], ids=["all that differ", "local", "any"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_H_is_the_cross_entropy_of_eq_1_over_pairs(pairs, dtype, tolerance):
    """A view may have no teacher, or one, or two."""
    g = torch.Generator().manual_seed(0)
    t = torch.randn(2, 4, 9, generator=g).to(dtype).requires_grad_()
    s = torch.randn(5, 4, 9, generator=g).to(dtype).requires_grad_()
    center = torch.randn(1, 9, generator=g)
    p = mokd.target(t, center, 0.2)
    assert not p.requires_grad and p.dtype == torch.float32
    loss = mokd.H(p, mokd.log_softmax(s, 0.3), pairs)
    expected = sum(naive_H(t[g].float(), s[v].float(), center, 0.2, 0.3) for g, v in pairs) / len(pairs)
    assert close(loss, expected, 1e-5)
    ours, = torch.autograd.grad(3 * loss, s)
    theirs, = torch.autograd.grad(3 * expected, s)
    assert ours.dtype == dtype and close(ours, theirs, tolerance)
    for v in range(5):
        assert ours[v].any() == any(v == learner for _, learner in pairs)

def test_a_surely_wrong_student_has_a_finite_loss():
    """Its softmax is 0 at the target, whose logarithm would be -inf."""
    s = torch.tensor([[[1000.0, 0.0]]]).requires_grad_()
    loss = mokd.H(torch.tensor([[[0.0, 1.0]]]), mokd.log_softmax(s, 0.1), [(0, 0)])
    loss.backward()
    assert loss == 10000 and s.grad.isfinite().all()

# -------------------------------------------------------------------------------------------- schedules (A.1)
def test_rates_warm_up_in_a_line_and_fall_by_a_cosine():
    cfg = mokd.parse_args(["--batch_size", "512", "--cnn_lr_end", "0.01"])
    rates = [mokd.schedule(cfg, step, 5).lr for step in range(501)]
    peak = 0.1 * 512 / 256
    warmup = peak * np.arange(50) / 50
    cosine = 0.01 + (peak - 0.01) * (1 + np.cos(np.pi * np.arange(451) / 450)) / 2
    assert [lr["cnn"] for lr in rates] == pytest.approx([*warmup, *cosine])
    assert rates[50]["vit"] == pytest.approx(0.0006) and rates[500]["vit"] == pytest.approx(1e-6)

def test_ema_rises_to_1_by_a_cosine_and_weight_decay_stays_or_rises():
    cfg = mokd.parse_args(["--wd_end", "0.4"])
    assert [mokd.schedule(cfg, s, 5).l for s in (0, 250, 500)] == pytest.approx([0.996, 0.998, 1])
    assert [mokd.schedule(cfg, s, 5).wd["vit"] for s in (0, 250, 500)] == pytest.approx([0.04, 0.22, 0.4])
    assert mokd.schedule(mokd.Config(), 499, 5).wd == dict(cnn=1e-4, vit=pytest.approx(0.04))

def test_the_targets_temperature_rises_by_epoch_for_30_epochs():
    now = [mokd.schedule(mokd.Config(), 7 * epoch + 3, 7) for epoch in range(100)]
    assert [n.epoch for n in now] == list(range(100))
    assert [n.tau_ for n in now] == pytest.approx([*np.linspace(0.04, 0.07, 30), *[0.07] * 70])

# ------------------------------------------------------------------- the two models: what each has of its own
LARGE_VIT = ["--model_kwargs2", "img_size=32", "patch_size=8", "embed_dim=96", "depth=4", "num_heads=2"]
CNNS = ["--arch2", "resnet18", "--model_kwargs2", *CNN]
TWO_VITS = ["--arch1", "vit_tiny", "--model_kwargs1", *VIT]

@pytest.mark.parametrize("args, expected", [
    ([], (1, 0.1)), (LARGE_VIT, (0.1, 1)), (["--lambda2", 0.5], (1, 0.5)), (CNNS, (1, 0.1)),
    ([*CNNS, "--model_kwargs1", *CNN], (1, 1))])
def test_lambda_is_1_for_the_larger_backbone_and_a_tenth_for_the_smaller(args, expected):
    cfg = config("--model_kwargs1", "layers=1,1,1,1", "channels=16,16,32,32", *args)
    models_of(cfg)
    assert (cfg.lambda1, cfg.lambda2) == expected

def test_identical_architectures_start_from_different_weights_and_momentum_nets_from_their_students():
    models = models_of(config(*CNNS))
    for part in ("backbone.model.conv1.weight", "mlp_head.mlp.0.weight", "t_head.pos"):
        assert not torch.equal(*[m.net.get_parameter(part) for m in models])
    for m in models:
        assert all(map(torch.equal, m.params, m.params_)) and not any(p.requires_grad for p in m.params_)

def test_without_cross_losses_a_model_does_not_depend_on_its_partner():
    """CNN and ViT, each beside two partners, as either model. So sm alone is independent training."""
    deeper = ["resnet34", "--model_kwargs{0}", "layers=1,1,1,2", "channels=8,8,8,24"]
    for i, own in ((0, ONE), (0, TWO_VITS), (1, TWO), (1, CNNS)):
        states = []
        for partner in (["vit_tiny", "--model_kwargs{0}", *VIT], deeper):
            other = [f"--arch{2 - i}", *[word.format(2 - i) for word in partner]]
            cfg = config(*own, *other, "--losses", "sm", "--drop_path", 0.5)
            models = models_of(cfg)
            for step in range(3):
                mokd.train_step(*models, views_of(cfg, step), cfg, now_of(cfg, step))
            states.append(models[i].net.state_dict() | renamed(models[i].n_.state_dict(), "n_."))
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

def test_weight_decay_spares_biases_and_1d_parameters_and_each_parameter_is_in_one_group():
    for args in ([], ["--t_optimizer", "sgd"], ["--cnn_optimizer", "adamw", "--vit_optimizer", "sgd"]):
        for m in models_of(config(*args)):
            seen = []
            for optimizer in m.optimizers:
                for group in optimizer.param_groups:
                    seen += map(id, group["params"])
                    assert all((p.dim() > 1) == group["decays"] for p in group["params"])
            assert sorted(seen) == sorted(id(p) for p in m.params if p.requires_grad)

def test_stochastic_depth_is_for_the_student_vit_alone():
    cfg = config("--drop_path", 0.5)
    model1, model2 = models_of(cfg)
    def rates(net):
        return {m.drop_prob for m in net.modules() if isinstance(m, timm.layers.DropPath)}
    assert max(rates(model2.net)) == 0.5
    assert rates(model1.net) | rates(model2.n_) <= {0.0}
    x, losses = views_of(cfg), []
    for step in (1, 1, 2):   # a step has its own draws
        models = models_of(cfg)
        losses.append(mokd.train_step(*models, x, cfg, now_of(cfg, step))[0]["sm2"])
    assert losses[0] == losses[1] != losses[2]

def test_last_layers_stand_still_in_their_frozen_epochs():
    cfg = config("--epochs", 2, "--freeze_last_layer", 1)
    models = models_of(cfg)
    heads = [head for m in models for head in (m.net.mlp_head, m.net.t_head)]
    learned = [p for head in heads for p in head.last.parameters() if p.requires_grad]
    start = [p.clone() for p in learned]
    assert len(learned) == 7   # directions and gains; a CNN's MLP-Head has a fixed gain
    for step, epoch in ((8, 0), (9, 0), (10, 1)):
        mokd.train_step(*models, views_of(cfg, step), cfg, now_of(cfg, step))
        assert [torch.equal(p, q) for p, q in zip(learned, start)] == [epoch == 0] * 7

# ------------------------------------------------------------------------------------------------ Algorithm 1
def naive_t_head(head, Z, query=None):
    """3.4 and Fig. 3 in plain operations: tokens (B, N, C), queries (B, dim) -> logits (B, K)."""
    w = dict(head.named_parameters())
    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    def layer_norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    x = linear(Z, "embed") if "embed.weight" in w else Z
    n, side = math.isqrt(w["pos"].shape[1]), math.isqrt(x.shape[1])
    grid = w["pos"].view(1, n, n, -1).permute(0, 3, 1, 2)
    if side != n:
        grid = F.interpolate(grid, [side, side], mode="bicubic", align_corners=False)
    x = x + grid.flatten(2).mT
    if query is not None:
        x = torch.cat([query[:, None], x], 1)
    for i, block in enumerate(head.blocks):
        heads = block.attn.num_heads
        qkv = linear(layer_norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1)
        q, k, v = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv]
        attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(layer_norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    x = layer_norm(x, "norm")
    x = x.mean(1) if query is None else x[:, 1:].mean(1)
    if head.l2_normalize:
        x = x / x.norm(dim=-1, keepdim=True)
    gain, direction = [w[f"last.parametrizations.weight.original{i}"] for i in (0, 1)]
    return x @ (gain * direction / direction.norm(dim=1, keepdim=True)).T

def naive_losses(models, x, cfg, tau_):
    """Algorithm 1 as a loop over pairs of views -> the losses by name, and what the momentum nets said."""
    B, V, on, tau = cfg.batch_size, 2 + cfg.local_crops, cfg.losses.split(","), cfg.student_temp
    pairs = [(g, v) for g in range(2) for v in range(V) if v != g]
    searches = {"all": pairs, "global": [(0, 1), (1, 0)], "local": [(0, v) for v in range(2, V)]}[cfg.search]
    def outputs(net, x):
        """-> for each view m, t, pooled and local features."""
        views = []
        for size in x:
            pooled, tokens = net.backbone(size)
            views += zip(pooled.split(B), tokens.split(B))
        return [(net.mlp_head(pooled), naive_t_head(net.t_head, Z) if net.t_head else None, pooled, Z)
                for pooled, Z in views]
    students = [outputs(m.net, x) for m in models]
    with torch.no_grad():
        momentum = [outputs(m.n_, x[:1]) for m in models]
    losses = {}
    for i, j in ((0, 1), (1, 0)):
        n, own_, other_ = models[i].net, models[i].n_, models[j].n_
        terms = dict(sm=[], st=[], cm=[], ct=[])
        for g, v in pairs:
            m, t, *_ = students[i][v]
            terms["sm"].append(naive_H(momentum[i][g][0], m, own_.C_m, tau_, tau))
            if "st" in on:
                terms["st"].append(naive_H(momentum[i][g][1], t, own_.C_t, tau_, tau))
            if "cm" in on:
                terms["cm"].append(naive_H(momentum[j][g][0], m, other_.C_m, tau_, tau))
        for g, v in searches if "ct" in on else ():
            _, t, query, _ = students[i][v]
            if isinstance(n.t_head.embed, nn.Linear):
                query = query @ n.t_head.embed.weight.T + n.t_head.embed.bias
            found = naive_t_head(other_.t_head, momentum[j][g][3], query.detach())
            terms["ct"].append(naive_H(found, t, other_.C_t if cfg.search_center else 0, tau_, tau))
        own = {name: sum(values) / max(1, len(values)) for name, values in terms.items()}
        lambda_ = (cfg.lambda1, cfg.lambda2)[i]
        own["loss"] = own["sm"] + own["st"] + lambda_ * (own["cm"] + own["ct"])
        losses |= {f"{name}{i + 1}": value for name, value in own.items()}
    return losses, momentum

@torch.no_grad()
def naive_update(m, grads, cfg, now, memory):
    """Clipping, then SGD with momentum or AdamW by their formulas, with rates and weight decays of A.1."""
    def cosine(start, end):
        return end + (start - end) * (1 + math.cos(math.pi * now.step / (10 * cfg.epochs))) / 2
    for name, p in m.net.named_parameters():
        if (m.i, name) not in grads:
            continue
        g = grads[m.i, name]
        g = g * min(1, cfg.clip_grad / (float(g.norm()) + 1e-6))
        in_t_head = name.startswith("t_head")
        kind = cfg.t_optimizer if in_t_head and m.family == "cnn" else getattr(cfg, f"{m.family}_optimizer")
        if m.family == "vit" or in_t_head:
            lr = cosine(cfg.vit_lr * 8 / 256, cfg.vit_lr_end)
            wd = cosine(cfg.vit_wd, cfg.wd_end or cfg.vit_wd)
        else:
            lr, wd = cosine(cfg.cnn_lr * 8 / 256, cfg.cnn_lr_end), cfg.cnn_wd
        if p.dim() == 1:
            wd = 0
        n, a, b = memory.get((m.i, name), (0, 0, 0))
        n += 1
        if kind == "sgd":
            a = 0.9 * a + g + wd * p
            p -= lr * a
        else:
            a, b = 0.9 * a + 0.1 * g, 0.999 * b + 0.001 * g ** 2
            p -= lr * wd * p
            p -= lr * (a / (1 - 0.9 ** n)) / ((b / (1 - 0.999 ** n)).sqrt() + 1e-8)
        memory[m.i, name] = n, a, b

RELEASED = ["--search", "local", "--no-search_center", "--vit_pool", "cls"]
VARIANTS = {
    "paper": [], "released": RELEASED,
    "search global": ["--search", "global"], "no local views": ["--local_crops", 0], "t_norm": ["--t_norm"],
    "lambdas": ["--lambda1", 0.3, "--lambda2", 0.7], "clipped": ["--clip_grad", 0.01],
    "temperatures": ["--student_temp", 0.2, "--teacher_temp_start", 0.1],
    "momenta": ["--ema", 0.8, "--center_momentum", 0.6],
    "optimizers": ["--t_optimizer", "sgd", "--vit_optimizer", "sgd", "--cnn_optimizer", "adamw",
                   "--cnn_lr", 0.01],   # which amplifies rounding less
    "weight decay": ["--wd_end", 0.4, "--cnn_wd", 0.1], "sgd in a CNN's T-Head": ["--t_optimizer", "sgd"],
    **{losses: ["--losses", losses] for losses in ("sm", "sm,cm", "sm,st", "sm,ct")}}

def with_history(models):
    """Centers that are not 0, and momentum nets that are not their students."""
    g = torch.Generator().manual_seed(5)
    for m in models:
        for C in (m.n_.C_m, m.n_.C_t):
            C.copy_(0.1 * torch.randn(C.shape, generator=g))
        for p in m.params_:
            p.data += 0.02 * torch.randn(p.shape, generator=g)
    return models

@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps_equal_a_naive_transcription_of_algorithm_1(variant):
    several = ["--model_kwargs1", *CNN, "output_stride=8"]   # local features
    cfg = config(*several, "--t_depth", 2, "--drop_path", 0, *VARIANTS[variant])
    models = with_history(models_of(cfg))
    naive, memory = copy.deepcopy(models), {}
    for step in (1, 2):
        x, now = views_of(cfg, step), now_of(cfg, step)
        losses, grads = gradients_of_step(cfg, models, x, now)
        expected, momentum = naive_losses(naive, x, cfg, now.tau_)
        for name, value in expected.items():
            assert close(losses.get(name, 0), value, 1e-5), name
        assert losses.keys() == {name for name in expected if name[:-1] in ("loss", *cfg.losses.split(","))}

        # Some true gradients are 0, so the largest of a model is looked at too.
        (expected["loss1"] + expected["loss2"]).backward()
        for m in naive:
            own = {name: p.grad for name, p in m.net.named_parameters() if p.grad is not None}
            assert own.keys() == {name for i, name in grads if i == m.i}
            largest = max(grad.abs().max() for grad in own.values())
            for name, grad in own.items():
                difference = (grads[m.i, name] - grad).abs().max()
                assert difference <= 1e-4 * grad.abs().max() + 1e-6 * largest, (m.i, name)

        # What follows: clipping, optimizers, momentum nets, centers. It begins from the step's own gradients,
        # because AdamW makes much of rounding in small ones.
        for m, n, (logits_m, logits_t) in zip(models, naive, [list(zip(*own))[:2] for own in momentum]):
            naive_update(n, grads, cfg, now, memory)
            n.net.zero_grad(set_to_none=True)
            for p, p_ in zip(n.params, n.params_):
                p_.data.copy_(now.l * p_ + (1 - now.l) * p.data)
            for C, logits in ((n.n_.C_m, logits_m), (n.n_.C_t, logits_t)):
                if logits[0] is not None:
                    mean = torch.cat(logits).mean(0)
                    C.copy_(cfg.center_momentum * C + (1 - cfg.center_momentum) * mean)
            for net, other in ((m.net, n.net), (m.n_, n.n_)):
                for name, value in other.state_dict().items():
                    assert torch.allclose(net.state_dict()[name], value, atol=2e-6), name

def test_no_gradient_reaches_a_momentum_net_a_target_or_a_query(monkeypatch):
    targets, H = [], mokd.H
    monkeypatch.setattr(mokd, "H", lambda t, *others: targets.append(t) or H(t, *others))
    forward = mokd.THead.forward
    def with_query(head, Z, query=None):
        assert query is None or not query.requires_grad
        return forward(head, Z, query)
    monkeypatch.setattr(mokd.THead, "forward", with_query)
    cfg = config()
    models = models_of(cfg)
    mokd.train_step(*models, views_of(cfg), cfg, now_of(cfg))
    assert len(targets) == 8 and not any(t.requires_grad for t in targets)   # two of them are of searches
    assert all(p.grad is None and not p.requires_grad for m in models for p in m.params_)

class StoredBackbone(nn.Module):
    """Gives out stored features, which are parameters, so that they have gradients."""
    def __init__(self, global_, local, family):
        super().__init__()
        self.features = nn.ParameterList([nn.Parameter(global_), nn.Parameter(local)])
        self.family, self.dim = family, global_.shape[1 if family == "cnn" else 2]
        self.num_tokens = 49 if family == "cnn" else 196

    def forward(self, x):
        y = self.features[0 if x.shape[-1] == 2 else 1]
        if self.family == "vit":
            return y[:, 0], y[:, 1:]   # CLS, patches
        return y.mean((2, 3)), y.flatten(2).mT

def our_name(stored):
    """Name of a parameter in release_step.npz -> ours."""
    prefixes = {"mlp.fc1": "mlp_head.mlp.0", "mlp.fc2": "mlp_head.mlp.2", "mlp.fc3": "mlp_head.mlp.4",
                "mlp.last": "mlp_head.last", "t.block": "t_head.blocks.", "t.": "t_head."}
    prefix = next(prefix for prefix in prefixes if stored.startswith(prefix))
    name = prefixes[prefix] + stored.removeprefix(prefix)
    name = name.replace("last.gain", "last.parametrizations.weight.original0")
    return name.replace("last.direction", "last.parametrizations.weight.original1")

@pytest.fixture(scope="module")
def released():
    """One step of the released code as it is stored, and as train_step repeats it from the stored weights and
    features -> two dicts of arrays, of the same names."""
    with np.load(os.path.join(HERE, ".ci", "release_step.npz")) as file:
        d = {name: torch.as_tensor(file[name]) for name in file}
    B, L, K = [int(d[f"meta.{name}"]) for name in ("B", "local_crops", "K")]
    flags = [*RELEASED, "--out_dim", K, "--hidden_dim", 40, "--bottleneck_dim", 12, "--t_dim", 12,
             "--local_crops", L, "--batch_size", B, "--dtype", "fp32"]
    for name in ("lambda1", "lambda2", "student_temp", "center_momentum"):
        flags += [f"--{name}", float(d[f"meta.{name}"])]
    cfg = mokd.parse_args([*map(str, flags)])

    # Both models as they were before the step
    models = []
    for i, family in ((1, "cnn"), (2, "vit")):
        m = mokd.Model(cfg, i, StoredBackbone(d[f"student.Z{i}g"], d[f"student.Z{i}l"], family), CPU)
        m.n_.backbone.features[0].data = d[f"teacher.Z{i}g"]
        m.n_.C_m.copy_(d[f"center.cm{i}"])
        m.n_.C_t.copy_(d[f"center.ct{i}"])
        for net, prefix in ((m.net, f"net{i}."), (m.n_, f"net{i}_.")):
            for name in d:
                if name.startswith(prefix):
                    p = net.get_parameter(our_name(name.removeprefix(prefix)))
                    p.data.copy_(d[name] if name.endswith("pos") else d[name].view_as(p))
        models.append(m)

    # Its outputs, then losses, gradients and centers of the whole step
    x = [torch.zeros(2 * B, 3, 2, 2), torch.zeros(L * B, 3, 1, 1)]
    ours, queries, tokens_ = {}, {}, {}
    with torch.no_grad():
        for m in models:
            ours[f"out.m{m.i}"], ours[f"out.t{m.i}"], Z = m.net(x)
            ours[f"out.m{m.i}_"], ours[f"out.t{m.i}_"], Z_ = m.n_(x[:1])
            queries[m.i], tokens_[m.i] = m.net.t_head.query_of(Z.pooled), Z_.tokens[0]
        ours["out.query1_global"], ours["out.query1_local"] = queries[1][:2], queries[1][2:]
        for m in models:
            for which in ("local", "global"):
                pairs, query = mokd.search_pairs(2 + L, which), queries[3 - m.i]
                ours[f"out.search{m.i}_{which}"] = mokd.search(m.n_.t_head, query, tokens_[m.i], pairs)
    now = now_of(cfg)._replace(tau_=float(d["meta.teacher_temp"]))
    losses, grads = gradients_of_step(cfg, models, x, now)
    ours |= {"loss." + name.replace("loss", "total"): loss for name, loss in losses.items()}
    for m in models:
        ours[f"center_after.cm{m.i}"], ours[f"center_after.ct{m.i}"] = m.n_.C_m, m.n_.C_t
    for name in d:
        if name.startswith("grad.net"):
            ours[name] = grads[int(name[8]), our_name(name[10:])]
        elif name.startswith("grad.student.Z"):
            ours[name] = grads[int(name[14]), f"backbone.features.{'gl'.index(name[15])}"]
    return d, ours

@pytest.mark.parametrize("part, number", [("out", 14), ("loss", 10), ("center_after", 4), ("grad", 100)])
def test_the_released_codes_step_is_reproduced(part, number, released):
    """Heads, queries and searches; losses; centers; gradients."""
    d, ours = released
    names = [name for name in d if name.startswith(f"{part}.")]
    assert len(names) >= number
    for name in names:
        assert close(ours[name].reshape(d[name].shape), d[name], 3e-6), name

# ------------------------------------------------------------------- Algorithm 1: precision, memory, devices
def test_low_precision_takes_the_same_step():
    """bf16, and fp16 with its losses scaled up. (Stride 8: on CPUs with AMX, PyTorch 2.15's bf16 weight
    gradient of a strided 3x3 convolution of a 1x1 map is garbage.)"""
    losses, grads, moved = {}, {}, {}
    for dtype in ("fp32", "bf16", "fp16"):
        cfg = config("--model_kwargs1", *CNN, "output_stride=8", "--drop_path", 0, "--dtype", dtype)
        models = models_of(cfg)
        weight = models[0].net.backbone.model.conv1.weight   # whose gradient is clipped, at its true size
        start = weight.detach().clone()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=dtype == "fp16")
        losses[dtype], own = gradients_of_step(cfg, models, views_of(cfg), now_of(cfg), scaler)
        grads[dtype] = torch.cat([grad.flatten() for grad in own.values()])
        moved[dtype] = (weight.detach() - start).norm().item()
    for dtype in ("bf16", "fp16"):
        for name, value in losses["fp32"].items():
            assert losses[dtype][name] == pytest.approx(float(value), rel=0.03), (dtype, name)
        assert losses[dtype]["sm1"] != losses["fp32"]["sm1"]
        assert F.cosine_similarity(grads[dtype], grads["fp32"], dim=0) > 0.9
        assert moved[dtype] == pytest.approx(moved["fp32"], rel=0.1)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0 ** 30), weight.detach().clone()
    mokd.train_step(*models, views_of(cfg), cfg, now_of(cfg), scaler)   # gradients overflow: no update
    assert torch.equal(weight, before) and scaler.get_scale() < 2 ** 30

def test_compiled_models_take_the_same_step(monkeypatch):
    """All four nets are captured as graphs. To make machine code of them would take minutes."""
    compiled, losses, original = [], [], nn.Module.compile
    def capture(net, dynamic):
        compiled.append(net)
        original(net, dynamic=dynamic, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", capture)
    torch.compiler.reset()
    for flag in ("--no-compile", "--compile"):
        cfg = config("--drop_path", 0, "--local_crops", 0, flag)
        models = models_of(cfg)
        losses.append(mokd.train_step(*models, views_of(cfg), cfg, now_of(cfg))[0])
    assert compiled == [net for m in models for net in (m.net, m.n_)]
    assert losses[1] == {name: pytest.approx(float(loss), rel=1e-4) for name, loss in losses[0].items()}

def test_grad_checkpointing_gives_the_same_losses_and_gradients():
    results = []
    for flag in ("--no-grad_checkpointing", "--grad_checkpointing"):
        cfg = config("--drop_path", 0.3, flag)
        models = models_of(cfg)
        assert models[1].net.backbone.model.grad_checkpointing == (flag == "--grad_checkpointing")
        losses, grads = gradients_of_step(cfg, models, views_of(cfg), now_of(cfg))
        results.append((losses, grads, models[0].n_.state_dict()))
    (losses, grads, state), (losses_again, grads_again, state_again) = results
    assert losses == losses_again and grads.keys() == grads_again.keys()
    assert all(close(grads_again[key], grads[key], 1e-5) for key in grads)
    # Batch norms of students count twice, those of momentum nets do not.
    assert all(torch.equal(state_again[name], state[name]) for name in state if "running" in name)

class FakeGPU(TorchDispatchMode):
    """Inside FakeTensorMode: tensors of the GPU are fake, without values; those of the CPU are real. To use
    both at once raises, and so does a look at a value of the GPU; if strict, also a copy that waits."""
    strict = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_gpu = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        if not on_gpu and (device is None or device.type == "cpu"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if self.strict and func is torch.ops.aten._to_copy.default and device is not None:
            assert device.type == "cuda" and (on_gpu or kwargs.get("non_blocking")), "a copy that waits"
        return func(*args, **kwargs)

def to_fake(net, device=None, **_):
    """net.to(device), without the swaps of torch's own, which fake tensors do not allow."""
    for module in net.modules():
        for own in (module._parameters, module._buffers):
            for name, t in own.items():
                if t is not None and device is not None:
                    moved = t.detach().to(device)
                    own[name] = nn.Parameter(moved, t.requires_grad) if isinstance(t, nn.Parameter) else moved
    return net

@pytest.mark.skipif(not torch.backends.cuda.is_built() or torch.__version__ < "2.9",
                    reason="this torch fakes no tensors on CUDA without a driver")
@pytest.mark.parametrize("args", [
    [], [*RELEASED, "--dtype", "fp16"], ["--losses", "sm"], CNNS, TWO_VITS],
    ids=["paper", "released", "sm", "CNNs", "ViTs"])
def test_a_step_on_cuda_stays_on_it_and_never_waits(args, monkeypatch):
    """Views and step. Backward needs a driver, so gradients are put in its place."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)   # autocast asks this
    monkeypatch.setattr(nn.Module, "to", to_fake)
    device, cfg = torch.device("cuda", 0), config("--dtype", "bf16", *args)
    with FakeTensorMode(allow_non_fake_inputs=True), FakeGPU() as gpu:
        models = mokd.build_models(cfg, device)
        def backward(loss):
            for p in models[0].params + models[1].params:
                if p.requires_grad:
                    p.grad = torch.ones_like(p)
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        crops = [torch.zeros(8, 2, size, size, 3, dtype=torch.uint8) for size in (32, 16)]
        gpu.strict = True
        x = mokd.make_views(crops, cfg, device, 0)
        losses, targets = mokd.train_step(*models, x, cfg, now_of(cfg))
    tensors = [*x, *losses.values()]
    for m in models:
        tensors += [*m.net.state_dict().values(), *m.n_.state_dict().values()]
        states = [state for optimizer in m.optimizers for state in optimizer.state.values()]
        tensors += [value for state in states for value in state.values() if value is not None]
        assert len(states) == sum(p.requires_grad for p in m.params)
    assert all(t.device == device for t in tensors)
    assert {t.dtype for t in targets.values() if t is not None} == {torch.float32}

STEP_ON_GPU = """
import sys, torch, mokd
if not torch.cuda.is_available():
    raise SystemExit("no GPU")
cfg = mokd.parse_args(sys.argv[1:])
device = mokd.join_processes(cfg)
models = mokd.build_models(cfg, device)
crops = [torch.randint(256, (cfg.batch_size, n, size, size, 3), dtype=torch.uint8).pin_memory()
         for n, size in ((2, cfg.global_size), (cfg.local_crops, cfg.local_size))]
for step in range(3):
    torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")   # a wait for the GPU raises
    x = mokd.make_views(crops, cfg, device, step)
    mokd.train_step(*models, x, cfg, mokd.schedule(cfg, step, 10))
"""

def test_no_step_waits_for_the_gpu():
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env["PYTHONPATH"] = HERE
    if GPUS is not None:
        env["CUDA_VISIBLE_DEVICES"] = GPUS
    done = subprocess.run([sys.executable, "-c", STEP_ON_GPU, *SMALL, *PAIR], capture_output=True, text=True,
                          env=env)
    if done.stderr.strip().endswith("no GPU"):
        pytest.skip("needs a GPU")
    assert done.returncode == 0, done.stderr

# ------------------------------------------------------------------------------------------------- k-NN (A.2)
def test_knn_is_a_vote_of_the_nearest_weighted_by_their_cosine():
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 6, generator=g), torch.randn(300, 6, generator=g)
    labels = torch.randint(4, (50,), generator=g)
    ks = (1, 5, 80)   # the last is more than there are
    votes = mokd.knn_classify(bank, labels, queries, ks, classes=5)
    assert votes.shape == (3, 300, 5)
    for q in (0, 1, 255, 256, 299):
        cosines = F.cosine_similarity(queries[q], bank).tolist()
        nearest = sorted(zip(cosines, labels.tolist()), reverse=True)
        for own, k in zip(votes, ks):
            expected = [0.0] * 5
            for cosine, label in nearest[:k]:
                expected[label] += math.exp((cosine - nearest[0][0]) / 0.07)
            assert own[q].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)

def test_features_are_normalized_pooled_representations_of_images_with_a_label():
    cfg = config()
    backbones = [m.n_.backbone for m in models_of(cfg)]
    pixels, labels = mokd.draw_toy(20, 1)
    labels[3] = -1
    views = mokd.EvalView(TensorDataset(pixels, labels), 32)
    features, found = mokd.extract_features(backbones, views, CPU, 8)
    kept = [i for i in range(20) if i != 3]
    assert found.tolist() == labels[kept].tolist() and backbones[0].training
    small = TF.resize(pixels, [37], TF.InterpolationMode.BICUBIC, antialias=True)   # as DINO's 256 for 224
    x = mokd.normalize(TF.center_crop(small, [32, 32]).float() / 255)
    for own, backbone in zip(features, backbones):
        with torch.no_grad():
            expected = F.normalize(backbone.eval()(x)[0], dim=1)
        assert own.dtype == torch.half and torch.allclose(own.float(), expected[kept], atol=1e-3)

def test_knn_accuracy_is_the_share_of_right_votes_with_training_images_as_the_bank():
    cfg = config("--batch_size", 10)
    backbone = models_of(cfg)[1].n_.backbone
    train, val = few_images(80), TensorDataset(*mokd.draw_toy(40, "others"))
    views = [mokd.EvalView(images, cfg.global_size) for images in (train, val)]
    ((bank,), labels), ((queries,), answers) = [mokd.extract_features([backbone], v, CPU) for v in views]
    right = (mokd.knn_classify(bank, labels, queries)[0].argmax(1) == answers).sum()
    assert mokd.knn_accuracy([backbone], train, val, cfg, CPU) == [pytest.approx(100 * int(right) / 40)]

def test_features_that_are_not_finite_stop_an_evaluation(capsys):
    backbone = models_of(config())[0].net.backbone
    backbone.model.conv1.weight.data[:] = math.nan
    with pytest.raises(SystemExit):
        mokd.extract_features([backbone], mokd.EvalView(few_images(), 32), CPU)
    assert "not finite" in capsys.readouterr().err

def test_the_log_has_entropy_of_targets_and_their_spread_between_images():
    """Of 8 views that point surely at 4 logits, two views at each, and of views that all say nothing."""
    sure = F.one_hot(torch.arange(8) // 2, 32).float().view(2, 4, 32)
    targets = dict(m1=sure, t1=torch.full((2, 4, 32), 1 / 32), m2=None, t2=None)
    stats = mokd.target_statistics(targets)
    expected = dict(entropy_m1=0, spread_m1=math.log(4), entropy_t1=math.log(32), spread_t1=0)
    assert stats == pytest.approx(expected, abs=1e-5)

# ------------------------------------------------------------------------------------------------- whole runs
# 12 short steps on 12 images, with checkpoints after steps 4, 8 and 12; an epoch ends after step 6.
SHORT = "--batch_size 2 --epochs 2 --save_every 4 --log_every 2".split()

def draw_images(folder, number=6, classes="ab"):
    """Class folders of `number` images each, all different, of 40 x 60 colored squares."""
    for c in classes:
        (folder / c).mkdir(parents=True)
        for i in range(number):
            squares = np.random.default_rng([ord(c), i]).integers(0, 256, (4, 6, 3))
            pixels = np.kron(squares, np.ones((10, 10, 1)))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / c / f"{i:03}.jpg")
    return folder

def train(out, data, *args):
    """A run of the command line, in this process."""
    torch.set_num_threads(1)   # as in processes that tests start, so that digits agree
    mokd.main([*SMALL, *PAIR, *SHORT, "--data", str(data), "--out", str(out), *map(str, args)])

def end_of(capsys, out, data, *args):
    """A run that ends with a sentence -> exit code, sentence."""
    with pytest.raises(SystemExit) as end:
        train(out, data, *args)
    return end.value.code, capsys.readouterr().err

def after(monkeypatch, step, action):
    """Calls action(model1) when a run has taken step number `step`."""
    real = mokd.train_step
    def train_step(model1, model2, x, cfg, now, scaler):
        result = real(model1, model2, x, cfg, now, scaler)
        if now.step + 1 == step:
            action(model1)
        return result
    monkeypatch.setattr(mokd, "train_step", train_step)

def records_of(out):
    with open(out / "log.jsonl") as f:
        return [json.loads(line) for line in f]

def state_of(out):
    return torch.load(out / "checkpoint.pth", weights_only=True)

def copy_of(run, folder):
    folder.mkdir()
    for file in run.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder

def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def same_run(a, b):
    """Equal in weights, momentum nets, centers, optimizers, step and scaler, to the last bit."""
    a, b = state_of(a), state_of(b)
    return same(a | dict(config=None), b | dict(config=None))

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images") / "data")

@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(out, data)
    return out

@pytest.fixture(scope="module")
def halted(data, tmp_path_factory):
    """The folder of the same run, which a signal stopped in its second epoch."""
    out = tmp_path_factory.mktemp("halted") / "out"
    with pytest.MonkeyPatch.context() as patch:
        after(patch, 7, lambda model1: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(out, data)
    return out

def test_a_run_leaves_its_log_its_weights_and_a_checkpoint(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)   # it is not needed
    train(tmp_path / "new" / "out", data)
    files = sorted(file.name for file in (tmp_path / "new" / "out").iterdir())
    assert files == ["checkpoint.pth", "log.jsonl", "model1.pth", "model2.pth"]
    records = records_of(tmp_path / "new" / "out")
    start = records.pop(0)
    assert start["step"] == 0 and start["settings"]["seed"] == 0 and start["settings"]["lambda2"] == 0.1
    assert [(r["epoch"], r["step"], r["steps"]) for r in records] == [
        (0, 2, 12), (0, 4, 12), (0, 6, 12), (1, 8, 12), (1, 10, 12), (1, 12, 12)]
    for r in records:
        assert r["loss1"] == pytest.approx(r["sm1"] + r["st1"] + 1.0 * (r["cm1"] + r["ct1"]), rel=1e-5)
        assert r["loss2"] == pytest.approx(r["sm2"] + r["st2"] + 0.1 * (r["cm2"] + r["ct2"]), rel=1e-5)
        for head in ("m1", "t1", "m2", "t2"):
            assert 0 <= r["entropy_" + head] + r["spread_" + head] <= math.log(32) + 1e-4
        assert {"lr1", "lr2", "images/s", "minutes_left"} < r.keys()
    printed = capsys.readouterr().out
    assert "12 images, 2 named classes" in printed and "processes: 1, on cpu, fp32" in printed
    assert "model 1: resnet18" in printed and "lambda2 = 0.1" in printed and "collapse" not in printed
    table = printed[printed.index("epoch"):].splitlines()[:7]
    heading, last = table[0], table[6]
    assert heading.split()[2:] == "loss1 sm1 st1 cm1 ct1 loss2 sm2 st2 cm2 ct2 img/s min left".split()
    assert len(heading) == len(last) <= 120 and last.split()[:2] == ["1", "12/12"]
    column = heading.index("ct2") + len("ct2")   # numbers end where their names do
    assert float(last[:column].split()[-1]) == pytest.approx(records[-1]["ct2"], abs=6e-4)

def test_a_caller_loads_the_weights_of_a_momentum_backbone_by_plain_torch_load(whole):
    weights = torch.load(whole / "model1.pth")
    momentum = state_of(whole)["model1"]["momentum_net"]
    backbone = {name for name in momentum if name.startswith("backbone.model.")}
    assert {f"backbone.model.{name}" for name in weights} == backbone
    assert all(torch.equal(value, momentum[f"backbone.model.{name}"]) for name, value in weights.items())

FAMILIES = """resnet18 vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
    xcit_nano_12_p16_224 cait_xxs24_224 beit_base_patch16_224 eva02_tiny_patch14_224 repvit_m0_9
    vit_wee_patch16_reg1_gap_256
    vit_base_patch16_siglip_224 swin_tiny_patch4_window7_224 convnext_atto poolformer_s12 edgenext_xx_small
    hiera_tiny_224 mobilenetv3_small_050 mobilenetv3_large_100 efficientnet_b0 regnetx_002 mixer_s16_224
    levit_128s pvt_v2_b0 davit_tiny coatnet_nano_rw_224 efficientformer_l1""".split()
SHALLOW = dict.fromkeys(("vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 "
                         "beit_base_patch16_224 vit_base_patch16_siglip_224").split(), dict(depth=1))
SHALLOW |= dict.fromkeys(("swin_tiny_patch4_window7_224", "davit_tiny", "pvt_v2_b0"),
                         dict(depths=(1, 1, 1, 1)))

def python_lines(printed, images):
    """Runs the lines of Python among what a program printed -> its variables."""
    variables = dict(timm=timm, torch=torch, images=images)
    names = "net", "feature", "classifier", "logits"
    for line in printed.splitlines():
        if line.startswith(tuple(name + i for name in names for i in "12")):
            exec(line, variables)
    return variables

@pytest.mark.parametrize("name", FAMILIES)
def test_the_printed_lines_give_the_feature_that_was_trained(name, tmp_path, capsys):
    """For every family of backbones."""
    torch.manual_seed(0)
    b = mokd.Backbone(name, SHALLOW.get(name))
    for p in b.parameters():   # else some first weights hide a difference
        p.data += 0.02 * torch.randn(p.shape)
    torch.save(b.model.state_dict(), tmp_path / "model1.pth")
    mokd.say_how_to_load(1, b, f"{tmp_path}/model1.pth", f"net1.forward_features(images){b.pooling}")
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        found = python_lines(capsys.readouterr().out, x)["feature1"]
        assert found.shape == (1, b.dim) and close(found, b.eval()(x)[0], 1e-6)

def test_a_run_ends_with_lines_that_give_both_features_at_other_sizes_too(data, tmp_path, capsys):
    args = [*TWO_VITS, "--vit_pool", "cls", "--losses", "sm", "--epochs", 1]
    train(tmp_path / "out", data, *args)
    x = torch.rand(2, 3, 48, 48)
    found = python_lines(capsys.readouterr().out, x)
    for m in models_of(config(*args)):
        m.n_.load_state_dict(state_of(tmp_path / "out")[f"model{m.i}"]["momentum_net"])
        assert close(found[f"feature{m.i}"], m.n_.backbone.eval()(x)[0], 1e-5)

def test_a_demo_shows_knn_before_and_after(tmp_path, monkeypatch, capsys):
    """At a fraction of its length."""
    draw_toy = mokd.draw_toy
    monkeypatch.setattr(mokd, "draw_toy", lambda n, part: draw_toy(n // 32, part))
    mokd.main(["--demo", "--epochs", "2", "--out", str(tmp_path)])
    said = [line.split(": ") for line in capsys.readouterr().out.splitlines() if line.startswith("k-NN")]
    assert [when for when, _ in said] == ["k-NN top-1 before training", "k-NN top-1 after epoch 1"]
    knn = [record for record in records_of(tmp_path) if "knn1" in record]
    assert [record["epoch"] for record in knn] == [-1, 1]
    for (_, shown), record in zip(said, knn):
        assert shown == f"{record['knn1']:.1f} % and {record['knn2']:.1f} %"

@pytest.mark.parametrize("sure, cure", [(False, "lower --teacher_temp"), (True, "lower rates")])
def test_a_collapse_is_reported_once_an_epoch_with_its_cure(sure, cure, data, tmp_path, capsys, monkeypatch):
    """Targets that are alike for all images: uniform, or all one answer."""
    answer = F.one_hot(torch.tensor(3), 32).float() if sure else torch.full((32,), 1 / 32)
    monkeypatch.setattr(mokd, "target", lambda t, center, tau_: None if t is None else answer.expand(t.shape))
    train(tmp_path / "out", data, "--losses", "sm", "--epochs", 3)
    said = [line for line in capsys.readouterr().out.splitlines() if "collapse?" in line]
    assert [line.split()[2] for line in said] == ["spread_m1,", "spread_m2,"] * 2   # not in the first epoch
    assert all(cure in line for line in said)

@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Images with train/ and val/."""
    folder = tmp_path_factory.mktemp("halves")
    draw_images(folder / "train")
    draw_images(folder / "val", number=4)
    return folder

def knn_epochs(out):
    return [record["epoch"] for record in records_of(out) if "knn1" in record]

def test_knn_during_training_stands_in_the_log_and_computes_nothing_in_double(halves, tmp_path, monkeypatch):
    """Apple's GPUs have no double precision."""
    def no_double(tensor):
        raise TypeError("the MPS framework doesn't support float64")
    monkeypatch.setattr(torch.Tensor, "double", no_double)
    train(tmp_path / "out", halves, "--knn_every", 2)
    last = records_of(tmp_path / "out")[-1]
    assert last.keys() == {"epoch", "knn1", "knn2"} and knn_epochs(tmp_path / "out") == [-1, 1]
    assert 0 <= last["knn1"] <= 100 and (last["knn1"] * 8 / 100).is_integer()

@pytest.mark.parametrize("step", [5, 6, 12])
def test_each_knn_is_in_the_log_once_wherever_a_signal_came(step, halves, tmp_path, monkeypatch):
    """An epoch has 6 steps, so steps 6 and 12 end before their k-NN."""
    with monkeypatch.context() as patch:
        after(patch, step, lambda model1: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(tmp_path / "out", halves, "--knn_every", 1)
    for _ in range(2):   # then it is finished
        train(tmp_path / "out", halves, "--knn_every", 1)
    assert knn_epochs(tmp_path / "out") == [-1, 0, 1]

def test_a_knn_in_which_a_run_was_killed_is_made_up_for(halves, tmp_path, monkeypatch):
    """The third, of the last epoch: its checkpoint is written before."""
    calls, knn_accuracy = [], mokd.knn_accuracy
    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return knn_accuracy(*args)
    with monkeypatch.context() as patch:
        patch.setattr(mokd, "knn_accuracy", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "out", halves, "--knn_every", 1)
    assert knn_epochs(tmp_path / "out") == [-1, 0] and state_of(tmp_path / "out")["step"] == 12
    train(tmp_path / "out", halves, "--knn_every", 1)
    assert knn_epochs(tmp_path / "out") == [-1, 0, 1]
    (tmp_path / "out" / "checkpoint.pth").unlink()   # a new run in the same folder has its own
    train(tmp_path / "out", halves, "--knn_every", 2)
    assert knn_epochs(tmp_path / "out") == [-1, 0, 1, -1, 1]

@pytest.mark.parametrize("rank, known, computes", [(0, True, False), (0, False, True), (1, False, False)])
def test_the_first_process_decides_by_its_log_whether_knn_is_missing(
        rank, known, computes, tmp_path, monkeypatch):
    cfg = config("--out", tmp_path, "--knn_every", 1, "--batch_size", 8)
    (tmp_path / "log.jsonl").write_text('{"epoch": 0, "knn1": 1.0, "knn2": 2.0}\n' * known)
    called = []
    monkeypatch.setattr(mokd, "RANK", rank)
    monkeypatch.setattr(mokd, "knn_accuracy", lambda *_: called.append(1) or [1.0, 2.0])
    mokd.log_knn(cfg, models_of(cfg), None, None, CPU, 10, 10)
    assert bool(called) == computes

def test_processes_without_an_image_take_part_in_knn(monkeypatch):
    backbone = models_of(config())[1].net.backbone
    monkeypatch.setattr(mokd, "WORLD", 16)
    monkeypatch.setattr(mokd, "RANK", 15)
    features, labels = mokd.extract_features([backbone], mokd.EvalView(few_images(8), 32), CPU)
    assert len(labels) == 8 and not features[0].any()

def test_a_log_line_has_the_mean_losses_since_the_last_and_with_log_every_0_there_is_none(data, tmp_path):
    logs = []
    for n in (0, 1, 4):
        train(tmp_path / str(n), data, "--log_every", n)
        logs.append(records_of(tmp_path / str(n))[1:])
    none, each, fourth = logs
    assert not none and len(fourth) == 3 and fourth[-1]["minutes_left"] == 0
    for i, record in enumerate(fourth):
        mean = sum(step["sm1"] for step in each[4 * i:4 * i + 4]) / 4
        assert record["sm1"] == pytest.approx(mean, rel=1e-5)

def test_images_a_second_are_those_of_training_alone(halves, tmp_path, monkeypatch):
    monkeypatch.setattr(mokd, "knn_accuracy", lambda *_: time.sleep(2) or [0.0, 0.0])
    train(tmp_path / "out", halves, "--knn_every", 1)
    assert all(record.get("images/s", 9) > 4 / 2 for record in records_of(tmp_path / "out"))

# -------------------------------------------------------------------------------- stopping and resuming a run
@pytest.mark.parametrize("number, workers, later", [(signal.SIGTERM, 0, 2), (signal.SIGINT, 2, 0)])
def test_a_signal_ends_a_run_after_its_step_and_the_same_command_repeats_the_rest_bit_for_bit(
        number, workers, later, whole, data, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        after(patch, 7, lambda model1: signal.raise_signal(number))
        code, message = end_of(capsys, tmp_path, data, "--workers", workers)
    assert code == 128 + number and number.name in message and "step 7" in message
    assert state_of(tmp_path)["step"] == 7
    train(tmp_path, data, "--workers", later)
    assert "at step 7" in capsys.readouterr().out
    assert same_run(whole, tmp_path)
    for mine, undisturbed in zip(records_of(tmp_path)[-2:], records_of(whole)[-2:]):
        for name, value in undisturbed.items():
            assert name in ("images/s", "minutes_left") or mine[name] == value, name

def test_two_quick_signals_of_a_kind_still_leave_a_checkpoint(data, tmp_path, monkeypatch, capsys):
    """A launcher and a scheduler may both send SIGTERM, and a terminal SIGINT twice."""
    def twice(model1):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            signal.raise_signal(number)
    after(monkeypatch, 7, twice)
    code, _ = end_of(capsys, tmp_path, data)
    assert code == 128 + signal.SIGTERM and state_of(tmp_path)["step"] == 7

@pytest.mark.parametrize("number, ends", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_second_interrupt_a_second_later_ends_at_once_and_sigterm_never_does(number, ends, data, tmp_path):
    """In the third image a loader hangs."""
    hangs = KILLED.replace("train_step = mokd.train_step", """import time
real = mokd.MultiCrop.read
def read(self, index):
    global real
    if index == 5:
        print("hangs", flush=True)
        for _ in range(60):
            time.sleep(0.1)
    return real(self, index)
mokd.MultiCrop.read = read
train_step = mokd.train_step""")
    (tmp_path / "hangs.py").write_text(hangs)
    args = [*SMALL, *PAIR, *SHORT, "--data", data, "--out", tmp_path / "out", "--epochs", "1"]
    process = subprocess.Popen([sys.executable, tmp_path / "hangs.py", HERE, "99", *args], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while "hangs" not in process.stdout.readline():
        assert process.poll() is None
    for wait in (1.2, 0):
        process.send_signal(number)
        time.sleep(wait)
    process.communicate(timeout=60)
    saved = (tmp_path / "out" / "checkpoint.pth").exists()
    assert (process.returncode, saved) == ((-signal.SIGINT, False) if ends else (128 + number, True))

def test_workers_leave_signals_to_the_training_process(data, whole, tmp_path, monkeypatch):
    """A terminal's Ctrl-C reaches them too."""
    def signal_workers(model1):
        for worker in mokd.multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
    after(monkeypatch, 2, signal_workers)
    train(tmp_path / "out", data, "--workers", 2)
    assert same_run(whole, tmp_path / "out")

# It kills itself, so the test knows when. Workers that a server starts, as in Python 3.14, would live on.
KILLED = """
import multiprocessing, os, signal, sys
sys.path.insert(0, sys.argv[1])
import mokd

train_step = mokd.train_step
def step_or_die(*args):
    if args[4].step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*args)

mokd.train_step = step_or_die
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    mokd.main(sys.argv[3:])
"""

def test_a_run_killed_at_any_step_leaves_no_worker_and_resumes_from_its_last_checkpoint(
        whole, data, tmp_path, capsys):
    step = np.random.default_rng().integers(5, 12)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    args = [*SMALL, *PAIR, *SHORT, "--data", data, "--out", tmp_path / "out", "--workers", "2"]
    process = subprocess.Popen([sys.executable, script, HERE, str(step), *args], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    # Workers hold the pipe open, so this returns when the last of them is gone.
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, printed
    saved = 4 if step < 8 else 8
    assert state_of(tmp_path / "out")["step"] == saved
    train(tmp_path / "out", data)
    assert f"at step {saved}" in capsys.readouterr().out
    assert same_run(whole, tmp_path / "out"), step

def test_a_finished_run_stays_as_it_is_and_says_how_to_train_for_more_epochs(whole, data, tmp_path, capsys):
    out = copy_of(whole, tmp_path / "out")
    train(out, data)
    assert same_run(whole, out) and records_of(out) == records_of(whole)
    code, message = end_of(capsys, out, data, "--epochs", 3)
    assert code == 2 and "--epochs was 2, is 3" in message
    for word in ("--init1", "--init2", "model1.pth", "model2.pth", "another --out"):
        assert word in message
    init = ["--init1", out / "model1.pth", "--init2", out / "model2.pth"]
    train(tmp_path / "more", data, *init, "--epochs", 1)

def test_rates_warmup_clipping_dtype_and_the_place_of_the_images_may_differ_on_resume_and_are_said(
        halted, data, tmp_path, capsys):
    out = copy_of(halted, tmp_path / "out")
    (tmp_path / "elsewhere").symlink_to(data)
    args = ["--cnn_lr", 0.5, "--warmup_epochs", 2, "--clip_grad", 1, "--dtype", "fp16", "--workers", 1]
    train(out, f"{tmp_path}/elsewhere/", *args)
    said = capsys.readouterr().out
    for words in ("--cnn_lr was 1.0, is 0.5", "--warmup_epochs was 0, is 2", "--clip_grad was 3.0, is 1.0",
                  "--dtype was fp32, is fp16", f"--data was {data}, is {tmp_path}/elsewhere/"):
        assert words in said
    rates = {group["lr"] for group in state_of(out)["model1"]["optimizers"][0]["param_groups"]}
    assert rates == {0.5 * (2 / 256) * 11 / 12}   # of the last step, by the new rate and its warm-up

def test_other_settings_are_refused_and_listed(halted, data, capsys):
    before = (halted / "checkpoint.pth").read_bytes()
    args = ["--seed", 3, "--t_norm", "--lambda2", 0.3, "--local_scale", 0.1, 0.2, "--cnn_lr", 0.5]
    code, message = end_of(capsys, halted, data, *args)
    assert code == 2 and f"{halted}/checkpoint.pth" in message
    for words in ("--seed was 0, is 3", "--t_norm was False, is True", "--lambda2 was 0.1, is 0.3",
                  "--local_scale was (0.05, 0.25), is (0.1, 0.2)"):
        assert words in message
    assert "cnn_lr" not in message and (halted / "checkpoint.pth").read_bytes() == before

def test_a_forks_checkpoint_is_refused_where_its_flags_are_unknown_and_a_new_flag_has_had_its_default(
        halted, data, tmp_path, capsys):
    out = copy_of(halted, tmp_path / "out")
    state = state_of(out)
    torch.save(state | dict(config=state["config"] | dict(arch3="vit_tiny")), out / "checkpoint.pth")
    code, message = end_of(capsys, out, data)
    assert code == 2 and "--arch3 was vit_tiny, is no flag" in message
    del state["config"]["t_norm"]
    torch.save(state, out / "checkpoint.pth")
    train(out, data)

def test_another_number_of_images_and_other_class_folders_are_refused(halted, tmp_path, capsys):
    more = draw_images(tmp_path / "more", number=7)
    code, message = end_of(capsys, halted, more)
    assert code == 2 and "12" in message and "14" in message
    other = draw_images(tmp_path / "other", classes="ac")
    code, message = end_of(capsys, halted, other)
    assert code == 2 and "images" in message and "class" in message

def test_loss_scale_of_fp16_is_resumed(halted, data, tmp_path):
    out = copy_of(halted, tmp_path / "out")
    scaler = dict(scale=1.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, _growth_tracker=70)
    torch.save(state_of(out) | dict(scaler=scaler), out / "checkpoint.pth")
    train(out, data, "--dtype", "fp16")
    assert state_of(out)["scaler"] == scaler | dict(_growth_tracker=75)   # five steps later

def test_a_checkpoint_is_not_mapped_while_it_may_be_replaced(halted, data, tmp_path, monkeypatch):
    """Windows refuses to replace a file that is."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    out, mapped = copy_of(halted, tmp_path / "out"), []
    def look(model1):
        with open("/proc/self/maps") as f:
            mapped.append(str(out) in f.read())
    after(monkeypatch, 8, look)
    train(out, data)
    assert mapped == [False]

# -------------------------------------------------------------------------------------------- nothing is lost
def test_one_flipped_bit_is_refused(halted, data, tmp_path, capsys):
    """torch.load takes it without a word."""
    out = copy_of(halted, tmp_path / "out")
    sound = (out / "checkpoint.pth").read_bytes()
    center = state_of(out)["model1"]["momentum_net"]["C_m"].numpy().tobytes()
    flipped = bytearray(sound)
    flipped[sound.index(center)] ^= 1
    for content in (bytes(flipped), sound[:len(sound) // 2], b"", b"text"):
        (out / "checkpoint.pth").write_bytes(content)
        code, message = end_of(capsys, out, data)
        assert code == 2 and f"{out}/checkpoint.pth" in message
        assert (out / "checkpoint.pth").read_bytes() == content

@pytest.mark.parametrize("step, words", [(6, "step 8: losses"), (8, "step 8: weights of model 1")])
def test_what_is_not_finite_is_never_saved(step, words, data, tmp_path, capsys, monkeypatch):
    """Weights that step 6 spoils show in the losses of step 8, those of step 8 do not."""
    def spoil(model1):
        model1.net.mlp_head.mlp[0].weight.data[0, 0] = math.nan
    after(monkeypatch, step, spoil)
    code, message = end_of(capsys, tmp_path / "out", data)
    assert code == 1 and words in message and "not finite" in message
    state = state_of(tmp_path / "out")
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["model1"]["net"].values())
    weights = torch.load(tmp_path / "out" / "model1.pth")
    assert same(weights["conv1.weight"], state["model1"]["momentum_net"]["backbone.model.conv1.weight"])

def test_weights_are_written_before_the_checkpoint_each_to_a_file_of_its_own_that_is_then_renamed(
        data, tmp_path, monkeypatch):
    replaced, replace = [], os.replace
    def record(source, goal):
        torch.load(source, weights_only=True)   # it is complete when it takes its name
        replaced.append(os.path.basename(goal))
        assert os.path.dirname(source) == os.path.dirname(goal) and source != goal
        replace(source, goal)
    monkeypatch.setattr(os, "replace", record)
    train(tmp_path / "out", data, "--epochs", 1, "--save_every", 0)
    assert replaced == ["model1.pth", "model2.pth", "checkpoint.pth"]

# ---------------------------------------------------------------------------------------------- two processes
def test_two_processes_take_the_step_and_the_votes_of_one(tmp_path):
    """By torchrun, with gloo. Batch norm is each process's own on a CPU, so two ViTs train, by SGD, whose
    update is the gradient. Each process gets its share of the crops and of the photometric draws, gradients
    and centers are means, k-NN's bank and queries come from both."""
    draw_images(tmp_path / "data" / "train", number=8, classes="abcd")
    draw_images(tmp_path / "data" / "val", number=5, classes="abcd")
    args = ["--arch1", "vit_tiny", "--model_kwargs1", *VIT[:2], "embed_dim=32", *VIT[3:], "--drop_path", "0",
            "--batch_size", "32", "--epochs", "1", "--knn_every", "1", "--vit_optimizer", "sgd",
            "--vit_lr", "10", "--workers", "1"]
    train(tmp_path / "one", tmp_path / "data", *args)
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 mokd.py".split()
    done = subprocess.run([sys.executable, *launch, *SMALL, *PAIR, *SHORT, "--data", tmp_path / "data",
                           "--out", tmp_path / "two", *args], cwd=HERE, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes: 2, on cpu") == 1
    _, _, step, knn = records_of(tmp_path / "two")
    _, _, step_of_one, knn_of_one = records_of(tmp_path / "one")
    assert step.keys() == step_of_one.keys() and knn == pytest.approx(knn_of_one, abs=5.1)   # one of 20
    for name in ("loss1", "sm1", "st1", "cm1", "ct1", "loss2", "sm2", "st2", "cm2", "ct2"):
        assert step[name] == pytest.approx(step_of_one[name], rel=2e-5), name
    one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    cfg = config(*args)
    for model in models_of(cfg):
        a, b = one[f"model{model.i}"], two[f"model{model.i}"]
        for name, first in model.net.named_parameters():
            assert close(b["net"][name] - first, a["net"][name] - first, 2e-3), name
        for name in ("C_m", "C_t"):
            assert close(b["momentum_net"][name], a["momentum_net"][name], 1e-4), name

def test_signals_and_unreadable_images_of_any_process_count_for_all(monkeypatch):
    of_the_other = torch.tensor([1, 1, 0])   # it met an image that it could not read, and SIGTERM
    monkeypatch.setattr(mokd, "sum_over_processes", lambda x: x + of_the_other)
    mokd.caught.clear()
    assert mokd.after_step(1) == (2, signal.SIGTERM)

@pytest.mark.parametrize("flag, value, equal", [
    ("--workers", 1, True), ("--data", "the same, elsewhere", True), ("--seed", 1, False),
    ("--losses", "sm,cm", False), ("--cnn_lr", 0.5, False), ("--data", "fewer", False),
    ("--out", "old", False)])
def test_processes_with_other_settings_images_or_checkpoint_than_the_first_are_refused(
        flag, value, equal, halted, data, tmp_path, monkeypatch, capsys):
    paths = {"old": halted, "fewer": draw_images(tmp_path / "fewer", number=5)}
    (tmp_path / "link").symlink_to(data)
    paths["the same, elsewhere"] = tmp_path / "link"
    args = [*SHORT, "--data", data, "--lambda1", 1, "--lambda2", 0.1, "--out", tmp_path / "new"]
    first = config(*args)
    other = config(*args, flag, paths.get(value, value))
    sent = []
    monkeypatch.setattr(mokd, "WORLD", 2)
    monkeypatch.setattr(mokd, "sum_over_processes", lambda x: sent.append(x) or 2 * x)   # two are alike
    mokd.find_checkpoint(first, mokd.get_images(first, "train"))
    monkeypatch.setattr(mokd, "sum_over_processes", lambda x: sent[0] + x)
    if equal:
        mokd.find_checkpoint(other, mokd.get_images(other, "train"))
    else:
        with pytest.raises(SystemExit) as end:
            mokd.find_checkpoint(other, mokd.get_images(other, "train"))
        assert end.value.code == 1 and "--out" in capsys.readouterr().err

SPY = """
import importlib.abc, os, sys
class Spy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "numpy", "timm"):
            print(name, os.environ.get("GOMP_SPINCOUNT"))
            raise SystemExit
sys.meta_path.insert(0, Spy())
import MODULE
"""

@pytest.mark.parametrize("module", ["mokd", "eval_knn", "eval_linear"])
def test_openmps_threads_are_told_not_to_spin_long_before_torch_is_imported(module):
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for wanted in ({}, {"GOMP_SPINCOUNT": "7"}):
        done = subprocess.run([sys.executable, "-c", SPY.replace("MODULE", module)], cwd=HERE,
                              env=env | wanted, capture_output=True, text=True)
        assert done.stdout.split()[1:] == [wanted.get("GOMP_SPINCOUNT", "1000")], done.stderr

def test_a_world_without_a_rank_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    again = runpy.run_path(os.path.join(HERE, "mokd.py"))
    assert (again["WORLD"], again["RANK"]) == (1, 0)

def test_workers_go_by_the_cores_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4, 5, 6, 7}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cfg = mokd.parse_args([])
    mokd.join_processes(cfg)
    assert (cfg.workers, cfg.dtype) == (2, "fp16")   # as on a V100

def test_dtype_auto_is_fp32_where_nobody_joined_processes():
    with mokd.autocast(CPU, "auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32

def test_tasks_of_srun_that_know_nothing_of_each_other_are_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.delenv("RANK", raising=False)
    code, message = end_of(capsys, tmp_path, data)
    assert code == 2 and "srun --ntasks-per-node=1 torchrun" in message and not list(tmp_path.iterdir())

# ----------------------------------------------------------------------------------- images and their folders
@pytest.fixture
def hundred(tmp_path):
    """104 images, of which number 7 is torn."""
    folder = draw_images(tmp_path / "hundred", number=104, classes="a")
    torn = folder / "a" / "007.jpg"
    torn.write_bytes(torn.read_bytes()[:300])
    return folder

@pytest.mark.parametrize("batch_size", [52, 104])
def test_an_unreadable_image_is_named_and_skipped_and_counts_once_an_epoch(
        batch_size, hundred, tmp_path, capsys):
    train(tmp_path / "out", hundred, "--batch_size", batch_size, "--losses", "sm", "--local_crops", 0)
    assert capsys.readouterr().err.count("skipped " + str(hundred / "a" / "007.jpg")) == 2   # in two epochs

def test_more_than_one_percent_of_unreadable_images_end_training_and_evaluation(hundred, tmp_path, capsys):
    (hundred / "a" / "070.jpg").write_text("no image")
    args = ["--batch_size", 13, "--losses", "sm", "--local_crops", 0]   # they are in different batches
    code, message = end_of(capsys, tmp_path / "out", hundred, *args)
    assert code == 1 and "2 of 104" in message and "007.jpg" in message and "070.jpg" in message
    cfg = config("--data", hundred)
    views = mokd.EvalView(mokd.get_images(cfg, "train"), 32)
    backbone = models_of(cfg)[1].net.backbone
    with pytest.raises(SystemExit) as end:
        mokd.extract_features([backbone], views, torch.device("cpu"))
    message = capsys.readouterr().err
    assert end.value.code == 1 and "2 of 104" in message and "070.jpg" in message

def test_an_unreadable_image_gives_place_to_the_next_and_a_hundred_in_a_row_raise(hundred, capsys):
    cfg = config("--data", hundred)
    images = mokd.get_images(cfg, "train")
    crops, skipped = mokd.MultiCrop(images, cfg)[0, 7]
    said = capsys.readouterr().err
    of_the_next, _ = mokd.MultiCrop([images[8]] * 104, cfg)[0, 7]
    assert skipped and said.count("007.jpg") == 1 and torch.equal(crops[0], of_the_next[0])
    for i in range(104):
        (hundred / "a" / f"{i:03}.jpg").write_text("no image")
    with pytest.raises(OSError, match="100 images in a row"):
        mokd.MultiCrop(images, cfg)[0, 3]
    assert "003.jpg" in capsys.readouterr().err

def test_images_of_16_bits_or_floats_are_unreadable_and_the_reason_is_said(tmp_path, capsys):
    """PIL would clip them: 12 bits in a file of 16 would become a few gray levels near black."""
    (tmp_path / "a").mkdir()
    gray = np.arange(400).reshape(20, 20)
    kinds = {"0.png": np.uint16, "1.tiff": np.int32, "2.tiff": np.float32, "3.png": np.uint8}
    for name, kind in kinds.items():
        Image.fromarray((gray % 200).astype(kind)).save(tmp_path / "a" / name)
    cfg = config("--data", tmp_path)
    images = mokd.get_images(cfg, "train")
    crops, views = mokd.MultiCrop(images, cfg), mokd.EvalView(images, 16)
    for i, mode in enumerate(("I;16", "I", "F")):
        assert crops[0, i][1] and views[i][1] == mokd.NO_IMAGE < 0
        said = capsys.readouterr().err
        for words in (f"{tmp_path}/a/{i}.", f"mode {mode}", "255"):
            assert said.count(words) == 2
    assert not crops[0, 3][1] and views[3][1] == 0 and not capsys.readouterr().err

def test_floats_are_refused_with_the_cure_and_crops_that_are_no_uint8(tmp_path):
    """They would train as black."""
    for wrong in (torch.rand(3, 8, 8), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(TypeError, match="PIL's or as uint8 tensors"):
            mokd.to_rgb(wrong)
        with pytest.raises(TypeError, match="PIL's or as uint8 tensors"):   # no unreadable image
            mokd.MultiCrop([(wrong, 0)] * 9, config())[0, 0]
    crops = [torch.zeros(8, 2, 32, 32, 3)]
    with pytest.raises(AssertionError, match="uint8"):
        mokd.make_views(crops, config("--local_crops", 0), CPU, 0)

def test_one_process_downloads_then_one_a_machine_then_the_others(monkeypatch):
    def turns(rank, local_rank):
        """-> what a process does, in its order."""
        done = []
        monkeypatch.setattr(mokd, "RANK", rank)
        monkeypatch.setattr(mokd, "LOCAL_RANK", local_rank)
        monkeypatch.setattr(mokd, "wait_for_all", lambda: done.append("wait"))
        monkeypatch.setattr(mokd, "torchvision_images", lambda *_: done.append("get") or "images")
        assert mokd.get_images(config("--data", "cifar10"), "train") == "images"
        return done
    assert turns(0, 0) == ["get", "wait", "wait", "wait"]
    assert turns(2, 0) == ["wait", "get", "wait", "wait"]   # the first of a second machine
    assert turns(1, 1) == turns(3, 1) == ["wait", "wait", "get", "wait"]

def test_a_damaged_file_of_a_data_set_is_said_in_its_own_words(monkeypatch):
    def with_train(root, train, download):
        raise ValueError("damaged file")
    def with_split(root, split, download):
        torchvision.datasets.utils.verify_str_arg(split, "split", ("train", "test"))
        raise ValueError("damaged file")
    for data_set in (with_train, with_split):
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", data_set)
        with pytest.raises(ValueError, match="damaged file"):
            mokd.get_images(config("--data", "cifar10"), "train")

def test_hidden_folders_are_no_classes_and_hidden_files_no_images(tmp_path):
    for part in ("train", "val"):
        folder = draw_images(tmp_path / ".cache" / "data" / part)   # what is above the folder does not count
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "0.jpg").write_bytes((folder / "a" / "000.jpg").read_bytes())
        (folder / "a" / "._000.jpg").write_text("what macOS leaves")
        for hidden in (".thumbnails", "@eaDir"):   # within a class
            (folder / "a" / hidden / "deep").mkdir(parents=True)
            (folder / "a" / hidden / "deep" / "0.jpg").write_bytes((folder / "a" / "000.jpg").read_bytes())
        images = mokd.get_images(config("--data", tmp_path / ".cache" / "data"), part)
        assert images.classes == ["a", "b"] and len(images) == 12

def test_val_matters_only_where_knn_is_asked_for(tmp_path, capsys):
    """ImageNet's archive unpacks to a val/ without class folders."""
    folder = draw_images(tmp_path / "data" / "train")
    (tmp_path / "data" / "val").mkdir()
    (tmp_path / "data" / "val" / "0.jpg").write_bytes((folder / "a" / "000.jpg").read_bytes())
    train(tmp_path / "out", tmp_path / "data", "--epochs", 1)
    code, message = end_of(capsys, tmp_path / "knn", tmp_path / "data", "--knn_every", 1)
    assert code == 2 and str(tmp_path / "data" / "val") in message and "class" in message

def test_knn_between_unlike_class_folders_is_refused(tmp_path, capsys):
    draw_images(tmp_path / "data" / "train", classes="abc")
    draw_images(tmp_path / "data" / "val", classes="ac")
    code, message = end_of(capsys, tmp_path / "out", tmp_path / "data", "--knn_every", 1)
    assert code == 2 and "class folders" in message and " b " in message
    assert not (tmp_path / "out").exists()   # it is said before there is anything to lose

# ------------------------------------------------------------------------------------- nothing is left behind
class Images:
    """12 gray images. To get number 5 calls `fault`."""
    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return 12

    def __getitem__(self, i):
        if i == 5:
            self.fault()
        return torch.full((3, 20, 20), 20 * i, dtype=torch.uint8), i % 2

def has_a_bug():
    raise ZeroDivisionError("a bug of the data set")

def dies():
    os.kill(os.getpid(), signal.SIGKILL)   # as the kernel kills when memory is short

@pytest.mark.parametrize("fault, workers, error, words", [
    (has_a_bug, 0, ZeroDivisionError, "a bug of the data set"),
    (has_a_bug, 2, ZeroDivisionError, "a bug of the data set"),
    (dies, 2, (RuntimeError, OSError, EOFError), None)])   # whichever of torch's words
def test_a_data_sets_own_error_and_a_killed_worker_end_the_run_with_the_real_error_and_leave_no_process(
        fault, workers, error, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mokd, "get_images", lambda cfg, part: Images(fault))
    # torch sets its handler of SIGCHLD, which hides an error by the deaths that follow it, once a process
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    with pytest.raises(error, match=words):
        train(tmp_path, "gray", "--workers", workers)
    assert "skipped" not in capsys.readouterr().err   # it is no unreadable image
    for worker in mokd.multiprocessing.active_children():
        worker.join(120)
    assert not mokd.multiprocessing.active_children()

@pytest.fixture
def handlers():
    """A caller's handlers of SIGTERM and SIGINT."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    def handler(number, frame):
        raise InterruptedError("the caller's own")
    for number in before:
        signal.signal(number, handler)
    yield handler
    for number, old in before.items():
        signal.signal(number, old)

def fails(model1):
    raise ValueError("a bug of a fork")

def is_interrupted(model1):
    signal.raise_signal(signal.SIGINT)

@pytest.mark.parametrize("action, end", [(None, None), (fails, ValueError), (is_interrupted, SystemExit)])
def test_the_callers_signal_handlers_are_back_after_a_run(
        action, end, halted, data, tmp_path, monkeypatch, handlers):
    out = copy_of(halted, tmp_path / "out")
    if action:
        after(monkeypatch, 8, action)
        with pytest.raises(end):
            train(out, data)
    else:
        train(out, data)
    for number in (signal.SIGTERM, signal.SIGINT):
        assert signal.getsignal(number) is handlers
        with pytest.raises(InterruptedError):
            signal.raise_signal(number)

def test_a_run_in_another_thread_trains_without_signal_handlers(whole, data, tmp_path, handlers):
    thread = threading.Thread(target=train, args=(tmp_path / "out", data, "--workers", 1))
    thread.start()
    thread.join()
    assert same_run(whole, tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is handlers

def test_a_callers_own_processes_outlive_a_run(halted, data, tmp_path):
    child = mokd.multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    child.start()
    train(copy_of(halted, tmp_path / "out"), data, "--workers", 1)
    child.terminate()
    child.join()
    assert child.exitcode == -signal.SIGTERM   # and not killed before

# ------------------------------------------------------------------------------------------------ eval_knn.py

TOY = dict(train=256, val=128)   # images
ONE_IMAGE = 100 / TOY["val"] + 1e-6   # percent: CPUs round differently, and may order two neighbors otherwise
NAMES = ["1 resnet18", "2 vit_tiny"]

@pytest.fixture(scope="module")
def parts():
    """toy, but with few images."""
    return {part: torch.utils.data.TensorDataset(*mokd.draw_toy(n, part)) for part, n in TOY.items()}

@pytest.fixture
def few(monkeypatch, parts):
    monkeypatch.setattr(mokd, "get_images", lambda cfg, part: parts[part])
    return parts

def save_run(out, seed=0):
    """What a run leaves, of a pair whose weights are noise, so that no two images look alike to it. Students
    differ from momentum nets. The ViT reads its CLS token."""
    cfg = config("--vit_pool", "cls", "--out", out)
    models, g = models_of(cfg), torch.Generator().manual_seed(seed)
    for m in models:
        for net in (m.net, m.n_):
            for p in net.backbone.parameters():
                p.data += 0.2 * torch.randn(p.shape, generator=g)
    out.mkdir()
    mokd.save(cfg, models, 1, torch.amp.GradScaler(enabled=False), [0] * 8)
    return out

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "a")

def evaluate(program, *args):
    mokd.main([*map(str, args), "--workers", "0"], program.parse, program.run)

def records(file):
    return [json.loads(line) for line in open(file)]

def knn(folder, *args):
    """-> the record that eval_knn.py leaves in a folder."""
    evaluate(eval_knn, *args)
    return records(folder / "knn.jsonl")[-1]

def load(file):
    return torch.load(file, weights_only=True)

def views_of_toy(images, resize):
    """Images as the networks get them: shorter side to `resize`, the middle 32 pixels."""
    x = TF.resize(images.tensors[0], [resize], TF.InterpolationMode.BICUBIC, antialias=True)
    x = TF.center_crop(x, [32, 32]).float() / 255
    return TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

def timm_model(i, weights):
    """Model i of `trained` by timm alone; its output is the feature that was trained."""
    kwargs = dict(layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
    if i == 2:
        kwargs = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, global_pool="token")
    model = timm.create_model(("resnet18", "vit_tiny_patch16_224")[i - 1], num_classes=0, **kwargs)
    model.load_state_dict(weights)
    return model.eval()

def dinos_knn(train_features, train_labels, test_features, k, T, num_classes):
    """DINO's knn_classifier, one image at a time -> all classes of each image, most votes first."""
    ranked = []
    for f in test_features:
        similarity = train_features @ f
        distances, indices = similarity.topk(k, largest=True, sorted=True)
        one_hot = torch.zeros(k, num_classes)
        one_hot.scatter_(1, train_labels[indices].view(-1, 1), 1)
        probs = torch.sum(one_hot * distances.clone().div_(T).exp_().view(-1, 1), 0)
        ranked.append(probs.sort(descending=True, stable=True).indices)
    return torch.stack(ranked)

@pytest.mark.parametrize("T, ks", [(0.07, (1, 3, 10)), (0.02, (20, 256))])
def test_knn_and_agreement_are_dinos_over_center_crops(T, ks, trained, few, tmp_path, capsys):
    file = tmp_path / "features.pt"
    table = knn(trained, "--checkpoint", trained / "checkpoint.pth", "--k", *ks, 5000, "--temperature", T,
                "--save", file)
    saved, printed, predictions = load(file), capsys.readouterr().out, {}
    ks, answers = sorted({*ks, 256}), few["val"].tensors[1]   # the bank has no 5000
    for i, name in enumerate(NAMES, 1):
        model, features, found = timm_model(i, load(trained / f"model{i}.pth")), {}, table["results"][name]
        for part, images in few.items():
            with torch.no_grad():
                expected = F.normalize(model(views_of_toy(images, 37)), dim=1)
            assert torch.equal(saved[part]["labels"], images.tensors[1])
            assert torch.allclose(saved[part]["features"][name].float(), expected, atol=1e-3)
            features[part] = F.normalize(saved[part]["features"][name].float(), dim=1)
        for k in ks:
            ranked = dinos_knn(features["train"], few["train"].tensors[1], features["val"], k, T, 8)
            predictions[name, k] = ranked[:, 0]
            for n, top in ((1, "top1"), (min(5, k), "top5")):   # DINO counts the first min(5, k) classes
                expected = 100 * (ranked[:, :n] == answers[:, None]).any(1).double().mean().item()
                assert found[str(k)][top] == pytest.approx(expected, abs=ONE_IMAGE)
                assert f"{found[str(k)][top]:.2f}" in printed
        assert f"{max(tops['top1'] for tops in found.values()):.2f}*" in printed
    assert (table["bank"], table["classified"], table["settings"]["k"]) == (256, 128, ks)
    for k in ks:
        same = 100 * (predictions[NAMES[0], k] == predictions[NAMES[1], k]).double().mean().item()
        assert table["agreement"][" = ".join(NAMES)][str(k)] == pytest.approx(same, abs=2 * ONE_IMAGE)

def test_models_of_several_runs_stand_in_one_table_and_nothing_is_overwritten(trained, few, tmp_path, capsys):
    """Table 9's last column compares a model of one run with a model of another."""
    other = save_run(tmp_path / "b", seed=1)
    files = [trained / "checkpoint.pth", other / "checkpoint.pth"]
    alone = [knn(file.parent, "--checkpoint", file, "--k", 10) for file in files]
    together = knn(other, "--checkpoint", *files[::-1], "--k", 10)
    assert len(records(other / "knn.jsonl")) == 2
    names = [f"{folder}: {name}" for folder in (other, trained) for name in NAMES]
    assert [*together["results"]] == names
    assert [*together["results"].values()] == [*alone[1]["results"].values(), *alone[0]["results"].values()]
    assert [*together["agreement"]] == [f"{a} = {b}" for a, b in itertools.combinations(names, 2)]
    assert together["agreement"][f"{names[0]} = {names[1]}"] == alone[1]["agreement"][" = ".join(NAMES)]
    assert f"{names[1]} = {names[2]}" in capsys.readouterr().out

def test_knn_takes_weights_students_and_one_model(trained, few):
    run = ["--checkpoint", trained / "checkpoint.pth", "--k", 10]
    both = knn(trained, *run)["results"]
    assert knn(trained, *run, "--model", 2)["results"] == {NAMES[1]: both[NAMES[1]]}
    students = knn(trained, *run, "--net", "student")["results"]
    assert all(students[name] != both[name] for name in NAMES)
    of_file = ["--data", "toy", "--image_size", 32, "--k", 10, "--weights"]
    cnn = ["--arch", "resnet18", "--model_kwargs", *CNN]
    vit = ["--arch", "vit_tiny", "--model_kwargs", *VIT]
    assert knn(trained, *cnn, *of_file, trained / "model1.pth")["results"] == {"resnet18": both[NAMES[0]]}
    pools = [knn(trained, *vit, *of_file, trained / "model2.pth", "--vit_pool", pool)["results"]["vit_tiny"]
             for pool in ("cls", "mean")]
    assert pools[0] == both[NAMES[1]] != pools[1]
    assert knn(trained, *run, "--resize", 60)["results"] != both
    weights = []
    for seed in (0, 0, 1):   # untrained ones
        cfg = eval_knn.parse([*map(str, cnn), "--data", "toy", "--seed", str(seed)])
        weights.append(eval_knn.load_backbones(cfg)["resnet18"].model.conv1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])

@pytest.mark.parametrize("command", [
    "knn", "knn --checkpoint RUN --arch resnet18", "knn --checkpoint RUN --weights x",
    "knn --checkpoint MODEL", "knn --checkpoint RUN --k 0", "knn --checkpoint RUN --temperature 0",
    "linear --checkpoint RUN --batch_size 512", "linear --checkpoint RUN --finetune --lr 0.1 0.2",
    "linear --checkpoint RUN --epochs 5 --warmup_epochs 6",
    "linear --checkpoint RUN --batch_size 64 --model 1 --avgpool"])
def test_a_command_that_would_do_something_else_is_refused(command, trained, few):
    command = command.replace("RUN", f"{trained}/checkpoint.pth").replace("MODEL", f"{trained}/model1.pth")
    name, *args = command.split()
    with pytest.raises(SystemExit) as end:
        evaluate(dict(knn=eval_knn, linear=eval_linear)[name], *args)
    assert end.value.code == 2

class Damaged(torch.utils.data.TensorDataset):
    """toy images of which the first n cannot be read."""
    classes = "abcdefgh"

    def __getitem__(self, i):
        if i < self.n:
            raise OSError(f"image {i} is damaged")
        return super().__getitem__(i)

@pytest.mark.parametrize("program", [eval_knn, eval_linear])
def test_what_would_make_a_number_wrong_ends_both_evaluations(program, trained, parts, tmp_path, monkeypatch,
                                                             capsys):
    small = ["--epochs", 1, "--warmup_epochs", 0, "--batch_size", 128] if program is eval_linear else []
    file = trained / "checkpoint.pth"
    def ends_with(code, words, train=0, val=0, **changed):
        """Run on so many damaged images; `changed` are attributes of the validation images."""
        images = {part: Damaged(*parts[part].tensors) for part in parts}
        for part, n in (("train", train), ("val", val)):
            vars(images[part]).update(n=n, targets=images[part].tensors[1])
        vars(images["val"]).update(changed)
        monkeypatch.setattr(mokd, "get_images", lambda cfg, part: images[part])
        out = ["--out", tmp_path / words.replace(" ", "")] if program is eval_linear else []
        try:
            evaluate(program, "--checkpoint", file, *small, *out)
            assert code == 0
        except SystemExit as end:
            assert end.code == code
        said = capsys.readouterr()
        assert words in said.err + said.out and "nan" not in said.out
    ends_with(2, "h is in one alone", classes="abcdefg")
    ends_with(2, "label", targets=torch.full((128,), -1))
    ends_with(0, "image 1 is damaged", train=2)   # of 256
    ends_with(0, "image 0 is damaged", val=1)     # of 128
    ends_with(1, "3 of 256 images cannot be read", train=3)
    ends_with(1, "2 of 128 images cannot be read", val=2)
    state = load(file)
    state["model2"]["momentum_net"]["backbone.model.norm.weight"][0] = math.nan
    file = tmp_path / "checkpoint.pth"
    torch.save(state, file)
    ends_with(1, "features are not finite")
    assert not (tmp_path / "knn.jsonl").exists()

# ----------------------------------------------------------------------------- linear probing and fine-tuning

def linear(out, *args):
    """-> the results, which are in the last record of the log."""
    evaluate(eval_linear, *args, "--out", out)
    return records(out / "log.jsonl")[-1]["results"]

def equal(a, b):   # to the last bit
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b

def test_rates_at_once_equal_each_rate_alone_and_a_naive_loop(trained, few, tmp_path):
    """A rate is final, whatever the batch size: nothing scales it by batch / 256."""
    source = ["--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--epochs", 2,
              "--warmup_epochs", 1]
    rates = [0.01, 1.0, 0.1]
    together = linear(tmp_path / "all", *source, "--lr", *rates)
    weights = load(tmp_path / "all" / "checkpoint.pth")["net"]
    for place, rate in enumerate(rates):
        alone = linear(tmp_path / str(rate), *source, "--lr", rate)
        single = load(tmp_path / str(rate) / "checkpoint.pth")["net"]
        for part in "01":
            for k in ("weight", "bias"):
                assert torch.allclose(weights[f"{part}.layers.{place}.{k}"], single[f"{part}.layers.0.{k}"],
                                      rtol=1e-4, atol=1e-6)
        for name in together:
            for top, value in alone[name][f"{rate:g}"].items():
                assert together[name][f"{rate:g}"][top] == pytest.approx(value, abs=ONE_IMAGE)

    # the same by hand, for model 1 at rate 1
    cfg = eval_linear.parse([*map(str, source)])
    backbone = eval_knn.load_backbones(cfg)[NAMES[0]].eval()
    W = torch.empty(8, backbone.dim).normal_(std=0.01, generator=mokd.generator(0, "classifier"))
    b, V, v = torch.zeros(8), torch.zeros(8, backbone.dim), torch.zeros(8)
    view = eval_linear.TrainView(few["train"], cfg)
    for step, keys in enumerate(mokd.batches(256, argparse.Namespace(batch_size=64, epochs=2, seed=0))):
        x, y = zip(*(view[key] for key in keys))
        with torch.no_grad():
            f = backbone(mokd.normalize(torch.stack(x).float() / 255))[0]
        error = (f @ W.T + b).softmax(1) - F.one_hot(torch.tensor(y), 8)   # gradient of the cross-entropy
        lr = step / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / 4))
        V, v = 0.9 * V + error.T @ f / 64, 0.9 * v + error.mean(0)
        W, b = W - lr * V, b - lr * v
    assert step == 7
    assert torch.allclose(weights["0.layers.1.weight"], W, rtol=1e-3, atol=1e-5)
    assert torch.allclose(weights["0.layers.1.bias"], b, rtol=1e-3, atol=1e-5)

    # and what is measured, by timm alone
    for i, name in enumerate(NAMES, 1):
        with torch.no_grad():
            f = timm_model(i, load(trained / f"model{i}.pth"))(views_of_toy(few["val"], 37))
        for place, rate in enumerate(rates):
            logits = F.linear(f, *(weights[f"{i - 1}.layers.{place}.{k}"] for k in ("weight", "bias")))
            ranked, answers = logits.argsort(1, descending=True), few["val"].tensors[1][:, None]
            for n, top in ((1, "top1"), (5, "top5")):
                expected = 100 * (ranked[:, :n] == answers).any(1).double().mean().item()
                assert together[name][f"{rate:g}"][top] == pytest.approx(expected, abs=ONE_IMAGE)

def test_defaults_are_the_papers_and_rates_are_reached_after_the_warmup(trained):
    """A.2, A.3, A.4: 0.08 and 0.008 at batch 2048, which are not 8 times those of batch 256."""
    run = ["--checkpoint", str(trained / "checkpoint.pth"), "--dtype", "fp32"]
    probe, tune = eval_linear.parse(run), eval_linear.parse([*run, "--finetune"])
    assert (probe.epochs, probe.warmup_epochs, probe.batch_size, probe.weight_decay) == (100, 10, 2048, 0)
    assert (tune.epochs, tune.warmup_epochs, tune.batch_size) == (100, 10, 1024)
    assert (probe.out, tune.out) == (str(trained / "linear"), str(trained / "finetune"))
    for cfg, rates in ((probe, [0.08, 0.008]), (tune, [0.01, 0.01])):
        backbones = eval_knn.load_backbones(cfg).items()
        net = eval_linear.Classifiers([eval_linear.Classifier(*named, cfg, 8) for named in backbones])
        assert [[*part.rates.values()] for part in net] == [[rate] for rate in rates]
        optimizer = eval_linear.make_optimizer(net, cfg)
        assert [group["peak"] for group in optimizer.param_groups] == [rates[0]] * 2 + [rates[1]] * 2
        x, y = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)
        eval_linear.train_step(net, x, y, cfg, optimizer, torch.amp.GradScaler(enabled=False), 1.0)
        assert [group["lr"] for group in optimizer.param_groups] == [rates[0]] * 2 + [rates[1]] * 2

def test_weight_decay_spares_1d_parameters_and_unreadable_images_have_no_loss(trained):
    cfg = eval_linear.parse(["--checkpoint", str(trained / "checkpoint.pth"), "--finetune", "--weight_decay",
                             "0.5", "--dtype", "fp32"])
    backbone = eval_knn.load_backbones(cfg)[NAMES[1]]
    net = eval_linear.Classifiers([eval_linear.Classifier(NAMES[1], backbone, cfg, 8)])
    optimizer = eval_linear.make_optimizer(net, cfg)
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)
    groups = [(p.dim() > 1, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert {*groups} == {(True, 0.5), (False, 0.0)} and len(groups) == len([*net.parameters()])

    x, scaler = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.amp.GradScaler(enabled=False)
    y = torch.tensor([3, -100, 5, -100])
    expected = F.cross_entropy(net(x[[0, 2]])[0], y[[0, 2]])
    loss, = eval_linear.train_step(net, x, y, cfg, optimizer, scaler, 0.0)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    loss, = eval_linear.train_step(net, x, torch.full((4,), -100), cfg, optimizer, scaler, 0.1)
    assert loss == 0 and all(p.isfinite().all() for p in net.parameters())

def test_training_crops_are_random_resized_and_half_of_them_mirrored(few):
    cfg = eval_linear.parse("--arch resnet18 --data toy --scale 0.3 0.6".split())
    cfg.image_size = 24
    views, mirrored = eval_linear.TrainView(few["train"], cfg), 0
    for index in range(60):
        x, y = views[2, index]
        torch.manual_seed(mokd.seed_of(0, 2, index))
        crop = mokd.crop(few["train"][index][0], 24, (0.3, 0.6))
        assert y == index % 8
        assert torch.equal(x, crop) or torch.equal(x, crop.flip(-1))
        mirrored += torch.equal(x, crop.flip(-1))
    assert 15 < mirrored < 45 and not torch.equal(views[3, 0][0], views[2, 0][0])

@pytest.mark.parametrize("mode", [
    [], ["--n_last_blocks", 2, "--avgpool"], ["--avgpool"], ["--finetune"],
    ["--finetune", "--label_fraction", 0.5]])
def test_probing_leaves_the_backbone_alone_and_fine_tuning_does_not(mode, trained, few, tmp_path, capsys):
    """The printed lines classify as the results say."""
    results = linear(tmp_path, "--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--epochs", 1,
                     "--warmup_epochs", 0, "--lr", 0.02, *mode)
    for i, name in enumerate(NAMES, 1):
        before = load(trained / f"model{i}.pth")
        saved = load(tmp_path / f"classifier{i}.pth")
        unchanged = [torch.equal(before[k], w) for k, w in saved["model"].items()]
        assert not any(unchanged) if "--finetune" in mode else all(unchanged)   # batch norms' too
    # Fine-tuned with all labels, images are resized (A.4); else they are cropped from larger ones.
    resize = saved["resize"]
    assert resize == (32 if mode == ["--finetune"] else 37) and saved["image_size"] == 32
    with torch.no_grad():
        found = python_lines(capsys.readouterr().out, views_of_toy(few["val"], resize))
    for i, name in enumerate(NAMES, 1):
        top1 = 100 * (found[f"logits{i}"].argmax(1) == few["val"].tensors[1]).double().mean().item()
        assert results[name]["0.02"]["top1"] == pytest.approx(top1, abs=ONE_IMAGE)

def test_features_of_last_blocks_are_dinos(trained):
    cfg = eval_linear.parse(["--checkpoint", str(trained / "checkpoint.pth"), "--n_last_blocks", "2",
                             "--avgpool"])
    backbones = eval_knn.load_backbones(cfg)
    vit = eval_linear.Classifier(NAMES[1], backbones[NAMES[1]], cfg, 8)
    x, seen, model = torch.randn(2, 3, 32, 32), [], vit.backbone.model
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(model.norm(out)))
    with torch.no_grad():
        model.forward_features(x)
        expected = torch.cat([seen[0][:, 0], seen[1][:, 0], seen[1][:, 1:].mean(1)], 1)
        assert torch.allclose(vit.features(x), expected, atol=1e-5)
        vit.n_last_blocks = 0
        assert torch.allclose(vit.features(x), expected[:, 24:], atol=1e-5)
        vit.avgpool = False
        assert torch.allclose(vit.features(x), expected[:, 24:48], atol=1e-5)
    cnn = eval_linear.Classifier(NAMES[0], backbones[NAMES[0]], cfg, 8)
    assert cnn.layers[0].in_features == 16 and vit.layers[0].in_features == 3 * 24   # a CNN's stays

def test_labels_kept_are_class_balanced_and_drawn_by_seed(few):
    kept = []
    for seed in "001":
        cfg = eval_linear.parse(f"--arch resnet18 --data toy --label_fraction 0.25 --seed {seed}".split())
        part = eval_linear.keep_labels(eval_knn.labeled_data(cfg)[0], cfg)
        assert sorted(y for _, y in (part[i] for i in range(len(part)))) == sorted(8 * [*range(8)])
        kept.append(part.indices)
    assert kept[0] == kept[1] != kept[2]

def test_a_subset_file_names_the_images_that_keep_their_label(tmp_path):
    """As SimCLR's lists do; a name that stands in two classes is none, until the class stands before it."""
    for name in ("a/1.png", "a/2.png", "a/both.png", "b/3.png", "b/4.png", "b/both.png"):
        for part in ("train", "val"):
            file = tmp_path / part / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(file)
    cfg = eval_linear.parse(f"--arch resnet18 --data {tmp_path} --subset {tmp_path}/list".split())
    images = eval_knn.labeled_data(cfg)[0]
    def kept(text):
        (tmp_path / "list").write_text(text)
        part = eval_linear.keep_labels(images, cfg)
        paths = [images.dataset.samples[images.indices[i]][0] for i in part.indices]
        return [os.path.relpath(path, tmp_path / "train") for path in paths]
    assert kept("4.png\n\n2.png\n") == ["a/2.png", "b/4.png"]
    assert kept("b/both.png\ntrain/a/1.png\n2.png\na/2.png") == ["a/1.png", "a/2.png", "b/both.png"]
    for text in ("both.png", "nobody.png", ""):
        with pytest.raises(SystemExit) as end:
            kept(text)
        assert end.value.code == 2

@pytest.mark.parametrize("number, mode", [(signal.SIGTERM, ["--lr", 0.1, 1.0]),
                                          (signal.SIGINT, ["--finetune", "--lr", 0.05])])
def test_a_signal_then_resume_repeats_linear_bit_for_bit(number, mode, trained, few, tmp_path, monkeypatch,
                                                         capsys):
    args = ["--checkpoint", trained / "checkpoint.pth", "--batch_size", 32, "--epochs", 2,
            "--warmup_epochs", 1, *mode]
    whole = linear(tmp_path / "whole", *args)
    calls, train_step = itertools.count(1), eval_linear.train_step
    def signalled(*args):
        if next(calls) == 11:   # of 8 + 8 steps
            os.kill(os.getpid(), number)
        return train_step(*args)
    monkeypatch.setattr(eval_linear, "train_step", signalled)
    with pytest.raises(SystemExit) as end:
        linear(tmp_path / "cut", *args)
    assert end.value.code == 128 + number and load(tmp_path / "cut" / "checkpoint.pth")["step"] == 11
    assert linear(tmp_path / "cut", *args) == whole
    assert next(calls) == 17 and "resumed" in capsys.readouterr().out
    states = [load(tmp_path / run / "checkpoint.pth") for run in ("whole", "cut")]
    for k in ("net", "scaler", "step", "results"):
        assert equal(*(state[k] for state in states))
    assert equal(*(state["optimizer"]["state"] for state in states))
    for i in "12":
        assert equal(*(load(tmp_path / run / f"classifier{i}.pth") for run in ("whole", "cut")))
    assert linear(tmp_path / "cut", *args) == whole and next(calls) == 18   # at the end already

    # Nothing goes on from other settings or other images.
    for other in (["--epochs", 3], ["--seed", 1], ["--net", "student"], ["--label_fraction", 0.9]):
        with pytest.raises(SystemExit) as end:
            linear(tmp_path / "cut", *args, *other)
        assert end.value.code == 2
    assert "--net was momentum, is student" in capsys.readouterr().err

def test_the_best_rate_of_each_model_is_kept_and_marked(trained, few, tmp_path, monkeypatch, capsys):
    tops = dict(zip(NAMES, ((1.0, 9.0, 5.0), (9.0, 1.0, 5.0))))
    def found(net, *args):
        return {name: {f"0.{i}": dict(top1=top1, top5=99.0) for i, top1 in enumerate(values, 1)}
                for name, values in tops.items()}
    monkeypatch.setattr(eval_linear, "evaluate", found)
    results = linear(tmp_path, "--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--epochs", 2,
                     "--warmup_epochs", 0, "--lr", 0.1, 0.2, 0.3, "--log_every", 3)
    weights = load(tmp_path / "checkpoint.pth")["net"]
    for i, place in ((1, 1), (2, 0)):
        kept = load(tmp_path / f"classifier{i}.pth")["classifier"]
        assert torch.equal(kept["weight"], weights[f"{i - 1}.layers.{place}.weight"])
    marked = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if "9.00*" in line]
    assert marked == [["1", "resnet18", "0.2"], ["2", "vit_tiny", "0.1"]]
    log = records(tmp_path / "log.jsonl")
    assert [r["step"] for r in log if "step" in r] == [0, 3, 6, 8]
    assert [r["minutes_left"] for r in log if r.get("step") == 8] == [0]
    assert [(r["epoch"], r["results"]) for r in log if "results" in r] == [(0, results), (1, results)]

def test_a_rate_that_is_not_finite_counts_as_0_and_leaves_the_others_alone(trained, few, tmp_path, capsys):
    source = ["--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--epochs", 2,
              "--warmup_epochs", 0]
    results = linear(tmp_path / "a", *source, "--lr", 1e38, 0.5)
    assert capsys.readouterr().out.count("1e+38 are not finite") == 4   # two models, two epochs
    alone = linear(tmp_path / "b", *source, "--lr", 0.5)
    for name in NAMES:
        assert results[name]["1e+38"] == dict(top1=0, top5=0)
        assert results[name]["0.5"] == alone[name]["0.5"]
    with pytest.raises(SystemExit) as end:
        linear(tmp_path / "c", *source, "--lr", 1e38)
    assert end.value.code == 1

# --------------------------------------------------------------------------------------------- two processes

BOTH_WAYS = dict(   # program, flags; a ViT, because on the CPU batch norms are each process's own
    knn=(eval_knn, "--k 1 10 --save OUT/features.pt"),
    probe=(eval_linear, "--batch_size 64 --epochs 2 --warmup_epochs 1 --lr 0.1 1 --out OUT"),
    tune=(eval_linear, "--batch_size 64 --epochs 2 --warmup_epochs 1 --lr 0.05 --model 2 --finetune "
                       "--out OUT"))
LAUNCHED = """
import sys, torch, eval_knn, eval_linear, mokd
sizes = dict(train=256, val=128)
mokd.get_images = lambda cfg, part: torch.utils.data.TensorDataset(*mokd.draw_toy(sizes[part], part))
for command in open(sys.argv[1]).read().splitlines():
    name, *args = command.split()
    program = dict(eval_knn=eval_knn, eval_linear=eval_linear)[name]
    program.run(program.parse(args))
torch.distributed.destroy_process_group()
"""

@pytest.fixture(scope="module")
def two_processes(trained, tmp_path_factory):
    """One launch of two processes for all that follows -> its folder. The last program's backbone has a part
    that it does not use, and for whose gradient DDP would wait."""
    out = tmp_path_factory.mktemp("two")
    commands = []
    for name, (program, flags) in BOTH_WAYS.items():
        (out / name).mkdir()
        flags = flags.replace("OUT", str(out / name))
        commands.append(f"{program.__name__} --checkpoint {out}/run/checkpoint.pth --workers 0 {flags}")
    commands.append(f"eval_linear --arch mobilenetv3_small_050 --data toy --image_size 32 --workers 0 "
                    f"--epochs 1 --batch_size 64 --warmup_epochs 0 --finetune --out {out}/unused")
    (out / "run").symlink_to(trained)
    (out / "commands").write_text("\n".join(commands))
    (out / "launched.py").write_text(LAUNCHED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    here = os.path.dirname(os.path.abspath(mokd.__file__))
    done = subprocess.run([*launch, out / "launched.py", out / "commands"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": here})
    assert done.returncode == 0, done.stderr
    assert "Grad strides" not in done.stderr   # of 1x1 convolutions, were they not channels last
    assert records(out / "unused" / "log.jsonl")[1]["step"] == 4
    return out

def in_one_process(name, trained, out):
    program, flags = BOTH_WAYS[name]
    evaluate(program, "--checkpoint", trained / "checkpoint.pth", *flags.replace("OUT", str(out)).split())

def test_knn_of_two_processes_equals_that_of_one(two_processes, trained, few, tmp_path):
    two = records(trained / "knn.jsonl")[-1]
    in_one_process("knn", trained, tmp_path)
    one = records(trained / "knn.jsonl")[-1]
    assert all(one[k] == two[k] for k in ("bank", "classified"))
    for name in NAMES:
        for k, tops in one["results"][name].items():
            assert two["results"][name][k] == pytest.approx(tops, abs=ONE_IMAGE)
    a, b = (table["agreement"][" = ".join(NAMES)] for table in (one, two))
    assert b == pytest.approx(a, abs=2 * ONE_IMAGE)
    a, b = load(tmp_path / "features.pt"), load(two_processes / "knn" / "features.pt")
    for part in ("train", "val"):
        assert torch.equal(a[part]["labels"], b[part]["labels"])
        for name, f in a[part]["features"].items():
            assert torch.allclose(f.float(), b[part]["features"][name].float(), atol=1e-3)

@pytest.mark.parametrize("name", ["probe", "tune"])
def test_linear_of_two_processes_equals_that_of_one(name, two_processes, trained, few, tmp_path):
    in_one_process(name, trained, tmp_path)
    one, two = load(tmp_path / "checkpoint.pth"), load(two_processes / name / "checkpoint.pth")
    assert one["net"].keys() == two["net"].keys() and one["step"] == two["step"] == 8
    for k, w in one["net"].items():
        assert torch.allclose(two["net"][k], w, rtol=1e-3, atol=1e-5 if name == "probe" else 1e-3), k
    logs = [records(folder / "log.jsonl") for folder in (tmp_path, two_processes / name)]
    assert [r.keys() for r in logs[0]] == [r.keys() for r in logs[1]]
    for a, b in zip(*[log[1:] for log in logs]):   # without the record of settings
        if "losses" in a:
            assert b["losses"] == pytest.approx(a["losses"], rel=1e-2)
        else:
            for model, rates in a["results"].items():
                for rate, tops in rates.items():
                    assert b["results"][model][rate] == pytest.approx(tops, abs=2 * ONE_IMAGE)
