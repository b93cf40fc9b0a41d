"""The log, the curves, the comparison of runs, and the flags that describe a run."""
import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

import flags
import report
import train

ROWS = [
    dict(phase="pretrain", step=0, std=0.9, rank=40.0, bound=64, health="healthy", val_r2=-0.1),
    dict(phase="pretrain", step=20, latent=0.5, loss=0.5),
    dict(phase="pretrain", step=40, latent=0.4, std=0.8, rank=32.0, bound=64, val_r2=0.1,
         hit1=0.1),
]


@dataclasses.dataclass
class Settings:
    """Flags of a program of its own."""
    GROUPS: ClassVar[dict] = {"begin here": ("prompt", "n_embd")}
    prompt: str = ""            # what to ask
    n_embd: int = 128           # width of the latents
    # how far one step goes;
    # too far, and the loss grows
    pretrain_lr: float = 1e-3
    pretrain_steps: int = 800   # steps of phase 1
    stop_gradient: bool = True  # targets get
                                # no gradient
    out: str = "out/run"        # folder of the run


def read(*argv, **options):
    return flags.read_flags(Settings, argv, "program.py", **options)


def refused(capsys, call, *argv, **options):
    """The call must end with exit code 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        call(*argv, **options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and ".py: error: " in error
    return error


def make_run(folder, rows=ROWS):
    folder.mkdir(parents=True)
    report.Log(folder, rows).flush()
    return str(folder)


# -- the log ---------------------------------------------------------------------------------------

def test_a_log_leaves_the_file_of_the_last_run_alone_until_its_first_flush(tmp_path):
    path = Path(make_run(tmp_path / "run")) / "metrics.csv"
    before = path.read_text()
    log = report.Log(tmp_path / "run", ROWS[:1])
    log.add(dict(phase="pretrain", step=30))
    assert path.read_text() == before
    log.flush()
    assert [row["step"] for row in report.read_metrics(tmp_path / "run")] == [0, 30]


def test_each_row_is_written_once(tmp_path):
    log = report.Log(tmp_path, ROWS[:1])
    for row in ROWS[1:]:
        log.flush()
        log.add(row)
    log.flush()
    assert report.read_metrics(tmp_path) == ROWS


def test_a_log_that_dies_while_it_writes_leaves_the_old_file_whole(tmp_path):
    path = Path(make_run(tmp_path / "run")) / "metrics.csv"
    before = path.read_text()
    with pytest.raises(ValueError):
        report.Log(tmp_path / "run", [dict(phase="pretrain", step=1, no_such_column=1)]).flush()
    assert path.read_text() == before


def test_what_is_read_is_what_was_logged(tmp_path):
    assert report.read_metrics(make_run(tmp_path / "run")) == ROWS


def test_the_newest_value_of_each_column_is_what_a_run_returns(tmp_path):
    last = report.Log(tmp_path, ROWS).last()
    assert (last["step"], last["val_r2"], last["health"]) == (40, 0.1, "healthy")


# -- the curves ------------------------------------------------------------------------------------

def test_drawing_leaves_pyplot_and_its_backend_alone(tmp_path):
    """In a process of its own: other tests may have imported pyplot."""
    code = ("import sys, report; report.draw_curves([], report.PHASES, sys.argv[1]); "
            "assert 'matplotlib.pyplot' not in sys.modules")
    root = Path(report.__file__).parent
    subprocess.run([sys.executable, "-c", code, tmp_path / "curves.png"], check=True, cwd=root)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def panels(draw, monkeypatch):
    """rows -> dict title -> axis of the panels that draw_curves saves."""
    def panels_of(rows):
        figures = []
        monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
        draw(rows, report.PHASES, "curves.png", title="out/run")
        assert figures[0].get_suptitle() == "out/run"
        assert [axis for axis in figures[0].axes if not axis.lines] == []
        return {axis.get_title(): axis for axis in figures[0].axes}
    return panels_of


def test_all_panels_share_one_range_of_steps(panels):
    ranges = {axis.get_xlim() for axis in panels(ROWS).values()}
    assert len(ranges) == 1 and max(ranges)[1] >= 40


def test_a_panel_of_which_nothing_was_measured_is_left_out(panels):
    axes = panels(ROWS)
    assert "exact match of speech" not in axes and "std across sequences" in axes
    # far below the panel, it is drawn at its lower edge
    axis = panels([dict(ROWS[0], val_r2=-7.0)])["R2: 0 = no better than the mean"]
    assert list(axis.lines[0].get_ydata()) == [-0.2]
    assert list(panels(ROWS[:1])) == [
        "R2: 0 = no better than the mean", "spread: std x rank / bound", "std across sequences",
        "effective rank of the latents"]
    assert panels([]) == {}


def test_std_and_hit1_have_fixed_axes(panels):
    rows = [dict(ROWS[0], hit1=0.1, chance=0.01)]
    axes = panels(rows)
    assert axes["std across sequences"].get_ylim() == (0, 1.2)
    assert axes["hit1 of latents, R@1 of thoughts"].get_ylim() == (0, 1)


def test_the_spread_stands_beside_its_two_thresholds(panels):
    axis = panels(ROWS)["spread: std x rank / bound"]
    heights = [float(line.get_ydata()[-1]) for line in axis.lines]
    assert heights[:3] == [0.8 * 32 / 64, report.tjepa.COLLAPSED, report.tjepa.HEALTHY]


def test_a_loss_that_two_phases_have_is_two_curves(panels):
    rows = [dict(phase=phase, step=step, latent=1.0) for phase in report.PHASES for step in (5, 9)]
    curves = panels(rows)["losses of phases 2 and 3"].lines[:2]
    assert [line.get_label() for line in curves] == ["phase 2: latent", "phase 3: latent"]
    # phase 1 ends at step 9, phase 2 at step 9 + 9
    assert [list(line.get_xdata()) for line in curves] == [[14, 18], [23, 27]]


def test_no_panel_has_more_than_five_curves():
    assert max(len(panel.lines) for panel in report.PANELS) <= 5


# -- several runs ----------------------------------------------------------------------------------

def test_runs_are_compared_in_one_picture_and_one_table(tmp_path, capsys):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    report.main([*runs, f"--out={tmp_path / 'new' / 'both.png'}"])
    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "new" / "both.png").stat().st_size > 10_000
    assert lines[0].split()[:5] == ["run", "phase", "step", "hit1", "spread"]
    assert [line.split()[:5] for line in lines[1:3]] == [
        [name, "pretrain", "40", "0.100", "0.400"] for name in ("a", "b")]


def test_a_figure_on_training_questions_is_called_that(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    rows = [dict(phase="distill", step=9, r1_DEC=0.7, r1_LAT=0.4, r1_LAT_heldout=0.2)]
    report.draw_comparison({"a": rows}, "curves.png")
    assert [axis.get_title() for axis in figures[0].axes] == [
        "R@1, facts of DEC, training questions", "R@1, facts of LAT, held-out phrasing"]
    assert report.summary(dict(r1_DEC=0.7)) == [
        "distill: R@1 of the thought, on the training questions: DEC 0.700"]
    said, = report.summary(dict(r1_DEC=0.7, r1_DEC_heldout=0.6))
    assert said.endswith("trained / held-out phrasing: DEC 0.700 / 0.600")


def test_healthy_never_stands_beside_a_negative_r2():
    """InfoNCE trains directions alone: it has no R2, and what decides is printed instead."""
    figures = dict(rank=95.0, bound=128, health="healthy", hit1=0.21, chance=0.001)
    said, = report.summary(figures)
    assert "R2" not in said and "hit1 0.21 (chance 0.001)" in said and "healthy" in said
    said, = report.summary(figures | dict(val_r2=0.5))
    assert "R2 0.50" in said and "hit1" not in said


COLLAPSED = dict(health="collapsed", std=0.02, rank=91.0, bound=128)


@pytest.mark.parametrize("changes, flag", [
    (dict(stop_gradient=False, ema_half_life=0, sigreg=0.0), "--stop_gradient=False"),
    (dict(ema_half_life=0, sigreg=0.0), "--ema_half_life=0"), (dict(sigreg=0.0), "--sigreg=0.0"),
    (dict(target_norm=False), "--target_norm=False"), ({}, "--pretrain_lr=0.002 (lower it)")])
def test_a_collapse_is_told_with_its_figure_and_the_flag_at_fault(changes, flag):
    said = report.alarm(COLLAPSED, train.Config(**changes))
    assert said.startswith("COLLAPSED: spread 0.014 is below 0.12 ")
    assert "(std 0.020 x rank 91 / bound 128)" in said
    assert f"Likely at fault: {flag}" in said and "\n" not in said
    assert report.alarm(COLLAPSED | dict(health="healthy"), train.Config(**changes)) is None


def test_a_copy_inside_of_another_repository_is_no_commit_of_that_one(tmp_path, monkeypatch):
    for made in (["git", "init", "-q"], ["git", "-c", "user.name=a", "-c", "user.email=b", "commit",
                                         "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(made, cwd=tmp_path, check=True)
    (tmp_path / "copy").mkdir()
    uncached = report.program_version.__wrapped__
    monkeypatch.setattr(report, "__file__", str(tmp_path / "copy" / "report.py"))
    assert uncached() == "unknown"
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    assert len(uncached()) >= 7 and uncached() != "unknown"
    monkeypatch.setenv("PATH", "")
    assert uncached() == "unknown"


def test_of_many_runs_five_have_a_colour(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    report.draw_comparison({str(number): ROWS for number in range(7)}, "curves.png")
    names = [text.get_text() for text in figures[0].legends[0].texts]
    assert names == ["0", "1", "2", "3", "4", "2 more"]


def test_a_folder_of_any_name_is_drawn(draw, tmp_path):
    """As it is written: not as a formula, not left out of the legend, and surrogates no error."""
    names = ["$a^$", "_b", "\udcff", "春"]
    draw(ROWS, report.PHASES, tmp_path / "one.png", title="out/$a^$ \udcff")
    report.draw_comparison(dict.fromkeys(names, ROWS), tmp_path / "several.png")
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "several.png"}
    figure, _ = report.new_figure("", 2)
    report.draw_names(figure, names)
    assert [text.get_text().strip() for text in figure.legends[0].texts] == [
        "$a^$", "_b", "\\udcff", "春"]


def test_a_refused_comparison_makes_no_folder(tmp_path, capsys):
    refused(capsys, report.main, [str(tmp_path / "none"), f"--out={tmp_path / 'new' / 'x.png'}"])
    assert list(tmp_path.iterdir()) == []


def test_following_redraws_until_ctrl_c(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "a")
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt
        report.Log(folder, [*ROWS, dict(phase="pretrain", step=60)]).flush()
    monkeypatch.setattr(report.time, "sleep", sleep)
    report.main([folder, "--follow", f"--out={tmp_path / 'curves.png'}"])
    assert pauses == [report.PAUSE] * 2
    assert " 60 " in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart_by_their_paths():
    names = report.names_of(["x/run", "y/run", "z"])
    assert list(names.values()) == [str(Path("x/run")), str(Path("y/run")), "z"]


def test_a_row_that_is_still_being_written_is_not_read(tmp_path):
    folder = make_run(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("pretrain,6")
    assert report.read_metrics(folder) == ROWS


@pytest.mark.parametrize("content, words", [
    (None, "no metrics.csv"), (b"", "damaged"), (b"\x89PNG\r\n\xff\n", "damaged"),
    (b"a,b\n1,2\n", "phase,step"), (b"phase,step,loss\n", "no rows"),
    (b"phase,step,loss\npretrain,1\n", "line 2"), (b"phase,step,loss\nsing,1,2\n", "line 2"),
    (b"phase,step,loss\npretrain,1,x\n", "'x' is not a number"),
    (b"phase,step\npretrain,\n", "line 2"), (b"phase,step\npretrain,-1\n", "line 2"),
    (b"phase,step\npretrain," + b"9" * 400 + b"\n", "line 2")])
def test_a_damaged_log_is_one_line(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "metrics.csv").write_bytes(content)
    out = f"--out={tmp_path / 'curves.png'}"
    assert words in refused(capsys, report.main, [str(tmp_path), out])


def test_a_log_that_never_ends_and_links_in_a_circle_are_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "metrics.csv")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    out = f"--out={tmp_path / 'curves.png'}"
    for folder in (tmp_path, tmp_path / "circle"):
        assert "no metrics.csv" in refused(capsys, report.main, [str(folder), out])


def test_a_picture_needs_a_name_of_a_picture(tmp_path, capsys):
    assert ".png" in refused(capsys, report.main, [make_run(tmp_path / "run"), "--out=x.txt"])


# -- flags -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag, meant", [
    ("--learning_rate=1", "pretrain_lr"), ("--lr=1", "pretrain_lr"),
    ("--max-iters=1", "pretrain_steps"),
    ("--epochs=1", "pretrain_steps"), ("--d_model=1", "n_embd"), ("--output_dir=x", "out"),
    ("--n_emb=1", "n_embd"), ("--promt=x", "prompt")])
def test_a_flag_of_another_program_is_answered_with_ours(capsys, flag, meant):
    assert f"did you mean --{meant}?" in refused(capsys, read, flag)


@pytest.mark.parametrize("flag", ["--zzz=1", "--heads=4", "--bs=4"])
def test_no_flag_is_proposed_that_is_not_near_or_not_there(capsys, flag):
    assert "did you mean" not in refused(capsys, read, flag)


@pytest.mark.parametrize("words, value", [
    (["--stop_gradient"], True), (["--stop_gradient=1"], True), (["--stop_gradient=Yes"], True),
    (["--stop_gradient", "false"], False), (["--stop_gradient=0"], False),
    (["--stop_gradient=no"], False), (["--no-stop_gradient"], False)])
def test_booleans_are_understood_as_people_write_them(words, value):
    assert read(*words, "--n_embd=8") == dict(stop_gradient=value, n_embd=8)


@pytest.mark.parametrize("flag, words", [
    ("--n_embd=12.5", "whole number"), (f"--n_embd={'9' * 5000}", "whole number"),
    (f"--n_embd={2 ** 63}", "64 bits"), ("--pretrain_lr=nan", "nan"),
    ("--pretrain_lr=x", "not a number"),
    ("--stop_gradient=perhaps", "neither true nor false")])
def test_a_value_that_cannot_be_is_one_short_line_that_names_the_flag(capsys, flag, words):
    error = refused(capsys, read, flag)
    assert words in error and flag.split("=")[0] in error and len(error) < 150


def test_infinity_is_left_to_the_dataclass():
    assert read("--pretrain_lr=inf") == dict(pretrain_lr=float("inf"))


def test_a_question_may_be_given_without_its_flag():
    asked = read("--stop_gradient", "Who wrote Hamlet?", "--n_embd=8", positional="prompt")
    assert asked == dict(stop_gradient=True, prompt="Who wrote Hamlet?", n_embd=8)


@pytest.mark.parametrize("words, said", [
    (["Who", "wrote", "it?"], 'program.py "Who wrote it?"'),
    (["Who?", "--prompt=Where?"], "twice")])
def test_a_question_in_pieces_or_twice_is_refused(capsys, words, said):
    assert said in refused(capsys, read, *words, positional="prompt")


def test_a_word_that_is_no_flag_is_refused(capsys):
    assert "--name=value" in refused(capsys, read, "pretrain")


def test_help_begins_with_what_a_beginner_needs(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    order = ["begin here:", "--prompt str", "--n_embd int", "more:", "--pretrain_lr float", "--out"]
    assert sorted(order, key=text.index) == order
    assert "how far one step goes; too far, and the loss grows [0.001]" in text
    assert "targets get no gradient [True]" in text


def test_no_terminal_is_too_plain_for_a_message(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    flags.plain_output()
    print("Brontë", flush=True)
    assert stream.buffer.getvalue().split() == [b"Bront?"]
