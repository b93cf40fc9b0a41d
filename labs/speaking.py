"""
Think, then speak: what does the latent loss of phase 3 bring, does speech follow the thought, and
what is said when nothing is known?

    python -m labs.speaking --jobs=4        3 seeds of each arm; phases 1 and 2 once a seed
    python -m labs.speaking --fast          a few steps of each kind of arm: does it run?

Expected before the first run: alpha = 0 (v2.0) ties or wins, whatever the schedule; a shuffled
latent target does no harm; the gradients of the two losses are about orthogonal, phased or joint; a
fine-tuned encoder gains DEC and forgets LAT; edits of the thought are followed, random ones are
not; without the memory only the commonest answers are left; invented subjects lie farther from the
concepts, but a GPT's probabilities separate them as well; "I don't know" has to be taught.

Arms of a seed share text, batches, 500 steps of phase 3, and a copy of phases 1 and 2; `joint` has
both losses in 700 steps. The GPT is as deep as encoder and decoder together. Half of the invented
subjects teach "I don't know" in three arms; no arm is judged on these.
"""
import dataclasses
import math
from functools import partial

import torch
from torch.nn import functional as F

import data
import evaluate
import train
from labs import controls, grounding, measures
from labs.arms import main
from labs.facts import begin, keep, relabel, run_lab
from labs.grounding import IDK, answers_of, least_likely, silent, think, trust
from labs.runs import NO_TOKENS, Arm, fit, open_run, plain, train_arm

SHARED = "phases 1 and 2"       # the arm from which the others start
SCHEDULES = dict(               # weight of the latent loss over alpha_start, by progress 0 to 1
    annealed=lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
    reversed=lambda progress: 0.5 - 0.5 * math.cos(math.pi * progress),
    constant=lambda progress: 1.0)

@dataclasses.dataclass
class Config(Arm):
    """An arm, which trains the phases from cfg.phase on. Latents alone by MSE, as in v1.1."""
    mlm: float = NO_TOKENS["mlm"]
    pred_embd: int = NO_TOKENS["pred_embd"]
    eval_every: int = 100           # steps between two looks at the gradients
    phase: str = "speak"
    start: str = SHARED             # the arm whose phases before `phase` are copied
    kind: str = "speaker"           # phases_1_and_2 | speaker | gpt | lookup
    alpha: str = "annealed"         # how alpha_start moves, one of SCHEDULES
    goal: str = "own"               # target of the latent head: own | shuffled: another answer's
    encoder: str = "frozen"         # frozen | tuned: trained in phase 3 | joint | random
    no_memory: bool = False         # the thought is always 0
    idk: bool = False               # half of the invented subjects teach "I don't know"
    every: int = 1                  # only every n-th question, for --fast

# -- what an arm starts from -----------------------------------------------------------------------

def pick_questions(corpus, cfg):
    """The questions to ask. Every second invented subject is put aside: its split is IDK where it
    teaches that, else it is left out. Nonsense and made-up subjects, each asked once, stay."""
    invented = [row.subject for row in corpus.qa
                if row.split == "NEVER" and row.phrasing in ("trained", "heldout")]
    aside = set(list(dict.fromkeys(invented))[::2])
    rows = [row._replace(split="IDK") if row.split == "NEVER" and row.subject in aside else row
            for row in corpus.qa]
    return [row for row in rows if cfg.idk or row.split != "IDK"][::cfg.every]

def lessons_of(questions):
    """The same questions, where IDK rows are taught like DEC rows."""
    return relabel(questions, lambda row: "DEC" if row.split == "IDK" else row.split)

def corpus_of(cfg):
    """The corpus of an arm, with the questions to ask."""
    corpus = data.load(plain(cfg))
    return corpus._replace(qa=pick_questions(corpus, cfg))

