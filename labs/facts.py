"""
Do facts taught in latent space become speech? Teachers, memories, controls; what helps in new phrasings.

    python -m labs.facts --jobs=4                   3 seeds of each arm: phase 1 once a seed, most arms share it
    python -m labs.facts --arms="recipe=latent,n_slots=1"    an arm whose phases others share is run first
    python -m labs.facts --table=README.md          the tables of the first page; --table=labs/README.md: all of them
    python -m labs.facts --fast                     does it run?

Expected before the first run: a random-init encoder is strong in the phrasings that it was taught and weak in new ones;
random codes teach as well as any teacher, as the decoder learns to say whatever stands for an answer; shuffled L_a and
shuffled memory leave nothing; one slot says as much as four for so short answers; token latents alone say DEC and no
LAT; B makes it forget A, and replay cures that; the same-size GPT is better than T-JEPA wherever it was taught, and no
better at what was only read; a GPT that was told LAT facts as tokens is the ceiling.

All arms are latents alone, the papers' T-JEPA (recipe=latent), but for those whose name says otherwise. They share
facts, tokens, width, seeds and, where their name does not say otherwise, steps and learning rates, which were chosen
for recipe=latent. Arms that differ in phase 2 or 3 only share the phases before, of the same seed. The GPT reads the
same rows in phase 1 and has the steps of phases 2 and 3 for the DEC questions, with as many question tokens dropped.
"narrow" arms are the default at a quarter of its size, at three times the rates of phases 1 and 2; those that read or
are taught more came after an arm of labs.distillation had said most TXT, and their GPT and masked LM after them.
A teacher from outside is a file, vectors.npz, which the first page tells how to make; without it its arms fail, last.
The levers ask what would lift held-out phrasings, of train.py's default, and of a teacher from outside: they run on
seeds of their own (10, 11, ...), so that the seeds of all other tables choose nothing. The held-out phrasings are the
same three, for there is no other set.
"""
import copy
import dataclasses
import functools
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import data
import evaluate
import tjepa
import train
from data.facts import prepare
from labs import teachers
from labs.arms import FAILURES, chosen, in_short, main, results, run_arms
from labs.controls import MASKED_LM, MaskedLM
from labs.distillation import FASTER, SIZES
from labs.llm_jepa import join
from labs.tables import publish, tables

SEVERAL = 10        # the first seed of the levers

@dataclasses.dataclass
class Config(train.Config):
    """An arm: flags of train.py, and what only an experiment changes. {NAME} in teacher is the folder of that arm."""
    mlm: float = train.LATENT["mlm"]    # latents alone, as the papers have it: their claims are tested here
    pred_embd: int = train.LATENT["pred_embd"]  # and a predictor half as wide; arms called default take train.py's
    eval_every: int = 10 ** 9   # a phase is measured at its beginning and at its end
    way: str = "t-jepa"         # t-jepa: train.py's phases | gpt | constant: no model | shuffled L_a | continual: A, B
    start: str = ""             # the arm whose phases before `phase` are copied; "": all phases of its own
    text: str = "plain"         # phase 1 reads: plain | wordings: 12 of a statement, not 7 | questions: DEC's too
    told: str = "DEC"           # splits that the decoder, or the GPT, is taught as tokens
    beside: str = ""            # the token latents beside an echo: "" its own | question: of another | nothing
    errors: float = 0.0         # share of tokens dropped where phase 3 thinks; an echo then errs as those thoughts do
    replay: float = 0.0         # share of A's questions that are asked again while B is taught
    shift: int = 0              # added to the seed: levers are chosen on seeds that no other table uses
    every: int = 1              # every so many-th question only, for --fast

def plain(cfg, **changes):
    """The train.Config in cfg."""
    shared = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(train.Config)}
    return train.Config(**shared | changes)

# -- what is read ------------------------------------------------------------------------------------------------------
def templates():
    """(relation, statement | question | heldout) -> its templates."""
    found = {}
    for relation, kind, template in prepare.read_tsv("templates.tsv"):
        found.setdefault((relation, kind), []).append(template)
    return found

def statements(cfg, corpus):
    """Each fact, (subject, relation, answer, split), and templates of its statements: the held-out one comes first."""
    said = templates()
    for fact, item in zip(prepare.select(cfg.facts), corpus.cloze, strict=True):
        wordings = said[fact[1], "statement"]
        yield fact, sorted(wordings, key=lambda template: prepare.sentence(template, fact[0]) != item.statement)

