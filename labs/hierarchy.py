"""
Does latent prediction win where theory says that it must? Sentences of a random grammar.

    python -m labs.hierarchy            49 arms a seed, two to five minutes of a core each
    python -m labs.hierarchy --fast     half a minute on one core: does it run?

In the Random Hierarchy Model each symbol has m rules; a rule is a pair of symbols of the level
below. A root, L levels up, becomes a sentence of 2^L tokens:

    level 2 (root)      a
    level 1             b       c           rules of a: (b c), (c d), ...
    level 0 (tokens)    e   f   g   e       rules of b: (e f), (g h), ...

No pair has two rules, so a sentence has one parse. Theory (Korchinski, Favero, Wyart 2026), for v
symbols a level: to find level l, predicting tokens needs about v m^(l+2) sentences, predicting
latents about v m^3. The root has no context: level L-1 is the highest that is judged.

Expected before the first run: P*, the number of sentences needed, grows m-fold a level for the
masked LM, and stays the same for latent prediction.

P* is where the probe of a level, on new sentences, is half-way between the random-init encoder and
1, on a line in log P between the nearest P tried; this was fixed before the first run. Arms of a
seed share the grammar, the sentences (nested in P), model size, batch, masks, rate and steps, so
epochs differ with P. `BASE` has what differs from train.py: a target per token, as a span mixes
symbols; learned positions, with which the masked LM learned faster in prototypes.

Also tried, seed 9, L = 4, P = 2048, 6,000 steps, probes of levels 2 and 3: masked LM .879 .418, a
third of the rate .726 .346, spans of 4 .785 .377. Latents as here .438 .295; sigreg .1 .662 .333,
.02 .671 .329; .1 with a predictor as wide as the encoder .759 .359, with a fifth of the tokens
masked .778 .337, without predictor .390 .251 (a third of the rate .333 .222), spans of 4 .384 .204,
the last layer alone .295 .188; InfoNCE .467 .279; data2vec .410 .224 (a third of the rate .383
.248, a half-life of 500 .398 .244). Batches of 32 (sigreg .1, a fifth masked): .220 .184. The
theory holds with none of these.
"""
import dataclasses
import math
import statistics
from types import SimpleNamespace

import torch

import evaluate
import tjepa
import train
from labs.arms import in_short, main, run_or_try
from labs.controls import MASKED_LM
from labs.measures import logistic_probe
from labs.runs import Arm, fit, model_of
from labs.tables import Figure, by_seed, figure_of, page_tables, publish, table

DRAWS = 2 ** 16     # sentences drawn from a grammar before repetitions are dropped

@dataclasses.dataclass
class Config(Arm):
    """An arm: the shape of the grammar, and the number of sentences to learn from."""
    depth: int = 3              # L, levels above the tokens: a sentence has 2^L
    symbols: int = 16           # v, symbols of a level, and so the vocabulary
    rules: int = 3              # m, rules of a symbol
    sentences: int = 1024       # P, distinct sentences to learn from
    block_size: int = 8         # 2^L
    nodes: int = 4096           # labelled nodes for the probe of each level
    objective: str = "latent"   # name of this arm in the tables

    def __post_init__(self):
        super().__post_init__()
        # with as many rules as symbols every pair is allowed: sentences are uniform noise
        must = f"2 or more, and below --symbols={self.symbols}"
        tjepa.check(self, [("rules", lambda v: 1 < v < self.symbols, must)])

FLOOR = "random-init encoder"
BASE = Config(n_embd=64, pred_embd=32, mlm=0.0, variant="LearnedPositions", target="token",
              max_span=2, dtype="fp32", batch_size=128, pretrain_steps=1500, pretrain_lr=3e-3)
OBJECTIVES = {
    "masked LM": MASKED_LM | dict(variant="LearnedPositionsMaskedLM"),
    "latent": {},
    "latent without predictor": dict(variant="LearnedPositionsNoPredictor"),
    "latent as data2vec": dict(variant="Data2Vec", sigreg=0.0),
    "latent last layer": dict(top_k=1),
    "latent sigreg 0.1": dict(sigreg=0.1),
    "latent InfoNCE": dict(loss="infonce", sigreg=0.0),
    "latent + masked LM": dict(mlm=0.5),
}
MAIN = list(OBJECTIVES)[:3]     # tried at every depth and P
VARIANTS_AT = (512, 8192)       # the others at these P of the deepest grammar only
SIZES = {                       # the P of each depth
    2: (54, 216),
    3: (128, 512, 2048, 8192),
    4: (32, 128, 512, 2048, 8192, 32768),
}
DEEPEST = max(SIZES)

