"""
Can a text T-JEPA plan? V-JEPA 2-AC's method in a house described in sentences.

    python -m labs.planning             17 arms a seed, one to three minutes of a core each
    python -m labs.planning --fast      a minute on one core: does it run?

The house (data/house/prepare.py) has ten rooms, one of them locked, a robot, and up to three
objects in a state of two to four sentences. Phase 1 of train.py reads it. Then the encoder is
frozen, each sentence gets one pooled latent, and a transition model learns

    latents of a state, latent of an action  ->  latents of the next state

by teacher forcing plus a rollout on its own predictions [V-JEPA 2-AC, Assran et al. 2025]. A plan is
found by search over imagined states; the energy is the distance to the latent of the goal's sentence
(one fact). After each action the true state is read and the plan is made anew.

Expected before the first run: short plans succeed, and success falls with the length of the plan;
shuffled or absent actions are near the random policy; without the rollout loss long plans fail
more often. Random-init latents do worst where a wording is new, and may come near elsewhere: a
sentence's tokens tell its fact. SIGReg and inverse dynamics matter where the encoder is trained
together with the transition model (EB-JEPA: 97 against 1), not where it is frozen.
"""
import dataclasses
import json
import random
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

import data
import tjepa
import train
from data.house import prepare as world
from labs import house
from labs.arms import Flags, chosen, in_short, main, run_arms
from labs.controls import MASKED_LM
from labs.house_gpt import GPTWorld
from labs.runs import Arm, fit, model_of, open_run, plain
from labs.tables import publish, tables

@dataclasses.dataclass
class Config(Arm):
    """An arm: what is trained on the latents of the house, and who acts."""
    policy: str = "plan"        # plan | gpt | random | sensible | oracle
    given: str = "actions"      # what the transition model gets: actions | shuffled | none
    rollout: int = 2            # steps predicted from each other in training; 1: teacher forcing
    inverse: float = 0.0        # weight of inverse dynamics: which action led to what was predicted
    joint: bool = False         # train encoder and transition model together, without phase 1
    costs: bool = False         # also plan by the last step and by the sum
    episodes: int = 30          # tasks of each length
    trajectories: int = house.TRAJECTORIES

    def __post_init__(self):
        super().__post_init__()
        tjepa.check(self, (
            ("policy", *tjepa.one_of("plan", "gpt", "random", "sensible", "oracle")),
            ("given", *tjepa.one_of("actions", "shuffled", "none")),
            ("rollout", *tjepa.within(1, 8)),
            ("episodes trajectories", *tjepa.within(1, 10 ** 6)),
        ))

# One recipe for all arms: latents alone as in `--recipe=latent`, in a small size.
BASE = Config(
    mlm=0.0, n_embd=64, n_layer=3, top_k=3, pred_embd=64, dec_layer=2, block_size=72,
    vocab_size=512, answer_size=12, dtype="fp32", batch_size=32, qa_batch_size=128,
    pretrain_steps=500, pretrain_lr=2e-3, distill_steps=1000, distill_lr=5e-3, speak_steps=250,
    speak_lr=3e-3, noise=0.3, eval_every=10 ** 9)
JOINT = dict(joint=True, pretrain_steps=1000)
ARMS = {
    "world model": dict(costs=True),
    "latents and tokens": dict(mlm=1.0),
    "masked LM": MASKED_LM,
    "random-init encoder": dict(pretrain_steps=0),
    "without SIGReg": dict(sigreg=0.0),
    "teacher forcing alone": dict(rollout=1),
    "inverse dynamics": dict(inverse=1.0),
    "shuffled actions": dict(given="shuffled"),
    "no action": dict(given="none"),
    "joint": JOINT,
    "joint, inverse dynamics": JOINT | dict(inverse=1.0),
    "joint, without SIGReg": JOINT | dict(sigreg=0.0),
    "joint, without SIGReg, inverse dynamics": JOINT | dict(sigreg=0.0, inverse=1.0),
    "GPT": dict(policy="gpt", episodes=10, pretrain_steps=1000),
    "random policy": dict(policy="random"),
    "random possible actions": dict(policy="sensible"),
    "oracle": dict(policy="oracle"),
}

