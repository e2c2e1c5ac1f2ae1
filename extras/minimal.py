"""MOKD on a page: two models learn together, without labels, each from its own momentum net and
from the other's (Song et al., CVPR 2023, arXiv 2304.06461).

    python extras/minimal.py                  # CIFAR-10, which torchvision downloads
    python extras/minimal.py --data FOLDER    # images in FOLDER/train/CLASS and FOLDER/val/CLASS

It needs nothing of mokd.py; a test keeps their steps equal. Names are Algorithm 1's: m and t are of
MLP-Head and T-Head, Z is a representation; a trailing _ is a momentum net's, _s a search's. Shapes:
B images have V views, first two global, then local ones; N tokens have C channels; K is OUT_DIM.
"""
import argparse
import copy
import math
import time

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

# For CIFAR-10 on a CPU. Comments: the paper's for ImageNet, where MODEL2 has dynamic_img_size=True.
MODEL1 = dict(model_name="test_resnet", output_stride=8)   # resnet50, zero_init_last=False
MODEL2 = dict(model_name="test_vit", img_size=24, patch_size=6)   # vit_small_patch16_224
OUT_DIM = 256   # 65536
HIDDEN_DIM, BOTTLENECK_DIM = 256, 32   # 2048, 256
T_DIM, T_DEPTH, T_HEADS = 48, 1, 3   # 384, 3, 6
T_NORM = True   # False. True keeps a T-Head from collapse at a TAU_ as low as here
LAMBDA1, LAMBDA2 = 1.0, 1.0   # 1 for the larger model, 0.1 for the smaller
TAU, TAU_ = 0.1, 0.015   # 0.1; from 0.04 to 0.07 in 30 epochs
EMA, CENTER_MOMENTUM = 0.97, 0.5   # 0.996, 0.9
BATCH_SIZE, LR = 32, 0.004   # 256; SGD at 0.1 for the CNN, AdamW at 0.0003 for the ViT
GLOBAL_SIZE, LOCAL_SIZE, LOCAL_CROPS = 24, 18, 2   # 224, 96, 8
GLOBAL_SCALE, LOCAL_SCALE = (0.3, 1.0), (0.2, 0.6)   # (0.25, 1), (0.05, 0.25)

def step(n1, n2, n1_, n2_, C, x, optimizer, l):
    """Algorithm 1 on views x, [(2B, 3, S, S), (., 3, s, s)], with centers C (4, K) -> 8 losses."""
    with torch.autocast(x[0].device.type, torch.bfloat16, enabled=x[0].is_cuda):
        m1, t1, Z1 = n1(x)   # students see all views; m1, t1: (V, B, K)
        m2, t2, Z2 = n2(x)
        with torch.no_grad():   # no gradient reaches momentum nets, targets or queries
            m1_, t1_, Z1_ = n1_(x[:1])   # only the global ones; m1_, t1_: (2, B, K)
            m2_, t2_, Z2_ = n2_(x[:1])
            # In each pair of different views, a momentum net's global view g teaches view v. In a
            # search, view v is the query. Algorithm 1 writes t1_(Z2, Z1_) and t2_(Z1, Z2_).
            pairs = [(g, v) for g in range(2) for v in range(len(Z1)) if v != g]
            t1_s = search(n1_, n2, Z2, Z1_, pairs)   # (pairs, B, K)
            t2_s = search(n2_, n1, Z1, Z2_, pairs)

    # Eq. (1): logits become probabilities under the same names, as they do in the paper.
    logits_ = torch.stack([m1_, t1_, m2_, t2_])
    m1_, t1_, m2_, t2_ = target(logits_, C[:, None, None])
    t1_s = target(t1_s, C[1])
    t2_s = target(t2_s, C[3])
    m1, t1, m2, t2 = (torch.stack([m1, t1, m2, t2]) / TAU).log_softmax(-1)   # log, which H wants

    g, v = torch.tensor(pairs).T
    loss_sm1 = H(m1_[g], m1[v])   # eq. (2): self-distillation, MLP-Heads
    loss_sm2 = H(m2_[g], m2[v])
    loss_st1 = H(t1_[g], t1[v])   # eq. (3): self-distillation, T-Heads
    loss_st2 = H(t2_[g], t2[v])
    loss_cm1 = H(m2_[g], m1[v])   # eq. (5): cross-distillation, MLP-Heads
    loss_cm2 = H(m1_[g], m2[v])
    loss_ct1 = H(t2_s, t1[v])   # eq. (7): cross-distillation, T-Heads
    loss_ct2 = H(t1_s, t2[v])
    loss1 = (loss_sm1 + loss_st1) + LAMBDA1 * (loss_cm1 + loss_ct1)   # eq. (9), of eq. (4) and (8)
    loss2 = (loss_sm2 + loss_st2) + LAMBDA2 * (loss_cm2 + loss_ct2)
    optimizer.zero_grad()
    (loss1 + loss2).backward()   # each reaches the weights of its own model alone
    optimizer.step()

    for n, n_ in ((n1, n1_), (n2, n2_)):   # batch norm's statistics stay each net's own
        for p, p_ in zip(n.parameters(), n_.parameters()):
            p_.lerp_(p.detach(), 1 - l)   # l p_ + (1 - l) p
    C.lerp_(logits_.mean((1, 2)), 1 - CENTER_MOMENTUM)   # DINO's, without what searches found
    losses = loss_sm1, loss_st1, loss_cm1, loss_ct1, loss_sm2, loss_st2, loss_cm2, loss_ct2
    return torch.stack(losses).detach()

