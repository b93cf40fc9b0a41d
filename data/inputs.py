"""
Files that a student brings: a text, question-answer pairs, a teacher's vectors.

Nothing in them is trusted. A file that is not what it should be is refused with a ValueError of
one line, which names the flag, the file, the place in it, and what to do.
"""
import csv
import io
import math
import os
import stat
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

# the largest files that are read, in bytes
TEXT_LIMIT = 4 * 2 ** 30
PAIRS_LIMIT = 2 ** 28
# divides the documents of a text, as in GPT-2's data
END_OF_TEXT = "<|endoftext|>"
VECTORS_LIMIT = 2 * 2 ** 30
# how wide a teacher's vectors may be: whitening them takes the square of it in memory
WIDTH_LIMIT = 10_000
# how much of a file's content an error message quotes, in characters
QUOTE = 60

DELIMITERS = {"\t": "tab", ",": "comma", ";": "semicolon"}
FORMAT = {"\t": "write question, tab, answer",
          ",": "write question, comma, answer, and quote a field that holds a comma",
          ";": "write question, semicolon, answer, and quote a field that holds a semicolon"}


def printable(text, limit=QUOTE):
    r"""A text as it can be shown on any terminal, on one line: at most limit characters.

    Characters that steer a terminal or break the line, and halves of characters (surrogates),
    are written as in Python: \x1b, \u2028, \ud800. limit=None shows all of it.
    """
    text = str(text)
    shown = "".join(
        character.encode("unicode_escape").decode("ascii") if invisible(character) else character
        for character in text[:limit])
    if limit is not None and (len(text) > limit or len(shown) > limit):
        shown = shown[:limit - 3] + "..."
    return shown


def invisible(character):
    """Whether a character steers the output instead of being seen."""
    # these two shape letters: Persian and many emoji need them
    if character in "\u200c\u200d":
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def read_bytes(flag, path, limit, wanted):
    """The content of a regular file of at most limit bytes, e.g. flag "--data".

    wanted says what to give instead. ValueError if the file cannot be read to its end.
    """
    where = f"{flag}={printable(path, None)}"
    try:
        found = os.stat(path)
        # a FIFO or a device may never end
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise ValueError(f"{where} is {kind}; give {wanted}")
        if found.st_size > limit:
            raise ValueError(f"{where} has {found.st_size:,} bytes, more than the {limit:,} that "
                             f"are read; give a smaller file")
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror or error}; give {wanted}") from None


def decode(flag, path, raw):
    """The text of the bytes of a UTF-8 file. A mark at its beginning is left out."""
    where = f"{flag}={printable(path, None)}"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{where} is UTF-16 or UTF-32: save it as UTF-8 text")
    if b"\0" in raw:
        raise ValueError(f"{where} is a binary file (zero byte at position "
                         f"{raw.index(bytes(1))}): give plain text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 (byte {error.start}): save it as UTF-8 text") from None


def clean(text):
    """A text with composed letters (NFC) and line ends as on Linux.

    Composed and decomposed letters look alike, and questions are composed too.
    """
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n"))


def read_text(path):
    """The text of a UTF-8 file, or of the .txt files of a folder by their names; `clean`.

    Files are divided by END_OF_TEXT. ValueError says what is wrong with which file, and where.
    """
    wanted = "the path of a UTF-8 text file, or of a folder of .txt files"
    where = f"--data={printable(path, None)}"
    files = [path]
    if os.path.isdir(path):
        # not rglob: it fails where a folder goes away meanwhile
        files = sorted(Path(folder) / name for folder, _, names in os.walk(path)
                       for name in names if name.endswith(".txt"))
        if not files:
            raise ValueError(f"{where} is a folder without .txt files; give {wanted}")
    texts = []
    room = TEXT_LIMIT
    for file in files:
        raw = read_bytes("--data", file, room, wanted)
        room -= len(raw)
        texts.append(clean(decode("--data", file, raw)))
    text = END_OF_TEXT.join(texts)
    if not text.replace(END_OF_TEXT, "").strip():
        raise ValueError(f"{where} is empty: give a file with text in it")
    return text


# -- question-answer pairs ---------------------------------------------------------------------

def records(text, delimiter):
    """Yield (line, fields) of each record, by the rules of csv: fields may be quoted.

    line is the physical line on which the record begins, from 1. Only LF, CR and CR LF end a
    line: U+2028, U+0085, VT and FF are characters like any other. csv.Error(line, problem) if the
    quotes do not fit.
    """
    # newline="" keeps the line ends as they are: csv itself tells those inside of quotes apart
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True,
                        skipinitialspace=delimiter != "\t")
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise csv.Error(line, str(error)) from None
        fields = [unicodedata.normalize("NFC", field).strip() for field in fields]
        if any(fields):
            yield line, fields


def fits(text, delimiter):
    """Whether a delimiter cuts each record in two."""
    try:
        return all(len(fields) == 2 for _, fields in records(text, delimiter))
    except csv.Error:
        return False


def find_delimiter(text):
    """The character between question and answer: a tab, a comma or a semicolon.

    A tab if the first record has one; else a comma, else a semicolon, where that cuts each
    record in two. Where nothing fits, the one that stands in the first line: its errors say why.
    """
    try:
        _, first = next(records(text, "\t"), (1, []))
        if len(first) > 1:
            return "\t"
    except csv.Error:
        pass  # what is quoted may hold the tab: `"a <tab> b",c`
    for delimiter in ",;":
        if fits(text, delimiter):
            return delimiter
    first_line = text.lstrip().split("\n", 1)[0]
    return next((delimiter for delimiter in DELIMITERS if delimiter in first_line), "\t")


