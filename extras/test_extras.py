"""Tests of figures.py and eval_coco.py.

Figures: on checkpoints of two small runs. Distances and attention are compared with slow loops over weights
that timm's own modules compute, with the mean distance of a grid counted by offsets, and with attention that
is known beforehand. Detection: on a data set in COCO's format that the tests draw: circles, rectangles and
triangles, with their masks.

    python -m pytest -q extras/test_extras.py
"""
import copy
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from pycocotools import mask as rle

import eval_coco   # puts the repository on the path
import figures
import eval_knn
import mokd
from test_mokd import PAIR, SMALL, VIT

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# -------------------------------------------------------------------------------------------------- figures
def figure(*args, code=0):
    """A figure by its command line, in this process."""
    assert mokd.main([*map(str, args)], "extras/figures.py", figures.parse, figures.run) == code


def numbers(out):
    """What a figure wrote, all three files there -> the numbers."""
    assert open(f"{out}.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    assert open(f"{out}.pdf", "rb").read(5) == b"%PDF-"
    with Image.open(f"{out}.png") as image:
        assert min(image.size) > 200
    return dict(np.load(f"{out}.npz"))


def refused(args, capsys, code=2):
    """-> the sentence with which a figure ends, without a traceback."""
    figure(*args, code=code)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("extras/figures.py: ")
    return message


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a MOKD run and an independent run of the same pair on toy."""
    out, toy = tmp_path_factory.mktemp("runs"), mokd.get_data
    with pytest.MonkeyPatch.context() as patch:   # eight steps, on 64 images of it
        def few(cfg):
            return [torch.utils.data.Subset(part, range(64)) for part in toy(cfg)]
        patch.setattr(mokd, "get_data", few)
        for name, losses in (("mokd", "sm,cm,st,ct"), ("independent", "sm")):
            assert mokd.main([*SMALL, *PAIR, "--log_every", "2", "--knn_every",
                              "1" if name == "mokd" else "0",
                              "--losses", losses, "--out", str(out / name)]) == 0
    return out


@pytest.fixture
def both(runs):
    return ["--checkpoint", runs / "independent" / "checkpoint.pth", runs / "mokd" / "checkpoint.pth",
            "--workers", 0]


def mean_of_grid(h, w, size):
    """Mean distance of two points of a grid: an offset (dy, dx) occurs (h - |dy|) (w - |dx|) times."""
    return sum((h - abs(dy)) * (w - abs(dx)) * math.hypot(dy * size / h, dx * size / w)
               for dy in range(1 - h, h) for dx in range(1 - w, w)) / (h * w) ** 2


def slow_distance(weights, h, w, size):
    """Weights (B, heads, N, N) -> (B, heads), query by query and key by key."""
    total = torch.zeros(weights.shape[:2], dtype=torch.double)
    for i in range(h * w):
        for j in range(h * w):
            across, down = (i % w - j % w) * size / w, (i // w - j // w) * size / h
            total += weights[:, :, i, j].double() * math.sqrt(across ** 2 + down ** 2) / (h * w)
    return total


# ------------------------------------------------------------------------------------------------ distances

@pytest.mark.parametrize("h, w, size", [(4, 4, 32), (3, 5, 30), (7, 2, 14), (1, 1, 9)])
def test_uniform_attention_reaches_the_mean_distance_of_the_grid_and_identity_nothing(h, w, size):
    apart, N = figures.distances(h, w, size), h * w
    uniform = figures.mean_distance(torch.full((2, N, N), 1 / N), apart)
    assert uniform.tolist() == pytest.approx([mean_of_grid(h, w, size)] * 2, rel=1e-5)
    assert figures.mean_distance(torch.eye(N), apart) == 0
    assert torch.allclose(figures.distances(h, w, size, None, torch.arange(N)[1:]), apart[1:])
    attention = torch.rand(2, 3, N, N).softmax(-1)
    assert torch.allclose(figures.mean_distance(attention, apart).double(),
                          slow_distance(attention, h, w, size), atol=1e-5)


def vit_arguments(folder, change, *more):
    """The command line of a small ViT whose weights `change` has changed."""
    kwargs = [*VIT, *more]
    cfg = eval_knn.parse(["--arch", "vit_tiny", "--model_kwargs", *kwargs, "--data", "toy", "--image_size",
                          "32"])
    model = eval_knn.load_backbones(cfg)["vit_tiny"].model
    with torch.no_grad():
        change(model)
    torch.save(model.state_dict(), folder / "weights.pth")
    return model, ["--arch", "vit_tiny", "--model_kwargs", *kwargs, "--weights", folder / "weights.pth",
                   "--data", "toy",
                   "--image_size", 32, "--workers", 0, "--out", folder / "figure"]


def sharpen(model):
    """Make attention far from uniform, so that mistakes show."""
    for name, p in model.named_parameters():
        if ".qkv." in name or "_norm." in name or name == "pos_embed":
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))), alpha=0.5)


def center_crops(rows, size=32):
    """Center crops of toy's validation images, by hand."""
    views = mokd.EvalView(torch.utils.data.TensorDataset(*mokd.draw_toy(1024, "val")), size)
    return mokd.normalize(torch.stack([views[i][0] for i in rows]).float() / 255)


@pytest.mark.parametrize("more", [
    [], ["reg_tokens=2"], ["class_token=False", "global_pool=avg"], ["qk_norm=True"], ["num_heads=3"]])
def test_attention_distance_equals_a_double_loop_over_timms_own_weights(more, tmp_path):
    model, args = vit_arguments(tmp_path, sharpen, *more)
    figure("attention", *args, "--images", 9, "--batch_size", 4)
    found = numbers(tmp_path / "figure")
    weights = []   # timm's slow path hands them to its dropout
    for block in model.eval().blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, x, y: weights.append(x[0].detach()))
    with torch.no_grad():
        model(center_crops(torch.randperm(1024, generator=mokd.generator(0, "images"))[:9]))
    prefix = model.num_prefix_tokens
    assert prefix == {"reg_tokens=2": 3, "class_token=False": 0}.get(more[0] if more else "", 1)
    expected = []
    for attention in weights:
        attention = attention[:, :, prefix:, prefix:]
        expected.append(slow_distance(attention / attention.sum(-1, keepdim=True), 4, 4, 32))
    expected = torch.stack(expected, 1)   # (images, layers, heads)
    key = "vit_tiny/vit_tiny"
    assert found[f"{key}/distance"].shape == (2, 3 if more == ["num_heads=3"] else 2)
    assert np.allclose(found[f"{key}/distance"], expected.mean(0), rtol=1e-4)
    assert np.allclose(found[f"{key}/deviation"], expected.std(0, correction=0), rtol=1e-2, atol=1e-4)
    assert np.allclose(found[f"{key}/band"], expected.mean(-1).std(0), rtol=1e-2, atol=1e-4)
    assert np.abs(found[f"{key}/distance"] - mean_of_grid(4, 4, 32)).max() > 0.4   # not uniform
    assert [*found[f"{key}/names"]] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("size, side", [(32, 4), (48, 6)])
def test_attention_that_is_known_has_its_distance_in_pixels(size, side, tmp_path):
    def uniform(model):
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
    _, args = vit_arguments(tmp_path, uniform)
    figure("attention", *args, "--images", 2, "--image_size", size)
    found = numbers(tmp_path / "figure")
    for name in ("distance", "uniform"):
        assert np.allclose(found[f"vit_tiny/vit_tiny/{name}"], mean_of_grid(side, side, size), rtol=1e-5)

    def identity(model):   # each patch has a direction of its own, and looks for it
        model.pos_embed.zero_()
        model.pos_embed[0, 1:, :16] = 1000 * torch.eye(16)
        for block in model.blocks:
            block.attn.qkv.weight[:48] = 10 * torch.eye(24).repeat(2, 1)
    _, args = vit_arguments(tmp_path, identity, "num_heads=1")
    figure("attention", *args, "--images", 2)
    found = numbers(tmp_path / "figure")
    assert np.abs(found["vit_tiny/vit_tiny/distance"]).max() < 1e-4


def test_attention_that_does_more_than_softmax_is_not_shown():
    attention, x = timm.models.vision_transformer.Attention(8, 2), torch.randn(2, 5, 8)
    y = attention(x)
    assert figures.attention_of(attention, x, y, 1).shape == (2, 2, 4, 4)
    with pytest.raises(mokd.UserError, match="more than softmax"):
        figures.attention_of(attention, x, 1.01 * y, 1)


def test_attention_in_windows_is_not_shown(tmp_path, capsys):
    for arch, kwargs, words in (
            ("swin_tiny_patch4_window7_224", SWIN, "no such layers"),
        ("mobilevit_xxs", [], "not between all")):
        more = ["--model_kwargs", *kwargs] if kwargs else []
        figure("attention", "--arch", arch, *more, "--data", "toy", "--image_size", 64, "--workers", 0,
               "--images", 2, "--out",
             tmp_path / "a", code=2)
        errors = capsys.readouterr().err
        assert f"skipped {arch}" in errors and words in errors
        assert "no model is left; give --checkpoint" in errors


