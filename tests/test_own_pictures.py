"""Pictures that people bring: broken ones are passed over, and a run goes on with those it began
with."""

import json
import random
import re
from unittest import mock

import pytest
from PIL import Image
from scripts import call, last, log_of

import lab.evaluate
import train_clip
import train_dvae
import train_prior
from bpe import BPE
from engine import checkpoint


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
    with mock.patch("os.access", return_value=False):
        code, _, errors = call(train_prior, *options)
    assert code == 2 and "write-protected" in errors and not (run_dir / "prior.pt.old").exists()
    for name in ("--data", "--val"):
        code, _, errors = call(train_prior, *options, name, "")
        assert code == 2 and f"{name} is empty" in errors
    code, *_ = call(train_prior, *options, "--dtype", "fp16")
    assert code == 0 and last(run_dir, "prior", "log2_scales") == pytest.approx([13.004] * 8)


def test_a_run_goes_on_with_its_data(tmp_path, monkeypatch):
    """Data, held-out data, preset and values are those it began with, and a new run keeps nothing
    of an earlier one."""
    folder, val = photos(tmp_path / "photos"), photos(tmp_path / "val")
    for k in range(5, 12):
        (val / f"{k}.jpg").unlink()  # five are left, and those that photos() says
    run_dir, small = tmp_path / "runs" / "a", ["--batch-size", 4, "--workers", 0, "--log-every", 1]
    options = ["--run-dir", run_dir, *small]

    def stage(script, *more):
        code, out, err = call(script, *options, *more)
        assert code == 0, err
        return out

    own = ["--data", folder, "--val", val, "--n-hid", 16, "--kl-weight", 2, "--seed", 7]
    own += ["--filters", "--micro-batch", 2]
    stage(train_dvae, "--preset", "emoji", *own, "--steps", 2)
    monkeypatch.chdir(tmp_path)
    code, out, err = call(train_dvae, "--resume", "--steps", 3, "--workers", 0)  # the newest run
    assert code == 0 and "dvae emoji" in out and str(folder) in out, err
    changed = {name for name in re.findall(r"resuming with (\w+)", out)}
    assert "steps" in changed and all(name.endswith("steps") for name in changed)
    about = checkpoint.load(run_dir / "dvae.pt", weights=False)
    assert about["run"]["seed"] == 7 and about["run"]["kl_weight"] == 2 and about["run"]["filters"]
    assert about["run"]["micro_batch"] == 2
    stage(train_dvae, "--preset", "emoji", "--resume", "--n-hid", 16, "--steps", 4)  # named again
    about = checkpoint.load(run_dir / "dvae.pt", weights=False)["run"]
    assert about["seed"] == 7 and about["kl_weight"] == 1.5 and about["filters"]
    code, _, err = call(train_dvae, "--resume", "--workers", 0)
    assert code == 2 and "at step 4 already" in err
    code, _, err = call(train_clip, *small)
    assert code == 2 and "holds no bpe.json; train it with: python train_prior.py" in err
    for script in (train_prior, train_clip):
        stage(script, "--tiny", "--steps", 2)
    for name in ("dvae.pt", "prior.pt", "clip.pt"):
        about = checkpoint.load(run_dir / name, weights=False)
        assert (about["data"], about["val"]) == (str(folder), str(val)) and "model" not in about
        assert about["run"]["filters"]
    figures = [what for _, what, *_ in lab.evaluate.evaluate(run_dir)]
    assert {"PSNR of 7 pictures", "text of 7 pairs", "loss among 7 pairs"} < set(figures)
    figures = [what for _, what, *_ in lab.evaluate.evaluate(run_dir, f"{tmp_path}/b/../photos/")]
    assert "PSNR of 7 pictures" in figures  # the same data by another name
    (run_dir / "prior.pt").rename(run_dir / "away.pt")
    assert {model for model, *_ in lab.evaluate.evaluate(run_dir)} == {"dVAE", "CLIP"}
    (run_dir / "away.pt").rename(run_dir / "prior.pt")

    # another BPE, as of weights to fine-tune: the reranker that read the first is set aside
    stage(train_prior, "--steps", 2)
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert sum(row["stage"] == "prior" and "settings" in row for row in rows) == 1
    assert (run_dir / "clip.pt").exists() and not (run_dir / "bpe.json.old").exists()
    (tmp_path / "b").mkdir()
    (run_dir / "prior.pt").rename(tmp_path / "b/prior.pt")
    merges = BPE.load(run_dir / "bpe.json").merges
    BPE(merges[:-1] + [(1, 2)]).save(tmp_path / "b/bpe.json")
    with mock.patch.object(train_prior, "AdamW", wraps=train_prior.AdamW) as adamw:
        fine_tune = ["--init-from", tmp_path / "b/prior.pt", "--moments", 16]
        stage(train_prior, "--steps", 2, *fine_tune)
    kept = adamw.call_args.kwargs["in_16_bits"]  # the resblocks' matrices alone (D.2)
    assert len(kept) == 6 * 4 and all(p.ndim == 2 for p in kept)  # six layers of emoji's
    assert BPE.load(run_dir / "bpe.json").merges[-1] == (1, 2)
    assert BPE.load(run_dir / "bpe.json.old").merges == merges
    assert (run_dir / "clip.pt.old").exists() and not (run_dir / "clip.pt").exists()

    # a dVAE that goes on makes other tokens; the newest run is that of the stage
    assert call(train_dvae, *small, "--tiny", "--steps", 1)[0] == 0  # runs/tiny, without a prior
    before = set(run_dir.glob("prior.pt.old*"))
    stage(train_dvae, "--resume", "--steps", 5)
    assert set(run_dir.glob("prior.pt.old*")) > before and (run_dir / "bpe.json").exists()
    assert not any((run_dir / name).exists() for name in checkpoint.state_names("prior"))
    out = stage(train_prior, "--resume", *fine_tune, "--steps", 2)
    assert "nothing to resume" in out and f"BPE {tmp_path}/b/bpe.json" in out
    code, out, err = call(train_prior, "--resume", "--steps", 3, "--workers", 0)
    assert code == 0 and "steps 2 to 3 of 4" in out and "into runs/a" in out, err

    (run_dir / "prior.pt").write_bytes(b"damaged")
    code, out, err = call(lab.evaluate, run_dir)
    assert code == 2 and not out and "cannot be read as a checkpoint" in err
    before = set(run_dir.glob("log.jsonl.old*"))
    stage(train_dvae, "--tiny", "--steps", 1)
    assert {entry["stage"] for entry in log_of(run_dir)} == {"dvae"}
    assert log_of(run_dir)[-1]["step"] == 1 and set(run_dir.glob("log.jsonl.old*")) > before