def retold(cfg, corpus):
    """The text of the same facts in other words, as a `data.Text`; the held-out wordings stay out of it."""
    rng, encode, asking, subjects, said = random.Random(0), corpus.tokenizer.encode_batch, templates(), {}, []
    for (subject, relation, answer, split), wordings in statements(cfg, corpus):
        wordings = wordings[1:] if cfg.text == "wordings" else wordings[1:prepare.WORDINGS]
        sentences = [prepare.sentence(template, subject, answer) for template in wordings]
        if cfg.text == "questions" and split == "DEC":      # a fifth of the text; LAT and TXT are never asked here
            asked = rng.sample(asking[relation, "question"], 4)
            sentences += [f"{prepare.sentence(question, subject)} {answer}." for question in asked]
        subjects.setdefault(subject, []).append(len(said))
        said.append(encode([" " + sentence for sentence in sentences]))
    rows = prepare.paragraphs(said, list(subjects.values()), cfg.block_size, prepare.EPOCHS[cfg.facts], rng)
    flat = [token for row in rows for token in row + [corpus.tokenizer.eos]]
    return data.Text(np.array(flat, dtype=np.uint16), cfg.block_size, corpus.tokenizer, f"--text={cfg.text}")

def corpus_of(cfg):
    """What an arm reads and is asked."""
    corpus = data.load(cfg)
    train_text = corpus.train if cfg.text == "plain" else retold(cfg, corpus)
    return corpus._replace(train=train_text, qa=corpus.qa[::cfg.every], cloze=corpus.cloze[::cfg.every])

# -- a run that others have begun --------------------------------------------------------------------------------------
def folder_of(cfg, arm):
    """The folder of another arm with the seed of cfg."""
    return Path(cfg.out).parent / f"{arm}_{Path(cfg.out).name.rsplit('_', 1)[1]}"

def begin(cfg):
    """Copy the checkpoint of the phase before the first one of cfg."""
    source = folder_of(cfg, cfg.start) / train.PHASES[train.PHASES.index(cfg.phase) - 1] / "ckpt.pt"
    if not source.exists():
        raise ValueError(f"--arms: {source} is missing: run --arms='{cfg.start}' --redo first")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    shutil.copy(source, cfg.out)

def open_run(cfg, fresh=()):
    """(`train.Run`, its questions, the concepts (A, D) or None) of the run in cfg.out. fresh: as in `train.build`."""
    saved, made, corpus = train.load_checkpoint(cfg.out), plain(cfg), corpus_of(cfg)
    device, dtype = train.pick_device(made)
    model = train.build(made, corpus.tokenizer, saved["model"], fresh).to(device)
    questions = data.Questions(corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size, device)
    concepts = saved["concepts"] if saved["concepts"] is None else saved["concepts"].to(device)
    return train.Run(made, model, corpus, device, dtype), questions, concepts

def fact_of(row):
    """Which fact a question asks for."""
    return row.relation, row.subject

def relabel(questions, split):
    """The same questions where split(row) is the split of each: what a phase of train.py teaches follows from that."""
    part = copy.copy(questions)
    part.rows = [row._replace(split=split(row)) for row in questions.rows]
    return part

# -- figures -----------------------------------------------------------------------------------------------------------
def as_trained(run):
    """The run, asked for what it was trained for: a masked LM for tokens, as its latent predictions never learned. Of
    a run that has both the latents are asked."""
    return run._replace(model=MaskedLM(run.model, mean=True)) if run.cfg.loss == "none" else run

def energies(run, subject, values, wordings):
    """Energy of each value (A strings) in statements (W templates) about a subject: (W, A)."""
    gaps, tokenizer = [prepare.sentence(template, subject).split("{a}") for template in wordings], run.corpus.tokenizer
    return torch.stack([evaluate.gap_energy(run, tokenizer, before, values, after) for before, after in gaps])

