"""
Text T-JEPA in one file: an encoder learns by predicting latents, a decoder puts them into words.

    phase 1  pretrain   A context encoder reads a text from which spans were removed. A predictor
                        predicts the latents that an EMA target encoder, which reads the whole
                        text, gives to the removed spans.                     [v1.1, section 3.1]
    phase 2  distill    question -> context encoder -> predictor -> L_p -> W L_p, the thought, which
                        is trained to equal L_a, the standardised latent of the answer. A teacher
                        gives it, by default the target encoder. (W: linear if another model
                        teaches, else the identity.) No answer token is produced.
                                                                              [v1.1, section 3.3]
    phase 3  speak      Everything above is frozen. A decoder cross-attends to the thought and
                        learns to put it into words. Most rows are echoes: the decoder gets L_a,
                        with noise, and must say the answer. So it can say answers to questions
                        that it was never given.                              [v1.1, section 3.2]
    later    teach      Facts are added to a finished run: each step takes the loss of phase 2, and
                        the token loss of phase 3 on echoes and detached thoughts. The target
                        encoder and the scale of L_a stay as they are.

A step of phase 1, in outline:

    span_ids = sample_spans(tokens, model.word_start, cfg)      # which tokens are removed
    loss, stats = model.pretrain_loss(tokens, span_ids)         # steps 1 to 4 of the JEPA step
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.ema_update()                                          # step 5

v1.1 and v2.0 are the two versions of Senthil Vasan, "T-JEPA: A Text-Joint Embedding Predictive
Architecture", 2025, https://github.com/offx-zinth/T-JEPA. Read from the top: configuration,
transformer, masking, predictor, parts of the losses, decoder, the phases, the collapse panel.
Shapes: B rows, T tokens, S spans, K removed tokens, M memory slots, A answer tokens, L keys or
context latents, V vocabulary, N rows of a flattened batch, nh heads of size hs; widths C = n_embd,
P = pred_embd, D = width of the teacher's latents.
"""
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

@dataclass
class Config:
    """Shape of the model, and losses of its phases. Each comment says what the field changes."""
    vocab_size: int = 2048      # rows of the embedding, the four special tokens included
    block_size: int = 64        # longest text in tokens; attention cost grows with its square
    n_layer: int = 4            # blocks of the encoder; time grows linearly
    n_head: int = 4             # attention heads of every block; divides n_embd and pred_embd
    n_embd: int = 128           # width of the latents and bound of their rank; cost ~ its square
    pred_layer: int = 1         # blocks of the predictor; a second costs a fifth of a step
    pred_embd: int = 128        # width of the predictor; at n_embd / 2 a step takes .8 of the time
    dec_layer: int = 3          # blocks of the decoder: it only finds words for a finished thought
    answer_size: int = 24       # longest answer in tokens, its end token included
    mask_ratio: float = 0.35    # share of the tokens that is removed: higher is harder and cheaper
    max_span: int = 8           # longest span drawn, before it is widened to whole words
    target: str = "token"       # token: each removed token's latent | span: their mean, as in v1.1
    top_k: int = 0              # targets average this many last layers; 0: all, and the embedding
    embed_scale: float = 50.0   # factor of the embeddings: the higher, the less context weighs
    target_norm: bool = True    # layer-norm targets; if off, the loss falls when targets shrink
    loss: str = "infonce"       # phase 1: infonce tells a target from the batch's others | mse
    sigreg: float = 1.0         # weight of SIGReg, which spreads latents over all dimensions
    mlm: float = 1.0            # weight of a masked-LM loss beside it: a hybrid; paper: 0
    ema_half_life: float = 100  # steps until half of the target is new; 0: copy, inf: frozen
    stop_gradient: bool = True  # if off, the context encoder is the target, with gradient
    teacher_width: int = 0      # width of another model's latents of answers, if it is the teacher;
                                # 0: the target encoder teaches
    question_drop: float = 0.0  # share of question tokens dropped in phase 2, against rote wordings
    memory: str = "thought"     # what the decoder reads: thought | tokens (latents of the question)
    n_slots: int = 4            # memory slots of a thought; attention over 1 slot is a constant
    noise: float = 0.45         # noise on the thoughts in phase 3: predicted thoughts are inexact

    def __post_init__(self):
        # Four special tokens have the last ids: padding, begin and end of an answer, and [MASK].
        # [MASK] is a word for the controls of labs/ that replace removed tokens by it. Here removed
        # tokens are absent; the predictor's mask_token is a learned vector, not a word.
        special = range(self.vocab_size - 4, self.vocab_size)
        self.pad, self.bos, self.eos, self.mask = special
        multiple = 2 * self.n_head                      # rotary turns pairs of dimensions of a head
        check(self, (
            ("n_layer pred_layer dec_layer n_slots", *within(1, 1000)),
            ("n_head max_span", *within(1, 10_000)),
            ("n_embd pred_embd", *within(1, 100_000)),
            ("vocab_size block_size answer_size", *within(4, 1_000_000)),
            ("sigreg mlm noise teacher_width", *within(0, 1_000_000)),
            ("embed_scale", lambda v: 0 < v <= 1000, "above 0, at most 1000"),
            ("ema_half_life", lambda v: v >= 0, "0 or more; inf freezes the target"),
            ("question_drop", lambda v: 0 <= v < 1, "at least 0 and below 1"),
            ("mask_ratio", lambda v: 0 < v < 1, "above 0 and below 1"),
            # at least one token of a full row stays
            ("mask_ratio", lambda v: round(v * self.block_size) < self.block_size,
             f"below {1 - 0.5 / self.block_size:.4f}: one token of block_size must stay"),
            ("n_embd pred_embd", lambda v: v % multiple == 0,
             f"a multiple of 2 * n_head = {multiple}"),
            ("top_k", *within(0, self.n_layer + 1)),
            ("target", *one_of("span", "token")),
            ("memory", *one_of("thought", "tokens")),
            ("loss", *one_of("mse", "infonce")),
        ))

    @property
    def ema_decay(self):
        """tau of the papers: target = tau * target + (1 - tau) * context encoder."""
        return 0.5 ** (1 / self.ema_half_life) if self.ema_half_life else 0.0

    @property
    def max_spans(self):
        """Spans drawn per row: twice what mask_ratio needs, because spans overlap."""
        typical_length = math.sqrt(self.max_span)       # the median of a log-uniform length
        return 2 * math.ceil(self.block_size * self.mask_ratio / typical_length)

