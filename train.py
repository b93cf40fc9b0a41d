"""
Train a T-JEPA: flags -> corpus -> phases -> one training loop -> checkpoint, metrics.csv, curves.png.

    python train.py                                                   all three phases on the shipped facts
    python train.py --phase=pretrain --data=my_book.txt --out=out/book      your own text
    python train.py --phase=distill --qa=my_qa.tsv --out=out/book           teach it your own answers, in latent space
    python train.py --phase=speak --out=out/book                            let it speak
    python train.py --help                                            every flag, and what moves if it moves
"""
import argparse
import copy
import csv
import dataclasses
import difflib
import inspect
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import tjepa

PHASES = ("pretrain", "distill", "speak")
FORMAT = 1                      # of the checkpoint; raised when an older program could not read a newer file


@dataclasses.dataclass
class Config(tjepa.Config):
    """tjepa.Config shapes the model and its losses; these fields shape a run."""
    phase: str = "all"          # pretrain | distill | speak | all; distill and speak continue the run in --out
    preset: str = "tiny"        # tiny: 300 facts, minutes on a CPU | laptop: all facts | gpu: all facts, wider, longer
    recipe: str = "default"     # default: what our measurements favour | paper: v1.1 section 3.1 to the letter
    out: str = "out/tjepa"      # folder of the run: ckpt.pt, metrics.csv, curves.png, config.json
    data: str = "facts"         # facts, or the path of a UTF-8 .txt of your own (phase 1 needs nothing else)
    facts: str = "tiny"         # which part of the shipped facts: tiny | all
    qa: str = ""                # your own questions for phases 2 and 3: a file of lines: question, tab, answer
    tokenizer: str = "bpe"      # bpe: trained on the corpus | gpt2: 50k tokens, needs a download once
    teacher: str = "self"       # who says what an answer's latent is: self = the target encoder | a .npz of vectors
    seed: int = 0               # everything random follows from it: the batch of step k is a function of (seed, k)
    device: str = "auto"        # auto | cuda | mps | cpu
    dtype: str = "auto"         # auto | fp32 | bf16: bf16 autocast where the hardware gains from it
    compile: bool = False       # torch.compile: minutes of waiting first, then faster steps on a GPU
    resume: bool = False        # go on where the run in --out stopped; ends bit-identical to an uninterrupted run
    batch_size: int = 48        # rows of text a step in phase 1: steadier steps, linearly more time
    qa_batch_size: int = 128    # questions a step in phases 2 and 3
    accum: int = 1              # split each batch into this many parts, if memory is short
    pretrain_steps: int = 1000  # steps of phase 1; 0 leaves the encoder at its random initialisation, the control
    distill_steps: int = 500    # steps of phase 2; 0 teaches nothing, the control
    speak_steps: int = 800      # steps of phase 3
    pretrain_lr: float = 2e-3   # peak learning rate of phase 1
    distill_lr: float = 5e-4    # of phase 2: gentler, or it forgets what it read
    speak_lr: float = 1e-3      # of phase 3
    warmup: float = 0.05        # share of the steps over which the learning rate rises, before its cosine to a tenth
    weight_decay: float = 0.05  # on matrices; never on norms, biases, embeddings or the query vector
    clip: float = 1.0           # largest norm of a gradient
    alpha_start: float = 0.5    # weight of the latent loss in phase 3, cosine to 0; 0 is v2.0's single objective
    echo: float = 0.5           # share of phase 3's batch that is latent -> text of plain text, no question involved
    eval_every: int = 200       # steps between evaluations, checkpoints and redrawn curves

    def __post_init__(self):
        super().__post_init__()
        choices = dict(phase=(*PHASES, "all"), preset=tuple(PRESETS), recipe=tuple(RECIPES), facts=("tiny", "all"),
                       tokenizer=("bpe", "gpt2"), device=("auto", "cuda", "mps", "cpu"), dtype=("auto", "fp32", "bf16"))
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name}={getattr(self, name)} must be one of {', '.join(allowed)}")
        for name in ("batch_size", "qa_batch_size", "accum", "eval_every", "pretrain_lr", "distill_lr", "speak_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}={getattr(self, name)} must be above 0")
        for name in ("pretrain_steps", "distill_steps", "speak_steps", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name}={getattr(self, name)} must not be negative")
        for name in ("warmup", "alpha_start", "echo"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 0 and below 1")


PRESETS = dict(
    tiny={},
    laptop=dict(facts="all", n_embd=192, n_head=6, pred_embd=96, vocab_size=4096, batch_size=64,
                pretrain_steps=3000, distill_steps=2000, speak_steps=2500, ema_half_life=400),
    gpu=dict(facts="all", n_embd=384, n_head=6, n_layer=6, pred_embd=192, vocab_size=4096, batch_size=256,
             pretrain_steps=10000, distill_steps=4000, speak_steps=4000, ema_half_life=1000))
RECIPES = dict(default={}, paper=dict(target="span", top_k=1, target_norm=False, loss="mse", sigreg=0.0, vicreg=0.0, mlm=0.0))
# what a run may not change once phase 1 has begun
FIXED = ("data", "facts", "tokenizer", "block_size", "n_layer", "n_head", "n_embd", "pred_layer", "pred_embd", "top_k")

# ----------------------------------------------------------------------------------------------------------------------
# flags

def read_flags(kind, argv, prog):
    """Flags of a dataclass: --name=value for each field, with the field's comment as its help. Returns those given."""
    def typed(field):
        if field.type is not bool:
            return field.type
        def boolean(text):
            if text.lower() not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
            return text.lower() == "true"
        return boolean

    notes = {}
    for base in reversed(kind.__mro__[:-1]):
        notes.update(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(base), re.MULTILINE))
    parser = argparse.ArgumentParser(prog=prog, description=sys.modules[kind.__module__].__doc__, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(kind):
        optional = dict(nargs="?", const=True) if field.type is bool else {}
        parser.add_argument(f"--{field.name}", type=typed(field), metavar="", **optional,
                            help=f"{notes[field.name]} [{field.default}]".replace("%", "%%"))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), vars(given) | notes, 1, 0)
        parser.error(f"unknown flag {unknown[0]}; did you mean --{near[0]}?")
    return vars(given)

