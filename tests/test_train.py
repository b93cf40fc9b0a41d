"""Training as a whole: the three programs end to end on seconds of work, resuming, and what bad input does."""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from tests.toy import FLAGS, PAIRS, write_corpus


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A text, pairs and a run through all three phases, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("toy")
    write_corpus(folder)
    cfg = config(folder, "run")
    return folder, cfg, train.run(cfg)


def config(folder, name, **changes):
    return train.Config(**{**FLAGS, "data": str(folder / "text.txt"), "qa": str(folder / "qa.tsv"),
                           "out": str(folder / name), **changes})


def open_parts(cfg):
    """The rest of a `train.Run` of a folder: model, corpus, device, dtype."""
    saved = train.load_checkpoint(cfg.out)
    corpus = data.load(cfg, data.Tokenizer.from_state(saved["tokenizer"]))
    return train.build(cfg, corpus.tokenizer, saved["model"]), corpus, "cpu", None


def weights(out):
    return train.load_checkpoint(out)["model"]


def fails(argv, capsys):
    """Run train.py in this process; it must end with code 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in error
    return lines[0]


# -- a run ----------------------------------------------------------------------------------------------------------------

def test_a_run_writes_its_four_files_and_learns(toy, draw):
    folder, cfg, figures = toy
    draw(train.load_checkpoint(cfg.out)["rows"], train.PHASES, folder / "run" / "curves.png")
    assert {"ckpt.pt", "metrics.csv", "curves.png", "config.json"} <= set(os.listdir(cfg.out))
    assert figures["r1_DEC"] > 0.9 and figures["em_DEC"] > 0.9 and figures["em_shuffled"] < 0.5
    rows = list(csv.DictReader(open(folder / "run" / "metrics.csv")))
    assert [row["phase"] for row in rows if row["step"] == "0"] == list(train.PHASES)
    assert json.load(open(folder / "run" / "config.json"))["n_embd"] == FLAGS["n_embd"]


def test_the_same_seed_gives_the_same_weights_and_another_one_others(toy):
    folder, cfg, _ = toy
    changes = dict(phase="pretrain", pretrain_steps=3)
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        train.run(config(folder, name, seed=seed, **changes))
    a, b, c = (weights(folder / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["encoder.embed.weight"], c["encoder.embed.weight"])


@pytest.mark.parametrize("phase", train.PHASES)
def test_resume_is_bit_exact(toy, phase, monkeypatch):
    """Stop in the middle of a phase, resume: the weights are those of the run that nobody stopped."""
    folder, cfg, _ = toy
    out, save, stop_at = folder / f"stopped_{phase}", train.save_checkpoint, 4

    def save_and_die(where, checkpoint):
        save(where, checkpoint)
        if checkpoint["phase"] == phase and checkpoint["step"] == stop_at:
            raise RuntimeError("pulled the plug")
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(RuntimeError, match="plug"):
        train.run(config(folder, out.name, eval_every=stop_at))
    monkeypatch.setattr(train, "save_checkpoint", save)
    train.main(["--resume", f"--out={out}", f"--eval_every={cfg.eval_every}"])
    resumed, whole = weights(out), weights(cfg.out)
    assert not [name for name in whole if not torch.equal(resumed[name], whole[name])]
    steps = [(row["phase"], row["step"]) for row in csv.DictReader(open(out / "metrics.csv"))]
    assert len(steps) == len(set(steps)) and steps[-1] == ("speak", str(cfg.speak_steps))


def test_phases_one_by_one_continue_a_run(toy, capsys):
    """pretrain on text alone, then the questions, then speech: three commands on one folder."""
    folder, cfg, _ = toy
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    train.main([*flags, "--phase=pretrain", f"--data={folder / 'text.txt'}", f"--out={folder / 'steps'}"])
    assert "--phase=distill" in capsys.readouterr().out
    train.main(["--phase=distill", f"--qa={folder / 'qa.tsv'}", f"--out={folder / 'steps'}"])
    train.main(["--phase=speak", f"--out={folder / 'steps'}", "--memory=both", "--n_slots=2"])
    assert "em_DEC" in train.load_checkpoint(folder / "steps")["rows"][-1]


def test_frozen_encoder_is_bit_identical_after_speaking(toy):
    folder, cfg, _ = toy
    train.run(config(folder, "frozen", phase="pretrain"))
    train.run(config(folder, "frozen", phase="distill"))
    before = weights(folder / "frozen")
    train.run(config(folder, "frozen", phase="speak"))
    after = weights(folder / "frozen")
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("decoder."))
    assert not torch.equal(before["decoder.embed.weight"], after["decoder.embed.weight"])


def test_recipe_paper_is_the_paper(tmp_path):
    cfg = train.resolve(dict(recipe="paper", data="x"))
    assert (cfg.target, cfg.top_k, cfg.loss, cfg.target_norm) == ("span", 1, "mse", False)
    assert cfg.sigreg == cfg.vicreg == cfg.mlm == 0


@pytest.mark.parametrize("changes", [dict(loss="smooth_l1", vicreg=1.0), dict(loss="infonce", mlm=0.5), dict(target="token"),
                                     dict(ema_half_life=0), dict(accum=2), dict(dtype="bf16"), dict(recipe="paper", top_k=1)])
def test_every_objective_trains(toy, changes):
    folder, *_ = toy
    figures = train.run(config(folder, "objective" + "-".join(changes), phase="pretrain", pretrain_steps=4, **changes))
    assert np.isfinite(figures["loss"]) and figures["grad"] > 0


def test_vectors_of_another_width_can_teach(toy):
    """Any teacher: random vectors of width 20 go through W; the table in the checkpoint is standardised."""
    folder, cfg, _ = toy
    np.savez(folder / "vectors.npz", answers=[a for _, a in PAIRS], vectors=np.random.default_rng(0).normal(size=(len(PAIRS), 20)))
    figures = train.run(config(folder, "taught", teacher=str(folder / "vectors.npz"), distill_steps=200))
    concepts = train.load_checkpoint(folder / "taught")["concepts"]
    assert concepts.shape[1] == 20 and torch.allclose(concepts.std(0, correction=0), torch.ones(20), atol=1e-3)
    assert figures["r1_DEC"] > 0.9


def test_another_run_can_teach(toy):
    """--teacher=ckpt:DIR: the concepts are those that the other run's target encoder has, with its own tokenizer."""
    folder, cfg, _ = toy
    figures = train.run(config(folder, "pupil", teacher=f"ckpt:{cfg.out}", n_embd=16, pred_embd=8, pretrain_steps=0,
                               distill_steps=300, speak_steps=2))
    saved, theirs = train.load_checkpoint(folder / "pupil"), train.load_checkpoint(cfg.out)
    assert saved["config"]["teacher_width"] == cfg.n_embd and saved["concepts"].shape[1] == cfg.n_embd
    tokenizer = train.data.Tokenizer.from_state(theirs["tokenizer"])
    concept = train.build(cfg, tokenizer, theirs["model"]).concept(
        torch.tensor([tokenizer.encode(" " + saved["answers"][0])]))[0]
    model = saved["model"]
    torch.testing.assert_close(saved["concepts"][0], (concept - model["concept_mean"]) / model["concept_std"])
    assert figures["r1_DEC"] > 0.9


