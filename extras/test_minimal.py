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
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import minimal   # noqa: E402
import mokd   # noqa: E402

# A small pair in mokd.py's flags, with views of 32 and 16 pixels, and one optimizer that clips nothing, as
# minimal.py has it. It is SGD, because AdamW would make much of rounding where a true gradient is 0.
CFG = """--data toy --out_dim 32 --hidden_dim 16 --bottleneck_dim 8 --t_dim 12 --t_heads 2 --t_depth 2
    --global_size 32 --local_size 16 --local_crops 3 --batch_size 4 --epochs 1 --warmup_epochs 0 --workers 0
    --lambda1 0.3 --lambda2 0.7 --freeze_last_layer 0 --drop_path 0 --clip_grad 0 --ema 0.9 --dtype fp32
    --student_temp 0.3 --teacher_temp 0.2 --teacher_temp_start 0.2 --center_momentum 0.8
    --cnn_lr 0.01 --vit_lr 0.01 --cnn_wd 0 --vit_wd 0 --cnn_optimizer sgd --vit_optimizer sgd --t_optimizer sgd
    --arch1 resnet18 --model_kwargs1 layers=1,1,1,1 channels=8,8,16,16 output_stride=8
    --arch2 vit_tiny --model_kwargs2 img_size=32 patch_size=8 embed_dim=24 depth=2 num_heads=2
    dynamic_img_size=True"""
SETTINGS = """out_dim hidden_dim bottleneck_dim t_dim t_heads t_depth t_norm lambda1 lambda2 center_momentum
    global_size"""
NAMES = {"backbone.model.": "backbone.", "mlp_head.mlp.": "mlp.", "mlp_head.last.": "last_m.",
         "t_head.last.": "last_t.", "t_head.norm.": "blocks.2.", "t_head.": ""}   # blocks.2: after two


def nets_of(cfg, models, patch):
    """-> minimal.py's [n1, n2, n1_, n2_] with the weights of mokd.py's models, under the settings of cfg."""
    for name in SETTINGS.split():
        patch.setattr(minimal, name.upper(), getattr(cfg, name))
    patch.setattr(minimal, "TAU", cfg.student_temp)
    patch.setattr(minimal, "TAU_", cfg.teacher_temp)
    students, momentum_nets = [], []
    for m in models:
        backbone = m.net.backbone
        n = minimal.Net(dict(model_name=backbone.timm_name, **backbone.timm_kwargs))
        n_ = copy.deepcopy(n).requires_grad_(False)
        if backbone.family == "cnn":   # in mokd.py its MLP-Head keeps its gain
            n.last_m.parametrizations.weight.original0.requires_grad_(False)
        n.load_state_dict(renamed(m.net.state_dict()))
        n_.load_state_dict(renamed(m.n_.state_dict()))
        students.append(n)
        momentum_nets.append(n_)
    return students + momentum_nets


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


def centers_of(m):
    return torch.stack([m.n_.C_m.flatten(), m.n_.C_t.flatten()])


def with_history(models):
    """Centers that are not 0, and momentum nets that are not their students. Larger weights make all gradients
    of a size."""
    for m in models:
        for C in (m.n_.C_m, m.n_.C_t):
            C.copy_(torch.randn(C.shape))
        for p in (*m.net.parameters(), *m.n_.parameters()):
            p.data += 0.1 * torch.randn(p.shape)
    return models


