"""Text T-JEPA in one file: an encoder that learns by predicting latents, and a decoder that says what it thinks.

    phase 1  pretrain   the online encoder reads a text with spans removed; a predictor guesses, in latent space, what
                        an EMA copy of the encoder makes of them (and, ours, their words: mlm)     [v1.1 section 3.1]
    phase 2  distill    question -> encoder -> predictor -> thought; the thought is pulled to the answer's latent,
                        as a teacher sees it. No answer token is ever produced                     [v1.1 section 3.3]
    phase 3  speak      the rest is frozen; a decoder attends to the thought and learns to say it  [v1.1 section 3.2]
Read from the top. B rows, T tokens, S spans, K removed tokens, M memory slots; widths C n_embd, P pred_embd, D teacher.
"""
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

def check(config, rules):
    """ValueError with one sentence for the first field of config that breaks a rule (names, test, what it must be)."""
    for names, test, must in rules:
        for name in names.split():
            if not test(getattr(config, name)):
                raise ValueError(f"--{name}={getattr(config, name)} must be {must}")

@dataclass
class Config:
    """What shapes the model and its three losses. Each comment says what moves if the field moves."""
    vocab_size: int = 2048      # rows of the embedding, the four specials included; set by the corpus
    block_size: int = 64        # longest text the encoder reads; attention cost grows with its square
    n_layer: int = 4            # encoder depth: more steps of reasoning, linearly more time
    n_head: int = 4             # attention heads of every block; must divide n_embd and pred_embd
    n_embd: int = 128           # latent width: capacity, and the bound of the rank; FLOPs grow with its square
    positions: str = "rotary"   # rotary | learned: those are added to the latents, and so to what is predicted
    init_std: float = 0.0       # of weight matrices; 0 = 1 / sqrt(fan-in). GPT-2's 0.02 makes narrow models collapse
    pred_layer: int = 2         # predictor depth; too shallow: the encoder does its work. 0 = none: it fills in [MASK]s
    pred_embd: int = 128        # predictor width: half of n_embd makes phase 1 a fifth cheaper, with less room
    dec_layer: int = 3          # decoder depth: it only has to find words, the thinking is done
    answer_size: int = 24       # longest answer in tokens, its end marker included
    mask_ratio: float = 0.35    # share of tokens removed: higher is harder, and cheaper for the online encoder
    max_span: int = 8           # longest span drawn, before it is widened to whole words; lengths are log-uniform
    target: str = "span"        # span: one mean latent a span, as in the paper | token: one latent a token
    top_k: int = 4              # layers averaged into the target; 1 = the last layer only, as in the paper
    target_norm: bool = True    # layer-norm the targets once more: off, shrinking them is the easiest way down
    loss: str = "mse"           # distance to the target: mse | smooth_l1 | infonce | none (then mlm alone)
    sigreg: float = 1.0         # pull of the latents towards an isotropic Gaussian: at 0 they use fewer dimensions
    vicreg: float = 0.0         # variance-covariance pull, the older cure of the same disease
    mlm: float = 1.0            # weight of a masked-LM term beside the latent one: it grounds latents. Papers: 0
    ema_half_life: float = 100  # steps after which half of the target is newer; 0: it is the online one, inf: frozen
    stop_gradient: bool = True  # off: targets are the online encoder's own, and learn to be easy: with mlm=0 a collapse
    teacher_width: int = 0      # of answer latents, 0 = the own target encoder's; phase 2 sets it by --teacher
    question_drop: float = 0.2  # share of question tokens dropped in phase 2, so that no single wording is leaned on
    memory: str = "thought"     # what the decoder reads: tokens | thought | both
    n_slots: int = 4            # memory slots a thought is spread over; 1 makes its attention a constant
    noise: float = 0.45         # blur of the thoughts that the decoder learns from: in use they are never exact
    memory_drop: float = 0.0    # with memory=both: share of phase 3's rows without token latents, to lean on thoughts

    def __post_init__(self):
        check(self, (
            ("n_layer n_head n_embd pred_embd dec_layer max_span top_k n_slots", lambda v: v >= 1, "1 or more"),
            ("vocab_size block_size answer_size", lambda v: v >= 4, "4 or more"),
            ("pred_layer sigreg vicreg mlm init_std ema_half_life teacher_width noise", lambda v: v >= 0, "0 or more"),
            ("question_drop memory_drop", lambda v: 0 <= v < 1, "at least 0 and below 1"),
            ("mask_ratio", lambda v: 0 < v < 1 and round(v * self.block_size) < self.block_size, "above 0, leave some"),
            ("n_embd pred_embd", lambda v: v % (2 * self.n_head) == 0, f"a multiple of 2 * n_head = {2 * self.n_head}"),
            ("top_k", lambda v: v <= self.n_layer, f"at most n_layer = {self.n_layer}"),
            *((name, allowed.__contains__, "one of " + ", ".join(allowed)) for name, allowed in dict(
                positions=("rotary", "learned"), target=("span", "token"), memory=("tokens", "thought", "both"),
                loss=("mse", "smooth_l1", "infonce", "none")).items())))

    pad, bos, eos, mask = (property(lambda self, i=i: self.vocab_size - i) for i in (4, 3, 2, 1))   # the last ids
    tau = property(lambda self: 0.5 ** (1 / self.ema_half_life) if self.ema_half_life else 0.0)
    answer_width = property(lambda self: self.teacher_width or self.n_embd)
    # so many spans are drawn: twice what would remove mask_ratio of the text, because they overlap
    max_spans = property(lambda self: 2 * math.ceil(self.block_size * self.mask_ratio / math.sqrt(self.max_span)))