def test_speech_needs_the_thought(toy):
    """The grounding of phase 3: with the thought of another question the decoder says another answer."""
    assert toy[2]["em_shuffled"] < 0.5 * toy[2]["em_DEC"]


def test_starting_over_keeps_the_old_checkpoint(toy):
    folder, *_ = toy
    for seed in 0, 1:
        train.run(config(folder, "twice", phase="pretrain", pretrain_steps=2, seed=seed))
    old = torch.load(folder / "twice" / "ckpt.previous.pt", weights_only=True)
    assert old["config"]["seed"] == 0


# -- bad input ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag, words", [
    ("--pretrain_step=5", "did you mean --pretrain_steps"), ("--n_embd=12.5", "n_embd"), ("--n_head=3", "multiple of 2 * n_head"),
    *((f"--mask_ratio={value}", "mask_ratio") for value in ("0", "1", "inf")), ("--pretrain_lr=-1", "pretrain_lr"),
    ("--pretrain_lr=nan", "pretrain_lr"), ("--dtype=fp16", "auto, fp32, bf16"), ("--phase=sing", "pretrain"),
    ("--loss=l7", "smooth_l1"), ("--compile=perhaps", "neither true nor false"), ("--top_k=9", "n_layer"),
    ("--data=nowhere.txt", "nowhere.txt"), ("--qa=nowhere.tsv", "nowhere.tsv"), ("--teacher=nowhere.npz", "nowhere.npz"),
    ("--teacher=ckpt:nowhere", "--teacher=ckpt:nowhere"),
    ("--block_size=5000", "--block_size=5000"), ("--mask_ratio=.99", "--mask_ratio=0.99"), ("--vocab_size=100", "--vocab_size=100"),
    ("--vocab_size=70000", "--vocab_size=70000"), ("--seed=10000000000", "--seed=10000000000")])
