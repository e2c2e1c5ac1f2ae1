"""Mask R-CNN C4 on COCO (A.5, Table 6): boxes and masks from a ResNet that is fine-tuned as a whole.

    python extras/eval_coco.py --checkpoint runs/resnet50-resnet34/checkpoint.pth --model 2 --data coco
    torchrun --nproc_per_node=8 extras/eval_coco.py --arch resnet34 --weights model2.pth --data coco
    torchrun --nproc_per_node=8 extras/eval_coco.py --arch resnet34 --pretrained --data coco   # to compare
    python extras/eval_coco.py --draw drawn   # draw a small data set in COCO's format, to try it on

The detector is the C4 variant of He et al. (2017), made of torchvision's parts. On the trunk's map, of stride
16, the RPN proposes regions. Stage 4 sees 14 x 14 cells of each region and serves boxes and masks. Masks are
cut and pasted as in detectron2, because torchvision is half a pixel off. R is the regions of a batch.
"""
import contextlib, io, itertools, json, math, os, sys, time   # noqa: E401
from collections import OrderedDict
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import faster_rcnn, mask_rcnn, roi_heads, rpn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import RoIAlign, clip_boxes_to_image, roi_align
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
    """Every setting, its source in brackets; defaults are A.5's recipe. The command line is made of it."""
    checkpoint: str = flag("", "checkpoint.pth of a run of mokd.py", group="backbone")
    net: str = flag("momentum", "which net of the checkpoint", choices=("momentum", "student"))
    model: str = flag("1", "which model of the checkpoint; it must be a ResNet", choices=("1", "2"))
    arch: str = flag("", "instead of a checkpoint: a ResNet of timm's, such as resnet34 [Table 6]")
    weights: str = flag("", "weights of --arch: a model1.pth, or a file of timm, torchvision, DINO, MoCo")
    pretrained: bool = flag(False, "weights of --arch: timm's own, supervised, downloaded")
    model_kwargs: dict = flag({}, "arguments of timm.create_model for --arch")

    norm: str = flag("all", "all: batch norms are trained, on GPUs with statistics of all processes [MoCo]; "
                     "frozen: none is, nor are the weights of stem and stage 1 [detectron2]",
                     choices=("all", "frozen"), group="detector")
    anchors: tuple = flag((32, 64, 128, 256, 512), "sides of anchors, pixels; each is 2:1, 1:1 and 1:2 "
                          "[detectron2]", low=1, nargs="+")
    samples: tuple = flag((256, 512), "anchors and regions of an image in the losses [detectron2]", low=1)
    proposals: tuple = flag((2000, 1000), "regions of an image, in training and in test [detectron2]", low=1)

    data: str = flag("coco", "folder with train2017/, val2017/ and annotations/instances_train2017.json and "
                     "_val2017", group="data")
    train_size: tuple = flag((600, 800), "shorter side of a training image is drawn from these, pixels [A.5]",
                             low=16)
    test_size: int = flag(800, "shorter side of a test image, pixels [A.5]", low=16)
    max_size: int = flag(1333, "longer side at most, pixels [detectron2]", low=16)
    workers: int = flag(None, "loaders of each process; unset: its share of the cores, at most 16; 1 without "
                        "a GPU", may_differ=True)

    iterations: int = flag(180000, "steps [A.5]; 0: evaluate the untrained detector", group="optimization")
    batch_size: int = flag(16, "images of a step, over all processes [detectron2]", low=1)
    lr: float = flag(0.02, "rate of SGD [A.5], times batch_size / 16; a tenth after 2/3 of the steps, a "
                     "hundredth after 8/9 [detectron2]; lower it if losses are not finite")
    warmup: int = flag(1000, "steps in which the rate rises from a thousandth [detectron2]")
    weight_decay: float = flag(1e-4, "weight decay [detectron2], never on biases and 1-D parameters")

    out: str = flag("", "folder of results; unset: beside the checkpoint, or runs/coco-ARCH", group="running",
                    may_differ=True)
    seed: int = flag(0, "seed of everything that is drawn")
    dtype: str = flag("auto", "of autocast; auto: bf16, else fp16, on a GPU; else fp32",
                      choices=("auto", "bf16", "fp16", "fp32"))
    log_every: int = flag(20, "steps between log lines", low=1, may_differ=True)
    save_every: int = flag(5000, "steps between checkpoints", low=1, may_differ=True)
    draw: str = flag("", "draw a data set of circles, triangles and rectangles into this folder, and exit",
                     may_differ=True)

