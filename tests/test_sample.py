"""sample.py on miniature models with random weights: the streams, the choice, the checks."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

import sample
from bpe import BPE
from clip import CLIP, CLIPConfig
from data.files import middle_square
from data.listings import area_resize
from dvae import DVAE, DVAEConfig
from engine.cli import start
from lab import judge
from sample import Drawing, describe, draw
from transformer import Transformer, TransformerConfig, pad_text

ROOT = Path(__file__).resolve().parent.parent
GRID, SIDE, PROMPTS = 4, 16, ["a red cube", "a blue sphere", "a cone"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A run directory: 4 × 4 tokens of 16 codes, 16 × 16 pixels."""
    run_dir = tmp_path_factory.mktemp("mini")
    torch.manual_seed(0)
    bpe = BPE.train(PROMPTS * 2, 270)
    bpe.save(run_dir / "bpe.json")
    models = {
        "dvae": DVAE(DVAEConfig(8, 8, 3, 1, 16)),
        "prior": Transformer(TransformerConfig(4, 2, 8, 12, GRID, bpe.vocab_size, 16, 3)),
        "clip": CLIP(CLIPConfig(SIDE, 8, 16, bpe.vocab_size, 12, 16, 1, 8, 8)),
    }
    with torch.no_grad():
        for p in models["prior"].parameters():
            p.mul_(8 if p.ndim == 2 else 1)  # so that the caption and the tokens before matter
    for name, model in models.items():
        about = {"config": asdict(model.config), "model": model.state_dict()}
        torch.save(about | {"caption_dropout": 0.1}, run_dir / f"{name}.pt")
    return run_dir


