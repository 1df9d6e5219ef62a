"""
The codes that a dVAE in training uses: what its trainer looks at to keep them in use.
"""

import math

import torch
from torch import Tensor, nn

from scale.parallel import World


class CodesInUse:
    """How many codes are the argmax somewhere in the last 512 pictures of training or, where these
    hold fewer than 16 tokens for each code, in as many as do: `count`.

    Our own, not the paper's: β is four times as large while they are fewer than `min_usage` of all.
    Codes that go out of use in the first thousand updates seldom come back. A larger β keeps them
    (2.1), but costs detail where none is in danger, as in the toy world, which uses more than half
    of them by update 200. Before that `count` is that of all codes.
    """

    def __init__(self, encoder: nn.Module, vocab_size: int) -> None:
        self.last_used = [-math.inf] * vocab_size  # the update in which a code was last the argmax
        self.tokens: list[Tensor] = []  # of the update under way, by micro-batch
        self.count = vocab_size
        encoder.register_forward_hook(self.see)

    def see(self, encoder: nn.Module, x: tuple[Tensor], logits: Tensor) -> None:
        self.tokens.append(logits.argmax(1).flatten())

    def end_update(self, step: int, batch_size: int, world: World) -> None:
        """Count those of all processes. For all ranks to call."""
        tokens, self.tokens = torch.cat(self.tokens), []
        used = torch.zeros(len(self.last_used), device=tokens.device)
        used[tokens] = 1
        for code in world.mean(used).nonzero().flatten().tolist():
            self.last_used[code] = step
        if step + 1 >= 200:
            # small pictures: more of them, until they hold 16 tokens for each code
            enough = 16 * len(used) / (len(tokens) * world.size)
            first = step + 1 - math.ceil(max(512 / batch_size, enough))
            self.count = sum(last >= first for last in self.last_used)
