"""
LLM-JEPA on real pairs: does a latent term between two views help a language model, and by more than learning to stop?

    python data/nlrx/prepare.py                             the pairs: descriptions and regular expressions
    python -m labs.llm_jepa                                 the map, lambda x k, and with its best the rest: hours
    python -m labs.llm_jepa --arms=square --seeds=5         more seeds of a group, after map: square, ways, others
    python -m labs.llm_jepa --fast                          does it run?

A causal language model reads [BOS] description [SEP] regex [EOS] and learns to write the regex. LLM-JEPA (2025) adds
lambda * d(g(z_text), z_code): z is what the model makes of one view alone, its last state at the view's last token, and
g guesses the regex's z from the description's. The published gain, .54 -> .61 from random weights, comes from code
whose loss never contains EOS: so each arm is run with EOS in the loss and without, and wrong answers are sorted.

Expected before the first run: with EOS no gain at 8,000 pairs, a small one below; without EOS no exact match at all,
whatever lambda is, as from random weights nothing else teaches to stop: there the prefix match is what to compare. The
map is a plateau. What people said is no better a second view than the regex.

Arms of a size share pairs, batches, steps and learning rate, tuned for lambda = 0 on training pairs held out; a seed
draws pairs and weights. Lambda and k are the map's best by its column dev, and no test pair is looked at for that.
T-JEPA has three phases with batches, steps and rates of its own, untuned. The table is no model: the commonest reading
of a sentence.
"""
import dataclasses
import json
import re
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

import data
import evaluate
import tjepa
import train
from data.nlrx.prepare import leaked, majority
from labs import controls
from labs.arms import main, run_arms
from labs.collapse import read_run
from labs.measures import rankme
from labs.tables import by_seed, markdown, over_seeds, publish, table

FOLDER = Path(data.__file__).parent / "nlrx"
# what is one token: a class such as [A-Z], a count, \b, .*, a word with its space, or any one character
ATOMS = r"\[[^\]]*\]|\{\d,\}|\\b|\.\*| ?[A-Za-z][A-Za-z-]*|."
SEP = ord("\n")         # ids below 256 are bytes, and no text of a pair holds a line break
HELD = 500              # training pairs at the end of the file, kept for choosing settings
OUTCOMES = ("exact", "over", "same_length", "other")

@dataclasses.dataclass
class Config(train.Config):
    """An arm. What it trains, by train.fit, is phase 3: speak_steps, speak_lr and qa_batch_size are its own."""
    model: str = "gpt"              # gpt | encoder-decoder | t-jepa | table: who learns to translate
    pairs: str = "synth"            # synth: descriptions by a grammar | turk: by people
    size: int = 8000                # training pairs, drawn by the seed
    tests: int = 2000               # test pairs, from the first on, and as many held out at most
    eos_in_loss: float = 1.0        # share of the steps, from the first on, that ask for EOS too; 0 never
    latent: float = 0.0             # lambda, the weight of the latent term; 0 is a plain GPT, and no view is read
    k: int = 0                      # predictor tokens at the end of the description's view; 0: g is the identity
    mlp: bool = False               # g ends in an MLP
    view: str = "regex"             # regex | people: what the description is compared with; people said it (synth only)
    distance: str = "cosine"        # cosine | mse | infonce
    stop_gradient: bool = False     # keeps the regex's view from coming towards the guess; the authors' code lets it
    latent_drop: float = 0.0        # share of the steps without the latent term, drawn by chance
    n_embd: int = 160               # width; with 4 layers 1.3 million parameters
    block_size: int = 128           # longest description, in tokens
    answer_size: int = 32           # longest regex, EOS included; longer outputs are cut there: the longest gold is 24
    qa_batch_size: int = 64         # pairs a step
    speak_lr: float = 2e-3          # peak learning rate
    weight_decay: float = 0.5       # ten times T-JEPA's: held-out pairs .87 in 1,200 steps, not .85 in 1,500 (1 seed)
    eval_every: int = 10 ** 9       # evaluated once, at the end

