"""The paper's figures from runs of mokd.py, and what the feature search looks at.

    A=runs/independent B=runs/mokd     # folders of two runs; an independent run is one of --losses sm
    python extras/figures.py tsne --checkpoint $A/checkpoint.pth $B/checkpoint.pth          # Fig. 4, S1
    python extras/figures.py attention --checkpoint $A/checkpoint.pth $B/checkpoint.pth     # Fig. 5a-b, S2
    python extras/figures.py featuremap --checkpoint $A/checkpoint.pth $B/checkpoint.pth    # Fig. 5c-d
    python extras/figures.py attention --maps --checkpoint $B/checkpoint.pth   # where a last block looks
    python extras/figures.py search --checkpoint $B/checkpoint.pth   # where a query looks (3.3, Fig. 3)
    python extras/figures.py curves --log $A $B   # k-NN over epochs, a band for seeds
    python extras/figures.py losses --log $A $B                                 # all else that a log holds
    python extras/figures.py crops --data FOLDER --global_size 224   # the views that mokd.py would make

Each writes NAME.png, NAME.pdf and the numbers behind them, NAME.npz (--out NAME). Images are center crops of
validation images, or of training images where there is no validation; crops and search show views of training
images. A distance is one between the centers of patches, in pixels of the --image_size that the network sees.
"""
import glob
import importlib.util
import json
import math
import os
import re
import sys
import textwrap
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch.utils.data import Subset, default_collate

# mokd.py and eval_knn.py lie in the folder above this one.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import mokd   # noqa: E402
from eval_knn import Source, check_source, labels_of, load_backbones, progress_of   # noqa: E402
from mokd import UserError, flag, say, warn   # noqa: E402

ABOUT = ("FIGURE is one of tsne, attention, featuremap, search, crops, curves, losses. crops without "
         "--checkpoint takes the settings of mokd.py, e.g. --data FOLDER --global_size 96 --blur 0 0, and "
         "shows the views that training would see.")
# A flag of words: all words lie between these two.
WORDS = dict(default=("",), nargs="+", low="", high=chr(sys.maxunicode))
COLUMN = 3.5    # inches of a panel with axes, at most
LARGEST = 1.1   # inches of a picture in a grid of pictures
POINTS = 8   # size of all letters, also of legends, in a figure printed at its width

@dataclass
class Config(Source):
    """The command line of a figure."""
    checkpoint: tuple = flag(
        help="checkpoint.pth of runs of mokd.py; what is unset below is the first's", group="models", **WORDS)

    out: str = flag("", "write NAME.png, NAME.pdf, NAME.npz; unset: the figure's name, beside the first file",
                    group="figure")
    width: float = flag(7.0, "inches at most: 7 fills a page, 3.3 a column; letters always have 8 points",
                       low=2.5)
    names: tuple = flag(help="what legends call the runs, in their order; unset: their folders", **WORDS)
    images: int = flag(None, "images; unset: 128 of which attention and featuremap are the mean [ViT, D.7], "
                       "4 where they are shown", low=1)
    batch_size: int = flag(16, "images of a forward pass; lower it for attention between many patches", low=1)

    maps: bool = flag(False, "draw the last block's attention over a few images [DINO]", group="attention")

    stem: bool = flag(False, "show also what comes before the first stage (steps of less than 4 pixels)",
                      group="featuremap")

    classes: int = flag(10, "classes, drawn by --seed; all if there are fewer [Fig. 4]", low=1, group="tsne")
    per_class: int = flag(50, "images of each class, drawn by --seed", low=1)
    anchors: int = flag(512, "images to which those are compared, drawn by --seed from all others "
                        "[Moschella et al.]", low=2)
    perplexity: float = flag(30.0, "about the number of neighbors that a point keeps [scikit-learn]", low=1)

    view: int = flag(1, "the view that searches global view 0: 1 is the other global one, 2 and up are local",
                     low=1, group="search")

    log: tuple = flag(
        help="for each line or band: a log.jsonl, a folder (each log.jsonl in it is a seed of one setting), "
        "or a pattern in quotes, e.g. 'runs/mokd-*'", group="curves, losses", **WORDS)
    titles: tuple = flag(help="what the panels call model 1 and model 2", **WORDS)
    pixels: float = flag(None, "top-1 (%) of a dotted line in curves, e.g. that of raw pixels", high=100)

    dtype = "fp32"   # no flag: a figure needs no speed

# ----------------------------------------------------------------------------------------------- command line
def parse(argv=None):
    """The command line, a figure's name first -> Config with .figure, .names of the runs, .views of crops.
    Raises UserError."""
    argv = list(sys.argv[1:] if argv is None else argv)
    figure = argv.pop(0) if argv else ""
    if figure in ("-h", "--help"):
        mokd.read_flags(Config, ["-h"], "extras/figures.py FIGURE", ABOUT)   # prints and exits
    if figure not in FIGURES:
        raise UserError(f"'{figure}' is no figure: the first word must be one of {', '.join(FIGURES)}")
    views = None
    if figure == "crops" and not any(word.partition("=")[0] == "--checkpoint" for word in argv):
        argv, theirs = split(argv, ("out", "width", "images", "help"))
        views = mokd.parse_args(theirs)
    given = mokd.read_flags(Config, argv, f"extras/figures.py {figure}", ABOUT)
    cfg = Config(**dict(checkpoint=(), log=(), names=(), titles=()) | given)
    cfg.figure, cfg.views = figure, views

    if figure in ("curves", "losses"):
        mokd.check_ranges(cfg)
        files, names = cfg.log, [name_of_setting(argument) for argument in cfg.log]
        if not files:
            raise UserError(f"{figure}: give --log FILE ...")
    elif views is not None:
        mokd.check_ranges(cfg)
        files, names = [], ["views"]
    else:
        files = check_source(cfg).checkpoint
        names = [os.path.basename(os.path.dirname(os.path.abspath(file))) for file in files] or [cfg.arch]
    if figure in ("crops", "search") and views is None and len(files) != 1:
        raise UserError(f"{figure}: give one --checkpoint FILE, the run that is shown")
    if cfg.names and len(cfg.names) != len(names):
        raise UserError(f"--names: {len(cfg.names)} names for {len(names)} runs; give one for each")
    if len({*cfg.names}) < len(cfg.names):
        raise UserError(f"--names {' '.join(cfg.names)}: two are called alike; give each its own name. "
                        "Several seeds of one setting are one --log: their folder, or a pattern in quotes")
    if not cfg.names and len({*names}) < len(names):
        raise UserError(f"{' '.join(files)}: a run is called by its folder, and two are called alike: tell "
                        "them apart with --names")
    cfg.names = cfg.names or names
    beside = files[0] if files else ""
    folder = beside if os.path.isdir(beside) else os.path.dirname(re.split(r"[*?[]", beside)[0])
    cfg.out = re.sub(r"\.(png|pdf|npz)$", "", cfg.out) or os.path.join(folder, figure)
    return cfg

