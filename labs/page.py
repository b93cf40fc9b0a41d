"""
A run as a page: ask it, move its thought, look into its training. One file, without a network.

    python -m labs.page --out=out/tjepa                             writes out/tjepa/page.html
    python -m labs.page --out=out/tjepa --beside=out/collapse       with the training of another run
    python -m tests.page --out=out/tjepa                            does it say what sample.py says?

labs/page.html is the template, labs/tjepa.js the model in JavaScript, labs/page.js what one can do,
labs/moments.py the training.
"""
import base64
import dataclasses
import html
import inspect
import json
import re
import sys
import zlib
from operator import attrgetter
from pathlib import Path

import numpy as np

import data
import report
import sample
import tjepa
from data import printable
from data.checkpoints import write_safely
from flags import plain_output, read_flags
from labs.moments import (
    FIGURES, begin_of, label_of, points_through_time, principal_axes, read_frames, run_through_time)
from train import load_checkpoint

HERE = Path(__file__).parent
# of concepts, by relation
COLOURS = ("#3b82c4", "#e8820c", "#4a9d5b", "#d6455d", "#8f6fc0", "#9a6b4f", "#d97bb8", "#7f8794",
           "#b3a21b", "#22a3b3")
# asked in every page about the shipped facts; the last one is about an invented country
EXAMPLES = ("Who wrote the book 'Sapiens'?", "What is the capital of France?", "currency of japan",
            "Who painted 'The Starry Night'?", "What is the capital of Trasbonia?")
GAP = "The capital of France is [Paris]."
# curves: title, scale, range of y or None, columns of which the first measured one is drawn, its
# phase or None, lines across
CURVES = (
    ("latent loss of phase 1", "log", None, ("latent",), "pretrain", ()),
    ("hit1: predictions nearest to their own target", "linear", (0, 1), ("hit1",), "pretrain", ()),
    ("std x rank / bound (dashed: collapsed)", "linear", (0, 1), ("spread",), None,
     (tjepa.COLLAPSED,)),
    ("right thoughts, taught", "linear", (0, 1), ("r1_DEC_heldout", "r1_DEC"), None, ()),
    ("right words, taught", "linear", (0, 1), ("em_DEC_heldout", "em_DEC"), None, ()),
)
WIDTH, HEIGHT = 260, 110        # of the curves, in units of their SVG

@dataclasses.dataclass
class Flags:
    """Which run becomes a page."""
    out: str = "out/tjepa"      # folder of the run; the page is written into it
    beside: str = ""            # folder of a second run, whose training is shown beside it

# -- weights ---------------------------------------------------------------------------------------

# what the page does not read: heads that only train, and what is tied to another weight
UNUSED = ("predictor.word_proj", "decoder.latent_head", "decoder.token_head", "answer_")

# Bits of a weight, by the beginning of its name; 16 for what is not named. The decoder only has to
# find the likeliest word, and the target encoder gives energies alone. With 16-bit floats the page
# was larger, and its distances were seven times less exact.
BITS = {"decoder.": 13, "target_encoder.": 11}

def pack_weights(weights):
    """Name -> tensor as integers of up to 16 bits, in one text; and name -> [scale, shape].

    First come all upper bytes, then all lower ones: the upper ones repeat, and shrink.
    """
    parts, sizes = [], {}
    for name, value in weights.items():
        bits = next((n for begin, n in BITS.items() if name.startswith(begin)), 16)
        value = value.double().numpy()
        scale = max(np.abs(value).max(), 1e-30) / (2 ** (bits - 1) - 1)
        parts.append(np.round(value / scale).astype("<i2").ravel())
        sizes[name] = [scale, list(value.shape)]
    planes = np.concatenate(parts).view(np.uint8).reshape(-1, 2)
    packed = zlib.compress(planes[:, ::-1].T.tobytes(), 9)
    return base64.b64encode(packed).decode(), sizes

