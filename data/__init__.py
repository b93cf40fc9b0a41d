"""
From files to batches: `load` reads a corpus, `Text.batch` draws rows from it.

A corpus is either the shipped facts (a folder that data/facts/prepare.py writes) or a student's
own .txt, with or without question-answer pairs of their own. data/inputs.py reads and checks a
student's files; errors name the file and the line.
"""
import copy
import hashlib
import json
import random
from typing import NamedTuple

import numpy as np
import torch

from data.added import add_pairs  # noqa: F401
from data.facts.prepare import prepare as prepare_facts
from data.inputs import (  # noqa: F401
    END_OF_TEXT, TEXT_LIMIT, clean, decode, printable, read_bytes, read_pairs, read_text,
    read_vectors)
from data.tokenizer import Tokenizer, train_bpe
from data.typed import as_typed, as_written, made_up, nonsense, plain, subjects_of  # noqa: F401


class QA(NamedTuple):
    """One question. split: DEC, LAT, TXT or NEVER.

    phrasing: trained, heldout, typed (a held-out one with the noise of phase 2); natural, lower,
    no_mark, typo and nonsense are read by the final evaluation alone (data/facts/prepare.py).
    """
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

    Documents end in EOS and no row crosses an EOS; a .txt of your own is one document, unless it
    has <|endoftext|> in it. A row starts at the beginning of a document, or, in documents longer
    than a row, wherever a full row is left.
    """

    def __init__(self, tokens, block_size, tokenizer, name):
        """tokens: integers (n,). name: what an error calls the text. ValueError if n is small."""
        self.tokens = tokens
        self.block_size = block_size
        self.pad = tokenizer.pad
        self.eos = tokenizer.eos
        if len(tokens) < block_size:
            raise ValueError(f"{name}: {len(tokens)} tokens are too few for one row of "
                             f"--block_size={block_size}: give more text or lower --block_size")
        ends = np.append(np.flatnonzero(tokens == self.eos), len(tokens))
        begins = np.append(0, ends[:-1] + 1)
        lengths = ends - begins
        enough = lengths > 1
        if not enough.any():
            raise ValueError(f"{name}: no document between two {END_OF_TEXT} has more than one "
                             "token: give longer ones")
        begins = begins[enough]
        # how many rows may start in each document
        rows = np.maximum(1, lengths[enough] - block_size + 1)
        # 0 1 2 ... anew in each document
        within = np.arange(rows.sum()) - np.repeat(rows.cumsum() - rows, rows)
        self.starts = np.repeat(begins, rows) + within

    def rows(self, which):
        """Rows by number: int64 (n, block_size), PAD after the end of the document."""
        starts = self.starts[np.asarray(which)]
        index = starts[:, None] + np.arange(self.block_size)                        # (n, T)
        inside = np.minimum(index, len(self.tokens) - 1)
        rows = self.tokens[inside].astype(np.int64)
        stop = (rows == self.eos) | (index >= len(self.tokens))
        rows[stop.cumsum(1) > 0] = self.pad
        return torch.from_numpy(rows)

    def batch(self, n):
        """n random rows, int64 (n, block_size).

        They are drawn by torch's global generator: a function of the seed set before.
        """
        which = torch.randint(len(self.starts), (n,))
        rows = self.rows(which.numpy())
        # pinned memory is copied to a GPU while the GPU computes
        return rows.pin_memory() if torch.cuda.is_available() else rows


class Corpus(NamedTuple):
    """Everything that training reads."""
    tokenizer: Tokenizer
    train: Text
    val: Text
    qa: list        # of QA
    cloze: list     # of Cloze
    values: dict    # relation -> every value that it takes in the world
    fingerprint: str


def frequent_words(tokens, tokenizer, n):
    """The n commonest words that are one token: ids (W,), and how often each occurs, (W,).

    tokens: integers (N,), a stream of text. A word is counted where the next token begins another.
    """
    begins = np.array(tokenizer.word_start)
    whole = begins[tokens[:-1]] & begins[tokens[1:]]
    counts = np.bincount(tokens[:-1][whole], minlength=len(begins))
    counts[[not is_word for is_word in tokenizer.is_word]] = 0
    ids = np.argsort(-counts, kind="stable")[:n]
    ids = ids[counts[ids] > 0]
    return torch.from_numpy(ids), torch.from_numpy(counts[ids])


def pack(tokenizer, texts, limit, flag):
    """Texts as token ids, int64 (n, longest): see `pad`."""
    return pad(tokenizer, tokenizer.encode_batch(texts), limit, flag)


def pad(tokenizer, ids, limit, flag):
    """n lists of token ids as one tensor, int64 (n, longest), padded at the end.

    ValueError names the text that has more than limit tokens, and the flag that sets the limit.
    """
    longest = max(ids, key=len, default=[])
    if len(longest) > limit:
        text = tokenizer.decode(longest).strip()
        raise ValueError(f"'{printable(text)}' has {len(longest)} tokens, {limit} fit: "
                         f"shorten it or raise {flag}")
    padded = [row + [tokenizer.pad] * (len(longest) - len(row)) for row in ids]
    return torch.tensor(padded, dtype=torch.long).view(len(ids), len(longest))


def pack_questions(tokenizer, questions, limit):
    """Questions as `pack` does, each written as `Tokenizer.encode_question` says: (n, T)."""
    ids = [tokenizer.encode_question(question) for question in questions]
    return pad(tokenizer, ids, limit, "--block_size")


def pack_answers(tokenizer, answers, limit, flag):
    """Answers as `pack` does: (A, L).

    With a leading space they are cut into the same tokens as inside a sentence.
    """
    return pack(tokenizer, [" " + answer for answer in answers], limit, flag)


def room(block_size, answer_size):
    """How many tokens an answer may have, and the flag that says so.

    The decoder ends an answer with EOS, and the encoder reads it.
    """
    return min((answer_size - 1, "--answer_size"), (block_size, "--block_size"))


def read_fitting(path, tokenizer, block_size, answer_size, flag="--qa"):
    """The pairs (question, answer) of a student's file, a list. flag: the one that names the file.

    `inputs.read_pairs` says what the file may look like. ValueError names the line of a pair
    that has too many tokens, or of two questions that are encoded alike and have two answers.
    """
    pairs = []
    answer_of = {}      # tokens of a question -> its answer and line
    for line, question, answer in read_pairs(path, flag):
        checks = [(question, tokenizer.encode_question(question), block_size, "--block_size"),
                  (answer, tokenizer.encode(" " + answer), *room(block_size, answer_size))]
        for text, ids, limit, remedy in checks:
            if len(ids) > limit:
                raise ValueError(
                    f"{flag}={printable(path, None)}, line {line}: '{printable(text)}' has "
                    f"{len(ids)} tokens, {limit} fit; shorten it or raise {remedy}")
        known, known_line = answer_of.setdefault(tuple(checks[0][1]), (answer, line))
        if known != answer:
            raise ValueError(
                f"{flag}={printable(path, None)}, line {line}: '{printable(question)}' is the "
                f"question of line {known_line}, since capitals and a mark at the end do not "
                "count, but has another answer; keep one")
        pairs.append((question, answer))
    return pairs


def read_qa(path, tokenizer, block_size, answer_size):
    """A student's own pairs as a list of QA. All are taught; the file's relation is 'qa'.

    Each question is there twice more: with the noise of phase 2 (typed), and about a made-up
    subject, which sets the threshold. Errors as in `read_fitting`.
    """
    pairs = read_fitting(path, tokenizer, block_size, answer_size)
    subjects = subjects_of([question for question, _ in pairs])
    rng = random.Random(0)
    rows = []
    for subject, (question, answer) in zip(subjects, pairs):
        rows.append(QA("DEC", "trained", "qa", subject, question, answer))
        name = made_up(subject, rng.choice(subjects), rng)
        others = [QA("DEC", "typed", "qa", subject, as_typed(question, subject, rng), answer),
                  QA("NEVER", "made_up", "qa", name, question.replace(subject, name), "")]
        rows += [row for row in others
                 if len(tokenizer.encode_question(row.question)) <= block_size]
    return rows


def read_reworded(path, taught, tokenizer, block_size, answer_size):
    """Questions of --qa in other words, which are asked and never taught, as a list of QA.

    taught: the rows of --qa. ValueError, besides those of `read_fitting`, where a question is
    taught as well, or where an answer is not among those that are taught.
    """
    answers = {row.answer for row in taught}
    questions = {plain(row.question).casefold() for row in taught if row.phrasing == "trained"}
    rows = []
    for question, answer in read_fitting(path, tokenizer, block_size, answer_size, "--qa_val"):
        where = f"--qa_val={printable(path, None)}: '{printable(question)}'"
        if plain(question).casefold() in questions:
            raise ValueError(f"{where} is in --qa too: put it in other words, or leave it out")
        if answer not in answers:
            raise ValueError(f"{where} has the answer '{printable(answer)}', which no question of "
                             "--qa has: it could not be known")
        rows.append(QA("DEC", "heldout", "qa", question, question, answer))
    return rows


def read_rows(path, kind):
    """Lines of a prepared .tsv as tuples of a kind."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [kind(*line.split("\t")) for line in lines]


