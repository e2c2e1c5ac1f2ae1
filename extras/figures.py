"""The paper's figures from checkpoints of mokd.py: features (Fig. 4, S1), how far attention reaches (Fig. 5, S2), views, curves.

    python extras/figures.py tsne --checkpoint runs/independent/checkpoint.pth runs/mokd/checkpoint.pth         # Fig. 4, S1
    python extras/figures.py attention --checkpoint runs/independent/checkpoint.pth runs/mokd/checkpoint.pth    # Fig. 5a-b, S2
    python extras/figures.py featuremap --checkpoint runs/independent/checkpoint.pth runs/mokd/checkpoint.pth   # Fig. 5c-d
    python extras/figures.py crops --checkpoint runs/mokd/checkpoint.pth                    # the views of a few images
    python extras/figures.py curves --log runs/independent/log.jsonl runs/mokd/log.jsonl    # losses, entropies, learning rates

Each writes NAME.png, NAME.pdf and the numbers behind them, NAME.npz (--out NAME). An independent run is one of --losses sm. The
images are center crops of validation images, of training images where there is no validation; those of crops are training images.
A distance is one between the centers of patches, in pixels of the --image_size that the network sees.
"""
import functools, importlib.util, json, math, os, re, sys   # noqa: E401
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch.utils.data import Subset, default_collate

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))   # the repository, where mokd.py lies
import mokd   # noqa: E402
from eval_knn import Source, check_source, labels_of, load_backbones, progress_of   # noqa: E402
from mokd import UserError, flag, say, warn   # noqa: E402

WORDS = dict(default=("",), nargs="+", low="", high=chr(sys.maxunicode))   # a flag of words: all lie between these two

@dataclass
class Config(Source):
    checkpoint: tuple = flag(help="checkpoint.pth of runs of mokd.py, side by side; what is unset below is the first's",
                             group="models", **WORDS)
    out: str = flag("", "write NAME.png, NAME.pdf, NAME.npz; unset: the figure's name, beside the first file", group="figure")
    images: int = flag(None, "averaged by attention and featuremap, unset: 128 [ViT, D.7]; shown by crops, unset: 4", low=1)
    batch_size: int = flag(16, "images of a forward pass; lower it for attention between many patches", low=1)
    classes: int = flag(10, "classes, drawn by --seed; all if there are fewer [Fig. 4]", low=1, group="tsne")
    per_class: int = flag(50, "images of each class, drawn by --seed", low=1)
    anchors: int = flag(512, "images to which those are compared, drawn by --seed from all others [Moschella et al.]", low=2)
    perplexity: float = flag(30.0, "about the number of neighbors that a point keeps [scikit-learn]", low=1)
    log: tuple = flag(help="log.jsonl of runs of mokd.py", group="curves", **WORDS)
    dtype = "fp32"   # no flag: a figure needs no speed

def parse(argv=None):
    """The command line, a figure's name first -> Config with .figure, and .names of the runs. Raises UserError."""
    figure, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    if figure not in (*FIGURES, "-h", "--help"):
        raise UserError(f"'{figure}' is no figure: the first word must be one of {', '.join(FIGURES)}")
    program, argv = (figure, argv) if figure in FIGURES else ("FIGURE", ["-h"])
    given = mokd.read_flags(Config, argv, f"extras/figures.py {program}", __doc__.split("\n\n")[0])
    cfg = Config(**dict(checkpoint=(), log=()) | given)
    if figure == "curves" and not cfg.log:
        raise UserError("curves: give --log FILE ...")
    if figure == "crops" and len(cfg.checkpoint) != 1:
        raise UserError("crops: give one --checkpoint FILE, the run whose views to show")
    files = cfg.log if figure == "curves" else check_source(cfg).checkpoint
    cfg.figure, cfg.names = figure, [os.path.basename(os.path.dirname(os.path.abspath(file))) for file in files] or [cfg.arch]
    if len({*cfg.names}) < len(cfg.names):
        raise UserError(f"{' '.join(files)}: a run is called by its folder, and two are called alike: rename one")
    cfg.out = re.sub(r"\.(png|pdf|npz)$", "", cfg.out) or os.path.join(os.path.dirname([*files, ""][0]), figure)
    return cfg

