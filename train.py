"""
Train a T-JEPA: flags -> corpus -> phases -> one training loop -> checkpoint, metrics, curves.

    python train.py                                                     all phases, shipped facts
    python train.py --phase=pretrain --data=my_book.txt --out=out/book  your own text
    python train.py --phase=distill --qa=my_qa.tsv --out=out/book       teach answers as latents
    python train.py --phase=speak --out=out/book                        learn to speak them
    python train.py --help                                              every flag, what it changes
"""
import dataclasses
import io
import json
import math
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import align
import data
import evaluate
import report
import tjepa
from flags import plain_output, read_flags

PHASES = ("pretrain", "distill", "speak")
FORMAT = 3              # of the checkpoint; older files are refused
INTERRUPTED = []        # filled by Ctrl-C; the loop then stops after a whole step

@dataclasses.dataclass
class Config(tjepa.Config):
    """tjepa.Config shapes the model and its losses; these fields shape a run."""
    GROUPS: ClassVar[dict] = {          # sections of --help; what is not named comes last
        "first of all": ("phase", "out", "data", "qa", "preset", "recipe", "resume", "seed"),
        "how long": ("pretrain_steps", "distill_steps", "speak_steps", "eval_every"),
        "one change, one effect": ("stop_gradient", "ema_half_life", "sigreg", "mlm", "loss",
                                   "target", "top_k", "target_norm", "mask_ratio", "max_span"),
    }
    phase: str = "all"          # pretrain | distill | speak | all; later phases continue --out
    preset: str = "tiny"        # tiny: 305 facts, minutes on a CPU | laptop: all | gpu: wider
    recipe: str = "default"     # default: latents and tokens | latent | paper | v2 | collapse
    out: str = "out/tjepa"      # folder of the run: ckpt.pt, metrics.csv, curves.png, config.json
    data: str = "facts"         # facts, or the path of a UTF-8 .txt (phase 1 needs nothing else)
    facts: str = "tiny"         # which part of the shipped facts: tiny | all
    qa: str = ""                # your own questions: a file of lines question, tab, answer
    tokenizer: str = "bpe"      # bpe: trained on the corpus | gpt2: 50k tokens, downloaded once
    teacher: str = "self"       # gives answers their latents: self | ckpt:DIR | an .npz
    distill: str = "answers"    # phase 2: answers | align: imitate the run --teacher=ckpt:DIR
    align: str = "tokens+pooled+thought"    # what align imitates: tokens, pooled, thought, guess
    rounds: int = 1             # equal parts of phase 2; each begins with a fresh optimizer
    seed: int = 0               # weights, batches and masks follow from it; the text does not
    device: str = "auto"        # auto | cuda | mps | cpu
    dtype: str = "auto"         # auto | fp32 | bf16: bf16 autocast where the hardware gains from it
    compile: bool = False       # torch.compile of phase 1: a long start, then faster on a GPU
    resume: bool = False        # continue --out; on a CPU bit-identical to one uninterrupted run
    batch_size: int = 48        # rows of text a step in phase 1
    masks: int = 1              # span masks drawn for each row; time and memory grow with it
    qa_batch_size: int = 128    # questions a step in phases 2 and 3
    accum: int = 1              # split each batch into this many equal parts, to save memory
    pretrain_steps: int = 800   # steps of phase 1; 0 = the control with a random encoder
    distill_steps: int = 700    # steps of phase 2; 0 = the control that is taught nothing
    speak_steps: int = 500      # steps of phase 3
    pretrain_lr: float = 1e-3   # peak learning rate of phase 1
    distill_lr: float = 5e-4    # peak learning rate of phase 2; if too high, the text is forgotten
    speak_lr: float = 1e-3      # peak learning rate of phase 3
    warmup: float = 0.05        # share of the steps in which the learning rate rises
    weight_decay: float = 0.05  # on matrices; not on norms, biases, embeddings, mask token
    clip: float = 1.0           # largest norm of the gradient
    alpha_start: float = 0.5    # weight of the latent loss in phase 3, falls to 0; v2.0: 0
    echo: float = 0.75          # share of phase 3's rows that are answer latent -> answer
    eval_every: int = 200       # steps between evaluations, checkpoints and redrawn curves

    def __post_init__(self):
        super().__post_init__()
        choices = dict(
            phase=(*PHASES, "all"), preset=tuple(PRESETS), recipe=tuple(RECIPES),
            facts=("tiny", "all"), distill=("answers", "align"), tokenizer=("bpe", "gpt2"),
            device=("auto", "cuda", "mps", "cpu"), dtype=("auto", "fp32", "bf16"))
        parts = f"some of {', '.join(align.PARTS)}, joined by +"
        batches = (self.batch_size, self.qa_batch_size)
        rules = [(name, allowed.__contains__, f"one of {', '.join(allowed)}")
                 for name, allowed in choices.items()]
        tjepa.check(self, (
            *rules,
            ("align", align.known_parts, parts),
            ("batch_size masks qa_batch_size", lambda v: v >= 1, "1 or more"),
            ("accum eval_every rounds", lambda v: v >= 1, "1 or more"),
            ("pretrain_lr distill_lr speak_lr clip", lambda v: 0 < v < math.inf, "above 0"),
            ("pretrain_steps distill_steps speak_steps weight_decay seed",
             lambda v: 0 <= v <= 1e9, "0 to 1000000000"),
            ("rounds", lambda v: self.distill_steps % v == 0,
             f"a divisor of distill_steps = {self.distill_steps}"),
            ("accum", lambda v: all(n % v == 0 for n in batches), "a divisor of both batch sizes"),
            ("warmup alpha_start echo", lambda v: 0 <= v < 1, "at least 0 and below 1"),
        ))

