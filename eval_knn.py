"""k-NN classification with frozen backbones (A.2), and how often two of them agree (Table 9).

    python eval_knn.py --checkpoint runs/resnet50-vit_small/checkpoint.pth              # both models of a run of mokd.py
    python eval_knn.py --arch resnet50 --weights runs/resnet50-vit_small/model1.pth --data imagenet
    torchrun --nproc_per_node=8 eval_knn.py --checkpoint ... --save features.pt         # each GPU holds its part of the bank

The bank holds every training image that has a label, as the L2-normalized pooled representation of its center crop. The k most
similar ones vote for a validation image's class, each with weight exp(cosine / 0.07), as in DINO.
"""
import math
import sys
import time
from dataclasses import dataclass

import timm
import torch

import mokd
from mokd import UserError, flag, say

@dataclass
class Source:
    """What is evaluated, and on what; eval_linear.py has these settings too."""
    checkpoint: str = flag("", "checkpoint.pth of a run of mokd.py: its two models", group="models")
    net: str = flag("momentum", "which nets of the checkpoint", choices=("momentum", "student"))
    model: str = flag("both", "which models of the checkpoint", choices=("both", "1", "2"))
    arch: str = flag("", "instead, one backbone: a name of the paper's, or any timm model; untrained unless there are weights")
    weights: str = flag("", "its weights: a model1.pth, or a timm, torchvision or DINO state dict")
    pretrained: bool = flag(False, "its weights: timm's own, downloaded")
    model_kwargs: dict = flag({}, "arguments of timm.create_model for --arch")
    patch_size: int = flag(16, "patch of --arch vit_tiny/small/base, pixels", low=1)
    vit_pool: str = flag("mean", "pooled feature of --arch, if a ViT; a checkpoint knows its own", choices=("mean", "cls"))

    data: str = flag("", "folder with train/ and val/, torchvision data set, or toy; unset: the checkpoint's", group="data")
    data_root: str = flag("", "folder to which torchvision data sets are downloaded; unset: the checkpoint's, else data", may_differ=True)
    image_size: int = flag(None, "pixels of an image; unset: the checkpoint's --global_size, else 224 [A.2]", low=1)
    resize: int = flag(None, "shorter side before the center crop, bicubic; unset: image_size * 256 / 224 [A.2]", low=1)
    workers: int = flag(None, "loaders of each process; unset: its share of the cores, at most 16; 1 without a GPU", may_differ=True)
    seed: int = flag(0, "seed of everything that is drawn")

@dataclass
class Config(Source):
    k: tuple = flag((10, 20, 100, 200), "numbers of neighbors [A.2]", low=1, group="k-NN", nargs="+")
    temperature: float = flag(0.07, "of a neighbor's vote [DINO]", low=1e-3)
    batch_size: int = flag(256, "images of a forward pass, over all processes", low=1)
    dtype: str = flag("fp32", "of the forward pass", choices=("fp32", "bf16", "fp16"))
    save: str = flag("", "write features and labels, in the data set's order, to this file")

def check_source(cfg):
    """Refuse settings that cannot work -> cfg. Raises UserError."""
    mokd.check_ranges(cfg)
    for wrong, sentence in (
            (bool(cfg.checkpoint) == bool(cfg.arch), "give either --checkpoint FILE or --arch NAME"),
            (cfg.checkpoint and (cfg.weights or cfg.pretrained or cfg.model_kwargs), "--weights, --pretrained and "
             "--model_kwargs go with --arch, not with --checkpoint"),
            (cfg.weights and cfg.pretrained, "give either --weights FILE or --pretrained"),
            (cfg.arch and not cfg.data, f"--arch {cfg.arch}: say with --data on what")):
        if wrong:
            raise UserError(sentence)
    return cfg

def parse(argv=None):
    return check_source(Config(**mokd.read_flags(Config, argv, "eval_knn.py", __doc__.split("\n\n")[0])))

