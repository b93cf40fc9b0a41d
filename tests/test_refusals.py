"""What train.py refuses: one line that says what is wrong and what to change, and nothing is
written. What data files may look like in detail is tested in test_data.py."""
import io
import os
import pickle
import re
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import torch

import data
import tjepa
import train
from data import checkpoints
from tests.toy import COLOURS, FLAGS, as_argv, config, random_vectors, weights

SHORT = dict(phase="pretrain", pretrain_steps=2)


@pytest.fixture
def refused(capsys):
    """refused(*argv) -> the error of train.py: its only line, with exit code 2."""
    def refused(*argv):
        with pytest.raises(SystemExit) as stop:
            train.main([str(word) for word in argv])
        error = capsys.readouterr().err
        lines = [line for line in re.split("[\r\n]+", error) if "error:" in line]
        assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in error
        return lines[0]
    return refused


@pytest.fixture
def base(world):
    """The flags of a run on the world; later flags win."""
    return [*as_argv(FLAGS), f"--data={world.cfg.data}", f"--qa={world.cfg.qa}"]


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the world's run that a test may spoil."""
    return shutil.copytree(world.cfg.out, tmp_path / "run")


def contents(folder):
    """Path inside of the folder -> bytes of each file."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def write_checkpoint(folder, checkpoint, sealed=True):
    """Write anything as the checkpoint of a run, with or without the seal."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    content = bytes(buffer.getbuffer())
    (folder / "ckpt.pt").write_bytes(train.seal(content) if sealed else content)


# -- flags -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("flag, words", [
    ("--pretrain_step=5", "did you mean --pretrain_steps"),
    ("--n_embd=12.5", "n_embd"),
    ("--n_head=3", "multiple of 2 * n_head"),
    ("--mask_ratio=0", "mask_ratio"),
    ("--mask_ratio=1", "mask_ratio"),
    ("--mask_ratio=inf", "mask_ratio"),
    ("--mask_ratio=.99", "--mask_ratio=0.99 must be below 0.9844"),
    ("--pretrain_lr=-1", "pretrain_lr"),
    ("--pretrain_lr=nan", "pretrain_lr"),
    ("--dtype=fp16", "auto, fp32, bf16"),
    ("--phase=sing", "pretrain"),
    ("--loss=l7", "mse, infonce"),
    ("--memory=both", "thought, tokens"),
    ("--pred_layer=0", "--pred_layer=0 must be"),
    ("--compile=perhaps", "neither true nor false"),
    ("--top_k=9", "--top_k=9 must be"),
    ("--accum=3", "a divisor of both batch sizes"),
    ("--rounds=3", "a divisor of distill_steps"),
    ("--data=nowhere.txt", "nowhere.txt"),
    ("--qa=nowhere.tsv", "nowhere.tsv"),
    ("--teacher=nowhere.npz", "nowhere.npz"),
    ("--teacher=ckpt:nowhere", "--teacher=ckpt:"),
    ("--block_size=5000", "--block_size=5000"),
    ("--vocab_size=100", "--vocab_size=100"),
    ("--vocab_size=70000", "--vocab_size=70000"),
    ("--seed=10000000000", "--seed=10000000000"),
    ("--seed=1\n2", r"'1\n2' is not a whole number"),
    ("--phase=\x1b[2J", r"--phase=\x1b[2J must be"),
    ("--a\nb=1", r"unknown flag --a\nb=1"),
    ("--data=\u2028", r"--data="),
])
def test_a_bad_flag_is_named(base, refused, tmp_path, flag, words):
    """And the folder of the run is not created."""
    assert words in refused(*base, f"--out={tmp_path / 'run'}", flag)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["echo", "seed", "phase"])
def test_a_flag_before_two_dashes_has_no_value(base, refused, name):
    """argparse makes an empty list of it."""
    assert f"--{name}" in refused(*base, f"--{name}", "--")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_named(base, refused, tmp_path):
    """Not after the text has been read, and not as a traceback of torch."""
    assert "--device=cuda" in refused(*base, "--device=cuda", f"--out={tmp_path / 'run'}")


# -- text, pairs, vectors --------------------------------------------------------------------------
@pytest.mark.parametrize("content, words", [
    (b"", "empty"),
    (b"  \n", "empty"),
    (b"good text \xff\xfe", "byte 10"),
    (b"good\0text", "position 4"),
    (b"too short", "--block_size"),
])
def test_bad_text_says_what_is_wrong_and_where(refused, tmp_path, content, words):
    """A file of one's own is the first thing that goes wrong."""
    (tmp_path / "bad.txt").write_bytes(content)
    assert words in refused("--phase=pretrain", f"--data={tmp_path / 'bad.txt'}",
                            f"--out={tmp_path / 'run'}")


