"""What a table of a lab can be trusted for, one property a test. Nothing is trained here."""
import csv
import dataclasses
import importlib
import os

import pytest
import torch

import train
from labs import arms, collapse, plots, probes, records, tables, teaching, text
from tests import toy


def flags(tmp_path, **changes):
    folders = dict(out=str(tmp_path / "out"), results=str(tmp_path))
    return arms.Flags(**(dict(seeds=2) | folders | changes))


def older(tmp_path, *rows):
    """Write a results file as an older table gives it; rows: arm, figure, mean, deviation,
    seeds."""
    fields = "arm", "figure", "value", "deviation", "seeds"
    given = [dict(zip(fields, row)) | dict(commit="abc def", device="a CPU") for row in rows]
    records.append(tmp_path / "lab.csv", given)


def lines_of(tmp_path):
    return (tmp_path / "lab.csv").read_text().splitlines()


ARMS = {"a": train.Config(), "b": train.Config(sigreg=0.0)}


def test_an_arm_with_results_is_skipped_and_its_rows_are_appended_once(tmp_path, capsys):
    ran = []

    def measure(cfg):
        ran.append((cfg.sigreg, cfg.seed, cfg.out))
        return dict(score=cfg.seed + cfg.sigreg, health="healthy")
    first = arms.run_arms("lab", ARMS, flags(tmp_path, seeds=1, arms="b"), measure)
    row, = first
    assert (row["arm"], row["seed"], row["score"], row["health"]) == ("b", 0, 0.0, "healthy")
    before = lines_of(tmp_path)
    rows = arms.run_arms("lab", ARMS, flags(tmp_path), measure)
    assert len(ran) == len(set(ran)) == 4 and len(rows) == 4
    assert lines_of(tmp_path)[:len(before)] == before and len(set(lines_of(tmp_path))) == 1 + 4 * 3
    assert "1 runs are in" in capsys.readouterr().out
    assert arms.run_arms("lab", ARMS, flags(tmp_path), None) == rows
    assert len(lines_of(tmp_path)) == 1 + 4 * 3


def test_redo_replaces_the_rows_of_the_arm_and_seed_and_the_older_ones_of_the_arm(tmp_path):
    older(tmp_path, ("a", "score", 9.0, 1.0, 3), ("b", "score", 8.0, 1.0, 3))
    both = flags(tmp_path, arms="a", redo=True)
    arms.run_arms("lab", ARMS, both, lambda cfg: dict(score=1.0, gone=0.0))
    first = dataclasses.replace(both, seeds=1)
    rows = arms.run_arms("lab", ARMS, first, lambda cfg: dict(score=2.0))
    kept = {(row["arm"], row["seed"]): row for row in rows}
    assert kept.keys() == {("a", 0), ("a", 1), ("b", None)}
    assert "gone" not in kept["a", 0]
    assert (kept["a", 0]["score"], kept["a", 1]["score"]) == (2.0, 1.0)


def test_fast_runs_stay_out_of_the_results_and_are_not_skipped_because_of_them(tmp_path):
    older(tmp_path, ("a", "score", 9.0, 1.0, 3))
    before, short = lines_of(tmp_path), flags(tmp_path, seeds=1, arms="a", fast=True)
    rows = arms.run_arms("lab", ARMS, short, lambda cfg: dict(score=1.0))
    assert [row["score"] for row in rows] == [1.0] and lines_of(tmp_path) == before
    assert (tmp_path / "out" / "lab-fast.csv").exists()


def test_the_results_folder_does_not_depend_on_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = records.REPOSITORY / "labs" / "results"
    assert records.file_of("lab", arms.Flags()) == results / "lab.csv"


def test_rows_before_an_arm_that_fails_are_kept(tmp_path):
    def measure(cfg):
        if cfg.sigreg == 0:
            raise ValueError("no")
        return dict(score=1.0)
    with pytest.raises(ValueError, match="no"):
        arms.run_arms("lab", ARMS, flags(tmp_path), measure)
    assert [row["score"] for row in arms.results("lab", flags(tmp_path))] == [1.0, 1.0]


def test_an_arm_that_fails_stops_no_other_is_named_and_ends_the_lab_with_its_error(
        tmp_path, capsys):
    def measure(cfg):
        if cfg.sigreg == ARMS["a"].sigreg:
            raise RuntimeError("out of memory")
        return {}
    with pytest.raises(RuntimeError, match="out of memory"):
        arms.run_arms("lab", ARMS, flags(tmp_path, seeds=1), measure)
    assert [row["arm"] for row in csv.DictReader(lines_of(tmp_path))] == ["b"]
    assert "an arm failed: RuntimeError('out of memory')" in capsys.readouterr().out


