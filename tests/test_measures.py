"""What labs measure of an encoder, on clouds and encoders whose figures are known beforehand."""
import math

import pytest
import torch
from torch.nn import functional as F

import tjepa
from labs import measures

CFG = dict(vocab_size=60, block_size=32, n_layer=2, n_head=2, n_embd=32, pred_layer=1, pred_embd=16, dec_layer=1,
           top_k=2)
PAD = 56


def cloud(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def rotation(width, seed=9):
    return torch.linalg.qr(cloud(width, width, seed))[0]


def rows(n=8, length=32, pad=0):
    """Random rows (n, length); row i ends in i * pad padding tokens."""
    tokens = torch.randint(50, (n, length), generator=torch.Generator().manual_seed(1))
    for i, row in enumerate(tokens):
        row[length - i * pad:] = PAD
    return tokens


# -- features ----------------------------------------------------------------------------------------------------------

def test_features_are_concepts_whatever_the_batch():
    torch.manual_seed(0)
    model, tokens = tjepa.TJEPA(tjepa.Config(**CFG), torch.ones(60, dtype=torch.bool)), rows(8, pad=3)
    found = measures.features(model, tokens, size=3)
    torch.testing.assert_close(found, model.concept(tokens))
    assert found.shape == (8, 32)


def test_features_of_anything_that_encodes_need_no_gradient():
    class Bag:
        cfg, encode = tjepa.Config(**CFG), torch.nn.Embedding(60, 5)
    found = measures.features(Bag(), rows(4, pad=3))
    assert found.shape == (4, 5) and not found.requires_grad


# -- probes ------------------------------------------------------------------------------------------------------------

def parts(x, y):
    return [(x[i], y[i]) for i in measures.split(len(x), 0)]


def test_split_is_a_partition_that_the_seed_decides():
    found = measures.split(101, 3)
    assert torch.cat(found).sort().values.tolist() == list(range(101)) and [len(i) for i in found] == [60, 20, 21]
    again, other = measures.split(101, 3), measures.split(101, 4)
    assert all(map(torch.equal, found, again)) and not torch.equal(found[2], other[2])


def test_ridge_recovers_a_planted_signal():
    """Half of the variance is signal, and the offset is no part of it."""
    x = cloud(4000, 16) * torch.logspace(-3, 3, 16) + 7
    signal = (x - 7) / torch.logspace(-3, 3, 16) @ cloud(16, 1, 1)[:, 0]
    assert measures.ridge_probe(*parts(x, signal + 10000))[0] > 0.999
    assert abs(measures.ridge_probe(*parts(x, signal + signal.std() * cloud(4000, 1, 2)[:, 0]))[0] - 0.5) < 0.05


def test_ridge_reads_several_targets_as_one():
    x = cloud(1000, 8)
    both = torch.stack((x[:, 0], cloud(1000, 1, 3)[:, 0]), dim=1)       # one is there, one is noise
    assert abs(measures.ridge_probe(*parts(x, both))[0] - 0.5) < 0.05


def test_logistic_recovers_a_planted_signal():
    x = cloud(3000, 16)
    classes = (x @ cloud(16, 7, 1)).argmax(1) * 3 - 4                   # names, not indices
    assert measures.logistic_probe(*parts(x * torch.logspace(-2, 2, 16) + 5, classes))[0] > 0.95


def test_probes_are_at_chance_on_noise():
    """And say so by the heaviest penalties, for there is nothing to fit."""
    x = cloud(2000, 32)
    score, penalty = measures.ridge_probe(*parts(x, cloud(2000, 1, 1)[:, 0]))
    assert -0.03 < score < 0.03 and penalty >= 1
    score, _ = measures.logistic_probe(*parts(x, cloud(2000, 5, 2).argmax(1)))
    assert abs(score - 0.2) < 0.06


@pytest.mark.parametrize("probe", [measures.ridge_probe, measures.logistic_probe])
def test_the_choice_on_dev_never_sees_test(probe):
    """Few rows, many dimensions: a light penalty remembers train. Test is train itself, and would ask for that."""
    x = cloud(120, 40)
    y = (x[:, 0] + 2 * cloud(120, 1, 1)[:, 0] > 0).long()
    train, dev = (x[:60], y[:60]), (x[60:], y[60:])
    _, penalty = probe(train, dev, dev)
    score, blind = probe(train, dev, train)
    assert blind == penalty > probe(train, train, dev)[1]
    assert score < probe(train, train, train)[0]


@pytest.mark.parametrize("probe", [measures.ridge_probe, measures.logistic_probe])
def test_test_features_are_standardised_as_train_is(probe):
    """Statistics of its own would hide that test lies elsewhere."""
    x = cloud(600, 4)
    train, dev, (x_test, y_test) = parts(x, (x[:, 0] > 0).long())
    assert probe(train, dev, (x_test + 10, y_test))[0] < probe(train, dev, (x_test, y_test))[0] - 0.3


def test_a_dead_dimension_stays_dead():
    """Rounding errors that happen to carry the answer are no feature; a signal of 1e-4 is one."""
    y = cloud(500, 1, 1)
    for size, low, high in (1e-9, -0.1, 0.1), (1e-4, 0.99, 1):
        assert low < measures.ridge_probe(*parts(torch.cat((cloud(500, 3), 0.0 + size * y), 1), y[:, 0]))[0] <= high


def test_a_class_that_train_lacks_counts_as_wrong():
    x = torch.tensor([[-1.0], [1.0]]).repeat(20, 1)
    train = x, torch.tensor([0, 1]).repeat(20)
    assert measures.logistic_probe(train, train, train)[0] == 1
    assert measures.logistic_probe(train, train, (x, torch.tensor([0, 2]).repeat(20)))[0] == 0.5


# -- the shape of one cloud --------------------------------------------------------------------------------------------

def test_rankme_of_known_spectra():
    """A common offset of 5 sqrt(d) changes nothing (not centred, it reads 52); variances 1/i have 209; a line has 1."""
    offset = 5 * math.sqrt(128) * F.normalize(cloud(1, 128, 1))
    assert abs(measures.rankme(cloud(2048, 128) + offset) - 127) < 0.5
    basis = torch.linalg.qr(cloud(1024, 256) - cloud(1024, 256).mean(0))[0]
    assert abs(measures.rankme(basis * torch.arange(1, 257) ** -0.5) - 209.03) < 0.1
    assert abs(measures.rankme(cloud(100, 1) @ cloud(1, 16, 1)) - 1) < 1e-3 and measures.rankme(torch.ones(9, 4)) == 1


def test_uniformity_of_a_sphere_and_of_a_cone():
    """-4 + 8/d on the sphere; in a cone of mean cosine .96, 4 * (.96 - 1), though it is isotropic once centred."""
    z = cloud(2048, 128)
    assert abs(measures.uniformity(z) - (-4 + 8 / 128)) < 0.02
    cone = z + math.sqrt(128 * 24) * F.normalize(cloud(1, 128, 1))      # cosine 24 / (24 + 1)
    assert abs(measures.uniformity(cone) - -0.16) < 0.005
    assert abs(measures.uniformity(cone - cone.mean(0)) - (-4 + 8 / 128)) < 0.02


def test_uniformity_is_over_pairs_of_different_rows():
    """Two opposite vectors of any length: |a-b|^2 = 4. A row with itself would lift the mean to 1/2."""
    assert abs(measures.uniformity(torch.tensor([[3.0, 0.0], [-1.0, 0.0]])) - -8) < 1e-6


def test_uniformity_of_many_rows_is_that_of_a_fixed_sample():
    z = cloud(6000, 8)
    z[:3000] = z[0]                                                     # a quarter of the pairs is alike
    torch.manual_seed(1)
    found = measures.uniformity(z)
    torch.manual_seed(2)
    assert measures.uniformity(z) == found
    assert abs(found - math.log(0.25 + 0.75 * math.exp(measures.uniformity(z[3000:])))) < 0.1


# -- two views ---------------------------------------------------------------------------------------------------------

def test_alignment_is_between_partners_on_the_sphere():
    x = cloud(500, 64)
    assert measures.alignment(x, 3 * x) < 1e-9 and abs(measures.alignment(x, -x) - 4) < 1e-9
    assert abs(measures.alignment(x, x.roll(1, 0)) - 2) < 0.05


def test_cka_knows_no_rotation_scale_or_offset():
    x = cloud(300, 16) * torch.arange(1, 17)
    assert abs(measures.cka(x, 5 * x @ rotation(16) + 100) - 1) < 1e-4
    assert measures.cka(x, x * torch.arange(16, 0, -1)) < 0.9           # but a stretching


def test_cka_of_strangers_is_what_chance_gives():
    found = measures.cka(cloud(2000, 64), cloud(2000, 16, 1))
    assert abs(found - math.sqrt(64 * 16 / 2064 / 2016)) < 0.003
    assert measures.cka(cloud(50, 4), torch.ones(50, 3)) == 0


def test_knn_overlap_of_a_rotation_and_of_strangers():
    """Offsets are centred away; and no item is its own neighbour, or strangers would share 1/k and more."""
    x = cloud(400, 16)
    assert measures.knn_overlap(x, 2 * x @ rotation(16) + 50) > 0.99
    assert abs(measures.knn_overlap(x, cloud(400, 16, 1)) - 10 / 399) < 0.01
    assert measures.knn_overlap(x, cloud(400, 16, 1), k=1) < 0.03


def test_knn_overlap_counts_the_shared_neighbours():
    """Four pairs of twins on the axes: a view that mixes up two of the pairs keeps the other two."""
    x = torch.eye(4).repeat_interleave(2, 0)
    assert measures.knn_overlap(x, x[[0, 1, 2, 3, 4, 6, 5, 7]], k=1) == 0.5


def test_knn_overlap_is_by_direction():
    """Opposite pairs keep the mean at zero: the lengths of the pairs can change without moving any cosine."""
    x, length = cloud(100, 8), 0.1 + cloud(100, 1, 1).abs()
    assert measures.knn_overlap(torch.cat((x, -x)), torch.cat((x * length, -x * length))) > 0.99


def test_mrr_by_hand_and_ties_are_lost():
    distance = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 2.0, torch.inf]])
    assert measures.mrr(distance, torch.tensor([0, 2, 0])) == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert measures.mrr(torch.ones(5, 4), torch.zeros(5).long()) == 0.25


