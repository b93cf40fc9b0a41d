"""The page of a run: it says what sample.py says, in a real browser, by keyboard, on a phone.

Where there is no Chromium the tests that open the page are skipped. `python -m tests.page` asks a
real run 400 questions.
"""
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import report
import train
from labs import moments
from labs import page as lab
from tests import browser
from tests.page import compare, energy_error, opened, type_and_enter
from tests.toy import PAIRS, THINGS

QUESTIONS = [question for question, _ in PAIRS]
NOISY = ["  what is the COLOUR of the moss ", "WHAT IS THE COLOUR OF THE ROSE?", "colour lake",
         "What\u2019s the \u201ccolour\u201d of the\u00a0snow", "What is the colour of the coaal?",
         "e\u0301t, \u00dcber 12345?", "\u4e2d\u6587 \U0001f600??"]
in_a_browser = pytest.mark.skipif(browser.find() is None, reason=browser.WHY_NOT)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A copy of the toy run with its page."""
    out = tmp_path_factory.mktemp("page") / "run"
    shutil.copytree(world.cfg.out, out)
    lab.main([f"--out={out}", f"--beside={out}"])
    return out


@pytest.fixture(scope="module")
def page(run):
    """The page in a browser."""
    if browser.find() is None:
        pytest.skip(browser.WHY_NOT)
    with browser.Browser() as program:
        yield opened(program, run)


# -- the page says what Python says ----------------------------------------------------------------

@in_a_browser
def test_the_page_answers_as_sample_does_also_what_is_typed_badly(page, run):
    other, error = compare(page, lab.open_session(run), QUESTIONS + NOISY)
    assert other == [] and error < 1e-2
    page.run("model.cfg.n_slots = 3")           # another model is noticed
    other, _ = compare(page, lab.open_session(run), QUESTIONS)
    page.run("model.cfg.n_slots = 4")
    assert other


@in_a_browser
def test_energies_of_the_page_are_those_of_python(page, run):
    text = "We saw that the moss was [green] again."
    error, same = energy_error(page, lab.open_session(run), text)
    assert error < 1e-2 and same


@in_a_browser
@pytest.mark.parametrize("changes", [dict(memory="tokens"), dict(target="token", top_k=1),
                                     dict(loss="mse", target="span", top_k=0, embed_scale=1.0,
                                          target_norm=False, stop_gradient=False)])
def test_other_shapes_of_the_model_run_in_the_page_too(changes, world, tmp_path):
    cfg = dataclasses.replace(world.cfg, out=str(tmp_path), pretrain_steps=2, distill_steps=20,
                              speak_steps=30, **changes)
    train.run(cfg)
    lab.main([f"--out={tmp_path}"])
    with browser.Browser() as program:
        page = opened(program, tmp_path)
        session = lab.open_session(tmp_path)
        other, error = compare(page, session, QUESTIONS[:4])
        energy, _ = energy_error(page, session, "The moss is [green].")
        assert other == [] and error < 1e-2 and energy < 1e-2 and page.errors() == []


# -- what one does with it -------------------------------------------------------------------------

def said(page):
    """The words in large letters."""
    return page.run("document.querySelector('#words output')?.textContent")


@in_a_browser
def test_keyboard_alone_asks_moves_the_thought_fills_a_gap_and_goes_through_time(page):
    page.look()
    page.run("for (const box of document.querySelectorAll('input[type=checkbox]'))"
             " box.checked = false; $('anyway').checked = true")
    type_and_enter(page, QUESTIONS[1])
    assert said(page) == PAIRS[1][1] and page.run("$('tokens').textContent").endswith("rose?")

    def tab_to(name):
        for _ in range(40):
            page.press("Tab")
            if page.run("document.activeElement.id || document.activeElement.name") == name:
                return
        raise AssertionError(f"Tab does not lead to {name}")
    tab_to("map")
    before = page.run("$('thought').getAttribute('transform')")
    for _ in range(4):
        page.press("ArrowRight")
    assert page.run("$('thought').getAttribute('transform')") != before
    assert page.run("$('verdict').textContent").startswith("Moved by you")
    page.press("Escape")
    page.wait(f"$('thought').getAttribute('transform') === '{before}'")
    tab_to("off")
    page.press(" ")
    page.wait("$('note').textContent.startsWith('Decoder off')")
    assert said(page) is None
    page.press(" ")
    page.wait("document.querySelector('#words output')")
    tab_to("text")
    page.type("We saw that the moss was [green] again.")
    page.press("Enter")
    page.wait("document.body.dataset.filled")
    assert page.run("$('energies').children.length") == 6
    tab_to("time")
    page.press("Home")
    assert page.run("$('moment').textContent") == "phase 1, reading: step 0"
    assert page.run("$('figures0').textContent") == page.run("$('figures1').textContent")


@in_a_browser
def test_what_is_beyond_the_threshold_is_refused_and_each_switch_changes_what_is_said(page):
    page.run("for (const box of document.querySelectorAll('input[type=checkbox]'))"
             " box.checked = false")
    page.run("page.kept = page.threshold, page.threshold = -1, ask($('question').value)")
    assert said(page) == "I don't know"
    assert "beyond the threshold" in page.run("$('verdict').textContent")
    page.run("$('off').checked = true, answer()")
    page.wait("$('note').textContent.endsWith('far from all that is known.')")
    page.run("$('off').checked = false, $('anyway').checked = true, answer()")
    assert said(page) != "I don't know"
    assert page.run("$('note').textContent").startswith("A guess")
    page.run("page.threshold = page.kept")
    page.run(f"ask({json.dumps(QUESTIONS[0])})")
    cells = "document.querySelectorAll('.column:first-child i').length"
    assert said(page) == PAIRS[0][1] and page.run(cells) == 4
    page.run("$('single').checked = true, answer()")
    assert page.run(cells) == 1 and "One slot" in page.run("$('note').textContent")
    page.run("$('single').checked = false, $('shuffled').checked = true, answer()")
    assert said(page) != PAIRS[0][1]
    # dropped on a concept, the thought is that concept
    page.run("$('shuffled').checked = false, move_to(where[3])")
    name = json.dumps(sorted(answer for _, answer in PAIRS)[3])
    page.wait(f"document.querySelector('.bars span').textContent === {name}")


@in_a_browser
@pytest.mark.parametrize("look", [dict(), dict(width=360, height=740, touch=True),
                                  dict(dark=True)], ids=["wide", "phone", "dark"])
def test_the_page_fits_the_screen_and_complains_of_nothing(page, look, tmp_path):
    page.look(**look)
    width = look.get("width", 1200)
    assert page.run("document.documentElement.scrollWidth") <= width
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(22, 24, 29)") == look.get("dark", False)
    page.picture(tmp_path / "seen.png")
    assert (tmp_path / "seen.png").stat().st_size > 10_000
    assert page.errors() == []
    assert [url for url in page.requests() if not url.startswith("file:")] == []


@in_a_browser
def test_an_error_of_the_page_is_noticed(tmp_path):
    (tmp_path / "page.html").write_text(
        "<script>document.body.dataset.said = 1; gone()</script><body>")
    with browser.Browser() as program:
        page = program.open((tmp_path / "page.html").as_uri())
        assert page.errors()


# -- what is written -------------------------------------------------------------------------------

def test_the_model_in_javascript_has_at_most_400_lines_and_the_names_of_tjepa():
    model = (lab.HERE / "tjepa.js").read_text("utf-8")
    assert len(model.splitlines()) <= 400
    for source in (model, (lab.HERE / "page.js").read_text("utf-8")):
        assert max(map(len, source.splitlines())) <= 100
    python = Path(train.tjepa.__file__).read_text("utf-8")
    for kind in ("class", "function"):
        names = re.findall(rf"^{kind} (\w+)", model.split("// -- the transformer")[1], re.MULTILINE)
        assert len(names) > 2
        for name in names:
            assert re.search(rf"(?:class|def) {name}\b", python), name


def test_weights_keep_as_many_bits_as_they_are_given():
    torch.manual_seed(0)
    weights = {"context_encoder.a": torch.randn(5, 7), "decoder.b": torch.randn(11)}
    text, sizes = lab.pack_weights(weights)
    raw = lab.zlib.decompress(lab.base64.b64decode(text))
    numbers = (np.frombuffer(raw, np.uint8).reshape(2, -1)[::-1].T.copy().view("<i2")[:, 0])
    begin = 0
    for name, bits in zip(weights, (16, 13)):
        scale, shape = sizes[name]
        n = int(np.prod(shape))
        back = torch.tensor(numbers[begin:begin + n] * scale).view(shape)
        error = (back - weights[name]).abs().max() / weights[name].abs().max()
        assert 2.0 ** -bits / 4 < error < 2.0 ** -bits * 1.01
        begin += n


def test_texts_of_a_run_cannot_leave_their_place_in_the_page(world, tmp_path, monkeypatch):
    evil = "</script><script>alert(1)</script>"
    open_session = lab.open_session

    def opened_session(out):
        session = open_session(out)
        session.checkpoint["answers"][0] = evil
        return session
    monkeypatch.setattr(lab, "open_session", opened_session)
    text = lab.make_page(world.cfg.out)
    assert evil not in text and text.count("</script>") == 4


def test_snapshots_say_where_concepts_and_thoughts_lie(world):
    frames, _ = moments.read_frames(world.cfg.out)
    assert [frame.phase for frame in frames] == 2 * ["pretrain"] + 3 * ["distill"] + 3 * ["speak"]
    last = frames[-1].snapshot
    assert last["concepts"].dtype == np.float16 and last["concepts"].shape == (len(THINGS), 32)
    saved = train.load_checkpoint(world.cfg.out)
    weights = saved["model"]
    latents = (torch.tensor(last["concepts"]).float() - weights["answer_mean"]
               ) @ weights["answer_scale"]
    assert torch.allclose(latents, saved["concepts"], atol=0.02)
    # taught thoughts have come nearer to their answers than they were
    def gaps(frame):
        found = frame.snapshot
        place = [found["answers"].tolist().index(right) for right in found["right"]]
        return np.linalg.norm(found["thoughts"] - found["concepts"][place], axis=1).mean()
    assert gaps(frames[-1]) < 0.8 * gaps(frames[2])


def test_a_resumed_run_has_the_snapshots_of_an_uninterrupted_one(world, tmp_path, monkeypatch):
    save, cfg = train.save_checkpoint, dataclasses.replace(world.cfg, out=str(tmp_path / "run"))

    def save_and_die(out, checkpoint, *more):
        save(out, checkpoint, *more)
        if (checkpoint["phase"], checkpoint["step"]) == ("distill", 50):
            raise RuntimeError("power failure")
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(RuntimeError, match="power failure"):
        train.run(cfg)
    assert not (tmp_path / "run" / "snapshots" / "distill-50.npz").exists()
    monkeypatch.setattr(train, "save_checkpoint", save)
    train.run(dataclasses.replace(cfg, resume=True))
    pairs = zip(*(moments.read_frames(out)[0] for out in (cfg.out, world.cfg.out)), strict=True)
    assert all((one.snapshot[name] == two.snapshot[name]).all()
               for one, two in pairs for name in one.snapshot)


def test_a_run_without_snapshots_has_a_page_and_a_damaged_one_is_named(run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    broken = out / "snapshots" / "distill-50.npz"
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(SystemExit) as stopped:
        lab.main([f"--out={out}"])
    assert stopped.value.code == 2 and "distill-50.npz is damaged" in capsys.readouterr().err
    shutil.rmtree(out / "snapshots")
    assert "kept no snapshots" in lab.make_page(str(out))
    # a snapshot of an older run, which the log does not know, is not shown
    shutil.copytree(run / "snapshots", out / "snapshots")
    (out / "snapshots" / "distill-50.npz").rename(out / "snapshots" / "distill-7.npz")
    frames, _ = moments.read_frames(out)
    assert [frame.snapshot is None for frame in frames] == [
        (frame.phase, frame.step) == ("distill", 50) for frame in frames]


def test_a_collapse_is_smaller_on_the_map_than_a_healthy_cloud():
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(30, 8))

    def frame(latents):
        names = np.array([str(i) for i in range(30)])
        snapshot = dict(concepts=latents, thoughts=latents[:5], answers=names)
        return moments.Frame("pretrain", 0, {}, snapshot)
    turned = cloud @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
    first, last = moments.points_through_time([frame(turned), frame(cloud)])
    assert np.allclose(first[0], last[0])           # a turn of all latents is no movement
    small, _ = moments.points_through_time([frame(0.01 * cloud), frame(cloud)])
    assert np.allclose(small[0], 0.01 * last[0])


@pytest.mark.parametrize("argv, words", [
    (["--out=gone"], "no checkpoint"), (["--beside="], "no checkpoint"),
    (["--of=x"], "unknown flag")])
def test_bad_input_is_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        lab.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1


def test_a_run_on_own_text_that_knows_no_answers_is_told_what_to_do(world, tmp_path, capsys):
    cfg = dataclasses.replace(world.cfg, qa="", out=str(tmp_path), speak_steps=1)
    train.run(cfg)
    assert not (tmp_path / "snapshots").exists()
    with pytest.raises(SystemExit):
        lab.main([f"--out={tmp_path}"])
    assert "--phase=distill --qa=FILE" in capsys.readouterr().err


def test_every_evaluation_of_the_shipped_questions_has_a_hundred_of_all_splits(questions):
    asked = report.evenly(questions.where("DEC", "LAT", "TXT", "NEVER", phrasing="heldout"), 100)
    splits = {questions.rows[i].split for i in asked.tolist()}
    assert len(set(asked.tolist())) == 100 and splits == {"DEC", "LAT", "TXT", "NEVER"}
