"""The measures of labs/measures.py, on clouds and encoders whose figures are known beforehand."""
import math

import pytest
import torch
from torch.nn import functional as F

import tjepa
from labs import measures
from tests.toy import PAD, SMALL, make, rows


def cloud(n, width, seed=0):
    """n points of an isotropic Gaussian, (n, width)."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def rotation(width, seed=9):
    """A random rotation, (width, width)."""
    return torch.linalg.qr(cloud(width, width, seed))[0]


def parts(x, y):
    """Train, dev and test of x and y."""
    return [(x[i], y[i]) for i in measures.split(len(x), 0)]


# -- features --------------------------------------------------------------------------------------
def test_features_are_concepts_whatever_the_batch():
    """Read three rows at a time, they are what the model itself calls the concept of a text."""
    model, tokens = make(), rows(8, pad=3)
    found = measures.features(model, tokens, size=3)
    torch.testing.assert_close(found, model.concept(tokens))
    assert found.shape == (8, 32)


def test_features_of_anything_that_encodes_need_no_gradient():
    """A bag of embeddings will do; a graph would fill the memory."""
    class Bag:
        cfg = tjepa.Config(**SMALL)
        encode = torch.nn.Embedding(60, 5)
    found = measures.features(Bag(), rows(4, pad=3))
    assert found.shape == (4, 5) and not found.requires_grad


# -- probes ----------------------------------------------------------------------------------------
def test_split_is_a_partition_that_the_seed_decides():
    """An item in two parts would leak; another split for each call would not be comparable."""
    found = measures.split(101, 3)
    assert torch.cat(found).sort().values.tolist() == list(range(101))
    assert [len(part) for part in found] == [60, 20, 21]
    again, other = measures.split(101, 3), measures.split(101, 4)
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    assert not torch.equal(found[2], other[2])


def test_ridge_recovers_a_planted_signal():
    """Whatever the scale and offset of the features. With noise of equal variance, R2 is a half."""
    scale = torch.logspace(-3, 3, 16)
    z = cloud(4000, 16)
    signal = z @ cloud(16, 1, 1)[:, 0]
    assert measures.ridge_probe(*parts(z * scale + 7, signal + 10000))[0] > 0.999
    noisy = signal + signal.std() * cloud(4000, 1, 2)[:, 0]
    assert abs(measures.ridge_probe(*parts(z * scale + 7, noisy))[0] - 0.5) < 0.05


def test_ridge_reads_several_targets_as_one():
    """R2 over all of them: one that is known and one that is noise make a half."""
    x = cloud(3000, 8)
    y = torch.cat((x[:, :1], cloud(3000, 1, 1)), 1)
    assert abs(measures.ridge_probe(*parts(x, y))[0] - 0.5) < 0.05


def test_logistic_recovers_a_planted_signal():
    """Classes may be any integers."""
    x = cloud(3000, 16)
    classes = (x @ cloud(16, 7, 1)).argmax(1) * 3 - 4
    assert measures.logistic_probe(*parts(x * torch.logspace(-2, 2, 16) + 5, classes))[0] > 0.95


def test_probes_are_at_chance_on_noise():
    """They say so by heavy penalties, because there is nothing to fit."""
    x = cloud(2000, 32)
    score, penalty = measures.ridge_probe(*parts(x, cloud(2000, 1, 1)[:, 0]))
    assert -0.03 < score < 0.03 and penalty >= 1
    score, _ = measures.logistic_probe(*parts(x, cloud(2000, 5, 2).argmax(1)))
    assert abs(score - 0.2) < 0.06


@pytest.mark.parametrize("probe", [measures.ridge_probe, measures.logistic_probe])
def test_the_choice_on_dev_never_sees_test(probe):
    """Few rows, many dimensions: a light penalty remembers train. Here test is train itself, so a
    choice that saw test would ask for the light penalty."""
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
    moved = probe(train, dev, (x_test + 10, y_test))[0]
    assert moved < probe(train, dev, (x_test, y_test))[0] - 0.3


@pytest.mark.parametrize("size, low, high", [(1e-9, -0.1, 0.1), (1e-4, 0.99, 1)])
def test_a_dead_dimension_stays_dead(size, low, high):
    """Rounding errors that happen to carry the answer are no feature; a signal of 1e-4 is one."""
    y = cloud(500, 1, 1)
    x = torch.cat((cloud(500, 3), size * y), 1)
    assert low < measures.ridge_probe(*parts(x, y[:, 0]))[0] <= high


def test_a_class_that_train_lacks_counts_as_wrong():
    """Half of the test items are of a class that was never seen."""
    x = torch.tensor([[-1.0], [1.0]]).repeat(20, 1)
    train = x, torch.tensor([0, 1]).repeat(20)
    assert measures.logistic_probe(train, train, train)[0] == 1
    other = x, torch.tensor([0, 2]).repeat(20)
    assert measures.logistic_probe(train, train, other)[0] == 0.5


# -- the shape of one cloud ------------------------------------------------------------------------
def test_rankme_of_a_gaussian_ignores_a_common_offset():
    """If it were not centred, an offset of 5 sqrt(d) would make it 52."""
    offset = 5 * math.sqrt(128) * F.normalize(cloud(1, 128, 1))
    assert abs(measures.rankme(cloud(2048, 128) + offset) - 127) < 0.5


def test_rankme_of_known_spectra():
    """Singular values that fall as 1/sqrt(i) have 209 of 256; a line and a point have 1."""
    basis = torch.linalg.qr(cloud(1024, 256) - cloud(1024, 256).mean(0))[0]
    assert abs(measures.rankme(basis * torch.arange(1, 257) ** -0.5) - 209.03) < 0.1
    assert abs(measures.rankme(cloud(100, 1) @ cloud(1, 16, 1)) - 1) < 1e-3
    assert measures.rankme(torch.ones(9, 4)) == 1


# -- two views -------------------------------------------------------------------------------------
def test_cka_ignores_rotation_scale_and_offset():
    """But not a stretching."""
    x = cloud(300, 16) * torch.arange(1, 17)
    assert abs(measures.cka(x, 5 * x @ rotation(16) + 100) - 1) < 1e-4
    assert measures.cka(x, x * torch.arange(16, 0, -1)) < 0.9


def test_cka_of_independent_clouds_is_chance():
    """Chance is not 0; a point has 0."""
    found = measures.cka(cloud(2000, 64), cloud(2000, 16, 1))
    assert abs(found - math.sqrt(64 * 16 / 2064 / 2016)) < 0.003
    assert measures.cka(cloud(50, 4), torch.ones(50, 3)) == 0


def test_knn_overlap_of_a_rotation_and_of_independent_clouds():
    """No item is its own neighbour, or independent clouds would share 1/k and more."""
    x = cloud(400, 16)
    assert measures.knn_overlap(x, 2 * x @ rotation(16) + 50) > 0.99
    assert abs(measures.knn_overlap(x, cloud(400, 16, 1)) - 10 / 399) < 0.01
    assert measures.knn_overlap(x, cloud(400, 16, 1), k=1) < 0.03


def test_knn_overlap_counts_the_shared_neighbours():
    """Four pairs of twins on the axes: a view that mixes up two of the pairs keeps the others."""
    x = torch.eye(4).repeat_interleave(2, 0)
    assert measures.knn_overlap(x, x[[0, 1, 2, 3, 4, 6, 5, 7]], k=1) == 0.5


def test_knn_overlap_is_by_direction():
    """Opposite pairs keep the mean at zero, so their lengths may change and no cosine does."""
    x, length = cloud(100, 8), 0.1 + cloud(100, 1, 1).abs()
    longer = torch.cat((x * length, -x * length))
    assert measures.knn_overlap(torch.cat((x, -x)), longer) > 0.99


# -- content sensitivity ---------------------------------------------------------------------------
class Mixture:
    """An encoder of known content: a latent is `own` parts of its token and `context` parts of the
    last token of its row, plus an offset of 5."""
    target_latents = tjepa.TJEPA.target_latents

    def __init__(self, own, context, target="token"):
        self.cfg = tjepa.Config(**SMALL, target=target, target_norm=False)
        self.own, self.context = own, context
        self.words, self.texts = cloud(60, 32), cloud(60, 32, 1)
        self.read = []

    def target_encoder(self, tokens, positions, mask, top_k, n_last):
        """tokens (B, T) -> (B, n_last, C); remembers what it has read, in the order of the text."""
        self.read.append(tokens.gather(1, positions.argsort(1)))
        text = self.texts[self.read[-1][:, -1:]]
        latents = 5 + self.own * self.words[tokens] + self.context * text
        return latents[:, -n_last:]


def removed(tokens, lengths):
    """One span of lengths[i] tokens in row i, from position 2 + i % 3 on."""
    spans = torch.full_like(tokens, tjepa.Config(**SMALL).max_spans)
    for i, length in enumerate(lengths):
        start = 2 + i % 3
        spans[i, start:start + length] = 0
    return spans


@pytest.mark.parametrize("own, context, share", [(0, 1, 0), (1, 0, 1), (1, 1, 0.5), (1, 2, 0.2)])
def test_content_sensitivity_is_the_share_of_a_targets_own_tokens(own, context, share):
    """Of the variance: one part of two, one of five."""
    tokens = rows(400)
    spans = removed(tokens, [4, 3] * 200)
    found = measures.content_sensitivity(Mixture(own, context), tokens, spans)
    assert abs(found - share) < (0.05 if own else 1e-9)


def test_content_sensitivity_swaps_what_is_removed_and_nothing_else():
    """From the row before; a row that lost more than it did starts again with its first token."""
    model, tokens = Mixture(1, 1, "span"), rows(3)
    spans = removed(tokens, [2, 5, 3])
    measures.content_sensitivity(model, tokens, spans)
    before, after = model.read
    gone = spans < model.cfg.max_spans
    assert torch.equal(before, tokens) and torch.equal(after[~gone], tokens[~gone])
    own = [row[where].tolist() for row, where in zip(tokens, gone)]
    swapped = [row[where].tolist() for row, where in zip(after, gone)]
    assert swapped == [own[2][:2], (own[0] * 3)[:5], own[1][:3]]


def test_content_sensitivity_of_a_tjepa_is_between_tokens_and_context():
    """Spans as in training. Padding is never swapped, neither in nor out."""
    model, tokens = make(), rows(16, pad=1)
    read = []
    model.target_encoder.embed.register_forward_hook(lambda *args: read.append(args[1][0]))
    spans = tjepa.sample_spans(tokens, model.word_start, model.cfg)
    assert 0.1 < measures.content_sensitivity(model, tokens, spans) < 1.2
    assert torch.equal(read[0] == PAD, read[1] == PAD)


# -- confidence ------------------------------------------------------------------------------------
def test_auroc_counts_pairs_and_half_of_the_ties():
    """By hand: of the pairs (3, 2), (3, 1), (1, 2), (1, 1) two are right and one is a tie."""
    score, right = torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([True, True, False, False])
    assert measures.auroc(score, right) == 2.5 / 4
    assert measures.auroc(-score, right) == 1 - 2.5 / 4
    assert measures.auroc(torch.zeros(4), right) == 0.5


# -- bad input -------------------------------------------------------------------------------------
def swap(n, lengths):
    """Content sensitivity of n rows that lose spans of these lengths."""
    return measures.content_sensitivity(Mixture(1, 1), rows(n), removed(rows(n), lengths))


@pytest.mark.parametrize("message, call", [
    ("matrices", lambda: measures.rankme(cloud(1, 4))),
    ("matrices", lambda: measures.rankme(torch.ones(2, 3, 4))),
    ("finite", lambda: measures.rankme(cloud(5, 4) / 0)),
    ("same number of rows", lambda: measures.cka(cloud(5, 4), cloud(6, 4))),
    ("11 or more", lambda: measures.knn_overlap(cloud(10, 4), cloud(10, 4), k=9)),
    ("k=0", lambda: measures.knn_overlap(cloud(10, 4), cloud(10, 4), k=0)),
    ("too few", lambda: measures.split(4, 0)),
    ("same number of rows", lambda: measures.ridge_probe(*[(cloud(5, 4), cloud(6, 1))] * 3)),
    ("ridge_probe", lambda: measures.logistic_probe(*[(cloud(5, 4), cloud(5, 1)[:, 0])] * 3)),
    ("2 rows", lambda: swap(1, [3])),
    ("removed in each", lambda: swap(2, [3, 0])),
    ("one score an item", lambda: measures.auroc(torch.tensor([math.nan]), torch.ones(1))),
    ("one score an item", lambda: measures.auroc(torch.ones(3), torch.ones(2))),
    ("one kind", lambda: measures.auroc(torch.ones(4), torch.ones(4))),
])
def test_bad_input_is_named(message, call):
    """A figure of such input would look like any other."""
    with pytest.raises(ValueError, match=message):
        call()
