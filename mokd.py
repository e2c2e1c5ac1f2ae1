"""MOKD: Multi-mode Online Knowledge Distillation for self-supervised visual representation learning (Song et
al., CVPR 2023, arXiv 2304.06461), in one file.

Two backbones learn together, without labels, each from its own momentum copy (self-distillation) and from
the other's (cross-distillation). An MLP-Head reads the pooled representation; a T-Head reads the local
features, which the other model's pooled feature can search.

    python mokd.py --demo                                                   # minutes on two cores, no data
    python mokd.py --data path/to/images --arch1 resnet18 --arch2 vit_tiny  # one process, any device
    torchrun --nproc_per_node=8 mokd.py --arch1 resnet50 --arch2 vit_small  # a pair of the paper's

The file goes from the top down: settings (A.1), train_step, which is Algorithm 1, losses (3.2, 3.3), search
(3.3), heads (3.4), backbones, the two models, schedules (A.1); then what runs it, from the training loop to
main. The four k of A.2 are in eval_knn.py, linear probing in eval_linear.py.

Names are Algorithm 1's: m and t are outputs of the MLP-Head and of the T-Head, here logits (eq. (1) follows
in the step), Z is a representation. A trailing _ belongs to a momentum net, _s to a search. In shapes, B is
the images of one process, V = 2 + L the views of an image (two global ones, then L local ones), K the logits
of a head, C a backbone's channels, N its tokens. Sources stand in brackets: sections of the paper, [DINO],
[released] for the authors' code, [ours].
"""
import argparse, ast, collections, copy, functools, hashlib, inspect, json, math  # noqa: E401
import multiprocessing, os, signal, sys, threading, time, typing, zipfile  # noqa: E401
from dataclasses import asdict, dataclass, field, fields
os.environ.setdefault("GOMP_SPINCOUNT", "1000")   # before torch: threads that spin longer starve each other
import timm, torch, torchvision  # noqa: E401
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import Block
from torch import distributed as dist, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import RandomResizedCrop, functional as TF

# --------------------------------------------------------------------------------------------- settings (A.1)
def flag(default, help, high=math.inf, choices=None, changeable=False):
    """One setting. Its numbers lie from 0 to high. A changeable one may differ when a run resumes."""
    return field(default=default, metadata=dict(help=help, high=high, choices=choices, changeable=changeable))

changeable = functools.partial(flag, changeable=True)
OPTIMIZERS = ("sgd", "adamw")
@dataclass
class Config:
    """Every setting with its source. Config() is the paper's run on ImageNet; where the paper is silent, or
    we depart from it, another source stands in brackets. A new line here is a new flag with help."""
    # the two models (Sec. 4)
    arch1: str = flag("resnet50", "backbone 1: resnet50, vit_small, ... or any timm model [Sec. 4]")
    arch2: str = flag("vit_small", "backbone 2; it may equal backbone 1 [Sec. 4]")
    model_kwargs1: dict = flag(None, "arguments of timm.create_model for backbone 1, as patch_size=8")
    model_kwargs2: dict = flag(None, "arguments of timm.create_model for backbone 2")
    init1: str = flag("", "first weights of backbone 1 alone: a model1.pth, or a file of timm, DINO, MoCo")
    init2: str = flag("", "first weights of backbone 2")
    vit_pool: str = flag("mean", "a ViT's feature: patch mean or CLS [released]", choices=("mean", "cls"))
    drop_path: float = flag(0.1, "stochastic depth of a student ViT [DINO]", 0.9)
    # heads (3.4)
    out_dim: int = flag(65536, "K, logits of a head [3.4]; use fewer for few images")
    hidden_dim: int = flag(2048, "hidden width of an MLP-Head [DINO]")
    bottleneck_dim: int = flag(256, "width before the last layer of an MLP-Head [DINO]")
    t_dim: int = flag(384, "width of a T-Head [3.4: ViT-Small's]")
    t_depth: int = flag(3, "blocks of a T-Head [3.4]")
    t_heads: int = flag(6, "attention heads of a T-Head [3.4: as ViT-Small]")
    t_norm: bool = flag(False, "L2-normalize what a T-Head's last layer reads [ours]; against collapse")
    # losses (3.2, 3.3)
    losses: str = flag("sm,cm,st,ct", "losses, sm among them; sm alone trains two independent nets [Table 7]")
    lambda1: float = flag(None, "weight of cm1, ct1 [eq. 9]; unset: 1 for the larger backbone, 0.1 for the"
                          " smaller [4.5, A.1]. Table 8 is best with 1 for the one worse alone", 1)
    lambda2: float = flag(None, "weight of cm2 and ct2, by the same rule", 1)
    search: str = flag("all", "all: each view searches the other global views [ours]; global: only these"
                       " do; local: local views search view 0 [released]", choices=("all", "global", "local"))
    search_center: bool = flag(True, "center what a search gives, by the T-Head's center [ours]")
    student_temp: float = flag(0.1, "tau, temperature of the students [A.1]")
    teacher_temp: float = flag(0.07, "tau' after its rise [A.1]; lower it if entropies stay high")
    teacher_temp_start: float = flag(0.04, "tau' at first [A.1]; DINO's warmup_teacher_temp")
    teacher_temp_epochs: int = flag(30, "epochs in which tau' rises [A.1]")
    center_momentum: float = flag(0.9, "momentum of the centers [DINO]; lower it for few steps", 1)
    ema: float = flag(0.996, "l, rises to 1 [DINO: more for small batches]; lower it for few steps", 1)
    # views (A.1)
    global_size: int = flag(224, "size of the two global views in pixels [A.1]")
    global_scale: tuple[float, float] = flag((0.25, 1.0), "part of the image in a global view [A.1]", 1)
    local_size: int = flag(96, "size of the local views in pixels [A.1]")
    local_scale: tuple[float, float] = flag((0.05, 0.25), "part of the image in a local view [A.1]", 1)
    local_crops: int = flag(8, "L, local views of an image [A.1]; 0 for none")
    jitter: tuple[(float,)*4] = flag((0.4, 0.4, 0.2, 0.1), "brightness, contrast, saturation, hue [DINO]")
    grayscale: float = flag(0.2, "probability of grayscale [DINO]; A.1 names none", 1)
    blur: tuple[float, float] = flag((0.1, 2.0), "range of the Gaussian's sigma, pixels [DINO]; 0 0: none", 2)
    solarize: float = flag(0.2, "probability of solarizing the second global view [DINO]; A.1 names none", 1)
    # data, optimization
    data: str = changeable("imagenet", "image folder, torchvision data set (cifar10, ...), or toy")
    data_root: str = changeable("data", "folder to which torchvision data sets are downloaded")
    workers: int = changeable(None, "loaders of each process; unset: 1, on GPUs a share of cores, up to 16")
    epochs: int = flag(100, "epochs [Sec. 4]")
    batch_size: int = flag(256, "images of a step over all processes [Sec. 4, A.1]")
    warmup_epochs: int = changeable(10, "epochs in which rates rise [A.1]; raise it if losses rise")
    cnn_optimizer: str = flag("sgd", "for CNNs [3.4], here all nets with batch norm", choices=OPTIMIZERS)
    vit_optimizer: str = flag("adamw", "for ViTs [3.4], here all others", choices=OPTIMIZERS)
    t_optimizer: str = flag("adamw", "for a CNN's T-Head [ours]; sgd [3.4, released]", choices=OPTIMIZERS)
    cnn_lr: float = changeable(0.1, "peak rate of CNNs for batches of 256 [A.1]; lower it if losses rise")
    vit_lr: float = changeable(3e-4, "peak rate of ViTs [A.1] and of all T-Heads [released]; as cnn_lr")
    cnn_lr_end: float = changeable(1e-6, "last rate of CNNs [DINO]; 0.0048 [released]")
    vit_lr_end: float = changeable(1e-6, "last rate of ViTs and T-Heads [DINO]; 1e-5 [released]")
    cnn_wd: float = flag(1e-4, "weight decay of CNNs [A.1]; 1-D parameters have none [DINO]")
    vit_wd: float = flag(0.04, "weight decay of ViTs [A.1], all T-Heads [released]; 1-D ones: none [DINO]")
    wd_end: float = flag(None, "vit_wd goes to this by a cosine, to 0.4 in DINO and [released]; unset: stays")
    clip_grad: float = changeable(3.0, "norm to which each gradient tensor is clipped [DINO]; 0: none")
    freeze_last_layer: int = flag(1, "epochs of frozen last layers [DINO]; raise it if losses rise")
    # running
    out: str = changeable("", "folder of results; unset: runs/ARCH1-ARCH2")
    seed: int = flag(0, "seed of everything that is drawn but the toy images")
    dtype: str = changeable("auto", "of autocast; auto: by device", choices=("auto", "bf16", "fp16", "fp32"))
    compile: bool = changeable(False, "compile both models with torch.compile")
    grad_checkpointing: bool = changeable(False, "run students' backbones forward twice, for half the memory")
    log_every: int = changeable(20, "steps between log lines; 0: none")
    save_every: int = changeable(0, "steps between checkpoints; 0: one each epoch")
    knn_every: int = changeable(0, "epochs between k-NN evaluations, the first before training; 0: none")
    demo: bool = changeable(False, "train a small pair on toy images, with k-NN before and after")

