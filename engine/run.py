"""
What the three trainers share: the command line, the launch under torchrun, the order of the data,
the schedule, and what is logged and shown.

Every random draw belongs to a sample. The data order, crops, flips and BPE dropout derive from
the seed and the sample's position in the run, the relaxation's noise from the seed, the step,
the rank and the micro-batch. So no generator's state is ever saved, a resumed run repeats an
uninterrupted one, and the data do not depend on the number of processes.

    python -m engine.log RUN...    # curves.png: the logs of runs over each other

What is not here: the loop itself, which each trainer spells out.
"""

import argparse
import atexit
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine import checkpoint
from engine.log import draw_curves

# ----------------------------------------------------------------------------- the door


def fail(message: str, code: int = 2, alone: bool = False) -> None:
    """End with one line on standard error. Under torchrun each machine's first rank speaks, unless
    the trouble is this process's alone."""
    if alone or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        for bar in list(getattr(tqdm, "_instances", ())):  # the line is to stand alone, and last
            bar.close()
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def door():
    """Bad input found inside ends the program with one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped before the first step", 130)


def add_arguments(parser: argparse.ArgumentParser, presets: dict, *configs: type) -> None:
    """The options every script has, and one for each field of the config classes."""
    parser.error = fail
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--preset", choices=presets, help="sizes and schedules")
    preset.add_argument("--tiny", dest="preset", action="store_const", const="tiny")
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help="toy (default), a folder of images, "
        "a table (.tsv .csv .jsonl), or tars such as 'shards/{000..031}.tar'",
    )
    parser.add_argument("--filters", action="store_true", help="drop what the paper drops (C)")
    parser.add_argument("--val", metavar="SPEC", help="default: a fixed share is held out")
    parser.add_argument("--run-dir", metavar="DIR", type=Path)
    parser.add_argument("--micro-batch", type=int, help="samples per process and pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best one there")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument(
        "--workers", type=int, default=1, choices=range(65), metavar="N", help="loading processes"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --run-dir")
    parser.add_argument("--init-from", metavar="FILE", type=Path, help="fine-tune these weights")
    for config in configs:
        group = parser.add_argument_group(f"fields of {config.__name__}, the paper's by default")
        for field in fields(config):
            names = {f"--{field.name.replace('_', '-')}", f"--{field.name}"}
            group.add_argument(*sorted(names), type=field.type, metavar="N")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The options of a plan, which ends before anything is trained."""
    parser.add_argument("--plan", type=int, metavar="GPUS", help="print what a run would cost")
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GB", help="default: 80")


def choose(config: type, preset: dict, args: argparse.Namespace):
    """A config from the paper's defaults, overridden by a preset, overridden by options.

    Where --steps alone is given, the schedules shrink or grow in proportion: fields named
    `…_steps` keep their share of `steps`.
    """
    names = [field.name for field in fields(config)]
    values = asdict(config()) | {k: v for k, v in preset.items() if k in names}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if given.get("steps", 0) > 0:
        for name in names:
            if name.endswith("_steps") and values[name]:
                values[name] = max(1, round(values[name] * given["steps"] / values["steps"]))
    return config(**values | given)


def check_ranges(hp) -> None:
    """ValueError for a training config with numbers that no run could use."""
    for field in fields(hp):
        name, value = field.name, getattr(hp, field.name)
        option = f"--{name.replace('_', '-')}"
        least = int(name in ("steps", "plateau_steps") or name.endswith(("_every", "_size")))
        shares = ("beta1", "beta2", "ema", "bpe_dropout", "caption_dropout")
        most = 1 if name in shares else math.inf
        if not least <= value <= most or value == math.inf:
            raise ValueError(f"{option} is {value}; expected a number from {least} to {most}")
        if value == 1 and name in ("beta1", "beta2", "ema"):
            raise ValueError(f"{option} is 1: nothing would ever move; expected less")


