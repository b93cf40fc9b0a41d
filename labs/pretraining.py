"""
What is phase 1 worth? Encoders of one size, trained on the same tokens with different objectives, and what they know.

    python data/wordnet/prepare.py --input=../shared/data/text/wordnet_common.txt     the real text, and
    python data/probes/prepare.py --input=../shared/data                              the probes of real text, once
    python -m labs.pretraining --arms="default,latent,masked LM,random-init" --budget=2.5M     what decides
    python -m labs.pretraining --jobs=16                                              all arms, both budgets
    python -m labs.pretraining --fast                                                 does it run?

Expected before the first run: at 2.5M tokens latents alone read facts earlier than the masked LM, at 7M it is ahead; on
real text the token objectives lead the latent ones at both; every arm but VICReg is above random-init; the bag of
trained embeddings is the control that most arms fail to beat on TREC and SST-2. The default, latents and tokens at
once, came later: no expectation was written down for it.

Two worlds: the facts of train.py (tiny), and WordNet's glosses. In each every arm shares tokens, rows, width, depth,
steps, batches of a seed and schedule (its cosine ends with the run, so a point within a run of 7M is not a run of that
length). For each arm and world the learning rate (of GRID) and what is read (the last layer, or the mean of all four,
layer-normed) are those with the best mean of the dev accuracies, after 2.5M tokens with seed 0; 7M takes them over.
Not shared: the predictor, .44M weights in the default, .12M where it is half as wide, none where the encoder reads
[MASK]s and it alone fills them in.

Probes are logistic regressions on the mean over a text's tokens, frozen; the penalty is chosen on dev, test is looked
at once. Texts of real probes are cut after block_size tokens. The facts world:
    relation    which relation does a question ask for? Over wordings and subjects that it was not fitted on
    continent   on which continent is the country that a question names? Over countries that it was not fitted on
    kind        what is this (a country, a book, a painter ...), from the name alone, over names not fitted on
and the cloze: in a statement that was held out, the right answer fits best among all that its relation takes, and among
those with as many tokens. An arm is asked what it was trained for: T-JEPA by the lowest latent energy, the masked LM by
the mean log-probability of the answer's tokens, all masked, the GPT by that of the whole statement. The column "by
tokens" asks a T-JEPA with a masked-LM term by its tokens instead, and the masked LM by the sum, not the mean.
Of held-out glosses: which token does a latent stand on, and how little do swapped tokens move a text (`surface`)?
"""
import collections
import dataclasses
import hashlib
import json
import random
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import evaluate
import tjepa
import train
from labs import arms as shared
from labs.arms import in_short, main, missing, run_arms
from labs.collapse import continents
from labs.controls import MASKED_LM, MaskedLM, Reader
from labs.measures import features, logistic_probe, rankme
from labs.tables import by_seed, markdown, publish, table

FOLDER = Path(data.__file__).parent
TEXT = FOLDER / "wordnet" / "input.txt"
GRID = (5e-4, 1e-3, 2e-3, 4e-3)
BUDGETS = {"2.5M": 800, "7M": 2280}     # steps of 48 rows of 64 tokens
TUNED = "2.5M"
LOOKS = (1, 2, 4, 8)                    # eighths of a long run at which it is measured, for the curve
RELATIONS = ("capital", "currency", "author")       # of the cloze: those with 40 statements and many answers
FOLDS = 5
WEIGHTS = "weights.pt"                  # what a tuning run leaves in its folder
PENALTIES = (10.0, 1.0, 0.1, 0.01)      # of the probes; lighter ones take longest
# what the facts are about, and what they answer with
SUBJECTS = dict(capital="country", author="book", painter="painting", inventor="invention", composer="music",
                symbol="element", landmark_city="landmark")
ANSWERS = dict(capital="city", landmark_city="city", continent="continent", currency="currency", language="language",
               author="author", painter="painter", inventor="inventor", composer="composer", symbol="symbol")
