"""The grammar of the hierarchy lab is the one of the theory, and P* follows from the probes."""
import dataclasses
import math

import pytest
import torch

from labs import hierarchy
from labs.hierarchy import BASE, FLOOR, Grammar, crossing, draw_sentences
from labs.tables import Figure

SMALL = dataclasses.replace(BASE, depth=3, block_size=8, symbols=6, rules=2, sentences=200)


def seeded(seed=0):
    """A generator."""
    return torch.Generator().manual_seed(seed)


# -- the grammar -----------------------------------------------------------------------------------
def test_no_pair_has_two_parents():
    """Two parents would make a sentence ambiguous."""
    for rules in Grammar(SMALL).rules:
        assert rules.shape == (6, 2, 2)
        assert len(rules.flatten(0, 1).unique(dim=0)) == 12


def test_the_parse_of_a_sentence_is_its_derivation():
    """Derive the two highest levels again, symbol by symbol, from the same random numbers."""
    grammar = Grammar(SMALL)
    levels = grammar.parse(grammar.draw(500, seeded()))
    assert [level.shape[1] for level in levels] == [8, 4, 2, 1]
    generator = seeded()
    root = torch.randint(6, (500, 1), generator=generator)
    which = torch.randint(2, (500, 1), generator=generator)
    assert torch.equal(levels[3], root)
    assert torch.equal(levels[2], grammar.rules[0][root[:, 0], which[:, 0]])


def test_each_pair_of_a_sentence_follows_a_rule_of_its_parent():
    """At each level: the pair is one of the m pairs of the symbol above it."""
    grammar = Grammar(SMALL)
    levels = grammar.parse(grammar.draw(50, seeded()))
    for below, above, rules in zip(levels, levels[1:], reversed(grammar.rules)):
        for pair, symbol in zip(below.reshape(-1, 2), above.flatten()):
            assert (rules[symbol] == pair).all(1).any()


def test_a_pair_without_a_rule_is_not_parsed():
    """A wrong sentence must not get labels."""
    grammar = Grammar(SMALL)
    tokens = grammar.draw(1, seeded())
    made = {tuple(pair) for pair in grammar.rules[-1].flatten(0, 1).tolist()}
    odd = next((a, b) for a in range(6) for b in range(6) if (a, b) not in made)
    tokens[0, 2:4] = torch.tensor(odd)
    with pytest.raises(ValueError, match="level 0 has no rule"):
        grammar.parse(tokens)


def test_every_rule_and_root_is_used():
    """Uniform draws: no symbol is rare."""
    grammar = Grammar(SMALL)
    tokens = grammar.draw(3000, seeded())
    pairs = tokens.view(-1, 2)
    count = (pairs[:, 0] * 6 + pairs[:, 1]).bincount(minlength=36)
    assert (count > 0).sum() == 12
    assert grammar.parse(tokens)[-1].flatten().bincount(minlength=6).min() > 400


def test_a_seed_is_a_grammar():
    """Arms of a seed share it; another seed has another one."""
    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a.rules, b.rules))
    assert same(Grammar(SMALL), Grammar(SMALL))
    assert not same(Grammar(SMALL), Grammar(dataclasses.replace(SMALL, seed=1)))


def test_sentences_are_distinct_and_nested_and_the_probes_have_new_ones():
    """A small P is part of a larger one, and what is probed was not learned from."""
    few, many = (dataclasses.replace(SMALL, sentences=size) for size in (50, 300))
    small, new = draw_sentences(Grammar(few), few)
    large, same_new = draw_sentences(Grammar(many), many)
    assert len(small) == 50
    assert torch.equal(large[:50], small) and torch.equal(new, same_new)
    everything = torch.cat((large, new))
    assert len(everything.unique(dim=0)) == len(everything)


def test_more_sentences_than_there_are_is_refused():
    """Repetitions would make P a lie."""
    cfg = dataclasses.replace(SMALL, sentences=400)
    with pytest.raises(ValueError, match="--sentences=400.*ask for fewer"):
        draw_sentences(Grammar(cfg), cfg)


def test_as_many_rules_as_symbols_would_be_noise():
    """Then every pair is allowed."""
    with pytest.raises(ValueError, match="--rules=6 must be .* below --symbols=6"):
        dataclasses.replace(SMALL, rules=6)


