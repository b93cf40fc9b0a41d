"""
Measures of a frozen encoder: what a linear map reads from its latents, over how many dimensions
they spread, how alike two sets are, what a target owes to its own tokens. And of a confidence.

Latents are matrices with one row per item; figures are floats. Compare each figure with the one of
a random-init encoder; where chance or a bound is known, the docstring gives it.
"""
import torch
from torch.nn import functional as F

import tjepa

# Weights of the penalty of a probe, per row of data, so that they mean the same for any n. From
# heavy to light: the first one wins a tie, and each fit starts from the one before.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)

def rows_of(*clouds, least=2):
    """Matrices in float64 on the CPU. ValueError if they are not finite matrices of equal length.

    In fp32 little would be left of a narrow cone after its offset is subtracted.
    """
    matrices = all(z.dim() == 2 for z in clouds)
    if not matrices or len({len(z) for z in clouds}) > 1 or len(clouds[0]) < least:
        raise ValueError(f"latents of shape {', '.join(str(tuple(z.shape)) for z in clouds)} must "
                         f"be matrices with the same number of rows, {least} or more")
    if not all(z.isfinite().all() for z in clouds):
        raise ValueError("latents must be finite: there is NaN or infinity in them")
    return [z.detach().cpu().double() for z in clouds]

def centred(z):
    """z (N, C) minus its mean row, which all rows share and which would dominate cosines."""
    return z - z.mean(0)

@torch.no_grad()
def features(model, tokens, size=256):
    """One vector for each text, as in `TJEPA.concept`: tokens (n, T), padded -> (n, C).

    model: anything with encode(tokens) -> (B, T, C) and cfg.pad; it reads `size` rows at a time.
    """
    vectors = []
    for rows in tokens.split(size):
        real = (rows != model.cfg.pad)[..., None]
        vectors.append(tjepa.masked_mean(model.encode(rows).float(), real, 1))
    return torch.cat(vectors)

# -- probes ----------------------------------------------------------------------------------------

