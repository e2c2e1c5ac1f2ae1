"""Mask R-CNN C4 on COCO (A.5, Table 6): boxes and masks from a ResNet that is fine-tuned as a whole.

    python extras/eval_coco.py --checkpoint runs/resnet50-vit_small/checkpoint.pth --data coco     # model 1 of a run of mokd.py
    torchrun --nproc_per_node=8 extras/eval_coco.py --arch resnet50 --weights runs/resnet50-vit_small/model1.pth
    torchrun --nproc_per_node=8 extras/eval_coco.py --arch resnet50 --pretrained                   # supervised, to compare

The detector is the C4 variant of He et al. (2017), made of torchvision's parts: on the map of stage 3, of stride 16, the RPN
proposes regions; stage 4 sees 14 x 14 cells of each and serves boxes and masks. In shapes, R is the regions of a batch.
"""
import contextlib, functools, io, itertools, json, math, os, signal, sys, time   # noqa: E401
from collections import OrderedDict
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import faster_rcnn, mask_rcnn, roi_heads, rpn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import RoIAlign, clip_boxes_to_image
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))   # where mokd.py is
import eval_knn
import mokd
from eval_linear import write, write_results
from mokd import UserError, flag, say

try:
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:   # run says so
    rle = None

@dataclass
class Config:
    """Every setting, its source in brackets; the defaults are A.5's recipe. The command line is made of it."""
    checkpoint: str = flag("", "checkpoint.pth of a run of mokd.py", group="backbone")
    net: str = flag("momentum", "which net of the checkpoint", choices=("momentum", "student"))
    model: str = flag("1", "which model of the checkpoint; it must be a ResNet", choices=("1", "2"))
    arch: str = flag("", "instead, resnet18/34/50/101 [Table 6] or another ResNet of timm's; untrained unless there are weights")
    weights: str = flag("", "its weights: a model1.pth, or a timm, torchvision or DINO state dict")
    pretrained: bool = flag(False, "its weights: timm's own, supervised, downloaded")
    model_kwargs: dict = flag({}, "arguments of timm.create_model for --arch")

    norm: str = flag("sync", "batch norms that are trained, with statistics over all processes: all but the stem's (sync) [SEED, "
                     "DisCo], all [MoCo], none (frozen) [He et al.]", choices=("sync", "all", "frozen"), group="detector")
    anchors: tuple = flag((32, 64, 128, 256, 512), "sides of anchors, pixels, each 2:1, 1:1, 1:2 [detectron2]", low=1, nargs="+")
    samples: tuple = flag((256, 512), "anchors and regions of an image in the losses [detectron2]", low=1)
    proposals: tuple = flag((2000, 1000), "regions of an image, in training and in test [detectron2]", low=1)

    data: str = flag("coco", "folder with train2017/, val2017/, annotations/instances_train2017.json and _val2017", group="data")
    train_size: tuple = flag((600, 800), "shorter side of a training image, pixels, drawn between the two [A.5]", low=16)
    test_size: int = flag(800, "shorter side of a test image, pixels [A.5]", low=16)
    max_size: int = flag(1333, "longer side at most, pixels [detectron2]", low=16)
    workers: int = flag(None, "loaders of each process; unset: its share of the cores, at most 16; 1 without a GPU", may_differ=True)

    iterations: int = flag(180000, "steps [A.5]; 0: evaluate the untrained detector", group="optimization")
    batch_size: int = flag(16, "images of a step, over all processes [A.5]", low=1)
    lr: float = flag(0.02, "of SGD, times batch_size / 16; a tenth after 2/3 of the steps, a hundredth after 8/9 [A.5]")
    warmup: int = flag(1000, "steps in which it rises from a thousandth [detectron2]")
    weight_decay: float = flag(1e-4, "weight decay [A.5], never on biases and 1-D parameters")

    out: str = flag("", "folder of results; unset: beside the checkpoint, or runs/coco-ARCH", group="running", may_differ=True)
    seed: int = flag(0, "seed of everything that is drawn")
    dtype: str = flag("auto", "of autocast; auto: bf16, else fp16, on a GPU; else fp32", choices=("auto", "bf16", "fp16", "fp32"))
    log_every: int = flag(20, "steps between log lines", low=1, may_differ=True)
    save_every: int = flag(5000, "steps between checkpoints", low=1, may_differ=True)