@torch.no_grad()
def ranked(run, every=1):
    """What was only read, asked without any teaching: the answer whose statement has the lowest energy. Share of TXT
    facts: in the held-out wording, and by the mean over the wordings that were read; and chance. auroc_energy: that
    lowest energy as a sign of not knowing, invented subjects against DEC facts, in wordings not read of either."""
    right = {"energy_TXT_heldout": [], "energy_TXT": [], "energy_chance": []}
    least, values, said, rng = {"DEC": [], "NEVER": []}, {}, templates(), random.Random(0)
    facts = list(statements(run.cfg, data.load(run.cfg)))       # of the whole corpus: it is in the order of the facts
    for (_, relation, answer, _), _ in facts:
        values.setdefault(relation, []).append(answer)
    values = {relation: sorted(set(answers)) for relation, answers in values.items()}
    for (subject, relation, answer, split), wordings in facts[::every]:
        if split == "TXT":
            energy = energies(run, subject, values[relation], wordings[:prepare.WORDINGS])              # (W, A)
            for name, of in ("energy_TXT_heldout", energy[0]), ("energy_TXT", energy[1:].mean(0)):
                right[name].append(values[relation][of.argmin().item()] == answer)
            right["energy_chance"].append(1 / len(values[relation]))
        if split == "DEC":
            least["DEC"].append(energies(run, subject, values[relation], wordings[:1]).min())
    for subject, relation in prepare.read_tsv("invented.tsv")[::every]:
        if relation in values:
            wording = rng.choice(said[relation, "statement"][:prepare.WORDINGS])
            least["NEVER"].append(energies(run, subject, values[relation], [wording]).min())
    known, invented = torch.stack(least["DEC"]), torch.stack(least["NEVER"])                            # (n,), (m,)
    return ({name: sum(found) / len(found) for name, found in right.items()}
            | dict(auroc_energy=(invented[:, None] > known).float().mean().item()))

@torch.no_grad()
def readouts(run, questions, concepts):
    """What else the thoughts tell, beside `evaluate.recall`, whose R@1 knows the relation that is asked about.
    r2: 1 - MSE / MSE of always giving the mean answer of the relation. r1_all: R@1 among all answers, of any relation.
    em_snapped: exact match if the decoder is given the concept nearest to the thought, among all, and not the thought.
    auroc_NAME: as auroc, of other signs of not knowing than the distance to the nearest concept."""
    thoughts, own = evaluate.think_all(run, questions.tokens).latent, concepts[questions.answer_of]     # (n, D)
    rivals = questions.rivals.float()                                                                   # (n, A)
    means = rivals @ concepts / rivals.sum(1, keepdim=True).clamp(min=1)                                # (n, D)
    error, spread = (evaluate.by_split(questions, "r2", ((x - own) ** 2).mean(1)) for x in (thoughts, means))
    distance = torch.cdist(thoughts, concepts)                                                          # (n, A)
    nearest, two = distance.argmin(1), distance.topk(2, largest=False).values                           # (n,), (n, 2)
    figures = {name: 1 - error[name] / spread[name] for name in error if spread[name]}
    figures |= evaluate.by_split(questions, "r1_all", nearest == questions.answer_of)
    if run.cfg.memory == "thought":     # then there are only so many things to say
        empty = concepts.new_zeros(len(concepts), 0)
        said = evaluate.say(run, tjepa.Thought(concepts, empty, empty))
        snapped = [said[i] == row.answer for i, row in zip(nearest.tolist(), questions.rows)]
        figures |= evaluate.by_split(questions, "em_snapped", torch.tensor(snapped, device=run.device))
    signs = dict(cosine=1 - (F.normalize(thoughts, dim=1) @ F.normalize(concepts, dim=1).T).amax(1),
                 relation=distance.masked_fill(rivals == 0, torch.inf).amin(1),
                 margin=two[:, 0] - two[:, 1], length=-thoughts.norm(dim=1))
    return figures | {f"auroc_{name}": evaluate.abstention(questions, sign)["auroc"] for name, sign in signs.items()}

# -- the ways of an arm ------------------------------------------------------------------------------------------------
def t_jepa(cfg):
    """The phases of train.py; each leaves its checkpoint to the arms that share it."""
    figures, corpus = {}, corpus_of(cfg)
    for phase in train.PHASES[train.PHASES.index(cfg.phase):] if cfg.start else train.PHASES:
        if phase == "speak":    # the width that phase 2 found its teacher to have
            width = train.load_checkpoint(cfg.out)["config"]["teacher_width"]
            cfg = dataclasses.replace(cfg, teacher_width=width)
        if phase == "speak" and (cfg.told, cfg.beside, cfg.errors) != ("DEC", "", 0):
            return figures | speak_otherwise(cfg)
        figures |= train.run(plain(cfg, phase=phase), corpus)
        if not cfg.start:
            (Path(cfg.out) / phase).mkdir(exist_ok=True)
            shutil.copy(Path(cfg.out) / "ckpt.pt", Path(cfg.out) / phase)
        if phase == "pretrain" and cfg.teacher == "self" and not cfg.shift:
            asked = as_trained(open_run(cfg)[0])
            figures |= ranked(asked, cfg.every) | evaluate.cloze(asked, "capital")
    return figures | readouts(*open_run(cfg))

