"""
Large teaches small (T-JEPA v2.0, section 4): what does the student keep, and is the teacher needed?

    python -m labs.distillation             4 to 9 minutes of a core a run; equal compute: hours
    python -m labs.distillation --fast      half a minute on one core: does it run?

Students have a quarter (medium) or a sixteenth (small) of the encoder of train.py's former default,
the hybrid by MSE. From random weights they imitate it on text and on questions without answers
(--distill=align), 800 steps each; then they train a decoder of their own.

Expected before the first run: distilled students are better than from scratch at equal student
tokens, not at equal compute; rounds change nothing, nor does a medium one between large and small;
a masked LM teaches text as well or better; an untrained teacher gives a student that is like it and
knows nothing.

Equal compute: the FLOPs of phases 1 and 2, the teacher's included, are spent on the student's own,
with twice (small: eight times) the batch. Students have three times the teacher's learning rates.
"""
import dataclasses
import math
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

import align
import data
import report
import train
from labs.arms import chosen, in_short, main, run_or_try
from labs.controls import MASKED_LM, Reader, read_gpt
from labs.facts import folder_of
from labs.measures import cka, features, knn_overlap, logistic_probe, ridge_probe, split
from labs.probes import written
from labs.runs import Arm, fit, model_of, open_run, plain, train_arm
from labs.speed import count_flops
from labs.tables import page_tables, publish

SIZES = dict(large={}, medium=dict(n_embd=64, pred_embd=64, n_layer=3, top_k=3),
             small=dict(n_embd=24, pred_embd=24, n_layer=2, top_k=2))
STEPS = 800
COST = "flops.txt"      # in the folder of a run: its FLOPs before phase 3

@dataclasses.dataclass
class Config(Arm):
    """An arm."""
    size: str = "large"                 # large | medium | small
    route: str = "read answers speak"   # parts of its training, see `learn`
    text: str = "tokens+pooled+guess"   # --align of the part "text"
    versus: str = "large T-JEPA"        # the arm that a student imitates
    align_steps: int = STEPS            # of each part that imitates
    align_lr: float = 1.5e-3            # of the part "text"; "thoughts" takes distill_lr
    every: int = 1                      # keep each so-manieth question and cloze, for --fast

def arm_of(size, steps=STEPS, **changes):
    """A Config; steps: of phases 1 and 2 and of each imitation."""
    cfg = Config(**SIZES[size] | dict(size=size, pretrain_steps=steps, distill_steps=steps,
                                      align_steps=steps, alpha_start=0.0, eval_every=10 ** 9))
    if size != "large":
        names = "pretrain_lr", "distill_lr", "align_lr"
        cfg = dataclasses.replace(cfg, **{name: 3 * getattr(cfg, name) for name in names})
    return dataclasses.replace(cfg, **changes)

# a student that imitates text, then thoughts
distilled = partial(arm_of, route="text thoughts speak")
# a student that imitates text alone, by what a GPT has too; then it teaches itself
text_of = partial(arm_of, "medium", route="text answers speak", text="tokens+pooled")

TEACHERS = {
    "large T-JEPA": arm_of("large", distill_steps=Arm.distill_steps),
    "large masked LM": arm_of("large", distill_steps=Arm.distill_steps, **MASKED_LM),
    "large untrained": arm_of("large", pretrain_steps=0, distill_steps=0, route="read answers"),
    "large GPT": arm_of("large", route="lm"),
}
# Steps at equal compute: 800 times the FLOPs of "distilled" over those of "from scratch", over the
# larger batch. The figure pflop of both shows that they agree.
STUDENTS = {
    "medium distilled": distilled("medium"),
    "medium from scratch": arm_of("medium"),
    "medium untrained": arm_of("medium", route="read", pretrain_steps=0),
    "small distilled": distilled("small"),
    "small from scratch": arm_of("small"),
    "medium 2 rounds": distilled("medium", rounds=2),
    "medium 4 rounds": distilled("medium", rounds=4),
    "medium by masked LM": distilled("medium", versus="large masked LM"),
    "medium text of T-JEPA": text_of(versus="large T-JEPA"),
    "medium text of masked LM": text_of(versus="large masked LM"),
    "medium text of GPT": text_of(versus="large GPT"),
    "medium text of untrained": text_of(versus="large untrained"),
    "medium from scratch equal compute": arm_of("medium", 2740, batch_size=96, qa_batch_size=256),
    "small from scratch equal compute": arm_of("small", 3840, batch_size=384, qa_batch_size=1024),
}
LATER = {"small by way of medium": distilled("small", versus="medium distilled")}
ARMS = TEACHERS | STUDENTS | LATER

