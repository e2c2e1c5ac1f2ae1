"""Tests of eval_coco.py, on a data set in COCO's format that they draw: circles, rectangles and triangles, with their masks.

    python -m pytest -q extras/test_coco.py
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

import eval_coco   # which puts the folder of mokd.py on the path
import mokd

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPES = {7: "circle", 3: "triangle", 20: "rectangle"}   # ids as COCO's: with gaps, in no order


def runs(mask):
    """(h, w) -> uncompressed run lengths, column by column, zeros first: COCO's other form of a mask."""
    flat = mask.flatten(order="F").astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, len(flat)]).tolist()
    return dict(counts=[0] * int(flat[0]) + counts, size=list(mask.shape))


def draw(folder, sizes, count=(1, 3), seed=0, side=(0.25, 0.5), shape=(72, 96)):
    """Write a data set; sizes: images of train and val. An image is gray noise with shapes that do not overlap, in colors that say
    nothing of their kind. The first image of a part has no object, the second a crowd."""
    g = np.random.default_rng(seed)
    (folder / "annotations").mkdir(parents=True)
    for part, n in sizes.items():
        (folder / f"{part}2017").mkdir()
        images, annotations = [], []
        for i in range(n):
            h, w = shape if g.random() < 0.7 else shape[::-1]
            image = Image.fromarray(g.integers(60, 140, (h, w, 3), dtype=np.uint8))
            taken, id = np.zeros((h, w), bool), 1000 + 7 * i
            images.append(dict(id=id, file_name=f"{part}{i}.png", height=h, width=w))
            for _ in range(0 if i == 0 else g.integers(*count, endpoint=True)):
                a, b = (g.uniform(*side, 2) * min(h, w)).round()
                x, y = g.integers(0, w - a), g.integers(0, h - b)
                kind = int(g.choice([*SHAPES]))
                if SHAPES[kind] == "circle":
                    outline = [(x + a / 2 * (1 + math.cos(t)), y + b / 2 * (1 + math.sin(t))) for t in np.arange(0, 6.28, 0.1)]
                elif SHAPES[kind] == "triangle":
                    outline = [(x, y + b), (x + a / 2, y), (x + a, y + b)]
                else:
                    outline = [(x, y), (x + a, y), (x + a, y + b), (x, y + b)]
                polygon = [float(c) for point in outline for c in point]
                mask = rle.decode(rle.frPyObjects([polygon], h, w))[..., 0].astype(bool)
                if (taken & mask).any():
                    continue
                taken |= mask
                pixels = np.array(image)
                pixels[mask] = g.choice([0, 255], 3) if g.random() < 0.5 else g.integers(160, 256, 3)
                image.paste(Image.fromarray(pixels))
                rows, columns = np.where(mask)
                box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
                annotations.append(dict(id=len(annotations) + 1, image_id=id, category_id=kind, bbox=box, area=int(mask.sum()), iscrowd=0,
                                        segmentation=[polygon] if len(annotations) % 2 else runs(mask)))
            if i == 1:
                mask = np.zeros((h, w), bool)
                mask[:10, :20] = True
                annotations.append(dict(id=len(annotations) + 1, image_id=id, category_id=7, bbox=[0, 0, 20, 10], area=200, iscrowd=1,
                                        segmentation=runs(mask)))
            image.save(folder / f"{part}2017" / f"{part}{i}.png")
        content = dict(images=images, annotations=annotations, categories=[dict(id=c, name=name) for c, name in SHAPES.items()])
        (folder / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
    return folder


# ------------------------------------------------------------------------------------------------------ whole runs

NET = ["--arch", "resnet18", "--model_kwargs", "channels=16,32,64,64", "layers=1,1,1,1"]
SMALL = ("--train_size 72 96 --test_size 84 --max_size 128 --anchors 16 24 36 --samples 32 16 --proposals 64 32 --batch_size 8 --lr 0.1 "
         "--warmup 10 --workers 0 --norm all").split()
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
    return draw(tmp_path_factory.mktemp("few") / "coco", dict(train=14, val=5), seed=1)


def config(data, *args):
    return eval_coco.parse([*map(str, [*NET, *SMALL, "--data", data, *args])])


def detector(cfg, classes=3):
    return eval_coco.build(cfg, classes, torch.device("cpu"))


def call(*args):
    """-> exit code of the program, as from the command line."""
    return mokd.main([*map(str, args)], "extras/eval_coco.py", eval_coco.parse, eval_coco.run)


def batch_of(images, n=4, epoch=0):
    """-> images and targets, as train has them."""
    x, targets, _ = zip(*(images[epoch, i] for i in range(n)))
    return list(x), [{k: v for k, v in t.items() if torch.is_tensor(v)} for t in targets]


def state_of(out):
    return torch.load(out / "checkpoint.pth", weights_only=True)


def same(a, b):
    """Two checkpoints, bit for bit: weights, statistics, momentum of the optimizer."""
    (net_a, optimizer_a), (net_b, optimizer_b) = a["models"], b["models"]
    assert a["step"] == b["step"] and net_a.keys() == net_b.keys()
    assert all(torch.equal(net_a[k], net_b[k]) for k in net_a)
    for i, s in optimizer_a["state"].items():
        assert torch.equal(s["momentum_buffer"], optimizer_b["state"][i]["momentum_buffer"])


def test_training_from_scratch_finds_the_shapes(tmp_path, capsys):
    """AP from nothing to a clear number, through the whole program; the same settings for 1,000 steps are in README."""
    data = draw(tmp_path / "coco", dict(train=200, val=40))
    args = [*NET, *SMALL, "--data", data, "--out"]
    assert call(*args, tmp_path / "before", "--iterations", 0) == 0
    assert call(*args, tmp_path / "after", "--iterations", 120) == 0
    before, after = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("before", "after"))
    assert before["box"]["AP50"] < 1 and before["mask"]["AP50"] < 1
    assert after["box"]["AP50"] > 15 and after["mask"]["AP50"] > 15
    assert "AP50" in capsys.readouterr().out
    records = [json.loads(line) for line in open(tmp_path / "after" / "log.jsonl")]
    assert [r["step"] for r in records] == [f"{s}/120" for s in range(20, 121, 20)]
    for key in ("loss", "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask", "lr", "images/s", "GB",
                "minutes_left"):
        assert key in records[0]
    assert records[0]["loss"] == pytest.approx(sum(v for k, v in records[0].items() if k.startswith("loss_")), rel=1e-4)
    assert records[-1]["loss_mask"] < 0.6 * records[0]["loss_mask"] and records[-1]["lr"] == pytest.approx(0.0005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on_bit_for_bit(number, few, tmp_path, capsys, monkeypatch):
    args = [*NET, *SMALL, *SHORT, "--data", few]
    assert call(*args, "--out", tmp_path / "whole") == 0
    rate = eval_coco.learning_rate

    def signalled(cfg, step):
        if step == 4:
            os.kill(os.getpid(), number)
        return rate(cfg, step)
    monkeypatch.setattr(eval_coco, "learning_rate", signalled)
    assert call(*args, "--out", tmp_path / "cut", "--log_every", 3) == 128 + number
    assert f"{number.name} after step 5" in capsys.readouterr().err and state_of(tmp_path / "cut")["step"] == 5
    monkeypatch.undo()
    torch.manual_seed(12345)   # what the process drew before has no say
    assert call(*args, "--out", tmp_path / "cut", "--workers", 2) == 0
    assert "at step 5" in capsys.readouterr().out
    same(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))
    results = [json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("whole", "cut")]
    assert results[0] == results[1]
    assert call(*args, "--out", tmp_path / "cut", "--seed", 1) == 2
    assert "--seed was 0, is 1" in capsys.readouterr().err


