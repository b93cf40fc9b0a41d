"""The model's promises, one test each. Every test fails when the property in its name is broken."""
import math

import pytest
import torch

import tjepa
import train
from tjepa import TJEPA, Config

SMALL = dict(vocab_size=60, block_size=32, n_layer=2, n_head=2, n_embd=32, pred_layer=1, pred_embd=16, dec_layer=2,
             answer_size=8, top_k=2)


@pytest.fixture
def model():
    return make()


def make(**changes):
    torch.manual_seed(0)
    return TJEPA(Config(**{**SMALL, **changes}), torch.arange(60) % 3 == 0)


def rows(n=8, length=32, seed=1, pad=0):
    """Random rows (n, length); row i ends in i * pad padding tokens."""
    torch.manual_seed(seed)
    tokens = torch.randint(50, (n, length))
    for i, row in enumerate(tokens):
        row[length - i * pad:] = 56
    return tokens


def spans_of(model, tokens, seed=2):
    torch.manual_seed(seed)
    return tjepa.sample_spans(tokens, model.word_start, model.cfg)


# -- masking ------------------------------------------------------------------------------------------------------------

def test_each_row_loses_the_same_share_and_no_padding(model):
    tokens = rows(pad=2)
    removed = spans_of(model, tokens) < model.cfg.max_spans
    lengths = (tokens != model.cfg.pad).sum(1)
    assert torch.equal(removed.sum(1), (lengths * model.cfg.mask_ratio).round().long())
    assert not removed[tokens == model.cfg.pad].any()


def test_spans_are_whole_words_but_for_the_last_one(model):
    """A span that starts or stops inside a word tells the encoder half of it."""
    tokens = rows(64)
    spans = spans_of(model, tokens)
    begins = model.word_start[tokens] | (torch.arange(32) == 0)
    cut = 0
    for row, starts in zip(spans, begins):
        for t in range(1, 32):
            cut += int(row[t] != row[t - 1] and not starts[t])
    assert cut <= len(tokens)           # at most the one that the budget cut short


def test_context_and_removed_tokens_are_a_partition(model):
    tokens = rows(pad=1)
    spans = spans_of(model, tokens)
    parts = tjepa.split_spans(spans, tokens, round(32 * model.cfg.mask_ratio), model.cfg)
    both = torch.cat((parts.context, parts.removed), dim=1).sort(1).values
    assert torch.equal(both, torch.arange(32).expand(8, -1))
    gone = spans < model.cfg.max_spans
    assert not gone.gather(1, parts.context).any()


@pytest.mark.parametrize("changes", [{}, dict(pred_layer=0), dict(positions="learned")])
def test_masked_tokens_cannot_leak(changes):
    """Change every removed token: what the online encoder and the predictor say must not move, the target must."""
    model, tokens = make(**changes), rows()
    spans = spans_of(model, tokens)
    changed = torch.where(spans < model.cfg.max_spans, (tokens + 7) % 50, tokens)
    a, b = model.predict(tokens, spans), model.predict(changed, spans)
    assert torch.equal(a.spans, b.spans) and torch.equal(a.context, b.context)
    assert not torch.allclose(a.target, b.target)


def test_the_predictor_is_told_where_but_not_what(model):
    """The same context and other query positions give other predictions: it knows what it is asked for."""
    context, at = torch.randn(1, 5, 32), torch.arange(5)[None]
    guesses = [model.predictor(context, at, torch.tensor([[place]]))[0] for place in (7, 20)]
    assert not torch.allclose(*guesses)


def test_span_target_is_the_mean_of_its_tokens():
    model = make(target_norm=False)
    tokens = rows(2)
    spans = spans_of(model, tokens)
    found, latents = model.predict(tokens, spans), model.encode(tokens)
    for row in range(2):
        for s in spans[row].unique():
            if s < model.cfg.max_spans:
                torch.testing.assert_close(found.target[row, s], latents[row, spans[row] == s].mean(0))