# ------------------------------------------------------------------------------------------------ Algorithm 1
def train_step(model1, model2, x, cfg, now, scaler=None):
    """One step of Algorithm 1 on views x (make_views; the copies are in Model) -> losses by name, targets by
    head. Add a new loss to loss1 and loss2, and in every step to `named`. Each of loss1 and loss2 has its own
    backward pass, so loss1 must reach no weight of model 2, nor loss2 of model 1."""
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    losses = cfg.losses.split(",")   # one that is left out is 0
    n1, n2, n1_, n2_ = model1.n, model2.n, model1.n_, model2.n_
    tau, tau_ = cfg.student_temp, now.tau_
    # Pairs (g, v): view g of a momentum net teaches view v of a student, or is searched by v's query.
    teaches = search_pairs(2 + cfg.local_crops)
    searches = search_pairs(2 + cfg.local_crops, cfg.search)
    found_teaches = [(i, v) for i, (g, v) in enumerate(searches)]   # what the i-th search finds teaches v
    with autocast(x[0].device, cfg.dtype):
        # Students see all views. Each draws its stochastic depth by itself, whatever the other draws.
        reseed(cfg.seed, "stochastic depth", 1, now.step, RANK)
        m1, t1, Z1 = n1(x)   # m1, t1: (V, B, K)
        reseed(cfg.seed, "stochastic depth", 2, now.step, RANK)
        m2, t2, Z2 = n2(x)
        with torch.no_grad():
            global_views = x[:1]   # x[0] has both, (2B, 3, S, S)
            m1_, t1_, Z1_ = n1_(global_views)   # m1_, t1_: (2, B, K)
            m2_, t2_, Z2_ = n2_(global_views)
            # Feature search, eq. (6), Algorithm 1's t1_(Z2, Z1_), t2_(Z1, Z2_): what queries of model 2 find
            # in momentum net 1's tokens, by its T-Head, and the reverse. They get no gradient [released].
            if "ct" in losses:
                query1 = model1.net.t_head.query_of(Z1.pooled)   # (V, B, C) -> (V, B, t_dim)
                query2 = model2.net.t_head.query_of(Z2.pooled)
                t1_s = search(n1_.t_head, query2, Z1_.tokens[0], searches)   # (searches, B, K)
                t2_s = search(n2_.t_head, query1, Z2_.tokens[0], searches)
                p_t1_s = target(t1_s, n1_.C_t * cfg.search_center, tau_)
                p_t2_s = target(t2_s, n2_.C_t * cfg.search_center, tau_)

    # Eq. (1), in fp32: the targets (2, B, K), and of the students the logarithms that H takes, V times (B, K)
    p_m1_, p_t1_ = target(m1_, n1_.C_m, tau_), target(t1_, n1_.C_t, tau_)
    p_m2_, p_t2_ = target(m2_, n2_.C_m, tau_), target(t2_, n2_.C_t, tau_)
    log_m1, log_t1 = log_softmax(m1, tau), log_softmax(t1, tau)
    log_m2, log_t2 = log_softmax(m2, tau), log_softmax(t2, tau)
    # Self-distillation (3.2) through the MLP-Heads, eq. (2), and through the T-Heads, eq. (3)
    loss_sm1 = H(p_m1_, log_m1, teaches)
    loss_sm2 = H(p_m2_, log_m2, teaches)
    loss_st1 = H(p_t1_, log_t1, teaches) if "st" in losses else 0.0
    loss_st2 = H(p_t2_, log_t2, teaches) if "st" in losses else 0.0
    # Cross-distillation (3.3) through the MLP-Heads, eq. (5), and the search, eq. (7), once printed loss_it
    loss_cm1 = H(p_m2_, log_m1, teaches) if "cm" in losses else 0.0
    loss_cm2 = H(p_m1_, log_m2, teaches) if "cm" in losses else 0.0
    loss_ct1 = H(p_t2_s, log_t1, found_teaches) if "ct" in losses else 0.0
    loss_ct2 = H(p_t1_s, log_t2, found_teaches) if "ct" in losses else 0.0
    # Eq. (9): the sum of self-distillation, eq. (4), and lambda times that of cross-distillation, eq. (8)
    loss1 = (loss_sm1 + loss_st1) + cfg.lambda1 * (loss_cm1 + loss_ct1)
    loss2 = (loss_sm2 + loss_st2) + cfg.lambda2 * (loss_cm2 + loss_ct2)

    scaler.scale(loss1).backward()
    scaler.scale(loss2).backward()
    model1.update(now, scaler)
    model2.update(now, scaler)
    scaler.update()
    # n_.params = l * n_.params + (1 - l) * n.params, where the paper's print has n.params twice
    model1.update_momentum_net(now.l)
    model2.update_momentum_net(now.l)
    # DINO's centering (A.1), which Algorithm 1 leaves out. Outputs of the search do not enter the centers.
    model1.update_centers(m1_, t1_)
    model2.update_centers(m2_, t2_)
    named = dict(loss1=loss1, sm1=loss_sm1, st1=loss_st1, cm1=loss_cm1, ct1=loss_ct1,
                 loss2=loss2, sm2=loss_sm2, st2=loss_st2, cm2=loss_cm2, ct2=loss_ct2)
    named = {name: loss.detach() for name, loss in named.items() if torch.is_tensor(loss)}
    return named, dict(m1=p_m1_, t1=p_t1_, m2=p_m2_, t2=p_t2_)

# ------------------------------------------------------------------------------------------ losses (3.2, 3.3)
def H(t, log_s, pairs):
    """H(t, s) of Algorithm 1, the cross entropy, as a mean over pairs (i, v): target t[i] (B, K) teaches view
    v of a student, log_s[v] (B, K)."""
    losses = [-(t[i] * log_s[v]).sum(dim=1).mean() for i, v in pairs]
    return sum(losses) / len(losses)

def log_softmax(s, tau):
    """Student logits (V, B, K) -> for each view the logarithm of eq. (1), (B, K). Of a softmax that
    underflows to 0 it would be -inf. A net without T-Head has None, which stays None."""
    return None if s is None else (s.float() / tau).log_softmax(-1).unbind()

def target(t, center, tau_):
    """Momentum logits -> targets, without gradient: eq. (1) with tau', after centering. That and the low tau'
    (sharpening) are DINO's way against collapse, which 3.2 calls whitening."""
    return None if t is None else ((t.detach().float() - center) / tau_).softmax(-1)

# ----------------------------------------------------------------------------------------------- search (3.3)
def search_pairs(V, which="all"):
    """Pairs (g, v), sorted by g: a global view g of a momentum net, and another view v of a student. With
    its two views Algorithm 1 has the pairs of "global" alone."""
    if which == "local":    # [released]
        return [(0, v) for v in range(2, V)]
    views = range(2 if which == "global" else V)
    return [(g, v) for g in range(2) for v in views if v != g]   # "all" is DINO's to teach, ours to search

def search(t_head_, query, tokens_, pairs):
    """t_s = t_(Z, Z_) of Algorithm 1, the feature search (3.3, Fig. 3): queries (V, B, dim) of one student,
    tokens_ (2B, N, C) of the other's momentum net, sorted pairs (g, v) -> logits (pairs, B, K)."""
    found = []
    for g, searched in enumerate(tokens_.chunk(2)):   # the tokens of global view g
        queries = [query[v] for of_g, v in pairs if of_g == g]
        if queries:
            found.append(t_head_(searched, torch.cat(queries)))
    return torch.cat(found).unflatten(0, (len(pairs), -1))

