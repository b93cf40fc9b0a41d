"""
What does phase 1 learn? Encoders of one size read the same tokens with different objectives.

    python data/wordnet/prepare.py; python data/probes/prepare.py       glosses, and their probes
    python -m labs.pretraining --jobs=16            all arms, both budgets
    python -m labs.pretraining --fast               a minute on one core: does it run?

Expected before the first run: at 2.5M tokens latents alone read facts earlier than the masked LM,
at 7M it is ahead; on glosses the token objectives lead at both; every arm but VICReg is above
random-init; most arms do not beat the bag of trained embeddings on TREC and SST-2. For the hybrid
no expectation was written down. Of the ways to improve the cloze: fewer masked tokens help most,
then less SIGReg towards the end; InfoNCE hurts. Fixed blocks, the wider predictor and the masked LM
of two masks came later, without an expectation. Of the recipe `latent`, chosen on other seeds and
relations: without scaled embeddings or their layer the cloze falls most, then with MSE; a frozen
masked LM as teacher helps the probes, a random one does not; equal words out of the negatives and
a queue of them change little; growing spans, fading SIGReg and several hypotheses do not help; a
masked LM gains as much by large embeddings.

Two worlds: the facts of train.py, and glosses of WordNet. Arms share tokens, rows, width, depth,
steps and schedule. The learning rate (of GRID) and the reading (last layer, or mean of four, each
layer-normed) of an arm are those with the best mean of the dev accuracies after 2.5M tokens with
seed 0; 7M takes them over. Predictors differ: .44M weights in the hybrid and in `latent`, .12M in
`latent by MSE`, none in the masked LM and the GPT. The probes are those of labs/probes.py.

Cloze: in a held-out statement, does the right answer fit best among all of its relation, and among
those with as many tokens? A T-JEPA is asked for the least energy, the masked LM for the mean
log-probability of the answer's tokens, the GPT for that of the whole statement. "By tokens" asks a
T-JEPA for its tokens, and the masked LM for the sum instead of the mean.
"""
import collections
import dataclasses
import functools
import statistics
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import evaluate
import tjepa
import train
from labs import arms as shared
from labs import variants
from labs.arms import chosen, in_short, main, run_arms
from labs.controls import MASKED_LM, Reader, WordEnergy
from labs.measures import features, logistic_probe, rankme
from labs.probes import PENALTIES, PROBES, accuracy, facts_probes, text_probes
from labs.runs import NO_TOKENS, READING, Arm, fit, model_of
from labs.tables import markdown, page_tables, publish

WORLDS = {"facts": {}, "glosses": dict(data="data/wordnet/input.txt")}     # fields of a Config
GRID = (5e-4, 1e-3, 2e-3, 4e-3)         # learning rates
BUDGETS = {"2.5M": 800, "7M": 2280}     # steps of 48 rows of 64 tokens
TUNED = "2.5M"
LOOKS = (1, 2, 4, 8)                    # eighths of a long run at which it is measured
RELATIONS = ("capital", "currency", "author")   # of the cloze: they have 40 statements each
@dataclasses.dataclass
class Flags(shared.Flags):
    """Flags of this lab."""
    budget: str = ",".join(BUDGETS)     # tokens that an arm reads: 2.5M, 7M or both
    world: str = ",".join(PROBES)       # facts, glosses or both, comma separated

    def __post_init__(self):
        chosen(self, ARMS)
        for flag, known in ("budget", BUDGETS), ("world", PROBES):
            for name in getattr(self, flag).split(","):
                if name not in known:
                    raise ValueError(f"--{flag}={name}: this lab has {', '.join(known)}")

@dataclasses.dataclass
class Config(Arm):
    """An arm: a run of phase 1, and how it is read."""
    phase: str = "pretrain"
    eval_every: int = 10 ** 9
    model: str = "t-jepa"       # t-jepa | gpt
    like: str = ""              # takes the learning rate of this arm; facts only
    only: str = "7M"            # the budget of an arm that is like another one
    fade_sigreg: bool = False   # the weight of SIGReg falls to 0 on a line
    read: str = "1,4"           # last layers that are averaged for the probes; 0: the embeddings
    tune: bool = False          # measure dev accuracies alone, of each reading
    stride: int = 1             # ask only every n-th text and statement