def parse(argv=None):
    """Command line -> Config. Raises UserError."""
    cfg = Config(**mokd.read_flags(Config, argv, "extras/eval_coco.py", __doc__.split("\n\n")[0]))
    mokd.check_ranges(cfg)
    if cfg.draw:
        return cfg
    eval_knn.check_source(source_of(cfg))
    if cfg.train_size[0] > cfg.train_size[1]:
        raise UserError("--train_size: give the smaller number first")
    if not cfg.out and cfg.checkpoint:
        cfg.out = os.path.join(os.path.dirname(cfg.checkpoint), f"coco{cfg.model}")
    cfg.out = cfg.out or f"runs/coco-{cfg.arch}"
    return cfg

def source_of(cfg):
    names = "checkpoint", "net", "model", "arch", "weights", "pretrained", "model_kwargs", "data", "seed"
    return eval_knn.Source(**{name: getattr(cfg, name) for name in names})

# ------------------------------------------------------------------------------------------------------- data
def read_annotations(cfg, part):
    """-> COCO, pycocotools' index, of "train" or "val". Raises UserError where the file is not COCO's."""
    path = f"{cfg.data}/annotations/instances_{part}2017.json"
    try:
        with contextlib.redirect_stdout(io.StringIO()):   # pycocotools prints
            coco = COCO(path)
        coco.dataset.setdefault("info", {})   # and asks for this
        # All that is needed later is looked up once, so that a file without it is refused here.
        for i in coco.dataset["images"]:
            i["file_name"], i["height"] * i["width"]
        os.stat(f"{cfg.data}/{part}2017/{coco.dataset['images'][0]['file_name']}")
        for a in coco.dataset["annotations"]:
            a["area"], a["segmentation"], a["iscrowd"]
            if len(a["bbox"]) != 4 or a["category_id"] not in coco.cats or a["image_id"] not in coco.imgs:
                raise ValueError(f"annotation {a['id']}: box {a['bbox']}, category {a['category_id']}, "
                                 f"image {a['image_id']}")
        return coco
    except OSError as error:
        raise UserError(f"--data {cfg.data}: {error.filename} cannot be read ({error.strerror}); give a "
                        f"folder like COCO's, with train2017/, val2017/ and annotations/") from error
    except Exception as error:   # a file can be broken in many ways
        raise UserError(f"--data {cfg.data}: {path} is not in COCO's format ({type(error).__name__}: "
                        f"{error})") from error

def mask_of(segmentation, h, w):
    """Polygons, run lengths or compressed run lengths -> (h, w) uint8."""
    if isinstance(segmentation, list):
        segmentation = rle.merge(rle.frPyObjects(segmentation, h, w))
    elif isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, h, w)
    return torch.from_numpy(rle.decode(segmentation))

