"""
The positive control: where theory says that predicting latents must win, does ours?

    python -m labs.hierarchy                        49 arms a seed, 1,500 steps: two to five minutes of a core each
    python -m labs.hierarchy --fast                 does it run?

The Random Hierarchy Model is a random grammar. A symbol has m rules, each rule is a pair of symbols of the level
below; from the root, L levels down, a sentence has 2^L tokens. No pair belongs to two rules, so a sentence has one
parse. The pairs of one symbol are synonyms: only their surroundings show that they mean the same. Theory (Korchinski,
Favero, Wyart 2026): a symbol l levels above the tokens is found by predicting tokens from about v m^(l+2) sentences (v
symbols a level), because it has to be told by tokens, l levels below; one's own latents stand on its own level, and
about v m^3 are enough at any l. The root has no surroundings and can't be found without labels: level L-1 is the
highest that is judged. m must be below v: if every pair is a rule, sentences are uniform noise. A grammar of depth 2
has no more than v m^3 sentences, and half of them are kept to probe with: there P* may be out of reach.

Expected before the first run: for the masked LM P*, the sentences it takes, grows by m a level; for latent prediction
it stays the same.

P* is where the probe of a level, on sentences that phase 1 has not seen, passes half the way from the random-init
encoder to 1: on a line in log P between the tried P on its two sides. This was fixed before the grid was run. A level
that is not found within the P tried has no P*, and no part in a slope: look at the table beside it. All arms of a seed
share the grammar, the sentences (those of a small P are among those of a larger), model size, batch, masks, the
learning rate (not tuned an arm) and the number of optimizer steps; so the epochs differ with P. What is not train.py's
default, in any arm: `BASE`. Width 64; latents alone, where the name does not say masked LM; spans of one or two tokens,
and a target a token, because a span would mix symbols; learned positions, because rotary ones know distances only and
leave it to the encoder to find out where a pair begins (the masked LM learned more slowly so in prototypes). The
predictor's are rotary even so; the arm without a predictor has learned ones alone.

What was tried to see the theory hold, seed 9, L = 4, P = 2048, 6,000 steps, probes of levels 2 and 3 (theory: 432
sentences for latents, 1296 and 3888 for tokens). Masked LM .879 .418; at a third of the rate .726 .346, spans of 4
.785 .377. Latents: as here .438 .295; sigreg .1 .662 .333, and .02 .671 .329; .1 and a predictor as wide as the encoder
.759 .359; .1 and a fifth of the tokens masked .778 .337; .1 without predictor .390 .251, at a third of the rate .333
.222, spans of 4 .384 .204, the last layer alone .295 .188; InfoNCE .467 .279; as data2vec .410 .224, at a third of the
rate .383 .248, a half-life of 500 steps .398 .244. At P = 512: masked LM .524 .277, sigreg .1 .326 .217, data2vec .339
.213. Batches of 32, not 128 (sigreg .1, a fifth masked): nothing is learned, .220 .184. At L = 3, levels 1 and 2: so in
batches of 128 .817 .556. With none of these does theory hold here.
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
from labs.arms import Flags, main, run_arms
from labs.controls import MASKED_LM
from labs.measures import logistic_probe
from labs.tables import by_seed, cell as cell_of, markdown, over_seeds, publish, table

DRAWS = 2 ** 16     # sentences drawn from a grammar before repetitions are dropped


@dataclasses.dataclass
class Config(train.Config):
    """An arm: the grammar's shape, and how many sentences of it there are to learn from."""
    depth: int = 3              # L, levels above the tokens: a sentence has 2^L
    symbols: int = 16           # v, symbols of a level, and so the vocabulary
    rules: int = 3              # m, rules of a symbol
    sentences: int = 1024       # P, distinct sentences to learn from
    block_size: int = 8         # 2^L
    nodes: int = 4096           # labelled nodes for the probe of each level, three fifths of them to fit it
    objective: str = "latent"   # what the tables call this arm

    def __post_init__(self):
        super().__post_init__()
        tjepa.check(self, (("depth", lambda v: v >= 2, "2 or more: one level has no surroundings"),
                           ("rules", lambda v: 1 < v < self.symbols, f"2 or more, and below --symbols={self.symbols}"),
                           ("block_size", lambda v: v == 2 ** self.depth, f"2 ** --depth = {2 ** self.depth}"),
                           ("sentences", lambda v: v >= 1, "1 or more"), ("nodes", lambda v: v >= 64, "64 or more")))

