"""
Tiny Shakespeare: 1 MB of plays, as data/shakespeare/input.txt. A blank line divides speeches.

    python data/shakespeare/prepare.py                     # download
    python data/shakespeare/prepare.py --input=local.txt   # or use a copy
"""

import argparse
from pathlib import Path
from urllib.request import urlopen

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
OUT = Path(__file__).with_name("input.txt")


def main():
    """Write OUT and print its size. A bad input ends the program with one line and exit code 2."""
    # without the usage text an error is one line
    parser = argparse.ArgumentParser(
        description="prepare tiny Shakespeare", usage=argparse.SUPPRESS)
    parser.add_argument(
        "--input", metavar="FILE",
        help="a local copy of the text; without it, it is downloaded")
    args = parser.parse_args()

    try:
        raw = Path(args.input).read_bytes() if args.input else urlopen(URL, timeout=30).read()
    except OSError as error:  # urllib's own errors are OSErrors too
        if args.input:
            parser.error(f"cannot read --input={args.input}: {error.strerror}")
        parser.error(
            f"cannot download {URL} ({error}): fetch it elsewhere and give it as --input=FILE")
    source = f"--input={args.input}" if args.input else URL
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        parser.error(f"{source} is not UTF-8 text (byte {error.start:,})")
    if not text.strip():
        parser.error(f"{source} is empty")

    OUT.write_bytes(raw)  # as it is: a download and a copy give the same file
    print(f"{OUT}: {len(raw):,} bytes, {text.count(chr(10)):,} lines (expect 1,115,394 and 40,000)")
    print("next: python train.py --data=data/shakespeare/input.txt --out=out/shakespeare")


if __name__ == "__main__":
    main()
