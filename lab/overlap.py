"""
Near-duplicates between training and validation pictures (3.2).

For each validation picture the nearest training picture is found by the features of a contrastive
model, here the reranker of a run; a threshold is set by eye, and what is nearer is left out. In the
paper that was about 21% of MS-COCO's validation pictures, and changed FID little.

    python -m lab.overlap DATA VAL                    # a sheet of pairs, the nearest first
    python -m lab.overlap DATA VAL --threshold 0.98   # the pairs next to it, and a table for --data
    python -m lab.overlap VAL DATA --threshold 0.98   # a table for --val, as the paper did it
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clip import CLIP, CLIPConfig
from data.files import Pictures, Tars, middle_square, open_dataset
from data.loader import images_to
from data.sheets import sheet
from engine.checkpoint import load_model, write, write_picture
from engine.cli import Parser, check_output, newest_run, pick_device, start
from sample import SHIPPED

BATCH = 256
SHOWN = 32  # pairs


@torch.inference_mode()
def features(clip: CLIP, pictures: Pictures) -> tuple[Tensor, list[int]]:
    """Of the pictures that can be read: features [n, E] of length 1, on the CPU, and their items.
    ValueError where there is none."""
    device, size = next(clip.parameters()).device, clip.config.image_size
    found, items, pixels = [], [], []
    for i in tqdm(range(len(pictures)), desc=pictures.name):
        try:
            pixels.append(np.array(middle_square(pictures[i][0], size, 1)))
            items.append(i)
        except ValueError:
            pass
        if len(pixels) == BATCH or (pixels and i == len(pictures) - 1):
            images = images_to(device, torch.from_numpy(np.stack(pixels)))
            found.append(clip.encode_image(images).cpu())
            pixels = []
    if not found:
        raise ValueError(f"{pictures.name}: none of {len(pictures)} pictures can be read")
    return torch.cat(found), items


def nearest(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of features [n, E] and [m, E], all of length 1: the largest cosine of each validation picture
    and the training picture it is with, both [m], and the largest of each training picture [n]."""
    best, which = torch.full((len(val),), -2.0), torch.zeros(len(val), dtype=torch.long)
    of_train = []
    for first, part in zip(range(0, len(train), BATCH), train.split(BATCH)):
        cosines = part @ val.T
        of_train.append(cosines.amax(1))
        highest, row = cosines.max(0)
        which = torch.where(highest > best, first + row, which)
        best = torch.maximum(best, highest)
    return best, which, torch.cat(of_train)


def write_table(path: Path, pictures: Pictures, items: list[int]) -> None:
    """The paths, relative to the table's folder, and captions of some items, for `--data`."""
    rows = ["path\tcaption"]
    for i in items:
        file = os.path.relpath(pictures.path(int(pictures.index[i])), path.parent)
        rows += [f"{file}\t{caption}" for caption in pictures.captions_of(i) or [""]]
    text = "\n".join([*rows, ""]).encode("utf-8", "surrogateescape")
    write(path, lambda file: file.write(text))


def to_show(best: Tensor, threshold: float | None) -> list[int]:
    """Which pairs to look at, the nearest first: spread over all of them, or next to a threshold,
    half of them above it."""
    order = best.argsort(descending=True)
    if threshold is None:
        return order[torch.linspace(0, len(order) - 1, SHOWN).round().long().unique()].tolist()
    above = int((best >= threshold).sum())
    return order[max(0, above - SHOWN // 2) : above + SHOWN // 2].tolist()


def main() -> None:
    parser = Parser(description="Near-duplicates between training and validation pictures (3.2).")
    parser.add_argument("data", metavar="DATA", help="training pictures, as --data names them")
    parser.add_argument("val", metavar="VAL", help="validation pictures, likewise")
    parser.add_argument("--threshold", type=float, metavar="S", help="a cosine; write the table")
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="default: the newest run's clip"
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("overlap.png"), metavar="FILE",
        help="the sheet; the table has the same name, .tsv (default overlap.png)")  # fmt: skip
    args = parser.parse_args()
    check_output(args.out)
    run_dir = args.run_dir or newest_run("clip.pt") or SHIPPED
    clip = load_model(run_dir / "clip.pt", CLIP, CLIPConfig).to(pick_device(None))
    if "toy" in (args.data, args.val):
        raise ValueError("the toy world has no end: expected a folder, a table or tars")
    pair = open_dataset(args.data, clip.config.image_size, args.val, captions=False)
    if args.threshold is not None and isinstance(pair[0], Tars):
        raise ValueError(f"{args.data}: a table names files, not members of tars: unpack them")
    (train, train_items), (val, val_items) = (features(clip, pictures) for pictures in pair)
    best, which, of_train = nearest(train, val)

    pictures, captions = [], []
    for j in to_show(best, args.threshold):
        for data, i in zip(pair, (train_items[which[j]], val_items[j])):
            pictures.append(middle_square(data[i][0], 128, 1))
            captions.append(f"{best[j]:.4f} {data.path(int(data.index[i])).name}")
    write_picture(args.out, sheet(pictures, captions))
    print(f"{args.out}: {len(pictures) // 2} of {len(best)} pairs, training picture on the left")
    if args.threshold is not None:
        near, kept = best >= args.threshold, (of_train < args.threshold).nonzero()[:, 0].tolist()
        table = args.out.with_suffix(".tsv")
        write_table(table, pair[0], [train_items[k] for k in kept])
        print(
            f"{near.float().mean():.1%} of the pictures of {args.val} have a near-duplicate\n"
            f"{table}: {len(kept)} of the {len(train)} pictures of {args.data}, without them"
        )


if __name__ == "__main__":
    start(main)
