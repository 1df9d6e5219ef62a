"""
Where pictures and captions come from: folders, tables, and tar shards.

Each source has a length, and items (RGB image, captions) that are read when they are asked for,
anywhere in it, so that the order of a run is a matter of numbers alone. Tars are not unpacked and
not streamed but indexed, which takes one look at their headers.

An item that cannot be used raises a ValueError that begins with `unreadable: ` or `filtered: `;
the trainer takes another one and counts. Files may be anyone's: whatever is in them, reading an
item raises nothing else, and nothing is ever written or run.
"""

import copy
import csv
import io
import json
import os
import posixpath
import re
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from glob import glob
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.listings import area_resize, crop_square, to_8_bits
from data.toy import ToyWorld

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TABLE_SUFFIXES = (".tsv", ".csv", ".jsonl")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # by content, whatever the suffix says
MAX_BYTES = 2**28  # of an image file
MAX_TEXT = 2**16  # of a caption file; what follows is not read
MAX_JSON = 2**20
MIN_WORDS = 2  # in a caption; the paper gives no number (C)
HELD_OUT = 0.05  # the share kept for validation where no other data is named
WINDOW = 1024  # samples of a tar among which the order is random

# ---- one picture ---------------------------------------------------------------------------------


def read_image(data: bytes) -> Image.Image:
    """The RGB picture in the bytes of an image file, upright; of an animation the first frame.

    ValueError for anything else, and for more pixels than Pillow's limit against decompression
    bombs, 89 million.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            img = Image.open(io.BytesIO(data), formats=FORMATS)
            img.load()
            try:
                ImageOps.exif_transpose(img, in_place=True)
            except Exception:  # the pixels are there, only the metadata are broken
                pass
            return to_rgb(img)
    except UnidentifiedImageError:
        raise ValueError(f"not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # whatever a damaged file makes Pillow raise
        raise ValueError(str(error) or type(error).__name__) from error


def to_rgb(img: Image.Image) -> Image.Image:
    """Our reading: 16-bit values are scaled to 8 bits, floats are in [0, 1] or else in [0, 255],
    what is transparent lies on white, and colour profiles are ignored."""
    if img.mode[0] in "IF":  # "I" are 16-bit values too, as older Pillows read them
        values = np.nan_to_num(np.asarray(img, np.float32))
        top = 65535 if img.mode[0] == "I" else 1 if values.max() <= 1 else 255
        img = Image.fromarray(np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8))
    if img.has_transparency_data:
        white = Image.new("RGBA", img.size, "white")
        img = Image.alpha_composite(white, img.convert("RGBA"))
    return img.convert("RGB")


def middle_square(image: str | Path | Image.Image, size: int, grid: int) -> Image.Image:
    """The middle square of a picture at size × size pixels, RGB: the centre of Listing 2.

    ValueError for what cannot be read, or has fewer pixels to a side than the grid has tokens.
    """
    name = "the image"
    if not isinstance(image, Image.Image):
        name = str(image)
        try:
            image = read_image(Path(image).read_bytes())
        except (ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{name} cannot be read as an image ({reason})") from error
    if min(image.size) < grid:
        raise ValueError(
            f"{name} is tiny: {image.width} × {image.height} pixels; this model cuts a picture "
            f"into {grid} × {grid} tokens, so expected at least {grid} × {grid}"
        )
    x, y = ((side - min(image.size)) // 2 for side in image.size)
    return Image.fromarray(to_8_bits(area_resize(crop_square(to_rgb(image), x, y, size), size)))


# ---- captions ------------------------------------------------------------------------------------


def tidy(text: str) -> str:
    """A caption on one line: control characters and byte-order marks become spaces."""
    text = re.sub("[\ud800-\udfff]", "\ufffd", text[:MAX_TEXT])  # bytes that are no UTF-8
    return re.sub("[\x00-\x1f\x7f-\x9f\ufeff]+", " ", text).strip()


def captions_in(data: bytes) -> list[str]:
    """The captions of a text file, a line each."""
    lines = re.split(r"[\r\n]+", data.decode("utf-8", "replace"))
    return [caption for line in lines if (caption := tidy(line))]


def caption_in_json(data: bytes) -> list[str]:
    """The caption of a .json file as img2dataset writes it; ValueError where it is no JSON."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json is none: {error}") from error
    caption = values.get("caption") if isinstance(values, dict) else None
    return [tidy(caption)] if isinstance(caption, str) and tidy(caption) else []


