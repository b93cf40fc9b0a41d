"""What the speaking lab's figures can be trusted for, one property a test."""
import copy
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import train
from labs import controls, grounding
from labs import speaking as lab
from labs.arms import Flags, run_arms
from labs.runs import fit, plain
from tests.toy import FLAGS, write_corpus

SHORT = dict(pretrain_steps=2, distill_steps=4, speak_steps=4, eval_every=2)


def row(split, relation, subject, answer, phrasing="heldout"):
    return data.QA(split, phrasing, relation, subject, f"{relation} of {subject}?", answer)


class Asked(data.Questions):
    """Questions without a tokenizer."""
    def __init__(self, rows):
        self.rows = rows
        self.tokens = torch.zeros(len(rows), 1, dtype=torch.long)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A function of changes -> Config of an arm; phases 1 and 2 of the toy world are trained."""
    folder = tmp_path_factory.mktemp("speaking")
    write_corpus(folder)
    paths = dict(data=str(folder / "text.txt"), qa=str(folder / "qa.tsv"), device="cpu")
    base = lab.Config(**FLAGS | paths)
    shared = dataclasses.replace(base, phase="all", out=str(folder / f"{lab.SHARED}_0"))
    lab.phases_1_and_2(shared)
    return lambda **changes: dataclasses.replace(base, out=str(folder / "arm_0"), **changes)


@pytest.fixture(scope="session")
def spoken(toy):
    """The toy world after phase 3: a `train.Run`."""
    run = lab.start(toy())
    fit(run, "speak", lab.Speech(run).loss_at)
    return run


def with_flags(run, **changes):
    """The run with other flags of its arm."""
    return run._replace(cfg=dataclasses.replace(run.cfg, **changes))


# -- an arm ----------------------------------------------------------------------------------------

def test_the_default_arm_is_phase_3_of_train_py(toy):
    cfg = toy(**SHORT)
    run = lab.start(cfg)
    fit(run, "speak", lab.Speech(run).loss_at)
    theirs = Path(cfg.out).parent / "theirs"
    theirs.mkdir()
    shutil.copy(Path(cfg.out).parent / f"{lab.SHARED}_0" / "ckpt.pt", theirs)
    train.run(plain(cfg, phase="speak", out=str(theirs)))
    expected = train.load_checkpoint(theirs)["model"]
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("encoder, phase, moves", [
    ("frozen", "speak", {"decoder"}),
    ("tuned", "speak", {"decoder", "context_encoder", "predictor"}),
    ("joint", "distill", {"decoder", "context_encoder", "predictor"})])
def test_an_arm_trains_what_it_says_and_nothing_else(toy, encoder, phase, moves, monkeypatch):
    cfg = toy(**SHORT, encoder=encoder, phase=phase)
    trained = []

    def judge(run):
        trained.append(run.model)
        return {}
    monkeypatch.setattr(lab, "judge", judge)
    before = lab.start(cfg).model.state_dict()
    figures = lab.speaker(cfg)
    changed = {name.split(".")[0] for name, value in trained[0].state_dict().items()
               if not torch.equal(value, before[name])}
    assert changed - {"answer_mean", "answer_scale"} == moves
    assert ("grad_cos_thought_encoder" in figures) == (encoder == "joint")
    assert {"grad_cos", "grad_cos_random", "grad_halves_token", "early_em_DEC"} <= set(figures)


def test_alpha_moves_as_its_name_says(toy):
    run = lab.start(toy())

    def alphas(**changes):
        speech = lab.Speech(with_flags(run, **changes))
        return [speech.loss_at(progress)[1]["alpha"] for progress in (0.0, 0.5, 1.0)]
    assert alphas() == pytest.approx([0.5, 0.25, 0.0])
    assert alphas(alpha="reversed", alpha_start=0.8) == pytest.approx([0.0, 0.4, 0.8])
    assert alphas(alpha="constant", alpha_start=0.1) == [0.1] * 3
    # the constant arm that is compared with the default has as much of it in all
    mean = sum(lab.SCHEDULES["annealed"](i / 1000) for i in range(1000)) / 1000
    constant = lab.ARMS["alpha 0.25"].alpha_start
    assert mean * train.Config.alpha_start == pytest.approx(constant, abs=1e-3)


def test_a_shuffled_goal_is_another_answer_and_always_the_same(toy):
    run = lab.start(toy())
    own = lab.Speech(run).goals
    other = lab.Speech(with_flags(run, goal="shuffled")).goals
    answer = torch.cdist(own, run.concepts).argmin(1)
    goal = torch.cdist(other, run.concepts).argmin(1)
    assert (answer != goal).float().mean() > 0.7
    assert sorted(goal.unique().tolist()) == list(range(len(run.concepts)))
    assert all(len(goal[answer == i].unique()) == 1 for i in range(len(run.concepts)))


def test_no_arm_is_asked_about_the_subjects_that_teach_to_abstain():
    invented = [row("NEVER", "capital", name, lab.IDK) for name in "abcd"]
    corpus = SimpleNamespace(qa=invented + [row("DEC", "capital", "e", "x")])
    without = lab.pick_questions(corpus, lab.Config())
    taught = lab.pick_questions(corpus, lab.Config(idk=True))

    def subjects(rows, split):
        return {row.subject for row in rows if row.split == split}
    assert subjects(without, "NEVER") == subjects(taught, "NEVER") == {"b", "d"}
    assert not subjects(without, "IDK") and subjects(taught, "IDK") == {"a", "c"}
    assert subjects(lab.lessons_of(Asked(taught)).rows, "DEC") == {"a", "c", "e"}
    assert subjects(taught, "DEC") == {"e"}         # what is judged does not change


def test_an_arm_without_its_phases_1_and_2_says_what_to_run(toy, tmp_path):
    cfg = dataclasses.replace(toy(), out=str(tmp_path / "arm_0"))
    with pytest.raises(ValueError, match="--arms='phases 1 and 2' --redo first"):
        lab.start(cfg)


# -- gradients -------------------------------------------------------------------------------------

def test_gradients_are_those_of_backward(toy):
    run = lab.start(toy())
    run.model.requires_grad_(True)
    speech = lab.Speech(run)
    decoder, encoder = lab.gradients(speech, seed=7)
    assert not encoder                              # it is frozen in this arm
    torch.manual_seed(7)
    rows = train.draw_lessons(run, speech.lessons)
    torch.manual_seed(7)
    speech.loss(rows, speech.goals, 0.0)[0].backward()
    for layer, found in zip([run.model.decoder.slots, *run.model.decoder.blocks], decoder):
        expected = torch.cat([p.grad.flatten() for p in layer.parameters()])
        torch.testing.assert_close(found["token"], expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_conflict_of_a_loss_with_itself_and_with_its_opposite(toy, sign, monkeypatch):
    run = lab.start(toy())
    run.model.requires_grad_(True)
    real = lab.gradients

    def opposed(speech, seed):
        """Gradients where the latent loss is the token loss, or its opposite."""
        decoder, encoder = real(speech, seed)
        return [layer | dict(latent=2 * sign * layer["token"]) for layer in decoder], encoder
    monkeypatch.setattr(lab, "gradients", opposed)
    figures = lab.conflict(lab.Speech(run), batches=2)
    assert figures["grad_cos"] == pytest.approx(sign, abs=1e-4)
    assert figures["grad_halves_token"] < 1


# -- what is said ----------------------------------------------------------------------------------

def test_log_probabilities_are_those_of_the_loss_and_of_greedy_speech(spoken):
    run, questions = spoken, spoken.questions
    thoughts = lab.think(run, questions)
    answers = questions.answer_tokens[questions.answer_of]
    answers = train.with_end(answers, run.corpus.tokenizer)
    noise, run.model.cfg.noise = run.model.cfg.noise, 0.0
    goals = torch.zeros(len(answers), run.cfg.n_embd)
    loss, _ = run.model.speak_loss(thoughts, answers, goals, 0.0)
    run.model.cfg.noise = noise
    found = grounding.logprobs(run, thoughts, answers)
    assert -found.nanmean() == pytest.approx(loss.item(), abs=1e-4)
    assert torch.equal(found.isnan(), answers == run.model.cfg.pad)

    said, logp = grounding.answers_of(run, thoughts)
    assert said == evaluate.say(run, thoughts)
    right = controls.matches(questions, said)
    torch.testing.assert_close(logp[right].nansum(1), found[right].nansum(1))
    assert (grounding.least_likely(logp) <= logp.nanmean(1) + 1e-6).all()


def test_edits_are_followed_and_random_ones_are_not(spoken):
    run, questions = spoken, spoken.questions
    thoughts = lab.think(run, questions)
    nearest = torch.cdist(thoughts.latent, run.concepts).argmin(1)
    rival = grounding.rivals_of(questions, nearest)
    assert (rival != nearest).all() and (rival != questions.answer_of).all()
    found = grounding.editing(run, questions, thoughts, nearest)
    assert found["follow_shift_100_DEC"] > 0.5
    assert found["follow_random_DEC"] < 0.3


def test_speech_depends_on_its_memory(spoken):
    found = grounding.replaced(spoken, spoken.questions)
    assert found["em_DEC_memory_real"] > 0.9
    for name in ("zero", "shuffled", "random"):
        assert found[f"em_DEC_memory_{name}"] < 0.5


def test_the_other_question_is_of_the_same_relation():
    asked = Asked([row("DEC", relation, str(i), "x")
                   for i in range(6) for relation in ("capital", "author")])
    other = grounding.same_relation(asked).tolist()
    assert sorted(other) == list(range(12))
    for i, j in enumerate(other):
        assert asked.rows[i].relation == asked.rows[j].relation and i != j


def test_traces_agree_where_the_nearest_concept_is_what_is_said():
    asked = Asked([row("DEC", "capital", "a", "x"), row("DEC", "capital", "b", "y"),
                   row("LAT", "capital", "c", "z"), row("NEVER", "capital", "d", lab.IDK)])
    asked.answers = ["x", "y", "z"]
    # b: nearest x, says z; c: nearest and said y; d: nearest z, says x
    found = grounding.tracing(asked, ["x", "z", "y", "x"], torch.tensor([0, 0, 1, 2]))
    assert (found["agree_DEC"], found["agree_LAT"], found["agree_NEVER"]) == (0.5, 1.0, 0.0)
    assert found["agree_chance"] == 0.5             # against y, z, x, x: b and d


# -- is it known what is not known? ----------------------------------------------------------------

def invented(n=20):
    """n DEC and n NEVER questions."""
    known = [row("DEC", "capital", f"{i:02}", "x") for i in range(n)]
    return Asked(known + [row("NEVER", "capital", f"n{i:02}", lab.IDK) for i in range(n)])


def test_trust_of_a_score_that_knows_and_of_one_that_does_not():
    knows = torch.tensor([1.0] * 20 + [0.0] * 20)
    scores = dict(knows=knows, constant=torch.zeros(40))
    found = grounding.trust(invented(), ["x"] * 40, scores)
    assert found["hallucinated"] == 1
    assert found["auroc_knows"] == 1 and found["auroc_constant"] == 0.5


def test_an_answer_i_dont_know_is_least_sure_and_invents_nothing():
    opposite = torch.tensor([0.0] * 20 + [1.0] * 20)
    found = grounding.trust(invented(), ["x"] * 20 + [lab.IDK] * 20, dict(token=opposite))
    assert found["hallucinated"] == 0 and found["auroc_token"] == 1
    found = grounding.trust(invented(), [lab.IDK] * 40, dict(token=torch.zeros(40)))
    assert found["auroc_token"] == 0.5


# -- the GPT ---------------------------------------------------------------------------------------

def test_a_gpt_answers_each_question_as_if_it_were_alone(toy):
    run = lab.start(toy())
    torch.manual_seed(0)
    model = controls.Reader(run.model.cfg)
    run = run._replace(model=model)
    questions = copy.copy(run.questions)
    questions.tokens = questions.tokens.clone()
    questions.tokens[::2, -3:] = model.cfg.pad      # two lengths
    said, logp = controls.gpt_says(run, questions)
    for i in (0, 1, 5):
        alone = copy.copy(questions)
        alone.tokens = questions.tokens[i:i + 1]
        one, each = controls.gpt_says(run, alone)
        assert one == said[i:i + 1]
        torch.testing.assert_close(each, logp[i:i + 1], equal_nan=True, atol=1e-4, rtol=1e-4)
        prompt = model.after_bos(alone.tokens[alone.tokens != model.cfg.pad][None])
        greedy = model(prompt)[0].log_softmax(-1).max()
        torch.testing.assert_close(logp[i, 0], greedy.detach(), atol=1e-4, rtol=1e-4)


# -- the whole -------------------------------------------------------------------------------------

def test_every_column_of_the_tables_is_measured(tmp_path, capsys):
    names = ("annealed", "GPT taught I don't know")
    lab.speaking(Flags(fast=True, out=str(tmp_path), arms=",".join(names)))
    assert "annealed: ran" in capsys.readouterr().out
    kept = Flags(fast=True, out=str(tmp_path), seeds=0)
    rows = {row["arm"]: row for row in run_arms("speaking", lab.ARMS, kept)}
    assert set(rows) == {lab.SHARED, *names}
    for part in json.loads(Path("labs/pages/tables.json").read_text())["speaking"].values():
        assert set(part["arms"]) <= set(lab.ARMS)
        for arm in set(part["arms"]) & set(rows):
            # a GPT has no latent
            assert set(part["columns"].values()) - set(rows[arm]) <= {"auroc_latent"}
