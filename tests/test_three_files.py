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
    return (images + 0.1 * torch.randn_like(images)).clamp(0, 1), picked


torch.manual_seed(0)
bpe = BPE.train([f"a {name} square" for name in COLORS for _ in range(9)], 280)
dvae = DVAE(DVAEConfig(n_groups=2, n_hid=16, n_init=16, blocks_per_group=1, vocab_size=32))
prior = Transformer(TransformerConfig(2, 2, 16, 10, 4, bpe.vocab_size, 32, kernel=3))


def text_of(names):
    return torch.stack([pad_text(bpe.encode(f"a {n} square"), 10, bpe.vocab_size) for n in names])


def train(model, loss_of, steps):
    adamw = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(steps):
        loss = loss_of(step, *squares(16))[0]
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    print(type(model).__name__, loss.item())


train(dvae, lambda k, images, _: dvae.loss(images, max(1 / 16, 1 - k / 150), 1.0), 200)
dvae.requires_grad_(False)
train(prior, lambda _, x, names: prior.loss(text_of(names), dvae.encode(x).flatten(1)), 300)

images, names = squares(256)
tokens, wrong = dvae.encode(images).flatten(1), [names[k - 1] for k in range(256)]
losses = [prior.loss(text_of(n), tokens)[1]["image_loss"].item() for n in (names, wrong)]
pictures = dvae.decode(prior.generate(text_of(list(COLORS))).view(-1, 4, 4))
torch.save({"losses": losses, "pictures": pictures}, "drawn.pt")
'''


def test_three_files_train_and_draw(tmp_path):
    """The prior has learned what captions mean: pictures are less likely under another's."""
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
    right, wrong = drawn["losses"]
    assert right < wrong - 0.05
    assert drawn["pictures"].shape == (4, 3, 8, 8) and drawn["pictures"].std() > 0.01
