"""MOKD: Multi-mode Online Knowledge Distillation for self-supervised visual representation learning (Song et
al., CVPR 2023, arXiv 2304.06461), in one file.

Two different backbones learn together, without labels. Each learns from its own momentum copy
(self-distillation) and from the other's (cross-distillation), in two spaces: an MLP-Head reads the pooled
representation, and a T-Head reads the local features, where one model's pooled feature searches the other
model's local features.

    python mokd.py --demo                                                   # minutes on two cores, no data
    python mokd.py --data path/to/images --arch1 resnet18 --arch2 vit_tiny  # one process, any device
    torchrun --nproc_per_node=8 mokd.py --arch1 resnet50 --arch2 vit_small  # the paper's ImageNet recipe

The order is the paper's, with what every program needs around it: settings (A.1), processes, images and views
(A.1), backbones, heads and the feature search (3.3, 3.4), losses (3.2, 3.3), schedules, optimizers, and
Algorithm 1 (train_step); then k-NN (A.2), checkpoints, the training loop, the toy data and main.

Names are Algorithm 1's: m and t are logits of the MLP-Head and the T-Head, Z is a representation, and a
trailing _ belongs to the momentum net. In shapes, B is the images of one process and V = 2 + L the views of
an image (2 global ones, then L local ones). K is the logits of a head, C the channels of a backbone, N its
tokens.
"""
import argparse, ast, contextlib, copy, difflib, functools, hashlib, json, math  # noqa: E401
import multiprocessing, os, re, shutil, signal, sys, time, zipfile  # noqa: E401
from collections import namedtuple
from dataclasses import MISSING, asdict, dataclass, field, fields

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.transforms.v2 import RandomResizedCrop, functional as TF
try:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
except ImportError:   # torchvision announces to leave decoding to another package
    decode_jpeg = None

class UserError(Exception):
    """Ends the program with a sentence for the user. Code 2: the command was wrong; 1: the run failed;
    128 + number: a signal."""
    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code

# --------------------------------------------------------------------------------------------- settings (A.1)
def flag(default, help, group=None, low=0, high=math.inf, choices=None, nargs=None, may_differ=False):
    """One setting. Its numbers lie between low and high; `group` opens a group of --help; `nargs` "+" takes
    any count of values; a setting that `may_differ` can change when a run resumes."""
    data = dict(help=help, group=group, low=low, high=high, choices=choices, nargs=nargs,
                may_differ=may_differ)
    if default == {}:
        return field(default_factory=dict, metadata=data)
    return field(default=default, metadata=data)

free = functools.partial(flag, may_differ=True)

@dataclass
class Config:
    """Every setting, its source in brackets. Config() is the paper's recipe for ImageNet, but for what README
    lists. The command line is made from this class: a new line is a new flag, with help, and it guards
    resuming unless it is `free`."""
    arch1: str = flag("resnet50", "backbone 1: a short name of the paper's or any timm model [4]", "models")
    arch2: str = flag("vit_small", "backbone 2; it may equal backbone 1 [4]")
    patch_size: int = flag(16, "patch of vit_tiny, vit_small and vit_base in pixels [DINO]", low=1)
    model_kwargs1: dict = flag({}, "arguments of timm.create_model for backbone 1, as channels=16,32,64,128")
    model_kwargs2: dict = flag({}, "arguments of timm.create_model for backbone 2")
    init1: str = flag("", "first weights of backbone 1: a model1.pth, or a file of timm, DINO, MoCo")
    init2: str = flag("", "first weights of backbone 2")
    vit_pool: str = flag("mean", "pooled feature of a ViT: the mean of its patch tokens [3.2], or its CLS "
                         "token [released code]", choices=("mean", "cls"))
    drop_path: float = flag(0.1, "stochastic depth of a student ViT [released code]", high=0.9)

    out_dim: int = flag(65536, "K, logits of a head [3.4]; use fewer for few images", "heads", low=2)
    hidden_dim: int = flag(2048, "hidden width of an MLP-Head [DINO]", low=1)
    bottleneck_dim: int = flag(256, "width before the last layer of an MLP-Head [DINO]", low=1)
    t_dim: int = flag(384, "T-Heads' width [3.4: ViT-Small's]; 0: beside a CNN the ViT's [released code]")
    t_depth: int = flag(3, "blocks of a T-Head [3.4]", low=1)
    t_heads: int = flag(6, "attention heads of a T-Head [3.4: as ViT-Small]", low=1)
    t_norm: bool = flag(False, "L2-normalize what a T-Head's last layer reads; try it if a T-Head collapses")

    recipe: str = flag("paper", "settings to start from, the paper's or the released code's; flags win",
                       "losses", choices=("paper", "release"))
    losses: str = flag("sm,cm,st,ct", "losses, sm among them; sm alone trains two independent nets [Table 7]")
    lambda1: float = flag(None, "weight of cm1 and ct1. By default the larger backbone has 1 and the smaller "
                          "0.1 [4.5, A.1]; with --recipe release a CNN 1, a ViT 0.1. Raise the worse model's")
    lambda2: float = flag(None, "weight of cm2 and ct2, by the same rule")
    search: str = flag("all", "pairs of views that search: all different ones, the global ones [Alg. 1], or "
                       "local views in global view 0 [released code]", choices=("all", "global", "local"))
    search_center: bool = flag(True, "center searches by the T-Head's center (ours); off [released code]")
    student_temp: float = flag(0.1, "tau, temperature of the students [A.1]", low=1e-3)
    teacher_temp: float = flag(0.07, "tau' after its rise [A.1]; lower it if entropies stay high", low=1e-3)
    teacher_temp_start: float = flag(0.04, "tau', temperature of the momentum nets, at first [A.1]", low=1e-3)
    teacher_temp_epochs: int = flag(30, "epochs in which tau' rises [A.1]")
    teacher_temp_epochs_cnn: int = flag(None, "the same for self-distillation of a CNN; 50 [released code]")
    center_momentum: float = flag(0.9, "momentum of the centers [DINO]; lower it for few steps", high=1)
    ema: float = flag(0.996, "l, momentum of momentum nets, at last 1 [DINO]; lower it for few steps", high=1)

    global_size: int = flag(224, "size of the 2 global views in pixels [A.1]", "views", low=1)
    global_scale: tuple = flag((0.25, 1.0), "part of the image in a global view [A.1]", low=1e-4, high=1)
    local_size: int = flag(96, "size of the local views in pixels [A.1]", low=1)
    local_scale: tuple = flag((0.05, 0.25), "part of the image in a local view [A.1]", low=1e-4, high=1)
    local_crops: int = flag(8, "L, local views of an image [A.1]; 0 for none")
    jitter: tuple = flag((0.4, 0.4, 0.2, 0.1), "brightness, contrast, saturation, hue, at 0.8 [DINO]")
    grayscale: float = flag(0.2, "probability of grayscale [released code]; A.1 names none", high=1)
    blur: tuple = flag((0.1, 2.0), "range of sigma of the Gaussian blur in pixels [DINO]; 0 0 for none")
    solarize: float = flag(0.2, "probability of solarizing global view 1 [released code]; not A.1", high=1)

    data: str = flag("imagenet", "image folder, torchvision data set (cifar10, ...), or toy", "data")
    data_root: str = free("data", "folder to which torchvision data sets are downloaded")
    workers: int = free(None, "loaders of each process; by default its share of the cores, up to 16 (1 "
                        "without a GPU); raise it if the GPU waits for data")

    epochs: int = flag(100, "epochs [4]", "optimization", low=1)
    batch_size: int = flag(256, "images of a step over all processes [4, A.1]", low=1)
    warmup_epochs: int = free(10, "epochs in which learning rates rise [A.1]; raise it if losses rise")
    cnn_optimizer: str = flag("sgd", "for CNNs, the nets with batch norm [3.4]", choices=("sgd", "adamw"))
    vit_optimizer: str = flag("adamw", "for ViTs, the nets without [3.4]", choices=("sgd", "adamw"))
    t_optimizer: str = flag("adamw", "for a CNN's T-Head, with vit_lr and vit_wd; sgd in the [released code] "
                            "and by the rule of 3.4", choices=("sgd", "adamw"))
    cnn_lr: float = free(0.1, "peak rate of CNNs [A.1], times batch_size / 256 [DINO]; lower if losses rise")
    vit_lr: float = free(3e-4, "peak rate of ViTs [A.1], T-Heads, times batch_size / 256 [DINO]; as cnn_lr")
    cnn_lr_end: float = free(1e-6, "last learning rate of CNNs [DINO]; 0.0048 [released code]")
    vit_lr_end: float = free(1e-6, "last learning rate of ViTs and T-Heads [DINO]; 1e-5 [released code]")
    cnn_wd: float = flag(1e-4, "weight decay of CNNs [A.1], never on 1-D parameters [DINO]")
    vit_wd: float = flag(0.04, "weight decay of ViTs [A.1] and T-Heads, never on 1-D parameters [DINO]")
    wd_end: float = flag(None, "vit_wd goes to this by a cosine, 0.4 in the [released code]; else it stays")
    clip_grad: float = free(3.0, "norm to which each gradient tensor is clipped [released code]; 0 for none")
    freeze_last_layer: int = flag(1, "epochs of still last layers [released code]; raise if losses rise")

    out: str = free("", "folder of results; by default runs/ARCH1-ARCH2", "running")
    seed: int = flag(0, "seed of everything that is drawn but the toy images")
    dtype: str = free("auto", "numbers of autocast; auto takes bf16, fp16 on older GPUs, fp32 on the CPU",
                      choices=("auto", "bf16", "fp16", "fp32"))
    compile: bool = free(False, "compile both models with torch.compile")
    grad_checkpointing: bool = free(False, "run students' backbones forward twice, for about half the memory")
    log_every: int = free(20, "steps between log lines", low=1)
    save_every: int = free(0, "steps between checkpoints; 0 writes one each epoch")
    knn_every: int = free(0, "epochs between k-NN evaluations of the momentum nets; 0 for none")
    knn_k: int = free(20, "neighbors in those evaluations [DINO]", low=1)
    demo: bool = free(False, "train a small pair on toy images, with k-NN before and after")

RECIPES = {"paper": {}, "release": dict(
    vit_pool="cls", t_dim=0, search="local", search_center=False, teacher_temp_epochs_cnn=50,
    t_optimizer="sgd", cnn_lr_end=0.0048, vit_lr_end=1e-5, wd_end=0.4)}

