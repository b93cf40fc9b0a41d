"""What can be relied on when text becomes tokens, one property a test."""

import base64
import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError

import pytest
import regex
import requests
import tiktoken

from data.shakespeare import prepare as shakespeare
from data import tokenizer as tokenizer_module
from data.tokenizer import GPT2_FILES, GPT2_PATTERN, PATTERN, Tokenizer, train_bpe
from data.wordnet import prepare as wordnet

TEXT = "The whale's tail hit the boat. The boat sank, the whale swam off in 1851.\n\n" * 20
RANKS = train_bpe(TEXT, 280)
TOKENIZER = Tokenizer(RANKS)


@pytest.mark.parametrize("text", [
    "", " ", "the whale", "naïve café", "日本語", "हिन्दी", "🐳👩‍🚀", "e\u0301",
    "\0\r\n\t \u2028", "a  \n\n  b", "\ufffd",
])
def test_any_text_comes_back(text):
    # bytes are tokens, so what was never seen in training can be written down too
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_random_characters_come_back():
    rng = random.Random(0)
    # surrogates are no characters
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for _ in range(500):
        text = "".join(rng.choices(characters, k=8))
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_batch_is_encoded_like_its_texts():
    texts = ["the boat", "", "sank"]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_a_long_run_of_blanks_is_no_trap():
    # a pattern that steps back blank by blank overflows the stack of the matcher
    text = "a" + " " * 1_000_000 + "b"
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_training_cuts_a_word_as_tiktoken_does():
    # each merge that training made is found again by encode: the two agree on what a rank means
    for token in RANKS[256:]:
        assert TOKENIZER.encode(token.decode()) == [RANKS.index(token)]


def test_specials_have_ids_of_their_own():
    specials = [TOKENIZER.pad, TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.mask]
    assert specials == [280, 281, 282, 283] and TOKENIZER.vocab_size == 284
    ids = [TOKENIZER.bos, *TOKENIZER.encode("the boat"), TOKENIZER.eos, TOKENIZER.pad]
    assert TOKENIZER.decode(ids) == "the boat"


def test_no_text_can_inject_a_special():
    text = "<|endoftext|> <|pad|> <pad> [PAD] [BOS] <s> </s> [MASK] <mask> pad bos eos mask"
    ids = TOKENIZER.encode(text)
    assert max(ids) < TOKENIZER.pad and TOKENIZER.decode(ids) == text


def test_no_token_crosses_a_word():
    # "the cat" is the most frequent thing there is, and still no token
    ranks = train_bpe("the cat, " * 100 + "12345\n" * 100, 2048)
    assert b" cat" in ranks
    assert all(len(regex.findall(PATTERN, rank.decode())) == 1 for rank in ranks[256:])


def test_the_pattern_loses_nothing_and_cuts_where_it_should():
    text = " it's 12345\n\n  so,\tno"
    pieces = [" it", "'s", " 123", "45", "\n\n", " ", " so", ",", "\t", "no"]
    assert regex.findall(PATTERN, text) == pieces


def test_training_depends_on_counts_alone():
    # equal counts are told apart by their bytes, not by which word came first
    words = [word + "\n" for word in TEXT.split()]
    random.Random(0).shuffle(words)
    assert train_bpe("".join(words), 270) == train_bpe("".join(sorted(words)), 270)


def test_the_most_frequent_pair_comes_first_and_ties_go_by_bytes():
    assert train_bpe("yz\nyz\nab\nab\nxy\nxy\nxy", 300)[256:] == [b"xy", b"ab", b"yz"]


def test_too_small_a_text_stops_early():
    # one pair occurs twice; pairs that occur once teach nothing
    assert train_bpe("ab\nab\ncd", 1000)[256:] == [b"ab"]


@pytest.mark.parametrize("text, vocab_size, says", [
    ("", 300, "empty"), ("abc", 255, "at least 256"),
])
def test_training_refuses_what_cannot_work(text, vocab_size, says):
    with pytest.raises(ValueError, match=says):
        train_bpe(text, vocab_size)


@pytest.mark.parametrize("ranks", [RANKS[1:], RANKS + RANKS[-1:]])
def test_damaged_ranks_are_refused(ranks):
    with pytest.raises(ValueError, match="256 single bytes"):
        Tokenizer(ranks)


def test_state_rebuilds_the_tokenizer():
    again = Tokenizer.from_state(TOKENIZER.state())
    assert (again.ranks, again.pattern) == (TOKENIZER.ranks, TOKENIZER.pattern)
    assert again.encode(TEXT) == TOKENIZER.encode(TEXT)


def encoded(*ranks):
    """Ranks as a state stores them."""
    return [base64.b64encode(rank).decode() for rank in ranks]


BYTES = encoded(*(bytes([byte]) for byte in range(256)))


