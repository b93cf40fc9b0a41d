"""Questions as people type them: the noise of phase 2, that of the final evaluation, and that
neither of the two learns from the other."""
import collections
import random
import re
import sys

import pytest
import torch

import data
import evaluate
import train
from data import added, typed
from data.facts import prepare
from tests.toy import PAIRS, write_corpus

# what is asked at the end only
AT_THE_END = {"natural", "nonsense", *evaluate.TYPING}
BETWEEN = set(data.QUICK)
ASKED = "What is the capital of France?"


def text_of(questions, tokens):
    """Rows of tokens (n, T) as n strings."""
    decode = questions.tokenizer.decode
    return [decode([i for i in row if i != questions.tokenizer.pad]).strip()
            for row in tokens.tolist()]


def as_read(questions, question):
    """A question as the encoder reads it, as text."""
    return questions.tokenizer.decode(questions.tokenizer.encode_question(question)).strip()


def drawn(questions, asked, seed=0, n=200, **shares):
    """One draw with a seed: which questions, and their texts."""
    torch.manual_seed(seed)
    which, tokens = questions.drawing(asked, n, **shares)()
    return which, text_of(questions, tokens)


# -- the same question -----------------------------------------------------------------------------

@pytest.mark.parametrize("asked, encoded", [
    ("Who wrote \u2018Emma\u2019?", "Who wrote 'Emma'"),
    ("Who wrote \u201cEmma\u201d?", 'Who wrote "Emma"'),
    ("  What \t is\nit? ", "What is it"),
    ("Name it.", "Name it"),
    ("What is it ?!", "What is it"),
    ("1984?", "1984"),
    ("?", "?")])
def test_quotes_blanks_and_a_mark_at_the_end_make_no_other_question(asked, encoded):
    assert typed.plain(asked) == encoded


@pytest.mark.parametrize("asked", [
    "what is the capital of france?", "WHAT IS THE CAPITAL OF FRANCE",
    "What Is The Capital Of France",
    " what is  the cAPITAL of francE\n"])
def test_capitals_make_no_other_question(asked):
    """Each word is encoded as the text has it: one token, and none for a name in small letters."""
    tokenizer = data.Tokenizer(data.train_bpe(f" {ASKED}" * 20, 300))
    ids = data.pack_questions(tokenizer, [asked], 64)[0].tolist()
    assert ids == tokenizer.encode(" What is the capital of France")


def test_a_case_is_judged_with_what_stands_in_front_of_a_word():
    """Abbreviations keep their capitals, the 's behind an apostrophe none, a title its own."""
    text = " the USA, and What's 'The Hobbit' in the end"
    tokenizer = data.Tokenizer(data.train_bpe(text * 20, 300))
    for asked in (text, text.lower(), text.upper()):
        assert tokenizer.decode(tokenizer.encode_question(asked)) == text


def test_a_word_that_the_text_never_had_keeps_its_letters():
    tokenizer = data.Tokenizer(data.train_bpe(f" {ASKED}" * 20, 300))
    text = tokenizer.decode(tokenizer.encode_question("the capital of Wakanda"))
    assert text.lower() == " the capital of wakanda"


# -- noise of phase 2 ------------------------------------------------------------------------------

def test_clipping_leaves_out_little_words_alone(corpus):
    """Subject and what is asked for stay, also where the subject begins the question."""
    rng, n_clipped = random.Random(0), 0
    for row in corpus.qa:
        if row.phrasing != "trained":
            continue
        text = typed.clipped(row.question, row.subject, rng)
        assert row.question.endswith(text)
        gone = row.question[:len(row.question) - len(text)]
        assert all(word.lower().strip(",:") in typed.LITTLE for word in gone.split()), row
        assert row.subject.lower() in text.lower()
        n_clipped += bool(gone)
    assert n_clipped > 1000