def load(cfg):
    """-> {run: {model: Backbone}}, the images. Unset data, data_root, image_size and resize are the first checkpoint's."""
    runs = {}
    for name, file in zip(cfg.names, cfg.checkpoint or [""]):
        own = replace(cfg, checkpoint=file)
        runs[name] = load_backbones(own)
        cfg.data, cfg.data_root, cfg.image_size, cfg.resize = own.data, own.data_root, own.image_size, own.resize
    train, val = mokd.get_data(cfg)
    return runs, val if val is not None and len(val) else train

def draw(images, n, *key):   # -> n indices
    return torch.randperm(len(images), generator=mokd.generator(*key))[:n].tolist()

def look(backbones, images, rows, cfg, device, what):
    """Center crops of some rows of images through backbones -> [features (n, C)], labels (n,), -1 of an unreadable image."""
    views = mokd.EvalView(Subset(images, rows), cfg.image_size, cfg.resize)
    features, labels = mokd.extract_features([b.to(device) for b in backbones], views, device, cfg.batch_size, cfg.workers,
                                             progress=progress_of(what, len(rows)))
    if not (labels >= 0).any():
        raise UserError(f"--data {cfg.data}: none of {len(rows)} images can be read", code=1)
    return [f.float().cpu() for f in features], labels.cpu()

def relative(features, anchors):
    """Features of images (n, C) and of anchor images (A, C) -> (n, A), in which models of any width can be compared: cosines of
    an image to the anchors, as Moschella et al. (2023), then each column to mean 0 and deviation 1, each row to length 1. So
    how alike a model finds images on the whole does not count, only which anchors an image resembles more than others do."""
    cosine = F.normalize(features, dim=1) @ F.normalize(anchors, dim=1).T
    return F.normalize((cosine - cosine.mean(0)) / cosine.std(0).clamp_min(1e-6), dim=1)

def agreement(z1, z2, labels):
    """Percent of points (n, A) whose nearest point of the other model, that of the same image left out, is of the same class."""
    cosine = (z1 @ z2.T).fill_diagonal_(-2)
    return sum(50 * (labels[cosine.argmax(dim)] == labels).float().mean().item() for dim in (0, 1))

def tsne(cfg, device):
    """A panel and a t-SNE a run, of both its models together: each gives an image a point, see relative()."""
    import matplotlib
    from sklearn.manifold import TSNE
    runs, images = load(cfg)
    labels = labels_of(images)
    there, order = labels[labels >= 0].unique(), torch.tensor(draw(images, None, cfg.seed, "images"))
    classes = there[draw(there, cfg.classes, cfg.seed, "classes")].sort().values
    rows = torch.cat([order[labels[order] == c][:cfg.per_class] for c in classes])
    others = order[~torch.isin(order, rows)][:cfg.anchors]
    if len(others) < 2:
        raise UserError(f"--per_class {cfg.per_class}: leaves no images of --data {cfg.data} as anchors; lower it")
    if cfg.perplexity >= len(rows):
        raise UserError(f"--perplexity {cfg.perplexity:g}: must be less than the number of images, {len(rows)}; lower it")
    (fig, axes), numbers = panels(1, len(runs), 4.5, 4.5), dict(images=rows.numpy(), anchors=others.numpy())
    names = getattr(images, "classes", None) or range(int(there.max()) + 1)
    colors = matplotlib.colormaps["tab10" if len(classes) <= 10 else "nipy_spectral"].resampled(len(classes))
    for ax, (run, backbones) in zip(axes[0], runs.items()):
        features, y = look(backbones.values(), images, rows.tolist(), cfg, device, run)
        anchors, readable = look(backbones.values(), images, others.tolist(), cfg, device, f"{run}, anchors")
        z, y = [relative(f[y >= 0], a[readable >= 0]) for f, a in zip(features, anchors)], y[y >= 0]
        say(f"{run}: t-SNE of {len(z) * len(y):,} points, compared to {len(others)} anchors ...")
        xy = TSNE(perplexity=cfg.perplexity, init="pca", random_state=cfg.seed % 2 ** 32).fit_transform(torch.cat(z).numpy())
        numbers |= {f"{run}/labels": y.numpy()}
        for model, marker, points, of_model in zip(backbones, "o^", xy.reshape(len(z), -1, 2), z):
            ax.scatter(*points.T, s=14, c=colors(torch.searchsorted(classes, y).numpy()), marker=marker, linewidths=0, alpha=0.8)
            numbers |= {f"{run}/{model}/xy": points, f"{run}/{model}/relative": of_model.numpy()}
        ax.set(title=run, xticks=[], yticks=[])
        if len(z) == 2:
            numbers[f"{run}/agreement"] = agreement(*z, y)
            ax.set_xlabel(f"nearest of the other model: {numbers[f'{run}/agreement']:.1f} % of the same class", fontsize=8)
    keys = [*zip(backbones, "o^", ("gray", "gray")), *((str(names[c]), "s", colors(i)) for i, c in enumerate(classes))]
    for label, marker, color in keys:
        ax.plot([], [], marker, color=color, label=label)
    fig.legend(loc="outside right upper", frameon=False)
    return fig, numbers