def check(config, rules):
    """Check fields of a config. rules: (field names, test of the value, what the value must be).

    Raises ValueError with one sentence for the first field that fails its test.
    """
    for names, test, must in rules:
        for name in names.split():
            value = getattr(config, name)
            if not test(value):
                raise ValueError(f"--{name}={value} must be {must}")

def within(low, high):
    """Test and wording for a value between low and high, both included; nan fails."""
    return (lambda v: low <= v <= high), f"{low} to {high}"

def one_of(*allowed):
    """Test and wording for a value that is one of some words."""
    return allowed.__contains__, f"one of {', '.join(allowed)}"

# -- the transformer -------------------------------------------------------------------------------

def rotary(size, dim):
    """Rotary positions (Su et al. 2021) as unit complex numbers, (size, dim/2).

    Learned positions would be added to the latents. The targets would then contain the position
    of each span, which is easy to predict and says nothing about the text.
    """
    frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)             # (dim/2,)
    angle = torch.outer(torch.arange(size), frequency)                  # (size, dim/2)
    return torch.polar(torch.ones_like(angle), angle)

def rotate(x, rope):
    """Rotate each pair of dimensions of x (..., T, hs) by the angles of rope (..., T, hs/2)."""
    pairs = x.float().unflatten(-1, (-1, 2))                            # (..., T, hs/2, 2)
    if torch.compiler.is_compiling():   # (a + ib)(c + is) in real numbers: a compiler fuses those
        cos, sin = torch.view_as_real(rope).split(1, -1)                # (..., T, hs/2, 1)
        turned = pairs.flip(-1) * pairs.new_tensor([-1.0, 1.0])         # i(a + ib) = -b + ia
        return (pairs * cos + turned * sin).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * rope).flatten(-2)

def additive(mask):
    """Bool (B, L), True where a latent may be attended to -> 0 there, else -inf: (B, 1, 1, L).

    Attention adds it to its logits: log(1) = 0, log(0) = -inf. It is made once for all blocks.
    """
    return mask.float().log()[:, None, None]

def attend(q, k, v, mask=None, causal=False):
    """Scaled dot-product attention: q (B, nh, T, hs), k and v (B, nh, L, hs) -> (B, T, C)."""
    # On a CPU in fp32, whatever autocast says: the backward in bf16 was measured 20 times slower.
    with torch.autocast("cpu", enabled=False):
        if v.is_cpu:
            q, k, v = q.float(), k.float(), v.float()
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return y.transpose(1, 2).flatten(2)

class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x, rope, mask=None, causal=False, cache=None, n_last=None):
        """x (B, T, C) -> (B, T, C).

        mask: what `additive` makes of the tokens that may be attended to, (B, 1, 1, T).
        cache: a `KVCache` of the tokens before x, where a text is written token by token.
        n_last: only the last n_last tokens attend, (B, n_last, C); the others are only attended to.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1))           # (B, T, 3, nh, hs)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split((2, 1))    # (2, B, nh, T, hs), (1, B, nh, T, hs)
        # q and k are rotated by one call: a GPU pays for each call, not for its size
        q, k = rotate(qk, rope)                                         # (B, nh, T, hs) each
        v = v.squeeze(0)                                                # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)
        if n_last is not None:
            q = q[:, :, -n_last:]
        return self.proj(attend(q, k, v, mask, causal))

def make_mlp(n_embd):
    """The MLP of a block, four times as wide inside."""
    return nn.Sequential(
        nn.Linear(n_embd, 4 * n_embd, bias=False),
        nn.GELU(),
        nn.Linear(4 * n_embd, n_embd, bias=False),
    )

class Block(nn.Module):
    """Pre-norm transformer block: self-attention and an MLP."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.norm_attn = nn.LayerNorm(n_embd, bias=False)
        self.attn = Attention(n_embd, n_head)
        self.norm_mlp = nn.LayerNorm(n_embd, bias=False)
        self.mlp = make_mlp(n_embd)

    def forward(self, x, rope, mask=None, causal=False, cache=None, n_last=None):
        """x (B, T, C) -> (B, T, C), or (B, n_last, C). Arguments as in `Attention`."""
        y = self.attn(self.norm_attn(x), rope, mask, causal, cache, n_last)
        if n_last is not None:                          # only the last tokens go on
            x = x[:, -n_last:]
        x = x + y
        return x + self.mlp(self.norm_mlp(x))

def norm(x):
    """Layer norm without gain and bias: a learned gain could shrink the latents."""
    return F.layer_norm(x, x.shape[-1:])

class Encoder(nn.Module):
    """Bidirectional transformer over the tokens that are given."""

    def __init__(self, cfg):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        # A block adds values of std .5 to 1 to the residual stream and drowns an embedding of .02.
        # With factor 50 much more is learned from a text (labs/pages/facts.md).
        self.embed_scale = cfg.embed_scale
        self.blocks = nn.ModuleList(Block(cfg.n_embd, cfg.n_head) for _ in range(cfg.n_layer))
        # One position more than a text has: some controls in labs/ have no predictor and append the
        # mask token to a full question.
        rope = rotary(cfg.block_size + 1, cfg.n_embd // cfg.n_head)
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, tokens, positions, mask=None, top_k=1, n_last=None):
        """tokens (B, T) at positions (B, T) or (T,), mask bool (B, T) -> latents (B, T, C).

        The latents are the mean of the last top_k layers, each layer-normed; the embedding is a
        layer, too, and 0 means all. The context encoder's output is its last layer (top_k=1). The
        target is the mean of the last cfg.top_k layers of the target encoder, as in data2vec
        (Baevski et al. 2022).

        Tokens may stand in any order: only their positions tell where they are in the text.
        n_last: latents of the last n_last tokens alone, (B, n_last, C); only they pass through the
        last block.
        """
        rope = self.rope[positions].unsqueeze(-3)       # (B, 1, T, hs/2) or (1, T, hs/2): all heads
        mask = None if mask is None else additive(mask)
        wanted = slice(None) if n_last is None else slice(-n_last, None)
        x = self.embed(tokens)                          # (B, T, C)
        if self.embed_scale != 1:
            x = self.embed_scale * x
        layers = [x[:, wanted]]
        for block in self.blocks[:-1]:
            x = block(x, rope, mask)
            layers.append(x[:, wanted])
        layers.append(self.blocks[-1](x, rope, mask, n_last=n_last))
        if top_k == 1:
            return norm(layers[-1])
        return norm(torch.stack(layers[-top_k:])).mean(0)

