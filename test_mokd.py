"""Tests of mokd.py, eval_knn.py and eval_linear.py. Each compares with an independent naive computation, with
stored numbers of the released code, or with a property that the paper states.

    python -m pytest -q test_mokd.py                  # all
    python -m pytest -q test_mokd.py -m "not slow"    # about two minutes less: no full-size networks

The sections, in order:

    the released code's numbers                         one of its steps, repeated from stored weights
    Algorithm 1, transcribed naively                    a step against a plain loop; what it stores and costs
    gradients and independence                          where no gradient goes; what no partner changes
    heads, schedules                                    both heads, the schedules, clipping, weight decay
    recipes, flags                                      the paper's defaults, --recipe release, wrong flags
    backbones                                           every kind of pair, other timm models, pooling
    weights in and out                                  for timm and torchvision; --init1 of theirs and DINO's
    data                                                decoding, crops, photometric operations, data sets
    k-NN                                                votes and the features they compare
    whole runs, by the command line                     resuming, several processes, errors, precision, --demo
    nothing hangs, nothing is lost, nothing is silent   killed processes, damaged files, one-sentence errors
    CUDA, on a machine without a GPU                    a step on fake tensors: no wait, no stray tensor
    eval_knn.py and eval_linear.py                      k-NN of a trained pair; what both refuse
    linear probing and fine-tuning                      rates at once, labels kept, resuming, every setting
"""
import argparse
import collections
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import timeit
import traceback
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.cuda.amp.common
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as TF

import eval_knn
import eval_linear
import mokd

# The tests compare digits of the CPU, and start more processes than a machine may have GPUs. One test asks
# for the GPU, in a process of its own.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

HERE = os.path.dirname(os.path.abspath(__file__))
CNN = "layers=1,1,1,1 channels=8,8,16,16".split()
VIT = "img_size=32 patch_size=8 embed_dim=24 depth=2 num_heads=2".split()
SMALL = ("--data toy --out_dim 32 --hidden_dim 16 --bottleneck_dim 8 --t_dim 24 --t_heads 2 --t_depth 1 "
         "--global_size 32 --local_size 16 --local_crops 2 --batch_size 8 --epochs 1 --warmup_epochs 0 "
         "--teacher_temp_epochs 1 --workers 0 --freeze_last_layer 0 --cnn_lr 1 --vit_lr 0.03 "
         "--blur 0.1 0.5").split()
PAIR = ["--arch1", "resnet18", "--model_kwargs1", *CNN, "--arch2", "vit_tiny", "--model_kwargs2", *VIT]
# no batch norm in this pair
VITS = ["--arch1", "vit_tiny", "--model_kwargs1", *VIT[:2], "embed_dim=32", *VIT[3:]]
TIMED = pytest.mark.skipif("MOKD_TIMING" not in os.environ, reason="takes minutes: MOKD_TIMING=1 runs it")


def config(*args):
    """Settings of a pair so small that a step takes milliseconds, with `args` on top."""
    cfg = mokd.parse_args([*SMALL, *PAIR, *map(str, args)])
    cfg.dtype, cfg.workers = "fp32", 0
    return cfg


def models_of(cfg):
    return mokd.build_models(cfg, torch.device("cpu"))


def views_of(cfg, step=0):
    g = torch.Generator().manual_seed(step)
    rand = lambda n, size: torch.randn(n * cfg.batch_size, 3, size, size, generator=g)
    return [rand(2, cfg.global_size)] + ([rand(cfg.local_crops, cfg.local_size)] if cfg.local_crops else [])


def now_of(cfg, step=1, per_epoch=10):
    return mokd.schedule(cfg, step, per_epoch)


def close(a, b, relative):
    """Largest difference over largest value."""
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    return a.shape == b.shape and (a - b).abs().max() <= relative * b.abs().max().clamp_min(1e-30)


def gradients_of_step(cfg, models, x, now, scaler=None):
    """Run a step -> losses, the gradients it had before clipping, by (model, name)."""
    grads = {}

    def recorded(model, update):
        for k, p in model.net.named_parameters():
            if p.grad is not None:
                grads[model.i, k] = p.grad.clone()
        return update
    updates = [m.update for m in models]
    for m, update in zip(models, updates):
        m.update = lambda now, scaler, m=m, update=update: recorded(m, update)(now, scaler)
    losses, _ = mokd.train_step(*models, x, cfg, now, scaler)
    for m in models:
        del m.update
    return losses, grads


# -------------------------------------------------------------------------------- the released code's numbers

class StoredBackbone(nn.Module):
    """Gives out stored features, as parameters, so that their gradients can be read."""
    def __init__(self, global_, local, cls, family):
        super().__init__()
        self.features = nn.ParameterList([nn.Parameter(global_), nn.Parameter(local)])
        self.cls, self.family, self.dim = cls, family, global_.shape[2] if cls else global_.shape[1]
        self.num_tokens = global_.shape[1] - 1 if cls else global_.shape[2] * global_.shape[3]

    def forward(self, x):
        y = self.features[0 if x.shape[-1] == 2 else 1]
        if self.cls:
            return y[:, 0], y[:, 1:]
        return y.mean((2, 3)), y.flatten(2).mT


@pytest.fixture(scope="module")
def released():
    """One step of the released code, run here by train_step from its stored weights and features."""
    stored = np.load(os.path.join(HERE, ".ci", "release_step.npz"))
    d = {k: torch.from_numpy(np.atleast_1d(v)) for k, v in stored.items()}
    B, K, L = (int(d[f"meta.{k}"]) for k in ("B", "K", "local_crops"))
    temp = float(d["meta.teacher_temp"])
    cfg = mokd.parse_args(["--recipe", "release", "--out_dim", str(K), "--hidden_dim", "40",
                           "--bottleneck_dim", "12", "--local_crops", str(L), "--batch_size", str(B),
                           "--clip_grad", "0"])
    cfg.t_dim, cfg.dtype = 12, "fp32"
    cfg.lambda1, cfg.lambda2 = float(d["meta.lambda1"]), float(d["meta.lambda2"])
    cfg.student_temp, cfg.center_momentum = float(d["meta.student_temp"]), float(d["meta.center_momentum"])
    models = []
    for i, (cls, family) in enumerate(((False, "cnn"), (True, "vit")), 1):
        backbone = StoredBackbone(d[f"student.Z{i}g"], d[f"student.Z{i}l"], cls, family)
        models.append(mokd.Model(cfg, i, backbone, torch.device("cpu")))
        m = models[-1]
        m.momentum_net.backbone.features[0].data = d[f"teacher.Z{i}g"]
        m.C_m.copy_(d[f"center.cm{i}"])
        m.C_t.copy_(d[f"center.ct{i}"])
        for net, prefix in ((m.net, f"net{i}."), (m.momentum_net, f"net{i}_.")):
            own = dict(net.named_parameters())
            for k, v in d.items():
                if k.startswith(prefix):
                    name = released_name(k.removeprefix(prefix))
                    shaped = v.expand_as(own[name]) if name.endswith("pos") else v.view_as(own[name])
                    own[name].data.copy_(shaped)
    x = [torch.zeros(2 * B, 3, 2, 2), torch.zeros(L * B, 3, 1, 1)]
    outputs = {}
    with torch.no_grad():
        for m in models:
            i = m.i
            outputs[f"m{i}"], outputs[f"t{i}"], Z = m.net(x)
            outputs[f"m{i}_"], outputs[f"t{i}_"], Z_ = m.momentum_net(x[:1])
            outputs[f"query{i}"], outputs[f"Z{i}_"] = m.t.query_of(Z.pooled), Z_.tokens[0]
        for i, t_, query in ((1, models[0].t_, outputs["query2"]), (2, models[1].t_, outputs["query1"])):
            for which in ("local", "global"):
                pairs = mokd.search_pairs(2 + L, which)
                outputs[f"search{i}_{which}"] = mokd.search(t_, query, outputs[f"Z{i}_"], pairs).flatten(0, 1)
    now = mokd.Now(0, 0, 1.0, temp, temp, dict(cnn=0.0, vit=0.0), dict(cnn=0.0, vit=0.0))
    losses, grads = gradients_of_step(cfg, models, x, now)
    return d, cfg, models, outputs, losses, grads


def released_name(k):
    """Name of a stored weight -> the name of ours."""
    k = re.sub(r"^mlp\.fc(\d)", lambda m: f"mlp_head.mlp.{2 * int(m[1]) - 2}", k)
    k = re.sub(r"block(\d)", r"blocks.\1", k)
    k = re.sub(r"^t\.", "t_head.", k)
    k = re.sub(r"^mlp\.last", "mlp_head.last", k)
    return k.replace("last.gain", "last.parametrizations.weight.original0").replace(
        "last.direction", "last.parametrizations.weight.original1")


def test_released_heads_are_reproduced(released):
    d, cfg, models, out, *_ = released
    for name in ("m1", "t1", "m2", "t2", "m1_", "t1_", "m2_", "t2_"):
        assert close(out[name].flatten(0, 1), d[f"out.{name}"], 3e-6), name


def test_released_queries_and_searches_are_reproduced(released):
    d, cfg, _, out, *_ = released
    B = cfg.batch_size
    assert close(out["query1"][:2 * B], d["out.query1_global"], 3e-6)
    assert close(out["query1"][2 * B:], d["out.query1_local"], 3e-6)
    for name in ("search1_local", "search2_local", "search1_global", "search2_global"):
        assert close(out[name], d[f"out.{name}"], 3e-6), name


def test_released_losses_are_reproduced(released):
    d, losses = released[0], released[4]
    for i in "12":
        for name in ("sm", "st", "cm", "ct"):
            assert close(losses[name + i].view(1), d[f"loss.{name}{i}"].view(1), 3e-6), name + i
        assert close(losses["loss" + i].view(1), d[f"loss.total{i}"].view(1), 3e-6)


def test_released_centers_are_reproduced(released):
    d, models = released[0], released[2]
    for m in models:
        assert close(m.C_m, d[f"center_after.cm{m.i}"], 3e-6)
        assert close(m.C_t, d[f"center_after.ct{m.i}"], 3e-6)


def test_released_gradients_are_reproduced(released):
    d, grads = released[0], released[5]
    stored = [k for k in d if k.startswith("grad.")]
    assert len(stored) > 90
    for k in stored:
        if k.startswith("grad.student.Z"):
            ours = grads[int(k[14]), f"backbone.features.{'gl'.index(k[15])}"]
        else:
            ours = grads[int(k[8]), released_name(k[10:])]
        assert close(ours.view_as(d[k]), d[k], 3e-6), k


# --------------------------------------------------------------------------- Algorithm 1, transcribed naively

def naive_H(t, s, c, tau_t, tau_s):
    return -(torch.softmax((t - c) / tau_t, -1).detach() * torch.log_softmax(s / tau_s, -1)).sum(-1).mean()


def naive_bicubic(n, side, scale):
    """Weights (side, n) of cubic convolution (Keys, a = -0.75) from n points to `side`, where output i lies
    at input (i + 0.5) / scale - 0.5; points beyond the edge are those at the edge. Not antialiased."""
    W = torch.zeros(side, n)
    for i in range(side):
        x = (i + 0.5) / scale - 0.5
        for k in range(math.floor(x) - 1, math.floor(x) + 3):
            d = abs(x - k)
            if d <= 1:
                w = 1.25 * d ** 3 - 2.25 * d ** 2 + 1
            else:
                w = -0.75 * d ** 3 + 3.75 * d ** 2 - 6 * d + 3 if d < 2 else 0
            W[i, min(max(k, 0), n - 1)] += w
    return W


def naive_t_head(head, Z, query=None):
    """T-Head by elementary operations on one view's tokens."""
    w = dict(head.named_parameters())
    x = Z @ w["embed.weight"].T + w["embed.bias"] if "embed.weight" in w else Z
    pos = w["pos"]
    if pos.shape[1] != x.shape[1]:
        n, side = math.isqrt(pos.shape[1]), math.isqrt(x.shape[1])
        W = naive_bicubic(n, side, (side + 0.1) / n if head.release else side / n)
        pos = torch.einsum("ai,bj,ijc->abc", W, W, pos.view(n, n, -1)).reshape(1, side * side, -1)
    x = x + pos
    if query is not None:
        x = torch.cat([query[:, None], x], 1)

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]
    for i, block in enumerate(head.blocks):
        b, heads = f"blocks.{i}.", block.attn.num_heads
        qkv = linear(norm(x, b + "norm1"), b + "attn.qkv").chunk(3, -1)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in qkv)
        a = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + linear(a.transpose(1, 2).flatten(2), b + "attn.proj")
        y = linear(norm(x, b + "norm2"), b + "mlp.fc1")
        x = x + linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), b + "mlp.fc2")
    x = norm(x, "norm")
    x = (x if query is None else x[:, 1:]).mean(1)
    if head.l2_normalize:
        x = x / x.norm(dim=-1, keepdim=True)
    g, v = w["last.parametrizations.weight.original0"], w["last.parametrizations.weight.original1"]
    return x @ (g * v / v.norm(dim=1, keepdim=True)).T


def naive_step(models, x, cfg, temp):
    """Algorithm 1 with a loop over pairs of views, a forward of the T-Head for each search and log-softmax
    losses: losses, then the gradients of loss1 + loss2."""
    B, V = cfg.batch_size, 2 + cfg.local_crops
    on, tau_s = cfg.losses.split(","), cfg.student_temp
    views = {}
    for m in models:
        for net, n_views, name in ((m.net, V, "n"), (m.momentum_net, 2, "n_")):
            pooled, tokens = [], []
            for resolution in x if name == "n" else x[:1]:
                p, Z = net.backbone(resolution)
                pooled += p.split(B)
                tokens += Z.split(B)
            views[name, m.i] = pooled, tokens, [net.mlp_head(p) for p in pooled], \
                [naive_t_head(net.t_head, Z) for Z in tokens] if net.t_head else None
    losses = {}
    for m, o in (models, models[::-1]):
        i, j = m.i, o.i
        pooled, _, s_m, s_t = views["n", i]
        _, _, own_m, own_t = views["n_", i]
        _, other_Z, other_m, _ = views["n_", j]
        rises_later = m.family == "cnn" and cfg.teacher_temp_epochs_cnn == 50
        own_temp = cfg.teacher_temp_start if rises_later else temp   # epoch 0
        all_pairs = [(g, v) for g in (0, 1) for v in range(V) if v != g]
        mean = lambda values: sum(values) / len(values)
        losses[f"sm{i}"] = mean([naive_H(own_m[g], s_m[v], m.C_m, own_temp, tau_s) for g, v in all_pairs])
        if "st" in on:
            losses[f"st{i}"] = mean([naive_H(own_t[g], s_t[v], m.C_t, own_temp, tau_s) for g, v in all_pairs])
        if "cm" in on:
            losses[f"cm{i}"] = mean([naive_H(other_m[g], s_m[v], o.C_m, temp, tau_s) for g, v in all_pairs])
        if "ct" in on:
            which = dict(all=all_pairs, local=[(0, v) for v in range(2, V)])
            which["global"] = [(0, 1), (1, 0)]
            center = o.C_t if cfg.search_center else 0.0
            terms = []
            for g, v in which[cfg.search]:
                query = pooled[v]
                if isinstance(m.t.embed, nn.Linear):
                    query = query @ m.t.embed.weight.T + m.t.embed.bias
                target = naive_t_head(o.t_, other_Z[g], query.detach())
                terms.append(naive_H(target, s_t[v], center, temp, tau_s))
            losses[f"ct{i}"] = mean(terms)
        lam = cfg.lambda1 if i == 1 else cfg.lambda2
        cross = losses.get(f"cm{i}", 0) + losses.get(f"ct{i}", 0)
        losses[f"loss{i}"] = losses[f"sm{i}"] + losses.get(f"st{i}", 0) + lam * cross
    (losses["loss1"] + losses["loss2"]).backward()
    grads = {(m.i, k): p.grad.clone() for m in models for k, p in m.net.named_parameters()
             if p.grad is not None}
    outputs = {}
    for m in models:
        _, _, own_m, own_t = views["n_", m.i]
        outputs[m.i] = torch.stack(own_m), torch.stack(own_t) if m.t else None
    return losses, grads, outputs


VARIANTS = {"paper": [], "release": ["--recipe", "release"], "cls": ["--vit_pool", "cls"],
            "t_norm": ["--t_norm", "on"], "search global": ["--search", "global"],
            "uncentered": ["--search_center", "off"], "no locals": ["--local_crops", "0"],
            "lambdas": ["--lambda1", "0.3", "--lambda2", "0.7"],
            "temperatures": ["--student_temp", "0.2", "--teacher_temp", "0.1"],
            **{losses: ["--losses", losses]
               for losses in ("sm", "sm,cm", "sm,st", "sm,ct", "sm,cm,st", "sm,st,ct")}}


