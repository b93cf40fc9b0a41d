"""
LLM-JEPA (2025) on real pairs: does a latent term between two views help a language model?

    python data/nlrx/prepare.py --input=../shared/data/nlrx   the pairs; downloaded without --input
    python -m labs.llm_jepa                                   1 to 10 minutes a run on 2 cores
    python -m labs.llm_jepa --arms=square --seeds=5           a group: map, square or ways
    python -m labs.llm_jepa --fast                            half a minute on one core

A causal language model reads [BOS] description [SEP] regex [EOS] and learns to write the regex.
LLM-JEPA adds lambda * d(g(z_text), z_code). z is the last state of a view that is read alone, and g
predicts z_code from z_text. The published gain, .54 -> .61 from random weights, was measured with a
loss without EOS: it may come from learning to stop. So arms run with EOS in the loss and without.

Expected before the first run: with EOS no gain at 8,000 pairs, a small one below. Without EOS no
exact match for any lambda; prefix match is then to be compared. The map of lambda and k is a
plateau. A description by people is no better a second view than the regex.

All arms of a size share pairs, batches, steps and the learning rate, which was tuned for lambda = 0
on held-out training pairs. The seed draws pairs and weights. "table" is no model: the commonest
regex of a sentence whose phrases are cut out.
"""
import dataclasses
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

import data
import tjepa
import train
from data.nlrx.prepare import leaked, majority
from labs import controls, runs
from labs.arms import main, run_arms
from labs.measures import rankme
from labs.tables import by_seed, figure_of, markdown, over_seeds, publish, tables

FOLDER = Path(data.__file__).parent / "nlrx"
# one token: a class such as [A-Z], a count, \b, .*, a word with its space, or one character
ATOMS = r"\[[^\]]*\]|\{\d,\}|\\b|\.\*| ?[A-Za-z][A-Za-z-]*|."
SEP = ord("\n")         # ids below 256 are bytes, and no text of a pair has a line break
HELD = 500              # training pairs at the end of the file that choose settings
OUTCOMES = ("exact", "over", "same_length", "other")

@dataclasses.dataclass
class Config(train.Config):
    """An arm. `train.fit` trains it as phase 3: speak_steps, speak_lr and qa_batch_size count."""
    model: str = "gpt"              # gpt | table
    size: int = 8000                # training pairs, drawn by the seed
    tests: int = 2000               # at most so many test pairs, and so many held-out ones
    eos_in_loss: bool = True        # does the loss ask for EOS?
    latent: float = 0.0             # lambda, the weight of the latent term; at 0 no view is read
    k: int = 0                      # predictor tokens at the end of the description's view
    mlp: bool = False               # g is an MLP; else the identity
    view: str = "regex"             # second view: regex | people (another description, by a person)
    distance: str = "cosine"        # cosine | mse | infonce
    stop_gradient: bool = False     # of the second view; the authors' code has a gradient
    latent_drop: float = 0.0        # share of the steps without the latent term
    n_embd: int = 160               # with 4 layers 1.3 million parameters
    block_size: int = 128           # longest description in tokens
    answer_size: int = 32           # longest regex, EOS included; the longest gold one has 24
    qa_batch_size: int = 64         # pairs a step
    speak_lr: float = 2e-3
    weight_decay: float = 0.5       # ten times train.py's: dev .87, not .85 (1 seed)
    eval_every: int = 10 ** 9

# -- pairs -----------------------------------------------------------------------------------------

def read(name):
    """(description, regex) of each line of a prepared file."""
    path = FOLDER / f"{name}.tsv"
    if not path.exists():
        raise ValueError(f"{path} is missing: run `python data/nlrx/prepare.py "
                         "--input=../shared/data/nlrx` first, or without --input to download")
    return data.read_rows(path, lambda *fields: fields)

def draw(pairs, size, seed):
    """(pairs to learn from, pairs to choose settings by): the latter are none if all are needed."""
    pool, held = pairs[:-HELD], pairs[-HELD:]
    if size > len(pool):
        pool, held = pairs, []
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return [pool[i] for i in order[:size]], held