PROBES = {"facts": ("relation", "continent", "kind"), "glosses": ("supersense", "trec", "sst2")}


@dataclasses.dataclass
class Flags(shared.Flags):
    """Flags of this lab."""
    budget: str = ",".join(BUDGETS)     # tokens that an arm reads: 2.5M, 7M or both, comma separated
    world: str = ",".join(PROBES)       # facts, glosses or both, comma separated

    def __post_init__(self):
        for flag, known in ("budget", BUDGETS), ("world", PROBES), ("arms", ARMS):
            given = getattr(self, flag)
            for name in given.split(",") if given or flag != "arms" else ():    # no --arms: all of them
                if name not in known:
                    raise ValueError(f"--{flag}={name}: this lab has {', '.join(known)}")

@dataclasses.dataclass
class Config(train.Config):
    """An arm: a run of phase 1, and how it is read."""
    model: str = "t-jepa"       # t-jepa | gpt
    words: str = ""             # file of a tokenizer; without it the corpus brings one
    read: str = "1,4"           # layers averaged for the probes, the last ones; 0: the embeddings alone, a bag
    tune: bool = False          # only the dev accuracies, of each reading: what a learning rate is chosen by
    tuned: str = ""             # file of weights: what a tuning run with seed 0 has trained is not trained again
    stride: int = 1             # of the texts and statements that are asked only each so-manieth is: a quick look

PAPER = train.RECIPES["paper"]
CHANGES = {                     # of train.py's default; the comparison that decides comes first
    "default": {},
    "masked LM": MASKED_LM,
    "random-init": dict(pretrain_steps=0),
    "latent": train.LATENT,
    "default without predictor": dict(pred_layer=0),
    "default with narrow predictor": dict(pred_embd=train.LATENT["pred_embd"]),
    "default with half the masked LM": dict(mlm=0.5),
    "latent without predictor": train.LATENT | dict(pred_layer=0),
    "GPT": dict(model="gpt"),
    "latent with token target": train.LATENT | dict(target="token"),
    "paper": PAPER,
    "paper + InfoNCE": PAPER | dict(loss="infonce"),
    "paper + VICReg": PAPER | dict(vicreg=1.0),
    "paper + SIGReg": PAPER | dict(sigreg=1.0),
    "bag of the masked LM": MASKED_LM | dict(read="0"),
    "bag of random embeddings": dict(pretrain_steps=0, read="0"),
}
ARMS = {name: Config(phase="pretrain", eval_every=10 ** 9, **change) for name, change in CHANGES.items()}

# -- probes: texts, their classes, and which of them are fitted on, chosen by and tested ------------------------------
class Probe(NamedTuple):
    """n texts with a class each; splits: (train, dev, test) as bool (n,), one triple or one a fold."""
    texts: list
    labels: list
    splits: list

    def thinned(self, k):
        """A quick look at it: each k-th text alone, and one split."""
        return Probe(self.texts[::k], self.labels[::k], [tuple(rows[::k] for rows in self.splits[0])])

def folds(*groups):
    """Splits for n items, FOLDS times train, dev, test. groups: for each item a name (n,), or several such lists: what
    is tested shares none of its names with what was fitted on, in any list. Items that share some are left out."""
    def fold(names):
        """The fold of each item, (n,): those of one name stay together."""
        order = random.Random(0).sample(sorted(set(names)), len(set(names)))
        return torch.tensor([order.index(name) % FOLDS for name in names])
    of = torch.stack([fold(names) for names in groups])                                                 # (G, n)
    def away(k):
        """Items of the other folds, in all lists."""
        return (of != k).all(0)
    return [(away(k) & away((k + 1) % FOLDS), (of == (k + 1) % FOLDS).all(0), (of == k).all(0)) for k in range(FOLDS)]

def by_part(parts):
    """The split of items that say themselves which part they are in."""
    return [tuple(torch.tensor([part == which for part in parts]) for which in ("train", "dev", "test"))]