def H(t, log_s):   # of Algorithm 1, but given log s: the logarithm of a softmax could be -inf
    return -(t * log_s).sum(-1).mean()

def target(logits, C):   # eq. (1) with tau', after DINO's centering
    return ((logits - C) / TAU_).softmax(-1)

def search(n_, n, Z, Z_, pairs):
    """Eq. (6), Fig. 3: a query z = Conv1x1(GAP(Z)) of n in the momentum T-Head of the other, n_."""
    return torch.stack([n_.t_head(Z_[g], n.embed(Z[v].mean(1))) for g, v in pairs]).float()

class Net(nn.Module):
    """[m, t, Z] = n(x): a timm model with an MLP-Head and a T-Head (3.1, 3.4)."""
    def __init__(self, model):
        super().__init__()
        self.backbone = timm.create_model(num_classes=0, **model)
        N, C = self.tokens(torch.zeros(1, 3, GLOBAL_SIZE, GLOBAL_SIZE)).shape[1:]
        self.mlp = nn.Sequential(
            nn.Linear(C, HIDDEN_DIM), nn.GELU(), nn.Linear(HIDDEN_DIM, HIDDEN_DIM), nn.GELU(),
            nn.Linear(HIDDEN_DIM, BOTTLENECK_DIM))
        self.last_m = last_layer(BOTTLENECK_DIM)
        self.embed = nn.Linear(C, T_DIM)   # Conv1x1
        self.pos = nn.Parameter(0.02 * torch.randn(1, T_DIM, math.isqrt(N), math.isqrt(N)))
        body = [Block(T_DIM, T_HEADS, qkv_bias=True, norm_layer=LayerNorm) for _ in range(T_DEPTH)]
        self.blocks = nn.Sequential(*body, LayerNorm(T_DIM))
        self.last_t = last_layer(T_DIM)

    def tokens(self, images):
        """(B, 3, S, S) -> (B, N, C): a CNN's last map, or a ViT's patches without CLS."""
        y = self.backbone.forward_features(images)
        return y.flatten(2).mT if y.dim() == 4 else y[:, self.backbone.num_prefix_tokens:]

    def mlp_head(self, Z):
        """GAP(Z) -> logits (B, K), by four linear layers, as in DINO."""
        return self.last_m(F.normalize(self.mlp(Z.mean(1))))

    def t_head(self, Z, query=None):
        """Tokens (B, N, C) and a query (B, T_DIM) -> logits (B, K), by ViT blocks and a layer."""
        N = Z.shape[1]
        pos = F.interpolate(self.pos, math.isqrt(N), mode="bicubic")   # for local views
        x = self.embed(Z) + pos.flatten(2).mT
        if query is not None:
            x = torch.cat([query[:, None], x], 1)   # one more token, without a position
        x = self.blocks(x)[:, -N:].mean(1)   # the query is dropped
        return self.last_t(F.normalize(x) if T_NORM else x)

    def forward(self, x):
        """-> logits m (V, B, K) and t (V, B, K), and a list Z of V tensors (B, N, C)."""
        Z = []
        for views in x:   # those of one size at once
            Z += self.tokens(views).split(len(x[0]) // 2)
        m = torch.stack([self.mlp_head(z) for z in Z])
        t = torch.stack([self.t_head(z) for z in Z])
        return m.float(), t.float(), Z

def last_layer(in_dim):
    """Linear, with weights gain * direction / |direction|, as in DINO. The gain starts at 1."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(in_dim, OUT_DIM, bias=False))
    nn.init.ones_(layer.parametrizations.weight.original0)
    return layer

def view_of(size, scale):
    """DINO's, but for blur. At 224 pixels: v2.RandomApply([v2.GaussianBlur(13, (0.1, 2))], 0.5)."""
    return v2.Compose([
        v2.RandomResizedCrop(size, scale),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomSolarize(128, p=0.1),
        TO_TENSOR])

TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
VIEWS = [view_of(GLOBAL_SIZE, GLOBAL_SCALE)] * 2 + [view_of(LOCAL_SIZE, LOCAL_SCALE)] * LOCAL_CROPS
WHOLE = v2.Compose([v2.Resize(GLOBAL_SIZE), v2.CenterCrop(GLOBAL_SIZE), TO_TENSOR])   # for k-NN

def multi_crop(image):
    return [view(image) for view in VIEWS]

@torch.no_grad()
def knn_accuracy(net, train, val, device, k=20):
    """DINO's weighted k-NN (A.2), in percent. A neighbor weighs exp(cosine / 0.07)."""
    def features(images):
        return F.normalize(net.tokens(images.to(device)).mean(1))
    net.eval()
    bank = torch.cat([features(images) for images, _ in train])
    labels = torch.tensor(train.dataset.targets, device=device)
    right = 0
    for images, answers in val:
        cosine, nearest = (features(images) @ bank.T).topk(k)
        votes = F.one_hot(labels[nearest]) * (cosine[:, :, None] / 0.07).exp()   # (B, k, classes)
        right += (votes.sum(1).argmax(1) == answers.to(device)).sum()
    net.train()
    return 100 * right / len(val.dataset)

def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="folder of images; without it CIFAR-10")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = args.device
    torch.manual_seed(0)

    def loader_of(part, transform, shuffle=False):
        if args.data:
            images = datasets.ImageFolder(f"{args.data}/{part}", transform)
        else:
            images = datasets.CIFAR10("data", part == "train", transform, download=True)
        return DataLoader(images, BATCH_SIZE, shuffle, drop_last=shuffle, num_workers=args.workers)
    loader = loader_of("train", multi_crop, shuffle=True)
    train = loader_of("train", WHOLE)
    val = loader_of("val", WHOLE)
    n1 = Net(MODEL1).to(device)
    n2 = Net(MODEL2).to(device)
    n1_ = copy.deepcopy(n1).requires_grad_(False)   # the first line of Algorithm 1
    n2_ = copy.deepcopy(n2).requires_grad_(False)
    C = torch.zeros(4, OUT_DIM, device=device)   # centers of m1_, t1_, m2_, t2_
    optimizer = torch.optim.AdamW([*n1.parameters(), *n2.parameters()], weight_decay=0.04)

    def report(text):
        knn1, knn2 = [knn_accuracy(n_, train, val, device) for n_ in (n1_, n2_)]
        print(f"{text}  k-NN {knn1:.1f} {knn2:.1f} %", flush=True)
    report("untrained")
    for epoch in range(args.epochs):
        start = time.time()
        losses = 0
        for i, (crops, _) in enumerate(loader):
            x = [torch.cat(crops[:2]).to(device), torch.cat(crops[2:]).to(device)]
            done = epoch + i / len(loader)
            cosine = (1 + math.cos(math.pi * done / args.epochs)) / 2   # from 1 to 0
            optimizer.param_groups[0]["lr"] = LR * cosine * min(1, done)   # after an epoch's rise
            losses += step(n1, n2, n1_, n2_, C, x, optimizer, 1 - (1 - EMA) * cosine)
        means = "".join(f" {loss:.3f}" for loss in losses / len(loader))
        report(f"epoch {epoch + 1}  sm, st, cm, ct of 1, 2:{means}  {time.time() - start:.0f} s")

if __name__ == "__main__":
    main()
