"""The grammar of the hierarchy lab is what theory speaks of, and P* is read off the probes as the page says."""
import dataclasses
import math

import pytest
import torch

import train
from labs import hierarchy
from labs.hierarchy import BASE, Grammar, crossing, draw_sentences

SMALL = dataclasses.replace(BASE, depth=3, block_size=8, symbols=6, rules=2, sentences=200)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_no_pair_has_two_parents():
    for rules in Grammar(SMALL).rules:
        pairs = rules.flatten(0, 1)                                     # (v * m, 2)
        assert rules.shape == (6, 2, 2) and len(pairs.unique(dim=0)) == 12


def test_sentences_follow_the_rules_and_the_parse_is_the_derivation():
    grammar = Grammar(SMALL)
    tokens, top, middle, words = grammar.draw(500, seeded()), *grammar.rules
    generator = seeded()                                                # the derivation again, symbol by symbol
    root = torch.randint(6, (500, 1), generator=generator)
    which = torch.randint(2, (500, 1), generator=generator)
    second = torch.stack([top[r, k] for r, k in zip(root[:, 0], which[:, 0])])                          # (500, 2)
    levels = grammar.parse(tokens)
    assert [part.shape[1] for part in levels] == [8, 4, 2, 1]
    assert torch.equal(levels[0], tokens) and torch.equal(levels[3], root) and torch.equal(levels[2], second)
    for below, above, rules in zip(levels, levels[1:], (words, middle, top)):
        for pair, symbol in zip(below.view(-1, 2)[:200], above.flatten()[:200]):
            assert (rules[symbol] == pair).all(1).any()


def test_what_no_rule_makes_is_not_parsed():
    grammar = Grammar(SMALL)
    tokens, made = grammar.draw(1, seeded()), {tuple(pair.tolist()) for pair in grammar.rules[-1].flatten(0, 1)}
    tokens[0, 2:4] = torch.tensor(next((a, b) for a in range(6) for b in range(6) if (a, b) not in made))
    with pytest.raises(ValueError, match="level 0 has no rule"):
        grammar.parse(tokens)


def test_every_rule_is_used_about_equally():
    grammar = Grammar(SMALL)
    pairs = grammar.draw(3000, seeded()).view(-1, 2)
    count = (pairs[:, 0] * 6 + pairs[:, 1]).bincount(minlength=36)
    roots = grammar.parse(grammar.draw(3000, seeded()))[-1].flatten().bincount(minlength=6)
    assert (count > 0).sum() == 12 and roots.min() > 400


