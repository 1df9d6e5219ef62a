"""OpenAI's files: whole modules pickled from a package `dall_e`, read without it.

The modules here are written for this test, with the released names, shapes and arithmetic. Where
DALLE_ENCODER and DALLE_DECODER point at the real files, those are read too.
"""

import math
import os
import pickle
import sys
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from scripts import call, run
from torch import nn

import sample
import train_prior
from dvae import DVAE, DVAEConfig, map_pixels
from engine import openai
from engine.checkpoint import load, load_model
from engine.openai import load_openai

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")


class Conv2d(nn.Module):
    def __init__(self, n_in, n_out, kw):
        super().__init__()
        self.n_in, self.n_out, self.kw = n_in, n_out, kw
        self.use_float16, self.device, self.requires_grad = True, torch.device("cpu"), False
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / math.sqrt(n_in * kw**2))
        self.b = nn.Parameter(torch.randn(n_out) / 10)

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)


def block_class(name, kernels):
    def init(self, n_in, n_out, n_layers):
        nn.Module.__init__(self)
        self.n_in, self.n_out, self.n_hid, self.n_layers = n_in, n_out, n_out // 4, n_layers
        self.post_gain = 1 / (n_layers**2)
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = [n_in, n_out // 4, n_out // 4, n_out // 4, n_out]
        layers = []
        for k in range(4):
            layers.append((f"relu_{k + 1}", nn.ReLU()))
            layers.append((f"conv_{k + 1}", Conv2d(widths[k], widths[k + 1], kernels[k])))
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        return self.id_path(x) + self.post_gain * self.res_path(x)

    return type(name, (nn.Module,), {"__init__": init, "forward": forward})


EncoderBlock = block_class("EncoderBlock", (3, 3, 3, 1))
DecoderBlock = block_class("DecoderBlock", (1, 3, 3, 3))


class Half(nn.Module):
    def __init__(self, block, first, widths, last, pools):
        super().__init__()
        self.group_count, self.n_hid, self.n_blk_per_group = len(widths) - 1, 8, 2
        self.input_channels, self.vocab_size, self.device = 3, 32, torch.device("cpu")
        self.requires_grad, self.use_mixed_precision = False, True
        parts = [("input", first)]
        for g, (n_in, n_out) in enumerate(zip(widths, widths[1:])):
            group = [
                (f"block_{k + 1}", block(n_in if k == 0 else n_out, n_out, 2 * len(widths) - 2))
                for k in range(2)
            ]
            parts.append((f"group_{g + 1}", nn.Sequential(OrderedDict(group + pools[g]))))
        head = [("relu", nn.ReLU()), ("conv", last)]
        parts.append(("output", nn.Sequential(OrderedDict(head))))
        self.blocks = nn.Sequential(OrderedDict(parts))

    def forward(self, x):
        return self.blocks(x)


class Encoder(Half):
    def __init__(self):
        pools = [[("pool", nn.MaxPool2d(kernel_size=2))]] * 3 + [[]]
        widths = [8, 8, 16, 32, 64]
        super().__init__(EncoderBlock, Conv2d(3, 8, 7), widths, Conv2d(64, 32, 1), pools)


class Decoder(Half):
    def __init__(self):
        pools = [[("upsample", nn.Upsample(scale_factor=2, mode="nearest"))]] * 3 + [[]]
        widths = [6, 64, 32, 16, 8]
        super().__init__(DecoderBlock, Conv2d(32, 6, 1), widths, Conv2d(8, 6, 1), pools)


@pytest.fixture
def release(tmp_path, monkeypatch):
    """encoder.pkl and decoder.pkl as from a package dall_e, and the modules they were made of."""
    homes = {
        "dall_e.encoder": (Encoder, EncoderBlock),
        "dall_e.decoder": (Decoder, DecoderBlock),
        "dall_e.utils": (Conv2d,),
    }
    for home, classes in homes.items():
        module = types.ModuleType(home)
        for cls in classes:
            monkeypatch.setattr(cls, "__module__", home)
            setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, home, module)
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    torch.manual_seed(0)
    encoder, decoder = Encoder().eval(), Decoder().eval()
    for zipped in (True, False):  # the formats of PyTorch 1.6 and later, and of before
        for name, half in (("encoder", encoder), ("decoder", decoder)):
            path = tmp_path / f"{name}{'' if zipped else '_old'}.pkl"
            torch.save(half, path, _use_new_zipfile_serialization=zipped)
    for home in (*homes, "dall_e"):
        monkeypatch.delitem(sys.modules, home)
    return tmp_path, encoder, decoder


