"""k-NN classification with frozen backbones (A.2), and how often two of them agree (Table 9).

    python eval_knn.py --checkpoint runs/resnet50-vit_small/checkpoint.pth          # both models of a run
    python eval_knn.py --checkpoint runs/a/checkpoint.pth runs/b/checkpoint.pth     # the models of two runs
    python eval_knn.py --arch resnet50 --weights runs/resnet50-vit_small/model1.pth --data imagenet
    torchrun --nproc_per_node=8 eval_knn.py --checkpoint ... --save f.pt         # the bank is split

The bank holds every training image that has a label, as the L2-normalized pooled representation of its center
crop. The k most similar ones vote for a validation image's class, each with weight exp(cosine / 0.07) [DINO].
"""
import itertools
import json
import math
import os
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass

import huggingface_hub.constants   # timm downloads with it
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Subset

import mokd
from mokd import UserError, flag, say, warn

@dataclass
class Source:
    """What is evaluated, and on what; eval_linear.py has these settings too."""
    checkpoint: str = flag("", "checkpoint.pth of a run of mokd.py: its two models", group="models")
    net: str = flag("momentum", "which nets of the checkpoint", choices=("momentum", "student"))
    model: str = flag("both", "which models of the checkpoint", choices=("both", "1", "2"))
    arch: str = flag("", "instead, one backbone: the paper's name or timm's; untrained without weights")
    weights: str = flag("", "file of --arch's weights: a model1.pth, or a file of timm, torchvision,"
                        " DINO, MoCo")
    pretrained: bool = flag(False, "give --arch timm's own weights, which are downloaded")
    model_kwargs: dict = flag({}, "arguments of timm.create_model for --arch")
    patch_size: int = flag(16, "patch of --arch vit_tiny/small/base, pixels", low=1)
    vit_pool: str = flag("mean", "pooled feature of a ViT; a checkpoint has its own", choices=("mean", "cls"))

    data: str = flag("", "folder with train/ and val/, torchvision's, or toy; unset: the run's", group="data")
    data_root: str = flag("", "folder of torchvision data sets; unset: the run's, else data", may_differ=True)
    image_size: int = flag(None, "pixels of an image; unset: the run's --global_size, else 224 [DINO]", low=1)
    resize: int = flag(None, "shorter side before the crop; unset: image_size * 256 / 224 [DINO]", low=1)
    workers: int = flag(None, "loaders of each process; unset: its share of the cores", may_differ=True)
    seed: int = flag(0, "seed of everything that is drawn")

@dataclass
class Config(Source):
    checkpoint: tuple = flag(("",), "checkpoint.pth of one or more runs: all their models", nargs="+",
                             group="models", low="", high=chr(sys.maxunicode))   # words lie between these two
    k: tuple = flag((10, 20, 100, 200), "numbers of neighbors [A.2]", low=1, group="k-NN", nargs="+")
    temperature: float = flag(0.07, "a neighbor's vote weighs exp(cosine / this) [DINO]", low=1e-3)
    batch_size: int = flag(256, "images of a forward pass, over all processes", low=1)
    dtype: str = flag("fp32", "number format of the forward pass", choices=("fp32", "bf16", "fp16"))
    json: str = flag("", "write the table to this file; unset: knn.json beside the first checkpoint, with "
                         "what differs in its name, as in knn-cifar10.json")
    save: str = flag("", "write features and labels, in the data set's order, to this file")

def check_source(cfg):
    """Refuse settings that cannot work -> cfg. Raises UserError."""
    mokd.check_ranges(cfg)
    if bool(cfg.checkpoint) == bool(cfg.arch):
        raise UserError("give either --checkpoint FILE or --arch NAME")
    if cfg.checkpoint and (cfg.weights or cfg.pretrained or cfg.model_kwargs):
        raise UserError("--weights, --pretrained and --model_kwargs go with --arch, not with --checkpoint")
    if cfg.weights and cfg.pretrained:
        raise UserError("give either --weights FILE or --pretrained")
    if cfg.arch and not cfg.data:
        raise UserError(f"--arch {cfg.arch}: say with --data on what")
    return cfg

def parse(argv=None):
    given = mokd.read_flags(Config, argv, "eval_knn.py", __doc__.split("\n\n")[0])
    cfg = check_source(Config(**dict(checkpoint=()) | given))
    if len({*cfg.checkpoint}) < len(cfg.checkpoint):
        raise UserError("--checkpoint: a file is given twice")
    if cfg.checkpoint and not cfg.json:
        words = [f"{len(cfg.checkpoint)}-runs"] if len(cfg.checkpoint) > 1 else []
        words += [os.path.splitext(os.path.basename(os.path.normpath(cfg.data)))[0]] if cfg.data else []
        words += [f"model{cfg.model}"] if cfg.model != "both" else []
        words += ["student"] if cfg.net == "student" else []   # so that no result overwrites another
        cfg.json = os.path.join(os.path.dirname(cfg.checkpoint[0]), "-".join(["knn", *words]) + ".json")
    return cfg

