"""
The pictures and generated blocks of README.md, each from a run, a results file or a notebook.

    python -m labs.figures --help       what there is
"""
import base64
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure as Canvas
from PIL import Image

from labs import movie
from labs.arms import Flags as LabFlags
from labs.arms import main as command_line
from labs.diagram import diagram
from labs.plots import BLUE, GREEN, ORANGE, PURPLE, RED, bars
from labs.records import REPOSITORY, results
from labs.tables import PAGES, cell, markdown, origin, over_seeds, write_block

ASSETS = REPOSITORY / "assets"
README = REPOSITORY / "README.md"

@dataclasses.dataclass
class Flags:
    """What to draw."""
    diagram: bool = False       # assets/phases.svg: the three phases
    # assets/latents.gif and health.*: two short runs of phase 1, one of which collapses; 10 minutes
    movie: bool = False
    table: bool = False         # the tables of README.md and of the facts page, assets/facts.png
    thumbnails: bool = False    # assets/notebook_*.png: one picture of each notebook
    transcript: str = ""        # a file with the output of train.py: its end, in README.md
    samples: str = ""           # the folder of a run: what sample.py answers about it
    out: str = "out/figures"    # what --movie recorded; remove the folder to train again

# -- the result: exact match of five systems ------------------------------------------------------
# arm of labs/results/facts.csv -> its name and colour in README.md
SYSTEMS = {
    "default": ("default: latents and tokens", BLUE),
    "latents alone": ("latents alone: --recipe=latent", RED),
    "masked LM": ("tokens alone: a masked LM", GREEN),
    "default without phase 1": ("default without phase 1", ORANGE),
    "GPT with small embeddings": ("GPT, as large, twice the steps", PURPLE),
}
COLUMNS = {"DEC": "em_DEC_heldout", "LAT": "em_LAT_heldout", "TXT": "em_TXT_heldout"}
FLOOR = "commonest DEC answer"
# how a question is typed -> its phrasing in the results
WORDINGS = {
    "held-out wording, any letter case": "heldout",
    "natural wording": "natural",
    "held-out wording, one typo": "typo",
}

def draw_bars(rows):
    """assets/facts.png: bars with one standard deviation, and what guessing reaches."""
    figure = Canvas((9, 4), layout="constrained")
    axis = figure.subplots()
    step, middle = 0.16, (len(SYSTEMS) - 1) / 2
    bars(axis, rows, COLUMNS.values(), SYSTEMS, step, 0.145, capsize=3, ecolor="0.15",
         error_kw=dict(lw=1.2))
    for number, arm in enumerate(SYSTEMS):
        for group, name in enumerate(COLUMNS.values()):
            found = over_seeds(rows, arm, name)
            top = found.mean + (found.deviation or 0) + 0.02
            axis.text(group + (number - middle) * step, top, f"{found.mean:.2f}".removeprefix("0"),
                      ha="center", fontsize=8)
    for group, name in enumerate(COLUMNS.values()):
        floor = over_seeds(rows, FLOOR, name).mean
        axis.plot([group - 0.42, group + 0.42], [floor, floor], color="0.2", ls="--", lw=1,
                  label="the relation's commonest DEC answer" if group == 0 else None)
    axis.set_xticks(range(len(COLUMNS)), ["DEC: taught with words", "LAT: taught as latents only",
                                          "TXT: only read"])
    axis.set(ylim=(0, 1.12), ylabel="exact match, share of questions")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(ASSETS / "facts.png", dpi=110, metadata={"Software": None})