def distances(h, w, size, device=None, rows=slice(None)):
    """Pixels between the centers of h * w patches, row by row, of an image of size * size pixels -> (h w, h w), or some rows."""
    patch = torch.arange(h * w, device=device)
    y, x = patch // w * (size / h), patch % w * (size / w)
    return torch.hypot(y[rows, None] - y, x[rows, None] - x)

def mean_distance(attention, apart):
    """Attention (..., Q, N), a query's of sum 1, and distances (Q, N) -> (...): the distances to all keys weighted by attention,
    then the mean over queries [ViT: Dosovitskiy et al. 2021, D.7]."""
    return (attention * apart).sum(-1).mean(-1)

def attention_of(module, x, output, prefix):
    """Attention between patches, of a timm Attention with this output of tokens x (B, N, C) -> (B, heads, n, n), n = N - prefix.

    CLS and other prefix tokens are left out as queries and as keys, and a query's attention to patches is scaled to sum 1: the
    softmax over patches alone. timm's fused attention hands out no weights, so they are computed once more; that they make the
    same output shows that they are the module's. Raises UserError where they do not."""
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)   # (B, heads, N, d)
    logits = module.q_norm(q) * module.scale @ module.k_norm(k).mT
    y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = module.proj(module.norm(y) if hasattr(module, "norm") else y)
    if (y - output).abs().max() > 1e-3 * output.abs().max():
        raise UserError("its attention is more than softmax(q k^T / sqrt(d)) v")
    return logits[..., prefix:, prefix:].softmax(-1)

def of_layers(backbone, size):
    """-> {name: module} of a ViT's attention, and read(module, x, output) -> (B, heads + 1): the mean distance of each head and,
    last, that of uniform attention."""
    side = math.isqrt(backbone.num_tokens)
    def read(module, x, output):
        if x.dim() != 3 or x.shape[1] != backbone.prefix + side ** 2:
            raise UserError("its attention is not between all patches")
        apart = distances(side, side, size, x.device)
        found = mean_distance(attention_of(module, x, output, backbone.prefix), apart)
        return torch.cat([found, apart.mean().expand(len(x), 1)], 1)
    return {name.removesuffix(".attn"): m for name, m in backbone.model.named_modules() if isinstance(m, Attention)}, read

def of_map(Z, size):
    """Feature map Z (C, H, W) -> (2,): its mean distance, that of uniform attention. Its self-attention: position i attends to
    every j, itself too, by the softmax over j of z_i . z_j / sqrt(C), where z are the channels there, as they are."""
    (C, H, W), z, total = Z.shape, Z.flatten(1).T.float(), 0
    for rows in torch.arange(H * W, device=z.device).split(1024):   # early maps have 10^4 positions
        apart = distances(H, W, size, z.device, rows)
        weights = (z[rows] @ z.T / math.sqrt(C)).softmax(-1)
        total = total + len(rows) * torch.stack([mean_distance(weights, apart), apart.mean()])
    return total / (H * W)

