"""Every command in README.md and extras/*.md is read by the program that it calls.

    python -m pytest -q extras/test_docs.py
"""
import itertools
import os
import re
import subprocess
import sys

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
import mokd   # noqa: E402
import results   # noqa: E402

PARSERS = {"mokd.py": mokd.parse_args, "eval_knn.py": eval_knn.parse, "eval_linear.py": eval_linear.parse,
           "extras/eval_coco.py": eval_coco.parse, "extras/figures.py": figures.parse,
           "extras/benchmark.py": benchmark.parse, "extras/results.py": results.parse}
FILES = ["README.md", "extras/README.md", "extras/RESULTS.md", "extras/TABLES.md"]
STUBS = """
S=0; HOST=localhost; A=$PWD/extras; B=$PWD/.github   # two folders that exist
python() { printf '%s\\t' "$@"; echo; }
torchrun() { while [[ "$1" == --* ]]; do shift; done; python "$@"; }
python3() { :; }; pip() { :; }; ln() { :; }; mkdir() { :; }; source() { :; }; .() { :; }
"""


def text_of(file):
    with open(os.path.join(ROOT, file)) as f:
        return f.read()


def scripts_of(file):
    """The shell of a markdown file: its bash blocks; commands in its tables, after the first block; commands
    within lines; and the figures of a table whose head has the beginning of their command."""
    text = text_of(file)
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if "ln -s" not in block]
    cells = re.findall(r"\| `([A-Z]=[^`]*)` \|", text)
    lines = re.sub(r"```.*?```", "", text, flags=re.S)
    inline = re.findall(r"`((?:python|torchrun) [^\s`]+ (?!--help)[^`]+)`", lines)
    inline += ["python " + code for code in re.findall(r"`((?:extras/benchmark|eval_knn)\.py [^`]+)`", lines)]
    figure_table = lines.partition("| figure | command: ")[2].partition("\n\n")[0]
    inline += ["python figures.py " + args for args in re.findall(r"`(\w+ --[^`]*)`", figure_table)]
    inline = [" ".join(code.split()).replace(" figures.py", " extras/figures.py") for code in inline]
    return blocks + ["\n".join([blocks[0], cell]) for cell in cells] + inline


def calls_of(file):
    """-> lists of words, as the programs of a markdown file are called."""
    calls = []
    script = STUBS + "\n".join(f"(\n{script}\n) || exit 1" for script in scripts_of(file))
    script = re.sub(r"^(.*)\. \.venv/bin/activate", r"\1:", script, flags=re.M)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stderr   # bash goes on after an unknown word
    for line in done.stdout.splitlines():
        words = line.rstrip("\t").split("\t")
        calls.append(words)
    return calls


@pytest.mark.parametrize("file", FILES)
def test_every_command_is_read_by_its_program(file):
    calls = [words for words in calls_of(file) if words[0] not in ("-m", "-c")]   # pytest, lines of Python
    assert calls
    for program, *args in calls:
        assert program in PARSERS, (file, program)
        args = [arg for arg in args if arg != "..."]
        try:
            PARSERS[program](args)
        except (SystemExit, mokd.UserError) as error:
            pytest.fail(f"{file}: {program} {' '.join(args)}: {error}")


def test_every_flag_that_the_text_names_exists():
    known = set()
    for program in (mokd.Config, eval_knn.Config, eval_linear.Config, eval_coco.Config, figures.Config):
        known |= {f"--{name}" for name in program.__dataclass_fields__}
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}   # torchrun's
    others |= {"--steps", "--memory", "--compare", "--gpu"}   # those of extras/benchmark.py
    for file in FILES:
        for name in re.findall(r"`(--[a-z0-9_]+)", text_of(file)):
            assert name in known | others, (file, name)


def test_every_file_that_the_text_links_exists():
    for file in FILES:
        for link in re.findall(r"\]\(([^)#]+)", text_of(file)):
            if not link.startswith("http"):
                assert os.path.exists(os.path.join(ROOT, os.path.dirname(file), link)), (file, link)