def test_as_typed_is_a_function_of_the_generator_and_does_all_it_says():
    """Some of many are clipped, without quotes, with chat around them, or have a typo."""
    question, subject, seeds = "Can you tell me who wrote 'Emma'?", "Emma", range(3000)
    found = [typed.as_typed(question, subject, random.Random(seed)) for seed in seeds]
    assert found == [typed.as_typed(question, subject, random.Random(seed)) for seed in seeds]
    assert {question, "who wrote 'Emma'?", "wrote Emma?", "Can you tell me who wrote Emma?",
            'Can you tell me who wrote "Emma"?'} <= set(found)
    letters = [len(re.sub(r"\W", "", text)) for text in found]
    assert min(letters) >= len("wroteEmma") - 1
    behind = "Emma'" + typed.BEHIND[0]
    assert any(text.startswith(typed.BEFORE) and behind in text for text in found)


def test_chat_stands_around_a_question_that_stays_whole():
    found = [typed.chatty("Who wrote Emma?", random.Random(seed)) for seed in range(500)]
    assert all("Who wrote Emma" in text and len(text) > len("Who wrote Emma?") for text in found)
    assert {text.split("Who")[0] for text in found} == {"", *typed.BEFORE}
    assert {text.split("Emma")[1].rstrip("?") for text in found} == {"", *typed.BEHIND}


def test_a_misspelling_swaps_drops_doubles_or_replaces_one_letter():
    kinds = collections.Counter()
    for seed in range(200):
        text = typed.misspelled(ASKED, random.Random(seed))
        longer = len(text) - len(ASKED)
        places = [i for i, (a, b) in enumerate(zip(ASKED, text)) if a != b]
        if len(places) == 1 and longer == 0:
            right, wrong = ASKED[places[0]], text[places[0]]
            assert wrong not in typed.beside(right) and wrong.isalpha()
            longer = "replaced"
        elif longer == 0:
            first, second = places
            assert second == first + 1 and ASKED[first:second + 1] == text[first:second + 1][::-1]
        else:
            more, less = sorted((ASKED, text), key=len, reverse=True)
            assert abs(longer) == 1
            assert any(more[:i] + more[i + 1:] == less for i in range(len(more)))
        kinds[longer] += 1
    assert set(kinds) == {-1, 0, 1, "replaced"}
    assert typed.misspelled("3 ?", random.Random(0)) == "3 ?"


def test_quotation_marks_go_and_apostrophes_sometimes():
    found = {typed.requoted("Who is 'Emma's' author?", random.Random(seed)) for seed in range(40)}
    assert found == {f"Who is {mark}{name}{mark} author?"
                     for mark in ("", '"') for name in ("Emma's", "Emmas")}


def test_nonsense_has_no_subject_and_a_made_up_one_is_new(corpus):
    rng = random.Random(0)
    subjects = {row.subject for row in corpus.qa if row.phrasing != "made_up"}
    for row in corpus.qa[::50]:
        if row.split != "NEVER":
            assert typed.nonsense(row.question, typed.as_written(row.subject, row.question), rng)
            assert typed.made_up(row.subject, rng.choice(corpus.qa).subject, rng) not in subjects
    text = typed.nonsense("Gold has which symbol?", "Gold", random.Random(3))
    assert "gold" not in text.lower()
    named = {row.subject for row in corpus.qa if row.phrasing == "made_up"}
    assert len(named) > 300 and not named & subjects


@pytest.mark.parametrize("asked, subjects", [
    (["What is the colour of moss?", "What is the colour of snow?"], ["moss", "snow"]),
    (["Golf?", "Who makes the Clio?"], ["Golf", "makes"]), (["???"], ["???"])])
def test_the_subject_of_an_own_question_is_its_rarest_word(asked, subjects):
    assert typed.subjects_of(asked) == subjects


# -- noise of the test -----------------------------------------------------------------------------

