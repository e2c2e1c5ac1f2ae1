"""Tables of runs by seed: trained alone, by MOKD, and the difference. Prints markdown.

    python extras/results.py runs/alone runs/mokd
    python extras/results.py runs/alone 'runs/mokd-*'   # patterns in quotes

An argument is a log, a folder with the logs of one setting, or a pattern, which has a row for each setting
that it finds. A table's rows are compared with its first. A log is a log.jsonl, whose first record has the
settings, or a reduced one, NAME.jsonl.gz. Without that record it is called DATA-NAME-SEED.jsonl.gz, or
DATA-NAME-SEED-linear.jsonl.gz.
"""
import argparse, glob, gzip, json, math, os, re, statistics   # noqa: E401
from collections import namedtuple

# In these the seeds of a row may differ; of a file or folder only the last name must be the same.
FREE = "seed out data_root workers log_every save_every knn_every compile grad_checkpointing demo".split()
PATHS = "data checkpoint weights init1 init2 subset".split()

# found: the argument, or what it found as a pattern. settings: {name: [values]}, several where a resumed run
# changed one.
Run = namedtuple("Run", "found file kind seed settings records")

def logs_of(argument):
    """-> {file of a log: the file or folder that the argument names}."""
    logs = {}
    whole = os.path.exists(argument)   # its brackets are no pattern
    for found in [argument] if whole else sorted(glob.glob(argument)):
        files = [found]
        if os.path.isdir(found):
            files = sorted(glob.glob(os.path.join(glob.escape(found), "**", "*.jsonl*"), recursive=True))
        for file in files:
            if os.path.basename(file) == "log.jsonl" or file.endswith(".jsonl.gz"):
                logs[file] = found
    if not logs:
        raise SystemExit(f"{argument}: no log is there")
    return logs

def read_log(file):
    """-> the records of the last run in a log, which a run whose checkpoint was deleted begins anew."""
    records = []
    with gzip.open(file, "rt") if file.endswith(".gz") else open(file) as lines:
        for line in lines:
            whole = line[max(0, line.find('{"settings"')):]   # a killed run may leave half a line before it
            try:
                record = json.loads(whole)
            except ValueError:   # half a line
                continue
            if "settings" in record and record["step"] == 0:
                records = []
            records.append(record)
    return records

def shared(record):
    """A record of settings -> those that all seeds of a row must share; an evaluation's run has some, too."""
    found = {}
    for of, settings in (("", record["settings"]), ("run's ", record.get("run") or {})):
        for name, value in settings.items():
            if name in PATHS:
                value = os.path.basename(value.rstrip("/"))
            if name not in FREE:
                found[of + name] = value
    return found

def read_run(file, found):
    records = read_log(file)
    starts = [record for record in records if "settings" in record]
    settings = {}
    for record in starts:
        for name, value in shared(record).items():
            if value not in settings.setdefault(name, []):
                settings[name].append(value)
    kind, seed = "k-NN", None
    if starts:
        own = starts[0]["settings"]
        seed = (starts[0].get("run") or own)["seed"]
        if "run" in starts[0]:
            kind = "fine-tuning" if own.get("finetune") else "linear probing"
        return Run(found, file, kind, seed, settings, records)
    name = re.fullmatch(r"([^-]+)-(.+)-(\d+)(-linear)?\.jsonl\.gz", os.path.basename(file))
    if name:
        settings = dict(data=[name[1]], name=[name[2]])
        seed = int(name[3])
        if name[4]:   # such logs count epochs from 1
            kind = "linear probing"
            records = [record | dict(epoch=record["epoch"] - 1) for record in records]
    return Run(found, file, kind, seed, settings, records)

