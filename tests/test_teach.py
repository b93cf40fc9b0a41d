"""Facts that are added to a finished run: --phase=teach, on a world of twelve facts."""
import csv
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import data
import report
import sample
import train
from tests.toy import COLOURS, FLAGS, PAIRS, THINGS, config, weights, write_corpus

WORDINGS = ("What is the colour of the {s}?", "Which colour has the {s}?", "{s}: which colour?")
HELD_OUT = "Say the colour of {s}."
QUICK = dict(teach_steps=8, teach_lr=3e-3)
FERN = ("which colour has the fern?", "teal")           # a known wording, a new subject and answer
MOSS = ("What is the colour of the moss?", "beige")     # moss was green
SNOW = ("What is the colour of the SNOW?", "pink")      # snow was white, a LAT fact
OTHER = ("Who painted the shed?", "Ada")                # no known wording


def facts():
    """Rows of the twelve facts in one relation, as data/facts/prepare.py writes them."""
    rows = []
    for number, (thing, colour) in enumerate(zip(THINGS, COLOURS)):
        fact = dict(split="LAT" if number % 4 == 3 else "DEC", relation="colour", subject=thing,
                    answer=colour)
        rows += [data.QA(question=wording.replace("{s}", thing), phrasing="trained", **fact)
                 for wording in WORDINGS]
        held_out = HELD_OUT.replace("{s}", thing)
        rows.append(data.QA(question=held_out, phrasing="heldout", **fact))
        rows.append(data.QA(question=held_out.lower(), phrasing="typed", **fact))
        made_up = fact | dict(split="NEVER", subject=f"{thing}ibo", answer="")
        rows.append(data.QA(question=HELD_OUT.replace("{s}", f"{thing}ibo"), phrasing="made_up",
                            **made_up))
    return rows


def answers_in(rows, subject):
    """The answers that questions about a subject have, but for made-up ones."""
    return {row.answer for row in rows if row.subject.casefold() == subject}


def write_pairs(path, *pairs):
    path.write_text("".join(f"{question}\t{answer}\n" for question, answer in pairs))
    return str(path)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run on the facts, and copies of it to which pairs were added: once and twice.

    (corpus, folder, the figures of the first teaching)
    """
    folder = tmp_path_factory.mktemp("teach")
    write_corpus(folder)
    cfg = config(folder, folder / "run", qa="", made_up=0.2, distill_steps=200)
    corpus = data.load(cfg)._replace(qa=facts())
    train.run(cfg, corpus)
    shutil.copytree(folder / "run", folder / "once")
    pairs = write_pairs(folder / "first.tsv", FERN, MOSS, SNOW, OTHER)
    first = train.resolve(dict(phase="teach", qa=pairs, out=str(folder / "once"),
                               teach_steps=150, teach_lr=4e-3))
    figures = train.run(first, corpus)
    shutil.copytree(folder / "once", folder / "twice")
    pairs = write_pairs(folder / "second.tsv", ("fern: which colour?", "crimson"),
                        ("Which colour has the reed?", "red"))
    train.run(train.resolve(dict(phase="teach", qa=pairs, out=str(folder / "twice"), **QUICK)),
              corpus)
    return corpus, folder, figures


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the world's run, whose pairs are a student's own, that a test may spoil."""
    return shutil.copytree(world.cfg.out, tmp_path / "run")