# ------------------------------------------------------------------------------------------------ heads (3.4)
def last_layer(in_dim, out_dim, learn_gain=True):
    """gain * direction / |direction|, linear [DINO]; without learn_gain the gain is 1 (norm_last_layer)."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(in_dim, out_dim, bias=False))
    nn.init.ones_(layer.parametrizations.weight.original0).requires_grad_(learn_gain)   # the gain
    return layer

def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)

class MLPHead(nn.Module):
    """Pooled (..., C) -> logits (..., K), by four linear layers (3.4), with DINO's widths and L2 norm."""
    def __init__(self, in_dim, out_dim, hidden_dim=2048, bottleneck_dim=256, learn_gain=True):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim),
                                 nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim)).apply(init_linear)
        self.last = last_layer(bottleneck_dim, out_dim, learn_gain)

    def bottleneck(self, x):
        """Pooled (..., C) -> what the last layer reads, of length 1 (..., bottleneck_dim)."""
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x):
        return self.last(self.bottleneck(x))

class THead(nn.Module):
    """Local features (B, N, C) -> logits (B, K), by ViT blocks and an FC layer (3.4). With a query it is the
    feature search of Fig. 3. num_tokens is N of a global view."""
    def __init__(self, in_dim, out_dim, dim=384, depth=3, num_heads=6, num_tokens=49, l2_normalize=False):
        super().__init__()
        layer_norm = functools.partial(nn.LayerNorm, eps=1e-6)
        # The 1x1 convolution brings tokens and query to one width [ours]; eq. (6) has the other model's C.
        self.embed = nn.Linear(in_dim, dim) if in_dim != dim else nn.Identity()
        # Learned positions, the last LayerNorm and weight norm in the last layer are [released].
        self.pos = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_tokens, dim), std=0.02))
        blocks = [Block(dim, num_heads, qkv_bias=True, norm_layer=layer_norm) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks).apply(init_linear)
        self.norm, self.l2_normalize = layer_norm(dim), l2_normalize
        self.last = last_layer(dim, out_dim)

    def query_of(self, pooled):
        """z of eq. (6): pooled feature (..., C) -> query (..., dim)."""
        return self.embed(pooled)

    def forward(self, Z, query=None):
        """Tokens (B, N, C) -> logits (B, K). With queries (nB, dim), of which row i B + b searches in the
        tokens of image b -> (nB, K)."""
        side = math.isqrt(Z.shape[1])   # positions are resized bicubically, not antialiased [released]
        pos = timm.layers.resample_abs_pos_embed(self.pos, [side, side], num_prefix_tokens=0, antialias=False)
        x = self.embed(Z) + pos
        if query is not None:   # the concatenation of eq. (6); the query has no position
            x = torch.cat([query[:, None], x.repeat(len(query) // len(x), 1, 1)], 1)
        x = self.norm(self.blocks(x))[:, -Z.shape[1]:].mean(1)   # without the query (Fig. 3)
        return self.last(F.normalize(x, dim=-1) if self.l2_normalize else x)

# Z of Algorithm 1; of ResNet-50: pooled by view (10, B, 2048), tokens by size (2B, 49, 2048), (8B, 9, 2048)
Representation = collections.namedtuple("Representation", "pooled tokens")
class Net(nn.Module):
    """[m, t, Z] = n(x) of Algorithm 1: a backbone and its two heads. Without st and ct there is no T-Head."""
    def __init__(self, backbone, cfg):
        super().__init__()
        self.backbone = backbone
        self.mlp_head = MLPHead(backbone.dim, cfg.out_dim, cfg.hidden_dim, cfg.bottleneck_dim,
                                backbone.family == "vit")   # a CNN's keeps its gain at 1 [released]
        self.t_head = None
        if {"st", "ct"} & set(cfg.losses.split(",")):
            self.t_head = THead(backbone.dim, cfg.out_dim, cfg.t_dim, cfg.t_depth, cfg.t_heads,
                                backbone.num_tokens, cfg.t_norm)

    def forward(self, x):
        """Views (make_views) -> m (V, B, K), t (V, B, K) or None, Representation."""
        B = len(x[0]) // 2
        pooled, tokens = zip(*[self.backbone(views) for views in x])
        Z = Representation(torch.cat(pooled).unflatten(0, (-1, B)), tokens)
        t = None
        if self.t_head is not None:
            t = torch.cat([self.t_head(of_size) for of_size in tokens]).unflatten(0, (-1, B))
        return self.mlp_head(Z.pooled), t, Z

# -------------------------------------------------------------------------------------------- backbones (3.1)
class Backbone(nn.Module):
    """A timm model: images (B, 3, S, S) -> pooled (B, C), tokens (B, N, C). Tokens are a CNN's last map or a
    ViT's patches; pooled is their mean, or a ViT's CLS. family is "cnn" for a net with batch norm, or "vit";
    dim is C, num_tokens N of an image of `size` pixels."""
    def __init__(self, name, kwargs=None, pool="mean", size=224, drop_path=0.0):
        super().__init__()
        if name in ("vit_tiny", "vit_small", "vit_base"):   # short names
            name += "_patch16_224"
        self.timm_name, self.family = name, "vit"
        self.model, self.timm_kwargs = create_model(name, kwargs or {}, drop_path)
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules()):
            self.family = "cnn"
            no_drop_path(self.model)
        self.prefix_tokens = getattr(self.model, "num_prefix_tokens", 0)   # CLS and registers
        self.cls = pool == "cls" and getattr(self.model, "cls_token", None) is not None
        self.nhwc = getattr(self.model, "output_fmt", "") == "NHWC"
        image = torch.zeros(1, 3, size, size)
        self.pooling = "[:, 0]" if self.cls else f"[:, {self.prefix_tokens}:].mean(1)"   # pooled, in Python
        if self.eval().model.forward_features(image).dim() == 4:
            self.pooling = ".mean((1, 2))" if self.nhwc else ".mean((2, 3))"
        pooled, tokens = self(image)
        self.num_tokens, self.dim = tokens.shape[1:]
        # Freeze what only a classifier would use: it gets no gradient here, and DDP must know.
        (pooled.sum() + tokens.sum()).backward()
        for p in self.train().parameters():
            p.requires_grad_(p.grad is not None)
            p.grad = None

    def forward(self, x):
        y = self.model.forward_features(x)
        if y.dim() == 4:   # a map
            y = y.flatten(1, 2) if self.nhwc else y.flatten(2).mT
        tokens = y[:, self.prefix_tokens:]
        return y[:, 0] if self.cls else tokens.mean(1), tokens

def create_model(name, kwargs, drop_path=0.0):
    """-> a timm model for views of several sizes, and its arguments: kwargs, and those of ours it knows."""
    options = dict(dynamic_img_size=True, strict_img_size=False, drop_path_rate=drop_path,
                   zero_init_last=False)   # ResNets start as torchvision's, not as timm's [ours]
    while True:
        try:
            return timm.create_model(name, num_classes=0, **(options | kwargs)), options | kwargs
        except TypeError as error:   # as "got an unexpected keyword argument 'dynamic_img_size'"
            unknown = [option for option in options.keys() - kwargs.keys() if f"'{option}'" in str(error)]
            if not unknown:
                raise
            del options[unknown[0]]

def no_drop_path(net):
    for m in net.modules():
        if isinstance(m, timm.layers.DropPath):
            m.drop_prob = 0.0

def load_weights(backbone, file, flag):
    """Fill a backbone from a file of timm, torchvision, DINO, MoCo, the released code, or ours."""
    torch.serialization.add_safe_globals([argparse.Namespace])   # DINO's files hold their flags
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    for key in (f"teacher_{backbone.family}", "teacher", "state_dict", "model"):
        if isinstance(theirs.get(key), dict):
            theirs = theirs[key]
    # "conv1.weight" may be "module.momentum_encoder.conv1.weight" there: momentum nets' prefixes come first.
    used = [name for name, p in backbone.model.named_parameters() if p.requires_grad]
    stages = tuple({name.split(".")[0] + "." for name in used})   # in these a deeper net has more
    prefixes = [name.removesuffix(used[0]) for name in theirs if f".{name}".endswith(f".{used[0]}")]
    for prefix in sorted(prefixes, key=lambda prefix: "momentum" not in prefix):
        state = {name.removeprefix(prefix): w for name, w in theirs.items() if name.startswith(prefix)}
        more = [name for name in state.keys() - backbone.model.state_dict().keys() if name.startswith(stages)]
        if state.keys() >= set(used) and not more:
            return backbone.model.load_state_dict(state, strict=False)
    stop(f"{flag} {file}: these are no weights of {backbone.timm_name} with these model_kwargs")

# ------------------------------------------------------------------- the two models: what each has of its own
class Model:
    """A student, its momentum net n_, which holds the centers C_m, C_t of its two heads, and the student's
    optimizers. net is the student, n the same or DDP around it."""
    def __init__(self, cfg, i, backbone, device):
        self.cfg, self.i, self.family = cfg, i, backbone.family
        reseed(cfg.seed, "heads", i)
        self.net = Net(backbone, cfg)
        self.n_ = copy.deepcopy(self.net).requires_grad_(False)   # n_.params = n.params: Algorithm 1, line 1
        no_drop_path(self.n_)   # stochastic depth is for the student alone
        if cfg.grad_checkpointing:   # it updates student batch norms' statistics twice; no step reads those
            backbone.model.set_grad_checkpointing()
        for net in (self.net, self.n_):   # in place, and before the optimizers, which keep these tensors
            net.to(device, memory_format=torch.channels_last)   # to convolve faster
            if device.type == "cuda" and WORLD > 1:   # [DINO]; torch has none for the CPU
                timm.layers.convert_sync_batchnorm(net)
            if cfg.compile:
                net.compile(dynamic=False)
        for name in ("C_m", "C_t"):   # buffers, so they are saved with the net
            self.n_.register_buffer(name, torch.zeros(1, cfg.out_dim, device=device))
        self.params, self.params_ = list(self.net.parameters()), list(self.n_.parameters())
        self.optimizers = self.make_optimizers()
        ddp = functools.partial(nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True)
        self.n = ddp(self.net) if WORLD > 1 else self.net

    def make_optimizers(self):
        """SGD, AdamW or both. A CNN's T-Head has t_optimizer, with the rate and the decay of ViTs."""
        alike = collections.defaultdict(list)   # parameters with one optimizer, rate and decay
        for name, p in self.net.named_parameters():
            family, kind = self.family, getattr(self.cfg, f"{self.family}_optimizer")
            if family == "cnn" and name.startswith("t_head."):
                family, kind = "vit", self.cfg.t_optimizer
            if p.requires_grad:
                alike[kind, family, p.dim() > 1].append(p)
        groups = dict(sgd=[], adamw=[])
        for (kind, family, decays), params in alike.items():
            groups[kind].append(dict(params=params, family=family, decays=decays))
        makers = dict(sgd=functools.partial(torch.optim.SGD, momentum=0.9, foreach=True),   # momentum: [DINO]
                      adamw=functools.partial(torch.optim.AdamW, fused=True))
        return [makers[kind](of_kind, lr=0.0) for kind, of_kind in groups.items() if of_kind]

    def update(self, now, scaler):
        if now.epoch < self.cfg.freeze_last_layer:   # which helps training to start [DINO]
            for name, p in self.net.named_parameters():
                p.grad = None if ".last." in name else p.grad
        for optimizer in self.optimizers:
            scaler.unscale_(optimizer)   # fp16 had raised the gradients
            for group in optimizer.param_groups:
                group["lr"] = now.lr[group["family"]]
                group["weight_decay"] = now.wd[group["family"]] * group["decays"]
        if self.cfg.clip_grad:   # each tensor by itself, so none slows another down [DINO]; on the device
            grads = [p.grad for p in self.params if p.grad is not None]
            norms = torch.stack(torch._foreach_norm(grads))
            scales = (self.cfg.clip_grad / (norms + 1e-6)).clamp_max(1)
            torch._foreach_mul_(grads, list(scales))
        for optimizer in self.optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_momentum_net(self, l):
        """n_.params = l * n_.params + (1 - l) * n.params. Batch-norm statistics are n_'s own [DINO]."""
        torch._foreach_lerp_(self.params_, self.params, 1 - l)

    def update_centers(self, m_, t_):
        """C = c C + (1 - c) mean of the momentum logits over global views, batch and processes [DINO]."""
        for C, logits in ((self.n_.C_m, m_), (self.n_.C_t, t_)):
            if logits is not None:
                mean = sum_over_processes(logits.float().mean((0, 1))) / WORLD
                C.lerp_(mean, 1 - self.cfg.center_momentum)

def build_models(cfg, device):
    """-> [Model, Model]. Each has its own seed, so neither depends on its partner. Fills in unset lambdas."""
    backbones = []
    for i in "12":
        reseed(cfg.seed, "backbone", i)
        arch, kwargs = getattr(cfg, f"arch{i}"), getattr(cfg, f"model_kwargs{i}")
        backbones.append(Backbone(arch, kwargs, cfg.vit_pool, cfg.global_size, cfg.drop_path))
        file = getattr(cfg, f"init{i}")
        if file:
            load_weights(backbones[-1], file, f"--init{i}")
    size1, size2 = [sum(p.numel() for p in backbone.parameters()) for backbone in backbones]
    if cfg.lambda1 is None:
        cfg.lambda1 = 0.1 if size1 < size2 else 1.0   # 4.5, A.1; equal ones have 1 both
    if cfg.lambda2 is None:
        cfg.lambda2 = 0.1 if size2 < size1 else 1.0
    return [Model(cfg, i, backbone, device) for i, backbone in enumerate(backbones, 1)]

# -------------------------------------------------------------------------------------------- schedules (A.1)
def cosine_schedule(step, steps, peak, end, warmup=0):
    """For `warmup` steps a straight line from 0 to peak; then half a cosine to end, reached at `steps`."""
    if step < warmup:
        return peak * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

# At a step: l and tau_ of the momentum nets; rates and weight decays, which are dicts with "cnn" and "vit"
Now = collections.namedtuple("Now", "step epoch l tau_ lr wd")
def schedule(cfg, step, per_epoch):
    epoch, steps, warmup = step // per_epoch, cfg.epochs * per_epoch, cfg.warmup_epochs * per_epoch
    scale = cfg.batch_size / 256   # rates are given for 256 images [DINO]
    lr = dict(cnn=cosine_schedule(step, steps, cfg.cnn_lr * scale, cfg.cnn_lr_end, warmup),
              vit=cosine_schedule(step, steps, cfg.vit_lr * scale, cfg.vit_lr_end, warmup))
    wd_end = cfg.vit_wd if cfg.wd_end is None else cfg.wd_end
    wd = dict(cnn=cfg.cnn_wd, vit=cosine_schedule(step, steps, cfg.vit_wd, wd_end))
    last = cfg.teacher_temp_epochs - 1   # the last epoch of the rise, counted from 0
    tau_ = cfg.teacher_temp
    if epoch < last:
        tau_ = cfg.teacher_temp_start + (cfg.teacher_temp - cfg.teacher_temp_start) * epoch / last
    return Now(step, epoch, cosine_schedule(step, steps, cfg.ema, 1.0), tau_, lr, wd)

# ----- here the method ends, but for augment(x), which is MultiCrop and make_views below; the training loop
def train(cfg, models, images, val, state, device):
    """Train to the end, from the checkpoint `state` if there is one. A signal ends it after a checkpoint."""
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    step = resume(cfg, models, scaler, state) if state else 0
    per_epoch = len(images) // cfg.batch_size
    begin, steps = step, cfg.epochs * per_epoch
    if step < steps:   # a finished run logs nothing
        log(cfg, dict(step=step, settings=asdict(cfg)))
    log_knn(cfg, models, images, val, device, step, per_epoch)   # the first, or one that a stop prevented
    window, start = [], time.time()   # losses of the steps since the last log line, and when they began
    unreadable = 0   # images of this epoch, so far
    catch_signals()
    keys = batches(len(images), cfg, step)
    for crops, skipped in make_loader(MultiCrop(images, cfg), device, cfg.workers, batch_sampler=keys):
        now = schedule(cfg, step, per_epoch)
        x = make_views(crops, cfg, device, step)
        losses, targets = train_step(*models, x, cfg, now, scaler)
        window = [*window, losses] if cfg.log_every else [losses]
        if step == begin:
            names = "".join(f"{name:>8}" for name in [*losses, "img/s", " min left"])
            say(f"\n{'epoch':>5}{'step':>16} {names}")
        step += 1
        # Only to log, to save and for k-NN does the host wait for the device (in fp16 SGD's scaler does too).
        n, stopped = after_step(skipped.sum())
        unreadable = n if now.step % per_epoch == 0 else unreadable + n
        refuse_unreadable(unreadable, len(images))
        logging = cfg.log_every and (step % cfg.log_every == 0 or step == steps)
        saving = stopped or step % (cfg.save_every or per_epoch) == 0 or step == steps
        if logging or saving:
            means = means_of(window)
            if not math.isfinite(sum(means.values())):
                stop(f"step {step}: losses not finite: lower the rates, or use --dtype fp32", 1)
        if logging:
            speed = cfg.batch_size * len(window) / (time.time() - start)
            log_line(cfg, models, now, per_epoch, speed, means, target_statistics(targets))
            window, start = [], time.time()
        pause = time.time()
        if saving:
            save(cfg, models, step, scaler, images)
        if stopped:
            wait_for_all()   # for RANK 0 to save: torchrun ends all when one ends
            stop(f"stopped by {stopped.name} after step {step}; the same command goes on", 128 + stopped)
        log_knn(cfg, models, images, val, device, step, per_epoch)
        start += time.time() - pause   # so images/s count neither checkpoints nor k-NN

def log_line(cfg, models, now, per_epoch, speed, losses, statistics):
    """Print a line about the steps since the last one, and append it to log.jsonl."""
    step, steps = now.step + 1, cfg.epochs * per_epoch
    record = dict(epoch=now.epoch, step=step, steps=steps) | losses | statistics
    record |= {f"lr{m.i}": now.lr[m.family] for m in models}
    record |= {"images/s": speed, "minutes_left": (steps - step) * cfg.batch_size / speed / 60}
    log(cfg, record | dict(GB=torch.cuda.max_memory_allocated() / 1e9))   # 0 without a GPU
    columns = "".join(f"{loss:8.3f}" for loss in losses.values())
    say(f"{now.epoch:5}{f'{step}/{steps}':>16} {columns}{speed:8.0f}{record['minutes_left']:9.0f}")
    low = 0.01 * math.log(cfg.out_dim)   # low, "uniform" and "a quarter" below are [ours]
    if now.step % per_epoch < cfg.log_every and step > steps / 4:   # once an epoch
        for name in statistics:
            if name.startswith("spread") and statistics[name] < low:
                cause = "one for all images: lower rates, or higher --ema"
                if statistics[name.replace("spread", "entropy")] > 50 * low:
                    cause = "uniform: lower --teacher_temp, for a t also --t_norm"
                say(f"collapse? Low {name}, because targets are {cause}")

def target_statistics(targets):
    """Of each momentum head's targets p (2, B, K), in nats: their mean entropy, and spread, the entropy
    of the mean p minus that, at most log K and log 2B. It is near 0 where all images get one answer, whatever
    losses say. Processes look at their own share, and these are means over them."""
    statistics = {}
    for name, p in targets.items():
        if p is not None:
            entropy = torch.special.entr(p).sum(-1).mean()
            statistics[f"entropy_{name}"] = entropy
            statistics[f"spread_{name}"] = torch.special.entr(p.mean((0, 1))).sum() - entropy
    return means_of([statistics])

def means_of(window):
    """Dicts of numbers on the device, one a step -> their means over steps and processes, on the host."""
    values = torch.stack([torch.stack(list(numbers.values())) for numbers in window])   # (steps, names)
    return dict(zip(window[0], (sum_over_processes(values).mean(0) / WORLD).tolist()))

# ------------------------------------------------------------------------------------------------- k-NN (A.2)
def log_knn(cfg, models, images, val, device, step, per_epoch):
    """k-NN after `step`, if it is asked for there and not yet in the log. Epoch -1 is before training."""
    epoch, last = step // per_epoch - 1, cfg.epochs * per_epoch
    if not cfg.knn_every or (step % (cfg.knn_every * per_epoch) and step != last):
        return
    missing = 0
    if RANK == 0:   # it has the log, and decides for all
        with open(f"{cfg.out}/log.jsonl") as f:
            since_start = f.read().rsplit('{"step": 0, "settings"', 1)[-1]
        missing = int(f'"epoch": {epoch}, "knn1"' not in since_start)
    if sum_over_processes(torch.tensor(missing)):
        found = knn_accuracy([m.n_.backbone for m in models], images, val, cfg, device)
        log(cfg, dict(epoch=epoch) | {f"knn{m.i}": accuracy for m, accuracy in zip(models, found)})
        when = f"after epoch {epoch}" if step else "before training"
        say(f"k-NN top-1 {when}: {' and '.join(f'{accuracy:.1f} %' for accuracy in found)}")

def knn_accuracy(backbones, train, val, cfg, device):
    """k-NN top-1 (percent; k = 20 [DINO]) of each backbone on val, with train as the bank."""
    options = device, cfg.batch_size // WORLD, cfg.workers
    banks, labels = extract_features(backbones, EvalView(train, cfg.global_size), *options)
    queries, answers = extract_features(backbones, EvalView(val, cfg.global_size), *options)
    votes = [knn_classify(bank, labels, query)[0] for bank, query in zip(banks, queries)]
    return [100 * (of_net.argmax(1) == answers).sum().item() / len(answers) for of_net in votes]

def knn_classify(bank, labels, queries, ks=(20,), temperature=0.07, classes=None):
    """DINO's weighted k-NN: votes (len(ks), Q, classes) for queries (Q, D) by their k nearest in bank (n, D),
    of labels (n,). A neighbor weighs exp(cosine / temperature), relative to the nearest; argmax predicts."""
    classes, votes = classes or int(labels.max()) + 1, []
    for rows in queries.split(256):
        query = F.normalize(rows.float(), dim=1)   # half precision has changed the lengths a little
        cosine = torch.cat([query @ F.normalize(part.float(), dim=1).T for part in bank.split(2 ** 16)], 1)
        cosine, nearest = cosine.topk(min(max(ks), len(bank)))
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        none = weight.new_zeros(len(rows), classes)
        votes.append(torch.stack([none.scatter_add(1, labels[nearest[:, :k]], weight[:, :k]) for k in ks]))
    return torch.cat(votes, 1)

class EvalView:
    """index -> (center crop (3, S, S) uint8, label), after the shorter side became `resize`. An unreadable
    image is named and has the label NO_IMAGE."""
    def __init__(self, images, size, resize=None):
        self.images, self.size = images, size
        self.resize = resize or round(size * 256 / 224)   # [DINO]

    def __getitem__(self, i):
        try:
            image, label = self.images[i]
            image = TF.resize(to_rgb(image), [self.resize], TF.InterpolationMode.BICUBIC, antialias=True)
        except OSError as error:
            warn(f"skipped {error}")
            image, label = torch.zeros(3, self.size, self.size, dtype=torch.uint8), NO_IMAGE
        return TF.center_crop(image, [self.size, self.size]), int(label)

@torch.no_grad()
def extract_features(backbones, views, device, batch_size=256, workers=0, dtype="fp32", progress=None):
    """-> [L2-normalized pooled features (n, C) of each backbone, in half precision], labels (n,), of all
    images with a label, for all processes. progress(done, n) is told how far it is."""
    n = len(views.images)   # a process fills its own rows, and the sum over processes joins them
    features = [torch.zeros(n, b.dim, dtype=torch.half, device=device) for b in backbones]
    labels = torch.zeros(n, dtype=torch.long, device=device)
    mine = [rows for rows in torch.arange(n)[RANK::WORLD].split(batch_size) if len(rows)]
    nets = nn.ModuleList(backbones).eval()
    for (x, y), rows in zip(make_loader(views, device, workers, batch_sampler=mine), mine):
        labels[rows] = y.to(device)
        x = normalize(x.to(device, non_blocking=True).float() / 255)
        for net, found in zip(nets, features):
            with autocast(device, dtype):
                found[rows] = F.normalize(net(x)[0].float(), dim=1).half()
        if progress:
            progress(min(n, rows[-1].item() + WORLD), n)
    nets.train()
    labels = sum_over_processes(labels)
    refuse_unreadable((labels == NO_IMAGE).sum().item(), n)
    features = [sum_over_processes(found)[labels >= 0] for found in features]
    if not all(found.isfinite().all() for found in features):
        stop("features are not finite: the weights are damaged, or try --dtype fp32", 1)
    return features, labels[labels >= 0]

def refuse_unlike_classes(train, val, data):
    odd = set(getattr(train, "classes", ())) ^ set(getattr(val, "classes", ()))
    if odd:
        stop(f"--data {data}: train/ and val/ must have the same class folders; {min(odd)} is in one alone")

# ------------------------------------------------------- views (A.1): workers crop, the device changes colors
class MultiCrop:
    """(epoch, index) -> uint8 crops, channels last, [(2, S, S, 3), (L, s, s, 3)], and whether the image was
    unreadable. Such an image is named, and the next readable one is cropped in its place."""
    def __init__(self, images, cfg):
        self.images, self.cfg = images, cfg

    def __getitem__(self, key):
        (epoch, index), cfg = key, self.cfg
        image, unreadable = self.read(index)
        with torch.random.fork_rng(devices=[]):   # torchvision draws crops from the global generator
            reseed(cfg.seed, epoch, index)
            of_size = [[crop(image, cfg.global_size, cfg.global_scale) for _ in range(2)],
                       [crop(image, cfg.local_size, cfg.local_scale) for _ in range(cfg.local_crops)]]
        return [torch.stack(crops).movedim(1, -1) for crops in of_size if crops], unreadable

    def read(self, index):
        for skipped in range(100):
            try:
                return to_rgb(self.images[(index + skipped) % len(self.images)][0]), skipped > 0
            except OSError as error:   # other errors are a data set's own
                if not skipped:
                    warn(f"skipped {error}")
        raise OSError("100 images in a row cannot be read, the first is named above")

def crop(image, size, scale):
    """(3, H, W) uint8 -> a random part of it (3, size, size), as torchvision's RandomResizedCrop."""
    part = RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])   # its ratios
    return TF.resized_crop(image, *part, [size, size], TF.InterpolationMode.BICUBIC, antialias=True)

