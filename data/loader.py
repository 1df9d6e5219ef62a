"""
The order of a run: which sample comes when, made how, and which of them are this process's.

Every random draw belongs to a sample. The order of the data, crops, flips and BPE dropout derive
from the seed and the sample's position in the run; so no generator's state is ever saved, a resumed
run repeats an uninterrupted one, and the data do not depend on the number of processes.
"""

import atexit
import multiprocessing
import random
import signal
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache

import regex
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


def derive(*key) -> int:
    """A seed of 63 bits out of numbers and words."""
    return random.Random(repr(key)).getrandbits(63)


@lru_cache(maxsize=3)  # the first epoch's, which says how long each is, this one's and the next
def epoch_order(dataset, seed: int, batch_size: int):
    """The items of a data set in the order of one epoch: its own, or a random permutation."""
    if hasattr(dataset, "order"):
        return dataset.order(seed, batch_size)
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))


class Samples(Dataset):
    """The run as one long row of samples: sample `position` is number position % batch size of
    step position // batch size, made of an item of the data set.

    prepare(img, captions, rng, notes) makes a list of tensors of equal shapes, and may add to
    `notes` what the trainer is to count. A finite data set is shuffled anew in every epoch. An item
    that cannot be used gives its place to another; why is added to the notes.
    """

    def __init__(self, dataset, prepare: Callable, seed: int):
        self.dataset, self.prepare, self.seed = dataset, prepare, seed

    def item(self, position: int, batch_size: int) -> int:
        """The item at a position of the run."""
        if not getattr(self.dataset, "shuffle", True):
            return position
        first = epoch_order(self.dataset, derive(self.seed, "epoch", 0), batch_size)
        epoch, k = divmod(position, len(first))
        return int(epoch_order(self.dataset, derive(self.seed, "epoch", epoch), batch_size)[k])

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], list[str]]:
        """The sample at (position, item), and its notes. ValueError where no item can be used."""
        (position, item), n, notes = key, len(self.dataset), []
        others = random.Random(derive(self.seed, "instead", position))
        while True:
            try:
                img, captions = self.dataset[item]
                break
            except ValueError as error:
                notes.append(str(error))
            if len(notes) >= min(n, 1000):
                raise ValueError(f"no usable sample in {self.dataset.name}: {notes[0]}")
            # in a large set not the next one: its neighbours may have the same fault
            item = (item + 1) % n if n <= 1000 else others.randrange(n)
        rng = random.Random(derive(self.seed, "sample", position))
        return self.prepare(img, captions, rng, notes), notes


def collate(items: list) -> tuple[list[Tensor], list[str]]:
    tensors = [torch.stack(column) for column in zip(*(item for item, _ in items))]
    return tensors, [note for _, notes in items for note in notes]


def micro_batches(
    samples: Samples,
    start: int,
    steps: int,
    batch_size: int,
    micro_batch: int,
    rank: int = 0,
    size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[tuple[list[Tensor], list[str]]]:
    """The micro-batches of process `rank` of `size`, of steps start .. steps - 1, in order: their
    tensors, and the notes of all their samples. batch_size is that of all processes together."""
    places = (
        range(step * batch_size + offset, step * batch_size + offset + micro_batch)
        for step in range(start, steps)
        for offset in range(rank * micro_batch, batch_size, size * micro_batch)
    )
    atexit.register(stop_loading)
    return iter(
        DataLoader(
            samples,
            batch_sampler=([(p, samples.item(p, batch_size)) for p in some] for some in places),
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=leave_signals,
            pin_memory=pin_memory,
        )
    )


def held_out(samples: Samples, count: int) -> tuple[list[Tensor], list[str]]:
    """`count` samples of a validation set, or all there are, always the same: tensors and notes.
    ValueError where there are none."""
    count = min(count, len(samples.dataset))
    return collate([samples[k, samples.item(k, count)] for k in range(count)])


def images_to(device: torch.device, pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [0, 1], channels last in memory."""
    return pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255


def words_of(text: str) -> list[str]:
    """The words of a caption: its longest runs of letters, in lower case."""
    return regex.findall(r"\p{L}[\p{L}\p{M}]*", text.lower())


# ---- the processes that load ---------------------------------------------------------------------


def leave_signals(_: int) -> None:
    """In a loading process: signals are for the trainer, which saves first. The thread that hands
    tensors over has nobody to complain to once the trainer is gone; what goes wrong with a sample
    travels to the trainer another way."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.excepthook = lambda *_: None


def stop_loading() -> None:
    """At exit, after an exception too: multiprocessing would send SIGTERM and wait for ever."""
    if hasattr(signal, "SIGCHLD"):  # not on Windows; torch would raise for each of them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()
