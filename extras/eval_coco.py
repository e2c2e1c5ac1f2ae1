"""Mask R-CNN C4 on COCO (A.5, Table 6): boxes and masks by a ResNet that is fine-tuned as a whole.

    python extras/eval_coco.py --checkpoint runs/resnet50-resnet34/checkpoint.pth --model 2 --data coco
    torchrun --nproc_per_node=8 extras/eval_coco.py --arch resnet34 --weights model2.pth --data coco

The trunk, stem to layer3, makes one map of stride 16, on which the RPN proposes regions. layer4 sees 14 x 14
cells of each region, for boxes and masks (C4, He et al., 2017). The parts are torchvision's MaskRCNN. Where
its choices move pixels or statistics, detectron2's are taken, because A.5 used it. What still differs:

- Box losses are smooth L1 with beta 1/9, there L1. Biases have no weight decay.
- A cell's mask target is the part of it that the mask covers, there 0 or 1.
- Batch norms are trained, on several GPUs with statistics of all, as in MoCo's detector; there they are
  frozen, with stem and layer1. A.5 does not say. MoCo's batch norm after layer4 is left out.
- A batch may hold images of unlike shapes.
"""
import contextlib, io, json, math, os, sys, time   # noqa: E401
from dataclasses import asdict, dataclass
from types import MethodType, SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))   # where mokd.py is
import mokd   # before torch
import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from pycocotools import mask as run_lengths
from pycocotools.cocoeval import COCOeval
from timm.optim import param_groups_weight_decay
from torch.utils.data import Subset
from torchvision.datasets import CocoDetection
from torchvision.models.detection import MaskRCNN, faster_rcnn, mask_rcnn, roi_heads, rpn, transform
from torchvision.ops import RoIAlign, roi_align

import eval_knn
from mokd import RANK, WORLD, changeable, flag, say

@dataclass
class Config:
    """Every setting with its source. Config() is A.5's recipe."""
    checkpoint: str = flag("", "checkpoint.pth of a run of mokd.py, for its momentum net")
    model: str = flag("1", "which of its models; it must be a ResNet", choices=("1", "2"))
    arch: str = flag("", "in place of --checkpoint a ResNet of timm's, such as resnet34 [Table 6]")
    weights: str = flag("", "weights for --arch: a model1.pth, or a file of timm, torchvision, DINO, MoCo")
    model_kwargs: dict = flag(None, "arguments of timm.create_model for --arch")

    data: str = changeable("coco", "folder with train2017/, val2017/ and annotations/")
    train_size: tuple[int, int] = flag((600, 800), "range of a training image's shorter side, pixels [A.5]")
    test_size: int = flag(800, "shorter side of a test image, pixels [A.5]")
    max_size: int = flag(1333, "longer side at most, pixels [detectron2]")
    workers: int = changeable(4, "loaders of each process; each comes to hold all annotations, about 2 GB")

    anchors: tuple[int, ...] = flag((32, 64, 128, 256, 512), "sides of anchors, pixels [detectron2]")
    regions: int = flag(512, "regions of an image in the losses [detectron2]; lower it to save memory")
    iterations: int = flag(180000, "steps [A.5]; 0: evaluate only")
    batch_size: int = flag(16, "images of a step over all processes [detectron2]")
    lr: float = changeable(0.02, "rate of SGD for batches of 16 [A.5]; lower it if losses are not finite")
    warmup: int = changeable(1000, "steps in which the rate rises [detectron2]")

    out: str = changeable("", "folder of results; unset: beside the checkpoint, or runs/coco-ARCH")
    seed: int = flag(0, "seed of everything that is drawn")
    dtype: str = changeable("auto", "of trunk and layer4; auto: bf16, fp16 on older GPUs, fp32 on the CPU",
                            choices=("auto", "bf16", "fp16", "fp32"))
    log_every: int = changeable(20, "steps between log lines; 0: none")
    save_every: int = changeable(2500, "steps between checkpoints, from which the same command goes on; 0:"
                                       " one at the end")
    run = None   # no flag: settings and step of the checkpoint's run

def parse(argv=None):
    cfg = mokd.read_flags(Config, argv, __doc__.split("\n\n")[0])
    if 0 in (cfg.batch_size, cfg.regions, cfg.test_size, cfg.max_size, *cfg.train_size, *cfg.anchors):
        mokd.stop("--batch_size, --regions, --anchors and sizes must be more than 0")
    if not cfg.out:
        run = os.path.dirname(cfg.checkpoint)
        cfg.out = os.path.join(run, f"coco{cfg.model}") if cfg.checkpoint else f"runs/coco-{cfg.arch}"
    return cfg

