"""
Train a T-JEPA: flags -> corpus -> phases -> one training loop -> checkpoint, metrics.csv, curves.png.

    python train.py                                                   all three phases on the shipped facts
    python train.py --phase=pretrain --data=my_book.txt --out=out/book      your own text
    python train.py --phase=distill --qa=my_qa.tsv --out=out/book           teach it your own answers, in latent space
    python train.py --phase=speak --out=out/book                            let it speak
    python train.py --help                                            every flag, and what moves if it moves
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
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import align
import data
import evaluate
import tjepa
from flags import pick_device, read_flags

PHASES = ("pretrain", "distill", "speak")
FORMAT = 2                      # of the checkpoint; raised when an older program could not read a newer file
INTERRUPTED = []                # filled by Ctrl-C; the loop looks at it between two steps, so that a step is whole

@dataclasses.dataclass
class Config(tjepa.Config):
    """tjepa.Config shapes the model and its losses; these fields shape a run."""
    phase: str = "all"          # pretrain | distill | speak | all; distill and speak continue the run in --out
    preset: str = "tiny"        # tiny: 300 facts, minutes on a CPU | laptop: all facts, longer | gpu: wider too
    recipe: str = "default"     # default: latents and tokens | latent: latents alone, narrow | paper: v1.1 section 3.1
    out: str = "out/tjepa"      # folder of the run: ckpt.pt, metrics.csv, curves.png, config.json
    data: str = "facts"         # facts, or the path of a UTF-8 .txt of your own (phase 1 needs nothing else)
    facts: str = "tiny"         # which part of the shipped facts: tiny | all
    qa: str = ""                # your own questions for phases 2 and 3: a file of lines: question, tab, answer
    tokenizer: str = "bpe"      # bpe: trained on the corpus | gpt2: 50k tokens, needs a download once
    teacher: str = "self"       # who says what an answer's latent is: self (the target encoder) | ckpt:DIR | an .npz
    distill: str = "answers"    # phase 2: answers | align: imitate --teacher=ckpt:DIR, after phase 1 (of 0 steps)
    align: str = "tokens+pooled+thought"  # what align compares, joined by +: tokens | pooled | thought | guess
    rounds: int = 1             # equal parts of phase 2: each begins with a fresh optimizer, where the last one ended
    seed: int = 0               # all that is random follows from it, in step k from (seed, k); but the text is the same
    device: str = "auto"        # auto | cuda | mps | cpu
    dtype: str = "auto"         # auto | fp32 | bf16: bf16 autocast where the hardware gains from it
    compile: bool = False       # torch.compile of phase 1: minutes of waiting first, then faster steps on a GPU
    resume: bool = False        # go on where the run in --out stopped; on a CPU bit-identical to an uninterrupted run
    batch_size: int = 48        # rows of text a step in phase 1: steadier steps, linearly more time
    masks: int = 1              # ways to hide a part of each of these rows: more to learn from, more time and memory
    qa_batch_size: int = 128    # questions a step in phases 2 and 3
    accum: int = 1              # split each batch into this many equal parts, if memory is short
    pretrain_steps: int = 800   # steps of phase 1; 0 leaves the encoder at its random initialisation, the control
    distill_steps: int = 700    # steps of phase 2; 0 teaches nothing, the control
    speak_steps: int = 500      # steps of phase 3
    pretrain_lr: float = 1e-3   # peak learning rate of phase 1
    distill_lr: float = 5e-4    # of phase 2: gentler, or it forgets what it read
    speak_lr: float = 1e-3      # of phase 3
    warmup: float = 0.05        # share of the steps over which the learning rate rises, before its cosine to a tenth
    weight_decay: float = 0.05  # on matrices; never on norms, biases, embeddings or the query vector
    clip: float = 1.0           # largest norm of a gradient
    alpha_start: float = 0.5    # weight of the latent loss in phase 3, cosine to 0; 0 is v2.0's single objective
    echo: float = 0.75          # share of phase 3's batch that is answer latent -> answer, no question: words for LAT
    eval_every: int = 200       # steps between evaluations, checkpoints and redrawn curves

    def __post_init__(self):
        super().__post_init__()
        choices = dict(phase=(*PHASES, "all"), preset=tuple(PRESETS), recipe=tuple(RECIPES), facts=("tiny", "all"),
                       distill=("answers", "align"), tokenizer=("bpe", "gpt2"), device=("auto", "cuda", "mps", "cpu"),
                       dtype=("auto", "fp32", "bf16"))
        tjepa.check(self, (
            *((name, allowed.__contains__, f"one of {', '.join(allowed)}") for name, allowed in choices.items()),
            ("align", lambda v: sorted({*v.split("+")} & {*align.PARTS}) == sorted(v.split("+")),
             f"some of {', '.join(align.PARTS)}, joined by +"),
            ("batch_size masks qa_batch_size accum eval_every rounds", lambda v: v >= 1, "1 or more"),
            ("pretrain_lr distill_lr speak_lr clip", lambda v: 0 < v < math.inf, "above 0"),
            ("pretrain_steps distill_steps speak_steps weight_decay seed", lambda v: 0 <= v <= 1e9, "0 to 1000000000"),
            ("rounds", lambda v: self.distill_steps % v == 0, f"a divisor of distill_steps = {self.distill_steps}"),
            ("loss", lambda v: v != "none" or self.mlm, "mse, smooth_l1 or infonce where --mlm=0"),
            ("accum", lambda v: self.batch_size % v == self.qa_batch_size % v == 0, "a divisor of both batch sizes"),
            ("warmup alpha_start echo", lambda v: 0 <= v < 1, "at least 0 and below 1")))

PRESETS = dict(tiny={}, laptop=dict(
    facts="all", vocab_size=4096, pretrain_steps=2000, pretrain_lr=2e-3, distill_steps=4800, distill_lr=1e-3,
    speak_steps=3200, eval_every=800), gpu=dict(
    facts="all", vocab_size=4096, n_embd=384, n_head=8, n_layer=6, pred_embd=384, batch_size=256, qa_batch_size=512,
    pretrain_steps=10000, distill_steps=4000, speak_steps=4000, eval_every=500))
LATENT = dict(mlm=0.0, pred_embd=64)            # half as wide as the tiny encoder: so the labs have measured it
RECIPES = dict(default={}, latent=LATENT, paper=LATENT | dict(
    target="span", top_k=1, target_norm=False, loss="mse", sigreg=0.0, vicreg=0.0))
# the model's shape, its text, and how it reads: a folder holds one run, and a run does not change these
FIXED = tuple("recipe data facts tokenizer vocab_size block_size n_layer n_head n_embd pred_layer pred_embd positions "
              "mlm top_k target_norm".split())

# -- from flags to a Config --------------------------------------------------------------------------------------------
def resolve(given):
    """The Config of a command line: defaults < the run that is continued < preset < recipe < what was given."""
    base, out = {}, given.get("out", Config.out)
    asked = PRESETS.get(given.get("preset"), {}) | RECIPES.get(given.get("recipe"), {}) | given
    if given.get("resume") or given.get("phase") in PHASES[1:]:
        base = {**load_checkpoint(out)["config"], "resume": False, "out": out}      # the folder may have been copied
        same_run(out, base, asked)
    return Config(**{**base, **asked})

def same_run(out, saved, asked):
    """ValueError if a config (or the flags given) asks for other weights than those of the run in out."""
    for name in FIXED:
        if name in asked and asked[name] != saved[name]:
            raise ValueError(f"--{name}={asked[name]}, but the run in --out={out} has {name}={saved[name]}: leave the "
                             "flag as it was, or start another run with another --out")

# -- checkpoints, and the model that fits one --------------------------------------------------------------------------
def save_checkpoint(out, checkpoint):
    """Write to a temporary name, flush to the disk, rename: whatever happens, one whole checkpoint is there."""
    path, buffer = Path(out) / "ckpt.pt", io.BytesIO()
    torch.save(checkpoint, buffer)              # in memory first: a full disk is then an ordinary OSError
    with open(path.with_suffix(".part"), "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".part").replace(path)

def load_checkpoint(out, flag="--out="):
    """The dict in out/ckpt.pt; ValueError says what is wrong with the file. Never runs code from it."""
    path = Path(out) / "ckpt.pt"
    if not path.exists():
        raise ValueError(f"no checkpoint in {flag}{out}: run `python train.py --out={out}` first "
                         "(its --help lists the phases)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of this program ({type(error).__name__}): "
                         "restore it from a copy, or train again with another --out") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format", FORMAT + 1) > FORMAT or (
            set(checkpoint["config"]) != set(Config.__dataclass_fields__)):
        raise ValueError(f"{path} was written by another version or program: take that, or train with another --out")
    return checkpoint

class Run(NamedTuple):
    """What everything below is passed, besides what it works on."""
    cfg: Config
    model: tjepa.TJEPA
    corpus: data.Corpus
    device: str
    dtype: torch.dtype | None

    def autocast(self):
        """bf16 where --dtype says so."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None)