def kinds(corpus):
    """Names of the facts world and what they are, as (name, kind); a name that is two things is left out."""
    of = collections.defaultdict(set)
    for row in corpus.qa:
        if row.split != "NEVER":
            of[row.answer].add(ANSWERS[row.relation])
            if row.relation in SUBJECTS:
                of[row.subject].add(SUBJECTS[row.relation])
    return sorted((name, *found) for name, found in of.items() if len(found) == 1)

def facts_probes(corpus):
    """The three probes of the facts world, name -> `Probe`."""
    asked, wordings, times = [row for row in corpus.qa if row.split != "NEVER"], [], collections.Counter()
    for row in asked:       # the n-th question about a fact is the n-th wording of its relation
        wordings.append(f"{row.relation} {times[row.relation, row.subject]}")
        times[row.relation, row.subject] += 1
    few = {row.question for row in asked if row.phrasing == "heldout"}      # three wordings of 17 will do
    places, continent_of, countries = zip(*(row for row in continents(corpus) if row[0] in few))
    names, kind_of = zip(*kinds(corpus))
    return dict(relation=Probe([row.question for row in asked], [row.relation for row in asked],
                               folds(wordings, [row.subject for row in asked])),
                continent=Probe(places, continent_of, folds(countries)), kind=Probe(names, kind_of, folds(names)))

def text_probes():
    """The probes of real text that data/probes/prepare.py has written, name -> `Probe`."""
    found = {}
    for name in PROBES["glosses"]:
        if (path := FOLDER / "probes" / f"{name}.tsv").exists():
            parts, labels, texts = zip(*data.read_rows(path, lambda *row: row))
            found[name] = Probe(texts, labels, by_part(parts))
    if not found:
        raise ValueError(f"{FOLDER / 'probes'} holds no probe: run `python data/probes/prepare.py` first")
    return found

def probes_of(run):
    """The probes of the world that a run has read, name -> `Probe`."""
    every, k = facts_probes(run.corpus) if run.cfg.data == "facts" else text_probes(), run.cfg.stride
    return {name: probe.thinned(k) if k > 1 else probe for name, probe in every.items()}

class Reading(NamedTuple):
    """A model with its latents read in one way: what `features` asks for."""
    cfg: tjepa.Config
    encode: object      # tokens (B, T) -> (B, T, C)

def reading(model, layers):
    """Of a T-JEPA's target or of a GPT: the mean of its last so many layers, each layer-normed; 0: its embeddings."""
    def encode(tokens):
        """tokens (B, T) -> (B, T, C)."""
        if isinstance(model, Reader):
            return model.encode(tokens, layers)
        if not layers:
            return model.target.embed(tokens)
        positions = torch.arange(tokens.size(1), device=tokens.device)
        return model.target(tokens, positions, (tokens != model.cfg.pad)[:, None, None], layers)
    return Reading(model.cfg, encode)

def vectors(run, texts, layers):
    """The mean latent of each of n texts, (n, C) on the CPU; as inside a text, a space stands in front."""
    tokenizer = run.corpus.tokenizer
    ids = [torch.tensor(row[:run.cfg.block_size]) for row in tokenizer.encode_batch([" " + text for text in texts])]
    tokens = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad)                           # (n, T)
    return features(reading(run.model, layers), tokens.to(run.device), 512).cpu()

def accuracy(x, probe, tune):
    """Accuracy on test, or on dev in tuning, mean over the splits: x (n, C) of a probe's n texts."""
    classes = sorted(set(probe.labels))
    y = torch.tensor([classes.index(label) for label in probe.labels])                                  # (n,)
    return statistics.mean(
        logistic_probe(*((x[rows], y[rows]) for rows in (fit, dev, dev if tune else test)), PENALTIES)[0]
        for fit, dev, test in probe.splits)

