"""k-NN classification with frozen backbones (A.2), and how often two of them agree (Table 9).

    python eval_knn.py --checkpoint runs/resnet50-vit_small/checkpoint.pth          # both models of a run
    python eval_knn.py --checkpoint runs/a/checkpoint.pth runs/b/checkpoint.pth     # the models of two runs
    torchrun --nproc_per_node=8 eval_knn.py --arch resnet50 --weights model1.pth --data imagenet

The bank holds the L2-normalized pooled feature of each labeled training image's center crop. The k most
similar ones vote for the class of a validation image, each with weight exp(cosine / 0.07) [DINO]. Results are
printed, and appended as one record to knn.jsonl beside the checkpoint, or beside the file of --weights.
"""
import itertools, json, os, time   # noqa: E401
from dataclasses import asdict, dataclass

import mokd   # before torch
import torch
from torch.utils.data import Subset

from mokd import RANK, WORLD, changeable, flag, say, stop

@dataclass
class Source:
    """What is evaluated, and on what. eval_linear.py has these settings too."""
    checkpoint: str = flag("", "checkpoint.pth of a run of mokd.py, for its two models")
    net: str = flag("momentum", "which nets of the checkpoint", choices=("momentum", "student"))
    model: str = flag("both", "which models of the checkpoint", choices=("both", "1", "2"))
    arch: str = flag("", "in place of --checkpoint one backbone, of the paper's name or timm's")
    weights: str = flag("", "its weights, a model1.pth or a file of timm, DINO, MoCo; unset: untrained")
    model_kwargs: dict = flag(None, "arguments of timm.create_model for --arch, as patch_size=8")
    vit_pool: str = flag("mean", "pooled feature of a ViT; a run has its own", choices=("mean", "cls"))

    data: str = changeable("", "folder with train/ and val/, torchvision data set, or toy; unset: the run's")
    data_root: str = changeable("", "folder of torchvision data sets; unset: the run's, else data")
    image_size: int = flag(None, "pixels of an image; unset: the run's --global_size, else 224 [DINO]")
    resize: int = flag(None, "shorter side before the center crop; unset: image_size * 256 / 224 [DINO]")
    workers: int = changeable(None, "loaders of each process; raise it if the GPU waits for data")
    seed: int = flag(0, "seed of everything that is drawn")
    run = None   # no flag: settings and step of the last checkpoint's run, which load_backbones puts here

@dataclass
class Config(Source):
    checkpoint: tuple[str, ...] = flag((), "checkpoint.pth of one or more runs of mokd.py")
    k: tuple[int, ...] = flag((10, 20, 100, 200), "numbers of neighbors [A.2]; the table marks the best")
    temperature: float = flag(0.07, "a neighbor's vote weighs exp(cosine / this) [DINO]")
    batch_size: int = flag(256, "images of a forward pass, over all processes")
    dtype: str = flag("fp32", "number format of the forward pass", choices=("fp32", "bf16", "fp16"))
    save: str = flag("", "file for all features and labels, as DINO's dump_features")

def parse(argv=None):
    cfg = mokd.read_flags(Config, argv, __doc__.split("\n\n")[0])
    if 0 in (*cfg.k, cfg.temperature, cfg.batch_size, cfg.image_size, cfg.resize):
        stop("--k, --temperature, --batch_size, --image_size and --resize must be more than 0")
    return cfg

def load_backbones(cfg):
    """-> {name: Backbone} of what cfg names. Fills in data, data_root and image_size where they are unset."""
    if bool(cfg.checkpoint) == bool(cfg.arch) or (cfg.weights and not cfg.arch):
        stop("give --checkpoint FILE, or --arch NAME with --weights FILE and --data")
    if cfg.arch:
        cfg.data_root = cfg.data_root or "data"
        cfg.image_size = cfg.image_size or 224
        torch.manual_seed(mokd.seed_of(cfg.seed, "backbone", ""))
        backbone = mokd.Backbone(cfg.arch, cfg.model_kwargs, cfg.vit_pool, cfg.image_size)
        if cfg.weights:
            mokd.load_weights(backbone, cfg.weights, "--weights")
        return {cfg.arch: backbone}

    backbones = {}
    files = [cfg.checkpoint] if isinstance(cfg.checkpoint, str) else cfg.checkpoint
    for file in files:
        state = mokd.read_checkpoint(file)
        if "model1" not in state:
            stop(f"--checkpoint {file}: not of a run of mokd.py; weights go with --arch NAME --weights FILE")
        cfg.run = run = state["config"] | dict(step=state["step"])
        cfg.data = cfg.data or run["data"]
        cfg.data_root = cfg.data_root or run["data_root"]
        cfg.image_size = cfg.image_size or run["global_size"]
        models = [key.removeprefix("model") for key in state if key.startswith("model")]
        for i in models if cfg.model == "both" else cfg.model:
            arch, kwargs = run[f"arch{i}"], run[f"model_kwargs{i}"]
            backbone = mokd.Backbone(arch, kwargs, run["vit_pool"], cfg.image_size)
            weights = state[f"model{i}"]["momentum_net" if cfg.net == "momentum" else "net"]
            own = {name[9:]: w for name, w in weights.items() if name.startswith("backbone.")}
            backbone.load_state_dict(own)
            folder = file.removesuffix("/checkpoint.pth") + ": " if len(files) > 1 else ""
            backbones[f"{folder}{i} {arch}"] = backbone
    return backbones

