"""Tests of extras/figures.py, on checkpoints of two small runs. Distances are compared with slow loops over weights that timm's
own modules compute, with the mean distance of a grid counted by offsets, and with attention that is known beforehand.

    python -m pytest -q extras/test_figures.py
"""
import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import figures   # puts the repository on the path
import eval_knn
import mokd
from test_mokd import PAIR, SMALL, VIT

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def draw(*args, code=0):
    """A figure by its command line, in this process."""
    assert mokd.main([*map(str, args)], "extras/figures.py", figures.parse, figures.run) == code


def numbers(out):
    """What a figure wrote, all three files there -> the numbers."""
    assert open(f"{out}.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n" and open(f"{out}.pdf", "rb").read(5) == b"%PDF-"
    with Image.open(f"{out}.png") as image:
        assert min(image.size) > 200
    return dict(np.load(f"{out}.npz"))


def refused(args, capsys, code=2):
    """-> the sentence with which a figure ends, without a traceback."""
    draw(*args, code=code)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("extras/figures.py: ")
    return message


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a MOKD run and an independent run of the same pair on toy."""
    out, toy = tmp_path_factory.mktemp("runs"), mokd.get_data
    with pytest.MonkeyPatch.context() as patch:   # eight steps, on 64 images of it
        patch.setattr(mokd, "get_data", lambda cfg: [torch.utils.data.Subset(part, range(64)) for part in toy(cfg)])
        for name, losses in (("mokd", "sm,cm,st,ct"), ("independent", "sm")):
            assert mokd.main([*SMALL, *PAIR, "--log_every", "2", "--knn_every", "1" if name == "mokd" else "0",
                              "--losses", losses, "--out", str(out / name)]) == 0
    return out


@pytest.fixture
def both(runs):
    return ["--checkpoint", runs / "independent" / "checkpoint.pth", runs / "mokd" / "checkpoint.pth", "--workers", 0]


def mean_of_grid(h, w, size):
    """Mean distance of two points of a grid drawn alike: an offset (dy, dx) occurs (h - |dy|) (w - |dx|) times."""
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


# ---------------------------------------------------------------------------------------------------------- distances

@pytest.mark.parametrize("h, w, size", [(4, 4, 32), (3, 5, 30), (7, 2, 14), (1, 1, 9)])
def test_uniform_attention_reaches_the_mean_distance_of_the_grid_and_identity_nothing(h, w, size):
    apart, N = figures.distances(h, w, size), h * w
    uniform = figures.mean_distance(torch.full((2, N, N), 1 / N), apart)
    assert uniform.tolist() == pytest.approx([mean_of_grid(h, w, size)] * 2, rel=1e-5)
    assert figures.mean_distance(torch.eye(N), apart) == 0
    assert torch.allclose(figures.distances(h, w, size, None, torch.arange(N)[1:]), apart[1:])
    attention = torch.rand(2, 3, N, N).softmax(-1)
    assert torch.allclose(figures.mean_distance(attention, apart).double(), slow_distance(attention, h, w, size), atol=1e-5)


def vit_arguments(folder, change, *more):
    """The command line of a small ViT whose weights `change` has changed."""
    kwargs = [*VIT, *more]
    cfg = eval_knn.parse(["--arch", "vit_tiny", "--model_kwargs", *kwargs, "--data", "toy", "--image_size", "32"])
    model = eval_knn.load_backbones(cfg)["vit_tiny"].model
    with torch.no_grad():
        change(model)
    torch.save(model.state_dict(), folder / "weights.pth")
    return model, ["--arch", "vit_tiny", "--model_kwargs", *kwargs, "--weights", folder / "weights.pth", "--data", "toy",
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
    draw("attention", *args, "--images", 9, "--batch_size", 4)
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
    assert np.abs(found[f"{key}/distance"] - mean_of_grid(4, 4, 32)).max() > 0.4   # not uniform
    assert [*found[f"{key}/names"]] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("size, side", [(32, 4), (48, 6)])
def test_attention_that_is_known_has_its_distance_in_pixels(size, side, tmp_path):
    def uniform(model):
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
    _, args = vit_arguments(tmp_path, uniform)
    draw("attention", *args, "--images", 2, "--image_size", size)
    found = numbers(tmp_path / "figure")
    for name in ("distance", "uniform"):
        assert np.allclose(found[f"vit_tiny/vit_tiny/{name}"], mean_of_grid(side, side, size), rtol=1e-5)

    def identity(model):   # each patch has a direction of its own, and looks for it
        model.pos_embed.zero_()
        model.pos_embed[0, 1:, :16] = 1000 * torch.eye(16)
        for block in model.blocks:
            block.attn.qkv.weight[:48] = 10 * torch.eye(24).repeat(2, 1)
    _, args = vit_arguments(tmp_path, identity, "num_heads=1")
    draw("attention", *args, "--images", 2)
    found = numbers(tmp_path / "figure")
    assert np.abs(found["vit_tiny/vit_tiny/distance"]).max() < 1e-4


def test_attention_that_does_more_than_softmax_is_not_shown():
    attention, x = timm.models.vision_transformer.Attention(8, 2), torch.randn(2, 5, 8)
    y = attention(x)
    assert figures.attention_of(attention, x, y, 1).shape == (2, 2, 4, 4)
    with pytest.raises(mokd.Stop, match="more than softmax"):
        figures.attention_of(attention, x, 1.01 * y, 1)


def test_attention_in_windows_is_not_shown(tmp_path, capsys):
    for arch, kwargs, words in (
            ("swin_tiny_patch4_window7_224", SWIN, "no such layers"), ("mobilevit_xxs", [], "not between all")):
        more = ["--model_kwargs", *kwargs] if kwargs else []
        draw("attention", "--arch", arch, *more, "--data", "toy", "--image_size", 64, "--workers", 0, "--images", 2, "--out",
             tmp_path / "a", code=2)
        errors = capsys.readouterr().err
        assert f"skipped {arch}" in errors and words in errors and "no model is left; give --checkpoint" in errors


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
    draw("featuremap", *both, "--images", 3, "--batch_size", 2, "--out", tmp_path / "f.png")
    assert "skipped 2 vit_tiny of mokd: its stages give tokens" in capsys.readouterr().err
    found = numbers(tmp_path / "f")
    model = timm.create_model("resnet18", features_only=True, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
    model.load_state_dict(torch.load(runs / "mokd" / "model1.pth", weights_only=True), strict=False)
    with torch.no_grad():
        maps = model.eval()(center_crops(torch.randperm(1024, generator=mokd.generator(0, "images"))[:3]))
    assert [*found["mokd/1 resnet18/names"]] == ["act1", "layer1", "layer2", "layer3", "layer4"]
    expected = np.array([[naive_map_distance(Z, 32) for Z in Zs] for Zs in maps])
    assert np.allclose(found["mokd/1 resnet18/distance"][:, 0], expected.mean(1), rtol=1e-4)
    assert np.allclose(found["mokd/1 resnet18/deviation"][:, 0], expected.std(1), rtol=1e-2, atol=1e-4)
    assert np.allclose(found["mokd/1 resnet18/uniform"], [mean_of_grid(s, s, 32) for s in (16, 8, 4, 2, 1)], rtol=1e-5)
    assert not np.allclose(found["independent/1 resnet18/distance"], found["mokd/1 resnet18/distance"], rtol=1e-4)
    assert not any("vit" in key for key in found)


def test_featuremap_of_known_maps_and_of_maps_in_parts():
    Z = torch.randn(3, 45, 30, generator=torch.Generator().manual_seed(0))   # 1350 positions, more than one part
    f = Z.flatten(1).T.double()
    weights, n = (f @ f.T / math.sqrt(3)).softmax(-1), torch.arange(1350)
    apart = ((n[:, None] // 30 - n // 30) * 60 / 45).square() + ((n[:, None] % 30 - n % 30) * 60 / 30).square()
    expected = [(weights * apart.sqrt()).sum().item() / 1350, mean_of_grid(45, 30, 60)]
    assert figures.of_map(Z, 60).tolist() == pytest.approx(expected, rel=1e-4)
    alike, unlike = torch.ones(5, 4, 6), 100 * torch.eye(12).view(12, 3, 4)
    assert figures.of_map(alike, 24).tolist() == pytest.approx([mean_of_grid(4, 6, 24)] * 2)
    assert figures.of_map(unlike, 24)[0] < 1e-6


@pytest.mark.parametrize("arch, kwargs", [("efficientnet_b0", []), ("mobilenetv3_small_050", []), ("convnext_atto", []),
                                          ("swin_tiny_patch4_window7_224", SWIN)])
def test_featuremap_reads_the_stages_of_any_cnn(arch, kwargs, tmp_path):
    more = ["--model_kwargs", *kwargs] if kwargs else []
    args = ["--arch", arch, *more, "--data", "toy", "--image_size", 64, "--workers", 0]
    draw("featuremap", *args, "--images", 2, "--out", tmp_path / "f")
    found = numbers(tmp_path / "f")
    model = eval_knn.load_backbones(eval_knn.parse([*map(str, args)]))[arch].model
    with torch.no_grad():   # by another way than hooks
        maps = model.forward_intermediates(center_crops(torch.randperm(1024, generator=mokd.generator(0, "images"))[:2], 64),
                                           intermediates_only=True)
    assert len(maps) >= len(found[f"{arch}/{arch}/distance"]) >= 4   # timm 1.0.9 counts a stem more
    expected = [np.mean([naive_map_distance(Z, 64) for Z in Zs]) for Zs in maps[-4:] if Zs.shape[-1] <= 16]
    assert len(expected) >= 3 and np.allclose(found[f"{arch}/{arch}/distance"][-len(expected):, 0], expected, rtol=1e-3)


def test_an_unreadable_image_is_left_out_and_a_folder_without_validation_will_do(tmp_path, capsys):
    x, _ = mokd.draw_toy(8, "val")
    _, args = vit_arguments(tmp_path, sharpen)
    found = []
    for name in ("all", "more"):
        (tmp_path / name / "a").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(x[i].permute(1, 2, 0).numpy()).save(tmp_path / name / "a" / f"{i}.png")
        if name == "more":
            (tmp_path / name / "a" / "broken.png").write_bytes(b"no image")
        draw("attention", *args, "--data", tmp_path / name)
        found.append(numbers(tmp_path / "figure")["vit_tiny/vit_tiny/distance"])
    assert "broken.png" in capsys.readouterr().err
    assert np.allclose(*found, rtol=1e-5)
    for i in range(3):
        (tmp_path / "more" / "a" / f"{i}.png").unlink()
    draw("attention", *args, "--data", tmp_path / "more", code=2)
    assert "none of 1 images can be read" in capsys.readouterr().err


def test_attention_shows_runs_side_by_side_and_names_what_it_skips(both, tmp_path, capsys):
    draw("attention", *both, "--images", 5, "--out", tmp_path / "new" / "a")
    printed = capsys.readouterr()
    assert "attention: skipped 1 resnet18 of mokd: it has no such layers" in printed.err
    assert f"{tmp_path}/new/a.npz" in printed.out
    found = numbers(tmp_path / "new" / "a")
    assert {key.rpartition("/")[0] for key in found} == {"independent/2 vit_tiny", "mokd/2 vit_tiny"}
    assert all(found[f"{run}/2 vit_tiny/distance"].shape == (2, 2) for run in ("mokd", "independent"))
    fig, _ = figures.FIGURES["attention"](settings("attention", *both, "--images", 5), torch.device("cpu"))
    assert [ax.get_title() for ax in fig.axes] == ["independent\n2 vit_tiny", "mokd\n2 vit_tiny"]


def test_what_is_unset_is_the_first_checkpoints(runs, tmp_path):
    state = torch.load(runs / "mokd" / "checkpoint.pth", weights_only=True)
    state["config"] |= dict(global_size=48, data="nowhere")
    (tmp_path / "large").mkdir()
    torch.save(state, tmp_path / "large" / "checkpoint.pth")
    files = [runs / "mokd" / "checkpoint.pth", tmp_path / "large" / "checkpoint.pth"]
    args = ["--images", 3, "--workers", 0, "--out", tmp_path / "a"]
    for more, side in (([], 4), (["--image_size", 48], 6)):
        draw("attention", "--checkpoint", *files, *more, *args)
        found = numbers(tmp_path / "a")
        assert np.array_equal(found["mokd/2 vit_tiny/distance"], found["large/2 vit_tiny/distance"])
        assert np.allclose(found["large/2 vit_tiny/uniform"], mean_of_grid(side, side, 8 * side))
    draw("attention", "--checkpoint", *files[::-1], "--data", "toy", *args)
    assert np.allclose(numbers(tmp_path / "a")["mokd/2 vit_tiny/uniform"], mean_of_grid(6, 6, 48))


def settings(*args):
    return figures.parse([*map(str, args)])


# --------------------------------------------------------------------------------------------------------------- tsne

def test_relative_features_do_not_depend_on_width_rotation_and_scale():
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    f, anchors, turn = rand(20, 6), rand(7, 6), torch.linalg.qr(rand(9, 9))[0][:6]
    z = figures.relative(f, anchors)
    assert torch.allclose(z, figures.relative(5 * f @ turn, anchors @ turn), atol=1e-5)   # 9 wide
    assert not torch.allclose(z, figures.relative(f[:, :3], anchors[:, :3]), atol=0.1)
    s = np.array([[x @ a / np.linalg.norm(x) / np.linalg.norm(a) for a in anchors.numpy()] for x in f.numpy()])
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
    draw("tsne", *both, "--classes", 3, "--per_class", 12, "--anchors", 40, "--perplexity", 5, "--out", tmp_path / "t")
    printed, found = capsys.readouterr().out, numbers(tmp_path / "t")
    x, y = mokd.draw_toy(1024, "val")
    labels = y[found["images"]].numpy()
    assert "mokd: t-SNE of 72 points, compared to 40 anchors" in printed
    assert len({*labels}) == 3 and np.bincount(labels)[[*{*labels}]].tolist() == [12] * 3
    assert len({*found["anchors"]}) == 40 and not {*found["anchors"]} & {*found["images"]}
    for run in ("independent", "mokd"):
        assert np.array_equal(found[f"{run}/labels"], labels)
        for model in ("1 resnet18", "2 vit_tiny"):
            assert found[f"{run}/{model}/xy"].shape == (36, 2) and np.isfinite(found[f"{run}/{model}/xy"]).all()
    backbone = eval_knn.load_backbones(eval_knn.parse(["--checkpoint", str(runs / "mokd" / "checkpoint.pth")]))["2 vit_tiny"]
    with torch.no_grad():
        f, a = (backbone(center_crops(found[name]))[0] for name in ("images", "anchors"))
    assert np.allclose(found["mokd/2 vit_tiny/relative"], figures.relative(f, a), atol=0.03)   # features come in half precision

    cfg = settings("tsne", *both, "--classes", 3, "--per_class", 12, "--anchors", 40, "--perplexity", 5)
    for seed in (0, 1):
        cfg.seed = seed
        fig, again = figures.tsne(cfg, torch.device("cpu"))
        assert np.array_equal(found["images"], again["images"]) == np.array_equal(found["mokd/2 vit_tiny/xy"],
                                                                                  again["mokd/2 vit_tiny/xy"]) == (seed == 0)
    assert [ax.get_title() for ax in fig.axes] == ["independent", "mokd"]
    shown = fig.axes[1].collections
    assert len(shown) == 2 and len({s.get_paths()[0].vertices.shape for s in shown}) == 2   # a marker a model
    assert all(len({*map(tuple, s.get_facecolors())}) == 3 for s in shown)                  # a color a class
    assert [t.get_text() for t in fig.legends[0].get_texts()][:2] == ["1 resnet18", "2 vit_tiny"]


def test_tsne_takes_one_model_and_all_classes_there_are(runs, tmp_path):
    draw("tsne", "--checkpoint", runs / "mokd" / "checkpoint.pth", "--model", 2, "--per_class", 4, "--anchors", 20,
         "--perplexity", 4, "--workers", 0, "--out", tmp_path / "t")
    found = numbers(tmp_path / "t")
    assert {*found["mokd/labels"]} == {*range(8)} and "mokd/agreement" not in found


# ------------------------------------------------------------------------------------------------------ crops, curves

def test_crops_are_the_views_that_the_run_makes(runs, tmp_path):
    args = ["crops", "--checkpoint", runs / "mokd" / "checkpoint.pth", "--images", 3, "--workers", 0]
    draw(*args, "--out", tmp_path / "c")
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
    assert [ax.get_title() for ax in fig.axes][:4] == ["global 0", "global 1", "local 2", "local 3"]
    assert np.allclose(fig.axes[5].images[0].get_array(), found["global"][1, 1].transpose(1, 2, 0), atol=1e-6)   # row 1, column 1


def test_curves_are_the_log(runs, tmp_path):
    draw("curves", "--log", runs / "mokd" / "log.jsonl", runs / "independent" / "log.jsonl", "--out", tmp_path / "c")
    found = numbers(tmp_path / "c")
    records = [json.loads(line) for line in open(runs / "mokd" / "log.jsonl")]
    for name in ("loss1", "sm2", "ct1", "entropy_m1", "spread_t2", "lr2"):
        expected = [[int(r["step"].split("/")[0]), r[name]] for r in records if name in r]
        assert len(expected) == 4 and found[f"mokd/{name}"].tolist() == expected
    assert found["mokd/knn1"].tolist() == [[8, records[-1]["knn1"]]]
    assert "independent/sm1" in found and "independent/ct1" not in found and "independent/knn1" not in found


def test_curves_of_a_resumed_run_show_each_step_once(tmp_path):
    for run, lines in (("a", ["2", "4", "6", "4", "6", "8"]), ("b", ["3"])):
        (tmp_path / run).mkdir()
        records = [dict(epoch=0, step=f"{step}/8", loss1=10.0 * i, lr1=0.1, GB=1.0) for i, step in enumerate(lines)]
        (tmp_path / run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = settings("curves", "--log", tmp_path / "a" / "log.jsonl", tmp_path / "b" / "log.jsonl")
    fig, found = figures.curves(cfg, torch.device("cpu"))
    assert found["a/loss1"].tolist() == [[2, 0], [4, 30], [6, 40], [8, 50]] and "a/GB" not in found
    assert [ax.get_title() for ax in fig.axes] == [f"model {i}: {what}" for what in ("loss", "learning rate") for i in "12"]
    assert [line.get_label() for line in fig.axes[0].lines] == ["a: loss1", "b: loss1"]
    assert fig.axes[0].lines[0].get_xydata().tolist() == found["a/loss1"].tolist()
    assert cfg.out == str(tmp_path / "a" / "curves")


# ------------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("args, words", [
    ([], "the first word must be one of tsne, attention, featuremap, crops, curves"), (["tnse"], "'tnse' is no figure"),
    (["tsne"], "--checkpoint FILE or --arch"), (["tsne", "--checkpoint", "HERE", "--arch", "resnet18"], "either --checkpoint"),
    (["attention", "--checkpoint", "nowhere.pth"], "nowhere.pth"), (["attention", "--arch", "vit_tiny"], "--data"),
    (["attention", "--checkpoint", "HERE", "--model", "1"], "of a ViT"),
    (["featuremap", "--checkpoint", "HERE", "--model", "2"], "of a CNN"),
    (["attention", "--checkpoint", "HERE", "HERE"], "called alike"),
    (["attention", "--checkpoint", "HERE", "--images", "0"], "--images 0"),
    (["tsne", "--checkpoint", "HERE", "--perplexity", "400"], "--perplexity 400"),
    (["tsne", "--checkpoint", "HERE", "--per_class", "128"], "--per_class 128"),
    (["tsne", "--checkpoint", "HERE", "--data", "nowhere"], "--data nowhere"),
    (["crops"], "one --checkpoint"), (["crops", "--checkpoint", "HERE", "HERE"], "one --checkpoint"), (["curves"], "--log"),
    (["curves", "--log", "nowhere.jsonl"], "nowhere.jsonl"), (["curves", "--log", "HERE"], "checkpoint.pth: no log"),
    (["attention", "--checkpoint", "HERE", "--out", "/dev/null/x"], "--out /dev/null/x")])
def test_what_figures_cannot_do_is_said(runs, args, words, capsys, tmp_path):
    args = [runs / "mokd" / "checkpoint.pth" if a == "HERE" else a for a in args]
    out = ["--out", tmp_path / "x", "--workers", 0] if len(args) > 1 and "--out" not in args else []
    assert words in refused([*args, *out], capsys)


def test_a_figure_that_cannot_be_written_is_named(runs, capsys, tmp_path):
    (tmp_path / "c.pdf").mkdir()
    message = refused(["curves", "--log", runs / "mokd" / "log.jsonl", "--out", tmp_path / "c"], capsys, code=1)
    assert f"--out {tmp_path / 'c'}: cannot be written" in message


@pytest.mark.parametrize("content, words", [
    ("", "holds no losses"), ('{"epoch": 0}\n', "holds no losses"), ("[1]\n", "no log.jsonl"),
    ('{"step": "4/8", "loss1": 1.0}\n{"ep', "damaged after step 4")])
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
    monkeypatch.setattr(mokd, "setup_processes", lambda: (torch.device("cpu"), 0, 2))
    assert "without torchrun" in refused(["crops", "--checkpoint", runs / "mokd" / "checkpoint.pth"], capsys)


def test_help_names_every_setting_and_runs_from_anywhere(tmp_path, capsys):
    script = os.path.join(HERE, "extras", "figures.py")
    done = subprocess.run([sys.executable, script, "-h"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(SystemExit) as end:
        figures.parse(["tsne", "--help"])
    for text, name in ((done.stdout, "FIGURE"), (capsys.readouterr().out, "tsne")):
        assert end.value.code == 0 and f"extras/figures.py {name} [--FLAG" in text
        for f in dataclasses.fields(figures.Config):
            assert f"--{f.name} " in text
