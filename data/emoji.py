"""
Emoji and their names in three openly licensed styles: real pictures that a few package names bring.

    python -m data.emoji                    # npm brings the packages; makes emoji/
    python -m data.emoji --from DIR OUT     # from tarballs that `npm pack` has left in DIR

OUT/STYLE/CODE.png are the pictures, on white, with the margin that Listing 2's crops may take.
Three tables name them with their captions, as --data reads them: train.tsv, val.tsv, and unseen.tsv
with the combinations of concept and style that no training picture shows (3.3). LICENCES.md says
whose the pictures are.
"""

import argparse
import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from data.files import printable, read_image, tidy

MAX_BYTES = 2**28  # of a package, unpacked
MAX_MEMBER = 2**24
DRAWN = 64  # pixels of the emoji, as two of the styles come
MARGIN = 10  # pixels on each side: of 84, Listing 2 may cut off a ninth
FLAGS = 9  # emojibase's number of the group: flags are no combination of a thing and a style
HELD_OUT = 0.1  # of the concepts


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    files: str  # what is read of it, a regular expression with the code of an emoji as its group
    words: tuple[str, ...] = ()  # what the style is called in captions

    @property
    def tarball(self) -> str:
        """The file that `npm pack` writes."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


NAMES = Package("emojibase-data", "17.0.0", r"package/(en)/data\.json")
STYLES = {
    "noto": Package("emoji-datasource-google", "16.0.0",
                    r"package/img/google/64/([0-9a-f-]+)\.png", ("Noto", "Google")),
    "twemoji": Package("emoji-datasource-twitter", "16.0.0",
                       r"package/img/twitter/64/([0-9a-f-]+)\.png", ("Twemoji", "Twitter")),
    "fluent": Package("@lobehub/fluent-emoji-3d", "1.1.0",
                      r"package/assets/([0-9a-f-]+)\.webp", ("Fluent", "3D")),
}  # fmt: skip

LICENCES = """\
# Whose these pictures are

They are not ours. Each was laid on white and given a margin; Fluent's were reduced to 64 pixels.