def parse(argv=None):
    """Command line -> Config. Raises UserError."""
    cfg = Config(**mokd.read_flags(Config, argv, "extras/eval_coco.py", __doc__.split("\n\n")[0]))
    mokd.check_ranges(cfg)
    eval_knn.check_source(source_of(cfg))
    if cfg.train_size[0] > cfg.train_size[1]:
        raise UserError("--train_size: give the smaller number first")
    beside = f"{os.path.dirname(cfg.checkpoint) or '.'}/coco{cfg.model}"
    cfg.out = cfg.out or (beside if cfg.checkpoint else f"runs/coco-{cfg.arch}")
    return cfg

def source_of(cfg):
    names = "checkpoint", "net", "model", "arch", "weights", "pretrained", "model_kwargs", "data", "seed"
    return eval_knn.Config(**{name: getattr(cfg, name) for name in names})

# --------------------------------------------------------------------------------------------------------------- data
def read_annotations(cfg, part):
    """-> COCO, pycocotools' index, of "train" or "val". Raises UserError where the file is not as it should be."""
    path = f"{cfg.data}/annotations/instances_{part}2017.json"
    try:
        with contextlib.redirect_stdout(io.StringIO()):   # pycocotools prints
            coco = COCO(path)
        coco.dataset.setdefault("info", {})   # and asks for this
        for i in coco.dataset["images"]:
            i["file_name"], i["height"] * i["width"]   # it must have these
        os.stat(f"{cfg.data}/{part}2017/{coco.dataset['images'][0]['file_name']}")
        for a in coco.dataset["annotations"]:
            (x, y, w, h), *_ = a["bbox"], a["area"], a["segmentation"], a["iscrowd"]
            if a["category_id"] not in coco.cats or a["image_id"] not in coco.imgs or not math.isfinite(x + y + w + h):
                raise ValueError(f"annotation {a['id']}: category {a['category_id']}, image {a['image_id']} or its box is wrong")
        return coco
    except OSError as error:
        raise UserError(f"--data {cfg.data}: {error.filename} cannot be read ({error.strerror}); give a folder like COCO's, with "
                   f"train2017/, val2017/ and annotations/") from error
    except Exception as error:   # a file can be broken in many ways
        raise UserError(f"--data {cfg.data}: {path} is not in COCO's format ({type(error).__name__}: {error})") from error

def mask_of(segmentation, h, w):
    """Polygons, run lengths or compressed run lengths -> (h, w) uint8."""
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, h, w)
    return torch.from_numpy(rle.decode(rle.merge(segmentation) if isinstance(segmentation, list) else segmentation))

class Images(torch.utils.data.Dataset):
    """(epoch, index) of a training image, or index of a test image -> resized image (3, h, w) uint8; target; if it was readable.

    A target has id; size: height and width of the file; scale (4,): pixels of the image per pixel of the file; in training also
    boxes (n, 4): x1 y1 x2 y2 in pixels of the image; labels (n,): from 1, in the order of category ids; masks (n, height, width)
    uint8, in the file's pixels, which saves their resizing. An unreadable image is black, with nothing on it.
    """
    def __init__(self, coco, cfg, part):
        self.cfg, self.folder, self.train, records = cfg, f"{cfg.data}/{part}2017", part == "train", []
        self.categories = sorted(coco.cats)
        labels = {category: label for label, category in enumerate(self.categories, 1)}
        for i in coco.dataset["images"]:
            h, w, objects = i["height"], i["width"], []
            for a in coco.imgToAnns[i["id"]] if self.train else ():
                (x, y, bw, bh), label, shape = a["bbox"], labels[a["category_id"]], a["segmentation"]
                box = max(x, 0), max(y, 0), min(x + bw, w), min(y + bh, h)
                objects += [(box, label, shape)] * (box[0] < box[2] and box[1] < box[3] and not a["iscrowd"])
            if objects or not self.train:   # from crowds, and from images without objects, detectron2 does not learn
                records.append(json.dumps((i["id"], i["file_name"], h, w, objects)).encode())
        self.ends = np.cumsum([0, *map(len, records)])
        self.records = np.frombuffer(b"".join(records), np.uint8)   # which workers share; Python's objects they would copy

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, key):
        epoch, index = key if self.train else (0, key)
        id, name, h, w, objects = json.loads(self.records[self.ends[index]:self.ends[index + 1]].tobytes())
        try:
            image = mokd.read_image(f"{self.folder}/{name}")
            if image.shape[1:] != (h, w):
                raise ValueError(f"{image.shape[2]} x {image.shape[1]} pixels, and {w} x {h} in the annotations")
            masks = [mask_of(segmentation, h, w) for _, _, segmentation in objects]
            readable = True
        except Exception as error:   # decoders raise many things; train and detect count these images
            mokd.warn(f"{self.folder}/{name} or its annotations cannot be read: {error}")
            image, masks, objects, readable = torch.zeros(3, h, w, dtype=torch.uint8), [], [], False
        g, (low, high) = mokd.generator(self.cfg.seed, epoch, index), self.cfg.train_size
        side, flip = int(torch.randint(low, high + 1, (), generator=g)), bool(torch.rand((), generator=g) < 0.5)
        factor = min((side if self.train else self.cfg.test_size) / min(h, w), self.cfg.max_size / max(h, w))
        image = TF.resize(image, [max(1, round(d * factor)) for d in (h, w)], TF.InterpolationMode.BILINEAR, antialias=True)
        target = dict(id=id, size=(h, w), scale=torch.tensor([image.shape[2] / w, image.shape[1] / h] * 2))
        if self.train:
            boxes = torch.tensor([box for box, _, _ in objects], dtype=torch.float).view(-1, 4) * target["scale"]
            masks = torch.stack([torch.zeros(h, w, dtype=torch.uint8), *masks])[1:]   # also of none
            if flip:
                image, masks = image.flip(-1), masks.flip(-1)
                boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
            target |= dict(boxes=boxes, labels=torch.tensor([label for _, label, _ in objects], dtype=torch.long), masks=masks)
        return image, target, readable