PAPER, LATENT = train.RECIPES["paper"], READING | dict(mlm=0.0)     # recipes of train.py
idea = functools.partial(dict, **LATENT, like="latent", only="2.5M")
CHANGES = {                     # of the hybrid by MSE, whose settings are those of `Arm`
    "hybrid by MSE": {},
    "masked LM": MASKED_LM,
    "random-init": dict(pretrain_steps=0),
    "latent": LATENT,
    "latent by MSE": NO_TOKENS,
    "hybrid by MSE without predictor": dict(variant="NoPredictor"),
    "latent by MSE without predictor": NO_TOKENS | dict(variant="NoPredictor"),
    "GPT": dict(model="gpt"),
    "paper": PAPER,
    "paper + InfoNCE": PAPER | dict(loss="infonce"),
    "paper + VICReg": PAPER | dict(variant="VICReg", sigreg=1.0),
    "paper + SIGReg": PAPER | dict(sigreg=1.0),
    "bag of the masked LM": MASKED_LM | dict(read="0"),
    "bag of random embeddings": dict(pretrain_steps=0, read="0"),
    # ways to improve the cloze; two masks take twice the computation, and so does their control
    "two masks": dict(like="hybrid by MSE", masks=2),
    "masked LM of two masks": MASKED_LM | dict(like="masked LM", masks=2),
    "InfoNCE": dict(like="hybrid by MSE", loss="infonce"),
    "SIGReg to 0": dict(like="hybrid by MSE", fade_sigreg=True),
    "fixed blocks": dict(like="hybrid by MSE", variant="FixedBlocks"),
    "fixed blocks of whole words": dict(like="hybrid by MSE", variant="FixedBlocksOfWords"),
    "wider predictor": dict(like="hybrid by MSE", pred_embd=256),
    # ways to latents alone that are as good: `latent` with one change
    "MSE": idea() | dict(loss="mse"),
    "one target a span": idea() | dict(target="span"),
    "embeddings are no target": idea() | dict(top_k=4),
    "small embeddings": idea() | dict(embed_scale=1.0),
    "no predictor": idea(variant="NoPredictor"),
    "equal words are no negatives": idea(variant="Negatives"),
    "a queue of negatives": idea(variant="Queue"),
    "frozen random target": idea(variant="FrozenTarget"),
    "frozen masked LM as target": idea(variant="TaughtByMaskedLM"),
    "growing spans": idea(variant="GrowingSpans"),
    "fading SIGReg": idea(fade_sigreg=True),
    "four hypotheses": idea(variant="Hypotheses") | dict(loss="mse"),       # beside "MSE"
    "default": idea() | dict(mlm=1.0),
    "masked LM with large embeddings":
        MASKED_LM | dict(like="masked LM", only="2.5M", embed_scale=50.0),
}
ARMS = {name: Config(**change) for name, change in CHANGES.items()}

def probes_of(run):
    """The probes of the world that a run has read, name -> `Probe`."""
    found = facts_probes(run.corpus) if run.cfg.data == "facts" else text_probes()
    few = run.cfg.stride > 1
    return {name: probe.thinned(run.cfg.stride) if few else probe for name, probe in found.items()}

# -- what is read from the latents -----------------------------------------------------------------

class Reading(NamedTuple):
    """A model with its latents read in one way, for `features`."""
    cfg: tjepa.Config
    encode: object      # tokens (B, T) -> (B, T, C)

def reading(model, layers):
    """The mean of the last so many layers of the target encoder, or of a GPT; 0: the embeddings."""
    def encode(tokens):
        """tokens (B, T) -> (B, T, C)."""
        if isinstance(model, Reader):
            return model.encode(tokens, layers)
        frozen = isinstance(model, variants.FrozenTarget)       # what learns is the other one
        encoder = model.context_encoder if frozen else model.target_encoder
        if not layers:
            return encoder.embed(tokens)
        positions = torch.arange(tokens.size(1), device=tokens.device)
        return encoder(tokens, positions, tokens != model.cfg.pad, layers)
    return Reading(model.cfg, encode)