# -- masking ---------------------------------------------------------------------------------------

def first_of_word(begins, t):
    """Position at which the word of each token begins: bool (B, T), positions t (T,) -> (B, T)."""
    return torch.where(begins, t, 0).cummax(1).values

def next_word(begins, t):
    """First word start at or after each position 0..T, (B, T+1); T where there is none.

    A running minimum from the right: hence the two flips.
    """
    T = len(t)
    starts = torch.where(begins, t, T)                              # (B, T)
    after = starts.flip(1).cummin(1).values.flip(1)
    return F.pad(after, (0, 1), value=T)

def sample_spans(tokens, word_start, cfg):
    """Draw the spans to remove from tokens (B, T) ("variable-span masking", v1.1 section 3.1).

    word_start: bool (vocab_size,), True for tokens that begin a word. Returns for each token the
    number of the span that removes it, (B, T): 0 .. S-1, or S for a token that stays.

        tokens     the | c | at | sat | on | the | m | at       one draw: start 2, length 2
        widened    the |[c | at | sat]| on | the | m | at       half a word would reveal the rest
        returned    S    0   0     0     S    S    S   S

    Lengths are log-uniform between 1 and max_span tokens, rounded: with max_span=8 length 1 is
    drawn in .2 of cases, 2 in .25. A row of n tokens loses round(mask_ratio * n) of them, at least
    one, whatever is drawn. So all full rows lose equally many; in shorter ones `split_spans` fills
    the gap with padding. (A row of one token loses it, and its context is empty.) Spans start
    uniformly and extend to the right: the first tokens of a row are removed less often. Memory
    grows with the square of T: a row of 1,024 tokens takes 2 MB meanwhile, and 254 spans are drawn.
    """
    (B, T), S = tokens.shape, cfg.max_spans
    t = torch.arange(T, device=tokens.device)                           # (T,)
    span = torch.arange(S, device=tokens.device)[:, None]               # (S, 1)
    real = tokens != cfg.pad                                            # (B, T)
    n_real = real.sum(1, keepdim=True)                                  # (B, 1)

    # Draw starts and lengths, then widen each span to whole words.
    start = (torch.rand(B, S, device=tokens.device) * n_real).long()    # (B, S)
    log_length = torch.rand(B, S, device=tokens.device) * math.log(cfg.max_span)
    stop = (start + log_length.exp().round().long()).clamp(max=T)       # (B, S)
    begins = word_start[tokens] | ~real | (t == 0)                      # (B, T)
    start = first_of_word(begins, t).gather(1, start)
    stop = next_word(begins, t).gather(1, stop)

    # Where spans overlap, a token belongs to the one with the lowest number.
    inside = (t >= start[:, :, None]) & (t < stop[:, :, None])          # (B, S, T)
    span_ids = torch.where(inside & real[:, None], span, S).amin(1)     # (B, T)

    # Put the tokens in order: span by span, then those outside all spans, from the left. The first
    # `budget` are removed. So the last span may be cut short; where the spans hold too few, tokens
    # outside are removed too and count as span S-1.
    # In double, like the count of K in `predict`: in fp32 90 * .35 would become 32 and not 31.
    budget = (n_real.double() * cfg.mask_ratio).round().clamp(min=1).long()     # (B, 1)
    key = (span_ids * T + t).masked_fill(~real, (S + 1) * T)            # (B, T) span, then position
    last_key = key.sort(1).values.gather(1, budget - 1)                 # (B, 1)
    removed = (key <= last_key) & real
    return torch.where(removed, span_ids.clamp(max=S - 1), S)

class Spans(NamedTuple):
    """Rows of text in another order: the tokens that stay, padding, then the K removed tokens.

        the | c | at | sat | on | the | m | at      span 0 is "cat sat"

        tokens      the  on  the  m  at  |  c  at  sat          K = 3
        positions    0   4    5   6   7  |  1   2   3
        weights                            1/3 1/3 1/3          span 0; all other spans are empty
    """
    tokens: torch.Tensor        # (B, T)
    positions: torch.Tensor     # (B, T) where each token stood in the text
    real: torch.Tensor          # (B, T) False where a token is padding
    weights: torch.Tensor       # (B, S, K) 1/n where removed token k belongs to span s of n tokens

    def context_tokens(self):
        """Tokens that the context encoder reads, their positions and mask: (B, T-K) each."""
        n_context = self.tokens.size(1) - self.weights.size(2)
        return [x[:, :n_context] for x in (self.tokens, self.positions, self.real)]

    def mean(self, latents):
        """Mean over the tokens of each span: (B, K, C) -> (B, S, C); zero if a span is empty."""
        # fp32: bf16 would round the targets to eight bits.
        with torch.autocast(latents.device.type, enabled=False):
            return self.weights @ latents.float()

def split_spans(span_ids, tokens, n_removed, cfg, unit=None):
    """Span numbers (B, T) of `sample_spans` -> `Spans` with K = n_removed.

    A row that loses r < K tokens must have at least K - r tokens of padding, which stand in for
    the missing ones.
    unit: span | token, what gets one latent; by default cfg.target.
    """
    order = 2 * (span_ids < cfg.max_spans) + (tokens == cfg.pad)        # 0 stays, 1 padding, 2 gone
    positions = order.argsort(dim=1, stable=True)                       # (B, T)
    tokens = tokens.gather(1, positions)
    real = tokens != cfg.pad
    span_of = span_ids.gather(1, positions[:, -n_removed:])             # (B, K)
    if (unit or cfg.target) == "token":                 # each removed token is a span of its own
        weights = torch.diag_embed((span_of < cfg.max_spans).float())   # (B, K, K)
    else:
        span = torch.arange(cfg.max_spans, device=tokens.device)
        members = (span_of[:, None] == span[:, None]).float()           # (B, S, K)
        weights = F.normalize(members, p=1, dim=-1)
    return Spans(tokens, positions, real, weights)