# -- what is drawn beforehand ----------------------------------------------------------------------

def draw_curve(panel, runs):
    """One panel as SVG. runs: the rows of metrics.csv of each run."""
    title, scale, y_range, columns, phase, across = panel
    begin, total = begin_of(runs[0])
    lines = []
    for rows in runs:
        column = report.first_measured(columns, {"": rows}, phase)
        steps, values = report.points(rows, report.Line("", column, phase), begin)
        lines.append((steps, [max(v, 1e-12) if scale == "log" else v for v in values]))
    every = [v for _, values in lines for v in values]
    if not every:
        return ""
    low, high = y_range or (min(every), max(every))

    def height(value):
        """Distance of a value from the upper edge of the panel, in pixels."""
        value = min(max(value, low), high)
        share = (value - low) / (high - low) if high > low else 0.5
        if scale == "log" and high > low:
            share = np.log(value / low) / np.log(high / low)
        return HEIGHT * (1 - share)
    parts = [f'<path class="axis" d="M0 0V{HEIGHT}H{WIDTH}"/>']
    for number, (name, start) in enumerate(begin.items(), start=1):
        if any(row["phase"] == name for row in runs[0]):
            x = WIDTH * start / total
            parts.append(f'<path class="axis" d="M{x:.1f} 0V{HEIGHT + 14}"/>'
                         f'<text x="{x + 3:.1f}" y="{HEIGHT + 13}">phase {number}</text>')
    parts += [f'<path class="limit" d="M0 {height(v):.1f}H{WIDTH}"/>' for v in across]
    for number, (steps, values) in enumerate(lines):
        places = [f"{WIDTH * min(step / total, 1):.1f} {height(value):.1f}"
                  for step, value in zip(steps, values)]
        if places:
            parts.append(f'<path class="run{number}" d="M{" L".join(places)}"/>')
    digits = "{:.0e}" if scale == "log" and low < 0.01 else "{:.2g}"
    parts += [f'<text x="-3" y="8" text-anchor="end">{digits.format(high)}</text>',
              f'<text x="-3" y="{HEIGHT}" text-anchor="end">{digits.format(low)}</text>',
              f'<path class="cursor" d="M0 0V{HEIGHT}"/>']
    box = f"-40 -3 {WIDTH + 42} {HEIGHT + 20}"
    return (f'<figure><figcaption>{title}</figcaption><svg viewBox="{box}" role="img" '
            f'aria-label="{title}">{"".join(parts)}</svg></figure>')

def draw_run(number, command, has_snapshots):
    """The map and the figures of a run through time, empty."""
    cells = "".join(f"<span>{name} <b></b></span>" for name, _, _ in FIGURES)
    picture = (f'<svg class="map" id="run{number}" viewBox="-1.08 -1.08 2.16 2.16" role="img" '
               'aria-label="Concepts and thoughts of the run"></svg>')
    if not has_snapshots:
        picture = ("<p>This run kept no snapshots, so no map moves here: a run that is trained now "
                   "keeps them.</p>")
    return (f'<figure class="run"><h3><span class="key{number}">&#9632;</span> '
            f"<code>{html.escape(command)}</code></h3>"
            f'<div class="figures" id="figures{number}">{cells}</div>{picture}</figure>')

def code_of(names):
    """The Python source of some parts of tjepa.py, each behind its name."""
    parts = []
    for name in names.split():
        source = inspect.getsource(attrgetter(name)(tjepa))
        source = html.escape(inspect.cleandoc("\n" + source))
        parts.append(f"<details><summary>{name}</summary><pre>{source}</pre></details>")
    return f'<div class="code"><span>tjepa.py:</span>{"".join(parts)}</div>'

# -- the page --------------------------------------------------------------------------------------

