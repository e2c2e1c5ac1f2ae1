"""Tests of figures.py and results.py: distances, attention, bands and paired errors against slow loops, known
cases and numbers computed by hand, and each picture from two small runs."""
import gzip
import json
import math

import pytest
import torch
import torchvision
from torch.utils.data import TensorDataset

import figures   # puts the repository on the path
import mokd
import results

SMALL = f"""{mokd.DEMO} {mokd.DEMO1} {mokd.DEMO2} --epochs 1 --batch_size 16 --out_dim 32 --t_depth 2
    --local_crops 1 --log_every 2 --knn_every 1 --workers 0""".split()

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two runs on a few toy images, one with sm alone, one with all losses."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mokd, "get_images", lambda cfg, part: TensorDataset(*mokd.draw_toy(64, part)))
        for name, losses in (("alone", "sm"), ("mokd", "sm,cm,st,ct")):
            mokd.main([*SMALL, "--losses", losses, "--out", str(folder / name / "0")])
        yield folder

def drawn(*argv):
    """-> the figure of a command line."""
    cfg = figures.parse([str(word) for word in argv])
    return figures.FIGURES[cfg.figure](cfg, torch.device("cpu"))

def slow_distance(weights, side, size):
    """Attention (N, N) -> its mean distance, query by query and key by key."""
    total = 0.0
    for i in range(side ** 2):
        for j in range(side ** 2):
            total += weights[i, j].item() * math.hypot(i // side - j // side, i % side - j % side)
    return total / side ** 2 * size / side

def test_known_attention_has_its_known_distance():
    apart = figures.distances(2, 32)   # four patches of 16 pixels
    uniform = torch.full((4, 4), 0.25)
    assert figures.mean_distance(uniform, apart).item() == pytest.approx(16 * (0 + 1 + 1 + math.sqrt(2)) / 4)
    assert figures.mean_distance(torch.eye(4), apart) == 0
    to_the_right = torch.eye(4)[[1, 0, 3, 2]]
    assert figures.mean_distance(to_the_right, apart) == 16

def sharp_vit(pool, sharpness=0.5, **kwargs):
    """A ViT whose attention is far from uniform, so that mistakes show."""
    torch.manual_seed(0)
    backbone = mokd.Backbone("vit_tiny", dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2,
                                              **kwargs), pool, [32])
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            if "qkv" in name or "pos_embed" in name:
                p.add_(torch.randn(p.shape), alpha=sharpness)
    return backbone.eval()

def weights_of(backbone, x):
    """-> a ViT's attention (n, heads, N, N) in each block, from its definition."""
    found = []
    def read(module, inputs):
        q, k, _ = module.qkv(inputs[0]).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        found.append((q @ k.mT / math.sqrt(12)).softmax(-1))
    for block in backbone.model.blocks:
        block.attn.register_forward_pre_hook(read)
    with torch.no_grad():
        backbone(x)
    return found

@pytest.mark.parametrize("kwargs, prefix", [
    ({}, 1), (dict(reg_tokens=2), 3), (dict(class_token=False, global_pool="avg"), 0)])
def test_a_vits_distances_equal_a_loop_over_its_weights(kwargs, prefix):
    backbone, x = sharp_vit("mean", **kwargs), torch.randn(18, 3, 32, 32)
    pixels, uniform = figures.reach_of_vit(backbone, x)
    assert pixels.shape == (18, 2, 2)
    for layer, weights in enumerate(weights_of(backbone, x.double())):
        own = weights[17, 1, prefix:, prefix:]
        own = own / own.sum(-1, keepdim=True)
        assert pixels[17, layer, 1].item() == pytest.approx(slow_distance(own, 4, 32), rel=1e-5)
        assert uniform[layer].item() == pytest.approx(slow_distance(torch.full((16, 16), 1 / 16), 4, 32))

def test_heads_that_look_at_cls_alone_have_a_distance():
    backbone, x = sharp_vit("mean", sharpness=3), torch.randn(18, 3, 32, 32)
    share = weights_of(backbone, x)[-1][..., 1:].sum(-1)
    assert share.min() == 0   # in float32
    assert figures.last_block(sharp_vit("mean", sharpness=3), x).isfinite().all()
    pixels, _ = figures.reach_of_vit(backbone, x)
    assert pixels.isfinite().all()

