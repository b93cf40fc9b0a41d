"""Training as a whole: runs of seconds through all phases, resuming, recipes, teachers."""
import csv
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import flags
import report
import train
from data.facts.prepare import read_tsv
from labs.runs import open_run
from tests.toy import FLAGS, PAIRS, as_argv, config, loss_of, make, random_vectors, weights

ONE_STEP = dict(pretrain_steps=1, distill_steps=2, speak_steps=2)


# -- a run -----------------------------------------------------------------------------------------
def test_a_run_writes_its_four_files_and_learns(world, draw):
    """The whole program on twelve facts: thoughts find their answers, the decoder says them."""
    folder, cfg, figures = world
    out = folder / "run"
    draw(train.load_checkpoint(out)["rows"], train.PHASES, out / "curves.png")
    assert {"ckpt.pt", "metrics.csv", "curves.png", "config.json"} <= set(os.listdir(out))
    assert figures["r1_DEC"] > 0.9 and figures["em_DEC"] > 0.9
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert [row["phase"] for row in rows if row["step"] == "0"] == list(train.PHASES)
    written = json.load(open(out / "config.json"))
    assert written["n_embd"] == FLAGS["n_embd"] and written["torch"] == torch.__version__
    assert written["threads"] == torch.get_num_threads() and len(written["commit"]) >= 7
    assert time.strptime(written["date"], "%Y-%m-%dT%H:%M:%S%z")
    assert not {"torch", "commit", "date"} & train.load_checkpoint(out)["config"].keys()


def test_speech_needs_the_thought(world):
    """The grounding of phase 3: the thought of another question makes another answer."""
    assert world.figures["em_shuffled"] < 0.5 * world.figures["em_DEC"]