@pytest.fixture
def refused(capsys):
    """refused(*argv) -> the error of train.py: one line, with exit code 2."""
    def refused(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main([str(word) for word in argv])
        error = capsys.readouterr().err
        lines = [line for line in re.split("[\r\n]+", error) if line.strip()]
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("train.py: error:")
        return lines[0]
    return refused


def contents(folder):
    """Path inside of the folder -> bytes of each file."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def opened(folder, name, corpus):
    """A run that was taught, as `train.Run` with its questions and concepts."""
    resumed = train.resolve(dict(resume=True, out=str(folder / name)))
    return train.open_run(resumed, corpus, train.tjepa.TJEPA).run


def thought_of(run, question):
    """The answer whose concept is nearest to the thought of a question."""
    tokens = data.pack_questions(run.corpus.tokenizer, [question], run.cfg.block_size)
    thought = train.evaluate.think_all(run, tokens)
    nearest = torch.cdist(thought.latent, run.concepts).argmin(1)
    return run.questions.answers[nearest]


# -- from pairs to rows ----------------------------------------------------------------------------

def test_a_pair_in_a_known_wording_is_taught_in_all_of_them():
    """Whatever its case, and in its own wording too."""
    rows = data.add_pairs(facts(), [FERN], data.QA)
    new = [row for row in rows if row.split == "NEW"]
    assert {row.question for row in new} == {
        "which colour has the fern?", *(wording.replace("{s}", "fern") for wording in WORDINGS)}
    assert {tuple(row)[1:4] + (row.answer,) for row in new} == {
        ("trained", "colour", "fern", "teal")}
    assert rows[:-len(new)] == facts()


def test_a_pair_in_an_unknown_wording_is_taught_alone():
    rows = data.add_pairs(facts(), [OTHER], data.QA)
    assert [row for row in rows if row.split == "NEW"] == [
        data.QA("NEW", "trained", "qa", "painted", *OTHER)]
    assert rows[:-1] == facts()


@pytest.mark.parametrize("pair, subject", [(MOSS, "moss"), (SNOW, "snow")])
def test_what_contradicts_a_pair_is_dropped_in_every_wording(pair, subject):
    """Held-out ones too: they would count the old answer as right. Other facts stay."""
    rows = data.add_pairs(facts(), [pair], data.QA)
    assert answers_in(rows, subject) == {pair[1]}
    old = [row for row in facts() if row.subject != subject]
    assert [row for row in rows if row.split != "NEW"] == old


def test_a_known_subject_keeps_its_spelling():
    """Otherwise "What is the capital of France?" would go on as before after a pair with france."""
    rows = data.add_pairs(facts(), [SNOW], data.QA)
    new = {row.question: row.subject for row in rows if row.split == "NEW"}
    others = {wording.replace("{s}", "snow"): "snow" for wording in WORDINGS}
    assert new == {SNOW[0]: "SNOW"} | others


def test_a_wording_of_two_relations_is_about_the_one_that_knows_the_subject():
    """Whatever the names of the relations are."""
    asked = WORDINGS[0].replace("{s}", "lead")
    others = [data.QA("DEC", "trained", relation, "lead", asked, "much")
              for relation in ("weight", "age")]
    for pair in (MOSS, SNOW):
        new = data.add_pairs(others + facts(), [pair], data.QA)[-1]
        assert (new.relation, new.answer) == ("colour", pair[1])


def test_an_own_pair_is_contradicted_by_the_same_question_alone():
    """However it is written; a question about the same thing is another question."""
    rows = [data.QA("DEC", "trained", "qa", "moss", "What is moss?", "a plant"),
            data.QA("DEC", "trained", "qa", "moss", "Is moss green?", "yes")]
    found = data.add_pairs(rows, [("what  is MOSS?", "green")], data.QA)
    assert [row.answer for row in found] == ["yes", "green"]


# -- a run that is taught --------------------------------------------------------------------------

def test_added_facts_are_known_and_old_ones_stay_known(taught):
    """Thought and said, in wordings of which the file named one."""
    corpus, folder, figures = taught
    assert figures["r1_NEW"] == figures["em_NEW"] == 1.0
    assert figures["r1_DEC"] > 0.9 and figures["em_DEC"] > 0.9
    run = opened(folder, "once", corpus)
    for wording in WORDINGS:
        assert thought_of(run, wording.replace("{s}", "fern")) == "teal"


def test_the_threshold_of_phase_2_bounds_that_of_every_teaching(taught):
    """Also of a second one: what the first one logged does not count."""
    corpus, folder, _ = taught
    rows = train.load_checkpoint(folder / "run")["rows"]
    before = [row["threshold"] for row in rows if "threshold" in row][-1]
    for name in ("once", "twice"):
        cfg = train.resolve(dict(phase="teach", out=str(folder / name), resume=True))
        assert train.open_run(cfg, corpus, train.tjepa.TJEPA).run.threshold == before
        rows = train.load_checkpoint(folder / name)["rows"]
        assert before not in [row["threshold"] for row in rows
                              if row["phase"] == "teach" and "threshold" in row]


def test_a_contradicting_pair_replaces_the_answer(taught):
    """The rows of the old answer are gone, and the goal is the concept of the new one."""
    corpus, folder, _ = taught
    run = opened(folder, "once", corpus)
    rows = run.questions.rows
    for subject, before, now in (("moss", "green", "beige"), ("snow", "white", "pink")):
        assert answers_in(rows, subject) == {now}
        number = next(i for i, row in enumerate(rows) if row.subject.casefold() == subject)
        saved = train.load_checkpoint(folder / "once")
        goal = saved["concepts"][saved["answers"].index(now)]
        assert torch.equal(run.concepts[run.questions.answer_of[number]], goal)
        assert thought_of(run, rows[number].question) == now
        # no other fact has the old answer
        assert before not in saved["answers"]


def test_old_concepts_do_not_move_and_new_ones_have_their_scale(taught):
    """Old thoughts keep their goals: mean and std are those of phase 2's answers."""
    corpus, folder, _ = taught
    old, new = (train.load_checkpoint(folder / name) for name in ("run", "once"))
    both = set(old["answers"]) & set(new["answers"])
    assert len(both) == len(COLOURS) - 2
    for answer in both:
        before, after = (saved["concepts"][saved["answers"].index(answer)] for saved in (old, new))
        assert torch.equal(before, after)
    still = [name for name in old["model"] if name.startswith(("target_encoder.", "answer_"))]
    assert all(torch.equal(old["model"][name], new["model"][name]) for name in still)
    run = opened(folder, "run", corpus)
    tokens = data.pack_answers(corpus.tokenizer, ["teal"], 32, "--block_size")
    with torch.no_grad():
        teal = run.model.standardise(run.model.concept(tokens))[0]
    torch.testing.assert_close(new["concepts"][new["answers"].index("teal")], teal)


def test_what_phase_3_may_not_say_stays_unsaid(taught, monkeypatch):
    """LAT facts are taught as thoughts; the decoder hears DEC and NEW questions, and echoes."""
    corpus, folder, _ = taught
    run = opened(folder, "once", corpus)
    said = []

    def speak_loss(thought, answer, answer_latent, alpha):
        said.extend(zip(answer.tolist(), answer_latent))
        return torch.zeros(()), dict(token=torch.zeros(()))
    monkeypatch.setattr(run.model, "speak_loss", speak_loss)
    n = run.cfg.qa_batch_size               # echoes, which come last
    loss_at, _ = train.teach(run._replace(cfg=train.dataclasses.replace(run.cfg, made_up=0.0)))
    decode = corpus.tokenizer.decode
    heard = set()
    for _ in range(40):
        said.clear()
        loss_at(0.0)
        heard |= {decode(row).strip() for row, _ in said[:-n]}
        assert len(said) >= n
    rows = run.questions.rows
    assert heard == {row.answer for row in rows if row.split in ("DEC", "NEW")}


def drawn(monkeypatch, phase):
    """What a phase gives to `Questions.drawing`: the rows asked about, and its other arguments.

    Three questions are NEW, 36 are taught already; shares that no default has.
    """
    rows = facts() + [data.QA("NEW", "trained", "colour", "fern", wording.replace("{s}", "fern"),
                              "teal") for wording in WORDINGS]
    tokenizer = data.Tokenizer(data.train_bpe(" ".join(row.question for row in rows), 300))
    questions = data.Questions(rows, tokenizer, 64, 16, "cpu")
    caught = []

    def drawing(asked, n, noise=0.0, unknown=0.0):
        caught.append(([rows[i] for i in asked.tolist()], n, noise, unknown))
    monkeypatch.setattr(questions, "drawing", drawing)
    cfg = train.Config(qa_batch_size=24, question_noise=0.35, made_up=0.15)
    phase(train.Run(cfg, None, SimpleNamespace(tokenizer=tokenizer), "cpu", None, questions,
                    torch.zeros(len(questions.answers), 4)))
    (asked, *others), = caught
    return asked, others


@pytest.mark.parametrize("phase", [train.distill, train.teach])
def test_questions_are_drawn_with_the_noise_and_the_made_up_subjects_of_the_flags(
        monkeypatch, phase):
    """The threshold and all figures of typed questions rest on it."""
    assert drawn(monkeypatch, phase)[1] == [24, 0.35, 0.15]


def test_half_of_a_teaching_is_new_and_half_is_all_that_was_taught(monkeypatch):
    """A few pairs are repeated until they are half; without the others these are forgotten."""
    asked = Counter(drawn(monkeypatch, train.teach)[0])
    taught = [row for row in facts() if row.phrasing == "trained"]
    assert len(taught) == 36 and all(asked.pop(row) == 1 for row in taught)
    assert {row.split for row in asked} == {"NEW"} and list(asked.values()) == [12, 12, 12]


def test_a_second_teaching_keeps_the_pairs_of_the_first(taught):
    """Each pair has the number of its phase; a later one wins."""
    corpus, folder, _ = taught
    added = train.load_checkpoint(folder / "twice")["added"]
    assert [number for _, _, number in added] == [1, 1, 1, 1, 2, 2]
    assert [tuple(row[:2]) for row in added[:4]] == [FERN, MOSS, SNOW, OTHER]
    rows = opened(folder, "twice", corpus).questions.rows
    for subject, answer in (("fern", "crimson"), ("reed", "red"), ("moss", "beige"),
                            ("snow", "pink"), ("painted", "Ada")):
        assert answers_in(rows, subject) == {answer}
    # the file of the first one may be gone
    assert train.load_checkpoint(folder / "twice")["config"]["added"].endswith("second.tsv")


# -- by the command line ---------------------------------------------------------------------------

def teach(out, pairs, **changes):
    """The command that adds pairs to a run."""
    flags = [f"--{name}={value}" for name, value in (QUICK | changes).items()]
    return ["--phase=teach", f"--qa={pairs}", f"--out={out}", *flags]


def test_a_resumed_teaching_is_bit_identical(copy, tmp_path, monkeypatch):
    """The pairs are in the checkpoint: their file is not read again."""
    whole = shutil.copytree(copy, tmp_path / "whole")
    pairs = write_pairs(tmp_path / "new.tsv", FERN, OTHER)
    train.main(teach(whole, pairs))
    save = train.save_checkpoint

    def save_and_die(out, checkpoint, *more):
        save(out, checkpoint, *more)
        if (checkpoint["phase"], checkpoint["step"]) == ("teach", 4):
            raise RuntimeError("power failure")
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(RuntimeError, match="power failure"):
        train.main(teach(copy, pairs, eval_every=4))
    monkeypatch.setattr(train, "save_checkpoint", save)
    (tmp_path / "new.tsv").unlink()
    train.main(["--resume", f"--out={copy}", f"--eval_every={FLAGS['eval_every']}"])
    resumed, expected = weights(copy), weights(whole)
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []
    one, other = (train.load_checkpoint(out) for out in (copy, whole))
    assert torch.equal(one["concepts"], other["concepts"]) and one["added"] == other["added"]
    assert one["threshold"] == other["threshold"]
    steps = [(row["phase"], row["step"]) for row in csv.DictReader(open(copy / "metrics.csv"))]
    assert len(steps) == len(set(steps)) and steps[-1] == ("teach", str(QUICK["teach_steps"]))
    report.read_metrics(copy)


def test_another_file_of_facts_does_not_go_on_with_a_teaching(copy, refused, tmp_path):
    """The same facts in another place do; --added is no flag to give."""
    pairs = write_pairs(tmp_path / "new.tsv", FERN, OTHER)
    train.main(teach(copy, pairs))
    resume = ["--resume", "--phase=teach", f"--out={copy}"]
    moved = write_pairs(tmp_path / "moved.tsv", FERN, OTHER)
    other = write_pairs(tmp_path / "other.tsv", FERN)
    before = contents(copy)
    assert "not the facts" in refused(*resume, f"--qa={other}")
    assert "--phase=teach --qa=FILE" in refused(f"--added={other}", "--resume", f"--out={copy}")
    assert contents(copy) == before
    train.main([*resume, f"--qa={moved}"])


def test_all_old_facts_may_be_replaced(copy, tmp_path):
    """What cannot be measured then is left out: no figure is nan."""
    pairs = [(question, f"not {answer}") for question, answer in PAIRS]
    train.main(teach(copy, write_pairs(tmp_path / "new.tsv", *pairs)))
    rows = [row for row in report.read_metrics(copy) if row["phase"] == "teach"]
    figures = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert figures and all(value == value for value in figures)
    assert "em_NEW" in rows[-1] and "em_DEC" not in rows[-1]


def test_the_run_before_a_teaching_is_kept(copy, tmp_path):
    """Whoever dislikes what the facts did goes back."""
    before = (copy / "ckpt.pt").read_bytes()
    train.main(teach(copy, write_pairs(tmp_path / "new.tsv", FERN)))
    assert (copy / train.PREVIOUS).read_bytes() == before != (copy / "ckpt.pt").read_bytes()


def test_phase_3_begun_anew_says_what_was_added(taught):
    """Phase 2 forgets it, phase 3 does not."""
    corpus, folder, _ = taught
    cfg = train.resolve(dict(phase="speak", out=str(folder / "once")))
    run = train.open_run(cfg, corpus, train.tjepa.TJEPA).run
    lessons = train.make_lessons(run)
    said = map(corpus.tokenizer.decode, lessons.answers[:lessons.n_questions].tolist())
    assert {"teal", "Ada"} <= {answer.strip() for answer in said}


@pytest.mark.parametrize("words, said", [
    (["--phase=teach"], "--phase=teach needs new facts: give --qa=FILE"),
    (["--phase=teach", "--qa="], "--qa"),
    (["--phase=teach", "--qa=nowhere.tsv"], "nowhere.tsv"),
    (["--phase=teach", "--qa={}/bad.tsv"], "line 2"),
    (["--phase=teach", "--qa={}/long.tsv"], "line 1"),
    (["--phase=teach", "--qa={}/good.tsv", "--n_embd=64"], "--n_embd=64"),
    (["--phase=teach", "--qa={}/good.tsv", "--teach_steps=-1"], "--teach_steps=-1"),
    (["--phase=teach", "--qa={}/good.tsv", "--teach_lr=0"], "--teach_lr=0"),
])
def test_a_bad_command_is_one_line_and_changes_nothing(copy, refused, tmp_path, words, said):
    write_pairs(tmp_path / "good.tsv", FERN)
    (tmp_path / "bad.tsv").write_text("Who?\tme\nWhere?\n")
    (tmp_path / "long.tsv").write_text("Who?\t" + "very long " * 40)
    before = contents(copy)
    words = [word.replace("{}", str(tmp_path)) for word in words]
    assert said in refused(*words, f"--out={copy}")
    assert contents(copy) == before


def test_a_run_that_has_not_ended_is_not_taught(world, refused, tmp_path):
    """It says which phase to run; without a run no folder is made."""
    pairs = write_pairs(tmp_path / "new.tsv", FERN)
    assert "no checkpoint" in refused(*teach(tmp_path / "none", pairs))
    assert not (tmp_path / "none").exists()
    out = tmp_path / "half"
    read = FLAGS | dict(phase="pretrain", data=world.cfg.data, pretrain_steps=1)
    taught = dict(phase="distill", qa=world.cfg.qa, distill_steps=2)
    for given, missing in ((read, "distill"), (taught, "speak")):
        train.run(train.resolve(given | dict(out=str(out))))
        before = contents(out)
        assert f"run --phase={missing} first" in refused(*teach(out, pairs))
        assert contents(out) == before
    train.run(train.resolve(dict(phase="speak", speak_steps=2, out=str(out))))
    saved = train.load_checkpoint(out)
    longer = saved["config"] | dict(speak_steps=4)
    train.save_checkpoint(out, saved | dict(config=longer))
    assert "step 2 of 4: run `python train.py --resume" in refused(*teach(out, pairs))


@pytest.mark.parametrize("entry", [[["Who?", "me"]], [["Who?", "me", True]], ["Who?"], None])
def test_a_damaged_checkpoint_is_refused(copy, refused, tmp_path, entry):
    """A single bit, or an entry that this program does not write."""
    pairs = write_pairs(tmp_path / "new.tsv", FERN)
    if entry is None:
        content = bytearray((copy / "ckpt.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (copy / "ckpt.pt").write_bytes(content)
    else:
        train.save_checkpoint(copy, train.load_checkpoint(copy) | dict(added=entry))
    before = contents(copy)
    assert "ckpt.pt" in refused(*teach(copy, pairs))
    assert contents(copy) == before


def test_phase_2_begun_anew_says_that_it_replaces_what_is_known(world, copy, tmp_path, capsys):
    """And it does: added pairs are forgotten, by their questions and their answers."""
    train.main(teach(copy, write_pairs(tmp_path / "new.tsv", OTHER)))
    n_answers = len(train.load_checkpoint(copy)["answers"])
    assert n_answers == len(COLOURS) + 1
    capsys.readouterr()
    train.main(["--phase=distill", "--distill_steps=2", f"--out={copy}"])
    said = capsys.readouterr().out
    assert f"the {n_answers} answers that the run knows are replaced" in said
    assert "--phase=teach would add to them" in said
    saved = train.load_checkpoint(copy)
    assert saved["added"] == [] and saved["config"]["added"] == ""
    assert saved["answers"] == sorted(COLOURS)
    assert {row["phase"] for row in saved["rows"]} == {"pretrain", "distill"}


def test_what_was_added_can_be_asked(copy, tmp_path, capsys):
    """By sample.py, which reads the new answers from the checkpoint."""
    pairs = write_pairs(tmp_path / "new.tsv", OTHER, MOSS)
    train.main(teach(copy, pairs, teach_steps=150, teach_lr=4e-3))
    assert f"next: python sample.py --out={copy}" in capsys.readouterr().out
    for question, answer in (OTHER, MOSS, PAIRS[4]):
        sample.main([f"--out={copy}", f"--prompt={question}"])
        said = capsys.readouterr().out.splitlines()[-1]
        assert said.startswith(f"{answer}   (nearest: {answer}, at "), said
