"""
Text to numbers and back: a byte-level BPE that is trained here and run by tiktoken.

Byte-level means that the 256 single bytes are tokens, so every text can be written down and no
UNK is needed. Training finds which neighbours to merge; tiktoken then merges them fast, from
nothing but the list of merged bytes.
"""
import base64
import hashlib
import heapq
import os
import tempfile
from collections import Counter, defaultdict

import regex  # python's re has no \p{L}; this comes along with tiktoken, so it adds no dependency
import tiktoken
from tqdm import tqdm

from data.typed import plain

# Text is cut into pieces first and no token ever spans two of them, so the vocabulary is not
# spent on "the." and "the,":
# english contractions | a word with its space | up to 3 digits | punctuation | newlines
# | blanks, but for the last one, which belongs to the word behind it | a blank on its own.
# ++ never gives back what it took, and blanks come by 99 at most: a step back for each of a
# million blanks overflows tiktoken's stack.
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]++| ?\p{N}{1,3}+| ?[^\s\p{L}\p{M}\p{N}]++"
           r"|\n++|[^\S\n]{1,99}(?!\S)|\s")
# GPT-2's own, as tiktoken writes it
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
                r"|\s++$|\s+(?!\S)|\s")
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = [GPT2_URL + "vocab.bpe", GPT2_URL + "encoder.json"]
# A text without blanks (Chinese, a genome) is one piece of megabytes, and the time for a piece
# grows faster than its length. Longer pieces are cut after this many characters. The longest
# words of any language have about 200.
LONGEST_PIECE = 256
# only a run this long can hold a piece that is too long: a search that costs little
LONG_RUN = regex.compile(r"\S{%d}|\s{%d}" % (LONGEST_PIECE, LONGEST_PIECE))
# Where any text can be cut without changing its tokens: a piece ends with the letter, and the
# blank begins the next one.
SAFE_CUT = regex.compile(r"(?<=\p{L})[ \n\r\t]")
# How a token begins that continues a word. U+FFFD is what a cut-off piece of a character
# decodes to.
INSIDE = regex.compile(r"[\p{L}\p{M}\p{N}\uFFFD]")
# Scripts without blanks between words: each token begins a word, else a whole sentence were one.
NO_BLANKS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
                          r"--\p{M}]", regex.VERSION1)
# a token that is a word and nothing else, with or without the blank in front of it
WORD = regex.compile(r" ?[\p{L}\p{M}]+")
# bars are shown for what takes longer, in seconds
PATIENCE = 3


def split(text, pattern):
    """The pieces of a text, none longer than LONGEST_PIECE characters: no token spans two."""
    for match in regex.finditer(pattern, text):
        piece = match[0]
        for start in range(0, len(piece), LONGEST_PIECE):
            yield piece[start:start + LONGEST_PIECE]


def merge(word, left, right):
    """Join each `left` that `right` follows, from left to right as tiktoken does.

    Returns the new list of tokens, and the places in it where a joined token stands. For example
    a b c a b with left a, right b becomes ab c ab, joined at 0 and 2.
    """
    merged, places, start = [], [], 0
    while True:
        # list.index searches in C: a loop over the tokens in Python is ten times slower
        try:
            found = word.index(left, start)
            while word[found + 1] != right:
                found = word.index(left, found + 1)
        except (ValueError, IndexError):  # no `left` any more, or it is the last token
            merged += word[start:]
            return merged, places
        merged += word[start:found]
        places.append(len(merged))
        merged.append(left + right)
        start = found + 2


def changed_pairs(merged, places, left, right):
    """Yield (pair, -1 or +1), as (left, right) tuples, for each pair that `merge` changed."""
    joined, last = left + right, len(merged) - 1
    here = set(places)
    for place in places:
        yield (left, right), -1
        if place > 0 and place - 1 in here:
            yield (right, left), -1
            yield (joined, joined), 1
        elif place > 0:
            yield (merged[place - 1], left), -1
            yield (merged[place - 1], joined), 1
        if place < last and place + 1 not in here:
            yield (right, merged[place + 1]), -1
            yield (joined, merged[place + 1]), 1


