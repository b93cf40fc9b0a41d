"""
Why does energy lag behind words? Ways to close the gap of the cloze after 7M tokens of the facts world.

    python -m labs.pretraining --budget=7M --world=facts --arms="default,masked LM"        the controls, three seeds
    python -m labs.cloze --seeds=1 --jobs=2                                               every way once
    python -m labs.cloze --arms="two masks,masked LM of two masks" --jobs=2               three seeds of what helped
    python -m labs.cloze --fast                                                           does it run?

After 7M tokens a masked LM gives .975 of the held-out statements their own answer, train.py's default .908 by lowest
energy, although its own words know .989 (`labs/pretraining.py`). Each arm here is that default with what its name says
changed, at its tokens, batches, steps and learning rate (2e-3: tuned for the default and, alone, for the masked LM, not
for each arm); where a step computes more, the arm's comment says so.

Among answers of equal length the default has .981: most of its errors are between different lengths. So two more ways
of asking are tried, which agree with the energy where lengths do:
    by angle     a loss like InfoNCE looks at the angle between guess and target alone, never at how long a guess is
    calibrated   in units of the energy that is usual for a gap of as many tokens, in the text that was read
Both were thought of when seed 0 was known, of InfoNCE and of the default; so a second table has the other seeds alone.
The statements are the same 120 in all seeds: one of them is .008, and what suits them by chance suits every seed.
"By words" is the mean log-probability, of a T-JEPA's token output; the masked LM's own cloze is that.

Expected before the first run: fewer tokens masked helps most, because the cloze hides one answer and phase 1 a third of
a text; then less SIGReg towards the end, for it blurs; targets of single tokens, of lower layers and InfoNCE hurt.
Fixed blocks, the wider predictor, VICReg and the masked LM of two masks came later, without an expectation.
"""
import collections
import dataclasses
import math
from pathlib import Path

import torch
from torch.nn import functional as F

import data
import evaluate
import tjepa
import train
from labs import pretraining
from labs.arms import main, results, run_arms
from labs.controls import MASKED_LM
from labs.tables import by_seed, publish, table

# arms of labs.pretraining, and their names here
CONTROLS = {f"facts 7M {arm}": f"{arm}, of labs.pretraining" for arm in ("masked LM", "default")}


@dataclasses.dataclass
class Config(pretraining.Config):
    """An arm: a run of phase 1, and what of it is no flag of train.py."""
    ends: dict = dataclasses.field(default_factory=dict)    # fields that move on a line, and what they are at the end
    targets: str = "span"       # kinds of target; of several, joined by +, a step takes the mean loss
    lower: int = 0              # the target is made of the first so many layers, 0: of the last top_k
    block: int = 0              # what is removed are blocks of so many tokens, cut without a look at words; 0: spans
    whole: bool = False         # a word is in the block in which it begins, all of it

DEFAULT = Config(phase="pretrain", eval_every=10 ** 9, pretrain_steps=pretraining.BUDGETS["7M"], pretrain_lr=2e-3,
                 read="4")
CHANGES = {
    "default": {},
    "a fifth masked": dict(mask_ratio=0.2),                     # the online encoder reads a quarter more
    "SIGReg 0.1": dict(sigreg=0.1),
    "SIGReg to 0": dict(ends=dict(sigreg=0.0)),
    "VICReg to 0": dict(sigreg=0.0, vicreg=1.0, ends=dict(vicreg=0.0)),
    "a quarter of the masked LM": dict(mlm=0.25),
    "half-life 25 to 400": dict(ema_half_life=25, ends=dict(ema_half_life=400)),
    "4-layer predictor": dict(pred_layer=4),                    # twice the predictor
    "wider predictor": dict(pred_embd=256),                     # 3.8 times its weights
    "lower layers": dict(lower=2, top_k=2),                     # of two layers, not of four
    "span and token targets": dict(targets="span+token"),       # twice the computation
    "two masks": dict(masks=2),                                 # twice the computation, and so
    "masked LM of two masks": MASKED_LM | dict(masks=2),        # its control: a masked LM that does the same
    "InfoNCE": dict(loss="infonce"),
    "spans up to 16": dict(max_span=16),
    "fixed blocks": dict(block=3),                              # 2.8 tokens in the mean (the last is cut), spans 3.2
    "fixed blocks of whole words": dict(block=3, whole=True),
}
ARMS = {name: dataclasses.replace(DEFAULT, **change) for name, change in CHANGES.items()}
COLUMNS = {"cloze": "cloze_all", "by angle": "angle_all", "calibrated": "calibrated_all",
           "by words": "cloze_tokens_all", "same length": "cloze_same", "relation": "relation",
           "continent": "continent", "kind": "kind", "mean of the probes": "probes"}


