"""
Can a text T-JEPA plan? V-JEPA 2-AC's method in a house described in sentences.

    python -m labs.planning             20 arms a seed, two to three minutes of a core each
    python -m labs.planning --fast      a minute on one core: does it run?

The house (data/house/prepare.py) has ten rooms, one of them locked, a robot, and up to three
objects in a state of two to four sentences. Phase 1 of train.py reads it. Then the encoder is
frozen, each sentence gets one pooled latent, and a transition model learns

    latents of a state, latent of an action  ->  latents of the next state

by teacher forcing plus a rollout on its own predictions [V-JEPA 2-AC, Assran et al. 2025]. A plan
is found by search over imagined states; the energy is the distance to the latent of the goal's
sentence (one fact). After each action the true state is read and the plan is made anew.

    labs/house.py           text and latents of the house, search, tasks
    labs/house_model.py     the transition model
    labs/house_gpt.py       a GPT that plans by likelihood

Expected before the first run: short plans succeed, and success falls with the length of the plan;
shuffled or absent actions are near the random policy; without the rollout loss long plans fail
more often. Random-init latents do worst where a wording is new, and may come near elsewhere: a
sentence's tokens tell its fact. SIGReg and inverse dynamics matter where the encoder is trained
together with the transition model (EB-JEPA: 97 against 1), not where it is frozen.
"""
import dataclasses
import random
import time
from pathlib import Path

import torch

import tjepa
import train
from data.house import prepare as world
from labs import house
from labs.arms import Flags, chosen, in_short, main, run_arms
from labs.controls import MASKED_LM
from labs.house_gpt import GPTWorld
from labs.house_model import speak, teach_speech, train_frozen, train_joint
from labs.runs import Arm, model_of, open_run, plain

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
            ("rollout", *tjepa.within(1, 8)),
            ("episodes trajectories", *tjepa.within(1, 10 ** 6)),
        ))

# One recipe for all arms: latents alone as in `--recipe=latent`, in a small size.
BASE = Config(
    mlm=0.0, n_embd=64, n_layer=3, top_k=3, pred_embd=64, dec_layer=2, block_size=72,
    vocab_size=512, answer_size=12, dtype="fp32", batch_size=32, qa_batch_size=128,
    pretrain_steps=500, pretrain_lr=2e-3, distill_steps=2000, distill_lr=5e-3,
    speak_steps=150, speak_lr=3e-3, noise=0.3, eval_every=10 ** 9)
