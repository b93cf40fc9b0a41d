"""What the figures of questions mean: who counts, in which wording, and what a tie is."""
import math
import types

import pytest
import torch

import data
import evaluate
from tests.toy import make, rows


def questions_of(*rows):
    """A `data.Questions` of rows (split, phrasing, relation, answer), without tokens."""
    found = data.Questions.__new__(data.Questions)
    found.rows = [data.QA(split, phrasing, relation, "s", "q", answer)
                  for split, phrasing, relation, answer in rows]
    found.tokens = torch.zeros(len(rows), 1, dtype=torch.long)
    return found


def run_that_says(monkeypatch, said, distances, threshold=math.inf):
    """A run whose thought number i is spoken as said[i], at distances[i] from the concepts."""
    monkeypatch.setattr(evaluate, "say",
                        lambda run, which: [said[i] for i in which.latent.tolist()])
    monkeypatch.setattr(evaluate, "concept_distance",
                        lambda run, latent: torch.tensor(distances))
    thoughts = types.SimpleNamespace(latent=torch.arange(len(said)))
    thoughts.rows = lambda rows: types.SimpleNamespace(latent=thoughts.latent[rows])
    return types.SimpleNamespace(device="cpu", threshold=threshold), thoughts


# -- the threshold ---------------------------------------------------------------------------------

MADE_UP = [("NEVER", "made_up", "r", "")] * 11


@pytest.mark.parametrize("other", [
    ("NEVER", phrasing, "r", "")
    for phrasing in ("heldout", "typed", "typo", "natural", "nonsense")])
def test_the_threshold_reads_no_question_of_the_test(other):
    questions = questions_of(*MADE_UP, *[other] * 50)
    distance = torch.cat((10.0 + torch.arange(11.0), torch.zeros(50)))
    assert evaluate.threshold_of(questions, distance) == pytest.approx(11.0)


def test_a_pair_of_ones_own_that_was_added_lies_within_the_threshold():
    """The pairs of --phase=teach are NEW; they are taught as those of --qa are, DEC."""
    rows = [("DEC", "trained", "qa", "a"), ("NEW", "trained", "qa", "b"), MADE_UP[0]]
    assert evaluate.threshold_of(questions_of(*rows), torch.tensor([1.0, 8.0, 2.0])) > 8.0


def threshold(*rows):
    """The threshold for rows of (split, phrasing, relation, distance)."""
    questions = questions_of(*((*row[:3], "a") for row in rows))
    return evaluate.threshold_of(questions, torch.tensor([row[-1] for row in rows]))


def test_a_question_of_ones_own_that_was_taught_is_never_unknown_by_rounding():
    """Also where others hold it in other words (--qa_val), or where no made-up row fits: asked
    alone, a distance differs in the last digits."""
    taught = [("DEC", "trained", "qa", 1.0), ("DEC", "trained", "qa", 3.0)]
    reworded, made_up = ("DEC", "heldout", "qa", 9.0), ("NEVER", "made_up", "qa", 2.0)
    for rows in (taught, taught + [made_up], taught + [made_up] * 5):
        assert 3.0 * 1.01 < threshold(*rows) < 3.0 * 1.1
    assert threshold(*taught, reworded, made_up) == pytest.approx(9.0)


def test_an_added_pair_in_words_of_its_own_lies_within_the_threshold_of_a_run_on_facts():
    """No old fact is a pair of one's own, and how far those lie does not matter."""
    old = [("DEC", "trained", "r", 40.0), ("DEC", "heldout", "r", 1.0)]
    rows = [*old, ("NEW", "trained", "qa", 12.0), ("NEVER", "made_up", "r", 10.0)]
    assert threshold(*rows) == pytest.approx(1.05 * 12.0)


def test_half_of_what_is_known_is_never_refused():
    """--made_up=0 leaves made-up subjects as near as known ones."""
    known = [("DEC", "heldout", "r", float(i)) for i in range(11)]
    assert threshold(*known, ("NEVER", "made_up", "r", 0.5)) == pytest.approx(5.0)


def test_the_threshold_refuses_nine_of_ten_made_up_subjects():
    """The final evaluation has no say in it."""
    made_up = [("NEVER", "made_up", "r", 10.0 + i) for i in range(11)]
    others = [("DEC", "heldout", "r", 3.5), ("LAT", "heldout", "r", 30.0),
              ("DEC", "trained", "r", 40.0), ("DEC", "natural", "r", 3.8),
              ("NEVER", "heldout", "r", 3.1), ("NEVER", "nonsense", "none", 0.1)]
    for kept in (made_up + others[:1], others + made_up[::-1]):
        assert threshold(*kept) == pytest.approx(11.0)