# -- the arms --------------------------------------------------------------------------------------
def test_arms_share_all_but_objective_and_sentences():
    """Otherwise P* would compare more than the objectives."""
    differ = {"depth", "block_size", "sentences", "objective", "pretrain_steps"}
    for change in hierarchy.OBJECTIVES.values():
        differ |= set(change)
    shared = set(BASE.__dataclass_fields__) - differ
    assert {"batch_size", "n_embd", "n_layer", "pretrain_lr", "mask_ratio", "max_span"} <= shared
    for name, cfg in hierarchy.grid(hierarchy.SIZES).items():
        assert all(getattr(cfg, field) == getattr(BASE, field) for field in shared), name
        assert cfg.pretrain_steps == (0 if name.startswith(FLOOR) else BASE.pretrain_steps)
        assert cfg.variant.startswith(("LearnedPositions", "Data2Vec")), name


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Figures of a small grammar, of a random-init encoder and of a masked LM."""
    easy = dataclasses.replace(
        SMALL, n_layer=2, top_k=2, n_embd=32, pred_embd=16, batch_size=64, pretrain_lr=5e-3,
        sentences=250, nodes=2000, device="cpu")
    changes = {"random": dict(pretrain_steps=0),
               "masked LM": dict(pretrain_steps=250, **hierarchy.OBJECTIVES["masked LM"])}
    folder = tmp_path_factory.mktemp("hierarchy")
    return {name: hierarchy.measure(dataclasses.replace(easy, out=str(folder / name), **change))
            for name, change in changes.items()}


def test_a_masked_lm_finds_the_symbols_above_the_tokens(measured):
    """The lab can show learning."""
    assert measured["masked LM"]["level_1"] > measured["random"]["level_1"] + 0.07


# -- from probes to P* -----------------------------------------------------------------------------
def test_crossing_is_on_a_line_in_log_p():
    """Half-way in the probe is half-way in log P; outside of what was tried it says so."""
    points = [(16, 0.2), (64, 0.4), (256, 0.8)]
    assert crossing(points, 0.6) == pytest.approx(128)
    assert crossing(points, 0.4) == pytest.approx(64)
    assert crossing(points, 0.9) == math.inf
    assert crossing(points, 0.1) == 0


def rows(stars):
    """Measured rows of grammars of depth 4: the probe of level 1 crosses .6 at a P for each seed.

    Levels 2 and 3 are not found; the random-init encoder has .2 everywhere.
    """
    found = []
    for seed, star in enumerate(stars):
        floor = dict(seed=seed, depth=4, level_1=0.2, level_2=0.2, level_3=0.2)
        found.append(floor | dict(arm=f"{FLOOR} L4", objective=FLOOR, sentences=1))
        for size, probe in ((star / 2, 0.5), (star * 2, 0.7)):
            arm = dict(arm=f"latent L4 P{size:.0f}", objective="latent", sentences=size)
            found.append(floor | arm | dict(level_1=probe))
    return found


@pytest.mark.parametrize("grows, slope", [(BASE.rules, 1.0), (1, 0.0)])
def test_slope_is_one_if_p_star_grows_by_m_a_level_and_zero_if_it_stays(grows, slope):
    """One slope for each seed, whatever its P* at level 1 is."""
    needed = {level: {0: 100.0 * grows ** level, 1: 300.0 * grows ** level} for level in (1, 2, 3)}
    assert hierarchy.slopes(needed) == pytest.approx([slope, slope], abs=1e-9)


def test_a_p_star_that_was_not_found_has_no_part_in_a_slope():
    """One level is no line; the words say on which side of what was tried it lies."""
    assert hierarchy.slopes({1: {0: 64.0}, 2: {0: math.inf}, 3: {0: 0.0}}) == []
    assert hierarchy.in_words({0: 0.0, 1: 70.4, 2: math.inf}, [16, 256]) == "< 16, 70, > 256"


def test_p_star_of_measured_rows_has_the_names_of_the_older_table():
    """So that one table and one plot show both."""
    summary, = hierarchy.summaries(rows([100.0, 300.0]))
    assert summary["arm"] == "latent"
    assert summary["needed_L4_level_1"] == Figure("100, 300", None, 2)
    assert "slope_over_levels" not in summary


def test_the_page_shows_p_star_and_probes():
    """Measured rows, and only the arms that were run."""
    text = hierarchy.page(rows([100.0, 300.0]))
    assert "| latent | 100, 300 |" in text
    assert "| masked LM |" not in text
    assert "| random-init encoder L4 | 0.200 ± 0.000 (2 seeds) |" in text
