"""
Questions as people type them: noise for training, and other noise for tests.

    trained     What is the capital of France?
    as_typed    please capital of Frnace        what phase 2 may see instead
    TESTS       What is the capital of Frajce?  what the final evaluation asks, never trained on

They share no typo. Training swaps, drops and doubles letters, or writes one from elsewhere on the
keyboard; the test presses a neighbouring key. So a figure on the test says something about
typing, and not about one function.
"""
import collections
import random
import re
import unicodedata

# What follows from a standard keyboard: the letters beside each letter of a row.
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")

# words at the beginning of a question that may be left out
LITTLE = set("a any by can could do give i idea in is know me my name of on please tell the to "
             "want what what's which who who's whose you".split())
# what people put before and behind a question
BEFORE = ("hey ", "hi, ", "hello, ", "so ", "ok, ", "well, ", "please ", "sorry, ", "quick question: ",
          "question: ", "I forgot, ", "I wonder, ", "just curious, ", "tell me please, ", "help, ",
          "for my homework: ", "one more: ", "I have to know: ", "maybe you know, ", "good morning, ")
BEHIND = (" please", " again", " exactly", " actually", " now", " then", " though", " thanks",
          ", please", ", do you know", ", any idea", ", can you help", ", I forgot", ", help me",
          ", tell me", ", I need it for school", "? thank you", "? I don't know it", "? just curious",
          ", I can't remember")
QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")

def plain(question):
    """A question as it is encoded: straight quotes, single blanks, no mark at its end.

    Letters are composed (NFC), as in the files that are read. `Tokenizer.encode_question` chooses
    between capital and small letters.
    """
    question = " ".join(unicodedata.normalize("NFC", question).translate(QUOTES).split())
    return question.rstrip(" ?!.") or question

# -- training --------------------------------------------------------------------------------------

def as_typed(question, subject, rng):
    """A question as someone may type it: clipped or with chat around it, no quotes, with a typo.

    subject: the part of the question that is never clipped. rng: a random.Random. Capitals and a
    mark at the end are no noise, since `Tokenizer.encode_question` makes nothing of them.
    """
    if rng.random() < 0.25:
        question = clipped(question, subject, rng)
    if rng.random() < 0.4:
        question = chatty(question, rng)
    if rng.random() < 0.5:
        question = requoted(question, rng)
    if rng.random() < 0.75:
        question = misspelled(question, rng)
    return question

def clipped(question, subject, rng):
    """Without some of the little words before the subject: what is asked for stays."""
    before, found, after = question.partition(as_written(subject, question))
    words = before.split(" ")
    little = 0
    while little < len(words) and words[little].lower().strip(",:") in LITTLE:
        little += 1
    words = words[rng.randrange(little + 1):]
    return " ".join(words) + found + after

def chatty(question, rng):
    """With some words before it, behind it, or both."""
    where = rng.choice(("before", "behind", "both"))
    if where != "before":
        question = question.rstrip("?.") + rng.choice(BEHIND) + rng.choice(("", "?"))
    if where != "behind":
        question = rng.choice(BEFORE) + question
    return question

def as_written(subject, question):
    """The subject as a question has it: with a capital letter at its beginning."""
    return subject if subject in question else subject[:1].upper() + subject[1:]

def requoted(question, rng):
    """Without its quotation marks, or with double ones; half of the time also without apostrophes.
    """
    mark = rng.choice(("", "", '"'))
    if rng.random() < 0.5:
        question = re.sub(r"(?<=\w)'(?=\w)", "", question)
    return re.sub(r"(?<!\w)'(.*?)'(?!\w)", lambda match: mark + match[1] + mark, question)

def misspelled(text, rng):
    """With one letter swapped with the next, left out, doubled, or from elsewhere on the keyboard.
    """
    places = [i for i in range(len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    first, second = text[i], text[i + 1]
    elsewhere = rng.choice([key for key in "".join(ROWS) if key not in beside(first)])
    middle = rng.choice((second + first, second, first + second * 2, elsewhere + second))
    return text[:i] + middle + text[i + 2:]

def beside(letter):
    """A letter and the keys at its left and right, in lower case."""
    row = next((row for row in ROWS if letter.lower() in row), letter.lower())
    at = row.index(letter.lower())
    return row[max(0, at - 1):at + 2]

def nonsense(question, subject, rng):
    """Some words of a question, without its subject, in another order; and random letters."""
    words = question.replace(subject, "").split()
    words = rng.sample(words, rng.randrange(len(words) + 1))
    for _ in range(rng.randrange(0 if words else 1, 4)):
        word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(1, 9)))
        words.insert(rng.randrange(len(words) + 1), word)
    return " ".join(words)

def made_up(subject, other, rng):
    """A subject that nothing is known about: the begin of one, new letters, the end of another."""
    begin = subject[:rng.randrange(1, len(subject) + 1)]
    end = other[rng.randrange(len(other)):]
    letters = (rng.choice("aeiou" if i % 2 else "bdfgklmnprstvz") for i in range(8))
    return begin + "".join(letters)[:rng.randrange(2, 9)] + end

def subjects_of(questions):
    """What each question is about: its rarest word among all questions, the longest of several.

    For pairs of one's own, where only the question is known. A question of one word is about it.
    """
    words = [re.findall(r"\w+", question) for question in questions]
    counts = collections.Counter(word for found in words for word in set(found))
    return [min(found, key=lambda word: (counts[word], -len(word)), default=question)
            for found, question in zip(words, questions)]

# -- tests -----------------------------------------------------------------------------------------

def neighbour_typo(question):
    """One letter replaced by a neighbouring key: a function of the question alone."""
    rng = random.Random(question)
    places = [i for i, letter in enumerate(question) if letter.lower() in "".join(ROWS)]
    i = rng.choice(places)
    wrong = rng.choice(beside(question[i]).replace(question[i].lower(), ""))
    return question[:i] + (wrong.upper() if question[i].isupper() else wrong) + question[i + 1:]

TESTS = dict(
    lower=str.lower,
    no_mark=lambda question: question.rstrip("?."),
    typo=neighbour_typo,
)
