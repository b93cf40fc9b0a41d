"""What a student would use instead of a T-JEPA, in the same size and from the same blocks: the controls of the labs."""
import torch
import torch.nn as nn
from torch.nn import functional as F

import tjepa


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
        """All of it, whatever the phase: so `train.fit` trains it."""
        return list(self.children())

    def states(self, tokens, positions=None, mask=None, caches=None):
        """tokens (B, T) at positions (T,), without them the next ones -> states (B, T, C). mask: bool (T, T), without
        it causal. With caches, tokens are only the newest."""
        past = caches[0][0]["k"].size(2) if caches and caches[0][0] else 0
        x = self.embed(tokens)                                                          # (B, T, C)
        rope = self.rope[past:past + tokens.size(1)] if positions is None else self.rope[positions]     # (T, hs/2)
        for block, cache in zip(self.blocks, caches or [(None, None)] * len(self.blocks)):
            x = block(x, rope, mask=mask, causal=mask is None, cache=cache)
        return self.norm(x)

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
