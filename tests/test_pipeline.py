"""From nothing to a picture, as a user would: both trainers, the sampler, the bad inputs."""

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, call, last, log_of, run

import lab.evaluate
import sample
import train_dvae
import train_prior
from bpe import BPE
from data.toy import toy_world
from dvae import DVAE, DVAEConfig
from engine.checkpoint import load_model, load_run, read_run
from engine.cli import start
from lab import ship
from transformer import pad_text


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A miniature of the tiny preset: both stages, one or two hundred updates each."""
    run_dir = tmp_path_factory.mktemp("runs") / "mini"
    options = ["--run-dir", run_dir, "--eval-every", 500]
    run("train_dvae.py", "--tiny", "--steps", 200, "--log-every", 10, *options)
    options += ["--bpe-captions", 2000]
    run("train_prior.py", "--steps", 110, "--batch-size", 16, *options)
    return run_dir


def test_the_dvae_learns(tiny_run):
    """Its pictures come closer to held-out ones than the mean training picture, by 2 dB."""
    train = np.stack([toy_world(k, 32, "train")[0] for k in range(512)]) / 255
    val = np.stack([toy_world(k, 32, "val")[0] for k in range(512)]) / 255
    baseline = -10 * np.log10(((val - train.mean(0)) ** 2).mean((1, 2, 3))).mean()
    assert last(tiny_run, "dvae", "val_psnr") > baseline + 2
    assert last(tiny_run, "dvae", "codes") > 25
    # at β = 1: it is larger while few codes are in use
    losses = [e["recon"] + e["kl"] for e in log_of(tiny_run, "dvae") if "loss" in e]
    assert losses[-1] < losses[0] - 0.5


def test_the_prior_learns(tiny_run):
    """Image tokens below their entropy drawn one by one, text below that of each position."""
    dvae = load_model(tiny_run / "dvae.pt", DVAE, DVAEConfig)
    bpe = BPE.load(tiny_run / "bpe.json")
    pictures, captions = zip(*(toy_world(k, 32, "train") for k in range(512)))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        tokens = dvae.encode(images)

    def entropy(counts):
        p = counts[counts > 0] / counts.sum()
        return -(p * p.log()).sum().item()

    assert last(tiny_run, "prior", "val_image_loss") < entropy(tokens.flatten().bincount()) - 0.3
    texts = torch.stack([pad_text(bpe.encode(c)[:39], 40, bpe.vocab_size) for c in captions])
    positions = [entropy(column.bincount()) for column in texts[:, 1:].T]
    assert last(tiny_run, "prior", "val_text_loss") < sum(positions) / len(positions)


def test_a_run_is_shipped_in_16_bits(tmp_path):
    """It draws as before, to a grey level or two; half a run is refused."""
    shipped = ROOT / "pretrained/tiny"
    code, out, _ = call(ship, shipped, tmp_path / "out")
    assert code == 0 and "say in" in out
    weights = torch.load(tmp_path / "out/prior.pt", weights_only=True)["model"]
    assert {w.dtype for w in weights.values()} == {torch.float16}
    before, after = (
        np.asarray(sample.draw("a red cube", run_dir=path, temperature=0)[0], float)
        for path in (shipped, tmp_path / "out")
    )
    assert abs(before - after).mean() < 2
    code, _, err = call(ship, tmp_path / "out", tmp_path / "more/../out")
    assert code == 2 and "is the run itself" in err
    (tmp_path / "run").mkdir()
    (tmp_path / "run/prior_state.pt").touch()
    code, _, err = call(ship, tmp_path / "out", tmp_path / "run")
    assert code == 2 and "holds a run that can go on" in err
    shutil.copy(ROOT / "pretrained/emoji/dvae.pt", tmp_path / "out")
    code, _, err = call(ship, tmp_path / "out", tmp_path / "more")
    assert code == 2 and "not of one run" in err and not (tmp_path / "more").exists()
    (tmp_path / "out/clip.pt").unlink()
    code, _, err = call(ship, tmp_path / "out", tmp_path / "more")
    assert code == 2 and "holds no clip.pt" in err and not (tmp_path / "more").exists()


def test_the_joint_bound_counts_the_text_too(tiny_run):
    """Eq. 1 in bits for each of 32 · 32 · 3 values: 39 text and 64 image tokens, then pixels."""
    dvae = load_model(tiny_run / "dvae.pt", DVAE, DVAEConfig)
    pictures = np.stack([toy_world(k, 32, "val")[0] for k in range(512)])
    of_pixels = dvae.distortion(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
    of_text, of_image, bits = (
        last(tiny_run, "prior", f"val_{name}") for name in ("text_loss", "image_loss", "joint_bits")
    )
    nats = (39 * of_text + 64 * of_image) / 3072 + of_pixels.item()
    assert bits == pytest.approx(nats / math.log(2), rel=1e-4)


def test_a_run_is_measured_as_it_was_while_training(tiny_run, tmp_path):
    """On its own data as its log says; on pictures without captions, the dVAE alone."""
    figures = {what.strip(): figure for _, what, figure, _ in lab.evaluate.evaluate(tiny_run)}
    logged = {
        "PSNR of 512 pictures": ("dvae", "val_psnr"),
        "codes in use": ("dvae", "codes"),
        "text of 512 pairs": ("prior", "val_text_loss"),
        "its words": ("prior", "val_real_text_loss"),
        "its pads": ("prior", "val_pad_loss"),
        "image": ("prior", "val_image_loss"),
        "pixels, image and text (Eq. 1)": ("prior", "val_joint_bits"),
    }
    assert len(figures) == len(logged) + 1  # the bound, whose codes are drawn
    for what, entry in logged.items():
        assert figures[what] == pytest.approx(last(tiny_run, *entry), rel=1e-4), what
    for k in range(3):
        Image.fromarray(toy_world(k, 32, "val")[0]).save(tmp_path / f"{k}.png")
    code, out, err = call(lab.evaluate, tiny_run, "--data", tmp_path)
    assert code == 0 and out.count("dVAE") == out.count("\n") - 1 == 3, err
    assert "3 pictures" in out and "no captions" in out.splitlines()[-1]
    code, out, err = call(lab.evaluate, tmp_path)
    assert code == 2 and out == "" and "holds no dvae.pt" in err
    for name, whose in (("dvae.pt", "emoji"), ("bpe.json", "tiny"), ("prior.pt", "tiny")):
        shutil.copy(ROOT / "pretrained" / whose / name, tmp_path)
    code, out, err = call(lab.evaluate, tmp_path, "--data", "toy")
    assert code == 2 and out == "" and "not of one run" in err


def test_what_a_run_leaves(tiny_run):
    for name in ("bpe.json", "dvae.pt", "prior.pt", "log.jsonl", "dvae.png", "samples.png"):
        assert (tiny_run / name).stat().st_size > 0
    assert Image.open(tiny_run / "dvae.png").size == (8 * 136 - 8, 2 * 264 - 8)
    for stage in ("dvae", "prior"):
        assert all(
            math.isfinite(v) for e in log_of(tiny_run, stage) for k, v in e.items() if k != "stage"
        )


def test_a_picture_is_drawn_and_drawn_again(tiny_run, tmp_path):
    for name in ("a.png", "b.png"):
        out, _ = run("sample.py", "a red cube", "--run-dir", tiny_run, "-o", tmp_path / name)
    assert str(tiny_run) in out
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").size == (256, 256)
    # in float64, since in float32 one rounding can turn a token and all that follows
    read_run.cache_clear()
    load_run(tiny_run).prior.double()  # the one that is kept, which draw takes
    one = sample.draw("a red cube", 3, tiny_run, seed=5, batch_size=2)
    more = sample.draw("a red cube", 5, tiny_run, seed=5, batch_size=5)
    assert len(one) == 3 and len(more) == 5 and one[0].size == (32, 32)
    assert all((np.asarray(a) == np.asarray(b)).mean() > 0.99 for a, b in zip(one, more))
    read_run.cache_clear()


@pytest.mark.parametrize(
    "script, args, expected",
    [
        (train_dvae, ["--preset", "huge"], "huge"),
        (train_dvae, ["--tiny", "--data", "nowhere"], "not a folder"),
        (train_dvae, ["--tiny", "--data", "."], "no images"),
        (train_dvae, ["--tiny", "--batch-size", "0"], "from 1"),
        (train_dvae, ["--tiny", "--steps", "-3"], "from 1"),
        (train_dvae, ["--tiny", "--workers", "65"], "0 to 64"),
        (train_dvae, ["--tiny", "--micro-batch", "7"], "not a multiple"),
        (train_dvae, ["--tiny", "--image-size", "30"], "multiple of 4"),
        (train_dvae, ["--tiny", "--device", "cuda:0"], "not there"),
        (train_dvae, ["--tiny", "--device", "cpu:x"], "not there"),
        (train_dvae, ["--tiny", "--init-from", "nowhere.pt"], "nowhere.pt"),
        (train_dvae, ["--tiny", "--kl-weight", "nan"], "--kl-weight"),
        (train_dvae, ["--tiny", "--n-hid", "30"], "n_hid"),
        (train_dvae, ["--tiny", "--steps", "9", "--resume", "--run-dir", "RUN"], "already"),
        (train_prior, ["--steps", "9", "--init-from", "nowhere.pt", "--run-dir", "RUN"], "nowhere"),
        (train_prior, ["--run-dir", "."], "python train_dvae.py"),
        (train_prior, [], "python train_dvae.py"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    script, args, expected, tiny_run, tmp_path, monkeypatch, capsys
):
    if "cuda:0" in args and torch.cuda.is_available():
        pytest.skip("the device is there")
    args = [str(tiny_run) if arg == "RUN" else arg for arg in args]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *args])
    with pytest.raises(SystemExit) as stopped:
        start(script.main)
    assert stopped.value.code == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert expected in message
    assert not list(tmp_path.iterdir())
    assert all((tiny_run / name).is_file() for name in ("bpe.json", "dvae.pt", "prior.pt"))


def test_the_shipped_run_draws():
    """pretrained/tiny is whole, and a red cube is red."""
    pictures = sample.draw("a large red cube in the middle", 8, ROOT / "pretrained/tiny")
    middles = [np.asarray(picture)[12:20, 12:20].reshape(-1, 3).mean(0) for picture in pictures]
    assert sum(red > 1.5 * max(green, blue) for red, green, blue in middles) >= 6