def test_a_neighbour_typo_is_one_letter_and_the_key_beside_it(corpus):
    """And always the same one: the test does not change from run to run."""
    keyboard = "qwertyuiop asdfghjkl zxcvbnm"
    for row in [row for row in corpus.qa if row.phrasing == "heldout"][::7]:
        text = typed.neighbour_typo(row.question)
        (right, wrong), = [pair for pair in zip(row.question, text) if pair[0] != pair[1]]
        assert len(text) == len(row.question) and text == typed.neighbour_typo(row.question)
        assert abs(keyboard.index(right.lower()) - keyboard.index(wrong.lower())) == 1
        assert right.isupper() == wrong.isupper()


def called(*functions):
    """The functions of data/typed.py that these call: names."""
    found = set()

    def watch(frame, event, arg):
        if event == "call" and frame.f_code.co_filename == typed.__file__:
            found.add(frame.f_code.co_name)
    sys.setprofile(watch)
    try:
        for function in functions:
            function()
    finally:
        sys.setprofile(None)
    return {name for name in found if not name.startswith("<")}


def test_training_and_test_share_no_noise_and_no_typo():
    """A figure on the test must not be about one function that was trained on."""
    def train_noise():
        for seed in range(200):
            typed.as_typed(ASKED, "France", random.Random(seed))

    def test_noise():
        for noise in typed.TESTS.values():
            noise(ASKED)
    trained, tested = called(train_noise), called(test_noise)
    assert {"as_typed", "clipped", "requoted", "misspelled"} <= trained
    # `beside` says which keys are neighbours: one picks among them, the other avoids them
    assert tested == {"neighbour_typo", "beside"} and trained & tested == {"beside"}
    # a neighbouring key changes one letter; no misspelling of phase 2 does just this
    keyboard = "qwertyuiop asdfghjkl zxcvbnm"
    for seed in range(500):
        text = typed.misspelled(ASKED, random.Random(seed))
        changed = [(a, b) for a, b in zip(ASKED.lower(), text.lower()) if a != b]
        if len(text) == len(ASKED) and len(changed) == 1:
            (right, wrong), = changed
            assert abs(keyboard.index(right) - keyboard.index(wrong)) > 1


def same_words(template):
    """A template without case, marks and quotes."""
    return " ".join(re.sub(r"[^\w{}]", " ", template.casefold()).split())


def test_natural_questions_are_six_a_relation_and_of_no_template():
    """Not even up to case, marks and quotes: then they would test nothing new."""
    natural = prepare.read_tsv("natural.tsv")
    counts = collections.Counter(relation for relation, _ in natural)
    assert set(counts) == {relation for _, relation, _ in prepare.read_tsv("facts.tsv")}
    assert min(counts.values()) >= 6
    assert all(template.count("{s}") == 1 for _, template in natural)
    asked = {same_words(template) for _, kind, template in prepare.read_tsv("templates.tsv")
             if kind != "statement"}
    found = [same_words(template) for _, template in natural]
    assert not set(found) & asked
    by_relation = {(relation, same_words(template)) for relation, template in natural}
    assert len(by_relation) == len(natural)


# -- what is drawn ---------------------------------------------------------------------------------

def test_drawing_is_a_function_of_the_seed(questions):
    """Whatever was drawn before: a resumed run draws the same."""
    asked = questions.where("DEC", "LAT", phrasing="trained")
    draw = questions.drawing(asked, 64, noise=0.5, unknown=0.2)
    batches = []
    for seed in (3, 4, 3):
        torch.manual_seed(seed)
        batches.append(draw())
    assert all(torch.equal(one, other) for one, other in zip(batches[0], batches[2]))
    assert not torch.equal(batches[0][0], batches[1][0])


def test_without_noise_a_batch_is_the_questions_themselves(questions):
    asked = questions.where("LAT", phrasing="trained")
    torch.manual_seed(0)
    which, tokens = questions.drawing(asked, 50)()
    expected = questions.tokens[asked[which]]
    assert torch.equal(tokens, expected[:, :tokens.size(1)])
    assert (expected[:, tokens.size(1):] == questions.tokenizer.pad).all()
    assert (tokens != questions.tokenizer.pad).any(0).all()         # it ends with its longest row


