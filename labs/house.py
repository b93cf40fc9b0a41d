"""
The house of data/house for the planning lab: its text, its latents, and the search for plans.

A state of n facts has n slots, the pooled latent of a sentence each. Imagined states are expanded
action by action; their energy is the distance to the goal. An episode plans, acts and looks again.

Shapes: n states, S = 4 slots, A = 16 actions, F = 65 facts, W = 6 wordings, C width of a latent.
"""
import functools
import random
from typing import NamedTuple

import torch

import data
import tjepa
from data.house import prepare as world
from labs.measures import features
from labs.runs import corpus_from

N_SLOTS = 4                 # the robot and up to three objects
HELD_OUT = world.HELD_OUT
TRAINED = range(HELD_OUT)
TRAJECTORIES = 2000
# which facts the text contains, bool (F,)
SEEN = torch.tensor([fact not in world.UNSEEN for fact in world.FACTS])

# -- texts -----------------------------------------------------------------------------------------

@functools.cache
def corpus_of(block_size, vocab_size, n=TRAJECTORIES):
    """The text of n trajectories as a `data.Corpus`; the last twentieth of it is held out."""
    return corpus_from(world.documents(n), block_size, vocab_size, "data/house")

def numbers(state):
    """A state as numbers of facts, -1 in the slots that it does not need: a list of S."""
    found = [world.NUMBER[fact] for fact in state.facts()]
    return found + [-1] * (N_SLOTS - len(found))

@functools.cache
def walks(n=TRAJECTORIES):
    """Trajectories as numbers: facts (n, steps+1, S) and actions (n, steps)."""
    found = world.trajectories(n)
    facts = [[numbers(state) for state in states] for states, _ in found]
    actions = [[world.ACTIONS.index(action) for action in actions] for _, actions in found]
    return torch.tensor(facts), torch.tensor(actions)

# -- latents ---------------------------------------------------------------------------------------

def sentences(tokenizer, said, many, block_size):
    """All sentences of facts or actions, in each wording, as tokens (many * W, T), padded."""
    texts = [" " + said(one, wording) for one in many for wording in range(world.N_WORDINGS)]
    return data.pack(tokenizer, texts, block_size, "--block_size")

class Latents(NamedTuple):
    """The latents of all facts and actions, a sentence each."""
    facts: torch.Tensor         # (F, W, C) as targets and goals
    read: torch.Tensor          # (F, W, C) as the predictor reads them
    actions: torch.Tensor       # (A, W, C)

    def centres(self):
        """The mean latent of each fact over the trained wordings, (F, C)."""
        return self.facts[:, :HELD_OUT].mean(1)

@torch.no_grad()
def latents_of(model, tokenizer, block_size):
    """`Latents` of a frozen model: pooled, layer-normed, standardised.

    Each dimension gets mean 0 and deviation 1 over the text's facts (actions), trained wordings.
    """
    parts = []
    for said, many, known in ((world.say_fact, world.FACTS, SEEN),
                              (world.say_action, world.ACTIONS, slice(None))):
        rows = tjepa.norm(features(model, sentences(tokenizer, said, many, block_size)))
        rows = rows.unflatten(0, (-1, world.N_WORDINGS))                # (F or A, W, C)
        trained = rows[known][:, :HELD_OUT].flatten(0, 1)
        parts.append((rows - trained.mean(0)) / trained.std(0).clamp(min=1e-3))
    facts, actions = parts
    return Latents(facts, facts, actions)

# -- search ----------------------------------------------------------------------------------------

class Imagined(NamedTuple):
    """Imagined states: latents and the slots that are used."""
    slots: torch.Tensor         # (n, S, C)
    mask: torch.Tensor          # (n, S)

