"""Tests of benchmark.py.

    python -m pytest -q extras/test_benchmark.py
"""
import os
import re
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import benchmark   # noqa: E402   puts the repository on the path
import mokd   # noqa: E402
from test_mokd import PAIR, SMALL, VITS   # noqa: E402

SET = [*SMALL, *PAIR, "--freeze_last_layer", "0"]
CPU = torch.device("cpu")


def settings(*args):
    cfg = mokd.parse_args([*SET, *map(str, args)])
    mokd.fill_in_machine(cfg, CPU, 1)
    return cfg


def views_of(cfg):
    return mokd.make_views(benchmark.draw_crops(cfg, CPU), cfg, CPU, 0)


def measured_peak(cfg):
    """Bytes at the peak of a second step, by every allocation that torch's CPU allocator reports to its
    profiler. So what an operation takes for itself counts too, and neither storages nor Python are asked."""
    models, x, now = mokd.build_models(cfg, CPU), views_of(cfg), benchmark.now_of(cfg)
    mokd.train_step(*models, x, cfg, now)   # which makes the optimizers' states
    tensors = [*x]
    for m in models:
        tensors += [*m.params, *m.params_, *m.net.buffers(), *m.momentum_net.buffers()]
        for optimizer in m.optimizers:
            for state in optimizer.state.values():
                tensors += [v for v in state.values() if v is not None]
    before = sum({t.data_ptr(): t.nbytes for t in tensors}.values())   # what a step starts with
    with torch.profiler.profile(profile_memory=True) as profiler:
        mokd.train_step(*models, x, cfg, now)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return before + peak


@pytest.mark.parametrize("args", [
    [], ["--losses", "sm"], ["--recipe", "release"], ["--dtype", "bf16"], ["--grad_checkpointing", "on"],
    VITS], ids=" ".join)
def test_computed_memory_is_that_of_a_real_step(args):
    cfg = settings("--batch_size", 8, "--out_dim", 2048, "--drop_path", 0, *args)
    computed, measured = benchmark.compute(cfg).peak, measured_peak(cfg)
    print(f"computed {computed / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB: {computed / measured:.3f}")
    # A CPU without AVX-512 unfolds images to convolve them in bf16, which takes 5 % more.
    unfolds = cfg.dtype == "bf16" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    assert computed == pytest.approx(measured, rel=0.06 if unfolds else 0.02)


def test_computed_flops_are_those_that_torch_counts_in_a_real_step():
    """Attention is run as plain matrix products there, because torch does not count the CPU's fused one.
    Fused backward computes q k again, one product in five; so the two differ a little."""
    cfg = settings("--batch_size", 8, "--drop_path", 0)
    computed = benchmark.compute(cfg).flops
    models, x = mokd.build_models(cfg, CPU), views_of(cfg)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        mokd.train_step(*models, x, cfg, benchmark.now_of(cfg))
    assert computed.total() == pytest.approx(counter.get_total_flops(), rel=0.03)
    students = sum(n for part, n in computed.items() if part.startswith(("backbone", "logits", "students")))
    assert students < computed["backward"] <= 2.05 * students   # images need no gradient
    assert computed["search"] > 0 and "search" not in benchmark.compute(settings("--losses", "sm")).flops


def test_fused_attention_counts_as_two_matrix_products():
    q = torch.randn(2, 3, 16, 8, requires_grad=True)
    with benchmark.Meter() as meter:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        forward = meter.flops.total()
        out.sum().backward()
    assert forward == 2 * 2 * (2 * 3 * 16 * 16 * 8) and meter.flops.total() == 3.5 * forward


def test_memory_is_printed_by_part_and_grows_with_the_batch(capsys):
    totals = []
    for batch_size in (16, 32):
        assert run("--memory", "--batch_size", batch_size, "--out_dim", 2048) == 0
        text = capsys.readouterr().out
        for word in ("backbone 1, resnet18", "backbone 2, vit_tiny", "logits", "optimizer", "allocator"):
            assert word in text
        rows = [line.split() for line in text.splitlines() if re.search(r"\d\.\d+ +\d\.\d+$", line)]
        assert float(rows[-1][-1]) == pytest.approx(sum(float(row[-1]) for row in rows[:-1]), abs=0.003)
        totals.append(float(rows[-1][-1]))
    assert totals[0] < totals[1]


def run(*args):
    """The program by its command line, in this process -> its exit code."""
    return mokd.main([*SET, *map(str, args)], "extras/benchmark.py", benchmark.parse, benchmark.run)


def test_a_benchmark_prints_where_time_and_memory_go(capsys):
    assert run("--steps", 2, "--data", "toy", "--workers", 1) == 0
    text = capsys.readouterr().out
    for words in ("kept on the device: ", "through 1 workers: ", "waiting for data", "views", "students",
                  "momentum nets", "search", "losses", "backward", "update", "GFLOP an image", "GB computed",
                  "decode", "PIL"):
        assert words in text
    for line in text.splitlines()[:2]:
        total, *parts = map(float, re.findall(r" (\d+\.\d)(?: ms|,|$)", line.split("images/s,")[1]))
        assert sum(parts) == pytest.approx(total, rel=0.05)


