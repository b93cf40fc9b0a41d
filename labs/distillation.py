"""
Large teaches small (T-JEPA v2.0): is the "world model quality" preserved, and what is the teacher worth?

    python -m labs.distillation                 3 seeds of each arm: 4 to 9 minutes of a core each; equal compute at a
                                                quarter of the size half an hour, at a sixteenth hours (3 and 4
                                                minutes of an H100 that is shared by 18 runs)
    python -m labs.distillation --fast          does it run?

The large T-JEPA is train.py's default. A medium student (a quarter of its encoder's parameters) and a small one (a
sixteenth) start from random weights, imitate it on text and on the questions of phase 2 without their answers
(train.py --distill=align), and get a decoder of their own: frozen encoder, cross-entropy alone, as all arms here.

Expected before the first run: better than from scratch at equal student tokens, not at equal total compute; token
latents carry more than pooled ones; rounds change nothing; a masked LM teaches text as well or better; an untrained
teacher makes a student that is like it and knows nothing; the way over the middle is worth nothing.
The first run had latents alone, and a large one twice as wide as the default: seed 0 knew less than the medium one
from scratch (exact match of LAT in new phrasings .713 and .847), and who knows less has nothing to teach.

Students read 48 rows of text a step, 800 times, and 128 questions a step, 800 times: from scratch in phases 1 and 2;
"distilled" by --align=tokens+pooled+guess, then --align=thought; "jointly" both in the same 800 steps; "text of ..."
the text, then a phase 2 of their own, taught by themselves. Where that is not so the name says it: twice the steps,
thoughts only, equal compute, phase 1 first (800 steps of it before they are distilled). Equal compute: FLOPs
of phases 1 and 2, the teacher's and what it reads for the student included; where these buy more than the student's
own, they go into twice (small: eight times) the batch and the rest into steps; phase 3, which is not counted, then has
such batches too. Large ones have 800 + 700 steps.
Rates of students: `FASTER` times train.py's in phases 1 and 2 (imitation of text 1.5e-3 as phase 1, thoughts as phase
2), from scratch as distilled. Tried on seed 9, medium: once and three times; three times had the better mean of probes,
DEC and LAT in new phrasings (there is no other set of them) for both: from scratch .809 against .771, distilled .834
against .794; from scratch and in phase 1 alone .759. Large ones have train.py's (phase 1 at 2e-3: .770, those of seeds
0 and 1 at 1e-3 .839 and .869). What is read of latents is read of the target encoder, which learns from text alone:
"thoughts only" has none.
"""
import dataclasses
import math
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

import data
import evaluate
import train
from align import Teacher
from labs.arms import FAILURES, chosen, main, missing, results, run_arms
from labs.controls import MASKED_LM, Reader
from labs.measures import cka, features, knn_overlap, logistic_probe, ridge_probe, split
from labs.speed import count_flops
from labs.tables import by_seed, figure_of, markdown, over_seeds, publish, tables

SIZES = {"large": {}, "medium": dict(n_embd=64, pred_embd=64, n_layer=3, top_k=3),
         "small": dict(n_embd=24, pred_embd=24, n_layer=2, top_k=2)}
TINY = {"large": dict(n_embd=32, pred_embd=16, n_layer=2, top_k=2),
        "medium": dict(n_embd=16, pred_embd=16, n_layer=2, top_k=2),
        "small": dict(n_embd=8, pred_embd=8, n_layer=1, top_k=1)}
STEPS, FASTER = 800, 3
COST = "flops.txt"      # file in a run's folder: what it cost before phase 3
# part of a route that imitates -> --align; the text's is Config.text
IMITATE = dict(text="", thoughts="thought", both="tokens+pooled+thought")


@dataclasses.dataclass
class Config(train.Config):
    """An arm."""
    size: str = "large"         # large | medium | small
    route: str = "read answers speak"   # through what it goes, see `learn`: read answers speak are phases 1 to 3
    text: str = "tokens+pooled+guess"   # --align of the part of a route that is called text
    versus: str = "large T-JEPA"        # the large arm that a student imitates, or is only compared with
    align_steps: int = STEPS    # of each part that imitates
    align_lr: float = 1.5e-3    # where they imitate text; thoughts alone are a phase 2, with its rate
    every: int = 1              # only each so-manieth question and statement is there: for --fast

