"""
Train a T-JEPA: flags -> corpus -> phases -> one training loop -> checkpoint, metrics, curves.

    python train.py                                                     all phases, shipped facts
    python train.py --data=my_book.txt --out=out/book                   your own text: phases 1, 3
    python train.py --phase=distill --qa=my_qa.tsv --out=out/book       teach answers as latents
    python train.py --phase=speak --out=out/book                        learn to speak them
    python train.py --phase=teach --qa=new.tsv --out=out/book           later: add new facts
    python train.py --help                                              every flag, what it changes
"""
import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar, NamedTuple

if __name__ == "__main__":      # importing torch takes seconds: Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import align
import data
import evaluate
import report
import tjepa
from data.checkpoints import (
    FORMAT, HOSTILE, content_of, is_a, is_plain, own, seal, shape_of, unpack, unseal, well_formed,
    write_safely)
from flags import plain_output, read_flags

PHASES = ("pretrain", "distill", "speak")
EVERY = *PHASES, "teach"        # teach adds facts to a run that has been through the others
PREVIOUS = "ckpt.previous.pt"   # the finished one that was there before a phase was begun anew

@dataclasses.dataclass
class Config(tjepa.Config):
    """tjepa.Config shapes the model and its losses; these fields shape a run."""
    GROUPS: ClassVar[dict] = {          # sections of --help; what is not named comes last
        "first of all": ("phase", "out", "data", "qa", "preset", "recipe", "resume", "seed"),
        "more text, more questions": ("init_from", "qa_val", "added"),
        "how long": ("pretrain_steps", "distill_steps", "speak_steps", "eval_every"),
        "one change, one effect": ("stop_gradient", "ema_half_life", "sigreg", "mlm", "loss",
                                   "target", "top_k", "target_norm", "embed_scale", "mask_ratio",
                                   "max_span"),
    }
    phase: str = "all"          # pretrain | distill | speak | all; teach adds --qa to a run
    preset: str = "tiny"        # tiny: 305 facts, minutes on a CPU | minute | laptop: all | gpu
    recipe: str = "default"     # default: latents and tokens | latent | paper | v2 | collapse
    out: str = "out/tjepa"      # folder of the run: ckpt.pt, metrics.csv, curves.png, config.json
    data: str = "facts"         # facts, or the path of a UTF-8 .txt, or of a folder of them
    facts: str = "tiny"         # which part of the shipped facts: tiny | all
    qa: str = ""                # your own questions: a file of lines question, tab, answer
    added: str = ""             # the pairs that --phase=teach adds: its --qa
    qa_val: str = ""            # a file like --qa: the same in other words, asked but never taught
    init_from: str = ""         # phase 1 goes on from the run in this folder, in a new --out
    tokenizer: str = "bpe"      # bpe: trained on the corpus | gpt2: 50k tokens, downloaded once
    teacher: str = "self"       # gives answers their latents: self | ckpt:DIR | an .npz
    distill: str = "answers"    # phase 2: answers | align: imitate the run --teacher=ckpt:DIR
    align: str = "tokens+pooled+thought"    # what align imitates: tokens, pooled, thought, guess
    rounds: int = 1             # equal parts of phase 2; each begins with a fresh optimizer
    seed: int = 0               # weights, batches and masks follow from it; the text does not
    device: str = "auto"        # auto | cuda | mps | cpu
    threads: int = 0            # of a CPU; 0: the faster number in a short trial
    dtype: str = "auto"         # auto | fp32 | bf16: bf16 autocast where the hardware gains from it
    compile: bool = False       # phase 1 as a few graphs: a long start, fewer launches on a GPU
    resume: bool = False        # continue --out; on a CPU bit-identical to one uninterrupted run
    batch_size: int = 48        # rows of text a step in phase 1
    masks: int = 1              # span masks drawn for each row; each further one costs .8 of a step
    qa_batch_size: int = 64     # questions a step in phases 2 and 3
    accum: int = 1              # split each batch into this many equal parts, to save memory
    pretrain_steps: int = 700   # steps of phase 1; 0 = the control with a random encoder
    distill_steps: int = 700    # steps of phase 2; 0 = the control that is taught nothing
    speak_steps: int = 500      # steps of phase 3
    teach_steps: int = 600      # steps of --phase=teach
    pretrain_lr: float = 2e-3   # peak learning rate of phase 1
    distill_lr: float = 1e-3    # peak learning rate of phase 2; if too high, the text is forgotten
    speak_lr: float = 1e-3      # peak learning rate of phase 3
    teach_lr: float = 1e-3      # peak learning rate of --phase=teach
    warmup: float = 0.05        # share of the steps in which the learning rate rises
    weight_decay: float = 0.05  # on matrices; not on norms, biases, embeddings, mask token
    clip: float = 1.0           # largest norm of the gradient
    alpha_start: float = 0.5    # weight of the latent loss in phase 3, falls to 0; v2.0: 0
    question_noise: float = 0.5 # share of phase 2's questions written as people type
    made_up: float = 0.2        # share of phase 2's questions about made-up subjects: thought 0
    echo: float = 0.95          # share of phase 3's rows that are answer latent -> answer
    eval_every: int = 200       # steps between evaluations, checkpoints and redrawn curves

    def __post_init__(self):
        super().__post_init__()
        steps = "pretrain_steps distill_steps speak_steps teach_steps"
        parts = f"some of {', '.join(align.PARTS)}, joined by +"
        divisor = f"a divisor of distill_steps = {self.distill_steps}"
        batches = (self.batch_size, self.qa_batch_size)
        tjepa.check(self, (
            ("out data", lambda v: v.strip() and "\0" not in v, "a path"),
            ("phase", *tjepa.one_of(*EVERY, "all")),
            ("preset", *tjepa.one_of(*PRESETS)),
            ("recipe", *tjepa.one_of(*RECIPES)),
            ("facts", *tjepa.one_of("tiny", "all")),
            ("tokenizer", *tjepa.one_of("bpe", "gpt2")),
            ("teacher", lambda v: v not in ("", "ckpt:"), "self, ckpt:DIR or the path of an .npz"),
            ("distill", *tjepa.one_of("answers", "align")),
            ("align", align.known_parts, parts),
            ("device", *tjepa.one_of("auto", "cuda", "mps", "cpu")),
            ("dtype", *tjepa.one_of("auto", "fp32", "bf16")),
            ("batch_size qa_batch_size masks accum", *tjepa.within(1, 1_000_000)),
            ("threads", *tjepa.within(0, 1024)),
            ("accum", lambda v: all(n % v == 0 for n in batches), "a divisor of both batch sizes"),
            (f"{steps} seed", *tjepa.within(0, 10 ** 9)),
            ("eval_every rounds", *tjepa.within(1, 10 ** 9)),
            ("rounds", lambda v: self.distill_steps % v == 0, divisor),
            ("pretrain_lr distill_lr speak_lr teach_lr", lambda v: 0 < v <= 1000,
             "above 0, at most 1000"),
            ("clip", lambda v: 0 < v <= 1e9, "above 0, at most 1000000000"),
            ("weight_decay", *tjepa.within(0, 1000)),
            ("question_noise", *tjepa.within(0, 1)),
            ("warmup alpha_start echo made_up", lambda v: 0 <= v < 1, "at least 0 and below 1"),
        ))

    @property
    def is_text(self):
        """A text of one's own without questions: phase 3 says its gaps instead of answers."""
        return self.data != "facts" and not self.qa

PRESETS = dict(
    tiny={},
    # a smoke run; `report.MINUTE` says what to expect of it
    minute=dict(
        n_layer=2, n_head=2, n_embd=64,
        pred_layer=1, pred_embd=64,
        dec_layer=2,
        batch_size=32,
        pretrain_steps=200, pretrain_lr=3e-3,
        distill_steps=250, distill_lr=4e-3,
        speak_steps=200, speak_lr=3e-3,
    ),
    laptop=dict(
        facts="all", vocab_size=4096,
        qa_batch_size=128, eval_every=800,
        pretrain_steps=2000,
        distill_steps=4800,
        speak_steps=3200,
    ),
    gpu=dict(
        facts="all", vocab_size=4096,
        n_layer=6, n_head=8, n_embd=384, pred_embd=384,
        batch_size=256, qa_batch_size=512, eval_every=500,
        pretrain_steps=10000, pretrain_lr=1e-3,
        distill_steps=4000,
        speak_steps=4000,
    ),
)
RECIPES = dict(
    default={},             # latents and tokens
    latent=dict(mlm=0.0),   # the same, and no token is predicted in phase 1
    # v1.1 section 3.1 to the letter
    paper=dict(
        mlm=0.0,
        pred_embd=64,       # half the width of the encoder
        target="span",
        top_k=1,
        target_norm=False,
        embed_scale=1.0,
        loss="mse",
        sigreg=0.0,
        pretrain_lr=1e-3,
    ),
    # v2.0: two phases with cross-entropy alone; the decoder reads the encoder's token latents
    v2=dict(mlm=0.0, distill_steps=0, memory="tokens", alpha_start=0.0),
    # all that prevents a collapse is off
    collapse=dict(mlm=0.0, stop_gradient=False, ema_half_life=0, sigreg=0.0, loss="mse"),
)
# A folder holds one run. What shapes the model and its reading can't change in it; its text is
# compared by content.
FIXED = ("recipe facts tokenizer vocab_size block_size n_layer n_head n_embd pred_layer "
         "pred_embd mlm top_k target_norm embed_scale").split()