@pytest.fixture(scope="module")
def bare(mini, tmp_path_factory):
    """The same run without a reranker, and its prior never saw an empty caption."""
    run_dir = tmp_path_factory.mktemp("bare")
    for name in ("bpe.json", "dvae.pt"):
        os.link(mini / name, run_dir / name)
    prior = torch.load(mini / "prior.pt", weights_only=True)
    torch.save(prior | {"caption_dropout": 0.0}, run_dir / "prior.pt")
    return run_dir


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
    """Run sample.py's main in an empty folder: the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        code = 0
        try:
            start(sample.main)
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return call


def tokens_of(*args, **options):
    drawing = Drawing(*args, **options)
    drawing.draw()
    return drawing.tokens


def test_a_candidate_is_the_same_in_any_company(mini):
    """In float64, since in float32 one rounding can turn a token and all that follows."""
    sample.load_run.cache_clear()
    sample.load_run(mini, "cpu", "fp32")[2].double()  # the one that is kept, which Drawing takes
    many = tokens_of(PROMPTS, 64, mini, seed=7, batch_size=64)
    assert many.min() >= 0 and len(many[0].unique(dim=0)) > 60  # candidates differ
    assert not torch.equal(many[0], many[1])  # captions matter
    for batch_size in (1, 3, 16):
        few = tokens_of(PROMPTS, 4, mini, seed=7, batch_size=batch_size)
        assert torch.equal(few, many[:, :4]), batch_size
    assert torch.equal(tokens_of(PROMPTS[1:2], 30, mini, seed=7), many[1:2, :30])
    assert not torch.equal(tokens_of(PROMPTS, 4, mini, seed=8), many[:, :4])
    sample.load_run.cache_clear()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_end_before_the_logits(mini, dtype):
    """The resblocks multiply in 16 bits; logits (D.2), the dVAE and the reranker stay in 32."""
    drawing, kind = Drawing(PROMPTS, 2, mini, temperature=0), sample.DTYPES[dtype]
    drawing.draw()
    expected, scores = drawing.tokens.clone(), torch.tensor(drawing.scores)
    prior = sample.load_run(mini, "cpu", dtype)[2]
    assert {p.dtype for p in prior.blocks.parameters() if p.ndim == 2} == {kind}
    assert {p.dtype for p in prior.parameters() if p.ndim == 1} == {torch.float32}
    drawing.prior, drawing.dtype = prior, dtype
    products, logits = set(), []
    for block in prior.blocks:
        block.out.register_forward_hook(lambda _, x, y: products.add(x[0].dtype))
    prior.image_head.register_forward_hook(lambda _, x, y: logits.append(y))
    drawing.tokens.fill_(-1)
    drawing.draw(watch=lambda: None)
    assert kind in products
    logits = torch.cat([x.flatten() for x in logits])
    assert logits.dtype == torch.float32
    assert (logits != logits.to(kind).float()).float().mean() > 0.9
    same = (drawing.tokens == expected).all(-1)
    assert same.any() and drawing.tokens.min() >= 0
    assert torch.allclose(torch.tensor(drawing.scores)[same], scores[same], atol=1e-5)


@pytest.mark.parametrize("candidates, batch_size", [(1, 16), (4, 1), (4, 3), (4, 16), (7, 7)])
def test_batches_fit_and_hold_everything_once(mini, candidates, batch_size):
    batches = Drawing(PROMPTS, candidates, mini, batch_size=batch_size).batches()
    assert all(len(prompts) * len(part) <= batch_size for prompts, part in batches)
    drawn = [(p, c) for prompts, part in batches for p in prompts for c in part]
    assert sorted(drawn) == [(p, c) for p in range(3) for c in range(candidates)]


def test_the_same_command_writes_the_same_bytes(mini, main, tmp_path):
    """In a process of its own, again, and from what the PNG keeps."""
    options = ["a red cube", "a cone", "--candidates", 5, "--top", 2, "--seed", 3, "--top-p", 0.9]
    code, out, _ = main(*options, "--run-dir", mini, "-o", "a.png", "--each")
    assert code == 0 and "the best 2 of 5 kept" in out
    command = [sys.executable, ROOT / "sample.py", *map(str, options), "--run-dir", mini]
    subprocess.run([*command, "-o", "b.png"], cwd=tmp_path, check=True, capture_output=True)
    assert main("--repeat", "a-03.png", "-o", "c.png", "--each")[0] == 0
    whole = (tmp_path / "a.png").read_bytes()
    assert whole == (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert (tmp_path / "a-03.png").read_bytes() == (tmp_path / "c-03.png").read_bytes()
    names = {f"{name}{part}.png" for name in "ac" for part in ("", "-00", "-01", "-02", "-03")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"b.png"}
    kept = json.loads(Image.open(tmp_path / "a-02.png").text["dalle"])
    assert kept["options"]["seed"] == 3 and kept["options"]["prompts"] == options[:2]
    (picture,) = kept["pictures"]
    assert picture["prompt"] == "a cone" and 0 <= picture["candidate"] < 5
    # a candidate found by its number is that picture
    again = draw("a cone", 5, mini, seed=3, top_p=0.9, batch_size=15)[picture["candidate"]]
    difference = np.abs(np.asarray(again, int) - np.asarray(Image.open(tmp_path / "a-02.png"), int))
    assert again.size == (SIDE, SIDE) and difference.mean() < 2


@torch.inference_mode()
def test_the_reranker_keeps_the_best(mini):
    drawing = Drawing(PROMPTS, 9, mini, top=4, batch_size=4)
    drawing.draw()
    for p, row in enumerate(drawing.pictures(4)):
        pixels = drawing.dvae.decode(drawing.tokens[p].view(-1, GRID, GRID))
        ids = drawing.bpe.encode(PROMPTS[p])
        text = torch.tensor([ids + [drawing.bpe.vocab_size] * (12 - len(ids))])
        cosines = drawing.clip.encode_image(pixels) @ drawing.clip.encode_text(text)[0]
        best = cosines.argsort(descending=True)[:4].tolist()
        assert [picture.candidate for picture in row] == best
        assert [picture.score for picture in row] == pytest.approx(cosines[best].tolist(), abs=1e-5)
        for picture in row:
            shown = torch.from_numpy(np.array(picture.image)).permute(2, 0, 1) / 255
            assert torch.allclose(shown, pixels[picture.candidate], atol=0.51 / 255)
    in_order = [picture.candidate for picture in drawing.pictures()[0]]
    assert in_order == list(range(9))


def test_the_middle_of_a_picture():
    """As the middle of Listing 2's offsets: a square of the short side, averaged over areas."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 96, 3), np.uint8)
    expected = area_resize(pixels[:, 32:64], 16)
    found = np.asarray(middle_square(Image.fromarray(pixels), 16, 4), float)
    assert np.abs(found - expected).max() <= 0.5
    tall = middle_square(Image.fromarray(pixels.swapaxes(0, 1)), 16, 4)
    assert np.abs(np.asarray(tall, float).swapaxes(0, 1) - expected).max() <= 0.5001
    assert middle_square(Image.new("L", (5, 4)), 16, 4).size == (16, 16)


