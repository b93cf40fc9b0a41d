"""The model classes of labs/variants.py: what each changes, and what none may break."""
import math

import numpy as np
import pytest
import torch

import tjepa
import train
from labs import variants
from tests.toy import (
    BREAKS_GRAPHS, FLAGS, MASK, WORDS, answers, loss_of, make, rows, spans_of, write_corpus)

CLASSES = [kind for kind in vars(variants).values()
           if isinstance(kind, type) and issubclass(kind, tjepa.TJEPA) and kind is not tjepa.TJEPA]
BOTH = [kind for kind in CLASSES if issubclass(kind, variants.BothMemories)]
PER_TOKEN = [variants.Negatives, variants.Queue, variants.GrowingSpans]
LEARNED = [kind for kind in CLASSES if issubclass(kind, variants.LearnedPositions)]


def variant(kind, **changes):
    """A small model of a class, with the memory that the class is meant for."""
    if kind in BOTH:
        changes["memory"] = "tokens"
    if kind in PER_TOKEN:
        changes["target"] = "token"
    return make(kind, **changes)


# -- all classes -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", CLASSES)
def test_each_class_trains_a_step_of_each_phase(kind):
    """Gradients are finite, and the step moves every parameter that has one."""
    for phase in train.PHASES:
        model = variant(kind)
        loss_of(model, phase).backward()
        groups = train.parameter_groups(model.trained_in(phase), 0.1)
        trained = [p for group in groups for p in group["params"]]
        assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
        moved = [p for p in trained if p.grad is not None]
        before = [p.detach().clone() for p in moved]
        torch.optim.AdamW(groups, lr=1e-3).step()
        model.ema_update()
        assert moved and not any(torch.equal(p, old) for p, old in zip(moved, before))


@pytest.mark.parametrize("kind", CLASSES)
def test_removed_tokens_cannot_leak_in_any_class(kind):
    """A leak would make an ablation look good for the wrong reason."""
    model, tokens = variant(kind), rows()
    spans = spans_of(model, tokens)
    changed = torch.where(spans < model.cfg.max_spans, (tokens + 7) % WORDS, tokens)
    a, b = model.predict(tokens, spans), model.predict(changed, spans)
    assert torch.equal(a.predicted, b.predicted) and torch.equal(a.context, b.context)
    assert not torch.allclose(a.target, b.target)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_target_of_each_class_starts_as_a_copy(kind):
    """A class that replaces the encoder must replace both."""
    model = variant(kind)
    context, target = model.context_encoder.state_dict(), model.target_encoder.state_dict()
    assert context.keys() == target.keys()
    assert all(torch.equal(context[name], target[name]) for name in context)
    assert not any(p.requires_grad for p in model.target_encoder.parameters())


# -- initialisation and positions ------------------------------------------------------------------
def test_gpt2_init_has_a_std_of_02_at_any_width():
    """The default keeps the variance instead: its std falls with the root of the width."""
    for n_embd in (32, 128):
        gpt2 = make(variants.GPT2Init, n_embd=n_embd).context_encoder.blocks[0].attn.qkv.weight
        ours = make(n_embd=n_embd).context_encoder.blocks[0].attn.qkv.weight
        assert gpt2.std().item() == pytest.approx(0.02, rel=0.05)
        assert ours.std().item() == pytest.approx(n_embd ** -0.5, rel=0.05)


@pytest.mark.parametrize("kind", LEARNED)
def test_learned_positions_are_absolute(kind):
    """The same text elsewhere has other latents, so targets contain their position."""
    model, tokens = variant(kind), rows(2, 10)
    here = model.context_encoder(tokens, torch.arange(10))
    there = model.context_encoder(tokens, torch.arange(10) + 20)
    assert not torch.allclose(here, there, atol=0.05)


# -- objectives ------------------------------------------------------------------------------------
def test_smooth_l1_is_the_distance_of_data2vec():
    """By hand over the real spans: quadratic below an error of 1, linear above."""
    model, tokens = make(variants.SmoothL1), rows()
    spans = spans_of(model, tokens)
    p = model.predict(tokens, spans)
    error = (p.predicted - p.target)[p.span_mask].abs()
    by_hand = torch.where(error < 1, error ** 2 / 2, error - 0.5).mean()
    torch.testing.assert_close(model.pretrain_loss(tokens, spans)[1]["latent"], by_hand.detach())


