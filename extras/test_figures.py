"""Tests of figures.py and results.py: distances, attention, bands and paired errors against slow loops, known
cases and numbers computed by hand, and each picture from two small runs."""
import json, math, shutil   # noqa: E401
from dataclasses import asdict

import pytest
import torch
import torchvision
from torch.utils.data import TensorDataset

import figures   # puts the repository on the path
import eval_linear
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

def sharp_vit(pool, sharpness=0.5, **kwargs):
    """A ViT whose attention is far from uniform, so that mistakes show."""
    torch.manual_seed(0)
    backbone = mokd.Backbone("vit_tiny", dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2,
                                              **kwargs), pool, 32)
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            if "qkv" in name or "pos_embed" in name:
                p.add_(torch.randn(p.shape), alpha=sharpness)
    return backbone.eval()

def attention_of(attn, x):
    """Tokens (n, N, 24) -> weights (n, 2, N, N) of two heads, from their definition."""
    q, k, _ = attn.qkv(x).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    return (q @ k.mT / math.sqrt(12)).softmax(-1)

def weights_of(backbone, x):
    """-> a ViT's attention (n, heads, N, N) in each block."""
    found = []
    for block in backbone.model.blocks:
        block.attn.register_forward_pre_hook(lambda attn, inputs: found.append(attention_of(attn, inputs[0])))
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
    assert weights_of(backbone, x)[-1][..., 1:].sum(-1).min() == 0   # in float32
    assert figures.reach_of_vit(backbone, x)[0].isfinite().all()
    assert figures.last_block(backbone, x).isfinite().all()

def test_a_cnns_distances_equal_a_loop_over_its_maps():
    torch.manual_seed(0)
    backbone = mokd.Backbone("resnet18", dict(layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)), size=64)
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
    attention, change, *logits = figures.look(head, tokens, query)
    assert torch.equal(logits[0], head(tokens)) and torch.equal(logits[1], head(tokens, query))
    x = torch.cat([query[:, None], tokens + head.pos], 1)
    for b, block in enumerate(head.blocks):
        weights = attention_of(block.attn, block.norm1(x))
        assert torch.allclose(attention[:, b], weights[:, :, 0, 1:].mean(1), atol=1e-6)
        x = block(x)
    moved, still = head.norm(x)[:, 1:], head.norm(head.blocks(tokens + head.pos))
    expected = (moved - still).square().sum(-1).sqrt() / still.square().sum(-1).sqrt()
    assert torch.allclose(change, expected, rtol=1e-4)

def test_the_part_of_a_target_that_a_query_moves():
    cfg = mokd.parse_args("--demo --arch2 resnet18 --model_kwargs2 layers=1,1,1,1 output_stride=8".split())
    one, two = mokd.build_models(cfg, torch.device("cpu"))
    two.n_.C_t.normal_()
    a, b = torch.randn(2, 3, 3, 24, 24)
    (_, _, *moved), _ = figures.look_both_ways((one, two), a, b, 0.2)
    with torch.no_grad():
        tokens, query = two.n_.backbone(b)[1], one.net.t_head.query_of(one.net.backbone(a)[0])
        own, none, other = [((two.n_.t_head(tokens, *of) - two.n_.C_t) / 0.2).softmax(1)
                            for of in ((query,), (), (query[[2, 0, 1]],))]
    for found, q in zip(moved, (none, other)):
        assert torch.allclose(found, (own - q).clamp_min(0).sum(1), atol=1e-6) and found.min() > 0

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

def write_logs(folder, setting, seeds, **changed):
    """Logs with k-NN after epochs 2 and 4 of each seed, that of model 2 ten lower. They belong to runs that
    were killed while they wrote a line, and went on an epoch earlier. Another run's records come first, whose
    checkpoint was deleted, and half a line of it."""
    for seed, values in seeds.items():
        out = folder / setting / str(seed)
        out.mkdir(parents=True, exist_ok=True)
        settings = asdict(mokd.parse_args(["--demo", "--seed", str(seed), "--out", str(out)]))
        start = json.dumps(dict(settings=settings | dict(losses=setting) | changed, step=0))
        lines = [start, '{"epoch": 7, "knn1": 1, "knn2": 1}', '{"epoch": 8, ' + start,
                 '{"epoch": 1, "knn1": 99, "knn2": 99}', '{"epoch": 2, "kn']
        for epoch, value in zip((1, 3), values):   # epochs count from 0
            lines.append(json.dumps(dict(epoch=epoch, knn1=value, knn2=value - 10)))
        (out / "log.jsonl").write_text("\n".join(lines))

