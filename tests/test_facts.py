"""What arms of the facts lab may differ in, and that its controls are controls."""
import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import tjepa
import train
from labs import arms, controls, facts, teachers
from labs.runs import model_of, plain
from tests.toy import FLAGS, PAIRS, write_corpus


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """An arm on the toy world, and its folder."""
    folder = tmp_path_factory.mktemp("facts")
    write_corpus(folder)
    paths = dict(data=str(folder / "text.txt"), qa=str(folder / "qa.tsv"))
    return folder, facts.Config(**FLAGS | paths | dict(question_noise=0.0, made_up=0.0))


def taught(questions):
    """The facts that phase 2 teaches."""
    rows = questions.where("DEC", "LAT", phrasing="trained").tolist()
    return {facts.fact_of(questions.rows[i]) for i in rows}


# -- the arms --------------------------------------------------------------------------------------

def test_arms_share_the_phases_that_they_copy():
    """What an arm changes belongs to the phase that it begins with, or to a later one."""
    first = ("pretrain_steps pretrain_lr batch_size mask_ratio target loss sigreg mlm top_k "
             "target_norm ema_half_life pred_layer pred_embd n_layer n_embd shift").split()
    second = "teacher distill_steps distill_lr question_drop qa_batch_size".split()
    for name, cfg in facts.ARMS.items():
        if cfg.start:
            source = facts.ARMS[cfg.start]
            shared = first + (second if cfg.phase == "speak" else [])
            assert all(getattr(cfg, field) == getattr(source, field) for field in shared), name
            assert cfg.phase in ("distill", "speak") and not source.start, name


def test_arms_read_and_are_taught_as_much_as_their_names_say():
    """Those with today's loss as much as train.py, or twice; those by MSE as the lab's Config."""
    def steps(cfg):
        return cfg.pretrain_steps, cfg.distill_steps, cfg.speak_steps
    for name, cfg in facts.ARMS.items():
        assert (cfg.shift == 10) == name.startswith("lever "), name
        if " half the " in name:
            assert sum(steps(cfg)) <= 0.56 * sum(steps(facts.Config)), name
            continue
        base = steps(train.Config) if cfg.loss == "infonce" else steps(facts.Config)
        times = 2 if cfg.loss == "infonce" and "twice the steps" in name else 1
        if cfg.pretrain_steps:
            reads = 3 if "three times as long" in name else times
            assert cfg.pretrain_steps == reads * base[0], name
        if "distill_steps" not in name:
            assert steps(cfg)[1:] == (times * base[1], times * base[2]), name


def test_the_tables_of_the_page_show_arms_of_the_lab():
    page = json.loads(Path("labs/pages/tables.json").read_text())["facts"]
    shown = {name for part in page.values() for name in part["arms"]}
    # a former arm was measured with the settings of that time
    assert {name.removeprefix("former: ") for name in shown} <= set(facts.ARMS)


def test_an_arm_that_others_begin_with_runs_first_and_once(tmp_path, monkeypatch):
    ran = []

    def measure(cfg):
        ran.append(Path(cfg.out).name)
        Path(cfg.out).mkdir(parents=True)
        return dict(em_LAT_heldout=0.5)
    monkeypatch.setattr(facts, "measure", measure)
    folders = dict(out=str(tmp_path), results=str(tmp_path))
    facts.facts(arms.Flags(seeds=2, arms="teacher gpt,n_slots=1,latent by MSE", **folders))
    assert sorted(ran[:4]) == ["GPT with small embeddings_0", "GPT with small embeddings_1",
                               "latent by MSE_0", "latent by MSE_1"]
    assert len(ran) == len(set(ran)) == 8


def test_what_is_missing_is_named(tmp_path):
    cfg = dataclasses.replace(facts.ARMS["n_slots=1"], out=str(tmp_path / "n_slots=1_0"))
    with pytest.raises(ValueError, match="latent by MSE_0/distill/ckpt.pt is missing: run --arms="):
        facts.measure(cfg)
    with pytest.raises(ValueError, match="--arms=nothing: this lab has default"):
        facts.facts(arms.Flags(arms="nothing", out=str(tmp_path)))


