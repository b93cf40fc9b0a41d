"""
Command lines and files that people or programs may give: each succeeds or is refused cleanly.

    python -m tests.cases               more than 900 cases, about 30 minutes; seed 0
    python -m tests.cases --part=0/2    every second case: two parts may run at once
    python -m tests.cases --only=^qa    the cases whose names match a regular expression

A case must end within 10 seconds of a processor: with exit code 0; with 2 and one line on stderr
that begins with `PROG: error:`; or with 130 after Ctrl-C. No traceback, no other exit code, no
control characters.
A refused command leaves every file of the run as it was, byte by byte, and creates no folder and
no file of vectors.
If training itself failed (its loss was no longer a number), the old checkpoint must still be there.
"""
import argparse
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

import report
import sample
import train
from data.facts import prepare
from tests.forked import Process
from tests.kill import fresh_facts
from tests.toy import COLOURS, FLAGS, PAIRS, as_argv, write_corpus

LIMIT = 10          # seconds
PROGRAMS = {"train.py": train.main, "sample.py": sample.main, "report.py": report.main}
SHORT = dict(pretrain_steps=2, distill_steps=2, speak_steps=2)


class Case(NamedTuple):
    """One command. {folder} in a word is the folder of all files; the runs of RUNS are in it."""
    name: str
    program: str
    words: list
    ctrl_c: float | None = None     # seconds after which Ctrl-C is pressed
    stdin: str = os.devnull


# -- flags -----------------------------------------------------------------------------------------
NUMBERS = ["", " ", "x", "nan", "inf", "-inf", "-1", "0", "1e400", "-0.0", "1e-320", "9" * 400,
           "1e3", "0x10", "١٢", "1_0", "½", "--", "-", "true", "None", "[1]", "\x1b[31m", "1\n2"]
WORDS = ["", " ", "x", "FACTS", "nan", "/", ".", "~", "\x1b[2J", "a\nb", "\u2028", "é" * 300,
         "\udcff", "-", "--out", "self ", "ckpt:", "ckpt:/", "ckpt:nowhere", "*", "a" * 5000]
BOOLEANS = ["", "perhaps", "2", "TRUE", "no ", "\udcff", "0.5", "None"]


def flag_cases(rng, number):
    """Values of every kind for flags of every kind, on a finished run or a new one."""
    values = {int: NUMBERS, float: NUMBERS, str: WORDS, bool: BOOLEANS}
    fields = [field for field in dataclasses.fields(train.Config)
              if field.name not in ("out", "compile")]
    begins = (["--resume"], ["--phase=distill", *as_argv(SHORT)], ["--phase=speak", "--no-resume"],
              ["{base}", *as_argv(SHORT)],
              ["--phase=teach", "--teach_steps=2", "--qa={folder}/files/new"])
    for _ in range(number):
        field = rng.choice(fields)
        value = rng.choice(values[field.type])
        begin = rng.choice(begins)
        words = [*begin, "--out={folder}/run", f"--{field.name}={value}"]
        if rng.random() < 0.2:
            words = [*begin, "--out={folder}/run", f"--{field.name}", value]
        yield Case(f"flag {field.name}={value[:20]!r}", "train.py", words)


ODD = ["--out=", "--out= ", "--out", "--out=a\0b", "--out=/dev/null", "--out=/dev/full",
       "--out=/proc/self", "--out=/proc/x/y", "--out={folder}/text.txt", "--out=" + "a" * 300,
       "--out=" + "a/" * 2500, "--out={folder}/a\nb", "--out={folder}/\udcff",
       "--out={folder}/loop",
       "--out={folder}/dangling", "--out={folder}/fifo", "--out={folder}/foreign",
       "--outt=x", "--learning_rate=1", "--max_iters=5", "-x", "--", "-", "x", "x y", "",
       "--n_embd", "--resume=maybe", "--no-n_embd", "--no-resume=1", "\udcff", "--\udcff=1",
       "--\x1b[31m=1", "---", "--=1", "--out--out", "--PHASE=all", "--phase:all", "@file",
       "--a\nb=1", "--" + "a" * 5000, "--help=1", "--version", "--seed=1 --seed=2",
       "--teacher_width=1000000"]


def odd_cases():
    """Words that are no flags, places where no run can be."""
    for word in ODD:
        yield Case(f"odd {word[:30]!r}", "train.py", ["{base}", *as_argv(SHORT), word])


