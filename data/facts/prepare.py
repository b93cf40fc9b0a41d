"""
Render the facts: text as tokens, a tokenizer, question-answer splits and cloze statements.

    python data/facts/prepare.py --facts=tiny      # about 300 facts; `python train.py` calls this
    python data/facts/prepare.py --facts=all       # every fact of facts.tsv

A fact is (subject, relation, answer) and belongs to one split, for good:
    DEC    in the text, taught in latent space and as tokens      the ordinary case
    LAT    in the text, taught in latent space, never as tokens   can it be spoken?
    TXT    in the text, never taught                              does reading alone reach speech?
    NEVER  nowhere: its subject is invented                       the right answer: "I don't know"
Each fact keeps one wording of its statement out of the training text: it becomes held-out text
and the cloze.
"""
import argparse
import hashlib
import json
import os
import random
import secrets
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
# so that it also runs as a plain script
sys.path.insert(0, str(HERE.parents[1]))
from data.tokenizer import Tokenizer, train_bpe  # noqa: E402
from data.typed import TESTS, as_typed, made_up  # noqa: E402

# what the written files depend on, beside the flags: files of this folder, and code beside it
SOURCES = ("facts.tsv", "templates.tsv", "invented.tsv", "natural.tsv", "nonsense.txt",
           "prepare.py")
CODE = (HERE.parent / "tokenizer.py", HERE.parent / "typed.py")
# Statements of a relation that are used: with 13 the same facts took twice as many steps to learn.
WORDINGS = 8
# How many facts of each relation make the tiny world: the most famous ones, which stand first in
# facts.tsv.
TINY = dict(capital=40, continent=40, currency=40, language=30, author=40, painter=25, inventor=25,
            composer=20, symbol=25, landmark_city=20)
# how often each sentence is written, each time in other company
EPOCHS = dict(tiny=12, all=6)
ABSTAIN = "I don't know"
# what a prepared folder holds, beside meta.json
FILES = ("train.bin", "val.bin", "qa.tsv", "cloze.tsv", "values.tsv", "tokenizer.json")


