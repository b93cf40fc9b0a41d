"""
Think, then speak: ask a run that train.py has made. Nothing is learned here.

    python sample.py "Who wrote the book 'Sapiens'?"                one question
    python sample.py                                                a conversation
    python sample.py --inspect="The capital of France is [Paris]."  which concepts fit the gap best
    python sample.py --inspect="What is the capital of France?"     concepts nearest to the thought
    python sample.py --embed=sentences.txt                          their vectors: sentences.npy
    python sample.py --list                                         what may be asked
    python sample.py --fill="My lord, the [...] is dead."           own text: what fits the gap
    python sample.py --go_on="What is thy" --temperature=.5         own text: thinks, says, repeats

A gap can be inspected after phase 1, a thought after phase 2; speech needs phase 3. A run on your
own text without questions fills gaps and goes on; a run with questions answers.
"""
import codecs
import dataclasses
import io
import itertools
import math
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":      # importing torch takes seconds: Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch

import data
import evaluate
import tjepa
from data import Tokenizer, printable
from flags import plain_output, read_flags
from train import (EVERY, Config, Run, build, content_of, load_checkpoint, pick_device,
                   write_safely)

@dataclasses.dataclass
class Flags:
    """What to ask, and how to answer."""
    out: str = "out/tjepa"      # folder of the run
    prompt: str = ""            # one question; without it and --inspect: a conversation
    inspect: str = ""           # a text with one [span] to hide, or a question: shows latents
    embed: str = ""             # a .txt with a sentence a line: writes a vector for each of them
    save: str = ""              # where --embed writes; without it, beside the text, as .npy
    list: bool = False          # print what may be asked, by relation and split
    fill: str = ""              # a text with one gap, [...]: says what fits, after --data=FILE
    go_on: str = ""             # a text to be continued, after --data=FILE
    length: int = 60            # tokens that --go_on adds
    temperature: float = 0.0    # 0: the likeliest token each time; 1: as learned; above: bolder
    top_k: int = 0              # sample from so many of the likeliest tokens; 0 = all
    top_p: float = 1.0          # sample from the likeliest tokens that hold this probability
    seed: int = 0               # of the sampling, set before each answer: each is repeatable
    device: str = "auto"        # auto | cuda | mps | cpu
    always_answer: bool = False  # speak even if no known concept is within the threshold
    n: int = 5                  # concepts that --inspect shows; fillings drawn by --temperature

    def __post_init__(self):
        tjepa.check(self, (
            ("temperature", lambda v: v == 0 or 0.001 <= v < math.inf, "0, or 0.001 or more"),
            ("top_k", lambda v: v >= 0, "0 (all) or above"),
            ("n", *tjepa.within(1, 1_000_000)),
            ("length", *tjepa.within(1, 100_000)),
            ("top_p", *tjepa.within(1e-30, 1)),         # float32 takes 1e-300 for 0
            ("seed", lambda v: 0 <= v < 2 ** 63, "at least 0 and below 2**63"),
        ))

# the actions of which one can be asked for
ACTIONS = ("prompt", "inspect", "embed", "list", "fill", "go_on")

class Session(NamedTuple):
    """A run that has been opened to be asked."""
    flags: Flags
    run: Run
    tokenizer: Tokenizer
    checkpoint: dict

def open_session(flags):
    """Model, tokenizer and answer table of the run in --out; its corpus is not needed."""
    checkpoint = load_checkpoint(flags.out)
    # the run may have been trained on another machine, or moved since
    cfg = Config(**(checkpoint["config"] | dict(out=flags.out, device=flags.device)))
    tokenizer = Tokenizer.from_state(checkpoint["tokenizer"])
    device, dtype = pick_device(cfg)
    model = build(cfg, tokenizer, checkpoint["model"]).to(device)
    return Session(flags, Run(cfg, model, None, device, dtype), tokenizer, checkpoint)

