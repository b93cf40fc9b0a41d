"""
Text to numbers and back: a byte-level BPE that is trained here and run by tiktoken.

Byte-level means that the 256 single bytes are tokens, so every text can be written down and no UNK is needed. Training
finds which neighbours to glue together; tiktoken then does the gluing fast, from nothing but the list of glued bytes.
"""

import base64
import hashlib
import heapq
import os
import tempfile
from collections import Counter, defaultdict

import regex  # python's re has no \p{L}; this comes along with tiktoken, so it adds no dependency
import tiktoken

# text is cut into pieces first and no token ever spans two of them, so the vocabulary is not spent on "the." and "the,":
# english contractions | a word with its space | up to 3 digits | punctuation | newlines | blanks, but for the last one, which
# belongs to the word behind it | a blank on its own. ++ never gives back what it took, and blanks come by 99 at most: a step
# back for each of a million blanks overflows tiktoken's stack
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]++| ?\p{N}{1,3}+| ?[^\s\p{L}\p{M}\p{N}]++"
           r"|\n++|[^\S\n]{1,99}(?!\S)|\s")
# what a token begins with when it goes on with a word; U+FFFD is what a cut-off piece of a character decodes to
INSIDE = regex.compile(r"[\p{L}\p{M}\p{N}\uFFFD]")
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = [GPT2_URL + "vocab.bpe", GPT2_URL + "encoder.json"]


def train_bpe(text: str, vocab_size: int) -> list[bytes]:
    """Learn a byte-level BPE from a text.

    Returns the ranks: at most vocab_size tokens as bytes, index = token id, the first 256 the single bytes. The list is shorter
    where the text runs out of pairs that occur twice. Equal texts give equal lists. Seconds a megabyte; where no blanks cut the
    text into words (genomes), minutes. ValueError if the text is empty or vocab_size < 256.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size must be at least 256 (one token for each byte), not {vocab_size}")
    if not text:
        raise ValueError("cannot train a tokenizer on an empty text")
    ranks = [bytes([byte]) for byte in range(256)]
    # a word is worked on once, however often it occurs: a text has a hundred times fewer distinct words than words
    pieces = Counter(regex.findall(PATTERN, text))
    words, times = [[ranks[byte] for byte in piece.encode()] for piece in pieces], list(pieces.values())

    # a pair goes by its joined bytes, as in tiktoken. that is name enough: what is outside a stretch of bytes has no say in how
    # it is glued inside, so at any one time it comes in one split only (never both a+bc and ab+c), and once joined stays so
    count, where = defaultdict(int), defaultdict(set)  # pair -> how often it occurs, pair -> the words that hold it
    for i, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            count[left + right] += times[i]
            where[left + right].add(i)
    heap = [(-n, pair) for pair, n in count.items()]  # the smallest comes out first: highest count, then lowest bytes
    heapq.heapify(heap)

    while heap and len(ranks) < vocab_size:
        n, best = heapq.heappop(heap)
        if -n != count[best]:
            continue  # out of date: a newer entry was pushed when the count changed
        if count[best] < 2:
            break  # what occurs once is no pattern
        ranks.append(best)
        change = defaultdict(int)
        for i in where.pop(best):
            old, new = words[i], []
            for token in old:
                # left to right as tiktoken does it; a pair just joined is too long to match again
                if new and new[-1] + token == best:
                    new[-1] = best
                else:
                    new.append(token)
            for left, right in zip(old, old[1:]):
                change[left + right] -= times[i]
            for left, right in zip(new, new[1:]):
                change[left + right] += times[i]
                where[left + right].add(i)
            words[i] = new
        for pair, delta in change.items():
            if delta:
                count[pair] += delta
                heapq.heappush(heap, (-count[pair], pair))
    return ranks


class Tokenizer:
    """Token ids are 0 .. n-1 for the n ranks, then pad, bos, eos, mask = n .. n+3; vocab_size = n + 4.

    ranks and pattern rebuild the tokenizer, so a checkpoint keeps both. word_start is a list of vocab_size bools: False where a
    token goes on with the word before it (it begins with a letter, a digit or a cut-off character), True elsewhere.
    ValueError if ranks holds a token twice or lacks a single byte.
    """

    def __init__(self, ranks: list[bytes], pattern: str = PATTERN):
        table = {token: i for i, token in enumerate(ranks)}
        if len(table) != len(ranks) or any(bytes([byte]) not in table for byte in range(256)):
            raise ValueError("ranks must hold all 256 single bytes and no token twice")
        self.ranks, self.pattern = list(ranks), pattern
        # tiktoken is told of no special tokens: there is no text that could spell one
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=table, special_tokens={})
        self.pad, self.bos, self.eos, self.mask = range(len(ranks), len(ranks) + 4)
        self.vocab_size = len(ranks) + 4
        self.word_start = [not INSIDE.match(token.decode(errors="replace")) for token in ranks] + [True] * 4

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's own 50,257 - 1 ranks and pattern. ValueError, saying which files go where, if they cannot be downloaded."""
        import requests  # comes along with tiktoken; here and not above: --help should not wait for it
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
        folder = os.path.join(tempfile.gettempdir(), "data-gym-cache") if folder is None else folder
        names = [hashlib.sha1(url.encode()).hexdigest() for url in GPT2_FILES]  # what tiktoken calls them
        try:
            for url, name in zip(GPT2_FILES, names):
                if not os.path.exists(os.path.join(folder, name)):
                    requests.head(url, timeout=5).raise_for_status()  # tiktoken sets no timeout: offline it could hang
            encoding = tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' own errors are OSErrors too
            files = " and ".join(f"{url} as {name}" for url, name in zip(GPT2_FILES, names))
            raise ValueError(f"GPT-2's vocabulary could not be downloaded: save {files} in one folder (no ending is added "
                             "to the names) and set the variable TIKTOKEN_CACHE_DIR to that folder") from error
        return cls([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)], encoding._pat_str)

    def state(self) -> dict:
        """A dict of plain strings that `from_state` turns back into this tokenizer: what checkpoints and corpora store."""
        return dict(pattern=self.pattern, ranks=[base64.b64encode(rank).decode() for rank in self.ranks])

    @classmethod
    def from_state(cls, state: dict) -> "Tokenizer":
        """The tokenizer that `state` describes."""
        return cls([base64.b64decode(rank) for rank in state["ranks"]], state["pattern"])

    def encode(self, text: str) -> list[int]:
        """Ids of a text, all below pad: specials are added by the caller, never read from the text."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """encode of each text, on several threads."""
        return self.encoding.encode_ordinary_batch(texts)

    def decode(self, ids: list[int]) -> str:
        """Text of a list of ids, specials left out, bytes that are no UTF-8 as U+FFFD. KeyError if an id >= vocab_size."""
        return self.encoding.decode([i for i in ids if not self.pad <= i <= self.mask], errors="replace")
