"""
Variants of the model: each class changes one idea of tjepa.py, for `train.run(model=...)`.

They are used in experiments only, so that tjepa.py contains the method alone. A class keeps the
Config of `tjepa.TJEPA`; classes are combined by inheriting from several. An arm of a lab names its
class in the field `variant` of `labs.runs.Arm`.
"""
import math
from copy import deepcopy

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

    def pretrain_loss(self, tokens, span_ids):
        """Loss of phase 1, without SIGReg and without token loss."""
        p = self.predict(tokens, span_ids)
        error = F.smooth_l1_loss(p.predicted, p.target, reduction="none").mean(-1)      # (B, S)
        loss = tjepa.masked_mean(error, p.span_mask, (0, 1))
        return loss, dict(latent=loss.detach())

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