# -- the transformer ---------------------------------------------------------------------------------------------------
def rotary(size, dim):
    """Unit complex numbers, (size, dim/2), for rotary positions (Su et al. 2021). Learned ones are added to the
    latents, and so to the target: part of that then says where a span is, and nothing else."""
    angle = torch.outer(torch.arange(size), 10000.0 ** (-torch.arange(0, dim, 2) / dim))        # (size, dim/2)
    return torch.polar(torch.ones_like(angle), angle)

def rotate(x, rope):
    """Turn each pair of dimensions of x (..., T, hs) by its place's angle: a complex product; rope (..., T, hs/2)."""
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rope).flatten(-2)

class Attention(nn.Module):
    """Multi-head attention: self or cross, causal or not, with padding mask and KV cache."""
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)

    def heads(self, x, n):
        """(B, T, n*C) -> n tensors (B, nh, T, hs)."""
        return x.unflatten(-1, (n, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, rope=None, memory=None, mask=None, causal=False, cache=None, last=0):
        """x (B, T, C) -> (B, T, C). mask: True where a key may be read, (B, 1, 1, keys). cache: a dict, first empty.
        last: only so many tokens at the end ask, (B, last, C); 0 = all of them."""
        if memory is None:
            q, k, v = self.heads(self.qkv(x), 3)                        # one fused matmul
            q, k = rotate(q, rope), rotate(k, rope)
            if cache:
                k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
        else:                                                           # cross: queries from x, keys from the memory
            w_q, w_kv = self.qkv.weight.tensor_split((x.size(-1),))
            q, = self.heads(F.linear(x, w_q), 1)
            k, v = (cache["k"], cache["v"]) if cache else self.heads(F.linear(memory, w_kv), 2)
        if cache is not None:
            cache["k"], cache["v"] = k, v
        with torch.autocast("cpu", enabled=False):      # fp32: a CPU's bf16 backward was measured 20 x slower
            y = F.scaled_dot_product_attention(q[:, :, -last:].float(), k.float(), v.float(), mask, is_causal=causal)
        return self.proj(y.transpose(1, 2).flatten(2))                  # from (B, nh, T, hs)

class Block(nn.Module):
    """Pre-norm transformer block: attention, cross-attention if there is a memory to read, MLP."""
    def __init__(self, n_embd, n_head, cross=False):
        super().__init__()
        self.norm_attn = nn.LayerNorm(n_embd, bias=False)
        self.attn = Attention(n_embd, n_head)
        if cross:
            self.norm_cross = nn.LayerNorm(n_embd, bias=False)
            self.cross = Attention(n_embd, n_head)
        self.norm_mlp = nn.LayerNorm(n_embd, bias=False)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd, bias=False), nn.GELU(),
                                 nn.Linear(4 * n_embd, n_embd, bias=False))

    def forward(self, x, rope, mask=None, causal=False, memory=None, memory_mask=None, cache=(None, None), last=0):
        """x (B, T, C) -> (B, T, C), or (B, last, C). cache: of the self- and of the cross-attention."""
        x = x[:, -last:] + self.attn(self.norm_attn(x), rope, mask=mask, causal=causal, cache=cache[0], last=last)
        if memory is not None:
            x = x + self.cross(self.norm_cross(x), memory=memory, mask=memory_mask, cache=cache[1])
        return x + self.mlp(self.norm_mlp(x))