# about as much time as phase 1 and the transition model take
GPT = dict(policy="gpt", episodes=20, pretrain_steps=2000, pretrain_lr=5e-3)
JOINT = dict(joint=True, pretrain_steps=1000)
ARMS = {
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

# -- phase 1 ---------------------------------------------------------------------------------------

# what phase 1 does not depend on
LATER = ("threads noise distill_steps distill_lr speak_steps speak_lr qa_batch_size "
         "eval_every").split()

def open_encoder(cfg, corpus):
    """A `train.Run` after phase 1. Arms of a seed with the same phase 1 share it."""
    name = f"encoder {cfg.variant} mlm {cfg.mlm} sigreg {cfg.sigreg} steps {cfg.pretrain_steps}"
    folder = Path(cfg.out).with_name(f"{name.replace(' ', '_')}_{cfg.seed}")
    steps = 0 if cfg.joint else cfg.pretrain_steps
    wanted = plain(cfg, phase="pretrain", out=str(folder), pretrain_steps=steps)
    figures = {}
    done = (folder / "ckpt.pt").exists()
    if done:
        saved = train.load_checkpoint(folder)
        fields = dataclasses.asdict(wanted)
        done = saved["evaluated"] and saved["corpus"] == corpus.fingerprint and all(
            saved["config"][name] == fields[name] for name in fields if name not in LATER)
        figures = saved["rows"][-1]
    if not done:
        figures = train.run(wanted, corpus, model_of(cfg))
    run = open_run(dataclasses.replace(cfg, out=str(folder), pretrain_steps=steps), corpus)
    kept = {name: figures[name] for name in ("val_r2", "rank", "health") if name in figures}
    return run._replace(cfg=plain(cfg)), {} if cfg.joint else kept

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

def nearest_facts(latents, slots, facts):
    """Is the true fact the nearest of all facts about its subject? slots (n, S, C) -> bool (n, S).

    facts: numbers (n, S), -1 where a slot is empty, which counts as right. So a state whose slots
    are all right is nearer to the truth than any state that differs from it in one fact.
    """
    table = latents.centres()                                           # (F, C)
    subjects = {name: i for i, name in enumerate(("robot", *world.OBJECTS))}
    subject_of = torch.tensor([subjects[name] for name, _ in world.FACTS])
    distance = (slots[:, :, None] - table).square().mean(-1)            # (n, S, F)
    other = subject_of[facts.clamp(min=0)][..., None] != subject_of
    return (distance.masked_fill(other, torch.inf).argmin(-1) == facts) | (facts < 0)

@torch.no_grad()
def imagine(imagination, states, actions):
    """Imagined states after each of the actions: a list of steps slots (n, S, C)."""
    random_ = random.Random(3)
    begins = [imagination.begin(walk[0], [random_.choice(house.TRAINED) for _ in range(4)])
              for walk in states]
    slots = torch.cat([begin.slots for begin in begins])
    mask = torch.cat([begin.mask for begin in begins])
    steps = []
    for action in actions.unbind(1):
        slots = imagination.transition(slots, mask, imagination.actions[action])
        steps.append(slots)
    return steps

def imagined_figures(imagination, run, n, seed):
    """Imagined states after 1, 3 and 5 steps: nearest facts right, and said right."""
    states, actions = new_walks(n, seed)
    steps = imagine(imagination, states, actions)
    found = {}
    for k in (1, 3, 5):
        facts = torch.tensor([house.numbers(walk[k]) for walk in states])
        right = nearest_facts(imagination.latents, steps[k - 1], facts)
        found[f"nearest_{k}"] = right.all(1).float().mean().item()
        real = facts >= 0
        said = speak(run, steps[k - 1][real])
        truth = [world.say_fact(world.FACTS[i]) for i in facts[real].tolist()]
        wrong = torch.zeros_like(real)
        wrong[real] = torch.tensor([a != b for a, b in zip(said, truth)])
        found[f"spoken_{k}"] = (~wrong.any(1)).float().mean().item()
    return found

def written_figures(gpt, n, seed):
    """States that a GPT writes after 1, 3 and 5 steps, one after the other: all facts right."""
    states, actions = new_walks(n, seed)
    found = {}
    written = [gpt.begin(walk[0], None)[0] for walk in states]
    for k in range(actions.size(1)):
        # what can't be understood has no next state
        written = [gpt.expand([one])[action] if one[0] else one
                   for one, action in zip(written, actions[:, k].tolist())]
        right = [facts == set(walk[k + 1].facts()) for (facts, _), walk in zip(written, states)]
        found[f"spoken_{k + 1}"] = sum(right) / n
    return {name: found[name] for name in ("spoken_1", "spoken_3", "spoken_5")}

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
        begin = imagination.begin(state, [random_.choice(house.TRAINED) for _ in range(4)])
        slots = imagination.expand(begin).slots[actions]
        facts = torch.tensor([house.numbers(one) for one in after])
        right.append(nearest_facts(imagination.latents, slots, facts).all().item())
    return sum(right) / n

def best_actions(state, goal):
    """The actions that begin a shortest plan."""
    plan = world.shortest_plan(state, goal)
    found = []
    for action in world.possible(state):
        rest = world.shortest_plan(world.step(state, action), goal)
        if rest is not None and len(rest) < len(plan):
            found.append(action)
    return found

def intervention(policy, n, seed):
    """An object is moved by hand so that no best action stays one: is the new action a best one?"""
    random_ = random.Random(f"{seed} intervention")
    right = []
    for task in house.tasks("4_6", 4 * n, seed=seed):
        state = task.start.moved(task.goal[0], random_.choice(world.ROOMS))
        plan = world.shortest_plan(state, task.goal)
        if not plan or house.holds_unseen(state):
            continue
        new = best_actions(state, task.goal)
        if not set(new) & set(best_actions(task.start, task.goal)):
            right.append(policy(state, task.goal) in new)
    return sum(right[:n]) / len(right[:n])

def wordings_alike(latents):
    """Share of facts in the held-out wording whose nearest trained sentence says the same fact."""
    seen = house.seen_facts()
    new = latents.facts[seen, house.HELD_OUT]                           # (n, C)
    known = latents.facts[seen, :house.HELD_OUT].flatten(0, 1)          # (n * 3, C)
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
    """Time of the first plan of tasks of 6 actions, by the world model of the GPT's seed.

    And the time in which the GPT writes the next states of as many states, after each action, in
    as large batches. Both are measured in turn, in one process.
    """
    steps = min(cfg.pretrain_steps, BASE.pretrain_steps)
    cfg = dataclasses.replace(cfg, pretrain_steps=steps, pretrain_lr=BASE.pretrain_lr)
    run, _ = open_encoder(cfg, house.corpus_of(cfg.block_size, cfg.vocab_size, cfg.trajectories))
    imagination = house.LatentWorld(*train_frozen(run, cfg))
    expand, sizes = imagination.expand, []

    def counted(states):
        """Expand states and note how many there are."""
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

def planning_figures(imagination, cfg):
    """All that a policy which searches in latents is asked."""
    policy = house.planner(imagination, seed=cfg.seed, cost=cfg.cost)
    found = task_figures(policy, cfg)
    some = [task for name in house.BINS
            for task in house.tasks(name, cfg.episodes, seed=cfg.task_seed)[::3]]
    new_words = house.LatentWorld(imagination.transition, imagination.latents, house.HELD_OUT)
    reads_new_words = house.planner(new_words, [house.HELD_OUT], cost=cfg.cost)
    found["success_wording"] = house.success(reads_new_words, some)
    found["intervention"] = intervention(policy, cfg.episodes, cfg.task_seed)
    found["counterfactual"] = counterfactual(imagination, 5 * cfg.episodes, cfg.task_seed)
    found["wordings"] = wordings_alike(imagination.latents)
    return found

def measure(cfg):
    """An arm: phase 1, the transition model, phase 3 on states, and the figures."""
    torch.manual_seed(cfg.seed)
    simple = dict(random=house.at_random(cfg.seed), sensible=house.at_random(cfg.seed, True),
                  oracle=house.oracle)
    if cfg.policy in simple:
        return task_figures(simple[cfg.policy], cfg)
    corpus = house.corpus_of(cfg.block_size, cfg.vocab_size, cfg.trajectories)
    if cfg.policy == "gpt":
        gpt = GPTWorld.trained(cfg, corpus)
        figures = written_figures(gpt, 5 * cfg.episodes, cfg.task_seed)
        return figures | task_figures(gpt.policy(), cfg) | times_of_plans(gpt, cfg)
    run, figures = open_encoder(cfg, corpus)
    transition, latents = (train_joint if cfg.joint else train_frozen)(run, cfg)
    teach_speech(run, cfg, latents)
    imagination = house.LatentWorld(transition, latents)
    figures |= imagined_figures(imagination, run, 5 * cfg.episodes, cfg.task_seed)
    return figures | planning_figures(imagination, cfg)

# -- the whole -------------------------------------------------------------------------------------

def arms_of(base):
    """The arms, name -> Config."""
    return {name: dataclasses.replace(base, **change) for name, change in ARMS.items()}

def planning(flags):
    """Run the arms and print the tables."""
    if flags.fast:
        print("labs.planning --fast: a minute on one core; its figures mean nothing")
        arms = {name: dataclasses.replace(in_short(cfg), episodes=1, trajectories=100)
                for name, cfg in arms_of(BASE).items()}
        run_arms("planning", arms, dataclasses.replace(flags, seeds=1, redo=True), measure)
        print("\n".join(f"{name}: ran" for name in chosen(flags, arms)))
        return
    run_arms("planning", arms_of(BASE), flags, measure)

if __name__ == "__main__":
    main(planning, Flags)