# ----------------------------------------------------------------------------------------------------------- detector
class MaskRCNN(nn.Module):
    """The detector on a Backbone: [(3, h, w) uint8] -> in training, with targets, {name: loss}; else for each image boxes (n, 4)
    in its pixels, labels (n,) from 1 to `classes`, scores (n,), masks (n, 1, 14, 14): probabilities on a grid over the box."""
    def __init__(self, backbone, classes, cfg):
        super().__init__()
        resnet, self.convert, self.norm = backbone.model, backbone.convert, cfg.norm
        c3, c4 = (stage["num_chs"] for stage in resnet.feature_info[-2:])
        parts = "conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"
        self.trunk, self.stage4 = nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in parts)), resnet.layer4
        stages = lambda training, testing: dict(training=training, testing=testing)
        self.rpn = rpn.RegionProposalNetwork(   # thresholds and fractions, here and below, are those of Faster R-CNN
            rpn.AnchorGenerator((cfg.anchors,), ((0.5, 1.0, 2.0),)), rpn.RPNHead(c3, 3 * len(cfg.anchors)), 0.7, 0.3,
            cfg.samples[0], 0.5, stages(12000, 6000), stages(*cfg.proposals), 0.7)
        self.rpn.head.register_forward_hook(lambda head, x, out: tuple([y.float() for y in maps] for maps in out))
        self.pool = RoIAlign(14, 1 / 16, sampling_ratio=0, aligned=True)
        self.roi = roi_heads.RoIHeads(   # whose own forward would run stage 4 a second time for the masks, with other statistics
            None, None, faster_rcnn.FastRCNNPredictor(c4, classes + 1), 0.5, 0.5, cfg.samples[1], 0.25, None, 0.05, 0.5, 100,
            mask_predictor=mask_rcnn.MaskRCNNPredictor(c4, 256, classes + 1))
        for layer, std in ((self.roi.box_predictor.cls_score, 0.01), (self.roi.box_predictor.bbox_pred, 0.001)):   # as detectron2
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        for bn in self.standing():
            bn.requires_grad_(False)

    def standing(self):
        """The batch norms that keep their statistics and weights; bn1 and, in a deep stem, those in conv1 are the stem's."""
        parts = dict(sync=[self.trunk.conv1, self.trunk.bn1], all=[], frozen=[self.trunk, self.stage4])[self.norm]
        return [m for part in parts for m in part.modules() if isinstance(m, _BatchNorm)]

    def train(self, mode=True):
        super().train(mode)
        for bn in self.standing():
            bn.eval()
        return self

    def batch(self, images):
        """-> ImageList: normalized, with zeros to the right and below, sides that divide by 32."""
        h, w = (math.ceil(max(x.shape[d] for x in images) / 32) * 32 for d in (1, 2))
        x = torch.zeros(len(images), 3, h, w, device=images[0].device).contiguous(memory_format=torch.channels_last)
        for row, image in zip(x, images):
            row[:, :image.shape[1], :image.shape[2]] = self.convert(mokd.normalize(image.float() / 255))
        return ImageList(x, [tuple(image.shape[1:]) for image in images])

    def forward(self, images, targets=None):
        batch = self.batch(images)
        features = self.trunk(batch.tensors).float()   # (B, C3, h / 16, w / 16); in 16 bits, anchors would be rounded with it
        regions, losses = self.rpn(batch, {"0": features}, targets)
        if self.training:
            regions, matches, labels, shifts = self.roi.select_training_samples(regions, targets)
        y = self.stage4(self.pool(features, regions))   # (R, C4, 7, 7), once for boxes and masks
        with torch.autocast(y.device.type, enabled=False):
            logits, deltas = self.roi.box_predictor(y.float().mean((2, 3)))   # (R, 1 + classes), (R, 4 * (1 + classes))
        if self.training:
            losses["loss_classifier"], losses["loss_box_reg"] = roi_heads.fastrcnn_loss(logits, deltas, labels, shifts)
            on = [row > 0 for row in labels]
            masks = self.roi.mask_predictor(y[torch.cat(on)]).float()   # (regions on objects, 1 + classes, 14, 14)
            losses["loss_mask"] = roi_heads.maskrcnn_loss(
                masks, [r[o] / t["scale"] for r, o, t in zip(regions, on, targets)], [t["masks"] for t in targets],
                [t["labels"] for t in targets], [m[o] for m, o in zip(matches, on)])
            return losses
        boxes, scores, labels = self.roi.postprocess_detections(logits, deltas, regions, batch.image_sizes)
        masks = roi_heads.maskrcnn_inference(self.roi.mask_predictor(self.stage4(self.pool(features, boxes))).float(), labels)
        return [dict(boxes=b, scores=s, labels=n, masks=m) for b, s, n, m in zip(boxes, scores, labels, masks)]