def split(argv, own):
    """Words of a command line -> those of the flags in `own`, those of all other flags."""
    mine, theirs = [], []
    part = mine
    for word in argv:
        if word.startswith("--"):
            part = mine if word[2:].partition("=")[0] in own else theirs
        part.append(word)
    return mine, theirs

def run(cfg):
    """Draw the figure of cfg and write its files. Raises UserError."""
    needed = ["matplotlib", "sklearn"] if cfg.figure == "tsne" else ["matplotlib"]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{cfg.figure} needs {package}, which is missing: pip install -r "
                            "extras/requirements.txt")
    import matplotlib
    device, _, world = mokd.join_processes()
    mokd.fill_in_machine(cfg, device, world)
    if world > 1:
        raise UserError("one process draws a figure: start it without torchrun")
    try:   # before minutes are spent
        os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {cfg.out}: {error.strerror}; give another name") from error
    # Type 42 keeps letters as letters in the PDF; publishers refuse matplotlib's default, type 3.
    style = {"pdf.fonttype": 42, "lines.linewidth": 1.2, "font.size": POINTS}
    for name in ("axes.titlesize", "axes.labelsize", "legend.fontsize", "xtick.labelsize", "ytick.labelsize",
                 "figure.titlesize"):
        style[name] = POINTS
    with matplotlib.rc_context(style):
        fig, numbers = FIGURES[cfg.figure](cfg, device)
        try:
            fig.savefig(f"{cfg.out}.png", dpi=200)
            fig.savefig(f"{cfg.out}.pdf")
            np.savez(f"{cfg.out}.npz", **numbers)
        except OSError as error:
            raise UserError(f"--out {cfg.out}: cannot be written ({error}); give another name", 1) from error
    say(f"wrote {cfg.out}.png, {cfg.out}.pdf and the numbers behind them, {cfg.out}.npz")

# ---------------------------------------------------------------------------------------------------- drawing
def panels(cfg, rows, columns, height, **options):
    """An empty figure of rows * columns panels, each `height` inches high and at most a column wide ->
    figure, axes (rows, columns)."""
    from matplotlib.figure import Figure   # not pyplot: no screen, no state
    fig = Figure((min(cfg.width, COLUMN * columns), height * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **options)

def grid(cfg, rows, columns):
    """An empty figure of square pictures, cfg.width inches wide or less -> figure, axes (rows, columns)."""
    from matplotlib.figure import Figure
    beside = 0.2   # inches for labels, on the mean
    size = min(LARGEST, cfg.width / columns - beside)
    fig = Figure((columns * (size + beside), rows * (size + 0.06) + 0.75), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)

def legend(fig, handles):
    """One legend for the whole figure, below its panels, in as many columns as its width holds; makes room
    for it."""
    width, height = fig.get_size_inches()
    longest = max(len(handle.get_label()) for handle in handles)
    columns = min(len(handles), max(1, int(width / (0.5 + 0.065 * longest))))
    fig.set_size_inches(width, height + 0.17 * math.ceil(len(handles) / columns) + 0.05)
    fig.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)

def key(label, **options):
    """An entry of a legend."""
    from matplotlib.lines import Line2D
    return Line2D([], [], label=label, **options)

def look_of(k):
    """Color and marker of the k-th run, which differ in gray print too."""
    return dict(color=f"C{k % 10}", marker="osD^v"[k % 5], markersize=3.5)

def line(ax, x, values, **options):
    """Values (runs or images, n) at x (n,): their mean as a line, plus and minus their standard deviation as
    a band."""
    mean = values.mean(0)
    ax.plot(x, mean, **options)
    if len(values) > 1:
        deviation = values.std(0, ddof=1)
        ax.fill_between(x, mean - deviation, mean + deviation, color=options["color"], alpha=0.2, linewidth=0)

def picture(ax, image, values=None, high=1.0):
    """An image (3, H, W) in [0, 1]; with values of its patches (h, w) in gray, and those in color over it,
    from 0 to high -> what a color bar needs."""
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    if values is None:
        return ax.imshow(image.transpose(1, 2, 0))
    gray, (_, H, W) = image.mean(0), image.shape
    ax.imshow(gray, cmap="gray", vmin=0, vmax=1)
    extent = (-0.5, W - 0.5, H - 0.5, -0.5)   # that of the image
    return ax.imshow(values, cmap="inferno", vmin=0, vmax=high, alpha=0.65, extent=extent)

def high_end(arrays):
    """Upper end of a color scale that is the same for some arrays: what 99.5 % of the values keep below."""
    every = np.concatenate([array.ravel() for array in arrays])
    return max(float(np.quantile(every, 0.995)), 1e-6)

def wrap(fig, text, share=1.0):
    """Text in lines that fit in a share of a figure's width; the figure grows by the height of the lines."""
    width, height = fig.get_size_inches()
    lines = textwrap.wrap(text, max(8, int(share * width / 0.07)))
    fig.set_size_inches(width, height + 0.16 * len(lines))
    return "\n".join(lines)