# -- the transition model --------------------------------------------------------------------------

class Transition(nn.Module):
    """Blocks of tjepa.py over the slots of a state and an action; the order of slots is free."""

    def __init__(self, cfg):
        super().__init__()
        self.state_proj = nn.Linear(cfg.n_embd, cfg.pred_embd)
        self.action_proj = nn.Linear(cfg.n_embd, cfg.pred_embd)
        blocks = (tjepa.Block(cfg.pred_embd, cfg.n_head) for _ in range(cfg.pred_layer))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(cfg.pred_embd)
        self.latent_proj = nn.Linear(cfg.pred_embd, cfg.n_embd)
        # rotates by nothing: sentences have no order
        rope = torch.ones(1, cfg.pred_embd // cfg.n_head // 2, dtype=torch.cfloat)
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, slots, mask, action):
        """slots (n, S, C), mask bool (n, S), action (n, C) -> next slots (n, S, C)."""
        x = torch.cat((self.state_proj(slots), self.action_proj(action)[:, None]), dim=1)
        mask = F.pad(mask, (0, 1), value=True)[:, None, None]           # (n, 1, 1, S+1)
        for block in self.blocks:
            x = block(x, self.rope, mask)
        return self.latent_proj(self.norm(x[:, :-1]))

class WorldModel(nn.Module):
    """A transition model and an inverse one, on an encoder that is frozen or trained with them."""
    init_weights = tjepa.TJEPA.init_weights
    ema_update = tjepa.TJEPA.ema_update

    def __init__(self, jepa):
        super().__init__()
        self.cfg = jepa.cfg
        self.context_encoder = jepa.context_encoder
        self.target_encoder = jepa.target_encoder
        self.transition = Transition(jepa.cfg)
        self.inverse = nn.Sequential(nn.Linear(2 * jepa.cfg.n_embd, jepa.cfg.pred_embd), nn.GELU(),
                                     nn.Linear(jepa.cfg.pred_embd, len(world.ACTIONS)))
        self.transition.apply(self.init_weights)
        self.inverse.apply(self.init_weights)

    def trained_in(self, phase):
        """Phase "pretrain" of `train.fit` trains the encoder too, "distill" does not."""
        parts = [self.transition, self.inverse]
        return [self.context_encoder, *parts] if phase == "pretrain" else parts

    def encode_sentences(self, tokens, encoder, top_k):
        """Pooled latents of sentences (n, T), layer-normed: (n, C)."""
        real = tokens != self.cfg.pad
        positions = torch.arange(tokens.size(1))
        latents = encoder(tokens, positions, real, top_k)
        return tjepa.norm(tjepa.masked_mean(latents, real[..., None], 1))

    def which_action(self, before, after, mask):
        """Logits of the action (n, A) that led from slots before to slots after."""
        both = self.inverse(torch.cat((before, after), dim=-1))         # (n, S, A)
        return tjepa.masked_mean(both, mask[..., None], 1)

def look_up(table, facts, wordings):
    """Latents (..., C) of facts or actions, by number, in wordings; any for -1, no fact.

    table (n, W, C), facts and wordings (...).
    """
    index = facts.clamp(min=0) * table.size(1) + wordings
    # F.embedding and not table[...]: the backward of indexing is not deterministic.
    return F.embedding(index, table.flatten(0, 1))

def some_slots(mask):
    """For half of the rows of mask (B, S) one random slot alone: as a goal is read."""
    chance = torch.rand(mask.shape).masked_fill(~mask, -1)
    alone = F.one_hot(chance.argmax(1), mask.size(1)).bool()
    return torch.where(torch.rand(len(mask), 1) < 0.5, alone, mask)