class LatentWorld:
    """States are imagined by a transition model on latents.

    transition: (slots (n, S, C), mask (n, S), actions (n, C)) -> next slots (n, S, C).
    wording: in which the planner names its actions.
    """

    def __init__(self, transition, latents, wording=0):
        self.transition = transition
        self.latents = latents
        self.actions = latents.actions[:, wording]                      # (A, C)
        # distance of a fact of the text to the nearest other one, the median over facts
        centres = latents.centres()[SEEN]
        apart = torch.cdist(centres, centres).square() / centres.size(1)
        between = apart.fill_diagonal_(torch.inf).min(1).values.median().item()
        # Two states are one below half of it (squared: a quarter). A goal is reached below a
        # quarter: "the robot is in the attic" is as near to "the book is in the attic" as a third.
        self.same = between / 4
        self.reached = self.tolerance = between / 16

    @torch.no_grad()
    def look(self, slots, mask):
        """What sentences say in any wording: the transition without action, slots (n, S, C)."""
        return self.transition(slots, mask, torch.zeros_like(slots[:, 0]))

    def begin(self, state, wordings):
        """The state as it is read, one wording for each of its sentences."""
        facts = torch.tensor(numbers(state))
        mask = (facts >= 0)[None]                                       # (1, S)
        slots = self.latents.read[facts.clamp(min=0), wordings] * mask[..., None]
        return Imagined(self.look(slots, mask), mask)

    def goal(self, fact, wording):
        """The latent of the goal's sentence, whatever its wording: (C,)."""
        slot = self.latents.read[world.NUMBER[fact], wording][None, None]
        return self.look(slot, torch.ones(1, 1, dtype=torch.bool))[0, 0]

    @torch.no_grad()
    def expand(self, states):
        """Each state after each action: n states -> n * A, the actions of a state in a row."""
        n, n_actions = len(states.slots), len(self.actions)
        slots, mask = (part.repeat_interleave(n_actions, 0) for part in states)
        return Imagined(self.transition(slots, mask, self.actions.repeat(n, 1)), mask)

    def energy(self, states, goal):
        """Distance of the nearest slot to the goal, mean square: (n,)."""
        error = (states.slots - goal).square().mean(-1)                 # (n, S)
        return error.masked_fill(~states.mask, torch.inf).min(1).values

    def take(self, states, which):
        """Some of the states."""
        return Imagined(*(part[which] for part in states))

    def join(self, states, others):
        """Two sets of states as one."""
        return Imagined(*(torch.cat(parts) for parts in zip(states, others)))

    def flat(self, states):
        """The slots of each state as one vector, empty ones 0: (n, S*C)."""
        return (states.slots * states.mask[..., None]).flatten(1)

    def new(self, states, known=None):
        """Which states differ from all before them, and from the known ones: bool (n,)."""
        flat = self.flat(states)                                        # (n, S*C)
        width = states.slots.size(-1)
        alike = torch.cdist(flat, flat).square() / width < self.same
        first = ~alike.tril(-1).any(1)
        if known is not None:
            nearest = torch.cdist(flat, self.flat(known)).min(1).values
            first &= nearest.square() / width >= self.same
        return first

def search(imagination, state, goal, depth=8, beam=32, cost="closest"):
    """Plan from a state to a goal: (actions as numbers, energy along the plan).

    Breadth-first while a layer has fewer than `beam` states, then the `beam` nearest to the goal.
    cost: last, the energy of the last of `depth` states; sum, of all of them; closest, of the
    nearest one: states imagined before are dropped, and the search ends at the goal.
    """
    layer = known = state
    paths, energies = [()], [()]
    total = torch.zeros(1)
    found = []                      # (energy, path, energies) of the best state of each layer
    for _ in range(depth):
        states = imagination.expand(layer)
        energy = imagination.energy(states, goal)
        n_actions = len(energy) // len(paths)
        total = total.repeat_interleave(n_actions) + energy             # (n * A,)
        order = (total if cost == "sum" else energy).argsort(stable=True)
        states = imagination.take(states, order)
        fresh = imagination.new(states, known if cost == "closest" else None).nonzero()[:beam, 0]
        if len(fresh) == 0:
            break
        layer = imagination.take(states, fresh)
        kept = order[fresh]                                             # the best one first
        total, energy = total[kept], energy[kept]
        before = [divmod(i, n_actions) for i in kept.tolist()]
        energies = [(*energies[i], e) for (i, _), e in zip(before, energy.tolist())]
        paths = [(*paths[i], action) for i, action in before]
        found.append((energies[0][-1], paths[0], energies[0]))
        if cost == "closest":
            if energy[0] < imagination.reached:
                break
            known = imagination.join(known, layer)
    if not found:
        return (), ()
    if cost != "closest":
        return found[-1][1:]
    # the shortest of the plans that come about as near as any: noise must not cause a detour
    least = min(energy for energy, _, _ in found)
    return next(plan for energy, *plan in found if energy <= least + imagination.tolerance)

