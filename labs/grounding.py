"""
Does speech depend on the thought, can it be traced and edited, and is it known what is not known?

Measures of a T-JEPA that speaks, for labs/speaking.py. Each returns a dict of figures; n is a
number of questions, A of answers or of tokens in the longest one, D the width of thoughts.
"""
import dataclasses

import torch
from torch.nn import functional as F

import evaluate
import train
from labs import controls, measures
from labs.runs import plain

IDK = "I don't know"

def silent(thoughts):
    """Thoughts of zeros: of the memory slots only the bias is left."""
    return thoughts._replace(latent=torch.zeros_like(thoughts.latent),
                             context=torch.zeros_like(thoughts.context))

def think(run, questions):
    """What the decoder reads when it is asked these questions: a `Thought`."""
    thoughts = evaluate.think_all(run, questions.tokens)
    return silent(thoughts) if run.cfg.no_memory else thoughts

@torch.no_grad()
def logprobs(run, thoughts, answers, size=512):
    """Log-probability of each token of answers (n, A), NaN at padding: (n, A)."""
    parts = []
    for rows in torch.arange(len(answers), device=run.device).split(size):
        answer = answers[rows]
        memories = run.model.decoder.read(thoughts.rows(rows))
        inputs = F.pad(answer[:, :-1], (1, 0), value=run.model.cfg.bos)
        states = run.model.decoder(inputs, memories)                            # (B, A, C)
        every = F.log_softmax(run.model.decoder.token_head(states).float(), dim=-1)
        own = every.gather(-1, answer[..., None])[..., 0]                       # (B, A)
        parts.append(own.masked_fill(answer == run.model.cfg.pad, torch.nan))
    return torch.cat(parts)

@torch.no_grad()
def answers_of(run, thoughts):
    """Greedy speech: n strings, and the log-probability of each token (n, A), NaN at padding."""
    shape = len(thoughts.latent), run.cfg.answer_size
    ids = torch.full(shape, run.model.cfg.pad, device=run.device)
    for rows in torch.arange(len(ids), device=run.device).split(512):
        with run.autocast():
            said = torch.stack(list(run.model.speak(thoughts.rows(rows))), dim=1)
        ids[rows, :said.size(1)] = said
    decode = run.corpus.tokenizer.decode
    return [decode(row).strip() for row in ids.tolist()], logprobs(run, thoughts, ids)

def trust(questions, said, scores):
    """Are invented subjects (NEVER) told apart from DEC? scores: name -> (n,), higher is surer.

    hallucinated    share of NEVER that gets an answer other than "I don't know"
    auroc_NAME      of DEC against NEVER, by a score; "I don't know" counts as least sure
    """
    rows = questions.where("DEC", "NEVER").cpu()                                # (m,)
    known = torch.tensor([questions.rows[i].split == "DEC" for i in rows])
    silent_row = torch.tensor([said[i] == IDK for i in rows])
    figures = dict(hallucinated=(~silent_row)[~known].float().mean().item())
    for name, score in scores.items():
        score = score.detach().cpu().double()[rows]
        score = torch.where(silent_row, score.min() - 1, score)
        figures[f"auroc_{name}"] = measures.auroc(score, known)
    return figures

def least_likely(logp):
    """Confidence by log-probabilities (n, A), NaN at padding: that of the least likely token."""
    return logp.nan_to_num(0).amin(1)

# -- does speech depend on the thought, and can it be traced and edited? ---------------------------

def same_relation(questions):
    """For each question the number of another one of its relation: (n,)."""
    other = torch.arange(len(questions.rows))
    of_relation = {}
    for i, row in enumerate(questions.rows):
        of_relation.setdefault(row.relation, []).append(i)
    for group in of_relation.values():
        shift = max(1, len(group) // 2)     # neighbours in the list ask about the same subject
        other[torch.tensor(group)] = torch.tensor(group[shift:] + group[:shift])
    return other.to(questions.tokens.device)

def replaced(run, questions):
    """Exact match when the memory of the decoder is replaced."""
    real = think(run, questions)
    torch.manual_seed(0)
    mixed = torch.randperm(len(questions.rows), device=run.device)
    other_seed = dataclasses.replace(plain(run.cfg), seed=run.cfg.seed + 1000)
    stranger = train.build(other_seed, run.corpus.tokenizer).to(run.device)
    memories = dict(real=real, zero=silent(real), shuffled=real.rows(mixed),
                    relation=real.rows(same_relation(questions)),
                    random=think(run._replace(model=stranger), questions))
    figures = {}
    for name, thoughts in memories.items():
        right = controls.matches(questions, evaluate.say(run, thoughts))
        found = evaluate.by_split(questions, "em", right)
        figures |= {f"{key}_memory_{name}": value for key, value in found.items()}
    return figures

def tracing(questions, said, nearest):
    """Share of questions whose nearest concept (n,) names what is said (n strings), by split.

    agree_chance: the same with the nearest concept of another question of the relation.
    """
    named = [questions.answers[i] for i in nearest.tolist()]
    agree = torch.tensor([a == b for a, b in zip(named, said)], device=nearest.device)
    others = [named[i] for i in same_relation(questions).tolist()]
    figures = dict(agree_chance=sum(a == b for a, b in zip(others, said)) / len(said))
    for split in (*evaluate.SPLITS, "NEVER"):
        rows = questions.where(split)
        if len(rows):
            figures[f"agree_{split}"] = agree[rows].float().mean().item()
    return figures

def rivals_of(questions, nearest):
    """For each question a third answer of its relation, neither its own nor the nearest: (n,)."""
    taken = torch.stack((questions.answer_of, nearest), 1)                      # (n, 2)
    weight = questions.rivals.float().scatter(1, taken, 0)                      # (n, A)
    torch.manual_seed(0)
    return torch.multinomial(weight.cpu() + 1e-9, 1)[:, 0].to(nearest.device)

def editing(run, questions, thoughts, nearest):
    """Share of answers that become a rival's when the thought is edited: follow_NAME.

    NAME: shift_100 (by the difference of the two concepts), random (as far in a random direction).
    """
    rival = rivals_of(questions, nearest)
    shift = run.concepts[rival] - run.concepts[nearest]                         # (n, D)
    torch.manual_seed(1)
    aside = F.normalize(torch.randn_like(shift), dim=1) * shift.norm(dim=1, keepdim=True)
    figures = {}
    for name, move in dict(shift_100=shift, random=aside).items():
        said = evaluate.say(run, thoughts._replace(latent=thoughts.latent + move))
        for split in ("DEC", "LAT"):
            rows = questions.where(split).tolist()
            n_rival = sum(said[i] == questions.answers[rival[i]] for i in rows)
            figures[f"follow_{name}_{split}"] = n_rival / max(1, len(rows))
    return figures

@torch.no_grad()
def latent_head(run, questions, thoughts):
    """R@1 of the latent that the decoder's second head gives at [BOS]."""
    bos = torch.full_like(questions.tokens[:, :1], run.model.cfg.bos)           # (n, 1)
    states = run.model.decoder(bos, run.model.decoder.read(thoughts))
    guess = run.model.decoder.latent_head(states[:, 0]).float()                 # (n, D)
    distance = torch.cdist(guess, run.concepts)
    distance = distance.masked_fill(~questions.rivals, torch.inf)               # (n, A)
    own = distance.gather(1, questions.answer_of[:, None])
    return evaluate.by_split(questions, "head_r1", (distance <= own).sum(1) == 1)
