"""What can be relied on when a run is asked. The run is tiny: it knows eleven answers by heart."""
import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch

import data
import evaluate
import sample
import tjepa
import train

MAKERS = {"Octavia": "Škoda", "Clio": "Renault", "Golf": "Volkswagen", "Corolla": "Toyota",
          "Panda": "Fiat", "Civic": "Honda", "Mustang": "Ford", "Ibiza": "Seat",
          "Duster": "Dacia", "Sandero": "Dacia", "Roadster": "Tesla", "Swift": "Suzuki"}
ANSWERS = sorted(set(MAKERS.values()))
GOLF = ("--prompt=Golf?", "--always_answer")
TEXT = "".join(f"{car} number {n} went along the {colour} road past the old {place} ...\n"
               for car in MAKERS for n in range(2) for colour in ("red", "blue", "green")
               for place in ("house", "river"))
SHAPE = dict(n_embd=32, n_head=2, n_layer=2, top_k=2, pred_embd=16, pred_layer=1, dec_layer=1,
             block_size=64, vocab_size=400)
TRAINING = dict(batch_size=8, qa_batch_size=12, pretrain_steps=4, distill_steps=150,
                speak_steps=100, distill_lr=3e-3, speak_lr=1e-2, question_drop=0.0, noise=0.0,
                echo=0.0, alpha_start=0.0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folders of one run as each phase left it: pretrain, distill, speak."""
    home = tmp_path_factory.mktemp("sample")
    (home / "text.txt").write_text(TEXT, encoding="utf-8")
    pairs = "".join(f"{car}?\t{maker}\n" for car, maker in MAKERS.items())
    (home / "qa.tsv").write_text(pairs, encoding="utf-8")
    cfg = train.Config(data=str(home / "text.txt"), qa=str(home / "qa.tsv"), device="cpu",
                       out=str(home / "run"), dtype="fp32", **SHAPE, **TRAINING)
    for phase in train.PHASES:
        train.run(dataclasses.replace(cfg, phase=phase))
        shutil.copytree(home / "run", home / phase)
    return {phase: str(home / phase) for phase in train.PHASES}


@pytest.fixture
def ask(runs, capsys):
    """ask(*flags, phase=...) -> the lines that are printed, without the first, of the device."""
    def ask(*flags, phase="speak"):
        capsys.readouterr()
        sample.main([f"--out={runs[phase]}", *flags])
        return capsys.readouterr().out.splitlines()[1:]
    return ask


@pytest.fixture
def fails(capsys):
    """fails(*flags) -> the error: the only line on stderr, with exit code 2."""
    def fails(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            sample.main(list(flags))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1
        assert lines[0].startswith("sample.py: error: ")
        return lines[0]
    return fails


@pytest.fixture
def changed(runs, tmp_path):
    """changed(phase, ...) -> --out of a copy of a run whose checkpoint has other entries."""
    def changed(phase, **entries):
        train.save_checkpoint(tmp_path, train.load_checkpoint(runs[phase]) | entries)
        return f"--out={tmp_path}"
    return changed


def session(folder, **flags):
    """A run that has been opened."""
    return sample.open_session(sample.Flags(out=folder, **flags))


def thought_of(session, question):
    """The thought of a question."""
    return sample.think(session, question, "the question")[0]


def table(lines):
    """(number, text) of the lines between the head and the verdict of --inspect."""
    cells = [line.split(maxsplit=1) for line in lines[1:-1]]
    return [(float(number), text) for number, text in cells]


# -- speech ----------------------------------------------------------------------------------------
def test_what_was_taught_is_said(ask):
    """The whole chain: question, thought, threshold, words."""
    for car, maker in MAKERS.items():
        said, = ask(f"--prompt={car}?", "--always_answer")
        assert re.fullmatch(rf"{maker}   \(nearest: {maker}, at \d+\.\d, threshold \d+\.\d\)", said)


def test_greedy_speech_does_not_depend_on_the_seed(ask):
    """temperature=0 draws nothing."""
    assert ask(*GOLF, "--seed=1") == ask(*GOLF, "--seed=2")


def test_sampling_from_one_candidate_is_greedy(ask):
    """However high the temperature is."""
    greedy = ask(*GOLF)
    assert ask(*GOLF, "--temperature=9", "--top_k=1") == greedy
    assert ask(*GOLF, "--temperature=9", "--top_p=1e-9") == greedy


def test_sampling_follows_the_seed(ask):
    """The same seed the same answer, another one mostly another."""
    said = [ask(*GOLF, "--temperature=2", f"--seed={seed}") for seed in (0, 0, 1, 2, 3)]
    assert said[0] == said[1] and any(said[0] != other for other in said[2:])


def test_each_answer_starts_from_the_seed(runs):
    """In a conversation too: earlier questions do not change an answer."""
    asked = session(runs["speak"], temperature=2.0)
    thought = thought_of(asked, "Golf?")
    assert list(sample.pieces(asked, thought)) == list(sample.pieces(asked, thought))


def test_streaming_equals_speaking_at_once(runs):
    """What a user sees piece by piece is what the evaluation counts."""
    asked = session(runs["speak"])
    corpus = data.Corpus(asked.tokenizer, None, None, [], [], {}, "")
    for car in MAKERS:
        thought = thought_of(asked, f"{car}?")
        streamed = list(sample.pieces(asked, thought))
        assert ["".join(streamed)] == evaluate.say(asked.run._replace(corpus=corpus), thought)
        assert len([piece for piece in streamed if piece]) > 1


@pytest.mark.parametrize("said", [
    " Škoda".encode(), " naïve 🐳 ".encode(), "日本".encode(), b"  two  words ", b" ",
    "cut: 🐳".encode()[:-2]])
def test_no_character_is_shown_in_part(runs, monkeypatch, said):
    """Spoken byte by byte: what has been shown cannot be taken back."""
    asked = session(runs["speak"])
    ids = [asked.tokenizer.ranks.index(bytes([byte])) for byte in said] + [asked.tokenizer.eos]
    monkeypatch.setattr(tjepa.TJEPA, "speak", lambda *_: (torch.tensor([i]) for i in ids))
    *shown, end = sample.pieces(asked, None)
    assert "".join([*shown, end]) == asked.tokenizer.decode(ids).strip()
    assert "\ufffd" not in "".join(shown)


# -- the threshold ---------------------------------------------------------------------------------
def test_beyond_the_threshold_it_does_not_know(ask, changed):
    """Nothing is nearer than 0; --always_answer speaks anyway."""
    out = changed("speak", threshold=0.0)
    said, = ask(out, "--prompt=Octavia?")
    assert re.fullmatch(r"I don't know   \(nearest: .+, at \d+\.\d, threshold 0\.0; "
                        r"--always_answer speaks anyway\)", said)
    assert ask(out, "--prompt=Octavia?", "--always_answer")[0].startswith("Škoda   (nearest: ")


def test_within_the_threshold_it_speaks(ask, changed):
    """Everything is nearer than 99."""
    assert ask(changed("speak", threshold=99.0), "--prompt=Octavia?")[0].startswith("Škoda")


@pytest.mark.parametrize("threshold, verdict", [
    (0.0, "unknown: beyond the threshold of 0.00"),
    (99.0, "known: within the threshold of 99.00")])
def test_inspecting_a_thought_ends_with_the_verdict(ask, changed, threshold, verdict):
    """The same threshold as in speech."""
    assert ask(changed("distill", threshold=threshold), "--inspect=Golf?")[-1] == verdict


# -- a thought -------------------------------------------------------------------------------------
def test_a_thought_is_shown_by_its_nearest_concepts(ask):
    """After phase 2, before the decoder has learned anything."""
    lines = table(ask("--inspect=Octavia?", "--n=4", phase="distill"))
    assert len(lines) == 4 and lines == sorted(lines) and lines[0][1] == "Škoda"


def test_the_distances_are_those_of_the_latents(runs, ask):
    """Computed by hand from the checkpoint's table of concepts."""
    asked = session(runs["distill"])
    latent = thought_of(asked, "Golf?").latent[0]
    distance = {name: (concept - latent).norm().item()
                for name, concept in zip(ANSWERS, asked.checkpoint["concepts"])}
    shown = {name: number for number, name in table(ask("--inspect=Golf?", "--n=99"))}
    assert shown == pytest.approx(distance, abs=0.006)


# -- a gap -----------------------------------------------------------------------------------------
def test_a_gap_needs_phase_1_only(ask):
    """The energy is a matter of encoder and predictor."""
    lines = ask("--inspect=The [red] car went along the road.", "--n=3", phase="pretrain")
    assert len(table(lines)) == 3 and table(lines) == sorted(table(lines))


def test_before_phase_2_words_of_the_text_may_fill_a_gap(ask):
    """The vocabulary's whole words, since there are no answers yet."""
    lines = ask("--inspect=The [red] car went.", "--n=9999", phase="pretrain")
    assert "its vocabulary's words" in lines[0]
    names = {name for _, name in table(lines)}
    assert {"red", "blue", "house"} < names
    assert all(name.isalpha() and len(name) > 2 for name in names)


def test_after_phase_2_answers_may_fill_a_gap(ask):
    """All of them, and nothing else."""
    lines = ask("--inspect=The [Ford] car went.", "--n=99", phase="distill")
    assert "the answers of the run" in lines[0]
    assert sorted(name for _, name in table(lines)) == ANSWERS


@pytest.mark.parametrize("truth", ["Ford", "Škoda", "Trabant"])
def test_the_hidden_text_is_ranked(ask, truth):
    """Trabant is no answer: it becomes a candidate."""
    lines = ask(f"--inspect=The [{truth}] car went along the road.", "--n=99")
    names = [name for _, name in table(lines)]
    rank = 1 + names.index(truth)
    assert re.fullmatch(rf"'{truth}' has energy \d\.\d{{4}}: rank {rank} of {len(names)}",
                        lines[-1])


@pytest.mark.parametrize("before, after", [
    ("The ", " car."), ("", " went home."), ("The '", "' car."), ("It went", "")])
def test_the_gap_holds_the_candidate_and_nothing_else(runs, monkeypatch, before, after):
    """Spaces and quotes at its edges belong to the text."""
    asked = session(runs["speak"])
    monkeypatch.setattr(tjepa.TJEPA, "energy",
                        lambda _, tokens, spans: torch.stack((tokens, spans), dim=1))
    texts = evaluate.gap_energy(asked.run, asked.tokenizer, before, ANSWERS, after)
    for (row, span), value in zip(texts, ANSWERS, strict=True):
        assert asked.tokenizer.decode(row.tolist()).strip() == before + value + after
        assert asked.tokenizer.decode(row[span == 0].tolist()).strip() == value


def test_the_energy_of_a_candidate_does_not_depend_on_the_others(runs):
    """Longer candidates bring padding, which must change nothing."""
    asked = session(runs["speak"])

    def energy(values):
        return evaluate.gap_energy(asked.run, asked.tokenizer, "The ", values, " car.")
    alone = torch.cat([energy([value]) for value in ANSWERS])
    torch.testing.assert_close(energy(ANSWERS), alone)


# -- vectors to take out ---------------------------------------------------------------------------
def test_embed_writes_the_concept_of_each_line(runs, ask, tmp_path):
    """After phase 1; blank lines have no row, and a longer neighbour changes nothing."""
    lines = ["Octavia number 1 went.", "Golf", "The red car went along the road past the house"]
    (tmp_path / "a.b.txt").write_text("\ufeff" + lines[0] + "\r\n\n  \n" + "\n".join(lines[1:]))
    said = ask(f"--embed={tmp_path / 'a.b.txt'}", phase="pretrain")
    vectors = np.load(tmp_path / "a.b.npy")
    asked = session(runs["pretrain"])
    for line, vector in zip(lines, vectors, strict=True):
        tokens = torch.tensor([asked.tokenizer.encode(" " + line)])
        with torch.no_grad():
            expected = asked.run.model.concept(tokens)[0].numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert vectors.dtype == np.float32
    assert "3 rows of 32 numbers" in said[0] and "target encoder" in said[1]
    assert "mean over the tokens" in said[2] and "top_k=2 of 2 layers" in said[2]


def test_embed_replaces_only_a_file_that_was_named(runs, ask, fails, tmp_path):
    """An .npy beside the text may be someone's."""
    (tmp_path / "a.txt").write_text("Golf")
    (tmp_path / "a.npy").write_bytes(b"mine")
    embed = f"--embed={tmp_path / 'a.txt'}"
    assert "--save=FILE.npy" in fails(f"--out={runs['speak']}", embed)
    assert (tmp_path / "a.npy").read_bytes() == b"mine"
    ask(embed, f"--save={tmp_path / 'a.npy'}")
    assert np.load(tmp_path / "a.npy").shape == (1, 32)


@pytest.mark.parametrize("name", ["a.npy", "a.part"])
def test_embed_does_not_replace_its_own_text(runs, fails, tmp_path, name):
    """Neither by the vectors nor by the file that they are written to before it is renamed."""
    (tmp_path / name).write_text("Golf")
    said = fails(f"--out={runs['speak']}", f"--embed={tmp_path / name}",
                 f"--save={tmp_path / 'a.npy'}")
    assert "would replace --embed" in said
    assert [path.read_text() for path in tmp_path.iterdir()] == ["Golf"]


@pytest.mark.parametrize("content, more, words", [
    (b" \n", [], "is empty"),
    (b"Golf\n" + b"word " * 99, [], "line 2"),
    (b"\xff\xff", [], "not UTF-8"),
    (b"Golf", ["--save=a.txt"], "must end in .npy"),
    (b"Golf", ["--save=no/such/folder/a.npy"], "create it first"),
    (b"Golf", ["--prompt=Golf?"], "--prompt and --embed"),
    (b"Golf", ["--list"], "--embed and --list"),
])
def test_what_cannot_be_embedded_is_one_line(runs, fails, tmp_path, content, more, words):
    """And nothing is written."""
    (tmp_path / "a.txt").write_bytes(content)
    assert words in fails(f"--out={runs['speak']}", f"--embed={tmp_path / 'a.txt'}", *more)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# -- what may be asked -----------------------------------------------------------------------------
def test_list_shows_the_questions_of_ones_own(ask):
    """As they were taught; the text is not read."""
    said = ask("--list")
    assert said == ["questions of your own, taught as DEC:", *(f"  {car}?" for car in MAKERS)]


def test_list_shows_facts_by_relation_and_split(ask, changed, monkeypatch):
    """One example of each relation, and the subjects of each split."""
    facts = data.read_questions(train.Config(), None)
    monkeypatch.setattr(data, "read_questions", lambda cfg, tokenizer: facts)
    said = ask(changed("speak", questions=None), "--list")
    assert said[0] == "capital, as in: What is the capital of France?"
    assert [line.split()[0] for line in said[1:5]] == ["DEC", "LAT", "NEVER", "TXT"]
    assert " Italy, " in said[2] and " Germany, " in said[4] and len(said) == 10 * 5


def test_list_says_what_is_missing(fails, changed, runs, tmp_path):
    """A run without questions, and questions that were moved or changed."""
    config = train.load_checkpoint(runs["speak"])["config"]
    assert "has no questions" in fails(changed("pretrain", config=config | dict(qa="")), "--list")
    gone = config | dict(qa=str(tmp_path / "gone.tsv"))
    assert "gone.tsv" in fails(changed("speak", config=gone), "--list")
    (tmp_path / "other.tsv").write_text("Golf?\tVW\n")
    other = config | dict(qa=str(tmp_path / "other.tsv"))
    assert "have changed" in fails(changed("speak", config=other), "--list")


# -- a conversation --------------------------------------------------------------------------------
@pytest.fixture
def converse(ask, monkeypatch):
    """converse(*lines) -> the answer to each; then the input ends."""
    def converse(*lines):
        lines = iter(lines)

        def read(prompt):
            for line in lines:
                return line
            raise EOFError
        monkeypatch.setattr("builtins.input", read)
        said = ask("--always_answer")
        assert said[0] == "Ask a question; an empty line or Ctrl-D ends."
        return [line.split("   ")[0] for line in said[1:]]
    return converse


def test_a_conversation_goes_on_until_the_input_ends(converse):
    """Ctrl-D ends the line too."""
    said = converse("Octavia?", "Golf?", "Octavia?")
    assert said == ["Škoda", "Volkswagen", "Škoda", ""]


def test_an_empty_line_ends_a_conversation(converse):
    """A blank is as good as nothing."""
    assert converse("Octavia?", " ", "Golf?") == ["Škoda"]


def test_a_conversation_survives_a_bad_question(runs, monkeypatch, capsys):
    """The error is shown, and the next question is answered."""
    lines = iter(["word " * 99, "Golf?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    sample.main([f"--out={runs['speak']}", "--always_answer"])
    out, error = capsys.readouterr()
    assert re.fullmatch(r"sample\.py: error: the question has \d+ tokens, "
                        r"above the run's block_size=64.*\n", error)
    assert out.splitlines()[-1].startswith("Volkswagen")


def test_a_conversation_ends_where_standard_input_is_closed(runs, monkeypatch, capsys):
    """As with `sample.py <&-`: Python then has no sys.stdin."""
    monkeypatch.setattr("sys.stdin", None)
    sample.main([f"--out={runs['speak']}"])
    assert "Ask a question" in capsys.readouterr().out


def test_ctrl_c_is_no_error(runs, monkeypatch, capsys):
    """Exit code 130, as shells expect it, and no traceback."""
    def interrupted(prompt):
        raise KeyboardInterrupt
    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(SystemExit) as stop:
        sample.main([f"--out={runs['speak']}"])
    assert stop.value.code == 130 and capsys.readouterr().err == ""


# -- bad input -------------------------------------------------------------------------------------
TOO_LONG = "above the run's block_size=64: shorten it"
ONE_SPAN = "exactly one span in brackets"


@pytest.mark.parametrize("flags, words", [
    (["--prompt="], "--prompt is empty"),
    (["--prompt= "], "--prompt is empty"),
    (["--inspect="], "--inspect is empty"),
    (["--prompt=" + "word " * 99], TOO_LONG),
    (["--inspect=" + "word " * 99], TOO_LONG),
    (["--inspect=[Ford] " + "word " * 99], TOO_LONG),
    (["--prompt=Golf?", "--inspect=Golf?"], "--prompt and --inspect"),
    (["--save=a.npy"], "--embed=FILE too"),
    (["--embed="], "--embed="),
    (["--inspect=The [red car"], ONE_SPAN),
    (["--inspect=The red] car"], ONE_SPAN),
    (["--inspect=The ]red[ car"], ONE_SPAN),
    (["--inspect=The [red] [car]"], ONE_SPAN),
    (["--inspect=The [[red]] car"], ONE_SPAN),
    (["--inspect=The [] car"], ONE_SPAN),
    (["--inspect= [red] "], ONE_SPAN),
    (["--temperature=-1"], "--temperature=-1.0 must be"),
    (["--temperature=nan"], "--temperature"),
    (["--top_p=0"], "--top_p=0.0 must be"),
    (["--top_p=1.1"], "--top_p=1.1 must be"),
    (["--top_p=1e-300", "--temperature=1"], "--top_p=1e-300 must be"),
    (["--top_k=-1"], "--top_k=-1 must be"),
    (["--seed=" + "9" * 30], "--seed"),
    (["--n=0"], "--n=0 must be"),
    (["--n=many"], "--n"),
    (["--n=1000001"], "--n=1000001 must be"),
    (["--length=100001"], "--length=100001 must be"),
    (["--promt=Golf?"], "did you mean --prompt?"),
    (["--device=abacus"], "--device=abacus must be one of"),
])
def test_bad_input_is_one_line_that_names_it(runs, fails, flags, words):
    """The flag, and what it must be."""
    assert words in fails(f"--out={runs['speak']}", *flags)


def test_a_device_that_is_not_there_is_named(runs, fails, monkeypatch):
    """A run may have been trained on another machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = fails(f"--out={runs['speak']}", "--prompt=Golf?", "--device=cuda")
    assert "--device=cuda: this machine has none" in said


def test_without_a_run_it_says_how_to_make_one(fails, tmp_path):
    """The first thing that a beginner may see."""
    said = fails(f"--out={tmp_path}", "--prompt=Golf?")
    assert f"--out={tmp_path}: run `python train.py" in said


def test_a_run_without_some_weights_is_named_by_where_it_is_now(runs, fails, changed, tmp_path):
    """Not by the folder in which it was trained."""
    model = train.load_checkpoint(runs["speak"])["model"]
    model.popitem()
    assert str(tmp_path) in fails(changed("speak", model=model), "--prompt=Golf?")


@pytest.mark.parametrize("phase, flags, missing, works", [
    ("pretrain", ["--prompt=Golf?"], "distill", "[span]"),
    ("pretrain", ["--inspect=Golf?"], "distill", "[span]"),
    ("pretrain", [], "distill", "[span]"),
    ("distill", ["--prompt=Golf?"], "speak", "question"),
    ("distill", [], "speak", "question"),
])
def test_a_missing_phase_is_named_with_what_works_already(
        runs, fails, phase, flags, missing, works):
    """The next command, and what can be asked without it."""
    said = fails(f"--out={runs[phase]}", *flags)
    assert f"run `python train.py --phase={missing} --out={runs[phase]}` first" in said
    assert works in said


@pytest.mark.parametrize("phase", ["distill", "speak"])
def test_a_phase_that_has_only_begun_does_not_count(fails, changed, phase):
    """At step 0 its weights are random."""
    assert f"--phase={phase}" in fails(changed(phase, step=0), "--prompt=Golf?")
