"""MOKD: Multi-mode Online Knowledge Distillation for self-supervised visual representation learning
(Song et al., CVPR 2023, arXiv 2304.06461), in one file.

Two different backbones learn together, without labels. Each is taught by its own momentum copy (self-distillation) and
by the other's (cross-distillation), through an MLP-Head on the pooled representation and a T-Head on the local features,
in which one model's pooled feature searches the other's local features.

    python mokd.py --demo                                                    # minutes on two cores, needs no data
    python mokd.py --data /path/to/images --arch1 resnet18 --arch2 vit_tiny  # one process, on whatever device there is
    torchrun --nproc_per_node=8 mokd.py --arch1 resnet50 --arch2 vit_small   # the paper's ImageNet recipe

The order is the paper's: settings (A.1), views (A.1), backbones and heads with the feature search (3.1, 3.3, 3.4, Fig. 3),
losses (3.2, 3.3), schedules and optimizers (A.1), Algorithm 1 (train_step); then k-NN, checkpoints, log and main.
Names are Algorithm 1's: m and t are logits of the MLP-Head and the T-Head, Z is a representation, a trailing _ is the
momentum net. In shapes, B is the images of one process, V = 2 + L the views of an image (2 global, then L local), K the
logits of a head, C a backbone's channels, N its tokens.
"""
import argparse, ast, copy, difflib, functools, hashlib, json, math, os, signal, sys, time   # noqa: E401
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import RandomResizedCrop, functional as TF

class UserError(Exception):
    """Ends the program with one sentence for the user. Exit code 2: the command was wrong; 1: the run failed."""
    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code

# ------------------------------------------------------------------------------------------------------- settings
def flag(default, help, low=0, high=math.inf, group=None, choices=None, may_differ=False, nargs=None):
    """One setting: a number lies between low and high, `group` opens a group of --help, `may_differ` lets a resumed run change it,
    `nargs` "+" takes any count of numbers."""
    default = dict(default_factory=dict) if default == {} else dict(default=default)
    return field(**default, metadata=dict(help=help, low=low, high=high, group=group, choices=choices, may_differ=may_differ, nargs=nargs))

@dataclass
class Config:
    """Every setting, its source in brackets; Config() is the paper's ImageNet recipe. The command line is made of it."""
    arch1: str = flag("resnet50", "backbone 1: a name of the paper's, or any timm model [Tables 1, S1]", group="models")
    arch2: str = flag("vit_small", "backbone 2, perhaps the same [Tables 1, S1]")
    patch_size: int = flag(16, "patch of vit_tiny/small/base, pixels [A.1]", low=1)
    model_kwargs1: dict = flag({}, "arguments of timm.create_model for backbone 1, e.g. channels=16,32,64,128")
    model_kwargs2: dict = flag({}, "the same for backbone 2")
    init1: str = flag("", "start backbone 1 from this file: a model1.pth, or a timm, torchvision or DINO state dict")
    init2: str = flag("", "the same for backbone 2")
    vit_pool: str = flag("mean", "a ViT's pooled feature: its patches' mean [3.2], or CLS [released code]", choices=("mean", "cls"))
    drop_path: float = flag(0.1, "stochastic depth of a student ViT [released code]", high=0.9)

    out_dim: int = flag(65536, "K, logits of every head [A.1]", low=2, group="heads")
    hidden_dim: int = flag(2048, "hidden width of an MLP-Head [A.1]", low=1)
    bottleneck_dim: int = flag(256, "width before an MLP-Head's last layer [A.1]", low=1)
    t_dim: int = flag(384, "width of both T-Heads [3.4]; 0: the ViT's, if one model is a ViT [released code]")
    t_depth: int = flag(3, "blocks of a T-Head [A.1]", low=1)
    t_heads: int = flag(6, "attention heads of a T-Head [3.4]", low=1)
    t_norm: bool = flag(False, "L2-normalize a T-Head's mean token before its last layer; off [released code]")

    recipe: str = flag("paper", "whose defaults", group="losses", choices=("paper", "release"), may_differ=True)
    losses: str = flag("sm,cm,st,ct", "any subset with sm; sm alone is two independent DINO runs [Table 7]")
    lambda1: float = flag(None, "of cm1 and ct1; unset: larger backbone 1, smaller 0.1 [4.5]; CNN 1, ViT 0.1 [released code]")
    lambda2: float = flag(None, "the same of cm2 and ct2")
    search: str = flag("all", "pairs of views that search [Alg. 1]; local [released code]", choices=("all", "global", "local"))
    search_center: bool = flag(True, "center search outputs with the T-Head's center [A.1]; off [released code]")
    student_temp: float = flag(0.1, "tau [A.1]", low=1e-3)
    teacher_temp: float = flag(0.07, "tau' after its rise [A.1]; lower it if entropies in log.jsonl stay near log K", low=1e-3)
    teacher_temp_start: float = flag(0.04, "tau' in the first epoch [A.1]", low=1e-3)
    teacher_temp_epochs: int = flag(30, "epochs in which tau' rises [A.1]")
    teacher_temp_epochs_cnn: int = flag(None, "the same for a CNN's self-distillation; 50 [released code]; unset: as above")
    center_momentum: float = flag(0.9, "momentum of the centers [A.1]", high=1)
    ema: float = flag(0.996, "l, momentum of the momentum nets, 1 at the end [A.1]; lower it for few steps", high=1)

    global_size: int = flag(224, "pixels of the 2 global views [A.1]", low=1, group="views")
    global_scale: tuple = flag((0.25, 1.0), "part of the image that a global view covers [A.1]", low=1e-4, high=1)
    local_size: int = flag(96, "pixels of the local views [A.1]", low=1)
    local_scale: tuple = flag((0.05, 0.25), "part of the image that a local view covers [A.1]", low=1e-4, high=1)
    local_crops: int = flag(8, "L, local views of an image [A.1]; may be 0")
    jitter: tuple = flag((0.4, 0.4, 0.2, 0.1), "brightness, contrast, saturation, hue; with probability 0.8 [A.1]")
    grayscale: float = flag(0.2, "probability of grayscale [released code]; 0 [A.1]", high=1)
    blur: tuple = flag((0.1, 2.0), "sigma of the blur, pixels [A.1]; on 1, 0.1, 0.5 of the views [released code]; 0 0: none")
    solarize: float = flag(0.2, "probability of solarizing global view 1 [released code]; 0 [A.1]", high=1)

    data: str = flag("imagenet", "folder of images, torchvision data set (cifar10, fashion_mnist, ...), or toy", group="data")
    data_root: str = flag("data", "folder to which torchvision data sets are downloaded", may_differ=True)
    workers: int = flag(None, "loaders of each process; unset: its share of the cores, at most 16; 1 without a GPU", may_differ=True)

    epochs: int = flag(100, "epochs [A.1]", low=1, group="optimization")
    batch_size: int = flag(256, "images of a step, over all processes [A.1]", low=1)
    warmup_epochs: int = flag(10, "epochs in which learning rates rise [A.1]")
    cnn_optimizer: str = flag("sgd", "of CNNs: networks with batch norm [A.1]", choices=("sgd", "adamw"))
    vit_optimizer: str = flag("adamw", "of ViTs: networks without [A.1]", choices=("sgd", "adamw"))
    t_optimizer: str = flag("adamw", "of a CNN's T-Head, at vit_lr and vit_wd; sgd [released code]", choices=("sgd", "adamw"))
    cnn_lr: float = flag(0.1, "peak learning rate of CNNs, times batch_size / 256 [A.1]")
    vit_lr: float = flag(3e-4, "the same of ViTs and all T-Heads [A.1]")
    cnn_lr_end: float = flag(1e-6, "last learning rate of CNNs [DINO]; 0.0048 [released code]")
    vit_lr_end: float = flag(1e-6, "the same of ViTs and all T-Heads [DINO]; 1e-5 [released code]")
    cnn_wd: float = flag(1e-4, "weight decay of CNNs, never on biases and 1-D parameters [A.1]")
    vit_wd: float = flag(0.04, "the same of ViTs and all T-Heads [A.1]")
    wd_end: float = flag(None, "vit_wd goes to this by a cosine; 0.4 [released code]; unset: constant [A.1]")
    clip_grad: float = flag(3.0, "norm to which each parameter's gradient is clipped [released code]; 0: no clipping")
    freeze_last_layer: int = flag(1, "epochs in which heads' last layers stand still [released code]; raise it if losses rise")

    out: str = flag("", "folder of checkpoints, weights and log; unset: runs/ARCH1-ARCH2", group="running", may_differ=True)
    seed: int = flag(0, "seed of everything that is drawn")
    dtype: str = flag("auto", "of autocast; auto: bf16, else fp16, on a GPU; else fp32", choices=("auto", "bf16", "fp16", "fp32"))
    compile: bool = flag(False, "torch.compile both models", may_differ=True)
    log_every: int = flag(20, "steps between log lines", low=1, may_differ=True)
    save_every: int = flag(0, "steps between checkpoints; 0: one each epoch", may_differ=True)
    knn_every: int = flag(0, "epochs between k-NN evaluations of the momentum nets; 0: none", may_differ=True)
    knn_k: int = flag(20, "neighbors of that evaluation [A.2]", low=1, may_differ=True)
    demo: bool = flag(False, "train a small pair on toy and compare k-NN accuracy before and after", may_differ=True)
    preview: str = flag("", "write the views of a few images to this .png file and exit", may_differ=True)
    benchmark: int = flag(0, "time this many steps, say where the time goes, and exit", may_differ=True)

RECIPES = {"paper": {}, "release": dict(
    vit_pool="cls", t_dim=0, search="local", search_center=False, teacher_temp_epochs_cnn=50, t_optimizer="sgd",
    cnn_lr_end=0.0048, vit_lr_end=1e-5, wd_end=0.4)}

