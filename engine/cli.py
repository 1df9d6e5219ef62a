"""
The command line: options out of configs and presets, the device, and how a script ends.

A script's last line is `start(main)`: the one place where an error becomes a line and an exit code.
2 is bad input, found before anything was done; 1 a run that failed, with advice; 130, 143 and 129
are Ctrl-C, SIGTERM and SIGHUP. `DALLE_DEBUG=1` shows the traceback instead, to people who edit.
"""

import argparse
import inspect
import io
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm


class Stop(Exception):
    """Ends the program with a line on standard error and an exit code.

    Under torchrun the first process of each machine speaks for all, unless the trouble is this
    process's `alone`.
    """

    def __init__(self, message: str, code: int = 1, alone: bool = False):
        super().__init__(message)
        self.code, self.alone = code, alone


def start(main: Callable[[], None]) -> None:
    """Run a script's main. Whatever ends it early becomes one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # which may not know τ, as a file on Windows
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main()
    except Stop as stop:
        end(stop)
    except (ValueError, OSError) as error:
        end(Stop(str(error), 2), error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        end(Stop("out of memory: try fewer pictures or captions at once", 1, alone=True), error)
    except KeyboardInterrupt:
        end(Stop("stopped", 130))


def is_out_of_memory(error: BaseException) -> bool:
    """As Python, CUDA, the CPU's allocator and oneDNN say it."""
    said = ("can't allocate memory", "create a primitive")
    is_so = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_so or any(words in str(error) for words in said)


def end(stop: Stop, error: Exception | None = None) -> None:
    error = error or stop.__cause__
    if error and os.environ.get("DALLE_DEBUG"):
        raise error
    if stop.alone or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        for bar in list(getattr(tqdm, "_instances", ())):  # the line is to stand alone, and last
            bar.close()
        print(f"{Path(sys.argv[0]).name}: {stop}", file=sys.stderr)
    sys.exit(stop.code)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest name where one is misspelt."""

    def __init__(self, **options):
        # a line for each option, where the terminal is wide enough
        lines = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
        super().__init__(formatter_class=lines, **options)

    def parse_known_args(self, args=None, namespace=None):
        """An option may be spelt as its field is, with underscores."""
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--\w+", lambda name: name[0].replace("_", "-"), arg) for arg in args]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        known = {name: name for name in self._option_string_actions}
        known |= {f"--{name}": f"--preset {name}" for name in self.get_default("presets") or ()}
        name = re.search(r"unrecognized arguments: ([^\s=]+)", message)
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            name, known = choice, {word: word for word in re.findall(r"[\w-]+", choice[2])}
        if name and (nearest := get_close_matches(name[1], known, 1)):
            message += f"; did you mean {known[nearest[0]]}?"
        raise Stop(message, 2)


def trainer_parser(description: str, presets: dict, *configs: type, shards: bool = False) -> Parser:
    """The options every trainer has, one for each field of the config classes, and where a model
    can be too large for one GPU those of 2.4 and 2.5. The help of a field is the comment behind it,
    and its value in the preset that is named."""
    parser = Parser(description=description, add_help=False)
    add = parser.add_argument
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--preset", choices=presets, metavar="NAME", help=f"{', '.join(presets)}; "
        "default: the run's, or for a new one small on a GPU, tiny without")  # fmt: skip
    preset.add_argument(
        "--tiny", dest="preset", action="store_const", const="tiny", help="--preset tiny"
    )
    parser.set_defaults(
        presets=presets, shard=None, powersgd_rank=None, checkpoint_activations=False
    )
    named = parser.parse_known_args()[0].preset
    add("-h", "--help", action="help", help="this; with --tiny or --preset the values of that")
    add("--data", metavar="SPEC", help="toy (default), a folder of images, a table "
        "(.tsv .csv .jsonl), or tars such as 'shards/{000..031}.tar'")  # fmt: skip
    add("--filters", action=argparse.BooleanOptionalAction,
        help="drop captions and aspect ratios as the paper does (C)")  # fmt: skip
    add("--val", metavar="SPEC", help="default: a fixed share is held out")
    add("--run-dir", metavar="DIR", type=Path, help="where everything is; default: the newest run, "
        "or for a new one runs/PRESET")  # fmt: skip
    add("--micro-batch", type=int, metavar="N", help="samples per process and pass")
    add("--seed", type=int, metavar="N", help="of weights, data order and noise; default 0")
    add("--device", help="cuda, mps or cpu; default: the best one there")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of products (2.4, D); default fp32")
    add("--workers", type=int, default=1, metavar="N", help="loading processes, up to 64")
    add("--resume", action="store_true", help="go on with the run in --run-dir, or the newest")
    add("--init-from", metavar="FILE", type=Path, help="fine-tune these weights")
    if shards:
        add("--shard", type=int, nargs="?", const=0, metavar="GPUS", help="shard the model among "
            "the GPUs of a machine (2.5), or among this many")  # fmt: skip
        add("--powersgd-rank", type=int, metavar="R",
            help="compress what machines send each other to this rank (E)")  # fmt: skip
        add("--moments", type=int, choices=(32, 16), help="bits of Adam's moments and PowerSGD's "
            "buffers; default 32; 16 are the paper's formats (B.2, E.2)")  # fmt: skip
        add("--checkpoint-activations", action="store_true",
            help="keep only the resblocks' inputs, compute the rest again (2.4)")  # fmt: skip
    for config in configs:
        group = parser.add_argument_group(f"{config.__name__}, the paper's values by default")
        comments = comments_of(config)
        for field in fields(config):
            value = presets.get(named, {}).get(field.name, field.default)
            help = f"{comments[field.name]}; default {shown(field.default)}"
            if value != field.default:
                help += f", {named} {shown(value)}"
            name = f"--{field.name.replace('_', '-')}"
            group.add_argument(name, type=field.type, metavar="N", help=help.replace("%", "%%"))
    return parser


def comments_of(config: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, from its source."""
    found = re.findall(r"^    (\w+): \w+ = .*?  # (.+)$", inspect.getsource(config), re.MULTILINE)
    return dict(found)


