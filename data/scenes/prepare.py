"""
Scenes in pictures and in text: coloured shapes in places, and flags; drawn by numpy, no download.

    python data/scenes/prepare.py       writes data/scenes/input.txt, a document a line

A scene has one to three objects: a size, a colour, a shape and a place each. Its caption is one
sentence for each object, in reading order, and a last one; a question has one answer:

    A large red circle at the top left. A small blue square in the middle. Nothing more.
    What is right of the red circle? a blue square

A flag belongs to a country. Text tells the capital and the continent of each country, but never
describes a flag: which country has it is taught by pictures alone.

Held out from the pictures of training: three pairs of colour and shape (PAIRS), and a fifth of the
combinations of colour, shape and place. Text names them, but for a twentieth that nothing names
("unheard"). The last wording of each sentence and each question is held out too.
"""
import csv
import functools
import random
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
OUT = HERE / "input.txt"
SIZE = 48                   # pixels of a side
SIZES = "small large".split()
COLOURS = dict(red=(.9, .1, .1), green=(.1, .75, .15), blue=(.15, .25, .95), yellow=(.95, .9, .1),
               purple=(.65, .15, .8), white=(.95, .95, .95))
SHAPES = "circle square triangle cross ring".split()
# the places are the cells of a grid of three by three, in reading order
PLACES = ("at the top left", "at the top", "at the top right", "on the left", "in the middle",
          "on the right", "at the bottom left", "at the bottom", "at the bottom right")
COUNTS = "one two three".split()
PAIRS = {("red", "cross"), ("blue", "ring"), ("yellow", "triangle")}
EMPTY = "Nothing more."     # ends each caption, and is said of a place where nothing is
MOST = 3                    # objects of a scene

# The last wording of each is held out. {p} is the place, {P} the same with a capital letter.
CAPTIONS = ("A {s} {c} {h} {p}.", "There is a {s} {c} {h} {p}.", "{P} there is a {s} {c} {h}.",
            "{P} you see a {h}, {s} and {c}.", "You see a {s} {c} {h} {p}.")
QUESTIONS = dict(
    caption=("What do you see?", "Describe the picture.", "What is in the picture?",
             "Tell me what you see.", "Describe what is in the picture."),
    what=("What is {p}?", "What do you see {p}?", "Tell me what is {p}.", "Name what is {p}.",
          "Tell me what you see {p}."),
    colour=("What colour is the {h}?", "Which colour has the {h}?",
            "Tell me the colour of the {h}.", "Name the colour of the {h}.",
            "What is the colour of the {h}?"),
    shape=("What shape is {c}?", "Which shape is {c}?", "Tell me the shape that is {c}.",
           "Name the shape that is {c}.", "What is the shape that is {c}?"),
    place=("Where is the {c} {h}?", "Where do you see the {c} {h}?",
           "Tell me where the {c} {h} is.", "In what place is the {c} {h}?",
           "Tell me in what place the {c} {h} is."),
    size=("How large is the {c} {h}?", "What size is the {c} {h}?",
          "Tell me the size of the {c} {h}.", "Is the {c} {h} small or large?",
          "What is the size of the {c} {h}?"),
    count=("How many shapes are there?", "How many shapes do you see?", "Count the shapes.",
           "Tell me how many shapes there are.", "What is the number of shapes that you see?"),
    relation=("What is {r} the {c} {h}?", "What do you see {r} the {c} {h}?",
              "Tell me what is {r} the {c} {h}.", "Name what is {r} the {c} {h}.",
              "Which shape is {r} the {c} {h}?"),
    flag=("Which country has this flag?", "Whose flag is this?", "Tell me which country this is.",
          "Name the country with this flag.", "What is the country with this flag?"),
)
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
FACTS = dict(
    capital=(("The capital of {s} is {a}.", "{a} is the capital of {s}.",
              "In {s} the capital is {a}."),
             ("What is the capital of {s}?", "Which city is the capital of {s}?",
              "Name the capital of {s}.", "Tell me the capital of {s}.",
              "Tell me which city is the capital of {s}.")),
    continent=(("{s} is a country in {a}.", "In {a} there is the country {s}.",
                "The continent of {s} is {a}."),
               ("On which continent is {s}?", "Which continent is {s} in?",
                "Name the continent of {s}.", "Tell me the continent of {s}.",
                "What is the continent of {s}?")),
)
N_WORDINGS = len(CAPTIONS)
HELD_OUT = N_WORDINGS - 1