def make_views(crops, cfg, device, step):
    """augment(x) of Algorithm 1: the loader's crops -> views as the networks get them, a tensor of each size,
    [(2B, 3, S, S), (LB, 3, s, s)]. The first B rows are global view 0, and so on."""
    drawn, views = draw_photometric(cfg, step), []
    for x, first in zip(crops, (0, 2)):   # (B, 2, S, S, 3), views from 0 on; (B, L, s, s, 3), views from 2 on
        p = {name: of[..., first:first + x.shape[1], :].flatten(-2) for name, of in drawn.items()}
        x = x.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1).movedim(-1, 1)
        views.append(normalize(photometric(x, p)).contiguous(memory_format=torch.channels_last))
    return views

def draw_photometric(cfg, step):
    """What happens in a step to each view of this process's images: CPU tensors (..., V, B), drawn for all n
    images of the step, so that they are the same for any number of processes."""
    V, n, g = 2 + cfg.local_crops, cfg.batch_size, generator(cfg.seed, "photometric", step)
    def rand(*more):
        return torch.rand(*more, V, n, generator=g)
    view = torch.arange(V)[:, None]
    blur_rate = torch.tensor([1.0, 0.1, 0.5])[view.clamp_max(2)]   # of global view 0, 1, local ones [DINO]
    p = dict(flip=rand() < 0.5, jitter=rand() < 0.8)   # [DINO]
    p["order"] = rand(4).argsort(0)   # order[place] says which color operation comes at this place
    p["amount"] = (2 * rand(4) - 1) * torch.tensor(cfg.jitter).view(4, 1, 1)
    p["amount"][:3] = (1 + p["amount"][:3]).clamp_min(0)   # factors; only the hue's amount is an angle
    p["grayscale"] = rand() < cfg.grayscale
    p["blur"] = (rand() < blur_rate) & (cfg.blur[1] > 0)
    p["sigma"] = cfg.blur[0] + (cfg.blur[1] - cfg.blur[0]) * rand()
    p["solarize"] = (rand() < cfg.solarize) & (view == 1)
    share = slice(RANK * n // WORLD, (RANK + 1) * n // WORLD)
    return {name: values[..., share] for name, values in p.items()}

def photometric(x, p):
    """uint8 crops (n, 3, S, S) on the device -> [0, 1], changed as p says; colors in an image's own order."""
    assert x.dtype == torch.uint8, f"crops are {x.dtype}; give uint8, where 255 is white"
    x = x.float() / 255
    apply_to(x, TF.horizontal_flip, p["flip"])
    for place in range(4):
        for i, adjust in enumerate((adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)):
            apply_to(x, adjust, p["jitter"] & (p["order"][place] == i), p["amount"][i])
    apply_to(x, adjust_saturation, p["grayscale"], torch.zeros(len(x)))
    apply_to(x, gaussian_blur, p["blur"], p["sigma"])
    apply_to(x, functools.partial(TF.solarize, threshold=128 / 255), p["solarize"])
    return x

def apply_to(x, operation, mask, *amounts):
    """Change the images of x that a CPU mask (n,) names. The CPU knows which, so no GPU is waited for."""
    if mask.any():
        rows = mask.nonzero().flatten().to(x.device, non_blocking=True)
        amounts = [a[mask].to(x.device, non_blocking=True).view(-1, 1, 1, 1) for a in amounts]
        x[rows] = operation(x[rows], *amounts)

# Each does to a batch x (n, 3, H, W) in [0, 1], with factors f (n, 1, 1, 1), what torchvision's does to one.
def adjust_brightness(x, f):
    return (f * x).clamp(0, 1)

def adjust_contrast(x, f):
    return torch.lerp(TF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True), x, f).clamp(0, 1)

