"""
A disk that is full at each write of a run in turn, and what the checksum of a checkpoint costs.

    python -m tests.disk            a minute; mounts small file systems, which needs root
    python -m tests.disk --cost     half a minute: the time of saving a checkpoint

A phase is begun anew on a finished toy run. When it is about to write its first ckpt.pt, copy of
the previous ckpt.pt, config.json, metrics.csv, a snapshot, curves.png or lock.pid, the disk is
filled but for some bytes. Checked: exit code 2 and one line, or the run goes on where the file is
not needed; the old checkpoint is whole; when there is room again, the command or --resume ends
with the same weights as undisturbed.
"""
import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import report
import train
from tests.forked import Process
from tests.kill import old_is_whole
from tests.toy import FLAGS, as_argv, write_corpus

# the file that is being written -> which of its writes hits the full disk
WRITES = [("ckpt.previous.part", 1), ("ckpt.part", 1), ("ckpt.part", 2), ("ckpt.part", 3),
          ("config.part", 1), ("config.part", 2), ("config.part", 3), ("metrics.part", 1),
          ("metrics.csv", 1), ("speak-20.part", 1), ("curves.part.png", 1), ("curves.part.png", 2),
          ("lock.pid", 1), ("lock", 1)]
ANEW = ["--phase=speak", "--seed=1", "--speak_steps=40", "--eval_every=20"]


def fill(folder, left):
    """Fill the file system of a folder but for `left` bytes."""
    with open(folder / "filling", "wb") as file:
        while True:
            try:
                file.write(bytes(4096))
                file.flush()
            except OSError:
                break
    os.truncate(folder / "filling", max(0, (folder / "filling").stat().st_size - left))


def fill_before(disk, name, time_of_it, left):
    """In a process: fill the disk just before a file of this name is opened for writing."""
    seen = [0]

    def look(event, arguments):
        if event != "open" or not isinstance(arguments[0], (str, os.PathLike)):
            return
        writes = arguments[1] and set(arguments[1]) & set("wa+") or (arguments[2] or 0) & 3
        if writes and Path(arguments[0]).name == name and disk in Path(arguments[0]).parents:
            seen[0] += 1
            if seen[0] == time_of_it:
                (disk / "full").touch()
                fill(disk, left)
    sys.addaudithook(look)


def attempt(folder, disk, old, expected, name, number, left):
    """What happened when the disk was full at a write; raises AssertionError if it was wrong."""
    out = disk / "run"
    shutil.copytree(folder / "run", out)
    if name.startswith("lock"):
        (out / name).unlink(missing_ok=True)

    def prepare():
        fill_before(disk, name, number, left)
    ended = Process(train.main, [*ANEW, f"--out={out}"], folder, prepare).wait()
    assert "Traceback" not in ended.err, ended.err
    assert ended.code in (0, 2), ended.code
    assert (disk / "full").exists(), f"{name} was not written {number} times"
    assert old_is_whole(out, old), "the old checkpoint is lost"
    said = ended.err.replace("\r", "\n").strip().splitlines()[-1] if ended.code else ""
    assert not ended.code or said.startswith("train.py: error: "), said
    train.load_checkpoint(out)
    for path in (disk / "filling", disk / "full"):
        path.unlink(missing_ok=True)
    saved = (out / "ckpt.pt").read_bytes() != old
    argv = ["--resume"] if saved else ANEW
    again = Process(train.main, [*argv, f"--out={out}"], folder).wait()
    assert again.code == 0, again.err[-300:]
    found = train.load_checkpoint(out)
    assert all(torch.equal(value, expected[key]) for key, value in found["model"].items())
    written = json.loads((out / "config.json").read_text())
    assert not found["config"].items() - written.items(), "config.json is not that of ckpt.pt"
    assert len(report.read_metrics(out)) == len(found["rows"]), "metrics.csv lacks rows"
    assert old_is_whole(out, old), "the old checkpoint is lost"
    return f"exit code {ended.code}, {'--resume' if saved else 'the same command'} went on: {said}"


def full_disks(folder):
    """Number of attempts, and of those that were right."""
    write_corpus(folder)
    flags = FLAGS | dict(data=folder / "text.txt", qa=folder / "qa.tsv", distill_steps=40,
                         speak_steps=40, eval_every=20)
    process = Process(train.main, [*as_argv(flags), f"--out={folder / 'run'}"], folder)
    assert process.wait().code == 0
    old = (folder / "run" / "ckpt.pt").read_bytes()
    shutil.copytree(folder / "run", folder / "whole")
    assert Process(train.main, [*ANEW, f"--out={folder / 'whole'}"], folder).wait().code == 0
    expected = train.load_checkpoint(folder / "whole")["model"]
    disk = folder / "disk"
    right = attempts = 0
    for name, number in WRITES:
        for left in (0, 8192):
            disk.mkdir(exist_ok=True)
            made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk],
                                  capture_output=True, text=True, check=False)
            if made.returncode:
                print(f"skipped: this machine allows no mount ({made.stderr.strip()})")
                return 0, 0
            attempts += 1
            try:
                said = attempt(folder, disk, old, expected, name, number, left)
                right += 1
            except AssertionError as error:
                said = f"WRONG: {error}"
            finally:
                # -l: also where something on the machine still looks into it
                subprocess.run(["umount", "-l", disk], check=True)
            print(f"full at write {number} of {name}, {left} bytes left: {said}", flush=True)
    return attempts, right


def cost(folder, repetitions=30):
    """Seconds of saving the default model with its optimizer, with the checksum and without."""
    cfg = train.Config(device="cpu", dtype="fp32", out=str(folder))
    corpus = train.data.load(cfg)
    model = train.build(cfg, corpus.tokenizer)
    run = train.Run(cfg, model, corpus, "cpu", None)
    optimizer = train.make_optimizer(run, "pretrain")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    checkpoint = dict(config={}, model=model.state_dict(), optimizer=optimizer.state_dict())
    with_checksum = train.seal
    seconds = {True: [], False: []}
    for repetition in range(2 * repetitions):
        checksum = repetition % 2 == 0
        train.seal = with_checksum if checksum else bytes
        begun = time.perf_counter()
        train.save_checkpoint(folder, checkpoint)
        seconds[checksum].append(time.perf_counter() - begun)
    train.seal = with_checksum
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    dear, cheap = (statistics.median(seconds[checksum]) for checksum in (True, False))
    print(f"{buffer.tell() / 1e6:.1f} MB: {dear * 1000:.0f} ms with the checksum, "
          f"{cheap * 1000:.0f} ms without: {dear / cheap:.2f} x (medians of {repetitions})")
    return dear / cheap


def main():
    """Command line."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("--cost", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if given.cost:
            sys.exit(cost(Path(name)) >= 1.3)
        attempts, right = full_disks(Path(name))
    print(f"{right} of {attempts} full disks: the old checkpoint whole, the run went on")
    sys.exit(right < attempts)


if __name__ == "__main__":
    main()