def kinds_of(rows, answers):
    """Relation of each answer, (A,) numbers, and the names of the relations."""
    relation = {}
    for row in rows:
        if row.split != "NEVER":
            relation.setdefault(row.answer, row.relation)
    names = sorted(set(relation.values()))
    return [names.index(relation[a]) if a in relation else 0 for a in answers], names

def open_session(out):
    """The run in out, that can be asked, on the CPU; ValueError if it can't."""
    session = sample.open_session(sample.Flags(out=str(out), device="cpu"))
    if session.checkpoint["answers"] is None and session.run.cfg.is_text:
        raise ValueError(f"--out={out}: a run on your own text without questions has no answers to "
                         "map; teach it some by `python train.py --phase=distill --qa=FILE "
                         f"--out={out}`, then --phase=speak")
    sample.require(session, "speak")
    return session

def questions_of(session):
    """The questions of a run, a list of `data.QA`; ValueError if its files have changed."""
    rows = data.read_questions(session.run.cfg, session.tokenizer)
    if session.checkpoint["questions"] not in (None, sample.content_of(rows)):
        raise ValueError(f"--out={session.flags.out}: the questions of the run have changed since "
                         "it was taught; take the version of the program that has trained it")
    return rows

def make_map(model, concepts):
    """Two rows that turn a thought (D,) into a point, and their offset: (2, D), (2,), and the share
    of the spread that the map shows."""
    back = np.linalg.inv(model.answer_scale.double().numpy())
    raw = concepts.double().numpy() @ back + model.answer_mean.double().numpy()
    mean, axes = principal_axes(raw)
    points = (raw - mean) @ axes
    share = (points ** 2).sum() / ((raw - mean) ** 2).sum()
    offset = (model.answer_mean.double().numpy() - mean) @ axes
    return (back @ axes).T, offset, np.abs(points).max(), share

