"""
Who says what an answer's latent is? Teachers for phase 2, each written as the .npz that train.py takes.

    python -m labs.teachers --teacher=gpt --run=out/tjepa --out=gpt.npz     a GPT that has read the text of that run
    python train.py --phase=distill --teacher=gpt.npz --out=out/tjepa       then phase 2 with it, and --phase=speak

gpt      as large as the encoder, trained on the same rows of text as phase 1 of the run: as many steps, the same
         learning rate. A latent is the mean of its last hidden states over the answer's tokens (v1.1 section 3.3).
letters  knows nothing of the text: which groups of three letters an answer is spelled with, drawn together to 300
         numbers. It stands for a model from outside: another width, and its own idea of what is alike.
random   numbers by chance, the same for an answer each time: a code without any meaning, the control.
"""
import dataclasses
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

import data
import evaluate
import train
from flags import read_flags
from labs.controls import Reader
from labs.measures import features


@dataclasses.dataclass
class Flags:
    """What to write."""
    teacher: str = "gpt"        # gpt | letters | random
    run: str = "out/tjepa"      # folder of the run that is to be taught: its answers, and for gpt its text and steps
    out: str = "gpt.npz"        # file to write


def save(path, answers, vectors):
    """Vectors (A, D) of A answers, as `data.read_vectors` wants them."""
    np.savez(path, answers=answers, vectors=vectors)

def read_gpt(cfg, corpus):
    """A `train.Run` whose model is a GPT that has read the rows of phase 1, of cfg's width and depth."""
    device, dtype = train.pick_device(cfg)
    torch.manual_seed(cfg.seed)
    model = Reader(dataclasses.replace(cfg, vocab_size=corpus.tokenizer.vocab_size)).to(device)
    run = train.Run(cfg, model, corpus, device, dtype)

    def loss_at(progress):
        """Rows of text: the draws of phase 1, which follow from the seed and the step."""
        return model.pretrain_loss(corpus.train.batch(cfg.batch_size // cfg.accum).to(device))
    fit(run, "pretrain", loss_at)
    return run

def fit(run, phase, loss_at):
    """`train.fit` without checkpoints and pictures; what it trains is measured afterwards."""
    Path(run.cfg.out).mkdir(parents=True, exist_ok=True)
    log = evaluate.Log(run.cfg.out, [])
    train.fit(run, phase, loss_at, lambda whole: {}, log, lambda step, optimizer: None)

def gpt_vectors(run, answers):
    """What a GPT makes of each answer by itself: (A, C)."""
    tokens = data.pack_answers(run.corpus.tokenizer, answers, run.cfg.block_size, "--block_size").to(run.device)
    return features(run.model, tokens).cpu().numpy()

def letters(answers, width=300):
    """Spelling: counts of groups of three letters, hashed, then projected at random and brought to length 1: (A, D)."""
    counts = np.zeros((len(answers), 4096))
    for row, answer in zip(counts, answers):
        text = f"  {answer.lower()}  "
        for i in range(len(text) - 2):
            row[zlib.crc32(text[i:i + 3].encode()) % len(row)] += 1
    vectors = counts @ np.random.default_rng(0).standard_normal((counts.shape[1], width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

def random(answers, width=128):
    """Numbers by chance: (A, D)."""
    return np.random.default_rng(0).standard_normal((len(answers), width))

def main(argv=None):
    """Command line: bad input is one line and exit code 2."""
    try:
        flags = Flags(**read_flags(Flags, argv, "labs.teachers"))
        if flags.teacher not in ("gpt", "letters", "random"):
            raise ValueError(f"--teacher={flags.teacher} must be one of gpt, letters, random")
        if not flags.out.endswith(".npz"):
            raise ValueError(f"--out={flags.out} must end in .npz: it is read by that name")
        checkpoint = train.load_checkpoint(flags.run, "--run=")
        cfg = train.Config(**checkpoint["config"])
        corpus = data.load(cfg, data.Tokenizer.from_state(checkpoint["tokenizer"]))
        answers = sorted({row.answer for row in corpus.qa if row.split != "NEVER"})
        if not answers:
            raise ValueError(f"--run={flags.run} has no questions: run `python train.py --phase=distill --qa=FILE "
                             f"--out={flags.run}` once, so that it knows its answers")
        with tempfile.TemporaryDirectory() as out:      # the log of the GPT has no place in the folder of the run
            make = dict(letters=letters, random=random,
                        gpt=lambda answers: gpt_vectors(read_gpt(dataclasses.replace(cfg, out=out), corpus), answers))
            vectors = make[flags.teacher](answers)
        save(flags.out, answers, vectors)
        print(f"{flags.out}: {len(vectors)} answers, {vectors.shape[1]} numbers each; next: "
              f"python train.py --phase=distill --teacher={flags.out} --out={flags.run}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
