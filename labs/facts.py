"""
Do facts taught in latent space become speech? Teachers, memories and controls.

    python -m labs.facts --jobs=4               3 seeds of each arm; many arms share phase 1
    python -m labs.facts --arms="GPT,echo=0"    these arms, and first the arms that they start from
    python -m labs.facts --seeds=0              no run, the tables of the lab's page
    python -m labs.facts --fast                 a few steps of each kind of arm: does it run?

Expected before the first run: a random-init encoder is strong in the phrasings that were taught and
weak in new ones; random codes teach as well as any teacher; with shuffled L_a or a shuffled memory
nothing is right; one slot does what four do; token latents alone give DEC and no LAT; teaching B
makes the model forget A, and replay prevents it; the GPT is better than T-JEPA wherever it was
taught, and not where it only read; a GPT that was told LAT facts as tokens is the ceiling.
Of the default's loss, expected on another seed: a token term adds a little to TXT, nothing to LAT;
a masked LM with as large embeddings gains, and stays behind in TXT. It did not on seed 0 (.634;
with tokens .560). Of today's default, half as many steps as before: LAT above .95, TXT near .48;
latents alone lose .1 of TXT, the masked LM gains .05; without phase 1 LAT falls to .9; the GPT
keeps its .1 of LAT and TXT.

The first arms have the settings of train.py, three of them for twice the steps. The others are
older: by MSE on spans, latents alone unless their name says otherwise, for twice the steps of
today. Arms of a group share facts, width, seeds and, where the name does not say otherwise, steps
and learning rates, which were chosen for T-JEPA. The GPT learns DEC questions for the steps of
phases 2 and 3. "lever" arms run on seeds of their own (10, 11, ...), so that the seeds of the other
tables choose nothing.
"""
import copy
import dataclasses
import random
import re
import shutil
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch

import data
import evaluate
import train
from data.facts import prepare
from labs import controls, teachers
from labs.arms import chosen, in_short, main, run_arms
from labs.runs import NO_TOKENS, NOW, Arm, fit, open_run, plain, train_arm
from labs.tables import page_tables, publish

TAUGHT = ("DEC", "LAT")     # the splits of the facts that phase 2 teaches

@dataclasses.dataclass
class Config(Arm):
    """An arm: flags of train.py, and what only this lab changes."""
    # Latents alone by MSE, as in v1.1, for twice the steps of today; arms of train.py's default,
    # and with its other settings, are those of `today` below.
    mlm: float = NO_TOKENS["mlm"]
    pred_embd: int = NO_TOKENS["pred_embd"]
    pred_layer: int = 1
    question_drop: float = 0.0
    question_noise: float = 0.5
    made_up: float = 0.2
    pretrain_steps: int = 1400
    distill_steps: int = 1400
    speak_steps: int = 1000
    distill_lr: float = 1e-3
    qa_batch_size: int = 64
    eval_every: int = 10 ** 9   # a phase is measured at its beginning and at its end
    kind: str = "t_jepa"        # function of this file that trains and measures: t_jepa | gpt | ...
    start: str = ""             # the arm whose phases before `phase` are copied; "": none
    told: str = "DEC"           # splits that the decoder, or the GPT, is taught as tokens
    replay: float = 0.0         # share of A's questions that are taught again together with B
    shift: int = 0              # added to the seed
    every: int = 1              # only every n-th question, for --fast

# -- phases that arms share ------------------------------------------------------------------------

def folder_of(cfg, arm):
    """The folder of another arm with the seed of cfg."""
    seed = Path(cfg.out).name.rsplit("_", 1)[1]
    return Path(cfg.out).parent / f"{arm}_{seed}"

def keep(cfg, phase):
    """Keep the checkpoint of a phase that has ended, for the arms that start from it."""
    kept = Path(cfg.out) / phase
    kept.mkdir(exist_ok=True)
    shutil.copy(Path(cfg.out) / "ckpt.pt", kept)

