"""
Ship a run: what others need of it to draw, and to lay their own runs beside it.

    python -m lab.ship runs/emoji pretrained/emoji

Copies dvae.pt, prior.pt and clip.pt, their weights rounded to 16 bits, bpe.json and log.jsonl. What
reads them makes 32 bits of them again.
"""

import shutil
from pathlib import Path

from engine import checkpoint
from engine.cli import Parser, start

WEIGHTS = ("dvae.pt", "prior.pt", "clip.pt")


def main() -> None:
    parser = Parser(description="Copy a run's weights, in 16 bits, its BPE and its log.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a finished run")
    parser.add_argument("out", type=Path, metavar="OUT", help="where to, such as pretrained/emoji")
    args = parser.parse_args()
    for name in (*WEIGHTS, "bpe.json", "log.jsonl"):
        if not (args.run / name).is_file():
            raise ValueError(f"{args.run} holds no {name}: expected a run of all three stages")
    if args.out.resolve() == args.run.resolve():
        raise ValueError(f"{args.out} is the run itself, which would be left in 16 bits")
    stages = [name.removesuffix(".pt") for name in WEIGHTS]
    if any((args.out / name).exists() for s in stages for name in checkpoint.state_names(s)):
        raise ValueError(f"{args.out} holds a run that can go on: choose another directory")
    checkpoint.load_run(args.run)  # or ValueError, where its files are not of one run
    states = {name: checkpoint.load(args.run / name) for name in WEIGHTS}
    for state in states.values():
        state["model"] = {name: w.half() for name, w in state["model"].items()}
        if not all(w.isfinite().all() for w in state["model"].values()):
            raise ValueError("weights above 65504 have no place in 16 bits")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        checkpoint.save(args.out / name, state)
    for name in ("bpe.json", "log.jsonl"):
        shutil.copy(args.run / name, args.out / name)
    size = sum((args.out / name).stat().st_size for name in WEIGHTS) / 1e6
    print(f"{args.out}: {size:.1f} MB of weights; say in {args.out}/README.md what they know")


if __name__ == "__main__":
    start(main)