def rollout_loss(model, cfg, latents, facts, actions):
    """Teacher forcing, and a rollout of K = cfg.rollout steps -> (loss, stats).

    facts (B, K+1, S), actions (B, K). What is read has a random wording in each slot, and noise,
    because predicted states are inexact. What is predicted is the mean over the trained wordings.
    """
    B, K = actions.shape
    mask = facts[:, 0] >= 0                                             # (B, S)
    read = look_up(latents.read, facts, torch.randint(house.HELD_OUT, facts.shape))
    read = read + cfg.noise * torch.randn_like(read)                    # (B, K+1, S, C)
    target = F.embedding(facts.clamp(min=0), latents.centres())
    said = look_up(latents.actions, actions, torch.randint(house.HELD_OUT, actions.shape))
    if cfg.given == "shuffled":
        said = said[torch.randperm(B)]                                  # (B, K, C)
    if cfg.given == "none":
        said = torch.zeros_like(said)

    def distance(predicted, step, mask):
        """Mean square error of the slots that are in a mask."""
        error = (predicted - target[:, step]).square().mean(-1)
        return tjepa.masked_mean(error, mask, (0, 1))

    # 1. teacher forcing: each step from the true state
    forced = [model.transition(read[:, k], mask, said[:, k]) for k in range(K)]
    loss = sum(distance(predicted, k + 1, mask) for k, predicted in enumerate(forced)) / K
    stats = dict(latent=loss)
    # 2. rollout: each step but the first from the predicted state
    state = forced[0]
    for k in range(1, K):
        state = model.transition(state, mask, said[:, k])
        loss = loss + distance(state, k + 1, mask) / (K - 1)
    # 3. without action: the same state in any wording; so are states and goals read in planning
    looked_at = some_slots(mask)
    same = model.transition(read[:, 0], looked_at, torch.zeros_like(said[:, 0]))
    loss = loss + distance(same, 0, looked_at)
    # 4. inverse dynamics: which action was it?
    if cfg.inverse:
        logits = model.which_action(read[:, 0], forced[0], mask)
        loss = loss + cfg.inverse * F.cross_entropy(logits, actions[:, 0])
    stats["r2"] = tjepa.r_squared(
        forced[0].flatten(0, 1).detach(), target[:, 1].flatten(0, 1), mask.flatten())
    return loss, {name: value.detach() for name, value in stats.items()}

def draw_walks(cfg, batch):
    """Random parts of trajectories: facts (B, K+1, S), actions (B, K)."""
    states, actions = house.walks(cfg.trajectories)
    which = torch.randint(len(states), (batch, 1))
    start = torch.randint(actions.size(1) - cfg.rollout + 1, (batch, 1))
    steps = start + torch.arange(cfg.rollout + 1)
    return states[which, steps], actions[which, steps[:, :-1]]

def train_frozen(run, cfg):
    """The transition model on a frozen encoder: (transition, latents)."""
    latents = house.latents_of(run.model, run.corpus.tokenizer, cfg.block_size)
    model = WorldModel(run.model)

    def loss_at(progress):
        """Loss of random parts of trajectories."""
        return rollout_loss(model, cfg, latents, *draw_walks(cfg, cfg.qa_batch_size))
    fit(run._replace(model=model), "distill", loss_at)
    return model.transition.eval(), latents

