"""
Controls: what one would use instead of a T-JEPA, in the same size and from the same blocks.

GPT         a decoder-only language model. `read_gpt` trains it on the rows of phase 1, `teach_gpt`
            on questions and answers as tokens; `gpt_says` asks it.
masked LM   `variants.MaskedLM`, an encoder that predicts removed tokens. `WordEnergy` asks it, or
            a T-JEPA with a token loss, for the words of a gap.
"""
import dataclasses

import torch
import torch.nn as nn
from torch.nn import functional as F

import data
import tjepa
import train
from labs.runs import fit

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

    def layers(self, tokens, positions=None, caches=None):
        """tokens (B, T) -> the states after each block, a list of (B, T, C).

        positions (T,) or (B, T); by default the next ones. With caches, tokens are the newest ones
        alone; ValueError if there are several after the first call.
        """
        past = len(caches[0]) if caches else 0
        if past and tokens.size(1) > 1:
            raise ValueError("after its first tokens a KV cache takes one token at a time")
        if positions is None:
            positions = torch.arange(past, past + tokens.size(1), device=tokens.device)
        rope = self.rope[positions].unsqueeze(-3)       # (B, 1, T, hs/2) or (1, T, hs/2): all heads
        x = self.embed(tokens)                                          # (B, T, C)
        if self.cfg.embed_scale != 1:
            x = self.cfg.embed_scale * x
        states = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x = block(x, rope, causal=not past, cache=cache)
            states.append(x)
        return states

    def states(self, tokens, positions=None, caches=None):
        """The normed states after the last block: (B, T, C). Arguments as in `layers`."""
        return self.norm(self.layers(tokens, positions, caches)[-1])

    def say(self, states):
        """Logits (..., V) of the next token."""
        return F.linear(states, self.embed.weight).float()

    def forward(self, tokens, targets=None, positions=None, caches=None):
        """tokens (B, T) -> (logits, loss), as in nanoGPT: with targets (B, T), -1 where there is
        none, logits of all positions; without, those of the last one, and no loss."""
        states = self.states(tokens, positions, caches)
        if targets is None:
            return self.say(states[:, -1:]), None                       # (B, 1, V)
        logits = self.say(states)                                       # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def generate(self, prompt, n):
        """Greedy: the n tokens after prompt (B, T), with a KV cache: (B, n)."""
        caches = [tjepa.KVCache(prompt.size(1) + n) for _ in self.blocks]
        generated = [prompt]
        for _ in range(n):
            logits, _ = self(generated[-1], caches=caches)
            generated.append(logits.argmax(-1))                         # (B, 1)
        return torch.cat(generated[1:], dim=1)

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

# -- a GPT reads, is taught to answer, and is asked ------------------------------------------------

def read_gpt(cfg, corpus):
    """A `train.Run` whose model is a `Reader` of cfg's width and depth, after phase 1.

    It reads the same rows of text as a T-JEPA with this seed, with the same learning rate.
    """
    device, dtype = train.pick_device(cfg)
    torch.manual_seed(cfg.seed)
    shape = dataclasses.replace(cfg, vocab_size=corpus.tokenizer.vocab_size)
    model = Reader(shape).to(device)
    questions = data.Questions(corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size,
                               device) if corpus.qa else None
    run = train.Run(cfg, model, corpus, device, dtype, questions)

    def loss_at(progress):
        """Loss of rows of text."""
        return model.pretrain_loss(corpus.train.batch(cfg.batch_size // cfg.accum).to(device))
    fit(run, "pretrain", loss_at)
    return run

def lesson(model, questions, answers):
    """A batch for a GPT: questions (B, Q), answers (B, A) with EOS -> tokens, targets, positions.

        text         [BOS] what is  it  ?  moss [EOS]       "is" is dropped:
        tokens       [BOS] what it  ?  moss
        targets        -    -   -  moss [EOS]
        positions      0    1   3   4   5

    A dropped token is absent and the others keep their positions, as for the encoder of a T-JEPA in
    phase 2: with a [MASK], or without the gap in the positions, the GPT would learn from what it
    is never asked with.
    """
    cfg = model.cfg
    kept = model.drop_tokens(questions, cfg.question_drop)           # (B, Q)
    whole = torch.cat((model.after_bos(questions), answers), dim=1)     # (B, T) nothing dropped
    positions = ((whole != cfg.pad).cumsum(1) - 1).clamp(min=0)
    question = model.after_bos(questions.masked_fill(~kept, cfg.pad))   # (B, 1+Q)
    tokens = torch.cat((question, answers), dim=1)                      # (B, T)
    is_answer = torch.zeros_like(tokens, dtype=torch.bool)
    is_answer[:, question.size(1):] = answers != cfg.pad

    # padding and dropped tokens go to the right, where the longest row ends
    order = (tokens == cfg.pad).byte().argsort(dim=1, stable=True)
    order = order[:, :(tokens != cfg.pad).sum(1).max()]
    tokens = tokens.gather(1, order)
    positions = positions.gather(1, order)
    is_answer = is_answer.gather(1, order)
    targets = tokens[:, 1:].masked_fill(~is_answer[:, 1:], -1)
    return tokens[:, :-1], targets, positions[:, :-1]

def answering(run, taught):
    """loss_at of a GPT that learns to answer the questions `taught`, numbers (n,): cross-entropy of
    the answer and its EOS, after [BOS] and the question.

    A share --question_noise of the questions is written as people type, as in phase 2. None is
    about a made-up subject: a share --made_up is lost to a T-JEPA's answers alone.
    """
    questions, cfg = run.questions, run.cfg
    answers = questions.answer_tokens[questions.answer_of[taught]]      # (n, L)
    answers = train.with_end(answers, run.corpus.tokenizer)             # (n, L+1)
    draw = questions.drawing(taught, cfg.qa_batch_size // cfg.accum, cfg.question_noise)

    def loss_at(progress):
        """Loss of the answers to random questions."""
        which, asked = draw()
        tokens, targets, positions = lesson(run.model, asked, answers[which])
        _, loss = run.model(tokens, targets, positions)
        return loss, dict(token=loss.detach())
    return loss_at

def teach_gpt(run, taught, lr):
    """Teach a GPT the answers of questions `taught`, for the steps of phases 2 and 3."""
    steps = run.cfg.distill_steps + run.cfg.speak_steps
    cfg = dataclasses.replace(run.cfg, speak_steps=steps, speak_lr=lr)
    fit(run._replace(cfg=cfg), "speak", answering(run, taught))

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

def matches(questions, said):
    """Which of n answers (strings) are right: bool (n,)."""
    equal = [answer == row.answer for answer, row in zip(said, questions.rows, strict=True)]
    return torch.tensor(equal, device=questions.tokens.device)

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
        # (B, K), 0 in surplus slots
        surprise = F.cross_entropy(logits.mT, p.word_ids, reduction="none")
        total = surprise.sum(1)
        return total / (p.word_ids >= 0).sum(1) if self.mean else total