def test_facts_that_are_added_do_not_loosen_the_threshold():
    """Made-up subjects set none above that of phase 2; half of what is known still lies within."""
    questions = questions_of(*MADE_UP, *[("DEC", "heldout", "r", "a")] * 3)
    made_up = 10.0 + torch.arange(11.0)
    for most, known, wanted in ((20.0, 2.0, 11.0), (9.0, 2.0, 9.0), (9.0, 9.5, 9.5)):
        distance = torch.cat((made_up, torch.tensor([1.0, known, 30.0])))
        assert evaluate.threshold_of(questions, distance, most) == pytest.approx(wanted)


# -- not knowing -----------------------------------------------------------------------------------

def test_abstention_counts_what_lies_beyond_the_threshold_by_wording():
    """Threshold 11: of two questions a wording one lies beyond it, of the nonsense both."""
    asked = [("NEVER", phrasing, "r", "") for phrasing in
             ("heldout", "heldout", "typo", "lower", "no_mark", "typo", "nonsense", "nonsense")]
    known = [("DEC", "heldout", "r", "a")] * 2
    distance = [*range(10, 21), 9.0, 12.0, 9.0, 9.0, 9.0, 12.0, 12.0, 12.0, 9.0, 1.0]
    figures = evaluate.abstention(questions_of(*MADE_UP, *asked, *known), torch.tensor(distance))
    assert figures["threshold"] == pytest.approx(11.0)
    assert [figures[name] for name in ("abstain", "abstain_typing", "abstain_nonsense")] == [
        0.5, 0.25, 1.0]
    # 12 is farther than 9 and 1; 9 only than 1, since a tie does not separate
    assert figures["auroc"] == pytest.approx(3 / 4)


# -- speech ----------------------------------------------------------------------------------------

def test_exact_match_is_the_whole_answer_and_sure_is_within_the_threshold(monkeypatch):
    rows = [*MADE_UP, *[("DEC", "heldout", "r", "Paris")] * 3, ("LAT", "heldout", "r", "Rome")]
    said = ["Oslo"] * 11 + ["Paris", "Paris", "Paris, it is", "Rome"]
    distances = [*torch.arange(10.0, 21.0).tolist(), 3.0, 30.0, 3.0, 3.0]
    run, thoughts = run_that_says(monkeypatch, said, distances)
    figures = evaluate.exact_match(run, questions_of(*rows), thoughts)
    assert figures["em_DEC_heldout"] == pytest.approx(2 / 3)
    assert figures["sure_DEC_heldout"] == pytest.approx(1 / 3)
    assert figures["em_LAT_heldout"] == figures["sure_LAT_heldout"] == 1


def test_sure_respects_the_bound_of_a_run_to_which_facts_were_added(monkeypatch):
    """Made-up subjects set a threshold of 11, the run bounds it by 8, and Rome lies at 9."""
    rows = [*MADE_UP, ("DEC", "heldout", "r", "Paris"), ("LAT", "heldout", "r", "Rome")]
    distances = [*torch.arange(10.0, 21.0).tolist(), 3.0, 9.0]
    for most, sure in ((math.inf, 1), (8.0, 0)):
        run, thoughts = run_that_says(monkeypatch, ["Oslo"] * 11 + ["Paris", "Rome"], distances,
                                      most)
        figures = evaluate.exact_match(run, questions_of(*rows), thoughts)
        assert figures["em_LAT_heldout"] == 1 and figures["sure_LAT_heldout"] == sure


def test_the_control_is_the_thought_of_another_question(monkeypatch):
    """A decoder that says only what its thought says is wrong with another's thought."""
    n = 40
    rows = [("DEC", "heldout", "r", f"answer {i}") for i in range(n)]
    run, thoughts = run_that_says(monkeypatch, [row[-1] for row in rows], [1.0] * n)
    figures = evaluate.exact_match(run, questions_of(*rows), thoughts)
    assert figures["em_DEC_heldout"] == 1 and figures["em_shuffled"] < 0.2


# -- thoughts --------------------------------------------------------------------------------------

