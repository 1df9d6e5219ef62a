"""Files from strangers: hundreds of hostile ones, made by a seeded generator, and fuzzing.

Each is read as the trainers do, alone in a folder and in a tar. Nothing but ValueError may come
of it, nothing is written, nothing is printed, and what cannot be used is counted.
"""

import io
import json
import os
import random
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bpe import BPE
from data.files import MAX_TEXT, captions_in, open_pictures, read_image, tidy
from data.listings import preprocess_dvae, preprocess_prior
from data.loader import Samples
from data.sheets import sheet

fuzz = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def encoded(img, kind, **options):
    buffer = io.BytesIO()
    img.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(rng, shape):
    return Image.fromarray(np.random.default_rng(rng.getrandbits(32)).integers(0, 256, shape, "u1"))


def png(width, height, body, bits=8, color=0):
    """A PNG that claims a size."""

    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))  # fmt: skip

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def webp_canvas(width, height):
    frame = encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 4)), "WEBP", lossless=True)[12:]
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + size + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def metadata(rng):
    """EXIF blocks with values of no sense, one of them each."""
    nan = struct.pack("<HHII", 0x011A, 5, 1, 26) + bytes(4) + struct.pack("<II", 0, 0)
    odd = [
        struct.pack("<HHIHH", 0x0112, 3, 1, 99, 0) + bytes(4),  # orientation 99
        struct.pack("<HHI4s", 0x0112, 2, 4, b"up!\0") + bytes(4),  # in letters
        struct.pack("<HHId", 0x0112, 12, 1, float("nan"))[:12] + bytes(4),  # not a number
        struct.pack("<HHII", 0x0112, 3, 2**31, 2**31) + bytes(4),  # far outside
        nan,  # a resolution of 0 / 0
    ]
    blocks = [b"II*\0\x08\0\0\0\x01\0" + entry for entry in odd]
    return [b"Exif\0\0" + block for block in (*blocks, b"", b"II*\0", rng.randbytes(40))]


def hostile_images(rng):
    """(suffix, bytes, whether it can be read; None where damage may or may not be noticed)."""
    small = noise(rng, (40, 30, 3))
    whole = {".jpg": encoded(small, "JPEG"), ".jpeg": encoded(small, "JPEG", progressive=True),
             ".png": encoded(small, "PNG"), ".webp": encoded(small, "WEBP")}  # fmt: skip
    for suffix, content in whole.items():
        yield suffix, b"", False
        yield suffix, rng.randbytes(500), False
        yield suffix, b"<html><body>404 not found</body></html>", False
        yield suffix, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", False
        yield suffix, b"P6 1 1 255\nabc", False  # not a format that is asked for
        for foreign in whole.values():  # a wrong extension
            yield suffix, foreign, True
        for share in (0.02, 0.3, 0.6, 0.9):  # truncated; the end of a JPEG may be missed
            yield suffix, content[: int(share * len(content))], False
        for _ in range(20):  # flipped bits
            flipped = bytearray(content)
            for _ in range(rng.randrange(1, 6)):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            yield suffix, bytes(flipped), None
        for _ in range(4):  # a piece of one in another
            at = rng.randrange(len(content))
            yield suffix, content[:at] + rng.choice([*whole.values()])[at:], None
    # decompression bombs: by their header, by their canvas, by a comment
    yield ".png", png(60_000, 60_000, bytes(1000)), False
    yield ".png", png(2**31 - 1, 2**31 - 1, bytes(10), 16, 6), False
    yield ".png", png(9500, 9500, bytes(9500 * 1189), bits=1), False  # all of them are there
    yield ".gif.png", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\0;", False
    yield ".webp", webp_canvas(2**24, 2**24), False
    yield ".webp", webp_canvas(2**14, 2**14), False
    comment = zlib.compress(bytes(10**8))
    ztxt = struct.pack(">I", len(comment) + 3) + b"zTXta\0\0" + comment
    ztxt += struct.pack(">I", zlib.crc32(b"zTXta\0\0" + comment))
    yield ".png", whole[".png"][:33] + ztxt + whole[".png"][33:], None
    yield ".png", png(0, 5, b""), False
    yield ".png", png(5, 5, b"\0"), False
    # shapes and kinds that are unusual and fine
    for shape in ((1, 10_000), (10_000, 1), (1, 1), (2, 5000)):
        yield ".png", encoded(Image.new("RGB", shape, "red"), "PNG"), True
    gray = np.random.default_rng(0).integers(0, 65536, (9, 7), np.uint16)
    yield ".png", encoded(Image.fromarray(gray), "PNG"), True
    yield ".jpg", encoded(Image.fromarray(gray.astype(np.int32) * 9), "TIFF"), True
    odd = np.array([[np.nan, np.inf, -np.inf, 1e38, -1e38, 0]], np.float32)
    yield ".jpg", encoded(Image.fromarray(odd), "TIFF"), True
    yield ".jpg", encoded(small.convert("CMYK"), "JPEG"), True
    yield ".png", encoded(small.convert("P"), "PNG", transparency=3), True
    yield ".png", encoded(small.convert("1"), "PNG"), True
    yield ".bmp.png", encoded(small, "BMP"), True
    films = [noise(rng, (8, 8, 3)) for _ in range(30)]
    for kind in ("GIF", "PNG", "WEBP"):
        yield ".webp", encoded(films[0], kind, save_all=True, append_images=films[1:]), True
    for block in metadata(rng):
        yield ".jpg", encoded(small, "JPEG", exif=block), True
        yield ".png", encoded(small, "PNG", exif=block), True
        yield ".webp", encoded(small, "WEBP", exif=block), True