def write_table(rows):
    """The table of README.md, and that of questions as people type them on the facts page."""
    lines = [["system, 3 seeds", *COLUMNS]]
    for arm, (name, _) in SYSTEMS.items():
        lines.append([name, *(cell(over_seeds(rows, arm, column)) for column in COLUMNS.values())])
    source = (f"<sub>Written by `python -m labs.figures --table` from "
              f"[facts.csv](labs/results/facts.csv); measured at "
              f"{origin([row for row in rows if row['arm'] in SYSTEMS])}.</sub>")
    write_block(README, "results", f"{markdown(lines)}\n\n{source}")

    lines = [["the question is typed", "DEC", "LAT", "DEC, by the GPT"]]
    for wording, phrasing in WORDINGS.items():
        wanted = (("default", f"sure_DEC_{phrasing}"), ("default", f"sure_LAT_{phrasing}"),
                  ("GPT with small embeddings", f"em_DEC_{phrasing}"))
        lines.append([wording, *(cell(over_seeds(rows, *one)) for one in wanted)])
    refused = [cell(over_seeds(rows, "default", name))
               for name in ("abstain", "abstain_typing", "abstain_nonsense")]
    note = (f"Invented subjects answered with \"I don't know\": {refused[0]}; in small letters, "
            f"without a mark or with a typo: {refused[1]}; 60 lines of nonsense: {refused[2]}.")
    write_block(PAGES / "facts.md", "typed", f"{markdown(lines)}\n\n{note}")

# -- transcripts and thumbnails --------------------------------------------------------------------
ASKED = ("--prompt=\"Who wrote the book 'Sapiens'?\"",
         '--inspect="The capital of France is [Paris]."',
         '--prompt="What is the capital of Trasbonia?"')

SIZE = 420, 200        # pixels of a thumbnail

def write_transcript(path):
    """The last lines of train.py's output, but for the one about files and minutes."""
    lines = re.split(r"[\r\n]+", Path(path).read_text(encoding="utf-8").strip())
    first = next(i for i, line in enumerate(lines)
                 if line.startswith(("pretrain: hit1", "pretrain: R2")))
    text = "\n".join(lines[first:-1])
    write_block(README, "transcript", f"```\n{text}\n```")

def write_samples(folder):
    """What sample.py answers; its first line, which names the device, is left out."""
    parts = []
    for asked in ASKED:
        command = [sys.executable, "sample.py", f"--out={folder}", asked.replace('"', "")]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        said = done.stdout.split("\n", 1)[1].rstrip()
        parts.append(f"$ python sample.py {asked}\n{said}")
    write_block(README, "samples", "```\n" + "\n\n".join(parts) + "\n```")

def draw_thumbnails():
    """assets/notebook_N.png: the largest picture among the outputs of each notebook, made small."""
    for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [output.get("data", {}) for one in cells for output in one.get("outputs", [])]
        images = ["".join(found["image/png"]) for found in outputs if "image/png" in found]
        picture = Image.open(io.BytesIO(base64.b64decode(max(images, key=len)))).convert("RGB")
        picture.thumbnail(SIZE)
        framed = Image.new("RGB", SIZE, "white")
        framed.paste(picture, ((SIZE[0] - picture.width) // 2, (SIZE[1] - picture.height) // 2))
        framed.save(ASSETS / f"notebook_{path.stem.split('_')[0]}.png", optimize=True)

def figures(flags):
    """Draw what the flags ask for."""
    if not any(vars(flags)[field.name] for field in dataclasses.fields(flags)[:-1]):
        raise ValueError("give one of --diagram, --movie, --table, --thumbnails, --transcript=LOG, "
                         "--samples=FOLDER")
    if flags.diagram:
        (ASSETS / "phases.svg").write_text(diagram(), encoding="utf-8")
    if flags.movie:
        runs = {name: movie.recorded(name, Path(flags.out)) for name in movie.RUNS}
        movie.draw_movie(runs, ASSETS)
        movie.draw_health(runs, ASSETS)
    if flags.table:
        rows = results("facts", LabFlags())
        draw_bars(rows)
        write_table(rows)
    if flags.thumbnails:
        draw_thumbnails()
    if flags.transcript:
        write_transcript(flags.transcript)
    if flags.samples:
        write_samples(flags.samples)

if __name__ == "__main__":
    command_line(figures, Flags)