PRESETS = dict(
    tiny={},
    laptop=dict(facts="all", vocab_size=4096, eval_every=800, pretrain_lr=2e-3, distill_lr=1e-3,
                pretrain_steps=2000, distill_steps=4800, speak_steps=3200),
    gpu=dict(facts="all", vocab_size=4096, eval_every=500,
             n_embd=384, n_head=8, n_layer=6, pred_embd=384, batch_size=256, qa_batch_size=512,
             pretrain_steps=10000, distill_steps=4000, speak_steps=4000),
)
LATENT = dict(mlm=0.0, pred_embd=64)    # no token loss; half the width is what the labs measured
RECIPES = dict(
    default={},
    latent=LATENT,
    # v1.1 section 3.1 to the letter
    paper=LATENT | dict(target="span", top_k=1, target_norm=False, loss="mse", sigreg=0.0),
    # v2.0: two phases with cross-entropy alone; the decoder reads the encoder's token latents
    v2=LATENT | dict(distill_steps=0, memory="tokens", alpha_start=0.0),
    # all that prevents a collapse is off
    collapse=LATENT | dict(stop_gradient=False, ema_half_life=0, sigreg=0.0),
)
# A folder holds one run. What shapes the model, its text and its reading can't change in it.
FIXED = ("recipe data facts tokenizer vocab_size block_size n_layer n_head n_embd pred_layer "
         "pred_embd mlm top_k target_norm").split()

# -- from flags to a Config ------------------------------------------------------------------------

def resolve(given):
    """The Config of a command line. Later ones win: defaults, the continued run, preset, recipe,
    the flags given (a dict). ValueError where flags contradict the run that is continued."""
    out = given.get("out", Config.out)
    preset = PRESETS.get(given.get("preset"), {})
    recipe = RECIPES.get(given.get("recipe"), {})
    asked = preset | recipe | given
    base = {}
    if given.get("resume") or given.get("phase") in ("distill", "speak"):
        base = dict(load_checkpoint(out)["config"], resume=False)
        base["out"] = out                               # the folder may have been copied
        same_run(out, base, asked)
    return Config(**base | asked)

def same_run(out, saved, asked):
    """ValueError if asked (a dict of fields) needs another model than the run in out has."""
    for name in FIXED:
        if name in asked and asked[name] != saved[name]:
            raise ValueError(
                f"--{name}={asked[name]}, but the run in --out={out} has {name}={saved[name]}: "
                "leave the flag as it was, or start another run with another --out")

def pick_device(cfg):
    """(device, autocast dtype or None). Prints both, and why they were chosen."""
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
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
    return device, torch.bfloat16 if bf16 else None

# -- checkpoints -----------------------------------------------------------------------------------