# -- the predictor ---------------------------------------------------------------------------------

class Predictor(nn.Module):
    """Transformer that reads context latents and predicts latents elsewhere (v1.1 section 3.1).

    It gets one learned mask token for each position that is asked for, and returns a state for
    each. The model maps states to latents by latent_proj, and for the masked LM by word_proj: with
    one map for both, the latents lose rank.
    """

    def __init__(self, cfg):
        super().__init__()
        self.context_proj = nn.Linear(cfg.n_embd, cfg.pred_embd, bias=False)
        self.mask_token = nn.Parameter(torch.randn(cfg.pred_embd) * 0.02)
        blocks = (Block(cfg.pred_embd, cfg.n_head) for _ in range(cfg.pred_layer))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(cfg.pred_embd)
        self.latent_proj = nn.Linear(cfg.pred_embd, cfg.n_embd)
        if cfg.mlm:
            self.word_proj = nn.Linear(cfg.pred_embd, cfg.n_embd)
        # One position more than a text has: phase 2 asks for what follows a full question.
        rope = rotary(cfg.block_size + 1, cfg.pred_embd // cfg.n_head)
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, context, positions, mask):
        """Context latents (B, L, C) -> states (B, K, P) of the K positions that are asked for.

        positions, mask (B, L+K): of the context latents, then of the queries; the mask is bool,
        True where a latent or a query counts.
        """
        n_queries = positions.size(1) - context.size(1)
        queries = self.mask_token.expand(len(context), n_queries, -1)   # (B, K, P)
        x = torch.cat((self.context_proj(context), queries), dim=1)     # (B, L+K, P)
        rope = self.rope[positions].unsqueeze(1)                        # (B, 1, L+K, hs/2)
        mask = additive(mask)
        for block in self.blocks[:-1]:
            x = block(x, rope, mask)
        # Only the queries are read, so only they pass through the last block.
        x = self.blocks[-1](x, rope, mask, n_last=n_queries)            # (B, K, P)
        return self.norm(x)

# -- parts of the losses ---------------------------------------------------------------------------

def masked_mean(x, mask, dim):
    """Mean of x over dim(s), counting only where mask (0 or 1, broadcast to x) is set."""
    mask = mask.to(x.dtype).expand_as(x)
    return (x * mask).sum(dim) / mask.sum(dim).clamp(min=1)

def latent_error(predicted, target, kind):
    """Error of each predicted latent: (..., C) -> (...,). `TJEPA.energy` is its mean over spans.

    kind: mse, or infonce. InfoNCE trains directions alone, so its error is 1 - cosine.
    """
    if kind == "mse":
        return F.mse_loss(predicted, target, reduction="none").mean(-1)
    return 1 - F.cosine_similarity(predicted, target, dim=-1)

def latent_distance(predicted, target, mask, kind):
    """Loss of predicted (N, C) against target (N, C) over the rows in mask (N,).

    kind: mse, or infonce, the contrastive cross-entropy.
    """
    if kind == "mse":
        return masked_mean(latent_error(predicted, target, kind), mask, 0)
    # InfoNCE (temperature .1): tell the own target from all other targets of the batch.
    predicted = F.normalize(predicted, dim=-1)
    target = F.normalize(target, dim=-1)
    similarity = predicted @ target.T                                   # (N, N)
    logits = (similarity / 0.1).masked_fill(~mask, -torch.inf)
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own.masked_fill(~mask, -100), ignore_index=-100)

def r_squared(predicted, target, mask):
    """1 - MSE / (MSE of always predicting the mean target): a metric; align.py trains on 1 - R2.

    predicted, target (N, C), mask (N,). 1 is perfect; 0 is no better than the mean; below 0 worse.
    """
    mask = mask[:, None]
    mean = masked_mean(target, mask, 0)                                 # (C,)
    error = masked_mean((predicted - target) ** 2, mask, (0, 1))
    spread = masked_mean((target - mean) ** 2, mask, (0, 1))
    return 1 - error / spread.clamp(min=1e-8)

class SIGReg(nn.Module):
    """SIGReg (LeJEPA 2025): distance of latents z (N, C) from an isotropic Gaussian.

    Along random directions it compares the characteristic function of z with that of N(0, 1), on
    17 points of [0, 3] (Epps-Pulley), without the usual factor N. Values to know:

        N draws of a Gaussian               1.05 / N
        all latents 0                       0.402
        one layer-normed latent, repeated   1.05
    """

    def __init__(self, n_slices=64):
        super().__init__()
        self.n_slices = n_slices
        t = torch.linspace(0, 3, 17)
        gauss = torch.exp(-t ** 2 / 2)  # characteristic function of N(0, 1), and weight of each t
        # Trapezoid rule on [-3, 3] with step 3/16. The integrand is even: each t > 0 counts twice,
        # the end t = 3 half of that.
        trapezoid = F.pad(torch.full((15,), 2.0), (1, 1), value=1.0) * 3 / 16
        self.register_buffer("t", t, persistent=False)
        self.register_buffer("gauss", gauss, persistent=False)
        self.register_buffer("weight", trapezoid * gauss, persistent=False)

    def forward(self, z):
        """z (N, C) -> a number."""
        slices = torch.randn(z.size(1), self.n_slices, device=z.device)
        u = (z @ F.normalize(slices, dim=0))[..., None] * self.t        # (N, n_slices, 17)
        # the characteristic function is E[exp(i u)] = E[cos u] + i E[sin u]
        real = u.cos().mean(0)                                          # (n_slices, 17)
        imaginary = u.sin().mean(0)
        error = (real - self.gauss) ** 2 + imaginary ** 2
        return (error @ self.weight).mean()

# -- the decoder -----------------------------------------------------------------------------------

class Thought(NamedTuple):
    """The thought of each question, and beside it what else a decoder could read."""
    latent: torch.Tensor        # (B, D) W L_p, the predicted latent of the answer; in an echo L_a
    context: torch.Tensor       # (B, T, C) context latents of the question, or of an echoed text
    context_mask: torch.Tensor  # (B, T) False where a token is padding or was dropped

    def rows(self, index):
        """The thoughts of some rows."""
        return Thought(*(part[index] for part in self))