def views_of(cfg, pairs):
    """The texts of n pairs by view; the people's descriptions only where they are the view."""
    views = dict(description=[" " + text for text, _ in pairs], regex=[regex for _, regex in pairs])
    if cfg.view == "people":
        # A description in both files has the person's words of the training file.
        said = {text: other for part in ("test", "train")
                for text, other, _ in read(f"views_{part}")}
        views["people"] = [" " + said[text] for text, _ in pairs]
    return views

def vocabulary(views):
    """A tokenizer of the atoms that occur twice in all views; other texts are cut into bytes."""
    texts = [text for of_view in views.values() for text in of_view]
    counts = Counter(atom for text in texts for atom in re.findall(ATOMS, text))
    ranks = [bytes([byte]) for byte in range(256)]
    common = {atom.encode() for atom, n in counts.items() if n > 1}
    return data.Tokenizer(ranks + sorted(common - set(ranks)), ATOMS)

def pack(tokenizer, views, cfg):
    """The texts of each view as ids, padded: a dict of (n, T)."""
    return {name: data.pack(tokenizer, texts, cfg.block_size, "--block_size")
            for name, texts in views.items()}

def join(pad, *parts):
    """Concatenate ids (B, T) and single ids of all rows: (B, longest), padding on the right.

        [BOS] + the dog - - + [SEP]  ->  [BOS] the dog [SEP]
    """
    like = next(part for part in parts if torch.is_tensor(part))
    columns = [part if torch.is_tensor(part) else like.new_full((len(like), 1), part)
               for part in parts]
    rows = torch.cat(columns, dim=1)
    order = (rows == pad).byte().argsort(dim=1, stable=True)
    longest = (rows != pad).sum(1).max()
    return rows.gather(1, order)[:, :longest]

# -- the language model ----------------------------------------------------------------------------

class GPT(controls.GPT):
    """The labs' GPT with LLM-JEPA's latent term; the predictor token is [MASK].

    A batch is a dict, view -> ids (B, T), padded on the right.
    """

    def __init__(self, cfg):
        super().__init__(cfg, 2 * cfg.block_size + 3)
        # made last, so that an arm without it starts from the same weights
        self.mlp = nn.Identity()
        if cfg.mlp:
            hidden = 4 * cfg.n_embd
            self.mlp = nn.Sequential(
                nn.Linear(cfg.n_embd, hidden), nn.GELU(), nn.Linear(hidden, cfg.n_embd))
        self.mlp.apply(self.init_weights)

    def token_loss(self, batch, with_eos):
        """Cross-entropy of the regex after its description, with or without its EOS."""
        cfg = self.cfg
        tokens = join(cfg.pad, cfg.bos, batch["description"], SEP, batch["regex"], cfg.eos)
        states = self.states(tokens)[:, :-1]                            # (B, T-1, C)
        following = tokens[:, 1:]                                       # (B, T-1)
        counts = (tokens == SEP).cumsum(1)[:, :-1].bool() & (following != cfg.pad)
        if not with_eos:
            counts &= following != cfg.eos
        return F.cross_entropy(self.say(states[counts]), following[counts])

    def last_state(self, tokens):
        """z of a view: the state of the last token of each row, (B, T) -> (B, C)."""
        states = self.states(tokens)                                    # (B, T, C)
        last = (tokens != self.cfg.pad).sum(1) - 1
        return states[torch.arange(len(tokens), device=tokens.device), last]

    def views(self, batch):
        """g(z_text) and z_code, (B, C) each. Each view is read alone."""
        cfg = self.cfg
        text = join(cfg.pad, cfg.bos, batch["description"], *[cfg.mask] * cfg.k)
        code = join(cfg.pad, cfg.bos, batch[cfg.view])
        return self.mlp(self.last_state(text)).float(), self.last_state(code).float()

    def latent_loss(self, batch):
        """d(g(z_text), z_code)."""
        guess, target = self.views(batch)
        if self.cfg.stop_gradient:
            target = target.detach()
        if self.cfg.distance == "cosine":
            return 1 - F.cosine_similarity(guess, target).mean()
        every = torch.ones(len(guess), dtype=torch.bool, device=guess.device)
        return tjepa.latent_distance(guess, target, every, self.cfg.distance)

    def loss(self, batch):
        """CE + lambda * d -> (loss, stats)."""
        token = self.token_loss(batch, self.cfg.eos_in_loss)
        # Without the term the views are not read, which saves half of the work.
        if not self.cfg.latent or torch.rand(()) < self.cfg.latent_drop:
            return token, dict(token=token.detach())
        latent = self.latent_loss(batch)
        stats = dict(token=token.detach(), latent=latent.detach())
        return token + self.cfg.latent * latent, stats

    def write(self, descriptions):
        """Greedy: descriptions (B, T) without padding -> ids (B, R), PAD after EOS."""
        prompt = join(self.cfg.pad, self.cfg.bos, descriptions, SEP)
        ids = self.generate(prompt, self.cfg.answer_size)
        is_end = ids == self.cfg.eos
        after_end = is_end.cumsum(1) - is_end.int() > 0
        return ids.masked_fill(after_end, self.cfg.pad)