def test_bad_flags_are_one_line_that_names_the_flag(toy, capsys, flag, words):
    folder, cfg, _ = toy
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    assert words in fails([*flags, f"--data={cfg.data}", f"--qa={cfg.qa}", f"--out={folder / 'bad'}", flag], capsys)
    assert not (folder / "bad").exists()


@pytest.mark.parametrize("content, words", [
    (b"", "empty"), (b"  \n", "empty"), (b"good text \xff\xfe", "byte 10"), (b"good\0text", "position 4"),
    (b"too short", "--block_size")])
def test_bad_text_says_what_is_wrong_and_where(toy, capsys, content, words):
    folder, *_ = toy
    (folder / "bad.txt").write_bytes(content)
    assert words in fails(["--phase=pretrain", f"--data={folder / 'bad.txt'}", f"--out={folder / 'bad'}"], capsys)


@pytest.mark.parametrize("content, words", [
    ("Who?\n", "line 1: 0 tabs"), ("Who?\tme\nWhere?\t\n", "line 2: the answer is empty"), ("\tme\n", "line 1: the question"),
    ("Who?\t" + "very long " * 40, "line 1"), ("\n\n", "holds no pair")])
def test_bad_pairs_name_their_line(toy, capsys, content, words):
    folder, cfg, _ = toy
    (folder / "bad.tsv").write_text(content)
    assert words in fails([f"--data={cfg.data}", f"--qa={folder / 'bad.tsv'}", "--block_size=32", f"--out={folder / 'bad'}"], capsys)


def test_an_answer_must_fit_the_encoder_too(toy, capsys):
    """The encoder says what an answer's latent is: one that is longer than it reads is refused before phase 1."""
    folder, cfg, _ = toy
    (folder / "long.tsv").write_text("Who?\t" + "xyz " * 20 + "\n")
    said = fails([f"--data={cfg.data}", f"--qa={folder / 'long.tsv'}", "--block_size=32", "--answer_size=300",
                  f"--out={folder / 'bad'}"], capsys)
    assert "32 fit" in said and said.endswith("--block_size") and not (folder / "bad").exists()
    row, tokenizer = data.QA("DEC", "trained", "qa", "Who?", "Who?", "xyz " * 20), data.load(cfg).tokenizer
    with pytest.raises(ValueError, match="32 fit.*--block_size"):
        data.Questions([row], tokenizer, 32, 300, "cpu")


def test_bad_vectors_are_refused(toy, capsys):
    folder, cfg, _ = toy
    names, good = [a for _, a in PAIRS], np.ones((len(PAIRS), 4))
    nan = good.copy()
    nan[2, 1] = np.nan
    ragged = np.empty(len(PAIRS), dtype=object)
    for answers, vectors, words in ((names[1:], good[1:], "lacks a vector"), (names, nan, names[2]), (names, good[1:], "rows"),
                                    (names, ragged, "bad.npz")):
        np.savez(folder / "bad.npz", answers=answers, vectors=vectors)
        argv = [f"--data={cfg.data}", f"--qa={cfg.qa}", f"--teacher={folder / 'bad.npz'}", "--block_size=32",
                f"--out={folder / 'bad'}"]
        assert words in fails(argv, capsys)


