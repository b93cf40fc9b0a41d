"""What the speaking lab's figures can be trusted for, one property a test."""
import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import train
from labs import speaking as lab
from labs.arms import Flags, run_arms
from labs.controls import GPT
from tests.toy import FLAGS, write_corpus

SHORT = dict(pretrain_steps=2, distill_steps=4, speak_steps=4, eval_every=2)


def row(split, relation, subject, answer, phrasing="heldout"):
    return data.QA(split, phrasing, relation, subject, f"{relation} of {subject}?", answer)


class Asked(data.Questions):
    """Questions without a tokenizer."""
    def __init__(self, rows):
        self.rows, self.tokens = rows, torch.zeros(len(rows), 1, dtype=torch.long)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A function of changes -> Config of an arm of the toy world, whose phases 1 and 2 are trained, well enough."""
    folder = tmp_path_factory.mktemp("speaking")
    write_corpus(folder)
    base = lab.Config(**FLAGS | dict(data=str(folder / "text.txt"), qa=str(folder / "qa.tsv"), device="cpu"))
    lab.phases(dataclasses.replace(base, out=str(folder / f"{lab.SHARED}_0")))
    return lambda **changes: dataclasses.replace(base, **dict(out=str(folder / "arm_0")) | changes)


@pytest.fixture(scope="session")
def spoken(toy):
    """The toy world after phase 3: (run, questions, table of concepts)."""
    run, questions, concepts = lab.begin(toy())
    lab.fit(run, "speak", lab.Speech(run, questions, concepts).loss_at)
    return run, questions, concepts


# -- an arm ------------------------------------------------------------------------------------------------------------

def test_the_default_arm_is_phase_3_of_train_py(toy):
    cfg = toy(**SHORT)
    run, questions, concepts = lab.begin(cfg)
    lab.fit(run, "speak", lab.Speech(run, questions, concepts).loss_at)
    there = train.Path(cfg.out).parent / "theirs"
    there.mkdir()
    (there / "ckpt.pt").write_bytes((train.Path(cfg.out).parent / f"{lab.SHARED}_0" / "ckpt.pt").read_bytes())
    train.run(lab.plain(cfg, phase="speak", out=str(there)))
    theirs = train.load_checkpoint(there)["model"]
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, theirs[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("encoder, moves", [("frozen", {"decoder"}), ("tuned", {"decoder", "encoder", "predictor"}),
                                            ("joint", {"decoder", "encoder", "predictor"})])
def test_an_arm_trains_what_it_says_and_nothing_else(toy, encoder, moves, monkeypatch):
    cfg, seen = toy(**SHORT, encoder=encoder), {}

    def judge(run, questions, concepts):
        seen.update(run=run)
        return {}, {}
    monkeypatch.setattr(lab, "judge", judge)
    before = lab.begin(cfg)[0].model.state_dict()
    figures = lab.speaker(cfg)
    changed = {name.split(".")[0] for name, value in seen["run"].model.state_dict().items()
               if not torch.equal(value, before[name])}
    assert changed - {"concept_mean", "concept_std"} == moves
    assert ("grad_cos_thought_encoder" in figures) == (encoder == "joint")
    assert {"grad_cos", "grad_cos_random", "grad_halves_token", "grad_cos_slots", "early_em_DEC"} <= set(figures)


def test_alpha_moves_as_its_name_says(toy):
    run, questions, concepts = lab.begin(toy())
    def alphas(**changes):
        speech = lab.Speech(run._replace(cfg=dataclasses.replace(run.cfg, **changes)), questions, concepts)
        return [speech.loss_at(progress)[1]["alpha"] for progress in (0.0, 0.5, 1.0)]
    assert alphas() == pytest.approx([0.5, 0.25, 0.0])
    assert alphas(alpha="reversed", alpha_start=0.8) == pytest.approx([0.0, 0.4, 0.8])
    assert alphas(alpha="constant", alpha_start=0.1) == [0.1] * 3
    # as much of it in all: the constant arm that is compared with the default
    area = sum(lab.SCHEDULES["annealed"](i / 1000) for i in range(1000)) / 1000 * train.Config.alpha_start
    assert area == pytest.approx(lab.ARMS["alpha 0.25"].alpha_start, abs=1e-3)


def test_a_shuffled_goal_is_another_answer_and_always_the_same(toy):
    run, questions, concepts = lab.begin(toy())
    own = lab.Speech(run, questions, concepts).goals
    other = lab.Speech(run._replace(cfg=dataclasses.replace(run.cfg, goal="shuffled")), questions, concepts).goals
    answer, goal = (torch.cdist(goals, concepts).argmin(1) for goals in (own, other))
    assert (answer != goal).float().mean() > 0.7 and sorted(goal.unique().tolist()) == list(range(len(concepts)))
    assert all(len(goal[answer == i].unique()) == 1 for i in range(len(concepts)))


def test_no_arm_is_asked_about_the_subjects_that_teach_to_abstain():
    corpus = SimpleNamespace(qa=[row("NEVER", "capital", name, lab.IDK) for name in "abcd"]
                             + [row("DEC", "capital", "e", "x")])
    without, speech = (lab.pick_questions(corpus, lab.Config(idk=idk)) for idk in ("", "speech"))
    def subjects(rows, split):
        return {row.subject for row in rows if row.split == split}
    assert subjects(without, "NEVER") == subjects(speech, "NEVER") == {"b", "d"} and not subjects(without, "IDK")
    assert subjects(speech, "IDK") == {"a", "c"}
    assert subjects(lab.lessons_of(Asked(speech), True).rows, "DEC") == {"a", "c", "e"}
    assert subjects(lab.lessons_of(Asked(speech), False).rows, "DEC") == {"e"}
    assert subjects(speech, "DEC") == {"e"}      # what is judged stays as it was


# -- gradients ---------------------------------------------------------------------------------------------------------

def test_gradients_are_those_of_backward(toy):
    run, questions, concepts = lab.begin(toy())
    speech, shared = lab.Speech(run, questions, concepts), lab.groups(run)
    run.model.requires_grad_(True)
    loss = speech.each(torch.arange(8), seed=0)["token"]
    found = lab.gradient(loss, shared)
    speech.each(torch.arange(8), seed=0)["token"].backward()
    for group, params in shared.items():
        torch.testing.assert_close(found[group], torch.cat([p.grad.flatten() for p in params]))
    names = {id(p): name for name, p in run.model.named_parameters()}
    assert {names[id(p)].split(".")[1] for part in shared.values() for p in part} == {"slots", "blocks"}  # and no head


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_conflict_of_a_loss_with_itself_and_with_its_opposite(toy, sign):
    run, questions, concepts = lab.begin(toy())
    run.model.requires_grad_(True)
    speech = lab.Speech(run, questions, concepts)
    each = speech.each
    def fake(which, seed):
        first, second = (each(which, seed)["token"] for _ in range(2))
        return dict(token=first, latent=2 * sign * second)
    speech.each = lambda which, seed: fake(which, seed) | dict(random=each(which, seed)["random"])
    for figures in lab.conflict(speech, batches=2).values():
        assert figures["cos"] == pytest.approx(sign, abs=1e-4) and figures["against"] == float(sign < 0)
        assert figures["ratio"] == pytest.approx(2, abs=1e-3) and figures["similarity"] == pytest.approx(0.8, abs=1e-3)
        assert figures["halves_token"] == pytest.approx(figures["halves_latent"], abs=1e-3)
        assert figures["halves_token"] < 1


# -- what is said ------------------------------------------------------------------------------------------------------

def test_log_probabilities_are_those_of_the_loss_and_of_greedy_speech(spoken):
    run, questions, _ = spoken
    thoughts, words = lab.hear(run, questions.tokens), lab.ended(questions, run.corpus.tokenizer)
    run.model.cfg.noise, noise = 0.0, run.model.cfg.noise
    loss = run.model.speak_loss(thoughts, words, torch.zeros(len(words), run.cfg.n_embd), 0.0)[0]
    run.model.cfg.noise = noise
    found = lab.logprob(run, thoughts, words)
    assert -found.nanmean() == pytest.approx(loss.item(), abs=1e-4)
    assert torch.equal(found.isnan(), words == run.model.cfg.pad)
    said, logp = lab.utter(run, thoughts)
    assert said == evaluate.say(run, thoughts)
    scores = lab.token_scores(logp)
    right = torch.tensor([a == b.answer for a, b in zip(said, questions.rows)])
    torch.testing.assert_close(scores["product"][right], found.nansum(1)[right])
    assert (scores["least"] <= scores["token"] + 1e-6).all() and (scores["product"] <= scores["least"] + 1e-6).all()


def test_edits_are_followed_and_random_ones_are_not(spoken):
    run, questions, concepts = spoken
    thoughts = lab.hear(run, questions.tokens)
    said, nearest = lab.utter(run, thoughts)[0], torch.cdist(thoughts.latent, concepts).argmin(1)
    rival = lab.rivals_of(questions, nearest)
    assert (rival != nearest).all() and (rival != questions.answer_of).all()
    found = lab.editing(run, questions, concepts, thoughts, said, nearest)
    assert found["follow_replace_DEC"] > 0.9 and found["follow_random_DEC"] < 0.3
    assert found["follow_shift_100_DEC"] > found["follow_shift_25_DEC"]


def test_speech_hangs_on_its_memory(spoken):
    run, questions, _ = spoken
    found = lab.grounding(run, questions)
    assert found["em_DEC_memory_real"] > 0.9 and found["dnll_DEC_memory_real"] == 0
    for name in ("zero", "mean", "shuffled", "random"):
        assert found[f"em_DEC_memory_{name}"] < 0.5 and found[f"dnll_DEC_memory_{name}"] > 0.5


def test_the_other_question_is_of_the_same_relation():
    asked = Asked([row("DEC", relation, str(i), "x") for i in range(6) for relation in ("capital", "author")])
    other = lab.same_relation(asked).tolist()
    assert sorted(other) == list(range(12))
    assert all(asked.rows[i].relation == asked.rows[j].relation and i != j for i, j in enumerate(other))


def test_traces_agree_where_the_nearest_concept_is_what_is_said():
    asked = Asked([row("DEC", "capital", "a", "x"), row("DEC", "capital", "b", "y"), row("LAT", "capital", "c", "z"),
                   row("NEVER", "capital", "d", lab.IDK)])
    asked.answers = ["x", "y", "z"]
    found = lab.tracing(asked, ["x", "z", "y", "x"], torch.tensor([0, 0, 1, 2]))
    # b: thinks x, says z; c: thinks and says y, both wrong; d: thinks z, says x
    assert (found["agree_DEC"], found["agree_LAT"], found["agree_NEVER"]) == (0.5, 1.0, 0.0)
    assert found["agree_both_wrong"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["agree_chance"] == 0.5         # against y, z, x, x: b and d


# -- does it know when it does not know? -------------------------------------------------------------------------------

def invented(n=20):
    """n DEC and n NEVER questions."""
    return Asked([row("DEC", "capital", f"{i:02}", "x") for i in range(n)]
                 + [row("NEVER", "capital", f"n{i:02}", lab.IDK) for i in range(n)])


def test_trust_of_a_score_that_knows_and_of_one_that_does_not():
    asked, said = invented(), ["x"] * 40
    knows, constant = torch.tensor([1.0] * 20 + [0.0] * 20), torch.zeros(40)
    found, curves = lab.trust(asked, said, dict(knows=knows, constant=constant, product=torch.zeros(40)))
    assert found["hallucinated"] == 1 and found["silent_DEC"] == 0 and found["wrong"] == 0.5
    assert found["auroc_knows"] == 1 and found["caught_knows"] == 1 and found["ece_knows"] < 0.1
    assert found["auroc_constant"] == 0.5 and found["caught_constant"] == 0 and found["aurc_constant"] == 0.5
    assert found["aurc_knows"] == pytest.approx(sum((k - 20) / k for k in range(21, 41)) / 40)
    assert found["ece_raw"] == 0.5 and curves["knows"][:20] == [0] * 20       # always sure, right half of the time


def test_who_says_i_dont_know_is_least_sure_and_invents_nothing():
    asked = invented()
    found, _ = lab.trust(asked, ["x"] * 20 + [lab.IDK] * 20, dict(token=torch.tensor([0.0] * 20 + [1.0] * 20)))
    assert found["hallucinated"] == 0 and found["auroc_token"] == 1 and found["wrong"] == 0
    found, _ = lab.trust(asked, [lab.IDK] * 40, dict(token=torch.zeros(40)))
    assert found["silent_DEC"] == 1 and found["auroc_token"] == 0.5 and found["aurc_token"] == 1
    assert "ece_token" not in found     # nothing was answered


def test_a_gpt_answers_each_question_as_if_it_were_alone(toy):
    run, questions, _ = lab.begin(toy())
    torch.manual_seed(0)
    model = GPT(run.model.cfg, 64)
    run = run._replace(model=model)
    questions = copy.copy(questions)
    questions.tokens = questions.tokens.clone()
    questions.tokens[::2, -3:] = model.cfg.pad          # two lengths
    said, logp = lab.answers_of(run, questions)
    for i in (0, 1, 5):
        alone = copy.copy(questions)
        alone.tokens = questions.tokens[i:i + 1]
        one, each = lab.answers_of(run, alone)
        assert one == said[i:i + 1]
        torch.testing.assert_close(each, logp[i:i + 1], equal_nan=True, atol=1e-4, rtol=1e-4)
        first = model(alone.tokens[alone.tokens != model.cfg.pad][None])[0].log_softmax(-1).max()      # greedy
        torch.testing.assert_close(logp[i, 0], first.detach(), atol=1e-4, rtol=1e-4)


# -- the whole ---------------------------------------------------------------------------------------------------------

def test_every_column_of_the_tables_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "draw", lambda *drawn: None)
    names = "annealed", "GPT taught I don't know"
    lab.speaking(Flags(fast=True, out=str(tmp_path), arms=",".join(names)))
    rows = {row["arm"]: row for row in run_arms("speaking", lab.ARMS, Flags(fast=True, out=str(tmp_path), seeds=0))}
    assert set(rows) == {lab.SHARED, *names}
    small = {"grad_cos_block 1", "grad_cos_block 2"} | {name for name in lab.LAYERS.values() if "encoder" in name}
    for arms, columns in lab.TABLES.values():
        if "annealed" in arms:
            assert set(columns.values()) - set(rows["annealed"]) <= small
    for columns in lab.TRUSTED, lab.RISKS:      # a GPT has no latent, and says too little yet to be calibrated
        lacks = set(columns.values()) - set(rows["GPT taught I don't know"])
        assert all(name.endswith("latent") or name.startswith("ece") for name in lacks)


def test_an_arm_without_its_phases_1_and_2_says_what_to_run(toy, tmp_path):
    with pytest.raises(ValueError, match="--arms='phases 1 and 2' --redo first"):
        lab.begin(toy(out=str(tmp_path / "arm_0")))