def of_stages(backbone, size):
    """-> {name: module} of the stages that timm lists, and read(module, x, output) -> (B, 2), of_map of each image."""
    def read(module, x, output):
        if not isinstance(output, torch.Tensor) or output.dim() != 4:
            raise UserError("its stages give tokens, no maps")
        maps = output.movedim(-1, 1) if getattr(backbone.model, "output_fmt", "NCHW") == "NHWC" else output
        return torch.stack([of_map(Z, size) for Z in maps])
    modules, info = dict(backbone.model.named_modules()), getattr(backbone.model, "feature_info", None) or []
    return {stage["module"]: modules[stage["module"]] for stage in info if stage.get("module") in modules}, read

def measure(cfg, device, what):
    """A panel a model of a run: a dot a head of a layer, or a stage; a line their mean. what(backbone, size) says which modules
    to hook and what to read there. A model of another kind is left out. Raises UserError if there is no other."""
    (runs, images), numbers, found = load(cfg), {}, {}
    drawn = draw(images, cfg.images or 128, cfg.seed, "images")
    for run, model in ((run, model) for run in runs for model in runs[run]):
        modules, read = what(runs[run][model], cfg.image_size)
        rows = {m: [] for m in modules.values()}
        hooks = [m.register_forward_hook(lambda m, x, y, rows=rows: rows[m].append(read(m, x[0], y).cpu())) for m in rows]
        try:
            if not rows:
                raise UserError("it has no such layers")
            _, labels = look([runs[run][model]], images, drawn, cfg, device, f"{run} {model}")
            found[run, model] = [*modules], torch.stack([torch.cat(r)[labels >= 0] for r in rows.values()], 1).numpy()
        except UserError as stop:
            warn(f"{cfg.figure}: skipped {model} of {run}: {stop}")
        for hook in hooks:
            hook.remove()
    if not found:
        raise UserError(f"{cfg.figure}: no model is left; give --checkpoint or --arch of a {'ViT' if what is of_layers else 'CNN'}")
    fig, axes = panels(1, len(found), 4, 4, sharey=True)
    for ax, ((run, model), (names, pixels)) in zip(axes[0], found.items()):   # pixels (images, layers, heads + 1)
        mean, deviation, uniform = pixels[..., :-1].mean(0), pixels[..., :-1].std(0), pixels[0, :, -1]
        for key, value in dict(distance=mean, deviation=deviation, uniform=uniform, names=names).items():
            numbers[f"{run}/{model}/{key}"] = value
        ax.plot(mean, ".", color="C0", alpha=0.6)
        ax.plot(mean.mean(1), color="C1", label="mean")
        ax.plot(uniform, ":", color="gray", label="uniform attention")
        ax.set(title=f"{run}\n{model}")
        ax.set_xticks(range(len(names)), names, rotation=90)
    axes[0, 0].set(ylabel=f"mean distance, pixels of {cfg.image_size}", ylim=(0, axes[0, 0].get_ylim()[1] * 1.05))
    axes[0, 0].legend()
    return fig, numbers

def crops(cfg, device):
    """A row an image, a column a view, at one scale. The crops are those of the run's epoch 0; flips and colors, which mokd.py
    draws by the place in a batch, are drawn anew."""
    saved = mokd.read_checkpoint(cfg.checkpoint[0])["config"]
    run = mokd.Config(**{f.name: saved[f.name] for f in fields(mokd.Config) if f.name in saved})
    cfg.data, cfg.data_root = cfg.data or run.data, cfg.data_root or run.data_root
    images = mokd.get_data(cfg)[0]
    index = draw(images, cfg.images or 4, cfg.seed, "images")
    batch, run.batch_size = default_collate([mokd.MultiCrop(images, run)[0, i] for i in index]), len(index)
    for i in {*batch[2].tolist()} - {-1}:
        warn(f"skipped {mokd.name_of(images, i)}: not a readable image; the next one is shown")
    mean, std = mokd.mean_and_std(torch.device("cpu"))
    views = [(x.cpu() * std + mean).clamp(0, 1).unflatten(0, (-1, len(index))) for x in mokd.make_views(batch, run, device, 0)]
    columns = [view for group in views for view in group]
    sizes = [view.shape[-1] for view in columns]
    fig, axes = panels(len(index), len(sizes), 1.5 * sum(sizes) / len(sizes) / max(sizes), 1.6, width_ratios=sizes)
    for i, (view, column) in enumerate(zip(columns, axes.T)):
        column[0].set_title(f"{'global' if i < 2 else 'local'} {i}", fontsize=7)
        for ax, x in zip(column, view):
            ax.imshow(x.permute(1, 2, 0).numpy())
            ax.axis("off")
    return fig, dict(zip(("global", "local"), (v.numpy() for v in views)), index=np.array(index))