def adjust_saturation(x, f):
    return torch.lerp(TF.rgb_to_grayscale(x), x, f).clamp(0, 1)

def adjust_hue(x, f):
    """Turn the hue by f of a full circle, through HSV."""
    r, g, b = x.split(1, 1)
    v = x.amax(1, keepdim=True)
    c = v - x.amin(1, keepdim=True)   # chroma; for gray it is 0, and the hue h (in sixths) may be any
    d = c.clamp_min(1e-8)
    h = torch.where(v == r, (g - b) / d, torch.where(v == g, (b - r) / d + 2, (r - g) / d + 4))
    # Back: red is v - c clamp(min(k, 4 - k), 0, 1) with k = h + 5 mod 6; green has 3 for 5, blue has 1.
    k = (h + 6 * f + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6
    return v - c * torch.minimum(k, 4 - k).clamp(0, 1)

def gaussian_blur(x, sigma, radius=6):
    """Blur by sigma pixels (n, 1, 1, 1), mirrored at the edges."""
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernel = (-0.5 * (offset / sigma.clamp_min(1e-3)) ** 2).softmax(-1)   # (n, 1, 1, 13): blurs within rows
    x = F.pad(x, [radius] * 4, "reflect").transpose(0, 1)   # a group for each image, which has its own kernel
    return F.conv2d(F.conv2d(x, kernel, groups=len(kernel)), kernel.mT, groups=len(kernel)).transpose(0, 1)

MEAN_STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)   # of ImageNet
def normalize(x):
    mean, std = MEAN_STD.to(x.device, non_blocking=True)
    return (x - mean) / std