def test_a_cnns_distances_equal_a_loop_over_its_maps():
    torch.manual_seed(0)
    backbone = mokd.Backbone("resnet18", dict(layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)), sizes=[64])
    net, x = backbone.eval().model, torch.randn(9, 3, 64, 64)
    pixels, _ = figures.reach_of_cnn(backbone, x)
    Z = net.maxpool(net.act1(net.bn1(net.conv1(x))))
    for stage, layer in enumerate([net.layer1, net.layer2, net.layer3, net.layer4]):
        Z = layer(Z)
        z = Z[8].flatten(1)   # (C, N)
        weights = torch.stack([(z[:, i] @ z / math.sqrt(len(z))).softmax(0) for i in range(z.shape[1])])
        assert pixels[8, stage, 0].item() == pytest.approx(slow_distance(weights, Z.shape[-1], 64), rel=1e-4)

@pytest.mark.parametrize("pool, queries", [("mean", slice(1, None)), ("cls", slice(0, 1))])
def test_maps_show_what_makes_the_models_feature(pool, queries):
    backbone, x = sharp_vit(pool), torch.randn(3, 3, 32, 32)
    shown = figures.last_block(backbone, x)
    own = weights_of(backbone, x.double())[-1][:, :, queries, 1:]
    heads = 16 * (own / own.sum(-1, keepdim=True)).mean(2)
    assert torch.allclose(shown[:, :2], heads, rtol=1e-4)
    assert torch.allclose(shown[:, 2], (heads[:, 0] + heads[:, 1]) / 2, rtol=1e-4)

def test_attention_and_change_of_a_search_equal_a_slow_computation():
    torch.manual_seed(0)
    head = mokd.THead(24, 16, dim=24, depth=2, num_heads=2, num_tokens=9).eval().requires_grad_(False)
    for block in head.blocks:   # far from uniform attention
        block.attn.qkv.weight.copy_(torch.randn(72, 24) / 4)
    tokens, query = torch.randn(3, 9, 24), torch.randn(3, 24)
    attention, change = figures.look(head, tokens, query)
    x = torch.cat([query[:, None], tokens + head.pos], 1)
    for b, block in enumerate(head.blocks):
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(12)).softmax(-1)
        assert torch.allclose(attention[:, b], weights[:, :, 0, 1:].mean(1), atol=1e-6)
        x = block(x)
    moved, still = head.norm(x)[:, 1:], head.norm(head.blocks(tokens + head.pos))
    expected = (moved - still).square().sum(-1).sqrt() / still.square().sum(-1).sqrt()
    assert torch.allclose(change, expected, rtol=1e-4)

def test_the_number_of_tokens_over_which_attention_is_spread():
    attention = 0.2 * torch.tensor([[1.0, 1, 1, 1], [0, 2, 0, 0], [1, 0, 1, 0]])   # the rest is the query's
    assert figures.effective(attention).tolist() == pytest.approx([4, 1, 2])

def test_relative_features_do_not_depend_on_width_rotation_and_scale():
    torch.manual_seed(0)
    images, anchors = torch.randn(20, 6), torch.randn(7, 6)
    turn = torch.linalg.qr(torch.randn(9, 9))[0][:6]   # into nine channels
    z = figures.relative(images, anchors)
    assert torch.allclose(z, figures.relative(5 * images @ turn, anchors @ turn), atol=1e-5)

def test_agreement_leaves_out_the_same_image():
    z1 = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1]])
    z2 = torch.tensor([[1.0, 0], [0.8, 0.2], [0.1, 1]])
    # Nearest among z2: 1, 0, 1. Nearest among z1: 1, 0, 1. With these classes four of six agree.
    assert figures.agreement(z1, z2, torch.tensor([0, 0, 1])) == pytest.approx(400 / 6)