# -- content sensitivity -----------------------------------------------------------------------------------------------

class Mixture:
    """An encoder of known content: a latent is own parts of its token, context parts of its row's last, and 5."""
    forward_target = tjepa.TJEPA.forward_target

    def __init__(self, own, context, target="token"):
        self.cfg, self.own, self.context = tjepa.Config(**CFG, target=target, target_norm=False), own, context
        self.words, self.texts = cloud(60, 32), cloud(60, 32, 1)
        self.read = []

    def encode(self, tokens, online=False):
        self.read.append(tokens)
        return 5 + self.own * self.words[tokens] + self.context * self.texts[tokens[:, -1:]]


def removed(tokens, lengths):
    """One span of lengths[i] tokens in row i, from position 2 + i % 3 on."""
    spans = torch.full_like(tokens, tjepa.Config(**CFG).max_spans)
    for i, length in enumerate(lengths):
        spans[i, 2 + i % 3:2 + i % 3 + length] = 0
    return spans


@pytest.mark.parametrize("own, context, share", [(0, 1, 0), (1, 0, 1), (1, 1, 0.5), (1, 2, 0.2)])
def test_content_sensitivity_is_the_share_of_a_targets_own_words(own, context, share):
    tokens = rows(400)
    found = measures.content_sensitivity(Mixture(own, context), tokens, removed(tokens, [4, 3] * 200))
    assert abs(found - share) < (0.05 if own else 1e-9)