# ----------------------------------------------------------------------------------------------------- images
NO_IMAGE = -2   # label of an unreadable image; -1 is that of an image without label
HIDDEN = (".", "@eaDir")   # no file below such a name is an image of a data set; the latter are thumbnails
def get_images(cfg, part):
    """-> data set of (image, label); part is "train" or "val". --data names a folder or a data set."""
    if cfg.data == "toy":
        return TensorDataset(*draw_toy(4096 if part == "train" else 1024, part))
    if os.path.isdir(cfg.data):
        folder = os.path.join(cfg.data, part)
        if part == "train" and not os.path.isdir(folder):   # the folder itself holds the classes
            folder = cfg.data
            if os.path.isdir(os.path.join(cfg.data, "val")):
                stop(f"--data {cfg.data}: has val/ but no train/: rename the training folder")
        def is_image(path):
            hidden = any(name.startswith(HIDDEN) for name in path[len(folder):].split(os.sep))
            return torchvision.datasets.folder.is_image_file(path) and not hidden
        try:
            return ImageFolder(folder, loader=read_image, is_valid_file=is_image)
        except OSError as error:
            stop(f"--data {cfg.data}: {error}. Each class wants a folder of images in {folder}, at least one")
    known = {name.lower(): name for name in torchvision.datasets.__all__ if name != "ImageNet"}   # not online
    name = known.get(cfg.data.lower().replace("_", ""))
    if name is None:
        stop(f"--data {cfg.data}: no such folder, nor a data set of torchvision such as cifar10, nor toy")
    for my_turn in (RANK == 0, LOCAL_RANK == 0 < RANK, LOCAL_RANK > 0):   # one downloads, then one a machine
        if my_turn:
            images = torchvision_images(getattr(torchvision.datasets, name), cfg.data_root, part)
        wait_for_all()
    return images

def torchvision_images(data_set, root, part):
    if "train" in inspect.signature(data_set).parameters:
        return data_set(root, train=part == "train", download=True)
    first, second = ("train+unlabeled", "train") if part == "train" else ("test", "val")
    try:
        return data_set(root, split=first, download=True)
    except ValueError as error:
        if "Unknown value" not in str(error):   # else this data set calls its parts otherwise
            raise
    return data_set(root, split=second, download=True)

