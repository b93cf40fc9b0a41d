"""
From files to batches: `load` reads a corpus, `Text.batch` draws rows from it. Errors name the file and the line.

A corpus is either the shipped facts (a folder that data/facts/prepare.py writes) or a student's own .txt, with or without
question-answer pairs of their own.
"""
import copy
import hashlib
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.facts.prepare import prepare as prepare_facts
from data.tokenizer import Tokenizer, train_bpe


class QA(NamedTuple):
    """One question. split: DEC, LAT, TXT or NEVER; phrasing: trained or heldout."""
    split: str
    phrasing: str
    relation: str
    subject: str
    question: str
    answer: str


class Cloze(NamedTuple):
    """One statement with {a} in the place of its answer."""
    split: str
    relation: str
    statement: str
    answer: str


class Text:
    """A stream of tokens, and the places where a row may start.

    Documents end in EOS and no row crosses an EOS; a .txt of your own is one document. A row starts at the beginning of a
    document, or, in documents longer than a row, wherever a full row is left.
    """

    def __init__(self, tokens, block_size, tokenizer, name):
        self.tokens, self.block_size, self.pad, self.eos = tokens, block_size, tokenizer.pad, tokenizer.eos
        if len(tokens) < block_size:
            raise ValueError(f"{name}: {len(tokens)} tokens are too few for one row of --block_size={block_size}: "
                             "give more text or lower --block_size")
        ends = np.append(np.flatnonzero(tokens == self.eos), len(tokens))
        begins = np.append(0, ends[:-1] + 1)
        lengths = ends - begins
        begins, lengths = begins[lengths > 1], lengths[lengths > 1]
        rows = np.maximum(1, lengths - block_size + 1)                  # how many rows may start in each document
        within = np.arange(rows.sum()) - np.repeat(rows.cumsum() - rows, rows)
        self.starts = np.repeat(begins, rows) + within

    def rows(self, which):
        """Rows by number: int64 (n, block_size), PAD after the end of the document."""
        index = self.starts[np.asarray(which)][:, None] + np.arange(self.block_size)            # (n, T)
        rows = self.tokens[np.minimum(index, len(self.tokens) - 1)].astype(np.int64)
        over = ((rows == self.eos) | (index >= len(self.tokens))).cumsum(1) > 0
        rows[over] = self.pad
        return torch.from_numpy(rows)

    def batch(self, n):
        """n random rows, (n, block_size), by torch's global generator: a function of the seed set before."""
        rows = self.rows(torch.randint(len(self.starts), (n,)).numpy())
        return rows.pin_memory() if torch.cuda.is_available() else rows     # pinned, it travels while a GPU computes


class Corpus(NamedTuple):
    """Everything that training reads."""
    tokenizer: Tokenizer
    train: Text
    val: Text
    qa: list        # of QA
    cloze: list     # of Cloze
    values: dict    # relation -> every value that it takes in the world
    fingerprint: str


def pack(tokenizer, texts, limit, flag):
    """Texts as a padded tensor (n, longest) of ids. ValueError names the text that has more than limit tokens."""
    ids = tokenizer.encode_batch(texts)
    longest = max(ids, key=len)
    if len(longest) > limit:
        raise ValueError(f"'{tokenizer.decode(longest).strip()}' has {len(longest)} tokens, {limit} fit: "
                         f"shorten it or raise {flag}")
    return torch.tensor([row + [tokenizer.pad] * (len(longest) - len(row)) for row in ids])


def pack_answers(tokenizer, answers, limit, flag):
    """Answers as `pack` does: (A, L). With a leading space they are cut into the same tokens as inside a sentence."""
    return pack(tokenizer, [" " + answer for answer in answers], limit, flag)


