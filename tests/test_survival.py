"""What a run survives: kills, signals, full disks, no memory, losses that are no numbers, and files
that are damaged or mean harm. The long version of the first is `make soak`."""

import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import soak
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import ROOT, Trainer, log_of

import engine.state as run_state
import train_clip
import train_dvae
import train_prior
from bpe import BPE
from clip import CLIP, CLIPConfig
from dvae import DVAE, DVAEConfig
from engine import checkpoint, openai
from engine.cli import Stop, start
from engine.log import Log
from engine.run import Run as RunOfAStage
from engine.run import out_of_memory
from lab import judge
from scale.parallel import World
from transformer import Transformer, TransformerConfig

SHIPPED = ROOT / "pretrained/tiny"
SCRIPTS = {"train_dvae": soak.DVAE, "train_prior": soak.PRIOR}


class Run(Trainer):
    """One of `make soak`'s miniatures."""

    def __init__(self, script, run_dir, *args, limits=()):
        options = [*SCRIPTS[script], *soak.places(run_dir), *args]
        super().__init__(script, run_dir, *options, limits=limits)

    def complaints(self):
        return [line for line in self.said() if line.startswith(("train_", "warning", "Trace"))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory in which both trainers have ended at step 10."""
    run_dir = soak.new_run(tmp_path_factory.mktemp("saved") / "run")
    for script in SCRIPTS:
        run = Run(script, run_dir, "--steps", 10, "--workers", 0)
        assert run.wait() == 0, run.said()
        shutil.copy(SHIPPED / "dvae.pt", run_dir)
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    """A copy of it."""
    copy = shutil.copytree(saved, tmp_path / "run")
    for path in copy.glob("*.old"):
        path.unlink()
    return copy


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Calls a script's main here, in an empty directory: (exit code, lines on standard error)."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}

    def main(module, *args):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        code = 0
        try:
            start(module.main)
        except SystemExit as stopped:
            code = stopped.code
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        return code, [line for line in lines if line.strip() and "%|" not in line]

    yield main
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- kills and signals


def test_killed_at_any_moment(tmp_path):
    """Three of the kills of `make soak`, one of each kind; a fourth when something is saved."""
    whole, broken = soak.new_run(tmp_path / "whole"), soak.new_run(tmp_path / "broken")
    assert Run("train_dvae", whole, "--steps", 80).wait() == 0
    (broken / "dvae_state.pt.tmp").write_bytes(b"PK half a checkpoint of an earlier run")

    def go_on():
        return Run("train_dvae", broken, "--steps", 80, "--resume")

    met = soak.torture(go_on, broken, soak.KINDS, random.Random(0), 1)
    assert sum(met.values()) == 3
    fourth = go_on()
    soak.wait_for((broken / "dvae_state.pt").exists, fourth)
    soak.kill_all(fourth)
    last = go_on()
    assert last.wait() == 0, last.said()
    assert any("steps" in line and "steps 0 to" not in line for line in last.said())
    assert soak.same_weights(whole / "dvae.pt", broken / "dvae.pt")
    assert not list(broken.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop(number, run_dir):
    """Or left by its terminal; test_resume.py tries Ctrl-C."""
    log = run_dir / "log.jsonl"
    log.unlink()
    run = Run("train_prior", run_dir, "--steps", 100_000, "--resume", "--eval-every", 100_000)
    soak.wait_for(log.exists, run)
    os.killpg(run.pid, number)  # its loading process too
    assert run.wait() == 128 + number
    (line,) = run.complaints()
    step = checkpoint.load(run_dir / "prior_state.pt")["step"]
    assert line == f"train_prior.py: stopped after step {step} of 100000; go on with --resume"
    assert step > 10 and checkpoint.load(run_dir / "prior.pt")["step"] == step


def processes(word):
    """Those whose command line holds a word: {id: (parent's id, rank)}."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word.encode() in (path / "cmdline").read_bytes():
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                names = dict(
                    entry.partition(b"=")[::2]
                    for entry in (path / "environ").read_bytes().split(b"\0")
                )
                found[int(path.name)] = parent, names.get(b"RANK")
    return found


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_torchrun_goes_down_together(run_dir):
    """SIGTERM to torchrun: the ranks save at one step. Resumed, a killed rank ends the others."""
    log = run_dir / "log.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["train_prior.py", *soak.PRIOR, *soak.places(run_dir), "--steps", "100000"]
    command += ["--resume", "--eval-every", "100000"]

    def launch():
        log.unlink()
        with open(run_dir / "output.txt", "wb") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        soak.wait_for(log.exists, process)
        return process

    process = launch()
    process.terminate()
    process.wait(60)
    text = (run_dir / "output.txt").read_text()
    step = checkpoint.load(run_dir / "prior_state.pt")["step"]
    assert text.count(f"stopped after step {step} of 100000; go on with --resume") == 1
    assert step > 10 and not processes(str(run_dir))

    process = launch()
    ranks = {rank: number for number, (parent, rank) in processes(str(run_dir)).items()
             if parent == process.pid}  # fmt: skip
    os.kill(ranks[b"1"], signal.SIGKILL)
    assert process.wait(60) != 0
    text = (run_dir / "output.txt").read_text()
    assert text.count("another process of this run was lost") == 1 and "[rank" not in text
    deadline = time.time() + 30
    while processes(str(run_dir)) and time.time() < deadline:
        time.sleep(0.1)
    assert not processes(str(run_dir))
    assert checkpoint.load(run_dir / "prior_state.pt")["step"] == step


# ---- full disks, no memory


def test_the_disk_is_full_for_checkpoints(run_dir):
    before = checkpoint.load(run_dir / "prior_state.pt")
    limits = [(resource.RLIMIT_FSIZE, 50_000)]
    run = Run("train_prior", run_dir, "--steps", 40, "--resume", "--workers", 0, limits=limits)
    assert run.wait() == 1
    (line,) = run.complaints()
    assert "prior.pt cannot be written (File too large); what was saved before is kept" in line
    assert checkpoint.load(run_dir / "prior_state.pt")["step"] == before["step"] == 10
    assert checkpoint.load_model(run_dir / "prior.pt", Transformer, TransformerConfig) and not list(
        run_dir.glob("*.tmp")
    )
    assert Run("train_prior", run_dir, "--steps", 20, "--resume", "--workers", 0).wait() == 0


def test_the_disk_is_full_for_the_log_and_the_pictures(run_dir):
    """Training goes on, and each file is complained about once."""
    line = json.dumps({"stage": "dvae", "step": 1, "loss": 1.0})
    (run_dir / "log.jsonl").write_text(line + " " * 3_000_000 + "\n")
    before = (run_dir / "log.jsonl").read_bytes()
    (run_dir / "samples.png").unlink()
    (run_dir / "samples.png").mkdir()
    limits = [(resource.RLIMIT_FSIZE, 2_000_000)]
    run = Run("train_prior", run_dir, "--steps", 40, "--resume", "--workers", 0, limits=limits)
    assert run.wait() == 0, run.said()
    complaints = run.complaints()
    assert len(complaints) == 2 and all(line.startswith("warning: ") for line in complaints)
    assert "log.jsonl cannot be written" in complaints[0]
    assert "samples.png cannot be written" in complaints[1]
    assert checkpoint.load(run_dir / "prior_state.pt")["step"] == 40
    assert (run_dir / "log.jsonl").read_bytes() == before


def test_half_a_line_of_the_log_is_taken_back(tmp_path, capsys):
    log = Log(tmp_path, "dvae", 0, World(0, 1, torch.device("cpu")))
    log.write(1, loss=1.0)
    size, limit = log.path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limit[1]))
        log.write(2, loss=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    log.write(3, loss=3.0)
    assert [entry["step"] for entry in log_of(tmp_path)] == [1, 3]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_out_of_memory(run_dir):
    limits = [(resource.RLIMIT_AS, 2**29)]
    options = ["--steps", 20, "--workers", 0, "--resume", "--batch-size", 3000]
    run = Run("train_dvae", run_dir, *options, limits=limits)
    assert run.wait() == 1
    (line,) = run.complaints()
    assert "out of memory on cpu with 3000 samples at once: try --micro-batch 1500," in line
    assert checkpoint.load(run_dir / "dvae_state.pt")["step"] == 10


def test_what_is_set_aside_stays(tmp_path):
    """Also when that happens again: all of one run have the same suffix."""
    for run in ("1", "2", "3"):
        for name in ("dvae.pt", "dvae_state.pt", "prior.pt")[: 4 - int(run)]:
            (tmp_path / name).write_text(run)
        checkpoint.set_aside(tmp_path, "dvae.pt", "prior.pt")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {
        "dvae.pt.old": "1", "dvae_state.pt.old": "1", "prior.pt.old": "1",
        "dvae.pt.old2": "2", "dvae_state.pt.old2": "2", "dvae.pt.old3": "3",
    }  # fmt: skip


def test_whatever_says_that_memory_is_out(capsys):
    """Python, the allocator, oneDNN: one line with advice; before the run has begun, `start`'s."""
    run = SimpleNamespace(micro_batch=4, stage="dvae", device="cpu")
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"),
        RuntimeError("could not create a primitive"),
    ):
        run.begun = True
        with pytest.raises(Stop, match="out of memory on cpu .* try --micro-batch 2"):
            RunOfAStage.__exit__(run, type(error), error, None)
        run.begun = False
        assert RunOfAStage.__exit__(run, type(error), error, None) is None

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as end:
            start(main)
        assert end.value.code == 1 and "out of memory: try fewer" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="another"):
        start(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_a_lost_loading_process_is_a_line():
    run = SimpleNamespace(begun=True)
    for words in ("is killed by signal: Bus error.", "exited unexpectedly"):
        error = RuntimeError(f"DataLoader worker (pid 7) {words}")
        with pytest.raises(Stop, match=r"loading process was lost \(Data.* try fewer --workers"):
            RunOfAStage.__exit__(run, type(error), error, None)


def test_out_of_memory_says_what_divides(capsys):
    for micro_batch, stage, expected in (
        (9, "dvae", "try --micro-batch 3, the same batch"),
        (9, "clip", "try --batch-size 6;"),
        (1, "dvae", "try a smaller model;"),
    ):
        run = SimpleNamespace(
            micro_batch=micro_batch, stage=stage, device="cpu", world=World(0, 2, "cpu")
        )

        def main(run=run):
            raise out_of_memory(MemoryError(), run)

        with pytest.raises(SystemExit) as stopped:
            start(main)
        assert stopped.value.code == 1 and expected in capsys.readouterr().err


# ---- losses that are no numbers


@pytest.mark.parametrize("script, model", [(train_dvae, DVAE), (train_prior, Transformer)])
def test_losses_that_are_no_numbers(script, model, run_dir, call, monkeypatch):
    """At steps 3, 4 and 7, and from step 15 on. An update changes the weights or is skipped."""
    bad, seen, loss_of = {3, 4, 7, *range(15, 200)}, [], model.loss

    def loss(self, *batch):
        seen.append(torch.cat([p.detach().flatten() for p in self.parameters()]))
        loss, metrics = loss_of(self, *batch)
        return (loss * torch.nan if len(seen) in bad else loss), metrics

    monkeypatch.setattr(model, "loss", loss)
    name = script.__name__
    options = [*SCRIPTS[name], *soak.places(run_dir), "--steps", 200, "--workers", 0]
    code, lines = call(script, *options)
    assert code == 1 and len(seen) == 114
    complaint = "losses or gradients have not been finite since step 15, for 100 updates in a row"
    assert [complaint in line for line in lines] == [True], lines
    same = {k for k in range(1, len(seen)) if torch.equal(seen[k - 1], seen[k])}
    assert same == {k for k in bad if k < 114} and seen[-1].isfinite().all()
    counts = {entry["step"]: entry.get("skipped_updates") for entry in log_of(run_dir)
              if "loss" in entry and entry["stage"] == name.removeprefix("train_")}  # fmt: skip
    assert counts[5] == 2 and counts[10] == 3 and counts[20] == 9
    kept = checkpoint.load(run_dir / f"{name.removeprefix('train_')}.pt")
    assert kept["step"] == 20 and all(value.isfinite().all() for value in kept["model"].values())


# ---- files that are damaged or mean harm


class Harm:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return open, (str(self.flag), "w")


def harmful(flag):
    """The ways to write a file that creates another when it is read."""
    config = {"config": vars(DVAEConfig()), "model": {}, "step": 1, "run": Harm(flag)}
    return {
        "archive": lambda path: torch.save(Harm(flag), path),
        "within": lambda path: torch.save(config, path),
        "legacy": lambda path: torch.save(config, path, _use_new_zipfile_serialization=False),
        "pickle": lambda path: path.write_bytes(pickle.dumps(config)),
    }


@pytest.mark.parametrize("kind", harmful(None))
def test_files_that_mean_harm(kind, run_dir, call, tmp_path):
    """Refused with one line, whichever script reads them, and nothing runs."""
    flag, evil = tmp_path / "ran", tmp_path / "evil.pt"
    harmful(flag)[kind](evil)
    with contextlib.suppress(RuntimeError):
        torch.load(evil, weights_only=False)
    flag.unlink()  # so harm it would do
    there = ["--run-dir", run_dir, "--steps", 20]
    for name, module, args in (
        ("dvae.pt", train_prior, there),
        ("dvae.pt", train_clip, there),
        ("prior.pt", judge, there[:2]),
        ("bpe.json", train_prior, there),
        ("dvae_state.pt", train_dvae, [*SCRIPTS["train_dvae"], *there, "--resume"]),
        ("prior_state.pt", train_prior, [*SCRIPTS["train_prior"], *there, "--resume"]),
        ("clip_state.pt", train_clip, [*there, "--resume"]),
        (None, train_dvae, ["--tiny", "--init-from", evil]),
        (None, train_prior, ["--init-from", evil, *there]),
        (None, train_clip, ["--init-from", evil, *there]),
        (None, openai, [evil, evil]),
    ):
        if name:
            shutil.copy(run_dir / name, tmp_path / "good") if (run_dir / name).exists() else None
            shutil.copy(evil, run_dir / name)
        code, lines = call(module, *args)
        assert code == 2 and len(lines) == 1, (name, lines)
        assert (name or "evil.pt") in lines[0] and not flag.exists()
        if name and (tmp_path / "good").exists():
            shutil.move(tmp_path / "good", run_dir / name)


def test_a_sharded_state_that_means_harm(tmp_path):
    """The index of the shards is a pickle, and values among them can be: torch reads both as they
    are."""
    flag, folder = tmp_path / "ran", tmp_path / "prior_state"
    folder.mkdir()
    saved = {"sums": {}, "about": {"config": {}, "run": {}, "step": 3}}
    about = {"crc32": run_state.crc32_of(saved), "saved": saved}
    (folder / "about.json").write_text(json.dumps(about))
    for evil in (Harm(flag), {"planner_data": Harm(flag)}):
        (folder / ".metadata").write_bytes(pickle.dumps(evil))
        with pytest.raises(ValueError, match="open, which no index does"):
            run_state.find_state(tmp_path / "prior_state.pt", {"steps": 9})
    (folder / ".metadata").write_bytes(pickle.dumps({}))
    assert run_state.find_state(tmp_path / "prior_state.pt", {"steps": 9}).about["step"] == 3
    (folder / "about.json").write_text(json.dumps(about).replace('"step": 3', '"step": 7'))
    with pytest.raises(ValueError, match="about.json is damaged"):
        run_state.find_state(tmp_path / "prior_state.pt", {"steps": 9})
    value = io.BytesIO()
    torch.save(Harm(flag), value)
    value.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        run_state.PlainValues().load_bytes(None, value)
    assert not flag.exists()


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """One file of each kind, as small as it gets: {path: what reads it}."""
    folder = tmp_path_factory.mktemp("small")
    models = {
        "dvae.pt": (DVAE(DVAEConfig(n_hid=4, n_init=4, n_groups=2, blocks_per_group=1,
                                    vocab_size=8)),
                    partial(checkpoint.load_model, Model=DVAE, Config=DVAEConfig)),
        "prior.pt": (Transformer(TransformerConfig(n_layer=2, n_head=1, d_head=8, text_vocab=9,
                                                   text_len=4, image_vocab=8, grid=3)),
                     partial(checkpoint.load_model, Model=Transformer, Config=TransformerConfig)),
        "clip.pt": (CLIP(CLIPConfig(image_size=8, patch=4, d_image=8, d_text=8, n_layer=1, d_head=4,
                                    d_embed=8, text_vocab=9, text_len=4)),
                    partial(checkpoint.load_model, Model=CLIP, Config=CLIPConfig)),
    }  # fmt: skip
    for name, (model, _) in models.items():
        checkpoint.save(
            folder / name, {"config": vars(model.config), "model": model.state_dict(), "step": 3}
        )
    state = {"config": {}, "run": {"lr": 1.0}, "step": 3, "model": torch.arange(99.0)}
    checkpoint.save(folder / "dvae_state.pt", state)
    return {folder / name: reads for name, (_, reads) in models.items()} | {
        folder / "dvae_state.pt": lambda path: checkpoint.load(path)
    }


@pytest.mark.parametrize("name", ["dvae.pt", "prior.pt", "clip.pt", "dvae_state.pt"])
def test_a_flipped_bit_is_refused_or_changes_nothing(name, small_files, tmp_path):
    """Anywhere, in the archive's own tables above all; and a file cut off anywhere."""
    path, reads = next((path, reads) for path, reads in small_files.items() if path.name == name)
    whole, rng, refused = path.read_bytes(), random.Random(5), 0

    def content(file):
        found = reads(file)
        if isinstance(found, dict):
            return str(found)
        return str(found.config) + str([(k, v.tolist()) for k, v in found.state_dict().items()])

    expected, copy = content(path), tmp_path / name
    directory = whole.rindex(b"PK\5\6") - 3000
    for k in range(200):
        data = bytearray(whole)
        if k >= 160:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(directory if k % 2 else 0, len(data))] ^= 1 << rng.randrange(8)
        copy.write_bytes(data)
        try:
            assert content(copy) == expected
        except ValueError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused > 100