def with_history(models):
    """Centers that are not 0 and momentum nets that are not their students."""
    g = torch.Generator().manual_seed(5)
    for m in models:
        m.C_m.copy_(0.1 * torch.randn(m.C_m.shape, generator=g))
        m.C_t.copy_(0.1 * torch.randn(m.C_t.shape, generator=g))
        for p in m.params_:
            p.data += 0.02 * torch.randn(p.shape, generator=g)
    return models


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_equals_a_naive_transcription_of_algorithm_1(variant):
    cfg = config("--drop_path", 0, "--t_depth", 2, *VARIANTS[variant])
    models = with_history(models_of(cfg))
    # T-Head 1 embeds, T-Head 2 has the ViT's width
    assert models[0].t is None or models[0].t.embed.in_features == 16
    before = copy.deepcopy(models)
    x, now = views_of(cfg), now_of(cfg)
    losses, grads = gradients_of_step(cfg, models, x, now)
    naive_losses, naive_grads, outputs = naive_step(before, x, cfg, now.temp)
    for name, value in naive_losses.items():
        assert close(losses[name], value, 1e-5), name
    for name in losses.keys() - naive_losses.keys():
        assert losses[name] == 0
    assert grads.keys() == naive_grads.keys()
    for key, grad in naive_grads.items():
        # some true gradients are 0
        scale = max(g.abs().max() for k, g in naive_grads.items() if k[0] == key[0])
        assert (grads[key] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-6 * scale, key

    for m, b in zip(models, before):   # what follows the gradients: clipping, optimizer, EMA, centers
        for k, p in b.net.named_parameters():
            # the step's own gradients: AdamW's first step makes much of rounding in small ones
            if p.grad is not None:
                p.grad = grads[m.i, k] * min(1, cfg.clip_grad / grads[m.i, k].norm())
        naive_update(b, cfg, now)
        for (k, p), q in zip(m.net.named_parameters(), b.net.parameters()):
            assert torch.allclose(p, q, atol=1e-6), k
        for (k, p_), q_, p in zip(m.momentum_net.named_parameters(), b.momentum_net.parameters(),
                                  m.net.parameters()):
            assert torch.allclose(p_, now.l * q_ + (1 - now.l) * p, atol=1e-6), k
        for C, c, out in ((m.C_m, b.C_m, outputs[m.i][0]), (m.C_t, b.C_t, outputs[m.i][1])):
            if out is not None:
                assert torch.allclose(C, 0.9 * c + 0.1 * out.flatten(0, 1).mean(0), atol=1e-5)


def naive_update(m, cfg, now):
    """The first update of SGD with momentum or of AdamW, by its formula, with the paper's learning rates and
    weight decay."""
    step, steps, warmup = now.step, 10 * cfg.epochs, 10 * cfg.warmup_epochs   # as now_of has it
    cosine = lambda a, b: b + (a - b) * 0.5 * (1 + math.cos(math.pi * step / steps))
    assert warmup == 0
    for k, p in m.net.named_parameters():
        if p.grad is None:
            continue
        head = k.startswith("t_head")
        vit = m.family == "vit" or head
        peak, end = (cfg.vit_lr, cfg.vit_lr_end) if vit else (cfg.cnn_lr, cfg.cnn_lr_end)
        lr = cosine(peak * cfg.batch_size / 256, end)
        wd = cfg.cnn_wd if not vit else cosine(cfg.vit_wd, cfg.vit_wd if cfg.wd_end is None else cfg.wd_end)
        also_1d = cfg.recipe == "release" and head and m.family == "cnn"   # the released code decays those
        if p.dim() == 1 and not also_1d:
            wd = 0
        adamw = m.family == "vit" or (head and cfg.t_optimizer == "adamw")
        with torch.no_grad():
            if adamw:
                p -= lr * wd * p
                p -= lr * p.grad / (p.grad.abs() + 1e-8)
            else:
                p -= lr * (p.grad + wd * p)


def test_searches_and_views_stay_together_whatever_the_order_of_pairs(monkeypatch):
    """A fork may name pairs of views in any order."""
    pairs, losses = mokd.search_pairs(5, "all"), []
    for order in (pairs, pairs[::-1], sorted(pairs, key=lambda pair: pair[1])):
        monkeypatch.setattr(mokd, "search_pairs", lambda V, which, order=order: list(order))
        cfg = config("--local_crops", 3)
        losses.append(mokd.train_step(*models_of(cfg), views_of(cfg), cfg, mokd.schedule(cfg, 0, 4))[0])
    for other in losses[1:]:
        for name in ("ct1", "ct2"):
            torch.testing.assert_close(other[name], losses[0][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_store_nothing_but_the_logits(dtype):
    """Between forward and backward a loss holds both nets' logits, and no other tensor of their size."""
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(V, 4, 1000, generator=g).to(dtype) for V in (5, 2))
    s.requires_grad_()
    held = []

    def hold(x):
        held.append(x.untyped_storage().data_ptr())
        return x
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        loss = mokd.H(t, s, torch.randn(1, 1000, generator=g), 0.05, 0.1)
    assert {*held} == {s.untyped_storage().data_ptr(), t.untyped_storage().data_ptr()}
    (3 * loss).backward()
    assert s.grad.dtype == dtype


def test_a_view_without_a_partner_gets_no_gradient():
    s, t = torch.randn(4, 2, 9, requires_grad=True), torch.randn(2, 2, 9)
    pairs = [(0, 1), (1, 3), (0, 3)]
    loss = mokd.H(t, s, 0.0, 0.05, 0.2, pairs)
    expected = sum(naive_H(t[g], s[v], 0.0, 0.05, 0.2) for g, v in pairs) / 3
    assert close(loss, expected, 1e-5)
    ours, theirs = (torch.autograd.grad(x, s)[0] for x in (loss, expected))
    assert close(ours, theirs, 1e-5) and not ours[0].any() and not ours[2].any() and ours[3].any()


@TIMED
def test_a_step_is_faster_than_its_naive_transcription_and_costs_little_more_than_independent_training():
    """ResNet-50 with ViT-Small at the paper's views and K, batch 8, one process: all losses against sm alone,
    and against naive_step with a parameter loop for clipping, optimizer and EMA. Prints seconds a step."""
    seconds = {"ours": [], "sm": [], "naive": []}
    args = ["--batch_size", "8", "--drop_path", "0"]
    cfg, independent = mokd.parse_args(args), mokd.parse_args([*args, "--losses", "sm"])
    cfg.dtype = independent.dtype = "fp32"
    models, alone, x = models_of(cfg), models_of(independent), views_of(cfg)
    naive = copy.deepcopy(models)
    now = mokd.schedule(cfg, 1, 10)
    steps = {"ours": lambda: mokd.train_step(*models, x, cfg, now),
             "naive": lambda: naive_step(naive, x, cfg, now.temp),
             "sm": lambda: mokd.train_step(*alone, x, independent, now)}
    for _ in range(4):   # the first round warms up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if name == "naive":
                for m in naive:
                    for p, p_ in zip(m.params, m.params_):
                        if p.grad is not None:
                            p.grad.mul_(min(1.0, 3 / (p.grad.norm().item() + 1e-6)))
                for m in naive:
                    for optimizer in m.optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
                    for p, p_ in zip(m.params, m.params_):
                        p_.data.mul_(0.996).add_(p.data, alpha=0.004)
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    print(best, f"all losses / sm {best['ours'] / best['sm']:.2f}, "
                f"naive / ours {best['naive'] / best['ours']:.2f}")
    assert best["ours"] <= 1.5 * best["sm"] and best["naive"] >= 1.2 * best["ours"]


def test_a_worker_takes_a_fraction_of_the_usual_pil_pipelines_time(tmp_path):
    """The paper's ten views of a 500 x 375 JPEG: ours decodes and cuts, PIL also jitters and blurs view by
    view. CPU time."""
    from PIL import ImageFilter
    from torchvision.transforms import v2 as T
    (tmp_path / "a").mkdir()
    for i in range(8):
        coarse = np.random.default_rng(i).integers(0, 256, (24, 32, 3)).astype(np.uint8)
        noise = np.random.default_rng(i).normal(0, 12, (375, 500, 3))
        noisy = np.asarray(Image.fromarray(coarse).resize((500, 375), 3)) + noise
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / "a" / f"{i}.jpg", quality=90)
    cfg = mokd.parse_args(["--data", str(tmp_path)])
    images, _ = mokd.get_data(cfg)
    blur = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(*cfg.blur))))
    views = [(224, cfg.global_scale, 1.0), (224, cfg.global_scale, 0.1)] + 8 * [(96, cfg.local_scale, 0.5)]
    usual = [T.Compose([
        T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(*cfg.jitter)], 0.8), T.RandomGrayscale(0.2), T.RandomApply([blur], p),
        T.RandomApply([T.RandomSolarize(128, p=1)], 0.2 * (view == 1)), T.PILToTensor(),
        T.ToDtype(torch.float32, scale=True), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    ]) for view, (size, scale, p) in enumerate(views)]
    ratios, crops = [], mokd.MultiCrop(images, cfg)
    torch.set_num_threads(1)   # as in a worker
    for _ in range(3):
        start = time.process_time()
        for i in range(16):
            crops[0, i % 8]
        ours = 1000 * (time.process_time() - start) / 16
        start = time.process_time()
        for i in range(16):
            image = Image.open(images.samples[i % 8][0]).convert("RGB")
            [view(image) for view in usual]
        ratios.append((1000 * (time.process_time() - start) / 16) / ours)
    print(f"ours {ours:.2f} ms, PIL {ours * ratios[-1]:.2f} ms, ratios {[round(r, 1) for r in ratios]}")
    assert max(ratios) > 4


def test_second_adamw_and_sgd_steps_keep_their_momentum():
    cfg = config("--drop_path", 0)
    models = models_of(cfg)
    for step in range(2):
        mokd.train_step(*models, views_of(cfg, step), cfg, now_of(cfg, step + 1))
    sgd, adamw = models[0].optimizers
    assert isinstance(sgd, torch.optim.SGD) and all(s["momentum_buffer"].any() for s in sgd.state.values())
    assert isinstance(adamw, torch.optim.AdamW) and all(s["step"] == 2 for s in adamw.state.values())


# --------------------------------------------------------------------------------- gradients and independence

def test_no_gradient_reaches_a_momentum_net_a_target_or_a_query():
    cfg = config()
    models = models_of(cfg)
    seen = []
    real = mokd.search

    def spy(t_, query, Z_, pairs):
        out = real(t_, query, Z_, pairs)
        # so a query carries none either
        seen.append((torch.is_grad_enabled(), Z_.requires_grad, out.requires_grad))
        return out
    mokd.search = spy
    try:
        gradients_of_step(cfg, models, views_of(cfg), now_of(cfg))
    finally:
        mokd.search = real
    assert len(seen) == 2 and not any(itertools.chain(*seen))
    assert all(p.grad is None and not p.requires_grad for m in models for p in m.params_)
    t = torch.randn(4, 5, requires_grad=True)
    assert not mokd.target(t).requires_grad


def test_embed_learns_from_its_own_t_logits_never_from_being_a_query():
    """With lambda 0 the student T-Head learns by st alone; model 2's ct loss, whose queries embed 2 makes for
    T-Head 1, and model 1's, whose queries embed 1 makes, must not change that."""
    args = ["--drop_path", 0, "--clip_grad", 0,
            "--model_kwargs2", *VIT[:2], "embed_dim=32", *VIT[3:]]   # so ViT 2 embeds too
    grads = {}
    for losses, lam in (("sm,st", 0), ("sm,cm,st,ct", 0)):
        cfg = config("--losses", losses, "--lambda1", lam, "--lambda2", lam, *args)
        models = with_history(models_of(cfg))
        grads[losses] = gradients_of_step(cfg, models, views_of(cfg), now_of(cfg))[1]
    for i in (1, 2):
        a, b = (g[i, "t_head.embed.weight"] for g in grads.values())
        assert a.abs().max() > 0 and close(b, a, 1e-6)


def test_without_cross_losses_a_model_does_not_depend_on_its_partner():
    weights = []
    for partner in (["--arch2", "vit_tiny", "--model_kwargs2", *VIT],
                    ["--arch2", "resnet34", "--model_kwargs2", "layers=1,1,1,2", "channels=8,8,8,24"]):
        for first in (["--arch1", "resnet18", "--model_kwargs1", *CNN],
                      ["--arch1", "vit_tiny", "--model_kwargs1", *VIT]):
            cfg = mokd.parse_args([*SMALL, *first, *partner, "--losses", "sm"])
            cfg.dtype = "fp32"
            models = models_of(cfg)
            assert models[0].t is None
            for step in range(3):
                mokd.train_step(*models, views_of(cfg, step), cfg, now_of(cfg, step))
            weights.append(models[0].state())
    for a, b in ((weights[0], weights[2]), (weights[1], weights[3])):
        for part in ("net", "momentum_net"):   # with its centers
            assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])


def test_identical_architectures_start_from_different_weights():
    cfg = mokd.parse_args([*SMALL, "--arch1", "resnet18", "--model_kwargs1", *CNN,
                           "--arch2", "resnet18", "--model_kwargs2", *CNN])
    a, b = models_of(cfg)
    assert (cfg.lambda1, cfg.lambda2) == (1, 1)
    assert not torch.equal(a.net.backbone.model.conv1.weight, b.net.backbone.model.conv1.weight)


# ------------------------------------------------------------------------------------------- heads, schedules

def test_search_drops_the_query_before_pooling():
    # without attention the query cannot matter at all
    head = mokd.THead(8, 16, dim=12, depth=0, num_heads=2, num_tokens=4)
    Z = torch.randn(3, 4, 8)
    assert torch.equal(head(Z, torch.randn(3, 12)), head(Z))
    head = mokd.THead(8, 16, dim=12, depth=1, num_heads=2, num_tokens=4)
    assert not torch.allclose(head(Z, torch.randn(3, 12)), head(Z))


def test_t_head_has_no_embed_where_the_widths_agree():
    assert isinstance(mokd.THead(12, 4, dim=12, num_heads=2).embed, nn.Identity)
    assert isinstance(mokd.THead(13, 4, dim=12, num_heads=2).embed, nn.Linear)


def test_mlp_head_and_t_norm_logits_are_cosines():
    x = 1000 * torch.randn(5, 9)
    assert mokd.MLPHead(9, 30, 16, 8)(x).abs().max() <= 1 + 1e-5
    Z = 1000 * torch.randn(5, 4, 9)
    assert mokd.THead(9, 30, 12, 1, 2, 4, l2_normalize=True)(Z).abs().max() <= 1 + 1e-5
    assert mokd.THead(9, 30, 12, 1, 2, 4)(Z).abs().max() > 1


def test_gain_is_fixed_for_a_cnn_and_learned_for_a_vit_and_in_t_heads():
    for m in models_of(config()):
        gains = [head.last.parametrizations.weight.original0 for head in (m.net.mlp_head, m.t)]
        assert all((g == 1).all() for g in gains)
        assert [g.requires_grad for g in gains] == [m.family == "vit", True]


def test_cosine_schedule():
    values = [mokd.cosine_schedule(s, 100, 2.0, 0.5, warmup=10) for s in range(101)]
    assert values[:11] == pytest.approx([0.2 * s for s in range(11)])
    assert values[10:] == pytest.approx(list(0.5 + 1.5 * (1 + np.cos(np.pi * np.arange(91) / 90)) / 2))
    cfg = mokd.Config()
    assert [mokd.schedule(cfg, s, 5).l for s in (0, 250, 500)] == pytest.approx([0.996, 0.998, 1.0])


def test_teacher_temperature_rises_by_epoch_and_later_for_a_released_cnn():
    cfg = mokd.parse_args(["--recipe", "release"])
    expected = np.concatenate([np.linspace(0.04, 0.07, 30), np.full(70, 0.07)])
    cnn = np.concatenate([np.linspace(0.04, 0.07, 50), np.full(50, 0.07)])
    now = [mokd.schedule(cfg, 7 * epoch + 3, 7) for epoch in range(100)]
    assert [n.temp for n in now] == pytest.approx(list(expected))
    assert [n.temp_cnn for n in now] == pytest.approx(list(cnn))
    now = mokd.schedule(mokd.Config(), 15, 1)
    assert now.temp == now.temp_cnn == pytest.approx(expected[15])


def test_each_gradient_is_clipped_by_itself():
    grads = [torch.randn(4, 4) * 10, torch.randn(3) * 0.01, torch.zeros(2), torch.full((5,), 7.0)]
    naive = [g * min(1.0, 3.0 / (g.pow(2).sum().sqrt().item() + 1e-6)) for g in grads]
    mokd.clip_per_tensor(grads, 3.0)
    for a, b in zip(grads, naive):
        assert torch.allclose(a, b, rtol=1e-6)
    assert grads[0].norm() == pytest.approx(3, rel=1e-5) and grads[1].norm() < 0.1


def test_last_layers_stand_still_while_frozen():
    cfg = config("--freeze_last_layer", 1)
    models = models_of(cfg)
    start = [p.clone() for m in models for p in m.last_layers]
    assert len(start) == 8
    still = lambda: [torch.equal(p, q) for p, q in zip((p for m in models for p in m.last_layers), start)]
    for step in range(1, 10):   # epoch 0
        mokd.train_step(*models, views_of(cfg, step), cfg, now_of(cfg, step))
    assert all(still())
    epoch_1 = mokd.schedule(config("--epochs", 10, "--freeze_last_layer", 1), 10, 10)
    mokd.train_step(*models, views_of(cfg), cfg, epoch_1)
    assert not any(s for s, p in zip(still(), (p for m in models for p in m.last_layers)) if p.requires_grad)


def test_weight_decay_spares_biases_and_1d_parameters_and_groups_are_complete():
    for args in ([], ["--t_optimizer", "sgd"], ["--cnn_optimizer", "adamw", "--vit_optimizer", "sgd"]):
        for m in models_of(config(*args, "--wd_end", 0.4)):
            groups = [g for o in m.optimizers for g in o.param_groups]
            grouped = sorted(id(p) for g in groups for p in g["params"])
            assert grouped == sorted(id(p) for p in m.params if p.requires_grad)
            for g in groups:
                assert all((p.dim() > 1) == g["decays"] for p in g["params"])
    m = models_of(config("--t_optimizer", "sgd"))[0]
    assert [type(o) for o in m.optimizers] == [torch.optim.SGD]
    t = next(g for g in m.optimizers[0].param_groups if any(p is m.t.pos for p in g["params"]))
    now = mokd.schedule(m.cfg, 0, 10)
    assert t["family"] == "vit" and (now.lr["vit"], now.wd["vit"]) == (0.03 * 8 / 256, 0.04)


def test_stochastic_depth_is_for_the_student_vit_alone():
    cfg = config("--drop_path", 0.5)
    model1, model2 = models_of(cfg)
    rates = lambda net: [m.drop_prob for m in net.modules() if isinstance(m, timm.layers.DropPath)]
    assert not any(rates(model1.net)) and max(rates(model2.net)) == 0.5
    assert set(rates(model2.momentum_net)) == {0.0}
    x, now = views_of(cfg), now_of(cfg)
    assert torch.equal(model2.n(x, now)[0], model2.n(x, now)[0])   # a step's draws are its own
    assert not torch.equal(model2.n(x, now)[0], model2.n(x, now._replace(step=2))[0])


def test_batch_norm_statistics_are_the_momentum_nets_own():
    cfg = config("--ema", 1, "--center_momentum", 1)
    models = models_of(cfg)
    bn, bn_ = models[0].net.backbone.model.bn1, models[0].momentum_net.backbone.model.bn1
    mokd.train_step(*models, views_of(cfg), cfg, now_of(cfg))
    assert bn.num_batches_tracked == 2 and bn_.num_batches_tracked == 1   # globals and locals; globals alone
    assert not torch.allclose(bn.running_mean, bn_.running_mean)


# --------------------------------------------------------------------------------------------- recipes, flags

def test_defaults_are_the_papers_and_release_switches_every_row():
    paper, release = mokd.parse_args([]), mokd.parse_args(["--recipe", "release"])
    assert (paper.arch1, paper.arch2) == ("resnet50", "vit_small")
    assert (paper.epochs, paper.batch_size, paper.out_dim) == (100, 256, 65536)
    differ = {k for k in vars(paper) if getattr(paper, k) != getattr(release, k)} - {"recipe"}
    assert differ == {"vit_pool", "t_dim", "search", "search_center", "teacher_temp_epochs_cnn",
                      "t_optimizer", "cnn_lr_end", "vit_lr_end", "wd_end"}
    assert mokd.parse_args(["--recipe", "release", "--search", "global"]).search == "global"
    assert mokd.parse_args(["--demo", "--out_dim", "77"]).out_dim == 77


LARGE_VIT = ["--model_kwargs2", *VIT[:2], "embed_dim=96", "depth=4", VIT[4]]
SMALL_CNN = ["--arch2", "resnet18", "--model_kwargs2", "layers=1,1,1,1", "channels=8,8,16,16"]


@pytest.mark.parametrize("args, expected", [
    ([], (1, 0.1)), (["--recipe", "release"], (1, 0.1)), (["--lambda2", "0.5"], (1, 0.5)),
    (LARGE_VIT, (0.1, 1)), ([*LARGE_VIT, "--recipe", "release"], (1, 0.1)), (SMALL_CNN, (1, 0.1)),
    ([*SMALL_CNN, "--recipe", "release"], (1, 0.1))])
def test_lambda_goes_by_size_and_in_the_release_by_family(args, expected):
    cfg = config("--model_kwargs1", "layers=1,1,1,1", "channels=16,16,32,32", *args)
    models_of(cfg)
    assert (cfg.lambda1, cfg.lambda2) == expected


def test_released_t_head_has_the_vits_width():
    cfg = config("--recipe", "release", "--t_dim", 0)
    assert [m.t.pos.shape[2] for m in models_of(cfg)] == [24, 24] and cfg.t_dim == 24


@pytest.mark.parametrize("flag, value", [
    ("--t_dim", "385"), ("--out_dim", "1"), ("--epochs", "0"), ("--losses", "cm,st"), ("--losses", "sm,xx"),
    ("--ema", "1.5"), ("--search", "some"), ("--local_scale", "0.5 0.1"), ("--jitter", "0 0 0 0.9"),
    ("--batch_size", "x"), ("--model_kwargs1", "depth"), ("--no_such_flag", "1"), ("--warmup_epochs", "101"),
    ("--t_norm", "maybe"), ("--demos", "on")])
def test_a_wrong_flag_is_refused_by_name(flag, value, capsys):
    try:
        code = mokd.main([flag, *value.split()])
    except SystemExit as error:
        code = error.code
    message = capsys.readouterr().err
    assert code == 2 and flag in message and "Traceback" not in message