def build(cfg, tokenizer, weights=None, fresh=()):
    """A model for cfg by its seed, with the weights of a checkpoint but for the names that begin with one of fresh."""
    torch.manual_seed(cfg.seed)
    model = tjepa.TJEPA(dataclasses.replace(cfg, vocab_size=tokenizer.vocab_size), tokenizer.word_start)
    if weights is not None:
        kept = {name: value for name, value in weights.items() if not name.startswith(tuple(fresh))}
        try:
            missing, extra = model.load_state_dict(kept, strict=False)
        except RuntimeError:        # a size differs
            missing, extra = [], ["size"]
        if extra or any(not name.startswith(tuple(fresh)) for name in missing):
            raise ValueError(f"the run in --out={cfg.out} has another shape than these flags ask for: leave the flags "
                             "that shape the model as they were, or take another --out")
    return model

# -- the one training loop ---------------------------------------------------------------------------------------------
def groups(parts, weight_decay):
    """Parameter groups of AdamW: decay for matrices, none for norms, biases, embeddings and the query vector."""
    named = [(name, p) for part in parts for name, p in part.named_parameters()]
    matrices = [p for name, p in named if p.dim() > 1 and "embed" not in name]
    rest = [p for name, p in named if p.dim() < 2 or "embed" in name]
    return [dict(params=matrices, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]

def optimizer_for(run, phase, state):
    """AdamW for the parts that a phase trains, from its saved state if there is one; every other part is frozen."""
    parts = run.model.trained_in(phase)
    for part in run.model.children():
        part.requires_grad_(part in parts)
    optimizer = torch.optim.AdamW(groups(parts, run.cfg.weight_decay), lr=getattr(run.cfg, f"{phase}_lr"),
                                  betas=(0.9, 0.98), fused=True)
    if state:
        optimizer.load_state_dict(state)
        optimizer.param_groups[0]["weight_decay"] = run.cfg.weight_decay    # --resume may change it, as it may a rate
    return optimizer

def take_step(run, phase, optimizer, loss_at, progress):
    """One optimizer step of a phase -> (loss and stats of its last part, norm of its gradient)."""
    for _ in range(run.cfg.accum):
        with run.autocast():
            loss, stats = loss_at(progress)
        (loss / run.cfg.accum).backward()
    grad = torch.nn.utils.clip_grad_norm_(sum((group["params"] for group in optimizer.param_groups), []), run.cfg.clip)
    optimizer.step()
    optimizer.zero_grad()
    # the target moves where text is read. Where answers are taught it stands still: it says what their latents are
    if phase == "pretrain" or (phase, run.cfg.distill) == ("distill", "align") and run.cfg.align != "thought":
        run.model.ema_update(run.cfg.tau)
    return loss, stats, grad

def fit(run, phase, loss_at, measure, log, save, start=0, optimizer_state=None):
    """Train the parts that a phase trains, from step start on. Every phase and every control goes through here.
    loss_at(progress) -> (loss, stats) draws its own batch; measure(whole) -> dict of figures, whole at the end;
    save(step, optimizer) writes a checkpoint. ValueError when the loss stops being a number."""
    cfg, optimizer = run.cfg, optimizer_for(run, phase, optimizer_state)
    steps, peak = getattr(cfg, f"{phase}_steps"), getattr(cfg, f"{phase}_lr")
    length = steps // (cfg.rounds if phase == "distill" else 1)                     # of a round
    per_step = cfg.batch_size * cfg.block_size if phase == "pretrain" else cfg.qa_batch_size
    bar, figures = tqdm(total=steps, initial=start, desc=phase, dynamic_ncols=True, mininterval=1), {}

    def report(row, evaluated):
        """Log a row; where the model was evaluated, save and draw too."""
        log.write(row | (figures if evaluated else {}))
        if evaluated:
            save(row["step"], optimizer)
        if evaluated and figures:       # a control that is measured elsewhere has nothing to draw
            evaluate.draw_curves(log.rows, PHASES, Path(cfg.out) / "curves.png")
        shown = row | figures
        bar.set_postfix({name: f"{shown[name]:.3g}" if isinstance(shown[name], float) else shown[name] for name in
                         ("loss", "r2", "rank", "health", "r1_LAT_heldout", "em_LAT_heldout") if name in shown})

    if not start and not optimizer_state:       # what a phase starts from stands beside what it reaches, once
        figures = measure(not steps)
        report(dict(phase=phase, step=0, tokens=0), True)
    since, last = time.perf_counter(), start
    for step in range(start, steps):
        # all that is random in a step follows from the seed and its number: a resumed run cannot tell the difference
        torch.manual_seed((cfg.seed * len(PHASES) + PHASES.index(phase)) * 10 ** 9 + step)
        if not (at := step % length):       # a round begins
            optimizer.state.clear()
        lr = peak * min((at + 1) / max(1, round(cfg.warmup * length)), 0.55 + 0.45 * math.cos(math.pi * at / length))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, stats, grad = take_step(run, phase, optimizer, loss_at, step / steps)
        bar.update()
        done, stop = step + 1, bool(INTERRUPTED)
        evaluated = done == steps or done % cfg.eval_every == 0 or stop
        if evaluated or done % 20 == 0:         # not at each step: here the loop waits for the device
            if not math.isfinite(loss.item() + grad.item()):
                raise ValueError(f"the loss of {phase} is no longer a number at step {done}: lower --{phase}_lr={peak} "
                                 f"or --clip={cfg.clip}; --resume goes on from the last good checkpoint "
                                 f"in --out={cfg.out}")
            row = dict(phase=phase, step=done, tokens=done * per_step, loss=loss.item(), lr=lr, grad=grad.item(),
                       tok_s=(done - last) * per_step / (time.perf_counter() - since),
                       **{name: float(value) for name, value in stats.items()})
            figures = measure(done == steps) if evaluated else figures
            report(row, evaluated)
            since, last = time.perf_counter(), done
        if stop:
            raise KeyboardInterrupt
    bar.close()

# -- the phases: where a batch comes from, and what is measured --------------------------------------------------------
def pretrain(run):
    """Phase 1: (loss_at, measure)."""
    model, cfg = run.model, run.cfg
    loss_of = torch.compile(model.pretrain_loss) if cfg.compile else model.pretrain_loss

    def loss_at(progress):
        """Rows of text, drawn anew; means over their masks."""
        tokens = run.corpus.train.batch(cfg.batch_size // cfg.accum).to(run.device, non_blocking=True)
        losses, stats = zip(*(loss_of(tokens, tjepa.sample_spans(tokens, model.word_start, model.cfg))
                              for _ in range(cfg.masks)))
        means = {name: sum(each[name] for each in stats) / cfg.masks for name in stats[0]}
        return sum(losses) / cfg.masks, means | dict(tau=cfg.tau)
    cloze = evaluate.cloze if "capital" in run.corpus.values else lambda run, relation: {}
    return loss_at, lambda whole: evaluate.evaluate_text(run) | (cloze(run, "capital") if whole else {})

def teacher_vectors(cfg, answers):
    """What the teacher of cfg makes of some answers (A strings): (A, D), or None if the model teaches itself."""
    if not cfg.teacher.startswith("ckpt:"):
        return None if cfg.teacher == "self" else data.read_vectors(cfg.teacher, answers)
    saved = load_checkpoint(cfg.teacher[len("ckpt:"):], "--teacher=ckpt:")
    theirs, tokenizer = Config(**saved["config"]), data.Tokenizer.from_state(saved["tokenizer"])
    return build(theirs, tokenizer, saved["model"]).concept(
        data.pack_answers(tokenizer, answers, theirs.block_size, "the teacher's --block_size"))

def open_teacher(cfg, answers, tokenizer):
    """Whom --distill=align imitates, and what it was taught of a student's answers (A strings): `align.Teacher`."""
    if not cfg.teacher.startswith("ckpt:"):
        raise ValueError(f"--distill=align imitates a run: give its folder, --teacher=ckpt:DIR, not {cfg.teacher}; "
                         "or take --distill=answers")
    saved = load_checkpoint(cfg.teacher[len("ckpt:"):], "--teacher=ckpt:")
    known, theirs = saved["answers"] or [], data.Tokenizer.from_state(saved["tokenizer"])
    if missing := set(answers) - set(known):
        raise ValueError(f"--teacher={cfg.teacher} was not taught '{min(missing)}': teach it the same answers first, "
                         "with its --phase=distill")
    return align.Teacher(build(Config(**saved["config"]), theirs, saved["model"]), theirs,
                         saved["concepts"][[known.index(answer) for answer in answers]]).checked(cfg, tokenizer)

def teach(run, questions, vectors):
    """The teacher's latents of all answers, standardised per dimension: the (A, D) that thoughts are pulled to."""
    model = run.model
    table = model.concept(questions.answer_tokens) if vectors is None else vectors.to(run.device)
    model.concept_mean.copy_(table.mean(0))
    model.concept_std.copy_(table.std(0, correction=0).clamp(min=1e-3))
    return evaluate.standardise(model, table)

def distill(run, questions, table):
    """Phase 2: (loss_at, measure). Facts of DEC and LAT, in trained wordings; no token of an answer is produced."""
    taught, quick = questions.where("DEC", "LAT", phrasing="trained"), questions.only("heldout")
    answers = table[questions.answer_of[taught]]                                        # (n, D)
    draw = questions.drawing(taught, run.cfg.qa_batch_size // run.cfg.accum)

    def loss_at(progress):
        """Questions that are taught, drawn anew."""
        which, asked = draw()
        return run.model.distill_loss(asked, answers[which])
    return loss_at, lambda whole: evaluate.recall(run, questions if whole else quick, table)

def lessons(run, questions, table):
    """What phase 3 draws from, questions first, then echoes (an answer's latent, and its words): texts (n, T), their
    `Thought`s, computed once (the encoder is frozen), words to say (n, A), latents to give (n, D), draw() -> rows."""
    cfg, pad, asked = run.cfg, run.corpus.tokenizer.pad, questions.where("DEC", phrasing="trained")
    # echo is of answers alone: spans of plain text in half of it cost LAT facts in new phrasings .08 when it was tried
    heard, answers = questions.answer_tokens, questions.answer_of[asked]
    texts = pad_sequence([*questions.tokens[asked], *heard], batch_first=True, padding_value=pad)
    pool = evaluate.think_all(run, texts)
    pool = pool._replace(latent=torch.cat((pool.latent[:len(asked)], table)))
    words = torch.nn.functional.pad(torch.cat((heard[answers], heard)), (0, 1), value=pad)
    words = words.scatter(1, (words != pad).sum(1, keepdim=True), run.corpus.tokenizer.eos)

    def draw():
        """Rows of questions and of echoes, drawn anew."""
        n = cfg.qa_batch_size // cfg.accum
        n_echo = round(n * cfg.echo)
        which = torch.cat((torch.randint(len(asked), (n - n_echo,)), len(asked) + torch.randint(len(heard), (n_echo,))))
        return which.to(run.device, non_blocking=True)
    return texts, pool, words, torch.cat((table[answers], table)), draw

def speak(run, questions, table):
    """Phase 3: (loss_at, measure). Speaks what `lessons` draws."""
    cfg, quick = run.cfg, questions.only("heldout")
    _, pool, words, latents, draw = lessons(run, questions, table)
    asks = {whole: (some, evaluate.think_all(run, some.tokens)) for whole, some in ((True, questions), (False, quick))}

    def loss_at(progress):
        """Questions and echoes, drawn anew."""
        which, alpha = draw(), cfg.alpha_start * 0.5 * (1 + math.cos(math.pi * progress))
        loss, stats = run.model.speak_loss(pool.pick(which), words[which], latents[which], alpha)
        return loss, stats | dict(alpha=alpha)
    return loss_at, lambda whole: evaluate.exact_match(run, *asks[whole])

# -- a run -------------------------------------------------------------------------------------------------------------
def open_run(cfg, phases):
    """The checkpoint that a run goes on from, or {} for a new one; ValueError where --out does not allow it."""
    out, path = cfg.out, Path(cfg.out) / "ckpt.pt"
    if phases[0] == "pretrain" and not cfg.resume:
        if path.exists():       # a run that is started over must not silently take the place of another one
            same_run(out, load_checkpoint(out)["config"], dataclasses.asdict(cfg))
        return {}
    checkpoint = load_checkpoint(out)
    phase, step, before = checkpoint["phase"], checkpoint["step"], PHASES.index(phases[0]) - 1
    steps = checkpoint["config"][f"{phase}_steps"]
    if cfg.resume and phase not in phases:
        raise ValueError(f"--resume: the run in --out={out} stopped in phase {phase}: leave --phase={cfg.phase} out")
    if not cfg.resume and (PHASES.index(phase), step) < (before, steps):
        last = f"--phase={PHASES[before]}" if phase != PHASES[before] else f"`python train.py --resume --out={out}`"
        raise ValueError(f"--phase={phases[0]} needs the phase before it, and --out={out} holds {phase} up to step "
                         f"{step} of {steps}: run {last} first")
    return checkpoint

def run(cfg, corpus=None):
    """Run the phases that cfg names: what the command line calls, and an experiment too, of which an arm is a Config.
    corpus: the one that cfg names, if it has been read already, or changed by an experiment.
    Returns the newest value of every column of metrics.csv, as a dict. ValueError where cfg asks what can't be."""
    out, phases = Path(cfg.out), PHASES if cfg.phase == "all" else (cfg.phase,)
    checkpoint = open_run(cfg, phases)
    left = phases[phases.index(checkpoint["phase"]) if cfg.resume else 0:]      # what is still to be run
    device, dtype = pick_device(cfg)
    corpus = corpus or data.load(cfg, data.Tokenizer.from_state(checkpoint["tokenizer"]) if checkpoint else None)
    if checkpoint and checkpoint["corpus"] != corpus.fingerprint:
        raise ValueError(f"--data={cfg.data} is not the text that the run in --out={cfg.out} has read: "
                         "take another --out")
    questions = vectors = teacher = None
    if phases != ("pretrain",):
        if not corpus.qa:
            raise ValueError(f"--phase={cfg.phase} needs questions: give --qa=FILE (lines of question, tab, answer), "
                             "or stop after reading with --phase=pretrain")
        questions = data.Questions(corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size, device)
        if left[0] != "pretrain" and (cfg.resume or left == ("speak",)):                # phase 2 has begun
            if checkpoint["answers"] != questions.answers:
                raise ValueError(f"--qa={cfg.qa}: these are not the answers that phase 2 was taught: "
                                 "run --phase=distill first")
            if "distill" not in left and (then := checkpoint["config"]["teacher"]) != cfg.teacher:
                raise ValueError(f"--teacher={cfg.teacher}: phase 2 was taught by {then}: run --phase=distill first")
    if "distill" in left:               # before the model: the width of the teacher is the width of W
        teacher = open_teacher(cfg, questions.answers, corpus.tokenizer) if cfg.distill == "align" else None
        vectors = teacher.vectors if teacher else teacher_vectors(cfg, questions.answers)
        cfg = dataclasses.replace(cfg, teacher_width=0 if vectors is None else vectors.size(1))
    # a phase that is started anew starts with fresh parts of its own
    fresh = [] if cfg.resume else dict(distill=["W.", "decoder.", "concept_"], speak=["decoder."]).get(phases[0], [])
    this = Run(cfg, build(cfg, corpus.tokenizer, checkpoint.get("model"), fresh).to(device), corpus, device, dtype)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    anew = not cfg.resume and (not checkpoint or PHASES.index(checkpoint["phase"]) >= PHASES.index(phases[0]))
    if anew and (out / "ckpt.pt").exists():
        (out / "ckpt.pt").replace(out / "ckpt.previous.pt")
        print(f"the run that was there is kept as {out / 'ckpt.previous.pt'}, until a phase is begun anew once more")
    log = evaluate.Log(out, [row for row in checkpoint.get("rows", [])      # less what a phase begun anew makes stale
                             if cfg.resume or PHASES.index(row["phase"]) < PHASES.index(phases[0])])
    state = dict(format=FORMAT, config=dataclasses.asdict(cfg), tokenizer=corpus.tokenizer.state(),
                 corpus=corpus.fingerprint, answers=checkpoint.get("answers"), concepts=checkpoint.get("concepts"))
    for phase in left:
        resumed = (checkpoint["step"], checkpoint["optimizer"]) if cfg.resume and phase == checkpoint["phase"] else ()
        if phase == "distill" and not resumed:
            state |= dict(answers=questions.answers, concepts=teach(this, questions, vectors))
        loss_at, measure = pretrain(this) if phase == "pretrain" else dict(
            distill=teacher.align if teacher else distill, speak=speak)[phase](
            this, questions, state["concepts"].to(device))

        def save(step, optimizer):
            """The run as it stands."""
            save_checkpoint(out, state | dict(phase=phase, step=step, model=this.model.state_dict(), rows=log.rows,
                                              optimizer=optimizer.state_dict(), threshold=log.last().get("threshold")))
        fit(this, phase, loss_at, measure, log, save, *resumed)
    print("\n".join(evaluate.summary(log.last())))
    if phases[-1] == "speak":
        print("\n".join(evaluate.transcript(this, questions, state["concepts"].to(device), log.last()["threshold"])))
    return log.last()

def main(argv=None):
    """Command line: bad input is one line and exit code 2; Ctrl-C saves and is exit code 130."""
    signal.signal(signal.SIGINT, lambda *_: INTERRUPTED.append(True))
    started, cfg = time.perf_counter(), Config()
    try:
        run(cfg := resolve(read_flags(Config, argv, "train.py")))
        then = dict(pretrain="train.py --phase=distill" + " --qa=my_qa.tsv" * (cfg.data != "facts"),
                    distill="train.py --phase=speak").get(cfg.phase, "sample.py")
        print(f"curves: {Path(cfg.out) / 'curves.png'}   minutes: {(time.perf_counter() - started) / 60:.1f}   "
              f"next: python {then} --out={cfg.out}")
    except KeyboardInterrupt:
        print(f"\nstopped and saved; go on with: python train.py --resume --out={cfg.out}", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        if isinstance(error, OSError):      # a full disk, a folder without write permission
            error = f"{error}: free space or allow writing there; --out={cfg.out} says where a run goes"
        if isinstance(error, torch.OutOfMemoryError):
            error = f"out of memory: raise --accum={cfg.accum}, which must divide both batch sizes, and --resume"
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