ALONE = {0: (40.0, 50), 1: (42, 54)}
MOKD = {0: (41.0, 53), 1: (45, 55), 2: (46, 60)}

def test_curves_show_means_with_deviations_as_bands(tmp_path):
    write_logs(tmp_path, "alone", ALONE)
    write_logs(tmp_path, "mokd", MOKD)
    fig = drawn("curves", "--log", tmp_path / "alone", tmp_path / "mokd", "--pixels", 30)
    alone, mokd_, pixels = fig.axes[0].lines
    assert alone.get_xydata().tolist() == [[2, 41], [4, 52]]
    assert mokd_.get_xydata().tolist() == [[2, 44], [4, 56]]
    assert set(pixels.get_ydata()) == {30}
    assert fig.axes[1].lines[0].get_ydata().tolist() == [31, 42]
    edges = fig.axes[0].collections[0].get_paths()[0].vertices
    for epoch, mean, deviation in ((2, 41, math.sqrt(2)), (4, 52, math.sqrt(8))):
        found = {round(float(y), 4) for x, y in edges if x == epoch}
        assert found == {round(mean - deviation, 4), round(mean + deviation, 4)}

def write_evaluation(folder, run, step=9, **settings):
    """The log of eval_linear.py on a run of write_logs: its second model reaches 65 %, and 70 %."""
    folder.mkdir(parents=True)
    start = json.loads((run / "log.jsonl").read_text().splitlines()[0])["settings"] | dict(step=step)
    own = asdict(eval_linear.parse(["--checkpoint", f"{run}/checkpoint.pth", "--data", "toy"])) | settings
    rates = {"2 vit": {"0.1": dict(top1=65.0), "1": dict(top1=70.0)}}
    lines = [dict(settings=own, step=0, run=start), dict(epoch=1, results={}), dict(epoch=2, results=rates)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))

