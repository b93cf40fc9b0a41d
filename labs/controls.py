"""
Controls: what one would use instead of a T-JEPA, in the same size and from the same blocks.

GPT         a decoder-only language model. `Reader` reads the rows of phase 1, `answering` teaches
            it questions and answers as tokens, `gpt_says` asks it.
masked LM   `variants.MaskedLM`, an encoder that predicts removed tokens. `WordEnergy` asks it, or
            a T-JEPA with a token loss, for the words of a gap.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

import tjepa

# flags of an arm (labs.runs.Arm) whose phase 1 is a masked LM
MASKED_LM = dict(variant="MaskedLM", mlm=1.0, sigreg=0.0)

class GPT(nn.Module):
    """A decoder-only language model with a tied head.

    It has V*C + n_layer * (12*C*C + 2*C) + C parameters. cfg: a `tjepa.Config`, of which it takes
    vocabulary, width, heads and depth. longest: the most tokens that it can read.
    """
    init_weights = tjepa.TJEPA.init_weights
    drop_tokens = tjepa.TJEPA.drop_tokens

    def __init__(self, cfg, longest):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        blocks = (tjepa.Block(cfg.n_embd, cfg.n_head) for _ in range(cfg.n_layer))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(cfg.n_embd, bias=False)
        rope = tjepa.rotary(longest, cfg.n_embd // cfg.n_head)
        self.register_buffer("rope", rope, persistent=False)
        self.apply(self.init_weights)

    def trained_in(self, phase):
        """All parts in each phase, so that `train.fit` can train them."""
        return list(self.children())

    def layers(self, tokens, positions=None, mask=None, caches=None):
        """tokens (B, T) -> the states after each block, a list of (B, T, C).

        positions (T,) or (B, T); by default the next ones. mask: bool (T, T), True where a token
        may be attended to; by default causal. With caches, tokens are the newest ones alone.
        """
        past = len(caches[0]) if caches else 0
        if past and tokens.size(1) > 1:
            raise ValueError("after its first tokens a KV cache takes one token at a time")
        if positions is None:
            positions = torch.arange(past, past + tokens.size(1), device=tokens.device)
        rope = self.rope[positions].unsqueeze(-3)       # (B, 1, T, hs/2) or (1, T, hs/2): all heads
        causal = mask is None and not past
        x = self.embed(tokens)                                          # (B, T, C)
        states = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x = block(x, rope, mask, causal, cache)
            states.append(x)
        return states

    def states(self, tokens, positions=None, mask=None, caches=None):
        """The normed states after the last block: (B, T, C). Arguments as in `layers`."""
        return self.norm(self.layers(tokens, positions, mask, caches)[-1])

    def say(self, states):
        """Logits (..., V) of the next token."""
        return F.linear(states, self.embed.weight).float()

    def forward(self, tokens, targets=None, positions=None, caches=None):
        """tokens (B, T) -> (logits, loss), as in nanoGPT.

        With targets (B, T), -1 where there is none: logits of all positions. Without: logits of
        the last position, and no loss.
        """
        states = self.states(tokens, positions, caches=caches)
        if targets is None:
            return self.say(states[:, -1:]), None                       # (B, 1, V)
        logits = self.say(states)                                       # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def generate(self, prompt, n):
        """Greedy: the n tokens after prompt (B, T), with a KV cache: (B, n)."""
        caches = [tjepa.KVCache() for _ in self.blocks]
        newest = prompt
        generated = []
        for _ in range(n):
            logits, _ = self(newest, caches=caches)
            newest = logits.argmax(-1)                                  # (B, 1)
            generated.append(newest)
        return torch.cat(generated, dim=1)

class Reader(GPT):
    """The GPT as a control of phase 1: it reads the same rows of text, each after [BOS]."""

    def __init__(self, cfg):
        # [BOS], and either a row of text or a question and its answer
        super().__init__(cfg, 1 + cfg.block_size + cfg.answer_size)

    def after_bos(self, tokens):
        """[BOS], then all tokens: (B, T) -> (B, 1+T)."""
        return F.pad(tokens, (1, 0), value=self.cfg.bos)

    def pretrain_loss(self, tokens):
        """Cross-entropy of each real token of (B, T), the first one too -> (loss, stats)."""
        targets = tokens.masked_fill(tokens == self.cfg.pad, -1)
        _, loss = self(self.after_bos(tokens[:, :-1]), targets)
        return loss, {}

    def ema_update(self):
        """It has no target encoder: nothing to do after a step of phase 1."""

    def encode(self, tokens, top_k=1):
        """Latents (B, T, C) of tokens (B, T): mean of the last top_k layers, as in `Encoder`."""
        layers = self.layers(self.after_bos(tokens))[-top_k:]
        return sum(tjepa.norm(x[:, 1:]) for x in layers) / top_k

    @torch.no_grad()
    def energy(self, tokens, span_ids):
        """Minus the log-probability of each whole text (B, T), without padding: (B,).

        span_ids are ignored: the probability of a text depends on the removed tokens and on all
        that follows them.
        """
        logits = self.say(self.states(self.after_bos(tokens[:, :-1])))  # (B, T, V)
        surprise = F.cross_entropy(logits.mT, tokens, ignore_index=self.cfg.pad, reduction="none")
        return surprise.sum(1)

# -- a GPT is taught to answer, and asked ----------------------------------------------------------

def with_end(answers, tokenizer):
    """Answers (n, L) with EOS after their last token: (n, L+1)."""
    longer = F.pad(answers, (0, 1), value=tokenizer.pad)
    ends = (answers != tokenizer.pad).sum(1, keepdim=True)
    return longer.scatter(1, ends, tokenizer.eos)

def lesson(model, questions, answers):
    """A batch for a GPT: questions (B, Q), answers (B, A) with EOS -> tokens, targets, positions.

        position     0    1    2    3   4    5    6
        text       [BOS] what  is  it   ?  moss [EOS]       "is" is dropped:
        tokens     [BOS] what  it   ?  moss
        targets      -    -    -  moss [EOS]
        positions    0    1    3    4   5

    A dropped token is absent and the others keep their positions: what the encoder of a T-JEPA
    gets in phase 2, from the same function. A [MASK] instead would be a token that the GPT has
    never read, and would tell it how many tokens are missing. Without the gap in the positions,
    distances between words would be other ones in training than when the GPT is asked.
    """
    cfg = model.cfg
    kept, _ = model.drop_tokens(questions, cfg.question_drop)           # (B, Q)
    question = model.after_bos(questions.masked_fill(~kept, cfg.pad))   # (B, 1+Q)
    whole = torch.cat((model.after_bos(questions), answers), dim=1)     # (B, T) nothing dropped
    tokens = torch.cat((question, answers), dim=1)                      # (B, T)
    is_answer = torch.zeros_like(tokens, dtype=torch.bool)
    is_answer[:, question.size(1):] = answers != cfg.pad
    positions = ((whole != cfg.pad).cumsum(1) - 1).clamp(min=0)

    # padding and dropped tokens go to the right
    order = (tokens == cfg.pad).byte().argsort(dim=1, stable=True)
    longest = (tokens != cfg.pad).sum(1).max()
    order = order[:, :longest]
    tokens, positions = tokens.gather(1, order), positions.gather(1, order)
    is_answer = is_answer.gather(1, order)
    targets = tokens[:, 1:].masked_fill(~is_answer[:, 1:], -1)
    return tokens[:, :-1], targets, positions[:, :-1]

def answering(run, taught):
    """loss_at of a GPT that learns the answers of questions `taught` (numbers, (n,)).

    Cross-entropy of the answer and its EOS, after [BOS] and the question.
    """
    questions = run.questions.tokens[taught]                            # (n, Q)
    answer_of = run.questions.answer_of[taught]
    answers = with_end(run.questions.answer_tokens[answer_of], run.corpus.tokenizer)    # (n, A)
    batch = run.cfg.qa_batch_size // run.cfg.accum

    def loss_at(progress):
        """Loss of random questions, some of their tokens dropped."""
        which = torch.randint(len(taught), (batch,)).to(run.device)
        tokens, targets, positions = lesson(run.model, questions[which], answers[which])
        _, loss = run.model(tokens, targets, positions)
        return loss, dict(token=loss.detach())
    return loss_at

@torch.no_grad()
def gpt_says(run, questions, size=1024):
    """Greedy answers of a GPT: n strings, and the log-probability of each token, (n, A).

    Log-probabilities are NaN after EOS. Questions of equal length are asked together, so that
    nothing is padded; A = answer_size, as for a T-JEPA.
    """
    model, eos, longest = run.model, run.model.cfg.eos, run.cfg.answer_size
    lengths = (questions.tokens != model.cfg.pad).sum(1)                # (n,)
    answers = torch.full((len(lengths), longest), model.cfg.pad, device=run.device)
    logprobs = torch.zeros(answers.shape, device=run.device)
    for length in lengths.unique().tolist():
        for which in (lengths == length).nonzero()[:, 0].split(size):
            prompt = model.after_bos(questions.tokens[which, :length])  # (B, 1+Q)
            with run.autocast():
                ids = model.generate(prompt, longest)                   # (B, A)
            # read once more without autocast: probabilities in bf16 would be rounded
            states = model.states(torch.cat((prompt, ids[:, :-1]), dim=1))[:, length:]
            every = F.log_softmax(model.say(states), dim=-1)            # (B, A, V)
            own = every.gather(-1, ids[..., None])[..., 0]              # (B, A)
            is_end = ids == eos
            after_end = is_end.cumsum(1) - is_end.int() > 0
            answers[which] = ids.masked_fill(after_end, model.cfg.pad)
            logprobs[which] = own.masked_fill(after_end, torch.nan)
    decode = run.corpus.tokenizer.decode
    return [decode(row).strip() for row in answers.tolist()], logprobs

# -- a masked LM is asked as a T-JEPA is asked -----------------------------------------------------

class WordEnergy:
    """The token loss of a model with mlm > 0, asked as `TJEPA.energy` is asked.

    mean: the mean of the log-probabilities of a gap's tokens, else their sum. By the sum long words
    lose; by the mean those words win whose end follows from their beginning. For candidates of
    equal length both agree. Valid after phase 1 alone: later phases move the encoder.
    """

    def __init__(self, model, mean):
        if not model.cfg.mlm:
            raise ValueError("--mlm=0: this run has no token loss, so it cannot predict words")
        self.cfg = model.cfg
        self.model = model
        self.mean = mean

    @torch.no_grad()
    def energy(self, tokens, span_ids):
        """Minus the log-probability of the removed tokens, all removed at once: (B, T) -> (B,)."""
        n_removed = int((span_ids < self.cfg.max_spans).sum(1).max())
        p = self.model.predict(tokens, span_ids, n_removed)
        logits = self.model.word_logits(p).float()                      # (B, K, V)
        # 0 in surplus slots
        surprise = F.cross_entropy(logits.mT, p.word_ids, reduction="none")     # (B, K)
        total = surprise.sum(1)
        return total / (p.word_ids >= 0).sum(1) if self.mean else total