def shrunk(cfg):
    """An arm for --fast."""
    short = in_short(dataclasses.replace(cfg, rounds=min(2, cfg.rounds)))
    return dataclasses.replace(short, align_steps=2, every=29)

def open_arm(cfg, corpus):
    """A trained arm as a `train.Run`."""
    if cfg.route != "lm":
        return open_run(cfg, corpus)
    model = Reader(plain(cfg, vocab_size=corpus.tokenizer.vocab_size))
    model.load_state_dict(torch.load(Path(cfg.out) / "gpt.pt", weights_only=True))
    device, dtype = train.pick_device(cfg)
    return train.Run(plain(cfg), model.to(device), corpus, device, dtype)

def open_other(cfg, name, corpus):
    """Another arm of the same seed, as a `train.Run`."""
    other = shrunk(ARMS[name]) if cfg.every > 1 else ARMS[name]
    out = str(folder_of(cfg, name))
    return open_arm(dataclasses.replace(other, seed=cfg.seed, out=out), corpus)

def step_flops(run, phase, loss_at):
    """FLOPs of one optimizer step."""
    train.make_optimizer(run, phase)    # freezes what the phase does not train
    return count_flops(lambda: loss_at(0.5)[0].backward())

def imitate(cfg, part, corpus):
    """Align an arm with cfg.versus, by "text" or "thoughts": (figures, FLOPs).

    Like train.py --distill=align, also for a teacher that train.py cannot open, a GPT.
    """
    other = open_other(cfg, cfg.versus, corpus)
    has_thoughts = other.concepts is not None
    how = dict(align="thought")
    if part == "text":
        how = dict(align=cfg.text, distill_lr=cfg.align_lr)
    asked = plain(cfg, distill="align", distill_steps=cfg.align_steps,
                  teacher=f"ckpt:{folder_of(cfg, cfg.versus)}",
                  teacher_width=other.concepts.size(1) if has_thoughts else 0, **how)
    saved = train.load_checkpoint(cfg.out)
    fresh = "W.", "decoder.", "answer_"
    model = train.build(asked, corpus.tokenizer, saved["model"], fresh).to(other.device)
    questions = data.Questions(
        corpus.qa, corpus.tokenizer, asked.block_size, asked.answer_size, other.device)
    teacher = align.Teacher(other.model, corpus.tokenizer, other.concepts)
    run = train.Run(asked, model, corpus, other.device, other.dtype, questions, teacher=teacher)
    if has_thoughts:
        run = run._replace(concepts=train.set_answers(run, other.concepts))
        saved |= dict(answers=questions.answers, concepts=run.concepts,
                      questions=train.content_of(corpus.qa),
                      teacher=train.content_of(other.concepts))
    loss_at, recall = align.align(run)
    log = fit(run, "distill", loss_at, recall if has_thoughts else None)
    train.save_checkpoint(cfg.out, saved | dict(
        config=dataclasses.asdict(asked), phase="distill", step=cfg.align_steps, evaluated=True,
        model=model.state_dict(), optimizer={}, rows=log.rows,
        threshold=log.last().get("threshold")))
    return log.last(), step_flops(run, "distill", loss_at) * cfg.align_steps

def learn(cfg, part, corpus):
    """One part of an arm's route, in its folder: (figures, FLOPs before phase 3).

    read, answers, speak: phases 1 to 3. text, thoughts: it imitates. lm: phase 1 of a GPT.
    """
    if part in ("text", "thoughts"):
        return imitate(cfg, part, corpus)
    if part == "speak":                 # with the teacher and the width that phase 2 had
        asked = train.resolve(dict(phase="speak", out=cfg.out))
        return train.run(asked, corpus, model_of(cfg)), 0
    if part == "lm":
        run = read_gpt(plain(cfg), corpus)
        torch.save(run.model.state_dict(), Path(cfg.out) / "gpt.pt")
        rows = corpus.train.batch(cfg.batch_size).to(run.device)
        flops = step_flops(run, "pretrain", lambda progress: run.model.pretrain_loss(rows))
        return {}, flops * cfg.pretrain_steps
    phase = dict(read="pretrain", answers="distill")[part]
    figures = train_arm(cfg, corpus, phase=phase)
    run = open_run(cfg, corpus)
    loss_at, _ = train.PHASE_OF[phase](run)
    return figures, step_flops(run, phase, loss_at) * getattr(cfg, f"{phase}_steps")

# -- what is measured ------------------------------------------------------------------------------

