"""
Can a text T-JEPA plan? V-JEPA 2-AC's method in a house described in sentences.

    python -m labs.planning             20 arms a seed, two to three minutes of a core each
    python -m labs.planning --fast      a minute on one core: does it run?

Phase 1 of train.py reads the text of data/house. Then the encoder is frozen, each sentence gets one
pooled latent, and a transition model (labs/house_model.py) learns

    latents of a state, latent of an action  ->  latents of the next state

by teacher forcing plus a rollout on its own predictions [V-JEPA 2-AC, Assran et al. 2025]. A plan
is found by search over imagined states (labs/house.py), by a control in the states that a GPT
writes (labs/house_gpt.py). labs/pages/planning.md says more.

Expected before the first run: short plans succeed, and success falls with the length of the plan;
shuffled or absent actions are near the random policy; without the rollout loss long plans fail
more often. Random-init latents do worst where a wording is new, and may come near elsewhere: a
sentence's tokens tell its fact. SIGReg and inverse dynamics matter where the encoder is trained
together with the transition model (EB-JEPA: 97 against 1), not where it is frozen.
"""
import dataclasses
import math
import random
import time

import torch

import tjepa
from data.house import prepare as world
from labs import house
from labs.arms import in_short, main, run_arms
from labs.controls import MASKED_LM, read_gpt
from labs.house_gpt import GPTWorld
from labs.house_model import teach_speech, train_frozen, train_joint
from labs.runs import Arm, plain, share_said, shared_run

@dataclasses.dataclass
class Config(Arm):
    """An arm: what is trained on the latents of the house, and who acts."""
    policy: str = "plan"        # plan | gpt | random | sensible | oracle
    given: str = "actions"      # what the transition model gets: actions | shuffled | none
    rollout: int = 2            # steps predicted from each other in training; 1: teacher forcing
    inverse: float = 0.0        # weight of inverse dynamics: which action led to what was predicted
    joint: bool = False         # train encoder and transition model together, without phase 1
    cost: str = "closest"       # of a plan: closest | last | sum, as in `house.search`
    episodes: int = 40          # tasks of each length
    task_seed: int = house.TEST # of tasks and states; house.DEV for choosing settings
    trajectories: int = house.TRAJECTORIES

    def __post_init__(self):
        super().__post_init__()
        tjepa.check(self, (
            ("policy", *tjepa.one_of("plan", "gpt", "random", "sensible", "oracle")),
            ("given", *tjepa.one_of("actions", "shuffled", "none")),
            ("cost", *tjepa.one_of("closest", "last", "sum")),
            ("rollout", *tjepa.within(1, 8))))

# One recipe for all arms: latents alone by MSE, in a small size.
BASE = Config(
    mlm=0.0, n_embd=64, n_layer=3, top_k=3, pred_embd=64, dec_layer=2, block_size=72,
    vocab_size=512, answer_size=12, dtype="fp32", batch_size=32, qa_batch_size=128,
    pretrain_steps=500, pretrain_lr=2e-3, distill_steps=2000, distill_lr=5e-3,
    speak_steps=150, speak_lr=3e-3, noise=0.3, eval_every=10 ** 9)
# about as much time as phase 1 and the transition model take
GPT = dict(policy="gpt", episodes=20, pretrain_steps=2000, pretrain_lr=5e-3)
JOINT = dict(joint=True, pretrain_steps=1000)
CHANGES = {
    "world model": {},
    "latents and tokens": dict(mlm=1.0),
    "masked LM": MASKED_LM,
    "random-init encoder": dict(pretrain_steps=0),
    "without SIGReg": dict(sigreg=0.0),
    "cost of the last step": dict(cost="last", episodes=8),
    "sum of the costs": dict(cost="sum", episodes=8),
    "teacher forcing alone": dict(rollout=1),
    "inverse dynamics": dict(inverse=1.0),
    "shuffled actions": dict(given="shuffled"),
    "no action": dict(given="none"),
    "joint": JOINT,
    "joint with inverse dynamics": JOINT | dict(inverse=1.0),
    "joint without SIGReg": JOINT | dict(sigreg=0.0),
    "joint without SIGReg with inverse dynamics": JOINT | dict(sigreg=0.0, inverse=1.0),
    "GPT": GPT,
    "GPT for four times the steps": GPT | dict(pretrain_steps=8000),
    "random policy": dict(policy="random"),
    "random possible actions": dict(policy="sensible"),
    "oracle": dict(policy="oracle"),
}
ARMS = {name: dataclasses.replace(BASE, **change) for name, change in CHANGES.items()}

def open_encoder(cfg):
    """A `train.Run` after phase 1, which arms of a seed share; before it in a joint arm."""
    corpus = house.corpus_of(cfg.block_size, cfg.vocab_size, cfg.trajectories)
    steps = 0 if cfg.joint else cfg.pretrain_steps
    return shared_run(cfg, corpus, "encoder", pretrain_steps=steps)._replace(cfg=plain(cfg))