DAY = r"(?:the\s+)?\d{1,2}(?:st|nd|rd|th)?(?:\s+of)?"
MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
YEAR = r"(?:1[89]|20)\d\d"
BOILERPLATE = re.compile(
    rf"""
    \b (?:photographed|pictured|taken|shot|captured) \s+ (?:(?:on|in|at) \s+)?
    (?: (?:mon|tues|wednes|thurs|fri|satur|sun)day ,? \s+ )?
    (?: {DAY} \s+ {MONTH} (?: ,? \s+ {YEAR} )?                   # 3 May 2007, the 3rd of May
      | {MONTH} (?: \s+ {DAY} )? (?: ,? \s+ {YEAR} )?            # May 3rd, 2007; May 2007
      | \d{{1,4}} ([-./]) \d{{1,2}} \1 \d{{1,4}}                 # 2007-05-03, 3.5.2007, 05/03/07
      | {YEAR}
    ) \b
    | (?<!\S) \S+ \. (?:jpe?g|png|webp|gif|tiff?|bmp) \b         # names of files
    | \b (?:img|dsc[fn]?|pict?|image|photo|scan) [ _-]? \d+ \b   # and what cameras call them
    """,
    re.IGNORECASE | re.VERBOSE,
)


def caption_fault(caption: str) -> str | None:
    """Why the filters of Appendix C drop a caption. The paper names the reasons, these rules are
    our reading. In place of cld3, which tells languages apart, half of the letters have to be
    ASCII ones. A caption consists primarily of boilerplate where too little or less than half is
    left of it."""
    letters = [c for c in caption if c.isalpha()]
    if sum(c.isascii() for c in letters) < len(letters) / 2:
        return "caption not English"
    rest = BOILERPLATE.sub("", caption)
    too_short = len(re.findall(r"[^\W\d_]+", rest)) < MIN_WORDS
    if rest != caption and (too_short or len(rest.split()) < len(caption.split()) / 2):
        return "caption is boilerplate"
    return "caption too short" if too_short else None