def begin(cfg):
    """Copy the checkpoint of the phase before cfg.phase from the arm cfg.start."""
    before = train.PHASES[train.PHASES.index(cfg.phase) - 1]
    source = folder_of(cfg, cfg.start) / before / "ckpt.pt"
    if not source.exists():
        raise ValueError(f"--arms: {source} is missing: run --arms='{cfg.start}' --redo first")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    shutil.copy(source, cfg.out)

# -- what a phase is told about the facts ----------------------------------------------------------

def fact_of(row):
    """Which fact a question asks for."""
    return row.relation, row.subject

def relabel(questions, split_of):
    """The same questions with split_of(row) as the split of each: splits say what is taught."""
    part = copy.copy(questions)
    part.rows = [row._replace(split=split_of(row)) for row in questions.rows]
    return part

def crossed(questions, seed):
    """The same questions, where each taught fact has the answer of another one."""
    answers = {fact_of(row): answer
               for row, answer in zip(questions.rows, questions.answer_of.tolist())
               if row.split in TAUGHT}
    shuffled = random.Random(seed).sample(list(answers.values()), len(answers))
    others = dict(zip(answers, shuffled))
    part = copy.copy(questions)
    wrong = [others.get(fact_of(row), 0) for row in questions.rows]
    part.answer_of = torch.tensor(wrong, device=questions.tokens.device)        # (n,)
    return part

def in_halves(questions, replay, seed):
    """Lessons about A, every second taught fact of a relation, and about B, the others; and lessons
    about B with a share `replay` of A's questions, drawn once. What is not taught counts as TXT."""
    facts = {fact_of(row) for row in questions.rows if row.split in TAUGHT}
    first = set(sorted(facts)[::2])
    rng = random.Random(seed)

    def replayed(row):
        """The split of a row while B is taught."""
        hidden = fact_of(row) in first and rng.random() >= replay
        return "TXT" if hidden else row.split
    a = relabel(questions, lambda row: row.split if fact_of(row) in first else "TXT")
    b = relabel(questions, lambda row: "TXT" if fact_of(row) in first else row.split)
    return a, b, relabel(questions, replayed)

# -- figures ---------------------------------------------------------------------------------------

@torch.no_grad()
def explained(run):
    """R2 of the thoughts, over always giving the mean answer of the relation."""
    questions, concepts = run.questions, run.concepts
    thoughts = evaluate.think_all(run, questions.tokens).latent         # (n, D)
    own = concepts[questions.answer_of]                                 # (n, D)
    rivals = questions.rivals.float()                                   # (n, A)
    means = rivals @ concepts / rivals.sum(1, keepdim=True).clamp(min=1)
    error = evaluate.by_split(questions, "r2", ((thoughts - own) ** 2).mean(1))
    spread = evaluate.by_split(questions, "r2", ((means - own) ** 2).mean(1))
    return {name: 1 - error[name] / spread[name] for name in error if spread[name]}

def spoken(run, questions):
    """Exact match of what is said about some questions."""
    return evaluate.exact_match(run, questions, evaluate.think_all(run, questions.tokens))

def resembles(wording, others):
    """Does a wording share four tenths of its content words, or more, with one of others?"""
    small = set("a the is of in what which who it i to do does for s that by and on".split())
    mine, *theirs = [set(re.findall(r"[a-z']+", text.lower().replace("{s}", ""))) - small
                     for text in (wording, *others)]
    return any(len(mine & words) >= 0.4 * max(1, len(mine | words)) for words in theirs)

def answered(run, questions, threshold):
    """Which answers are right, and which thoughts are within the threshold: two bool (n,)."""
    thoughts = evaluate.think_all(run, questions.tokens)
    known = evaluate.concept_distance(run, thoughts.latent) <= threshold
    return controls.matches(questions, evaluate.say(run, thoughts)), known

