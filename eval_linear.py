"""Linear probing (A.2) and fine-tuning (A.3: part of the labels, A.4: transfer) of one or two backbones.

    python eval_linear.py --checkpoint runs/resnet50-vit_small/checkpoint.pth      # both models, frozen
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint ... --lr 0.008 0.02 0.08 0.2
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint ... --finetune --label_fraction 0.01
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint ... --finetune --data cifar10

A frozen backbone has one linear layer for each learning rate, and one forward pass serves them all. A layer's
gradient is that of its own loss, because they share no parameter. Fine-tuning takes one rate after the other.
Rates are final: they are reached at the end of the warm-up, whatever the batch size.
"""
import copy
import math
import os
import sys
import time
from dataclasses import asdict, dataclass

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Subset
from torchvision.transforms.v2 import functional as TF

import mokd
from eval_knn import Source, check_source, labeled_data, labels_of, load_backbones, progress_of, write_json
from mokd import UserError, flag, say, warn

@dataclass
class Config(Source):
    finetune: bool = flag(False, "train the backbone too [A.3, A.4]", group="classifier")
    label_fraction: float = flag(1.0, "part of each class's images that keep labels, by --seed [A.3: lists]",
                                 low=1e-6, high=1)
    subset: str = flag("", "file that names the images that keep labels, as SimCLR's 1percent.txt [A.3]")
    n_last_blocks: int = flag(0, "a ViT's feature: CLS of this many last blocks [DINO]; 0: the pooled one")
    avgpool: bool = flag(False, "add the mean of its patch tokens to a ViT's feature [DINO]")
    lr: tuple = flag((), "rates after warm-up, never scaled; unset: to probe 0.08 CNN, 0.008 ViT [A.2], "
                     "to fine-tune 0.01, but give several, as the best is searched [A.3]", nargs="+")
    optimizer: str = flag("sgd", "sgd has momentum 0.9 [DINO]", choices=("sgd", "adamw"))
    weight_decay: float = flag(0.0, "0 to probe [A.2]; never on biases and 1-D parameters")
    epochs: int = flag(None, "unset: 100 [A.2, A.4]; fine-tuned on few labels 60, from 5 % 30 [A.3]", low=1)
    warmup_epochs: int = flag(None, "unset: 10 [A.2, A.4], 5 on part of the labels [A.3]; at most epochs / 5")
    batch_size: int = flag(None, "over all processes; unset: 2048 [A.2], to fine-tune 1024 [A.3], but at "
                           "least ten steps an epoch", low=1)
    scale: tuple = flag((0.08, 1.0), "part of the image that a crop covers [torchvision]", low=1e-4, high=1)

    out: str = flag("", "folder of results; unset: beside the checkpoint", group="running", may_differ=True)
    dtype: str = flag("auto", "of autocast; auto: bf16, else fp16, on a GPU; else fp32",
                      choices=("auto", "bf16", "fp16", "fp32"))
    log_every: int = flag(20, "steps between log lines", low=1, may_differ=True)
    eval_every: int = flag(1, "epochs between evaluations", low=1, may_differ=True)
    save_every: int = flag(0, "steps between checkpoints; 0: one each epoch", may_differ=True)

def parse(argv=None):
    cfg = check_source(Config(**mokd.read_flags(Config, argv, "eval_linear.py", __doc__.split("\n\n")[0])))
    if cfg.subset and cfg.label_fraction < 1:
        raise UserError("give either --label_fraction or --subset FILE")
    if len({f"{rate:g}" for rate in cfg.lr}) < len(cfg.lr):
        raise UserError("--lr: a rate is given twice")
    if cfg.scale[0] > cfg.scale[1]:
        raise UserError("--scale: give the smaller number first")
    kind = "finetune" if cfg.finetune else "linear"
    kind += f"-{cfg.label_fraction:g}" if cfg.label_fraction < 1 else ""
    for path in (cfg.subset, cfg.data):   # other labels, other data: another folder
        kind += f"-{os.path.splitext(os.path.basename(os.path.normpath(path)))[0]}" if path else ""
    folder = os.path.dirname(cfg.checkpoint) if cfg.checkpoint else f"runs/{cfg.arch}"
    cfg.out = cfg.out or os.path.join(folder, kind)
    return cfg