def printable(text) -> str:
    """Text from a stranger's file, safe to print in a line of its own."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:500])


# ---- what all share ------------------------------------------------------------------------------


class Strings:
    """A list of strings as one row of bytes: data loading processes share it, where a list of
    millions would be copied for each of them as Python counts its references."""

    def __init__(self, strings: Iterable[str]):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.bytes = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, k: int) -> str:
        return self.bytes[self.ends[k] : self.ends[k + 1]].decode("utf-8", "surrogateescape")


class Pictures:
    """What folders, tables and tars share: item i is (RGB image, captions).

    Each of them finds `files`, the pictures' names relative to `root`, and knows how to read
    `texts(k)`, the captions of picture k. `index` says which of them belong to the set, so that
    a share can be held out. `left_out` counts what was not usable at first sight, by reason.
    """

    def __init__(self, name: str, root: Path, files: list[str], captions: bool, filters: bool):
        self.name, self.root, self.files = name, root, Strings(files)
        self.captions, self.filters = captions, filters
        self.index = np.arange(len(files))

    def __len__(self) -> int:
        return len(self.index)

    def path(self, k: int) -> Path:
        return self.root / self.files[k]

    def data(self, k: int) -> bytes:
        if self.path(k).stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        return self.path(k).read_bytes()

    def sift(self, captions: list[str]) -> tuple[list[str], str | None]:
        """The captions that pass the filters; where none does, why the first one fails (C)."""
        if not self.filters:
            return captions, None
        faults = [caption_fault(caption) for caption in captions]
        kept = [caption for caption, fault in zip(captions, faults) if not fault]
        return kept, None if kept else faults[0]

    def __getitem__(self, i: int) -> tuple[Image.Image, list[str]]:
        k, captions, fault = int(self.index[i]), [], None
        try:
            if self.captions:
                captions, fault = self.sift(self.texts(k))
            if not fault:
                img = read_image(self.data(k))
                if self.filters and max(img.size) > 2 * min(img.size):
                    fault = "aspect ratio"
        except (ValueError, OSError) as error:
            where, why = printable(self.path(k)), printable(error)
            raise ValueError(f"unreadable: {where} cannot be read ({why})") from error
        if fault:
            raise ValueError(f"filtered: {fault}: {printable(self.path(k))}")
        return img, captions

    def captions_of(self, i: int) -> list[str]:
        """The captions of item i without its picture; none where they cannot be used."""
        try:
            return self.sift(self.texts(int(self.index[i])))[0]
        except (ValueError, OSError):
            return []

    def counts(self) -> str:
        left_out = [f"{count} {reason}" for reason, count in self.left_out.items() if count]
        return ", ".join([f"{len(self.files)} pictures", *left_out])


# ---- folders -------------------------------------------------------------------------------------


class Folder(Pictures):
    """A folder of images, at any depth, with same-named .txt files, a line each caption.

    With `captions` an image without a .txt is left out. Links that lead out of the folder are not
    followed. Raises ValueError where nothing usable is found.
    """

    def __init__(self, path: Path, captions: bool, filters: bool):
        if not path.is_dir():
            raise ValueError(
                f"data {path} is not a folder: give a folder of images, a table "
                f"({' '.join(TABLE_SUFFIXES)}), .tar shards, or toy"
            )
        found = set(files_below(path))
        images = sorted(f for f in found if f.lower().endswith(IMAGE_SUFFIXES))
        if not images:
            tars = "; for the shards in it give NAME/*.tar" * any(".tar" in f for f in found)
            raise ValueError(
                f"data folder {path} holds no images: expected files with "
                f"{' '.join(IMAGE_SUFFIXES)}{tars}"
            )
        files = [f for f in images if not captions or os.path.splitext(f)[0] + ".txt" in found]
        if not files:
            raise ValueError(
                f"data folder {path} holds {len(images)} images and no captions: expected a text "
                f"file beside each, like {Path(printable(images[0])).with_suffix('.txt').name}"
            )
        super().__init__(str(path), path, files, captions, filters)
        self.left_out = {"without a caption": len(images) - len(files)}

    def texts(self, k: int) -> list[str]:
        path = Path(os.path.splitext(self.path(k))[0] + ".txt")
        with open(path, "rb") as file:
            captions = captions_in(file.read(MAX_TEXT))
        if not captions:
            raise ValueError(f"{path.name} holds no caption")
        return captions


def files_below(root: Path) -> Iterator[str]:
    """The files in a folder at any depth, as paths relative to it."""
    start = os.path.join(os.path.realpath(root), "")
    folders = [start]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file(follow_symlinks=False) or (
                    os.path.isfile(entry.path) and os.path.realpath(entry.path).startswith(start)
                ):
                    yield entry.path[len(start) :].replace(os.sep, "/")


# ---- tables --------------------------------------------------------------------------------------

PATH_COLUMNS = ("path", "filepath", "file_path", "filename", "file_name", "file", "image_path",
                "image", "img", "url")  # fmt: skip
TEXT_COLUMNS = ("caption", "text", "title", "captions")


class Table(Pictures):
    """A .tsv, .csv or .jsonl of image paths, relative to the table's folder, and captions.

    Several rows of an image are several captions. Columns are known by their header; a table
    without one has two columns, and the paths are where the files are. ValueError for rows
    without a file, or where nothing usable is found.
    """

    def __init__(self, path: Path, captions: bool, filters: bool):
        table: dict[str, list[str]] = {}
        missing = []
        for line, row in rows_of(path):
            file = (pick(row, PATH_COLUMNS) or [""])[0]
            if file not in table:
                if not file or not os.path.isfile(path.parent / file):
                    missing.append((line, file))
                    continue
                table[file] = []
            table[file] += filter(None, map(tidy, pick(row, TEXT_COLUMNS)))
        if missing:
            line, file = missing[0]
            advice = "; img2dataset makes .tar shards of links" * bool(re.match("https?:", file))
            raise ValueError(
                f"{path} line {line}: no file {printable(file)!r} below {path.parent} "
                f"({len(missing)} such rows): expected the path of an image{advice}"
            )
        files = [file for file in table if table[file] or not captions]
        if not files:
            raise ValueError(
                f"{path} holds {len(table)} images and no captions: expected a column named "
                f"{', '.join(TEXT_COLUMNS[:-1])}"
            )
        super().__init__(str(path), path.parent, files, captions, filters)
        self.lines = Strings(caption for file in files for caption in table[file])
        self.ends = np.cumsum([0, *(len(table[file]) for file in files)])
        self.left_out = {"without a caption": len(table) - len(files)}

    def texts(self, k: int) -> list[str]:
        return [self.lines[j] for j in range(self.ends[k], self.ends[k + 1])]


def pick(row: dict, names: tuple[str, ...]) -> list[str]:
    """What the first of these columns that is not empty holds: a text, or a list of texts."""
    for name in names:
        value = row.get(name)
        texts = value if isinstance(value, list) else [value]
        if texts := [text.strip() for text in texts if isinstance(text, str) and text.strip()]:
            return texts
    return []


def rows_of(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, {column: value}) of each row of a table; ValueError for what is none."""
    csv.field_size_limit(2**31 - 1)
    is_tsv = path.suffix.lower() == ".tsv"
    if is_tsv:  # captions may hold quotation marks
        dialect = dict(delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        dialect = dict(strict=True, skipinitialspace=True)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    expected = '{"path": "a.jpg", "caption": "a cat"}'
                    raise ValueError(f"{path} line {number}: expected an object like {expected}")
                if row:
                    yield number, {name.lower(): value for name, value in row.items()}
            return
        reader = csv.reader(file, **dialect)
        try:
            rows = ((reader.line_num, row) for row in reader if row)
            head = list(islice(rows, 100))
            if not head:
                raise ValueError(f"{path} is empty: expected rows of image path and caption")
            columns = [name.strip().lower() for name in head[0][1]]
            if set(PATH_COLUMNS) & set(columns):
                del head[0]
            else:
                columns = guess_columns(path, [row for _, row in head])
            for rest in (head, rows):
                for number, row in rest:
                    if any(row[len(columns) :]):
                        found = f"{len(row)} values for {len(columns)} columns"
                        hint = "holds a tab" if is_tsv else 'holds a comma: quote it, "…, …"'
                        raise ValueError(f"{path} line {number}: {found}; one of them {hint}")
                    yield number, dict(zip(columns, row))
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: {error}") from error


def guess_columns(path: Path, rows: list[list[str]]) -> tuple[str, ...]:
    """Of a table without a header: which of one or two columns holds the paths of files."""
    files = [
        sum(len(row) > c and os.path.isfile(path.parent / row[c].strip()) for row in rows)
        for c in (0, 1)
    ]
    if max(map(len, rows)) > 2 or not any(files):
        raise ValueError(
            f"{path} names no files in either of two columns: expected a header such as "
            f"path and caption, and paths relative to {path.parent}"
        )
    return ("path", "caption") if files[0] >= files[1] else ("caption", "path")


# ---- tars ----------------------------------------------------------------------------------------


class Tars(Pictures):
    """WebDataset shards as img2dataset writes them: an image and a .txt or .json of one name.

    `spec` is a path, with {000..031} or * for many. Each shard's headers are read once, nothing is
    ever unpacked, and an item is read at its place in the file. With `captions` an image without
    one is left out. ValueError for a missing or damaged shard, or where nothing usable is found.
    """

    def __init__(self, spec: str, captions: bool, filters: bool):
        self.shards = shards_of(spec)
        files, tables = [], []
        self.left_out = Counter({"without a caption": 0})
        for number, shard in enumerate(self.shards):
            samples, odd = index_tar(shard)
            self.left_out["members that are no plain files, or of a name twice"] += odd
            rows = []
            for parts in samples.values():
                is_json = ".json" in parts and not parts.get(".txt", (0, 0, 0))[2]  # empty or none
                text = parts.get(".json" if is_json else ".txt")
                if "image" in parts and (text or not captions):
                    name, *place = parts["image"]
                    files.append(name)
                    _, *text_place = text or ("", 0, 0)
                    rows.append((number, *place, *text_place, is_json))
                elif "image" in parts:
                    self.left_out["without a caption"] += 1
            tables.append(np.array(rows, np.int64).reshape(-1, 6))
        if not files:
            raise ValueError(
                f"{spec} holds {self.left_out['without a caption']} images and no captions: "
                "expected .jpg, .png or .webp members with a .txt or .json of the same name"
            )
        # of each picture: shard, where the image begins, its bytes, the same of the text, JSON?
        self.places = np.concatenate(tables)
        super().__init__(spec, Path(), files, captions, filters)

    def path(self, k: int) -> Path:
        return self.shards[self.places[k, 0]] / self.files[k]

    def read(self, k: int, start: int, size: int) -> bytes:
        with open(self.shards[self.places[k, 0]], "rb") as shard:
            shard.seek(start)
            data = shard.read(size)
        if len(data) < size:
            raise ValueError("the tar ends before it; was it changed?")
        return data

    def data(self, k: int) -> bytes:
        _, start, size, *_ = self.places[k].tolist()
        if size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        return self.read(k, start, size)

    def texts(self, k: int) -> list[str]:
        *_, start, size, is_json = self.places[k].tolist()
        if is_json and size > MAX_JSON:
            raise ValueError(f"its .json has more than {MAX_JSON:,} bytes")
        data = self.read(k, start, size if is_json else min(size, MAX_TEXT))
        captions = caption_in_json(data) if is_json else captions_in(data)
        if not captions:
            raise ValueError(f"its {'.json' if is_json else '.txt'} holds no caption")
        return captions

    def order(self, seed: int, batch_size: int) -> np.ndarray:
        """The items of an epoch, one after the other, such that each is read near the last.

        The shards in random order make one long row, cut into `batch_size` lanes; sample j of
        every batch is the next of lane j. So a process, which has the same part of every batch,
        reads a few shards of its own from front to back. In a lane the order is random within
        windows. What does not fill the last batch is left out, in each epoch something else.
        """
        rng, n = np.random.default_rng(seed), len(self)
        length = n // batch_size
        if length == 0:
            return rng.permutation(n)
        shard = self.places[self.index, 0]
        runs = np.split(np.arange(n), np.flatnonzero(np.diff(shard)) + 1)
        row = np.concatenate([runs[k] for k in rng.permutation(len(runs))])
        lanes = np.roll(row, rng.integers(n))[: length * batch_size].reshape(batch_size, length)
        keys = rng.random(lanes.shape) + np.arange(length) // WINDOW
        return np.take_along_axis(lanes, keys.argsort(1), 1).T.ravel()


def shards_of(spec: str) -> list[Path]:
    """The files of a spec with {first..last} and *; ValueError for one that is not there."""

    def expand(text: str) -> Iterator[str]:
        match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
        if not match:
            yield text
        else:
            first, last = match.groups()
            for n in range(int(first), int(last) + 1):
                yield from expand(f"{text[: match.start()]}{n:0{len(first)}}{text[match.end() :]}")

    shards = []
    for name in expand(spec):
        found = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob(name)))
        if not found:
            raise ValueError(f"shard {name} does not exist")
        shards += map(Path, found)
    if not shards:
        raise ValueError(f"{spec} names no shard: expected like 00000.tar or {{00000..00031}}.tar")
    return shards