SYNC = """
import sys, torch, torch.nn as nn, mokd
sys.path.insert(0, "extras")
import eval_coco
device, rank, world = mokd.setup_processes()
torch.manual_seed(0)
xs = torch.randn(2, 3, 5, 6) * 2 + 1, torch.randn(4, 3, 2, 3)   # another number and size of maps for each process
net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
weights = [torch.randn(x.shape[0], 8, *x.shape[2:]) for x in xs]
reference = [p.clone() for p in net.parameters()]
if world > 1:
    eval_coco.sync_batch_norm(net, device)
    loss = (net(xs[rank]) * weights[rank]).sum()
else:   # an ordinary batch norm sees all pixels as one batch
    flat = lambda ts: torch.cat([t.movedim(1, 0).flatten(1) for t in ts], 1)[None, ..., None]
    loss = (net(flat(xs)) * flat(weights)).sum()
loss.backward()
values = [mokd.sum_over_processes(t) for t in (loss.detach(), *(p.grad for p in net.parameters()))] + [*net.buffers()][:2]
net.eval()
values.append(net(xs[0]).detach())
if rank == 0:
    torch.save(values, sys.argv[1])
if world > 1:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def python(nproc, *args):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    done = subprocess.run([sys.executable, *launch, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_batch_norm_of_two_processes_with_unlike_maps_equals_that_of_all_pixels(tmp_path):
    (tmp_path / "sync.py").write_text(SYNC)
    for n in (1, 2):
        python(n, tmp_path / "sync.py", tmp_path / str(n))
    for a, b in zip(*(torch.load(tmp_path / n, weights_only=True) for n in "12"), strict=True):
        assert torch.allclose(a, b, atol=2e-5), (a, b)


def test_two_processes_train_and_share_the_evaluation(few, tmp_path):
    """They start with the loss of one process but for the regions that each draws, and find what one process finds."""
    args = ["extras/eval_coco.py", *NET, *SMALL, *SHORT, "--data", few, "--log_every", 1, "--lr", 0.05, "--out"]
    python(2, *args, tmp_path / "two")
    python(1, *args, tmp_path / "one")
    logs = [[json.loads(line) for line in open(tmp_path / n / "log.jsonl")] for n in ("one", "two")]
    assert [len(log) for log in logs] == [8, 8]
    for k in ("loss_objectness", "loss_classifier"):
        assert logs[0][0][k] == pytest.approx(logs[1][0][k], rel=0.05)
    two = json.loads((tmp_path / "two" / "results.json").read_text())["results"]
    (tmp_path / "two" / "results.json").unlink()
    assert "at step 8" in python(1, *args, tmp_path / "two")   # has only to evaluate
    assert json.loads((tmp_path / "two" / "results.json").read_text())["results"] == two


# ------------------------------------------------------------------------------------------------------ evaluation

def truth(data, part="val"):
    return eval_coco.read_annotations(config(data), part)


def as_found(coco):
    """The objects as a detector would report them."""
    return [dict(image_id=a["image_id"], category_id=a["category_id"], score=0.9, bbox=a["bbox"], segmentation=coco.annToRLE(a))
            for a in coco.anns.values() if not a["iscrowd"]]


def test_a_perfect_detector_has_ap_100_and_its_errors_cost(few):
    coco = truth(few)
    found = as_found(coco)
    perfect = dict(AP=100, AP50=100, AP75=100)
    near = lambda r: {k: pytest.approx(v, abs=1e-6) for k, v in r.items()}
    assert eval_coco.average_precision(coco, found) == dict(box=near(perfect), mask=near(perfect))
    zero = dict(AP=0, AP50=0, AP75=0)
    assert eval_coco.average_precision(coco, []) == dict(box=zero, mask=zero)
    wrong = {7: 3, 3: 20, 20: 7}
    results = eval_coco.average_precision(coco, [d | dict(category_id=wrong[d["category_id"]]) for d in found])
    assert results["box"]["AP50"] < 5 and results["mask"]["AP50"] < 5
    (h, w), empty = found[0]["segmentation"]["size"], []
    for d in found:   # boxes right, masks of nothing
        h, w = d["segmentation"]["size"]
        empty.append(d | dict(segmentation=rle.encode(np.zeros((h, w), np.uint8, order="F"))))
    results = eval_coco.average_precision(coco, empty)
    assert results["box"] == near(perfect) and results["mask"] == zero
    moved = [d | dict(bbox=[d["bbox"][0] + 0.3 * d["bbox"][2], *d["bbox"][1:]]) for d in found]   # overlap of 0.7 / 1.3
    results = eval_coco.average_precision(coco, moved)
    assert results["box"]["AP50"] == pytest.approx(100) and results["box"]["AP75"] == 0 and results["mask"] == near(perfect)


def test_detect_brings_boxes_and_masks_back_to_the_files_pixels(few, tmp_path):
    """A net that knows the truth in pixels of the resized image, with its masks on 14 x 14 cells."""
    cfg, coco = config(few, "--test_size", 150, "--max_size", 170), truth(few)
    images, place = eval_coco.Images(coco, cfg, "val"), itertools.count()
    labels = {c: i for i, c in enumerate(sorted(coco.cats), 1)}

    def knows(x):
        info, (image,) = coco.dataset["images"][next(place)], x
        assert max(image.shape) <= 170 and (min(image.shape[1:]) == 150 or max(image.shape[1:]) == 170)
        objects = [a for a in coco.imgToAnns[info["id"]] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [F.interpolate(torch.from_numpy(coco.annToMask(a)[y:y + h, x:x + w])[None, None].float(), (14, 14), mode="area")[0]
                 for a in objects for x, y, w, h in [a["bbox"]]]
        scale = torch.tensor([image.shape[2] / info["width"], image.shape[1] / info["height"]] * 2)
        return [dict(boxes=boxes * scale, labels=torch.tensor([labels[a["category_id"]] for a in objects]).long(),
                     scores=torch.ones(len(objects)), masks=torch.stack(masks) if masks else torch.zeros(0, 1, 14, 14))]
    results = eval_coco.average_precision(coco, eval_coco.detect(knows, images, cfg, torch.device("cpu")))
    assert results["box"]["AP"] == pytest.approx(100)
    assert results["mask"]["AP75"] == pytest.approx(100) and results["mask"]["AP"] > 75   # what 14 x 14 cells can say


# ------------------------------------------------------------------------------------------------------ data

def test_a_training_image_carries_its_objects(few):
    """Masks, boxes and pixels agree, flipped or not; crowds and images without objects are left out; the file's run lengths and
    polygons become the same kind of mask."""
    cfg, coco = config(few), truth(few, "train")
    images = eval_coco.Images(coco, cfg, "train")
    assert len(images) == 13 and len(eval_coco.Images(truth(few), cfg, "val")) == 5
    objects = [a for a in coco.anns.values() if not a["iscrowd"]]
    assert sum(len(images[0, i][1]["labels"]) for i in range(13)) == len(objects)
    sides, flips = set(), set()
    for epoch, i in itertools.product(range(4), range(13)):
        image, t, readable = images[epoch, i]
        h, w = t["size"]
        sides.add(min(image.shape[1:]))
        assert readable and image.dtype == torch.uint8 and t["masks"].shape[1:] == (h, w)
        assert torch.allclose(t["scale"], torch.tensor([image.shape[2] / w, image.shape[1] / h] * 2))
        mine = [a for a in coco.imgToAnns[t["id"]] if not a["iscrowd"]]
        assert t["labels"].tolist() == [{3: 1, 7: 2, 20: 3}[a["category_id"]] for a in mine]
        assert t["masks"].flatten(1).sum(1).tolist() == [a["area"] for a in mine]
        small = F.interpolate(image[None].float(), (h, w), mode="bilinear", antialias=True)[0]
        file = mokd.read_image(f"{few}/train2017/{coco.imgs[t['id']]['file_name']}").float()
        flips.add(flip := bool((small.flip(-1) - file).abs().mean() < (small - file).abs().mean()))
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


# ------------------------------------------------------------------------------------------------------ detector

@pytest.mark.parametrize("arch, widths", [("resnet18", (256, 512)), ("resnet50", (1024, 2048))])
def test_strides_and_shapes_are_those_of_c4(arch, widths):
    cfg = eval_coco.parse(["--arch", arch, "--proposals", "8", "8", "--samples", "8", "8"])
    net = detector(cfg, 80).eval()
    shapes = {}
    for name, module in (("trunk", net.trunk), ("stage4", net.stage4), ("rpn", net.rpn.head), ("pool", net.pool)):
        module.register_forward_hook(lambda m, x, y, name=name: shapes.update({name: shapes.get(name, y)}))
    boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0], [16.0, 16.0, 96.0, 128.0]])
    anchors = net.rpn.anchor_generator
    with torch.no_grad():
        found = net([torch.randint(256, (3, 100, 150), dtype=torch.uint8), torch.randint(256, (3, 128, 64), dtype=torch.uint8)])
        map_ = torch.arange(24.0).view(1, 1, 4, 6)
        pooled = net.pool(map_, [boxes])
    assert shapes["trunk"].shape == (2, widths[0], 8, 10)   # of 128 x 160 pixels: stride 16
    assert shapes["pool"].shape[1:] == (widths[0], 14, 14) and shapes["stage4"].shape[1:] == (widths[1], 7, 7)
    (objectness,), (shifts,) = shapes["rpn"]
    assert objectness.shape == (2, 15, 8, 10) and shifts.shape == (2, 60, 8, 10)
    cells = anchors.cell_anchors[0]
    sides = (cells[:, 2:] - cells[:, :2]).prod(1).sqrt().view(3, 5)   # rounded to whole pixels
    assert torch.allclose(sides, torch.tensor([32.0, 64, 128, 256, 512]).expand(3, 5), rtol=0.02)
    assert net.roi.box_predictor.cls_score.out_features == 81 and net.roi.box_predictor.bbox_pred.out_features == 324
    assert net.roi.mask_predictor(torch.zeros(2, widths[1], 7, 7)).shape == (2, 81, 14, 14)
    assert [set(f) for f in found] == [{"boxes", "scores", "labels", "masks"}] * 2
    # cell (r, c) of the 14 x 14 is centered at pixel x1 + (c + 0.5) * width / 14, cell (i, j) of the map at 16 * j + 8
    x = ((torch.arange(14) + 0.5) * 80 / 14 + 16) / 16 - 0.5
    y = ((torch.arange(14) + 0.5) * 112 / 14 + 16) / 16 - 0.5
    inside = (x[None] <= 5) & (y[:, None] <= 3)
    assert torch.allclose(pooled[1, 0][inside], (6 * y[:, None] + x[None])[inside], atol=1e-4)
    first = net.stage4[0]
    assert (first.conv2 if arch == "resnet50" else first.conv1).stride == (2, 2)   # not in the 1 x 1: as torchvision's and timm's


def test_stage_4_runs_once_in_training_and_twice_in_test(few):
    cfg = config(few)
    net, calls = detector(cfg), []
    net.stage4.register_forward_hook(lambda m, x, y: calls.append(len(x[0])))
    x, targets = batch_of(eval_coco.Images(truth(few, "train"), cfg, "train"))
    losses = net.train()(x, targets)
    assert len(calls) == 1 and calls[0] <= 4 * 16
    assert {*losses} == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    net.eval()(x)
    assert len(calls) == 3


@pytest.mark.parametrize("norm", ["sync", "all", "frozen"])
def test_norms_that_stand_keep_weights_and_statistics(norm, few):
    cfg = config(few, "--norm", norm)
    net = detector(cfg).train()
    before = copy.deepcopy(net.state_dict())
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1).zero_grad()
    for step in range(2):
        losses = net(*batch_of(eval_coco.Images(truth(few, "train"), cfg, "train")))
        sum(losses.values()).backward()
        with torch.no_grad():
            for p in net.parameters():
                if p.requires_grad:
                    p -= 0.01 * p.grad
    kinds = {name: isinstance(m, torch.nn.BatchNorm2d) for name, m in net.named_modules()}
    moved = {name for name, v in net.state_dict().items() if kinds.get(name.rpartition(".")[0]) and not torch.equal(v, before[name])}
    norms = {f"{name}.{k}" for name, is_norm in kinds.items() if is_norm for k in ("weight", "bias", "running_mean", "running_var",
                                                                                  "num_batches_tracked")}
    stem = {k for k in norms if k.startswith("trunk.bn1.")}
    assert len(stem) == 5 and moved == dict(sync=norms - stem, all=norms, frozen=set())[norm]
    assert not torch.equal(net.trunk.conv1.weight, before["trunk.conv1.weight"])   # the convolutions are trained whatever the norms do
    assert not torch.equal(net.stage4[0].conv1.weight, before["stage4.0.conv1.weight"])


def test_masks_are_learned_in_the_files_pixels(few, monkeypatch):
    """The regions on objects, brought to the file's pixels, are compared with masks of that size."""
    cfg, seen = config(few, "--train_size", 140, 140, "--max_size", 300), []
    loss = eval_coco.roi_heads.maskrcnn_loss
    monkeypatch.setattr(eval_coco.roi_heads, "maskrcnn_loss", lambda *a: seen.append(a) or loss(*a))
    x, targets = batch_of(eval_coco.Images(truth(few, "train"), cfg, "train"))
    detector(cfg).train()(x, targets)
    (logits, regions, masks, labels, matches), = seen
    assert len(logits) == sum(map(len, regions)) > 0
    for r, m, match, t in zip(regions, masks, matches, targets):
        assert torch.equal(m, t["masks"]) and (r[:, [0, 2]].max() <= m.shape[2] + 1e-3) and (r[:, [1, 3]].max() <= m.shape[1] + 1e-3)
        own = t["boxes"] / t["scale"]
        overlap = torchvision.ops.box_iou(r, own)[range(len(r)), match]
        assert (overlap >= 0.5 - 1e-3).all() and (overlap > 0.999).any()   # the objects' own boxes are among the regions


