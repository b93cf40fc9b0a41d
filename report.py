"""
The log, the curves, the snapshots and the summary of a run; and several runs in one picture.

    python report.py out/a out/b                    writes out/curves.png, prints the last figures
    python report.py out/a out/b --out=both.png     another file: .png, .pdf or .svg
    python report.py out/a out/b --follow           redraws every 10 seconds while they train

What a figure means is defined in evaluate.py.
"""
import csv
import functools
import io
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":      # importing torch takes seconds: Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch

import evaluate
import flags
import tjepa
from data.checkpoints import write_safely
from data.inputs import printable

PHASES = ("pretrain", "distill", "speak", "teach")
HIGHLIGHTED = 5     # more coloured lines than this cannot be told apart in one panel
PAUSE = 10          # seconds between two pictures of --follow

# -- the log ---------------------------------------------------------------------------------------
class Log:
    """metrics.csv: one row per log step.

    rows: those of the checkpoint that is continued. Rows that an interrupted run logged after that
    checkpoint are dropped. The file of an older run stays whole until the first flush.
    tokens and tok_s count tokens of text in phase 1, and questions in phases 2 and 3.
    """
    COLUMNS = (
        "phase step tokens loss latent sigreg vicreg mlm token lr tau alpha grad tok_s "
        "val_r2 std rank bound cos cos_centred pos hit1 chance health "
        "cloze_capital cloze_capital_chance cloze_capital_all cloze_capital_all_chance "
    ).split() + [
        f"{figure}_{split}{suffix}"
        for figure in ("r1", "mrr", "em", "sure")
        for split in evaluate.SPLITS
        for suffix in evaluate.PHRASINGS.values()
    ] + "em_shuffled threshold abstain abstain_typing abstain_nonsense auroc".split() + (
        "word_choices word_energy_hit1 word_energy_hit5 word_energy_rank "
        "word_prior_hit1 word_prior_hit5 word_prior_rank "
        "word_head_hit1 word_head_hit5 word_head_rank "
        "word_unigram_hit1 word_unigram_hit5 word_unigram_rank "
        "word_similar_energy_hit1 word_similar_energy_hit5 word_similar_energy_rank "
        "word_similar_head_hit1 word_similar_head_hit5 word_similar_head_rank "
        "word_similar_unigram_hit1 word_similar_unigram_hit5 word_similar_unigram_rank "
        "gap_em gap_f1 gap_em_echo gap_em_shuffled gap_em_common"
    ).split()

    def __init__(self, out, rows):
        self.path = Path(out) / "metrics.csv"
        self.rows = list(rows)
        self.written = None             # number of rows in the file; None: it is an older run's

    def add(self, row):
        """Remember one row (a dict; columns may be missing)."""
        self.rows.append(row)

    def flush(self):
        """Write the rows that were added since the last flush.

        The first time the file is written beside and renamed: a process that dies leaves either
        the old file or the new one.
        """
        if self.written is None:
            part = self.path.with_suffix(".part")
            with open(part, "w", newline="", encoding="utf-8") as file:
                file.write(",".join(self.COLUMNS) + "\n")
                self.write_rows(file, self.rows)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                self.write_rows(file, self.rows[self.written:])
        self.written = len(self.rows)

    def write_rows(self, file, rows):
        """Six significant digits: enough for a plot, and short to read."""
        writer = csv.DictWriter(file, self.COLUMNS, lineterminator="\n")
        for row in rows:
            writer.writerow({
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in row.items()
            })

    def last(self):
        """The newest value of each column: what a run returns."""
        return newest(self.rows)

def newest(rows):
    """The newest value of each column."""
    figures = {}
    for row in rows:
        figures.update(row)
    return figures

