"""
A run through time, as `labs.page` shows it: of each evaluation the figures, and a map of latents.
"""
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

import report

# figures of a moment of the training: name on the page, columns of metrics.csv of which the first
# measured one is shown, digits
FIGURES = (("latents", ("health",), None), ("loss of phase 1", ("loss_1",), 4),
           ("R2", ("val_r2",), 2), ("std", ("std",), 3),
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
        sizes = [arrays[name].shape[0] for name in ("concepts", "answers")]
        sizes += [arrays[name].shape[0] for name in ("thoughts", "questions", "right")]
        good = sizes[0] == sizes[1] and len(set(sizes[2:])) == 1
        good = good and all(np.isfinite(arrays[name]).all() for name in ("concepts", "thoughts"))
    except (KeyError, IndexError, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        good = False
    if not good:
        raise ValueError(f"{path} is damaged: remove it, the page is then made without it")
    return arrays

def read_frames(folder):
    """The evaluations of a run, a list of `Frame`, and all rows of its metrics.csv."""
    rows, frames = report.read_metrics(folder), []
    for number, row in enumerate(rows):
        if row.keys() & {"val_r2", "threshold", "em_shuffled"}:
            path = Path(folder) / "snapshots" / f"{row['phase']}-{row['step']}.npz"
            reading = [row for row in rows[:number + 1] if row["phase"] == "pretrain"]
            newest = report.newest(rows[:number + 1])
            newest["loss_1"] = report.newest(reading).get("latent", "-")
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
        points = (concepts - mean) @ axes
        names = frame.snapshot["answers"].tolist()
        if after is not None:
            both = [name for name in names if name in after]
            u, _, v = np.linalg.svd(points[[names.index(name) for name in both]].T
                                    @ np.array([after[name] for name in both]))
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

def nearest_frame(frames, phase, step):
    """Of another run, the last evaluation that is not later than a step of a phase."""
    order = report.PHASES.index
    before = [frame for frame in frames if (order(frame.phase), frame.step) <= (order(phase), step)]
    return (before or frames)[-1 if before else 0]

def scaled(points, reach):
    """Points as lists with four digits: the page has a map from -1 to 1."""
    return [[round(float(x) / reach, 4) for x in point] for point in points]

def run_through_time(frames, shown, answers, reach):
    """A run as page.js moves it: a frame for each of `shown`, pairs of (phase, step)."""
    points = points_through_time(frames)
    last = next((frame.snapshot for frame in reversed(frames) if frame.snapshot), None)
    run = dict(answers=None, right=[])
    if last:
        names = last["answers"].tolist()
        run = dict(answers=[answers.index(name) if name in answers else 0 for name in names],
                   right=[names.index(r) if r in names else -1 for r in last["right"].tolist()])
    run["frames"] = []
    for phase, step in shown:
        frame = nearest_frame(frames, phase, step)
        found, moment = points[frames.index(frame)], {}
        if found and len(found[0]) == len(run["answers"]) and len(found[1]) == len(run["right"]):
            moment = dict(concepts=scaled(found[0], reach), thoughts=scaled(found[1], reach))
        run["frames"].append(dict(figures=figures_of(frame.row), health=frame.row.get("health", ""),
                                  **moment))
    return run
