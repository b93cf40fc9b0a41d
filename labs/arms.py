"""What every lab shares: run the arms that are not on disk, tabulate mean and spread, write the table into a page."""
import csv
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

import train


# how an arm may fail: what it was asked for, the disk, torch (or its process, whose end is a RuntimeError too)
FAILURES = ValueError, OSError, RuntimeError

@dataclasses.dataclass
class Flags:
    """Flags of a lab."""
    seeds: int = 3              # how often each arm is run; the spread is over these seeds
    arms: str = ""              # only these arms, comma separated: so that two processes can share the work
    out: str = "out/labs"       # folder of the results, one a lab; an arm whose result lies there is not run again
    redo: bool = False          # run every arm again
    jobs: int = 1               # so many arms at once, each in a process of its own, with its share of the threads
    fast: bool = False          # a few steps of everything: does it run? The figures mean nothing
    table: str = ""             # write the table into this file, between its markers, instead of only printing it


def commit():
    """The commit that is measured; "-dirty" if the tree has changed since."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()

def machine():
    """Where a figure was measured, in words."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"

def settings(cfg):
    """What an arm is, but for its seed and where it runs: its fields, as JSON has them."""
    fields = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in ("seed", "out", "device")}
    return json.loads(json.dumps(fields))

def measured(path, cfg):
    """Is the result of an arm on disk? ValueError if it is that of another arm which had its name."""
    if not path.exists():
        return False
    then, now = json.loads(path.read_text()).get("config", {}), settings(cfg)
    if other := [name for name in then if then[name] != now.get(name)]:
        raise ValueError(f"{path} was measured with {other[0]}={then[other[0]]}, and now it is {now.get(other[0])}: "
                         "take another --out, or remove its folder")
    return True

def run_arm(name, cfg, measure):
    """Run one arm; its row is on disk, as result.json, the moment it is measured."""
    figures = measure(cfg)
    row = dict(arm=name, seed=cfg.seed, commit=commit(), device=machine(), config=settings(cfg))
    (Path(cfg.out) / "result.json").write_text(json.dumps(row | figures))
    return f"arm {name}, seed {cfg.seed}"

def finish(todo, jobs):
    """Run the arms of todo, jobs at once; yields the name of each that is done. One that fails stops no other: its
    error is said at once, and the first one is raised at the end."""
    failed = []
    def name_of(result):
        """Of an arm that is done, or None; result: a function that returns the name, or raises what went wrong."""
        try:
            return result()
        except FAILURES as error:
            print(f"an arm failed: {error!r}", flush=True)
            failed.append(error)
    if jobs == 1:
        yield from filter(None, (name_of(partial(run_arm, *one)) for one in todo))
    else:
        threads = max(1, torch.get_num_threads() // jobs)       # else those of all arms contend for the same cores
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
            runs = as_completed([pool.submit(run_arm, *one) for one in todo])
            yield from filter(None, (name_of(run.result) for run in runs))
    if failed:
        raise failed[0]

def chosen(flags, arms):
    """Names of the arms that --arms asks for, all without it; ValueError names those that there are."""
    names = flags.arms.split(",") if flags.arms else list(arms)
    if unknown := [name for name in names if name not in arms]:
        raise ValueError(f"--arms={unknown[0]}: this lab has {', '.join(arms)}")
    return names

def folder_of(lab, flags):
    """Where the results of a lab lie."""
    if flags.fast and flags.table:
        raise ValueError("--fast measures nothing: leave --table out")
    return Path(flags.out) / (lab + "-fast" * flags.fast)

def results(lab, flags):
    """Rows of all that a lab has on disk: arm, seed, commit and figures. <out>/<lab>.csv holds them too."""
    folder = folder_of(lab, flags)
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".csv"), "w", newline="") as file:
        names = sorted({name for row in rows for name in row if name != "config"})
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return rows

def run_arms(lab, arms, flags, measure=train.run):
    """Run each arm (name -> Config) once a seed, as far as its result is not on disk; returns all `results`."""
    folder = folder_of(lab, flags)
    todo = [(name, dataclasses.replace(arms[name], seed=seed, out=str(folder / f"{name}_{seed}")), measure)
            for seed in range(flags.seeds) for name in chosen(flags, arms)
            if flags.redo or not measured(folder / f"{name}_{seed}" / "result.json", arms[name])]
    started = time.perf_counter()
    for i, name in enumerate(finish(todo, flags.jobs), 1):
        eta = (time.perf_counter() - started) / 60 / i * (len(todo) - i)
        print(f"{lab}: {name} is done; {len(todo) - i} runs left, about {eta:.0f} minutes", flush=True)
    return results(lab, flags)

def markdown(lines):
    """A markdown table from lists of cells; the first is the header."""
    header, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rest])

def table(rows, arms, columns):
    """A markdown table: an arm a row, mean ± standard deviation over its seeds; columns: title -> name of a figure."""
    def cell(arm, name):
        """One figure of one arm; a missing number is a word, never a dash."""
        values = [row[name] for row in rows if row["arm"] == arm and name in row]
        if not values:
            return "not measured"
        if isinstance(values[0], str):
            return ", ".join(sorted(set(values)))
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        few = {1: " (1 seed)", 2: " (2 seeds)"}.get(len(values), "")            # three are what is asked for
        return f"{statistics.mean(values):.3f}{spread}{few}"
    seen = [arm for arm in arms if any(row["arm"] == arm for row in rows)]
    return markdown([["arm", *columns], *([arm, *(cell(arm, name) for name in columns.values())] for arm in seen)])

def tables(rows, parts):
    """Markdown: a titled table for each of parts, title -> (arms, columns), of which any arm was measured."""
    return "\n\n".join(f"{title}:\n\n{table(rows, arms, columns)}" for title, (arms, columns) in parts.items()
                       if any(row["arm"] in arms for row in rows))

def publish(lab, rows, text, path):
    """Print a table; with a path, write it between <!-- lab --> and <!-- /lab --> there, with command and commits."""
    print(text)
    if path:
        commits, devices = (", ".join(sorted({row.get(name, "a CPU") for row in rows}))
                            for name in ("commit", "device"))
        body = (f"<!-- {lab} -->\nWritten by `python -m labs.{lab} --table={path}`, measured at commit {commits} on "
                f"{devices}.\n\n"
                f"{text}\n<!-- /{lab} -->")
        page, n = re.subn(f"<!-- {lab} -->.*?<!-- /{lab} -->", lambda _: body, Path(path).read_text(), flags=re.DOTALL)
        if not n:
            raise ValueError(f"--table={path} has no place for it: add the lines <!-- {lab} --> and <!-- /{lab} -->")
        Path(path).write_text(page)

def main(lab, kind=Flags):
    """Run a lab's main(flags) with the usual manners; kind: its flags, where it has more of them."""
    try:
        lab(kind(**train.read_flags(kind, None, f"labs.{lab.__name__}")))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
