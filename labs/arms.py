"""What the labs share: run the arms that have no results yet, and keep their figures."""
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

import train
from flags import read_flags
from labs.records import REPOSITORY, append, file_of, read_rows, replace, results

# how an arm may fail: bad input, the disk, torch (a process that dies is a RuntimeError too)
FAILURES = ValueError, OSError, RuntimeError

@dataclasses.dataclass
class Flags:
    """Flags of a lab."""
    seeds: int = 3              # number of runs of each arm; 0 runs nothing and shows what there is
    arms: str = ""              # only these arms, comma separated: two processes can share the work
    out: str = "out/labs"       # folder of checkpoints and logs, one folder per run
    results: str = "labs/results"   # folder of the results files, relative to the repository
    redo: bool = False          # measure again what has results, and replace them
    jobs: int = 1               # number of runs at once, each in its own process
    fast: bool = False          # a few steps of everything, to see that it runs
    table: str = ""             # also write the table into this file, between its markers

def folder_of(lab, flags):
    """The folder of a lab's runs. ValueError for a table of a --fast run."""
    if flags.fast and flags.table:
        raise ValueError("--fast measures nothing: leave --table out")
    return Path(flags.out) / (f"{lab}-fast" if flags.fast else lab)

def commit():
    """The commit that is measured; "-dirty" if the code has changed since. Results are not code."""
    git = partial(subprocess.run, cwd=REPOSITORY, capture_output=True, text=True)
    name = git(["git", "describe", "--always"]).stdout.strip()
    compared = git(["git", "diff", "--quiet", "HEAD", "--", ".", ":!labs/results"])
    return name + "-dirty" * (compared.returncode == 1)

def machine():
    """The device of a measurement, in words."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"

def in_short(cfg):
    """The --fast version of an arm: two steps of each phase and a tiny model."""
    steps = "pretrain_steps", "distill_steps", "speak_steps"
    few = {name: min(2, getattr(cfg, name)) for name in steps}
    return dataclasses.replace(cfg, **few, n_embd=32, n_layer=1, pred_embd=16, top_k=1, dec_layer=1,
                               batch_size=8, qa_batch_size=16)

def default_of(field):
    """The default of a dataclass field."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()

def changes(cfg):
    """The fields, but for seed, out and device, in which a run differs from its defaults, as JSON.

    A path below --out is written as {out}/...: another --out is not another arm.
    """
    root, found = str(Path(cfg.out).parent.parent) + os.sep, {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in ("seed", "out", "device") or value == default_of(field):
            continue
        if isinstance(value, str) and value.startswith(root):
            value = "{out}/" + value.removeprefix(root)
        found[field.name] = value
    return json.loads(json.dumps(found))

def check_unchanged(path, arm, cfg):
    """ValueError if the arm was measured with another configuration than it has now."""
    new = changes(cfg)
    defaults = {field.name: default_of(field) for field in dataclasses.fields(cfg)}
    for row in read_rows(path):
        if row["arm"] != arm or row["figure"] != "config":
            continue
        old = json.loads(row["value"])
        for name in sorted(old.keys() | new.keys()):
            then, now = (part.get(name, defaults.get(name)) for part in (old, new))
            if then != now:
                raise ValueError(f"{path}: arm '{arm}' was measured with {name}={then} and now has "
                                 f"{name}={now}; --redo measures it again")

def missing(lab, names, flags):
    """(arm, seed) of the runs that are still to be measured; with --redo all of them."""
    there = set()
    for row in read_rows(file_of(lab, flags)):
        seeds = [int(row["seed"])] if row["seed"] else range(int(row["seeds"]))
        there.update((row["arm"], seed) for seed in seeds)
    every = [(name, seed) for seed in range(flags.seeds) for name in names]
    return [run for run in every if flags.redo or run not in there]

def run_arm(arm, cfg, measure):
    """Measure one arm with one seed. Returns its rows: the configuration, then a row per figure."""
    found = measure(cfg)
    figures = dict(config=json.dumps(changes(cfg), separators=(",", ":"))) | found
    shared = dict(arm=arm, seed=cfg.seed, deviation="", seeds=1, commit=commit(), device=machine())
    rows = []
    for name, value in figures.items():
        text = value if isinstance(value, str) else json.dumps(value)
        rows.append(shared | dict(figure=name, value=text))
    return rows

def finish(todo, jobs):
    """Do the runs of todo, jobs at a time; yields the rows of each that is done.

    A failed run does not stop the rest: its error is printed, and the first is raised at the end.
    """
    failed = []

    def rows_of(result):
        """The rows that result() returns, or None if it raises."""
        try:
            return result()
        except FAILURES as error:
            print(f"an arm failed: {error!r}", flush=True)
            failed.append(error)
    if jobs == 1:
        yield from filter(None, (rows_of(partial(run_arm, *run)) for run in todo))
    else:
        # with all threads in each process they would wait for the same cores
        threads = max(1, torch.get_num_threads() // jobs)
        spawn = get_context("spawn")
        with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (threads,)) as pool:
            runs = as_completed([pool.submit(run_arm, *run) for run in todo])
            yield from filter(None, (rows_of(run.result) for run in runs))
    if failed:
        raise failed[0]

def chosen(flags, arms):
    """The names that --arms asks for, all without it. ValueError if there is no such arm."""
    names = flags.arms.split(",") if flags.arms else list(arms)
    for name in names:
        if name not in arms:
            raise ValueError(f"--arms={name}: this lab has {', '.join(arms)}")
    return names

def run_arms(lab, arms, flags, measure=train.run):
    """Run each arm (name -> Config) with each seed that has no results yet; returns all `results`.

    The figures are in the results file the moment they are measured. ValueError if an arm was
    measured with another configuration; the first error of a failed run, after all others have run.
    """
    folder, path, names = folder_of(lab, flags), file_of(lab, flags), chosen(flags, arms)
    folder.parent.mkdir(parents=True, exist_ok=True)
    todo = missing(lab, names, flags)
    if skipped := flags.seeds * len(names) - len(todo):
        print(f"{lab}: {skipped} runs are in {path} and are skipped; --redo measures them again")
    placed = {}
    for name in names:
        for seed in range(flags.seeds):
            out = str(folder / f"{name}_{seed}")
            placed[name, seed] = dataclasses.replace(arms[name], seed=seed, out=out)
        if flags.seeds and not flags.redo:
            check_unchanged(path, name, placed[name, 0])
    started, left = time.perf_counter(), len(todo)
    for rows in finish([(name, placed[name, seed], measure) for name, seed in todo], flags.jobs):
        (replace if flags.redo else append)(path, rows)
        left -= 1
        minutes = (time.perf_counter() - started) / 60 / (len(todo) - left) * left
        print(f"{lab}: arm {rows[0]['arm']}, seed {rows[0]['seed']} is done; "
              f"{left} runs left, about {minutes:.0f} minutes", flush=True)
    return results(lab, flags)

def run_or_try(lab, arms, flags, measure, short):
    """`run_arms` -> `results`; with --fast the arms short(cfg), with one seed -> None."""
    if not flags.fast:
        return run_arms(lab, arms, flags, measure)
    print(f"labs.{lab} --fast: under a minute on one core; its figures mean nothing")
    arms = {name: short(cfg) for name, cfg in arms.items()}
    run_arms(lab, arms, dataclasses.replace(flags, seeds=1, redo=True), measure)

def main(lab, kind=Flags, argv=None):
    """Run a lab's main(flags) from the command line; bad input is one line and exit code 2."""
    try:
        lab(kind(**read_flags(kind, argv, f"labs.{lab.__name__}")))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