def probe_all(run, probes, layers):
    """Accuracies of all probes, their mean, and the rank of the first one's texts."""
    found = {}
    for name, probe in probes.items():
        x = vectors(run, probe.texts, layers)                                                           # (n, C)
        found[name] = accuracy(x, probe, run.cfg.tune)
        found.setdefault("rank", rankme(x))
    return found | dict(probes=statistics.mean(found[name] for name in probes))

@torch.no_grad()
def surface(run, layers, kinds=40, noise=0.1):
    """What is left of the surface of held-out text. identity: which of the commonest tokens does a token's latent stand
    on? Accuracy, over other rows than it was fitted on. stability: 1 if a text's vector stays where it is when each
    token is swapped for any other with a chance of noise, 0 if it moves as far as to another text."""
    read = reading(run.model, layers)
    torch.manual_seed(0)                                                # the same rows and noise for every run
    tokens = run.corpus.val.batch(128)                                                                  # (B, T)
    other = tokens.flatten()[torch.randint(tokens.numel(), tokens.shape)]
    pad = run.corpus.tokenizer.pad
    swapped = (torch.rand(tokens.shape) < noise) & (tokens != pad) & (other != pad)
    clean, noisy = (features(read, text.to(run.device)).cpu()
                    for text in (tokens, torch.where(swapped, other, tokens)))                          # (B, C)
    moved, apart = ((clean - x).square().sum(1).mean() for x in (noisy, clean.roll(1, 0)))
    commonest = tokens[tokens != pad].bincount().topk(kinds).indices
    rows, places = torch.isin(tokens, commonest).nonzero()[::run.cfg.stride].T                          # (n,), (n,)
    x = torch.cat([read.encode(some).cpu() for some in tokens.to(run.device).split(64)])[rows, places]  # (n, C)
    parts = [rows % 5 < 3, rows % 5 == 3, rows % 5 == 4]
    return dict(identity=logistic_probe(*((x[part], tokens[rows, places][part]) for part in parts), PENALTIES)[0],
                stability=(1 - moved / apart).item())

# -- the cloze ---------------------------------------------------------------------------------------------------------
def cloze(run, relations=RELATIONS):
    """Shares of the held-out statements whose own answer has the lowest energy, means over the relations: `all` its
    values compete, or the `same`: those with as many tokens (a statement whose answer has no such rival is left out);
    and one figure a relation. The chances stand beside them."""
    found = collections.defaultdict(list)
    for relation in relations:
        items = [item for item in run.corpus.cloze if item.relation == relation]
        values = sorted({item.answer for item in items})                                                # A strings
        lengths = [len(ids) for ids in run.corpus.tokenizer.encode_batch([" " + value for value in values])]
        hits, hits_same, chances = [], [], []
        for item in items[::run.cfg.stride]:
            before, after = item.statement.split("{a}")
            own = values.index(item.answer)
            rivals = torch.tensor([length == lengths[own] for length in lengths])                       # (A,)
            energy = evaluate.gap_energy(run, run.corpus.tokenizer, before, values, after).cpu()        # (A,)
            hits.append(energy.argmin().item() == own)
            if rivals.sum() > 1:
                hits_same.append(energy.masked_fill(~rivals, torch.inf).argmin().item() == own)
                chances.append(1 / rivals.sum().item())
        found["all"].append(statistics.mean(hits))
        found["chance"].append(1 / len(values))
        if chances:
            found["same"].append(statistics.mean(hits_same))
            found["same_chance"].append(statistics.mean(chances))
    return {name: statistics.mean(each) for name, each in found.items()} | dict(zip(relations, found["all"]))

def cloze_all(run):
    """The cloze of a run, asked in each way that its model can answer: `cloze` by what it was trained for, and
    `cloze_tokens` by the token output beside a latent one, or, for the masked LM, by the sum over tokens."""
    model, cfg = run.model, run.cfg
    asked = dict(cloze=model)
    if cfg.model == "t-jepa" and cfg.mlm:
        latent = cfg.loss != "none"
        asked = dict(cloze=model if latent else MaskedLM(model, True), cloze_tokens=MaskedLM(model, latent))
    return {f"{name}_{figure}": value for name, by in asked.items()
            for figure, value in cloze(run._replace(model=by)).items()}

