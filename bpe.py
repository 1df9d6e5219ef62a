"""Byte-level BPE for captions (2.2, B.2): Sennrich et al. 2015, with Provilkov et al.'s dropout.

A caption is lowercased and cut into words, digits, signs and spaces; the UTF-8 bytes of a word are
merged pair by pair into larger pieces, all else stays bytes. Ids 0..255 are the bytes, 256 + k is
the piece made by the k-th merge, so any text can be encoded and there is no unknown token:

>>> bpe = BPE.train(["a red cube", "a red cone"], vocab_size=264)
>>> [bpe.pieces[i] for i in bpe.encode("A red CUBE")]
[b'a', b' ', b'red', b' ', b'c', b'u', b'b', b'e']

While the prior trains, a tenth of the merges is dropped at random (Provilkov et al. 2019), so that
it sees each word in many spellings.

Left out: special tokens (start-of-text and the pads belong to the prior), texts kept in upper case,
and vocabularies of other tokenizers.
"""

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from pathlib import Path

import regex

# Runs of a to z; runs of other letters and the marks on them; any other character alone. The first
# author: the text is split on anything except a to z, and what is no letter never merges. Our
# reading: other letters merge as well, or each would take two to four tokens of a caption's 255;
# a run is cut after 64 characters, so that a text takes linear time, whatever it is.
WORDS = regex.compile(r"[a-z]{1,64}|[[\p{L}\p{M}]--[a-z]]{1,64}|.", regex.DOTALL | regex.VERSION1)
LETTER = regex.compile(r"[\p{L}\p{M}]")  # at the start of what merges
LONGEST_WORD = 4 * 64  # in bytes
CACHED_WORDS = 2**16
FORMAT = "byte-level BPE 2"


def words(text: str) -> list[str]:
    """Lowercase and cut: "A red cube!" -> ["a", " ", "red", " ", "cube", "!"]; nothing is lost."""
    if not isinstance(text, str):
        raise ValueError(f"expected a text, a str; got {type(text).__name__}")
    return WORDS.findall(text.lower())


def to_bytes(word: str) -> bytes:
    """UTF-8; a lone surrogate, which has no UTF-8, becomes "?"."""
    return word.encode("utf-8", errors="replace")