def read_text(path):
    """The text of a UTF-8 file; ValueError says what is wrong with the file and where."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"--data={path}: {error.strerror or error}; give the path of a UTF-8 text file") from None
    if not raw.strip():
        raise ValueError(f"--data={path} is empty: give a file with text in it")
    if b"\0" in raw:
        raise ValueError(f"--data={path} is a binary file (zero byte at position {raw.index(bytes(1))}): give plain text")
    try:
        return raw.decode("utf-8-sig")              # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"--data={path} is not UTF-8 (byte {error.start}): save it as UTF-8 text") from None


def room(block_size, answer_size):
    """How many tokens an answer may have, and the flag that says so: the decoder ends it with EOS, the encoder reads it."""
    return min((answer_size - 1, "--answer_size"), (block_size, "--block_size"))


def read_qa(path, tokenizer, block_size, answer_size):
    """A student's own pairs, question <tab> answer a line. All are taught; the file's relation is 'qa'."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"--qa={path}: {error.strerror or error}; give a file of lines: question, tab, answer") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--qa={path} is not UTF-8 (byte {error.start}): save it as UTF-8 text") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, fields = f"--qa={path}, line {number}", line.split("\t")
        if len(fields) != 2:
            raise ValueError(f"{where}: {len(fields) - 1} tabs, not one; write question, tab, answer")
        question, answer = fields[0].strip(), fields[1].strip()
        if not question or not answer:
            raise ValueError(f"{where}: the {'answer' if question else 'question'} is empty")
        for text, (limit, flag) in (question, (block_size, "--block_size")), (" " + answer, room(block_size, answer_size)):
            if (n := len(tokenizer.encode(text))) > limit:
                raise ValueError(f"{where}: '{text.strip()}' has {n} tokens, {limit} fit; shorten it or raise {flag}")
        pairs.append(QA("DEC", "trained", "qa", question, question, answer))
    if not pairs:
        raise ValueError(f"--qa={path} holds no pair: write lines of question, tab, answer")
    return pairs


def read_rows(path, kind):
    """Lines of a prepared .tsv as tuples of a kind."""
    return [kind(*line.split("\t")) for line in path.read_text(encoding="utf-8").splitlines()]