# -- pairs -------------------------------------------------------------------------------------------------------------
def read(name):
    """(description, regex) of each line of a prepared file."""
    path = FOLDER / f"{name}.tsv"
    if not path.exists():
        raise ValueError(f"{path} is missing: run `python data/nlrx/prepare.py` first")
    return data.read_rows(path, lambda *fields: fields)

def draw(pairs, size, seed):
    """(the pairs to learn from, the pairs to choose settings by): the latter are none where all are learned from."""
    pool, held = (pairs[:-HELD], pairs[-HELD:]) if size <= len(pairs) - HELD else (pairs, [])
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:size]
    return [pool[i] for i in order], held

def views_of(cfg, pairs):
    """The texts of n pairs, by view; what people said of the same regex only where the latent term reads it."""
    views = dict(description=[" " + text for text, _ in pairs], regex=[regex for _, regex in pairs])
    if cfg.view == "people":
        # a description of both files keeps what was said of it in the training file
        said = {text: other for part in ("test", "train") for text, other, _ in read(f"views_{part}")}
        views["people"] = [" " + said[text] for text, _ in pairs]
    return views

def vocabulary(views):
    """A tokenizer of the atoms that occur twice in the texts of all views; any other falls apart into bytes."""
    atoms = Counter(atom for texts in views.values() for text in texts for atom in re.findall(ATOMS, text))
    ranks = [bytes([byte]) for byte in range(256)]
    return data.Tokenizer(ranks + sorted({atom.encode() for atom, n in atoms.items() if n > 1} - set(ranks)), ATOMS)

def pack(tokenizer, views, cfg):
    """The texts of each view as ids, padded: (n, T) each."""
    limits = dict.fromkeys(views, (cfg.block_size, "--block_size")) | dict(
        regex=(cfg.answer_size - 1, "--answer_size"))
    return {name: data.pack(tokenizer, texts, *limits[name]) for name, texts in views.items()}

def join(pad, *parts):
    """Parts end to end -> (B, longest): ids (B, T), and single ids for all rows. Padding moves to the right."""
    like = next(part for part in parts if torch.is_tensor(part))
    rows = torch.cat([part if torch.is_tensor(part) else like.new_full((len(like), 1), part) for part in parts], dim=1)
    rows = rows.gather(1, (rows == pad).byte().argsort(dim=1, stable=True))
    return rows[:, :(rows != pad).sum(1).max()]

def places(tokens):
    """0, 1, ... for tokens (B, T): (T,)."""
    return torch.arange(tokens.size(1), device=tokens.device)