# -- an arm ------------------------------------------------------------------------------------------------------------
def open_arm(cfg):
    """The corpus of an arm, its model before training, and loss_at(progress) for `train.fit`: (run, loss_at)."""
    device, dtype = train.pick_device(cfg)
    state = json.loads(Path(cfg.words).read_text()) if cfg.words else None
    corpus = data.load(cfg, data.Tokenizer.from_state(state) if state else None)
    if cfg.model == "t-jepa":
        run = train.Run(cfg, train.build(cfg, corpus.tokenizer).to(device), corpus, device, dtype)
        return run, train.pretrain(run)[0]
    torch.manual_seed(cfg.seed)
    model = Reader(dataclasses.replace(cfg, vocab_size=corpus.tokenizer.vocab_size)).to(device)
    def loss_at(progress):
        """The rows that the other arms draw in this step."""
        return model.pretrain_loss(corpus.train.batch(cfg.batch_size).to(device))
    return train.Run(cfg, model, corpus, device, dtype), loss_at

def judge(run, probes):
    """The figures of a run as it stands; in tuning the mean dev accuracy of each reading, and nothing else."""
    readings = [int(layers) for layers in run.cfg.read.split(",")]
    if run.cfg.tune:
        return {f"dev_{layers}": probe_all(run, probes, layers)["probes"] for layers in readings}
    figures = probe_all(run, probes, readings[0])
    if run.cfg.data != "facts":
        return figures | surface(run, readings[0])
    return figures | (cloze_all(run) if run.cfg.read != "0" else {})    # a bag has no order, and so no gap

def measure(cfg):
    """Train an arm and judge it: a dict of figures; curve is a list of them, one a look, with the tokens read."""
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    run, loss_at = open_arm(cfg)
    probes, curve, calls = probes_of(run), [], iter(range(10 ** 9))
    def look(whole):
        """Measure if it is time to: `train.fit` calls this at step 0, every eval_every steps and at the end."""
        if (call := next(calls)) in LOOKS or whole:
            step = cfg.pretrain_steps if whole else call * cfg.eval_every
            curve.append(dict(tokens=step * cfg.batch_size * cfg.block_size) | judge(run, probes))
        return {}           # the log of a run has no columns for these
    if cfg.tuned and not cfg.seed and Path(cfg.tuned).exists():
        run.model.load_state_dict(torch.load(cfg.tuned, map_location=run.device, weights_only=True))
        look(True)
        return curve[-1] | dict(lr=cfg.pretrain_lr, curve=curve)
    def save(step, optimizer):
        """Keep what tuning has trained."""
        if cfg.tune:
            torch.save(run.model.state_dict(), Path(cfg.out) / WEIGHTS)
    try:
        train.fit(run, "pretrain", loss_at, look, evaluate.Log(cfg.out, []), save)
    except ValueError as error:     # a learning rate may be too high for an arm: to find that out is what tuning is for
        if not cfg.tune:
            raise
        print(f"{cfg.out}: {error}")
        curve.append({f"dev_{layers}": -1.0 for layers in cfg.read.split(",")})
    kept = dict(weights=str(Path(cfg.out) / WEIGHTS)) if cfg.tune else {}
    return curve[-1] | kept | dict(lr=cfg.pretrain_lr, curve=curve)

# -- the lab -----------------------------------------------------------------------------------------------------------
def vocabulary(folder, fast):
    """Train the tokenizer of the real text once, and not in each run: its fields of a Config."""
    text = data.read_text(TEXT)[:100_000 if fast else None]
    folder.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(text.encode()).hexdigest()[:12]       # another text gets another file
    words, copy = folder / f"glosses_{mark}.json", folder / f"glosses_{mark}.txt"
    if not words.exists():
        copy.write_text(text, encoding="utf-8")
        ranks = data.train_bpe(text, Config.vocab_size - 4)
        words.write_text(json.dumps(data.Tokenizer(ranks).state()))
    return dict(data=str(copy), words=str(words))

