"""What labs measure of a frozen encoder: what can be read from its latents (probes), how they lie (rank, uniformity),
how alike two sets of them are (CKA, neighbours), how much of a target is its own words (content sensitivity); and of a
confidence: does it know when it is wrong?

Latents are matrices, an item a row; figures are floats. None means anything alone: a random-init encoder is a strong
control, and where chance or a bound is known the docstring gives it.
"""
import torch
from torch.nn import functional as F

import tjepa

# Per row of data, so that they mean the same for any n. Heavy to light: the first wins a tie, and starts the next fit.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)

def rows_of(*clouds, least=2):
    """The same matrices in float64 on the CPU: fp32 would round what is left of a cone once its offset is subtracted.
    ValueError: not matrices with the same number of rows, fewer rows than least, or NaN or infinity in them."""
    if {z.dim() for z in clouds} != {2} or len({len(z) for z in clouds}) > 1 or len(clouds[0]) < least:
        raise ValueError(f"latents of shape {', '.join(str(tuple(z.shape)) for z in clouds)} must be matrices with the "
                         f"same number of rows, {least} or more")
    if not all(z.isfinite().all() for z in clouds):
        raise ValueError("latents must be finite: there is NaN or infinity in them")
    return [z.detach().cpu().double() for z in clouds]

def centred(z):
    """z (N, C) less the mean row: an offset that all share says nothing about any of them, and swamps cosines."""
    return z - z.mean(0)

@torch.no_grad()
def features(model, tokens, size=256):
    """One vector a text, as in `TJEPA.concept`: tokens (n, T), padded -> (n, C), the mean of encode over real tokens.
    model: anything with encode(tokens) -> (B, T, C) and cfg.pad; it reads size rows at a time."""
    return torch.cat([tjepa.masked_mean(model.encode(some).float(), (some != model.cfg.pad)[..., None], 1)
                      for some in tokens.split(size)])

# -- probes: is it in there, in a form that a linear map can read? -----------------------------------------------------
def split(n, seed):
    """Shuffled indices of n items: train (3/5), dev and test (1/5 each), for ridge_probe(*((x[i], y[i]) for i in ...)).
    Rows that share a fact or a text belong together: split those, then take their rows. ValueError: n below 5."""
    if n < 5:
        raise ValueError(f"{n} items are too few to split: 5 or more")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tensor_split((n * 3 // 5, n * 4 // 5))

def standardised(*parts):
    """Pairs (x (n, C), y), train first -> the same with x in units of train's standard deviation and a 1 for the bias.
    A dimension that never moves stays at 0: rounding errors, of about 1e-7, are not blown up into a feature."""
    xs = [rows_of(x, y[:, None] if y.dim() == 1 else y, least=1)[0] for x, y in parts]
    mean, std = xs[0].mean(0), xs[0].std(0, correction=0).clamp(min=1e-6)
    return [(F.pad((x - mean) / std, (0, 1), value=1.0), y.cpu()) for x, (_, y) in zip(xs, parts)]

def choose(fit, score, dev, test, penalties=PENALTIES):
    """fit(penalty) -> weights, score(weights, x, y) -> float. The penalty that is best on dev; its score on test."""
    weights = {penalty: fit(penalty) for penalty in penalties}
    best = max(penalties, key=lambda penalty: score(weights[penalty], *dev))
    return score(weights[best], *test), best            # test is looked at once, and chooses nothing

def ridge_probe(train, dev, test):
    """Linear regression on latents. Each split: x (n, C), y (n,) or (n, D), real -> (R2 on test, the penalty chosen).
    R2 as in `tjepa.r_squared`: at most 1, 0 knows the average only, below 0 is worse. ValueError: as in `rows_of`."""
    (x, y), dev, test = ((x, y.double().reshape(len(x), -1)) for x, y in standardised(train, dev, test))
    cost = torch.ones(x.size(1), dtype=x.dtype)
    cost[-1] = 0                                        # the bias is free
    def fit(penalty):
        """The normal equations."""
        return torch.linalg.solve(x.T @ x / len(x) + penalty * cost.diag(), x.T @ y / len(x))           # (C+1, D)
    def score(w, x, y):
        """R2."""
        return tjepa.r_squared(x @ w, y, torch.ones(len(x))).item()
    return choose(fit, score, dev, test)

def logistic_probe(train, dev, test, penalties=PENALTIES):
    """Multinomial logistic regression. Each split: x (n, C), y (n,) integers -> (accuracy on test, the penalty chosen).
    penalties: those to choose from, heavy to light; the lightest take longest.
    Chance is the share of the commonest class; one that train lacks counts as wrong. Full-batch LBFGS: no seed, no
    luck. ValueError: as in `rows_of`, or y is not integers."""
    if any(y.is_floating_point() or y.dim() != 1 for _, y in (train, dev, test)):
        raise ValueError("classes must be one integer a row; real values are for ridge_probe")
    (x, y), dev, test = ((x.float(), y) for x, y in standardised(train, dev, test))
    classes, y = y.unique(return_inverse=True)
    w = torch.zeros(x.size(1), len(classes), requires_grad=True)                                        # (C+1, classes)
    def fit(penalty):
        """LBFGS, from the weights of the last penalty on, which are near."""
        optimizer = torch.optim.LBFGS([w], max_iter=100, tolerance_change=1e-8, line_search_fn="strong_wolfe")
        def loss():
            """Cross-entropy and penalty, with gradients."""
            optimizer.zero_grad()
            value = F.cross_entropy(x @ w, y) + penalty / 2 * w[:-1].square().sum()
            value.backward()
            return value
        optimizer.step(loss)
        return w.detach().clone()
    def score(w, x, y):
        """Accuracy."""
        return (classes[(x @ w).argmax(1)] == y).float().mean().item()
    return choose(fit, score, dev, test, penalties)

# -- the shape of one cloud --------------------------------------------------------------------------------------------
def rankme(z):
    """RankMe (Garrido et al. 2023) of z (N, C), centred: exp of the entropy of its singular values, as shares of their
    sum. From 1 (a line, or a point) to min(N-1, C); N should be ten times C. It knows no scale: rounding errors around
    a point have a rank too, so read a std beside it. ValueError: fewer than 2 rows."""
    s = torch.linalg.svdvals(centred(*rows_of(z)))
    return torch.special.entr(s / s.sum().clamp(min=1e-12)).sum().exp().item()

def uniformity(z):
    """log mean exp(-2 |a-b|^2) over pairs of different rows of z (N, C), on the unit sphere (Wang & Isola 2020). Lower
    is more uniform: about -4 + 8/C if spread evenly, 0 if all point one way; near 0, 4 * (mean cosine - 1). Raw, it
    sees little but a common offset: give it z - z.mean(0) as well. N > 2048: a sample of 2048 rows, always the same.
    ValueError: fewer than 2 rows."""
    z, = rows_of(z)
    if len(z) > 2048:
        z = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:2048]]
    return torch.pdist(F.normalize(z, dim=-1)).square().mul(-2).exp().mean().log().item()