DEMO = dict(
    data="toy", arch1="resnet18", arch2="vit_tiny", out="runs/demo",
    model_kwargs1=dict(layers=(1, 1, 1, 1), channels=(16, 32, 48, 64), stem_type="deep", stem_width=8,
                       output_stride=8),
    model_kwargs2=dict(img_size=24, patch_size=4, embed_dim=64, depth=3, num_heads=2), drop_path=0.0,
    out_dim=256, hidden_dim=256, bottleneck_dim=32, t_dim=48, t_depth=1, t_heads=3, t_norm=True,
    global_size=24, global_scale=(0.5, 1.0), local_size=12, local_scale=(0.3, 0.8), local_crops=2,
    jitter=(0.4, 0.4, 0.4, 0.2), blur=(0.0, 0.0), solarize=0.0, epochs=14, warmup_epochs=1, batch_size=64,
    cnn_optimizer="adamw", cnn_lr=0.01, vit_lr=0.01, ema=0.99, center_momentum=0.5, teacher_temp=0.015,
    teacher_temp_start=0.015, freeze_last_layer=0)

def key_value(text):
    """'channels=16,32' -> ('channels', (16, 32)). A value that is no Python literal stays a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value

def on_or_off(text):
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither on nor off")
    return text == "on"

def read_flags(config, argv, program, about):
    """The command line of a dataclass of flags -> dict of what it gives. Exits with 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog=program, usage=f"python {program} [--FLAG VALUE ...]", description=about, allow_abbrev=False,
        epilog="[...] is a source: part of the paper, or code.", argument_default=argparse.SUPPRESS)
    for f in fields(config):
        default, options = f.default, dict(type=f.type, metavar="X")
        if f.metadata["choices"]:
            options = dict(choices=f.metadata["choices"])
        elif f.type is bool:
            options = dict(type=on_or_off, nargs="?", const=True, metavar="on|off")
            default = "on" if default else "off"
        elif f.type is dict:
            options = dict(type=key_value, nargs="+", metavar="KEY=VALUE")
        elif f.type is tuple:
            number = type(default[0]) if default else float
            options = dict(type=number, nargs=f.metadata["nargs"] or len(default), metavar="X")
            default = " ".join(map(str, default))
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        shown = "" if default in (None, "", MISSING) else f" (default: {default})"
        group.add_argument(f"--{f.name}", help=(f.metadata["help"] + shown).replace("%", "%%"), **options)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        names, word = [f.name for f in fields(config)], unknown[0].lstrip("-").replace("-", "_")
        close = [name for name in names if word in name.split("_")] or difflib.get_close_matches(word, names)
        hint = f"; did you mean --{', --'.join(close)}?" if close else ""
        parser.error(f"unrecognized argument {unknown[0]}{hint}")
    for f in fields(config):
        if hasattr(given, f.name) and f.type in (tuple, dict):   # argparse makes lists
            setattr(given, f.name, f.type(getattr(given, f.name)))
    return vars(given)

def check_ranges(cfg):
    """Refuse numbers out of their range. Raises UserError."""
    for f in fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if f.type in (int, float, tuple) and value is not None:
            for number in value if f.type is tuple else [value]:
                if not low <= number <= high:
                    bound = f"at most {high}" if number > high else f"at least {low}"
                    raise UserError(f"--{f.name} {number}: must be {bound}")

def parse_args(argv=None):
    """Command line -> Config. What is given wins over --demo, that over --recipe, that over the defaults."""
    given = read_flags(Config, argv, "mokd.py", __doc__.split("\n\n")[0])
    settings = RECIPES[given.get("recipe", "paper")] | (DEMO if given.get("demo") else {})
    for i in "12":
        if f"arch{i}" in given:   # the demo's arguments of a backbone are for the demo's backbone alone
            settings.pop(f"model_kwargs{i}", None)
    cfg = Config(**settings | given)
    check(cfg)
    return cfg

def loss_names(cfg):
    return set(cfg.losses.split(","))

def check(cfg):
    """Refuse settings that cannot work, before anything is built. Raises UserError."""
    check_ranges(cfg)
    for name in ("global_scale", "local_scale", "blur"):
        if getattr(cfg, name)[0] > getattr(cfg, name)[1]:
            raise UserError(f"--{name}: give the smaller number first")
    if "sm" not in loss_names(cfg) or loss_names(cfg) - {"sm", "cm", "st", "ct"}:
        raise UserError(f"--losses {cfg.losses}: give sm and any of cm,st,ct, with commas between them")
    if cfg.t_dim % cfg.t_heads:
        raise UserError(f"--t_dim {cfg.t_dim} does not divide by --t_heads {cfg.t_heads}: change either")
    if cfg.warmup_epochs > cfg.epochs:
        raise UserError(f"--warmup_epochs {cfg.warmup_epochs} is more than --epochs {cfg.epochs}: lower it")
    if cfg.search == "local" and not cfg.local_crops:
        raise UserError("--search local needs --local_crops of at least 1")
    if cfg.jitter[3] > 0.5:
        raise UserError(f"--jitter: its last number, for the hue, is {cfg.jitter[3]} and must be at most 0.5")
    if cfg.compile and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise UserError("--compile needs a C compiler, and there is none: install gcc, or leave it out")

# ---------------------------------------------------------------------------------- processes, seeds, signals
MAIN = int(os.environ.get("RANK", 0)) == 0   # the process that prints and writes

def join_processes():
    """-> (device, rank, world). Under torchrun joins the others, by NCCL or gloo. Raises UserError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if torch.cuda.is_available():
        device, there = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), torch.cuda.device_count()
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > there:
            raise UserError(f"more processes than GPUs: give --nproc_per_node at most {there}")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device, rank, world

def fill_in_machine(cfg, device, world):
    """Fill in --dtype and --workers where they are left to the machine. Raises UserError."""
    if cfg.batch_size % world:
        raise UserError(f"--batch_size {cfg.batch_size} is no multiple of {world} processes: change it")
    gpu = device.type == "cuda"
    if cfg.dtype == "auto":
        newer = gpu and torch.cuda.get_device_capability(device) >= (8, 0)   # than V100 and T4, without bf16
        cfg.dtype = "bf16" if newer else "fp16" if gpu else "fp32"
    if cfg.workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cfg.workers = min(16, max(1, cores)) if gpu else 1
    torch.backends.cudnn.benchmark = True

def autocast(device, dtype):
    types = dict(bf16=torch.bfloat16, fp16=torch.float16)   # fp32 needs none
    return torch.autocast(device.type, types.get(dtype), enabled=dtype in types)

def memory_format(device):   # GPUs convolve faster with channels last
    return torch.channels_last if device.type == "cuda" else torch.preserve_format

def say(text):
    if MAIN:
        print(text, flush=True)

def warn(text):
    print(text, file=sys.stderr, flush=True)

def sum_over_processes(x):
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x

def mean_over_processes(x):
    return sum_over_processes(x) / (dist.get_world_size() if dist.is_initialized() else 1)

def gather(x, n):
    """Tensors (at most n, ...) of all processes -> (processes * n, ...), in turn, filled up with -1."""
    if not dist.is_initialized():
        return x
    x = F.pad(x, [0, 0] * (x.dim() - 1) + [0, n - len(x)], value=-1)
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)

def seed_of(*key):
    """A 63-bit seed from numbers and words. All that is drawn follows from (seed, epoch, index) or (seed,
    step), so a resumed run repeats the uninterrupted one, with any number of workers."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1

def generator(*key):
    return torch.Generator().manual_seed(seed_of(*key))

class Watch:
    """What ends a loop between two steps: a signal, or too many unreadable images, at any process."""
    def __init__(self, images):
        self.images, self.unreadable, self.caught = images, set(), set()
        self.parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.caught.add(number)

    def end(self):   # from now on a signal ends the program at once
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def after_step(self, indices=(), reasons=()):
        """This process could not read the images `indices` (-1: none) in a step, for `reasons` -> the signal
        that any process has got, or None. An image counts once. Raises UserError when more than 1 % are
        unreadable."""
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:   # torchrun is gone
            self.caught.add(signal.SIGTERM)
        new = {i: reason for i, reason in zip(indices, reasons) if i >= 0 and i not in self.unreadable}
        for i, reason in new.items():
            warn(f"skipped {name_of(self.images, i)}: {reason}")
        counts = torch.tensor([len(new), signal.SIGTERM in self.caught, signal.SIGINT in self.caught])
        any_new, terminated, interrupted = sum_over_processes(counts).tolist()   # on the CPU; no GPU waits
        if any_new:
            met = torch.zeros(len(self.images), dtype=torch.int32)
            met[list(new)] = 1
            self.unreadable |= set(sum_over_processes(met).nonzero().flatten().tolist())
            refuse_unreadable(len(self.unreadable), len(self.images))
        return signal.SIGTERM if terminated else signal.SIGINT if interrupted else None

def refuse_unreadable(n, total):
    if n > 0.01 * total:
        raise UserError(f"--data: {n} of {total} images cannot be read, more than 1 %: mend or remove those "
                        f"named above", code=1)

# ----------------------------------------------------------------------------------------------- data: images
TRAIN, SPLIT = (dict(train=True), dict(train=False)), (dict(split="train"), dict(split="test"))
TORCHVISION = {   # --data -> class of torchvision.datasets, and its arguments for training and for validation
    "mnist": ("MNIST", TRAIN), "fashion_mnist": ("FashionMNIST", TRAIN), "cifar10": ("CIFAR10", TRAIN),
    "cifar100": ("CIFAR100", TRAIN), "svhn": ("SVHN", SPLIT), "dtd": ("DTD", SPLIT),
    "food101": ("Food101", SPLIT), "flowers102": ("Flowers102", SPLIT),
    "imagenette": ("Imagenette", (dict(split="train"), dict(split="val"))),
    "stl10": ("STL10", (dict(split="train+unlabeled"), dict(split="test")))}

UNREADABLE = (OSError, Image.DecompressionBombError)   # other errors are a data set's own
NO_IMAGE = -2   # label of an unreadable image; -1 is that of an image without label

def to_rgb(image):
    """PIL image of any mode, or a uint8 tensor -> (3, H, W) uint8. What is transparent is laid on white."""
    if isinstance(image, torch.Tensor):
        return image.expand(3, -1, -1)
    if image.mode == "F" or image.mode.startswith("I"):   # PIL's convert would clip floats and 16 bits at 255
        values = TF.pil_to_tensor(image).double()
        if image.mode != "F":   # 16 bits
            values = values // 257
        elif values.max() <= 1:   # floats from 0 to 1
            values = values * 255
        return values.clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return TF.pil_to_tensor(image.convert("RGB"))

