"""Each patch in extras/forks is applied to a copy of mokd.py, which then shows its effect."""
import copy
import importlib.util
import json
import multiprocessing
import os
import pathlib
import shutil
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
NESTED = ("settings", "run", "losses", "results")   # what programs log as a dict
TWO_VITS = VIT.format(1, 32) + VIT.format(2, 24) + "--t_dim 24 "

def module_of(file, name="mokd"):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def patched(name, folder):
    """A copy of mokd.py with a patch, and with fewer toy images -> its module."""
    file = pathlib.Path(shutil.copy(HERE.parent / "mokd.py", folder))
    subprocess.run(["git", "apply", f"{HERE}/forks/{name}.patch"], cwd=folder, check=True,
                   env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
    file.write_text(file.read_text().replace("4096 if", "512 if"))
    return module_of(file)

def train(name, folder, more=""):   # two small ViTs, 16 steps of 32 images
    patched(name, folder).main(f"{SMALL} {TWO_VITS} --out {folder}/out {more}".split())
    return results_of(folder / "out")

def results_of(out):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    records = [record for record in records if "settings" not in record]
    return torch.load(out / "checkpoint.pth", weights_only=True), records

def train_by_two(name, folder, more=""):
    """The same by two processes, forked because they need not import torch then. Each leaves its momentum
    nets."""
    patched(name, folder)
    flags = f"{SMALL} {TWO_VITS} --out {folder}/out {more}".split()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one_of_two, args=(rank, folder, flags)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()   # one that waits for the other
    assert [process.exitcode for process in processes] == [0, 0]
    return results_of(folder / "out")

def one_of_two(rank, folder, flags):
    torch.set_num_threads(1)   # those of its parent are not there
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    mokd = module_of(folder / "mokd.py")
    mokd.train = Mock(wraps=mokd.train)
    mokd.main(flags)
    _, models, *_ = mokd.train.call_args.args
    torch.save([m.n_.state_dict() for m in models], folder / f"rank{rank}.pth")

def noise(step, images=32):
    """Noise in place of views, in the form of make_views."""
    g = torch.Generator().manual_seed(step)
    return [torch.randn(2 * images, 3, size, size, generator=g) for size in (32, 16)]

def refused(mokd, flags, capsys):
    """-> the sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as error:
        mokd.parse_args(flags.split())
    assert error.value.code == 2
    return capsys.readouterr().err

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
    (tmp_path / "two").mkdir()
    state, one = train("projector", tmp_path)
    _, two = train_by_two("projector", tmp_path / "two")
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

def test_queue_is_the_naive_loss_among_keys_of_earlier_steps(tmp_path):
    """Losses, gradients and queues of four steps, where a queue holds three batches."""
    mokd = patched("queue", tmp_path)
    flags = f"{SMALL} {TWO_VITS} --queue 96 --queue_temp 0.3 --drop_path 0 --lambda1 0.3 --lambda2 0.8"
    cfg = mokd.parse_args(flags.split())
    models = mokd.build_models(cfg, torch.device("cpu"))
    reached, grads = [], {}

    def bottleneck(net, x, view):
        z = net.mlp_head.mlp(net(x)[2].pooled[view])
        return z / z.square().sum(1, keepdim=True).sqrt()

    def naive(q, k, queue):
        losses = []
        for i in range(len(q)):
            scores = torch.cat([k[i:i + 1], queue]) @ q[i] / 0.3
            losses.append(scores.exp().sum().log() - scores[0])
        return sum(losses) / len(losses)

    def trained(m):
        return [p for p in m.net.parameters() if p.requires_grad]

    def scale(loss):   # which models does it reach, before its backward pass?
        for m in models:
            of_model = torch.autograd.grad(loss, trained(m), retain_graph=True, allow_unused=True)
            reached.append(any(grad is not None for grad in of_model))
        return loss

    def update_and_record(m, now, scaler):
        grads[m.i] = [p.grad.clone() for p in trained(m)]
        update(m, now, scaler)
    update, mokd.Model.update = mokd.Model.update, update_and_record
    scaler = torch.amp.GradScaler(enabled=False)
    scaler.scale = scale

    queues = [m.n_.queue.clone() for m in models]
    assert not torch.equal(*queues)
    assert torch.allclose(queues[0].norm(dim=1), torch.ones(96))
    for step in range(4):
        x, now = noise(step), mokd.schedule(cfg, step, 10)
        q = [bottleneck(m.net, x, 0) for m in models]
        k = [bottleneck(m.n_, x[:1], 1).detach() for m in models]
        expected = [naive(q[0], k[0], queues[0]) + 0.3 * naive(q[0], k[1], queues[1]),
                    naive(q[1], k[1], queues[1]) + 0.8 * naive(q[1], k[0], queues[0])]
        more = [torch.autograd.grad(loss, trained(m), materialize_grads=True)
                for loss, m in zip(expected, models)]
        cfg.queue_weight = 0.0
        usual, _ = mokd.train_step(*copy.deepcopy(models), x, cfg, now)
        usual_grads = dict(grads)
        cfg.queue_weight = 0.5
        losses, _ = mokd.train_step(*models, x, cfg, now, scaler)
        assert reached[-4:] == [True, False, False, True]   # loss1 one model, loss2 the other
        for i, m in enumerate(models):
            loss = expected[i].item()
            assert losses[f"queue{m.i}"].item() == pytest.approx(loss, rel=1e-5)
            added = losses[f"loss{m.i}"] - usual[f"loss{m.i}"]
            assert added.item() == pytest.approx(loss / 2, rel=1e-4)
            for grad, of_usual, of_queue in zip(grads[m.i], usual_grads[m.i], more[i], strict=True):
                assert torch.allclose(grad, of_usual + 0.5 * of_queue, atol=1e-5)
            queues[i][32 * step % 96:][:32] = k[i]
            assert torch.allclose(m.n_.queue, queues[i], atol=1e-6)
            assert m.n_.pointer == 32 * (step + 1) % 96

def test_queue_leaves_models_apart_that_train_alone(tmp_path):
    """With --losses sm, model 2 may be any."""
    mokd, found = patched("queue", tmp_path), []
    for other in (24, 48):
        flags = f"{SMALL} {VIT.format(1, 32)} {VIT.format(2, other)} --queue 32 --losses sm"
        cfg = mokd.parse_args(flags.split())
        models = mokd.build_models(cfg, torch.device("cpu"))
        for step in range(2):
            losses, _ = mokd.train_step(*models, noise(step), cfg, mokd.schedule(cfg, step, 10))
        found.append(losses)
    assert found[0]["queue1"] == found[1]["queue1"] and found[0]["queue2"] != found[1]["queue2"]

@pytest.fixture(scope="module")
def queued(tmp_path_factory):
    return train("queue", tmp_path_factory.mktemp("queued"), "--queue 96")

def test_queue_is_that_of_one_process_in_each_of_two(queued, tmp_path):
    state, records = train_by_two("queue", tmp_path, "--queue 96")
    of_ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    for i in "12":
        for name in ("queue1", "queue2"):
            assert records[-1][name] == pytest.approx(queued[1][-1][name], rel=1e-3)
        one = queued[0]["model" + i]["momentum_net"]
        for name, values in of_ranks[0][int(i) - 1].items():
            assert torch.equal(values, of_ranks[1][int(i) - 1][name])
        queue = of_ranks[0][int(i) - 1]["queue"]
        assert torch.allclose(queue, one["queue"], atol=0.01)
        assert ((queue - queue.roll(16, 0)).abs().amax(1) > 0.02).all()   # from rows of the other process
        assert one["pointer"] == 16 * 32 % 96

def test_queue_goes_on_to_the_bit_after_a_signal(queued, tmp_path):
    mokd = patched("queue", tmp_path)
    step, flags = mokd.train_step, f"{SMALL} {TWO_VITS} --queue 96 --out {tmp_path}/out".split()

    def step_and_signal(model1, model2, x, cfg, now, scaler):
        if now.step == 6:   # seven steps fill the queue twice, and a third of it again
            signal.raise_signal(signal.SIGTERM)
        return step(model1, model2, x, cfg, now, scaler)
    mokd.train_step = step_and_signal
    with pytest.raises(SystemExit, match="143"):
        mokd.main(flags)
    stopped, _ = results_of(tmp_path / "out")
    assert stopped["step"] == 7 and stopped["model1"]["momentum_net"]["pointer"] == 32
    mokd.train_step = step
    mokd.main(flags)
    state, _ = results_of(tmp_path / "out")
    for i, kind in ("1", "net"), ("2", "net"), ("1", "momentum_net"), ("2", "momentum_net"):
        for name, values in queued[0]["model" + i][kind].items():
            assert torch.equal(state["model" + i][kind][name], values), name

def test_queue_of_a_part_of_a_batch_is_refused(tmp_path, capsys):
    mokd = patched("queue", tmp_path)
    for queue in (0, 32, 100):
        assert "--batch_size 64: change it" in refused(mokd, f"--demo --queue {queue}", capsys)
    assert mokd.parse_args("--demo --queue 128".split()).queue == 128
    mokd.parse_args([])   # nor are the defaults

def test_gradient_norms_are_those_of_the_parameters_gradients(tmp_path, monkeypatch):
    """Of the sum as it stands in p.grad, of a single loss as p.grad changes by it; without fp16's scale."""
    mokd = patched("gradient_norms", tmp_path)
    grads = []

    def record_in_place_of_update(m, now, scaler):
        params = [p for p in m.net.backbone.parameters() if p.requires_grad]
        grads.append(torch.cat([p.grad.flatten() for p in params]) / 1024)
    monkeypatch.setattr(mokd.Model, "update", record_in_place_of_update)
    monkeypatch.setattr(mokd, "log", Mock())

    def step(losses):   # -> gradients on both backbones, the record
        grads.clear()
        flags = f"{SMALL} {CNN.format(1)} {VIT.format(2, 24)} --norms_every 1 --losses {losses} --drop_path 0"
        cfg = mokd.parse_args(f"{flags} --lambda1 0.4 --lambda2 0.7".split())
        models = mokd.build_models(cfg, torch.device("cpu"))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.update = Mock()   # no optimizer has taken a step
        mokd.train_step(*models, noise(0), cfg, mokd.schedule(cfg, 0, 10), scaler)
        return list(grads), mokd.log.call_args.args[1]

    sm, record = step("sm")
    assert record.keys() == {"epoch", "step", "grad_loss1", "grad_loss2", "grad_sm1", "grad_sm2"}
    for i in range(2):
        for name in ("loss", "sm"):
            assert record[f"grad_{name}{i + 1}"] == pytest.approx(sm[i].norm().item(), rel=1e-4)
    for name, weights in ("cm", (0.4, 0.7)), ("st", (1, 1)), ("ct", (0.4, 0.7)):
        both, record = step("sm," + name)
        for i in range(2):
            alone = (both[i] - sm[i]).norm().item() / weights[i]
            assert record[f"grad_{name}{i + 1}"] == pytest.approx(alone, rel=1e-3)
            assert record[f"grad_loss{i + 1}"] == pytest.approx(both[i].norm().item(), rel=1e-4)

def test_gradient_norms_have_records_of_their_own_and_change_no_weight(plain, tmp_path):
    state, records = train("gradient_norms", tmp_path, "--norms_every 5")
    norms = [record for record in records if "grad_loss1" in record]
    others = [record for record in records if "grad_loss1" not in record]
    assert [record["step"] for record in norms] == [5, 10, 15]
    names = "loss1 sm1 st1 cm1 ct1 loss2 sm2 st2 cm2 ct2".split()
    for record in norms:
        assert record.keys() == {"epoch", "step", *[f"grad_{name}" for name in names]}
    for mine, usual in zip(others, plain[1], strict=True):
        assert mine.keys() == usual.keys() and mine["loss1"] == usual["loss1"]
    for i, kind in ("1", "net"), ("2", "net"), ("1", "momentum_net"), ("2", "momentum_net"):
        for name, values in plain[0]["model" + i][kind].items():
            assert torch.equal(state["model" + i][kind][name], values), name

def test_gradient_norms_of_several_processes_or_compiled_are_refused(tmp_path, monkeypatch, capsys):
    mokd = patched("gradient_norms", tmp_path)
    assert "--norms_every" in refused(mokd, "--compile", capsys)
    monkeypatch.setattr(mokd, "WORLD", 2)
    assert "--norms_every" in refused(mokd, "", capsys)
    mokd.parse_args("--norms_every 0 --compile".split())   # this is not

def test_static_teacher_stands_still_while_model_2_learns(plain, tmp_path, capsys):
    torch.save(plain[0], tmp_path / "teacher.pth")
    state, records = train("static_teacher", tmp_path, f"--teacher {tmp_path}/teacher.pth")
    assert records[-1]["cm2"] < records[0]["cm2"]
    teacher = plain[0]["model1"]["momentum_net"]
    assert teacher["C_m"].any() and teacher["C_t"].any()
    assert teacher.keys() == state["model1"]["momentum_net"].keys()
    for name, values in teacher.items():   # heads and centers, too
        assert torch.equal(state["model1"]["momentum_net"][name], values), name
        assert name in ("C_m", "C_t") or torch.equal(state["model1"]["net"][name], values), name
    assert "--teacher" in refused(module_of(tmp_path / "mokd.py"), "", capsys)

def test_static_teacher_that_is_a_cnn_stands_still_in_its_batch_norms_too(tmp_path):
    mokd, file = patched("static_teacher", tmp_path), tmp_path / "teacher.pth"
    cfg = mokd.parse_args(f"{SMALL} {CNN.format(1)} {VIT.format(2, 24)} --teacher {file}".split())
    net = mokd.Net(mokd.Backbone("resnet18", cfg.model_kwargs1, size=32), cfg)
    teacher = dict(net.state_dict(), C_m=torch.randn(1, 32), C_t=torch.randn(1, 32))
    torch.save(dict(model1=dict(momentum_net=teacher)), file)
    models = mokd.build_models(cfg, torch.device("cpu"))
    for step in range(2):
        mokd.train_step(*models, noise(step), cfg, mokd.schedule(cfg, step, 10))
    for found in (models[0].n_.state_dict(), models[0].net.state_dict() | dict(C_m=None, C_t=None)):
        assert found.keys() == teacher.keys()
        assert all(values is None or torch.equal(values, teacher[name]) for name, values in found.items())

def test_dataset_of_ones_own_is_trained_on_and_k_nn_sees_chance_in_noise(tmp_path):
    state, records = train("dataset", tmp_path, "--data noise --batch_size 128 --knn_every 1")
    assert state["images"][0] == 512 and state["step"] == 4
    knn = records[-1]
    error = 100 * 0.5 / 512 ** 0.5   # of 512 answers that are guessed
    for top1 in (knn["knn1"], knn["knn2"]):
        assert abs(top1 - 50) < 3 * error   # 77 % where the bank has the queries themselves

def test_pairing_of_ones_own_changes_the_search_alone(plain, tmp_path):
    first, usual = train("pairing", tmp_path, "--search parity")[1][0], plain[1][0]
    assert first["st1"] == usual["st1"] and first["ct1"] != usual["ct1"]

def test_tensorboard_takes_every_record_of_training_and_evaluations(tmp_path, monkeypatch):
    points = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            points.append((self.folder, name, float(value), int(step)))   # of a dict or None there is none

        def flush(self):
            pass
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Mock(SummaryWriter=Writer))
    train("tensorboard", tmp_path, "--log_every 8 --knn_every 1")
    mokd = module_of(tmp_path / "mokd.py")
    mokd.log(mokd.Config(out=f"{tmp_path}/out"), dict(settings=dict(seed=0, model_kwargs1=None), step=0))
    monkeypatch.setitem(sys.modules, "mokd", mokd)
    trained = f"--checkpoint {tmp_path}/out/checkpoint.pth --workers 0 --batch_size 256 ".split()
    probing = "--epochs 1 --warmup_epochs 0 --log_every 1 --lr 0.1".split()
    for name, more in ("eval_knn", []), ("eval_linear", probing):
        program = module_of(HERE.parent / f"{name}.py", name)
        monkeypatch.setitem(sys.modules, name, program)
        mokd.main(trained + more, program.parse, program.run)
    expected = []
    for folder in (f"{tmp_path}/out", f"{tmp_path}/out/linear"):
        for line in pathlib.Path(folder, "log.jsonl").read_text().splitlines():
            record = json.loads(line)
            at = record.get("step", record.get("epoch"))   # k-NN stands at its epoch
            expected += [(folder, name, value, at) for name, value in record.items() if name not in NESTED]
    assert points == expected
    names = {(pathlib.Path(folder).name, name) for folder, name, value, step in points}
    assert names > {("out", "loss1"), ("out", "knn2"), ("linear", "lr/peak"), ("linear", "epoch")}

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
    mokd.get_images = lambda cfg, part: torch.utils.data.TensorDataset(*mokd.draw_toy(64, part))
    mokd.main(f"{SMALL} {pair} --recipe release --out {tmp_path}/out".split())
    cfg, models = mokd.train.call_args.args[:2]
    assert (cfg.lambda1, cfg.lambda2, cfg.t_dim) == (*lambdas, width)
    own = [0.04 if m.family == "cnn" else 0.07 for m in models]   # tau' in epoch 0, for sm and st
    taus = [0.07, 0.07, own[0], own[0], own[1], own[1], 0.07, 0.07]   # before it for ct, after it for cm
    assert [call.args[2] for call in mokd.target.call_args_list] == taus * 2   # of two steps
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
    flags = SMALL + CNN.format(1) + VIT.format(2, 24)
    flags += "--recipe release --drop_path 0 --lambda1 1 --lambda2 1"
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
