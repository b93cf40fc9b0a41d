"""The page of a lab, labs/pages/<lab>.md: its plot and its tables, drawn from labs/results alone.

    python -m labs.plots facts speaking     these pages
    python -m labs.plots                    all pages

labs/pages/tables.json says which arms and figures the tables show. Error bars are one standard
deviation over seeds; a hollow marker has fewer than three. At most five arms have a colour.
"""
import json
import re
import sys
from types import SimpleNamespace

from matplotlib.figure import Figure as Canvas

from labs.records import REPOSITORY, results
from labs.tables import figure_of, over_seeds, table

PAGES = REPOSITORY / "labs" / "pages"
FLAGS = SimpleNamespace(fast=False, results="labs/results")
# lab -> title of a table -> arms, in order, and columns: title -> figure of the CSV
TABLES = json.loads((PAGES / "tables.json").read_text(encoding="utf-8"))

# a palette that colour-blind readers can tell apart (Okabe and Ito)
BLUE = "#0072B2"        # train.py's default
RED = "#D55E00"         # latents alone
GREEN = "#009E73"       # masked LM
PURPLE = "#AA4499"      # GPT
ORANGE = "#E69F00"      # random weights
GREY = "0.65"

def rows_of(lab):
    """The rows of a lab. For pretraining: budgets and worlds joined."""
    rows = results(lab, FLAGS)
    if lab != "pretraining":
        return rows
    joined = {}
    long = []
    for row in rows:
        world, budget, arm = row["arm"].split(" ", 2)
        into = joined.setdefault((arm, row["seed"]), row | dict(arm=arm))
        into[f"{world} {budget}"] = row["probes"]
        if "cloze_all" in row:
            into[f"cloze {budget}"] = row["cloze_all"]
        if (world, budget) == ("facts", "7M"):
            long.append(row | dict(arm=f"{arm}, 7M"))
    return [*joined.values(), *long]

def arms_of(lab, number):
    """The arms of a table of a page."""
    return list(TABLES[lab].values())[number]["arms"]

def write_tables(lab, rows):
    """Write the tables of a page between its markers. ValueError if it has none."""
    text = "\n\n".join(f"{title}:\n\n{table(rows, part['arms'], part['columns'])}"
                       for title, part in TABLES[lab].items())
    commits = sorted({name for row in rows for name in row["commit"].split()})
    devices = sorted({name for row in rows for name in row["device"].split(", ")})
    source = (f"Written by `python -m labs.plots {lab}`, measured at commit "
              f"{', '.join(commits)} on {', '.join(devices)}.")
    body = f"<!-- {lab} -->\n{source}\n\n{text}\n<!-- /{lab} -->"
    page = PAGES / f"{lab}.md"
    block = re.compile(f"<!-- {lab} -->.*?<!-- /{lab} -->", re.DOTALL)
    new, n = block.subn(lambda _: body, page.read_text(encoding="utf-8"))
    if not n:
        raise ValueError(f"{page}: add the lines <!-- {lab} --> and <!-- /{lab} -->")
    page.write_text(new, encoding="utf-8")

# -- the plots -------------------------------------------------------------------------------------

def dots(axis, rows, arms, name, colours):
    """One arm per line, from the top, in the colour of the arm or in grey."""
    for place, arm in enumerate(arms):
        found = over_seeds(rows, arm, name)
        if found:
            colour = colours.get(arm, GREY)
            axis.errorbar(found.mean, -place, xerr=found.deviation or 0, fmt="o", capsize=2,
                          color=colour, mfc=colour if found.seeds > 2 else "white")
    axis.set_yticks([-place for place in range(len(arms))], arms)
    for text, arm in zip(axis.get_yticklabels(), arms):
        text.set_color(colours.get(arm, "0.35"))
    axis.grid(axis="x", color="0.9")

def curve(axis, points, label, colour=None):
    """A curve with error bars. points: x -> Figure. Without a colour it is grey, with no label."""
    points = {x: found for x, found in points.items() if found}
    means = [found.mean for found in points.values()]
    spread = [found.deviation or 0 for found in points.values()]
    axis.errorbar(list(points), means, yerr=spread if any(spread) else None, marker="o", capsize=2,
                  color=colour or GREY, label=label if colour else None, zorder=2 if colour else 1)