PANELS = {"loss": ["loss"], "self-distillation": ["sm", "st"], "cross-distillation": ["cm", "ct"],
          "entropy of targets, nats": ["entropy_m", "entropy_t"], "spread of targets, nats": ["spread_m", "spread_t"],
          "learning rate": ["lr"], "k-NN top-1, %": ["knn"]}

def read_log(file):
    """log.jsonl -> {name: {step: value}}. Of a step that a resumed run did again, the last record counts. Raises UserError."""
    names, table, step = [f"{name}{i}" for group in PANELS.values() for name in group for i in "12"], {}, 0
    try:
        for line in open(file):
            record = json.loads(line)
            step = int(record.get("step", step))   # a k-NN record has none
            for name in (name for name in names if name in record):
                table.setdefault(name, {})[step] = record[name]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--log {file}: no log.jsonl of mokd.py, or damaged after step {step} ({error})") from error
    if not table:
        raise UserError(f"--log {file}: holds no losses of mokd.py")
    return {name: dict(sorted(table[name].items())) for name in table}

def curves(cfg, device):
    """A row a quantity, a column a model, a color a run."""
    logs = {run: read_log(file) for run, file in zip(cfg.names, cfg.log)}
    rows = [(title, group) for title, group in PANELS.items() if any(name[:-1] in group for log in logs.values() for name in log)]
    fig, axes = panels(len(rows), 2, 5, 2.4)
    for (title, group), pair in zip(rows, axes):
        for i, ax in enumerate(pair, 1):
            for k, (run, log) in enumerate(logs.items()):
                for name, style in zip((f"{name}{i}" for name in group), (".-", ".--")):
                    if name in log:
                        ax.plot([*log[name]], [*log[name].values()], style, color=f"C{k}", label=f"{run}: {name}", lw=1, ms=3)
            ax.set(title=f"model {i}: {title}", xlabel="step")
            if ax.lines:
                ax.legend(fontsize=6)
    return fig, {f"{run}/{name}": np.array([*points.items()]) for run, log in logs.items() for name, points in log.items()}

FIGURES = dict(tsne=tsne, attention=functools.partial(measure, what=of_layers),   # each (cfg, device) -> figure, its numbers
               featuremap=functools.partial(measure, what=of_stages), crops=crops, curves=curves)

def panels(rows, columns, width, height, **options):
    """An empty figure of rows * columns panels of width * height inches -> figure, axes (rows, columns)."""
    from matplotlib.figure import Figure   # not pyplot: no screen, no state
    fig = Figure((width * columns, height * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **options)

def run(cfg):
    for package in ["matplotlib"] + ["sklearn"] * (cfg.figure == "tsne"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{cfg.figure} needs {package}, which is missing: pip install -r extras/requirements.txt")
    device, _, world = mokd.join_processes()
    mokd.fill_in_machine(cfg, device, world)
    if world > 1:
        raise UserError("one process draws a figure: start it without torchrun")
    try:   # before minutes are spent
        os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {cfg.out}: {error.strerror}; give another name") from error
    fig, numbers = FIGURES[cfg.figure](cfg, device)
    try:
        for kind in ("png", "pdf"):
            fig.savefig(f"{cfg.out}.{kind}", dpi=200)
        np.savez(f"{cfg.out}.npz", **numbers)
    except OSError as error:
        raise UserError(f"--out {cfg.out}: cannot be written ({error}); give another name", code=1) from error
    say(f"wrote {cfg.out}.png, {cfg.out}.pdf and the numbers behind them, {cfg.out}.npz")

if __name__ == "__main__":
    sys.exit(mokd.main(program="extras/figures.py", parse=parse, run=run))