def test_tables_have_a_command_in_every_row_of_the_papers_own():
    """Each row trains before it evaluates, and a folder has one run's settings."""
    cells = re.findall(r"\| `([A-Z]=[^`]*)` \|", text_of("extras/TABLES.md"))
    assert len(cells) == 97
    trained = {}
    for words in calls_of("extras/TABLES.md"):
        if words[0] == "mokd.py":
            out = words[words.index("--out") + 1]
            settings = mokd.parse_args(words[1:])
            assert trained.setdefault(out, settings) == settings, out
        elif "--checkpoint" in words:
            for file in words[words.index("--checkpoint") + 1:]:
                if not file.endswith(".pth"):
                    break
                assert os.path.dirname(file) in trained, words


def test_results_are_means_deviations_and_paired_differences(tmp_path, capsys):
    import json
    import results
    top1 = {"cnns-sm": {"0": (50.0, 40.0), "1": (54.0, 44.0)},
            "cnns-all": {"0": (53.0, 40.0), "1": (55.0, 46.0)}}
    for row, seeds in top1.items():
        for seed, (knn1, knn2) in seeds.items():
            run = tmp_path / row / seed
            (run / "linear").mkdir(parents=True)
            lines = [json.dumps(dict(epoch=i, knn1=i * knn1, knn2=i * knn2)) for i in (0, 1)]
            (run / "log.jsonl").write_text("\n".join([*lines, '{"torn']))
            rates = {"1 a": {"0.1": dict(top1=knn1 + 1), "1": dict(top1=knn1 - 9)},
                     "2 b": {"0.1": dict(top1=knn2)}}
            (run / "linear" / "results.json").write_text(json.dumps(dict(results=rates)))
    (tmp_path / "notes.txt").write_text("no row")
    assert results.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| cnns-all | 0, 1 | 54.0 ± 1.4 | 43.0 ± 4.2 | +2.0 ± 1.0 | +1.0 ± 1.0 | +1.5 ± 0.0 |" in text
    assert "| cnns-sm | 0, 1 | 52.0 ± 2.8 | 42.0 ± 2.8 |  |  |  |" in text
    assert "| cnns-all | 0, 1 | 55.0 ± 1.4" in text
    assert results.main([str(tmp_path), "--against", "all"]) == 0
    text = capsys.readouterr().out
    assert "| cnns-sm | 0, 1 | 52.0 ± 2.8 | 42.0 ± 2.8 | -2.0 ± 1.0 | -1.0 ± 1.0 | -1.5 ± 0.0 |" in text


def test_readmes_commands_run_at_small_size(tmp_path, capsys):
    """Its three for one's own images, the paper's, and the evaluations, with all that costs made small: the
    last value of a flag counts."""
    generator = torch.Generator().manual_seed(0)
    for part, c, i in itertools.product(("train", "val"), "ab", range(8)):
        (tmp_path / "data" / part / c).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (3, 40, 40), generator=generator, dtype=torch.uint8)
        write_png(pixels, str(tmp_path / "data" / part / c / f"{i}.png"))
    small = ["--data", tmp_path / "data", "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 8,
             "--workers", 0]
    nets = ["--global_size", 64, "--local_size", 32, "--local_crops", 1, "--out_dim", 64, "--hidden_dim", 16,
            "--bottleneck_dim", 8, "--knn_every", 1, "--knn_k", 1]
    trained = tmp_path / "0" / "checkpoint.pth"
    programs = {"mokd.py": (mokd.parse_args, mokd.run, [*small, *nets]),
                "eval_knn.py": (eval_knn.parse, eval_knn.run, ["--checkpoint", trained, "--workers", 0]),
                "eval_linear.py": (eval_linear.parse, eval_linear.run, ["--checkpoint", trained, *small])}
    half = ["--label_fraction", 0.5]   # of 16 images
    ran = []
    for program, *args in calls_of("README.md"):
        if program in programs and not {"--demo", "...", "A"} & {*args}:
            parse, run, less = programs[program]
            out = [] if program == "eval_knn.py" else ["--out", tmp_path / str(len(ran))]
            out += half if "--finetune" in args else []
            code = mokd.main([*map(str, (*args, *less, *out))], program, parse, run)
            assert code == 0, (program, args, capsys.readouterr().err)
            ran.append(program)
    assert ran == ["mokd.py", "eval_knn.py", "eval_linear.py", "eval_linear.py", *["mokd.py"] * 3]