def resolve(given):
    """The Config of a command line: defaults < preset < recipe < the run that is continued < what was given."""
    base = {**PRESETS.get(given.get("preset", "tiny"), {}), **RECIPES.get(given.get("recipe", "default"), {})}
    if given.get("resume") or given.get("phase") in ("distill", "speak"):
        saved = load_checkpoint(given.get("out", Config.out))["config"]
        for name in FIXED:
            if name in given and given[name] != saved[name]:
                raise ValueError(f"--{name}={given[name]}, but the run in --out={given.get('out', Config.out)} has "
                                 f"{name}={saved[name]}: leave the flag out, or start another run with another --out")
        base = {**saved, "resume": False}
        base.pop("phase" if not given.get("resume") else None, None)
    return Config(**{**base, **given})

def pick_device(cfg):
    """(device, autocast dtype or None), and a line that says why."""
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if cfg.device != "auto" and not has[cfg.device]:
        raise ValueError(f"--device={cfg.device}: this machine has none that torch can use; take --device=auto or cpu")
    device = next(name for name in has if has[name]) if cfg.device == "auto" else cfg.device
    fast = dict(cuda=has["cuda"] and torch.cuda.is_bf16_supported(), mps=False,
                cpu=cfg.n_embd >= 256 and torch.cpu._is_amx_tile_supported())[device]
    bf16 = fast if cfg.dtype == "auto" else cfg.dtype == "bf16"
    why = {"cuda": "a GPU is there", "mps": "an Apple GPU is there", "cpu": "no GPU is there"}[device]
    print(f"device {device} ({why if cfg.device == 'auto' else 'as asked'}), "
          f"{'bf16 autocast' if bf16 else 'fp32'} ({'faster here at this width' if fast else 'no gain from bf16 here'}"
          f"{'' if cfg.dtype == 'auto' else ', as asked'})")
    return device, torch.bfloat16 if bf16 else None

# ----------------------------------------------------------------------------------------------------------------------
# checkpoints

def save_checkpoint(out, checkpoint):
    """Write to a temporary name, flush to the disk, rename: whatever happens, one whole checkpoint is there."""
    path = Path(out) / "ckpt.pt"
    with open(path.with_suffix(".part"), "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".part").replace(path)

def load_checkpoint(out):
    """The dict in out/ckpt.pt; ValueError says what is wrong with the file. Never runs code from it."""
    path = Path(out) / "ckpt.pt"
    if not path.exists():
        raise ValueError(f"no checkpoint in --out={out}: run `python train.py --phase=pretrain --out={out}` first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of this program ({type(error).__name__}): "
                         "restore it from a copy, or train again with another --out") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format", FORMAT + 1) > FORMAT:
        raise ValueError(f"{path} was written by a newer version (or by another program): update this one")
    return checkpoint

class Run(NamedTuple):
    """What a run is made of, besides the weights that change: passed to everything below."""
    cfg: Config
    model: tjepa.TJEPA
    corpus: data.Corpus
    device: str
    dtype: torch.dtype | None

    def autocast(self):
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None)