class Images(torch.utils.data.Dataset):
    """(epoch, index) in training, else index -> resized image (3, h, w) uint8; target; its index if it cannot
    be read (then it is black and empty), else -1; why not.

    A target has id; size: height and width of the file; scale (4,): pixels of the image per pixel of a file.
    In training it also has boxes (n, 4): x1 y1 x2 y2 in pixels of the image; labels (n,) from 1, in the order
    of category ids; masks (n, height, width) uint8, in the file's pixels, because resizing takes long.
    """
    def __init__(self, coco, cfg, part):
        self.cfg, self.folder, self.train = cfg, f"{cfg.data}/{part}2017", part == "train"
        self.categories = sorted(coco.cats)
        records = []
        for i in coco.dataset["images"]:
            h, w = i["height"], i["width"]
            objects = self.objects(coco.imgToAnns[i["id"]], h, w) if self.train else []
            if objects or not self.train:   # detectron2 does not learn from images without objects
                records.append(json.dumps((i["id"], i["file_name"], h, w, objects)).encode())
        # One array, because workers share it; Python's objects they would copy.
        self.ends = np.cumsum([0, *map(len, records)])
        self.records = np.frombuffer(b"".join(records), np.uint8)

    def objects(self, annotations, h, w):
        """-> [(box within the image, label, segmentation)]; detectron2 does not learn from crowds either."""
        objects = []
        for a in annotations:
            x, y, width, height = a["bbox"]
            box = max(x, 0), max(y, 0), min(x + width, w), min(y + height, h)
            if box[0] < box[2] and box[1] < box[3] and not a["iscrowd"]:
                objects.append((box, 1 + self.categories.index(a["category_id"]), a["segmentation"]))
        return objects

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, key):
        epoch, index = key if self.train else (0, key)
        id, name, h, w, objects = json.loads(self.records[self.ends[index]:self.ends[index + 1]].tobytes())
        bad, reason = -1, ""
        try:
            image = mokd.read_image(f"{self.folder}/{name}")
            if image.shape[1:] != (h, w):
                raise ValueError(f"{image.shape[2]} x {image.shape[1]} pixels where {w} x {h} are annotated")
            masks = [mask_of(segmentation, h, w) for _, _, segmentation in objects]
        except Exception as error:   # decoders and pycocotools raise many things
            bad, reason = index, f"{self.folder}/{name} or its annotations cannot be read: {error}"
            image, masks, objects = torch.zeros(3, h, w, dtype=torch.uint8), [], []

        g = mokd.generator(self.cfg.seed, epoch, index)
        low, high = self.cfg.train_size if self.train else (self.cfg.test_size, self.cfg.test_size)
        side = int(torch.randint(low, high + 1, (), generator=g))
        factor = min(side / min(h, w), self.cfg.max_size / max(h, w))
        size = [max(1, round(h * factor)), max(1, round(w * factor))]
        image = TF.resize(image, size, TF.InterpolationMode.BILINEAR, antialias=True)
        target = dict(id=id, size=(h, w), scale=torch.tensor([size[1] / w, size[0] / h] * 2))
        if self.train:
            boxes = torch.tensor([box for box, _, _ in objects], dtype=torch.float).view(-1, 4)
            boxes *= target["scale"]
            labels = torch.tensor([label for _, label, _ in objects], dtype=torch.long)
            masks = torch.stack(masks) if masks else torch.zeros(0, h, w, dtype=torch.uint8)
            if torch.rand((), generator=g) < 0.5:
                image, masks = image.flip(-1), masks.flip(-1)
                boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
            target |= dict(boxes=boxes, labels=labels, masks=masks)
        return image, target, bad, reason

# ------------------------------------------------------------------------------------------- a drawn data set
ANGLES = np.arange(0, 6.28, 0.1)
SHAPES = {   # ids as COCO's, with gaps and in no order; outlines in a square of side 1
    7: ("circle", np.stack([1 + np.cos(ANGLES), 1 + np.sin(ANGLES)], 1) / 2),
    3: ("triangle", np.array([(0, 1), (0.5, 0), (1, 1)])),
    20: ("rectangle", np.array([(0, 0), (1, 0), (1, 1), (0, 1)]))}
DRAWN = dict(train=400, val=100)   # images of --draw

def draw_image(g, empty):
    """-> pixels (h, w, 3), annotations. Gray noise, and on it shapes that do not overlap, in any colors."""
    h, w = (72, 96) if g.random() < 0.7 else (96, 72)
    pixels = g.integers(60, 140, (h, w, 3), dtype=np.uint8)
    taken, annotations = np.zeros((h, w), bool), []
    for _ in range(0 if empty else g.integers(1, 3, endpoint=True)):
        width, height = (g.uniform(0.25, 0.5, 2) * min(h, w)).round()
        x, y = g.integers(0, w - width), g.integers(0, h - height)
        category = int(g.choice([*SHAPES]))
        polygon = (SHAPES[category][1] * (width, height) + (x, y)).flatten().tolist()
        mask = mask_of([polygon], h, w).bool().numpy()
        if (taken & mask).any():
            continue
        taken |= mask
        pixels[mask] = g.choice([0, 255], 3) if g.random() < 0.5 else g.integers(160, 256, 3)
        rows, columns = np.where(mask)
        box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        annotations.append(dict(category_id=category, bbox=box, area=int(mask.sum()), iscrowd=0,
                                segmentation=[polygon]))
    return pixels, annotations