def vectors(run, texts, layers):
    """The mean latent of each of n texts, (n, C) on the CPU."""
    tokenizer = run.corpus.tokenizer
    # a space stands in front, as inside a text
    rows = tokenizer.encode_batch([" " + text for text in texts])
    rows = [torch.tensor(row[:run.cfg.block_size]) for row in rows]
    tokens = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad)      # (n, T)
    return features(reading(run.model, layers), tokens.to(run.device), 512).cpu()

def probe_all(run, probes, layers):
    """Accuracies of all probes, their mean, and the rank of the first one's texts."""
    found = {}
    for name, probe in probes.items():
        x = vectors(run, probe.texts, layers)                           # (n, C)
        found[name] = accuracy(x, probe, run.cfg.tune)
        found.setdefault("rank", rankme(x))
    return found | dict(probes=statistics.mean(found[name] for name in probes))

@torch.no_grad()
def surface(run, layers, n_tokens=40, noise=0.1):
    """What is left of the surface of held-out text.

    identity    accuracy of a probe for the token at a position, among the commonest ones
    stability   1 - how far a text's vector moves if each token is replaced by another one with
                probability `noise`, as a share of the distance to another text
    """
    read, pad = reading(run.model, layers), run.corpus.tokenizer.pad
    torch.manual_seed(0)                # the same rows and noise for every run
    tokens = run.corpus.val.batch(128)                                  # (B, T)
    other = tokens.flatten()[torch.randint(tokens.numel(), tokens.shape)]
    replaced = (torch.rand(tokens.shape) < noise) & (tokens != pad) & (other != pad)
    clean = features(read, tokens.to(run.device)).cpu()                 # (B, C)
    noisy = features(read, torch.where(replaced, other, tokens).to(run.device)).cpu()
    moved = (clean - noisy).square().sum(1).mean()
    apart = (clean - clean.roll(1, 0)).square().sum(1).mean()

    commonest = tokens[tokens != pad].bincount().topk(n_tokens).indices
    rows, places = torch.isin(tokens, commonest).nonzero()[::run.cfg.stride].T      # (n,), (n,)
    latents = torch.cat([read.encode(some).cpu() for some in tokens.to(run.device).split(64)])
    x, y = latents[rows, places], tokens[rows, places]                  # (n, C), (n,)
    parts = [(x[part], y[part]) for part in (rows % 5 < 3, rows % 5 == 3, rows % 5 == 4)]
    return dict(identity=logistic_probe(*parts, PENALTIES)[0], stability=(1 - moved / apart).item())

# -- the cloze -------------------------------------------------------------------------------------

def cloze(run, relations=RELATIONS):
    """Shares of the held-out statements whose own answer has the lowest energy.

    all, same: means over the relations, among all values of the relation or among those with as
    many tokens (if there is another one); their chances; and one figure a relation.
    """
    tokenizer = run.corpus.tokenizer
    found = collections.defaultdict(list)
    for relation in relations:
        items = [item for item in run.corpus.cloze if item.relation == relation]
        values = sorted({item.answer for item in items})                # A strings
        lengths = [len(ids) for ids in tokenizer.encode_batch([" " + value for value in values])]
        hits, hits_same, chances = [], [], []
        for item in items[::run.cfg.stride]:
            before, after = item.statement.split("{a}")
            energy = evaluate.gap_energy(run, tokenizer, before, values, after).cpu()   # (A,)
            own = values.index(item.answer)
            hits.append(energy.argmin().item() == own)
            same = torch.tensor([length == lengths[own] for length in lengths])         # (A,)
            if same.sum() > 1:
                energy = energy.masked_fill(~same, torch.inf)
                hits_same.append(energy.argmin().item() == own)
                chances.append(1 / same.sum().item())
        found[relation].append(statistics.mean(hits))
        found["all"].append(statistics.mean(hits))
        found["chance"].append(1 / len(values))
        if chances:
            found["same"].append(statistics.mean(hits_same))
            found["same_chance"].append(statistics.mean(chances))
    return {name: statistics.mean(each) for name, each in found.items()}