def build(cfg, tokenizer, weights=None, fresh=()):
    """A model for cfg; with weights of a checkpoint, those, but for the parts whose names begin with one of fresh."""
    torch.manual_seed(cfg.seed)
    model = tjepa.TJEPA(dataclasses.replace(cfg, vocab_size=tokenizer.vocab_size), tokenizer.word_start)
    if weights:
        kept = {name: value for name, value in weights.items() if not name.startswith(tuple(fresh))}
        missing, extra = model.load_state_dict(kept, strict=False)
        if extra or any(not name.startswith(tuple(fresh)) for name in missing):
            raise ValueError(f"the checkpoint in --out={cfg.out} holds another model: take another --out")
    return model
# ----------------------------------------------------------------------------------------------------------------------
# questions and answers as tensors

class Questions:
    """The corpus's questions: tokens, which answer belongs to which, and who is asked in which evaluation."""

    def __init__(self, run):
        corpus, cfg, tokenizer = run.corpus, run.cfg, run.corpus.tokenizer
        self.rows = corpus.qa
        self.answers = sorted({row.answer for row in self.rows if row.split != "NEVER"})
        number = {answer: i for i, answer in enumerate(self.answers)}
        self.tokens = data.pack(tokenizer, [row.question for row in self.rows], max_width=cfg.block_size,
                                flag="--block_size").to(run.device)                                     # (N, T)
        # a leading space, so that an answer is cut into the same tokens as inside a sentence
        spoken = [" " + answer for answer in self.answers]
        self.answer_tokens = data.pack(tokenizer, spoken, end=True, max_width=cfg.answer_size,
                                       flag="--answer_size").to(run.device)                             # (A, L)
        self.bare_tokens = data.pack(tokenizer, spoken).to(run.device)                                  # (A, L-1) no EOS
        self.answer_of = torch.tensor([number.get(row.answer, -1) for row in self.rows], device=run.device)
        relations = {}
        for row in self.rows:
            if row.split != "NEVER":
                relations.setdefault(row.relation, set()).add(number[row.answer])
        rivals = {name: torch.zeros(len(self.answers), dtype=torch.bool).index_fill(0, torch.tensor(sorted(ids)), True)
                  for name, ids in relations.items()}
        self.rivals = torch.stack([rivals[row.relation] for row in self.rows]).to(run.device)           # (N, A)

    def part(self, phrasing):
        """Only the questions of one phrasing, if there are any: a quick look between two full evaluations."""
        which = self.where("DEC", "LAT", "TXT", "NEVER", phrasing=phrasing)
        if not len(which):
            return self
        part = copy.copy(self)
        part.rows = [self.rows[i] for i in which]
        part.tokens, part.answer_of, part.rivals = self.tokens[which], self.answer_of[which], self.rivals[which]
        return part

    def where(self, *splits, phrasing=None):
        """Numbers of the questions of some splits, (n,)."""
        return torch.tensor([i for i, row in enumerate(self.rows)
                             if row.split in splits and phrasing in (None, row.phrasing)], device=self.tokens.device)


@torch.no_grad()
def think_all(run, tokens, size=1024):
    """The thoughts of many questions, in batches: a `Thought` of n rows; token latents only if the decoder reads them."""
    parts = []
    for some in tokens.split(size):
        with run.autocast():
            thought = run.model.think(some)
        keep = thought.tokens.size(1) if run.cfg.memory != "thought" else 0
        parts.append(tjepa.Thought(thought.latent.float(), thought.tokens[:, :keep].float(), thought.real[:, :keep]))
    return tjepa.Thought(*map(torch.cat, zip(*parts)))

def teach(run, questions):
    """The teacher's latents of all answers, standardised per dimension: the table (A, D) that phase 2 pulls thoughts to."""
    if run.cfg.teacher == "self":
        with torch.no_grad():
            table = run.model.concept(questions.bare_tokens)
    else:
        table = read_vectors(run.cfg.teacher, questions.answers).to(run.device)
    run.model.concept_mean.copy_(table.mean(0))
    run.model.concept_std.copy_(table.std(0).clamp(min=1e-3))
    return standardise(run.model, table)

