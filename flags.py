"""
Command-line flags from a dataclass: one flag per field, the field's comment is its help.

    @dataclass
    class Flags:
        GROUPS: ClassVar[dict] = {"first of all": ("prompt",)}      # optional: sections of --help
        prompt: str = ""        # the question

A comment stands behind its field, or on the lines directly above it.
"""
import argparse
import dataclasses
import difflib
import inspect
import io
import os
import re
import sys

from data.inputs import printable

# names that people bring from other programs; a hint is given where the dataclass has the field
OTHER_NAMES = {
    "pretrain_lr": ("learning_rate", "lr", "max_lr"),
    "pretrain_steps": ("max_iters", "max_steps", "epochs", "num_epochs", "steps", "iters"),
    "n_embd": ("d_model", "hidden_size", "dim", "embed_dim", "width"),
    "n_layer": ("num_layers", "layers", "depth"),
    "n_head": ("num_heads", "heads"),
    "batch_size": ("bs", "batch"),
    "block_size": ("context_length", "seq_len", "max_length"),
    "out": ("output", "output_dir", "out_dir"),
}
BOOLEANS = {
    "1": True, "yes": True, "true": True,
    "0": False, "no": False, "false": False,
}

class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line: a usage of sixty flags would bury it."""

    def error(self, message):
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {printable(message, None)}\n")

class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description; leaves room for the longest flag beside its help."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28)

class Output:
    """A stream whose reader may go away (`| head -1`) or whose disk may be full: output then ends
    silently, and the program goes on."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        """Write, or drop the text."""
        try:
            return self.stream.write(text)
        except OSError:
            return self.give_up()

    def flush(self):
        """Flush, or drop what is left."""
        try:
            self.stream.flush()
        except OSError:
            self.give_up()

    def give_up(self):
        """Connect the stream to nothing: Python flushes it once more at its end."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.stream.fileno())
        return 0

    def __getattr__(self, name):
        return getattr(self.stream, name)

def plain_output():
    """Called first by each program: no output can make it fail.

    Characters that the terminal's encoding lacks are replaced, closed streams are ignored.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:                              # closed by the shell: 2>&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):      # a notebook's stream is another one
            stream.reconfigure(errors="replace")
            setattr(sys, name, Output(stream))
    if sys.stdin is None:                               # closed by the shell: <&-
        sys.stdin = open(os.devnull, encoding="utf-8")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")

# -- values ----------------------------------------------------------------------------------------
def quoted(text):
    """A value for an error message: short, whatever was typed."""
    return f"'{text}'" if len(text) <= 40 else f"'{text[:40]}...'"

def boolean(text):
    """yes, no, true, false, 1 or 0."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is neither true nor false")
    return BOOLEANS[text.lower()]

def integer(text):
    """A whole number of 64 bits: torch has no larger ones."""
    try:
        value = int(text)
    except ValueError:
        # also raised by Python itself, for thousands of digits
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number") from None
    if not -2 ** 63 <= value < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is beyond 64 bits")
    return value

def number(text):
    """A number. inf is for the dataclass to refuse, because some fields accept it."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number") from None
    # nan is the only number that differs from itself
    if value != value:
        raise argparse.ArgumentTypeError("nan is not a number")
    return value

CONVERTERS = {bool: boolean, int: integer, float: number, str: str}

# -- the flags of a dataclass ----------------------------------------------------------------------
def comments(kind):
    """Field -> its comment, for all fields of a dataclass and of those that it extends."""
    notes = {}
    for base in reversed(kind.__mro__[:-1]):
        above = []      # comment lines that belong to the next field
        field = None    # the field whose comment may be continued
        for line in inspect.getsource(base).splitlines():
            found = re.match(r"    (\w+): [^#]*(?:# (.*))?$", line)
            comment = re.match(r"( +)# ?(.*)$", line)
            if found:
                field = found[1]
                notes[field] = found[2] or " ".join(above)
                above = []
            elif comment and len(comment[1]) > 4 and field:
                notes[field] += " " + comment[2]
            elif comment and len(comment[1]) == 4:
                above.append(comment[2])
            else:
                above = []
                field = None
    return notes

def groups_of(kind):
    """Title -> names of fields, for the sections of --help. A field that is not named: "more"."""
    groups = dict(getattr(kind, "GROUPS", {}))
    named = [name for names in groups.values() for name in names]
    rest = [field.name for field in dataclasses.fields(kind) if field.name not in named]
    title = "more" if groups else "flags"
    return groups | ({title: rest} if rest else {})

def make_parser(kind, prog, positional):
    """A `Parser` with one flag per field."""
    word = f" [{positional}]" if positional else ""
    parser = Parser(prog=prog, usage=f"{prog}{word} [--name=value ...]", allow_abbrev=False,
                    description=sys.modules[kind.__module__].__doc__,
                    argument_default=argparse.SUPPRESS, formatter_class=HelpFormatter)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    notes = comments(kind)
    for title, names in groups_of(kind).items():
        section = parser.add_argument_group(title)
        for name in names:
            field = fields[name]
            text = f"{notes[name]} [{field.default}]".replace("%", "%%")
            section.add_argument(f"--{name}", type=CONVERTERS[field.type],
                                 metavar=field.type.__name__, help=text)
    return parser

def spell_out(argv, kind):
    """--flag and --no-flag of boolean fields become --flag=true and --flag=false.

    argparse would take the word that follows --flag as its value, even if it is a question.
    """
    booleans = [field.name for field in dataclasses.fields(kind) if field.type is bool]
    words = list(argv)
    spelled = []
    while words:
        word = words.pop(0)
        name = word[2:] if word.startswith("--") else ""
        negated = re.sub("^no[-_]", "", name)
        if name in booleans:
            has_value = bool(words) and words[0].lower() in BOOLEANS
            value = words.pop(0) if has_value else "true"
            spelled.append(f"--{name}={value}")
        elif negated in booleans:
            spelled.append(f"--{negated}=false")
        else:
            spelled.append(word)
    return spelled

def hint(word, kind):
    """What an unknown flag may have meant: "; did you mean --n_embd?", or nothing."""
    name = word.split("=")[0].lstrip("-").replace("-", "_").lower()
    known = [field.name for field in dataclasses.fields(kind)]
    meant = [field for field, others in OTHER_NAMES.items() if field in known and name in others]
    near = meant or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean --{near[0]}?" if near else "; --help lists the flags"

def read_flags(kind, argv, prog, positional=None):
    """The flags that were given, as a dict: --name=value for each field of a dataclass.

    positional: a field that may be given as a word without its flag, as in
    `sample.py "Who wrote Hamlet?"`.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(kind, prog, positional)
    given, rest = parser.parse_known_args(spell_out(argv, kind))
    given = vars(given)

    for name, value in given.items():
        if isinstance(value, list):     # argparse makes it of `--name --`
            parser.error(f"argument --{name}: expected one argument")
    for word in rest:
        if word.startswith("-") and word != "-":
            parser.error(f"unknown flag {quoted(word)[1:-1]}{hint(word, kind)}")
    if rest and not positional:
        parser.error(f"unexpected {quoted(rest[0])}: flags are written --name=value")
    if len(rest) > 1:
        parser.error(f"{len(rest)} words that are no flags: put the {positional} in quotes, "
                     f'as in {prog} "{quoted(" ".join(rest))[1:-1]}"')
    if rest and positional in given:
        parser.error(f"the {positional} is given twice: {quoted(rest[0])} and --{positional}")
    if rest:
        given[positional] = rest[0]
    return given