# -- figures ---------------------------------------------------------------------------------------

def new_walks(n, seed, steps=5):
    """New trajectories: states, a list of n lists, and actions, (n, steps) as numbers."""
    random_ = random.Random(f"{seed} walks")
    states, actions = [], []
    for _ in range(n):
        at = world.draw_state(random_)
        walk, taken = [at], []
        for _ in range(steps):
            choice = world.possible(at) if random_.random() < 0.8 else world.ACTIONS
            taken.append(world.ACTIONS.index(random_.choice(choice)))
            at = world.step(at, world.ACTIONS[taken[-1]])
            walk.append(at)
        states.append(walk)
        actions.append(taken)
    return states, torch.tensor(actions)

def random_wordings(random_):
    """A trained wording for each slot of a state."""
    return [random_.choice(house.TRAINED) for _ in range(house.N_SLOTS)]

def nearest_facts(latents, slots, facts):
    """Is the true fact the nearest of all facts about its subject? slots (n, S, C) -> bool (n, S).

    facts: numbers (n, S), -1 where a slot is empty, which counts as right. So a state whose slots
    are all right is nearer to the truth than any state that differs from it in one fact.
    """
    table = latents.centres()                                           # (F, C)
    subjects = ["robot", *world.OBJECTS]
    subject_of = torch.tensor([subjects.index(name) for name, _ in world.FACTS])
    distance = (slots[:, :, None] - table).square().mean(-1)            # (n, S, F)
    other = subject_of[facts.clamp(min=0)][..., None] != subject_of
    return (distance.masked_fill(other, torch.inf).argmin(-1) == facts) | (facts < 0)

@torch.no_grad()
def imagined_figures(imagination, run, n, seed):
    """Imagined states after 1, 3 and 5 steps: nearest facts right, and said right."""
    states, actions = new_walks(n, seed)
    random_ = random.Random(3)
    begins = [imagination.begin(walk[0], random_wordings(random_)) for walk in states]
    slots, mask = (torch.cat(parts) for parts in zip(*begins))
    texts = [world.say_fact(fact) for fact in world.FACTS]
    found = {}
    for k, action in enumerate(actions.unbind(1), 1):
        slots = imagination.transition(slots, mask, imagination.actions[action])
        if k in (1, 3, 5):
            facts = torch.tensor([house.numbers(walk[k]) for walk in states])
            right = nearest_facts(imagination.latents, slots, facts)
            found[f"nearest_{k}"] = right.all(1).float().mean().item()
            found[f"spoken_{k}"] = share_said(run, slots, facts, texts)
    return found

def written_figures(gpt, n, seed):
    """States that a GPT writes after 1, 3 and 5 steps, one after the other: all facts right."""
    states, actions = new_walks(n, seed)
    found = {}
    written = [gpt.begin(walk[0], None)[0] for walk in states]
    for k, action in enumerate(actions.unbind(1), 1):
        # what can't be understood has no next state
        written = [gpt.expand([one])[i] if one[0] else one
                   for one, i in zip(written, action.tolist())]
        if k in (1, 3, 5):
            right = [facts == set(walk[k].facts()) for (facts, _), walk in zip(written, states)]
            found[f"spoken_{k}"] = sum(right) / n
    return found

@torch.no_grad()
def counterfactual(imagination, n, seed):
    """Same state, two actions with two outcomes: are both predicted states the right ones?"""
    random_ = random.Random(f"{seed} counterfactual")
    right = []
    while len(right) < n:
        state = world.draw_state(random_)
        actions = random_.sample(range(len(world.ACTIONS)), 2)
        if random_.random() < 0.8:
            actions[0] = world.ACTIONS.index(random_.choice(world.possible(state)))
        after = [world.step(state, world.ACTIONS[action]) for action in actions]
        if after[0] == after[1]:
            continue
        begin = imagination.begin(state, random_wordings(random_))
        slots = imagination.expand(begin).slots[actions]
        facts = torch.tensor([house.numbers(one) for one in after])
        right.append(nearest_facts(imagination.latents, slots, facts).all().item())
    return sum(right) / n

def best_actions(state, goal):
    """The actions that begin a shortest plan."""
    def left(state):
        """Number of actions of the shortest plan; inf if there is none."""
        plan = world.shortest_plan(state, goal)
        return math.inf if plan is None else len(plan)
    return [action for action in world.possible(state)
            if left(world.step(state, action)) < left(state)]

