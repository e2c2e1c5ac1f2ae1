"""The paper's figures from runs of mokd.py, and what the feature search looks at.

    python extras/figures.py attention --checkpoint runs/alone/0/checkpoint.pth runs/mokd/0/checkpoint.pth
    python extras/figures.py curves --log runs/alone runs/mokd
    python extras/figures.py crops --data FOLDER --local_size 64

README.md beside this file has a command for each figure.
"""
import math
import os
import sys
import textwrap
from dataclasses import dataclass

# mokd.py and eval_knn.py lie in the folder above this one.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import mokd   # noqa: E402, before torch
import matplotlib
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.utils import AttentionExtract
from torch.utils.data import Subset, default_collate

from eval_knn import Source, labels_of, load_backbones
from mokd import flag, stop
from results import logs_of, read_run, refuse_mixed

matplotlib.use("agg")   # which needs no screen
import matplotlib.pyplot as plt   # noqa: E402
plt.rcParams["figure.constrained_layout.h_pad"] = 0.08   # inches; with less a color bar's label is cut

ABOUT = ("The first word names the figure: tsne, attention, featuremap, maps, search, curves or losses; or"
         " crops, with the flags of mokd.py.")

@dataclass
class Config(Source):
    checkpoint: tuple[str, ...] = flag((), "checkpoint.pth of one or more runs of mokd.py")
    log: tuple[str, ...] = flag((), "a log for each line, or a folder or pattern with those of its seeds")
    names: tuple[str, ...] = flag((), "what legends call the runs; unset: their folders")
    titles: tuple[str, str] = flag(("model 1", "model 2"), "titles of the panels of curves and losses")
    out: str = flag("", "folder for FIGURE.png and FIGURE.pdf; unset: here")
    part: str = flag("val", "whose center crops are shown", choices=("train", "val"))
    images: int = flag(128, "images of which attention, featuremap and the numbers of search are the mean")
    view: int = flag(1, "the view that searches, in search: 1 is global, 2 and more are local")
    classes: int = flag(10, "classes of tsne, drawn by --seed [Fig. 4]")
    per_class: int = flag(50, "images of a class of tsne, drawn by --seed")
    pixels: float = flag(None, "top-1 of raw pixels, a dotted line in curves", high=100)

