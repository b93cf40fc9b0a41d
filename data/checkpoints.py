"""
Files of a run that may be damaged, hostile, or in use: what train.py reads and writes them with.

A checkpoint is what torch.save writes, followed by its SHA-256. Reading one runs no code from it
and takes no more memory than the file has.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import struct
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import filelock
import torch

FORMAT = 4              # of a checkpoint; older files are refused

# how reading a hostile file may fail: each is what an unpickler or a zip archive raises
HOSTILE = (ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError,
           MemoryError, OSError, RuntimeError, TypeError, ValueError, pickle.PickleError,
           struct.error, zipfile.BadZipFile, zlib.error)

CONTENTS = dict(        # of a checkpoint; what phase 2 adds is None before
    format=int, config=dict, corpus=str, tokenizer=dict, phase=str, step=int, evaluated=bool,
    model=dict, optimizer=dict, rows=list, threshold=float | None, answers=list | None,
    concepts=torch.Tensor | None, questions=str | None, teacher=str | None, shape=str,
    added=list)                 # of [question, answer, number of the teach phase that added it]

# What the weights mean depends on these as well as on the tokenizer. Not all of them can be seen
# in the sizes of the weights, so a checkpoint holds a fingerprint of them.
SHAPE = ("vocab_size block_size n_layer n_head n_embd pred_layer pred_embd top_k target_norm "
         "dec_layer answer_size memory n_slots").split()

# -- writing and reading ---------------------------------------------------------------------------

def write_safely(path, content):
    """Write bytes beside path and rename: at every moment the file is whole, old or new."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)

def seal(content):
    """Bytes of a checkpoint, followed by their SHA-256."""
    return bytes(content) + hashlib.sha256(content).digest()

def unseal(sealed, path):
    """The bytes that `seal` was given; ValueError if a single bit has changed since."""
    size = hashlib.sha256().digest_size
    content, digest = sealed[:-size], sealed[-size:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(f"{path} is damaged, or no checkpoint of this version of the program: "
                         "restore it from a copy, or train again with another --out")
    return content

def unpack(content):
    """What the bytes of a checkpoint hold. Runs no code, and takes no more memory than they do."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("a checkpoint is not compressed")
        if archive.testzip():
            raise ValueError("a checksum is wrong")
    with warnings.catch_warnings():     # torch warns of a pickle that is not its own; it is refused
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

def content_of(rows):
    """A fingerprint of questions, or of a tensor: equal if their content is equal."""
    content = rows.cpu().numpy().tobytes() if torch.is_tensor(rows) else json.dumps(rows).encode()
    return hashlib.sha256(content).hexdigest()

def shape_of(config, tokenizer):
    """The fingerprint of SHAPE in a config (a dict), and of a tokenizer's state."""
    return content_of([[config[name] for name in SHAPE], tokenizer])

# -- is it one of ours? ----------------------------------------------------------------------------

def well_formed(checkpoint, fields, phases, columns):
    """Has a loaded checkpoint the parts, types and finite numbers that this program writes?

    fields: name -> type of each field of its config; phases: their names; columns: of a log row.
    """
    if not isinstance(checkpoint, dict) or not is_a(checkpoint.get("format"), int):
        return False
    if checkpoint["format"] != FORMAT or set(checkpoint) != set(CONTENTS):
        return False
    if not all(is_a(value, CONTENTS[name]) for name, value in checkpoint.items()):
        return False
    config, answers, concepts = (checkpoint[name] for name in ("config", "answers", "concepts"))
    if set(config) != set(fields):
        return False
    numbers = {float: float | int}      # a flag like --sigreg=1 stores an int
    if not all(is_a(config[name], numbers.get(kind, kind)) for name, kind in fields.items()):
        return False
    if checkpoint["shape"] != shape_of(config, checkpoint["tokenizer"]):
        return False
    weights = checkpoint["model"]
    if not all(is_a(name, str) and is_plain(value) for name, value in weights.items()):
        return False
    if (answers is None) != (concepts is None):
        return False
    if answers is not None:
        width = weights.get("answer_mean", concepts[0]).numel()
        if not all(is_a(answer, str) for answer in answers) or not is_plain(concepts):
            return False
        if concepts.shape != (len(answers), width) or concepts.dtype is not torch.float32:
            return False
    if not math.isfinite(checkpoint["threshold"] or 0):
        return False
    rows = all(is_row(row, phases, columns) for row in checkpoint["rows"])
    rows = rows and all(is_added(row) for row in checkpoint["added"])
    return rows and checkpoint["phase"] in phases and checkpoint["step"] >= 0

def is_a(value, kind):
    """isinstance, but True and False are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))

def is_plain(value):
    """A tensor of finite numbers that takes no more memory than it has in the file."""
    if not torch.is_tensor(value) or value.layout is not torch.strided:
        return False
    if value.device.type != "cpu" or value.nbytes > value.untyped_storage().nbytes():
        return False
    return bool(value.isfinite().all())

def is_added(row):
    """A pair that was taught later."""
    return isinstance(row, list) and list(map(type, row)) == [str, str, int]

def is_row(row, phases, columns):
    """A row of the log, as `report.Log` writes it."""
    if not isinstance(row, dict) or not set(row) <= set(columns):
        return False
    if row.get("phase") not in phases or not is_a(row.get("step"), int):
        return False
    values = [value for name, value in row.items() if name not in ("phase", "health")]
    if not is_a(row.get("health", ""), str) or not all(is_a(v, float | int) for v in values):
        return False
    return 0 <= row["step"] <= 10 ** 9 and all(abs(v) < 2 ** 63 for v in values if is_a(v, int))

# -- one process a folder --------------------------------------------------------------------------

@contextlib.contextmanager
def locked(out):
    """Hold the folder for this process; ValueError names the process that holds it already.

    The lock ends with its process, however that ends.
    """
    lock, owner = filelock.FileLock(Path(out) / "lock"), Path(out) / "lock.pid"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        for _ in range(20):             # the holder writes its number right after it has locked
            if not owner.exists():
                time.sleep(0.05)
        pid = owner.read_text().strip() if owner.exists() else "unknown"
        raise ValueError(f"--out={out} is in use by process {pid}: wait for its end, or take "
                         "another --out") from None
    try:
        yield
    finally:
        lock.release()

def own(out, stack):
    """Hold the folder until the stack is left; lock.pid says for so long who does."""
    stack.enter_context(locked(out))
    owner = Path(out) / "lock.pid"
    stack.callback(owner.unlink, missing_ok=True)
    owner.write_text(str(os.getpid()))