def test_noise_keeps_the_number_of_the_question_and_has_its_share(questions):
    asked = questions.where("DEC", phrasing="trained")
    for share in (0.5, 1.0):
        which, texts = drawn(questions, asked, n=1000, noise=share)
        rows = [questions.rows[asked[i]] for i in which.tolist()]
        changed = [text != as_read(questions, row.question) for text, row in zip(texts, rows)]
        # capitals and quotation marks that a question does not have change nothing
        assert 0.75 * share < sum(changed) / len(changed) < 0.95 * share


def test_a_made_up_row_has_the_number_m_and_a_subject_that_no_row_has(questions, monkeypatch):
    """Also where the subject begins the question, and has a capital letter there: a known
    question that is taught as unknown would be unlearned."""
    names, real = [], typed.made_up

    def made_up(*args):
        names.append(real(*args))
        return names[-1]
    monkeypatch.setattr(data, "made_up", made_up)
    rows = questions.rows
    known = {as_read(questions, row.question) for row in rows}
    subjects = {row.subject.casefold() for row in rows}
    every = questions.where("DEC", "LAT", phrasing="trained")
    capital = [i for i in every.tolist() if rows[i].subject not in rows[i].question]
    assert len(capital) > 50
    for asked in (every, torch.tensor(capital)):
        names.clear()
        which, texts = drawn(questions, asked, n=300, unknown=1.0)
        assert (which == len(asked)).all() and len(names) == 300
        assert not {name.casefold() for name in names} & subjects
        assert not set(texts) & known
        inside = sum(name.casefold() in text.casefold() for name, text in zip(names, texts))
        assert 0.6 < inside / 300 < 0.8             # the others are nonsense
    # now each question began with its subject: nonsense has none left
    whole = [re.compile(rf"\b{re.escape(rows[i].subject)}\b", re.IGNORECASE) for i in capital]
    nonsense = [text for text, name in zip(texts, names)
                if name.casefold() not in text.casefold()]
    assert not [text for text in nonsense if any(subject.search(text) for subject in whole)]
    share = (drawn(questions, every, n=2000, unknown=0.1)[0] == len(every)).float().mean()
    assert 0.07 < share < 0.13


def test_a_pair_of_ones_own_has_a_typed_copy_and_a_made_up_one(tmp_path):
    """They are asked and never taught."""
    write_corpus(tmp_path)
    tokenizer = data.Tokenizer(data.train_bpe((tmp_path / "text.txt").read_text(), 396))
    rows = data.read_qa(tmp_path / "qa.tsv", tokenizer, 32, 8)
    by = collections.defaultdict(list)
    for row in rows:
        by[row.phrasing].append(row)
    assert [(row.question, row.answer) for row in by["trained"]] == PAIRS
    assert {row.phrasing for row in rows} == {"trained", "typed", "made_up"}
    answer_of = {row.subject: row.answer for row in by["trained"]}
    assert len(answer_of) == len(PAIRS)
    assert all(row.split == "DEC" and row.answer == answer_of[row.subject] for row in by["typed"])
    for row in by["made_up"]:
        assert row.split == "NEVER" and row.subject in row.question
        assert row.subject not in answer_of
    longest = max(len(tokenizer.encode(" " + question)) for question, _ in PAIRS)
    rows = data.read_qa(tmp_path / "qa.tsv", tokenizer, longest, 8)
    assert all(len(tokenizer.encode_question(row.question)) <= longest for row in rows)


# -- what each phase may read ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(corpus):
    """A run on the facts, to which one fact was added."""
    cfg = train.Config(n_embd=16, n_head=1, n_layer=1, top_k=1, pred_embd=16, pred_layer=1,
                       dec_layer=1, device="cpu", dtype="fp32")
    rows = data.add_pairs(corpus.qa, [("What is the capital of Lorvania?", "Lima")], data.QA)
    questions = data.Questions(rows, corpus.tokenizer, 64, 24, "cpu")
    concepts = torch.zeros(len(questions.answers), 16)
    model = train.build(cfg, corpus.tokenizer)
    return train.Run(cfg, model, corpus, "cpu", None, questions, concepts)