def newest_run(*names: str) -> Path | None:
    """The run directory under runs/ that holds all of these files, the first of them newest."""
    found = [p.parent for p in Path("runs").glob(f"*/{names[0]}")]
    found = [run for run in found if all((run / name).is_file() for name in names)]
    return max(found, key=lambda run: (run / names[0]).stat().st_mtime, default=None)


# ----------------------------------------------------------------------------- processes


@dataclass
class World:
    """This process among those of torchrun; alone without it."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def max(self, value: int) -> int:
        """The largest value of any rank."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the ranks."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def share(self, make: Callable):
        """What rank 0 makes, on every rank; plain data."""
        box = [make() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]


def pick_device(name: str | None) -> torch.device:
    """The named device, or the best one there. ValueError for one that is not there."""
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    name = name or there[0]
    known = re.fullmatch(rf"({'|'.join(there)})(:\d{{1,3}})?", name)
    count = torch.cuda.device_count() if name.startswith("cuda") else 1
    if not known or int((known[2] or ":0")[1:]) >= count:
        raise ValueError(f"--device {name} is not there: expected one of {', '.join(there)}")
    return torch.device(name)


def launch(device_name: str | None) -> World:
    """Join the processes torchrun started: NCCL on GPUs, gloo on CPUs."""
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        return World(0, 1, device)
    if device.type == "mps":  # which gloo does not know
        if device_name:
            raise ValueError("--device mps is for one process; under torchrun use --device cpu")
        device = torch.device("cpu")
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def safely(world: World, micro_batch: int, option: str = "--micro-batch"):
    """Around a run: out of memory, a full disk, data without a readable sample or the loss of
    another rank end it with one line and exit code 1; what was saved before stays.

    option: what makes a pass smaller, --micro-batch or --batch-size.
    """
    try:
        yield
        return
    except (torch.OutOfMemoryError, MemoryError) as error:
        trouble = error
    except RuntimeError as error:
        if isinstance(error, dist.DistBackendError) or "gloo/" in str(error):
            reason = "another process of this run was lost; go on with --resume"
            fail(f"{reason} ({str(error).splitlines()[0]})", 1, alone=True)
        if "can't allocate memory" not in str(error):  # what the CPU's allocator says
            raise
        trouble = error
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[-1]  # of the traceback a loading process sends
        fail(f"{reason}; what was saved before is kept", 1, alone=True)
    remedy = "a smaller model"
    if micro_batch > 1:
        part = next(micro_batch // k for k in range(2, micro_batch + 1) if micro_batch % k == 0)
        remedy = f"--batch-size {part * world.size}"
        if option == "--micro-batch":
            remedy = f"--micro-batch {part}, the same batch in more passes"
    reason = str(trouble).splitlines()[:1] or ["no memory is left"]
    fail(
        f"out of memory on {world.device} with {micro_batch} samples at once: try {remedy}; what "
        f"was saved before is kept ({reason[0]})",
        1,
        alone=True,
    )


class Updates:
    """Counts the updates that were skipped because a loss or gradient was not finite, and ends
    the run after too many in a row."""

    def __init__(self, dtype: str):
        self.skipped, self.in_a_row = 0, 0
        # in float16 a scale that is too large takes up to 125 updates for each division by √2 (D)
        self.most = 2000 if dtype == "fp16" else 100

    def count(self, made: bool, step: int) -> None:
        """Whether the update of this step was made; the same on every rank."""
        self.in_a_row = 0 if made else self.in_a_row + 1
        self.skipped += not made
        if self.in_a_row == self.most:
            fail(
                f"losses or gradients have not been finite since step {step + 2 - self.most}, "
                f"for {self.most} updates in a row; the last good checkpoint is kept. Try "
                "--resume with a smaller --lr",
                1,
            )

    def may_save(self, finite: bool, done: int, steps: int) -> bool:
        """Whether the weights are good: finite ones, the same answer on every rank. Bad ones must
        not replace good ones."""
        good = finite and self.in_a_row <= self.most // 10
        if not good and done == steps:
            fail(
                f"the weights or the last {self.in_a_row} losses are not finite; the last good "
                "checkpoint is kept. Try a smaller --lr",
                1,
            )
        return good

    def take(self) -> dict[str, int]:
        """What to log: nothing while all is well."""
        return {"skipped_updates": self.skipped} if self.skipped else {}


class Interrupt:
    """Ctrl-C or SIGTERM asks the loop to stop after the step it is in; a second Ctrl-C is final."""

    def __init__(self, world: World):
        self.world, self.code = world, 0
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number: int, _) -> None:
        self.code = 128 + number
        # A scheduler sends SIGTERM to us and to torchrun, who passes it on: two of them are one.
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> int:
        """The exit code to stop with, the same on every rank; 0 to go on."""
        return self.world.max(self.code)