DEMO = dict(
    data="toy", arch1="resnet18", arch2="vit_tiny",
    model_kwargs2=dict(img_size=24, patch_size=4, embed_dim=64, depth=3, num_heads=2),
    model_kwargs1=dict(layers=(1, 1, 1, 1), channels=(16, 32, 48, 64), stem_type="deep", stem_width=8, output_stride=8),
    out_dim=256, hidden_dim=256, bottleneck_dim=32, t_dim=48, t_depth=1, t_heads=3, t_norm=True, drop_path=0.0, global_size=24,
    global_scale=(0.5, 1.0), local_size=12, local_scale=(0.3, 0.8), local_crops=2, jitter=(0.4, 0.4, 0.4, 0.2), blur=(0.0, 0.0),
    solarize=0.0, epochs=14, warmup_epochs=1, batch_size=64, cnn_optimizer="adamw", cnn_lr=0.01, vit_lr=0.01, ema=0.99,
    center_momentum=0.5, teacher_temp=0.015, teacher_temp_start=0.015, freeze_last_layer=0, out="runs/demo")

def key_value(text):
    """'channels=16,32' -> ('channels', (16, 32)). A value that is no Python literal stays a string."""
    if not text.partition("=")[2]:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form key=value")
    try:
        return text.partition("=")[0], ast.literal_eval(text.partition("=")[2])
    except (ValueError, SyntaxError):
        return tuple(text.split("=", 1))

def read_flags(config, argv, program, about):
    """The command line of a dataclass of flags -> dict of the settings that it gives. Exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog=program, usage=f"python {program} [--FLAG VALUE ...]", description=about, allow_abbrev=False,
        epilog="[...] is a setting's source: section or table of the paper, or code.", argument_default=argparse.SUPPRESS)
    for f in fields(config):
        default, choices = f.default, f.metadata["choices"]
        options = dict(type=f.type, choices=choices, metavar=None if choices else "X")
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        if f.type is bool:
            options, default = dict(choices=("on", "off"), nargs="?", const="on"), "on" if default else "off"
        if f.type is dict:
            options, default = dict(type=key_value, nargs="+", metavar="KEY=VALUE"), None
        if f.type is tuple:
            kind, nargs = type(default[0]) if default else float, f.metadata["nargs"] or len(default)
            options, default = dict(type=kind, nargs=nargs, metavar="X"), " ".join(map(str, default))
        help = f.metadata["help"] + ("" if default in (None, "") else f" (default: {default})")
        group.add_argument(f"--{f.name}", help=help.replace("%", "%%"), **options)
    return {name: dict(value) if name.startswith("model_kwargs") else tuple(value) if isinstance(value, list) else
            {"on": True, "off": False}.get(value, value) for name, value in vars(parser.parse_args(argv)).items()}

def check_ranges(cfg):
    """Refuse numbers out of their range. Raises UserError."""
    for f in (f for f in fields(cfg) if f.type in (int, float, tuple)):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        for v in value if f.type is tuple else [value]:
            if v is not None and not low <= v <= high:
                raise UserError(f"--{f.name} {v}: must be " + (f"at most {high}" if v > high else f"at least {low}"))

def parse_args(argv=None):
    """Command line -> Config. What is given wins over --demo, that over --recipe, that over the defaults."""
    given = read_flags(Config, argv, "mokd.py", __doc__.split("\n\n")[0])
    demo = DEMO if given.get("demo") else {}   # whose arguments of a backbone are for the demo's backbone alone
    demo = {name: value for name, value in demo.items() if name.replace("model_kwargs", "arch") not in given}
    return check(Config(**RECIPES[given.get("recipe", "paper")] | demo | given))

def check(cfg):
    """Refuse settings that cannot work, before anything is built -> cfg. Raises UserError."""
    check_ranges(cfg)
    for name in ("global_scale", "local_scale", "blur"):
        if getattr(cfg, name)[0] > getattr(cfg, name)[1]:
            raise UserError(f"--{name}: give the smaller number first")
    losses = cfg.losses.split(",")
    for wrong, sentence in (
            ("sm" not in losses or {*losses} - {"sm", "cm", "st", "ct"}, f"--losses {cfg.losses}: give sm and any of cm,st,ct"),
            (cfg.t_dim % cfg.t_heads, f"--t_dim {cfg.t_dim} does not divide by --t_heads {cfg.t_heads}: change either"),
            (cfg.warmup_epochs > cfg.epochs, f"--warmup_epochs {cfg.warmup_epochs} is more than --epochs {cfg.epochs}: lower it"),
            (cfg.search == "local" and not cfg.local_crops, "--search local needs --local_crops of at least 1"),
            (cfg.jitter[3] > 0.5, f"--jitter: its last number, for the hue, is {cfg.jitter[3]} and must be at most 0.5"),
            (cfg.preview and not cfg.preview.endswith(".png"), f"--preview {cfg.preview}: give a name that ends in .png")):
        if wrong:
            raise UserError(sentence)
    cfg.out = cfg.out or f"runs/{cfg.arch1}-{cfg.arch2}"
    return cfg

# --------------------------------------------------------------------------------------------- processes and seeds
MAIN = int(os.environ.get("RANK", 0)) == 0   # the process that prints and writes

def join_processes():
    """-> (device, rank, world). Under torchrun joins the process group: NCCL for GPUs, gloo for the CPU. Raises UserError."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} finds no GPU of its own: --nproc_per_node at most {torch.cuda.device_count()}")
        torch.cuda.set_device(device := torch.device("cuda", local))
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device, rank, world

def fill_in_machine(cfg, device, world):
    """Fill in --dtype and --workers where they are left to the machine. Raises UserError."""
    if cfg.batch_size % world:
        raise UserError(f"--batch_size {cfg.batch_size} does not divide by {world} processes: choose a multiple")
    if cfg.dtype == "auto":
        cfg.dtype = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if cfg.workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cuda" else 1
        cfg.workers = min(16, max(1, cores))
    torch.backends.cudnn.benchmark = True

def autocast(device, dtype):
    types = dict(bf16=torch.bfloat16, fp16=torch.float16)   # fp32 needs none
    return torch.autocast(device.type, types.get(dtype), enabled=dtype in types)

def memory_format(device):   # of images and weights in memory, which GPUs convolve faster with channels last
    return torch.channels_last if device.type == "cuda" else torch.preserve_format

def say(text):
    if MAIN:
        print(text, flush=True)

def warn(text):
    print(text, file=sys.stderr, flush=True)

def sum_over_processes(x):
    if dist.is_initialized():
        dist.all_reduce(x := x.clone())
    return x

def mean_over_processes(x):
    return sum_over_processes(x) / (dist.get_world_size() if dist.is_initialized() else 1)

class Watch:
    """What may end a training loop between two steps: SIGTERM, SIGINT, too many unreadable images. All processes agree on it."""
    def __init__(self, images, data):
        self.images, self.data, self.unreadable, self.caught = images, data, set(), set()
        self.parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.caught.add(number)

    def after_step(self, indices=(), reasons=()):
        """Images that this process could not read in a step (-1: none), and why -> the signal that has come to any process, or
        None. An image counts once, whoever met it. Raises UserError where more than 1 % cannot be read."""
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:   # torchrun was killed
            self.caught.add(signal.SIGTERM)
        new = {index: reason for index, reason in zip(indices, reasons) if index >= 0 and index not in self.unreadable}
        for index, reason in new.items():
            warn(f"skipped {name_of(self.images, index)}: {reason}")
        counts = torch.tensor([len(new), signal.SIGTERM in self.caught, signal.SIGINT in self.caught])
        counts = sum_over_processes(counts)   # on the CPU: no GPU is waited for
        if counts[0]:
            mask = torch.zeros(len(self.images), dtype=torch.int32)
            mask[[*new]] = 1
            self.unreadable |= {*sum_over_processes(mask).nonzero().flatten().tolist()}
            if len(self.unreadable) > 0.01 * len(self.images):
                raise UserError(f"--data {self.data}: {len(self.unreadable)} of {len(self.images)} images cannot be read, more than "
                                f"1 %: mend or remove those named above", code=1)
        return signal.SIGTERM if counts[1] else signal.SIGINT if counts[2] else None

def open_out(cfg):
    """Make the folder --out and see that log.jsonl can be written there. Raises UserError."""
    try:
        os.makedirs(cfg.out, exist_ok=True)
        open(f"{cfg.out}/log.jsonl", "a").close()
    except OSError as error:
        raise UserError(f"--out {cfg.out}: cannot be written to ({error.strerror}); give another folder") from error

