"""
What the figures mean: one definition each, in one place.

    val_r2      1 - MSE(prediction, target) / MSE(mean target, target); 0: no better than the mean.
                Not for InfoNCE, which leaves the length of a prediction open
    hit1        share of predicted latents whose nearest target in the batch is their own
    chance      the hit1 of a random guess
    std, rank, bound, cos, cos_centred, pos     the collapse panel: `tjepa.latent_health`
    health      its word: collapsed, shrinking, healthy; unlearned where val_r2 is not above 0
                (with InfoNCE: where hit1 is not above twice its chance)
    cloze       share of held-out statements whose own answer has the lowest energy
    word_...    the hidden word among 100 words of one's own text: `hidden_words`
    gap_...     spoken gaps of one's own text: `spoken_gaps`
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
import dataclasses
import math
from collections import Counter
from typing import NamedTuple

import torch
from torch.nn import functional as F

import data
import tjepa

SPLITS = ("DEC", "LAT", "TXT", "NEW")
# how a question is worded -> what is added to the name of a figure
PHRASINGS = dict(trained="", heldout="_heldout", typed="_typed", natural="_natural",
                 lower="_lower", no_mark="_no_mark", typo="_typo")
# The noise of the test. Lower case and a missing mark should change nothing: `encode_question`.
TYPING = ("lower", "no_mark", "typo")

# -- phase 1: the text -----------------------------------------------------------------------------
@torch.no_grad()
def evaluate_text(run, rows=256):
    """Phase 1 on held-out text: R2, hit1 and its chance, and the collapse panel of the target.

    rows: of 64 tokens; longer rows are as many fewer.
    """
    model = run.model
    rows = max(1, min(rows, rows * 64 // run.cfg.block_size))
    # the same rows and the same spans at every evaluation
    torch.manual_seed(0)
    tokens = run.corpus.val.batch(rows).to(run.device)                          # (n, T)
    spans = tjepa.sample_spans(tokens, model.word_start, model.cfg)             # (n, T)

    # no autocast: bf16 would round the figures
    prediction = model.predict(tokens, spans)
    latents = model.encode(tokens)                                              # (n, T, C)

    predicted = prediction.predicted[prediction.span_mask]                      # (spans, C)
    target = prediction.target[prediction.span_mask]                            # (spans, C)
    # at most 2000 spans: the distance matrix grows with their square
    distance = torch.cdist(predicted[:2000], target[:2000])                     # (spans, spans)
    own = torch.arange(len(distance), device=run.device)
    hits = distance.argmin(1) == own

    figures = dict(hit1=hits.float().mean().item(), chance=1 / len(distance))
    learned = figures["hit1"] > 2 * figures["chance"]
    if model.cfg.loss == "mse":
        every = torch.ones_like(target[:, 0])
        figures["val_r2"] = tjepa.r_squared(predicted, target, every).item()
        learned = figures["val_r2"] > 0

    health = tjepa.latent_health(latents, tokens != model.cfg.pad)
    word = tjepa.health_word(health)
    if word != "collapsed" and not learned:         # spread, but nothing can be predicted
        word = "unlearned"
    return figures | health | dict(health=word)

def around_gap(tokenizer, before, after):
    """Token ids of the text before and after a gap, as in running text."""
    # the first word has a space in front of it, and a space before the gap belongs to the gap
    left = tokenizer.encode(" " + before.rstrip()) if before else []
    return left, tokenizer.encode(after)

def gap_energy(run, tokenizer, before, values, after):
    """Energy of each of n values (strings) in the gap between before and after: (n,).

    A low energy means that the value fits.
    """
    left, right = around_gap(tokenizer, before, after)
    space = "" if before[-1:].strip() else " "
    middles = [tokenizer.encode(space + value) for value in values]

    longest = max(range(len(values)), key=lambda i: len(middles[i]))
    width = len(left) + len(middles[longest]) + len(right)
    if width > run.cfg.block_size:
        raise ValueError(f"the text has {width} tokens with '{values[longest]}' in the gap, above "
                         f"the run's block_size={run.cfg.block_size}: shorten it")
    return filled_energy(run, tokenizer, left, middles, right)

@torch.no_grad()
def filled_energy(run, tokenizer, left, middles, right, size=512):
    """Energy of each of n fillings, lists of token ids, between left and right: (n,).

    `size` texts are encoded at a time.
    """
    width = len(left) + max(map(len, middles)) + len(right)
    # a shorter value leaves padding at the end of its row
    tokens = torch.full((len(middles), width), tokenizer.pad)                   # (n, T)
    # max_spans marks a token that stays, 0 a token of the only span
    spans = torch.full_like(tokens, run.model.cfg.max_spans)                    # (n, T)
    for row, middle in enumerate(middles):
        text = left + middle + right
        tokens[row, :len(text)] = torch.tensor(text)
        spans[row, len(left):len(left) + len(middle)] = 0

    # no autocast: in bf16 different values would have equal energies
    parts = []
    for start in range(0, len(middles), size):
        rows = slice(start, start + size)
        parts.append(run.model.energy(tokens[rows].to(run.device), spans[rows].to(run.device)))
    return torch.cat(parts)

# -- phase 1 on a text of one's own: which word is hidden? -----------------------------------------
class HiddenWords(NamedTuple):
    """Rows of text in which one word, a single token, is hidden, and the words that may fill it."""
    tokens: torch.Tensor        # (n, T)
    place: torch.Tensor         # (n, 1) position of the hidden word
    own: torch.Tensor           # (n,) number of the hidden word among the candidates
    words: torch.Tensor         # (W,) token ids of the candidates, the commonest first
    log_prior: torch.Tensor     # (W,) log of how often each occurs in the training text

def hide_words(run, text, rows, width=32, first=0):
    """`HiddenWords` in random rows of a `data.Text`; None where there is nothing to choose from.

    The candidates are the 100 commonest words of one token in the training text, after the `first`
    commonest: words of equal length, so that energies can be compared. Always the same rows: a
    row has a whole word hidden that is a candidate, with text on both sides. Rows are cut to
    `width` tokens around it: each of them is read a hundred times.
    """
    tokenizer = run.corpus.tokenizer
    common = data.frequent_words(run.corpus.train.tokens, tokenizer, first + 100)
    words, counts = (part[first:] for part in common)                           # (W,)
    torch.manual_seed(0)
    tokens = text.batch(rows)                                                   # (n, T)
    starts = torch.tensor(tokenizer.word_start)[tokens]
    whole = starts[:, 1:-1] & starts[:, 2:] & (tokens[:, 2:] != tokenizer.pad)
    may_hide = torch.nn.functional.pad(whole & torch.isin(tokens[:, 1:-1], words), (1, 1))
    kept = may_hide.any(1)
    if len(words) < 5 or not kept.any():
        return None
    tokens, may_hide = tokens[kept], may_hide[kept]
    place = torch.multinomial(may_hide.float(), 1)                              # (n, 1)
    own = (tokens.gather(1, place) == words).int().argmax(1)
    begin = (place - width // 2).clamp(max=tokens.size(1) - width).clamp(min=0)     # (n, 1)
    window = begin + torch.arange(min(width, tokens.size(1)))
    parts = (tokens.gather(1, window), place - begin, own, words, counts.log())
    return HiddenWords(*(part.to(run.device) for part in parts))

@torch.no_grad()
def word_scores(run, hidden, size=512):
    """How well each candidate fills each gap: a dict of (n, W); higher is better.

    energy: minus the latent prediction error; head: the log-probability by the masked-LM head,
    where the model has one.
    """
    model = run.model
    tokens, place, _, words, _ = hidden
    spans = torch.full_like(tokens, model.cfg.max_spans).scatter(1, place, 0)
    # no autocast: in bf16 different words would have equal energies
    prediction = model.predict(tokens, spans, n_removed=1)
    scores = {}
    if model.cfg.mlm:
        logits = model.word_logits(prediction)[:, 0].float()                    # (n, V)
        scores["head"] = logits.log_softmax(-1)[:, words]

    # the prediction is the same for all words of a gap; their target latents are not
    energies = []
    for row in torch.arange(len(tokens)).split(max(1, size // len(words))):
        n = len(row) * len(words)
        filled = tokens[row].repeat_interleave(len(words), 0)                   # (n, T)
        at = place[row].repeat_interleave(len(words), 0)                        # (n, 1)
        filled = filled.scatter(1, at, words.repeat(len(row))[:, None])
        of_span = torch.full_like(filled, model.cfg.max_spans).scatter(1, at, 0)
        spans = tjepa.split_spans(of_span, filled, 1, model.cfg)
        target = model.target_latents(spans)[:, 0]                              # (n, C)
        predicted = prediction.predicted[row, 0].repeat_interleave(len(words), 0)
        error = tjepa.latent_error(predicted, target, model.cfg.loss)           # (n,)
        energies.append(error.view(len(row), len(words)))
    scores["energy"] = -torch.cat(energies)
    return scores

def hit_and_rank(scores, own, name):
    """hit@1, hit@5 and median rank of the hidden words, from scores (n, W): a dict of figures."""
    mine = scores.gather(1, own[:, None])
    # >= and not >: a tie is lost, or latents collapsed to one point would always be right
    rank = (scores >= mine).sum(1).double()
    return {f"word_{name}_hit1": (rank <= 1).double().mean().item(),
            f"word_{name}_hit5": (rank <= 5).double().mean().item(),
            f"word_{name}_rank": rank.median().item()}

def hidden_words(run, rows=256):
    """Which of 100 common words is hidden in held-out text: figures, {} where nothing is to choose.

    energy      by the latent prediction error alone
    prior       by energy and the log-frequency of the word: an energy leaves out how common a word
                is. Their ratio is fitted on half as many gaps of the training text
    head        by the masked-LM head
    unigram     the control: the commonest word comes first, whatever the context is

    similar_... by energy, head and unigram again, among the 100 words that follow the 100
                commonest. They are about equally frequent, so that frequency alone hardly helps
    """
    held_out = hide_words(run, run.corpus.val, rows)
    known = hide_words(run, run.corpus.train, rows // 2)
    if held_out is None or known is None:
        return {}
    scores = word_scores(run, held_out)
    energy = word_scores(run, known)["energy"]
    losses = {}
    for weight in torch.logspace(-2, 3, 51).tolist():
        logits = weight * energy + known.log_prior
        losses[weight] = torch.nn.functional.cross_entropy(logits, known.own).item()
    scores["prior"] = min(losses, key=losses.get) * scores["energy"] + held_out.log_prior
    scores["unigram"] = held_out.log_prior.expand_as(scores["energy"])
    figures = dict(word_choices=len(held_out.words))
    for name, score in scores.items():
        figures |= hit_and_rank(score, held_out.own, name)
    return figures | similar_words(run, rows)

def similar_words(run, rows):
    """The figures similar_... of `hidden_words`; {} where the text has fewer than 200 such words.
    """
    hidden = hide_words(run, run.corpus.val, rows, first=100)
    if hidden is None or len(hidden.words) < 100:
        return {}
    scores = word_scores(run, hidden)
    scores["unigram"] = hidden.log_prior.expand_as(scores["energy"])
    figures = {}
    for name, score in scores.items():
        figures |= hit_and_rank(score, hidden.own, f"similar_{name}")
    return figures

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
    return r1 | mrr | abstention(questions, concept_distance(run, thoughts.latent),
                                run.threshold)

def usual_phrasing(questions):
    """heldout, or trained where no wording is held out."""
    return "heldout" if len(questions.where("DEC", phrasing="heldout")) else "trained"

# share of the questions about made-up subjects that is answered "I don't know"
REFUSED = 0.9

def threshold_of(questions, distance, most=math.inf):
    """How far a thought may lie from the nearest known concept before it is called unknown.

    distance (n,): to the nearest concept. REFUSED of the questions about made-up subjects lie
    beyond it; no test reads them. most: they set no higher one (after --phase=teach that of phase
    2). But half of the known questions lie within it, and of pairs of one's own all that are
    taught; the margin is for rounding: asked alone, or in bf16, a distance differs a little.
    """
    def quantile(share, *splits, phrasing):
        """The distance below which a share of some questions lies; 0 if there are none."""
        found = distance[questions.where(*splits, phrasing=phrasing)]
        return found.quantile(share).item() if len(found) else 0.0

    known = quantile(0.5, "DEC", "NEW", phrasing=usual_phrasing(questions))
    own = [i for i, row in enumerate(questions.rows) if row.relation == "qa"
           and row.split in ("DEC", "NEW") and row.phrasing == "trained"]
    if own:
        known = max(known, 1.05 * distance[own].max().item())
    return max(known, min(most, quantile(1 - REFUSED, "NEVER", phrasing="made_up")))

def concept_distance(run, latent, size=4096):
    """Distance of each thought (n, D) to the nearest concept, (n,)."""
    parts = [torch.cdist(rows, run.concepts).amin(1) for rows in latent.split(size)]
    return torch.cat(parts)

def abstention(questions, distance, most=math.inf):
    """The distance of a thought to the nearest known concept, (n,), as a sign of not knowing.

    threshold           see `threshold_of`, which reads most
    abstain             share of NEVER questions beyond it, in held-out wordings if there are any
    abstain_typing      the same with the noise of the test
    abstain_nonsense    share of the lines of nonsense beyond it
    auroc               chance that a NEVER question lies farther away than a DEC question of the
                        same wording
    """
    figures = {"threshold": threshold_of(questions, distance, most)}
    beyond = (distance > figures["threshold"]).float()
    usual = usual_phrasing(questions)
    wordings = {"abstain": usual, "abstain_typing": TYPING, "abstain_nonsense": "nonsense"}
    for name, phrasing in wordings.items():
        never = questions.where("NEVER", phrasing=phrasing)
        if len(never):
            figures[name] = beyond[never].mean().item()
    known = distance[questions.where("DEC", phrasing=usual)]
    unknown = distance[questions.where("NEVER", phrasing=usual)]
    if len(unknown) and len(known):
        farther = unknown[:, None] > known                                      # (NEVER, DEC)
        figures["auroc"] = farther.float().mean().item()
    return figures

# -- phase 3: speech -------------------------------------------------------------------------------
def say_tokens(run, thoughts, size=512):
    """Greedy speech for a `Thought` of n rows, `size` at a time: n lists of token ids."""
    said = []
    for rows in torch.arange(len(thoughts.latent), device=run.device).split(size):
        with run.autocast():
            steps = list(run.model.speak(thoughts.rows(rows)))                  # L of (n,)
        ids = torch.stack(steps, dim=1)                                         # (n, L)
        said += [words_of(row, run.model.cfg.pad) for row in ids.tolist()]
    return said

def words_of(row, pad):
    """The ids of a list that are text: special tokens come after them in the vocabulary."""
    return [i for i in row if i < pad]

def say(run, thoughts):
    """Greedy speech for a `Thought` of n rows: a list of n strings."""
    return [run.corpus.tokenizer.decode(row).strip() for row in say_tokens(run, thoughts)]

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
    distance = concept_distance(run, thoughts.latent)
    known = distance <= threshold_of(questions, distance, run.threshold)
    figures = by_split(questions, "em", right) | by_split(questions, "sure", right & known)

    control = questions.where("DEC", "LAT", phrasing=usual_phrasing(questions))
    if not len(control):                # each old fact was replaced by --phase=teach
        return figures
    # the same permutation at every evaluation
    torch.manual_seed(0)
    others = control[torch.randperm(len(control), device=run.device)]
    figures["em_shuffled"] = says_its_answer(control, thoughts.rows(others)).float().mean().item()
    return figures

# -- phase 3 on a text of one's own: gaps aloud ---------------------------------------------------
class Gaps(NamedTuple):
    """Removed spans of a text, n of them: what phase 3 says where no answers were taught."""
    predicted: torch.Tensor     # (n, D) what the predictor makes of the text around each
    target: torch.Tensor        # (n, D) its latent in the target encoder, L_a
    words: torch.Tensor         # (n, A) its tokens, with EOS
    text: torch.Tensor          # (n, T) the row that it was removed from
    begin: torch.Tensor         # (n,) position of its first token

# share of a row's tokens that is removed in phase 3: most of the text stays, as around a gap that
# `sample.py --fill` is asked to fill
FEW = 0.15

class Holes(NamedTuple):
    """Rows of text from which n spans are removed, before anything is thought of them."""
    tokens: torch.Tensor        # (B, T)
    span_ids: torch.Tensor      # (B, T) as `tjepa.sample_spans` returns them
    room: int                   # the most tokens that a row loses; each ends in as much padding
    row: torch.Tensor           # (n,) the row of each span
    span: torch.Tensor          # (n,) its number in that row
    words: torch.Tensor         # (n, A) its tokens, with EOS
    begin: torch.Tensor         # (n,) position of its first token

def cut_holes(run, text, word_start, rows, longest, alone=False):
    """`Holes` in random rows of a `data.Text`: whole spans of at most `longest` tokens.

    They are drawn as in phase 1, but few of them. word_start: bool (V,), on the run's device.
    alone: one a row, and the rest of the row stays.
    """
    cfg = run.model.cfg
    few = dataclasses.replace(cfg, mask_ratio=min(FEW, cfg.mask_ratio))
    # Rows that lose fewer tokens than another need as much padding: all of them are cut for it.
    room = max(1, round(few.mask_ratio * cfg.block_size))
    tokens = text.batch(rows)[:, :-room].to(run.device)                 # (B, T)
    drawn = tjepa.sample_spans(tokens, word_start, few)                 # (B, T)

    # 1. which spans count: up to `longest` tokens, side by side, that end where a word ends
    numbers = torch.arange(few.max_spans, device=run.device)[:, None]
    members = drawn[:, None] == numbers                                 # (B, S, T)
    length = members.sum(-1)                                            # (B, S)
    first = members.int().argmax(-1)
    end = first + length                                                # (B, S)
    side_by_side = members.flip(-1).int().argmax(-1) == tokens.size(1) - end
    begins = torch.nn.functional.pad(word_start[tokens], (0, 1), value=True)
    counts = (length > 0) & (length <= longest) & side_by_side
    whole = counts & begins.gather(1, end)
    if whole.any():                     # a text without words, as a genome, has no whole ones
        counts = whole
    if alone:
        counts &= counts.cumsum(1) == 1

    # 2. they are removed, in the numbers that the model knows
    stays = ~counts.gather(1, drawn.clamp(max=few.max_spans - 1)) | (drawn == few.max_spans)
    span_ids = drawn.masked_fill(stays, cfg.max_spans)
    tokens = torch.nn.functional.pad(tokens, (0, room), value=cfg.pad)
    span_ids = torch.nn.functional.pad(span_ids, (0, room), value=cfg.max_spans)

    # 3. the words of each span, then EOS
    row, span = counts.nonzero(as_tuple=True)                           # (n,), (n,)
    begin, size = first[row, span, None], length[row, span, None]       # (n, 1)
    offset = torch.arange(longest + 1, device=run.device)               # (A,)
    words = tokens[row[:, None], (begin + offset).clamp(max=tokens.size(1) - 1)]
    words = words.masked_fill(offset >= size, cfg.pad).scatter(1, size, cfg.eos)
    return Holes(tokens, span_ids, room, row, span, words, begin[:, 0])

def draw_gaps(run, text, rows, longest, alone=False):
    """`Gaps` in random rows of a `data.Text`: the thoughts of `Holes`; arguments as there."""
    holes = cut_holes(run, text, run.model.word_start, rows, longest, alone)
    with run.autocast():
        predicted, target, _ = run.model.think_gaps(holes.tokens, holes.span_ids, holes.room)
    thoughts = [z[holes.row, holes.span].float() for z in (predicted, target)]      # (n, D) each
    return Gaps(*thoughts, holes.words, holes.tokens[holes.row], holes.begin)

def gap_thought(run, left, n, right):
    """The thought of a gap of n tokens between left and right, lists of ids: a `Thought`, 1 row."""
    tokens = torch.tensor([left + n * [0] + right], device=run.device)          # (1, T)
    span_ids = torch.full_like(tokens, run.model.cfg.max_spans)
    span_ids[:, len(left):len(left) + n] = 0
    with run.autocast():
        predicted, _, _ = run.model.think_gaps(tokens, span_ids, n_removed=n)
    return tjepa.thought_of(predicted[:, 0].float())

def token_f1(said, truth):
    """F1 of two lists of tokens, in any order: 1 if they hold the same tokens, 0 if none is shared.
    """
    shared = sum((Counter(said) & Counter(truth)).values())
    return 2 * shared / (len(said) + len(truth))

def spoken_gaps(run, rows, longest=3):
    """Greedy speech about gaps of at most `longest` tokens in held-out text, one in each row.

    gap_em, gap_f1      exact match and token F1 of greedy speech from the predicted latents
    gap_em_echo         exact match from the target latents: what the decoder can say at best
    gap_em_shuffled     control: from the predicted latents of other gaps
    gap_em_common       control: the span that is commonest in the training text, each time
    Nothing is measured where a text has no span that is short enough.
    """
    torch.manual_seed(0)                # the same rows and gaps at every evaluation
    gaps = draw_gaps(run, run.corpus.val, rows, longest, alone=True)
    known = draw_gaps(run, run.corpus.train, 512, longest, alone=True)
    if not len(gaps.words) or not len(known.words):
        return {}
    pad = run.model.cfg.pad
    truth = [words_of(row, pad) for row in gaps.words.tolist()]

    def said_of(latents):
        """What is said of latents (n, D)."""
        return say_tokens(run, tjepa.thought_of(latents))

    def share(said):
        """Share of the gaps whose words are equal to what is said."""
        return sum(map(list.__eq__, said, truth)) / len(truth)

    said = said_of(gaps.predicted)
    # the next gap's: no gap keeps its own
    shuffled = said_of(gaps.predicted.roll(1, 0))
    spans = Counter(tuple(words_of(row, pad)) for row in known.words.tolist())
    commonest = list(spans.most_common(1)[0][0])
    return dict(
        gap_em=share(said),
        gap_f1=sum(map(token_f1, said, truth)) / len(truth),
        gap_em_echo=share(said_of(gaps.target)),
        gap_em_shuffled=share(shuffled),
        gap_em_common=share([commonest] * len(truth)),
    )
