"""
What the figures mean: one definition each, in one place.

    val_r2      1 - MSE(prediction, target) / MSE(mean target, target); 0: no better than the mean
    hit1        share of predicted span latents whose nearest target in the batch is their own
    chance      the hit1 of a random guess
    std, rank, bound, cos, cos_centred, pos     the collapse panel: `tjepa.latent_health`
    health      its word: collapsed, shrinking, healthy; unlearned where val_r2 is not above 0
    cloze       share of held-out statements whose own answer has the lowest energy
    r1, mrr     recall at 1 (R@1) and mean reciprocal rank of the thought among the answers
                of its relation
    em          exact match of greedy speech with the answer; over-generation counts as wrong
    sure        the same, and the thought is within the threshold: what sample.py says
    threshold, abstain, abstain_typing, abstain_nonsense, auroc     "I don't know": `abstention`

R@1, MRR, EM and sure are given by split and phrasing: em_LAT are trained wordings, em_LAT_heldout
those that were never trained on, and so on (PHRASINGS; data/facts/prepare.py says what they are).

A fact's split says how it was taught: DEC, LAT, TXT, NEVER (data/facts), NEW (--phase=teach).
n is a number of rows, A of answers, T of tokens, S of spans; C and D are latent widths.
"""
import torch
from torch.nn import functional as F

import tjepa

SPLITS = ("DEC", "LAT", "TXT", "NEW")
# how a question is worded -> what is added to the name of a figure
PHRASINGS = dict(trained="", heldout="_heldout", typed="_typed", natural="_natural",
                 lower="_lower", no_mark="_no_mark", typo="_typo")
TYPING = ("lower", "no_mark", "typo")       # the noise of the test

# -- phase 1: the text -----------------------------------------------------------------------------
@torch.no_grad()
def evaluate_text(run, rows=256):
    """Phase 1 on held-out text: r2, hit1 and its chance, and the collapse panel of the target."""
    model = run.model
    # the same rows and the same spans at every evaluation
    torch.manual_seed(0)
    tokens = run.corpus.val.batch(rows).to(run.device)                          # (n, T)
    spans = tjepa.sample_spans(tokens, model.word_start, model.cfg)             # (n, T)

    # no autocast: bf16 would round the figures
    prediction = model.predict(tokens, spans)
    latents = model.encode(tokens)                                              # (n, T, C)

    predicted = prediction.predicted[prediction.span_mask]                      # (spans, C)
    target = prediction.target[prediction.span_mask]                            # (spans, C)
    every_span = torch.ones_like(target[:, 0])
    r2 = tjepa.r_squared(predicted, target, every_span)

    # at most 2000 spans: the distance matrix grows with their square
    distance = torch.cdist(predicted[:2000], target[:2000])                     # (spans, spans)
    own = torch.arange(len(distance), device=run.device)
    hits = distance.argmin(1) == own

    health = tjepa.latent_health(latents, tokens != model.cfg.pad)
    word = tjepa.health_word(health)
    if word != "collapsed" and r2 <= 0:         # spread, but predicted no better than by their mean
        word = "unlearned"
    figures = {
        "val_r2": r2.item(),
        "hit1": hits.float().mean().item(),
        "chance": 1 / len(distance),
        "health": word,
    }
    return figures | health

@torch.no_grad()
def gap_energy(run, tokenizer, before, values, after, size=512):
    """Energy of each of n values (strings) in the gap between before and after: (n,).

    A low energy means that the value fits. `size` texts are encoded at a time.
    """
    # as in running text: the first word has a space in front of it ...
    left = tokenizer.encode(" " + before.rstrip()) if before else []
    right = tokenizer.encode(after)
    # ... and a space before the gap belongs to the value
    space = "" if before[-1:].strip() else " "
    middles = [tokenizer.encode(space + value) for value in values]

    longest = max(range(len(values)), key=lambda i: len(middles[i]))
    width = len(left) + len(middles[longest]) + len(right)
    if width > run.cfg.block_size:
        raise ValueError(f"the text has {width} tokens with '{values[longest]}' in the gap, above "
                         f"the run's block_size={run.cfg.block_size}: shorten it")

    # a shorter value leaves padding at the end of its row
    tokens = torch.full((len(values), width), tokenizer.pad)                    # (n, T)
    # max_spans marks a token that stays, 0 a token of the only span
    spans = torch.full_like(tokens, run.model.cfg.max_spans)                    # (n, T)
    for row, middle in enumerate(middles):
        text = left + middle + right
        tokens[row, :len(text)] = torch.tensor(text)
        spans[row, len(left):len(left) + len(middle)] = 0

    # no autocast: in bf16 different values would have equal energies
    parts = []
    for start in range(0, len(values), size):
        rows = slice(start, start + size)
        parts.append(run.model.energy(tokens[rows].to(run.device), spans[rows].to(run.device)))
    return torch.cat(parts)