def test_shared_phases_are_bit_identical_and_the_decoder_is_new(tmp_path, capsys):
    facts.facts(arms.Flags(fast=True, out=str(tmp_path), arms="both,n_slots=1"))
    assert capsys.readouterr().out.endswith("latent by MSE: ran\nboth: ran\nn_slots=1: ran\n")
    folder = tmp_path / "facts-fast"
    shared, first, second = (train.load_checkpoint(folder / name)["model"] for name in (
        "latent by MSE_0/distill", "latent by MSE_0", "n_slots=1_0"))
    frozen = [name for name in shared if not name.startswith("decoder.")]
    for name in frozen:
        assert torch.equal(shared[name], first[name]) and torch.equal(shared[name], second[name])
    assert shared["decoder.slots.weight"].shape != second["decoder.slots.weight"].shape

    rows = arms.run_arms("facts", facts.ARMS, arms.Flags(fast=True, out=str(tmp_path), seeds=0))
    assert all("em_LAT_heldout" in row for row in rows)
    latent = next(row for row in rows if row["arm"] == "latent by MSE")
    page = json.loads(Path("labs/pages/tables.json").read_text())["facts"]
    shown = [part["columns"] for part in page.values()]
    for columns in shown:
        assert not set(columns.values()) - set(latent)


# -- phase 2: what is taught -----------------------------------------------------------------------

def test_shuffled_facts_have_the_answers_of_others_and_all_of_them(questions):
    wrong = facts.crossed(questions, seed=0)
    pairs = set()
    for row, own, other in zip(
            questions.rows, questions.answer_of.tolist(), wrong.answer_of.tolist()):
        if row.split in facts.TAUGHT:
            pairs.add((facts.fact_of(row), own, other))
    # one wrong answer for a fact, in all phrasings
    assert len(pairs) == len({fact for fact, _, _ in pairs}) == 224
    assert sorted(own for _, own, _ in pairs) == sorted(other for _, _, other in pairs)
    assert sum(own == other for _, own, other in pairs) < 12        # continents, mostly
    assert not torch.equal(wrong.answer_of, questions.answer_of)


def test_a_and_b_are_halves_and_b_is_taught_without_a(questions):
    a, b, lessons = facts.in_halves(questions, 0.0, seed=0)
    assert taught(lessons) == taught(b)
    assert not taught(a) & taught(b) and taught(a) | taught(b) == taught(questions)
    assert abs(len(taught(a)) - len(taught(b))) <= 1


@pytest.mark.parametrize("replay", [0.1, 1.0])
def test_replay_is_a_share_of_as_questions(questions, replay):
    a, b, lessons = facts.in_halves(questions, replay, seed=0)
    n_a, n_b, n = (len(part.where("DEC", "LAT")) for part in (a, b, lessons))
    assert (n - n_b) / n_a == pytest.approx(replay, abs=0.03)


def test_letters_and_codes_are_vectors_of_a_teacher(questions, tmp_path):
    answers = questions.answers
    for make, width in ((teachers.letters, 300), (teachers.random, 128)):
        teachers.save(tmp_path / "v.npz", answers, make(answers))
        found = data.read_vectors(tmp_path / "v.npz", answers)
        assert found.shape == (len(answers), width)
        assert torch.pdist(found).min() > 0         # no two answers have the same vector
    spelled = teachers.letters(["Paris", "Parish", "Rome"])
    assert spelled[0] @ spelled[1] > 0.5 > abs(spelled[0] @ spelled[2])


def test_the_sentence_encoder_of_the_readme_makes_vectors_that_can_teach(
        tmp_path, monkeypatch, questions):
    class SentenceTransformer:
        """The interface of the real one, with vectors made offline."""
        def __init__(self, name):
            pass

        def encode(self, texts):
            return teachers.letters(texts, 384).astype(np.float32)
    module = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    page = Path("labs/pages/extras.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
                if "sentence_transformers" in block)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "extras.md", "exec"), {})
    assert data.read_vectors("vectors.npz", questions.answers).shape == (213, 384)


# -- figures ---------------------------------------------------------------------------------------

def test_r2_of_perfect_thoughts_is_1_and_of_relation_means_0(questions, monkeypatch):
    torch.manual_seed(0)
    concepts = torch.randn(len(questions.answers), 16)
    run = types.SimpleNamespace(questions=questions, concepts=concepts)
    means = questions.rivals.float() @ concepts / questions.rivals.sum(1, keepdim=True)
    for latents, r2 in ((concepts[questions.answer_of], 1.0), (means, 0.0)):
        thoughts = tjepa.Thought(latents, None, None)
        monkeypatch.setattr(evaluate, "think_all", lambda run, tokens: thoughts)
        assert facts.explained(run)["r2_LAT_heldout"] == pytest.approx(r2, abs=1e-5)