def far_natural(run, threshold):
    """Natural questions that resemble no wording of phase 2, answered rightly within the threshold:
    far_DEC, far_LAT, as far as there are any."""
    trained = {}
    for relation, kind, template in prepare.read_tsv("templates.tsv"):
        if kind == "question":
            trained.setdefault(relation, []).append(template)
    far = {relation + template for relation, template in prepare.read_tsv("natural.tsv")
           if relation in trained and not resembles(template, trained[relation])}
    kept = [i for i, row in enumerate(run.questions.rows) if row.phrasing == "natural"
            and row.relation + row.question.replace(row.subject, "{s}") in far]
    if not kept:
        return {}
    some = run.questions.pick(torch.tensor(kept))
    right, known = answered(run, some, threshold)
    found = evaluate.by_split(some, "far", right & known)
    names = {f"far_{split}_natural": f"far_{split}" for split in TAUGHT}
    return {names[name]: share for name, share in found.items() if name in names}

# -- kinds of arms: each trains and returns its figures --------------------------------------------

def t_jepa(cfg, corpus):
    """The phases of train.py; those that other arms start from are kept."""
    figures = {}
    first = train.PHASES.index(cfg.phase) if cfg.start else 0
    for phase in train.PHASES[first:]:
        if phase == "speak" and cfg.told != "DEC":
            return figures | speak_told(cfg, corpus)
        figures |= train_arm(cfg, corpus, phase=phase)
        if not cfg.start:
            keep(cfg, phase)
        if phase == "pretrain":
            run = open_run(cfg, corpus)
            vectors = teachers.own_vectors(run, run.questions.answers)
            teachers.save(Path(cfg.out) / "vectors.npz", run.questions.answers, vectors)
            if cfg.variant == "MaskedLM":           # it predicts words, and no latents
                run = run._replace(model=controls.WordEnergy(run.model, mean=True))
            figures |= evaluate.cloze(run, "capital")
    run = open_run(cfg, corpus)
    return figures | explained(run) | far_natural(run, figures["threshold"])

def speak_told(cfg, corpus):
    """Phase 3 with the splits cfg.told taught as tokens."""
    run = open_run(cfg, corpus, fresh=["decoder."])
    told = relabel(run.questions, lambda row: "DEC" if row.split in cfg.told.split() else row.split)
    fit(run, "speak", train.speak(run._replace(questions=told))[0])
    return spoken(run, run.questions)

def shuffled(cfg, corpus):
    """Phase 2 with the answer latents of other facts; phase 3 is unchanged."""
    run = open_run(cfg, corpus)
    run = run._replace(concepts=train.set_answers(run, None))
    wrong = crossed(run.questions, cfg.seed)
    fit(run, "distill", train.distill(run._replace(questions=wrong))[0])
    fit(run, "speak", train.speak(run)[0])
    recall = evaluate.recall(run, run.questions, run.concepts)
    return recall | spoken(run, run.questions) | explained(run)

def continual(cfg, corpus):
    """Phases 2 and 3 with facts A, then phase 2 with facts B; the decoder sees nothing of B."""
    run = open_run(cfg, corpus)
    run = run._replace(concepts=train.set_answers(run, None))
    a, b, b_and_replay = in_halves(run.questions, cfg.replay, cfg.seed)

    def judge(when):
        """Figures of both halves in held-out phrasings."""
        figures = {}
        for name, half in dict(A=a, B=b).items():
            found = evaluate.recall(run, half, run.concepts) | spoken(run, half)
            for figure in ("r1_LAT_heldout", "em_LAT_heldout", "em_DEC_heldout"):
                figures[f"{figure}_{name}_{when}"] = found[figure]
        return figures
    fit(run, "distill", train.distill(run._replace(questions=a))[0])
    fit(run, "speak", train.speak(run._replace(questions=a))[0])
    before = judge("before")
    fit(run, "distill", train.distill(run._replace(questions=b_and_replay))[0])
    return before | judge("after")

def gpt(cfg, corpus):
    """A GPT reads the same rows of text, then learns questions and answers as tokens."""
    run = controls.read_gpt(plain(cfg), corpus)
    answers = run.questions.answers
    teachers.save(Path(cfg.out) / "vectors.npz", answers, teachers.own_vectors(run, answers))
    taught = run.questions.where(*cfg.told.split(), phrasing="trained")
    controls.teach_gpt(run, taught, cfg.distill_lr)
    said, _ = controls.gpt_says(run, run.questions)
    return evaluate.by_split(run.questions, "em", controls.matches(run.questions, said))