def test_a_picture_goes_on(mini, main, tmp_path):
    """Its top rows are kept, token by token, and shown as the dVAE sees them."""
    rng = np.random.default_rng(1)
    photo = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    drawing = Drawing(PROMPTS, 3, mini, image=photo, keep_rows=3)
    drawing.draw()
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        seen = drawing.dvae.encode(pixels)
        kept = drawing.dvae.decode(seen)[0, :, : 3 * 4]
    assert (drawing.tokens[..., :12] == seen.flatten()[:12]).all()
    assert (drawing.tokens[..., 12:] >= 0).all()
    assert len(drawing.tokens[..., 12:].reshape(9, -1).unique(dim=0)) > 1
    original, top = drawing.originals
    assert (np.asarray(original) == np.asarray(photo)).all()
    top = torch.from_numpy(np.array(top)).permute(2, 0, 1) / 255
    assert torch.allclose(top[:, : 3 * 4], kept, atol=0.51 / 255)
    assert (top[:, 3 * 4 :] == top[0, -1, -1]).all()

    photo.save(tmp_path / "photo.png")
    options = ["--image", "photo.png", "--keep-rows", 3, "--run-dir", mini]
    assert main(*PROMPTS, *options)[0] == 0
    sheet = Image.open(tmp_path / "sample.png")
    assert sheet.width == 3 * 256 + 2 * 8 and sheet.height > 3 * 256  # original, kept, drawn
    corner = sheet.crop((0, 0, 256, 256)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    assert (np.asarray(corner) == np.asarray(photo)).all()


def test_captions_are_scored(mini, bare, main, tmp_path):
    """ln p of image and caption per token, one caption at a time out of forward()."""
    photo = Image.fromarray(np.random.default_rng(2).integers(0, 256, (20, 30, 3), np.uint8))
    found = describe(PROMPTS, photo, mini, batch_size=2)
    bpe, dvae, prior = sample.load_run(mini, "cpu")
    clip = sample.load_reranker(mini, "cpu")
    square = (
        torch.from_numpy(np.array(middle_square(photo, SIDE, GRID))).permute(2, 0, 1)[None] / 255
    )
    assert {row.caption for row in found} == set(PROMPTS)
    for caption, image, text, cosine in found:
        ids = pad_text(bpe.encode(caption), 12, bpe.vocab_size)[None]
        with torch.no_grad():
            tokens = dvae.encode(square).flatten(1)
            text_logits, image_logits = prior(ids, tokens)
            expected = clip.encode_text(clip.pad(bpe.encode(caption))[None])
            expected = F.cosine_similarity(expected, clip.encode_image(square)).item()
        assert image == pytest.approx(-F.cross_entropy(image_logits[0], tokens[0]).item(), 1e-4)
        assert text == pytest.approx(-F.cross_entropy(text_logits[0], ids[0, 1:]).item(), 1e-4)
        assert cosine == pytest.approx(expected, abs=1e-5)
    scores = [row.image for row in found]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    assert describe(PROMPTS[:1], photo, bare)[0].cosine is None

    photo.save(tmp_path / "photo.png")
    code, out, _ = main(*PROMPTS, "--describe", "photo.png", "--run-dir", mini)
    assert code == 0 and not (tmp_path / "sample.png").exists()
    assert [line.split("  ")[-1] for line in out.splitlines()[1:]] == [r.caption for r in found]


def test_guidance(mini):
    """1 changes nothing, more does."""
    plain = tokens_of(PROMPTS, 6, mini)
    assert torch.equal(tokens_of(PROMPTS, 6, mini, guidance=1.0), plain)
    assert not torch.equal(tokens_of(PROMPTS, 6, mini, guidance=3.0), plain)


def test_watching(mini, main, tmp_path, monkeypatch):
    """A frame for each row of each batch, all of one size; the last is the finished sheet."""
    written, write = [], sample.write_picture

    def note(path, image, *args, **options):
        written.append((path.name, image.copy()))
        write(path, image, *args, **options)

    monkeypatch.setattr(sample, "write_picture", note)
    options = ["--candidates", 3, "--batch-size", 6, "--watch", "--preview", "--gif", "a.gif"]
    code, _, _ = main(*PROMPTS, *options, "--run-dir", mini, "-o", "a.png")
    assert code == 0
    assert [name for name, _ in written] == ["a.png"] * 9 + ["a.gif"]
    grey = [(np.asarray(image) == 230).all(-1).mean() for _, image in written[:8]]
    assert all(a > b for a, b in zip(grey, grey[1:]))
    with Image.open(tmp_path / "a.gif") as gif:
        assert {frame.size for frame in ImageSequence.Iterator(gif)} == {written[0][1].size}
        assert gif.n_frames == 8
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.gif"}


def test_the_terminal_shows_every_pixel(mini):
    (image,) = draw("a cone", 1, mini)
    lines = sample.terminal(image, 80).split("\n")
    assert len(lines) == SIDE // 2
    for y, line in enumerate(lines):
        colors = re.findall(r"38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", line)
        both = np.array(colors, int).reshape(SIDE, 2, 3).swapaxes(0, 1)
        assert (both == np.asarray(image)[2 * y : 2 * y + 2]).all()
    assert sample.terminal(image, 8).count("▀") == 8 * 4


@pytest.mark.parametrize("token, left", [(GRID**2 + 2 * GRID, 2), (GRID, 1)])
def test_ctrl_c_keeps_what_is_drawn(mini, main, tmp_path, monkeypatch, token, left):
    """Interrupted in the second of three pictures, and in the first."""

    class Bar(sample.tqdm):
        def update(self):
            super().update()
            if self.n == token:
                raise KeyboardInterrupt

    monkeypatch.setattr(sample, "tqdm", Bar)
    code, _, err = main(*PROMPTS, "--batch-size", 1, "--run-dir", mini, "-o", "a.png", "--each")
    assert code == 130 and err.endswith("sample.py: stopped; a.png keeps what was drawn\n")
    kept = json.loads(Image.open(tmp_path / "a.png").text["dalle"])["pictures"]
    assert [picture["prompt"] for picture in kept] == PROMPTS[:left]
    last = np.asarray(Image.open(tmp_path / f"a-{left - 1:02}.png"))
    rows = token % GRID**2 // GRID * 4
    assert (last[rows:] == 230).all() and (last[:rows] != 230).any(-1).all(1).all()


def test_ctrl_c_before_the_first_token(mini, main, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Transformer, "generate", interrupted)
    code, _, err = main("a cone", "--run-dir", mini)
    assert (code, err) == (130, "sample.py: stopped\n") and not list(tmp_path.iterdir())


def test_nothing_to_draw_or_to_score_is_refused(mini):
    with pytest.raises(ValueError, match="no prompt"):
        draw([], 1, mini)
    with pytest.raises(ValueError, match="no caption"):
        describe([], Image.new("RGB", (SIDE, SIDE)), mini)


def photo(path, size=(20, 20), **options):
    Image.new("RGB", size, "red").save(path, **options)
    return path


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], "no prompt"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "latin1.txt"], "no UTF-8"),
        (["--prompts", "empty.txt"], "no prompt"),
        (["caf\udce9"], "no UTF-8"),
        (["a cone", " "], "empty"),
        (["x" * 999], "tokens"),
        (["a cone", "--run-dir", "."], "train it with"),
        (["a cone", "--candidates", "0"], "candidates is 0"),
        (["a cone", "--candidates", "4", "--top", "0"], "1 to 4"),
        (["a cone", "--candidates", "4", "--top", "5"], "1 to 4"),
        (["a cone", "--candidates", "4", "--top", "2", "--run-dir", "BARE"], "train_clip.py"),
        (["a cone", "--batch-size", "-1"], "batch_size is -1"),
        (["a cone", "--temperature", "nan"], "temperature"),
        (["a cone", "--top-p", "0"], "top_p"),
        (["a cone", "--top-k", "0"], "top_k"),
        (["a cone", "--seed", "x"], "--seed"),
        (["a cone", "--guidance", "2", "--run-dir", "BARE"], "--caption-dropout"),
        (["a cone", "--guidance", "-1"], "guidance"),
        (["a cone", "--keep-rows", "2"], "belong together"),
        (["a cone", "--image", "photo.png"], "belong together"),
        (["a cone", "--image", "photo.png", "--keep-rows", "0"], "1 to 3"),
        (["a cone", "--image", "photo.png", "--keep-rows", "4"], "1 to 3"),
        (["a cone", "--image", "tiny.png", "--keep-rows", "2"], "tiny: 3 × 20"),
        (["a cone", "--image", "empty.txt", "--keep-rows", "2"], "cannot be read"),
        (["a cone", "--image", "nowhere.png", "--keep-rows", "2"], "cannot be read"),
        (["a cone", "--describe", "empty.txt"], "cannot be read"),
        (["a cone", "--describe", "photo.png", "--gif", "a.gif"], "exclude"),
        (["a cone", "--describe", "photo.png", "--top", "1"], "exclude"),
        (["a cone", "--describe", "photo.png", "--batch-size", "0"], "batch_size is 0"),
        (["--describe", "photo.png"], "no prompt"),
        (["a cone", "--repeat", "photo.png"], "exclude"),
        (["--repeat", "photo.png"], "sample.py has drawn"),
        (["--repeat", "hostile.png"], "sample.py has drawn"),
        (["a cone", "-o", "folder.png"], "is a folder"),
        (["a cone", "-o", "part.png", "--each"], "part-00.png is a folder"),
        (["a cone", "-o", "x" * 255 + ".png"], "too long"),
        (["a cone", "-o", "nowhere/a.png"], "does not exist"),
        (["a cone", "-o", "picture"], "name of a picture"),
        (["a cone", "-o", "picture.psd"], "name of a picture"),
        (["a cone", "--gif", "a.png"], "such as cube.gif"),
        (["a cone", "--device", "cuda:x"], "not there"),
        (["a cone", "--device", "gpu"], "not there"),
        (["a cone", "--dtype", "bf16"], "GPU"),
        (["a cone", "--dtype", "int8"], "--dtype"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(args, expected, mini, bare, main, tmp_path):
    photo(tmp_path / "photo.png")
    photo(tmp_path / "tiny.png", (3, 20))
    info = PngInfo()
    info.add_text("dalle", '{"options": {"prompts": 3}, "pictures": []}')
    photo(tmp_path / "hostile.png", pnginfo=info)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "part-00.png").mkdir()
    there = sorted(tmp_path.iterdir())
    args = [str(bare) if arg == "BARE" else arg for arg in args]
    if "--run-dir" not in args and "--repeat" not in args:
        args += ["--run-dir", str(mini)]
    code, _, err = main(*args)
    (message,) = err.strip().splitlines()
    assert code == 2 and expected in message
    assert sorted(tmp_path.iterdir()) == there


OPTIONS = sorted({name for a in sample.make_parser()._actions for name in a.option_strings})


@given(
    st.lists(st.sampled_from(OPTIONS) | st.text(max_size=4) | st.sampled_from("019-"), max_size=6)
)
@settings(max_examples=200, deadline=None)
def test_any_command_line_is_read_or_refused(argv):
    try:
        args = sample.parse(argv)
    except (ValueError, OSError):
        return
    except SystemExit as stopped:
        assert stopped.code == 2 or {"-h", "--help"} & set(argv)
        return
    assert args.prompt


def test_best_of_n():
    """Groups one after the other against every prompt and group spelled out."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(5, 8, generator=generator)
    good = torch.rand(5, 8, generator=generator) < 0.5
    for n in (1, 2, 4, 8):
        for p, share in enumerate(judge.best_of(scores, good, n).tolist()):
            groups = [range(k, k + n) for k in range(0, 8, n)]
            best = [max(group, key=lambda c: scores[p, c]) for group in groups]  # noqa: B023
            assert share == pytest.approx(sum(good[p, c].item() for c in best) / len(best))
