"""
Twenty files as people bring them: each gives a run with figures, or one line that says why not.

    python -m tests.ownfiles            less than a minute; ends with the number that passed
    python -m tests.ownfiles --only=csv the files whose names contain a word

Texts are read by phase 1, and a gap in them is filled; pairs go through all three phases on a
small text, and one of their questions is asked. A sensible run ends with exit code 0, finite
figures and hit1. A refusal has exit code 2 and one line, which names the file.
"""
import argparse
import math
import random
import re
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import NamedTuple

import report
import sample
import train
from tests.forked import Process
from tests.toy import FLAGS, PAIRS, as_argv, write_corpus

# and the default of the longest answer
STEPS = dict(pretrain_steps=4, distill_steps=4, speak_steps=4, answer_size=24)


class File(NamedTuple):
    """A file of one's own."""
    name: str
    content: bytes
    refused: str = ""           # what the line that refuses it must contain; "": it is accepted
    gap: str = ""               # of a text: a sentence with a gap


def sentences(rng, words, join, end, n=400):
    """n random sentences of five words of a language."""
    return [join.join(rng.choices(words, k=5)) + end for _ in range(n)]


def texts(rng):
    """Files for --data."""
    chinese = sentences(rng, "春天 来了 花园 里的 红色 小鸟 看见 大海 我们 今天 很高兴".split(), "", "。")
    hindi = sentences(rng, "नदी में पानी बहुत ठंडा है और पक्षी गाते हैं किताब".split(), " ", "।")
    thai = sentences(rng, "แมว กิน ปลา ใน บ้าน สี แดง วันนี้ ฝน ตก".split(), "", " ")
    arabic = sentences(rng, "ذهب الولد إلى المدرسة في الصباح مع كتاب جديد".split(), " ", ".")
    french = sentences(rng, "l'été très élégant où naïve garçon forêt crème déjà".split(), " ", ".")
    emoji = sentences(rng, "🦊 👩‍👩‍👧 🌧️ 🎉 ❤️ 🐳 sun rain happy".split(), " ", "!")
    names = "total count item price index value".split()
    code = [f"def {a}_{b}({a}, {b}=0):\n    # see {c}\n    return {a} * {b} + 0.5\n"
            for a, b, c in (rng.sample(names, 3) for _ in range(200))]
    verse = sentences(rng, "rose moon river sleep golden night sings alone".split(), " ", ",")
    poem = "\n\n".join("\n".join(verse[i:i + 4]) for i in range(0, len(verse), 4))
    dna = "".join(rng.choices("ACGT", k=50_000))
    english = sentences(rng, "the cat dog sat ran on under a mat table old red".split(), " ", ".")
    line = " ".join(english)
    yield File("chinese.txt", "".join(chinese).encode(), gap="春天[来了]大海")
    yield File("hindi.txt", " ".join(hindi).encode(), gap="नदी में [पानी] बहुत")
    yield File("thai.txt", "".join(thai).encode(), gap="แมวกิน[ปลา]ในบ้าน")
    yield File("arabic.txt", " ".join(arabic).encode(), gap="ذهب [الولد] إلى المدرسة")
    decomposed = unicodedata.normalize("NFD", " ".join(french))
    yield File("french decomposed.txt", decomposed.encode(), gap="très [élégant] où")
    yield File("emoji.txt", " ".join(emoji).encode(), gap="sun 🦊 [rain] happy")
    yield File("code.py", "\n".join(code).encode(), gap="    return [total] * count")
    yield File("poem.txt", poem.encode(), gap="golden [night] sings")
    yield File("dna.txt", dna.encode(), gap="ACGTAC [GTACG] TTAC")
    yield File("one huge line.txt", line.encode() * 20, gap="the old [cat] sat")
    crlf = "\r\n".join(english) + "\r\n\r\n\r\n"
    yield File("windows.txt", b"\xef\xbb\xbf" + crlf.encode(), gap="the old [cat] sat")
    yield File("latin-1.txt", "déjà vu. ".encode("latin-1") * 200, refused="not UTF-8")
    yield File("ten words.txt", b"this is all that there is in this small text", refused="too few")


