"""
NL-RX: what a regular expression matches, said in English in two ways, and the expression; as plain
.tsv files.

    python data/nlrx/prepare.py                     # download, from the repository of LLM-JEPA
    python data/nlrx/prepare.py --input=FOLDER      # or use a copy of the four files,
                                                    # synth_train.jsonl and so on

    synth_{train,test}.tsv      description, regex        the description was written by a grammar
    turk_{train,test}.tsv       description, regex        the same regexes, described by people
    views_{train,test}.tsv      synth, turk, regex        row by row side by side: three views
                                                          of one meaning

Locascio et al., 2016 (arXiv 1608.03000).
"""
import argparse
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from urllib.request import urlopen

URL = "https://raw.githubusercontent.com/rbalestr-lab/llm-jepa/main/datasets"
OUT = Path(__file__).parent
# what the grammar of SYNTH fills its sentences with, and what that becomes
PHRASE = re.compile(
    r"the string '\w+'|a (?:capital |lower-case )?letter|a vowel|a number|a character|\d or more")
ATOM = re.compile(r"\[[^\]]*\]|dog|truck|ring|lake|\.(?!\*)|\{\d,\}")


def read_pairs(raw, name):
    """(description, regex) of each line of a .jsonl, {"messages": [system, user, assistant]}, each
    with a "content"."""
    pairs = []
    for number, line in enumerate(raw.decode("utf-8").splitlines(), 1):
        try:
            _, user, assistant = json.loads(line)["messages"]
            pair = user["content"].strip(), assistant["content"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{name}, line {number}: no messages of system, user, assistant: {line[:40]!r}"
            ) from None
        if not all(pair) or any(mark in text for text in pair for mark in "\t\n"):
            raise ValueError(
                f"{name}, line {number}: a text is empty, or holds a tab or a line break")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{name} is empty")
    return pairs

def leaked(train, test):
    """For each test pair, whether its description stands in the training set, word for word: a list
    of bools."""
    known = {description for description, _ in train}
    return [description in known for description, _ in test]

def majority(pairs):
    """What takes no network: the commonest regex of a sentence, both with their phrases cut out,
    and the commonest atom of a phrase. Returns description -> regex, "" for a sentence never seen.
    Where the grammar is ambiguous ("not X before Y") nothing can do better than the commonest
    reading: so this is a control, and about the ceiling too."""
    sentences, atoms = defaultdict(Counter), defaultdict(Counter)
    for description, regex in pairs:
        sentences[PHRASE.sub("_", description)][ATOM.sub("_", regex)] += 1
        phrases, parts = PHRASE.findall(description), ATOM.findall(regex)
        if len(phrases) == len(parts):      # the grammar keeps their order
            for phrase, part in zip(phrases, parts):
                atoms[phrase][part] += 1

    def most(counter):
        """Its commonest key, "" if it has none."""
        return max(counter, key=counter.get, default="")

    def regex_of(description):
        """The commonest reading."""
        parts = iter([most(atoms[phrase]) for phrase in PHRASE.findall(description)])
        return re.sub("_", lambda _: next(parts, ""), most(sentences[PHRASE.sub("_", description)]))
    return regex_of

def write(name, rows):
    """Rows of strings as a .tsv beside this file."""
    (OUT / name).write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def main():
    """Write the six files and print what is in them. A bad input ends the program with one line and
    exit code 2."""
    # without the usage text an error is one line
    parser = argparse.ArgumentParser(description="prepare NL-RX", usage=argparse.SUPPRESS)
    parser.add_argument(
        "--input", metavar="FOLDER",
        help="folder of synth_train.jsonl and so on; without it: download")
    args = parser.parse_args()

    pairs = {}
    for name in "synth_train", "synth_test", "turk_train", "turk_test":
        source = f"{args.input or URL}/{name}.jsonl"
        try:
            raw = Path(source).read_bytes() if args.input else urlopen(source, timeout=30).read()
            pairs[name] = read_pairs(raw, source)
        except OSError as error:  # urllib's own errors are OSErrors too
            if args.input:
                parser.error(
                    f"cannot read {source}: {error.strerror}; "
                    "--input is the folder of the four .jsonl files")
            parser.error(
                f"cannot download {source} ({error}): "
                "fetch the four files elsewhere and give --input=FOLDER")
        except UnicodeDecodeError as error:
            parser.error(f"{source} is not UTF-8 (byte {error.start:,})")
        except ValueError as error:
            parser.error(str(error))

    views = {}
    for part in "train", "test":
        synth, turk = pairs[f"synth_{part}"], pairs[f"turk_{part}"]
        row = next((i for i, (a, b) in enumerate(zip(synth, turk), 1) if a[1] != b[1]), None)
        if row or len(synth) != len(turk):
            lengths = f"{len(synth):,} and {len(turk):,} rows"
            reason = f"row {row} holds two different regexes" if row else lengths
            parser.error(f"synth_{part} and turk_{part} are not aligned: {reason}")
        views[part] = [(a[0], b[0], a[1]) for a, b in zip(synth, turk)]

    for name, rows in [*pairs.items(), *((f"views_{part}", rows) for part, rows in views.items())]:
        write(f"{name}.tsv", rows)
    for kind in "synth", "turk":
        train, test = pairs[f"{kind}_train"], pairs[f"{kind}_test"]
        words = {word.strip(".,;:'\"") for description, _ in train for word in description.split()}
        regexes = {regex for _, regex in train}
        longest = max(len(regex) for _, regex in train + test)
        known_regexes = sum(regex in regexes for _, regex in test)
        leaks = leaked(train, test)
        unseen = [pair for pair, leak in zip(test, leaks) if not leak]
        guess = majority(train)
        right = [guess(text) == regex for text, regex in unseen]
        share = sum(right) / max(1, len(right))
        print(f"{kind}: {len(train):,} + {len(test):,} pairs, {len(words):,} words, "
              f"regexes of up to {longest} characters; of the test set {sum(leaks)} descriptions "
              f"and {known_regexes} regexes stand in the training set; "
              f"the commonest reading of a sentence is right for {share:.3f} of the others")
    print(f"views: {len(views['train']):,} + {len(views['test']):,} rows, "
          "the two descriptions side by side")
    print("next: python -m labs.llm_jepa --fast")


if __name__ == "__main__":
    main()
