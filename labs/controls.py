"""What a student would use instead of a T-JEPA, in the same size and from the same blocks: the controls of the labs."""
import torch
import torch.nn as nn
from torch.nn import functional as F

import tjepa

# flags of train.py: the encoder itself reads [MASK]s and fills in words; no latent is predicted, none is kept apart
MASKED_LM = dict(loss="none", mlm=1.0, sigreg=0.0, pred_layer=0)


class GPT(nn.Module):
    """A decoder-only language model; its head is its embedding. V*C + n_layer * (12*C*C + 2*C) + C parameters.
    cfg: a `tjepa.Config`, of which it takes vocabulary, width, heads and depth; longest: tokens that it can read."""
    init_weights = tjepa.TJEPA.init_weights

    def __init__(self, cfg, longest):
        super().__init__()
        self.cfg, C = cfg, cfg.n_embd
        self.embed = nn.Embedding(cfg.vocab_size, C)
        self.blocks = nn.ModuleList(tjepa.Block(C, cfg.n_head) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(C, bias=False)
        self.register_buffer("rope", tjepa.rotary(longest, C // cfg.n_head), persistent=False)
        self.apply(self.init_weights)

    def trained_in(self, phase):
        """All of it, whatever the phase, so that `train.fit` trains it; decayed the embedding too, as in nanoGPT."""
        return list(self.children())

    def layers(self, tokens, positions=None, mask=None, caches=None):
        """tokens (B, T) at positions (T,), without them the next ones -> the states of each layer, (B, T, C) each.
        mask: bool (T, T), without it causal. With caches, tokens are only the newest."""
        past = caches[0][0]["k"].size(2) if caches and caches[0][0] else 0
        x, states = self.embed(tokens), []                                              # (B, T, C)
        rope = self.rope[past:past + tokens.size(1)] if positions is None else self.rope[positions]     # (T, hs/2)
        for block, cache in zip(self.blocks, caches or [(None, None)] * len(self.blocks)):
            x = block(x, rope, mask=mask, causal=mask is None and not past, cache=cache)
            states.append(x)
        return states

    def states(self, tokens, positions=None, mask=None, caches=None):
        """As `layers`, the last one alone: (B, T, C)."""
        return self.norm(self.layers(tokens, positions, mask, caches)[-1])

    def say(self, states):
        """Logits (..., V) of the next token."""
        return F.linear(states, self.embed.weight).float()

    def forward(self, tokens, targets=None, caches=None):
        """tokens (B, T) -> (logits, loss), as nanoGPT: of all places if there are targets (B, T), -1 where none is
        asked for, else of the last."""
        states = self.states(tokens, caches=caches)
        logits = self.say(states if targets is not None else states[:, -1:])            # (B, T or 1, V)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                                                    ignore_index=-1)

    @torch.no_grad()
    def generate(self, prompt, n):
        """The n likeliest tokens after prompt (B, T), one by one, with a KV cache: (B, n)."""
        caches, said = [({}, None) for _ in self.blocks], [prompt]
        for _ in range(n):
            said.append(self(said[-1], caches=caches)[0].argmax(-1))                    # (B, 1)
        return torch.cat(said[1:], dim=1)


class Reader(GPT):
    """The GPT as a control of phase 1: it reads the same rows, each after [BOS], and `train.fit` trains it."""
    def __init__(self, cfg):
        super().__init__(cfg, cfg.block_size + 1)

    def after_bos(self, tokens):
        """tokens (B, T) -> [BOS] and all of them, (B, T+1)."""
        return F.pad(tokens, (1, 0), value=self.cfg.bos)

    def pretrain_loss(self, tokens):
        """Cross-entropy of each real token of (B, T), the first one too -> (loss, stats)."""
        _, loss = self(self.after_bos(tokens[:, :-1]), tokens.masked_fill(tokens == self.cfg.pad, -1))
        return loss, {}

    def ema_update(self, tau):
        """Nothing: it has no target."""

    def encode(self, tokens, top_k=1):
        """tokens (B, T) -> (B, T, C): the last layer, or the mean of the last top_k, layer-normed as in `Encoder`."""
        return sum(tjepa.norm(x[:, 1:]) for x in self.layers(self.after_bos(tokens))[-top_k:]) / top_k

    @torch.no_grad()
    def energy(self, tokens, spans):
        """Minus the log-probability of each text (B, T), padding left out: (B,). Spans are ignored: what is likely
        depends on all of a text, its removed words and what follows them."""
        logits = self.say(self.states(self.after_bos(tokens[:, :-1])))                  # (B, T, V)
        return F.cross_entropy(logits.mT, tokens, ignore_index=self.cfg.pad, reduction="none").sum(1)


class MaskedLM:
    """The token output of a T-JEPA that was trained with an mlm term, asked as `TJEPA.energy` is asked.
    mean: of the log-probabilities of a span's tokens their mean, else their sum. Long words lose by the sum, and by
    the mean words whose end follows from their beginning win: between candidates of equal length they agree. Valid
    after phase 1 alone: phase 2 moves the encoder, and what reads words from it stays where it was."""
    def __init__(self, model, mean):
        if not model.cfg.mlm:
            raise ValueError("--mlm=0: no word of this run can be asked for")
        self.cfg, self.model, self.mean = model.cfg, model, mean

    @torch.no_grad()
    def energy(self, tokens, spans):
        """Minus the log-probability of the removed tokens, all removed at once: tokens, spans (B, T) -> (B,)."""
        p = self.model.predict(tokens, spans, int((spans < self.cfg.max_spans).sum(1).max()))
        logits = F.linear(tjepa.norm(p.words), self.model.encoder.embed.weight).float()        # (B, K, V)
        surprise = F.cross_entropy(logits.mT, p.missing, reduction="none")              # (B, K), 0 in surplus slots
        return surprise.sum(1) / ((p.missing >= 0).sum(1) if self.mean else 1)
