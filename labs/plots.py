"""The page of a lab, labs/pages/<lab>.md: its plot and its tables, drawn from labs/results alone.

    python -m labs.plots facts speaking     these pages
    python -m labs.plots                    all pages

labs/pages/tables.json says which arms and figures the tables show. Error bars are one standard
deviation over seeds; a hollow marker has fewer than three. At most five arms have a colour.
"""
import sys

from matplotlib.figure import Figure as Canvas

import train
from labs.arms import Flags
from labs.pretraining import joined
from labs.records import REPOSITORY, results
from labs.tables import PAGES, TABLES, figure_of, origin, over_seeds, page_tables, write_block

# a palette that colour-blind readers can tell apart (Okabe and Ito)
BLUE = "#0072B2"        # train.py's default; where only MSE was measured, the hybrid by MSE
RED = "#D55E00"         # latents alone
GREEN = "#009E73"       # masked LM
PURPLE = "#AA4499"      # GPT
ORANGE = "#E69F00"      # random weights
GREY = "0.65"

# a plot that is named after no lab -> the lab that measured it, the page that shows it
ELSEWHERE = {"latents_alone": ("facts", "pretraining")}

def rows_of(name):
    """The rows of the lab that a plot shows. For pretraining: budgets and worlds joined."""
    rows = results(ELSEWHERE.get(name, [name])[0], Flags())
    if name in ELSEWHERE:               # only those of its table: the lab has its own plot
        return [row for row in rows if row["arm"] in arms_of(name, 0)]
    return joined(rows) if name == "pretraining" else rows

def page_of(name):
    """The page of a plot."""
    return PAGES / f"{ELSEWHERE.get(name, [name])[-1]}.md"

def arms_of(lab, number):
    """The arms of a table of a page."""
    return list(TABLES[lab].values())[number]["arms"]

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

def curve(axis, rows, points, label, colour, **style):
    """A curve with error bars through the figures that were measured; points: x -> (arm, figure).

    Without a colour it is grey and has no label.
    """
    found = {x: over_seeds(rows, *point) for x, point in points.items()}
    found = {x: one for x, one in found.items() if one}
    spread = [one.deviation or 0 for one in found.values()]
    axis.errorbar(list(found), [one.mean for one in found.values()],
                  yerr=spread if any(spread) else None, marker="o", capsize=2,
                  color=colour or GREY, label=label if colour else None,
                  zorder=2 if colour else 1, **style)

def bars(axis, rows, names, arms, step, width, capsize=2, **style):
    """Groups of bars with error bars, a group for each of names, in it the arms that have it.

    arms: arm -> (label, colour). The bars of a group are `step` apart.
    """
    for number, (arm, (label, colour)) in enumerate(arms.items()):
        left = (number - (len(arms) - 1) / 2) * step
        found = {group + left: over_seeds(rows, arm, name) for group, name in enumerate(names)}
        found = {place: one for place, one in found.items() if one}
        axis.bar(list(found), [one.mean for one in found.values()], width, color=colour,
                 label=label, yerr=[one.deviation or 0 for one in found.values()],
                 capsize=capsize, **style)