FLOOR = "random-init encoder"
BASE = Config(n_embd=64, pred_embd=32, mlm=0.0, positions="learned", target="token", max_span=2, dtype="fp32",
              batch_size=128, pretrain_steps=1500, pretrain_lr=3e-3)
OBJECTIVES = {
    "masked LM": MASKED_LM,
    "latent": {},
    "latent without predictor": dict(pred_layer=0),
    "latent as data2vec": dict(loss="smooth_l1", sigreg=0.0, pred_layer=0),
    "latent last layer": dict(top_k=1),
    "latent sigreg 0.1": dict(sigreg=0.1),
    "latent InfoNCE": dict(loss="infonce", sigreg=0.0),
    "latent + masked LM": dict(mlm=0.5),
}
MAIN = list(OBJECTIVES)[:3]                 # tried at every depth and P
VARIANTS_AT = (512, 8192)                   # the others at these P of the deepest grammar only
SIZES = {2: (54, 216), 3: (128, 512, 2048, 8192), 4: (32, 128, 512, 2048, 8192, 32768)}     # the P of each depth

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
    """(P, 2^L) to learn from, and up to cfg.nodes others, (n, 2^L), to probe with: the same others for every P."""
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

def older(rows):
    """The objectives whose P* is known from an older table alone, which has no seeds."""
    measured = {row["objective"] for row in by_seed(rows)}
    known = {row["arm"] for row in rows if row["seed"] is None}
    return [name for name in OBJECTIVES if name in known - measured]

def older_summary(rows, objective, columns):
    """The line of `summary` of an objective as an older table had it."""
    stars = [over_seeds(rows, objective, f"needed_L{depth}_level_{level}") for depth, level in columns.values()]
    depths = {depth for depth, _ in columns.values()}
    slope = over_seeds(rows, objective, "slope_over_levels" if len(depths) == 1 else "slope_over_depths")
    return [objective, *map(cell_of, stars), f"{slope.mean:.2f} ± {slope.deviation:.2f}" if slope else "not measured"]

def older_probes(rows, depth):
    """The table of `probes` from words of an older table, in which a cell has a figure a seed."""
    lines, name = [["objective", *(f"P = {size}" for size in SIZES[depth])]], f"level_{depth - 1}_by_seed"
    for objective in (FLOOR, *OBJECTIVES):
        arms = [f"{objective} L{depth}" + f" P{size}" * (objective != FLOOR) for size in SIZES[depth]]
        if any(found := [over_seeds(rows, arm, name) for arm in arms]):
            lines.append([objective, *map(cell_of, found)])
    return markdown(lines)

def summary(rows, columns):
    """A table of P*, an objective a row. columns: title -> (depth, level); the slope is over the columns."""
    lines = [["objective", *columns, "slope of log P* / log m (tokens: 1, latents: 0)"]]
    lines += [older_summary(rows, objective, columns) for objective in older(rows)]
    rows = by_seed(rows)
    for objective in [name for name in OBJECTIVES if any(row["objective"] == name for row in rows)]:
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
    here = [row for row in by_seed(rows) if row["depth"] == depth]
    if not here:
        return older_probes(rows, depth)
    sizes = sorted({row["sentences"] for row in here if row["objective"] != FLOOR})
    lines = [["objective", *(f"P = {size}" for size in sizes)]]
    for objective in (FLOOR, *OBJECTIVES):
        values = [[row[f"level_{depth - 1}"] for row in here if row["objective"] == objective
                   and (row["sentences"] == size or objective == FLOOR)] for size in sizes]
        if any(values):
            lines.append([objective, *(", ".join(f"{value:.2f}" for value in some) or "not measured"
                                       for some in values)])
    return markdown(lines)

