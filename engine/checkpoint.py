"""
Files that a run leaves behind: written whole or not at all, read without running anything in them.

A checkpoint NAME.pt holds tensors and plain data, and its archive's sums are checked before it is
read.
"""

import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from bpe import BPE
from clip import CLIP, CLIPConfig
from dvae import DVAE, DVAEConfig
from scale.formats import matrices
from transformer import Transformer, TransformerConfig

MAKERS = {
    "dvae.pt": "train_dvae.py",
    "bpe.json": "train_prior.py",
    "prior.pt": "train_prior.py",
    "clip.pt": "train_clip.py",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def load(path: Path, weights: bool = True) -> dict:
    """Read a checkpoint: tensors and plain data only. ValueError for anything else, and for a
    damaged file: torch.load itself checks no sums. Without `weights` those are not read, and what
    stands beside them is unchecked."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if weights else None
        if damaged:
            raise ValueError(f"its part {damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not weights)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of this project: expected a dictionary")
    return state if weights else without_weights(state)


def without_weights(state: dict) -> dict:
    """What a checkpoint says beside its weights."""
    return {name: value for name, value in state.items() if name != "model"}


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


def check_holds(run_dir: Path, *names: str) -> None:
    """ValueError where a run's directory lacks one of these files: which, and what makes it."""
    for name in names:
        if not (run_dir / name).is_file():
            command = f"python {MAKERS[name]} --run-dir {run_dir}"
            raise ValueError(f"{run_dir} holds no {name}; train it with: {command}")


class Models(NamedTuple):
    """Those of a run, of which the reranker may be missing; `about` is what else prior.pt holds."""

    bpe: BPE
    dvae: DVAE
    prior: Transformer
    clip: CLIP | None
    about: dict


def load_run(run_dir: Path, device: str = "cpu", dtype: str = "fp32") -> Models:
    """The models of a run; those of the last call, while their files are the same.

    The matrices of the prior's resblocks are in `dtype`, for autocast to it: gains, biases,
    embeddings and logits stay in 32 bits (D.2). ValueError where a file is missing or of another
    run.
    """
    check_holds(run_dir, "bpe.json", "dvae.pt", "prior.pt")
    files = [run_dir / name for name in ("bpe.json", "dvae.pt", "prior.pt", "clip.pt")]
    written = tuple(path.stat().st_mtime_ns for path in files if path.is_file())
    return read_run(run_dir, device, dtype, written)


@lru_cache(maxsize=1)
@torch.inference_mode(False)  # which `draw` is in: what is kept can be trained elsewhere
def read_run(run_dir: Path, device: str, dtype: str, written: tuple[int, ...]) -> Models:
    """What `load_run` keeps: `written`, when the files were, tells whether they are the same."""
    bpe, about, clip = BPE.load(run_dir / "bpe.json"), load(run_dir / "prior.pt"), None
    prior = load_model(run_dir / "prior.pt", Transformer, TransformerConfig, about)
    dvae = load_model(run_dir / "dvae.pt", DVAE, DVAEConfig).to(device)
    if (run_dir / "clip.pt").is_file():
        clip = load_model(run_dir / "clip.pt", CLIP, CLIPConfig).to(device)
    check_one_run(run_dir, bpe, dvae, prior, clip)
    for _, p in matrices(prior):
        p.data = p.data.to(DTYPES[dtype])
    return Models(bpe, dvae, prior.to(device), clip, without_weights(about))


def check_one_run(
    run_dir: Path, bpe: BPE, dvae: DVAE, prior: Transformer | None, clip: CLIP | None
) -> None:
    """ValueError unless the files of a run, as many as there are, have the same vocabularies."""
    text_vocabs = {model.config.text_vocab for model in (prior, clip) if model is not None}
    image_vocabs = {prior.config.image_vocab} if prior is not None else set()
    if not (text_vocabs <= {bpe.vocab_size} and image_vocabs <= {dvae.config.vocab_size}):
        raise ValueError(f"the files in {run_dir} are not of one run: their vocabularies differ")


def check_config(path: Path, found: dict, expected) -> None:
    """ValueError unless the config in a file is the one that was asked for."""
    differ = [
        f"{name} {found.get(name)} (expected {value})"
        for name, value in asdict(expected).items()
        if found.get(name) != value
    ]
    if differ:
        raise ValueError(f"{path} holds a model of other sizes: {', '.join(differ)}")


def state_names(stage: str) -> list[str]:
    """What a stage's state can be called."""
    return [f"{stage}_state{suffix}" for suffix in (".pt", "", ".previous")]


def free_suffix(run_dir: Path, *names: str) -> str:
    """The first of .old, .old2, .old3, … that is behind none of the names."""
    suffixes = (f".old{k}" if k > 1 else ".old" for k in count(1))
    return next(s for s in suffixes if not any((run_dir / (name + s)).exists() for name in names))


def set_aside(run_dir: Path, *names: str) -> None:
    """Keep what an earlier run left under these names, all as NAME.old, or NAME.old2 and so on;
    before the weights of a stage its state: --resume must not find it where a new run was killed
    in here."""
    stages = [name.removesuffix(".pt") for name in names if name.endswith(".pt")]
    states = [name for stage in stages for name in state_names(stage)]
    moved = [name for name in (*states, *names) if (run_dir / name).exists()]
    suffix = free_suffix(run_dir, *moved)
    for name in moved:
        os.replace(run_dir / name, run_dir / (name + suffix))
    if moved:
        print(f"{run_dir} holds an earlier run: kept as {', '.join(n + suffix for n in moved)}")
