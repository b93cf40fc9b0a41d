"""
Think, then speak: what is phase 3's latent loss worth, is what is said what was thought, and what if nothing is known?

    python -m labs.speaking --jobs=4        3 seeds of each arm: phases 1 and 2 once a seed, then half a minute each
    python -m labs.speaking --fast          does it run?

Expected before the first run: alpha = 0 (v2.0) ties or wins, whatever the schedule; a shuffled latent target does no
harm, so that the term is a regulariser at most; the gradients of the two losses are about orthogonal, phased or joint;
a fine-tuned encoder says DEC better and forgets LAT; edits of the thought are followed, random ones are not; without
the memory nothing is left but the commonest answers; invented subjects lie farther from the concepts, but the GPT's
own probabilities tell them apart as well; "I don't know" has to be taught.

All arms of a seed share text, questions, batches and 500 steps of phase 3, and but for `joint`, `untaught encoder` and
the one that is taught "I don't know" in phase 2 too, a copy of the same phases 1 and 2. `joint` starts from the same
phase 1 and has both losses in each of 700 steps: as many batches of phase 2, more of phase 3. The GPT is as deep as
encoder and decoder together; it reads as many batches of text and has 1,200 steps of DEC questions, the steps of
phases 2 and 3, with the same share of question tokens dropped. Learning rates are train.py's; where encoder and
decoder are trained together two were tried, and both are shown. Half of the invented subjects teach "I don't know" in
three arms; no arm is judged on these. Figures are of held-out phrasings unless they say otherwise.
"""
import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path

import torch
from torch.nn import functional as F

import data
import evaluate
import train
from labs import measures
from labs.arms import in_short, main, run_arms
from labs.controls import GPT
from labs.llm_jepa import join
from labs.tables import by_seed, publish, tables

IDK = "I don't know"
SHARED = "phases 1 and 2"       # the arm that the others copy
SCHEDULES = {"annealed": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
             "reversed": lambda progress: 0.5 - 0.5 * math.cos(math.pi * progress), "constant": lambda progress: 1.0}

@dataclasses.dataclass
class Config(train.Config):
    """An arm."""
    mlm: float = train.LATENT["mlm"]    # latents alone, as the papers have it: their claims are tested here
    pred_embd: int = train.LATENT["pred_embd"]  # and as in the lab of facts
    kind: str = "speaker"           # phases: 1 and 2, for the others | speaker | gpt | lookup: no decoder at all
    alpha: str = "annealed"         # how alpha_start moves: annealed to 0 | reversed: from 0 | constant
    goal: str = "own"               # the latent head's target: own, the answer's latent | shuffled: another's, always
    encoder: str = "frozen"         # frozen | tuned: trained in phase 3 too | joint: phases 2 and 3 at once | random
    deaf: bool = False              # the thought is always 0: what a decoder says that has no memory to read
    idk: str = ""                   # half of the invented subjects teach "I don't know": "" no | speech: in phase 3 |
                                    # latent: in phases 2 and 3
    every: int = 1                  # every so many-th question only, for --fast
    eval_every: int = 100           # points of the curves

# -- an arm's beginning ------------------------------------------------------------------------------------------------
def plain(cfg, **changes):
    """The train.Config in cfg, changed."""
    names = [field.name for field in dataclasses.fields(train.Config)]
    return train.Config(**{name: getattr(cfg, name) for name in names} | changes)

def phases(cfg):
    """Phases 1 and 2, once a seed for all arms; the folder `read` in it keeps the end of phase 1."""
    out = Path(cfg.out)
    train.run(plain(cfg, phase="pretrain"))
    (out / "read").mkdir(exist_ok=True)
    shutil.copy(out / "ckpt.pt", out / "read")
    return train.run(plain(cfg, phase="distill"))

def pick_questions(corpus, cfg):
    """Rows of the corpus to ask. Every second invented subject is put aside: its split is IDK where it teaches that,
    and no arm is asked about it."""
    invented = list(dict.fromkeys(row.subject for row in corpus.qa if row.split == "NEVER"))
    rows = [row._replace(split="IDK") if row.split == "NEVER" and row.subject in invented[::2] else row
            for row in corpus.qa]
    return [row for row in rows if row.split != "IDK" or cfg.idk][::cfg.every]

def lessons_of(questions, taught):
    """The same questions as phases 2 and 3 see them: IDK rows are like any other of DEC, if they are taught there."""
    part = copy.copy(questions)
    part.rows = [row._replace(split="DEC") if row.split == "IDK" and taught else row for row in questions.rows]
    return part