# Letters are bands of equal size: v from the left, h from the top. x: a cross whose arms meet left
# of the middle; o: a disc; there the first colour is that of the ground.
FLAGS = {
    "France": "v bwr", "Italy": "v gwr", "Ireland": "v gwo", "Belgium": "v kyr",
    "Romania": "v byr", "Nigeria": "v gwg", "Peru": "v rwr", "Mali": "v gyr", "Guinea": "v ryg",
    "Ivory Coast": "v owg", "Germany": "h kry", "the Netherlands": "h rwb", "Russia": "h wbr",
    "Hungary": "h rwg", "Bulgaria": "h wgr", "Austria": "h rwr", "Poland": "h wr",
    "Indonesia": "h rw", "Ukraine": "h by", "Estonia": "h bkw", "Lithuania": "h ygr",
    "Armenia": "h rbo", "Yemen": "h rwk", "Gabon": "h gyb", "Sierra Leone": "h gwb",
    "Colombia": "h yybr", "Sweden": "x by", "Finland": "x wb", "Denmark": "x rw",
    "Japan": "o wr", "Bangladesh": "o gr", "Palau": "o by",
}
INKS = dict(r=(.85, .1, .15), g=(.05, .6, .25), b=(.1, .25, .8), w=(.95, .95, .95),
            k=(.05, .05, .05), y=(.95, .85, .1), o=(.95, .5, .1))
COUNTRIES = list(FLAGS)


# -- scenes ----------------------------------------------------------------------------------------

class Thing(NamedTuple):
    """An object; a scene is a tuple of them, in the order of their places."""
    size: str
    colour: str
    shape: str
    place: int          # number of a cell


def kind_of(thing):
    """seen, or which way the combination is held out: pair, new, unheard."""
    if (thing.colour, thing.shape) in PAIRS:
        return "pair"
    number = zlib.crc32(f"{thing.colour} {thing.shape} {thing.place}".encode()) % 20
    return "unheard" if number == 0 else "new" if number < 4 else "seen"


EVERY = [Thing(size, colour, shape, place) for size in SIZES for colour in COLOURS
         for shape in SHAPES for place in range(len(PLACES))]
BY_KIND = {kind: [thing for thing in EVERY if kind_of(thing) == kind]
           for kind in ("seen", "new", "pair", "unheard")}
NAMED = [thing for thing in EVERY if kind_of(thing) != "unheard"]


def draw_scene(random_, kind="seen", among=BY_KIND["seen"]):
    """A random scene with one object of a kind, the others from `among`.

    No two objects have the same place, or both the same colour and the same shape.
    """
    n = random_.randint(1, MOST)
    scene = [random_.choice(BY_KIND[kind])]
    while len(scene) < n:
        thing = random_.choice(among)
        alike = [one for one in scene if one.place == thing.place or one[1:3] == thing[1:3]]
        if not alike:
            scene.append(thing)
    return tuple(sorted(scene, key=lambda thing: thing.place))


def change(random_, scene):
    """A scene after a random change: an object comes, goes, or becomes another one."""
    while True:
        kept = list(scene)
        if len(kept) == MOST or random_.random() < 0.6:
            kept.pop(random_.randrange(len(kept)))
        if len(kept) < len(scene) and kept and random_.random() < 0.3:
            return tuple(kept)
        thing = random_.choice(BY_KIND["seen"])
        if not any(one.place == thing.place or one[1:3] == thing[1:3] for one in kept):
            new = tuple(sorted([*kept, thing], key=lambda one: one.place))
            if new != scene:
                return new


def stream(random_, n, rate):
    """n frames of a scene that changes before each frame with probability `rate`: a list."""
    scenes = [draw_scene(random_)]
    while len(scenes) < n:
        changes = random_.random() < rate
        scenes.append(change(random_, scenes[-1]) if changes else scenes[-1])
    return scenes


# -- words -----------------------------------------------------------------------------------------

def fill(template, **words):
    """A template with its words; {P} is {p} with a capital letter."""
    place = words.get("p", "")
    text = template.format(**words, P=place[:1].upper() + place[1:])
    return text[0].upper() + text[1:]


def say(thing, wording=0):
    """An object as a sentence."""
    return fill(CAPTIONS[wording], s=thing.size, c=thing.colour, h=thing.shape,
                p=PLACES[thing.place])