def autocast(world: World, dtype: str, sharded: bool = False):
    """Mixed precision, or nothing for fp32. Of a sharded model no 16-bit copies are kept for the
    next use of a weight: together they would be the whole model."""
    kind = torch.float16 if dtype == "fp16" else torch.bfloat16
    on = dtype != "fp32"
    return torch.autocast(world.device.type, kind, enabled=on, cache_enabled=not sharded)


def shut_down(world: World) -> None:
    """Leave the process group, once every rank is done."""
    world.wait()
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------- data order


def derive(*key) -> int:
    """A seed of 63 bits out of numbers and words."""
    return random.Random(repr(key)).getrandbits(63)


@lru_cache(maxsize=3)  # the first epoch's, which says how long each is, this one's and the next
def epoch_order(dataset, seed: int, batch_size: int):
    """The items of a data set in the order of one epoch: its own, or a random permutation."""
    if hasattr(dataset, "order"):
        return dataset.order(seed, batch_size)
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))


class Samples(torch.utils.data.Dataset):
    """The run as one long row of samples: sample `position` is number position % batch size of
    step position // batch size, made of an item of the data set by `prepare(img, captions, rng)`.

    A finite data set is shuffled anew in every epoch. An item that cannot be used gives its place
    to another; why travels with the batch, so that the trainer can count it.
    """

    def __init__(self, dataset, prepare: Callable, seed: int):
        self.dataset, self.prepare, self.seed = dataset, prepare, seed

    def item(self, position: int, batch_size: int) -> int:
        """The item at a position of the run."""
        if not getattr(self.dataset, "shuffle", True):
            return position
        first = epoch_order(self.dataset, derive(self.seed, "epoch", 0), batch_size)
        epoch, k = divmod(position, len(first))
        return int(epoch_order(self.dataset, derive(self.seed, "epoch", epoch), batch_size)[k])

    def __getitem__(self, key: tuple[int, int]) -> tuple[list, list[str]]:
        """The sample at (position, item)."""
        (position, item), n, skipped = key, len(self.dataset), []
        others = random.Random(derive(self.seed, "instead", position))
        while True:
            try:
                found = self.dataset[item]
                break
            except ValueError as error:
                skipped.append(str(error))
            if len(skipped) >= min(n, 1000):
                raise ValueError(f"no usable sample in {self.dataset.name}: {skipped[0]}")
            # in a large set not the next one: its neighbours may have the same fault
            item = (item + 1) % n if n <= 1000 else others.randrange(n)
        return self.prepare(*found, random.Random(derive(self.seed, "sample", position))), skipped


def collate(items: list) -> tuple[list[Tensor], list[str]]:
    tensors = [torch.stack(column) for column in zip(*(item for item, _ in items))]
    return tensors, [message for _, skipped in items for message in skipped]


def stop_loading() -> None:
    """At exit, after an exception too: multiprocessing would send SIGTERM and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for each of them
    for process in multiprocessing.active_children():
        process.kill()


def ignore_signals(_: int) -> None:
    """In a data loading process: they are for the trainer, which saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The thread that hands tensors over has nobody to complain to once the trainer was killed; what
    # goes wrong with a sample travels to the trainer another way.
    sys.excepthook = lambda *_: None