def test_equal_words_are_no_negatives_and_the_queue_holds_earlier_ones():
    """By hand: each prediction against its own target and the targets of all other words."""
    for kind, steps in (variants.Negatives, 1), (variants.Queue, 2):
        model, tokens = variant(kind), rows(3)
        p = model.predict(tokens, spans_of(model, tokens))
        for _ in range(steps):
            loss = model.latent_loss(p)
        real, words = p.span_mask, p.word_ids[p.span_mask].repeat(steps)
        predicted, target = (torch.nn.functional.normalize(part[real], dim=-1)
                             for part in (p.predicted, p.target))
        similarity = predicted @ target.repeat(steps, 1).T / 0.1
        by_hand = []
        for i, row in enumerate(similarity):
            others = row[words != words[i]]
            by_hand.append(torch.logsumexp(torch.cat((row[i:i + 1], others)), 0) - row[i])
        torch.testing.assert_close(loss, torch.stack(by_hand).mean())
        assert len(model.earlier[0]) == min(model.stored, steps * len(target))


def test_the_best_of_four_hypotheses_counts():
    """If one of them equals the target, only the tenth of the first is left."""
    model, tokens = make(variants.Hypotheses), rows()
    p = model.predict(tokens, spans_of(model, tokens))
    first = tjepa.masked_mean(tjepa.latent_error(p.predicted, p.target, "mse"), p.span_mask, (0, 1))
    assert model.latent_loss(p) < 1.1 * first
    exact = p._replace(predicted=p.target)
    assert model.best_error(exact).abs().max() == 0 == model.latent_loss(exact)


def test_a_masked_lm_teaches_and_then_is_frozen():
    """For a quarter of phase 1 it learns alone; then it is the target, and the student learns."""
    model, tokens = make(variants.TaughtByMaskedLM), rows()
    spans = spans_of(model, tokens)
    for model.progress in 0.0, 0.24, 0.25, 0.5:
        model.zero_grad(set_to_none=True)
        model.pretrain_loss(tokens, spans)[0].backward()
        having = {name for name, part in model.named_children()
                  if any(p.grad is not None for p in part.parameters())}
        first = model.progress < 0.25
        assert ("teacher" in having) == first == ("context_encoder" not in having)
    model.ema_update()
    taught, target = (part.state_dict() for part in (
        model.teacher.context_encoder, model.target_encoder))
    assert all(torch.equal(taught[name], target[name]) for name in taught)


def test_spans_grow_to_the_longest():
    """At the start each removed run of tokens is one word, at the end as long as max_span says."""
    model, tokens = variant(variants.GrowingSpans), rows(32)
    seen = []
    predict = model.predict
    model.predict = lambda tokens, spans: seen.append(spans) or predict(tokens, spans)
    for model.progress in 0.0, 1.0:
        torch.manual_seed(0)
        model.pretrain_loss(tokens, spans_of(model, tokens))
    short, long = (spans < model.cfg.max_spans for spans in seen)
    assert short.sum() == long.sum()
    runs = [(removed[:, 1:] & ~removed[:, :-1]).sum() for removed in (short, long)]
    assert runs[0] > runs[1]
    torch.manual_seed(0)
    spans_of(model, tokens)
    whole = tjepa.sample_spans(tokens, model.word_start, model.cfg)
    assert torch.equal(long, whole < model.cfg.max_spans)


def test_a_frozen_target_does_not_follow_the_context_encoder():
    """After a step both differ, and the target is as it was drawn."""
    model = variant(variants.FrozenTarget)
    before = [p.clone() for p in model.target_encoder.parameters()]
    with torch.no_grad():
        for p in model.context_encoder.parameters():
            p.add_(1)
    model.ema_update()
    assert all(map(torch.equal, before, model.target_encoder.parameters()))


def test_vicreg_is_zero_only_for_a_spread_out_cloud():
    """A point and a line are the two collapses that it must punish."""
    torch.manual_seed(0)
    spread_out = 2 * torch.linalg.qr(torch.randn(512, 16))[0] * math.sqrt(512)
    line = torch.randn(512, 1).expand(-1, 16)
    assert variants.vicreg(spread_out) < 0.01
    assert variants.vicreg(torch.ones(512, 16)) > 0.9
    assert variants.vicreg(line) > 0.5


def test_the_vicreg_class_regularises_by_vicreg(monkeypatch):
    """Its value is logged as sigreg, so the log alone would not show a mix-up."""
    monkeypatch.setattr(variants, "vicreg", lambda z: z.new_tensor(7.0))
    model, tokens = make(variants.VICReg), rows()
    assert model.pretrain_loss(tokens, spans_of(model, tokens))[1]["sigreg"] == 7


