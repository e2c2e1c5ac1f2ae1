"""minimal.py beside mokd.py: the same weights and views give the same step. A small run ends with k-NN.

    python -m pytest -q extras/test_minimal.py
"""
import copy
import math
import os
import re
import sys

import pytest
import torch
from torchvision.io import write_png

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import minimal   # noqa: E402
import mokd   # noqa: E402

# mokd.py's settings for a small pair, in views of 32 and 16 pixels. minimal.py does not clip gradients, and
# has one AdamW with one rate.
CFG = """--data toy --out_dim 32 --hidden_dim 16 --bottleneck_dim 8 --t_dim 12 --t_heads 2 --t_depth 2
    --global_size 32 --local_size 16 --local_crops 3 --batch_size 4 --epochs 1 --warmup_epochs 0 --workers 0
    --lambda1 0.3 --lambda2 0.7 --freeze_last_layer 0 --drop_path 0 --clip_grad 0 --ema 0.9 --dtype fp32
    --student_temp 0.3 --teacher_temp 0.2 --teacher_temp_start 0.2 --center_momentum 0.8
    --cnn_lr 0.01 --vit_lr 0.01 --cnn_wd 0 --vit_wd 0 --cnn_optimizer sgd --vit_optimizer sgd --t_optimizer sgd
    --arch1 resnet18 --model_kwargs1 layers=1,1,1,1 channels=8,8,16,16 output_stride=8
    --arch2 vit_tiny --model_kwargs2 img_size=32 patch_size=8 embed_dim=24 depth=2 num_heads=2
    dynamic_img_size=True"""
SETTINGS = "out_dim hidden_dim bottleneck_dim t_dim t_heads t_depth t_norm lambda1 lambda2 center_momentum global_size"


def nets_of(cfg, models, patch):
    """-> minimal.py's nets n1, n2, n1_, n2_ with the weights of mokd.py's models, under the settings of cfg."""
    for name in SETTINGS.split():
        patch.setattr(minimal, name.upper(), getattr(cfg, name))
    patch.setattr(minimal, "TAU", cfg.student_temp)
    patch.setattr(minimal, "TAU_", cfg.teacher_temp)
    students, momentum_nets = [], []
    for m in models:
        backbone = m.net.backbone
        n = minimal.Net(dict(model_name=backbone.timm_name, **backbone.timm_kwargs))
        n_ = copy.deepcopy(n).requires_grad_(False)
        if m.family == "cnn":   # in mokd.py its MLP-Head keeps its gain
            n.last_m.parametrizations.weight.original0.requires_grad_(False)
        n.load_state_dict(renamed(m.net.state_dict()))
        n_.load_state_dict(renamed(m.n_.state_dict()))
        students.append(n.to(m.params[0].dtype))
        momentum_nets.append(n_.to(m.params[0].dtype))
    return students + momentum_nets


def renamed(state):
    """A state dict of mokd.py's Net, or of tensors by its names -> the same under minimal.py's."""
    state = {name: value for name, value in state.items() if name not in ("C_m", "C_t")}
    own = {}
    for name, value in state.items():
        if name == "t_head.pos":
            value = value.mT.unflatten(2, [math.isqrt(value.shape[1])] * 2)
        depth = len({name.split(".")[2] for name in state if name.startswith("t_head.blocks.")})
        for old, new in (("backbone.model.", "backbone."), ("mlp_head.mlp.", "mlp."), ("mlp_head.last.", "last_m."),
                         ("t_head.last.", "last_t."), ("t_head.norm.", f"blocks.{depth or 2}."), ("t_head.", "")):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        own[name] = value
    return own


def with_history(models):
    """Centers that are not 0, and momentum nets that are not their students."""
    for m in models:
        for C in (m.n_.C_m, m.n_.C_t):
            C.copy_(torch.randn(C.shape))
        for p in m.params_:
            p.data += 0.05 * torch.randn(p.shape)
    return models


def difference(ours, theirs):
    """The largest difference, relative to the largest value where that is more than 1."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1))


@pytest.mark.parametrize("t_norm", ["--no-t_norm", "--t_norm"])
@pytest.mark.parametrize("dtype, steps, limit", [(torch.float32, 1, 1e-6), (torch.float64, 2, 1e-12)])
def test_a_step_equals_that_of_mokd(dtype, steps, limit, t_norm, monkeypatch):
    if dtype == torch.float64:   # in which neither file computes of itself
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    cfg = mokd.parse_args([*CFG.split(), t_norm])
    models = with_history(mokd.build_models(cfg, torch.device("cpu")))
    for m in models:
        m.net.to(dtype)
        m.n_.to(dtype)
    n1, n2, n1_, n2_ = nets_of(cfg, models, monkeypatch)
    C = torch.cat([models[0].n_.C_m, models[0].n_.C_t, models[1].n_.C_m, models[1].n_.C_t])
    optimizer = torch.optim.SGD([*n1.parameters(), *n2.parameters()], momentum=0.9)

    grads, update = {}, mokd.Model.update

    def keep_gradients(m, now, scaler):
        grads[m.i] = renamed({name: p.grad.clone() for name, p in m.net.named_parameters() if p.grad is not None})
        update(m, now, scaler)
    monkeypatch.setattr(mokd.Model, "update", keep_gradients)
    for i in range(steps):
        now = mokd.schedule(cfg, i, 10)
        x = [torch.randn(8, 3, 32, 32, dtype=dtype), torch.randn(12, 3, 16, 16, dtype=dtype)]
        theirs, _ = mokd.train_step(*models, x, cfg, now)
        optimizer.param_groups[0]["lr"] = now.lr["vit"]
        ours = minimal.step(n1, n2, n1_, n2_, C, x, optimizer, now.l)

        names = [name + model for model in "12" for name in ("sm", "st", "cm", "ct")]
        found = {"losses": difference(ours, torch.stack([theirs[name] for name in names]))}
        for m, n, n_ in zip(models, (n1, n2), (n1_, n2_)):
            found[f"centers {m.i}"] = difference(C[2 * m.i - 2:2 * m.i], torch.cat([m.n_.C_m, m.n_.C_t]))
            own = {name: p.grad for name, p in n.named_parameters() if p.grad is not None}
            assert own.keys() == grads[m.i].keys()
            assert all(p.grad is None and not p.requires_grad for p in n_.parameters())
            largest = max(grad.abs().max() for grad in own.values())   # some true gradients are 0
            for name, grad in own.items():
                found[f"gradient {m.i} {name}"] = float((grad - grads[m.i][name]).abs().max() / largest)
            for kind, net, other in (("student", n, m.net), ("momentum", n_, m.n_)):
                expected = renamed(other.state_dict())
                assert net.state_dict().keys() == expected.keys()
                for name, value in net.state_dict().items():   # batch norm's statistics too
                    found[f"{kind} {m.i} {name}"] = difference(value, expected[name])
        print("LARGEST", dtype, t_norm, i, {k: max(v for name, v in found.items() if k in name) for k in ("losses", "centers", "gradient", "student", "momentum")})
        worst = max(found, key=found.get)
        assert found[worst] <= limit, worst