@pytest.mark.parametrize("age", ["", "_old"])
def test_weights_and_numerics(release, age):
    folder, encoder, decoder = release
    model = load_openai(folder / f"encoder{age}.pkl", folder / f"decoder{age}.pkl")
    assert "dall_e" not in sys.modules
    config = model.config
    assert (config.n_hid, config.n_init, config.vocab_size) == (8, 6, 32)
    assert (config.n_groups, config.blocks_per_group) == (4, 2)
    for ours, theirs in ((model.encoder, encoder), (model.decoder, decoder)):
        assert {k: v.shape for k, v in ours.named_parameters()} == {
            k: v.shape for k, v in theirs.named_parameters()
        }
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        logits = encoder(map_pixels(images))
        torch.testing.assert_close(model.encoder(map_pixels(images)), logits, atol=1e-4, rtol=0)
        tokens = logits.argmax(1)
        one_hot = F.one_hot(tokens, 32).permute(0, 3, 1, 2).float()
        pixels = ((torch.sigmoid(decoder(one_hot)[:, :3]) - 0.1) / 0.8).clamp(0, 1)
        torch.testing.assert_close(model.decode(tokens), pixels, atol=1e-4, rtol=0)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_is_refused_by_name_and_runs_nothing(release, tmp_path, zipped):
    folder, encoder, _ = release
    target, path = tmp_path / "ran", tmp_path / "evil.pkl"
    torch.save({"a": Malicious(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil.pkl .*posix.system"):
        load_openai(path, folder / "decoder.pkl")
    path.write_bytes(pickle.dumps(Malicious(target)))
    with pytest.raises(ValueError, match=r"evil.pkl .*posix.system"):
        load_openai(folder / "encoder.pkl", path)
    assert not target.exists()


def test_a_file_cannot_change_how_later_ones_are_read(release, tmp_path):
    folder, encoder, _ = release
    path = tmp_path / "evil.pkl"
    name = b"ctorch.nn.modules.container\nSequential\n"
    state = b"(N}Vparameters\nccollections\nOrderedDict\nst"  # (None, {"parameters": OrderedDict})
    storages = pickle.dumps([], 2)
    path.write_bytes(pickle.dumps(0) * 3 + b"\x80\x02" + name + state + b"b." + storages)
    with pytest.raises(ValueError, match="released layout"):  # read, and found to hold nothing
        load_openai(path, folder / "decoder.pkl")
    model = load_openai(folder / "encoder.pkl", folder / "decoder.pkl")
    assert {k: v.shape for k, v in model.encoder.named_parameters()} == {
        k: v.shape for k, v in encoder.named_parameters()
    }


def test_other_files_are_refused(release):
    folder, *_ = release
    with pytest.raises(ValueError, match="released layout"):
        load_openai(folder / "decoder.pkl", folder / "encoder.pkl")
    torch.save(torch.zeros(3), folder / "tensor.pkl")
    with pytest.raises(ValueError, match="not one of OpenAI's"):
        load_openai(folder / "tensor.pkl", folder / "decoder.pkl")
    (folder / "cut.pkl").write_bytes((folder / "encoder.pkl").read_bytes()[:5000])
    with pytest.raises(ValueError, match="not one of OpenAI's"):
        load_openai(folder / "cut.pkl", folder / "decoder.pkl")
    with pytest.raises(FileNotFoundError):
        load_openai(folder / "none.pkl", folder / "decoder.pkl")


def test_a_checkpoint_of_them(release, tmp_path):
    """It holds the released model, what later stages ask of a dvae.pt, and keeps an earlier run's;
    a file that is refused leaves all as it was."""
    folder, encoder, _ = release
    run_dir, decoder = tmp_path / "run", folder / "decoder.pkl"
    run("-m", "engine.openai", folder / "encoder.pkl", decoder, "--run-dir", run_dir,
        "--image-size", 64)  # fmt: skip
    model = load_model(run_dir / "dvae.pt", DVAE, DVAEConfig)
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value), name
    about = load(run_dir / "dvae.pt")
    assert about["image_size"] == 64 and {"preset", "data", "step"} < about.keys()
    (run_dir / "prior.pt").write_text("another dVAE's")
    target, first = tmp_path / "ran", (run_dir / "dvae.pt").read_bytes()
    torch.save({"a": Malicious(target)}, folder / "evil.pkl")
    torch.save(torch.zeros(3), folder / "tensor.pkl")
    for name, size, complaint in (
        ("evil.pkl", 64, "evil.pkl is not one of"),
        ("tensor.pkl", 64, "tensor.pkl is not one of"),
        ("decoder.pkl", 64, "released layout"),
        ("nowhere.pkl", 64, "nowhere.pkl"),
        ("encoder.pkl", 60, "not a multiple of 8"),
    ):
        args = [folder / name, decoder, "--run-dir", run_dir, "--image-size", size]
        code, _, said = call(openai, *args)
        assert code == 2 and complaint in said and said.count("\n") == 1
    assert not target.exists() and (run_dir / "dvae.pt").read_bytes() == first
    code, said, _ = call(openai, folder / "encoder.pkl", decoder, "--run-dir", run_dir)
    assert code == 0 and "dvae.pt.old, prior.pt.old" in said
    assert not (run_dir / "prior.pt").exists()
    assert load(run_dir / "dvae.pt")["image_size"] == 256
    assert (run_dir / "dvae.pt.old").read_bytes() == first


def test_the_prior_trains_on_it(release, tmp_path):
    folder, *_ = release
    files = folder / "encoder.pkl", folder / "decoder.pkl"
    call(openai, *files, "--run-dir", tmp_path, "--image-size", 32)
    options = ["--steps", 2, "--batch-size", 4, "--bpe-captions", 500]
    assert call(train_prior, "--tiny", "--run-dir", tmp_path, *options)[0] == 0
    picture = tmp_path / "picture.png"
    assert call(sample, "a red cube", "--run-dir", tmp_path, "-o", picture)[0] == 0
    assert picture.exists()


@pytest.mark.skipif("DALLE_ENCODER" not in os.environ, reason="the released files are not here")
def test_the_real_files():
    model = load_openai(os.environ["DALLE_ENCODER"], os.environ["DALLE_DECODER"])
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766
    images = torch.rand(1, 3, 256, 256)
    tokens = model.encode(images)
    assert tokens.shape == (1, 32, 32) and model.decode(tokens).shape == images.shape
