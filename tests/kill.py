"""
Kill train.py at random moments, resume it, compare the final weights with those of an uninterrupted run, bit by bit.
Every second kill waits for the next checkpoint and strikes while that is being written.

    python -m tests.kill            20 kills, some minutes: too long for the test-suite, which stops each phase once instead
"""
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import train
from tests.toy import FLAGS, write_corpus


def start(folder, out, *more):
    """A training process on the toy."""
    flags = {**FLAGS, "pretrain_steps": 40, "distill_steps": 40, "speak_steps": 40, "eval_every": 10, "out": out,
             "data": folder / "text.txt", "qa": folder / "qa.tsv"}
    argv = more or [f"--{name}={value}" for name, value in flags.items()]
    return subprocess.Popen([sys.executable, "train.py", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_and_resume(folder, whole, seconds, rng, i):
    """One kill; returns where it hit and whether the resumed run ended with the same weights."""
    out = folder / f"killed{i}"
    process, partial = start(folder, out), out / "ckpt.part"
    time.sleep(rng.uniform(0.2, 0.95) * seconds)
    while i % 2 and process.poll() is None and not partial.exists():
        pass
    process.kill()
    process.wait()
    found = train.load_checkpoint(out) if (out / "ckpt.pt").exists() else None
    where = f"{found['phase']} step {found['step']}" if found else "before the first checkpoint"
    writing = partial.exists()
    resumed = start(folder, out, "--resume", f"--out={out}") if found else start(folder, out)
    same = resumed.wait() == 0 and all(torch.equal(value, whole[name])
                                       for name, value in train.load_checkpoint(out)["model"].items())
    shutil.rmtree(out)
    return where + (", while a checkpoint was being written" if writing else ""), same


def main(kills=20):
    """Run the kills and print one line each."""
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), random.Random(0)
        write_corpus(folder)
        started = time.perf_counter()
        assert start(folder, folder / "whole").wait() == 0
        seconds, whole = time.perf_counter() - started, train.load_checkpoint(folder / "whole")["model"]
        results = []
        for i in range(kills):
            where, same = kill_and_resume(folder, whole, seconds, rng, i)
            results.append(same)
            print(f"kill {i + 1}: last checkpoint {where}; {'bit-identical' if same else 'DIFFERENT'}", flush=True)
        print(f"{sum(results)} of {kills} bit-identical")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
