"""Each patch in extras/forks is applied to a copy of mokd.py, which then shows its effect."""
import copy
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

os.environ["CUDA_VISIBLE_DEVICES"] = ""   # digits of the CPU are compared
HERE = pathlib.Path(__file__).resolve().parent
CNN = "--arch{0} resnet18 --model_kwargs{0} layers=1,1,1,1 channels=8,8,16,16 "
VIT = "--arch{0} vit_tiny --model_kwargs{0} img_size=32 patch_size=8 depth=1 num_heads=2 embed_dim={1} "
SMALL = """--data toy --out_dim 32 --hidden_dim 16 --bottleneck_dim 8 --t_heads 2 --t_depth 1 --global_size 32
    --local_size 16 --local_crops 2 --batch_size 32 --epochs 1 --warmup_epochs 0 --teacher_temp_epochs 1
    --freeze_last_layer 0 --vit_lr 0.01 --blur 0 0 --dtype fp32 --workers 0 --log_every 1 """
TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2 mokd.py".split()]

def patched(name, folder):
    """A copy of mokd.py with a patch, and with fewer toy images -> its module."""
    file = pathlib.Path(shutil.copy(HERE.parent / "mokd.py", folder))
    subprocess.run(["git", "apply", f"{HERE}/forks/{name}.patch"], cwd=folder, check=True,
                   env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
    file.write_text(file.read_text().replace("4096 if", "512 if"))
    spec = importlib.util.spec_from_file_location(f"mokd_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def train(name, folder, more="", processes=1):   # two small ViTs, 16 steps of 32 images
    mokd, out = patched(name, folder), folder / f"out{processes}"
    flags = f"{SMALL} {VIT.format(1, 32)} {VIT.format(2, 24)} --t_dim 24 --out {out}".split()
    if processes == 1:
        mokd.main(flags + more.split())
    else:
        subprocess.run(TORCHRUN + flags, cwd=folder, check=True)
    records = (out / "log.jsonl").read_text().splitlines()
    return torch.load(out / "checkpoint.pth", weights_only=True), [json.loads(record) for record in records]

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train("dataset", tmp_path_factory.mktemp("plain"))   # it leaves toy images as they are

def test_every_fork_is_small_and_tested():
    for file in (HERE / "forks").iterdir():
        added = file.read_text().count("\n+") - 1   # one is +++ b/mokd.py
        assert added <= dict(release=45).get(file.stem, 12)
        assert any(test.startswith(f"test_{file.stem}_") for test in globals())

def test_koleo_changes_both_models_and_is_logged(plain, tmp_path):
    _, records = train("koleo", tmp_path)
    for i in "12":
        more = records[0]["loss" + i] - plain[1][0]["loss" + i]
        assert more == pytest.approx(0.1 * records[0]["koleo" + i], rel=1e-3) and more != 0
        assert records[1]["sm" + i] != plain[1][1]["sm" + i]   # it has changed the backbone

def test_projector_is_trained_averaged_and_saved_by_two_processes_as_by_one(tmp_path):
    state, one = train("projector", tmp_path)
    two = train("projector", tmp_path, processes=2)[1]
    for i in "12":
        assert one[-1]["p" + i] < 0.9 * one[0]["p" + i]
        assert one[-1]["p" + i] == pytest.approx(two[-1]["p" + i], rel=1e-3)
        net, net_ = state["model" + i]["net"], state["model" + i]["momentum_net"]
        assert not torch.equal(net["projector.weight"], net_["projector.weight"])

def test_mixer_takes_the_place_of_the_t_head(plain, tmp_path):
    state, records = train("mixer", tmp_path)
    assert "t_head.blocks.0.mlp_tokens.fc1.weight" in state["model1"]["net"]
    assert records[0]["sm1"] == plain[1][0]["sm1"]
    assert records[-1]["loss1"] < records[0]["loss1"]

def test_static_teacher_stands_still_while_model_2_learns(plain, tmp_path):
    teacher = plain[0]["model1"]["net"]
    torch.save(teacher, tmp_path / "teacher.pth")
    state, records = train("static_teacher", tmp_path, f"--init1 {tmp_path}/teacher.pth")
    for name, w in state["model1"]["net"].items():
        assert torch.equal(state["model1"]["momentum_net"][name], w), name
        assert torch.equal(teacher[name], w) or "head" in name, name
    assert records[-1]["cm2"] < records[0]["cm2"]

def test_dataset_of_ones_own_is_trained_on(tmp_path):
    state, records = train("dataset", tmp_path, "--data noise --batch_size 128")
    assert state["images"][0] == 512 and records[-1]["steps"] == 4

def test_pairing_of_ones_own_changes_the_search_alone(plain, tmp_path):
    first, usual = train("pairing", tmp_path, "--search parity")[1][0], plain[1][0]
    assert first["st1"] == usual["st1"] and first["ct1"] != usual["ct1"]

def test_tensorboard_gets_every_record(tmp_path, monkeypatch):
    stand_in = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    _, records = train("tensorboard", tmp_path, "--log_every 8 --knn_every 1")
    stand_in.SummaryWriter.assert_called_once_with(f"{tmp_path}/out1")
    points = iter(stand_in.SummaryWriter().add_scalar.call_args_list)
    for step, record in zip((8, 16, 0), records, strict=True):   # k-NN stands at its epoch
        for name, value in record.items():
            assert next(points).args == (name, value, step)

def test_release_switches_every_row(tmp_path):
    mokd = patched("release", tmp_path)
    paper, release = mokd.parse_args([]), mokd.parse_args(["--recipe", "release"])
    rows = dict(recipe="release", vit_pool="cls", t_dim=0, search="local", search_center=False, wd_end=0.4,
                t_optimizer="sgd", teacher_temp_epochs_cnn=50, cnn_lr_end=0.0048, vit_lr_end=1e-5)
    assert {name: value for name, value in vars(release).items() if value != getattr(paper, name)} == rows
    demo = mokd.parse_args("--search global --demo --recipe=release".split())   # the first two win
    assert (demo.search, demo.t_dim, demo.vit_pool) == ("global", 48, "cls")
    nows = [mokd.schedule(release, step, 5) for step in range(250)]   # of 5 steps an epoch
    assert [now.lr["cnn"] for now in nows[:50]] == pytest.approx(torch.linspace(0, 0.1, 50).tolist())
    assert [now.tau_cnn for now in nows[::5]] == pytest.approx(torch.linspace(0.04, 0.07, 50).tolist())
    # Positions of 3 x 3 tokens, among 7 x 7 that reach from -1 to 1
    head, hook = mokd.THead(8, 4, 8, 1, 2, 49, release=True), Mock(return_value=None)
    head.blocks.register_forward_pre_hook(hook)
    head(torch.zeros(1, 9, 8))
    at = (2 * (torch.arange(3) + 0.5) / 3.1 - 1).expand(3, 3)
    maps = head.pos.unflatten(1, (7, 7)).permute(0, 3, 1, 2)
    pos = torch.nn.functional.grid_sample(maps, torch.stack([at, at.T], -1)[None], "bicubic", "border", False)
    assert torch.allclose(hook.call_args.args[1][0], pos.flatten(2).mT, atol=1e-6)

@pytest.mark.parametrize("pair, lambdas, width", [
    (CNN.format(1) + VIT.format(2, 24), (1, 0.1), 24), (VIT.format(1, 96) + CNN.format(2), (0.1, 1), 96),
    (CNN.format(1) + CNN.format(2), (1, 1), 384), (VIT.format(1, 24) + VIT.format(2, 32), (0.1, 1), 384)])
def test_release_builds_and_trains_any_pair(pair, lambdas, width, tmp_path):
    mokd = patched("release", tmp_path)
    mokd.target, mokd.train = Mock(wraps=mokd.target), Mock(wraps=mokd.train)
    mokd.main(f"{SMALL} {pair} --recipe release --batch_size 128 --out {tmp_path}/out".split())
    cfg, models = mokd.train.call_args.args[:2]
    assert (cfg.lambda1, cfg.lambda2, cfg.t_dim) == (*lambdas, width)
    own = [0.04 if m.family == "cnn" else 0.07 for m in models]   # tau' in epoch 0, for sm and st
    taus = [own[0], own[0], own[1], own[1], 0.07, 0.07, 0.07, 0.07]   # then for cm and ct
    assert [call.args[2] for call in mokd.target.call_args_list] == taus * 4
    for m in models:
        assert m.family == "cnn" or 0.01 < m.n_.backbone.model.cls_token.std() < 0.04
        for optimizer in m.optimizers:
            assert isinstance(optimizer, torch.optim.SGD) == (m.family == "cnn")
            for group in optimizer.param_groups:
                t_head = group["family"] != m.family   # of a CNN
                assert {t_head or p.dim() > 1 for p in group["params"]} == {group["decays"]}

def test_release_teaches_itself_and_the_other_model_at_their_own_temperatures(tmp_path):
    """In an epoch in which tau' has not risen for a CNN's self-distillation. The stored step has one tau'."""
    mokd = patched("release", tmp_path)
    flags = SMALL + CNN.format(1) + VIT.format(2, 24) + "--recipe release --drop_path 0 --lambda1 1 --lambda2 1"
    cfg, cpu = mokd.parse_args(flags.split()), torch.device("cpu")
    models, now = mokd.build_models(cfg, cpu), mokd.schedule(cfg, 0, 10)
    assert (now.tau_cnn, now.tau_) == (0.04, 0.07)
    x = [torch.randn(64, 3, 32, 32), torch.randn(64, 3, 16, 16)]
    with torch.no_grad():
        (m1, t1, Z1), (m2, t2, Z2) = [copy.deepcopy(m.net)(x) for m in models]
        (m1_, t1_, Z1_), (m2_, t2_, Z2_) = [copy.deepcopy(m.n_)(x[:1]) for m in models]
        n2_ = models[1].n_
        found = [n2_.t_head(Z2_.tokens[0][:32], models[0].net.t_head.query_of(Z1.pooled[v])) for v in (2, 3)]

    def H(teacher, student, tau_, pairs):
        losses = [-((teacher[i] / tau_).softmax(1) * (student[v] / 0.1).log_softmax(1)).sum(1).mean()
                  for i, v in pairs]
        return float(sum(losses) / len(losses))
    views = [(g, v) for g in range(2) for v in range(4) if v != g]
    expected = dict(sm1=H(m1_, m1, 0.04, views), st1=H(t1_, t1, 0.04, views), cm1=H(m2_, m1, 0.07, views),
                    ct1=H(found, t1, 0.07, [(0, 2), (1, 3)]), sm2=H(m2_, m2, 0.07, views),
                    st2=H(t2_, t2, 0.07, views), cm2=H(m1_, m2, 0.07, views))
    losses, _ = mokd.train_step(*models, x, cfg, now)
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-5), name

def test_release_takes_the_stored_step_of_the_released_code(tmp_path):
    patched("release", tmp_path)
    for name in ("test_mokd.py", "eval_knn.py", "eval_linear.py", ".ci"):
        os.symlink(HERE.parent / name, tmp_path / name)
    (tmp_path / "conftest.py").write_text("""import mokd, numpy
parse, tau_ = mokd.parse_args, numpy.load(".ci/release_step.npz")["meta.teacher_temp"]
mokd.parse_args = lambda argv: parse(["--recipe", "release", "--teacher_temp_start", str(tau_), *argv])""")
    subprocess.run([sys.executable, *"-m pytest -q -k released_codes_step".split()], cwd=tmp_path, check=True)