def plain(cfg, **changes):
    """The train.Config of an arm, with changes: a checkpoint knows no other fields."""
    return train.Config(**({name: getattr(cfg, name) for name in train.Config.__dataclass_fields__} | changes))

# -- who takes part ----------------------------------------------------------------------------------------------------
def arm_of(fast, size, steps=STEPS, **changes):
    """A Config. steps: of phases 1 and 2, and of align; changes go before. fast: four steps of each at most."""
    count = dict(pretrain_steps=steps, distill_steps=steps, align_steps=steps)
    rates = {name: getattr(Config, name) * (1 if size == "large" else FASTER)
             for name in ("pretrain_lr", "distill_lr", "align_lr")}
    arm = Config(**(SIZES[size] | count | rates | dict(size=size, alpha_start=0.0, eval_every=10 ** 9) | changes))
    few = {name: min(4, getattr(arm, name)) for name in ("speak_steps", *count)} | TINY[size]
    return dataclasses.replace(arm, **few, every=29) if fast else arm

def teachers(fast):
    """The first stage: name -> Config."""
    large = partial(arm_of, fast, "large", distill_steps=700)
    return {"large T-JEPA": large(), "large masked LM": large(**MASKED_LM),
            "large without phase 1": large(pretrain_steps=0),
            "large untrained": large(pretrain_steps=0, distill_steps=0, route="read answers"),
            "large GPT": large(route="lm")}

def students(fast):
    """The second stage, the decisive arms first."""
    medium, small = (partial(arm_of, fast, size, route="text thoughts speak") for size in ("medium", "small"))
    scratch, untrained = dict(route="read answers speak"), dict(route="read", pretrain_steps=0)
    own = dict(route="text answers speak", text="tokens+pooled")        # what a GPT can be asked for too
    return {"medium distilled": medium(), "medium from scratch": medium(**scratch),
            "medium untrained": medium(**untrained),
            "small distilled": small(), "small from scratch": small(**scratch), "small untrained": small(**untrained),
            "medium pooled": medium(text="pooled+guess"), "medium tokens": medium(text="tokens+guess"),
            "medium without guesses": medium(text="tokens+pooled"),
            "medium thoughts only": medium(route="thoughts speak"),
            "medium jointly": medium(route="both speak"),
            "medium jointly twice the steps": medium(2 * STEPS, route="both speak"),
            "medium twice the steps": medium(2 * STEPS),
            "medium phase 1 first": medium(route="read text thoughts speak"),
            "medium gentle thoughts": medium(distill_lr=Config.distill_lr),
            "medium 2 rounds": medium(rounds=2), "medium 4 rounds": medium(rounds=4),
            "medium by masked LM": medium(versus="large masked LM"),
            "medium by large without phase 1": medium(versus="large without phase 1"),
            "medium text of T-JEPA": medium(**own), "medium text of masked LM": medium(**own, versus="large masked LM"),
            "medium text of GPT": medium(**own, versus="large GPT"),
            "medium text of untrained": medium(**own, versus="large untrained")}

LATER = ("small by way of medium", "medium from scratch equal compute", "small from scratch equal compute")

def later(fast, rows, names):
    """The third stage: those of LATER in names, which are made from rows of the second."""
    def pflop(arm):
        """What an arm cost: the same with any seed."""
        if not (found := values(rows, arm, "pflop")):
            raise ValueError(f"--arms: run --arms='{arm}' --redo first, what has the same compute is made from it")
        return found[0]
    arms = {}
    for name in names:
        size, *_ = name.split()
        if name.endswith("equal compute"):
            wider = dict(medium=2, small=8)[size]
            times = pflop(f"{size} distilled") / pflop(f"{size} from scratch") / wider
            arms[name] = arm_of(fast, size, round(times * STEPS), batch_size=wider * Config.batch_size,
                                qa_batch_size=wider * Config.qa_batch_size)
        else:
            arms[name] = arm_of(fast, size, route="text thoughts speak", versus="medium distilled")
    return arms

