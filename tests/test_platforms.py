"""What Windows and Macs lack or do otherwise, imitated: processes are spawned and not forked, names
that only Unix has are missing, a stream that is no terminal knows fewer characters."""

import io
import shutil
import sys
import tarfile

import pytest
from scripts import call, log_of, run

import train_dvae
import train_prior
from data.toy import ToyWorld
from engine.cli import start

# runs a script as `python script.py …` does
ELSEWHERE = """
import multiprocessing, os, runpy, signal, sys
import torch
for name in ("fork", "forkpty", "pread", "pwrite", "mkfifo", "sync", "statvfs", "O_DIRECTORY"):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "alarm"):
    delattr(signal, name)
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None  # which fails to be imported
multiprocessing.set_start_method("spawn")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SHORT = ["--batch-size", 4, "--steps", 2, "--log-every", 1]
SMALL = ["--n-hid", 8, "--n-init", 8, "--vocab-size", 16, *SHORT]
SMALL_PRIOR = ["--n-layer", 2, "--n-head", 2, "--d-head", 8, "--bpe-captions", 500, *SHORT]


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A tar of twelve pictures and captions of the toy world."""
    path = tmp_path_factory.mktemp("data") / "{0..0}.tar"
    with tarfile.open(path.with_name("0.tar"), "w") as tar:
        for k in range(12):
            img, (caption,) = ToyWorld(32, "train")[k]
            png = io.BytesIO()
            img.save(png, "PNG")
            for suffix, content in ((".png", png.getvalue()), (".txt", caption.encode())):
                info = tarfile.TarInfo(f"{k}{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_spawned_processes_load_the_same_samples(shard, tmp_path):
    """What they are to do travels to them: data set, BPE, what a script makes of a sample."""
    here, there = tmp_path / "here", tmp_path / "there"
    code, _, err = call(train_dvae, "--tiny", "--data", shard, "--run-dir", here, *SMALL)
    assert code == 0, err
    shutil.copytree(here, there)
    code, _, err = call(train_prior, "--run-dir", here, "--workers", 0, *SMALL_PRIOR)
    assert code == 0, err
    run("-c", ELSEWHERE, "train_prior.py", "--run-dir", there, "--workers", 1, *SMALL_PRIOR)
    losses = [[e for e in log_of(d, "prior") if e.pop("seconds") >= 0] for d in (here, there)]
    for entry in sum(losses, []):
        entry.pop("images_per_second", None)
    assert losses[0] == losses[1] and len(losses[0]) > 2


def test_a_picture_without_what_only_unix_has(tmp_path):
    out = tmp_path / "cube.png"
    run("-c", ELSEWHERE, "sample.py", "a red cube", "--run-dir", "pretrained/tiny", "-o", out)
    assert out.stat().st_size > 500


def test_any_stream_can_take_what_is_said(monkeypatch):
    """Help holds τ and ε; a stream that knows neither gets question marks."""
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    start(lambda: print("τ", flush=True))
    assert sys.stdout.buffer.getvalue() == b"?\n"