def test_help_names_every_setting_with_its_source():
    done = subprocess.run([sys.executable, "mokd.py", "--help"], cwd=HERE, capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    for name in vars(mokd.Config()):
        assert f"--{name} " in text
    for group in ("models", "heads", "losses", "views", "data", "optimization", "running"):
        assert f" {group}: " in text
    assert text.count("A.1]") > 15 and text.count("[released code]") > 10 and text.count("[DINO]") > 10


# -------------------------------------------------------------------------------------------------- backbones

REDUCED = {   # the paper's backbones, narrow and shallow, for 32 pixels
    **{f"resnet{n}": ["layers=1,1,1,1", "channels=8,8,16,16"] for n in (18, 34, 50, 101)},
    **{f"vit_{size}": ["img_size=32", "patch_size=8", f"embed_dim={dim}", f"depth={depth}", "num_heads=2"]
       for size, dim, depth in (("tiny", 16, 1), ("small", 24, 1), ("base", 32, 2))},
    "efficientnet_b0": ["drop_rate=0.0"], "mobilenetv3_large": ["drop_rate=0.0"]}
@pytest.mark.parametrize("args, said", [
    ([], True), (["--losses", "sm"], False), (["--model_kwargs1", *CNN, "output_stride=8"], False)])
def test_a_map_of_one_local_feature_is_said(args, said, few, tmp_path, capsys):
    """ResNets have stride 32, so at 32 pixels a T-Head has a single token to read and to search in."""
    assert mokd.main([*SMALL, *PAIR, *args, "--batch_size", "256", "--out", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert ("--arch1 resnet18: a view of 32 pixels has one local feature" in error) == said
    assert "--arch2 vit_tiny: a view" not in error


PAIRS = [("resnet50", "vit_small"), ("resnet50", "vit_base"), ("resnet101", "vit_small"),
         ("resnet101", "vit_base"), ("resnet34", "vit_small"), ("resnet18", "vit_tiny"),
         ("resnet18", "resnet50"), ("resnet34", "resnet101"), ("resnet50", "efficientnet_b0"),
         ("resnet50", "mobilenetv3_large"), ("efficientnet_b0", "vit_small"),
         ("mobilenetv3_large", "vit_small"), ("efficientnet_b0", "mobilenetv3_large"),
         ("vit_tiny", "vit_small"), ("vit_small", "vit_base"), ("vit_tiny", "vit_base"),
         ("resnet50", "resnet50"), ("vit_small", "vit_small")]


@pytest.mark.parametrize("arch1, arch2", PAIRS)
def test_every_kind_of_pair_learns_one_batch(arch1, arch2):
    """A pair's summed losses fall on one repeated batch, within 20 steps. The momentum nets stand still."""
    cfg = mokd.parse_args([*SMALL, "--arch1", arch1, "--model_kwargs1", *REDUCED[arch1],
                           "--arch2", arch2, "--model_kwargs2", *REDUCED[arch2],
                           "--drop_path", "0", "--ema", "1", "--center_momentum", "1", "--batch_size", "4",
                           "--cnn_lr", "3", "--vit_lr", "0.2", "--freeze_last_layer", "0"])
    cfg.dtype = "fp32"
    models, x = models_of(cfg), views_of(cfg)
    history = []
    for step in range(20):
        losses, _ = mokd.train_step(*models, x, cfg, now_of(cfg, 1, 100))
        assert all(math.isfinite(v) for v in losses.values())
        history.append(float(losses["loss1"] + losses["loss2"]))
        if history[-1] < 0.97 * history[0]:
            return
    assert history[-1] < 0.97 * history[0], history


@pytest.mark.slow
@pytest.mark.parametrize("arch1, arch2", [
    ("resnet50", "vit_small"), ("resnet101", "vit_base"), ("resnet18", "resnet34"),
    ("efficientnet_b0", "mobilenetv3_large"), ("vit_tiny", "vit_small")])
def test_full_size_pairs_step_at_224(arch1, arch2):
    """Every backbone of the paper at full size with both heads, K = 65536, 224 and 96 pixels."""
    cfg = mokd.parse_args(["--arch1", arch1, "--arch2", arch2, "--batch_size", "2", "--local_crops", "2"])
    cfg.dtype = "fp32"
    models = models_of(cfg)
    losses, _ = mokd.train_step(*models, views_of(cfg), cfg, mokd.schedule(cfg, 1, 10))
    assert all(math.isfinite(v) and v > 0 for v in losses.values())
    assert all(m.C_m.shape == (1, 65536) and m.C_t.any() for m in models)


@pytest.mark.parametrize("arch, kwargs, shape", [
    ("convnext_tiny", dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), (9, 16)),   # map, NCHW
    ("swin_tiny_patch4_window7_224",
     dict(depths=(1, 1, 1, 1), embed_dim=12, num_heads=(1, 1, 2, 2)), (9, 96)),   # NHWC
    ("vit_small_patch16_224", dict(depth=1, reg_tokens=3), (36, 384)),            # four prefix tokens
    ("deit3_small_patch16_224", dict(depth=1), (36, 384)), ("mobilenetv3_large", {}, (9, 960))])
def test_other_timm_models_give_tokens_at_both_sizes(arch, kwargs, shape):
    b = mokd.build_backbone(arch, kwargs)
    pooled, tokens = b.eval()(torch.rand(2, 3, 96, 96))
    assert tokens.shape == (2, *shape) and b.dim == shape[1]
    assert torch.allclose(pooled, tokens.mean(1), atol=1e-6)
    map_ = b.model.forward_features(torch.rand(2, 3, 96, 96))
    assert map_.dim() == 4 or map_.shape[1] == shape[0] + b.prefix
    unused = [k for k, p in b.model.named_parameters() if not p.requires_grad]
    assert all(k.startswith(("conv_head", "norm_head", "head")) for k in unused)


def test_a_vit_pools_patches_or_cls():
    x = torch.rand(2, 3, 32, 32)
    kwargs = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    b = mokd.build_backbone("vit_tiny", kwargs, pool="cls", sizes=(32,)).eval()
    y = b.model.forward_features(x)
    assert torch.equal(b(x)[0], y[:, 0]) and torch.equal(b(x)[1], y[:, 1:])
    b.cls = False
    assert torch.allclose(b(x)[0], y[:, 1:].mean(1), atol=1e-6)
    assert mokd.build_backbone("vit_small", dict(depth=1), patch_size=8, sizes=(64,)).num_tokens == 64
    # four registers and no CLS token: the mean of the patches is all that there is
    registers = "vit_medium_patch16_reg4_gap_256"
    b = mokd.build_backbone(registers, kwargs, pool="cls", sizes=(32,)).eval()
    y = b.model.forward_features(x)
    assert b.prefix == 4 and torch.equal(b(x)[0], y[:, 4:].mean(1))


@pytest.mark.parametrize("arch, kwargs, word", [
    ("resnet51", {}, "no such model"), ("vit_small", dict(dept=3), "cannot build"),
    ("mixer_s16_224", {}, "96 pixels"), ("vit_small_patch14_reg4_dinov2", dict(depth=1), "96 pixels")])
def test_a_model_that_cannot_serve_is_refused(arch, kwargs, word):
    with pytest.raises(mokd.UserError, match=word) as error:
        mokd.build_backbone(arch, kwargs)
    assert arch in str(error.value) and error.value.code == 2


# ----------------------------------------------------------------------------------------- weights in and out

def test_weights_load_into_timm_and_torchvision(tmp_path):
    cfg = mokd.parse_args([*SMALL, "--arch1", "resnet18", "--arch2", "vit_tiny", "--model_kwargs2", *VIT,
                           "--out", str(tmp_path)])
    cfg.dtype = "fp32"
    models = models_of(cfg)
    mokd.save(cfg, models, 1, torch.amp.GradScaler(enabled=False), 10)
    x = torch.rand(2, 3, 32, 32)
    expected = [m.momentum_net.backbone.eval().model.forward_features(x) for m in models]
    r = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / "model1.pth")).eval()
    assert torch.allclose(r.forward_features(x), expected[0], atol=1e-5)
    v = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "model2.pth"),
                          **dict(mokd.key_value(k) for k in VIT)).eval()
    assert torch.allclose(v.forward_features(x), expected[1], atol=1e-5)
    weights = torch.load(tmp_path / "model1.pth", weights_only=True)
    missing, unexpected = torchvision.models.resnet18().load_state_dict(weights, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected


@pytest.mark.parametrize("arch, torchvision_name, sizes", [
    ("resnet18", "resnet18", (64,)), ("resnet50", "resnet50", (64,))])
def test_init_takes_torchvision_weights(arch, torchvision_name, sizes, tmp_path):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, torchvision_name)().eval()
    for m in theirs.modules():   # random statistics, so that a swap of two of them shows
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    b = mokd.build_backbone(arch, sizes=sizes).eval()
    mokd.load_backbone(b, tmp_path / "weights.pth", "--init1")
    x = torch.rand(2, 3, sizes[0], sizes[0])
    theirs.requires_grad_(False)
    expected = nn.Sequential(*list(theirs.children())[:-2])(x)
    assert torch.allclose(b.model.forward_features(x), expected, atol=1e-3 * float(expected.abs().max()))


def test_init_takes_a_dino_checkpoint_and_its_own_files_and_starts_both_nets(tmp_path):
    cfg = config()
    source = models_of(cfg)[1].net.backbone.model.state_dict()
    teacher = {f"module.backbone.{k}": v + 1 for k, v in source.items()} | {"module.head.last": torch.ones(2)}
    torch.save({"teacher": teacher, "student": {}, "epoch": 3}, tmp_path / "dino.pth")
    m = models_of(config("--init2", tmp_path / "dino.pth"))[1]
    for net in (m.net, m.momentum_net):
        assert all(torch.equal(v, source[k] + 1) for k, v in net.backbone.model.state_dict().items())


@pytest.mark.parametrize("content", ["other", "text", "missing", "list"])
def test_init_refuses_what_does_not_fit(content, tmp_path, capsys):
    file = tmp_path / "w.pth"
    if content == "other":
        torch.save(torchvision.models.resnet34().state_dict(), file)
    elif content == "text":
        file.write_text("weights")
    elif content == "list":
        torch.save([torch.ones(2)], file)
    assert mokd.main([*SMALL, *PAIR, "--init1", str(file), "--out", str(tmp_path / "o")]) == 2
    assert "--init1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- data

