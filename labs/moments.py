"""
A run through time, as `labs.page` shows it: of each evaluation the figures, and a map of latents.
"""
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

import report

# figures of a moment: name on the page, columns of metrics.csv (the first measured one), digits
FIGURES = (("latents", ("health",), None), ("loss of phase 1", ("loss_1",), 4),
           ("hit1", ("hit1",), 3), ("std", ("std",), 3),
           ("right thoughts, taught", ("r1_DEC_heldout", "r1_DEC"), 2),
           ("right thoughts, only read", ("r1_TXT_heldout",), 2),
           ("right words, taught", ("em_DEC_heldout", "em_DEC"), 2),
           ("right words, only read", ("em_TXT_heldout",), 2))

class Frame(NamedTuple):
    """An evaluation of a run: what metrics.csv says of it, and its snapshot if there is one."""
    phase: str
    step: int
    row: dict               # the newest value of each column
    snapshot: dict | None   # of arrays, as `report.keep_snapshot` wrote them

def read_snapshot(path):
    """A snapshot as a dict of arrays, None if there is none; ValueError if it is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        names = "concepts answers thoughts questions right".split()
        concepts, answers, *asked = (arrays[name].shape[0] for name in names)
        good = concepts == answers and len(set(asked)) == 1
        good = good and all(np.isfinite(arrays[name]).all() for name in ("concepts", "thoughts"))
    except (KeyError, IndexError, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        good = False
    if not good:
        raise ValueError(f"{path} is damaged: remove it, the page is then made without it")
    return arrays

def read_frames(folder):
    """The evaluations of a run, a list of `Frame`, and all rows of its metrics.csv."""
    rows, frames = report.read_metrics(folder), []
    newest = dict(loss_1="-")
    for row in rows:
        newest = newest | row
        if row["phase"] == "pretrain":
            newest["loss_1"] = row.get("latent", newest["loss_1"])
        if row.keys() & {"hit1", "threshold", "em_shuffled"}:
            path = Path(folder) / "snapshots" / f"{row['phase']}-{row['step']}.npz"
            frames.append(Frame(row["phase"], row["step"], newest, read_snapshot(path)))
    return frames, rows

def principal_axes(latents):
    """Mean (D,) and the two principal axes (D, 2) of latents (n, D)."""
    mean = latents.mean(0)
    axes = np.linalg.svd(latents - mean, full_matrices=False)[2][:2].T
    # of the two signs the one by which most points lie on the right, and below
    return mean, axes * np.where(((latents - mean) @ axes).sum(0) < 0, -1, 1)

def points_through_time(frames):
    """Points of concepts and thoughts on the two principal axes of each moment, for each frame.

    A list of (concepts (A, 2), thoughts (n, 2)), or None without a snapshot. The last frame comes
    first: each is turned so that its concepts lie as near as possible to those of the next.
    """
    found, after = [], None
    for frame in reversed(frames):
        if frame.snapshot is None:
            found.append(None)
            continue
        concepts = frame.snapshot["concepts"].astype(float)
        thoughts = frame.snapshot["thoughts"].astype(float)
        mean, axes = principal_axes(concepts)
        names = frame.snapshot["answers"].tolist()
        if after is not None:
            both = [i for i, name in enumerate(names) if name in after]
            points = (concepts - mean) @ axes
            u, _, v = np.linalg.svd(points[both].T @ np.array([after[names[i]] for i in both]))
            axes = axes @ u @ v
        points = (concepts - mean) @ axes
        after = dict(zip(names, points))
        found.append((points, (thoughts - mean) @ axes))
    return found[::-1]

def label_of(phase, step):
    """What a moment is called."""
    said = dict(pretrain="phase 1, reading", distill="phase 2, answers are taught as latents",
                speak="phase 3, the decoder learns words", teach="new facts are taught")
    return f"{said[phase]}: step {step}"

def begin_of(rows):
    """Step at which each phase begins, as in curves.png, and the number of all steps."""
    begin, total = {}, 0
    for phase in report.PHASES:
        begin[phase] = total
        total += max((row["step"] for row in rows if row["phase"] == phase), default=0)
    return begin, max(total, 1)

def figures_of(row):
    """The cells of FIGURES for the newest values of a moment."""
    cells = []
    for _, columns, digits in FIGURES:
        value = next((row[column] for column in columns if column in row), "-")
        if isinstance(value, float | int):
            value = f"{value:.{digits}f}" if value >= 0.001 or value <= 0 else f"{value:.0e}"
        cells.append(value)
    return cells

def run_through_time(frames, shown, answers, reach):
    """A run as page.js moves it: at each of `shown`, pairs of (phase, step), its last evaluation
    that is not later. Points have four digits; `reach` becomes 1."""
    points = points_through_time(frames)
    last = next((frame.snapshot for frame in reversed(frames) if frame.snapshot), None)
    run = dict(answers=None, right=[], frames=[])
    if last:
        names = last["answers"].tolist()
        run["answers"] = [answers.index(name) if name in answers else 0 for name in names]
        run["right"] = [names.index(r) if r in names else -1 for r in last["right"].tolist()]
    order = report.PHASES.index
    for phase, step in shown:
        before = [i for i, frame in enumerate(frames)
                  if (order(frame.phase), frame.step) <= (order(phase), step)]
        number = before[-1] if before else 0
        row, found = frames[number].row, points[number]
        moment = dict(figures=figures_of(row), health=row.get("health", ""))
        if found and list(map(len, found)) == [len(run["answers"]), len(run["right"])]:
            for name, part in zip(("concepts", "thoughts"), found):
                moment[name] = [[round(float(x) / reach, 4) for x in point] for point in part]
        run["frames"].append(moment)
    return run