def begin(cfg):
    """What an arm goes on from -> (run, questions, table of concepts (A, D)); its decoder is new, by its seed."""
    shared = Path(cfg.out).parent / f"{SHARED}_{cfg.seed}"
    own_phase_2 = cfg.encoder == "joint" or cfg.idk == "latent"
    if not (shared / "ckpt.pt").exists():
        raise ValueError(f"--out: {shared} holds no phases 1 and 2: run --arms='{SHARED}' --redo first")
    checkpoint = train.load_checkpoint(shared / "read" if own_phase_2 else shared)
    corpus = data.load(cfg, data.Tokenizer.from_state(checkpoint["tokenizer"]))
    weights = None if cfg.encoder == "random" else checkpoint["model"]
    device, dtype = train.pick_device(cfg)
    model = train.build(cfg, corpus.tokenizer, weights, ["decoder."]).to(device)
    run = train.Run(cfg, model, corpus, device, dtype)
    questions = data.Questions(pick_questions(corpus, cfg), corpus.tokenizer, cfg.block_size, cfg.answer_size, device)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    if own_phase_2 or weights is None:
        return run, questions, train.teach(run, questions, None)
    with torch.no_grad():       # by the shared run's units: its own table, and the latent of "I don't know" if need be
        return run, questions, evaluate.standardise(model, model.concept(questions.answer_tokens))

def fit(run, phase, loss_at, measure=lambda whole: {}):
    """train.fit without a checkpoint; measure keeps its own figures and returns none, so that nothing is drawn."""
    train.fit(run, phase, loss_at, measure, evaluate.Log(run.cfg.out, []), lambda step, optimizer: None)

def hear(run, tokens):
    """The thoughts that the decoder is given for tokens (n, T)."""
    thoughts = evaluate.think_all(run, tokens)
    return silenced(thoughts) if run.cfg.deaf else thoughts

def silenced(thoughts):
    """A memory of zeros: of the slots only their bias is left."""
    return thoughts._replace(latent=torch.zeros_like(thoughts.latent), context=torch.zeros_like(thoughts.context))

# -- phase 3, and phases 2 and 3 at once -------------------------------------------------------------------------------
class Speech:
    """The losses of phase 3 over a batch of `train.lessons`, one by one or as an arm adds them up."""
    def __init__(self, run, questions, table):
        self.run, cfg = run, run.cfg
        taught = lessons_of(questions, cfg.idk)
        self.texts, self.pool, self.words, latents, self.draw = train.lessons(run, taught, table)
        self.asked = len(self.texts) - len(table)               # so many questions, then the echoes
        if cfg.deaf:
            self.pool = silenced(self.pool)
        answer = torch.cdist(latents, table).argmin(1)                                                  # (n,)
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(cfg.seed)).to(run.device)
        self.goals = table[order][answer] if cfg.goal == "shuffled" else latents                        # (n, D)
        self.noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(1)).to(run.device)[answer]
        self.distill_loss = train.distill(run, lessons_of(questions, cfg.idk == "latent"), table)[0]

    def thoughts(self, which):
        """What the decoder hears of rows which: from the pool, or thought anew where the encoder is trained."""
        kept = self.pool.pick(which)
        if self.run.cfg.encoder not in ("tuned", "joint"):
            return kept
        anew, question = self.run.model.think(self.texts[which]), which.to(self.run.device) < self.asked
        return anew._replace(latent=torch.where(question[:, None], anew.latent.float(), kept.latent))

    def loss_at(self, progress):
        """As `train.speak`, with this arm's alpha and goals; joint adds the loss of phase 2."""
        cfg, which = self.run.cfg, self.draw()
        alpha = cfg.alpha_start * SCHEDULES[cfg.alpha](progress)
        loss, stats = self.run.model.speak_loss(self.thoughts(which), self.words[which], self.goals[which], alpha)
        if cfg.encoder == "joint":
            loss = loss + self.distill_loss(progress)[0]
        return loss, stats | dict(alpha=alpha)

    def each(self, which, seed):
        """The losses apart, over rows which, with one blur: token, latent, latent of random targets; and phase 2's."""
        losses, kinds = {}, dict(token=(self.goals, 0.0), latent=(self.goals, 1.0), random=(self.noise, 1.0))
        for name, (goals, alpha) in kinds.items():
            torch.manual_seed(seed)
            thoughts = self.thoughts(which)
            losses[name] = self.run.model.speak_loss(thoughts, self.words[which], goals[which], alpha)[0]
        if self.run.cfg.encoder == "joint":
            losses["thought"] = self.distill_loss(0.0)[0]
        return losses

# -- do the two losses pull apart? -------------------------------------------------------------------------------------
def groups(run):
    """Parameters that the losses share, by layer: the decoder's body (not the heads, nor the embedding that is one of
    them); the encoder and the predictor where they are trained beside it."""
    model, decoder = run.model, run.model.decoder
    parts = dict(slots=decoder.slots) if run.cfg.memory != "tokens" else {}
    parts |= {f"block {i}": block for i, block in enumerate(decoder.blocks)}
    if run.cfg.encoder in ("tuned", "joint"):
        parts |= dict(encoder=model.encoder.blocks, predictor=model.predictor)
    return {name: list(part.parameters()) for name, part in parts.items()}

def gradient(loss, shared):
    """The gradient of a loss: group -> (n,), zeros where the loss does not depend on it."""
    params = [p for part in shared.values() for p in part]
    flat = iter(torch.autograd.grad(loss, params, allow_unused=True))
    return {name: torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                             for p, g in zip(part, flat)]) for name, part in shared.items()}

def cosine(a, b):
    """Of two vectors."""
    return F.cosine_similarity(a, b, dim=0).item()

