"""The model, one property a test. Each test fails when the property in its name is broken."""
import math

import pytest
import torch
from torch.nn import functional as F

import tjepa
import train
from tests.toy import BREAKS_GRAPHS, EOS, PAD, SMALL, WORDS, loss_of, make, rows, spans_of


@pytest.fixture
def model():
    """A small model with the default objective."""
    return make()


# -- masking ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("start, removed", [
    (2, [1, 2, 3]),                         # as drawn: the start moves back to the word's start
    (0, [0, 1, 2]),                         # the stop moves on to the word's end
])
def test_the_drawn_example_of_sample_spans_comes_out_as_drawn(monkeypatch, start, removed):
    """the | c | at | sat | on | the | m | at: a span of two tokens grows to whole words."""
    cfg = tjepa.Config(**SMALL | dict(block_size=8))
    begins, inside = 0, 1                                   # token ids
    word_start = torch.tensor([True, False])
    tokens = torch.tensor([[begins, begins, inside, begins, begins, begins, begins, inside]])
    length_2 = math.log(2) / math.log(cfg.max_span)
    draws = iter(([[(start + 0.5) / 8, 0.9]], [[length_2, 0.5]]))       # of two spans
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(next(draws)))
    spans = tjepa.sample_spans(tokens, word_start, cfg)
    assert spans.tolist() == [[0 if t in removed else cfg.max_spans for t in range(8)]]


def test_each_row_loses_the_same_share_and_no_padding(model):
    """Rows with equal budgets make shapes static; removed padding would be a trivial target."""
    tokens = rows(17, pad=2)                # the last row is padding alone
    removed = spans_of(model, tokens) < model.cfg.max_spans
    lengths = (tokens != PAD).sum(1)
    assert torch.equal(removed.sum(1), (lengths * model.cfg.mask_ratio).round().long())
    assert not removed[tokens == PAD].any()


def test_spans_are_whole_words_but_for_the_last_one(model):
    """A span that starts or stops inside a word tells the encoder half of that word."""
    tokens = rows(64)
    spans = spans_of(model, tokens)
    inside_word = ~model.word_start[tokens]
    cut = (spans[:, 1:] != spans[:, :-1]) & inside_word[:, 1:]
    assert cut.sum() <= len(tokens)         # at most one a row: where the budget ends


def test_context_and_removed_tokens_are_a_partition(model):
    """Each token is either read or predicted: none is lost, none is both."""
    tokens = rows(pad=1)
    span_ids = spans_of(model, tokens)
    n_removed = round(32 * model.cfg.mask_ratio)
    spans = tjepa.split_spans(span_ids, tokens, n_removed, model.cfg)
    assert torch.equal(spans.positions.sort(1).values, torch.arange(32).expand(8, -1))
    assert torch.equal(spans.tokens, tokens.gather(1, spans.positions))
    kept, positions, mask = spans.context_tokens()
    removed = span_ids < model.cfg.max_spans
    assert not removed.gather(1, positions).any()
    assert torch.equal(mask, kept != PAD)


def test_removed_tokens_cannot_leak(model):
    """Change every removed token: context and prediction must stay, the target must move."""
    tokens = rows()
    spans = spans_of(model, tokens)
    changed = torch.where(spans < model.cfg.max_spans, (tokens + 7) % WORDS, tokens)
    a = model.predict(tokens, spans)
    b = model.predict(changed, spans)
    assert torch.equal(a.predicted, b.predicted)
    assert torch.equal(a.context, b.context)
    assert torch.equal(a.states, b.states)
    assert not torch.allclose(a.target, b.target)


def test_the_predictor_knows_which_position_is_asked_for(model):
    """The same context and another query position: another prediction."""
    context, positions = torch.randn(1, 5, 32), torch.arange(5)[None]
    real = torch.ones(1, 6).bool()
    at_7 = model.predictor(context, F.pad(positions, (0, 1), value=7), real)
    at_20 = model.predictor(context, F.pad(positions, (0, 1), value=20), real)
    assert not torch.allclose(at_7, at_20)


