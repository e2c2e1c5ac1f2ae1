"""minimal.py beside mokd.py: the same weights and views give the same step. A small run ends with k-NN.

    python -m pytest -q extras/test_minimal.py
"""
import copy
import functools
import inspect
import math
import os
import re
import sys

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import minimal   # noqa: E402
import mokd   # noqa: E402

# One optimizer that clips nothing. It is SGD: AdamW makes much of rounding where a true gradient is 0.
CFG = """--data toy --out_dim 32 --hidden_dim 16 --bottleneck_dim 8 --t_dim 12 --t_heads 2 --t_depth 2
    --global_size 32 --local_size 16 --local_crops 3 --batch_size 4 --epochs 1 --warmup_epochs 0 --workers 0
    --lambda1 0.3 --lambda2 0.7 --freeze_last_layer 0 --drop_path 0 --clip_grad 0 --ema 0.9 --dtype fp32
    --student_temp 0.3 --teacher_temp 0.2 --teacher_temp_start 0.2 --center_momentum 0.8 --t_optimizer sgd
    --cnn_lr 0.01 --vit_lr 0.01 --cnn_wd 0 --vit_wd 0 --cnn_optimizer sgd --vit_optimizer sgd
    --arch1 resnet18 --model_kwargs1 layers=1,1,1,1 channels=8,8,16,16 output_stride=8 --arch2 vit_tiny
    --model_kwargs2 img_size=32 patch_size=8 embed_dim=24 depth=2 num_heads=2 dynamic_img_size=True"""
SETTINGS = """out_dim hidden_dim bottleneck_dim t_dim t_heads t_depth t_norm lambda1 lambda2 center_momentum
    global_size"""
NAMES = {"backbone.model.": "backbone.", "mlp_head.mlp.": "mlp.", "mlp_head.last.": "last_m.",
         "t_head.last.": "last_t.", "t_head.norm.": "blocks.2.", "t_head.": ""}   # after two blocks

def nets_of(cfg, models, patch):
    """-> minimal.py's nets [n1, n2, n1_, n2_] with mokd.py's weights, under its settings."""
    for name in SETTINGS.split():
        patch.setattr(minimal, name.upper(), getattr(cfg, name))
    patch.setattr(minimal, "TAU", cfg.student_temp)
    patch.setattr(minimal, "TAU_", cfg.teacher_temp)
    nets = []
    for kind in ("net", "n_"):
        for m in models:
            backbone = m.net.backbone
            n = minimal.Net(dict(model_name=backbone.timm_name, **backbone.timm_kwargs))
            n.load_state_dict(renamed(getattr(m, kind).state_dict()))
            n.requires_grad_(kind == "net")
            if backbone.family == "cnn":   # in mokd.py its MLP-Head keeps its gain
                n.last_m.parametrizations.weight.original0.requires_grad_(False)
            nets.append(n)
    return nets

def renamed(state):
    """Tensors by their names in mokd.py's Net -> by those in minimal.py's, which keeps positions as a map."""
    own = {}
    for name, value in state.items():
        if name == "t_head.pos":
            value = value.mT.unflatten(2, [math.isqrt(value.shape[1])] * 2)
        prefix = next((prefix for prefix in NAMES if name.startswith(prefix)), None)
        if prefix:   # centers have none
            own[NAMES[prefix] + name.removeprefix(prefix)] = value
    return own

def centers_of(models):
    return torch.cat([C for m in models for C in (m.n_.C_m, m.n_.C_t)])

@pytest.mark.parametrize("t_norm", ["--no-t_norm", "--t_norm"])
@pytest.mark.parametrize("dtype, steps, limit", [(torch.float32, 1, 1e-6), (torch.float64, 2, 1e-12)])
def test_a_step_equals_that_of_mokd(dtype, steps, limit, t_norm, monkeypatch):
    if dtype == torch.float64:   # in which neither file computes of itself
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    cfg = mokd.parse_args([*CFG.split(), t_norm])
    models = mokd.build_models(cfg, torch.device("cpu"))
    for m in models:   # a history: centers that are not 0, momentum nets apart, weights of some size
        for p in (*m.net.parameters(), *m.n_.parameters()):
            p.data += 0.1 * torch.randn(p.shape)
        for C in (m.n_.C_m, m.n_.C_t):
            C.copy_(torch.randn(C.shape))
    nets = [n.to(dtype) for n in nets_of(cfg, models, monkeypatch)]
    others = [m.net.to(dtype) for m in models] + [m.n_.to(dtype) for m in models]
    C = centers_of(models)
    optimizer = torch.optim.SGD([*nets[0].parameters(), *nets[1].parameters()], momentum=0.9)
    close = functools.partial(torch.testing.assert_close, rtol=limit)
    grads, update = {}, mokd.Model.update

    def keep_gradients(m, *now):
        of_all = {name: p.grad for name, p in m.net.named_parameters() if p.grad is not None}
        grads[m.i] = copy.deepcopy(renamed(of_all))
        update(m, *now)
    monkeypatch.setattr(mokd.Model, "update", keep_gradients)
    for i in range(steps):
        now = mokd.schedule(cfg, i, 10)
        x = [torch.randn(8, 3, 32, 32, dtype=dtype), torch.randn(12, 3, 16, 16, dtype=dtype)]
        theirs, _ = mokd.train_step(*models, x, cfg, now)
        optimizer.param_groups[0]["lr"] = now.lr["vit"]
        ours = minimal.step(*nets, C, x, optimizer, now.l)
        names = [name + model for model in "12" for name in ("sm", "st", "cm", "ct")]
        close([ours, C], [torch.stack([theirs[name] for name in names]), centers_of(models)], atol=limit)
        for n, other in zip(nets, others):   # batch norm's statistics too
            close(n.state_dict(), renamed(other.state_dict()), atol=limit)
        for n, expected in zip(nets, (grads[1], grads[2])):
            own = {name: p.grad for name, p in n.named_parameters() if p.grad is not None}
            largest = max(grad.abs().max().item() for grad in own.values())
            close(own, expected, atol=limit * largest)   # some true gradients are 0