@pytest.mark.parametrize("state, says", [
    (None, "dict"), ([], "dict"), ({}, "dict"), (dict(ranks=BYTES), "dict"),
    (dict(pattern=PATTERN, ranks=BYTES, specials=4), "dict"),
    (dict(pattern="", ranks=BYTES), "pattern"), (dict(pattern=None, ranks=BYTES), "pattern"),
    (dict(pattern=[PATTERN], ranks=BYTES), "pattern"),
    (dict(pattern=r"(a*)*b", ranks=BYTES), "pattern"),
    (dict(pattern=PATTERN, ranks=None), "list"), (dict(pattern=PATTERN, ranks=BYTES[1:]), "list"),
    (dict(pattern=PATTERN, ranks=dict.fromkeys(BYTES)), "list"),
    (dict(pattern=PATTERN, ranks=BYTES + ["YWI="] * 2 ** 16), "65,532"),
    (dict(pattern=PATTERN, ranks=BYTES + [7]), "rank 256"),
    (dict(pattern=PATTERN, ranks=BYTES + [""]), "rank 256"),
    (dict(pattern=PATTERN, ranks=BYTES + ["a\u00e9=="]), "rank 256"),
    (dict(pattern=PATTERN, ranks=BYTES + ["a!=="]), "rank 256"),
    (dict(pattern=PATTERN, ranks=BYTES + ["===="]), "rank 256"),
    (dict(pattern=PATTERN, ranks=BYTES + ["YWI=", "YWI="]), "twice"),
    (dict(pattern=PATTERN, ranks=["YWI=", *BYTES]), "single bytes"),
    (dict(pattern=PATTERN, ranks=[*BYTES[1:], BYTES[1]]), "single bytes"),
], ids=range(21))
def test_a_state_of_a_stranger_is_refused_in_one_sentence(state, says):
    with pytest.raises(ValueError, match=says) as error:
        Tokenizer.from_state(state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN])
def test_states_of_our_own_are_read_whatever_the_order_of_their_bytes(pattern):
    # GPT-2 numbers the bytes in another order
    tokenizer = Tokenizer(RANKS[255::-1] + RANKS[256:], pattern)
    again = Tokenizer.from_state(tokenizer.state())
    assert again.ranks == tokenizer.ranks and again.encode(TEXT) == tokenizer.encode(TEXT)


def plain_bpe(text, vocab_size):
    """What `train_bpe` computes, as one would explain it: count all pairs anew for each merge."""
    pieces = tokenizer_module.split(text, PATTERN)
    words = [[bytes([byte]) for byte in piece.encode()] for piece in pieces]
    ranks = [bytes([byte]) for byte in range(256)]
    while len(ranks) < vocab_size:
        count = {}
        for word in words:
            for left, right in zip(word, word[1:]):
                count[left + right] = count.get(left + right, 0) + 1
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if best is None or count[best] < 2:
            break
        ranks.append(best)
        for i, word in enumerate(words):
            merged = []
            for token in word:
                if merged and merged[-1] + token == best:
                    merged[-1] = best
                else:
                    merged.append(token)
            words[i] = merged
    return ranks


def test_training_is_the_plain_algorithm_made_fast():
    rng = random.Random(0)
    for alphabet in ("ab", "aab ", "ab \n", "a\u00e9\u65e5 ", "ab'12. "):
        for _ in range(30):
            text = "".join(rng.choices(alphabet, k=rng.choice([5, 40, 200, 600])))
            assert train_bpe(text, 290) == plain_bpe(text, 290)


def test_joining_says_where():
    a, b, c = b"a", b"b", b"c"
    assert tokenizer_module.merge([a, b, c, a, b], a, b) == ([b"ab", c, b"ab"], [0, 2])
    assert tokenizer_module.merge([a, a, a], a, a) == ([b"aa", a], [0])
    assert tokenizer_module.merge([a, c, a], a, b) == ([a, c, a], [])


@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN])
@pytest.mark.parametrize("text", [
    "ACGT" * 1000, "\u65e5\u672c" * 500, "x" + "\u0301" * 1000, "-" * 1000, "\n" * 1000, "7" * 1000,
    " " * 1000, "\t" * 1000, "a " + " \t" * 500 + "\u3000" * 300 + "b", "'s" * 500])
def test_a_long_piece_is_cut_and_comes_back(text, pattern):
    tokenizer = Tokenizer(train_bpe(text + TEXT, 300), pattern)
    pieces = list(tokenizer_module.split(text, pattern))
    assert max(map(len, pieces)) <= 256 and "".join(pieces) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == [i for piece in pieces for i in tokenizer.encode(piece)]
    one_by_one = [tokenizer.encode("the boat"), tokenizer.encode(text)]
    assert tokenizer.encode_batch(["the boat", text]) == one_by_one


@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN])
def test_ordinary_words_near_a_long_piece_keep_their_tokens(pattern, monkeypatch):
    # a text with a long piece is encoded piece by piece: where nothing is cut, that must change
    # nothing
    rng = random.Random(0)
    tokenizer = Tokenizer(RANKS, pattern)
    characters = "ab '12.\n\ts\u00e9\u65e5\u3000\r\u2028-the"
    texts = ["".join(rng.choices(characters, k=20)) for _ in range(2000)]
    whole = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(tokenizer_module, "LONG_RUN", regex.compile(r"\S|\s"))
    assert [tokenizer.encode(text) for text in texts] == whole