def read_image(path):
    """Image file -> (3, H, W) uint8. torchvision decodes JPEG, being faster, PIL the rest. Raises OSError."""
    try:
        if decode_jpeg:
            return decode_jpeg(read_file(path), ImageReadMode.RGB)
    except RuntimeError:   # no JPEG, or damaged: PIL decides
        pass
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:   # PIL raises many kinds
        raise OSError(f"not a readable image ({error})") from error

def get_data(cfg):
    """-> train, val: data sets of (image, label). val is None where there is none. Raises UserError."""
    if cfg.data == "toy":
        return TensorDataset(*draw_toy(4096, "train")), TensorDataset(*draw_toy(1024, "val"))
    if os.path.isdir(cfg.data):
        train, val = os.path.join(cfg.data, "train"), os.path.join(cfg.data, "val")
        if not os.path.isdir(train):
            train = cfg.data
            if os.path.isdir(val):
                raise UserError(f"--data {cfg.data}: has val/ but no train/: rename the training folder")
        if decode_jpeg is None:
            say("this torchvision decodes no JPEGs, so PIL does, 1 ms an image slower: try more --workers")
        try:
            images = torchvision.datasets.ImageFolder(train, loader=read_image)
            if not os.path.isdir(val):
                return images, None
            return images, torchvision.datasets.ImageFolder(val, loader=read_image)
        except OSError as error:
            raise UserError(f"--data {cfg.data}: {error}. Each class is a folder of images; images without "
                            f"classes go into one, {train}/all") from error
    if cfg.data not in TORCHVISION:
        raise UserError(f"--data {cfg.data}: no such folder. Give a folder with train/ and val/ or with "
                        f"class folders, or one of toy, {', '.join(TORCHVISION)}; --demo needs no data")
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0   # one process of a machine downloads, the others wait
    if dist.is_initialized() and not first:
        dist.barrier()
    name, parts = TORCHVISION[cfg.data]
    try:
        return [getattr(torchvision.datasets, name)(cfg.data_root, download=first, **part) for part in parts]
    except Exception as error:   # a download or an archive fails in many ways
        raise UserError(f"--data {cfg.data}: not in --data_root {cfg.data_root}, and could not be downloaded "
                        f"({type(error).__name__}: {error})") from error
    finally:
        if dist.is_initialized() and first:
            dist.barrier()

def name_of(images, index):
    """The file of an image, or its number where there is no file."""
    if isinstance(images, Subset):
        return name_of(images.dataset, images.indices[index])
    return images.samples[index][0] if hasattr(images, "samples") else f"image {index}"

# ------------------------------------------------------------------------------------------ data: views (A.1)
class MultiCrop(Dataset):
    """(epoch, index) -> uint8 crops (2, S, S, 3) and (L, s, s, 3), channels last as torch's resize leaves
    them. For an unreadable image comes the next; its index and the reason come last, else -1 and ""."""
    def __init__(self, images, cfg):
        self.images, self.cfg = images, cfg

    def __getitem__(self, key):
        (epoch, index), cfg, bad, reason = key, self.cfg, -1, ""
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        for i in range(index, index + 100):
            try:
                image = to_rgb(self.images[i % len(self.images)][0])
                break
            except UNREADABLE as error:
                if i == index:   # the training loop names and counts the image that was asked for
                    bad, reason = index, str(error)
        with torch.random.fork_rng(devices=[]):   # torchvision draws crops from the global generator
            torch.default_generator.manual_seed(seed_of(cfg.seed, epoch, index))
            views = [self.crop(image, cfg.global_size, cfg.global_scale) for _ in range(2)]
            views += [self.crop(image, cfg.local_size, cfg.local_scale) for _ in range(cfg.local_crops)]
        global_views = torch.stack(views[:2]).movedim(1, -1)
        local_views = torch.stack(views[2:]).movedim(1, -1) if cfg.local_crops else torch.empty(0)
        return global_views, local_views, bad, reason

    @staticmethod
    def crop(image, size, scale):
        """(3, H, W) uint8 -> a random part of it (3, size, size), as torchvision's RandomResizedCrop."""
        top, left, height, width = RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        part = image[None, :, top:top + height, left:left + width]
        part = part.contiguous(memory_format=torch.channels_last)   # which makes the resize faster
        return F.interpolate(part, [size, size], mode="bicubic", antialias=True)[0]

def batches(n, cfg, start=0, rank=0, world=1):
    """Yields this process's keys (epoch, index) of each batch, from step `start` to the end. An epoch has its
    own order of the n images, the processes' shares do not overlap, an incomplete last batch is left out."""
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
    gpu = device.type == "cuda"
    return DataLoader(dataset, num_workers=workers, pin_memory=gpu, worker_init_fn=quiet_worker, **options)

# The photometric operations take a batch x (n, 3, H, W) in [0, 1] and a factor f (n, 1, 1, 1) for each image.
# They do what torchvision's functions of these names do to one image.
def luma(x):
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]

def adjust_brightness(x, f):
    return (f * x).clamp(0, 1)

def adjust_contrast(x, f):
    return torch.lerp(luma(x).mean((1, 2, 3), keepdim=True), x, f).clamp(0, 1)

def adjust_saturation(x, f):
    return torch.lerp(luma(x), x, f).clamp(0, 1)

def adjust_hue(x, f):
    """Turn the hue by f of a full circle. With value v, chroma c and hue h in sixths of the circle, the
    channels are v - c clamp(min(k, 4 - k), 0, 1), where k = (h + 5, h + 3, h + 1) mod 6."""
    r, g, b = x.split(1, 1)
    v = x.amax(1, keepdim=True)
    c = v - x.amin(1, keepdim=True)
    d = c.clamp_min(1e-8)   # gray has c = 0 and any hue
    h = torch.where(v == r, (g - b) / d, torch.where(v == g, (b - r) / d + 2, (r - g) / d + 4))
    k = (h + 6 * f + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6
    return v - c * torch.minimum(k, 4 - k).clamp(0, 1)

def to_grayscale(x):
    return luma(x).expand(-1, 3, -1, -1)

def gaussian_blur(x, sigma, radius=6):
    """Blur by sigma pixels, mirrored at the edges, as two matrix products: row i of an image's matrix G holds
    the weights of the 2 * radius + 1 pixels around pixel i."""
    size = x.shape[-1]
    radius = min(radius, size - 1)
    offset = torch.arange(-radius, radius + 1, device=x.device)
    weight = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-3)) ** 2)
    weight = weight / weight.sum(-1, keepdim=True)
    pixel = (torch.arange(size, device=x.device)[:, None] + offset).abs()
    pixel = torch.where(pixel < size, pixel, 2 * (size - 1) - pixel)
    G = x.new_zeros(len(x), 1, size, size)
    G.scatter_add_(3, pixel.expand(len(x), 1, -1, -1), weight.expand(-1, 1, size, -1))
    return G @ x @ G.mT

def solarize(x):
    return torch.where(x < 128 / 255, x, 1 - x)

def draw_photometric(cfg, step, rank=0, world=1):
    """What happens to each view in a step: a dict of CPU tensors (VB, ...), view by view. It is drawn for the
    batch of all processes, of which each takes its rows, so two processes see what one would."""
    V, B, g = 2 + cfg.local_crops, cfg.batch_size, generator(cfg.seed, "photometric", step)

    def rand(*more):
        return torch.rand(*more, V, B, generator=g)
    p = dict(flip=rand() < 0.5, jitter=rand() < 0.8, order=rand(4).argsort(0).movedim(0, -1))
    factor = (2 * rand(4).movedim(0, -1) - 1) * torch.tensor(cfg.jitter)
    factor[..., :3] = (1 + factor[..., :3]).clamp_min(0)   # all but the hue, whose factor is an angle
    view = torch.arange(V)[:, None]
    blur_rate = torch.tensor([1.0, 0.1, 0.5])[view.clamp_max(2)]   # of global view 0, 1, local ones [DINO]
    p |= dict(factor=factor, grayscale=rand() < cfg.grayscale, blur=(rand() < blur_rate) & (cfg.blur[1] > 0),
              sigma=cfg.blur[0] + (cfg.blur[1] - cfg.blur[0]) * rand(),
              solarize=(rand() < cfg.solarize) & (view == 1))
    rows = slice(rank * B // world, (rank + 1) * B // world)
    return {name: value[:, rows].flatten(0, 1) for name, value in p.items()}

def apply_to(x, operation, mask, *factors):
    """Change the images of x that a CPU mask (n,) names. The CPU knows which, so no GPU is waited for."""
    if mask.any():
        rows = mask.nonzero().flatten().to(x.device, non_blocking=True)
        factors = [f[mask].to(x.device, non_blocking=True).view(-1, 1, 1, 1) for f in factors]
        x[rows] = operation(x[rows], *factors)

def photometric(x, p):
    """uint8 crops (n, 3, S, S) on the device -> [0, 1], each changed as its row of draw_photometric says."""
    x = x.float() / 255
    apply_to(x, TF.horizontal_flip, p["flip"])
    # Each image has its own order of the four, as in torchvision's ColorJitter.
    for place in range(4):
        for i, adjust in enumerate((adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)):
            apply_to(x, adjust, p["jitter"] & (p["order"][:, place] == i), p["factor"][:, i])
    # Grayscale, blur and solarization follow in DINO's order, because they do not commute.
    apply_to(x, to_grayscale, p["grayscale"])
    apply_to(x, gaussian_blur, p["blur"], p["sigma"])
    apply_to(x, solarize, p["solarize"])
    return x

MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # of ImageNet's channels

@functools.cache
def mean_and_std(device):
    return torch.tensor(MEAN_STD, device=device).view(2, 3, 1, 1)

def normalize(x):
    mean, std = mean_and_std(x.device)
    return (x - mean) / std

def make_views(crops, cfg, device, step, rank=0, world=1):
    """A batch of the loader -> views as the networks get them, by resolution: [(2B, 3, S, S), (LB, 3, s, s)],
    view by view (the first B rows are global view 0)."""
    p, views, done = draw_photometric(cfg, step, rank, world), [], 0
    for x in crops[:2]:
        if x.shape[1]:   # (B, 2 or L, S, S, 3); L may be 0
            x = x.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1).movedim(-1, 1)
            own = {name: value[done:done + len(x)] for name, value in p.items()}
            views.append(normalize(photometric(x, own)).contiguous(memory_format=torch.channels_last))
            done += len(x)
    return views

# -------------------------------------------------------------------------------------------- backbones (3.1)
TIMM_NAMES = {"vit_tiny": "vit_tiny_patch16_224", "vit_small": "vit_small_patch16_224",
              "vit_base": "vit_base_patch16_224", "mobilenetv3_large": "mobilenetv3_large_100"}

