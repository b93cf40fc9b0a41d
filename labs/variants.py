"""
Variants of the model: each class changes one idea of tjepa.py, for `train.run(model=...)`.

They are used in experiments only, so that tjepa.py contains the method alone. A class keeps the
Config of `tjepa.TJEPA`; classes are combined by inheriting from several. An arm of a lab names its
class in the field `variant` of `labs.runs.Arm`.
"""
import math
from copy import copy, deepcopy

import torch
import torch.nn as nn
from torch.nn import functional as F

import tjepa
from tjepa import TJEPA

class GPT2Init(TJEPA):
    """Weight matrices start with GPT-2's standard deviation of .02, whatever their width."""

    def init_weights(self, module):
        """As in GPT-2."""
        super().init_weights(module)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

class PositionEncoder(tjepa.Encoder):
    """Encoder with learned absolute positions instead of rotary ones."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.embed_position = nn.Embedding(cfg.block_size + 1, cfg.n_embd)
        self.rope.fill_(1)                              # rotates by nothing

    def forward(self, tokens, positions, *arguments, **options):
        """As `Encoder.forward`: the position's embedding is added to the token's."""
        def add_position(module, inputs, embedded):
            """What the embedding returns, with positions."""
            return embedded + self.embed_position(positions)
        with self.embed.register_forward_hook(add_position):
            return super().forward(tokens, positions, *arguments, **options)

class LearnedPositions(TJEPA):
    """Learned positions in the encoders; the predictor's stay rotary."""

    def __init__(self, cfg, word_start):
        super().__init__(cfg, word_start)
        self.context_encoder = PositionEncoder(cfg)
        self.context_encoder.apply(self.init_weights)
        self.target_encoder = deepcopy(self.context_encoder).requires_grad_(False)

class SmoothL1(TJEPA):
    """Smooth L1 distance to the target, as in data2vec."""

    def latent_loss(self, p):
        """Its mean over the spans of all texts."""
        error = F.smooth_l1_loss(p.predicted, p.target, reduction="none").mean(-1)      # (B, S)
        return tjepa.masked_mean(error, p.span_mask, (0, 1))

def vicreg(z):
    """VICReg's two regularisers (2022) of z (N, C), weighted 25 : 1 as there.

    Each dimension's standard deviation is pulled above 1, each covariance towards 0.
    """
    cov = torch.cov(z.T)                                                # (C, C)
    variance = F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean()
    off_diagonal = cov - cov.diagonal().diag()
    return variance + off_diagonal.pow(2).sum() / z.size(1) / 25

class VICReg(TJEPA):
    """VICReg instead of SIGReg; its weight is --sigreg, and so is its name in the log."""

    def regularise(self, p):
        """VICReg of 512 sampled context latents."""
        return vicreg(self.sample_latents(p))

class NoPredictor(TJEPA):
    """No predictor: the encoder reads a [MASK] where a token is missing and predicts there."""

    def __init__(self, cfg, word_start):
        super().__init__(cfg, word_start)
        self.predictor = nn.Identity()

    def read(self, tokens, positions, mask):
        """Context latents (B, N, C) of tokens (B, N), and predicted ones (B, K, C).

        positions, mask (B, N+K): of the tokens, then of what is predicted.
        """
        n_context = tokens.size(1)
        n_queries = positions.size(1) - n_context
        tokens = F.pad(tokens, (0, n_queries), value=self.cfg.mask)     # (B, N+K)
        latents = self.context_encoder(tokens, positions, mask)
        return latents.split((n_context, n_queries), dim=1)

    def predict(self, tokens, span_ids, n_removed=None, unit=None):
        """As `TJEPA.predict`."""
        n_removed = n_removed or max(1, round(tokens.size(1) * self.cfg.mask_ratio))
        n_masks = len(span_ids) // len(tokens)
        if n_masks > 1:
            tokens = tokens.repeat_interleave(n_masks, 0)
        spans = tjepa.split_spans(span_ids, tokens, n_removed, self.cfg, unit)
        target = self.target_latents(spans, n_masks)
        kept, _, _ = spans.context_tokens()
        context, states = self.read(kept, spans.positions, spans.real)
        return tjepa.Prediction(spans.mean(states), target, context, states, spans)

    def word_logits(self, p):
        """Logits of each removed token, (B, K, V)."""
        return F.linear(tjepa.norm(p.states), self.context_encoder.embed.weight)

    def think(self, question, drop=0.0):
        """As `TJEPA.think`."""
        kept = self.drop_tokens(question, drop)
        positions = torch.arange(question.size(1), device=question.device).expand_as(question)
        after = (question != self.cfg.pad).sum(1, keepdim=True)
        positions = torch.cat((positions, after), dim=1)
        context, states = self.read(question, positions, F.pad(kept, (0, 1), value=True))
        return tjepa.Thought(self.W(states[:, 0]), context, kept)