# -- episodes --------------------------------------------------------------------------------------

class Task(NamedTuple):
    """A start, a goal (one fact), and the length of the shortest plan."""
    start: world.State
    goal: tuple
    shortest: int

BINS = {"1_3": (1, 3), "4_6": (4, 6), "7_8": (7, 8)}
# Seeds of tasks: settings were chosen on DEV, figures are measured on TEST.
DEV, TEST = 1000, 2000

def holds_unseen(state):
    """Has a state a combination of object and room that the text never has?"""
    return any(fact in world.UNSEEN for fact in state.facts())

@functools.cache
def tasks(name, n, unseen=False, seed=TEST):
    """n held-out tasks whose shortest plan has a length in BINS[name]; no start is in the text.

    Goals are moves that the text never makes, and for short plans also places of the robot and
    objects in its hand; unseen: combinations of object and room that the text never has.
    """
    random_ = random.Random(f"{seed} {name} {unseen}")
    text = {state for states, _ in world.trajectories(TRAJECTORIES) for state in states}
    low, high = BINS[name]
    found = []
    while len(found) < n:
        start = world.draw_state(random_)
        goal = (random_.choice(start.places)[0], random_.choice(world.ROOMS))
        if unseen:
            goal = random_.choice(sorted(world.UNSEEN))
        elif high <= 3 and random_.random() < 0.6:
            goal = random_.choice([("robot", goal[1]), (goal[0], world.HAND)])
        source = dict(start.facts()).get(goal[0])
        if source is None or start in text or goal in start.facts():
            continue
        move = goal[0] != "robot" and goal[1] != world.HAND
        if move and not unseen and (goal in world.UNSEEN
                                    or not world.held_out_move(goal[0], source, goal[1])):
            continue
        plan = world.shortest_plan(start, goal, high)
        if plan and low <= len(plan) <= high:
            found.append(Task(start, goal, len(plan)))
    return found

def succeeds(policy, task):
    """Does policy (state, goal) -> action reach the goal within twice the shortest length?"""
    state = task.start
    for _ in range(2 * task.shortest):
        state = world.step(state, policy(state, task.goal))
        if task.goal in state.facts():
            return True
    return False

def success(policy, some):
    """The share of tasks in which a policy succeeds."""
    return sum(succeeds(policy, task) for task in some) / len(some)

def planner(imagination, wordings=TRAINED, seed=0, **settings):
    """A policy that searches and takes the first action of the plan, if there is a plan.

    wordings: of states and goals, a random one for each sentence. settings: of `search`.
    """
    random_ = random.Random(seed)

    def policy(state, goal):
        """The first action of the plan that is searched from this state."""
        goal_wording, *drawn = (random_.choice(wordings) for _ in range(N_SLOTS + 1))
        begin = imagination.begin(state, drawn)
        plan, _ = search(imagination, begin, imagination.goal(goal, goal_wording), **settings)
        return world.ACTIONS[plan[0] if plan else 0]
    return policy

def oracle(state, goal):
    """The first action of a shortest plan in the true house."""
    return (world.shortest_plan(state, goal) or world.ACTIONS)[0]

def at_random(seed, sensible=False):
    """A policy of random actions; sensible: of those that change something."""
    random_ = random.Random(seed)
    return lambda state, goal: random_.choice(world.possible(state) if sensible else world.ACTIONS)