@pytest.mark.parametrize("content, words", [
    ("Who?\n", "line 1"),
    ("Who?\tme\nWhere?\t\n", "line 2"),
    ("\tme\n", "line 1"),
    ("Who?\t" + "very long " * 40, "line 1"),
    ("\n\n", "bad.tsv"),
])
def test_bad_pairs_name_their_line(base, refused, tmp_path, content, words):
    """The line is what one looks for in a file of hundreds."""
    (tmp_path / "bad.tsv").write_text(content)
    assert words in refused(*base, f"--qa={tmp_path / 'bad.tsv'}", f"--out={tmp_path / 'run'}")


def test_an_answer_must_fit_the_encoder_too(world, base, refused, tmp_path):
    """The target encoder gives an answer its latent: a longer one is refused before phase 1."""
    answer = "xyz " * 20
    (tmp_path / "long.tsv").write_text(f"Who?\t{answer}\n")
    said = refused(*base, f"--qa={tmp_path / 'long.tsv'}", "--answer_size=300",
                   f"--out={tmp_path / 'run'}")
    assert "32 fit" in said and said.endswith("--block_size") and not (tmp_path / "run").exists()
    row = data.QA("DEC", "trained", "qa", "Who?", "Who?", answer)
    with pytest.raises(ValueError, match="32 fit.*--block_size"):
        data.Questions([row], data.load(world.cfg).tokenizer, 32, 300, "cpu")


@pytest.mark.parametrize("fault", ["missing", "nan", "rows", "ragged", "no width", "too wide"])
def test_bad_vectors_are_refused(base, refused, tmp_path, fault):
    """A teacher's file that lacks an answer, holds no numbers, or has another number of rows."""
    answers, vectors = COLOURS, np.ones((len(COLOURS), 4))
    words = "bad.npz"
    if fault == "missing":
        answers, vectors, words = answers[1:], vectors[1:], COLOURS[0]
    elif fault == "nan":
        vectors[2, 1] = np.nan
        words = COLOURS[2]
    elif fault == "rows":
        vectors, words = vectors[1:], "rows"
    elif fault == "no width":
        vectors = vectors[:, :0]
    elif fault == "too wide":
        vectors, words = np.ones((len(COLOURS), 10_001), np.int8), "10,001 numbers wide"
    else:
        vectors = np.empty(len(COLOURS), dtype=object)
    np.savez(tmp_path / "bad.npz", answers=answers, vectors=vectors)
    assert words in refused(*base, f"--teacher={tmp_path / 'bad.npz'}",
                            f"--out={tmp_path / 'run'}")


def test_rows_too_short_for_the_cloze_are_refused_before_phase_1(base, refused, tmp_path):
    """The cloze is measured at the end: after hours, if nothing is said before."""
    said = refused(*base, "--data=facts", "--qa=", "--vocab_size=300", "--phase=pretrain",
                   f"--out={tmp_path / 'run'}")
    assert "--block_size=32" in said and not (tmp_path / "run").exists()