def seed_of(*key):
    """A 63-bit seed from numbers and words. All that is drawn is a function of (seed, epoch, index) or (seed, step), so a
    resumed run repeats the uninterrupted one, with any number of workers."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1

def generator(*key):
    return torch.Generator().manual_seed(seed_of(*key))

# ----------------------------------------------------------------------------------------------------- data: images
TRAIN, SPLIT = (dict(train=True), dict(train=False)), (dict(split="train"), dict(split="test"))
TORCHVISION = {   # --data -> class of torchvision.datasets, its arguments for training and for validation
    "mnist": ("MNIST", TRAIN), "fashion_mnist": ("FashionMNIST", TRAIN), "cifar10": ("CIFAR10", TRAIN),
    "cifar100": ("CIFAR100", TRAIN), "svhn": ("SVHN", SPLIT), "dtd": ("DTD", SPLIT), "food101": ("Food101", SPLIT),
    "flowers102": ("Flowers102", SPLIT), "stl10": ("STL10", (dict(split="train+unlabeled"), dict(split="test"))),
    "imagenette": ("Imagenette", (dict(split="train"), dict(split="val")))}

def to_rgb(image):
    """PIL image of any mode, or a uint8 tensor -> (3, H, W) uint8."""
    if isinstance(image, torch.Tensor):
        return image.expand(3, -1, -1)
    if image.mode.startswith("I"):   # 16-bit gray, which PIL's convert would clip at 255
        return (TF.pil_to_tensor(image).int() // 257).clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    return TF.pil_to_tensor(image.convert("RGB"))

def read_image(path):
    """Image file -> (3, H, W) uint8. torchvision decodes; what it cannot, PIL does, or raises."""
    try:
        from torchvision.io import ImageReadMode, decode_image, read_file   # which newer ones announce to leave out
        image = decode_image(read_file(path), ImageReadMode.RGB)
        if image.dtype == torch.uint8 and image.dim() == 3:   # not 16 bits, not an animation
            return image
    except (ImportError, RuntimeError):
        pass
    with Image.open(path) as image:
        return to_rgb(image)

def draw_toy(n, seed, size=48, cells=16):
    """The built-in data set: images (n, 3, size, size) uint8 and labels (n,).

    The class is a shape; all cover the same area. An image is a grid of it, at an angle, a period and an offset of its own, each
    copy in a color, on a ground, of a size and turned by an angle of its own: pixels and colors are a poor guide to the shape.
    """
    g, grid, labels = generator("toy", seed), torch.arange(size) - size / 2, torch.arange(n) % 8
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    shapes = (lambda u, v, r: r - 0.7,                                             # disk; each is below 0 inside the shape
              lambda u, v, r: (r - 0.75).abs() - 0.15,                             # ring
              lambda u, v, r: torch.maximum(u.abs() - 0.4, v.abs() - 1),           # bar
              lambda u, v, r: torch.minimum(u.abs(), v.abs()) - 0.19,              # cross
              lambda u, v, r: (u.abs() - 0.6).abs() - 0.17,                        # two bars
              lambda u, v, r: torch.maximum(v, 0.87 * u.abs() - 0.5 * v) - 0.54,   # triangle
              lambda u, v, r: torch.maximum(r - 1.02, u),                          # half disk
              lambda u, v, r: torch.maximum(r - 1.05, 3 * u * v))                  # bow tie
    for c, shape in enumerate(shapes):
        rows = (labels == c).nonzero().flatten()
        rand = lambda *dims: torch.rand(len(rows), *dims, generator=g)
        turn = lambda u, v, angle: (angle.cos() * u + angle.sin() * v, angle.cos() * v - angle.sin() * u)
        angle, period = 2 * math.pi * rand(1, 1), 8 + 3 * rand(1, 1)
        u, v = (t / period + rand(1, 1) + cells / 2 for t in turn(grid, grid[:, None], angle))
        cell = (u.floor() * cells + v.floor()).long().view(len(rows), 1, -1)
        own = lambda k: rand(k, cells ** 2).gather(2, cell.expand(-1, k, -1)).unflatten(2, (size, size))   # one draw a copy
        (angle, radius), color, ground = own(2).unbind(1), 0.6 + 0.4 * own(3), 0.3 * own(3)
        u, v = turn(*((t % 1 - 0.5) / (0.38 + 0.12 * radius) for t in (u, v)), 2 * math.pi * angle)
        outside = torch.maximum(shape(u, v, torch.hypot(u, v)), torch.maximum(u.abs(), v.abs()) - 1.1)
        images[rows] = (255 * torch.lerp(ground, color, torch.sigmoid(-6 * outside)[:, None])).to(torch.uint8)
    return images, labels

def get_data(cfg):
    """-> (train, val), data sets of (image, label); val is None where there is none. Raises UserError."""
    if cfg.data == "toy":
        return tuple(torch.utils.data.TensorDataset(*draw_toy(n, part)) for n, part in ((4096, "train"), (1024, "val")))
    if os.path.isdir(cfg.data):
        train = os.path.join(cfg.data, "train")
        parts = [train, os.path.join(cfg.data, "val")] if os.path.isdir(train) else [cfg.data, ""]
        try:
            return [torchvision.datasets.ImageFolder(p, loader=read_image) if os.path.isdir(p) else None for p in parts]
        except FileNotFoundError as error:
            raise UserError(f"--data {cfg.data}: {error} Each class is a folder with images in it; images without classes go "
                       f"into one folder, {parts[0]}/all") from error
    if cfg.data not in TORCHVISION:
        raise UserError(f"--data {cfg.data}: no such folder. Give a folder with train/ and val/ or with class folders, or one of toy, "
                   f"{', '.join(TORCHVISION)}")
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0   # one process of a machine downloads, the others wait
    if dist.is_initialized() and not first:
        dist.barrier()
    name, parts = TORCHVISION[cfg.data]
    try:
        return tuple(getattr(torchvision.datasets, name)(cfg.data_root, download=first, **part) for part in parts)
    except Exception as error:   # a download or an archive fails in many ways
        raise UserError(f"--data {cfg.data}: not in --data_root {cfg.data_root}, and it could not be downloaded "
                   f"({type(error).__name__}: {error})") from error
    finally:
        if dist.is_initialized() and first:
            dist.barrier()

def name_of(images, index):
    if isinstance(images, Subset):
        return name_of(images.dataset, images.indices[index])
    return images.samples[index][0] if hasattr(images, "samples") else f"image {index}"

# ------------------------------------------------------------------------------------------------ data: views (A.1)
class MultiCrop(torch.utils.data.Dataset):
    """(epoch, index) -> uint8 crops (2, S, S, 3), (L, s, s, 3) of an image, channels last as torch's resize leaves them; its index
    if unreadable (the next is taken), or -1."""
    def __init__(self, images, cfg):
        self.images, self.cfg = images, cfg

    def __getitem__(self, key):
        (epoch, index), bad, image, cfg = key, -1, torch.zeros(3, 8, 8, dtype=torch.uint8), self.cfg
        for i in range(index, index + 100):
            try:
                image = to_rgb(self.images[i % len(self.images)][0])
                break
            except Exception:   # decoders raise many things; the training loop names and counts the image
                bad = index
        with torch.random.fork_rng(devices=[]):   # torchvision draws crops from the global generator
            torch.default_generator.manual_seed(seed_of(cfg.seed, epoch, index))
            views = [[self.crop(image, size, scale) for _ in range(n)] for n, size, scale in
                     ((2, cfg.global_size, cfg.global_scale), (cfg.local_crops, cfg.local_size, cfg.local_scale))]
        return *(torch.stack([x.permute(1, 2, 0) for x in v]) if v else torch.empty(0) for v in views), bad

    @staticmethod
    def crop(image, size, scale):
        top, left, height, width = RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        part = image[None, :, top:top + height, left:left + width].contiguous(memory_format=torch.channels_last)   # faster so
        return F.interpolate(part, [size, size], mode="bicubic", antialias=True)[0]

def batches(n, cfg, start=0, rank=0, world=1):
    """Yields this process's keys (epoch, index) of each global batch, from step `start` to the end of training. An epoch has
    its own order, the processes' shares do not overlap, an incomplete last batch is left out."""
    per_epoch, share = n // cfg.batch_size, cfg.batch_size // world
    for step in range(start, cfg.epochs * per_epoch):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == start:
            order = torch.randperm(n, generator=generator(cfg.seed, "order", epoch)).tolist()
        first = i * cfg.batch_size + rank * share
        yield [(epoch, index) for index in order[first:first + share]]