def train_joint(run, cfg):
    """Encoder and transition model together: phase 1 whose spans are next states.

    The transition model reads the context encoder's last layer, and predicts the target encoder's
    mean of layers. In a rollout it reads its own predictions instead: both pass one input map,
    and the rollout loss teaches it that they mean the same.
    """
    model = WorldModel(run.model)
    tokenizer = run.corpus.tokenizer
    facts = house.sentences(tokenizer, world.say_fact, world.FACTS, cfg.block_size)
    actions = house.sentences(tokenizer, world.say_action, world.ACTIONS, cfg.block_size)
    known = house.seen_facts().repeat_interleave(world.N_WORDINGS)
    known &= (torch.arange(world.N_WORDINGS) < house.HELD_OUT).repeat(len(world.FACTS))

    def latents_now():
        """`house.Latents` of the encoders as they are; the context encoder's have a gradient."""
        with torch.no_grad():
            target = model.encode_sentences(facts, model.target_encoder, cfg.top_k)
        both = model.encode_sentences(torch.cat((facts, F.pad(
            actions, (0, facts.size(1) - actions.size(1)), value=model.cfg.pad))),
            model.context_encoder, 1)
        read, said = both.split((len(facts), len(actions)))
        tables = (part.unflatten(0, (-1, world.N_WORDINGS)) for part in (target, read, said))
        return house.Latents(*tables)

    def loss_at(progress):
        """Loss of random parts of trajectories, and SIGReg of the sentences of the text."""
        latents = latents_now()
        loss, stats = rollout_loss(model, cfg, latents, *draw_walks(cfg, cfg.qa_batch_size))
        if cfg.sigreg:
            loss = loss + cfg.sigreg * tjepa.sigreg(latents.read.flatten(0, 1)[known])
        return loss, stats
    fit(run._replace(model=model), "pretrain", loss_at)
    with torch.no_grad():
        return model.transition.eval(), latents_now()

# -- phases 1 and 3 --------------------------------------------------------------------------------

# what phase 1 does not depend on
LATER = "noise distill_steps distill_lr speak_steps speak_lr qa_batch_size eval_every".split()

def open_encoder(cfg, corpus):
    """A `train.Run` after phase 1. Arms of a seed with the same phase 1 share it."""
    name = f"encoder {cfg.variant} mlm {cfg.mlm} sigreg {cfg.sigreg} steps {cfg.pretrain_steps}"
    folder = Path(cfg.out).with_name(f"{name.replace(' ', '_')}_{cfg.seed}")
    steps = 0 if cfg.joint else cfg.pretrain_steps
    later = {name: getattr(BASE, name) for name in LATER}
    wanted = plain(cfg, phase="pretrain", out=str(folder), pretrain_steps=steps, **later)
    figures = {}
    done = (folder / "ckpt.pt").exists()
    if done:
        saved = train.load_checkpoint(folder)
        same = saved["config"] == dataclasses.asdict(wanted) and saved["evaluated"]
        done = same and saved["corpus"] == corpus.fingerprint
        figures = saved["rows"][-1]
    if not done:
        figures = train.run(wanted, corpus, model_of(cfg))
    run = open_run(dataclasses.replace(cfg, out=str(folder), pretrain_steps=steps), corpus)
    kept = {name: figures[name] for name in ("val_r2", "rank", "health") if name in figures}
    return run._replace(cfg=plain(cfg)), {} if cfg.joint else kept

def teach_speech(run, cfg, latents):
    """Phase 3 on states: latents of sentences of the text -> the first wording of their fact."""
    tokenizer = run.corpus.tokenizer
    seen = house.seen_facts().nonzero()[:, 0]
    first = [" " + world.say_fact(fact) for fact in world.FACTS]
    answers = data.pack(tokenizer, first, cfg.answer_size - 1, "--answer_size")
    answers = F.pad(answers, (0, 1), value=tokenizer.pad)
    ends = (answers != tokenizer.pad).sum(1, keepdim=True)
    answers = answers.scatter(1, ends, tokenizer.eos)                   # (F, L)
    centres = latents.centres()
    model = run.model

    def loss_at(progress):
        """Loss of random sentences: half of them in a wording, half as the mean of the wordings."""
        fact = seen[torch.randint(len(seen), (cfg.qa_batch_size,))]
        worded = latents.facts[fact, torch.randint(house.HELD_OUT, fact.shape)]
        latent = torch.where(torch.rand(len(fact), 1) < 0.5, worded, centres[fact])
        thought = tjepa.Thought(latent, latent[:, None], torch.ones(len(fact), 1).bool())
        return model.speak_loss(thought, answers[fact], centres[fact], alpha=0.0)
    fit(run, "speak", loss_at)

