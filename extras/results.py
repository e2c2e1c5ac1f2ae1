"""A table of runs by seed: trained alone, by MOKD, and the difference. Prints markdown.

    python extras/results.py runs/alone runs/mokd
    python extras/results.py 'extras/logs/alone-*' 'extras/logs/mokd-*'   # patterns in quotes

Each argument is one setting, which is compared with the first: a folder or pattern, whose logs are its seeds.
A log is a log.jsonl or a reduced NAME.jsonl.gz. The last number in its path is its seed.
"""
import argparse
import glob
import gzip
import json
import math
import os
import re
import statistics

def logs_of(setting):
    """A file, a folder or a pattern -> files of logs."""
    found = glob.glob(setting)
    for name in ("log.jsonl", "*.jsonl.gz"):
        found += glob.glob(os.path.join(setting, "**", name), recursive=True)
    return sorted(path for path in found if os.path.isfile(path))

def read_log(file):
    """-> the records of a log. A line that was torn when a run was killed is left out."""
    records = []
    with gzip.open(file, "rt") if file.endswith(".gz") else open(file) as lines:
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                pass
    return records

def top1_of(records):
    """Records of a log -> {measure: [top-1 of model 1, of model 2]}, of which the last counts. In linear
    probing it is that of the best rate."""
    found = {}
    for record in records:
        if "knn1" in record:
            found["k-NN"] = [record["knn1"], record["knn2"]]
        if "results" in record:   # {model: {rate: {"top1": ...}}}
            rates = [record["results"][model].values() for model in sorted(record["results"])]
            found["linear probing"] = [max(rate["top1"] for rate in own) for own in rates]
    return found

def read_setting(setting):
    """-> {measure: {seed: [top-1 of model 1, of model 2]}}."""
    found = {}
    for file in logs_of(setting):
        seed = (re.findall(r"\d+", file) or [""])[-1]
        for measure, top1 in top1_of(read_log(file)).items():
            if seed in found.setdefault(measure, {}):
                raise SystemExit(f"{file}: {setting} has two runs of seed {seed}; give them one by one")
            found[measure][seed] = top1
    return found

def mean_and(spread, values, form=".1f"):
    """'66.5 ± 2.4'; a single value has no spread."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {spread(values):.1f}" if len(values) > 1 else mean

def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values))

def row(name, own, first):
    """A line of the table: means with deviations, differences by seed with standard errors."""
    cells = [mean_and(statistics.stdev, column) for column in zip(*own.values())]
    for i in (0, 1):
        differences = [own[seed][i] - first[seed][i] for seed in own if seed in first]
        if differences and own is not first:
            cells.append(mean_and(standard_error, differences, "+.1f"))
    return f"| {name} | {', '.join(sorted(own))} | " + " | ".join(cells) + " |"

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("settings", nargs="+", help="folders of runs or quoted patterns; the first is alone")
    return parser.parse_args(argv)

def main(argv=None):
    settings = {setting: read_setting(setting) for setting in parse(argv).settings}
    for measure in ("k-NN", "linear probing"):
        found = {setting: own[measure] for setting, own in settings.items() if measure in own}
        if found:
            first = next(iter(settings.values())).get(measure, {})
            print(f"\n| {measure} top-1, % | seeds | model 1 | model 2 | difference 1 | difference 2 |")
            print("|---|---|---|---|---|---|")
            for setting, own in found.items():
                print(row(setting, own, first))

if __name__ == "__main__":
    main()