def start(cfg):
    """A `train.Run` after the phases before cfg.phase, with a new decoder."""
    begin(cfg)
    fresh = [""] if cfg.encoder == "random" else ["decoder."]
    run = open_run(cfg, corpus_of(cfg), fresh)._replace(cfg=cfg)
    if cfg.phase == "distill" or cfg.encoder == "random":
        return run._replace(concepts=train.set_answers(run, None))
    # phase 2 has set the scale of thoughts
    with torch.no_grad():
        latents = run.model.concept(run.questions.answer_tokens)
    return run._replace(concepts=run.model.standardise(latents))

# -- phase 3, and phases 2 and 3 at once -----------------------------------------------------------

class Speech:
    """The losses of an arm in phase 3: added up for training, or one by one."""

    def __init__(self, run):
        self.run = run
        taught = run._replace(questions=lessons_of(run.questions))
        self.lessons = train.make_lessons(taught)
        answer = torch.cdist(self.lessons.latents, run.concepts).argmin(1)      # (n,)
        self.goals = self.lessons.latents                                       # (n, D)
        if run.cfg.goal == "shuffled":
            generator = torch.Generator().manual_seed(run.cfg.seed)
            order = torch.randperm(len(run.concepts), generator=generator).to(run.device)
            self.goals = run.concepts[order][answer]
        noise = torch.randn(run.concepts.shape, generator=torch.Generator().manual_seed(1))
        self.random_goals = noise.to(run.device)[answer]                        # (n, D)
        self.distill_loss = train.distill(taught)[0]
        self.trains_encoder = run.cfg.encoder in ("tuned", "joint")

    def thoughts(self, rows):
        """What the decoder reads: kept thoughts, or new ones where the encoder is trained."""
        kept = self.lessons.thoughts.rows(rows)
        if self.run.cfg.no_memory:
            return silent(kept)
        if not self.trains_encoder:
            return kept
        is_question = (rows < self.lessons.n_questions)[:, None]
        new = self.run.model.think(self.lessons.texts[rows])
        return new._replace(latent=torch.where(is_question, new.latent.float(), kept.latent))

    def loss(self, rows, goals, alpha):
        """As `TJEPA.speak_loss`: (loss, stats)."""
        answers = self.lessons.answers[rows]
        return self.run.model.speak_loss(self.thoughts(rows), answers, goals[rows], alpha)

    def loss_at(self, progress):
        """Loss of random rows, as the arm has it; joint adds the loss of phase 2."""
        cfg = self.run.cfg
        rows = train.draw_lessons(self.run, self.lessons)
        alpha = cfg.alpha_start * SCHEDULES[cfg.alpha](progress)
        loss, stats = self.loss(rows, self.goals, alpha)
        if cfg.encoder == "joint":
            loss = loss + self.distill_loss(progress)[0]
        return loss, stats | dict(alpha=alpha)

# -- do the gradients of the losses conflict? ------------------------------------------------------

def gradients(speech, seed):
    """Gradients of the losses of a random half batch: (decoder's, encoder's).

    Each is a list of layers, and a layer a dict of vectors (n,): token, latent, random (towards
    random goals) and, for joint, thought (phase 2). The heads and the embedding are left out.
    """
    model, decoder = speech.run.model, speech.run.model.decoder
    layers = [decoder.slots] if decoder.slots is not None else []
    layers += decoder.blocks
    n_decoder = len(layers)
    if speech.trains_encoder:
        layers += [model.context_encoder.blocks, model.predictor]
    torch.manual_seed(seed)
    rows = train.draw_lessons(speech.run, speech.lessons)
    losses = dict(token=partial(speech.loss, rows, speech.goals, 0.0),
                  latent=partial(speech.loss, rows, speech.goals, 1.0),
                  random=partial(speech.loss, rows, speech.random_goals, 1.0))
    if speech.run.cfg.encoder == "joint":
        losses["thought"] = partial(speech.distill_loss, 0.0)
    found = [{} for _ in layers]
    for name, loss_of in losses.items():
        torch.manual_seed(seed)         # the same noise for each loss
        loss, _ = loss_of()
        for layer, vectors in zip(layers, found):
            grads = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True,
                                        allow_unused=True, materialize_grads=True)
            vectors[name] = torch.cat([grad.flatten() for grad in grads])
    return found[:n_decoder], found[n_decoder:]