def test_the_seed_decides_the_weights(world, tmp_path):
    """Equal seeds, equal weights, bit by bit; without this no figure can be repeated."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.run(config(world.folder, tmp_path / name, seed=seed, phase="pretrain",
                         pretrain_steps=3))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    embedding = "context_encoder.embed.weight"
    assert not torch.equal(a[embedding], c[embedding])


@pytest.mark.parametrize("phase", train.PHASES)
def test_resume_is_bit_exact(world, tmp_path, phase, monkeypatch):
    """Stopped within a phase and resumed, a run has the weights of the uninterrupted one."""
    save, stop_at = train.save_checkpoint, 4

    def save_and_die(out, checkpoint, *more):
        save(out, checkpoint, *more)
        if (checkpoint["phase"], checkpoint["step"]) == (phase, stop_at):
            raise RuntimeError("power failure")
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(RuntimeError, match="power failure"):
        train.run(config(world.folder, tmp_path / "run", eval_every=stop_at))
    monkeypatch.setattr(train, "save_checkpoint", save)

    train.main(["--resume", f"--out={tmp_path / 'run'}", f"--eval_every={world.cfg.eval_every}"])
    resumed, whole = weights(tmp_path / "run"), weights(world.cfg.out)
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []
    rows = csv.DictReader(open(tmp_path / "run" / "metrics.csv"))
    steps = [(row["phase"], row["step"]) for row in rows]
    assert len(steps) == len(set(steps)) and steps[-1] == ("speak", str(FLAGS["speak_steps"]))


@pytest.mark.skipif(bool(train.no_graphs()), reason=train.no_graphs())
def test_a_compiled_phase_1_is_the_eager_one_and_resumes(world, tmp_path, monkeypatch):
    """--compile: no graph breaks, each step draws from its own seed, weights differ by rounding."""
    few = dict(phase="pretrain", pretrain_steps=4, eval_every=2, n_layer=1, top_k=1)

    def run(name, **changes):
        train.run(config(world.folder, tmp_path / name, **few | changes))
    run("eager")
    run("compiled", compile=True)
    run("other", seed=1)
    eager, compiled, other = (weights(tmp_path / name) for name in ("eager", "compiled", "other"))
    embedding = "context_encoder.embed.weight"
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], atol=1e-5, rtol=1e-4)
    assert (other[embedding] - eager[embedding]).abs().max() > 1e-3

    save = train.save_checkpoint

    def save_and_die(out, checkpoint, *more):
        save(out, checkpoint, *more)
        if checkpoint["step"] == 2:
            raise RuntimeError("power failure")
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(RuntimeError, match="power failure"):
        run("stopped", compile=True)
    monkeypatch.setattr(train, "save_checkpoint", save)
    train.run(train.resolve(dict(resume=True, out=str(tmp_path / "stopped"))))
    resumed = weights(tmp_path / "stopped")
    assert [name for name in resumed if not torch.equal(resumed[name], compiled[name])] == []


def test_phases_one_by_one_continue_a_run(world, tmp_path, capsys):
    """Text alone, then the questions, then speech: three commands on one folder."""
    out = f"--out={tmp_path / 'run'}"
    train.main([*as_argv(FLAGS), "--phase=pretrain", f"--data={world.cfg.data}", out])
    assert "--phase=distill" in capsys.readouterr().out
    train.main(["--phase=distill", f"--qa={world.cfg.qa}", out])
    train.main(["--phase=speak", "--memory=tokens", "--n_slots=2", out])
    assert "em_DEC" in train.load_checkpoint(tmp_path / "run")["rows"][-1]


def test_phase_3_changes_the_decoder_alone(world, tmp_path):
    """The encoder is frozen: bit by bit the same after speaking as before."""
    for phase in ("pretrain", "distill"):
        train.run(config(world.folder, tmp_path / "run", phase=phase))
    before = weights(tmp_path / "run")
    train.run(config(world.folder, tmp_path / "run", phase="speak"))
    after = weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "decoder.embed.weight" in changed
    assert all(name.startswith("decoder.") for name in changed)


@pytest.mark.parametrize("changes", [
    dict(loss="mse", mlm=0.5), dict(target="span"), dict(ema_half_life=0), dict(accum=2),
    dict(masks=2), dict(dtype="bf16"), dict(recipe="paper", top_k=1)])
def test_every_objective_trains(world, tmp_path, changes):
    """A switch that breaks a loss shows here, and not after hours."""
    given = FLAGS | dict(data=world.cfg.data, out=str(tmp_path / "run"), phase="pretrain",
                         pretrain_steps=4)
    figures = train.run(train.resolve(given | changes))
    assert np.isfinite(figures["loss"]) and figures["grad"] > 0


def test_accum_splits_the_same_batch(world):
    """--accum saves memory: its parts are the rows of one batch, and their mean gradient is that
    of the batch, because the loss of phase 2 is a mean over rows."""
    gradients = []
    for accum in (1, 4):
        run = open_run(world.cfg)
        run = run._replace(cfg=dataclasses.replace(run.cfg, accum=accum))
        loss_at, _ = train.distill(run)
        torch.manual_seed(0)
        for _ in range(accum):
            (loss_at(0.0)[0] / accum).backward()
        gradients.append(run.model.predictor.latent_proj.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_ctrl_c_saves_and_says_how_to_go_on(world, tmp_path):
    """A real process, a real signal: exit code 130, and a checkpoint from which it goes on."""
    out = tmp_path / "run"
    argv = [sys.executable, "train.py", *as_argv(FLAGS), "--phase=pretrain",
            f"--data={world.cfg.data}", f"--out={out}", "--pretrain_steps=100000"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (out / "ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(2)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in error
    assert train.load_checkpoint(out)["step"] > 0


# -- what a run says ---------------------------------------------------------------------------
@pytest.fixture
def shown(monkeypatch):
    """What the progress bars show, as (phase, dict) in the order of time."""
    shown = []
    monkeypatch.setattr(train.tqdm, "set_postfix", lambda bar, row: shown.append((bar.desc, row)))
    return shown


def test_the_bar_shows_the_loss_from_the_first_step_on(world, tmp_path, shown):
    """And after a resume the figures that were measured before it."""
    train.run(config(world.folder, tmp_path / "run", phase="pretrain", pretrain_steps=5))
    assert ["loss" in row for _, row in shown] == [False, True, True]
    shown.clear()
    train.run(train.resolve(dict(resume=True, out=str(tmp_path / "run"), pretrain_steps=7)))
    assert all({"loss", "rank", "health"} <= row.keys() for _, row in shown) and len(shown) == 3


def test_the_bar_shows_figures_of_questions_of_ones_own(world, tmp_path, shown):
    """They have no LAT facts and one phrasing."""
    train.run(config(world.folder, tmp_path / "run", **ONE_STEP))
    assert "r1_DEC" in dict(shown)["distill"] and "em_DEC" in dict(shown)["speak"]


def test_a_later_command_does_not_repeat_the_line_of_phase_1(world, tmp_path, capsys):
    """Phase 2 changes the encoder: the line would be stale. One command tells all that it did."""
    cfg = config(world.folder, tmp_path / "run", **ONE_STEP)
    train.run(dataclasses.replace(cfg, phase="pretrain"))
    assert "\npretrain: hit1" in capsys.readouterr().out
    train.run(dataclasses.replace(cfg, phase="distill"))
    said = capsys.readouterr().out
    assert "pretrain: hit1" not in said and "\ndistill: R@1" in said
    train.run(config(world.folder, tmp_path / "all", **ONE_STEP))
    assert "\npretrain: hit1" in capsys.readouterr().out


def test_a_collapsed_run_is_told_when_it_happens_and_at_the_end(world, tmp_path, capsys):
    """On a line of its own, once in the middle, and not again at each evaluation."""
    given = FLAGS | dict(recipe="collapse", data=world.cfg.data, out=str(tmp_path / "run"),
                         phase="pretrain", pretrain_steps=80, eval_every=20, pretrain_lr=3e-3)
    train.run(train.resolve(given))
    lines = [line for line in capsys.readouterr().out.splitlines() if "COLLAPSED" in line]
    assert len(lines) == 2 and lines[0].startswith("step ") and lines[1].startswith("COLLAPSED: ")
    assert all("--stop_gradient=False" in line for line in lines)


# -- the learning rate and the clock ---------------------------------------------------------------
def test_the_learning_rate_rises_linearly_then_falls_by_a_cosine():
    """Warm-up to the peak, a cosine after it, a tenth of the peak at the end."""
    peak, steps, warmup = 2.0, 1000, 0.1
    rates = [train.learning_rate(step, steps, peak, warmup) for step in range(steps)]
    assert rates[0] == pytest.approx(peak / 100)
    assert rates[49] == pytest.approx(peak / 2)                     # half of the warm-up
    assert rates[500] == pytest.approx(0.55 * peak)                 # half of the cosine
    assert rates[-1] == pytest.approx(0.1 * peak, rel=1e-3)
    top = rates.index(max(rates))
    assert 90 <= top <= 100 and 0.97 * peak < max(rates) <= peak
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_without_warmup_the_first_step_has_the_peak_rate():
    """warmup=0 must not divide by zero."""
    assert train.learning_rate(0, 1000, 2.0, 0.0) == pytest.approx(2.0)


def test_the_optimizer_gets_the_learning_rate_of_the_step(world):
    """The log shows the rate that was used."""
    rows = train.load_checkpoint(world.cfg.out)["rows"]
    rates = {row["step"]: row["lr"] for row in rows if row["phase"] == "speak" and "lr" in row}
    assert {20, 40, 60, 80, 100} <= rates.keys()
    for step, rate in rates.items():
        assert rate == train.learning_rate(step - 1, 100, FLAGS["speak_lr"], world.cfg.warmup)


def one_step(folder, **changes):
    """`train.fit` for a single step of phase 1 of a small model: (model, optimizer, log)."""
    model, saved = make(ema_half_life=1), []
    cfg = train.Config(out=str(folder), pretrain_steps=1, pretrain_lr=0.01, **changes)
    run, log = train.Run(cfg, model, None, "cpu", None), report.Log(cfg.out, [])
    train.fit(run, "pretrain", lambda progress: (loss_of(model, "pretrain"), {}),
              lambda whole: {}, log, lambda step, optimizer, evaluated: saved.append(optimizer))
    return model, saved[-1], log


def test_the_target_follows_the_weights_that_a_step_has_changed(tmp_path):
    """Half-life 1: it ends halfway between where both began and the new context encoder."""
    before = make().context_encoder.embed.weight
    model, _, _ = one_step(tmp_path)
    after = model.context_encoder.embed.weight
    assert (after - before).abs().max() > 5e-3
    torch.testing.assert_close(model.target_encoder.embed.weight, (before + after) / 2)


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_the_optimizer_gets_a_gradient_no_longer_than_clip(tmp_path, clip):
    """The first moment of AdamW is a tenth of its first gradient; the log has the length before."""
    _, optimizer, log = one_step(tmp_path, clip=clip)
    moments = [state["exp_avg"].norm() for state in optimizer.state.values()]
    length = log.rows[-1]["grad"]
    assert 1e-2 < length < 1e6
    found = torch.stack(moments).norm().item()
    assert found == pytest.approx(0.1 * min(length, clip), rel=1e-2)


@pytest.mark.parametrize("echo, n_echo", [(0.0, 0), (0.2, 4), (0.75, 15)])
def test_echo_is_the_share_of_echoes_in_each_part_of_a_batch(echo, n_echo):
    """Of ten questions and thirty answers: two parts of twenty lessons."""
    run = SimpleNamespace(cfg=SimpleNamespace(qa_batch_size=40, accum=2, echo=echo), device="cpu")
    lessons = SimpleNamespace(texts=torch.zeros(40, 3), n_questions=10)
    for part in train.draw_lessons(run, lessons).chunk(2):
        assert len(part) == 20 and (part >= 10).sum() == n_echo


def test_tokens_a_second_are_those_of_steps_and_not_of_evaluations(world, tmp_path, monkeypatch):
    """By a clock that a step moves by a second, and an evaluation by a hundred."""
    cfg = config(world.folder, tmp_path, phase="pretrain", pretrain_steps=60, eval_every=40)
    run = open_run(world.cfg)._replace(cfg=cfg)
    now = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    log, loss_at = report.Log(cfg.out, []), train.pretrain(run)[0]

    def step(progress):
        now[0] += 1
        return loss_at(progress)

    def measure(whole):
        now[0] += 100
        return {}
    train.fit(run, "pretrain", step, measure, log, lambda step, optimizer, evaluated: None)
    rates = [row["tok_s"] for row in log.rows if "tok_s" in row]
    assert rates == [cfg.batch_size * cfg.block_size] * 3


def test_a_resumed_run_takes_the_weight_decay_that_it_is_given(world):
    """The saved optimizer holds the old one; the group without decay stays without."""
    run = open_run(world.cfg)
    run = run._replace(cfg=config(world.folder, world.cfg.out, weight_decay=0.3))
    state = train.load_checkpoint(world.cfg.out)["optimizer"]
    groups = train.make_optimizer(run, "speak", state).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


# -- phase 1 goes on -------------------------------------------------------------------------------
def test_phase_1_goes_on_from_another_run(world, tmp_path):
    """It starts where the other run stopped, bit by bit, in another folder."""
    first = config(world.folder, tmp_path / "first", phase="pretrain", pretrain_steps=6)
    train.run(first)
    given = dict(init_from=first.out, out=str(tmp_path / "more"), phase="pretrain",
                 pretrain_steps=0)
    figures = train.run(train.resolve(given))
    before, after = weights(first.out), weights(given["out"])
    assert all(torch.equal(before[name], after[name]) for name in before
               if name.startswith(("context_encoder", "target_encoder", "predictor")))
    assert figures["hit1"] == train.load_checkpoint(first.out)["rows"][-1]["hit1"]
    given |= dict(pretrain_steps=4, seed=1)
    assert train.run(train.resolve(given))["step"] == 4
    resumed = dict(resume=True, out=given["out"], pretrain_steps=6)
    assert train.run(train.resolve(resumed))["step"] == 6


def test_phase_1_goes_on_with_another_text(world, tmp_path):
    """The vocabulary stays, also where the shipped facts have one of their own."""
    ranks = train.load_checkpoint(world.cfg.out)["tokenizer"]
    (tmp_path / "other.txt").write_text("The lake is blue and deep. " * 99)
    for number, text in enumerate((str(tmp_path / "other.txt"), "facts")):
        given = dict(init_from=world.cfg.out, data=text, out=str(tmp_path / str(number)),
                     phase="pretrain", pretrain_steps=2)
        if text == "facts":
            # at 400 tokens the statements of the cloze are longer than a row
            with pytest.raises(ValueError, match="--block_size=32"):
                train.run(train.resolve(given))
            continue
        train.run(train.resolve(given))
        saved = train.load_checkpoint(given["out"])
        assert saved["tokenizer"] == ranks and saved["config"]["data"] == text


def test_facts_can_be_read_in_the_tokens_of_another_run(world):
    """Word by word the same text."""
    tokenizer = data.Tokenizer.from_state(train.load_checkpoint(world.cfg.out)["tokenizer"])
    cfg = train.Config()
    own, theirs = data.load(cfg), data.load(cfg, tokenizer)
    assert theirs.tokenizer is tokenizer and own.fingerprint == theirs.fingerprint
    for text in ("train", "val"):
        mine, other = getattr(own, text), getattr(theirs, text)
        assert own.tokenizer.decode(mine.tokens[-3000:].tolist()) == tokenizer.decode(
            other.tokens.tolist())[-len(own.tokenizer.decode(mine.tokens[-3000:].tolist())):]
        assert (mine.tokens == mine.eos).sum() == (other.tokens == other.eos).sum()


# -- questions in other words ----------------------------------------------------------------------
def test_rewordings_are_asked_and_never_taught(world, tmp_path, capsys):
    """Figures stand beside those of the training questions."""
    (tmp_path / "val.tsv").write_text("The moss has which colour?\tgreen\n"
                                      "Which colour has the rose?\tred\n")
    cfg = config(world.folder, tmp_path / "run", qa_val=str(tmp_path / "val.tsv"), **ONE_STEP)
    figures = train.run(cfg)
    assert {"r1_DEC_heldout", "em_DEC_heldout"} <= figures.keys()
    assert "trained / held-out phrasing" in capsys.readouterr().out
    rows = data.load(cfg).qa
    assert [row.question for row in rows if row.phrasing == "heldout"] == [
        "The moss has which colour?", "Which colour has the rose?"]
    assert not {row.question for row in rows if row.phrasing == "trained"} & {
        row.question for row in rows if row.phrasing == "heldout"}


# -- recipes ---------------------------------------------------------------------------------------
def test_recipe_paper_is_section_3_1_of_the_paper():
    """Mean latents of spans, last layer, plain MSE, nothing beside it."""
    cfg = train.resolve(dict(recipe="paper"))
    assert (cfg.target, cfg.top_k, cfg.target_norm, cfg.loss) == ("span", 1, False, "mse")
    assert cfg.sigreg == cfg.mlm == 0


@pytest.mark.parametrize("recipe, collapses", [("collapse", True), ("latent", False)])
def test_recipe_collapse_collapses_and_recipe_latent_does_not(world, tmp_path, recipe, collapses):
    """The lesson of the collapse panel in seconds: one without cures, one with them."""
    given = FLAGS | dict(recipe=recipe, data=world.cfg.data, out=str(tmp_path / "run"),
                         phase="pretrain", pretrain_steps=60, eval_every=60, pretrain_lr=3e-3)
    train.run(train.resolve(given))
    rows = train.load_checkpoint(tmp_path / "run")["rows"]
    words = [row["health"] for row in rows if "health" in row]
    assert words[0] == "unlearned"                      # an untrained encoder is not called healthy
    assert (words[-1] == "collapsed") == collapses


def test_recipe_v2_has_no_phase_2_and_speaks_from_token_latents(world, tmp_path):
    """v2.0: no step of phase 2, memory=tokens, and no weight on the latent loss of phase 3."""
    given = {name: value for name, value in FLAGS.items() if name != "distill_steps"}
    given |= dict(recipe="v2", data=world.cfg.data, qa=world.cfg.qa, out=str(tmp_path / "run"),
                  speak_steps=40)
    train.run(train.resolve(given))
    saved = train.load_checkpoint(tmp_path / "run")
    assert saved["config"]["memory"] == "tokens"
    assert not [name for name in saved["model"] if name.startswith("decoder.slots")]
    assert {row["step"] for row in saved["rows"] if row["phase"] == "distill"} == {0}
    spoken = [row for row in saved["rows"] if "alpha" in row]
    assert spoken and all(row["alpha"] == 0 and row["loss"] == row["token"] for row in spoken)


def test_a_smoke_run_says_what_to_expect_of_it(world, tmp_path, capsys):
    """At the end of all its phases; other runs do not say it."""
    cfg = config(world.folder, tmp_path / "run", preset="minute", **ONE_STEP)
    train.run(cfg)
    assert report.MINUTE in capsys.readouterr().out.splitlines()
    train.run(dataclasses.replace(cfg, preset="tiny", out=str(tmp_path / "tiny")))
    assert report.MINUTE not in capsys.readouterr().out


def test_a_recipe_can_be_named_again_when_its_run_goes_on(world, tmp_path):
    """It asks for what the run has already."""
    given = FLAGS | dict(recipe="latent", data=world.cfg.data, out=str(tmp_path / "run"),
                         phase="pretrain", pretrain_steps=2)
    train.run(train.resolve(given))
    assert train.resolve(given | dict(resume=True)).mlm == 0
    assert train.resolve(dict(init_from=given["out"], out=str(tmp_path / "more"),
                              recipe="latent")).mlm == 0


def test_every_recipe_fits_every_preset_and_only_the_default_sees_tokens():
    """The masked-LM loss is the one that reads tokens in phase 1."""
    for preset in train.PRESETS:
        cfgs = {recipe: train.resolve(dict(recipe=recipe, preset=preset))
                for recipe in train.RECIPES}
        assert {recipe for recipe, cfg in cfgs.items() if cfg.mlm} == {"default"}
        assert cfgs["latent"].sigreg > 0


# -- teachers --------------------------------------------------------------------------------------
def test_vectors_of_another_width_can_teach(world, tmp_path):
    """Any teacher: random vectors of width 20 go through W, standardised."""
    teacher = random_vectors(tmp_path / "vectors.npz")
    figures = train.run(config(world.folder, tmp_path / "run", teacher=teacher,
                               distill_steps=200, speak_steps=2))
    concepts = train.load_checkpoint(tmp_path / "run")["concepts"]
    assert concepts.shape == (len(PAIRS), 20)
    torch.testing.assert_close(concepts.mean(0), torch.zeros(20), atol=1e-3, rtol=0)
    assert concepts.square().mean() == pytest.approx(1, abs=1e-3)
    assert figures["r1_DEC"] > 0.9


def test_another_run_can_teach(world, tmp_path):
    """--teacher=ckpt:DIR: L_a is what the other target encoder says, by its own tokenizer."""
    figures = train.run(config(world.folder, tmp_path / "run", teacher=f"ckpt:{world.cfg.out}",
                               n_embd=16, pred_embd=8, pretrain_steps=0, distill_steps=300,
                               speak_steps=2))
    saved, theirs = train.load_checkpoint(tmp_path / "run"), train.load_checkpoint(world.cfg.out)
    tokenizer = data.Tokenizer.from_state(theirs["tokenizer"])
    teacher = train.build(world.cfg, tokenizer, theirs["model"])
    answer = torch.tensor([tokenizer.encode(" " + saved["answers"][0])])
    mean, scale = saved["model"]["answer_mean"], saved["model"]["answer_scale"]
    expected = (teacher.concept(answer)[0] - mean) @ scale
    torch.testing.assert_close(saved["concepts"][0], expected)
    assert saved["config"]["teacher_width"] == world.cfg.n_embd
    assert figures["r1_DEC"] > 0.9


@pytest.mark.parametrize("phase", ["distill", "speak"])
def test_a_run_is_resumed_without_the_file_of_its_teacher(world, tmp_path, phase):
    """The answers' latents are in the checkpoint since phase 2 began."""
    teacher = random_vectors(tmp_path / "vectors.npz")
    cfg = config(world.folder, tmp_path / "run", teacher=teacher, phase="pretrain", **ONE_STEP)
    train.run(cfg)
    for name in train.PHASES[1:train.PHASES.index(phase) + 1]:
        train.run(train.resolve(dict(out=cfg.out, phase=name)))
    os.remove(teacher)
    given = {"resume": True, "phase": phase, "out": cfg.out, f"{phase}_steps": 4}
    assert train.run(train.resolve(given))["step"] == 4
    assert train.load_checkpoint(cfg.out)["config"]["teacher_width"] == 20