def write_logs(folder, setting, seeds, reduced=False):
    """Logs with k-NN after epochs 2 and 4 of each seed, that of model 2 ten lower. They belong to runs that
    were killed while they wrote a line, and went on an epoch earlier."""
    for seed, values in seeds.items():
        file = folder / (f"{setting}-{seed}.jsonl.gz" if reduced else f"{setting}/{seed}/log.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(dict(epoch=1, knn1=99, knn2=99)), '{"epoch": 2, "kn']
        for epoch, value in zip((1, 3), values):   # epochs count from 0
            lines.append(json.dumps(dict(epoch=epoch, knn1=value, knn2=value - 10)))
        with gzip.open(file, "wt") if reduced else open(file, "w") as f:
            f.write("\n".join(lines))

ALONE = {"0": (40.0, 50), "1": (42, 54)}
MOKD = {"0": (41.0, 53), "1": (45, 55), "2": (46, 60)}

@pytest.mark.parametrize("reduced", [False, True])
def test_curves_show_means_with_deviations_as_bands(reduced, tmp_path):
    write_logs(tmp_path, "alone", ALONE, reduced)
    write_logs(tmp_path, "mokd", MOKD, reduced)
    ending = "-*" if reduced else ""
    fig = drawn("curves", "--log", f"{tmp_path}/alone{ending}", f"{tmp_path}/mokd{ending}", "--pixels", 30)
    alone, mokd_, pixels = fig.axes[0].lines
    assert alone.get_xydata().tolist() == [[2, 41], [4, 52]]
    assert mokd_.get_xydata().tolist() == [[2, 44], [4, 56]]
    assert set(pixels.get_ydata()) == {30}
    assert fig.axes[1].lines[0].get_ydata().tolist() == [31, 42]
    edges = fig.axes[0].collections[0].get_paths()[0].vertices
    for epoch, mean, deviation in ((2, 41, math.sqrt(2)), (4, 52, math.sqrt(8))):
        found = {round(float(y), 4) for x, y in edges if x == epoch}
        assert found == {round(mean - deviation, 4), round(mean + deviation, 4)}

def test_results_are_paired_by_seed(tmp_path, capsys):
    write_logs(tmp_path, "alone", ALONE)
    write_logs(tmp_path, "mokd", MOKD, reduced=True)
    (tmp_path / "alone" / "1" / "linear").mkdir()
    rates = {"1 cnn": {"0.1": dict(top1=60.0), "1": dict(top1=70.0)}, "2 vit": {"0.1": dict(top1=65.0)}}
    linear = [dict(epoch=1, results={}), dict(epoch=2, results=rates)]
    (tmp_path / "alone" / "1" / "linear" / "log.jsonl").write_text("\n".join(map(json.dumps, linear)))
    results.main([f"{tmp_path}/alone", f"{tmp_path}/mokd-*"])
    lines = capsys.readouterr().out.splitlines()
    assert f"| {tmp_path}/alone | 0, 1 | 52.0 ± 2.8 | 42.0 ± 2.8 |" in lines
    # Deviation of 53, 55, 60: sqrt(13). Differences of seeds 0 and 1: 3 and 1, of error sqrt(2) / sqrt(2).
    assert f"| {tmp_path}/mokd-* | 0, 1, 2 | 56.0 ± 3.6 | 46.0 ± 3.6 | +2.0 ± 1.0 | +2.0 ± 1.0 |" in lines
    assert f"| {tmp_path}/alone | 1 | 70.0 | 65.0 |" in lines
    with pytest.raises(SystemExit, match="two runs of seed 0"):
        results.main([str(tmp_path)])

@pytest.mark.parametrize("figure", figures.FIGURES)
def test_each_picture_is_written_whole(figure, runs, tmp_path, capsys):
    alone, both = runs / "alone/0/checkpoint.pth", runs / "mokd/0/checkpoint.pth"
    source = ["--checkpoint", alone, both, "--images", 4, "--names", "alone", "mokd", "--per_class", 7]
    if figure == "search":
        source = ["--checkpoint", both, "--images", 4, "--view", 2]
    elif figure in ("curves", "losses"):
        source = ["--log", runs / "alone", runs / "mokd"]
    elif figure == "crops":
        source = SMALL
    mokd.main([figure, *map(str, source), "--out", str(tmp_path)], figures.parse, figures.run)
    picture = torchvision.io.read_image(str(tmp_path / f"{figure}.png"))[:3]
    assert picture.shape[2] == 1600 and picture.float().std() > 5
    for edge in (picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]):
        assert (edge == 255).all()   # nothing is cut off
    if figure == "search":   # it prints two lines for untrained nets, two for trained ones
        untrained, trained = capsys.readouterr().out.splitlines()[::2]
        assert untrained.removeprefix("untrained") != trained.removeprefix("trained")

def test_crops_are_the_views_of_training(runs):
    fig = drawn("crops", *SMALL)
    picture = fig.axes[0].images[0].get_array()
    assert picture.shape == (4 * 26, 26 + 26 + 14, 3)   # two views of 24 pixels, one of 12; 2 between them
    views = figures.training_views(mokd.parse_args(SMALL), 4, torch.device("cpu"))
    first = torch.from_numpy(picture[26:50, 26:50]).movedim(-1, 0)   # of image 1, view 1
    assert torch.allclose(mokd.normalize(first[None])[0], views[1][1], atol=1e-4)
