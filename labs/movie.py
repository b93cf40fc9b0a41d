"""Healthy or collapsed: two short runs of phase 1, drawn by `python -m labs.figures --movie`."""
import csv

import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

import data
import evaluate
import train
from labs.runs import fit

# run -> its flags and colour
RUNS = {"healthy": ({}, "#0072B2"), "collapse": (dict(recipe="collapse"), "#D55E00")}
SHORT = dict(phase="pretrain", batch_size=32, pretrain_steps=240, eval_every=8)
# column of health.csv -> its panel
NUMBERS = {"loss": dict(title="latent loss", yscale="log"),
            "std": dict(title="std of the latents", ylim=(0, 1.05)),
           "rank": dict(title="rank of the latents, at most 128", ylim=(0, 132)),
           "hit1": dict(title="hit1, share of predictions")}

@torch.no_grad()
def answer_latents(run, items):
    """Target latent of the answer inside each statement, (n, C): the mean over its tokens."""
    latents = []
    for item in items:
        before, after = item.statement.split("{a}")
        texts = (" " + before.rstrip(), " " + item.answer, after)
        left, answer, right = (run.corpus.tokenizer.encode(text) for text in texts)
        tokens = torch.tensor([left + answer + right], device=run.device)       # (1, T)
        hidden = run.model.encode(tokens)[0]                                    # (T, C)
        latents.append(hidden[len(left):len(left) + len(answer)].mean(0))
    return torch.stack(latents).cpu().numpy()

def command_of(name):
    """The command of a run, but for its length."""
    flags = RUNS[name][0].items()
    return " ".join(["python train.py", *(f"--{flag}={value}" for flag, value in flags)])

def recorded(name, folder):
    """Arrays of a short run of phase 1, which is trained if the folder does not have them: numbers
    and latents at each evaluation."""
    path = folder / f"{name}.npz"
    if path.exists():
        return dict(np.load(path))
    cfg = train.resolve(SHORT | dict(out=str(folder / name)) | RUNS[name][0])
    corpus = data.load(cfg)
    device, dtype = train.pick_device(cfg)
    model = train.build(cfg, corpus.tokenizer).to(device)
    run = train.Run(cfg, model, corpus, device, dtype)
    figures, latents = [], []

    def measure(whole):
        """Keep the figures and the latents of this moment."""
        figures.append(evaluate.evaluate_text(run, rows=128))
        latents.append(answer_latents(run, corpus.cloze))
        return {}
    log = fit(run, "pretrain", train.pretrain(run)[0], measure)
    steps = np.arange(len(latents)) * cfg.eval_every
    losses = {row["step"]: row.get("latent", np.nan) for row in log.rows}
    found = {name: np.array([row[name] for row in figures])
             for name in ("std", "rank", "hit1", "chance")}
    found |= dict(steps=steps, loss=np.array([losses.get(step, np.nan) for step in steps]),
                  relation=np.array([item.relation for item in corpus.cloze]),
                  latents=np.stack(latents))
    np.savez_compressed(path, **found)
    return found

def frames_of(latents):
    """The latents of each moment (frames, n, C) on their two principal axes, a list of (n, 2), each
    turned to agree with the one before."""
    frames = []
    for moment in latents:
        centred = moment - moment.mean(0)
        points = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        if frames:
            u, _, v = np.linalg.svd(points.T @ frames[-1])
            points = points @ u @ v
        frames.append(points)
    return frames

def draw_movie(runs, folder):
    """latents.gif: the latents of both runs on one scale, an evaluation per frame."""
    frames = {name: frames_of(run["latents"]) for name, run in runs.items()}
    reach = 1.05 * max(np.abs(points).max() for found in frames.values() for points in found)
    figure = Canvas((8, 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    clouds = []
    for axis, (name, run) in zip(axes, runs.items()):
        for number, relation in enumerate(sorted(set(run["relation"]))):
            dots = axis.scatter([], [], s=11, color=f"C{number}", label=relation.replace("_", " "))
            clouds.append((dots, name, run["relation"] == relation))
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  fontsize=9, frameon=False, markerscale=1.6)

    def show(number):
        """Put frame `number` into the picture."""
        for dots, name, mine in clouds:
            dots.set_offsets(frames[name][number][mine])
        for axis, (name, run) in zip(axes, runs.items()):
            axis.set_title(f"{command_of(name)}\nstep {run['steps'][number]}:  "
                           f"std {run['std'][number]:.2f}   hit1 {run['hit1'][number]:.3f}",
                           fontsize=10)
    last = len(frames["healthy"]) - 1
    # the first frame stays for half a second, the last one for two
    order = [0, 0, *range(last + 1), *[last] * 12]
    FuncAnimation(figure, show, order).save(folder / "latents.gif", PillowWriter(fps=6), dpi=80)

def draw_health(runs, folder):
    """health.png: loss, std, rank and hit1 of both runs; health.csv has the numbers."""
    figure = Canvas((9, 6), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for axis, (column, panel) in zip(axes, NUMBERS.items()):
        for name, run in runs.items():
            there = np.isfinite(run[column])
            axis.plot(run["steps"][there], run[column][there], color=RUNS[name][1], lw=2.2,
                      label=command_of(name))
        axis.set(xlabel="optimizer step of phase 1", **panel)
        axis.grid(color="0.92")
    axes[3].axhline(runs["healthy"]["chance"][-1], color="0.3", ls="--", lw=1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  frameon=False, fontsize=12)
    figure.savefig(folder / "health.png", dpi=100, metadata={"Software": None})
    with open(folder / "health.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "step", *NUMBERS])
        for name, run in runs.items():
            for i, step in enumerate(run["steps"]):
                writer.writerow([name, step, *(f"{run[column][i]:.4g}" for column in NUMBERS)])
