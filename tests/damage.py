"""
Open 1,000 damaged or hostile checkpoints, and see that none is accepted with another output.

    python -m tests.damage              1,000 files, about 8 minutes; seed 0
    python -m tests.damage --files=100  a quick look

Each file takes the place of ckpt.pt in the folder of a toy run that was stopped in phase 2 or has
ended. sample.py is asked a question, for the concepts near a question and in a gap, and train.py
resumes the run. Each of them must refuse the file with exit code 2 and one line, or end as with
the original file: same text, same weights. Counted as faults:

    another output, a traceback, code that was run, more than 1 GB of memory, or more than 10
    seconds of a processor for each of the four

Damaged files are bytes that changed by accident. Hostile files were written by somebody who knows
the format: their SHA-256 at the end is right. Weights that are finite and have the right sizes are
not among them: they are another run, which nobody can tell from a good one.
"""
import argparse
import collections
import io
import os
import pickle
import random
import shutil
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

import sample
import train
from tests.forked import Process, call
from tests.toy import FLAGS, as_argv, write_corpus

LIMIT = 10              # seconds
MEMORY = 10 ** 9        # bytes more than the original needs
QUESTION = "What is the colour of the moss?"
# of each thousand files
SHARES = dict(damaged=340, resealed=120, entries=140, config=120, weights=80, tokenizer=60,
              optimizer=40, log=30, code=30, bombs=40)


# -- damage: bytes that changed by accident --------------------------------------------------------
def damaged(rng, base):
    """(what was done, bytes): a file that was damaged after it was written."""
    content = bytearray(base.sealed)
    size = len(content)
    at = rng.randrange(size)
    length = rng.choice((1, 16, 512, 4096, 65536))
    kind = rng.choice(("bit", "bit", "bit", "cut", "zeros", "noise", "appended", "moved",
                       "foreign"))
    if kind == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "zeros":
        content[at:at + length] = bytes(min(length, size - at))
        content[at] ^= not any(base.sealed[at:at + length])     # where zeros were, nothing changed
    elif kind == "noise":
        content[at:at + length] = rng.randbytes(min(length, size - at))
    elif kind == "appended":
        content += rng.choice((bytes(length), rng.randbytes(length), base.sealed))
    elif kind == "moved":
        content = content[at:] + content[:at]
    else:
        content = rng.choice((b"", b"\n", b"PK\x03\x04", b"\x80\x02.", b"<html>", bytes(size),
                              base.sealed[:-32], rng.randbytes(100), b"\x93NUMPY" + bytes(99)))
    return f"{kind} at {at} of {size}", bytes(content)


def resealed(rng, base):
    """The same, but the checksum was made after the damage."""
    while True:
        what, content = damaged(rng, base)
        if what.split()[0] != "appended":
            return what, train.seal(content[:-32])


