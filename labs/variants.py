"""
Ablations of the model: each class changes one idea of tjepa.py, for `train.run(model=...)`.

Switches that only an experiment flips live here, so that tjepa.py holds the method alone. A class
keeps the Config of `tjepa.TJEPA`; classes can be combined by inheriting from several.
"""
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

    def forward(self, tokens, positions, mask=None, top_k=1):
        """As `Encoder.forward`: the position's embedding is added to the token's."""
        def add_position(module, inputs, embedded):
            return embedded + self.embed_position(positions)
        with self.embed.register_forward_hook(add_position):
            return super().forward(tokens, positions, mask, top_k)

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
        """Loss of phase 1, without token loss."""
        p = self.predict(tokens, span_ids)
        error = F.smooth_l1_loss(p.predicted, p.target, reduction="none").mean(-1)      # (B, S)
        loss = tjepa.masked_mean(error, p.span_mask, (0, 1))
        flat = (part.flatten(0, 1) for part in (p.predicted, p.target, p.span_mask))
        stats = dict(latent=loss, r2=tjepa.r_squared(*flat))
        if self.cfg.sigreg:
            stats["sigreg"] = self.regularise(p)
            loss = loss + self.cfg.sigreg * stats["sigreg"]
        return loss, {name: value.detach() for name, value in stats.items()}

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
        index = torch.multinomial(p.context_mask.flatten().float(), 512, replacement=True)
        return vicreg(F.embedding(index, p.context.flatten(0, 1)))

class NoPredictor(TJEPA):
    """No predictor: the encoder reads a [MASK] where a token is missing and predicts there."""

    def __init__(self, cfg, word_start):
        super().__init__(cfg, word_start)
        self.predictor = nn.Identity()

    def read(self, tokens, positions, mask, query_pos, query_mask):
        """Context latents (B, T, C) of tokens (B, T), and predicted ones (B, K, C) at query_pos."""
        T, n_queries = tokens.size(1), query_pos.size(1)
        tokens = F.pad(tokens, (0, n_queries), value=self.cfg.mask)     # (B, T+K)
        positions = torch.cat((positions, query_pos), dim=1)
        mask = torch.cat((mask, query_mask), dim=1)
        return self.context_encoder(tokens, positions, mask).split((T, n_queries), dim=1)

    def predict(self, tokens, span_ids, n_removed=None):
        """As `TJEPA.predict`."""
        cfg = self.cfg
        n_removed = n_removed or max(1, round(tokens.size(1) * cfg.mask_ratio))
        spans = tjepa.split_spans(span_ids, tokens, n_removed, cfg)
        target = self.target_latents(tokens, spans)
        kept = tokens.gather(1, spans.context)
        context, states = self.read(kept, spans.context, spans.context_mask,
                                    spans.removed, spans.removed_mask)
        word_ids = tokens.gather(1, spans.removed).masked_fill(~spans.removed_mask, -100)
        return tjepa.Prediction(spans.mean(states), target, spans.members.any(-1), context,
                                spans.context_mask, states, word_ids)

    def word_logits(self, p):
        """Logits of each removed token, (B, K, V)."""
        return F.linear(tjepa.norm(p.states), self.context_encoder.embed.weight)

    def think(self, question, drop=0.0):
        """As `TJEPA.think`."""
        real, next_pos = self.drop_tokens(question, drop)
        positions = torch.arange(question.size(1), device=question.device).expand_as(question)
        every = torch.ones_like(next_pos).bool()
        context, states = self.read(question, positions, real, next_pos, every)
        return tjepa.Thought(self.W(states[:, 0]), context, real)

class MaskedLM(NoPredictor):
    """The token-grounded control: phase 1 predicts the removed tokens, and no latents."""

    def pretrain_loss(self, tokens, span_ids):
        """Cross-entropy of the removed tokens alone."""
        loss = self.word_loss(self.predict(tokens, span_ids))
        return self.cfg.mlm * loss, dict(mlm=loss.detach())

class BothDecoder(tjepa.Decoder):
    """Decoder whose memory holds the slots of the thought, then the question's token latents."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.slots = nn.Linear(cfg.teacher_width or cfg.n_embd, cfg.n_slots * cfg.n_embd)

    def memory_slots(self, thought):
        """`Thought` -> (B, M+T, C), mask (B, M+T)."""
        slots, mask = super().memory_slots(thought)
        return (torch.cat((slots, thought.context), dim=1),
                torch.cat((mask, thought.context_mask), dim=1))

class BothMemories(TJEPA):
    """The decoder reads thought and token latents; to be used with memory=tokens, so that they are
    kept. memory_drop: share of the rows of phase 3 without token latents."""
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
