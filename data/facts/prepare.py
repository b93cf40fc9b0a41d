"""
Render the facts as text, train the tokenizer, write memmaps, question-answer splits and cloze statements.

    python data/facts/prepare.py --facts=tiny      # about 300 facts, what `python train.py` uses (it calls this by itself)
    python data/facts/prepare.py --facts=all       # every fact of facts.tsv

A fact is (subject, relation, answer) and belongs to one split, for good:
    DEC    in the text, taught in latent space, taught as tokens           the ordinary case
    LAT    in the text, taught in latent space, never taught as tokens     can it be spoken?
    TXT    in the text, never taught                                       does reading alone reach speech?
    NEVER  nowhere: its subject is invented                                the right answer is "I don't know"
Each fact keeps one wording of its statement out of the training text: it becomes held-out text and the cloze.
"""
import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))        # so that it also runs as a plain script
from data.tokenizer import Tokenizer, train_bpe  # noqa: E402

WORDINGS = 8        # statements of a relation that are used: with 13 the same facts took twice as many steps to learn
# how many facts of each relation make the tiny world: the most famous ones, which stand first in facts.tsv
TINY = dict(capital=40, continent=40, currency=40, language=30, author=40, painter=25, inventor=25, composer=20,
            symbol=25, landmark_city=20)
EPOCHS = dict(tiny=12, all=6)       # how often each sentence is written, each time in other company
ABSTAIN = "I don't know"


def read_tsv(name):
    """Rows of a .tsv beside this file, as lists of fields; lines that start with # are its header."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]

def fingerprint(facts, vocab_size, block_size, seed, tokenizer):
    """What the written files depend on; they are written anew when it changes."""
    sources = b"".join((HERE / name).read_bytes()
                       for name in ("facts.tsv", "templates.tsv", "invented.tsv", "prepare.py"))
    return dict(facts=facts, vocab_size=vocab_size, block_size=block_size, seed=seed, tokenizer=tokenizer,
                sources=hashlib.sha256(sources).hexdigest()[:16])

def split_of(subject, relation):
    """DEC, LAT or TXT (2 : 1 : 1), a function of the fact alone: no seed can move a fact to an easier split."""
    if (subject, relation) == ("Sapiens", "author"):
        return "DEC"                # the README asks for it by name
    return ("DEC", "DEC", "LAT", "TXT")[hashlib.sha256(f"{relation}|{subject}".encode()).digest()[0] % 4]

def sentence(template, subject, answer="{a}"):
    """Fill a template and begin it with a capital letter."""
    text = template.replace("{s}", subject).replace("{a}", answer)
    return text[0].upper() + text[1:]

def select(which):
    """The facts of a preset: a list of (subject, relation, answer, split)."""
    facts, seen = [], {}
    for subject, relation, answer in read_tsv("facts.tsv"):
        seen[relation] = seen.get(relation, 0) + 1
        if which == "all" or seen[relation] <= TINY.get(relation, 0):
            facts.append((subject, relation, answer, split_of(subject, relation)))
    return facts

def questions(facts, templates):
    """Rows of qa.tsv: split, phrasing, relation, subject, question, answer."""
    relations = {relation for _, relation, _, _ in facts}
    asked = facts + [(s, r, ABSTAIN, "NEVER") for s, r in read_tsv("invented.tsv") if r in relations]
    return [(split, phrasing, relation, subject, sentence(template, subject), answer)
            for subject, relation, answer, split in asked
            for phrasing, kind in (("trained", "question"), ("heldout", "heldout"))
            for template in templates[relation, kind]]

def paragraphs(tokens, by_subject, block_size, epochs, rng):
    """Yield rows of at most block_size tokens: subjects in random order, what is said of one subject stays together.

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
    """Write bytes to a temporary name, then rename: a killed run leaves no half file behind."""
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    partial.replace(path)