def require(session, phase):
    """ValueError where the run has not been through a phase: what to do, and what works without."""
    out, checkpoint = session.flags.out, session.checkpoint
    lacks, works = dict(distill=("knows no answers", "a text with one [span] in brackets"),
                        speak=("cannot speak", "your question"))[phase]
    reached = EVERY.index(checkpoint["phase"]) + (checkpoint["step"] > 0)
    untaught = checkpoint["answers"] is None or checkpoint["threshold"] is None
    if reached <= EVERY.index(phase) or untaught:
        raise ValueError(
            f"the run in --out={out} {lacks} yet: run `python train.py --phase={phase} "
            f'--out={out}` first; --inspect="{works}" works already')

def says_gaps(session):
    """Has phase 3 of this run learned to say gaps of a text, and no answers?"""
    checkpoint = session.checkpoint
    return checkpoint["phase"] == "speak" and checkpoint["answers"] is None

def require_gaps(session, flag):
    """ValueError where the run cannot say gaps of a text."""
    out = session.flags.out
    if session.checkpoint["answers"] is not None or session.run.cfg.data == "facts":
        raise ValueError(f"--{flag}: the run in --out={out} answers questions; a run on "
                         "your own text says gaps: `python train.py --data=my_book.txt "
                         "--out=out/book`")
    if not says_gaps(session) or not session.checkpoint["step"]:
        raise ValueError(f"--{flag}: the run in --out={out} cannot speak yet: run `python train.py "
                         f'--phase=speak --out={out}` first; --inspect="a text with one [span] in '
                         'brackets" works already')

def think(session, question, source):
    """`Thought` (1 row) of a question, and its distance to each concept, (A,).

    source: the flag that the question came from, for error messages.
    """
    run, ids = session.run, session.tokenizer.encode_question(question)
    if not question.strip():
        raise ValueError(f'{source} is empty: write a question, as in {source}="What is the '
                         'capital of France?"')
    if len(ids) > run.cfg.block_size:
        raise ValueError(f"{source} has {len(ids)} tokens, above the run's "
                         f"block_size={run.cfg.block_size}: shorten it")
    thought = evaluate.think_all(run, torch.tensor([ids], device=run.device))
    return thought, torch.cdist(thought.latent, session.checkpoint["concepts"].to(run.device))[0]

def pieces(session, thought):
    """The answer to a thought (1 row), piece by piece; joined, it is what `evaluate.say` returns.

    A token may end inside a character, or in a blank that turns out to be the last one: what is
    not certain yet is held back.
    """
    flags, tokenizer = session.flags, session.tokenizer
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    torch.manual_seed(flags.seed)
    tokens = session.run.model.speak(thought, flags.temperature, flags.top_k, flags.top_p)
    ids = (token.item() for token in tokens)
    words = (tokenizer.ranks[i] for i in ids if i < tokenizer.pad)
    text, shown = "", 0
    # No token is empty: an empty one marks the end, where half a character stays incomplete.
    for said in itertools.chain(words, [b""]):
        text += utf8.decode(said, final=not said)
        yield text.strip()[shown:]
        shown = len(text.strip())

def answer(session, question, source):
    """Print the answer as it is produced, or "I don't know" if no concept is near the thought.

    Behind it stands the nearest concept: what the question was taken for, and how far away it is.
    """
    thought, distance = think(session, question, source)
    near, threshold = distance.min().item(), session.checkpoint["threshold"]
    concept = printable(session.checkpoint["answers"][distance.argmin()], None)
    found = f"(nearest: {concept}, at {near:.1f}, threshold {threshold:.1f}"
    if near > threshold and not session.flags.always_answer:
        print(f"I don't know   {found}; --always_answer speaks anyway)")
        return
    with session.run.autocast():
        for piece in pieces(session, thought):
            print(printable(piece, None), end="", flush=True)
    print(f"   {found})")

def converse(session, reply=answer, hint="Ask a question"):
    """Question after question. One that cannot be asked is no reason to stop.

    reply: `answer`, or `tell` for a run on a text of one's own.
    """
    print(f"{hint}; an empty line or Ctrl-D ends.")
    try:
        while question := input("> ").strip():
            try:
                reply(session, question, "the text" if reply is tell else "the question")
            except ValueError as error:
                print(f"sample.py: error: {printable(error, None)}", file=sys.stderr)
    except EOFError:
        print()