def intervention(policy, n, seed):
    """An object is moved by hand so that no best action stays one: is the new action a best one?"""
    random_ = random.Random(f"{seed} intervention")
    right = []
    for task in house.tasks("4_6", 4 * n, seed=seed):
        state = task.start.moved(task.goal[0], random_.choice(world.ROOMS))
        if house.holds_unseen(state) or not world.shortest_plan(state, task.goal):
            continue
        new = best_actions(state, task.goal)
        if not set(new) & set(best_actions(task.start, task.goal)):
            right.append(policy(state, task.goal) in new)
    return sum(right[:n]) / len(right[:n])

def wordings_alike(latents):
    """Share of facts in the held-out wording whose nearest trained sentence says the same fact."""
    new = latents.facts[house.SEEN, house.HELD_OUT]                     # (n, C)
    known = latents.facts[house.SEEN, :house.HELD_OUT].flatten(0, 1)    # (n * 5, C)
    found = torch.cdist(new, known).argmin(1) // house.HELD_OUT
    return (found == torch.arange(len(new))).float().mean().item()

def task_figures(policy, cfg):
    """Success by the length of the shortest plan, and where the combination is new."""
    found = {}
    for name in house.BINS:
        some = house.tasks(name, cfg.episodes, seed=cfg.task_seed)
        found[f"success_{name}"] = house.success(policy, some)
    unseen = house.tasks("4_6", cfg.episodes, unseen=True, seed=cfg.task_seed)
    return found | dict(success_unseen=house.success(policy, unseen))

def times_of_plans(gpt, cfg, n=5):
    """Seconds for the first plan of tasks of 6 actions, by the world model of the GPT's seed.

    And, in turn, for the GPT to write what follows as many states, in as large batches.
    """
    steps = min(cfg.pretrain_steps, BASE.pretrain_steps)
    cfg = dataclasses.replace(cfg, pretrain_steps=steps, pretrain_lr=BASE.pretrain_lr)
    imagination = house.LatentWorld(*train_frozen(open_encoder(cfg), cfg))
    expand, sizes = imagination.expand, []

    def counted(states):
        """Expand the states, and note how many they are."""
        sizes.append(len(states.slots))
        return expand(states)
    imagination.expand = counted
    policy = house.planner(imagination)
    some = [task for task in house.tasks("4_6", 40, seed=cfg.task_seed) if task.shortest == 6][:n]
    latent = written = 0.0
    for task in some:
        sizes.clear()
        started = time.perf_counter()
        policy(task.start, task.goal)
        between = time.perf_counter()
        for size in sizes:
            gpt.write([frozenset(task.start.facts())] * size)
        latent += (between - started) / len(some)
        written += (time.perf_counter() - between) / len(some)
    return dict(seconds_latent=latent, seconds_gpt=written, times_faster=written / latent)

def measure(cfg):
    """An arm: phase 1, the transition model, phase 3 on states, and the figures."""
    torch.manual_seed(cfg.seed)
    simple = dict(random=house.at_random(cfg.seed), sensible=house.at_random(cfg.seed, True),
                  oracle=house.oracle)
    if cfg.policy in simple:
        return task_figures(simple[cfg.policy], cfg)
    n = 5 * cfg.episodes
    seed = cfg.task_seed
    if cfg.policy == "gpt":
        corpus = house.corpus_of(cfg.block_size, cfg.vocab_size, cfg.trajectories)
        gpt = GPTWorld(read_gpt(cfg, corpus))
        figures = written_figures(gpt, n, seed)
        # the GPT reads states and goals in the first wording
        return figures | task_figures(house.planner(gpt, [0]), cfg) | times_of_plans(gpt, cfg)
    run = open_encoder(cfg)
    transition, latents = (train_joint if cfg.joint else train_frozen)(run, cfg)
    teach_speech(run, cfg, latents)
    imagination = house.LatentWorld(transition, latents)
    policy = house.planner(imagination, seed=cfg.seed, cost=cfg.cost)
    figures = imagined_figures(imagination, run, n, seed) | task_figures(policy, cfg)
    new_words = house.LatentWorld(transition, latents, house.HELD_OUT)
    reads_new_words = house.planner(new_words, [house.HELD_OUT], cost=cfg.cost)
    some = [task for name in house.BINS for task in house.tasks(name, cfg.episodes, seed=seed)[::3]]
    return figures | dict(
        success_wording=house.success(reads_new_words, some),
        intervention=intervention(policy, cfg.episodes, seed),
        counterfactual=counterfactual(imagination, n, seed), wordings=wordings_alike(latents))

def planning(flags):
    """Run the arms; `python -m labs.plots planning` draws the page."""
    arms = ARMS
    if flags.fast:
        print("labs.planning --fast: a minute on one core; its figures mean nothing")
        flags = dataclasses.replace(flags, seeds=1, redo=True)
        arms = {name: dataclasses.replace(in_short(cfg), episodes=1, trajectories=100)
                for name, cfg in ARMS.items()}
    run_arms("planning", arms, flags, measure)

if __name__ == "__main__":
    main(planning)
