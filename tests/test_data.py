"""What can be relied on when files become batches: whatever is wrong with a file is one line."""
import ast
import io
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from data import inputs
from data.facts import prepare
from data.tokenizer import Tokenizer, train_bpe
from tests.toy import FLAGS

TOKENIZER = Tokenizer(train_bpe("Who wrote it? I did. " * 20, 300))


def pairs(path, content):
    """(question, answer) of each pair of a file with that content; not the copies with noise."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = data.read_qa(path, TOKENIZER, 64, 64)
    return [(row.question, row.answer) for row in rows if row.phrasing == "trained"]


def one_line(error):
    """The message of an error, which must be one line that a terminal shows as it is."""
    said = str(error.value)
    assert said.isprintable()
    return said


# -- the prepared facts ------------------------------------------------------------------------

@pytest.fixture
def facts(tmp_path, monkeypatch):
    """data/facts as in a fresh clone: nothing is prepared."""
    folder = tmp_path / "facts"
    folder.mkdir()
    for name in prepare.SOURCES:
        shutil.copy(Path(prepare.__file__).parent / name, folder)
    # a few facts are enough here, and written at once
    few = [line for line in prepare.read_tsv("facts.tsv") if line[1] == "capital"][:20]
    (folder / "facts.tsv").write_text("".join("\t".join(row) + "\n" for row in few))
    monkeypatch.setattr(prepare, "HERE", folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_runs_with_different_flags_have_folders_of_their_own(facts):
    small = prepare.prepare(vocab_size=300)
    before = contents(small)
    large = prepare.prepare(vocab_size=320)
    assert small != large and contents(small) == before
    assert prepare.prepare(vocab_size=300) == small


def start(folder, vocab_size):
    """A process that prepares the facts in a folder and prints where."""
    code = ("import sys; from pathlib import Path; from data.facts import prepare; "
            "prepare.HERE = Path(sys.argv[1]); "
            "print(prepare.prepare(vocab_size=int(sys.argv[2])))")
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(vocab_size)],
                            stdout=subprocess.PIPE, text=True)


def test_processes_that_prepare_at_once_each_read_their_own_files(facts):
    running = [start(facts, vocab_size) for vocab_size in (300, 300, 320)]
    folders = [process.communicate()[0].splitlines()[-1] for process in running]
    assert folders[0] == folders[1] != folders[2]
    for folder, size in zip(folders, (300, 300, 320)):
        state = prepare.json.loads((Path(folder) / "tokenizer.json").read_text())
        assert len(state["ranks"]) == size - 4
    assert len([path for path in facts.iterdir() if path.is_dir()]) == 2     # nothing half-made


def test_who_comes_second_uses_the_folder_of_the_first(facts, monkeypatch):
    """Another process renames its folder between this one's look and its own renaming."""
    real = prepare.publish

    def late(partial, out):
        shutil.copytree(partial, out)
        real(partial, out)
    monkeypatch.setattr(prepare, "publish", late)
    out = prepare.prepare(vocab_size=300)
    assert prepare.prepare(vocab_size=300) == out
    assert [path for path in facts.iterdir() if path.is_dir()] == [out]