def test_a_teacher_that_has_moved_can_be_named_anew_while_phase_2_goes_on(world, tmp_path):
    """The content counts, not the path."""
    old = random_vectors(tmp_path / "vectors.npz")
    cfg = config(world.folder, tmp_path / "run", pretrain_steps=1, phase="pretrain")
    train.run(cfg)
    given = dict(out=cfg.out, phase="distill", distill_steps=2, teacher=old)
    train.run(train.resolve(given))
    moved = str(tmp_path / "moved.npz")
    os.rename(old, moved)
    given |= dict(resume=True, distill_steps=4, teacher=moved)
    assert train.run(train.resolve(given))["step"] == 4
    assert train.load_checkpoint(cfg.out)["config"]["teacher"] == moved


def test_one_answer_alone_is_taught_without_nan(world, tmp_path):
    """All questions have one answer: no spread to divide by. And a BOM is no part of the file."""
    (tmp_path / "one.tsv").write_text("\ufeffWhat is it?\tgreen\nAnd that?\tgreen\n", "utf-8")
    figures = train.run(config(world.folder, tmp_path / "run", qa=str(tmp_path / "one.tsv"),
                               **ONE_STEP))
    assert figures["r1_DEC"] == 1.0 and np.isfinite(figures["loss"])


# -- a folder that is used again -------------------------------------------------------------------
def test_starting_over_keeps_the_old_checkpoint(world, tmp_path):
    """A command typed twice must not cost the run of the day before."""
    for seed in (0, 1):
        train.run(config(world.folder, tmp_path / "run", phase="pretrain", pretrain_steps=2,
                         seed=seed))
    os.replace(tmp_path / "run" / train.PREVIOUS, tmp_path / "ckpt.pt")
    assert train.load_checkpoint(tmp_path)["config"]["seed"] == 0


