"""
LLM-JEPA (2025) on real pairs: does a latent term between two views help a language model?

    python data/nlrx/prepare.py --input=../shared/data/nlrx   the pairs; downloaded without --input
    python -m labs.llm_jepa                                   1 to 10 minutes a run on 2 cores
    python -m labs.llm_jepa --arms=square --seeds=5           a group: map, square or ways
    python -m labs.llm_jepa --fast                            10 seconds on one core

A causal language model reads [BOS] description [SEP] regex [EOS] and learns to write the regex.
LLM-JEPA adds lambda * d(g(z_text), z_code). z is the last state of a view that is read alone, and g
predicts z_code from z_text. The published gain may come from learning to stop, as its loss has no
EOS: arms run with EOS in the loss and without.

Expected before the first run: with EOS no gain at 8,000 pairs, a small one below. Without EOS no
exact match for any lambda; prefix match is then to be compared. The map of lambda and k is a
plateau. A description by people is no better a second view than the regex.

Arms of a size share pairs, batches, steps and the learning rate, tuned for lambda = 0 on held-out
training pairs. prepare.py prints a control without a model: the commonest regex of a pattern.
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
from data.nlrx.prepare import leaked
from labs import controls, runs
from labs.arms import main, run_or_try
from labs.tables import page_tables, publish

FOLDER = Path(data.__file__).parent / "nlrx"
# one token: a class such as [A-Z], a count, \b, .*, a word with its space, or one character
ATOMS = r"\[[^\]]*\]|\{\d,\}|\\b|\.\*| ?[A-Za-z][A-Za-z-]*|."
SEP = ord("\n")         # ids below 256 are bytes, and no text of a pair has a line break
HELD = 500              # training pairs at the end of the file that choose settings

@dataclasses.dataclass
class Config(train.Config):
    """An arm. `train.fit` trains it as phase 3: speak_steps, speak_lr and qa_batch_size count."""
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
    embed_scale: float = 1.0
    block_size: int = 128           # longest description in tokens
    answer_size: int = 32           # longest regex, EOS included; the longest gold one has 24
    qa_batch_size: int = 64         # pairs a step
    speak_lr: float = 2e-3
    weight_decay: float = 0.5       # ten times train.py's: dev .87, not .85 (1 seed)
    eval_every: int = 10 ** 9

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
    views = dict(description=[" " + text for text, _ in pairs],
                 regex=[regex for _, regex in pairs])
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

def pack(tokenizer, views, cfg, device):
    """The texts of each view as ids, padded: a dict of (n, T)."""
    return {name: data.pack(tokenizer, texts, cfg.block_size, "--block_size").to(device)
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

class GPT(controls.GPT):
    """The labs' GPT with LLM-JEPA's latent term. A batch is a dict, view -> ids (B, T), padded."""

    def __init__(self, cfg):
        super().__init__(cfg, 2 * cfg.block_size + 3)
        C = cfg.n_embd
        # made last, so that an arm without it starts from the same weights
        self.mlp = nn.Identity()
        if cfg.mlp:
            self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
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
        loss = token + self.cfg.latent * latent
        return loss, dict(token=token.detach(), latent=latent.detach())

def score(said, pairs):
    """Shares of n regexes that are exact, and whose beginning is (prefix): they may go on."""
    exact = [words == gold for words, (_, gold) in zip(said, pairs, strict=True)]
    prefix = [words.startswith(gold) for words, (_, gold) in zip(said, pairs)]
    return dict(exact=sum(exact) / len(exact), prefix=sum(prefix) / len(prefix))

def alike(guess, target, regexes):
    """Does a description lead to the latent of its own regex? guess, target (n, C), n strings.

    paired, unpaired: mean cosines. r1: share of guesses whose nearest target has their own regex,
    by string.
    """
    cosine = F.normalize(guess, dim=-1) @ F.normalize(target, dim=-1).T         # (n, n)
    number = torch.tensor([regexes.index(regex) for regex in regexes], device=cosine.device)
    same = number[:, None] == number                                    # (n, n)
    r1 = same.gather(1, cosine.argmax(1, keepdim=True)).float().mean()
    return dict(paired=cosine.diagonal().mean().item(),
                unpaired=cosine[~same].mean().item(),
                r1=r1.item(),
                r1_chance=same.float().mean().item())

def write(run, tokenizer, descriptions):
    """Greedy regexes for n descriptions: n strings. Those of equal length go together, unpadded."""
    cfg = run.model.cfg
    ids = tokenizer.encode_batch([" " + text for text in descriptions])
    said = [""] * len(ids)
    for length in {len(row) for row in ids}:
        which = [i for i, row in enumerate(ids) if len(row) == length]
        asked = torch.tensor([ids[i] for i in which], device=run.device)
        with run.autocast():
            rows = run.model.generate(join(cfg.pad, cfg.bos, asked, SEP), cfg.answer_size)
        for i, row in zip(which, rows.tolist()):
            end = row.index(cfg.eos) if cfg.eos in row else len(row)
            said[i] = tokenizer.decode(row[:end])
    return said

def learn(cfg, taught):
    """Train a GPT on pairs: (`train.Run`, tokenizer)."""
    device, dtype = train.pick_device(cfg)
    views = views_of(cfg, taught)
    tokenizer = vocabulary(views)
    known = pack(tokenizer, views, cfg, device)
    torch.manual_seed(cfg.seed)
    model = GPT(dataclasses.replace(cfg, vocab_size=tokenizer.vocab_size)).to(device)
    run = train.Run(cfg, model, None, device, dtype)

    def loss_at(progress):
        """Loss of random pairs. They are drawn first, so that all arms of a seed see the same."""
        which = torch.randint(len(taught), (cfg.qa_batch_size // cfg.accum,)).to(device)
        return model.loss({name: join(model.cfg.pad, ids[which]) for name, ids in known.items()})
    runs.fit(run, "speak", loss_at)
    return run, tokenizer

def measure(cfg):
    """Train an arm and judge it on the test pairs: a dict of figures."""
    known = read("synth_train")
    taught, held = draw(known, cfg.size, cfg.seed)
    held = held[:cfg.tests]
    # A model may know a leaked pair by heart. By the whole file: all sizes have the same test set.
    every = read("synth_test")[:cfg.tests]
    test = [pair for pair, leak in zip(every, leaked(known, every)) if not leak]
    run, tokenizer = learn(cfg, taught)
    said = write(run, tokenizer, [text for text, _ in test + held])
    figures = score(said[:len(test)], test)
    with torch.no_grad():
        batch = pack(tokenizer, views_of(cfg, test), cfg, run.device)
        figures |= alike(*run.model.views(batch), [regex for _, regex in test])
        figures["token_loss"] = run.model.token_loss(batch, with_eos=False).item()
    if held:
        figures["dev"] = score(said[len(test):], held)["exact"]
    return figures

# -- the arms --------------------------------------------------------------------------------------

STEPS = {250: 400, 1000: 600, 8000: 1200}       # by number of pairs
# the arm of the map with the best dev, .667 ± .009 (3 seeds); test pairs have no say in it
BEST = dict(latent=1.0, k=3)

def arm(size, **changes):
    """An arm with the steps of its size."""
    return Config(**dict(size=size, speak_steps=STEPS[size]) | changes)

MAP = {f"lambda={latent:g} k={k}": arm(1000, latent=latent, k=k)
       for latent in (0.5, 1.0, 2.0) for k in (0, 1, 3)}
SQUARE = {}
for size, steps in STEPS.items():
    SQUARE |= {
        f"{size}": arm(size),
        f"{size} latent": arm(size, **BEST),
        f"{size} no-EOS": arm(size, eos_in_loss=False),
        f"{size} latent no-EOS": arm(size, **BEST, eos_in_loss=False),
        # Two views have as many tokens as the packed row: the latent term doubles a step's work.
        f"{size} twice the steps": arm(size, speak_steps=2 * steps),
    }
WAYS = {
    "mse": arm(1000, **BEST, distance="mse"),
    "infonce": arm(1000, **BEST, distance="infonce"),
    "stop-gradient": arm(1000, **BEST, stop_gradient=True),
    "MLP": arm(1000, latent=BEST["latent"], mlp=True),
    "people": arm(1000, **BEST, view="people"),
    "drop=.5": arm(1000, k=BEST["k"], latent=2 * BEST["latent"], latent_drop=0.5),
}
for lr in (1e-3, 4e-3):
    WAYS[f"1000 lr={lr:g}"] = arm(1000, speak_lr=lr)
    WAYS[f"1000 latent lr={lr:g}"] = arm(1000, speak_lr=lr, **BEST)
GROUPS = dict(map=MAP, square=SQUARE, ways=WAYS)
ARMS = MAP | SQUARE | WAYS

def shrunk(cfg):
    """An arm for --fast."""
    return dataclasses.replace(cfg, n_embd=32, n_layer=1, top_k=1, size=60, tests=6,
                               qa_batch_size=8, speak_steps=2)

def llm_jepa(flags):
    """Run the arms; print the tables of the lab's page. --arms: names of arms and of groups."""
    read("synth_train")                 # without pairs it ends here, in one line
    words = flags.arms.split(",") if flags.arms else list(GROUPS)
    names = [name for word in words for name in GROUPS.get(word, [word])]
    flags = dataclasses.replace(flags, arms=",".join(names))
    rows = run_or_try("llm_jepa", ARMS, flags, measure, shrunk)
    if rows is not None:
        publish("llm_jepa", rows, page_tables("llm_jepa", rows), flags.table)

if __name__ == "__main__":
    main(llm_jepa)