def parse(argv=None):
    """The command line, a figure's name first -> Config, for crops mokd.py's; with .figure."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    figure = argv.pop(0) if argv[0] in FIGURES else ""
    cfg = mokd.parse_args(argv) if figure == "crops" else mokd.read_flags(Config, argv, ABOUT)
    cfg.figure = figure
    if figure != "crops":
        if len(set(cfg.names)) < len(cfg.names):
            stop("--names: each run wants its own")
        if 0 in (cfg.images, cfg.classes, cfg.per_class, cfg.image_size, cfg.resize):
            stop("--images, --classes, --per_class, --image_size and --resize must be more than 0")
    return cfg

def run(cfg):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fig = FIGURES[cfg.figure](cfg, device)
    os.makedirs(cfg.out or ".", exist_ok=True)
    for ending in ("png", "pdf"):
        path = os.path.join(cfg.out, f"{cfg.figure}.{ending}")
        fig.savefig(path, dpi=200)
        print(f"wrote {path}")
    plt.close(fig)

# ---------------------------------------------------------------------------------------------------- drawing
WIDTH = 8   # inches, so that letters of 10 points can be read at a width of 800 pixels
SHOWN = 2   # images in maps and search

def panels(rows, columns, height, **options):
    """An empty figure of rows * columns panels, each `height` inches high -> figure, axes (rows, columns)."""
    return plt.subplots(rows, columns, figsize=(WIDTH, rows * height + 0.4), squeeze=False,
                        layout="constrained", **options)

def pictures(rows, columns):
    """The same for square pictures, which have no axes."""
    fig, axes = panels(rows, columns, WIDTH / columns)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    return fig, axes

def draw(ax, x, values, color, label, style="o-"):
    """Values (n, len(x)) of n runs or images: their mean as a line, their standard deviation as a band."""
    mean = values.mean(0)
    ax.plot(x, mean, style, color=color, label=label, markersize=3)
    if len(values) > 1:
        deviation = values.std(0)
        ax.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)

def visible(x):
    """Normalized views (..., 3, S, S) -> (..., S, S, 3) in [0, 1]."""
    mean, std = mokd.MEAN_STD.to(x.device)
    return (x * std + mean).clamp(0, 1).movedim(-3, -1).cpu()

def overlay(ax, image, values, high):
    """Values (N,) of patches in color, from 0 to high, over an image (S, S, 3) in gray -> for a color bar."""
    side, size = math.isqrt(len(values)), len(image)
    ax.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1)
    return ax.imshow(values.view(side, side).cpu(), cmap="inferno", vmin=0, vmax=high, alpha=0.65,
                     extent=(-0.5, size - 0.5, size - 0.5, -0.5))

# ------------------------------------------------------------------------------------------ models and images
def load(cfg, device):
    """-> {run: {model: Backbone}}, the images."""
    runs = {}
    for name, backbone in load_backbones(cfg).items():
        run, _, model = name.rpartition(": ")
        runs.setdefault(run, {})[model] = backbone.to(device).eval()
    return dict(zip(cfg.names or runs, runs.values(), strict=True)), mokd.get_images(cfg, cfg.part)

def load_some(cfg, device, n, vits):
    """-> [(run, model, Backbone)], the ViTs or all others; n images that can be read, as (n, 3, S, S)."""
    runs, images = load(cfg, device)
    found = []
    for run, backbones in runs.items():
        for model, backbone in backbones.items():
            if isinstance(backbone.model, VisionTransformer) == vits:
                found.append((run, model, backbone))
    if not found:
        stop(f"{cfg.figure}: there is no {'ViT' if vits else 'CNN'} in these runs")
    views = mokd.EvalView(images, cfg.image_size, cfg.resize)
    crops = [views[int(i)] for i in shuffled(len(images), cfg.seed)[:n]]
    x = torch.stack([crop for crop, label in crops if label != mokd.NO_IMAGE])
    return found, mokd.normalize(x.to(device).float() / 255)

def shuffled(n, seed):
    return torch.randperm(n, generator=mokd.generator(seed, "figure"))

def training_views(cfg, n, device):
    """Views of n images, or of all, as training with these settings makes them -> V tensors (n, 3, S, S)."""
    images = mokd.get_images(cfg, "train")
    rows = shuffled(len(images), cfg.seed)[:n].tolist()
    cfg.batch_size = len(rows)
    crops, _ = default_collate([mokd.MultiCrop(images, cfg)[0, i] for i in rows])
    views = []
    for x in mokd.make_views(crops, cfg, device, 0):   # those of one size
        views += x.split(len(rows))
    return views

# ------------------------------------------------------------------------------------------ features (Fig. 4)
def features(cfg, backbones, images, rows, device):
    """-> [features (n, C) of each backbone], labels (n,), of some rows of images."""
    views = mokd.EvalView(Subset(images, rows.tolist()), cfg.image_size, cfg.resize)
    found, labels = mokd.extract_features(list(backbones), views, device)
    return [own.float().cpu() for own in found], labels.cpu()

def relative(features, anchors):
    """Features of images (n, C) and of anchor images (A, C) -> (n, A), alike for models of any width: cosines
    to the anchors [Moschella et al. 2023], each column with mean 0 and deviation 1, each row of length 1."""
    cosine = F.normalize(features, dim=1) @ F.normalize(anchors, dim=1).T
    return F.normalize((cosine - cosine.mean(0)) / cosine.std(0).clamp_min(1e-6), dim=1)

def agreement(z1, z2, labels):
    """Percent of points (n, A) whose class the other model's nearest point has, the same image's left out."""
    cosine = (z1 @ z2.T).fill_diagonal_(-2)
    hits = [labels[cosine.argmax(dim)] == labels for dim in (0, 1)]
    return 100 * torch.cat(hits).double().mean().item()

def tsne(cfg, device):
    """A panel a run, with a t-SNE of both its models together."""
    from sklearn.manifold import TSNE
    runs, images = load(cfg, device)
    labels, order = labels_of(images), shuffled(len(images), cfg.seed)
    classes = labels[labels >= 0].unique()
    classes = classes[shuffled(len(classes), cfg.seed)[:cfg.classes]].sort().values
    rows = torch.cat([order[labels[order] == c][:cfg.per_class] for c in classes])
    if len(rows) < 2:
        stop("tsne: one image has no neighbors; raise --classes or --per_class")
    anchors = order[~torch.isin(order, rows)][:512]
    if len(anchors) < 8:   # few images: all are anchors, too
        anchors = order[:512]
    names = getattr(images, "classes", range(1 + labels.max()))
    colors = plt.get_cmap("tab10" if len(classes) <= 10 else "turbo", len(classes))

    fig, axes = panels(1, len(runs), 4.5)
    for ax, (run, backbones) in zip(axes[0], runs.items()):
        own, y = features(cfg, backbones.values(), images, rows, device)
        of_anchors, _ = features(cfg, backbones.values(), images, anchors, device)
        z = [relative(f, a) for f, a in zip(own, of_anchors)]
        points = torch.cat(z).numpy()
        perplexity = min(30, (len(points) - 1) / 3)   # 30 is usual, and must be less than the points
        xy = TSNE(init="pca", random_state=cfg.seed, perplexity=perplexity).fit_transform(points)
        for model, marker, points in zip(backbones, "o^", xy.reshape(len(z), -1, 2)):
            for i, c in enumerate(classes):
                label = names[c] if marker == "o" else None   # once
                ax.scatter(*points[y == c].T, s=10, color=colors(i), marker=marker, label=label)
            ax.scatter([], [], color="black", marker=marker, label=model)
        ax.set(title=run, xticks=[], yticks=[])
        if len(z) == 2:
            ax.set_xlabel(f"other model's nearest point has\nthe same class: {agreement(*z, y):.0f} %")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return fig

# --------------------------------------------------------------------------------- attention's reach (Fig. 5)
def mean_distance(attention, size):
    """Attention (..., N, N) among the patches of an image of size * size pixels, a row sums to 1 -> (...):
    pixels to all keys, weighted by attention, then the mean over queries [ViT: Dosovitskiy et al. 2021, D.7];
    the same of uniform attention."""
    side = math.isqrt(attention.shape[-1])
    at = torch.arange(side).to(attention) * size / side
    corner = torch.cartesian_prod(at, at)   # as far apart as the centers are
    apart = (corner[:, None] - corner).norm(dim=-1)
    return (attention * apart).sum(-1).mean(-1), apart.mean()

def keep_attention(net, *more):
    """-> timm's extractor of the attention in a net's blocks, and of what more modules give."""
    for module in net.modules():
        if hasattr(module, "fused_attn"):   # which never has all weights
            module.fused_attn = False
    return AttentionExtract(net, ["*attn_drop", *more], method="hook")

def among_patches(attention, prefix):
    """Attention (..., Q, N) to patches alone, without CLS and registers; a row sums to 1 again. It
    must come in double, because a trained head may pay its patches less than float32 can hold."""
    attention = attention[..., prefix:]
    return attention / attention.sum(-1, keepdim=True)

@torch.no_grad()
def reach_of_vit(backbone, x):
    """Images (n, 3, S, S) -> mean distances (n, layers, heads), those of uniform attention (layers)."""
    extract, prefix, found = keep_attention(backbone.model.double()), backbone.prefix_tokens, []
    for part in x.double().split(16):
        layers = [among_patches(weights[:, :, prefix:], prefix) for weights in extract(part).values()]
        pixels, uniform = zip(*[mean_distance(weights, x.shape[-1]) for weights in layers])
        found.append(torch.stack(pixels, 1))
    return torch.cat(found).cpu(), torch.stack(uniform).cpu()

@torch.no_grad()
def reach_of_cnn(backbone, x):
    """The same for the last four stages, as of one head. Position i of a map attends to each j by the softmax
    over j of z_i . z_j / sqrt(C) [ours, because the paper gives no formula]."""
    found = []
    for part in x.split(8):
        stages = []
        for Z in backbone.model.forward_intermediates(part, indices=4, intermediates_only=True):
            z = Z.flatten(2).mT
            weights = (z @ z.mT / math.sqrt(z.shape[-1])).softmax(-1)
            stages.append(mean_distance(weights, x.shape[-1]))
        pixels, uniform = zip(*stages)
        found.append(torch.stack(pixels, 1)[..., None])
    return torch.cat(found).cpu(), torch.stack(uniform).cpu()

def reach(cfg, device):
    """attention and featuremap: a panel a ViT or a CNN, with a line for each run, a dot for each head."""
    vits = cfg.figure == "attention"
    backbones, x = load_some(cfg, device, cfg.images, vits)
    measure = reach_of_vit if vits else reach_of_cnn
    found = {}   # model -> run -> distances
    for run, model, backbone in backbones:
        found.setdefault(model, {})[run] = measure(backbone, x)
    fig, axes = panels(1, len(found), 3.2, sharey=True)
    for ax, (model, own) in zip(axes[0], found.items()):
        for i, (run, (pixels, uniform)) in enumerate(own.items()):
            layers = torch.arange(1, len(uniform) + 1)
            draw(ax, layers, pixels.mean(-1), f"C{i}", run)
            if vits:   # dots beside the line, so that those of two runs do not hide each other
                ax.plot(layers + 0.1 * (i + 1), pixels.mean(0), ".", color=f"C{i}", alpha=0.6)
        ax.plot(layers, uniform, ":", color="black", label="uniform attention")
        ax.set(title=model, xlabel="layer" if vits else "stage", xticks=layers)
        ax.legend()
    axes[0, 0].set_ylabel("mean distance in pixels")
    return fig

@torch.no_grad()
def last_block(backbone, x):
    """Attention to each patch (n, heads + 1, N), the last the mean of all heads, times uniform attention.
    The query is CLS where CLS is the model's feature; else it is the mean over all patches as queries."""
    *_, weights = keep_attention(backbone.model.double())(x.double()).values()
    prefix = backbone.prefix_tokens
    queries = weights[:, :, :1] if backbone.cls else weights[:, :, prefix:]
    weights = among_patches(queries, prefix).mean(2)
    return torch.cat([weights, weights.mean(1, keepdim=True)], 1) * weights.shape[-1]