def micro_batches(
    samples: Samples,
    world: World,
    start: int,
    steps: int,
    batch_size: int,
    micro_batch: int,
    workers: int,
) -> Iterator[tuple[list[Tensor], list[str]]]:
    """This rank's micro-batches of steps start .. steps - 1, in order: (tensors, skipped)."""
    if len(samples.dataset) < batch_size:
        announce(
            world,
            f"warning: {len(samples.dataset)} samples are fewer than a batch of {batch_size}: "
            "each batch holds some of them more than once",
        )
    places = (
        range(step * batch_size + offset, step * batch_size + offset + micro_batch)
        for step in range(start, steps)
        for offset in range(world.rank * micro_batch, batch_size, world.size * micro_batch)
    )
    atexit.register(stop_loading)
    return iter(
        DataLoader(
            samples,
            batch_sampler=([(p, samples.item(p, batch_size)) for p in some] for some in places),
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=ignore_signals,
            pin_memory=world.device.type == "cuda",
        )
    )


def held_out(samples: Samples, count: int, world: World) -> list[Tensor]:
    """`count` samples of a validation set, always the same, as stacked tensors; ValueError if
    there are none."""
    count = min(count, len(samples.dataset))
    tensors, skipped = collate([samples[k, samples.item(k, count)] for k in range(count)])
    messages = sorted(set(skipped))
    for message in messages[:5]:
        announce(world, f"skipped for validation: {message}")
    if len(messages) > 5:
        announce(world, f"skipped for validation: {len(messages) - 5} more")
    return tensors


