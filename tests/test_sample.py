"""sample.py on miniature models with random weights: the streams, the choice, the checks."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

import sample
from bpe import BPE
from clip import CLIP, CLIPConfig
from data.files import middle_square
from data.listings import area_resize
from data.loader import derive, words_of
from data.toy import toy_scene, toy_world
from dvae import DVAE, DVAEConfig
from engine import checkpoint
from engine.checkpoint import read_run
from engine.cli import Stop, start
from lab import describe as describing
from lab import judge
from lab.describe import describe
from sample import draw
from scale import fast
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
    """Run a script's main in an empty folder: the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args, script=sample):
        monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *map(str, args)])
        code = 0
        try:
            start(script.main)
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return call


def tokens_and_images(prompts, candidates, run_dir, **options):
    """The tokens [prompts, candidates, N] that are painted, and what draw makes of them."""
    painted, paint = [], sample.paint

    def note(dvae, tokens):
        painted.append(tokens)
        return paint(dvae, tokens)

    with mock.patch.object(sample, "paint", note):
        images = draw(prompts, candidates, run_dir, **options)
    return torch.cat(painted).view(len(prompts), candidates, -1), images


def tokens_of(*args, **options):
    return tokens_and_images(*args, **options)[0]


def cell(sheet, column, row=0, below=0):
    """A picture of a sheet, in its own size; `below` are the pixels of its caption."""
    x, y = column * 264, row * (264 + below)
    return np.asarray(
        sheet.crop((x, y, x + 256, y + 256)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    )


def test_a_candidate_is_the_same_in_any_company(mini):
    """In float64, since in float32 one rounding can turn a token and all that follows."""
    read_run.cache_clear()
    sample.load_run(mini, "cpu", "fp32").prior.double()  # the one that is kept, which draw takes
    many = tokens_of(PROMPTS, 64, mini, seed=7, batch_size=64)
    assert many.min() >= 0 and len(many[0].unique(dim=0)) > 60  # candidates differ
    assert not torch.equal(many[0], many[1])  # captions matter
    for batch_size in (1, 3, 16):
        few = tokens_of(PROMPTS, 4, mini, seed=7, batch_size=batch_size)
        assert torch.equal(few, many[:, :4]), batch_size
    assert torch.equal(tokens_of(PROMPTS[1:2], 30, mini, seed=7), many[1:2, :30])
    assert not torch.equal(tokens_of(PROMPTS, 4, mini, seed=8), many[:, :4])
    read_run.cache_clear()


def test_a_run_that_is_trained_on_is_read_again(mini, tmp_path):
    run_dir = shutil.copytree(mini, tmp_path / "run")
    draw("a cone", run_dir=run_dir)
    first = sample.load_run(run_dir)
    assert sample.load_run(run_dir) is first
    first.prior.image_head.weight.sum().backward()  # what `draw` has read can be trained
    state = checkpoint.load(run_dir / "prior.pt")
    state["model"]["image_head.weight"].zero_()
    checkpoint.save(run_dir / "prior.pt", state)
    again = sample.load_run(run_dir)
    assert first.prior.image_head.weight.any() and not again.prior.image_head.weight.any()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_end_before_the_logits(mini, dtype):
    """The resblocks multiply in 16 bits; logits (D.2), the dVAE and the reranker stay in 32."""
    kind = sample.DTYPES[dtype]
    expected, images = tokens_and_images(PROMPTS, 2, mini, temperature=0)
    scores = torch.tensor([x.info["score"] for x in images]).view(3, 2)
    prior = sample.load_run(mini, "cpu", dtype).prior
    assert {p.dtype for p in prior.blocks.parameters() if p.ndim == 2} == {kind}
    assert {p.dtype for p in prior.parameters() if p.ndim == 1} == {torch.float32}
    products, logits = set(), []
    for block in prior.blocks:
        block.out.register_forward_hook(lambda _, x, y: products.add(x[0].dtype))
    prior.image_head.register_forward_hook(lambda _, x, y: logits.append(y))
    found, images = tokens_and_images(PROMPTS, 2, mini, temperature=0, dtype=dtype)
    assert kind in products
    logits = torch.cat([x.flatten() for x in logits])
    assert logits.dtype == torch.float32
    assert (logits != logits.to(kind).float()).float().mean() > 0.9
    same = (found == expected).all(-1)
    assert same.any() and found.min() >= 0
    found = torch.tensor([x.info["score"] for x in images]).view(3, 2)
    assert torch.allclose(found[same], scores[same], atol=1e-5)
    read_run.cache_clear()


@pytest.mark.parametrize("candidates, batch_size", [(1, 16), (4, 1), (4, 3), (4, 16), (7, 7)])
def test_batches_fit_and_hold_everything_once(mini, candidates, batch_size):
    plain = sample.fast.generate
    with mock.patch.object(sample.fast, "generate", side_effect=plain) as generate:
        images = draw(PROMPTS, candidates, mini, batch_size=batch_size)
    assert all(len(call.args[1]) <= batch_size for call in generate.call_args_list)
    drawn = [(PROMPTS.index(x.info["prompt"]), x.info["candidate"]) for x in images]
    assert sorted(drawn) == [(p, c) for p in range(3) for c in range(candidates)]


def test_the_same_command_writes_the_same_bytes(mini, main, tmp_path):
    """In a process of its own; and the pictures again, from what the PNG keeps."""
    options = ["a red cube", "a cone", "--candidates", 5, "--top", 2, "--seed", 3, "--top-p", 0.9]
    code, out, _ = main(*options, "--run-dir", mini, "-o", "a.png")
    assert code == 0 and "the best 2 of 5 kept" in out
    command = [sys.executable, ROOT / "sample.py", *map(str, options), "--run-dir", mini]
    subprocess.run([*command, "-o", "b.png"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}
    sheet = Image.open(tmp_path / "a.png")
    kept = json.loads(sheet.text["dalle"])
    assert kept["options"]["seed"] == 3 and kept["options"]["prompt"] == options[:2]
    again = draw(**kept["options"])
    for k, (picture, image) in enumerate(zip(kept["pictures"], again, strict=True)):
        assert {name: image.info[name] for name in picture} == picture
        assert (cell(sheet, k % 2, k // 2, 16) == np.asarray(image)).all()
    picture = kept["pictures"][2]
    assert picture["prompt"] == "a cone" and 0 <= picture["candidate"] < 5
    # a candidate found by its number is that picture
    again = draw("a cone", 5, mini, seed=3, top_p=0.9, batch_size=15)[picture["candidate"]]
    difference = np.abs(np.asarray(again, int) - cell(sheet, 0, 1, 16))
    assert again.size == (SIDE, SIDE) and difference.mean() < 2


@torch.inference_mode()
def test_the_reranker_keeps_the_best(mini):
    tokens, images = tokens_and_images(PROMPTS, 9, mini, top=4, batch_size=4)
    bpe, dvae, _, clip, _ = sample.load_run(mini, "cpu", "fp32")
    for p, row in enumerate([images[:4], images[4:8], images[8:]]):
        pixels = dvae.decode(tokens[p].view(-1, GRID, GRID))
        ids = bpe.encode(PROMPTS[p])
        text = torch.tensor([ids + [bpe.vocab_size] * (12 - len(ids))])
        cosines = clip.encode_image(pixels) @ clip.encode_text(text)[0]
        best = cosines.argsort(descending=True)[:4].tolist()
        assert [x.info["candidate"] for x in row] == best
        assert [x.info["score"] for x in row] == pytest.approx(cosines[best].tolist(), abs=1e-5)
        for x in row:
            shown = torch.from_numpy(np.array(x)).permute(2, 0, 1) / 255
            assert torch.allclose(shown, pixels[x.info["candidate"]], atol=0.51 / 255)
    in_order = [x.info["candidate"] for x in draw(PROMPTS[:1], 9, mini, batch_size=4)]
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
    tokens, images = tokens_and_images(PROMPTS, 3, mini, image=photo, keep_rows=3)
    dvae = sample.load_run(mini, "cpu", "fp32").dvae
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        seen = dvae.encode(pixels)
        kept = dvae.decode(seen)[0, :, : 3 * 4]
    assert (tokens[..., :12] == seen.flatten()[:12]).all()
    assert (tokens[..., 12:] >= 0).all()
    assert len(tokens[..., 12:].reshape(9, -1).unique(dim=0)) > 1
    original, top = images[0].info["continues"]
    assert (np.asarray(original) == np.asarray(photo)).all()
    top = torch.from_numpy(np.array(top)).permute(2, 0, 1) / 255
    assert torch.allclose(top[:, : 3 * 4], kept, atol=0.51 / 255)
    assert (top[:, 3 * 4 :] == top[0, -1, -1]).all()

    photo.save(tmp_path / "photo.png")
    options = ["--image", "photo.png", "--keep-rows", 3, "--run-dir", mini]
    assert main(*PROMPTS, *options)[0] == 0
    sheet = Image.open(tmp_path / "sample.png")
    assert sheet.width == 3 * 256 + 2 * 8 and sheet.height > 3 * 256  # original, kept, drawn
    assert (cell(sheet, 0) == np.asarray(photo)).all()


def test_captions_are_scored(mini, bare, main, tmp_path):
    """ln p of image and caption per token, one caption at a time out of forward()."""
    photo = Image.fromarray(np.random.default_rng(2).integers(0, 256, (20, 30, 3), np.uint8))
    found = describe(photo, PROMPTS, mini)
    bpe, dvae, prior, clip, _ = sample.load_run(mini)
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
    assert describe(photo, PROMPTS[:1], bare)[0].cosine is None

    photo.save(tmp_path / "photo.png")
    code, out, _ = main("photo.png", *PROMPTS, "--run-dir", mini, script=describing)
    assert code == 0 and {path.name for path in tmp_path.iterdir()} == {"photo.png"}
    assert [line.split("  ")[-1] for line in out.splitlines()[1:]] == [r.caption for r in found]


def test_guidance(mini):
    """1 changes nothing, more does."""
    plain = tokens_of(PROMPTS, 6, mini)
    assert torch.equal(tokens_of(PROMPTS, 6, mini, guidance=1.0), plain)
    assert not torch.equal(tokens_of(PROMPTS, 6, mini, guidance=3.0), plain)


def test_watching(mini, main, tmp_path):
    """A frame for each row of each batch, all of one size; the last is what is returned."""
    frames = []
    images = draw(PROMPTS, 3, mini, batch_size=6, watch=frames.append)
    assert [len(frame) for frame in frames] == [9] * 8
    grey = [np.mean([(np.asarray(x) == 230).all(-1) for x in frame]) for frame in frames]
    assert all(a > b for a, b in zip(grey, grey[1:]))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(images, frames[-1]))

    options = ["--candidates", 3, "--batch-size", 6, "--gif", "a.gif", "-o", "a.png"]
    assert main(*PROMPTS, *options, "--run-dir", mini)[0] == 0
    with Image.open(tmp_path / "a.gif") as gif:
        assert len({frame.size for frame in ImageSequence.Iterator(gif)}) == 1
        assert gif.n_frames == 8
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.gif"}


def test_many_candidates_are_a_near_square(mini):
    """Beside a picture that is continued too: WebP has room for 16,383 pixels in a row."""
    images = draw("a cone", 2, mini, image=Image.new("RGB", (16, 16)), keep_rows=2)
    widths = [sample.page(images * n, 2 * n, 1, False).width for n in (15, 16, 500)]
    assert widths == [32 * 136 - 8, 6 * 136 - 8, 32 * 136 - 8]


@pytest.mark.parametrize("token, left", [(GRID**2 + 2 * GRID, 2), (GRID, 1)])
def test_ctrl_c_keeps_what_is_drawn(mini, main, tmp_path, monkeypatch, token, left):
    """Interrupted in the second of three pictures, and in the first."""

    updates = []

    class Bar(sample.tqdm):
        def update(self):
            updates.append(None)
            if len(updates) == token:
                raise KeyboardInterrupt

    monkeypatch.setattr(sample, "tqdm", Bar)
    code, _, err = main(*PROMPTS, "--batch-size", 1, "--run-dir", mini, "-o", "a.png")
    assert code == 130 and err.endswith("sample.py: stopped; a.png keeps what was drawn\n")
    sheet = Image.open(tmp_path / "a.png")
    kept = json.loads(sheet.text["dalle"])["pictures"]
    assert [picture["prompt"] for picture in kept] == PROMPTS[:left]
    last = cell(sheet, left - 1)
    rows = token % GRID**2 // GRID * 4
    assert (last[rows:] == 230).all() and (last[:rows] != 230).any(-1).all(1).all()


def test_ctrl_c_before_the_first_token(mini, main, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.fast, "generate", interrupted)
    code, _, err = main("a cone", "--run-dir", mini)
    assert (code, err) == (130, "sample.py: stopped\n") and not list(tmp_path.iterdir())


def test_nothing_to_draw_or_to_score_is_refused(mini):
    with pytest.raises(ValueError, match="int8"):
        sample.draw("a cone", run_dir=mini, dtype="int8")
    with pytest.raises(ValueError, match="no prompt"):
        draw([], 1, mini)
    with pytest.raises(ValueError, match="no caption"):
        describe(Image.new("RGB", (SIDE, SIDE)), [], mini)


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
        (["a cone", "--candidates", "4", "--top", "4", "--run-dir", "BARE"], "train_clip.py"),
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
        (["a cone", "-o", "folder.png"], "is a folder"),
        (["a cone", "-o", "x" * 255 + ".png"], "too long"),
        (["a cone", "-o", "nowhere/a.png"], "does not exist"),
        (["a cone", "-o", "picture"], "name of a picture"),
        (["a cone", "-o", "picture.psd"], "name of a picture"),
        (["a cone", "--gif", "a.png"], "such as cube.gif"),
        (["a cone", "--gif", "a.gif", "--candidates", "129"], "up to 128"),
        (["a cone", "--device", "cuda:x"], "not there"),
        (["a cone", "--device", "gpu"], "not there"),
        (["a cone", "--dtype", "bf16"], "GPU"),
        (["a cone", "--dtype", "int8"], "--dtype"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(args, expected, mini, bare, main, tmp_path):
    photo(tmp_path / "photo.png")
    photo(tmp_path / "tiny.png", (3, 20))
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf\n")  # but for a byte-order mark
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "folder.png").mkdir()
    there = sorted(tmp_path.iterdir())
    args = [str(bare) if arg == "BARE" else arg for arg in args]
    if "--run-dir" not in args:
        args += ["--run-dir", str(mini)]
    code, _, err = main(*args)
    (message,) = err.strip().splitlines()
    assert code == 2 and expected in message
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    "args, expected",
    [
        (["empty.txt", "a cone"], "cannot be read"),
        (["photo.png"], "caption"),
        (["photo.png", " "], "empty"),
        (["photo.png", "a cone", "--run-dir", "."], "train it with"),
    ],
)
def test_what_cannot_be_described_is_one_line_too(args, expected, mini, main, tmp_path):
    photo(tmp_path / "photo.png")
    (tmp_path / "empty.txt").touch()
    if "--run-dir" not in args:
        args += ["--run-dir", str(mini)]
    code, _, err = main(*args, script=describing)
    (message,) = err.strip().splitlines()
    assert code == 2 and expected in message


def test_words_that_training_never_held_are_named(mini, main, tmp_path):
    """In one line, each once; the picture is drawn all the same. An older file says nothing."""
    assert words_of("Two RED cubes, 3 d'été") == ["two", "red", "cubes", "d", "été"]
    assert words_of("नमस्ते 123 !") == ["नमस्ते"] and not words_of("")
    assert main("a red dog", "--run-dir", mini)[::2] == (0, "")
    told = tmp_path / "told"
    told.mkdir()
    for name in ("bpe.json", "dvae.pt"):
        os.link(mini / name, told / name)
    prior = torch.load(mini / "prior.pt", weights_only=True)
    torch.save(prior | {"words": ["a", "red", "cube", "on"]}, told / "prior.pt")
    assert main("A red CUBE", "a red 3", "--run-dir", told)[::2] == (0, "")
    code, _, err = main("a red dog", "a Cat, dog", "--run-dir", told)
    assert (code, err) == (0, "sample.py: rare or never seen in training: dog, cat\n")
    assert Image.open("sample.png").size == (2 * 264 - 8, 256 + 16)
    with pytest.warns(UserWarning, match="never seen in training: cone$"):
        (image,) = draw("a cone", 1, told)
    assert image.size == (SIDE, SIDE)


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
    except Stop as stopped:
        assert stopped.code == 2
        return
    except SystemExit:
        assert {"-h", "--help"} & set(argv)
        return
    assert args["prompt"]


def test_what_the_judge_refuses():
    emoji = sample.SHIPPED.parent / "emoji"  # 32 × 32 pixels, too
    with pytest.raises(ValueError, match="a run on the toy world"):
        judge.open_run(emoji, 200, None)
    for prompts, candidates in ((0, None), (1, 4)):
        with pytest.raises(ValueError, match="--prompts is"):
            judge.open_run(sample.SHIPPED, prompts, candidates)
    assert judge.open_run(sample.SHIPPED, 1, None)


def test_candidates_drawn_together_are_those_of_each_caption():
    """Two at once, and one that is left, against each alone."""
    run, captions = checkpoint.load_run(sample.SHIPPED), ["a red cube", "a blue cone", "a red cube"]
    drawn = list(judge.draw_candidates(run, captions, 128, seed=3))
    assert len(drawn) == 3
    for k, (images, scores) in enumerate(drawn):
        text = sample.encode_prompt(captions[k], run.bpe, run.prior).expand(128, -1)
        u = sample.uniforms_of(np.int64(derive(3, "prompt", k)), range(128), 64)
        tokens = fast.generate(run.prior, text, uniforms=u).view(-1, 8, 8)
        alone = run.dvae.decode(tokens)
        same = (images - alone).abs().amax((1, 2, 3)) < 1e-4
        assert same.float().mean() > 0.95  # sums in another order may turn a draw at its edge
        assert scores.shape == (128,)
    assert not torch.equal(drawn[0][0], drawn[2][0])


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


@pytest.mark.parametrize("split", ["val", "unseen"])
def test_the_judge_tries_the_dvae_on_each_split(split):
    """With a dVAE that loses nothing the error is the sensor noise; with a judge that calls all
    things pink cones, as many are right as there are pink cones alone in a picture."""

    class Lossless:
        def encode(self, images):
            self.images = images
            return torch.arange(len(images)) % 7

        def decode(self, tokens):
            return self.images

    def pink_cone(x):
        return F.one_hot(torch.tensor([7] * len(x)), 8), F.one_hot(torch.tensor([3] * len(x)), 5)

    decibels, pairs = [], []
    for index in range(512):
        noisy, clean = (toy_world(index, 32, split, noise)[0] / 255 for noise in (True, False))
        decibels.append(-10 * np.log10(((noisy - clean) ** 2).mean()))
        things = toy_scene(index, split).things
        pairs += [(thing.color, thing.shape) for thing in things if len(things) == 1]
    psnr, share, codes = judge.judge_dvae(pink_cone, Lossless(), split)
    assert psnr == pytest.approx(np.mean(decibels), abs=1e-3) and codes == 7
    assert share == pytest.approx(pairs.count(("pink", "cone")) / len(pairs))
    assert (share > 0) == (split == "unseen")