def table_of(capsys, *arguments):
    results.main([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()

def test_results_are_paired_by_seed(tmp_path, capsys):
    write_logs(tmp_path, "alone", ALONE)
    write_logs(tmp_path, "mokd", MOKD)
    write_evaluation(tmp_path / "alone/1/l1-0.1", tmp_path / "alone/1")
    write_evaluation(tmp_path / "alone/0/cifar10", tmp_path / "alone/0", finetune=True, data="x/cifar10")
    lines = table_of(capsys, tmp_path / "alone", f"{tmp_path}/mokd*")
    assert f"| {tmp_path}/alone | 0, 1 | 52.0 ± 2.8 | 42.0 ± 2.8 |" in lines
    # Deviation of 53, 55, 60: sqrt(13). Differences of seeds 0 and 1: 3 and 1, of error sqrt(2) / sqrt(2).
    assert f"| {tmp_path}/mokd | 0, 1, 2 | 56.0 ± 3.6 | 46.0 ± 3.6 | +2.0 ± 1.0 | +2.0 ± 1.0 |" in lines
    titles = [line.split(",")[0] for line in lines if "seeds" in line]
    assert titles == ["| fine-tuning top-1 on cifar10 after 3 epochs", "| k-NN top-1 on toy after 4 epochs",
                      "| linear probing top-1 on toy after 3 epochs"]
    for seed in (0, 1):   # in the table of fine-tuning, in that of linear probing
        assert lines.count(f"| {tmp_path}/alone | {seed} |  | 70.0 |") == 1
    write_evaluation(tmp_path / "alone/0/l1-0.1", tmp_path / "alone/0", step=8)   # before the run had ended
    with pytest.raises(SystemExit, match="run's step"):
        results.main([f"{tmp_path}/alone"])

def test_a_pattern_has_a_row_for_each_setting_and_brackets_are_taken_as_they_are(tmp_path, capsys):
    for name in ("lr[0.1]", "sm", "st"):
        write_logs(tmp_path / "study", name, ALONE)
    write_logs(tmp_path / "study", "ct", {10: (3, 4), 11: (3, 4)})
    lines = table_of(capsys, tmp_path / "study/lr[0.1]", f"{tmp_path}/study/*")
    names = [line.split(" | ")[:2] for line in lines[3:]]
    assert names == [[f"| {tmp_path}/study/{name}", seeds] for name, seeds in
                     (("lr[0.1]", "0, 1"), ("ct", "10, 11"), ("sm", "0, 1"), ("st", "0, 1"))]
    drawn("curves", "--log", tmp_path / "study/lr[0.1]")
    write_logs(tmp_path / "seeds", "sm", ALONE)   # where the folders that are found are seeds
    seeds = f"{tmp_path}/seeds/sm/*"
    assert f"| {seeds} | 0, 1 | 52.0 ± 2.8 | 42.0 ± 2.8 |" in table_of(capsys, seeds)

@pytest.mark.parametrize("changed, words", [
    (dict(seed=0), "two runs of seed 0"), (dict(data="cifar10"), "data:"), (dict(lambda1=0.7), "lambda1")])
def test_a_row_never_mixes_runs(changed, words, tmp_path):
    write_logs(tmp_path, "alone", ALONE)
    write_logs(tmp_path, "alone", {2: (3, 4)}, **changed)
    for program in (results.main, lambda argv: drawn("curves", "--log", *argv)):
        with pytest.raises(SystemExit, match=f"alone/0/.*alone/2/.*{words}"):
            program([f"{tmp_path}/alone"])

def test_what_is_no_setting_is_refused_by_name_and_what_may_differ_may(tmp_path, capsys):
    write_logs(tmp_path, "alone", ALONE, init1="a/model1.pth", workers=8, data="mine/toy")
    write_logs(tmp_path, "alone", {2: (3, 4)}, init1="b/model1.pth", workers=0)
    assert " | 0, 1, 2 | " in table_of(capsys, tmp_path / "alone")[-1]
    write_logs(tmp_path, "alone", {3: (3,)}, init1="model1.pth")   # it has not come as far
    with pytest.raises(SystemExit, match="epochs evaluated"):
        results.main([f"{tmp_path}/alone"])
    (tmp_path / "old").mkdir()
    (tmp_path / "old/log.jsonl").write_text('{"epoch": 0, "knn1": 3, "knn2": 4}')
    for name, words in (("old", "seed"), ("none", "no log"), ("none*", "no log")):
        with pytest.raises(SystemExit) as end:
            results.main([f"{tmp_path}/alone/0", f"{tmp_path}/{name}"])
        assert f"{tmp_path}/{name}" in str(end.value) and words in str(end.value)

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
    *said, png, pdf = capsys.readouterr().out.splitlines()
    assert [png, pdf] == [f"wrote {tmp_path}/{figure}.{ending}" for ending in ("png", "pdf")]
    if figure == "search":   # two lines for untrained nets, two for trained ones
        assert said[0].removeprefix("untrained") != said[2].removeprefix("trained")
        saved = torch.load(both)
        saved["model2"]["momentum_net"]["t_head.pos"] *= 99   # what model 1's queries search
        torch.save(saved, tmp_path / "other.pth")
        drawn("search", "--checkpoint", tmp_path / "other.pth", "--images", 4, "--view", 2)
        assert capsys.readouterr().out.splitlines()[2] != said[2]

@pytest.mark.parametrize("n", [2, 9])
def test_tsne_draws_few_images_and_two_checkpoints_of_a_folder(n, runs, monkeypatch):
    images = TensorDataset(*[x[:n] for x in mokd.draw_toy(16, "val")])
    monkeypatch.setattr(mokd, "get_images", lambda *_: images)
    checkpoint = runs / "mokd/0/checkpoint.pth"
    shutil.copy(checkpoint, runs / "mokd/0/epoch1.pth")
    assert len(drawn("tsne", "--checkpoint", checkpoint, runs / "mokd/0/epoch1.pth").axes) == 2
    with pytest.raises(SystemExit):
        figures.parse(["tsne", "--names", "a", "a"])

def test_crops_are_the_views_of_training(runs):
    picture = drawn("crops", *SMALL).axes[0].images[0].get_array()
    assert picture.shape == (4 * 26, 26 + 26 + 14, 3)   # two views of 24 pixels, one of 12; 2 between them
    views = figures.training_views(mokd.parse_args(SMALL), 4, torch.device("cpu"))
    first = torch.from_numpy(picture[26:50, 26:50]).movedim(-1, 0)   # of image 1, view 1
    assert torch.allclose(mokd.normalize(first[None])[0], views[1][1], atol=1e-4)