- `noto/`: Noto Emoji, © Google LLC, [Apache License 2.0](https://www.apache.org/licenses/LICENSE-2.0),
  https://github.com/googlefonts/noto-emoji, from the package emoji-datasource-google 16.0.0
  (© 2013 Cal Henderson, MIT).
- `twemoji/`: Twemoji, © Twitter, Inc and other contributors,
  [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/), https://github.com/twitter/twemoji,
  from the package emoji-datasource-twitter 16.0.0 (© 2013 Cal Henderson, MIT).
- `fluent/`: Fluent Emoji, © Microsoft Corporation, MIT, https://github.com/microsoft/fluentui-emoji,
  from the package @lobehub/fluent-emoji-3d 1.1.0 (© 2023 LobeHub, MIT).
- Captions: emojibase-data 17.0.0, © 2017-2019 Miles Johnson, MIT, https://emojibase.dev, after
  Unicode's CLDR ([Unicode License](https://www.unicode.org/license.txt)).

The MIT licence: Permission is hereby granted, free of charge, to any person obtaining a copy of this
software and associated documentation files (the "Software"), to deal in the Software without
restriction, including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished
to do so, subject to the following conditions: The above copyright notice and this permission notice
shall be included in all copies or substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS
IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT,
TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS
IN THE SOFTWARE.
"""  # noqa: E501

# ---- packages ------------------------------------------------------------------------------------


def bring(packages: list[Package], folder: Path) -> None:
    """Have npm put the packages' tarballs into a folder; ValueError where it cannot."""
    npm = shutil.which("npm")
    if npm is None:
        tarballs = ", ".join(package.tarball for package in packages)
        raise ValueError(f"npm is not there: install Node.js, or --from a folder with {tarballs}")
    print("npm brings four packages, 160 MB", flush=True)
    wanted = [f"{package.name}@{package.version}" for package in packages]
    command = [npm, "pack", "--loglevel=error", "--ignore-scripts", *wanted]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[0]
        raise ValueError(f"npm pack {' '.join(wanted)}: {printable(reason)}")


def read_package(package: Package, folder: Path) -> dict[str, bytes]:
    """{code: bytes} of the files that are read of a package. Nothing is unpacked, and no name in
    it becomes a path. ValueError for a tarball that is missing, damaged or of another version."""
    path, found, about = folder / package.tarball, {}, {}
    wanted = f"`npm pack {package.name}@{package.version}` brings it"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {wanted}")
    try:
        with gzip.open(path) as file:
            unpacked = file.read(MAX_BYTES + 1)  # to the end, where the check sum is
        if len(unpacked) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as tar:
            for member in tar:
                if member.size < 0:
                    raise ValueError("a member has a negative size")
                if not member.isreg() or member.size > MAX_MEMBER:
                    continue
                if match := re.fullmatch(package.files, member.name):
                    found[plain(match[1])] = tar.extractfile(member).read()
                elif member.name == "package/package.json":
                    about = json.loads(tar.extractfile(member).read())
        holds = f"{about['name']} {about['version']}"
    except Exception as error:  # whatever a damaged file makes the readers raise
        reason = printable(error) or type(error).__name__
        raise ValueError(f"{path} is not a whole npm tarball ({reason}): {wanted}") from error
    if holds != f"{package.name} {package.version}" or not found:
        less = "" if found else ", and nothing to read of it"
        raise ValueError(f"{path} holds {printable(holds)}{less}: {wanted}")
    return found


def plain(code: str) -> str:
    """The code of an emoji without its variation selector, which not all packages write."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


# ---- pictures and captions -----------------------------------------------------------------------


def picture(data: bytes) -> Image.Image:
    """An emoji in the middle of 84 × 84 white pixels, RGB. ValueError for what is no picture."""
    size, smooth = (DRAWN, DRAWN), Image.Resampling.LANCZOS  # Fluent's are 256 × 256, four 264
    return ImageOps.expand(ImageOps.pad(read_image(data), size, smooth, "white"), MARGIN, "white")


def names_of(entries: list[dict]) -> dict[str, tuple[str, list[str], str]]:
    """{code: (label, tags, concept)} of emojibase's entries, without flags. A concept is what it
    shows in all skin tones, and of a man, a woman or a person."""
    names = {}
    for entry in entries:
        if entry.get("group", FLAGS) == FLAGS:
            continue
        concept = re.sub(r"-200d-264[02]$", "", plain(entry["hexcode"]))  # ♀ and ♂
        concept = re.sub(r"\b1f46[89]\b", "1f9d1", concept)  # man and woman: person
        for emoji in [entry, *entry.get("skins", [])]:
            label = emoji["label"].replace(":", ",")  # "waving hand, dark skin tone"
            names[plain(emoji["hexcode"])] = label, entry.get("tags", []), concept
    return names


def captions_of(
    label: str, tags: list[str], words: tuple[str, ...], rng: random.Random
) -> list[str]:
    """Three captions for each word for a style; training takes one at random."""
    captions = []
    for word in words:
        some = rng.sample(tags, min(2, len(tags)))
        captions += [
            f"a {word} {label}",
            f"{label}, a {word} emoji",
            ", ".join([f"{word}: {label}", *some]),
        ]
    return [tidy(caption) for caption in captions]


# ---- the data set --------------------------------------------------------------------------------


def one_concept(pictures: dict[str, dict[str, Image.Image]], names: dict) -> dict[str, str]:
    """{code: concept}, those joined that a style draws alike: Twemoji has four pictures for 24
    kinds of families."""
    concept = {code: concept for code, (_, _, concept) in names.items()}
    for drawn in pictures.values():
        first = {}
        for code, image in drawn.items():
            same, other = concept[first.setdefault(image.tobytes(), code)], concept[code]
            if same != other:
                concept = {c: same if base == other else base for c, base in concept.items()}
    return concept


def split(concept: dict[str, str], rng: random.Random) -> dict[tuple[str, str], str]:
    """{(style, code): "unseen" or "val"} of the pictures that are not trained on. Of a tenth of
    the concepts one style is unseen; of another tenth a single picture is for validation."""
    concepts = sorted(set(concept.values()))
    rng.shuffle(concepts)
    tenth, part = round(HELD_OUT * len(concepts)), {}
    for k, held_out in enumerate(concepts[: 2 * tenth]):
        codes = sorted(code for code in concept if concept[code] == held_out)
        style = list(STYLES)[k % len(STYLES)]
        if k < tenth:
            part |= {(style, code): "unseen" for code in codes}
        else:
            part[style, rng.choice(codes)] = "val"
    return part


def build(tarballs: Path, out: Path) -> dict[str, int]:
    """Make the data set in a folder that does not exist yet, from tarballs in another: the number
    of pictures in each of its tables. ValueError for tarballs that cannot be used."""
    (entries,) = read_package(NAMES, tarballs).values()
    names = names_of(json.loads(entries))
    files = {style: read_package(package, tarballs) for style, package in STYLES.items()}
    codes = sorted(set(names).intersection(*files.values()))
    if not codes:
        raise ValueError(f"no emoji is in all of the packages in {tarballs}")
    pictures: dict[str, dict[str, Image.Image]] = {style: {} for style in STYLES}
    for style, code in tqdm([(s, c) for s in STYLES for c in codes], desc="emoji", disable=None):
        try:
            pictures[style][code] = picture(files[style][code])
        except ValueError as error:
            raise ValueError(f"{STYLES[style].tarball}, picture {code}: {error}") from error

    rng = random.Random(0)
    part = split(one_concept(pictures, {code: names[code] for code in codes}), rng)
    tables: dict[str, list[str]] = {table: [] for table in ("train", "val", "unseen")}
    count = dict.fromkeys(tables, 0)
    out.mkdir()
    for style in STYLES:
        (out / style).mkdir()
        for code, image in pictures[style].items():
            image.save(out / style / f"{code}.png")
            label, tags, _ = names[code]
            table = part.get((style, code), "train")
            count[table] += 1
            for caption in captions_of(label, tags, STYLES[style].words, rng):
                tables[table].append(f"{style}/{code}.png\t{caption}\n")
    for table, rows in tables.items():
        text = "path\tcaption\n" + "".join(rows)
        (out / f"{table}.tsv").write_text(text, encoding="utf-8", newline="\n")
    (out / "LICENCES.md").write_text(LICENCES, encoding="utf-8")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a data set of emoji in three styles.")
    add = parser.add_argument
    add("out", nargs="?", type=Path, default=Path("emoji"), help="a new folder; default: emoji")
    add("--from", dest="tarballs", metavar="DIR", type=Path, help="where tarballs are already")
    args = parser.parse_args()
    out = args.out.absolute()
    if os.path.lexists(out):
        raise ValueError(f"{args.out} exists: move it away, or name another folder")
    if not out.parent.is_dir():
        raise ValueError(f"{args.out}: the folder {out.parent} does not exist")
    try:
        with tempfile.TemporaryDirectory(".tmp", f"{out.name}.", out.parent) as folder:
            if args.tarballs is None:
                bring([NAMES, *STYLES.values()], Path(folder))
            made = Path(folder, "made")  # whole, or not at all
            count = build(args.tarballs or Path(folder), made)
            made.rename(out)
    except OSError as error:
        raise OSError(f"{args.out} cannot be written ({error.strerror or error})") from error
    parts = ", ".join(f"{table}.tsv {n:,} pictures" for table, n in count.items())
    print(f"{args.out}: {parts}\nuse them by --data {args.out}/train.tsv --val {args.out}/val.tsv")


if __name__ == "__main__":  # as engine.cli.start, which this room does not know
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"emoji.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        print("emoji.py: stopped", file=sys.stderr)
        sys.exit(130)