def speak(run, slots):
    """Sentences of latents (n, C): a list of n strings."""
    thought = tjepa.Thought(slots, slots[:, None], torch.ones(len(slots), 1).bool())
    ids = torch.stack(list(run.model.speak(thought)), dim=1)
    return [run.corpus.tokenizer.decode(row).strip() for row in ids.tolist()]

# -- figures ---------------------------------------------------------------------------------------

def test_walks(n, steps=5, seed=7):
    """New trajectories: states, a list of n lists, and actions, (n, steps) as numbers."""
    random_ = random.Random(seed)
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

def imagined_figures(imagination, run, n):
    """Imagined states after 1, 3 and 5 steps: nearest facts right, and said right."""
    states, actions = test_walks(n)
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

@torch.no_grad()
def counterfactual(imagination, n):
    """Same state, two actions with two outcomes: are both predicted states the right ones?"""
    random_ = random.Random(11)
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

def intervention(policy, n):
    """An object is moved by hand so that no best action stays one: is the new action a best one?"""
    random_ = random.Random(13)
    right = []
    for task in house.tasks("4_6", 4 * n):
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
    found = {f"success_{name}": house.success(policy, house.tasks(name, cfg.episodes))
             for name in house.BINS}
    unseen = house.tasks("4_6", cfg.episodes, unseen=True)
    return found | dict(success_unseen=house.success(policy, unseen))

def seconds_a_plan(policy, n=5):
    """Mean time of the first plan of a task of 6 actions."""
    some = [task for task in house.tasks("4_6", 40) if task.shortest == 6][:n]
    started = time.perf_counter()
    for task in some:
        policy(task.start, task.goal)
    return (time.perf_counter() - started) / len(some)

def planning_figures(imagination, cfg):
    """All that a policy which searches in latents is asked."""
    policy = house.planner(imagination, seed=cfg.seed)
    found = task_figures(policy, cfg)
    some = [task for name in house.BINS for task in house.tasks(name, cfg.episodes)[::3]]
    if cfg.costs:
        for cost in ("closest", "last", "sum"):
            found[f"success_{cost}"] = house.success(
                house.planner(imagination, seed=cfg.seed, cost=cost), some)
    new_words = house.LatentWorld(imagination.transition, imagination.latents, house.HELD_OUT)
    found["success_wording"] = house.success(house.planner(new_words, [house.HELD_OUT]), some)
    found["intervention"] = intervention(policy, cfg.episodes)
    found["counterfactual"] = counterfactual(imagination, 5 * cfg.episodes)
    found["wordings"] = wordings_alike(imagination.latents)
    found["seconds_plan"] = seconds_a_plan(policy)
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
        policy = GPTWorld.trained(cfg, corpus).policy()
        return task_figures(policy, cfg) | dict(seconds_plan=seconds_a_plan(policy, 3))
    run, figures = open_encoder(cfg, corpus)
    transition, latents = (train_joint if cfg.joint else train_frozen)(run, cfg)
    teach_speech(run, cfg, latents)
    imagination = house.LatentWorld(transition, latents)
    figures |= imagined_figures(imagination, run, 5 * cfg.episodes)
    return figures | planning_figures(imagination, cfg)

# -- the whole -------------------------------------------------------------------------------------

def arms_of(base):
    """The arms, name -> Config."""
    return {name: dataclasses.replace(base, **change) for name, change in ARMS.items()}

def planning(flags):
    """Run the arms and print the tables."""
    if flags.fast:
        print("labs.planning --fast: a minute on one core; its figures mean nothing")
        arms = {name: dataclasses.replace(in_short(cfg), episodes=4)
                for name, cfg in arms_of(BASE).items()}
        run_arms("planning", arms, dataclasses.replace(flags, seeds=1, redo=True), measure)
        print("\n".join(f"{name}: ran" for name in chosen(flags, arms)))
        return
    run_arms("planning", arms_of(BASE), flags, measure)

if __name__ == "__main__":
    main(planning, Flags)
