"""bpe.py against a worked example, brute-force references and exact probabilities."""

import doctest
import itertools
import json
import pickle
import random
import subprocess
import sys
from collections import Counter
from unicodedata import category
from unittest import mock

import pytest
import regex

import bpe as bpe_module
from bpe import BPE, words

CAPTIONS = [
    "A red cube to the left of a blue sphere.",
    "a small green cylinder above 2 large yellow cones",
    "The photo isn't of 12 cubes; it's a pyramid, they're told",
    "ein grüner Würfel, 赤い立方体 and a 😀 cube\n",
] * 3


def random_text(rng: random.Random) -> str:
    ranges = [(32, 126), (97, 100), (0, 32), (0x80, 0x2FF), (0x370, 0x5FF), (0x2000, 0x206F)]
    ranges += [(0x4E00, 0x9FFF), (0xD800, 0xDFFF), (0x1F300, 0x1FAFF), (0, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


def random_letters(rng: random.Random) -> str:
    """Texts of characters that Python's table of characters and regex's both know."""
    return regex.sub(r"\p{Cn}", "", "".join(c for c in random_text(rng) if category(c) != "Cn"))


def is_letter(c: str) -> bool:
    return category(c)[0] in "LM"  # letters, and marks such as accents written apart


def words_naively(text: str) -> list[str]:
    """One character at a time: does it go on with the run before it?"""
    result, kind_before = [], None
    for c in text.lower():
        kind = "a to z" if "a" <= c <= "z" else "other letters" if is_letter(c) else None
        if kind and kind == kind_before and len(result[-1]) < 64:
            result[-1] += c
        else:
            result.append(c)
        kind_before = kind
    return result


def random_merges(rng: random.Random, n: int) -> list[tuple[int, int]]:
    """Merges over a, b and c that no training would give, in any order that is allowed."""
    ids, merges = [97, 98, 99], []
    for _ in range(n):
        pair = rng.choice(ids), rng.choice(ids)
        if pair not in merges:
            ids.append(256 + len(merges))
            merges.append(pair)
    return merges


def apply_at(ids, i, new):
    return (*ids[:i], new, *ids[i + 2 :])


def candidates(ids, merges):
    """Applicable merge occurrences as (new id, place of its left piece), best first."""
    pairs = enumerate(zip(ids, ids[1:]))
    return sorted((256 + merges.index(pair), i) for i, pair in pairs if pair in merges)


def encode_naively(data: bytes, merges):
    ids = tuple(data)
    while found := candidates(ids, merges):
        ids = apply_at(ids, found[0][1], found[0][0])
    return list(ids)


def merge_all_at_once(ids, pair, new):
    """The textbook's step: one pass from the left, every occurrence of the pair."""
    result, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            result.append(new)
            i += 2
        else:
            result.append(ids[i])
            i += 1
    return result


def train_naively(texts, vocab_size):
    found = [word for text in texts for word in words_naively(text) if is_letter(word[0])]
    corpus, merges = [list(word.encode()) for word in found], []
    while 256 + len(merges) < vocab_size:
        counts = Counter(pair for ids in corpus for pair in zip(ids, ids[1:]))
        if not counts or max(counts.values()) < 2:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        corpus = [merge_all_at_once(ids, pair, 256 + len(merges)) for ids in corpus]
        merges.append(pair)
    return merges


def exact_probabilities(ids, merges, p):
    """Final ids -> probability, by the literal process: all subsets of survivors at every step."""
    found = candidates(ids, merges)
    result = Counter()
    for kept in itertools.product([False, True], repeat=len(found)):
        weight = (1 - p) ** sum(kept) * p ** (len(found) - sum(kept))
        survivors = [candidate for candidate, k in zip(found, kept) if k]
        if not survivors:
            result[ids] += weight
            continue
        new, i = min(survivors)
        for final, q in exact_probabilities(apply_at(ids, i, new), merges, p).items():
            result[final] += weight * q
    return result


@pytest.fixture(scope="module")
def trained() -> BPE:
    return BPE.train(CAPTIONS, 400)


def test_examples_of_the_docstring():
    assert doctest.testmod(bpe_module).failed == 0


def test_worked_example():
    # Wikipedia, "Byte-pair encoding": aaabdaaabac -> XdXac with Z = aa, Y = ab, X = ZY.
    bpe = BPE.train(["aaabdaaabac"], 1000)
    assert bpe.merges == [(97, 97), (97, 98), (256, 257)]  # then no pair occurs twice
    assert bpe.vocab_size == 259
    assert bpe.encode("AAABDAAABAC") == [258, 100, 258, 97, 99]
    assert bpe.pieces[258] == b"aaab"


def test_words():
    assert words("a red cube 12") == ["a", " ", "red", " ", "cube", " ", "1", "2"]
    assert words("It's  3D_x,\n😀😀") == ["it", *"'s  3d_x,\n😀😀"]
    assert words("Grün") == ["gr", "ü", "n"]
    assert words("МИР नमस्ते 立方体") == ["мир", " ", "नमस्ते", " ", "立方体"]
    assert words("cafe\u0301") == ["cafe", "\u0301"]  # an accent written apart
    for run in ("a" * 130, "é" * 130):
        assert [len(word) for word in words(run)] == [64, 64, 2]
    rng = random.Random(9)
    for text in CAPTIONS + [random_letters(rng) for _ in range(2000)]:
        assert words(text) == words_naively(text)


def test_spaces_digits_and_signs_never_merge():
    trained = BPE.train(["a red cube 12 1212  😀😀…… "] * 9, 1000)
    assert sorted(trained.pieces[256:]) == [b"be", b"cu", b"cube", b"ed", b"red"]
    pieces = [trained.pieces[i].decode() for i in trained.encode("a red cube 12")]
    assert pieces == ["a", " ", "red", " ", "cube", " ", "1", "2"]
    text = "a 12 1212  a😀😀……a "
    data = text.encode()
    every_pair = BPE(dict.fromkeys(zip(data, data[1:])))  # merges that no training would give
    for dropout in (0, 0.1):
        assert every_pair.encode(text, dropout) == list(data)


def test_words_cover_any_text_and_round_trip(trained):
    rng = random.Random(0)
    for _ in range(2000):
        text = random_text(rng)
        assert "".join(words(text)) == text.lower()
        expected = text.lower().encode("utf-8", "replace").decode()  # lone surrogates become "?"
        assert trained.decode(trained.encode(text)) == expected
        assert trained.decode(trained.encode(text, 0.5, rng)) == expected


def test_training_equals_recounting_everything():
    rng = random.Random(1)
    corpora = [["".join(rng.choices("aab ", k=30)) for _ in range(6)] for _ in range(40)]
    corpora += [["a" * n for n in range(1, 20)], CAPTIONS, [random_letters(rng) for _ in range(60)]]
    for texts in corpora:
        for vocab_size in (256, 260, 330):
            bpe = BPE.train(iter(texts), vocab_size)
            assert bpe.merges == train_naively(texts, vocab_size)
            assert bpe.vocab_size == 256 + len(bpe.merges) <= vocab_size


def test_encoding_equals_brute_force():
    rng = random.Random(2)
    for _ in range(300):
        merges = random_merges(rng, 12)
        bpe = BPE(merges)
        text = "".join(rng.choices("aaabc", k=rng.randrange(25)))
        ids = list(text.encode())
        assert bpe.encode(text) == encode_naively(text.encode(), merges)
        for k, pair in enumerate(merges):  # one occurrence at a time or all of a pair at once
            ids = merge_all_at_once(ids, pair, 256 + k)
        assert bpe.encode(text) == ids


def test_merges_never_cross_a_cut(trained):
    rng = random.Random(3)
    for text in CAPTIONS + [random_text(rng) for _ in range(300)]:
        for dropout in (0, 0.1):
            pieces = [trained.pieces[i] for i in trained.encode(text, dropout, rng)]
            ends = set(itertools.accumulate(len(piece) for piece in pieces))
            cuts = itertools.accumulate(len(w.encode("utf-8", "replace")) for w in words(text))
            assert ends.issuperset(cuts)


def test_dropout_of_nothing_and_of_everything(trained):
    for text in CAPTIONS:
        assert trained.encode(text, 0) == trained.encode(text)
        assert trained.encode(text, 1) == list(text.lower().encode())
        draws = [trained.encode(text, 0.3, random.Random(seed)) for seed in (5, 5, 6)]
        assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("text", ["aaab", "abcab", "ab aab"])
def test_dropout_has_the_exact_probabilities(text, p):
    # Merges that overlap, repeat and build on one another.
    a, b, c = b"abc"
    merges = [(a, a), (b, c), (a, b), (258, c), (256, 258), (a, 257), (32, a), (256, b), (260, 260)]
    bpe, n = BPE(merges), 20_000
    exact = Counter({(): 1.0})
    for word in words(text):  # independent, though the implementation carries draws across words
        probabilities = exact_probabilities(tuple(word.encode()), merges, p)
        pairs = itertools.product(exact.items(), probabilities.items())
        exact = Counter({(*x, *y): px * py for (x, px), (y, py) in pairs})
    assert sum(exact.values()) == pytest.approx(1) and len(exact) > 3

    rng = random.Random(4)
    drawn = Counter(tuple(bpe.encode(text, p, rng)) for _ in range(n))
    assert set(drawn) <= set(exact)
    for ids, q in exact.items():
        assert abs(drawn[ids] - n * q) < 5 * (n * q * (1 - q)) ** 0.5 + 1, (ids, q)


def test_long_words_take_no_quadratic_scan():
    # 100,000 letters squared would be hours, not a second.
    n = 100_000
    bpe = BPE.train(["a" * 5000], 300)
    for dropout in (0, 0.1, 0.5):
        assert bpe.decode(bpe.encode("a" * n, dropout)) == "a" * n
    letters = "".join(random.Random(7).choices("abcdefgh", k=n))
    bpe = BPE.train([letters], 1000)
    assert bpe.decode(bpe.encode(" " * n + letters)) == " " * n + letters


def test_the_cache_is_bounded_and_does_not_travel(trained, monkeypatch):
    monkeypatch.setattr(bpe_module, "CACHED_WORDS", 5)
    bpe = BPE(trained.merges)
    for text in CAPTIONS + ["a" * 1000]:
        assert bpe.encode(text) == bpe.encode(text) == trained.encode(text)
        assert len(bpe.cache) <= 5 and "a" * 1000 not in bpe.cache
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy.merges == bpe.merges and not copy.cache
    assert copy.encode(CAPTIONS[0]) == bpe.encode(CAPTIONS[0])


def test_save_and_load(trained, tmp_path):
    path = tmp_path / "bpe.json"
    trained.save(path)
    trained.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["bpe.json"]
    assert BPE.load(path).merges == trained.merges
    assert BPE.load(str(path)).encode(CAPTIONS[3]) == trained.encode(CAPTIONS[3])
    rows = json.loads(path.read_text("utf-8"))["merges"]
    assert [text for *_, text in rows][0] == trained.pieces[256].decode()
    BPE().save(path)
    assert BPE.load(path).vocab_size == 256
    with mock.patch("os.replace", side_effect=OSError("no room")), pytest.raises(OSError):
        trained.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["bpe.json"]
    assert BPE.load(path).vocab_size == 256


GOOD = {"format": "byte-level BPE 2", "merges": [[97, 97, "aa"], [256, 98, "aab"]]}
BAD_ROWS = {
    "not yet defined": [[97, 256, ""]],
    "negative": [[-1, 97, ""]],
    "twice": [[97, 97, ""], [97, 97, ""]],
    "float": [[97.0, 97, ""]],
    "bool": [[True, 97, ""]],
    "text": [["a", 97, ""]],
    "nested": [[[97], 97, ""]],
    "short": [[97]],
    "no rows": "ab",
    "null": None,
    "doubling to 2^2000 bytes": [[97, 97, ""]] + [[256 + k, 256 + k, ""] for k in range(2000)],
}
BAD_FILES = {
    "empty": b"",
    "no JSON": b"merges: 1",
    "no UTF-8": b"\xff\xfe{}",
    "deep": b"[" * 200_000,
    "list": b"[]",
    "no format": json.dumps({"merges": []}).encode(),
    "other format": json.dumps({**GOOD, "format": "BPE 3"}).encode(),
    "words cut otherwise": json.dumps({**GOOD, "format": "byte-level BPE 1"}).encode(),
    "cut off": json.dumps(GOOD).encode()[:-3],
} | {name: json.dumps({**GOOD, "merges": rows}).encode() for name, rows in BAD_ROWS.items()}


@pytest.mark.parametrize("name", BAD_FILES)
def test_malformed_files_are_refused(name, tmp_path):
    path = tmp_path / "bpe.json"
    path.write_text(json.dumps(GOOD))
    assert BPE.load(path).encode("aab") == [257]
    path.write_bytes(BAD_FILES[name])
    with pytest.raises(ValueError, match="bpe.json.*expected a file written by BPE.save") as caught:
        BPE.load(path)
    assert "\n" not in str(caught.value)


def test_bad_arguments(trained):
    with pytest.raises(ValueError, match="256"):
        BPE.train(CAPTIONS, 255)
    with pytest.raises(ValueError, match="iterable"):
        BPE.train("one text", 300)
    for dropout in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            trained.encode("a", dropout)
    for text in (None, b"ab"):
        with pytest.raises(ValueError, match="a str"):
            trained.encode(text)
        with pytest.raises(ValueError, match="a str"):
            BPE.train([text], 300)
    for i in (-1, trained.vocab_size, 97.5, "a", None):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            trained.decode([97, i])


def test_agrees_with_tokenizers(trained):
    tokenizers = pytest.importorskip("tokenizers")
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    letter = {b: chr(b) for b in visible} | {b: chr(256 + k) for k, b in enumerate(hidden)}
    names = ["".join(letter[b] for b in piece) for piece in trained.pieces]
    assert len(set(names)) == len(names)
    merges = [(names[left], names[right]) for left, right in trained.merges]
    vocab = {name: i for i, name in enumerate(names)}
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    pattern = tokenizers.Regex(r"[a-z]+|[\p{L}\p{M}&&[^a-z]]+|(?m:.)")
    cut = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    to_letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, to_letters])
    rng = random.Random(8)
    alphabet = sorted(set("".join(CAPTIONS).lower())) + list("''  \n\t")
    texts = ["".join(rng.choices(alphabet, k=40)) for _ in range(500)]
    for text in CAPTIONS + texts:
        assert trained.encode(text) == peer.encode(text.lower()).ids


def test_demo():
    command = [sys.executable, bpe_module.__file__]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0 and "a| |red| |cube| |to" in done.stdout and done.stderr == ""