def test_a_flipped_bit_in_the_bpe(tmp_path):
    whole, rng, refused = (SHIPPED / "bpe.json").read_bytes(), random.Random(6), 0
    expected, copy = BPE.load(SHIPPED / "bpe.json").merges, tmp_path / "bpe.json"
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        copy.write_bytes(data)
        try:
            assert BPE.load(copy).merges == expected
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 250


def test_states_half_removed(tmp_path):
    """Killed while it put one state in the place of another: the new one counts."""
    path, folder = tmp_path / "prior_state.pt", tmp_path / "prior_state"
    about = {"config": {}, "run": {}, "step": 3}
    checkpoint.save(path, about | {"model": {}})
    folder.mkdir()
    (folder / "about.json").write_text("{}")
    os.utime(folder / "about.json", (1, 1))  # older, but the folder has just lost its shards
    assert run_state.find_state(path, {"steps": 9}).path == path
    (folder / "about.json").unlink()
    assert run_state.find_state(path, {"steps": 9}).path == path
    path.unlink()
    with pytest.raises(ValueError, match="not the state of a run"):
        run_state.find_state(path, {"steps": 9})
    shutil.rmtree(folder)
    assert run_state.find_state(path, {"steps": 9}) is None


def test_another_model_is_refused(run_dir, call):
    options = ["--run-dir", run_dir, "--steps", 20]
    more = ["--resume", *SCRIPTS["train_prior"], "--n-layer", 3]
    for args in (more, ["--init-from", run_dir / "prior.pt", "--n-layer", 3]):
        code, lines = call(train_prior, *options, *args)
        assert code == 2 and len(lines) == 1 and "n_layer 2 (expected 3)" in lines[0]


