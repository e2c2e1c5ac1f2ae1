"""Tests of eval_coco.py, on images that they draw.

    python -m pytest -q extras/test_coco.py
"""
import json, math, os, subprocess, sys   # noqa: E401

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths
from torchvision.datasets import CocoDetection

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import eval_coco   # puts the folder of mokd.py on the path
import mokd

CPU = torch.device("cpu")
NET = "--arch resnet18 --model_kwargs channels=16,32,64,64 layers=1,1,1,1".split()
SMALL = ("--train_size 72 96 --test_size 84 --max_size 128 --anchors 16 24 36 --regions 32 --batch_size 4 "
         "--lr 0.1 --warmup 5 --workers 0 --log_every 1").split()

def draw_object(g, h, w):
    """-> annotation of a rectangle or a diamond; mask."""
    category = int(g.choice([3, 7]))   # ids as COCO's, with gaps
    width, height = g.integers(24, 48, 2).tolist()
    x, y = int(g.integers(0, w - width)), int(g.integers(0, h - height))
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    if category == 7:
        corners = [x + width / 2, y, x + width, y + height / 2, x + width / 2, y + height, x, y + height / 2]
    mask = run_lengths.decode(run_lengths.merge(run_lengths.frPyObjects([corners], h, w))).astype(bool)
    box = [x, y, width, height]
    return dict(category_id=category, bbox=box, area=int(mask.sum()), segmentation=[corners]), mask

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bright objects on gray noise, in COCO's format. The first image has none, the second only a crowd."""
    folder = tmp_path_factory.mktemp("coco")
    g = np.random.default_rng(0)
    os.makedirs(folder / "annotations")
    for part, n in ("train", 40), ("val", 8):
        os.makedirs(f"{folder}/{part}2017")
        images, annotations = [], []
        for i in range(n):
            h, w = 72, 96
            pixels = g.integers(60, 140, (h, w, 3), dtype=np.uint8)
            annotation, mask = draw_object(g, h, w)
            if i > 0:
                pixels[mask] = g.integers(180, 256, 3)
                annotations.append(annotation | dict(id=i, image_id=100 + i, iscrowd=int(i == 1)))
            Image.fromarray(pixels).save(f"{folder}/{part}2017/{i}.png")
            images.append(dict(id=100 + i, file_name=f"{i}.png", height=h, width=w))
        content = dict(info={}, images=images, annotations=annotations,
                       categories=[dict(id=3, name="rectangle"), dict(id=7, name="diamond")])
        with open(f"{folder}/annotations/instances_{part}2017.json", "w") as f:
            json.dump(content, f)
    return folder

def config(data, *args):
    cfg = eval_coco.parse([str(a) for a in [*NET, *SMALL, "--data", data, *args]])
    mokd.join_processes(cfg)
    return cfg

def images_of(cfg, part):
    return eval_coco.open_coco(eval_coco.TrainingImages if part == "train" else CocoDetection, cfg, part)

