"""The cloze lab: each arm does what its name says, and all that it is not named for is the default's."""
import copy
import dataclasses
import json

import pytest
import torch

import data
import tjepa
import train
from labs import cloze, pretraining
from labs.cloze import ARMS, DEFAULT, Config
from labs.controls import MASKED_LM

SMALL = dict(n_embd=32, n_layer=3, n_head=2, pred_embd=16, top_k=2, batch_size=4, dtype="fp32", device="cpu")


@pytest.fixture(scope="module", autouse=True)
def corpus():
    """The facts, read once for all tests here."""
    patch, facts = pytest.MonkeyPatch(), data.load(Config())
    patch.setattr(data, "load", lambda cfg, tokenizer=None: facts)
    yield facts
    patch.undo()

def opened(tmp_path, **changes):
    """A small run of an arm before its first step."""
    return pretraining.open_arm(Config(**SMALL | changes, out=str(tmp_path)))[0]

def loss(run, seed=3, progress=0.0):
    """The loss of one step of an arm, and what it reports."""
    torch.manual_seed(seed)
    return cloze.changed(run)(progress)


@pytest.mark.parametrize("masks", [1, 2])
def test_without_a_change_a_step_is_that_of_train_py(tmp_path, masks):
    run, loss_at = pretraining.open_arm(Config(**SMALL, masks=masks, out=str(tmp_path)))
    torch.manual_seed(3)
    theirs, stats = loss_at(0.0)
    ours, same = loss(run)
    assert torch.equal(ours, theirs) and stats.keys() == same.keys()


def test_a_step_of_two_targets_has_the_mean_loss_of_both(tmp_path):
    span, token, both = (loss(opened(tmp_path, **change))[1]["latent"] for change in (
        dict(targets="span"), dict(targets="token"), dict(targets="span+token")))
    assert both == pytest.approx((span + token) / 2) and span != token
    run = opened(tmp_path, targets="span+token")
    loss(run)
    assert run.model.cfg.target == "span"           # what energies are asked by


@pytest.mark.parametrize("loss_of", [cloze.changed, lambda run: train.pretrain(run)[0]])     # the lab's and train.py's
def test_two_masks_hide_different_words_of_the_same_rows(tmp_path, monkeypatch, loss_of):
    seen, real = [], tjepa.TJEPA.pretrain_loss
    def spy(self, tokens, spans):
        seen.append((tokens, spans, real(self, tokens, spans)))
        return seen[-1][2]
    monkeypatch.setattr(tjepa.TJEPA, "pretrain_loss", spy)
    total, stats = loss_of(opened(tmp_path, masks=2))(0.0)
    (rows, first, one), (same, second, two) = seen
    assert torch.equal(rows, same) and not torch.equal(first, second)
    assert total.item() == pytest.approx((one[0] + two[0]).item() / 2)
    assert stats["mlm"].item() == pytest.approx((one[1]["mlm"] + two[1]["mlm"]).item() / 2)


