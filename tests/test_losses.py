"""Losses, energies and the collapse panel: known answers for each, one property a test."""
import torch

import tjepa
from tests.toy import make, rows


def every(z):
    """A mask that counts all rows of z (N, C)."""
    return torch.ones(len(z), dtype=torch.bool)


# -- energy ----------------------------------------------------------------------------------------
def test_energy_is_the_prediction_error_of_the_span():
    """By hand: the mean prediction of the hidden positions against their mean target latent."""
    model, text, hidden = make(target="span", loss="mse"), rows(1), [10, 11, 12]
    spans = torch.full_like(text, model.cfg.max_spans)
    spans[:, hidden] = 0
    seen = torch.tensor([[t for t in range(32) if t not in hidden]])
    positions = torch.cat((seen, torch.tensor([hidden])), dim=1)

    context = model.context_encoder(text.gather(1, seen), seen)
    states = model.predictor(context, positions, torch.ones_like(positions).bool())
    predicted = model.predictor.latent_proj(states).mean(1)
    target = tjepa.norm(model.encode(text)[:, hidden].mean(1))
    torch.testing.assert_close(model.energy(text, spans), ((predicted - target) ** 2).mean(1))


def test_energy_moves_with_the_hidden_text_alone():
    """Another word in the gap: the prediction stays, the energy moves. The cloze rests on this."""
    model, texts = make(), rows(1).repeat(5, 1)
    texts[:, 12] = torch.arange(5)
    spans = torch.full_like(texts, model.cfg.max_spans)
    spans[:, 12] = 0
    predicted = model.predict(texts, spans, n_removed=1).predicted[:, 0]
    torch.testing.assert_close(predicted, predicted[:1].expand(5, -1))
    assert len(model.energy(texts, spans).unique()) == 5


# -- parts of the losses ---------------------------------------------------------------------------
def test_r2_is_0_for_the_mean_and_1_for_the_target():
    """A loss alone does not tell whether a prediction beats the mean."""
    torch.manual_seed(0)
    target = torch.randn(100, 8) + 3
    mean = target.mean(0).expand(100, -1)
    assert abs(tjepa.r_squared(mean, target, every(target))) < 1e-5
    assert tjepa.r_squared(target, target, every(target)) == 1
    assert tjepa.r_squared(torch.zeros(100, 8), target, every(target)) < -5


def test_infonce_prefers_its_own_target():
    """Contrastive: near 0 for the own target, high for the target of another row."""
    torch.manual_seed(0)
    target = torch.randn(50, 16)
    own = tjepa.latent_distance(target, target, every(target), "infonce")
    other = tjepa.latent_distance(target.roll(1, 0), target, every(target), "infonce")
    assert own < 0.1 < other


def test_the_distance_ignores_rows_outside_the_mask():
    """Empty spans have the latent 0: counted, they would change the loss."""
    torch.manual_seed(0)
    predicted, target = torch.randn(2, 20, 8)
    mask = torch.arange(20) < 12
    for kind in ("mse", "infonce"):
        masked = tjepa.latent_distance(predicted, target, mask, kind)
        alone = tjepa.latent_distance(predicted[:12], target[:12], mask[:12], kind)
        torch.testing.assert_close(masked, alone)


def test_sigreg_has_its_published_values():
    """A Gaussian scores about 1.05 / N, a point .402, unit vectors almost as much as a point."""
    torch.manual_seed(0)
    z = torch.randn(1024, 64)
    point = tjepa.norm(torch.randn(1, 64)).expand(256, 64)
    assert abs(1024 * tjepa.SIGReg(512)(z) - 1.05) < 0.25
    assert abs(tjepa.SIGReg()(torch.zeros(256, 64)) - 0.402) < 0.01
    assert abs(tjepa.SIGReg(4096)(point) - 1.054) < 0.02
    assert tjepa.SIGReg()(torch.nn.functional.normalize(z, dim=-1)) > 0.35


# -- the collapse panel ----------------------------------------------------------------------------
def panel(z):
    """The collapse panel of latents (B, T, C), no padding."""
    return tjepa.latent_health(z, torch.ones(z.shape[:2], dtype=torch.bool))


def test_the_panel_calls_constants_and_position_only_latents_collapsed():
    """Both are easy to predict and say nothing about a text; a random cloud is healthy."""
    torch.manual_seed(0)
    constant = torch.ones(50, 32, 64)
    position_only = torch.randn(1, 32, 64).expand(50, -1, -1)
    cloud = torch.randn(50, 32, 64)
    assert tjepa.health_word(panel(constant)) == "collapsed"
    assert tjepa.health_word(panel(position_only)) == "collapsed"
    assert tjepa.health_word(panel(cloud)) == "healthy"
    assert panel(position_only)["pos"] > 0.99 and panel(cloud)["pos"] < 0.05


def test_rank_std_and_cosine_have_known_values():
    """An isotropic cloud fills its bound, 8 directions have rank 8, an offset changes neither."""
    torch.manual_seed(0)
    cloud = torch.randn(64, 32, 64)
    found = panel(cloud + 40)
    assert 62 < found["rank"] <= found["bound"] == 64
    assert abs(found["std"] - 1) < 0.02
    assert found["cos"] > 0.99 and abs(found["cos_centred"]) < 0.01
    directions = torch.linalg.qr(torch.randn(64, 8))[0].T
    assert 7.5 < panel(torch.randn(64, 32, 8) @ directions)["rank"] < 8.1
    assert panel(cloud[:2, :4])["bound"] == 7           # N - 1 where there are few latents


def test_answer_latents_are_standardised_half_way_to_white():
    """By hand in the principal axes: each is divided by the root of its standard deviation, so
    that ratios of deviations become their roots. The scale is kept for later latents."""
    model = make()
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(32, 32)).Q
    spread = torch.logspace(0, -1, 32)
    latents = 3 + torch.randn(4000, 32) * spread @ axes.T
    found = model.fit_answer_scale(latents)
    assert found.mean(0).abs().max() < 1e-3
    assert abs(found.square().mean() - 1) < 1e-3
    deviation = (found @ axes).std(0)
    expected = spread ** 0.5
    ratio = deviation / expected
    assert ratio.max() / ratio.min() < 1.2
    torch.testing.assert_close(model.standardise(latents[:3]), found[:3])
