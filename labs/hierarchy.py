"""
The positive control: where theory says that predicting latents must win, does ours?

    python -m labs.hierarchy                the grid; with --jobs=16 on a GPU that many runs share it
    python -m labs.hierarchy --fast         does it run?

The Random Hierarchy Model is a random grammar. Each symbol of a level has a few rules, each rule is a pair of symbols of
the level below; from the root, L levels down, a sentence has 2^L tokens. No two rules share a pair, so that a sentence has
one parse. Two pairs of one symbol are synonyms: only what stands around them shows that they mean the same. Theory
(Korchinski, Favero, Wyart 2026): who predicts tokens finds the symbols of the highest level from about v m^(L+1)
sentences, for a symbol l levels up has to be told by a token l levels down; who predicts its own latents climbs a level at a
time, and about v m^3 are enough at any depth. (v symbols a level, m rules a symbol.) The root has no surroundings: no
objective without labels can find its synonyms, so the highest level that is judged is L-1. m must be below v: with m = v
every pair is a rule, and the sentences are uniform noise.

Expected before the first run: for the masked LM P*, the sentences it takes, grows by m a level; for latent prediction
it stays the same.

P* is where the probe of level L-1, on sentences that phase 1 has not seen, passes half the way from the random-init encoder
to 1: a line between the two tried P (in log P) that lie on its two sides. That threshold was fixed before any run. All arms
share the grammar of a seed, its sentences (those of a smaller P are among those of a larger), model size, batch, learning
rate, masks and the number of optimizer steps; the epochs differ with P. They also share learned positions: with rotary ones
alone a bidirectional encoder has to find out where a pair begins, and all objectives are slower.
"""
import dataclasses
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import evaluate
import tjepa
import train
from labs.arms import Flags, main, markdown, publish, run_arms
from labs.measures import logistic_probe

DRAWS = 2 ** 17     # sentences drawn from a grammar before repetitions are dropped


@dataclasses.dataclass
class Config(train.Config):
    """An arm: the grammar's shape, and how many sentences of it there are to learn from."""
    depth: int = 3              # L, levels above the tokens: a sentence has 2^L
    symbols: int = 16           # v, symbols of a level, and so the vocabulary
    rules: int = 4              # m, rules of a symbol
    sentences: int = 1024       # P, distinct sentences to learn from
    block_size: int = 8         # 2^L
    nodes: int = 4096           # labelled nodes for the probe of a level, three fifths to fit it: the same at every level
    objective: str = "latent"   # what the tables call this arm

    def __post_init__(self):
        super().__post_init__()
        tjepa.check(self, (("depth", lambda v: v >= 2, "2 or more: one level has no surroundings"),
                           ("rules", lambda v: 1 < v < self.symbols, f"2 or more, and below --symbols={self.symbols}"),
                           ("block_size", lambda v: v == 2 ** self.depth, f"2 ** --depth = {2 ** self.depth}"),
                           ("sentences", lambda v: v >= 1, "1 or more"), ("nodes", lambda v: v >= 64, "64 or more")))

FLOOR = "random-init encoder"
BASE = Config(n_layer=4, n_embd=64, pred_embd=32, positions="learned", target="token", max_span=2, batch_size=256,
              pretrain_steps=2000, pretrain_lr=2e-3, dtype="fp32", depth=2, block_size=4)
OBJECTIVES = {
    "masked LM": dict(loss="none", mlm=1.0, sigreg=0.0, pred_layer=0),
    "latent": {},
    "latent without predictor": dict(pred_layer=0),
    "latent InfoNCE": dict(loss="infonce", sigreg=0.0),
    "latent last layer": dict(top_k=1),
    "latent sigreg 0.1": dict(sigreg=0.1),
}
SIZES = {2: (64, 128, 256), 3: (128, 512, 2048), 4: (256, 1024, 4096, 16384)}

