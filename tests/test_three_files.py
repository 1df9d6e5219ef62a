"""Three components in an empty folder and forty lines are enough to train and to draw."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FORTY_LINES = '''
import torch
from bpe import BPE
from dvae import DVAE, DVAEConfig
from transformer import Transformer, TransformerConfig, pad_text

COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}


def squares(n):
    """n pictures of 4 x 4 squares on grey, and the names of their colours."""
    names, images = list(COLORS), torch.full((n, 3, 8, 8), 0.5)
    picked = [names[k] for k in torch.randint(4, (n,))]
    for image, name, (y, x) in zip(images, picked, torch.randint(5, (n, 2)).tolist()):
        image[:, y : y + 4, x : x + 4] = torch.tensor(COLORS[name])[:, None, None]
    return images, picked


torch.manual_seed(0)
bpe = BPE.train([f"a {name} square" for name in COLORS for _ in range(9)], 280)
dvae = DVAE(DVAEConfig(n_groups=2, n_hid=16, n_init=16, blocks_per_group=1, vocab_size=32))
prior = Transformer(TransformerConfig(2, 2, 16, 10, 4, bpe.vocab_size, 32, kernel=3))


def text_of(names):
    return torch.stack([pad_text(bpe.encode(f"a {n} square"), 10, bpe.vocab_size) for n in names])


def train(model, loss_of, steps):
    adamw = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(steps):
        loss = loss_of(step, *squares(32))[0]
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    print(type(model).__name__, loss.item())


train(dvae, lambda k, images, _: dvae.loss(images, max(1 / 16, 1 - k / 300), 0.1), 400)
dvae.requires_grad_(False)
train(prior, lambda _, x, names: prior.loss(text_of(names), dvae.encode(x).flatten(1)), 300)

asked = [name for name in COLORS for _ in range(4)]
pictures = dvae.decode(prior.generate(text_of(asked)).view(-1, 4, 4))
torch.save({"asked": asked, "pictures": pictures, "colors": COLORS}, "drawn.pt")
'''


def test_three_files_train_and_draw(tmp_path):
    """The colour that stands out most from the grey is the one that the caption asked for."""
    import torch

    for name in ("bpe.py", "dvae.py", "transformer.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "forty_lines.py").write_text(FORTY_LINES, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "forty_lines.py"],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=200,
    )
    drawn = torch.load(tmp_path / "drawn.pt")
    names, colors = list(drawn["colors"]), torch.tensor(list(drawn["colors"].values())).float()
    pixels = drawn["pictures"].permute(0, 2, 3, 1)[:, :, :, None]  # [B, H, W, 1, 3]
    is_near = (pixels - colors).norm(dim=-1) < (pixels - 0.5).norm(dim=-1)  # than to the grey
    shares = is_near.float().mean((1, 2))  # [B, colours]
    found = [names[k] for k in shares.argmax(1)]
    right = sum(f == a for f, a in zip(found, drawn["asked"]))
    assert right >= 14 and shares.max(1).values.mean() > 0.1, list(zip(found, drawn["asked"]))