def test_a_phase_begun_anew_keeps_the_old_checkpoint_and_drops_its_figures(world, tmp_path):
    """New thoughts under old speech figures would be a false report."""
    out = tmp_path / "run"
    train.run(config(world.folder, out, **ONE_STEP))
    spoken = train.load_checkpoint(out)
    figures = train.run(train.resolve(dict(phase="distill", out=str(out), distill_steps=4)))
    assert "em_DEC" not in figures and "r1_DEC" in figures and figures["step"] == 4
    phases = {row["phase"] for row in train.load_checkpoint(out)["rows"]}
    assert phases == {"pretrain", "distill"}
    os.replace(out / train.PREVIOUS, out / "ckpt.pt")
    previous = train.load_checkpoint(out)
    assert previous["phase"] == "speak" and previous["rows"] == spoken["rows"]


def test_a_run_goes_on_from_another_folder_and_with_a_text_that_has_moved(
        world, tmp_path, monkeypatch):
    """Paths are stored as absolute ones, and a text is compared by its content."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("text.txt", "qa.tsv"):
        shutil.copy(world.folder / name, here)
    given = FLAGS | ONE_STEP | dict(data="text.txt", qa="qa.tsv", out="../run")
    monkeypatch.chdir(here)
    train.main(as_argv(given))
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "--out=run", "--speak_steps=2"])
    os.rename(here / "text.txt", "book.txt")
    train.main(["--resume", "--out=run", "--speak_steps=3", "--data=book.txt"])
    saved = train.load_checkpoint("run")
    assert saved["step"] == 3 and saved["config"]["data"] == str(tmp_path / "book.txt")


def test_a_phase_that_was_stopped_and_begun_anew_keeps_the_run_that_had_ended(world, tmp_path):
    """The same command, typed again instead of --resume, must not replace the good copy."""
    out = shutil.copytree(world.cfg.out, tmp_path / "run")
    ended = (out / "ckpt.pt").read_bytes()
    anew = train.resolve(dict(phase="distill", out=str(out), distill_steps=4))
    train.run(anew)
    saved = train.load_checkpoint(out)
    train.save_checkpoint(out, saved | dict(step=2))        # as after Ctrl-C
    train.run(anew)
    assert (out / train.PREVIOUS).read_bytes() == ended


def test_a_resumed_run_repairs_its_config_json_and_its_log(world, tmp_path):
    """A process that was killed between two files leaves older ones."""
    out = shutil.copytree(world.cfg.out, tmp_path / "run")
    (out / "config.json").write_text("{}")
    rows = (out / "metrics.csv").read_text()
    (out / "metrics.csv").write_text(rows[:len(rows) // 2])
    train.run(train.resolve(dict(resume=True, out=str(out))))
    assert json.loads((out / "config.json").read_text())["seed"] == world.cfg.seed
    assert (out / "metrics.csv").read_text() == rows
    saved = train.load_checkpoint(out)
    last = {name: value for name, value in saved["rows"][-1].items() if name[:2] != "em"}
    train.save_checkpoint(out, saved | dict(evaluated=False, rows=[*saved["rows"][:-1], last]))
    train.run(train.resolve(dict(resume=True, out=str(out))))
    assert (out / "metrics.csv").read_text() == rows


def test_a_copied_folder_is_a_run_of_its_own(world, tmp_path, monkeypatch):
    """A run goes on in the folder that is named, not in the one where it was written first."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.cfg.out, train.Config.out)
    for given in (dict(phase="speak"), dict(resume=True)):
        assert train.resolve(given).out == train.Config.out