def sync_batch_norm(net, device):
    """mokd's on GPUs; its way for the CPU wants one shape of all processes, but here images and regions differ."""
    if device.type == "cuda":
        return mokd.sync_batch_norm(net, device)
    def forward_on_all(bn, forward, x):
        if not bn.training:
            return forward(x)
        total = lambda y: mokd.SumOverProcesses.apply(y.sum((0, 2, 3)))
        count = mokd.sum_over_processes(torch.tensor(x.numel() / x.shape[1]))
        mean = total(x) / count
        x = x - mean[:, None, None]
        var = total(x.square()) / count
        with torch.no_grad():
            bn.running_mean.lerp_(mean, bn.momentum)
            bn.running_var.lerp_(var * count / (count - 1), bn.momentum)
        return x * (bn.weight * (var + bn.eps).rsqrt())[:, None, None] + bn.bias[:, None, None]
    for bn in (m for m in net.modules() if isinstance(m, _BatchNorm)):
        bn.forward = functools.partial(forward_on_all, bn, bn.forward)
    return net

def build(cfg, classes, device, world=1):
    """-> MaskRCNN on the backbone that cfg names. Raises UserError."""
    (name, backbone), = eval_knn.load_backbones(source_of(cfg)).items()
    strides = [stage["reduction"] for stage in getattr(backbone.model, "feature_info", ())]
    if not isinstance(backbone.model, timm.models.resnet.ResNet) or strides[-4:] != [4, 8, 16, 32]:
        raise UserError(f"{'--model' if cfg.checkpoint else '--arch'} {name}: give a ResNet with stages of strides 4, 8, 16 and 32")
    torch.manual_seed(mokd.seed_of(cfg.seed, "detector"))
    net = MaskRCNN(backbone, classes, cfg).to(device, memory_format=torch.channels_last)
    return sync_batch_norm(net, device) if world > 1 else net