def shown(value: float) -> str:
    """A number as it may be typed: 3_000_000, 1.25e-06."""
    return f"{value:_}" if isinstance(value, int) else f"{value:g}"


def choose(config: type, preset: dict, args: argparse.Namespace):
    """A config from the paper's defaults, overridden by a preset, overridden by options.

    Where --steps is given, the schedules that are not shrink or grow in proportion: fields named
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
        shares = ("beta1", "beta2", "ema", "min_usage", "bpe_dropout", "caption_dropout")
        most = 1 if name in shares else math.inf
        if not least <= value <= most or value == math.inf:
            raise ValueError(f"{option} is {value}; expected a number from {least} to {most}")
        if value == 1 and name in ("beta1", "beta2", "ema"):
            raise ValueError(f"{option} is 1: nothing would ever move; expected less")


def check_batches(batch_size: int, micro_batch: int | None, processes: int) -> int:
    """The micro-batch size; ValueError where the processes do not divide the batch."""
    if processes < 1:
        raise ValueError(f"{processes} processes: expected at least 1")
    if micro_batch is None and batch_size % processes == 0:
        return batch_size // processes
    if not micro_batch or micro_batch < 1 or batch_size % (micro_batch * processes):
        parts = f"{processes} process(es)"
        if micro_batch is not None:
            parts += f" × --micro-batch {micro_batch}"
        raise ValueError(f"--batch-size {batch_size} is not a multiple of {parts}")
    return micro_batch


def newest_run(*names: str) -> Path | None:
    """The run directory under runs/ that holds all of these files, the first of them newest."""
    found = [p.parent for p in Path("runs").glob(f"*/{names[0]}")]
    found = [run for run in found if all((run / name).is_file() for name in names)]
    return max(found, key=lambda run: (run / names[0]).stat().st_mtime, default=None)


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


def check_output(path: Path, *suffixes: str) -> None:
    """ValueError or OSError where a picture could not be written to `path` at the end of a long
    run: no suffix of a format among these (.png .jpg .jpeg .webp), no folder, a name too long."""
    suffixes = suffixes or (".png", ".jpg", ".jpeg", ".webp")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected the name of a picture, such as cube{suffixes[0]}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{path} is a folder or write-protected: choose another name")
    probe = path.with_name(path.name + ".tmp")  # as it will be written
    probe.touch()
    probe.unlink()
