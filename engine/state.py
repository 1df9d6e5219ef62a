"""
The state of a run, which --resume goes on from: model, average, optimizer, errors, schedules, step.

It is a checkpoint, NAME_state.pt; where the model is sharded it is a folder, NAME_state, to which
each process writes its shards (torch.distributed.checkpoint). Either can be resumed by any number
of processes, sharded or not. Drawing needs none of this, and does not wait for its imports.
"""

import io
import json
import os
import pickle
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim.swa_utils import AveragedModel

from engine.checkpoint import cause, check_config, load, save, write
from scale.parallel import World
from scale.powersgd import PowerSGD


@dataclass
class State:
    """A run's state as it was found: `about` is plain data, `tensors` is None for a folder."""

    path: Path
    about: dict
    tensors: dict | None


def tensors_of(
    model: nn.Module,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    compressor: PowerSGD | None = None,
) -> dict:
    """The tensors of a run's state, by the model's own names; shards where it is sharded."""
    weights, moments = get_state_dict(model, optimizer)
    tensors = {"model": weights, "optimizer": moments}
    if average:
        tensors["average"] = get_model_state_dict(average.module)
    if compressor:
        tensors["errors"] = compressor.state_dict()
    return tensors


def save_state(path: Path, about: dict, tensors: dict, sharded: bool) -> None:
    """Save NAME_state.pt, or the folder NAME_state where the tensors are sharded; `path` is the
    former's. For all ranks to call. OSError as in `write`."""
    folder, main = path.with_suffix(""), not dist.is_initialized() or dist.get_rank() == 0
    if not sharded:
        if main:
            save(path, about | tensors)
            shutil.rmtree(folder, ignore_errors=True)
        return
    new, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".previous")
    if main:
        shutil.rmtree(new, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save(tensors, checkpoint_id=new)
    except CheckpointException as error:  # on every rank, when one of them cannot write
        if main:
            shutil.rmtree(new, ignore_errors=True)
        failure = next(iter(error.failures.values()))[0]
        raise OSError(
            f"{folder} cannot be written; is its disk full? ({cause(failure)})"
        ) from error
    own = [file.name for file in new.glob(f"__{dist.get_rank()}_*")] + [".metadata"] * main
    sums = [None] * dist.get_world_size()
    dist.all_gather_object(sums, {name: crc32(new / name) for name in own})
    if main:
        saved = {"sums": {k: v for part in sums for k, v in part.items()}, "about": about}
        text = json.dumps({"crc32": crc32_of(saved), "saved": saved})
        write(new / "about.json", lambda file: file.write(text.encode()))
        if folder.exists():  # else `old` is the only state there is
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
        path.unlink(missing_ok=True)
    dist.barrier()


def crc32_of(plain) -> int:
    return zlib.crc32(json.dumps(plain).encode())


def crc32(path: Path) -> int:
    total = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            total = zlib.crc32(block, total)
    return total


def written(path: Path) -> float:
    """When a state was; not the time of a folder, which changes while it is removed."""
    about = path / "about.json" if path.is_dir() else path
    return about.stat().st_mtime if about.exists() else 0.0


class Index(pickle.Unpickler):
    """The index of a folder's shards is a pickle, which torch reads as it is: see first that it
    names nothing but what an index is made of."""

    def find_class(self, module: str, name: str):
        known = {
            "torch.distributed.checkpoint.metadata": (
                "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
                "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
            ),
            "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
            "torch.serialization": ("_get_layout",),
            "pathlib": ("PosixPath", "WindowsPath"),
            "pathlib._local": ("PosixPath", "WindowsPath"),
            "torch": ("Size", "float16", "float32", "float64", "bfloat16", "int32", "int64"),
        }  # fmt: skip
        if name not in known.get(module, ()):
            raise ValueError(f"it holds {module}.{name}, which no index does")
        return super().find_class(module, name)


class PlainValues(DefaultLoadPlanner):
    """Reads the shards; values that are no tensors must be plain data."""

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def find_state(path: Path, run: dict, *keys: str) -> State | None:
    """The newest state at NAME_state.pt or NAME_state, None where there is none yet.

    Its `about` holds `keys`. ValueError where it is no state, damaged, or of a run that is done.
    """
    folder = path.with_suffix("")
    if not folder.exists():  # killed between the two renames
        folder = folder.with_name(folder.name + ".previous")
    found = [p for p in (path, folder) if p.exists()]
    if not found:
        return None
    newest = max(found, key=written)
    if newest == path:
        about, tensors = load(path), {}
        for name in ("model", "average", "optimizer", "errors"):
            tensors[name] = about.pop(name, None)
    else:
        try:
            found, tensors = json.loads((newest / "about.json").read_text()), None
            about, sums = found["saved"]["about"], found["saved"]["sums"]
            if crc32_of(found["saved"]) != found["crc32"]:
                raise ValueError("about.json is damaged")
            with open(newest / ".metadata", "rb") as file:
                Index(file).load()
        except Exception as error:  # whatever a damaged or foreign file makes the readers raise
            reason = str(error).split("\n")[0]
            raise ValueError(f"{newest} is not the state of a run ({reason})") from error
        for name, total in sums.items():
            if not (newest / name).is_file() or crc32(newest / name) != total:
                raise ValueError(f"{newest} is damaged: {name} is not as it was written")
    if not {"config", "run", "step", *keys} <= about.keys():
        raise ValueError(f"{newest} is not the state of a run: expected what --resume needs")
    if about["step"] >= run["steps"]:
        raise ValueError(f"{newest} is at step {about['step']} already: give --steps above that")
    return State(newest, about, tensors)


def to_resume(path: Path, run: dict, config, wanted: bool, world: World) -> State | None:
    """The state to go on from, if that is wanted; it is a run of `config`.

    `run` holds the settings of this run; where they differ from those of the state, it is said.
    """
    state = find_state(path, run, "n_averaged", "scaler") if wanted else None
    mine = (str(state.path), state.about["step"]) if state else None
    if world.max(int(world.share(lambda: mine) != mine)):
        raise ValueError(f"not every process finds the same state at {path}: is the disk shared?")
    if state is None:
        return None
    check_config(state.path, state.about["config"], config)
    for name, value in run.items():
        was = state.about["run"].get(name, value)
        if value != was and world.is_main:
            print(f"resuming with {name} {value}; it was {was}")
    return state


def restore(
    state: State,
    model: nn.Module,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    compressor: PowerSGD | None = None,
) -> None:
    """Bring a run's tensors back to where its state says they were. For all ranks to call."""
    if not (state.tensors or state.about).get("errors"):
        compressor = None  # the run had none
    tensors, options = state.tensors, StateDictOptions(full_state_dict=True)
    if tensors is None:
        tensors, options = tensors_of(model, average, optimizer, compressor), None
        try:
            dcp.load(tensors, checkpoint_id=state.path, planner=PlainValues())
        except CheckpointException as error:
            reason = str(error).strip().split("\n")[-1]
            raise ValueError(f"{state.path} cannot be read ({reason})") from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
        options=options,
    )
    if average:
        set_model_state_dict(average.module, tensors["average"], options=options)
        average.n_averaged.fill_(state.about["n_averaged"])
    if compressor:
        compressor.load_state_dict(tensors["errors"])


def whole(model: nn.Module) -> dict:
    """The weights of a model, gathered from its shards, on rank 0's host. For all ranks to call."""
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