# -- one arm -----------------------------------------------------------------------------------------------------------
def place(cfg, arm):
    """Folder of another arm of the same seed."""
    return Path(cfg.out).parent / f"{arm}_{cfg.seed}"

def world(cfg):
    """The corpus of an arm, read once."""
    corpus = data.load(cfg)
    return corpus._replace(qa=corpus.qa[::cfg.every], cloze=corpus.cloze[::cfg.every])

def open_arm(cfg, folder, corpus):
    """(Run, checkpoint) of an arm as it stands in its folder, on the device of cfg."""
    saved, (device, dtype) = train.load_checkpoint(folder), train.pick_device(cfg)
    theirs, tokenizer = train.Config(**saved["config"]), data.Tokenizer.from_state(saved["tokenizer"])
    if "encoder.embed.weight" in saved["model"]:
        model = train.build(theirs, tokenizer, saved["model"])
    else:
        model = Reader(dataclasses.replace(theirs, vocab_size=tokenizer.vocab_size))
        model.load_state_dict(saved["model"])
    return train.Run(theirs, model.to(device), corpus, device, dtype), saved

def questions_of(run):
    """The questions of a run's corpus."""
    return data.Questions(run.corpus.qa, run.corpus.tokenizer, run.cfg.block_size, run.cfg.answer_size, run.device)

def step_flops(run, phase, loss_at):
    """FLOPs of one optimizer step; the model is not what it was afterwards."""
    return count_flops(partial(train.take_step, run, phase, train.optimizer_for(run, phase, None), loss_at, 0.5))

def fit_apart(run, phase, loss_at, saved):
    """train.fit for what train.run does not know: a GPT, and who imitates one. The checkpoint stays one of train.py."""
    out = Path(run.cfg.out)
    out.mkdir(parents=True, exist_ok=True)

    def save(step, optimizer):
        """Whole, but for an optimizer that nobody resumes."""
        train.save_checkpoint(out, saved | dict(phase=phase, step=step, model=run.model.state_dict(), optimizer={}))
    train.fit(run, phase, loss_at, lambda whole: {}, evaluate.Log(out, []), save)

def read_as_lm(cfg, corpus):
    """Phase 1 of a GPT: next tokens of the same rows. Returns its FLOPs."""
    train.run(plain(cfg, phase="pretrain", pretrain_steps=0), corpus)       # for a checkpoint that holds its tokenizer
    run, saved = open_arm(cfg, cfg.out, corpus)
    torch.manual_seed(cfg.seed)
    model = Reader(dataclasses.replace(run.cfg, vocab_size=corpus.tokenizer.vocab_size)).to(run.device)
    run = run._replace(cfg=plain(cfg), model=model)

    def loss_at(progress):
        """Rows of text, drawn anew."""
        return model.pretrain_loss(corpus.train.batch(cfg.batch_size).to(run.device, non_blocking=True))
    fit_apart(run, "pretrain", loss_at, saved)
    return step_flops(run, "pretrain", loss_at) * cfg.pretrain_steps

def learn(cfg, part, corpus):
    """One part of an arm's route, in its folder: (figures, FLOPs before phase 3). read, answers and speak are phases 1
    to 3, lm is the phase 1 of a GPT; text, thoughts and both imitate."""
    if part == "lm":
        return {}, read_as_lm(cfg, corpus)
    if part == "speak":
        return train.run(train.resolve(dict(phase="speak", out=cfg.out)), corpus), 0     # W is as wide as it was taught
    if part in IMITATE:
        return imitate(cfg, part, corpus)
    phase = dict(read="pretrain", answers="distill")[part]
    figures = train.run(plain(cfg, phase=phase), corpus)
    run, saved = open_arm(cfg, cfg.out, corpus)
    more = [questions_of(run), saved["concepts"].to(run.device)] if part == "answers" else []
    return figures, step_flops(run, phase, getattr(train, phase)(run, *more)[0]) * getattr(cfg, f"{phase}_steps")