# --------------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def detect(net, images, cfg, device, rank=0, world=1):
    """-> what net finds on the test images, in COCO's format; all of it on the first process. Raises UserError."""
    part, found = torch.utils.data.Subset(images, range(rank, len(images), world)), []
    progress = eval_knn.progress_of("test images", len(part))
    for done, (image, target, readable) in enumerate(mokd.make_loader(part, device, cfg.workers, batch_size=None), 1):
        if not readable:
            raise UserError(f"--data {cfg.data}: mend the test image named above, for AP counts all of them", code=1)
        with mokd.autocast(device, cfg.dtype):
            y, = net([image.to(device, non_blocking=True)])
        y, size = {k: v.float().cpu() for k, v in y.items()}, target["size"]
        boxes = clip_boxes_to_image(y["boxes"] / target["scale"], size)
        masks = roi_heads.paste_masks_in_image(y["masks"], boxes, size)[:, 0] > 0.5   # (n, height, width) of the file
        runs = rle.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy(), np.uint8))
        for (x1, y1, x2, y2), score, label, run in zip(boxes.tolist(), y["scores"].tolist(), y["labels"].int().tolist(), runs):
            found.append(dict(image_id=target["id"], category_id=images.categories[label - 1], score=score,
                              bbox=[x1, y1, x2 - x1, y2 - y1], segmentation=run))
        progress(done)
    if world > 1:
        dist.gather_object(found, parts := [None] * world if mokd.MAIN else None)
        found = list(itertools.chain(*parts or []))
    return found