def test_phases_need_the_phase_before(toy, capsys):
    folder, cfg, _ = toy
    assert "no checkpoint" in fails(["--phase=distill", f"--out={folder / 'nothing'}"], capsys)
    assert "no checkpoint" in fails(["--resume", f"--out={folder / 'nothing'}"], capsys)
    train.run(config(folder, "read", phase="pretrain", pretrain_steps=2))
    assert "run --phase=distill first" in fails(["--phase=speak", f"--out={folder / 'read'}"], capsys)
    saved = train.load_checkpoint(folder / "read")
    train.save_checkpoint(folder / "read", saved | dict(config=saved["config"] | dict(pretrain_steps=4)))
    said = fails(["--phase=distill", f"--qa={cfg.qa}", f"--out={folder / 'read'}"], capsys)
    assert "step 2 of 4: run `python train.py --resume" in said
    train.save_checkpoint(folder / "read", saved)
    assert "give --qa" in fails(["--phase=distill", "--qa=", f"--out={folder / 'read'}"], capsys)
    assert "give --qa" in fails([f"--data={cfg.data}", "--block_size=32", f"--out={folder / 'bad'}"], capsys)


def test_a_folder_holds_one_run(toy, capsys):
    """Another width, corpus or tokenizer in the same --out is refused, and the checkpoint stays as it was."""
    folder, cfg, _ = toy
    before = (folder / "run" / "ckpt.pt").read_bytes()
    (folder / "other.txt").write_text((folder / "text.txt").read_text() + " more")
    assert "n_embd" in fails(["--phase=speak", "--n_embd=64", f"--out={cfg.out}"], capsys)
    assert "leave the flag" in fails([f"--data={cfg.data}", "--phase=pretrain", f"--out={cfg.out}"], capsys)
    assert "data" in fails(["--phase=speak", f"--data={folder / 'other.txt'}", f"--out={cfg.out}"], capsys)
    assert (folder / "run" / "ckpt.pt").read_bytes() == before


def test_a_changed_text_is_noticed(toy, capsys):
    folder, *_ = toy
    (folder / "mine.txt").write_text((folder / "text.txt").read_text())
    train.run(config(folder, "mine", data=str(folder / "mine.txt"), phase="pretrain", pretrain_steps=2))
    (folder / "mine.txt").write_text((folder / "text.txt").read_text() + "A new end.")
    assert "is not the text" in fails(["--resume", f"--out={folder / 'mine'}"], capsys)