def test_a_span_target_is_the_mean_of_its_tokens():
    """Computed token by token: section 3.1 defines the target of a span as this mean."""
    model = make(target="span", target_norm=False)
    tokens = rows(2)
    spans = spans_of(model, tokens)
    target, latents = model.predict(tokens, spans).target, model.encode(tokens)
    for row in range(2):
        for span in set(spans[row].tolist()) - {model.cfg.max_spans}:
            mean = latents[row, spans[row] == span].mean(0)
            torch.testing.assert_close(target[row, span], mean)


def test_a_token_target_is_the_latent_of_that_token():
    """target=token: no mean, so each removed token keeps a target of its own."""
    model = make(target="token", target_norm=False)
    tokens = rows(2)
    spans = spans_of(model, tokens)
    found = model.predict(tokens, spans)
    removed = spans < model.cfg.max_spans
    torch.testing.assert_close(found.target[found.span_mask], model.encode(tokens)[removed])


def test_context_is_the_last_layer_and_target_the_mean_of_the_last_top_k():
    """Two readings of one architecture: mixed up, the loss still falls."""
    model = make(n_layer=3, top_k=2, target_norm=False)
    context_layers, target_layers = [], []
    for encoder, layers in ((model.context_encoder, context_layers),
                            (model.target_encoder, target_layers)):
        for block in encoder.blocks:
            block.register_forward_hook(lambda *args, layers=layers: layers.append(args[-1]))
    tokens = rows(2)
    found = model.predict(tokens, spans_of(model, tokens))
    torch.testing.assert_close(found.context, tjepa.norm(context_layers[-1]))

    target_layers.clear()
    latents = model.encode(tokens)
    mean = (tjepa.norm(target_layers[1]) + tjepa.norm(target_layers[2])) / 2
    torch.testing.assert_close(latents, mean)


@pytest.mark.parametrize("n_layer", [1, 3])
def test_top_k_0_means_the_embedding_and_all_layers_at_any_depth(n_layer):
    """The default: no flag must follow from another."""
    model, tokens = make(n_layer=n_layer, top_k=0), rows(2)
    layers = [model.cfg.embed_scale * model.target_encoder.embed(tokens)]
    for block in model.target_encoder.blocks:
        block.register_forward_hook(lambda *args: layers.append(args[-1]))
    latents = model.encode(tokens)
    torch.testing.assert_close(latents, torch.stack([tjepa.norm(x) for x in layers]).mean(0))


def test_latents_and_words_have_separate_output_maps(model):
    """With one map for both losses the latents lose rank."""
    tokens = rows()
    p = model.predict(tokens, spans_of(model, tokens))
    maps = model.predictor.latent_proj.weight, model.predictor.word_proj.weight
    latent_loss, word_loss = p.predicted.square().sum(), model.word_loss(p)
    to_latent, to_word = torch.autograd.grad(
        latent_loss, maps, retain_graph=True, allow_unused=True)
    assert to_latent.abs().sum() > 0 and to_word is None
    to_latent, to_word = torch.autograd.grad(word_loss, maps, allow_unused=True)
    assert to_latent is None and to_word.abs().sum() > 0


# -- the target encoder ----------------------------------------------------------------------------
def test_the_target_starts_as_an_exact_copy(model):
    """Equal values in memory of their own: shared memory would be no target network at all."""
    pairs = zip(model.context_encoder.parameters(), model.target_encoder.parameters(), strict=True)
    for context, target in pairs:
        assert torch.equal(context, target) and context.data_ptr() != target.data_ptr()


def test_the_target_gets_no_gradient(model):
    """The stop-gradient of JEPA: targets must not move towards predictions."""
    tokens = rows()
    model.pretrain_loss(tokens, spans_of(model, tokens))[0].backward()
    for p in model.target_encoder.parameters():
        assert p.grad is None and not p.requires_grad


