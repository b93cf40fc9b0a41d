"""
Selective decoding [VL-JEPA]: thoughts are cheap, words are not. When is decoding needed?

Decodes are uniform, random or at the changes (oracle), where a windowed variance of thoughts or of
pixels passes a threshold, or one for each segment of a clustering, which looks at the whole stream
and decodes mean thoughts. Between two decodes the last caption stays.

Shapes: n streams of T frames, S slots, C width; a moment is the number of a frame.
"""
import random
from typing import NamedTuple

import numpy as np
import torch

import tjepa
from data.scenes import prepare as world
from labs import seeing_model as eyes

T = 64
RATES = .05, .1, .2         # probability that the scene changes before a frame
BUDGETS = 4, 8, 16, 32      # decodes of a stream at which ways are compared
PERIODS = 1, 2, 4, 8        # of uniform decoding, for the ratio of decodes at equal quality
WINDOW = 4

class Watched(NamedTuple):
    """Streams, and what is known of each frame."""
    pictures: torch.Tensor      # (n, T, SIZE, SIZE, 3)
    thoughts: torch.Tensor      # (n, T, S * C)
    said: list                  # n lists of T captions, as the decoder says each frame
    truth: list                 # n lists of T captions

def captions_of(run, thoughts):
    """Captions of thoughts (m, S * C): a list of m tuples of S strings."""
    said = eyes.speak(run, thoughts.unflatten(1, (eyes.S, -1)).flatten(0, 1))
    return [tuple(said[i:i + eyes.S]) for i in range(0, len(said), eyes.S)]

@torch.no_grad()
def watch(speaker, rate, n):
    """`Watched` of n streams whose scene changes before a frame with probability rate."""
    random_, rng = speaker.draws(f"streams {rate}")
    scenes = [world.stream(random_, T, rate) for _ in range(n)]
    batches = [eyes.captions(speaker.words, frames, rng, [0], world.steady_look(T, rng), random_)
               for frames in scenes]
    # a decoder norms what it reads; so do distances between thoughts
    thoughts = [tjepa.norm(speaker.think(batch)).flatten(1) for batch in batches]
    pictures = [batch.pictures for batch in batches]
    said = [captions_of(speaker.run, some) for some in thoughts]
    truth = [[tuple(world.caption(scene)) for scene in frames] for frames in scenes]
    return Watched(torch.stack(pictures), torch.stack(thoughts), said, truth)

# -- moments ---------------------------------------------------------------------------------------

def uniform(k):
    """k moments at equal distances, the first frame among them."""
    return [i * T // k for i in range(k)]

def at_random(random_, k):
    """The first frame and k - 1 others."""
    return [0, *sorted(random_.sample(range(1, T), k - 1))]

def oracle(random_, truth, k):
    """The first frame and up to k - 1 of those at which the caption changes."""
    changes = [t for t in range(1, T) if truth[t] != truth[t - 1]]
    return [0, *sorted(random_.sample(changes, min(k - 1, len(changes))))]

def by_variance(frames, threshold):
    """Moments at which the variance of the newest frames passes a threshold: frames (T, D).

    The window starts anew with each moment, so that one change is decoded once.
    """
    moments = [0]
    for t in range(1, len(frames)):
        newest = frames[max(moments[-1], t + 1 - WINDOW):t + 1]
        if newest.var(0, correction=0).mean().item() > threshold:
            moments.append(t)
    return moments

def by_clustering(frames, most):
    """First frames of segments by Ward's method with temporal connectivity: frames (T, D).

    The neighbours whose union costs least are joined, until it costs more than `most`: the growth
    of the sum of squared distances from the means.
    """
    means = list(frames)
    sizes = [1] * len(frames)
    begins = list(range(len(frames)))

    def cost(i):
        """Growth of the sum by the union of segments i and i + 1."""
        weight = sizes[i] * sizes[i + 1] / (sizes[i] + sizes[i + 1])
        return weight * (means[i] - means[i + 1]).square().mean().item()
    costs = [cost(i) for i in range(len(means) - 1)]
    while costs and min(costs) <= most:
        i = costs.index(min(costs))
        size = sizes[i] + sizes[i + 1]
        union = (sizes[i] * means[i] + sizes[i + 1] * means[i + 1]) / size
        means[i:i + 2] = [union]
        sizes[i:i + 2] = [size]
        del begins[i + 1], costs[i]
        for j in range(max(0, i - 1), min(i + 1, len(costs))):
            costs[j] = cost(j)
    return begins

# -- figures ---------------------------------------------------------------------------------------

def held(moments, said):
    """The caption at every frame, if each decoded one stays until the next: said by moment."""
    return [said[max(m for m in moments if m <= t)] for t in range(T)]

def quality(watched, moments, said=None):
    """(decodes a stream, exact match over all frames). moments: n lists.

    said: for each stream the captions by moment, those of its frames by default.
    """
    shown = [held(some, captions) for some, captions in zip(moments, said or watched.said)]
    right = [a == b for stream in zip(shown, watched.truth) for a, b in zip(*stream)]
    return sum(map(len, moments)) / len(moments), sum(right) / len(right)

def said_of_segments(run, watched, begins):
    """Captions of the mean thought of each segment: n dicts, first frame -> caption."""
    means = [frames[a:b].mean(0) for frames, some in zip(watched.thoughts, begins)
             for a, b in zip(some, [*some[1:], T])]
    captions = iter(captions_of(run, torch.stack(means)))
    return [{begin: next(captions) for begin in some} for some in begins]

def sweep(watched, run, way, n=16):
    """(decodes, exact match) of a way for n thresholds, by the number of decodes."""
    frames = watched.pictures.flatten(2) if way == "pixels" else watched.thoughts
    steps = (frames[:, 1:] - frames[:, :-1]).square().mean(-1).clamp(min=1e-8)
    high = 4 * steps.max().item()
    points = []
    for threshold in np.geomspace(high / 1e4, high, n):
        if way == "clustering":
            begins = [by_clustering(some, threshold) for some in frames]
            points.append(quality(watched, begins, said_of_segments(run, watched, begins)))
        else:
            points.append(quality(watched, [by_variance(some, threshold) for some in frames]))
    return sorted(points)

def stream_figures(speaker, n):
    """Exact match at equal numbers of decodes, and the ratio of decodes at equal quality."""
    found = {}
    for rate in RATES:
        watched = watch(speaker, rate, n)
        random_ = random.Random(f"{speaker.cfg.task_seed} moments")
        changes = [sum(a != b for a, b in zip(truth, truth[1:])) for truth in watched.truth]
        found[f"changes_{rate}"] = sum(changes) / n
        ways = "variance", "pixels", "clustering"
        curves = {way: sweep(watched, speaker.run, way) for way in ways}
        for k in BUDGETS:
            simple = dict(uniform=[uniform(k)] * n,
                          random=[at_random(random_, k) for _ in range(n)],
                          oracle=[oracle(random_, truth, k) for truth in watched.truth])
            for way, moments in simple.items():
                found[f"stream_{rate}_{way}_{k}"] = quality(watched, moments)[1]
            for way, points in curves.items():
                found[f"stream_{rate}_{way}_{k}"] = float(np.interp(k, *zip(*points)))
        for period in PERIODS:
            decodes, wanted = quality(watched, [uniform(T // period)] * n)
            found[f"uniform_{rate}_{period}"] = wanted
            for way, points in curves.items():
                # all frames, where no threshold reaches that quality
                needed = min((count for count, share in points if share >= wanted), default=T)
                found[f"ratio_{rate}_{way}_{period}"] = decodes / needed
    return found