def retokenised(stream, old, new):
    """A stream of documents, integers (n,), in the tokens of another tokenizer, uint16 (m,)."""
    documents = np.split(stream, np.flatnonzero(stream == old.eos) + 1)
    texts = [old.decode(document.tolist()) for document in documents if len(document)]
    tokens = [token for ids in new.encode_batch(texts) for token in ids + [new.eos]]
    return np.array(tokens, dtype=np.uint16)


def load_facts(cfg, tokenizer):
    """The shipped facts: (tokenizer, streams by name, questions, clozes, values, fingerprint).

    tokenizer: the one of a run that goes on with this text, or None.
    """
    folder = prepare_facts(cfg.facts, cfg.vocab_size, cfg.block_size, tokenizer=cfg.tokenizer)
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        own = Tokenizer.from_state(json.loads(text))
        streams = {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r")
                   for name in ("train", "val")}
        pairs = read_rows(folder / "qa.tsv", QA)
        cloze = read_rows(folder / "cloze.tsv", Cloze)
        values = {}
        for relation, value in read_rows(folder / "values.tsv", lambda *row: row):
            values.setdefault(relation, []).append(value)
        files = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["files"]
    except OSError as error:
        raise ValueError(f"data/facts: cannot read {folder} ({error.strerror or error}): "
                         "remove that folder, it is written anew") from None
    # The content alone: a folder that moved, or that another version of prepare.py wrote with
    # the same content, is the same corpus.
    fingerprint = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    if tokenizer is None or tokenizer.state() == own.state():
        return own, streams, pairs, cloze, values, fingerprint
    streams = {name: retokenised(stream, own, tokenizer) for name, stream in streams.items()}
    return tokenizer, streams, pairs, cloze, values, fingerprint