def maps(cfg, device):
    """A row for each image and ViT: the image, the last block's attention, of each head and of all."""
    vits, x = load_some(cfg, device, SHOWN, True)
    found = {f"{run} {model}": last_block(vit, x) for run, model, vit in vits}
    high = max(weights.max() for weights in found.values())
    columns = 1 + max(weights.shape[1] for weights in found.values())
    fig, axes = pictures(len(x) * len(found), columns)
    rows = [(image, name) for image in range(len(x)) for name in found]
    for of_row, (i, name) in zip(axes, rows):
        image = visible(x[i])
        of_row[0].imshow(image)
        of_row[0].set_ylabel(textwrap.fill(name, 16))
        for head, weights in enumerate(found[name][i], 1):
            shown = overlay(of_row[head], image, weights, high)
            of_row[head].set_title(f"head {head}" if head < len(found[name][i]) else "all heads")
    label = "attention to a patch in the last block, times uniform attention"
    fig.colorbar(shown, ax=axes, location="bottom", aspect=40, label=label)
    return fig

# ------------------------------------------------------------- what the feature search looks at (3.3, Fig. 3)
def look(t_head, tokens, query):
    """Tokens (B, N, C) and a query (B, dim) of each image -> attention (B, blocks, N) of the query to the
    tokens, mean over heads, which sums to 1 less what the query pays to itself; change (B, N), how far the
    query moves each output token, over that token's length; logits without and with the query, (B, K)."""
    extract = keep_attention(t_head, "norm")   # what leaves norm is averaged
    logits = t_head(tokens)
    *_, without = extract.hooks.get_output(tokens.device).values()
    searched = t_head(tokens, query)
    *weights, with_query = extract.hooks.get_output(tokens.device).values()
    attention = torch.stack([own[:, :, 0, 1:].mean(1) for own in weights], 1)
    change = (with_query[:, 1:] - without).norm(dim=-1) / without.norm(dim=-1)
    return attention, change, logits, searched

