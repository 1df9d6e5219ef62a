"""
Files that a run leaves behind: written whole or not at all, read without running anything in them.

A checkpoint NAME.pt holds tensors and plain data, and its archive's sums are checked before it is
read.
"""

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn


def write(path: Path, put: Callable) -> None:
    """Write a file whole or not at all: `put(file)` writes its bytes. OSError where it cannot be
    written; what was there before stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path} cannot be written ({cause(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def cause(error: BaseException) -> str:
    """What the system said: torch.save turns its error into one of its own."""
    last = str(error).split("\n")[0]
    while error and not getattr(error, "errno", None):
        error = error.__context__
    return os.strerror(error.errno) if error else last


def write_picture(path: Path, image: Image.Image, text: str = "", **options) -> None:
    """Write a picture in the format that its suffix names, with Pillow's options. A PNG keeps
    `text` under the key `dalle`. OSError as in `write`."""
    about = PngInfo()
    if text:
        about.add_text("dalle", text)
    kind = Image.registered_extensions()[path.suffix.lower()]
    write(path, lambda file: image.save(file, kind, pnginfo=about, **options))


def save(path: Path, state: dict) -> None:
    """Write a checkpoint. OSError as in `write`."""
    write(path, lambda file: torch.save(state, file))


def load(path: Path) -> dict:
    """Read a checkpoint: tensors and plain data only. ValueError for anything else, and for a
    damaged file: torch.load itself checks no sums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"its part {damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of this project: expected a dictionary")
    return state


def load_model(path: Path, Model: type, Config: type, state: dict | None = None) -> nn.Module:
    """The model in a dvae.pt, prior.pt or clip.pt, on the CPU, for evaluation. ValueError where the
    file is something else. state: what `load` has read there, if it has already."""
    state = state or load(path)
    try:
        with torch.device("meta"):  # no time for initial weights
            model = Model(Config(**state["config"]))
        model.to_empty(device="cpu").load_state_dict(state["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is not a {Model.__name__} checkpoint of this project ({reason})"
        ) from error
    return model.eval()


def check_config(path: Path, found: dict, expected) -> None:
    """ValueError unless the config in a file is the one that was asked for."""
    differ = [
        f"{name} {found.get(name)} (expected {value})"
        for name, value in asdict(expected).items()
        if found.get(name) != value
    ]
    if differ:
        raise ValueError(f"{path} holds a model of other sizes: {', '.join(differ)}")


def set_aside(run_dir: Path, *names: str) -> None:
    """Keep what an earlier run left under these names, as NAME.old. Its state is to come first:
    --resume must not find it where a new run was killed in here."""
    moved = [name for name in names if (run_dir / name).exists()]
    for name in moved:
        shutil.rmtree(run_dir / (name + ".old"), ignore_errors=True)
        os.replace(run_dir / name, run_dir / (name + ".old"))
    if moved:
        print(f"{run_dir} holds an earlier run: kept as {', '.join(f'{n}.old' for n in moved)}")