def naive_map_distance(Z, size):
    """Feature map (C, H, W) -> its mean distance, by loops, in double precision."""
    C, H, W = Z.shape
    z, total = Z.double().numpy().reshape(C, -1), 0.0
    for i in range(H * W):
        e = [z[:, i] @ z[:, j] / math.sqrt(C) for j in range(H * W)]
        p = np.exp(np.array(e) - max(e))
        d = [math.hypot((i // W - j // W) * size / H, (i % W - j % W) * size / W) for j in range(H * W)]
        total += p @ d / p.sum() / (H * W)
    return total


SWIN = "img_size=64 embed_dim=8 depths=1,1,1,1 num_heads=1,1,1,1 window_size=2".split()


def test_featuremap_equals_a_naive_loop_over_maps(runs, both, tmp_path, capsys):
    figure("featuremap", *both, "--images", 3, "--batch_size", 2, "--out", tmp_path / "f.png")
    assert "skipped 2 vit_tiny of mokd: its stages give tokens" in capsys.readouterr().err
    model = timm.create_model("resnet18", features_only=True, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
    model.load_state_dict(torch.load(runs / "mokd" / "model1.pth", weights_only=True), strict=False)
    with torch.no_grad():
        maps = model.eval()(center_crops(torch.randperm(1024, generator=mokd.generator(0, "images"))[:3]))
    expected = np.array([[naive_map_distance(Z, 32) for Z in Zs] for Zs in maps])
    uniform = [mean_of_grid(s, s, 32) for s in (16, 8, 4, 2, 1)]
    stages = ["act1", "layer1", "layer2", "layer3", "layer4"]
    for stem, first in (("off", 1), ("on", 0)):   # without the stem unless asked
        figure("featuremap", *both, "--images", 3, "--batch_size", 2, "--stem", stem, "--out", tmp_path / "f")
        found = numbers(tmp_path / "f")
        assert [*found["mokd/1 resnet18/names"]] == stages[first:]
        assert np.allclose(found["mokd/1 resnet18/distance"][:, 0], expected[first:].mean(1), rtol=1e-4)
        assert np.allclose(found["mokd/1 resnet18/deviation"][:, 0], expected[first:].std(1), rtol=1e-2,
                           atol=1e-4)
        assert np.allclose(found["mokd/1 resnet18/uniform"], uniform[first:], rtol=1e-5)
    assert not np.allclose(found["independent/1 resnet18/distance"], found["mokd/1 resnet18/distance"],
                           rtol=1e-4)
    assert not any("vit" in key for key in found)


def test_featuremap_of_known_maps_and_of_maps_in_parts():
    # 1350 positions, more than one part
    Z = torch.randn(3, 45, 30, generator=torch.Generator().manual_seed(0))
    f = Z.flatten(1).T.double()
    weights, n = (f @ f.T / math.sqrt(3)).softmax(-1), torch.arange(1350)
    apart = ((n[:, None] // 30 - n // 30) * 60 / 45).square()
    apart = apart + ((n[:, None] % 30 - n % 30) * 60 / 30).square()
    expected = [(weights * apart.sqrt()).sum().item() / 1350, mean_of_grid(45, 30, 60)]
    assert figures.of_map(Z, 60).tolist() == pytest.approx(expected, rel=1e-4)
    alike, unlike = torch.ones(5, 4, 6), 100 * torch.eye(12).view(12, 3, 4)
    assert figures.of_map(alike, 24).tolist() == pytest.approx([mean_of_grid(4, 6, 24)] * 2)
    assert figures.of_map(unlike, 24)[0] < 1e-6


@pytest.mark.parametrize("arch, kwargs", [("efficientnet_b0", []), ("mobilenetv3_small_050", []),
                                          ("convnext_atto", []),
                                          ("swin_tiny_patch4_window7_224", SWIN)])
def test_featuremap_reads_the_stages_of_any_cnn(arch, kwargs, tmp_path):
    more = ["--model_kwargs", *kwargs] if kwargs else []
    args = ["--arch", arch, *more, "--data", "toy", "--image_size", 64, "--workers", 0]
    figure("featuremap", *args, "--images", 2, "--out", tmp_path / "f")
    found = numbers(tmp_path / "f")
    model = eval_knn.load_backbones(eval_knn.parse([*map(str, args)]))[arch].model
    with torch.no_grad():   # by another way than hooks
        drawn = torch.randperm(1024, generator=mokd.generator(0, "images"))[:2]
        maps = model.forward_intermediates(center_crops(drawn, 64), intermediates_only=True)
    assert len(maps) >= len(found[f"{arch}/{arch}/distance"]) == 4   # the paper's x-axis: stages 1 to 4
    expected = [np.mean([naive_map_distance(Z, 64) for Z in Zs]) for Zs in maps[-4:] if Zs.shape[-1] <= 16]
    assert len(expected) >= 3 and np.allclose(found[f"{arch}/{arch}/distance"][-len(expected):, 0], expected,
                                              rtol=1e-3)


def test_an_unreadable_image_is_left_out_and_a_folder_without_validation_will_do(tmp_path, capsys):
    x, _ = mokd.draw_toy(120, "val")
    _, args = vit_arguments(tmp_path, sharpen)
    found = []
    for name in ("all", "more"):
        (tmp_path / name / "a").mkdir(parents=True)
        for i in range(120):
            Image.fromarray(x[i].permute(1, 2, 0).numpy()).save(tmp_path / name / "a" / f"{i}.png")
        if name == "more":
            (tmp_path / name / "a" / "broken.png").write_bytes(b"no image")
        figure("attention", *args, "--data", tmp_path / name)
        found.append(numbers(tmp_path / "figure")["vit_tiny/vit_tiny/distance"])
    assert "broken.png" in capsys.readouterr().err
    assert np.allclose(*found, rtol=1e-5)
    for i in range(60):
        (tmp_path / "more" / "a" / f"{i}.png").unlink()
    for more in ([], ["--maps", "--images", 61]):   # the rule of all programs
        figure("attention", *args, *more, "--data", tmp_path / "more", code=1)
        assert "1 of 61 images cannot be read, more than 1 %" in capsys.readouterr().err


def test_attention_lays_runs_over_each_other_and_names_what_it_skips(both, tmp_path, capsys):
    figure("attention", *both, "--images", 5, "--out", tmp_path / "new" / "a")
    printed = capsys.readouterr()
    assert "attention: skipped 1 resnet18 of mokd: it has no such layers" in printed.err
    assert f"{tmp_path}/new/a.npz" in printed.out
    found = numbers(tmp_path / "new" / "a")
    assert {key.rpartition("/")[0] for key in found} == {"independent/2 vit_tiny", "mokd/2 vit_tiny"}
    assert all(found[f"{run}/2 vit_tiny/distance"].shape == (2, 2) for run in ("mokd", "independent"))


def test_distances_are_one_panel_a_model_with_bands_and_heads_as_dots():
    rng = np.random.default_rng(0)
    # images, layers, heads and uniform
    found = {("a", "1 vit"): (["blocks.0", "blocks.1"], rng.random((7, 2, 4))),
             ("b", "1 vit"): (["blocks.0", "blocks.1"], rng.random((7, 2, 4))),
             ("b", "2 vit_other"): (["blocks.0"], rng.random((7, 1, 3)))}
    fig, _ = figures.show_distances(settings("attention", "--arch", "vit_tiny", "--data", "toy"), found,
                                    "layer")
    assert [ax.get_title() for ax in fig.axes] == ["vit", "vit_other"]
    lines, bands = fig.axes[0].lines, fig.axes[0].collections
    pixels = found["b", "1 vit"][1][..., :-1]
    mean, *dots, uniform = lines[5:]   # of run b
    assert mean.get_xdata().tolist() == uniform.get_xdata().tolist() == [1, 2]   # layers count from 1
    assert np.allclose(mean.get_ydata(), pixels.mean((0, 2)))
    for head, dot in enumerate(dots):
        assert dot.get_linestyle() == "None" and mean.get_color() == dot.get_color() != lines[0].get_color()
        assert np.allclose(dot.get_ydata(), pixels.mean(0)[:, head])
    assert len(dots) == 3
    edges = bands[1].get_paths()[0].vertices
    spread = pixels.mean(2).std(0, ddof=1)
    assert np.allclose(edges[:, 1].min(), (pixels.mean((0, 2)) - spread).min())
    assert np.allclose(edges[:, 1].max(), (pixels.mean((0, 2)) + spread).max())
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["a", "b", "a head", "uniform attention"]
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim()


def test_two_models_of_one_architecture_in_a_run_are_told_apart():
    pixels = np.random.default_rng(0).random((3, 2, 2))
    found = {(run, f"{i} resnet18"): (["layer1", "layer2"], pixels) for run in "ab" for i in (1, 2)}
    fig, _ = figures.show_distances(settings("featuremap", "--arch", "resnet18", "--data", "toy"), found,
                                    "stage")
    texts = [t.get_text() for t in fig.legends[0].get_texts()]
    # one head: no dots
    assert texts == ["a, model 1", "a, model 2", "b, model 1", "b, model 2", "uniform attention"]
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["layer1", "layer2"]


@pytest.mark.parametrize("more", [[], ["reg_tokens=1"], ["class_token=False", "global_pool=avg"]])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_attention_maps_are_timms_own_weights_of_the_last_block(more, pool, tmp_path):
    model, args = vit_arguments(tmp_path, sharpen, *more)
    figure("attention", "--maps", *args, "--images", 3, "--batch_size", 2, "--vit_pool", pool)
    found, weights = numbers(tmp_path / "figure"), []
    model.eval().blocks[-1].attn.fused_attn = False
    model.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, x, y: weights.append(x[0].detach()))
    with torch.no_grad():
        model(center_crops(found["index"]))
    prefix = model.num_prefix_tokens
    rows = weights[0][:, :, prefix:, prefix:]   # patches ask
    if pool == "cls" and prefix:
        rows = weights[0][:, :, :1, prefix:]    # CLS asks
    expected = (rows / rows.sum(-1, keepdim=True)).mean(2)
    assert found["vit_tiny/vit_tiny/maps"].shape == (3, 2, 16)
    assert np.allclose(found["vit_tiny/vit_tiny/maps"], expected, rtol=1e-3, atol=1e-6)
    assert np.abs(found["vit_tiny/vit_tiny/maps"] * 16 - 1).max() > 0.2   # not uniform
    fig, _ = figures.attention(settings("attention", "--maps", *args, "--images", 2, "--vit_pool", pool),
                               torch.device("cpu"))
    words = "CLS as query" if pool == "cls" and prefix else "mean over all patches as queries"
    assert any(words in ax.get_xlabel() for ax in fig.axes)
    shown = fig.axes[2].images[1].get_array()   # head 2 of the first image, over it
    assert np.allclose(shown, 16 * expected[0, 1].reshape(4, 4), rtol=1e-3)


def test_what_is_unset_is_the_first_checkpoints(runs, tmp_path):
    state = torch.load(runs / "mokd" / "checkpoint.pth", weights_only=True)
    state["config"] |= dict(global_size=48, data="nowhere")
    (tmp_path / "large").mkdir()
    torch.save(state, tmp_path / "large" / "checkpoint.pth")
    files = [runs / "mokd" / "checkpoint.pth", tmp_path / "large" / "checkpoint.pth"]
    args = ["--images", 3, "--workers", 0, "--out", tmp_path / "a"]
    for more, side in (([], 4), (["--image_size", 48], 6)):
        figure("attention", "--checkpoint", *files, *more, *args)
        found = numbers(tmp_path / "a")
        assert np.array_equal(found["mokd/2 vit_tiny/distance"], found["large/2 vit_tiny/distance"])
        assert np.allclose(found["large/2 vit_tiny/uniform"], mean_of_grid(side, side, 8 * side))
    figure("attention", "--checkpoint", *files[::-1], "--data", "toy", *args)
    assert np.allclose(numbers(tmp_path / "a")["mokd/2 vit_tiny/uniform"], mean_of_grid(6, 6, 48))


def settings(*args):
    return figures.parse([*map(str, args)])


# ----------------------------------------------------------------------------------------------------- tsne

def test_relative_features_do_not_depend_on_width_rotation_and_scale():
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    f, anchors, turn = rand(20, 6), rand(7, 6), torch.linalg.qr(rand(9, 9))[0][:6]
    z = figures.relative(f, anchors)
    assert torch.allclose(z, figures.relative(5 * f @ turn, anchors @ turn), atol=1e-5)   # 9 wide
    assert not torch.allclose(z, figures.relative(f[:, :3], anchors[:, :3]), atol=0.1)
    lengths = np.linalg.norm(f, axis=1)[:, None] * np.linalg.norm(anchors, axis=1)
    s = f.numpy() @ anchors.numpy().T / lengths
    s = (s - s.mean(0)) / s.std(0, ddof=1)
    assert np.allclose(z, s / np.linalg.norm(s, axis=1, keepdims=True), atol=1e-5)


def test_agreement_is_that_of_the_nearest_other_image():
    g = torch.Generator().manual_seed(0)
    z1, y = torch.randn(30, 5, generator=g), torch.arange(30) % 3
    z2 = z1 + 0.5 * torch.randn(30, 5, generator=g)   # so that an image is often its own nearest
    z1, z2 = z1 / z1.norm(dim=1, keepdim=True), z2 / z2.norm(dim=1, keepdim=True)
    hits = 0
    for a, b in ((z1, z2), (z2, z1)):
        for i in range(30):
            nearest = max((j for j in range(30) if j != i), key=lambda j: float(a[i] @ b[j]))
            hits += y[nearest] == y[i]
    assert figures.agreement(z1, z2, y) == pytest.approx(100 * int(hits) / 60)


def test_tsne_shows_the_drawn_classes_of_both_models_and_runs(runs, both, tmp_path, capsys):
    figure("tsne", *both, "--classes", 3, "--per_class", 12, "--anchors", 40, "--perplexity", 5, "--out",
           tmp_path / "t")
    printed, found = capsys.readouterr().out, numbers(tmp_path / "t")
    x, y = mokd.draw_toy(1024, "val")
    labels = y[found["images"]].numpy()
    assert "mokd: t-SNE of 72 points, compared to 40 anchors" in printed
    assert len({*labels}) == 3 and np.bincount(labels)[[*{*labels}]].tolist() == [12] * 3
    assert len({*found["anchors"]}) == 40 and not {*found["anchors"]} & {*found["images"]}
    for run in ("independent", "mokd"):
        assert np.array_equal(found[f"{run}/labels"], labels)
        for model in ("1 resnet18", "2 vit_tiny"):
            xy = found[f"{run}/{model}/xy"]
            assert xy.shape == (36, 2) and np.isfinite(xy).all()
    cfg = eval_knn.parse(["--checkpoint", str(runs / "mokd" / "checkpoint.pth")])
    backbone = eval_knn.load_backbones(cfg)["2 vit_tiny"]
    with torch.no_grad():
        f, a = (backbone(center_crops(found[name]))[0] for name in ("images", "anchors"))
    # features come in half precision
    assert np.allclose(found["mokd/2 vit_tiny/relative"], figures.relative(f, a), atol=0.03)

    cfg = settings("tsne", *both, "--classes", 3, "--per_class", 12, "--anchors", 40, "--perplexity", 5)
    for seed in (0, 1):
        cfg.seed = seed
        fig, again = figures.tsne(cfg, torch.device("cpu"))
        for key in ("images", "mokd/2 vit_tiny/xy"):
            assert np.array_equal(found[key], again[key]) == (seed == 0)
    assert [ax.get_title() for ax in fig.axes] == ["independent", "mokd"]
    shown = fig.axes[1].collections
    assert len(shown) == 2 and len({s.get_paths()[0].vertices.shape for s in shown}) == 2   # a marker a model
    assert all(len({*map(tuple, s.get_facecolors())}) == 3 for s in shown)                  # a color a class
    names = [t.get_text() for t in fig.legends[0].get_texts()]
    assert names == ["1 resnet18", "2 vit_tiny"] + [figures.TOY[c] for c in sorted({*again["mokd/labels"]})]
    colors = [h.get_color() for h in fig.legends[0].legend_handles]
    assert colors[:2] == ["black", "black"] and not {"black", "gray", "#7f7f7f"} & {*colors[2:]}
    assert all(h.get_markerfacecolor() == "none" for h in fig.legends[0].legend_handles[:2])


def test_tsne_takes_one_model_and_all_classes_there_are(runs, tmp_path):
    figure("tsne", "--checkpoint", runs / "mokd" / "checkpoint.pth", "--model", 2, "--per_class", 4,
           "--anchors", 20,
         "--perplexity", 4, "--workers", 0, "--out", tmp_path / "t")
    found = numbers(tmp_path / "t")
    assert {*found["mokd/labels"]} == {*range(8)} and "mokd/agreement" not in found


# -------------------------------------------------------------------------------------------- crops, curves

def test_crops_are_the_views_that_the_run_makes(runs, tmp_path):
    args = ["crops", "--checkpoint", runs / "mokd" / "checkpoint.pth", "--images", 3, "--workers", 0]
    figure(*args, "--out", tmp_path / "c")
    found = numbers(tmp_path / "c")
    cfg = mokd.parse_args([*SMALL, *PAIR])
    cfg.batch_size = 3
    images = mokd.get_data(cfg)[0]
    crops = [mokd.MultiCrop(images, cfg)[0, int(i)] for i in found["index"]]
    expected = mokd.make_views(torch.utils.data.default_collate(crops), cfg, torch.device("cpu"), 0)
    for name, x, n in (("global", expected[0], 2), ("local", expected[1], 2)):
        assert found[name].shape == (n, 3, *x.shape[1:]) and found[name].min() >= 0 and found[name].max() <= 1
        assert np.allclose(mokd.normalize(torch.from_numpy(found[name]).flatten(0, 1)), x, atol=1e-4)
    fig, _ = figures.crops(settings(*args), torch.device("cpu"))
    assert [ax.get_title(loc="left") for ax in fig.axes][:4] == ["global", "", "local", ""]
    # row 1, column 1
    assert np.allclose(fig.axes[5].images[0].get_array(), found["global"][1, 1].transpose(1, 2, 0), atol=1e-6)


def test_crops_need_no_checkpoint_and_take_the_settings_of_mokd(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["--checkpoint", runs / "mokd" / "checkpoint.pth", "--out", tmp_path / "run"]
    figure("crops", *run, "--images", 3)
    figure("crops", *SMALL, "--images", 3)
    same, found = numbers(tmp_path / "run"), numbers(tmp_path / "crops")
    assert found["global"].shape == same["global"].shape and found["local"].shape == same["local"].shape
    x, _ = mokd.draw_toy(4096, "train")   # the fixture's run had 64 images; these are of all
    cfg = mokd.parse_args(SMALL)
    cfg.batch_size = 3
    crops = [mokd.MultiCrop(torch.utils.data.TensorDataset(x, x), cfg)[0, int(i)] for i in found["index"]]
    expected = mokd.make_views(torch.utils.data.default_collate(crops), cfg, torch.device("cpu"), 0)[0]
    assert np.allclose(mokd.normalize(torch.from_numpy(found["global"]).flatten(0, 1)), expected, atol=1e-4)
    figure("crops", "--demo", "--local_crops", 0, "--images=2", "--seed", 3, "--out", tmp_path / "d")
    found = numbers(tmp_path / "d")
    assert found["global"].shape == (2, 2, 3, 24, 24) and found["local"].size == 0
    assert found["index"].tolist() != numbers(tmp_path / "crops")["index"].tolist()[:2]


@pytest.mark.parametrize("width", [7, 3.3, 2.5])
def test_local_views_larger_than_global_ones_are_shown_whole_and_at_one_scale(width):
    cfg = settings("crops", *SMALL, "--global_size", 16, "--local_size", 32, "--images", 2, "--width", width)
    fig, found = figures.crops(cfg, torch.device("cpu"))
    assert found["local"].shape == (2, 2, 3, 32, 32)
    assert fig.get_size_inches()[0] <= width + 1e-6
    fig.canvas.draw()
    boxes = [ax.get_window_extent() for ax in fig.axes]
    pixel = [box.width / len(ax.images[0].get_array()) for box, ax in zip(boxes, fig.axes)]
    assert np.allclose(pixel, pixel[0], rtol=1e-3)
    assert np.allclose(fig.axes[2].images[0].get_array(), found["local"][0, 0].transpose(1, 2, 0))
    for i, box in enumerate(boxes):   # within the figure, over no other
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


# ------------------------------------------------------------------------------------------- curves, losses

def test_losses_are_the_log(runs, tmp_path):
    figure("losses", "--log", runs / "mokd" / "log.jsonl", runs / "independent" / "log.jsonl", "--out",
           tmp_path / "c")
    found = numbers(tmp_path / "c")
    records = [json.loads(line) for line in open(runs / "mokd" / "log.jsonl")]
    for name in ("loss1", "sm2", "ct1", "entropy_m1", "spread_t2", "lr2"):
        expected = [[r["step"], r[name]] for r in records if name in r]
        assert len(expected) == 4 and found[f"mokd/{name}"].shape == (1, 4)
        points = np.stack([found[f"mokd/{name}/steps"], found[f"mokd/{name}"][0]], 1)
        assert points.tolist() == expected
    assert "independent/sm1" in found and "independent/ct1" not in found and "mokd/knn1" not in found


def write_log(file, records, end=""):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return file


def test_losses_of_a_resumed_run_show_each_step_once(tmp_path):
    for run, lines in (("a", [2, 4, 6, 4, 6, 8]), ("b", [3])):
        records = [dict(step=step, steps=8, loss1=10.0 * i, lr1=0.1, GB=1.0) for i, step in enumerate(lines)]
        write_log(tmp_path / run / "log.jsonl", records)
    cfg = settings("losses", "--log", tmp_path / "a" / "log.jsonl", tmp_path / "b" / "log.jsonl")
    fig, found = figures.losses(cfg, torch.device("cpu"))
    assert found["a/loss1/steps"].tolist() == [2, 4, 6, 8] and found["a/loss1"].tolist() == [[0, 30, 40, 50]]
    assert "a/GB" not in found and cfg.out == str(tmp_path / "a" / "losses")
    assert [ax.get_title() for ax in fig.axes] == ["model 1", "model 2", "", ""]   # no title twice
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss", "", "learning rate", ""]
    assert fig.axes[0].lines[0].get_xydata().tolist() == [[2, 0], [4, 30], [6, 40], [8, 50]]
    assert fig.axes[0].get_xlim() == fig.axes[2].get_xlim()


def test_totals_of_other_terms_have_another_axis(runs):
    cfg = settings("losses", "--log", runs / "independent", runs / "mokd")
    fig, _ = figures.losses(cfg, torch.device("cpu"))
    rows = {fig.axes[i].get_ylabel(): fig.axes[i] for i in range(0, len(fig.axes), 2)}
    assert [*rows][:2] == ["loss\n(sm)", "loss\n(sm, st, cm, ct)"]
    # sm of both runs and st of one share an axis
    assert [len(rows[label].lines) for label in [*rows][:3]] == [1, 1, 3]
    assert rows["loss\n(sm)"].lines[0].get_color() != rows["loss\n(sm, st, cm, ct)"].lines[0].get_color()
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim() != fig.axes[2].get_ylim()


def test_curves_draw_knn_over_epochs_with_a_band_for_seeds(tmp_path):
    accuracy = dict(mokd=[[50, 60, 64], [52, 62, 70], [51, 58, 67]], alone=[[40, 41, 42]])
    for setting, seeds in accuracy.items():
        for seed, values in enumerate(seeds):
            records = [dict(epoch=e, step=10 * e, loss1=1.0) for e in range(4)]   # epochs count from 0
            records += [dict(epoch=2 * i + 1, knn1=v, knn2=v + 1) for i, v in enumerate(values)]
            write_log(tmp_path / setting / str(seed) / "log.jsonl", records)
    figure("curves", "--log", tmp_path / "alone", tmp_path / "mokd", "--out", tmp_path / "c")
    found = numbers(tmp_path / "c")
    assert found["mokd/knn1/steps"].tolist() == [2, 4, 6] and found["mokd/knn1"].tolist() == accuracy["mokd"]
    assert found["alone/knn2"].tolist() == [[41, 42, 43]]
    cfg = settings("curves", "--log", tmp_path / "alone", tmp_path / "mokd", "--titles", "CNN", "ViT",
                   "--pixels", 55)
    fig, _ = figures.curves(cfg, torch.device("cpu"))
    assert [ax.get_title() for ax in fig.axes] == ["CNN", "ViT"]
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim()
    alone, mean, pixels = fig.axes[0].lines
    assert mean.get_xydata().tolist() == [[2, 51], [4, 60], [6, 67]] and set(pixels.get_ydata()) == {55}
    band, = fig.axes[0].collections   # one seed has none
    y = band.get_paths()[0].vertices
    for epoch, low, high in ((2, 50, 52), (4, 58, 62), (6, 64, 70)):   # deviations 1, 2, 3
        assert (y[y[:, 0] == epoch, 1].min(), y[y[:, 0] == epoch, 1].max()) == pytest.approx((low, high))
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["alone", "mokd, 3 runs", "raw pixels"]


def test_a_setting_is_a_file_a_folder_or_a_pattern(tmp_path, capsys):
    for name in ("mokd-0", "mokd-1", "other"):
        write_log(tmp_path / name / "log.jsonl", [dict(epoch=0, knn1=1.0, knn2=2.0)])
    write_log(tmp_path / "mokd-1" / "linear" / "log.jsonl", [dict(epoch=0, loss=1.0)])   # of another program
    cfg = settings("curves", "--log", tmp_path / "mokd-*", tmp_path / "other" / "log.jsonl",
                   tmp_path / "mokd-1")
    assert cfg.names == ["mokd", "other", "mokd-1"] and cfg.out == str(tmp_path / "curves")
    assert [len(tables) for tables in figures.read_logs(cfg).values()] == [2, 1, 1]
    assert "skipped" in capsys.readouterr().err
    cfg = settings("curves", "--log", tmp_path / "mokd-0", tmp_path / "mokd-1", "--names", "first seed",
                   "second")
    assert [*figures.curves(cfg, torch.device("cpu"))[1]][0].startswith("first seed/")
    assert cfg.out == str(tmp_path / "mokd-0" / "curves")


def test_seeds_are_drawn_to_where_all_of_them_are(tmp_path, capsys):
    for seed, epochs in (("0", 5), ("1", 3)):
        records = [dict(epoch=e, knn1=10.0 * e, knn2=1.0) for e in range(epochs)]
        write_log(tmp_path / seed / "log.jsonl", records)
    _, found = figures.curves(settings("curves", "--log", tmp_path), torch.device("cpu"))
    assert found[f"{tmp_path.name}/knn1"].tolist() == [[0, 10, 20]] * 2
    assert "knn1 is shown at 3 of 5 steps" in capsys.readouterr().err


def test_torn_lines_of_a_log_are_skipped_with_a_word(tmp_path, capsys):
    file = write_log(tmp_path / "log.jsonl", [dict(epoch=0, knn1=1.0, knn2=2.0)], '{"epoch": 1, "kn\n')
    with open(file, "a") as f:   # the run was resumed
        f.write(json.dumps(dict(epoch=1, knn1=3.0, knn2=4.0)) + "\n" + '{"ep')
    figure("curves", "--log", file, "--out", tmp_path / "c")
    assert numbers(tmp_path / "c")[f"{tmp_path.name}/knn1"].tolist() == [[1, 3]]
    assert f"--log {file}: skipped 2 torn lines (2, 4)" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- search

def a_t_head(depth=1, dim=24, N=9, change=None):
    """An untrained T-Head for tokens of its own width, with no positions."""
    torch.manual_seed(0)
    t_head = mokd.THead(dim, 16, dim=dim, depth=depth, num_heads=2, num_tokens=N).eval()
    with torch.no_grad():
        t_head.pos.zero_()
        for block in t_head.blocks:
            block.attn.qkv.bias.zero_()
            block.attn.proj.bias.zero_()
            if change:
                change(block)
    return t_head


def test_a_query_equal_to_a_token_attends_to_that_token():
    def compare_directly(block):   # queries and keys are the tokens themselves
        block.attn.qkv.weight[:48] = 4 * torch.eye(24).repeat(2, 1)
    t_head = a_t_head(change=compare_directly)
    Z = torch.eye(12)[:9].repeat(1, 2).expand(3, 9, 24).clone()   # in both heads
    Z[1] = Z[1].flip(0)
    for token in range(9):
        attention, change = figures.look_of_search(t_head, Z, Z[:, token])
        assert attention.shape == (3, 1, 9) and change.shape == (3, 9)
        assert (attention.argmax(-1) == token).all()
        # The query sees two tokens like itself, itself and this one, and they share its attention.
        assert np.allclose(attention[:, 0, token], 0.5, atol=0.01) and (attention.sum(-1) < 0.52).all()
        assert (figures.effective(attention) < 1.3).all()


def test_attention_and_change_of_a_search_equal_a_slow_computation():
    g = torch.Generator().manual_seed(0)
    def spread_out(block):
        block.attn.qkv.weight.copy_(torch.randn(72, 24, generator=g) / 4)
    t_head = a_t_head(2, change=spread_out)
    Z, query = torch.randn(3, 9, 24, generator=g), torch.randn(3, 24, generator=g)
    attention, change = figures.look_of_search(t_head, Z, query)
    weights = []
    for block in t_head.blocks:   # timm's slow path hands its weights to its dropout
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, x, y: weights.append(x[0].detach()))
    with torch.no_grad():
        with_query = t_head.norm(t_head.blocks(torch.cat([query[:, None], Z], 1)))
        expected = torch.stack([w[:, :, 0, 1:].mean(1) for w in weights], 1)
        without = t_head.norm(t_head.blocks(Z))
    assert np.allclose(attention, expected, atol=1e-5)
    for b in range(3):
        for n in range(9):
            difference = (with_query[b, n + 1] - without[b, n]).norm() / without[b, n].norm()
            assert change[b, n] == pytest.approx(difference.item(), rel=1e-3)

    def silent(block):   # values are 0, so a query changes nothing
        block.attn.qkv.weight[48:].zero_()
    assert (figures.look_of_search(a_t_head(2, change=silent), Z, query)[1] == 0).all()


def test_the_effective_number_of_tokens():
    # the rest of a query's attention is its own
    p = np.array([[1, 1, 1, 1], [0, 2, 0, 0], [1, 0, 1, 0]]) * 0.2
    assert figures.effective(p) == pytest.approx([4, 1, 2])


@pytest.mark.parametrize("view", [1, 3])
def test_search_shows_students_among_momentum_tokens_trained_and_untrained(view, runs, tmp_path, capsys):
    figure("search", "--checkpoint", runs / "mokd" / "checkpoint.pth", "--images", 2, "--view", view,
           "--out", tmp_path / "s")
    found, printed = numbers(tmp_path / "s"), capsys.readouterr().out
    assert "1 to 2, untrained: " in printed and "2 to 1, trained: " in printed
    cfg = mokd.parse_args([*SMALL, *PAIR])
    cfg.batch_size, cfg.dtype = 2, "fp32"
    crops = [mokd.MultiCrop(mokd.get_data(cfg)[0], cfg)[0, int(i)] for i in found["index"]]
    x = mokd.make_views(torch.utils.data.default_collate(crops), cfg, torch.device("cpu"), 0)
    query_view = [x[0][:2], x[0][2:], x[1][:2], x[1][2:]][view]
    shown = mokd.normalize(torch.from_numpy(found["query_view"]))
    assert np.allclose(shown, query_view, atol=1e-4)
    models = mokd.build_models(cfg, torch.device("cpu"))
    saved = torch.load(runs / "mokd" / "checkpoint.pth", weights_only=True)
    for name in ("untrained", "trained"):
        for (a, b), N in (((0, 1), 16), ((1, 0), 1)):   # a searches b; the CNN's map is one token here
            student, momentum_net = models[a].net.eval(), models[b].momentum_net.eval()
            with torch.no_grad():
                query = student.t_head.query_of(student.backbone(query_view)[0])
                expected = figures.look_of_search(momentum_net.t_head, momentum_net.backbone(x[0][:2])[1],
                                                  query)
            for what, value in zip(("attention", "change"), expected):
                assert found[f"{a + 1} to {b + 1}/{name}/{what}"].shape[-1] == N
                assert np.allclose(found[f"{a + 1} to {b + 1}/{name}/{what}"], value, atol=1e-5)
        for model in models:
            model.load_state(saved[f"model{model.i}"])
    for key in ("1 to 2/{}/attention", "1 to 2/{}/change", "2 to 1/{}/change"):
        assert not np.allclose(found[key.format("trained")], found[key.format("untrained")], rtol=1e-3)


# ------------------------------------------------------------------------------------------------ for print

@pytest.mark.parametrize("width", [3.3, 7])
@pytest.mark.parametrize("name", ["tsne", "attention", "maps", "featuremap", "search", "crops", "curves",
                                  "losses"])
def test_a_figure_is_fit_for_print(name, width, runs, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    saved, save = [], Figure.savefig
    def keep(self, *args, **kwargs):
        saved.append(self)
        save(self, *args, **kwargs)
    monkeypatch.setattr(Figure, "savefig", keep)
    few = dict(tsne=["--per_class", 8, "--anchors", 20, "--perplexity", 5], attention=["--images", 4],
               featuremap=["--images", 4]).get(name, ["--images", 1])
    checkpoints = [runs / "mokd" / "checkpoint.pth"]
    if name in ("tsne", "attention", "maps", "featuremap"):
        checkpoints.append(runs / "independent" / "checkpoint.pth")
    source = ["--checkpoint", *checkpoints, "--workers", 0, *few]
    if name in ("curves", "losses"):
        source = ["--log", runs / "mokd"]
    words = ["attention", "--maps"] if name == "maps" else [name]
    figure(*words, *source, "--width", width, "--out", tmp_path / "f")
    fig = saved[0]
    assert fig.get_size_inches()[0] <= width + 1e-6
    with open(tmp_path / "f.pdf", "rb") as f:
        pdf = f.read()
    assert b"/CIDFontType2" in pdf and b"/Type3" not in pdf   # letters stay letters
    texts = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]
    assert texts and min(t.get_fontsize() for t in texts) >= 8
    pixels = np.array(Image.open(tmp_path / "f.png").convert("L"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):   # nothing is cut off
        assert edge.min() == 255
    titles = [ax.title for ax in fig.axes if ax.get_title()]
    assert len({t.get_text() for t in titles}) == len(titles)   # no title twice


# --------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("args, words", [
    ([], "the first word must be one of tsne, attention, featuremap, search, crops, curves, losses"),
    (["tnse"], "'tnse' is no figure"),
    (["tsne"], "--checkpoint FILE or --arch"),
    (["tsne", "--checkpoint", "HERE", "--arch", "resnet18"], "either --checkpoint"),
    (["attention", "--checkpoint", "nowhere.pth"], "nowhere.pth"),
    (["attention", "--arch", "vit_tiny"], "--data"),
    (["attention", "--checkpoint", "HERE", "--model", "1"], "of a ViT"),
    (["attention", "--maps", "--checkpoint", "HERE", "--model", "1"], "of a ViT"),
    (["featuremap", "--checkpoint", "HERE", "--model", "2"], "of a CNN"),
    (["attention", "--checkpoint", "HERE", "HERE"], "called alike"),
    (["attention", "--checkpoint", "HERE", "--names", "a", "b"], "--names: 2 names for 1 runs"),
    (["curves", "--log", "HERE", "HERE", "--names", "a", "a"], "--names a a: two are called alike"),
    (["attention", "--checkpoint", "HERE", "--images", "0"], "--images 0"),
    (["attention", "--checkpoint", "HERE", "--width", "1"], "--width 1"),
    (["tsne", "--checkpoint", "HERE", "--perplexity", "400"], "--perplexity 400"),
    (["tsne", "--checkpoint", "HERE", "--per_class", "128"], "--per_class 128"),
    (["tsne", "--checkpoint", "HERE", "--data", "nowhere"], "--data nowhere"),
    (["crops", "--data", "nowhere"], "--data nowhere"), (["crops", "--demo", "--images", "0"], "--images 0"),
    (["crops", "--checkpoint", "HERE", "HERE"], "one --checkpoint"), (["search"], "--checkpoint FILE"),
    (["search", "--checkpoint", "HERE", "HERE"], "one --checkpoint"),
    (["search", "--checkpoint", "HERE", "--view", "4"], "--view 4: the run has views 0 to 3"),
    (["search", "--checkpoint", "ALONE"], "has no T-Head"), (["curves"], "--log"), (["losses"], "--log"),
    (["curves", "--log", "nowhere.jsonl"], "nowhere.jsonl"), (["losses", "--log", "HERE"], "holds no losses"),
    (["curves", "--log", "nowhere*"], "no log.jsonl there"),
    (["curves", "--log", "LOG"], "--knn_every, or draw losses"),
    (["losses", "--log", "LOG", "--titles", "one"], "--titles: give two"),
    (["attention", "--checkpoint", "HERE", "--out", "/dev/null/x"], "--out /dev/null/x")])
def test_what_figures_cannot_do_is_said(runs, args, words, capsys, tmp_path):
    files = dict(HERE=runs / "mokd" / "checkpoint.pth", ALONE=runs / "independent" / "checkpoint.pth",
                 LOG=runs / "independent" / "log.jsonl")
    args = [files.get(a, a) for a in args]
    out = ["--out", tmp_path / "x", "--workers", 0] if len(args) > 1 and "--out" not in args else []
    assert words in refused([*args, *out], capsys)


def test_a_figure_that_cannot_be_written_is_named(runs, capsys, tmp_path):
    (tmp_path / "c.pdf").mkdir()
    message = refused(["curves", "--log", runs / "mokd" / "log.jsonl", "--out", tmp_path / "c"], capsys,
                      code=1)
    assert f"--out {tmp_path / 'c'}: cannot be written" in message


@pytest.mark.parametrize("content, words", [
    ("", "holds no losses"), ('{"epoch": 0}\n', "holds no losses"), ("[1]\n", "holds no losses"),
    ('{"step": 4, "loss1": "x"}\n{"ep', "holds no losses")])
def test_a_log_that_is_none_is_named(content, words, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text(content)
    message = refused(["curves", "--log", tmp_path / "log.jsonl"], capsys)
    assert words in message and str(tmp_path / "log.jsonl") in message


@pytest.mark.parametrize("package, figure", [("matplotlib", "crops"), ("sklearn", "tsne")])
def test_a_missing_package_is_named_with_what_installs_it(package, figure, runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    message = refused([figure, "--checkpoint", runs / "mokd" / "checkpoint.pth"], capsys)
    assert f"needs {package}" in message and "pip install -r extras/requirements.txt" in message


def test_one_process_draws(runs, monkeypatch, capsys):
    monkeypatch.setattr(mokd, "join_processes", lambda: (torch.device("cpu"), 0, 2))
    assert "without torchrun" in refused(["crops", "--checkpoint", runs / "mokd" / "checkpoint.pth"], capsys)


def test_help_names_every_setting_and_runs_from_anywhere(tmp_path, capsys):
    script = os.path.join(ROOT, "extras", "figures.py")
    done = subprocess.run([sys.executable, script, "-h"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(SystemExit) as end:
        figures.parse(["tsne", "--help"])
    for text, name in ((done.stdout, "FIGURE"), (capsys.readouterr().out, "tsne")):
        assert end.value.code == 0 and f"extras/figures.py {name} [--FLAG" in text
        for f in dataclasses.fields(figures.Config):
            assert f"--{f.name} " in text


# -------------------------------------------------------------------------------------- detection: whole runs
NET = ["--arch", "resnet18", "--model_kwargs", "channels=16,32,64,64", "layers=1,1,1,1"]
COCO_SMALL = ("--train_size 72 96 --test_size 84 --max_size 128 --anchors 16 24 36 --samples 32 16 "
              "--proposals 64 32 --batch_size 8 --lr 0.1 --warmup 10 --workers 0").split()
SHORT = ["--batch_size", "4", "--iterations", "8", "--log_every", "2"]


@pytest.fixture(autouse=True)
def signals():
    """Training takes them over."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few") / "coco"
    eval_coco.draw_coco(folder, dict(train=14, val=5), seed=1)
    return folder


def config(data, *args):
    return eval_coco.parse([*map(str, [*NET, *COCO_SMALL, "--data", data, *args])])


def detector(cfg, classes=3):
    return eval_coco.build(cfg, classes, torch.device("cpu"))


def call(*args):
    """-> exit code of the program, as from the command line."""
    return mokd.main([*map(str, args)], "extras/eval_coco.py", eval_coco.parse, eval_coco.run)


def batch_of(images, n=4, epoch=0):
    """-> images and targets, as train has them."""
    x, targets, _, _ = zip(*(images[epoch, i] for i in range(n)))
    return list(x), [{name: t[name] for name in ("scale", "boxes", "labels", "masks")} for t in targets]


def state_of(out):
    return torch.load(out / "checkpoint.pth", weights_only=True)


def results_of(out):
    return json.loads((out / "results.json").read_text())["results"]


def same(a, b):
    """Two checkpoints, bit for bit: weights, statistics, momentum of the optimizer."""
    assert a["step"] == b["step"] and a["net"].keys() == b["net"].keys()
    assert all(torch.equal(a["net"][k], b["net"][k]) for k in a["net"])
    for i, s in a["optimizer"]["state"].items():
        assert torch.equal(s["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"])


def test_training_from_scratch_finds_the_shapes(tmp_path, capsys):
    """AP from nothing to a clear number, through the whole program; README has 1,000 steps of it."""
    eval_coco.draw_coco(tmp_path / "coco", dict(train=200, val=40))
    args = [*NET, *COCO_SMALL, "--data", tmp_path / "coco", "--out"]
    assert call(*args, tmp_path / "before", "--iterations", 0) == 0
    assert call(*args, tmp_path / "after", "--iterations", 120) == 0
    before, after = results_of(tmp_path / "before"), results_of(tmp_path / "after")
    assert before["box"]["AP50"] < 1 and before["mask"]["AP50"] < 1
    assert after["box"]["AP50"] > 15 and after["mask"]["AP50"] > 15
    assert "AP50" in capsys.readouterr().out
    records = [json.loads(line) for line in open(tmp_path / "after" / "log.jsonl")]
    assert [r["step"] for r in records] == [*range(20, 121, 20)]
    losses = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    assert {*records[0]} == losses | {"step", "steps", "loss", "lr", "images/s", "GB", "minutes_left"}
    assert records[0]["loss"] == pytest.approx(sum(records[0][name] for name in losses), rel=1e-4)
    assert records[-1]["loss_mask"] < 0.8 * records[0]["loss_mask"]
    assert records[-1]["lr"] == pytest.approx(0.0005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_the_run_goes_on_bit_for_bit(number, few, tmp_path, capsys, monkeypatch):
    args = [*NET, *COCO_SMALL, *SHORT, "--data", few]
    assert call(*args, "--out", tmp_path / "whole") == 0
    rate = eval_coco.learning_rate

    def signalled(cfg, step):
        if step == 4:
            os.kill(os.getpid(), number)
        return rate(cfg, step)
    monkeypatch.setattr(eval_coco, "learning_rate", signalled)
    assert call(*args, "--out", tmp_path / "cut", "--log_every", 3) == 128 + number
    assert f"{number.name} after step 5" in capsys.readouterr().err
    assert state_of(tmp_path / "cut")["step"] == 5
    monkeypatch.undo()
    torch.manual_seed(12345)   # what the process drew before has no say
    assert call(*args, "--out", tmp_path / "cut", "--workers", 2) == 0
    assert "at step 5" in capsys.readouterr().out
    same(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))
    assert results_of(tmp_path / "whole") == results_of(tmp_path / "cut")
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)   # it ends the evaluation
    assert call(*args, "--out", tmp_path / "cut", "--seed", 1) == 2
    assert "--seed was 0, is 1" in capsys.readouterr().err


def python(nproc, *args):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, *launch, *map(str, args)], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_train_and_share_the_evaluation(few, tmp_path):
    """They start near the loss of one process, and evaluate as one process does with their checkpoint, though
    each has had batch-norm statistics of its own."""
    args = ["extras/eval_coco.py", *NET, *COCO_SMALL, *SHORT, "--data", few, "--log_every", 1, "--lr", 0.05]
    args.append("--out")
    python(2, *args, tmp_path / "two")
    python(1, *args, tmp_path / "one")
    logs = [[json.loads(line) for line in open(tmp_path / n / "log.jsonl")] for n in ("one", "two")]
    assert [len(log) for log in logs] == [8, 8]
    for k in ("loss_objectness", "loss_classifier", "loss_mask"):
        assert logs[0][0][k] == pytest.approx(logs[1][0][k], rel=0.05)
    two = results_of(tmp_path / "two")
    (tmp_path / "two" / "results.json").unlink()
    assert "at step 8" in python(1, *args, tmp_path / "two")   # has only to evaluate
    assert results_of(tmp_path / "two") == two


@pytest.mark.parametrize("norm", ["all", "frozen"])
def test_several_gpus_share_batch_norm_statistics_and_nothing_else_does(norm, few, monkeypatch):
    monkeypatch.setattr(eval_coco.MaskRCNN, "to", lambda net, *args, **kwargs: net)   # here is no GPU
    cfg = config(few, "--norm", norm)
    for kind, world, shared in (("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)):
        norms = eval_coco.build(cfg, 3, torch.device(kind), world).train().batch_norms()
        assert len(norms) > 8
        for bn in norms:
            assert isinstance(bn, torch.nn.SyncBatchNorm) == shared
            assert bn.training == bn.weight.requires_grad == bn.bias.requires_grad == (norm == "all")


# ----------------------------------------------------------------------------------------- the drawn data set

def test_draw_writes_a_data_set_that_can_be_used(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_coco, "DRAWN", dict(train=6, val=3))
    folder = tmp_path / "new" / "drawn"
    assert call("--draw", folder, "--seed", 3) == 0
    assert f"--data {folder}" in capsys.readouterr().out
    coco = truth(folder, "train")
    images = eval_coco.Images(coco, config(folder), "train")
    assert (len(coco.imgs), len(truth(folder).imgs), len(images)) == (6, 3, 5)   # the first has no object
    assert [images[0, i][2] for i in range(5)] == [-1] * 5
    assert sum(a["iscrowd"] for a in coco.anns.values()) == 1
    for a in coco.anns.values():   # areas and boxes are those of the masks
        mask = coco.annToMask(a)
        x, y, w, h = a["bbox"]
        image = mokd.read_image(f"{folder}/train2017/{coco.imgs[a['image_id']]['file_name']}")
        assert mask.sum() == mask[y:y + h, x:x + w].sum() == a["area"] and mask.shape == image.shape[1:]
        if not a["iscrowd"]:
            inside = image[:, torch.from_numpy(mask) == 1]
            assert (inside == inside[:, :1]).all()   # one color
    assert call("--draw", tmp_path / "again", "--seed", 3) == 0   # the seed decides
    for part in ("train", "val"):
        name = f"annotations/instances_{part}2017.json"
        assert (folder / name).read_text() == (tmp_path / "again" / name).read_text()


def test_draw_never_writes_over_a_data_set(few, capsys):
    before = (few / "annotations" / "instances_val2017.json").read_text()
    assert "annotations cannot be made (File exists); give a new folder" in fails(capsys, 2, "--draw", few)
    assert before == (few / "annotations" / "instances_val2017.json").read_text()


def test_the_three_forms_of_a_mask_are_one():
    square = np.zeros((9, 12), np.uint8)
    square[2:6, 3:8] = 1
    lengths = dict(size=[9, 12], counts=[3 * 9 + 2, *[4, 5] * 4, 4, 12 * 9 - 7 * 9 - 6])
    for form in ([[3, 2, 8, 2, 8, 6, 3, 6]], lengths, rle.encode(np.asfortranarray(square))):
        assert np.array_equal(eval_coco.mask_of(form, 9, 12), square)
    halves = [[3, 2, 5, 2, 5, 6, 3, 6], [5, 2, 8, 2, 8, 6, 5, 6]]   # an object that is hidden in the middle
    assert np.array_equal(eval_coco.mask_of(halves, 9, 12), square)


# ------------------------------------------------------------------------------------------------- evaluation

def truth(data, part="val"):
    return eval_coco.read_annotations(config(data), part)


def as_found(coco):
    """The objects as a detector would report them."""
    return [dict(image_id=a["image_id"], category_id=a["category_id"], score=0.9, bbox=a["bbox"],
                 segmentation=coco.annToRLE(a)) for a in coco.anns.values() if not a["iscrowd"]]


def test_a_perfect_detector_has_ap_100_and_its_errors_cost(few):
    coco = truth(few)
    found = as_found(coco)
    perfect = {name: pytest.approx(100, abs=1e-6) for name in ("AP", "AP50", "AP75")}
    zero = dict(AP=0, AP50=0, AP75=0)
    assert eval_coco.average_precision(coco, found) == dict(box=perfect, mask=perfect)
    assert eval_coco.average_precision(coco, []) == dict(box=zero, mask=zero)
    wrong = {7: 3, 3: 20, 20: 7}
    changed_class = [d | dict(category_id=wrong[d["category_id"]]) for d in found]
    results = eval_coco.average_precision(coco, changed_class)
    assert results["box"]["AP50"] < 5 and results["mask"]["AP50"] < 5
    empty = []
    for d in found:   # boxes right, masks of nothing
        h, w = d["segmentation"]["size"]
        empty.append(d | dict(segmentation=rle.encode(np.zeros((h, w), np.uint8, order="F"))))
    assert eval_coco.average_precision(coco, empty) == dict(box=perfect, mask=zero)
    moved = []
    for d in found:   # an overlap of 0.7 / 1.3
        x, y, w, h = d["bbox"]
        moved.append(d | dict(bbox=[x + 0.3 * w, y, w, h]))
    results = eval_coco.average_precision(coco, moved)
    assert results["box"]["AP50"] == pytest.approx(100) and results["box"]["AP75"] == 0
    assert results["mask"] == perfect


def test_detect_brings_boxes_and_masks_back_to_the_files_pixels(few):
    """A net that knows the truth in pixels of the resized image, with its masks on 14 x 14 cells."""
    cfg, coco = config(few, "--test_size", 150, "--max_size", 170), truth(few)
    images, place = eval_coco.Images(coco, cfg, "val"), itertools.count()

    def knows(x):
        info, (image,) = coco.dataset["images"][next(place)], x
        assert max(image.shape) <= 170 and (min(image.shape[1:]) == 150 or max(image.shape[1:]) == 170)
        boxes, labels, masks = [], [], [torch.zeros(0, 1, 14, 14)]
        for a in coco.imgToAnns[info["id"]]:
            if not a["iscrowd"]:
                x, y, w, h = a["bbox"]
                boxes.append([x, y, x + w, y + h])
                labels.append(1 + sorted(coco.cats).index(a["category_id"]))
                cut = torch.from_numpy(coco.annToMask(a)[y:y + h, x:x + w])[None, None].float()
                masks.append(F.interpolate(cut, (14, 14), mode="area"))
        scale = torch.tensor([image.shape[2] / info["width"], image.shape[1] / info["height"]] * 2)
        boxes = torch.tensor(boxes, dtype=torch.float).view(-1, 4) * scale
        return [dict(boxes=boxes, labels=torch.tensor(labels).long(), scores=torch.ones(len(boxes)),
                     masks=torch.cat(masks))]
    results = eval_coco.average_precision(coco, eval_coco.detect(knows, images, cfg, torch.device("cpu")))
    assert results["box"]["AP"] == pytest.approx(100)
    assert results["mask"]["AP75"] == pytest.approx(100) and results["mask"]["AP"] > 95   # torchvision's: 80


def shapes_of(side, n=45):
    """Yields masks (180, 180) of objects of about this size, with edges between pixels, and their boxes."""
    g = np.random.default_rng(0)
    for (_, corners), _ in zip(itertools.cycle(eval_coco.SHAPES.values()), range(n)):
        corners = corners * g.uniform(0.8, 1.2, 2) * side + g.uniform(2, 10, 2)
        mask = eval_coco.mask_of([corners.flatten().tolist()], 180, 180)
        yield mask, torch.tensor([*corners.min(0), *corners.max(0)], dtype=torch.float)


@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_a_perfect_mask_head_has_an_overlap_of_99_percent_at_any_size(side):
    """Targets as predictions. With torchvision's own cutting and pasting it is 0.88, 0.95, 0.97, 0.98."""
    overlaps = []
    for mask, box in shapes_of(side):
        target = eval_coco.mask_targets(mask[None], box[None], torch.tensor([0]))
        pasted = eval_coco.paste_mask(target, box.tolist(), mask.shape)
        assert pasted.shape == mask.shape and pasted.dtype == torch.uint8
        overlaps.append(float((pasted & mask).sum() / (pasted | mask).sum()))
    assert np.mean(overlaps) > 0.985 and min(overlaps) > 0.95


def test_mask_targets_and_pasting_by_hand():
    """A box of 14 x 14 pixels has a cell for each pixel: nothing is blurred or moved, also at an edge."""
    masks = (torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.uint8)
    for x, y in ((3, 5), (0, 0), (16, 6)):
        box = [x, y, x + 14, y + 14]
        cells = eval_coco.mask_targets(masks, torch.tensor([box, box]).float(), torch.tensor([1, 0]))
        assert torch.allclose(cells, masks[[1, 0], y:y + 14, x:x + 14].float(), atol=1e-5)
        pasted = eval_coco.paste_mask(cells[:1], [float(c) for c in box], (20, 30))
        only = torch.zeros(20, 30, dtype=torch.uint8)
        only[y:y + 14, x:x + 14] = masks[1, y:y + 14, x:x + 14]
        assert torch.equal(pasted, only)
    # A full box that is not of whole pixels covers exactly the pixels whose centers it holds.
    full = eval_coco.paste_mask(torch.ones(1, 14, 14), [2.4, 3.6, 8.6, 9.4], (20, 30))
    assert full.sum() == full[4:9, 2:9].sum() == 5 * 7
    empty = eval_coco.paste_mask(torch.ones(1, 14, 14), [30.0, 3.0, 30.0, 9.0], (20, 30))
    assert empty.sum() == 0


# ------------------------------------------------------------------------------------------------------- data

def test_a_training_image_carries_its_objects(few):
    """Masks, boxes and pixels agree, flipped or not; crowds and images without objects are left out."""
    cfg, coco = config(few), truth(few, "train")
    images = eval_coco.Images(coco, cfg, "train")
    assert len(images) == 13 and len(eval_coco.Images(truth(few), cfg, "val")) == 5
    objects = [a for a in coco.anns.values() if not a["iscrowd"]]
    assert sum(len(images[0, i][1]["labels"]) for i in range(13)) == len(objects)
    sides, flips = set(), set()
    for epoch, i in itertools.product(range(4), range(13)):
        image, t, bad, reason = images[epoch, i]
        h, w = t["size"]
        sides.add(min(image.shape[1:]))
        assert (bad, reason) == (-1, "") and image.dtype == torch.uint8 and t["masks"].shape[1:] == (h, w)
        assert torch.allclose(t["scale"], torch.tensor([image.shape[2] / w, image.shape[1] / h] * 2))
        mine = [a for a in coco.imgToAnns[t["id"]] if not a["iscrowd"]]
        assert t["labels"].tolist() == [{3: 1, 7: 2, 20: 3}[a["category_id"]] for a in mine]
        assert t["masks"].flatten(1).sum(1).tolist() == [a["area"] for a in mine]
        small = F.interpolate(image[None].float(), (h, w), mode="bilinear", antialias=True)[0]
        file = mokd.read_image(f"{few}/train2017/{coco.imgs[t['id']]['file_name']}").float()
        flip = bool((small.flip(-1) - file).abs().mean() < (small - file).abs().mean())
        flips.add(flip)
        for box, mask, a in zip(t["boxes"] / t["scale"], t["masks"], mine):
            rows, columns = torch.where(mask)
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert torch.allclose(box, torch.stack(around).float(), atol=1e-3)
            there = torch.from_numpy(coco.annToMask(a))
            assert torch.equal(mask, there.flip(-1) if flip else there)
            inside = small[:, mask.bool()]
            assert (inside.median(1).values - file[:, there.bool()].median(1).values).abs().max() < 25
    assert flips == {False, True} and min(sides) >= 72 and max(sides) <= 96 and len(sides) > 10
    again = images[2, 5]
    torch.manual_seed(99)
    assert torch.equal(again[0], images[2, 5][0]) and torch.equal(again[1]["boxes"], images[2, 5][1]["boxes"])


# --------------------------------------------------------------------------------------------------- detector

@pytest.mark.parametrize("arch, widths", [("resnet18", (256, 512)), ("resnet50", (1024, 2048))])
def test_strides_and_shapes_are_those_of_c4(arch, widths):
    cfg = eval_coco.parse(["--arch", arch, "--proposals", "8", "8", "--samples", "8", "8"])
    net = detector(cfg, 80).eval()
    shapes = {}

    def keep_first(name):
        def hook(module, x, y):
            shapes.setdefault(name, y)
        return hook
    for name, module in dict(trunk=net.trunk, stage4=net.stage4, rpn=net.rpn.head, pool=net.pool).items():
        module.register_forward_hook(keep_first(name))
    boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0], [16.0, 16.0, 96.0, 128.0]])
    anchors = net.rpn.anchor_generator
    with torch.no_grad():
        found = net([torch.randint(256, (3, 100, 150), dtype=torch.uint8),
                     torch.randint(256, (3, 128, 64), dtype=torch.uint8)])
        map_ = torch.arange(24.0).view(1, 1, 4, 6)
        pooled = net.pool(map_, [boxes])
    assert shapes["trunk"].shape == (2, widths[0], 8, 10)   # of 128 x 160 pixels: stride 16
    assert shapes["pool"].shape[1:] == (widths[0], 14, 14) and shapes["stage4"].shape[1:] == (widths[1], 7, 7)
    (objectness,), (shifts,) = shapes["rpn"]
    assert objectness.shape == (2, 15, 8, 10) and shifts.shape == (2, 60, 8, 10)
    cells = anchors.cell_anchors[0]
    sides = (cells[:, 2:] - cells[:, :2]).prod(1).sqrt().view(3, 5)   # rounded to whole pixels
    assert torch.allclose(sides, torch.tensor([32.0, 64, 128, 256, 512]).expand(3, 5), rtol=0.02)
    assert net.roi.box_predictor.cls_score.out_features == 81
    assert net.roi.box_predictor.bbox_pred.out_features == 324
    assert net.roi.mask_predictor(torch.zeros(2, widths[1], 7, 7)).shape == (2, 81, 14, 14)
    assert [set(f) for f in found] == [{"boxes", "scores", "labels", "masks"}] * 2
    # Column c of the 14 x 14 is centered at pixel x1 + (c + 0.5) * width / 14, j of the map at 16 * j + 8.
    x = ((torch.arange(14) + 0.5) * 80 / 14 + 16) / 16 - 0.5
    y = ((torch.arange(14) + 0.5) * 112 / 14 + 16) / 16 - 0.5
    inside = (x[None] <= 5) & (y[:, None] <= 3)
    assert torch.allclose(pooled[1, 0][inside], (6 * y[:, None] + x[None])[inside], atol=1e-4)
    first = net.stage4[0]   # its stride is not in the 1 x 1, as in torchvision's and timm's
    assert (first.conv2 if arch == "resnet50" else first.conv1).stride == (2, 2)


def test_stage_4_runs_once_in_training_and_twice_in_test(few):
    cfg = config(few)
    net, calls = detector(cfg), []
    net.stage4.register_forward_hook(lambda m, x, y: calls.append(len(x[0])))
    x, targets = batch_of(eval_coco.Images(truth(few, "train"), cfg, "train"))
    losses = net.train()(x, targets)
    assert len(calls) == 1 and calls[0] <= 4 * 16
    assert len(losses) == 5 and all(name.startswith("loss_") for name in losses)
    net.eval()(x)
    assert len(calls) == 3


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_first_weights_are_detectron2s(arch, few):
    """Mask logits near 0 say 0.5 of each cell, and the loss of that is ln 2; torchvision's is 2."""
    cfg = config(few, "--arch", arch)
    cfg.model_kwargs = {}
    net = detector(cfg, 80).train()
    box, mask = net.roi.box_predictor, net.roi.mask_predictor
    for layer, std in ((box.cls_score, 0.01), (box.bbox_pred, 0.001), (mask.mask_fcn_logits, 0.001)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05) and (layer.bias == 0).all()
    assert (mask.conv5_mask.bias == 0).all()
    losses = net(*batch_of(eval_coco.Images(truth(few, "train"), cfg, "train")))
    assert losses["loss_mask"].item() == pytest.approx(math.log(2), abs=0.01)


@pytest.mark.parametrize("norm", ["all", "frozen"])
def test_frozen_stands_where_detectron2s_does(norm, few):
    """Batch norms keep weights and statistics, and stem and stage 1 keep their convolutions, too."""
    cfg = config(few, "--norm", norm)
    net = detector(cfg).train()
    before = copy.deepcopy(net.state_dict())
    for step in range(2):
        losses = net(*batch_of(eval_coco.Images(truth(few, "train"), cfg, "train")))
        sum(losses.values()).backward()
        with torch.no_grad():
            for p in net.parameters():
                if p.requires_grad:
                    p -= 0.01 * p.grad
    still = {name for name, v in net.state_dict().items() if torch.equal(v, before[name])}
    norms = set()
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            norms |= {f"{name}.{k}" for k in module.state_dict()}
    early = {name for name in before if name.startswith(("trunk.conv1.", "trunk.layer1."))}
    assert len(norms) == 5 * 13 and len(early - norms) == 4   # the 4 are convolutions
    assert still == {"all": set(), "frozen": norms | early}[norm]


def test_masks_are_learned_in_the_files_pixels(few, monkeypatch):
    """The regions on objects, brought to the file's pixels, are compared with masks of that size."""
    cfg, seen = config(few, "--train_size", 140, 140, "--max_size", 300), []
    cut = eval_coco.mask_targets

    def watched(*args):
        seen.append(args)
        return cut(*args)
    monkeypatch.setattr(eval_coco, "mask_targets", watched)
    x, targets = batch_of(eval_coco.Images(truth(few, "train"), cfg, "train"))
    detector(cfg).train()(x, targets)
    assert len(seen) == len(targets)
    for (masks, boxes, matches), t in zip(seen, targets):
        assert torch.equal(masks, t["masks"])
        assert boxes[:, [0, 2]].max() <= masks.shape[2] + 1e-3
        assert boxes[:, [1, 3]].max() <= masks.shape[1] + 1e-3
        own = t["boxes"] / t["scale"]
        overlap = torchvision.ops.box_iou(boxes, own)[range(len(boxes)), matches]
        assert (overlap >= 0.5 - 1e-3).all() and (overlap > 0.999).any()   # an object's own box is there


def test_the_mask_loss_is_that_of_the_own_label(few):
    """Against a loop over regions: logits of the object's label alone count, and all regions count alike."""
    images = eval_coco.Images(truth(few, "train"), config(few), "train")
    targets = batch_of(images, n=3)[1]
    g = torch.Generator().manual_seed(0)
    boxes, matches, count = [], [], 0
    for t in targets:
        m = torch.arange(len(t["boxes"])).repeat(2)
        boxes.append(t["boxes"][m] + torch.rand(len(m), 4, generator=g))
        matches.append(m)
        count += len(m)
    logits = torch.randn(count, 4, 14, 14, generator=g, requires_grad=True)
    loss, rows = eval_coco.mask_loss(logits, boxes, matches, targets), iter(logits)
    by_hand = []
    for b, m, t in zip(boxes, matches, targets):
        for box, k in zip(b, m):
            p = next(rows)[t["labels"][k]].sigmoid()
            box = (box / t["scale"])[None]
            wanted = eval_coco.mask_targets(t["masks"][k:k + 1], box, torch.tensor([0]))[0]
            by_hand.append(-(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean())
    assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-4)


def test_an_image_without_objects_gives_losses_and_every_gradient(few):
    """Also a whole batch of them; with a missing gradient two processes would wait for each other."""
    cfg = config(few)
    net = detector(cfg).train()
    (image,), (target,) = batch_of(eval_coco.Images(truth(few, "train"), cfg, "train"), n=1)
    empty = {name: value if name == "scale" else value[:0] for name, value in target.items()}
    losses = net([image, image], [empty, empty])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == losses["loss_box_reg"] == 0
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_bf16_keeps_boxes_exact_and_losses_near(few):
    cfg = config(few)
    net = detector(cfg).train()
    x, targets = batch_of(eval_coco.Images(truth(few, "train"), cfg, "train"))
    inputs, losses = [], {}
    net.pool.register_forward_hook(lambda m, a, y: inputs.append(a))
    for dtype in ("fp32", "bf16"):
        torch.manual_seed(0)
        with mokd.autocast(torch.device("cpu"), dtype):
            losses[dtype] = {k: v.detach() for k, v in net(x, targets).items()}
    for features, regions in inputs:
        assert features.dtype == torch.float and all(r.dtype == torch.float for r in regions)
    corners = torch.cat(inputs[1][1]).flatten()
    assert (corners != corners.bfloat16().float()).float().mean() > 0.3   # not on the grid of 8 bits
    for k, v in losses["fp32"].items():
        assert losses["bf16"][k].dtype == torch.float
        assert losses["bf16"][k].item() == pytest.approx(v.item(), rel=0.15, abs=0.02), k
    with mokd.autocast(torch.device("cpu"), "bf16"), torch.no_grad():
        found, = net.eval()(x[:1])
    assert all(found[k].dtype == torch.float for k in ("boxes", "scores", "masks"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint of mokd.py whose four nets, statistics included, all differ."""
    out = tmp_path_factory.mktemp("run")
    cfg = mokd.parse_args((
        "--arch1 resnet18 --model_kwargs1 channels=16,32,64,64 layers=1,1,1,1 --arch2 vit_tiny "
        "--model_kwargs2 img_size=32 patch_size=8 embed_dim=24 depth=2 num_heads=2 --data toy --out_dim 32 "
        "--hidden_dim 16 --bottleneck_dim 8 --t_dim 24 --t_heads 2 --t_depth 1 --global_size 32 "
        "--local_size 16 --batch_size 8 "
        f"--out {out}").split())
    models = mokd.build_models(cfg, torch.device("cpu"))
    for i, net in enumerate((models[0].net, models[0].momentum_net)):
        for name, b in net.named_buffers():
            if "running" in name:
                b.uniform_(0.5 + i, 1.5 + i)
    with torch.no_grad():
        for p in models[0].net.parameters():
            p += 0.01 * torch.randn_like(p)
    mokd.save(cfg, models, 1, torch.amp.GradScaler("cpu", enabled=False), n_images=8)
    return out


def test_the_checkpoints_weights_arrive_in_trunk_and_stage_4(pretrained, few, monkeypatch):
    saved = torch.load(pretrained / "checkpoint.pth", weights_only=True)["model1"]
    model1 = torch.load(pretrained / "model1.pth", weights_only=True)

    def arrived(net, weights):
        """Each tensor of the ResNet, statistics included, is in the detector."""
        own, place = net.state_dict(), {}
        for name in weights:
            place[name] = name.replace("layer4.", "stage4.") if name.startswith("layer4") else f"trunk.{name}"
            assert torch.equal(own[place[name]], weights[name]), name
        assert {k for k in own if k.startswith(("trunk.", "stage4."))} == {*place.values()}

    def backbone_of(net):
        prefix = "backbone.model."
        return {k.removeprefix(prefix): v for k, v in saved[net].items() if k.startswith(prefix)}

    def build(*args):
        return detector(eval_coco.parse([*map(str, args)]))
    source = ["--checkpoint", pretrained / "checkpoint.pth", *COCO_SMALL, "--data", few]
    student, momentum = backbone_of("net"), backbone_of("momentum_net")
    arrived(build(*source), momentum)
    arrived(build(*source, "--net", "student"), student)
    assert not torch.equal(student["layer4.0.conv1.weight"], momentum["layer4.0.conv1.weight"])
    arrived(build(*NET, "--weights", pretrained / "model1.pth"), model1)
    random = build(*NET).state_dict()
    assert not torch.equal(random["stage4.0.conv1.weight"], momentum["layer4.0.conv1.weight"])
    create = timm.create_model

    def offline(name, pretrained=False, **kwargs):   # weights that want images normalized by other numbers
        model = create(name, **kwargs)
        if pretrained:
            model.load_state_dict(model1)
            model.pretrained_cfg = model.pretrained_cfg | dict(mean=(0.5,) * 3, std=(0.5,) * 3)
        return model
    monkeypatch.setattr(timm, "create_model", offline)
    net = build(*NET, "--pretrained")
    arrived(net, model1)
    x = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    batch = net.batch([x, x[:, :30, :20]])
    assert batch.tensors.shape == (2, 3, 64, 64) and batch.image_sizes == [(40, 50), (30, 20)]
    assert torch.allclose(batch.tensors[0, :, :40, :50], (x / 255 - 0.5) / 0.5, atol=1e-5)
    assert (batch.tensors[1, :, 30:] == 0).all()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    plain = build(*NET).batch([x]).tensors[0, :, :40, :50]
    assert torch.allclose(plain, (x / 255 - mean) / std, atol=1e-5)


def test_the_schedule_is_a5s():
    cfg = eval_coco.parse(["--arch", "resnet34"])
    assert (cfg.iterations, cfg.batch_size, cfg.train_size, cfg.test_size) == (180000, 16, (600, 800), 800)
    rates = {0: 2e-5, 500: 0.01001, 1000: 0.02, 119999: 0.02, 120000: 0.002, 159999: 0.002, 160000: 2e-4}
    for step, rate in rates.items():
        assert eval_coco.learning_rate(cfg, step) == pytest.approx(rate)
    assert eval_coco.learning_rate(dataclasses.replace(cfg, batch_size=8), 5000) == 0.01
    assert eval_coco.learning_rate(dataclasses.replace(cfg, warmup=0), 0) == 0.02


def test_weight_decay_and_every_size_reach_their_places(few, tmp_path, monkeypatch):
    made = []
    sgd = torch.optim.SGD

    def watched(groups, **options):
        made.append((groups, options))
        return sgd(groups, **options)
    monkeypatch.setattr(torch.optim, "SGD", watched)
    cfg = config(few, *SHORT, "--iterations", 1, "--weight_decay", 0.3, "--norm", "frozen", "--out", tmp_path)
    eval_coco.run(cfg)
    (decayed, spared), options = made[0]
    assert decayed["weight_decay"] == 0.3 and spared["weight_decay"] == 0 and options["momentum"] == 0.9
    assert all(p.dim() > 1 for p in decayed["params"]) and all(p.dim() < 2 for p in spared["params"])
    net = detector(config(few, "--anchors", 10, 20, "--samples", 11, 12, "--proposals", 13, 14))
    assert net.rpn.anchor_generator.sizes == ((10, 20),) and net.rpn.head.cls_logits.out_channels == 6
    assert net.rpn.fg_bg_sampler.batch_size_per_image == 11
    assert net.roi.fg_bg_sampler.batch_size_per_image == 12
    assert net.train().rpn.post_nms_top_n() == 13 and net.eval().rpn.post_nms_top_n() == 14


# -------------------------------------------------------------------------------------------- what goes wrong

def fails(capsys, code, *args):
    """-> the sentence with which the program ends."""
    assert call(*args) == code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("extras/eval_coco.py: ")
    return message


@pytest.mark.parametrize("args, words", [
    ("", "--checkpoint FILE or --arch"),
    ("--arch resnet18 --checkpoint x", "either --checkpoint"),
    ("--checkpoint HERE --weights x", "--weights"),
    ("--checkpoint HERE --model 2", "--model 2 vit_tiny"),
    ("--arch vit_tiny", "--arch vit_tiny"),
    ("--arch efficientnet_b0", "strides 4, 8, 16 and 32"),
    ("--arch resnet99", "resnet99"),
    ("--arch resnet18 --model_kwargs output_stride=16", "strides 4, 8, 16 and 32"),
    ("--arch resnet34 --weights MODEL", "does not fit resnet34"),
    ("--arch resnet18 --train_size 800 600", "--train_size"),
    ("--arch resnet18 --samples 0 1", "--samples 0"),
    ("--arch resnet18 --batch_size 99", "only 13 images"),
    ("--arch resnet18 --data nowhere", "nowhere"),
    ("--arch resnet18 --out /dev/null/x", "/dev/null/x")])
def test_what_eval_coco_cannot_do_is_said(args, words, few, pretrained, tmp_path, capsys):
    files = {"HERE": pretrained / "checkpoint.pth", "MODEL": pretrained / "model1.pth"}
    given = [files.get(word, word) for word in args.split()]
    defaults = {"--workers": 0, "--data": few, "--out": tmp_path / "o", "--batch_size": 2}
    assert words in fails(capsys, 2, *itertools.chain(*defaults.items()), *given)   # the last of two counts


def changed(few, to, change, part="train"):
    """A copy of a data set after change(content of its annotations)."""
    shutil.copytree(few, to)
    file = to / "annotations" / f"instances_{part}2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return to


@pytest.mark.parametrize("change, words", [
    (lambda c: c["annotations"][3].update(category_id=99), "category 99"),
    (lambda c: c["annotations"][3].update(image_id=5), "image 5"),
    (lambda c: c["annotations"][3].update(bbox=[1, 2, 3]), "instances_train2017.json"),
    (lambda c: c.pop("categories"), "COCO's format"),
    (lambda c: c["annotations"][3].pop("iscrowd"), "iscrowd"),
    (lambda c: c["images"][3].pop("width"), "width"),
    (lambda c: c["categories"].append(dict(id=21, name="star")), "other categories"),
    (lambda c: c["images"][0].update(file_name="gone.png"), "gone.png")])
def test_annotations_that_are_not_coco_s_are_named(change, words, few, tmp_path, capsys):
    data = changed(few, tmp_path / "data", change)
    assert words in fails(capsys, 2, *NET, *COCO_SMALL, "--data", data, "--out", tmp_path / "o")


def test_a_damaged_or_missing_file_of_annotations_is_named(few, tmp_path, capsys):
    data = changed(few, tmp_path / "data", lambda content: None)
    args = [*NET, *COCO_SMALL, "--data", data, "--out", tmp_path / "o"]
    file = data / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text()[:1000])
    assert "instances_val2017.json is not in COCO's format" in fails(capsys, 2, *args)
    file.unlink()
    assert "instances_val2017.json cannot be read" in fails(capsys, 2, *args)


def test_degenerate_boxes_are_left_out(few, tmp_path):
    def change(content):
        objects = [a for a in content["annotations"] if not a["iscrowd"]]
        for a, box in zip(objects, ([5, 5, 0, 9], [500, 5, 9, 9], [-30, 5, 20, 9], [math.nan, 5, 20, 9])):
            a["bbox"] = box

    def count(folder):
        images = eval_coco.Images(truth(folder, "train"), config(folder), "train")
        return sum(len(images[0, i][1]["labels"]) for i in range(len(images)))
    data = changed(few, tmp_path / "data", change)
    assert count(data) == count(few) - 4


def test_images_that_cannot_be_read_are_named_and_too_many_stop_the_run(few, tmp_path, capsys):
    def change(content):
        content["annotations"][-1]["segmentation"] = "what?"
    data = changed(few, tmp_path / "data", change)
    (data / "train2017" / "train4.png").write_bytes(b"no image")
    Image.new("RGB", (30, 20)).save(data / "train2017" / "train6.png")
    images = eval_coco.Images(truth(data, "train"), config(data), "train")
    reasons = {images[0, i][2]: images[0, i][3] for i in range(13)}
    # The first image has no object and is left out, so train4.png is number 3.
    assert reasons.keys() == {-1, 3, 5, 12} and reasons[-1] == ""
    assert "train4.png" in reasons[3] and "train13.png" in reasons[12]
    assert "train6.png" in reasons[5] and "30 x 20 pixels where" in reasons[5]
    image, target, _, _ = images[0, 3]
    assert (image == 0).all() and len(target["boxes"]) == len(target["masks"]) == 0
    assert call(*NET, *COCO_SMALL, *SHORT, "--data", data, "--out", tmp_path / "o") == 1
    message = capsys.readouterr().err
    assert "of 13 images cannot be read, more than 1 %" in message
    assert any(reasons[i] in message for i in (3, 5, 12))


def test_an_unreadable_test_image_is_named_and_stops_the_evaluation(few, tmp_path, capsys):
    data = changed(few, tmp_path / "data", lambda content: None)
    (data / "val2017" / "val3.png").write_bytes(b"no image")
    args = [*NET, *COCO_SMALL, *SHORT, "--data", data, "--out", tmp_path / "o", "--iterations", 1]
    message = fails(capsys, 1, *args)
    assert "val3.png" in message and "AP counts all test images" in message
    assert state_of(tmp_path / "o")["step"] == 1   # training was not for nothing


@pytest.mark.parametrize("every, words", [(2, "step 5: loss"), (1, "step 4: weights not finite")])
def test_what_is_not_finite_stops_the_run_and_is_not_saved(every, words, few, tmp_path, capsys, monkeypatch):
    args = [*NET, *COCO_SMALL, *SHORT, "--data", few, "--out", tmp_path, "--save_every", every]
    args += ["--log_every", 100]
    rate = eval_coco.learning_rate

    def exploding(cfg, step):
        return 1e30 if step >= 4 else rate(cfg, step)
    monkeypatch.setattr(eval_coco, "learning_rate", exploding)
    message = fails(capsys, 1, *args)
    assert words in message and "not finite" in message and "--lr" in message
    state = state_of(tmp_path)
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["net"].values())


def test_missing_pycocotools_is_said(few, monkeypatch, capsys):
    monkeypatch.setattr(eval_coco, "rle", None)
    assert "pip install -r extras/requirements.txt" in fails(capsys, 2, *NET, "--data", few)
    code = ("import sys; sys.modules['pycocotools'] = None; sys.path.insert(0, 'extras'); "
            "import mokd, eval_coco; mokd.main(['--arch', 'resnet18'], 'x', "
            "eval_coco.parse, eval_coco.run)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "x: pycocotools is missing: pip install -r extras/requirements.txt"


def test_coco_help_names_every_setting_with_its_source():
    text = " ".join(python(1, "extras/eval_coco.py", "--help").split())
    for f in dataclasses.fields(eval_coco.Config):
        assert f"--{f.name} " in text
    for source in ("A.5", "Table 6", "MoCo", "detectron2"):
        assert source in text
    assert "frozen: none is, nor are the weights of stem and stage 1 [detectron2]" in text
    assert "SEED" not in text and "DisCo" not in text   # what they do with batch norm is not known