def test_gpt2_without_internet_says_which_file_to_put_where(base, refused, tmp_path, monkeypatch):
    """The one file that is downloaded."""
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("requests.head", offline)
    monkeypatch.setattr("requests.get", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    said = refused(*base, "--tokenizer=gpt2", "--phase=pretrain", f"--out={tmp_path / 'run'}")
    assert "TIKTOKEN_CACHE_DIR" in said


@pytest.mark.parametrize("content, words", [
    ("what is the colour of the MOSS?\tgreen\n", "is in --qa too"),
    ("How is the moss coloured?\tpink\n", "'pink', which no question of --qa has"),
    ("How is the moss coloured?\n", "line 1: 0 tabs"),
    ("How is the moss coloured?" + " very" * 99 + "\tgreen\n", "32 fit"),
])
def test_bad_rewordings_are_refused(base, refused, tmp_path, content, words):
    """A question that was taught, or an answer that was not, would make the figure worthless."""
    (tmp_path / "val.tsv").write_text(content)
    said = refused(*base, f"--qa_val={tmp_path / 'val.tsv'}", f"--out={tmp_path / 'run'}")
    assert words in said and "--qa_val=" in said and not (tmp_path / "run").exists()


def test_rewordings_need_questions(base, refused, tmp_path):
    """Of the shipped facts there are held-out wordings already."""
    said = refused(*base, "--qa=", "--qa_val=val.tsv", f"--out={tmp_path / 'run'}")
    assert "--qa_val=" in said and "give --qa=FILE too" in said


# -- phase 1 goes on -------------------------------------------------------------------------------
@pytest.mark.parametrize("argv, words", [
    (["--out={run}"], "is --out itself"),
    (["--n_embd=64"], "--n_embd=64, but the run in --init_from="),
    (["--vocab_size=300"], "--vocab_size=300, but the run in --init_from="),
    (["--recipe=latent"], "--recipe=latent, but the run in --init_from="),
    (["--init_from=nowhere"], "no checkpoint in --init_from=nowhere"),
    (["--phase=distill"], "--init_from begins a run with phase 1"),
    (["--resume"], "--init_from begins a run with phase 1"),
])
def test_phase_1_goes_on_with_the_same_model_in_another_folder(copy, refused, tmp_path, argv,
                                                               words):
    """Anything else is refused, and both folders stay as they were."""
    before = contents(copy)
    new = tmp_path / "new"
    said = refused(f"--init_from={copy}", f"--out={new}",
                   *(word.replace("{run}", str(copy)) for word in argv))
    assert words in said and contents(copy) == before and not new.exists()


# -- the order of the phases -----------------------------------------------------------------------
@pytest.mark.parametrize("flag", ["--phase=distill", "--phase=speak", "--resume"])
def test_what_continues_a_run_needs_one(refused, tmp_path, flag):
    """A wrong --out must not begin another run."""
    assert "no checkpoint" in refused(flag, f"--out={tmp_path / 'nothing'}")
    assert not (tmp_path / "nothing").exists()


def test_a_phase_needs_the_one_before_it(world, refused, tmp_path):
    """Speech without phase 2 would learn to say random thoughts."""
    train.run(config(world.folder, tmp_path / "run", **SHORT))
    assert "run --phase=distill first" in refused("--phase=speak", f"--out={tmp_path / 'run'}")


def test_a_phase_needs_the_end_of_the_one_before_it(world, refused, tmp_path):
    """A phase that was stopped halfway is resumed first."""
    cfg = config(world.folder, tmp_path / "run", **SHORT)
    train.run(cfg)
    saved = train.load_checkpoint(cfg.out)
    longer = saved["config"] | dict(pretrain_steps=4)
    train.save_checkpoint(cfg.out, saved | dict(config=longer))
    said = refused("--phase=distill", f"--qa={world.cfg.qa}", f"--out={cfg.out}")
    assert "step 2 of 4: run `python train.py --resume" in said


def test_phase_2_needs_questions(world, refused, tmp_path):
    """Own text without --qa is read and its gaps are said, but there is nothing to teach."""
    train.run(config(world.folder, tmp_path / "read", **SHORT))
    assert "give --qa" in refused("--phase=distill", "--qa=", f"--out={tmp_path / 'read'}")


# -- a folder holds one run ------------------------------------------------------------------------
def test_another_model_or_text_does_not_continue_a_run(world, copy, refused, tmp_path):
    """And the checkpoint stays as it was."""
    before = (copy / "ckpt.pt").read_bytes()
    text = (world.folder / "text.txt").read_text()
    (tmp_path / "other.txt").write_text(text + " more")
    out = f"--out={copy}"
    assert "n_embd" in refused("--phase=speak", "--n_embd=64", out)
    assert "leave the flag" in refused(f"--data={world.cfg.data}", "--phase=pretrain", out)
    assert "--data" in refused("--phase=speak", f"--data={tmp_path / 'other.txt'}", out)
    assert (copy / "ckpt.pt").read_bytes() == before


def test_a_changed_text_is_noticed(world, refused, tmp_path):
    """The same path with other content is another text."""
    text = tmp_path / "mine.txt"
    text.write_text((world.folder / "text.txt").read_text())
    train.run(config(world.folder, tmp_path / "run", data=str(text), **SHORT))
    text.write_text(text.read_text() + "A new end.")
    assert "is not the text" in refused("--resume", f"--out={tmp_path / 'run'}")


@pytest.mark.parametrize("flag", ["--recipe=latent", "--mlm=0", "--pred_embd=16", "--top_k=1"])
def test_a_later_phase_cannot_change_what_phase_1_was(world, refused, tmp_path, flag):
    """A recipe is a set of flags: each of them counts, named or not."""
    cfg = config(world.folder, tmp_path / "run", pred_embd=32, **SHORT)
    train.run(cfg)
    assert flag.split("=")[0] in refused("--phase=distill", f"--out={cfg.out}", flag)


# Another value of all that shapes a model or its reading. A list of its own: a name that is missing
# in train.FIXED must be missed here.
OTHERS = dict(recipe="latent", facts="all", tokenizer="gpt2", vocab_size=300, block_size=16,
              n_layer=1, n_head=1, n_embd=64, pred_layer=2, pred_embd=32, mlm=0.0, top_k=1,
              target_norm=False, embed_scale=2.0)


@pytest.mark.parametrize("name", OTHERS)
def test_what_shapes_the_model_stays_when_a_run_is_resumed(world, name):
    """Some of it changes no size of a weight: the run would go on, with another function."""
    asked = dict(resume=True, out=world.cfg.out)
    assert getattr(train.resolve(asked), name) != OTHERS[name]
    with pytest.raises(ValueError, match=f"^--{name}={OTHERS[name]}, but the run in --out="):
        train.resolve(asked | {name: OTHERS[name]})


def test_a_preset_counts_flag_by_flag_when_a_run_goes_on(world, refused):
    """Its facts=all contradicts a run on the tiny part."""
    said = refused("--phase=speak", f"--out={world.cfg.out}", "--preset=laptop")
    assert "--facts=all, but the run" in said


@pytest.mark.parametrize("argv", [
    ["--phase=speak", "--qa=other.tsv"],
    ["--phase=speak", "--teacher=ckpt:nowhere"],
    ["--resume", "--teacher=vectors.npz"],                  # phase 2 is over
    ["--resume", "--seed=1"],
    ["--resume", "--pretrain_steps=9"],
    ["--phase=distill", "--distill=align", "--teacher=ckpt:nowhere"],
    ["--phase=distill", "--distill=align", "--teacher=vectors.npz"],
])
def test_a_refused_command_leaves_the_run_as_it_was(copy, refused, tmp_path, monkeypatch, argv):
    """Whatever is wrong is said before anything is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.tsv").write_text("What is the colour of the moss?\tblue\n")
    before = contents(copy)
    refused(*argv, f"--out={copy}")
    assert contents(copy) == before


def test_a_teacher_that_is_gone_is_named_while_phase_2_goes_on(world, refused, tmp_path):
    """Phase 2 with --distill=align reads its teacher to the end."""
    shutil.copytree(world.cfg.out, tmp_path / "teacher")
    changes = dict(teacher=f"ckpt:{tmp_path / 'teacher'}", distill="align", align="thought",
                   pretrain_steps=1, distill_steps=2)
    for phase in ("pretrain", "distill"):
        train.run(config(world.folder, tmp_path / "run", phase=phase, **changes))
    os.rename(tmp_path / "teacher", tmp_path / "moved")
    said = refused("--phase=distill", "--resume", "--distill_steps=4", f"--out={tmp_path / 'run'}")
    assert "no checkpoint in --teacher=ckpt:" in said


def test_another_teacher_does_not_go_on_with_phase_2(world, refused, tmp_path):
    """The latents that it was taught are fixed when phase 2 begins."""
    out = tmp_path / "run"
    train.run(config(world.folder, out, phase="pretrain", pretrain_steps=1))
    argv = [f"--out={out}", "--phase=distill", "--distill_steps=2"]
    train.main([*argv, f"--teacher={random_vectors(tmp_path / 'a.npz')}"])
    other = random_vectors(tmp_path / "b.npz", width=21)
    said = refused(*argv, f"--teacher={other}", "--resume")
    assert "phase 2 was taught by" in said and "a.npz" in said


def test_the_files_of_another_program_are_not_overwritten(base, refused, tmp_path):
    """A metrics.csv without a checkpoint is someone else's."""
    (tmp_path / "metrics.csv").write_text("mine")
    assert "metrics.csv" in refused(*base, f"--out={tmp_path}")
    assert contents(tmp_path) == {"metrics.csv": b"mine"}


def test_two_processes_cannot_train_in_one_folder(world, copy, refused):
    """The second would write over the checkpoint of the first."""
    (copy / "lock.pid").write_text("4711")
    with checkpoints.locked(copy):
        assert "in use by process 4711" in refused("--resume", f"--out={copy}")


def test_the_process_that_holds_a_folder_is_named_from_the_start(copy, refused, monkeypatch):
    """Also while it still reads its data, and where a killed process left its number."""
    (copy / "lock.pid").write_text("4711")
    real, said = train.open_run, []

    def ask_meanwhile(*args):
        said.append(refused("--resume", f"--out={copy}"))
        return real(*args)
    monkeypatch.setattr(train, "open_run", ask_meanwhile)
    train.run(train.resolve(dict(resume=True, out=str(copy))))
    assert f"in use by process {os.getpid()}:" in said[0]
    assert not (copy / "lock.pid").exists()


# -- checkpoints -----------------------------------------------------------------------------------
class Evil:
    """Unpickled without care, it runs a command."""

    def __reduce__(self):
        return os.system, ("echo gotcha > gotcha",)


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "one bit", "not sealed"])
def test_a_damaged_checkpoint_is_refused(copy, refused, damage):
    """The seal notices a single bit, and the sentence says how to go on."""
    path = copy / "ckpt.pt"
    good = path.read_bytes()
    half = len(good) // 2
    path.write_bytes({
        "truncated": good[:half],
        "corrupted": bytes(1000) + good[1000:],
        "one bit": good[:half] + bytes([good[half] ^ 1]) + good[half + 1:],
        "not sealed": train.unseal(good, path),
    }[damage])
    said = refused("--resume", f"--out={copy}")
    assert "ckpt.pt is damaged" in said and "another --out" in said


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("foreign", [dict(format=1, config=Evil()), [1, 2, 3]])
def test_a_foreign_checkpoint_is_refused_and_runs_no_code(refused, tmp_path, monkeypatch,
                                                           foreign, sealed):
    """A downloaded checkpoint is not to be trusted."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path, foreign, sealed)
    assert "ckpt.pt" in refused("--resume", f"--out={tmp_path}")
    assert not (tmp_path / "gotcha").exists()


def test_a_pickle_of_another_protocol_is_refused_without_a_warning():
    """A refusal must be one line, and torch would say more."""
    buffer = io.BytesIO()
    torch.save(dict(format=train.FORMAT), buffer, pickle_protocol=5)
    with warnings.catch_warnings(record=True) as told, pytest.raises(pickle.UnpicklingError):
        warnings.simplefilter("always")
        checkpoints.unpack(buffer.getvalue())
    assert told == []


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("version", [train.FORMAT - 1, train.FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused(world, refused, tmp_path, version, sealed):
    """The names of the weights have changed: an old run needs the old program."""
    saved = train.load_checkpoint(world.cfg.out)
    write_checkpoint(tmp_path, saved | dict(format=version), sealed)
    said = refused("--resume", f"--out={tmp_path}")
    assert "ckpt.pt" in said and "another --out" in said
    assert "another version" in said or not sealed


def test_a_checkpoint_with_other_fields_is_refused(world, refused, tmp_path):
    """The same format, but of a program with another flag."""
    saved = train.load_checkpoint(world.cfg.out)
    saved["config"]["positions"] = "rotary"
    write_checkpoint(tmp_path, saved)
    assert "another version" in refused("--resume", f"--out={tmp_path}")


HOSTILE = {
    "another number of heads": lambda c: c["config"].update(n_head=4),
    "layers beyond all memory": lambda c: c["config"].update(n_layer=1000, n_embd=96_000),
    "a tokenizer in another order": lambda c: c["tokenizer"]["ranks"].append(
        c["tokenizer"]["ranks"].pop(300)),
    "a number that is a truth": lambda c: c.update(step=True),
    "a threshold that is no number": lambda c: c.update(threshold=float("nan")),
    "more answers than concepts": lambda c: c["answers"].append("pink"),
    "concepts of another width": lambda c: c.update(concepts=c["concepts"][:, :-1]),
    "concepts of whole numbers": lambda c: c.update(concepts=c["concepts"].long()),
    "weights of terabytes": lambda c: c["model"].update(
        answer_mean=torch.zeros(1).expand(10 ** 6, 10 ** 6)),
    "weights of another type": lambda c: c["model"].update(answer_mean=torch.zeros(32).double()),
    "a weight too many": lambda c: c["model"].update(extra=torch.zeros(3)),
    "a row of another program": lambda c: c["rows"][0].update(accuracy=1.0),
    "a step of 400 digits": lambda c: c["rows"][0].update(tokens=10 ** 400),
    "an earlier step than its log": lambda c: c.update(step=3),
    "an optimizer of other weights": lambda c: c["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(3)),
    "an optimizer that is none": lambda c: c.update(optimizer=dict(state=[1])),
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_checkpoint_is_refused(copy, refused, change):
    """Its SHA-256 is right, but what it holds is not what this program writes."""
    saved = train.load_checkpoint(copy)
    HOSTILE[change](saved)
    write_checkpoint(copy, saved)
    before = contents(copy)
    said = refused("--resume", "--speak_steps=200", f"--out={copy}")
    assert str(copy) in said and contents(copy) == before


@pytest.mark.parametrize("packed", [True, False])
def test_a_checkpoint_is_not_unpacked_beyond_its_size(copy, refused, packed):
    """A few kilobytes may unpack to terabytes; and each part has a checksum of its own."""
    content = train.unseal((copy / "ckpt.pt").read_bytes(), copy)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            new.writestr(name, old.read(name), kind)
    changed = bytearray(made.getvalue())
    if not packed:
        changed[len(changed) // 2] ^= 1
    (copy / "ckpt.pt").write_bytes(train.seal(changed))
    assert "no checkpoint of this program" in refused("--resume", f"--out={copy}")


@pytest.mark.parametrize("pickled", [
    b"", b"\x80\x02", b"\x80\x02G123", b"\x80\x02h\x09.", b"(" * 999])
def test_a_checkpoint_that_is_no_pickle_is_refused(copy, refused, pickled):
    """Its zip and all checksums are right; G is a number of 8 bytes, of which 3 are there."""
    content = train.unseal((copy / "ckpt.pt").read_bytes(), copy)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    (copy / "ckpt.pt").write_bytes(train.seal(made.getvalue()))
    assert "no checkpoint of this program" in refused("--resume", f"--out={copy}")


# -- what goes wrong while a run goes on -----------------------------------------------------------
def test_a_full_disk_keeps_the_last_checkpoint(world, refused, tmp_path, monkeypatch):
    """Written beside and renamed: the old file stays whole."""
    out = tmp_path / "run"
    train.run(config(world.folder, out, **SHORT))
    before = (out / "ckpt.pt").read_bytes()

    def no_space(file):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train.os, "fsync", no_space)
    assert "No space left" in refused("--resume", "--pretrain_steps=4", f"--out={out}")
    assert (out / "ckpt.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_and_says_what_to_lower(world, tmp_path, monkeypatch):
    """And the last checkpoint is the one before, with finite weights."""
    losses, real = [], tjepa.TJEPA.pretrain_loss

    def diverge(*args):
        """The loss is NaN from step 30 on."""
        loss, stats = real(*args)
        losses.append(loss if len(losses) < 30 else loss * float("nan"))
        return losses[-1], stats
    monkeypatch.setattr(tjepa.TJEPA, "pretrain_loss", diverge)
    with pytest.raises(ValueError, match="no longer a number at step 40: lower --pretrain_lr"):
        train.run(config(world.folder, tmp_path / "run", phase="pretrain", pretrain_steps=60,
                         eval_every=20))
    assert train.load_checkpoint(tmp_path / "run")["step"] == 20
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_ctrl_c_before_the_first_save_does_not_say_that_it_saved(copy, monkeypatch, capsys):
    """The finished run that is there is another one: --resume would train nothing."""
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "fit", interrupted)
    before = contents(copy)
    with pytest.raises(SystemExit) as stop:
        train.main(["--phase=speak", f"--out={copy}"])
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped; nothing was written\n"
    assert contents(copy) == before     # config.json too: it names the program that wrote ckpt.pt


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 160000000000 bytes. Error code 12"),
    MemoryError()])
def test_full_memory_says_how_to_take_less(refused, monkeypatch, error):
    """The commonest error on a GPU; on a CPU torch raises a RuntimeError like any other."""
    def full(cfg):
        raise error
    monkeypatch.setattr(train, "run", full)
    assert "out of memory: raise --accum=4" in refused("--accum=4")


def test_a_fault_of_the_program_is_shown_whole(monkeypatch):
    """It is no input's fault, and its traceback says where it is."""
    def fault(cfg):
        raise RuntimeError("expected scalar type Float")
    monkeypatch.setattr(train, "run", fault)
    with pytest.raises(RuntimeError, match="scalar type"):
        train.main([])
