"""Linear probing (A.2) and fine-tuning (A.3: part of the labels, A.4: transfer) of one or two backbones.

    python eval_linear.py --checkpoint runs/resnet50-vit_small/checkpoint.pth                    # both models, frozen
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint ... --lr 0.02 0.05 0.1 0.2 0.5       # five rates at the cost of one
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint ... --finetune --label_fraction 0.01 # 1 % of the labels
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint ... --finetune --data cifar10        # transfer

A frozen backbone has one linear layer for each learning rate, and one forward pass serves them all: their parameters are their
own, so the gradient of the summed losses is to each what its own loss would give. Fine-tuning takes one rate after the other.
"""
import copy
import functools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Subset
from torchvision.transforms.v2 import functional as TF

import mokd
from eval_knn import Source, check_source, labeled_data, labels_of, load_backbones, progress_of
from mokd import UserError, flag, say

@dataclass
class Config(Source):
    finetune: bool = flag(False, "train the backbone too [A.3, A.4]", group="classifier")
    label_fraction: float = flag(1.0, "part of each class's training images that keep their label [A.3]", low=1e-6, high=1)
    subset: str = flag("", "instead: file with the names of the images that do, one a line, as SimCLR's 1percent.txt [A.3]")
    n_last_blocks: int = flag(0, "a ViT's feature: the CLS tokens of this many last blocks [DINO]; 0: the pooled feature [A.2]")
    avgpool: bool = flag(False, "add the mean of its patch tokens to a ViT's feature [DINO]")
    lr: tuple = flag((), "learning rates, times batch_size / 256; unset: 0.08 CNN, 0.008 ViT [A.2], 0.01 to fine-tune", nargs="+")
    optimizer: str = flag("sgd", "sgd has momentum 0.9 [A.2]", choices=("sgd", "adamw"))
    weight_decay: float = flag(0.0, "never on biases and 1-D parameters [A.2]")
    epochs: int = flag(None, "unset: 100 [A.2, A.4]; fine-tuning with part of the labels 60, from 5 % on 30 [A.3]", low=1)
    warmup_epochs: int = flag(None, "unset: 10 [A.2, A.4], 5 with part of the labels [A.3]; at most a fifth of the epochs")
    batch_size: int = flag(None, "over all processes; unset: 2048 [A.2], fine-tuning 1024 [A.3], at most all images", low=1)
    scale: tuple = flag((0.08, 1.0), "part of the image that a training crop covers [torchvision]", low=1e-4, high=1)

    out: str = flag("", "folder of results; unset: beside the checkpoint, or runs/linear-ARCH", group="running", may_differ=True)
    dtype: str = flag("auto", "of autocast; auto: bf16, else fp16, on a GPU; else fp32", choices=("auto", "bf16", "fp16", "fp32"))
    log_every: int = flag(20, "steps between log lines", low=1, may_differ=True)
    eval_every: int = flag(1, "epochs between evaluations", low=1, may_differ=True)
    save_every: int = flag(0, "steps between checkpoints; 0: one each epoch", may_differ=True)

def parse(argv=None):
    cfg = check_source(Config(**mokd.read_flags(Config, argv, "eval_linear.py", __doc__.split("\n\n")[0])))
    if cfg.subset and cfg.label_fraction < 1:
        raise UserError("give either --label_fraction or --subset FILE")
    if len({*cfg.lr}) < len(cfg.lr):
        raise UserError("--lr: a rate is given twice")
    return cfg

