"""The emoji: what is made of the packages, what is held out of training, and packages that are
torn, missing or hostile."""

import gzip
import io
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
from collections import defaultdict
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import lab.emoji
from bpe import BPE
from clip import CLIP, CLIPConfig
from data import emoji
from data.files import open_dataset, open_pictures
from data.listings import area_resize, preprocess_prior
from data.loader import images_to
from dvae import DVAE, DVAEConfig
from engine.checkpoint import read_run
from tests.scripts import ROOT, call
from transformer import Transformer, TransformerConfig

TONES = {"1f3fb": "light", "1f3ff": "dark"}
PLACES = {
    "noto": "package/img/google/64/{}.png",
    "twemoji": "package/img/twitter/64/{}.png",
    "fluent": "package/assets/{}.webp",
}


def entry(code, label, group=0, tags=("one", "two", "three"), skins=False):
    """An emoji as emojibase has it."""
    found = {"hexcode": code.upper(), "label": label, "group": group, "tags": list(tags)}
    if skins:
        found["skins"] = [
            {"hexcode": f"{code}-{tone}".upper(), "label": f"{label}: {name} skin tone"}
            for tone, name in TONES.items()
        ]
    return found


ENTRIES = [
    *(entry(f"1f{k}", f"thing {k}", skins=k % 3 == 0) for k in range(300, 340)),
    entry("1f468-200d-1f52c", "man scientist"),
    entry("1f469-200d-1f52c", "woman scientist"),
    entry("1f3c3", "person running"),
    entry("1f3c3-200d-2642-fe0f", "man running", tags=[]),
    entry("1f46a", "family"),
    entry("1f468-200d-1f466", "family: man, boy"),
    entry("2764-fe0f", "red heart"),
    entry("1f1e6-1f1fc", "flag: Aruba", group=emoji.FLAGS),
    {"hexcode": "1F1E6", "label": "regional indicator A"},
    entry("1f999", "llama"),  # not in Fluent
]
CODES = [e["hexcode"].lower() for x in ENTRIES for e in [x, *x.get("skins", [])]]