def test_content_sensitivity_swaps_what_is_removed_and_nothing_else():
    """Row by row from the row before; who lost more than it did starts over with its first."""
    model, tokens = Mixture(1, 1, "span"), rows(3)
    spans = removed(tokens, [2, 5, 3])
    measures.content_sensitivity(model, tokens, spans)
    before, after = model.read
    gone = spans < model.cfg.max_spans
    assert torch.equal(before, tokens) and torch.equal(after[~gone], tokens[~gone])
    own = [row[where].tolist() for row, where in zip(tokens, gone)]
    assert [row[where].tolist() for row, where in zip(after, gone)] == [own[2][:2], (own[0] * 3)[:5], own[1][:3]]


def test_content_sensitivity_of_the_real_thing_is_between_words_and_context():
    """Spans as in training, rows with padding, which is never swapped: neither in nor out."""
    torch.manual_seed(0)
    model, tokens = tjepa.TJEPA(tjepa.Config(**CFG), torch.arange(60) % 3 == 0), rows(16, pad=1)
    encode, model.read = model.encode, []
    model.encode = lambda text, **how: model.read.append(text) or encode(text, **how)
    spans = tjepa.sample_spans(tokens, model.word_start, model.cfg)
    assert 0.1 < measures.content_sensitivity(model, tokens, spans) < 1.2
    assert torch.equal(model.read[0] == PAD, model.read[1] == PAD)