def read_pairs(path, flag="--qa"):
    """(line, question, answer) of each pair of a .tsv or .csv file, without repetitions.

    The rules are csv's. A first line `question,answer` is a header and left out, as is Excel's
    `sep=;`, which names the delimiter. Composed and decomposed letters (NFC, NFD) look alike, so
    all are made composed. ValueError names the line of a record that is no pair, and both lines
    where one question has two answers. flag: the one that names the file.
    """
    where = f"{flag}={printable(path, None)}"
    raw = read_bytes(flag, path, PAIRS_LIMIT, "a file of lines: question, tab, answer")
    text = decode(flag, path, raw)
    lines_before = 0
    if text[:4].lower() == "sep=" and text[4:5] in DELIMITERS and text[5:6] in "\r\n":
        delimiter = text[4]
        text = text[5:].removeprefix("\r").removeprefix("\n")
        lines_before = 1
    else:
        # a text of nothing but blanks has no delimiter either
        delimiter = find_delimiter(text)
    try:
        rows = list(records(text, delimiter))
    except csv.Error as error:
        line, problem = error.args
        raise ValueError(f"{where}, line {line + lines_before}: {printable(problem)}; close each "
                         'quote, and write a quote inside of quotes twice: ""') from None
    if rows and [field.casefold() for field in rows[0][1]] == ["question", "answer"]:
        rows = rows[1:]

    pairs = []
    answer_of = {}  # question -> its answer and line
    for line, fields in rows:
        line += lines_before
        if len(fields) != 2:
            count = len(fields) - 1
            name = DELIMITERS[delimiter] + ("" if count == 1 else "s")
            raise ValueError(f"{where}, line {line}: {count} {name}, not one; {FORMAT[delimiter]}")
        question, answer = fields
        if not question or not answer:
            empty = "answer" if question else "question"
            raise ValueError(f"{where}, line {line}: the {empty} is empty")
        known, known_line = answer_of.setdefault(question, (answer, line))
        if known != answer:
            raise ValueError(
                f"{where}, line {line}: '{printable(question)}' has the answer "
                f"'{printable(answer)}', but '{printable(known)}' on line {known_line}; keep one")
        if known_line == line:
            pairs.append((line, question, answer))
    if not pairs:
        raise ValueError(f"{where} holds no pair: write lines of question, tab, answer")
    return pairs


# -- a teacher's vectors -----------------------------------------------------------------------

def check_member(archive, name):
    """Refuse an array of a .npz that would take more than VECTORS_LIMIT bytes of memory.

    Both the zip's own figure and the header of the array are read first: a file of some
    kilobytes may claim terabytes.
    """
    size = archive.getinfo(f"{name}.npy").file_size
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(member)
        else:
            raise ValueError(f"`{name}` has a header of version {version}")
    claimed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or max(claimed, size) > VECTORS_LIMIT:
        raise ValueError(f"`{name}` claims {max(claimed, size):,} bytes, at most "
                         f"{VECTORS_LIMIT:,} are read")
    if claimed > size and not dtype.hasobject:
        raise ValueError(f"`{name}` claims {claimed:,} bytes and has {size:,}")


def read_vectors(path, answers):
    """A teacher's vectors of some answers, float32 (A, D).

    The file is a .npz with `answers` (n strings) and `vectors` (n, D). ValueError if it is not
    that, if an answer is missing, or if a number is not finite.
    """
    where = f"--teacher={printable(path, None)}"
    wanted = "a .npz with `answers` (n strings) and `vectors` (n rows of numbers, all of one width)"
    raw = read_bytes("--teacher", path, VECTORS_LIMIT, wanted)
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for name in ("answers", "vectors"):
                check_member(archive, name)
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            names, vectors = file["answers"], file["vectors"]
    # RuntimeError: an encrypted file, or a kind of compression that is not known
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile,
            zlib.error) as error:
        problem = printable(str(error).strip("'\""), 120)
        raise ValueError(f"{where}: {problem}; give {wanted}") from None
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"{where}: `answers` must be strings in one row, not {names.dtype} "
                         f"{names.shape}")
    numbers = vectors.ndim == 2 and vectors.shape[1] > 0 and vectors.dtype.kind in "fiu"
    if not numbers or len(names) != len(vectors):
        raise ValueError(f"{where}: `vectors` must be {len(names)} rows of numbers of one width, "
                         f"not {vectors.dtype} {vectors.shape}")
    if vectors.shape[1] > WIDTH_LIMIT:
        raise ValueError(f"{where}: `vectors` are {vectors.shape[1]:,} numbers wide, above "
                         f"{WIDTH_LIMIT:,}: reduce them, by a projection for instance")
    # a number that float32 cannot hold becomes infinite, and is then refused
    with np.errstate(over="ignore"):
        vectors = vectors.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise ValueError(f"{where}: the vector of '{printable(names[bad[0]])}' holds a value that "
                         "is not finite: replace it")
    # composed and decomposed letters look alike: they count as the same answer
    row = {}
    for i, name in enumerate(names.tolist()):
        if row.setdefault(unicodedata.normalize("NFC", name), i) != i:
            raise ValueError(f"{where}: '{printable(name)}' stands in `answers` twice: keep one")
    keys = [unicodedata.normalize("NFC", answer) for answer in answers]
    missing = [answer for answer, key in zip(answers, keys) if key not in row]
    if missing:
        raise ValueError(f"{where} lacks a vector for {len(missing)} answers, "
                         f"'{printable(missing[0])}' for one: add them")
    return torch.from_numpy(vectors[[row[key] for key in keys]])