def read_metrics(folder):
    """The rows of folder/metrics.csv as dicts of numbers and words; ValueError if it is damaged."""
    path = Path(folder) / "metrics.csv"
    if not path.is_file():
        raise ValueError(f"no metrics.csv in {folder}: give the folder of a run, as in out/tjepa")
    try:
        text = path.read_text(encoding="utf-8")
        # a line without its end is still being written
        lines = text[:text.rfind("\n") + 1].splitlines()
        table = list(csv.reader(lines, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not table or table[0][:2] != ["phase", "step"]:
        raise ValueError(f"{path} is damaged: its first line must begin with phase,step")

    header = table[0]
    rows = []
    for number, cells in enumerate(table[1:], start=2):
        if len(cells) != len(header):
            raise ValueError(f"{path} is damaged: line {number} has {len(cells)} cells, "
                             f"the header has {len(header)}")
        if cells[0] not in PHASES or not cells[1]:
            raise ValueError(f"{path} is damaged: line {number} names no phase or no step")
        rows.append({
            name: read_cell(path, number, name, cell)
            for name, cell in zip(header, cells) if cell
        })
    if not rows:
        raise ValueError(f"{path} has no rows yet")
    return rows

def read_cell(path, number, name, cell):
    """One cell of metrics.csv as a number or a word."""
    if name in ("phase", "health"):
        return printable(cell)
    try:
        if name != "step":
            return float(cell)
        step = int(cell)
        if not 0 <= step <= 10 ** 9:
            raise ValueError("no step")
        return step
    except ValueError:
        raise ValueError(f"{path} is damaged: line {number}, {name}: "
                         f"'{cell[:40]}' is not a number") from None

@functools.cache
def program_version():
    """The commit of this program, with "-dirty" if its files have changed since; or "unknown"."""
    root = Path(__file__).resolve().parent
    # --git-dir: a copy without .git inside of another repository is not a commit of that one
    command = ["git", f"--git-dir={root / '.git'}", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:                     # git is not installed
        return "unknown"
    return found.stdout.strip() or "unknown"

# -- snapshots: where concepts and thoughts lie; labs/page.py moves them through time --------------
def evenly(numbers, most):
    """At most so many of some numbers (n,), evenly spaced."""
    return numbers[torch.linspace(0, len(numbers) - 1, min(len(numbers), most)).long()]

@torch.no_grad()
def keep_snapshot(run, phase, step):
    """Write out/snapshots/PHASE-STEP.npz at an evaluation: 80 kB, and training never reads it.

    concepts (A, D), thoughts (n, D): fp16, on the scale that the teacher gives to answers. There a
    collapse is seen; `TJEPA.standardise` would magnify what is left. answers (A,), questions and
    splits (n,), right (n,): their texts; right is the answer that a question has.
    A run that knows no answers keeps none.
    """
    questions, model = run.questions, run.model
    if questions is None or (run.concepts is None and run.cfg.teacher_width):
        return                          # before phase 2 another teacher has said nothing yet
    which = evenly(torch.arange(len(questions.answers)), 512)
    asked = questions.where(*evaluate.SPLITS, "NEVER", phrasing=evaluate.usual_phrasing(questions))
    asked = evenly(asked, 100)
    thoughts = evaluate.think_all(run, questions.tokens[asked]).latent

    # before phase 2 the scale is 1 and the mean 0
    back = torch.linalg.inv_ex(model.answer_scale.cpu().double()).inverse
    thoughts = thoughts.cpu().double() @ back + model.answer_mean.cpu()
    if run.concepts is None:
        concepts = model.concept(questions.answer_tokens[which]).cpu()
    else:
        concepts = run.concepts[which].cpu().double() @ back + model.answer_mean.cpu()
    rows = [questions.rows[i] for i in asked.tolist()]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, concepts=concepts.half().numpy(), thoughts=thoughts.half().numpy(),
        answers=[questions.answers[i] for i in which], questions=[row.question for row in rows],
        right=[row.answer for row in rows], splits=[row.split for row in rows])
    folder = Path(run.cfg.out) / "snapshots"
    folder.mkdir(exist_ok=True)
    write_safely(folder / f"{phase}-{step}.npz", buffer.getvalue())

# -- the curves of one run -------------------------------------------------------------------------
class Line(NamedTuple):
    """One curve: a column of metrics.csv, in one phase (its name) or in all (None)."""
    label: str
    column: str
    phase: str | None = None

class Panel(NamedTuple):
    """One of the small plots of curves.png."""
    title: str
    unit: str
    lines: tuple                # of Line
    y_range: tuple | None = None
    scale: str = "linear"

PANELS = (
    Panel("losses of phase 1", "loss (log scale)", (
        Line("phase 1: latent", "latent", "pretrain"),
        Line("phase 1: mlm", "mlm", "pretrain"),
        Line("phase 1: sigreg", "sigreg", "pretrain"),
        Line("phase 1: vicreg", "vicreg", "pretrain"),
    ), scale="log"),
    # a random start is far below 0: shown whole, it would flatten what differs above, so it is
    # drawn at the lower edge
    Panel("R2: 0 = no better than the mean", "R2 (cut off below -0.2)", (
        Line("phase 1: held-out text", "val_r2", "pretrain"),
    ), y_range=(-0.2, 1)),
    Panel("spread: std x rank / bound", "share of the bound", (
        Line("spread", "spread"),
    ), y_range=(0, 1)),
    Panel("std across sequences", "std", (
        Line("std", "std"),
    ), y_range=(0, 1.2)),
    Panel("losses of phases 2 and 3", "loss (log scale)", (
        Line("phase 2: latent", "latent", "distill"),
        Line("phase 3: latent", "latent", "speak"),
        Line("phase 3: token", "token", "speak"),
        Line("teach: latent", "latent", "teach"),
        Line("teach: token", "token", "teach"),
    ), scale="log"),
    Panel("hit1 of latents, R@1 of thoughts", "share of latents, of questions", (
        Line("hit1", "hit1"),
        Line("hit1 by chance", "chance"),
        Line("R@1 DEC, training questions", "r1_DEC"),
        Line("R@1 DEC, held-out phrasing", "r1_DEC_heldout"),
        Line("R@1 LAT, held-out phrasing", "r1_LAT_heldout"),
    ), y_range=(0, 1)),
    Panel("exact match of speech", "share of questions", (
        Line("EM DEC, training questions", "em_DEC"),
        Line("EM DEC, held-out phrasing", "em_DEC_heldout"),
        Line("EM LAT, training questions", "em_LAT"),
        Line("EM LAT, held-out phrasing", "em_LAT_heldout"),
        Line("EM TXT, held-out phrasing", "em_TXT_heldout"),
    ), y_range=(0, 1)),
    Panel("own text: hidden word among the first 5", "share of held-out gaps", (
        Line("by energy", "word_energy_hit5"),
        Line("by energy and frequency", "word_prior_hit5"),
        Line("by the masked-LM head", "word_head_hit5"),
        Line("by frequency alone", "word_unigram_hit5"),
    ), y_range=(0, 1)),
    Panel("own text: spoken gaps", "exact match, share of held-out gaps", (
        Line("from the predicted latent", "gap_em"),
        Line("from the target latent", "gap_em_echo"),
        Line("the commonest span each time", "gap_em_common"),
        Line("memory shuffled", "gap_em_shuffled"),
    ), y_range=(0, 1)),
    Panel("effective rank of the latents", "dimensions", (
        Line("rank", "rank"),
        Line("bound", "bound"),
    ), y_range=(0, None)),
)

def value_of(row, column):
    """A value of a row, or None. spread is what `tjepa.health_word` compares with thresholds."""
    if column != "spread":
        return row.get(column)
    if not {"std", "rank", "bound"} <= row.keys():
        return None
    return row["std"] * row["rank"] / row["bound"]

def points(rows, line, begin):
    """Steps and values of a curve. begin: the step at which each phase begins."""
    steps = []
    values = []
    for row in rows:
        value = value_of(row, line.column)
        if value is not None and line.phase in (None, row["phase"]):
            steps.append(begin[row["phase"]] + row["step"])
            values.append(value)
    return steps, values

def plot(axis, steps, values, **style):
    """A thin line; with markers where the points are few, so that a single one is seen too."""
    marker = "." if len(steps) < 20 else ""
    axis.plot(steps, values, **{"marker": marker, "linewidth": 1, **style})

def new_figure(title, n_panels):
    """A figure of n panels in two rows -> (figure, n axes)."""
    # Here and not above: --help should not wait for it. Figure instead of pyplot, which would
    # replace the backend of a notebook.
    from matplotlib.figure import Figure
    columns = max(1, (n_panels + 1) // 2)
    figure = Figure(figsize=(4.25 * columns, 7))
    # set by hand: a layout engine would draw everything twice
    figure.subplots_adjust(0.2 / columns, 0.08, 0.99, 0.87, wspace=0.26, hspace=0.38)
    # a folder may be named $x^ or hold what no font shows
    figure.suptitle(printable(title, None), fontsize=12, parse_math=False)
    axes = list(figure.subplots(2, columns, squeeze=False).flat)
    for axis in axes[n_panels:]:
        axis.remove()
    return figure, axes[:n_panels]

def finish(axis, title, x_label, y_label):
    """Texts around a panel."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label, fontsize=8)
    axis.set_ylabel(y_label, fontsize=8)
    axis.tick_params(which="both", labelsize=8)

def draw_thresholds(axis):
    """The two values of spread at which `tjepa.health_word` changes its word."""
    for word, value in (("collapsed", tjepa.COLLAPSED), ("shrinking", tjepa.HEALTHY)):
        axis.axhline(value, color="0.5", linestyle="--", linewidth=0.8, zorder=0)
        axis.text(1, value, f"{word} below {value}", fontsize=7, color="0.3", ha="right",
                  va="top", transform=axis.get_yaxis_transform())

def save_figure(figure, path):
    """Written beside and renamed: a viewer never opens half a picture."""
    part = path.with_suffix(f".part{path.suffix}")
    with warnings.catch_warnings():     # a folder's name in another script is drawn as boxes
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(part, dpi=110)
    part.replace(path)

def draw_curves(rows, phases, path, title=""):
    """curves.png from the rows of metrics.csv: the phases one after the other.

    A panel of which nothing has been measured yet is left out.
    """
    begin = {}
    total = 0
    for phase in phases:
        begin[phase] = total
        total += max((row["step"] for row in rows if row["phase"] == phase), default=0)

    margin = 0.02 * max(total, 1)
    reached = [phase for phase in phases if any(row["phase"] == phase for row in rows)]
    x_label = f"optimizer step ({', then '.join(reached)})"

    panels = []
    for panel in PANELS:
        if any(points(rows, line, begin)[0] for line in panel.lines):
            panels.append(panel)
    figure, axes = new_figure(title, len(panels))
    for panel, axis in zip(panels, axes):
        if panel.scale == "log":
            axis.set_yscale("log")
        lowest = panel.y_range[0] if panel.y_range else -math.inf
        for line in panel.lines:
            steps, values = points(rows, line, begin)
            if steps:
                plot(axis, steps, [max(value, lowest) for value in values], label=line.label)
        axis.legend(fontsize=7)

        for phase in reached[1:]:
            axis.axvline(begin[phase], color="0.8", zorder=0)
        # all panels share one range, so that a step is at the same place in each of them
        axis.set_xlim(-margin, max(total, 1) + margin)
        if panel.y_range:
            axis.set_ylim(panel.y_range)
        if panel.lines[0].column == "spread":
            draw_thresholds(axis)
        finish(axis, panel.title, x_label, panel.unit)
    save_figure(figure, Path(path))

# -- what a run prints when it ends ----------------------------------------------------------------
def summary(figures):
    """The figures of a run as lines to print; what was not measured is left out."""
    lines = []
    if "hit1" in figures:
        lines.append(pretrain_line(figures))
    lines += word_lines(figures) + gap_lines(figures)
    for name, title in (("r1", "distill: R@1 of the thought"), ("em", "speak: exact match")):
        cells = split_cells(figures, name)
        asked = "trained / held-out phrasing"
        if f"{name}_DEC_heldout" not in figures:
            asked = "on the training questions"
        if cells:
            lines.append(f"{title}, {asked}: {', '.join(cells)}")
    if "em_shuffled" in figures:
        lines.append(f"  with the memory shuffled: {figures['em_shuffled']:.3f}")
    if "auroc" in figures:
        lines.append(f"  NEVER: {figures['abstain']:.2f} answered \"I don't know\", "
                     f"AUROC {figures['auroc']:.2f}")
    return lines

def pretrain_line(figures):
    """Phase 1 in one line."""
    fit = f"hit1 {figures['hit1']:.2f} (chance {figures['chance']:.3f})"
    if "val_r2" in figures:             # by MSE
        fit = f"R2 {figures['val_r2']:.2f}"
    line = (f"pretrain: {fit} on held-out text, "
            f"rank {figures['rank']:.0f} of {figures['bound']}, {figures['health']}")
    if "cloze_capital" in figures:
        line += (f", the capital of lowest energy is right {figures['cloze_capital']:.2f} "
                 f"(chance {figures['cloze_capital_chance']:.3f}), among "
                 f"{1 / figures['cloze_capital_all_chance']:.0f} "
                 f"{figures['cloze_capital_all']:.2f} "
                 f"({figures['cloze_capital_all_chance']:.3f})")
    return line

# One run (seed 0, commit 8dff531, one thread, 1.7 minutes, the flags of this preset): hit1 .01
# (chance .0005), held-out R@1 .81 (DEC) and .73 (LAT), exact match .65 and .44, AUROC .54.
MINUTE = ("--preset=minute is a smoke run: it shows that everything works, and no more. Expect the "
          "word healthy, hit1 above chance, thoughts that are mostly right (R@1), fewer right "
          "words (exact match, of LAT above all), and wrong answers to invented subjects. Judge "
          "the method by the default run")

SUSPECTS = (                    # the settings that let latents collapse, the likeliest first
    ("stop_gradient", lambda value: not value, "if on, the targets get no gradient"),
    ("ema_half_life", lambda value: value == 0, "100 by default: the target moves slowly"),
    ("sigreg", lambda value: value == 0, "1 by default: it spreads the latents"),
    ("target_norm", lambda value: not value, "if on, shrinking the targets gains nothing"),
)

def alarm(figures, cfg):
    """What to print, on a line of its own, if an evaluation found the latents collapsed; or None.

    It names the figure that says so and the flag that is likely at fault.
    """
    if figures.get("health") != "collapsed":
        return None
    reason = f"--pretrain_lr={cfg.pretrain_lr} (lower it)"
    for name, suspicious, remedy in SUSPECTS:
        if suspicious(getattr(cfg, name)):
            reason = f"--{name}={getattr(cfg, name)} ({remedy})"
            break
    return (f"COLLAPSED: spread {value_of(figures, 'spread'):.3f} is below {tjepa.COLLAPSED} "
            f"(std {figures['std']:.3f} x rank {figures['rank']:.0f} / bound {figures['bound']}): "
            "different texts have nearly equal latents, and a low loss means nothing. "
            f"Likely at fault: {reason}")

WORD_SCORES = {
    "energy": "by energy",
    "prior": "by energy and word frequency",
    "head": "by the masked-LM head",
    "unigram": "control: by word frequency alone",
    "similar_energy": "among 100 words about equally frequent, by energy",
    "similar_head": "among these, by the masked-LM head",
    "similar_unigram": "control: among these, by word frequency alone",
}

def word_lines(figures):
    """Hidden words of a text of one's own: a line for each way to choose among the candidates."""
    if "word_choices" not in figures:
        return []
    n = int(figures["word_choices"])
    lines = [f"  hidden word among the {n} commonest, held-out text: hit@1 / hit@5 / median rank "
             f"(chance {1 / n:.2f} / {min(1, 5 / n):.2f} / {(n + 1) // 2})"]
    for name, title in WORD_SCORES.items():
        if f"word_{name}_hit1" in figures:
            hit1, hit5, rank = (figures[f"word_{name}_{kind}"] for kind in ("hit1", "hit5", "rank"))
            lines.append(f"    {title}: {hit1:.2f} / {hit5:.2f} / {rank:.0f}")
    return [*lines, *advice(figures)]

def advice(figures):
    """What to do where spread latents know no words yet."""
    chance = min(1, 5 / figures["word_choices"])
    # among equally frequent words, where there are enough: frequency alone is no knowledge
    found = figures.get("word_similar_energy_hit5", figures["word_energy_hit5"])
    # 256 gaps: two standard errors of hit@5 at chance
    error = (chance * (1 - chance) / 256) ** 0.5
    if found <= chance + 2 * error:
        return ["  latents spread, nothing learned yet: more steps (--pretrain_steps)"]
    return []

def gap_lines(figures):
    """Spoken gaps of a text of one's own."""
    if "gap_em" not in figures:
        return []
    return [f"speak: gaps of 1 to 3 tokens in held-out text: exact match {figures['gap_em']:.3f}, "
            f"token F1 {figures['gap_f1']:.3f}",
            f"  the commonest span each time: {figures['gap_em_common']:.3f}; with the memory "
            f"shuffled: {figures['gap_em_shuffled']:.3f}; from the target latents: "
            f"{figures['gap_em_echo']:.3f}"]

def gaps_aloud(run, n=3):
    """Gaps of held-out text, hidden and said: lines to print."""
    torch.manual_seed(0)
    gaps = evaluate.draw_gaps(run, run.corpus.val, 4 * n, longest=3, alone=True)
    said = evaluate.say(run, tjepa.thought_of(gaps.predicted))
    decode = run.corpus.tokenizer.decode
    lines = []
    for i in range(min(n, len(said))):
        row, begin = gaps.text[i].tolist(), gaps.begin[i].item()
        words = decode(gaps.words[i].tolist())
        end = begin + (gaps.words[i] < run.model.cfg.pad).sum().item()
        before, after = decode(row[max(0, begin - 12):begin]), decode(row[end:end + 12])
        lines += [f"  > {printable(f'...{before} [...]{after} ...', None)}",
                  f"  {printable(said[i], None)}   (hidden: {printable(words.strip(), None)})"]
    return lines

def split_cells(figures, name):
    """'DEC 0.996 / 0.936' for each split: trained / held-out phrasing."""
    cells = []
    for split in evaluate.SPLITS:
        trained = figures.get(f"{name}_{split}")
        heldout = figures.get(f"{name}_{split}_heldout")
        if trained is not None:
            tail = "" if heldout is None else f" / {heldout:.3f}"
            cells.append(f"{split} {trained:.3f}{tail}")
    return cells

def transcript(run, questions, table, threshold):
    """One question each of DEC, LAT and NEVER with its answer: lines to print.

    The phrasing was never trained on, if there is such a phrasing. table (A, D): the concepts.
    """
    notes = {
        "DEC": "taught in latent space and as tokens",
        # its answer alone is: the decoder practises the words of all answers (echo)
        "LAT": "taught in latent space; the decoder never saw this question with its answer",
        "NEVER": "its subject is invented, nothing knows it",
    }
    questions = questions.only("heldout")
    if questions.rows[0].phrasing == "trained":         # there is no other phrasing
        notes["DEC"] = "a training question"
    lines = []
    for split, note in notes.items():
        rows = questions.where(split)[:1]
        if not len(rows):
            continue
        thought = evaluate.think_all(run, questions.tokens[rows])
        distance = torch.cdist(thought.latent, table).min().item()
        known = distance <= threshold
        answer = evaluate.say(run, thought)[0] if known else "I don't know"
        lines += [
            f"{split} ({note})",
            f"  > {questions.rows[rows].question}",
            f"  {answer}   (nearest concept at {distance:.1f}, threshold {threshold:.1f})",
        ]
    return lines

# -- several runs ----------------------------------------------------------------------------------
class Comparison(NamedTuple):
    """A panel with one curve per run: the first of some columns that any of the runs has."""
    title: str
    unit: str
    phase: str
    columns: tuple
    y_range: tuple | None = None
    scale: str = "linear"

COMPARISONS = (
    Comparison("latent loss of phase 1", "loss (log scale)", "pretrain", ("latent",), scale="log"),
    Comparison("R2 on held-out text", "R2 (cut off below -0.2)", "pretrain",
               ("val_r2",), (-0.2, 1)),
    Comparison("spread: std x rank / bound", "share of the bound", "pretrain", ("spread",), (0, 1)),
    Comparison("hit1 of latents", "share of latents", "pretrain", ("hit1",), (0, 1)),
    Comparison("R@1, facts of DEC", "share of questions", "distill",
               ("r1_DEC_heldout", "r1_DEC"), (0, 1)),
    Comparison("R@1, facts of LAT", "share of questions", "distill",
               ("r1_LAT_heldout", "r1_LAT"), (0, 1)),
    Comparison("exact match, facts of DEC", "share of questions", "speak",
               ("em_DEC_heldout", "em_DEC"), (0, 1)),
    Comparison("exact match, facts of LAT", "share of questions", "speak",
               ("em_LAT_heldout", "em_LAT"), (0, 1)),
)
SHOWN = ("hit1", "spread", "r1_DEC_heldout", "r1_LAT_heldout", "em_DEC_heldout", "em_LAT_heldout")

def first_measured(columns, runs, phase=None):
    """The first of some columns that any of the runs has, in a phase or in any; or None."""
    for column in columns:
        for rows in runs.values():
            if any(points([row], Line("", column, phase), dict.fromkeys(PHASES, 0))[0]
                   for row in rows):
                return column
    return None

def draw_comparison(runs, path):
    """One picture of several runs: runs is a dict name -> rows of metrics.csv.

    The first five runs are coloured, the rest is grey. Each panel counts the steps of its own
    phase, because runs may differ in the length of the phases before it.
    """
    at_zero = dict.fromkeys(PHASES, 0)
    panels = [panel for panel in COMPARISONS if first_measured(panel.columns, runs, panel.phase)]
    figure, axes = new_figure("", len(panels))
    for panel, axis in zip(panels, axes):
        if panel.scale == "log":
            axis.set_yscale("log")
        column = first_measured(panel.columns, runs, panel.phase)
        for number, (name, rows) in enumerate(runs.items()):
            steps, values = points(rows, Line(name, column, panel.phase), at_zero)
            if steps and number < HIGHLIGHTED:
                plot(axis, steps, values, color=f"C{number}", zorder=3)
            elif steps:
                plot(axis, steps, values, color="0.8", zorder=1)

        phase = 1 + PHASES.index(panel.phase)
        if panel.y_range:
            axis.set_ylim(panel.y_range)
        if column == "spread":
            draw_thresholds(axis)
        questions = ", training questions"
        if column.endswith("_heldout"):
            questions = ", held-out phrasing"
        title = panel.title + (questions if panel.phase != "pretrain" else "")
        finish(axis, title, f"optimizer step of phase {phase}", panel.unit)
    draw_names(figure, list(runs))
    save_figure(figure, path)

def draw_names(figure, names):
    """One legend for all panels: the runs that have a colour, and how many have none."""
    from matplotlib.lines import Line2D
    # a label that begins with _ would be left out, hence the blank
    labels = [" " * name.startswith("_") + printable(name, None) for name in names]
    handles = [Line2D([], [], color=f"C{number}", label=label)
               for number, label in enumerate(labels[:HIGHLIGHTED])]
    others = len(names) - HIGHLIGHTED
    if others > 0:
        handles.append(Line2D([], [], color="0.8", label=f"{others} more"))
    legend = figure.legend(handles=handles, loc="upper center", ncols=len(handles), fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)

def last_figures(runs):
    """The newest figures of each run as a table: lines to print."""
    figures = {name: newest(rows) for name, rows in runs.items()}
    wanted = [first_measured((column, column.removesuffix("_heldout")), runs) for column in SHOWN]
    columns = [column for column in wanted if column]

    table = [["run", "phase", "step", *columns, "health"]]
    for name, last in figures.items():
        cells = [printable(name, None), last["phase"], str(last["step"])]
        for column in columns:
            value = value_of(last, column)
            cells.append("-" if value is None else f"{value:.3f}")
        table.append([*cells, last.get("health", "-")])

    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for cells in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths)]
        lines.append("  ".join(padded).rstrip())
    return lines

def names_of(folders):
    """A short name for each folder: its own name, or the whole path where two have the same."""
    paths = dict.fromkeys(Path(folder) for folder in folders)
    # not resolve(): it fails where links go round in a circle
    names = [Path(os.path.abspath(path)).name for path in paths]
    return {path: name if names.count(name) == 1 else str(path)
            for path, name in zip(paths, names)}

def read_runs(folders):
    """Name -> rows of metrics.csv, for each folder."""
    return {name: read_metrics(path) for path, name in names_of(folders).items()}

def compare(folders, path, follow):
    """Draw some runs and print their last figures; with follow, redraw until Ctrl-C."""
    runs = read_runs(folders)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_comparison(runs, path)
    try:
        if follow:
            print(f"{path} is redrawn every {PAUSE} seconds; Ctrl-C ends", flush=True)
        while follow:
            time.sleep(PAUSE)
            runs = read_runs(folders)
            draw_comparison(runs, path)
    except KeyboardInterrupt:
        print()
    print("\n".join(last_figures(runs)))
    print(f"curves: {path}")

def main(argv=None):
    """Command line: bad input is one line and exit code 2."""
    flags.plain_output()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = flags.Parser(prog="report.py", description=__doc__, allow_abbrev=False,
                          formatter_class=flags.HelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="folder",
                        help="folder of a run, with its metrics.csv; the first five are coloured")
    parser.add_argument("--out", default="out/curves.png", metavar="FILE",
                        help="picture to write: .png, .pdf or .svg [out/curves.png]")
    parser.add_argument("--follow", action="store_true",
                        help=f"redraw every {PAUSE} seconds until Ctrl-C")
    given = parser.parse_args(argv)
    path = Path(given.out)
    if path.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out={given.out} must end in .png, .pdf or .svg")
    try:
        compare(given.folders, path, given.follow)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))

if __name__ == "__main__":
    main()