# -- the grammar -------------------------------------------------------------------------------------------------------
class Grammar:
    """rules: for each level from the root down, (v, m, 2): the pairs of the level below that a symbol may become."""
    def __init__(self, cfg):
        generator = torch.Generator().manual_seed(cfg.seed)
        v, m = cfg.symbols, cfg.rules
        self.rules = []
        for _ in range(cfg.depth):
            pairs = torch.randperm(v * v, generator=generator)[:v * m]                  # no pair twice: one parse
            self.rules.append(torch.stack((pairs // v, pairs % v), 1).view(v, m, 2))

    def draw(self, n, generator):
        """n sentences, (n, 2^L): a root, then a rule for each symbol, all drawn evenly."""
        symbols = torch.randint(len(self.rules[0]), (n, 1), generator=generator)        # (n, 1)
        for rules in self.rules:
            which = torch.randint(rules.size(1), symbols.shape, generator=generator)    # (n, nodes)
            symbols = rules[symbols, which].flatten(1)                                  # (n, 2 * nodes)
        return symbols

    def parse(self, tokens):
        """tokens (n, 2^L) -> the symbols of each level, tokens first: (n, 2^L), ..., (n, 2), (n, 1). ValueError: no
        rule makes one of the pairs."""
        levels = [tokens]
        for rules in reversed(self.rules):
            v, m, _ = rules.shape
            parent = torch.full((v, v), -1)
            parent[rules[..., 0], rules[..., 1]] = torch.arange(v)[:, None].expand(v, m)
            levels.append(parent[levels[-1][:, ::2], levels[-1][:, 1::2]])              # (n, nodes / 2)
            if (levels[-1] < 0).any():
                raise ValueError(f"not a sentence of this grammar: a pair of level {len(levels) - 2} has no rule")
        return levels

def draw_sentences(grammar, cfg):
    """(P, 2^L) to learn from, and up to cfg.nodes others, (n, 2^L), to probe with. The others are the same for every P."""
    drawn = grammar.draw(DRAWS, torch.Generator().manual_seed(cfg.seed + 1))
    distinct, kind = drawn.unique(dim=0, return_inverse=True)
    first = torch.full((len(distinct),), DRAWS).scatter_reduce(0, kind, torch.arange(DRAWS), "amin")
    drawn = drawn[first.sort().values]                                                  # in the order of drawing
    n_new = min(cfg.nodes, len(drawn) // 2)
    if cfg.sentences > len(drawn) - n_new:
        raise ValueError(f"--sentences={cfg.sentences}: a grammar of depth {cfg.depth} has {len(drawn) - n_new} here, "
                         f"beside the {n_new} to probe with: ask for fewer, or raise --rules or --symbols")
    return drawn[n_new:n_new + cfg.sentences], drawn[:n_new]

class Sentences(NamedTuple):
    """A corpus, as far as `train.pretrain` looks at one."""
    rows: torch.Tensor      # (n, T)

    def batch(self, n):
        """n sentences, drawn anew: (n, T)."""
        return self.rows[torch.randint(len(self.rows), (n,))]

# -- an arm ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def read_out(run, grammar, tokens):
    """What a logistic probe reads from the frozen latents of tokens (n, T): level_1 ... level_L, the accuracy for the
    hidden symbols of a level. A node's features are the mean latent of the tokens below it. A sentence is in one
    split. Chance is about 1/v."""
    latents = run.model.encode(tokens.to(run.device)).float().cpu()                     # (n, T, C)
    found = {}
    for level, symbols in enumerate(grammar.parse(tokens)[1:], 1):
        n = min(len(tokens), run.cfg.nodes // symbols.size(1))      # sentences that hold so many nodes
        nodes = latents[:n].unflatten(1, (-1, 2 ** level)).mean(2)                      # (n, nodes, C)
        parts = [(x.flatten(0, 1), y.flatten()) for x, y in zip(*(part[:n].tensor_split((n * 3 // 5, n * 4 // 5))
                                                                  for part in (nodes, symbols)))]
        with torch.enable_grad():
            found[f"level_{level}"] = logistic_probe(*parts)[0]
    return found

def measure(cfg):
    """Phase 1 of train.py on the sentences of a grammar, then the probes: a dict."""
    grammar = Grammar(cfg)
    known, new = draw_sentences(grammar, cfg)
    device, dtype = train.pick_device(cfg)
    words = SimpleNamespace(vocab_size=cfg.symbols + 4, word_start=torch.ones(cfg.symbols + 4, dtype=torch.bool))
    corpus = SimpleNamespace(train=Sentences(known), val=Sentences(new), values={})
    run = train.Run(cfg, train.build(cfg, words).to(device), corpus, device, dtype)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    log = evaluate.Log(cfg.out, [])
    train.fit(run, "pretrain", train.pretrain(run)[0], lambda whole: {}, log, lambda step, optimizer: None)
    return (log.last() | evaluate.evaluate_text(run) | read_out(run, grammar, new)
            | dict(objective=cfg.objective, depth=cfg.depth, sentences=cfg.sentences))

# -- from probes to P* -------------------------------------------------------------------------------------------------
def crossing(points, threshold):
    """points: (P, probe), rising in P -> the P at which the probe first reaches the threshold, on a line in log P. 0 if
    it lies below the smallest P tried, infinity if above the largest."""
    if points[0][1] >= threshold:
        return 0.0
    for (p, low), (q, high) in zip(points, points[1:]):
        if high >= threshold:
            return p * (q / p) ** ((threshold - low) / (high - low))
    return math.inf

def samples_needed(rows, objective, depth, level):
    """P* of a hidden level in grammars of a depth: {seed: P*}, for the seeds that have the random-init encoder too."""
    name, found = f"level_{level}", {}
    floors = {row["seed"]: row[name] for row in rows if (row["objective"], row["depth"]) == (FLOOR, depth)}
    for seed, floor in floors.items():
        points = sorted((row["sentences"], row[name]) for row in rows
                        if (row["objective"], row["depth"], row["seed"]) == (objective, depth, seed))
        if points:
            found[seed] = crossing(points, (floor + 1) / 2)
    return found

def slopes(needed):
    """needed: for each depth {seed: P*} -> for each seed, by how much log P* / log m rises a level (least squares), if
    P* was found at two depths or more. Theory: 1 for tokens, 0 for latents."""
    found = []
    for seed in sorted(set().union(*needed.values())):
        at = [(depth, math.log(stars[seed], BASE.rules)) for depth, stars in needed.items()
              if 0 < stars.get(seed, 0) < math.inf]
        if len(at) > 1:
            found.append(statistics.linear_regression(*zip(*at)).slope)
    return found

def cell(stars, tried):
    """The P* of each seed as one cell; where it lies outside of what was tried, the end of that."""
    return ", ".join(f"< {min(tried)}" if p == 0 else f"> {max(tried)}" if p == math.inf else f"{p:.0f}"
                     for _, p in sorted(stars.items())) or "not measured"

def summary(rows, columns):
    """A table of P*, an objective a row. columns: title -> (depth, level); the slope is over the columns."""
    lines = [["objective", *columns, "slope of log P* / log m (tokens: 1, latents: 0)"]]
    for objective in OBJECTIVES:
        needed = {at: samples_needed(rows, objective, *at) for at in columns.values()}
        tried = {at: [row["sentences"] for row in rows if (row["objective"], row["depth"]) == (objective, at[0])]
                 for at in needed}
        rise = slopes({at[1]: stars for at, stars in needed.items()})
        spread = f" ± {statistics.stdev(rise):.2f}" if len(rise) > 1 else " (1 seed)"
        lines.append([objective, *(cell(stars, tried[at]) for at, stars in needed.items()),
                      f"{statistics.mean(rise):.2f}{spread}" if rise else "not measured"])
    return markdown(lines)

def probes(rows, depth):
    """A table of the probe of the highest level that has surroundings, an objective a row and a P a column."""
    here = [row for row in rows if row["depth"] == depth]
    sizes = sorted({row["sentences"] for row in here if row["objective"] != FLOOR})
    lines = [["objective", *(f"P = {size}" for size in sizes)]]
    for objective in (FLOOR, *OBJECTIVES):
        values = [[row[f"level_{depth - 1}"] for row in here if row["objective"] == objective
                   and (row["sentences"] == size or objective == FLOOR)] for size in sizes]
        lines.append([objective, *(" , ".join(f"{value:.2f}" for value in some) or "not measured" for some in values)])
    return markdown(lines)

def draw(rows, depths, path):
    """A panel a depth: the probe of level L-1 against P, a point a seed and a line through the means; and P* against L."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(depths) + 1, figsize=(4 * len(depths) + 4, 4), layout="constrained")
    colour = dict(zip(OBJECTIVES, plt.get_cmap("tab10").colors))
    for axis, depth in zip(axes, depths):
        name, here = f"level_{depth - 1}", [row for row in rows if row["depth"] == depth]
        floor = [row[name] for row in here if row["objective"] == FLOOR]
        if floor:
            axis.axhline(statistics.mean(floor), color="0.6", linestyle=":", label=FLOOR)
            axis.axhline((statistics.mean(floor) + 1) / 2, color="0.6", linestyle="--", label="threshold of P*")
        for objective in OBJECTIVES:
            at = {}
            for row in here:
                if row["objective"] == objective:
                    at.setdefault(row["sentences"], []).append(row[name])
            at = dict(sorted(at.items()))
            axis.plot(list(at), [statistics.mean(values) for values in at.values()], color=colour[objective], label=objective)
            axis.plot(*zip(*((size, value) for size, values in at.items() for value in values)), ".", color=colour[objective])
        axis.set(title=f"L = {depth}: probe of level {depth - 1}", xscale="log", xlabel="sentences P", ylim=(0, 1.02))
    axes[0].legend(fontsize=7)
    for objective in OBJECTIVES:
        points = [(depth, p) for depth in depths for p in samples_needed(rows, objective, depth, depth - 1).values()
                  if 0 < p < math.inf]
        axes[-1].plot(*zip(*points), "o", color=colour[objective], alpha=0.7)
    axes[-1].set(title="P*, where it was found", yscale="log", xlabel="depth L", xticks=depths)
    figure.savefig(path, dpi=110)
    plt.close(figure)

# -- the whole ---------------------------------------------------------------------------------------------------------
def grid(few):
    """The arms, name -> Config. few: fields that are smaller for --fast."""
    arms = {f"{FLOOR} L{depth}": dataclasses.replace(BASE, objective=FLOOR, depth=depth, block_size=2 ** depth,
                                                     sentences=sizes[0], **few | dict(pretrain_steps=0))
            for depth, sizes in SIZES.items()}
    for objective, change in OBJECTIVES.items():
        for depth, sizes in SIZES.items():
            for size in sizes:
                arms[f"{objective} L{depth} P{size}"] = dataclasses.replace(
                    BASE, objective=objective, depth=depth, block_size=2 ** depth, sentences=size, **few | change)
    return arms

def hierarchy(flags):
    """Run the arms; write the tables and the figure."""
    arms = grid(dict(n_embd=32, pred_embd=16, n_layer=2, top_k=1, batch_size=8, pretrain_steps=3) if flags.fast else {})
    rows = run_arms("hierarchy", arms, flags, measure)
    deepest = max(SIZES)
    draw(rows, list(SIZES), path := Path(flags.out) / f"hierarchy{'-fast' * flags.fast}.png")
    text = "\n\n".join((
        f"P* of the highest level that has surroundings, a seed each; v = {BASE.symbols}, m = {BASE.rules}:",
        summary(rows, {f"L = {depth}": (depth, depth - 1) for depth in SIZES}),
        f"P* of every such level in the deepest grammar, L = {deepest}:",
        summary(rows, {f"level {level}": (deepest, level) for level in range(1, deepest)}),
        *(f"Probe of level {depth - 1}, L = {depth}, a seed each:\n\n{probes(rows, depth)}" for depth in SIZES)))
    publish("hierarchy", rows, text, flags.table)
    print(f"figure: {path}")


if __name__ == "__main__":
    main(hierarchy)
