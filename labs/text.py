"""
A text of one's own: does a run learn its words, and can it say what is hidden?

    python data/shakespeare/prepare.py          tiny Shakespeare, 1 MB
    python data/wordnet/prepare.py              WordNet's glosses, 3 MB
    python -m labs.text --seeds=1               all arms; over 3 hours of a core
    python -m labs.text --fast                  a minute of a core: does it run?

Expected before the first run: after as many tokens the masked LM and the token head of the default
find the hidden word equally often, energy with word frequency finds it less often, latents alone
are at the word frequencies. Spoken gaps of the default are behind the greedy filling of the masked
LM, which is told how many tokens are hidden.

Expected of four times the steps: by then a row has been read 75 times, so the held-out figures gain
less than a doubling. (Phase 1 decides the hidden words, so most seeds go through it alone.)

The arms of a text read the same rows with the same learning rate, the one that `train.py
--data=FILE` takes for it. The masked LM has no predictor and no latents, and fills a gap greedily,
all of its tokens at once. The GPT reads the text before a gap and goes on greedily from there.
"""
import dataclasses
import math
import re
from collections import Counter
from pathlib import Path

import torch

import data
import evaluate
import sample
import tjepa
import train
from labs.arms import Flags, chosen, in_short, main, run_arms
from labs.controls import MASKED_LM, read_gpt
from labs.runs import NO_TOKENS, NOW, Arm, open_run, train_arm
from labs.tables import table

def settings(n_characters, file):
    """What `train.py --data=FILE` takes for so many characters of prose in the Latin script."""
    sizes = next(row[1:] for row in train.TEXT_SIZES if n_characters <= row[0])
    names = ("vocab_size", "pretrain_steps", "speak_steps")
    # without questions there is no phase 2
    rest = dict(distill_steps=0, eval_every=10 ** 9, data=file)
    return NOW | train.TEXT | dict(zip(names, sizes)) | rest

def systems(text):
    """The systems that read a text, with its settings: name -> Arm."""
    return {
        "default": Arm(**text),
        "latents alone": Arm(**text | NO_TOKENS),
        "masked LM": Arm(**text | MASKED_LM | dict(phase="pretrain")),
        "GPT": Arm(**text | dict(phase="pretrain", variant="GPT")),
    }

SHAKESPEARE = settings(1_115_394, "data/shakespeare/input.txt")
WORDNET = settings(3_225_670, "data/wordnet/input.txt")
LONG = SHAKESPEARE | dict(pretrain_steps=16_000, speak_steps=4_800)
ARMS = systems(SHAKESPEARE) | {
    "random encoder": Arm(**SHAKESPEARE | dict(pretrain_steps=0)),
    "default for 40 minutes": Arm(**LONG),
    "four times the reading": Arm(**LONG | dict(phase="pretrain")),
    **{f"{name} on WordNet": arm for name, arm in systems(WORDNET).items()},
}
COLUMNS = {
    "hit@5, energy": "word_energy_hit5", "energy + frequency": "word_prior_hit5",
    "token head": "word_head_hit5", "frequency alone": "word_unigram_hit5",
    "gaps: exact match": "gap_em", "gaps: token F1": "gap_f1",
}

def greedy_fill(run, rows=512):
    """Exact match and token F1 of a masked LM on the gaps that `evaluate.spoken_gaps` asks for.

    It is told how many tokens are hidden, and takes the likeliest at each place, all at once.
    """
    torch.manual_seed(0)
    gaps = evaluate.draw_gaps(run, run.corpus.val, rows, longest=3, alone=True)
    pad = run.model.cfg.pad
    n = (gaps.words < pad).sum(1, keepdim=True)                         # (n, 1)
    place = torch.arange(gaps.text.size(1), device=run.device) - gaps.begin[:, None]    # (n, T)
    hidden = (place >= 0) & (place < n)
    span_ids = torch.where(hidden, 0, run.model.cfg.max_spans)
    with torch.no_grad():
        p = run.model.predict(gaps.text, span_ids, n_removed=3)
        said = run.model.word_logits(p)[..., :pad].argmax(-1)           # (n, 3)
    # `split_spans` puts what is removed last: a row that loses fewer tokens begins with padding
    pairs = [(row[-k:], words[:k]) for row, words, k in
             zip(said.tolist(), gaps.words.tolist(), n[:, 0].tolist())]
    return dict(gap_em=sum(a == b for a, b in pairs) / len(pairs),
                gap_f1=sum(evaluate.token_f1(a, b) for a, b in pairs) / len(pairs))