def choose(rows):
    """The learning rate and the reading with the best dev accuracy, of one arm in one world, and the weights that gave
    it: fields of a Config."""
    best, row, name = max(((value, row, name) for row in rows for name, value in row.items()
                           if name.startswith("dev_")), key=lambda found: (found[0], found[1]["lr"], found[2]))
    return dict(pretrain_lr=row["lr"], read=name.removeprefix("dev_"), tuned=row.get("weights", ""))

def tuning(worlds, names, grid):
    """The runs that choose: name -> Config. Nothing depends on the learning rate where no step is taken."""
    return {f"{world} {name} lr={lr:g}": dataclasses.replace(ARMS[name], tune=True, pretrain_lr=lr, **fields)
            for name in names for world, fields in worlds.items()
            for lr in (grid if ARMS[name].pretrain_steps else grid[:1])}

def finals(worlds, names, budgets, tuned):
    """The runs that count: name -> Config, with what the rows of the tuning runs say. A long run is looked at often."""
    arms = {}
    for budget in budgets:
        for name in names:
            for world, fields in worlds.items():
                best = choose([row for row in tuned if row["arm"].rsplit(" ", 1)[0] == f"{world} {name}"])
                if budget != TUNED:
                    best["tuned"] = ""
                steps = BUDGETS[budget] if ARMS[name].pretrain_steps else 0
                arms[f"{world} {budget} {name}"] = dataclasses.replace(
                    ARMS[name], pretrain_steps=steps, **best | fields,
                    eval_every=10 ** 9 if budget == TUNED else max(1, steps // LOOKS[-1]))
    return arms

def joined(rows, budget):
    """One row an arm and seed: its figures in all worlds, and the mean of all their probes, where all were measured.
    Rows of older tables have that mean under the world "facts,glosses"."""
    found = collections.defaultdict(dict)
    for row in rows:
        world, tokens, arm = row["arm"].split(" ", 2)
        if tokens == budget:
            tail = dict(rank=f"rank_{world}", probes=f"probes_{world}") if world in PROBES else {}
            figures = {tail.get(name, name): value for name, value in row.items() if name not in ("curve", "lr")}
            found[arm, row["seed"]] |= figures | dict(arm=arm)
    every = [name for names in PROBES.values() for name in names]
    return [row | (dict(probes=statistics.mean(row[name] for name in every))
                   if row.get("seed") is not None and row.keys() >= set(every) else {}) for row in found.values()]

COLUMNS = {name: name for names in PROBES.values() for name in names} | {
    "mean, facts": "probes_facts", "mean, glosses": "probes_glosses", "mean of all": "probes", "cloze": "cloze_all",
    "cloze, same length": "cloze_same"}
CLOZE = {**{relation: f"cloze_{relation}" for relation in RELATIONS},
         "all three": "cloze_all", "(chance)": "cloze_chance", "same length": "cloze_same",
         "(its chance)": "cloze_same_chance", "by tokens": "cloze_tokens_all",
         "by tokens, same length": "cloze_tokens_same"}
LATENTS = {"rank of 128, facts": "rank_facts", "rank, glosses": "rank_glosses", "token identity": "identity",
           "stability": "stability"}

def tables(rows, tuned):
    """All tables as markdown: probes, the cloze relation by relation, and what tuning has chosen."""
    parts = []
    for budget in BUDGETS:
        if here := joined(rows, budget):
            parts += [f"After {budget} tokens, accuracies on test:", table(here, ARMS, COLUMNS),
                      f"After {budget} tokens, the cloze:", table(here, ARMS, CLOZE),
                      f"After {budget} tokens, RankMe of a probe's texts, and what is left of the surface of held-out "
                      "glosses:", table(here, ARMS, LATENTS)]
    cells = []
    for case in dict.fromkeys(row["arm"].rsplit(" ", 1)[0] for row in tuned):
        mine = [row for row in tuned if row["arm"].rsplit(" ", 1)[0] == case]
        best = choose(mine)
        score = [f"{max(value for name, value in row.items() if name.startswith('dev_')):.3f} at {row['lr']:g}"
                 for row in sorted(mine, key=lambda row: row["lr"])]
        cells.append([case, f"{best['pretrain_lr']:g}", best["read"], ", ".join(score)])
    return "\n\n".join([*parts, "Chosen on dev (seed 0, 2.5M tokens; layers: how many of the last are averaged):",
                        markdown([["world and arm", "learning rate", "layers", "best dev accuracy"], *cells])])

def draw(rows, path):
    """Probes and cloze against tokens read, within the longest runs: mean over the seeds, an arm a colour."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = {"facts: mean of the probes": ("facts", "probes"), "facts: cloze": ("facts", "cloze_all"),
              "glosses: mean of the probes": ("glosses", "probes")}
    axes = figure.subplots(1, len(panels))
    for axis, (title, (world, name)) in zip(axes, panels.items()):
        for arm, colour in zip(ARMS, colormaps["tab20"].colors):
            at = collections.defaultdict(list)
            for row in by_seed(rows):
                if row["arm"] == f"{world} {list(BUDGETS)[-1]} {arm}":
                    for look in row["curve"]:
                        at[look["tokens"]] += [look[name]] if name in look else []
            mean = [statistics.mean(values) for values in at.values() if values]
            if mean and ARMS[arm].pretrain_steps:
                axis.plot(list(at), mean, "-o", color=colour, markersize=3, label=arm)
            elif mean:      # no token is read: a level to compare with
                axis.axhline(mean[0], color=colour, linestyle="--", label=arm)
        axis.set(title=title, xlabel="tokens read", xscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)

def pretraining(flags):
    """Choose learning rates, run the arms, write the tables and the figure."""
    names, budgets = flags.arms.split(",") if flags.arms else list(ARMS), flags.budget.split(",")
    seeds = min(flags.seeds, 1) if flags.fast else flags.seeds
    data.load(Config())     # writes the facts, if they are not there yet: runs side by side would write them at once
    def run(lab, arms_of, seeds):
        """Run those that are missing: all rows. arms_of: fields of each world -> arms. Without a missing run of the
        glosses their text is not needed."""
        few = dataclasses.replace(flags, arms="", seeds=seeds)
        worlds = {world: {} for world in flags.world.split(",")}
        if "glosses" in worlds:
            if any(name.startswith("glosses ") for name, _ in missing(lab, arms_of(worlds), few)):
                worlds["glosses"] = vocabulary(Path(flags.out) / "pretraining_text", flags.fast)
            else:
                del worlds["glosses"]
        arms = {name: dataclasses.replace(in_short(cfg), n_layer=cfg.n_layer, top_k=cfg.top_k, eval_every=1, stride=25)
                if flags.fast else cfg for name, cfg in arms_of(worlds).items()}
        return run_arms(lab, arms, few, measure)
    grid = GRID[:1] if flags.fast else GRID
    tuned = run("pretraining_tuning", lambda worlds: tuning(worlds, names, grid), min(1, seeds))
    long = budgets[-1:] if flags.fast else budgets
    rows = run("pretraining", lambda worlds: finals(worlds, names, long, tuned), seeds)
    publish("pretraining", rows, tables(rows, tuned), flags.table)
    if by_seed(rows):
        draw(rows, path := Path(flags.out) / f"pretraining{'-fast' * flags.fast}.png")
        print(f"figure: {path}")


if __name__ == "__main__":
    main(pretraining, Flags)