def result_of(run):
    """-> the last top-1 {model: percent}, in linear probing that of the best rate; after how many epochs."""
    top1, epochs = {}, 0
    for record in run.records:
        if "knn1" in record:
            top1 = {"1": record["knn1"], "2": record["knn2"]}
            epochs = record["epoch"] + 1
        for model, rates in record.get("results", {}).items():   # {model: {rate: {"top1": ...}}}
            number = model[0] if model[:2] in ("1 ", "2 ") else "1"   # --arch has one model
            top1[number] = max(rate["top1"] for rate in rates.values())
            epochs = record["epoch"] + 1
    return top1, epochs

def refuse_unlike(a, b):
    for name in a.settings | b.settings:
        one, other = a.settings.get(name), b.settings.get(name)
        if one != other:
            raise SystemExit(f"{a.file} and {b.file} are of two settings, {name}: {one} and {other}")

def refuse_mixed(runs):
    """Runs of one row, or of one line in a figure, must differ in their seeds and in nothing else."""
    seeds = {}
    for run in runs:
        if run.seed is None:
            raise SystemExit(f"{run.file}: neither a record of settings nor its name says its seed")
        refuse_unlike(runs[0], run)
        other = seeds.setdefault(run.seed, run)
        if other is not run:
            raise SystemExit(f"{other.file} and {run.file} are two runs of seed {run.seed} in one setting")

def rows_of(argument):
    """-> a list of runs for each kind and setting, of which a folder must have one."""
    rows, firsts = {}, {}
    for file, found in logs_of(argument).items():
        run = read_run(file, found)
        top1, epochs = result_of(run)
        if top1:
            run.settings["epochs evaluated"] = [epochs]
            refuse_unlike(firsts.setdefault((run.kind, found), run), run)
            rows.setdefault((run.kind, json.dumps(run.settings, sort_keys=True)), []).append(run)
    if not rows:
        raise SystemExit(f"{argument}: its logs have neither k-NN nor results of eval_linear.py")
    for runs in rows.values():
        refuse_mixed(runs)
    return [*rows.values()]

def mean_and(spread, values, form=".1f"):
    """'66.5 ± 2.4'; a single value has no spread."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {spread(values):.1f}" if len(values) > 1 else mean

def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values))

def row(name, own, first):
    """A line of the table, {seed: {model: top-1}}: means with deviations, and differences by seed from the
    first row with standard errors."""
    means, gains = [], []
    for model in "12":
        values = [top1[model] for top1 in own.values() if model in top1]
        means.append(mean_and(statistics.stdev, values) if values else "")
        seeds = [seed for seed in own if model in own[seed] and model in first.get(seed, {})]
        differences = [own[seed][model] - first[seed][model] for seed in seeds]
        gains.append(mean_and(standard_error, differences, "+.1f") if differences else "")
    cells = [name, ", ".join(map(str, sorted(own))), *means]
    if own is not first:
        cells += gains
    return f"| {' | '.join(cells)} |"

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("settings", nargs="+", help="folders of runs or quoted patterns; the first is alone")
    return parser.parse_args(argv)

def main(argv=None):
    tables, shown = {}, []
    for argument in parse(argv).settings:
        rows = rows_of(argument)
        kinds = [runs[0].kind for runs in rows]
        for kind, runs in zip(kinds, rows):
            files = [run.file for run in runs]
            if files in shown:   # a pattern finds the first argument's, too
                continue
            shown.append(files)
            name = argument
            if kinds.count(kind) > 1:
                name = os.path.commonprefix([run.found for run in runs])
                name += "*" * (name != runs[0].found)
            data, epochs = runs[0].settings["data"][-1], runs[0].settings["epochs evaluated"][0]
            title = f"{kind} top-1 on {data} after {epochs} epochs, %"
            tables.setdefault(title, []).append((name, {run.seed: result_of(run)[0] for run in runs}))
    for title in sorted(tables):
        print(f"\n| {title} | seeds | model 1 | model 2 | difference 1 | difference 2 |")
        print("|---|---|---|---|---|---|")
        _, first = tables[title][0]
        for name, own in tables[title]:
            print(row(name, own, first))

if __name__ == "__main__":
    main()
