"""
Kill train.py at 60 random moments, go on, and compare with the same command undisturbed.

    python -m tests.kill                60 kills, some minutes; seed 0
    python -m tests.kill --kills=25     a quick look, one kill of each kind
    python -m tests.kill --part=0/2     every second kill: two parts may run at once

The toy of tests/toy.py goes through all three phases, or through the two of a text without
questions; or on a finished run a phase is begun anew with another seed, or facts are added once or
twice; or phase 1 goes on from it in a new folder. SIGKILL strikes at a random moment, while a file
is being written, in the first evaluation of a phase begun anew, or while the shipped facts are
being prepared.
Checked after each kill:

    the checkpoint that was there before is whole, as ckpt.pt or ckpt.previous.pt, at every moment
    --resume, or the same command if nothing was saved yet, ends with the same weights, bit by bit
    metrics.csv has the same rows (without the speed), config.json says what ckpt.pt holds
"""
import argparse
import csv
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

import report
import train
from data.facts import prepare
from tests.forked import Process
from tests.toy import FLAGS, as_argv, write_corpus

STEPS = dict(pretrain_steps=40, distill_steps=40, speak_steps=40, teach_steps=40, eval_every=20)
# what is done on a finished run -> the command that made it
FINISHED = dict(pretrain="all", distill="all", speak="all", teach="all", more="teach", gaps="text")
# how often each command is killed at each kind of moment, of 60
KINDS = {("all", "any"): 6, ("all", "writing"): 6, ("facts", "preparing"): 6}
KINDS |= {(name, moment): 2 for name in FINISHED for moment in ("any", "writing", "evaluating")}
KINDS |= {("text", "any"): 2, ("text", "writing"): 2, ("init", "any"): 1, ("init", "writing"): 1}


class Command(NamedTuple):
    """A command line that is killed."""
    argv: list                  # without --out
    seconds: float              # that it takes undisturbed
    weights: dict               # that it ends with
    rows: list                  # of its metrics.csv, without the speed


def rows_of(out):
    """The rows of metrics.csv without tok_s, which is never the same twice."""
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["tok_s"] = ""
    return rows


def commands(folder):
    """Name -> argv: whole runs, a phase begun anew, facts added, a run on the shipped facts."""
    paths = dict(data=folder / "text.txt", qa=folder / "qa.tsv")
    whole = as_argv(FLAGS | STEPS | paths)
    facts = as_argv(FLAGS | dict(phase="pretrain", pretrain_steps=4, vocab_size=800))
    for name, thing in (("new", "fern"), ("more", "reed")):
        (folder / f"{name}.tsv").write_text(f"Who painted the {thing}?\tAda\n"
                                            f"What is the colour of the {thing}?\tpink\n")
    return dict(
        all=whole,
        pretrain=[*whole, "--phase=pretrain", "--seed=1"],
        distill=["--phase=distill", "--seed=1"],
        speak=["--phase=speak", "--seed=1"],
        teach=["--phase=teach", f"--qa={folder / 'new.tsv'}"],
        more=["--phase=teach", f"--qa={folder / 'more.tsv'}", "--seed=1"],
        text=[*whole, "--qa="],
        gaps=["--phase=speak", "--seed=1"],
        init=[*whole, f"--init_from={folder / 'whole-all'}", "--seed=1"],
        facts=facts)


def fresh_facts(folder):
    """A folder of the shipped facts in which nothing was prepared yet; called in a process."""
    folder.mkdir(exist_ok=True)
    for name in prepare.SOURCES:
        shutil.copy(prepare.HERE / name, folder)
    prepare.HERE = folder


def mark_evaluations(mark):
    """Leave a mark when a phase is evaluated, and let it take a while longer."""
    def marked(begin):
        def begun(run):
            loss_at, measure = begin(run)

            def slow_measure(whole):
                mark.touch()
                time.sleep(0.1)
                figures = measure(whole)
                time.sleep(0.1)
                return figures
            return loss_at, slow_measure
        return begun
    train.PHASE_OF = {name: marked(begin) for name, begin in train.PHASE_OF.items()}


def draw_nothing(rows, phases, path, title):
    """Takes the place of `report.draw_curves`, which takes longer than the toy is trained."""
    train.write_safely(path, b"no picture")


def begin(folder, out, name, argv, moment=None, draws=False):
    """A process that runs a command in out."""
    def prepare_process():
        if not draws:
            report.draw_curves = draw_nothing
        if name == "facts":
            fresh_facts(folder / f"facts-{out.name}")
        if moment == "evaluating":
            mark_evaluations(folder / f"mark-{out.name}")
    streams = folder / f"streams-{out.name}"
    streams.mkdir(exist_ok=True)
    return Process(train.main, [*argv, f"--out={out}"], streams, prepare_process)