def inspect_question(session, question):
    """Print the concepts nearest to the thought, and whether they are within the threshold."""
    distance, threshold = think(session, question, "--inspect")[1], session.checkpoint["threshold"]
    print("distance  concept")
    for i in distance.argsort()[:session.flags.n].tolist():
        print(f"{distance[i]:8.2f}  {printable(session.checkpoint['answers'][i], None)}")
    verdict = "known: within" if distance.min() <= threshold else "unknown: beyond"
    print(f"{verdict} the threshold of {threshold:.2f}")

def candidates(session):
    """What may fill a gap: the answers, or before phase 2 words and beginnings of words."""
    tokenizer = session.tokenizer
    words = []
    for rank, is_word, begins in zip(tokenizer.ranks, tokenizer.is_word, tokenizer.word_start):
        word = rank.decode(errors="replace").strip()
        # A word behind a blank may be cut off. From three letters on it mostly is not.
        if is_word and begins and (len(word) > 2 or not rank.startswith(b" ")):
            words.append(word)
    return session.checkpoint["answers"] or words

def inspect_gap(session, text):
    """Print what fits the bracketed gap best, and where the hidden text itself ranks."""
    found = re.fullmatch(r"([^][]*)\[([^][]*)\]([^][]*)", text)
    if not found or not found[2].strip() or not (found[1] + found[3]).strip():
        raise ValueError("--inspect must have exactly one span in brackets, with text in it and "
                         'around it, as in --inspect="The capital of France is [Paris]."')
    before, after = found[1].lstrip(), found[3].rstrip()
    truth = found[2].strip()
    values = list(dict.fromkeys([*candidates(session), truth]))
    energy = evaluate.gap_energy(session.run, session.tokenizer, before, values, after)
    kind = "the answers of the run" if session.checkpoint["answers"] else "its vocabulary's words"
    print(f"  energy  candidate (of {kind}, and the hidden text)")
    for i in energy.argsort()[:session.flags.n].tolist():
        print(f"{energy[i]:8.4f}  {printable(values[i], None)}")
    own = energy[values.index(truth)]
    rank = 1 + (energy < own).sum().item()
    print(f"'{printable(truth, None)}' has energy {own:.4f}: rank {rank} of {len(values)}")

def read_sentences(session, path):
    """The lines of a text that are not blank, as tokens (n, T), as in running text."""
    where = f"--embed={printable(path, None)}"
    raw = data.read_bytes("--embed", path, data.TEXT_LIMIT, "a .txt with a sentence a line")
    text = data.decode("--embed", path, raw)
    sentences = []
    for number, line in enumerate(data.clean(text).split("\n"), start=1):
        if not line.strip():
            continue
        sentences.append(" " + line.strip())
        n = len(session.tokenizer.encode(sentences[-1]))
        if n > session.run.cfg.block_size:
            raise ValueError(f"{where}, line {number}: {n} tokens, and the run reads "
                             f"{session.run.cfg.block_size} at most: split the line")
    if not sentences:
        raise ValueError(f"{where} is empty: write a sentence a line")
    return data.pack(session.tokenizer, sentences, session.run.cfg.block_size, "--block_size")

def place_for_vectors(flags):
    """The path that --embed writes to. ValueError where something would be lost."""
    path = Path(flags.save) if flags.save else Path(flags.embed).with_suffix(".npy")
    if path.suffix != ".npy":
        raise ValueError(f"--save={path} must end in .npy")
    if not path.parent.is_dir():
        raise ValueError(f"--save={path}: there is no folder {path.parent}; create it first")
    if path.exists() and not flags.save:
        raise ValueError(f"--embed={flags.embed} would replace {path}: name a file by "
                         "--save=FILE.npy, which may be replaced")
    for written in (path, path.with_suffix(".part")):   # `write_safely` writes both
        if written.exists() and written.samefile(flags.embed):
            raise ValueError(f"--save={path} would replace --embed={flags.embed}: name another")
    return path