def cloze(run, relation):
    """Share of a relation's held-out statements whose own answer has the lowest energy.

    cloze_R is measured among the answers that the text names. cloze_R_all is measured among all
    values of the relation in facts.tsv; the text of a small run names only some of them.
    Each stands beside its chance.
    """
    items = [item for item in run.corpus.cloze if item.relation == relation]
    known = sorted({item.answer for item in items})
    unknown = sorted(set(run.corpus.values[relation]) - set(known))
    values = known + unknown

    right = 0
    right_all = 0
    for item in items:
        before, after = item.statement.split("{a}")
        energy = gap_energy(run, run.corpus.tokenizer, before, values, after)   # (values,)
        right += values[energy[:len(known)].argmin().item()] == item.answer
        right_all += values[energy.argmin().item()] == item.answer

    return {
        f"cloze_{relation}": right / len(items),
        f"cloze_{relation}_chance": 1 / len(known),
        f"cloze_{relation}_all": right_all / len(items),
        f"cloze_{relation}_all_chance": 1 / len(values),
    }

# -- phase 2: the thought --------------------------------------------------------------------------
@torch.no_grad()
def think_all(run, tokens, size=1024):
    """The thoughts of n questions (n, T): a `Thought` of n rows.

    `size` questions of similar length are asked at a time. Token latents are kept only where the
    decoder reads them (memory=tokens): they are large.
    """
    lengths = (tokens != run.model.cfg.pad).sum(1)
    order = lengths.argsort(stable=True)
    parts = []
    for rows in order.split(size):
        question = tokens[rows, :lengths[rows[-1]]]
        with run.autocast():
            thought = run.model.think(question)
        kept, rest = 0, 0
        if run.cfg.memory == "tokens":
            kept, rest = question.size(1), tokens.size(1) - question.size(1)
        parts.append(tjepa.Thought(
            latent=thought.latent.float(),
            context=F.pad(thought.context[:, :kept].float(), (0, 0, 0, rest)),
            context_mask=F.pad(thought.context_mask[:, :kept], (0, rest)),
        ))
    return tjepa.Thought(*(torch.cat(tensors) for tensors in zip(*parts))).rows(order.argsort())

def by_split(questions, name, score):
    """Means of a score (n,) by split and phrasing: name_DEC, name_DEC_heldout, ..."""
    figures = {}
    for split in SPLITS:
        for phrasing, suffix in PHRASINGS.items():
            rows = questions.where(split, phrasing=phrasing)
            if len(rows):
                figures[f"{name}_{split}{suffix}"] = score[rows].float().mean().item()
    return figures