BLANKS = (b"", b"\n\n\r\n", b" \t ", b"\0\0\0", b"\xef\xbb\xbf", "\u2028\u3000".encode())


def hostile_captions(rng):
    """(bytes of a caption file, whether it holds a caption)."""
    yield from ((blank, False) for blank in BLANKS)
    yield b"a word " * 150_000, True
    yield b"x" * 2**20, True
    yield b"line\n" * 200_000, True
    yield "Größe".encode("latin-1"), True
    yield "a cat".encode("utf-16"), True
    yield b"\xff\xfe\xfd \xed\xa0\x80 \xc0\xaf", True
    yield b"a\0b\x1b[31mred\x07\x08\x7f\xc2\x85c", True
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308"
    for text in ("قطة حمراء على الأريكة", "חתול \u202eאדום\u202c", family * 50,
                 "Z" + "\u0301" * 5000, "\ufeffa", "\U0010ffff", "a\u200bb\u2066c"):  # fmt: skip
        yield text.encode(), True
    for _ in range(15):
        yield rng.randbytes(300) + b" x", True


def members(seed=0):
    """At least 200 pairs of picture and caption: (name, picture, text, usable)."""
    rng = random.Random(seed)
    images, texts = list(hostile_images(rng)), list(hostile_captions(rng))
    good = encoded(noise(rng, (33, 44, 3)), "JPEG")
    pairs = [(suffix, image, b"a picture", fine) for suffix, image, fine in images]
    pairs += [(".jpg", good, text, fine) for text, fine in texts]
    return [(f"{k:03}{suffix}", image, text, fine) for k, (suffix, image, text, fine)
            in enumerate(pairs)]  # fmt: skip


def everything_below(root):
    return {path: path.lstat()[6:9:2] for path in root.rglob("*")}  # sizes and times


def prepare(img, captions, rng, notes, bpe=BPE([])):  # noqa: B008
    for preprocess in (preprocess_dvae, preprocess_prior):
        pixels = preprocess(img, 32, rng)
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert all(captions) or not captions
    for caption in captions[:3]:
        assert bpe.decode(bpe.encode(caption)) == caption.lower()
    return [torch.tensor(pixels)]


def read_all(dataset):
    """As training does, with workers' errors: {item: why it cannot be used}."""
    samples, faults = Samples(dataset, prepare, seed=0), {}
    for item in range(len(dataset)):
        (pixels,), skipped = samples[item, item]
        assert pixels.shape == (32, 32, 3)
        if skipped:
            faults[item] = skipped[0]
            assert skipped[0].startswith("unreadable: ") and skipped[0].isprintable()
            assert len(skipped[0]) < 1200
    return faults