@torch.no_grad()
def gpt_fill(run, rows=512):
    """Exact match and token F1 of a GPT on the same gaps, greedily, from the text before each.

    It is told how many tokens are hidden.
    """
    word_start = torch.tensor(run.corpus.tokenizer.word_start, device=run.device)
    torch.manual_seed(0)
    gaps = evaluate.cut_holes(run, run.corpus.val, word_start, rows, longest=3, alone=True)
    pad, text = run.model.cfg.pad, gaps.tokens[gaps.row]
    row = torch.arange(len(text), device=run.device)
    # what stands in the gap and after it is not read: attention is causal, so one row at a time
    # is continued in place
    for step in range(3):
        states = run.model.states(run.model.after_bos(text))            # (n, 1+T, C)
        place = (gaps.begin + step).clamp(max=text.size(1) - 1)         # (n,)
        text[row, place] = run.model.say(states[row, place])[:, :pad].argmax(-1)
    truth = [evaluate.words_of(words, pad) for words in gaps.words.tolist()]
    said = [ids[begin:begin + len(words)] for ids, begin, words in
            zip(text.tolist(), gaps.begin.tolist(), truth)]
    return dict(gap_em=sum(map(list.__eq__, said, truth)) / len(truth),
                gap_f1=sum(map(evaluate.token_f1, said, truth)) / len(truth))

@torch.no_grad()
def gpt_words(run, rows=256):
    """Figures of hidden words by the log-probability of a GPT, which reads the text before each."""
    figures = {}
    for first, name in ((0, "head"), (100, "similar_head")):
        hidden = evaluate.hide_words(run, run.corpus.val, rows, first=first)
        states = run.model.states(run.model.after_bos(hidden.tokens))   # (n, 1+T, C)
        # after [BOS] the state at a place has read all tokens before it
        before = states[torch.arange(len(states)), hidden.place[:, 0]]  # (n, C)
        scores = run.model.say(before)[:, hidden.words]                 # (n, W)
        figures |= evaluate.hit_and_rank(scores, hidden.own, name)
    return figures

# -- a passage goes on -----------------------------------------------------------------------------

class Judge:
    """Bits per character of a text by a character model of order 4, counted in another text.

    Each order is interpolated with the next lower one (Witten and Bell 1991): the share of the
    lower order is that of a new character after this context.
    """

    def __init__(self, text, order=4):
        self.order = order
        self.counts = [Counter() for _ in range(order + 2)]     # by length of the string
        self.follow = [Counter() for _ in range(order + 1)]     # different characters after each
        for n in range(order + 1):
            grams = Counter(text[i:i + n + 1] for i in range(len(text) - n))
            self.counts[n + 1] = grams
            self.follow[n] = Counter(gram[:-1] for gram in grams)
        self.total = [Counter() for _ in range(order + 1)]
        for n in range(order + 1):
            for gram, times in self.counts[n + 1].items():
                self.total[n][gram[:-1]] += times

    def bits(self, text):
        """Bits per character of a text, its first `order` characters given."""
        bits = 0.0
        for i in range(self.order, len(text)):
            p = 1 / 256
            for n in range(self.order + 1):
                context = text[i - n:i]
                seen, kinds = self.total[n][context], self.follow[n][context]
                if seen:
                    p = (self.counts[n + 1][context + text[i]] + kinds * p) / (seen + kinds)
            bits -= math.log2(p)
        return bits / max(1, len(text) - self.order)