def train_bpe(text: str, vocab_size: int) -> list[bytes]:
    """Learn a byte-level BPE from a text.

    Returns the ranks: at most vocab_size tokens as bytes, index = token id, the first 256 the
    single bytes. The list is shorter where the text runs out of pairs that occur twice. Equal
    texts give equal lists. About a second a megabyte of words, some seconds a megabyte without
    blanks; a bar is shown if it takes longer. ValueError if the text is empty or vocab_size < 256.
    """
    if vocab_size < 256:
        raise ValueError(
            f"vocab_size must be at least 256 (one token for each byte), not {vocab_size}")
    if not text:
        raise ValueError("cannot train a tokenizer on an empty text")
    ranks = [bytes([byte]) for byte in range(256)]
    # A word is worked on once, however often it occurs: a text has a hundred times fewer
    # distinct words than words.
    pieces = Counter(split(text, PATTERN))
    words = [[ranks[byte] for byte in piece.encode()] for piece in pieces]
    times = list(pieces.values())

    # A pair is named by its joined bytes. That is enough: what is outside a stretch of bytes
    # has no say in how it is merged inside, so at any one time a stretch is split in one way
    # only (never both a+bc and ab+c), and once joined it stays so.
    count = defaultdict(int)    # pair -> how often it occurs
    where = defaultdict(set)    # pair -> the words that hold it
    halves = {}                 # pair -> its two tokens
    for i, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            pair = left + right
            count[pair] += times[i]
            where[pair].add(i)
            halves[pair] = (left, right)
    # the smallest comes out first: highest count, then lowest bytes
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)

    bar = tqdm(total=vocab_size, initial=256, desc="tokenizer", delay=PATIENCE, mininterval=1,
               leave=False, dynamic_ncols=True)
    while heap and len(ranks) < vocab_size:
        n, best = heapq.heappop(heap)
        if -n != count[best]:
            continue  # out of date: a newer entry was pushed when the count changed
        if count[best] < 2:
            break  # what occurs once is no pattern
        ranks.append(best)
        left, right = halves[best]
        change = defaultdict(int)
        for i in where.pop(best):
            words[i], places = merge(words[i], left, right)
            for (first, second), sign in changed_pairs(words[i], places, left, right):
                pair = first + second
                change[pair] += sign * times[i]
                if sign > 0:
                    where[pair].add(i)
                    halves[pair] = (first, second)
        for pair, delta in change.items():
            if delta:
                count[pair] += delta
                heapq.heappush(heap, (-count[pair], pair))
        bar.update()
    bar.close()
    return ranks


def begins_word(token: bytes) -> bool:
    """Does a token begin a word, or stand between words?"""
    # In UTF-8 these are the first bytes of Chinese and Japanese characters, whole or cut off.
    if 0xE3 <= token[0] <= 0xE9:
        return True
    text = token.decode(errors="replace")
    return bool(NO_BLANKS.match(text)) or not INSIDE.match(text)


