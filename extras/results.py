"""Tables of runs by seed: trained alone, by MOKD, and the difference. Prints markdown.

    python extras/results.py runs/alone runs/mokd
    python extras/results.py runs/alone 'runs/mokd-*'   # patterns in quotes

An argument is a log, a folder with the logs of one setting, or a pattern, which has a row for each setting
that it finds. A table's rows are compared with its first. A log is a log.jsonl, whose first record has the
settings, or a reduced one, called DATA-NAME-SEED.jsonl.gz or DATA-NAME-SEED-linear.jsonl.gz.
"""
import argparse, glob, gzip, json, math, os, re, statistics   # noqa: E401
from collections import namedtuple

# In these the seeds of a row may differ; of a file or folder only the last name must be the same.
FREE = "seed out data_root workers log_every save_every knn_every compile grad_checkpointing demo".split()
PATHS = "data checkpoint weights init1 init2 subset".split()

# found: the argument, or what it found as a pattern. settings: {name: [values]}, several after a change.
Run = namedtuple("Run", "found file kind seed settings records")

def logs_of(argument):
    """-> {file of a log: the file or folder that the argument names}."""
    logs = {}
    whole = os.path.exists(argument)   # its brackets are no pattern
    for found in [argument] if whole else sorted(glob.glob(argument)):
        files = [found]
        if os.path.isdir(found):
            files = sorted(glob.glob(os.path.join(glob.escape(found), "**", "*.jsonl*"), recursive=True))
        names = [file for file in files if re.search(r"(^|/)log\.jsonl$|\.jsonl\.gz$", file)]
        logs |= dict.fromkeys(names, found)
    if not logs:
        raise SystemExit(f"{argument}: no log is there")
    return logs

def read_log(file):
    """-> the records of the last run in a log, which a run whose checkpoint was deleted begins anew."""
    records = []
    with gzip.open(file, "rt") if file.endswith(".gz") else open(file) as lines:
        for line in lines:
            try:   # a killed run may leave half a line, also before a record of settings
                record = json.loads(line[max(0, line.find('{"settings"')):])
            except ValueError:
                continue
            if "settings" in record and record["step"] == 0:
                records = []
            records.append(record)
    return records

def read_run(file, found):
    """-> Run, with the settings that all seeds of a row must share, also those of an evaluation's run."""
    records, settings, kind = read_log(file), {}, "k-NN"
    starts = [record for record in records if "settings" in record]
    name = re.fullmatch(r"([^-]+)-(.+)-(\d+)(-linear)?\.jsonl\.gz", os.path.basename(file))
    if name and not starts:
        if name[4]:   # such logs count epochs from 1
            kind, records = "linear probing", [r | dict(epoch=r["epoch"] - 1) for r in records]
        return Run(found, file, kind, int(name[3]), dict(data=[name[1]], name=[name[2]]), records)
    if not starts:
        raise SystemExit(f"{file}: neither a record of settings nor its name says its seed")
    for start in starts:
        of_run = {f"run's {name}": value for name, value in (start.get("run") or {}).items()}
        for name, value in (start["settings"] | of_run).items():
            last = name.removeprefix("run's ")
            if last in PATHS:
                value = os.path.basename(value.rstrip("/"))
            if last not in FREE and value not in settings.setdefault(name, []):
                settings[name].append(value)
    own = starts[0]["settings"]
    if "run" in starts[0]:
        kind = "fine-tuning" if own.get("finetune") else "linear probing"
    return Run(found, file, kind, (starts[0].get("run") or own)["seed"], settings, records)

def result_of(run):
    """-> the last top-1 {model: percent}, that of the best rate. Its epochs become a setting."""
    top1 = {}
    for record in run.records:
        if "knn1" in record:
            top1 = {"1": record["knn1"], "2": record["knn2"]}
        for model, rates in record.get("results", {}).items():   # {model: {rate: {"top1": ...}}}
            number = model[0] if model[:2] in ("1 ", "2 ") else "1"   # --arch has one model
            top1[number] = max(rate["top1"] for rate in rates.values())
        if "knn1" in record or record.get("results"):
            run.settings["epochs evaluated"] = [record["epoch"] + 1]
    return top1

def refuse_mixed(runs):
    """Runs of one row, or of one line in a figure, must differ in their seeds and in nothing else."""
    seeds = {}
    first = runs[0]
    for run in runs:
        for name in first.settings | run.settings:
            one, other = first.settings.get(name), run.settings.get(name)
            if one != other:
                raise SystemExit(f"{first.file} and {run.file} differ in setting {name}: {one} and {other}")
        other = seeds.setdefault(run.seed, run)
        if other is not run:
            raise SystemExit(f"{other.file} and {run.file} are two runs of seed {run.seed} in one setting")

def rows_of(argument):
    """-> lists of runs for each kind and setting, of which a folder must have one."""
    folders, rows = {}, {}
    for file, found in logs_of(argument).items():
        run = read_run(file, found)
        if result_of(run):
            folders.setdefault((run.kind, found), []).append(run)
    for (kind, _), runs in folders.items():
        refuse_mixed(runs)
        rows.setdefault((kind, json.dumps(runs[0].settings, sort_keys=True)), []).extend(runs)
    if not rows:
        raise SystemExit(f"{argument}: its logs have neither k-NN nor results of eval_linear.py")
    for runs in rows.values():
        refuse_mixed(runs)
    return rows.values()

def mean_and_spread(values, form=".1f", n=1):
    """'66.5 ± 2.4', the deviation over sqrt(n); a single value has none."""
    mean = format(statistics.mean(values), form) if values else ""
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(n):.1f}" if len(values) > 1 else mean

def row(name, own, first):
    """A line: means with deviations, and differences by seed from the first row with standard errors."""
    means, gains = [], []
    for model in "12":
        values = {seed: top1[model] for seed, top1 in own.items() if model in top1}
        seeds = [seed for seed in values if model in first.get(seed, {})]
        means.append(mean_and_spread([*values.values()]))
        gains.append(mean_and_spread([values[s] - first[s][model] for s in seeds], "+.1f", len(seeds)))
    cells = [name, ", ".join(map(str, sorted(own))), *means, *([] if own is first else gains)]
    return f"| {' | '.join(cells)} |"

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("settings", nargs="+", help="folders of runs or quoted patterns; the first is alone")
    return parser.parse_args(argv)

def main(argv=None):
    tables = {}   # {title: {files: (name, {seed: top-1})}}; a pattern finds the first argument's files, too
    for argument in parse(argv).settings:
        for runs in rows_of(argument):
            name = os.path.commonprefix([run.found for run in runs])
            name += "*" * (name != runs[0].found)
            own = {run.seed: result_of(run) for run in runs}
            data, epochs = [runs[0].settings[name][-1] for name in ("data", "epochs evaluated")]
            title = f"{runs[0].kind} top-1 on {data} after {epochs} epochs, %"
            tables.setdefault(title, {}).setdefault(tuple(run.file for run in runs), (name, own))
    for title, rows in sorted(tables.items()):
        print(f"\n| {title} | seeds | model 1 | model 2 | difference 1 | difference 2 |")
        print("|---|---|---|---|---|---|")
        first, *_ = rows.values()
        for name, own in rows.values():
            print(row(name, own, first[1]))

if __name__ == "__main__":
    main()