def test_main_trains_on_a_folder_and_prints_losses_and_knn(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    for i in range(132):   # images of random pixels, dark or light
        folder = tmp_path / ("train", "val")[i % 2] / f"class{i // 66}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(130, (40, 32, 3), dtype=torch.uint8) + 120 * (i // 66)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    steps, step = [], minimal.step

    def step_seen(n1, n2, n1_, n2_, C, x, optimizer, l):
        assert {*optimizer.param_groups[0]["params"]} == {*n1.parameters(), *n2.parameters()}
        if not steps:   # at first momentum nets equal their students, and gains are 1
            for n, n_ in (n1, n1_), (n2, n2_):
                assert all(map(torch.equal, n.parameters(), n_.parameters()))
                for last in n.last_m, n.last_t:
                    assert (last.parametrizations.weight.original0 == 1).all()
        steps.append((l, optimizer.param_groups[0]["lr"]))
        assert [views.shape for views in x] == [(64, 3, 24, 24), (64, 3, 18, 18)]
        assert not torch.equal(x[0][:32], x[0][32:])   # two views, two crops
        return step(n1, n2, n1_, n2_, C, x, optimizer, l)
    monkeypatch.setattr(minimal, "step", step_seen)
    minimal.main(["--data", str(tmp_path), *"--epochs 2 --workers 0 --device cpu".split()])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3   # before training, and after each epoch
    for line in lines:
        knn = re.search(r"k-NN ([\d.]+) ([\d.]+) %$", line)
        assert all(50 <= float(accuracy) <= 100 for accuracy in knn.groups())   # brightness says it
    assert all(re.search(r":( \d+\.\d+){8}  \d+ s ", line) for line in lines[1:])   # losses
    for i, (l, lr) in enumerate(steps):   # of four steps, two in each epoch
        assert math.isclose(l, mokd.cosine_schedule(i, 4, minimal.EMA, 1))
        assert math.isclose(lr, min(1, i / 2) * mokd.cosine_schedule(i, 4, minimal.LR, 0), abs_tol=1e-12)

def test_without_a_folder_it_takes_cifar_10(monkeypatch):
    def data_set(root, train, transform, download):
        raise RuntimeError(f"CIFAR-10 in {root}, {train}, {download}")
    monkeypatch.setattr(minimal.datasets, "CIFAR10", data_set)
    with pytest.raises(RuntimeError, match="CIFAR-10 in data, True, True"):
        minimal.main([])

def test_knn_is_that_of_mokd():
    torch.manual_seed(0)
    features, labels = torch.randn(300, 48), torch.randint(5, (300,))
    features[:, 0] += 2 * labels
    bank, queries = [TensorDataset(features[rows], labels[rows]) for rows in (slice(200), slice(200, 300))]
    bank.targets = labels[:200].tolist()

    def tokens(images):
        assert not net.training
        return images[:, None]
    net = torch.nn.Module()
    net.tokens = tokens
    votes = mokd.knn_classify(*bank.tensors, queries.tensors[0])[0]
    expected = (votes.argmax(1) == queries.tensors[1]).sum()
    assert 30 < expected < 100
    found = minimal.knn_accuracy(net, DataLoader(bank, 32), DataLoader(queries, 32), "cpu")
    assert found == expected and net.training

def test_it_is_a_page_of_its_own_and_names_every_equation():
    source = inspect.getsource(minimal)
    lines = source.splitlines()
    assert len(lines) <= 220 and max(map(len, lines)) <= 100
    assert not re.search(r"^\s*(import|from) (mokd|eval_|extras)", source, re.M)
    assert set(re.findall(r"\((\d)\)", " ".join(re.findall(r"[Ee]q\. .*", source)))) == set("123456789")