def draw(rows, depths, path):
    """A panel a depth: the probe of level L-1 against P, a dot a seed and a line through the means. And P* against the
    level: dots from the levels of the deepest grammar, crosses from the highest level of each."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(depths) + 1, figsize=(4 * len(depths) + 4, 4.5), layout="constrained")
    for axis, depth in zip(axes, depths):
        floor = statistics.mean(row[f"level_{depth - 1}"] for row in rows
                                if (row["objective"], row["depth"]) == (FLOOR, depth))
        axis.axhline(floor, color="0.6", linestyle=":", label=FLOOR)
        axis.axhline((floor + 1) / 2, color="0.6", linestyle="--", label="threshold of P* (mean over seeds)")
        axis.set(title=f"L = {depth}: probe of level {depth - 1}", xscale="log", xlabel="sentences P", ylim=(0, 1.02))
    axes[-1].set(title="P*, where it was found", yscale="log", xlabel="level above the tokens",
                 xticks=[depth - 1 for depth in depths])
    for objective, colour in zip(OBJECTIVES, plt.get_cmap("tab10").colors):
        for axis, depth in zip(axes, depths):
            points = [(row["sentences"], row[f"level_{depth - 1}"]) for row in rows
                      if (row["objective"], row["depth"]) == (objective, depth)]
            sizes = sorted({size for size, _ in points})
            means = [statistics.mean(value for at, value in points if at == size) for size in sizes]
            axis.plot(sizes, means, color=colour, label=objective)
            axis.scatter([size for size, _ in points], [value for _, value in points], color=colour, s=12)
        for marker, places in ("o", [(max(depths), level) for level in range(1, max(depths))]), (
                "x", [(depth, depth - 1) for depth in depths]):
            points = [(level, p) for depth, level in places
                      for p in samples_needed(rows, objective, depth, level).values() if 0 < p < math.inf]
            axes[-1].scatter([level for level, _ in points], [p for _, p in points], color=colour, marker=marker)
    figure.legend(*axes[-2].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)

# -- the whole ---------------------------------------------------------------------------------------------------------
def grid(sizes, few):
    """The arms, name -> Config. sizes: the P of each depth; few: fields that are smaller for --fast."""
    deepest = max(sizes)
    arms = {f"{FLOOR} L{depth}": dataclasses.replace(BASE, objective=FLOOR, depth=depth, block_size=2 ** depth,
                                                     sentences=tried[0], **few | dict(pretrain_steps=0))
            for depth, tried in sizes.items()}
    for objective, change in OBJECTIVES.items():
        some = {deepest: [size for size in sizes[deepest] if size in VARIANTS_AT]}
        for depth, tried in (sizes if objective in MAIN else some).items():
            for size in tried:
                arms[f"{objective} L{depth} P{size}"] = dataclasses.replace(
                    BASE, objective=objective, depth=depth, block_size=2 ** depth, sentences=size, **few | change)
    return arms

def page(rows, arms, depths):
    """All tables, as markdown."""
    deepest = depths[-1]
    levels = {f"level {level}": (deepest, level) for level in range(1, deepest)}
    known = [arm for arm in arms if arm.endswith((f"{FLOOR} L{deepest}", f" L{deepest} P{VARIANTS_AT[-1]}"))]
    columns = {name: name.replace(" ", "_") for name in levels} | {"R2": "val_r2", "rank": "rank", "health": "health"}
    return "\n\n".join((
        f"P* of every level but the root in grammars of depth L = {deepest}, a figure a seed "
        f"(v = {BASE.symbols}, m = {BASE.rules}, {BASE.pretrain_steps} steps):", summary(rows, levels),
        "P* of the highest such level, by depth:",
        summary(rows, {f"L = {depth}": (depth, depth - 1) for depth in depths}),
        f"Every objective at P = {VARIANTS_AT[-1]}, L = {deepest} (R2 and health are of the latent objectives):",
        table(rows, known, columns),
        *(f"Probe of level {depth - 1}, L = {depth}, a figure a seed:\n\n{probes(rows, depth)}" for depth in depths)))

def hierarchy(flags):
    """Run the arms; write the tables and the figure."""
    arms = grid(SIZES, {})
    if flags.fast:
        flags, sizes = dataclasses.replace(flags, seeds=1), {2: (54,), 3: (128,), 4: (128, 512)}
        arms = grid(sizes, dict(n_embd=16, pred_embd=16, n_layer=1, top_k=1, n_head=2, pred_layer=1, batch_size=8,
                                pretrain_steps=2, nodes=100))
    rows = run_arms("hierarchy", arms, flags, measure)
    known = by_seed(rows)
    depths = sorted({row["depth"] for row in known if row["objective"] == FLOOR})
    if not known and rows:
        depths = list(SIZES)
        print("hierarchy: no figures by seed are kept, so the tables are the older ones and there is no figure")
    if not depths:
        raise ValueError(f"--arms={flags.arms}: P* is measured from the random-init encoder: name {FLOOR} L4 as well")
    publish("hierarchy", rows, page(rows, arms, depths), flags.table)
    if known:
        draw(known, depths, path := Path(flags.out) / f"hierarchy{'-fast' * flags.fast}.png")
        print(f"figure: {path}")


if __name__ == "__main__":
    main(hierarchy)