def images_to(device: torch.device, images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [0, 1], channels last in memory."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255


def check_batches(batch_size: int, micro_batch: int | None, processes: int) -> int:
    """The micro-batch size; ValueError where the processes do not divide the batch."""
    if processes < 1:
        raise ValueError(f"{processes} processes: expected at least 1")
    if micro_batch is None and batch_size % processes == 0:
        return batch_size // processes
    if not micro_batch or micro_batch < 1 or batch_size % (micro_batch * processes):
        parts = f"{processes} process(es)"
        if micro_batch:
            parts += f" × --micro-batch {micro_batch}"
        raise ValueError(f"--batch-size {batch_size} is not a multiple of {parts}")
    return micro_batch


# ----------------------------------------------------------------------------- schedules


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at `steps` along half a cosine, then `end` (A.2)."""
    if step >= steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


# ----------------------------------------------------------------------------- the log


given_up: set[Path] = set()  # what has failed once and been said


@contextmanager
def going_on(path: Path):
    """Around the writing of what a run can do without: a failure is said, once for each file, and
    training goes on."""
    try:
        yield
    except (OSError, ValueError) as error:
        if path not in given_up:
            message = f"warning: {path} cannot be written; going on without ({error})"
            tqdm.write(message, file=sys.stderr)
        given_up.add(path)


class Log:
    """log.jsonl, written by rank 0: one object per logged step and stage. Starting at a step
    drops what an earlier run of the same stage logged after it."""

    def __init__(self, run_dir: Path, stage: str, start: int, world: World):
        self.path, self.stage, self.begin = run_dir / "log.jsonl", stage, time.time()
        self.is_main = world.is_main
        if self.is_main and self.path.exists():
            with going_on(self.path):
                kept = [line for line in self.path.open("rb") if self.precedes(line, start)]
                checkpoint.write(self.path, lambda file: file.writelines(kept))

    def precedes(self, line: bytes, start: int) -> bool:
        try:
            entry = json.loads(line)
            return entry["stage"] != self.stage or entry["step"] <= start
        except (ValueError, KeyError, TypeError):
            return False  # the torn last line of a killed run

    def write(self, step: int, **values: float | list[float]) -> None:
        if self.is_main:
            seconds = round(time.time() - self.begin, 1)
            entry = {"stage": self.stage, "step": step, "seconds": seconds, **values}
            line = json.dumps(entry).encode() + b"\n"
            with going_on(self.path), open(self.path, "ab", buffering=0) as file:
                size = file.tell()
                if file.write(line) < len(line):
                    file.truncate(size)  # half a line would spoil the next one
                    raise OSError("no room is left")

    def draw(self) -> None:
        """curves.png, of all that the run's stages have logged."""
        path = self.path.with_name("curves.png")
        if self.is_main:
            with going_on(path):
                draw_curves([self.path.parent], path)


# ----------------------------------------------------------------------------- what is seen


def announce(world: World, message: str) -> None:
    if world.is_main:
        print(message, flush=True)


SHOWN = (
    "loss",
    "skipped_updates",
    "psnr",
    "text_loss",
    "image_loss",
    "val_psnr",
    "codes",
    "val_image_loss",
)


class Progress:
    """The bar of rank 0, and the means of the metrics between two logged steps."""

    def __init__(self, world: World, start: int, steps: int, batch_size: int, unit: str):
        self.world, self.start, self.steps = world, start, steps
        self.per_step, self.unit = batch_size, unit
        self.bar = tqdm(total=steps, initial=start, disable=not world.is_main, mininterval=0.5)
        self.sums: dict[str, Tensor] = {}
        self.shown: dict[str, float] = {}
        self.count, self.since_taken = 0, 0
        self.begin = self.since = time.time()
        self.skipped: set[str] = set()
        self.cut = 0  # captions longer than the text part of the stream

    def skip(self, messages: list[str]) -> None:
        """Name the first few samples that are passed over; the counts stand at the end."""
        for message in messages:
            if message not in self.skipped and len(self.skipped) < 10_000:
                self.skipped.add(message)
                if len(self.skipped) <= 5:
                    self.bar.write(f"skipped: {message}", file=sys.stderr)

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1

    def step(self, done: int) -> None:
        self.bar.update()
        self.since_taken += 1
        if done - self.start == 20 and self.world.is_main:
            rest = (time.time() - self.begin) / 20 * (self.steps - done) / 60
            self.bar.write(f"about {rest:.0f} minutes to go")

    @contextmanager
    def paused(self):
        """What happens inside is no training, and does not count in the speed."""
        began = time.time()
        yield
        self.since += time.time() - began

    def take(self) -> dict[str, float]:
        """The means since the last call, averaged over the processes, and the speed."""
        means = torch.stack([total.float() / self.count for total in self.sums.values()])
        values = dict(zip(self.sums, self.world.mean(means).tolist()))
        rate = self.since_taken * self.per_step / (time.time() - self.since)
        values[f"{self.unit}_per_second"] = rate
        self.sums, self.count, self.since_taken, self.since = {}, 0, 0, time.time()
        self.show(**values)
        return values

    def show(self, **values: float) -> None:
        self.shown |= values
        shown = {k: f"{v:.4g}" for k, v in self.shown.items() if k in SHOWN or "_per_" in k}
        self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        self.bar.close()
        # `unreadable: …` or `filtered: reason: …`, as the sources say it
        kinds = Counter(re.match(r"filtered: [^:]*|[^:]*", message)[0] for message in self.skipped)
        seen = [(kinds, self.cut)]
        if self.world.size > 1:
            seen = [None] * self.world.size
            dist.all_gather_object(seen, (kinds, self.cut))
        for kind, count in sum((kinds for kinds, _ in seen), Counter()).most_common():
            announce(self.world, f"{count} skipped, {kind}")
        cut = sum(count for _, count in seen)
        if cut:
            announce(self.world, f"{cut} captions were cut to the model's text length")

    def stop(self, done: int, code: int) -> None:
        """End a run that was asked to stop after step `done`, and has saved it. For all ranks."""
        self.close()
        shut_down(self.world)
        fail(f"stopped after step {done} of {self.steps}; go on with --resume", code)