def with_label(images, cfg):
    """-> the images that keep their label: all, a class-balanced part drawn by --seed, or those named in --subset."""
    if cfg.subset:
        try:
            names = {line.strip() for line in open(cfg.subset) if line.strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--subset {cfg.subset}: cannot be read ({error})") from error
        own = {os.path.basename(mokd.name_of(images, i)): i for i in range(len(images))}
        missing = sorted(names - own.keys())
        if missing or not names:
            raise UserError(f"--subset {cfg.subset}: {len(missing)} of {len(names)} names are not among the training images of --data "
                       f"{cfg.data}, first {missing[0] if missing else 'none: the file is empty'}")
        return Subset(images, sorted(own[name] for name in names))
    labels, kept = labels_of(images.dataset)[images.indices], []
    for c in labels.unique():
        rows = (labels == c).nonzero().flatten()
        n = max(1, round(cfg.label_fraction * len(rows)))
        kept += rows[torch.randperm(len(rows), generator=mokd.generator(cfg.seed, "labels", int(c)))[:n]].tolist()
    return Subset(images, sorted(kept))

def fill_in(cfg, labeled, total, world):
    """The defaults that depend on what is trained, and on how many images."""
    part = cfg.finetune and labeled < total
    cfg.epochs = cfg.epochs or (100 if not part else 60 if labeled < 0.05 * total else 30)
    if cfg.warmup_epochs is None:
        cfg.warmup_epochs = min(5 if part else 10, cfg.epochs // 5)
    cfg.batch_size = cfg.batch_size or max(world, min(1024 if cfg.finetune else 2048, labeled) // world * world)
    kind = "finetune" if cfg.finetune else "linear"
    kind += f"-{cfg.label_fraction:g}" if cfg.label_fraction < 1 else "-subset" if cfg.subset else ""
    cfg.out = cfg.out or (f"{os.path.dirname(cfg.checkpoint) or '.'}/{kind}" if cfg.checkpoint else f"runs/{kind}-{cfg.arch}")
    if cfg.batch_size > labeled:
        raise UserError(f"--batch_size {cfg.batch_size}: there are only {labeled} labeled images; lower it")
    if cfg.warmup_epochs > cfg.epochs:
        raise UserError(f"--warmup_epochs {cfg.warmup_epochs} is more than --epochs {cfg.epochs}: lower it")

class TrainView(torch.utils.data.Dataset):
    """(epoch, index) -> random resized crop, flipped or not (3, S, S) uint8, and its label; -100 if unreadable: no loss."""
    def __init__(self, images, cfg):
        self.images, self.cfg = images, cfg

    def __getitem__(self, key):
        size = self.cfg.image_size
        try:
            image, label = self.images[key[1]]
        except Exception as error:   # decoders raise many things
            mokd.warn(f"skipped {mokd.name_of(self.images, key[1])}: {error}")
            return torch.zeros(3, size, size, dtype=torch.uint8), -100
        with torch.random.fork_rng(devices=[]):   # torchvision draws crops from the global generator
            torch.default_generator.manual_seed(mokd.seed_of(self.cfg.seed, *key))
            image = mokd.MultiCrop.crop(mokd.to_rgb(image), size, self.cfg.scale)
            return (TF.horizontal_flip(image) if torch.rand(()) < 0.5 else image), int(label)

class Classifier(nn.Module):
    """A backbone with one linear layer for each learning rate: images (B, 3, S, S) -> logits (R, B, classes)."""
    def __init__(self, backbone, cfg, classes, rates):
        super().__init__()
        self.backbone, self.finetune, self.rates = backbone.requires_grad_(cfg.finetune), cfg.finetune, rates
        vit = backbone.prefix > 0
        self.n_last_blocks, self.avgpool = cfg.n_last_blocks * vit, cfg.avgpool and vit
        dim = self.eval().features(torch.zeros(1, 3, cfg.image_size, cfg.image_size)).shape[1]
        self.layers = nn.ModuleList(nn.Linear(dim, classes) for _ in rates)
        for layer in self.layers:   # all alike, so that a rate's result does not depend on the others'
            nn.init.normal_(layer.weight, std=0.01, generator=mokd.generator(cfg.seed, "classifier"))
            nn.init.zeros_(layer.bias)

    def features(self, x):
        """-> (B, D): the pooled feature, or CLS tokens of the last blocks; with --avgpool and the mean of the patch tokens."""
        if not self.n_last_blocks:
            pooled, tokens = self.backbone(x)
            return torch.cat([pooled, tokens.mean(1)], 1) if self.avgpool else pooled
        blocks = self.backbone.model.forward_intermediates(
            self.backbone.convert(x), indices=self.n_last_blocks, return_prefix_tokens=True, norm=True,
            output_fmt="NLC", intermediates_only=True)
        return torch.cat([prefix[:, 0] for _, prefix in blocks] + [blocks[-1][0].mean(1)] * self.avgpool, 1)

    def forward(self, x):
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            features = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            return torch.stack([layer(features.float()) for layer in self.layers])

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and self.finetune)   # frozen: its batch norms keep their statistics
        return self

class Classifiers(nn.Module):   # so that one DDP and one data pass serve both models
    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return [part(x) for part in self.parts]

def make_optimizer(net, cfg):
    """Parameter groups for each linear layer, at its rate, and for a fine-tuned backbone; 1-D parameters have no weight decay."""
    groups = []
    for part in net.parts:
        for rate, layer in zip(part.rates, part.layers):
            groups += [dict(params=[layer.weight], peak=rate), dict(params=[layer.bias], peak=rate, weight_decay=0.0)]
        own = [p for p in part.backbone.parameters() if p.requires_grad]
        if own:   # of a fine-tuned backbone there is one rate
            groups += [dict(params=[p for p in own if p.dim() > 1], peak=part.rates[0]),
                       dict(params=[p for p in own if p.dim() < 2], peak=part.rates[0], weight_decay=0.0)]
    kind = functools.partial(torch.optim.SGD, momentum=0.9) if cfg.optimizer == "sgd" else torch.optim.AdamW
    return kind(groups, lr=0.0, weight_decay=cfg.weight_decay, foreach=True)

@torch.no_grad()
def evaluate(net, images, cfg, device, rank, world):
    """-> for each model (2, R): top-1 and top-5 (percent) of each rate."""
    net.eval()
    part = Subset(mokd.EvalView(images, cfg.image_size, cfg.resize), range(rank, len(images), world))
    counts = torch.zeros(1 + sum(2 * len(p.rates) for p in net.parts), device=device)
    progress, done = progress_of("validation", len(part)), 0
    for x, y in mokd.make_loader(part, device, cfg.workers, batch_size=max(1, min(256, cfg.batch_size // world))):
        done += len(x)
        x, y = mokd.normalize(x.to(device, non_blocking=True).float() / 255), y.to(device, non_blocking=True)
        with mokd.autocast(device, cfg.dtype):
            logits = net(x)
        hits = [(z.topk(min(n, z.shape[-1])).indices == y[:, None]).any(-1).sum(-1) for z in logits for n in (1, 5)]
        counts += torch.cat([(y >= 0).sum()[None], *hits])
        progress(done)
    counts = mokd.mean_over_processes(counts).cpu()
    net.train()
    return [row.view(2, -1) * 100 / counts[0] for row in counts[1:].split([2 * len(p.rates) for p in net.parts])]

def write(cfg, value, path):
    """Let the first process write a file that is always whole. Raises UserError."""
    try:
        if mokd.MAIN:
            mokd.write(value, path)
    except (OSError, RuntimeError) as error:   # torch turns some of the first into the second
        raise UserError(f"--out {cfg.out}: {path} could not be written ({error}); make room there and start again", code=1) from error

def write_results(cfg, results):
    try:
        if mokd.MAIN:
            with open(f"{cfg.out}/results.json.tmp", "w") as f:
                json.dump(dict(settings=asdict(cfg), results=results), f, indent=1)
            os.replace(f"{cfg.out}/results.json.tmp", f"{cfg.out}/results.json")
    except OSError as error:
        mokd.warn(f"--out {cfg.out}: results.json could not be written ({error})")

def train(cfg, names, net, place, state, images, val, device, rank, world):
    """Train the linear layers of net, and its backbones to fine-tune -> the results of all rates so far, {model: {rate: ...}}.
    `place` is that of the rates in the list to be done one by one, `state` the checkpoint to go on from, or None. Raises UserError,
    on a signal after writing a checkpoint."""
    optimizer, path = make_optimizer(net, cfg), f"{cfg.out}/checkpoint.pth"
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16" and cfg.finetune)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    kept = [k for k in net.state_dict() if cfg.finetune or k in trained]   # a frozen backbone needs no second copy
    results, diverged, first = (state["results"], state["diverged"], 0) if state else ({name: {} for name in names}, [], 0)
    if state and state["place"] == place:
        net.load_state_dict(state["models"][0], strict=False)
        optimizer.load_state_dict(state["models"][1])
        scaler.load_state_dict(state["scaler"])
        first = state["step"]
        say(f"resumed {path} at step {first}")
    forward = net if world == 1 else nn.parallel.DistributedDataParallel(
        net, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False)
    per_epoch = len(images) // cfg.batch_size
    step, steps, warmup = first, cfg.epochs * per_epoch, cfg.warmup_epochs * per_epoch
    caught, window, unreadable, start = set(), [], 0, time.time()
    clock, stops = start, (signal.SIGTERM, signal.SIGINT)
    for s in stops:
        signal.signal(s, lambda number, frame: caught.add(number))
    net.train()
    for x, y in mokd.make_loader(TrainView(images, cfg), device, cfg.workers,
                                 batch_sampler=mokd.batches(len(images), cfg, first, rank, world)):
        unreadable += int((y < 0).sum())
        torch.manual_seed(mokd.seed_of(cfg.seed, "dropout", step, rank))
        x, y = mokd.normalize(x.to(device, non_blocking=True).float() / 255), y.to(device, non_blocking=True)
        with mokd.autocast(device, cfg.dtype):
            logits = forward(x)
        losses = [torch.stack([F.cross_entropy(row, y) for row in z]) for z in logits]   # (R,) of each model
        scaler.scale(sum(loss.sum() for loss in losses)).backward()
        for g in optimizer.param_groups:
            g["lr"] = g["peak"] * mokd.cosine_schedule(step, steps, cfg.batch_size / 256, 0.0, warmup)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        window.append(torch.cat(losses).detach())
        step += 1

        flags = torch.tensor([unreadable, *(s in caught for s in stops)])   # on the CPU: no GPU is waited for
        if world > 1:
            dist.all_reduce(flags)
        if flags[0] > 0.01 * len(images) * math.ceil(step / per_epoch):
            raise UserError(f"--data {cfg.data}: more than 1 % of the images cannot be read: mend or remove those named above", code=1)
        stopped = [s for s, flag in zip(stops, flags[1:].tolist()) if flag]
        end_of_epoch, last = step % per_epoch == 0, step == steps
        if step % cfg.log_every == 0 or last or stopped:
            n, means = len(window), mokd.mean_over_processes(torch.stack(window).mean(0)).cpu()
            record = dict(epoch=(step - 1) // per_epoch, step=step, steps=steps)
            for name, part, loss in zip(names, net.parts, means.split([len(p.rates) for p in net.parts])):
                record |= {f"loss {name}": loss.nan_to_num(math.inf, math.inf).min().item(),
                           f"losses {name}": {f"{rate:g}": v for rate, v in zip(part.rates, loss.tolist())}}
                for rate in (r for r, v in zip(part.rates, loss.tolist()) if not math.isfinite(v) and [name, r] not in diverged):
                    diverged.append([name, rate])   # which counts as classifying nothing
                    mokd.warn(f"{name} diverged at --lr {rate:g}")
            now = time.time()
            record |= {"lr": max(g["lr"] for g in optimizer.param_groups), "images/s": cfg.batch_size * n / (now - clock),
                       "GB": mokd.memory_gb(device), "minutes_left": (now - start) / (step - first) * (steps - step) / 60}
            mokd.log(cfg, record, last=end_of_epoch)
            window, clock = [], now
        dead = all([name, rate] in diverged for name, part in zip(names, net.parts) for rate in part.rates)
        dead |= bool(diverged) and scaler.is_enabled()   # which skips the steps of all for one
        if end_of_epoch and (last or (step // per_epoch) % cfg.eval_every == 0) or dead:
            record = dict(epoch=(step - 1) // per_epoch)
            for name, part, tops in zip(names, net.parts, evaluate(net, val, cfg, device, rank, world)):
                tops *= torch.tensor([[name, rate] not in diverged for rate in part.rates])
                for rate, top1, top5 in zip(part.rates, *tops.tolist()):
                    r = results[name].setdefault(f"{rate:g}", dict(best_top1=-1.0)) | dict(top1=top1, top5=top5)
                    if top1 > r["best_top1"]:
                        r |= dict(best_top1=top1, best_epoch=record["epoch"])
                    results[name][f"{rate:g}"] = r
                record[f"top1 {name}"] = max(tops[0].tolist())
            mokd.log(cfg, record)
            write_results(cfg, results)
            clock = time.time()
        if stopped or last or dead or step % (cfg.save_every or per_epoch) == 0:
            weights = net.state_dict()
            write(cfg, dict(config=asdict(cfg), step=step, place=place, results=results, diverged=diverged,
                            scaler=scaler.state_dict(), models=[{k: weights[k] for k in kept}, optimizer.state_dict()]), path)
        if stopped:
            raise UserError(f"stopped by {stopped[0].name} after step {step}; the same command goes on from there", 128 + stopped[0])
        if dead:
            break
    return results

def best_rate(rates):
    """{rate: result} -> the rate with the highest last top-1."""
    return max(rates, key=lambda rate: rates[rate]["top1"])

def save_classifier(cfg, name, part, rate, classes):
    """Write a backbone with its classifier under timm's names -> how to load it; or, where timm has no place for such a
    classifier, the linear layer alone."""
    b, layer = part.backbone, part.layers[[f"{r:g}" for r in part.rates].index(rate)]
    path = f"{cfg.out}/classifier{name.split()[0] if ' ' in name else ''}.pth"
    x = torch.randn(2, 3, cfg.image_size, cfg.image_size, device=layer.weight.device)
    pool = dict(global_pool="token" if b.cls else "avg", fc_norm=False) if b.prefix else {}
    part.eval()
    for more in (pool, pool | dict(dynamic_img_size=True)):
        try:
            model = timm.create_model(b.timm_name, num_classes=classes, **b.timm_kwargs | more).to(x.device).eval()
            head = next(k for k, m in model.named_modules() if m is model.get_classifier())
            model.load_state_dict(b.model.state_dict() | {f"{head}.{k}": v for k, v in layer.state_dict().items()})
            with torch.no_grad():
                same = (model(b.convert(x)) - layer(part.features(x))).abs().max() < 1e-3
        except Exception:   # a model of other parts
            same = False
        if same:
            write(cfg, {k: v.contiguous() for k, v in model.state_dict().items()}, path)
            kwargs = "".join(f", {k}={v!r}" for k, v in (b.timm_kwargs | more).items())
            return f"timm.create_model({b.timm_name!r}, num_classes={classes}{kwargs}, checkpoint_path='{path}')"
    write(cfg, layer.state_dict(), path)
    return f"{path}: the linear layer alone, because timm's {b.timm_name} does not apply its classifier to this feature"

def run(cfg):
    device, rank, world = mokd.join_processes()
    transfer = cfg.finetune and cfg.label_fraction == 1 and not cfg.subset
    backbones = load_backbones(cfg, margin=1 if transfer else 256 / 224)
    every, val, classes = labeled_data(cfg)
    images = with_label(every, cfg)
    fill_in(cfg, len(images), len(every), world)
    mokd.fill_in_machine(cfg, device, world)
    if (cfg.n_last_blocks or cfg.avgpool) and not any(b.prefix for b in backbones.values()):
        raise UserError("--n_last_blocks and --avgpool are for ViTs with a CLS token; here is none")
    for name, b in backbones.items():
        if cfg.n_last_blocks > len(getattr(b.model, "blocks", ())) and b.prefix:
            raise UserError(f"--n_last_blocks {cfg.n_last_blocks}: {name} has only {len(b.model.blocks)} blocks")
        if cfg.avgpool and not cfg.n_last_blocks and b.prefix and not b.cls:
            raise UserError(f"--avgpool: the pooled feature of {name} is that mean already; add --n_last_blocks")
    try:
        os.makedirs(cfg.out, exist_ok=True)
        open(f"{cfg.out}/log.jsonl", "a").close()
    except OSError as error:
        raise UserError(f"--out {cfg.out}: cannot be written to ({error.strerror}); give another folder") from error
    path, state = f"{cfg.out}/checkpoint.pth", None
    if os.path.exists(path):
        state = mokd.read_checkpoint(path)
        mokd.refuse_other_settings(path, state["config"], cfg)
    say(f"{len(images):,} of {len(every):,} training images, {len(val):,} to validate, {classes} classes; {cfg.epochs} epochs, batch "
        f"{cfg.batch_size}; {world} process{'es' * (world > 1)} on {device.type}, {cfg.dtype}")

    rates = {name: cfg.lr or (0.01 if cfg.finetune else 0.08 if b.family == "cnn" else 0.008,) for name, b in backbones.items()}
    loads = {}
    for place in range(state["place"] if state else 0, len(cfg.lr) if cfg.finetune and cfg.lr else 1):
        own = {name: copy.deepcopy(b).to(device, memory_format=mokd.memory_format(device)) for name, b in backbones.items()}
        parts = [Classifier(own[name], cfg, classes, r[place:place + 1] if cfg.finetune else r) for name, r in rates.items()]
        net = Classifiers(parts).to(device)
        if cfg.finetune:
            say(f"fine-tuning at --lr {parts[0].rates[0]:g}")
        net = mokd.sync_batch_norm(net, device) if cfg.finetune and world > 1 else net
        results = train(cfg, [*backbones], net, place, state, images, val, device, rank, world)
        state = dict(place=-1, results=results, diverged=[])
        for name, part in zip(backbones, net.parts):
            if best_rate(results[name]) in [f"{r:g}" for r in part.rates]:
                loads[name] = save_classifier(cfg, name, part, best_rate(results[name]), classes)

    kind = "fine-tuning" if cfg.finetune else "linear probing"
    say(f"\n{kind} on {cfg.data}, {len(images):,} labeled images, {cfg.epochs} epochs, %; * best rate\n"
        f"{'':22}{'lr':>8}{'top-1':>9}{'top-5':>8}{'best top-1':>13} (epoch)")
    for name in backbones:
        for rate, r in results[name].items():
            say(f"{name:22}{rate:>8}{'*' if rate == best_rate(results[name]) else ' '}{r['top1']:>8.2f}{r['top5']:>8.2f}"
                f"{r['best_top1']:>13.2f} ({r['best_epoch']})")
    for name, load in loads.items():
        say(f"{name}: {load}")
    if all(r["top1"] == 0 for rates in results.values() for r in rates.values()):
        raise UserError("every rate diverged: give smaller ones with --lr", code=1)
    return results

if __name__ == "__main__":
    sys.exit(mokd.main(program="eval_linear.py", parse=parse, run=run))
