"""
Teachers of phase 2: answer latents from elsewhere, each as the .npz that --teacher takes.

    python -m labs.teachers --teacher=gpt --run=out/tjepa --out=gpt.npz
    python train.py --phase=distill --teacher=gpt.npz --out=out/tjepa       and then --phase=speak

gpt      a GPT as large as the encoder reads the same rows of text as phase 1 of the run; the mean
         of the answer's last hidden states (v1.1 section 3.3)
letters  counts of groups of three letters: spelling, with another notion of what is similar
random   random numbers, always the same for an answer: the control
"""
import dataclasses
import tempfile
import zlib
from functools import partial

import numpy as np

import data
import train
from labs import arms
from labs.controls import read_gpt
from labs.measures import features

@dataclasses.dataclass
class Flags:
    """What to write."""
    teacher: str = "gpt"        # gpt | letters | random
    run: str = "out/tjepa"      # folder of the run to teach: its answers, and for gpt its text
    out: str = "gpt.npz"        # file to write

def save(path, answers, vectors):
    """Write vectors (A, D) of A answers, as `data.read_vectors` reads them."""
    np.savez(path, answers=answers, vectors=vectors)

def own_vectors(run, answers):
    """The latent that a run's model gives to each answer, read alone: (A, C)."""
    tokens = data.pack_answers(run.corpus.tokenizer, answers, run.cfg.block_size, "--block_size")
    return features(run.model, tokens.to(run.device)).cpu().numpy()

def letters(answers, width=300):
    """Groups of three letters, counted, hashed, projected at random; length 1: (A, D)."""
    counts = np.zeros((len(answers), 4096))
    for row, answer in zip(counts, answers):
        text = f"  {answer.lower()}  "
        for i in range(len(text) - 2):
            row[zlib.crc32(text[i:i + 3].encode()) % len(row)] += 1
    vectors = counts @ np.random.default_rng(0).standard_normal((counts.shape[1], width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

def random(answers, width=128):
    """Random numbers: (A, D)."""
    return np.random.default_rng(0).standard_normal((len(answers), width))

def gpt(cfg, corpus, answers):
    """The mean last hidden state of a GPT that has read the text, for each answer: (A, C)."""
    # the log of the GPT has no place in the folder of the run
    with tempfile.TemporaryDirectory() as out:
        return own_vectors(read_gpt(dataclasses.replace(cfg, out=out), corpus), answers)

def teachers(flags):
    """Write the file. ValueError for flags that cannot be, OSError if the disk refuses."""
    if flags.teacher not in ("gpt", "letters", "random"):
        raise ValueError(f"--teacher={flags.teacher} must be one of gpt, letters, random")
    if not flags.out.endswith(".npz"):
        raise ValueError(f"--out={flags.out} must end in .npz: it is read by that name")
    checkpoint = train.load_checkpoint(flags.run, "--run=")
    cfg = train.Config(**checkpoint["config"])
    corpus = data.load(cfg, data.Tokenizer.from_state(checkpoint["tokenizer"]))
    answers = sorted({row.answer for row in corpus.qa if row.split != "NEVER"})
    if not answers:
        raise ValueError(
            f"--run={flags.run} has no questions: run `python train.py --phase=distill --qa=FILE "
            f"--out={flags.run}` once, so that it knows its answers")
    kinds = dict(gpt=partial(gpt, cfg, corpus), letters=letters, random=random)
    vectors = kinds[flags.teacher](answers)
    save(flags.out, answers, vectors)
    print(f"{flags.out}: {len(vectors)} answers, {vectors.shape[1]} numbers each; next: "
          f"python train.py --phase=distill --teacher={flags.out} --out={flags.run}")

main = partial(arms.main, teachers, Flags)

if __name__ == "__main__":
    main()