def recall(run, questions, table, cells=2 ** 24):
    """R@1 and MRR of the thought among the answers of its relation; and `abstention`.

    table (A, D): the latents of all answers, in the units of thoughts. So many questions are
    compared at a time that their distances to the answers are `cells` numbers, 64 MB, at most.
    """
    size = max(1, cells // len(table))
    thoughts = think_all(run, questions.tokens)
    ranks = []
    for rows in torch.arange(len(questions.rows)).split(size):
        distance = torch.cdist(thoughts.latent[rows], table)                    # (size, A)
        rivals = distance.masked_fill(~questions.rivals_of(rows), torch.inf)
        own = rivals.gather(1, questions.answer_of[rows, None])                 # (size, 1)
        # <= and not <: a tie is lost, or latents collapsed to one point would always be right
        ranks.append((rivals <= own).sum(1))
    rank = torch.cat(ranks)                                                     # (n,)

    r1 = by_split(questions, "r1", rank == 1)
    mrr = by_split(questions, "mrr", 1 / rank)
    distance, nearest = nearest_concept(run, thoughts.latent)
    return r1 | mrr | abstention(questions, distance, nearest == questions.answer_of)

def usual_phrasing(questions):
    """heldout, or trained where no wording is held out."""
    return "heldout" if len(questions.where("DEC", phrasing="heldout")) else "trained"

def threshold_of(questions, distance, right):
    """How far a thought may lie from the nearest known concept before it is called unknown.

    distance (n,): to the nearest concept; right (n,): is it the answer? The threshold tells best
    (mean of both shares) questions about DEC facts that are thought rightly, in wordings that were
    not trained and with the noise of phase 2, from questions about made-up subjects. Where no
    wording is held out, it keeps all that was taught, too; the margin is for rounding: asked
    alone, or in bf16, a distance differs a little.
    """
    known = questions.where("DEC", phrasing=("heldout", "typed"))
    known = distance[known[right[known]]].sort().values                         # (k,)
    unknown = distance[questions.where("NEVER", phrasing="made_up")]
    best = 0.0
    if len(known):
        kept = torch.arange(1, len(known) + 1, device=known.device) / len(known)
        refused = (unknown[:, None] > known).float().mean(0).nan_to_num(0)      # (k,)
        best = known[(kept + refused).argmax()].item()
    if usual_phrasing(questions) == "heldout":
        return best
    taught = questions.where("DEC", "NEW", phrasing="trained")
    return max(best, 1.05 * distance[taught].amax().item())

def nearest_concept(run, latent, size=4096):
    """Distance of each thought (n, D) to the nearest concept, (n,), and the concept's number."""
    parts = [torch.cdist(rows, run.concepts).min(1) for rows in latent.split(size)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

def abstention(questions, distance, right):
    """The distance of a thought to the nearest known concept, (n,), as a sign of not knowing.

    right: bool (n,), is that concept the answer?

    threshold           see `threshold_of`
    abstain             share of NEVER questions beyond it, in held-out wordings if there are any
    abstain_typing      the same with the noise of the test
    abstain_nonsense    share of the lines of nonsense beyond it
    auroc               chance that a NEVER question lies farther away than a DEC question of the
                        same wording
    """
    figures = {"threshold": threshold_of(questions, distance, right)}
    beyond = (distance > figures["threshold"]).float()
    usual = usual_phrasing(questions)
    wordings = {"abstain": usual, "abstain_typing": TYPING, "abstain_nonsense": "nonsense"}
    for name, phrasing in wordings.items():
        never = questions.where("NEVER", phrasing=phrasing)
        if len(never):
            figures[name] = beyond[never].mean().item()
    known = distance[questions.where("DEC", phrasing=usual)]
    unknown = distance[questions.where("NEVER", phrasing=usual)]
    if len(unknown):
        farther = unknown[:, None] > known                                      # (NEVER, DEC)
        figures["auroc"] = farther.float().mean().item()
    return figures

# -- phase 3: speech -------------------------------------------------------------------------------
def say(run, thoughts, size=512):
    """Greedy speech for a `Thought` of n rows, `size` at a time: a list of n strings."""
    tokenizer = run.corpus.tokenizer
    said = []
    for rows in torch.arange(len(thoughts.latent), device=run.device).split(size):
        with run.autocast():
            steps = list(run.model.speak(thoughts.rows(rows)))                  # L of (n,)
        ids = torch.stack(steps, dim=1)                                         # (n, L)
        said += [tokenizer.decode(row).strip() for row in ids.tolist()]
    return said

def exact_match(run, questions, thoughts):
    """EM and sure by split and phrasing; and em_shuffled, the control.

    em_shuffled: EM over DEC and LAT, in wordings that were not trained, when each thought is
    replaced by another question's. If it were high, the decoder would not need the thought.
    """
    def says_its_answer(which, thoughts):
        """Which questions (numbers, (m,)) are answered exactly by their thoughts: bool (m,)."""
        answers = [questions.rows[i].answer for i in which.tolist()]
        equal = [said == answer for said, answer in zip(say(run, thoughts), answers)]
        return torch.tensor(equal, device=run.device)

    spoken = questions.where(*SPLITS)
    right = torch.zeros(len(questions.rows), dtype=torch.bool, device=run.device)
    right[spoken] = says_its_answer(spoken, thoughts.rows(spoken))
    distance, nearest = nearest_concept(run, thoughts.latent)
    known = distance <= threshold_of(questions, distance, nearest == questions.answer_of)
    figures = by_split(questions, "em", right) | by_split(questions, "sure", right & known)

    control = questions.where("DEC", "LAT", phrasing=usual_phrasing(questions))
    # the same permutation at every evaluation
    torch.manual_seed(0)
    others = control[torch.randperm(len(control), device=run.device)]
    figures["em_shuffled"] = says_its_answer(control, thoughts.rows(others)).float().mean().item()
    return figures