def test_a_masked_lm_is_asked_for_tokens(corpus):
    tokens = torch.full((2, 12), 5)
    spans = torch.full((2, 12), tjepa.Config().max_spans)
    spans[:, 4:6] = 0
    cfg = facts.ARMS["masked LM"]
    model = train.build(plain(cfg), corpus.tokenizer, model=model_of(cfg))
    # near ln 2,048 for random weights; a latent error is about 2
    assert (controls.WordEnergy(model, mean=True).energy(tokens, spans) > 5).all()
    with pytest.raises(ValueError, match="mlm=0"):
        latent = train.build(plain(facts.ARMS["latent by MSE"]), corpus.tokenizer)
        controls.WordEnergy(latent, mean=True)


def test_the_commonest_answer_is_right_where_it_is_common_and_nowhere_else(corpus):
    figures = facts.constant(facts.Config(), corpus)
    assert 0.05 < figures["em_LAT_heldout"] < 0.2 and 0.05 < figures["em_TXT_heldout"] < 0.2
    answers = {row.answer for row in corpus.qa if row.split == "DEC"}
    # it can give DEC answers alone, one for a relation
    assert 1 / len(answers) < figures["em_DEC_heldout"] < 0.3


# -- the GPT ---------------------------------------------------------------------------------------

def gpt(tokenizer, **changes):
    """A small GPT with the ids of a tokenizer."""
    torch.manual_seed(0)
    cfg = tjepa.Config(n_embd=32, pred_embd=32, n_head=2, n_layer=2, top_k=2,
                       vocab_size=tokenizer.vocab_size, **changes)
    return controls.Reader(cfg)


def test_a_dropped_token_is_absent_and_the_others_keep_their_places(corpus):
    model = gpt(corpus.tokenizer, question_drop=0.5)
    cfg = model.cfg
    questions = torch.arange(10, 18).expand(50, 8).clone()
    questions[25:, 6:] = cfg.pad
    answers = torch.tensor([100, 101, cfg.eos]).expand(50, 3)
    tokens, targets, positions = controls.lesson(model, questions, answers)
    assert not (tokens == cfg.mask).any() and (tokens[:, 0] == cfg.bos).all()
    for row in range(50):
        length = 8 if row < 25 else 6
        kept = [id for id in tokens[row].tolist() if 10 <= id < 18]
        assert 0 < len(kept) <= length
        # [BOS] is at 0, question token i at i + 1, and the answer follows the whole question
        places = [0, *(id - 9 for id in kept), length + 1, length + 2]
        assert positions[row, :len(places)].tolist() == places
        assert targets[row][targets[row] >= 0].tolist() == [100, 101, cfg.eos]
        first = (targets[row] >= 0).nonzero()[0, 0]
        assert tokens[row, first] == kept[-1]       # the last token that is left predicts it


def test_without_dropping_the_loss_is_that_of_the_plain_text(corpus):
    model = gpt(corpus.tokenizer, question_drop=0.0)
    cfg = model.cfg
    tokens, targets, positions = controls.lesson(
        model, torch.tensor([[10, 11, 12]]), torch.tensor([[100, cfg.eos]]))
    text = torch.tensor([[cfg.bos, 10, 11, 12, 100, cfg.eos]])
    logits = model.say(model.states(text[:, :-1]))[:, 3:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[0, 4:])
    torch.testing.assert_close(model(tokens, targets, positions)[1], expected)


def test_with_a_cache_the_gpt_says_what_it_says_without(corpus):
    model = gpt(corpus.tokenizer)
    text = torch.randint(200, (3, 6))
    said = model.generate(text, 5)
    for i in range(5):
        logits, _ = model(text)
        assert torch.equal(logits[:, -1].argmax(-1), said[:, i])
        text = torch.cat((text, said[:, i:i + 1]), dim=1)