def draw_coco(folder, sizes, seed=0):
    """Write a data set in COCO's format into a new folder; sizes: {"train": images, "val": images}. The first
    image of a part has no object, the second has a crowd, because COCO has such images too."""
    g = np.random.default_rng(seed)
    os.makedirs(f"{folder}/annotations")
    for part, n in sizes.items():
        os.makedirs(f"{folder}/{part}2017")
        categories = [dict(id=category, name=name) for category, (name, _) in SHAPES.items()]
        content = dict(images=[], annotations=[], categories=categories)
        for i in range(n):
            pixels, annotations = draw_image(g, empty=i == 0)
            h, w, _ = pixels.shape
            if i == 1:   # a corner of 20 x 10 pixels; zeros and ones are counted by turns, down the columns
                runs = dict(size=[h, w], counts=[0, *[10, h - 10] * 19, 10, h * (w - 19) - 10])
                crowd = dict(category_id=7, bbox=[0, 0, 20, 10], area=200, iscrowd=1, segmentation=runs)
                annotations.append(crowd)
            name = f"{part}{i}.png"
            Image.fromarray(pixels).save(f"{folder}/{part}2017/{name}")
            content["images"].append(dict(id=1000 + 7 * i, file_name=name, height=h, width=w))
            for a in annotations:
                a |= dict(id=len(content["annotations"]) + 1, image_id=1000 + 7 * i)
                content["annotations"].append(a)
        with open(f"{folder}/annotations/instances_{part}2017.json", "w") as f:
            json.dump(content, f)

# --------------------------------------------------------------------------------------------------- detector
def mask_targets(masks, boxes, matches):
    """Masks (n, h, w) of an image, boxes (r, 4) in their pixels, which mask (r,) -> (r, 14, 14): the
    part of a cell that the mask covers. Aligned, as in detectron2: pixel i reaches from i to i + 1."""
    rois = torch.cat([matches[:, None].to(boxes), boxes], 1)
    return roi_align(masks[:, None].to(boxes), rois, 14, aligned=True)[:, 0]

def paste_mask(probabilities, box, size):
    """Probabilities (1, M, M) in the cells of a box -> (h, w) uint8. As in detectron2, a pixel samples them
    at its own center, and the box is not rounded."""
    x1, y1, x2, y2 = box
    left, top, right, bottom = int(x1), int(y1), min(size[1], math.ceil(x2)), min(size[0], math.ceil(y2))
    x = (torch.arange(left, right) + 0.5 - x1) / (x2 - x1)   # 0 to 1 over the box
    y = (torch.arange(top, bottom) + 0.5 - y1) / (y2 - y1)
    grid = 2 * torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) - 1
    inside = F.grid_sample(probabilities[None], grid[None], align_corners=False)[0, 0] >= 0.5
    pasted = torch.zeros(size, dtype=torch.uint8)
    pasted[top:bottom, left:right] = inside
    return pasted

def mask_loss(logits, boxes, matches, targets):
    """Logits (R, 1 + classes, 14, 14) of regions on objects; for each image their boxes (r, 4), the numbers
    of their objects (r,) and the target -> cross-entropy, in the layer of the object's label."""
    rows = list(zip(boxes, matches, targets))
    labels = torch.cat([t["labels"][m] for _, m, t in rows])
    if not len(labels):
        return 0 * logits.sum()   # a gradient all the same: other processes wait for it
    wanted = torch.cat([mask_targets(t["masks"], b / t["scale"], m) for b, m, t in rows])
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, wanted)

def in_fp32(module, args, outputs):
    """Hook of the RPN's head: in 16 bits, boxes would be rounded to several pixels."""
    (objectness,), (shifts,) = outputs
    return [objectness.float()], [shifts.float()]

