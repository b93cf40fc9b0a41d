"""What every lab shares: run the arms that are not on disk, tabulate mean and spread, write the table where it is read."""
import csv
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import train


@dataclasses.dataclass
class Flags:
    """Flags of a lab."""
    seeds: int = 3              # how often each arm is run; the spread is over these seeds
    arms: str = ""              # only these arms, comma separated: so that two processes can share the work
    out: str = "out/labs"       # folder of the results, one a lab; an arm whose result lies there is not run again
    redo: bool = False          # run every arm again
    fast: bool = False          # a few steps of everything: does it run? The figures mean nothing
    table: str = ""             # write the table into this file, between its markers, instead of only printing it


def run_arms(lab, arms, flags, measure=train.run):
    """Run each arm (name -> Config) once a seed; returns rows: arm, seed, commit and the figures of measure(Config).

    A row is on disk, as result.json, the moment it is measured; <out>/<lab>.csv holds them all.
    """
    if flags.fast and flags.table:
        raise ValueError("--fast measures nothing: leave --table out")
    folder = Path(flags.out) / (lab + "-fast" * flags.fast)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    chosen = flags.arms.split(",") if flags.arms else list(arms)
    if unknown := [name for name in chosen if name not in arms]:
        raise ValueError(f"--arms={unknown[0]}: this lab has {', '.join(arms)}")
    todo = [(name, seed) for seed in range(flags.seeds) for name in chosen
            if flags.redo or not (folder / f"{name}_{seed}" / "result.json").exists()]
    spent = []
    for i, (name, seed) in enumerate(todo):
        eta = f", about {statistics.mean(spent) * (len(todo) - i):.0f} minutes" if spent else ""
        print(f"{lab}: arm {name}, seed {seed}; {len(todo) - i} runs left{eta}", flush=True)
        started, out = time.perf_counter(), folder / f"{name}_{seed}"
        figures = measure(dataclasses.replace(arms[name], seed=seed, out=str(out)))
        spent.append((time.perf_counter() - started) / 60)
        (out / "result.json").write_text(json.dumps(dict(arm=name, seed=seed, commit=commit) | figures))
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
    with open(folder.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name: 0 for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return rows

def table(rows, arms, columns):
    """A markdown table: an arm a row, mean ± standard deviation over its seeds; columns: title -> name of a figure."""
    def cell(arm, name):
        """One figure of one arm; a missing number is a word, never a dash."""
        values = [row[name] for row in rows if row["arm"] == arm and name in row]
        if not values:
            return "not measured"
        if isinstance(values[0], str):
            return ", ".join(sorted(set(values)))
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else " (1 seed)"
        return f"{statistics.mean(values):.3f}{spread}"
    seen = [arm for arm in arms if any(row["arm"] == arm for row in rows)]
    lines = [["arm", *columns], ["---"] * (len(columns) + 1), *([arm, *(cell(arm, name) for name in columns.values())]
                                                                for arm in seen)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def publish(lab, rows, text, path):
    """Print a table; with a path, write it between <!-- lab --> and <!-- /lab --> there, with command and commits."""
    print(text)
    if path:
        commits = ", ".join(sorted({row["commit"] for row in rows}))
        body = (f"<!-- {lab} -->\nWritten by `python -m labs.{lab} --table={path}`, measured at commit {commits}.\n\n"
                f"{text}\n<!-- /{lab} -->")
        page, n = re.subn(f"<!-- {lab} -->.*?<!-- /{lab} -->", lambda _: body, Path(path).read_text(), flags=re.DOTALL)
        if not n:
            raise ValueError(f"--table={path} has no place for it: add the lines <!-- {lab} --> and <!-- /{lab} -->")
        Path(path).write_text(page)

def main(lab):
    """Run a lab's main(flags) with the usual manners."""
    try:
        lab(Flags(**train.read_flags(Flags, None, f"labs.{lab.__name__}")))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