SEED_0, OTHERS = ", seed 0", ", other seeds"        # arms whose names end so are means of these seeds alone

class Angle:
    """A T-JEPA that is asked by the angle between its guess and the target: how long a guess is does not count."""
    def __init__(self, model):
        self.cfg, self.model = model.cfg, model

    @torch.no_grad()
    def energy(self, tokens, spans):
        """1 - cosine, mean over the spans: tokens, spans (B, T) -> (B,)."""
        p = self.model.predict(tokens, spans, int((spans < self.cfg.max_spans).sum(1).max()))
        return tjepa.masked_mean(1 - F.cosine_similarity(p.spans, p.target, dim=-1), p.weight, 1)

class Calibrated:
    """A T-JEPA whose energies are told in units of what is usual for a gap of as many tokens, in the text that it read:
    the latent of one token is missed by more than the mean of five, and so short answers lose to long ones."""
    def __init__(self, run):
        self.cfg, self.model, self.unit = run.model.cfg, run.model, {}
        torch.manual_seed(0)
        self.text = run.corpus.train.batch(512).to(run.device)                                          # (B, T)

    def usual(self, n):
        """Mean energy of what really stands in a gap of n tokens, whole words, one drawn in each text that has one."""
        tokens, pad, T = self.text, self.cfg.pad, self.text.size(1)
        begins = F.pad(self.model.word_start[tokens] | (tokens == pad), (0, 1), value=True)             # (B, T+1)
        fits = begins[:, :T + 1 - n] & begins[:, n:] & (tokens != pad)[:, n - 1:]                       # (B, T+1-n)
        if not fits.any():
            raise ValueError(f"no text has a gap of {n} tokens: energies of so long an answer cannot be calibrated")
        tokens, fits = tokens[fits.any(1)], fits[fits.any(1)]                                           # (b, T)
        torch.manual_seed(n)
        start, t = fits.float().multinomial(1), torch.arange(T, device=tokens.device)                   # (b, 1), (T,)
        spans = torch.where((t >= start) & (t < start + n), 0, self.cfg.max_spans)                      # (b, T)
        return self.model.energy(tokens, spans).mean().item()

    @torch.no_grad()
    def energy(self, tokens, spans):
        """As `TJEPA.energy`: tokens, spans (B, T) -> (B,), 1 where the words fit as well as usual."""
        lengths = (spans < self.cfg.max_spans).sum(1).tolist()
        for n in {*lengths} - {*self.unit}:
            self.unit[n] = self.usual(n)
        return self.model.energy(tokens, spans) / torch.tensor([self.unit[n] for n in lengths], device=tokens.device)

def lower_target(model, n):
    """Let the target be what the first n layers make of a text: the others are taken out while it is encoded."""
    encode, whole = model.encode, model.target.blocks
    def encode_lower(tokens, online=False):
        """As `TJEPA.encode`."""
        model.target.blocks = whole[:n]
        try:
            return encode(tokens, online)
        finally:
            model.target.blocks = whole
    model.encode = encode_lower