def load(cfg, tokenizer=None):
    """Read the corpus that cfg names: data ("facts" or the path of a .txt), qa (the path of a .tsv, or "").

    tokenizer: the one of a checkpoint; without it, cfg.tokenizer says: bpe (trained on this corpus) or gpt2.
    """
    if not 260 <= cfg.vocab_size <= 2 ** 16:
        raise ValueError(f"--vocab_size={cfg.vocab_size} must be 260 (256 bytes and 4 specials) to 65536 (tokens of 16 bits)")
    if cfg.data == "facts":
        folder = prepare_facts(cfg.facts, cfg.vocab_size, cfg.block_size, tokenizer=cfg.tokenizer)
        tokenizer = Tokenizer.from_state(json.loads((folder / "tokenizer.json").read_text()))
        streams = {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r") for name in ("train", "val")}
        pairs, cloze = read_rows(folder / "qa.tsv", QA), read_rows(folder / "cloze.tsv", Cloze)
        values = {}
        for relation, value in read_rows(folder / "values.tsv", lambda *row: row):
            values.setdefault(relation, []).append(value)
        fingerprint = (folder / "meta.json").read_text()
    else:
        text = read_text(cfg.data)
        if tokenizer is None:
            tokenizer = Tokenizer.gpt2() if cfg.tokenizer == "gpt2" else Tokenizer(train_bpe(text, cfg.vocab_size - 4))
        tokens = np.array(tokenizer.encode(text), dtype=np.uint16)
        cut = len(tokens) * 9 // 10                                     # the last tenth is held out
        streams, pairs, cloze, values = dict(train=tokens[:cut], val=tokens[cut:]), [], [], {}
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
    train, val = (Text(streams[name], cfg.block_size, tokenizer, f"--data={cfg.data} ({part})")
                  for name, part in (("train", "its training part"), ("val", "its held-out part")))
    if cfg.qa:
        pairs = read_qa(cfg.qa, tokenizer, cfg.block_size, cfg.answer_size)
    return Corpus(tokenizer, train, val, pairs, cloze, values, fingerprint)


class Questions:
    """The corpus's questions as tensors: what is asked, which answer is right, and which answers compete with it."""

    def __init__(self, rows, tokenizer, block_size, answer_size, device):
        self.rows, self.pad = rows, tokenizer.pad
        self.answers = sorted({row.answer for row in rows if row.split != "NEVER"})
        number = {answer: i for i, answer in enumerate(self.answers)}
        self.tokens = pack(tokenizer, [row.question for row in rows], block_size, "--block_size").to(device)    # (N, T)
        self.answer_tokens = pack_answers(tokenizer, self.answers, *room(block_size, answer_size)).to(device)   # (A, L)
        self.answer_of = torch.tensor([number.get(row.answer, 0) for row in rows], device=device)               # (N,)
        relations = {name: i for i, name in enumerate(sorted({row.relation for row in rows}))}
        values = torch.zeros(len(relations), len(self.answers), dtype=torch.bool)
        for row in rows:
            if row.split != "NEVER":
                values[relations[row.relation], number[row.answer]] = True
        self.rivals = values[[relations[row.relation] for row in rows]].to(device)                              # (N, A)

    def where(self, *splits, phrasing=None):
        """Numbers of the questions of some splits, (n,)."""
        return torch.tensor([i for i, row in enumerate(self.rows) if row.split in splits
                             and phrasing in (None, row.phrasing)], dtype=torch.long, device=self.tokens.device)

    def drawing(self, asked, n):
        """draw() -> n of the questions that are asked (numbers, (m,)), drawn anew: which of them (n,), and their tokens
        (n, T): a batch ends with its longest row. Lengths stay on the CPU, so that no GPU is waited for."""
        tokens, lengths = self.tokens[asked], (self.tokens[asked] != self.pad).sum(1).cpu()                # (m, T), (m,)

        def draw():
            """Which of them (n,), tokens (n, T)."""
            which = torch.randint(len(asked), (n,))
            longest, which = lengths[which].max(), which.to(tokens.device, non_blocking=True)
            return which, tokens[which, :longest]
        return draw

    def pick(self, kept):
        """The same with some of the questions, by number (n,)."""
        part = copy.copy(self)
        part.rows = [self.rows[i] for i in kept.tolist()]
        part.tokens, part.answer_of, part.rivals = self.tokens[kept], self.answer_of[kept], self.rivals[kept]
        return part

    def only(self, phrasing):
        """The same with the questions of one phrasing, if there are any: a quick look between two full evaluations."""
        kept = self.where("DEC", "LAT", "TXT", "NEVER", phrasing=phrasing)
        return self.pick(kept) if len(kept) else self


def read_vectors(path, answers):
    """A teacher's vectors of some answers, (A, D), from a .npz with `answers` (n strings) and `vectors` (n, D)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names, vectors = file["answers"].tolist(), file["vectors"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"--teacher={path}: {error}; give a .npz with `answers` (n strings) and `vectors` (n rows of "
                         "numbers, all of one width)") from None
    if vectors.ndim != 2 or len(names) != len(vectors) or vectors.dtype.kind not in "fiu":
        raise ValueError(f"--teacher={path}: `vectors` must be {len(names)} rows of numbers of one width, "
                         f"not {vectors.dtype} {vectors.shape}")
    if len(bad := np.flatnonzero(~np.isfinite(vectors).all(1))):
        raise ValueError(f"--teacher={path}: the vector of '{names[bad[0]]}' holds a value that is not finite: replace it")
    row = {name: i for i, name in enumerate(names)}
    if missing := [answer for answer in answers if answer not in row]:
        raise ValueError(f"--teacher={path} lacks a vector for {len(missing)} answers, '{missing[0]}' for one: add them")
    return torch.from_numpy(vectors[[row[answer] for answer in answers]]).float()