# -- what an arm is judged by ----------------------------------------------------------------------

def outcome(said, gold):
    """exact | over: it went on after the right regex | same_length: in characters | other."""
    if said == gold:
        return "exact"
    if said.startswith(gold):
        return "over"
    return "same_length" if len(said) == len(gold) else "other"

def score(said, pairs):
    """Shares of the outcomes over n pairs; prefix is exact or over."""
    kinds = [outcome(words, gold) for words, (_, gold) in zip(said, pairs, strict=True)]
    figures = {kind: kinds.count(kind) / len(kinds) for kind in OUTCOMES}
    return figures | dict(prefix=figures["exact"] + figures["over"])

def alike(guess, target, regexes):
    """Does a description lead to the latent of its own regex? guess, target (n, C), n strings.

    paired, unpaired: mean cosines. r1: share of guesses whose nearest target has their own regex,
    by string. rank_text, rank_code: RankMe, at most C.
    """
    cosine = F.normalize(guess, dim=-1) @ F.normalize(target, dim=-1).T         # (n, n)
    number = torch.tensor([regexes.index(regex) for regex in regexes], device=cosine.device)
    same = number[:, None] == number                                    # (n, n)
    r1 = same.gather(1, cosine.argmax(1, keepdim=True)).float().mean()
    return dict(paired=cosine.diagonal().mean().item(), unpaired=cosine[~same].mean().item(),
                r1=r1.item(), r1_chance=same.float().mean().item(), rank_text=rankme(guess),
                rank_code=rankme(target))

@torch.no_grad()
def write(run, tokenizer, descriptions):
    """Regexes for n descriptions: n strings. Those of equal length go together, unpadded."""
    ids = tokenizer.encode_batch([" " + text for text in descriptions])
    said = [""] * len(ids)
    for length in {len(row) for row in ids}:
        which = [i for i, row in enumerate(ids) if len(row) == length]
        with run.autocast():
            rows = run.model.write(torch.tensor([ids[i] for i in which], device=run.device))
        for i, row in zip(which, rows.tolist()):
            said[i] = tokenizer.decode(row)
    return said