def color_bar(fig, shown, axes, label):
    """A color bar below some columns (rows, n) of a figure's panels."""
    bar = fig.colorbar(shown, ax=axes, location="bottom", extend="max", aspect=40, shrink=0.9, pad=0.02)
    bar.set_label(wrap(fig, label, axes.shape[1] / axes[0, 0].get_gridspec().ncols))
    bar.outline.set_visible(False)

# ------------------------------------------------------------------------------------------ models and images
def load(cfg):
    """-> {run: {model: Backbone}}, the images. Unset data, data_root, image_size and resize are the first
    checkpoint's."""
    runs = {}
    for name, file in zip(cfg.names, cfg.checkpoint or [""]):
        own = replace(cfg, checkpoint=file)
        runs[name] = load_backbones(own)
        for field in ("data", "data_root", "image_size", "resize"):
            setattr(cfg, field, getattr(own, field))
    train, val = mokd.get_data(cfg)
    return runs, val if val is not None and len(val) else train

def draw(images, n, *key):
    """-> indices of n images, drawn without repetition by a key."""
    return torch.randperm(len(images), generator=mokd.generator(*key))[:n].tolist()

def look(backbones, images, rows, cfg, device, what):
    """Center crops of some rows of images through backbones -> [features (n, C)], labels (n,), NO_IMAGE for
    an unreadable one. Raises UserError where more than 1 % cannot be read."""
    views = mokd.EvalView(Subset(images, rows), cfg.image_size, cfg.resize)
    backbones = [backbone.to(device) for backbone in backbones]
    features, labels = mokd.extract_features(backbones, views, device, cfg.batch_size, cfg.workers,
                                             progress=progress_of(what, len(rows)))
    return [f.float().cpu() for f in features], labels.cpu()

def settings_of(saved):
    """The settings that a checkpoint was trained with, those that mokd.py still knows -> mokd.Config."""
    known = {f.name for f in fields(mokd.Config)}
    return mokd.Config(**{name: value for name, value in saved["config"].items() if name in known})

def views_of(settings, images, index, device):
    """Views of some images -> [(B, 3, s, s) normalized, for each of 2 + L views], [the same in [0, 1] as
    numpy]. The crops are those of epoch 0; flips and colors, which mokd.py draws by an image's place in its
    batch, are drawn anew."""
    settings.batch_size = len(index)
    dataset = mokd.MultiCrop(images, settings)
    batch = default_collate([dataset[0, i] for i in index])
    for i, reason in zip(batch[2].tolist(), batch[3]):
        if i >= 0:
            warn(f"skipped {mokd.name_of(images, i)}: {reason}; the next one is shown")
    mean, std = mokd.mean_and_std(torch.device("cpu"))
    views = []
    for group in mokd.make_views(batch, settings, device, 0):   # global ones, local ones
        views += group.split(len(index))
    return views, [(view.cpu() * std + mean).clamp(0, 1).numpy() for view in views]

# ------------------------------------------------------------------------------------------ features (Fig. 4)
# Ten colors without gray and black, which belong to the models' markers in the legend.
COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd",
          "#8c564b", "#e377c2", "#000075", "#bcbd22", "#17becf"]
TOY = ("disk", "ring", "bar", "cross", "two bars", "triangle", "half disk", "bow tie")

def names_of_classes(images, data, n):
    """-> n names: the data set's, or numbers."""
    if isinstance(images, Subset):
        images = images.dataset
    names = getattr(images, "classes", None) or (TOY if data == "toy" else range(n))
    return [name[0] if isinstance(name, tuple) else str(name) for name in names]   # a tuple: synonyms

def relative(features, anchors):
    """Features of images (n, C) and of anchor images (A, C) -> (n, A), in which models of any width can be
    compared: cosines of an image to the anchors, as Moschella et al. (2023), then each column to mean 0 and
    deviation 1, each row to length 1. So how alike a model finds images on the whole does not count, only
    which anchors an image resembles more than others do."""
    cosine = F.normalize(features, dim=1) @ F.normalize(anchors, dim=1).T
    return F.normalize((cosine - cosine.mean(0)) / cosine.std(0).clamp_min(1e-6), dim=1)

def agreement(z1, z2, labels):
    """Percent of points (n, A) whose nearest point of the other model, that of the same image left out, is of
    the same class."""
    cosine = (z1 @ z2.T).fill_diagonal_(-2)
    hits = [(labels[cosine.argmax(dim)] == labels).float().mean().item() for dim in (0, 1)]
    return 50 * sum(hits)