def standardise(model, latents):
    """Teacher latents (n, D) in the units that thoughts have."""
    return (latents - model.concept_mean) / model.concept_std

def vector_width(path):
    return 0

def read_vectors(path, answers):
    """Vectors of a .npz with `answers` (n strings) and `vectors` (n, D), one for each of our answers: (A, D)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names, vectors = file["answers"].tolist(), file["vectors"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"--teacher={path}: {error}; give a .npz with `answers` (n strings) and `vectors` (n rows of one "
                         "width, numbers)") from None
    if vectors.ndim != 2 or len(names) != len(vectors) or not np.issubdtype(vectors.dtype, np.number):
        raise ValueError(f"--teacher={path}: `vectors` must be {len(names)} rows of one width, not {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise ValueError(f"--teacher={path}: the vector of '{names[np.isnan(vectors).any(1).argmax()]}' is not finite")
    row = {name: i for i, name in enumerate(names)}
    missing = [answer for answer in answers if answer not in row]
    if missing:
        raise ValueError(f"--teacher={path} has no vector for '{missing[0]}' and {len(missing) - 1} other answers: add them")
    return torch.from_numpy(vectors[[row[answer] for answer in answers]]).float()

# ----------------------------------------------------------------------------------------------------------------------
# what is measured: one definition each

@torch.no_grad()
def evaluate_text(run, rows=256):
    """Phase 1 on held-out text: r2, hit1 and its chance, and the collapse panel of the target's token latents."""
    model, cfg = run.model, run.model.cfg
    torch.manual_seed(0)                                                # the same rows and spans at every evaluation
    tokens = run.corpus.val.batch(rows).to(run.device)
    spans = tjepa.sample_spans(tokens, model.word_start, cfg)
    with run.autocast():
        predicted, target, weight, _ = model.predict(tokens, spans)
        latents = model.encode(tokens)
    predicted, target, weight = predicted.flatten(0, 1).float(), target.flatten(0, 1).float(), weight.flatten()
    p, t = predicted[weight][:2000], target[weight][:2000]
    health = tjepa.latent_health(latents.float(), tokens != cfg.pad)
    return dict(val_r2=tjepa.r_squared(predicted, target, weight).item(), chance=1 / len(t),
                hit1=(torch.cdist(p, t).argmin(1) == torch.arange(len(p), device=p.device)).float().mean().item(),
                **health, health=tjepa.health_word(health))

@torch.no_grad()
def cloze(run, relation, size=512):
    """Share of a relation's held-out statements whose own answer has the lowest energy among all the world's values."""
    encode, values, right, asked = run.corpus.tokenizer.encode, run.corpus.values[relation], 0, 0
    for item in (item for item in run.corpus.cloze if item.relation == relation):
        before, after = item.statement.split("{a}")
        ids = [(encode(" " + before.rstrip()) if before else [], encode(" " + value), encode(after)) for value in values]
        width = max(sum(map(len, parts)) for parts in ids) + max(len(parts[1]) for parts in ids)
        tokens = torch.full((len(ids), width), run.model.cfg.pad)
        spans = torch.full_like(tokens, run.model.cfg.max_spans)
        for row, (a, b, c) in enumerate(ids):
            tokens[row, :len(a + b + c)] = torch.tensor(a + b + c)
            spans[row, len(a):len(a + b)] = 0
        with run.autocast():
            energy = torch.cat([run.model.energy(x, s) for x, s in
                                zip(tokens.to(run.device).split(size), spans.to(run.device).split(size))])
        right, asked = right + (values[energy.argmin().item()] == item.answer), asked + 1
    return right / asked

def clozes(run):
    """The cloze of the capitals, where the corpus has them, beside its chance."""
    if "capital" not in run.corpus.values:
        return {}
    return dict(cloze_capital=cloze(run, "capital"), cloze_chance=1 / len(run.corpus.values["capital"]))

def recall(run, questions, table, last=True):
    """R@1 and MRR of the thought among the answers of its relation, by split and phrasing."""
    questions = questions if last else questions.part("heldout")
    thoughts = think_all(run, questions.tokens)
    distance = torch.cdist(thoughts.latent, table).masked_fill(~questions.rivals, torch.inf)              # (N, A)
    own = distance.gather(1, questions.answer_of.clamp(min=0)[:, None])
    rank = 1 + (distance < own).sum(1)
    return by_split(questions, "r1", rank == 1) | by_split(questions, "mrr", 1 / rank) | abstention(questions, thoughts, table)

