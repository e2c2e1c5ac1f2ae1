"""Tests of benchmark.py.

    python -m pytest -q extras/test_benchmark.py
"""
import dataclasses, os, re, sys   # noqa: E401

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import benchmark   # puts the folder of mokd.py on the path
import mokd

CPU = torch.device("cpu")
DEMO = "--demo --batch_size 8 --local_crops 1".split()
VIT = "img_size=24 patch_size=8 embed_dim=24 depth=1 num_heads=2".split()
TINY = [*DEMO, "--local_crops", "0", "--losses", "sm", "--arch1", "vit_tiny", "--model_kwargs1", *VIT,
        "--arch2", "vit_tiny", "--model_kwargs2", *VIT]

def settings(*args):
    cfg = mokd.parse_args(list(args))
    mokd.join_processes(cfg)
    return cfg

def measured_gb(cfg):
    """The peak of a real second step, from every allocation that the CPU's allocator reports to the profiler.
    So what an operation takes for itself counts too, and storages are not asked."""
    models, now = mokd.build_models(cfg, CPU), benchmark.settled(cfg)
    x = mokd.make_views(benchmark.random_crops(cfg, CPU), cfg, CPU, 0)
    mokd.train_step(*models, x, cfg, now)   # which makes the optimizers' states
    tensors = [*x]
    for m in models:
        for net in (m.net, m.n_):
            tensors += [*net.parameters(), *net.buffers()]
        for optimizer in m.optimizers:
            for state in optimizer.state.values():
                tensors += [value for value in state.values() if value is not None]
    before = sum(tensor.nbytes for tensor in tensors)
    with torch.profiler.profile(profile_memory=True) as profiler:
        mokd.train_step(*models, x, cfg, now)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return (before + peak) / 1e9

@pytest.mark.parametrize("args", ["", "--out_dim 2048 --grad_checkpointing --cnn_optimizer sgd"])
def test_computed_memory_is_that_of_a_real_step(args):
    cfg = settings(*DEMO, *args.split())
    computed, _ = benchmark.compute(cfg)
    assert computed == pytest.approx(measured_gb(cfg), rel=0.02)

def test_flops_equal_a_hand_count():
    """Of two ViTs of one block, alone, on global views: 9 patches of 8 x 8 pixels and CLS, width 24."""
    cfg = settings(*TINY, "--hidden_dim", "20", "--bottleneck_dim", "16", "--out_dim", "32")
    embedding = 2 * 9 * (3 * 8 * 8) * 24
    block = 2 * 10 * (24 * 3 * 24 + 24 * 24 + 24 * 96 + 96 * 24)   # qkv, proj, fc1, fc2
    attention = 2 * 2 * 10 * 10 * 24   # q k, and the weighted sum of v
    head = 2 * (24 * 20 + 20 * 20 + 20 * 16 + 16 * 32)
    forward = embedding + block + attention + head
    # Backward is two products for each of forward's, but images need no gradient. Attention has one more,
    # because its weights are computed again.
    backward = embedding + 2 * block + 2.5 * attention + 2 * head
    views, models = 2, 2
    student_and_momentum_net = views * (2 * forward + backward)
    _, gflop = benchmark.compute(cfg)
    assert 1e9 * gflop == pytest.approx(models * student_and_momentum_net, rel=1e-9)

def test_a_benchmark_prints_what_a_step_costs_and_compiled_beside_eager(capsys, monkeypatch):
    asked, measure = [], benchmark.measure

    def measure_eager(cfg, device, steps):
        asked.append((cfg.compile, steps))
        return measure(dataclasses.replace(cfg, compile=False), device, steps)
    monkeypatch.setattr(benchmark, "measure", measure_eager)
    mokd.main([*TINY, "--compile", "--steps", "2"], benchmark.parse, benchmark.run)
    assert asked == [(False, 2), (True, 2)]
    for name, line in zip(("eager", "compiled"), capsys.readouterr().out.splitlines(), strict=True):
        images_s, ms, gflop, tflop_s, gb = map(float, re.findall(r"(?<= )[\d.e-]+(?= )", line))
        assert line.startswith(f"{name}: ") and images_s == pytest.approx(8000 / ms, rel=0.1)
        assert tflop_s == pytest.approx(gflop * images_s / 1000, rel=0.02)
        assert [gb, gflop] == pytest.approx(benchmark.compute(settings(*TINY)), rel=0.001)

def test_steps_are_timed_after_three_that_are_not(monkeypatch):
    done = []
    monkeypatch.setattr(mokd, "train_step", lambda *args: done.append(args))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: len(done))
    assert benchmark.measure(settings(*TINY), CPU, 5) == (1, None) and len(done) == 8

def test_memory_needs_no_device_and_grows_with_the_batch(capsys, monkeypatch):
    monkeypatch.setattr(mokd, "join_processes", None)
    found = []
    for n in ("8", "16"):
        mokd.main([*TINY, "--memory", "--batch_size", n], benchmark.parse, benchmark.run)
        numbers = re.findall(r"([\d.e-]+) (?:GB at|GFLOP)", capsys.readouterr().out)
        found.append([float(number) for number in numbers])
    (small, flops), (large, same_flops) = found
    assert small < large < 2 * small   # the weights' share stays
    assert flops == same_flops   # of an image

def test_the_table_has_a_row_for_each_setting_also_where_it_does_not_fit(capsys, monkeypatch):
    def measure(cfg, device, steps):
        if cfg.losses == "sm":
            raise torch.cuda.OutOfMemoryError
        return 0.5, 2.0
    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "compute", lambda cfg: (cfg.batch_size / 10, 100.0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    mokd.main([*DEMO, "--gpu"], benchmark.parse, benchmark.run)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(benchmark.ROWS) and {row.count("|") for row in rows} == {6}
    assert rows[2] == "| **all losses** | 100.0 | 3.2 | 16 | 2.0 |"
    assert rows[3] == "| `--losses sm` | 100.0 | 3.2 | does not fit | |"