# -- bad input ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("message, call", [
    ("matrices", lambda: measures.rankme(cloud(1, 4))),
    ("matrices", lambda: measures.uniformity(torch.ones(2, 3, 4))),
    ("finite", lambda: measures.uniformity(cloud(5, 4) / 0)),
    ("same number of rows", lambda: measures.cka(cloud(5, 4), cloud(6, 4))),
    ("one space", lambda: measures.alignment(cloud(5, 4), cloud(5, 3))),
    ("11 or more", lambda: measures.knn_overlap(cloud(10, 4), cloud(10, 4), k=9)),
    ("k=0", lambda: measures.knn_overlap(cloud(10, 4), cloud(10, 4), k=0)),
    ("one own", lambda: measures.mrr(torch.ones(5, 4), torch.zeros(4).long())),
    ("no NaN", lambda: measures.mrr(torch.full((1, 4), torch.nan), torch.zeros(1).long())),
    ("too few", lambda: measures.split(4, 0)),
    ("same number of rows", lambda: measures.ridge_probe(*[(cloud(5, 4), cloud(6, 1))] * 3)),
    ("ridge_probe", lambda: measures.logistic_probe(*[(cloud(5, 4), cloud(5, 1)[:, 0])] * 3)),
    ("2 rows", lambda: measures.content_sensitivity(Mixture(1, 1), rows(1), removed(rows(1), [3]))),
    ("removed in each", lambda: measures.content_sensitivity(Mixture(1, 1), rows(2), removed(rows(2), [3, 0]))),
])
def test_bad_input_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()


# -- confidence: cases computed by hand --------------------------------------------------------------------------------

def test_auroc_counts_pairs_and_half_of_the_ties():
    score, right = torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([True, True, False, False])
    assert measures.auroc(score, right) == (1 + 1 + 0 + 0.5) / 4       # (3, 2), (3, 1), (1, 2), (1, 1)
    assert measures.auroc(torch.zeros(4), right) == 0.5 and measures.auroc(-score, right) == 1 - 2.5 / 4
    with pytest.raises(ValueError, match="one kind"):
        measures.auroc(score, torch.ones(4))


def test_aurc_is_the_mean_risk_over_coverages():
    score, right = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([True, False, True, False])
    assert measures.risk_coverage(score, right).tolist() == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert measures.aurc(score, right) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert measures.aurc(score, torch.tensor([True, True, False, False])) == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)


def test_aurc_of_a_score_that_knows_nothing_is_the_error_rate_in_any_order():
    for right in ([True, True, False, True], [False, True, True, True]):
        assert measures.aurc(torch.zeros(4), torch.tensor(right)) == pytest.approx(1 / 4)


def test_ece_is_the_gap_between_what_is_said_and_what_is_true():
    probability = torch.tensor([0.9, 0.9, 0.3, 0.3])
    right = torch.tensor([True, False, False, False])
    assert measures.ece(probability, right) == pytest.approx((2 * abs(0.5 - 0.9) + 2 * abs(0 - 0.3)) / 4)
    assert measures.ece(torch.tensor([0.5, 0.5, 1.0]), torch.tensor([True, False, True])) == pytest.approx(0)
    # two that err in opposite directions do not cancel unless they share a bin
    assert measures.ece(torch.tensor([0.0, 1.0]), torch.tensor([True, False])) == 1
    with pytest.raises(ValueError, match="within 0 and 1"):
        measures.ece(torch.tensor([1.5]), torch.tensor([True]))


def test_calibration_recovers_a_known_slope_and_never_looks_at_the_item_itself():
    score = cloud(4000, 1)[:, 0] * 3
    right = torch.rand(4000, generator=torch.Generator().manual_seed(1)) < torch.sigmoid(score + 1)
    fold = torch.arange(4000) % 2 == 0
    found = measures.calibrate(score * 7 - 2, right, fold)              # whatever unit the score has
    assert (found - torch.sigmoid(score.double() + 1)).abs().max() < 0.08 and measures.ece(found, right) < 0.03
    moved = measures.calibrate(score * 7 - 2, torch.where(torch.arange(4000) == 0, ~right, right), fold)
    torch.testing.assert_close(moved[fold], found[fold], atol=0, rtol=0)
    assert not torch.equal(moved[~fold], found[~fold])
    parted = measures.calibrate(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]), torch.arange(4) % 2 == 0)
    assert parted.isfinite().all() and (parted[:2] < 0.2).all() and (parted[2:] > 0.8).all()
    with pytest.raises(ValueError, match="both halves"):
        measures.calibrate(score, right, torch.ones(4000, dtype=torch.bool))


@pytest.mark.parametrize("score, right", [(torch.tensor([]), torch.tensor([])), (torch.tensor([1.0]), torch.ones(2)),
                                          (torch.tensor([math.nan]), torch.ones(1))])
def test_scores_that_cannot_be_judged_are_refused(score, right):
    with pytest.raises(ValueError, match="one score an item"):
        measures.aurc(score, right)