def index_tar(path: Path) -> tuple[dict[str, dict[str, tuple[str, int, int]]], int]:
    """{name without suffix: {"image" or suffix: (name, start, bytes)}} of a tar, and the number
    of members passed over: links, devices, paths that lead out, names that were there already.
    ValueError for no whole tar."""
    samples: dict[str, dict] = {}
    odd = 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep them all
                if member.size < 0:
                    raise ValueError("a member has a negative size")
                name = posixpath.normpath(member.name)
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
                if member.isdir():
                    continue
                if not plain or member.issparse() or name.startswith(("/", "..")):
                    odd += 1
                    continue
                key, suffix = posixpath.splitext(name)
                suffix = "image" if suffix.lower() in IMAGE_SUFFIXES else suffix.lower()
                if suffix in ("image", ".txt", ".json"):
                    sample = samples.setdefault(key, {})
                    odd += suffix in sample
                    sample.setdefault(suffix, (name, member.offset_data, member.size))
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"damaged or cut short at byte {tar.offset:,}")
    except Exception as error:  # whatever a damaged file makes tarfile raise
        raise ValueError(f"{path} is not a whole .tar file ({printable(error)})") from error
    return samples, odd


# ---- data sets by name ---------------------------------------------------------------------------


def split(pictures: Pictures) -> tuple[Pictures, Pictures]:
    """(train, val): a fixed share is held out, chosen by a hash of each name, at least one."""
    if len(pictures) < 2:
        raise ValueError(f"{pictures.name} holds 1 usable image: at least 2 are needed")
    names = (os.path.splitext(pictures.files[k])[0] for k in range(len(pictures)))
    hashes = [zlib.crc32(name.encode("utf-8", "surrogateescape")) for name in names]
    ranked = np.argsort(hashes, kind="stable")
    n_val = max(1, round(HELD_OUT * len(ranked)))
    train, val = copy.copy(pictures), copy.copy(pictures)
    train.index, val.index = np.sort(ranked[n_val:]), np.sort(ranked[:n_val])
    return train, val