@torch.no_grad()
def look_both_ways(models, query_view, searched_view, tau_):
    """Views (B, 3, S, S) -> [(attention, change, by_query, by_image)]: student 1's query among momentum net
    2's tokens, and the other way round. by_query (B,) is the part of a target that is elsewhere without the
    query, by_image with another image's. All nets run as in evaluation."""
    found = []
    for model, other in (models, models[::-1]):
        student, momentum_net = model.net.eval(), other.n_.eval()
        query = student.t_head.query_of(student.backbone(query_view)[0])
        tokens = momentum_net.backbone(searched_view)[1]
        attention, change, *logits = look(momentum_net.t_head, tokens, query)
        logits.append(momentum_net.t_head(tokens, query.roll(1, 0)))
        without, p, by_another = [mokd.target(t, momentum_net.C_t, tau_) for t in logits]
        found.append((attention, change, *[(p - q).abs().sum(-1) / 2 for q in (without, by_another)]))
    return found

def effective(attention):
    """Attention (..., N) -> (...): over how many tokens it is spread, exp of its entropy. Uniform: N."""
    p = attention / attention.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()

def search(cfg, device):
    """Two rows an image, one for each model that searches; means over all images are printed."""
    saved = mokd.read_checkpoint(cfg.checkpoint[0])
    settings = mokd.Config(**saved["config"])
    if "ct" not in settings.losses:
        stop(f"search: {cfg.checkpoint[0]} was trained without ct")
    settings.init1 = settings.init2 = ""   # untrained means untrained; what was trained is loaded below
    settings.data = cfg.data or settings.data
    views = training_views(settings, cfg.images, device)
    query_view, searched_view = views[cfg.view], views[0]
    models = mokd.build_models(settings, device)
    untrained = look_both_ways(models, query_view, searched_view, settings.teacher_temp)
    for model in models:
        model.net.load_state_dict(saved[f"model{model.i}"]["net"])
        model.n_.load_state_dict(saved[f"model{model.i}"]["momentum_net"])
    trained = look_both_ways(models, query_view, searched_view, settings.teacher_temp)

    names = [f"{settings.arch1} in {settings.arch2}", f"{settings.arch2} in {settings.arch1}"]
    for when, found in (("untrained", untrained), ("trained", trained)):
        for name, (weights, change, by_query, by_image) in zip(names, found):
            print(f"{when}, {name}: attention is spread over {effective(weights).mean():.1f} of "
                  f"{weights.shape[-1]} patches, a token changes by {100 * change.mean():.2f} %, "
                  f"a query moves {100 * by_query.mean():.1f} % of a target, and another image's query "
                  f"{100 * by_image.mean():.1f} % of that with its own")
    n = min(SHOWN, len(searched_view))
    times = [weights[:n] * (weights.shape[-1] + 1) for weights, *_ in trained]   # the query is a token too
    percent = [100 * change[:n] for _, change, *_ in trained]
    columns = ["query", "searched", *[f"block {b + 1}" for b in range(settings.t_depth)], "change"]
    fig, axes = pictures(2 * n, len(columns))
    for row, of_row in enumerate(axes):
        i, way = divmod(row, 2)
        of_row[0].set_ylabel(textwrap.fill(names[way], 16))
        of_row[0].imshow(visible(query_view[i]))
        image = visible(searched_view[i])
        of_row[1].imshow(image)
        for ax, weights in zip(of_row[2:], times[way][i]):
            of_attention = overlay(ax, image, weights, max(own.max() for own in times))
        of_change = overlay(of_row[-1], image, percent[way][i], max(own.max() for own in percent))
    for ax, name in zip(axes[0], columns):
        ax.set_title(name)
    label = "attention to a patch, times uniform attention"
    fig.colorbar(of_attention, ax=axes[:, :-1], location="bottom", aspect=40, label=label)
    fig.colorbar(of_change, ax=axes[:, -1:], location="bottom", label="%")
    fig.suptitle("A query, one model's feature of the left view, searches the other model's patches of the\n"
                 "second view. In color: its attention to each patch, and how far it changes each.")
    return fig

