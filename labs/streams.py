"""
Selective decoding [VL-JEPA]: thoughts are cheap, words are not. When is decoding needed?

    watch       streams of frames in which the scene changes at random times, and their thoughts
    moments     uniform, random and oracle; a windowed variance above a threshold, of thoughts or of
                pixels; segments by clustering
    figures     exact match of the caption at every frame, against the number of decodes

Between two decodes the last caption stays. Clustering looks at the whole stream, and decodes the
mean thought of each segment. The light changes too, at random times, and objects tremble: no
caption tells that.

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
    scenes: list                # n lists of T scenes
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
    """`Watched` of n streams."""
    random_, rng = speaker.draws(f"streams {rate}")
    scenes = [world.stream(random_, T, rate) for _ in range(n)]
    pictures, thoughts, said = [], [], []
    for frames in scenes:
        batch = eyes.captions(speaker.words, frames, rng, [0], world.steady_look(T, rng), random_)
        # a decoder norms what it reads; so do distances between thoughts
        thoughts.append(tjepa.norm(speaker.think(batch)).flatten(1))
        pictures.append(batch.pictures)
        said.append(captions_of(speaker.run, thoughts[-1]))
    truth = [[tuple(world.caption(scene)) for scene in frames] for frames in scenes]
    return Watched(scenes, torch.stack(pictures), torch.stack(thoughts), said, truth)

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

def by_variance(frames, threshold, window=WINDOW):
    """Moments at which the variance of the newest frames passes a threshold: frames (T, D).

    The window starts anew with each moment, so that one change is decoded once.
    """
    moments = [0]
    for t in range(1, len(frames)):
        begin = max(moments[-1], t + 1 - window)
        variance = frames[begin:t + 1].var(0, correction=0).mean().item()
        if variance > threshold:
            moments.append(t)
    return moments

def by_clustering(frames, most):
    """Segments by Ward's method with temporal connectivity: the first frame of each.

    frames (T, D). The neighbours whose union costs least are joined, until it costs more than
    `most`. The cost is the growth of the sum of squared distances from the means.
    """
    means, sizes, begins = list(frames), [1] * len(frames), list(range(len(frames)))

    def cost(i):
        """Of joining segment i and the next one."""
        weight = sizes[i] * sizes[i + 1] / (sizes[i] + sizes[i + 1])
        return weight * (means[i] - means[i + 1]).square().mean().item()
    costs = [cost(i) for i in range(len(means) - 1)]
    while costs and min(costs) <= most:
        i = costs.index(min(costs))
        size = sizes[i] + sizes[i + 1]
        means[i] = (sizes[i] * means[i] + sizes[i + 1] * means[i + 1]) / size
        sizes[i] = size
        for part in (means, sizes, begins):
            del part[i + 1]
        del costs[i]
        for j in (i - 1, i):
            if 0 <= j < len(costs):
                costs[j] = cost(j)
    return begins

# -- figures ---------------------------------------------------------------------------------------

def held(moments, said):
    """The caption at every frame, if each decoded one stays until the next: said by frame."""
    return [said[max(m for m in moments if m <= t)] for t in range(T)]

def share_right(watched, shown):
    """Exact match over all frames: shown, n lists of T captions."""
    pairs = [(a, b) for some, truth in zip(shown, watched.truth) for a, b in zip(some, truth)]
    return sum(a == b for a, b in pairs) / len(pairs)

def quality(watched, moments):
    """(decodes a stream, exact match) where the last decoded caption stays. moments: n lists."""
    shown = [held(some, said) for some, said in zip(moments, watched.said)]
    return sum(map(len, moments)) / len(moments), share_right(watched, shown)

def quality_of_segments(run, watched, begins):
    """The same for segments, whose mean thought is decoded."""
    means = []
    for frames, some in zip(watched.thoughts, begins):
        ends = [*some[1:], T]
        means += [frames[a:b].mean(0) for a, b in zip(some, ends)]
    captions = iter(captions_of(run, torch.stack(means)))
    shown = []
    for some in begins:
        ends = [*some[1:], T]
        shown.append([said for a, b in zip(some, ends) for said in (next(captions),) * (b - a)])
    return sum(map(len, begins)) / len(begins), share_right(watched, shown)

def sweep(watched, run, way, n=16):
    """(decodes, exact match) of a way for n thresholds, by the number of decodes."""
    frames = watched.pictures.flatten(2) if way == "pixels" else watched.thoughts
    steps = (frames[:, 1:] - frames[:, :-1]).square().mean(-1).clamp(min=1e-8)
    high = 4 * steps.max().item()
    points = []
    for threshold in np.geomspace(high / 1e4, high, n):
        if way == "clustering":
            begins = [by_clustering(some, threshold) for some in frames]
            points.append(quality_of_segments(run, watched, begins))
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
        curves = {way: sweep(watched, speaker.run, way)
                  for way in ("variance", "pixels", "clustering")}
        for k in BUDGETS:
            simple = dict(
                uniform=[uniform(k)] * n, random=[at_random(random_, k) for _ in range(n)],
                oracle=[oracle(random_, truth, k) for truth in watched.truth])
            for way, moments in simple.items():
                found[f"stream_{rate}_{way}_{k}"] = quality(watched, moments)[1]
            for way, points in curves.items():
                value = np.interp(k, *zip(*points))
                found[f"stream_{rate}_{way}_{k}"] = float(value)
        for period in PERIODS:
            decodes, wanted = quality(watched, [uniform(T // period)] * n)
            found[f"uniform_{rate}_{period}"] = wanted
            for way, points in curves.items():
                # all frames, where no threshold reaches that quality
                needed = min((count for count, share in points if share >= wanted), default=T)
                found[f"ratio_{rate}_{way}_{period}"] = decodes / needed
    return found