def prepare(facts="tiny", vocab_size=2048, block_size=64, seed=0, tokenizer="bpe"):
    """Write one world, unless it is there already, into data/facts/<facts>/ and return that folder.

    train.bin, val.bin   uint16 tokens, each paragraph ended by EOS; val holds wordings that its facts never had in train
    tokenizer.json       its ranks and pattern
    qa.tsv               split, phrasing, relation, subject, question, answer
    cloze.tsv            split, relation, statement with {a} for the answer, answer
    values.tsv           relation, answer: all the values that a relation takes in facts.tsv, those of other presets too
    """
    out, meta = HERE / facts, fingerprint(facts, vocab_size, block_size, seed, tokenizer)
    if (out / "meta.json").exists() and json.loads((out / "meta.json").read_text()) == meta:
        return out
    rng, world, templates = random.Random(seed), select(facts), {}
    for relation, kind, template in read_tsv("templates.tsv"):
        templates.setdefault((relation, kind), []).append(template)
    wordings = [rng.sample(templates[r, "statement"][:WORDINGS], WORDINGS) for _, r, _, _ in world]
    sentences = [[sentence(t, s, a) for t in ts] for (s, _, a, _), ts in zip(world, wordings)]
    qa = questions(world, templates)

    # the tokenizer sees the sentences of the text and the questions, so that both are cut into the same words
    sample = [" ".join(said[1:]) for said in sentences] + sorted({row[4] for row in qa})
    tokenizer = Tokenizer.gpt2() if tokenizer == "gpt2" else Tokenizer(train_bpe("\n".join(sample), vocab_size - 4))
    tokens = [tokenizer.encode_batch([" " + sentence for sentence in said]) for said in sentences]
    subjects = {}
    for i, (subject, *_) in enumerate(world):
        subjects.setdefault(subject, []).append(i)
    by_subject = list(subjects.values())

    out.mkdir(exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)     # of another vocabulary, say: from here on the files do not fit it
    for name, part, epochs in ("train", [said[1:] for said in tokens], EPOCHS[facts]), ("val", [said[:1] for said in tokens], 4):
        rows = list(paragraphs(part, by_subject, block_size, epochs, rng))
        flat = [token for row in rows for token in row + [tokenizer.eos]]
        write(out / f"{name}.bin", np.array(flat, dtype=np.uint16).tobytes())
        meta_line = f"{name}.bin: {len(flat):,} tokens in {len(rows):,} paragraphs"
        print(meta_line)
    values = sorted({(r, a) for s, r, a in read_tsv("facts.tsv") if r in {fact[1] for fact in world}})
    cloze = [(split, r, sentence(ts[0], s), a) for (s, r, a, split), ts in zip(world, wordings)]
    for name, rows in ("qa.tsv", qa), ("cloze.tsv", cloze), ("values.tsv", values):
        write(out / name, "".join("\t".join(row) + "\n" for row in rows).encode())
    write(out / "tokenizer.json", json.dumps(tokenizer.state()).encode())
    write(out / "meta.json", json.dumps(meta).encode())     # last: its presence says that the rest is complete
    count = {split: sum(fact[3] == split for fact in world) for split in ("DEC", "LAT", "TXT")}
    print(f"{len(world)} facts {count}, {len({r for _, r, _, _ in world})} relations, {len(qa):,} questions, "
          f"vocabulary {tokenizer.vocab_size:,}")
    return out


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description="Render the facts as text, questions and cloze statements.")
    parser.add_argument("--facts", choices=("tiny", "all"), default="tiny", help="which facts")
    parser.add_argument("--vocab_size", type=int, default=2048, help="tokens of the vocabulary, specials included")
    parser.add_argument("--block_size", type=int, default=64, help="longest paragraph in tokens")
    parser.add_argument("--seed", type=int, default=0, help="order of sentences and subjects")
    try:
        print(f"written to {prepare(**vars(parser.parse_args()))}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