# -- hostile: written on purpose, with a right checksum --------------------------------------------
def sealed(checkpoint):
    """The bytes of a checkpoint, whatever it is."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return train.seal(buffer.getbuffer())


NONSENSE = [None, True, 0, -1, 10 ** 400, 1.5, float("nan"), float("inf"), "", "x", "x" * 10 ** 6,
            b"x", [], [[]], {}, {"a": 1}, (), {1, 2}, 1j, torch.zeros(()), torch.zeros(3),
            torch.zeros(0), torch.tensor(float("nan")), torch.zeros(3, dtype=torch.int64),
            ["x"] * 100, [{}], {"x": torch.zeros(3)}, "\x1b[2J\n\u2028", "\ud800", "a\0b"]


def entries(rng, base):
    """A part of the checkpoint is missing, surplus, of a wrong type or does not fit the others."""
    changed = dict(base.checkpoint)
    name = rng.choice(list(changed))
    answers = changed["answers"]
    kind = rng.choice(("missing", "surplus", "nonsense", "nonsense", "nonsense", "format",
                       "answers", "concepts", "whole"))
    if kind == "missing":
        del changed[name]
    elif kind == "surplus":
        changed[rng.choice(("extra", 0, None, "Model", ""))] = rng.choice(NONSENSE)
    elif kind == "nonsense":
        changed[name] = rng.choice(NONSENSE)
        if name == "threshold" and isinstance(changed[name], float):
            changed[name] = torch.nan       # another number is another run
    elif kind == "format":
        changed["format"] = rng.choice(("x", "3", 3.0, 1, 2, 4, -3, None, [3], torch.tensor(3)))
    elif kind == "answers":
        changed["answers"] = rng.choice((
            answers + ["pink"], answers[:-1], [], [3] * len(answers), [None] * len(answers),
            tuple(answers), answers * 1000, dict.fromkeys(answers)))
    elif kind == "concepts":
        concepts = changed["concepts"]
        changed["concepts"] = rng.choice((
            concepts[:-1], concepts[:, :-1], concepts.T, concepts * float("nan"), concepts[0],
            concepts.long(), concepts.bool(), concepts.to_sparse(), concepts.to("meta"),
            torch.zeros(1).expand(10 ** 6, 32), concepts.tolist(), concepts[:, :0], concepts[None]))
    else:
        changed = rng.choice((None, [], [changed], "x", 3, torch.zeros(3), list(changed.items()),
                              changed["model"], {}, {"model": changed["model"]}))
    return f"{kind} {name}", sealed(changed)


def config(rng, base):
    """A field of the configuration is another one. What may be resumed with other flags is left."""
    fields = dict(base.checkpoint["config"])
    shape = dict(
        n_head=(1, 4, 8), n_embd=(16, 64, 100_000), n_layer=(1, 3, 1000, 10 ** 8), top_k=(1,),
        vocab_size=(260, 300, 1_000_000), block_size=(16, 64, 1_000_000), target_norm=(False,),
        pred_layer=(2, 1000), pred_embd=(32, 100_000), dec_layer=(2, 1000), answer_size=(4, 24),
        memory=("tokens",), n_slots=(1, 8, 1000), teacher_width=(32, 20, 1_000_000), mlm=(0.0,))
    kind = rng.choice(("shape", "shape", "nonsense", "missing", "surplus", "sizes"))
    name = rng.choice(list(shape) if kind == "shape" else list(fields))
    if kind == "shape":
        fields[name] = rng.choice(shape[name])
        if name == "teacher_width" and fields[name] == 32:
            fields[name] = 33       # 32 is the width of the own latents
    elif kind == "nonsense":
        fields[name] = rng.choice(NONSENSE)
        if isinstance(fields[name], (int, float, str)) and name not in shape:
            fields[name] = [fields[name]]       # most are flags, which a resumed run may change
    elif kind == "missing":
        del fields[name]
    elif kind == "surplus":
        fields["n_heads"] = 4
    else:
        fields |= dict(n_layer=1000, dec_layer=1000, pred_layer=1000, n_embd=96_000,
                       pred_embd=96_000, vocab_size=1_000_000)
        name = "all"
    return f"config {kind} {name}", sealed(base.checkpoint | dict(config=fields))


def weights(rng, base):
    """Weights are missing, surplus, not finite, or of another size or type."""
    changed = dict(base.checkpoint["model"])
    name = rng.choice(list(changed))
    value = changed[name]
    spoiled = value.clone()
    spoiled.view(-1)[rng.randrange(value.numel())] = rng.choice((torch.nan, torch.inf, -torch.inf))
    kinds = dict(
        missing=None, nan=spoiled, double=value.double(), half=value.half(), whole=value.long(),
        complex=value.to(torch.complex64), sparse=value.to_sparse(), meta=value.to("meta"),
        longer=torch.cat((value, value)), shorter=value[:-1], flat=value.flatten()[None],
        listed=value.tolist(), none=None, huge=torch.zeros(1).expand(10 ** 6, 10 ** 6),
        parameter=torch.nn.Parameter(value[:-1]), surplus=value, renamed=value)
    kind = rng.choice(list(kinds))
    changed[name] = kinds[kind]
    if kind in ("missing", "renamed"):
        del changed[name]
    if kind == "surplus":
        changed["extra.weight"] = value
    if kind == "renamed":
        changed[rng.choice((name.upper(), 3, None, name + ".x"))] = value
    return f"weights {kind} {name}", sealed(base.checkpoint | dict(model=changed))


def tokenizer(rng, base):
    """A tokenizer that cuts texts in another way, or does not work."""
    state = base.checkpoint["tokenizer"]
    ranks = list(state["ranks"])
    i, j = rng.sample(range(len(ranks)), 2)
    swapped = list(ranks)
    swapped[i], swapped[j] = ranks[j], ranks[i]
    shuffled = rng.sample(ranks, len(ranks))
    changed = rng.choice((
        dict(pattern=""), dict(pattern="("), dict(pattern="(a+)+$"), dict(pattern=None),
        dict(pattern="."), dict(pattern=train.data.tokenizer.GPT2_PATTERN),
        dict(ranks=swapped), dict(ranks=shuffled), dict(ranks=ranks[::-1]), dict(ranks=[]),
        dict(ranks=ranks[:256] + ranks[:255:-1]), dict(ranks=ranks + ["cXE="]),
        dict(ranks=ranks[:-1]), dict(ranks=ranks + [ranks[-1]]), dict(ranks=ranks[1:]),
        dict(ranks=ranks[:-1] + [""]), dict(ranks=ranks[:-1] + ["!"]), dict(ranks=None),
        dict(ranks=ranks[:-1] + [3]), dict(ranks=" ".join(ranks)), dict(ranks=dict.fromkeys(ranks)),
        dict(ranks=ranks * 200), dict(ranks=ranks[:-1] + ["QUFB" * 10 ** 6]), dict(extra=1)))
    return f"tokenizer {str(changed)[:40]}", sealed(
        base.checkpoint | dict(tokenizer=state | changed))


def optimizer(rng, base):
    """The state of an optimizer for other weights. It counts only where a run is resumed."""
    state = base.checkpoint["optimizer"]["state"]
    groups = base.checkpoint["optimizer"]["param_groups"]
    number = rng.choice(list(state))
    moment = state[number]
    nested = [0]
    for _ in range(60):         # a tree of 2 ** 60 leaves, in a file of some bytes
        nested = [nested, nested]
    name = rng.choice(list(moment))
    moments = rng.choice((
        moment | {name: torch.zeros(7)}, moment | {name: moment[name] * torch.nan},
        moment | {name: None}, moment | {name: nested}, moment | dict(extra=3), {}, None, nested,
        {key: value for key, value in moment.items() if key != name},
        moment | dict(exp_avg_sq=-1 - moment["exp_avg_sq"]),
        moment | {name: torch.zeros(1).expand(10 ** 6, 10 ** 6)}))
    changed = rng.choice((
        dict(state=state | {number: moments}), dict(state=state | {10 ** 6: moment}),
        dict(state=state | {"0": moment}), dict(state=None), dict(state=nested),
        dict(state=nested, param_groups=nested), dict(param_groups=groups)))
    return "optimizer", sealed(base.checkpoint | dict(optimizer=changed))


def log(rng, base):
    """Rows of the log with nonsense: they are drawn, and written to metrics.csv."""
    rows = [dict(row) for row in base.checkpoint["rows"]]
    row = rng.choice(rows)
    name = rng.choice(list(row) + ["extra", 3])
    row[name] = rng.choice([value for value in NONSENSE if not isinstance(value, float)])
    if isinstance(row[name], int) and name not in ("phase", "health", "extra", 3):
        row[name] = 10 ** 400
    return f"row {name}", sealed(base.checkpoint | dict(rows=rows))


class Evil:
    """Unpickled without care, it runs a command."""

    def __init__(self, function, *arguments):
        self.function = function
        self.arguments = arguments

    def __reduce__(self):
        return self.function, self.arguments


def code(rng, base):
    """Pickled code, that leaves a file named `gotcha` if it runs."""
    # pylint: disable=eval-used, exec-used
    evil = Evil(*rng.choice((
        (os.system, "echo > gotcha"), (exec, "open('gotcha', 'w')"), (open, "gotcha", "w"),
        (eval, "open('gotcha', 'w')"), (os.mkdir, "gotcha"), (print, "gotcha"))))
    part = rng.choice(list(base.checkpoint) + ["whole"])
    changed = evil if part == "whole" else base.checkpoint | {part: evil}
    how = rng.choice(("torch", "legacy", "pickle", "nested"))
    buffer = io.BytesIO()
    if how == "pickle":
        pickle.dump(evil, buffer)
    elif how == "nested":
        torch.save(base.checkpoint | {part: [evil]}, buffer)
    else:
        torch.save(changed, buffer, _use_new_zipfile_serialization=how == "torch")
    return f"code {how} {part}", train.seal(buffer.getbuffer())


def rezip(base, compression=zipfile.ZIP_STORED, **replaced):
    """The checkpoint with other entries in its zip, by the last part of their names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(base.sealed[:-32])) as old:
        with zipfile.ZipFile(buffer, "w", compression) as new:
            for name in old.namelist():
                last = name.rsplit("/", 1)[-1]
                new.writestr(name, replaced.get(last, old.read(name)))
    return train.seal(buffer.getbuffer())


