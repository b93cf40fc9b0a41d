"""
The diagram of the three phases as SVG, drawn by `python -m labs.figures --diagram`.

Mid-tones on a transparent ground can be read on light and on dark pages.
"""
INK, TRAINED, FROZEN, LATENT = "#7d8793", "#2f7fc4", "#77808b", "#2a9d6f"
HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 990 400" role="img"
 font-family="Helvetica, Arial, sans-serif" font-size="14">
<title>The three phases of Text T-JEPA</title>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6"
 orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>
"""
TITLE = 'text-anchor="middle" font-size="19" font-weight="bold"'
BOLD = 'text-anchor="middle" font-weight="bold"'
SMALL = 'text-anchor="middle" font-size="13"'
START = 'text-anchor="start"'

def words(x, y, text, style='text-anchor="middle"', colour=INK):
    """A line of text, by default centred at x."""
    return f'<text x="{x}" y="{y}" fill="{colour}" {style}>{text}</text>\n'

def box(x, y, text, colour):
    """A part of the model around (x, y)."""
    shape = f'<rect x="{x - 68}" y="{y - 17}" width="136" height="34" rx="7" fill="{colour}"/>\n'
    return shape + words(x, y + 5, text, 'text-anchor="middle" font-weight="bold" font-size="13.5"',
                         "#ffffff")

def latent(x, y):
    """A latent around (x, y): three dots."""
    return "".join(f'<circle cx="{x + shift}" cy="{y}" r="7" fill="{LATENT}"/>\n'
                   for shift in (-18, 0, 18))

def line(x, y, to_x, to_y, style='marker-end="url(#tip)"'):
    """A line, by default an arrow."""
    return (f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{INK}" stroke-width="2" '
            f"{style}/>\n")

def stack(x, read, colour):
    """What is read, context encoder, predictor and latent, one below the other at x: a list."""
    return [words(x, 88, read, SMALL), line(x, 96, x, 115),
            box(x, 135, "context encoder", colour), line(x, 154, x, 175),
            box(x, 195, "predictor", colour), line(x, 214, x, 243), latent(x, 260)]

def two_paths(x, read, latents, loss):
    """Phases 1 and 2 around x: a prediction on the left, its target on the right."""
    a, b = x - 80, x + 80
    return [*stack(a, read[0], TRAINED), words(a, 292, latents[0]),
            words(b, 88, read[1], SMALL), line(b, 96, b, 115),
            box(b, 135, "target encoder", FROZEN), line(b, 154, b, 243),
            latent(b, 260), words(b, 292, latents[1]),
            line(a + 34, 260, b - 34, 260, 'stroke-dasharray="4 4"'), words(x, 250, loss, BOLD)]

def diagram():
    """The whole diagram, a string."""
    parts = [HEAD]
    for x, title, below in ((165, "1  pretrain: read", "predict the latents of removed tokens"),
                            (495, "2  distill: think", "predict the latent of the answer"),
                            (825, "3  speak", "put the thought into words")):
        parts += [words(x, 26, title, TITLE), words(x, 49, below)]
    parts += [
        *(line(x, 14, x, 350, 'opacity=".4"') for x in (330, 660)),
        *two_paths(165, ("the cat … the mat", "the cat sat on the mat"), ("predicted", "target"),
                   "InfoNCE"),
        *two_paths(495, ("Capital of France?", "Paris"), ("thought L_p", "answer L_a"),
                   "MSE"),
        *stack(825, "Capital of France?", FROZEN),
        words(861, 265, "thought", START), line(825, 271, 825, 287),
        words(709, 312, "[BOS]"), line(733, 307, 755, 307),
        box(825, 307, "decoder", TRAINED), line(825, 326, 825, 342), words(825, 362, "Paris", BOLD),
        words(165, 325, "target encoder: moving average (EMA)"),
        words(165, 344, "of the context encoder"),
        words(165, 363, "beside it: SIGReg and a token loss"),
        words(495, 325, "no answer token is produced")]
    for x, colour, text in ((150, TRAINED, "trained in this phase"), (380, FROZEN, "no gradient")):
        parts += [f'<rect x="{x}" y="376" width="22" height="14" rx="3" fill="{colour}"/>\n',
                  words(x + 30, 388, text, START)]
    parts += [latent(612, 383), words(646, 388, "latent: a vector of 128 numbers", START)]
    return "".join(parts) + "</svg>\n"
