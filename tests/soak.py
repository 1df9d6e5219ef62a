"""
The long test of survival: trainers are killed again and again and go on each time.

    make soak                 # train_dvae.py and train_prior.py, 24 kills each
    python tests/soak.py 100  # more of them

A kill is SIGKILL to a run and its loading processes: while it starts, before it has saved anything;
at a random moment of its training; or as soon as a half-written checkpoint is seen. What is left
must be readable each time. At last the run ends by itself, and its weights must be those of a run
that nobody disturbed, bit for bit.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.toy import toy_world  # noqa: E402
from engine import checkpoint  # noqa: E402

# Miniatures that save often. A step takes some 10 ms, a save with its pictures some 100.
MINI = ["--tiny", "--batch-size", "4", "--log-every", "5", "--eval-every", "10"]
DVAE = [*MINI, "--n-hid", "4", "--n-init", "8", "--vocab-size", "32"]
PRIOR = [*MINI, "--n-layer", "2", "--n-head", "4", "--d-head", "8", "--ema-every", "1"]
PRIOR += ["--plateau-steps", "7", "--bpe-captions", "500"]


def new_run(run_dir: Path) -> Path:
    """A directory to train in, with a dVAE and a BPE for the prior, and four pictures to --val."""
    (run_dir / "val").mkdir(parents=True)
    for k in range(4):
        pixels, caption = toy_world(k, 32, "val")
        Image.fromarray(pixels).save(run_dir / "val" / f"{k}.png")
        (run_dir / "val" / f"{k}.txt").write_text(caption)
    for name in ("bpe.json", "dvae.pt"):
        shutil.copy(ROOT / "pretrained/tiny" / name, run_dir)
    return run_dir


def places(run_dir: Path) -> list[str]:
    return ["--run-dir", str(run_dir), "--val", str(run_dir / "val")]


def wait_for(seen: Callable[[], bool], process) -> None:
    deadline = time.time() + 300
    while not seen():
        if process.poll() is not None or time.time() > deadline:
            raise AssertionError("the run ended, or stands still, before it could be killed")
        time.sleep(0.001)


def kill_all(process) -> None:
    """A process that leads a session, and all in it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not begun to lead one
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


def half_written(run_dir: Path) -> set[tuple[Path, int]]:
    """Checkpoints that are not finished, and when they were last written to."""
    found = set()
    for path in run_dir.glob("*.pt.tmp"):
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            found.add((path, path.stat().st_mtime_ns))
    return found


KINDS = ("starting", "training", "saving")


def torture(
    launch: Callable, run_dir: Path, kinds: list[str], rng: random.Random, startup: float
) -> Counter:
    """Launch a run and kill it for each of `kinds`; how many of each kind it came to.

    startup: about the seconds from launch to the first step.
    """
    log, met = run_dir / "log.jsonl", Counter()
    for kind in kinds:
        before, halves = log.stat().st_mtime_ns if log.exists() else 0, half_written(run_dir)
        process = launch()
        if kind == "starting":
            time.sleep(rng.uniform(0, startup))
        else:
            wait_for(lambda: log.exists() and log.stat().st_mtime_ns != before, process)  # noqa: B023
            time.sleep(rng.uniform(0, 0.6))
            if kind == "saving":
                wait_for(lambda: half_written(run_dir) - halves, process)  # noqa: B023
        kill_all(process)
        is_new = half_written(run_dir) - halves
        met["saving" if is_new else kind.replace("saving", "training")] += 1
        for path in run_dir.glob("*.pt"):
            checkpoint.load(path)
    return met


def same_weights(one: Path, other: Path) -> bool:
    a, b = checkpoint.load(one), checkpoint.load(other)
    return a["step"] == b["step"] and all(
        torch.equal(v, b["model"][k]) for k, v in a["model"].items()
    )


def main(kills: int) -> None:
    rng = random.Random(0)
    kinds = [KINDS[k % 3] for k in range(kills)]
    rng.shuffle(kinds)
    for script, name, options in (
        ("train_dvae.py", "dvae.pt", [*DVAE, "--steps", str(40 * kills)]),
        ("train_prior.py", "prior.pt", [*PRIOR, "--steps", str(40 * kills)]),
    ):
        with tempfile.TemporaryDirectory() as folder:
            whole, broken = new_run(Path(folder) / "whole"), new_run(Path(folder) / "broken")

            def launch(run_dir: Path, *more: str) -> subprocess.Popen:
                command = [sys.executable, script, *options, *places(run_dir), *more]  # noqa: B023
                with open(run_dir / "output.txt", "ab") as file:
                    return subprocess.Popen(
                        command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
                    )

            begin = time.time()
            process = launch(whole)
            wait_for((whole / "log.jsonl").exists, process)
            startup = time.time() - begin
            assert process.wait() == 0, (whole / "output.txt").read_text()[-3000:]
            undisturbed, begin = time.time() - begin, time.time()
            met = torture(lambda: launch(broken, "--resume"), broken, kinds, rng, startup)  # noqa: B023
            assert launch(broken, "--resume").wait() == 0, (broken / "output.txt").read_text()[
                -3000:
            ]
            assert same_weights(whole / name, broken / name), f"{script}: other weights"
            assert not any(broken.glob("*.tmp"))
            print(
                f"{script}: {kills} kills ({met['starting']} while starting, {met['training']} in "
                f"training, {met['saving']} while saving) in {time.time() - begin:.0f} s, "
                f"{undisturbed:.0f} s undisturbed; the same weights, bit for bit",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
