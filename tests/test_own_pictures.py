"""Pictures that people bring: flat ones keep their codes, broken ones are passed over."""

import random

import drawings
import pytest
from PIL import Image
from scripts import call, last

import train_dvae
import train_prior


def test_flat_logos_keep_their_codes(tmp_path):
    """Where a picture is flat the density has no bound: without the presets' floor of ln b, their
    β and their gain 32 of 256 codes are left here after as many updates, with them 113."""
    drawings.write("logos", tmp_path / "logos")
    options = ["--steps", 400, "--eval-every", 400, "--val", tmp_path / "logos"]
    code, *_ = call(
        train_dvae, "--tiny", "--data", tmp_path / "logos", "--run-dir", tmp_path, *options
    )
    assert code == 0 and last(tmp_path, "dvae", "codes") > 50


def test_few_codes_are_said_once(tmp_path, monkeypatch):
    found = {"val_psnr": 9.0, "codes": 3, "elb": 0.0, "relaxed_elb": 0.0}
    monkeypatch.setattr(train_dvae, "evaluate", lambda *_: found)
    options = ["--steps", 5, "--eval-every", 1, "--batch-size", 2, "--workers", 0]
    code, out, err = call(train_dvae, "--tiny", "--run-dir", tmp_path, *options)
    assert code == 0 and out.count("only 3 of 256 codes are in use") == 1
    assert "begin again with twice the --kl-weight" in out


def photos(folder):
    """Small pictures of all sorts, two of them broken."""
    folder.mkdir()
    rng = random.Random(0)
    for k in range(12):
        size = (rng.randrange(20, 90), rng.randrange(20, 90))
        color = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", size, color).save(folder / f"{k}.jpg")
        (folder / f"{k}.txt").write_text(f"a photo of colour {color}\n")
    (folder / "broken.jpg").write_bytes(b"not a picture")
    (folder / "broken.txt").write_text("nothing to see")
    (folder / "silent.png").write_bytes((folder / "3.jpg").read_bytes())
    (folder / "silent.txt").write_text("\n")
    return folder


def test_own_pictures(tmp_path):
    folder, run_dir = photos(tmp_path / "photos"), tmp_path / "run"
    options = ["--run-dir", run_dir, "--steps", 4, "--batch-size", 16]
    code, _, errors = call(train_dvae, "--tiny", "--data", folder, *options)
    assert code == 0 and errors.count("broken.jpg cannot be read") == 1
    assert "Traceback" not in errors
    code, out, errors = call(train_prior, *options)
    assert code == 0
    assert errors.count("broken.jpg cannot be read") == errors.count("silent.txt holds no") == 1
    assert str(folder) in out  # the dVAE's data, unless told otherwise
    assert (run_dir / "samples.png").exists()
    code, *_ = call(train_prior, *options, "--dtype", "fp16")
    assert code == 0 and last(run_dir, "prior", "log2_scales") == pytest.approx([13.004] * 8)