def load_text(cfg, tokenizer):
    """A student's own text: (tokenizer, streams by name, fingerprint).

    The last tenth is held out.
    """
    text = read_text(cfg.data)
    documents = [part for part in text.split(END_OF_TEXT) if part.strip()]
    if tokenizer is None and cfg.tokenizer == "gpt2":
        tokenizer = Tokenizer.gpt2()
    elif tokenizer is None:
        tokenizer = Tokenizer(train_bpe("\n".join(documents), cfg.vocab_size - 4))
        if tokenizer.vocab_size < cfg.vocab_size:
            print(f"the text is too small for --vocab_size={cfg.vocab_size}: no more than "
                  f"{tokenizer.vocab_size} tokens occur twice, and that many are taken")
    parts = []
    for document in documents:
        parts += [np.array(part, dtype=np.uint16) for part in tokenizer.encode_parts(document)]
        parts.append(np.array([tokenizer.eos], dtype=np.uint16))
    tokens = np.concatenate(parts[:-1])     # nothing follows the last document
    cut = len(tokens) * 9 // 10
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return tokenizer, dict(train=tokens[:cut], val=tokens[cut:]), fingerprint


def load(cfg, tokenizer=None):
    """Read the corpus that cfg names: a `Corpus`.

    cfg.data is "facts", or the path of a .txt or of a folder of them; cfg.qa is the path of a .tsv
    or .csv, or "".
    tokenizer: the one of a checkpoint; without it, cfg.tokenizer says: bpe (trained on this
    corpus) or gpt2. ValueError, one line, if a file or a flag does not fit.
    """
    if not 260 <= cfg.vocab_size <= 2 ** 16:
        raise ValueError(f"--vocab_size={cfg.vocab_size} must be 260 (256 bytes and 4 specials) "
                         "to 65536 (tokens of 16 bits)")
    if cfg.qa_val and not cfg.qa:
        raise ValueError(f"--qa_val={printable(cfg.qa_val, None)} asks what --qa teaches: give "
                         "--qa=FILE too")
    if cfg.data == "facts":
        tokenizer, streams, pairs, cloze, values, fingerprint = load_facts(cfg, tokenizer)
    else:
        tokenizer, streams, fingerprint = load_text(cfg, tokenizer)
        pairs = []
        cloze = []
        values = {}
    source = f"--data={printable(cfg.data, None)}"
    train = Text(streams["train"], cfg.block_size, tokenizer, f"{source} (its training part)")
    val = Text(streams["val"], cfg.block_size, tokenizer, f"{source} (its held-out part)")
    if cfg.qa:
        pairs = read_own(cfg, tokenizer)
    return Corpus(tokenizer, train, val, pairs, cloze, values, fingerprint)


