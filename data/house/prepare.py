"""
A house in text: a robot walks through ten rooms and carries objects, one at a time.

    python data/house/prepare.py        writes data/house/input.txt, a document a line

A state is two to four sentences, one fact each; an action is one sentence. A document is a state,
an action and the next state, in random wordings and a random order of the sentences:

    The robot is in the hall. The garden is where the ball is.   Go to the porch.   ...

Rules: the robot walks through doors, takes an object that is in its room if its hand is empty, and
puts down what it carries. Nobody enters the cellar without carrying the key. An action that is not
possible changes nothing.

Held out, never in the text: five combinations of object and room (UNSEEN), a fifth of the moves
(an object taken in one room and put down in another, `held_out_move`), and the last wording of
every sentence.
"""
import functools
import random
import zlib
from pathlib import Path
from typing import NamedTuple

OUT = Path(__file__).with_name("input.txt")
ROOMS = "hall kitchen garden porch garage study attic bedroom bathroom cellar".split()
OBJECTS = "ball book lamp cup key".split()
DOORS = ("hall-kitchen hall-study hall-porch kitchen-garden garden-porch porch-garage "
         "study-attic study-bedroom bedroom-bathroom kitchen-cellar").split()
LOCKED = "cellar"
UNSEEN = {("ball", "garden"), ("book", "attic"), ("lamp", "garage"), ("cup", "study"),
          ("key", "bathroom")}

# The last wording of each is held out: its words are known, their combination is not.
IN_ROOM = ("The {a} is in the {b}.", "The {b} is where the {a} is.",
           "There is the {a}, in the {b}.", "In the {b} there is the {a}.",
           "It is in the {b} that the {a} is.", "In the {b} is the {a}.")
IN_HAND = ("The robot carries the {a}.", "The {a} is carried by the robot.",
           "It is the {a} that the robot carries.", "There is the {a}, carried by the robot.",
           "The {a} is what the robot carries.", "By the robot the {a} is carried.")
GO = ("Go to the {b}.", "Walk to the {b}.", "Walk into the {b}.", "Go through the door to the {b}.",
      "Now walk to the {b}.", "Now go into the {b}.")
TAKE = ("Take the {a}.", "Pick up the {a}.", "Lift the {a}.", "Now take the {a}.",
        "Now lift the {a}.", "Now pick up the {a}.")
PUT = ("Put it down.", "Lay it down.", "Drop it.", "Now drop it.", "Now lay it down.",
       "Now put it down.")
N_WORDINGS = len(IN_ROOM)
HELD_OUT = N_WORDINGS - 1

HAND = "hand"
FACTS = [("robot", room) for room in ROOMS]
FACTS += [(name, place) for name in OBJECTS for place in (*ROOMS, HAND)]
NUMBER = {fact: i for i, fact in enumerate(FACTS)}
ACTIONS = [("go", room) for room in ROOMS] + [("take", name) for name in OBJECTS] + [("put", "")]


class State(NamedTuple):
    """Where the robot is, and the place (a room or HAND) of each object that there is."""
    robot: str
    places: tuple       # ((object, place), ...), in the order of OBJECTS

    def facts(self):
        """The facts of the state, (subject, place) each: the robot first."""
        return (("robot", self.robot), *self.places)

    def carried(self):
        """The object in the robot's hand, or None."""
        return next((name for name, place in self.places if place == HAND), None)

    def moved(self, name, place):
        """The state with an object, or the robot, at another place."""
        if name == "robot":
            return self._replace(robot=place)
        return self._replace(places=tuple(
            (other, place if other == name else where) for other, where in self.places))


def neighbours(room):
    """The rooms behind the doors of a room."""
    pairs = [door.split("-") for door in DOORS]
    return [b if a == room else a for a, b in pairs if room in (a, b)]


DOORS_OF = {room: neighbours(room) for room in ROOMS}


def step(state, action):
    """The state after an action; the same one if the action is not possible."""
    kind, name = action
    carried = state.carried()
    if kind == "go":
        open_door = name != LOCKED or carried == "key"
        return state.moved("robot", name) if name in DOORS_OF[state.robot] and open_door else state
    if kind == "take":
        here = (name, state.robot) in state.places
        return state.moved(name, HAND) if here and carried is None else state
    return state.moved(carried, state.robot) if carried else state


def possible(state):
    """The actions that change a state."""
    return [action for action in ACTIONS if step(state, action) != state]


