"""Fixtures of several files: no curves are drawn, and one whole run is shared."""
import os

# Models of toy size are faster with one thread, and a busy machine cannot make two wait for each
# other. Set before torch is imported; processes and kernels that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import data
import report
import train
from tests.toy import World, config, write_corpus


@pytest.fixture(autouse=True, scope="session")
def draw(tmp_path_factory):
    """Replaces the drawing of curves; the value of the fixture is the real function.

    At toy size drawing takes longer than training: only the test of the picture draws one.
    """
    real = report.draw_curves
    report.draw_curves = lambda *args, **kwargs: None
    yield real
    report.draw_curves = real


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Text, pairs and a run through all three phases, for tests that only read them."""
    folder = tmp_path_factory.mktemp("world")
    write_corpus(folder)
    cfg = config(folder, folder / "run")
    return World(folder, cfg, train.run(cfg))


@pytest.fixture(scope="module")
def corpus():
    """The shipped facts."""
    return data.load(train.Config())


@pytest.fixture(scope="module")
def questions(corpus):
    """The questions of the shipped facts."""
    return data.Questions(corpus.qa, corpus.tokenizer, 64, 24, "cpu")
