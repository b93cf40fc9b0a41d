"""
Two processes at once: on one folder of a run, and on one folder of the shipped facts.

    python -m tests.pairs               20 pairs of each, about 2 minutes; seed 0

Runs: the second process begins up to a second after the first, with the same --out. Exactly one
trains and ends with the same weights as alone; the other is refused with the number of the first.
Facts: two processes prepare a fresh folder with different vocabularies. Each reads its own files,
as if it had been alone.
"""
import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

import data
import report
import train
from data.facts import prepare
from tests.forked import Process
from tests.kill import draw_nothing, fresh_facts
from tests.toy import FLAGS, as_argv, config, write_corpus


def begin(folder, name, argv):
    """A training process; its streams are in folder/name."""
    def without_drawing():
        report.draw_curves = draw_nothing
    (folder / name).mkdir(exist_ok=True)
    return Process(train.main, argv, folder / name, without_drawing)


def pair_of_runs(folder, argv, old, expected, later):
    """Two runs in one folder. AssertionError if anything but one good run came of it."""
    out = folder / "run"
    if old:
        shutil.copytree(old, out)
    first = begin(folder, "first", [*argv, f"--out={out}"])
    time.sleep(later)
    second = begin(folder, "second", [*argv, f"--out={out}"])
    processes = first, second
    ends = [process.wait() for process in processes]
    assert sorted(end.code for end in ends) == [0, 2], [(end.code, end.err[-300:]) for end in ends]
    refused = ends[0].code == 2
    said = ends[not refused].err
    found = re.search(r"in use by process (\d+)", said)
    assert found, said
    trained = processes[refused].pid
    assert int(found[1]) == trained, f"process {found[1]} was named, {trained} trains"
    weights = train.load_checkpoint(out)["model"]
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    report.read_metrics(out)
    shutil.rmtree(out)


def pair_of_preparations(folder, sizes, expected):
    """Two preparations at once. AssertionError if one reads what it does not read alone."""
    facts = folder / "facts"
    prepare_fresh(facts)
    def read(argv):
        prepare.HERE = facts
        cfg = config(folder, folder / "x", data="facts", qa="", vocab_size=int(argv[0]))
        print(data.load(cfg).fingerprint)
    processes = []
    for number, size in enumerate(sizes):
        (folder / f"read{number}").mkdir(exist_ok=True)
        processes.append(Process(read, [str(size)], folder / f"read{number}"))
    for size, process in zip(sizes, processes):
        ended = process.wait()
        assert ended.code == 0, ended.err
        assert ended.out.split()[-1] == expected[size], f"--vocab_size={size} read other files"
    left = [path.name for path in facts.glob("*.part")]
    assert not left, f"left over: {left}"
    shutil.rmtree(facts)


def prepare_fresh(facts):
    """An own folder of facts, in which nothing was prepared."""
    here = prepare.HERE
    fresh_facts(facts)
    prepare.HERE = here


def alone(folder, size):
    """The fingerprint of a corpus that one process prepared."""
    here = prepare.HERE
    facts = folder / "facts"
    fresh_facts(facts)
    try:
        cfg = config(folder, folder / "x", data="facts", qa="", vocab_size=size)
        return data.load(cfg).fingerprint
    finally:
        prepare.HERE = here
        shutil.rmtree(facts)


def main():
    """Command line."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    right = dict(runs=0, preparations=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        flags = FLAGS | dict(data=folder / "text.txt", qa=folder / "qa.tsv", pretrain_steps=60,
                             distill_steps=20, speak_steps=20, eval_every=20)
        new = as_argv(flags)
        assert begin(folder, "alone", [*new, f"--out={folder / 'whole'}"]).wait().code == 0
        shutil.copytree(folder / "whole", folder / "again")
        anew = ["--phase=distill", "--seed=1", "--distill_steps=60"]
        assert begin(folder, "alone", [*anew, f"--out={folder / 'again'}"]).wait().code == 0
        commands = [(new, None, train.load_checkpoint(folder / "whole")["model"]),
                    (anew, folder / "whole", train.load_checkpoint(folder / "again")["model"])]
        for number in range(given.pairs):
            later = rng.choice((0, 0, 0.05, 0.2, 0.5))
            try:
                pair_of_runs(folder, *commands[number % 2], later)
                right["runs"] += 1
                said = "one trained, one was refused"
            except AssertionError as error:
                said = f"WRONG: {error}"
                shutil.rmtree(folder / "run", ignore_errors=True)
            print(f"pair {number + 1} of runs, {later} s apart: {said}", flush=True)
        sizes = [400, 500, 800, 1200, 2048]
        expected = {size: alone(folder, size) for size in sizes}
        for number in range(given.pairs):
            two = rng.sample(sizes, 2)
            try:
                pair_of_preparations(folder, two, expected)
                right["preparations"] += 1
                said = "each read its own files"
            except AssertionError as error:
                said = f"WRONG: {error}"
                shutil.rmtree(folder / "facts", ignore_errors=True)
            print(f"pair {number + 1} of preparations, {two}: {said}", flush=True)
    print(f"{right['runs']} and {right['preparations']} of {given.pairs} pairs (seed {given.seed})")
    sys.exit(min(right.values()) < given.pairs)


if __name__ == "__main__":
    main()