def save_checkpoint(out, checkpoint):
    """Write out/ckpt.pt beside and rename it: at every moment one whole checkpoint is there."""
    path = Path(out) / "ckpt.pt"
    part = path.with_suffix(".part")
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)      # in memory first: a full disk is then an ordinary OSError
    with open(part, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)

def load_checkpoint(out, flag="--out="):
    """The dict in out/ckpt.pt. Runs no code from it; ValueError says what is wrong with it."""
    path = Path(out) / "ckpt.pt"
    if not path.exists():
        raise ValueError(f"no checkpoint in {flag}{out}: run `python train.py --out={out}` first "
                         "(its --help lists the phases)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged or no checkpoint of this program ({type(error).__name__}): "
            "restore it from a copy, or train again with another --out") from None
    known = isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT
    if not known or set(checkpoint["config"]) != set(Config.__dataclass_fields__):
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
    concepts: torch.Tensor | None = None    # (A, D) the standardised latents L_a of all answers
    teacher: align.Teacher | None = None    # the run that --distill=align imitates

    def autocast(self):
        """bf16 where --dtype says so."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None)

def build(cfg, tokenizer, weights=None, fresh=(), model=tjepa.TJEPA):
    """A model of class `model`, initialised by cfg.seed, then with the weights of a checkpoint.

    fresh: beginnings of the names of the weights that are not taken from the checkpoint.
    """
    torch.manual_seed(cfg.seed)
    shape = dataclasses.replace(cfg, vocab_size=tokenizer.vocab_size)
    built = model(shape, tokenizer.word_start)
    if weights is None:
        return built
    fresh = tuple(fresh)
    kept = {name: value for name, value in weights.items() if not name.startswith(fresh)}
    try:
        missing, extra = built.load_state_dict(kept, strict=False)
    except RuntimeError:                # a size differs
        missing, extra = [], ["size"]
    if extra or any(not name.startswith(fresh) for name in missing):
        raise ValueError(
            f"the run in --out={cfg.out} has another shape than these flags ask for: leave the "
            "flags that shape the model as they were, or take another --out")
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
        optimizer.load_state_dict(state)
        # A resumed run may change the weight decay, as it may change a learning rate.
        optimizer.param_groups[0]["weight_decay"] = run.cfg.weight_decay
    return optimizer

def learning_rate(step, steps, peak, warmup):
    """Learning rate at a step of `steps`; warmup: share of the steps in which it rises."""
    # 1. linear warm-up to the peak
    rise = (step + 1) / max(1, round(warmup * steps))
    # 2. cosine from the peak at step 0 to a tenth of it at the end
    fall = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    # 3. the lower of the two: with warmup = .05 they meet at .995 of the peak
    return peak * min(rise, fall)

def target_moves(cfg, phase):
    """Does the EMA target follow the context encoder in this phase?

    It does where text is read. Where answers are taught it stands still, because it defines the
    latents of the answers.
    """
    return phase == "pretrain" or (
        phase == "distill" and cfg.distill == "align" and cfg.align != "thought")

IN_BAR = ("loss", "r2", "rank", "health", "r1_LAT_heldout", "em_LAT_heldout")

def format_figure(value):
    """A figure for the progress bar."""
    return f"{value:.3g}" if isinstance(value, float) else value

def fit(run, phase, loss_at, measure, log, save, start=0, optimizer_state=None):
    """The one training loop: every phase and every control trains here.

    loss_at(progress)      draws a batch and returns (loss, stats); progress runs from 0 to 1
    measure(whole)         returns a dict of figures; whole is True at the end of the phase
    log                    a `report.Log`
    save(step, optimizer)  writes a checkpoint
    start, optimizer_state  where a resumed phase continues
    Raises ValueError if the loss is no longer finite, KeyboardInterrupt after Ctrl-C.
    """
    cfg, model = run.cfg, run.model
    steps = getattr(cfg, f"{phase}_steps")
    peak = getattr(cfg, f"{phase}_lr")
    round_steps = steps // cfg.rounds if phase == "distill" else steps
    batch = cfg.batch_size * cfg.block_size if phase == "pretrain" else cfg.qa_batch_size
    optimizer = make_optimizer(run, phase, optimizer_state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    bar = tqdm(total=steps, initial=start, desc=phase, dynamic_ncols=True, mininterval=1)
    figures = {}

    def record(row, evaluated):
        """Log a row; after an evaluation also save and draw."""
        log.write(row | (figures if evaluated else {}))
        if evaluated:
            save(row["step"], optimizer)
        if evaluated and figures:       # a control that is measured elsewhere has nothing to draw
            report.draw_curves(log.rows, PHASES, Path(cfg.out) / "curves.png", title=cfg.out)
        shown = row | figures
        bar.set_postfix({name: format_figure(shown[name]) for name in IN_BAR if name in shown})

    if not start and not optimizer_state:
        figures = measure(not steps)    # where the phase starts stands beside what it reaches
        record(dict(phase=phase, step=0, tokens=0), evaluated=True)

    clock, timed = time.perf_counter(), start
    for step in range(start, steps):
        # Every random draw follows from the seed and the step: a resumed run draws the same.
        torch.manual_seed((cfg.seed * len(PHASES) + PHASES.index(phase)) * 10 ** 9 + step)

        # learning rate; a round of phase 2 begins with a fresh optimizer
        in_round = step % round_steps
        if in_round == 0:
            optimizer.state.clear()
        lr = learning_rate(in_round, round_steps, peak, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # forward and backward, in parts if --accum asks for it
        for _ in range(cfg.accum):
            with run.autocast():
                loss, stats = loss_at(step / steps)
            (loss / cfg.accum).backward()

        # optimizer step
        grad = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
        optimizer.step()
        optimizer.zero_grad()

        # EMA: the target encoder follows the context encoder
        if target_moves(cfg, phase):
            model.ema_update()

        # log every 20 steps, evaluate and save every --eval_every
        bar.update()
        done = step + 1
        interrupted = bool(INTERRUPTED)
        evaluated = done == steps or done % cfg.eval_every == 0 or interrupted
        if evaluated or done % 20 == 0:         # not at each step: reading the loss waits for a GPU
            if not math.isfinite(loss.item() + grad.item()):
                raise ValueError(
                    f"the loss of {phase} is no longer a number at step {done}: lower "
                    f"--{phase}_lr={peak} or --clip={cfg.clip}; --resume goes on from the last "
                    f"good checkpoint in --out={cfg.out}")
            rate = (done - timed) * batch / (time.perf_counter() - clock)
            row = dict(phase=phase, step=done, tokens=done * batch, loss=loss.item(), lr=lr,
                       grad=grad.item(), tok_s=rate)
            row |= {name: float(value) for name, value in stats.items()}
            if evaluated:
                figures = measure(done == steps)
            record(row, evaluated)
            clock, timed = time.perf_counter(), done
        if interrupted:
            raise KeyboardInterrupt
    bar.close()

# -- the phases: each takes a Run and returns (loss_at, measure) for `fit` -------------------------

def pretrain(run):
    """Phase 1: rows of text, spans removed."""
    cfg, model = run.cfg, run.model
    loss_of = torch.compile(model.pretrain_loss) if cfg.compile else model.pretrain_loss
    has_capitals = "capital" in run.corpus.values

    def loss_at(progress):
        """Loss of random rows, mean over their masks."""
        tokens = run.corpus.train.batch(cfg.batch_size // cfg.accum)
        tokens = tokens.to(run.device, non_blocking=True)
        losses, all_stats = [], []
        for _ in range(cfg.masks):
            span_ids = tjepa.sample_spans(tokens, model.word_start, model.cfg)
            loss, stats = loss_of(tokens, span_ids)
            losses.append(loss)
            all_stats.append(stats)
        means = {name: sum(stats[name] for stats in all_stats) / cfg.masks for name in stats}
        return sum(losses) / cfg.masks, means | dict(tau=cfg.ema_decay)

    def measure(whole):
        """Figures on held-out text; at the end also the cloze, if the corpus has one."""
        figures = evaluate.evaluate_text(run)
        if whole and has_capitals:
            figures |= evaluate.cloze(run, "capital")
        return figures
    return loss_at, measure

def distill(run):
    """Phase 2: questions of DEC and LAT facts in trained wordings; no answer token is produced."""
    if run.cfg.distill == "align":
        return align.align(run)
    questions, concepts = run.questions, run.concepts
    taught = questions.where("DEC", "LAT", phrasing="trained")
    answer_latents = concepts[questions.answer_of[taught]]              # (n, D)
    draw = questions.drawing(taught, run.cfg.qa_batch_size // run.cfg.accum)

    def loss_at(progress):
        """Loss of random questions."""
        which, tokens = draw()
        return run.model.distill_loss(tokens, answer_latents[which])
    return loss_at, lambda whole: recall(run, whole)

def recall(run, whole):
    """Figures of the thoughts: of all questions, or between evaluations of held-out wordings."""
    questions = run.questions if whole else run.questions.only("heldout")
    return evaluate.recall(run, questions, run.concepts)

class Lessons(NamedTuple):
    """The rows that phase 3 draws from: questions first, then echoes."""
    texts: torch.Tensor         # (n, T) the question, or the answer that is echoed
    thoughts: tjepa.Thought     # of n rows: L_p of the question, or L_a of the answer
    answers: torch.Tensor       # (n, A) tokens to say, with EOS
    latents: torch.Tensor       # (n, D) L_a
    n_questions: int

def make_lessons(run):
    """`Lessons` of phase 3: questions of DEC facts in trained wordings, and an echo of each answer.

    Thoughts are computed once, because the encoder is frozen. Echoes are of answers alone: when
    half of them were spans of text, LAT facts in new wordings lost .08 exact match.
    """
    questions, concepts = run.questions, run.concepts
    pad, eos = run.corpus.tokenizer.pad, run.corpus.tokenizer.eos
    asked = questions.where("DEC", phrasing="trained")
    answer_of = questions.answer_of[asked]
    echoed = questions.answer_tokens                                    # (A, L)

    rows = [*questions.tokens[asked], *echoed]
    texts = pad_sequence(rows, batch_first=True, padding_value=pad)     # (n, T)
    thoughts = evaluate.think_all(run, texts)
    latent = torch.cat((thoughts.latent[:len(asked)], concepts))        # (n, D)

    answers = torch.cat((echoed[answer_of], echoed))                    # (n, L)
    answers = torch.nn.functional.pad(answers, (0, 1), value=pad)
    ends = (answers != pad).sum(1, keepdim=True)
    answers = answers.scatter(1, ends, eos)
    latents = torch.cat((concepts[answer_of], concepts))
    return Lessons(texts, thoughts._replace(latent=latent), answers, latents, len(asked))

def draw_lessons(run, lessons):
    """Random rows of a step, (qa_batch_size / accum,): questions, and a share --echo of echoes."""
    n = run.cfg.qa_batch_size // run.cfg.accum
    n_echo = round(n * run.cfg.echo)
    n_echoes = len(lessons.texts) - lessons.n_questions
    questions = torch.randint(lessons.n_questions, (n - n_echo,))
    echoes = lessons.n_questions + torch.randint(n_echoes, (n_echo,))
    return torch.cat((questions, echoes)).to(run.device, non_blocking=True)

def speak(run):
    """Phase 3: the decoder learns to say thoughts."""
    lessons = make_lessons(run)
    held_out = run.questions.only("heldout")
    thoughts_of_all = evaluate.think_all(run, run.questions.tokens)
    thoughts_of_held_out = evaluate.think_all(run, held_out.tokens)

    def loss_at(progress):
        """Loss of random lessons; the weight of the latent loss falls to 0 by a cosine."""
        rows = draw_lessons(run, lessons)
        alpha = run.cfg.alpha_start * 0.5 * (1 + math.cos(math.pi * progress))
        loss, stats = run.model.speak_loss(
            lessons.thoughts.rows(rows), lessons.answers[rows], lessons.latents[rows], alpha)
        return loss, stats | dict(alpha=alpha)

    def measure(whole):
        """Exact match: of all questions at the end, of held-out wordings before."""
        if whole:
            return evaluate.exact_match(run, run.questions, thoughts_of_all)
        return evaluate.exact_match(run, held_out, thoughts_of_held_out)
    return loss_at, measure

PHASE_OF = dict(pretrain=pretrain, distill=distill, speak=speak)

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
    return align.Teacher(model, tokenizer, saved["concepts"][[known.index(a) for a in answers]])

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
    """Standardised L_a of all answers (A, D), from vectors (A, D) or the own target encoder."""
    if vectors is None:
        vectors = run.model.concept(run.questions.answer_tokens)
    return run.model.set_answers(vectors.to(run.device))

# -- a run -----------------------------------------------------------------------------------------

def open_checkpoint(cfg, phases):
    """The checkpoint to continue, {} for a new run. ValueError if --out does not allow it."""
    out = cfg.out
    if phases[0] == "pretrain" and not cfg.resume:
        if (Path(out) / "ckpt.pt").exists():            # never replace another run silently
            same_run(out, load_checkpoint(out)["config"], dataclasses.asdict(cfg))
        return {}
    checkpoint = load_checkpoint(out)
    phase, step = checkpoint["phase"], checkpoint["step"]
    steps = checkpoint["config"][f"{phase}_steps"]
    if cfg.resume:
        if phase not in phases:
            raise ValueError(f"--resume: the run in --out={out} stopped in phase {phase}: "
                             f"leave --phase={cfg.phase} out")
        return checkpoint
    before = PHASES.index(phases[0]) - 1
    if (PHASES.index(phase), step) < (before, steps):
        command = f"`python train.py --resume --out={out}`"
        if phase != PHASES[before]:
            command = f"--phase={PHASES[before]}"
        raise ValueError(f"--phase={phases[0]} needs the phase before it, and --out={out} holds "
                         f"{phase} up to step {step} of {steps}: run {command} first")
    return checkpoint

def open_corpus(cfg, checkpoint):
    """The corpus that cfg names; ValueError if a continued run has read another text."""
    tokenizer = None
    if checkpoint:
        tokenizer = data.Tokenizer.from_state(checkpoint["tokenizer"])
    return data.load(cfg, tokenizer)

def open_questions(cfg, corpus, checkpoint, left, device):
    """The questions of phases 2 and 3; ValueError if there are none, or other ones than before."""
    if not corpus.qa:
        raise ValueError(
            f"--phase={cfg.phase} needs questions: give --qa=FILE (lines of question, tab, "
            "answer), or stop after reading with --phase=pretrain")
    questions = data.Questions(
        corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size, device)
    phase_2_has_begun = left[0] != "pretrain" and (cfg.resume or left == ("speak",))
    if phase_2_has_begun and checkpoint["answers"] != questions.answers:
        raise ValueError(f"--qa={cfg.qa}: these are not the answers that phase 2 was taught: "
                         "run --phase=distill first")
    if phase_2_has_begun and "distill" not in left:
        teacher = checkpoint["config"]["teacher"]
        if teacher != cfg.teacher:
            raise ValueError(f"--teacher={cfg.teacher}: phase 2 was taught by {teacher}: "
                             "run --phase=distill first")
    return questions

def open_model(cfg, corpus, checkpoint, phases, model):
    """The model of the checkpoint, or a new one. A phase begun anew begins with fresh weights."""
    fresh = dict(pretrain=[], distill=["W.", "decoder.", "answer_"], speak=["decoder."])[phases[0]]
    if cfg.resume:
        fresh = []
    return build(cfg, corpus.tokenizer, checkpoint.get("model"), fresh, model)

def prepare_folder(cfg, checkpoint, phases):
    """Create --out; keep the checkpoint of a phase that is begun anew; returns the `report.Log`."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    first = PHASES.index(phases[0])
    rows = checkpoint.get("rows", [])
    if cfg.resume:
        return report.Log(out, rows)
    begun_before = not checkpoint or PHASES.index(checkpoint["phase"]) >= first
    if begun_before and (out / "ckpt.pt").exists():
        (out / "ckpt.pt").replace(out / "ckpt.previous.pt")
        print(f"the run that was there is kept as {out / 'ckpt.previous.pt'}, until a phase is "
              "begun anew once more")
    return report.Log(out, [row for row in rows if PHASES.index(row["phase"]) < first])