def test_without_stop_gradient_the_targets_are_trained_too():
    """The same loss value, but another gradient: the targets' own part is added."""
    tokens, losses, gradients = rows(), [], []
    for stop_gradient in (True, False):
        model = make(stop_gradient=stop_gradient, sigreg=0.0)
        spans = spans_of(model, tokens)
        assert model.predict(tokens, spans).target.requires_grad is not stop_gradient
        loss, _ = model.pretrain_loss(tokens, spans)
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.context_encoder.embed.weight.grad)
    assert losses[0] == losses[1] and not torch.allclose(*gradients)


def test_ema_half_life_is_the_number_of_steps_until_half_is_new():
    """After half_life updates towards zero, half of the old target is left."""
    model = make(ema_half_life=20)
    with torch.no_grad():
        for p in model.target_encoder.parameters():
            p.fill_(1.0)
        for p in model.context_encoder.parameters():
            p.fill_(0.0)
    for _ in range(20):
        model.ema_update()
    for p in model.target_encoder.parameters():
        torch.testing.assert_close(p, torch.full_like(p, 0.5))


@pytest.mark.parametrize("half_life, copies", [(math.inf, False), (0, True)])
def test_half_life_inf_freezes_the_target_and_0_copies(half_life, copies):
    """The two ends of the EMA, both used as controls."""
    model = make(ema_half_life=half_life)
    before = model.target_encoder.embed.weight.clone()
    with torch.no_grad():
        model.context_encoder.embed.weight.add_(1)
    model.ema_update()
    expected = model.context_encoder.embed.weight if copies else before
    assert torch.equal(model.target_encoder.embed.weight, expected)


def test_latents_are_compared_in_fp32():
    """Autocast would round the means of spans to eight bits."""
    model, tokens = make(target="span", target_norm=False), rows()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.predict(tokens, spans_of(model, tokens))
    for latents in (found.predicted, found.target):
        assert latents.dtype == torch.float32
        assert not torch.equal(latents, latents.bfloat16().float())


# -- gradients and parameters ----------------------------------------------------------------------
@pytest.mark.parametrize("phase", train.PHASES)
@pytest.mark.parametrize("changes", [{}, dict(memory="tokens", teacher_width=20)])
def test_every_trained_parameter_gets_a_gradient_and_is_in_the_optimizer(phase, changes):
    """A parameter that is forgotten is a bug that no loss curve shows."""
    model = make(**changes)
    loss_of(model, phase).backward()
    parts = model.trained_in(phase)
    named = [(name, p) for part in parts for name, p in part.named_parameters()]
    without = {name for name, p in named if p.grad is None or not p.grad.any()}
    # phase 2 predicts a latent, so the map to words rests
    assert without == ({"word_proj.weight", "word_proj.bias"} if phase == "distill" else set())
    groups = train.parameter_groups(parts, 0.1)
    in_groups = [id(p) for group in groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for _, p in named)


def test_weight_decay_is_for_matrices_alone(model):
    """Decay would pull norms, biases, embeddings and the mask token to zero."""
    decayed, others = train.parameter_groups([model.context_encoder, model.predictor], 0.1)
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert all(p.dim() == 2 for p in decayed["params"])
    embedding, mask_token = model.context_encoder.embed.weight, model.predictor.mask_token
    assert {id(embedding), id(mask_token)} <= {id(p) for p in others["params"]}
    assert id(embedding) not in {id(p) for p in decayed["params"]}