# -- files -----------------------------------------------------------------------------------------
def write_files(folder):
    """Files of every kind: name -> path. Those that are not regular are made too."""
    text = (folder / "text.txt").read_text()
    good = [f"{question}\t{answer}" for question, answer in PAIRS]
    lines = "\n".join(good) + "\n"
    contents = {
        "empty": b"", "blank": b" \n\t\r\n ", "zero": b"\0", "zeros": bytes(10 ** 6),
        "utf16": lines.encode("utf-16"), "utf16be": lines.encode("utf-16-be"),
        "utf32": lines.encode("utf-32"), "cp1252": "Où?\tÉcole\n".encode("cp1252") * 9,
        "bom": b"\xef\xbb\xbf" + lines.encode(), "bom only": b"\xef\xbb\xbf",
        "surrogate": b"\xed\xa0\x80\tx\n", "overlong": b"\xc0\xaf\tx\n",
        "cut": lines.encode() + b"\xe2",
        "random": random.Random(0).randbytes(10 ** 5), "gzip": b"\x1f\x8b\x08" + bytes(99),
        "pdf": b"%PDF-1.7\n\xe2\xe3", "png": b"\x89PNG\r\n\x1a\n" + bytes(50),
        "html": b"<html><body>404</body></html>\n" * 50, "json": b'{"question": "a"}\n' * 50,
        "long line": b"a" * 2_000_000, "long words": b"ab " * 300_000, "newlines": b"\n" * 10 ** 6,
        "blanks": b" " * 2_000_000 + b"x", "combining": ("e" + "\u0301" * 300_000).encode(),
        "no blanks": "我们看见雪是蓝色的".encode() * 20_000, "digits": b"1234567890" * 100_000,
        "control": b"What?\x1b[2J\ta\x07b\n" * 20, "nul inside": lines.encode() + b"a\0b\tc\n",
        "emoji": "🦊? \t👩‍👩‍👧\n".encode() * 30, "rtl": "\u202eabc\tdef\n".encode() * 30,
        "cr": lines.replace("\n", "\r").encode(), "crlf": lines.replace("\n", "\r\n").encode(),
        "csv": ("question,answer\n" + lines.replace("\t", ",")).encode(),
        "semicolon": ("sep=;\n" + lines.replace("\t", ";")).encode(), "sep": b"sep=", "tab": b"\t",
        "quotes": b'"a\tb\n', "quote inside": b'"a"b\tc\n',
        "quoted": b'"Who\nis it?"\t"me, I"\n' * 3,
        "three": b"a\tb\tc\n", "one": b"a\n", "no answer": b"a\t\n", "no question": b"\tb\n",
        "two answers": b"a\tb\na\tc\n", "twice": lines.encode() * 2, "spaces": b"a    b\n",
        "header only": b"question\tanswer\n",
        "separators": "a\u2028b\u0085c\x0b\x0cd\te\n".encode(),
        "long question": b"w " * 500 + b"\tx\n", "long answer": b"x\t" + b"w " * 500 + b"\n",
        "huge field": b"x\t" + b"w" * 200_000 + b"\n", "many tabs": b"\t" * 10 ** 6,
        "many quotes": b'"' * 10 ** 6, "mixed": b"a\tb\nc,d\n",
        "nfd": "e\u0301?\te\u0301\n".encode(),
        "documents": b"a<|endoftext|>" * 3000, "ends": b"<|endoftext|>" * 3000,
        "last documents": text.encode() + b"<|endoftext|>a" * 1500,
        "one pair": b"Who?\tme\n", "new": b"Who painted the shed?\tAda\nWhose is it?\tmine\n",
        "other answers": lines.replace("\t", "\tnot ").encode(),
        "reworded": b"Say: which colour has moss?\tgreen\n",
        "reworded wrongly": b"Say: which colour has moss?\tnowhere\n",
        "many pairs": "".join(f"q{i}?\tn{i}\n" for i in range(3000)).encode(),
        "good": lines.encode(), "good text": text.encode(), "short text": text[:300].encode(),
        "other text": (text + " And more.").encode(),
    }
    files = {}
    for name, content in contents.items():
        files[name] = folder / "files" / name
        files[name].parent.mkdir(exist_ok=True)
        files[name].write_bytes(content)
    strange = folder / "files" / "a\nb \udcff.txt"
    strange.write_bytes(b"\xff")
    sparse = folder / "files" / "sparse"
    with open(sparse, "wb") as file:
        file.truncate(2 ** 43)
    for name, target in (("dangling", "/nowhere/x"), ("loop", folder / "loop")):
        os.symlink(target, folder / name)
    os.mkfifo(folder / "fifo")
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "metrics.csv").write_text("mine")
    files |= {"strange name": strange, "sparse": sparse, "fifo": folder / "fifo",
              "dangling": folder / "dangling", "loop": folder / "loop", "folder": folder,
              "missing": folder / "missing", "/dev/zero": Path("/dev/zero"),
              "/dev/null": Path("/dev/null"), "/dev/full": Path("/dev/full"),
              "/proc/self/mem": Path("/proc/self/mem"), "below a file": files["good"] / "x",
              "checkpoint": folder / "run" / "ckpt.pt", "stdin": Path("/dev/stdin")}
    return files


def file_cases(files):
    """Each file as a text, and as questions; some of them in a run that goes on."""
    for name, path in files.items():
        yield Case(f"data {name}", "train.py", [
            "{base}", *as_argv(SHORT), "--phase=pretrain", f"--data={path}", "--out={folder}/new"])
        yield Case(f"qa {name}", "train.py", [
            "--phase=distill", "--distill_steps=2", f"--qa={path}", "--out={folder}/run"])
    for name in ("good text", "other text", "missing", "fifo", "zeros", "strange name"):
        yield Case(f"moved to {name}", "train.py", [
            "--resume", "--speak_steps=102", f"--data={files[name]}", "--out={folder}/run"])