def constant(cfg, corpus):
    """No model: always the commonest DEC answer of the relation."""
    questions = data.Questions(
        corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size, "cpu")
    answers = {fact_of(row): row.answer for row in corpus.qa if row.split == "DEC"}
    commonest = {}
    for name in {relation for relation, _ in answers}:
        found = sorted(answer for (relation, _), answer in answers.items() if relation == name)
        commonest[name] = max(found, key=found.count)
    said = [commonest.get(row.relation) for row in corpus.qa]
    return evaluate.by_split(questions, "em", controls.matches(questions, said))

KINDS = dict(t_jepa=t_jepa, gpt=gpt, constant=constant, shuffled=shuffled, continual=continual)

def measure(cfg):
    """Train and measure an arm: a dict of figures."""
    cfg = dataclasses.replace(cfg, seed=cfg.seed + cfg.shift)
    corpus = data.load(cfg)
    corpus = corpus._replace(qa=corpus.qa[::cfg.every], cloze=corpus.cloze[::cfg.every])
    if cfg.start:
        begin(cfg)
    vectors = Path(cfg.out) / "vectors.npz"
    if cfg.teacher in ("letters", "random"):
        answers = sorted({row.answer for row in corpus.qa if row.split != "NEVER"})
        teachers.save(vectors, answers, getattr(teachers, cfg.teacher)(answers))
        cfg = dataclasses.replace(cfg, teacher=str(vectors))
    if cfg.teacher in ARMS:
        vectors = folder_of(cfg, cfg.teacher) / "vectors.npz"
        cfg = dataclasses.replace(cfg, teacher=str(vectors))
    return KINDS[cfg.kind](cfg, corpus)

# -- the arms --------------------------------------------------------------------------------------

# what train.py does by default
today = partial(Config, **dataclasses.asdict(train.Config()) | dict(eval_every=10 ** 9))
TWICE = dict(pretrain_steps=Config.pretrain_steps, distill_steps=Config.distill_steps,
             speak_steps=Config.speak_steps)