def cloze_all(run):
    """The cloze by what the model was trained on, and `cloze_tokens` by its token output."""
    model, cfg = run.model, run.cfg
    ways = dict(cloze=model)
    if cfg.variant == "MaskedLM":
        ways = dict(cloze=WordEnergy(model, mean=True), cloze_tokens=WordEnergy(model, mean=False))
    elif cfg.model == "t-jepa" and cfg.mlm:
        ways = dict(cloze=model, cloze_tokens=WordEnergy(model, mean=True))
    return {f"{way}_{name}": value for way, asked in ways.items()
            for name, value in cloze(run._replace(model=asked)).items()}

# -- an arm ----------------------------------------------------------------------------------------

def open_arm(cfg):
    """An arm before its first step: (run, loss_at for `train.fit`)."""
    device, dtype = train.pick_device(cfg)
    corpus = data.load(cfg)
    torch.manual_seed(cfg.seed)
    if cfg.model == "gpt":
        model = Reader(dataclasses.replace(cfg, vocab_size=corpus.tokenizer.vocab_size))
    else:
        model = train.build(cfg, corpus.tokenizer, model=model_of(cfg))
    run = train.Run(cfg, model.to(device), corpus, device, dtype)

    if cfg.model == "gpt":              # it reads the rows that the other arms draw in this step
        return run, lambda progress: model.pretrain_loss(
            corpus.train.batch(cfg.batch_size).to(device))
    loss_of_jepa = train.pretrain(run)[0]

    def loss_at(progress):
        """The loss; what changes with time is told the time."""
        model.progress = progress
        if cfg.fade_sigreg:
            model.cfg.sigreg = cfg.sigreg * (1 - progress)
        return loss_of_jepa(progress)
    return run, loss_at

def judge(run, probes):
    """The figures of a run as it stands; in tuning the mean dev accuracy of each reading alone."""
    readings = map(int, run.cfg.read.split(","))
    if run.cfg.tune:
        return {f"dev_{layers}": probe_all(run, probes, layers)["probes"] for layers in readings}
    layers = next(readings)
    figures = probe_all(run, probes, layers)
    if run.cfg.data != "facts":
        return figures | surface(run, layers)
    return figures | (cloze_all(run) if layers else {})     # a bag has no order, and so no gap

def measure(cfg):
    """Train an arm and judge it: a dict of figures. curve: such dicts with the tokens read."""
    run, loss_at = open_arm(cfg)
    probes, curve, calls = probes_of(run), [], iter(range(10 ** 9))

    def look(whole):
        """`train.fit` calls this at step 0, every eval_every steps and at the end."""
        call = next(calls)
        if call in LOOKS or whole:
            step = cfg.pretrain_steps if whole else call * cfg.eval_every
            tokens = step * cfg.batch_size * cfg.block_size
            curve.append(dict(tokens=tokens) | judge(run, probes))
        return {}
    try:
        fit(run, "pretrain", loss_at, look)
    except ValueError as error:         # tuning finds out which learning rates are too high
        if not cfg.tune:
            raise
        print(f"{cfg.out}: {error}")
        curve.append({f"dev_{layers}": -1.0 for layers in cfg.read.split(",")})
    return curve[-1] | dict(lr=cfg.pretrain_lr, curve=curve)

# -- the lab ---------------------------------------------------------------------------------------

def dev_of(row):
    """The best dev accuracy of a tuning run and its reading: (accuracy, layers)."""
    return max((row[name], name.removeprefix("dev_")) for name in row if name.startswith("dev_"))

def choose(rows):
    """Learning rate and reading with the best dev accuracy of an arm: fields of a Config."""
    best = max(rows, key=lambda row: (dev_of(row)[0], row["lr"]))
    return dict(pretrain_lr=best["lr"], read=dev_of(best)[1])

def tuning(worlds, names, grid):
    """The runs that choose: name -> Config. Without steps one learning rate is enough."""
    arms = {}
    for name in dict.fromkeys(ARMS[name].like or name for name in names):
        rates = grid if ARMS[name].pretrain_steps else grid[:1]
        for world in worlds:
            for lr in rates:
                arms[f"{world} {name} lr={lr:g}"] = dataclasses.replace(
                    ARMS[name], tune=True, pretrain_lr=lr, **WORLDS[world])
    return arms