@functools.cache
def shortest_plan(state, goal, most=10):
    """The first shortest plan until a fact is true, a list of actions; None above `most`."""
    paths = {state: []}
    newest = [state]
    for _ in range(most + 1):
        for at in newest:
            if goal in at.facts():
                return paths[at]
        before, newest = newest, []
        for at in before:
            for action in possible(at):
                after = step(at, action)
                if after not in paths:
                    paths[after] = [*paths[at], action]
                    newest.append(after)
    return None


# -- what is held out ------------------------------------------------------------------------------

def held_out_move(name, source, target):
    """Is an object never carried from one room to another in the text? A fifth of the moves."""
    return zlib.crc32(f"{name} {source} {target}".encode()) % 5 == 0


def draw_state(random_, unseen=False):
    """A random state of one to three objects, nothing carried; unseen: also UNSEEN pairs."""
    names = random_.sample(OBJECTS, random_.randint(1, 3))
    places = []
    for name in sorted(names, key=OBJECTS.index):
        rooms = [room for room in ROOMS if unseen or (name, room) not in UNSEEN]
        places.append((name, random_.choice(rooms)))
    return State(random_.choice(ROOMS), tuple(places))


def allowed(state, action, source):
    """May an action happen in the text? source: the room in which the carried object was taken."""
    name = state.carried()
    if action[0] != "put" or name is None:
        return True
    return (name, state.robot) not in UNSEEN and not held_out_move(name, source, state.robot)


def errand(state, wish):
    """The next action of a shortest plan for a wish (a fact), or None if there is none."""
    plan = shortest_plan(state, wish) if wish[0] in dict(state.facts()) else None
    return plan[0] if plan else None


def trajectory(random_, steps, clever):
    """States (steps+1) and actions (steps): half-clever runs errands, the other acts at random."""
    state = draw_state(random_)
    states, actions = [state], []
    source = wish = None
    for _ in range(steps):
        action = random_.choice(ACTIONS)
        if clever:
            wish = wish or (random_.choice(state.places)[0], random_.choice(ROOMS))
            action = errand(state, wish) or random_.choice(possible(state))
            if random_.random() < 0.3:
                action = random_.choice(possible(state))
        if not allowed(state, action, source):
            action = ("go", random_.choice(DOORS_OF[state.robot]))
            wish = None
        if wish in step(state, action).facts():
            wish = None
        if action[0] == "take":
            source = state.robot if step(state, action) != state else source
        state = step(state, action)
        states.append(state)
        actions.append(action)
    return states, actions


@functools.cache
def trajectories(n, steps=8, seed=0):
    """n trajectories, half of them half-clever: a list of (states, actions)."""
    random_ = random.Random(seed)
    return [trajectory(random_, steps, clever=i % 2 == 0) for i in range(n)]


# -- sentences -------------------------------------------------------------------------------------

def say_fact(fact, wording=0):
    """A fact as a sentence."""
    subject, place = fact
    templates = IN_HAND if place == HAND else IN_ROOM
    return templates[wording].format(a=subject, b=place)


def say_action(action, wording=0):
    """An action as a sentence."""
    kind, name = action
    return dict(go=GO, take=TAKE, put=PUT)[kind][wording].format(a=name, b=name)


def say_state(state, random_):
    """A state in random trained wordings and a random order."""
    sentences = [say_fact(fact, random_.randrange(HELD_OUT)) for fact in state.facts()]
    random_.shuffle(sentences)
    return " ".join(sentences)


def documents(n, seed=0):
    """The text: a state, an action and the next state, for each step of n trajectories."""
    random_ = random.Random(seed + 1)
    found = []
    for states, actions in trajectories(n, seed=seed):
        for before, action, after in zip(states, actions, states[1:]):
            said = say_action(action, random_.randrange(HELD_OUT))
            found.append(f"{say_state(before, random_)} {said} {say_state(after, random_)}")
    random_.shuffle(found)
    return found


def main():
    """Write OUT and print its size."""
    lines = documents(2000)
    raw = ("\n".join(lines) + "\n").encode()
    OUT.write_bytes(raw)
    print(f"{OUT}: {len(raw):,} bytes, {len(lines):,} documents")
    print("next: python train.py --phase=pretrain --data=data/house/input.txt --out=out/house")


if __name__ == "__main__":
    main()