def test_blocks_lie_on_a_grid_and_hide_as_much_as_spans_do(tmp_path, monkeypatch):
    run = opened(tmp_path)
    tokens, cfg = run.corpus.train.batch(64), run.model.cfg
    tokens[:16, 7:] = cfg.pad
    torch.manual_seed(3)
    every = torch.ones_like(run.model.word_start)
    blocks, again = (cloze.sample_blocks(tokens, 3, every, cfg) for _ in range(2))
    spans = tjepa.sample_spans(tokens, run.model.word_start, cfg)
    hidden = blocks < cfg.max_spans
    assert torch.equal(hidden.sum(1), (spans < cfg.max_spans).sum(1)) and not (hidden & (tokens == cfg.pad)).any()
    assert not torch.equal(blocks, again)
    assert set(blocks[:16].unique().tolist()) == {0, 1, cfg.max_spans}      # of 7 tokens two go: of one block, or of two
    for row, gone in zip(blocks, hidden):
        for block in row[gone].unique():
            at = (row == block).nonzero().flatten()
            assert len((at // 3).unique()) == 1             # a block is one cell of the grid ...
        cells = (gone.nonzero().flatten() // 3).bincount()
        assert (cells[cells > 0] < 3).sum() <= 2            # ... whole, but for the last one and the end of a text
    begins = run.model.word_start[tokens.roll(-1, 1)] | (tokens.roll(-1, 1) == cfg.pad)
    last = hidden & ~hidden.roll(-1, 1)
    assert (~begins[:, :-1] & last[:, :-1]).any()           # words are cut
    drawn = []
    monkeypatch.setattr(cloze, "sample_blocks", lambda *given: drawn.append(given) or blocks[:4])
    for whole in False, True:
        loss(opened(tmp_path, block=3, whole=whole))
    assert [given[1] for given in drawn] == [3, 3]
    assert torch.equal(drawn[0][2], every) and torch.equal(drawn[1][2], run.model.word_start)


def test_blocks_of_whole_words_cut_one_word_at_most(tmp_path):
    run = opened(tmp_path)
    tokens, cfg, starts = run.corpus.train.batch(64), run.model.cfg, run.model.word_start
    blocks = cloze.sample_blocks(tokens, 3, starts, cfg)
    hidden = blocks < cfg.max_spans
    inside = ~(starts[tokens] | (tokens == cfg.pad))[:, 1:]     # no word begins here: the two tokens are of one word
    cut = inside & (hidden[:, 1:] != hidden[:, :-1])
    assert (cut.sum(1) <= 1).all() and torch.equal(hidden.sum(1), (tokens != cfg.pad).sum(1).mul(0.35).round().long())
    assert (blocks[:, 1:] == blocks[:, :-1])[inside & hidden[:, 1:] & hidden[:, :-1]].all()     # in one block, too
    begins = [(row == block).nonzero()[0].item() for row, gone in zip(blocks, hidden) for block in row[gone].unique()]
    assert len({begin % 3 for begin in begins}) == 3            # the grid bends to the words


def test_a_field_moves_on_a_line_to_its_end_and_tau_with_it(tmp_path):
    run = opened(tmp_path, ema_half_life=25, ends=dict(sigreg=0.0, ema_half_life=400))
    step = cloze.changed(run)
    for progress, pull, half_life in (0.0, 1.0, 25), (0.5, 0.5, 212.5), (1.0, 0.0, 400):
        step(progress)
        assert (run.model.cfg.sigreg, run.cfg.ema_half_life) == (pull, half_life)
        assert run.cfg.tau == pytest.approx(0.5 ** (1 / half_life))


def test_a_lower_target_has_not_read_the_layers_above(tmp_path):
    run = opened(tmp_path, lower=2)
    tokens = run.corpus.train.batch(4)
    whole = run.model.encode(tokens)
    cloze.lower_target(run.model, 2)
    low = run.model.encode(tokens)
    with torch.no_grad():
        run.model.target.blocks[2].mlp[2].weight.add_(1.0)
    assert torch.equal(run.model.encode(tokens), low) and not torch.allclose(low, whole)
    torch.manual_seed(0)
    spans = tjepa.sample_spans(tokens, run.model.word_start, run.model.cfg)
    target = run.model.predict(tokens, spans).target
    with torch.no_grad():
        run.model.target.blocks[2].mlp[2].weight.add_(1.0)
    assert torch.equal(run.model.predict(tokens, spans).target, target)         # what the loss pulls to
    with torch.no_grad():
        run.model.target.blocks[1].mlp[2].weight.add_(1.0)
    assert not torch.allclose(run.model.encode(tokens), low)
    assert len(run.model.target.blocks) == 3            # the average of weights needs all of them


def test_an_angle_does_not_see_how_long_a_guess_is_and_the_distance_does(tmp_path, monkeypatch):
    run, real = opened(tmp_path), tjepa.TJEPA.predict
    tokens = run.corpus.val.batch(8)
    spans = torch.where(torch.arange(64) // 4 == 1, 0, run.model.cfg.max_spans).expand(8, 64)
    by = dict(angle=cloze.Angle(run.model), distance=run.model)
    before = {name: model.energy(tokens, spans) for name, model in by.items()}
    p = run.model.predict(tokens, spans, 4)
    cosine = (p.spans[:, 0] * p.target[:, 0]).sum(1) / p.spans[:, 0].norm(dim=1) / p.target[:, 0].norm(dim=1)
    assert torch.allclose(before["angle"], 1 - cosine, atol=1e-5)

    def longer(model, *asked):
        p = real(model, *asked)
        return p._replace(spans=3 * p.spans)
    monkeypatch.setattr(tjepa.TJEPA, "predict", longer)
    after = {name: model.energy(tokens, spans) for name, model in by.items()}
    assert torch.allclose(after["angle"], before["angle"], atol=1e-5)
    assert not torch.allclose(after["distance"], before["distance"], atol=1e-2)


class ByLength:
    """A model whose energies say nothing but how long a gap is."""
    def __init__(self, run):
        self.cfg, self.word_start, self.seen = run.model.cfg, run.model.word_start, []

    def energy(self, tokens, spans):
        """(B,): 3 for each token of the gap."""
        self.seen.append((tokens, spans < self.cfg.max_spans))
        return 3.0 * self.seen[-1][1].sum(1)


def test_a_calibrated_energy_is_1_where_a_gap_fits_as_well_as_others_of_its_length(tmp_path):
    run = opened(tmp_path)
    model = ByLength(run)
    calibrated = cloze.Calibrated(run._replace(model=model))
    tokens, spans = run.corpus.val.batch(3), torch.full((3, 64), run.model.cfg.max_spans)
    for row, n in enumerate((1, 2, 5)):
        spans[row, 3:3 + n] = 0
    assert model.energy(tokens, spans).tolist() == [3, 6, 15]
    assert calibrated.energy(tokens, spans).tolist() == [1, 1, 1]
    assert calibrated.energy(tokens, spans).tolist() == [1, 1, 1] and len(model.seen) == 1 + 3 + 2     # looked up once


def test_what_is_usual_is_asked_of_the_text_that_was_read_with_gaps_of_whole_words(tmp_path, monkeypatch):
    run, drawn, batch = opened(tmp_path), [], data.Text.batch
    monkeypatch.setattr(data.Text, "batch", lambda text, n: drawn.append(text) or batch(text, n))
    model = ByLength(run)
    calibrated = cloze.Calibrated(run._replace(model=model))
    assert len(drawn) == 1 and drawn[0] is run.corpus.train     # held-out text is the cloze's own statements
    for n in (1, 3, 14):
        assert calibrated.usual(n) == 3 * n
        tokens, gap = model.seen[-1]
        assert (gap.sum(1) == n).all() and (tokens[gap] != model.cfg.pad).all() and len(tokens) > 100
        after = torch.cat((tokens, torch.full_like(tokens[:, :1], model.cfg.pad)), dim=1)
        first = gap.int().argmax(1, keepdim=True)
        for place in first, first + n:                              # where it begins, and what stands behind it
            words = after.gather(1, place).flatten()
            assert (model.word_start[words] | (words == model.cfg.pad)).all()
        assert (gap.int().diff().abs().sum(1) <= 2).all() and len(first.unique()) > 10      # in one piece, anywhere


def test_an_arm_changes_what_it_is_named_for_and_nothing_else(tmp_path):
    for name, cfg in ARMS.items():
        other = {field for field, value in dataclasses.asdict(cfg).items() if value != getattr(DEFAULT, field)}
        assert other == set(cloze.CHANGES[name]) - ({"mlm"} if "masked LM of" in name else set()), name
        assert not other & {"pretrain_steps", "pretrain_lr", "batch_size", "n_embd", "n_layer", "mlm"} or name == (
            "a quarter of the masked LM"), name
    control, way = (ARMS[name] for name in ("masked LM of two masks", "two masks"))
    assert control == dataclasses.replace(way, **MASKED_LM)
    assert len({json.dumps(change) for change in cloze.CHANGES.values()}) == len(ARMS)
    for name, arm in ("default", DEFAULT), ("masked LM", dataclasses.replace(control, masks=1)):
        facts = dict(arm=f"facts {name} lr=0.002", lr=2e-3, dev_4=0.5)
        theirs = dataclasses.asdict(pretraining.finals({"facts": {}}, [name], ["7M"], [facts])[f"facts 7M {name}"])
        ours = {field: value for field, value in dataclasses.asdict(arm).items() if field in theirs}
        assert ours | dict(eval_every=0) == theirs | dict(eval_every=0)     # labs.pretraining's, but for when it looks


def test_an_arm_from_its_first_step_to_its_row_which_says_what_was_asked_for(tmp_path, monkeypatch):
    cfg = Config(**SMALL, out=str(tmp_path), stride=25, pretrain_steps=2, read="1", ends=dict(sigreg=0.0), lower=1)
    before, pulls, real = copy.deepcopy(cfg), [], tjepa.TJEPA.pretrain_loss
    monkeypatch.setattr(tjepa.TJEPA, "pretrain_loss",
                        lambda model, *batch: pulls.append(model.cfg.sigreg) or real(model, *batch))
    lowered, lower = [], cloze.lower_target
    monkeypatch.setattr(cloze, "lower_target", lambda model, n: lowered.append(n) or lower(model, n))
    row = cloze.measure(cfg)
    assert lowered == [1] and cfg == before and pulls == [1.0, 0.5]    # the arm that is written down has not moved
    assert set(cloze.COLUMNS.values()) <= row.keys() and json.dumps(row)


def test_a_masked_lm_is_judged_by_its_words_alone(tmp_path):
    row = cloze.judge(opened(tmp_path, **MASKED_LM, stride=25, read="1"))
    assert "cloze_all" in row and not [name for name in row if "angle" in name or "calibrated" in name]
    assert "cloze_tokens_all" not in row            # of a masked LM that is a sum, and the column is of means


def test_seeds_by_which_ways_were_picked_stand_apart_and_controls_keep_their_own_words():
    figures = dict(cloze_all=0.9, cloze_tokens_all=0.8)
    theirs = [dict(arm=f"facts 7M {arm}", seed=seed) | figures for arm in ("masked LM", "default", "GPT")
              for seed in (0, 1)]
    assert cloze.CONTROLS.keys() <= pretraining.finals(
        {"facts": {}}, ["masked LM", "default"], ["7M"],
        [dict(arm=f"facts {arm} lr=0.002", lr=2e-3, dev_4=0.5) for arm in ("masked LM", "default")]).keys()
    rows = cloze.beside(theirs) + [dict(arm="InfoNCE", seed=0) | figures, dict(arm="InfoNCE", seed=2, cloze_all=0.7)]
    first, others = cloze.tables(rows).split("Other seeds")
    assert "| InfoNCE | 0.900 (1 seed)" in first and "| InfoNCE | 0.700 (1 seed)" in others
    for text in (first, others):
        masked, = [line for line in text.splitlines() if line.startswith("| masked LM, of labs.pretraining")]
        assert "0.900 (1 seed)" in masked and "0.800" not in masked and "GPT" not in text
        assert "| default, of labs.pretraining | 0.900 (1 seed)" in text and "0.800 (1 seed)" in text
    assert "All seeds" not in others            # no arm has three
    together = cloze.tables(rows + [dict(arm="InfoNCE", seed=1, cloze_all=0.8)]).split("All seeds")[1]
    assert "| InfoNCE | 0.800 ± 0.100 |" in together and "labs.pretraining" not in together