def with_label(images, cfg):
    """-> the images that keep their label: all, a part of each class drawn by --seed, or --subset's."""
    if cfg.subset:
        return Subset(images, named_in(cfg.subset, images))
    labels, kept = labels_of(images.dataset)[images.indices], []
    for c in labels.unique():
        rows = (labels == c).nonzero().flatten()
        order = torch.randperm(len(rows), generator=mokd.generator(cfg.seed, "labels", int(c)))
        kept += rows[order[:max(1, round(cfg.label_fraction * len(rows)))]].tolist()
    return Subset(images, sorted(kept))

def named_in(file, images):
    """-> indices of the images that a file names, one a line: NAME, or CLASS/NAME. Raises UserError."""
    try:
        with open(file) as f:
            found = {line.strip(): [] for line in f if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--subset {file}: cannot be read ({error})") from error
    for i in range(len(images)):
        path = mokd.name_of(images, i).replace(os.sep, "/").split("/")
        for name in {path[-1], "/".join(path[-2:]), "/".join(path[-3:])}:
            if name in found:
                found[name].append(i)
    wrong = sorted(name for name, rows in found.items() if len(rows) != 1)
    if wrong or not found:
        what = f"{wrong[0]} is the name of {len(found[wrong[0]])} training images" if wrong else "it is empty"
        raise UserError(f"--subset {file}: {what} ({len(wrong)} of {len(found)} names do not fit one image); "
                        f"write NAME, or CLASS/NAME where classes share a name")
    return sorted({rows[0] for rows in found.values()})

def fill_in(cfg, labeled, total, world):
    """The defaults that depend on what is trained, and on how many images. Raises UserError."""
    part = cfg.finetune and labeled < total
    cfg.epochs = cfg.epochs or (100 if not part else 60 if labeled < 0.05 * total else 30)
    if cfg.warmup_epochs is None:
        cfg.warmup_epochs = min(5 if part else 10, cfg.epochs // 5)
    if cfg.batch_size is None:
        usual = 1024 if cfg.finetune else 2048
        ten_steps = max(labeled // 10, min(2 * world, labeled))   # batch norm may need two in a process
        cfg.batch_size = max(1, min(usual, ten_steps) // world) * world
        if ten_steps < usual:
            say(f"--batch_size {cfg.batch_size}: so an epoch of {labeled:,} images has at least ten steps")
    if cfg.batch_size > labeled:
        raise UserError(f"--batch_size {cfg.batch_size}: there are only {labeled} labeled images; lower it")
    if cfg.warmup_epochs > cfg.epochs:
        raise UserError(f"--warmup_epochs {cfg.warmup_epochs} is more than --epochs {cfg.epochs}: lower it")

class TrainView(torch.utils.data.Dataset):
    """(epoch, index) -> random resized crop, flipped or not (3, S, S) uint8; label; -1; "". An unreadable
    image has label -100, which cross_entropy leaves out, and in place of -1 and "" its index and reason."""
    def __init__(self, images, cfg):
        self.images, self.size, self.scale, self.seed = images, cfg.image_size, cfg.scale, cfg.seed

    def __getitem__(self, key):
        epoch, index = key
        try:
            image, label = self.images[index]
            image = mokd.to_rgb(image)
        except mokd.UNREADABLE as error:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -100, index, str(error)
        with torch.random.fork_rng(devices=[]):   # torchvision draws crops from the global generator
            torch.default_generator.manual_seed(mokd.seed_of(self.seed, epoch, index))
            image = mokd.MultiCrop.crop(image, self.size, self.scale)
            return TF.horizontal_flip(image) if torch.rand(()) < 0.5 else image, int(label), -1, ""

class Classifier(nn.Module):
    """A backbone with one linear layer for each rate: images (B, 3, S, S) -> logits (R, B, classes)."""
    def __init__(self, name, backbone, cfg, classes, rates):
        super().__init__()
        self.name, self.backbone, self.finetune = name, backbone, cfg.finetune
        self.rates = {f"{rate:g}": rate for rate in rates}
        vit = backbone.prefix > 0
        self.n_last_blocks, self.avgpool = cfg.n_last_blocks if vit else 0, cfg.avgpool and vit
        blocks = len(getattr(backbone.model, "blocks", ()))
        if self.n_last_blocks > blocks:
            raise UserError(f"--n_last_blocks {cfg.n_last_blocks}: {name} has only {blocks} blocks")
        if not cfg.finetune:   # else what build_backbone found unused stays off: DDP would wait for it
            backbone.requires_grad_(False)
        with torch.no_grad():
            example = self.eval().features(torch.zeros(1, 3, cfg.image_size, cfg.image_size))
        if not example.isfinite().all():
            raise UserError(f"{name}: its features are not finite; give weights of an earlier step", code=1)
        self.layers = nn.ModuleList(nn.Linear(example.shape[1], classes) for _ in rates)
        for layer in self.layers:   # all alike, so that a rate's result does not depend on the others'
            nn.init.normal_(layer.weight, std=0.01, generator=mokd.generator(cfg.seed, "classifier"))
            nn.init.zeros_(layer.bias)

    def features(self, x):
        """-> (B, D): pooled feature, or CLS of the last blocks; --avgpool adds the patch tokens' mean."""
        if not self.n_last_blocks:
            pooled, tokens = self.backbone(x)
            return torch.cat([pooled, tokens.mean(1)], 1) if self.avgpool else pooled
        blocks = self.backbone.model.forward_intermediates(
            self.backbone.convert(x), indices=self.n_last_blocks, return_prefix_tokens=True, norm=True,
            output_fmt="NLC", intermediates_only=True)
        features = [prefix[:, 0] for _, prefix in blocks]
        return torch.cat(features + [blocks[-1][0].mean(1)] if self.avgpool else features, 1)

    def forward(self, x):
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            features = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            return torch.stack([layer(features.float()) for layer in self.layers])

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and self.finetune)   # frozen: its batch norms keep their statistics
        return self

class Classifiers(nn.ModuleList):   # so that one DDP and one data pass serve both models
    def forward(self, x):
        return [part(x) for part in self]

def make_optimizer(net, cfg):
    """Parameter groups for each linear layer, at its rate; a fine-tuned backbone has one and its rate."""
    groups = []
    for part in net:
        own = [p for p in part.backbone.parameters() if p.requires_grad]
        for peak, layer in zip(part.rates.values(), part.layers):
            params = [*layer.parameters(), *own]
            groups.append(dict(params=[p for p in params if p.dim() > 1], peak=peak))
            groups.append(dict(params=[p for p in params if p.dim() < 2], peak=peak, weight_decay=0.0))
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=cfg.weight_decay, foreach=True)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=cfg.weight_decay, foreach=True)

def on_device(x, y, device):
    """Images and labels of a loader -> the same on the device, the images as the networks get them."""
    return mokd.normalize(x.to(device, non_blocking=True).float() / 255), y.to(device, non_blocking=True)

@torch.no_grad()
def evaluate(net, images, cfg, device, rank, world):
    """-> {model: {rate: dict(top1, top5)}}, percent. Raises UserError where more than 1 % cannot be read."""
    net.eval()
    views = Subset(mokd.EvalView(images, cfg.image_size, cfg.resize), range(rank, len(images), world))
    counts = [torch.zeros(2, len(part.rates), device=device) for part in net]
    unreadable, done, progress = 0, 0, progress_of("validation", len(images), world)
    for x, y in mokd.make_loader(views, device, cfg.workers, batch_size=min(256, cfg.batch_size // world)):
        unreadable += (y == mokd.NO_IMAGE).sum()
        x, y = on_device(x, y, device)
        with mokd.autocast(device, cfg.dtype):
            logits = net(x)
        for count, z in zip(counts, logits):   # z: (R, B, classes); a layer that diverged is right nowhere
            finite = z.isfinite().all(-1)
            top5 = z.topk(min(5, z.shape[-1])).indices
            count[0] += ((z.argmax(-1) == y) & finite).sum(-1)
            count[1] += ((top5 == y[:, None]).any(-1) & finite).sum(-1)
        done += len(x)
        progress(done)
    net.train()
    unreadable = int(mokd.sum_over_processes(torch.as_tensor(unreadable)))
    if unreadable > 0.01 * len(images):
        raise UserError(f"--data {cfg.data}: {unreadable} of {len(images)} validation images cannot be read, "
                        f"more than 1 %: mend or remove those named above", code=1)
    results = {}
    for part, count in zip(net, counts):
        top1, top5 = (100 * mokd.sum_over_processes(count) / (len(images) - unreadable)).tolist()
        results[part.name] = {rate: dict(top1=a, top5=b) for rate, a, b in zip(part.rates, top1, top5)}
    return results

def write(cfg, value, path):
    """Let the first process write a file that is always whole. Raises UserError."""
    try:
        if mokd.MAIN:
            mokd.write(value, path)
    except (OSError, RuntimeError) as error:   # torch turns some of the first into the second
        raise UserError(f"--out {cfg.out}: {path} could not be written ({error}); make room and start "
                        f"again", code=1) from error

def write_results(cfg, results):
    write_json(f"{cfg.out}/results.json", dict(settings=asdict(cfg), results=results))

def note_losses(record, net, means, diverged):
    """Put the mean loss of each layer into a record of the log; diverged lists those without a number."""
    for part in net:
        losses = {rate: means.pop(0) for rate in part.rates}
        for rate, loss in losses.items():
            if not math.isfinite(loss):
                losses[rate] = None
                if [part.name, rate] not in diverged:
                    diverged.append([part.name, rate])
                    warn(f"{part.name} diverged at --lr {rate}: from here on it is right nowhere")
        record[f"lowest loss {part.name}"] = min((v for v in losses.values() if v is not None), default=None)
        record[f"losses {part.name}"] = losses

def note_results(record, found, results, epoch, diverged):
    """Put what evaluate found into a record of the log, and into the results of all rates."""
    for name, rates in found.items():
        for rate, tops in rates.items():
            if [name, rate] in diverged:
                tops.update(top1=0.0, top5=0.0)
            result = results.setdefault(name, {}).setdefault(rate, dict(best_top1=-1.0))
            result.update(tops)
            if tops["top1"] > result["best_top1"]:
                result.update(best_top1=tops["top1"], best_epoch=epoch)
        record[f"highest top1 {name}"] = max(tops["top1"] for tops in rates.values())
        record[f"accuracies {name}"] = rates

def train(cfg, net, done, saved, turns, watch, images, val, device, rank, world):
    """Train the layers of net, and with --finetune its backbones, from where `done` stands; fill in done.

    saved: the checkpoint to go on from, or None. turns: how many more rates come after. Raises UserError, on
    a signal after writing a checkpoint.
    """
    optimizer, path = make_optimizer(net, cfg), f"{cfg.out}/checkpoint.pth"
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16" and cfg.finetune)
    if saved:
        with mokd.fitting(path):
            net.load_state_dict(saved["net"], strict=False)
            mokd.load_optimizer(optimizer, saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
        say(f"resumed {path} at step {done['step']}")
    kept = [k for k in net.state_dict() if cfg.finetune or ".layers." in k]   # a frozen backbone is no result
    forward = net
    if world > 1:
        devices = [device] if device.type == "cuda" else None
        forward = nn.parallel.DistributedDataParallel(net, device_ids=devices, broadcast_buffers=False)
    per_epoch = len(images) // cfg.batch_size
    first = step = done["step"]
    steps, warmup = cfg.epochs * per_epoch, cfg.warmup_epochs * per_epoch
    window, start, clock = [], time.time(), time.time()
    net.train()
    keys = mokd.batches(len(images), cfg, first, rank, world)
    loader = mokd.make_loader(TrainView(images, cfg), device, cfg.workers, batch_sampler=keys)
    for x, y, bad, reasons in loader:
        torch.manual_seed(mokd.seed_of(cfg.seed, "dropout", step, rank))
        x, y = on_device(x, y, device)
        with mokd.autocast(device, cfg.dtype):
            logits = forward(x)
        labels = (y >= 0).sum().clamp_min(1)   # of a batch in which no image can be read the loss is 0
        losses = [F.cross_entropy(layer, y, reduction="sum") / labels for z in logits for layer in z]
        losses = torch.stack(losses)
        scaler.scale(losses.sum()).backward()
        factor = mokd.cosine_schedule(step, steps, 1.0, 0.0, warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        window.append(losses.detach())
        step += 1

        stopped = watch.after_step(bad.tolist(), reasons)
        epoch, end_of_epoch, last = (step - 1) // per_epoch + 1, step % per_epoch == 0, step == steps
        if step % cfg.log_every == 0 or last or stopped:
            record = dict(epoch=epoch, step=step, steps=steps)
            means = mokd.mean_over_processes(torch.stack(window).mean(0)).tolist()
            note_losses(record, net, means, done["diverged"])
            for part in net:
                record[f"lr {part.name}"] = {rate: factor * peak for rate, peak in part.rates.items()}
            now = time.time()
            minutes = (now - start) / (step - first) * (steps - step + turns * steps) / 60
            record |= {"lr/peak": factor, "images/s": cfg.batch_size * len(window) / (now - clock),
                       "GB": mokd.memory_gb(device), "minutes_left": minutes}
            mokd.log(cfg, record, last=end_of_epoch)
            window, clock = [], now

        paused = time.time()   # images/s are those of training alone
        lost = [[part.name, rate] in done["diverged"] for part in net for rate in part.rates]
        dead = all(lost) or (any(lost) and scaler.is_enabled())   # which skips a step for all layers
        if dead or end_of_epoch and (last or epoch % cfg.eval_every == 0):
            record = dict(epoch=epoch)
            found = evaluate(net, val, cfg, device, rank, world)
            note_results(record, found, done["results"], epoch, done["diverged"])
            mokd.log(cfg, record)
            write_results(cfg, done["results"])
        if stopped or dead or last or step % (cfg.save_every or per_epoch) == 0:
            done["step"] = step
            weights = net.state_dict()
            state = dict(config=asdict(cfg), images=len(images), net={k: weights[k] for k in kept})
            state |= dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            write(cfg, done | state, path)
        clock += time.time() - paused
        if stopped:
            raise UserError(f"stopped by {stopped.name} after step {step}; the same command goes on there",
                            128 + stopped)
        if dead:
            break

def best_rate(results):
    """{rate: result} -> the rate with the highest last top-1."""
    return max(results, key=lambda rate: results[rate]["top1"])

def save_classifier(cfg, part, rate, classes):
    """Write a backbone, under timm's names, and its classifier -> the lines that load and use them."""
    b, layer = part.backbone, part.layers[[*part.rates].index(rate)]
    path = f"{cfg.out}/classifier{part.name.split()[0] if cfg.checkpoint else ''}.pth"
    model = {k: v.contiguous() for k, v in b.model.state_dict().items()}
    write(cfg, dict(model=model, classifier=layer.state_dict()), path)
    kwargs = "".join(f", {k}={v!r}" for k, v in b.timm_kwargs.items())
    kwargs += ", dynamic_img_size=True" if getattr(b.model, "dynamic_img_size", False) else ""

    # what `features` computes of images in [0, 1], in timm's words
    z, cls, mean = "backbone.forward_features(images)", "z[:, 0]", f"z[:, {b.prefix}:].mean(1)"
    n = part.n_last_blocks
    if n:
        z = (f"backbone.forward_intermediates(images, {n}, return_prefix_tokens=True, norm=True, "
             f"output_fmt='NLC', intermediates_only=True)")
        cls, mean = ", ".join(f"z[{i}][1][:, 0]" for i in range(n)), "z[-1][0].mean(1)"
    feature = cls if n or b.cls else mean
    if not b.prefix:
        feature = "z.mean((1, 2))" if getattr(b.model, "output_fmt", "NCHW") == "NHWC" else "z.mean((2, 3))"
    elif part.avgpool:
        feature += f", {mean}"
    create = f"timm.create_model({b.timm_name!r}, num_classes=0{kwargs}, checkpoint_path={path!r})"
    return (f"backbone, classifier = {create}.eval(), torch.nn.Linear({layer.in_features}, {classes})\n"
            f"classifier.load_state_dict(torch.load({path!r}, weights_only=True)['classifier'])\n"
            f"images = torchvision.transforms.functional.normalize(images, *{b.mean_std})\n"
            f"z = {z}; logits = classifier(torch.cat([{feature}], 1))")

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
    mokd.open_out(cfg)
    done = dict(turn=0, step=0, results={}, diverged=[], loads={})
    saved = mokd.find_checkpoint(cfg, len(images))
    if saved:
        done = {key: saved.get(key, value) for key, value in done.items()}
    say(f"{len(images):,} of {len(every):,} training images, {len(val):,} to validate, {classes} classes, "
        f"{cfg.image_size} pixels; {cfg.epochs} epochs, batch {cfg.batch_size}; processes: {world}, on "
        f"{device.type}, {cfg.dtype}")

    # to probe, all rates take one turn; to fine-tune, each takes its own, and begins with the same backbone
    usual = dict(cnn=0.01, vit=0.01) if cfg.finetune else dict(cnn=0.08, vit=0.008)
    turns = [{name: cfg.lr or (usual[b.family],) for name, b in backbones.items()}]
    if cfg.finetune and cfg.lr:
        turns = [dict.fromkeys(backbones, (rate,)) for rate in cfg.lr]
    watch = mokd.Watch(images)
    for turn in range(done["turn"], len(turns)):
        net = Classifiers()
        for name, b in backbones.items():
            net.append(Classifier(name, copy.deepcopy(b), cfg, classes, turns[turn][name]))
        net = net.to(device, memory_format=mokd.memory_format(device))
        if cfg.finetune:
            say(f"fine-tuning at --lr {', '.join(net[0].rates)}, rate {turn + 1} of {len(turns)}")
            if world > 1 and device.type == "cuda":
                net = timm.layers.convert_sync_batchnorm(net)
        done["turn"] = turn
        train(cfg, net, done, saved, len(turns) - turn - 1, watch, images, val, device, rank, world)
        for part in net:   # of all rates so far the best one's weights stay
            best = best_rate(done["results"][part.name])
            if best in part.rates:
                done["loads"][part.name] = save_classifier(cfg, part, best, classes)
        done["step"], saved = 0, None

    kind = "fine-tuning" if cfg.finetune else "linear probing"
    say(f"\n{kind} on {cfg.data}, {len(images):,} labeled images, {cfg.epochs} epochs, %; * best rate\n"
        f"{'':22}{'lr':>8}{'top-1':>9}{'top-5':>8}{'best top-1':>13} in epoch")
    for name, results in done["results"].items():
        for rate, r in results.items():
            star = "*" if rate == best_rate(results) else " "
            say(f"{name:22}{rate:>8}{star}{r['top1']:>8.2f}{r['top5']:>8.2f}{r['best_top1']:>13.2f} "
                f"{r['best_epoch']}")
    for name, load in done["loads"].items():
        say(f"\n{name} with the classifier of its best rate:\n{load}")
    if len(done["diverged"]) == sum(len(rates) for turn in turns for rates in turn.values()):
        raise UserError("every rate diverged: give smaller ones with --lr", code=1)
    return done["results"]

if __name__ == "__main__":
    sys.exit(mokd.main(program="eval_linear.py", parse=parse, run=run))