# ------------------------------------------------------------------------------------------------------- data
def open_coco(kind, cfg, part):
    """CocoDetection, or a class made of it, of "train" or "val", with images (3, h, w) uint8."""
    file = f"{cfg.data}/annotations/instances_{part}2017.json"
    with contextlib.redirect_stdout(io.StringIO()):   # pycocotools prints
        return kind(f"{cfg.data}/{part}2017", file, transform=mokd.to_rgb)

class TrainingImages(CocoDetection):
    """(epoch, index) -> image, target: boxes (n, 4), x1 y1 x2 y2; labels (n,) from 1, in the order of their
    ids; masks_of_file (n, h, w) uint8. Half are flipped. Crowds and images without objects do not teach."""
    seed = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.categories = sorted(self.coco.cats)
        self.ids = [i for i in self.ids if self.objects(self.coco.imgToAnns[i])]

    def objects(self, annotations):
        return [a for a in annotations if not a["iscrowd"] and min(a["bbox"][2:]) > 0]

    def __getitem__(self, key):
        image, annotations = super().__getitem__(key[1])
        annotations = self.objects(annotations)
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([1 + self.categories.index(a["category_id"]) for a in annotations])
        masks = torch.from_numpy(np.stack([self.coco.annToMask(a) for a in annotations]))
        if torch.rand((), generator=mokd.generator(self.seed, "flip", *key)) < 0.5:
            image = image.flip(-1)
            masks = masks.flip(-1)
            boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
        return image, dict(boxes=boxes, labels=labels, masks_of_file=masks)

# --------------------------------------------------------------------------------------------------- detector
def mask_targets(masks, boxes, matches, size):
    """Masks (n, h, w) of a file; boxes (r, 4) in the image that was resized to `size`; which mask each has
    (r,) -> (r, 14, 14), the part of each cell that is covered. Pixel i reaches from i to i + 1, as in
    detectron2; torchvision is half a pixel off, here, in pooling and in pasting."""
    h, w = masks.shape[1:]
    scale = boxes.new_tensor([w / size[1], h / size[0], w / size[1], h / size[0]])
    rows = torch.cat([matches[:, None].to(boxes), boxes * scale], 1)
    return roi_align(masks[:, None].to(boxes), rows, 14, aligned=True)[:, 0]

def paste_masks(masks, boxes, size):
    """Probabilities (n, 1, 14, 14) in boxes (n, 4) -> (n, 1, h, w). A pixel reads them at its center."""
    h, w = size
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    x = (torch.arange(w, device=boxes.device) + 0.5 - x1) / (x2 - x1)   # (n, w), from 0 to 1 in the box
    y = (torch.arange(h, device=boxes.device) + 0.5 - y1) / (y2 - y1)
    grid = torch.stack([x[:, None].expand(-1, h, -1), y[:, :, None].expand(-1, -1, w)], -1)
    return F.grid_sample(masks, 2 * grid - 1, align_corners=False)

transform.paste_masks_in_image = paste_masks   # where MaskRCNN looks for it

class Layers(nn.Sequential):
    """Layers of the ResNet, under autocast. What leaves them is fp32, because 16 bits would round boxes to
    several pixels."""
    def __init__(self, dtype, *layers):
        super().__init__(*layers)
        self.dtype = dtype

    def forward(self, x):
        with mokd.autocast(x.device, self.dtype):
            return super().forward(x).float()

def forward_heads(heads, features, regions, sizes, targets=None):
    """In place of RoIHeads.forward, which in training would run layer4 a second time for the masks, with
    other batch statistics. R is the regions of a batch."""
    if heads.training:
        regions, matches, labels, box_targets = heads.select_training_samples(regions, targets)
    y = heads.box_head(heads.box_roi_pool(features["0"], regions))   # (R, C, 7, 7)
    logits, shifts = heads.box_predictor(y.mean((2, 3)))   # (R, 1 + classes), and four for each
    if not heads.training:   # masks are made for the final boxes
        boxes, scores, labels = heads.postprocess_detections(logits, shifts, regions, sizes)
        y = heads.mask_head(heads.box_roi_pool(features["0"], boxes))
        masks = roi_heads.maskrcnn_inference(heads.mask_predictor(y), labels)
        found = zip(boxes, scores, labels, masks)
        return [dict(boxes=b, scores=s, labels=l, masks=m) for b, s, l, m in found], {}

    # A mask is learned by the regions on objects, in the layer of the object's label.
    class_loss, box_loss = roi_heads.fastrcnn_loss(logits, shifts, labels, box_targets)
    wanted = []
    for target, boxes, match, label, size in zip(targets, regions, matches, labels, sizes):
        on_object = label > 0
        wanted.append(mask_targets(target["masks_of_file"], boxes[on_object], match[on_object], size))
    labels = torch.cat(labels)
    masks = heads.mask_predictor(y[labels > 0])
    masks = masks[torch.arange(len(masks)), labels[labels > 0]]
    mask_loss = F.binary_cross_entropy_with_logits(masks, torch.cat(wanted))
    return [], dict(loss_classifier=class_loss, loss_box_reg=box_loss, loss_mask=mask_loss)

