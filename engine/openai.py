"""
OpenAI's released dVAE, encoder.pkl and decoder.pkl, as one of ours (A.1).

    python -m engine.openai encoder.pkl decoder.pkl --run-dir runs/openai
    python train_prior.py --run-dir runs/openai --data my_photos

The files are pickles of whole modules from a package `dall_e`, which is not needed, nor is any code
of it run: a reader of our own takes tensors and plain data out of them and refuses all else.
"""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import torch

from dvae import DVAE, DVAEConfig
from engine.checkpoint import save, set_aside
from engine.cli import Parser, start
from engine.run import REPLACES


class Shell:
    """What a class of the release becomes: its attributes, none of its code."""

    def parameters(self, prefix: str = "") -> dict[str, torch.Tensor]:
        found = {prefix + name: p for name, p in self._parameters.items() if p is not None}
        for name, module in self._modules.items():
            found |= module.parameters(f"{prefix}{name}.")
        return found


# Every other name that such a file may use, and what is called or built in its place.
ALLOWED = {
    "__builtin__.set": set,
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "torch.device": torch.device,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch._utils._rebuild_tensor_v2": lambda x, at, size, step, *_: x.as_strided(size, step, at),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
}


class Reader(pickle.Unpickler):
    """Unpickles tensors, plain data and shells; any other name in the file is refused."""

    def __init__(self, file: io.BytesIO, most_bytes: int):
        super().__init__(file)
        self.most_bytes = most_bytes
        self.storages: dict[str, torch.Tensor] = {}  # allocated here, filled in later

    def find_class(self, module: str, name: str):
        if module.startswith(("dall_e.", "torch.nn.modules.")):
            # A file can set attributes on the classes it is given: no two get the same shell.
            return type("Shell", (Shell,), {})
        if f"{module}.{name}" not in ALLOWED:
            raise ValueError(f"it names {module}.{name}, which no such file needs")
        return ALLOWED[f"{module}.{name}"]

    def persistent_load(self, key: tuple):
        if key[0] == "module":  # a class and its source, before PyTorch 1.6
            return key[1]
        _, dtype, name, _, numel, *_ = key
        if name not in self.storages:
            if numel * dtype.itemsize > self.most_bytes:
                raise ValueError(f"it has {numel} numbers in one tensor, more than its size")
            self.storages[name] = torch.empty(numel, dtype=dtype)
        return self.storages[name]


def read_released(path: str | Path) -> dict[str, torch.Tensor]:
    """The parameters of a pickled module of the release, float32 on the CPU, by name.

    Reads both of PyTorch's formats, the zip archive and what came before version 1.6: four
    pickles and the storages. ValueError where the file is something else.
    """
    data = Path(path).read_bytes()
    file = io.BytesIO(data)
    try:
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            root = archive.namelist()[0].split("/")[0]
            reader = Reader(io.BytesIO(archive.read(f"{root}/data.pkl")), len(data))
            module = reader.load()
            for name, storage in reader.storages.items():
                if archive.getinfo(f"{root}/data/{name}").file_size != storage.nbytes:
                    raise ValueError(f"its tensor {name} has another size than it says")
                content = bytearray(archive.read(f"{root}/data/{name}"))
                storage.copy_(torch.frombuffer(content, dtype=storage.dtype))
        else:
            file.seek(0)
            for _ in range(3):  # a magic number, a version, the machine it was written on
                Reader(file, 0).load()
            reader = Reader(file, len(data))
            module = reader.load()
            for name in Reader(file, 0).load():
                storage = reader.storages[name]
                content = bytearray(file.read(8 + storage.nbytes)[8:])  # after its length
                storage.copy_(torch.frombuffer(content, dtype=storage.dtype))
        return {name: p.float() for name, p in module.parameters().items()}
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is not one of OpenAI's encoder.pkl and decoder.pkl ({reason})"
        ) from error


def load_openai(encoder_path: str | Path, decoder_path: str | Path) -> DVAE:
    """The released encoder.pkl and decoder.pkl as a DVAE on the CPU, for evaluation. The sizes are
    read off the parameters. ValueError for any other file."""
    encoder, decoder = read_released(encoder_path), read_released(decoder_path)
    try:
        config = DVAEConfig(
            n_hid=encoder["blocks.input.w"].shape[0],
            n_init=decoder["blocks.input.w"].shape[0],
            n_groups=len({name.split(".")[1] for name in encoder if ".group_" in name}),
            blocks_per_group=sum(
                bool(re.fullmatch(r"blocks\.group_1\.block_\d+\.res_path\.conv_1\.w", name))
                for name in encoder
            ),
            vocab_size=encoder["blocks.output.conv.w"].shape[0],
        )
        with torch.device("meta"):
            model = DVAE(config)
        model.encoder.load_state_dict(encoder, assign=True)
        model.decoder.load_state_dict(decoder, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{encoder_path} and {decoder_path} do not have the released layout ({reason})"
        ) from error
    return model.eval()


def main() -> None:
    parser = Parser(description="Turn OpenAI's encoder.pkl and decoder.pkl into a dvae.pt.")
    parser.add_argument("encoder", metavar="ENC", type=Path, help="encoder.pkl")
    parser.add_argument("decoder", metavar="DEC", type=Path, help="decoder.pkl")
    parser.add_argument("--run-dir", metavar="DIR", type=Path, default=Path("runs/openai"),
        help="where dvae.pt is written; default runs/openai")  # fmt: skip
    parser.add_argument("--image-size", metavar="N", type=int, default=256, help="of the prior")
    args = parser.parse_args()
    dvae, run_dir, size = load_openai(args.encoder, args.decoder), args.run_dir, args.image_size
    factor = dvae.config.factor
    if size < factor or size % factor:
        raise ValueError(f"--image-size {size} is not a multiple of {factor}")
    run_dir.mkdir(parents=True, exist_ok=True)
    set_aside(run_dir, *REPLACES["dvae"])  # what belonged to another dVAE
    about = {"config": asdict(dvae.config), "preset": "small", "data": "toy", "image_size": size}
    save(run_dir / "dvae.pt", {**about, "model": dvae.state_dict(), "step": 0})
    print(
        f"{run_dir}/dvae.pt: {size} × {size} pixels as {(size // factor) ** 2} tokens of "
        f"{dvae.config.vocab_size}\nnext: python train_prior.py --run-dir {run_dir} --data SPEC"
    )


if __name__ == "__main__":
    start(main)