# Settings of a text of one's own without questions. Phase 1's were chosen in a few runs of 1.8
# million tokens on tiny Shakespeare without its last tenth (seed 0, two minutes of a core each);
# labs/text.py measures them. With the default's loss, InfoNCE on tokens, the energy tells words of
# similar frequency apart (hit@5 .14, chance .05), with MSE it did not (.09). Steps, other sizes,
# noise and echo were not tuned: predicted spans are inexact already, so they get less noise than
# answers.
TEXT = dict(
    n_layer=2,
    max_span=3,
    mask_ratio=0.2,
    batch_size=32,
    pretrain_lr=3e-3,
    noise=0.1,
    echo=0.25,
    qa_batch_size=128,
)
# up to so many characters: tokens of the vocabulary, steps of phases 1 and 3
TEXT_SIZES = (
    (200_000, 512, 1500, 600),
    (4_000_000, 1024, 4000, 1200),
    (math.inf, 4096, 8000, 3000),
)

# -- from flags to a Config ------------------------------------------------------------------------

def resolve(given):
    """The Config of a command line. Later ones win: defaults, the continued run or the settings for
    a text of one's own, preset, recipe, the flags given (a dict). ValueError where flags contradict
    the run that is continued."""
    out = given.get("out", Config.out)
    preset = PRESETS.get(given.get("preset"), {})
    recipe = RECIPES.get(given.get("recipe"), {})
    asked = preset | recipe | given
    if "added" in given:
        raise ValueError("--added is what a run remembers: add facts by --phase=teach --qa=FILE")
    if given.get("phase") == "teach" and "qa" in asked:
        asked["added"] = asked.pop("qa")                # the run keeps its own --qa
    paths = ("data", "qa", "qa_val", "added", "teacher", "init_from")
    asked |= {name: absolute(asked[name]) for name in paths if name in asked}
    base = {}
    goes_on = given.get("resume") or given.get("phase") in ("distill", "speak", "teach")
    if goes_on and given.get("init_from"):
        raise ValueError("--init_from begins a run with phase 1: leave it out, or leave --resume "
                         "and --phase out")
    if goes_on:
        base = dict(load_checkpoint(out)["config"], resume=False)
        base["out"] = out                               # the folder may have been copied
        if given.get("phase") == "distill":             # begun anew, it forgets what was added
            base["added"] = ""
        same_run(f"--out={out}", base, asked)
        if asked.get("qa") and not base["qa"]:          # answers are said with their own settings
            base |= dict(noise=Config.noise, echo=Config.echo)
    elif given.get("init_from"):
        saved = load_checkpoint(given["init_from"], "--init_from=")["config"]
        text = dict(facts=asked.get("facts", saved["facts"]))       # it may be another one
        base = saved | text | dict(phase="all", out=out, resume=False, added="", teacher_width=0)
        same_run(f"--init_from={given['init_from']}", base, asked)
    elif asked.get("data", "facts") != "facts" and not asked.get("qa"):
        base = text_settings(asked)
    return Config(**base | asked)