# -- two views of the same items, row by row ---------------------------------------------------------------------------
def alignment(x, y):
    """Mean |a-b|^2 of the pairs in x, y (N, C), on the unit sphere (Wang & Isola 2020): 0 if each points the way of its
    partner, about 2 if they have nothing to do with each other, 4 if opposite. ValueError: shapes differ."""
    if x.shape != y.shape:
        raise ValueError(f"pairs must share one space: {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = rows_of(x, y, least=1)
    return (F.normalize(x, dim=-1) - F.normalize(y, dim=-1)).square().sum(-1).mean().item()

def cka(x, y):
    """Linear CKA (Kornblith et al. 2019) of x (N, C) and y (N, D): 1 if one is a rotation of the other, at any scale
    and offset; 0 if no direction of one varies with any of the other, or if one is a point. Chance is not 0: two
    independent isotropic clouds have sqrt(C D / (N + C) / (N + D)). ValueError: numbers of rows differ, or below 2."""
    x, y = map(centred, rows_of(x, y))
    both = (x.T @ x).norm() * (y.T @ y).norm()          # C x C products: no N x N matrix is needed
    return ((y.T @ x).square().sum() / both.clamp(min=1e-12)).item()

def knn_overlap(x, y, k=10):
    """Share of an item's k nearest others that x (N, C) and y (N, D) have in common: cosine, each view centred. From 0
    to 1, chance k / (N - 1). CKA hears the few widest directions, this the neighbourhoods that retrieval lives on.
    ValueError: numbers of rows differ, k below 1, or not more than k other rows."""
    if k < 1:
        raise ValueError(f"k={k} must be 1 or more")
    def nearest(z):
        """The k nearest others of each row: (N, k)."""
        z = F.normalize(centred(z), dim=-1)
        return (z @ z.T).fill_diagonal_(-torch.inf).topk(k).indices                                     # (N, k)
    a, b = map(nearest, rows_of(x, y, least=k + 2))
    return (a[:, :, None] == b[:, None]).sum().item() / a.numel()

def mrr(distance, own):
    """Mean reciprocal rank: distance (n, A) of n queries to A candidates, own (n,) the right one's column -> (0, 1].
    Chance is (1 + 1/2 + ... + 1/A) / A. A tie is lost: else latents that are all the same would be perfect.
    ValueError: not one own a query, or NaN."""
    if own.shape != distance.shape[:1] or distance.isnan().any():
        raise ValueError(f"distances {tuple(distance.shape)}, own {tuple(own.shape)}: one own a row, and no NaN")
    rank = (distance <= distance.gather(1, own[:, None])).sum(1)                                        # (n,)
    return (1 / rank.double()).mean().item()

# -- what a target is made of ------------------------------------------------------------------------------------------
@torch.no_grad()
def content_sensitivity(model, tokens, spans):
    """Share of the target of a removed span that is its own words; the rest is its surroundings, which the predictor is
    shown: a low latent loss is cheap there. tokens, spans (B, T) as in `TJEPA.predict`. The removed tokens of each row
    are swapped for those removed in the row before, the others stay: MSE(target, swapped) / (2 * variance of target).
    0: the target ignores its words (a constant does too). 1: two targets of the same context are strangers; a little
    more where swapped text is odd text. ValueError: one row only, or a row that nothing is removed from."""
    count = (spans < model.cfg.max_spans).sum(1, keepdim=True)                                          # (B, 1)
    if len(tokens) < 2 or not count.all():
        raise ValueError("content is swapped between rows: 2 rows or more, with something removed in each")
    parts = tjepa.split_spans(spans, tokens, int(count.max()), model.cfg)
    own, slot = tokens.gather(1, parts.removed), torch.arange(int(count.max()), device=tokens.device)   # (B, K), (K,)
    other = own.roll(1, 0).gather(1, slot % count.roll(1, 0))       # a row that lost fewer starts over with its first
    swapped = tokens.scatter(1, parts.removed, torch.where(slot < count, other, own))   # surplus slots keep theirs
    there = parts.pool.sum(2) > 0                                                                       # (B, S)
    target, moved = (model.forward_target(text, parts)[there] for text in (tokens, swapped))            # (n, C)
    return (1 - tjepa.r_squared(moved, target, torch.ones_like(target[:, 0])).item()) / 2

# -- does a confidence know when it is wrong? --------------------------------------------------------------------------
def scored(score, right):
    """The same in float64 and bool on the CPU, (n,) each. ValueError: not one score an item, none at all, or NaN."""
    score, right = score.detach().cpu().double(), right.detach().cpu().bool()
    if score.dim() != 1 or score.shape != right.shape or not len(score) or score.isnan().any():
        raise ValueError(f"scores {tuple(score.shape)}, right {tuple(right.shape)}: one score an item, one item or "
                         "more, and no NaN")
    return score, right

def auroc(score, right):
    """Chance that an item of right (n,) has a higher score (n,) than one that is not; a tie counts half. .5 knows
    nothing, 1 tells all apart, 0 too, but the wrong way round. ValueError: as in `scored`, or all items are alike."""
    score, right = scored(score, right)
    if right.all() or not right.any():
        raise ValueError("items of one kind only: there is nothing to tell apart")
    difference = score[right][:, None] - score[~right]                                                  # (n+, n-)
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()

def risk_coverage(score, right):
    """Share of wrong items among the k surest, k = 1 ... n: (n,). Tied items share their errors: the mean over all
    their orders. ValueError: as in `scored`."""
    score, right = scored(score, right)
    values, group = score.unique(return_inverse=True)
    share = torch.zeros_like(values).index_add(0, group, (~right).double()) / group.bincount()
    wrong = share[group][score.argsort(descending=True)]                                                # (n,)
    return wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)