def write_vectors(folder):
    """.npz files of every kind: name -> path."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(COLOURS), 20))
    spoiled = vectors.copy()
    spoiled[3, 3] = np.inf
    made = {
        "good": dict(answers=COLOURS, vectors=vectors),
        "missing": dict(answers=COLOURS[1:], vectors=vectors[1:]),
        "rows": dict(answers=COLOURS, vectors=vectors[1:]),
        "inf": dict(answers=COLOURS, vectors=spoiled),
        "large": dict(answers=COLOURS, vectors=vectors * 1e300), "keys": dict(a=vectors, b=vectors),
        "none": dict(answers=[], vectors=np.zeros((0, 3))),
        "flat": dict(answers=COLOURS, vectors=vectors[0]),
        "width 0": dict(answers=COLOURS, vectors=vectors[:, :0]),
        "width 1": dict(answers=COLOURS, vectors=vectors[:, :1]),
        "constant": dict(answers=COLOURS, vectors=np.zeros((12, 20))),
        "complex": dict(answers=COLOURS, vectors=vectors * 1j),
        "bytes": dict(answers=np.array(COLOURS, dtype="S"), vectors=vectors),
        "objects": dict(answers=np.array(COLOURS, dtype=object), vectors=vectors),
        "numbers": dict(answers=np.arange(12), vectors=vectors),
        "twice": dict(answers=COLOURS + COLOURS[:1], vectors=rng.normal(size=(13, 20))),
        "half": dict(answers=COLOURS, vectors=vectors.astype(np.float16)),
        "whole": dict(answers=COLOURS, vectors=(vectors * 100).astype(np.int8)),
        "wide": dict(answers=COLOURS, vectors=rng.normal(size=(12, 200_000))),
        "packed zeros": dict(answers=COLOURS, vectors=np.zeros((12, 20_000_000), np.uint8)),
    }
    files = {}
    for name, arrays in made.items():
        files[name] = folder / "files" / f"{name}.npz"
        np.savez_compressed(files[name], **arrays)
    np.save(folder / "files" / "plain.npy", vectors)
    files["plain array"] = folder / "files" / "plain.npy"
    return files


def teacher_cases(vectors, files):
    """Each as --teacher, and runs that cannot teach."""
    places = {**vectors, **{name: files[name] for name in (
        "empty", "random", "fifo", "/dev/zero", "folder", "dangling", "sparse", "strange name")}}
    for name, path in places.items():
        yield Case(f"teacher {name}", "train.py", [
            "--phase=distill", "--distill_steps=2", f"--teacher={path}", "--out={folder}/run"])
    for name in ("run", "half", "read", "nowhere", "foreign", "a\nb", "fifo", "text.txt"):
        for kind in ("answers", "align"):
            yield Case(f"teacher ckpt:{name!r} {kind}", "train.py", [
                "--phase=distill", "--distill_steps=2", f"--distill={kind}",
                f"--teacher=ckpt:{{folder}}/{name}", "--out={folder}/run"])


# -- runs that are there already -------------------------------------------------------------------
def run_cases(rng, number):
    """Combinations of what to do, with which flags, on runs that have come so far."""
    doing = [["--resume"], ["--phase=pretrain"], ["--phase=distill"], ["--phase=speak"], [],
             ["--resume", "--phase=pretrain"], ["--resume", "--phase=distill"],
             ["--resume", "--phase=speak"], ["--resume", "--phase=all"]]
    with_flags = [
        [], ["--qa="], ["--qa={folder}/files/one pair"], ["--qa={folder}/files/good"],
        ["--data={folder}/files/good text"], ["--data={folder}/files/other text"], ["--data=facts"],
        ["--teacher=self"], ["--teacher={folder}/files/good.npz"], ["--teacher=ckpt:{folder}/run"],
        ["--recipe=paper"], ["--recipe=v2"], ["--recipe=collapse"], ["--preset=laptop"],
        ["--preset=gpu"], ["--n_embd=64"], ["--n_head=1"], ["--answer_size=4"],
        ["--answer_size=24"],
        ["--memory=tokens"], ["--n_slots=2"], ["--dec_layer=2"], ["--seed=7"], ["--top_k=1"],
        ["--pretrain_steps=9"], ["--distill_steps=99"], ["--speak_steps=1"], ["--rounds=2"],
        ["--tokenizer=gpt2"], ["--vocab_size=500"], ["--loss=mse"], ["--target=span"],
        ["--distill=align"], ["--qa_batch_size=1"], ["--batch_size=1"], ["--accum=8"],
        ["--eval_every=1"], ["--device=cuda"], ["--device=mps"], ["--dtype=bf16"],
        ["--mask_ratio=0.01"], ["--mask_ratio=0.9"], ["--question_drop=0.99"], ["--echo=0"],
        ["--echo=0.999"], ["--max_span=10000"], ["--clip=1e-9"], ["--distill_lr=1000"],
        ["--pretrain_lr=1000", "--clip=1e9"], ["--speak_lr=1000", "--clip=1e9"],
        ["--noise=1000000"],
        ["--ema_half_life=inf"], ["--ema_half_life=1e-300"], ["--sigreg=1000000"],
        ["--warmup=0.999"]]
    for _ in range(number):
        name = rng.choice(("run", "run", "half", "read"))
        words = [*rng.choice(doing), *rng.choice(with_flags)]
        if rng.random() < 0.3:
            words += rng.choice(with_flags)
        if not any(word.startswith(("--resume", "--phase=distill", "--phase=speak"))
                   for word in words):
            words = ["{base}", *words]
        # a step or two is enough to see that a command is accepted
        if not any("_steps" in word for word in words) and "--resume" not in words:
            words = [*words, *as_argv(SHORT)]
        yield Case(f"{name} {' '.join(words)}", "train.py", [*words, f"--out={{folder}}/{name}"])


# -- sample.py and report.py -----------------------------------------------------------------------
def sample_cases():
    """Questions, gaps and flags of every kind."""
    asked = ["", " ", "?", "What is the colour of the moss?", "x" * 100_000, "a b " * 1000, "\0",
             "\udcff", "\x1b[2J", "é\u0301", "👩‍👩‍👧", "a\nb", "[", "]", "[]", "[ ]", "a [b", "[a]",
             "[a] [b]", "a [b] c", "[[a]] b", "The moss is [green].", "The [" + "w " * 200 + "] x",
             "The \u202e[x] is", "-", "--x", "-1", "=", "nan"]
    for text in asked:
        yield Case(f"prompt {text[:20]!r}", "sample.py", ["--out={folder}/run", f"--prompt={text}"])
        yield Case(f"inspect {text[:20]!r}", "sample.py",
        ["--out={folder}/run", f"--inspect={text}"])
        yield Case(f"word {text[:20]!r}", "sample.py", ["--out={folder}/run", text])
    values = dict(temperature=("nan", "-1", "inf", "1e-320", "1e300", "1e9", "1e-3"),
                  top_k=("-1", "0", "999999", str(2 ** 62), "1.5"),
                  top_p=("0", "1", "1e-320", "1.1", "nan"),
                  seed=("-1", str(2 ** 62), str(2 ** 63), "x"),
                  n=("0", "-1", str(2 ** 62), "9" * 30),
                  device=("cuda", "mps", "tpu", "", "CPU"), always_answer=("x", "yes", ""),
                  out=("", "nowhere", "/dev/zero", "{folder}/fifo", "{folder}/half",
                  "{folder}/read",
                       "{folder}/text.txt", "a\nb", "\udcff", "{folder}/loop", "x" * 5000, "a\0b"))
    for name, several in values.items():
        for value in several:
            yield Case(f"sample {name}={value[:20]!r}", "sample.py", [
                "--out={folder}/run", "--prompt=What is the colour of the moss?", "--always_answer",
                f"--{name}={value}"])
    for name in ("good", "random", "utf16", "control", "surrogate", "/dev/null", "long words"):
        yield Case(f"conversation {name}", "sample.py", ["--out={folder}/run"],
                   stdin=f"{{folder}}/files/{name}" if name[0] != "/" else name)
    yield Case("both", "sample.py", ["--out={folder}/run", "--prompt=a", "--inspect=b"])
    yield Case("twice", "sample.py", ["--out={folder}/run", "a", "b"])


def write_logs(folder):
    """Folders with a metrics.csv of every kind: their names."""
    good = (folder / "run" / "metrics.csv").read_text()
    header, *rows = good.splitlines()
    cells = rows[1].split(",")
    contents = {
        "empty": "", "header": header + "\n", "no end": good[:-3],
        "word": good.replace("0.", "x.", 1),
        "short": header + "\npretrain,1\n",
        "phase": header + "\nsing" + "," * header.count(",") + "\n",
        "nan": "\n".join([header, ",".join(cells[:2] + ["nan"] * (len(cells) - 2))]) + "\n",
        "inf": "\n".join([header, ",".join(cells[:2] + ["inf"] * (len(cells) - 2))]) + "\n",
        "large": "\n".join([header, ",".join(cells[:2] + ["1e308"] * (len(cells) - 2))]) + "\n",
        "negative": "\n".join([header, ",".join(cells[:1] + ["-5"] * (len(cells) - 1))]) + "\n",
        "long step": "\n".join([header, ",".join([cells[0], "9" * 5000, *cells[2:]])]) + "\n",
        "step": "\n".join([header, ",".join([cells[0], "9" * 400, *cells[2:]])]) + "\n",
        "columns": "phase,step\npretrain,1\n", "twice": good + header + "\n",
        "quotes": header + '\n"a\n',
        "control": header + "\n\x1b[2J" + "," * header.count(",") + "\n", "html": "<html>\n" * 9,
        "health": good.replace("collapsed", "\x1b[31m").replace("healthy", "\x1b[31m"),
        "field": header + "\n" + "a" * 200_000 + "\n"}
    names = []
    for name, content in contents.items():
        (folder / f"log {name}").mkdir()
        (folder / f"log {name}" / "metrics.csv").write_text(content)
        names.append(f"log {name}")
    (folder / "log bytes").mkdir()
    (folder / "log bytes" / "metrics.csv").write_bytes(b"\xff\0" * 99)
    (folder / "log fifo").mkdir()
    os.mkfifo(folder / "log fifo" / "metrics.csv")
    (folder / "log zero").mkdir()
    os.symlink("/dev/zero", folder / "log zero" / "metrics.csv")
    return names + ["log bytes", "log fifo", "log zero"]


def report_cases(logs):
    """Logs, pictures and flags of every kind."""
    picture = "--out={folder}/picture.png"
    for name in [*logs, "run", "half", "nowhere", "text.txt", "fifo", "loop", "a\nb", "\udcff",
    "a\0b"]:
        yield Case(f"report {name!r}", "report.py", [f"{{folder}}/{name}", picture])
    for value in ("", "x", "x.PNG", ".png", "/dev/full/x.png", "/proc/x.png", "{folder}/x\ny.svg",
                  "{folder}/text.txt/x.png", "a" * 300 + ".png", "{folder}/run.png/", "a\0.png",
                  "{folder}/fifo/x.pdf", "{folder}/\udcff.png", "{folder}/loop/x.png"):
        yield Case(f"report out={value[:20]!r}", "report.py", ["{folder}/run", f"--out={value}"])
    for names in (("run", "half"), ("run", "text", "taught"), ("run", "log nan"),
                  ("run", "nowhere"), ("run", "foreign"), ("run", "work/../run"),
                  ("run", "half") * 6, ("run", "log fifo"), ("half", "log large"),
                  ("read", "taught", "log negative")):
        runs = [f"{{folder}}/{name}" for name in names]
        yield Case(f"report {names}", "report.py", [*runs, picture])
        yield Case(f"report {names} --follow", "report.py", [*runs, picture, "--follow"],
                   ctrl_c=1.5)
    for words in ([], [picture], ["--x"], ["--follow=1"], [""], ["--folow"], ["{folder}/run"] * 9):
        yield Case(f"report {words}", "report.py", [*words, picture] if words[:1] else words)


def interrupt_cases(rng, number):
    """Ctrl-C at random moments: in a run, while a corpus is read, in a conversation."""
    long = [*as_argv(FLAGS | dict(pretrain_steps=10 ** 6, eval_every=50)), "--phase=pretrain"]
    for _ in range(number):
        name, words = rng.choice((
            ("training", [*long, "--data={folder}/text.txt"]),
            ("evaluating", [*long, "--data={folder}/text.txt", "--eval_every=1"]),
            ("reading", [*long, "--data={folder}/files/large", "--vocab_size=8000"]),
            ("preparing", [*long, f"--vocab_size={rng.randrange(300, 3000)}"])))
        yield Case(f"ctrl-c {name}", "train.py", [*words, "--out={folder}/new"],
                   ctrl_c=rng.uniform(0, 2))


# -- own text, added facts, vectors ----------------------------------------------------------------
def own_text_cases(files):
    """Each file as a text without questions, which goes through phases 1 and 3."""
    base = ["{base}", "--qa=", *as_argv(SHORT), "--out={folder}/new"]
    for name, path in files.items():
        yield Case(f"text {name}", "train.py", [*base, f"--data={path}"])
    for words in (["--memory=tokens"], ["--teacher={folder}/files/good.npz"], ["--answer_size=4"],
                  ["--distill=align"], ["--echo=0"], ["--echo=0.999"], ["--qa_batch_size=1"],
                  ["--mask_ratio=0.01"], ["--mask_ratio=0.9"], ["--max_span=1"], ["--mlm=0"],
                  ["--block_size=4"], ["--accum=8"], ["--masks=3"], ["--speak_steps=0"],
                  ["--phase=distill"], ["--phase=teach"], ["--phase=speak"],
                  ["--qa_val={folder}/qa.tsv"], ["--preset=minute", *as_argv(SHORT)]):
        yield Case(f"text {' '.join(words)}", "train.py",
                   [*base, "--data={folder}/text.txt", *words])
    for words in (["--phase=speak"], ["--phase=speak", "--qa={folder}/qa.tsv"], ["--phase=distill"],
                  ["--phase=distill", "--qa={folder}/qa.tsv"], ["--resume"],
                  ["--resume", "--speak_steps=3", "--data={folder}/files/good text"],
                  ["--phase=speak", "--data={folder}/files/other text"]):
        yield Case(f"on text {' '.join(words)}", "train.py",
                   [*words[:1], *as_argv(SHORT)[1:], *words[1:], "--out={folder}/text"])


def gap_cases():
    """--fill and --go_on on a run that says gaps, and on others."""
    fillings = ["", " ", "[...]", "a [...]", "[...] a", "a [...] b [...] c", "a [..] b",
                "a [\u2026] b", "[...", "...]", "[[...]]", "The moss is [...].",
                "w " * 500 + "[...]", "[...]" + " w" * 500, "x" * 200_000 + " [...]",
                "[...]" * 1000, "a\nb [...]\nc",
                "\x1b[2J [...] \u202e", "\udcff [...]", "春天 [...] 大海", "e\u0301 [...] ",
                "--x [...]", "[...]\u2028"]
    begins = ["", " ", "\n", "The", "The moss is", "w " * 500, "x" * 200_000, "[...]", "\x1b[2J",
              "\udcff", "春天", "\u202e", "-", "--out"]
    for name, texts in (("fill", fillings), ("go_on", begins)):
        for text in texts:
            yield Case(f"{name} {text[:20]!r}", "sample.py",
                       ["--out={folder}/text", f"--{name}={text}"])
    for run in ("run", "half", "read", "taught", "foreign", "nowhere"):
        for word in ("--fill=The [...] is.", "--go_on=The moss"):
            yield Case(f"{word} on {run}", "sample.py", [f"--out={{folder}}/{run}", word])
    fill, go_on = "--fill=The moss is [...] again.", "--go_on=The moss is"
    for words in ([fill, "--temperature=1"], [fill, "--temperature=1", f"--n={2 ** 62}"],
                  [fill, "--temperature=1", "--n=1000"], [fill, "--temperature=1e9", "--top_k=1"],
                  [fill, "--top_p=1e-300", "--temperature=1"], [fill, "--n=0"], [fill, go_on],
                  [go_on, "--length=0"], [go_on, f"--length={2 ** 62}"], [go_on, "--length=1e3"],
                  [go_on, "--length=300"], [go_on, "--length=1"], [go_on, "--temperature=1e9"],
                  [go_on, "--embed={folder}/text.txt"], [fill, "--list"], [fill, "a question"],
                  ["a question"], ["--inspect=The [moss] is"], ["--inspect=moss"], ["--list"]):
        yield Case(f"gaps {words}", "sample.py", ["--out={folder}/text", *words])
    for name in ("good", "control", "random", "long words"):
        yield Case(f"gaps, conversation {name}", "sample.py", ["--out={folder}/text"],
                   stdin=f"{{folder}}/files/{name}")


def teach_cases(files):
    """Facts that are added to runs of every kind, from files of every kind."""
    teach = ["--phase=teach", "--teach_steps=2"]
    for name in ("empty", "random", "utf16", "fifo", "folder", "missing", "/dev/zero", "one",
                 "good", "other answers", "two answers", "twice", "long question",
                 "long answer", "control", "rtl", "csv", "huge field", "many pairs", "checkpoint",
                 "header only", "new"):
        yield Case(f"teach {name}", "train.py",
                   [*teach, f"--qa={files[name]}", "--out={folder}/run"])
    new = "--qa={folder}/files/new"
    for run in ("half", "read", "text", "taught", "foreign", "nowhere"):
        yield Case(f"teach on {run}", "train.py", [*teach, new, f"--out={{folder}}/{run}"])
    for words in ([], ["--qa="], ["--qa"], [new, "--data={folder}/files/other text"],
                  [new, "--qa_val={folder}/files/reworded"], [new, "--teach_lr=1000", "--clip=1e9"],
                  [new, "--teacher={folder}/files/good.npz"], [new, "--distill=align"],
                  [new, "--memory=tokens"], [new, "--n_embd=64"], [new, "--seed=3"],
                  [new, "--resume"], [new, "--teach_steps=0"], [new, "--qa_batch_size=1"],
                  [new, "--echo=0"], [new, "--answer_size=4"], [new, "--added={folder}/qa.tsv"],
                  [new, "--init_from={folder}/half"], [new, "--accum=8"], [new, "--recipe=v2"]):
        yield Case(f"teach {words}", "train.py", [*teach, *words, "--out={folder}/run"])
    for words in (["--resume"], ["--resume", "--phase=teach"], ["--resume", "--teach_steps=3"],
                  ["--resume", "--phase=teach", "--qa={folder}/files/one pair"],
                  ["--resume", "--added={folder}/files/one pair"],
                  ["--resume", "--added={folder}/files/new"], ["--resume", "--seed=9"],
                  ["--phase=speak", "--speak_steps=2"], ["--phase=distill", "--distill_steps=2"],
                  ["--phase=distill", "--added={folder}/qa.tsv"], ["--resume", "--speak_steps=3"]):
        yield Case(f"on taught {words}", "train.py", [*words, "--out={folder}/taught"])
    for words in (["--list"], ["a question", "--always_answer"], ["--list=maybe"], ["--list", "x"]):
        yield Case(f"taught {words}", "sample.py", ["--out={folder}/taught", *words])
    for run in ("run", "half", "read", "nowhere"):
        yield Case(f"list {run}", "sample.py", [f"--out={{folder}}/{run}", "--list"])
    for name in ("reworded", "reworded wrongly", "good", "one pair", "empty", "fifo", "random"):
        yield Case(f"qa_val {name}", "train.py", [
            "--phase=distill", "--distill_steps=2", f"--qa_val={files[name]}",
            "--out={folder}/run"])


def init_cases():
    """Phase 1 that goes on from runs of every kind, in a new folder or in one that is there."""
    for place in ("run", "half", "read", "text", "taught", "foreign", "nowhere", "fifo", "text.txt",
                  "loop", "", "a\nb", "\udcff"):
        yield Case(f"init_from {place!r}", "train.py", [
            *as_argv(SHORT), f"--init_from={{folder}}/{place}", "--out={folder}/new"])
    begin = [*as_argv(SHORT), "--init_from={folder}/run"]
    for words in (["--out={folder}/run"], ["--out={folder}/work/../run"], ["--out={folder}/half"],
                  ["--out={folder}/foreign"], ["--resume", "--out={folder}/half"],
                  ["--phase=distill", "--out={folder}/half"], ["--n_embd=64"], ["--dec_layer=2"],
                  ["--data={folder}/files/other text"], ["--data=facts", "--qa="], ["--qa="],
                  ["--phase=pretrain"], ["--seed=5"], ["--recipe=v2"], ["--memory=tokens"],
                  ["--tokenizer=gpt2"], ["--vocab_size=500"], ["--pretrain_steps=0"],
                  ["--preset=minute"], ["--teacher={folder}/files/good.npz"],
                  ["{base}", *as_argv(SHORT), "--init_from="], ["--init_from"],
                  ["--block_size=16"]):
        yield Case(f"init_from {words}", "train.py", [*begin, "--out={folder}/new", *words])


def vector_cases(files):
    """--embed and --save."""
    save = "--save={folder}/new.npy"
    for name in ("empty", "blank", "zero", "utf16", "surrogate", "bom", "cut", "random", "gzip",
                 "long line", "long words", "newlines", "blanks", "combining", "no blanks",
                 "control", "emoji", "rtl", "cr", "separators", "long question", "strange name",
                 "sparse", "fifo", "dangling", "loop", "folder", "missing", "/dev/zero",
                 "/dev/null", "checkpoint", "good", "many pairs"):
        yield Case(f"embed {name}", "sample.py",
                   ["--out={folder}/run", f"--embed={files[name]}", save])
    for run in ("half", "read", "text", "taught", "nowhere"):
        yield Case(f"embed on {run}", "sample.py",
                   [f"--out={{folder}}/{run}", "--embed={folder}/qa.tsv", save])
    embed = "--embed={folder}/qa.tsv"
    for words in ([save], [embed, "--save="], [embed, "--save=x"], [embed, "--save=/dev/full"],
                  [embed, "--save={folder}/nowhere/x.npy"], [embed, "--save={folder}/run"],
                  [embed, "--save={folder}/folder.npy"], ["--embed={folder}/keep.npy"],
                  ["--embed={folder}/keep.npy", "--save={folder}/keep.npy"],
                  ["--embed={folder}/keep.part", "--save={folder}/keep.npy"],
                  [embed, "--save={folder}/run/ckpt.pt"], [embed, "--save=/proc/x.npy"],
                  [embed, save, "--list"], [embed, save, "a question"], ["--embed="], ["--embed"]):
        yield Case(f"embed {words}", "sample.py", ["--out={folder}/run", *words])


# -- judging ---------------------------------------------------------------------------------------
RUNS = ("run", "half", "read", "text", "taught", "foreign")
KEPT = ("keep.npy", "keep.part")       # texts that a command must not replace


def contents(folder):
    """Path -> bytes of all files of the runs, and of those that are to be kept."""
    files = [path for name in RUNS for path in (folder / name).rglob("*") if path.is_file()]
    files += [folder / name for name in KEPT if (folder / name).exists()]
    return {str(path): path.read_bytes() for path in files}


def filled(word, folder):
    """A word of a command line with its {folder}."""
    return word.replace("{folder}", str(folder))


def clean_line(text, program):
    """What is wrong with what a refused command wrote on stderr; "" if nothing."""
    if "Traceback" in text:
        return f"traceback: {text.strip().splitlines()[-1][:200]}"
    lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    lines = [line for line in lines if "%|" not in line and "it/s" not in line]
    if len(lines) != 1 or not lines[0].startswith(f"{program}: error: "):
        return f"not one line: {lines}"[:400]
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp", "Cf") for letter in lines[0]
           if letter not in "\u200c\u200d"):
        return f"control characters: {lines[0]!r}"[:400]
    if len(lines[0]) > 6000:
        return "a very long line"
    return ""


def judge(case, folder, base, originals, before):
    """("accepted", "refused" or "stopped"; what is wrong, "" if nothing)."""
    words = [part for word in case.words for part in (base if word == "{base}" else [word])]
    words = [filled(word, folder) for word in words]

    def in_process():
        prepare.HERE = folder / "facts"
        report.draw_curves = lambda *args, **kwargs: None
    process = Process(PROGRAMS[case.program], words, folder, in_process, cwd=folder / "work",
                      stdin=filled(case.stdin, folder))
    pressed = None
    if case.ctrl_c is not None:
        time.sleep(case.ctrl_c + 0.05)          # the handler is set in the first milliseconds
        if process.running():
            pressed = process.spent()
            os.kill(process.pid, signal.SIGINT)
    ended = process.wait(LIMIT)
    wrong = ""
    kind = {0: "accepted", 2: "refused", 130: "stopped"}.get(ended.code, "failed")
    after = contents(folder)
    if ended.code is None:
        wrong = "hang"
    elif kind == "failed":
        wrong = f"exit code {ended.code}: {ended.err[-300:]}"
    elif kind == "refused":
        wrong = clean_line(ended.err, case.program)
        if not wrong and "no longer a number" in ended.err:
            old = [before[f"{folder}/{name}/ckpt.pt"] for name in RUNS[:-1]]
            if any(content not in after.values() for content in old):
                wrong = "the old checkpoint is lost"
        elif not wrong and after != before:
            changed = [path for path in before | after if before.get(path) != after.get(path)]
            wrong = f"changed: {changed}"
        elif not wrong and ((folder / "new").exists() or any(folder.glob("new.*"))):
            wrong = "a folder or a file was created"
    elif "Traceback" in ended.err:
        wrong = f"traceback: {ended.err[-300:]}"
    elif kind == "stopped":
        late = ended.spent - pressed
        if late > 2:
            wrong = f"{late:.1f} s after Ctrl-C"
    if after != before:
        for name in RUNS:
            shutil.rmtree(folder / name)
            shutil.copytree(originals / name, folder / name)
        for name in KEPT:
            shutil.copy(originals / name, folder)
    shutil.rmtree(folder / "new", ignore_errors=True)
    (folder / "new.npy").unlink(missing_ok=True)
    return kind, wrong


# -- streams: these need processes of their own ----------------------------------------------------
SHELL = {       # what a shell may do with streams: command -> exit codes that are right
    "{train} | head -1": (0,), "{train} >&-": (0,), "{train} 2>&-": (0,), "{train} <&-": (0,),
    "{train} >&- 2>&- <&-": (0,), "{train} >/dev/full": (0,), "{train} 2>/dev/full": (0,),
    "{train} >/dev/full 2>/dev/full": (0,), "PYTHONIOENCODING=ascii {train}": (0,),
    "PYTHONIOENCODING=cp1252 {train}": (0,), "LC_ALL=C PYTHONUTF8=0 {train}": (0,),
    "{train} --seed=x 2>&-": (2,), "{train} --seed=x 2>/dev/full": (2,),
    "PYTHONIOENCODING=ascii {train} --data=ÿ🦊": (2,), "{train} --data=$'\\xff'": (2,),
    "{train} --help | head -1": (0,), "{train} --help >/dev/full": (0, 1, 120),
    "{ask} moss | head -1": (0,), "{ask} moss >&-": (0,), "{ask} moss >/dev/full": (0,),
    "{ask} <&-": (0, 2), "echo moss | {ask}": (0,), "printf '\\xff\\n' | {ask}": (0,),
    "PYTHONIOENCODING=ascii {ask} --inspect='é [ü] ß'": (0,), "{report} | head -1": (0,),
    "{report} >/dev/full": (0,), "{report} 2>&- >&-": (0,),
    "{train} & sleep 1; kill -INT $!; wait $!": (130,),
    "{train} & sleep .3; kill -INT $!; wait $!": (130,),
    "{ask} & sleep .3; kill -INT $!; wait $!": (130,),
    "{ask} moss & sleep 1; kill -INT $!; wait $!": (130,),
    "{report} & sleep .3; kill -INT $!; wait $!": (130,),
    "{train} --pretrain_steps=1000000 & sleep 8; kill -INT $!; sleep .2; kill -INT $!; wait $!":
        (130,),
}


def judge_shell(line, folder, base):
    """What is wrong with a command in a shell; "" if nothing."""
    quoted = " ".join(f"'{word}'" for word in base)
    new = folder / "shell"
    shutil.rmtree(new, ignore_errors=True)
    python = sys.executable
    short = f"--phase=pretrain --pretrain_steps=2 --out={new}"
    words = {
        "{train}": f"{python} train.py {quoted} {short}",
        "{ask}": f"{python} sample.py --out={folder}/run --always_answer",
        "{report}": f"{python} report.py {folder}/run --out={folder}/picture.png"}
    command = line
    for name, text in words.items():
        command = command.replace(name, text)
    # job control is on, or a shell would let its background processes ignore Ctrl-C
    ended = subprocess.run(["bash", "-m", "-o", "pipefail", "-c", command], capture_output=True,
                           timeout=60, check=False, stdin=subprocess.DEVNULL)
    error = ended.stderr.decode(errors="replace")
    if "Traceback" in error or "Exception ignored" in error:
        return f"traceback: {error[-300:]}"
    if ended.returncode not in SHELL[line]:
        return f"exit code {ended.returncode}: {error[-300:]}"
    if "{train}" in line and SHELL[line] == (0,) and "help" not in line:
        if not (new / "ckpt.pt").exists():
            return "nothing was saved"
    return ""


def make_runs(folder):
    """The runs of RUNS but the foreign one; base flags."""
    for name in KEPT:
        (folder / name).write_text("A line that is to be kept.\n")
    (folder / "folder.npy").mkdir()
    (folder / "work").mkdir()
    Process(lambda argv: fresh_facts(folder / "facts"), [], folder).wait()
    flags_of_all = FLAGS | dict(data=folder / "text.txt", qa=folder / "qa.tsv")
    base = as_argv(flags_of_all)
    commands = (
        [*base, *as_argv(SHORT), "--speak_steps=100", f"--out={folder / 'run'}"],
        [*base, "--pretrain_steps=2", "--phase=pretrain", f"--out={folder / 'half'}"],
        ["--phase=distill", "--distill_steps=2", f"--out={folder / 'half'}"],
        [*base, "--pretrain_steps=2", "--phase=pretrain", f"--out={folder / 'read'}"],
        [*base, *as_argv(SHORT), "--qa=", "--speak_steps=30", f"--out={folder / 'text'}"],
        [*base, *as_argv(SHORT), f"--out={folder / 'taught'}"],
        ["--phase=teach", "--teach_steps=2", f"--qa={folder / 'files' / 'new'}",
         f"--out={folder / 'taught'}"])
    def without_curves():
        report.draw_curves = lambda *args, **kwargs: None
    for argv in commands:
        ended = Process(train.main, argv, folder, without_curves).wait()
        assert ended.code == 0, ended.err
    return base


def all_cases(folder, rng, files):
    """The cases, without those in a shell."""
    (folder / "files" / "large").write_text(" ".join(
        "".join(rng.choices("abcdefghijklmnop", k=rng.randrange(3, 12))) for _ in range(400_000)))
    vectors = write_vectors(folder)
    cases = [*flag_cases(rng, 110), *odd_cases(), *file_cases(files),
             *teacher_cases(vectors, files), *run_cases(rng, 90), *sample_cases(),
             *report_cases(write_logs(folder)), *interrupt_cases(rng, 30),
             *own_text_cases(files), *gap_cases(), *teach_cases(files), *init_cases(),
             *vector_cases(files)]
    # a null byte in a word cannot reach a program
    return [case for case in cases if not any("\0" in word for word in case.words)]


def main():
    """Run the cases; print those that are wrong, and how many ended how."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("--only", default="")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    rng = random.Random(given.seed)
    count = dict(accepted=0, refused=0, stopped=0, failed=0, shell=0)
    wrongs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        files = write_files(folder)
        base = make_runs(folder)
        cases = all_cases(folder, rng, files)
        originals = folder / "originals"
        for run in RUNS:
            shutil.copytree(folder / run, originals / run)
        for file in KEPT:
            shutil.copy(folder / file, originals)
        before = contents(folder)
        for case in cases[part::parts]:
            if not re.search(given.only, case.name):
                continue
            kind, wrong = judge(case, folder, base, originals, before)
            count[kind] += 1
            wrongs += bool(wrong)
            if sum(count.values()) % 50 == 0:
                print(f"{count}, wrong: {wrongs}, last: {case.name[:60]!r}", flush=True)
            if wrong or given.verbose:
                print(f"{case.program} {case.name[:150]!r}: {kind} {wrong}", flush=True)
                if given.verbose:
                    print("    ", (folder / "stderr.txt").read_text(errors="replace")[-200:])
        for line in list(SHELL)[part::parts]:
            if not re.search(given.only, f"shell {line}"):
                continue
            wrong = judge_shell(line, folder, base)
            count["shell"] += 1
            wrongs += bool(wrong)
            if wrong or given.verbose:
                print(f"shell {line!r}: {wrong}", flush=True)
    print(f"{sum(count.values())} cases (seed {given.seed}): {count}; wrong: {wrongs}")
    sys.exit(bool(wrongs))


if __name__ == "__main__":
    main()