@torch.no_grad()
def embed(session):
    """Write the concept vector of each sentence of a file, and say what the vectors are."""
    flags, run = session.flags, session.run
    tokens = read_sentences(session, flags.embed)                           # (n, T)
    path = place_for_vectors(flags)
    vectors = torch.cat([run.model.concept(rows.to(run.device)) for rows in tokens.split(256)])
    layers = f"the last top_k={run.cfg.top_k} of {run.cfg.n_layer} layers"
    if not run.cfg.top_k:
        layers = f"the embedding and all {run.cfg.n_layer} layers"
    buffer = io.BytesIO()
    np.save(buffer, vectors.float().cpu().numpy())
    write_safely(path, buffer.getvalue())
    print(f"{printable(path, None)}: {len(vectors)} rows of {vectors.size(1)} numbers (float32), "
          "one for each line that is not blank\n"
          "encoder: the target encoder, which reads the whole sentence\n"
          f"pooling: mean over the tokens of the mean of {layers}, each layer-normed")

def list_questions(session):
    """Print what may be asked: for each relation an example, and the subjects of each split."""
    out, checkpoint = session.flags.out, session.checkpoint
    try:
        rows = data.read_questions(session.run.cfg, session.tokenizer)
    except ValueError as error:
        raise ValueError(f"--list reads the questions of the run anew: {error}") from None
    if not rows:
        raise ValueError(f"the run in --out={out} has no questions: teach it some, by "
                         f"`python train.py --phase=distill --qa=FILE --out={out}`")
    if checkpoint["questions"] not in (None, content_of(rows)):
        raise ValueError(f"the questions of the run in --out={out} have changed since it was "
                         f"taught: --qa={session.run.cfg.qa}")
    relations = {}
    for row in rows:
        if row.phrasing == "trained":
            splits = relations.setdefault(row.relation, {})
            # the questions of a file of one's own have no templates: each is shown whole
            name = row.question if row.relation == "qa" else row.subject
            splits.setdefault(row.split, {}).setdefault(name, row.question)
    for relation, splits in relations.items():
        if relation == "qa":
            print("questions of your own, taught as DEC:")
            print("\n".join(printable(f"  {name}", None) for name in splits["DEC"]))
            continue
        example = next(iter(next(iter(splits.values())).values()))
        print(f"{relation}, as in: {printable(example, None)}")
        for split, names in sorted(splits.items()):
            shown = printable(", ".join(names), None)
            print(f"  {split:5} {len(names):4}  {shown}")
    if checkpoint["added"]:
        print("added by --phase=teach:")
        print("\n".join(printable(f"  {question}", None)
                        for question, _, _ in checkpoint["added"]))

# -- a text of one's own: gaps aloud ---------------------------------------------------------------
GAP = re.compile(r"\[(?:\.\.\.|\u2026)\]")
# A gap does not say how many tokens it hides: as many mask tokens are tried as most spans have.
LENGTHS = range(1, 5)
# Tokens of a thought in --go_on. A thought of more has no room for their order: after passages of
# training text (tiny Shakespeare, temperature .5) .96 / .87 / .70 / .58 of the words were real ones
# with 1 / 2 / 3 / 4 tokens, and bits per character 3.0 / 2.6 / 3.3 / 3.8 by labs/text.py's judge.
AT_ONCE = 2

def say_gap(session, left, n, right):
    """What is said of a gap of n tokens between left and right: a list of token ids."""
    flags, run = session.flags, session.run
    thought = evaluate.gap_thought(run, left, n, right)
    with run.autocast():
        tokens = run.model.speak(thought, flags.temperature, flags.top_k, flags.top_p)
        return evaluate.words_of([token.item() for token in tokens], session.tokenizer.pad)