def load_backbones(cfg, margin=256 / 224):
    """-> {name: Backbone} of what cfg names. Fills in its data, data_root, image_size and resize
    (image_size * margin) where they are unset. Raises UserError."""
    if cfg.arch:
        cfg.image_size, cfg.data_root = cfg.image_size or 224, cfg.data_root or "data"
        cfg.resize = cfg.resize or round(cfg.image_size * margin)
        backbone = build(cfg, "--arch", "", cfg.arch, cfg.model_kwargs, cfg.patch_size, cfg.vit_pool)
        if cfg.weights:
            mokd.load_backbone(backbone, cfg.weights, "--weights")
        if cfg.pretrained:
            load_pretrained(backbone)
        return {cfg.arch: backbone}

    files = [cfg.checkpoint] if isinstance(cfg.checkpoint, str) else cfg.checkpoint
    runs = [os.path.basename(os.path.dirname(os.path.abspath(file))) for file in files]
    if len({*runs}) < len(runs):   # two folders are called alike: only paths tell the runs apart
        runs = files
    both_given, first, backbones = cfg.data and cfg.image_size, None, {}
    for file, run_name in zip(files, runs):
        advice = "Give the checkpoint.pth of a run; a backbone's weights go with --arch NAME --weights FILE"
        state = mokd.read_checkpoint(file, advice)
        saved = state["config"]
        if "arch1" not in saved:   # of linear/ or finetune/, which evaluate a run
            raise UserError(f"--checkpoint {file}: not of a run of mokd.py. {advice}")
        first = first or saved
        alike = saved["data"] == first["data"] and saved["global_size"] == first["global_size"]
        if not alike and not both_given:
            raise UserError(f"--checkpoint {file}: of other data or another size than the first "
                            f"({saved['data']}, {saved['global_size']}); give --data and --image_size")
        cfg.data, cfg.image_size = cfg.data or saved["data"], cfg.image_size or saved["global_size"]
        cfg.data_root = cfg.data_root or saved["data_root"]
        cfg.resize = cfg.resize or round(cfg.image_size * margin)
        for i in "12" if cfg.model == "both" else cfg.model:
            arch = saved[f"arch{i}"]
            backbone = build(cfg, f"--checkpoint {file}: model {i},", i, arch, saved[f"model_kwargs{i}"],
                             saved["patch_size"], saved["vit_pool"])
            with mokd.fitting(f"--checkpoint {file}", advice):
                weights = state[f"model{i}"]["momentum_net" if cfg.net == "momentum" else "net"]
                backbone.load_state_dict({k[9:]: w for k, w in weights.items() if k.startswith("backbone.")})
            backbones[f"{i} {arch}" if len(files) == 1 else f"{run_name}: {i} {arch}"] = backbone
    return backbones

def build(cfg, flag, i, arch, model_kwargs, patch_size, pool):
    """-> Backbone that takes images of cfg.image_size. Raises UserError; its sentence begins with `flag`."""
    if cfg.resize < cfg.image_size:
        raise UserError(f"--resize {cfg.resize} is less than --image_size {cfg.image_size}: raise it")
    torch.manual_seed(mokd.seed_of(cfg.seed, "backbone", i))
    try:
        backbone = mokd.build_backbone(arch, model_kwargs, patch_size, pool, [cfg.image_size], flag=flag)
    except UserError as error:   # it speaks of the flags of training
        text = str(error).replace("other --global_size and --local_size", "another --image_size")
        raise UserError(text) from error
    backbone.convert, backbone.mean_std = lambda x: x, mokd.MEAN_STD   # load_pretrained may need others
    return backbone.eval()

def load_pretrained(backbone):
    """timm's own weights, which may want images normalized by another mean and deviation than ImageNet's."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:   # it answers
        pass
    except OSError:   # no network: look into the cache at once, in place of a minute of retries
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        model = timm.create_model(backbone.timm_name, pretrained=True, num_classes=0, **backbone.timm_kwargs)
    except Exception as error:   # a download fails in many ways
        reason = [*str(error).splitlines(), type(error).__name__][0]
        raise UserError(f"--pretrained: timm's weights of {backbone.timm_name} could not be had ({reason}) "
                        f"Connect to the network, or give a file with --weights") from error
    backbone.model.load_state_dict(model.state_dict())
    backbone.mean_std = tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
    their_mean, their_std = torch.tensor(backbone.mean_std).view(2, 3, 1, 1)

    def convert(x):
        mean, std = mokd.mean_and_std(x.device)
        return (x * std + mean - their_mean.to(x)) / their_std.to(x)
    backbone.convert = convert
    backbone.register_forward_pre_hook(lambda module, args: (convert(args[0]),))

def labels_of(images):
    """Labels (n,) of a data set, without opening its images where it lists them; -1: none."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(images, name):
            return torch.as_tensor(getattr(images, name)).long()
    if hasattr(images, "tensors"):
        return images.tensors[1].long()
    return torch.as_tensor([label for _, label in images]).long()