@pytest.mark.parametrize("told", ["DEC", "DEC LAT"])
def test_the_gpt_is_told_the_answers_that_it_says_it_is_told(corpus, questions, told, monkeypatch):
    heard = set()

    def lesson(model, asked, answers):
        """In place of `controls.lesson`: keeps the answers."""
        decode = corpus.tokenizer.decode
        heard.update(decode([i for i in row if i < model.cfg.pad]).strip()
                     for row in answers.tolist())
        return controls_lesson(model, asked, answers)
    controls_lesson = controls.lesson
    monkeypatch.setattr(controls, "lesson", lesson)
    cfg = train.Config(qa_batch_size=512)
    run = train.Run(cfg, gpt(corpus.tokenizer), corpus, "cpu", None, questions)
    loss_at = controls.answering(run, questions.where(*told.split(), phrasing="trained"))
    for _ in range(30):
        loss_at(0.0)

    def answers(*splits):
        return {row.answer for row in corpus.qa if row.split in splits}
    assert heard == answers(*told.split()) and (heard >= answers("LAT")) == ("LAT" in told)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_gpt_sees_the_typing_noise_of_phase_2_and_no_made_up_subject(
        corpus, questions, noise, monkeypatch):
    """A made-up subject has no answer that it could be taught."""
    read, controls_lesson = [], controls.lesson

    def lesson(model, asked, answers):
        """In place of `controls.lesson`: keeps the questions."""
        read.extend(tuple(i for i in row if i < model.cfg.pad) for row in asked.tolist())
        return controls_lesson(model, asked, answers)
    monkeypatch.setattr(controls, "lesson", lesson)
    cfg = train.Config(qa_batch_size=512, question_noise=noise, made_up=0.5)
    run = train.Run(cfg, gpt(corpus.tokenizer), corpus, "cpu", None, questions)
    torch.manual_seed(0)
    controls.answering(run, questions.where("DEC", phrasing="trained"))(0.0)
    encode = corpus.tokenizer.encode_question
    known = {tuple(encode(row.question)) for row in questions.rows if row.phrasing == "trained"}
    changed = sum(ids not in known for ids in read) / len(read)
    assert len(read) == 512 and 0.75 * noise <= changed <= 0.95 * noise


def test_a_gpt_learns_to_answer_and_its_vectors_can_teach(toy):
    folder, cfg = toy
    cfg = dataclasses.replace(cfg, kind="gpt", out=str(folder / "GPT_0"), qa_batch_size=12)
    assert facts.measure(cfg)["em_DEC"] == 1.0
    path = folder / "GPT_0" / "vectors.npz"
    vectors = data.read_vectors(path, sorted(colour for _, colour in PAIRS))
    assert vectors.shape == (12, 32) and torch.pdist(vectors).min() > 0
    student = plain(cfg, out=str(folder / "run"), teacher=str(path))
    train.run(dataclasses.replace(student, phase="pretrain"))
    assert train.run(dataclasses.replace(student, phase="distill"))["r1_DEC"] > 0.8


# -- the command that writes a teacher -------------------------------------------------------------

@pytest.mark.parametrize("argv, words", [
    (["--teacher=gpt4"], "one of gpt, letters, random"),
    (["--out=gpt.txt"], "must end in .npz"),
    (["--run=nowhere", "--out=v.npz"], "no checkpoint in --run=")])
def test_bad_flags_of_teachers_are_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as error:
        teachers.main(argv)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_the_command_writes_what_train_reads(toy, capsys):
    folder, cfg = toy
    run = plain(cfg, out=str(folder / "taught"), phase="pretrain", pretrain_steps=2)
    train.run(run)
    distill = dataclasses.replace(run, phase="distill", distill_steps=2)
    train.run(distill)
    teachers.main([f"--run={run.out}", f"--out={folder / 'gpt.npz'}"])
    assert "12 answers, 32 numbers each" in capsys.readouterr().out
    train.run(dataclasses.replace(distill, teacher=str(folder / "gpt.npz")))
    assert train.load_checkpoint(run.out)["config"]["teacher_width"] == 32


def test_wordings_resemble_each_other_by_their_content_words():
    """Three content words of four are shared, then none, then one of seven."""
    trained = ["Name the capital city of {s}.", "Who runs {s}?"]
    assert facts.resembles("capital city name for the land {s}", trained)
    assert not facts.resembles("to which town of {s} do ministers go", trained)
    assert not facts.resembles("seat of the government, capital, biggest place, {s}", trained)
