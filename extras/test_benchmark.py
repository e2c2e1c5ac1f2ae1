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
    """Bytes at the peak of a second step, by every allocation that torch's CPU allocator reports to its profiler: so
    temporaries within an operation count too, and nothing is said about storages or Python."""
    models, x = mokd.build_models(cfg, CPU), views_of(cfg)
    now = benchmark.now_of(cfg)
    mokd.train_step(*models, x, cfg, now)   # which makes the optimizers' states
    tensors = [*x]
    for m in models:
        tensors += [*m.params, *m.params_, *m.net.buffers(), *m.momentum_net.buffers()]
        tensors += [v for optimizer in m.optimizers for s in optimizer.state.values() for v in s.values() if v is not None]
    before = sum({t.data_ptr(): t.nbytes for t in tensors}.values())   # by their shapes: what a step starts with
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        mokd.train_step(*models, x, cfg, now)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return before + peak


@pytest.mark.parametrize("args", [
    [], ["--losses", "sm"], ["--recipe", "release"], ["--dtype", "bf16"], ["--grad_checkpointing", "on"], VITS], ids=" ".join)
def test_computed_memory_is_that_of_a_real_step(args):
    cfg = settings("--batch_size", 64, "--out_dim", 2048, "--drop_path", 0, *args)
    computed, measured = benchmark.compute(cfg).peak, measured_peak(cfg)
    print(f"computed {computed / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB, ratio {computed / measured:.3f}")
    assert computed == pytest.approx(measured, rel=0.1)