def labeled_data(cfg):
    """-> (train, val, number of classes); of both only images with labels. Raises UserError."""
    train, val = mokd.get_data(cfg)
    if val is None:
        raise UserError(f"--data {cfg.data}: no validation images; give a folder with train/ and val/, "
                        f"in each a folder for each class")
    names = [{*(getattr(images, "classes", None) or ())} for images in (train, val)]
    if names[0] != names[1]:
        odd = sorted(names[0] ^ names[1])
        raise UserError(f"--data {cfg.data}: train/ and val/ must have the same class folders; {odd[0]} is "
                        f"in one alone ({len(odd)} such)")
    parts, highest = [], []
    for part, images in (("training", train), ("validation", val)):
        labels = labels_of(images)
        rows = (labels >= 0).nonzero().flatten().tolist()
        if not rows:
            raise UserError(f"--data {cfg.data}: no {part} image has a label")
        parts.append(Subset(images, rows))
        highest.append(int(labels.max()))
    if highest[1] > highest[0]:
        raise UserError(f"--data {cfg.data}: validation has label {highest[1]}, training up to {highest[0]}")
    return *parts, highest[0] + 1

def progress_of(what, n, world=1):
    """-> progress(done), which shows a line every now and then: images done of n, images/s, time left. `done`
    counts those of one process, the line those of all `world`."""
    start = shown = time.time()

    def progress(done):
        nonlocal shown
        now, done = time.time(), min(n, done * world)
        if now - shown > (0.5 if sys.stdout.isatty() else 10) or (done >= n and shown > start):
            shown = now
            rate = done / (now - start)
            record = {what: f"{done:,}/{n:,}", "images/s": rate, "minutes_left": (n - done) / rate / 60}
            mokd.show(record, last=done >= n)
    return progress

def gather(x):
    """A tensor, of the same shape on all processes -> a list of those of all processes."""
    if not dist.is_initialized():
        return [x]
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts

def whole(x, n, world):
    """Rows of n images, of which process r has images r, r + world, r + 2 world, ... -> all, in order."""
    share = math.ceil(n / world)
    x = F.pad(x, [0, 0] * (x.dim() - 1) + [0, share - len(x)])
    return torch.stack(gather(x), 1).flatten(0, 1)[:n]   # (share, world, ...) before it is flattened

def nearest(bank, labels, queries, k):
    """The k nearest of the whole bank by cosine -> similarities (Q, k), labels (Q, k), most similar first.

    bank (n, D), labels (n,) below 2^20: this process's part of the bank; rows of negative label do not count.
    queries (Q, D): the same on all processes. Similarity and label make one whole number, the key:
    similarity in steps of 2^-30 in its upper bits, the label in its lower 20. Keys are sorted by similarity,
    and by label where that is equal. So the answer, ties included, does not depend on how the bank is split,
    over processes or into the chunks in which it is worked through.
    """
    nothing = -2 ** 62   # less than any key
    found = []
    for some in queries.split(1024):
        some = F.normalize(some.float(), dim=1)   # again, because half precision rounded it
        best = torch.full((len(some), k), nothing, device=some.device)
        for part, y in zip(bank.split(2 ** 15), labels.split(2 ** 15)):
            similarity = some @ F.normalize(part.float(), dim=1).T
            key = (similarity * 2 ** 30).long() * 2 ** 20 - y   # less y, so that the lower label comes first
            key.masked_fill_(y < 0, nothing)
            best = torch.cat([best, key.topk(min(k, len(part))).values], 1).topk(k).values
        found.append(torch.cat(gather(best), 1).topk(k).values)
    key = torch.cat(found)
    labels = -key % 2 ** 20
    return (key + labels).float() / 2 ** 50, labels

def classify(similarity, neighbors, classes, answers, temperature):
    """Similarities, labels (Q, k) of neighbors, answers (Q,) -> predictions (Q,), places (Q,) of the answers
    among all classes sorted by votes, 0 the first. As in DINO, the lower of two classes with equal votes is
    first, also where nobody votes for either."""
    # Each similarity is taken relative to the nearest one's, so that no temperature makes a vote overflow.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weight.new_zeros(len(answers), classes).scatter_add_(1, neighbors, weight)
    own = votes.gather(1, answers[:, None])
    before = (votes == own) & (torch.arange(classes) < answers[:, None])
    return votes.argmax(1), ((votes > own) | before).sum(1)

