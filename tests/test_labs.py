"""What a table of a lab can be trusted for, one property a test. Nothing is trained here."""
import dataclasses
import json
import os

import pytest
import torch

import train
from labs import arms, collapse
from tests import toy


def flags(tmp_path, **changes):
    return arms.Flags(**(dict(seeds=2, out=str(tmp_path)) | changes))


ARMS = {"a": train.Config(), "b": train.Config(sigreg=0.0)}


def test_an_arm_on_disk_is_not_run_again(tmp_path):
    ran = []

    def measure(cfg):
        ran.append((cfg.sigreg, cfg.seed, cfg.out))
        train.Path(cfg.out).mkdir(parents=True)
        return dict(score=cfg.seed + cfg.sigreg)
    first = arms.run_arms("lab", ARMS, flags(tmp_path, seeds=1, arms="b"), measure)
    assert [(row["arm"], row["seed"], row["score"]) for row in first] == [("b", 0, 0.0)]
    rows = arms.run_arms("lab", ARMS, flags(tmp_path), measure)
    assert len(ran) == len(set(ran)) == 4 and len(rows) == 4
    assert (tmp_path / "lab.csv").read_text().count("\n") == 5


def test_rows_before_an_arm_that_fails_are_kept(tmp_path):
    def measure(cfg):
        if cfg.sigreg == 0:
            raise ValueError("no")
        train.Path(cfg.out).mkdir(parents=True)
        return dict(score=1.0)
    with pytest.raises(ValueError, match="no"):
        arms.run_arms("lab", ARMS, flags(tmp_path), measure)
    assert json.loads((tmp_path / "lab" / "a_0" / "result.json").read_text())["score"] == 1.0


def test_an_arm_that_fails_stops_no_other_is_named_and_ends_the_lab_with_its_error(tmp_path, capsys):
    def measure(cfg):
        if cfg.sigreg == ARMS["a"].sigreg:
            raise RuntimeError("out of memory")
        train.Path(cfg.out).mkdir(parents=True)
        return {}
    with pytest.raises(RuntimeError, match="out of memory"):
        arms.run_arms("lab", ARMS, flags(tmp_path, seeds=1), measure)
    assert [row["arm"] for row in arms.results("lab", flags(tmp_path))] == ["b"]
    assert "an arm failed: RuntimeError('out of memory')" in capsys.readouterr().out


def test_arms_side_by_side_run_in_other_processes_and_one_that_fails_stops_no_other(tmp_path):
    with pytest.raises(ValueError, match="no"):
        arms.run_arms("lab", dict(b=ARMS["b"], a=ARMS["a"]), flags(tmp_path, jobs=2), toy.measure)
    rows = arms.run_arms("lab", ARMS, flags(tmp_path, arms="a"), None)                  # all from the disk
    assert [(row["arm"], row["seed"], row["score"]) for row in rows] == [("a", 0, 0), ("a", 1, 1)]
    assert os.getpid() not in {row["process"] for row in rows}


def test_arms_side_by_side_share_the_threads(tmp_path):
    """Two processes of two threads each on two cores were measured: ten minutes for what takes three."""
    threads = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        rows = arms.run_arms("lab", dict(a=ARMS["a"]), flags(tmp_path, jobs=2), toy.measure)
    finally:
        torch.set_num_threads(threads)
    assert [row["threads"] for row in rows] == [3, 3]


def test_an_unknown_arm_names_those_that_there_are(tmp_path):
    with pytest.raises(ValueError, match="--arms=c.*a, b"):
        arms.run_arms("lab", ARMS, flags(tmp_path, arms="c"))


def test_table_shows_mean_and_spread_and_says_what_is_missing():
    rows = [dict(arm="a", seed=seed, score=score) for seed, score in enumerate((1.0, 2.0, 3.0))] + [dict(arm="b", seed=0)]
    text = arms.table(rows, ARMS, {"the score": "score"})
    assert "| a | 2.000 ± 1.000 |" in text and "| b | not measured |" in text
    assert "(1 seed)" in arms.table(rows[:1], ARMS, {"the score": "score"})
    assert "| a | 1.500 ± 0.707 (2 seeds) |" in arms.table(rows[:2], ARMS, {"the score": "score"})


def test_a_table_is_written_between_its_markers_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- lab -->\nold\n<!-- /lab -->\nafter\n")
    arms.publish("lab", [dict(commit="abc")], "| new |", str(page))
    text = page.read_text()
    assert text.startswith("before\n<!-- lab -->") and text.endswith("after\n") and "| new |" in text and "old" not in text
    assert "abc" in text
    with pytest.raises(ValueError, match="<!-- other -->"):
        arms.publish("other", [dict(commit="abc")], "| new |", str(page))


def result(arm, seed, spread, found):
    """A row whose health word follows from spread, and whose worth follows from R@1."""
    return dict(arm=arm, seed=seed, std=spread, share=1.0, rank=128.0, bound=128, r1_LAT_heldout=found)


def test_health_word_is_judged_on_runs_that_it_was_not_derived_from():
    rows = [result("random-init encoder", 0, 0.4, 0.3)]
    rows += [result("no stop-gradient", 0, 0.1, 0.1), result("frozen random target", 0, 0.3, 0.6)]      # derive
    rows += [result("no stop-gradient", 1, 0.1, 0.1), result("paper", 0, 0.3, 0.6), result("paper", 1, 0.3, 0.1)]
    text = collapse.verdicts(rows, list(collapse.ARMS))
    assert "Right: 1 of 2" in text and "up to a spread (std * rank / bound) of 0.100, healthy from 0.300" in text
    assert "| healthy | 0 | 1 |" in text and "| collapsed | 0 | 1 |" in text


def test_arms_of_the_collapse_lab_share_tokens_and_width():
    shared = ("batch_size", "block_size", "n_embd", "n_layer", "mask_ratio", "pretrain_lr", "distill_steps", "vocab_size")
    for cfg in collapse.ARMS.values():
        assert all(getattr(cfg, name) == getattr(collapse.BASE, name) for name in shared)
        assert cfg.pretrain_steps in (0, collapse.BASE.pretrain_steps)


def test_probe_countries_have_one_continent_each():
    import data
    corpus = data.load(train.Config())
    of = {}
    for question, continent, country in collapse.continents(corpus):
        assert country[4:] in question and of.setdefault(country, continent) == continent
    assert len(of) > 30 and len(set(of.values())) >= 5


def test_a_result_of_another_arm_of_that_name_is_not_taken_for_this_one(tmp_path):
    """What `default` means may change: old figures must not be printed as new ones."""
    flags = arms.Flags(seeds=1, out=str(tmp_path), arms="a")
    assert len(arms.run_arms("lab", ARMS, flags, toy.measure)) == 1
    first = arms.run_arms("lab", ARMS, flags, toy.measure)                     # it is on disk: not run again
    assert first[0]["config"] == arms.settings(ARMS["a"])
    changed = dict(ARMS, a=dataclasses.replace(ARMS["a"], mlm=0.0))
    with pytest.raises(ValueError, match="measured with mlm=1.0, and now it is 0.0"):
        arms.run_arms("lab", changed, flags, toy.measure)