def test_a_genome_on_one_line_takes_seconds():
    text = "".join(random.Random(0).choices("ACGT", k=100_000))
    begun = time.process_time()
    tokenizer = Tokenizer(train_bpe(text, 1000))
    ids = tokenizer.encode(text)
    assert time.process_time() - begun < 5 and tokenizer.decode(ids) == text


@pytest.mark.parametrize("token, starts", [
    (" the", True), ("\n", True), (".", True), ("a", False), ("7", False), ("ль", False),
])
def test_word_start_says_where_a_word_begins(token, starts):
    tokenizer = Tokenizer(RANKS[:256] + [token.encode()] * (len(token.encode()) > 1))
    assert tokenizer.word_start[tokenizer.ranks.index(token.encode())] is starts


def test_word_start_covers_pieces_of_characters_and_specials():
    assert len(TOKENIZER.word_start) == TOKENIZER.vocab_size and all(TOKENIZER.word_start[-4:])
    # half a letter cannot begin a word: "caf" + two bytes is one word; a Chinese character can
    begins = [byte for byte in range(128, 256) if TOKENIZER.word_start[byte]]
    first_bytes = {chr(c).encode()[0] for c in range(0x3000, 0xA000)}
    assert begins == list(range(0xE3, 0xEA)) == sorted(first_bytes)


def test_word_start_groups_whole_words():
    words = []
    for i in TOKENIZER.encode(" naïve whales sank,  the 1851 boat"):
        if TOKENIZER.word_start[i]:
            words.append(b"")
        words[-1] += TOKENIZER.ranks[i]
    whole = [" naïve", " whales", " sank", ",", " ", " the", " 1851", " boat"]
    assert [word.decode() for word in words] == whole


def test_gpt2_offline_says_what_to_put_where(monkeypatch, tmp_path):
    # to ask without a timeout is a TypeError here and a program that hangs elsewhere
    def offline(*args, timeout, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "head", offline)
    monkeypatch.setattr(requests, "get", offline)
    says = "vocab.bpe as 6d1cbeee.*encoder.json as 6c7ea1a7.*TIKTOKEN_CACHE_DIR"
    with pytest.raises(ValueError, match=says) as error:
        Tokenizer.gpt2()
    assert "\n" not in str(error.value)


def test_gpt2_with_its_files_in_place_asks_no_network_and_has_its_pattern(monkeypatch, tmp_path):
    small = tiktoken.Encoding(
        "small", pat_str=GPT2_PATTERN,
        mergeable_ranks={rank: i for i, rank in enumerate(RANKS)},
        special_tokens={"<|endoftext|>": len(RANKS)})
    for url in GPT2_FILES:
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).touch()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "head", None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    tokenizer = Tokenizer.gpt2()
    assert (tokenizer.ranks, tokenizer.pattern, tokenizer.pad) == (RANKS, GPT2_PATTERN, len(RANKS))


def run(program, monkeypatch, tmp_path, *flags):
    """main() of a prepare program, writing to tmp_path instead of the repository."""
    monkeypatch.setattr(program, "OUT", tmp_path / "input.txt")
    monkeypatch.setattr(sys, "argv", ["prepare.py", *flags])
    program.main()
    return (tmp_path / "input.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("program", [shakespeare, wordnet])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\xfa"])
def test_prepare_answers_a_bad_input_in_one_line(program, content, monkeypatch, tmp_path, capsys):
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run(program, monkeypatch, tmp_path, f"--input={tmp_path / 'bad.txt'}")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "bad.txt" in said
    assert not (tmp_path / "input.txt").exists()


def test_prepare_names_the_flag_when_there_is_no_source(monkeypatch, tmp_path, capsys):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(shakespeare, "urlopen", offline)
    monkeypatch.setattr(wordnet, "DICT", tmp_path)
    for program in (shakespeare, wordnet):
        with pytest.raises(SystemExit) as stop:
            run(program, monkeypatch, tmp_path)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and "--input=FILE" in said


def test_prepare_runs_as_a_program():
    command = [sys.executable, Path(wordnet.__file__), "--input=no/such/file"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_shakespeare_is_copied_as_it_is(monkeypatch, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text("First Citizen:\nSpeak.\n\nAll:\nSpeak, speak.\n")
    assert run(shakespeare, monkeypatch, tmp_path, f"--input={copy}") == copy.read_text()


def test_wordnet_comes_in_documents_of_eight_glosses(monkeypatch, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text("".join(f"word {i}: a thing.\n" for i in range(20)))
    documents = run(wordnet, monkeypatch, tmp_path, f"--input={copy}").split("\n\n")
    assert [len(document.splitlines()) for document in documents] == [8, 8, 4]


def test_wordnet_reads_the_dictionary_itself(monkeypatch, tmp_path):
    line = '00001740 03 n 01 sea_dog(p) 0 000 | an old sailor; "he was a sea dog"  '
    for kind in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{kind}").write_text(f"  1 licence\n{line}\n")
    monkeypatch.setattr(wordnet, "DICT", tmp_path)
    written = run(wordnet, monkeypatch, tmp_path)
    assert written.splitlines() == ["sea dog: an old sailor. he was a sea dog."] * 4
