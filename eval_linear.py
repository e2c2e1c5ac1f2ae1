"""Linear probing (A.2) and fine-tuning (A.3: part of the labels, A.4: transfer) of one or two backbones.

    python eval_linear.py --checkpoint runs/resnet50-vit_small/checkpoint.pth      # both models, frozen
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint ... --lr 0.008 0.02 0.08 0.2
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint ... --finetune --label_fraction 0.01
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint ... --finetune --data cifar10

A frozen backbone has one linear layer for each rate, and one forward pass serves them all. A layer's gradient
is that of its own loss, because layers share no parameter. Fine-tuning takes one rate a run. Rates are final:
they are reached at the end of the warm-up, whatever the batch size. Results are the last record in log.jsonl.
classifier1.pth and classifier2.pth have a backbone, under timm's names, the layer of its best rate, and what
is needed to use both; the last lines that are printed do so.
"""
import os, time  # noqa: E401
from dataclasses import asdict, dataclass

import mokd   # before torch
import timm, torch  # noqa: E401
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as TF

from eval_knn import Source, labeled_data, labels_of, load_backbones, part_of, progress_of
from mokd import RANK, WORLD, changeable, flag, say, stop

@dataclass
class Config(Source):
    finetune: bool = flag(False, "train the backbone too [A.3, A.4]")
    label_fraction: float = flag(1.0, "part of each class that keeps labels, by --seed [A.3: lists]", high=1)
    subset: str = flag("", "in place of a fraction, a file that names images: SimCLR's 1percent.txt [A.3]")
    n_last_blocks: int = flag(0, "a ViT's feature: CLS of this many last blocks [DINO]; 0: the pooled one")
    avgpool: bool = flag(False, "add the mean of its patch tokens to a ViT's feature [DINO]")
    lr: tuple[float, ...] = flag((), "rates after warm-up, never scaled; unset: to probe 0.08 CNN, 0.008 ViT"
                                 " [A.2], to fine-tune 0.01, where one a run is trained: try several [A.3]")
    weight_decay: float = flag(0.0, "0 to probe [A.2]; never on biases and 1-D parameters")
    epochs: int = flag(100, "epochs [A.2, A.4]; A.3 has 60 with 0.01 of the labels, 30 with 0.1")
    warmup_epochs: int = flag(10, "epochs in which rates rise [A.2, A.4]; A.3 has 5")
    batch_size: int = flag(None, "over all processes; unset: 2048 [A.2], to fine-tune 1024 [A.3]")
    scale: tuple[float, float] = flag((0.08, 1.0), "part of the image in a crop [torchvision]", high=1)
    out: str = changeable("", "folder of results; unset: linear or finetune beside the checkpoint")
    dtype: str = flag("auto", "of autocast, as for mokd.py", choices=("auto", "bf16", "fp16", "fp32"))
    log_every: int = changeable(20, "steps between log lines; 0: none")

def parse(argv=None):
    cfg = mokd.read_flags(Config, argv, __doc__.split("\n\n")[0])
    if cfg.finetune and len(cfg.lr) > 1:
        stop("--finetune trains one rate a run: give one --lr, and an --out for each")
    if 0 in (cfg.batch_size, cfg.epochs, cfg.label_fraction, cfg.image_size, cfg.resize):
        stop("--batch_size, --epochs, --label_fraction, --image_size and --resize must be more than 0")
    if cfg.warmup_epochs > cfg.epochs:
        stop(f"--warmup_epochs {cfg.warmup_epochs} is more than --epochs {cfg.epochs}: lower it")
    cfg.batch_size = cfg.batch_size or (1024 if cfg.finetune else 2048)
    if not cfg.out:
        folder = os.path.dirname(cfg.checkpoint) if cfg.checkpoint else f"runs/{cfg.arch}"
        cfg.out = os.path.join(folder, "finetune" if cfg.finetune else "linear")
    return cfg