def data_of(session, rows, read):
    """What page.js reads, the weights as text, and the share of the spread that the map shows.

    rows: the questions of the run; read: `read_frames` of each run.
    """
    checkpoint, model = session.checkpoint, session.run.model
    answers = checkpoint["answers"]
    weights = {name: value for name, value in model.state_dict().items()
               if not name.startswith(UNUSED)} | {"concepts": checkpoint["concepts"]}
    packed, sizes = pack_weights(weights)
    weight, offset, reach, explained = make_map(model, checkpoint["concepts"])

    # both runs have one scale, on which nothing leaves the map
    points = [points for frames, _ in read for points in points_through_time(frames) if points]
    farthest = max([np.abs(np.concatenate(pair)).max() for pair in points], default=1)
    shown = [(frame.phase, frame.step) for frame in read[0][0]]
    begin, total = begin_of(read[0][1])
    taught = [row.question for row in rows if row.split == "DEC" and row.phrasing == "trained"]
    everything = dict(
        cfg={field.name: getattr(model.cfg, field.name)
             for field in dataclasses.fields(tjepa.Config)},
        tokenizer=session.tokenizer.state(), sizes=sizes, answers=answers,
        kinds=[kind % len(COLOURS) for kind in kinds_of(rows, answers)[0]],
        threshold=checkpoint["threshold"], others=taught[::max(1, len(taught) // 20)][:20],
        map=dict(weight=dict(data=(weight / reach).ravel().tolist(), shape=list(weight.shape)),
                 bias=dict(data=(offset / reach).tolist(), shape=[2])),
        frames=[dict(x=round(WIDTH * (begin[phase] + step) / total, 1), label=label_of(phase, step))
                for phase, step in shown],
        runs=[run_through_time(frames, shown, answers, farthest) for frames, _ in read])
    return everything, packed, explained

def make_page(out, beside=""):
    """The text of the page of the run in out; beside: a second run, whose training is shown."""
    session = open_session(out)
    cfg, rows = session.run.cfg, questions_of(session)
    folders = [folder for folder in (out, beside) if folder]
    read = [read_frames(folder) for folder in folders]
    everything, packed, explained = data_of(session, rows, read)

    shipped = cfg.data == "facts" and not cfg.qa
    examples = EXAMPLES if shipped else everything["others"][:4]
    n_weights = sum(p.numel() for p in session.run.model.parameters())
    texts = dict(
        title=f"Text T-JEPA: {out}", out=out, seed=cfg.seed, question=examples[0],
        gap=GAP if shipped else "",
        width=everything["map"]["weight"]["shape"][1], explained=f"{explained:.0%}",
        weights_said=f"{n_weights / 1e6:.1f} million", slots=cfg.n_slots,
        last_frame=len(everything["frames"]) - 1,
        time_title="Healthy or collapsed?" if beside else "How it learned")
    recipes = [load_checkpoint(folder)["config"]["recipe"] for folder in folders]
    legend = [f'<span class="kind{i % len(COLOURS)}">&#9679;</span> '
              + html.escape(name.replace("_", " "))
              for i, name in enumerate(kinds_of(rows, everything["answers"])[1])]
    pieces = dict(
        examples="".join(f"<button>{html.escape(question)}</button>" for question in examples),
        legend=", ".join(legend) + ".",
        kinds="\n".join(f".kind{i} {{ fill: {c}; color: {c}; }}" for i, c in enumerate(COLOURS)),
        runs="".join(draw_run(i, f"{folder}: --recipe={recipe}", run["answers"])
                     for i, (folder, recipe, run)
                     in enumerate(zip(folders, recipes, everything["runs"]))),
        curves="".join(draw_curve(panel, [rows for _, rows in read]) for panel in CURVES),
        time_said=time_said(out, beside), wide="" if beside else "narrow",
        data=json.dumps(everything, separators=(",", ":")).replace("<", "\\u003c"), weights=packed)
    return fill_template((HERE / "page.html").read_text(encoding="utf-8"), texts, pieces)

def time_said(out, beside):
    """The sentences above the slider, as HTML."""
    said = ("Dots are concepts, rings the thoughts of 100 questions, lines lead to their right "
            "answers. In phase 1 the model only reads: it predicts the latents of hidden spans. In "
            "phase 2 thoughts are taught to move to their answers; what is unknown goes to the "
            "middle. In phase 3 only the decoder learns. ")
    if beside:
        return said + ("<b>Collapsed</b> means that all texts get the same latent: the dots fall "
                       "into one point. Predicting it is easy, so the loss is tiny, but reading "
                       "has taught nothing. Phase 2 can still teach answers one by one, by "
                       "magnifying what is left. Both maps have the same scale.")
    return said + ("To see a collapsed run beside it: <code>python train.py --recipe=collapse "
                   "--out=out/collapse</code>, then <code>python -m labs.page "
                   f"--out={html.escape(out)} --beside=out/collapse</code>")

def fill_template(template, texts, pieces):
    """page.html with its {{...}} filled: texts are escaped, pieces are HTML already."""
    def fill(found):
        """The text or the piece that a placeholder names."""
        kind, _, rest = found[1].partition(" ")
        if kind == "text":
            return html.escape(str(texts[rest]))
        if kind == "code":
            return code_of(rest)
        if kind == "script":
            return (HERE / rest).read_text(encoding="utf-8")
        return pieces[kind]
    return re.sub(r"\{\{(.*?)\}\}", fill, template)

def main(argv=None):
    """Command line: bad input is one line and exit code 2."""
    plain_output()
    try:
        flags = Flags(**read_flags(Flags, argv, "labs.page"))
        page = make_page(flags.out, flags.beside).encode()
        path = Path(flags.out) / "page.html"
        write_safely(path, page)
    except (ValueError, OSError) as error:
        print(f"labs.page: error: {printable(error, None)}", file=sys.stderr)
        sys.exit(2)
    print(f"{printable(path, None)}: {len(page) / 1e6:.1f} MB; open it in a browser")

if __name__ == "__main__":
    main()