class ImageFolder(torchvision.datasets.ImageFolder):
    def find_classes(self, folder):
        classes = [name for name in super().find_classes(folder)[0] if not name.startswith(HIDDEN)]
        return classes, {name: label for label, name in enumerate(classes)}

def read_image(path):
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:   # PIL raises many kinds
        raise OSError(f"{path} ({error})") from error

def to_rgb(image):
    """PIL image or uint8 tensor -> (3, H, W) uint8, on white. Raises OSError for more than 8 bits."""
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        return image.expand(3, -1, -1)
    if not isinstance(image, Image.Image):   # floats would train as black
        raise TypeError(f"{type(image)}: a data set gives images as PIL's or as uint8 tensors (3 or 1, H, W)")
    if image.mode[0] in "FI":
        raise OSError(f"mode {image.mode}: which value is white? save it with 8 bits, where 255 is")
    if "A" in image.getbands() or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return TF.pil_to_tensor(image.convert("RGB"))

def refuse_unreadable(n, total):
    if n > 0.01 * total:
        stop(f"--data: {n} of {total} images cannot be read, more than 1 %: mend or remove those named", 1)

def batches(n, cfg, start=0):
    """Yields this process's keys (epoch, index) of each batch from step `start` on, an order each epoch."""
    per_epoch, share = n // cfg.batch_size, cfg.batch_size // WORLD
    for step in range(start, cfg.epochs * per_epoch):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == start:
            order = torch.randperm(n, generator=generator(cfg.seed, "order", epoch)).tolist()
        first = i * cfg.batch_size + RANK * share
        yield [(epoch, index) for index in order[first:first + share]]

def make_loader(dataset, device, workers, **options):
    """A DataLoader. Its workers are forked on Linux, because a fork server would outlive a killed run."""
    fork = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(dataset, num_workers=workers, multiprocessing_context=fork, worker_init_fn=quiet_worker,
                      pin_memory=device.type == "cuda", **options)

def quiet_worker(_):   # signals are for the training process, which ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

# ---------------------------------------------------------------------------------------- log and checkpoints
def log(cfg, record):
    if RANK == 0:
        with open(f"{cfg.out}/log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")

def write(value, path):
    torch.save(value, path + ".tmp")
    os.replace(path + ".tmp", path)   # so a file under its name is whole

def save(cfg, models, step, scaler, images):
    """Write the momentum backbones under timm's names, then checkpoint.pth, all that resuming needs."""
    for m in models:
        if not all(p.isfinite().all() for p in m.params):
            stop(f"step {step}: weights of model {m.i} not finite: lower the rates, or use --dtype fp32", 1)
    if RANK == 0:
        state = dict(config=asdict(cfg), step=step, images=fingerprint(images), scaler=scaler.state_dict())
        for m in models:
            write(m.n_.backbone.model.state_dict(), f"{cfg.out}/model{m.i}.pth")
            state[f"model{m.i}"] = dict(net=m.net.state_dict(), momentum_net=m.n_.state_dict(),
                                        optimizers=[optimizer.state_dict() for optimizer in m.optimizers])
        write(state, f"{cfg.out}/checkpoint.pth")

def resume(cfg, models, scaler, state):
    """Fill models and scaler from a checkpoint, and empty it, as it is large -> the steps it has done."""
    for m in models:
        saved = state.pop(f"model{m.i}")
        m.net.load_state_dict(saved["net"])
        m.n_.load_state_dict(saved["momentum_net"])
        for optimizer, of_optimizer in zip(m.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(of_optimizer)
    if state["scaler"]:   # fp32 has none
        scaler.load_state_dict(state["scaler"])
    say(f"resumed {cfg.out}/checkpoint.pth at step {state['step']}")
    return state["step"]

def fingerprint(images):
    """What must stay the same, wherever the images lie: their number, and the names of their classes."""
    return [len(images), seed_of(*sorted(getattr(images, "classes", ())))]

def read_checkpoint(path):
    """-> the dict of a checkpoint, read whole: Windows could not replace a file that stays mapped."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()   # compares check sums; torch.load takes a flipped bit without a word
    except Exception as error:   # damage has many names
        damaged = error
    if damaged:
        stop(f"{path}: no sound checkpoint ({damaged}). Give another, or delete it to start anew")
    return torch.load(path, map_location="cpu", weights_only=True)

def find_checkpoint(cfg, images):
    """-> the checkpoint of --out, or None. Refuses other settings and images, and processes that disagree."""
    path, state = f"{cfg.out}/checkpoint.pth", None
    if os.path.exists(path):
        state = read_checkpoint(path)
        refuse_other_settings(path, state, cfg, images)
    settings = asdict(cfg) | dict.fromkeys(["out", "data", "data_root", "workers"])   # a machine's own
    mine = torch.tensor(seed_of(state and state["step"], fingerprint(images), settings))
    if sum_over_processes(mine) != WORLD * mine:   # a hash, which all must share
        stop("processes differ in settings, images or the checkpoint in --out: give all the same", 1)
    return state

def refuse_other_settings(path, state, cfg, images):
    refused, said = [], []
    for f in fields(cfg):
        was, now = state["config"].pop(f.name, f.default), getattr(cfg, f.name)   # a fork may have new flags
        if was != now:
            differing = said if f.metadata["changeable"] else refused
            differing.append(f"--{f.name} was {was}, is {now}")
    refused += [f"--{name} was {was}, is no flag" for name, was in state["config"].items()]   # of a fork
    if refused:
        stop(f"{path}: {'; '.join(refused)}. Give the same, or another --out, which may start from this "
             f"run's weights, as for more epochs: --init1 model1.pth --init2 model2.pth")
    if state["images"] != fingerprint(images):
        stop(f"{path}: of other images ({state['images'][0]}, now {len(images)}) or classes: give those")
    if said:
        say(f"resuming {path} with other settings: {'; '.join(said)}")

# ------------------------------------------------------------------------------- processes, seeds and signals
RANK = int(os.environ.get("RANK", 0))   # torchrun sets these three: this process,
WORLD = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1   # the number of all,
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))   # and this one among those of its machine
caught = {}   # signal -> when it first came; the training loop ends after the step in which one came
def say(text):
    if RANK == 0:
        print(text, flush=True)

def warn(text):
    print(text, file=sys.stderr)

def stop(message, code=2):
    """End with a sentence. Code 2: a wrong command; 1: a failed run, said by each process; 128 + signal."""
    if LOCAL_RANK == 0 or code == 1:
        warn(message)
    raise SystemExit(code)

def join_processes(cfg):
    """-> device. Under torchrun joins the others, by NCCL or gloo. Fills in --dtype and --workers."""
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "RANK" not in os.environ:
        stop("srun's tasks do not know each other: srun --ntasks-per-node=1 torchrun --nproc_per_node=8 ...")
    if cfg.batch_size % WORLD:
        stop(f"--batch_size {cfg.batch_size} is no multiple of {WORLD} processes: change it")
    gpu = torch.cuda.is_available()
    device = torch.device("mps" if torch.backends.mps.is_available() and "RANK" not in os.environ else "cpu")
    if gpu:
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    if cfg.dtype == "auto":
        half = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        cfg.dtype = half if gpu else "fp32"
    if cfg.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cfg.workers = min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if gpu else 1
    return device

def autocast(device, dtype):
    half = torch.bfloat16 if dtype == "bf16" else torch.float16
    return torch.autocast(device.type, half, enabled=dtype in ("bf16", "fp16"))

def sum_over_processes(x):
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x

def wait_for_all():
    sum_over_processes(torch.zeros(1))   # which ends when all have come

def seed_of(*key):
    """A 63-bit seed from numbers and words. Every draw is seeded by one, so a resumed run repeats the
    uninterrupted one, on GPUs up to the order of sums, with any number of workers."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1

def generator(*key):
    return torch.Generator().manual_seed(seed_of(*key))

def reseed(*key):
    torch.manual_seed(seed_of(*key))

def catch_signals():
    """SIGTERM and SIGINT now wait for a step's end; a second Ctrl-C does not, as when a loader hangs."""
    caught.clear()
    def handler(number, frame):
        first = caught.setdefault(number, time.time())
        if number == signal.SIGINT and time.time() - first >= 1:   # one press may arrive twice
            raise KeyboardInterrupt
    if threading.current_thread() is threading.main_thread():   # no other can set handlers
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)

def after_step(unreadable):
    """Number of this process's unreadable images -> that of all processes; a signal that any caught."""
    counts = torch.tensor([unreadable, signal.SIGTERM in caught, signal.SIGINT in caught])
    n, terminated, interrupted = sum_over_processes(counts).tolist()   # on the CPU, so no GPU is waited for
    return n, signal.SIGTERM if terminated else signal.SIGINT if interrupted else None