def aurc(score, right):
    """Area under the risk-coverage curve (Geifman & El-Yaniv 2017): mean error of the k surest items, over k. Lower is
    better; a score that knows nothing has the error rate. Compare it at equal error rates. ValueError: `scored`."""
    return risk_coverage(score, right).mean().item()

def ece(probability, right, bins=15):
    """Expected calibration error: mean over items of |share right - mean probability| of their bin, in bins of equal
    width. 0 is calibrated; always saying p has |p - share right|. ValueError: as in `scored`, or not within 0 .. 1."""
    probability, right = scored(probability, right)
    if probability.min() < 0 or probability.max() > 1:
        raise ValueError("probabilities must lie within 0 and 1: calibrate a score first")
    where = (probability * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add(0, where, right.double() - probability)
    return gap.abs().sum().item() / len(right)

def calibrate(score, right, fold):
    """Scores (n,) as probabilities of being right (n,): a logistic regression on the score (Platt 1999), fitted on the
    one half of the items, fold (n,) False or True, and read on the other. ValueError: as in `scored`, an empty half."""
    score, right = scored(score, right)
    fold, found = fold.cpu(), torch.empty_like(score)
    if fold.all() or not fold.any():
        raise ValueError("both halves need items: what is calibrated must not be judged on itself")
    for half in (fold, ~fold):
        middle, unit = score[~half].mean(), score[~half].std(correction=0).clamp(min=1e-9)
        x, y = (score - middle) / unit, right.double()                                                  # (n,)
        w = torch.zeros(2, dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")
        def loss():
            """Cross-entropy, and a small penalty: where a score tells all apart, the best slope would be infinite."""
            optimizer.zero_grad()
            value = F.binary_cross_entropy_with_logits(w[0] * x[~half] + w[1], y[~half]) + 1e-3 * w.square().sum()
            value.backward()
            return value
        optimizer.step(loss)
        found[half] = torch.sigmoid(w[0] * x[half] + w[1]).detach()
    return found