# -- the language model ------------------------------------------------------------------------------------------------
class GPT(controls.GPT):
    """The control's GPT with LLM-JEPA's latent term. [MASK] is the predictor token: something is to be guessed here.
    A batch is a dict, view -> ids (B, T), padded on the right."""
    def __init__(self, cfg):
        super().__init__(cfg, cfg.block_size + cfg.answer_size + 2)
        C = cfg.n_embd
        # last, so that an arm without it starts from the same weights
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C)) if cfg.mlp else nn.Identity()
        self.mlp.apply(self.init_weights)

    def token_loss(self, batch, progress):
        """Cross-entropy of the regex after its description, and of EOS while it counts. progress: share of the run."""
        cfg = self.cfg
        tokens = join(cfg.pad, cfg.bos, batch["description"], SEP, batch["regex"], cfg.eos)             # (B, T)
        states, following = self.states(tokens)[:, :-1], tokens[:, 1:]                  # (B, T-1, C), (B, T-1)
        asked = (tokens == SEP).cumsum(1)[:, :-1].bool() & (following != cfg.pad)                       # (B, T-1)
        if progress >= cfg.eos_in_loss:
            asked &= following != cfg.eos
        return F.cross_entropy(self.say(states[asked]), following[asked])

    def views(self, batch):
        """What the model makes of each of two views alone: g(z_text), z_code (B, C). Both are read in one pass, side by
        side in a row: no token of one sees the other, and positions start again (rotary ones are relative: they need
        not)."""
        pad, bos, mask = self.cfg.pad, self.cfg.bos, self.cfg.mask
        text, code = join(pad, bos, batch["description"], *[mask] * self.cfg.k), join(pad, bos, batch[self.cfg.view])
        both, split = torch.cat((text, code), dim=1), text.size(1)                                      # (B, T)
        positions, second = torch.cat((places(text), places(code))), places(both) >= split              # (T,)
        sees = (second[:, None] == second) & (positions[:, None] >= positions)                          # (T, T)
        states, rows = self.states(both, positions, sees), torch.arange(len(both), device=both.device)  # (B, T, C)
        z_text = states[rows, (text != pad).sum(1) - 1]                                                 # (B, C)
        z_code = states[rows, (code != pad).sum(1) - 1 + split]
        return self.mlp(z_text).float(), z_code.float()

    def latent_loss(self, batch):
        """d(g(z_text), z_code)."""
        guess, target = self.views(batch)
        target = target.detach() if self.cfg.stop_gradient else target
        if self.cfg.distance == "cosine":
            return 1 - F.cosine_similarity(guess, target).mean()
        every = torch.ones(len(guess), dtype=torch.bool, device=guess.device)
        return tjepa.latent_distance(guess, target, every, self.cfg.distance)

    def loss(self, batch, progress):
        """CE + lambda * d -> (loss, stats)."""
        token, latent = self.token_loss(batch, progress), self.cfg.latent
        if not latent or torch.rand(()) < self.cfg.latent_drop:     # then the views are not read: half the work
            return token, dict(token=token.detach())
        distance = self.latent_loss(batch)
        return token + latent * distance, dict(token=token.detach(), latent=distance.detach())

    def write(self, descriptions):
        """Greedy, answer_size tokens: descriptions (B, T), without padding -> ids (B, R), PAD after EOS."""
        said = self.generate(join(self.cfg.pad, self.cfg.bos, descriptions, SEP), self.cfg.answer_size)
        ended = (said == self.cfg.eos).cumsum(1)                                                        # (B, R)
        return said.masked_fill(F.pad(ended[:, :-1], (1, 0)) > 0, self.cfg.pad)     # EOS itself stays

class EncoderDecoder(nn.Module):
    """T-JEPA's encoder and decoder, trained together by cross-entropy: the decoder reads the latents of all tokens."""
    init_weights, speak, trained_in = tjepa.TJEPA.init_weights, tjepa.TJEPA.speak, controls.GPT.trained_in

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.encoder, self.decoder = cfg, tjepa.Encoder(cfg), tjepa.Decoder(cfg)
        self.apply(self.init_weights)

    def read(self, descriptions):
        """(B, T) -> what the decoder attends to."""
        real = descriptions != self.cfg.pad                                                             # (B, T)
        return tjepa.Thought(None, self.encoder(descriptions, places(descriptions), real[:, None, None]), real)

    def loss(self, batch, progress):
        """Cross-entropy of the regex and its EOS -> (loss, stats)."""
        cfg, memory = self.cfg, self.decoder.memory(self.read(batch["description"]))
        words = join(cfg.pad, batch["regex"], cfg.eos)                                                  # (B, R)
        states = self.decoder(F.pad(words[:, :-1], (1, 0), value=cfg.bos), *memory)                     # (B, R, C)
        logits = self.decoder.token_head(states).float().flatten(0, 1)                                  # (B*R, V)
        token = F.cross_entropy(logits, words.flatten(), ignore_index=cfg.pad)
        return token, dict(token=token.detach())

    def write(self, descriptions):
        """As `GPT.write`."""
        return torch.stack(list(self.speak(self.read(descriptions))), dim=1)

# -- what an arm is judged by ------------------------------------------------------------------------------------------
def outcome(said, gold):
    """One of OUTCOMES: exact | over: it went on after the right regex | same_length: as many characters | other."""
    if said == gold:
        return "exact"
    return "over" if said.startswith(gold) else "same_length" if len(said) == len(gold) else "other"