def quiet_worker(_):
    """Signals are for the training process, which writes a checkpoint and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def make_loader(dataset, device, workers, **options):
    return torch.utils.data.DataLoader(dataset, num_workers=workers, pin_memory=device.type == "cuda",
                                       worker_init_fn=quiet_worker, **options)

# Photometric operations on a batch x (n, 3, H, W) in [0, 1] with a factor f (n, 1, 1, 1) for each image: what
# torchvision's adjust_brightness, ..., gaussian_blur and solarize do to one image.

def luma(x):
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]

def adjust_hue(x, f):
    """Turn the hue by f of a full circle. Of value v, chroma c and hue h, in sixths of the circle, a color's channels are
    v - c clamp(min(k, 4 - k), 0, 1) with k = (h + 5, h + 3, h + 1) mod 6."""
    (r, g, b), v = x.split(1, 1), x.amax(1, keepdim=True)
    c = v - x.amin(1, keepdim=True)
    d = c.clamp_min(1e-8)
    h = torch.where(v == r, (g - b) / d, torch.where(v == g, (b - r) / d + 2, (r - g) / d + 4))
    k = (h + 6 * f + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6
    return v - c * torch.minimum(k, 4 - k).clamp(0, 1)

def gaussian_blur(x, sigma, radius=6):
    """Blur by sigma pixels (n, 1, 1, 1), mirrored at the edges, as two matrix products: row i of an image's matrix G holds
    the weights of the 2 * radius + 1 pixels around pixel i."""
    size = x.shape[-1]
    offset = torch.arange(-min(radius, size - 1), min(radius, size - 1) + 1, device=x.device)
    weight = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-3)) ** 2)
    pixel = (torch.arange(size, device=x.device)[:, None] + offset).abs()
    pixel = torch.where(pixel < size, pixel, 2 * (size - 1) - pixel)
    G = x.new_zeros(len(x), 1, size, size).scatter_add_(3, pixel.expand(len(x), 1, -1, -1), (
        weight / weight.sum(-1, keepdim=True)).expand(-1, 1, size, -1))
    return G @ x @ G.mT

JITTER = (lambda x, f: (f * x).clamp(0, 1),                                                     # brightness
          lambda x, f: torch.lerp(luma(x).mean((1, 2, 3), keepdim=True), x, f).clamp(0, 1),     # contrast
          lambda x, f: torch.lerp(luma(x), x, f).clamp(0, 1),                                   # saturation
          adjust_hue)

def draw_photometric(cfg, step, rank=0, world=1):
    """What happens to each view in a step: a dict of CPU tensors (VB, ...), view by view. Drawn from (seed, step) for the
    batch of all processes, of which each takes its rows: so two processes see what one would."""
    V, B = 2 + cfg.local_crops, cfg.batch_size
    u = torch.rand(14, V, B, generator=generator(cfg.seed, "photometric", step))
    view = torch.arange(V)[:, None].clamp_max(2)
    jitter = torch.tensor(cfg.jitter)
    factor = (2 * u[6:10].movedim(0, -1) - 1) * jitter
    factor[..., :3] = (1 + factor[..., :3]).clamp_min(0)
    p = dict(flip=u[0] < 0.5, jitter=u[1] < 0.8, order=u[2:6].argsort(0).movedim(0, -1), factor=factor,
             grayscale=u[10] < cfg.grayscale, blur=(u[11] < torch.tensor([1.0, 0.1, 0.5])[view]) & (cfg.blur[1] > 0),
             sigma=cfg.blur[0] + (cfg.blur[1] - cfg.blur[0]) * u[12], solarize=(u[13] < cfg.solarize) & (view == 1))
    return {name: value[:, rank * B // world:(rank + 1) * B // world].flatten(0, 1) for name, value in p.items()}

def photometric(x, p):
    """uint8 crops (n, 3, S, S) on the device -> [0, 1], each flipped, jittered, grayed, blurred and solarized as its row of
    p says. Which rows an operation is for is known on the CPU, so nobody waits for the device."""
    x = x.float() / 255
    def apply(operation, mask, *factors):
        if mask.any():
            rows, *factors = (t.to(x.device, non_blocking=True) for t in (mask.nonzero().flatten(), *(f[mask] for f in factors)))
            x[rows] = operation(x[rows], *(f.view(-1, 1, 1, 1) for f in factors))
    apply(lambda y: y.flip(-1), p["flip"])
    for place in range(4):
        for i, operation in enumerate(JITTER):
            apply(operation, p["jitter"] & (p["order"][:, place] == i), p["factor"][:, i])
    apply(lambda y: luma(y).expand(-1, 3, -1, -1), p["grayscale"])
    apply(gaussian_blur, p["blur"], p["sigma"])
    apply(lambda y: torch.where(y < 128 / 255, y, 1 - y), p["solarize"])
    return x

@functools.cache
def mean_and_std(device):   # of ImageNet's channels
    return torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device).view(2, 3, 1, 1)

def normalize(x):
    return (x - mean_and_std(x.device)[0]) / mean_and_std(x.device)[1]

def make_views(crops, cfg, device, step, rank=0, world=1):
    """A batch of the loader -> views as the networks get them, by resolution: [(2B, 3, S, S), (LB, 3, s, s)], view by view
    (the first B rows are global view 0)."""
    p, views, done = draw_photometric(cfg, step, rank, world), [], 0
    for x in crops[:2]:
        if x.shape[1]:   # (B, 2 or L, S, S, 3); L may be 0
            x = x.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1).movedim(-1, 1)
            x = normalize(photometric(x, {name: value[done:done + len(x)] for name, value in p.items()}))
            views.append(x.contiguous(memory_format=torch.channels_last))
            done += len(x)
    return views

# ----------------------------------------------------------------------------------------------- backbones (3.1)
TIMM_NAMES = {"vit_tiny": "vit_tiny_patch16_224", "vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224",
              "mobilenetv3_large": "mobilenetv3_large_100"}

class Backbone(nn.Module):
    """Images (B, 3, S, S) -> pooled (B, C), tokens (B, N, C): a CNN's map or a ViT's patches, and their mean or the CLS token."""
    def __init__(self, model, pool):
        super().__init__()
        self.model, self.prefix = model, getattr(model, "num_prefix_tokens", 0)
        self.cls = pool == "cls" and self.prefix > 0

    def forward(self, x):
        y = self.model.forward_features(x)
        if y.dim() == 4:
            y = y.flatten(1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else y.flatten(2).mT
            return y.mean(1), y
        tokens = y[:, self.prefix:]
        return y[:, 0] if self.cls else tokens.mean(1), tokens

def no_drop_path(net):
    for m in net.modules():
        if isinstance(m, timm.layers.DropPath):
            m.drop_prob = 0.0

def build_backbone(name, model_kwargs=None, patch_size=16, pool="mean", sizes=(224, 96), drop_path=0.0, flag="--arch"):
    """A timm model, by the paper's short name or its own, that is shown to take every view size -> Backbone with timm_name,
    timm_kwargs, family ("cnn" with batch norm, else "vit"), dim (C), num_tokens (N of a global view). Raises UserError."""
    timm_name, kwargs = TIMM_NAMES.get(name, name), dict(model_kwargs or {})
    if not timm.is_model(timm_name):
        close = difflib.get_close_matches(name.lower().replace("-", "_"), [*TIMM_NAMES, *timm.list_models()], n=5)
        raise UserError(f"{flag} {name}: timm {timm.__version__} has no such model; " + (
            f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists those it has"))
    if name.startswith("vit_") and name in TIMM_NAMES and patch_size != 16:
        kwargs.setdefault("patch_size", patch_size)
    torchvisions = dict(zero_init_last=False) if name in ("resnet18", "resnet34", "resnet50", "resnet101") else {}   # first weights

    sizes_vary = dict(dynamic_img_size=True, strict_img_size=False), dict(dynamic_img_size=True), {}   # what a model knows of these
    for options in (*(v | dict(drop_path_rate=drop_path) for v in sizes_vary), *sizes_vary):
        try:
            model = timm.create_model(timm_name, num_classes=0, **options | torchvisions | kwargs)
            break
        except Exception as e:
            error = e
    else:
        raise UserError(f"{flag} {name}: timm cannot build it with {kwargs}: {error}")
    family = "cnn" if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) else "vit"
    if family == "cnn":
        no_drop_path(model)
    backbone = Backbone(model, pool).eval()
    for size in sizes[::-1]:
        try:
            pooled, tokens = backbone(torch.rand(2, 3, size, size))
        except Exception as error:
            raise UserError(f"{flag} {name}: cannot take views of {size} pixels ({error}); choose other --global_size and "
                       f"--local_size, or another model") from error
        if tokens.dim() != 3 or math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1]:
            raise UserError(f"{flag} {name}: its features {tuple(tokens.shape)} are no square map: MOKD cannot search them")
    parameters = list(model.parameters())   # those that only a classifier would use get no gradient; DDP must know
    grads = torch.autograd.grad(pooled.sum() + tokens.sum(), parameters, allow_unused=True)
    for p, grad in zip(parameters, grads):
        p.requires_grad_(grad is not None)
    backbone.timm_name, backbone.timm_kwargs, backbone.family = timm_name, kwargs, family
    backbone.num_tokens, backbone.dim = tokens.shape[1:]
    return backbone.train()

def load_backbone(backbone, file, flag):
    """Fill a backbone from a state dict: model1.pth, timm's or DINO's (names agree), torchvision's (order agrees)."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{flag} {file}: no readable state dict ({type(error).__name__})") from error
    for key in ("teacher", "state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    state = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in (state.items() if isinstance(state, dict) else ())
             if isinstance(v, torch.Tensor)}
    own, used = backbone.model.state_dict(), {k for k, p in backbone.model.named_parameters() if p.requires_grad}
    if not used <= state.keys():   # other names: the k-th tensor of a shape there is the k-th of that shape here
        theirs, ours = ({s: [k for k, v in d.items() if v.shape == s] for s in {v.shape for v in d.values()}} for d in (state, own))
        state = {k: state[t] for s in ours if len(theirs.get(s, ())) == len(ours[s]) for k, t in zip(ours[s], theirs[s])}
    wrong = [k for k in own if (k in used and k not in state) or (k in state and state[k].shape != own[k].shape)]
    if wrong:
        there = tuple(state[wrong[0]].shape) if wrong[0] in state else "missing"
        raise UserError(f"{flag} {file}: does not fit {backbone.timm_name}: {len(wrong)} of its tensors, first {wrong[0]}, which "
                   f"is {there} there and {tuple(own[wrong[0]].shape)} here. Is it of another architecture, or of other --model_kwargs?")
    backbone.model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)

# ---------------------------------------------------------------------------------- heads (3.1, 3.4) and search (3.3)
def last_layer(in_dim, out_dim, learn_gain=True):
    """Weight-normalized linear layer: gain * direction / |direction| for each logit, no bias, gain 1 at the start."""
    layer = weight_norm(nn.Linear(in_dim, out_dim, bias=False))
    gain = layer.parametrizations.weight.original0
    nn.init.ones_(gain).requires_grad_(learn_gain)
    return layer

def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)

class MLPHead(nn.Module):
    """Pooled representation (B, C) -> logits (B, K): C -> 2048 -> 2048 -> 256, L2 normalization, last layer (A.1)."""
    def __init__(self, in_dim, out_dim, hidden_dim=2048, bottleneck_dim=256, learn_gain=True):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
                                 nn.Linear(hidden_dim, bottleneck_dim)).apply(init_linear)
        self.last = last_layer(bottleneck_dim, out_dim, learn_gain)

    def forward(self, x):
        return self.last(F.normalize(self.mlp(x), dim=-1))

