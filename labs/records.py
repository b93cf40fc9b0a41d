"""The results files of the labs: labs/results/<lab>.csv.

One row per arm, seed and figure:

    arm,seed,figure,value,deviation,seeds,commit,device
    paper,0,config,"{""top_k"":1}",,1,abc1234,a CPU   how the arm differs from its defaults
    paper,0,rank,45.2,,1,abc1234,a CPU                measured with one seed
    paper,,rank,45.416,0.581,3,def5678,a CPU          an older table's mean and deviation, 3 seeds
"""
import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from data.checkpoints import write_safely

REPOSITORY = Path(__file__).resolve().parent.parent
COLUMNS = ["arm", "seed", "figure", "value", "deviation", "seeds", "commit", "device"]

class Figure(NamedTuple):
    """A figure over several seeds. The mean of words is a word; one seed has no deviation."""
    mean: Any
    deviation: float | None
    seeds: int

def file_of(lab, flags):
    """The results file of a lab. Figures of --fast mean nothing, so they go beside the runs."""
    if flags.fast:
        return Path(flags.out) / f"{lab}-fast.csv"
    return REPOSITORY / flags.results / f"{lab}.csv"

def read_rows(path):
    """The rows of a results file, a dict of texts each; an empty list if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

def as_text(rows, header):
    """Rows as the lines of a CSV file, with or without the header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

def append(path, rows):
    """Append rows in one write, so that processes with the same file do not mix their lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        file.write(as_text(rows, header=file.tell() == 0))

def replace(path, rows):
    """Put rows in place of those of the same arm and seed, and of the arm's rows without a seed."""
    arm, seed = rows[0]["arm"], str(rows[0]["seed"])
    kept = [row for row in read_rows(path) if row["arm"] != arm or row["seed"] not in (seed, "")]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safely(path, as_text(kept + rows, header=True).encode())

def value_of(text):
    """A value of the file: numbers and lists are JSON, anything else is a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text

def results(lab, flags):
    """What a lab has measured: a list of dicts with arm, seed, commit, device and the figures.

    A measured row has a seed, and numbers or words. Rows from an older table form one dict per arm:
    its seed is None and its figures are `Figure`s.
    """
    found = {}
    for row in read_rows(file_of(lab, flags)):
        seed = int(row["seed"]) if row["seed"] else None
        shared = {name: row[name] for name in ("arm", "commit", "device")}
        figures = found.setdefault((row["arm"], seed), shared | dict(seed=seed))
        value = value_of(row["value"])
        if seed is None:
            deviation = float(row["deviation"]) if row["deviation"] else None
            value = Figure(value, deviation, int(row["seeds"]))
        if row["figure"] != "config":
            figures[row["figure"]] = value
    return sorted(found.values(), key=lambda row: (row["arm"], row["seed"] or 0))