def read_own(cfg, tokenizer):
    """The questions of the files that cfg.qa and cfg.qa_val name, a list of QA."""
    pairs = read_qa(cfg.qa, tokenizer, cfg.block_size, cfg.answer_size)
    if cfg.qa_val:
        pairs += read_reworded(cfg.qa_val, pairs, tokenizer, cfg.block_size, cfg.answer_size)
    return pairs


def read_questions(cfg, tokenizer):
    """The questions of the corpus that cfg names, a list of QA; its text is not read."""
    if cfg.qa:
        return read_own(cfg, tokenizer)
    return load_facts(cfg, None)[2] if cfg.data == "facts" else []


# the wordings of a quick look between full evaluations
QUICK = "heldout", "typed", "made_up"


class Questions:
    """The corpus's questions as tensors: what is asked, which answer is right, which compete.

    rows             list of N QA
    answers          list of the A answers that are taught, sorted
    tokens           int64 (N, T), the questions, padded
    answer_tokens    int64 (A, L), padded
    answer_of        int64 (N,), the number of each question's answer; 0 where it has none
    relation_of      int64 (N,), the number of each question's relation
    relation_values  bool (R, A), the answers that occur in each relation
    """

    def __init__(self, rows, tokenizer, block_size, answer_size, device):
        self.rows = rows
        self.tokenizer = tokenizer
        self.block_size = block_size
        taught = [row for row in rows if row.split != "NEVER"]
        self.answers = sorted({row.answer for row in taught})
        questions = [row.question for row in rows]
        self.tokens = pack_questions(tokenizer, questions, block_size).to(device)
        limit, flag = room(block_size, answer_size)
        self.answer_tokens = pack_answers(tokenizer, self.answers, limit, flag).to(device)

        number = {answer: i for i, answer in enumerate(self.answers)}
        names = sorted({row.relation for row in rows})
        relations = {name: i for i, name in enumerate(names)}
        self.answer_of = torch.tensor([number.get(row.answer, 0) for row in rows], device=device)
        self.relation_of = torch.tensor([relations[row.relation] for row in rows], device=device)
        values = torch.zeros(len(relations), len(self.answers), dtype=torch.bool)
        for row in taught:
            values[relations[row.relation], number[row.answer]] = True
        self.relation_values = values.to(device)

    def rivals_of(self, which):
        """The answers that compete in some questions, by number (n,) or slice: bool (n, A)."""
        return self.relation_values[self.relation_of[which]]

    @property
    def rivals(self):
        """`rivals_of` all questions, bool (N, A): gigabytes for 50,000 answers of one's own."""
        return self.rivals_of(slice(None))

    def where(self, *splits, phrasing=None):
        """Numbers of the questions of some splits, (n,); phrasing: one, several, or any."""
        wanted = (phrasing,) if isinstance(phrasing, str) else phrasing
        found = [i for i, row in enumerate(self.rows)
                 if row.split in splits and (wanted is None or row.phrasing in wanted)]
        return torch.tensor(found, dtype=torch.long, device=self.tokens.device)

    def drawing(self, asked, n, noise=0.0, unknown=0.0):
        """draw() -> n of the questions that are asked (numbers, (m,)), drawn anew at each call.

        A share `noise` of them is written as people type (`typed.as_typed`), and a share `unknown`
        asks about a made-up subject. Returns which of them (n,), m for a made-up subject, and
        their tokens (n, T): a batch ends with its longest row.
        """
        rows = [self.rows[i] for i in asked.tolist()]
        m, pad = len(rows), self.tokenizer.pad
        tokens = [[token for token in ids if token != pad] for ids in self.tokens[asked].tolist()]

        def draw():
            """Which of them (n,), tokens (n, T)."""
            which = torch.randint(m, (n,))
            rng = random.Random(torch.randint(2 ** 62, ()).item())
            batch = []
            for place, number in enumerate(which.tolist()):
                row = rows[number]
                question, subject = row.question, as_written(row.subject, row.question)
                if rng.random() < unknown:
                    which[place] = m
                    name = made_up(subject, rng.choice(rows).subject, rng)
                    known, question = question, question.replace(subject, name)
                    if rng.random() < 0.3:
                        question = nonsense(known, subject, rng)
                    subject = name
                if rng.random() < noise:
                    question = as_typed(question, subject, rng)
                ids = tokens[number]
                if question != row.question:
                    ids = self.tokenizer.encode_question(question)[:self.block_size]
                batch.append(ids)
            longest = max(map(len, batch))
            batch = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in batch])
            device = self.tokens.device
            return which.to(device, non_blocking=True), batch.to(device, non_blocking=True)
        return draw

    def pick(self, kept):
        """The same with some of the questions, by number (n,)."""
        part = copy.copy(self)
        part.rows = [self.rows[i] for i in kept.tolist()]
        part.tokens = self.tokens[kept]
        part.answer_of = self.answer_of[kept]
        part.relation_of = self.relation_of[kept]
        return part

    def fewer(self, every=5):
        """The same with a fifth of the trained wordings, where others are held out: these show
        as much. All of the held-out ones."""
        if not len(self.where("DEC", phrasing="heldout")):
            return self
        kept = [i for i, row in enumerate(self.rows)
                if row.phrasing != "trained" or row.split == "NEW" or i % every == 0]
        return self.pick(torch.tensor(kept, device=self.tokens.device))

    def only(self, *phrasings):
        """The same with the questions of some phrasings: a quick look between full evaluations.

        All questions, where none has the first of them: pairs of one's own are not held out.
        """
        if all(row.phrasing != phrasings[0] for row in self.rows):
            return self
        kept = [i for i, row in enumerate(self.rows) if row.phrasing in phrasings]
        return self.pick(torch.tensor(kept, device=self.tokens.device))
