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
    threshold, abstain, auroc                   "I don't know": `abstention`

A fact's split (DEC, LAT, TXT, NEVER) says how it was taught; see data/facts.
n is a number of rows, A of answers, T of tokens, S of spans; C and D are latent widths.
"""
import torch

import tjepa

SPLITS = ("DEC", "LAT", "TXT")

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
    """The thoughts of n questions (n, T), `size` at a time: a `Thought` of n rows.

    Token latents are kept only where the decoder reads them (memory=tokens): they are large.
    """
    parts = []
    for question in tokens.split(size):
        with run.autocast():
            thought = run.model.think(question)
        kept = question.size(1) if run.cfg.memory == "tokens" else 0
        parts.append(tjepa.Thought(
            latent=thought.latent.float(),
            context=thought.context[:, :kept].float(),
            context_mask=thought.context_mask[:, :kept],
        ))
    return tjepa.Thought(*(torch.cat(tensors) for tensors in zip(*parts)))

def by_split(questions, name, score):
    """Means of a score (n,) by split and phrasing: name_DEC, name_DEC_heldout, ..."""
    figures = {}
    for split in SPLITS:
        for phrasing, suffix in (("trained", ""), ("heldout", "_heldout")):
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
    ranks, nearest = [], []
    for rows in torch.arange(len(questions.rows)).split(size):
        distance = torch.cdist(thoughts.latent[rows], table)                    # (size, A)
        rivals = distance.masked_fill(~questions.rivals_of(rows), torch.inf)
        own = rivals.gather(1, questions.answer_of[rows, None])                 # (size, 1)
        # <= and not <: a tie is lost, or latents collapsed to one point would always be right
        ranks.append((rivals <= own).sum(1))
        nearest.append(distance.amin(1))
    rank = torch.cat(ranks)                                                     # (n,)

    r1 = by_split(questions, "r1", rank == 1)
    mrr = by_split(questions, "mrr", 1 / rank)
    return r1 | mrr | abstention(questions, torch.cat(nearest))

def abstention(questions, distance):
    """The distance of a thought to the nearest known concept, (n,), as a sign of not knowing.

    threshold   keeps 95 % of the DEC questions in held-out phrasing
    abstain     share of NEVER questions beyond the threshold
    auroc       chance that a NEVER question lies farther away than such a DEC question
    """
    heldout = questions.where("DEC", phrasing="heldout")
    if len(heldout):
        phrasing = "heldout"
        known = distance[heldout]
        threshold = known.quantile(0.95)
    else:
        # There is only one phrasing, and all of its questions were taught: keep them all. The
        # margin is for rounding: asked alone, or in bf16, a question's distance differs a little
        # from the one in a batch.
        phrasing = "trained"
        known = distance[questions.where("DEC", phrasing="trained")]
        threshold = 1.05 * known.amax()
    figures = {"threshold": threshold.item()}

    never = questions.where("NEVER", phrasing=phrasing)
    if len(never):
        unknown = distance[never]
        beyond = unknown > figures["threshold"]
        farther = unknown[:, None] > known                                      # (NEVER, DEC)
        figures["abstain"] = beyond.float().mean().item()
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
    """EM by split and phrasing; and em_shuffled, the control.

    em_shuffled: EM over DEC and LAT when each thought is replaced by another question's. If it
    were high, the decoder would not need the thought.
    """
    n = len(questions.rows)
    answers = [row.answer for row in questions.rows]

    def matches(thoughts):
        """Which answers are said exactly: bool (n,)."""
        equal = [said == answer for said, answer in zip(say(run, thoughts), answers)]
        return torch.tensor(equal, device=run.device)

    figures = by_split(questions, "em", matches(thoughts))

    # the same permutation at every evaluation
    torch.manual_seed(0)
    shuffled = thoughts.rows(torch.randperm(n, device=run.device))
    spoken = questions.where("DEC", "LAT")
    figures["em_shuffled"] = matches(shuffled)[spoken].float().mean().item()
    return figures