def finals(worlds, names, budgets, tuned):
    """The runs that count: name -> Config, with what the rows of the tuning runs say."""
    arms = {}
    for budget in budgets:
        for name in names:
            cfg = ARMS[name]
            steps = BUDGETS[budget] if cfg.pretrain_steps else 0
            every = 10 ** 9 if budget == TUNED else max(1, steps // LOOKS[-1])
            for world in worlds:
                case = f"{world} {cfg.like or name}"
                mine = [row for row in tuned if row["arm"].rsplit(" ", 1)[0] == case]
                if not mine or cfg.like and (world, budget) != ("facts", cfg.only):
                    continue
                best = choose(mine)
                fields = dict(pretrain_steps=steps, eval_every=every) | best | WORLDS[world]
                arms[f"{world} {budget} {name}"] = dataclasses.replace(cfg, **fields)
    return arms

def joined(rows):
    """The rows of plot and page: an arm and seed with the means of its probes as "WORLD BUDGET" and
    "all BUDGET", with "cloze BUDGET", "capital BUDGET"; then each run of facts as "ARM, BUDGET".
    """
    whole, parts = {}, []
    for row in rows:
        world, budget, arm = row["arm"].split(" ", 2)
        into = whole.setdefault((arm, row["seed"]), row | dict(arm=arm))
        # older tables have the mean of all probes in rows of the world "facts,glosses"
        into["all" * (world not in PROBES) or world, budget] = row["probes"]
        into |= {(title, budget): row[figure] for title, figure in
                 (("cloze", "cloze_all"), ("capital", "cloze_capital")) if figure in row}
        if world == "facts":
            parts.append(row | dict(arm=f"{arm}, {budget}"))
    for row in whole.values():
        for budget in BUDGETS:
            means = [row[world, budget] for world in PROBES if (world, budget) in row]
            if len(means) == len(PROBES) and row["seed"] is not None:
                row["all", budget] = statistics.mean(means)
        row |= {" ".join(name): row.pop(name) for name in list(row) if isinstance(name, tuple)}
    return [*whole.values(), *parts]

def choices(tuned):
    """What tuning has chosen, in markdown."""
    lines = [["world and arm", "learning rate", "layers", "best dev accuracy"]]
    for case in dict.fromkeys(row["arm"].rsplit(" ", 1)[0] for row in tuned):
        mine = [row for row in tuned if row["arm"].rsplit(" ", 1)[0] == case]
        best = choose(mine)
        mine.sort(key=lambda row: row["lr"])
        scores = ", ".join(f"{dev_of(row)[0]:.3f} at {row['lr']:g}" for row in mine)
        lines.append([case, f"{best['pretrain_lr']:g}", best["read"], scores])
    title = "Chosen on dev (seed 0, 2.5M tokens; layers: how many of the last are averaged)"
    return f"{title}:\n\n{markdown(lines)}"

def pretraining(flags):
    """Choose learning rates, run the arms and print the tables."""
    names, grid = chosen(flags, ARMS), GRID
    budgets, worlds = flags.budget.split(","), flags.world.split(",")
    if flags.fast:
        print("labs.pretraining --fast: a minute on one core; its figures mean nothing")
        flags = dataclasses.replace(flags, seeds=1, redo=True)
        grid, worlds = GRID[:1], worlds[:1]
        budgets = sorted({ARMS[name].only for name in names if ARMS[name].like}) or budgets[:1]
    data.load(Config())         # writes the facts if they are missing, before processes start

    def run(lab, arms, seeds):
        """Run those that have no results yet -> `results`."""
        few = dataclasses.replace(flags, arms="", seeds=seeds)
        if flags.fast:
            arms = {name: dataclasses.replace(in_short(cfg), eval_every=1, stride=25)
                    for name, cfg in arms.items()}
        return run_arms(lab, arms, few, measure)
    tuned = run("pretraining_tuning", tuning(worlds, names, grid), min(1, flags.seeds))
    rows = run("pretraining", finals(worlds, names, budgets, tuned), flags.seeds)
    if not flags.fast:
        text = f"{page_tables('pretraining', joined(rows))}\n\n{choices(tuned)}"
        publish("pretraining", rows, text, flags.table)

if __name__ == "__main__":
    main(pretraining, Flags)