class Backbone(nn.Module):
    """A timm model: images (B, 3, S, S) -> pooled (B, C), tokens (B, N, C). Tokens are a CNN's last map or a
    ViT's patches; pooled is their mean, or a ViT's CLS token."""
    def __init__(self, model, pool):
        super().__init__()
        self.model, self.prefix = model, getattr(model, "num_prefix_tokens", 0)
        self.cls = pool == "cls" and getattr(model, "cls_token", None) is not None

    def forward(self, x):
        y = self.model.forward_features(x)
        if y.dim() == 4:   # a map, with channels last in some models
            nhwc = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            tokens = y.flatten(1, 2) if nhwc else y.flatten(2).mT
        else:
            tokens = y[:, self.prefix:]
        pooled = y[:, 0] if self.cls else tokens.mean(1)
        return pooled, tokens

def no_drop_path(net):
    for m in net.modules():
        if isinstance(m, timm.layers.DropPath):
            m.drop_prob = 0.0

def create_model(name, kwargs, drop_path, flag):
    """timm.create_model, with the options for views of several sizes that a model knows. Raises UserError."""
    timm_name = TIMM_NAMES.get(name, name)
    if not timm.is_model(timm_name):
        close = difflib.get_close_matches(name.lower().replace("-", "_"), [*TIMM_NAMES, *timm.list_models()])
        raise UserError(f"{flag} {name}: timm {timm.__version__} has no such model; did you mean one of "
                        f"{close}? timm.list_models() lists those it has")
    first_weights = {}
    if name in ("resnet18", "resnet34", "resnet50", "resnet101"):
        first_weights["zero_init_last"] = False   # as torchvision's, and the released code's
    attempts = [dict(dynamic_img_size=True, strict_img_size=False), dict(dynamic_img_size=True), {}]
    for options in [a | dict(drop_path_rate=drop_path) for a in attempts] + attempts:
        try:
            return timm.create_model(timm_name, num_classes=0, **options | first_weights | kwargs)
        except Exception as e:   # so a model says that it does not know an option
            error = e
    raise UserError(f"{flag} {name}: timm cannot build it with {kwargs}: {error}")

def build_backbone(name, model_kwargs=None, patch_size=16, pool="mean", sizes=(224, 96), drop_path=0.0,
                   flag="--arch"):
    """A timm model, by the paper's short name or its own, that takes views of all sizes -> Backbone with
    timm_name, timm_kwargs, family ("cnn": batch norm, or "vit"), dim C, num_tokens N. Raises UserError."""
    # Create it. A net with batch norm counts as a CNN, and stochastic depth is for ViTs alone.
    kwargs = dict(model_kwargs or {})
    if name in TIMM_NAMES and name.startswith("vit_") and patch_size != 16:
        kwargs.setdefault("patch_size", patch_size)
    model = create_model(name, kwargs, drop_path, flag)
    backbone = Backbone(model, pool).eval()
    backbone.timm_name, backbone.timm_kwargs, backbone.family = TIMM_NAMES.get(name, name), kwargs, "vit"
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        backbone.family = "cnn"
        no_drop_path(model)

    # Try every view size now, because a model that cannot take one would fail in the first step.
    for size in [*sizes[1:], sizes[0]]:   # the global size last, because what it gives is used below
        try:
            pooled, tokens = backbone(torch.rand(2, 3, size, size))
        except Exception as error:
            raise UserError(f"{flag} {name}: cannot take views of {size} pixels ({error}); choose other "
                            f"--global_size and --local_size, or another model") from error
        if tokens.dim() != 3 or math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1]:
            raise UserError(f"{flag} {name}: its features {tuple(tokens.shape)} are no square map to search; "
                            f"choose another model")
    backbone.num_tokens, backbone.dim = tokens.shape[1:]

    # Freeze what only a classifier would use, because it gets no gradient, and DDP must know.
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(pooled.sum() + tokens.sum(), parameters, allow_unused=True)
    for p, gradient in zip(parameters, gradients):
        p.requires_grad_(gradient is not None)
    return backbone.train()

PREFIXES = ("module.", "backbone.", "module.backbone.",                                # DINO, released code
            "module.momentum_encoder.", "module.base_encoder.", "module.encoder_q.",   # MoCo
            "")                                                                        # timm, torchvision

def load_backbone(backbone, file, flag):
    """Fill a backbone from a file whose names are timm's, but for a prefix, as in model1.pth and in the files
    of timm, DINO, MoCo, the released code, and torchvision's ResNets. Raises UserError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):   # DINO's files hold their flags
            theirs = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:   # of a class that is not loaded, torch speaks in ten lines
        reason = re.search(r"Unsupported \w+: GLOBAL (\S+)", str(error))
        reason = f"it holds a {reason[1]}, which is not loaded" if reason else type(error).__name__
        raise UserError(f"{flag} {file}: no readable state dict ({reason})") from error
    for key in (f"teacher_{backbone.family}", "teacher", "state_dict", "model"):
        if isinstance(theirs, dict) and isinstance(theirs.get(key), dict):
            theirs = theirs[key]
    if not isinstance(theirs, dict) or "config" in theirs:
        raise UserError(f"{flag} {file}: not weights; give a state dict, such as model1.pth of a run")
    theirs = {name: w for name, w in theirs.items() if isinstance(w, torch.Tensor)}
    own = backbone.model.state_dict()
    used = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    for prefix in PREFIXES:   # the last, the empty one, stays if no other fits
        state = {name.removeprefix(prefix): w for name, w in theirs.items() if name.startswith(prefix)}
        if state and used <= state.keys():
            break
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    wrong += sorted(used - state.keys())
    if wrong:
        there = tuple(state[wrong[0]].shape) if wrong[0] in state else "missing"
        raise UserError(f"{flag} {file}: does not fit {backbone.timm_name} in {len(wrong)} tensors, first "
                        f"{wrong[0]}: {there} there, {tuple(own[wrong[0]].shape)} here. Is it of another "
                        f"architecture, of other --model_kwargs, or under other names than timm's?")
    backbone.model.load_state_dict({name: w for name, w in state.items() if name in own}, strict=False)

# --------------------------------------------------------------------------- heads (3.4) and the search (3.3)
def last_layer(in_dim, out_dim, learn_gain=True):
    """Weight-normalized linear layer: gain * direction / |direction| for each logit; the first gain is 1."""
    layer = weight_norm(nn.Linear(in_dim, out_dim, bias=False))
    gain = layer.parametrizations.weight.original0
    nn.init.ones_(gain).requires_grad_(learn_gain)
    return layer

def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)

class MLPHead(nn.Module):
    """Pooled representation (B, C) -> logits (B, K), by four linear layers (3.4), with DINO's widths and its
    L2 normalization before the last: C -> 2048 -> 2048 -> 256 -> K."""
    def __init__(self, in_dim, out_dim, hidden_dim=2048, bottleneck_dim=256, learn_gain=True):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim),
                                 nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim)).apply(init_linear)
        self.last = last_layer(bottleneck_dim, out_dim, learn_gain)

    def forward(self, x):
        return self.last(F.normalize(self.mlp(x), dim=-1))

def resize_positions(pos, side, release=False):
    """Position embedding (1, n * n, C) -> (1, side * side, C), bicubic; the released code scales by (side +
    0.1) / n."""
    n = math.isqrt(pos.shape[1])
    if n == side or not release:
        return resample_abs_pos_embed(pos, [side, side], num_prefix_tokens=0, antialias=False)
    grid = pos.unflatten(1, (n, n)).permute(0, 3, 1, 2)
    return F.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic").flatten(2).mT

class THead(nn.Module):
    """Local features -> logits, by ViT blocks (3.4). With a query it is the feature search of Fig. 3: the
    query stands among the tokens, attention draws out those that resemble it, and it leaves before their mean
    is taken.

    embed is the 1x1 convolution from a backbone's C channels to dim; there is none where C = dim. num_tokens
    is N of a global view. With l2_normalize the last layer reads a mean token of length 1. With release
    positions are resized as in the released code.
    """
    def __init__(self, in_dim, out_dim, dim=384, depth=3, num_heads=6, num_tokens=49, l2_normalize=False,
                 release=False):
        super().__init__()
        layer_norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(in_dim, dim) if in_dim != dim else nn.Identity()
        self.pos = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_tokens, dim), std=0.02))
        self.blocks = nn.Sequential(*[Block(dim, num_heads, qkv_bias=True, norm_layer=layer_norm)
                                      for _ in range(depth)]).apply(init_linear)
        self.norm, self.l2_normalize, self.release = layer_norm(dim), l2_normalize, release
        self.last = last_layer(dim, out_dim)

    def query_of(self, Z):
        """Tokens (B, N, C), or their pooled feature (B, C) -> query (B, dim)."""
        return self.embed(Z.mean(1) if Z.dim() == 3 else Z)

    def forward(self, Z, query=None):
        """Tokens (B, N, C) -> logits (B, K). With n queries for each image, (nB, dim), where rows 0 to B - 1
        are query 0 of all images -> (nB, K), in the same order."""
        x = self.embed(Z) + resize_positions(self.pos, math.isqrt(Z.shape[1]), self.release)
        if query is not None:   # it has no position
            x = torch.cat([query[:, None], x.repeat(len(query) // len(x), 1, 1)], 1)
        x = self.norm(self.blocks(x))
        x = x.mean(1) if query is None else x[:, 1:].mean(1)
        return self.last(F.normalize(x, dim=-1) if self.l2_normalize else x)

# Z of Algorithm 1: pooled (VB, C), and tokens by resolution [(2B, N, C), (LB, n, C)]
Representation = namedtuple("Representation", "pooled tokens")

class Net(nn.Module):
    """[m, t, Z] = n(x) of Algorithm 1: a backbone and its two heads. Without st and ct there is no T-Head."""
    def __init__(self, backbone, cfg):
        super().__init__()
        self.backbone, learn_gain = backbone, backbone.family == "vit"   # as released
        self.mlp_head = MLPHead(backbone.dim, cfg.out_dim, cfg.hidden_dim, cfg.bottleneck_dim, learn_gain)
        self.t_head = None
        if loss_names(cfg) & {"st", "ct"}:
            self.t_head = THead(backbone.dim, cfg.out_dim, cfg.t_dim, cfg.t_depth, cfg.t_heads,
                                backbone.num_tokens, cfg.t_norm, cfg.recipe == "release")

    def forward(self, x):
        """Views by resolution, a pass each -> m (V, B, K), t (V, B, K) or None, Representation."""
        outputs, B = [self.backbone(views) for views in x], len(x[0]) // 2
        Z = Representation(torch.cat([pooled for pooled, _ in outputs]), [tokens for _, tokens in outputs])
        m, t = self.mlp_head(Z.pooled).unflatten(0, (-1, B)), None
        if self.t_head is not None:
            t = torch.cat([self.t_head(tokens) for tokens in Z.tokens]).unflatten(0, (-1, B))
        return m, t, Z

def search_pairs(V, which):
    """Which views search: (g, v) for student view v that searches the other momentum net's view g."""
    if which == "global":   # Algorithm 1's own two pairs
        return [(0, 1), (1, 0)]
    if which == "local":    # the released code's
        return [(0, v) for v in range(2, V)]
    return [(g, v) for g in range(2) for v in range(V) if v != g]   # ours: any two that differ, as a and b do