def test_an_image_without_objects_gives_losses_and_every_gradient(few):
    """Also a whole batch of them; with a missing gradient two processes would wait for each other."""
    cfg = config(few)
    net = detector(cfg).train()
    image, target, _ = eval_coco.Images(truth(few, "train"), cfg, "train")[0, 0]
    empty = {k: v[:0] if k != "scale" else v for k, v in target.items() if torch.is_tensor(v)}
    losses = net([image, image], [empty, empty])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_mask"] == losses["loss_box_reg"] == 0
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def close(a, b):
    return abs(a - b) <= 0.15 * abs(b) + 0.02


def test_bf16_keeps_boxes_exact_and_losses_near(few):
    cfg = config(few)
    net = detector(cfg).train()
    x, targets = batch_of(eval_coco.Images(truth(few, "train"), cfg, "train"))
    inputs = []
    net.pool.register_forward_hook(lambda m, a, y: inputs.append(a))
    losses = {}
    for dtype in ("fp32", "bf16"):
        torch.manual_seed(0)
        with mokd.autocast(torch.device("cpu"), dtype):
            losses[dtype] = {k: v.detach() for k, v in net(x, targets).items()}
    for features, regions in inputs:
        assert features.dtype == torch.float and all(r.dtype == torch.float for r in regions)
    corners = torch.cat(inputs[1][1]).flatten()
    assert (corners != corners.bfloat16().float()).float().mean() > 0.3   # not on the grid of 8 bits
    for k, v in losses["fp32"].items():
        assert losses["bf16"][k].dtype == torch.float and close(losses["bf16"][k], v), k
    with mokd.autocast(torch.device("cpu"), "bf16"), torch.no_grad():
        found, = net.eval()(x[:1])
    assert all(found[k].dtype == torch.float for k in ("boxes", "scores", "masks"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint of mokd.py whose four nets, statistics included, all differ."""
    out = tmp_path_factory.mktemp("run")
    cfg = mokd.parse_args(("--arch1 resnet18 --model_kwargs1 channels=16,32,64,64 layers=1,1,1,1 --arch2 vit_tiny --model_kwargs2 img_size=32 "
                           "patch_size=8 embed_dim=24 depth=2 num_heads=2 --data toy --out_dim 32 --hidden_dim 16 --bottleneck_dim 8 "
                           f"--t_dim 24 --t_heads 2 --t_depth 1 --global_size 32 --local_size 16 --batch_size 8 --out {out}").split())
    models = mokd.build_models(cfg, torch.device("cpu"))
    for i, net in enumerate((models[0].net, models[0].momentum_net)):
        for name, b in net.named_buffers():
            if "running" in name:
                b.uniform_(0.5 + i, 1.5 + i)
    with torch.no_grad():
        for p in models[0].net.parameters():
            p += 0.01 * torch.randn_like(p)
    assert mokd.save(cfg, models, 1, torch.amp.GradScaler("cpu", enabled=False)) is None
    return out


def test_the_checkpoints_weights_arrive_in_trunk_and_stage_4(pretrained, few, monkeypatch):
    saved = torch.load(pretrained / "checkpoint.pth", weights_only=True)["models"][0]

    def arrived(net, weights):
        """Each tensor of the ResNet, statistics included, is in the detector."""
        own = net.state_dict()
        for name, v in weights.items():
            assert torch.equal(own[name.replace("layer4.", "stage4.") if name.startswith("layer4") else f"trunk.{name}"], v), name
        assert {k for k in own if k.split(".")[0] in ("trunk", "stage4")} == {
            k.replace("layer4.", "stage4.") if k.startswith("layer4") else f"trunk.{k}" for k in weights}
    part = lambda i: {k.removeprefix("backbone.model."): v for k, v in saved[i].items() if k.startswith("backbone.model.")}
    source = ["--checkpoint", pretrained / "checkpoint.pth", *SMALL, "--data", few]
    build = lambda *args: detector(eval_coco.parse([*map(str, args)]))
    arrived(build(*source), part(1))
    arrived(build(*source, "--net", "student"), part(0))
    assert not torch.equal(part(0)["layer4.0.conv1.weight"], part(1)["layer4.0.conv1.weight"])
    arrived(build(*NET, "--weights", pretrained / "model1.pth"), torch.load(pretrained / "model1.pth", weights_only=True))
    random = build(*NET).state_dict()
    assert not torch.equal(random["stage4.0.conv1.weight"], part(1)["layer4.0.conv1.weight"])
    create = timm.create_model

    def offline(name, pretrained_=False, **kw):   # weights that want images normalized by other numbers
        wanted = kw.pop("pretrained", pretrained_)
        model = create(name, **kw)
        if wanted:
            model.load_state_dict(torch.load(pretrained / "model1.pth", weights_only=True))
            model.pretrained_cfg = model.pretrained_cfg | dict(mean=(0.5,) * 3, std=(0.5,) * 3)
        return model
    monkeypatch.setattr(timm, "create_model", offline)
    net = build(*NET, "--pretrained")
    arrived(net, torch.load(pretrained / "model1.pth", weights_only=True))
    x = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    batch = net.batch([x, x[:, :30, :20]])
    assert batch.tensors.shape == (2, 3, 64, 64) and batch.image_sizes == [(40, 50), (30, 20)]
    assert torch.allclose(batch.tensors[0, :, :40, :50], (x / 255 - 0.5) / 0.5, atol=1e-5) and (batch.tensors[1, :, 30:] == 0).all()
    plain = build(*NET).batch([x]).tensors[0, :, :40, :50]
    assert torch.allclose(plain, (x / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
                          / torch.tensor([0.229, 0.224, 0.225])[:, None, None], atol=1e-5)


def test_the_schedule_is_a5s():
    cfg = eval_coco.parse(["--arch", "resnet50"])
    rate = lambda step, c=cfg: eval_coco.learning_rate(c, step)
    assert (cfg.iterations, cfg.batch_size, cfg.train_size, cfg.test_size) == (180000, 16, (600, 800), 800)
    assert rate(0) == pytest.approx(2e-5) and rate(500) == pytest.approx(0.01, rel=1e-2) and rate(1000) == 0.02
    assert [rate(s) for s in (119999, 120000, 159999, 160000, 179999)] == pytest.approx([0.02, 0.002, 0.002, 0.0002, 0.0002])
    assert rate(5000, eval_coco.parse(["--arch", "resnet50", "--batch_size", "8"])) == 0.01
    assert rate(0, eval_coco.parse(["--arch", "resnet50", "--warmup", "0"])) == 0.02


def test_weight_decay_and_every_size_reach_their_places(few, tmp_path, monkeypatch):
    made = []
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda groups, **kw: made.append((groups, kw)) or sgd(groups, **kw))
    cfg = config(few, *SHORT, "--iterations", 1, "--weight_decay", 0.3, "--norm", "frozen", "--out", tmp_path)
    eval_coco.run(cfg)
    (decayed, spared), options = made[0]
    assert decayed["weight_decay"] == 0.3 and spared["weight_decay"] == 0 and options["momentum"] == 0.9
    assert all(p.dim() > 1 for p in decayed["params"]) and all(p.dim() < 2 for p in spared["params"])
    net = detector(config(few, "--anchors", 10, 20, "--samples", 11, 12, "--proposals", 13, 14))
    assert net.rpn.anchor_generator.sizes == ((10, 20),) and net.rpn.head.cls_logits.out_channels == 6
    assert net.rpn.fg_bg_sampler.batch_size_per_image == 11 and net.roi.fg_bg_sampler.batch_size_per_image == 12
    assert net.train().rpn.post_nms_top_n() == 13 and net.eval().rpn.post_nms_top_n() == 14


# ------------------------------------------------------------------------------------------------------ what goes wrong

def fails(capsys, code, *args):
    """-> the sentence with which the program ends."""
    assert call(*args) == code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("extras/eval_coco.py: ")
    return message


@pytest.mark.parametrize("args, words", [
    ([], "--checkpoint FILE or --arch"), (["--arch", "resnet18", "--checkpoint", "x"], "either --checkpoint"),
    (["--checkpoint", "nowhere.pth"], "nowhere.pth"), (["--checkpoint", "HERE", "--weights", "x"], "--weights"),
    (["--checkpoint", "HERE", "--model", "2"], "--model 2 vit_tiny"), (["--arch", "vit_tiny"], "--arch vit_tiny"),
    (["--arch", "efficientnet_b0"], "strides 4, 8, 16 and 32"), (["--arch", "resnet99"], "resnet99"),
    (["--arch", "resnet18", "--model_kwargs", "output_stride=16"], "strides 4, 8, 16 and 32"),
    (["--arch", "resnet34", "--weights", "MODEL"], "does not fit resnet34"),
    (["--arch", "resnet18", "--train_size", "800", "600"], "--train_size"), (["--arch", "resnet18", "--samples", "0", "1"], "--samples 0"),
    (["--arch", "resnet18", "--batch_size", "99"], "only 13 images"), (["--arch", "resnet18", "--data", "nowhere"], "nowhere"),
    (["--arch", "resnet18", "--out", "/dev/null/x"], "/dev/null/x")])
def test_what_eval_coco_cannot_do_is_said(args, words, few, pretrained, tmp_path, capsys):
    args = [{"HERE": pretrained / "checkpoint.pth", "MODEL": pretrained / "model1.pth"}.get(a, a) for a in args]
    more = ["--workers", 0] + ([] if "--data" in args else ["--data", few]) + ([] if "--out" in args else ["--out", tmp_path / "o"])
    more += [] if "--batch_size" in args else ["--batch_size", 2]
    assert words in fails(capsys, 2, *more, *args)


def changed(few, to, change, part="train"):
    """A copy of a data set after change(content of its annotations)."""
    shutil.copytree(few, to)
    file = to / "annotations" / f"instances_{part}2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return to


@pytest.mark.parametrize("change, words", [
    (lambda c: c["annotations"][3].update(category_id=99), "category 99"), (lambda c: c["annotations"][3].update(image_id=5), "image 5"),
    (lambda c: c["annotations"][3].update(bbox=[1, 2, 3]), "instances_train2017.json"), (lambda c: c.pop("categories"), "COCO's format"),
    (lambda c: c["annotations"][3].pop("iscrowd"), "iscrowd"), (lambda c: c["images"][3].pop("width"), "width"),
    (lambda c: c["categories"].append(dict(id=21, name="star")), "other categories"),
    (lambda c: c["images"][0].update(file_name="gone.png"), "gone.png")])
def test_annotations_that_are_not_coco_s_are_named(change, words, few, tmp_path, capsys):
    data = changed(few, tmp_path / "data", change)
    assert words in fails(capsys, 2, *NET, *SMALL, "--data", data, "--out", tmp_path / "o")


def test_a_damaged_or_missing_file_of_annotations_is_named(few, tmp_path, capsys):
    data = changed(few, tmp_path / "data", lambda content: None)
    args = [*NET, *SMALL, "--data", data, "--out", tmp_path / "o"]
    file = data / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text()[:1000])
    assert "instances_val2017.json is not in COCO's format" in fails(capsys, 2, *args)
    file.unlink()
    assert "instances_val2017.json cannot be read" in fails(capsys, 2, *args)


def test_degenerate_boxes_are_left_out(few, tmp_path, capsys):
    def change(content):
        boxes = [a for a in content["annotations"] if not a["iscrowd"]][:3]
        for a, box in zip(boxes, ([5, 5, 0, 9], [500, 5, 9, 9], [-30, 5, 20, 9])):
            a["bbox"] = box
    data = changed(few, tmp_path / "data", change)
    count = lambda d: sum(len(t["labels"]) for images in [eval_coco.Images(truth(d, "train"), config(d), "train")]
                          for _, t, _ in (images[0, i] for i in range(len(images))))
    assert count(data) == count(few) - 3


def test_images_that_cannot_be_read_are_named_and_too_many_stop_the_run(few, tmp_path, capsys):
    data = changed(few, tmp_path / "data", lambda content: content["annotations"][-1].update(segmentation="what?"))
    (data / "train2017" / "train4.png").write_bytes(b"no image")
    Image.new("RGB", (30, 20)).save(data / "train2017" / "train6.png")
    images = eval_coco.Images(truth(data, "train"), config(data), "train")
    lost = [i for i in range(13) if not images[0, i][2]]
    message = capsys.readouterr().err
    assert len(lost) == 3 and all(word in message for word in ("train4.png", "train6.png", "30 x 20 pixels", "train13.png"))
    image, target, _ = images[0, lost[0]]
    assert (image == 0).all() and len(target["boxes"]) == len(target["masks"]) == 0
    args = [*NET, *SMALL, *SHORT, "--data", data, "--out", tmp_path / "o"]
    assert "more than 1 %" in fails(capsys, 1, *args)


def test_an_unreadable_test_image_is_named_and_stops_the_evaluation(few, tmp_path, capsys):
    data = changed(few, tmp_path / "data", lambda content: None)
    (data / "val2017" / "val3.png").write_bytes(b"no image")
    assert call(*NET, *SMALL, *SHORT, "--data", data, "--out", tmp_path / "o", "--iterations", 1) == 1
    message = capsys.readouterr().err
    assert "val3.png" in message and "test image named above" in message
    assert state_of(tmp_path / "o")["step"] == 1   # training was not for nothing


@pytest.mark.parametrize("every, words", [(2, "step 5: loss"), (1, "step 4: weights not finite")])
def test_what_is_not_finite_stops_the_run_and_is_never_saved(every, words, few, tmp_path, capsys, monkeypatch):
    args = [*NET, *SMALL, *SHORT, "--data", few, "--out", tmp_path, "--save_every", every, "--log_every", 100]
    rate = eval_coco.learning_rate
    monkeypatch.setattr(eval_coco, "learning_rate", lambda cfg, step: 1e30 if step >= 4 else rate(cfg, step))
    message = fails(capsys, 1, *args)
    assert words in message and "not finite" in message and "--lr" in message
    state = state_of(tmp_path)
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["models"][0].values())


def test_missing_pycocotools_is_said(few, monkeypatch, capsys):
    monkeypatch.setattr(eval_coco, "rle", None)
    assert "pip install -r extras/requirements.txt" in fails(capsys, 2, *NET, "--data", few)
    code = "import sys; sys.modules['pycocotools'] = None; sys.argv = ['x', '--help']; sys.path.insert(0, 'extras'); " \
           "import mokd, eval_coco; mokd.main(['--arch', 'resnet18'], 'x', eval_coco.parse, eval_coco.run)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "x: pycocotools is missing: pip install -r extras/requirements.txt"


def test_help_names_every_setting_with_its_source():
    text = python(1, "extras/eval_coco.py", "--help")
    for f in dataclasses.fields(eval_coco.Config):
        assert f"--{f.name} " in text
    for source in ("A.5", "Table 6", "SEED", "detectron2", "He et al."):
        assert source in " ".join(text.split())