# ---- anything at all


@given(st.text(st.characters()))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(text):
    bpe = BPE.load(SHIPPED / "bpe.json")
    expected = text.lower().encode("utf-8", "replace").decode()
    for dropout in (0, 0.5, 1):
        ids = bpe.encode(text, dropout)
        assert bpe.decode(ids) == expected
    assert all(type(i) is int and 0 <= i < bpe.vocab_size for i in ids)


ids = st.integers(-1, 300) | st.sampled_from([97, 98, 256, 257, True, 97.0, None, "a", 2**70])
rows = st.lists(
    st.tuples(ids, ids, st.sampled_from(["aa", "ab", "", 3])) | st.lists(ids), max_size=4
)
anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
merges = st.builds(lambda rows: {"format": "byte-level BPE 2", "merges": rows}, rows | anything)


@given(merges | anything)
@settings(max_examples=200, deadline=None)
def test_any_json_is_a_bpe_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(data))
    try:
        bpe = BPE.load(path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert bpe.decode(bpe.encode("aab abba")) == "aab abba"


def test_a_state_that_lacks_a_part_of_the_run(run_dir, call):
    state = checkpoint.load(run_dir / "prior_state.pt")
    del state["halving"]
    checkpoint.save(run_dir / "prior_state.pt", state)
    options = [*SCRIPTS["train_prior"], "--run-dir", run_dir, "--steps", 20, "--resume"]
    code, lines = call(train_prior, *options)
    assert code == 2 and "expected its halving" in lines[-1]


class Begun(Exception):
    """Where a script would begin to work."""


VALUES = ["", " ", "x", "-", "--", "é", "0", "1", "-1", "2", "8", "3.5", "nan", "inf", "1e400",
          "cpu", "cuda:7", "toy", "nowhere", "/dev/null", "fp32", "tiny", "paper"]  # fmt: skip


@pytest.mark.parametrize("script", [train_dvae, train_prior, train_clip, judge])
def test_any_command_line_is_read_or_refused(script, call, monkeypatch, capsys):
    def begin(*_, **__):
        raise Begun

    for name in ("open_dataset", "train_judge"):
        if hasattr(script, name):
            monkeypatch.setattr(script, name, begin)
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        start(script.main)
    options = sorted(
        {word.strip("[],") for word in capsys.readouterr().out.split() if "--" in word}
    )
    begun = set()

    @given(st.lists(st.tuples(st.sampled_from(options), st.sampled_from(VALUES) | st.text("019.-"))
                    | st.sampled_from([["--tiny"], ["--run-dir", str(SHIPPED)]]),
                    max_size=4))  # fmt: skip
    @settings(max_examples=60, deadline=None)
    def read(pairs):
        args = [word for pair in pairs for word in pair]
        try:
            code, lines = call(script, *args)
        except Begun:
            begun.add(True)
            return
        assert code == 2 and len(lines) == 1 or {"-h", "--help"} & set(args), (args, code, lines)

    read()
    assert begun and not list(Path.cwd().iterdir())


def test_devices_that_are_not_there(call):
    for device in ("cuda:777", "cpu:1", "cpu:99999999999", "cuda:-1", "meta"):
        code, lines = call(train_dvae, "--tiny", "--device", device)
        assert code == 2 and len(lines) == 1 and f"--device {device} is not there" in lines[0]
