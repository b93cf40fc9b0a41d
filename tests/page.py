"""
Does the page of a run say what sample.py says? And how fast, and how large is it?

    python -m tests.page --out=out/tjepa        two minutes on one core; needs a Chromium
    python -m tests.page --out=out/tjepa --picture=assets/page.png          draws it, no more

300 questions of all splits and wordings, and 100 with noise (typed, lower case, no mark, typo), are
asked in the page and in Python: tokens, greedy words and distances to all concepts must be equal,
distances within 1e-2. Then the page is asked by keyboard, from Enter to the last word.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

import evaluate
import sample
from data import pack_questions
from labs import page as lab
from tests import browser

NOISE = ("typed", "lower", "no_mark", "typo")
GAPS = ("The capital of France is [Paris].", "[Paris] is the capital of France.",
        "The currency of Japan is the [yen].")
# asked in the page: tokens, words and distances of each question
ASK = """questions => questions.map(question => {
  const ids = tokenizer.encode_question(question), thought = model.think(ids);
  const said = [...model.speak(model.decoder.memory_slots(thought))];
  return {ids, said: tokenizer.decode(said).trim(),
          far: concepts.map(concept => distance(concept, thought.latent))};
})"""
ENERGY = """(before, values, after) => values.map(value => model.energy(
  before ? tokenizer.encode(" " + before.trimEnd()) : [],
  tokenizer.encode((/\\S$/.test(before) ? "" : " ") + value), tokenizer.encode(after)))"""
# milliseconds from a key to the last change of the words
CLOCK = """
document.addEventListener("keydown", () => { window.pressed = window.changed = performance.now(); },
                          true);
new MutationObserver(() => { window.changed = performance.now(); })
  .observe($("words"), {childList: true, subtree: true, characterData: true});"""


def chosen(rows, n, phrasings):
    """n questions of some wordings, evenly spaced, no question twice."""
    found = list(dict.fromkeys(row.question for row in rows if row.phrasing in phrasings))
    return [found[i * len(found) // n] for i in range(min(n, len(found)))]


@torch.no_grad()
def asked_in_python(session, questions):
    """Token ids, words and distances of each question, as sample.py has them."""
    found = []
    for question in questions:
        thought, far = sample.think(session, question, "the question")
        [ids] = pack_questions(session.tokenizer, [question], session.run.cfg.block_size).tolist()
        said = "".join(sample.pieces(session, thought))
        found.append(dict(ids=ids, said=said, far=far.tolist()))
    return found


def compare(page, session, questions):
    """Questions that are answered otherwise in the page, and the largest error of a distance."""
    here = asked_in_python(session, questions)
    there = []
    for start in range(0, len(questions), 20):
        there += page.run(f"({ASK})({json.dumps(questions[start:start + 20])})")
    other = [f"{question!r}: {a['said']!r}, in the page {b['said']!r}"
             for question, a, b in zip(questions, here, there)
             if (a["ids"], a["said"]) != (b["ids"], b["said"])]
    error = max(abs(x - y) for a, b in zip(here, there) for x, y in zip(a["far"], b["far"]))
    return other, error


def energy_error(page, session, text):
    """The largest difference of an energy between the page and Python; is the best one the same?"""
    before, truth, after = text.replace("]", "[").split("[")
    values = list(dict.fromkeys([truth, *session.checkpoint["answers"]]))
    here = evaluate.gap_energy(session.run, session.tokenizer, before, values, after).tolist()
    there = page.run(f"({ENERGY})({json.dumps(before)}, {json.dumps(values)}, {json.dumps(after)})")
    same = here.index(min(here)) == there.index(min(there))
    return max(abs(a - b) for a, b in zip(here, there)), same


def type_and_enter(page, question):
    """Ask by keyboard: milliseconds from Enter to the last word."""
    page.run("$('question').focus(); $('question').select()")
    page.type(question)
    before = page.run("document.body.dataset.said")
    page.press("Enter")
    page.wait(f"document.body.dataset.said !== '{before}'")
    return page.run("changed - pressed")


def opened(program, out, **look):
    """The page of a run in a browser, loaded, with a clock for its answers."""
    page = program.open((Path(out) / "page.html").resolve().as_uri(), **look)
    page.wait("document.body.dataset.said")
    page.run(CLOCK)
    return page


def main():
    parser = argparse.ArgumentParser(prog="tests.page", description=__doc__)
    parser.add_argument("--out", default="out/tjepa", help="folder of the run")
    parser.add_argument("--beside", default="", help="folder of a second run")
    parser.add_argument("--picture", metavar="FILE", help="draw the upper part of the page, a .png")
    given = parser.parse_args()
    out = given.out
    if not browser.find():
        sys.exit(browser.WHY_NOT)
    lab.main([f"--out={out}", f"--beside={given.beside}"])
    if given.picture:
        with browser.Browser() as program:
            return opened(program, out, height=1090).picture(given.picture)
    session = lab.open_session(out)
    rows = lab.questions_of(session)
    clean = chosen(rows, 300, {row.phrasing for row in rows} - set(NOISE))
    noisy = chosen(rows, 100, NOISE)
    with browser.Browser() as program:
        page = opened(program, out)
        for name, questions in (("clean", clean), ("with noise", noisy)):
            other, error = compare(page, session, questions)
            print(f"{name}: {len(questions) - len(other)} of {len(questions)} equal, distances "
                  f"within {error:.4f}", *other, sep="\n  ")
        for gap in GAPS:
            error, same = energy_error(page, session, gap)
            print(f"{gap}: energies within {error:.4f}, best {'equal' if same else 'DIFFERENT'}")
        times = [type_and_enter(page, question) for question in clean[::10]]
        print(f"from Enter to the last word: median {statistics.median(times):.0f} ms, "
              f"most {max(times):.0f} ms ({len(times)} questions)")
        print("complaints of the page:", page.errors() or "none")
    size = (Path(out) / "page.html").stat().st_size
    lines = {name: len((lab.HERE / name).read_text("utf-8").splitlines())
             for name in ("tjepa.js", "page.js")}
    print(f"size {size / 1e6:.2f} MB; lines of JavaScript {lines}")


if __name__ == "__main__":
    main()