def likeness(mine, other):
    """Similarity of two runs' latents of held-out text: CKA, shared neighbours, R2 of a map."""
    text = mine.corpus.val
    # The text has four epochs of the same sentences: of all four, the map could memorise them.
    rows = text.rows(range(math.ceil(len(text.starts) / 4)))            # (N, T)
    # Whole rows are too few for a map: pieces of 8 tokens.
    pieces = rows.unfold(1, 8, 8).flatten(0, 1)                         # (n, 8)
    pieces = pieces[(pieces != text.pad).all(1)].to(mine.device)
    x = features(mine.model, pieces).cpu()
    y = features(other.model, pieces).cpu()
    r2, _ = ridge_probe(*((x[rows], y[rows]) for rows in split(len(x), seed=0)))
    return dict(cka=cka(x, y), knn=knn_overlap(x, y), linear=r2)

def kept(cfg, figures):
    """Exact match in held-out phrasings, as a share of that of the same seed's large T-JEPA."""
    large = report.newest(train.load_checkpoint(folder_of(cfg, "large T-JEPA"))["rows"])
    names = dict(kept_DEC="em_DEC_heldout", kept_LAT="em_LAT_heldout")
    return {share: figures[name] / large[name] for share, name in names.items()
            if name in figures and large[name]}

def numbered(keys):
    """A class number for each key of a list, (n,)."""
    names = sorted(set(keys))
    return torch.tensor([names.index(key) for key in keys])

def probes(run):
    """Accuracies of two probes of frozen latents of questions, in held-out phrasings.

    relation: by logistic regression. fact: by the nearest of the means of the latents of each
    fact's trained phrasings (cosine).
    """
    rows = written(run.corpus)
    questions = [row.question for row in rows]
    tokens = data.pack_questions(run.corpus.tokenizer, questions, run.cfg.block_size)
    x = features(run.model, tokens.to(run.device)).cpu()                # (n, C)
    relation_of = numbered([row.relation for row in rows])
    fact_of = numbered([(row.relation, row.subject) for row in rows])
    held_out = torch.tensor([row.phrasing == "heldout" for row in rows])

    known = (~held_out).nonzero()[:, 0]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    known = known[order]
    # a quarter, about a thousand, is enough
    few, dev, _ = known.tensor_split((len(known) // 4, len(known) * 3 // 8))
    parts = ((x[which], relation_of[which]) for which in (few, dev, held_out))
    relation, _ = logistic_probe(*parts)

    z = F.normalize(x - x[known].mean(0), dim=-1)
    sums = torch.zeros(int(fact_of.max()) + 1, z.size(1)).index_add(0, fact_of[known], z[known])
    nearest = (z[held_out] @ F.normalize(sums, dim=-1).T).argmax(1)
    fact = (nearest == fact_of[held_out]).float().mean().item()
    return dict(relation=relation, fact=fact, probe=(relation + fact) / 2)

def measure(cfg):
    """Train an arm; judge its latents, its decoder and its cost, in PFLOP before phase 3."""
    corpus = data.load(cfg)
    corpus = corpus._replace(qa=corpus.qa[::cfg.every], cloze=corpus.cloze[::cfg.every])
    figures, flops = {}, 0
    if cfg.route.startswith("text"):    # begins with random weights
        train_arm(cfg, corpus, phase="pretrain", pretrain_steps=0)
        flops = float((folder_of(cfg, cfg.versus) / COST).read_text())
    for part in cfg.route.split():
        found, cost = learn(cfg, part, corpus)
        figures |= found
        flops += cost
    run = open_arm(cfg, corpus)
    figures |= probes(run)
    if cfg.size != "large":             # the large ones may still be trained beside this one
        figures |= likeness(run, open_other(cfg, "large T-JEPA", corpus)) | kept(cfg, figures)
    (Path(cfg.out) / COST).write_text(str(flops))
    return figures | dict(pflop=flops / 1e15)

def measure_quietly(cfg):
    """`measure` for --fast: nothing is drawn, which takes longer than its steps, or printed."""
    report.draw_curves = lambda *args, **kwargs: None
    with redirect_stdout(None):
        return measure(cfg)

def distillation(flags):
    """Teachers first, then students, then what a student teaches; then the tables."""
    names, judge = chosen(flags, ARMS), measure_quietly if flags.fast else measure
    for stage in TEACHERS, STUDENTS, LATER:
        mine = {name: cfg for name, cfg in stage.items() if name in names}
        every = dataclasses.replace(flags, arms="")
        rows = run_or_try("distillation", mine, every, judge, shrunk)
    if rows is not None:
        publish("distillation", rows, page_tables("distillation", rows), flags.table)

if __name__ == "__main__":
    main(distillation)
