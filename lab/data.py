"""
A look at a data set before it is trained on: counts, what cannot be used and why, a sheet.

    python -m lab.data my_photos --filters
"""

import random
import time
from pathlib import Path

from data.files import open_pictures
from data.listings import preprocess_prior
from data.sheets import sheet
from data.toy import ToyWorld
from engine.checkpoint import write_picture
from engine.cli import Parser, check_output, start

LOOKED_AT = 400  # pictures
SHOWN = 40


def main() -> None:
    parser = Parser(description="Count a data set and draw a sheet of it.")
    parser.add_argument("spec", nargs="?", default="toy", help="toy (default), folder, table, tars")
    parser.add_argument("--filters", action="store_true", help="pass over what the paper drops (C)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (default 32)")
    parser.add_argument("-o", "--out", type=Path, default=Path("data.png"), help="default data.png")
    args = parser.parse_args()
    if args.image_size < 1:
        raise ValueError(f"--image-size {args.image_size}: expected at least 1")
    check_output(args.out)
    if args.spec == "toy":
        pictures = ToyWorld(args.image_size, "train")
    else:
        try:
            pictures = open_pictures(args.spec, captions=True, filters=args.filters)
        except ValueError as error:  # which says what is expected, unless stage one needs no more
            pictures = open_pictures(args.spec, captions=False, filters=args.filters)
            print(f"only stage one can use it: {error}")
    print(f"{pictures.name}: {pictures.counts()}")
    cells, faults, rng, began = [], [], random.Random(0), time.perf_counter()
    for i in range(min(LOOKED_AT, len(pictures))):
        try:
            img, captions = pictures[i]
        except ValueError as error:
            faults.append(str(error))
            continue
        pixels = preprocess_prior(img, args.image_size, rng)
        cells.append((pixels, captions[0] if captions else ""))
    rate = len(cells) / (time.perf_counter() - began)
    for fault in faults[:5]:
        print(fault)
    if not cells:
        raise ValueError(f"no usable picture among the first {len(faults)} of {args.spec}")
    print(f"{len(cells)} pictures read, {len(faults)} passed over, {rate:.0f} a second on one core")
    write_picture(args.out, sheet(*zip(*cells[:SHOWN])))
    print(f"{args.out}: the first {len(cells[:SHOWN])} of them")


if __name__ == "__main__":
    start(main)