def load_backbones(cfg, margin=256 / 224):
    """-> {name: Backbone} of what cfg names. Fills in its data, data_root, image_size and resize (image_size * margin) where
    they are unset. Raises UserError."""
    if cfg.checkpoint:
        state = mokd.read_checkpoint(cfg.checkpoint, "Give the checkpoint.pth of a run; a backbone's weights go with --arch NAME "
                                     "--weights FILE")
        saved = state["config"]
        kinds = {i: (saved[f"arch{i}"], saved[f"model_kwargs{i}"], saved["patch_size"], saved["vit_pool"])
                 for i in "12" if cfg.model in ("both", i)}
        cfg.data, cfg.image_size = cfg.data or saved["data"], cfg.image_size or saved["global_size"]
        cfg.data_root = cfg.data_root or saved["data_root"]
    else:
        kinds = {"": (cfg.arch, cfg.model_kwargs, cfg.patch_size, cfg.vit_pool)}
        cfg.image_size, cfg.data_root = cfg.image_size or 224, cfg.data_root or "data"
    cfg.resize, backbones = cfg.resize or round(cfg.image_size * margin), {}
    if cfg.resize < cfg.image_size:
        raise UserError(f"--resize {cfg.resize} is less than --image_size {cfg.image_size}: raise it")
    for i, (arch, *kind) in kinds.items():
        torch.manual_seed(mokd.seed_of(cfg.seed, "backbone", i))
        backbone = mokd.build_backbone(arch, *kind, sizes=[cfg.image_size])
        backbone.convert = lambda x: x   # what --pretrained may need
        if cfg.checkpoint:
            prefix, weights = "backbone.", state["models"][int(i) - 1][cfg.net == "momentum"]
            backbone.load_state_dict({k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)})
        elif cfg.weights:
            mokd.load_backbone(backbone, cfg.weights, "--weights")
        elif cfg.pretrained:
            load_pretrained(backbone)
        backbones[f"{i} {arch}".strip()] = backbone.eval()
    return backbones