def test_parts_are_told_from_outside_and_leave_no_trace():
    cfg = settings()
    models, x, told = mokd.build_models(cfg, CPU), views_of(cfg), []
    search = mokd.search
    with benchmark.marked(models, told.append):
        scaler = benchmark.Scaler(told.append, "cpu", False)
        losses, _ = mokd.train_step(*models, x, cfg, benchmark.now_of(cfg), scaler)
    forward = ["students"] * 2 + ["momentum nets", "search"] * 2 + ["search", "losses"] * 2
    assert told == forward + ["backward"] * 2 + ["update"] * 2
    assert mokd.search is search
    assert all(m.n_ is m.momentum_net and not {"n", "update"} & vars(m).keys() for m in models)
    again, _ = mokd.train_step(*mokd.build_models(settings(), CPU), x, cfg, benchmark.now_of(cfg))
    assert again == losses   # and change nothing


def test_two_settings_take_turns(capsys, monkeypatch):
    """The second setting's steps are slowed down here by as much as a step takes."""
    steps, real = [], mokd.train_step

    def slower(model1, model2, x, cfg, now, scaler):
        steps.append(cfg.losses)
        if cfg.losses == "sm":
            for _ in range(4):
                real(model1, model2, x, cfg, now)
        return real(model1, model2, x, cfg, now, scaler)
    monkeypatch.setattr(mokd, "train_step", slower)
    assert run("--steps", 2, "--compare", "--losses sm") == 0
    assert steps == (["sm,cm,st,ct"] * 2 + ["sm"] * 2) * 5
    found = re.search(r"images (\S+) .* sm (\S+) .*: (\S+) to 1", capsys.readouterr().out)
    first, second, ratio = map(float, found.groups())
    assert ratio == pytest.approx(first / second, abs=0.01) and ratio < 0.8


def test_the_table_for_a_gpu_has_a_row_for_each_measurement(monkeypatch):
    """On the CPU, and of two measurements."""
    for name in [*benchmark.MEASUREMENTS][2:]:
        monkeypatch.delitem(benchmark.MEASUREMENTS, name)
    images, argv = mokd.get_data(settings())[0], [*SET, "--workers", "1"]
    lines = benchmark.table(argv, images, CPU, 1, [8])
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(benchmark.MEASUREMENTS) + 1 and len({row.count("|") for row in rows}) == 1
    assert "| all losses | 8 |" in rows[2] and " 1.00 |" in rows[2] and "workers" in rows[-1]
    late = benchmark.table(argv, images, CPU, 1, [8], limit=0.01)
    assert "--losses sm" in late[-1] and "Left out" in late[-1] and "all losses |" in late[2]


def test_a_batch_that_does_not_fit_gives_way_to_a_smaller_one(monkeypatch):
    real = benchmark.time_steps

    def small_gpu(cfg, *args):
        if cfg.batch_size > 4:
            raise torch.cuda.OutOfMemoryError("too large")
        return real(cfg, *args)
    monkeypatch.setattr(benchmark, "time_steps", small_gpu)
    assert benchmark.measure(SET, CPU, 1, [16, 8, 4, 2])[0].batch_size == 4
    with pytest.raises(mokd.UserError, match="--batch_size 8"):
        benchmark.measure(SET, CPU, 1, [16, 8])


def test_drawn_images_are_jpegs_and_the_usual_pipeline_takes_several_times_as_long():
    cfg = mokd.parse_args([])
    with benchmark.images_of(cfg, drawn=True) as images:
        folder = cfg.data
        assert len(images) == 64 and images[0][0].shape == (3, 375, 500)
        image = benchmark.Image.open(images.samples[0][0]).convert("RGB")
        views = [view(image) for view in benchmark.usual_pipeline(cfg)]
        assert [v.shape for v in views] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8
        decode, crop, usual = benchmark.time_worker(cfg, images, 8)
    assert usual > 3 * (decode + crop) > 0 and not os.path.exists(folder)


@pytest.mark.parametrize("args, word", [
    (["--steps", "0"], "--steps 0"), (["--memory", "--gpu"], "one of"), (["--memory", "--arch1", "x9"], "x9"),
    (["--compare", "--losses st"], "--losses st"), (["--gpu"], "no CUDA device")])
def test_what_cannot_be_measured_is_named(args, word, capsys, monkeypatch):
    monkeypatch.setattr(mokd, "join_processes", lambda: (CPU, 0, 1))
    assert run(*args) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("extras/benchmark.py: ") and word in message and len(message.splitlines()) == 1
