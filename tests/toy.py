"""A world of twelve facts and a model of twenty thousand parameters: whole runs in seconds."""
import os
from pathlib import Path

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
    return dict(score=cfg.seed, process=os.getpid())