# -- the grammar -----------------------------------------------------------------------------------

class Grammar:
    """rules: for each level from the root down, (v, m, 2): the pairs that a symbol may become."""

    def __init__(self, cfg):
        generator = torch.Generator().manual_seed(cfg.seed)
        v, m = cfg.symbols, cfg.rules
        self.rules = []
        for _ in range(cfg.depth):
            pairs = torch.randperm(v * v, generator=generator)[:v * m]  # no pair twice: one parse
            self.rules.append(torch.stack((pairs // v, pairs % v), 1).view(v, m, 2))

    def draw(self, n, generator):
        """n sentences, (n, 2^L): a root, then a rule for each symbol, all drawn uniformly."""
        symbols = torch.randint(len(self.rules[0]), (n, 1), generator=generator)
        for rules in self.rules:
            which = torch.randint(rules.size(1), symbols.shape, generator=generator)
            symbols = rules[symbols, which].flatten(1)                  # (n, 2 * nodes)
        return symbols

    def parse(self, tokens):
        """tokens (n, 2^L) -> the symbols of each level, tokens first: (n, 2^L), ..., (n, 1).

        ValueError if a pair has no rule.
        """
        levels = [tokens]
        for rules in reversed(self.rules):
            v, m, _ = rules.shape
            parent_of = torch.full((v, v), -1)
            parent_of[rules[..., 0], rules[..., 1]] = torch.arange(v)[:, None].expand(v, m)
            below = levels[-1]
            parents = parent_of[below[:, ::2], below[:, 1::2]]          # (n, nodes / 2)
            if (parents < 0).any():
                raise ValueError("not a sentence of this grammar: a pair of level "
                                 f"{len(levels) - 1} has no rule")
            levels.append(parents)
        return levels

def draw_sentences(grammar, cfg):
    """(P, 2^L) to learn from, and up to cfg.nodes others for the probes, the same for every P."""
    drawn = grammar.draw(DRAWS, torch.Generator().manual_seed(cfg.seed + 1))
    # the first of each, in the order of drawing
    drawn = torch.tensor(list(dict.fromkeys(map(tuple, drawn.tolist()))))
    n_new = min(cfg.nodes, len(drawn) // 2)
    if cfg.sentences > len(drawn) - n_new:
        raise ValueError(f"--sentences={cfg.sentences}: this grammar has {len(drawn) - n_new}, "
                         f"beside the {n_new} for the probes: ask for fewer")
    return drawn[n_new:n_new + cfg.sentences], drawn[:n_new]

def as_text(rows):
    """Sentences (n, T) as far as phase 1 needs a text: batch(k) draws k of them, (k, T)."""
    return SimpleNamespace(batch=lambda k: rows[torch.randint(len(rows), (k,))])

# -- an arm ----------------------------------------------------------------------------------------

@torch.no_grad()
def read_out(run, grammar, tokens):
    """Accuracy of a probe for the symbols of each level of tokens (n, T): level_1, ...

    A node's features are the mean latent of its tokens. All nodes of a sentence are in the same
    part. Chance is about 1/v.
    """
    latents = run.model.encode(tokens.to(run.device)).float().cpu()     # (n, T, C)
    found = {}
    for level, symbols in enumerate(grammar.parse(tokens)[1:], 1):
        # as many sentences as hold cfg.nodes nodes
        n = min(len(tokens), run.cfg.nodes // symbols.size(1))
        nodes = latents[:n].unflatten(1, (-1, 2 ** level)).mean(2)      # (n, nodes, C)
        cuts = (n * 3 // 5, n * 4 // 5)
        xs, ys = nodes.tensor_split(cuts), symbols[:n].tensor_split(cuts)
        parts = [(x.flatten(0, 1), y.flatten()) for x, y in zip(xs, ys)]
        with torch.enable_grad():
            found[f"level_{level}"] = logistic_probe(*parts)[0]
    return found

def measure(cfg):
    """Phase 1 of train.py on the sentences of a grammar, then the probes: a dict."""
    grammar = Grammar(cfg)
    known, new = draw_sentences(grammar, cfg)
    device, dtype = train.pick_device(cfg)
    n_ids = cfg.symbols + 4                             # the four special tokens
    tokenizer = SimpleNamespace(vocab_size=n_ids, word_start=torch.ones(n_ids).bool())
    corpus = SimpleNamespace(train=as_text(known), val=as_text(new), values={})
    model = train.build(cfg, tokenizer, model=model_of(cfg)).to(device)
    run = train.Run(cfg, model, corpus, device, dtype)
    log = fit(run, "pretrain", train.pretrain(run)[0])
    shape = dict(objective=cfg.objective, depth=cfg.depth, sentences=cfg.sentences)
    return log.last() | evaluate.evaluate_text(run) | read_out(run, grammar, new) | shape

# -- from probes to P* -----------------------------------------------------------------------------

def crossing(points, threshold):
    """The P at which the probe first reaches the threshold, on a line in log P.

    points: (P, probe), rising in P. 0 if below the smallest P, infinity if above the largest.
    """
    if points[0][1] >= threshold:
        return 0.0
    for (p, low), (q, high) in zip(points, points[1:]):
        if high >= threshold:
            return p * (q / p) ** ((threshold - low) / (high - low))
    return math.inf

def slopes(needed):
    """By how much log P* / log m rises a level, by least squares: one slope for each seed.

    needed: level -> {seed: P*}; a seed needs a P* at two levels. Theory: tokens 1, latents 0.
    """
    points = {}
    for level, stars in needed.items():
        for seed, star in stars.items():
            if 0 < star < math.inf:
                points.setdefault(seed, []).append((level, math.log(star, BASE.rules)))
    return [statistics.linear_regression(*zip(*at)).slope for at in points.values() if len(at) > 1]

def in_words(stars, tried):
    """The P* of each seed; where it lies outside of what was tried, the end of that."""
    outside = {0: f"< {min(tried)}", math.inf: f"> {max(tried)}"}
    return ", ".join(outside.get(star, f"{star:.0f}") for star in stars.values())

def summaries(rows):
    """P* and its slope in the deepest grammar: a row an objective, named as in an older table.

    Only seeds count of which the random-init encoder was measured too.
    """
    deepest = [row for row in by_seed(rows) if row["depth"] == DEEPEST]
    floors = {row["seed"]: row for row in deepest if row["objective"] == FLOOR}
    found = []
    for objective in OBJECTIVES:
        mine = {(row["seed"], row["sentences"]): row for row in deepest
                if row["objective"] == objective and row["seed"] in floors}
        if not mine:
            continue
        summary, needed = dict(arm=objective, seed=None), {}
        for level in range(1, DEEPEST):
            name, points = f"level_{level}", {}
            for (seed, size), row in sorted(mine.items()):
                points.setdefault(seed, []).append((size, row[name]))
            stars = {seed: crossing(some, (floors[seed][name] + 1) / 2)
                     for seed, some in points.items()}
            words = in_words(stars, [size for _, size in mine])
            summary[f"needed_L{DEEPEST}_{name}"] = Figure(words, None, len(stars))
            needed[level] = stars
        if rise := slopes(needed):
            summary["slope_over_levels"] = figure_of(rise)
        found.append(summary)
    return found

# -- the arms --------------------------------------------------------------------------------------

def grid(sizes):
    """The arms, name -> Config. sizes: the P of each depth."""
    arms = {}
    for depth, tried in sizes.items():
        shape = dict(depth=depth, block_size=2 ** depth)
        arms[f"{FLOOR} L{depth}"] = dataclasses.replace(
            BASE, objective=FLOOR, sentences=tried[0], pretrain_steps=0, **shape)
        for objective, change in OBJECTIVES.items():
            for size in tried:
                if objective in MAIN or depth == DEEPEST and size in VARIANTS_AT:
                    arms[f"{objective} L{depth} P{size}"] = dataclasses.replace(
                        BASE, objective=objective, sentences=size, **shape | change)
    return arms

def shrunk(cfg):
    """An arm for --fast."""
    return dataclasses.replace(in_short(cfg), nodes=100)

def page(rows):
    """The tables of the lab's page, and the slopes, as markdown."""
    rows = summaries(rows) + rows
    title = "slope of log P* / log m over the levels (tokens: 1, latents: 0)"
    return page_tables("hierarchy", rows) + "\n\n" + table(rows, MAIN, {title: "slope_over_levels"})

def hierarchy(flags):
    """Run the arms and print the tables."""
    few = {2: (54,), 3: (128,), 4: (512,)}
    arms = grid(few if flags.fast else SIZES)
    rows = run_or_try("hierarchy", arms, flags, measure, shrunk)
    if rows is not None:
        publish("hierarchy", rows, page(rows), flags.table)

if __name__ == "__main__":
    main(hierarchy)