def learn(cfg, taught):
    """Train a GPT on pairs: (`train.Run`, tokenizer)."""
    device, dtype = train.pick_device(cfg)
    views = views_of(cfg, taught)
    tokenizer = vocabulary(views)
    known = {name: ids.to(device) for name, ids in pack(tokenizer, views, cfg).items()}
    torch.manual_seed(cfg.seed)
    model = GPT(dataclasses.replace(cfg, vocab_size=tokenizer.vocab_size)).to(device)
    run = train.Run(cfg, model, None, device, dtype)

    def loss_at(progress):
        """Loss of random pairs. They are drawn first, so that all arms of a seed see the same."""
        which = torch.randint(len(taught), (cfg.qa_batch_size // cfg.accum,)).to(device)
        return model.loss({name: join(model.cfg.pad, ids[which]) for name, ids in known.items()})
    runs.fit(run, "speak", loss_at)
    return run, tokenizer

@torch.no_grad()
def look(run, tokenizer, pairs):
    """How alike the views of n pairs are, and the cross-entropy of their regexes without EOS."""
    packed = pack(tokenizer, views_of(run.cfg, pairs), run.cfg)
    batch = {name: ids.to(run.device) for name, ids in packed.items()}
    figures = alike(*run.model.views(batch), [regex for _, regex in pairs])
    token_loss = run.model.token_loss(batch, with_eos=False)
    return figures | dict(token_loss=token_loss.item())

def measure(cfg):
    """Train an arm and judge it on the test pairs: a dict of figures."""
    known = read("synth_train")
    taught, held = draw(known, cfg.size, cfg.seed)
    held = held[:cfg.tests]
    # A model may know a leaked pair by heart. By the whole file: all sizes have the same test set.
    every = read("synth_test")[:cfg.tests]
    test = [pair for pair, leak in zip(every, leaked(known, every)) if not leak]
    descriptions = [text for text, _ in test + held]
    figures = dict(term=f"lambda {cfg.latent:g}, k {cfg.k}" if cfg.latent else "none")
    if cfg.model == "table":
        said = list(map(majority(taught), descriptions))
    else:
        run, tokenizer = learn(cfg, taught)
        figures["million"] = sum(p.numel() for p in run.model.parameters()) / 1e6
        said = write(run, tokenizer, descriptions)
        figures |= look(run, tokenizer, test)
    figures |= score(said[:len(test)], test)
    if held:
        figures["dev"] = score(said[len(test):], held)["exact"]
    return figures

# -- the arms --------------------------------------------------------------------------------------

STEPS = {250: 400, 1000: 600, 8000: 1200}       # by number of pairs
# the arm of the map with the best dev (.667 ± .009, 3 seeds; the worst has .569): the test pairs
# have no say in it
BEST = dict(latent=1.0, k=3)

def arm(size, **changes):
    """An arm with the steps of its size."""
    return Config(**dict(size=size, speak_steps=STEPS[size]) | changes)

MAP = {f"lambda={latent:g} k={k}": arm(1000, latent=latent, k=k)
       for latent in (0.5, 1.0, 2.0) for k in (0, 1, 3)}
CASES = {
    "": {},
    " latent": BEST,
    " no-EOS": dict(eos_in_loss=False),
    " latent no-EOS": BEST | dict(eos_in_loss=False),
    " table": dict(model="table"),
}
SQUARE = {f"{size}{case}": arm(size, **how) for size in STEPS for case, how in CASES.items()}
# Two views have as many tokens as the packed row: the latent term doubles the work of a step.
SQUARE |= {f"{size} twice the steps": arm(size, speak_steps=2 * steps)
           for size, steps in STEPS.items()}
WAYS = {
    "mse": arm(1000, **BEST, distance="mse"),
    "infonce": arm(1000, **BEST, distance="infonce"),
    "stop-gradient": arm(1000, **BEST, stop_gradient=True),
    "MLP": arm(1000, latent=BEST["latent"], mlp=True),
    "people": arm(1000, **BEST, view="people"),
    "drop=.5": arm(1000, k=BEST["k"], latent=2 * BEST["latent"], latent_drop=0.5),
    "1000 lr=0.001": arm(1000, speak_lr=1e-3),
    "1000 lr=0.004": arm(1000, speak_lr=4e-3),
    "1000 latent lr=0.001": arm(1000, speak_lr=1e-3, **BEST),
    "1000 latent lr=0.004": arm(1000, speak_lr=4e-3, **BEST),
}
GROUPS = dict(map=MAP, square=SQUARE, ways=WAYS)
ARMS = MAP | SQUARE | WAYS

def shrunk(cfg):
    """An arm for --fast."""
    return dataclasses.replace(cfg, n_embd=32, n_layer=1, top_k=1, size=60, tests=6,
                               qa_batch_size=8, speak_steps=2)

# -- the tables ------------------------------------------------------------------------------------

ANSWERS = {"latent term": "term", "exact match": "exact", "prefix match": "prefix",
           "over-generation": "over", "same length": "same_length", "other": "other", "dev": "dev",
           "million weights": "million"}
LATENTS = {"cross-entropy": "token_loss", "cosine of pairs": "paired", "of others": "unpaired",
           "R@1": "r1", "chance": "r1_chance", "rank of text": "rank_text", "of code": "rank_code"}
BOTH = {"latent term": "term", "exact match": "exact", "prefix match": "prefix", "dev": "dev"}
TABLES = {
    "By size": (SQUARE, ANSWERS),
    "Inside (cross-entropy: of a token of a test regex, without EOS)":
        ([name for name, cfg in SQUARE.items() if cfg.model == "gpt"], LATENTS),
    "1,000 pairs, lambda and k (1000 is lambda 0)": (["1000", *MAP], BOTH | LATENTS),
    "1,000 pairs: distances, predictors, views, learning rates":
        (["1000", "1000 latent", *WAYS], BOTH | LATENTS),
}

def gain(rows, arm, control, name):
    """Mean ± standard deviation of arm - control over the seeds that both have, in words."""
    figures = {(row["arm"], row["seed"]): row for row in by_seed(rows)}
    found = [row[name] - figures[control, seed][name] for (other, seed), row in figures.items()
             if other == arm and (control, seed) in figures]
    if found:
        above = sum(x > 0 for x in found)
        mean, deviation, n = figure_of(found)
    elif older := over_seeds(rows, f"{arm} - {control}", name):
        # an older table holds the difference itself, under the names of both arms
        above = over_seeds(rows, f"{arm} - {control}", f"{name}_above").mean
        mean, deviation, n = older
    else:
        return "not measured"
    spread = "" if deviation is None else f" ± {deviation:.3f}"
    return f"{mean:+.3f}{spread} ({above} of {n} seeds)"

def gains(rows):
    """Markdown: what the latent term adds to an arm that is otherwise the same, by seed."""
    figures = ("exact", "prefix", "over")
    lines = [["with", "without", "exact match", "prefix match", "over-generation"]]
    for size in STEPS:
        for term, without in (("", ""), ("", " twice the steps"), (" no-EOS", " no-EOS")):
            pair = f"{size} latent{term}", f"{size}{without}"
            lines.append([*pair, *(gain(rows, *pair, name) for name in figures)])
    return markdown(lines)

def draw_square(rows, path):
    """Exact and prefix match by number of pairs, mean and standard deviation over seeds."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, name in (left, "exact"), (right, "prefix"):
        for number, case in enumerate(("", " latent", " twice the steps", " no-EOS",
                                       " latent no-EOS", " table")):
            found = {size: over_seeds(rows, f"{size}{case}", name) for size in STEPS}
            sizes = [size for size in STEPS if found[size]]
            axis.errorbar([size * 1.03 ** number for size in sizes],    # side by side
                          [found[size].mean for size in sizes],
                          [found[size].deviation or 0 for size in sizes], fmt="-o", capsize=3,
                          color="0.7" if case == " table" else f"C{number}",
                          label=case.strip() or "cross-entropy")
        axis.set(xscale="log", xlabel="training pairs", ylim=(-0.02, 1))
    left.set(title="exact match", ylabel="share of test pairs")
    right.set(title="prefix match: the right regex, then more or not")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)

def llm_jepa(flags):
    """Run the arms, then write tables and figure. --arms takes names of arms and of groups."""
    read("synth_train")                 # without pairs it ends here, in one line
    words = flags.arms.split(",") if flags.arms else list(GROUPS)
    names = [name for word in words for name in GROUPS.get(word, [word])]
    arms = ARMS
    if flags.fast:
        print("labs.llm_jepa --fast: half a minute on one core; its figures mean nothing")
        flags = dataclasses.replace(flags, seeds=1, redo=True)
        arms = {name: shrunk(cfg) for name, cfg in ARMS.items()}
    rows = run_arms("llm_jepa", arms, dataclasses.replace(flags, arms=",".join(names)), measure)
    if flags.fast:
        print("\n".join(f"{name}: ran" for name in names))
        return
    path = Path(flags.out) / "llm_jepa.png"
    draw_square(rows, path)
    text = f"{tables(rows, TABLES)}\n\nWhat the latent term adds, by seed:\n\n{gains(rows)}"
    publish("llm_jepa", rows, text, flags.table)
    print(f"figure: {path}")


if __name__ == "__main__":
    main(llm_jepa)