def test_threads_do_not_change_a_gradient(monkeypatch):
    """SIGReg samples 512 tokens, some of them repeatedly: their gradients must add up in one
    order, or no run could be repeated. A plain sum replaces SIGReg, whose own threads would hide
    a change of the order."""
    direction = torch.randn(512, 128)
    monkeypatch.setattr(tjepa.SIGReg, "forward", lambda self, z: (z * direction).sum())
    model, tokens = make(n_embd=128, n_layer=1, top_k=1), rows(16)
    tokens[:, 8:] = PAD                     # so few tokens are left that many are drawn often
    spans = spans_of(model, tokens)
    threads, gradients = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            torch.manual_seed(0)
            model.zero_grad()
            model.regularise(model.predict(tokens, spans)).backward()
            gradients.append(model.context_encoder.embed.weight.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert gradients[0].any()
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize("changes", [{}, dict(target="span"), dict(stop_gradient=False)])
def test_masks_of_one_text_share_the_pass_of_the_target(changes):
    """--masks=3: one pass over the text gives what three would. Rows end in padding, too."""
    model, tokens = make(**changes), rows(4, 16)
    tokens[1, 11:] = PAD
    each = tokens.repeat_interleave(3, 0)
    spans = spans_of(model, each)
    read = []
    encoder = model.target_encoder if model.cfg.stop_gradient else model.context_encoder
    encoder.register_forward_hook(lambda module, args, latents: read.append(len(args[0])))
    shared, apart = model.predict(tokens, spans), model.predict(each, spans)
    assert read[0] == 4 and 12 in read
    torch.testing.assert_close(shared.target, apart.target)
    assert torch.equal(shared.predicted, apart.predicted)


@pytest.mark.skipif(BREAKS_GRAPHS, reason=train.no_graphs())
@pytest.mark.parametrize("changes", [
    {}, dict(mlm=0.0), dict(target="span", loss="mse"), dict(stop_gradient=False, sigreg=0.0),
    dict(top_k=1, target_norm=False), dict(embed_scale=1.0, pred_layer=2)])
def test_phase_1_compiles_without_a_graph_break(changes):
    """--compile: a break would make a GPU wait. Masking and loss are one graph each."""
    model, tokens = make(**changes), rows(4, 16)
    spans = spans_of(model, tokens)

    def masking():
        return tjepa.sample_spans(tokens, model.word_start, model.cfg)

    def loss():
        return model.pretrain_loss(tokens, spans)

    for function in (masking, loss):
        torch._dynamo.reset()
        found = torch._dynamo.explain(function)()
        assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons


# -- attention -------------------------------------------------------------------------------------
def test_padding_changes_nothing(model):
    """Otherwise the latents of a text would depend on the texts beside it in the batch."""
    tokens = rows(4, 20)
    padded = F.pad(tokens, (0, 12), value=PAD)
    torch.testing.assert_close(model.encode(padded)[:, :20], model.encode(tokens))
    torch.testing.assert_close(model.think(padded).latent, model.think(tokens).latent)
    torch.testing.assert_close(model.concept(padded), model.concept(tokens))


def test_positions_are_relative(model):
    """A text moved along the positions keeps its latents: no target contains its position."""
    tokens = rows(2, 10)
    here = model.context_encoder(tokens, torch.arange(10))
    there = model.context_encoder(tokens, torch.arange(10) + 20)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


def test_the_last_block_of_the_predictor_may_compute_the_queries_alone():
    """n_last is cheaper, and equal to the last rows of the full result."""
    torch.manual_seed(0)
    block, x = tjepa.Block(32, 2), torch.randn(3, 9, 32)
    rope, mask = tjepa.rotary(9, 16), tjepa.additive(torch.rand(3, 9) < 0.7)
    whole = block(x, rope, mask)
    torch.testing.assert_close(block(x, rope, mask, n_last=4), whole[:, -4:])


# -- the decoder -----------------------------------------------------------------------------------
def test_future_tokens_cannot_leak(model):
    """Change the last token: no earlier state of the decoder may move."""
    memories = model.decoder.read(model.think(rows(2)))
    said = rows(2, 6)
    changed = said.clone()
    changed[:, -1] = (changed[:, -1] + 1) % WORDS
    a = model.decoder(said, memories)
    b = model.decoder(changed, memories)
    assert torch.equal(a[:, :-1], b[:, :-1]) and not torch.allclose(a[:, -1], b[:, -1])


@pytest.mark.parametrize("memory", ["thought", "tokens"])
def test_the_kv_cache_matches_the_full_forward(memory):
    """Speech reads token by token what training read at once."""
    model, said = make(memory=memory), rows(3, 7)
    memories = model.decoder.read(model.think(rows(3, pad=3)))
    caches = [tjepa.KVCache(7) for _ in model.decoder.blocks]
    steps = [model.decoder(said[:, t:t + 1], memories, caches) for t in range(7)]
    full = model.decoder(said, memories)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=1e-4)