def tsne(cfg, device):
    """A panel and a t-SNE a run, of both its models together: each gives an image a point, see relative()."""
    import matplotlib
    from sklearn.manifold import TSNE
    runs, images = load(cfg)
    labels = labels_of(images)
    there = labels[labels >= 0].unique()
    order = torch.tensor(draw(images, None, cfg.seed, "images"))
    classes = there[draw(there, cfg.classes, cfg.seed, "classes")].sort().values
    rows = torch.cat([order[labels[order] == c][:cfg.per_class] for c in classes])
    others = order[~torch.isin(order, rows)][:cfg.anchors]
    if len(others) < 2:
        raise UserError(f"--per_class {cfg.per_class}: leaves no image of {cfg.data} as anchors; lower it")
    if cfg.perplexity >= len(rows):
        raise UserError(f"--perplexity {cfg.perplexity:g}: must be below the number of images, {len(rows)}")

    fig, axes = panels(cfg, 1, len(runs), min(cfg.width / len(runs), COLUMN) + 0.5)
    numbers = dict(images=rows.numpy(), anchors=others.numpy())
    names = names_of_classes(images, cfg.data, int(there.max()) + 1)
    colors = COLORS
    if len(classes) > len(colors):
        colors = [*matplotlib.colormaps["turbo"].resampled(len(classes))(range(len(classes)))]
    for ax, (run, backbones) in zip(axes[0], runs.items()):
        features, y = look(backbones.values(), images, rows.tolist(), cfg, device, run)
        anchors, readable = look(backbones.values(), images, others.tolist(), cfg, device, f"{run}, anchors")
        z = [relative(f[y >= 0], a[readable >= 0]) for f, a in zip(features, anchors)]
        y = y[y >= 0]
        say(f"{run}: t-SNE of {len(z) * len(y):,} points, compared to {len(others)} anchors ...")
        embedding = TSNE(perplexity=cfg.perplexity, init="pca", random_state=cfg.seed % 2 ** 32)
        xy = embedding.fit_transform(torch.cat(z).numpy())
        numbers[f"{run}/labels"] = y.numpy()
        color = [colors[c] for c in torch.searchsorted(classes, y)]
        for model, marker, points, of_model in zip(backbones, "o^", xy.reshape(len(z), -1, 2), z):
            ax.scatter(*points.T, s=7, c=color, marker=marker, linewidths=0, alpha=0.8)
            numbers |= {f"{run}/{model}/xy": points, f"{run}/{model}/relative": of_model.numpy()}
        ax.set(title=run, xticks=[], yticks=[])
        if len(z) == 2:
            numbers[f"{run}/agreement"] = agreement(*z, y)
            ax.set_xlabel(f"other model's nearest:\n{numbers[f'{run}/agreement']:.1f} % of the same class")

    handles = []
    for model, marker in zip(backbones, "o^"):   # hollow and black, as no point is
        handles.append(key(model, marker=marker, linestyle="", color="black", markerfacecolor="none"))
    for i, c in enumerate(classes):
        handles.append(key(names[c], marker="s", linestyle="", color=colors[i]))
    legend(fig, handles)
    return fig, numbers

# --------------------------------------------------------------------------------- attention's reach (Fig. 5)
def distances(h, w, size, device=None, rows=slice(None)):
    """Pixels between the centers of h * w patches, row by row, of an image of size * size pixels -> (h w, h
    w), or some rows."""
    patch = torch.arange(h * w, device=device)
    y, x = patch // w * (size / h), patch % w * (size / w)
    return torch.hypot(y[rows, None] - y, x[rows, None] - x)

def mean_distance(attention, apart):
    """Attention (..., Q, N), a query's of sum 1, and distances (Q, N) -> (...): the distances to all keys
    weighted by attention, then the mean over queries [ViT: Dosovitskiy et al. 2021, D.7]."""
    return (attention * apart).sum(-1).mean(-1)