def by_split(questions, name, score):
    """Means of a score (N,) by split and phrasing: name_DEC, name_DEC_heldout, ..."""
    found = {}
    for split in ("DEC", "LAT", "TXT"):
        for phrasing, tail in ("trained", ""), ("heldout", "_heldout"):
            if len(which := questions.where(split, phrasing=phrasing)):
                found[f"{name}_{split}{tail}"] = score[which].float().mean().item()
    return found

def say(run, thought, size=512):
    """Greedy speech for a `Thought` of n rows: a list of n strings."""
    said = []
    for some in torch.arange(len(thought.latent), device=run.device).split(size):
        with run.autocast():
            ids = torch.stack(list(run.model.speak(tjepa.Thought(*(part[some] for part in thought)))), dim=1)   # (n, L)
        said += [run.corpus.tokenizer.decode(row).strip() for row in ids.tolist()]
    return said

def exact_match(run, questions, thoughts, last=True):
    """EM of greedy speech by split and phrasing, and with each thought replaced by another question's."""
    if not last:
        kept = questions.where("DEC", "LAT", "TXT", "NEVER", phrasing="heldout")
        kept, questions = (kept if len(kept) else slice(None)), questions.part("heldout")
        thoughts = tjepa.Thought(*(part[kept] for part in thoughts))

    def matches(thought):
        said = say(run, thought)
        return torch.tensor([a == row.answer for a, row in zip(said, questions.rows)], device=run.device)
    torch.manual_seed(0)
    shuffle = torch.randperm(len(questions.rows), device=run.device)
    taught = questions.where("DEC", "LAT")
    shuffled = matches(tjepa.Thought(*(part[shuffle] for part in thoughts)))
    return by_split(questions, "em", matches(thoughts)) | dict(em_shuffled=shuffled[taught].float().mean().item())

def abstention(questions, thoughts, table):
    """How far the thought is from the nearest known concept, as a sign of not knowing.

    threshold keeps 95 % of the DEC questions in held-out phrasing; abstain is the share of NEVER questions beyond it;
    auroc is the chance that a NEVER question is farther away than a DEC one.
    """
    distance = torch.cdist(thoughts.latent, table).amin(1)                                          # (N,)
    phrasing = "heldout" if len(questions.where("DEC", phrasing="heldout")) else "trained"
    known = distance[questions.where("DEC", phrasing=phrasing)]
    found = dict(threshold=known.quantile(0.95).item())
    if len(never := questions.where("NEVER", phrasing=phrasing)):
        unknown = distance[never]
        found["abstain"] = (unknown > found["threshold"]).float().mean().item()
        found["auroc"] = (unknown[:, None] > known).float().mean().item()
    return found

# ----------------------------------------------------------------------------------------------------------------------
# the log: metrics.csv, curves.png, the progress bar

class Log:
    """metrics.csv, one row a log step; a resumed run cuts the file back to the rows of its checkpoint and goes on."""

    COLUMNS = ["phase", "step", "tokens", "loss", "latent", "sigreg", "vicreg", "mlm", "token", "r2", "lr", "tau", "alpha",
               "grad", "tok_s", "val_r2", "std", "rank", "bound", "cos", "cos_centred", "pos", "hit1", "chance", "health",
               "cloze_capital", "cloze_chance",
               *(f"{name}_{split}{tail}" for name in ("r1", "mrr", "em") for split in ("DEC", "LAT", "TXT")
                 for tail in ("", "_heldout")), "em_shuffled", "threshold", "abstain", "auroc"]

    def __init__(self, out, rows):
        self.path, self.rows = Path(out) / "metrics.csv", rows
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, row):
        """Append one row to memory and to the file."""
        row = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        self.rows.append(row)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerow(row)

    def last(self):
        """The newest value of each column: what a run returns."""
        return {name: value for row in self.rows for name, value in row.items() if value != ""}