def test_a_cached_call_with_more_than_one_token_is_refused(model):
    """With a cache no causal mask is applied: the first of two tokens would see the second."""
    memories = model.decoder.read(model.think(rows(1)))
    caches = [tjepa.KVCache(7) for _ in model.decoder.blocks]
    with pytest.raises(ValueError, match="one token at a time"):
        model.decoder(rows(1, 2), memories, caches)


@pytest.mark.parametrize("n_slots, constant", [(1, True), (4, False)])
def test_attention_over_a_single_slot_is_a_constant(n_slots, constant):
    """Softmax over one key is 1 for every query: this is why a thought has several slots."""
    model = make(n_slots=n_slots)
    cross = model.decoder.blocks[0].cross
    with torch.no_grad():                   # sharp attention, to tell the slots apart
        cross.q.weight.mul_(50)
    memory = cross.project(*model.decoder.memory_slots(model.think(rows(1))))
    torch.manual_seed(0)
    a, b = cross(torch.randn(1, 3, 32), memory), cross(torch.randn(1, 3, 32), memory)
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) == constant


def test_the_latent_head_reads_no_answer_token(model):
    """It is read at BOS: otherwise the latent could be copied from the words of the answer."""
    thought, latent, losses = model.think(rows(4)), torch.zeros(4, 32), []
    for seed in (0, 1):
        answer = rows(4, 6, seed)
        torch.manual_seed(0)
        losses.append(model.speak_loss(thought, answer, latent, alpha=1.0)[0])
    assert torch.equal(*losses)


def test_phase_2_drops_question_tokens_and_a_question_that_is_asked_keeps_them(monkeypatch):
    """question_drop is for the loss of phase 2 alone."""
    model, dropped = make(question_drop=0.3), []
    think = model.think

    def watched(tokens, drop=0.0):
        dropped.append(drop)
        return think(tokens, drop)
    monkeypatch.setattr(model, "think", watched)
    loss_of(model, "distill")
    model.think(rows())
    assert dropped == [0.3, 0.0]


def test_an_inexact_thought_leans_to_another_and_has_noise():
    """Equal thoughts get noise alone; of long ones, at most a share of `noise` is another row."""
    model = make(noise=0.3)
    torch.manual_seed(0)
    assert model.blur(torch.ones(200, 32)).sub(1).std().item() == pytest.approx(0.3, rel=0.05)
    mixed = model.blur(1e6 * torch.eye(64)) / 1e6
    own = mixed.diagonal()
    assert own.min() > 0.69 and own.mean().item() == pytest.approx(0.85, abs=0.03)
    torch.testing.assert_close(mixed.sum(1), torch.ones(64), atol=1e-3, rtol=0)
    exact = torch.randn(8, 32)
    assert torch.equal(make(noise=0.0).blur(exact), exact)


def test_speech_ends_at_eos_and_pads_after_it(model, monkeypatch):
    """A row that has ended says nothing more; when all have ended, generation stops."""
    script = iter(torch.tensor([[5, EOS], [EOS, 3], [7, 7]]))
    monkeypatch.setattr(tjepa, "sample_token", lambda *_: next(script))
    steps = list(model.speak(model.think(rows(2))))
    assert torch.stack(steps, dim=1).tolist() == [[5, EOS], [EOS, PAD]]


def test_sampling_keeps_to_its_candidates():
    """Greedy takes the best; top_k and top_p exclude the rest; neither: everything can come."""
    logits = torch.tensor([[4.0, 3.0, 2.0, -1.0]]).expand(500, -1)
    torch.manual_seed(0)
    assert set(tjepa.sample_token(logits).tolist()) == {0}
    assert set(tjepa.sample_token(logits, 1.0, top_k=2).tolist()) == {0, 1}
    assert set(tjepa.sample_token(logits, 1.0, top_p=0.7).tolist()) == {0, 1}
    assert set(tjepa.sample_token(logits, 1.0).tolist()) >= {0, 1, 2}