def bombs(rng, base):
    """A small file that unpacks to gigabytes, or claims more numbers than it has."""
    with zipfile.ZipFile(io.BytesIO(base.sealed[:-32])) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))
    # protocol 2 writes a number of 2 bytes as M, one of 4 as J
    at = data.rindex(b"M", 0, data.index(b"cpu") + 200)
    claims = data[:at] + b"J" + struct.pack("<i", 2 ** 28) + data[at + 3:]
    cut = data[:rng.randrange(len(data))]
    noise = bytearray(data)
    for _ in range(20):
        noise[rng.randrange(200)] = rng.randrange(256)
    what, made = rng.choice((
        ("pickle cut", lambda: rezip(base, **{"data.pkl": cut})),
        ("pickle noise", lambda: rezip(base, **{"data.pkl": bytes(noise)})),
        ("compressed", lambda: rezip(base, zipfile.ZIP_DEFLATED)),
        ("2 GB of zeros", lambda: rezip(base, zipfile.ZIP_DEFLATED, **{"0": bytes(2 ** 31)})),
        ("1 GB of pickle", lambda: rezip(base, zipfile.ZIP_DEFLATED, **{
            "data.pkl": b"\x80\x02(" + b"N" * 2 ** 30 + b"l."})),
        ("short storage", lambda: rezip(base, **{"0": b"1234"})),
        ("no storage", lambda: rezip(base, **{"0": b""})),
        ("claims more", lambda: rezip(base, **{"data.pkl": claims})),
        ("deep pickle", lambda: rezip(base, **{"data.pkl": b"\x80\x02" + b"(" * 10 ** 6})),
        ("deep tuples", lambda: rezip(base, **{
            "data.pkl": b"\x80\x02N" + b"\x85" * 10 ** 6 + b"."})),
        ("other end of the bytes", lambda: rezip(base, byteorder=b"big")),
        ("two storages in one", lambda: rezip(base, **{"1": bytes(10)}))))
    return f"bomb: {what}", made()