def run(cfg):
    device, rank, world = mokd.join_processes()
    mokd.fill_in_machine(cfg, device, world)
    if cfg.save and mokd.MAIN:
        check_writable(cfg.save)
    backbones = load_backbones(cfg)
    *parts, classes = labeled_data(cfg)
    nets = [b.to(device, memory_format=mokd.memory_format(device)) for b in backbones.values()]
    features, labels = [], []
    for what, images in zip(("bank", "queries"), parts):
        views = mokd.EvalView(images, cfg.image_size, cfg.resize)
        progress = progress_of(what, len(images), world)
        f, y = mokd.extract_features(nets, views, device, cfg.batch_size // world, cfg.workers, rank, world,
                                     cfg.dtype, progress)
        features.append(f)
        labels.append(y)

    # The bank stays split over the processes; each gets all queries.
    in_bank = int(mokd.sum_over_processes((labels[0] >= 0).sum()))
    ks = sorted({min(k, in_bank) for k in cfg.k})
    answers = whole(labels[1], len(parts[1]), world)
    readable = answers >= 0
    answers = answers[readable].cpu()
    results, predictions = {}, {}
    for name, bank, queries in zip(backbones, *features):
        queries = whole(queries, len(parts[1]), world)[readable]
        similarity, neighbors = nearest(bank, labels[0], queries, max(ks))
        similarity, neighbors = similarity.double().cpu(), neighbors.cpu()   # a GPU adds in no fixed order
        results[name], predictions[name] = {}, {}
        for k in ks:
            chunks = zip(similarity[:, :k].split(1024), neighbors[:, :k].split(1024), answers.split(1024))
            found = [classify(s, y, classes, answer, cfg.temperature) for s, y, answer in chunks]
            predictions[name][k], places = (torch.cat(x) for x in zip(*found))
            top1, top5 = (100 * (places < n).double().mean().item() for n in (1, min(5, k)))   # as DINO
            results[name][k] = dict(top1=top1, top5=top5)
    same = {}
    for a, b in itertools.combinations(backbones, 2):
        hits = {k: predictions[a][k] == predictions[b][k] for k in ks}
        same[f"{a} = {b}"] = {k: 100 * hit.double().mean().item() for k, hit in hits.items()}

    say(f"\nk-NN on {cfg.data}, {in_bank:,} images in the bank, {len(answers):,} classified, of "
        f"{cfg.image_size} pixels, %; * best k")
    show_table(ks, results, same)
    if cfg.json:
        write_json(cfg.json, dict(settings=asdict(cfg), bank=in_bank, classified=len(answers),
                                  results=results, same_class=same))
    if cfg.save:
        value = {}
        for part, images, f, y in zip(("train", "val"), parts, features, labels):
            f = {name: whole(x, len(images), world).cpu() for name, x in zip(backbones, f)}
            value[part] = dict(features=f, labels=whole(y, len(images), world).cpu())
        try:
            if mokd.MAIN:
                mokd.write(value, cfg.save)
                say(f"wrote {cfg.save}")
        except (OSError, RuntimeError) as error:   # torch turns some of the first into the second
            raise UserError(f"--save {cfg.save}: could not be written ({error})", code=1) from error
    return results

def show_table(ks, results, same):
    """Print two rows for each model, and one for each pair: how often they say the same class (Table 9)."""
    width = max(22, *map(len, [*results, *same]))
    say(f"{'k':>{width + 6}}" + "".join(f"{k:>8} " for k in ks))
    for name, result in results.items():
        best = max(ks, key=lambda k: result[k]["top1"])
        top1 = "".join(f"{result[k]['top1']:>8.2f}{'*' if k == best else ' '}" for k in ks)
        say(f"{name:{width}} top-1{top1}")
        say(f"{'':{width}} top-5" + "".join(f"{result[k]['top5']:>8.2f} " for k in ks))
    if same:
        say("both say the same class:")
    for pair, result in same.items():
        say(f"{pair:{width}}      " + "".join(f"{result[k]:>8.2f} " for k in ks))

def write_json(path, value):
    """Let the first process write a file that is always whole; no reason to end where that fails."""
    try:
        if mokd.MAIN:
            with open(path + ".tmp", "w") as f:
                json.dump(value, f, indent=1)
            os.replace(path + ".tmp", path)
    except OSError as error:
        warn(f"{path} could not be written ({error})")

def check_writable(path):
    """See, before hours are spent, that a file can be written. One that is there already stays as it is."""
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(0, "it is a folder")
        open(path + ".tmp", "ab").close()
        os.remove(path + ".tmp")
    except OSError as error:
        raise UserError(f"--save {path}: cannot be written ({error.strerror}); give another file") from error

if __name__ == "__main__":
    sys.exit(mokd.main(program="eval_knn.py", parse=parse, run=run))
