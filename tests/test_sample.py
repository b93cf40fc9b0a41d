"""What can be relied on when a run is asked, one property a test. The run is tiny: it knows eleven answers by heart."""

import dataclasses
import re
import shutil

import pytest
import torch

import data
import evaluate
import sample
import tjepa
import train

MAKERS = {"Octavia": "Škoda", "Clio": "Renault", "Golf": "Volkswagen", "Corolla": "Toyota", "Panda": "Fiat",
          "Civic": "Honda", "Mustang": "Ford", "Ibiza": "Seat", "Duster": "Dacia", "Sandero": "Dacia",
          "Roadster": "Tesla", "Swift": "Suzuki"}
ANSWERS = sorted(set(MAKERS.values()))
GOLF = ("--prompt=Golf?", "--always_answer")
TEXT = "".join(f"{car} number {n} went along the {colour} road past the old {place} ...\n" for car in MAKERS
               for n in range(2) for colour in ("red", "blue", "green") for place in ("house", "river"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folders of one run as each phase left it: pretrain, distill, speak."""
    home = tmp_path_factory.mktemp("sample")
    (home / "text.txt").write_text(TEXT, encoding="utf-8")
    (home / "qa.tsv").write_text("".join(f"{car}?\t{maker}\n" for car, maker in MAKERS.items()), encoding="utf-8")
    cfg = train.Config(data=str(home / "text.txt"), qa=str(home / "qa.tsv"), out=str(home / "run"), device="cpu",
                       dtype="fp32", n_embd=32, n_head=2, n_layer=2, top_k=2, pred_embd=16, pred_layer=1,
                       dec_layer=1, block_size=64, vocab_size=400, batch_size=8, qa_batch_size=12, pretrain_steps=4,
                       distill_steps=150, speak_steps=100, distill_lr=3e-3, speak_lr=1e-2, question_drop=0.0,
                       noise=0.0, echo=0.0, alpha_start=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "draw_curves", lambda *_: None)         # nobody looks at these curves
        for phase in train.PHASES:
            train.run(dataclasses.replace(cfg, phase=phase))
            shutil.copytree(home / "run", home / phase)
    return {phase: str(home / phase) for phase in train.PHASES}


@pytest.fixture
def ask(runs, capsys):
    """ask(*flags, phase=...) -> what is printed, as lines, but for the first, which is about the device."""
    def ask(*flags, phase="speak"):
        capsys.readouterr()
        sample.main([f"--out={runs[phase]}", *flags])
        return capsys.readouterr().out.splitlines()[1:]
    return ask


@pytest.fixture
def fails(capsys):
    """fails(*flags) -> the one line that an error prints; it must be the only one, and the exit code 2."""
    def fails(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            sample.main(list(flags))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("sample.py: error: ")
        return lines[0]
    return fails


def session(folder, **flags):
    return sample.open_session(sample.Flags(out=folder, **flags))

def with_threshold(folder, threshold, home):
    """A copy of a run that trusts thoughts up to another distance."""
    torch.save(train.load_checkpoint(folder) | dict(threshold=threshold), home / "ckpt.pt")
    return f"--out={home}"

def table(lines):
    """(number, text) of the lines between the head and the verdict of --inspect."""
    return [(float(line.split(maxsplit=1)[0]), line.split(maxsplit=1)[1]) for line in lines[1:-1]]


def test_what_was_taught_is_said(ask):
    for car, maker in MAKERS.items():
        assert re.fullmatch(rf"{maker}   \(distance \d+\.\d of \d+\.\d\)", *ask(f"--prompt={car}?", "--always_answer"))

def test_greedy_speech_knows_no_chance(ask):
    assert ask(*GOLF, "--seed=1") == ask(*GOLF, "--seed=2")

def test_one_candidate_leaves_no_choice(ask):
    assert ask(*GOLF, "--temperature=9", "--top_k=1") == ask(*GOLF)
    assert ask(*GOLF, "--temperature=9", "--top_p=1e-9") == ask(*GOLF)

def test_sampling_follows_the_seed(ask):
    said = [ask(*GOLF, "--temperature=2", f"--seed={seed}") for seed in (0, 0, 1, 2, 3)]
    assert said[0] == said[1] and any(said[0] != other for other in said[2:])

def test_each_answer_starts_from_the_seed(runs):
    # in a conversation too: what was asked before has no say
    asked = session(runs["speak"], temperature=2.0)
    thought, _ = sample.think(asked, "Golf?", "")
    assert list(sample.pieces(asked, thought)) == list(sample.pieces(asked, thought))

def test_streaming_equals_speaking_at_once(runs):
    asked = session(runs["speak"])
    corpus = data.Corpus(asked.tokenizer, None, None, [], [], {}, "")
    for car in MAKERS:
        thought, _ = sample.think(asked, f"{car}?", "")
        streamed = list(sample.pieces(asked, thought))
        assert ["".join(streamed)] == evaluate.say(asked.run._replace(corpus=corpus), thought)
        assert len(list(filter(None, streamed))) > 1

@pytest.mark.parametrize("said", [" Škoda".encode(), " naïve 🐳 ".encode(), "日本".encode(), b"  two  words ", b" ",
                                  "cut: 🐳".encode()[:-2]])
def test_no_character_is_shown_in_part(runs, monkeypatch, said):
    # byte by byte: what has been shown cannot be taken back
    asked = session(runs["speak"])
    ids = [asked.tokenizer.ranks.index(bytes([byte])) for byte in said] + [asked.tokenizer.eos]
    monkeypatch.setattr(tjepa.TJEPA, "speak", lambda *_: (torch.tensor([i]) for i in ids))
    *sure, rest = sample.pieces(asked, None)
    assert "".join([*sure, rest]) == asked.tokenizer.decode(ids).strip() and "\ufffd" not in "".join(sure)

def test_beyond_the_threshold_it_does_not_know(runs, ask, tmp_path):
    out = with_threshold(runs["speak"], 0.0, tmp_path)
    assert re.fullmatch(r"I don't know   \(nearest concept at \d+\.\d, threshold 0\.0; --always_answer speaks anyway\)",
                        *ask(out, "--prompt=Octavia?"))
    assert ask(out, "--prompt=Octavia?", "--always_answer")[0].startswith("Škoda   (distance ")

def test_within_the_threshold_it_speaks(runs, ask, tmp_path):
    assert ask(with_threshold(runs["speak"], 99.0, tmp_path), "--prompt=Octavia?")[0].startswith("Škoda")


def test_a_thought_is_shown_by_its_nearest_concepts(ask):
    # the decoder has learned nothing yet: phase 2 is enough
    rows = table(ask("--inspect=Octavia?", "--n=4", phase="distill"))
    assert len(rows) == 4 and rows == sorted(rows) and rows[0][1] == "Škoda"

def test_a_thought_is_as_far_as_its_latent(runs, ask):
    asked = session(runs["distill"])
    thought, _ = sample.think(asked, "Golf?", "")
    apart = {name: (concept - thought.latent[0]).norm().item()
             for name, concept in zip(ANSWERS, asked.checkpoint["concepts"])}
    assert dict(map(reversed, table(ask("--inspect=Golf?", "--n=99")))) == pytest.approx(apart, abs=0.006)

@pytest.mark.parametrize("threshold, verdict", [(0.0, "unknown: beyond the threshold of 0.00"),
                                                (99.0, "known: within the threshold of 99.00")])
def test_the_threshold_has_the_last_word(runs, ask, tmp_path, threshold, verdict):
    assert ask(with_threshold(runs["distill"], threshold, tmp_path), "--inspect=Golf?")[-1] == verdict


def test_a_gap_needs_phase_1_only(ask):
    lines = ask("--inspect=The [red] car went along the road.", "--n=3", phase="pretrain")
    assert len(table(lines)) == 3 and table(lines) == sorted(table(lines))

def test_before_phase_2_words_of_the_text_may_fill_a_gap(ask):
    names = {name for _, name in table(ask("--inspect=The [red] car went.", "--n=9999", phase="pretrain"))}
    assert {"red", "blue", "house"} < names and all(name.isalpha() and len(name) > 2 for name in names)

def test_after_phase_2_answers_may_fill_a_gap(ask):
    rows = table(ask("--inspect=The [Ford] car went.", "--n=99", phase="distill"))
    assert sorted(name for _, name in rows) == ANSWERS

@pytest.mark.parametrize("truth", ["Ford", "Škoda", "Trabant"])
def test_the_hidden_text_is_ranked(ask, truth):
    # one that is no candidate becomes one
    *_, last = lines = ask(f"--inspect=The [{truth}] car went along the road.", "--n=99")
    names = [name for _, name in table(lines)]
    assert re.fullmatch(rf"'{truth}' has energy \d\.\d{{4}}: rank {1 + names.index(truth)} of {len(names)}", last)

@pytest.mark.parametrize("before, after", [("The ", " car."), ("", " went home."), ("The '", "' car."), ("It went", "")])
def test_the_gap_holds_the_candidate_and_nothing_but_it(runs, monkeypatch, before, after):
    asked = session(runs["speak"])
    monkeypatch.setattr(tjepa.TJEPA, "energy", lambda _, tokens, spans: torch.stack((tokens, spans), dim=1))
    for (row, span), value in zip(evaluate.gap_energy(asked.run, asked.tokenizer, before, ANSWERS, after), ANSWERS):
        assert asked.tokenizer.decode(row.tolist()).strip() == before + value + after
        assert asked.tokenizer.decode(row[span == 0].tolist()).strip() == value

def test_a_candidate_is_judged_by_itself(runs):
    # long rivals bring padding, which must change nothing
    asked = session(runs["speak"])
    alone = torch.cat([evaluate.gap_energy(asked.run, asked.tokenizer, "The ", [value], " car.") for value in ANSWERS])
    torch.testing.assert_close(evaluate.gap_energy(asked.run, asked.tokenizer, "The ", ANSWERS, " car."), alone)


@pytest.fixture
def converse(ask, monkeypatch):
    """converse(*lines) -> what is printed after each; then the input ends."""
    def converse(*lines):
        lines = iter(lines)
        def read(prompt):
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None
        monkeypatch.setattr("builtins.input", read)
        said = ask("--always_answer")
        assert said[0] == "Ask a question; an empty line or Ctrl-D ends."
        return [line.split("   ")[0] for line in said[1:]]
    return converse

def test_a_conversation_goes_on_until_the_input_ends(converse):
    assert converse("Octavia?", "Golf?", "Octavia?") == ["Škoda", "Volkswagen", "Škoda", ""]

def test_an_empty_line_ends_a_conversation(converse):
    assert converse("Octavia?", " ", "Golf?") == ["Škoda"]

def test_a_conversation_survives_a_bad_question(runs, monkeypatch, capsys):
    lines = iter(["word " * 99, "Golf?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    sample.main([f"--out={runs['speak']}", "--always_answer"])
    out, err = capsys.readouterr()
    assert re.fullmatch(r"sample\.py: error: the question has \d+ tokens, above the run's block_size=64.*\n", err)
    assert out.splitlines()[-1].startswith("Volkswagen")

def test_ctrl_c_is_no_error(runs, monkeypatch, capsys):
    def interrupted(prompt):
        raise KeyboardInterrupt
    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(SystemExit) as stop:
        sample.main([f"--out={runs['speak']}"])
    assert stop.value.code == 130 and capsys.readouterr().err == ""


@pytest.mark.parametrize("flags, words", [
    (["--prompt="], "--prompt is empty"),
    (["--prompt= "], "--prompt is empty"),
    (["--inspect="], "--inspect is empty"),
    (["--prompt=" + "word " * 99], "above the run's block_size=64: shorten it"),
    (["--inspect=" + "word " * 99], "above the run's block_size=64: shorten it"),
    (["--inspect=[Ford] " + "word " * 99], "above the run's block_size=64: shorten it"),
    (["--prompt=Golf?", "--inspect=Golf?"], "--prompt and --inspect"),
    (["--inspect=The [red car"], "exactly one span in brackets"),
    (["--inspect=The red] car"], "exactly one span in brackets"),
    (["--inspect=The ]red[ car"], "exactly one span in brackets"),
    (["--inspect=The [red] [car]"], "exactly one span in brackets"),
    (["--inspect=The [[red]] car"], "exactly one span in brackets"),
    (["--inspect=The [] car"], "exactly one span in brackets"),
    (["--inspect= [red] "], "exactly one span in brackets"),
    (["--temperature=-1"], "--temperature=-1.0 must be"),
    (["--temperature=nan"], "--temperature=nan must be"),
    (["--top_p=0"], "--top_p=0.0 must be"),
    (["--top_p=1.1"], "--top_p=1.1 must be"),
    (["--top_k=-1"], "--top_k=-1 must be"),
    (["--seed=" + "9" * 30], "--seed="),
    (["--n=0"], "--n=0 must be"),
    (["--n=many"], "--n"),
    (["--promt=Golf?"], "did you mean --prompt?"),
    (["--device=abacus"], "--device=abacus must be one of"),
])
def test_bad_input_is_one_line_that_names_it(runs, fails, flags, words):
    assert words in fails(f"--out={runs['speak']}", *flags)

def test_a_device_that_is_not_there_is_named(runs, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device=cuda: this machine has none" in fails(f"--out={runs['speak']}", "--prompt=Golf?", "--device=cuda")

def test_without_a_run_it_says_how_to_make_one(fails, tmp_path):
    assert f"--out={tmp_path}: run `python train.py" in fails(f"--out={tmp_path}", "--prompt=Golf?")

def test_a_damaged_run_is_named_by_where_it_is_now(runs, fails, tmp_path):
    model = train.load_checkpoint(runs["speak"])["model"]
    torch.save(train.load_checkpoint(runs["speak"]) | dict(model=dict(list(model.items())[:-1])), tmp_path / "ckpt.pt")
    assert str(tmp_path) in fails(f"--out={tmp_path}", "--prompt=Golf?")

@pytest.mark.parametrize("phase, flags, missing, works", [
    ("pretrain", ["--prompt=Golf?"], "distill", "[span]"), ("pretrain", [], "distill", "[span]"),
    ("pretrain", ["--inspect=Golf?"], "distill", "[span]"),
    ("distill", ["--prompt=Golf?"], "speak", "question"), ("distill", [], "speak", "question")])
def test_a_phase_that_is_missing_is_named_with_what_works_already(runs, fails, phase, flags, missing, works):
    line = fails(f"--out={runs[phase]}", *flags)
    assert f"run `python train.py --phase={missing} --out={runs[phase]}` first" in line and works in line

@pytest.mark.parametrize("phase", ["distill", "speak"])
def test_a_phase_that_has_only_begun_does_not_count(runs, fails, tmp_path, phase):
    torch.save(train.load_checkpoint(runs[phase]) | dict(step=0), tmp_path / "ckpt.pt")
    assert f"--phase={phase}" in fails(f"--out={tmp_path}", "--prompt=Golf?")