class MaskedLM(NoPredictor):
    """The token-grounded control: phase 1 predicts the removed tokens, and no latents."""

    def pretrain_loss(self, tokens, span_ids):
        """Cross-entropy of the removed tokens alone."""
        loss = self.word_loss(self.predict(tokens, span_ids))
        return self.cfg.mlm * loss, dict(mlm=loss.detach())

def sample_blocks(tokens, size, word_start, cfg):
    """As `tjepa.sample_spans`, but the spans are blocks of `size` tokens on a fixed grid.

        tokens      the | c | at | sat | on | the          size 2
        blocks       0    0   1     1    2     2           if each token may begin a block
                     0    0   0     1    2     2           if only words may: "c at" stays whole

    Random blocks are removed until the budget of the row is spent; the last one may be cut short.
    word_start: bool (vocab_size,), True for tokens at which a block may begin.
    """
    B, T = tokens.shape
    t = torch.arange(T, device=tokens.device)                           # (T,)
    real = tokens != cfg.pad                                            # (B, T)
    first = tjepa.first_of_word(word_start[tokens] | (t == 0), t)       # (B, T)

    # turn: the place of each block in a random order; blocks of padding come last
    chance = torch.rand(B, math.ceil(T / size), device=tokens.device)   # (B, blocks)
    order = chance.masked_fill(~real[:, ::size], torch.inf).argsort(1)
    places = torch.arange(order.size(1), device=tokens.device).expand_as(order)
    turn = torch.empty_like(order).scatter(1, order, places)
    block = turn.gather(1, first // size)                               # (B, T)

    # as in `sample_spans`: exactly mask_ratio of the real tokens, block by block
    budget = (real.sum(1, keepdim=True).double() * cfg.mask_ratio).round().clamp(min=1).long()
    place = (block * T + t).masked_fill(~real, T * T)
    last = place.sort(1).values.gather(1, budget - 1)                   # (B, 1)
    removed = (place <= last) & real
    return torch.where(removed, block.clamp(max=cfg.max_spans - 1), cfg.max_spans)

class FixedBlocks(TJEPA):
    """Removes blocks of 3 tokens on a fixed grid, which may cut words, instead of spans.

    They have 2.8 tokens in the mean, because the last one is cut short; spans have 3.2.
    """

    def starts(self):
        """Tokens at which a block may begin: all of them, bool (V,)."""
        return torch.ones_like(self.word_start)

    def pretrain_loss(self, tokens, span_ids):
        """Loss of phase 1 with blocks; span_ids are ignored."""
        return super().pretrain_loss(tokens, sample_blocks(tokens, 3, self.starts(), self.cfg))

class FixedBlocksOfWords(FixedBlocks):
    """Each word belongs, as a whole, to the block in which it begins."""

    def starts(self):
        """Tokens that begin a word, bool (V,)."""
        return self.word_start

class Negatives(TJEPA):
    """InfoNCE that tells the own target from others than those of the batch; for target=token.

    Equal words are no negatives of each other; `stored`: so many targets of earlier steps are.
    """
    stored = 0

    def __init__(self, cfg, word_start):
        super().__init__(cfg, word_start)
        self.earlier = torch.empty(0, cfg.n_embd), torch.empty(0, dtype=torch.long)

    def latent_loss(self, p):
        """InfoNCE, temperature .1, over the N removed tokens of the batch."""
        real = p.span_mask.flatten()
        words = p.word_ids.flatten()[real]                              # (N,)
        predicted = F.normalize(p.predicted.flatten(0, 1)[real], dim=-1)    # (N, C)
        targets = F.normalize(p.target.flatten(0, 1)[real], dim=-1).detach()
        own = torch.arange(len(words), device=words.device)             # (N,)
        older, words_of_older = (part.to(words.device) for part in self.earlier)
        targets, each = torch.cat((targets, older)), torch.cat((words, words_of_older))
        equal = words[:, None] == each                                  # (N, N + stored)
        equal[own, own] = False
        self.earlier = targets[:self.stored], each[:self.stored]
        logits = (predicted @ targets.T / 0.1).masked_fill(equal, -torch.inf)
        return F.cross_entropy(logits, own)

class Queue(Negatives):
    """A queue of 2,048 targets, as in MoCo (He et al. 2020)."""
    stored = 2048

class Hypotheses(TJEPA):
    """Four predictions of each latent; the best one counts, since several words may fit a gap."""

    def __init__(self, cfg, word_start):
        super().__init__(cfg, word_start)
        self.more = nn.Linear(cfg.pred_embd, 3 * cfg.n_embd)
        self.more.apply(self.init_weights)

    def trained_in(self, phase):
        """As `TJEPA.trained_in`, with the other three predictions."""
        return super().trained_in(phase) + [self.more] * (phase == "pretrain")

    def best_error(self, p):
        """MSE of the best prediction of each span, (B, S)."""
        more = self.more(p.states).chunk(3, dim=-1)
        predicted = [p.predicted, *map(p.spans.mean, more)]             # 4 of (B, S, C)
        errors = [tjepa.latent_error(each, p.target, "mse") for each in predicted]
        return torch.stack(errors).amin(0)

    def latent_loss(self, p):
        """The best prediction, and a tenth of the first: else three might never be trained."""
        return tjepa.masked_mean(
            self.best_error(p) + 0.1 * tjepa.latent_error(p.predicted, p.target, "mse"),
            p.span_mask, (0, 1))

    @torch.no_grad()
    def energy(self, tokens, span_ids):
        """As `TJEPA.energy`, of the best prediction."""
        n_removed = int((span_ids < self.cfg.max_spans).sum(1).max())
        p = self.predict(tokens, span_ids, n_removed)
        return tjepa.masked_mean(self.best_error(p), p.span_mask, 1)

class FrozenTarget(TJEPA):
    """The target encoder stays as it was drawn: what learns is the context encoder alone."""

    def ema_update(self):
        """Nothing to do."""

class TaughtByMaskedLM(FrozenTarget):
    """Target: an encoder that was a masked LM for the first quarter of phase 1, then frozen.

    As in SALT (2025), where a frozen teacher replaces the EMA. The experiment sets `progress`, the
    share of phase 1 that is over.
    """
    progress = 0.0

    def __init__(self, cfg, word_start):
        super().__init__(cfg, word_start)
        self.teacher = MaskedLM(cfg, word_start)

    def trained_in(self, phase):
        """As `TJEPA.trained_in`, with the teacher."""
        return super().trained_in(phase) + [self.teacher] * (phase == "pretrain")

    def pretrain_loss(self, tokens, span_ids):
        """The teacher's cross-entropy, later the student's loss of phase 1."""
        if self.progress < 0.25:
            loss = self.teacher.word_loss(self.teacher.predict(tokens, span_ids))
            return loss, dict(mlm=loss.detach())
        return super().pretrain_loss(tokens, span_ids)

    def ema_update(self):
        """The target is the teacher, whose weights no longer change once the student learns."""
        self.target_encoder.load_state_dict(self.teacher.context_encoder.state_dict())

class GrowingSpans(TJEPA):
    """The longest span grows from 1 token to max_span during phase 1; for target=token.

    The experiment sets `progress`, the share of phase 1 that is over.
    """
    progress = 0.0

    def pretrain_loss(self, tokens, span_ids):
        """Loss of phase 1 with spans of its own; span_ids are ignored."""
        cfg = copy(self.cfg)
        cfg.max_span = 1 + round(self.progress * (self.cfg.max_span - 1))
        span_ids = tjepa.sample_spans(tokens, self.word_start, cfg)
        stays = span_ids == cfg.max_spans
        # a token is a span of its own, so the numbers of the spans do not matter
        return super().pretrain_loss(tokens, self.cfg.max_spans * stays)

class BothDecoder(tjepa.Decoder):
    """Decoder whose memory holds the slots of the thought, then the question's token latents."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.slots = nn.Linear(cfg.teacher_width or cfg.n_embd, cfg.n_slots * cfg.n_embd)

    def memory_slots(self, thought):
        """`Thought` -> (B, M+T, C), and their mask from `additive`."""
        slots, _ = super().memory_slots(thought)
        mask = F.pad(thought.context_mask, (self.n_slots, 0), value=True)
        return torch.cat((slots, thought.context), dim=1), tjepa.additive(mask)

class BothMemories(TJEPA):
    """The decoder reads thought and token latents; needs memory=tokens, so that they are kept.

    memory_drop: share of the rows of phase 3 without token latents.
    """
    memory_drop = 0.0

    def __init__(self, cfg, word_start):
        super().__init__(cfg, word_start)
        self.decoder = BothDecoder(cfg)
        self.decoder.apply(self.init_weights)

    def speak_loss(self, thought, answer, answer_latent, alpha):
        """As `TJEPA.speak_loss`, some rows without token latents."""
        kept = torch.rand_like(thought.latent[:, :1]) >= self.memory_drop       # (B, 1)
        thought = thought._replace(context_mask=thought.context_mask & kept)
        return super().speak_loss(thought, answer, answer_latent, alpha)

class BothDrop5(BothMemories):
    """Half of the rows without token latents."""
    memory_drop = 0.5

class BothDrop9(BothMemories):
    """Nine tenths of the rows without token latents."""
    memory_drop = 0.9

class LearnedPositionsNoPredictor(LearnedPositions, NoPredictor):
    """Both changes."""

class LearnedPositionsMaskedLM(LearnedPositions, MaskedLM):
    """The token-grounded control with learned positions."""

class Data2Vec(LearnedPositions, NoPredictor, SmoothL1):
    """As data2vec: [MASK]s in the encoder, smooth L1 distance; with learned positions."""