def search(t_, query, tokens_, pairs):
    """t_s = t_(Z, Z_) of Algorithm 1, the cross-attention feature search (3.3, Fig. 3): the T-Head t_ of a
    momentum net reads its tokens_ (2B, N, C) of the global views with queries (VB, dim) of the other student
    -> (pairs, B, K), in the order of sorted pairs."""
    B, found = len(tokens_) // 2, []
    queries = query.split(B)   # one for each view
    for g in range(2):
        searching = [queries[v] for searched, v in pairs if searched == g]
        if searching:   # eq. (6): each query and its own copy of the tokens go through the blocks together
            found.append(t_(tokens_[g * B:(g + 1) * B], torch.cat(searching)))
    return torch.cat(found).unflatten(0, (-1, B))

# ------------------------------------------------------------------------------------------ losses (3.2, 3.3)
def target(t, center=0.0, teacher_temp=0.07):
    """Momentum logits -> what a student learns, without gradient: eq. (1) with tau', after DINO's centering
    (A.1)."""
    return ((t.detach().float() - center) / teacher_temp).softmax(-1)

def cross_entropy(p, s, student_temp=0.1):
    """-sum p log softmax(x) with x = s / tau, mean over the batch; p and s are (B, K). As log softmax(x) is
    x - logsumexp(x), this is sum(p) logsumexp(x) - sum(p x). Where p adds up n targets, sum(p) is n."""
    x = s.float() / student_temp
    return (p.sum(-1) * x.logsumexp(-1) - (p * x).sum(-1)).mean()

def H(t, s, center=0.0, teacher_temp=0.07, student_temp=0.1, pairs=None):
    """H(t, s) of Algorithm 1 for momentum logits t (G, B, K) and a student's s (V, B, K), averaged over pairs
    of views: sum(H(t[g], s[v]) for g, v in pairs) / len(pairs). By default all different views."""
    pairs = pairs or [(g, v) for g in range(len(t)) for v in range(len(s)) if v != g]
    return MultiCropH.apply(t, s, center, teacher_temp, student_temp, pairs)

multi_crop_H = H   # forks know it by this name too

class MultiCropH(torch.autograd.Function):
    """H in little memory: autograd would keep float targets and logits of all views; here backward makes them
    again, view by view. The targets of a view are added up first, which saves passes over its logits."""
    @staticmethod
    def views_and_targets(t, s, center, teacher_temp, pairs):
        """Yields v, p: a view v of s that has partners in t, and p (B, K), the sum of its partners' targets.
        Views with the same partners come in a row, so p is made once for them."""
        learners = {}   # partners, as (0,), (1,) or (0, 1) -> the views that learn from just these
        for v in range(len(s)):
            partners = tuple(g for g, view in pairs if view == v)
            if partners:
                learners.setdefault(partners, []).append(v)
        for partners, views in sorted(learners.items()):
            p = sum(target(t[g], center, teacher_temp) for g in partners)
            for v in views:
                yield v, p

    @staticmethod
    def forward(ctx, t, s, center, teacher_temp, student_temp, pairs):
        ctx.save_for_backward(t, s)
        ctx.others = center, teacher_temp, student_temp, pairs
        views = MultiCropH.views_and_targets(t, s, center, teacher_temp, pairs)
        return sum(cross_entropy(p, s[v], student_temp) for v, p in views) / len(pairs)

    @staticmethod
    def backward(ctx, grad_loss):
        (t, s), (center, teacher_temp, student_temp, pairs) = ctx.saved_tensors, ctx.others
        grad, scale = torch.zeros_like(s), grad_loss / (len(pairs) * s.shape[1] * student_temp)
        for v, p in MultiCropH.views_and_targets(t, s, center, teacher_temp, pairs):
            q = (s[v].float() / student_temp).softmax(-1)
            grad[v] = (q * p.sum(-1, keepdim=True) - p) * scale
        return None, grad, None, None, None, None