def log_axis(axis, ticks):
    """A logarithmic x axis with these ticks."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()

def collapse(axis, rows):
    """R@1 of all arms, the best at the top."""
    name = "r1_LAT_heldout"
    arms = sorted({row["arm"] for row in rows}, key=lambda arm: -over_seeds(rows, arm, name).mean)
    colours = {"hybrid by MSE": BLUE, "paper": RED, "frozen random target": PURPLE,
               "no EMA": ORANGE, "no stop-gradient": GREEN}
    dots(axis, rows, arms, name, colours)
    axis.axvline(over_seeds(rows, "random-init encoder", name).mean, color=GREY, linestyle="--")
    axis.set(xlim=(0, 1), xlabel="R@1 of LAT questions, held-out (dashed: random-init encoder)")

def pretraining(probes, cloze, rows):
    """Probes and cloze after two budgets of tokens."""
    colours = {"hybrid by MSE": BLUE, "latent": RED, "masked LM": GREEN, "GPT": PURPLE,
               "random-init": ORANGE}
    for axis, name in ((probes, "facts"), (cloze, "cloze")):
        for arm in arms_of("pretraining", 0):
            points = {x: (arm, f"{name} {x}M") for x in (2.5, 7)}
            curve(axis, rows, points, arm if axis is probes else None, colours.get(arm))
        axis.set(xlabel="tokens read, millions", xticks=[2.5, 7], ylim=(0, 1))
    probes.set(title="facts: mean of three probes", ylabel="accuracy, share of items")
    cloze.set(title="facts: cloze", ylabel="share of statements")

def latents_alone(lat, txt, cloze, auroc, rows):
    """What a whole run knows, against the tokens that its phase 1 has read."""
    cfg = train.Config()
    read = cfg.pretrain_steps * cfg.batch_size * cfg.block_size / 1e6
    shown = {"em_LAT_heldout": lat, "em_TXT_heldout": txt, "cloze_capital": cloze, "auroc": auroc}
    for arm, twice, colour in (("default", "twice the steps", BLUE),
                               ("latents alone", "latents alone with twice the steps", RED),
                               ("masked LM", "masked LM with twice the steps", GREEN)):
        for name, axis in shown.items():
            arms = {0: "default without phase 1", read: arm, 2 * read: twice}
            label = arm if axis is lat else None
            curve(axis, rows, {x: (each, name) for x, each in arms.items()}, label, colour)
    for axis, title in ((lat, "LAT: taught as latents"), (txt, "TXT: only read"),
                        (cloze, "capital by energy"), (auroc, "AUROC, invented subjects")):
        axis.set(title=title, xlabel="tokens read, millions", ylim=(-.03, 1.03))
    lat.set(ylabel="share of questions or statements; AUROC")

def hierarchy(one, all_levels, rows):
    """A level of a grammar against the sentences read; all levels of a deeper one."""
    colours = {"masked LM": GREEN, "latent": RED, "latent sigreg 0.1": PURPLE,
               "latent + masked LM": BLUE, "random-init encoder": ORANGE}
    for row in rows:                    # "0.41, 0.36, 0.34": a value for each seed
        if "level_2_by_seed" in row:
            seeds = row["level_2_by_seed"].mean.split(",")
            row["level_2"] = figure_of([float(value) for value in seeds])
    sizes = 128, 512, 2048, 8192
    for arm in ("masked LM", "latent", "latent without predictor"):
        points = {n: (f"{arm} L3 P{n}", "level_2") for n in sizes}
        curve(one, rows, points, arm, colours.get(arm))
    random = dict.fromkeys(sizes, ("random-init encoder L3", "level_2"))
    curve(one, rows, random, "random-init encoder", ORANGE)
    log_axis(one, sizes)
    for arm in arms_of("hierarchy", 1):
        name = arm.split(" L4")[0]
        points = {n: (arm, f"level_{n}") for n in (1, 2, 3)}
        curve(all_levels, rows, points, name, colours.get(name))
    one.set(title="grammar of depth 3, level 2", xlabel="sentences read", ylim=(0, 1),
            ylabel="accuracy of the probe, share of symbols")
    all_levels.set(title="grammar of depth 4, 8,192 sentences", xlabel="level above the tokens",
                   xticks=[1, 2, 3], ylim=(0, 1))

def facts(taught, read, rows):
    """What was taught in latent space alone, and what was only read."""
    former = ["LAT told as tokens", "shuffled L_a", "distill_steps=0"]
    arms = [*arms_of("facts", 0), *arms_of("facts", 3), *(f"former: {name}" for name in former)]
    colours = {"default": BLUE, "latents alone": RED, "masked LM": GREEN, "GPT": PURPLE,
               "default without phase 1": ORANGE}
    for axis, split in ((taught, "LAT"), (read, "TXT")):
        dots(axis, rows, arms, f"em_{split}_heldout", colours)
        axis.set(xlim=(-.03, 1.03), xlabel="exact match, share of questions")
    taught.set(title="LAT: taught in latent space alone")
    read.set(title="TXT: only read", yticklabels=[])

def speaking(alpha, memory, unknown, rows):
    """The weight of the latent loss, the memory replaced, and invented subjects."""
    arms = {0: "alpha 0 (v2.0)"} | {x: f"alpha {x}" for x in (0.1, 0.25, 0.5, 0.9)}
    for name, colour in (("early_em_LAT_heldout", None), ("em_LAT_heldout", RED)):
        curve(alpha, rows, {x: (arm, name) for x, arm in arms.items()}, None, colour)
    for arm, label, colour in (("annealed", "the decoder reads the thought", RED),
                               ("memory=tokens", "it reads token latents", BLUE)):
        points = {kind: (arm, f"em_LAT_heldout_memory_{kind}")
                  for kind in ("real", "relation", "shuffled", "random", "zero")}
        curve(memory, rows, points, label, colour, linestyle="none")
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
            arm = row["arm"]
            points = {over_seeds(rows, arm, "pflop").mean: (arm, "em_LAT_heldout")}
            curve(axis, rows, points, arm, colours.get(arm))
    log_axis(axis, (.001, .01, .1))
    axis.set(xlim=(.0008, .1), ylim=(0, 1.05), ylabel="exact match, share of LAT questions",
             xlabel="computation before phase 3, that of the teacher included, PFLOP")

def llm_jepa(size, settings, rows):
    """Exact match by number of pairs; settings at 1,000 pairs."""
    for tail, label, colour in (("", "lambda 0", BLUE), (" latent", "lambda 1, k 3", RED),
                                (" twice the steps", "lambda 0, twice the steps", GREEN),
                                (" table", "look-up table, no model", PURPLE)):
        points = {n: (f"{n}{tail}", "exact") for n in (250, 1000, 8000)}
        curve(size, rows, points, label, colour)
    log_axis(size, (250, 1000, 8000))
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
        points = {x: (f"Training step: {name}, width {x}, fp32", "ratio") for x in widths}
        curve(step, rows, points, label, colour)
    for name, colour in (("T-JEPA", ORANGE), ("GPT of equal FLOPs", PURPLE)):
        points = {n: (f"Question of 11 tokens, answer of {n}: {name}, width 512, fp32", "ratio")
                  for n in lengths}
        curve(answer, rows, points, f"answer: {name}", colour)
    log_axis(step, widths)
    log_axis(answer, lengths)
    step.set(title="a training step, CPU", xlabel="width", ylabel="time / nanoGPT's step")
    answer.set(title="an answer, CPU, width 512", xlabel="tokens of the answer",
               ylabel="time / GPT of equal parameters")
    for axis in (step, answer):
        axis.set_ylim(0, 1.5)
        axis.axhline(1, color="0.3", linestyle="--")

def planning(length, drift, rows):
    """Success by the length of the shortest plan, and imagined states against the steps."""
    colours = {"world model": BLUE, "shuffled actions": RED, "GPT": PURPLE,
               "random possible actions": GREEN, "random-init encoder": ORANGE}
    for arm in arms_of("planning", 0):
        colour = colours.get(arm)
        points = {x: (arm, f"success_{name}") for x, name in enumerate(("1_3", "4_6", "7_8"))}
        curve(length, rows, points, arm, colour)
        curve(drift, rows, {k: (arm, f"spoken_{k}") for k in (1, 3, 5)}, None, colour)
    length.set_xticks(range(3), ("1 to 3", "4 to 6", "7 to 8"))
    length.set(xlabel="actions of the shortest plan", ylabel="success, share of tasks",
               ylim=(-.03, 1.03))
    drift.set(xlabel="imagined steps", xticks=(1, 3, 5), ylim=(-.03, 1.03),
              ylabel="states spoken without error, share")

def teaching(said, cost, rows):
    """What is said after facts were added, and what it costs."""
    colours = {"teach": BLUE, "former: teach": PURPLE, "former: teach_steps=100": GREEN,
               "former: made_up=0": ORANGE, "former: no replay": RED}
    for axis, names in ((said, ("said_known", "said_new", "updated")),
                        (cost, ("lost_DEC", "lost_LAT", "newly_answered"))):
        arms = {arm: (arm if axis is said else None, colour) for arm, colour in colours.items()}
        bars(axis, rows, names, arms, .16, .145)
    said.set_xticks(range(3), ("new facts,\nknown answers", "new facts,\nnew answers", "updates"))
    said.set(ylim=(0, 1.05), ylabel="said in new wordings, share")
    cost.set_xticks(range(3), ("DEC lost", "LAT lost", "invented subjects,\nnow answered"))
    cost.set(ylabel="share of questions")

def text(common, similar, gaps, rows):
    """Hidden words by energy and by tokens, among common words and similar ones; spoken gaps."""
    colours = {"default": BLUE, "four times the reading": ORANGE, "latents alone": RED,
               "masked LM": GREEN, "GPT": PURPLE}
    arms = {arm: (None, colour) for arm, colour in colours.items()}
    for axis, ways, chance in (
            (common, ("prior", "head"), "unigram"),
            (similar, ("similar_energy", "similar_head"), "similar_unigram")):
        bars(axis, rows, [f"word_{way}_hit5" for way in ways], arms, .16, .15)
        found = over_seeds(rows, "default", f"word_{chance}_hit5")
        axis.axhline(found.mean, color=GREY, linestyle="--")
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
    for axis, name in ((said, "caption"), (taught, "caption_new")):
        dots(axis, rows, arms, name, colours)
        axis.set_xlim(-.03, 1.03)
    sizes = 4, 8, 16, 32
    for way, colour in (("oracle", GREEN), ("variance", BLUE), ("clustering", PURPLE),
                        ("pixels", ORANGE), ("uniform", RED), ("random", None)):
        points = {k: ("MSE + InfoNCE", f"stream_0.1_{way}_{k}") for k in sizes}
        curve(decodes, rows, points, way, colour)
    log_axis(decodes, sizes)
    said.set(title="captions, seen combinations", xlabel="exact match, share of pictures")
    taught.set(title="combinations never seen", xlabel="exact match", yticklabels=[])
    decodes.set(title="streams, a change every 10th frame", xlabel="decodes in 64 frames",
                ylabel="caption right, share of frames", ylim=(0, 1.03))

# lab (or plot) -> how to draw it, the number of panels, the size in inches
PLOTS = {"collapse": (collapse, 1, (8, 5.5)), "pretraining": (pretraining, 2, (9, 4.6)),
         "latents_alone": (latents_alone, 4, (12, 3.6)),
         "hierarchy": (hierarchy, 2, (9, 4.6)), "facts": (facts, 2, (10, 4.5)),
         "speaking": (speaking, 3, (13, 4.4)), "distillation": (distillation, 1, (10, 5)),
         "llm_jepa": (llm_jepa, 2, (10, 4.4)), "speed": (speed, 2, (9, 4.6)),
         "planning": (planning, 2, (9, 4.6)), "teaching": (teaching, 2, (9, 4.2)),
         "text": (text, 3, (11, 4.2)), "seeing": (seeing, 3, (12, 4.4))}

def write_page(name):
    """Write a plot, and into its page the tables beside it."""
    draw, panels, size = PLOTS[name]
    rows = rows_of(name)
    canvas = Canvas(size, layout="constrained")
    axes = canvas.subplots(1, panels, squeeze=False)[0]
    draw(*axes, rows)
    if any(axis.get_legend_handles_labels()[1] for axis in axes):
        canvas.legend(loc="outside lower center", ncols=3)
    canvas.savefig(PAGES / f"{name}.png", dpi=100, metadata={"Software": None})
    source = f"Written by `python -m labs.plots {name}`, measured at commit {origin(rows)}."
    page = page_of(name)
    write_block(page, name, f"{source}\n\n{page_tables(name, rows)}")
    print(f"{page.relative_to(REPOSITORY)} and {name}.png are written")

if __name__ == "__main__":
    for wanted in sys.argv[1:] or PLOTS:
        if wanted not in PLOTS:
            sys.exit(f"no page {wanted}: there are {', '.join(PLOTS)}")
        write_page(wanted)