def pairs():
    """Files for --qa: pairs, most of them of the toy world, as programs write them."""
    quoted = [f'"{question}","the ""{answer}"" one, I think"' for question, answer in PAIRS]
    header = "\r\n".join(["question,answer", *quoted]) + "\r\n"
    yield File("export.csv", header.encode())
    excel = "\r\n".join(["Question;Answer", *(f"{a};{b}" for a, b in PAIRS)]) + "\r\n"
    yield File("excel semicolons.csv", b"\xef\xbb\xbf" + excel.encode())
    lines = [f"{question}\t{answer}" for question, answer in PAIRS]
    yield File("empty lines.tsv", "\n\n\n".join(["", *lines, "", ""]).encode())
    chinese = [f"{thing}是什么颜色？\t{colour}色" for thing, colour in zip("天草雪煤", "蓝绿白黑")]
    yield File("chinese.tsv", "\n".join(chinese).encode())
    mixed = [f"Où est le café {i}?\tÉvian {i}" for i in range(6)]
    mixed = [unicodedata.normalize(("NFC", "NFD")[i % 2], line) for i, line in enumerate(mixed)]
    yield File("composed and decomposed.tsv", "\n".join(mixed).encode())
    twice = [*lines, "What is the colour of the moss?\tred"]
    yield File("two answers.tsv", "\n".join(twice).encode(),
               refused="line 13: 'What is the colour of the moss?' has the answer 'red', "
                       "but 'green' on line 1")
    yield File("spaces.txt", "\n".join(f"{a}   {b}" for a, b in PAIRS).encode(),
               refused="line 1: 0 tabs")


def draw_nothing():
    """No curves are drawn: that takes longer than the toy is trained."""
    report.draw_curves = lambda *args, **kwargs: None


def run(program, argv, folder):
    """A program in a process of its own: (exit code, stdout, stderr)."""
    ended = Process(program, argv, folder, draw_nothing).wait()
    return ended.code, ended.out, ended.err


def problem(file, kind, folder):
    """What is wrong with the way in which a file was treated; "" if nothing is."""
    (folder / "own").mkdir(exist_ok=True)
    path, out = folder / "own" / file.name, folder / "runs" / file.name
    path.write_bytes(file.content)
    argv = [*as_argv(FLAGS | STEPS), f"--out={out}", f"--{kind}={path}"]
    argv += ["--phase=pretrain"] if kind == "data" else [f"--data={folder / 'text.txt'}"]
    code, said, error = run(train.main, argv, folder)
    last = re.split("[\r\n]+", error.strip())[-1]
    if "Traceback" in error:
        return f"a traceback: {last}"
    if file.refused:
        named = str(path) in last and file.refused in last and last.startswith("train.py: error: ")
        return "" if code == 2 and named and not out.exists() else f"not refused: {code}, {last}"
    if code:
        return f"exit code {code}: {last}"
    figures = report.newest(report.read_metrics(out))
    if not all(math.isfinite(value) for value in figures.values() if isinstance(value, float)):
        return "a figure is not finite"
    if "hit1" not in said:
        return "no figure of phase 1 is printed"
    ask = [f"--inspect={file.gap}"]
    if kind == "qa":
        taught = [answer for _, _, answer in train.data.read_pairs(path)]
        known = train.load_checkpoint(out)["answers"]
        if known != sorted(set(taught)) or {"answer", "Answer"} & set(known):
            return f"it was taught {known}"
        ask = ["--always_answer", train.data.read_pairs(path)[0][1]]
    code, said, error = run(sample.main, [f"--out={out}", *ask], folder)
    return "" if code == 0 and not error else f"sample.py: {code}, {error.strip()}"


def main():
    """Try the files, one after the other."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="a word in the names of the files to try")
    only = parser.parse_args().only
    files = [("data", file) for file in texts(random.Random(0))] + [("qa", f) for f in pairs()]
    files = [(kind, file) for kind, file in files if only in file.name]
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        for kind, file in files:
            wrong = problem(file, kind, folder)
            failed += bool(wrong)
            treated = "one clear line" if file.refused else "a sensible run"
            print(f"--{kind}='{file.name}': {wrong or treated}", flush=True)
    print(f"{len(files) - failed} of {len(files)} own files: a sensible run or one clear line")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