@pytest.mark.parametrize("phase", ["distill", "speak", "teach"])
def test_a_phase_trains_on_trained_wordings_and_is_measured_on_all_at_its_end_only(
        run, phase, monkeypatch):
    """Between, wordings that were not trained and what sets the threshold are read; what people
    write, the typos of the test and nonsense are read once, by the final evaluation."""
    taught, measured = [], []
    drawing = data.Questions.drawing

    def watched(questions, asked, *how):
        taught.extend(questions.rows[i].phrasing for i in asked.tolist())
        return drawing(questions, asked, *how)

    def figure(run, questions, *rest):
        measured.append({row.phrasing for row in questions.rows})
        return {}

    def think_all(run, tokens):
        return train.tjepa.Thought(*torch.zeros(3, len(tokens), 16))
    monkeypatch.setattr(data.Questions, "drawing", watched)
    monkeypatch.setattr(evaluate, "think_all", think_all)
    monkeypatch.setattr(evaluate, "recall", figure)
    monkeypatch.setattr(evaluate, "exact_match", figure)
    loss_at, measure = train.PHASE_OF[phase](run)
    if phase == "speak":
        lessons = train.make_lessons(run)
        asked = run.questions.where("DEC", "NEW", phrasing="trained")
        assert lessons.n_questions == len(asked)
    else:
        assert set(taught) == {"trained"}
    measure(False)
    measure(True)
    n = len(measured) // 2
    assert measured[:n] == [BETWEEN] * n
    assert measured[n:] == [{"trained"} | BETWEEN | AT_THE_END] * n


# -- facts that are added --------------------------------------------------------------------------

FRAMES = {
    "capital": ["What is the capital of {s}?"],
    "painter": ["who created {s}", "Whose is {s}?"],
    "inventor": ["who created {s}"]}


@pytest.mark.parametrize("question, found", [
    ("what is the capital of lorvania", ("capital", "lorvania")),
    ("What is the capital of Lorvania?!", ("capital", "Lorvania")),
    ("Whose is Harbour in Fog?", ("painter", "Harbour in Fog")),
    ("Who created braille?", ("inventor", "braille")),      # it is known as an invention
    ("Who created Linux?", None),                           # a picture or an invention?
    ("Why is the sky blue?", None)])
def test_a_known_wording_is_found_without_regard_to_capitals_and_marks(question, found):
    assert added.find_frame(question, FRAMES, {("inventor", "braille")}) == found


def test_two_answers_to_questions_that_are_encoded_alike_are_refused(tmp_path):
    tokenizer = data.Tokenizer(data.train_bpe("What does Pat mean? " * 20, 300))
    path = tmp_path / "qa.tsv"
    path.write_text(
        "What does Pat mean?\ta touch\nWhat else?\tnothing\nwhat does pat mean\ta test\n")
    with pytest.raises(ValueError, match="line 3.*line 1.*keep one"):
        data.read_fitting(path, tokenizer, 64, 24)
    path.write_text("What does Pat mean?\ta touch\nwhat does pat mean\ta touch\n")
    assert len(data.read_fitting(path, tokenizer, 64, 24)) == 2


def test_an_added_question_in_capitals_is_as_long_as_it_is_encoded(corpus):
    """Its capitals are many tokens, which are never read."""
    asked = "WHICH COMPOSER OF THE ORCHESTRA WROTE THE MUSIC WHICH PEOPLE PLAY ON THE RADIO"
    tokenizer = corpus.tokenizer
    size = len(tokenizer.encode_question(asked)) + 2
    assert len(tokenizer.encode(f" {asked}")) > size
    cfg = train.Config(block_size=size)
    few = corpus._replace(qa=[data.QA("DEC", "trained", "capital", "Peru", "Peru capital", "Lima")])
    questions = train.open_questions(cfg, few, None, False, [[asked, "Ravel", 1]], "cpu")
    assert [row.question for row in questions.rows if row.split == "NEW"] == [asked]
