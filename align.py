"""
Large teaches small (T-JEPA v2.0, section 4): a student imitates a trained T-JEPA. This is phase 2
with --distill=align; train.py does the rest.

Teacher and student read the same unlabelled text, and the questions of phase 2 without answers.
The student is trained to match
    tokens   the teacher's latents of the text, token by token
    pooled   their mean over a text
    thought  the teacher's thought of a question: the student then answers in the teacher's space
    guess    the teacher's thought of what follows a text
Each loss is MSE / variance of its target = 1 - R2, so that no weights are needed. The answers keep
the latents that the teacher was taught, and the student's decoder learns to say them in phase 3.
Text may be imitated first and thoughts in a second phase 2: ignore R@1 until the second has ended.
"""
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import evaluate
import tjepa

PARTS = ("tokens", "pooled", "thought", "guess")

def known_parts(text):
    """Does text name some of PARTS, joined by +, each once?"""
    parts = text.split("+")
    return len(set(parts)) == len(parts) and set(parts) <= set(PARTS)

class Teacher(NamedTuple):
    """The run that is imitated."""
    model: tjepa.TJEPA          # or another model with encode, cfg and, for thoughts, think
    tokenizer: data.Tokenizer
    vectors: torch.Tensor       # (A, D) its latents of the student's answers

    def read(self, tokens, tokenizer):
        """A text in the teacher's tokens: ids (B, T) of `tokenizer` -> (B, T').

        What exceeds the teacher's block_size is cut off at the end.
        """
        if tokenizer.ranks == self.tokenizer.ranks:
            return tokens
        texts = [tokenizer.decode(row) for row in tokens.tolist()]
        ids = self.tokenizer.encode_batch(texts)
        rows = [torch.tensor(row[:self.model.cfg.block_size]) for row in ids]
        padded = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad)
        return padded.to(tokens.device)

    def checked(self, cfg, tokenizer):
        """This teacher; ValueError if a student with this cfg and tokenizer can't imitate it."""
        if "tokens" in cfg.align.split("+") and self.tokenizer.ranks != tokenizer.ranks:
            raise ValueError(
                f"--align={cfg.align}: the teacher has another tokenizer, no tokens can be "
                "compared: take --align=pooled+thought")
        if cfg.block_size > self.model.cfg.block_size:
            raise ValueError(
                f"--block_size={cfg.block_size} is longer than the teacher reads: begin the "
                f"student in another --out, with --block_size={self.model.cfg.block_size}")
        return self

def pool(latents, mask):
    """Mean over the tokens in mask: (B, T, C), (B, T) -> (B, C)."""
    return tjepa.masked_mean(latents, mask[..., None], 1)

def fit_axes(latents, mask, width, parts):
    """Bring a teacher's latents (B, T, C) to a student's width: (mean (C,), matrix (C, width)).

    They are standardised and rotated to their widest directions (PCA of the tokens, the texts or
    both, as parts names). A learned map could stretch the student's space into the teacher's;
    then their shapes need not agree.
    """
    tokens = latents[mask]                                              # (n, C)
    mean = tokens.mean(0)
    std = tokens.std(0).clamp(min=1e-3)
    views = dict(tokens=(tokens - mean) / std, pooled=(pool(latents, mask) - mean) / std)
    covariances = [torch.cov(views[part].T.cpu().double()) for part in views if part in parts]
    total = sum(cov / cov.trace() for cov in covariances)               # (C, C)
    axes = torch.linalg.eigh(total).eigenvectors.flip(1)[:, :width]     # widest first
    # The sign of an axis is arbitrary: fix it, or a resumed run could continue with another one.
    largest = axes.abs().argmax(0, keepdim=True)
    axes = (axes * axes.gather(0, largest).sign()).to(mean)
    # The student's latents are layer-normed, of size 1 a dimension: scale the targets alike.
    size = (views["tokens"] @ axes).square().mean().sqrt()
    return mean, axes / std[:, None] / size

def teacher_thoughts(run, tokens):
    """The teacher's thoughts of texts (n, T) in the student's tokens, scaled as L_a: (n, D)."""
    teacher = run.teacher
    seen = teacher.read(tokens, run.corpus.tokenizer)
    latent = evaluate.think_all(run._replace(model=teacher.model), seen).latent
    return run.model.standardise(latent)

@torch.no_grad()
def teacher_latents(run, tokens):
    """The teacher's latents of texts (B, T) in the student's tokens: (B, T', C), mask (B, T')."""
    teacher = run.teacher
    seen = teacher.read(tokens, run.corpus.tokenizer)
    return teacher.model.encode(seen).float(), seen != teacher.model.cfg.pad

def align(run):
    """Phase 2 of v2.0: (loss_at, measure), like `train.distill`."""
    cfg, model, questions = run.cfg, run.model, run.questions
    parts = cfg.align.split("+")
    reads_text = "tokens" in parts or "pooled" in parts
    run.teacher.model.to(run.device).requires_grad_(False)
    taught = questions.where("DEC", "LAT", phrasing="trained")
    held_out = questions.only(*data.QUICK)
    if reads_text:
        torch.manual_seed(0)            # the same rows when a run is resumed
        rows = run.corpus.train.batch(512).to(run.device)
        mean, axes = fit_axes(*teacher_latents(run, rows), model.cfg.n_embd, parts)
    if "thought" in parts:              # computed once: the teacher stands still
        thoughts = teacher_thoughts(run, questions.tokens[taught])      # (n, D)
    draw_questions = questions.drawing(taught, cfg.qa_batch_size)

    def draw():
        """Random rows of text (B, T), and random questions: their numbers (n,) and tokens."""
        rows = run.corpus.train.batch(cfg.batch_size).to(run.device, non_blocking=True)
        return rows, *draw_questions()
    batches = run.in_parts(draw)

    def loss_at(progress):
        """Mean of 1 - R2 over the parts, on random rows of text and random questions."""
        rows, which, asked = next(batches)
        pairs = {}                      # part -> (student's latents, teacher's), (..., width) each
        if reads_text:
            target, target_mask = teacher_latents(run, rows)
            target = (target - mean) @ axes                             # (B, T', width)
            mine = model.encode(rows, model.context_encoder).float()    # (B, T, C)
            mine = mine[..., :target.size(-1)]
            mask = rows != model.cfg.pad
            pairs["tokens"] = mine, target
            pairs["pooled"] = pool(mine, mask), pool(target, target_mask)
        if "thought" in parts:
            pairs["thought"] = model.think(asked, cfg.question_drop).latent, thoughts[which]
        if "guess" in parts:
            pairs["guess"] = model.think(rows).latent, teacher_thoughts(run, rows)
        fits = []
        for part in parts:
            mine, target = (side.float().flatten(0, -2) for side in pairs[part])    # (n, width)
            counts = mask.flatten() if part == "tokens" else torch.ones_like(target[:, 0])
            fits.append(tjepa.r_squared(mine, target, counts))
        r2 = sum(fits) / len(fits)
        return 1 - r2, dict(latent=1 - r2.detach())

    def measure(whole):
        """Figures of the thoughts, as in `train.distill`."""
        return evaluate.recall(run, questions.fewer() if whole else held_out, run.concepts)
    return loss_at, measure