MAKERS = dict(damaged=damaged, resealed=resealed, entries=entries, config=config, weights=weights,
              tokenizer=tokenizer, optimizer=optimizer, log=log, code=code, bombs=bombs)


# -- opening them ----------------------------------------------------------------------------------
Base = collections.namedtuple("Base", "out checkpoint sealed resume expected memory")


def open_all(argv):
    """In a process: ask the run in a folder, then resume it. Prints the exit code of each."""
    out, *resume = argv
    out = f"--out={out}"
    for main, words in (
            (sample.main, [out, "--always_answer", f"--prompt={QUESTION}"]),
            (sample.main, [out, f"--inspect={QUESTION}"]),
            (sample.main, [out, "--inspect=The moss is [green]."]),
            (train.main, [*resume, "--resume", out])):
        ended = call(main, words)
        print(f"-- exit code {ended}", flush=True)
        print("--", file=sys.stderr, flush=True)


def attempt(base, folder, content):
    """(ending of the process, what each of the four commands did, the weights at the end)."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base.out, out)
    (out / "ckpt.pt").write_bytes(content)
    def prepare():
        train.report.draw_curves = lambda *args, **kwargs: None
    ended = Process(open_all, [str(out), *base.resume], folder, prepare, cwd=folder).wait(4 * LIMIT)
    # the speed is another one each time
    told = [part for part in ended.out.split("-- exit code ")]
    errors = ended.err.split("--\n")[:-1]
    try:
        final = train.load_checkpoint(out)["model"]
    except ValueError:
        final = None
    return ended, told, errors, final


def judge(base, folder, content):
    """What is wrong with how a file was treated ("" if nothing), and how often it was accepted."""
    ended, told, errors, final = attempt(base, folder, content)
    if (folder / "gotcha").exists():
        return "code executed", 0
    if ended.code is None or ended.spent > 4 * LIMIT:
        return "hang", 0
    if "Traceback" in ended.err or len(told) != 5:
        return "traceback", 0
    if ended.memory > base.memory + MEMORY:
        return f"{ended.memory / 1e9:.1f} GB of memory", 0
    accepted = 0
    for i in range(4):
        exit_code = told[i + 1].split("\n")[0]
        if exit_code == "0":
            accepted += 1
            if i < 3 and told[i].split("\n", 1)[-1] != base.expected[0][i].split("\n", 1)[-1]:
                return "another output", accepted
        elif exit_code != "2":
            return f"exit code {exit_code}", accepted
        else:
            lines = [line for line in errors[i].splitlines() if line and "%|" not in line]
            name = ("sample.py", "train.py")[i == 3]
            if len(lines) != 1 or not lines[0].startswith(f"{name}: error: "):
                return f"not one clean line: {errors[i]!r}", accepted
        if i == 3 and exit_code == "0":
            same = final and all(torch.equal(final[name], value)
                                 for name, value in base.expected[1].items())
            if not same:
                return "another output", accepted
    return "", accepted


def make_bases(folder):
    """Two runs: one has ended, the other was stopped in the middle of phase 2."""
    write_corpus(folder)
    flags = FLAGS | dict(data=folder / "text.txt", qa=folder / "qa.tsv", eval_every=20)
    ended = [*as_argv(flags | dict(distill_steps=40, speak_steps=40)), f"--out={folder / 'ended'}"]
    stopped = [*as_argv(flags | dict(distill_steps=20)), f"--out={folder / 'stopped'}"]
    for argv in (ended, [*stopped, "--phase=pretrain"],
                 ["--phase=distill", f"--out={folder / 'stopped'}"]):
        process = Process(train.main, argv, folder)
        result = process.wait()
        assert result.code == 0, result.err
    bases = []
    for name, resume in (("ended", ["--speak_steps=60"]), ("stopped", ["--distill_steps=40"])):
        out = folder / name
        content = (out / "ckpt.pt").read_bytes()
        base = Base(out, train.load_checkpoint(out), content, resume, None, 0)
        ended, told, errors, final = attempt(base, folder, content)
        assert len(told) == 5 and told[4].startswith("0"), (told, errors)
        bases.append(base._replace(expected=(told, final), memory=ended.memory))
    return bases


def main():
    """Make the files, open them, count the faults."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    faults = collections.Counter()
    accepted = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = make_bases(folder)
        kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
        rng.shuffle(kinds)
        for number, kind in enumerate(kinds[:given.files], start=1):
            # the moments of an optimizer are read where a phase goes on
            base = bases[1] if kind == "optimizer" else rng.choice(bases)
            what, content = MAKERS[kind](rng, base)
            fault, times = judge(base, folder, content)
            accepted[kind] += times > 0
            faults[fault.split(":")[0]] += bool(fault)
            if fault:
                print(f"file {number}, {base.out.name}, {kind}, {what}: {fault}", flush=True)
                (Path(tempfile.gettempdir()) / f"fault{number}.pt").write_bytes(content)
    faults = {fault: times for fault, times in faults.items() if times}
    print(f"{given.files} files (seed {given.seed}): faults {faults or 0}; accepted by a command "
          f"that ended as with the original: {dict(accepted)}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