class BPE:
    """Text to ids and back by a list of merges; the earlier a merge, the better its rank.

    merges: (left id, right id) of pieces that exist before it, so both are below 256 + its own
    index; no pair twice, no piece longer than a word can be. Anything else is a ValueError.
    """

    def __init__(self, merges: Iterable[tuple[int, int]] = ()):
        self.merges: list[tuple[int, int]] = []
        self.pieces = [bytes([i]) for i in range(256)]  # id -> bytes
        self.new_id: dict[tuple[int, int], int] = {}  # pair -> id; the smaller, the better its rank
        self.cache: dict[str, list[int]] = {}  # word -> ids without dropout
        for new, pair in enumerate(map(tuple, merges), start=256):
            if not (len(pair) == 2 and all(type(i) is int and 0 <= i < new for i in pair)):
                raise ValueError(f"merge {new - 256} is not a pair of ids from 0 to {new - 1}")
            if pair in self.new_id:
                raise ValueError(f"merge {new - 256} repeats merge {self.new_id[pair] - 256}")
            piece = self.pieces[pair[0]] + self.pieces[pair[1]]
            if len(piece) > LONGEST_WORD:
                raise ValueError(f"merge {new - 256} makes a piece of over {LONGEST_WORD} bytes")
            self.merges.append(pair)
            self.pieces.append(piece)
            self.new_id[pair] = new

    def __reduce__(self):
        return BPE, (self.merges,)  # a DataLoader's worker gets the merges and fills its own cache

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPE":
        """Up to vocab_size - 256 times, merge the most frequent pair everywhere: Algorithm 1 of
        Sennrich et al., whom the paper cites (2.2).

        Of equally frequent pairs the one with the smallest ids (left, then right) is taken. Where
        no pair occurs twice any more, .vocab_size of the result is smaller than asked for. The
        texts are read once; memory grows with the number of distinct words.
        ValueError: a vocab_size below the 256 bytes, or one text in place of many.
        """
        if vocab_size < 256:
            raise ValueError(f"vocab_size is {vocab_size}; the bytes alone take 256")
        if isinstance(texts, str):
            raise ValueError("texts is one str; expected an iterable of them, such as [text]")
        counts = Counter(word for text in texts for word in words(text) if LETTER.match(word))
        corpus = [(list(to_bytes(word)), n) for word, n in counts.items()]

        occurrences, where = Counter(), defaultdict(set)  # pair -> how often, in which words
        for w, (ids, n) in enumerate(corpus):
            for pair in zip(ids, ids[1:]):
                occurrences[pair] += n
                where[pair].add(w)
        heap = [(-n, pair) for pair, n in occurrences.items()]
        heapify(heap)

        merges = []
        while heap and 256 + len(merges) < vocab_size:
            n, pair = heappop(heap)
            if -n != occurrences[pair]:  # other merges took some: back to its true place
                heappush(heap, (-occurrences[pair], pair))
                continue
            if -n < 2:
                break
            left, right = pair
            new = 256 + len(merges)
            merges.append(pair)
            born = set()
            for w in where.pop(pair):
                ids, n = corpus[w]
                for old in zip(ids, ids[1:]):
                    occurrences[old] -= n
                i = 0
                while i < len(ids) - 1:  # from the left: "aaa" becomes "aa", "a"
                    if ids[i] == left and ids[i + 1] == right:
                        ids[i : i + 2] = [new]
                    i += 1
                for neighbours in zip(ids, ids[1:]):
                    occurrences[neighbours] += n
                    if new in neighbours:
                        born.add(neighbours)
                        where[neighbours].add(w)
            # Only pairs with the new piece have become more frequent, so the heap is whole again.
            for neighbours in born:
                heappush(heap, (-occurrences[neighbours], neighbours))
        return cls(merges)

    def encode(
        self, text: str, dropout: float = 0.0, rng: random.Random | None = None
    ) -> list[int]:
        """Ids of the lowercased text; lone surrogates become "?".

        dropout: the probability p in [0, 1], else ValueError. 0 is plain BPE, 1 gives the bytes.
        rng: where the coins come from, Python's own by default.
        """
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}; expected a probability from 0 to 1")
        ids = []
        for word in words(text):
            if dropout:
                ids += self.merge(word, dropout, rng or random)
                continue
            if word not in self.cache:
                if len(self.cache) >= CACHED_WORDS:
                    self.cache.clear()
                self.cache[word] = self.merge(word)
            ids += self.cache[word]
        return ids

    def merge(self, word: str, dropout: float = 0.0, rng=random) -> list[int]:
        """Ids of one word. At every step each applicable merge is dropped with probability p (B.2).

        Our reading: every occurrence has a coin of its own, thrown anew at every step; the
        best-ranked survivor (the leftmost of equals) is applied, one occurrence, until nothing
        survives. Read so, the exact probability of every spelling can be enumerated.
        """
        ids, new_id, coin = list(to_bytes(word)), self.new_id, rng.random
        if not LETTER.match(word):  # a digit, a sign, a space: its bytes stay apart
            return ids
        while True:
            survivors = [
                (new_id[pair], i)
                for i, pair in enumerate(zip(ids, ids[1:]))
                if pair in new_id and (not dropout or coin() >= dropout)
            ]
            if not survivors:
                return ids
            new, i = min(survivors)
            ids[i : i + 2] = [new]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids in 0..vocab_size - 1, else ValueError. Broken UTF-8 is shown as U+FFFD."""
        ids = list(ids)
        for i in ids:
            if not (hasattr(i, "__index__") and 0 <= i < self.vocab_size):
                raise ValueError(f"id {i!r} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        return b"".join([self.pieces[i] for i in ids]).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, a merge per line as [left id, right id, text]; whole or not at all."""
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in self._rows())
        text = f'{{"format": "{FORMAT}", "merges": [\n{lines}\n]}}\n'
        unfinished = Path(f"{path}.tmp")
        try:
            unfinished.write_text(text, encoding="utf-8", newline="")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPE":
        """Read what save wrote; the texts in it, which are for people, must be those of the pieces.

        ValueError, in one line: no JSON, another format, merges that cannot be, or a damaged file.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ValueError(f'its format is not "{FORMAT}" (1 cut words otherwise)')
            bpe = cls((left, right) for left, right, _ in data["merges"])
            if data["merges"] != bpe._rows():
                raise ValueError("a merge does not make the text beside it")
            return bpe
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            hint = "expected a file written by BPE.save; train one with BPE.train(texts, size)"
            raise ValueError(f"{path} cannot be used: {error}; {hint}") from None

    def _rows(self) -> list[list]:
        texts = [piece.decode("utf-8", errors="backslashreplace") for piece in self.pieces[256:]]
        return [[left, right, text] for (left, right), text in zip(self.merges, texts)]


if __name__ == "__main__":
    caption = "a red cube to the left of a blue sphere"
    bpe = BPE.train([caption] * 2, 1024)  # every pair occurs twice, so every word becomes a piece
    for p in (0, 0.1, 0.1, 0.5, 1):
        print(f"p = {p:<4}", "|".join(bpe.pieces[i].decode() for i in bpe.encode(caption, p)))
