"""
LLM-JEPA on real pairs: does a latent term between two views help a language model, and by more than learning to stop?

    python data/nlrx/prepare.py                                     the pairs: descriptions and regular expressions
    python -m labs.llm_jepa --seeds=5 --arms="1000,1000 latent"     two arms; without --arms all of them: hours
    python -m labs.llm_jepa --fast                                  does it run?

A causal language model reads [BOS] description [SEP] regex [EOS] and learns to write the regex. LLM-JEPA (2025) adds
lambda * d(g(z_text), z_code): z is what the model makes of one view alone, its last state at the view's last token, and
g guesses the regex's z from the description's. The published gain, .54 -> .61 from random weights, comes from code
whose loss never contains EOS: so each arm is run with EOS in the loss and without, and wrong answers are sorted.

Expected before the first run: with EOS no gain at 8,000 pairs, a small one below; without EOS no exact match at all,
whatever lambda is, as from random weights nothing else teaches to stop: there the prefix match is what to compare.

Arms of a size share pairs, batches, steps and learning rate, tuned for lambda = 0 on training pairs held out; a seed
draws pairs and weights. Lambda and k are to be chosen by the column dev. The table is no model: the commonest reading.
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
from labs.arms import main, publish, run_arms, table
from labs.collapse import read_run
from labs.measures import rankme

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

def vocabulary(pairs):
    """A tokenizer of the atoms that occur twice; any other falls apart into bytes."""
    atoms = Counter(atom for pair in pairs for text in (" " + pair[0], pair[1]) for atom in re.findall(ATOMS, text))
    ranks = [bytes([byte]) for byte in range(256)]
    return data.Tokenizer(ranks + sorted({atom.encode() for atom, n in atoms.items() if n > 1} - set(ranks)), ATOMS)

def pack(tokenizer, pairs, cfg):
    """Pairs as ids, padded: descriptions (n, T), regexes (n, R)."""
    return (data.pack(tokenizer, [" " + text for text, _ in pairs], cfg.block_size, "--block_size"),
            data.pack(tokenizer, [regex for _, regex in pairs], cfg.answer_size - 1, "--answer_size - 1"))

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
class GPT(nn.Module):
    """Decoder-only, of T-JEPA's blocks. [MASK] is the predictor token: something is to be guessed here."""
    init_weights = tjepa.TJEPA.init_weights
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.n_embd
        self.embed = nn.Embedding(cfg.vocab_size, C)
        self.blocks = nn.ModuleList(tjepa.Block(C, cfg.n_head) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(C, bias=False)
        longest = cfg.block_size + cfg.answer_size + 2
        self.register_buffer("rope", tjepa.rotary(longest, C // cfg.n_head), persistent=False)
        self.apply(self.init_weights)
        # last, so that an arm without it starts from the same weights
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C)) if cfg.mlp else nn.Identity()
        self.mlp.apply(self.init_weights)

    def trained_in(self, phase):
        """All of it."""
        return list(self.children())

    def forward(self, tokens, positions, mask=None, caches=None):
        """tokens (B, T) at positions (T,) -> states (B, T, C). mask: bool (T, T), without it causal."""
        x, rope = self.embed(tokens), self.rope[positions]                              # (B, T, C), (T, hs/2)
        for block, cache in zip(self.blocks, caches or [(None, None)] * len(self.blocks)):
            x = block(x, rope, mask=mask, causal=mask is None, cache=cache)
        return self.norm(x)

    def say(self, states):
        """Logits (..., V) of the next token; the head is the embedding."""
        return F.linear(states, self.embed.weight).float()

    def token_loss(self, descriptions, regexes, progress):
        """Cross-entropy of the regex after its description, and of EOS while it counts. progress: share of the run."""
        cfg = self.cfg
        tokens = join(cfg.pad, cfg.bos, descriptions, SEP, regexes, cfg.eos)                            # (B, T)
        states, following = self(tokens, places(tokens))[:, :-1], tokens[:, 1:]
        asked = (tokens == SEP).cumsum(1)[:, :-1].bool() & (following != cfg.pad)                       # (B, T-1)
        if progress >= cfg.eos_in_loss:
            asked &= following != cfg.eos
        return F.cross_entropy(self.say(states[asked]), following[asked])

    def views(self, descriptions, regexes):
        """What the model makes of each view alone: g(z_text), z_code (B, C). Both are read in one pass, side by side in
        a row: no token of one sees the other, and positions start again (rotary ones are relative: they need not)."""
        pad, bos, mask = self.cfg.pad, self.cfg.bos, self.cfg.mask
        text, code = join(pad, bos, descriptions, *[mask] * self.cfg.k), join(pad, bos, regexes)
        both, split = torch.cat((text, code), dim=1), text.size(1)                                      # (B, T)
        positions, second = torch.cat((places(text), places(code))), places(both) >= split              # (T,)
        sees = (second[:, None] == second) & (positions[:, None] >= positions)                          # (T, T)
        states, rows = self(both, positions, sees), torch.arange(len(both), device=both.device)         # (B, T, C)
        z_text = states[rows, (text != pad).sum(1) - 1]                                                 # (B, C)
        z_code = states[rows, (code != pad).sum(1) - 1 + split]
        return self.mlp(z_text).float(), z_code.float()

    def latent_loss(self, descriptions, regexes):
        """d(g(z_text), z_code)."""
        guess, target = self.views(descriptions, regexes)
        target = target.detach() if self.cfg.stop_gradient else target
        if self.cfg.distance == "cosine":
            return 1 - F.cosine_similarity(guess, target).mean()
        every = torch.ones(len(guess), dtype=torch.bool, device=guess.device)
        return tjepa.latent_distance(guess, target, every, self.cfg.distance)

    def loss(self, descriptions, regexes, progress):
        """CE + lambda * d. descriptions (B, T), regexes (B, R) -> (loss, stats)."""
        token, latent = self.token_loss(descriptions, regexes, progress), self.cfg.latent
        if not latent or torch.rand(()) < self.cfg.latent_drop:     # then the views are not read: half the work
            return token, dict(token=token.detach())
        distance = self.latent_loss(descriptions, regexes)
        return token + latent * distance, dict(token=token.detach(), latent=distance.detach())

    @torch.no_grad()
    def generate(self, descriptions):
        """Greedy, until EOS or answer_size: descriptions (B, T), without padding -> ids (B, R), PAD after EOS."""
        cfg = self.cfg
        tokens = join(cfg.pad, cfg.bos, descriptions, SEP)
        positions, ended = places(tokens), tokens[:, 0] == cfg.eos                                      # (T,), (B,)
        caches, said = [({}, {}) for _ in self.blocks], []
        while len(said) < cfg.answer_size and not ended.all():
            token = self.say(self(tokens, positions, caches=caches)[:, -1]).argmax(-1).masked_fill(ended, cfg.pad)
            said, ended = said + [token], ended | (token == cfg.eos)
            tokens, positions = token[:, None], positions[-1:] + 1
        return torch.stack(said, dim=1)

class EncoderDecoder(nn.Module):
    """T-JEPA's encoder and decoder, trained together by cross-entropy: the decoder reads the latents of all tokens."""
    init_weights, speak, trained_in = tjepa.TJEPA.init_weights, tjepa.TJEPA.speak, GPT.trained_in

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.encoder, self.decoder = cfg, tjepa.Encoder(cfg), tjepa.Decoder(cfg)
        self.apply(self.init_weights)

    def read(self, descriptions):
        """(B, T) -> what the decoder attends to."""
        real = descriptions != self.cfg.pad
        return tjepa.Thought(None, self.encoder(descriptions, places(descriptions), real[:, None, None]), real)

    def loss(self, descriptions, regexes, progress):
        """Cross-entropy of the regex and its EOS -> (loss, stats)."""
        cfg, memory = self.cfg, self.decoder.memory(self.read(descriptions))
        words = join(cfg.pad, regexes, cfg.eos)                                                         # (B, R)
        states = self.decoder(F.pad(words[:, :-1], (1, 0), value=cfg.bos), *memory)                     # (B, R, C)
        logits = self.decoder.token_head(states).float().flatten(0, 1)
        token = F.cross_entropy(logits, words.flatten(), ignore_index=cfg.pad)
        return token, dict(token=token.detach())

    def generate(self, descriptions):
        """As `GPT.generate`."""
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

def write(run, tokenizer, descriptions):
    """What run.model writes for each of n descriptions: n strings. Equally long ones go together: nothing is padded."""
    ids, said = tokenizer.encode_batch([" " + text for text in descriptions]), [""] * len(descriptions)
    for length in {len(row) for row in ids}:
        which = [i for i, row in enumerate(ids) if len(row) == length]
        with run.autocast():
            rows = run.model.generate(torch.tensor([ids[i] for i in which], device=run.device))
        for i, row in zip(which, rows.tolist()):
            said[i] = tokenizer.decode(row)
    return said

# -- an arm ------------------------------------------------------------------------------------------------------------
def learn_tokens(cfg, taught):
    """Train one of the models above -> (model, descriptions -> what it writes, pairs -> their two latents)."""
    device, dtype = train.pick_device(cfg)
    tokenizer = vocabulary(taught)
    descriptions, regexes = (ids.to(device) for ids in pack(tokenizer, taught, cfg))
    torch.manual_seed(cfg.seed)
    kind = GPT if cfg.model == "gpt" else EncoderDecoder
    model = kind(dataclasses.replace(cfg, vocab_size=tokenizer.vocab_size)).to(device)
    run = train.Run(cfg, model, None, device, dtype)

    def loss_at(progress):
        """Of a batch, which is drawn first: all arms of a seed see the same ones."""
        which = torch.randint(len(taught), (cfg.qa_batch_size // cfg.accum,))
        return model.loss(join(model.cfg.pad, descriptions[which]), regexes[which], progress)
    train.fit(run, "speak", loss_at, lambda whole: {}, evaluate.Log(cfg.out, []), lambda step, optimizer: None)

    def latents(pairs):
        """g(z_text) and z_code of n pairs: (n, C) each."""
        return model.views(*(ids.to(device) for ids in pack(tokenizer, pairs, cfg)))
    return model, lambda texts: write(run, tokenizer, texts), latents if cfg.model == "gpt" else None

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
    def latents(pairs):
        """The thoughts, and the latents that they should be: (n, C) each."""
        regexes = model.concept(ids([" " + regex for _, regex in pairs]))
        return evaluate.think_all(run, ids([text for text, _ in pairs])).latent, train.standardise(model, regexes)
    return model, write, latents

def learn_table(cfg, taught):
    """The same for no model at all."""
    guess = majority(taught)
    return nn.Identity(), lambda texts: [guess(text) for text in texts], None

def measure(cfg):
    """Train an arm and judge it on the test pairs: a dict of figures. said.json keeps what it wrote."""
    known, test = read(f"{cfg.pairs}_train"), read(f"{cfg.pairs}_test")[:cfg.tests]
    taught, held = draw(known, cfg.size, cfg.seed)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    model, write, latents = {"t-jepa": learn_t_jepa, "table": learn_table}.get(cfg.model, learn_tokens)(cfg, taught)
    figures = dict(minutes=(time.perf_counter() - started) / 60)
    figures["million"] = sum(p.numel() for name, p in model.named_parameters() if "target" not in name) / 1e6
    said = write([text for text, _ in test])
    (Path(cfg.out) / "said.json").write_text(json.dumps(said))
    figures |= score(said, test, leaked(known, test))       # leaks of the whole file: one test set for every size
    if held := held[:cfg.tests]:
        figures["dev"] = score(write([text for text, _ in held]), held, [False] * len(held))["exact"]
    with torch.no_grad():
        return figures | (alike(*latents(test), [regex for _, regex in test]) if latents else {})

# -- the arms ----------------------------------------------------------------------------------------------------------
STEPS = {250: 400, 1000: 600, 8000: 1200}
BEST, NO_EOS = dict(latent=1.0, k=1), dict(eos_in_loss=0.0)     # lambda and k: to be the best of MAP by dev
CASES = {"": {}, " latent": BEST, " no-EOS": NO_EOS, " latent no-EOS": BEST | NO_EOS, " table": dict(model="table")}

def arm(size, **change):
    """An arm with the steps of its size."""
    return Config(**dict(size=size, speak_steps=STEPS[size]) | change)

SQUARE = {f"{size}{case}": arm(size, **how) for size in STEPS for case, how in CASES.items()}
SQUARE |= {f"1000{case} EOS-at-first": arm(1000, eos_in_loss=0.5, **CASES[case]) for case in ("", " latent")}
MAP = {f"lambda={latent:g} k={k}": arm(1000, latent=latent, k=k) for latent in (0.5, 1.0, 2.0) for k in (0, 1, 3)}
WAYS = {name: arm(1000, **BEST | change) for name, change in {
    "mse": dict(distance="mse"), "infonce": dict(distance="infonce"), "stop-gradient": dict(stop_gradient=True),
    "MLP": dict(k=0, mlp=True), "drop=.5": dict(latent=2 * BEST["latent"], latent_drop=0.5),
    # two views have the tokens of the packed row, at k = 1 exactly: the latent term doubles the work of a step
    "twice the steps": dict(latent=0.0, k=0, speak_steps=2 * STEPS[1000])}.items()}
OTHERS = {f"turk{case}": arm(8000, pairs="turk", **CASES[case]) for case in ("", " latent", " table")}
OTHERS |= {f"{size} encoder-decoder": arm(size, model="encoder-decoder", memory="tokens", n_layer=2, dec_layer=2,
                                          n_embd=144, top_k=1) for size in (1000, 8000)}
OTHERS |= {f"8000 t-jepa {memory}": arm(8000, model="t-jepa", memory=memory, n_embd=104, block_size=64, vocab_size=512,
    stop_gradient=True, qa_batch_size=128, speak_lr=1e-3, weight_decay=0.05, distill_steps=1000)
    for memory in ("thought", "both")}

ANSWERS = {"exact match": "exact", "prefix match": "prefix", "over-generation": "over", "same length": "same_length",
           "other": "other", "dev": "dev", "leaked": "exact_leaked", "minutes": "minutes", "million weights": "million"}
LATENTS = {"cosine of pairs": "paired", "of others": "unpaired", "R@1": "r1", "chance": "r1_chance",
           "rank of text": "rank_text", "of code": "rank_code"}
TABLES = {"By size; leaked: test descriptions that occur in the training file, counted nowhere else": (SQUARE, ANSWERS),
          "Their latents": (SQUARE, LATENTS), "1,000 pairs: lambda and k": (MAP, ANSWERS | LATENTS),
          "1,000 pairs: distances, predictors, controls": (WAYS, ANSWERS | LATENTS),
          "8,000 pairs: descriptions by people, and other models": (OTHERS, ANSWERS | LATENTS)}
ARMS = SQUARE | MAP | WAYS | OTHERS

def draw_square(rows, path):
    """Exact and prefix match by number of pairs, mean and standard deviation over the seeds."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, title) in zip(axes, dict(exact="exact match", prefix="prefix match: exact, or too long").items()):
        for i, case in enumerate(CASES):
            at = {size * 1.03 ** i: [row[name] for row in rows if row["arm"] == f"{size}{case}"] for size in STEPS}
            x, y = list(filter(at.get, at)), list(filter(None, at.values()))
            axis.errorbar(x, list(map(statistics.mean, y)), [statistics.stdev(v) if v[1:] else 0 for v in y], capsize=3,
                          fmt="--o" if "no-EOS" in case else "-o", label=case.strip() or "cross-entropy")
        axis.set(title=title, xscale="log", xlabel="training pairs", ylim=(-0.02, 1))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)

def llm_jepa(flags):
    """Run the arms, write the tables and the figure."""
    arms = ARMS
    if flags.fast:
        flags = dataclasses.replace(flags, seeds=1)
        few = dict(n_embd=32, n_layer=1, top_k=1, dec_layer=1, pred_layer=1, pred_embd=16, size=60, tests=20,
                   batch_size=8, qa_batch_size=8, pretrain_steps=2, distill_steps=2, speak_steps=2)
        arms = {name: dataclasses.replace(cfg, **few) for name, cfg in ARMS.items()}
    rows = run_arms("llm_jepa", arms, flags, measure)
    draw_square(rows, path := Path(flags.out) / f"llm_jepa{'-fast' * flags.fast}.png")
    text = "\n\n".join(f"{title}:\n\n{table(rows, part, columns)}" for title, (part, columns) in TABLES.items())
    publish("llm_jepa", rows, text, flags.table)
    print(f"figure: {path}")


if __name__ == "__main__":
    main(llm_jepa)