def conflict(speech, batches=4):
    """Cosines of the gradients of the losses, means over layers and batches.

    grad_cos, grad_cos_random       L_token with L_latent, with an L_latent towards random goals
    grad_cos_thought_encoder        L_token with the loss of phase 2, on encoder and predictor
    grad_halves_token               L_token on two half batches: what noise leaves of a cosine of 1
    """
    others = dict(cos="latent", cos_random="random"), dict(cos_thought="thought")
    cosines = {}
    for seed in range(10 ** 8, 10 ** 8 + 2 * batches, 2):
        halves = zip(gradients(speech, seed), gradients(speech, seed + 1))
        for part, names, layers in zip(("", "_encoder"), others, halves):
            for a, b in zip(*layers):                   # a layer's gradients on both halves
                pairs = dict(halves_token=(a["token"], b["token"]))
                token = a["token"] + b["token"]
                for title, name in names.items():
                    if name in a:
                        pairs[title] = token, a[name] + b[name]
                for title, vectors in pairs.items():
                    cosine = F.cosine_similarity(*vectors, dim=0).item()
                    cosines.setdefault(f"grad_{title}{part}", []).append(cosine)
    return {name: sum(values) / len(values) for name, values in cosines.items()}

# -- kinds of arms ---------------------------------------------------------------------------------

def judge(run):
    """All figures of an arm that speaks."""
    questions, held_out = run.questions, run.questions.only("heldout")
    thoughts = think(run, questions)
    figures = evaluate.exact_match(run, questions, thoughts)
    figures |= evaluate.recall(run, questions, run.concepts)
    figures |= evaluate.cloze(run, "capital")
    figures |= grounding.latent_head(run, questions, thoughts)

    thoughts = think(run, held_out)
    said, logp = answers_of(run, thoughts)
    distance = torch.cdist(thoughts.latent, run.concepts)                       # (n, A)
    nearest = distance.argmin(1)
    figures |= grounding.replaced(run, held_out) | grounding.tracing(held_out, said, nearest)
    figures |= grounding.editing(run, held_out, thoughts, nearest)
    if IDK in held_out.answers:         # to be near to it is no sign of knowing
        distance[:, held_out.answers.index(IDK)] = torch.inf
    return figures | trust(
        held_out, said, dict(least=least_likely(logp), latent=-distance.amin(1)))

def phases_1_and_2(cfg):
    """What the other arms start from."""
    for phase in ("pretrain", "distill"):
        figures = train_arm(cfg, phase=phase)
        keep(cfg, phase)
    return figures

def speaker(cfg):
    """A T-JEPA that learns to speak as the arm has it."""
    run = start(cfg)
    model, held_out = run.model, run.questions.only("heldout")
    if cfg.encoder in ("tuned", "joint"):
        model.trained_in = lambda phase: [model.context_encoder, model.predictor, model.decoder]
    elif cfg.phase == "distill":        # "I don't know" is taught in phase 2 too
        taught = run._replace(questions=lessons_of(run.questions))
        fit(run, "distill", train.distill(taught)[0])
    speech = Speech(run)
    points, curve = [], []

    def watch(whole):
        """Compare the gradients at this moment."""
        points.append(conflict(speech))
        curve.append(evaluate.exact_match(run, held_out, think(run, held_out)))
        return {}
    fit(run, "distill" if cfg.encoder == "joint" else "speak", speech.loss_at, watch)
    means = {name: sum(point[name] for point in points) / len(points) for name in points[0]}
    early = {f"early_{name}": value for name, value in curve[:3][-1].items()}   # after 200 steps
    weights = sum(p.numel() for name, p in model.named_parameters() if "target" not in name)
    return judge(run) | means | early | dict(million=weights / 1e6)