def imitate(cfg, part, corpus):
    """Align an arm to the one it is held against: (figures, FLOPs). A GPT has no thoughts; train.py knows no GPT."""
    rate = cfg.distill_lr if part == "thoughts" else cfg.align_lr
    asked = plain(cfg, phase="distill", distill="align", align=IMITATE[part] or cfg.text, distill_lr=rate,
                  teacher=f"ckpt:{place(cfg, cfg.versus)}", distill_steps=cfg.align_steps)
    thinks = cfg.versus != "large GPT"
    figures = train.run(asked, corpus) if thinks else {}
    run, saved = open_arm(cfg, cfg.out, corpus)
    run, questions = run._replace(cfg=asked), questions_of(run)
    teacher = train.open_teacher(asked, questions.answers, corpus.tokenizer) if thinks else Teacher(
        open_arm(cfg, place(cfg, cfg.versus), corpus)[0].model, corpus.tokenizer, None)
    loss_at = teacher.align(run, questions, None)[0]
    if not thinks:
        fit_apart(run, "distill", loss_at, saved)
    return figures, step_flops(run, "distill", loss_at) * cfg.align_steps

# -- what is measured --------------------------------------------------------------------------------------------------
def pieces(corpus, size=8):
    """Held-out text, cut into pieces of size tokens: (n, size). There are too few whole rows for a linear map. The
    facts' text says each sentence four times, one epoch after the other: once is enough, or a map could learn them."""
    rows = corpus.val.rows(range(math.ceil(len(corpus.val.starts) / 4)))                    # (N, T)
    cut = rows.unfold(1, size, size).flatten(0, 1)                                      # (N * T / size, size)
    return cut[(cut != corpus.tokenizer.pad).all(1)]

def likeness(mine, other):
    """How alike two runs' latents of held-out text are: CKA, neighbours shared, R2 of the best linear map to other."""
    text = pieces(mine.corpus)
    x, y = (features(run.model, text.to(run.device)).cpu() for run in (mine, other))    # (n, C), (n, D)
    linear = ridge_probe(*((x[i], y[i]) for i in split(len(x), seed=0)))[0]
    return dict(cka=cka(x, y), knn=knn_overlap(x, y), linear=linear)

