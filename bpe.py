"""Byte-level BPE for captions (2.2, B.2): training, encoding with BPE dropout, decoding, files.

A caption is lowercased, cut into words, and each word's UTF-8 bytes are merged pair by pair into
larger pieces. Ids 0..255 are the bytes, 256 + k is the piece made by the k-th merge, so any text
can be encoded and there is no unknown token. While the prior trains, a tenth of the merges is
dropped at random (Provilkov et al. 2019), so that it sees each word in many spellings:

>>> bpe = BPE.train(["a red cube", "a red cone"], vocab_size=264)
>>> [bpe.pieces[i] for i in bpe.encode("A red CUBE")]
[b'a', b' red', b' c', b'u', b'b', b'e']

Left out: special tokens (start-of-text and the pads belong to the prior), texts kept in upper case,
and vocabularies of other tokenizers.
"""

import json
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from pathlib import Path

import regex
from tqdm import tqdm

# GPT-2's pattern: letters, digits or other marks, each with the space before them; English endings
# ('s, 're); white space. Every character falls into one of these, and no merge crosses a cut.
WORDS = regex.compile(r" ?\p{L}+| ?\p{N}+|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
CACHED_WORDS, CACHED_LENGTH = 2**16, 64  # what the cache of words may hold
MAX_BYTES = 2**26  # of all pieces together; real ones need 8 bytes each, a hostile file 2**16384


def words(text: str) -> list[str]:
    """Lowercase and cut: "A red cube!" -> ["a", " red", " cube", "!"]; no character is lost."""
    if not isinstance(text, str):
        raise ValueError(f"expected a text, a str; got {type(text).__name__}")
    return WORDS.findall(text.lower())


def to_bytes(word: str) -> bytes:
    """UTF-8; a lone surrogate, which has no UTF-8, becomes "?"."""
    return word.encode("utf-8", errors="replace")


def readable(piece: bytes) -> str:
    """For people: bytes that are no whole character are shown as \\xe2."""
    return piece.decode("utf-8", errors="backslashreplace")


def learn_merges(counts: dict[str, int], n_merges: int, progress: bool) -> list[tuple[int, int]]:
    """Up to n_merges times, merge the most frequent pair of neighbours everywhere.

    Of equally frequent pairs the one with the smallest ids (left, then right) is taken. Ends early
    when no pair occurs twice. A word's pairs count as often as the word occurs in the corpus.

    All distinct words lie in one list, a slot for each byte and a -1 behind each word. A piece
    writes its id into its first and its last slot and -1 between, so both neighbours of a piece
    are found from its ends, and a merge costs only as much as the pair has occurrences.
    """
    ids, weight = [-1], [0]
    for word, n in counts.items():
        ids += [*to_bytes(word), -1]
        weight += [n] * (len(ids) - len(weight))
    size = [1] * 256

    count, where = defaultdict(int), defaultdict(list)  # pair -> occurrences, slots of its left
    for i in range(len(ids) - 1):
        if ids[i] >= 0 and ids[i + 1] >= 0:
            count[ids[i], ids[i + 1]] += weight[i]
            where[ids[i], ids[i + 1]].append(i)
    heap = [(-n, pair) for pair, n in count.items()]
    heapify(heap)

    merges = []
    bar = tqdm(total=n_merges, desc="merges", disable=not progress)
    while heap and len(merges) < n_merges:
        n, pair = heappop(heap)
        if -n != count[pair]:  # other merges took some of its occurrences: back to its true place
            heappush(heap, (-count[pair], pair))
            continue
        if -n < 2:
            break
        left, right = pair
        new = 256 + len(merges)
        merges.append(pair)
        size.append(size[left] + size[right])
        born = defaultdict(list)
        for i in where.pop(pair):  # ascending, so in "aaa" the left two are merged
            j = i + size[left]
            end = j + size[right]
            if ids[i] != left or ids[j] != right:  # an earlier merge took one of the two
                continue
            before, after = ids[i - 1], ids[end]
            if before >= 0:
                count[before, left] -= weight[i]
                count[before, new] += weight[i]
                born[before, new].append(i - size[before])
            if after >= 0:
                count[right, after] -= weight[i]
                count[new, after] += weight[i]
                born[new, after].append(i)
            ids[j - 1] = ids[j] = -1
            ids[i] = ids[end - 1] = new
        del count[pair]
        # Only pairs with the new piece have become more frequent, so the heap is complete again.
        for pair in born:
            heappush(heap, (-count[pair], pair))
        where.update(born)
        bar.update()
    bar.close()
    return merges


class BPE:
    """Text to ids and back by a list of merges; the earlier a merge, the higher its rank.

    merges: (left id, right id) of pieces that exist before it: both below 256 + its own index, no
    pair twice. Anything else is a ValueError.
    """

    def __init__(self, merges: Iterable[tuple[int, int]] = ()):
        self.merges: list[tuple[int, int]] = []
        self.pieces = [bytes([i]) for i in range(256)]  # id -> bytes
        self.size = [1] * 256  # id -> number of bytes
        self.new_id: dict[tuple[int, int], int] = {}  # pair -> id; the smaller, the higher its rank
        self.cache: dict[str, tuple[list[int], int]] = {}  # word -> plain ids, number of merges
        total = 0
        for pair in map(tuple, merges):
            new = len(self.pieces)
            if not (len(pair) == 2 and all(type(i) is int and 0 <= i < new for i in pair)):
                raise ValueError(f"merge {new - 256} is not a pair of ids from 0 to {new - 1}")
            if pair in self.new_id:
                raise ValueError(f"merge {new - 256} repeats merge {self.new_id[pair] - 256}")
            left, right = pair
            self.size.append(self.size[left] + self.size[right])
            total += self.size[new]
            if total > MAX_BYTES:
                raise ValueError(f"merge {new - 256} takes the pieces beyond {MAX_BYTES:,} bytes")
            self.merges.append(pair)
            self.pieces.append(self.pieces[left] + self.pieces[right])
            self.new_id[pair] = new

    def __reduce__(self):
        return BPE, (self.merges,)  # a DataLoader's worker gets the merges and fills its own cache

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: bool = False) -> "BPE":
        """Learn vocab_size - 256 merges from any iterable of texts, read once.

        Memory grows with the number of distinct words. Where the texts have too few pairs that
        occur twice, .vocab_size of the result is smaller than asked for.
        ValueError: a vocab_size below the 256 bytes, or one text in place of many.
        """
        if vocab_size < 256:
            raise ValueError(f"vocab_size is {vocab_size}; the bytes alone take 256")
        if isinstance(texts, str):
            raise ValueError("texts is one str; expected an iterable of them, such as [text]")
        counts = Counter()
        for text in tqdm(texts, desc="texts", disable=not progress):
            counts.update(words(text))
        bpe = cls(learn_merges(counts, vocab_size - 256, progress))
        if progress and bpe.vocab_size < vocab_size:
            tqdm.write(f"No pair occurs twice any more: {bpe.vocab_size} ids, not {vocab_size}.")
        return bpe

    def encode(
        self, text: str, dropout: float = 0.0, rng: random.Random | None = None
    ) -> list[int]:
        """Ids of the lowercased text; lone surrogates become "?".

        dropout: probability p in [0, 1], else ValueError. Our reading (B.2): at every step each
        applicable merge occurrence is dropped with probability p, drawn anew; the best-ranked
        survivor (the leftmost of equals) is applied; a word ends when nothing survives. Read so,
        the exact probability of every spelling can be enumerated. 0 is plain BPE, 1 gives the
        bytes. rng: where the draws come from, Python's own by default.

        Draws matter only down to the first survivor, so candidates are drawn best first, one after
        the other, and "how many are kept before the next is dropped" is a single geometric
        variable. A word that needs fewer merges than that comes out plain, from the cache.
        """
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}; expected a probability from 0 to 1")
        draw = (rng or random).random
        log_keep = math.log1p(-dropout) if dropout < 1 else -math.inf

        def kept_until_drop() -> float:  # P(at least k) = (1 - p)^k; the whole part is what counts
            return math.log(1 - draw()) / log_keep if dropout else math.inf

        ids, kept = [], kept_until_drop()
        for word in words(text):
            plain, n_merges = self.cache.get(word) or self._encode_plain(word)
            if n_merges <= kept:
                ids += plain
                kept -= n_merges
            else:
                pieces, kept = self._merge(to_bytes(word), kept, kept_until_drop)
                ids += pieces
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids in 0..vocab_size - 1, else ValueError. Broken UTF-8 is shown as U+FFFD."""
        ids = list(ids)
        for i in ids:
            if not (hasattr(i, "__index__") and 0 <= i < self.vocab_size):
                raise ValueError(f"id {i!r} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        return b"".join([self.pieces[i] for i in ids]).decode("utf-8", errors="replace")

    def _encode_plain(self, word: str) -> tuple[list[int], int]:
        data = to_bytes(word)
        ids, _ = self._merge(data, math.inf, None)
        entry = ids, len(data) - len(ids)
        if len(word) <= CACHED_LENGTH:
            if len(self.cache) >= CACHED_WORDS:
                self.cache.clear()
            self.cache[word] = entry
        return entry

    def _merge(
        self, word: bytes, kept: float, kept_until_drop: Callable[[], float] | None
    ) -> tuple[list[int], float]:
        """Merge one word, dropping a candidate each time kept runs out; the ids and kept's rest.

        Slots as in learn_merges; the -1 at the end is also what ids[-1] finds before the first
        piece. The heap holds new id * n + slot, so its top is the best rank, the leftmost of
        equals: O(n log n) steps, for plain BPE the same as merging all of a pair at once.
        """
        new_id, size, merges = self.new_id, self.size, self.merges
        ids = [*word, -1]
        n = len(ids)
        heap = [new_id[p] * n + i for i, p in enumerate(zip(word, word[1:])) if p in new_id]
        heapify(heap)
        dropped = []
        while heap:
            candidate = heappop(heap)
            new, i = divmod(candidate, n)
            left, right = merges[new - 256]
            j = i + size[left]
            if ids[i] != left or ids[j] != right:  # an earlier merge took one of the two
                continue
            if kept < 1:
                dropped.append(candidate)
                kept = kept_until_drop()
                continue
            kept -= 1
            end = j + size[right]
            ids[j - 1] = ids[j] = -1
            ids[i] = ids[end - 1] = new
            before, after = ids[i - 1], ids[end]
            if (before, new) in new_id:
                heappush(heap, new_id[before, new] * n + i - size[before])
            if (new, after) in new_id:
                heappush(heap, new_id[new, after] * n + i)
            while dropped:  # the next step draws them anew
                heappush(heap, dropped.pop())
        result, i = [], 0
        while i < n - 1:
            result.append(ids[i])
            i += size[ids[i]]
        return result, kept

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, a merge per line as [left id, right id, text]; whole or not at all."""
        rows = zip(self.merges, self.pieces[256:])
        lines = [json.dumps([*m, readable(p)], ensure_ascii=False) for m, p in rows]
        text = '{"format": "byte-level BPE 1", "merges": [\n' + ",\n".join(lines) + "\n]}\n"
        unfinished = Path(f"{path}.tmp")
        try:
            with open(unfinished, "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
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
            if not isinstance(data, dict) or data.get("format") != "byte-level BPE 1":
                raise ValueError('no JSON object with "format": "byte-level BPE 1"')
            rows = data.get("merges")
            if not isinstance(rows, list) or any(type(r) is not list or len(r) != 3 for r in rows):
                raise ValueError('"merges" is not a list of [left id, right id, text]')
            bpe = cls((left, right) for left, right, _ in rows)
            for k, (row, piece) in enumerate(zip(rows, bpe.pieces[256:])):
                if row[2] != readable(piece):
                    raise ValueError(f"merge {k} does not make the text beside it")
            return bpe
        except (ValueError, RecursionError) as error:
            hint = "expected a file written by BPE.save; train one with BPE.train(texts, size)"
            raise ValueError(f"{path} cannot be used: {error}; {hint}") from None


def main():
    import argparse
    import sys

    parser = argparse.ArgumentParser(description="Show how BPE cuts a caption into pieces (B.2).")
    parser.add_argument("text", nargs="?", default="a red cube to the left of a blue sphere")
    parser.add_argument("--dropout", type=float, default=0.1, help="probability (default: 0.1)")
    parser.add_argument("--draws", type=int, default=5, help="encodings with dropout to show")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bpe", metavar="FILE", help="vocabulary (default: the shipped one)")
    parser.error = lambda message: parser.exit(2, f"bpe.py: {message}\n")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a character

    here = Path(__file__).resolve().parent
    shipped, readme = here / "pretrained/tiny/bpe.json", here / "README.md"
    try:
        if args.bpe or shipped.exists():
            bpe = BPE.load(args.bpe or shipped)
            print(f"vocabulary: {args.bpe or shipped}, {bpe.vocab_size} ids")
        else:
            files = [path for path in (readme, here / "bpe.py") if path.exists()]
            bpe = BPE.train((path.read_text(encoding="utf-8") for path in files), 1024)
            print(f"vocabulary: {bpe.vocab_size} ids, just trained on the texts of this folder")

        def show(ids):
            shown = [readable(bpe.pieces[i]).replace(" ", "·") for i in ids]
            return "|".join(s if s.isprintable() else repr(s)[1:-1] for s in shown)

        plain = bpe.encode(args.text)
        print(f"plain:      {show(plain)}\nids:        {' '.join(map(str, plain))}")
        rng, label = random.Random(args.seed), f"p = {args.dropout:g}:"
        for _ in range(args.draws):
            print(f"{label:<11} {show(bpe.encode(args.text, args.dropout, rng))}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