def thought_of(latent):
    """A `Thought` of latents (B, D) that belong to no question; for memory="thought" alone."""
    nothing = latent.new_zeros(len(latent), 0, latent.size(1))
    return Thought(latent, nothing, nothing.any(-1))

class Memory(NamedTuple):
    """What one cross-attention reads. It is the same for every token, so it is computed once."""
    keys: torch.Tensor      # (B, nh, M, hs)
    values: torch.Tensor    # (B, nh, M, hs)
    mask: torch.Tensor | None   # (B, 1, 1, M) from `additive`; None: every slot is read

def split_heads(x, n_head):
    """(B, T, C) -> (B, nh, T, hs)."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)

class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of the decoder to the slots of a memory."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.q = nn.Linear(n_embd, n_embd, bias=False)
        self.kv = nn.Linear(n_embd, 2 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)

    def project(self, slots, mask):
        """Slots (B, M, C) -> `Memory`; mask: from `additive`, or None."""
        k, v = self.kv(slots).chunk(2, dim=-1)
        return Memory(split_heads(k, self.n_head), split_heads(v, self.n_head), mask)

    def forward(self, x, memory):
        """x (B, T, C) -> (B, T, C)."""
        q = split_heads(self.q(x), self.n_head)                         # (B, nh, T, hs)
        return self.proj(attend(q, *memory))

class KVCache:
    """Keys and values of one self-attention for the tokens read so far; room for `size` tokens."""

    def __init__(self, size):
        self.size = size
        self.length = 0
        self.keys = self.values = None      # (B, nh, size, hs), made by the first tokens

    def append(self, k, v):
        """Add k and v (B, nh, T, hs) of the newest tokens; returns those of all tokens."""
        if self.keys is None:
            B, nh, _, hs = k.shape
            self.keys = k.new_empty(B, nh, self.size, hs)
            self.values = v.new_empty(B, nh, self.size, hs)
        begin = self.length
        self.length += k.size(2)
        self.keys[:, :, begin:self.length] = k
        self.values[:, :, begin:self.length] = v
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]

    def __len__(self):
        return self.length

class DecoderBlock(nn.Module):
    """Pre-norm block of the decoder: causal self-attention, cross-attention and an MLP."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.norm_attn = nn.LayerNorm(n_embd, bias=False)
        self.attn = Attention(n_embd, n_head)
        self.norm_cross = nn.LayerNorm(n_embd, bias=False)
        self.cross = CrossAttention(n_embd, n_head)
        self.norm_mlp = nn.LayerNorm(n_embd, bias=False)
        self.mlp = make_mlp(n_embd)

    def forward(self, x, rope, memory, cache=None):
        """x (B, T, C), `Memory` -> (B, T, C). With a cache, x is the newest token, (B, 1, C)."""
        # The newest token may read all tokens in the cache: it needs no causal mask.
        x = x + self.attn(self.norm_attn(x), rope, causal=cache is None, cache=cache)
        x = x + self.cross(self.norm_cross(x), memory)
        return x + self.mlp(self.norm_mlp(x))