def logits_of(module, x, output):
    """Attention of a timm Attention with this output for tokens x (B, N, C), before its softmax -> (B, heads,
    N, N).

    timm's fused attention hands out no weights, so they are computed once more; that they make the same
    output shows that they are the module's. Raises UserError where they do not."""
    qkv = module.qkv(x).unflatten(-1, (3, module.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)   # (B, heads, N, d)
    logits = module.q_norm(q) * module.scale @ module.k_norm(k).mT
    y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    if hasattr(module, "norm"):
        y = module.norm(y)
    if (module.proj(y) - output).abs().max() > 1e-3 * output.abs().max():
        raise UserError("its attention is more than softmax(q k^T / sqrt(d)) v")
    return logits

def attention_of(module, x, output, prefix):
    """Attention between patches -> (B, heads, n, n), n = N - prefix. CLS and other prefix tokens are left out
    as queries and as keys, and a query's attention to patches is scaled to sum 1: the softmax over patches
    alone."""
    return logits_of(module, x, output)[..., prefix:, prefix:].softmax(-1)

def check_patches(backbone, x):
    """-> patches on a side. Raises UserError if a layer's tokens x are not all patches of the image and the
    prefix."""
    side = math.isqrt(backbone.num_tokens)
    if x.dim() != 3 or x.shape[1] != backbone.prefix + side ** 2:
        raise UserError("its attention is not between all patches")
    return side

def layers_of(backbone):
    """-> {name: module} of a ViT's attention, first layer first."""
    modules = backbone.model.named_modules()
    return {name.removesuffix(".attn"): module for name, module in modules if isinstance(module, Attention)}

def read_layer(backbone, size, module, x, output):
    """-> (B, heads + 1): the mean distance of each head and, last, that of uniform attention."""
    side = check_patches(backbone, x)
    apart = distances(side, side, size, x.device)
    found = mean_distance(attention_of(module, x, output, backbone.prefix), apart)
    return torch.cat([found, apart.mean().expand(len(x), 1)], 1)

def of_map(Z, size):
    """Feature map Z (C, H, W) -> (2,): its mean distance, that of uniform attention. Its self-attention:
    position i attends to every j, itself too, by the softmax over j of z_i . z_j / sqrt(C), where z are the
    channels there, as they are."""
    C, H, W = Z.shape
    z, total = Z.flatten(1).T.float(), 0
    for rows in torch.arange(H * W, device=z.device).split(1024):   # early maps have 10^4 positions
        apart = distances(H, W, size, z.device, rows)
        weights = (z[rows] @ z.T / math.sqrt(C)).softmax(-1)
        total = total + len(rows) * torch.stack([mean_distance(weights, apart), apart.mean()])
    return total / (H * W)

def stages_of(backbone, stem):
    """-> {name: module} of the stages that timm lists. Where a step is less than 4 pixels is the stem."""
    modules, found = dict(backbone.model.named_modules()), {}
    for stage in getattr(backbone.model, "feature_info", None) or []:
        if stage.get("module") in modules and (stem or stage.get("reduction", 4) >= 4):
            found[stage["module"]] = modules[stage["module"]]
    return found

def read_stage(backbone, size, module, x, output):
    """-> (B, 2), of_map of each image."""
    if not isinstance(output, torch.Tensor) or output.dim() != 4:
        raise UserError("its stages give tokens, no maps")
    maps = output.movedim(-1, 1) if getattr(backbone.model, "output_fmt", "NCHW") == "NHWC" else output
    return torch.stack([of_map(Z, size) for Z in maps])

def hook(modules, read):
    """Keep read(module, input, output) of each forward pass -> {module: [...]}, a function that takes the
    hooks away."""
    kept = {module: [] for module in modules}
    def keep(module, inputs, output):
        kept[module].append(read(module, inputs[0], output))
    hooks = [module.register_forward_hook(keep) for module in kept]
    def remove():
        for handle in hooks:
            handle.remove()
    return kept, remove

def measure(cfg, device, kind, modules_of, read):
    """-> {(run, model): (names, distances (images, layers, heads + 1))}. A model of another kind is left out
    with a word; raises UserError if there is no other."""
    runs, images = load(cfg)
    drawn, found = draw(images, cfg.images or 128, cfg.seed, "images"), {}
    for run, backbones in runs.items():
        for model, backbone in backbones.items():
            modules = modules_of(backbone)
            def read_one(module, x, output, backbone=backbone):
                return read(backbone, cfg.image_size, module, x, output).cpu()
            kept, remove = hook(modules.values(), read_one)
            try:
                if not modules:
                    raise UserError("it has no such layers")
                _, labels = look([backbone], images, drawn, cfg, device, f"{run} {model}")
                layers = [torch.cat(batches)[labels != mokd.NO_IMAGE] for batches in kept.values()]
                found[run, model] = [*modules], torch.stack(layers, 1).numpy()
            except UserError as stop:
                if stop.code == 1:   # not a matter of this model
                    raise
                warn(f"{cfg.figure}: skipped {model} of {run}: {stop}")
            remove()
    if not found:
        raise UserError(f"{cfg.figure}: no model is left; give --checkpoint or --arch of a {kind}")
    return found

def show_distances(cfg, found, what):
    """A panel for each architecture, in it a line for each run of it, with the deviation over images as a
    band, and a dot for each head -> figure, numbers."""
    by_arch, numbers = {}, {}
    for run, model in found:
        by_arch.setdefault(model.split()[-1], []).append((run, model))
    fig, axes = panels(cfg, 1, len(by_arch), 2.5, sharey=True)
    looks, heads, room = {}, False, fig.get_size_inches()[0] / len(by_arch) - 0.6
    for ax, (arch, series) in zip(axes[0], by_arch.items()):
        for run, model in series:
            names, pixels = found[run, model]
            of_heads, uniform = pixels[..., :-1], pixels[0, :, -1]
            start = f"{run}/{model}"
            numbers |= {f"{start}/distance": of_heads.mean(0), f"{start}/deviation": of_heads.std(0),
                        f"{start}/band": of_heads.mean(-1).std(0, ddof=1) if len(of_heads) > 1 else 0,
                        f"{start}/uniform": uniform, f"{start}/names": names}
            twice = sum(other == run for other, _ in series) > 1
            label = f"{run}, model {model.split()[0]}" if twice else run
            looks.setdefault(label, look_of(len(looks)))
            x = np.arange(1, len(names) + 1)
            line(ax, x, of_heads.mean(-1), **looks[label])
            if of_heads.shape[-1] > 1:
                heads = True
                # Beside the line, so that the dots of two runs do not hide each other.
                aside = x + 0.1 * (1 + [*looks].index(label))
                ax.plot(aside, of_heads.mean(0), ".", color=looks[label]["color"], markersize=4, alpha=0.6)
            ax.plot(x, uniform, ":", color="black")
        longest = max([found[s][0] for s in series], key=len)
        ax.set(title=arch, xlabel=what)
        if what == "stage":
            crowded = max(map(len, longest)) * 0.075 > room / len(longest)
            ax.set_xticks(range(1, len(longest) + 1), longest, rotation=30 if crowded else 0)
        else:
            ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel(f"mean distance (pixels of {cfg.image_size})")
    handles = [key(label, **look) for label, look in looks.items()]
    if heads:
        handles.append(key("a head", marker=".", linestyle="", color="gray"))
    handles.append(key("uniform attention", linestyle=":", color="black"))
    legend(fig, handles)
    return fig, numbers

def attention(cfg, device):
    """Mean attention distance of a ViT's heads and layers; with --maps the last layer's attention itself."""
    if cfg.maps:
        return attention_maps(cfg, device)
    return show_distances(cfg, measure(cfg, device, "ViT", layers_of, read_layer), "layer")

def featuremap(cfg, device):
    """The same for the stages of a CNN."""
    def modules_of(backbone):
        return stages_of(backbone, cfg.stem)
    return show_distances(cfg, measure(cfg, device, "CNN", modules_of, read_stage), "stage")

def map_of(backbone, module, x, output):
    """Attention to each patch, of sum 1 -> (B, heads, n): that of CLS, where CLS is the model's feature;
    where the mean of the patches is, the mean over patches as queries."""
    check_patches(backbone, x)
    if backbone.cls:
        return logits_of(module, x, output)[:, :, 0, backbone.prefix:].softmax(-1)
    return attention_of(module, x, output, backbone.prefix).mean(2)

def attention_maps(cfg, device):
    """A row for each image and run, a column for each head of the last block, and their mean, over the
    image."""
    runs, images = load(cfg)
    index = draw(images, cfg.images or 4, cfg.seed, "images")
    views = mokd.EvalView(Subset(images, index), cfg.image_size, cfg.resize)
    pixels = np.stack([view.numpy() / 255 for view, _ in views])
    maps, queries, numbers = {}, set(), dict(index=np.array(index), images=pixels)
    for run, backbones in runs.items():
        for model, backbone in backbones.items():
            def read_one(module, x, output, backbone=backbone):
                return map_of(backbone, module, x, output).cpu()
            kept, remove = hook([*layers_of(backbone).values()][-1:], read_one)
            try:
                if not kept:
                    raise UserError("it has no such layers")
                look([backbone], images, index, cfg, device, f"{run} {model}")
                found = torch.cat([*kept.values()][0]).numpy()
                label = run if len(backbones) == 1 else f"{run}\n{model}"
                maps[label] = np.concatenate([found, found.mean(1, keepdims=True)], 1) * found.shape[-1]
                queries.add("CLS as query" if backbone.cls else "mean over all patches as queries")
                numbers[f"{run}/{model}/maps"] = found
            except UserError as stop:
                if stop.code == 1:
                    raise
                warn(f"attention: skipped {model} of {run}: {stop}")
            remove()
    if not maps:
        raise UserError("attention: no model is left; give --checkpoint or --arch of a ViT")

    high, most = high_end(maps.values()), max(found.shape[1] for found in maps.values())
    fig, axes = grid(cfg, len(index) * len(maps), 1 + most)
    for ax in axes.flat:
        ax.axis("off")
    for row in range(len(axes)):
        i, label = row // len(maps), [*maps][row % len(maps)]
        axes[row, 0].axis("on")
        picture(axes[row, 0], pixels[i])
        axes[row, 0].set_ylabel(label)
        found = maps[label][i]
        side = math.isqrt(found.shape[-1])
        for head, ax in enumerate(axes[row, 1:len(found) + 1], 1):
            shown = picture(ax, pixels[i], found[head - 1].reshape(side, side), high)
            if row == 0:
                ax.set_title(f"head\n{head}" if head < len(found) else "mean")
    axes[0, 0].set_title("image")
    color_bar(fig, shown, axes, f"attention to a patch, times uniform; {' or '.join(sorted(queries))}")
    return fig, numbers

# ------------------------------------------------------------- what the feature search looks at (3.3, Fig. 3)
@torch.no_grad()
def look_of_search(t_head, Z, query):
    """Tokens Z (B, N, C) and a query (B, dim) of each image, through a T-Head -> attention (B, blocks, N) of
    the query to the tokens in each block, the mean over heads, whose sum is 1 less what the query pays to
    itself; change (B, N) of each output token by the query: the norm of the difference that the query makes,
    over the norm of the token without it."""
    norm = next(m for m in t_head.children() if isinstance(m, nn.LayerNorm))   # what leaves it is averaged
    def read_query(module, x, output):
        return logits_of(module, x, output).softmax(-1)[:, :, 0, 1:].mean(1)
    def read_tokens(module, x, output):
        return output
    kept, remove = hook([block.attn for block in t_head.blocks], read_query)
    t_head(Z, query)
    remove()
    attention = torch.stack([layer[0] for layer in kept.values()], 1)
    kept, remove = hook([norm], read_tokens)
    t_head(Z, query)
    t_head(Z)
    remove()
    with_query, without = kept[norm]
    change = (with_query[:, 1:] - without).norm(dim=-1) / without.norm(dim=-1).clamp_min(1e-12)
    return attention.cpu().numpy(), change.cpu().numpy()

@torch.no_grad()
def searches_of(models, query_view, searched_view):
    """Both directions of a pair -> {"1 to 2": (attention (B, blocks, N), change (B, N)), "2 to 1": ...}:
    student 1's view as the query among the tokens of momentum net 2, and the other way round. All nets as in
    evaluation: no stochastic depth, running statistics of batch norm."""
    found = {}
    for searcher, searched in (models, models[::-1]):
        student, momentum_net = searcher.net.eval(), searched.momentum_net.eval()
        pooled, _ = student.backbone(query_view)
        _, tokens = momentum_net.backbone(searched_view)
        query = student.t_head.query_of(pooled)
        found[f"{searcher.i} to {searched.i}"] = look_of_search(momentum_net.t_head, tokens, query)
    return found

def effective(attention):
    """Attention (..., N) to tokens -> (...): the number of tokens over which it is spread, exp of its
    entropy; uniform: N."""
    p = attention / attention.sum(-1, keepdims=True)
    return np.exp(-(p * np.log(np.maximum(p, 1e-30))).sum(-1))

def search(cfg, device):
    """Two rows for each image: trained above untrained. Left the view that searches and the one that is
    searched, then, for each direction, the query's attention in each block and the change of the tokens that
    the query causes."""
    saved = mokd.read_checkpoint(cfg.checkpoint[0], "Give the checkpoint.pth of a run of mokd.py")
    settings = settings_of(saved)
    if "t" not in settings.losses:
        raise UserError(f"search: {cfg.checkpoint[0]} was trained with --losses {settings.losses}, which "
                        "has no T-Head; give a run with ct")
    if cfg.view > 1 + settings.local_crops:
        raise UserError(f"--view {cfg.view}: the run has views 0 to {1 + settings.local_crops}; lower it")
    # Untrained means untrained, and what was trained is in the checkpoint.
    settings.init1, settings.init2, settings.compile = "", "", False
    settings.data, settings.data_root = cfg.data or settings.data, cfg.data_root or settings.data_root
    images = mokd.get_data(settings)[0]
    index = draw(images, cfg.images or 4, cfg.seed, "images")
    views, pixels = views_of(settings, images, index, device)
    models = mokd.build_models(settings, device)
    rows = dict(untrained=searches_of(models, views[cfg.view], views[0]))
    with mokd.fitting(cfg.checkpoint[0], "Give the checkpoint.pth of a run of mokd.py"):
        for model in models:
            model.load_state(saved[f"model{model.i}"])
    rows = dict(trained=searches_of(models, views[cfg.view], views[0]), **rows)

    numbers = dict(index=np.array(index), query_view=pixels[cfg.view], searched_view=pixels[0])
    for name, found in rows.items():
        for direction, (weights, change) in found.items():
            numbers |= {f"{direction}/{name}/attention": weights, f"{direction}/{name}/change": change}
            spread = ", ".join(f"{n:.1f}" for n in effective(weights).mean(0))
            to_tokens = 100 * weights.sum(-1).mean()
            say(f"{direction}, {name}: {to_tokens:.0f} % of the query's attention goes to tokens, spread "
                f"over {spread} of {weights.shape[-1]} (exp of its entropy, by block); it changes a token by "
                f"{100 * change.mean():.2f} %")
    return show_search(cfg, settings, rows, pixels[cfg.view], pixels[0]), numbers

def show_search(cfg, settings, rows, query_view, searched_view):
    """The figure of search: rows {"trained": {direction: (attention, change)}, "untrained": ...}, views (B,
    3, s, s)."""
    cells = {}   # (name, direction) -> [maps (B, N) of the blocks, times uniform; of the change in percent]
    for name, found in rows.items():
        for direction, (weights, change) in found.items():
            cells[name, direction] = [*np.moveaxis(weights * (weights.shape[-1] + 1), 1, 0), 100 * change]
    high = high_end([np.stack(maps[:-1]) for maps in cells.values()])
    high_change = high_end([maps[-1] for maps in cells.values()])
    depth, directions = settings.t_depth, [*rows["trained"]]
    columns = 1 + len(directions) * (depth + 1)
    fig, axes = grid(cfg, 2 * len(query_view), columns)
    for row, cells_of_row in enumerate(axes):
        i, name = row // 2, "untrained" if row % 2 else "trained"
        picture(cells_of_row[0], searched_view[i] if row % 2 else query_view[i])
        cells_of_row[0].set_ylabel("tokens" if row % 2 else "query")
        column = 1
        for direction in directions:
            cells_of_row[column].set_ylabel("before" if row % 2 else "after")
            for block, maps in enumerate(cells[name, direction], 1):
                ax, side = cells_of_row[column], math.isqrt(maps.shape[-1])
                what = f"block {block}" if block <= depth else "change"
                if block <= depth:
                    of_attention = picture(ax, searched_view[i], maps[i].reshape(side, side), high)
                else:
                    of_change = picture(ax, searched_view[i], maps[i].reshape(side, side), high_change)
                if row == 0:
                    ax.set_title(f"{direction.replace(' to ', '→')}\n{what}")
                column += 1
    axes[0, 0].set_title("views")
    middle = columns // 2
    color_bar(fig, of_attention, axes[:, :middle], "query's attention, times uniform")
    color_bar(fig, of_change, axes[:, middle:], "change of a token by the query (%)")
    title = (f"1→2: a query of 1 ({settings.arch1}) among the tokens of 2 ({settings.arch2}); 2→1: the "
             "other way; before and after training")
    fig.suptitle(wrap(fig, title))
    return fig

# ------------------------------------------------------------------------------------------------------ views
def crops(cfg, device):
    """A row an image, a column a view, all at one scale: those of a run (--checkpoint), or of mokd.py's
    settings."""
    settings = cfg.views
    if settings is None:
        saved = mokd.read_checkpoint(cfg.checkpoint[0], "Give the checkpoint.pth of a run of mokd.py")
        settings = settings_of(saved)
        settings.data, settings.data_root = cfg.data or settings.data, cfg.data_root or settings.data_root
    images = mokd.get_data(settings)[0]
    index = draw(images, cfg.images or 4, cfg.seed if cfg.views is None else settings.seed, "images")
    _, pixels = views_of(settings, images, index, device)

    # Panels are placed by hand, so that a pixel has the same size in all views, and no view is cut.
    from matplotlib.figure import Figure
    sizes, gap, top = [view.shape[-1] for view in pixels], 0.03, 0.2   # pixels; inches
    inches = (cfg.width - gap * (len(sizes) + 1)) / sum(sizes)        # of a pixel
    inches = min(inches, LARGEST / max(sizes))
    height = max(sizes) * inches
    fig = Figure((gap * (len(sizes) + 1) + inches * sum(sizes), top + len(index) * (height + gap)))
    width, total = fig.get_size_inches()
    for row in range(len(index)):
        x = gap
        for v, (size, view) in enumerate(zip(sizes, pixels)):
            y = total - top - row * (height + gap) - size * inches
            ax = fig.add_axes([x / width, y / total, size * inches / width, size * inches / total])
            picture(ax, view[row])
            if row == 0 and v in (0, 2):
                ax.set_title("global" if v == 0 else "local", loc="left", pad=3)
            x += size * inches + gap
    numbers = {"global": np.stack(pixels[:2]), "index": np.array(index)}
    numbers["local"] = np.stack(pixels[2:]) if pixels[2:] else np.empty(0)
    return fig, numbers

# ------------------------------------------------------------------------------------------------------- logs
LOSSES = ("sm", "st", "cm", "ct")
PANELS = {   # label -> what the MLP-Head has, what the T-Head has
    "self-distillation\nloss": ("sm", "st"), "cross-distillation\nloss": ("cm", "ct"),
    "entropy of\ntargets (nats)": ("entropy_m", "entropy_t"),
    "spread of\ntargets (nats)": ("spread_m", "spread_t"), "learning rate": ("lr",)}
LOGGED = sum(PANELS.values(), ("loss", "knn"))

def name_of_setting(argument):
    """What --log gives -> its name: a file's folder, a folder's name, what a pattern begins with."""
    if glob.has_magic(argument):
        return os.path.basename(re.split(r"[*?[]", argument)[0].rstrip("/-_."))
    path = os.path.abspath(argument)
    return os.path.basename(path if os.path.isdir(path) else os.path.dirname(path))

def files_of(argument):
    """What --log gives -> its logs: a file, every log.jsonl in a folder, or those of a pattern."""
    found = []
    for path in sorted(glob.glob(argument)) if glob.has_magic(argument) else [argument]:
        if os.path.isdir(path):
            found += sorted(glob.glob(f"{glob.escape(path)}/**/log.jsonl", recursive=True))
        else:
            found.append(path)
    if not found:
        raise UserError(f"--log {argument}: no log.jsonl there")
    return found

def read_log(file):
    """log.jsonl -> {name: {step: value}}, k-NN by the epochs trained. Of a step that a resumed run did again,
    the last record counts. Torn lines, which a killed run or a full disk leaves, are skipped with a word.
    Raises UserError."""
    names = {f"{name}1" for name in LOGGED} | {f"{name}2" for name in LOGGED}
    table, torn = {}, []
    try:
        with open(file, errors="replace") as f:
            lines = f.read().split("\n")
    except OSError as error:
        raise UserError(f"--log {file}: cannot be read ({error.strerror})") from error
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text) if text.strip() else {}
        except ValueError:
            torn.append(number)
            continue
        if not isinstance(record, dict):
            continue
        for name in names & record.keys():
            at = record.get("epoch", -1) + 1 if name.startswith("knn") else record.get("step")
            if isinstance(record[name], (int, float)) and isinstance(at, int):
                table.setdefault(name, {})[at] = record[name]
    if not table:
        raise UserError(f"--log {file}: holds no losses and no k-NN of mokd.py")
    if torn:
        some = ", ".join(map(str, torn[:5])) + (", ..." if len(torn) > 5 else "")
        warn(f"--log {file}: skipped {len(torn)} torn {'line' if len(torn) == 1 else 'lines'} ({some})")
    return table