def test_token_target_gives_every_removed_token_its_own_latent():
    model = make(target="token", target_norm=False)
    tokens = rows(2)
    spans = spans_of(model, tokens)
    found, latents = model.predict(tokens, spans), model.encode(tokens)
    gone = spans < model.cfg.max_spans
    torch.testing.assert_close(found.target[found.weight], latents[gone])


def test_words_and_latents_leave_by_doors_of_their_own(model):
    """The masked-LM term of phase 1 must not pull at the map that makes latents, nor the latent term at that of words."""
    tokens = rows()
    prediction = model.predict(tokens, spans_of(model, tokens))
    leave, words = model.predictor.leave.weight, model.predictor.words.weight
    for output, moved, still in (prediction.spans, leave, words), (prediction.words, words, leave):
        grads = torch.autograd.grad(output.square().sum(), (moved, still), retain_graph=True, allow_unused=True)
        assert grads[0].abs().sum() > 0 and grads[1] is None


# -- the target encoder ---------------------------------------------------------------------------------------------------

def test_ema_starts_as_exact_copy(model):
    for a, b in zip(model.encoder.parameters(), model.target.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def test_target_gets_no_gradient(model):
    tokens = rows()
    model.pretrain_loss(tokens, spans_of(model, tokens))[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())


def test_threads_do_not_change_a_gradient_from_one_time_to_the_next(monkeypatch):
    """SIGReg looks at 512 tokens, some of them twice and thrice: their gradients are to be added in one order. A simpler
    pull stands for it here: threads that have just been busy with SIGReg's hardly ever change the order."""
    direction = torch.randn(512, 128)
    monkeypatch.setattr(tjepa, "sigreg", lambda z: (z * direction).sum())
    model, tokens, threads = make(n_embd=128, mlm=0.0, loss="none", n_layer=1, top_k=1), rows(16), torch.get_num_threads()
    tokens[:, 8:] = model.cfg.pad                           # so few are left that many are drawn often
    spans = spans_of(model, tokens)
    torch.set_num_threads(2)
    try:
        seen = []
        for _ in range(20):
            torch.manual_seed(0)
            model.zero_grad()
            model.pretrain_loss(tokens, spans)[0].backward()
            seen.append(model.encoder.embed.weight.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert seen[0].any() and all(torch.equal(grad, seen[0]) for grad in seen)


def test_without_stop_gradient_the_online_encoder_learns_to_be_easy():
    """The same loss, but the targets' own gradient reaches the encoder; with it, that of the predictions alone."""
    tokens, gradients = rows(), []
    for stop in True, False:
        model = make(stop_gradient=stop, sigreg=0.0)
        spans = spans_of(model, tokens)
        found = model.predict(tokens, spans)
        assert found.target.requires_grad is not stop
        torch.manual_seed(3)
        loss, _ = model.pretrain_loss(tokens, spans)
        loss.backward()
        gradients.append((loss.item(), model.encoder.embed.weight.grad.clone()))
    assert gradients[0][0] == gradients[1][0] and not torch.allclose(gradients[0][1], gradients[1][1])


def test_a_frozen_target_never_moves():
    model = make(ema_half_life=math.inf)
    before = model.target.embed.weight.clone()
    with torch.no_grad():
        model.encoder.embed.weight.add_(1)
    model.ema_update(model.cfg.tau)
    assert torch.equal(model.target.embed.weight, before)


def test_latents_are_compared_in_fp32():
    """Autocast would round span means to eight bits."""
    model, tokens = make(target_norm=False), rows()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.predict(tokens, spans_of(model, tokens))
    for latents in found.spans, found.target:
        assert latents.dtype == torch.float32 and not torch.equal(latents, latents.bfloat16().float())


def test_ema_half_life_is_what_the_flag_says():
    """After half_life updates towards a fixed online encoder, half of the old target is left."""
    model = make(ema_half_life=20)
    with torch.no_grad():
        for p in model.target.parameters():
            p.fill_(1.0)
        for p in model.encoder.parameters():
            p.fill_(0.0)
    for _ in range(20):
        model.ema_update(model.cfg.tau)
    for p in model.target.parameters():
        torch.testing.assert_close(p, torch.full_like(p, 0.5))


# -- training -------------------------------------------------------------------------------------------------------------

def one_step(model, phase):
    """Every loss of a phase once, with gradients, and the parts that it trains."""
    torch.manual_seed(0)
    tokens = rows()
    for part in model.children():
        part.requires_grad_(part in model.trained_in(phase))
    if phase == "pretrain":
        loss = model.pretrain_loss(tokens, spans_of(model, tokens))[0]
    elif phase == "distill":
        loss = model.distill_loss(tokens[:, :12], torch.randn(8, model.cfg.answer_width))[0]
    else:
        answer = torch.cat((tokens[:, :4], torch.full((8, 1), model.cfg.eos)), dim=1)
        with torch.no_grad():
            thought = model.think(tokens)
        loss = model.speak_loss(thought, answer, torch.randn(8, model.cfg.answer_width), 0.5)[0]
    loss.backward()
    return [(name, p) for part in model.trained_in(phase) for name, p in part.named_parameters()]


@pytest.mark.parametrize("phase", train.PHASES)
@pytest.mark.parametrize("changes", [{}, dict(memory="both", teacher_width=20)])
def test_every_trainable_parameter_moves(phase, changes):
    """A parameter without gradient, or outside the optimizer's groups, is a bug that no loss curve shows."""
    model = make(**changes)
    named = one_step(model, phase)
    still = {name for name, p in named if p.grad is None or not p.grad.abs().sum() > 0}
    # a thought is a latent: phase 2 asks for no word of it
    assert still == ({"words.weight", "words.bias"} if phase == "distill" else set())
    grouped = [id(p) for group in train.groups(model.trained_in(phase), 0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for _, p in named)


def test_decay_is_for_matrices_alone(model):
    decayed, free = train.groups([model.encoder, model.predictor], 0.1)
    assert all(p.dim() == 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    names = {id(p): name for name, p in model.named_parameters()}
    assert {"encoder.embed.weight", "predictor.query"} <= {names[id(p)] for p in free["params"]}
    assert free["weight_decay"] == 0


@pytest.mark.parametrize("changes", [{}, dict(mlm=0.0), dict(target="token", loss="infonce"), dict(pred_layer=0)])
def test_phase_1_compiles_without_a_graph_break(changes):
    """--compile: masking and loss are one graph each, whatever the objective; nothing in them waits for a GPU."""
    model, tokens = make(**changes), rows(4, 16)
    for act, given in (model.pretrain_loss, (tokens, spans_of(model, tokens))), (
            lambda tokens: tjepa.sample_spans(tokens, model.word_start, model.cfg), (tokens,)):
        torch._dynamo.reset()
        found = torch._dynamo.explain(act)(*given)
        assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons


# -- attention ------------------------------------------------------------------------------------------------------------

def test_padding_changes_nothing(model):
    tokens = rows(4, 20)
    padded = torch.nn.functional.pad(tokens, (0, 12), value=model.cfg.pad)
    torch.testing.assert_close(model.encode(padded)[:, :20], model.encode(tokens))
    torch.testing.assert_close(model.think(padded).latent, model.think(tokens).latent)
    torch.testing.assert_close(model.concept(padded), model.concept(tokens))


def test_positions_are_relative(model):
    """Rotary: a text moved along the positions keeps its latents, so position is no part of what is predicted."""
    tokens = rows(2, 10)
    torch.testing.assert_close(model.encoder(tokens, torch.arange(10)), model.encoder(tokens, torch.arange(10) + 20),
                               atol=1e-4, rtol=1e-4)


def test_learned_positions_are_absolute():
    """The ablation: the same text elsewhere has other latents."""
    model, tokens = make(positions="learned"), rows(2, 10)
    assert not torch.allclose(model.encoder(tokens, torch.arange(10)), model.encoder(tokens, torch.arange(10) + 20), atol=0.05)


def test_future_tokens_cannot_leak(model):
    """Change the last token: no earlier state of the decoder may move."""
    thought = model.think(rows(2))
    memory, mask = model.decoder.memory(thought)
    said = rows(2, 6)
    changed = said.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    a, b = model.decoder(said, memory, mask), model.decoder(changed, memory, mask)
    torch.testing.assert_close(a[:, :-1], b[:, :-1], atol=0, rtol=0)
    assert not torch.allclose(a[:, -1], b[:, -1])


@pytest.mark.parametrize("memory", ["thought", "tokens", "both"])
def test_kv_cache_matches_full_forward(memory):
    model = make(memory=memory)
    memory, mask = model.decoder.memory(model.think(rows(3, pad=3)))
    said, caches = rows(3, 7), [({}, {}) for _ in model.decoder.blocks]
    full = model.decoder(said, memory, mask)
    steps = [model.decoder(said[:, t:t + 1], memory, mask, caches) for t in range(7)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=1e-4)


def test_single_memory_slot_is_a_constant():
    """Softmax over one key is 1 whatever the query: one thought vector cannot be queried, four slots can."""
    for slots, constant in (1, True), (4, False):
        model = make(n_slots=slots)
        memory, mask = model.decoder.memory(model.think(rows(1)))
        cross = model.decoder.blocks[0].cross
        with torch.no_grad():       # loud queries, so that a difference between slots can be seen
            cross.qkv.weight.mul_(50)
        a, b = (cross(torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(seed)), memory=memory, mask=mask)
                for seed in (0, 1))
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) == constant


def test_speech_ends_at_eos_and_pads_after_it(model, monkeypatch):
    script = iter(torch.tensor([[5, 58], [58, 3], [7, 7]]))
    monkeypatch.setattr(tjepa, "pick", lambda *_: next(script))
    said = torch.stack(list(model.speak(model.think(rows(2)))), dim=1)
    assert said.tolist() == [[5, model.cfg.eos], [model.cfg.eos, model.cfg.pad]]     # and all have ended: it stops


def test_sampling_keeps_to_its_candidates():
    logits = torch.tensor([[4.0, 3.0, 2.0, -1.0]]).expand(500, -1)
    torch.manual_seed(0)
    assert set(tjepa.pick(logits).tolist()) == {0}
    assert set(tjepa.pick(logits, 1.0, top_k=2).tolist()) == {0, 1}
    assert set(tjepa.pick(logits, 1.0, top_p=0.7).tolist()) == {0, 1}
    assert set(tjepa.pick(logits, 1.0).tolist()) >= {0, 1, 2}


def test_latent_head_sees_no_answer(model):
    """The latent loss of phase 3 is the same whatever the answer's words are: it is read at BOS."""
    thought, latent = model.think(rows(4)), torch.zeros(4, 32)
    losses = []
    for seed in 0, 1:
        answer = rows(4, 6, seed)
        torch.manual_seed(0)
        losses.append(model.speak_loss(thought, answer, latent, 1.0)[0])
    assert torch.equal(*losses)


# -- energy -------------------------------------------------------------------------------------------------------------

def test_energy_is_the_prediction_error_of_the_span(model):
    """By hand: the predictor's guess for the hidden positions against the mean of what the target makes of them."""
    text = rows(1)
    spans = torch.full_like(text, model.cfg.max_spans)
    spans[0, 10:13] = 0
    seen = torch.tensor([[t for t in range(32) if not 10 <= t < 13]])
    guess = model.predictor(model.encoder(text.gather(1, seen), seen), seen, torch.tensor([[10, 11, 12]]))[0].mean(1)
    target = tjepa.norm(model.encode(text)[:, 10:13].mean(1))
    torch.testing.assert_close(model.energy(text, spans), ((guess - target) ** 2).mean(1))


def test_energy_moves_with_the_hidden_text_alone(model):
    """Another word in the gap: the guess stays, the energy does not. This is what makes a cloze of it."""
    texts = rows(1).repeat(5, 1)
    texts[:, 12] = torch.arange(5)
    spans = torch.full_like(texts, model.cfg.max_spans)
    spans[:, 12] = 0
    guesses = model.predict(texts, spans, 1).spans[:, 0]
    torch.testing.assert_close(guesses, guesses[:1].expand(5, -1))
    assert len(model.energy(texts, spans).unique()) == 5


# -- the collapse panel and the regularisers ------------------------------------------------------------------------------

def panel(z):
    return tjepa.latent_health(z, torch.ones(z.shape[:2], dtype=torch.bool))


def test_collapse_meter_fires_on_constants_and_on_position_only_latents():
    torch.manual_seed(0)
    position_only = torch.randn(1, 32, 64).expand(50, -1, -1)
    for dead in torch.ones(50, 32, 64), position_only:
        assert tjepa.health_word(panel(dead)) == "collapsed"
    assert panel(position_only)["pos"] > 0.99
    alive = panel(torch.randn(50, 32, 64))
    assert tjepa.health_word(alive) == "healthy" and alive["pos"] < 0.05


def test_rank_and_std_are_calibrated():
    """Known answers: an isotropic cloud fills its bound, 8 directions have rank 8, a common offset changes neither."""
    torch.manual_seed(0)
    cloud = torch.randn(64, 32, 64)
    found = panel(cloud + 40)
    assert 62 < found["rank"] <= found["bound"] == 64 and abs(found["std"] - 1) < 0.02
    assert found["cos"] > 0.99 and abs(found["cos_centred"]) < 0.01
    flat = torch.randn(64, 32, 8) @ torch.linalg.qr(torch.randn(64, 8))[0].T
    assert 7.5 < panel(flat)["rank"] < 8.1
    assert panel(cloud[:2, :4])["bound"] == 7


def test_sigreg_has_its_published_values():
    """A perfect Gaussian scores about 1.05 / N, a point 0.402, unit-norm vectors almost as much as a point."""
    torch.manual_seed(0)
    z = torch.randn(1024, 64)
    assert abs(1024 * tjepa.sigreg(z, 512) - 1.05) < 0.25
    assert abs(tjepa.sigreg(torch.zeros(256, 64)) - 0.402) < 0.01
    assert abs(tjepa.sigreg(tjepa.norm(torch.randn(1, 64)).expand(256, 64), 4096) - 1.06) < 0.1
    assert tjepa.sigreg(torch.nn.functional.normalize(z, dim=-1)) > 0.35


def test_vicreg_is_zero_only_for_a_spread_out_cloud():
    torch.manual_seed(0)
    assert tjepa.vicreg(2 * torch.linalg.qr(torch.randn(512, 16))[0] * math.sqrt(512)) < 0.01
    assert tjepa.vicreg(torch.ones(512, 16)) > 0.9
    assert tjepa.vicreg(torch.randn(512, 1).expand(-1, 16)) > 0.5


def test_r2_knows_the_average():
    torch.manual_seed(0)
    target, every = torch.randn(100, 8) + 3, torch.ones(100, dtype=torch.bool)
    r2 = lambda guess: tjepa.r_squared(guess, target, every)        # noqa: E731
    assert abs(r2(target.mean(0).expand(100, -1))) < 1e-5 and r2(target) == 1 and r2(torch.zeros(100, 8)) < -5


def test_infonce_prefers_its_own_target():
    torch.manual_seed(0)
    target, every = torch.randn(50, 16), torch.ones(50, dtype=torch.bool)
    own = tjepa.latent_distance(target, target, every, "infonce")
    assert own < 0.1 < tjepa.latent_distance(target.roll(1, 0), target, every, "infonce")


def test_a_block_whose_last_tokens_ask_says_what_it_says_of_them_when_all_do():
    """The predictor's last block is computed for the holes alone: cheaper, and the same."""
    torch.manual_seed(0)
    block, x = tjepa.Block(32, 2), torch.randn(3, 9, 32)
    rope, mask = tjepa.rotary(9, 16), torch.rand(3, 1, 1, 9) < 0.7
    whole = block(x, rope, mask=mask)
    torch.testing.assert_close(block(x, rope, mask=mask, last=4), whole[:, -4:])
    torch.testing.assert_close(block(x, rope, mask=mask, last=0), whole)
