"""Each patch in extras/forks is applied to a copy of mokd.py, which then shows its effect."""
import copy
import importlib.util
import json
import os
import pathlib
import signal
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
EXACTLY = dict(rtol=0, atol=0)
TWO_VITS = SMALL + VIT.format(1, 32) + VIT.format(2, 24) + "--t_dim 24 "

def module_of(folder):
    spec = importlib.util.spec_from_file_location("mokd", folder / "mokd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def patched(name, folder):
    """A copy of mokd.py with a patch, and with fewer toy images -> its module."""
    folder.mkdir(exist_ok=True)
    (folder / "mokd.py").write_text((HERE.parent / "mokd.py").read_text().replace("4096 if", "512 if"))
    subprocess.run(["git", "apply", f"{HERE}/forks/{name}.patch"], cwd=folder, check=True,
                   env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
    return module_of(folder)

def train(name, folder, more="", processes=1):
    """Two small ViTs, or as `more` says, in 16 steps of 32 images -> checkpoint, records but for settings."""
    mokd = patched(name, folder)
    flags = f"{TWO_VITS} --out {folder} {more}".split()
    if processes == 1:
        mokd.main(flags)
    else:   # forked, because they need not import torch then
        torch.multiprocessing.start_processes(one_of_two, (folder, flags), 2, start_method="fork")
    return torch.load(folder / "checkpoint.pth", weights_only=True), records_of(folder)[1:]

def records_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

def one_of_two(rank, folder, flags):
    torch.set_num_threads(1)   # those of its parent are not there
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    module_of(folder).main(flags)

def build(mokd, flags):
    cfg = mokd.parse_args(flags.split())
    return cfg, mokd.build_models(cfg, torch.device("cpu"))

def noise(step):   # in place of 32 images' views, in the form of make_views
    g = torch.Generator().manual_seed(step)
    return [torch.randn(64, 3, size, size, generator=g) for size in (32, 16)]

def refused(mokd, flags, capsys):
    """-> the sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as error:
        mokd.parse_args(flags.split())
    assert error.value.code == 2
    return capsys.readouterr().err

def weights_of(state):
    return [state[model][kind] for model in ("model1", "model2") for kind in ("net", "momentum_net")]

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train("dataset", tmp_path_factory.mktemp("plain"))   # it leaves toy images as they are

def test_every_fork_is_small_and_tested():
    for file in (HERE / "forks").iterdir():
        added = file.read_text().count("\n+") - 1   # one is +++ b/mokd.py
        assert added <= dict(release=45, queue=45, gradient_norms=25).get(file.stem, 12)
        assert any(test.startswith(f"test_{file.stem}_") for test in globals())

def test_koleo_changes_both_models_and_is_logged(plain, tmp_path):
    _, records = train("koleo", tmp_path)
    for i in "12":
        more = records[0]["loss" + i] - plain[1][0]["loss" + i]
        assert more == pytest.approx(0.1 * records[0]["koleo" + i], rel=1e-3) and more != 0
        assert records[1]["sm" + i] != plain[1][1]["sm" + i]   # it has changed the backbone

def test_projector_is_trained_averaged_and_saved_by_two_processes_as_by_one(tmp_path):
    state, one = train("projector", tmp_path / "one")
    _, two = train("projector", tmp_path / "two", processes=2)
    for i in "12":
        assert one[-1]["p" + i] < 0.9 * one[0]["p" + i]
        assert one[-1]["p" + i] == pytest.approx(two[-1]["p" + i], rel=1e-3)
        weights = [state["model" + i][kind]["projector.weight"] for kind in ("net", "momentum_net")]
        assert not torch.equal(*weights)

def test_mixer_takes_the_place_of_the_t_head(plain, tmp_path):
    state, records = train("mixer", tmp_path)
    assert "t_head.blocks.0.mlp_tokens.fc1.weight" in state["model1"]["net"]
    assert records[0]["sm1"] == plain[1][0]["sm1"]
    assert records[-1]["loss1"] < records[0]["loss1"]
    head, Z = module_of(tmp_path).MixerHead(8, 4, 8, 1), torch.randn(2, 9, 8)
    assert not torch.allclose(*[head(Z, torch.randn(2, 8)) for _ in range(2)])   # it reads its query

def test_queue_is_the_naive_loss_among_keys_of_earlier_steps(tmp_path):
    """Losses, gradients and queues of five steps, in the last of which models train alone. A queue holds
    three batches. Gradients are those of copies that train without a queue, and of the naive loss."""
    mokd = patched("queue", tmp_path)
    flags = "--queue 96 --queue_temp 0.3 --drop_path 0 --lambda1 0.3 --lambda2 0.8"
    cfg, models = build(mokd, TWO_VITS + flags)
    mokd.Model.update = Mock()   # gradients stay
    weights = (0.3, 0.8)

    def bottleneck(net, x, view):
        z = net.mlp_head.mlp(net(x)[2].pooled[view])
        return z / z.square().sum(1, keepdim=True).sqrt()

    def naive(q, keys, queue):
        own = (q * keys).sum(1) / 0.3
        others = q @ queue.T / 0.3
        return ((own.exp() + others.exp().sum(1)).log() - own).mean()

    queues = [m.n_.queue.clone() for m in models]
    assert not torch.equal(*queues)
    assert torch.allclose(queues[0].norm(dim=1), torch.ones(96))
    for step in range(5):
        if step == 4:
            cfg.losses, weights = "sm", (0, 0)
        x, now = noise(step), mokd.schedule(cfg, step, 10)
        copies = copy.deepcopy(models)   # without gradients
        k = [bottleneck(m.n_, x[:1], 1).detach() for m in models]
        cfg.queue_weight = 0.0
        usual, _ = mokd.train_step(*copies, x, cfg, now)
        cfg.queue_weight = 0.5
        losses, _ = mokd.train_step(*models, x, cfg, now)
        for i, m in enumerate(copies):
            q = bottleneck(m.net, x, 0)
            expected = naive(q, k[i], queues[i]) + weights[i] * naive(q, k[1 - i], queues[1 - i])
            expected.mul(0.5).backward()
            assert torch.isclose(losses[f"queue{m.i}"], expected)
            assert torch.isclose(losses[f"loss{m.i}"], usual[f"loss{m.i}"] + 0.5 * expected)
            for p, p_expected in zip(models[i].net.parameters(), m.net.parameters(), strict=True):
                assert p.grad is p_expected.grad or torch.allclose(p.grad, p_expected.grad, atol=1e-5)
            models[i].net.zero_grad()
        for m, queue, keys in zip(models, queues, k):
            queue[32 * step % 96:][:32] = keys
            assert torch.allclose(m.n_.queue, queue, atol=1e-6)

def test_queue_is_trained_on_by_two_processes_as_by_one_and_after_a_signal_to_the_bit(tmp_path):
    one, records = train("queue", tmp_path / "one", "--queue 96")
    two, of_two = train("queue", tmp_path / "two", "--queue 96", processes=2)
    for i in "12":
        losses, losses_of_two = [[record["queue" + i] for record in own] for own in (records, of_two)]
        assert losses == pytest.approx(losses_of_two, rel=1e-3)
        queue, expected = [state["model" + i]["momentum_net"]["queue"] for state in (two, one)]
        assert torch.allclose(queue, expected, atol=0.01)
        assert ((queue - queue.roll(16, 0)).abs().amax(1) > 0.02).all()   # from rows of the other process
    mokd = patched("queue", tmp_path / "resumed")
    step = mokd.train_step

    def step_and_signal(model1, model2, x, cfg, now, scaler):
        if now.step == 6:   # seven steps fill the queue twice, and a third of it again
            signal.raise_signal(signal.SIGTERM)
        return step(model1, model2, x, cfg, now, scaler)
    mokd.train_step = step_and_signal
    with pytest.raises(SystemExit, match="143"):
        mokd.main(f"{TWO_VITS} --queue 96 --out {tmp_path}/resumed".split())
    resumed, _ = train("queue", tmp_path / "resumed", "--queue 96")
    starts = [record["step"] for record in records_of(tmp_path / "resumed") if "settings" in record]
    assert starts == [0, 7]
    torch.testing.assert_close(weights_of(resumed), weights_of(one), **EXACTLY)

def test_queue_of_a_part_of_a_batch_is_refused(tmp_path, capsys):
    mokd = patched("queue", tmp_path)
    for queue in (0, 32, 100):
        assert "--batch_size 64: change it" in refused(mokd, f"--demo --queue {queue}", capsys)
    mokd.parse_args([])   # the defaults are not

def test_gradient_norms_are_those_of_each_loss(tmp_path, monkeypatch):
    """Of the sum as it stands in p.grad, of a single loss as p.grad changes by it; without fp16's scale."""
    mokd = patched("gradient_norms", tmp_path)
    mokd.log = Mock()
    mokd.Model.update = Mock()   # gradients stay
    flags = SMALL + CNN.format(1) + VIT.format(2, 24)
    flags += "--norms_every 1 --drop_path 0 --lambda1 0.4 --lambda2 0.7"
    of_sm = [0, 0]
    for name, weights in ("sm", (1, 1)), ("cm", (0.4, 0.7)), ("st", (1, 1)), ("ct", (0.4, 0.7)):
        cfg, models = build(mokd, f"{flags} --losses {'sm' if name == 'sm' else 'sm,' + name}")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.update = Mock()
        mokd.train_step(*models, noise(0), cfg, mokd.schedule(cfg, 0, 10), scaler)
        record = mokd.log.call_args.args[1]
        for i, m in enumerate(models):
            params = [p for p in m.net.backbone.parameters() if p.requires_grad]
            grad = torch.cat([p.grad.flatten() for p in params]) / 1024
            alone = (grad - of_sm[i]).norm().item() / weights[i]
            assert record[f"grad_{name}{m.i}"] == pytest.approx(alone, rel=1e-3)
            assert record[f"grad_loss{m.i}"] == pytest.approx(grad.norm().item(), rel=1e-4)
            if name == "sm":
                of_sm[i] = grad

def test_gradient_norms_have_records_of_their_own_and_change_no_weight(plain, tmp_path, monkeypatch, capsys):
    state, records = train("gradient_norms", tmp_path, "--norms_every 5")
    assert [record["step"] for record in records if "grad_ct2" in record] == [5, 10, 15]
    usual = [record["sm1"] for record in plain[1]]
    assert [record["sm1"] for record in records if "sm1" in record] == usual
    torch.testing.assert_close(weights_of(state), weights_of(plain[0]), **EXACTLY)
    mokd = module_of(tmp_path)
    assert "--norms_every" in refused(mokd, "--compile", capsys)
    mokd.WORLD = 2
    assert "--norms_every" in refused(mokd, "", capsys)
    mokd.parse_args("--norms_every 0 --compile".split())   # this is not

def test_static_teacher_stands_still_while_model_2_learns(tmp_path, capsys):
    before, _ = train("dataset", tmp_path / "before", CNN.format(1))   # whose batch norms stand still too
    more = f"{CNN.format(1)} --teacher {tmp_path}/before/checkpoint.pth"
    state, records = train("static_teacher", tmp_path / "after", more)
    assert records[-1]["cm2"] < records[0]["cm2"]
    teacher, model = before["model1"]["momentum_net"], state["model1"]
    assert teacher["C_m"].any() and teacher["C_t"].any()
    torch.testing.assert_close(model["momentum_net"], teacher, **EXACTLY)   # heads and centers, too
    torch.testing.assert_close(model["net"], {name: teacher[name] for name in model["net"]}, **EXACTLY)
    assert "--teacher" in refused(module_of(tmp_path / "after"), "", capsys)

def test_dataset_of_ones_own_is_trained_on_and_k_nn_sees_chance_in_noise(tmp_path):
    state, records = train("dataset", tmp_path, "--data noise --batch_size 128 --knn_every 1")
    assert state["images"][0] == 512 and state["step"] == 4
    assert abs(records[-1]["knn1"] - 50) < 3 * 50 / 512 ** 0.5   # three errors; 77 % with queries in the bank

def test_pairing_of_ones_own_changes_the_search_alone(plain, tmp_path):
    first, usual = train("pairing", tmp_path, "--search parity")[1][0], plain[1][0]
    assert first["st1"] == usual["st1"] and first["ct1"] != usual["ct1"]
    assert module_of(tmp_path).search_pairs(6, "parity") == [(0, 2), (0, 4), (1, 3), (1, 5)]

def test_tensorboard_takes_every_record(tmp_path, monkeypatch):
    writer = Mock()
    writer_of = Mock(return_value=writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Mock(SummaryWriter=writer_of))
    train("tensorboard", tmp_path, "--log_every 8 --knn_every 1")
    assert writer_of.call_args.args == (str(tmp_path),)
    mokd = module_of(tmp_path)
    of_eval_linear = {"epoch": 1, "lr/peak": 0.1, "results": {}, "best": None}
    mokd.log(mokd.Config(out=str(tmp_path)), of_eval_linear)
    expected = []
    for record in records_of(tmp_path):
        at = record.get("step", record.get("epoch"))   # k-NN stands at its epoch
        expected += [(*item, at) for item in record.items() if isinstance(item[1], (int, float))]
    assert [call.args for call in writer.add_scalar.call_args_list] == expected
    assert {"loss1", "knn2", "lr/peak"} <= {name for name, value, at in expected}

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
def test_release_trains_any_pair_and_has_a_temperature_for_cnns_own_targets(pair, lambdas, width, tmp_path):
    mokd = patched("release", tmp_path)

    def step(**taus):
        cfg, models = build(mokd, f"{SMALL} {pair} --drop_path 0 --recipe release")
        assert (cfg.lambda1, cfg.lambda2, cfg.t_dim) == (*lambdas, width)
        now = mokd.schedule(cfg, 0, 10)._replace(**taus)
        return models, mokd.train_step(*models, noise(0), cfg, now)[0]
    models, usual = step()
    cnns = [str(m.i) for m in models if m.family == "cnn"]
    own = {name + i for name in ("sm", "st") for i in cnns}
    for tau, expected in ("tau_cnn", own | {"loss" + i for i in cnns}), ("tau_", usual.keys() - own):
        _, losses = step(**{tau: 0.2})
        assert {name for name in usual if losses[name] != usual[name]} == expected
    for m in models:
        assert m.family == "cnn" or 0.01 < m.n_.backbone.model.cls_token.std() < 0.04
        for optimizer in m.optimizers:
            for group in optimizer.param_groups:
                t_head = group["family"] != m.family   # of a CNN
                assert {t_head or p.dim() > 1 for p in group["params"]} == {group["decays"]}

def test_release_takes_the_stored_step_of_the_released_code(tmp_path):
    patched("release", tmp_path)
    for name in ("test_mokd.py", "eval_knn.py", "eval_linear.py", ".ci"):
        os.symlink(HERE.parent / name, tmp_path / name)
    (tmp_path / "conftest.py").write_text("""import mokd, numpy
parse, tau_ = mokd.parse_args, numpy.load(".ci/release_step.npz")["meta.teacher_temp"]
mokd.parse_args = lambda argv: parse(["--recipe", "release", "--teacher_temp_start", str(tau_), *argv])""")
    subprocess.run([sys.executable, *"-m pytest -q -k released_codes_step".split()], cwd=tmp_path, check=True)