# ------------------------------------------------------------------------------------------------ views, logs
def crops(cfg, device):
    """What mokd.py with these flags would train on: a row an image, a column a view, all at one scale."""
    views = [visible(x) for x in training_views(cfg, 4, device)]
    size = 2 + max(x.shape[1] for x in views)
    padded = [F.pad(x, (0, 0, 0, 2, 0, size - x.shape[1]), value=1) for x in views]
    picture = torch.cat(padded, 2).flatten(0, 1)
    fig, axes = panels(1, 1, WIDTH * picture.shape[0] / picture.shape[1])
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title(f"two global and {cfg.local_crops} local views of an image")
    axes[0, 0].axis("off")
    return fig

def table_of(run):
    """A log -> {name: {x: value}}: x is the number of epochs for k-NN, and the step for all else. Where a
    resumed run did a step again, the last record counts."""
    table = {}
    for record in run.records:
        for name, value in record.items():
            x = record["epoch"] + 1 if name.startswith("knn") else record.get("step")
            table.setdefault(name, {})[x] = value
    return table

def tables_of(cfg, name):
    """-> [(label, tables of the logs that hold this name)] of each setting."""
    settings = []
    for label, log in zip(cfg.names or cfg.log, cfg.log, strict=True):
        runs = [read_run(file, found) for file, found in logs_of(log).items()]
        runs = [run for run in runs if name in table_of(run)]
        if not runs:
            stop(f"--log {log}: no log with {name} is there")
        if len(runs) > 1:
            refuse_mixed(runs)
        tables = [table_of(run) for run in runs]
        settings.append((f"{label}, {len(tables)} seeds" if len(tables) > 1 else label, tables))
    return settings

