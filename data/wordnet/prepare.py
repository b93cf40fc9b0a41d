"""
WordNet's glosses (what a word means, often with an example), one a line, as data/wordnet/input.txt.

    python data/wordnet/prepare.py                      # from Debian's package wordnet-base
    python data/wordnet/prepare.py --input=glosses.txt  # or from lines `word: definition. example.`
"""

import argparse
from pathlib import Path

DICT = Path("/usr/share/wordnet")
OUT = Path(__file__).with_name("input.txt")
# one gloss is too short to predict a part of it from the rest; neighbours in WordNet's order share
# a subject
GLOSSES = 8


def gloss(line):
    """`word: definition. example.` of one data.* line:
    numbers and word fields | definition; "example"; "example"."""
    fields, text = line.split(" | ", 1)
    # field 4 is the first synonym; (a), (p), (ip) is syntax
    word = fields.split()[4].replace("_", " ").split("(")[0]
    return f"{word}: " + " ".join(part.strip(' "') + "." for part in text.strip().split('; "'))


def main():
    """Write OUT and print its size. A bad input ends the program with one line and exit code 2."""
    # without the usage text an error is one line
    parser = argparse.ArgumentParser(
        description="prepare WordNet's glosses", usage=argparse.SUPPRESS)
    parser.add_argument(
        "--input", metavar="FILE",
        help="lines `word: definition. example.`; without it, wordnet-base is read")
    args = parser.parse_args()

    dictionary = [DICT / f"data.{kind}" for kind in ("noun", "verb", "adj", "adv")]
    files = [Path(args.input)] if args.input else dictionary
    try:
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        advice = (
            "; install Debian's wordnet-base, "
            "or give --input=FILE of lines `word: definition.`")
        other = "" if args.input else advice
        parser.error(f"cannot read {error.filename}: {error.strerror}{other}")
    except UnicodeDecodeError as error:
        parser.error(f"{args.input or DICT} is not UTF-8 text (byte {error.start:,})")
    if args.input:
        glosses = [line.strip() for line in lines if line.strip()]
    else:
        # the licence is indented
        glosses = [gloss(line) for line in lines if not line.startswith("  ")]
    bad = next((line for line in glosses if ": " not in line), None if glosses else "")
    if bad is not None:
        parser.error(
            f"{args.input or DICT} should hold lines `word: definition.`, not {bad[:40]!r}")

    documents = ["\n".join(glosses[i:i + GLOSSES]) for i in range(0, len(glosses), GLOSSES)]
    raw = ("\n\n".join(documents) + "\n").encode()
    OUT.write_bytes(raw)
    print(f"{OUT}: {len(raw):,} bytes, {raw.count(10):,} lines, "
          f"{len(glosses):,} glosses in {len(documents):,} documents")
    print("next: python train.py --data=data/wordnet/input.txt --out=out/wordnet")


if __name__ == "__main__":
    main()