def log_axis(axis, ticks):
    """A logarithmic x axis with these ticks."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()

def collapse(axis, rows):
    """R@1 of all arms, the best at the top."""
    name = "r1_LAT_heldout"
    arms = sorted({row["arm"] for row in rows}, key=lambda arm: -over_seeds(rows, arm, name).mean)
    colours = {"default": BLUE, "paper": RED, "frozen random target": PURPLE, "no EMA": ORANGE,
               "no stop-gradient": GREEN}
    dots(axis, rows, arms, name, colours)
    axis.axvline(over_seeds(rows, "random-init encoder", name).mean, color=GREY, linestyle="--")
    axis.set(xlim=(0, 1), xlabel="R@1 of LAT questions, held-out (dashed: random-init encoder)")

def pretraining(probes, cloze, rows):
    """Probes and cloze after two budgets of tokens."""
    colours = {"default": BLUE, "latent": RED, "masked LM": GREEN, "GPT": PURPLE,
               "random-init": ORANGE}
    for axis, name in ((probes, "facts"), (cloze, "cloze")):
        for arm in arms_of("pretraining", 0):
            points = {x: over_seeds(rows, arm, f"{name} {x}M") for x in (2.5, 7)}
            curve(axis, points, arm, colours.get(arm))
        axis.set(xlabel="tokens read, millions", xticks=[2.5, 7], ylim=(0, 1))
    probes.set(title="facts: mean of three probes", ylabel="accuracy, share of items")
    cloze.set(title="facts: cloze", ylabel="share of statements")

def hierarchy(one, all_levels, rows):
    """A level of a grammar against the sentences read; all levels of a deeper one."""
    colours = {"masked LM": GREEN, "latent": RED, "latent sigreg 0.1": PURPLE,
               "latent + masked LM": BLUE, "random-init encoder": ORANGE}
    for arm in ("masked LM", "latent", "latent without predictor", "random-init encoder"):
        points = {}
        for n in (128, 512, 2048, 8192):
            name = f"{arm} L3" if arm.startswith("random") else f"{arm} L3 P{n}"
            seeds = over_seeds(rows, name, "level_2_by_seed").mean.split(",")
            points[n] = figure_of([float(value) for value in seeds])
        curve(one, points, arm, colours.get(arm))
        log_axis(one, list(points))
    for arm in arms_of("hierarchy", 1):
        name = arm.split(" L4")[0]
        points = {n: over_seeds(rows, arm, f"level_{n}") for n in (1, 2, 3)}
        curve(all_levels, points, name, colours.get(name))
    one.set(title="grammar of depth 3, level 2", xlabel="sentences read", ylim=(0, 1),
            ylabel="accuracy of the probe, share of symbols")
    all_levels.set(title="grammar of depth 4, 8,192 sentences", xlabel="level above the tokens",
                   xticks=[1, 2, 3], ylim=(0, 1))

def facts(taught, read, rows):
    """What was taught in latent space alone, and what was only read."""
    former = ["LAT told as tokens", "shuffled L_a", "distill_steps=0"]
    arms = [*arms_of("facts", 0), *arms_of("facts", 3), *(f"former: {name}" for name in former)]
    colours = {"default": BLUE, "recipe=latent": RED, "masked LM": GREEN, "GPT": PURPLE,
               "default from random-init encoder": ORANGE}
    dots(taught, rows, arms, "em_LAT_heldout", colours)
    dots(read, rows, arms, "em_TXT_heldout", colours)
    taught.set(title="LAT: taught in latent space alone")
    read.set(title="TXT: only read", yticklabels=[])
    for axis in (taught, read):
        axis.set(xlim=(-.03, 1.03), xlabel="exact match, share of questions")

def speaking(alpha, memory, unknown, rows):
    """The weight of the latent loss, the memory replaced, and invented subjects."""
    arms = {0: "alpha 0 (v2.0)"} | {x: f"alpha {x}" for x in (0.1, 0.25, 0.5, 0.9)}
    for name, colour in (("early_em_LAT_heldout", None), ("em_LAT_heldout", RED)):
        points = {x: over_seeds(rows, arm, name) for x, arm in arms.items()}
        curve(alpha, points, None, colour)
    for arm, label, colour in (("annealed", "the decoder reads the thought", RED),
                               ("memory=tokens", "it reads token latents", BLUE)):
        points = {kind: over_seeds(rows, arm, f"em_LAT_heldout_memory_{kind}")
                  for kind in ("real", "relation", "shuffled", "random", "zero")}
        curve(memory, points, label, colour)
    for marks in memory.lines:
        marks.set_linestyle("none")
    arms = arms_of("speaking", 3)
    gpts = [row for row in rows if row["arm"].startswith("GPT")]
    colours = {"annealed": RED, "GPT at 5e-4": PURPLE}
    dots(unknown, rows, arms, "auroc_latent", colours)
    dots(unknown, gpts, arms, "auroc_least", colours)
    alpha.set(title="weight of the latent loss", xlabel="alpha, constant", ylim=(0, 1),
              ylabel="exact match, share of LAT questions")
    memory.set(title="memory replaced", xlabel="what the decoder reads", ylim=(0, 1))
    unknown.set(title="invented subjects against DEC", xlim=(0.45, 1.02),
                xlabel="AUROC, T-JEPA and look-up by distance,\nGPTs by their least likely token")

def distillation(axis, rows):
    """What is said against what it cost to train."""
    colours = {"large T-JEPA": GREEN, "medium distilled": BLUE, "small distilled": PURPLE,
               "medium from scratch equal compute": RED,
               "small from scratch equal compute": ORANGE}
    for row in rows:
        if "em_LAT_heldout" in row:
            cost = over_seeds(rows, row["arm"], "pflop").mean
            said = over_seeds(rows, row["arm"], "em_LAT_heldout")
            curve(axis, {cost: said}, row["arm"], colours.get(row["arm"]))
    log_axis(axis, (.001, .01, .1))
    axis.set(xlim=(.0008, .1), ylim=(0, 1.05), ylabel="exact match, share of LAT questions",
             xlabel="computation before phase 3, that of the teacher included, PFLOP")

def llm_jepa(size, settings, rows):
    """Exact match by number of pairs; settings at 1,000 pairs."""
    for tail, label, colour in (("", "lambda 0", BLUE), (" latent", "lambda 1, k 3", RED),
                                (" twice the steps", "lambda 0, twice the steps", GREEN),
                                (" table", "look-up table, no model", PURPLE)):
        points = {n: over_seeds(rows, f"{n}{tail}", "exact") for n in (250, 1000, 8000)}
        curve(size, points, label, colour)
        log_axis(size, list(points))
    size.set(ylim=(0, 1), xlabel="pairs", ylabel="exact match, share of test pairs")
    dots(settings, rows, arms_of("llm_jepa", 1), "exact", {"1000": BLUE, "1000 latent": RED})
    settings.set(title="1,000 pairs", xlabel="exact match, share of test pairs", xlim=(.5, .73))

def speed(step, answer, rows):
    """Cost of a training step and of an answer: one run, no error bars."""
    widths = (128, 256, 512)
    lengths = (1, 4, 16, 64)
    for label, name, colour in (("step: default", "phase 1, pretrain", BLUE),
                                ("step: latents alone", "phase 1, latents alone", RED),
                                ("step: GPT of our blocks", "GPT of our blocks", GREEN)):
        arm = f"Training step: {name}, width {{}}, fp32"
        curve(step, {x: over_seeds(rows, arm.format(x), "ratio") for x in widths}, label, colour)
    for name, colour in (("T-JEPA", ORANGE), ("GPT of equal FLOPs", PURPLE)):
        arm = f"Question of 11 tokens, answer of {{}}: {name}, width 512, fp32"
        points = {n: over_seeds(rows, arm.format(n), "ratio") for n in lengths}
        curve(answer, points, f"answer: {name}", colour)
    log_axis(step, widths)
    log_axis(answer, lengths)
    step.set(title="a training step, CPU", xlabel="width", ylabel="time / nanoGPT's step",
             ylim=(0, 1.5))
    answer.set(title="an answer, CPU, width 512", xlabel="tokens of the answer",
               ylabel="time / GPT of equal parameters", ylim=(0, 1.5))
    for axis in (step, answer):
        axis.axhline(1, color="0.3", linestyle="--")

def planning(length, drift, rows):
    """Success by the length of the shortest plan, and imagined states against the steps."""
    colours = {"world model": BLUE, "shuffled actions": RED, "GPT": PURPLE,
               "random possible actions": GREEN, "random-init encoder": ORANGE}
    for arm in arms_of("planning", 0):
        points = {x: over_seeds(rows, arm, f"success_{name}")
                  for x, name in enumerate(("1_3", "4_6", "7_8"))}
        curve(length, points, arm, colours.get(arm))
        points = {k: over_seeds(rows, arm, f"spoken_{k}") for k in (1, 3, 5)}
        if any(points.values()):
            curve(drift, points, None, colours.get(arm))
    length.set_xticks(range(3), ("1 to 3", "4 to 6", "7 to 8"))
    length.set(xlabel="actions of the shortest plan", ylabel="success, share of tasks",
               ylim=(-.03, 1.03))
    drift.set(xlabel="imagined steps", xticks=(1, 3, 5), ylim=(-.03, 1.03),
              ylabel="states spoken without error, share")

def teaching(said, cost, rows):
    """What is said after facts were added, and what it costs."""
    colours = {"teach": BLUE, "no replay": RED, "made_up=0": ORANGE, "teach_steps=100": GREEN}
    arms = arms_of("teaching", 0)
    for axis, names in ((said, ("said_known", "said_new", "updated")),
                        (cost, ("lost_DEC", "lost_LAT", "newly_answered"))):
        for number, arm in enumerate(arms):
            found = [over_seeds(rows, arm, name) for name in names]
            if all(found):
                places = [group + (number - 1.5) * .2 for group in range(len(names))]
                axis.bar(places, [one.mean for one in found], .18, color=colours[arm],
                         yerr=[one.deviation or 0 for one in found], capsize=2,
                         label=arm if axis is said else None)
    said.set_xticks(range(3), ("new facts,\nknown answers", "new facts,\nnew answers", "updates"))
    said.set(ylim=(0, 1.05), ylabel="said in new wordings, share")
    cost.set_xticks(range(3), ("DEC lost", "LAT lost", "invented subjects,\nnow answered"))
    cost.set(ylabel="share of questions")

def text(common, similar, gaps, rows):
    """Hidden words by energy and by tokens, among common words and similar ones; spoken gaps."""
    colours = {"default": BLUE, "four times the reading": ORANGE, "latents alone": RED,
               "masked LM": GREEN, "GPT": PURPLE}
    for axis, ways in ((common, ("prior", "head")), (similar, ("similar_energy", "similar_head"))):
        for place, way in enumerate(ways):
            for number, (arm, colour) in enumerate(colours.items()):
                found = over_seeds(rows, arm, f"word_{way}_hit5")
                if found:
                    axis.bar(place + (number - 2) * .16, found.mean, .15, color=colour,
                             yerr=found.deviation or 0, capsize=2)
        way = "similar_unigram" if axis is similar else "unigram"
        axis.axhline(over_seeds(rows, "default", f"word_{way}_hit5").mean, color=GREY,
                     linestyle="--")
    dots(gaps, rows, arms_of("text", 5) + arms_of("text", 6), "gap_f1", colours)
    common.set_xticks((0, 1), ("energy + frequency", "tokens"))
    common.set(title="among the 100 commonest", ylabel="hit@5, share of hidden words")
    similar.set_xticks((0, 1), ("energy alone", "tokens"))
    similar.set(title="among 100 of similar frequency")
    gaps.set(title="spoken gaps, 1 to 3 tokens", xlabel="token F1", xlim=(0, None))

def seeing(said, taught, decodes, rows):
    """Exact match by arm, flags with and without their pictures, and captions of streams."""
    colours = {"MSE + InfoNCE": BLUE, "InfoNCE": GREEN, "captioner on tokens": PURPLE,
               "shuffled pictures": RED, "random-init patch encoder": ORANGE}
    arms = [arm for arm in arms_of("seeing", 0) if over_seeds(rows, arm, "caption")]
    dots(said, rows, arms, "caption", colours)
    dots(taught, rows, arms, "caption_new", colours)
    for way, colour in (("oracle", GREEN), ("variance", BLUE), ("clustering", PURPLE),
                        ("pixels", ORANGE), ("uniform", RED), ("random", None)):
        points = {k: over_seeds(rows, "MSE + InfoNCE", f"stream_0.1_{way}_{k}")
                  for k in (4, 8, 16, 32)}
        curve(decodes, points, way, colour)
    log_axis(decodes, (4, 8, 16, 32))
    said.set(title="captions, seen combinations", xlabel="exact match, share of pictures")
    taught.set(title="combinations never seen", xlabel="exact match", yticklabels=[])
    for axis in (said, taught):
        axis.set(xlim=(-.03, 1.03))
    decodes.set(title="streams, a change every 10th frame", xlabel="decodes in 64 frames",
                ylabel="caption right, share of frames", ylim=(0, 1.03))

# lab -> how to draw it, the number of panels, the size in inches
PLOTS = {"collapse": (collapse, 1, (8, 5.5)), "pretraining": (pretraining, 2, (9, 4.6)),
         "hierarchy": (hierarchy, 2, (9, 4.6)), "facts": (facts, 2, (10, 4.5)),
         "speaking": (speaking, 3, (13, 4.4)), "distillation": (distillation, 1, (10, 5)),
         "llm_jepa": (llm_jepa, 2, (10, 4.4)), "speed": (speed, 2, (9, 4.6)),
         "planning": (planning, 2, (9, 4.6)), "teaching": (teaching, 2, (9, 4.2)),
         "text": (text, 3, (11, 4.2)), "seeing": (seeing, 3, (12, 4.4))}

def write_page(lab):
    """Write the plot and the tables of a page."""
    draw, panels, size = PLOTS[lab]
    rows = rows_of(lab)
    canvas = Canvas(size, layout="constrained")
    axes = canvas.subplots(1, panels, squeeze=False)[0]
    draw(*axes, rows)
    if any(axis.get_legend_handles_labels()[1] for axis in axes):
        canvas.legend(loc="outside lower center", ncols=3)
    canvas.savefig(PAGES / f"{lab}.png", dpi=100, metadata={"Software": None})
    write_tables(lab, rows)
    print(f"labs/pages/{lab}.md and .png are written")

if __name__ == "__main__":
    for wanted in sys.argv[1:] or PLOTS:
        if wanted not in PLOTS:
            sys.exit(f"no page {wanted}: there are {', '.join(PLOTS)}")
        write_page(wanted)