# ----------------------------------------------------------------------------------------------- command line
def key_value(text):
    """'channels=16,32' -> ('channels', (16, 32)). A value that is no Python literal stays a string."""
    key, value = text.split("=", 1)
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value

def read_flags(config, argv, about):
    """Command line -> an object of the dataclass `config`. Of a flag that is given twice the last counts."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--FLAG ...]", description=about, allow_abbrev=False)
    for f in fields(config):
        options = dict(default=f.default, help=f.metadata["help"] + " (default: %(default)s)")
        kind, *more = typing.get_args(f.type) or [f.type]
        if more:   # a tuple of two floats, say, or of any number of them
            options["nargs"] = "+" if ... in more else 1 + len(more)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is dict:
            options.update(type=key_value, nargs="*", metavar="KEY=VALUE")
        else:
            options.update(type=kind, choices=f.metadata["choices"])
        parser.add_argument(f"--{f.name}", **options)
    given = vars(parser.parse_args(argv))
    for f in fields(config):
        value, high = given[f.name], f.metadata["high"]
        if isinstance(value, list):   # so argparse gives tuples and dicts
            given[f.name] = dict(value) if f.type is dict else tuple(value)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, (int, float)) and not 0 <= one <= high:
                parser.error(f"argument --{f.name}: {one} is not from 0 to {high}")
    return config(**given)

# --demo stands for these flags. Those of a backbone are left out where its --arch is given.
DEMO = """--data toy --out runs/demo --epochs 14 --knn_every 14 --batch_size 64 --warmup_epochs 1 --t_norm
    --freeze_last_layer 0 --out_dim 256 --hidden_dim 256 --bottleneck_dim 32 --t_dim 48 --t_depth 1
    --t_heads 3 --global_size 24 --global_scale 0.5 1 --local_size 12 --local_scale 0.3 0.8 --local_crops 2
    --jitter 0.4 0.4 0.4 0.2 --blur 0 0 --solarize 0 --drop_path 0 --cnn_optimizer adamw --cnn_lr 0.01
    --vit_lr 0.01 --ema 0.99 --center_momentum 0.5 --teacher_temp 0.015 --teacher_temp_start 0.015"""
DEMO1 = ("--arch1 resnet18 --model_kwargs1 layers=1,1,1,1 channels=16,32,48,64 stem_type=deep stem_width=8 "
         "output_stride=8")
DEMO2 = "--arch2 vit_tiny --model_kwargs2 img_size=24 patch_size=4 embed_dim=64 depth=3 num_heads=2"
def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--demo" in argv:
        given = " ".join(argv)
        parts = DEMO, "" if "--arch1" in given else DEMO1, "" if "--arch2" in given else DEMO2
        argv = " ".join(parts).split() + argv
    cfg = read_flags(Config, argv, __doc__.split("\n\n")[0])
    losses = set(cfg.losses.split(","))
    if not {"sm"} <= losses <= {"sm", "cm", "st", "ct"}:
        stop(f"--losses {cfg.losses}: give sm and any of cm,st,ct, with commas between them")
    for name in ("batch_size", "epochs", "student_temp", "teacher_temp", "teacher_temp_start"):
        if not getattr(cfg, name):
            stop(f"--{name} 0: give more")
    if cfg.warmup_epochs > cfg.epochs:
        stop(f"--warmup_epochs {cfg.warmup_epochs} is more than --epochs {cfg.epochs}: lower it")
    return cfg

# ------------------------------------------------------------------------------------------------- toy images
def draw_toy(n, seed, size=48, cells=16):
    """The built-in data: images (n, 3, size, size) uint8, labels (n,). A class is a shape, repeated on a
    turned grid in many colors, sizes and angles."""
    g, grid, labels = generator("toy", seed), torch.arange(size) - size / 2, torch.arange(n) % 8
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for shape in range(8):
        rows = (labels == shape).nonzero().flatten()
        def rand(*dims):
            return torch.rand(len(rows), *dims, generator=g)
        # Where is each pixel on the turned grid, and in which cell? A cell holds a copy of the shape.
        angle, period = 2 * math.pi * rand(1, 1), 8 + 3 * rand(1, 1)
        u, v = turn(grid, grid[:, None], angle)
        u, v = u / period + rand(1, 1) + cells / 2, v / period + rand(1, 1) + cells / 2
        cell = (u.floor() * cells + v.floor()).long().view(len(rows), 1, -1)
        def rand_of_copy(k):   # k numbers for each copy, at all of its pixels
            return rand(k, cells ** 2).gather(2, cell.expand(-1, k, -1)).unflatten(2, (size, size))
        angle, radius = rand_of_copy(2).unbind(1)
        color, ground, radius = 0.6 + 0.4 * rand_of_copy(3), 0.3 * rand_of_copy(3), 0.38 + 0.12 * radius
        # The pixel's place within its copy, turned and scaled; copies end at the square around the shape.
        u, v = turn((u % 1 - 0.5) / radius, (v % 1 - 0.5) / radius, 2 * math.pi * angle)
        distance = torch.maximum(outside(shape, u, v), torch.maximum(u.abs(), v.abs()) - 1.1)
        inside = torch.sigmoid(-6 * distance)[:, None]
        images[rows] = (255 * torch.lerp(ground, color, inside)).to(torch.uint8)
    return images, labels

def turn(u, v, angle):
    return angle.cos() * u + angle.sin() * v, angle.cos() * v - angle.sin() * u

def outside(shape, u, v):
    """How far points (u, v) lie outside of one of eight shapes of like size, roughly; negative inside."""
    r, x, y = torch.hypot(u, v), u.abs(), v.abs()
    shapes = [r - 0.7,                                             # disk
              (r - 0.75).abs() - 0.15,                             # ring
              torch.maximum(x - 0.4, y - 1),                       # bar
              torch.minimum(x, y) - 0.19,                          # cross
              (x - 0.6).abs() - 0.17,                              # two bars
              torch.maximum(v, 0.87 * x - 0.5 * v) - 0.54,         # triangle
              torch.maximum(r - 1.02, u),                          # half disk
              torch.maximum(r - 1.05, 3 * u * v)]                  # bow tie
    return shapes[shape]

# ------------------------------------------------------------------------------------------------------- main
def run(cfg):
    device = join_processes(cfg)
    images, val = get_images(cfg, "train"), None
    say(f"{len(images):,} images, {len(getattr(images, 'classes', ()))} named classes")
    if len(images) < cfg.batch_size:
        stop(f"--batch_size {cfg.batch_size} is more than the {len(images)} images: lower it")
    if cfg.knn_every:
        val = get_images(cfg, "val")
        refuse_unlike_classes(images, val, cfg.data)
    cfg.out = cfg.out or f"runs/{cfg.arch1}-{cfg.arch2}"
    models = build_models(cfg, device)
    state = find_checkpoint(cfg, images)
    os.makedirs(cfg.out, exist_ok=True)
    backbones = [m.n_.backbone for m in models]
    for i, b in enumerate(backbones, 1):
        size = sum(p.numel() for p in b.parameters()) / 1e6
        say(f"model {i}: {b.timm_name}, trained as a {b.family}, {size:.1f} M parameters, search in "
            f"{b.num_tokens} local features, lambda{i} = {getattr(cfg, f'lambda{i}'):g}")
    say(f"processes: {WORLD}, on {device.type}, {cfg.dtype}")
    train(cfg, models, images, val, state, device)
    say("\nIn Python, the features that were trained, of normalized images (B, 3, H, W):")
    for i, b in enumerate(backbones, 1):
        say_how_to_load(i, b, f"{cfg.out}/model{i}.pth", f"net{i}.forward_features(images){b.pooling}")

def say_how_to_load(i, backbone, file, feature):
    """Print lines of Python that load weights and give a feature."""
    kwargs = "".join(f"{name}={value!r}, " for name, value in backbone.timm_kwargs.items())
    call = f"timm.create_model({backbone.timm_name!r}, {kwargs}num_classes=0, checkpoint_path={file!r})"
    say(f"net{i} = {call}.eval()\nfeature{i} = {feature}")

def main(argv=None, parse=parse_args, run=run):
    """Run a program of this project, and leave nothing behind, even when it fails."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    others = set(multiprocessing.active_children())   # a caller's own
    try:
        run(parse(argv))
    finally:
        if threading.current_thread() is threading.main_thread():
            if hasattr(signal, "SIGCHLD"):   # torch's handler would raise at the deaths below
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
