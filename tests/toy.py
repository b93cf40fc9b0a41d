"""What the tests work on: a small random model, and a world of twelve facts for whole runs."""
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import tjepa
import train

# -- a small model and random rows of tokens -------------------------------------------------------
SMALL = dict(vocab_size=60, block_size=32, n_layer=2, n_head=2, n_embd=32, pred_layer=1,
             pred_embd=16, dec_layer=2, answer_size=8, top_k=2)
CFG = tjepa.Config(**SMALL)
# torch 2.5 and 2.6 break a compiled graph at each property of a named tuple, macOS miscompiles
BREAKS_GRAPHS = bool(train.no_graphs())
PAD, EOS, MASK = CFG.pad, CFG.eos, CFG.mask
WORDS = CFG.pad                             # ids below this one are ordinary tokens
WORD_START = torch.arange(CFG.vocab_size) % 3 == 0      # every third token begins a word


def make(kind=tjepa.TJEPA, **changes):
    """A small model of class kind, always with the same weights."""
    torch.manual_seed(0)
    return kind(tjepa.Config(**SMALL | changes), WORD_START)


def rows(n=8, length=32, seed=1, pad=0):
    """Random rows (n, length); row i ends in i * pad padding tokens."""
    torch.manual_seed(seed)
    tokens = torch.randint(WORDS, (n, length))
    for i, row in enumerate(tokens):
        row[length - i * pad:] = PAD
    return tokens


def spans_of(model, tokens):
    """Span numbers of tokens (B, T), always the same."""
    torch.manual_seed(2)
    return tjepa.sample_spans(tokens, model.word_start, model.cfg)


def answers(n=8):
    """Answers (n, 5) of four tokens and EOS."""
    return F.pad(rows(n, 4), (0, 1), value=EOS)


def loss_of(model, phase):
    """The loss of one batch of a phase; what the phase does not train is frozen."""
    tokens = rows()
    answer_latent = torch.randn(8, model.cfg.teacher_width or model.cfg.n_embd)
    for part in model.children():
        part.requires_grad_(part in model.trained_in(phase))
    if phase == "pretrain":
        return model.pretrain_loss(tokens, spans_of(model, tokens))[0]
    if phase == "distill":
        return model.distill_loss(tokens[:, :12], answer_latent)[0]
    with torch.no_grad():
        thought = model.think(tokens)
    return model.speak_loss(thought, answers(), answer_latent, 0.5)[0]


# -- twelve facts in a language of few words: a whole run takes seconds ----------------------------
THINGS = "moss rose lake snow coal plum corn clay rust foam wine sand".split()
COLOURS = "green red blue white black purple yellow brown orange grey crimson beige".split()
PAIRS = [(f"What is the colour of the {thing}?", colour)
         for thing, colour in zip(THINGS, COLOURS)]
SENTENCES = ("The {thing} is {colour}.", "We saw that the {thing} was {colour} again.")

FLAGS = dict(
    block_size=32, vocab_size=400, n_layer=2, n_head=2, n_embd=32, pred_layer=1, pred_embd=16,
    dec_layer=1, top_k=2, answer_size=8, batch_size=8, qa_batch_size=24, pretrain_steps=8,
    distill_steps=100, speak_steps=100, distill_lr=2e-3, speak_lr=5e-3, question_drop=0.0,
    eval_every=50, dtype="fp32")


def write_corpus(folder):
    """text.txt and qa.tsv of the world."""
    once = [sentence.format(thing=thing, colour=colour)
            for thing, colour in zip(THINGS, COLOURS) for sentence in SENTENCES]
    (folder / "text.txt").write_text(" ".join(8 * once))
    lines = [f"{question}\t{answer}\n" for question, answer in PAIRS]
    (folder / "qa.tsv").write_text("".join(lines))


class World(NamedTuple):
    """The toy world on disk, and a run on it through all three phases."""
    folder: Path
    cfg: train.Config
    figures: dict               # what train.run returned


def config(folder, out, **changes):
    """The Config of a run in `out`, on the text and the pairs in `folder`."""
    paths = dict(data=str(folder / "text.txt"), qa=str(folder / "qa.tsv"), out=str(out))
    return train.Config(**FLAGS | paths | changes)


def as_argv(flags):
    """A dict of flags as a command line."""
    return [f"--{name}={value}" for name, value in flags.items()]


def weights(out):
    """The weights in the checkpoint of a run."""
    return train.load_checkpoint(out)["model"]


def random_vectors(path, width=20):
    """An .npz with a random vector for each answer of the world."""
    vectors = np.random.default_rng(0).normal(size=(len(PAIRS), width))
    np.savez(path, answers=COLOURS, vectors=vectors)
    return str(path)


def measure(cfg):
    """An arm of a lab that trains nothing, and fails without SIGReg.

    It stands at the top of a module, because other processes import it.
    """
    if cfg.sigreg == 0:
        raise ValueError("no")
    Path(cfg.out).mkdir(parents=True)
    return dict(score=cfg.seed, process=os.getpid(), threads=torch.get_num_threads())


# -- regular expressions and their descriptions ----------------------------------------------------
# Descriptions of one length do not end in one step.
FIRST = (("a dog", "dog"), ("a number", "[0-9]"), ("a vowel, twice", "[aeiou]{2,}"))
SECOND = (("a truck", "truck"), ("a letter", "[A-Z]"), ("anything", "."))
RELATIONS = (("or", "|"), ("and", "&"), ("before", ".*.*"))
REGEXES = [(f"lines with {a} {how} {b}", f"({x}){sign}({y})")
           for how, sign in RELATIONS for a, x in FIRST for b, y in SECOND]


def write_regexes(folder):
    """The files of data/nlrx: REGEXES to learn from, and three test pairs, the first a leak."""
    test = [REGEXES[0], ("lines with neither", "."), ("lines with both", "(dog)&(truck)")]
    for part, pairs in dict(train=REGEXES, test=test).items():
        views = [(text, f"people: {text}", regex) for text, regex in pairs]
        for name, table in dict(synth=pairs, views=views).items():
            lines = ["\t".join(row) + "\n" for row in table]
            (folder / f"{name}_{part}.tsv").write_text("".join(lines))