def read_logs(cfg):
    """-> {setting: [table of read_log, for each run]}. In a folder other programs may have logs: skipped with
    a word."""
    settings = {}
    for name, argument in zip(cfg.names, cfg.log):
        settings[name] = []
        for file in files_of(argument):
            try:
                settings[name].append(read_log(file))
            except UserError as stop:
                if [file] == [argument]:
                    raise
                warn(f"skipped: {stop}")
        if not settings[name]:
            raise UserError(f"--log {argument}: no log.jsonl of mokd.py there")
    return settings

def together(tables, name, setting):
    """Tables of the runs of one setting -> the steps (n,) at which all have a value of this name, the values
    (runs, n)."""
    steps = {*tables[0].get(name, {})}
    every = set(steps)
    for table in tables[1:]:
        steps &= {*table.get(name, {})}
        every |= {*table.get(name, {})}
    if len(steps) < len(every):
        warn(f"{setting}: {name} is shown at {len(steps)} of {len(every)} steps, those that all "
             f"{len(tables)} logs have")
    steps, values = sorted(steps), []
    for table in tables:
        values.append([table[name][step] for step in steps])
    return np.array(steps), np.array(values)

def add_line(ax, numbers, setting, tables, name, **options):
    """A setting's line and band of one name, if its logs have it -> whether they do."""
    steps, values = together(tables, name, setting)
    if not len(steps):
        return False
    numbers |= {f"{setting}/{name}": values, f"{setting}/{name}/steps": steps}
    line(ax, steps, values, **options)
    return True