@pytest.mark.parametrize("kind", ["folder", "tar", "table"])
def test_hostile_files(kind, tmp_path, capfd, monkeypatch):
    root = tmp_path / "data"
    root.mkdir()
    pairs = members()
    assert len(pairs) >= 200
    spec = root
    if kind == "tar":
        spec = root / "0.tar"
        with tarfile.open(spec, "w") as tar:
            for name, image, text, _ in pairs:
                for member, content in ((name, image), (os.path.splitext(name)[0] + ".txt", text)):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    else:
        for name, image, text, _ in pairs:
            (root / name).write_bytes(image)
            (root / name).with_suffix(".txt").write_bytes(text)
    if kind == "table":  # of the texts it can hold
        pairs = [(*pair, " ".join(captions_in(pair[2]))) for pair in pairs]
        pairs = [pair for pair in pairs if pair[4]]
        spec = root / "table.jsonl"
        rows = (json.dumps({"path": pair[0], "caption": pair[4]}) for pair in pairs)
        spec.write_text("\n".join(rows))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = everything_below(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = open_pictures(str(spec), True, False)
        faults = read_all(dataset)
        for i in range(len(dataset)):
            assert dataset.captions_of(i) or i in faults
    assert everything_below(tmp_path) == before
    assert capfd.readouterr() == ("", "")
    assert [dataset.files[k] for k in range(len(dataset))] == [pair[0] for pair in pairs]
    for k, (name, _, _, fine, *_) in enumerate(pairs):
        assert fine is None or (k not in faults) == fine, (name, faults.get(k))


def test_hostile_members_of_a_tar(tmp_path, monkeypatch):
    """Links, devices and paths that lead out are passed over and counted, odd names are read."""
    picture, here = encoded(Image.new("RGB", (9, 9), "red"), "PNG"), tmp_path / "here"
    here.mkdir()
    (tmp_path / "secret.png").write_bytes(picture)
    monkeypatch.chdir(here)
    fine = ["plain.png", "./dot.png", "a/../b.png", "deep/" * 60 + "x.png", "n" * 300 + ".png",
            "new\nline\x1b[31m.png", "\udcff\udcfe.png", "ünï.png"]  # fmt: skip
    bad = "bad\n\x1b]0;title\x07\udcff.png"
    out = ["/abs.png", str(tmp_path / "escaped.png"), "../up.png", "a/../../up.png", "//x.png"]
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in [*fine, *out, "plain.png", bad]:  # the last but one a second time
            image = b"no picture" if name == bad else picture
            for member, content in ((name, image), (name[:-4] + ".txt", b"a picture")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
                 tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE)  # fmt: skip
        for k, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"odd{k}.png")
            info.type, info.linkname, info.devmajor = kind, str(tmp_path / "secret.png"), 1
            tar.addfile(info)
            text = tarfile.TarInfo(f"odd{k}.txt")
            text.size = 1
            tar.addfile(text, io.BytesIO(b"x"))
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    before = everything_below(tmp_path)
    dataset = open_pictures(str(tmp_path / "0.tar"), True, False)
    odd = f"{2 * len(out) + len(kinds) + 2} members that are no plain files, or of a name twice"
    assert dataset.counts() == f"{len(fine) + 1} pictures, {odd}"
    (fault,) = read_all(dataset).values()  # on one line, whatever the name is
    assert "bad??]0;title??.png" in fault and everything_below(tmp_path) == before


def test_links_and_devices_in_a_folder(tmp_path):
    """Nothing outside is read through a link, and a pipe is not waited for."""
    picture, root = encoded(Image.new("RGB", (9, 9), "red"), "PNG"), tmp_path / "root"
    for folder in ("root/sub", "out", "root2"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("root/a.png", "root/sub/b.png", "root/c.png", "out/d.png", "root2/e.png"):
        (tmp_path / name).write_bytes(picture)
        (tmp_path / name).with_suffix(".txt").write_text("a picture")
    (root / "c.txt").unlink()
    (root / "c.txt").symlink_to("/etc/passwd")
    (root / "inside.png").symlink_to("a.png")
    (root / "inside.txt").symlink_to("sub/b.txt")
    targets = {"out1.png": "../out/d.png", "out2.png": "../root2/e.png", "folder": "../out",
               "loop.png": "loop.png", "gone.png": "nowhere.png", "up": "..",
               "zero.png": "/dev/zero"}  # fmt: skip
    for name, target in targets.items():
        (root / name).symlink_to(target)
        (root / name).with_suffix(".txt").write_text("a picture")
    os.mkfifo(root / "pipe.png")
    (root / "pipe.txt").write_text("a picture")
    (root / "named.png").mkdir()
    dataset = open_pictures(str(root), True, False)
    files = [dataset.files[k] for k in range(len(dataset))]
    assert files == ["a.png", "inside.png", "sub/b.png"]
    assert dataset.counts() == "3 pictures, 1 without a caption" and not read_all(dataset)


def test_any_caption_can_be_drawn():
    """A picture's caption is anyone's text too."""
    captions = [tidy(text.decode("utf-8", "replace")) for text, _ in hostile_captions(random)]
    pixels = np.zeros((32, 32, 3), np.uint8)
    for k in range(0, len(captions), 8):
        sheet([pixels] * 8, captions[k : k + 8])


# ----------------------------------------------------------------------------- fuzzing

PICTURE = encoded(noise(random.Random(1), (12, 9, 3)), "JPEG")


def edit(content, edits, end):
    """Bytes changed at some places, and cut."""
    content = bytearray(content)
    for at, value in edits:
        content[at % len(content)] = value
    return bytes(content[: len(content) - end])


edits = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6)