# -------------------------------------------------------------------------------------------- schedules (A.1)
def cosine_schedule(step, steps, start, end, warmup=0, rise=None):
    """For `warmup` steps a straight line from 0, which reaches start after `rise` steps (by default
    `warmup`); then half a cosine from start to end, which it reaches at `steps`."""
    if step < warmup:
        return start * step / (rise or warmup)
    return end + (start - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

def teacher_temperature(epoch, start, end, epochs):
    """tau': start in the first epoch, end in the last of `epochs` and after, in equal steps between."""
    return end if epoch >= epochs - 1 else start + (end - start) * epoch / (epochs - 1)

# What the schedules say at a step. l is the momentum of the momentum nets, temp is tau', temp_cnn is tau' of
# a CNN's self-distillation. lr and wd hold learning rates and weight decays under "cnn" and "vit".
Now = namedtuple("Now", "step epoch l temp temp_cnn lr wd")

def schedule(cfg, step, per_epoch):
    epoch, steps, warmup = step // per_epoch, cfg.epochs * per_epoch, cfg.warmup_epochs * per_epoch
    rise = warmup - 1 if cfg.recipe == "release" else warmup   # the released code peaks one step earlier
    scale = cfg.batch_size / 256   # learning rates are given for 256 images (DINO)
    wd_end = cfg.vit_wd if cfg.wd_end is None else cfg.wd_end
    epochs, epochs_cnn = cfg.teacher_temp_epochs, cfg.teacher_temp_epochs_cnn
    return Now(
        step, epoch, l=cosine_schedule(step, steps, cfg.ema, 1.0),
        temp=teacher_temperature(epoch, cfg.teacher_temp_start, cfg.teacher_temp, epochs),
        temp_cnn=teacher_temperature(epoch, cfg.teacher_temp_start, cfg.teacher_temp,
                                     epochs if epochs_cnn is None else epochs_cnn),
        lr=dict(cnn=cosine_schedule(step, steps, cfg.cnn_lr * scale, cfg.cnn_lr_end, warmup, rise),
                vit=cosine_schedule(step, steps, cfg.vit_lr * scale, cfg.vit_lr_end, warmup, rise)),
        wd=dict(cnn=cfg.cnn_wd, vit=cosine_schedule(step, steps, cfg.vit_wd, wd_end)))

# ------------------------------------------------------------------- the two models: what each has of its own
def clip_per_tensor(grads, limit):
    """Scale each gradient longer than `limit` to that norm, in place, without reading a norm on the host."""
    norms = torch._foreach_norm(grads)
    torch._foreach_mul_(grads, [(limit / (norm + 1e-6)).clamp_max(1) for norm in norms])

class Model:
    """A student n with its optimizers, its momentum net n_, and the centers C_m and C_t of n_'s two heads."""
    def __init__(self, cfg, i, backbone, device, world=1):
        self.cfg, self.i, self.family = cfg, i, backbone.family

        # The student, and its copy: n_.params = n.params, the first line of Algorithm 1. Stochastic depth is
        # for the student alone.
        torch.manual_seed(seed_of(cfg.seed, "heads", i))
        self.net = Net(backbone, cfg)
        self.momentum_net = copy.deepcopy(self.net).requires_grad_(False)
        no_drop_path(self.momentum_net)
        if cfg.grad_checkpointing:   # it updates student batch norms' statistics twice; no step reads those
            backbone.model.set_grad_checkpointing()

        # Both move to the device before there are optimizers, because these keep the tensors they are given.
        for net in (self.net, self.momentum_net):
            net.to(device, memory_format=memory_format(device))
            if world > 1 and device.type == "cuda":   # torch has no batch norm over processes on the CPU
                timm.layers.convert_sync_batchnorm(net)
            if cfg.compile:
                net.compile(dynamic=False)
        self.n_, self.t, self.t_ = self.momentum_net, self.net.t_head, self.momentum_net.t_head

        # The centers are buffers of the momentum net, so they are saved with it.
        for name in ("C_m", "C_t"):
            self.momentum_net.register_buffer(name, torch.zeros(1, cfg.out_dim, device=device))
        self.C_m, self.C_t = self.momentum_net.C_m, self.momentum_net.C_t

        # What the step goes over, and the student as all processes train it.
        self.params, self.params_ = list(self.net.parameters()), list(self.momentum_net.parameters())
        self.last_layers = [p for name, p in self.net.named_parameters() if ".last." in name]
        self.optimizers, self.distributed = self.make_optimizers(device), self.net
        if world > 1:
            ddp, gpus = nn.parallel.DistributedDataParallel, [device] if device.type == "cuda" else None
            self.distributed = ddp(self.net, gpus, gradient_as_bucket_view=True)

    def make_optimizers(self, device):
        """One optimizer (3.4), or two where a CNN's T-Head has another kind, for all that is in the net."""
        cfg, kinds = self.cfg, dict(sgd={}, adamw={})   # optimizer -> {(family, decays): group}
        for name, p in self.net.named_parameters():
            cnn_t_head = self.family == "cnn" and name.startswith("t_head.")
            family = "vit" if cnn_t_head else self.family   # whose learning rate and weight decay it has
            kind = cfg.t_optimizer if cnn_t_head else getattr(cfg, f"{family}_optimizer")
            decays = p.dim() > 1 or (cnn_t_head and cfg.recipe == "release")
            if p.requires_grad:
                group = dict(params=[], family=family, decays=decays)
                kinds[kind].setdefault((family, decays), group)["params"].append(p)
        optimizers = []
        for kind, by_key in kinds.items():
            groups = list(by_key.values())
            if groups and kind == "sgd":
                optimizers.append(torch.optim.SGD(groups, lr=0.0, momentum=0.9, foreach=True))
            elif groups:
                optimizers.append(torch.optim.AdamW(groups, lr=0.0, fused=device.type in ("cuda", "cpu")))
        return optimizers

    def n(self, x, now):
        """[m, t, Z] = n(x). Stochastic depth is drawn from (seed, step), whatever the other model draws."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(seed_of(self.cfg.seed, "stochastic depth", self.i, now.step, rank))
        return self.distributed(x)

    def temp(self, now):   # tau' of self-distillation
        return now.temp_cnn if self.family == "cnn" else now.temp

    def update(self, now, scaler):
        """From gradients to new parameters of the student."""
        # The last layers stand still in the first epochs, which helps training to start [DINO].
        if now.epoch < self.cfg.freeze_last_layer:
            for p in self.last_layers:
                p.grad = None
        # Gradients get back their size, which fp16 had raised, and groups this step's rate and decay.
        for optimizer in self.optimizers:
            scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = now.lr[group["family"]]
                group["weight_decay"] = now.wd[group["family"]] if group["decays"] else 0.0
        # Each gradient is clipped by itself, so no tensor slows another down.
        if self.cfg.clip_grad:
            clip_per_tensor([p.grad for p in self.params if p.grad is not None], self.cfg.clip_grad)
        for optimizer in self.optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_momentum_net(self, l):
        """n_.params = l * n_.params + (1 - l) * n.params. Batch-norm statistics are n_'s own."""
        torch._foreach_lerp_(self.params_, self.params, 1 - l)   # n_ + (1 - l) (n - n_), which is the same

    @torch.no_grad()
    def update_centers(self, m_, t_):
        """C = c C + (1 - c) mean of the momentum logits over global views, batch and processes."""
        logits = [m_] if t_ is None else [m_, t_]
        means = mean_over_processes(torch.stack([x.float().mean((0, 1)) for x in logits]))
        for C, mean in zip((self.C_m, self.C_t), means):
            C.lerp_(mean, 1 - self.cfg.center_momentum)

    def state(self):
        return dict(net=self.net.state_dict(), momentum_net=self.momentum_net.state_dict(),
                    optimizers=[optimizer.state_dict() for optimizer in self.optimizers])

    def load_state(self, state):
        """Take up what state() gave; to be called within `fitting`."""
        self.net.load_state_dict(state["net"])
        self.momentum_net.load_state_dict(state["momentum_net"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)

# ------------------------------------------------------------------------------------------------ Algorithm 1
def train_step(model1, model2, x, cfg, now, scaler=None):
    """One step of Algorithm 1 on the views x of make_views -> the losses by name, and the momentum logits.

    n1 and n2 are the students, n1_ and n2_ the momentum nets. Where the algorithm has two views a and b, x
    holds V = 2 + L, and H averages over the pairs of different ones. A loss that --losses leaves out is zero.
    """
    n1, n1_, C_m1, C_t1, temp1 = model1.n, model1.n_, model1.C_m, model1.C_t, model1.temp(now)
    n2, n2_, C_m2, C_t2, temp2 = model2.n, model2.n_, model2.C_m, model2.C_t, model2.temp(now)
    C_s1, C_s2 = (C_t1, C_t2) if cfg.search_center else (0.0, 0.0)
    lambda1, lambda2, l, losses = cfg.lambda1, cfg.lambda2, now.l, loss_names(cfg)
    tau, temp, scaler = cfg.student_temp, now.temp, scaler or torch.amp.GradScaler(enabled=False)
    pairs = sorted(search_pairs(2 + cfg.local_crops, cfg.search))   # by g, the order in which search answers
    rows = [(row, v) for row, (_, v) in enumerate(pairs)]   # t1_s[row] and t2_s[row] teach view v
    zero = torch.zeros((), device=x[0].device)

    with autocast(x[0].device, cfg.dtype):
        # The students see all views, the momentum nets the two global ones, which are x[0].
        m1, t1, Z1 = n1(x, now)   # m1, t1: (V, B, K)
        m2, t2, Z2 = n2(x, now)
        with torch.no_grad():
            m1_, t1_, Z1_ = n1_(x[:1])   # m1_, t1_: (2, B, K)
            m2_, t2_, Z2_ = n2_(x[:1])

            # Cross-attention feature search (3.3). Algorithm 1 writes t1_(Z2, Z1_) and t2_(Z1, Z2_); its
            # T-Head t1_ is model1.t_ here, because t1_ holds logits. A query carries no gradient.
            if "ct" in losses:
                t1_s = search(model1.t_, model2.t.query_of(Z2.pooled), Z1_.tokens[0], pairs)
                t2_s = search(model2.t_, model1.t.query_of(Z1.pooled), Z2_.tokens[0], pairs)

    # Self-distillation (3.2) through the MLP-Heads, eq. (2), and through the T-Heads, eq. (3)
    loss_sm1 = H(m1_, m1, C_m1, temp1, tau)
    loss_sm2 = H(m2_, m2, C_m2, temp2, tau)
    loss_st1 = H(t1_, t1, C_t1, temp1, tau) if "st" in losses else zero
    loss_st2 = H(t2_, t2, C_t2, temp2, tau) if "st" in losses else zero

    # Cross-distillation (3.3) through the MLP-Heads, eq. (5), and the search, eq. (7), once called loss_it
    loss_cm1 = H(m2_, m1, C_m2, temp, tau) if "cm" in losses else zero
    loss_cm2 = H(m1_, m2, C_m1, temp, tau) if "cm" in losses else zero
    loss_ct1 = H(t2_s, t1, C_s2, temp, tau, rows) if "ct" in losses else zero
    loss_ct2 = H(t1_s, t2, C_s1, temp, tau, rows) if "ct" in losses else zero

    # eq. (9): the sum of self-distillation, eq. (4), and lambda times the sum of cross-distillation, eq. (8)
    loss1 = (loss_sm1 + loss_st1) + lambda1 * (loss_cm1 + loss_ct1)
    loss2 = (loss_sm2 + loss_st2) + lambda2 * (loss_cm2 + loss_ct2)

    scaler.scale(loss1).backward()
    scaler.scale(loss2).backward()
    model1.update(now, scaler)
    model2.update(now, scaler)
    scaler.update()

    # n_.params = l * n_.params + (1 - l) * n.params, where the paper's print has n.params twice
    model1.update_momentum_net(l)
    model2.update_momentum_net(l)

    # DINO's centering (A.1), which Algorithm 1 leaves out. Outputs of the search take no part.
    model1.update_centers(m1_, t1_)
    model2.update_centers(m2_, t2_)
    named = dict(sm1=loss_sm1, st1=loss_st1, cm1=loss_cm1, ct1=loss_ct1, loss1=loss1,
                 sm2=loss_sm2, st2=loss_st2, cm2=loss_cm2, ct2=loss_ct2, loss2=loss2)
    return {name: loss.detach() for name, loss in named.items()}, dict(m1=m1_, t1=t1_, m2=m2_, t2=t2_)

# ------------------------------------------------------------------------------------------------- k-NN (A.2)
class EvalView(Dataset):
    """index -> (center crop (3, S, S) uint8, label): the shorter side becomes `resize`, then the middle is
    cut out. An unreadable image is named and gets the label NO_IMAGE; negative labels count nowhere."""
    def __init__(self, images, size, resize=None):
        self.images, self.size, self.resize = images, size, resize or round(size * 256 / 224)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        try:
            image, label = self.images[i]
            image = to_rgb(image)
        except UNREADABLE as error:
            warn(f"skipped {name_of(self.images, i)}: {error}")
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), NO_IMAGE
        limit = 4 * min(image.shape[1:])   # what a long image has more is cut off below anyway
        image = TF.center_crop(image, [min(side, limit) for side in image.shape[1:]])
        image = TF.resize(image, [self.resize], TF.InterpolationMode.BICUBIC, antialias=True)
        return TF.center_crop(image, [self.size, self.size]), int(label)

@torch.no_grad()
def extract_features(backbones, views, device, batch_size=256, workers=0, rank=0, world=1, dtype="fp32",
                     progress=None):
    """-> ([L2-normalized pooled features (n, C) of each backbone, in half precision], labels (n,)) on the
    device, of every world-th image from the rank-th on. progress(n) is told how many are done. Raises
    UserError where features are not finite or more than 1 % of the images cannot be read."""
    if len(views) < world:
        raise UserError(f"{len(views)} images are too few for {world} processes: start fewer")
    part = Subset(views, range(rank, len(views), world))
    modes, features, labels, done = [b.training for b in backbones], [], [], 0
    for b in backbones:
        b.eval()
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
    labels = torch.cat(labels).to(device)
    refuse_unreadable(int(sum_over_processes((labels == NO_IMAGE).sum())), len(views))
    if not all(rows.isfinite().all() for rows in features):
        raise UserError("features are not finite: the weights are damaged, or try --dtype fp32", code=1)
    return features, labels

def knn_classify(bank, labels, queries, k=20, temperature=0.07, classes=None):
    """DINO's weighted k-NN: votes (Q, classes) for queries (Q, D) by their k nearest in bank (n, D), of
    labels (n,). Rows are features; a neighbor weighs exp(cosine / temperature), relative to the nearest;
    argmax(1) predicts."""
    votes = torch.zeros(len(queries), classes or int(labels.max()) + 1, device=queries.device)
    for rows in torch.arange(len(queries)).split(256):
        query = F.normalize(queries[rows].float(), dim=1)   # half precision has changed the lengths a little
        cosine = torch.cat([query @ F.normalize(part.float(), dim=1).T for part in bank.split(2 ** 16)], 1)
        cosine, nearest = cosine.topk(min(k, len(bank)))
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        votes[rows] = votes[rows].scatter_add(1, labels[nearest], weight)
    return votes

def knn_accuracy(backbones, train, val, cfg, device, rank=0, world=1):
    """k-NN top-1 (percent) of each backbone on val, with train as the bank. Each process classifies its share
    of val and holds the whole bank."""
    options, accuracies = (device, cfg.batch_size // world, cfg.workers, rank, world), []
    banks, labels = extract_features(backbones, EvalView(train, cfg.global_size), *options)
    queries, answers = extract_features(backbones, EvalView(val, cfg.global_size), *options)
    n, known = math.ceil(len(train) / world), answers >= 0
    labels = gather(labels, n)
    for bank, query in zip(banks, queries):
        bank = gather(bank, n)[labels >= 0]
        predicted = knn_classify(bank, labels[labels >= 0], query[known], cfg.knn_k).argmax(1)
        right = sum_over_processes(torch.stack([(predicted == answers[known]).sum(), known.sum()])).tolist()
        accuracies.append(100 * right[0] / max(1, right[1]))
    return accuracies

# ---------------------------------------------------------------------------------------- checkpoints and log
def write(value, path):
    """torch.save to a temporary file, then renamed, so a file under its name is whole. Raises OSError."""
    try:
        torch.save(value, path + ".tmp")
        os.replace(path + ".tmp", path)
    except RuntimeError as error:   # so torch says that a disk is full
        if "DataLoader worker" in str(error):   # killed just now; any line may be told so
            raise
        raise OSError(f"{path} could not be written: the disk is full, or the folder not writable") from error
    finally:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")

ADVICE = ("Nothing of these steps was saved. Lower the learning rates, raise --warmup_epochs, or "
          "use --dtype fp32, and start again")

def save(cfg, models, step, scaler, n_images):
    """Write the momentum backbones under timm's names, then checkpoint.pth, all that resuming needs. Raises
    OSError where the disk does not take them, and UserError rather than save weights that are not finite."""
    for m in models:
        if not torch.stack(torch._foreach_norm([p.detach() for p in m.params])).isfinite().all():
            raise UserError(f"step {step}: weights of model {m.i} not finite after it. {ADVICE}", 1)
    if MAIN:
        for m in models:
            weights = m.momentum_net.backbone.model.state_dict()
            write({name: w.contiguous() for name, w in weights.items()}, f"{cfg.out}/model{m.i}.pth")
        state = dict(config=asdict(cfg), step=step, images=n_images, scaler=scaler.state_dict())
        write(state | {f"model{m.i}": m.state() for m in models}, f"{cfg.out}/checkpoint.pth")

def read_checkpoint(path, advice="Delete it to start anew, or give another --out"):
    """-> the dict of a checkpoint. Raises UserError if it is none, damaged, or not to be read just now."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()   # compares check sums, so one flipped bit is seen
        if damaged is None:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            state["config"]["seed"], range(state["step"])   # an error, caught below, if it is another file
            return state
        reason = f"{damaged} in it has another check sum"
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: no such file. {advice}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read just now ({error.strerror}); it may be sound") from error
    except Exception as error:   # damage has many names
        if "unable to mmap" in str(error):
            raise UserError(f"{path}: cannot be read just now ({error}); it may be sound") from error
        reason = type(error).__name__
    raise UserError(f"{path}: damaged, or no checkpoint of this program ({reason}). {advice}")

@contextlib.contextmanager
def fitting(path, advice="Give another --out"):
    """Around lines that take up a checkpoint. Where it does not fit, torch raises errors of several kinds; so
    this raises UserError."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        words = " ".join(str(error).split())   # torch uses several lines
        raise UserError(f"{path} does not fit ({type(error).__name__}: {words}). {advice}") from error

def load_optimizer(optimizer, saved):
    """optimizer.load_state_dict, which takes a state of any shape, and so would let a later step crash."""
    optimizer.load_state_dict(saved)
    for p, moments in optimizer.state.items():
        if any(value is not None and value.dim() and value.shape != p.shape for value in moments.values()):
            raise ValueError("an optimizer's state has another shape than its parameter")

def refuse_other_settings(path, saved, cfg):
    """Compare settings with a checkpoint's. What may differ is said; the rest raises UserError, listed."""
    differ, changed = [], []
    for f in fields(cfg):
        was, now = saved.get(f.name, f.default), getattr(cfg, f.name)   # an old checkpoint may lack some
        if was != now and was is not MISSING:
            words = f"--{f.name} was {'unset' if was in (None, '', ()) else was}, is {now}"
            (changed if f.metadata["may_differ"] else differ).append(words)
    if differ:
        raise UserError(f"{path} is of other settings: {'; '.join(differ)}. Give the same, or another --out")
    if changed:
        say(f"resuming {path} with other settings: {'; '.join(changed)}")

def find_checkpoint(cfg, n_images):
    """-> the checkpoint of --out, or None. Raises UserError if it is damaged or of other settings or images,
    or if processes disagree about these."""
    path, state = f"{cfg.out}/checkpoint.pth", None
    if os.path.exists(path):
        state = read_checkpoint(path)
        refuse_other_settings(path, state["config"], cfg)
        if state.get("images", n_images) != n_images:
            raise UserError(f"{path}: --data {cfg.data} had {state['images']} images, now {n_images}. Give "
                            f"the same, or another --out")
    machines_own = ("out", "data", "data_root", "workers")
    settings = seed_of([(name, value) for name, value in asdict(cfg).items() if name not in machines_own])
    mine = torch.tensor([[state["step"] if state else 0, n_images, settings]])
    steps, counts, settings = gather(mine, 1).T.tolist()
    if len(set(steps)) > 1:
        raise UserError(f"--out {cfg.out}: processes find checkpoints of steps {sorted(set(steps))}: all "
                        f"machines must share this folder")
    if len(set(counts)) > 1:
        raise UserError(f"--data {cfg.data}: processes find {sorted(set(counts))} images: all machines must "
                        f"have the same")
    if len(set(settings)) > 1:
        raise UserError("processes have other settings: start all machines with the same command")
    return state

def open_out(cfg):
    """Make the folder --out and see that log.jsonl can be written, on a line of its own. Raises UserError."""
    try:
        os.makedirs(cfg.out, exist_ok=True)
        with open(f"{cfg.out}/log.jsonl", "ab+") as f:
            f.seek(max(0, f.tell() - 1))
            if MAIN and f.read() not in (b"", b"\n"):   # a kill has torn the last line
                f.write(b"\n")
    except OSError as error:
        raise UserError(f"--out {cfg.out}: cannot be written to ({error.strerror}); give another") from error

def read_losses(window, first):
    """Losses of the steps from `first` on -> their means over steps and processes, by name. Only here the
    host waits for the device. Raises UserError where one is not finite."""
    names = list(window[0])   # the same in each step
    values = torch.stack([torch.stack(list(losses.values())) for losses in window])   # (steps, names)
    values = mean_over_processes(values).cpu()
    finite = values.isfinite().all(1).tolist()
    if not all(finite):
        row = finite.index(False)
        wrong = [name for name, value in zip(names, values[row]) if not value.isfinite()]
        raise UserError(f"step {first + row}: {', '.join(wrong)} not finite. {ADVICE}", code=1)
    return dict(zip(names, values.mean(0).tolist()))

@torch.no_grad()
def target_statistics(logits, models, now):
    """Of each momentum head on this batch, in nats: the mean entropy of its targets, with the centers after
    the step, and their spread (entropy of the mean target less mean entropy). A head without spread says the
    same of every image: it has collapsed, which no loss shows."""
    stats = {}
    for model in models:
        for head, center in (("m", model.C_m), ("t", model.C_t)):
            t = logits[f"{head}{model.i}"]
            if t is not None:
                p = target(t, center, model.temp(now)).flatten(0, 1)
                mean_entropy = torch.special.entr(p).sum(-1).mean()
                stats[f"entropy_{head}{model.i}"] = mean_entropy
                stats[f"spread_{head}{model.i}"] = torch.special.entr(p.mean(0)).sum() - mean_entropy
    return dict(zip(stats, mean_over_processes(torch.stack(list(stats.values()))).tolist()))

def memory_gb(device):
    """Peak memory of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:   # Windows has none
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

def show(record, last=True):
    """Print a record as a line. On a terminal the next overwrites it, unless it is the last."""
    words = []
    for name, value in record.items():
        if name == "step":
            words.append(f"step {value}/{record['steps']}")
        elif not name.startswith(("entropy", "spread", "steps")) and not isinstance(value, dict):
            words.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    if MAIN and sys.stdout.isatty():
        print("\r\033[K" + "  ".join(words), end="\n" if last else "", flush=True)
    else:
        say("  ".join(words))

def log(cfg, record, last=True):
    """Append a record to log.jsonl, and show it."""
    try:
        if MAIN:
            with open(f"{cfg.out}/log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
    except OSError as error:
        warn(f"--out {cfg.out}: log.jsonl could not be written ({error})")
    show(record, last)

# --------------------------------------------------------------------------------------------------- training
def train(cfg, models, images, val, state, device, rank, world):
    """Train to the end, from the checkpoint `state` if there is one. On a signal saves, raises UserError."""
    # Take up what a stopped run had.
    scaler, step = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16"), 0
    if state:
        with fitting(f"{cfg.out}/checkpoint.pth"):
            for m in models:
                m.load_state(state[f"model{m.i}"])
            if scaler.is_enabled() and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
        step = state["step"]
        say(f"resumed {cfg.out}/checkpoint.pth at step {step}")
    first, per_epoch = step, len(images) // cfg.batch_size
    steps, save_every = cfg.epochs * per_epoch, cfg.save_every or per_epoch
    watch, window, start = Watch(images), [], time.time()
    clock = start   # when the steps in window began, less what is no training

    def log_knn(step):   # after the last step of every knn_every epochs
        if cfg.knn_every and step and step % (cfg.knn_every * per_epoch) == 0:
            knn1, knn2 = knn_accuracy([m.n_.backbone for m in models], images, val, cfg, device, rank, world)
            log(cfg, dict(epoch=step // per_epoch - 1, knn1=knn1, knn2=knn2))
    log_knn(step)   # once more on resuming, as a kill may have lost it

    # Workers crop ahead of time; the device makes views of the crops and takes the step.
    keys = batches(len(images), cfg, first, rank, world)
    for *crops, bad, reasons in make_loader(MultiCrop(images, cfg), device, cfg.workers, batch_sampler=keys):
        now = schedule(cfg, step, per_epoch)
        x = make_views(crops, cfg, device, step, rank, world)
        losses, logits = train_step(*models, x, cfg, now, scaler)
        window.append(losses)
        step += 1

        # Decide what this step ends with. A signal ends the run, after a checkpoint.
        number = watch.after_step(bad.tolist(), reasons)
        logging = step % cfg.log_every == 0 or step == steps
        saving = number or step % save_every == 0 or step == steps
        if logging or saving:   # what is not finite is noticed here, before it is saved
            means = read_losses(window, step - len(window) + 1)
        if logging:
            seconds, n_steps = time.time() - clock, len(window)
            window, clock = [], time.time()
            record = dict(epoch=now.epoch, step=step, steps=steps)
            left_out = {"sm", "cm", "st", "ct"} - loss_names(cfg)
            record |= {name: mean for name, mean in means.items() if name[:2] not in left_out}
            record |= {f"lr{m.i}": now.lr[m.family] for m in models}
            record |= {"images/s": cfg.batch_size * n_steps / seconds, "GB": memory_gb(device),
                       "minutes_left": (clock - start) / (step - first) * (steps - step) / 60}
            stats = target_statistics(logits, models, now)
            log(cfg, record | stats, last=step % per_epoch == 0)
            if step > steps / 4:   # earlier, targets may be uniform and yet part later
                report_collapse(stats, cfg)
            if MAIN and scaler.is_enabled() and scaler.get_scale() < 1e-3:
                warn("fp16 skips every step, as gradients overflow: use --dtype fp32, or lower rates")
        paused = time.time()
        if saving:
            try:
                save(cfg, models, step, scaler, len(images))
            except OSError as error:
                if number or step == steps:
                    raise UserError(f"--out {cfg.out}: {error}; make room and start again", 1) from error
                warn(f"--out {cfg.out}: {error}; make room there; training goes on")
        if number:
            raise UserError(f"stopped by {number.name} after step {step}; the same command goes on there",
                            code=128 + number)
        log_knn(step)
        clock += time.time() - paused   # images/s counts neither checkpoints nor k-NN
    watch.end()

def report_collapse(stats, cfg):
    flat = [name.removeprefix("spread_") for name, value in stats.items()
            if name.startswith("spread") and value < 0.01 * math.log(cfg.out_dim)]
    if flat and MAIN:
        warn(f"collapse? The targets of {', '.join(flat)} hardly differ between images (entropy and spread "
             f"in log.jsonl): try a lower --teacher_temp, lower learning rates, a higher --ema, or --t_norm")

# --------------------------------------------------------------------------------------------------- toy data
def turn(u, v, angle):
    return angle.cos() * u + angle.sin() * v, angle.cos() * v - angle.sin() * u

def outside(shape, u, v):
    """How far points (u, v) lie outside of one of eight shapes, all of one area; negative inside."""
    r = torch.hypot(u, v)
    shapes = [r - 0.7,                                                   # disk
              (r - 0.75).abs() - 0.15,                                   # ring
              torch.maximum(u.abs() - 0.4, v.abs() - 1),                 # bar
              torch.minimum(u.abs(), v.abs()) - 0.19,                    # cross
              (u.abs() - 0.6).abs() - 0.17,                              # two bars
              torch.maximum(v, 0.87 * u.abs() - 0.5 * v) - 0.54,         # triangle
              torch.maximum(r - 1.02, u),                                # half disk
              torch.maximum(r - 1.05, 3 * u * v)]                        # bow tie
    return shapes[shape]

def draw_toy(n, seed, size=48, cells=16):
    """The built-in data: images (n, 3, size, size) uint8 and labels (n,). The class of an image is a shape,
    which it repeats on a turned grid. Each copy has a color, ground, size and angle of its own, so that
    pixels and colors say little about the class."""
    g, grid, labels = generator("toy", seed), torch.arange(size) - size / 2, torch.arange(n) % 8
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for shape in range(8):
        rows = (labels == shape).nonzero().flatten()

        def rand(*dims):
            return torch.rand(len(rows), *dims, generator=g)
        angle, period = 2 * math.pi * rand(1, 1), 8 + 3 * rand(1, 1)
        u, v = turn(grid, grid[:, None], angle)
        u, v = u / period + rand(1, 1) + cells / 2, v / period + rand(1, 1) + cells / 2
        cell = (u.floor() * cells + v.floor()).long().view(len(rows), 1, -1)

        def rand_of_copy(k):   # k numbers for each copy, at all of its pixels
            return rand(k, cells ** 2).gather(2, cell.expand(-1, k, -1)).unflatten(2, (size, size))
        angle, radius = rand_of_copy(2).unbind(1)
        color, ground, radius = 0.6 + 0.4 * rand_of_copy(3), 0.3 * rand_of_copy(3), 0.38 + 0.12 * radius
        u, v = turn((u % 1 - 0.5) / radius, (v % 1 - 0.5) / radius, 2 * math.pi * angle)
        distance = torch.maximum(outside(shape, u, v), torch.maximum(u.abs(), v.abs()) - 1.1)
        inside = torch.sigmoid(-6 * distance)[:, None]
        images[rows] = (255 * torch.lerp(ground, color, inside)).to(torch.uint8)
    return images, labels

# ------------------------------------------------------------------------------------------------------- main
def fill_in(cfg, backbones, device, world):
    """Fill in the settings that depend on the machine and on the backbones. Raises UserError."""
    fill_in_machine(cfg, device, world)
    cfg.out = cfg.out or f"runs/{cfg.arch1}-{cfg.arch2}"

    # The larger backbone has lambda 1, the smaller 0.1; where they are equal, both have 1.
    families = [b.family for b in backbones]
    sizes = [sum(p.numel() for p in b.parameters()) for b in backbones]
    if cfg.recipe == "release" and families[0] != families[1]:
        sizes = [1 if family == "cnn" else 0 for family in families]   # it treats the ViT as the smaller
    if cfg.lambda1 is None:
        cfg.lambda1 = 0.1 if sizes[0] < sizes[1] else 1.0
    if cfg.lambda2 is None:
        cfg.lambda2 = 0.1 if sizes[1] < sizes[0] else 1.0
    if not cfg.t_dim:
        cfg.t_dim = 384
        if families[0] != families[1]:
            cfg.t_dim = backbones[families.index("vit")].dim
        check(cfg)

def build_models(cfg, device, world=1):
    """-> [Model, Model]. Each has its own seed, so neither depends on its partner. Fills in cfg."""
    backbones, sizes = [], [cfg.global_size, cfg.local_size] if cfg.local_crops else [cfg.global_size]
    for i in "12":
        arch, kwargs, init = [getattr(cfg, name + i) for name in ("arch", "model_kwargs", "init")]
        torch.manual_seed(seed_of(cfg.seed, "backbone", i))
        backbone = build_backbone(arch, kwargs, cfg.patch_size, cfg.vit_pool, sizes, cfg.drop_path,
                                  "--arch" + i)
        if cfg.recipe == "release" and hasattr(backbone.model, "cls_token"):
            nn.init.trunc_normal_(backbone.model.cls_token, std=0.02)
        if init:
            load_backbone(backbone, init, f"--init{i}")
        backbones.append(backbone)
    fill_in(cfg, backbones, device, world)
    return [Model(cfg, i, backbone, device, world) for i, backbone in enumerate(backbones, 1)]

class Pixels(nn.Module):
    """Raw pixels as features: the demo's baseline."""
    def forward(self, x):
        return x.flatten(1), None

def refuse_unlike_classes(train, val, data):
    """Raise UserError unless there is a val, with the same class folders as train."""
    if val is None:
        raise UserError(f"--knn_every: --data {data} has no val/ with class folders to classify")
    odd = sorted(set(getattr(train, "classes", ())) ^ set(getattr(val, "classes", ())))
    if odd:
        raise UserError(f"--data {data}: train/ and val/ must have the same class folders; {odd[0]} is in "
                        f"one alone ({len(odd)} such)")

def run(cfg):
    # What can be refused is refused here, before anything is written.
    device, rank, world = join_processes()
    images, val = get_data(cfg)
    if len(images) < cfg.batch_size:
        raise UserError(f"--batch_size {cfg.batch_size}: lower it, --data has {len(images)} images")
    if cfg.knn_every or cfg.demo:
        refuse_unlike_classes(images, val, cfg.data)

    # Build both models, and say what they are and who learns how much from whom.
    models = build_models(cfg, device, world)
    backbones = [m.n_.backbone for m in models]
    for m in models:
        size, whole = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (m.net.backbone, m.net)]
        arch, weight = getattr(cfg, f"arch{m.i}"), getattr(cfg, f"lambda{m.i}")
        say(f"model {m.i}: {arch}, {size:.1f} M parameters, heads {whole - size:.1f} M; treated as a "
            f"{dict(cnn='CNN', vit='ViT')[m.family]}; lambda{m.i} = {weight:g}")
        if m.t is not None and m.net.backbone.num_tokens == 1 and MAIN:
            warn(f"--arch{m.i} {arch}: a view of {cfg.global_size} pixels has one local feature, so there is "
                 f"nothing to search in; for a ResNet try --model_kwargs{m.i} output_stride=8")
    say(f"{len(images):,} images; processes: {world}, on {device.type}, {cfg.dtype}")

    # Train. The demo compares k-NN before and after.
    open_out(cfg)
    state = find_checkpoint(cfg, len(images))
    if cfg.demo:
        say("k-NN on raw pixels and with the untrained nets ...")
        before = knn_accuracy([Pixels(), *backbones], images, val, cfg, device, rank, world)
    train(cfg, models, images, val, state, device, rank, world)
    if cfg.demo:
        after = knn_accuracy(backbones, images, val, cfg, device, rank, world)
        say(f"\nk-NN top-1 on {cfg.data}, %{'before':>12}{'after':>8}\nraw pixels{before[0]:>20.1f}")
        say(f"{cfg.arch1:18}{before[1]:>12.1f}{after[0]:>8.1f}")
        say(f"{cfg.arch2:18}{before[2]:>12.1f}{after[1]:>8.1f}")

    # Say how to load what came out.
    for i, b in enumerate(backbones, 1):
        kwargs = dict(b.timm_kwargs)
        if isinstance(b.model, VisionTransformer):   # then it takes all sizes and gives the feature used here
            kwargs |= dict(dynamic_img_size=True, global_pool="token" if b.cls else "avg", fc_norm=False)
        kwargs = "".join(f", {name}={value!r}" for name, value in kwargs.items())
        file = f"{cfg.out}/model{i}.pth"
        say(f"timm.create_model({b.timm_name!r}, num_classes=0{kwargs}, checkpoint_path={file!r})")

def sentence_for(error):
    """What a failure of the machine means to the user. None: only a traceback tells."""
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return ("out of GPU memory: lower --batch_size or use more GPUs; in training also "
                "--grad_checkpointing, fewer --local_crops, a lower --out_dim")
    # A worker that dies while its batch is fetched cuts the connection. "Caught" begins the data set's own.
    cut = isinstance(error, (ConnectionError, EOFError)) and not text.startswith("Caught")
    if cut or "DataLoader worker" in text and ("killed" in text or "exited" in text):
        return f"a loader process is gone, perhaps because memory ran out: try fewer --workers ({error!r})"
    if "Expected more than 1 value per channel" in text:
        return "batch norm needs more than one value: raise --batch_size or the sizes of views"
    if isinstance(error, MemoryError) or "allocate memory" in text:   # torch's words and the system's
        return "out of memory: lower --batch_size or --workers; in training also --out_dim"
    return None

def main(argv=None, program="mokd.py", parse=parse_args, run=run):
    """Run a program of this project -> exit code. What stops it is a sentence; no process outlives it."""
    try:
        try:
            run(parse(argv))
        finally:   # no news of a worker's death, at which torch's handler raises, may interrupt what follows
            if hasattr(signal, "SIGCHLD"):   # Windows has none
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return 0
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or error.code == 1:   # once on each machine
            warn(f"{program}: {error}")
        return error.code
    except KeyboardInterrupt:
        warn(f"{program}: stopped by SIGINT")
        return 130
    except Exception as error:
        if sentence_for(error) is None:
            raise
        warn(f"{program}: {sentence_for(error)}")
        return 1
    finally:
        for worker in multiprocessing.active_children():   # they ignore Python's SIGTERM
            worker.kill()
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main())
