"""Three components in an empty folder, and forty lines that train and draw."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

FORTY_LINES = '''
import torch
from bpe import BPE
from dvae import DVAE, DVAEConfig
from transformer import Transformer, TransformerConfig, pad_text

COLORS = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)}


def squares(n):
    """n noisy pictures of a square on white, [n, 3, 8, 8], and their captions."""
    images, names = torch.ones(n, 3, 8, 8), [list(COLORS)[k] for k in torch.randint(2, (n,))]
    for image, name, (y, x) in zip(images, names, 2 * torch.randint(2, (n, 2))):
        image[:, y : y + 6, x : x + 6] = torch.tensor(COLORS[name])[:, None, None]
    return 0.8 * images + 0.2 * torch.rand_like(images), [f"a {name} square" for name in names]


def train(model, steps, loss_of):
    adamw = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        loss, metrics = loss_of(step / steps, *squares(16))
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    print(metrics)


torch.manual_seed(0)
bpe = BPE.train([f"a {name} square" for name in COLORS] * 10, vocab_size=280)
dvae = DVAE(DVAEConfig(n_groups=2, blocks_per_group=1, n_hid=16, n_init=16, vocab_size=32))
train(dvae, 150, lambda t, images, _: dvae.loss(images, tau=16**-t, kl_weight=min(1.0, 3 * t)))


def text_of(captions):
    return torch.stack([pad_text(bpe.encode(c), 12, bpe.vocab_size) for c in captions])


prior = Transformer(TransformerConfig(2, 2, 16, 12, 4, bpe.vocab_size, 32, kernel=3))
tokens_of = lambda images: dvae.encode(images).flatten(1)
train(prior, 150, lambda _, images, captions: prior.loss(text_of(captions), tokens_of(images)))

asked = ["red", "blue"] * 8
tokens = prior.generate(text_of([f"a {name} square" for name in asked]))
torch.save((asked, dvae.decode(tokens.view(-1, 4, 4)).detach()), "drawn.pt")
'''


def test_three_files_train_and_draw(tmp_path):
    """Of the two colours, the one that the caption asks for is in the middle of the picture."""
    for name in ("bpe.py", "dvae.py", "transformer.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "forty_lines.py").write_text(FORTY_LINES, encoding="utf-8")
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "forty_lines.py"]
    subprocess.run(command, cwd=tmp_path, env=alone, check=True, timeout=300)
    asked, pictures = torch.load(tmp_path / "drawn.pt")
    red, _, blue = pictures[:, :, 2:6, 2:6].mean((2, 3)).T  # every square covers the middle
    right = sum((r > b) == (name == "red") for r, b, name in zip(red, blue, asked))
    assert right >= 15 and (red - blue).abs().mean() > 0.5, (red, blue)