@fuzz
@given(edits, st.integers(0, 40))
def test_any_jpeg_is_a_picture_or_refused(changes, end):
    try:
        img = read_image(edit(PICTURE, changes, end))
    except ValueError:
        return
    assert img.mode == "RGB" and min(img.size) > 0


@fuzz
@given(st.binary(max_size=300))
def test_any_bytes_are_captions(content):
    captions = captions_in(content)
    for caption in captions:
        assert caption == caption.strip() != "" and len(caption) <= MAX_TEXT
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in caption)
        caption.encode()  # no lone surrogate
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return
    assert "".join(captions).split() == [] or "".join("".join(captions).split()) == "".join(
        c for c in text if not (c.isspace() or ord(c) < 32 or 127 <= ord(c) < 160 or c == "\ufeff")
    )


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of two pictures, and a tar of them."""
    root = tmp_path_factory.mktemp("shelf")
    for name in ("a.jpg", "b.jpg"):
        (root / name).write_bytes(PICTURE)
    with tarfile.open(root / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in {"a.jpg": PICTURE, "a.txt": b"a", "ü.jpg": PICTURE,
                              "ü.json": b'{"caption": "b"}', "l" * 150: b"c"}.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return root


def try_out(spec):
    """Every item of a data set, or its refusal."""
    try:
        dataset = open_pictures(str(spec), True, False)
    except ValueError as error:
        assert Path(spec).name in str(error)
        return []
    found = []
    for i in range(len(dataset)):
        try:
            found.append(dataset[i][1])
        except ValueError:
            pass
    return found


def sealed(content):
    """A tar with the checksum of every header made right again."""
    blocks = [content[k : k + 512] for k in range(0, len(content), 512)]
    for k, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            total = sum(block) - sum(block[148:156]) + 8 * 32
            blocks[k] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


@fuzz
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 511), st.integers(0, 255)), max_size=6),
    st.sampled_from([0, 0, 0, 600, 5000, 9000]),
)
def test_any_tar_is_read_or_refused(shelf, changes, end):
    content = bytearray((shelf / "0.tar").read_bytes())
    headers = [k for k in range(0, len(content), 512) if content[k + 257 : k + 262] == b"ustar"]
    for header, at, value in changes:
        content[headers[header % len(headers)] + at] = value
    (shelf / "any.tar").write_bytes(sealed(bytes(content[: len(content) - end])))
    try_out(shelf / "any.tar")


@pytest.mark.parametrize("size", [-1, -512, -1024, 2**33, 2**63 - 1, 2**90])
def test_sizes_of_no_sense(shelf, size):
    """In a header's own number or in an extended one: refused, and never read for ever."""
    whole = (shelf / "0.tar").read_bytes()
    number = (256**11 * 128 + size if size >= 0 else 256**12 + size).to_bytes(12, "big")
    header = tarfile.TarInfo("more.png")
    header.pax_headers = {"size": str(size)}
    for kind in b"0xLKSg57":
        block = whole[:124] + number + whole[136:156] + bytes([kind]) + whole[157:]
        (shelf / "any.tar").write_bytes(sealed(block))
        with pytest.raises(ValueError, match="any.tar is not a whole"):
            open_pictures(str(shelf / "any.tar"), True, False)
    (shelf / "any.tar").write_bytes(header.tobuf(tarfile.PAX_FORMAT) + whole)
    with pytest.raises(ValueError, match="any.tar is not a whole"):
        open_pictures(str(shelf / "any.tar"), True, False)


@fuzz
@given(st.sampled_from(["tsv", "csv", "jsonl"]), st.binary(max_size=200), st.booleans())
def test_any_table_is_read_or_refused(shelf, kind, content, header):
    (shelf / f"any.{kind}").write_bytes(b"path,caption\n" * header + content)
    try_out(shelf / f"any.{kind}")


@fuzz
@given(st.lists(st.tuples(st.sampled_from(["a.jpg", "b.jpg"]), st.text(max_size=30)), max_size=9))
def test_any_caption_of_a_table_is_kept(shelf, rows):
    """What a .jsonl says, by the picture, in the order of the rows."""
    lines = [json.dumps({"text": text, "file_name": name}) for name, text in rows]
    (shelf / "any.jsonl").write_text("\n".join(lines))
    expected = {}
    for name, text in rows:
        kept = expected.setdefault(name, [])
        kept += filter(None, [tidy(text)])
    assert try_out(shelf / "any.jsonl") == [texts for texts in expected.values() if texts]
