"""Tables of many runs: reads folders of runs, prints markdown.

    python extras/results.py runs/study
    python extras/results.py runs/study --against 1-0.1

A run of mokd.py lies in FOLDER/ROW/SEED. A row is called PAIR-WHAT. All rows of a pair are compared, seed by
seed, with its row PAIR-sm, which is independent training (--losses sm), or with the one that --against names.
k-NN is the last of log.jsonl (--knn_every). Linear probing is the best rate's last top-1 in
linear/results.json, where eval_linear.py has written one.
"""
import argparse
import glob
import json
import math
import operator
import os
import statistics
import sys

def read_knn(run):
    """-> the last k-NN top-1 of both models in a run's log, or None. A line that a kill has torn is passed
    over, and named."""
    found = None
    with open(os.path.join(run, "log.jsonl")) as f:
        for line in f:
            try:
                record = json.loads(line)
            except ValueError:
                print(f"{run}/log.jsonl: a torn line is passed over", file=sys.stderr)
                continue
            if "knn1" in record:
                found = record["knn1"], record["knn2"]
    return found

def read_linear(run):
    """-> linear probing top-1 of both models at each one's best rate, or None."""
    file = os.path.join(run, "linear", "results.json")
    if not os.path.exists(file):
        return None
    with open(file) as f:
        results = json.load(f)["results"]
    return tuple(max(rate["top1"] for rate in results[name].values()) for name in sorted(results))

def read_runs(folder, read):
    """-> {row: {seed: (model 1, model 2)}} of the runs that have what `read` reads."""
    rows = {}
    for log in sorted(glob.glob(os.path.join(glob.escape(folder), "*", "*", "log.jsonl"))):
        run = os.path.dirname(log)
        row, seed = run.split(os.sep)[-2:]
        values = read(run)
        if values:
            rows.setdefault(row, {})[seed] = values
    return rows

def mean_and(values, spread):
    """'66.5 ± 2.4' of a list of numbers; one number has no spread."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {spread(values):.1f}" if len(values) > 1 else f"{mean:.1f}"

def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values))

def difference(row, base, value):
    """'+4.8 ± 2.2': the mean difference to the base's run of the same seed, and its standard error. `value`
    makes a number of the accuracies (model 1, model 2)."""
    seeds = sorted(row.keys() & base.keys())
    if row is base or not seeds:
        return ""
    text = mean_and([value(row[seed]) - value(base[seed]) for seed in seeds], standard_error)
    return text if text.startswith("-") else "+" + text

def table(rows, against="sm"):
    """{row: {seed: (model 1, model 2)}} -> lines of markdown: mean ± deviation over seeds, and differences
    to the pair's row `against`: of model 1, of model 2, and of the mean of both."""
    of_models = [operator.itemgetter(0), operator.itemgetter(1)]
    lines = [f"| row | seeds | model 1 | model 2 | less {against}: model 1 | model 2 | mean of both |",
             "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        base = rows.get(f"{name.split('-')[0]}-{against}", {})
        cells = [mean_and([value(run) for run in row.values()], statistics.stdev) for value in of_models]
        cells += [difference(row, base, value) for value in (*of_models, statistics.mean)]
        lines.append(f"| {name} | {', '.join(row)} | " + " | ".join(cells) + " |")
    return lines

def parse(argv=None):
    parser = argparse.ArgumentParser(prog="extras/results.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of runs, FOLDER/ROW/SEED")
    parser.add_argument("--against", default="sm", help="what a pair's rows are compared with (default: sm)")
    return parser, parser.parse_args(argv)

def main(argv=None):
    parser, cfg = parse(argv)
    folder = cfg.folder
    if not os.path.isdir(folder):
        parser.error(f"{folder}: no such folder")
    for title, read in (("k-NN top-1, %", read_knn), ("Linear probing top-1, %", read_linear)):
        rows = read_runs(folder, read)
        if rows:
            print(f"**{title}**\n\n" + "\n".join(table(rows, cfg.against)) + "\n")
    return 0

if __name__ == "__main__":
    sys.exit(main())