def drawn(style, code):
    """A picture file unlike any other, but for Twemoji's families; every pixel is dark."""
    code = "1f46a" if style == "twemoji" and code == "1f468-200d-1f466" else code
    pixels = np.random.default_rng([ord(c) for c in style + code]).integers(0, 99, (4, 4, 3))
    side, kind = (256, "WEBP") if style == "fluent" else (64, "PNG")
    image = Image.fromarray(pixels.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    image.save(file := io.BytesIO(), kind, lossless=True)
    return file.getvalue()


def write_tarball(folder, package, files, version=None):
    about = {"name": package.name, "version": version or package.version}
    with tarfile.open(folder / package.tarball, "w:gz") as tar:
        for name, data in {"package/package.json": json.dumps(about).encode(), **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def files_of(style):
    codes = [code for code in CODES if (style, code) != ("fluent", "1f999")]
    if style == "fluent":  # as one of the packages might write it
        codes = ["2764" if code == "2764-fe0f" else code for code in codes]
    return {PLACES[style].format(code): drawn(style, code) for code in codes}


@pytest.fixture(scope="module")
def tarballs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tarballs")
    names = json.dumps(ENTRIES).encode()
    write_tarball(folder, emoji.NAMES, {"package/en/data.json": names, "package/de/data.json": b""})
    for style, package in emoji.STYLES.items():
        write_tarball(folder, package, files_of(style))
    return folder


@pytest.fixture(scope="module")
def made(tarballs, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "emoji"
    emoji.build(tarballs, out)
    return out


@pytest.fixture
def broken(tarballs, tmp_path):
    """A copy of the tarballs, to be damaged, in a folder of its own."""
    folder = tmp_path / "tarballs"
    folder.mkdir()
    for path in tarballs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def command(*args, code=2, **options):
    """`python -m data.emoji …` to its end: its only line on standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "data.emoji", *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, **options,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == (code > 0)
    return done.stderr if code else done.stdout


def pictures_of(table):
    """{(style, code): captions} of a table."""
    found = open_pictures(str(table), captions=True, filters=False)
    return {
        tuple(found.files[k].removesuffix(".png").split("/")): found.captions_of(k)
        for k in range(len(found))
    }


def test_pictures_and_captions(made):
    tables = {name: pictures_of(made / f"{name}.tsv") for name in ("train", "val", "unseen")}
    everything = {key: captions for table in tables.values() for key, captions in table.items()}
    assert sum(map(len, tables.values())) == len(everything)
    codes = {emoji.plain(code) for code in CODES} - {"1f1e6-1f1fc", "1f1e6", "1f999"}
    assert set(everything) == {(style, code) for style in emoji.STYLES for code in codes}

    captions = everything["fluent", "1f303-1f3ff"]
    assert captions[0] == "a Fluent thing 303, dark skin tone"
    assert captions[1] == "thing 303, dark skin tone, a Fluent emoji"
    assert captions[3] == "a 3D thing 303, dark skin tone"
    assert len(set(captions)) == 6
    first, second = captions[5].removeprefix("3D: thing 303, dark skin tone, ").split(", ")
    assert {first, second} < {"one", "two", "three"}
    assert everything["noto", "1f3c3-200d-2642"][2] == "Noto: man running"
    for (style, _), some in everything.items():
        for word in emoji.STYLES[style].words:
            assert sum(word in caption for caption in some) >= 3
    assert "CC BY 4.0" in (made / "LICENCES.md").read_text()

    train, val = open_dataset(str(made / "train.tsv"), 32, str(made / "val.tsv"))
    assert (len(train), len(val)) == (len(tables["train"]), len(tables["val"]))
    pixels = np.asarray(train[0][0])
    assert pixels.shape == (84, 84, 3)
    assert (pixels < 100).any(2).sum() == 64 * 64 and (pixels[10:-10, 10:-10] < 100).any(2).all()
    img = np.asarray(Image.open(made / "noto/1f300.png"))[10:-10, 10:-10]
    assert (img == np.asarray(Image.open(io.BytesIO(drawn("noto", "1f300"))))).all()
    img = np.asarray(Image.open(made / "fluent/1f300.png"))[10:-10, 10:-10].astype(int)
    exact = np.asarray(Image.open(io.BytesIO(drawn("fluent", "1f300"))))[::4, ::4]
    assert np.abs(img - exact).mean() < 10  # 4 : 1, with a filter


@pytest.mark.parametrize("size", [16, 32, 48, 64])
def test_the_margin_is_all_that_listing_2_cuts_off(size):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    image = emoji.picture(file.getvalue())
    whole = {t: (255 - area_resize(np.asarray(image), t)).sum() for t in range(size, 73)}
    for k in range(100):
        dark = (255.0 - preprocess_prior(image, size, random.Random(k))).sum()
        assert min(abs(dark / other - 1) for other in whole.values()) < 0.003


def concept_of(code):
    """By hand, for the emoji above."""
    parts = [part for part in code.split("-") if part not in TONES]
    code = "-".join(parts)
    alike = {"1f468-200d-1f466": "1f46a", "1f3c3-200d-2642": "1f3c3"}
    return alike.get(code, code.replace("1f469", "1f468"))


def test_what_is_unseen(made, tarballs, tmp_path):
    train, val, unseen = (set(pictures_of(made / f"{x}.tsv")) for x in ("train", "val", "unseen"))
    seen, held_out = ({(s, concept_of(c)) for s, c in x} for x in (train | val, unseen))
    assert not seen & held_out  # in no skin tone, of neither sex, in nothing drawn alike
    concepts = {concept for _, concept in seen}
    assert len(concepts) == 44 and len(held_out) == 4 == len({c for _, c in held_out})
    assert {style for style, _ in held_out} == set(emoji.STYLES)
    whole = defaultdict(set)
    for style, code in train | val | unseen:
        whole[concept_of(code)].add((style, code))
    for style, concept in held_out:  # the other two styles are all in training
        assert {key for key in whole[concept] if key[0] != style} <= train
        assert {key for key in whole[concept] if key[0] == style} <= unseen
    assert len(val) == 4 == len({concept_of(code) for _, code in val})

    emoji.build(tarballs, tmp_path / "again")
    for name in ("train.tsv", "val.tsv", "unseen.tsv"):
        assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes()


def test_the_command(tarballs, tmp_path):
    """From a folder, and by an npm that brings what is asked for."""
    out = tmp_path / "one"
    said = command("--from", tarballs, out, code=0)
    assert f"--data {out}/train.tsv --val {out}/val.tsv" in said
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin/npm"
    npm.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncp {tarballs}/*.tgz .\n')
    npm.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    command(tmp_path / "two", code=0, env=env)
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == "pack" and "@lobehub/fluent-emoji-3d@1.1.0" in asked
    assert (out / "train.tsv").read_bytes() == (tmp_path / "two/train.tsv").read_bytes()

    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\necho more >&2\nexit 1\n")
    assert "E404" in command(tmp_path / "three", env=env)
    assert "npm is not there" in command(tmp_path / "three", env=os.environ | {"PATH": "/nowhere"})
    assert "exists" in command("--from", tarballs, out)
    assert "does not exist" in command("--from", tarballs, tmp_path / "no/where")
    names = {"one", "two", "bin", "asked"}
    assert {path.name for path in tmp_path.iterdir()} == names  # nothing half-written


def damage(folder, how):
    package = emoji.STYLES["twemoji"]
    path = folder / package.tarball
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "another version":
        write_tarball(folder, package, files_of("twemoji"), version="15.1.2")
    elif how == "another package":
        path.write_bytes((folder / emoji.STYLES["noto"].tarball).read_bytes())
    elif how == "torn":
        path.write_bytes(data[: len(data) // 2])
    elif how == "torn in its last bytes":
        path.write_bytes(data[:-3])
    elif how == "a wrong byte":
        path.write_bytes(data[:5000] + bytes([data[5000] ^ 255]) + data[5001:])
    elif how == "no tarball":
        path.write_bytes(b"<html>not found</html>")
    elif how == "no pictures":
        write_tarball(folder, package, {})
    elif how == "a picture that is none":
        name = PLACES["twemoji"].format("1f300")
        write_tarball(folder, package, files_of("twemoji") | {name: b"none"})
    elif how == "a bomb":
        with gzip.open(path, "wb", 1) as file:
            for _ in range(emoji.MAX_BYTES // 2**20 + 2):
                file.write(bytes(2**20))


@pytest.mark.parametrize(
    "how, complaint",
    [
        ("missing", "does not exist: `npm pack emoji-datasource-twitter@16.0.0` brings it"),
        ("another version", "holds emoji-datasource-twitter 15.1.2"),
        ("another package", "holds emoji-datasource-google 16.0.0"),
        ("torn", "not a whole npm tarball"),
        ("torn in its last bytes", "not a whole npm tarball"),
        ("a wrong byte", "not a whole npm tarball"),
        ("no tarball", "not a whole npm tarball"),
        ("no pictures", "holds emoji-datasource-twitter 16.0.0, and nothing to read of it"),
        ("a picture that is none", "picture 1f300: not one of"),
        ("a bomb", "more than 268,435,456 bytes"),
    ],
)
def test_bad_tarballs(how, complaint, broken, tmp_path, monkeypatch):
    damage(broken, how)
    monkeypatch.setattr("sys.argv", ["emoji", "--from", str(broken), str(tmp_path / "out")])
    with pytest.raises(ValueError) as error:
        emoji.main()
    assert emoji.STYLES["twemoji"].tarball in str(error.value) and complaint in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tarballs"]


def test_names_that_lead_out_are_passed_over(broken, made, tmp_path):
    package = emoji.STYLES["noto"]
    png = drawn("noto", "elsewhere")
    hostile = {
        "../../evil.png": png,
        "/tmp/evil.png": png,
        "package/img/google/64/../../../../evil.png": png,
        "package/img/google/64/..png": png,
        "package/img/google/64/1f300.png\n": png,
        PLACES["noto"].format("1f300/x"): png,
    }
    write_tarball(broken, package, hostile | files_of("noto"))
    with gzip.open(broken / package.tarball) as file:
        unpacked = io.BytesIO(file.read())
    with tarfile.open(fileobj=unpacked, mode="a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(PLACES["noto"].format("1f301"))
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    (broken / package.tarball).write_bytes(gzip.compress(unpacked.getvalue(), 1))
    emoji.build(broken, tmp_path / "out")
    files = {
        root: {f.relative_to(root): f.read_bytes() for f in root.rglob("*") if f.is_file()}
        for root in (made, tmp_path / "out")
    }
    assert files[made] == files[tmp_path / "out"]


def test_a_full_disk(tarballs, tmp_path):
    def limit():  # bytes of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

    line = command("--from", tarballs, tmp_path / "out", code=1, preexec_fn=limit)
    assert "out cannot be written (File too large)" in line
    assert not list(tmp_path.iterdir())


# ---- what a run has learned of them


def test_ranks_against_a_slow_reference():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 32, 32, generator=generator)
    looks = torch.rand(12, 3, 3 * 16 * 16, generator=generator)
    looks[7] = looks[4].flip(0)  # two that are drawn alike
    true = torch.tensor([3, 4, 7, 0, 11])
    expected = []
    for image, k in zip(images.numpy(), true.tolist()):
        small = image.reshape(3, 16, 2, 16, 2).mean((2, 4)).ravel()
        nearest = [min(((small - view) ** 2).sum() for view in views) for views in looks.numpy()]
        expected.append(1 + sum(other < nearest[k] - 1e-3 for other in nearest))
    assert len(set(expected)) > 2
    assert lab.emoji.ranks(lab.emoji.distances(images, looks), true).tolist() == expected


@pytest.fixture(scope="module")
def gallery(made):
    return lab.emoji.Gallery(made, 32)


def test_a_picture_is_its_own_nearest(gallery):
    """However Listing 2 cuts it, but for what is drawn alike."""
    for k in range(0, len(gallery.keys), 7):
        views = images_to(lab.emoji.CPU, gallery.pixels[k])
        assert gallery.places(views, torch.full((6,), k)).tolist() == [1] * 6
        style, _ = gallery.keys[k]
        assert gallery.captions[k].startswith(f"a {emoji.STYLES[style].words[0]} ")
    assert np.unique(gallery.parts).tolist() == ["train", "unseen", "val"]


def test_the_judge_of_styles_is_tried_on_concepts_it_has_not_seen(gallery):
    """In every skin tone and style: what is kept from it is a tenth of the concepts."""
    kept = {c for c, is_kept in zip(gallery.concepts, gallery.kept.tolist()) if is_kept}
    seen = {c for c, is_kept in zip(gallery.concepts, gallery.kept.tolist()) if not is_kept}
    assert kept and not kept & seen and len(kept) == -(-len(kept | seen) // 10)
    assert not any(tone in concept for concept in kept | seen for tone in ("1f3fb", "1f3ff"))


def test_flaws_are_what_another_picture_has_there(monkeypatch):
    """Each cell is of some picture, in its own place, and as many are wrong as is said."""
    n, side = 400, 8
    picture = torch.arange(n)[:, None, None].expand(n, side, side)
    place = torch.arange(side**2).view(side, side)
    found = lab.emoji.flawed(picture * side**2 + place)
    assert (found % side**2 == place).all()
    shares = (found // side**2 != picture).float().mean((1, 2))
    assert abs(shares.mean() - lab.emoji.FLAWS / 2) < 0.03 and shares.max() < lab.emoji.FLAWS + 0.25
    assert (shares < 0.02).sum() >= n / 40  # some have next to none
    monkeypatch.setattr(lab.emoji, "FLAWS", 0)
    assert (lab.emoji.flawed(picture) == picture).all()


def test_the_judge_of_styles_is_three_networks_that_mirror(monkeypatch):
    """Each has learned from other flaws; a picture and its mirror image are judged alike."""
    decoded = []

    class Colors:
        """A dVAE of three codes, red, green and blue."""

        def decode(self, tokens):
            decoded.append(tokens)
            return torch.nn.functional.one_hot(tokens, 3).movedim(3, 1).float()

    monkeypatch.setattr(lab.emoji, "STEPS", 20)
    torch.manual_seed(0)
    styles = torch.arange(60) % 3
    tokens = styles[:, None, None].expand(60, 8, 8).contiguous()
    judge = lab.emoji.StyleJudge(Colors(), tokens, styles)
    plain, *flawed = decoded
    assert torch.equal(plain, tokens) and len(judge.nets) == len(flawed) == 3
    assert not any(torch.equal(a, b) for a, b in zip(decoded, [*flawed, plain]))
    with torch.inference_mode():
        assert (judge(Colors().decode(tokens)) == styles).all()
        strange = torch.rand(200, 3, 8, 8)
        found = judge(strange)
        assert len(found.unique()) > 1 and torch.equal(found, judge(strange.flip(3)))


def test_memory_is_found(gallery, capsys):
    """Pictures that are copies, from training, and pictures that are the true ones."""
    asked = np.flatnonzero(gallery.parts == "unseen").tolist()
    other = [
        next(j for j, key in enumerate(gallery.keys) if key[1] == code and key[0] != style)
        for style, code in (gallery.keys[k] for k in asked)
    ]
    for found, same, true in ((other, "100.0%", "0.0%"), (asked, "0.0%", "100.0%")):
        images = images_to(lab.emoji.CPU, gallery.pixels[found, 0])
        lab.emoji.measure_memory(gallery, asked, images, torch.tensor([True] * len(asked)))
        lines = capsys.readouterr().out.splitlines()
        if found is other:
            assert f"the same in another style {same}" in lines[0]
        assert lines[1].endswith(f"nearer than any of training: {true}")


def test_lab_emoji_runs(made, tmp_path, monkeypatch):
    """On models with random weights: it ends, and finds little."""
    torch.manual_seed(0)
    table = open_pictures(str(made / "train.tsv"), captions=True, filters=False)
    bpe = BPE.train([c for i in range(40) for c in table.captions_of(i)], 300)
    bpe.save(tmp_path / "bpe.json")
    models = {
        "dvae": DVAE(DVAEConfig(8, 8, 3, 1, 16)),
        "prior": Transformer(TransformerConfig(4, 2, 8, 24, 4, bpe.vocab_size, 16, 3)),
        "clip": CLIP(CLIPConfig(16, 8, 16, bpe.vocab_size, 24, 16, 1, 8, 8)),
    }
    for name, model in models.items():
        about = {"config": asdict(model.config), "model": model.state_dict()}
        torch.save(about, tmp_path / f"{name}.pt")
    monkeypatch.setattr(lab.emoji, "STEPS", 2)
    out = tmp_path / "sheet.png"
    options = ("--run-dir", tmp_path, "--prompts", 2, "--candidates", 2, "-o", out)
    code, said, complaint = call(lab.emoji, made, *options)
    assert code == 0, complaint
    assert "true pictures: style right" in said and "concept top 1 100.0%, top 5 100.0%" in said
    assert "2 pairs of train" in said and "2 pairs of unseen" in said and "best of 2" in said
    assert Image.open(out).width > 700
    code, _, complaint = call(lab.emoji, tmp_path, *options)
    assert code == 2 and "python -m data.emoji" in complaint
    (tmp_path / "clip.pt").unlink()
    read_run.cache_clear()
    code, _, complaint = call(lab.emoji, made, *options)
    assert code == 2 and "train_clip.py" in complaint
