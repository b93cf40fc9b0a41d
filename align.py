"""
Large teaches small (T-JEPA v2.0, section 4): a trained T-JEPA shows another one what it makes of text. Phase 2, with
--distill=align; train.py does the rest.

Both read the same unlabelled text, and the same questions of phase 2, without answers. The student is pulled to
    tokens   the teacher's latents of the text, token by token
    pooled   their mean over a text
    thought  what the teacher thinks at a question: so that the student answers too, in the teacher's space
    guess    what the teacher thinks would follow a text
Each is MSE over the variance of its target, 1 - R2: so they need no weights. The answers keep the latents that the
teacher was taught, and the decoder of the student learns to say them in phase 3. Text may come first and thoughts in a
second phase 2: between the two R@1 means nothing.
"""
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import evaluate
import tjepa

PARTS = ("tokens", "pooled", "thought", "guess")


def pool(latents, real):
    """Mean over the tokens that are real: (B, T, C), (B, T) -> (B, C)."""
    return tjepa.masked_mean(latents, real[..., None], 1)

def axes(latents, real, width, parts):
    """How a teacher's latents (B, T, C), real (B, T), are brought to a student's width: (mean (C,), matrix (C, width)).
    Standardised, then turned to their widest directions (PCA), of the tokens and of the texts as parts asks for them. A
    map that is learned could stretch the student's space into the teacher's: their shapes need not be alike then."""
    tokens = latents[real]                                                              # (n, C)
    mean, std = tokens.mean(0), tokens.std(0).clamp(min=1e-3)
    views = dict(tokens=(tokens - mean) / std, pooled=(pool(latents, real) - mean) / std)
    spread = [torch.cov(views[part].T.cpu().double()) for part in views if part in parts]           # (C, C) each
    widest = torch.linalg.eigh(sum(cov / cov.trace() for cov in spread)).eigenvectors.flip(1)[:, :width]
    # a direction has two ends: always take the same, or a resumed run could go on with another
    widest = widest * widest.gather(0, widest.abs().argmax(0, keepdim=True)).sign()
    widest = widest.to(mean)
    # the student's latents are layer-normed, of size 1 a dimension: so are the targets
    return mean, widest / std[:, None] / (views["tokens"] @ widest).square().mean().sqrt()


class Teacher(NamedTuple):
    """Who is imitated, and how it reads."""
    model: tjepa.TJEPA          # anything with encode (B, T) -> (B, T, C) and cfg; think for thoughts
    tokenizer: data.Tokenizer
    vectors: torch.Tensor       # (A, D) the latents that it was taught for the student's answers

    def read(self, tokens, tokenizer):
        """The same text in the teacher's tokens: ids (B, T) of a tokenizer -> (B, T'). What its block_size cannot hold
        is left out: the end of a text, where its tokens are the shorter ones."""
        if tokenizer.ranks == self.tokenizer.ranks:
            return tokens
        texts = self.tokenizer.encode_batch([tokenizer.decode(row) for row in tokens.tolist()])
        rows = [torch.tensor(text[:self.model.cfg.block_size]) for text in texts]
        return pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad).to(tokens.device)

    def checked(self, cfg, tokenizer):
        """This teacher; ValueError where a student with this tokenizer can't imitate it as its cfg asks."""
        if "tokens" in cfg.align.split("+") and self.tokenizer.ranks != tokenizer.ranks:
            raise ValueError(f"--align={cfg.align}: the teacher has another tokenizer, no tokens can be compared: take "
                             "--align=pooled+thought")
        if cfg.block_size > self.model.cfg.block_size:
            raise ValueError(f"--block_size={cfg.block_size} is longer than the teacher reads: begin the student in "
                             f"another --out, with --block_size={self.model.cfg.block_size}")
        return self

    def align(self, run, questions, table):
        """Phase 2 of v2.0: (loss_at, measure), as `train.distill`."""
        cfg, model, parts, theirs = run.cfg, run.model, run.cfg.align.split("+"), run.corpus.tokenizer
        large = self.model.to(run.device).requires_grad_(False)
        taught, quick = questions.where("DEC", "LAT", phrasing="trained"), questions.only("heldout")
        shown = [part for part in parts if part in ("tokens", "pooled")]

        def thoughts(tokens):
            """What the teacher thinks at some texts (n, T) of the student's tokens, in the units of `table`: (n, D)."""
            latent = evaluate.think_all(run._replace(model=large), self.read(tokens, theirs)).latent
            return evaluate.standardise(model, latent)

        @torch.no_grad()
        def latents(rows):
            """What the teacher makes of rows of text (B, T): its latents (B, T', C), and which are real (B, T')."""
            seen = self.read(rows, theirs)
            return large.encode(seen).float(), seen != large.cfg.pad
        if shown:
            torch.manual_seed(0)        # the same rows when a run is resumed
            mean, turn = axes(*latents(run.corpus.train.batch(512).to(run.device)), model.cfg.n_embd, shown)
        known = thoughts(questions.tokens[taught]) if "thought" in parts else None          # (n, D), once: they stay
        draw = questions.drawing(taught, cfg.qa_batch_size // cfg.accum)

        def loss_at(progress):
            """Rows of text and questions that are taught, drawn anew."""
            rows = run.corpus.train.batch(cfg.batch_size // cfg.accum).to(run.device, non_blocking=True)    # (B, T)
            which, asked = draw()
            pairs = {}      # part -> what the student makes of it, and what the teacher does, (..., width) both
            if shown:
                (target, heard), real = latents(rows), rows != model.cfg.pad
                target = (target - mean) @ turn                                             # (B, T', width)
                mine = model.encode(rows, online=True).float()[..., :target.size(-1)]       # (B, T, width)
                pairs["tokens"], pairs["pooled"] = (mine, target), (pool(mine, real), pool(target, heard))
            if "thought" in parts:
                pairs["thought"] = model.think(asked, cfg.question_drop).latent, known[which]
            if "guess" in parts:
                pairs["guess"] = model.think(rows).latent, thoughts(rows)
            fits = []                                                                       # R2 of each part
            for part in parts:
                mine, target = (side.float().flatten(0, -2) for side in pairs[part])        # (n, width)
                weight = real.flatten() if part == "tokens" else torch.ones_like(target[:, 0])
                fits.append(tjepa.r_squared(mine, target, weight))
            r2 = sum(fits) / len(fits)
            return 1 - r2, dict(latent=1 - r2.detach(), r2=r2.detach())
        return loss_at, lambda whole: evaluate.recall(run, questions if whole else quick, table)