def conflict(speech, batches=4):
    """How the gradients of the losses lie, without clipping: group -> figures, means over some batches of two halves.
    cos: of L_latent and L_token, of one batch; cos_random: of L_token and an L_latent whose targets are random;
    halves_token, halves_latent: of one loss on the two halves, what chance leaves of it; cos_thought: of the
    loss of phase 2 and L_token (joint only); against: share of batches with cos below 0;
    similarity: 2 |a| |b| / (|a|^2 + |b|^2), 1 for equal lengths; ratio: |L_latent's| / |L_token's|, before alpha."""
    shared, found = groups(speech.run), {}
    for batch in range(batches):
        halves = []
        for half in range(2):
            torch.manual_seed(seed := 10 ** 8 + 2 * batch + half)
            which = speech.draw()
            halves.append({name: gradient(loss, shared) for name, loss in speech.each(which, seed).items()})
        for group in shared:
            first, second = ({name: g[group] for name, g in half.items()} for half in halves)
            whole = {name: first[name] + second[name] for name in first}
            token, latent = whole["token"].norm().item(), whole["latent"].norm().item()
            figures = dict(cos=cosine(whole["latent"], whole["token"]), ratio=latent / max(token, 1e-12),
                           cos_random=cosine(whole["random"], whole["token"]),
                           halves_token=cosine(first["token"], second["token"]),
                           halves_latent=cosine(first["latent"], second["latent"]),
                           similarity=2 * token * latent / max(token ** 2 + latent ** 2, 1e-12))
            figures["against"] = float(figures["cos"] < 0)
            if "thought" in whole:
                figures["cos_thought"] = cosine(whole["thought"], whole["token"])
                figures["halves_thought"] = cosine(first["thought"], second["thought"])
            for name, value in figures.items():
                found.setdefault(group, {}).setdefault(name, []).append(value)
    return {group: {name: sum(values) / len(values) for name, values in figures.items()}
            for group, figures in found.items()}

def body_of(point):
    """The layers of the decoder among those of a point, a `conflict`."""
    return [layer for layer in point if layer not in ("encoder", "predictor")]

def mean_of(name, points, layers):
    """Mean of one figure over some points and layers."""
    values = [point[layer][name] for point in points for layer in layers]
    return sum(values) / len(values)