def test_arms_side_by_side_run_in_other_processes_and_one_that_fails_stops_no_other(tmp_path):
    with pytest.raises(ValueError, match="no"):
        arms.run_arms("lab", dict(b=ARMS["b"], a=ARMS["a"]), flags(tmp_path, jobs=2), toy.measure)
    # all from the disk
    rows = arms.run_arms("lab", ARMS, flags(tmp_path, arms="a"), None)
    assert [(row["arm"], row["seed"], row["score"]) for row in rows] == [("a", 0, 0), ("a", 1, 1)]
    assert os.getpid() not in {row["process"] for row in rows}


def test_arms_side_by_side_share_the_threads(tmp_path):
    """Two processes of two threads each on two cores were measured: ten minutes for what takes
    three."""
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
    scores = (1.0, 2.0, 3.0)
    rows = [dict(arm="a", seed=seed, score=score) for seed, score in enumerate(scores)]
    rows.append(dict(arm="b", seed=0))
    text = tables.table(rows, ARMS, {"the score": "score"})
    assert "| a | 2.000 ± 1.000 |" in text and "| b | not measured |" in text
    assert "(1 seed)" in tables.table(rows[:1], ARMS, {"the score": "score"})
    assert "| a | 1.500 ± 0.707 (2 seeds) |" in tables.table(rows[:2], ARMS, {"the score": "score"})


def test_a_table_is_written_between_its_markers_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- lab -->\nold\n<!-- /lab -->\nafter\n")
    tables.publish("lab", [dict(commit="abc")], "| new |", str(page))
    text = page.read_text()
    assert text.startswith("before\n<!-- lab -->") and text.endswith("after\n")
    assert "| new |" in text and "old" not in text
    assert "abc" in text
    with pytest.raises(ValueError, match="<!-- other -->"):
        tables.publish("other", [dict(commit="abc")], "| new |", str(page))


def result(arm, seed, spread, found):
    """A row whose health word follows from spread, and whose worth follows from R@1."""
    return dict(
        arm=arm, seed=seed, std=spread, share=1.0, rank=128.0, bound=128, r1_LAT_heldout=found)


def test_health_word_is_judged_on_runs_that_it_was_not_derived_from():
    rows = [result("random-init encoder", 0, 0.4, 0.3)]
    # the thresholds are derived from these two
    rows += [result("no stop-gradient", 0, 0.1, 0.1), result("frozen random target", 0, 0.3, 0.6)]
    rows += [result("no stop-gradient", 1, 0.1, 0.1)]
    rows += [result("paper", 0, 0.3, 0.6), result("paper", 1, 0.3, 0.1)]
    text = collapse.verdicts(rows, list(collapse.ARMS))
    assert "Right: 1 of 2" in text
    assert "up to a spread (std * rank / bound) of 0.100, healthy from 0.300" in text
    assert "| healthy | 0 | 1 |" in text and "| collapsed | 0 | 1 |" in text


def test_arms_of_the_collapse_lab_share_tokens_and_width():
    shared = (
        "batch_size", "block_size", "n_embd", "n_layer", "mask_ratio", "pretrain_lr",
        "distill_steps", "vocab_size")
    for cfg in collapse.ARMS.values():
        if cfg != collapse.ARMS["recipe=collapse"]:     # the default's, with its learning rate
            assert all(getattr(cfg, name) == getattr(collapse.BASE, name) for name in shared)
        assert cfg.pretrain_steps in (0, collapse.BASE.pretrain_steps)


def test_probe_countries_have_one_continent_each():
    import data
    corpus = data.load(train.Config())
    of = {}
    for question, continent, country in probes.continents(corpus):
        assert country[4:] in question and of.setdefault(country, continent) == continent
    assert len(of) > 30 and len(set(of.values())) >= 5


def test_the_health_word_is_not_judged_on_means():
    rows = [dict(arm="paper", seed=None, r1_LAT_heldout=tables.Figure(0.5, 0.1, 3))]
    assert "no figures by seed" in collapse.verdicts(rows, list(collapse.ARMS))