class Decoder(nn.Module):
    """Causal transformer that cross-attends to a memory; two heads, token and latent.

    It reads [BOS] and the answer so far, never the question: all it knows about the question is in
    the memory (v1.1 section 3.2).
    """

    def __init__(self, cfg):
        super().__init__()
        self.n_slots = cfg.n_slots
        # Softmax over one key is 1 for every query. So a thought is spread over several slots.
        self.slots = None
        if cfg.memory == "thought":
            width = cfg.teacher_width or cfg.n_embd
            self.slots = nn.Linear(width, cfg.n_slots * cfg.n_embd)
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        blocks = (DecoderBlock(cfg.n_embd, cfg.n_head) for _ in range(cfg.dec_layer))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(cfg.n_embd, bias=False)
        self.token_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.token_head.weight = self.embed.weight      # tied, as in nanoGPT
        self.latent_head = nn.Linear(cfg.n_embd, cfg.teacher_width or cfg.n_embd)
        rope = rotary(cfg.answer_size, cfg.n_embd // cfg.n_head)
        self.register_buffer("rope", rope, persistent=False)

    def memory_slots(self, thought):
        """`Thought` of B rows -> slots (B, M, C), and their mask from `additive` or None."""
        if self.slots is None:
            return thought.context, additive(thought.context_mask)
        # MSE pulls an uncertain thought towards 0, the mean of L_a, and so makes it short. The norm
        # removes the length, so that an uncertain thought is said like a certain one.
        slots = self.slots(norm(thought.latent))
        return slots.unflatten(-1, (self.n_slots, -1)), None            # (B, M, C)

    def read(self, thought):
        """`Thought` -> the `Memory` of each block."""
        slots, mask = self.memory_slots(thought)
        return [block.cross.project(slots, mask) for block in self.blocks]

    def forward(self, tokens, memories, caches=None):
        """tokens (B, T) -> states (B, T, C). With caches, tokens is the newest one, (B, 1)."""
        if caches and tokens.size(1) != 1:
            raise ValueError("with a KV cache the decoder reads one token at a time")
        caches = caches or [None] * len(self.blocks)
        past = len(caches[0]) if caches[0] is not None else 0
        rope = self.rope[past:past + tokens.size(1)]                    # (T, hs/2)
        x = self.embed(tokens)                                          # (B, T, C)
        for block, memory, cache in zip(self.blocks, memories, caches):
            x = block(x, rope, memory, cache)
        return self.norm(x)

# -- the model and its three phases ----------------------------------------------------------------

class Prediction(NamedTuple):
    """Steps 1 to 3 of the JEPA step: target latents, context latents, prediction.

    S spans; with target="token" each of the K removed tokens is a span of its own.
    """
    predicted: torch.Tensor     # (B, S, C) predicted latents of the removed spans
    target: torch.Tensor        # (B, S, C) their latents in the target encoder
    context: torch.Tensor       # (B, T-K, C) context latents
    states: torch.Tensor        # (B, K, P) the predictor's state at each removed token
    spans: Spans

    @property
    def span_mask(self):
        """Bool (B, S), True where there is such a span."""
        return self.spans.weights.any(-1)

    @property
    def word_ids(self):
        """Ids of the removed tokens, (B, K); -100 where there is none."""
        n_removed = self.states.size(1)
        ids = self.spans.tokens[:, -n_removed:]
        real = self.spans.real[:, -n_removed:]
        return ids.masked_fill(~real, -100)

class TJEPA(nn.Module):
    """Context encoder, target encoder, predictor and decoder; a loss for each of phases 1 to 3."""

    def __init__(self, cfg, word_start):
        """word_start: bool (vocab_size,), True for tokens that begin a word."""
        super().__init__()
        self.cfg = cfg
        # This order fixes the random draws of the weights.
        self.context_encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.predictor = Predictor(cfg)
        # W maps predicted latents (C) to the width of the teacher's (D), v1.1 section 3.3. It is
        # the identity where the target encoder teaches: phase 2 then trains the predictor to the
        # scale of standardised answers.
        self.W = nn.Linear(cfg.n_embd, cfg.teacher_width) if cfg.teacher_width else nn.Identity()
        self.apply(self.init_weights)
        # Copied after the initialisation: the target encoder starts as an exact copy.
        self.target_encoder = deepcopy(self.context_encoder).requires_grad_(False)
        self.sigreg = SIGReg()
        self.register_buffer("word_start", torch.as_tensor(word_start), persistent=False)
        width = cfg.teacher_width or cfg.n_embd
        self.register_buffer("answer_mean", torch.zeros(width))
        self.register_buffer("answer_scale", torch.eye(width))

    def init_weights(self, module):
        """Variance-preserving matrices at any width: GPT-2's std of .02 makes narrow ones collapse.

        An encoder's embedding has .02. The decoder's is tied to token_head, which is visited later,
        so it gets the initialisation of a matrix.
        """
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    def trained_in(self, phase):
        """The parts that a phase trains; no other part gets a gradient in it."""
        thinking = [self.context_encoder, self.predictor]
        return dict(
            pretrain=thinking,
            distill=thinking + [self.W],
            speak=[self.decoder],
            teach=thinking + [self.W, self.decoder],
        )[phase]

    def encode(self, tokens, encoder=None):
        """Latents of a whole text: tokens (B, T) -> (B, T, C), mean of the last cfg.top_k layers.

        The target encoder's, unless another encoder is given. Probes and teachers read them.
        """
        encoder = encoder or self.target_encoder
        positions = torch.arange(tokens.size(1), device=tokens.device)
        return encoder(tokens, positions, tokens != self.cfg.pad, self.cfg.top_k)

    def concept(self, tokens):
        """One latent for a text: (B, T) -> (B, C), the mean over its tokens."""
        return masked_mean(self.encode(tokens), (tokens != self.cfg.pad)[..., None], 1)

    # -- phase 1: the JEPA step --------------------------------------------------------------------

    def target_latents(self, spans, n_masks=1):
        """Targets, (B, S, C): the mean latent of each span's tokens, normed if cfg.target_norm.

        n_masks: each text fills n_masks successive rows, with other spans removed in each.
        """
        cfg = self.cfg
        encoder = self.target_encoder if cfg.stop_gradient else self.context_encoder
        # the whole text is read, and the latents of the removed tokens are kept, (B, K, C)
        n_removed = spans.weights.size(2)
        if n_masks == 1:
            removed = encoder(spans.tokens, spans.positions, spans.real,
                              top_k=cfg.top_k, n_last=n_removed)
        else:                           # each text is read once, in the order of its first row
            tokens = spans.tokens[::n_masks]
            positions = spans.positions[::n_masks]
            latents = encoder(tokens, positions, spans.real[::n_masks], top_k=cfg.top_k)
            latents = latents.repeat_interleave(n_masks, 0)             # (B, T, C)
            place = positions.argsort(1)                # place[position] = column
            place = place.repeat_interleave(n_masks, 0)                 # (B, T)
            place = place.gather(1, spans.positions[:, -n_removed:])    # (B, K)
            place = place[..., None].expand(-1, -1, latents.size(2))
            removed = latents.gather(1, place)
        target = spans.mean(removed)
        # The mean of unlike latents has a small norm, the smaller the longer the span. Without the
        # layer norm long spans would weigh less, and latents that cancel out would lower the loss.
        return norm(target) if cfg.target_norm else target

    def predict(self, tokens, span_ids, n_removed=None, unit=None):
        """Remove spans and predict their latents: tokens, span_ids (B, T) -> `Prediction`.

        There may be several rows of span_ids for each row of tokens, one after the other.
        n_removed: the most tokens that a row loses; by default what `sample_spans` takes from a
        full row. unit: as in `split_spans`.
        """
        n_removed = n_removed or max(1, round(tokens.size(1) * self.cfg.mask_ratio))
        n_masks = len(span_ids) // len(tokens)
        if n_masks > 1:
            tokens = tokens.repeat_interleave(n_masks, 0)
        spans = split_spans(span_ids, tokens, n_removed, self.cfg, unit)

        # 1. target latents: the target encoder reads the whole text. Stop-gradient: its weights
        #    have requires_grad off since `__init__`; step 5 moves them. (With stop_gradient off,
        #    the context encoder reads it, with gradient.)
        target = self.target_latents(spans, n_masks)                    # (B, S, C)

        # 2. context latents: the context encoder reads what is left
        kept, positions, kept_mask = spans.context_tokens()             # (B, T-K)
        context = self.context_encoder(kept, positions, kept_mask)

        # 3. prediction: one mask token at each removed position; then the mean over each span of
        #    what is predicted there
        states = self.predictor(context, spans.positions, spans.real)   # (B, K, P)
        predicted = spans.mean(self.predictor.latent_proj(states))      # (B, S, C)
        return Prediction(predicted, target, context, states, spans)

    def pretrain_loss(self, tokens, span_ids):
        """Loss of phase 1 (v1.1 section 3.1): tokens, span_ids (B, T) -> (loss, stats)."""
        cfg = self.cfg
        p = self.predict(tokens, span_ids)

        # 4. loss: InfoNCE, or the distance of predicted and target latents. MSE is 0 if all latents
        #    are equal, which is collapse: EMA and stop-gradient make that slow, SIGReg and the
        #    masked-LM loss pull the latents apart
        loss = self.latent_loss(p)
        stats = dict(latent=loss)
        if cfg.sigreg:
            stats["sigreg"] = self.regularise(p)
            loss = loss + cfg.sigreg * stats["sigreg"]
        if cfg.mlm:
            stats["mlm"] = self.word_loss(p)
            loss = loss + cfg.mlm * stats["mlm"]
        return loss, {name: value.detach() for name, value in stats.items()}

    def latent_loss(self, p):
        """Distance between predicted and target latents, over the spans of all texts."""
        return latent_distance(p.predicted.flatten(0, 1), p.target.flatten(0, 1),
                               p.span_mask.flatten(), self.cfg.loss)

    @torch.no_grad()
    def ema_update(self):
        """target <- tau * target + (1 - tau) * context encoder, see `train.target_moves`."""
        # 5. EMA, by torch's function: one launch for all weights, where a loop needs one for each.
        #    It ignores its third argument, the number of updates.
        targets, contexts = self.target_encoder.parameters(), self.context_encoder.parameters()
        get_ema_multi_avg_fn(self.cfg.ema_decay)([*targets], [*contexts], None)

    def sample_latents(self, p, n=512):
        """n context latents, (n, C), drawn across texts from all that are not padding."""
        _, _, real = p.spans.context_tokens()
        index = torch.multinomial(real.flatten().float(), n, replacement=True)
        # F.embedding and not latents[index]: the backward of indexing is not deterministic.
        return F.embedding(index, p.context.flatten(0, 1))

    def regularise(self, p):
        """SIGReg of token latents from all texts of the batch: spreads them over all directions."""
        return self.sigreg(self.sample_latents(p))

    def word_loss(self, p):
        """Masked-LM loss: cross-entropy of removed tokens, by the context encoder's embedding."""
        return F.cross_entropy(self.word_logits(p).flatten(0, 1), p.word_ids.flatten())

    def word_logits(self, p):
        """Logits of each removed token, (B, K, V)."""
        states = norm(self.predictor.word_proj(p.states))               # (B, K, C)
        return F.linear(states, self.context_encoder.embed.weight)

    @torch.no_grad()
    def energy(self, tokens, span_ids):
        """Latent prediction error of the removed spans, (B,): low if they fit the context.

        K is the most tokens that a row loses: a row that loses r must have at least K - r tokens of
        padding.
        """
        n_removed = int((span_ids < self.cfg.max_spans).sum(1).max())
        p = self.predict(tokens, span_ids, n_removed)
        error = latent_error(p.predicted, p.target, self.cfg.loss)      # (B, S)
        return masked_mean(error, p.span_mask, 1)

    # -- phase 2: distill answers, in latent space -------------------------------------------------

    def fit_answer_scale(self, latents):
        """Fit the standardisation to the teacher's answer latents (n, D); returns L_a (n, D).

        The latent of an answer is the mean over its tokens, read without the question, which would
        leak into it. The default teacher is the target encoder: see `concept`.

        L_a is half way to white: a principal direction of variance v is divided by the fourth root
        of v, so that its variance becomes the root of v. Otherwise the few directions that separate
        topics (Vietnam, France) would hide those that separate the answers of one topic (its
        capital, its currency). The mean of L_a is 0, its variance 1 on average over directions.
        """
        self.answer_mean.copy_(latents.mean(0))
        centred = (latents - self.answer_mean).cpu().double()
        variance, axes = torch.linalg.eigh(centred.T @ centred / len(latents))
        # plus 1 % of the mean variance: directions that have none are not blown up
        variance = variance.clamp(min=0) + 0.01 * variance.mean() + 1e-12
        scale = (axes * variance ** -0.25) @ axes.T                     # (D, D)
        size = (centred @ scale).square().mean().sqrt()
        if size > 1e-6:                                 # a single answer has no spread
            self.answer_scale.copy_(scale / size)
        return self.standardise(latents)

    def standardise(self, latents):
        """A teacher's latents (..., D) on the scale of thoughts."""
        return (latents - self.answer_mean) @ self.answer_scale

    def drop_tokens(self, question, drop):
        """Which tokens of question (B, T) are read, bool (B, T); drop: share that is not."""
        real = question != self.cfg.pad
        if not drop:
            return real
        kept = real & (torch.rand_like(real, dtype=torch.float) >= drop)
        # A question that lost every token keeps all of them.
        return torch.where(kept.any(1, keepdim=True), kept, real)

    def think(self, question, drop=0.0):
        """Predict the latent of the answer: question (B, T), padded on the right -> `Thought`.

        As in phase 1, but with one mask token, at the position after the question: the predictor
        is asked for what follows. drop: share of the question's tokens that is left out.
        """
        kept = self.drop_tokens(question, drop)
        positions = torch.arange(question.size(1), device=question.device).expand_as(question)
        context = self.context_encoder(question, positions, kept)       # (B, T, C)
        after = (question != self.cfg.pad).sum(1, keepdim=True)         # (B, 1)
        positions = torch.cat((positions, after), dim=1)                # (B, T+1)
        mask = F.pad(kept, (0, 1), value=True)
        state = self.predictor(context, positions, mask)                # (B, 1, P)
        latent = self.W(self.predictor.latent_proj(state[:, 0]))        # (B, D)
        return Thought(latent, context, kept)

    def distill_loss(self, question, answer_latent):
        """Loss of phase 2 (v1.1 section 3.3): MSE(W L_p, L_a) -> (loss, stats).

        question (B, T), answer_latent L_a (B, D). L_a is constant, so that nothing can collapse.
        """
        predicted = self.think(question, self.cfg.question_drop).latent.float()     # (B, D)
        loss = F.mse_loss(predicted, answer_latent)
        return loss, dict(latent=loss.detach())

    # -- phase 3: speak ----------------------------------------------------------------------------

    @torch.no_grad()
    def think_gaps(self, tokens, span_ids, n_removed):
        """Thoughts of the removed spans of a text: predicted and target (B, S, C), mask (B, S).

        For a text without questions: phase 2 is skipped, and in phase 3 the decoder learns to say
        removed spans. There is no W, because phase 1 has trained predictions to match targets. Both
        are standardised; `fit_answer_scale` was given targets of spans. n_removed: as in `predict`.
        """
        p = self.predict(tokens, span_ids, n_removed, unit="span")
        # InfoNCE trains the direction of a prediction and leaves its length open.
        predicted = norm(p.predicted) if self.cfg.loss == "infonce" else p.predicted
        return self.standardise(predicted), self.standardise(p.target), p.span_mask

    def blur(self, latent):
        """Latents (B, D) of questions and echoes alike, made inexact, as new thoughts will be."""
        # A thought that errs leans towards another answer: mix in another row, and add noise.
        share = self.cfg.noise * torch.rand(len(latent), 1, device=latent.device)
        other = latent[torch.randperm(len(latent), device=latent.device)]
        return torch.lerp(latent, other, share) + self.cfg.noise * torch.randn_like(latent)

    def speak_loss(self, thought, answer, answer_latent, alpha):
        """Loss of phase 3 (v1.1 section 3.2): alpha * L_latent + (1 - alpha) * L_token.

        answer (B, A) with EOS and padding, answer_latent L_a (B, D) -> (loss, stats). L_latent is
        the distance of the latent head to L_a, L_token the cross-entropy of the answer's tokens.
        alpha falls from --alpha_start to 0 during the phase; v2.0: alpha = 0.

        A row is a question, whose thought is W L_p, or an echo, whose thought is L_a. Facts come in
        groups: the questions of DEC are in phases 2 and 3, those of LAT in phase 2 alone, those of
        TXT in neither; the answers of all three are echoed. So the decoder can say every answer,
        and only the thought tells it which one.
        (With memory="tokens" an echo reads the context latents of the answer.)
        """
        memories = self.decoder.read(thought._replace(latent=self.blur(thought.latent)))
        inputs = F.pad(answer[:, :-1], (1, 0), value=self.cfg.bos)      # (B, A): BOS, then answer
        states = self.decoder(inputs, memories)                         # (B, A, C)
        logits = self.decoder.token_head(states).flatten(0, 1).float()  # (B*A, V)
        token = F.cross_entropy(logits, answer.flatten(), ignore_index=self.cfg.pad)
        # The latent loss is read at BOS, before any answer token can leak in.
        latent = F.mse_loss(self.decoder.latent_head(states[:, 0]).float(), answer_latent)
        loss = alpha * latent + (1 - alpha) * token
        return loss, dict(token=token.detach(), latent=latent.detach())

    @torch.inference_mode()             # a token takes a fifth less time than under no_grad
    def speak(self, thought, temperature=0.0, top_k=0, top_p=1.0):
        """Say a `Thought` of B rows: yields token ids (B,), PAD after a row's end."""
        memories = self.decoder.read(thought)
        caches = [KVCache(self.cfg.answer_size) for _ in self.decoder.blocks]
        B, device = len(memories[0].keys), memories[0].keys.device
        token = torch.full((B,), self.cfg.bos, device=device)
        ended = [False] * B             # a list: `any` and `all` of it launch nothing on a GPU
        for _ in range(self.cfg.answer_size):
            state = self.decoder(token[:, None], memories, caches)[:, -1]       # (B, C)
            logits = self.decoder.token_head(state).float()             # (B, V)
            token = sample_token(logits, temperature, top_k, top_p)
            if any(ended):
                token = token.masked_fill(torch.tensor(ended, device=device), self.cfg.pad)
            yield token
            ended = [i >= self.cfg.pad for i in token.tolist()]     # the special tokens come last
            if all(ended):
                return

def sample_token(logits, temperature=0.0, top_k=0, top_p=1.0):
    """Next token ids (B,) from logits (B, V): greedy at temperature 0, else sampled.

    top_k keeps the k likeliest tokens (0 = all). top_p keeps the smallest set of tokens that
    holds this much probability.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        top_k = min(top_k, logits.size(-1))
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = F.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        ranked, order = p.sort(descending=True)
        before = ranked.cumsum(-1) - ranked             # probability of all likelier tokens
        p = p.scatter(1, order, ranked * (before < top_p))
    return torch.multinomial(p, 1)[:, 0]

# -- the collapse panel: a falling latent loss does not prove learning -----------------------------

COLLAPSED, HEALTHY = 0.12, 0.17         # thresholds of std * rank / bound, from labs/collapse.py

def mean_cosine(z):
    """Mean cosine over all pairs of different rows of z (N, C)."""
    n = len(z)
    mean = F.normalize(z, dim=-1).mean(0)
    # n * n * |mean|^2 is the sum over all pairs; the n pairs of a row with itself have cosine 1
    return ((n * (mean @ mean) - 1) / (n - 1)).item()

@torch.no_grad()
def latent_health(z, mask):
    """How spread latents z (B, T, C) are where mask (B, T) is set: a dict of floats.

    train.py gives it the target's latents of held-out text, at each evaluation of phase 1.

    pos          share of the variance that the position alone explains; std, rank are without it
    std          standard deviation over all tokens, mean over dimensions
    rank         RankMe: exp of the entropy of the normalised singular values of centred latents
    bound        the most that rank can be: min(N-1, C)
    cos          mean pairwise cosine; near 1 the latents form a narrow cone
    cos_centred  the same after the mean over all tokens is removed
    """
    z = z.cpu().double()                                # float64 does not exist on every GPU
    mask = mask.cpu()
    flat = z[mask]                                                      # (N, C)
    centred = flat - flat.mean(0)
    content = (z - masked_mean(z, mask[..., None], 0))[mask]
    total = (centred ** 2).sum()
    pos = 1 - (content ** 2).sum() / total.clamp(min=1e-12)
    # 8,192 rows are 20 times the width of the widest preset, and the decomposition stays fast.
    content_centred = content[:8192] - content[:8192].mean(0)
    s = torch.linalg.svdvals(content_centred)
    p = s / s.sum().clamp(min=1e-12) + 1e-12
    rank = torch.exp(-(p * p.log()).sum())
    return dict(
        std=content.std(0).mean().item(),
        rank=rank.item(),
        pos=pos.item(),
        bound=min(len(content) - 1, z.size(-1)),
        cos=mean_cosine(flat),
        cos_centred=mean_cosine(centred),
    )

def health_word(health):
    """One word for `latent_health`: collapsed | shrinking | healthy.

    Collapsed: in labs/collapse.py such encoders helped phase 2 no more than random weights did.
    """
    spread = health["std"] * health["rank"] / health["bound"]
    if spread < COLLAPSED:
        return "collapsed"
    return "shrinking" if spread < HEALTHY else "healthy"