def open_pictures(spec: str, captions: bool, filters: bool) -> Pictures:
    if not spec:
        raise ValueError("the name of the data is empty: expected a folder, a table or tars")
    if spec.lower().endswith(".tar"):
        return Tars(spec, captions, filters)
    if spec.lower().endswith(TABLE_SUFFIXES):
        return Table(Path(spec), captions, filters)
    return Folder(Path(spec), captions, filters)


def open_dataset(
    spec: str,
    image_size: int,
    val: str | None = None,
    captions: bool = True,
    filters: bool = False,
) -> tuple[ToyWorld | Pictures, ToyWorld | Pictures]:
    """(train, val) data sets of a spec: `toy`, a folder of images, a table (.tsv .csv .jsonl) of
    image paths and captions, or WebDataset shards such as `shards/{000..031}.tar` or `*.tar`.

    Without `val`, a spec of its own, a fixed share of the data is held out. With `filters`,
    captions and images that the paper would drop (C) are passed over. ValueError where the spec
    names nothing usable.
    """

    def open_one(spec: str, part: str) -> ToyWorld | Pictures:
        if spec == "toy":
            return ToyWorld(image_size, part)
        return open_pictures(spec, captions, filters)

    train = open_one(spec, "train")
    if val or spec == "toy":
        return train, open_one(val or "toy", "val")
    return split(train)
