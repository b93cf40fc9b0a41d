"""
The world model of the planning lab: what an action does to the latents of a state.

cfg is a `labs.planning.Config`. Shapes as in labs/house.py; B rows, K steps of a rollout.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

import data
import tjepa
import train
from data.house import prepare as world
from labs import house
from labs.runs import fit

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
        # position 0 alone, which rotates by nothing: sentences have no order
        rope = tjepa.rotary(1, cfg.pred_embd // cfg.n_head)
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, slots, mask, action):
        """slots (n, S, C), mask bool (n, S), action (n, C) -> next slots (n, S, C)."""
        x = torch.cat((self.state_proj(slots), self.action_proj(action)[:, None]), dim=1)
        mask = tjepa.additive(F.pad(mask, (0, 1), value=True))          # (n, 1, 1, S+1)
        for block in self.blocks:
            x = block(x, self.rope, mask)
        return self.latent_proj(self.norm(x[:, :-1]))

class WorldModel(nn.Module):
    """A transition model and an inverse one, on an encoder that is frozen or trained with them."""
    init_weights = tjepa.TJEPA.init_weights
    ema_update = tjepa.TJEPA.ema_update

    def __init__(self, jepa):
        super().__init__()
        self.cfg = cfg = jepa.cfg
        self.context_encoder = jepa.context_encoder
        self.target_encoder = jepa.target_encoder
        self.transition = Transition(cfg)
        self.inverse = nn.Sequential(nn.Linear(2 * cfg.n_embd, cfg.pred_embd), nn.GELU(),
                                     nn.Linear(cfg.pred_embd, len(world.ACTIONS)))
        self.transition.apply(self.init_weights)
        self.inverse.apply(self.init_weights)

    def trained_in(self, phase):
        """Phase "pretrain" of `train.fit` trains the encoder too, "distill" does not."""
        parts = [self.transition, self.inverse]
        return [self.context_encoder, *parts] if phase == "pretrain" else parts

    def encode_sentences(self, tokens, encoder, top_k):
        """Pooled latents of sentences (n, T), layer-normed: (n, C)."""
        real = tokens != self.cfg.pad
        latents = encoder(tokens, torch.arange(tokens.size(1)), real, top_k)
        return tjepa.norm(tjepa.masked_mean(latents, real[..., None], 1))

def in_any_wording(table, numbers, noise):
    """Latents (..., C) of facts or actions in random trained wordings, with noise; any for -1.

    table (n, W, C), numbers (...).
    """
    index = numbers.clamp(min=0) * table.size(1) + torch.randint(house.HELD_OUT, numbers.shape)
    # F.embedding and not table[...]: the backward of indexing is not deterministic.
    latents = F.embedding(index, table.flatten(0, 1))
    return latents + noise * torch.randn_like(latents)

def some_slots(mask):
    """For half of the rows of mask (B, S) one random slot alone: as a goal is read."""
    chance = torch.rand(mask.shape).masked_fill(~mask, -1)
    alone = F.one_hot(chance.argmax(1), mask.size(1)).bool()
    return torch.where(torch.rand(len(mask), 1) < 0.5, alone, mask)

def rollout_loss(model, cfg, latents, facts, actions):
    """Teacher forcing, and a rollout of K = cfg.rollout steps -> (loss, stats).

    facts (B, K+1, S), actions (B, K). What is read has noise, because predicted states are inexact.
    What is predicted is the mean over the trained wordings.
    """
    B, K = actions.shape
    mask = facts[:, 0] >= 0                                             # (B, S)
    read = in_any_wording(latents.read, facts, cfg.noise)               # (B, K+1, S, C)
    said = in_any_wording(latents.actions, actions, cfg.noise)          # (B, K, C)
    target = F.embedding(facts.clamp(min=0), latents.centres())         # (B, K+1, S, C)
    if cfg.given == "shuffled":
        said = said[torch.randperm(B)]                                  # (B, K, C)
    if cfg.given == "none":
        said = torch.zeros_like(said)

    def distance(predicted, step, mask):
        """MSE of the predicted state (B, S, C) after a step -> a number."""
        error = (predicted - target[:, step]).square().mean(-1)
        return tjepa.masked_mean(error, mask, (0, 1))

    # 1. teacher forcing: each step from the true state
    forced = [model.transition(read[:, k], mask, said[:, k]) for k in range(K)]
    forced_loss = sum(distance(predicted, k + 1, mask) for k, predicted in enumerate(forced)) / K
    loss = forced_loss
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
        logits = model.inverse(torch.cat((read[:, 0], forced[0]), dim=-1))  # (B, S, A)
        logits = tjepa.masked_mean(logits, mask[..., None], 1)              # (B, A)
        loss = loss + cfg.inverse * F.cross_entropy(logits, actions[:, 0])
    return loss, dict(latent=forced_loss.detach())

def draw_walks(cfg, batch):
    """Random parts of trajectories, all outcomes equally often: facts (B, K+1, S), actions (B, K).

    An outcome is the kind of the first action, and whether it changes the state. In the text one
    part in thirty puts something down.
    """
    states, actions = house.walks(cfg.trajectories)
    starts = actions.size(1) - cfg.rollout + 1
    kinds = torch.tensor([["go", "take", "put"].index(kind) for kind, _ in world.ACTIONS])
    changed = (states[:, 1:] != states[:, :-1]).any(-1)
    outcome = (2 * kinds[actions] + changed)[:, :starts].flatten()
    drawn = (1 / outcome.bincount()[outcome]).multinomial(batch, replacement=True)
    which, start = drawn[:, None] // starts, drawn[:, None] % starts
    steps = start + torch.arange(cfg.rollout + 1)
    return states[which, steps], actions[which, steps[:, :-1]]

def train_frozen(run, cfg):
    """The transition model on a frozen encoder: (transition, latents)."""
    latents = house.latents_of(run.model, run.corpus.tokenizer, cfg.block_size)
    model = WorldModel(run.model)

    def loss_at(progress):
        """Loss of random walks."""
        return rollout_loss(model, cfg, latents, *draw_walks(cfg, cfg.qa_batch_size))
    fit(run._replace(model=model), "distill", loss_at)
    if cfg.given == "none":             # it has none in planning either
        latents = latents._replace(actions=torch.zeros_like(latents.actions))
    return model.transition.eval(), latents

def train_joint(run, cfg):
    """Encoder and transition model together: phase 1 whose spans are next states.

    The transition model reads the context encoder's last layer, or in a rollout its own
    predictions, and predicts the target encoder's mean of layers.
    """
    model = WorldModel(run.model)
    tokenizer = run.corpus.tokenizer
    facts = house.sentences(tokenizer, world.say_fact, world.FACTS, cfg.block_size)
    actions = house.sentences(tokenizer, world.say_action, world.ACTIONS, cfg.block_size)
    in_text = house.SEEN[:, None] & (torch.arange(world.N_WORDINGS) < house.HELD_OUT)
    known = in_text.flatten().nonzero()[:, 0]

    def latents_now():
        """`house.Latents` of the encoders as they are; the context encoder's have a gradient."""
        with torch.no_grad():
            target = model.encode_sentences(facts, model.target_encoder, cfg.top_k)
        read, said = (model.encode_sentences(tokens, model.context_encoder, 1)
                      for tokens in (facts, actions))
        tables = (part.unflatten(0, (-1, world.N_WORDINGS)) for part in (target, read, said))
        return house.Latents(*tables)

    def loss_at(progress):
        """Loss of both: of the encoder on text, of the transition on its latents."""
        latents = latents_now()
        loss, stats = rollout_loss(model, cfg, latents, *draw_walks(cfg, cfg.qa_batch_size))
        if cfg.sigreg:
            sentences = F.embedding(known, latents.read.flatten(0, 1))
            loss = loss + cfg.sigreg * run.model.sigreg(sentences)
        return loss, stats
    fit(run._replace(model=model), "pretrain", loss_at)
    with torch.no_grad():
        return model.transition.eval(), latents_now()

def teach_speech(run, cfg, latents):
    """Phase 3 on states: latents of sentences of the text -> the first wording of their fact."""
    seen = house.SEEN.nonzero()[:, 0]
    first = [world.say_fact(fact) for fact in world.FACTS]
    tokenizer = run.corpus.tokenizer
    answers = data.pack_answers(tokenizer, first, cfg.answer_size - 1, "--answer_size")
    answers = train.with_end(answers, tokenizer)                        # (F, L)
    centres = latents.centres()

    def loss_at(progress):
        """Loss of sentences said from their latents."""
        # half of the sentences in a wording, half as the mean of the wordings
        fact = seen[torch.randint(len(seen), (cfg.qa_batch_size,))]
        worded = latents.facts[fact, torch.randint(house.HELD_OUT, fact.shape)]
        latent = torch.where(torch.rand(len(fact), 1) < 0.5, worded, centres[fact])
        thought = tjepa.thought_of(latent)
        return run.model.speak_loss(thought, answers[fact], centres[fact], alpha=0.0)
    fit(run, "speak", loss_at)