def speak_otherwise(cfg):
    """Phase 3 with other splits taught as tokens, other token latents beside an echo, or an echo that errs."""
    run, questions, concepts = open_run(cfg, ["decoder."])
    taught = relabel(questions, lambda row: "DEC" if row.split in cfg.told.split() else row.split)
    for wanted, change in (cfg.beside, beside), (cfg.errors, erring):
        if wanted:
            run.model.speak_loss = functools.partial(change, cfg, run.model.speak_loss)
    run.model.think = functools.partial(run.model.think, drop=cfg.errors)
    loss_at = train.speak(run, taught, concepts)[0]     # which thinks all that the decoder will hear
    del run.model.think
    teachers.fit(run, "speak", loss_at)
    return evaluate.exact_match(run, questions, evaluate.think_all(run, questions.tokens))

def erring(cfg, speak_loss, thought, words, latents, alpha):
    """An echo's latent is off by what one of the batch's questions is off, by chance. Noise is the same in all
    directions; what thoughts of new wordings get wrong is not."""
    n_ask, latent = len(words) - round(len(words) * cfg.echo), thought.latent.clone()   # (B, D)
    error = latent[:n_ask] - latents[:n_ask]                                            # (questions, D)
    latent[n_ask:] += error[torch.randint(n_ask, (len(words) - n_ask,))]
    return speak_loss(thought._replace(latent=latent), words, latents, alpha)

def beside(cfg, speak_loss, thought, *rest):
    """Token latents beside the echoes, the last of a batch's rows: of one of its questions, by chance, or none. As
    train.py has it they are those of the answer's own words, and copying them is easier than to read a thought."""
    rows = torch.arange(len(thought.latent))
    n_ask = len(rows) - round(len(rows) * cfg.echo)
    rows[n_ask:] = torch.randint(n_ask, (len(rows) - n_ask,))
    context, real = thought.context[rows], thought.real[rows]                           # (B, T, C), (B, T)
    if cfg.beside == "nothing":
        real[n_ask:] = False
    return speak_loss(thought._replace(context=context, real=real), *rest)

def shuffled(cfg):
    """Phase 2 gives each fact the answer latent of another one; phase 3 is as ever. What it says then is what the
    decoder knows by itself, or has by chance."""
    run, questions, _ = open_run(cfg)
    concepts = train.teach(run, questions, None)
    teachers.fit(run, "distill", train.distill(run, crossed(questions, cfg.seed), concepts)[0])
    teachers.fit(run, "speak", train.speak(run, questions, concepts)[0])
    said = evaluate.exact_match(run, questions, evaluate.think_all(run, questions.tokens))
    return evaluate.recall(run, questions, concepts) | said | readouts(run, questions, concepts)

def crossed(questions, seed):
    """The same questions where the answer of each fact that is taught is that of another fact, in all phrasings."""
    facts, part = list(map(fact_of, questions.rows)), copy.copy(questions)
    answers = {fact: n for fact, row, n in zip(facts, questions.rows, questions.answer_of.tolist())
               if row.split in ("DEC", "LAT")}
    others = dict(zip(answers, random.Random(seed).sample(list(answers.values()), len(answers))))
    part.answer_of = torch.tensor([others.get(fact, 0) for fact in facts], device=questions.tokens.device)  # (n,)
    return part

def in_halves(questions, replay, seed):
    """Facts that are taught, every second one of each relation in A, the others in B -> (A's questions and B's, what is
    taught at first, what is taught then): B, and a share of A's questions, drawn once."""
    rng, taught = random.Random(seed), [row for row in questions.rows if row.split in ("DEC", "LAT")]
    first = set(sorted(set(map(fact_of, taught)))[::2])
    halves = {name: [row.split in ("DEC", "LAT") and (fact_of(row) in first) == a for row in questions.rows]
              for name, a in (("A", True), ("B", False))}
    halves = {name: questions.pick(torch.tensor(kept).nonzero()[:, 0]) for name, kept in halves.items()}
    return (halves, relabel(questions, lambda row: row.split if fact_of(row) in first else "TXT"),
            relabel(questions, lambda row: "TXT" if fact_of(row) in first and rng.random() >= replay else row.split))

def continual(cfg):
    """Phases 2 and 3 with half of the facts, A; then phase 2 goes on with the others, B, and the decoder stays as it
    is: is A still known, and is B spoken, of which the decoder saw no question?"""
    run, questions, _ = open_run(cfg)
    concepts, (halves, a, b) = train.teach(run, questions, None), in_halves(questions, cfg.replay, cfg.seed)

    def judge(when):
        """The two halves, in held-out phrasings."""
        found = {name: evaluate.recall(run, half, concepts) | evaluate.exact_match(
            run, half, evaluate.think_all(run, half.tokens)) for name, half in halves.items()}
        return {f"{figure}_{name}_{when}": found[name][figure] for name in found for figure in (
            "r1_LAT_heldout", "em_LAT_heldout", "em_DEC_heldout")}
    teachers.fit(run, "distill", train.distill(run, a, concepts)[0])
    teachers.fit(run, "speak", train.speak(run, a, concepts)[0])
    figures = judge("before")
    teachers.fit(run, "distill", train.distill(run, b, concepts)[0])
    return figures | judge("after")