def sample_blocks(tokens, size, word_start, cfg):
    """As `tjepa.sample_spans`, tokens (B, T) -> the block of each removed token, (B, T). Texts are cut into blocks of
    size tokens, which begin with the next token that word_start (vocab_size,) marks; as many tokens are removed, so
    that of the last block some may stay."""
    (B, T), t, real = tokens.shape, torch.arange(tokens.size(1), device=tokens.device), tokens != cfg.pad   # (B, T)
    chance = torch.rand(B, math.ceil(T / size), device=tokens.device).masked_fill(~real[:, ::size], torch.inf)
    first = torch.where(word_start[tokens] | (t == 0), t, 0).cummax(1).values           # (B, T) where t's word begins
    block = chance.argsort(1).argsort(1).gather(1, first // size)                       # (B, T) those first in line go
    turn = (block * T + t).masked_fill(~real, T * T).argsort(1).argsort(1)              # (B, T) as in sample_spans
    removed = (turn < (real.sum(1, keepdim=True).double() * cfg.mask_ratio).round().clamp(min=1)) & real
    return torch.where(removed, block.clamp(max=cfg.max_spans - 1), cfg.max_spans)

def changed(run):
    """loss_at(progress) of an arm, for `train.fit`: that of `train.pretrain`, with the arm's changes."""
    cfg, model = run.cfg, run.model
    starts, ends, targets = {name: getattr(cfg, name) for name in cfg.ends}, cfg.ends, cfg.targets.split("+")
    def loss_at(progress):
        """Rows of text, drawn anew; the mean loss over targets and masks."""
        for name, end in ends.items():
            for config in cfg, model.cfg:       # `train.fit` asks the run's for tau, the losses ask the model's
                setattr(config, name, starts[name] + progress * (end - starts[name]))
        tokens = run.corpus.train.batch(cfg.batch_size).to(run.device)
        parts = []
        for _ in range(cfg.masks):
            spans = (sample_blocks(tokens, cfg.block, model.word_start | (not cfg.whole), model.cfg) if cfg.block
                     else tjepa.sample_spans(tokens, model.word_start, model.cfg))
            for target in targets:
                model.cfg.target = target
                parts.append(model.pretrain_loss(tokens, spans))
        model.cfg.target = targets[0]
        losses, stats = zip(*parts)
        means = {name: sum(each[name] for each in stats) / len(parts) for name in stats[0]}
        return sum(losses) / len(parts), means | dict(tau=cfg.tau)
    return loss_at

def measure(cfg):
    """Train an arm and judge it: a dict of figures."""
    cfg = dataclasses.replace(cfg)      # `ends` moves its fields
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    run, _ = pretraining.open_arm(cfg)
    if cfg.lower:
        lower_target(run.model, cfg.lower)
    train.fit(run, "pretrain", changed(run), lambda whole: {}, evaluate.Log(cfg.out, []), lambda step, optimizer: None)
    return judge(run)

def judge(run):
    """The figures of a run as it stands: those of labs/pretraining.py, and the cloze asked in two more ways."""
    found = pretraining.judge(run, pretraining.probes_of(run))
    if run.cfg.loss == "none":
        return without_sums(found)      # a masked LM has no energy
    return found | {
        f"{name}_{figure}": value for name, model in dict(angle=Angle(run.model), calibrated=Calibrated(run)).items()
        for figure, value in pretraining.cloze(run._replace(model=model)).items()}

def without_sums(row):
    """Figures of a masked LM, which is asked by words already: its other cloze, by sums, is left out."""
    return {name: value for name, value in row.items() if "tokens" not in name}

def beside(rows):
    """Rows of labs/pretraining.py that are controls here, under their names here."""
    return [(without_sums(row) if "masked" in row["arm"] else row) | dict(arm=CONTROLS[row["arm"]])
            for row in rows if row["arm"] in CONTROLS]

def means_of(rows, part):
    """Rows that an older table had of a part of the seeds, under the names of their arms."""
    names = {f"{name}{part}": name for name in (*CONTROLS.values(), *ARMS)}
    means = [row for row in rows if row["seed"] is None and row["arm"] in names]
    if not part:        # arms of one seed stand there too
        means = [row for row in means if row["cloze_all"].seeds > 2]
    return [row | dict(arm=names[row["arm"]]) for row in means]

def tables(rows):
    """All tables as markdown: seed 0 of all arms, by which ways were picked, the seeds that nothing was picked by, and
    all seeds together, of arms that have three."""
    names, known = [*CONTROLS.values(), *ARMS], by_seed(rows)
    seeds = collections.Counter(row["arm"] for row in known)
    titled = {"Seed 0": [row for row in known if row["seed"] == 0] + means_of(rows, SEED_0),
              "Other seeds, by which nothing was picked":
              [row for row in known if row["seed"] > 0] + means_of(rows, OTHERS),
              "All seeds, of arms that have three":
              [row for row in known if seeds[row["arm"]] > 2] + means_of(rows, "")}
    return "\n\n".join(f"{title}:\n\n{table(some, names, COLUMNS)}" for title, some in titled.items() if some)

def cloze(flags):
    """Run the arms and write the tables."""
    arms = ARMS
    if flags.fast:
        flags = dataclasses.replace(flags, seeds=1)
        arms = {name: dataclasses.replace(cfg, pretrain_steps=2, n_embd=32, pred_embd=16, batch_size=8, stride=25)
                for name, cfg in ARMS.items()}
    data.load(DEFAULT)      # writes the facts, if they are not there yet: arms side by side would write them at once
    controls = beside(results("pretraining", flags))
    if not controls:
        print(f"{flags.results} has no controls: run `python -m labs.pretraining --budget=7M --world=facts "
              "--arms=\"default,masked LM\"` for them")
    rows = controls + run_arms("cloze", arms, flags, measure)
    publish("cloze", rows, tables(rows), flags.table)


if __name__ == "__main__":
    main(cloze)