HALF = dict(pretrain_steps=700, distill_steps=690, speak_steps=490)
# by MSE: latents and tokens; arms that share phase 1, or phases 1 and 2, of latents alone
hybrid = partial(Config, mlm=1.0, pred_embd=128)
distilled = partial(Config, start="latent by MSE", phase="distill")
spoken_from = partial(Config, start="latent by MSE", phase="speak")
LARGE = {name: NOW[name] for name in ("embed_scale", "pretrain_lr")}
LONG = dict(pretrain_steps=3 * Config.pretrain_steps)
OUTSIDE = "vectors.npz"     # of a sentence encoder: the first page tells how to make this file
ARMS = {
    "default": today(),
    "latents alone": today(**train.RECIPES["latent"]),
    "masked LM": today(**controls.MASKED_LM),
    "default without phase 1": today(pretrain_steps=0),
    "GPT": today(kind="gpt"),
    "twice the steps": today(**TWICE),
    "latents alone with twice the steps": today(**TWICE | train.RECIPES["latent"]),
    # its targets, which teach phase 2, are the mean of the four blocks, without the embedding
    "masked LM with twice the steps": Config(**controls.MASKED_LM | LARGE),
    "commonest DEC answer": Config(kind="constant"),
    # by MSE, with a phase 1 of their own
    "hybrid by MSE": hybrid(),
    "latent by MSE": Config(),
    "recipe=paper": Config(**train.RECIPES["paper"]),
    "random-init encoder": Config(pretrain_steps=0),
    "hybrid by MSE from random-init encoder": hybrid(pretrain_steps=0),
    "latent without predictor": Config(variant="NoPredictor"),
    "latent by MSE with wide predictor": Config(pred_embd=128),
    "masked LM with small embeddings": Config(**controls.MASKED_LM),
    "masked LM with small embeddings reads three times as long":
        Config(**controls.MASKED_LM, **LONG),
    "hybrid by MSE with large embeddings": hybrid(**LARGE),
    "hybrid by MSE reads three times as long": hybrid(**LONG),
    "hybrid by MSE with half the steps": hybrid(**HALF),
    "hybrid by MSE with half the steps at twice the rate":
        hybrid(**HALF, pretrain_lr=2e-3, distill_lr=2e-3, speak_lr=2e-3),
    "hybrid by MSE in half the time with narrow predictor":
        hybrid(**HALF | dict(pretrain_steps=900, pred_embd=64, mask_ratio=0.5)),
    # teachers
    "random-init encoder taught by latent by MSE":
        Config(pretrain_steps=0, teacher="latent by MSE"),
    "teacher gpt": distilled(teacher="GPT with small embeddings"),
    "teacher ckpt (without predictor)": distilled(teacher="latent without predictor"),
    "teacher letters (300 wide)": distilled(teacher="letters"),
    "teacher random codes": distilled(teacher="random"),
    "hybrid by MSE teacher all-MiniLM-L6-v2 (384 wide)":
        hybrid(start="hybrid by MSE", phase="distill", teacher=OUTSIDE),
    "hybrid by MSE teacher all-MiniLM-L6-v2 distill_steps=2100":
        hybrid(start="hybrid by MSE", phase="distill", teacher=OUTSIDE, distill_steps=2100),
    "shuffled L_a": distilled(kind="shuffled"),
    "distill_steps=0": distilled(distill_steps=0),
    # what the decoder reads
    "n_slots=1": spoken_from(n_slots=1),
    "echo=0": spoken_from(echo=0.0),
    "memory=tokens": spoken_from(memory="tokens"),
    "both": spoken_from(memory="tokens", variant="BothMemories"),
    # what is taught as tokens
    "LAT told as tokens": spoken_from(told="DEC LAT"),
    "GPT with small embeddings": Config(kind="gpt"),
    "GPT with small embeddings reads three times as long": Config(kind="gpt", **LONG),
    "GPT with small embeddings told LAT too": Config(kind="gpt", told="DEC LAT"),
    # continual learning
    "A then B": distilled(kind="continual"),
    "A then B with a tenth of A": distilled(kind="continual", replay=0.1),
    "A then B with all of A": distilled(kind="continual", replay=1.0),
    # on seeds of their own
    "lever hybrid by MSE": hybrid(shift=10),
    "lever letters distill_steps=2100": hybrid(
        start="lever hybrid by MSE", phase="distill", shift=10, teacher="letters",
        distill_steps=2100),
}
FAST = ("latent by MSE", "masked LM", "teacher letters (300 wide)", "shuffled L_a", "both", "GPT",
        "LAT told as tokens", "GPT with small embeddings told LAT too", "commonest DEC answer",
        "A then B")

# -- running --------------------------------------------------------------------------------------

def quietly(measure, cfg):
    """`measure` without its output: after a few steps figures mean nothing."""
    with redirect_stdout(None):
        return measure(cfg)

def run_lab(lab, arms, flags, measure, fast):
    """Run arms, those that others start from first, and print the tables of the lab's page.

    fast: the arms that --fast runs, one of each kind.
    """
    data.load(Config())         # writes the corpus if it is missing: once, before processes start
    wanted = chosen(flags, arms)
    if flags.fast:
        flags = dataclasses.replace(flags, seeds=1, redo=True)
        wanted = [name for name in wanted if flags.arms or name in fast]
        arms = {name: dataclasses.replace(in_short(cfg), every=40) for name, cfg in arms.items()}
        measure = partial(quietly, measure)
        print(f"{lab} --fast: about a minute; {len(wanted)} arms, and those that they start from")
    needed = [name for arm in wanted for name in (arms[arm].start, arms[arm].teacher)]
    first = [name for name in arms if name in needed]
    rest = [name for name in wanted if name not in first]
    for names in filter(None, (first, rest)):
        rows = run_arms(lab, arms, dataclasses.replace(flags, arms=",".join(names)), measure)
    if flags.fast:
        print("\n".join(f"{name}: ran" for name in first + rest))
    else:
        publish(lab, rows, page_tables(lab, rows), flags.table)

def facts(flags):
    """What the command runs."""
    run_lab("facts", ARMS, flags, measure, FAST)

if __name__ == "__main__":
    main(facts)