def score(said, pairs, leaks):
    """Shares of the outcomes over the pairs that leaks (n bools) does not mark; prefix is exact or over. exact_leaked
    is over the marked ones alone, if there are any: what may be learned by heart is no test."""
    kinds = [outcome(words, gold) for words, (_, gold) in zip(said, pairs)]
    free, seen = ([kind for kind, leak in zip(kinds, leaks) if leak == which] for which in (False, True))
    share = {kind: free.count(kind) / len(free) for kind in OUTCOMES}
    share["prefix"] = share["exact"] + share["over"]
    return share | (dict(exact_leaked=seen.count("exact") / len(seen)) if seen else {})

def alike(guess, target, regexes):
    """Does a description lead to its own regex's latent? guess, target (n, C), regexes n strings. paired, unpaired:
    mean cosines; r1: share of guesses whose nearest target is of their own regex, by string; RankMe, at most C."""
    cosine = F.normalize(guess, dim=-1) @ F.normalize(target, dim=-1).T                                 # (n, n)
    same = torch.tensor([[a == b for b in regexes] for a in regexes], device=cosine.device)             # (n, n)
    best = same.gather(1, cosine.argmax(1, keepdim=True)).float().mean()
    return dict(paired=cosine.diagonal().mean().item(), unpaired=cosine[~same].mean().item(), r1=best.item(),
                r1_chance=same.float().mean().item(), rank_text=rankme(guess), rank_code=rankme(target))

@torch.no_grad()
def write(run, tokenizer, descriptions):
    """What run.model writes for each of n descriptions: n strings. Equally long ones go together: nothing is padded."""
    ids, said = tokenizer.encode_batch([" " + text for text in descriptions]), [""] * len(descriptions)
    for length in {len(row) for row in ids}:
        which = [i for i, row in enumerate(ids) if len(row) == length]
        with run.autocast():
            rows = run.model.write(torch.tensor([ids[i] for i in which], device=run.device))
        for i, row in zip(which, rows.tolist()):
            said[i] = tokenizer.decode(row)
    return said