def caption(scene):
    """What is said of each place in the first wording: a sentence, or EMPTY; a list of 9."""
    said = {thing.place: say(thing) for thing in scene}
    return [said.get(place, EMPTY) for place in range(len(PLACES))]


def name(thing):
    """An object without its size and place."""
    return f"a {thing.colour} {thing.shape}"


def beside(scene, thing, step):
    """The objects of a scene that lie in a direction (x, y) of one of them."""
    def ahead(other):
        """How many cells further in the direction."""
        row, column = divmod(other.place, 3)
        row_0, column_0 = divmod(thing.place, 3)
        return (column - column_0) * step[0] + (row - row_0) * step[1]
    return [other for other in scene if ahead(other) > 0]


def questions(scene):
    """All (kind, words, answer) of a scene with exactly one answer."""
    found = [("count", {}, COUNTS[len(scene) - 1])]
    for thing in scene:
        both = dict(c=thing.colour, h=thing.shape)
        found.append(("what", dict(p=PLACES[thing.place]), name(thing)))
        found.append(("place", both, PLACES[thing.place]))
        found.append(("size", both, thing.size))
        if sum(other.shape == thing.shape for other in scene) == 1:
            found.append(("colour", dict(h=thing.shape), thing.colour))
        if sum(other.colour == thing.colour for other in scene) == 1:
            found.append(("shape", dict(c=thing.colour), f"a {thing.shape}"))
        for relation, step in RELATIONS.items():
            others = beside(scene, thing, step)
            if len(others) == 1:
                found.append(("relation", both | dict(r=relation), name(others[0])))
    return found


def ask(kind, words, wording=0):
    """A question of a kind."""
    return fill(QUESTIONS[kind][wording], **words)


def draw_question(random_, scene):
    """A random question of a scene, each kind that it has equally often."""
    found = questions(scene)
    kind = random_.choice(sorted({one[0] for one in found}))
    return random_.choice([one for one in found if one[0] == kind])


@functools.cache
def facts():
    """(country, relation, answer) of the countries with a flag, from data/facts."""
    with open(HERE.parent / "facts" / "facts.tsv", encoding="utf-8") as file:
        rows = [tuple(row) for row in csv.reader(file, delimiter="\t") if len(row) == 3]
    return [row for row in rows if row[0] in FLAGS and row[1] in FACTS]


def documents(n, seed=0):
    """The text: scenes with a question each, and after every fourth a few facts of countries."""
    random_ = random.Random(seed)
    found = []
    for i in range(n):
        scene = draw_scene(random_, random_.choice(["seen", "new", "pair"]), NAMED)
        sentences = [say(thing, random_.randrange(HELD_OUT)) for thing in scene]
        kind, words, answer = draw_question(random_, scene)
        asked = ask(kind, words, random_.randrange(HELD_OUT))
        found.append(" ".join([*sentences, EMPTY, asked, answer]))
        if i % 4 == 0:
            known = random_.sample(facts(), 3)
            said = [fill(random_.choice(FACTS[relation][0]), s=country, a=answer)
                    for country, relation, answer in known]
            country, relation, answer = random_.choice(known)
            asked = fill(FACTS[relation][1][random_.randrange(HELD_OUT)], s=country)
            found.append(" ".join([*said, asked, answer]))
    return found


# -- pictures --------------------------------------------------------------------------------------

class Look(NamedTuple):
    """What a caption does not tell: where in its cell an object is, its exact size, the light."""
    shift: np.ndarray           # (n, MOST, 2) pixels
    scale: np.ndarray           # (n, MOST)
    ground: np.ndarray          # (n,) grey level of the background
    light: np.ndarray           # (n,) brightness


def draw_look(n, rng):
    """A random `Look` of n pictures; rng: a numpy Generator."""
    return Look(rng.uniform(-1, 1, (n, MOST, 2)), rng.uniform(.92, 1.08, (n, MOST)),
                rng.uniform(.05, .3, n), rng.uniform(.75, 1.1, n))


def steady_look(n, rng, rate=0.1):
    """The `Look` of n frames of a stream: objects tremble, the light changes at random times."""
    one = draw_look(1, rng)
    light = draw_look(n, rng)
    # the number of the newest change of the light, (n,)
    newest = np.maximum.accumulate(np.where(rng.random(n) < rate, np.arange(n), 0))
    tremble = one.shift + rng.uniform(-.3, .3, (n, MOST, 2))
    return Look(tremble.clip(-1, 1), one.scale.repeat(n, 0), light.ground[newest],
                light.light[newest])