def labels_of(images):
    """Labels (n,) of a data set, without opening its images where it lists them; -1: none."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(images, name):
            return torch.as_tensor(getattr(images, name)).long()
    return torch.tensor([int(label) for _, label in images])

def part_of(images, rows):
    """Some of the images. It keeps the classes' names, which fingerprint compares."""
    part = Subset(images, rows)
    part.classes = getattr(images, "classes", ())
    return part

def labeled_data(cfg):
    """-> the training images and the validation images that have a label, the number of classes."""
    train, val = mokd.get_images(cfg, "train"), mokd.get_images(cfg, "val")
    mokd.refuse_unlike_classes(train, val, cfg.data)
    parts, classes = [], 0
    for images in (train, val):
        labels = labels_of(images)
        if labels.max() < 0:
            stop(f"--data {cfg.data}: no image has a label, or none to validate")
        parts.append(part_of(images, (labels >= 0).nonzero().flatten().tolist()))
        classes = max(classes, int(labels.max()) + 1)
    return *parts, classes

def progress_of(what):
    """-> progress(done, n), which says after every 100 calls how many of n images are done."""
    start, calls = time.time(), itertools.count(1)
    def progress(done, n):
        if next(calls) % 100 == 0:
            rate = done / (time.time() - start)
            say(f"{what}: {done:,} of {n:,}, {rate:.0f} images/s, {(n - done) / rate / 60:.0f} min left")
    return progress

def classify(bank, labels, queries, answers, cfg, classes):
    """For queries (Q, D) of classes answers (Q,) -> (2, len(k), Q): the class with the most votes, and the
    place of the true one among all, 0 the first. As in DINO, the lower of two equal classes comes first."""
    found = torch.zeros(2, len(cfg.k), len(queries), dtype=torch.long, device=queries.device)
    for rows in torch.arange(len(queries))[RANK::WORLD].split(1024):   # this process's share
        votes = mokd.knn_classify(bank, labels, queries[rows], cfg.k, cfg.temperature, classes)
        ranked = votes.argsort(dim=-1, descending=True, stable=True)
        found[0, :, rows] = ranked[..., 0]
        found[1, :, rows] = (ranked == answers[rows, None]).int().argmax(-1)
    return mokd.sum_over_processes(found).cpu()

def run(cfg):
    device = mokd.join_processes(cfg)
    backbones = load_backbones(cfg)
    if cfg.save:   # now, because a missing folder would cost all that follows
        os.makedirs(os.path.dirname(cfg.save) or ".", exist_ok=True)
    train, val, classes = labeled_data(cfg)
    nets = [backbone.to(device) for backbone in backbones.values()]
    features = {}
    for part, images in (("train", train), ("val", val)):
        views = mokd.EvalView(images, cfg.image_size, cfg.resize)
        found, labels = mokd.extract_features(nets, views, device, cfg.batch_size // WORLD, cfg.workers,
                                              cfg.dtype, progress_of(part))
        features[part] = dict(features=dict(zip(backbones, found)), labels=labels)
    if cfg.save and RANK == 0:
        mokd.write(features, cfg.save)

    bank, queries = features["train"], features["val"]
    cfg.k = tuple(sorted({min(k, len(bank["labels"])) for k in cfg.k}))
    results, predictions, agreement = {}, {}, {}
    for name in backbones:
        own = bank["features"][name], bank["labels"], queries["features"][name], queries["labels"]
        predictions[name], places = classify(*own, cfg, classes)
        results[name] = {}
        for k, place in zip(cfg.k, places):
            results[name][k] = dict(top1=percent(place < 1), top5=percent(place < min(5, k)))   # [DINO]
    for a, b in itertools.combinations(backbones, 2):
        same = predictions[a] == predictions[b]
        agreement[f"{a} = {b}"] = {k: percent(hits) for k, hits in zip(cfg.k, same)}

    record = dict(settings=asdict(cfg), bank=len(bank["labels"]), classified=len(queries["labels"]))
    say(f"\nk-NN on {cfg.data}, {record['bank']:,} images in the bank, {record['classified']:,} classified, "
        f"of {cfg.image_size} pixels, %; * best k")
    show_table(cfg.k, results, agreement)
    first = cfg.weights if cfg.arch else cfg.checkpoint[0]
    if first and RANK == 0:
        with open(os.path.join(os.path.dirname(first), "knn.jsonl"), "a") as f:
            f.write(json.dumps(record | dict(results=results, agreement=agreement)) + "\n")

def percent(hits):
    return 100 * hits.double().mean().item()

def show_table(ks, results, agreement):
    """Print two rows for each model, and one for each pair: how often both say the same class (Table 9)."""
    width = max(22, *map(len, [*results, *agreement]))
    say(f"{'k':>{width + 6}}" + "".join(f"{k:>8} " for k in ks))
    for name, tops in results.items():
        best = max(ks, key=lambda k: tops[k]["top1"])
        top1 = "".join(f"{tops[k]['top1']:>8.2f}{'*' if k == best else ' '}" for k in ks)
        say(f"{name:{width}} top-1{top1}")
        say(f"{'':{width}} top-5" + "".join(f"{tops[k]['top5']:>8.2f} " for k in ks))
    if agreement:
        say("both say the same class:")
    for pair, same in agreement.items():
        say(f"{pair:{width}}      " + "".join(f"{same[k]:>8.2f} " for k in ks))

if __name__ == "__main__":
    mokd.main(parse=parse, run=run)