# -- an arm ------------------------------------------------------------------------------------------------------------
def learn_tokens(cfg, taught):
    """Train one of the models above -> (model, descriptions -> what it writes, pairs -> figures of what is in it)."""
    device, dtype = train.pick_device(cfg)
    tokenizer = vocabulary(views := views_of(cfg, taught))
    known = {name: ids.to(device) for name, ids in pack(tokenizer, views, cfg).items()}                 # (n, T) each
    torch.manual_seed(cfg.seed)
    kind = GPT if cfg.model == "gpt" else EncoderDecoder
    model = kind(dataclasses.replace(cfg, vocab_size=tokenizer.vocab_size)).to(device)
    run = train.Run(cfg, model, None, device, dtype)

    def loss_at(progress):
        """Of a batch, which is drawn first: all arms of a seed see the same ones."""
        which = torch.randint(len(taught), (cfg.qa_batch_size // cfg.accum,)).to(device)
        return model.loss({name: join(model.cfg.pad, ids[which]) for name, ids in known.items()}, progress)
    train.fit(run, "speak", loss_at, lambda whole: {}, evaluate.Log(cfg.out, []), lambda step, optimizer: None)

    def look(pairs):
        """How alike its views of n pairs are, and its cross-entropy of their regexes, EOS never counted."""
        batch = {name: ids.to(device) for name, ids in pack(tokenizer, views_of(cfg, pairs), cfg).items()}
        return alike(*model.views(batch), [regex for _, regex in pairs]) | dict(
            token_loss=model.token_loss(batch, 1.0).item())
    return model, lambda texts: write(run, tokenizer, texts), look if cfg.model == "gpt" else None

def learn_t_jepa(cfg, taught):
    """The same for T-JEPA: it reads all pairs (phase 1), learns description -> latent of the regex, then to say it."""
    text, qa = Path(cfg.out) / "pairs.txt", Path(cfg.out) / "pairs.tsv"
    text.write_text("".join(f"{description}: {regex}\n" for description, regex in taught))
    qa.write_text("".join(f"{description}\t{regex}\n" for description, regex in taught))
    shared = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(train.Config)}
    train.run(cfg := train.Config(**shared | dict(data=str(text), qa=str(qa))))
    device, dtype = train.pick_device(cfg)
    corpus, model = read_run(cfg)
    run = train.Run(cfg, model.to(device), corpus, device, dtype)

    def ids(texts):
        """As the run reads them."""
        return data.pack(corpus.tokenizer, texts, cfg.block_size, "--block_size").to(device)
    def write(texts):
        """Think, then speak."""
        return evaluate.say(run, evaluate.think_all(run, ids(texts)))
    def look(pairs):
        """How alike the thoughts are to the latents that they should be."""
        texts, regexes = zip(*pairs)
        target = evaluate.standardise(model, model.concept(ids([" " + regex for regex in regexes])))       # (n, C)
        return alike(evaluate.think_all(run, ids(list(texts))).latent, target, regexes)
    return model, write, look

def learn_table(cfg, taught):
    """The same for no model at all."""
    guess = majority(taught)
    return nn.Identity(), lambda texts: [guess(text) for text in texts], None

def measure(cfg):
    """Train an arm and judge it on the test pairs: a dict of figures. said.json keeps what it wrote."""
    known, test = read(f"{cfg.pairs}_train"), read(f"{cfg.pairs}_test")[:cfg.tests]
    (taught, held), leaks = draw(known, cfg.size, cfg.seed), leaked(known, test)    # of the whole file: one test set
    held = held[:cfg.tests]
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    model, write, look = {"t-jepa": learn_t_jepa, "table": learn_table}.get(cfg.model, learn_tokens)(cfg, taught)
    figures = dict(minutes=(time.perf_counter() - started) / 60,
                   million=sum(p.numel() for name, p in model.named_parameters() if "target" not in name) / 1e6,
                   term=f"lambda {cfg.latent:g}, k {cfg.k}" if cfg.latent else "none")
    said = write([text for text, _ in test + held])                                 # at once: fewer, larger batches
    (Path(cfg.out) / "said.json").write_text(json.dumps(said))
    figures |= score(said[:len(test)], test, leaks)
    if held:
        figures["dev"] = score(said[len(test):], held, [False] * len(held))["exact"]
    with torch.no_grad():
        return figures | (look([pair for pair, leak in zip(test, leaks) if not leak]) if look else {})

# -- the arms ----------------------------------------------------------------------------------------------------------
STEPS = {250: 400, 1000: 600, 8000: 1200}

def arm(size, **change):
    """An arm with the steps of its size."""
    return Config(**dict(size=size, speak_steps=STEPS[size]) | change)

MAP = {f"lambda={latent:g} k={k}": arm(1000, latent=latent, k=k) for latent in (0.5, 1.0, 2.0) for k in (0, 1, 3)}

def cases(best):
    """What is done at each size; best: lambda and k, a dict."""
    no_eos = dict(eos_in_loss=0.0)
    return {"": {}, " latent": best, " no-EOS": no_eos, " latent no-EOS": best | no_eos, " table": dict(model="table")}

def square(best):
    """EOS x lambda by number of pairs, the table that is no model, and a plain GPT with the latent arms' compute."""
    arms = {f"{size}{case}": arm(size, **how) for size in STEPS for case, how in cases(best).items()}
    # two views have the tokens of the packed row, at k = 1 exactly: the latent term doubles the work of a step
    arms |= {f"{size} twice the steps": arm(size, speak_steps=2 * steps) for size, steps in STEPS.items()}
    return arms | {f"1000{case} EOS-at-first": arm(1000, **cases(best)[case] | dict(eos_in_loss=0.5))
                   for case in ("", " latent")}

def ways(best):
    """What else may be a distance, a predictor, a view; and if the shared learning rate favours one side."""
    changes = {"mse": dict(distance="mse"), "infonce": dict(distance="infonce"),
               "stop-gradient": dict(stop_gradient=True), "MLP": dict(k=0, mlp=True), "people": dict(view="people"),
               "drop=.5": dict(latent=2 * best["latent"], latent_drop=0.5)}
    arms = {name: arm(1000, **best | change) for name, change in changes.items()}
    return arms | {f"1000{case} lr={lr:g}": arm(1000, speak_lr=lr, **cases(best)[case])
                   for lr in (1e-3, 4e-3) for case in ("", " latent")}

def others(best):
    """Descriptions by people; and other models, of about the same size."""
    arms = {f"turk{case}": arm(8000, pairs="turk", **cases(best)[case]) for case in ("", " latent", " table")}
    arms |= {f"{size} encoder-decoder": arm(size, model="encoder-decoder", memory="tokens", n_layer=2, dec_layer=2,
                                            n_embd=144, top_k=1) for size in (1000, 8000)}
    jepa = arm(8000, model="t-jepa", **train.LATENT, n_embd=104, block_size=64, vocab_size=512,
               stop_gradient=True, qa_batch_size=128, speak_lr=1e-3, weight_decay=0.05, pretrain_steps=1500,
               distill_steps=2000, speak_steps=2400)
    return arms | {f"8000 t-jepa {name}": dataclasses.replace(jepa, **change) for name, change in {
        "thought": dict(memory="thought"), "both": dict(memory="both"),
        "both without phase 1": dict(memory="both", pretrain_steps=0)}.items()}

def groups_of(best):
    """Name of a group of arms -> its arms."""
    return dict(map=MAP, square=square(best), ways=ways(best), others=others(best))

def shrunk(cfg):
    """An arm for --fast."""
    return dataclasses.replace(cfg, n_embd=32, n_layer=1, top_k=1, dec_layer=1, pred_layer=1, pred_embd=16, size=60,
                               tests=6, batch_size=8, qa_batch_size=8, pretrain_steps=min(2, cfg.pretrain_steps),
                               distill_steps=2, speak_steps=2)

def best_of_map(rows, out):
    """Lambda and k of the arm of the map that is best on training pairs held out, and a sentence that says so."""
    dev = {name: over_seeds(rows, name, "dev") for name in MAP}
    if missing := [name for name, found in dev.items() if not found]:
        raise ValueError(f"there is no result of the arm {missing[0]}, and lambda and k are chosen by the map: "
                         f"run `python -m labs.llm_jepa --arms=map --out={out}` first")
    mean = {name: found.mean for name, found in dev.items()}
    best = max(mean, key=mean.get)
    return dict(latent=MAP[best].latent, k=MAP[best].k), (
        f"The latent arms take {best}, the arm of the map that is best on held-out training pairs: "
        f"dev {mean[best]:.3f}, {dev[best].seeds} seeds; the worst has {min(mean.values()):.3f}.")

# -- the tables --------------------------------------------------------------------------------------------------------
ANSWERS = {"latent term": "term", "exact match": "exact", "prefix match": "prefix", "over-generation": "over",
           "same length": "same_length", "other": "other", "dev": "dev", "leaked": "exact_leaked",
           "million weights": "million"}
LATENTS = {"cross-entropy": "token_loss", "cosine of pairs": "paired", "of others": "unpaired", "R@1": "r1",
           "chance": "r1_chance", "rank of text": "rank_text", "of code": "rank_code"}
BOTH = {name: ANSWERS[name] for name in ("latent term", "exact match", "prefix match", "dev")} | LATENTS

def gains(rows):
    """What the latent term adds to an arm that is otherwise the same, seed by seed: markdown."""
    of = {(row["arm"], row["seed"]): row for row in by_seed(rows)}
    lines = [["with", "without", "exact match", "prefix match", "over-generation"]]

    def gain(arm, control, name):
        """Mean ± standard deviation of the differences, and how many seeds are above 0."""
        found = [row[name] - of[control, seed][name] for (other, seed), row in of.items()
                 if other == arm and (control, seed) in of]
        if not found:       # an older table has the difference itself, under the name of the two arms
            older, above = (over_seeds(rows, f"{arm} - {control}", figure) for figure in (name, f"{name}_above"))
            return f"{older.mean:+.3f} ± {older.deviation:.3f} ({above.mean} of {older.seeds} seeds)" if older \
                else "not measured"
        spread = f" ± {statistics.stdev(found):.3f}" if found[1:] else ""
        return f"{statistics.mean(found):+.3f}{spread} ({sum(x > 0 for x in found)} of {len(found)} seeds)"
    pairs = [(f"{size} latent{tail}", f"{size}{other}") for size in STEPS for tail, other in (
        ("", ""), ("", " twice the steps"), (" no-EOS", " no-EOS"))]
    for arm, control in (*pairs, ("1000 latent EOS-at-first", "1000 EOS-at-first"), ("turk latent", "turk")):
        lines.append([arm, control, *(gain(arm, control, name) for name in ("exact", "prefix", "over"))])
    return markdown(lines)

def text_of(rows, best, chosen):
    """All tables, markdown. Arms of the square stand again where others are compared with them."""
    arms, other = square(best), others(best)
    def inside(arms):
        """Those that have latents to look at."""
        return {name: cfg for name, cfg in arms.items() if cfg.model in ("gpt", "t-jepa")}
    parts = {"By size; leaked: test descriptions that occur in the training file, counted nowhere else":
             table(rows, arms, ANSWERS),
             "What the latent term adds, by seed": gains(rows),
             "Inside; cross-entropy: of a test regex's token, EOS never counted": table(rows, inside(arms), LATENTS),
             "1,000 pairs: lambda and k; 1000 is lambda 0": table(rows, {"1000": None} | MAP, BOTH),
             "1,000 pairs: distances, predictors, views, learning rates":
             table(rows, {"1000": None, "1000 latent": None} | ways(best), BOTH),
             "Others: descriptions by people, and other models of about the size":
             table(rows, {"8000": None, "8000 latent": None, "8000 table": None} | other, ANSWERS),
             "Inside them": table(rows, inside(other), LATENTS)}
    return "\n\n".join([chosen, *(f"{title}:\n\n{part}" for title, part in parts.items())])

def draw_square(rows, path):
    """Exact and prefix match by number of pairs, mean and standard deviation over the seeds."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, title) in zip(axes, dict(exact="exact match", prefix="prefix match: exact, or too long").items()):
        for i, case in enumerate(("", " latent", " no-EOS", " latent no-EOS", " twice the steps", " table")):
            at = {size * 1.03 ** i: over_seeds(rows, f"{size}{case}", name) for size in STEPS}
            x, y = list(filter(at.get, at)), list(filter(None, at.values()))
            axis.errorbar(x, [found.mean for found in y], [found.deviation or 0 for found in y], capsize=3,
                          fmt="--o" if "no-EOS" in case else "-o", label=case.strip() or "cross-entropy")
        axis.set(title=title, xscale="log", xlabel="training pairs", ylim=(-0.02, 1))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)

def llm_jepa(flags):
    """Run the map, choose lambda and k by it, run the other arms; write the tables and the figure. --arms takes names
    of groups too."""
    flags = dataclasses.replace(flags, seeds=1) if flags.fast else flags
    groups = groups_of(dict(latent=1.0, k=1))       # what is best changes no name
    known = [name for arms in groups.values() for name in arms]
    names = [name for word in (flags.arms.split(",") if flags.arms else groups) for name in groups.get(word, [word])]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--arms={unknown[0]}: this lab has {', '.join([*groups, *known])}")
    Path(flags.out).mkdir(parents=True, exist_ok=True)

    def run_those(*groups):
        """Run the arms of some groups that were asked for; rows of all that is on disk."""
        arms = {name: shrunk(cfg) if flags.fast else cfg
                for arms in groups for name, cfg in arms.items() if name in names}
        return run_arms("llm_jepa", arms, dataclasses.replace(flags, arms=""), measure)
    best, chosen = best_of_map(run_those(MAP), flags.out)
    rows = run_those(others(best), square(best), ways(best))     # the longest first: they would be the tail
    draw_square(rows, path := Path(flags.out) / f"llm_jepa{'-fast' * flags.fast}.png")
    publish("llm_jepa", rows, text_of(rows, best, chosen), flags.table)
    print(f"figure: {path}")


if __name__ == "__main__":
    main(llm_jepa)
