"""Every command in the documents is read by its program; README's run at small size, and its lines of Python.
CIFAR-10's rows in RESULTS.md are what the committed logs say.

    python -m pytest -q extras/test_docs.py
"""
import glob, itertools, os, re, subprocess, sys   # noqa: E401
from dataclasses import asdict

import pytest
import torch
from torchvision.io import write_png

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
import benchmark   # noqa: E402
import eval_coco   # noqa: E402
import eval_knn   # noqa: E402
import eval_linear   # noqa: E402
import figures   # noqa: E402
import minimal   # noqa: E402
import mokd   # noqa: E402
import results   # noqa: E402

def parse_minimal(argv):
    """minimal.py reads its flags in main, which next wants images; here it finds none."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AttributeError):
        patch.setattr(minimal, "datasets", None)
        minimal.main(argv)

PARSERS = {"mokd.py": mokd.parse_args, "eval_knn.py": eval_knn.parse, "eval_linear.py": eval_linear.parse,
           "extras/eval_coco.py": eval_coco.parse, "extras/figures.py": figures.parse,
           "extras/benchmark.py": benchmark.parse, "extras/results.py": results.parse,
           "extras/minimal.py": parse_minimal}
FILES = ["README.md", "extras/README.md", "extras/RESULTS.md", "extras/TABLES.md", "extras/DIFFERENCES.md"]
# In place of programs the shell of a document calls functions that print what they are called with.
STUBS = r"""
HOST=localhost; A=$PWD/extras; B=$PWD/.github   # two folders that exist
python() { printf '%s\t' "$@"; echo; }
torchrun() { while [[ "$1" == --* ]]; do shift; done; python "$@"; }
python3() { :; }; pip() { :; }; ln() { :; }; mkdir() { :; }; git() { :; }; tar() { :; }; mv() { :; }
"""

def text_of(file):
    with open(os.path.join(ROOT, file)) as f:
        return f.read()

def calls_of(file):
    """-> lists of words, as a document calls its programs, in blocks of shell and within lines."""
    text = text_of(file)
    script = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    lines = re.sub(r"```.*?```", "", text, flags=re.S)
    inline = re.findall(r"`((?:python|torchrun) [^\s`]+ (?!--help)[^`]+)`", lines)
    script = "\n".join([STUBS, script, *(" ".join(code.split()) for code in inline)])
    script = script.replace(". .venv/bin/activate", ":")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stderr   # bash goes on after an unknown word
    return [line.rstrip("\t").split("\t") for line in done.stdout.splitlines()]

def write_images(folder, classes, n):
    """A data folder with n images a class, each class of its own color -> files of "val", by class."""
    g = torch.Generator().manual_seed(0)
    colors = torch.randint(256, (classes, 3, 1, 1), generator=g)
    for part, c, i in itertools.product(("train", "val"), range(classes), range(n)):
        file = folder / part / f"class{c}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noisy = colors[c] + 60 * torch.randn(3, 32, 32, generator=g)
        write_png(noisy.clamp(0, 255).to(torch.uint8), str(file))
    return sorted(map(str, folder.glob("val/*/*")))

@pytest.mark.parametrize("file", FILES)
def test_every_command_is_read_by_its_program(file):
    trained = set()   # folders
    for program, *args in calls_of(file):
        if program in ("-m", "-c"):   # pytest, lines of Python
            continue
        if "--recipe" in args:   # a fork's, extras/forks/release.patch
            at = args.index("--recipe")
            del args[at:at + 2]
        try:
            cfg = PARSERS[program]([arg for arg in args if arg != "..."])
        except SystemExit as error:
            pytest.fail(f"{file}: {program} {' '.join(args)}: {error}")
        if program == "mokd.py":
            trained.add(cfg.out or f"runs/{cfg.arch1}-{cfg.arch2}")
    for word in itertools.chain(*calls_of(file)) if "TABLES" in file else ():
        assert not word.endswith("checkpoint.pth") or os.path.dirname(word) in trained, word

def printed_by(file, folder, monkeypatch, capsys):
    """-> what the commands of a document print as tables. Each run of them leaves in this folder a log with
    settings and with k-NN that tells of settings, and nothing else."""
    monkeypatch.chdir(folder)
    os.makedirs("extras")
    os.symlink(f"{HERE}/logs", "extras/logs")
    for program, *args in calls_of(file):
        if program == "extras/results.py":
            results.main(args)
        elif program == "extras/figures.py":
            mokd.main([*args, "--out", "drawn"], figures.parse, figures.run)
        elif program == "mokd.py" and "--out" in args:
            cfg = mokd.parse_args(args)
            os.makedirs(cfg.out, exist_ok=True)
            mokd.log(cfg, dict(settings=asdict(cfg), step=0))
            knn = dict(knn1=50 + 10 * (cfg.lambda1 or 0) + cfg.seed, knn2=60 + 10 * (cfg.lambda2 or 0))
            mokd.log(cfg, dict(epoch=cfg.epochs - 1, **knn))
    return capsys.readouterr().out

def test_rows_of_results_come_out_of_the_committed_logs_and_its_study_is_one_table(
        tmp_path, monkeypatch, capsys):
    printed = printed_by("extras/RESULTS.md", tmp_path, monkeypatch, capsys)
    text = text_of("extras/RESULTS.md").replace("−", "-").replace("*", "")
    rows = [line for line in printed.splitlines() if "extras/logs/" in line]
    assert len(rows) == 16   # k-NN, then linear probing
    for row in rows:
        cells = row.strip("| ").split(" | ")[2:]   # of two models, and how far they differ from those alone
        pairs = [" / ".join(cells[i:i + 2]) for i in range(0, len(cells), 2)]
        assert f"| {' | '.join(pairs)} |" in text
    assert "linear probing top-1 on cifar10 after 5 epochs" in printed and os.path.exists("drawn/curves.pdf")
    for name in os.listdir("runs/study"):
        assert printed.count(f"| runs/study/{name} | 0, 1, 2 |") == name.startswith("cnnvit-")

def test_the_sweep_of_tables_ends_in_a_table_of_its_runs(tmp_path, monkeypatch, capsys):
    printed = printed_by("extras/TABLES.md", tmp_path, monkeypatch, capsys)
    for name, top1 in ("0-1", "51.0"), ("0.1-1", "52.0"), ("1-1", "61.0"):   # by lambda1 and seeds
        assert f"| runs/sweep/{name} | 0, 1, 2 | {top1} ± 1.0 | 70.0 ± 0.0 |" in printed

def test_every_flag_and_file_that_the_text_names_exists():
    known = "--recipe --nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --help".split()
    for text in map(text_of, PARSERS):
        known += [f"--{name}" for name in re.findall(r"^    (\w+): ", text, re.M)]   # a dataclass of flags
        known += re.findall(r'"(--\w+)"', text)
    for file in FILES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", text_of(file)):
            assert os.path.exists(os.path.join(ROOT, os.path.dirname(file), link)), (file, link)
        for name in re.findall(r"`(--[a-z0-9_-]+)", text_of(file)):   # there some are gone
            assert name.replace("--no-", "--") in known or "DIFFERENCES" in file, (file, name)

def test_every_name_that_one_file_takes_from_another_exists():
    """Also where the line runs late: at the hundredth image, say, or after all training."""
    modules = dict(mokd=mokd, eval_knn=eval_knn, eval_linear=eval_linear, eval_coco=eval_coco)
    programs = glob.glob("*.py", root_dir=ROOT) + glob.glob("extras/*.py", root_dir=ROOT)
    for file in [*programs, "extras/walkthrough.ipynb", *FILES]:
        for module, name in re.findall(rf"\b({'|'.join(modules)})\.(?!py\b)(\w+)", text_of(file)):
            assert hasattr(modules[module], name), f"{file}: {module}.{name}"

def test_readmes_commands_run_at_small_size(tmp_path):
    """All that costs is made small: of a flag that is given twice the last counts."""
    write_images(tmp_path / "data", 2, 8)
    small = f"--data {tmp_path}/data --epochs 1 --warmup_epochs 0 --batch_size 8 --workers 0".split()
    nets = "--global_size 64 --local_size 32 --local_crops 1 --out_dim 64 --hidden_dim 16 --bottleneck_dim 8"
    trained = ["--checkpoint", f"{tmp_path}/0/checkpoint.pth"]
    weights = f"--weights {tmp_path}/0/model1.pth --data {tmp_path}/data --image_size 32".split()
    ran = []
    for program, *args in calls_of("README.md"):
        out = ["--out", f"{tmp_path}/{len(ran)}"]
        if program == "mokd.py" and not {"...", "--losses"} & set(args) and args != ["--demo"]:
            sizes = [] if "--demo" in args else nets.split()   # the demo's are small already
            mokd.main([*args, *small, *sizes, *out])
        elif program == "eval_knn.py" and len(args) > 1:   # others are half a command, within a sentence
            more = weights if "--arch" in args else trained
            mokd.main([*args, *more, "--workers", "0"], eval_knn.parse, eval_knn.run)
        elif program == "eval_linear.py" and "--checkpoint" in args:
            mokd.main([*args, *trained, *small, *out], eval_linear.parse, eval_linear.run)
        else:
            continue
        ran.append(program)
    assert ran == ["mokd.py"] * 5 + ["eval_knn.py", "eval_linear.py", "eval_linear.py", "eval_knn.py"]

def test_readmes_lines_classify_as_eval_linear_does(tmp_path, monkeypatch, capsys):
    """README's wide run on images of ten colors, then its block of Python, of which only paths change."""
    files = write_images(tmp_path / "data", 10, 4)
    small = f"--data {tmp_path}/data --epochs 1 --warmup_epochs 0 --batch_size 8 --workers 0 --knn_every 0"
    wide, = [args for _, *args in calls_of("README.md") if args[-1] == "runs/wide"]
    monkeypatch.chdir(tmp_path)   # where the block finds runs/wide
    mokd.main([*wide, *small.split()])
    probe = "--checkpoint runs/wide/checkpoint.pth --epochs 12 --warmup_epochs 1 --batch_size 10 --lr 3"
    mokd.main([*probe.split(), "--workers", "0"], eval_linear.parse, eval_linear.run)
    printed = capsys.readouterr().out
    top1 = float(re.search(r"1 resnet18 +3 +([\d.]+)", printed)[1])

    block, = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.S)
    block = block.replace('("1.png", "2.png")', str(files))
    lines = [line.split("   #")[0] for line in block.splitlines()[4:]]
    assert "\n".join(lines) in printed   # as eval_linear.py prints them

    def accuracy(block):
        names = {}
        exec(block, names)
        hits = names["logits1"].argmax(1) == torch.arange(10).repeat_interleave(4)
        return 100 * hits.double().mean().item()
    assert accuracy(block) == pytest.approx(top1, abs=0.01) and top1 > 50
    assert accuracy(block.replace("output_stride=8, ", "")) < top1 - 10   # such a net loads without a word