class Tokenizer:
    """Token ids are 0 .. n-1 for the n ranks, then pad, bos, eos, mask = n .. n+3.

    ranks and pattern rebuild the tokenizer, so a checkpoint keeps both. vocab_size is n + 4.
    word_start is a list of vocab_size bools: False where a token continues the word before it
    (it begins with a letter, a digit or a cut-off character), True elsewhere. is_word, as many
    bools: True where a token is letters alone, but for a blank in front of them.
    ValueError if ranks holds a token twice or lacks a single byte.
    """

    def __init__(self, ranks: list[bytes], pattern: str = PATTERN):
        table = {token: i for i, token in enumerate(ranks)}
        complete = all(bytes([byte]) in table for byte in range(256))
        if len(table) != len(ranks) or not complete:
            raise ValueError("ranks must hold all 256 single bytes and no token twice")
        self.ranks = list(ranks)
        self.pattern = pattern
        # tiktoken is told of no special tokens: there is no text that could spell one
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=pattern, mergeable_ranks=table, special_tokens={})
        self.pad, self.bos, self.eos, self.mask = range(len(ranks), len(ranks) + 4)
        self.vocab_size = len(ranks) + 4
        self.word_start = [begins_word(token) for token in ranks] + [True] * 4
        self.is_word = [bool(WORD.fullmatch(token.decode(errors="replace"))) for token in ranks]
        self.is_word += [False] * 4
        self.cases = {}         # what `usual_case` has answered

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's own 50,257 - 1 ranks and pattern.

        ValueError, saying which files go where, if they cannot be downloaded.
        """
        # comes along with tiktoken; imported here and not above: --help should not wait for it
        import requests
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
        if folder is None:
            folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
        # what tiktoken calls the files
        names = [hashlib.sha1(url.encode()).hexdigest() for url in GPT2_FILES]
        try:
            for url, name in zip(GPT2_FILES, names):
                if not os.path.exists(os.path.join(folder, name)):
                    # tiktoken sets no timeout: offline it could hang
                    requests.head(url, timeout=5).raise_for_status()
            encoding = tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' own errors are OSErrors too
            files = " and ".join(f"{url} as {name}" for url, name in zip(GPT2_FILES, names))
            raise ValueError(
                f"GPT-2's vocabulary could not be downloaded: save {files} in one folder (no "
                "ending is added to the names) and set the variable TIKTOKEN_CACHE_DIR to that "
                "folder") from error
        ranks = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
        return cls(ranks, GPT2_PATTERN)

    def state(self) -> dict:
        """A dict of plain strings that `from_state` turns back into this tokenizer.

        This is what checkpoints and corpora store.
        """
        ranks = [base64.b64encode(rank).decode() for rank in self.ranks]
        return dict(pattern=self.pattern, ranks=ranks)

    @classmethod
    def from_state(cls, state: dict) -> "Tokenizer":
        """The tokenizer that `state` describes.

        The state may come from a file that someone else wrote, so nothing in it is trusted.
        ValueError says in one sentence what is wrong.
        """
        if not isinstance(state, dict) or set(state) != {"pattern", "ranks"}:
            raise ValueError("a stored tokenizer must be a dict of `pattern` and `ranks`")
        # a pattern made to be slow could hang tiktoken, so only our own two are run
        if state["pattern"] not in (PATTERN, GPT2_PATTERN):
            raise ValueError("a stored tokenizer must have a pattern that data/tokenizer.py knows")
        ranks = state["ranks"]
        if not isinstance(ranks, list) or not 256 <= len(ranks) <= 2 ** 16 - 4:
            raise ValueError("a stored tokenizer must have a list of 256 to 65,532 ranks: with "
                             "the 4 special tokens they are numbered in 16 bits")
        decoded = [decode_rank(i, rank) for i, rank in enumerate(ranks)]
        if {len(rank) for rank in decoded[:256]} != {1} or len(set(decoded[:256])) < 256:
            raise ValueError("the first 256 ranks of a stored tokenizer must be the single bytes")
        return cls(decoded, state["pattern"])

    def encode(self, text: str) -> list[int]:
        """Ids of a text, all below pad: the caller adds specials, the text cannot hold one."""
        if not LONG_RUN.search(text):
            return self.encoding.encode_ordinary(text)
        pieces = split(text, self.pattern)
        return [i for piece in pieces for i in self.encoding.encode_ordinary(piece)]

    def encode_question(self, question: str) -> list[int]:
        """Ids of a question, made `plain`, with the blank that it has in front in running text.

        Each of its words is written in the case that takes the fewest tokens. The vocabulary was
        made from a text, so this is the case in which the text has the word most often: france,
        FRANCE and France are the same question.
        """
        words = regex.compile(r"[^\p{L}\p{M}][\p{L}\p{M}]+")
        return self.encode(words.sub(lambda word: self.usual_case(word[0]), " " + plain(question)))

    def usual_case(self, word: str) -> str:
        """A word in the case that takes the fewest tokens: as it is, lower, upper, or one capital.

        It is judged with the character in front of it: a blank, a quotation mark, a hyphen.
        """
        if word not in self.cases:
            forms = (word, word.lower(), word.upper(), word[:2].upper() + word[2:].lower())
            ids = {form: self.encode(form) for form in forms}
            # of as many tokens those that were merged first, from the more frequent pairs
            self.cases[word] = min(ids, key=lambda form: (len(ids[form]), ids[form]))
        return self.cases[word]

    def encode_parts(self, text: str, size: int = 2 ** 20):
        """Yield `encode` of a long text in parts of about `size` characters, with a bar.

        Joined, the parts are what `encode` gives. A list of all ids of a large text would take
        ten times the memory of the text.
        """
        bar = tqdm(total=len(text), desc="tokens", unit=" characters", unit_scale=True,
                   delay=PATIENCE, mininterval=1, leave=False, dynamic_ncols=True)
        start = 0
        while start < len(text):
            cut = SAFE_CUT.search(text, start + size)
            end = cut.start() if cut else len(text)
            yield self.encode(text[start:end])
            bar.update(end - start)
            start = end
        bar.close()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """encode of each text, on several threads."""
        if any(LONG_RUN.search(text) for text in texts):
            return [self.encode(text) for text in texts]
        return self.encoding.encode_ordinary_batch(texts)

    def decode(self, ids: list[int]) -> str:
        """Text of a list of ids, specials left out, bytes that are no UTF-8 as U+FFFD.

        KeyError if an id >= vocab_size.
        """
        kept = [i for i in ids if not self.pad <= i <= self.mask]
        return self.encoding.decode(kept, errors="replace")


def decode_rank(i, text):
    """The bytes of rank i of a stored tokenizer, from base64. ValueError if it is not that."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"rank {i} of a stored tokenizer must be a text that is not empty")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(f"rank {i} of a stored tokenizer is not base64") from None