def whole_run(folder, name, argv, finished=None):
    """Run a command undisturbed: a `Command`."""
    out = folder / f"whole-{name}"
    if finished:
        shutil.copytree(finished, out)
    ended = begin(folder, out, name, argv).wait()
    assert ended.code == 0, ended.err
    return Command(argv, ended.seconds, train.load_checkpoint(out)["model"], rows_of(out))


def old_is_whole(out, old):
    """Is the old checkpoint (bytes) there? ckpt.pt is read first, because it is renamed last."""
    try:
        if (out / "ckpt.pt").read_bytes() == old:
            return True
        return (out / train.PREVIOUS).read_bytes() == old
    except FileNotFoundError:
        return False


def wait_for(process, moment, seconds, rng, folder, out, check):
    """Wait until the moment to kill a process; check() is called all the time."""
    def until(condition):
        while process.running() and not condition():
            check()
            time.sleep(0.0005)

    stop = time.perf_counter() + rng.uniform(0.02, 0.98) * seconds
    if moment == "any":
        until(lambda: time.perf_counter() > stop)
    elif moment == "writing":
        part = out / rng.choice(("ckpt.part", "ckpt.part", "ckpt.previous.part", "config.part",
                                 "curves.part", "metrics.part"))
        if part.stem in ("ckpt", "config", "curves"):       # these are written more than once
            until(lambda: time.perf_counter() > stop)
        until(part.exists)
    elif moment == "evaluating":
        until((folder / f"mark-{out.name}").exists)
        stop = time.perf_counter() + rng.uniform(0, 0.2)
        until(lambda: time.perf_counter() > stop)
    else:
        facts = folder / f"facts-{out.name}"
        until(lambda: any(facts.glob("*.part")))
        stop = time.perf_counter() + rng.uniform(0, 0.3)
        until(lambda: time.perf_counter() > stop)


def kill(folder, name, moment, command, rng, number):
    """One kill: (where it hit, list of what was wrong after it)."""
    out = folder / f"killed{number}"
    old = None
    wrong = []
    if name in FINISHED:
        shutil.copytree(folder / f"whole-{FINISHED[name]}", out)
        old = (out / "ckpt.pt").read_bytes()

    def check():
        if old and not wrong and not old_is_whole(out, old):
            wrong.append("the earlier checkpoint was lost")

    process = begin(folder, out, name, command.argv, moment, draws=number % 5 == 0)
    wait_for(process, moment, command.seconds, rng, folder, out, check)
    ended_before = not process.running()
    process.kill()
    process.wait()
    check()

    path = out / "ckpt.pt"
    saved = path.exists() and path.read_bytes() != old
    where = "nothing was saved yet"
    if saved:
        found = train.load_checkpoint(out)
        where = f"last checkpoint: {found['phase']} step {found['step']}"
    if any(out.glob("*.part*")):
        where += f", {next(out.glob('*.part*')).name} was being written"
    if ended_before:
        where += ", it had ended"
    ended = begin(folder, out, name, ["--resume"] if saved else command.argv).wait()
    check()
    if ended.code != 0:
        wrong.append(f"exit code {ended.code}: {ended.err[-300:]}")
        return where, wrong
    checkpoint = train.load_checkpoint(out)
    for key, value in command.weights.items():
        if not torch.equal(checkpoint["model"][key], value):
            wrong.append(f"{key} differs")
            break
    if rows_of(out) != command.rows:
        wrong.append("metrics.csv differs")
    written = json.loads((out / "config.json").read_text())
    if checkpoint["config"].items() - written.items():
        wrong.append("config.json is not that of ckpt.pt")
    shutil.rmtree(out)
    return where, wrong


def main():
    """Run the kills and print one line each."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    # one of each kind in turn, so that few kills see all kinds
    rounds = [[kind for kind, times in KINDS.items() if i < times] for i in range(8)]
    kinds = list(enumerate(itertools.chain(*rounds), start=1))[:given.kills][part::parts]
    right = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        argv = commands(folder)
        known = {}
        for name in sorted(argv, key=lambda name: (name in FINISHED, name == "more")):
            source = folder / f"whole-{FINISHED[name]}" if name in FINISHED else None
            known[name] = whole_run(folder, name, argv[name], source)
        for number, (name, moment) in kinds:
            rng = random.Random(f"{given.seed}, {number}")
            where, wrong = kill(folder, name, moment, known[name], rng, number)
            right += not wrong
            print(f"kill {number}, {name}, {moment}: {where}; "
                  f"{'; '.join(wrong) or 'bit-identical'}", flush=True)
    print(f"{right} of {len(kinds)} kills: bit-identical, the earlier checkpoint never lost "
          f"(seed {given.seed})")
    sys.exit(right < len(kinds))


if __name__ == "__main__":
    main()
