"""
A text of one's own: does a run learn its words, and can it say what is hidden?

    python data/shakespeare/prepare.py          tiny Shakespeare, 1 MB
    python -m labs.text --seeds=1               all arms; about 40 minutes of a core
    python -m labs.text --fast                  a minute of a core: does it run?

Expected before the first run: after as many tokens the masked LM and the token head of the default
find the hidden word equally often, energy with word frequency finds it less often, latents alone
are at the word frequencies. Spoken gaps of the default are behind the greedy filling of the masked
LM, which is told how many tokens are hidden.

All arms read the same rows with the same learning rate, the one that `train.py --data=FILE` takes
for 1 MB. The masked LM has no predictor and no latents, and fills a gap greedily, all of its tokens
at once.
"""
import dataclasses
from pathlib import Path

import torch

import evaluate
import train
from labs.arms import Flags, chosen, in_short, main, run_arms
from labs.controls import MASKED_LM
from labs.runs import Arm, open_run, train_arm
from labs.tables import table

DATA = "data/shakespeare/input.txt"

def settings(n_characters):
    """What `train.py --data=FILE` takes for so many characters of prose in the Latin script."""
    sizes = next(row[1:] for row in train.TEXT_SIZES if n_characters <= row[0])
    names = ("vocab_size", "pretrain_steps", "speak_steps")
    return train.TEXT | dict(zip(names, sizes)) | dict(eval_every=10 ** 9, data=DATA)

SHAKESPEARE = settings(1_115_394)
ARMS = {
    "default": Arm(**SHAKESPEARE),
    "latents alone": Arm(**SHAKESPEARE | train.LATENT),
    "masked LM": Arm(**SHAKESPEARE | MASKED_LM | dict(phase="pretrain")),
    "random encoder": Arm(**SHAKESPEARE | dict(pretrain_steps=0)),
}
COLUMNS = {
    "hit@5, energy": "word_energy_hit5", "energy + frequency": "word_prior_hit5",
    "token head": "word_head_hit5", "frequency alone": "word_unigram_hit5",
    "gaps: exact match": "gap_em", "gaps: token F1": "gap_f1",
}

def greedy_fill(run, rows=512):
    """Exact match and token F1 of a masked LM on the gaps that `evaluate.spoken_gaps` asks for.

    It is told how many tokens are hidden, and takes the likeliest at each place, all at once.
    """
    torch.manual_seed(0)
    gaps = evaluate.draw_gaps(run, run.corpus.val, rows, longest=3, alone=True)
    pad = run.model.cfg.pad
    n = (gaps.words < pad).sum(1, keepdim=True)                         # (n, 1)
    place = torch.arange(gaps.text.size(1), device=run.device) - gaps.begin[:, None]    # (n, T)
    hidden = (place >= 0) & (place < n)
    span_ids = torch.where(hidden, 0, run.model.cfg.max_spans)
    with torch.no_grad():
        p = run.model.predict(gaps.text, span_ids, n_removed=3)
        said = run.model.word_logits(p)[..., :pad].argmax(-1)           # (n, 3)
    pairs = [(row[:k], words[:k]) for row, words, k in
             zip(said.tolist(), gaps.words.tolist(), n[:, 0].tolist())]
    return dict(gap_em=sum(a == b for a, b in pairs) / len(pairs),
                gap_f1=sum(evaluate.token_f1(a, b) for a, b in pairs) / len(pairs))

def measure(cfg):
    """Train an arm: its figures of hidden words and spoken gaps."""
    found = train_arm(cfg)
    figures = {name: value for name, value in found.items()
               if name.startswith(("word_", "gap_", "rank", "val_r2", "health"))}
    if cfg.variant == "MaskedLM":       # it has no latents to speak of
        figures = {name: value for name, value in figures.items()
                   if name.startswith(("word_head", "word_unigram", "word_choices"))}
        figures |= greedy_fill(open_run(cfg))
    return figures

def text(flags):
    """Run the arms and print the table."""
    chosen(flags, ARMS)
    arms = ARMS
    if not Path(DATA).is_file():
        raise ValueError(f"{DATA} is missing: run `python data/shakespeare/prepare.py` first")
    if flags.fast:
        print("labs.text --fast: a minute of a core; its figures mean nothing")
        flags = dataclasses.replace(flags, seeds=1, redo=True)
        arms = {name: in_short(cfg) for name, cfg in ARMS.items()}
    rows = run_arms("text", arms, flags, measure)
    print(table(rows, list(ARMS), COLUMNS))

if __name__ == "__main__":
    main(text, Flags)