def gpt(cfg):
    """A GPT that reads the same rows, gives its answer vectors to the arm that has it as a teacher, and is then taught
    to answer, with as many steps as phases 2 and 3 have."""
    corpus, out = corpus_of(cfg), Path(cfg.out)
    run = teachers.read_gpt(plain(cfg, pretrain_steps=0 if cfg.start else cfg.pretrain_steps), corpus)
    questions = data.Questions(corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size, run.device)
    if cfg.start:
        weights = torch.load(folder_of(cfg, cfg.start) / "gpt.pt", map_location=run.device, weights_only=True)
        run.model.load_state_dict(weights)
    else:
        torch.save(run.model.state_dict(), out / "gpt.pt")
        teachers.save(out / "vectors.npz", questions.answers, teachers.gpt_vectors(run, questions.answers))
    taught = plain(cfg, speak_steps=cfg.distill_steps + cfg.speak_steps, speak_lr=cfg.distill_lr)
    teachers.fit(run._replace(cfg=taught), "speak", answering(run, questions, cfg))
    said = gpt_says(run, questions)
    right = torch.tensor([words == row.answer for words, row in zip(said, questions.rows)], device=run.device)
    return evaluate.by_split(questions, "em", right)

def constant(cfg):
    """No model: always the commonest DEC answer of the relation."""
    corpus, answers = corpus_of(cfg), {}
    questions = data.Questions(corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size, "cpu")
    for (relation, _), answer in {fact_of(row): row.answer for row in corpus.qa if row.split == "DEC"}.items():
        answers.setdefault(relation, []).append(answer)
    commonest = {relation: max(sorted(set(said)), key=said.count) for relation, said in answers.items()}
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    right = torch.tensor([commonest.get(row.relation) == row.answer for row in corpus.qa])              # (n,)
    return evaluate.by_split(questions, "em", right)