def picture(seed=0, size=(60, 80)):
    g = np.random.default_rng(seed)
    squares = g.integers(0, 256, (size[0] // 10, size[1] // 10, 3))
    return np.kron(squares, np.ones((10, 10, 1))).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """train/ with 2 classes of 8 JPEGs, val/ with 2 of 4."""
    for part, n in (("train", 8), ("val", 4)):
        for c in "ab":
            (tmp_path / "data" / part / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(picture(100 * ord(c) + i)).save(tmp_path / "data" / part / c / f"{i}.jpg")
    return tmp_path / "data"


def test_any_image_becomes_rgb(tmp_path):
    a, image_of = picture(), Image.fromarray
    gray = np.asarray(image_of(a).convert("L"))
    gray_rgb = gray[..., None].repeat(3, 2)
    alpha = a[..., :1] // 2 + 100
    cover = alpha / 255
    files = {"float.tiff": (image_of(gray.astype(np.float32) / 255), gray_rgb),
             "rgb.png": (image_of(a), a), "gray.png": (image_of(gray), gray_rgb),
             "alpha.png": (image_of(np.concatenate([a, alpha], 2)), a * cover + 255 * (1 - cover)),
             "palette.png": (image_of(a).quantize(256), a),
             "16bit.png": (image_of(gray.astype(np.uint16) * 257), gray_rgb),
             "cmyk.jpg": (image_of(a).convert("CMYK"), a), "rgb.webp": (image_of(a), a),
             "x.gif": (image_of(a), a)}
    options = {"webp": dict(lossless=True), "jpg": dict(quality=95)}
    for name, (image, expected) in files.items():
        kind = name.split(".")[1]
        image.save(tmp_path / name, **options.get(kind, {}))
        read = mokd.read_image(str(tmp_path / name))
        assert read.dtype == torch.uint8 and read.shape == (3, 60, 80), name
        difference = np.abs(read.numpy().transpose(1, 2, 0).astype(int) - expected).mean()
        assert difference < (6 if kind in ("jpg", "gif") else 1), name


def test_without_torchvisions_decoder_pil_reads_and_this_is_said_once(folder, monkeypatch, capsys):
    cfg = config("--data", folder)
    before = mokd.get_data(cfg)[0][0][0]
    assert "decodes no JPEGs" not in capsys.readouterr().out
    monkeypatch.setattr(mokd, "decode_jpeg", None)
    after = mokd.get_data(cfg)[0][0][0]
    assert capsys.readouterr().out.count("decodes no JPEGs") == 1
    assert (before.int() - after.int()).abs().max() <= 3


def test_crops_depend_on_seed_epoch_and_index_alone():
    cfg = config()
    images, _ = mokd.get_data(cfg)
    crops = mokd.MultiCrop(images, cfg)
    a = crops[3, 5]
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    b = crops[3, 5]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a[:2], b[:2])) and a[2] == -1
    assert a[0].shape == (2, 32, 32, 3) and a[1].shape == (2, 16, 16, 3) and a[0].dtype == torch.uint8
    assert not torch.equal(a[0], crops[4, 5][0]) and not torch.equal(a[0], crops[3, 6][0])
    assert not torch.equal(a[0][0], a[0][1])


def test_scales_and_neighbors_are_those_asked_for(monkeypatch):
    cfg = config("--global_scale", 0.7, 0.8, "--local_scale", 0.2, 0.3, "--knn_k", 7)
    seen, ks = [], []
    crop, classify = mokd.MultiCrop.crop, mokd.knn_classify

    def watched_crop(image, size, scale):
        seen.append((size, scale))
        return crop(image, size, scale)
    monkeypatch.setattr(mokd.MultiCrop, "crop", staticmethod(watched_crop))
    monkeypatch.setattr(mokd, "knn_classify", lambda b, y, q, k: ks.append(k) or classify(b, y, q, k))
    toy = torch.utils.data.TensorDataset(*mokd.draw_toy(16, "few"))
    mokd.MultiCrop(toy, cfg)[0, 0]
    assert seen == [(32, (0.7, 0.8))] * 2 + [(16, (0.2, 0.3))] * 2
    assert mokd.knn_accuracy([mokd.Pixels()], toy, toy, cfg, torch.device("cpu"))[0] > 0 and ks == [7]


def test_a_crop_is_torchvisions_random_resized_crop():
    image = torch.from_numpy(picture()).permute(2, 0, 1)
    torch.manual_seed(3)
    ours = mokd.MultiCrop.crop(image, 32, (0.25, 1.0))
    torch.manual_seed(3)
    theirs = torchvision.transforms.v2.RandomResizedCrop(
        32, (0.25, 1.0), interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(ours, theirs(image))


def test_batches_cover_each_epoch_once_without_overlap_and_resume_anywhere():
    cfg = config("--epochs", 3)
    whole = list(mokd.batches(27, cfg, 0, 0, 1))
    assert len(whole) == 9
    for epoch in range(3):
        seen = [i for batch in whole[3 * epoch:3 * epoch + 3] for e, i in batch if e == epoch]
        assert len(set(seen)) == 24
    assert whole[0] != [(0, i) for _, i in whole[3]]
    halves = [list(mokd.batches(27, cfg, 0, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole
    assert list(mokd.batches(27, cfg, 4, 0, 1)) == whole[4:]


def test_photometric_operations_equal_torchvisions_sample_by_sample():
    cfg = config("--batch_size", 64, "--blur", 0.1, 2, "--solarize", 0.7, "--global_size", 40)
    x = (torch.rand(128, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    x[:, :, 10:20, 10:20] = torch.randint(256, (128, 1, 1, 1), dtype=torch.uint8)   # gray patches: no hue
    p = {k: v[:128] for k, v in mokd.draw_photometric(cfg, 7).items()}
    ours = mokd.photometric(x, p)
    used = dict.fromkeys(p, 0)
    names = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for i in range(128):
        y = x[i].float() / 255
        one = {k: v[i] for k, v in p.items()}
        used = {k: used[k] + int(one[k].dtype == torch.bool and bool(one[k])) for k in used}
        y = TF.hflip(y) if one["flip"] else y
        if one["jitter"]:
            for op in one["order"].tolist():
                y = names[op](y, float(one["factor"][op]))
        y = TF.rgb_to_grayscale(y, 3) if one["grayscale"] else y
        y = TF.gaussian_blur(y, [13, 13], [float(one["sigma"])] * 2) if one["blur"] else y
        y = TF.solarize(y, 128 / 255) if one["solarize"] else y
        difference = (ours[i] - y).abs()
        if one["solarize"]:   # a pixel within rounding of the threshold may fall on either side
            difference = torch.minimum(difference, (1 - ours[i] - y).abs() + (y - 0.5).abs().gt(0.01))
        assert difference.max() <= 2 / 255, (i, one)
    assert all(used[k] > 5 for k in ("flip", "jitter", "grayscale", "blur", "solarize"))


def test_photometric_parameters_follow_the_recipe():
    cfg = mokd.parse_args(["--batch_size", "2000", "--local_crops", "2"])
    p = {k: v.unflatten(0, (4, 2000)) for k, v in mokd.draw_photometric(cfg, 0).items()}
    rate = lambda name: p[name].float().mean(1).tolist()
    assert rate("flip") == pytest.approx([0.5] * 4, abs=0.05)
    assert rate("jitter") == pytest.approx([0.8] * 4, abs=0.04)
    assert rate("grayscale") == pytest.approx([0.2] * 4, abs=0.04)
    assert rate("blur") == pytest.approx([1, 0.1, 0.5, 0.5], abs=0.05)
    assert rate("solarize") == pytest.approx([0, 0.2, 0, 0], abs=0.04)
    low, high = p["factor"].amin((0, 1)).tolist(), p["factor"].amax((0, 1)).tolist()
    assert low == pytest.approx([0.6, 0.6, 0.8, -0.1], abs=0.01)
    assert high == pytest.approx([1.4, 1.4, 1.2, 0.1], abs=0.01)
    assert p["sigma"].min() >= 0.1 and p["sigma"].max() <= 2
    assert len(p["order"].flatten(0, 1).unique(dim=0)) == 24
    off = mokd.parse_args("--batch_size 50 --jitter 0 0 0 0 --grayscale 0 --blur 0 0 --solarize 0".split())
    p = mokd.draw_photometric(off, 0)
    assert not (p["grayscale"] | p["blur"] | p["solarize"]).any()
    x = torch.randint(256, (500, 3, 8, 8), dtype=torch.uint8)
    y = mokd.photometric(x, p)
    assert torch.allclose(torch.where(p["flip"][:, None, None, None], y.flip(-1), y), x / 255, atol=1e-5)


def test_two_processes_draw_what_one_does():
    cfg = config()
    whole = mokd.draw_photometric(cfg, 3)
    parts = [mokd.draw_photometric(cfg, 3, rank, 2) for rank in range(2)]
    for k, v in whole.items():
        views = v.unflatten(0, (4, 8))
        assert torch.equal(torch.cat([p[k].unflatten(0, (4, 4)) for p in parts], 1), views)


def test_toy_pixels_are_a_poor_guide():
    (x, y), (queries, answers) = mokd.draw_toy(800, "a"), mokd.draw_toy(400, "b")
    assert torch.equal(mokd.draw_toy(64, "a")[0], mokd.draw_toy(64, "a")[0])
    flat = lambda t: F.normalize(t.flatten(1).float() - 127, dim=1)
    right = (mokd.knn_classify(flat(x), y, flat(queries)).argmax(1) == answers).float().mean()
    assert right < 2.5 / (int(y.max()) + 1)


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def test_fashion_mnist_trains_gray_28_pixels(tmp_path, capsys):
    """In the files that Debian and torchvision have."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    g = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{part}-images-idx3-ubyte", g.integers(0, 256, (n, 28, 28)).astype(np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))
    out = tmp_path / "o"
    assert mokd.main([*SMALL, *PAIR, "--data", "fashion_mnist", "--data_root", str(tmp_path),
                      "--out", str(out), "--knn_every", "1"]) == 0
    records = [json.loads(line) for line in open(out / "log.jsonl")]
    assert records[-1]["knn1"] >= 0 and records[-2]["step"] == records[-2]["steps"] == 7
    capsys.readouterr()   # the evaluations find the data where the run had them
    args = ["--checkpoint", str(out / "checkpoint.pth"), "--k", "5"]
    assert mokd.main(args, "eval_knn.py", eval_knn.parse, eval_knn.run) == 0
    assert "1 resnet18" in capsys.readouterr().out


def test_a_data_set_that_cannot_be_downloaded_is_named(tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no network")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    assert mokd.main([*SMALL, *PAIR, "--data", "cifar10", "--data_root", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "cifar10" in message and "--data_root" in message and "no network" in message


# ------------------------------------------------------------------------------------------------------- k-NN

def test_knn_equals_a_double_loop_and_ignores_chunks():
    g = torch.Generator().manual_seed(0)
    bank, queries = (F.normalize(torch.randn(n, 6, generator=g), dim=1) for n in (50, 20))
    labels = torch.randint(4, (50,), generator=g)
    for k in (1, 5, 80):
        votes = mokd.knn_classify(bank * torch.linspace(0.9, 1.1, 50)[:, None], labels, 2 * queries, k)
        for q in range(20):
            similarity = [(float(queries[q] @ bank[i]), int(labels[i])) for i in range(50)]
            expected = [0.0] * 4
            for s, label in sorted(similarity, reverse=True)[:k]:
                expected[label] += math.exp(s / 0.07)
            largest = max(s for s, _ in similarity)   # votes are relative to that of the nearest
            relative = [v / math.exp(largest / 0.07) for v in expected]
            assert votes[q].tolist() == pytest.approx(relative, rel=1e-3, abs=1e-6)


def test_features_are_normalised_pooled_representations():
    cfg = config()
    backbones = [m.momentum_net.backbone for m in models_of(cfg)]
    x, y = mokd.draw_toy(20, 1)
    y[3] = -1
    images = mokd.EvalView(torch.utils.data.TensorDataset(x, y), 32)
    (f1, f2), labels = mokd.extract_features(backbones, images, torch.device("cpu"), 8)
    assert len(f1) == len(f2) == 20 and labels.tolist() == y.tolist() and backbones[0].training
    view = TF.center_crop(TF.resize(x[:1], [37], TF.InterpolationMode.BICUBIC, antialias=True), [32, 32])
    with torch.no_grad():
        expected = backbones[0].eval()(mokd.normalize(view.float() / 255))[0]
    assert f1.dtype == torch.half
    assert torch.allclose(f1[0].float(), F.normalize(expected[0], dim=0), atol=5e-4)


# ---------------------------------------------------------------------------- whole runs, by the command line

def torchrun(n):
    # --standalone finds a free port
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]


def start(out, *args, nproc=0, **popen):
    launch = torchrun(nproc) if nproc else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "mokd.py", *SMALL, *PAIR, "--out", str(out), *map(str, args)]
    return subprocess.Popen(command, cwd=HERE, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **popen)


def run(out, *args, **kwargs):
    process = start(out, *args, **kwargs)
    stdout, stderr = process.communicate(timeout=900)
    assert "Traceback" not in stderr or kwargs.get("nproc"), stderr
    return process.returncode, stdout, stderr


def short(folder):
    """A run of 24 short steps on 24 images."""
    return ["--data", folder, "--batch_size", 2, "--save_every", 3, "--epochs", 2, "--log_every", 2]


def same_weights(a, b):
    a, b = (torch.load(f / "checkpoint.pth", weights_only=True) for f in (a, b))
    assert a["step"] == b["step"]
    for model in ("model1", "model2"):
        for part in ("net", "momentum_net"):   # with its centers
            for k, v in a[model][part].items():
                assert torch.equal(v, b[model][part][k]), (model, part, k)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A whole run: (its folder, its data, its output)."""
    root = tmp_path_factory.mktemp("whole")
    for c in "ab":
        (root / "data" / c).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(picture(100 * ord(c) + i)).save(root / "data" / c / f"{i}.jpg")
    code, stdout, stderr = run(root / "out", *short(root / "data"))
    assert code == 0, stderr
    return root / "out", root / "data", stdout


def test_a_run_leaves_log_weights_and_checkpoint(uninterrupted):
    out, _, stdout = uninterrupted
    names = sorted(f.name for f in out.iterdir())
    assert names == ["checkpoint.pth", "log.jsonl", "model1.pth", "model2.pth"]
    records = [json.loads(line) for line in open(out / "log.jsonl")]
    assert [(r["step"], r["steps"]) for r in records] == [(s, 24) for s in range(2, 25, 2)]
    for key in ("epoch", "sm1", "st1", "cm1", "ct1", "loss1", "sm2", "loss2", "lr1", "lr2", "images/s", "GB",
                "minutes_left", "entropy_m1", "spread_t2"):
        assert key in records[-1]
    assert "timm.create_model('resnet18'" in stdout and "step 24/24" in stdout


@pytest.mark.parametrize("number, workers", [
    (signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_a_signal_then_resume_repeats_the_run_bit_for_bit(number, workers, uninterrupted, tmp_path):
    whole, data, _ = uninterrupted
    process = start(tmp_path, *short(data), "--workers", workers)
    while not (tmp_path / "log.jsonl").exists() or not open(tmp_path / "log.jsonl").read():
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert number.name in stderr and "Traceback" not in stderr, stderr
    step = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"]
    assert 0 < step < 24
    code, stdout, stderr = run(tmp_path, *short(data), "--workers", workers)
    assert code == 0 and f"at step {step}" in stdout, stderr
    same_weights(whole, tmp_path)


def test_sigkill_at_a_random_step_then_resume_repeats_the_run(uninterrupted, tmp_path):
    whole, data, _ = uninterrupted
    process = start(tmp_path, *short(data))
    while not (tmp_path / "checkpoint.pth").exists():
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()
    time.sleep(random.random() * 0.5)
    process.kill()
    process.communicate()
    code, stdout, stderr = run(tmp_path, *short(data))
    assert code == 0 and "resumed" in stdout, stderr
    same_weights(whole, tmp_path)
    code, stdout, _ = run(tmp_path, *short(data))   # and a finished run, started again, stays as it is
    assert code == 0 and "at step 24" in stdout
    same_weights(whole, tmp_path)


TWO_PROCESSES = """
import sys, torch, mokd, test_mokd as T
device, rank, world = mokd.join_processes()
cfg = T.config("--drop_path", 0, "--batch_size", 64, *T.VITS)
models = mokd.build_models(cfg, device, world)
mine = lambda v: v.unflatten(0, (-1, 64))[:, rank * 64 // world:(rank + 1) * 64 // world].flatten(0, 1)
losses, grads = T.gradients_of_step(cfg, models, [mine(v) for v in T.views_of(cfg)], T.now_of(cfg))
losses = {k: mokd.mean_over_processes(v) for k, v in losses.items()}
buffers = {(m.i, k): v for m in models for k, v in m.momentum_net.named_buffers()}
if rank == 0:
    torch.save((losses, grads, buffers), sys.argv[1])
if world > 1:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def test_a_step_of_two_processes_equals_one_of_one(tmp_path):
    """Losses, gradients before clipping and centers, with gloo on the CPU, where batch norm is each process's
    own: two ViTs."""
    script = tmp_path / "step.py"
    script.write_text(TWO_PROCESSES)
    results = []
    for n in (1, 2):
        out = tmp_path / str(n)
        command = [sys.executable, *(torchrun(n) if n > 1 else []), script, out]
        done = subprocess.run(command, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE})
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out, weights_only=True))
    for a, b, tolerance in zip(*results, (2e-5, 1e-3, 1e-5)):
        assert a.keys() == b.keys()
        for k in a:
            assert (a[k] - b[k]).abs().max() <= tolerance * max(1e-3, a[k].abs().max()), k


def test_a_run_of_two_processes_follows_that_of_one(tmp_path):
    """Through the command line: the first losses agree to rounding, so crops, photometric draws and shares
    are the same; rounding then grows from step to step, as it does between any two machines."""
    args = ["--drop_path", 0, "--batch_size", 1024, "--log_every", 1, "--knn_every", 1,
            "--vit_lr", 1e-4, *VITS]
    results = [run(tmp_path / str(n), *args, nproc=n) for n in (0, 2)]
    assert [r[0] for r in results] == [0, 0], results[1][2]
    logs = [[json.loads(line) for line in open(tmp_path / str(n) / "log.jsonl")] for n in (0, 2)]
    assert len(logs[0]) == len(logs[1]) == 5
    for step, (a, b) in enumerate(zip(*logs)):
        for k in a:
            if re.fullmatch("(sm|st|cm|ct|loss)[12]", k):
                assert a[k] == pytest.approx(b[k], rel=2e-5 if step == 0 else 3e-2), (step, k)
            if k.startswith("knn"):
                assert a[k] == pytest.approx(b[k], abs=1.5)


@pytest.mark.parametrize("args, word", [
    (["--seed", 3], "--seed was 0, is 3"), (["--t_norm", "on"], "--t_norm"),
    (["--lambda2", 0.3], "--lambda2")])
def test_other_settings_are_listed_and_refused(uninterrupted, args, word, capsys):
    out, data, _ = uninterrupted
    before = (out / "checkpoint.pth").read_bytes()
    assert mokd.main([*SMALL, *PAIR, "--out", str(out), *map(str, short(data)), *map(str, args)]) == 2
    assert word in capsys.readouterr().err and (out / "checkpoint.pth").read_bytes() == before


def test_a_damaged_checkpoint_is_named(uninterrupted, tmp_path, capsys):
    out, data, _ = uninterrupted
    whole = (out / "checkpoint.pth").read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"no checkpoint"):
        (tmp_path / "checkpoint.pth").write_bytes(content)
        assert mokd.main([*SMALL, *PAIR, "--out", str(tmp_path), *map(str, short(data))]) == 2
        assert "checkpoint.pth" in capsys.readouterr().err
        assert (tmp_path / "checkpoint.pth").read_bytes() == content


def fail(args, capsys):
    code = mokd.main([*SMALL, *PAIR, *map(str, args)])
    return code, capsys.readouterr().err


def test_a_missing_folder_an_empty_class_and_images_without_classes(folder, tmp_path, capsys):
    for data, word in ((tmp_path / "nowhere", "no such folder"), (folder, "empty")):
        (folder / "train" / "empty").mkdir(exist_ok=True)
        code, message = fail(["--data", data, "--out", tmp_path / "o"], capsys)
        assert code == 2 and word in message and "--data" in message
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.fromarray(picture()).save(flat / "a.jpg")
    code, message = fail(["--data", flat, "--out", tmp_path / "o"], capsys)
    assert code == 2 and "flat/all" in message


def test_too_few_images_or_no_validation_part_is_named(folder, tmp_path, capsys):
    code, message = fail(["--data", folder, "--batch_size", 64], capsys)
    assert code == 2 and "16 images" in message
    code, message = fail(["--data", folder / "train", "--knn_every", 1], capsys)
    assert code == 2 and "val" in message


def test_unreadable_images_are_named_and_skipped_or_stop_the_run(tmp_path, capsys):
    root = tmp_path / "data" / "all"
    root.mkdir(parents=True)
    good = picture()
    for i in range(120):
        Image.fromarray(good).save(root / f"{i:03}.jpg")
    whole = (root / "000.jpg").read_bytes()
    (root / "007.jpg").write_bytes(whole[:len(whole) // 3])
    args = ["--data", tmp_path / "data", "--out", tmp_path / "o"]
    code, message = fail(args, capsys)
    assert code == 0 and message.count("007.jpg") == 1
    (root / "008.jpg").write_text("not an image")
    code, message = fail([*args, "--seed", 1, "--out", tmp_path / "p"], capsys)
    assert code == 1 and "2 of 120" in message and "007.jpg" in message and "008.jpg" in message
    for i in range(120):
        (root / f"{i:03}.jpg").write_text("not an image")
    code, message = fail([*args, "--out", tmp_path / "q"], capsys)
    assert code == 1 and "cannot be read" in message


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
        uninterrupted, tmp_path, capsys, monkeypatch):
    _, data, _ = uninterrupted
    real, count = mokd.cross_entropy, []

    def broken(p, s, student_temp):
        count.append(0)
        return real(p, s, student_temp) * (math.nan if len(count) > 8 * 4 * 7 else 1)   # from the 8th step on
    monkeypatch.setattr(mokd, "cross_entropy", broken)
    code, message = fail(["--out", tmp_path, *short(data), "--log_every", 100], capsys)
    assert code == 1 and "step 8: sm1" in message and "not finite" in message   # as the log counts
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 6


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    cfg = config("--out", tmp_path)
    models = models_of(cfg)
    models[1].net.mlp_head.mlp[0].weight.data[0, 0] = math.nan
    with pytest.raises(mokd.UserError, match="model 2"):
        mokd.save(cfg, models, 5, torch.amp.GradScaler(enabled=False), 10)
    assert not list(tmp_path.iterdir())


def test_an_out_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, message = fail(["--out", tmp_path / "file" / "x"], capsys)
    assert code == 2 and "--out" in message and "file" in message


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(uninterrupted, tmp_path):
    import resource
    _, data, _ = uninterrupted

    def no_room():   # files above 100 kB cannot be written: what a full disk does to a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    code, _, stderr = run(tmp_path, *short(data), preexec_fn=no_room)
    assert code == 1 and "training goes on" in stderr and "make room and start again" in stderr
    assert "the disk is full" in stderr
    assert not (tmp_path / "checkpoint.pth").exists()


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mokd, "join_processes", lambda: (torch.device("cpu"), 0, 3))
    code, message = fail(["--out", tmp_path], capsys)
    assert code == 2 and "--batch_size 8" in message and "3 processes" in message


@pytest.mark.parametrize("name, kwargs, word", [
    ("deit_small_patch16_224", VIT, "global_pool='avg'"), ("vit_tiny", VIT, "global_pool='avg'"),
    ("resnet18", CNN, "channels=(8, 8, 16, 16)")])
def test_the_printed_call_gives_the_feature_that_was_trained(
        uninterrupted, name, kwargs, word, tmp_path, capsys):
    args = ["--arch1", name, "--model_kwargs1", *kwargs, "--losses", "sm"]
    run = ["--out", tmp_path, *short(uninterrupted[1]), "--epochs", 1]
    assert mokd.main([*SMALL, *PAIR, *args, *map(str, run)]) == 0
    call = [line for line in capsys.readouterr().out.splitlines() if line.startswith("timm.create_model")][0]
    assert word in call
    model = eval(call).eval()   # as a user pastes it
    backbone = models_of(config(*args))[0].momentum_net.backbone
    mokd.load_backbone(backbone, tmp_path / "model1.pth", "--init1")
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(model(x), backbone.eval()(x)[0], atol=1e-5)


def test_images_per_second_leave_out_checkpoints_and_knn_and_no_step(uninterrupted, tmp_path, monkeypatch):
    """By a clock on which a step takes 1 s, a checkpoint 100 s, k-NN 1000 s; where --save_every divides
    neither --log_every nor an epoch's 12 steps. A loss in the log is the mean over all steps since the last
    line."""
    _, data, _ = uninterrupted
    clock, sm1 = [0.0], []

    def slowly(function, seconds):
        def slow(*args, **kwargs):
            clock[0] += seconds
            result = function(*args, **kwargs)
            if seconds == 1:
                sm1.append(result[0]["sm1"].item())
            return result
        return slow
    monkeypatch.setattr(mokd, "time", argparse.Namespace(time=lambda: clock[0]))
    monkeypatch.setattr(mokd, "train_step", slowly(mokd.train_step, 1))
    monkeypatch.setattr(mokd, "save", slowly(mokd.save, 100))
    monkeypatch.setattr(mokd, "refuse_unlike_classes", lambda *_: None)
    monkeypatch.setattr(mokd, "knn_accuracy", slowly(lambda *_: (1.0, 2.0), 1000))
    args = ["--out", tmp_path, *short(data), "--save_every", 7, "--log_every", 5, "--knn_every", 1]
    assert mokd.main([*SMALL, *PAIR, *map(str, args)]) == 0
    log = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    steps = [r for r in log if "step" in r]
    assert [r["step"] for r in steps] == [5, 10, 15, 20, 24] and len(log) == 7
    assert [r["images/s"] for r in steps] == [2.0] * 5
    bounds = [0] + [r["step"] for r in steps]
    for first, last, r in zip(bounds, bounds[1:], steps):
        assert math.isclose(r["sm1"], sum(sm1[first:last]) / (last - first), rel_tol=1e-6)


@pytest.mark.parametrize("capability, dtype", [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"),
                                               ((9, 0), "bf16")])
def test_auto_takes_bf16_where_a_gpu_computes_with_it(capability, dtype, monkeypatch):
    """torch.cuda.is_bf16_supported() is true on a V100 too, where bf16 is emulated."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cfg = mokd.parse_args([])
    mokd.fill_in_machine(cfg, torch.device("cuda", 0), 1)
    assert cfg.dtype == dtype
    cfg = mokd.parse_args([])
    mokd.fill_in_machine(cfg, torch.device("cpu"), 1)
    assert cfg.dtype == "fp32"


def test_too_many_processes_for_a_machine_are_refused_once_by_its_first(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(mokd, "MAIN", False)   # as on a second machine
    for rank, words in ((0, "--nproc_per_node at most 4"), (1, ""), (7, "")):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert mokd.main([]) == 2
        err = capsys.readouterr().err
        assert words in err if words else not err


def test_machines_with_other_images_are_refused(tmp_path, monkeypatch):
    cfg = config("--out", tmp_path)
    cases = (([0, 10], None), ([0, 12], r"find \[10, 12\] images"), ([5, 10], r"steps \[0, 5\]"))
    for others, words in cases:
        monkeypatch.setattr(mokd, "gather",   # of equal settings
                            lambda x, n: torch.cat([x, torch.tensor([[*others, int(x[0, 2])]])]))
        if words is None:
            assert mokd.find_checkpoint(cfg, 10) is None
        else:
            with pytest.raises(mokd.UserError, match=words):
                mokd.find_checkpoint(cfg, 10)


def test_fewer_images_than_processes_are_refused():
    views = mokd.EvalView([(Image.new("RGB", (8, 8)), 0)] * 5, 8)
    with pytest.raises(mokd.UserError, match="5 images are too few for 8 processes"):
        mokd.extract_features([], views, torch.device("cpu"), rank=6, world=8)


def test_memory_where_no_resource_module_is(monkeypatch):
    assert mokd.memory_gb(torch.device("cpu")) > 0
    monkeypatch.setitem(sys.modules, "resource", None)   # as on Windows
    assert mokd.memory_gb(torch.device("cpu")) == 0


def test_a_collapse_is_reported(uninterrupted, tmp_path, capsys, monkeypatch):
    _, data, _ = uninterrupted
    real = mokd.MLPHead.forward
    # the same for every image
    monkeypatch.setattr(mokd.MLPHead, "forward", lambda self, x: real(self, 0 * x))
    code, message = fail(["--out", tmp_path, *short(data)], capsys)
    assert code == 0 and "collapse" in message and "m1, m2" in message
    monkeypatch.setattr(mokd, "MAIN", False)   # of many processes one reports it
    mokd.report_collapse(dict(spread_m1=0.0), config())
    assert not capsys.readouterr().err
    monkeypatch.setattr(mokd, "MAIN", True)
    monkeypatch.undo()
    code, message = fail(["--out", tmp_path / "2", *short(data)], capsys)
    assert code == 0 and "m2" not in message


def test_target_statistics_are_entropy_and_mutual_information_meant_over_processes(monkeypatch):
    cfg = config()
    models = models_of(cfg)
    sure = 1000 * F.one_hot(torch.arange(8) % 4, 32).float().view(2, 4, 32)
    targets = dict(m1=sure, t1=torch.zeros(2, 4, 32), m2=None, t2=None)
    stats = mokd.target_statistics(targets, models, now_of(cfg))
    assert stats["entropy_m1"] == pytest.approx(0, abs=1e-5)
    assert stats["spread_m1"] == pytest.approx(math.log(4), rel=1e-5)
    assert stats["entropy_t1"] == pytest.approx(math.log(32), rel=1e-5)
    assert stats["spread_t1"] == pytest.approx(0, abs=1e-5)
    monkeypatch.setattr(mokd, "mean_over_processes", lambda x: x / 2)   # another one, which has 0
    half = mokd.target_statistics(targets, models, now_of(cfg))
    assert half == pytest.approx({key: value / 2 for key, value in stats.items()}, abs=1e-6)


def test_fp16_that_skips_every_step_says_so(uninterrupted, tmp_path, capsys, monkeypatch):
    _, data, _ = uninterrupted
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 1e-4)
    code, message = fail(["--out", tmp_path, *short(data), "--epochs", 1, "--warmup_epochs", 0, "--dtype",
                          "fp16"], capsys)
    assert code == 0 and "fp16 skips every step" in message


def test_low_precision_takes_the_same_steps():
    """bf16, and fp16 with its loss scaled. (Stride 8: on CPUs with AMX, PyTorch 2.15's bf16 weight gradient
    of a strided 3x3 convolution of a 1x1 map is garbage.)"""
    losses, grads = {}, {}
    for dtype in ("fp32", "bf16", "fp16"):
        cfg = config("--model_kwargs1", *CNN, "output_stride=8", "--drop_path", 0)
        cfg.dtype = dtype
        models = models_of(cfg)
        start = copy.deepcopy(models[0].params)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=dtype == "fp16")
        losses[dtype], g = gradients_of_step(cfg, models, views_of(cfg), now_of(cfg), scaler)
        grads[dtype] = torch.cat([v.flatten() for v in g.values()])
        assert all(p.isfinite().all() for p in models[0].params)
        assert not all(map(torch.equal, models[0].params, start))
    for dtype in ("bf16", "fp16"):
        for name, value in losses["fp32"].items():
            assert losses[dtype][name] == pytest.approx(float(value), rel=0.03), (dtype, name)
        assert losses[dtype]["sm1"] != losses["fp32"]["sm1"]
        assert F.cosine_similarity(grads[dtype], grads["fp32"], dim=0) > 0.9


def test_compiled_models_take_the_same_step(monkeypatch):
    """All four nets are captured as graphs. To make machine code of them takes minutes: see MOKD_TIMING."""
    real, compiled = nn.Module.compile, []

    def capture(net, dynamic):
        compiled.append(net)
        real(net, dynamic=dynamic, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", capture)
    monkeypatch.setattr(mokd.shutil, "which", lambda name: name)
    losses = {}
    for flag in ("off", "on"):
        torch.compiler.reset()
        cfg = config("--drop_path", 0, "--compile", flag)
        models = models_of(cfg)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        losses[flag], _ = mokd.train_step(*models, views_of(cfg), cfg, now_of(cfg))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        assert graphs == 0 if flag == "off" else graphs >= 4
    assert compiled == [net for m in models for net in (m.net, m.momentum_net)]
    for name, value in losses["off"].items():
        assert losses["on"][name] == pytest.approx(float(value), rel=1e-4)


WIDE = {   # the demo's nets, and smaller ones of their kinds
    "CNN": ["resnet18", "layers=1,1,1,1", "channels=16,32,48,64",
            "stem_type=deep", "stem_width=8", "output_stride=8"],
    "smaller CNN": ["resnet18", "layers=1,1,1,1", "channels=8,16,24,32",
                    "stem_type=deep", "stem_width=8", "output_stride=8"],
    "ViT": ["vit_tiny", "img_size=24", "patch_size=4", "embed_dim=64", "depth=3", "num_heads=2"],
    "smaller ViT": ["vit_tiny", "img_size=24", "patch_size=4", "embed_dim=32", "depth=2", "num_heads=2"]}


@TIMED
@pytest.mark.parametrize("one, two", [
    ("CNN", "ViT"), ("CNN", "smaller CNN"), ("ViT", "smaller ViT"), ("CNN", "CNN"), ("ViT", "ViT")])
def test_compiled_pairs_of_every_family_take_the_same_step(one, two):
    """The same losses and momentum nets after it. Then compiled and uncompiled steps take turns, and their
    times are printed."""
    # in one process it compiles a few networks of a class, and runs further ones as they are
    torch.compiler.reset()
    graphs, cases = torch._dynamo.utils.counters["stats"], {}
    before = graphs["unique_graphs"]
    for compiled in ("off", "on"):
        (arch1, *kwargs1), (arch2, *kwargs2) = WIDE[one], WIDE[two]
        cfg = mokd.parse_args(["--demo", "--batch_size", "32", "--arch1", arch1, "--model_kwargs1", *kwargs1,
                               "--arch2", arch2, "--model_kwargs2", *kwargs2, "--compile", compiled])
        cfg.dtype = "fp32"
        models = models_of(cfg)
        step = functools.partial(mokd.train_step, *models, views_of(cfg), cfg, mokd.schedule(cfg, 5, 100))
        losses, _ = step()
        cases[compiled] = step, losses, [v for m in models for v in m.momentum_net.state_dict().values()]
    assert graphs["unique_graphs"] - before >= 4   # two students, two momentum nets
    (slow, losses, states), (fast, losses_compiled, states_compiled) = cases.values()
    expected = {k: float(v) for k, v in losses.items()}
    assert {k: float(v) for k, v in losses_compiled.items()} == pytest.approx(expected, rel=1e-4)
    for a, b in zip(states, states_compiled, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    rounds = [[timeit.timeit(step, number=3) for step in (slow, fast)] for _ in range(5)]
    best = [min(times) for times in zip(*rounds)]
    print(f"{one}, {two}: a step {best[0] / 3:.3f} s, compiled {best[1] / 3:.3f} s, "
          f"ratio {best[0] / best[1]:.2f}")


def test_a_demo_ends_with_its_table(tmp_path, monkeypatch, capsys):
    """At a fraction of its length; how far the nets rise is in the README."""
    monkeypatch.setattr(mokd, "draw_toy", lambda n, part, draw=mokd.draw_toy: draw(n // 16, part))
    assert mokd.main(["--demo", "--epochs", "1", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out.split("k-NN top-1")[1].splitlines()
    assert "raw pixels" in table[1] and "vit_tiny" in table[3]
    assert re.search(r"resnet18 +\d+\.\d +\d+\.\d", table[2])


# ---------------------------------------------------------- nothing hangs, nothing is lost, nothing is silent

def test_every_equation_is_named_in_one_comment_and_files_keep_their_width():
    with open(os.path.join(HERE, "mokd.py")) as f:
        source = f.read()
    for number in range(1, 10):
        assert len(re.findall(rf"eq\. \({number}\)", source)) == 1, number
    for folder in (HERE, os.path.join(HERE, "extras")):
        for file in sorted(os.listdir(folder)):
            if file.endswith(".py"):
                with open(os.path.join(folder, file)) as f:
                    wide = [i for i, line in enumerate(f, 1) if len(line.rstrip("\n")) > 110]
                assert not wide, (file, wide[:5])


def test_a_new_loss_on_pooled_features_trains_the_backbone_and_not_its_partner():
    cfg = config("--drop_path", 0)
    models = models_of(cfg)
    for m in models:
        _, _, Z = m.n(views_of(cfg), now_of(cfg))
        Z.pooled.pow(2).mean().backward()
        assert all(p.grad is not None for p in m.net.backbone.parameters() if p.requires_grad)
        assert all(p.grad is None for p in m.net.mlp_head.parameters())


def test_a_module_added_to_net_is_trained_and_every_parameter_is_in_one_group(monkeypatch):
    class More(mokd.Net):
        def __init__(self, backbone, cfg):
            super().__init__(backbone, cfg)
            self.more = nn.Linear(backbone.dim, backbone.dim)

        def forward(self, x):
            m, t, Z = super().forward(x)
            return m + self.more(Z.pooled).mean(-1).unflatten(0, m.shape[:2])[..., None] * m, t, Z
    monkeypatch.setattr(mokd, "Net", More)
    cfg = config()
    for m in (models := models_of(cfg)):
        groups = [id(p) for o in m.optimizers for group in o.param_groups for p in group["params"]]
        assert sorted(groups) == sorted(id(p) for p in m.params if p.requires_grad)
    before = [m.net.more.weight.clone() for m in models]
    mokd.train_step(*models, views_of(cfg), cfg, now_of(cfg))
    assert not any(torch.equal(m.net.more.weight, w) for m, w in zip(models, before))


def test_release_rises_one_step_sooner_and_starts_cls_wide():
    paper, release = (mokd.parse_args(["--recipe", recipe]) for recipe in ("paper", "release"))
    warmup = np.linspace(0, 0.1, 50)   # as the released code makes its warm-up of 10 epochs of 5 steps
    for cfg, expected in ((release, warmup), (paper, 0.1 * np.arange(50) / 50)):
        assert [mokd.schedule(cfg, s, 5).lr["cnn"] for s in range(50)] == pytest.approx(list(expected))
    vits = [models_of(config("--recipe", r, "--t_dim", 24))[1] for r in ("paper", "release")]
    stds = [m.net.backbone.model.cls_token.std() for m in vits]
    assert stds[0] < 1e-5 and 0.01 < stds[1] < 0.04


def test_release_decays_1d_parameters_of_a_cnns_t_head_alone():
    for m in models_of(config("--recipe", "release", "--t_dim", 24)):
        groups = [g for o in m.optimizers for g in o.param_groups]
        for name, p in m.net.named_parameters():
            decays = [g["decays"] for g in groups for q in g["params"] if q is p]
            if p.requires_grad:
                assert decays == [p.dim() > 1 or (m.family == "cnn" and name.startswith("t_head."))], name


def test_losses_are_read_as_names():
    """No loss but st and ct needs a T-Head, whatever letters the others have."""
    assert models_of(config("--losses", "sm,cm"))[0].t is None
    assert models_of(config("--losses", "sm,ct"))[0].t is not None


class Broken(torch.utils.data.Dataset):
    """A data set with a bug of its own, in one image."""
    targets = [i % 2 for i in range(64)]

    def __len__(self):
        return 64

    def __getitem__(self, i):
        if i == 40:
            raise ZeroDivisionError("a bug of the data set")
        return torch.zeros(3, 20, 20, dtype=torch.uint8), 0


@pytest.mark.parametrize("program, workers", [("mokd", 0), ("mokd", 2), ("eval_linear", 2)])
def test_a_data_sets_own_error_is_no_unreadable_image_and_leaves_no_process(program, workers, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {HERE!r})
import eval_linear, mokd, test_mokd as T
mokd.get_data = lambda cfg: (T.Broken(), T.Broken() if {program == "eval_linear"} else None)
args = [*T.SMALL, *T.PAIR]
if {program == "eval_linear"}:
    args = ["--arch", "resnet18", "--model_kwargs", *T.CNN, "--data", "toy", "--image_size", "32"]
program = (mokd.parse_args, mokd.run) if {program == "mokd"} else (eval_linear.parse, eval_linear.run)
sys.exit(mokd.main([*args, "--workers", "{workers}", "--out", {str(tmp_path / "o")!r}], "p", *program))
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "a bug of the data set" in done.stderr and "skipped" not in done.stderr


def children_of(pid):
    """Processes whose parent is pid."""
    found = []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/stat") as f:
                if name.isdigit() and int(f.read().rsplit(")", 1)[1].split()[1]) == pid:
                    found.append(int(name))
        except OSError:
            pass
    return found


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.parametrize("error, known", [
    (ConnectionResetError(104, "Connection reset by peer"), True), (EOFError(), True),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
    (ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0."), False)])
def test_a_worker_that_dies_while_its_batch_is_fetched_has_the_sentence_too(error, known, capsys):
    def run(cfg):
        raise error
    if known:
        assert mokd.main([], run=run) == 1
        assert "a loader process is gone" in capsys.readouterr().err
    else:   # the data set's own failure
        with pytest.raises(ConnectionResetError):
            mokd.main([], run=run)


NEWS_OF_A_DEATH = """
import multiprocessing, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])   # in all threads to come
import torch
import mokd

def run(cfg):
    loader = iter(torch.utils.data.DataLoader(range(4), num_workers=2))
    next(loader)
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)   # it stays a zombie, as at its death
    raise ConnectionResetError(104, "Connection reset by peer")

def warn(text):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])   # the news comes late
    print(text, file=sys.stderr)

mokd.warn = warn
sys.exit(mokd.main([], run=run))
"""


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="needs waitid")
def test_the_news_of_a_workers_death_does_not_interrupt_the_sentence():
    done = subprocess.run([sys.executable, "-c", NEWS_OF_A_DEATH], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 1 and "try fewer --workers" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_killed_worker_ends_the_run_and_a_killed_run_ends_its_workers(victim, uninterrupted, tmp_path):
    _, data, _ = uninterrupted
    process = start(tmp_path, *short(data), "--epochs", 1000, "--workers", 2)
    until(lambda: (tmp_path / "checkpoint.pth").exists())
    workers = children_of(process.pid)
    assert len(workers) >= 2
    os.kill(workers[0] if victim == "worker" else process.pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    if victim == "worker":
        assert process.returncode == 1 and "--workers" in stderr and "Traceback" not in stderr, stderr
    until(lambda: not any(map(alive, workers)), 30)
    assert mokd.read_checkpoint(f"{tmp_path}/checkpoint.pth")["step"] > 0


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_killed_worker_ends_linear_probing_too(victim, trained, tmp_path):
    command = [sys.executable, "eval_linear.py", "--checkpoint", trained / "checkpoint.pth", "--epochs", 9999,
               "--batch_size", 64, "--workers", 2, "--save_every", 1, "--lr", 0.1, "--out", tmp_path]
    process = subprocess.Popen([*map(str, command)], cwd=HERE, stdout=subprocess.DEVNULL, text=True,
                               stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    until(lambda: (tmp_path / "checkpoint.pth").exists(), 120)
    workers = children_of(process.pid)
    assert len(workers) >= 2
    os.kill(workers[0] if victim == "worker" else process.pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    if victim == "worker":
        assert process.returncode == 1 and "--workers" in stderr and "Traceback" not in stderr, stderr
    until(lambda: not any(map(alive, workers)), 30)
    assert mokd.read_checkpoint(f"{tmp_path}/checkpoint.pth")["step"] > 0


def test_training_processes_end_when_torchrun_is_killed(tmp_path):
    process = start(tmp_path, *VITS, "--epochs", 1000, "--save_every", 1, "--data", "toy",
                    "--batch_size", 64, nproc=2)
    until(lambda: (tmp_path / "checkpoint.pth").exists(), 120)
    ranks = children_of(process.pid)
    assert len(ranks) >= 2
    process.kill()
    until(lambda: not any(map(alive, ranks)), 60)
    process.communicate()
    assert mokd.read_checkpoint(f"{tmp_path}/checkpoint.pth")["step"] > 0


def test_weights_are_written_before_the_checkpoint(tmp_path, monkeypatch):
    cfg, written = config("--out", tmp_path), []
    monkeypatch.setattr(mokd, "write", lambda value, path: written.append(os.path.basename(path)))
    mokd.save(cfg, models_of(cfg), 3, torch.amp.GradScaler(enabled=False), 10)
    assert written == ["model1.pth", "model2.pth", "checkpoint.pth"]


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """A copy of a whole run, which a test may change -> (its folder, its data)."""
    out, data, _ = uninterrupted
    for file in out.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path, data


def again(finished, *args):
    out, data = finished
    return mokd.main([*SMALL, *PAIR, "--out", str(out), *map(str, short(data)), *map(str, args)])


def test_rates_warmup_clipping_and_dtype_may_differ_on_resume_and_are_said(finished, capsys):
    changed = ["--cnn_lr", 0.5, "--warmup_epochs", 1, "--clip_grad", 1, "--epochs", 2, "--dtype", "bf16"]
    assert again(finished, *changed) == 0
    text = capsys.readouterr().out
    for words in ("--cnn_lr was 1.0, is 0.5", "--warmup_epochs was 0, is 1", "--clip_grad was 3.0",
                  "--dtype was fp32, is bf16"):
        assert words in text


def test_a_resumed_run_takes_the_new_rate(uninterrupted, tmp_path):
    whole, data, _ = uninterrupted
    state = torch.load(whole / "checkpoint.pth", weights_only=True)
    cfg = config("--cnn_lr", 7)
    models = models_of(cfg)
    models[0].load_state(state["model1"])
    mokd.train_step(*models, views_of(cfg), cfg, now_of(cfg))
    rate = now_of(cfg).lr["cnn"]
    assert models[0].optimizers[0].param_groups[0]["lr"] == pytest.approx(rate) and rate > 0.2


def test_a_checkpoint_from_before_a_setting_existed_takes_its_default(finished, capsys):
    out, _ = finished
    state = torch.load(out / "checkpoint.pth", weights_only=True)
    del state["config"]["t_norm"]
    torch.save(state, out / "checkpoint.pth")
    assert again(finished) == 0
    assert again(finished, "--t_norm", "on") == 2 and "--t_norm was False" in capsys.readouterr().err


def test_another_number_of_images_is_refused(finished, capsys):
    out, data = finished
    (out / "more" / "c").mkdir(parents=True)
    for file in sorted(data.glob("*/*.jpg"))[:13]:
        (out / "more" / "c" / f"{file.parent.name}{file.name}").write_bytes(file.read_bytes())
    assert again((out, out / "more"), "--data", out / "more") == 2
    assert "--data was" in capsys.readouterr().err   # another folder is another setting
    # the same folder with fewer images:
    state = torch.load(out / "checkpoint.pth", weights_only=True)
    torch.save(state | {"images": 23}, out / "checkpoint.pth")
    assert again(finished) == 2 and "had 23 images, now 24" in capsys.readouterr().err


def test_one_flipped_bit_and_a_file_that_cannot_be_read_are_told_apart(finished, capsys, monkeypatch):
    out, _ = finished
    content = bytearray((out / "checkpoint.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "checkpoint.pth").write_bytes(content)
    assert again(finished) == 2 and "check sum" in capsys.readouterr().err

    def denied(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(mokd.zipfile, "ZipFile", denied)
    assert again(finished) == 2
    message = capsys.readouterr().err
    assert "Permission denied" in message and "Delete" not in message and "damaged" not in message


def test_a_sound_checkpoint_that_cannot_be_mapped_is_not_called_damaged(finished, capsys, monkeypatch):
    def no_memory(*args, **kwargs):
        raise RuntimeError("unable to mmap 99 bytes from file <x>: Cannot allocate memory (12)")
    monkeypatch.setattr(torch, "load", no_memory)
    assert again(finished) == 2
    message = capsys.readouterr().err
    assert "may be sound" in message and "Delete" not in message and "damaged" not in message


def test_a_checkpoint_whose_optimizer_state_has_other_shapes_is_refused(finished, capsys):
    out, _ = finished
    state = torch.load(out / "checkpoint.pth", weights_only=True)
    for moments in state["model2"]["optimizers"][0]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].flatten()[:1].clone().expand(3).contiguous()
    torch.save(state, out / "checkpoint.pth")
    assert again(finished) == 2 and "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["three", None, 1.5])
def test_a_checkpoint_whose_step_is_no_number_is_refused(step, finished, capsys):
    out, _ = finished
    state = torch.load(out / "checkpoint.pth", weights_only=True)
    torch.save(state | dict(step=step), out / "checkpoint.pth")
    assert again(finished) == 2 and "no checkpoint of this program" in capsys.readouterr().err


def test_processes_that_find_other_checkpoints_are_refused(finished, monkeypatch):
    out, data = finished
    cfg = mokd.parse_args([*SMALL, *PAIR, "--out", str(out), *map(str, short(data))])
    cfg.dtype, cfg.workers, cfg.lambda1, cfg.lambda2 = "fp32", 0, 1.0, 0.1
    real = mokd.gather
    # the other found none
    monkeypatch.setattr(mokd, "gather", lambda x, n: torch.cat([real(x, n), torch.zeros_like(x)]))
    with pytest.raises(mokd.UserError, match="share this folder"):
        mokd.find_checkpoint(cfg, 24)
    for name, value, refused in (("workers", 3, False), ("cnn_lr", 0.5, True)):
        other, sent = copy.copy(cfg), []
        setattr(other, name, value)
        monkeypatch.setattr(mokd, "gather", lambda x, n: sent.append(x) or x)
        mokd.find_checkpoint(other, 24)
        monkeypatch.setattr(mokd, "gather", lambda x, n: torch.cat([x, sent[0]]))
        if refused:
            with pytest.raises(mokd.UserError, match="same command"):
                mokd.find_checkpoint(cfg, 24)
        else:
            mokd.find_checkpoint(cfg, 24)


def test_a_torn_last_line_of_the_log_is_closed_and_knn_is_made_again(finished, folder, capsys):
    out, _ = finished
    with open(out / "log.jsonl", "a") as f:
        f.write('{"epoch": 1, "kn')
    assert again(finished) == 0
    with open(out / "log.jsonl") as f:
        assert f.read().endswith('"kn\n')
    args = ["--data", folder, "--out", out / "2", "--batch_size", 8, "--knn_every", 1]
    assert fail(args, capsys)[0] == 0
    with open(out / "2" / "log.jsonl") as f:
        lines = f.read().splitlines(True)
    assert "knn1" in lines[-1]
    (out / "2" / "log.jsonl").write_text("".join(lines[:-1]))   # as a kill during k-NN leaves it
    assert fail(args, capsys)[0] == 0
    with open(out / "2" / "log.jsonl") as f:
        assert f.read().splitlines(True)[-1] == lines[-1]


def test_unlike_class_folders_are_refused_before_knn(folder, tmp_path, capsys):
    (folder / "val" / "b").rename(folder / "val" / "c")
    code, message = fail(["--data", folder, "--knn_every", 1, "--out", tmp_path / "o"], capsys)
    assert code == 2 and "same class folders" in message and "b is in one alone" in message.replace("\n", " ")


def test_an_image_counts_once_whoever_met_it(monkeypatch, capsys):
    watch = mokd.Watch(list(range(300)))
    try:
        others = []   # what the other process of two has met
        monkeypatch.setattr(mokd, "sum_over_processes", lambda x: x + others.pop(0))
        met = torch.zeros(300, dtype=torch.int32)
        met[7] = 1
        others += [torch.tensor([1, 0, 0]), met]
        assert watch.after_step([5, -1], ["torn", ""]) is None and watch.unreadable == {5, 7}
        others += [torch.tensor([0, 0, 0])]
        assert watch.after_step([7], ["torn"]) is None   # now this process meets what the other had met
        assert capsys.readouterr().err.count("skipped") == 1
        others += [torch.tensor([0, 1, 0])]
        assert watch.after_step() == signal.SIGTERM   # which came to the other
        others += [torch.tensor([1, 0, 0]), torch.ones(300, dtype=torch.int32)]
        with pytest.raises(mokd.UserError, match="300 of 300"):
            watch.after_step()
    finally:
        watch.end()


def test_features_that_are_not_finite_and_many_unreadable_images_stop_the_evaluation():
    toy = torch.utils.data.TensorDataset(*mokd.draw_toy(16, "few"))
    backbone = models_of(config())[0].net.backbone
    backbone.model.conv1.weight.data[:] = math.nan
    with pytest.raises(mokd.UserError, match="not finite"):
        mokd.extract_features([backbone], mokd.EvalView(toy, 32), torch.device("cpu"))

    class Bad(Broken):
        def __getitem__(self, i):
            raise OSError("torn")
    with pytest.raises(mokd.UserError, match="64 of 64"):
        mokd.extract_features([mokd.Pixels()], mokd.EvalView(Bad(), 32), torch.device("cpu"))


def test_a_picture_of_one_row_takes_no_memory_in_evaluation():
    class Row(Broken):
        def __getitem__(self, i):
            return torch.zeros(3, 1, 65_500, dtype=torch.uint8), 0
    view, label = mokd.EvalView(Row(), 224)[0]
    assert view.shape == (3, 224, 224) and label == 0


@pytest.mark.parametrize("error, words", [
    (torch.cuda.OutOfMemoryError("CUDA out of memory"), "--grad_checkpointing"),
    (MemoryError(), "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
     "--batch_size"),
    (OSError(12, "Cannot allocate memory"), "--batch_size"),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), "--workers"),
    (ValueError("Expected more than 1 value per channel when training, got input size [1, 8, 1, 1]"),
     "batch norm"),
    (KeyboardInterrupt(), "SIGINT")])
def test_what_the_machine_cannot_do_is_one_sentence(error, words, capsys):
    def run(cfg):
        raise error
    assert mokd.main([], run=run) in (1, 130)
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_data_that_may_not_be_read_is_named(folder, monkeypatch, capsys):
    def denied(path):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(torchvision.datasets.folder.os, "scandir", denied)
    code, message = fail(["--data", folder], capsys)
    assert code == 2 and f"--data {folder}: " in message and "Permission denied" in message


def test_compile_without_a_compiler_and_data_without_train_are_refused(folder, monkeypatch, capsys):
    (folder / "train").rename(folder / "training")
    code, message = fail(["--data", folder], capsys)
    assert code == 2 and "has val/ but no train/" in message
    monkeypatch.setattr(mokd.shutil, "which", lambda name: None)
    code, message = fail(["--compile"], capsys)
    assert code == 2 and "--compile" in message and "gcc" in message


@pytest.mark.parametrize("flag, close", [
    ("--lr", "--cnn_lr, --vit_lr"), ("--batchsize", "--batch_size"), ("--k", "--knn_k")])
def test_an_unknown_flag_gets_a_suggestion(flag, close, capsys):
    with pytest.raises(SystemExit) as error:
        mokd.parse_args([flag, "1"])
    assert error.value.code == 2 and close in capsys.readouterr().err


def test_init_takes_files_of_dino_moco_and_the_released_code(tmp_path, capsys):
    cfg = config()
    cnn, vit = [m.net.backbone.model.state_dict() for m in models_of(cfg)]

    def named(state, prefix):
        return {prefix + name: w + 1 if w.is_floating_point() else w for name, w in state.items()}
    moco_v3 = named(vit, "module.momentum_encoder.") | named(vit, "module.predictor.")
    files = {"full dino": dict(teacher=named(vit, "backbone."), student={},
                               args=argparse.Namespace(arch="vit_tiny"), epoch=9),
             "released code": dict(teacher_vit=named(vit, "backbone."),
                                   teacher_cnn=named(cnn, "backbone."), epoch=3),
             "moco v3": dict(state_dict=moco_v3, arch="vit")}
    for name, content in files.items():
        torch.save(content, tmp_path / "w.pth")
        m = models_of(config("--init2", tmp_path / "w.pth"))[1]
        weight = m.net.backbone.model.patch_embed.proj.weight
        assert torch.equal(weight, vit["patch_embed.proj.weight"] + 1), name
    moco = named(cnn, "module.encoder_q.") | dict(queue=torch.ones(3))   # MoCo v1 and v2
    torch.save(dict(state_dict=moco, epoch=1), tmp_path / "w.pth")
    m = models_of(config("--init1", tmp_path / "w.pth"))[0]
    assert torch.equal(m.net.backbone.model.conv1.weight, cnn["conv1.weight"] + 1)
    moco_v3 = named(vit, "module.base_encoder.")   # of older torch: no zip file, so it cannot be mapped
    torch.save(dict(state_dict=moco_v3), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    m = models_of(config("--init2", tmp_path / "w.pth"))[1]
    assert torch.equal(m.net.backbone.model.patch_embed.proj.weight, vit["patch_embed.proj.weight"] + 1)
    for content, words in [(dict(config={}, step=3, model1={}), "model1.pth"),
                           (dict(teacher=vit, args=collections.UserDict()), "collections.UserDict, which")]:
        torch.save(content, tmp_path / "w.pth")
        code, message = fail(["--init2", tmp_path / "w.pth", "--out", tmp_path / "o"], capsys)
        assert code == 2 and words in message and message.count("\n") == 1, message


def test_grad_checkpointing_gives_the_same_losses_and_gradients():
    results = []
    for value in ("off", "on"):
        cfg = config("--grad_checkpointing", value, "--drop_path", 0)
        models = models_of(cfg)
        losses, grads = gradients_of_step(cfg, models, views_of(cfg), now_of(cfg))
        results.append((losses, grads, [b.clone() for b in models[0].momentum_net.buffers()]))
    (losses, grads, statistics), (losses_again, grads_again, statistics_again) = results
    assert losses == losses_again and grads.keys() == grads_again.keys()
    assert all(close(grads_again[key], grads[key], 1e-5) for key in grads)
    assert all(map(torch.equal, statistics_again, statistics))   # only the student's own are updated twice


# --------------------------------------------------------------------- CUDA, on a machine without a GPU

class FakeGPU(TorchDispatchMode):
    """Tensors of cuda:0 are fake: they have a shape, a type and a device, but no values. An operation on
    tensors of two devices raises. A wait for the device is noted with its line; a count that is waited for is
    0, any other value 1 (so all is finite), and a search for what is not zero finds nothing. Tensors of the
    CPU are real. To be entered inside FakeTensorMode."""
    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_gpu = any(isinstance(t, FakeTensor) for t in tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        if func is torch.ops.aten._local_scalar_dense.default and on_gpu:   # item(), bool(), float()
            with unset_fake_temporarily():
                return self.read(args[0]).item()
        if func is torch.ops.aten._to_copy.default and device is not None and device.type == "cpu" and on_gpu:
            with unset_fake_temporarily():
                return self.read(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if func is torch.ops.aten.nonzero.default and on_gpu:
            self.wait()
            return torch.empty(0, args[0].dim(), dtype=torch.long, device=args[0].device)
        if on_gpu or device is not None and device.type == "cuda":
            if func is torch.ops.aten._to_copy.default and not on_gpu and not kwargs.get("non_blocking"):
                self.wait()
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def read(self, x):   # x, as if it came to the CPU
        self.wait()
        return (torch.zeros if x.dtype == torch.long else torch.ones)(x.shape, dtype=x.dtype)

    def wait(self):
        """Note the innermost line of this project, but for this class's own."""
        own, folder = ("wait", "read", "__torch_dispatch__"), os.path.dirname(mokd.__file__)
        frames = [f for f in traceback.extract_stack() if os.path.dirname(f.filename) == folder]
        last = [f for f in frames if f.name not in own][-1]
        self.waits.append(f"{os.path.basename(last.filename)}:{last.lineno} {last.line}")


def walk_backward(loss, *_, **__):
    """loss.backward() without torch's engine, which asks the driver for streams: nodes in the order of the
    graph, gradients of what was broadcast summed, all cast to their tensor's type, as the engine does."""
    order, seen, stack = [], {loss.grad_fn}, [(loss.grad_fn, iter(loss.grad_fn.next_functions))]
    while stack:
        node, edges = stack[-1]
        for after, _ in edges:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append((after, iter(after.next_functions)))
                break
        else:
            order.append(node)
            stack.pop()
    grads = {(loss.grad_fn, 0): torch.ones_like(loss)}
    for node in reversed(order):
        if hasattr(node, "variable"):   # a leaf
            grad = grads.pop((node, 0), None)
            if grad is not None:
                node.variable.grad = grad if node.variable.grad is None else node.variable.grad + grad
            continue
        incoming = [grads.pop((node, i), None) for i in range(len(node._input_metadata))]
        if all(grad is None for grad in incoming):
            continue
        outgoing = node(*incoming) if callable(node) else node.apply(*incoming)   # or an autograd.Function
        outgoing = outgoing if isinstance(outgoing, tuple) else (outgoing,)
        for (after, i), grad in zip(node.next_functions, outgoing):
            if after is None or grad is None:
                continue
            like = after.variable if hasattr(after, "variable") else after._input_metadata[i]
            if grad.shape != like.shape or grad.dtype != like.dtype:
                grad = grad.sum_to_size(like.shape).to(like.dtype)
            grads[after, i] = grads[after, i] + grad if (after, i) in grads else grad


def move_real_tensors(net, device=None, **_):
    """net.to(device), of which torch makes a mess where some tensors of net are there already and fake."""
    for module in net.modules():
        for own in (module._parameters, module._buffers):
            for name, t in own.items():
                if t is not None and not isinstance(t, FakeTensor):
                    own[name] = t.detach().to(device)
                    if isinstance(t, nn.Parameter):
                        own[name] = nn.Parameter(own[name], t.requires_grad)
    return net


@pytest.fixture
def gpu(monkeypatch):
    """A FakeGPU, where cuda:0 may be used; .device is it."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch knows no CUDA")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)   # autocast asks this
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: fake.read(x).tolist())   # torch's reads one by one
    monkeypatch.setattr(nn.Module, "to", move_real_tensors)
    monkeypatch.setattr(torch.Tensor, "backward", walk_backward)
    mokd.mean_and_std.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True), FakeGPU() as fake:
        fake.device = torch.device("cuda", 0)
        yield fake
    mokd.mean_and_std.cache_clear()


def crops_of(cfg):
    g = torch.Generator().manual_seed(0)
    shapes = [(cfg.batch_size, n, size, size, 3) for n, size in (
        (2, cfg.global_size), (cfg.local_crops, cfg.local_size))]
    return [torch.randint(256, shape, generator=g, dtype=torch.uint8) for shape in shapes]


SMALLER_CNN = ["--arch2", "resnet34", "--model_kwargs2", *CNN]
SMALLER_VIT = ["--arch1", "vit_small", "--model_kwargs1", *VIT[:-2], "depth=1", "num_heads=2"]


@pytest.mark.parametrize("args", [
    [], ["--recipe", "release"], ["--search", "global", "--dtype", "fp16"], ["--losses", "sm"], SMALLER_CNN,
    [*SMALLER_VIT, "--recipe", "release", "--dtype", "fp16"]], ids=" ".join)
def test_a_step_on_cuda_stays_on_it_and_never_waits(args, gpu):
    """The whole of it: forward, search, losses, backward, update, momentum nets, centers; bf16 and fp16."""
    cfg = config(*args)
    cfg.dtype = "fp16" if "fp16" in args else "bf16"
    models = mokd.build_models(cfg, gpu.device)
    x = [v.to(gpu.device, memory_format=torch.channels_last) for v in views_of(cfg)]
    gpu.waits.clear()
    losses, logits = mokd.train_step(*models, x, cfg, now_of(cfg))
    assert gpu.waits == []

    half = torch.float16 if cfg.dtype == "fp16" else torch.bfloat16
    assert all(loss.device == gpu.device and loss.dtype == torch.float32 for loss in losses.values())
    assert {t.dtype for t in logits.values() if t is not None} == {half}
    for m in models:
        tensors, updated = [*m.params, *m.params_, *m.net.buffers(), *m.momentum_net.buffers()], 0
        for optimizer in m.optimizers:
            updated += len(optimizer.state)
            for state in optimizer.state.values():
                tensors += [v for v in state.values() if v is not None]
        assert all(t.device == gpu.device for t in tensors)
        assert updated == sum(p.requires_grad for p in m.params)   # all were given a gradient

def test_views_are_made_on_cuda_without_a_wait(gpu):
    """What happens to each image is drawn on the CPU, so which rows an operation is for is not read back."""
    cfg = config("--blur", 0.1, 2)
    mokd.mean_and_std(gpu.device)   # of which a copy is kept
    gpu.waits.clear()
    x = mokd.make_views(crops_of(cfg), cfg, gpu.device, 0)
    assert gpu.waits == [] and [v.shape for v in x] == [(16, 3, 32, 32), (16, 3, 16, 16)]
    assert all(v.device == gpu.device for v in x)


def test_a_wait_and_a_tensor_of_the_cpu_in_a_step_are_noticed(gpu, monkeypatch):
    cfg = config()
    cfg.dtype = "bf16"
    x = [v.to(gpu.device) for v in views_of(cfg)]
    models, real = mokd.build_models(cfg, gpu.device), mokd.cross_entropy
    now = now_of(cfg)

    def waiting(p, s, temp):
        return real(p, s, temp) / max(1.0, p.sum().item())

    def with_the_cpu(p, s, temp):
        return real(p * torch.ones(cfg.out_dim), s, temp)
    gpu.waits.clear()
    monkeypatch.setattr(mokd, "cross_entropy", waiting)
    mokd.train_step(*models, x, cfg, now)
    assert len(gpu.waits) > 4 and all("p.sum().item()" in line for line in gpu.waits)
    monkeypatch.setattr(mokd, "cross_entropy", with_the_cpu)
    with pytest.raises(RuntimeError, match="devices,? cuda:0.* cpu"):
        mokd.train_step(*models, x, cfg, now)


@pytest.mark.parametrize("program", ["mokd.py", "eval_linear.py", "eval_linear.py --finetune"])
def test_more_steps_on_cuda_bring_no_more_waits(program, gpu, monkeypatch, tmp_path):
    """Whole programs, with their loaders: they wait to log, to evaluate and to save, not in a step."""
    toy = mokd.get_data
    monkeypatch.setattr(mokd, "join_processes", lambda: (gpu.device, 0, 1))
    monkeypatch.setattr(mokd, "write", lambda value, path: None)   # there are no values
    monkeypatch.setattr(mokd, "memory_gb", lambda device: 0.0)
    mokd.mean_and_std(gpu.device)   # of which a copy is kept
    waits = []
    for steps in (1, 2):
        monkeypatch.setattr(mokd, "get_data", lambda cfg: [
            torch.utils.data.Subset(part, range(n)) for part, n in zip(toy(cfg), (8 * steps, 8))])
        gpu.waits.clear()
        common = ["--out", str(tmp_path / str(steps)), "--log_every", "99", "--dtype", "bf16"]
        common += ["--workers", "0"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            if program == "mokd.py":
                pair = [*SMALL, *PAIR, "--losses", "sm", "--local_crops", "0"]
                mokd.run(mokd.parse_args([*pair, *common]))
            else:
                eval_linear.run(eval_linear.parse([
                    "--arch", "vit_tiny", "--model_kwargs", *VIT, "--image_size", "32", "--data", "toy",
                    "--batch_size", "8", "--epochs", "1", "--lr", "0.1", *program.split()[1:], *common]))
        waits.append(sorted(gpu.waits))
    assert waits[0] == waits[1] != []


def test_features_on_cuda_bring_no_wait_for_a_batch(gpu):
    cfg = config()
    backbones = [m.momentum_net.backbone for m in mokd.build_models(cfg, gpu.device)]
    mokd.mean_and_std(gpu.device)   # of which a copy is kept
    waits = []
    for n in (8, 16):
        images = torch.utils.data.TensorDataset(*mokd.draw_toy(n, "train"))
        gpu.waits.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            features, labels = mokd.extract_features(backbones, mokd.EvalView(images, 32), gpu.device, 4,
                                                     dtype="bf16")
        waits.append(sorted(gpu.waits))
    assert [f.device for f in features] == [gpu.device] * 2 and labels.device == gpu.device
    assert waits[0] == waits[1]


STEP_ON_GPU = """
import sys, torch, mokd
if not torch.cuda.is_available():
    raise SystemExit("no GPU")
cfg = mokd.parse_args(sys.argv[1:])
device = torch.device("cuda", 0)
models = mokd.build_models(cfg, device)
crops = [torch.randint(256, (cfg.batch_size, n, size, size, 3), dtype=torch.uint8).pin_memory()
         for n, size in ((2, cfg.global_size), (cfg.local_crops, cfg.local_size))]
for step in range(3):
    torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")   # a wait for the GPU raises
    x = mokd.make_views(crops, cfg, device, step)
    mokd.train_step(*models, x, cfg, mokd.schedule(cfg, step, 10))
"""


def test_no_step_waits_for_the_gpu():
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {"PYTHONPATH": HERE} | ({} if GPUS is None else {"CUDA_VISIBLE_DEVICES": GPUS})
    done = subprocess.run([sys.executable, "-c", STEP_ON_GPU, *SMALL, *PAIR, "--dtype", "bf16"],
                          capture_output=True, text=True, env=env)
    if done.stderr.strip().endswith("no GPU"):   # its own last words
        pytest.skip("needs a GPU")
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------- eval_knn.py and eval_linear.py

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pair of two epochs' training on toy; the ViT reads its CLS token."""
    out = tmp_path_factory.mktemp("trained")
    assert mokd.main([*SMALL, *PAIR, "--out", str(out), "--batch_size", "256", "--vit_pool", "cls",
                      "--save_every", "99"]) == 0
    return out


@pytest.fixture
def few(monkeypatch):
    """toy, but with few images: 8 classes of 32."""
    data = torch.utils.data.TensorDataset
    parts = [data(*mokd.draw_toy(n, part)) for n, part in ((256, "train"), (64, "val"))]
    monkeypatch.setattr(mokd, "get_data", lambda cfg: parts)
    return parts


def knn(*args):
    return eval_knn.run(eval_knn.parse([*map(str, args), "--workers", "0"]))


def dinos_knn(train_features, train_labels, test_features, k, T, num_classes):
    """DINO's knn_classifier, one image at a time -> all classes of each image, most votes first."""
    ranked = []
    for f in test_features:
        similarity = train_features @ f
        distances, indices = similarity.topk(k, largest=True, sorted=True)
        one_hot = torch.zeros(k, num_classes)
        one_hot.scatter_(1, train_labels[indices].view(-1, 1), 1)
        probs = torch.sum(one_hot * distances.clone().div_(T).exp_().view(-1, 1), 0)
        ranked.append(probs.sort(descending=True, stable=True).indices)
    return torch.stack(ranked)


def test_eval_knn_equals_dinos_over_its_saved_features(trained, tmp_path, capsys):
    file = tmp_path / "features.pt"
    results = knn("--checkpoint", trained / "checkpoint.pth", "--k", 3, 10, "--save", file)
    saved, printed = torch.load(file, weights_only=True), capsys.readouterr().out
    x, y = mokd.draw_toy(1024, "val")
    assert torch.equal(saved["val"]["labels"], y) and saved["train"]["labels"].shape == (4096,)
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    predictions = {}
    for i, (name, features) in enumerate(saved["val"]["features"].items()):
        backbone = models_of(config("--vit_pool", "cls"))[i].momentum_net.backbone
        weights = state[f"model{i + 1}"]["momentum_net"]
        backbone.load_state_dict({k[9:]: v for k, v in weights.items() if k.startswith("backbone.")})
        view = TF.center_crop(TF.resize(x[:4], [37], TF.InterpolationMode.BICUBIC, antialias=True), [32, 32])
        expected = F.normalize(backbone.eval()(mokd.normalize(view.float() / 255))[0], dim=1)
        assert torch.allclose(features[:4].float(), expected, atol=1e-3)
        bank = F.normalize(saved["train"]["features"][name].float(), dim=1)
        queries = F.normalize(saved["val"]["features"][name].float(), dim=1)
        for k in (3, 10):
            ranked = dinos_knn(bank, saved["train"]["labels"], queries, k, 0.07, 8)
            predictions[name, k] = ranked[:, 0]
            for n, top in ((1, "top1"), (min(5, k), "top5")):   # DINO counts the first min(5, k) classes
                expected = 100 * (ranked[:, :n] == y[:, None]).any(1).double().mean().item()
                # After two epochs the ViT's similarities are nearly equal: a few images of 1,024 have
                # neighbors or votes that only rounding puts in order, and CPUs round differently.
                assert results[name][k][top] == pytest.approx(expected, abs=0.5)
                assert f"{results[name][k][top]:.2f}" in printed
    assert printed.count("*") == 3   # the legend, and the best k of each model
    table = json.load(open(trained / "knn.json"))
    assert table["results"] == {name: {str(k): top for k, top in ks.items()} for name, ks in results.items()}
    assert (table["bank"], table["classified"], table["settings"]["k"]) == (4096, 1024, [3, 10])
    for k in (3, 10):
        same = 100 * (predictions["1 resnet18", k] == predictions["2 vit_tiny", k]).double().mean().item()
        assert table["same_class"]["1 resnet18 = 2 vit_tiny"][str(k)] == pytest.approx(same, abs=0.5)


def test_top5_counts_classes_without_a_vote_as_dino_does(monkeypatch):
    """Ten classes and few neighbors, so that most classes have no vote: without them 86.1 % would be 85.8."""
    g = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(300, 6, generator=g), dim=1)
    labels = torch.randint(10, (300,), generator=g)
    for k in (2, 5, 10):
        ranked = dinos_knn(features[:200], labels[:200], features[200:], k, 0.07, 10)
        similarity, neighbors = eval_knn.nearest(features[:200], labels[:200], features[200:], k)
        predictions, places = eval_knn.classify(similarity, neighbors, 10, labels[200:], 0.07)
        assert torch.equal(predictions, ranked[:, 0])
        assert torch.equal(places, (ranked == labels[200:, None]).int().argmax(1))


def test_no_temperature_makes_a_vote_overflow():
    """At 0.001, exp(cosine / temperature) is more than a float32, or a float64, can hold."""
    similarity = torch.tensor([[0.99, 0.985, 0.985], [-0.5, -0.501, -0.501]])
    neighbors = torch.tensor([[3, 1, 1], [0, 2, 2]])
    for dtype in (torch.float32, torch.float64):
        for temperature in (0.001, 0.01, 0.07):
            predictions, places = eval_knn.classify(similarity.to(dtype), neighbors, 4, torch.tensor([1, 2]),
                                                    temperature)
            weight = torch.tensor([0.005, 0.001], dtype=torch.float64) / temperature
            first = 2 * torch.exp(-weight) < 1   # the nearest outvotes the two behind it
            assert torch.equal(predictions, torch.where(first, torch.tensor([3, 0]), torch.tensor([1, 2])))
            assert places.tolist() == first.int().tolist()


def test_the_bank_is_normalized_again_after_half_precision():
    """Rows of half precision are up to 2e-4 too long or too short: enough to change the neighbors' order."""
    g = torch.Generator().manual_seed(0)
    bank, queries = (F.normalize(torch.randn(n, 384, generator=g), dim=1).half() for n in (2000, 50))
    assert (bank.float().norm(dim=1) - 1).abs().max() > 1e-5
    exact = (F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T).topk(20)
    similarity, rows = eval_knn.nearest(bank, torch.arange(2000), queries, 20)
    assert (similarity - exact.values).abs().max() < 1e-6 and torch.equal(rows, exact.indices)


def test_ties_do_not_change_the_neighbors_and_unreadable_images_are_none():
    """Many neighbors at one distance, with other labels: the lower label comes first, in any order."""
    g = torch.Generator().manual_seed(0)
    bank = torch.eye(4)[torch.randint(4, (60,), generator=g)]
    labels = torch.randint(5, (60,), generator=g)
    labels[7], labels[9] = mokd.NO_IMAGE, -1   # unreadable; without a label
    queries = torch.eye(4)
    expected = []
    for q in queries:
        ranked = sorted((-float(q @ b), int(y)) for b, y in zip(bank, labels) if y >= 0)[:20]
        expected.append([(-s, y) for s, y in ranked])
    for _ in range(3):
        similarity, neighbors = eval_knn.nearest(bank, labels, queries, 20)
        assert [list(zip(s, y)) for s, y in zip(similarity.tolist(), neighbors.tolist())] == expected
        order = torch.randperm(60, generator=g)
        bank, labels = bank[order], labels[order]
    random = F.normalize(torch.randn(40, 9, generator=g), dim=1)
    similarity, _ = eval_knn.nearest(random, torch.arange(40), -torch.ones(1, 9) / 3, 40)
    assert similarity.min() < 0 and similarity[0].tolist() == sorted(similarity[0].tolist(), reverse=True)


def test_the_search_of_a_large_bank_takes_seconds():
    g = torch.Generator().manual_seed(0)
    bank, queries = (F.normalize(torch.randn(n, 512, generator=g), dim=1).half() for n in (100_000, 2_000))
    start = time.time()
    similarity, labels = eval_knn.nearest(bank, torch.arange(100_000) % 1000, queries, 200)
    assert time.time() - start < 60   # 10 s on two idle cores; a test may run beside others
    exact = (F.normalize(queries[:50].float(), dim=1) @ F.normalize(bank.float(), dim=1).T).topk(200)
    assert torch.allclose(similarity[:50], exact.values, atol=1e-6)
    assert (labels[:50] == exact.indices % 1000).float().mean() > 0.999


def evaluate_in_a_process(script, *args, nproc=0, **popen):
    launch = torchrun(nproc) if nproc else []
    command = [sys.executable, *launch, f"{script}.py", *map(str, args)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"},
                          timeout=600)


def test_eval_knn_of_two_processes_equals_that_of_one(trained, tmp_path):
    tables = []
    for n, nproc in (("1", 0), ("2", 2)):
        done = evaluate_in_a_process("eval_knn", "--checkpoint", trained / "checkpoint.pth", "--workers", 0,
                                     "--save",
                                     tmp_path / n, "--json", tmp_path / f"{n}.json", nproc=nproc)
        assert done.returncode == 0, done.stderr
        tables.append(json.load(open(tmp_path / f"{n}.json")))
    for key in ("results", "same_class", "bank", "classified"):
        assert tables[0][key] == tables[1][key]
    one, two = (torch.load(tmp_path / n, weights_only=True) for n in "12")
    assert torch.equal(one["val"]["labels"], two["val"]["labels"])
    for name, f in one["train"]["features"].items():
        assert torch.allclose(f.float(), two["train"]["features"][name].float(), atol=1e-3)


def test_models_of_several_runs_stand_in_one_table(trained, few, tmp_path, capsys):
    """Table 9's last column compares a model of one run with a model of another."""
    other = tmp_path / "other"
    other.mkdir()
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    for model in ("model1", "model2"):
        state[model]["momentum_net"] = state[model]["net"]   # momentum nets that differ: the students
    torch.save(state, other / "checkpoint.pth")
    files = [trained / "checkpoint.pth", other / "checkpoint.pth"]
    together = knn("--checkpoint", *files, "--k", 10, "--json", tmp_path / "table.json")
    alone = [knn("--checkpoint", file, "--k", 10) for file in files]
    names = [f"{run}: {model}" for run in (trained.name, "other") for model in ("1 resnet18", "2 vit_tiny")]
    assert [*together] == names
    assert [*together.values()] == [*alone[0].values(), *alone[1].values()]
    same = json.load(open(tmp_path / "table.json"))["same_class"]
    assert [*same] == [f"{a} = {b}" for a, b in itertools.combinations(names, 2)]
    pair = json.load(open(trained / "knn.json"))["same_class"]["1 resnet18 = 2 vit_tiny"]
    assert same[f"{names[0]} = {names[1]}"] == pair and f"{names[1]} = {names[2]}" in capsys.readouterr().out
    assert evaluation_fails("knn", ["--checkpoint", files[0], files[0]],
                            capsys).endswith("a file is given twice")

    # two folders of one name: the paths tell them apart
    (tmp_path / "x" / "other").mkdir(parents=True)
    state["config"]["global_size"] = 40
    torch.save(state, tmp_path / "x" / "other" / "checkpoint.pth")
    alike = [other / "checkpoint.pth", tmp_path / "x" / "other" / "checkpoint.pth"]
    assert "give --data and --image_size" in evaluation_fails("knn", ["--checkpoint", *alike], capsys)
    names = knn("--checkpoint", *alike, "--k", 10, "--model", 1, "--data", "toy", "--image_size", 32,
                "--json", tmp_path / "t")
    assert [*names] == [f"{file}: 1 resnet18" for file in alike]


def test_a_k_beyond_the_bank_is_shown_as_what_it_is(trained, few, capsys):
    results = knn("--checkpoint", trained / "checkpoint.pth", "--k", 5000, 10, 300)
    assert [*results["1 resnet18"]] == [10, 256]
    printed = capsys.readouterr().out
    assert "256 images in the bank" in printed and "of 32 pixels" in printed
    assert " 256 " in printed and "5000" not in printed


def test_save_leaves_a_file_as_it_is_until_there_is_a_new_one(trained, tmp_path, capsys):
    file = tmp_path / "features.pt"
    file.write_bytes(b"precious")
    args = ["--checkpoint", trained / "checkpoint.pth", "--data", "nowhere"]
    assert "nowhere" in evaluation_fails("knn", [*args, "--save", file], capsys)
    assert file.read_bytes() == b"precious" and os.listdir(tmp_path) == ["features.pt"]
    assert "it is a folder" in evaluation_fails("knn", [*args, "--save", tmp_path], capsys)


def test_features_that_are_not_finite_stop_both_evaluations(trained, tmp_path, capsys):
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    for name, weight in state["model1"]["momentum_net"].items():
        if name.startswith("backbone.") and weight.is_floating_point():
            weight.fill_(math.nan)
    torch.save(state, tmp_path / "checkpoint.pth")
    for script, (parse, run) in EVALUATIONS.items():
        args = ["--checkpoint", str(tmp_path / "checkpoint.pth"), "--workers", "0"]
        assert mokd.main(args, f"eval_{script}.py", parse, run) == 1
        err = capsys.readouterr().err
        assert "not finite" in err and "Traceback" not in err
    assert not (tmp_path / "knn.json").exists()


def test_ctrl_c_ends_eval_knn_at_once_with_a_sentence(trained, tmp_path):
    """Also while loaders work."""
    command = [sys.executable, "eval_knn.py", "--checkpoint", str(trained / "checkpoint.pth"), "--workers",
               "2", "--resize", "900",
               "--image_size", "800"]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    time.sleep(20)   # it takes minutes, and starts in less
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)   # as a terminal does, to all processes of the job
    _, err = process.communicate(timeout=30)
    assert process.returncode not in (0, None) and "eval_knn.py: " in err and "Traceback" not in err


def test_eval_knn_takes_weights_students_and_one_model(trained, few, tmp_path, monkeypatch, capsys):
    kwargs = ["--model_kwargs", *CNN]
    own = ["--arch", "resnet18", *kwargs, "--data", "toy", "--image_size", 32, "--k", 10]
    both = knn("--checkpoint", trained / "checkpoint.pth", "--k", 10)
    alone = knn(*own, "--weights", trained / "model1.pth")
    assert [*alone] == ["resnet18"] and alone["resnet18"] == both["1 resnet18"]
    assert [*knn("--checkpoint", trained / "checkpoint.pth", "--k", 10, "--model", 2)] == ["2 vit_tiny"]
    student = knn("--checkpoint", trained / "checkpoint.pth", "--k", 10, "--net", "student")
    untrained, other = knn(*own), knn(*own, "--seed", 1)
    assert len({str(r) for r in (student["1 resnet18"], untrained["resnet18"], other["resnet18"],
                                 alone["resnet18"])}) == 4
    soft = knn("--checkpoint", trained / "checkpoint.pth", "--k", 10, "--temperature", 1000, "--resize", 60,
               "--batch_size", 100)
    assert soft != both

    # no network here: weights whose mean and deviation are 0.5, as some of timm's
    def create(name, pretrained=False, **kw):
        model = timm_create(name, **kw)
        if pretrained:
            model.load_state_dict(torch.load(trained / "model1.pth", weights_only=True))
            model.pretrained_cfg = model.pretrained_cfg | dict(mean=(0.5,) * 3, std=(0.5,) * 3)
        return model
    timm_create = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(eval_knn.urllib.request, "urlopen", lambda *args, **kwargs: open(os.devnull))
    cfg = eval_knn.parse(["--arch", "resnet18", *kwargs, "--pretrained", "--data", "toy", "--image_size",
                          "32"])
    backbone = eval_knn.load_backbones(cfg)["resnet18"]
    plain = timm_create("resnet18", num_classes=0, **backbone.timm_kwargs)
    plain.load_state_dict(torch.load(trained / "model1.pth", weights_only=True))
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(backbone(mokd.normalize(x))[0], plain.eval()((x - 0.5) / 0.5), atol=1e-5)
    capsys.readouterr()   # eval_linear prints lines that normalize so, too
    linear(tmp_path, *own[:-2], "--pretrained", "--epochs", 1, "--warmup_epochs", 0, "--lr", 0.1)
    (_, lines), = classifiers_of(capsys.readouterr().out).items()
    assert "normalize(images, *((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))" in lines["lines"]


def test_pretrained_without_a_network_fails_within_seconds(tmp_path):
    """It took 50 s and twelve lines of retries. The address is one where nobody listens."""
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "eval_knn.py", "--arch", "resnet18", "--pretrained", "--data", "toy",
               "--image_size", "32"]
    start = time.time()
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=env)
    assert time.time() - start < 30   # most of it imports
    assert done.returncode == 2 and "--pretrained: timm's weights of resnet18 could not be had" in done.stderr
    assert "Retrying" not in done.stderr and "Traceback" not in done.stderr


EVALUATIONS = {"knn": (eval_knn.parse, eval_knn.run), "linear": (eval_linear.parse, eval_linear.run)}


def evaluation_fails(script, args, capsys, code=2):
    """-> the sentence with which a script ends, without a traceback."""
    parse, run = EVALUATIONS[script]
    assert mokd.main([*map(str, args)], f"eval_{script}.py", parse, run) == code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"eval_{script}.py: ")
    return message


@pytest.mark.parametrize("args, words", [
    ([], "--checkpoint FILE or --arch"),
    (["--checkpoint", "HERE", "--arch", "resnet18"], "either --checkpoint"),
    (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
    (["--checkpoint", "HERE", "--weights", "x"], "--weights"),
    (["--arch", "resnet18"], "--data"), (["--arch", "resnet99", "--data", "toy"], "resnet99"),
    (["--arch", "resnet34", "--weights", "MODEL", "--data", "toy", "--image_size", "32"],
     "does not fit resnet34"),
    (["--arch", "resnet18", "--weights", "MODEL", "--pretrained", "--data", "toy"], "either --weights"),
    (["--checkpoint", "HERE", "--data", "nowhere"], "nowhere"),
    (["--checkpoint", "HERE", "--resize", "8"], "--resize 8"),
    (["--checkpoint", "HERE", "--k", "0"], "--k 0"),
    (["--checkpoint", "HERE", "--save", "/nowhere/f.pt"], "/nowhere/f.pt"),
    (["--arch", "vit_tiny", "--model_kwargs", "dynamic_img_size=False", "--data", "toy", "--image_size",
      "32"],
     "choose another --image_size"),
    (["--checkpoint", "HERE", "--image_size", "1"], "model 2, vit_tiny: cannot take views of 1 pixels")])
def test_what_eval_knn_cannot_do_is_said(trained, args, words, capsys):
    args = [{"HERE": trained / "checkpoint.pth", "MODEL": trained / "model1.pth"}.get(a, a) for a in args]
    assert words in evaluation_fails("knn", args, capsys)


@pytest.mark.parametrize("script", ["knn", "linear"])
def test_data_whose_parts_do_not_fit_is_refused(script, trained, tmp_path, capsys, monkeypatch):
    args = ["--checkpoint", trained / "checkpoint.pth", "--workers", 0, "--data", tmp_path]
    for part, classes in (("train", "ab"), ("val", "ac")):
        for c in classes:
            (tmp_path / part / c).mkdir(parents=True)
            Image.fromarray(picture(3)).save(tmp_path / part / c / "x.png")
    assert "same class folders" in evaluation_fails(script, args, capsys)
    (tmp_path / "val").rename(tmp_path / "v")
    assert "no validation images" in evaluation_fails(script, args, capsys)
    x, y = mokd.draw_toy(64, 0)
    data = torch.utils.data.TensorDataset
    monkeypatch.setattr(mokd, "get_data", lambda cfg: (data(x, y), data(x, y + 1)))
    assert "label 8" in evaluation_fails(script, args, capsys)
    monkeypatch.setattr(mokd, "get_data", lambda cfg: (data(x, y), data(x, -torch.ones_like(y))))
    assert "no validation image has a label" in evaluation_fails(script, args, capsys)
    monkeypatch.setattr(mokd, "get_data", lambda cfg: (data(x, -torch.ones_like(y)), data(x, y)))
    assert "no training image has a label" in evaluation_fails(script, args, capsys)


@pytest.mark.parametrize("script", ["knn", "linear"])
@pytest.mark.parametrize("part, unreadable", [("train", 2), ("val", 2), ("val", 10), ("val", "empty")])
def test_more_than_one_percent_of_unreadable_images_stops_every_evaluation(script, part, unreadable, trained,
                                                                           tmp_path, capsys):
    for p in ("train", "val"):
        (tmp_path / p / "a").mkdir(parents=True)
        for i in range(10):
            Image.fromarray(picture(i)).save(tmp_path / p / "a" / f"{i}.png")
    for i in range(10):
        if unreadable == "empty":
            (tmp_path / part / "a" / f"{i}.png").unlink()
        elif i < unreadable:
            (tmp_path / part / "a" / f"{i}.png").write_bytes(b"no image")
    parse, run = EVALUATIONS[script]
    args = ["--checkpoint", trained / "checkpoint.pth", "--data", tmp_path, "--workers", 0]
    args += ["--out", tmp_path / "o", "--epochs", 1] if script == "linear" else []
    code = mokd.main([*map(str, args)], f"eval_{script}.py", parse, run)
    assert code == (2 if unreadable == "empty" else 1)
    done = capsys.readouterr()
    assert "nan" not in done.out and f"eval_{script}.py: " in done.err and "Traceback" not in done.err
    assert unreadable == "empty" or ("1 %" in done.err and f"{os.sep}{part}{os.sep}a" in done.err)


# ----------------------------------------------------------------------------- linear probing and fine-tuning

def linear(out, *args):
    return eval_linear.run(eval_linear.parse([*map(str, args), "--workers", "0", "--out", str(out)]))


def test_rates_at_once_equal_each_rate_alone_and_a_naive_loop(trained, few, tmp_path):
    source = ["--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--epochs", 2,
              "--warmup_epochs", 1]
    rates = [0.01, 0.1, 1.0, 4.0]
    together = linear(tmp_path / "all", *source, "--lr", *rates)
    weights = torch.load(tmp_path / "all" / "checkpoint.pth", weights_only=True)["net"]
    for place, rate in enumerate(rates):
        alone = linear(tmp_path / str(rate), *source, "--lr", rate)
        single = torch.load(tmp_path / str(rate) / "checkpoint.pth", weights_only=True)["net"]
        for part in "01":
            for k in ("weight", "bias"):
                assert close(weights[f"{part}.layers.{place}.{k}"], single[f"{part}.layers.0.{k}"], 1e-5)
        for name in together:
            assert together[name][f"{rate:g}"] == alone[name][f"{rate:g}"]

    # the same by hand, for model 1 at the largest rate
    cfg = eval_linear.parse([*map(str, source)])
    backbone = eval_knn.load_backbones(cfg)["1 resnet18"].eval()
    W = torch.empty(8, backbone.dim).normal_(std=0.01,
                                             generator=mokd.generator(0, "classifier")).requires_grad_()
    b, step, V, v = torch.zeros(8, requires_grad=True), 0, torch.zeros(8, backbone.dim), torch.zeros(8)
    for epoch in range(2):
        for keys in mokd.batches(256, argparse.Namespace(batch_size=64, epochs=2, seed=0)):
            if keys[0][0] != epoch:
                continue
            x, y, _, _ = zip(*(eval_linear.TrainView(few[0], cfg)[key] for key in keys))
            with torch.no_grad():
                f = backbone(mokd.normalize(torch.stack(x).float() / 255))[0]
            loss = F.cross_entropy(f @ W.T + b, torch.tensor(y))
            gW, gb = torch.autograd.grad(loss, (W, b))
            lr = 4.0 * step / 4 if step < 4 else 4.0 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 4))
            V, v = 0.9 * V + gW, 0.9 * v + gb
            W, b = (W - lr * V).detach().requires_grad_(), (b - lr * v).detach().requires_grad_()
            step += 1
    assert step == 8
    assert close(weights["0.layers.3.weight"], W, 1e-4) and close(weights["0.layers.3.bias"], b, 1e-4)
    saved = json.load(open(tmp_path / "all" / "results.json"))
    assert saved["results"] == together and saved["settings"]["lr"] == rates


def test_default_rates_are_the_papers_at_its_batch_size(trained, tmp_path, monkeypatch):
    """0.08 and 0.008 are what is reached after warm-up (A.2), not what is scaled by batch / 256."""
    data = torch.utils.data.TensorDataset
    parts = [data(*mokd.draw_toy(n, part)) for n, part in ((2048, "train"), (64, "val"))]
    monkeypatch.setattr(mokd, "get_data", lambda cfg: parts)
    source = ["--checkpoint", trained / "checkpoint.pth", "--log_every", 1]
    linear(tmp_path / "o", *source, "--batch_size", 2048, "--epochs", 4, "--warmup_epochs", 2)
    records = [json.loads(line) for line in open(tmp_path / "o" / "log.jsonl")]
    rates = [(r["lr 1 resnet18"]["0.08"], r["lr 2 vit_tiny"]["0.008"]) for r in records if "step" in r]
    assert max(rates) == (0.08, 0.008) == rates[2] and rates[0] == (0, 0) and len(rates) == 4
    optimizer = torch.load(tmp_path / "o" / "checkpoint.pth", weights_only=True)["optimizer"]
    assert sorted({g["peak"] for g in optimizer["param_groups"]}) == [0.008, 0.08]
    linear(tmp_path / "f", *source, "--batch_size", 512, "--epochs", 1, "--finetune", "--label_fraction",
           0.25,
           "--warmup_epochs", 0)
    record = json.loads(open(tmp_path / "f" / "log.jsonl").readline())
    assert record["lr 1 resnet18"] == record["lr 2 vit_tiny"] == {"0.01": 0.01}


def test_training_crops_are_random_resized_and_half_of_them_mirrored(few):
    cfg = eval_linear.parse(["--arch", "resnet18", "--data", "toy", "--image_size", "24", "--scale", "0.3",
                             "0.6"])
    views, flipped = eval_linear.TrainView(few[0], cfg), 0
    for index in range(60):
        x, y, bad, reason = views[2, index]
        torch.manual_seed(mokd.seed_of(0, 2, index))
        crop = mokd.MultiCrop.crop(few[0][index][0], 24, (0.3, 0.6))
        assert (y, bad, reason) == (index % 8, -1, "")
        assert torch.equal(x, crop) or torch.equal(x, crop.flip(-1))
        flipped += torch.equal(x, crop.flip(-1))
    assert 15 < flipped < 45 and not torch.equal(views[3, 0][0], views[2, 0][0])


def classifiers_of(printed):
    """The lines that a run prints, executed -> {model: their variables}."""
    found = {}
    pattern = r"^(.+) with the classifier of its best rate:\n(.+\n.+\n.+\n.+)$"
    for name, lines in re.findall(pattern, printed, re.M):
        found[name] = dict(torch=torch, timm=timm, torchvision=torchvision, lines=lines)
    return found


def accuracy_of(variables, images, labels):
    """Run the lines -> top-1 in percent."""
    variables["images"] = images
    with torch.no_grad():
        exec(variables["lines"], variables)   # our own lines, which say how to load the classifier
    return 100 * (variables["logits"].argmax(1) == labels).float().mean().item()


def val_images(few, size):
    x = TF.center_crop(TF.resize(few[1].tensors[0], [size], TF.InterpolationMode.BICUBIC, antialias=True),
                       [32, 32])
    return x.float() / 255


@pytest.mark.parametrize("mode", [[], ["--finetune"]])
def test_probing_leaves_the_backbone_alone_and_fine_tuning_does_not(mode, trained, few, tmp_path, capsys):
    results = linear(tmp_path, "--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--epochs", 1,
                     "--lr", 0.1, *mode)
    found = classifiers_of(capsys.readouterr().out)
    assert [*found] == ["1 resnet18", "2 vit_tiny"]
    assert json.load(open(tmp_path / "results.json"))["results"] == results
    for i, (name, variables) in enumerate(found.items(), 1):
        before = torch.load(trained / f"model{i}.pth", weights_only=True)
        after = torch.load(tmp_path / f"classifier{i}.pth", weights_only=True)["model"]
        assert all(torch.equal(before[k], after[k]) for k in before) != bool(mode)
        # fine-tuned with all labels, images are resized; else cropped from larger ones
        top1 = accuracy_of(variables, val_images(few, 32 if mode else 37), few[1].tensors[1])
        assert top1 == pytest.approx(results[name]["0.1"]["top1"], abs=1e-3)


@pytest.mark.parametrize("arch, more", [
    (["mobilenetv3_large"], []), (["convnext_atto"], []),
    (["swin_tiny_patch4_window7_224", "--model_kwargs", "img_size=32",
     "window_size=1", "embed_dim=24", "depths=1,1,1,1"], []),
    (["vit_tiny", "--model_kwargs", *VIT], ["--n_last_blocks", 2, "--avgpool"]),
    (["vit_tiny", "--model_kwargs", *VIT], ["--vit_pool", "cls", "--avgpool"])])
def test_backbone_and_classifier_load_where_timm_has_no_place_for_it(arch, more, few, tmp_path, capsys):
    results = linear(tmp_path, "--arch", *arch, *more, "--data", "toy", "--image_size", 32, "--resize", 37,
                     "--batch_size", 64,
                     "--epochs", 1, "--warmup_epochs", 0, "--lr", 0.05, "--finetune")
    (name, variables), = classifiers_of(capsys.readouterr().out).items()
    top1 = accuracy_of(variables, val_images(few, 37), few[1].tensors[1])
    assert top1 == pytest.approx(results[name]["0.05"]["top1"], abs=1e-3)
    weights = torch.load(tmp_path / "classifier.pth", weights_only=True)
    last = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["net"]
    assert {*weights} == {"model", "classifier"}
    assert all(torch.equal(w, last[f"0.backbone.model.{k}"]) for k, w in weights["model"].items())
    assert all(torch.equal(w, last[f"0.layers.0.{k}"]) for k, w in weights["classifier"].items())


def test_the_best_of_several_rates_is_kept_and_not_the_last(trained, few, tmp_path, capsys, monkeypatch):
    """Also by a run that is stopped after the best rate."""
    args = ["--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--epochs", 1, "--finetune",
            "--lr", 0.1, 1e-6, "--model", 1]
    found = {0: dict(top1=50.0, top5=90.0), 1: dict(top1=10.0, top5=50.0)}   # the first rate is the best
    calls = itertools.count()

    def evaluate(net, *args):
        return {net[0].name: {rate: found[next(calls)] for rate in net[0].rates}}
    monkeypatch.setattr(eval_linear, "evaluate", evaluate)
    whole = linear(tmp_path / "o", *args)
    assert whole["1 resnet18"]["0.1"]["top1"] == 50 and whole["1 resnet18"]["1e-06"]["top1"] == 10
    capsys.readouterr()
    kept = torch.load(tmp_path / "o" / "classifier1.pth", weights_only=True)["model"]
    last = torch.load(tmp_path / "o" / "checkpoint.pth", weights_only=True)["net"]
    before = torch.load(trained / "model1.pth", weights_only=True)

    def moved(weights):
        names = [k for k, w in before.items() if w.is_floating_point() and "running" not in k]
        return sum((weights[k] - before[k]).norm() for k in names)
    last = {k.removeprefix("0.backbone.model."): v for k, v in last.items()}
    assert moved(kept) > 100 * moved(last)
    assert linear(tmp_path / "o", *args) == whole   # at the end already
    assert "classifier1.pth" in capsys.readouterr().out


def test_linear_features_of_last_blocks_are_dinos(trained):
    cfg = eval_linear.parse(["--checkpoint", str(trained / "checkpoint.pth"), "--n_last_blocks", "2",
                             "--avgpool"])
    backbones = eval_knn.load_backbones(cfg)
    vit = eval_linear.Classifier("2 vit_tiny", backbones["2 vit_tiny"], cfg, 8, (0.1,))
    x, seen, model = torch.randn(2, 3, 32, 32), [], vit.backbone.model

    def hook(module, args, out):
        seen.append(model.norm(out))
    hooks = [block.register_forward_hook(hook) for block in model.blocks]
    with torch.no_grad():
        model.forward_features(x)
        for h in hooks:
            h.remove()
        assert torch.allclose(vit.features(x),
                              torch.cat([seen[-2][:, 0], seen[-1][:, 0], seen[-1][:, 1:].mean(1)], 1),
                              atol=1e-5)
    cnn = eval_linear.Classifier("1 resnet18", backbones["1 resnet18"], cfg, 8, (0.1,))
    assert cnn.layers[0].in_features == 16 and vit.layers[0].in_features == 3 * 24   # a CNN's stays


def test_defaults_follow_from_what_is_trained(capsys):
    def filled(labeled, total, *args, world=8):
        cfg = eval_linear.parse(["--checkpoint", "runs/x/checkpoint.pth", *args])
        eval_linear.fill_in(cfg, labeled, total, world)
        return cfg.epochs, cfg.warmup_epochs, cfg.batch_size, cfg.out
    n = 1_281_167
    assert filled(n, n) == (100, 10, 2048, "runs/x/linear")
    few_labels = filled(n // 100, n, "--finetune", "--label_fraction", "0.01")
    assert few_labels == (60, 5, 1024, "runs/x/finetune-0.01")
    assert filled(n // 10, n, "--finetune", "--label_fraction", "0.1") == (30, 5, 1024, "runs/x/finetune-0.1")
    assert filled(50_000, 50_000, "--finetune") == (100, 10, 1024, "runs/x/finetune")
    subset = filled(n // 100, n, "--finetune", "--subset", "a/1percent.txt")
    assert subset == (60, 5, 1024, "runs/x/finetune-1percent")
    assert filled(n, n, "--batch_size", "512", "--warmup_epochs", "0") == (100, 0, 512, "runs/x/linear")
    assert "ten steps" not in capsys.readouterr().out
    # few labels: an epoch has at least ten steps, which is said
    assert filled(600, 60_000, "--finetune", "--epochs", "7", "--out", "o") == (7, 1, 56, "o")
    assert "--batch_size 56: so an epoch of 600 images has at least ten steps" in capsys.readouterr().out
    assert filled(408, 4096, "--finetune", world=1)[2] == 40
    assert filled(12, 100, "--finetune", world=1)[2] == 2
    assert filled(12, 100, world=8)[2] == 8 and filled(1, 100, world=1)[2] == 1


def test_each_data_set_and_each_subset_has_a_folder_of_its_own():
    outs = [eval_linear.parse(["--checkpoint", "r/checkpoint.pth", *args]).out for args in (
        [], ["--finetune", "--data", "cifar10"], ["--finetune", "--data", "cifar100"],
        ["--finetune", "--data", "a/photos/"],
        ["--finetune", "--subset", "1percent.txt"], ["--finetune", "--subset", "10percent.txt"])]
    assert outs == ["r/linear", "r/finetune-cifar10", "r/finetune-cifar100", "r/finetune-photos",
                    "r/finetune-1percent",
                    "r/finetune-10percent"]
    of_arch = eval_linear.parse(["--arch", "resnet50", "--data", "cifar10"])
    assert of_arch.out == "runs/resnet50/linear-cifar10"


def test_labels_kept_are_class_balanced_and_drawn_by_seed(few):
    kept = {}
    for seed in (0, 0, 1):
        cfg = eval_linear.parse(["--arch", "resnet18", "--data", "toy", "--label_fraction", "0.25", "--seed",
                                 str(seed)])
        part = eval_linear.with_label(eval_knn.labeled_data(cfg)[0], cfg)
        assert sorted(y for _, y in (part[i] for i in range(len(part)))) == sorted(8 * [*range(8)])
        kept.setdefault(seed, []).append(part.indices)
    assert kept[0][0] == kept[0][1] != kept[1][0]


def test_a_subset_file_names_the_images_that_keep_their_label(trained, tmp_path, capsys):
    data = tmp_path / "data"
    for part in ("train", "val"):
        for c in "ab":
            (data / part / c).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(picture(i)).save(data / part / c / f"{part}_{c}{i}.png")
    (tmp_path / "list.txt").write_text("train_a3.png\ntrain_b5.png\n\ntrain_b0.png\n")
    args = ["--checkpoint", str(trained / "checkpoint.pth"), "--data", str(data), "--workers", "0", "--out",
            str(tmp_path / "o")]
    cfg = eval_linear.parse([*args, "--subset", str(tmp_path / "list.txt")])
    part = eval_linear.with_label(eval_knn.labeled_data(cfg)[0], cfg)
    names = [os.path.basename(mokd.name_of(part, i)) for i in range(3)]
    assert names == ["train_a3.png", "train_b0.png", "train_b5.png"]
    results = linear(tmp_path / "o", *args[:-4], "--subset", tmp_path / "list.txt", "--finetune", "--epochs",
                     2, "--lr", 0.1)
    assert results["1 resnet18"]["0.1"]["top5"] == 100   # of two classes
    for text, word in (("nobody.png\n", "nobody.png is the name of 0"), ("", "empty")):
        (tmp_path / "list.txt").write_text(text)
        assert word in evaluation_fails("linear", [*args, "--subset", tmp_path / "list.txt"], capsys)

    # a name that stands in both classes is none, until the class stands before it
    for c in "ab":
        (data / "train" / c / f"train_{c}0.png").rename(data / "train" / c / "0.png")
    (tmp_path / "list.txt").write_text("0.png\n")
    message = evaluation_fails("linear", [*args, "--subset", tmp_path / "list.txt"], capsys)
    assert "0.png is the name of 2 training images" in message
    (tmp_path / "list.txt").write_text("b/0.png\ntrain/a/train_a1.png\n")
    part = eval_linear.with_label(eval_knn.labeled_data(cfg)[0], cfg)
    assert [mokd.name_of(part, i)[-7:] for i in range(2)] == ["_a1.png", "b/0.png"]


@pytest.mark.parametrize("mode", [["--lr", 0.1, 1.0], ["--finetune", "--lr", 0.05, 0.2]])
def test_linear_resumes_bit_for_bit_after_sigterm(mode, trained, few, tmp_path, capsys, monkeypatch):
    args = ["--checkpoint", trained / "checkpoint.pth", "--batch_size", 32, "--epochs", 2, *mode]
    whole = linear(tmp_path / "whole", *args)
    calls, cross_entropy = itertools.count(), F.cross_entropy
    # in the second rate's first epoch; to probe, a step has two rates of two models
    at = (16 + 5) * 2 if "--finetune" in mode else 13 * 4

    def signalled(*a, **options):
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return cross_entropy(*a, **options)
    monkeypatch.setattr(eval_linear.F, "cross_entropy", signalled)
    code = mokd.main([*map(str, args), "--workers", "0", "--out", str(tmp_path / "cut")], "eval_linear.py",
                     eval_linear.parse,
                     eval_linear.run)
    monkeypatch.undo()
    assert code == 128 + signal.SIGTERM and "SIGTERM after step" in capsys.readouterr().err
    monkeypatch.setattr(mokd, "get_data", lambda cfg: few)
    assert linear(tmp_path / "cut", *args) == whole
    assert "resumed" in capsys.readouterr().out
    runs = "whole", "cut"
    a, b = (torch.load(tmp_path / run / "checkpoint.pth", weights_only=True)["net"] for run in runs)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for i in (1, 2):
        a, b = (torch.load(tmp_path / run / f"classifier{i}.pth", weights_only=True) for run in runs)
        for part in ("model", "classifier"):
            assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    args = [*args[:-len(mode)], "--epochs", 3, *mode, "--workers", 0, "--out", tmp_path / "cut"]
    assert "--epochs was 2, is 3" in evaluation_fails("linear", args, capsys)


def test_linear_refuses_other_images_and_a_state_that_does_not_fit(trained, few, tmp_path, capsys):
    args = ["--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--epochs", 1,
            "--warmup_epochs", 0, "--lr", 0.1, "--workers", 0, "--out", tmp_path]
    linear(tmp_path, *args)
    file = tmp_path / "checkpoint.pth"
    state = torch.load(file, weights_only=True)
    torch.save(state | dict(images=99), file)
    assert "had 99 images, now 256" in evaluation_fails("linear", args, capsys)
    for moments in state["optimizer"]["state"].values():
        moments["momentum_buffer"] = torch.zeros(3)
    torch.save(state, file)
    assert "does not fit" in evaluation_fails("linear", args, capsys)
    for script in EVALUATIONS:   # and it is no run of mokd.py, which these programs take
        assert "not of a run of mokd.py" in evaluation_fails(script, ["--checkpoint", file], capsys)
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    del state["model1"]["momentum_net"]["backbone.model.conv1.weight"]
    torch.save(state, file)
    for script in EVALUATIONS:
        assert "does not fit" in evaluation_fails(script, ["--checkpoint", file], capsys)


@pytest.mark.parametrize("args, name", [
    ([], "r/knn.json"), (["--net", "student"], "r/knn-student.json"), (["--json", "mine"], "mine"),
    (["--data", "x/imagenet100/"], "r/knn-imagenet100.json"),
    (["--data", "cifar10", "--model", 2], "r/knn-cifar10-model2.json")])
def test_no_result_of_knn_overwrites_another(args, name):
    cfg = eval_knn.parse(["--checkpoint", "r/checkpoint.pth", *map(str, args)])
    assert cfg.json == name
    cfg = eval_knn.parse(["--checkpoint", "r/checkpoint.pth", "q/checkpoint.pth"])
    assert cfg.json == "r/knn-2-runs.json"


@pytest.fixture(scope="module")
def two_vits(tmp_path_factory):
    """A pair without batch norm, which on the CPU is each process's own."""
    out = tmp_path_factory.mktemp("two_vits")
    vit = ["--arch1", "vit_tiny", "--model_kwargs1", *VIT, "--arch2", "vit_tiny", "--model_kwargs2", *VIT]
    assert mokd.main([*SMALL, *vit, "--out", str(out), "--batch_size", "256", "--save_every", "99"]) == 0
    return out


@pytest.mark.parametrize("mode", [[], ["--finetune"]])
def test_linear_of_two_processes_equals_that_of_one(mode, two_vits, tmp_path):
    weights, logs = [], []
    for n, nproc in (("1", 0), ("2", 2)):
        done = evaluate_in_a_process("eval_linear", "--checkpoint", two_vits / "checkpoint.pth", "--workers",
                                     0, "--out", tmp_path / n,
                                     "--label_fraction", 0.1, "--batch_size", 136, "--epochs", 1, "--lr", 0.5,
                                     "--warmup_epochs", 0,
                                     *mode, nproc=nproc)
        assert done.returncode == 0, done.stderr
        weights.append(torch.load(tmp_path / n / "checkpoint.pth", weights_only=True)["net"])
        logs.append([json.loads(line) for line in open(tmp_path / n / "log.jsonl")])
    for k, v in weights[0].items():
        assert close(weights[1][k], v, 1e-3 if mode else 1e-5), k
    one, two = (log[-1]["accuracies 1 vit_tiny"]["0.5"] for log in logs)
    assert one["top1"] == pytest.approx(two["top1"], abs=0.2) and logs[0][0].keys() == logs[1][0].keys()


@pytest.mark.parametrize("arch", ["mobilenetv3_large", "convnext_atto"])
def test_parameters_that_a_backbone_does_not_use_do_not_stop_fine_tuning_on_two_processes(arch, tmp_path):
    """DDP waits for each gradient: step 2 ended with 'Expected to have finished reduction'."""
    done = evaluate_in_a_process("eval_linear", "--arch", arch, "--data", "toy", "--image_size", 32,
                                 "--workers", 0, "--finetune",
                                 "--label_fraction", 0.01, "--batch_size", 8, "--epochs", 1, "--out",
                                 tmp_path, nproc=2)
    assert done.returncode == 0, done.stderr
    assert json.loads(open(tmp_path / "log.jsonl").readline())["step"] == 5


def test_optimizer_weight_decay_and_intervals_are_those_asked_for(trained, few, tmp_path):
    source = ["--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--epochs", 4, "--lr", 0.1,
              "--model", 1]
    logs, weights = {}, {}
    for name, more in dict(plain=[], decay=["--weight_decay", 0.5], adamw=["--optimizer", "adamw"],
                           seldom=["--eval_every", 3, "--log_every", 5, "--save_every", 7]).items():
        linear(tmp_path / name, *source, *more)
        logs[name] = [json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
        saved = torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        weights[name] = saved["net"]["0.layers.0.weight"]
    assert weights["decay"].norm() < weights["plain"].norm()
    assert not torch.equal(weights["adamw"], weights["plain"])
    assert torch.equal(weights["seldom"], weights["plain"])
    epochs = {name: [r["epoch"] for r in log if "highest top1 1 resnet18" in r] for name, log in logs.items()}
    assert epochs["plain"] == [1, 2, 3, 4] and epochs["seldom"] == [3, 4]
    assert [r["step"] for r in logs["seldom"] if "step" in r] == [5, 10, 15, 16]
    cfg = eval_linear.parse([*map(str, source), "--weight_decay", "0.5", "--finetune", "--optimizer",
                             "adamw"])
    backbone = eval_knn.load_backbones(cfg)["1 resnet18"]
    net = eval_linear.Classifiers([eval_linear.Classifier("1 resnet18", backbone, cfg, 8, (0.1,))])
    optimizer = eval_linear.make_optimizer(net, cfg)
    assert type(optimizer) is torch.optim.AdamW
    groups = [(p.dim() > 1, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert {*groups} == {(True, 0.5), (False, 0.0)} and len(groups) == len([*net.parameters()])


def test_the_log_has_all_rates_and_its_line_says_what_it_shows(trained, few, tmp_path, capsys, monkeypatch):
    evaluate, pause = eval_linear.evaluate, [2.5]

    def slow(*args):
        time.sleep(pause[0])
        return evaluate(*args)
    monkeypatch.setattr(eval_linear, "evaluate", slow)
    schedule = mokd.cosine_schedule

    def slow_step(*args):   # which each step asks once
        time.sleep(0.1)
        return schedule(*args)
    monkeypatch.setattr(mokd, "cosine_schedule", slow_step)
    args = ["--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--warmup_epochs", 0, "--model",
            1]
    results = linear(tmp_path / "a", *args, "--epochs", 5, "--log_every", 5, "--lr", 0.05, 0.1)
    log = [json.loads(line) for line in open(tmp_path / "a" / "log.jsonl")]
    steps, evaluations = [r for r in log if "step" in r], [r for r in log if "step" not in r]
    assert [r["epoch"] for r in evaluations] == [1, 2, 3, 4, 5]
    assert [r["epoch"] for r in steps] == [2, 3, 4, 5]
    for rate in ("0.05", "0.1"):
        tops = [r["accuracies 1 resnet18"][rate]["top1"] for r in evaluations]
        assert results["1 resnet18"][rate]["top1"] == tops[-1]
        assert results["1 resnet18"][rate]["best_top1"] == max(tops)
        assert results["1 resnet18"][rate]["best_epoch"] == 1 + tops.index(max(tops))
    for r in steps:
        assert r["lowest loss 1 resnet18"] == min(r["losses 1 resnet18"].values())
        assert r["lr 1 resnet18"] == {"0.05": 0.05 * r["lr/peak"], "0.1": 0.1 * r["lr/peak"]}
    for r in evaluations:
        assert r["highest top1 1 resnet18"] == max(v["top1"] for v in r["accuracies 1 resnet18"].values())
    # evaluations, of 2.5 s each, are in no step's speed, but in the time that is left
    for r in steps:
        assert 0.2 * 64 / 0.1 < r["images/s"] < 64 / 0.1
    assert steps[1]["step"] == 10 and steps[1]["minutes_left"] > (10 * 0.1 + 2 * 2.5) / 60
    assert steps[-1]["minutes_left"] == 0
    printed = capsys.readouterr().out
    for words in ("lowest loss 1 resnet18", "highest top1 1 resnet18", "best top-1 in epoch"):
        assert words in printed

    pause[0] = 0.5
    linear(tmp_path / "b", *args, "--epochs", 2, "--log_every", 2, "--finetune", "--lr", 0.05, 0.1)
    log = [json.loads(line) for line in open(tmp_path / "b" / "log.jsonl")]
    left = [r["minutes_left"] for r in log if r.get("step") == 8]
    assert left[0] > 1.0 / 60 and left[1] == 0   # after the first of two rates, the second is still to come


def test_a_diverged_rate_stops_neither_the_others_nor_the_run(trained, few, tmp_path, capsys):
    source = ["--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--epochs", 2,
              "--warmup_epochs", 0]
    results = linear(tmp_path / "a", *source, "--lr", 1e38, 0.5)
    assert results["1 resnet18"]["1e+38"]["top1"] == 0 < results["1 resnet18"]["0.5"]["top1"]
    assert results["1 resnet18"]["0.5"] == linear(tmp_path / "b", *source, "--lr", 0.5)["1 resnet18"]["0.5"]
    assert "diverged at --lr 1e+38" in capsys.readouterr().err
    code = mokd.main([*map(str, source), "--lr", "1e38", "--workers", "0", "--out", str(tmp_path / "c")],
                     "eval_linear.py",
                     eval_linear.parse, eval_linear.run)
    assert code == 1 and "every rate diverged" in capsys.readouterr().err


def test_a_batch_without_a_readable_image_has_no_loss(trained, few, tmp_path, monkeypatch):
    views = eval_linear.TrainView.__getitem__

    def unreadable(self, key):
        return views(self, key)[0], -100, -1, ""
    monkeypatch.setattr(eval_linear.TrainView, "__getitem__", unreadable)
    results = linear(tmp_path, "--checkpoint", trained / "checkpoint.pth", "--batch_size", 64, "--epochs", 1,
                     "--lr", 0.1)
    weight = torch.load(tmp_path / "classifier1.pth", weights_only=True)["classifier"]["weight"]
    assert weight.isfinite().all() and results["1 resnet18"]["0.1"]["top1"] > 0


def test_unreadable_training_images_are_named_and_too_many_stop_linear(trained, tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        for i in range(6):
            Image.fromarray(picture(i)).save(tmp_path / part / "a" / f"{i}.png")
    (tmp_path / "train" / "a" / "6.png").write_bytes(b"no image")
    code = mokd.main(["--checkpoint", str(trained / "checkpoint.pth"), "--data", str(tmp_path), "--workers",
                      "0", "--out",
                      str(tmp_path / "o"), "--epochs", "1"], "eval_linear.py", eval_linear.parse,
                      eval_linear.run)
    message = capsys.readouterr().err
    assert code == 1 and "6.png" in message and "1 %" in message


@pytest.mark.parametrize("args, words", [
    (["--lr", "0.1", "0.1"], "twice"), (["--label_fraction", "2"], "--label_fraction"),
    (["--subset", "f", "--label_fraction", "0.5"],
     "either --label_fraction"), (["--batch_size", "99999"], "4096 labeled"),
     (["--n_last_blocks", "9"], "only 2 blocks"),
    (["--lr", "0.1", "0.10000001"], "twice"),
    (["--scale", "1", "0.5"], "--scale: give the smaller number first"),
    (["--model", "1", "--avgpool"], "for ViTs"),
    (["--epochs", "2", "--warmup_epochs", "3"], "--warmup_epochs 3"),
    (["--subset", "nowhere.txt"], "nowhere.txt"), (["--out", "/dev/null/x"], "/dev/null/x")])
def test_what_eval_linear_cannot_do_is_said(trained, args, words, capsys, tmp_path):
    out = [] if "--out" in args else ["--out", tmp_path]
    assert words in evaluation_fails("linear", ["--checkpoint", trained / "checkpoint.pth", *args, *out],
                                     capsys)


def test_help_of_the_evaluations_names_every_setting():
    for script in ("eval_knn", "eval_linear"):
        done = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=HERE, capture_output=True,
                              text=True)
        assert done.returncode == 0
        for f in dataclasses.fields((eval_knn if script == "eval_knn" else eval_linear).Config):
            assert f"--{f.name} " in done.stdout