def run(cfg, corpus=None, model=tjepa.TJEPA):
    """Run the phases that cfg names: what the command line and the labs call.

    corpus: the one that cfg names, if it has been read already or was changed by an experiment.
    model: a class like `tjepa.TJEPA`, for experiments that change the model.
    Returns the newest value of each column of metrics.csv. ValueError for an impossible cfg.
    """
    # open what is there, and check it before anything is written
    phases = PHASES if cfg.phase == "all" else (cfg.phase,)
    checkpoint = open_checkpoint(cfg, phases)
    left = phases
    if cfg.resume:
        left = phases[phases.index(checkpoint["phase"]):]
    device, dtype = pick_device(cfg)
    corpus = corpus or open_corpus(cfg, checkpoint)
    if checkpoint and checkpoint["corpus"] != corpus.fingerprint:
        raise ValueError(f"--data={cfg.data} is not the text that the run in --out={cfg.out} has "
                         "read: take another --out")
    questions = vectors = teacher = None
    if phases != ("pretrain",):
        questions = open_questions(cfg, corpus, checkpoint, left, device)
    if "distill" in left:               # before the model: the teacher's width is the width of W
        vectors, teacher = answer_vectors(cfg, questions.answers, corpus.tokenizer)
        width = 0 if vectors is None else vectors.size(1)
        cfg = dataclasses.replace(cfg, teacher_width=width)
    net = open_model(cfg, corpus, checkpoint, phases, model).to(device)
    this = Run(cfg, net, corpus, device, dtype, questions, None, teacher)
    log = prepare_folder(cfg, checkpoint, phases)

    # what every checkpoint of this run contains, besides its progress
    state = dict(format=FORMAT, config=dataclasses.asdict(cfg), corpus=corpus.fingerprint,
                 tokenizer=corpus.tokenizer.state(), answers=checkpoint.get("answers"),
                 concepts=checkpoint.get("concepts"))

    for phase in left:
        resumed = {}
        if cfg.resume and phase == checkpoint["phase"]:
            resumed = dict(start=checkpoint["step"], optimizer_state=checkpoint["optimizer"])
        if phase == "distill" and not resumed:
            concepts = set_answers(this, vectors)
            state |= dict(answers=questions.answers, concepts=concepts)
        if phase != "pretrain":
            this = this._replace(concepts=state["concepts"].to(device))

        def save(step, optimizer):
            """Write the run as it stands."""
            progress = dict(phase=phase, step=step, model=this.model.state_dict(), rows=log.rows,
                            optimizer=optimizer.state_dict(), threshold=log.last().get("threshold"))
            save_checkpoint(cfg.out, state | progress)
        loss_at, measure = PHASE_OF[phase](this)
        fit(this, phase, loss_at, measure, log, save, **resumed)

    figures = log.last()
    print("\n".join(report.summary(figures)))
    if phases[-1] == "speak":
        lines = report.transcript(this, questions, this.concepts, figures["threshold"])
        print("\n".join(lines))
    return figures