def fill(session, text, source):
    """Print what fits the gap of a text, the lowest energy first, and the text filled by it."""
    flags, run, tokenizer = session.flags, session.run, session.tokenizer
    parts = GAP.split(text.strip())
    if len(parts) != 2 or not "".join(parts).strip():
        raise ValueError(f"{source} must have exactly one gap, written [...], with text around it, "
                         'as in --fill="My lord, the [...] is dead."')
    left, right = evaluate.around_gap(tokenizer, *parts)
    room = run.cfg.block_size - len(left) - len(right)
    lengths = [n for n in LENGTHS if n < run.cfg.answer_size]
    if room < lengths[-1]:
        raise ValueError(f"{source} has {len(left) + len(right)} tokens around the gap, above "
                         f"{run.cfg.block_size - lengths[-1]}: shorten it")

    torch.manual_seed(flags.seed)
    draws = len(lengths) if flags.temperature == 0 else flags.n
    if draws > 1000:
        raise ValueError(f"--n={flags.n}: at most 1000 fillings are drawn")
    fillings = []
    for draw in range(draws):
        said = say_gap(session, left, lengths[draw % len(lengths)], right)
        if said and len(said) <= room and said not in fillings:
            fillings.append(said)
    if not fillings:
        print("nothing that fits was said; --temperature=1 draws others")
        return
    energy = evaluate.filled_energy(run, tokenizer, left, fillings, right)
    order = energy.argsort().tolist()
    words = [printable(tokenizer.decode(said).strip(), None) for said in fillings]
    print("  energy  filling")
    for i in order:
        print(f"{energy[i]:8.4f}  {words[i]}")
    print(printable(parts[0], None) + f"[{words[order[0]]}]" + printable(parts[1], None))

def think_on(session, ids, length):
    """Yield what follows a text, lists of token ids of `length` tokens in all: the next span is
    thought, said and appended, then the next. ids: the text so far, at least one token."""
    run = session.run
    span = min(AT_ONCE, run.cfg.answer_size - 1, run.cfg.block_size - 1)
    ids = list(ids)
    left = length
    while left > 0:
        said = say_gap(session, ids[-(run.cfg.block_size - span):], span, [])[:left]
        if not said:
            return
        ids += said
        left -= len(said)
        yield said

def go_on(session, text, source):
    """Print a text and what follows, as it is said."""
    flags, tokenizer = session.flags, session.tokenizer
    ids = evaluate.around_gap(tokenizer, text.strip(), "")[0]
    if not ids:
        raise ValueError(f'{source} is empty: write the beginning of a text, as in '
                         '--go_on="What is thy"')
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    torch.manual_seed(flags.seed)
    print(printable(text.strip(), None), end="", flush=True)
    for said in think_on(session, ids, flags.length):
        words = utf8.decode(b"".join(tokenizer.ranks[i] for i in said))
        # lines stay lines; all else that steers a terminal is written out
        print("\n".join(printable(line, None) for line in words.split("\n")), end="", flush=True)
    print()

def tell(session, text, source):
    """Fill the gap of a text, or go on where it has none."""
    (fill if GAP.search(text) else go_on)(session, text, source)

def main(argv=None):
    """Command line: bad input is one line and exit code 2; Ctrl-C is exit code 130."""
    plain_output()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        given = read_flags(Flags, argv, "sample.py", positional="prompt")
        asked = [name for name in ACTIONS if given.get(name, False) is not False]
        if len(asked) > 1:
            raise ValueError(f"--{asked[0]} and --{asked[1]} are two ways to ask: give one of them")
        if "save" in given and "embed" not in given:
            raise ValueError("--save says where --embed writes: give --embed=FILE too")
        session = open_session(Flags(**given))
        if "embed" in given:
            return embed(session)
        if given.get("list"):
            return list_questions(session)
        if asked in (["fill"], ["go_on"]):
            require_gaps(session, asked[0])
            reply = fill if asked == ["fill"] else go_on
            return reply(session, given[asked[0]], f"--{asked[0]}")
        if not asked and says_gaps(session):
            require_gaps(session, "fill")
            return converse(session, tell, "A text with a gap, [...], is filled, another goes on")
        if re.search(r"[][]", given.get("inspect", "")):
            return inspect_gap(session, given["inspect"])
        require(session, "distill")
        if "inspect" in given:
            return inspect_question(session, given["inspect"])
        require(session, "speak")
        if "prompt" in given:
            return answer(session, given["prompt"], "--prompt")
        converse(session)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"sample.py: error: {printable(error, None)}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