class MaskRCNN(nn.Module):
    """The detector on a Backbone: [(3, h, w) uint8] -> in training, with targets, {name: loss}; else for each
    image boxes (n, 4) in its pixels, scores (n,), labels (n,) from 1, masks (n, 1, 14, 14): probabilities."""
    def __init__(self, backbone, classes, cfg):
        super().__init__()
        resnet, self.convert, self.frozen = backbone.model, backbone.convert, cfg.norm == "frozen"
        c3, c4 = (stage["num_chs"] for stage in resnet.feature_info[-2:])
        parts = "conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"
        self.trunk = nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in parts))
        self.stage4 = resnet.layer4

        # Thresholds and fractions, here and below, are those of Faster R-CNN.
        training, testing = cfg.proposals
        self.rpn = rpn.RegionProposalNetwork(
            rpn.AnchorGenerator((cfg.anchors,), ((0.5, 1.0, 2.0),)), rpn.RPNHead(c3, 3 * len(cfg.anchors)),
            fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=cfg.samples[0], positive_fraction=0.5,
            pre_nms_top_n=dict(training=12000, testing=6000),
            post_nms_top_n=dict(training=training, testing=testing), nms_thresh=0.7)
        self.rpn.head.register_forward_hook(in_fp32)
        self.pool = RoIAlign(14, 1 / 16, sampling_ratio=0, aligned=True)
        # Its own forward is not used, because it runs stage 4 a second time for masks, with other statistics.
        self.roi = roi_heads.RoIHeads(
            box_roi_pool=None, box_head=None, box_predictor=faster_rcnn.FastRCNNPredictor(c4, classes + 1),
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=cfg.samples[1], positive_fraction=0.25,
            bbox_reg_weights=None, score_thresh=0.05, nms_thresh=0.5, detections_per_img=100,
            mask_predictor=mask_rcnn.MaskRCNNPredictor(c4, 256, classes + 1))

        # detectron2's first weights. With torchvision's, mask logits are large and their loss starts at 2.
        box, mask = self.roi.box_predictor, self.roi.mask_predictor
        nn.init.zeros_(mask.conv5_mask.bias)
        for layer, std in ((box.cls_score, 0.01), (box.bbox_pred, 0.001), (mask.mask_fcn_logits, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        if self.frozen:
            for part in (self.trunk.conv1, self.trunk.layer1, *self.batch_norms()):
                part.requires_grad_(False)

    def batch_norms(self):
        return [m for m in self.modules() if isinstance(m, _BatchNorm)]

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:   # they keep their statistics, too
            for bn in self.batch_norms():
                bn.eval()
        return self

    def batch(self, images):
        """-> ImageList: normalized, with zeros to the right and below, sides that divide by 32."""
        h = math.ceil(max(image.shape[1] for image in images) / 32) * 32
        w = math.ceil(max(image.shape[2] for image in images) / 32) * 32
        x = torch.zeros(len(images), 3, h, w, device=images[0].device)
        x = x.contiguous(memory_format=mokd.memory_format(x.device))
        for row, image in zip(x, images):
            row[:, :image.shape[1], :image.shape[2]] = self.convert(mokd.normalize(image.float() / 255))
        return ImageList(x, [tuple(image.shape[1:]) for image in images])

    def forward(self, images, targets=None):
        batch = self.batch(images)
        features = self.trunk(batch.tensors).float()   # (B, C3, h / 16, w / 16); anchors take their dtype
        regions, losses = self.rpn(batch, {"0": features}, targets)
        if self.training:
            regions, matches, labels, box_targets = self.roi.select_training_samples(regions, targets)
        y = self.stage4(self.pool(features, regions))   # (R, C4, 7, 7), once for boxes and masks
        with torch.autocast(y.device.type, enabled=False):
            logits, shifts = self.roi.box_predictor(y.float().mean((2, 3)))   # (R, 1 + classes), four of each

        if self.training:
            class_loss, box_loss = roi_heads.fastrcnn_loss(logits, shifts, labels, box_targets)
            on_object = [row > 0 for row in labels]
            regions = [r[on] for r, on in zip(regions, on_object)]
            matches = [m[on] for m, on in zip(matches, on_object)]
            mask_logits = self.roi.mask_predictor(y[torch.cat(on_object)]).float()
            return losses | dict(loss_classifier=class_loss, loss_box_reg=box_loss,
                                 loss_mask=mask_loss(mask_logits, regions, matches, targets))

        # In test, masks are made for the final boxes, so stage 4 runs a second time.
        boxes, scores, labels = self.roi.postprocess_detections(logits, shifts, regions, batch.image_sizes)
        mask_logits = self.roi.mask_predictor(self.stage4(self.pool(features, boxes))).float()
        masks = roi_heads.maskrcnn_inference(mask_logits, labels)
        names = "boxes", "scores", "labels", "masks"
        return [dict(zip(names, found)) for found in zip(boxes, scores, labels, masks)]

def build(cfg, classes, device, world=1):
    """-> MaskRCNN on the backbone that cfg names. Raises UserError."""
    (name, backbone), = eval_knn.load_backbones(source_of(cfg)).items()
    strides = [stage["reduction"] for stage in getattr(backbone.model, "feature_info", ())]
    if not isinstance(backbone.model, timm.models.resnet.ResNet) or strides[-4:] != [4, 8, 16, 32]:
        option = "--model" if cfg.checkpoint else "--arch"
        raise UserError(f"{option} {name}: give a ResNet with stages of strides 4, 8, 16 and 32")
    torch.manual_seed(mokd.seed_of(cfg.seed, "detector"))
    net = MaskRCNN(backbone, classes, cfg)
    if world > 1 and device.type == "cuda":
        net = timm.layers.convert_sync_batchnorm(net)
    return net.to(device, memory_format=mokd.memory_format(device))

# ------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def detect(net, images, cfg, device, rank=0, world=1):
    """-> what net finds on test images, in COCO's format; all of it on process 0. Raises UserError."""
    found, part = [], torch.utils.data.Subset(images, range(rank, len(images), world))
    progress = eval_knn.progress_of("test images", len(part))
    loader = mokd.make_loader(part, device, cfg.workers, batch_size=None)
    for done, (image, target, bad, reason) in enumerate(loader, 1):
        if bad >= 0:
            raise UserError(f"--data {cfg.data}: {reason}. Mend it: AP counts all test images", code=1)
        with mokd.autocast(device, cfg.dtype):
            y, = net([image.to(device, non_blocking=True)])
        y = {name: value.cpu() for name, value in y.items()}
        boxes = clip_boxes_to_image(y["boxes"] / target["scale"], target["size"]).tolist()
        for box, score, label, mask in zip(boxes, y["scores"].tolist(), y["labels"].tolist(), y["masks"]):
            runs = rle.encode(np.asfortranarray(paste_mask(mask, box, target["size"]).numpy()))
            x1, y1, x2, y2 = box
            found.append(dict(image_id=target["id"], category_id=images.categories[label - 1], score=score,
                              bbox=[x1, y1, x2 - x1, y2 - y1], segmentation=runs))
        progress(done)
    if world > 1:
        parts = [None] * world if mokd.MAIN else None
        dist.gather_object(found, parts)
        found = list(itertools.chain(*parts or []))
    return found

def average_precision(coco, found):
    """Truth, detections in COCO's format -> {"box": dict(AP=percent, AP50=..., AP75=...), "mask": ...}."""
    results = {name: dict(AP=0.0, AP50=0.0, AP75=0.0) for name in ("box", "mask")}
    if not found:   # which pycocotools cannot take
        return results
    with contextlib.redirect_stdout(io.StringIO()):
        found = coco.loadRes(found)
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            evaluation = COCOeval(coco, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            results[name] = dict(zip(results[name], (100 * evaluation.stats[:3]).tolist()))
    return results

# --------------------------------------------------------------------------------------------------- training
def learning_rate(cfg, step):
    """Linear in the batch; a tenth from 2/3 of the steps on, a hundredth from 8/9; a linear warm-up."""
    rise = 1 if step >= cfg.warmup else 0.001 + 0.999 * step / cfg.warmup
    drops = [ninths for ninths in (6, 8) if 9 * step >= ninths * cfg.iterations]
    return cfg.lr * cfg.batch_size / 16 * rise * 0.1 ** len(drops)

def train(cfg, net, images, device, rank, world):
    """Train to the end, from --out's checkpoint if there is one. Raises UserError, also on a signal."""
    params = [p for p in net.parameters() if p.requires_grad]
    decayed = dict(params=[p for p in params if p.dim() > 1], weight_decay=cfg.weight_decay)
    spared = dict(params=[p for p in params if p.dim() < 2])
    optimizer = torch.optim.SGD([decayed, spared], lr=0.0, momentum=0.9, foreach=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    path, first = f"{cfg.out}/checkpoint.pth", 0
    state = mokd.find_checkpoint(cfg, len(images))
    if state:
        with mokd.fitting(path):
            net.load_state_dict(state["net"])
            mokd.load_optimizer(optimizer, state["optimizer"])
            scaler.load_state_dict(state["scaler"])
        first = state["step"]
        say(f"resumed {path} at step {first}")
    forward = net.train()
    if world > 1:
        forward = nn.parallel.DistributedDataParallel(
            net, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    # mokd.batches counts in epochs; here the end is a step, perhaps within an epoch.
    order = SimpleNamespace(batch_size=cfg.batch_size, seed=cfg.seed,
                            epochs=cfg.iterations // (len(images) // cfg.batch_size) + 1)
    keys = itertools.islice(mokd.batches(len(images), order, first, rank, world), cfg.iterations - first)
    watch, window = mokd.Watch(images), []
    step = since = first
    start = clock = time.time()
    for batch in mokd.make_loader(images, device, cfg.workers, batch_sampler=keys, collate_fn=list):
        x, targets, bad, reasons = zip(*batch)
        torch.manual_seed(mokd.seed_of(cfg.seed, "samples", step, rank))   # for anchors and regions
        x = [image.to(device, non_blocking=True) for image in x]
        names = "scale", "boxes", "labels", "masks"
        targets = [{name: t[name].to(device, non_blocking=True) for name in names} for t in targets]
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

        stopped = watch.after_step(bad, reasons)
        saving = stopped or step % cfg.save_every == 0 or step == cfg.iterations
        if saving or step % cfg.log_every == 0:   # here alone does the host wait for the device
            values, now = mokd.mean_over_processes(torch.stack(window)).cpu(), time.time()
            finite = values.isfinite()
            if not finite.all():
                row = finite.all(1).tolist().index(False)
                wrong = ", ".join(name for name, ok in zip(losses, finite[row]) if not ok)
                raise UserError(f"step {since + row}: {wrong} not finite; nothing was saved of it. Lower "
                                f"--lr, raise --warmup, or use --dtype fp32", code=1)
            record = dict(step=step, steps=cfg.iterations) | dict(zip(losses, values.mean(0).tolist()))
            seconds_left = (now - start) / (step - first) * (cfg.iterations - step)
            images_s = cfg.batch_size * len(window) / (now - clock)
            record |= {"lr": learning_rate(cfg, step - 1), "images/s": images_s, "GB": mokd.memory_gb(device),
                       "minutes_left": seconds_left / 60}
            mokd.log(cfg, record, last=bool(saving))
            window, since, clock = [], step, now
        if saving:
            if not torch.stack(torch._foreach_norm([p.detach() for p in params])).isfinite().all():
                raise UserError(f"step {step - 1}: weights not finite after it; nothing was saved of it. "
                                f"Lower --lr", code=1)
            write(cfg, dict(config=asdict(cfg), step=step, images=len(images), net=net.state_dict(),
                            optimizer=optimizer.state_dict(), scaler=scaler.state_dict()), path)
        if stopped:
            raise UserError(f"stopped by {stopped.name} after step {step}; the same command goes on from "
                            f"there", code=128 + stopped)

    watch.end()   # the evaluation has nothing to save, so a signal ends it at once
    if world > 1:   # on the CPU, statistics of batch norms differ; all evaluate with those of the checkpoint
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)

# ------------------------------------------------------------------------------------------------------- main
def run(cfg):
    if rle is None:
        raise UserError("pycocotools is missing: pip install -r extras/requirements.txt")
    if cfg.draw:
        try:
            draw_coco(cfg.draw, DRAWN, cfg.seed)
        except OSError as error:
            raise UserError(f"--draw {cfg.draw}: {error.filename} cannot be made ({error.strerror}); give a "
                            f"new folder") from error
        say(f"drew {DRAWN['train']} training and {DRAWN['val']} test images; use them by --data {cfg.draw}")
        return

    device, rank, world = mokd.join_processes()
    mokd.fill_in_machine(cfg, device, world)
    torch.backends.cudnn.benchmark = False   # it would try all kernels at each new size of an image
    images, val = Images(read_annotations(cfg, "train"), cfg, "train"), read_annotations(cfg, "val")
    categories = sorted(val.cats)
    if categories != images.categories or not val.anns:
        raise UserError(f"--data {cfg.data}: val2017 has other categories than train2017, or no annotations")
    if len(images) < cfg.batch_size:
        raise UserError(f"--batch_size {cfg.batch_size}: only {len(images)} images have objects; lower it")
    net = build(cfg, len(categories), device, world)
    mokd.open_out(cfg)
    say(f"{len(images):,} training images with objects, {len(val.imgs):,} test images; "
        f"{cfg.iterations:,} steps of {cfg.batch_size}; processes: {world} on {device.type}, {cfg.dtype}")
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