# -- what each phase may read ----------------------------------------------------------------------
def test_lat_and_txt_facts_are_kept_from_the_decoder(monkeypatch):
    """Phase 3 reads DEC questions in trained wordings and bare answers; phase 2 reads questions
    of DEC and LAT. A leak here would make every figure on LAT and TXT worthless."""
    cfg = train.Config(dtype="fp32", device="cpu", question_noise=0, made_up=0)
    corpus = data.load(cfg)
    questions = data.Questions(corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size, "cpu")
    torch.manual_seed(0)
    run = train.Run(cfg, train.build(cfg, corpus.tokenizer), corpus, "cpu", None, questions,
                    torch.randn(len(questions.answers), cfg.n_embd))

    def text(tokens):
        return {corpus.tokenizer.decode(row).strip() for row in tokens.tolist()}

    def trained(*splits):
        encode = corpus.tokenizer.encode_question
        return {corpus.tokenizer.decode(encode(row.question)).strip() for row in questions.rows
                if row.split in splits and row.phrasing == "trained"}
    lessons = train.make_lessons(run)
    assert text(lessons.texts[:lessons.n_questions]) == trained("DEC")
    assert text(lessons.texts[lessons.n_questions:]) == set(questions.answers)

    taught, latents = set(), []

    def distill_loss(question, latent):
        taught.update(text(question))
        latents.extend(latent)
    monkeypatch.setattr(run.model, "distill_loss", distill_loss)
    loss_at, _ = train.distill(run)
    for _ in range(20):
        loss_at(0.0)
    assert len(taught) > 1000 and taught <= trained("DEC", "LAT")

    # with noise and made-up subjects the goal is the answer of such a question, or 0
    latents.clear()
    loss_at, _ = train.distill(run._replace(cfg=train.Config()))
    for _ in range(20):
        loss_at(0.0)
    asked = questions.where("DEC", "LAT", phrasing="trained")
    goals = torch.cat((run.concepts[questions.answer_of[asked]], torch.zeros(1, cfg.n_embd)))
    exact = "donot_use_mm_for_euclid_dist"
    assert torch.cdist(torch.stack(latents), goals, compute_mode=exact).amin(1).max() < 1e-3
    assert 0.15 < sum(not latent.any() for latent in latents) / len(latents) < 0.25


