"""A world of twelve facts, one of 27 regexes, a model of twenty thousand parameters: whole runs in seconds."""
import os
from pathlib import Path

import torch

PAIRS = [(f"What is the colour of the {thing}?", colour) for thing, colour in zip(
    "moss rose lake snow coal plum corn clay rust foam wine sand".split(),
    "green red blue white black purple yellow brown orange grey crimson beige".split())]

FLAGS = dict(block_size=32, vocab_size=400, n_layer=2, n_head=2, n_embd=32, pred_layer=1, pred_embd=16, dec_layer=1,
             top_k=2, answer_size=8, batch_size=8, qa_batch_size=24, pretrain_steps=8, distill_steps=100, speak_steps=100,
             distill_lr=2e-3, speak_lr=5e-3, question_drop=0.0, eval_every=50, dtype="fp32")


def write_corpus(folder):
    """text.txt and qa.tsv of the world."""
    facts = [(question[len("What is the colour of the "):-1], colour) for question, colour in PAIRS]
    lines = [sentence.format(thing=thing, colour=colour) for i in range(8) for thing, colour in facts
             for sentence in ("The {thing} is {colour}.", "We saw that the {thing} was {colour} again.")]
    (folder / "text.txt").write_text(" ".join(lines))
    (folder / "qa.tsv").write_text("".join(f"{question}\t{answer}\n" for question, answer in PAIRS))


def measure(cfg):
    """An arm of a lab that trains nothing, and fails without SIGReg. At the top of a module: other processes find it."""
    if cfg.sigreg == 0:
        raise ValueError("no")
    Path(cfg.out).mkdir(parents=True)
    return dict(score=cfg.seed, process=os.getpid(), threads=torch.get_num_threads())


# descriptions of one length do not end in one step
REGEXES = [(f"lines with {a} {how} {b}", f"({x}){sign}({y})")
           for how, sign in (("or", "|"), ("and", "&"), ("before", ".*.*"))
           for a, x in (("a dog", "dog"), ("a number", "[0-9]"), ("a vowel, twice", "[aeiou]{2,}"))
           for b, y in (("a truck", "truck"), ("a letter", "[A-Z]"), ("anything", "."))]


def write_regexes(folder):
    """The files of data/nlrx: REGEXES to learn from, and three test pairs, the first of which is a leak."""
    test = [REGEXES[0], ("lines with neither", "."), ("lines with both", "(dog)&(truck)")]
    for part, pairs in dict(train=REGEXES, test=test).items():
        for name, rows in dict(synth=pairs, views=[(text, f"people: {text}", regex) for text, regex in pairs]).items():
            (folder / f"{name}_{part}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