def next_command(cfg):
    """The command to run after this one."""
    if cfg.phase == "pretrain":
        pairs = "" if cfg.data == "facts" else " --qa=my_qa.tsv"
        return f"python train.py --phase=distill{pairs} --out={cfg.out}"
    if cfg.phase == "distill":
        return f"python train.py --phase=speak --out={cfg.out}"
    return f"python sample.py --out={cfg.out}"

def explain(error, cfg):
    """One sentence for an error of a run: what happened, and what to change."""
    if isinstance(error, OSError):      # a full disk, a folder without write permission
        return (f"{error}: free space or allow writing there; "
                f"--out={cfg.out} says where a run goes")
    if isinstance(error, torch.OutOfMemoryError):
        return (f"out of memory: raise --accum={cfg.accum}, which must divide both batch sizes, "
                "and --resume")
    return str(error)

def main(argv=None):
    """Command line: bad input is one line and exit code 2; Ctrl-C saves and exits with 130."""
    plain_output()
    signal.signal(signal.SIGINT, lambda *_: INTERRUPTED.append(True))
    started = time.perf_counter()
    cfg = Config()
    try:
        cfg = resolve(read_flags(Config, argv, "train.py"))
        run(cfg)
    except KeyboardInterrupt:
        print(f"\nstopped and saved; go on with: python train.py --resume --out={cfg.out}",
              file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        print(f"train.py: error: {explain(error, cfg)}", file=sys.stderr)
        sys.exit(2)
    minutes = (time.perf_counter() - started) / 60
    print(f"curves: {Path(cfg.out) / 'curves.png'}   minutes: {minutes:.1f}   "
          f"next: {next_command(cfg)}")

if __name__ == "__main__":
    main()