def keep_labels(images, cfg):
    """-> the images that keep their label: a part of each class, drawn by --seed, or those in --subset."""
    if cfg.subset:
        return part_of(images, named_in(cfg.subset, images))
    labels, kept = labels_of(images.dataset)[images.indices], []
    for c in labels.unique():
        rows = (labels == c).nonzero().flatten()
        order = torch.randperm(len(rows), generator=mokd.generator(cfg.seed, "labels", int(c)))
        kept += rows[order[:max(1, round(cfg.label_fraction * len(rows)))]].tolist()
    return part_of(images, sorted(kept))

def named_in(file, images):
    """-> indices of the images that a file names, one a line: NAME, or CLASS/NAME."""
    with open(file) as f:
        found = {line.strip(): set() for line in f if line.strip()}
    for i, row in enumerate(images.indices):
        path = images.dataset.samples[row][0].replace(os.sep, "/").split("/")
        for n in (1, 2, 3):
            name = "/".join(path[-n:])
            if name in found:
                found[name].add(i)
    wrong = [name for name, rows in found.items() if len(rows) != 1]
    if wrong or not found:
        stop(f"--subset {file}: {len(wrong)} of {len(found)} lines do not name one training image, as "
             f"{wrong[:1]}; write NAME, or CLASS/NAME where classes share a name")
    return sorted(set.union(*found.values()))

class TrainView:
    """(epoch, index) -> random resized crop (3, S, S) uint8, mirrored or not; label. An unreadable image is
    named and has label -100, which cross_entropy leaves out."""
    def __init__(self, images, cfg):
        self.images, self.cfg = images, cfg

    def __getitem__(self, key):
        epoch, index = key
        size = self.cfg.image_size
        try:
            image, label = self.images[index]
            image = mokd.to_rgb(image)
        except OSError as error:
            mokd.warn(f"skipped {error}")
            return torch.zeros(3, size, size, dtype=torch.uint8), -100
        with torch.random.fork_rng(devices=[]):   # torchvision draws crops from the global generator
            torch.default_generator.manual_seed(mokd.seed_of(self.cfg.seed, epoch, index))
            image = mokd.crop(image, size, self.cfg.scale)
            if torch.rand(()) < 0.5:
                image = TF.horizontal_flip(image)
        return image, int(label)

class Classifier(nn.Module):
    """A backbone with one linear layer for each rate: images (B, 3, S, S) -> logits (R, B, classes)."""
    def __init__(self, name, backbone, cfg, classes):
        super().__init__()
        self.name, self.backbone, self.finetune = name, backbone, cfg.finetune
        usual = 0.01 if cfg.finetune else 0.08 if backbone.family == "cnn" else 0.008
        self.rates = {f"{rate:g}": rate for rate in cfg.lr or [usual]}
        has_cls = backbone.prefix_tokens > 0
        self.n_last_blocks = cfg.n_last_blocks if has_cls else 0
        self.avgpool = cfg.avgpool and has_cls
        if not cfg.finetune:   # else what Backbone found unused stays off, because DDP would wait for it
            backbone.requires_grad_(False)
        with torch.no_grad():
            example = self.eval().features(torch.zeros(1, 3, cfg.image_size, cfg.image_size))
        if not example.isfinite().all():
            stop(f"{name}: its features are not finite, so its weights are damaged", 1)
        self.layers = nn.ModuleList(nn.Linear(example.shape[1], classes) for _ in self.rates)
        for layer in self.layers:   # all alike, so that a rate's result does not depend on the others'
            nn.init.normal_(layer.weight, std=0.01, generator=mokd.generator(cfg.seed, "classifier"))
            nn.init.zeros_(layer.bias)

    def features(self, x):
        """-> (B, D): the pooled feature, or CLS of the last blocks; --avgpool adds the patch tokens' mean."""
        if not self.n_last_blocks:
            pooled, tokens = self.backbone(x)
            return torch.cat([pooled, tokens.mean(1)], 1) if self.avgpool else pooled
        blocks = self.backbone.model.forward_intermediates(
            x, self.n_last_blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC",
            intermediates_only=True)
        features = [prefix[:, 0] for _, prefix in blocks]
        if self.avgpool:
            features.append(blocks[-1][0].mean(1))
        return torch.cat(features, 1)

    def in_python(self, net):
        """-> `features` in Python, of images and of timm's net with this name."""
        tokens = f"{net}.forward_features(images)"
        parts = [tokens + self.backbone.pooling]
        if self.n_last_blocks:
            parts = [f"*[cls[:, 0] for _, cls in {net}.forward_intermediates(images, {self.n_last_blocks}, "
                     "return_prefix_tokens=True, norm=True, output_fmt='NLC', intermediates_only=True)]"]
        if self.avgpool:
            parts.append(f"{tokens}[:, {self.backbone.prefix_tokens}:].mean(1)")
        return f"torch.cat([{', '.join(parts)}], 1)" if self.n_last_blocks or self.avgpool else parts[0]

    def forward(self, x):
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            features = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            return torch.stack([layer(features.float()) for layer in self.layers])

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and self.finetune)   # a frozen one's batch norms keep their statistics
        return self