def build(cfg, classes, device):
    """-> MaskRCNN on the momentum net of --checkpoint, or on --arch."""
    names = "checkpoint", "model", "arch", "weights", "model_kwargs", "seed"
    source = eval_knn.Source(**{name: getattr(cfg, name) for name in names})
    backbone, = eval_knn.load_backbones(source).values()
    cfg.run = source.run
    resnet = backbone.model
    torch.manual_seed(mokd.seed_of(cfg.seed, "detector"))
    trunk = Layers(cfg.dtype, resnet.conv1, resnet.bn1, resnet.act1, resnet.maxpool,
                   resnet.layer1, resnet.layer2, resnet.layer3)
    layer4 = Layers(cfg.dtype, resnet.layer4)
    layer3_info, layer4_info = resnet.feature_info[-2:]
    trunk.out_channels, channels = layer3_info["num_chs"], layer4_info["num_chs"]
    box = faster_rcnn.FastRCNNPredictor(channels, classes + 1)
    mask = mask_rcnn.MaskRCNNPredictor(channels, 256, classes + 1)
    low, high = cfg.train_size
    net = MaskRCNN(trunk, min_size=tuple(range(low, high + 1)), max_size=cfg.max_size,
                   rpn_anchor_generator=rpn.AnchorGenerator((cfg.anchors,), ((0.5, 1.0, 2.0),)),
                   rpn_pre_nms_top_n_train=12000, rpn_pre_nms_top_n_test=6000,   # as C4 has it
                   box_head=layer4, box_predictor=box, box_batch_size_per_image=cfg.regions,
                   mask_head=layer4, mask_predictor=mask)
    net.roi_heads.box_roi_pool = RoIAlign(14, 1 / layer3_info["reduction"], sampling_ratio=0, aligned=True)
    net.roi_heads.mask_roi_pool = None   # forward_heads pools once
    net.roi_heads.forward = MethodType(forward_heads, net.roi_heads)

    # detectron2's first weights. With torchvision's the mask logits are large, and their loss starts at 2.
    for layer, std in ((box.cls_score, 0.01), (box.bbox_pred, 0.001), (mask.mask_fcn_logits, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(mask.conv5_mask.bias)
    if WORLD > 1 and device.type == "cuda":
        timm.layers.convert_sync_batchnorm(net)
    return net.to(device)

# ------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def detect(net, images, cfg, device):
    """-> what the net finds on CocoDetection's images, in COCO's format. Process 0 gets all of it."""
    net.eval()
    net.transform.min_size = [cfg.test_size]
    categories = sorted(images.coco.cats)
    found, progress = [], eval_knn.progress_of("test images")
    mine = range(RANK, len(images), WORLD)
    loader = mokd.make_loader(Subset(images, mine), device, cfg.workers, batch_size=None, collate_fn=list)
    for i, (image, _) in zip(mine, loader):
        y, = net([image.to(device).float() / 255])
        masks = (y["masks"][:, 0] >= 0.5).byte().cpu().numpy()
        boxes, scores, labels = [y[name].tolist() for name in ("boxes", "scores", "labels")]
        for (x1, y1, x2, y2), score, label, mask in zip(boxes, scores, labels, masks):
            found.append(dict(image_id=images.ids[i], category_id=categories[label - 1], score=score,
                              bbox=[x1, y1, x2 - x1, y2 - y1],
                              segmentation=run_lengths.encode(np.asfortranarray(mask))))
        progress(i + 1, len(images))
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, found)
        found = sum(parts, [])
    return found

def average_precision(coco, found):
    """-> {"box": dict(AP=percent, AP50=..., AP75=...), "mask": ...} of detections in COCO's format."""
    names = "AP", "AP50", "AP75"
    if not found:   # which pycocotools cannot take
        return {kind: dict.fromkeys(names, 0.0) for kind in ("box", "mask")}
    results = {}
    with contextlib.redirect_stdout(io.StringIO()):
        found = coco.loadRes(found)
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            evaluation = COCOeval(coco, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            results[name] = dict(zip(names, (100 * evaluation.stats[:3]).tolist()))
    return results

# --------------------------------------------------------------------------------------------------- training
def learning_rate(cfg, step):
    """A warm-up from a thousandth; a tenth after 2/3 of the steps, a hundredth after 8/9 [detectron2]."""
    rise = min(1, 0.001 + 0.999 * step / max(1, cfg.warmup))
    drops = sum(9 * step >= ninths * cfg.iterations for ninths in (6, 8))
    return cfg.lr * cfg.batch_size / 16 * rise * 0.1 ** drops

def train(cfg, net, images, device):
    """Train to the end, from --out's checkpoint if there is one."""
    groups = param_groups_weight_decay(net, 1e-4)   # [detectron2]; 1-D parameters have none
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    path, first = f"{cfg.out}/checkpoint.pth", 0
    state = mokd.find_checkpoint(cfg, images)
    if state:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())
        first = state["step"]
        say(f"resumed {path} at step {first}")
    if first < cfg.iterations:
        mokd.log(cfg, dict(settings=asdict(cfg), step=first, run=cfg.run))
    net.train()
    distributed = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net

    # mokd.batches counts in epochs; here the last step may lie within one.
    per_epoch = len(images) // cfg.batch_size
    order = SimpleNamespace(batch_size=cfg.batch_size, seed=cfg.seed, epochs=cfg.iterations // per_epoch + 1)
    keys = mokd.batches(len(images), order, first)
    loader = mokd.make_loader(images, device, cfg.workers, batch_sampler=keys, collate_fn=list)
    window, start = [], time.time()
    for step, batch in zip(range(first + 1, cfg.iterations + 1), loader):
        torch.manual_seed(mokd.seed_of(cfg.seed, "step", step, RANK))   # of sizes, anchors, regions
        x = [image.to(device, non_blocking=True).float() / 255 for image, _ in batch]
        targets = [{name: value.to(device) for name, value in target.items()} for _, target in batch]
        losses = distributed(x, targets)
        loss = sum(losses.values())
        scaler.scale(loss).backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step - 1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        window.append({name: value.detach() for name, value in dict(loss=loss, **losses).items()})

        saving = step % (cfg.save_every or cfg.iterations) == 0 or step == cfg.iterations
        logging = cfg.log_every > 0 and (saving or step % cfg.log_every == 0)
        if saving or logging:
            means = mokd.means_of(window)
            window = []
            if not math.isfinite(means["loss"]):
                mokd.stop(f"step {step}: loss not finite, and not saved. Lower --lr or raise --warmup", 1)
        if logging:
            seconds = (time.time() - start) / (step - first)   # of a step
            record = dict(step=step, steps=cfg.iterations, **means, lr=learning_rate(cfg, step - 1))
            record["images/s"] = cfg.batch_size / seconds
            record["minutes_left"] = seconds * (cfg.iterations - step) / 60
            mokd.log(cfg, record)
            say("  ".join(f"{name.removeprefix('loss_')} {value:g}" for name, value in record.items()))
        if saving and RANK == 0:
            state = dict(net=net.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            mokd.write(state | dict(config=asdict(cfg), images=mokd.fingerprint(images), step=step), path)

def run(cfg):
    device = mokd.join_processes(cfg)
    torch.backends.cudnn.benchmark = False   # it would try all kernels at each new size
    images, val = open_coco(TrainingImages, cfg, "train"), open_coco(CocoDetection, cfg, "val")
    if sorted(val.coco.cats) != images.categories:
        mokd.stop(f"--data {cfg.data}: val2017 has other categories than train2017")
    if len(images) < cfg.batch_size:
        mokd.stop(f"--batch_size {cfg.batch_size} is more than the {len(images)} images: lower it")
    images.seed = cfg.seed
    net = build(cfg, len(images.categories), device)
    os.makedirs(cfg.out, exist_ok=True)
    say(f"{len(images):,} and {len(val):,} images; processes: {WORLD}, on {device.type}, {cfg.dtype}")
    train(cfg, net, images, device)
    found = detect(net, val, cfg, device)
    if RANK == 0:
        results = average_precision(val.coco, found)
        with open(f"{cfg.out}/results.json", "w") as f:
            json.dump(dict(config=asdict(cfg), results=results), f)
        say(f"\nMask R-CNN C4, val2017, %{'AP':>10}{'AP50':>8}{'AP75':>8}")
        for name, result in results.items():
            say(f"{name:25}" + "".join(f"{value:8.2f}" for value in result.values()))

if __name__ == "__main__":
    mokd.main(parse=parse, run=run)