@pytest.mark.parametrize("name", [*prepare.FILES, "meta.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_file_is_noticed_and_written_anew(facts, name, harm, capsys):
    out = prepare.prepare(vocab_size=270)
    before = contents(out)
    content = bytearray(before[name])
    content[len(content) // 2] ^= 1
    if harm == "remove":
        (out / name).unlink()
    else:
        (out / name).write_bytes(content if harm == "flip" else content[:-1])
    capsys.readouterr()
    assert prepare.prepare(vocab_size=270) == out and contents(out) == before
    assert "is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"files": 3}', '{"files": {}}', "{"])
def test_a_meta_file_that_is_something_else_is_damage(facts, content):
    out = prepare.prepare(vocab_size=270)
    before = contents(out)
    (out / "meta.json").write_text(content)
    assert prepare.prepare(vocab_size=270) == out and contents(out) == before


def test_a_writing_that_was_cut_short_leaves_nothing(facts, monkeypatch):
    """The error names data/facts: no other --out would help."""
    real = prepare.write

    def cut(path, content):
        if path.name == "val.bin":
            raise OSError(28, "No space left on device")
        real(path, content)
    monkeypatch.setattr(prepare, "write", cut)
    with pytest.raises(ValueError, match="data/facts.*No space left") as error:
        prepare.prepare(vocab_size=300)
    assert "--out" not in one_line(error)
    assert not [path for path in facts.iterdir() if path.is_dir()]
    monkeypatch.setattr(prepare, "write", real)
    assert contents(prepare.prepare(vocab_size=300)).keys() == {*prepare.FILES, "meta.json"}


def test_every_source_and_every_flag_has_a_part_in_the_name(facts, tmp_path, monkeypatch):
    flags = dict(facts="tiny", vocab_size=300, block_size=64, seed=0, tokenizer="bpe")
    known = [prepare.fingerprint(**flags)]
    for change in (dict(facts="all"), dict(vocab_size=301), dict(block_size=65), dict(seed=1),
                   dict(tokenizer="gpt2")):
        known.append(prepare.fingerprint(**flags | change))
    code = [Path(shutil.copy(path, tmp_path)) for path in prepare.CODE]
    monkeypatch.setattr(prepare, "CODE", code)
    assert prepare.fingerprint(**flags) == known[0]         # the place does not count
    for path in [facts / name for name in prepare.SOURCES] + code:
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        known.append(prepare.fingerprint(**flags))
    assert all(a != b for i, a in enumerate(known) for b in known[:i])


def test_the_fingerprint_is_of_the_content(facts):
    """A checkpoint goes with its corpus, wherever the folder is and whatever it is called."""
    cfg = train.Config(vocab_size=300)
    before = data.load(cfg).fingerprint
    source = facts / "prepare.py"
    source.write_text(source.read_text(encoding="utf-8") + "# a comment\n", encoding="utf-8")
    moved = data.load(cfg)
    assert len(list(facts.glob("tiny-*"))) == 2 and moved.fingerprint == before
    assert data.load(train.Config(vocab_size=310)).fingerprint != before


def test_the_tokenizer_sees_trained_wordings_of_what_exists_alone(facts, monkeypatch):
    """A held-out wording or an invented name that it saw would be cut into fewer tokens."""
    seen = []

    def watched(text, n):
        seen.append(text)
        return train_bpe(text, n)
    monkeypatch.setattr(prepare, "train_bpe", watched)
    folder = prepare.prepare(vocab_size=300)
    sample, = seen
    questions = data.read_rows(folder / "qa.tsv", data.QA)
    may_see = {row.question for row in questions
               if row.phrasing == "trained" and row.split != "NEVER"}
    others = {row.question for row in questions} - may_see
    invented = {row.question for row in questions
                if row.phrasing == "trained" and row.split == "NEVER"}
    held_out = [row.statement.replace("{a}", row.answer)
                for row in data.read_rows(folder / "cloze.tsv", data.Cloze)]
    lines = sample.split("\n")
    assert may_see <= set(lines) and invented and not others & set(lines)
    assert held_out and not any(statement in sample for statement in held_out)


def test_git_ignores_what_is_prepared():
    names = ["data/facts/tiny-0123/meta.json", "data/facts/all-0123.4567.part/train.bin"]
    root = Path(prepare.__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("this copy of the project is not a git repository")
    done = subprocess.run(["git", "check-ignore", *names], cwd=root, capture_output=True, text=True)
    assert done.stdout.splitlines() == names


@pytest.mark.parametrize("flags, says", [
    (dict(facts="some"), "--facts"), (dict(vocab_size=3), "--vocab_size"),
    (dict(vocab_size=70_000), "--vocab_size"), (dict(block_size=0), "--block_size")])
def test_flags_that_make_no_world_are_refused(facts, flags, says):
    with pytest.raises(ValueError, match=says):
        prepare.prepare(**flags)


# -- inputs that never end ---------------------------------------------------------------------

def readers(path):
    """Each of the three files that a student brings."""
    yield "--data", lambda: data.read_text(path)
    yield "--qa", lambda: data.read_qa(path, TOKENIZER, 64, 64)
    yield "--teacher", lambda: data.read_vectors(path, ["a"])


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "missing"])
def test_only_regular_files_are_read(tmp_path, kind, number):
    path = dict(zero=Path("/dev/zero"), folder=tmp_path).get(kind, tmp_path / "it")
    if kind == "fifo":
        os.mkfifo(path)
    flag, read = list(readers(path))[number]
    with pytest.raises(ValueError, match=f"{flag}={path}.*give ") as error:
        read()
    one_line(error)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_file_of_terabytes_is_refused_unread(tmp_path, number):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(2 ** 40)      # a hole: it takes no room on the disk
    flag, read = list(readers(path))[number]
    with pytest.raises(ValueError, match=f"{flag}=.*1,099,511,627,776 bytes"):
        read()


def npz(path, **members):
    """A .npz of the given bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def npy(array=None, header=None):
    """A .npy file as bytes: of an array, or nothing but a header."""
    stream = io.BytesIO()
    if header is None:
        np.save(stream, array)
    else:
        np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def test_a_header_that_claims_terabytes_is_refused(tmp_path):
    huge = npy(header=dict(descr="<f4", fortran_order=False, shape=(2 ** 30, 2 ** 10)))
    npz(tmp_path / "v.npz", answers=npy(np.array(["a"])), vectors=huge)
    with pytest.raises(ValueError, match="`vectors` claims 4,398,046,511,104 bytes") as error:
        data.read_vectors(tmp_path / "v.npz", ["a"])
    one_line(error)


def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path):
    short = npy(header=dict(descr="<f4", fortran_order=False, shape=(1, 2 ** 20)))
    npz(tmp_path / "v.npz", answers=npy(np.array(["a"])), vectors=short)
    with pytest.raises(ValueError, match="`vectors` claims 4,194,304 bytes and has 128"):
        data.read_vectors(tmp_path / "v.npz", ["a"])


def test_a_zip_that_expands_without_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "VECTORS_LIMIT", 2 ** 20)
    content = npy(np.zeros((1, 2 ** 20), dtype=np.float32))
    npz(tmp_path / "v.npz", answers=npy(np.array(["a"])), vectors=content)
    assert (tmp_path / "v.npz").stat().st_size < 2 ** 20
    with pytest.raises(ValueError, match="`vectors` claims 4,194,432 bytes"):
        data.read_vectors(tmp_path / "v.npz", ["a"])


@pytest.mark.parametrize("content", [
    b"", b"PK\x03\x04", b"\x93NUMPY", npy(np.zeros(3)), b"plain text"])
def test_vectors_that_are_no_npz_are_refused(tmp_path, content):
    (tmp_path / "v.npz").write_bytes(content)
    with pytest.raises(ValueError, match="v.npz.*give a .npz") as error:
        data.read_vectors(tmp_path / "v.npz", ["a"])
    one_line(error)


@pytest.mark.parametrize("answers, vectors, says", [
    (["a", "a"], np.ones((2, 3)), "twice"), ([["a"]], np.ones((1, 3)), "one row"),
    ([1], np.ones((1, 3)), "strings"), (["a"], np.full((1, 3), 1e300), "not finite"),
    (["b\x1b[2J"], np.full((1, 3), np.nan), "not finite"), (["a"], np.array([["x"]]), "numbers"),
    (np.array(["a", None]), np.ones((2, 3)), "give a .npz")])
def test_vectors_that_do_not_fit_are_refused(tmp_path, answers, vectors, says):
    np.savez(tmp_path / "v.npz", answers=answers, vectors=vectors)
    with pytest.raises(ValueError, match=says) as error:
        data.read_vectors(tmp_path / "v.npz", ["a"])
    one_line(error)


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2", "<i8", "u2"])
def test_vectors_of_any_number_type_become_float32(tmp_path, dtype):
    vectors = np.arange(6).reshape(2, 3).astype(dtype)
    np.savez(tmp_path / "v.npz", answers=["caf\u00e9", "b"], vectors=vectors)
    found = data.read_vectors(tmp_path / "v.npz", ["b", "cafe\u0301"])      # NFC and NFD agree
    assert found.dtype == torch.float32 and found.tolist() == [[3, 4, 5], [0, 1, 2]]


def test_rivals_cost_memory_for_the_rows_that_are_asked():
    rows = [data.QA("DEC", "trained", "qa", str(i), f"Who {i}?", f"me {i}") for i in range(5_000)]
    questions = data.Questions(rows, TOKENIZER, 64, 64, "cpu")
    held = [value.numel() for value in vars(questions).values() if torch.is_tensor(value)]
    assert max(held) < 200_000      # a table of all by all has 25,000,000
    assert questions.rivals_of(torch.tensor([3, 4])).shape == (2, 5_000)


def test_rivals_are_the_answers_of_the_relation():
    corpus = data.load(train.Config())
    questions = data.Questions(corpus.qa[::40], corpus.tokenizer, 64, 24, "cpu")
    answers = [{row.answer for row in questions.rows
                if row.relation == asked.relation and row.split != "NEVER"}
               for asked in questions.rows]
    want = torch.tensor([[answer in each for answer in questions.answers] for each in answers])
    assert torch.equal(questions.rivals, want)
    kept = torch.arange(0, len(want), 3)
    assert torch.equal(questions.rivals_of(kept), want[kept])
    assert torch.equal(questions.pick(kept).rivals, want[kept])


# -- own questions -----------------------------------------------------------------------------

WANT = [("Who wrote it?", "I did"), ("Who read it?", "You")]


@pytest.mark.parametrize("content", [
    "Who wrote it?\tI did\nWho read it?\tYou\n",
    "Who wrote it?\tI did\r\nWho read it?\tYou\r\n",
    "Who wrote it?\tI did\rWho read it?\tYou",
    "\ufeffQuestion\tANSWER\n\n\nWho wrote it?\t I did \nWho read it?\tYou",
    "question,answer\nWho wrote it?,I did\nWho read it?,You\n",
    '"question","answer"\r\n"Who wrote it?","I did"\r\n"Who read it?","You"\r\n',
    "question;answer\nWho wrote it?;I did\nWho read it?;You\n",
    "sep=;\r\nWho wrote it?;I did\r\nWho read it?;You\r\n",
    "SEP=,\nWho wrote it?,I did\n,\nWho read it?,You\n",
    "Who wrote it?, I did\nWho read it?, \"You\"\n",
    "Who wrote it?\tI did\nWho read it?\tYou\nWho wrote it?\tI did\n",       # kept once
], ids=range(11))
def test_pairs_may_be_written_in_any_usual_way(tmp_path, content):
    assert pairs(tmp_path / "qa", content) == WANT


@pytest.mark.parametrize("content, want", [
    ('"Who, then?",me\n', ("Who, then?", "me")),
    ('"Who, then?"\tme\n', ("Who, then?", "me")),
    ('"a\tb",c\n', ("a\tb", "c")),
    ("Who, then?\tme; or you\n", ("Who, then?", "me; or you")),
    ("What is a, b?;c\nWhat is d?;e\n", ("What is a, b?", "c")),
    ('"Who ""it"" is?"\t"a\nb"\n', ('Who "it" is?', "a\nb")),
    ('Who "it" is?\t5" of it\n', ('Who "it" is?', '5" of it')),
    ("a\u2028b\x85c\td\x0be\x0cf\n", ("a\u2028b\x85c", "d\x0be\x0cf")),
    ("cafe\u0301?\te\u0301\n", ("caf\u00e9?", "\u00e9")),
    ("\u65e5\u672c?\t\u6771\u4eac\n", ("\u65e5\u672c?", "\u6771\u4eac")),
])
def test_fields_are_read_by_the_rules_of_csv(tmp_path, content, want):
    assert pairs(tmp_path / "qa", content)[0] == want


def test_what_csv_writes_is_read_back(tmp_path):
    rng = random.Random(0)
    for delimiter in ("\t", ",", ";"):
        for _ in range(100):
            # the first field has the letter q in front, so that no row is a header or empty
            rows = [("q" + "".join(rng.choices('a"\'\n,;\t\u2028\u00e9 ', k=8)) + f"{i}?",
                     "".join(rng.choices('b"\'\n,;\t\x85 ', k=8)) + "b") for i in range(5)]
            stream = io.StringIO(newline="")
            inputs.csv.writer(stream, delimiter=delimiter, quoting=1).writerows(rows)
            content = f"sep={delimiter}\n" + stream.getvalue()
            found = pairs(tmp_path / "qa", content)
            assert found == [(a.strip(), b.strip()) for a, b in rows]


@pytest.mark.parametrize("content, says", [
    ("Who?\n", "line 1: 0 tabs, not one"),
    ("Who?\tme\nWho\telse\tis?\n", "line 2: 2 tabs"),
    ("Who?,me\nWhy, oh why?,so\n", "line 2: 2 commas"),
    ("Who?;me\nWhy; oh why?;so\n", "line 2: 2 semicolons"),
    ("\n\nWho?\tme\r\n\r\nWhere?\t\n", "line 5: the answer is empty"),
    ('Who?\t"a\nb\nc"\nWhere?\t""\n', "line 4: the answer is empty"),
    ("sep=;\nWho?;me\nWhere?;\n", "line 3: the answer is empty"),
    ('Who?\tme\n"Where?\there\nWhy?\tso\n', "line 2: unexpected end of data; close each quote"),
    ('"It" is who?\tme\n', "line 1: .*; close each quote"),
    ("Who?\tme\nWhat?\tit\nWho?\tyou\n",
     "line 3: 'Who\\?' has the answer 'you', but 'me' on line 1"),
    ("cafe\u0301\ta\ncaf\u00e9\tb\n", "line 2.*line 1"),
    ("question\tanswer\n", "holds no pair"), ("", "holds no pair"), (" \r\n\t\n", "holds no pair"),
    ("Who\x1b[2J?\n".encode() + b"\tme\n", "line 1: 0 tabs"),
    ("\x1b[2J?\t" + "very long " * 40, r"line 1: 'very long .*\.\.\.' has"),
    ("Who?\tme\n".encode("utf-16"), "UTF-16"), (b"Who?\tm\xff\n", "not UTF-8 .byte 6"),
    (b"Who?\tm\0e\n", "zero byte at position 6"),
], ids=range(19))
def test_what_is_no_pair_is_one_line_with_its_place(tmp_path, content, says):
    with pytest.raises(ValueError, match=says) as error:
        pairs(tmp_path / "qa", content)
    assert "--qa=" in one_line(error)


# -- own text ----------------------------------------------------------------------------------

@pytest.mark.parametrize("content, says", [
    ("text".encode("utf-16"), "UTF-16.*save it as UTF-8"),
    (b"\xfe\xff\0t", "UTF-16.*save it as UTF-8"), (b"\xef\xbb\xbf", "is empty"),
    ("\u2028\u3000\n".encode(), "is empty"), (b"good\0text", "position 4")])
def test_text_that_is_none_is_refused(tmp_path, content, says):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        data.read_text(tmp_path / "text")
    one_line(error)


def test_a_path_with_control_characters_is_shown_as_it_can_be(tmp_path):
    with pytest.raises(ValueError, match=r"x\\x1b\[2J\\ny") as error:
        data.read_text(tmp_path / "x\x1b[2J\ny")
    one_line(error)


@pytest.mark.parametrize("text, want", [
    ("plain \u65e5\u672c \u00e9", "plain \u65e5\u672c \u00e9"), ("a\x1b[2J\r\n", r"a\x1b[2J\r\n"),
    ("\ud800\u2028\x85\u202e", r"\ud800\u2028\x85\u202e"),
    ("\u0646\u200c\u0647", "\u0646\u200c\u0647"),
    ("x" * 60, "x" * 60), ("x" * 61, "x" * 57 + "..."), ("\0" * 60, r"\x00" * 14 + r"\...")])
def test_printable_shows_no_control_character_and_sixty_in_all(text, want):
    assert inputs.printable(text) == want


def test_a_long_text_becomes_the_same_tokens_in_parts(tmp_path):
    rng = random.Random(0)
    text = "".join(rng.choices("ab '12.\n\t\u00e9\u65e5\u3000\r", k=20_000)) + "x" * 1000
    tokenizer = Tokenizer(train_bpe(text, 400))     # it knows runs of blanks
    for size in (1, 10, 1000):
        parts = list(tokenizer.encode_parts(text, size))
        assert len(parts) > 10
        assert [i for part in parts for i in part] == tokenizer.encode(text)


def test_a_text_is_the_same_with_composed_letters_and_other_line_ends(tmp_path):
    """Else a book and its questions would disagree, and a run could not be resumed on Windows."""
    ways = ["caf\u00e9\nna\u00efve", "cafe\u0301\r\nnai\u0308ve", "\ufeffcaf\u00e9\r\nnai\u0308ve"]
    for number, text in enumerate(ways):
        (tmp_path / str(number)).write_bytes(text.encode())
        assert data.read_text(tmp_path / str(number)) == ways[0]


def test_own_text_is_read_whatever_its_script(tmp_path):
    texts = ["\u65e5\u672c\u8a9e" * 3000, "ACGT" * 3000, "=" * 90_000, "\n" * 90_000 + "end"]
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.txt"
        path.write_text(text, encoding="utf-8")
        corpus = data.load(train.Config(**FLAGS | dict(data=str(path), block_size=4)))
        tokens = np.concatenate([corpus.train.tokens, corpus.val.tokens])
        assert corpus.tokenizer.decode(tokens.tolist()) == text


def test_the_last_tenth_of_an_own_text_is_held_out_and_is_not_read(tmp_path):
    """No word comes twice, so that a token of both parts would be seen."""
    text = " ".join(f"{number:05}" for number in range(2000))
    (tmp_path / "text.txt").write_text(text)
    corpus = data.load(train.Config(**FLAGS | dict(data=str(tmp_path / "text.txt"))))
    read, held_out = corpus.train.tokens, corpus.val.tokens
    assert corpus.tokenizer.encode(text) == [*read, *held_out]
    assert len(held_out) == pytest.approx(len(read) / 9, rel=0.01)


def test_every_text_is_read_and_written_as_utf8():
    """Whatever the machine's own encoding is: no call leaves it out, but for numbers alone."""
    root = Path(data.__file__).parent.parent
    numbers = ("COST", "owner")         # files that hold one number
    for path in [*root.glob("*.py"), *root.glob("data/**/*.py"), *root.glob("labs/*.py")]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            text = name.endswith((".read_text", ".write_text")) and name != "data.read_text"
            if name == "open" or text:
                written = ast.unparse(call)
                binary = any(mode in written for mode in ("'wb'", "'rb'", "'w+b'"))
                right = "encoding='utf-8'" in written or binary
                assert right or any(word in written for word in numbers), f"{path}: {written}"