def test_a_seed_is_a_grammar():
    same, other = Grammar(SMALL), Grammar(dataclasses.replace(SMALL, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(Grammar(SMALL).rules, same.rules))
    assert not all(torch.equal(a, b) for a, b in zip(same.rules, other.rules))


def test_sentences_are_distinct_nested_and_none_is_probed_that_was_learned_from():
    few, many = (dataclasses.replace(SMALL, sentences=size) for size in (50, 300))
    (small, new), (large, same_new) = (draw_sentences(Grammar(cfg), cfg) for cfg in (few, many))
    assert torch.equal(large[:50], small) and torch.equal(new, same_new)
    everything = torch.cat((large, new))
    assert len(small) == 50 and len(everything.unique(dim=0)) == len(everything)
    with pytest.raises(ValueError, match="--sentences=400.*ask for fewer"):
        draw_sentences(Grammar(SMALL), dataclasses.replace(SMALL, sentences=400))


def test_as_many_rules_as_symbols_would_be_noise():
    with pytest.raises(ValueError, match="--rules=6 must be .* below --symbols=6"):
        dataclasses.replace(SMALL, rules=6)


def test_all_arms_share_all_but_objective_and_sentences():
    shared = [name for name in BASE.__dataclass_fields__ if name not in (
        "depth", "block_size", "sentences", "objective", "pretrain_steps",
        *(name for change in hierarchy.OBJECTIVES.values() for name in change))]
    assert {"batch_size", "n_embd", "n_layer", "pretrain_lr", "mask_ratio", "max_span", "positions"} <= set(shared)
    arms = hierarchy.grid(hierarchy.SIZES, {})
    for name, cfg in arms.items():
        assert all(getattr(cfg, field) == getattr(BASE, field) for field in shared), name
        assert cfg.pretrain_steps == (0 if name.startswith(hierarchy.FLOOR) else BASE.pretrain_steps)
    assert not any("," in name or "/" in name for name in arms)


def test_crossing_is_a_line_in_log_p_and_outside_of_what_was_tried_it_says_so():
    points = [(16, 0.2), (64, 0.4), (256, 0.8)]
    assert crossing(points, 0.6) == pytest.approx(128) and crossing(points, 0.4) == pytest.approx(64)
    assert crossing(points, 0.9) == math.inf and crossing(points, 0.1) == 0


def rows(stars):
    """Rows of grammars of depth 2, 3, 4, whose probe of level L-1 passes the threshold, .6, at a P* a seed."""
    found = []
    for depth, by_seed in stars.items():
        for seed, star in enumerate(by_seed):
            shape = dict(depth=depth, seed=seed)
            found.append(shape | dict(objective=hierarchy.FLOOR, sentences=1, **{f"level_{depth - 1}": 0.2}))
            found += [shape | dict(objective="latent", sentences=size, **{f"level_{depth - 1}": probe})
                      for size, probe in ((star / 2, 0.5), (star * 2, 0.7))]
    return found


def test_slope_is_one_where_p_star_grows_by_m_a_level_and_zero_where_it_stays():
    m = BASE.rules
    for grows, slope in ((m, 1.0), (1, 0.0)):
        found = rows({depth: [100.0 * grows ** depth, 300.0 * grows ** depth] for depth in (2, 3, 4)})
        needed = {depth: hierarchy.samples_needed(found, "latent", depth, depth - 1) for depth in (2, 3, 4)}
        assert needed[3] == pytest.approx({0: 100.0 * grows ** 3, 1: 300.0 * grows ** 3})
        assert hierarchy.slopes(needed) == pytest.approx([slope, slope], abs=1e-9)


def test_a_p_star_that_was_not_found_is_no_part_of_a_slope():
    assert hierarchy.slopes({1: {0: 64.0}, 2: {0: math.inf}, 3: {0: 0.0}}) == []
    assert hierarchy.cell({0: 0.0, 1: 70.4, 2: math.inf}, [16, 256]) == "< 16, 70, > 256"


def test_the_tables_and_the_figure_show_what_was_found(tmp_path):
    found = rows({depth: [40.0 * BASE.rules ** depth, 40.0 * BASE.rules ** depth] for depth in (2, 3, 4)})
    columns = {f"L = {depth}": (depth, depth - 1) for depth in (2, 3, 4)}
    text, table = hierarchy.summary(found, columns), hierarchy.probes(found, 2)
    assert "| latent | 360, 360 | 1080, 1080 | 3240, 3240 | 1.00 ± 0.00 |" in text
    assert "| masked LM |" not in text                                   # nothing was run: it has no row
    assert "| random-init encoder | 0.20, 0.20 | 0.20, 0.20 |" in table
    assert "| latent | 0.50, 0.50 | 0.70, 0.70 |" in table
    for row in found:                                                   # the figure wants every level of the deepest
        row.update({name: row.get(name, 0.3) for name in ("level_1", "level_2", "level_3")})
    hierarchy.draw(found, [2, 3, 4], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """level_1 of a small grammar: of a random-init encoder, and of a masked LM and a latent arm after some steps."""
    easy = dataclasses.replace(SMALL, n_layer=2, top_k=2, n_embd=32, pred_embd=16, batch_size=64, pretrain_lr=5e-3,
                               sentences=250, nodes=600, device="cpu")
    changes = {"random": dict(pretrain_steps=0),
               "masked LM": dict(pretrain_steps=250, **hierarchy.OBJECTIVES["masked LM"])}
    folder = tmp_path_factory.mktemp("hierarchy")
    return {name: hierarchy.measure(dataclasses.replace(easy, out=str(folder / name), **change))
            for name, change in changes.items()}


def test_a_masked_lm_finds_the_symbols_above_the_tokens(measured):
    assert measured["masked LM"]["level_1"] > measured["random"]["level_1"] + 0.1