def test_splits_and_phrasings_are_disjoint():
    """A fact has one split, a wording one phrasing; NEVER subjects and cloze items are unread."""
    corpus = data.load(train.Config())
    split_of = {}
    for row in corpus.qa:
        assert split_of.setdefault((row.subject, row.relation), row.split) == row.split
    trained = {row.question for row in corpus.qa if row.phrasing == "trained"}
    for phrasing in ("heldout", "typed", *evaluate.TYPING, "natural", "made_up", "nonsense"):
        others = {row.question for row in corpus.qa if row.phrasing == phrasing}
        assert trained and others and not trained & others, phrasing
    text = corpus.tokenizer.decode(np.asarray(corpus.train.tokens).tolist())
    # a line of nonsense, as "?", has no subject
    never = {row.subject for row in corpus.qa if row.split == "NEVER" and row.relation != "none"}
    held_out = {row.statement.replace("{a}", row.answer) for row in corpus.cloze}
    assert [sentence for sentence in never | held_out if sentence in text] == []


def test_the_table_of_facts_is_as_large_and_varied_as_promised():
    """1500 facts, ten relations, each with many wordings, two or more of them held out."""
    facts, templates = read_tsv("facts.tsv"), read_tsv("templates.tsv")
    relations = {relation for _, relation, _ in facts}
    assert len(facts) >= 1500 and len(relations) >= 10
    assert len({(subject, relation) for subject, relation, _ in facts}) == len(facts)
    for relation in relations:
        kinds = [template[1] for template in templates if template[0] == relation]
        assert kinds.count("statement") >= 8 and kinds.count("heldout") >= 2
        assert kinds.count("question") + kinds.count("heldout") >= 10