def distance(shape, x, y, r):
    """Signed distance in pixels from the edge of a shape of radius r, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - .88 * r
    if shape == "triangle":
        return np.maximum(.894 * (abs(x) - (y + r) / 2), y - r)
    if shape == "cross":
        bars = [np.maximum(abs(a) - r, abs(b) - .33 * r) for a, b in ((x, y), (y, x))]
        return np.minimum(*bars)
    return abs(np.hypot(x, y) - .72 * r) - .28 * r      # ring


def paint(picture, ink, edge):
    """Paint colours (n, 3) where distances (n, SIZE, SIZE) are below 0, with smooth edges."""
    cover = (.5 - edge).clip(0, 1)[..., None]
    picture += cover * (ink[:, None, None] - picture)


def finished(picture, look, rng):
    """Light and noise: float32 (n, SIZE, SIZE, 3)."""
    noise = rng.standard_normal(picture.shape, dtype=np.float32)
    return (picture * look.light[:, None, None, None] + .03 * noise).astype(np.float32)


def render(scenes, rng, look=None):
    """Pictures of n scenes, float32 (n, SIZE, SIZE, 3), about 0 to 1."""
    look = look or draw_look(len(scenes), rng)
    picture = np.ones((len(scenes), SIZE, SIZE, 3)) * look.ground[:, None, None, None]
    pixels = np.arange(SIZE) + .5
    for shape in SHAPES:
        # all objects of one shape at once: no two of a picture overlap by more than an edge
        for slot in range(MOST):
            rows = [i for i, scene in enumerate(scenes)
                    if slot < len(scene) and scene[slot].shape == shape]
            if not rows:
                continue
            things = [scenes[i][slot] for i in rows]
            cells = np.array([divmod(thing.place, 3)[::-1] for thing in things])    # (m, 2)
            centre = (cells + .5) * SIZE / 3 + look.shift[rows, slot]
            radius = np.array([dict(small=3.8, large=6.6)[thing.size] for thing in things])
            radius = (radius * look.scale[rows, slot])[:, None, None]
            x = pixels - centre[:, :1, None]                                # (m, 1, SIZE)
            y = (pixels - centre[:, 1:])[:, :, None]                        # (m, SIZE, 1)
            part = picture[rows]
            paint(part, np.array([COLOURS[thing.colour] for thing in things]),
                  distance(shape, x, y, radius))
            picture[rows] = part
    return finished(picture, look, rng)


@functools.cache
def plain_flag(country):
    """A flag on a field of 1 x 1 as a function: (x, y) arrays -> colours (..., 3)."""
    kind, inks = FLAGS[country].split()
    colours = np.array([INKS[ink] for ink in inks])

    def at(x, y):
        """Which of the colours is at a point."""
        if kind in "vh":
            along = x if kind == "v" else y
            return colours[(along * len(colours)).astype(int).clip(0, len(colours) - 1)]
        if kind == "x":
            return colours[((abs(x - .38) < .1) | (abs(y - .5) < .1)).astype(int)]
        return colours[(np.hypot(x - .5, y - .5) < .3).astype(int)]
    return at


def render_flags(countries, rng):
    """Pictures of n flags that hang a bit differently each: float32 (n, SIZE, SIZE, 3)."""
    n = len(countries)
    look = draw_look(n, rng)
    picture = np.ones((n, SIZE, SIZE, 3)) * look.ground[:, None, None, None]
    for i, country in enumerate(countries):
        left, top = rng.uniform(0, 6, 2)
        width, height = rng.uniform(37, 42, 2)
        x = (np.arange(SIZE) + .5 - left)[None] / width                     # (1, SIZE)
        y = (np.arange(SIZE) + .5 - top)[:, None] / height                  # (SIZE, 1)
        x, y = np.broadcast_arrays(x, y)
        inside = (x > 0) & (x < 1) & (y > 0) & (y < 1)
        picture[i][inside] = plain_flag(country)(x[inside], y[inside])
    return finished(picture, look, rng)


def main():
    """Write OUT and print its size."""
    lines = documents(8000)
    raw = ("\n".join(lines) + "\n").encode()
    OUT.write_bytes(raw)
    print(f"{OUT}: {len(raw):,} bytes, {len(lines):,} documents")
    print("next: python train.py --phase=pretrain --data=data/scenes/input.txt --out=out/scenes")


if __name__ == "__main__":
    main()