def draw_runs(ax, tables, name, color, label, style="o-"):
    """A line and a band for runs of one setting, where all of them have values."""
    x = sorted(set.intersection(*[set(table.get(name, ())) for table in tables]))
    if x:
        draw(ax, x, torch.tensor([[table[name][at] for at in x] for table in tables]), color, label, style)

def curves(cfg, device):
    """k-NN over epochs, a panel a model: mean and standard deviation of each setting's runs."""
    settings = tables_of(cfg, "knn1")
    fig, axes = panels(1, 2, 3.2, sharey=True)
    for name, ax, title in zip(("knn1", "knn2"), axes[0], cfg.titles):
        for k, (label, tables) in enumerate(settings):
            draw_runs(ax, tables, name, f"C{k}", label)
        if cfg.pixels is not None:
            ax.axhline(cfg.pixels, linestyle=":", color="black", label="raw pixels")
        ax.set(title=title, xlabel="epochs")
        ax.locator_params("x", integer=True)
    axes[0, 0].set_ylabel("k-NN top-1, %")
    axes[0, 1].legend()
    return fig

LOGGED = {"loss": ["loss"], "self-distillation": ["sm", "st"], "cross-distillation": ["cm", "ct"],
          "entropy\nof targets": ["entropy_m", "entropy_t"], "spread\nof targets": ["spread_m", "spread_t"],
          "learning rate": ["lr"]}

def losses(cfg, device):
    """A row a quantity, a column a model."""
    settings = tables_of(cfg, "loss1")
    fig, axes = panels(len(LOGGED), 2, 1.6, sharex=True)
    for of_row, (quantity, names) in zip(axes, LOGGED.items()):
        of_row[0].set_ylabel(quantity)
        for i, ax in zip("12", of_row):
            for k, (label, tables) in enumerate(settings):
                for name, style in zip(names, ("-", "--")):
                    draw_runs(ax, tables, name + i, f"C{k}", label, style)
    for top, bottom, title in zip(axes[0], axes[-1], cfg.titles):
        top.set_title(title)
        top.legend()
        bottom.set_xlabel("step; dashed: T-Heads")
    return fig

FIGURES = dict(tsne=tsne, attention=reach, featuremap=reach, maps=maps, search=search, curves=curves,
               losses=losses, crops=crops)

if __name__ == "__main__":
    mokd.main(parse=parse, run=run)