class THead(nn.Module):
    """Local features -> logits, by ViT blocks (3.4). With a query it is the feature search of Fig. 3: the query stands among
    the tokens, attention lets it draw out those that resemble it, and it leaves before the tokens' mean is taken.

    embed is the 1x1 convolution from a backbone's C channels to dim; there is none where C = dim. num_tokens: N of a global
    view. norm: L2-normalize before the last layer.
    """
    def __init__(self, in_dim, out_dim, dim=384, depth=3, num_heads=6, num_tokens=49, norm=False):
        super().__init__()
        layer_norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(in_dim, dim) if in_dim != dim else nn.Identity()
        self.pos = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_tokens, dim), std=0.02))
        self.blocks = nn.Sequential(*(Block(dim, num_heads, qkv_bias=True, norm_layer=layer_norm) for _ in range(depth)))
        self.blocks.apply(init_linear)
        self.norm, self.l2 = layer_norm(dim), norm
        self.last = last_layer(dim, out_dim)

    def query_of(self, Z):
        """Tokens (B, N, C), or what is pooled of them (B, C) -> query (B, dim): their mean, embedded."""
        return self.embed(Z.mean(1) if Z.dim() == 3 else Z)

    def pool(self, Z, query=None):
        """Tokens (B, N, C) -> (B, dim); with n queries an image (nB, dim), query by query -> (nB, dim)."""
        x, side = self.embed(Z), math.isqrt(Z.shape[1])
        x = x + resample_abs_pos_embed(self.pos, [side, side], num_prefix_tokens=0, antialias=False)   # for the view's own grid
        if query is not None:   # which has no position
            x = torch.cat([query[:, None], x.repeat(len(query) // len(x), 1, 1)], 1)
        x = self.norm(self.blocks(x))
        x = (x if query is None else x[:, 1:]).mean(1)
        return F.normalize(x, dim=-1) if self.l2 else x

    def forward(self, Z, query=None):
        """The same -> logits (B, K) or (nB, K)."""
        return self.last(self.pool(Z, query))

# Z of Algorithm 1, without gradient: pooled (VB, C), of which queries are made; tokens [(2B, N, C), (LB, n, C)]
Representation = namedtuple("Representation", "pooled tokens")

class Net(nn.Module):
    """[m, t, Z] = n(x) of Algorithm 1: a backbone and its two heads. Without st and ct there is no T-Head, and t is None."""
    def __init__(self, backbone, cfg):
        super().__init__()
        self.backbone = backbone
        self.mlp_head = MLPHead(backbone.dim, cfg.out_dim, cfg.hidden_dim, cfg.bottleneck_dim, backbone.family == "vit")
        self.t_head = THead(backbone.dim, cfg.out_dim, cfg.t_dim, cfg.t_depth, cfg.t_heads, backbone.num_tokens,
                            cfg.t_norm) if "t" in cfg.losses else None

    def forward(self, x):
        """Views by resolution -> m (V, B, K), t (V, B, K), Representation. One pass per resolution."""
        pooled, tokens = zip(*map(self.backbone, x))
        pooled, views = torch.cat(pooled), (-1, len(x[0]) // 2)
        m = self.mlp_head(pooled).unflatten(0, views)
        t = self.t_head and self.t_head.last(torch.cat([self.t_head.pool(Z) for Z in tokens])).unflatten(0, views)
        return m, t, Representation(pooled.detach(), [Z.detach() for Z in tokens])

def search_pairs(V, which):
    """Which views search: (g, v) is student view v searching global view g of the other momentum net."""
    return {"all": [(g, v) for g in range(2) for v in range(V) if v != g],   # Algorithm 1's rule on multi-crop views
            "global": [(0, 1), (1, 0)],                                      # Algorithm 1's own pairs
            "local": [(0, v) for v in range(2, V)]}[which]                   # the released code's

def search(t_, query, Z_, pairs):
    """t_s = t_(Z, Z_) of Algorithm 1, the cross-attention feature search (3.3, Fig. 3): the T-Head t_ of a momentum net on its
    tokens Z_ (2B, N, C) of the global views with the other student's queries (VB, dim) -> logits (pairs, B, K)."""
    B = len(Z_) // 2
    query = query.split(B)
    pooled = [t_.pool(Z_[g * B:(g + 1) * B], torch.cat([query[v] for h, v in pairs if h == g])) for g in range(2)
              if any(h == g for h, _ in pairs)]
    return t_.last(torch.cat(pooled)).unflatten(0, (-1, B))

# --------------------------------------------------------------------------------------------------- losses (3.2, 3.3)
def target(t, center=0.0, teacher_temp=0.07):
    """Momentum logits -> the distribution that a student learns, softmax((t - c) / tau'), without gradient (A.1)."""
    return ((t.detach().float() - center) / teacher_temp).softmax(-1)

def cross_entropy(p, s, student_temp=0.1):
    """-sum p log softmax(s / tau), mean over the batch; p, s (B, K). As -p . log softmax(x) = |p| logsumexp(x) - p . x, no
    log-softmax is stored. Linear in p, so p may be a sum of targets."""
    x = s.float() / student_temp
    return (p.sum(-1) * x.logsumexp(-1) - (p * x).sum(-1)).mean()

def H(t, s, center=0.0, teacher_temp=0.07, student_temp=0.1):
    """H(t, s) of Algorithm 1 for one pair of views: momentum logits t (B, K), student logits s (B, K)."""
    return cross_entropy(target(t, center, teacher_temp), s, student_temp)

def multi_crop_H(t, s, center=0.0, teacher_temp=0.07, student_temp=0.1, pairs=None):
    """H averaged over pairs of a row of t (G, B, K) and a view of s (V, B, K): those given, or all of different views."""
    pairs = pairs or [(g, v) for g in range(len(t)) for v in range(len(s)) if v != g]
    return MultiCropH.apply(s, t, center, teacher_temp, student_temp, pairs)

class MultiCropH(torch.autograd.Function):
    """multi_crop_H in little memory: autograd would keep targets and logits in float for every view, here backward computes them
    again, one view at a time. The targets of a view are added up first, which saves passes over its logits."""
    @staticmethod
    def views(t, s, center, teacher_temp, pairs):
        """Yields a view of s and the sum of its targets (B, K); views with the same targets share them."""
        rows = {v: tuple(g for g, w in pairs if w == v) for v in range(len(s))}
        for same in sorted({*rows.values()} - {()}):
            p = sum(target(t[g], center, teacher_temp) for g in same)
            yield from ((v, p) for v in rows if rows[v] == same)

    @staticmethod
    def forward(ctx, s, t, center, teacher_temp, student_temp, pairs):
        ctx.save_for_backward(s, t)
        ctx.others = center, teacher_temp, student_temp, pairs
        views = MultiCropH.views(t, s, center, teacher_temp, pairs)
        return sum(cross_entropy(p, s[v], student_temp) for v, p in views) / len(pairs)

    @staticmethod
    def backward(ctx, grad_loss):
        (s, t), (center, teacher_temp, student_temp, pairs) = ctx.saved_tensors, ctx.others
        grad = torch.zeros_like(s)
        for v, p in MultiCropH.views(t, s, center, teacher_temp, pairs):
            q = (s[v].float() / student_temp).softmax(-1)
            grad[v] = (q * p.sum(-1, keepdim=True) - p) * (grad_loss / (len(pairs) * s.shape[1] * student_temp))
        return grad, None, None, None, None, None

# ------------------------------------------------------------------------------------------------- schedules (A.1)
def cosine_schedule(step, steps, start, end, warmup=0):
    """From 0 to start in a straight line over `warmup` steps, then by half a cosine to end at `steps`."""
    if step < warmup:
        return start * step / warmup
    return end + (start - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

def teacher_temperature(epoch, start, end, epochs):
    """tau': start in the first epoch, end in the last of `epochs` and after, in equal steps between."""
    return end if epoch >= epochs - 1 else start + (end - start) * epoch / (epochs - 1)

# A step and what the schedules say at it: l is the momentum of the momentum nets, temp is tau', temp_cnn that of a CNN's
# self-distillation.
Now = namedtuple("Now", "step steps warmup epoch l temp temp_cnn")

def schedule(cfg, step, per_epoch):
    epoch, steps, rise, rise_cnn = step // per_epoch, cfg.epochs * per_epoch, cfg.teacher_temp_epochs, cfg.teacher_temp_epochs_cnn
    temps = (teacher_temperature(epoch, cfg.teacher_temp_start, cfg.teacher_temp, n)
             for n in (rise, rise if rise_cnn is None else rise_cnn))
    return Now(step, steps, cfg.warmup_epochs * per_epoch, epoch, cosine_schedule(step, steps, cfg.ema, 1.0), *temps)

# ---------------------------------------------------------------------- the two models: what each has of its own (A.1)
class SumOverProcesses(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: sum_over_processes(x))
    backward = staticmethod(lambda ctx, grad: sum_over_processes(grad))

def sync_batch_norm(net, device):
    """Let batch norms see the batch of all processes: torch's on GPUs; on the CPU, which it does not serve, each process
    norms the whole batch and keeps its part."""
    if device.type == "cuda":
        return timm.layers.convert_sync_batchnorm(net)
    def forward_on_all(bn, forward, x):
        if not bn.training:
            return forward(x)
        before, after = dist.get_rank() * len(x), (dist.get_world_size() - 1 - dist.get_rank()) * len(x)
        return forward(SumOverProcesses.apply(F.pad(x, [0, 0] * (x.dim() - 1) + [before, after])))[before:before + len(x)]
    for bn in (m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        bn.forward = functools.partial(forward_on_all, bn, bn.forward)
    return net

def clip_per_tensor(grads, limit):
    """Scale each gradient that is longer than `limit` to that norm, in place, without reading a norm on the host."""
    norms = torch._foreach_norm(grads)
    torch._foreach_mul_(grads, [(limit / (norm + 1e-6)).clamp_max(1) for norm in norms])

class Model:
    """A student n with its optimizers, its momentum net n_ and its centers C_m and C_t."""
    def __init__(self, cfg, i, backbone, device, world=1):
        self.cfg, self.i, self.family = cfg, i, backbone.family
        torch.manual_seed(seed_of(cfg.seed, "heads", i))
        self.net = Net(backbone, cfg)
        self.momentum_net = copy.deepcopy(self.net).requires_grad_(False)
        no_drop_path(self.momentum_net)   # stochastic depth is for the student
        for net in (self.net, self.momentum_net):
            net.to(device, memory_format=memory_format(device))
            if world > 1:
                sync_batch_norm(net, device)
            if cfg.compile:
                net.compile(dynamic=False)
        self.n_, self.t, self.t_ = self.momentum_net, self.net.t_head, self.momentum_net.t_head
        for name in ("C_m", "C_t"):
            self.momentum_net.register_buffer(name, torch.zeros(1, cfg.out_dim, device=device))
        self.C_m, self.C_t = self.momentum_net.C_m, self.momentum_net.C_t
        self.optimizers = self.make_optimizers()
        self.forward = self.net if world == 1 else nn.parallel.DistributedDataParallel(
            self.net, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
        self.params, self.params_ = list(self.net.parameters()), list(self.momentum_net.parameters())
        self.last_layers = [p for name, p in self.net.named_parameters() if ".last." in name]

    def make_optimizers(self):
        """One, or two where the T-Head of a CNN has its own kind. A parameter group holds the ends of its schedules."""
        cfg, family, scale, groups = self.cfg, self.family, self.cfg.batch_size / 256, dict(sgd=[], adamw=[])
        ends = dict(cnn=dict(lr_ends=(cfg.cnn_lr * scale, cfg.cnn_lr_end), wd_ends=(cfg.cnn_wd, cfg.cnn_wd)),
                    vit=dict(lr_ends=(cfg.vit_lr * scale, cfg.vit_lr_end),
                             wd_ends=(cfg.vit_wd, cfg.vit_wd if cfg.wd_end is None else cfg.wd_end)))
        kind = dict(cnn=cfg.cnn_optimizer, vit=cfg.vit_optimizer)[family]
        for module, family, kind in ((self.net.backbone, family, kind), (self.net.mlp_head, family, kind),
                                     (self.t or nn.Identity(), "vit", cfg.t_optimizer if family == "cnn" else kind)):
            params = [p for p in module.parameters() if p.requires_grad]
            for decayed, own in ((True, {}), (False, dict(wd_ends=(0.0, 0.0)))):
                some = [p for p in params if (p.dim() > 1) == decayed]
                groups[kind] += [dict(params=some, **ends[family] | own)] * bool(some)
        make = dict(sgd=functools.partial(torch.optim.SGD, lr=0.0, momentum=0.9, foreach=True),
                    adamw=functools.partial(torch.optim.AdamW, lr=0.0, fused=self.C_m.device.type in ("cuda", "cpu")))
        return [make[kind](g) for kind, g in groups.items() if g]

    def n(self, x, now):
        """[m, t, Z] = n(x). Stochastic depth draws from (seed, step), whatever the other model draws."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(seed_of(self.cfg.seed, "stochastic depth", self.i, now.step, rank))
        return self.forward(x)

    def temp(self, now):   # tau' of self-distillation
        return now.temp_cnn if self.family == "cnn" else now.temp

    def update(self, now, scaler):
        """Hold the last layers still in the first epochs, clip each gradient, step the optimizers."""
        if now.epoch < self.cfg.freeze_last_layer:
            for p in self.last_layers:
                p.grad = None
        for optimizer in self.optimizers:
            scaler.unscale_(optimizer)
            for g in optimizer.param_groups:
                g["lr"] = cosine_schedule(now.step, now.steps, *g["lr_ends"], now.warmup)
                g["weight_decay"] = cosine_schedule(now.step, now.steps, *g["wd_ends"])
        if self.cfg.clip_grad:
            clip_per_tensor([p.grad for p in self.params if p.grad is not None], self.cfg.clip_grad)
        for optimizer in self.optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_momentum_net(self, l):
        """n_.params = l * n_.params + (1 - l) * n.params; batch-norm statistics are the momentum net's own."""
        torch._foreach_lerp_(self.params_, self.params, 1 - l)

    @torch.no_grad()
    def update_centers(self, m_, t_):
        """C = c C + (1 - c) mean of the momentum logits over both global views, the batch and the processes."""
        means = mean_over_processes(torch.stack([x.float().mean((0, 1)) for x in (m_, t_) if x is not None]))
        for C, mean in zip((self.C_m, self.C_t), means):
            C.lerp_(mean, 1 - self.cfg.center_momentum)

    def state(self):
        return [part.state_dict() for part in (self.net, self.momentum_net, *self.optimizers)]

    def load_state(self, state):
        for part, saved in zip((self.net, self.momentum_net, *self.optimizers), state):
            part.load_state_dict(saved)

# ----------------------------------------------------------------------------------------------------- Algorithm 1
def train_step(model1, model2, x, cfg, now, scaler=None, tick=lambda part: None):
    """One step of Algorithm 1 on the views x of make_views -> the losses by name and the momentum logits.

    In the algorithm's words n1, n2 are the students, n1_, n2_ the momentum nets; where it has two views a and b, x
    holds V = 2 + L, and H averages over the pairs of different ones. A loss left out by --losses is 0.
    """
    n1, n1_, n2, n2_ = model1.n, model1.n_, model2.n, model2.n_
    lambda1, lambda2, l, losses = cfg.lambda1, cfg.lambda2, now.l, cfg.losses.split(",")
    temp, temp1, temp2 = now.temp, model1.temp(now), model2.temp(now)
    C1_s, C2_s = (model1.C_t, model2.C_t) if cfg.search_center else (0.0, 0.0)
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    H = functools.partial(multi_crop_H, student_temp=cfg.student_temp)
    pairs = search_pairs(2 + cfg.local_crops, cfg.search)
    rows = [(row, v) for row, (g, v) in enumerate(pairs)]      # row of t1_s, t2_s -> the view that searched
    zero = torch.zeros((), device=x[0].device)

    with autocast(x[0].device, cfg.dtype):
        m1, t1, Z1 = n1(x, now)                                                          # m1, t1: (V, B, K)
        m2, t2, Z2 = n2(x, now)
        with torch.no_grad():
            m1_, t1_, Z1_ = n1_(x[:1])                                                   # the global views: (2, B, K)
            m2_, t2_, Z2_ = n2_(x[:1])
            if "ct" in losses:                                                           # feature search, section 3.3
                t1_s = search(model1.t_, model2.t.query_of(Z2.pooled), Z1_.tokens[0], pairs)   # t1_(Z2, Z1_)
                t2_s = search(model2.t_, model1.t.query_of(Z1.pooled), Z2_.tokens[0], pairs)   # t2_(Z1, Z2_): (pairs, B, K)
    tick("forward")

    loss_sm1 = H(m1_, m1, model1.C_m, temp1)                                             # self-distillation, 3.2
    loss_sm2 = H(m2_, m2, model2.C_m, temp2)
    loss_st1 = H(t1_, t1, model1.C_t, temp1) if "st" in losses else zero
    loss_st2 = H(t2_, t2, model2.C_t, temp2) if "st" in losses else zero
    loss_cm1 = H(m2_, m1, model2.C_m, temp) if "cm" in losses else zero                  # cross-distillation, 3.3
    loss_cm2 = H(m1_, m2, model1.C_m, temp) if "cm" in losses else zero
    loss_ct1 = H(t2_s, t1, C2_s, temp, pairs=rows) if "ct" in losses else zero
    loss_ct2 = H(t1_s, t2, C1_s, temp, pairs=rows) if "ct" in losses else zero

    loss1 = loss_sm1 + loss_st1 + lambda1 * (loss_cm1 + loss_ct1)
    loss2 = loss_sm2 + loss_st2 + lambda2 * (loss_cm2 + loss_ct2)
    tick("loss")
    scaler.scale(loss1).backward()
    scaler.scale(loss2).backward()
    tick("backward")

    model1.update(now, scaler)                                                           # n1, n2
    model2.update(now, scaler)
    scaler.update()
    model1.update_momentum_net(l)                                                        # n1_.params = l n1_.params + ...
    model2.update_momentum_net(l)
    model1.update_centers(m1_, t1_)                                                      # C = m C + (1 - m) mean(...)
    model2.update_centers(m2_, t2_)
    tick("update")
    parts = dict(sm1=loss_sm1, st1=loss_st1, cm1=loss_cm1, ct1=loss_ct1, loss1=loss1,
                 sm2=loss_sm2, st2=loss_st2, cm2=loss_cm2, ct2=loss_ct2, loss2=loss2)
    return {name: loss.detach() for name, loss in parts.items()}, dict(m1=m1_, t1=t1_, m2=m2_, t2=t2_)

# --------------------------------------------------------------------------------------------------------- k-NN (A.2)
class EvalView(torch.utils.data.Dataset):
    """index -> (center crop (3, S, S) uint8, label): the shorter side to `resize`, then the middle. An unreadable image is
    named and gets label -1, with which it counts nowhere."""
    def __init__(self, images, size, resize=None):
        self.images, self.size, self.resize = images, size, resize or round(size * 256 / 224)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        try:
            image, label = self.images[i]
        except Exception as error:
            warn(f"skipped {name_of(self.images, i)}: {error}")
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -1
        image = TF.resize(to_rgb(image), [self.resize], TF.InterpolationMode.BICUBIC, antialias=True)
        return TF.center_crop(image, [self.size, self.size]), int(label)

@torch.no_grad()
def extract_features(backbones, views, device, batch_size=256, workers=0, rank=0, world=1, dtype="fp32", progress=None):
    """-> ([L2-normalized pooled representations (n, C) of each backbone, in half precision], labels (n,)) on the device, of
    every world-th image; an unreadable image has label -1. progress(n) is told the images done."""
    modes, features, labels, done = [b.training for b in backbones], [], [], 0
    for b in backbones:
        b.eval()
    part = Subset(views, range(rank, len(views), world))
    for x, y in make_loader(part, device, workers, batch_size=batch_size):
        x = normalize(x.to(device, non_blocking=True).float() / 255)
        with autocast(device, dtype):
            pooled = [F.normalize(b(x)[0].float(), dim=1) for b in backbones]
        features = features or [p.new_empty(len(part), p.shape[1], dtype=torch.half) for p in pooled]
        for rows, p in zip(features, pooled):
            rows[done:done + len(x)] = p
        labels.append(y)
        done += len(x)
        if progress:
            progress(done)
    for b, mode in zip(backbones, modes):
        b.train(mode)
    return features, torch.cat(labels).to(device)

def nearest(bank, labels, queries, k):
    """The k nearest of a bank by cosine -> similarities (Q, k), labels (Q, k), most similar first; fewer if the bank is smaller.

    bank (n, D), labels (n,) in [0, 2^20): this process's part of the bank; queries (Q, D) are the same on all processes. Rows
    with label -1 do not count. Similarity and label make one number, sorted by the one, then the other: so the answer, ties
    included, does not depend on how the bank is split, over processes or into the chunks in which it is worked through.
    """
    nothing, found = -2 ** 62, []
    k = min(k, int(sum_over_processes((labels >= 0).sum())))
    for q in queries.split(1024):
        best = [torch.full((len(q), k), nothing, device=q.device)]
        for b, y in zip(bank.split(2 ** 15), labels.split(2 ** 15)):
            similarity = q.float() @ b.float().T   # exact to 2^-30 from here on
            key = ((similarity * 2 ** 30).long() * 2 ** 20 - y).masked_fill_(y < 0, nothing)
            best.append(key.topk(min(k, len(b))).values)
        best = torch.cat(best, 1).topk(k).values
        found.append(gather(best.T.contiguous(), k).T.topk(k).values)
    key = torch.cat(found)
    labels = -key % 2 ** 20
    return (key + labels).float() / 2 ** 50, labels

def knn_classify(bank, labels, queries, k=20, temperature=0.07, classes=None):
    """DINO's weighted k-NN: votes (Q, classes) for queries (Q, D) by their k nearest in bank (n, D), of labels (n,), each
    weighing exp(cosine / temperature). Features are L2-normalized; argmax(1) is the prediction."""
    return vote(*nearest(bank, labels, queries, k), classes or int(labels.max()) + 1, temperature)

def vote(similarity, labels, classes, temperature=0.07):
    """Similarities and labels (Q, k) of neighbors -> votes (Q, classes)."""
    votes = torch.zeros(len(labels), classes, device=labels.device)
    return votes.scatter_add_(1, labels, (similarity / temperature).exp())

def gather(x, n):
    """Tensors (at most n, ...) of all processes -> (processes * n, ...), one after the other, filled up with -1."""
    if not dist.is_initialized():
        return x
    x = F.pad(x, [0, 0] * (x.dim() - 1) + [0, n - len(x)], value=-1)
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)

def knn_accuracy(backbones, train, val, cfg, device, rank=0, world=1):
    """k-NN top-1 (percent) of each backbone on val, with train as the bank; the processes share the work."""
    (banks, labels), (queries, answers) = (
        extract_features(backbones, EvalView(part, cfg.global_size), device, cfg.batch_size, cfg.workers, rank, world)
        for part in (train, val))
    n = math.ceil(len(val) / world)
    answers, classes = gather(answers, n), int(gather(labels.max()[None], 1).max()) + 1
    return [100 * (knn_classify(bank, labels, gather(q, n), cfg.knn_k, classes=classes).argmax(1) == answers)[answers >= 0]
            .float().mean().item() for bank, q in zip(banks, queries)]

# ------------------------------------------------------------------------------------------------ checkpoints and log
def write(value, path):
    torch.save(value, path + ".tmp")   # so a file under its own name is always whole
    os.replace(path + ".tmp", path)

def save(cfg, models, step, scaler):
    """Write checkpoint.pth, all that resuming needs, and the momentum backbones under timm's names -> None, or a sentence
    that says why it could not be done. Raises UserError instead of saving weights that are not finite."""
    for model in models:
        if not torch.stack(torch._foreach_norm([p.detach() for p in model.params])).isfinite().all():
            raise UserError(f"step {step - 1}: its update made weights of model {model.i} not finite. The last good checkpoint is kept. "
                       f"Lower the learning rates or use --dtype fp32", code=1)
    try:
        if MAIN:
            state = dict(config=asdict(cfg), step=step, scaler=scaler.state_dict(), models=[m.state() for m in models])
            write(state, f"{cfg.out}/checkpoint.pth")
            for m in models:
                weights = {name: w.contiguous() for name, w in m.momentum_net.backbone.model.state_dict().items()}
                write(weights, f"{cfg.out}/model{m.i}.pth")
    except (OSError, RuntimeError) as error:   # torch turns a full disk into a RuntimeError
        return f"--out {cfg.out}: the checkpoint of step {step} could not be written ({error}); make room there"

def read_checkpoint(path, advice="Delete it to start anew, or give another --out"):
    """-> the dict that save wrote. Raises UserError where it is none, or damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["config"]["seed"], state["step"], state["models"]   # it must have these
        return state
    except Exception as error:
        raise UserError(f"{path}: damaged, or no checkpoint of this program ({type(error).__name__}). {advice}") from error

def refuse_other_settings(path, saved, cfg):
    """Raise UserError with a list of the settings in which cfg differs from those of a checkpoint, but for those that may change."""
    now = {f.name: getattr(cfg, f.name) for f in fields(cfg) if not f.metadata["may_differ"]}
    word = lambda value: "unset" if value in (None, "", ()) else value
    differ = [f"--{name} was {word(saved.get(name))}, is {word(value)}" for name, value in now.items() if saved.get(name) != value]
    if differ:
        raise UserError(f"{path} is of other settings: {'; '.join(differ)}. Give the same, or another --out")

def resume(cfg, models, scaler):
    """Load --out's checkpoint, if there is one -> its step, else 0. Raises UserError if its settings are others."""
    path = f"{cfg.out}/checkpoint.pth"
    if not os.path.exists(path):
        return 0
    state = read_checkpoint(path)
    refuse_other_settings(path, state["config"], cfg)
    for model, state_of_model in zip(models, state["models"]):
        model.load_state(state_of_model)
    scaler.load_state_dict(state["scaler"])
    say(f"resumed {path} at step {state['step']}")
    return state["step"]

def read_losses(window, first):
    """Losses of the steps since the last reading -> their means over steps and processes, by name; here alone does the host wait
    for the device. Raises UserError where one is not finite."""
    values = mean_over_processes(torch.stack([torch.stack([*losses.values()]) for losses in window])).cpu()
    for row in (~values.isfinite()).any(1).nonzero()[:1, 0].tolist():
        names = ", ".join(name for name, value in zip(window[0], values[row]) if not value.isfinite())
        raise UserError(f"step {first + row}: {names} not finite. The last good checkpoint is kept. Lower the learning rates, raise "
                   f"--warmup_epochs or --freeze_last_layer, or use --dtype fp32", code=1)
    return dict(zip(window[0], values.mean(0).tolist()))

@torch.no_grad()
def target_statistics(logits, models, now):
    """Of each momentum head on this batch: the mean entropy of its targets, and their spread (entropy of the mean target less
    mean entropy). A head without spread says the same of every image: it has collapsed, which no loss shows."""
    stats, entropy = {}, lambda p: torch.special.entr(p).sum(-1)
    for name, t in ((name, t) for name, t in logits.items() if t is not None):
        model = models[int(name[1]) - 1]
        p = target(t, model.C_m if name[0] == "m" else model.C_t, model.temp(now)).flatten(0, 1)
        stats |= {f"entropy_{name}": entropy(p).mean(), f"spread_{name}": entropy(p.mean(0)) - entropy(p).mean()}
    return dict(zip(stats, torch.stack([*stats.values()]).tolist()))

def memory_gb(device):
    """Peak memory of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource   # which Windows lacks
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9

def show(record, last=True):
    """Print a record as a line; on a terminal the next overwrites it unless it is the last."""
    line = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"step {v}/{record['steps']}" if k == "step" else f"{k} {v}"
                     for k, v in record.items() if not k.startswith(("entropy", "spread", "steps")) and not isinstance(v, dict))
    terminal = sys.stdout.isatty()
    if MAIN:
        print(("\r\033[K" if terminal else "") + line, end="" if terminal and not last else "\n", flush=True)

def log(cfg, record, last=True):
    """Append a record to log.jsonl, and show it."""
    try:
        if MAIN:
            with open(f"{cfg.out}/log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
    except OSError as error:
        warn(f"--out {cfg.out}: log.jsonl could not be written ({error})")
    show(record, last)

# ----------------------------------------------------------------------------------------------------------- training
def train(cfg, models, images, val, device, rank, world):
    """Train to the end, from --out's checkpoint if there is one. Raises UserError, on a signal after writing one."""
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    first = step = since = resume(cfg, models, scaler)
    per_epoch = len(images) // cfg.batch_size
    steps, save_every = cfg.epochs * per_epoch, cfg.save_every or per_epoch
    caught, bad, window, start = set(), set(), [], time.time()
    clock, stops = start, (signal.SIGTERM, signal.SIGINT)
    for s in stops:
        signal.signal(s, lambda number, frame: caught.add(number))
    keys = batches(len(images), cfg, first, rank, world)
    for crops in make_loader(MultiCrop(images, cfg), device, cfg.workers, batch_sampler=keys):
        now = schedule(cfg, step, per_epoch)
        losses, logits = train_step(*models, make_views(crops, cfg, device, step, rank, world), cfg, now, scaler)
        window.append(losses)
        step += 1

        for index in {*crops[2].tolist()} - {-1} - bad:
            bad.add(index)
            warn(f"skipped {name_of(images, index)}: not a readable image")
        flags = torch.tensor([len(bad), *(s in caught for s in stops)])   # on the CPU: no GPU is waited for
        if world > 1:   # all processes stop at one step
            dist.all_reduce(flags)
        unreadable, *stopped = flags.tolist()
        if unreadable > 0.01 * len(images):
            raise UserError(f"--data {cfg.data}: {unreadable} of {len(images)} images cannot be read, more than 1 %: mend or remove "
                       f"those named above", code=1)

        end_of_epoch = step % per_epoch == 0
        logging = step % cfg.log_every == 0 or step == steps
        saving = any(stopped) or step % save_every == 0 or step == steps
        if logging or saving:
            means, seconds, n = read_losses(window, since), time.time() - clock, len(window)
            window, since, clock = [], step, time.time()
        if logging:
            record = dict(epoch=now.epoch, step=step, steps=steps)
            record |= {name: mean for name, mean in means.items() if name[:2] not in {"sm", "cm", "st", "ct"} - {*cfg.losses.split(",")}}
            record |= {f"lr{m.i}": m.optimizers[0].param_groups[0]["lr"] for m in models}
            record |= {"images/s": cfg.batch_size * n / seconds, "GB": memory_gb(device),
                       "minutes_left": (clock - start) / (step - first) * (steps - step) / 60}
            record |= target_statistics(logits, models, now)
            log(cfg, record, last=end_of_epoch)
            flat = [name[7:] for name, v in record.items() if name.startswith("spread") and v < 0.01 * math.log(cfg.out_dim)]
            if flat and step > steps / 4:   # earlier, targets may be uniform and yet part later
                warn(f"collapse? The targets of {', '.join(flat)} hardly differ between images (entropy and spread in log.jsonl): "
                     f"try a lower --teacher_temp, lower learning rates, a higher --ema, or --t_norm on for a T-Head")
        if saving:
            failed = save(cfg, models, step, scaler)
            if failed and (any(stopped) or step == steps):
                raise UserError(f"{failed} and start again", code=1)
            if failed:
                warn(f"{failed}; training goes on")
        if any(stopped):
            number = stops[0] if stopped[0] else stops[1]
            raise UserError(f"stopped by {number.name} after step {step}; the same command goes on from there", code=128 + number)
        if cfg.knn_every and end_of_epoch and (now.epoch + 1) % cfg.knn_every == 0:
            knn = knn_accuracy([m.momentum_net.backbone for m in models], images, val, cfg, device, rank, world)
            log(cfg, dict(epoch=now.epoch, knn1=knn[0], knn2=knn[1]))
            clock = time.time()

PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A10": 125, "L4": 121,
               "4090": 165, "3090": 71, "V100": 125, "T4": 65}   # dense 16-bit matrix products, by the makers' data sheets

def time_loader(cfg, images, n=64):
    """-> CPU time (ms) in which one core decodes an image, and in which it cuts its crops."""
    crops, threads, times = MultiCrop(images, cfg), torch.get_num_threads(), []
    torch.set_num_threads(1)   # as in a worker
    for work in (lambda i: to_rgb(images[i][0]), lambda i: crops[0, i]):
        start = time.process_time()
        for i in range(n):
            work(i % len(images))
        times.append(1000 * (time.process_time() - start) / n)
    torch.set_num_threads(threads)
    return times[0], times[1] - times[0]

def benchmark(cfg, models, images, device, rank, world):
    """Time --benchmark steps, first on one batch that stays on the device, then through the loader, and print the parts; then where
    the FLOPs of a step go, and what a loader's worker takes for an image."""
    n, now, parts, clock = cfg.benchmark, schedule(cfg, 0, 10 ** 6), {}, [0.0]
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    def tick(part):
        if device.type == "cuda":
            torch.cuda.synchronize()
        parts[part] = parts.get(part, 0.0) + time.perf_counter() - clock[0]
        clock[0] = time.perf_counter()
    def step(source, tick):
        crops = next(source)
        tick("waiting for data")
        x = make_views(crops, cfg, device, 0, rank, world)
        tick("augment")
        train_step(*models, x, cfg, now, scaler, tick)
    long = copy.copy(cfg)
    long.epochs = (n + 9) * cfg.batch_size // len(images) + 2
    keys = batches(len(images), long, 0, rank, world)
    loaded = iter(make_loader(MultiCrop(images, cfg), device, cfg.workers, batch_sampler=keys))
    kept = [c.to(device) for c in next(loaded)]
    for name, source in (("one batch kept on the device", iter(lambda: kept, None)), ("through the loader", loaded)):
        for i in range(3 + n):
            if i == 3:   # the first steps allocate, tune and compile
                parts.clear()
                start = clock[0] = time.perf_counter()
            step(source, tick)
        seconds = (time.perf_counter() - start) / n
        say(f"{name}: {cfg.batch_size / seconds:.1f} images/s, {1000 * seconds:.1f} ms a step: "
            + ", ".join(f"{part} {1000 * s / n:.1f}" for part, s in parts.items()))
    memory = memory_gb(device)

    flops = {}   # up to the end of a part, or of a part alone: after it less before it
    with FlopCounterMode(display=False) as counter:
        def add(part, sign=1):
            flops[part] = flops.get(part, 0) + sign * counter.get_total_flops() * world / cfg.batch_size / 1e9
        for m in models:
            for part, module in dict(students=m.net, backbones=m.net.backbone, heads=m.net.mlp_head, momentum=m.n_).items():
                module.register_forward_pre_hook(lambda *_, part=part: add(part, -1))
                module.register_forward_hook(lambda *_, part=part: add(part))
        step(iter([kept]), add)
    total, gpu = flops["update"], torch.cuda.get_device_name() if device.type == "cuda" else ""
    rate = total * cfg.batch_size / seconds / 1000
    peak = next((f", {100 * rate / v / world:.1f} % of {v} on {world} {gpu}" for k, v in PEAK_TFLOPS.items() if k in gpu), "")
    say(f"GFLOP an image: {total:.2f}: students {flops['students']:.2f} (backbones {flops['backbones']:.2f}, MLP-Heads "
        f"{flops['heads']:.2f}, T-Heads {flops['students'] - flops['backbones'] - flops['heads']:.2f}), momentum nets "
        f"{flops['momentum']:.2f}, search {flops['forward'] - flops['augment'] - flops['students'] - flops['momentum']:.2f}, backward "
        f"{flops['backward'] - flops['loss']:.2f}; {rate:.2f} TFLOP/s through the loader{peak}; peak memory {memory:.2f} GB")
    say("CPU time of a loader's worker for an image, ms: decode {:.2f}, crop {:.2f}".format(*time_loader(cfg, images)))

def preview(cfg, images, device):
    """Write the views of the first images to a PNG, a row an image, as the networks get them."""
    n = cfg.batch_size = min(6, len(images))
    crops = torch.utils.data.default_collate([MultiCrop(images, cfg)[0, i] for i in range(n)])
    (mean, std), columns = mean_and_std(torch.device("cpu")), []
    for x in make_views(crops, cfg, device, 0):
        x = (x.cpu() * std + mean).unflatten(0, (-1, n))
        columns += [*F.pad(x, [0, max(0, cfg.global_size - x.shape[-1])] * 2)[..., :cfg.global_size, :cfg.global_size]]
    try:
        torchvision.utils.save_image(torch.stack(columns, 1).flatten(0, 1), cfg.preview, nrow=len(columns))
    except OSError as error:
        raise UserError(f"--preview {cfg.preview}: {error}") from error
    say(f"wrote {cfg.preview}: {n} images, a row each: 2 global and {cfg.local_crops} local views")

# --------------------------------------------------------------------------------------------------------------- main
def build_models(cfg, device, world=1):
    """-> [Model, Model]. Each has its own seed, so neither depends on its partner. Fills in the settings that depend on the
    backbones: lambda1 and lambda2 (4.5, A.1) and t_dim 0."""
    backbones = []
    for i in "12":
        torch.manual_seed(seed_of(cfg.seed, "backbone", i))
        backbones.append(build_backbone(
            getattr(cfg, f"arch{i}"), getattr(cfg, f"model_kwargs{i}"), cfg.patch_size, cfg.vit_pool,
            (cfg.global_size, cfg.local_size)[:2 if cfg.local_crops else 1], cfg.drop_path, f"--arch{i}"))
        if getattr(cfg, f"init{i}"):
            load_backbone(backbones[-1], getattr(cfg, f"init{i}"), f"--init{i}")
    mixed = backbones[0].family != backbones[1].family
    size = [sum(p.numel() for p in b.parameters()) for b in backbones]
    for i, b in enumerate(backbones):
        smaller = b.family == "vit" if cfg.recipe == "release" and mixed else size[i] < size[1 - i]
        if getattr(cfg, f"lambda{i + 1}") is None:
            setattr(cfg, f"lambda{i + 1}", 0.1 if smaller else 1.0)
    if not cfg.t_dim:
        cfg.t_dim = next((b.dim for b in backbones if b.family == "vit" and mixed), 384)
        check(cfg)
    return [Model(cfg, i, b, device, world) for i, b in enumerate(backbones, 1)]

class Pixels(nn.Module):   # the demo's baseline
    def forward(self, x):
        return x.flatten(1), None

def run(cfg):
    device, rank, world = join_processes()
    fill_in_machine(cfg, device, world)
    images, val = get_data(cfg)
    if cfg.preview:
        return preview(cfg, images, device)
    if len(images) < cfg.batch_size:
        raise UserError(f"--batch_size {cfg.batch_size}: --data {cfg.data} has only {len(images)} images; lower it")
    if val is None and (cfg.knn_every or cfg.demo):
        raise UserError(f"--knn_every: --data {cfg.data} has no val/ with class folders to classify")
    models = build_models(cfg, device, world)
    for m in models:
        size, whole = (sum(p.numel() for p in net.parameters()) / 1e6 for net in (m.net.backbone, m.net))
        say(f"model {m.i}: {getattr(cfg, f'arch{m.i}')}, {size:.1f} M parameters, heads {whole - size:.1f} M; treated as a "
            f"{dict(cnn='CNN', vit='ViT')[m.family]}; lambda{m.i} = {getattr(cfg, f'lambda{m.i}'):g}")
    say(f"{len(images):,} images; {world} process{'es' * (world > 1)} on {device.type}, {cfg.dtype}")
    if cfg.benchmark:
        return benchmark(cfg, models, images, device, rank, world)
    try:
        os.makedirs(cfg.out, exist_ok=True)
        open(f"{cfg.out}/log.jsonl", "a").close()
    except OSError as error:
        raise UserError(f"--out {cfg.out}: cannot be written to ({error.strerror}); give another folder") from error

    backbones = [m.momentum_net.backbone for m in models]
    knn = functools.partial(knn_accuracy, train=images, val=val, cfg=cfg, device=device, rank=rank, world=world)
    if cfg.demo:
        if os.path.exists(f"{cfg.out}/checkpoint.pth"):
            refuse_other_settings(f"{cfg.out}/checkpoint.pth", read_checkpoint(f"{cfg.out}/checkpoint.pth")["config"], cfg)
        say("k-NN on raw pixels and with the untrained nets ...")
        before = knn([Pixels(), *backbones])
    train(cfg, models, images, val, device, rank, world)
    if cfg.demo:
        after = knn(backbones)
        say(f"\nk-NN top-1 on {cfg.data}, %{'before':>12}{'after':>8}\nraw pixels{before[0]:>20.1f}")
        for i, arch in enumerate((cfg.arch1, cfg.arch2)):
            say(f"{arch:18}{before[1 + i]:>12.1f}{after[i]:>8.1f}")
    for m in models:
        b = m.net.backbone
        kwargs = "".join(f", {k}={v!r}" for k, v in b.timm_kwargs.items())
        say(f"timm.create_model({b.timm_name!r}, num_classes=0{kwargs}, checkpoint_path='{cfg.out}/model{m.i}.pth')")

def main(argv=None, program="mokd.py", parse=parse_args, run=run):
    """Run a program of this project -> its exit code. What stops it is one sentence, not a traceback."""
    try:
        run(parse(argv))
    except UserError as stop:
        if MAIN or stop.code == 1:
            warn(f"{program}: {stop}")
        return stop.code
    except torch.cuda.OutOfMemoryError:
        warn(f"{program}: out of GPU memory: lower --batch_size (training also: --local_crops, --out_dim), or use more GPUs")
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0

if __name__ == "__main__":
    sys.exit(main())