def load_pretrained(backbone):
    """timm's own weights, which may want images normalized otherwise than by ImageNet's mean and standard deviation."""
    try:
        model = timm.create_model(backbone.timm_name, pretrained=True, num_classes=0, **backbone.timm_kwargs)
    except Exception as error:   # a download fails in many ways
        raise UserError(f"--pretrained: timm's weights of {backbone.timm_name} could not be had ({error})") from error
    backbone.model.load_state_dict(model.state_dict())
    theirs = [torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std")]
    def convert(module, args):
        mean, std = mokd.mean_and_std(args[0].device)
        return (args[0] * std + mean - theirs[0].to(std)) / theirs[1].to(std),
    backbone.convert = lambda x: convert(None, (x,))[0]
    backbone.register_forward_pre_hook(convert)

def labels_of(images):
    """Labels (n,) of a data set, without opening its images where it lists them; -1: none."""
    labels = next((getattr(images, name) for name in ("targets", "labels", "_labels") if hasattr(images, name)), None)
    if labels is None:
        labels = images.tensors[1] if hasattr(images, "tensors") else [label for _, label in images]
    return torch.as_tensor(labels).long()

def labeled_data(cfg):
    """-> (train, val, number of classes); of both only images with labels. Raises UserError where they do not fit each other."""
    parts = mokd.get_data(cfg)
    if parts[1] is None or not len(parts[1]):
        raise UserError(f"--data {cfg.data}: no validation images; give a folder with train/ and val/, in each a folder for each class")
    names = [getattr(images, "classes", None) for images in parts]
    if names[0] != names[1]:
        odd = sorted({*names[0]} ^ {*names[1]})
        raise UserError(f"--data {cfg.data}: train/ and val/ must have the same class folders; {odd[0]} is in one alone ({len(odd)} such)")
    labels = [labels_of(images) for images in parts]
    parts = [mokd.Subset(images, (y >= 0).nonzero().flatten().tolist()) for images, y in zip(parts, labels)]
    classes = int(labels[0].max()) + 1
    if labels[1].max() >= classes:
        raise UserError(f"--data {cfg.data}: validation has label {int(labels[1].max())}, training only 0 to {classes - 1}")
    return *parts, classes

def progress_of(what, n):
    """-> progress(done), which shows a line every now and then: images done, images/s, time left."""
    start = shown = time.time()
    def progress(done):
        nonlocal shown
        now = time.time()
        if now - shown > (0.5 if sys.stdout.isatty() else 10) or (done >= n and shown > start):
            shown = now
            mokd.show({what: f"{done:,}/{n:,}", "images/s": done / (now - start),
                       "minutes_left": (now - start) / done * (n - done) / 60}, last=done >= n)
    return progress

def accuracies(votes, answers):
    """Votes (Q, classes), answers (Q,) -> top-1, top-5 (percent). A class without a vote is no prediction; of classes with
    equal votes the first comes first."""
    own = votes.gather(1, answers[:, None])
    earlier = torch.arange(votes.shape[1], device=votes.device) < answers[:, None]
    place = ((votes > own) | (votes == own) & earlier).sum(1) + votes.shape[1] * (own[:, 0] == 0)
    return [100 * (place < n).float().mean().item() for n in (1, 5)]

def run(cfg):
    device, rank, world = mokd.join_processes()
    mokd.fill_in_machine(cfg, device, world)
    if cfg.save and mokd.MAIN:
        write(cfg, {})   # before hours are spent
    backbones = load_backbones(cfg)
    *parts, classes = labeled_data(cfg)
    features, labels = [], []
    for name, images in zip(("bank", "queries"), parts):
        f, y = mokd.extract_features(
            [b.to(device, memory_format=mokd.memory_format(device)) for b in backbones.values()],
            mokd.EvalView(images, cfg.image_size, cfg.resize), device, cfg.batch_size // world, cfg.workers, rank, world, cfg.dtype,
            progress_of(name, math.ceil(len(images) / world)))
        features.append(f)
        labels.append(y)

    n, results, predictions = math.ceil(len(parts[1]) / world), {}, {}
    answers = mokd.gather(labels[1], n)
    for name, bank, queries in zip(backbones, *features):
        queries = mokd.gather(queries, n)[answers >= 0]
        similarity, neighbors = mokd.nearest(bank, labels[0], queries, max(cfg.k))
        for k in cfg.k:
            votes = mokd.vote(similarity[:, :k], neighbors[:, :k], classes, cfg.temperature)
            results[name, k] = accuracies(votes, answers[answers >= 0])
            predictions[name, k] = votes.argmax(1)
    say(f"\nk-NN on {cfg.data}, {len(parts[0]):,} images in the bank, {int((answers >= 0).sum()):,} classified, %; * best k")
    say(f"{'k':>28}" + "".join(f"{k:>8} " for k in cfg.k))
    for name in backbones:
        best = max(cfg.k, key=lambda k: results[name, k][0])
        for i, top in enumerate(("top-1", "top-5")):
            row = "".join(f"{results[name, k][i]:>8.2f}{'*' if k == best and not i else ' '}" for k in cfg.k)
            say(f"{'' if i else name:22}{top:>6}{row}")
    if len(backbones) == 2:
        same = [100 * (predictions[a, k] == predictions[b, k]).float().mean().item() for k in cfg.k for a, b in [backbones]]
        say(f"{'both say the same class':28}" + "".join(f"{s:>8.2f} " for s in same))
    if cfg.save:
        def whole(x, n):   # process r has every world-th image, from the r-th on
            return mokd.gather(x, math.ceil(n / world)).unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:n].cpu()
        value = {part: dict(features={name: whole(x, len(images)) for name, x in zip(backbones, f)}, labels=whole(y, len(images)))
                 for part, images, f, y in zip(("train", "val"), parts, features, labels)}
        if mokd.MAIN:
            write(cfg, value)
            say(f"wrote {cfg.save}")
    return results

def write(cfg, value):
    try:
        mokd.write(value, cfg.save)
    except (OSError, RuntimeError) as error:   # torch turns some of the first into the second
        raise UserError(f"--save {cfg.save}: cannot be written ({error}); give another file", code=1) from error

if __name__ == "__main__":
    sys.exit(mokd.main(program="eval_knn.py", parse=parse, run=run))