def gpt(cfg):
    """A GPT as deep as encoder and decoder together, which learns DEC questions as tokens."""
    deep = plain(cfg, n_layer=cfg.n_layer + cfg.dec_layer)
    run = controls.read_gpt(deep, corpus_of(cfg))
    questions, held_out = run.questions, run.questions.only("heldout")
    taught = lessons_of(questions).where("DEC", phrasing="trained")
    controls.teach_gpt(run, taught, cfg.speak_lr)
    said, _ = controls.gpt_says(run, questions)
    em = evaluate.by_split(questions, "em", controls.matches(questions, said))
    said, logp = controls.gpt_says(run, held_out)
    weights = sum(p.numel() for p in run.model.parameters())
    found = trust(held_out, said, dict(least=least_likely(logp)))
    return em | found | dict(million=weights / 1e6)

def lookup(cfg):
    """No decoder: the answer of the nearest DEC question that was taught; distance is the score."""
    run = start(cfg)
    questions, held_out = run.questions, run.questions.only("heldout")
    known = questions.where("DEC", phrasing="trained")
    there = measures.features(run.model, questions.tokens[known])
    here = measures.features(run.model, held_out.tokens)
    distance, nearest = torch.cdist(here, there).min(1)                         # (n,), (n,)
    said = [questions.answers[i] for i in questions.answer_of[known][nearest].tolist()]
    em = evaluate.by_split(held_out, "em", controls.matches(held_out, said))
    return em | trust(held_out, said, dict(latent=-distance))

def measure(cfg):
    """Train and measure an arm: a dict of figures."""
    kinds = dict(phases_1_and_2=phases_1_and_2, speaker=speaker, gpt=gpt, lookup=lookup)
    return kinds[cfg.kind](cfg)

# -- the arms --------------------------------------------------------------------------------------

GENTLE = dict(speak_lr=Arm.distill_lr)
gpt_arm = partial(Config, kind="gpt", start="")
ARMS = {
    SHARED: Config(kind="phases_1_and_2", phase="all", start=""),
    # schedules and targets of the latent loss
    "annealed": Config(),
    "alpha 0 (v2.0)": Config(alpha="constant", alpha_start=0.0),
    **{f"alpha {alpha}": Config(alpha="constant", alpha_start=alpha)
       for alpha in (0.1, 0.25, 0.5, 0.9)},
    "annealed from 0.9": Config(alpha_start=0.9),
    "reversed": Config(alpha="reversed"),
    "shuffled latent target": Config(goal="shuffled"),
    # the encoder in phase 3
    "fine-tuned": Config(encoder="tuned"),
    "fine-tuned at 5e-4": Config(encoder="tuned", **GENTLE),
    "joint": Config(encoder="joint", phase="distill", distill_lr=train.Config.speak_lr),
    "joint at 5e-4": Config(encoder="joint", phase="distill"),
    # memories
    "1 slot": Config(n_slots=1),
    "memory=tokens": Config(memory="tokens"),
    "untaught encoder": Config(encoder="random"),
    "no memory": Config(no_memory=True),
    # is it known what is not known?
    "taught I don't know in phase 3": Config(idk=True),
    "taught I don't know in phases 2 and 3": Config(idk=True, phase="distill"),
    "GPT": gpt_arm(),
    "GPT at 5e-4": gpt_arm(**GENTLE),
    "GPT taught I don't know": gpt_arm(idk=True, **GENTLE),
    "lookup": Config(kind="lookup"),
}
FAST = ("annealed", "joint", "memory=tokens", "no memory", "GPT taught I don't know", "lookup")

def speaking(flags):
    """What the command runs."""
    run_lab("speaking", ARMS, flags, measure, FAST)

if __name__ == "__main__":
    main(speaking)
