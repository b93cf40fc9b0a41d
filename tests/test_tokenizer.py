"""What can be relied on when text becomes tokens, one property a test."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import regex
import requests
import tiktoken

from data.shakespeare import prepare as shakespeare
from data.tokenizer import GPT2_FILES, PATTERN, Tokenizer, train_bpe
from data.wordnet import prepare as wordnet

TEXT = "The whale's tail hit the boat. The boat sank, the whale swam off in 1851.\n\n" * 20
RANKS = train_bpe(TEXT, 280)
TOKENIZER = Tokenizer(RANKS)


@pytest.mark.parametrize("text", [
    "", " ", "the whale", "naïve café", "日本語", "हिन्दी", "🐳👩‍🚀", "e\u0301", "\0\r\n\t \u2028", "a  \n\n  b", "\ufffd",
])
def test_any_text_comes_back(text):
    # bytes are tokens, so what was never seen in training can be written down too
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_random_characters_come_back():
    rng = random.Random(0)
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]  # surrogates are no characters
    for _ in range(500):
        text = "".join(rng.choices(characters, k=8))
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_batch_is_encoded_like_its_texts():
    assert TOKENIZER.encode_batch(["the boat", "", "sank"]) == [TOKENIZER.encode(text) for text in ("the boat", "", "sank")]


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
    assert TOKENIZER.decode([TOKENIZER.bos, *TOKENIZER.encode("the boat"), TOKENIZER.eos, TOKENIZER.pad]) == "the boat"


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
    assert regex.findall(PATTERN, text) == [" it", "'s", " 123", "45", "\n\n", " ", " so", ",", "\t", "no"]


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


@pytest.mark.parametrize("text, vocab_size, says", [("", 300, "empty"), ("abc", 255, "at least 256")])
def test_training_refuses_what_cannot_work(text, vocab_size, says):
    with pytest.raises(ValueError, match=says):
        train_bpe(text, vocab_size)


@pytest.mark.parametrize("ranks", [RANKS[1:], RANKS + RANKS[-1:]])
def test_damaged_ranks_are_refused(ranks):
    with pytest.raises(ValueError, match="256 single bytes"):
        Tokenizer(ranks)


def test_state_rebuilds_the_tokenizer():
    again = Tokenizer.from_state(TOKENIZER.state())
    assert (again.ranks, again.pattern, again.encode(TEXT)) == (TOKENIZER.ranks, TOKENIZER.pattern, TOKENIZER.encode(TEXT))


@pytest.mark.parametrize("token, starts", [
    (" the", True), ("\n", True), (".", True), ("a", False), ("7", False), ("ль", False),
])
def test_word_start_says_where_a_word_begins(token, starts):
    tokenizer = Tokenizer(RANKS[:256] + [token.encode()] * (len(token.encode()) > 1))
    assert tokenizer.word_start[tokenizer.ranks.index(token.encode())] is starts


def test_word_start_covers_pieces_of_characters_and_specials():
    assert len(TOKENIZER.word_start) == TOKENIZER.vocab_size and all(TOKENIZER.word_start[-4:])
    assert not any(TOKENIZER.word_start[128:256])  # half a letter cannot begin a word: "caf" + two bytes is one word


def test_word_start_groups_whole_words():
    words = []
    for i in TOKENIZER.encode(" naïve whales sank,  the 1851 boat"):
        if TOKENIZER.word_start[i]:
            words.append(b"")
        words[-1] += TOKENIZER.ranks[i]
    assert [word.decode() for word in words] == [" naïve", " whales", " sank", ",", " ", " the", " 1851", " boat"]


def test_gpt2_offline_says_what_to_put_where(monkeypatch, tmp_path):
    def offline(*args, timeout, **kwargs):  # to ask without a timeout is a TypeError here and a program that hangs elsewhere
        raise requests.ConnectionError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "head", offline)
    monkeypatch.setattr(requests, "get", offline)
    with pytest.raises(ValueError, match="vocab.bpe as 6d1cbeee.*encoder.json as 6c7ea1a7.*TIKTOKEN_CACHE_DIR") as error:
        Tokenizer.gpt2()
    assert "\n" not in str(error.value)


def test_gpt2_with_its_files_in_place_asks_no_network_and_keeps_its_pattern(monkeypatch, tmp_path):
    small = tiktoken.Encoding("small", pat_str=r"\S+|\s+", mergeable_ranks={rank: i for i, rank in enumerate(RANKS)},
                              special_tokens={"<|endoftext|>": len(RANKS)})
    for url in GPT2_FILES:
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).touch()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "head", None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    tokenizer = Tokenizer.gpt2()
    assert (tokenizer.ranks, tokenizer.pattern, tokenizer.pad) == (RANKS, r"\S+|\s+", len(RANKS))


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
    done = subprocess.run([sys.executable, Path(wordnet.__file__), "--input=no/such/file"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_shakespeare_is_copied_as_it_is(monkeypatch, tmp_path):
    (tmp_path / "copy.txt").write_text("First Citizen:\nSpeak.\n\nAll:\nSpeak, speak.\n")
    assert run(shakespeare, monkeypatch, tmp_path, f"--input={tmp_path / 'copy.txt'}") == (tmp_path / "copy.txt").read_text()


def test_wordnet_comes_in_documents_of_eight_glosses(monkeypatch, tmp_path):
    (tmp_path / "copy.txt").write_text("".join(f"word {i}: a thing.\n" for i in range(20)))
    documents = run(wordnet, monkeypatch, tmp_path, f"--input={tmp_path / 'copy.txt'}").split("\n\n")
    assert [len(document.splitlines()) for document in documents] == [8, 8, 4]


def test_wordnet_reads_the_dictionary_itself(monkeypatch, tmp_path):
    line = '00001740 03 n 01 sea_dog(p) 0 000 | an old sailor; "he was a sea dog"  '
    for kind in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{kind}").write_text(f"  1 licence\n{line}\n")
    monkeypatch.setattr(wordnet, "DICT", tmp_path)
    assert run(wordnet, monkeypatch, tmp_path).splitlines() == ["sea dog: an old sailor. he was a sea dog."] * 4