def text_settings(asked):
    """Settings by the size of the text in asked["data"]: fields of a Config. Prints them."""
    text = data.read_text(asked["data"])
    n = len(text)
    vocab_size, pretrain_steps, speak_steps = next(
        row[1:] for row in TEXT_SIZES if n <= row[0])
    # Each common character of a script other than Latin is a token; others are cut into bytes.
    counts = Counter(text[:2 ** 20])
    vocab_size += sum(c > "\u024f" and times >= 10 for c, times in counts.items())
    vocab_size = min(vocab_size, 2 ** 16)
    settings = TEXT | dict(vocab_size=vocab_size, pretrain_steps=pretrain_steps,
                           speak_steps=speak_steps, eval_every=max(1, pretrain_steps // 4))
    used = [f"--{name}={value}" for name, value in settings.items() if name not in asked]
    print(f"a text of {n:,} characters; settings for it, your own flags win: {' '.join(used)}")
    return settings

def absolute(path):
    """A path as it is stored in a run, which may be resumed from another working directory."""
    if path in ("", "facts", "self", "ckpt:"):
        return path
    kind = "ckpt:" if path.startswith("ckpt:") else ""
    return kind + os.path.abspath(path.removeprefix(kind))

def same_run(where, saved, asked):
    """ValueError if asked (a dict of fields) needs another model than the run in `where` has.

    where: the flag that names its folder, as --out=DIR.
    """
    for name in FIXED:
        if name in asked and asked[name] != saved[name]:
            raise ValueError(
                f"--{name}={asked[name]}, but the run in {where} has {name}={saved[name]}: "
                "leave the flag as it was, or start another run with another --out")

def pick_device(cfg):
    """(device, autocast dtype or None). Prints both, and why they were chosen."""
    has = dict(
        cuda=torch.cuda.is_available(),
        mps=torch.backends.mps.is_available(),
        cpu=True,
    )
    if cfg.device != "auto" and not has[cfg.device]:
        raise ValueError(f"--device={cfg.device}: this machine has none that torch can use; "
                         "take --device=auto or cpu")
    device, why = cfg.device, "as asked"
    if device == "auto":
        device = next(name for name in has if has[name])
        found = dict(cuda="a GPU", mps="an Apple GPU", cpu="no GPU")
        why = f"{found[device]} is there"
    fast = False
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        fast = torch.cpu._is_amx_tile_supported()       # there is no public way to ask
    bf16 = fast if cfg.dtype == "auto" else cfg.dtype == "bf16"
    gain = "faster on this hardware" if fast else "bf16 gains nothing here"
    if cfg.dtype != "auto":
        gain = "as asked"
    print(f"device {device} ({why}), {'bf16 autocast' if bf16 else 'fp32'} ({gain})")
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0] / 1e9
        print(f"{torch.cuda.get_device_name()}, {free:.1f} GB of memory free")
    if cfg.compile:
        if why := no_graphs():
            raise ValueError(f"--compile: {why}; leave it out")
        print("--compile: in phase 1 forward, backward, clipping and EMA are one graph each, AdamW "
              "is one fused operation; rows and masks are drawn on the CPU")
    return device, torch.bfloat16 if bf16 else None

def no_graphs():
    """Why torch.compile can't make graphs of phase 1 here; "" where it can."""
    if sys.platform == "darwin":
        return "torch.compile gives wrong results on macOS"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        return f"torch {torch.__version__} breaks the graphs of phase 1, 2.7 does not"
    return ""

def as_graph(function):
    """A function of tensors of fixed shapes as one graph; its random draws are those of eager mode.

    Equal to eager mode up to rounding: other kernels add in another order.
    """
    return torch.compile(function, fullgraph=True, dynamic=False,
                         options=dict(fallback_random=True))

def pick_threads(cfg):
    """How many threads a CPU computes with; prints it. A trial decides where --threads does not.

    On a busy machine two threads wait for each other, and one is several times faster.
    """
    threads, why, most = cfg.threads, "as asked, or as before", torch.get_num_threads()
    if not threads and most == 1:
        threads, why = 1, "no more are there, or OMP_NUM_THREADS says so"
    if not threads:
        block = tjepa.Block(cfg.n_embd, cfg.n_head)
        rope = tjepa.rotary(cfg.block_size, cfg.n_embd // cfg.n_head)
        took = {}
        for threads in (most, 1) * 3:
            torch.set_num_threads(threads)
            started = time.perf_counter()
            block(torch.zeros(cfg.batch_size, cfg.block_size, cfg.n_embd), rope).sum().backward()
            seconds = time.perf_counter() - started
            took[threads] = min(seconds, took.get(threads, seconds))
        threads = min(took, key=took.get)
        why = f"in a trial {most} took {took[most] / took[1]:.2f} of the time of 1"
    torch.set_num_threads(threads)
    print(f"CPU threads: {threads} ({why})")
    return threads

def memory_of(device):
    """Bytes of memory of the device; inf where that is not known."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf

def check_memory(cfg, device):
    """ValueError if a run needs more memory than there is, by an estimate that errs low."""
    with torch.device("meta"):          # counts the weights without making them
        model = tjepa.TJEPA(cfg, torch.zeros(cfg.vocab_size, dtype=torch.bool))
    n_weights = sum(p.numel() for p in model.parameters())
    weights = 16 * n_weights            # in fp32, with gradient and the two moments of AdamW
    rows = max(cfg.batch_size * cfg.masks * cfg.block_size, cfg.qa_batch_size * cfg.answer_size)
    a_token = 16 * cfg.n_embd * cfg.n_layer + cfg.mask_ratio * cfg.vocab_size * (cfg.mlm > 0)
    batch = 4 * rows * a_token / cfg.accum
    have = memory_of(device)
    if weights + batch <= have:
        return
    remedy = "lower --batch_size, --masks or --block_size, or raise --accum"
    if weights > batch:
        remedy = "lower --n_embd, --n_layer or --vocab_size"
    raise ValueError(f"this run would take more than {(weights + batch) / 1e9:,.0f} GB, and "
                     f"there are {have / 1e9:,.0f} GB: {remedy}")

# -- checkpoints -----------------------------------------------------------------------------------

def save_checkpoint(out, checkpoint, keep_previous=False):
    """Write out/ckpt.pt, then out/config.json. keep_previous: keep the old one as another file."""
    path = Path(out) / "ckpt.pt"
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)      # in memory first: a full disk is then an ordinary OSError
    if keep_previous:
        previous = path.with_name(PREVIOUS)
        write_safely(previous, path.read_bytes())
        print(f"\nthe checkpoint that was there is kept as {previous}, until a phase is begun "
              "anew once more")
    write_safely(path, seal(buffer.getbuffer()))
    write_config(out, checkpoint["config"])

def write_config(out, config):
    """Write out/config.json: the config of ckpt.pt, and which program wrote it, where and when."""
    made = dict(commit=report.program_version(), torch=torch.__version__,
                date=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    write_safely(Path(out) / "config.json", json.dumps(config | made, indent=1).encode())

def says(out, config):
    """Does out/config.json hold this config? A run that was killed may have left another one."""
    try:
        written = json.loads((Path(out) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(written, dict) and written.items() >= config.items()

def load_checkpoint(out, flag="--out="):
    """The dict in out/ckpt.pt. Runs no code from it; ValueError says what is wrong with it."""
    path = Path(out) / "ckpt.pt"
    if not path.is_file():
        previous = path.with_name(PREVIOUS)
        if previous.is_file():
            raise ValueError(f"no checkpoint in {flag}{out}, but an earlier one: rename "
                             f"{previous} to ckpt.pt to go on from it")
        raise ValueError(f"no checkpoint in {flag}{out}: run `python train.py --out={out}` first "
                         "(its --help lists the phases)")
    content = unseal(path.read_bytes(), path)
    try:
        checkpoint = unpack(content)
        fields = {field.name: field.type for field in dataclasses.fields(Config)}
        good = well_formed(checkpoint, fields, EVERY, report.Log.COLUMNS)
    except HOSTILE as error:
        raise ValueError(f"{path} is no checkpoint of this program ({type(error).__name__}): "
                         "train again with another --out") from None
    if not good:
        raise ValueError(f"{path} was written by another version or program: "
                         "use that one, or train with another --out")
    return checkpoint

class Run(NamedTuple):
    """What a phase works with."""
    cfg: Config
    model: tjepa.TJEPA
    corpus: data.Corpus
    device: str
    dtype: torch.dtype | None
    questions: data.Questions | None = None
    concepts: torch.Tensor | None = None    # (n, D) the standardised latents L_a of n answers
    teacher: align.Teacher | None = None    # the run that --distill=align imitates
    threshold: float = math.inf             # phase 2's, if facts were added: `threshold_of`

    def autocast(self):
        """bf16 where --dtype says so."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None)

    def in_parts(self, draw):
        """Endless parts of batches: each batch, draw() -> tuple of tensors, is split by --accum.

        The mean gradient of the parts is that of the batch, up to rounding, where the loss is a
        mean over rows. SIGReg and InfoNCE compare the rows of a part with each other, and the
        masked LM averages over the removed tokens of a part: they depend on its size.
        """
        while True:
            yield from zip(*(tensor.chunk(self.cfg.accum) for tensor in draw()))

def sizes_of(weights):
    """Name -> size and type of number of each weight."""
    return {name: (value.shape, value.dtype) for name, value in weights.items()}

def build(cfg, tokenizer, weights=None, fresh=(), model=tjepa.TJEPA):
    """A model of class `model`, initialised by cfg.seed, then with the weights of a checkpoint.

    fresh: beginnings of the names of the weights that are not taken from the checkpoint.
    """
    shape = dataclasses.replace(cfg, vocab_size=tokenizer.vocab_size)
    kept = {}
    if weights is not None:
        fresh = tuple(fresh)
        kept = {name: value for name, value in weights.items() if not name.startswith(fresh)}
        with torch.device("meta"):      # sizes alone: a wrong config may ask for all memory
            needed = model(shape, tokenizer.word_start).state_dict()
        needed = {name: value for name, value in needed.items() if not name.startswith(fresh)}
        if sizes_of(kept) != sizes_of(needed):
            raise ValueError(
                f"the run in --out={cfg.out} has another shape than these flags ask for: leave "
                "the flags that shape the model as they were, or take another --out")
    torch.manual_seed(cfg.seed)
    built = model(shape, tokenizer.word_start)
    built.load_state_dict(kept, strict=False)
    return built

# -- the training loop -----------------------------------------------------------------------------

def parameter_groups(parts, weight_decay):
    """Groups for AdamW: decay for matrices, none for norms, biases, embeddings, mask token."""
    named = [(name, p) for part in parts for name, p in part.named_parameters()]
    decayed = [p for name, p in named if p.dim() > 1 and "embed" not in name]
    others = [p for name, p in named if p.dim() < 2 or "embed" in name]
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]

def make_optimizer(run, phase, state=None):
    """AdamW for the parts that a phase trains; all other parts are frozen. state: a saved one."""
    parts = run.model.trained_in(phase)
    for part in run.model.children():
        part.requires_grad_(part in parts)
    groups = parameter_groups(parts, run.cfg.weight_decay)
    lr = getattr(run.cfg, f"{phase}_lr")
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    if state:
        moments = state.get("state")
        parameters = [p for group in groups for p in group["params"]]
        if not are_moments(moments, parameters):
            raise ValueError(f"the checkpoint in --out={run.cfg.out} holds no optimizer of phase "
                             f"{phase}: begin it anew with --phase={phase}")
        # Only the moments: a resumed run may change the weight decay, as it may a learning rate.
        settings = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(dict(state=moments, param_groups=settings))
    return optimizer

def are_moments(moments, parameters):
    """Is this the state of AdamW (a dict by number) for parameters of these sizes?"""
    if not isinstance(moments, dict):
        return False
    for number, moment in moments.items():
        if not is_a(number, int) or not 0 <= number < len(parameters):
            return False
        size = parameters[number].shape
        expected = dict(step=torch.Size(), exp_avg=size, exp_avg_sq=size)
        if not isinstance(moment, dict) or set(moment) != set(expected):
            return False
        for name, value in moment.items():
            if not is_plain(value) or value.dtype is not torch.float32:
                return False
            if value.shape != expected[name]:
                return False
        if (moment["exp_avg_sq"] < 0).any():
            return False
    return True

def learning_rate(step, steps, peak, warmup):
    """Learning rate at a step of `steps`; warmup: share of the steps in which it rises."""
    # 1. linear warm-up to the peak
    rise = (step + 1) / max(1, round(warmup * steps))
    # 2. cosine from the peak at step 0 to a tenth of it at the end
    fall = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    # 3. the lower of the two: with warmup = .05 they meet at .995 of the peak
    return peak * min(rise, fall)

def after_backward(run, phase):
    """Functions that clip the gradient and move the target, the second None where it stands still.

    With --compile they are graphs in phase 1.
    """
    clip = torch.nn.utils.clip_grad_norm_
    ema_update = run.model.ema_update if target_moves(run.cfg, phase) else None
    if run.cfg.compile and phase == "pretrain":
        return as_graph(clip), as_graph(ema_update)
    return clip, ema_update

def target_moves(cfg, phase):
    """Does the EMA target follow the context encoder in this phase?

    It does in phase 1, and in a phase 2 that imitates another run on text (--distill=align). Where
    answers are taught it stands still, because it defines their latents.
    """
    return phase == "pretrain" or (
        phase == "distill" and cfg.distill == "align" and cfg.align != "thought")

class Interrupts:
    """Ctrl-C stops at once, but while steps are taken only after a whole step, which is saved.

    A second Ctrl-C always stops at once.
    """
    deferred = False
    pending = False

    def handle(self, *signal_and_frame):
        """Signal handler."""
        if self.pending or not self.deferred:
            raise KeyboardInterrupt
        self.pending = True

INTERRUPTS = Interrupts()

# what the progress bar shows: of each line the first figure that was measured
IN_BAR = (
    ("loss",), ("hit1",), ("rank",), ("health",),
    ("r1_LAT_heldout", "r1_DEC_heldout", "r1_DEC"),
    ("em_LAT_heldout", "em_DEC_heldout", "em_DEC"),
    ("word_prior_hit5",), ("gap_em",),
)

def check_finite(cfg, phase, step, number):
    """ValueError if a loss or gradient is no longer a number."""
    if not math.isfinite(number):
        peak = getattr(cfg, f"{phase}_lr")
        raise ValueError(
            f"the loss of {phase} is no longer a number at step {step}: lower --{phase}_lr={peak} "
            f"or --clip={cfg.clip}; the last good checkpoint is in --out={cfg.out}")

class Journal:
    """What `fit` does beside training: the progress bar, the log, evaluations and checkpoints."""

    def __init__(self, run, phase, optimizer, measure, log, save):
        cfg = run.cfg
        self.run = run
        self.phase = phase
        self.optimizer = optimizer
        self.measure = measure
        self.log = log
        self.save = save
        self.steps = getattr(cfg, f"{phase}_steps")
        # tokens of text in phase 1, questions in the others
        self.per_step = cfg.qa_batch_size
        if phase == "pretrain":
            self.per_step = cfg.batch_size * cfg.block_size

    def begin(self, start, evaluated):
        """Before the first step; evaluates, if that is still due there."""
        self.start = start
        self.bar = tqdm(total=self.steps, initial=start, desc=self.phase, dynamic_ncols=True,
                        mininterval=1)
        rows = self.log.rows
        if not evaluated:   # before the first step, too: the log shows what the phase starts from
            if not rows or (rows[-1]["phase"], rows[-1]["step"]) != (self.phase, start):
                self.log.add(dict(phase=self.phase, step=start, tokens=start * self.per_step))
            self.evaluate_and_save(start)
            self.log.flush()
        self.show()
        INTERRUPTS.deferred = True
        self.clock = time.perf_counter()
        self.timed = start

    def after(self, step, loss, stats, lr, grad):
        """After the optimizer step `step`, counted from 1: log every 20 steps, evaluate and save
        every --eval_every. KeyboardInterrupt if Ctrl-C was pressed meanwhile."""
        self.bar.update()
        if step == self.start + 1:
            self.show(loss=loss.item())
        evaluates = step == self.steps or step % self.run.cfg.eval_every == 0
        interrupted = INTERRUPTS.pending
        if not (evaluates or interrupted or step % 20 == 0):
            return                      # not each step: this waits for a GPU
        check_finite(self.run.cfg, self.phase, step, loss.item() + grad.item())
        rate = (step - self.timed) * self.per_step / (time.perf_counter() - self.clock)
        row = dict(
            phase=self.phase,
            step=step,
            tokens=step * self.per_step,
            loss=loss.item(),
            lr=lr,
            grad=grad.item(),
            tok_s=rate,
        )
        row |= {name: float(value) for name, value in stats.items()}
        self.log.add(row)
        if evaluates or interrupted:    # saved before evaluating: if that fails, no step is lost
            self.save(step, self.optimizer, evaluated=not evaluates)
        if interrupted:
            self.log.flush()
            raise KeyboardInterrupt
        if evaluates:
            self.evaluate_and_save(step)
        self.log.flush()
        self.show()
        self.clock = time.perf_counter()
        self.timed = step

    def end(self):
        """After the last step."""
        INTERRUPTS.deferred = False
        self.bar.close()

    def show(self, **figures):
        """Show the newest figures of the phase in the progress bar, those of the log and others."""
        rows = [row for row in self.log.rows if row["phase"] == self.phase]
        row = report.newest(rows) | figures
        shown = {}
        for names in IN_BAR:
            name = next((name for name in names if name in row), None)
            if name is not None:
                shown[name] = f"{row[name]:.3g}" if isinstance(row[name], float) else row[name]
        self.bar.set_postfix(shown)

    def evaluate_and_save(self, step):
        """Complete the last row of the log by the figures; save, log and draw them."""
        run, log = self.run, self.log
        INTERRUPTS.deferred = False
        figures = self.measure(step == self.steps)
        INTERRUPTS.deferred = True
        before = log.last().get("health")
        log.rows[-1].update(figures)
        self.save(step, self.optimizer, evaluated=True)
        if figures:                     # a control that is measured elsewhere has nothing to draw
            report.keep_snapshot(run, self.phase, step)
            title = f"{run.cfg.out}, recipe {run.cfg.recipe}, commit {report.program_version()}"
            report.draw_curves(log.rows, EVERY, Path(run.cfg.out) / "curves.png", title)
        said = report.alarm(figures, run.cfg)
        if said and step > 0 and before != "collapsed":
            tqdm.write(f"step {step} of {self.phase}: {said}")

def fit(run, phase, loss_at, measure, log, save, start=0, optimizer_state=None, evaluated=False):
    """The one training loop: every phase and every control trains here.

    loss_at(progress)      draws a batch and returns (loss, stats); progress runs from 0 to 1
    measure(whole)         returns a dict of figures; whole is True at the end of the phase
    log                    a `report.Log`
    save(step, optimizer, evaluated)    writes a checkpoint; evaluated is False where the figures of
                           an evaluation that is due at this step are still missing
    start, optimizer_state, evaluated   where a resumed phase continues
    Raises ValueError if the loss is no longer finite, KeyboardInterrupt after Ctrl-C.
    """
    cfg, model = run.cfg, run.model
    steps = getattr(cfg, f"{phase}_steps")
    peak = getattr(cfg, f"{phase}_lr")
    round_steps = steps // cfg.rounds if phase == "distill" else steps
    optimizer = make_optimizer(run, phase, optimizer_state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    clip, ema_update = after_backward(run, phase)
    journal = Journal(run, phase, optimizer, measure, log, save)
    journal.begin(start, evaluated)

    for step in range(start, steps):
        # Every random draw follows from the seed and the step (at most 10**9 a phase): a resumed
        # run draws the same.
        phase_seed = cfg.seed * len(EVERY) + EVERY.index(phase)
        torch.manual_seed(phase_seed * 10 ** 9 + step)

        # learning rate; it starts anew in each of the --rounds of phase 2, as the optimizer does
        in_round = step % round_steps
        if in_round == 0:
            optimizer.state.clear()
        lr = learning_rate(in_round, round_steps, peak, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # forward and backward; --accum calls of loss_at use up one batch
        for _ in range(cfg.accum):
            with run.autocast():
                loss, stats = loss_at(step / steps)
            (loss / cfg.accum).backward()

        # optimizer step
        grad = clip(parameters, cfg.clip)
        optimizer.step()
        optimizer.zero_grad()

        # EMA: the target encoder follows the context encoder
        if ema_update:
            ema_update()

        # log, evaluate, save
        journal.after(step + 1, loss, stats, lr, grad)
    journal.end()

# -- the phases: each takes a Run and returns (loss_at, measure) for `fit` -------------------------

def pretrain(run):
    """Phase 1: rows of text, spans removed."""
    cfg, model = run.cfg, run.model
    loss_of = as_graph(model.pretrain_loss) if cfg.compile else model.pretrain_loss
    word_start = model.word_start.cpu()
    has_capitals = "capital" in run.corpus.values

    def draw():
        """Random rows (B, T), and what is removed from each, --masks times: (B * masks, T).

        On the CPU: a GPU computes meanwhile.
        """
        tokens = run.corpus.train.batch(cfg.batch_size)
        each = tokens.repeat_interleave(cfg.masks, 0)
        span_ids = tjepa.sample_spans(each, word_start, model.cfg)
        return [part.to(run.device, non_blocking=True) for part in (tokens, span_ids)]
    parts = run.in_parts(draw)

    def loss_at(progress):
        """Loss of random rows."""
        loss, stats = loss_of(*next(parts))
        return loss, stats | dict(tau=cfg.ema_decay)

    def measure(whole):
        """Figures on held-out text; at the end also the cloze, if the corpus has one."""
        figures = evaluate.evaluate_text(run)
        if cfg.data != "facts":
            figures |= evaluate.hidden_words(run, 256 if whole else 64)
        if whole and has_capitals:
            figures |= evaluate.cloze(run, "capital")
        return figures
    return loss_at, measure

def distill(run):
    """Phase 2: questions of DEC and LAT facts in trained wordings; no answer token is produced.

    Some are written as people type, and some are about made-up subjects: the thought of what is
    unknown is 0, the mean of all standardised answers, and lies far from each of them.
    """
    cfg = run.cfg
    if cfg.distill == "align":
        return align.align(run)
    questions, concepts = run.questions, run.concepts
    taught = questions.where("DEC", "LAT", phrasing="trained")
    unknown = torch.zeros_like(concepts[:1])
    # row n: what a made-up subject has
    answer_latents = torch.cat((concepts[questions.answer_of[taught]], unknown))    # (n+1, D)
    draw = questions.drawing(taught, cfg.qa_batch_size, cfg.question_noise, cfg.made_up)
    parts = run.in_parts(draw)

    def loss_at(progress):
        """Loss of random questions."""
        which, tokens = next(parts)
        return run.model.distill_loss(tokens, answer_latents[which])
    return loss_at, lambda whole: recall(run, whole)

def recall(run, whole):
    """Figures of the thoughts: of all questions, or between evaluations of held-out wordings."""
    questions = run.questions.fewer() if whole else run.questions.only(*data.QUICK)
    return evaluate.recall(run, questions, run.concepts)

class Lessons(NamedTuple):
    """The rows that phase 3 draws from: questions first, then echoes."""
    texts: torch.Tensor         # (n, T) the question, or the answer that is echoed
    thoughts: tjepa.Thought     # of n rows: W L_p of the question, or L_a
    answers: torch.Tensor       # (n, A) tokens to say, with EOS
    latents: torch.Tensor       # (n, D) L_a
    n_questions: int

def pad_rows(rows, model):
    """Rows of tokens of different lengths as one tensor, (n, T)."""
    return pad_sequence(rows, batch_first=True, padding_value=model.cfg.pad)

def with_end(answers, tokenizer):
    """Answers (n, L) with EOS after their last token: (n, L+1)."""
    longer = torch.nn.functional.pad(answers, (0, 1), value=tokenizer.pad)
    ends = (answers != tokenizer.pad).sum(1, keepdim=True)
    return longer.scatter(1, ends, tokenizer.eos)

def make_lessons(run):
    """`Lessons` of phase 3: questions of DEC facts in trained wordings, and an echo of each answer.
    Facts that were added (NEW) are said too.

    Thoughts are computed once, because the encoder is frozen. Echoes are of answers alone: when
    half of them were spans of text, LAT facts in new wordings lost .08 exact match.
    """
    questions, concepts = run.questions, run.concepts
    asked = questions.where("DEC", "NEW", phrasing="trained")
    answer_of = questions.answer_of[asked]
    echoed = questions.answer_tokens                                    # (A, L)

    texts = pad_rows([*questions.tokens[asked], *echoed], run.model)    # (n, T)
    thoughts = evaluate.think_all(run, texts)
    latent = torch.cat((thoughts.latent[:len(asked)], concepts))        # (n, D)

    answers = with_end(torch.cat((echoed[answer_of], echoed)), run.corpus.tokenizer)    # (n, L+1)
    latents = torch.cat((concepts[answer_of], concepts))
    return Lessons(texts, thoughts._replace(latent=latent), answers, latents, len(asked))

def draw_lessons(run, lessons):
    """Random rows of a step, (qa_batch_size,): questions, and a share --echo of echoes.

    They are drawn group by group, so that each part of a split batch has both kinds.
    """
    n = run.cfg.qa_batch_size // run.cfg.accum
    n_echo = round(n * run.cfg.echo)
    n_echoes = len(lessons.texts) - lessons.n_questions
    rows = []
    for _ in range(run.cfg.accum):
        rows.append(torch.randint(lessons.n_questions, (n - n_echo,)))
        rows.append(lessons.n_questions + torch.randint(n_echoes, (n_echo,)))
    return torch.cat(rows).to(run.device, non_blocking=True)

def enough_gaps(run, n, longest):
    """n `evaluate.Gaps` of the training text; ValueError where no span is short enough."""
    parts = []
    while sum(len(part.words) for part in parts) < n:
        parts.append(evaluate.draw_gaps(run, run.corpus.train, max(1, n // 4), longest))
        if not len(parts[-1].words):
            raise ValueError(f"--answer_size={run.cfg.answer_size}: no span of the text has at "
                             f"most {longest} tokens to be said: raise it")
    return evaluate.Gaps(*(torch.cat(tensors)[:n] for tensors in zip(*parts)))

def speak_text(run):
    """Phase 3 on a text of one's own: the decoder learns to say the spans that are removed from it.

    A share --echo of the rows has the target latent of the span as its thought, the others what
    the frozen encoder and predictor predict.
    """
    cfg, model = run.cfg, run.model
    longest = cfg.answer_size - 1
    # The latents of spans get the scale of answers: standardised by those of 1,024 spans, always
    # the same ones. Without the reset a resumed run would standardise twice.
    torch.manual_seed(cfg.seed)
    model.answer_mean.zero_()
    model.answer_scale.copy_(torch.eye(len(model.answer_mean)))
    model.fit_answer_scale(enough_gaps(run, 1024, longest).target)
    n_echo = round(cfg.qa_batch_size * cfg.echo)

    def draw():
        """Random gaps: thoughts (n, D), their words (n, A) and their target latents (n, D)."""
        gaps = enough_gaps(run, cfg.qa_batch_size, longest)
        order = torch.randperm(len(gaps.words), device=run.device)
        echoes, others = order[:n_echo], order[n_echo:]
        thoughts = gaps.predicted.clone()
        thoughts[echoes] = gaps.target[echoes]
        width = (gaps.words != model.cfg.pad).sum(1).max()
        return thoughts, gaps.words[:, :width], gaps.target
    parts = run.in_parts(draw)

    def loss_at(progress):
        """Loss of random gaps; the weight of the latent loss falls to 0 by a cosine."""
        latents, words, targets = next(parts)
        alpha = cfg.alpha_start * 0.5 * (1 + math.cos(math.pi * progress))
        thought = tjepa.thought_of(latents)
        loss, stats = model.speak_loss(thought, words, targets, alpha)
        return loss, stats | dict(alpha=alpha)

    def measure(whole):
        """Gaps of held-out text, said greedily: of 512 rows at the end, of 128 before."""
        return evaluate.spoken_gaps(run, 512 if whole else 128)
    return loss_at, measure

def speak(run):
    """Phase 3: the decoder learns to say thoughts."""
    if run.questions is None:
        return speak_text(run)
    lessons = make_lessons(run)
    held_out, every = run.questions.only(*data.QUICK), run.questions.fewer()
    thoughts_of_all = evaluate.think_all(run, every.tokens)
    thoughts_of_held_out = evaluate.think_all(run, held_out.tokens)
    parts = run.in_parts(lambda: (draw_lessons(run, lessons),))

    def loss_at(progress):
        """Loss of random lessons; the weight of the latent loss falls to 0 by a cosine."""
        rows, = next(parts)
        alpha = run.cfg.alpha_start * 0.5 * (1 + math.cos(math.pi * progress))
        loss, stats = run.model.speak_loss(
            lessons.thoughts.rows(rows), lessons.answers[rows], lessons.latents[rows], alpha)
        return loss, stats | dict(alpha=alpha)

    def measure(whole):
        """Exact match: of all questions at the end, of held-out wordings before."""
        if whole:
            return evaluate.exact_match(run, every, thoughts_of_all)
        return evaluate.exact_match(run, held_out, thoughts_of_held_out)
    return loss_at, measure

def teach(run):
    """Facts are added to a finished run: phases 2 and 3 at once, for new and old questions.

    Half of the questions are about the new facts (split NEW), half about the old ones, so that
    these are not forgotten. All answers are echoed: the decoder learns words it has never said.
    """
    cfg, model, questions, concepts = run.cfg, run.model, run.questions, run.concepts
    new = questions.where("NEW", phrasing="trained")
    old = questions.where("DEC", "LAT", phrasing="trained")
    as_many = max(1, round(len(old) / len(new)))
    asked = torch.cat((new.repeat(as_many), old))
    answer_of = questions.answer_of[asked]
    latents = torch.cat((concepts[answer_of], torch.zeros_like(concepts[:1])))
    answers = with_end(questions.answer_tokens, run.corpus.tokenizer)
    # LAT facts stay unspoken, and so does what is made up
    said = [questions.rows[i].split != "LAT" for i in asked.tolist()]
    said = torch.tensor([*said, False], device=run.device)
    draw_questions = questions.drawing(asked, cfg.qa_batch_size, cfg.question_noise, cfg.made_up)
    held_out, every = questions.only(*data.QUICK), questions.fewer()

    def draw():
        """Numbers of questions, their tokens, and as many numbers of answers to echo."""
        echoed = torch.randint(len(answers), (cfg.qa_batch_size,)).to(run.device)
        return *draw_questions(), echoed
    parts = run.in_parts(draw)

    def loss_at(progress):
        """The loss of phase 2 on all questions, and that of phase 3 on those that may be said."""
        which, tokens, echoed = next(parts)
        latent = model.think(tokens, cfg.question_drop).latent.float()      # (n, D)
        loss = torch.nn.functional.mse_loss(latent, latents[which])
        spoken = said[which]
        # phase 3 trains the decoder alone
        heard = torch.cat((latent[spoken], concepts[echoed]))
        lesson = tjepa.thought_of(heard.detach())
        if cfg.memory == "tokens":
            texts = pad_rows([*tokens[spoken], *questions.answer_tokens[echoed]], model)
            with torch.no_grad():
                lesson = model.think(texts)._replace(latent=lesson.latent)
        number = torch.cat((answer_of[which[spoken]], echoed))
        token, _ = model.speak_loss(lesson, answers[number], concepts[number], alpha=0)
        return loss + token, dict(latent=loss.detach(), token=token.detach())

    def measure(whole):
        """Figures of the thoughts and of what is said, as in phases 2 and 3."""
        asked = every if whole else held_out
        thoughts = evaluate.think_all(run, asked.tokens)
        figures = evaluate.recall(run, asked, concepts)
        return figures | evaluate.exact_match(run, asked, thoughts)
    return loss_at, measure

PHASE_OF = dict(pretrain=pretrain, distill=distill, speak=speak, teach=teach)

# -- the teacher of phase 2 ------------------------------------------------------------------------

def open_teacher(cfg, answers):
    """The run in --teacher=ckpt:DIR: `align.Teacher`, which knows the answers' latents if it was
    taught them."""
    saved = load_checkpoint(cfg.teacher.removeprefix("ckpt:"), "--teacher=ckpt:")
    tokenizer = data.Tokenizer.from_state(saved["tokenizer"])
    model = build(Config(**saved["config"]), tokenizer, saved["model"])
    if cfg.distill == "answers":
        limit, flag = model.cfg.block_size, "the teacher's --block_size"
        return align.Teacher(model, tokenizer, model.concept(
            data.pack_answers(tokenizer, answers, limit, flag)))
    known = saved["answers"] or []
    if missing := set(answers) - set(known):
        raise ValueError(f"--teacher={cfg.teacher} was not taught '{min(missing)}': teach it the "
                         "same answers first, with its --phase=distill")
    numbers = [known.index(answer) for answer in answers]
    return align.Teacher(model, tokenizer, saved["concepts"][numbers])

def answer_vectors(cfg, answers, tokenizer):
    """What --teacher says of answers (A strings): (vectors (A, D), `align.Teacher`), each or None.

    The vectors are None where the model is its own teacher; a teacher to align with is a run.
    """
    is_run = cfg.teacher.startswith("ckpt:")
    if cfg.distill == "align":
        if not is_run:
            raise ValueError(
                "--distill=align imitates a run: give its folder, --teacher=ckpt:DIR, not "
                f"{cfg.teacher}; or take --distill=answers")
        teacher = open_teacher(cfg, answers).checked(cfg, tokenizer)
        return teacher.vectors, teacher
    if cfg.teacher == "self":
        return None, None
    if is_run:
        return open_teacher(cfg, answers).vectors, None
    return data.read_vectors(cfg.teacher, answers), None

def set_answers(run, vectors):
    """Standardised L_a of all answers (A, D), from vectors (A, D) or the own target encoder.

    A run that is imitated has standardised its own.
    """
    if run.teacher is not None:
        return vectors.to(run.device)
    if vectors is None:
        vectors = run.model.concept(run.questions.answer_tokens)
    return run.model.fit_answer_scale(vectors.to(run.device))

def known_concepts(run, checkpoint):
    """Standardised L_a of all answers (A, D): those of the checkpoint, and of answers added since.

    Mean and scale stay those of the answers of phase 2, so that no old concept moves.
    """
    questions, known = run.questions, dict(zip(checkpoint["answers"], checkpoint["concepts"]))
    new = [i for i, answer in enumerate(questions.answers) if answer not in known]
    if new:
        vectors, _ = answer_vectors(run.cfg, [questions.answers[i] for i in new],
                                    run.corpus.tokenizer)
        if vectors is None:
            vectors = run.model.concept(questions.answer_tokens[new])
        latents = run.model.standardise(vectors.to(run.device)).detach().cpu()
        known |= {questions.answers[i]: latent for i, latent in zip(new, latents)}
    return torch.stack([known[answer] for answer in questions.answers]).to(run.device)

# -- a run -----------------------------------------------------------------------------------------

def open_checkpoint(cfg, phases, is_text):
    """The checkpoint to continue, {} for a new run. ValueError if --out does not allow it."""
    out = Path(cfg.out)
    if cfg.resume:
        checkpoint = load_checkpoint(out)
        check_resume(cfg, phases, checkpoint)
        return checkpoint
    if phases[0] != "pretrain":
        checkpoint = load_checkpoint(out)
        check_phase_before(cfg, phases, checkpoint, is_text)
        return checkpoint
    if (out / "ckpt.pt").exists():      # never replace another run silently
        same_run(f"--out={out}", load_checkpoint(out)["config"], dataclasses.asdict(cfg))
        return {}
    for name in ("metrics.csv", "config.json"):
        if (out / name).exists():
            raise ValueError(f"--out={out} holds a {name} and no checkpoint: it belongs to "
                             "something else; take another --out")
    return {}

def check_resume(cfg, phases, checkpoint):
    """ValueError if a run can't be resumed as cfg asks."""
    phase, step, saved = checkpoint["phase"], checkpoint["step"], checkpoint["config"]
    last = checkpoint["rows"][-1:]
    if [(row["phase"], row["step"]) for row in last] != [(phase, step)]:
        raise ValueError(f"the checkpoint in --out={cfg.out} contradicts its own log: restore it "
                         "from a copy, or take another --out")
    if phase not in phases:
        raise ValueError(f"--resume: the run in --out={cfg.out} stopped in phase {phase}: "
                         f"leave --phase={cfg.phase} out")
    if cfg.seed != saved["seed"]:
        raise ValueError(f"--seed={cfg.seed}, but the run in --out={cfg.out} has "
                         f"seed={saved['seed']}: leave the flag out, or take another --out")
    for earlier in EVERY[:EVERY.index(phase)]:
        name = f"{earlier}_steps"
        if getattr(cfg, name) != saved[name]:
            raise ValueError(
                f"--{name}={getattr(cfg, name)}: phase {earlier} of the run in --out={cfg.out} "
                f"has ended after {saved[name]} steps, and {phase} stands on it: leave the flag "
                f"out, or take another --out (phase 1 goes on there by --init_from={cfg.out})")
    if getattr(cfg, f"{phase}_steps") < step:
        raise ValueError(f"--{phase}_steps={getattr(cfg, f'{phase}_steps')}: the run in "
                         f"--out={cfg.out} has taken {step} already")

def check_phase_before(cfg, phases, checkpoint, is_text):
    """ValueError if the phase before the first of phases has not ended."""
    phase, step, out = checkpoint["phase"], checkpoint["step"], cfg.out
    steps = checkpoint["config"][f"{phase}_steps"]
    before = EVERY.index(phases[0]) - 1
    if is_text and phases[0] == "speak":
        before = EVERY.index("pretrain")
    ended = step >= steps and checkpoint["evaluated"]
    if EVERY.index(phase) + ended > before:     # the phase before has ended, or a later one began
        if phases[0] == "teach" and checkpoint["answers"] is None:
            raise ValueError(f"--phase=teach adds to answers, and the run in --out={out} was "
                             "taught none: run --phase=distill --qa=FILE first, then --phase=speak")
        return
    command = f"`python train.py --resume --out={out}`"
    if ended:
        command = f"--phase={EVERY[EVERY.index(phase) + 1]}"
    raise ValueError(f"--phase={phases[0]} needs the phase before it, and --out={out} holds "
                     f"{phase} up to step {step} of {steps}: run {command} first")

def open_source(cfg, phases):
    """The checkpoint that --init_from names, {} if phase 1 does not begin with its weights."""
    if not cfg.init_from or cfg.resume or phases[0] != "pretrain":
        return {}
    if os.path.realpath(cfg.init_from) == os.path.realpath(cfg.out):
        raise ValueError(f"--init_from={cfg.init_from} is --out itself: take another --out, or "
                         "more steps there by --resume --pretrain_steps")
    return load_checkpoint(cfg.init_from, "--init_from=")

def open_corpus(cfg, checkpoint):
    """The corpus that cfg names; ValueError if a continued run has read another text."""
    tokenizer = None
    if checkpoint:
        tokenizer = data.Tokenizer.from_state(checkpoint["tokenizer"])
    return data.load(cfg, tokenizer)

def check_cloze(cfg, corpus):
    """ValueError if a statement of the cloze that ends phase 1 is longer than a row."""
    encode = corpus.tokenizer.encode
    values = corpus.values.get("capital", [])
    longest = max((len(encode(" " + value)) for value in values), default=0)
    for item in corpus.cloze:
        if item.relation == "capital":
            before, after = item.statement.split("{a}")
            n = len(encode(" " + before.rstrip())) + longest + len(encode(after))
            if n > cfg.block_size:
                raise ValueError(f"--block_size={cfg.block_size}: '{item.statement}' has up to "
                                 f"{n} tokens: raise it, or raise --vocab_size")

def added_pairs(cfg, phases, checkpoint, tokenizer):
    """What was added to a run by --phase=teach, a list of [question, answer, number of the phase].

    A new phase reads its pairs from --qa; phase 2, begun anew, forgets all of them.
    """
    if phases[0] in ("pretrain", "distill") and not cfg.resume:
        return []
    added = checkpoint["added"]
    if phases[0] != "teach":
        return added
    number = 1 + max((number for _, _, number in added), default=0)
    if cfg.resume and cfg.added == checkpoint["config"]["added"]:
        return added                    # the file may be gone
    if cfg.resume:
        pairs = data.read_fitting(cfg.added, tokenizer, cfg.block_size, cfg.answer_size)
        if [list(pair) for pair in pairs] != [row[:2] for row in added if row[2] == number - 1]:
            raise ValueError(f"--qa={cfg.added}: these are not the facts that the run in "
                             f"--out={cfg.out} is being taught: leave the flag out")
        return added
    if not cfg.added:
        raise ValueError("--phase=teach needs new facts: give --qa=FILE (lines of question, tab, "
                         "answer)")
    pairs = data.read_fitting(cfg.added, tokenizer, cfg.block_size, cfg.answer_size)
    return added + [[question, answer, number] for question, answer in pairs]

def open_questions(cfg, corpus, checkpoint, phase_2_has_begun, added, device):
    """The questions of phases 2 and 3; ValueError if there are none, or other ones than before."""
    if not corpus.qa:
        raise ValueError(
            f"--phase={cfg.phase} needs questions: give --qa=FILE (lines of question, tab, "
            "answer), or leave phase 2 out: --phase=speak says gaps of the text")
    if phase_2_has_begun and checkpoint["questions"] != content_of(corpus.qa):
        raise ValueError(f"--qa={cfg.qa}, --qa_val={cfg.qa_val}: these are not the questions and "
                         "answers that phase 2 was taught: run --phase=distill first")
    rows = corpus.qa
    for number in sorted({number for _, _, number in added}):
        pairs = [(question, answer) for question, answer, at in added if at == number]
        rows = data.add_pairs(rows, pairs, data.QA)
    encode, most = corpus.tokenizer.encode_question, cfg.block_size
    rows = [row for row in rows if row.split != "NEW" or len(encode(row.question)) <= most]
    return data.Questions(rows, corpus.tokenizer, cfg.block_size, cfg.answer_size, device)

def open_teacher_of(cfg, questions, corpus, checkpoint, phase_2_has_begun, left):
    """(vectors (A, D) or None, `align.Teacher` or None) for phase 2.

    Once phase 2 has begun the answers' latents are in the checkpoint. Then a teacher is read only
    if it is still imitated, or named anew: it must be the same by content.
    """
    same_name = phase_2_has_begun and cfg.teacher == checkpoint["config"]["teacher"]
    imitated = cfg.distill == "align" and "distill" in left
    if same_name and not imitated:
        return None, None
    if not phase_2_has_begun and "distill" not in left:
        return None, None
    vectors, teacher = answer_vectors(cfg, questions.answers, corpus.tokenizer)
    content = None if vectors is None else content_of(vectors)
    if phase_2_has_begun and content != checkpoint["teacher"]:
        was = checkpoint["config"]["teacher"]
        raise ValueError(f"--teacher={cfg.teacher}: phase 2 was taught by {was}: "
                         "run --phase=distill first")
    return vectors, teacher

def open_model(cfg, corpus, checkpoint, phases, model):
    """The model of the checkpoint, or a new one. A phase begun anew begins with fresh weights.

    checkpoint: of the run that is continued, or the one that --init_from names.
    """
    untaught = ["W.", "decoder.", "answer_"]
    fresh = dict(pretrain=untaught, distill=untaught, speak=["decoder."]).get(phases[0], [])
    if cfg.resume:
        fresh = []
    return build(cfg, corpus.tokenizer, checkpoint.get("model"), fresh, model)

def begin_log(cfg, checkpoint, phases):
    """The `report.Log` of a run: a phase that is begun anew drops its rows and those after it."""
    rows = checkpoint.get("rows", [])
    if not cfg.resume:
        first = EVERY.index(phases[0])
        rows = [row for row in rows if EVERY.index(row["phase"]) < first]
    return report.Log(cfg.out, rows)

class Opened(NamedTuple):
    """A run that may begin: everything was read and checked, nothing was written."""
    run: Run
    phases: tuple           # that --phase names
    left: tuple             # of these, what is still to do
    checkpoint: dict        # that is continued, {} for a new run
    vectors: torch.Tensor | None    # (A, D) what another teacher says of the answers
    added: list             # what --phase=teach adds or has added, as in a checkpoint

def phases_of(cfg, is_text):
    """The phases that --phase names. A text without questions has nothing to teach in phase 2."""
    if cfg.phase != "all":
        return (cfg.phase,)
    return ("pretrain", "speak") if is_text else PHASES

def check_speech(cfg, checkpoint):
    """ValueError if phase 3 can't say the gaps of a text as cfg asks."""
    if checkpoint.get("questions"):
        raise ValueError(f"--qa= is empty, and the run in --out={cfg.out} was taught questions: "
                         "leave the flag out, or begin with another --out")
    if cfg.memory != "thought":
        raise ValueError(f"--memory={cfg.memory} reads the question, and a text without --qa has "
                         "none: take --memory=thought, or stop after --phase=pretrain")
    if cfg.teacher != "self" or cfg.distill != "answers":
        raise ValueError("--teacher and --distill say how questions are taught: give them with "
                         "--qa=FILE, or leave them out")

def open_run(cfg, corpus, model):
    """Open data, teacher and model of cfg: `Opened`. ValueError where cfg asks the impossible."""
    # a corpus that is given may have questions of its own
    is_text = cfg.is_text and not (corpus and corpus.qa)
    phases = phases_of(cfg, is_text)
    checkpoint = open_checkpoint(cfg, phases, is_text)
    left = phases
    if cfg.resume:
        left = phases[phases.index(checkpoint["phase"]):]
    source = open_source(cfg, phases)
    device, dtype = pick_device(cfg)
    if device == "cpu":
        cfg = dataclasses.replace(cfg, threads=pick_threads(cfg))
    corpus = corpus or open_corpus(cfg, checkpoint or source)
    if checkpoint and checkpoint["corpus"] != corpus.fingerprint:
        raise ValueError(f"--data={cfg.data} is not the text that the run in --out={cfg.out} has "
                         "read: take another --out")
    if "pretrain" in left:
        check_cloze(cfg, corpus)
    cfg = dataclasses.replace(cfg, teacher_width=0)     # set below, by the teacher
    check_memory(dataclasses.replace(cfg, vocab_size=corpus.tokenizer.vocab_size), device)
    questions = vectors = teacher = None
    phase_2_has_begun, added = False, []
    if is_text and phases[-1] == "speak":
        check_speech(cfg, checkpoint)
        print("no --qa: phase 2, which teaches answers to questions, has nothing to do and is "
              "skipped; phase 3 says gaps of the text")
    elif phases != ("pretrain",):
        phase_2_has_begun = left[0] != "pretrain" and (cfg.resume or left[0] in ("speak", "teach"))
        added = added_pairs(cfg, phases, checkpoint, corpus.tokenizer)
        questions = open_questions(cfg, corpus, checkpoint, phase_2_has_begun, added, device)
        # before the model: the teacher's width is the width of W
        vectors, teacher = open_teacher_of(
            cfg, questions, corpus, checkpoint, phase_2_has_begun, left)
        width = checkpoint["config"]["teacher_width"] if phase_2_has_begun else 0
        if vectors is not None:
            width = vectors.size(1)
        cfg = dataclasses.replace(cfg, teacher_width=width)
    net = open_model(cfg, corpus, checkpoint or source, phases, model).to(device)
    this = Run(cfg, net, corpus, device, dtype, questions, None, teacher)
    if phase_2_has_begun:
        this = this._replace(concepts=known_concepts(this, checkpoint))
    if added:
        before = report.newest(row for row in checkpoint["rows"] if row["phase"] != "teach")
        this = this._replace(threshold=before.get("threshold", math.inf))
    if cfg.resume:                      # checks the saved one, before anything is written
        make_optimizer(this, checkpoint["phase"], checkpoint["optimizer"])
    return Opened(this, phases, left, checkpoint, vectors, added)

def begun_anew(out, phases):
    """Must the checkpoint in out be kept, because these phases replace what it was trained in?

    Also before --phase=teach, so that one can go back. A run that was stopped halfway never
    replaces a kept one that had ended.
    """
    if not (out / "ckpt.pt").exists():
        return False
    old = load_checkpoint(out)
    if EVERY.index(old["phase"]) < EVERY.index(phases[0]) and phases[0] != "teach":
        return False
    ended = old["evaluated"] and old["step"] >= old["config"][f"{old['phase']}_steps"]
    return ended or not (out / PREVIOUS).exists()

def train_phases(opened):
    """Train the phases that are left. Nothing of an older run is touched before the first save."""
    run, phases, left, checkpoint, vectors, added = opened
    cfg, out = run.cfg, Path(run.cfg.out)
    log = begin_log(cfg, checkpoint, phases)
    keep_previous = not cfg.resume and begun_anew(out, phases)
    if checkpoint and not says(out, checkpoint["config"]):
        write_config(out, checkpoint["config"])
    if cfg.resume and checkpoint["evaluated"]:      # else its last row is not complete yet
        log.flush()

    # what every checkpoint of this run contains, besides its progress
    state = dict(format=FORMAT, config=dataclasses.asdict(cfg), corpus=run.corpus.fingerprint,
                 tokenizer=run.corpus.tokenizer.state())
    state["shape"] = shape_of(state["config"], state["tokenizer"])
    for name in ("answers", "concepts", "questions", "teacher"):
        state[name] = checkpoint.get(name)
    state["added"] = added
    if run.concepts is not None:
        state |= dict(answers=run.questions.answers, concepts=run.concepts)
    if phases[0] == "distill" and not cfg.resume and checkpoint["answers"]:
        print(f"phase 2 begins anew: the {len(checkpoint['answers'])} answers that the run knows "
              "are replaced; --phase=teach would add to them")

    def save(step, optimizer, evaluated):
        """Write the run as it stands."""
        nonlocal keep_previous
        progress = dict(phase=phase, step=step, evaluated=evaluated, rows=log.rows,
                        model=run.model.state_dict(), optimizer=optimizer.state_dict(),
                        threshold=log.last().get("threshold"))
        save_checkpoint(out, state | progress, keep_previous)
        keep_previous = False

    for phase in left:
        resumed = {}
        if cfg.resume and phase == checkpoint["phase"]:
            resumed = dict(start=checkpoint["step"], optimizer_state=checkpoint["optimizer"],
                           evaluated=checkpoint["evaluated"])
        if phase == "distill" and not resumed:
            run = run._replace(concepts=set_answers(run, vectors))
            state |= dict(answers=run.questions.answers, concepts=run.concepts,
                          questions=content_of(run.corpus.qa),
                          teacher=None if vectors is None else content_of(vectors))
        loss_at, measure = PHASE_OF[phase](run)
        fit(run, phase, loss_at, measure, log, save, **resumed)
    print_summary(run, phases, left, log)
    return log.last()

def print_summary(run, phases, left, log):
    """Print what the phases that were trained, `left` of `phases`, have reached."""
    # phase 2 changes the encoder: what phase 1 measured is not repeated by a later command
    told = [row for row in log.rows if "pretrain" in left or row["phase"] != "pretrain"]
    lines = report.summary(report.newest(told))
    if said := report.alarm(report.newest(told), run.cfg):
        lines.append(said)
    if run.cfg.preset == "minute" and phases == PHASES:
        lines.append(report.MINUTE)
    print("\n".join(lines))
    if phases[-1] == "speak":
        if run.questions is None:
            lines = report.gaps_aloud(run)
        else:
            threshold = log.last()["threshold"]
            lines = report.transcript(run, run.questions, run.concepts, threshold)
        print("\n".join(lines))

def run(cfg, corpus=None, model=tjepa.TJEPA):
    """Run the phases that cfg names: what the command line and the labs call.

    corpus: the one that cfg names, if it has been read already or was changed by an experiment.
    model: a class like `tjepa.TJEPA`, for experiments that change the model.
    Returns the newest value of each column of metrics.csv. ValueError for an impossible cfg.
    """
    out = Path(cfg.out)
    with contextlib.ExitStack() as stack:
        held = (out / "lock").exists()
        if held:                        # refuse at once while another process trains here
            own(out, stack)
        opened = open_run(cfg, corpus, model)
        if not held:                    # a refused command must not create the folder
            out.mkdir(parents=True, exist_ok=True)
            own(out, stack)
        return train_phases(opened)

def next_command(cfg):
    """The command to run after this one."""
    if cfg.phase == "pretrain" and cfg.is_text:
        return (f"python train.py --phase=speak --out={cfg.out}, or to teach answers first "
                f"python train.py --phase=distill --qa=my_qa.tsv --out={cfg.out}")
    if cfg.phase == "pretrain":
        return f"python train.py --phase=distill --out={cfg.out}"
    if cfg.phase == "distill":
        return f"python train.py --phase=speak --out={cfg.out}"
    look = "" if cfg.is_text else f", or look inside: python -m labs.page --out={cfg.out}"
    return f"python sample.py --out={cfg.out}{look}"

def end_bars():
    """Close the progress bars, so that what is printed next begins on a line of its own."""
    for bar in list(tqdm._instances):   # there is no public list of them
        bar.close()

def is_out_of_memory(error):
    """On a GPU, on a CPU (torch has no class of its own for it), or in Python."""
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or isinstance(error, RuntimeError) and "can't allocate memory" in str(error))

def explain(error, cfg):
    """One sentence for an error of a run: what happened, and what to change."""
    if isinstance(error, OSError):      # a full disk, a folder without write permission
        where = f" in {error.filename}" if error.filename else ""
        return (f"{error.strerror or error}{where}: free space or allow writing there; --out says "
                "where a run goes")
    if is_out_of_memory(error):
        accum = cfg.accum if cfg else 1
        return (f"out of memory: raise --accum={accum}, which must divide both batch sizes, and "
                "run it again, with --resume if it has saved")
    return str(error)

def written_at(out):
    """When out/ckpt.pt was written, None if it is not there."""
    path = Path(out) / "ckpt.pt"
    return path.stat().st_mtime_ns if path.exists() else None

def main(argv=None):
    """Command line: bad input is one line and exit code 2; Ctrl-C saves and exits with 130."""
    plain_output()
    signal.signal(signal.SIGINT, INTERRUPTS.handle)
    started = time.perf_counter()
    cfg = before = None                 # until the flags have been understood
    try:
        cfg = resolve(read_flags(Config, argv, "train.py"))
        before = written_at(cfg.out)
        run(cfg)
    except KeyboardInterrupt:
        end_bars()
        said = "stopped; nothing was written"
        if cfg and written_at(cfg.out) != before:
            said = f"stopped and saved; go on with: python train.py --resume --out={cfg.out}"
        print(said, file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise                       # a fault of this program: its traceback says where
        end_bars()
        print(f"train.py: error: {data.printable(explain(error, cfg), None)}", file=sys.stderr)
        sys.exit(2)
    minutes = (time.perf_counter() - started) / 60
    print(f"curves: {Path(cfg.out) / 'curves.png'}   minutes: {minutes:.1f}   "
          f"next: {next_command(cfg)}")

if __name__ == "__main__":
    main()