def answering(run, questions, cfg):
    """loss_at of a GPT that is taught to answer: [BOS] question answer [EOS], cross-entropy of answer and EOS."""
    model, asked = run.model, questions.where(*cfg.told.split(), phrasing="trained")
    pad, tokens = model.cfg.pad, questions.tokens[asked]                                                # (n, Q)
    words = questions.answer_tokens[questions.answer_of[asked]]                                         # (n, A)
    text, length = join(pad, model.cfg.bos, tokens, words, model.cfg.eos), (tokens != pad).sum(1)       # (n, T), (n,)
    place = torch.arange(text.size(1) - 1, device=run.device)                                           # (T-1,)
    question = (place > 0) & (place <= length[:, None])                                                 # (n, T-1)
    goal = text[:, 1:].masked_fill((place < length[:, None]) | (text[:, 1:] == pad), -1)                # (n, T-1)

    def loss_at(progress):
        """Questions, drawn anew, some of their tokens hidden as in phase 2."""
        which = torch.randint(len(asked), (cfg.qa_batch_size // cfg.accum,), device=run.device)
        hidden = question[which] & (torch.rand(len(which), len(place), device=run.device) < cfg.question_drop)
        return model(text[which, :-1].masked_fill(hidden, model.cfg.mask), goal[which])[1], {}
    return loss_at

@torch.no_grad()
def gpt_says(run, questions):
    """What a GPT answers, greedily: n strings. Equally long questions go together: nothing is padded."""
    eos, n = run.model.cfg.eos, questions.answer_tokens.size(1) + 1         # the longest answer, and its EOS
    lengths, said = (questions.tokens != run.model.cfg.pad).sum(1), [""] * len(questions.rows)          # (n,)
    for length in lengths.unique().tolist():
        which = (lengths == length).nonzero()[:, 0]
        prompt = F.pad(questions.tokens[which, :length], (1, 0), value=run.model.cfg.bos)               # (m, 1+Q)
        with run.autocast():
            ids = run.model.generate(prompt, n)                                                         # (m, n)
        ids = ids.masked_fill((ids == eos).cumsum(1) > 0, eos)              # decode leaves specials out
        for i, row in zip(which.tolist(), ids.tolist()):
            said[i] = run.corpus.tokenizer.decode(row).strip()
    return said

def measure(cfg):
    """Run an arm: a dict of figures."""
    cfg = dataclasses.replace(cfg, seed=cfg.seed + cfg.shift,
                              teacher=re.sub(r"{(.*?)}", lambda arm: str(folder_of(cfg, arm[1])), cfg.teacher))
    if cfg.teacher in ("letters", "random"):
        answers = sorted({row.answer for row in corpus_of(cfg).qa if row.split != "NEVER"})
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        teachers.save(path := Path(cfg.out) / "vectors.npz", answers, getattr(teachers, cfg.teacher)(answers))
        cfg = dataclasses.replace(cfg, teacher=str(path))
    if cfg.start and cfg.way != "gpt":
        begin(cfg)
    way = {"t-jepa": t_jepa, "gpt": gpt, "constant": constant, "shuffled": shuffled, "continual": continual}[cfg.way]
    return way(cfg)

# -- the arms ----------------------------------------------------------------------------------------------------------
def distilled(**change):
    """An arm that shares phase 1 of latents alone."""
    return Config(start="recipe=latent", phase="distill", **change)

def spoken(**change):
    """An arm that shares phases 1 and 2 of latents alone."""
    return Config(start="recipe=latent", phase="speak", **change)

def lever(start="lever default", **change):
    """An arm on the seeds that choose, of train.py's default."""
    return Config(start=start, shift=SEVERAL, **DEFAULT | change)

DEFAULT = dict(mlm=train.Config.mlm, pred_embd=train.Config.pred_embd)
RATES = dict(pretrain_lr=FASTER * train.Config.pretrain_lr, distill_lr=FASTER * train.Config.distill_lr)
# a quarter of the default at the rates that were tuned for it as a student of labs.distillation: what said most TXT
# there had read seven times as much, and been taught so; which of the two was it?
NARROW = DEFAULT | SIZES["medium"] | RATES
AS_LONG = dict(pretrain_steps=3 * train.Config.pretrain_steps)
READS_7 = dict(pretrain_steps=2800, batch_size=96)      # times 2, as there; the default reads 800 steps of 48 rows
TAUGHT_8 = dict(distill_steps=2800, qa_batch_size=256)  # and has 700 steps of 128 questions; phase 3 then has 256 too
OUTSIDE = "vectors.npz"         # a sentence encoder's vectors of the answers: the first page tells how to make the file
READ = {        # arms with a phase 1 of their own
    "default": Config(**DEFAULT),
    "recipe=latent": Config(**train.RECIPES["latent"]),
    "recipe=paper": Config(**train.RECIPES["paper"]),
    "random-init encoder": Config(pretrain_steps=0),
    "default from random-init encoder": Config(pretrain_steps=0, **DEFAULT),
    "latent without predictor": Config(pred_layer=0),
    "latent with wide predictor": Config(pred_embd=train.Config.pred_embd),
    "masked LM": Config(**MASKED_LM),
    "masked LM reads three times as long": Config(**MASKED_LM | AS_LONG),
    "default with narrow predictor": Config(mlm=1.0),
    "default without predictor": Config(mlm=1.0, pred_layer=0),
    "default without predictor mlm=.3": Config(mlm=0.3, pred_layer=0),
    "default reads three times as long": Config(**DEFAULT | AS_LONG),
    "latent reads three times as long": Config(**AS_LONG),
    "default at three times the rates": Config(**DEFAULT | RATES),
    "narrow": Config(**NARROW),
    "narrow reads three times as long": Config(**NARROW | AS_LONG),
    "narrow reads 7 times as much": Config(**NARROW | READS_7),
    "narrow is taught 8 times as much": Config(**NARROW | TAUGHT_8),
    "narrow reads 7 times as much and is taught 8 times": Config(**NARROW | READS_7 | TAUGHT_8),
    "default reads 7 times as much and is taught 8 times": Config(**DEFAULT | READS_7 | TAUGHT_8),
    "latent text in 12 wordings": Config(text="wordings"),
    "latent text with questions of DEC": Config(text="questions"),
}
TEACHERS = {
    "random-init encoder taught by recipe=latent": Config(pretrain_steps=0, teacher="ckpt:{recipe=latent}/pretrain"),
    "teacher gpt": distilled(teacher="{GPT}/vectors.npz"),
    "teacher ckpt (without predictor)": distilled(teacher="ckpt:{latent without predictor}/pretrain"),
    "teacher letters (300 wide)": distilled(teacher="letters"),
    "teacher random codes": distilled(teacher="random"),
    **{f"default teacher {name}": Config(start="default", phase="distill", teacher=file, **DEFAULT) for name, file in {
        "gpt": "{GPT}/vectors.npz", "letters (300 wide)": "letters", "random codes": "random",
        "all-MiniLM-L6-v2 (384 wide)": OUTSIDE}.items()},
    "default teacher all-MiniLM-L6-v2 distill_steps=2100": Config(start="default", phase="distill", teacher=OUTSIDE,
                                                                  **DEFAULT | dict(distill_steps=2100)),
    "shuffled L_a": distilled(way="shuffled"),
    "distill_steps=0": distilled(distill_steps=0),
}
MEMORY = {
    "n_slots=1": spoken(n_slots=1),
    "n_slots=16": spoken(n_slots=16),
    "echo=0": spoken(echo=0.0),
    "memory=tokens": spoken(memory="tokens"),
    "both": spoken(memory="both"),
    "both memory_drop=.5": spoken(memory="both", memory_drop=0.5),
    "both memory_drop=.9": spoken(memory="both", memory_drop=0.9),
    "both echo beside nothing": spoken(memory="both", beside="nothing"),
    "both echo beside a question": spoken(memory="both", beside="question"),
    "both echo beside a question memory_drop=.5": spoken(memory="both", beside="question", memory_drop=0.5),
}
TOLD = {
    "LAT told as tokens": spoken(told="DEC LAT"),
    "commonest DEC answer": Config(way="constant"),
    "GPT": Config(way="gpt"),
    "GPT reads three times as long": Config(way="gpt", **AS_LONG),
    "GPT told LAT too": Config(way="gpt", start="GPT", told="DEC LAT"),
    # 10 layers have as many weights as recipe=latent, 12 as the default; 5 or 6 cost a short answer as many FLOPs
    **{f"GPT of {depth} layers": Config(way="gpt", n_layer=depth) for depth in (5, 6, 10, 12)},
}
CONTINUAL = {
    "A then B": distilled(way="continual"),
    "A then B with a tenth of A": distilled(way="continual", replay=0.1),
    "A then B with all of A": distilled(way="continual", replay=1.0),
}
LEVERS = {f"lever {name}": cfg for name, cfg in {
    "default": lever(""),
    "distill_steps=1500": lever(phase="distill", distill_steps=1500),
    "distill_lr=1e-3": lever(phase="distill", distill_lr=1e-3),
    "question_drop=.4": lever(phase="distill", question_drop=0.4),
    "speak_steps=1500": lever(phase="speak", speak_steps=1500),
    "noise=.3": lever(phase="speak", noise=0.3),
    "noise=.6": lever(phase="speak", noise=0.6),
    "echo=.9": lever(phase="speak", echo=0.9),
    "n_slots=16": lever(phase="speak", n_slots=16),
    "errors=.3": lever(phase="speak", errors=0.3),
    "errors=.3 noise=.2": lever(phase="speak", errors=0.3, noise=0.2),
    "letters": lever(phase="distill", teacher="letters"),
    "letters distill_steps=2100": lever(phase="distill", teacher="letters", distill_steps=2100),
    "letters distill_lr=2e-3": lever(phase="distill", teacher="letters", distill_lr=2e-3),
    "letters distill_steps=2100 distill_lr=2e-3": lever(phase="distill", teacher="letters", distill_steps=2100,
                                                        distill_lr=2e-3),
    "letters noise=.7": lever(phase="distill", teacher="letters", noise=0.7),
    "letters speak_steps=1500": lever(phase="distill", teacher="letters", speak_steps=1500),
}.items()}
ARMS = READ | TEACHERS | MEMORY | TOLD | CONTINUAL | LEVERS

def by_phrasing(figure, *splits, title=""):
    """Columns: a figure by split and phrasing."""
    return {f"{title}{split} {phrasing}": f"{figure}_{split}{tail}" for split in splits
            for phrasing, tail in (("trained", ""), ("held-out", "_heldout"))}

def some(*names):
    """Some of the arms."""
    return {name: ARMS[name] for name in names}

PHASE_1 = {"R2": "val_r2", "rank": "rank", "health": "health", "capital by energy (chance .025)": "cloze_capital",
           "among all of the world (.0055)": "cloze_capital_all"}
R1 = by_phrasing("r1", "DEC", "LAT", title="R@1 ")
EM = by_phrasing("em", "DEC", "LAT", "TXT") | {"memory shuffled": "em_shuffled"}
NEVER = {"answered with I don't know": "abstain", "AUROC": "auroc"}
HELD_OUT = {f"{title} {split}": f"{figure}_{split}_heldout" for split in ("DEC", "LAT") for title, figure in (
    ("R@1", "r1"), ("MRR", "mrr"), ("R2", "r2"))}
TXT = by_phrasing("em", "TXT", title="EM ") | by_phrasing("r1", "TXT", title="R@1 ") | {
    "EM, nearest concept said": "em_snapped_TXT_heldout", "by energy, wordings read": "energy_TXT",
    "by energy, held-out wording": "energy_TXT_heldout", "chance": "energy_chance"}
SIGNS = {"AUROC of the distance": "auroc", "cosine": "auroc_cosine", "distance within the relation": "auroc_relation",
         "margin": "auroc_margin", "length": "auroc_length", "energy of a statement": "auroc_energy"}
SNAPPED = by_phrasing("r1_all", "DEC", "LAT", title="R@1 of all ") | by_phrasing("em", "DEC", "LAT", title="EM ") | \
    by_phrasing("em_snapped", "DEC", "LAT", title="EM, nearest concept said, ")
AFTER = {f"{title} of {half}, {when} B": f"{figure}_heldout_{half}_{when}" for half, whens in (
    ("A", ("before", "after")), ("B", ("before", "after"))) for when in whens
    for title, figure in (("R@1 LAT", "r1_LAT"), ("EM LAT", "em_LAT"), ("EM DEC", "em_DEC"))}

FRONT = some("default", "default reads three times as long", "recipe=latent", "latent with wide predictor",
             "recipe=paper", "random-init encoder", "default from random-init encoder")
FIRST = {"Phase 1": (FRONT, PHASE_1), "R@1 of the thought after phase 2": (FRONT, R1),
         "Exact match of greedy speech": (
             FRONT | some("GPT", "GPT reads three times as long", "commonest DEC answer"), EM),
         "Invented subjects, at the threshold that keeps 95 % of DEC held-out": (FRONT, NEVER)}
ALL = {"Phase 1": (READ, PHASE_1), "What phase 1 is worth for speech": (READ, EM),
       "Teachers and their controls: thoughts in held-out phrasings, R2 over the mean of the relation": (
           some("recipe=latent", "random-init encoder", "default") | TEACHERS, HELD_OUT),
       "Teachers and their controls: exact match": (
           some("recipe=latent", "random-init encoder", "default") | TEACHERS, EM),
       "What the decoder reads (recipe=latent: the thought in 4 slots)": (some("recipe=latent") | MEMORY, EM),
       "Taught as tokens, and GPTs": (some("recipe=latent") | TOLD, EM),
       "Only read (TXT): attempts": (
           READ | some("GPT", "GPT reads three times as long", "GPT of 10 layers", "GPT of 12 layers",
                        "commonest DEC answer"), TXT),
       "The nearest concept instead of the thought": (READ | some("teacher gpt", "teacher random codes"), SNAPPED),
       "NEVER: signs of not knowing": (READ | TEACHERS, SIGNS),
       "Facts A, then facts B; the decoder has seen A only; held-out phrasings": (CONTINUAL, AFTER),
       "Levers, on seeds of their own": (LEVERS, R1 | EM | {"EM LAT held-out, nearest concept said":
                                                            "em_snapped_LAT_heldout"} | NEVER)}

def facts(flags):
    """Run the arms, those that others begin with first; write the tables."""
    data.load(Config())         # writes the corpus if it is missing: once, and not in each of the processes
    arms, failed = ARMS, []
    if flags.fast:
        flags = dataclasses.replace(flags, seeds=1)
        arms = {name: dataclasses.replace(in_short(cfg), every=40) for name, cfg in ARMS.items()}
        evaluate.draw_curves = lambda rows, phases, path: None          # it takes longer than all else then
    wanted = chosen(flags, arms)
    first = {name for arm in wanted for name in [arms[arm].start, *re.findall("{(.*?)}", arms[arm].teacher)] if name}
    # the file of the last ones may be missing
    rest = sorted((name for name in wanted if name not in first), key=lambda name: arms[name].teacher == OUTSIDE)
    for names in filter(None, (list(first), rest)):
        try:
            run_arms("facts", arms, dataclasses.replace(flags, arms=",".join(names)), measure)
        except FAILURES as error:       # it comes at the end: what does not hang on that arm runs and is shown
            failed.append(error)
    rows, shown = results("facts", flags), FIRST if Path(flags.table) == Path("README.md") else ALL
    publish("facts", rows, tables(rows, shown), "" if failed else flags.table)      # no page loses rows to a failure
    if failed:
        raise failed[0]


if __name__ == "__main__":
    main(facts)