def difference(ours, theirs, smallest=1.0):
    """The largest difference, relative to the largest value or, where that is less, to `smallest`."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(smallest))


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
    nets = nets_of(cfg, models, monkeypatch)
    n1, n2, n1_, n2_ = [n.to(dtype, memory_format=torch.channels_last) for n in nets]   # as mokd.py's
    C = torch.cat([centers_of(m) for m in models])
    optimizer = torch.optim.SGD([*n1.parameters(), *n2.parameters()], momentum=0.9)

    grads, update = {}, mokd.Model.update

    def keep_gradients(m, *now):
        named = m.net.named_parameters()
        grads[m.i] = renamed({name: p.grad.clone() for name, p in named if p.grad is not None})
        update(m, *now)
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
            found[f"centers {m.i}"] = difference(C[2 * m.i - 2:2 * m.i], centers_of(m))
            own = {name: p.grad for name, p in n.named_parameters() if p.grad is not None}
            assert own.keys() == grads[m.i].keys()
            assert all(p.grad is None and not p.requires_grad for p in n_.parameters())
            smallest = 0.1 * max(grad.abs().max() for grad in own.values())   # some true gradients are 0
            for name, grad in own.items():
                found[f"gradient {m.i} {name}"] = difference(grad, grads[m.i][name], smallest)
            for kind, net, other in (("student", n, m.net), ("momentum", n_, m.n_)):
                expected = renamed(other.state_dict())
                assert net.state_dict().keys() == expected.keys()
                for name, value in net.state_dict().items():   # batch norm's statistics too
                    found[f"{kind} {m.i} {name}"] = difference(value, expected[name])
        worst = max(found, key=found.get)
        assert found[worst] <= limit, worst


def images_in(folder, number):
    """Images of random pixels, of two classes: dark and light."""
    for part in ("train", "val"):
        for c in range(2):
            (folder / part / f"class{c}").mkdir(parents=True)
            for i in range(number):
                pixels = torch.randint(120 * c, 120 * c + 130, (40, 32, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / part / f"class{c}" / f"{i}.png")
    return str(folder)


def test_main_trains_on_a_folder_and_prints_losses_and_knn(tmp_path, capsys):
    torch.manual_seed(0)
    steps, step = [], minimal.step

    def step_seen(n1, n2, n1_, n2_, C, x, optimizer, l):
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        assert trained == {*n1.parameters(), *n2.parameters()}
        assert not trained & {*n1_.parameters(), *n2_.parameters()}
        if not steps:   # at first momentum nets equal their students, and gains are 1
            assert all(map(torch.equal, [*n1.parameters(), *n2.parameters()], [*n1_.parameters(), *n2_.parameters()]))
            assert all((last.parametrizations.weight.original0 == 1).all() for last in (n1.last_m, n2.last_t))
        steps.append((l, optimizer.param_groups[0]["lr"]))
        assert [views.shape for views in x] == [(64, 3, 24, 24), (64, 3, 18, 18)]
        assert not torch.equal(x[0][:32], x[0][32:])   # two views, two crops
        return step(n1, n2, n1_, n2_, C, x, optimizer, l)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimal, "step", step_seen)
        minimal.main(["--data", images_in(tmp_path, 33), "--epochs", "2", "--workers", "0", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3   # before training, and after each epoch
    for line in lines:
        knn = re.search(r"k-NN ([\d.]+) ([\d.]+) %$", line)
        assert all(50 <= float(accuracy) <= 100 for accuracy in knn.groups())   # brightness says it
    for line in lines[1:]:
        losses = re.search(r":((?: \d+\.\d+){8})  \d+ s ", line).group(1).split()
        assert all(0 < float(loss) < 20 for loss in losses)
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
    pixels, labels = torch.randn(300, 3, 4, 4), torch.randint(5, (300,))
    pixels[:, 0, 0, 0] += 2 * labels
    loaders = []
    for rows in (slice(0, 200), slice(200, 300)):
        images = torch.utils.data.TensorDataset(pixels[rows], labels[rows])
        images.targets = labels[rows].tolist()
        loaders.append(torch.utils.data.DataLoader(images, 32))

    class Pixels(torch.nn.Module):
        def tokens(self, images):
            assert not self.training
            return images.flatten(1)[:, None]
    net = Pixels()
    votes = mokd.knn_classify(pixels[:200].flatten(1), labels[:200], pixels[200:].flatten(1))[0]
    expected = (votes.argmax(1) == labels[200:]).sum()
    assert 30 < expected < 100
    assert round(float(minimal.knn_accuracy(net, *loaders, "cpu"))) == expected and net.training


def test_it_is_a_page_of_its_own_and_names_every_equation():
    with open(minimal.__file__) as file:
        source = file.read()
    lines = source.splitlines()
    assert len(lines) <= 220 and max(map(len, lines)) <= 100
    assert not re.search(r"^\s*(import|from) (mokd|eval_|extras)", source, re.M)
    assert set(re.findall(r"\((\d)\)", " ".join(re.findall(r"[Ee]q\. .*", source)))) == set("123456789")