@pytest.mark.parametrize("kind, gets_one", [(variants.NoPredictor, True),
                                            (variants.MaskedLM, False)])
def test_masked_lm_gives_the_latents_no_gradient(kind, gets_one):
    """The control learns from tokens alone; with latents it would be no control."""
    model, tokens = make(kind, stop_gradient=False), rows()
    spans = spans_of(model, tokens)
    p = model.predict(tokens, spans)
    model.predict = lambda *_: p
    loss, stats = model.pretrain_loss(tokens, spans)
    to_predicted, to_target, to_states = torch.autograd.grad(
        loss, (p.predicted, p.target, p.states), allow_unused=True)
    assert (to_predicted is not None) == (to_target is not None) == gets_one
    assert to_states.any()
    assert ("latent" in stats) == gets_one


# -- no predictor ----------------------------------------------------------------------------------
def test_without_a_predictor_the_encoder_reads_masks():
    """Each removed position holds [MASK]; the tokens that stay are read as they are."""
    model, tokens = make(variants.NoPredictor), rows(2)
    read = []
    model.context_encoder.embed.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    p = model.predict(tokens, spans_of(model, tokens))
    n_context = p.context.size(1)
    assert (read[0][:, n_context:] == MASK).all() and not (read[0][:, :n_context] == MASK).any()


@pytest.mark.skipif(BREAKS_GRAPHS, reason=train.no_graphs())
def test_phase_1_without_a_predictor_compiles_without_a_graph_break():
    """The speed of the ablation must be comparable under --compile."""
    model, tokens = make(variants.NoPredictor), rows(4, 16)
    spans = spans_of(model, tokens)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model.pretrain_loss)(tokens, spans)
    assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons


# -- both memories ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", BOTH)
def test_memory_drop_hides_token_latents_and_never_the_thought(kind):
    """Without its thought a row would be taught to speak from nothing."""
    model, n = variant(kind), 400
    thought = model.think(rows(8, 12, pad=1)).rows(torch.arange(n) % 8)
    masks = []
    slots = model.decoder.memory_slots

    def spy(thought):
        masks.append(slots(thought)[1])
        return slots(thought)
    model.decoder.memory_slots = spy
    torch.manual_seed(0)
    model.speak_loss(thought, answers(8)[torch.arange(n) % 8], torch.randn(n, 32), 0.5)
    read = masks[0][:, 0, 0] == 0           # the mask is added to the logits: 0 or -inf
    of_thought, of_tokens = read.split((model.cfg.n_slots, 12), dim=1)
    assert of_thought.all()
    hidden = ~of_tokens.any(1)
    assert torch.equal(of_tokens[~hidden], thought.context_mask[~hidden])
    assert hidden.float().mean().item() == pytest.approx(kind.memory_drop, abs=0.06)


def test_the_decoder_of_both_memories_reads_both():
    """Change the thought alone, then the token latents alone: each moves the decoder's states."""
    model, said = variant(variants.BothMemories), rows(2, 5)
    thought = model.think(rows(2, 12))

    def states(thought):
        return model.decoder(said, model.decoder.read(thought))
    other_latent = thought._replace(latent=thought.latent.flip(0))
    other_context = thought._replace(context=thought.context.flip(0))
    for other in (other_latent, other_context):
        assert not torch.allclose(states(thought), states(other))


def test_the_kv_cache_matches_the_full_forward_with_both_memories():
    """Padding of the question stays hidden in both ways of decoding."""
    model, said = variant(variants.BothMemories), rows(3, 7)
    memories = model.decoder.read(model.think(rows(3, pad=3)))
    caches = [tjepa.KVCache(8) for _ in model.decoder.blocks]
    steps = [model.decoder(said[:, t:t + 1], memories, caches) for t in range(7)]
    full = model.decoder(said, memories)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=1e-4)


# -- a whole run -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, changes", [
    (variants.Data2Vec, {}),
    (variants.VICReg, {}),
    (variants.BothDrop5, dict(memory="tokens")),
])
def test_a_run_takes_a_class(tmp_path, kind, changes):
    """train.run(cfg, model=Class) goes through all phases, evaluations included."""
    write_corpus(tmp_path)
    flags = FLAGS | dict(data=str(tmp_path / "text.txt"), qa=str(tmp_path / "qa.tsv"),
                         out=str(tmp_path / "run"), pretrain_steps=2, distill_steps=2,
                         speak_steps=2)
    figures = train.run(train.Config(**flags | changes), model=kind)
    assert np.isfinite([figures["loss"], figures["hit1"], figures["em_DEC"]]).all()