def test_rows_end_at_the_end_of_their_document():
    """No row crosses an EOS: no attention and no span across documents."""
    tokenizer, eos = SimpleNamespace(pad=90, eos=91), 91
    stream = np.array([1, 2, 3, eos, 4, 5, eos, *range(10, 30), eos], dtype=np.uint16)
    text = data.Text(stream, 8, tokenizer, "toy")
    rows = text.rows(range(len(text.starts))).tolist()
    assert rows[0] == [1, 2, 3] + [90] * 5 and rows[1] == [4, 5] + [90] * 6
    assert rows[2] == list(range(10, 18)) and rows[-1] == list(range(22, 30))
    assert len(rows) == 2 + 13


def test_help_lists_every_flag_with_its_reason(capsys):
    """The comment of a field is its help, word by word, however it is wrapped."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = "".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    reasons = flags.comments(train.Config)
    for field in dataclasses.fields(train.Config):
        reason = "".join(reasons[field.name].split())
        assert f"--{field.name}" in text and reason and reason in text


# -- threads ---------------------------------------------------------------------------------------
def test_a_short_trial_chooses_the_threads_and_says_so(monkeypatch, capsys):
    """Two threads on a busy machine take longer than one: the clock of the trial decides."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    for slow, best in ((2, 1), (1, 2)):
        ticks = itertools.count()

        def now():
            """A clock: from one reading to the next 5 seconds with the slow number, else 1."""
            return next(ticks) * (5.0 if used[-1] == slow else 1.0)
        monkeypatch.setattr(train.time, "perf_counter", now)
        assert train.pick_threads(train.Config(n_embd=32, pred_embd=32, batch_size=2)) == best
        assert used[-1] == best
        assert f"CPU threads: {best} (in a trial 2 took" in capsys.readouterr().out


def test_threads_that_are_asked_for_need_no_trial(monkeypatch, capsys):
    """A resumed run takes those of its checkpoint: others would round differently."""
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    assert train.pick_threads(train.Config(threads=3)) == 3 and used == [3]
    assert "CPU threads: 3 (as asked, or as before)" in capsys.readouterr().out