def read_tsv(name):
    """Rows of a .tsv beside this file, as lists of fields; lines that start with # are left out."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def fingerprint(facts, vocab_size, block_size, seed, tokenizer):
    """What the written files depend on, as a dict: each gets a folder of its own."""
    sources = hashlib.sha256()
    for path in (*(HERE / name for name in SOURCES), *CODE):
        sources.update(path.read_bytes())
    return dict(facts=facts, vocab_size=vocab_size, block_size=block_size, seed=seed,
                tokenizer=tokenizer, sources=sources.hexdigest()[:16])


def split_of(subject, relation):
    """DEC, LAT or TXT (2 : 1 : 1), a function of the fact alone.

    So no seed can move a fact to an easier split.
    """
    if (subject, relation) == ("Sapiens", "author"):
        # the README asks for it by name
        return "DEC"
    digest = hashlib.sha256(f"{relation}|{subject}".encode()).digest()
    return ("DEC", "DEC", "LAT", "TXT")[digest[0] % 4]


def sentence(template, subject, answer="{a}"):
    """Fill a template and begin it with a capital letter."""
    text = template.replace("{s}", subject).replace("{a}", answer)
    return text[0].upper() + text[1:]


def select(which):
    """The facts of a preset: a list of (subject, relation, answer, split)."""
    facts = []
    seen = {}
    for subject, relation, answer in read_tsv("facts.tsv"):
        seen[relation] = seen.get(relation, 0) + 1
        if which == "all" or seen[relation] <= TINY.get(relation, 0):
            facts.append((subject, relation, answer, split_of(subject, relation)))
    return facts


def questions(facts, templates):
    """Rows of qa.tsv: split, phrasing, relation, subject, question, answer.

    trained    the wordings of phases 2 and 3
    heldout    wordings that are never trained on
    typed      these with the noise of phase 2, once each
    made_up    these about made-up subjects; they set the threshold
    natural    as people write, natural.tsv; for the final evaluation alone, like the rest
    lower, no_mark, typo     the held-out wordings with the noise of the test
    nonsense   lines of nonsense.txt
    """
    relations = {relation for _, relation, _, _ in facts}
    invented = [(subject, relation, ABSTAIN, "NEVER")
                for subject, relation in read_tsv("invented.tsv") if relation in relations]
    natural = {}
    for relation, template in read_tsv("natural.tsv"):
        natural.setdefault(relation, []).append(template)
    subjects = {}
    for subject, relation, _, _ in facts:
        subjects.setdefault(relation, []).append(subject)
    rng = random.Random(0)
    rows = []

    def add(phrasing, question):
        """One row more, about the fact of the loop below."""
        rows.append((split, phrasing, relation, subject, question, answer))

    for subject, relation, answer, split in facts + invented:
        for template in templates[relation, "question"]:
            add("trained", sentence(template, subject))
        for template in templates[relation, "heldout"]:
            question = sentence(template, subject)
            add("heldout", question)
            add("typed", as_typed(question, subject, rng))
            if split == "DEC":
                name = made_up(subject, rng.choice(subjects[relation]), rng)
                rows.append(("NEVER", "made_up", relation, name, sentence(template, name), ABSTAIN))
            for phrasing, noise in TESTS.items():
                add(phrasing, noise(question))
        for template in natural[relation]:
            add("natural", template.replace("{s}", subject))
    for line, in read_tsv("nonsense.txt"):
        rows.append(("NEVER", "nonsense", "none", line, line, ABSTAIN))
    return rows


def paragraphs(tokens, by_subject, block_size, epochs, rng):
    """Yield rows of at most block_size tokens: subjects in random order, each one's facts together.

    tokens: for each fact, its sentences as token lists. In an epoch each sentence is said once.
    """
    row = []
    for _ in range(epochs):
        order = [rng.sample(sentences, len(sentences)) for sentences in tokens]
        for turn in range(max(map(len, order))):
            for facts in rng.sample(by_subject, len(by_subject)):
                for fact in rng.sample(facts, len(facts)):
                    said = order[fact][turn] if turn < len(order[fact]) else []
                    if len(row) + len(said) > block_size:
                        yield row
                        row = []
                    row = row + said[:block_size]
    yield row

def write(path, data):
    """Write bytes to a file and wait until they are on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path):
    """Wait until the names in a folder are on the disk. Windows cannot open a folder."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of(path):
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def damage(folder, meta):
    """The name of a file of a prepared folder that is not as it was written; "" if all are.

    meta.json holds the fingerprint and the SHA-256 of each other file.
    """
    try:
        stored = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return "meta.json"
    files = stored.get("files") if isinstance(stored, dict) else None
    if not isinstance(files, dict) or stored != meta | dict(files=files):
        return "meta.json"
    for name in FILES:
        path = folder / name
        if not path.is_file() or digest_of(path) != files.get(name):
            return name
    return ""


def publish(partial, out):
    """Give a finished folder its name.

    Another process may have been first, or the folder is there with a damaged file. Its files
    can only be the same, so each is replaced: whoever reads at this moment finds either one.
    """
    try:
        partial.rename(out)
    except OSError:
        if not out.is_dir():
            raise
        # meta.json last: it says that the rest is complete
        for name in (*FILES, "meta.json"):
            (partial / name).replace(out / name)
        sync_folder(out)
    sync_folder(out.parent)


def prepare(facts="tiny", vocab_size=2048, block_size=64, seed=0, tokenizer="bpe"):
    """Write one world, unless it is there already; return its folder data/facts/<facts>-<hash>.

    train.bin, val.bin   uint16 tokens, each paragraph ended by EOS; val holds wordings that its
                         facts never had in train
    tokenizer.json       its ranks and pattern
    qa.tsv               split, phrasing, relation, subject, question, answer
    cloze.tsv            split, relation, statement with {a} for the answer, answer
    values.tsv           relation, answer: all the values that a relation takes in facts.tsv,
                         those of other presets too
    meta.json            what the files depend on, and their checksums

    The hash is of all that shapes the files, so that runs with different flags do not meet.
    ValueError if a flag does not fit, or if the folder cannot be read or written.
    """
    if facts not in EPOCHS:
        raise ValueError(f"--facts={facts} must be one of {', '.join(EPOCHS)}")
    if not 260 <= vocab_size <= 2 ** 16:
        raise ValueError(f"--vocab_size={vocab_size} must be 260 (256 bytes and 4 specials) to "
                         "65536 (tokens of 16 bits)")
    if block_size < 2:
        raise ValueError(f"--block_size={block_size} must be 2 or more")
    try:
        meta = fingerprint(facts, vocab_size, block_size, seed, tokenizer)
        name = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
        out = HERE / f"{facts}-{name}"
        damaged = damage(out, meta)
        if not damaged:
            return out
        if out.exists():
            print(f"data/facts/{out.name}: {damaged} is damaged, the folder is written anew")
        # written beside and renamed: a killed run leaves no half folder under that name
        partial = HERE / f"{out.name}.{secrets.token_hex(4)}.part"
        partial.mkdir()
        try:
            render(partial, meta)
            publish(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"data/facts: cannot prepare the facts in {HERE} "
                         f"({error.strerror or error}): free space or allow writing "
                         "there") from None
    return out


def render(folder, meta):
    """Write the files of a world into an empty folder. meta: what `fingerprint` gives."""
    facts = meta["facts"]
    block_size = meta["block_size"]
    rng = random.Random(meta["seed"])
    world = select(facts)
    templates = {}
    for relation, kind, template in read_tsv("templates.tsv"):
        templates.setdefault((relation, kind), []).append(template)
    # the wordings of each fact, in an order of its own; the first one is held out
    wordings = [rng.sample(templates[relation, "statement"][:WORDINGS], WORDINGS)
                for _, relation, _, _ in world]
    sentences = [[sentence(template, subject, answer) for template in chosen]
                 for (subject, _, answer, _), chosen in zip(world, wordings)]
    qa = questions(world, templates)

    # The tokenizer sees the sentences of the text and the trained questions, so that both are cut
    # into the same words; the names of invented subjects it does not see.
    sample = [" ".join(said[1:]) for said in sentences]
    sample += sorted({row[4] for row in qa if row[1] == "trained" and row[0] != "NEVER"})
    if meta["tokenizer"] == "gpt2":
        tokenizer = Tokenizer.gpt2()
    else:
        tokenizer = Tokenizer(train_bpe("\n".join(sample), meta["vocab_size"] - 4))
    tokens = [tokenizer.encode_batch([" " + sentence for sentence in said]) for said in sentences]
    # noise may make a question longer than a row: it cannot be asked then
    qa = [row for row in qa if row[1] in ("trained", "heldout")
          or len(tokenizer.encode_question(row[4])) <= block_size]
    subjects = {}
    for i, (subject, *_) in enumerate(world):
        subjects.setdefault(subject, []).append(i)
    by_subject = list(subjects.values())

    contents = {}
    train = [said[1:] for said in tokens]
    val = [said[:1] for said in tokens]
    for name, part, epochs in (("train.bin", train, EPOCHS[facts]), ("val.bin", val, 4)):
        rows = list(paragraphs(part, by_subject, block_size, epochs, rng))
        flat = [token for row in rows for token in row + [tokenizer.eos]]
        contents[name] = np.array(flat, dtype=np.uint16).tobytes()
        print(f"{name}: {len(flat):,} tokens in {len(rows):,} paragraphs")
    relations = {relation for _, relation, _, _ in world}
    values = {(relation, answer) for _, relation, answer in read_tsv("facts.tsv")
              if relation in relations}
    cloze = [(split, relation, sentence(chosen[0], subject), answer)
             for (subject, relation, answer, split), chosen in zip(world, wordings)]
    tables = {"qa.tsv": qa, "cloze.tsv": cloze, "values.tsv": sorted(values)}
    for name, rows in tables.items():
        contents[name] = "".join("\t".join(row) + "\n" for row in rows).encode()
    contents["tokenizer.json"] = json.dumps(tokenizer.state()).encode()

    for name in FILES:
        write(folder / name, contents[name])
    files = {name: hashlib.sha256(contents[name]).hexdigest() for name in FILES}
    write(folder / "meta.json", json.dumps(meta | dict(files=files)).encode())
    sync_folder(folder)
    count = {split: sum(fact[3] == split for fact in world) for split in ("DEC", "LAT", "TXT")}
    print(f"{len(world)} facts {count}, {len(relations)} relations, {len(qa):,} questions, "
          f"vocabulary {tokenizer.vocab_size:,}")


def main():
    """Command line."""
    # without the usage text an error is one line
    parser = argparse.ArgumentParser(
        description="Render the facts as text, questions and cloze statements.",
        usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--facts", choices=("tiny", "all"), default="tiny", help="which facts")
    add("--vocab_size", type=int, default=2048, help="tokens of the vocabulary, with specials")
    add("--block_size", type=int, default=64, help="longest paragraph in tokens")
    add("--seed", type=int, default=0, help="order of sentences and subjects")
    try:
        print(f"written to {prepare(**vars(parser.parse_args()))}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