def norm(x):
    """Layer norm without gain or bias: a learnable gain would be one more way to shrink the latents."""
    return F.layer_norm(x, x.shape[-1:])

class Encoder(nn.Module):
    """Bidirectional transformer over the tokens that are there."""
    def __init__(self, cfg):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg.n_embd, cfg.n_head) for _ in range(cfg.n_layer))
        self.register_buffer("rope", rotary(cfg.block_size + 1, cfg.n_embd // cfg.n_head), persistent=False)
        if cfg.positions == "learned":                                  # then rope turns nothing
            self.embed_position, self.rope = nn.Embedding(cfg.block_size + 1, cfg.n_embd), self.rope.fill_(1)

    def forward(self, tokens, positions, mask=None, top_k=1):
        """tokens (B, T), positions (B, T) or (T,) -> latents (B, T, C): mean of the last top_k layers, each normed."""
        x = self.embed(tokens)                                          # (B, T, C)
        if hasattr(self, "embed_position"):
            x = x + self.embed_position(positions)
        states, rope = [x], self.rope[positions].unsqueeze(-3)          # (B, 1, T, hs/2) or (1, T, hs/2): for all heads
        for block in self.blocks:
            states.append(block(states[-1], rope, mask=mask))
        return sum(norm(h) for h in states[-top_k:]) / top_k

# -- phase 1: remove spans, predict their latents ----------------------------------------------------------------------
class Spans(NamedTuple):
    """Which tokens are there, which are missing, and which missing tokens belong together."""
    context: torch.Tensor   # (B, T-K) positions the online encoder sees
    removed: torch.Tensor   # (B, K) positions it does not see; surplus slots of short rows point at padding
    pool: torch.Tensor      # (B, S, K) row s averages the removed tokens of span s; zero if there is no such span

class Prediction(NamedTuple):
    """Everything that the losses of phase 1 look at."""
    spans: torch.Tensor     # (B, S, C) predicted latents of the spans
    target: torch.Tensor    # (B, S, C) what the target encoder makes of them
    weight: torch.Tensor    # (B, S) True where there is such a span
    context: torch.Tensor   # (B, T-K, C) the online encoder's latents
    real: torch.Tensor      # (B, T-K) False where the context is padding
    words: torch.Tensor     # (B, K, C) what the removed tokens' words are read from; with mlm=0 it means nothing
    missing: torch.Tensor   # (B, K) ids of the removed tokens, -100 in surplus slots

def sample_spans(tokens, word_start, cfg):
    """Draw the spans to remove from tokens (B, T) ("variable-span masking", v1.1 section 3.1).
    Lengths are log-uniform from 1 to max_span tokens, widened to whole words: half a word gives the other half away.
    word_start: bool (vocab_size,), True for tokens that begin a word. Returns the span each token belongs to, (B, T):
    0..S-1, or S for a token that stays. Each row loses mask_ratio of its real tokens, exactly: shapes stay static."""
    (B, T), S = tokens.shape, cfg.max_spans
    t, real = torch.arange(T, device=tokens.device), tokens != cfg.pad                  # (T,), (B, T)
    length = real.sum(1, keepdim=True)                                                  # (B, 1)
    begins = word_start[tokens] | ~real | (t == 0)                                      # (B, T)
    first = torch.where(begins, t, 0).cummax(1).values                                  # start of the word t lies in
    after = torch.where(begins, t, T).flip(1).cummin(1).values.flip(1)                  # the next word start from t on
    start = (torch.rand(B, S, device=tokens.device) * length).long()                    # (B, S)
    stop = start + torch.exp(torch.rand(B, S, device=tokens.device) * math.log(cfg.max_span)).round().long()
    start, stop = first.gather(1, start), F.pad(after, (0, 1), value=T).gather(1, stop.clamp(max=T))    # whole words
    inside = (t >= start[:, :, None]) & (t < stop[:, :, None]) & real[:, None]          # (B, S, T)
    spans = torch.where(inside, torch.arange(S, device=tokens.device)[:, None], S).amin(1)  # (B, T) first to claim t
    # spend the budget span by span; the last may be cut short; what chance leaves over joins the last one drawn
    turn = (spans * T + t).masked_fill(~real, S * T + T).argsort(1).argsort(1)          # (B, T) place in the queue
    removed = (turn < (length.double() * cfg.mask_ratio).round().clamp(min=1)) & real
    return torch.where(removed, spans.clamp(max=S - 1), S)

def split_spans(spans, tokens, n_removed, cfg):
    """Turn the span of each token, (B, T), into what the encoders index with: `Spans` with K = n_removed."""
    kind = torch.where(spans < cfg.max_spans, 0, torch.where(tokens == cfg.pad, 1, 2))  # removed, padding, the rest
    removed, context = kind.argsort(dim=1, stable=True).tensor_split((n_removed,), 1)   # (B, K), (B, T-K) padding first
    member = F.one_hot(spans.gather(1, removed), cfg.max_spans + 1)[..., :-1].mT.float()            # (B, S, K)
    if cfg.target == "token":                           # every removed token is a span of its own
        member = torch.diag_embed(member.sum(1))                                                    # (B, K, K)
    return Spans(context, removed, member / member.sum(-1, keepdim=True).clamp(min=1))

class Predictor(nn.Module):
    """A transformer that reads the context latents and fills in queries (v1.1 section 3.1): one learned
    vector, at the position of each hole. Words leave by a linear map of their own: with one for both, latents fade."""
    def __init__(self, cfg):
        super().__init__()
        self.enter = nn.Linear(cfg.n_embd, cfg.pred_embd, bias=False)
        self.query = nn.Parameter(torch.randn(cfg.pred_embd) * 0.02)
        self.blocks = nn.ModuleList(Block(cfg.pred_embd, cfg.n_head) for _ in range(cfg.pred_layer))
        self.norm = nn.LayerNorm(cfg.pred_embd)
        self.leave = nn.Linear(cfg.pred_embd, cfg.n_embd)
        self.words = nn.Linear(cfg.pred_embd, cfg.n_embd) if cfg.mlm else nn.Identity()
        self.register_buffer("rope", rotary(cfg.block_size + 1, cfg.pred_embd // cfg.n_head), persistent=False)

    def forward(self, context, context_pos, query_pos, mask=None):
        """context (B, T, C) at context_pos (B, T), queries at query_pos (B, K) -> latents, words, (B, K, C) each."""
        x = torch.cat((self.enter(context), self.query.expand(*query_pos.shape, -1)), dim=1)        # (B, T+K, P)
        rope = self.rope[torch.cat((context_pos, query_pos), dim=1)].unsqueeze(1)       # (B, 1, T+K, hs/2)
        for block in self.blocks[:-1]:
            x = block(x, rope, mask=mask)
        x = self.norm(self.blocks[-1](x, rope, mask=mask, last=query_pos.size(1)))      # (B, K, P): all that is read
        return self.leave(x), self.words(x)

# -- phases 2 and 3: a thought, and who says it ------------------------------------------------------------------------
class Thought(NamedTuple):
    """What there is to say, before any word."""
    latent: torch.Tensor    # (B, D) the predicted latent of the answer, in the teacher's space
    context: torch.Tensor   # (B, T, C) the encoder's latents of the question
    real: torch.Tensor      # (B, T) False where the question is padding

    def pick(self, rows):
        """The thoughts of some rows."""
        return Thought(*(part[rows] for part in self))

class Decoder(nn.Module):
    """Causal transformer that cross-attends to a memory, with two heads (v1.1 section 3.2): tokens and latent.
    It sees [BOS] and its own words, never the question: what it says about that must come through the memory."""
    def __init__(self, cfg):
        super().__init__()
        C, D, M = cfg.n_embd, cfg.answer_width, cfg.n_slots
        self.kind, self.n_slots = cfg.memory, M
        if cfg.memory != "tokens":      # attention over one key is a constant: so one thought becomes M slots
            self.slots = nn.Linear(D, M * C)
        self.embed = nn.Embedding(cfg.vocab_size, C)
        self.blocks = nn.ModuleList(Block(C, cfg.n_head, cross=True) for _ in range(cfg.dec_layer))
        self.norm = nn.LayerNorm(C, bias=False)
        self.token_head = nn.Linear(C, cfg.vocab_size, bias=False)
        self.token_head.weight = self.embed.weight                      # tied, as in nanoGPT
        self.latent_head = nn.Linear(C, D)
        self.register_buffer("rope", rotary(cfg.answer_size, C // cfg.n_head), persistent=False)

    def memory(self, thought, drop=0.0):
        """`Thought` of B rows -> memory (B, M', C), mask (B, 1, 1, M'). drop: share of rows without token latents."""
        if self.kind == "tokens":
            return thought.context, thought.real[:, None, None]
        slots = self.slots(thought.latent).view(len(thought.latent), self.n_slots, -1)  # (B, M, C)
        real = torch.ones(slots.shape[:2], dtype=torch.bool, device=slots.device)       # (B, M)
        if self.kind == "both":
            kept = thought.real & (torch.rand_like(slots[:, :1, 0]) >= drop)            # (B, T)
            slots, real = torch.cat((slots, thought.context), dim=1), torch.cat((real, kept), dim=1)
        return slots, real[:, None, None]

    def forward(self, tokens, memory, memory_mask, caches=None):
        """tokens (B, T) -> states (B, T, C). With caches, only the newest token, (B, 1): the past is kept there."""
        past = caches[0][0]["k"].size(2) if caches and caches[0][0] else 0
        x, rope = self.embed(tokens), self.rope[past:past + tokens.size(1)]             # (B, T, C), (T, hs/2)
        for block, cache in zip(self.blocks, caches or [(None, None)] * len(self.blocks)):
            x = block(x, rope, causal=not past, memory=memory, memory_mask=memory_mask, cache=cache)
        return self.norm(x)

# -- the losses around the latents -------------------------------------------------------------------------------------
def masked_mean(x, weight, dim):
    """Mean of x over dim(s), counting only what weight (0 or 1, broadcast to x) marks."""
    weight = weight.to(x.dtype).expand_as(x)
    return (x * weight).sum(dim) / weight.sum(dim).clamp(min=1)

def average(pool, latents):
    """Means over spans: latents (B, K, C), pool (B, S, K) of `Spans` -> (B, S, C). fp32: bf16 would blur the loss."""
    with torch.autocast(latents.device.type, enabled=False):
        return pool @ latents.float()

def latent_distance(predicted, target, weight, kind):
    """Mean distance of (N, C) to (N, C) over the rows that weight (N,) marks."""
    if kind == "none":
        return predicted.new_zeros(())
    if kind == "infonce":       # tell your own target from the batch's others: not in the papers, a known cure
        logits = F.normalize(predicted, dim=-1) @ F.normalize(target, dim=-1).T / 0.1                       # (N, N)
        own = torch.arange(len(logits), device=logits.device).masked_fill(~weight, -100)
        return F.cross_entropy(logits.masked_fill(~weight, -torch.inf), own, ignore_index=-100)
    each = F.mse_loss if kind == "mse" else F.smooth_l1_loss
    return masked_mean(each(predicted, target, reduction="none").mean(-1), weight, 0)

def r_squared(predicted, target, weight):
    """1 - MSE / (MSE of always predicting the mean target): 0 knows the average only. (N, C), (N, C), (N,)."""
    weight = weight[:, None]
    error = masked_mean((predicted - target) ** 2, weight, (0, 1))
    return 1 - error / masked_mean((target - masked_mean(target, weight, 0)) ** 2, weight, (0, 1)).clamp(min=1e-8)

def sigreg(z, n_slices=64):
    """SIGReg (LeJEPA 2025): how far z (N, C) is from an isotropic Gaussian, along n_slices random directions.
    Epps-Pulley: compares the characteristic function of each slice with that of N(0, 1), on 17 points of [0, 3].
    Without its factor N: N draws of a perfect Gaussian score 1.05 / N, zeros 0.402, one layer-normed point 1.06."""
    slices = F.normalize(torch.randn(z.size(1), n_slices, device=z.device), dim=0)      # (C, n_slices)
    t = torch.linspace(0, 3, 17, device=z.device)
    weight = F.pad(torch.full((15,), 2.0, device=z.device), (1, 1), value=1.0) * 3 / 16     # trapezoid, both halves
    gauss = torch.exp(-t ** 2 / 2)
    u = (z @ slices)[..., None] * t                                                     # (N, n_slices, 17)
    error = (u.cos().mean(0) - gauss) ** 2 + u.sin().mean(0) ** 2                       # (n_slices, 17)
    return (error * weight * gauss).sum(-1).mean()

def vicreg(z):
    """VICReg's two regularisers (2022) of z (N, C), 25 : 1 as there: each std at least 1, covariances towards 0."""
    cov = torch.cov(z.T)                                                                # (C, C)
    variance = F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean()
    return variance + (cov - cov.diagonal().diag()).pow(2).sum() / z.size(1) / 25

# -- the whole ---------------------------------------------------------------------------------------------------------
class TJEPA(nn.Module):
    """Encoder, EMA target, predictor, decoder; W: d_s -> d_t (v1.1 section 3.3). word_start as in `sample_spans`."""
    def __init__(self, cfg, word_start):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.predictor = Predictor(cfg) if cfg.pred_layer else nn.Identity()
        self.W = nn.Linear(cfg.n_embd, cfg.teacher_width) if cfg.teacher_width else nn.Identity()  # own: same space
        self.apply(self.init_weights)
        self.target = deepcopy(self.encoder).requires_grad_(False)      # after the init: it starts as an exact copy
        self.register_buffer("word_start", torch.as_tensor(word_start), persistent=False)
        self.register_buffer("concept_mean", torch.zeros(cfg.answer_width))     # mean and std of answers'
        self.register_buffer("concept_std", torch.ones(cfg.answer_width))       # latents, set as phase 2 begins

    def init_weights(self, module):
        """Variance-preserving at any width, unless --init_std says otherwise; so is the decoder's tied embedding."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            linear = isinstance(module, nn.Linear)
            nn.init.normal_(module.weight, std=(self.cfg.init_std or module.in_features ** -0.5) if linear else 0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    def trained_in(self, phase):
        """The parts that a phase trains; everything else is frozen in it."""
        return {"pretrain": [self.encoder, self.predictor], "distill": [self.encoder, self.predictor, self.W],
                "speak": [self.decoder]}[phase]

    # -- phase 1 -------------------------------------------------------------------------------------------------------
    def encode(self, tokens, online=False):
        """tokens (B, T) -> latents (B, T, C). What probes, energies and teachers look at."""
        encoder, positions = self.encoder if online else self.target, torch.arange(tokens.size(1), device=tokens.device)
        return encoder(tokens, positions, (tokens != self.cfg.pad)[:, None, None], self.cfg.top_k)  # mask (B, 1, 1, T)

    def concept(self, tokens):
        """One latent a text: (B, T) -> (B, C), the mean over its tokens. What a teacher says of an answer: L_a."""
        return masked_mean(self.encode(tokens), (tokens != self.cfg.pad)[..., None], 1)

    def forward_target(self, tokens, parts):
        """What the target encoder, which reads everything, makes of the removed spans: (B, S, C)."""
        latents = self.encode(tokens, online=not self.cfg.stop_gradient)    # (B, T, C); of the target: no gradient
        latents = average(parts.pool, latents.take_along_dim(parts.removed[..., None], 1))  # (B, K, C) -> (B, S, C)
        return norm(latents) if self.cfg.target_norm else latents   # else long spans, with short means, weigh less

    def fill(self, tokens, positions, real, queries, asked):
        """The online encoder reads what is there, the predictor fills in what is not. tokens (B, T) at positions, holes
        (B, K) at queries; real, asked: which of them count -> latents (B, T, C), guesses and words (B, K, C)."""
        keys = torch.cat((real, asked), dim=1)[:, None, None]                           # (B, 1, 1, T+K)
        if not self.cfg.pred_layer:     # without a predictor, what is missing is a [MASK] that the encoder reads
            tokens = F.pad(tokens, (0, queries.size(1)), value=self.cfg.mask)           # (B, T+K)
            x = self.encoder(tokens, torch.cat((positions, queries), 1), keys)          # (B, T+K, C)
            return x[:, :real.size(1)], x[:, real.size(1):], x[:, real.size(1):]
        context = self.encoder(tokens, positions, real[:, None, None])                  # (B, T, C)
        return context, *self.predictor(context, positions, queries, keys)

    def predict(self, tokens, spans, n_removed=None):
        """Hide the spans, and guess what the target makes of them: tokens, spans (B, T) -> `Prediction`.
        n_removed: most tokens removed in a row, by default what `sample_spans` takes from a full one."""
        parts = split_spans(spans, tokens, n_removed or max(1, round(tokens.size(1) * self.cfg.mask_ratio)), self.cfg)
        target = self.forward_target(tokens, parts)
        kept, asked = tokens.gather(1, parts.context), parts.pool.sum(1) > 0            # (B, T-K), (B, K)
        real = kept != self.cfg.pad
        context, filled, words = self.fill(kept, parts.context, real, parts.removed, asked)    # (B, T-K, C), (B, K, C)
        missing = tokens.gather(1, parts.removed).masked_fill(~asked, -100)
        return Prediction(average(parts.pool, filled), target, parts.pool.sum(2) > 0, context, real, words, missing)

    def pretrain_loss(self, tokens, spans):
        """Phase 1 (v1.1 section 3.1). tokens (B, T), spans (B, T) from `sample_spans` -> (loss, stats)."""
        cfg, p = self.cfg, self.predict(tokens, spans)
        predicted, target, weight = p.spans.flatten(0, 1), p.target.flatten(0, 1), p.weight.flatten()   # (B*S, C)
        loss = latent_distance(predicted, target, weight, cfg.loss)
        stats = dict(latent=loss, r2=r_squared(predicted, target, weight))
        # (512, C) from the whole batch, so that texts are spread out, not the tokens of one text. Not drawn by []: its
        # threads add up the gradient of a token that is drawn thrice in an order of their own
        z = F.embedding(torch.multinomial(p.real.flatten().float(), 512, replacement=True), p.context.flatten(0, 1))
        for name, regulariser in ("sigreg", sigreg), ("vicreg", vicreg):
            if pull := getattr(cfg, name):
                stats[name] = regulariser(z)
                loss = loss + pull * stats[name]
        if cfg.mlm:
            logits = F.linear(norm(p.words), self.encoder.embed.weight)                # (B, K, V)
            stats["mlm"] = F.cross_entropy(logits.flatten(0, 1), p.missing.flatten())
            loss = loss + cfg.mlm * stats["mlm"]
        return loss, {name: value.detach() for name, value in stats.items()}

    @torch.no_grad()
    def ema_update(self, tau):
        """target <- tau * target + (1 - tau) * online, in fp32, once per optimizer step."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.encoder.parameters()), 1 - tau)

    @torch.no_grad()
    def energy(self, tokens, spans):
        """Latent prediction error of the removed spans, (B,): low means that they fit what surrounds them."""
        p = self.predict(tokens, spans, int((spans < self.cfg.max_spans).sum(1).max()))
        return masked_mean(((p.spans - p.target) ** 2).mean(-1), p.weight, 1)

    # -- phase 2 -------------------------------------------------------------------------------------------------------
    def think(self, question, drop=0.0):
        """question (B, T), padded on the right -> `Thought`: the predictor is asked for what would follow the question,
        as in phase 1, but one query, at the next position (so rope has a row more). drop: share of tokens left out."""
        real = question != self.cfg.pad                                                 # (B, T)
        next_pos = real.sum(1, keepdim=True)                                            # (B, 1)
        if drop:
            kept = real & (torch.rand_like(real, dtype=torch.float) >= drop)
            real = torch.where(kept.any(1, keepdim=True), kept, real)                   # never all of a question
        positions = torch.arange(question.size(1), device=question.device).expand_as(question)
        context, guess, _ = self.fill(question, positions, real, next_pos, torch.ones_like(next_pos).bool())
        return Thought(self.W(guess[:, 0]), context, real)                              # (B, D), (B, T, C)

    def distill_loss(self, question, answer_latent):
        """Phase 2 (v1.1 section 3.3): MSE(W L_p, L_a). question (B, T), answer_latent (B, D) -> (loss, stats)."""
        thought = self.think(question, self.cfg.question_drop).latent.float()
        loss, every = F.mse_loss(thought, answer_latent), torch.ones_like(thought[:, 0])
        return loss, dict(latent=loss.detach(), r2=r_squared(thought.detach(), answer_latent, every))

    # -- phase 3 -------------------------------------------------------------------------------------------------------
    def speak_loss(self, thought, answer, answer_latent, alpha):
        """Phase 3 (v1.1 section 3.2): alpha * L_latent + (1 - alpha) * L_token, v2.0: alpha = 0. Thoughts
        may be kept: of a frozen encoder. answer (B, A), with EOS and padding, answer_latent (B, D) -> (loss, stats)."""
        # a thought that errs leans towards another answer: blur it with others of the batch, and with noise
        z, blur = thought.latent, self.cfg.noise * torch.rand(len(thought.latent), 1, device=thought.latent.device)
        z = torch.lerp(z, z[torch.randperm(len(z), device=z.device)], blur) + self.cfg.noise * torch.randn_like(z)
        said = F.pad(answer[:, :-1], (1, 0), value=self.cfg.bos)                        # (B, A): BOS, then the answer
        states = self.decoder(said, *self.decoder.memory(thought._replace(latent=z), self.cfg.memory_drop))  # (B, A, C)
        logits = self.decoder.token_head(states)                                        # (B, A, V)
        token = F.cross_entropy(logits.flatten(0, 1).float(), answer.flatten(), ignore_index=self.cfg.pad)
        latent = F.mse_loss(self.decoder.latent_head(states[:, 0]).float(), answer_latent)  # at BOS: no word leaks in
        return alpha * latent + (1 - alpha) * token, dict(token=token.detach(), latent=latent.detach())

    @torch.inference_mode()     # a token takes .8 of its time under no_grad
    def speak(self, thought, temperature=0.0, top_k=0, top_p=1.0):
        """Say a `Thought` of B rows: yields (B,) token ids at a time, PAD after a row's EOS, until all have ended."""
        memory, mask = self.decoder.memory(thought)
        caches = [({}, {}) for _ in self.decoder.blocks]
        token = torch.full((len(memory),), self.cfg.bos, device=memory.device)          # (B,)
        ended = torch.zeros_like(token, dtype=torch.bool)
        for _ in range(self.cfg.answer_size):
            logits = self.decoder.token_head(self.decoder(token[:, None], memory, mask, caches)[:, -1])     # (B, V)
            token = pick(logits.float(), temperature, top_k, top_p).masked_fill(ended, self.cfg.pad)
            yield token
            if (ended := ended | (token == self.cfg.eos)).all():
                return

def pick(logits, temperature=0.0, top_k=0, top_p=1.0):
    """Next token ids (B,) from logits (B, V): greedy at temperature 0, else drawn from the top_k / top_p candidates."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -torch.inf)
    p = F.softmax(logits / temperature, dim=-1)
    if top_p < 1:                                       # the smallest set that holds top_p; sorting takes its time
        ranked, order = p.sort(descending=True)
        p = p.scatter(1, order, ranked * (ranked.cumsum(-1) - ranked < top_p))
    return torch.multinomial(p, 1)[:, 0]

# -- the collapse panel: a falling latent loss says nothing without it -------------------------------------------------
@torch.no_grad()
def latent_health(z, real):
    """Is there anything left in these latents? z (B, T, C), real bool (B, T) -> dict of floats:
    pos   share of the variance that position alone explains (measured first, then removed from z)
    std   mean over dimensions of the standard deviation across sequences
    rank  RankMe: exp of the entropy of the centred singular values; bound: min(N-1, C)
    cos   mean pairwise cosine, raw: near 1 is a cone, a common offset; cos_centred: after removing the mean"""
    z, real = z.cpu().double(), real.cpu()  # not every GPU knows float64
    flat, content = z[real], (z - masked_mean(z, real[..., None], 0))[real]             # (N, C), less position's mean
    pos = 1 - (content ** 2).sum() / ((flat - flat.mean(0)) ** 2).sum().clamp(min=1e-12)
    s = torch.linalg.svdvals(content[:8192] - content[:8192].mean(0))       # twenty times the widest preset: enough
    p = s / s.sum().clamp(min=1e-12) + 1e-12
    n, means = len(flat), [F.normalize(x, dim=-1).mean(0) for x in (flat, flat - flat.mean(0))]
    cos, cos_centred = [((n * (mean @ mean) - 1) / (n - 1)).item() for mean in means]   # of all pairs, less self
    return dict(std=content.std(0).mean().item(), rank=torch.exp(-(p * p.log()).sum()).item(), pos=pos.item(),
                bound=min(len(content) - 1, z.size(-1)), cos=cos, cos_centred=cos_centred)

def health_word(health):
    """One word for the bar; thresholds are labs/collapse.py's. Collapsed: no better to teach than random weights."""
    spread = health["std"] * health["rank"] / health["bound"]   # how far texts differ, times how many ways
    return "collapsed" if spread < 0.12 else "shrinking" if spread < 0.17 else "healthy"