# ------------------------------------------------------------------------------------------------- evaluation
def net_that_knows(cfg, images):
    """Its heads find the true objects of one image after the other, with masks of 14 x 14 cells."""
    net, ids = eval_coco.build(cfg, 2, CPU), iter(images.ids)

    def find(features, regions, sizes, targets):
        annotations = [a for a in images.coco.imgToAnns[next(ids)] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes *= 84 / 72   # --test_size over the height of the file
        labels = torch.tensor([{3: 1, 7: 2}[a["category_id"]] for a in annotations]).long()
        of_file = torch.zeros(max(1, len(annotations)), 72, 96)
        for mask, a in zip(of_file, annotations):
            mask.copy_(torch.from_numpy(images.coco.annToMask(a)))
        masks = eval_coco.mask_targets(of_file, boxes, torch.arange(len(boxes)), sizes[0])[:, None]
        return [dict(boxes=boxes, scores=torch.ones(len(boxes)), labels=labels, masks=masks)], {}
    net.roi_heads.forward = find
    return net

def test_boxes_and_masks_come_back_to_the_files_pixels_and_errors_cost(data, capsys):
    """True masks are cut into cells and pasted again. By torchvision's own functions their AP is about 80."""
    cfg = config(data)
    images = images_of(cfg, "val")
    found = eval_coco.detect(net_that_knows(cfg, images), images, cfg, CPU)
    results = eval_coco.average_precision(images.coco, found)
    assert results["box"] == {name: pytest.approx(100) for name in ("AP", "AP50", "AP75")}
    assert results["mask"]["AP75"] == pytest.approx(100) and results["mask"]["AP"] > 95
    for detection in found:
        x, y, w, h = detection["bbox"]
        detection["bbox"] = [x + 0.3 * w, y, w, h]   # it overlaps by 0.7 / 1.3
    moved = eval_coco.average_precision(images.coco, found)
    assert moved["box"]["AP50"] == pytest.approx(100) and moved["box"]["AP75"] == 0
    assert moved["mask"] == results["mask"]
    assert eval_coco.average_precision(images.coco, [])["mask"] == dict(AP=0, AP50=0, AP75=0)
    images.ids *= 13   # so many that the evaluation says how far it is
    eval_coco.detect(net_that_knows(cfg, images), images, cfg, CPU)
    assert "test images: 100 of 104" in capsys.readouterr().out

@pytest.mark.parametrize("x, y", [(3, 5), (0, 0), (16, 6)])
def test_a_box_of_14_pixels_has_a_cell_for_each(x, y):
    masks = (torch.rand(2, 20, 30, generator=mokd.generator("masks")) < 0.5).to(torch.uint8)
    box = torch.tensor([[x, y, x + 14, y + 14]]).float()
    cells = eval_coco.mask_targets(masks, 2 * box, torch.tensor([1]), (40, 60))   # an image twice as large
    inside = masks[1, y:y + 14, x:x + 14]
    assert torch.allclose(cells[0], inside.float(), atol=1e-5)
    pasted = eval_coco.paste_masks(cells[None], box, (20, 30))[0, 0] >= 0.5
    assert torch.equal(pasted[y:y + 14, x:x + 14], inside.bool()) and pasted.sum() == inside.sum()

# ------------------------------------------------------------------------------------------------------- data
def test_a_training_image_carries_its_objects(data):
    cfg = config(data)
    images = images_of(cfg, "train")
    assert len(images) == 38   # of 40: an image without objects, and a crowd, do not teach
    flipped = 0
    for i in range(len(images)):
        image, target = images[0, i]
        annotation, = images.coco.imgToAnns[images.ids[i]]
        mask = target["masks_of_file"][0]
        assert image.shape == (3, 72, 96) and mask.sum() == annotation["area"]
        assert target["labels"].tolist() == [{3: 1, 7: 2}[annotation["category_id"]]]
        rows, columns = torch.where(mask)
        around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (target["boxes"][0] - around).abs().max() <= 1.5   # a diamond's tip is less than a pixel
        inside = image[:, mask.bool()]
        assert (inside == inside[:, :1]).all()   # one color
        flipped += not np.array_equal(mask, images.coco.annToMask(annotation))
    assert 8 < flipped < 30

# --------------------------------------------------------------------------------------------------- detector
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_box_and_mask_heads_share_layer4(dtype, data):
    cfg = config(data, "--dtype", dtype)
    net, calls, pooled = eval_coco.build(cfg, 2, CPU), [], []
    layer4 = net.roi_heads.box_head
    for module in (net.backbone, layer4):
        module.register_forward_hook(lambda module, args, y: calls.append((args[0].shape, y.shape)))
    net.roi_heads.box_roi_pool.register_forward_hook(lambda module, args, y: pooled.append(args))
    images = images_of(cfg, "train")
    x, targets = zip(*[images[0, i] for i in range(4)])
    x = [image.float() / 255 for image in x]
    losses = net.train()(x, targets)
    (image, features), (cells, maps) = calls   # in training layer4 runs once
    assert features == (4, 64, image[2] // 16, image[3] // 16)
    assert cells[1:] == (64, 14, 14) and maps[1:] == (64, 7, 7) and cells[0] <= 4 * 32
    assert len(losses) == 5 and losses["loss_mask"].item() == pytest.approx(math.log(2), abs=0.02)
    for name in ("loss_classifier", "loss_box_reg", "loss_mask"):
        gradient, = torch.autograd.grad(losses[name], layer4[0][0].conv1.weight, retain_graph=True)
        assert gradient.abs().sum() > 0
    net.eval()(x[:1])
    assert len(calls) == 2 + 3   # in test a second time, for masks of the final boxes
    features, (regions,) = pooled[1]
    assert features.dtype == regions.dtype == torch.float   # and not rounded to 8 bits on the way
    assert (regions != regions.bfloat16()).float().mean() > 0.3

def test_regions_are_pooled_at_the_right_place(data):
    """On a map that holds its own coordinates. Cell j of the map is centered at pixel 16 j + 8."""
    pool = eval_coco.build(config(data), 2, CPU).roi_heads.box_roi_pool
    columns = torch.arange(12.0).expand(1, 1, 12, 12)
    cells = pool(columns, [torch.tensor([[32.0, 32.0, 144.0, 144.0]])])[0, 0, 0]
    centers = 32 + (torch.arange(14) + 0.5) * 112 / 14
    assert torch.allclose(cells, (centers - 8) / 16, atol=1e-4)

def test_a_runs_weights_arrive_in_trunk_and_layer4(tmp_path):
    """Those of a momentum net that differs from the student, also in statistics."""
    cfg = mokd.parse_args(["--demo", "--out", str(tmp_path)])
    models = mokd.build_models(cfg, CPU)
    for value in models[0].n_.state_dict().values():
        if value.is_floating_point():
            value.mul_(1 + 0.1 * torch.rand_like(value))
    mokd.save(cfg, models, 1, torch.amp.GradScaler(enabled=False), range(8))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = models[0].n_.backbone.eval().model.forward_features(x)
    arch = mokd.DEMO1.replace("1 ", " ", 2)   # --arch and --model_kwargs
    runs = []
    for source in f"--checkpoint {tmp_path}/checkpoint.pth", f"{arch} --weights {tmp_path}/model1.pth":
        cfg = eval_coco.parse([*source.split(), "--dtype", "fp32"])
        net = eval_coco.build(cfg, 80, CPU).eval()
        with torch.no_grad():
            found = net.roi_heads.box_head(net.backbone(x))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        # This ResNet's maps have stride 8, and regions are pooled from them at that scale.
        assert net.roi_heads.box_roi_pool.spatial_scale == 1 / 8
        runs.append(cfg.run)
    assert runs[0]["out"] == str(tmp_path) and runs[1] is None

# --------------------------------------------------------------------------------------------------- training
def test_the_recipe_is_a5s():
    cfg = eval_coco.parse(["--arch", "resnet34"])
    assert (cfg.iterations, cfg.batch_size, cfg.train_size, cfg.test_size) == (180000, 16, (600, 800), 800)
    rates = {0: 2e-5, 500: 0.01001, 1000: 0.02, 119999: 0.02, 120000: 0.002, 159999: 0.002, 160000: 2e-4}
    for step, rate in rates.items():
        assert eval_coco.learning_rate(cfg, step) == pytest.approx(rate)

def test_training_learns_and_goes_on_where_it_was_cut(data, tmp_path, monkeypatch, capsys):
    args = [*NET, *SMALL, *"--iterations 30 --save_every 8 --data".split(), str(data), "--out", str(tmp_path)]
    rate = eval_coco.learning_rate

    def cut(cfg, step):
        if step == 11:
            raise KeyboardInterrupt
        return rate(cfg, step)
    monkeypatch.setattr(eval_coco, "learning_rate", cut)
    with pytest.raises(KeyboardInterrupt):
        mokd.main(args, eval_coco.parse, eval_coco.run)
    monkeypatch.undo()
    mokd.main(args, eval_coco.parse, eval_coco.run)
    text = capsys.readouterr().out
    assert "at step 8" in text and "minutes_left" in text and "AP50" in text
    records = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [r["step"] for r in records] == [*range(12), *range(8, 31)]
    starts = [r for r in records if "settings" in r]
    assert [(r["step"], r["settings"]["lr"], r["run"]) for r in starts] == [(0, 0.1, None), (8, 0.1, None)]
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[8:11] == pytest.approx(losses[11:14], rel=1e-3)   # steps 9 to 11, before and after
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert {*json.loads((tmp_path / "results.json").read_text())["results"]} == {"box", "mask"}
    with pytest.raises(SystemExit):
        mokd.main([*args, "--seed", "1"], eval_coco.parse, eval_coco.run)
    mokd.main([*args, *f"--iterations 2 --log_every 0 --save_every 0 --out {tmp_path}/silent".split()],
              eval_coco.parse, eval_coco.run)
    assert len(open(tmp_path / "silent" / "log.jsonl").readlines()) == 1   # the settings

def test_two_processes_train_together(data, tmp_path):
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
    args = [*NET, *SMALL, "--data", data, "--out", tmp_path, "--iterations", "2"]
    done = subprocess.run([*torchrun, eval_coco.__file__, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "processes: 2" in done.stdout and done.stdout.count("AP75") == 1
    assert len(open(tmp_path / "log.jsonl").readlines()) == 3   # the settings, two steps