def conflict_figures(points):
    """Means over the decoder's layers and over time, by time and by layer, from points: (step, its `conflict`)."""
    points = [point for _, point in points]
    body, others = body_of(points[0]), [layer for layer in ("encoder", "predictor") if layer in points[0]]
    moments = dict(start=points[:1], middle=points[len(points) // 2:][:1], end=points[-1:])
    found = {f"grad_{name}": mean_of(name, points, body) for name in
             ("cos", "cos_random", "halves_token", "halves_latent", "similarity", "ratio", "against")}
    found |= {f"grad_cos_{moment}": mean_of("cos", chosen, body) for moment, chosen in moments.items()}
    found |= {f"grad_cos_{layer}": mean_of("cos", points, [layer]) for layer in points[0]}
    return found | {f"grad_{name}_encoder": mean_of(name, points, others) for name in
                    ("cos_thought", "halves_thought", "halves_token") if others and name in points[0][others[0]]}

# -- what is said, and how sure ----------------------------------------------------------------------------------------
@torch.no_grad()
def logprob(run, thoughts, words, size=512):
    """Log-probability of each word of words (n, A) after the ones before it: (n, A), NaN at padding."""
    model, parts = run.model, []
    for some in torch.arange(len(words), device=run.device).split(size):
        said, (memory, mask) = words[some], model.decoder.memory(thoughts.pick(some))
        states = model.decoder(F.pad(said[:, :-1], (1, 0), value=model.cfg.bos), memory, mask)          # (B, A, C)
        each = F.log_softmax(model.decoder.token_head(states).float(), dim=-1)                          # (B, A, V)
        parts.append(each.gather(-1, said[..., None])[..., 0].masked_fill(said == model.cfg.pad, torch.nan))
    return torch.cat(parts)

@torch.no_grad()
def utter(run, thoughts, size=512):
    """Greedy speech: n strings, and the log-probability of each of their tokens (n, A), NaN at padding."""
    ids = []
    for some in torch.arange(len(thoughts.latent), device=run.device).split(size):
        with run.autocast():
            said = torch.stack(list(run.model.speak(thoughts.pick(some))), dim=1)                       # (B, L)
        ids.append(F.pad(said, (0, run.cfg.answer_size - said.size(1)), value=run.model.cfg.pad))
    ids = torch.cat(ids)                                                                                # (n, A)
    return [run.corpus.tokenizer.decode(row).strip() for row in ids.tolist()], logprob(run, thoughts, ids)

def token_scores(logp):
    """Confidences of answers from their tokens' log-probabilities (n, A): the mean, the least, the sum, (n,) each."""
    return dict(token=logp.nanmean(1), least=logp.nan_to_num(0).amin(1), product=logp.nansum(1))

def halves(questions):
    """Two halves of the questions, by subject: bool (n,). What is fitted on one is judged on the other."""
    order = sorted({row.subject for row in questions.rows})
    place = {subject: i for i, subject in enumerate(order)}
    return torch.tensor([place[row.subject] % 2 == 0 for row in questions.rows])

def trust(questions, said, scores):
    """Hallucination over DEC and NEVER questions. said: n strings; scores: name -> (n,), the higher the surer.
    hallucinated: share of NEVER that gets an answer other than "I don't know"; silent_DEC: share of DEC that gets that.
    For each score: auroc of DEC against NEVER; aurc, where every answer to NEVER is wrong; ece after `calibrate`, over
    what was answered; caught: share of NEVER below the 5 % least sure of DEC (of the other half of the subjects).
    Who says "I don't know" is less sure than anyone who says something else. The curve of risk is over coverage."""
    pool = torch.cat((questions.where("DEC"), questions.where("NEVER"))).cpu()
    rows, fold = [questions.rows[i] for i in pool], halves(questions)[pool]
    known = torch.tensor([row.split == "DEC" for row in rows])
    silent = torch.tensor([said[i] == IDK for i in pool])
    right = torch.tensor([said[i] == row.answer for i, row in zip(pool, rows)]) & known
    answered, figures, curves = ~silent, {}, {}
    figures |= dict(hallucinated=answered[~known].float().mean().item(), silent_DEC=silent[known].float().mean().item(),
                    wrong=(answered & ~right).float().mean().item())
    for name, score in scores.items():
        score = score.detach().cpu().double()[pool]
        score = torch.where(silent, score.min() - 1, score)
        figures |= {f"auroc_{name}": measures.auroc(score, known), f"aurc_{name}": measures.aurc(score, right)}
        if {True, False} <= set(fold[answered].tolist()):       # else too little was answered to calibrate anything
            chance = measures.calibrate(score[answered], right[answered], fold[answered])
            figures[f"ece_{name}"] = measures.ece(chance, right[answered])
        caught = [score[~known & half] < score[known & ~half].quantile(0.05) for half in (fold, ~fold)]
        figures[f"caught_{name}"] = torch.cat(caught).float().mean().item()
        curves[name] = measures.risk_coverage(score, right).tolist()
    if "product" in scores and answered.any():      # a probability as it is, without any calibration
        chance = scores["product"].detach().cpu().double()[pool].exp().clamp(max=1)
        figures["ece_raw"] = measures.ece(chance[answered], right[answered])
    return figures, curves

# -- is it grounded, traceable, editable? ------------------------------------------------------------------------------
def same_relation(questions):
    """For each question another one of its relation: numbers (n,), a rotation within each relation."""
    other, of = torch.arange(len(questions.rows)), {}
    for i, row in enumerate(questions.rows):
        of.setdefault(row.relation, []).append(i)
    for group in of.values():
        shift = max(1, len(group) // 2)         # half-way round: the neighbours in the list ask about the same subject
        other[torch.tensor(group)] = torch.tensor(group[shift:] + group[:shift])
    return other.to(questions.tokens.device)

def matches(questions, said):
    """Which of n strings are the right answers: bool (n,)."""
    right = [words == row.answer for words, row in zip(said, questions.rows)]
    return torch.tensor(right, device=questions.tokens.device)

def ended(questions, tokenizer):
    """The right answers with their end marker, (n, L)."""
    words = F.pad(questions.answer_tokens[questions.answer_of], (0, 1), value=tokenizer.pad)
    return words.scatter(1, (words != tokenizer.pad).sum(1, keepdim=True), tokenizer.eos)

def surprise(run, questions, thoughts, words):
    """Negative log-likelihood of the right answers, nats a token, by split and phrasing: nll_DEC_heldout ..."""
    return evaluate.by_split(questions, "nll", -logprob(run, thoughts, words).nanmean(1))

def grounding(run, questions):
    """What becomes of speech if its memory is replaced: EM of each memory, and its NLL above that of the real one."""
    real, words = hear(run, questions.tokens), ended(questions, run.corpus.tokenizer)
    torch.manual_seed(0)
    mixed = torch.randperm(len(questions.rows), device=run.device)
    stranger = train.build(dataclasses.replace(run.cfg, seed=run.cfg.seed + 1000), run.corpus.tokenizer).to(run.device)
    memories = dict(real=real, zero=silenced(real), shuffled=real.pick(mixed),
                    relation=real.pick(same_relation(questions)),
                    mean=real._replace(latent=real.latent.mean(0).expand_as(real.latent),
                                       context=real.context.mean(0).expand_as(real.context)),
                    random=hear(run._replace(model=stranger), questions.tokens))
    figures, least = {}, surprise(run, questions, real, words)
    for name, thoughts in memories.items():
        found = evaluate.by_split(questions, "em", matches(questions, utter(run, thoughts)[0]))
        found |= {f"d{key}": value - least[key] for key, value in surprise(run, questions, thoughts, words).items()}
        figures |= {f"{key}_memory_{name}": value for key, value in found.items()}
    return figures

def tracing(questions, said, nearest):
    """Does the concept nearest to the thought, (n,), say what the decoder says (n strings)? Shares of agreement, by
    split; where both are wrong; and by chance, with the nearest concept of another question of the relation."""
    named = [questions.answers[i] for i in nearest.tolist()]
    agree = torch.tensor([a == b for a, b in zip(named, said)], device=nearest.device)
    other = [named[i] for i in same_relation(questions).tolist()]
    figures = {f"agree_{split}": agree[which].float().mean().item() for split in (*evaluate.SPLITS, "NEVER")
               if len(which := questions.where(split))}
    lost = [i for i, row in enumerate(questions.rows) if row.answer not in (named[i], said[i])]
    if lost:
        figures["agree_both_wrong"] = agree[lost].float().mean().item()
    return figures | dict(agree_chance=sum(a == b for a, b in zip(other, said)) / len(said))

def rivals_of(questions, nearest):
    """For each question another answer of its relation, (n,): neither the right one nor that of its nearest concept."""
    weight = questions.rivals.float().scatter(1, questions.answer_of[:, None], 0).scatter(1, nearest[:, None], 0)
    torch.manual_seed(0)
    return torch.multinomial(weight.cpu() + 1e-9, 1)[:, 0].to(nearest.device)

def editing(run, questions, table, thoughts, said, nearest):
    """Replace the thought by the latent of a rival answer; move it by the difference of the two concepts, all the way
    or a part of it; or move it as far in a random direction. Shares of DEC and LAT questions: follow_*, the decoder
    says the rival; stay_*, what it said before."""
    rival = rivals_of(questions, nearest)
    shift = table[rival] - table[nearest]                                                               # (n, D)
    torch.manual_seed(1)
    aside = F.normalize(torch.randn_like(shift), dim=1) * shift.norm(dim=1, keepdim=True)
    edits = dict(replace=table[rival], random=thoughts.latent + aside)
    edits |= {f"shift_{part}": thoughts.latent + part / 100 * shift for part in (25, 50, 75, 100)}
    figures, want = {}, [questions.answers[i] for i in rival.tolist()]
    for name, latent in edits.items():
        now, _ = utter(run, thoughts._replace(latent=latent))
        for split in ("DEC", "LAT"):
            which = questions.where(split).tolist()
            figures[f"follow_{name}_{split}"] = sum(now[i] == want[i] for i in which) / max(1, len(which))
            figures[f"stay_{name}_{split}"] = sum(now[i] == said[i] for i in which) / max(1, len(which))
    return figures

@torch.no_grad()
def latent_head(run, questions, thoughts, table):
    """R@1 of the latent that the decoder's second head gives at [BOS], among the answers of the relation."""
    start = torch.full_like(questions.tokens[:, :1], run.model.cfg.bos)                                 # (n, 1)
    guess = run.model.decoder.latent_head(run.model.decoder(start, *run.model.decoder.memory(thoughts))[:, 0])
    distance = torch.cdist(guess.float(), table).masked_fill(~questions.rivals, torch.inf)              # (n, A)
    own = distance.gather(1, questions.answer_of[:, None])
    return evaluate.by_split(questions, "head_r1", (distance <= own).sum(1) == 1)

def judge(run, questions, table):
    """All figures of a speaker, and its curves of risk."""
    everything, held = hear(run, questions.tokens), questions.only("heldout")
    figures = evaluate.exact_match(run, questions, everything) | evaluate.recall(run, questions, table)
    figures |= latent_head(run, questions, everything, table) | evaluate.cloze(run, "capital")
    figures |= surprise(run, questions, everything, ended(questions, run.corpus.tokenizer))
    thoughts = hear(run, held.tokens)
    distance = torch.cdist(thoughts.latent, table)                                                      # (n, A)
    nearest, (said, logp) = distance.argmin(1), utter(run, thoughts)
    figures |= grounding(run, held) | tracing(held, said, nearest)
    figures |= editing(run, held, table, thoughts, said, nearest)
    if IDK in held.answers:     # near to that is no sign of knowing
        distance[:, held.answers.index(IDK)] = torch.inf
    trusted, risk = trust(held, said, token_scores(logp) | dict(latent=-distance.amin(1)))
    return figures | trusted, risk

# -- the kinds of arms -------------------------------------------------------------------------------------------------
def speaker(cfg):
    """A copy of phases 1 and 2, then phase 3 as the arm has it."""
    run, questions, concepts = begin(cfg)
    phase = "distill" if cfg.encoder == "joint" else "speak"
    if cfg.encoder in ("tuned", "joint"):
        model = run.model
        model.trained_in = lambda phase: [model.encoder, model.predictor, model.W, model.decoder]
    elif cfg.idk == "latent":
        fit(run, "distill", train.distill(run, lessons_of(questions, True), concepts)[0])
    speech, quick, curve, points = Speech(run, questions, concepts), questions.only("heldout"), [], []
    steps = getattr(cfg, f"{phase}_steps")

    def watch(whole):
        """EM and the gradients' conflict at some steps."""
        step = min(len(curve) * cfg.eval_every, steps)
        curve.append((step, evaluate.exact_match(run, quick, hear(run, quick.tokens))))
        points.append((step, conflict(speech)))
        return {}
    fit(run, phase, speech.loss_at, watch)
    figures, risk = judge(run, questions, concepts)
    (Path(cfg.out) / "curves.json").write_text(json.dumps(dict(em=curve, conflict=points, risk=risk)))
    early = next((point for step, point in curve if step >= 200), curve[-1][1])
    return (figures | conflict_figures(points) | {f"early_{name}": early[name] for name in early}
            | dict(million=sum(p.numel() for name, p in run.model.named_parameters() if "target" not in name) / 1e6))

def answers_of(run, questions, size=1024):
    """What a GPT answers: n strings, and the log-probability of each token (n, A), NaN at padding. Questions of one
    length go together: nothing is padded."""
    model, (pad, eos) = run.model, (run.model.cfg.pad, run.model.cfg.eos)
    length, longest = (questions.tokens != pad).sum(1), run.cfg.answer_size
    ids = torch.full((len(length), longest), pad, device=run.device)                                    # (n, A)
    logp = torch.zeros(ids.shape, device=run.device)
    for n in length.unique().tolist():
        for which in (length == n).nonzero()[:, 0].split(size):
            asked = questions.tokens[which, :n]                                                         # (B, n)
            with run.autocast():
                said = model.generate(asked, longest)                                                   # (B, A)
            over = (said == eos).cumsum(1) - (said == eos).int() > 0
            with torch.no_grad():
                states = model.states(torch.cat((asked, said[:, :-1]), dim=1))[:, n - 1:]               # (B, A, C)
                each = F.log_softmax(model.say(states), dim=-1).gather(-1, said[..., None])[..., 0]     # (B, A)
            ids[which], logp[which] = said.masked_fill(over, pad), each.masked_fill(over, torch.nan)
    return [run.corpus.tokenizer.decode(row).strip() for row in ids.tolist()], logp

def gpt(cfg):
    """The control without any latent: a GPT reads the text, then learns DEC questions and their answers as tokens."""
    run, questions, _ = begin(cfg)
    wide = dataclasses.replace(run.model.cfg, n_layer=cfg.n_layer + cfg.dec_layer)      # encoder and decoder together
    torch.manual_seed(cfg.seed)
    model = GPT(wide, cfg.block_size + cfg.answer_size).to(run.device)
    run, pad, text = run._replace(model=model), model.cfg.pad, run.corpus.train

    def read(progress):
        """Next-token loss on the rows of text that phase 1 reads."""
        rows = text.batch(cfg.batch_size // cfg.accum).to(run.device, non_blocking=True)
        loss = model(rows[:, :-1], rows[:, 1:].masked_fill(rows[:, 1:] == pad, -1))[1]
        return loss, dict(token=loss.detach())
    # train.fit moves a target network in phase 1 only: a GPT has none, so it reads as "distill"
    fit(run._replace(cfg=dataclasses.replace(cfg, distill_steps=cfg.pretrain_steps, distill_lr=cfg.pretrain_lr)),
        "distill", read)
    taught = lessons_of(questions, cfg.idk)
    asked, answers = taught.where("DEC", phrasing="trained"), ended(questions, run.corpus.tokenizer)

    def answer(progress):
        """Loss of an answer after its question, of which some tokens are dropped as in phase 2."""
        which = asked[torch.randint(len(asked), (cfg.qa_batch_size // cfg.accum,))]
        question = questions.tokens[which]
        question = question.masked_fill(torch.rand(question.shape, device=run.device) < cfg.question_drop, pad)
        rows, n = join(pad, question, answers[which]), (question != pad).sum(1, keepdim=True)           # (B, T), (B, 1)
        place = torch.arange(1, rows.size(1), device=run.device)
        goal = rows[:, 1:].masked_fill((rows[:, 1:] == pad) | (place < n), -1)      # the answer only
        loss = model(rows[:, :-1], goal)[1]
        return loss, dict(token=loss.detach())
    fit(run._replace(cfg=dataclasses.replace(cfg, speak_steps=cfg.distill_steps + cfg.speak_steps)), "speak", answer)
    said, _ = answers_of(run, questions)
    match = matches(questions, said)
    held = questions.only("heldout")
    said, logp = answers_of(run, held)
    figures, risk = trust(held, said, token_scores(logp))
    (Path(cfg.out) / "curves.json").write_text(json.dumps(dict(risk=risk)))
    return evaluate.by_split(questions, "em", match) | figures | dict(
        million=sum(p.numel() for p in model.parameters()) / 1e6)

def lookup(cfg):
    """The control without learning to speak: the answer of the nearest DEC question in a trained wording, by the mean
    of the target encoder's latents; the distance is its confidence."""
    run, questions, _ = begin(cfg)
    held, known = questions.only("heldout"), questions.where("DEC", phrasing="trained")
    there, here = (measures.features(run.model, tokens) for tokens in (questions.tokens[known], held.tokens))
    distance, place = torch.cdist(here, there).min(1)                                                   # (n,), (n,)
    said = [questions.answers[i] for i in questions.answer_of[known][place].tolist()]
    figures, risk = trust(held, said, dict(latent=-distance))
    (Path(cfg.out) / "curves.json").write_text(json.dumps(dict(risk=risk)))
    return evaluate.by_split(held, "em", matches(held, said)) | figures

def measure(cfg):
    """An arm."""
    return dict(phases=phases, speaker=speaker, gpt=gpt, lookup=lookup)[cfg.kind](cfg)

# -- the arms ----------------------------------------------------------------------------------------------------------
GENTLE = dict(speak_lr=train.Config.distill_lr)
ANNEALED = {"annealed": Config()}
SCHEDULED = ANNEALED | {"alpha 0 (v2.0)": Config(alpha="constant", alpha_start=0.0)}
SCHEDULED |= {f"alpha {alpha}": Config(alpha="constant", alpha_start=alpha) for alpha in (0.1, 0.25, 0.5, 0.9)}
SCHEDULED |= {"annealed from 0.9": Config(alpha_start=0.9), "reversed": Config(alpha="reversed"),
              "shuffled latent target": Config(goal="shuffled")}
ENCODERS = ANNEALED | {
    "annealed at 5e-4": Config(**GENTLE), "fine-tuned": Config(encoder="tuned"),
    "fine-tuned at 5e-4": Config(encoder="tuned", **GENTLE),
    "joint": Config(encoder="joint", distill_lr=train.Config.speak_lr), "joint at 5e-4": Config(encoder="joint")}
MEMORIES = ANNEALED | {
    "1 slot": Config(n_slots=1), "memory=tokens": Config(memory="tokens"), "untaught encoder": Config(encoder="random"),
    "untaught encoder with memory=tokens": Config(encoder="random", memory="tokens"), "no memory": Config(deaf=True)}
SILENT = ANNEALED | {
    "taught I don't know in phase 3": Config(idk="speech"),
    "taught I don't know in phases 2 and 3": Config(idk="latent"),
    "GPT": Config(kind="gpt"), "GPT at 5e-4": Config(kind="gpt", **GENTLE),
    "GPT taught I don't know": Config(kind="gpt", idk="speech", **GENTLE), "lookup": Config(kind="lookup")}
ARMS = {SHARED: Config(kind="phases", eval_every=train.Config.eval_every)} | SCHEDULED | ENCODERS | MEMORIES | SILENT

def some(*names):
    """Arms by name."""
    return {name: ARMS[name] for name in names}

EM = {f"EM {split} {phrasing}": f"em_{split}{tail}" for split in ("DEC", "LAT")
      for phrasing, tail in (("trained", ""), ("held-out", "_heldout"))}
LOSSES = EM | {"EM LAT at step 200": "early_em_LAT_heldout", "NLL DEC": "nll_DEC_heldout", "NLL LAT": "nll_LAT_heldout",
               "R@1 of the latent head DEC": "head_r1_DEC_heldout", "R@1 LAT": "head_r1_LAT_heldout"}
KEPT = EM | {"EM TXT": "em_TXT_heldout", "R@1 of the thought DEC": "r1_DEC_heldout", "R@1 LAT": "r1_LAT_heldout",
             "capital by energy": "cloze_capital"}
PULLS = {"cos": "grad_cos", "at the start": "grad_cos_start", "half-way": "grad_cos_middle",
         "at the end": "grad_cos_end", "share below 0": "grad_against", "random target": "grad_cos_random",
         "L_token's halves": "grad_halves_token",
         "L_latent's halves": "grad_halves_latent", "similarity of lengths": "grad_similarity",
         "L_latent / L_token": "grad_ratio"}
LAYERS = {f"cos in {layer}": f"grad_cos_{layer}" for layer in ("slots", "block 0", "block 1", "block 2")} | {
    "encoder and predictor: L_token with phase 2's": "grad_cos_thought_encoder",
    "phase 2's halves": "grad_halves_thought_encoder", "L_token's halves": "grad_halves_token_encoder"}
REPLACED = ("real", "zero", "mean", "shuffled", "relation", "random")
SPOKEN = {f"{split} {memory}": f"em_{split}_heldout_memory_{memory}" for split in ("DEC", "LAT") for memory in REPLACED}
SURPRISE = {f"{split} {memory}": f"dnll_{split}_heldout_memory_{memory}" for split in ("DEC", "LAT")
            for memory in REPLACED[1:]}
FOLLOWED = {f"{split} {title}": f"follow_{name}_{split}" for split in ("DEC", "LAT") for title, name in (
    ("replaced", "replace"), ("moved", "shift_100"), ("moved half-way", "shift_50"), ("random", "random"))}
FOLLOWED |= {f"{split} unmoved by random": f"stay_random_{split}" for split in ("DEC", "LAT")}
AGREED = {split: f"agree_{split}" for split in ("DEC", "LAT", "TXT", "NEVER")} | {
    "both wrong": "agree_both_wrong", "by chance": "agree_chance"}
SCORES = {"latent": "latent", "token mean": "token", "least token": "least"}
def scored(**titles):
    """Columns: figures of each score."""
    return {f"{title} {score}": f"{figure}_{name}" for figure, title in titles.items()
            for score, name in SCORES.items()}

TRUSTED = {"EM DEC": "em_DEC_heldout", "EM LAT": "em_LAT_heldout", "hallucinated": "hallucinated",
           "DEC unanswered": "silent_DEC", "million weights": "million"} | scored(auroc="AUROC", caught="caught")
RISKS = {"wrong": "wrong"} | scored(aurc="AURC", ece="ECE") | {"ECE of the probability as it is": "ece_raw"}
TABLES = {
    "The latent loss of phase 3 (`alpha 0.25` has as much of it as `annealed`)": (SCHEDULED, LOSSES),
    "The encoder in phase 3 (R@1 and the cloze: what is left of phases 1 and 2)": (ENCODERS, KEPT),
    "Gradients of L_latent and L_token on the decoder's body: cosines and their nulls, means over layers and time":
        (some("annealed", "alpha 0.5", "shuffled latent target", "fine-tuned", "joint", "joint at 5e-4"), PULLS),
    "The same by layer; and where phases 2 and 3 meet":
        (some("annealed", "fine-tuned", "joint", "joint at 5e-4"), LAYERS),
    "Grounding: EM if the memory is replaced": (MEMORIES, SPOKEN),
    "Grounding: nats a token above those with the real memory": (MEMORIES, SURPRISE),
    "Edits of the thought: share of answers that become the rival's": (MEMORIES, FOLLOWED),
    "Traces: share of answers that the concept nearest to the thought names":
        (MEMORIES | some("alpha 0 (v2.0)", "fine-tuned", "joint"), AGREED),
    "Invented subjects against DEC (caught: share of them below the 5 % of DEC that are least sure)":
        (SILENT | some("alpha 0 (v2.0)", "memory=tokens", "untaught encoder"), TRUSTED),
    "The same as a risk (AURC: share wrong among the surest, over coverage; ECE: calibrated on the other subjects)":
        (SILENT | some("alpha 0 (v2.0)", "memory=tokens", "untaught encoder"), RISKS)}

def draw(folder, rows, seeds, path):
    """Four panels: EM of LAT over steps, gradients' cosines over steps, edits by their length, risk over coverage."""
    from matplotlib.figure import Figure
    def curves(arm, name):
        """One curve of each seed of an arm that there is."""
        files = [folder / f"{arm}_{seed}" / "curves.json" for seed in range(seeds)]
        return [json.loads(file.read_text())[name] for file in files if file.exists()]
    def mean(lists):
        """Over seeds, place by place."""
        return [sum(values) / len(values) for values in zip(*lists)]
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    (learns, pulls), (edits, risks) = figure.subplots(2, 2)
    for arm in SCHEDULED:
        if found := curves(arm, "em"):
            lines = [[em["em_LAT_heldout"] for _, em in seed] for seed in found]
            learns.plot([step for step, _ in found[0]], mean(lines), label=arm, linewidth=1)
    learns.set(title="EM of LAT in held-out phrasings", xlabel="step of phase 3")
    for arm, colour in ("annealed", "C0"), ("joint", "C1"):
        found = curves(arm, "conflict")
        for name, style in dict(cos="-", cos_random=":", halves_token="--").items() if found else ():
            lines = [[mean_of(name, [point], body_of(point)) for _, point in seed] for seed in found]
            pulls.plot([step for step, _ in found[0]], mean(lines), style, color=colour, label=f"{arm}: {name}")
    pulls.set(title="gradients of L_latent and L_token, and nulls: cosine", xlabel="step")
    for arm in MEMORIES:
        way = 25, 50, 75, 100
        if found := [row for row in by_seed(rows) if row["arm"] == arm]:
            lines = [[row[f"follow_shift_{part}_LAT"] for part in way] for row in found]
            edits.plot(way, mean(lines), "o-", label=arm, linewidth=1)
    edits.set(title="thought of a LAT question moved towards a rival: it is said", xlabel="% of the way")
    for arm, name in (("annealed", "latent"), ("annealed", "token"), ("GPT at 5e-4", "token"), ("lookup", "latent")):
        if found := curves(arm, "risk"):
            line = mean([seed[name] for seed in found])
            risks.plot([(i + 1) / len(line) for i in range(len(line))], line, label=f"{arm}: {name}", linewidth=1)
    risks.set(title="DEC and invented subjects: share wrong among the surest", xlabel="share answered")
    for axis in (learns, pulls, edits, risks):
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def speaking(flags):
    """Run phases 1 and 2, then the other arms; write the tables and the figure."""
    arms = ARMS
    if flags.fast:
        flags = dataclasses.replace(flags, seeds=1)
        few = dict(pred_layer=1, answer_size=15, eval_every=2, every=31)
        arms = {name: dataclasses.replace(in_short(cfg), **few) for name, cfg in arms.items()}
    rest = [name for name in (flags.arms.split(",") if flags.arms else arms) if name != SHARED]
    # in two goes: all others begin with a copy of the first
    rows = run_arms("speaking", arms, dataclasses.replace(flags, arms=SHARED), measure)
    if rest:
        rows = run_arms("speaking", arms, dataclasses.replace(flags, arms=",".join(rest)), measure)
    folder = Path(flags.out) / ("speaking" + "-fast" * flags.fast)
    publish("speaking", rows, tables(rows, TABLES), flags.table)
    if by_seed(rows):
        draw(folder, rows, flags.seeds, folder.with_suffix(".png"))
        print(f"figure: {folder.with_suffix('.png')}")


if __name__ == "__main__":
    main(speaking)