def probes(run):
    """What can be read of frozen latents of questions about all facts, in phrasings that the reader was not fitted on:
    relation, by logistic regression; fact, by the nearest of the means of each fact's other phrasings (cosine)."""
    rows = [row for row in run.corpus.qa if row.split != "NEVER"]
    tokens = data.pack(run.corpus.tokenizer, [row.question for row in rows], run.cfg.block_size, "--block_size")
    x = features(run.model, tokens.to(run.device)).cpu()                                # (n, C)
    held = torch.tensor([row.phrasing == "heldout" for row in rows])                    # (n,)
    kind, fact = (torch.tensor([sorted(set(names)).index(name) for name in names]) for names in (
        [row.relation for row in rows], [(row.relation, row.subject) for row in rows]))                 # (n,) each
    known = (~held).nonzero()[:, 0]
    known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))]
    few, dev, _ = known.tensor_split((len(known) // 4, len(known) * 3 // 8))            # a thousand are plenty
    relation = logistic_probe(*((x[i], kind[i]) for i in (few, dev, held)))[0]
    z = F.normalize(x - x[known].mean(0), dim=-1)                                       # (n, C)
    means = F.normalize(torch.zeros(int(fact.max()) + 1, z.size(1)).index_add(0, fact[known], z[known]), dim=-1)
    found = ((z[held] @ means.T).argmax(1) == fact[held]).float().mean().item()
    return dict(relation=relation, fact=found, probe=(relation + found) / 2)

def measure(cfg):
    """An arm: its route, what its latents are like and tell, and what it cost, in PFLOP before phase 3."""
    corpus, figures, flops = world(cfg), {}, 0
    if cfg.every > 1:                                   # --fast: drawing takes longer than all its steps
        evaluate.draw_curves = lambda rows, phases, path: None
    if cfg.route.split()[0] in IMITATE:                 # it begins with random weights
        train.run(plain(cfg, phase="pretrain", pretrain_steps=0), corpus)
    for part in cfg.route.split():
        found, cost = learn(cfg, part, corpus)
        figures, flops = figures | found, flops + cost
    mine = open_arm(cfg, cfg.out, corpus)[0]
    if not cfg.route.startswith("thoughts"):            # then its target encoder has learned nothing
        figures |= probes(mine)
        if cfg.size != "large":                         # those may still be trained beside this one
            figures |= likeness(mine, open_arm(cfg, place(cfg, "large T-JEPA"), corpus)[0])
    if IMITATE.keys() & set(cfg.route.split()):
        flops += float((place(cfg, cfg.versus) / COST).read_text())
    size = sum(p.numel() for p in (mine.model if "lm" in cfg.route else mine.model.target).parameters())
    (Path(cfg.out) / COST).write_text(str(flops))       # for those that it teaches
    return figures | dict(pflop=flops / 1e15, millions=size / 1e6)

# -- the tables --------------------------------------------------------------------------------------------------------
def values(rows, arm, name):
    """A figure of an arm, one number a seed."""
    return [row[name] for row in by_seed(rows) if row["arm"] == arm and name in row]

def verdict(mine, other):
    """Words for the difference of two arms' figures, one number a seed each: a tie if it is within their spreads."""
    if len(mine) < 2 or len(other) < 2:
        return "not measured"
    return compared(figure_of(mine), figure_of(other))

def compared(mine, other):
    """As `verdict`, of two `Figure`s or None."""
    if not mine or not other or min(mine.seeds, other.seeds) < 2:
        return "not measured"
    gap, spread = mine.mean - other.mean, mine.deviation + other.deviation
    return f"{'tie' if abs(gap) <= spread + 1e-9 else 'above' if gap > 0 else 'below'} ({gap:+.3f})"

def retained(rows):
    """Rows with what they keep of the large T-JEPA of their seed: EM in new phrasings, as a share; and of the probes'
    mean what lies above an untrained encoder of their size, if the large one's lies above it outside the spread."""
    def find(arm, seed):
        """Another arm's row of a seed, or {}."""
        return next((row for row in rows if (row["arm"], row["seed"]) == (arm, seed)), {})
    for row in by_seed(rows):
        large, low = find("large T-JEPA", row["seed"]), find(f"{row['arm'].split()[0]} untrained", row["seed"])
        for split_ in ("DEC", "LAT"):
            name = f"em_{split_}_heldout"
            if name in row and large.get(name):
                row[f"kept_{split_}"] = row[name] / large[name]
        gap = verdict(*(values(rows, arm, "probe") for arm in ("large T-JEPA", f"{row['arm'].split()[0]} untrained")))
        if large and low and "probe" in row and gap.startswith("above"):
            row["kept_probe"] = (row["probe"] - low["probe"]) / (large["probe"] - low["probe"])
    return rows

TABLES = {
    "How alike: latents of held-out text, of the arm and of large T-JEPA": {
        "CKA": "cka", "R2 of the best linear map": "linear", "10 neighbours shared": "knn"},
    "What frozen latents tell (questions in new phrasings), and what the arm cost": {
        "relation": "relation", "fact": "fact", "mean": "probe", "of the teacher's, above untrained": "kept_probe",
        "encoder, million parameters": "millions", "PFLOP before phase 3": "pflop"},
    "Exact match of the decoder that was trained for it": {
        **{f"{part} {phrasing}": f"em_{part}{tail}" for part in evaluate.SPLITS
           for phrasing, tail in (("trained", ""), ("new", "_heldout"))},
        "DEC new, of large T-JEPA's": "kept_DEC", "LAT new, of large T-JEPA's": "kept_LAT"}}
FIGURES = {"probes": "probe", "DEC new": "em_DEC_heldout", "LAT new": "em_LAT_heldout", "CKA": "cka"}
QUESTIONS = [
    ("25: is there anything to teach? the teacher against from scratch", "large T-JEPA", "medium from scratch"),
    ("25: the same, small", "large T-JEPA", "small from scratch"),
    ("25: against from scratch, equal student tokens", "medium distilled", "medium from scratch"),
    ("25: the same, small", "small distilled", "small from scratch"),
    ("25: against from scratch, equal compute", "medium distilled", "medium from scratch equal compute"),
    ("25: the same, small", "small distilled", "small from scratch equal compute"),
    ("25: token latents against pooled ones", "medium tokens", "medium pooled"),
    ("25: with text against thoughts alone", "medium distilled", "medium thoughts only"),
    ("25: text, then thoughts, against jointly (half the steps)", "medium distilled", "medium jointly"),
    ("25: the same, as many steps", "medium distilled", "medium jointly twice the steps"),
    ("25: with guesses against without", "medium distilled", "medium without guesses"),
    ("25: a teacher that has read against one without phase 1", "medium distilled", "medium by large without phase 1"),
    ("25: trained text against untrained", "medium text of T-JEPA", "medium text of untrained"),
    ("26: 2 rounds against 1", "medium 2 rounds", "medium distilled"),
    ("26: 4 rounds against 1", "medium 4 rounds", "medium distilled"),
    ("27: T-JEPA against a masked LM, both taught", "medium distilled", "medium by masked LM"),
    ("27: text of T-JEPA against a masked LM", "medium text of T-JEPA", "medium text of masked LM"),
    ("27: text of T-JEPA against a GPT", "medium text of T-JEPA", "medium text of GPT"),
    ("28: by way of medium against directly", "small by way of medium", "small distilled")]

def verdicts(rows):
    """Markdown: what was promised, and each question of the claims, arm against control."""
    def reached(name, least):
        """A promise of the medium student's, and what became of it."""
        found = over_seeds(rows, "medium distilled", name)
        return [f"{found.mean:.3f}", "kept" if found.mean >= least else "not kept"] if found \
            else ["not measured", "not measured"]
    promised = [["medium distilled", "promised", "found", "verdict"],
                *([title, f"{least:.2f}", *reached(name, least)] for title, name, least in (
                    ("DEC new, of large T-JEPA's", "kept_DEC", 0.95), ("LAT new, of large T-JEPA's", "kept_LAT", 0.95),
                    ("CKA", "cka", 0.90)))]
    asked = [["claim and question (a tie: within the two spreads added)", *FIGURES],
             *([title, *(compared(*(over_seeds(rows, each, name) for each in (arm, other)))
                         for name in FIGURES.values())] for title, arm, other in QUESTIONS)]
    return f"{markdown(promised)}\n\n{markdown(asked)}"


def distillation(flags):
    """Teachers, students, and what follows from their results; then the tables."""
    flags = dataclasses.replace(flags, seeds=1) if flags.fast else flags
    first, second = teachers(flags.fast), students(flags.fast)
    every = [*first, *second, *LATER]
    wanted, failed = chosen(flags, every), None
    for stage in first, second, None:
        try:
            rest = {name for name, _ in missing("distillation", [name for name in LATER if name in wanted], flags)}
            arms = stage or later(flags.fast, results("distillation", flags), [name for name in LATER if name in rest])
            if mine := [name for name in arms if name in wanted]:
                run_arms("distillation", arms, dataclasses.replace(flags, arms=",".join(mine)), measure)
        except FAILURES as error:       # the next stage can do without one arm of this one
            failed = error
    rows = retained(results("distillation", flags))
    text = tables(rows, {title: (every, columns) for title, columns in TABLES.items()})
    publish("distillation", rows, f"{text}\n\n{verdicts(rows)}", "" if failed else flags.table)
    if failed:
        raise failed


if __name__ == "__main__":
    main(distillation)
