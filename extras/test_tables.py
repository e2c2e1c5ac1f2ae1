"""What eval_knn.py and eval_linear.py leave for tables: each file's rows, settings in the log."""
import json, os, sys   # noqa: E401

import pytest
import torch
from torch.utils.data import TensorDataset

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import eval_knn   # noqa: E402
import eval_linear   # noqa: E402
import mokd   # noqa: E402

NAMES = ["1 resnet18", "2 vit_tiny"]

@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of an untrained run on a few toy images, with two checkpoints."""
    images = {part: TensorDataset(*mokd.draw_toy(n, part)) for part, n in (("train", 64), ("val", 16))}
    monkeypatch.setattr(mokd, "get_images", lambda cfg, part: images[part])
    cfg = mokd.parse_args(["--demo", "--seed", "3", "--out", str(tmp_path)])
    models = mokd.build_models(cfg, torch.device("cpu"))
    for name in ("epoch1.pth", "checkpoint.pth"):
        mokd.save(cfg, models, 1, torch.amp.GradScaler(enabled=False), images["train"])
        os.rename(tmp_path / "checkpoint.pth", tmp_path / name)
    return tmp_path

def evaluate(program, folder, *args):
    args = ["--checkpoint", f"{folder}/checkpoint.pth", "--workers", "0", *args]
    mokd.main(args, program.parse, program.run)

def records(file):
    return [json.loads(line) for line in open(file)]

def test_two_checkpoints_of_a_folder_keep_their_rows_and_the_folder_of_features_is_made(run, monkeypatch):
    both = ["--checkpoint", f"{run}/checkpoint.pth", f"{run}/epoch1.pth", "--save"]
    evaluate(eval_knn, run, *both, f"{run}/some/feats/x.pth")
    rows = [f"{of}: {name}" for of in (run, f"{run}/epoch1.pth") for name in NAMES]
    table = records(run / "knn.jsonl")[-1]
    assert [*table["results"]] == rows and len(table["agreement"]) == 6
    assert torch.load(run / "some/feats/x.pth")["val"]["features"][rows[0]].shape == (16, 64)
    monkeypatch.setattr(mokd, "extract_features", lambda *args: pytest.fail("too early"))
    with pytest.raises(OSError):
        evaluate(eval_knn, run, *both, f"{run}/knn.jsonl/x.pth")

def test_the_log_begins_with_all_settings_and_a_finished_run_adds_nothing(run):
    for _ in range(2):
        evaluate(eval_linear, run, *"--epochs 1 --warmup_epochs 0 --batch_size 16 --log_every 0".split())
    start, result = records(run / "linear/log.jsonl")   # no steps
    assert start["step"] == 0 and start["run"]["seed"] == 3 and start["run"]["arch1"] == "resnet18"
    assert start["settings"]["data"] == "toy" and start["settings"]["image_size"] == 24
    assert result["epoch"] == 0 and [*result["results"]] == NAMES

@pytest.mark.parametrize("rank", [15, 16])
def test_a_process_without_images_takes_part_in_every_sum(rank, run, monkeypatch):
    """Of 24 processes some have none of the 16 images."""
    cfg = eval_linear.parse(["--checkpoint", f"{run}/checkpoint.pth", "--batch_size", "24", "--workers", "0"])
    mokd.join_processes(cfg)
    backbones = eval_knn.load_backbones(cfg).items()
    net = eval_linear.Classifiers([eval_linear.Classifier(*named, cfg, 8) for named in backbones])
    sums = []
    monkeypatch.setattr(mokd, "sum_over_processes", lambda x: sums.append(x.shape) or x)
    for program in (eval_knn, eval_linear):
        monkeypatch.setattr(program, "RANK", rank)
        monkeypatch.setattr(program, "WORLD", 24)
    _, val, _ = eval_knn.labeled_data(cfg)
    assert [*eval_linear.evaluate(net, val, cfg, torch.device("cpu"))] == NAMES
    queries, options = torch.randn(16, 4), eval_knn.parse(["--k", "1", "5"])
    eval_knn.classify(torch.randn(9, 4), torch.arange(9) % 3, queries, torch.arange(16) % 3, options, 3)
    assert sums == [(), (3, 2), (2, 2, 16)]

@pytest.mark.parametrize("command", [
    "knn --batch_size 0", "knn --k 10 0", "knn --image_size 0", "linear --batch_size 0", "linear --resize 0",
    "linear --epochs 0 --warmup_epochs 0", "linear --label_fraction 0"])
def test_zero_of_what_there_must_be_is_refused(command, run, capsys):
    name, *args = command.split()
    with pytest.raises(SystemExit) as end:
        evaluate(dict(knn=eval_knn, linear=eval_linear)[name], run, *args)
    assert end.value.code == 2 and args[0] in capsys.readouterr().err