def draw_curves(rows, path):
    """curves.png from the rows of metrics.csv: six panels over steps, the phases one after the other."""
    import matplotlib
    matplotlib.use("Agg")           # imported here: --help should not wait for it
    import matplotlib.pyplot as plt
    ends, offset = {}, 0
    for phase in PHASES:
        ends[phase] = offset
        offset += max((int(row["step"]) for row in rows if row["phase"] == phase), default=0)
    panels = {"loss of each phase (log)": ("latent", "token", "sigreg"), "R2: 0 = knows the average only": ("r2", "val_r2"),
              "std across sequences": ("std",), "rank of the target and its bound": ("rank", "bound"),
              "span hit rate, answer R@1": ("hit1", "chance", "r1_DEC_heldout", "r1_LAT_heldout"),
              "exact match": ("em_DEC", "em_DEC_heldout", "em_LAT", "em_LAT_heldout", "em_TXT_heldout")}
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            at = [(int(row["step"]) + ends[row["phase"]], float(row[name])) for row in rows if row.get(name, "") != ""]
            if at:
                axis.plot(*zip(*at), label=name, marker="." if len(at) < 20 else "", linewidth=1)
        for phase in PHASES[1:]:
            axis.axvline(ends[phase], color="0.8", zorder=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        if axis.get_lines()[len(PHASES) - 1:]:
            axis.legend(fontsize=7)
    axes[0, 0].set_yscale("log")
    axes[0, 1].set_ylim(-0.2, 1)
    figure.savefig(path.with_suffix(".part.png"), dpi=110)
    plt.close(figure)
    path.with_suffix(".part.png").replace(path)

# ----------------------------------------------------------------------------------------------------------------------
# the one training loop

def groups(parts, weight_decay):
    """Parameter groups of AdamW: decay for matrices, none for norms, biases, embeddings and the query vector."""
    named = [(name, p) for part in parts for name, p in part.named_parameters()]
    decay = [p for name, p in named if p.dim() > 1 and "embed" not in name]
    rest = [p for name, p in named if not (p.dim() > 1 and "embed" not in name)]
    return [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]

def fit(run, phase, loss_at, evaluate, log, save, start=0, optimizer_state=None):
    """Train the parts that a phase trains, from step start on. Every phase and every control goes through here.

    loss_at(progress) -> (loss, stats) draws its own batch; evaluate() -> dict of figures;
    save(step, optimizer) writes a checkpoint. Raises ValueError when the loss stops being a number.
    """
    cfg, model = run.cfg, run.model
    steps, peak = getattr(cfg, f"{phase}_steps"), getattr(cfg, f"{phase}_lr")
    tau = 0.5 ** (1 / cfg.ema_half_life) if cfg.ema_half_life else 0.0
    for part in model.children():
        part.requires_grad_(part in model.trained_in(phase))
    optimizer = torch.optim.AdamW(groups(model.trained_in(phase), cfg.weight_decay), lr=peak, betas=(0.9, 0.98), fused=True)
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    per_step = cfg.batch_size * cfg.block_size if phase == "pretrain" else cfg.qa_batch_size
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=phase, dynamic_ncols=True, mininterval=1)
    figures, since, last = {}, time.perf_counter(), start

    def report(row, whole):
        """Log a row; at evaluations also measure, save and draw."""
        nonlocal figures
        if whole:
            figures = evaluate(row["step"] in (0, steps))
        log.write(row | (figures if whole else {}))
        if whole:
            save(row["step"], optimizer)
            draw_curves(log.rows, Path(cfg.out) / "curves.png")

    if not start:
        report(dict(phase=phase, step=0, tokens=0), True)       # what the phase starts from stands beside what it reaches
    for step in bar:
        torch.manual_seed((cfg.seed * len(PHASES) + PHASES.index(phase)) * 10 ** 9 + step)
        lr = peak * min((step + 1) / max(1, round(cfg.warmup * steps)), 0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(cfg.accum):
            with run.autocast():
                loss, stats = loss_at(step / steps)
            (loss / cfg.accum).backward()
        grad = torch.nn.utils.clip_grad_norm_(params, cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        if phase == "pretrain":
            model.ema_update(tau)

        done, stop = step + 1, bool(INTERRUPTED)
        whole = done == steps or done % cfg.eval_every == 0 or stop
        if whole or done % 20 == 0:         # the only place where the loop waits for the device
            if not math.isfinite(loss.item() + grad.item()):
                raise ValueError(f"the loss of {phase} is no longer a number at step {done}: lower --{phase}_lr={peak} or "
                                 f"--clip={cfg.clip}, then --resume from the last checkpoint in --out={cfg.out}")
            speed = (done - last) * per_step / (time.perf_counter() - since)
            row = dict(phase=phase, step=done, tokens=done * per_step, loss=loss.item(), lr=lr, grad=grad.item(), tok_s=speed,
                       **{name: float(torch.as_tensor(value).detach()) for name, value in stats.items()})
            report(row | (dict(tau=tau) if phase == "pretrain" else {}), whole)
            shown = row | figures
            bar.set_postfix({name: f"{shown[name]:.3g}" if isinstance(shown[name], float) else shown[name] for name in
                             ("loss", "r2", "rank", "health", "r1_LAT_heldout", "em_LAT_heldout") if name in shown},
                            refresh=False)
            since, last = time.perf_counter(), done
        if stop:
            raise KeyboardInterrupt

INTERRUPTED = []    # filled by Ctrl-C; the loop looks at it between two steps, so that a step is whole or not at all

# ----------------------------------------------------------------------------------------------------------------------
# the phases: where a batch comes from, and what is measured

def pretrain(run):
    """Phase 1: (loss_at, evaluate)."""
    model, cfg = run.model, run.cfg
    loss_of = torch.compile(model.pretrain_loss) if cfg.compile else model.pretrain_loss

    def loss_at(progress):
        tokens = run.corpus.train.batch(cfg.batch_size // cfg.accum).to(run.device, non_blocking=True)
        return loss_of(tokens, tjepa.sample_spans(tokens, model.word_start, model.cfg))
    return loss_at, lambda last: evaluate_text(run) | (clozes(run) if last else {})

def distill(run, questions, table):
    """Phase 2: (loss_at, evaluate). Facts of DEC and LAT in their trained wordings; no token of an answer is produced."""
    taught = questions.where("DEC", "LAT", phrasing="trained")

    def loss_at(progress):
        which = taught[torch.randint(len(taught), (run.cfg.qa_batch_size // run.cfg.accum,))]
        return run.model.distill_loss(questions.tokens[which], table[questions.answer_of[which]])
    return loss_at, lambda last: recall(run, questions, table, last)

def echoes(run, questions, table, n=4096):
    """Things to say back, half of them answers, half spans of the text: tokens (n', L) and their latents (n', D).

    Spans that hold both the subject and the answer of a LAT or TXT fact are left out: the decoder must not read those facts.
    """
    model, tokenizer = run.model, run.corpus.tokenizer
    heard, latents = [row for row in questions.bare_tokens], table
    if run.cfg.teacher == "self":       # a teacher of fixed vectors knows the answers only
        torch.manual_seed(run.cfg.seed)
        rows = run.corpus.train.batch(n)
        spans = tjepa.sample_spans(rows, model.word_start.cpu(), model.cfg)
        texts = [row[span == 0] for row, span in zip(rows, spans)]
        secret = {(row.subject, row.answer) for row in questions.rows if row.split in ("LAT", "TXT")}
        words = [tokenizer.decode(text.tolist()) for text in texts]
        texts = [text for text, said in zip(texts, words) if len(text) and len(text) < run.cfg.answer_size
                 and not any(subject in said and answer in said for subject, answer in secret)]
        repeat = max(1, len(texts) // len(heard))
        heard, latents = heard * repeat, latents.repeat(repeat, 1)
        spans = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=tokenizer.pad).to(run.device)
        with torch.no_grad():
            latents = torch.cat((latents, *(standardise(model, model.concept(part)) for part in spans.split(1024))))
        heard = heard + list(spans)
    return torch.nn.utils.rnn.pad_sequence(heard, batch_first=True, padding_value=tokenizer.pad), latents

def speak(run, questions, table):
    """Phase 3: (loss_at, evaluate). Facts of DEC in their trained wordings, and echo: latents of plain text and its words.

    The encoder is frozen, so what the decoder reads is computed once, before the loop.
    """
    cfg, tokenizer = run.cfg, run.corpus.tokenizer
    thoughts = think_all(run, questions.tokens)
    asked = questions.where("DEC", phrasing="trained")
    heard, heard_latents = echoes(run, questions, table)
    # one pool, the questions first: what to say, in which words, and the latent that the latent head should find
    width = max(questions.tokens.size(1), heard.size(1))
    read = torch.cat([torch.nn.functional.pad(tokens, (0, width - tokens.size(1)), value=tokenizer.pad)
                      for tokens in (questions.tokens[asked], heard)])
    pool = think_all(run, read)
    latents = torch.cat((table[questions.answer_of[asked]], heard_latents))
    pool = pool._replace(latent=torch.cat((pool.latent[:len(asked)], heard_latents)))
    length = max(questions.bare_tokens.size(1), heard.size(1)) + 1
    words = torch.cat([torch.nn.functional.pad(tokens, (0, length - tokens.size(1)), value=tokenizer.pad)
                       for tokens in (questions.bare_tokens[questions.answer_of[asked]], heard)])
    words = words.scatter(1, (words != tokenizer.pad).sum(1, keepdim=True), tokenizer.eos)      # EOS after each

    def loss_at(progress):
        n = cfg.qa_batch_size // cfg.accum
        n_echo = round(n * cfg.echo)
        which = torch.cat((torch.randint(len(asked), (n - n_echo,)), len(asked) + torch.randint(len(heard), (n_echo,))))
        alpha = cfg.alpha_start * 0.5 * (1 + math.cos(math.pi * progress))
        loss, stats = run.model.speak_loss(tjepa.Thought(*(part[which] for part in pool)), words[which], latents[which], alpha)
        return loss, stats | dict(alpha=alpha)
    return loss_at, lambda last: exact_match(run, questions, thoughts, last)

# ----------------------------------------------------------------------------------------------------------------------
# a run

def run(cfg):
    """Run the phases that cfg names and return the figures of the last rows of metrics.csv, as a dict.

    What the command line calls, and what an experiment calls: an arm is a Config.
    """
    started, out = time.perf_counter(), Path(cfg.out)
    device, dtype = pick_device(cfg)
    checkpoint = load_checkpoint(cfg.out) if cfg.resume or cfg.phase in PHASES[1:] else {}
    tokenizer = data.Tokenizer.from_state(checkpoint["tokenizer"]) if checkpoint else None
    corpus = data.load(cfg, tokenizer)
    phases = list(PHASES) if cfg.phase == "all" else [cfg.phase]
    if checkpoint and checkpoint["corpus"] != corpus.fingerprint:
        raise ValueError(f"--data={cfg.data} is not the text that the run in --out={cfg.out} has read: take another --out")
    if phases != ["pretrain"] and not corpus.qa:
        raise ValueError(f"--phase={cfg.phase} needs questions: give --qa=FILE (lines of question, tab, answer), "
                         "or stop after reading with --phase=pretrain")
    if cfg.teacher != "self":
        cfg = dataclasses.replace(cfg, teacher_width=vector_width(cfg.teacher))
    fresh = {"pretrain": [], "distill": ["W.", "decoder.", "concept_"], "speak": ["decoder."]}[phases[0]]
    model = build(cfg, corpus.tokenizer, checkpoint.get("model"), [] if cfg.resume else fresh).to(device)
    this = Run(cfg, model, corpus, device, dtype)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    log = Log(out, checkpoint.get("rows", []))
    finished = checkpoint.get("finished", [])
    state = dict(format=FORMAT, config=dataclasses.asdict(cfg), tokenizer=corpus.tokenizer.state(), corpus=corpus.fingerprint,
                 answers=checkpoint.get("answers"), concepts=checkpoint.get("concepts"))
    questions = Questions(this) if corpus.qa else None
    at = phases.index(checkpoint["phase"]) if cfg.resume else 0
    for phase in phases[at:]:
        start, optimizer_state = 0, None
        if cfg.resume and phase == checkpoint["phase"]:
            start, optimizer_state = checkpoint["step"], checkpoint["optimizer"]
        if phase == "distill" and not start:
            state |= dict(answers=questions.answers, concepts=teach(this, questions))
        if phase != "pretrain" and state["answers"] != questions.answers:
            raise ValueError(f"--qa={cfg.qa} has other answers than those of phase 2: run --phase=distill first")
        table = state["concepts"]
        loss_at, evaluate = {"pretrain": lambda: pretrain(this), "distill": lambda: distill(this, questions, table),
                             "speak": lambda: speak(this, questions, table)}[phase]()

        def save(step, optimizer):
            save_checkpoint(out, state | dict(phase=phase, step=step, model=model.state_dict(), rows=log.rows,
                                              optimizer=optimizer.state_dict(), threshold=log.last().get("threshold")))
        fit(this, phase, loss_at, evaluate, log, save, start, optimizer_state)
    figures = log.last() | dict(seconds=round(time.perf_counter() - started, 1))
    return figures


def main(argv=None):
    """Command line: a usage error is one line and exit code 2, Ctrl-C saves and is exit code 130."""
    signal.signal(signal.SIGINT, lambda *_: INTERRUPTED.append(True))
    try:
        figures = run(resolve(read_flags(Config, argv, "train.py")))
        print(json.dumps(figures, indent=1))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