class Classifiers(nn.ModuleList):
    """All models share one pass over the data: uint8 images -> logits of all layers (R, B, classes)."""
    def __init__(self, parts):
        super().__init__(parts)
        self.rates = [(part.name, rate) for part in parts for rate in part.rates]   # in the logits' order

    def forward(self, x):
        x = mokd.normalize(x.float() / 255)
        return torch.cat([part(x) for part in self])

def make_optimizer(net, cfg):
    """Parameter groups for each linear layer, at its rate. A fine-tuned backbone joins its one layer."""
    groups = []
    for part in net:
        own = [p for p in part.backbone.parameters() if p.requires_grad]
        for peak, layer in zip(part.rates.values(), part.layers):
            params = [*layer.parameters(), *own]
            groups.append(dict(params=[p for p in params if p.dim() > 1], peak=peak))
            groups.append(dict(params=[p for p in params if p.dim() < 2], peak=peak, weight_decay=0.0))
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=cfg.weight_decay, foreach=True)

@torch.no_grad()
def evaluate(net, images, cfg, device):
    """-> {model: {rate: dict(top1, top5)}}, in percent. A rate with logits that are not finite gets 0."""
    net.eval()
    views = mokd.EvalView(images, cfg.image_size, cfg.resize)
    batch = min(256, cfg.batch_size // WORLD)
    mine = [rows for rows in torch.arange(len(images))[RANK::WORLD].split(batch) if len(rows)]
    counts = torch.zeros(3, len(net.rates), device=device)   # a process may have no image
    unreadable, progress = torch.tensor(0), progress_of("validation")
    for i, (x, y) in enumerate(mokd.make_loader(views, device, cfg.workers, batch_sampler=mine), 1):
        unreadable += (y == mokd.NO_IMAGE).sum()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with mokd.autocast(device, cfg.dtype):
            logits = net(x)
        top1 = logits.argmax(-1) == y   # (R, B)
        top5 = (logits.topk(min(5, logits.shape[-1])).indices == y[:, None]).any(-1)
        counts += torch.stack([top1, top5, ~logits.isfinite().all(-1)]).float().sum(-1)   # (3, R)
        progress(i * batch * WORLD, len(images))
    net.train()

    unreadable = mokd.sum_over_processes(unreadable).item()
    mokd.refuse_unreadable(unreadable, len(images))
    percent = 100 * mokd.sum_over_processes(counts) / (len(images) - unreadable)
    results = {part.name: {} for part in net}
    for (name, rate), top1, top5, lost in zip(net.rates, *percent.tolist()):
        results[name][rate] = dict(top1=0.0, top5=0.0) if lost else dict(top1=top1, top5=top5)
        if lost:
            say(f"{name}: logits at --lr {rate} are not finite, so it counts as 0")
    if percent[2].all():
        stop("no rate gives finite logits: give smaller ones with --lr, and another --out", 1)
    return results

def train_step(net, x, y, cfg, optimizer, scaler, factor):
    """A step at `factor` times the peak rates -> losses of all layers, means over the readable images."""
    with mokd.autocast(x.device, cfg.dtype):
        logits = net(x)
    readable = (y >= 0).sum().clamp_min(1)   # a batch without any has loss 0
    losses = torch.stack([F.cross_entropy(own, y, reduction="sum") / readable for own in logits])
    scaler.scale(losses.sum()).backward()
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return losses.detach()

def best_of(rates):
    """{rate: dict(top1, top5)} -> the rate with the highest top-1."""
    return max(rates, key=lambda rate: rates[rate]["top1"])

def resume(cfg, net, optimizer, scaler, state):
    """Fill all three from a checkpoint -> its step and results."""
    net.load_state_dict(state["net"], strict=False)   # it has no frozen backbone
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    say(f"resumed {cfg.out}/checkpoint.pth at step {state['step']}")
    return state["step"], state["results"]

def save(cfg, net, optimizer, scaler, step, results, images):
    """Write checkpoint.pth, all that resuming needs. A frozen backbone is not saved again."""
    weights = {name: w for name, w in net.state_dict().items() if cfg.finetune or ".layers." in name}
    state = dict(config=asdict(cfg), step=step, images=mokd.fingerprint(images), net=weights, results=results)
    state |= dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    if RANK == 0:
        mokd.write(state, f"{cfg.out}/checkpoint.pth")

def train(cfg, net, images, val, state, device):
    """Train to the end, from the checkpoint `state` if there is one -> results of the last epoch. A signal
    ends it after a checkpoint."""
    optimizer = make_optimizer(net, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.finetune and cfg.dtype == "fp16")
    step, results = resume(cfg, net, optimizer, scaler, state) if state else (0, {})
    distributed = net
    if WORLD > 1:
        distributed = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    per_epoch = len(images) // cfg.batch_size
    steps, warmup = cfg.epochs * per_epoch, cfg.warmup_epochs * per_epoch
    unreadable = 0   # images of this epoch, so far
    window, start = [], time.time()   # losses since the last log line, and when they began
    if step < steps:
        mokd.log(cfg, dict(settings=asdict(cfg), step=step, run=cfg.run))
    net.train()
    mokd.catch_signals()
    keys = mokd.batches(len(images), cfg, step)
    for x, y in mokd.make_loader(TrainView(images, cfg), device, cfg.workers, batch_sampler=keys):
        torch.manual_seed(mokd.seed_of(cfg.seed, "dropout", step, RANK))
        factor = mokd.cosine_schedule(step, steps, 1.0, 0.0, warmup)
        skipped = (y == -100).sum()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        losses = train_step(distributed, x, y, cfg, optimizer, scaler, factor)
        window = [*window, losses] if cfg.log_every else []
        epoch = step // per_epoch
        step += 1
        n, number = mokd.after_step(skipped)
        unreadable = n if (step - 1) % per_epoch == 0 else unreadable + n   # of this epoch
        mokd.refuse_unreadable(unreadable, len(images))
        if cfg.log_every and (step % cfg.log_every == 0 or step == steps or number):
            losses = mokd.sum_over_processes(torch.stack(window).mean(0)) / WORLD
            record = {"epoch": epoch, "step": step, "steps": steps, "lr/peak": factor}
            named = zip(net.rates, losses.tolist())
            record["losses"] = {f"{name}, {rate}": loss for (name, rate), loss in named}
            record["images/s"] = speed = cfg.batch_size * len(window) / (time.time() - start)
            record["minutes_left"] = (steps - step) * cfg.batch_size / speed / 60
            mokd.log(cfg, record)
            say(f"epoch {epoch}, step {step}/{steps}, lowest loss {losses.nan_to_num(torch.inf).min():.4f}, "
                f"{record['images/s']:.0f} images/s, {record['minutes_left']:.0f} min left")
            window, start = [], time.time()
        pause = time.time()
        if step % per_epoch == 0:
            results = evaluate(net, val, cfg, device)
            mokd.log(cfg, dict(epoch=epoch, results=results))
            best = [f"{name} {rates[best_of(rates)]['top1']:.2f}" for name, rates in results.items()]
            say(f"best top-1 after epoch {epoch}: {', '.join(best)} %")
        if step % per_epoch == 0 or number:
            save(cfg, net, optimizer, scaler, step, results, images)
        if number:
            stop(f"stopped by {number.name} after step {step}; the same command goes on there", 128 + number)
        start += time.time() - pause   # so images/s are those of training alone
    return results

def run(cfg):
    device = mokd.join_processes(cfg)
    backbones = load_backbones(cfg)
    labeled, val, classes = labeled_data(cfg)
    images = keep_labels(labeled, cfg)
    if cfg.batch_size > len(images):
        stop(f"--batch_size {cfg.batch_size} is more than the {len(images)} labeled images: lower it")
    if cfg.finetune and len(images) == len(labeled):   # A.4 resizes whole images
        cfg.resize = cfg.resize or cfg.image_size
    state = mokd.find_checkpoint(cfg, images)
    os.makedirs(cfg.out, exist_ok=True)
    say(f"{len(images):,} of {len(labeled):,} training images, {len(val):,} to validate, {classes} classes; "
        f"processes: {WORLD}, on {device.type}, {cfg.dtype}")
    net = Classifiers([Classifier(name, b, cfg, classes) for name, b in backbones.items()]).to(device)
    if (cfg.n_last_blocks or cfg.avgpool) and not any(part.n_last_blocks or part.avgpool for part in net):
        stop("--n_last_blocks and --avgpool are for ViTs with a CLS token; here is none")
    net.to(memory_format=torch.channels_last)
    if device.type == "cuda" and WORLD > 1 and cfg.finetune:
        timm.layers.convert_sync_batchnorm(net)
    results = train(cfg, net, images, val, state, device)

    say(f"\n{cfg.data}, {len(images):,} labeled images, {cfg.epochs} epochs, %; * best rate\n"
        f"{'':22}{'lr':>10}{'top-1':>9}{'top-5':>9}")
    for name, rates in results.items():
        for rate, tops in rates.items():
            star = "*" if rate == best_of(rates) else " "
            say(f"{name:22}{rate:>10}{tops['top1']:>9.2f}{star}{tops['top5']:>8.2f}")
    side = cfg.resize or round(cfg.image_size * 256 / 224)
    say(f"\nIn Python, of images whose shorter side is {side}, cropped to {cfg.image_size}, normalized:")
    for part in net:
        layer = part.layers[list(part.rates).index(best_of(results[part.name]))]
        i, b = part.name[0] if cfg.checkpoint else 1, part.backbone
        file, feature = f"{cfg.out}/classifier{i}.pth", part.in_python(f"net{i}")
        use = dict(timm_name=b.timm_name, timm_kwargs=b.timm_kwargs, feature=feature, resize=side,
                   image_size=cfg.image_size, classes=list(getattr(labeled, "classes", ())))
        if RANK == 0:
            mokd.write(dict(model=b.model.state_dict(), classifier=layer.state_dict()) | use, file)
        mokd.say_how_to_load(i, b, file, feature)
        say(f"classifier{i} = torch.nn.Linear({layer.in_features}, {layer.out_features})")
        say(f"classifier{i}.load_state_dict(torch.load({file!r}, weights_only=True)['classifier'])")
        say(f"logits{i} = classifier{i}(feature{i})")
    return results

if __name__ == "__main__":
    mokd.main(parse=parse, run=run)