def titles_of(cfg):
    if len(cfg.titles) not in (0, 2):
        raise UserError(f"--titles: give two, one for each model, not {len(cfg.titles)}")
    return cfg.titles or ("model 1", "model 2")

def keys_of_settings(settings):
    """Entries of a legend: each setting, and how many runs it has where that is more than one."""
    handles = []
    for k, (name, tables) in enumerate(settings.items()):
        handles.append(key(f"{name}, {len(tables)} runs" if len(tables) > 1 else name, **look_of(k)))
    return handles

def curves(cfg, device):
    """k-NN over epochs, a panel a model; a line for each setting, the mean of its runs, and their standard
    deviation as a band."""
    settings, numbers = read_logs(cfg), {}
    fig, axes = panels(cfg, 1, 2, 2.3, sharex=True, sharey=True)
    for i, ax, title in zip("12", axes[0], titles_of(cfg)):
        for k, (name, tables) in enumerate(settings.items()):
            if not add_line(ax, numbers, name, tables, f"knn{i}", **look_of(k)):
                raise UserError(f"curves: the logs of {name} have no k-NN in common; train with "
                                "--knn_every, or draw losses")
        if cfg.pixels is not None:
            ax.axhline(cfg.pixels, linestyle=":", color="black")
        ax.set(title=title, xlabel="epochs")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("k-NN top-1 (%)")
    handles = keys_of_settings(settings)
    if cfg.pixels is not None:
        handles.append(key("raw pixels", linestyle=":", color="black"))
    legend(fig, handles)
    return fig, numbers