def average_precision(coco, found):
    """Truth, detections in COCO's format -> {"box": {"AP": percent, "AP50": ..., "AP75": ...}, "mask": ...}."""
    results = {name: dict(AP=0.0, AP50=0.0, AP75=0.0) for name in ("box", "mask")}
    with contextlib.redirect_stdout(io.StringIO()):
        found = found and coco.loadRes(found)   # which takes no empty list
        for name, kind in (("box", "bbox"), ("mask", "segm")) if found else ():
            evaluation = COCOeval(coco, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            results[name] = dict(zip(results[name], (100 * evaluation.stats[:3]).tolist()))
    return results

# ----------------------------------------------------------------------------------------------------------- training
def learning_rate(cfg, step):
    """A.5's: a tenth from 2/3 of the steps on, a hundredth from 8/9, linear in the batch; detectron2's linear warm-up."""
    drops = (3 * step >= 2 * cfg.iterations) + (9 * step >= 8 * cfg.iterations)
    rise = 1 if step >= cfg.warmup else 0.001 + 0.999 * step / cfg.warmup
    return cfg.lr * cfg.batch_size / 16 * 0.1 ** drops * rise

def train(cfg, net, images, device, rank, world):
    """Train to the end, from --out's checkpoint if there is one. Raises UserError, on a signal after writing one."""
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([dict(params=[p for p in params if p.dim() > 1], weight_decay=cfg.weight_decay),
                                 dict(params=[p for p in params if p.dim() < 2])], lr=0.0, momentum=0.9, foreach=True)
    scaler, path, first = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16"), f"{cfg.out}/checkpoint.pth", 0
    if os.path.exists(path):
        state = mokd.read_checkpoint(path)
        mokd.refuse_other_settings(path, state["config"], cfg)
        for part, saved in zip((net, optimizer, scaler), (*state["models"], state["scaler"])):
            part.load_state_dict(saved)
        say(f"resumed {path} at step {state['step']}")
        first = state["step"]
    forward = net.train() if world == 1 else nn.parallel.DistributedDataParallel(
        net.train(), device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    caught, window, unreadable, stops = set(), [], 0, (signal.SIGTERM, signal.SIGINT)
    for s in stops:
        signal.signal(s, lambda number, frame: caught.add(number))
    step = since = first
    start = clock = time.time()
    epochs = cfg.iterations // (len(images) // cfg.batch_size) + 1
    order = SimpleNamespace(batch_size=cfg.batch_size, seed=cfg.seed, epochs=epochs)
    keys = itertools.islice(mokd.batches(len(images), order, first, rank, world), cfg.iterations - first)
    for batch in mokd.make_loader(images, device, cfg.workers, batch_sampler=keys, collate_fn=list):
        x, targets, readable = zip(*batch)
        torch.manual_seed(mokd.seed_of(cfg.seed, "samples", step, rank))   # torchvision draws anchors and regions from it
        x = [image.to(device, non_blocking=True) for image in x]
        targets = [{k: v.to(device, non_blocking=True) for k, v in t.items() if torch.is_tensor(v)} for t in targets]
        with mokd.autocast(device, cfg.dtype):
            losses = forward(x, targets)
        losses["loss"] = sum(losses.values())
        scaler.scale(losses["loss"]).backward()
        for g in optimizer.param_groups:
            g["lr"] = learning_rate(cfg, step)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        window.append(torch.stack([*losses.values()]).detach())
        step += 1

        unreadable += readable.count(False)
        flags = torch.tensor([unreadable, *(s in caught for s in stops)])   # on the CPU: no GPU is waited for
        if world > 1:   # all processes stop at one step
            dist.all_reduce(flags)
        if flags[0] > 0.01 * max(len(images), (step - first) * cfg.batch_size):
            raise UserError(f"--data {cfg.data}: more than 1 % of the training images cannot be read: mend those named above", code=1)
        stopped = [s for s, flag in zip(stops, flags[1:].tolist()) if flag]
        saving = stopped or step % cfg.save_every == 0 or step == cfg.iterations
        if saving or step % cfg.log_every == 0:
            values, now = mokd.mean_over_processes(torch.stack(window)).cpu(), time.time()
            for row in (~values.isfinite()).any(1).nonzero()[:1, 0].tolist():
                names = ", ".join(name for name, value in zip(losses, values[row]) if not value.isfinite())
                raise UserError(f"step {since + row}: {names} not finite. The last good checkpoint is kept. Lower --lr, raise "
                           f"--warmup, or use --dtype fp32", code=1)
            record = dict(step=step, steps=cfg.iterations) | dict(zip(losses, values.mean(0).tolist()))
            seconds_left = (now - start) / (step - first) * (cfg.iterations - step)
            record |= {"lr": learning_rate(cfg, step - 1), "images/s": cfg.batch_size * len(window) / (now - clock),
                       "GB": mokd.memory_gb(device), "minutes_left": seconds_left / 60}
            mokd.log(cfg, record, last=bool(saving))
            window, since, clock = [], step, now
        if saving:
            if not torch.stack(torch._foreach_norm([p.detach() for p in params])).isfinite().all():
                raise UserError(f"step {step - 1}: weights not finite after it. The last good checkpoint is kept; lower --lr", code=1)
            models = [net.state_dict(), optimizer.state_dict()]
            write(cfg, dict(config=asdict(cfg), step=step, scaler=scaler.state_dict(), models=models), path)
        if stopped:
            raise UserError(f"stopped by {stopped[0].name} after step {step}; the same command goes on from there", 128 + stopped[0])
    for s in stops:   # what follows begins anew from the last checkpoint
        signal.signal(s, signal.SIG_DFL)

# --------------------------------------------------------------------------------------------------------------- main
def run(cfg):
    if rle is None:
        raise UserError("pycocotools is missing: pip install -r extras/requirements.txt")
    device, rank, world = mokd.join_processes()
    mokd.fill_in_machine(cfg, device, world)
    torch.backends.cudnn.benchmark = False   # it would try all kernels at each new size of an image
    images, val = Images(read_annotations(cfg, "train"), cfg, "train"), read_annotations(cfg, "val")
    categories = sorted(val.cats)
    if categories != images.categories or not val.anns:
        raise UserError(f"--data {cfg.data}: val2017 has other categories than train2017, or no annotations")
    if len(images) < cfg.batch_size:
        raise UserError(f"--batch_size {cfg.batch_size}: train2017 has only {len(images)} images with objects; lower it")
    net = build(cfg, len(categories), device, world)
    try:
        os.makedirs(cfg.out, exist_ok=True)
        open(f"{cfg.out}/log.jsonl", "a").close()
    except OSError as error:
        raise UserError(f"--out {cfg.out}: cannot be written to ({error.strerror}); give another folder") from error
    say(f"{len(images):,} training images with objects, {len(val.imgs):,} test images, {len(categories)} categories; "
        f"{cfg.iterations:,} steps of {cfg.batch_size}; {world} process{'es' * (world > 1)} on {device.type}, {cfg.dtype}")
    train(cfg, net, images, device, rank, world)
    found = detect(net.eval(), Images(val, cfg, "val"), cfg, device, rank, world)
    if mokd.MAIN:
        results = average_precision(val, found)
        write_results(cfg, results)
        say(f"\nMask R-CNN C4 on {cfg.data}, val2017, %\n{'':8}{'AP':>8}{'AP50':>8}{'AP75':>8}")
        for name, r in results.items():
            say(f"{name:8}" + "".join(f"{v:>8.2f}" for v in r.values()))
        return results

if __name__ == "__main__":
    sys.exit(mokd.main(program="extras/eval_coco.py", parse=parse, run=run))