def judged(passages, tokenizer, corpus):
    """Figures of passages, lists of token ids: real words, distinct pairs of words, bits."""
    known = tokenizer.decode(corpus.train.tokens.tolist())
    real, judge = set(re.findall(r"\w+", known.lower())), Judge(known)
    texts = [tokenizer.decode(ids) for ids in passages]
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    pairs = [pair for row in words for pair in zip(row, row[1:])]
    every = [word for row in words for word in row]
    return dict(passage_distinct=len(set(pairs)) / max(1, len(pairs)),
                passage_real=sum(word in real for word in every) / max(1, len(every)),
                passage_bits=sum(map(judge.bits, texts)) / len(texts))

def beginnings(run, n=32, length=16):
    """The first tokens of n rows of held-out text, a list of lists."""
    torch.manual_seed(0)
    return run.corpus.val.batch(n)[:, :length].tolist()

def go_on(run, length=100, temperature=0.8):
    """Figures of what a T-JEPA says after beginnings of held-out text, span by span."""
    flags = sample.Flags(temperature=temperature)
    session = sample.Session(flags, run, run.corpus.tokenizer, {})
    torch.manual_seed(0)
    passages = [[token for said in sample.think_on(session, ids, length) for token in said]
                for ids in beginnings(run)]
    return judged(passages, run.corpus.tokenizer, run.corpus)

@torch.no_grad()
def gpt_goes_on(run, length=100, temperature=0.8):
    """The same figures of a GPT, which goes on token by token; and of the true text."""
    begun = torch.tensor(beginnings(run), device=run.device)                # (n, 16)
    torch.manual_seed(0)
    ids = begun
    for _ in range(length):
        read = run.model.after_bos(ids[:, -run.cfg.block_size:])
        logits = run.model(read)[0][:, -1, :run.model.cfg.pad]
        token = tjepa.sample_token(logits, temperature)
        ids = torch.cat((ids, token[:, None]), dim=1)
    figures = judged(ids[:, begun.size(1):].tolist(), run.corpus.tokenizer, run.corpus)
    torch.manual_seed(0)
    true = run.corpus.val.batch(32)[:, begun.size(1):].tolist()
    truth = judged(true, run.corpus.tokenizer, run.corpus)
    return figures | {f"true_{name}": value for name, value in truth.items()}

def measure_gpt(cfg):
    """Train a GPT on as many tokens: its figures of hidden words and gaps."""
    run = read_gpt(cfg, data.load(cfg))
    return gpt_words(run) | gpt_fill(run) | gpt_goes_on(run)

def measure(cfg):
    """Train an arm: its figures of hidden words and spoken gaps."""
    if cfg.variant == "GPT":
        return measure_gpt(cfg)
    found = train_arm(cfg)
    figures = {name: value for name, value in found.items()
               if name.startswith(("word_", "gap_", "rank", "val_r2", "health"))}
    if cfg.variant == "MaskedLM":       # it has no latents to speak of
        figures = {name: value for name, value in figures.items()
                   if "_head_" in name or "_unigram_" in name or name == "word_choices"}
        return figures | greedy_fill(open_run(cfg))
    if cfg.phase == "pretrain":
        return figures
    return figures | go_on(open_run(cfg))

def text(flags):
    """Run the arms and print the table."""
    names = chosen(flags, ARMS)
    if flags.fast and not flags.arms:       # one text has every kind of arm
        names = [name for name in names if ARMS[name].data == SHAKESPEARE["data"]]
    for file in sorted({ARMS[name].data for name in names}):
        if flags.seeds and not Path(file).is_file():
            script = Path(file).with_name("prepare.py")
            raise ValueError(f"{file} is missing: run `python {script}` first")
    if flags.fast:
        print("labs.text --fast: a minute of a core; its figures mean nothing")
        arms = {name: in_short(ARMS[name]) for name in names}
        run_arms("text", arms, dataclasses.replace(flags, seeds=1, redo=True), measure)
    else:
        rows = run_arms("text", {name: ARMS[name] for name in names}, flags, measure)
        print(table(rows, list(ARMS), COLUMNS))

if __name__ == "__main__":
    main(text, Flags)