def test_recall_is_among_the_answers_of_the_relation_and_a_tie_is_lost(monkeypatch):
    """Three answers; the relation of the question has the first two, the third lies nearer."""
    table = torch.tensor([[0.0], [4.0], [2.1]])
    latent = torch.tensor([[1.9], [2.0], [2.2]])
    questions = questions_of(*[("DEC", "heldout", "r", "a")] * 3)
    questions.answer_of = torch.tensor([0, 0, 0])
    questions.rivals_of = lambda rows: torch.tensor([[True, True, False]]).expand(len(rows), 3)
    monkeypatch.setattr(evaluate, "think_all",
                        lambda run, tokens: types.SimpleNamespace(latent=latent))
    run = types.SimpleNamespace(concepts=table, threshold=math.inf)
    assert evaluate.recall(run, questions, table)["r1_DEC_heldout"] == pytest.approx(1 / 3)


def test_recall_bounds_the_threshold_by_that_of_the_run(monkeypatch):
    """A made-up subject at 7 from the concept; facts were added to a run with a threshold of 5."""
    questions = questions_of(*[("NEVER", "made_up", "r", "a")] * 3)
    questions.answer_of = torch.zeros(3, dtype=torch.long)
    questions.rivals_of = lambda rows: torch.ones(len(rows), 1, dtype=torch.bool)
    monkeypatch.setattr(evaluate, "think_all",
                        lambda run, tokens: types.SimpleNamespace(latent=torch.full((3, 1), 7.0)))
    table = torch.zeros(1, 1)
    for most, wanted in ((math.inf, 7.0), (5.0, 5.0)):
        run = types.SimpleNamespace(concepts=table, threshold=most)
        assert evaluate.recall(run, questions, table)["threshold"] == pytest.approx(wanted)


# -- text ------------------------------------------------------------------------------------------

def test_phase_1_is_measured_on_held_out_text():
    """A corpus without a training part is enough."""
    model, read = make(), []

    def batch(n):
        read.append(n)
        return rows(n)
    corpus = types.SimpleNamespace(val=types.SimpleNamespace(batch=batch))
    run = types.SimpleNamespace(model=model, cfg=model.cfg, corpus=corpus, device="cpu")
    figures = evaluate.evaluate_text(run, 8)
    assert read == [8] and {"hit1", "rank", "health"} <= figures.keys()


def test_the_weight_of_the_prior_is_fitted_on_training_text(monkeypatch):
    """There the energy is right and the frequency wrong, in held-out text it is the reverse: what
    was fitted on held-out text would be right."""
    words, n = torch.arange(5), 8
    prior = torch.tensor([0.0, -1.0, -2.0, -3.0, -4.0])         # word 0 is the commonest

    def hide_words(run, text, rows, first=0):
        own = torch.full((n,), 1 if text == "train" else 0)
        return None if first else evaluate.HiddenWords(text, None, own, words, prior)

    def word_scores(run, hidden):
        return dict(energy=torch.nn.functional.one_hot(torch.ones(n).long(), 5).float())
    monkeypatch.setattr(evaluate, "hide_words", hide_words)
    monkeypatch.setattr(evaluate, "word_scores", word_scores)
    run = types.SimpleNamespace(corpus=types.SimpleNamespace(train="train", val="val"))
    figures = evaluate.hidden_words(run)
    assert figures["word_unigram_hit1"] == 1 and figures["word_energy_hit1"] == 0
    assert figures["word_prior_hit1"] == 0


def test_the_cloze_is_among_the_answers_of_the_text_or_among_all_values(monkeypatch):
    """The lowest energy is that of a value that the text never names, the next one is right."""
    def gap_energy(run, tokenizer, before, values, after):
        right = "Rome" if "Italy" in before else "Paris"
        energy = {"Atlantis": 0.0, right: 1.0}
        return torch.tensor([energy.get(value, 2.0) for value in values])
    monkeypatch.setattr(evaluate, "gap_energy", gap_energy)
    items = [data.Cloze("DEC", "capital", f"The capital of {land} is {{a}}.", answer)
             for land, answer in (("France", "Paris"), ("Italy", "Rome"))]
    items.append(data.Cloze("DEC", "river", "{a} flows.", "Rhine"))
    values = dict(capital=["Atlantis", "Paris", "Rome"], river=["Rhine"])
    run = types.SimpleNamespace(
        corpus=types.SimpleNamespace(cloze=items, values=values, tokenizer=None))
    assert evaluate.cloze(run, "capital") == dict(
        cloze_capital=1, cloze_capital_chance=1 / 2, cloze_capital_all=0,
        cloze_capital_all_chance=1 / 3)