def split(n, seed):
    """Shuffled indices of n items: train (3/5), dev (1/5) and test (1/5).

    Rows that share a fact or a text belong together: split the facts, then take their rows.
    """
    if n < 5:
        raise ValueError(f"{n} items are too few to split: 5 or more")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order.tensor_split((n * 3 // 5, n * 4 // 5))

def standardised(*parts):
    """Pairs (x (n, C), y), train first: x in units of train's standard deviation, 1 for the bias.

    A dimension that does not vary stays at 0: its rounding errors, of about 1e-7, must not be
    scaled up to a feature.
    """
    xs = [rows_of(x, y.reshape(len(y), -1), least=1)[0] for x, y in parts]
    mean = xs[0].mean(0)
    std = xs[0].std(0, correction=0).clamp(min=1e-6)
    with_bias = [F.pad((x - mean) / std, (0, 1), value=1.0) for x in xs]
    return [(x, y.cpu()) for x, (_, y) in zip(with_bias, parts)]

def choose(fit, score, dev, test, penalties=PENALTIES):
    """(score on test, penalty) of the penalty that is best on dev. Test chooses nothing.

    fit(penalty) -> weights, score(weights, x, y) -> float.
    """
    weights = {penalty: fit(penalty) for penalty in penalties}
    best = max(penalties, key=lambda penalty: score(weights[penalty], *dev))
    return score(weights[best], *test), best

def ridge_probe(train, dev, test):
    """Linear regression with an L2 penalty -> (R2 on test, the penalty chosen).

    Each part: x (n, C), y (n,) or (n, D), real. R2 as in `tjepa.r_squared`.
    """
    parts = standardised(train, dev, test)
    (x, y), dev, test = ((x, y.double().reshape(len(x), -1)) for x, y in parts)
    cost = torch.ones(x.size(1), dtype=x.dtype)
    cost[-1] = 0                                        # the bias has no penalty

    def fit(penalty):
        """Weights (C+1, D) of a penalty: the normal equations."""
        left = x.T @ x / len(x) + penalty * cost.diag()                 # (C+1, C+1)
        return torch.linalg.solve(left, x.T @ y / len(x))               # (C+1, D)

    def score(w, x, y):
        """R2 of rows x (n, C+1) with targets y (n, D)."""
        return tjepa.r_squared(x @ w, y, torch.ones(len(x))).item()
    return choose(fit, score, dev, test)

def logistic_probe(train, dev, test, penalties=PENALTIES):
    """Multinomial logistic regression -> (accuracy on test, the penalty chosen).

    Each part: x (n, C), y (n,) integers. penalties: from heavy to light; light ones take longest.
    Chance is the share of the commonest class. A class that train lacks counts as wrong. Full-batch
    LBFGS needs no seed.
    """
    if any(y.is_floating_point() or y.dim() != 1 for _, y in (train, dev, test)):
        raise ValueError("classes must be one integer a row; real values are for ridge_probe")
    (x, y), dev, test = ((x.float(), y) for x, y in standardised(train, dev, test))
    classes, y = y.unique(return_inverse=True)
    w = torch.zeros(x.size(1), len(classes), requires_grad=True)        # (C+1, classes)

    def fit(penalty):
        """Weights (C+1, classes) of a penalty."""
        # starts from the weights of the penalty before, which are near
        optimizer = torch.optim.LBFGS(
            [w], max_iter=100, tolerance_change=1e-8, line_search_fn="strong_wolfe")

        def loss():
            """Cross-entropy and penalty, for LBFGS."""
            optimizer.zero_grad()
            value = F.cross_entropy(x @ w, y) + penalty / 2 * w[:-1].square().sum()
            value.backward()
            return value
        optimizer.step(loss)
        return w.detach().clone()

    def score(w, x, y):
        """Accuracy on rows x (n, C+1) with classes y (n,)."""
        return (classes[(x @ w).argmax(1)] == y).float().mean().item()
    return choose(fit, score, dev, test, penalties)

# -- the shape of one cloud, and two views of the same items ---------------------------------------

def rankme(z):
    """RankMe (Garrido et al. 2023) of z (N, C), centred: exp of the entropy of its singular values.

    From 1 (a line, or a point) to min(N-1, C); N should be ten times C. It has no scale: rounding
    errors around a point have a rank too, so read a standard deviation beside it.
    """
    s = torch.linalg.svdvals(centred(*rows_of(z)))
    share = s / s.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp().item()

def cka(x, y):
    """Linear CKA (Kornblith et al. 2019) of x (N, C) and y (N, D).

    1 if one is a rotation of the other, at any scale and offset; 0 if they share no direction, or
    if one is a point. Chance is sqrt(C D / (N + C) / (N + D)) for two isotropic clouds.
    """
    x, y = (centred(z) for z in rows_of(x, y))
    # products of C x C: no N x N matrix is needed
    both = (x.T @ x).norm() * (y.T @ y).norm()
    return ((y.T @ x).square().sum() / both.clamp(min=1e-12)).item()

def knn_overlap(x, y, k=10):
    """Share of an item's k nearest others that x (N, C) and y (N, D) have in common, 0 to 1.

    By cosine, each view centred. Chance is k / (N - 1). CKA depends on the few widest directions,
    this on the neighbourhoods that retrieval uses.
    """
    if k < 1:
        raise ValueError(f"k={k} must be 1 or more")

    def nearest(z):
        """Indices (N, k) of the nearest rows of each row of z (N, C)."""
        z = F.normalize(centred(z), dim=-1)
        return (z @ z.T).fill_diagonal_(-torch.inf).topk(k).indices     # (N, k)
    a, b = (nearest(z) for z in rows_of(x, y, least=k + 2))
    return (a[:, :, None] == b[:, None]).sum().item() / a.numel()

# -- content of a target, and confidence -----------------------------------------------------------

@torch.no_grad()
def content_sensitivity(model, tokens, span_ids):
    """Share of the target of a removed span that is due to the span's own tokens.

        row before     we went [to the market] today
        row            the cat [sat on] the mat
        swapped        the cat [to the] the mat         does the target of the span move?

    The rest is due to the context, which the predictor reads: a low latent loss is easy there.
    tokens, span_ids (B, T) as in `TJEPA.predict`. The figure is MSE(target, swapped) / (2 * the
    target's variance). 0: the target does not depend on its tokens (a constant does not either).
    1: two targets in the same context are independent; a little more where swapped text is unusual.
    """
    count = (span_ids < model.cfg.max_spans).sum(1, keepdim=True)       # (B, 1)
    if len(tokens) < 2 or not count.all():
        raise ValueError("content is swapped between rows: 2 rows or more, with something removed "
                         "in each")
    n_removed = int(count.max())
    spans = tjepa.split_spans(span_ids, tokens, n_removed, model.cfg)
    own = spans.tokens[:, -n_removed:]                                  # (B, K) padding first
    number = torch.arange(n_removed, device=tokens.device) - (n_removed - count)    # (B, K)
    # a row that lost fewer tokens begins again with its first
    count = count.roll(1, 0)
    other = own.roll(1, 0).gather(1, n_removed - count + number % count)
    # surplus slots keep their padding
    swapped = torch.where(number >= 0, other, own)
    changed = torch.cat((spans.tokens[:, :-n_removed], swapped), dim=1)
    there = spans.weights.any(-1)                                       # (B, S)
    target = model.target_latents(spans)[there]                         # (n, C)
    moved = model.target_latents(spans._replace(tokens=changed))[there]
    every = torch.ones_like(target[:, 0])
    return (1 - tjepa.r_squared(moved, target, every).item()) / 2

def auroc(score, right):
    """Chance that an item of right (n,) has a higher score (n,) than one that is not.

    A tie counts half. .5: the score separates nothing; 1: it separates all; 0: the wrong way round.
    """
    score, right = score.detach().cpu().double(), right.detach().cpu().bool()
    if score.dim() != 1 or score.shape != right.shape or score.isnan().any():
        raise ValueError(f"scores {tuple(score.shape)}, right {tuple(right.shape)}: one score an "
                         "item, and no NaN")
    if right.all() or not right.any():
        raise ValueError("items of one kind only: there is nothing to tell apart")
    difference = score[right][:, None] - score[~right]                  # (right, wrong)
    higher = (difference > 0).double() + (difference == 0).double() / 2
    return higher.mean().item()