def losses(cfg, device):
    """A row a quantity, a column a model, a line and band for each setting. A total of losses shares a panel
    only with totals of the same terms."""
    settings, numbers = read_logs(cfg), {}
    rows = []   # (label, names, settings shown)
    for name, tables in settings.items():
        terms = ", ".join(term for term in LOSSES if f"{term}1" in tables[0] or f"{term}2" in tables[0])
        label = f"loss\n({terms})" if terms else "loss"
        same = [row for row in rows if row[0] == label]
        if same:
            same[0][2].append(name)
        else:
            rows.append((label, ("loss",), [name]))
    rows += [(label, group, [*settings]) for label, group in PANELS.items()]
    rows = [row for row in rows if any_has(settings, row)]
    if not rows:
        raise UserError("losses: the logs hold k-NN alone; draw curves")
    fig, axes = panels(cfg, len(rows), 2, 1.35, sharex=True, sharey="row")
    for pair, (label, group, shown) in zip(axes, rows):
        pair[0].set_ylabel(label)
        for i, ax in zip("12", pair):
            for k, (name, tables) in enumerate(settings.items()):
                for quantity, style in zip(group, ("-", "--")):
                    if name in shown:
                        look = dict(color=f"C{k % 10}", linestyle=style)
                        add_line(ax, numbers, name, tables, f"{quantity}{i}", **look)
    for ax, title in zip(axes[0], titles_of(cfg)):
        ax.set_title(title)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    fig.align_ylabels(axes[:, 0])
    handles = []
    for handle in keys_of_settings(settings):
        handle.set_marker("")
        handles.append(handle)
    if any(len(group) > 1 for _, group, _ in rows):
        handles += [key("MLP-Head", color="black"), key("T-Head", color="black", linestyle="--")]
    legend(fig, handles)
    return fig, numbers

def any_has(settings, row):
    """Whether any run has a value for this row of losses."""
    _, group, shown = row
    for name in shown:
        for table in settings[name]:
            for quantity in group:
                if f"{quantity}1" in table or f"{quantity}2" in table:
                    return True
    return False

FIGURES = dict(tsne=tsne, attention=attention, featuremap=featuremap, search=search, crops=crops,
               curves=curves, losses=losses)

if __name__ == "__main__":
    sys.exit(mokd.main(program="extras/figures.py", parse=parse, run=run))
