"""
Probes: texts with a class each, and which of them are fitted on, chosen by and tested.

Of the facts, by logistic regression on the mean latent of a text:

    relation    which relation does a question ask for? Over wordings and subjects not fitted on
    continent   on which continent is the country of a question? Over countries not fitted on
    kind        is a name a country, a book, a painter ...? Over names not fitted on

Of real text: supersense of a WordNet gloss, type of a question (TREC), sentiment (SST-2). The
penalty is chosen on dev; test is read once.
"""
import collections
import random
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

import data
from labs.measures import logistic_probe

FOLDER = Path(data.__file__).parent / "probes"
FOLDS = 5
PENALTIES = (10.0, 1.0, 0.1, 0.01)      # lighter ones take longest
PROBES = {"facts": ("relation", "continent", "kind"), "glosses": ("supersense", "trec", "sst2")}
# kinds of the subjects and of the answers of each relation
SUBJECTS = dict(capital="country", author="book", painter="painting", inventor="invention",
                composer="music", symbol="element", landmark_city="landmark")
ANSWERS = dict(capital="city", landmark_city="city", continent="continent", currency="currency",
               language="language", author="author", painter="painter", inventor="inventor",
               composer="composer", symbol="symbol")

class Probe(NamedTuple):
    """n texts with a class each; splits: (train, dev, test) as bool (n,), one triple or several."""
    texts: list
    labels: list
    splits: list

    def thinned(self, k):
        """Every k-th text and one split: a quick look."""
        split = tuple(rows[::k] for rows in self.splits[0])
        return Probe(self.texts[::k], self.labels[::k], [split])

def folds(*groups, shuffled=True):
    """Splits of n items: FOLDS times train, dev, test.

    groups: lists of n names. What is tested shares no name of any list with what was fitted on;
    items that share some names are left out.
    """
    def fold(names):
        """The fold of each item, (n,): items of one name stay together."""
        order = sorted(set(names))
        if shuffled:
            order = random.Random(0).sample(order, len(order))
        return torch.tensor([order.index(name) % FOLDS for name in names])
    of = torch.stack([fold(names) for names in groups])                 # (lists, n)
    splits = []
    for test in range(FOLDS):
        dev = (test + 1) % FOLDS
        fitted = ((of != test) & (of != dev)).all(0)
        splits.append((fitted, (of == dev).all(0), (of == test).all(0)))
    return splits

def accuracy(x, probe, tune, penalties=PENALTIES):
    """Accuracy on test, in tuning on dev, mean over the splits: x (n, C) of a probe's n texts."""
    classes = sorted(set(probe.labels))
    y = torch.tensor([classes.index(label) for label in probe.labels])  # (n,)
    scores = []
    for fitted, dev, test in probe.splits:
        parts = [(x[rows], y[rows]) for rows in (fitted, dev, dev if tune else test)]
        scores.append(logistic_probe(*parts, penalties)[0])
    return statistics.mean(scores)

# -- the facts -------------------------------------------------------------------------------------

def written(corpus):
    """The questions about facts as the templates have them, without noise."""
    return [row for row in corpus.qa
            if row.split != "NEVER" and row.phrasing in ("trained", "heldout")]

def continents(corpus):
    """Questions that name a country, and its continent: (question, continent, country)."""
    rows = written(corpus)
    of = {row.subject: row.answer for row in rows if row.relation == "continent"}
    return [(row.question, of[row.subject], row.subject) for row in rows
            if row.relation in ("capital", "currency", "language") and row.subject in of]

def kinds(corpus):
    """Names of the facts and their kinds: (name, kind). A name of two kinds is left out."""
    of = collections.defaultdict(set)
    for row in corpus.qa:
        if row.split != "NEVER":
            of[row.answer].add(ANSWERS[row.relation])
            if row.relation in SUBJECTS:
                of[row.subject].add(SUBJECTS[row.relation])
    return sorted((name, *found) for name, found in of.items() if len(found) == 1)

def facts_probes(corpus):
    """The three probes of the facts, name -> `Probe`."""
    rows = written(corpus)
    # the n-th question about a fact has the n-th wording of its relation
    times = collections.Counter()
    wordings = []
    for row in rows:
        wordings.append(f"{row.relation} {times[row.relation, row.subject]}")
        times[row.relation, row.subject] += 1
    subjects = [row.subject for row in rows]
    relation = Probe([row.question for row in rows], [row.relation for row in rows],
                     folds(wordings, subjects))
    # three wordings of 17 are enough
    heldout = {row.question for row in rows if row.phrasing == "heldout"}
    places = [row for row in continents(corpus) if row[0] in heldout]
    questions, continent_of, countries = zip(*places)
    names, kind_of = zip(*kinds(corpus))
    return dict(relation=relation, continent=Probe(questions, continent_of, folds(countries)),
                kind=Probe(names, kind_of, folds(names)))

def text_probes():
    """The probes of real text that data/probes/prepare.py has written, name -> `Probe`."""
    found = {}
    for name in PROBES["glosses"]:
        path = FOLDER / f"{name}.tsv"
        if path.exists():
            parts, labels, texts = zip(*data.read_rows(path, lambda *row: row))
            split = tuple(torch.tensor([part == which for part in parts])
                          for which in ("train", "dev", "test"))
            found[name] = Probe(texts, labels, [split])
    if not found:
        raise ValueError(f"{FOLDER} holds no probe: run `python data/probes/prepare.py` first")
    return found