def test_a_changed_arm_is_refused(tmp_path):
    """What `default` means may change: old figures must not be printed as new ones."""
    few = flags(tmp_path, seeds=1, arms="b")
    arms.run_arms("lab", ARMS, few, lambda cfg: dict(score=1.0))
    row, = (row for row in csv.DictReader(lines_of(tmp_path)) if row["figure"] == "config")
    assert row["value"] == '{"sigreg":0.0}'
    changed = dict(ARMS, b=dataclasses.replace(ARMS["b"], mlm=0.5))
    words = "lab.csv: arm 'b' was measured with mlm=1.0 and now has mlm=0.5; --redo"
    with pytest.raises(ValueError, match=words):
        arms.run_arms("lab", changed, few, None)
    with pytest.raises(ValueError, match="measured with sigreg=0.0 and now has sigreg=1.0"):
        arms.run_arms("lab", dict(b=dataclasses.replace(ARMS["b"], sigreg=1.0)), few, None)


def test_another_out_folder_is_not_another_arm(tmp_path):
    for out in ("here", "there"):
        cfg = {"a": train.Config(data=f"{out}/words.txt")}
        few = flags(tmp_path, seeds=1, out=out)
        rows = arms.run_arms("lab", cfg, few, lambda cfg: dict(score=1.0))
    assert len(rows) == 1


def test_figures_of_an_older_table_are_shown_and_are_not_seeds(tmp_path):
    columns = {"score": "score", "health": "health"}
    older(tmp_path, ("a", "score", 0.25, 0.125, 3), ("a", "health", "healthy", "", 3),
          ("b", "score", 0.5, "", 1))
    # a has three seeds: nothing is run
    rows = arms.run_arms("lab", ARMS, flags(tmp_path, arms="a"), None)
    text = tables.table(rows, ARMS, columns)
    assert "| a | 0.250 ± 0.125 | healthy |" in text
    assert "| b | 0.500 (1 seed) | not measured |" in text
    assert tables.by_seed(rows) == []
    # b has one seed of two
    assert arms.missing("lab", ARMS, flags(tmp_path)) == [("b", 1)]
    # a measured seed is shown instead of the older mean
    rows.append(dict(arm="a", seed=7, score=0.75))
    assert "| a | 0.750 (1 seed) | healthy |" in tables.table(rows, ARMS, columns)


@pytest.mark.parametrize("lab, columns, shown", (
    ("collapse", {"share": "share", "R2": "val_r2"},
     [arm for arm in collapse.ARMS if arm != "recipe=collapse"]),
    ("speaking", {"EM": "em_LAT_heldout", "TXT": "em_TXT_heldout"}, plots.arms_of("speaking", 1))))
def test_a_table_of_the_repositorys_results_has_the_numbers_of_their_file(lab, columns, shown):
    lines = records.read_rows(records.file_of(lab, arms.Flags()))
    kept = {(row["arm"], row["figure"]): row for row in lines}
    text = tables.table(arms.results(lab, arms.Flags()), shown, columns)
    for line, arm in zip(text.splitlines()[2:], shown, strict=True):
        name, *cells = line.strip("| ").split(" | ")
        rows = [kept[arm, figure] for figure in columns.values()]
        assert name == arm and cells == [f"{row['value']} ± {row['deviation']}" for row in rows]


def test_every_arm_can_be_named_in_arms():
    """--arms=a,b is split at commas."""
    for path in (records.REPOSITORY / "labs").glob("*.py"):
        lab = importlib.import_module(f"labs.{path.stem}")
        assert not [name for name in getattr(lab, "ARMS", {}) if "," in name], path.name


@pytest.mark.parametrize("folder, flag", (("teaching", "--redo"), ("teaching-fast", "--fast")))
def test_teaching_names_the_command_that_makes_what_it_starts_from(tmp_path, folder, flag):
    """After a --fast run of facts only a --fast run of teaching finds its checkpoints."""
    cfg = teaching.Config(out=str(tmp_path / folder / "teach_0"))
    with pytest.raises(ValueError, match=f"labs.facts --arms=default {flag}"):
        teaching.measure(cfg)


def test_text_fast_tries_every_kind_of_arm_on_one_text_and_prints_no_table(monkeypatch, capsys):
    tried = {}
    monkeypatch.setattr(text, "run_arms", lambda lab, short, *rest: tried.update(short))
    monkeypatch.setattr(text.Path, "is_file", lambda path: True)
    text.text(arms.Flags(fast=True))
    assert {cfg.data for cfg in tried.values()} == {text.SHAKESPEARE["data"]}
    kinds = {name.removesuffix(" on WordNet") for name in text.ARMS}
    assert tried.keys() == kinds
    assert "|" not in capsys.readouterr().out
