"""Each patch in extras/forks is applied to a copy of mokd.py, which trains a little and shows its effect.

    python -m pytest -q extras/test_forks.py
"""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

os.environ["CUDA_VISIBLE_DEVICES"] = ""   # digits of the CPU are compared
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
NETS = ("--arch1 vit_tiny --model_kwargs1 img_size=32 patch_size=8 embed_dim=32 depth=1 num_heads=2 "
        "--arch2 vit_tiny --model_kwargs2 img_size=32 patch_size=8 embed_dim=24 depth=1 num_heads=2").split()
SMALL = ("--data toy --out_dim 32 --hidden_dim 16 --bottleneck_dim 8 --t_dim 24 --t_heads 2 --t_depth 1 "
         "--global_size 32 --local_size 16 --local_crops 2 --batch_size 128 --epochs 1 --warmup_epochs 0 "
         "--teacher_temp_epochs 1 "
         "--workers 0 --freeze_last_layer 0 --vit_lr 0.001 --blur 0 0 --log_every 1").split()
FORKS = sorted(file.removesuffix(".patch") for file in os.listdir(os.path.join(HERE, "forks")))


def fork(name, folder):
    """A copy of mokd.py, with a patch applied -> its folder."""
    folder.mkdir(exist_ok=True)
    shutil.copy(os.path.join(ROOT, "mokd.py"), folder)
    if name:
        subprocess.run(["git", "apply", os.path.join(HERE, "forks", f"{name}.patch")], cwd=folder, check=True,
                       env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
    return folder


def train(folder, *args, processes=1):
    """Train 32 steps of 128 images -> checkpoint, log records."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    command = [sys.executable, *launch, "mokd.py", *SMALL, *NETS, "--out", "out", *map(str, args)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    with open(folder / "out" / "log.jsonl") as f:
        records = [json.loads(line) for line in f]
    return torch.load(folder / "out" / "checkpoint.pth", weights_only=True), records


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(fork(None, tmp_path_factory.mktemp("plain")))


def test_every_fork_is_small_and_tested():
    assert FORKS == ["dataset", "koleo", "mixer", "pairing", "projector", "static_teacher"]
    for name in FORKS:
        with open(os.path.join(HERE, "forks", f"{name}.patch")) as f:
            patch = f.read()
        assert len(re.findall(r"^\+(?!\+\+)", patch, re.M)) <= 12 and len(re.findall("^@@", patch, re.M)) <= 3
        assert f"def test_{name}_" in open(__file__).read()


def test_koleo_changes_both_models_and_is_logged(plain, tmp_path):
    state, records = train(fork("koleo", tmp_path / "f"))
    assert all(key in records[0] for key in ("koleo1", "koleo2", "loss1"))
    for model in ("model1", "model2"):
        for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):   # it reaches the first layers
            name = "backbone.model." + name
            assert not torch.equal(state[model]["net"][name], plain[0][model]["net"][name])
    assert records[0]["sm1"] == plain[1][0]["sm1"]   # the first step's other losses are as they were


@pytest.mark.parametrize("processes", [1, 2])
def test_projector_moves_is_averaged_and_saved(processes, tmp_path):
    state, records = train(fork("projector", tmp_path / "f"), processes=processes)
    assert records[-1]["p1"] < 0.9 * records[0]["p1"] and records[-1]["p2"] < 0.9 * records[0]["p2"]
    for model in ("model1", "model2"):
        weight = state[model]["net"]["projector.weight"]
        average = state[model]["momentum_net"]["projector.weight"]
        assert weight.shape[0] == 64 and not torch.equal(weight, average)
        groups = [group for optimizer in state[model]["optimizers"] for group in optimizer["param_groups"]]
        kept = sum(len(group["params"]) for group in groups)
        assert kept == len(state[model]["net"])   # every parameter of the net; these nets have no buffers


def test_mixer_takes_the_place_of_the_t_head(plain, tmp_path):
    state, records = train(fork("mixer", tmp_path / "f"))
    names = state["model1"]["net"]
    assert "t_head.blocks.0.mlp_tokens.fc1.weight" in names and "t_head.pos" not in names
    assert records[0]["sm1"] == plain[1][0]["sm1"] and records[0]["ct1"] != plain[1][0]["ct1"]
    assert records[-1]["loss1"] < records[0]["loss1"]


def test_static_teacher_stands_still_while_model_2_learns(plain, tmp_path):
    folder = fork("static_teacher", tmp_path / "f")
    weights = {name.removeprefix("backbone.model."): w for name, w in plain[0]["model1"]["net"].items()
               if name.startswith("backbone.model.")}
    torch.save(weights, folder / "teacher.pth")
    state, records = train(folder, "--init1", "teacher.pth")
    for name, w in weights.items():
        assert torch.equal(state["model1"]["net"]["backbone.model." + name], w), name
        assert torch.equal(state["model1"]["momentum_net"]["backbone.model." + name], w), name
    assert records[-1]["cm2"] < records[0]["cm2"]


def test_dataset_of_ones_own_is_trained_on(tmp_path):
    state, records = train(fork("dataset", tmp_path / "f"), "--data", "noise")
    assert state["images"] == 512 and records[-1]["steps"] == 4


def test_pairing_of_ones_own_changes_the_search_alone(plain, tmp_path):
    _, records = train(fork("pairing", tmp_path / "f"), "--search", "parity")
    first, usual = records[0], plain[1][0]
    assert first["st1"] == usual["st1"] and first["ct1"] != usual["ct1"] and first["ct2"] != usual["ct2"]