class Evil:
    def __reduce__(self):
        return os.system, ("echo gotcha > gotcha",)


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "newer", "code", "other"])
def test_damaged_and_foreign_checkpoints_are_refused(toy, capsys, damage, tmp_path, monkeypatch):
    folder, cfg, _ = toy
    monkeypatch.chdir(tmp_path)
    good = (folder / "run" / "ckpt.pt").read_bytes()
    path = tmp_path / "ckpt.pt"
    if damage == "truncated":
        path.write_bytes(good[:len(good) // 2])
    elif damage == "corrupted":
        path.write_bytes(bytes(1000) + good[1000:])
    elif damage == "newer":
        torch.save(dict(format=train.FORMAT + 1), path)
    elif damage == "code":
        torch.save(dict(format=1, config=Evil()), path)
    else:
        torch.save([1, 2, 3], path)
    assert "ckpt.pt" in fails(["--resume", f"--out={tmp_path}"], capsys)
    assert not (tmp_path / "gotcha").exists()


def test_a_full_disk_keeps_the_last_checkpoint(toy, capsys, monkeypatch):
    folder, cfg, _ = toy
    train.run(config(folder, "full", phase="pretrain", pretrain_steps=2))
    before = (folder / "full" / "ckpt.pt").read_bytes()

    def no_space(file):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train.os, "fsync", no_space)
    assert "No space left" in fails(["--resume", "--pretrain_steps=4", f"--out={folder / 'full'}"], capsys)
    assert (folder / "full" / "ckpt.pt").read_bytes() == before


def test_a_loss_that_is_no_number_stops_and_says_what_to_lower(toy, capsys):
    folder, cfg, _ = toy
    out = folder / "nan"
    with pytest.raises(ValueError, match="lower --pretrain_lr"):
        train.run(config(folder, "nan", phase="pretrain", pretrain_lr=1e30, warmup=0.0))
    assert all(torch.isfinite(value).all() for value in weights(out).values())


def test_a_full_gpu_is_one_line_that_says_how_to_take_less(toy, capsys, monkeypatch):
    def full(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    monkeypatch.setattr(train, "run", full)
    assert "out of memory: raise --accum=4" in fails(["--accum=4"], capsys)


def test_gpt2_without_internet_says_which_file_to_put_where(toy, capsys, monkeypatch, tmp_path):
    folder, cfg, _ = toy

    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("requests.head", offline)
    monkeypatch.setattr("requests.get", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    argv = ["--tokenizer=gpt2", "--phase=pretrain", f"--data={cfg.data}", f"--out={folder / 'gpt2'}"]
    assert "TIKTOKEN_CACHE_DIR" in fails(argv, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_said(toy, capsys):
    folder, cfg, _ = toy
    assert "--device=cuda" in fails(["--device=cuda", "--phase=pretrain", f"--data={cfg.data}", f"--out={folder / 'gpu'}"], capsys)


def test_ctrl_c_saves_and_says_how_to_go_on(toy):
    """A real process, a real signal: exit code 130, and a checkpoint from which it goes on."""
    folder, cfg, _ = toy
    argv = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in FLAGS.items()), "--phase=pretrain",
            f"--data={cfg.data}", f"--out={folder / 'stopped'}", "--pretrain_steps=100000"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (folder / "stopped" / "ckpt.pt").exists():
        assert process.poll() is None
    process.send_signal(2)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in error
    assert train.load_checkpoint(folder / "stopped")["step"] > 0


def test_tokens_a_second_are_those_of_steps_and_not_of_evaluations(toy, monkeypatch):
    """By a clock that only a step and an evaluation move: a step takes a second, an evaluation a hundred."""
    folder, cfg, _ = toy
    clock, cfg = [0.0], config(folder, "clock", phase="pretrain", pretrain_steps=60, eval_every=40)
    run = train.Run(cfg, *open_parts(toy[1]))
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    def wait(seconds, found):
        clock[0] += seconds
        return found
    (folder / "clock").mkdir()
    log, loss_at = evaluate.Log(cfg.out, []), train.pretrain(run)[0]
    train.fit(run, "pretrain", lambda progress: wait(1, loss_at(progress)), lambda whole: wait(100, {}), log,
              lambda step, optimizer: None)
    rates = [row["tok_s"] for row in log.rows if "tok_s" in row]
    assert rates == [cfg.batch_size * cfg.block_size] * 3


def test_a_question_that_was_taught_is_never_unknown_by_rounding():
    """With one phrasing the farthest of them sets the threshold; asked alone, it may be a little farther away."""
    questions = SimpleNamespace(where=lambda split, phrasing: torch.arange(3 * (split == "DEC" and phrasing == "trained")))
    found = evaluate.abstention(questions, torch.tensor([1.0, 3.0, 2.0]))
    assert 3.0 * 1.01 < found["threshold"] < 3.0 * 1.1


def test_help_lists_every_flag_with_its_reason(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in train.Config.__dataclass_fields__:
        assert f"--{name}" in text
    assert "fewer dimensions" in text


# -- the data ---------------------------------------------------------------------------------------------------------------

def test_rows_end_at_the_end_of_their_document():
    """No row crosses an EOS: no attention and no span across documents."""
    class tok:
        pad, eos = 90, 91
    stream = np.array([1, 2, 3, 91, 4, 5, 91, *range(10, 30), 91], dtype=np.uint16)
    text = data.Text(stream, 8, tok, "toy")
    rows = text.rows(range(len(text.starts))).tolist()
    assert rows[0] == [1, 2, 3] + [90] * 5 and rows[1] == [4, 5] + [90] * 6
    assert rows[2] == list(range(10, 18)) and rows[-1] == list(range(22, 30)) and len(rows) == 2 + 13


def test_lat_and_txt_facts_are_kept_from_the_decoder(monkeypatch):
    """Phase 3 reads DEC questions in trained wordings and bare answers, phase 2 DEC and LAT questions: nothing else."""
    cfg = train.Config(dtype="fp32", device="cpu")
    corpus = data.load(cfg)
    run = train.Run(cfg, train.build(cfg, corpus.tokenizer), corpus, "cpu", None)
    questions = data.Questions(corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size, "cpu")
    table, read, think_all = torch.zeros(len(questions.answers), cfg.n_embd), [], train.evaluate.think_all

    def text(tokens):
        return {corpus.tokenizer.decode(row.tolist()).strip() for row in tokens}

    def trained(*splits):
        return {row.question for row in questions.rows if row.split in splits and row.phrasing == "trained"}
    monkeypatch.setattr(train.evaluate, "think_all", lambda run, tokens: read.append(tokens) or think_all(run, tokens))
    train.speak(run, questions, table)
    assert text(read[0]) == trained("DEC") | set(questions.answers)
    taught = set()
    monkeypatch.setattr(run.model, "distill_loss", lambda question, latent: taught.update(text(question)))
    draw, _ = train.distill(run, questions, table)
    for _ in range(20):
        draw(0.0)
    assert len(taught) > 1000 and taught <= trained("DEC", "LAT")


def test_splits_and_phrasings_are_disjoint():
    corpus = data.load(train.Config())
    split_of = {}
    for row in corpus.qa:
        assert split_of.setdefault((row.subject, row.relation), row.split) == row.split
    by = {phrasing: {row.question for row in corpus.qa if row.phrasing == phrasing} for phrasing in ("trained", "heldout")}
    assert by["trained"] and by["heldout"] and not by["trained"] & by["heldout"]
    text = corpus.tokenizer.decode(np.asarray(corpus.train.tokens).tolist())
    assert not [row.subject for row in corpus.qa if row.split == "NEVER" and row.subject in text]
    assert not [row.statement for row in corpus.cloze if row.statement.replace("{a}", row.answer) in text]


def test_the_table_of_facts_is_as_large_and_varied_as_promised():
    from data.facts.prepare import read_tsv
    facts, templates = read_tsv("facts.tsv"), read_tsv("templates.tsv")
    assert len(facts) >= 1500 and len({(s, r) for s, r, _ in facts}) == len(facts)
    relations = {relation for _, relation, _ in facts}
    assert len(relations) >= 10
    for relation in relations:
        count = {kind: sum(t[:2] == [relation, kind] for t in templates) for kind in ("statement", "question", "heldout")}
        assert count["statement"] >= 8 and count["question"] + count["heldout"] >= 10 and count["heldout"] >= 2


def test_every_recipe_fits_every_preset_and_only_the_default_sees_tokens():
    for preset in train.PRESETS:
        tokens = {recipe: train.resolve(dict(recipe=recipe, preset=preset)).mlm for recipe in train.RECIPES}
        assert tokens == dict(default=1, latent=0, paper=0)
        assert train.resolve(dict(recipe="latent", preset=preset)).sigreg > 0


@pytest.mark.parametrize("flag", ["--recipe=latent", "--mlm=0", "--pred_embd=16", "--top_k=1"])
def test_a_later_phase_cannot_change_what_phase_1_was(toy, capsys, flag):
    """A recipe is a set of flags: each of them counts, named or not."""
    folder, *_ = toy
    run = config(folder, "fixed", phase="pretrain", pretrain_steps=2, pred_embd=32)
    train.run(run)
    with pytest.raises(SystemExit) as stop:
        train.main(["--phase=distill", f"--out={run.out}", flag])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and flag.split("=")[0] in said and "Traceback" not in said


def test_a_preset_counts_flag_by_flag_when_a_run_goes_on(toy, capsys):
    folder, cfg, _ = toy
    with pytest.raises(SystemExit) as stop:
        train.main(["--phase=speak", f"--out={cfg.out}", "--preset=laptop"])
    assert stop.value.code == 2 and "--facts=all, but the run" in capsys.readouterr().err


def test_a_phase_begun_anew_keeps_what_was_there_and_shows_no_figure_of_it(tmp_path):
    write_corpus(tmp_path)
    out = tmp_path / "run"
    flags = FLAGS | dict(data=str(tmp_path / "text.txt"), qa=str(tmp_path / "qa.tsv"), out=str(out), distill_steps=2,
                         speak_steps=2, pretrain_steps=2)
    train.run(train.Config(**flags))
    spoken = train.load_checkpoint(out)
    figures = train.run(train.resolve(dict(phase="distill", out=str(out), distill_steps=4)))
    assert "em_DEC" not in figures and "r1_DEC" in figures and figures["step"] == 4
    assert {row["phase"] for row in train.load_checkpoint(out)["rows"]} == {"pretrain", "distill"}
    (out / "ckpt.pt").unlink()
    (out / "ckpt.previous.pt").rename(out / "ckpt.pt")
    assert train.load_checkpoint(out)["phase"] == "speak" and train.load_checkpoint(out)["rows"] == spoken["rows"]


def test_a_refused_command_leaves_the_run_as_it_was(toy, capsys, tmp_path):
    """Whatever is wrong is said before anything is written."""
    folder, cfg, _ = toy
    shutil.copytree(cfg.out, tmp_path / "run")
    (tmp_path / "other.tsv").write_text("What is the colour of the moss?\tblue\n")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for argv in (["--phase=speak", f"--qa={tmp_path / 'other.tsv'}"], ["--phase=speak", "--teacher=ckpt:nowhere"],
                 ["--resume", "--teacher=vectors.npz"],      # phase 2 is over
                 ["--phase=distill", "--distill=align", f"--teacher=ckpt:{tmp_path / 'nowhere'}"]):
        fails([*argv, f"--out={tmp_path / 'run'}"], capsys)
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_copied_folder_is_a_run_of_its_own(toy, tmp_path, monkeypatch):
    """The folder that is named, by default too, and not the one where the checkpoint was written first."""
    folder, cfg, _ = toy
    monkeypatch.chdir(tmp_path)
    shutil.copytree(cfg.out, train.Config.out)
    for given in dict(phase="speak"), dict(resume=True):
        assert train.resolve(given).out == train.Config.out


def test_a_resumed_run_takes_the_weight_decay_that_it_is_given(toy):
    folder, cfg, _ = toy
    run = train.Run(config(folder, "run", weight_decay=0.3), *open_parts(cfg))
    state = train.load_checkpoint(cfg.out)["optimizer"]
    assert [group["weight_decay"] for group in train.optimizer_for(run, "speak", state).param_groups] == [0.3, 0.0]


def test_speaking_is_resumed_without_the_teacher(toy, tmp_path):
    """What the teacher said of the answers is in the checkpoint since phase 2 began."""
    folder, cfg, _ = toy
    np.savez(tmp_path / "vectors.npz", answers=[a for _, a in PAIRS], vectors=np.random.default_rng(0).normal(size=(12, 20)))
    few = config(tmp_path, "run", data=cfg.data, qa=cfg.qa, teacher=str(tmp_path / "vectors.npz"), pretrain_steps=1,
                 distill_steps=2, speak_steps=2)
    train.run(few)
    (tmp_path / "vectors.npz").unlink()
    figures = train.run(train.resolve(dict(resume=True, out=few.out, speak_steps=4)))
    assert figures["step"] == 4 and train.load_checkpoint(few.out)["config"]["teacher_width"] == 20


def test_a_teacher_that_has_moved_can_be_named_anew_while_phase_2_goes_on(toy, tmp_path):
    folder, cfg, _ = toy
    np.savez(tmp_path / "vectors.npz", answers=[a for _, a in PAIRS], vectors=np.random.default_rng(0).normal(size=(12, 20)))
    few = config(tmp_path, "run", data=cfg.data, qa=cfg.qa, pretrain_steps=1, phase="pretrain")
    train.run(few)
    again = dict(out=few.out, phase="distill", distill_steps=2, teacher=str(tmp_path / "vectors.npz"))
    train.run(train.resolve(again))
    (tmp_path / "vectors.npz").rename(tmp_path / "moved.npz")
    with pytest.raises((ValueError, OSError), match="vectors.npz"):
        train.run(train.resolve(again | dict(resume=True, distill_steps=4)))
    moved = str(tmp_path / "moved.npz")
    assert train.run(train.resolve(again | dict(resume=True, distill_steps=4, teacher=moved)))["step"] == 4
    assert train.load_checkpoint(few.out)["config"]["teacher"] == moved


def test_one_answer_alone_is_taught_without_a_number_that_is_none(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "one.tsv").write_text("\ufeffWhat is it?\tgreen\nAnd that?\tgreen\n", encoding="utf-8")
    flags = FLAGS | dict(data=str(tmp_path / "text.txt"), qa=str(tmp_path / "one.tsv"), out=str(tmp_path / "run"),
                         distill_steps=2, speak_steps=2, pretrain_steps=2)
    figures = train.run(train.Config(**flags))
    assert figures["r1_DEC"] == 1.0 and figures["loss"] == figures["loss"]
    assert train.data.read_qa(tmp_path / "one.tsv", train.data.load(train.Config(**flags)).tokenizer, 32, 8)[0].question == "What is it?"
