"""
What a run would cost, before it is started. It takes the options of the trainer.

    python -m lab.plan dvae --tiny
    python -m lab.plan prior --preset paper --gpus 1024 --shard 8 --checkpoint-activations \\
        --dtype bf16 --powersgd-rank 896

Nothing is guessed from a formula that could differ from the code: one micro-batch goes through the
model forward and backward on the `meta` device, where tensors have shapes and no memory, while
PyTorch counts the operations and what is kept for the backward pass.

What is not counted: the workspace of kernels and collectives, and memory lost to fragments. Leave
a tenth of a GPU for them.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train_dvae
import train_prior
from data.files import open_dataset
from dvae import DVAE, DVAEConfig
from engine.cli import Parser, check_batches, choose, start, trainer_parser
from scale.fast import upsample_late, use_blocks
from scale.formats import matrices
from scale.parallel import check_scale, checkpoint_activations
from scale.powersgd import shapes_of
from transformer import Transformer, TransformerConfig, mean_cross_entropy

GB = 2**30  # as in the memory of GPUs
STAGES = {
    "dvae": (train_dvae.PRESETS, DVAEConfig, train_dvae.DVAETraining),
    "prior": (train_prior.PRESETS, TransformerConfig, train_prior.PriorTraining),
}


def sizes_of(preset: str, args: argparse.Namespace) -> tuple[TransformerConfig, DVAEConfig, int]:
    """Of a preset, with options: the prior, the dVAE, and the size of its pictures."""
    of_dvae = train_dvae.PRESETS[preset]
    dvae = choose(DVAEConfig, of_dvae, args)
    size = choose(train_dvae.DVAETraining, of_dvae, args).image_size
    sizes = {"grid": size // dvae.factor, "image_vocab": dvae.vocab_size}
    return choose(TransformerConfig, train_prior.PRESETS[preset] | sizes, args), dvae, size


@dataclass
class Cost:
    """Of one micro-batch, forward and backward: operations, and bytes kept in 32 bits, of which
    autocast halves those that are `cast`."""

    flops: int
    kept: int
    cast: int


def measure(run: Callable[[], Tensor], model: nn.Module, parts: Iterable[nn.Module] = ()) -> Cost:
    """Count `run`, which makes a scalar on the meta device from a model that is there too.

    Of the model, `parts` compute in 16 bits under autocast. What they and their LayerNorms are
    given, the identity path, stays in 32 (2.4), and so does what is kept outside of them."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    in_32_bits: set[int] = set()
    hooks, inside = [], []  # inside holds something while a part computes

    def given(_, inputs: tuple[Tensor]) -> None:
        in_32_bits.add(inputs[0].untyped_storage()._cdata)

    for part in parts:
        norms = [m for m in part.modules() if isinstance(m, nn.LayerNorm)]
        hooks += [m.register_forward_pre_hook(given) for m in (part, *norms)]
        hooks.append(part.register_forward_pre_hook(lambda *_: inside.append(True)))
        hooks.append(part.register_forward_hook(lambda *_: inside.clear()))

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
            if not inside or tensor.dtype != torch.float32:
                in_32_bits.add(storage._cdata)
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = run()
        loss.backward()
    for hook in hooks:
        hook.remove()
    cast = sum(size for key, size in kept.items() if key not in in_32_bits)
    return Cost(counter.get_total_flops(), sum(kept.values()), cast)


def prior_cost(config: TransformerConfig, micro_batch: int, again: bool) -> tuple[nn.Module, Cost]:
    """Of the transformer; `again`: resblocks compute their activations again (2.4)."""
    with torch.device("meta"):
        model = Transformer(config)
        text = torch.zeros(micro_batch, config.text_len, dtype=torch.long)
        image = torch.zeros(micro_batch, config.grid**2, dtype=torch.long)

    use_blocks(model)

    def ends() -> Tensor:  # Transformer.loss, but for its resblocks, and autocast, which meta lacks
        x = model.embed(text, image)
        text_logits = model.text_head(model.norm(x[:, : config.text_len - 1]))
        image_logits = model.image_head(model.norm(x[:, config.text_len :]))
        return mean_cross_entropy(text_logits, text[:, 1:]) + mean_cross_entropy(
            image_logits, image
        )

    def resblocks() -> list[Cost]:  # each kind is measured once: all of a kind have the same shapes
        x = model.embed(text, image).detach().requires_grad_()
        kinds = [getattr(block, "kind", "mlp") for block in model.blocks]
        of_kind = {
            kind: measure(lambda block=block: block(x).sum(), block, [block])
            for kind, block in dict(zip(kinds, model.blocks)).items()
        }
        return [of_kind[kind] for kind in kinds]

    costs = [measure(ends, model), *resblocks()]
    if again:
        once = max(costs[1:], key=lambda c: c.kept)  # of one resblock, while it is computed again
        checkpoint_activations(model.blocks)
        costs = [costs[0], replace(once, flops=0), *resblocks()]
    return model, Cost(*(sum(column) for column in zip(*map(astuple, costs))))


def dvae_cost(config: DVAEConfig, image_size: int, micro_batch: int) -> tuple[nn.Module, Cost]:
    with torch.device("meta"):
        model = DVAE(config)
        images = torch.zeros(micro_batch, 3, image_size, image_size)
    upsample_late(model.decoder)

    parts = [model.encoder, model.decoder]
    return model, measure(lambda: model.loss(images, 1.0, 1.0)[0], model, parts)


def memory_of(
    model: nn.Module,
    cost: Cost,
    *,
    shards: int,
    bits: int,
    powersgd_rank: int | None = None,
    moments: int = 32,
    stored: int = 32,
    again: bool = False,
) -> dict[str, float]:
    """The bytes on each GPU, by what they hold. `shards` GPUs share the parameters (1: each holds
    all of them), `again`: activations are computed again. `moments`: the bits of Adam's moments and
    PowerSGD's buffers; `stored`: 16 as in the paper, which keeps the resblocks' matrices in 16 bits
    (D.2), their gradients in the error buffers (E.2) and the averaged parameters on the CPU
    (B.2)."""
    n = sum(p.numel() for p in model.parameters())
    blocks = getattr(model, "blocks", [model])
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    of_matrices = sum(p.numel() for _, p in matrices(model)) if hasattr(model, "blocks") else n
    others = n - of_matrices  # always in 32 bits
    root = n - sum(p.numel() for block in blocks for p in block.parameters())
    moments = min(moments, stored)
    memory = {"parameters": (stored / 8 * of_matrices + 4 * others) / shards}
    kept_as_errors = stored == 16 and powersgd_rank
    of_gradients = 0 if kept_as_errors else stored / 8 * of_matrices
    memory["gradients"] = (of_gradients + 4 * others) / shards
    memory["Adam's moments"] = 2 * (moments / 8 * of_matrices + 4 * others) / shards
    if stored == 32:
        memory["averaged parameters"] = 4 * n / shards
    memory["activations"] = cost.kept - cost.cast * (1 - bits / 32)
    if shards > 1:  # this resblock's and the next one's, and its gradients
        memory["gathered resblocks"] = 3 * stored / 8 * largest
        memory["gathered embeddings and heads"] = 8 * root  # and their gradients
    if bits == 16 and stored == 32 and not (again and shards > 1):
        memory["16-bit weights"] = 2 * of_matrices  # autocast's copies, until the backward pass
    if powersgd_rank:  # the fixed Q have the longer side of each matrix of a shard
        rows = sum(map(max, shapes_of(model.config.d_model, shards)))
        of_Q = powersgd_rank // shards * rows * model.config.n_layer
        memory["error buffers and Q"] = moments / 8 * (of_matrices / shards + of_Q)
    return memory


def main() -> None:
    parser = Parser(description="What a run would cost.")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="{dvae,prior}")
    for stage, (presets, *configs) in STAGES.items():
        trainer = trainer_parser(stage, presets, *configs, shards=stage == "prior")
        add = stages.add_parser(
            stage, parents=[trainer], conflict_handler="resolve", help=f"of train_{stage}.py"
        ).add_argument
        add("--gpus", type=int, default=1, metavar="N", help="of all machines; default 1")
        add("--gpu-memory", type=float, default=80, metavar="GB", help="of each; default 80")
        add("--bits-stored", type=int, choices=(32, 16), default=32,
            help="16: as the paper did; not built here")  # fmt: skip
    args = parser.parse_args()
    preset, (presets, _, training) = args.preset or "small", STAGES[args.stage]
    config, dvae, size = sizes_of(preset, args)
    hp = choose(training, presets[preset], args)
    micro_batch = check_batches(hp.batch_size, args.micro_batch, args.gpus)
    shards = 1 if args.shard is None else args.shard or min(8, args.gpus)
    if shards < 1 or args.gpus % shards or args.shard is not None and args.gpus == 1:
        raise ValueError(f"--shard {shards} does not divide --gpus {args.gpus}, or 1 GPU")
    check_scale(config.d_model, shards, args.gpus // shards, args.powersgd_rank)
    if not args.gpu_memory > 0:
        raise ValueError(f"--gpu-memory is {args.gpu_memory}; expected GB above 0")
    if args.stage == "dvae":
        model, cost = dvae_cost(dvae, size, micro_batch)
        tokens, moments = (size // dvae.factor) ** 2, 32
    else:
        model, cost = prior_cost(config, micro_batch, args.checkpoint_activations)
        tokens, moments = config.text_len + config.grid**2, args.moments or 32
    bits = 16 if args.dtype in ("bf16", "fp16") else 32
    memory = memory_of(
        model,
        cost,
        shards=shards,
        bits=bits,
        powersgd_rank=args.powersgd_rank,
        moments=moments,
        stored=args.bits_stored,
        again=args.checkpoint_activations,
    )
    n = sum(p.numel() for p in model.parameters())
    total = sum(memory.values()) / GB
    accumulate = hp.batch_size // (micro_batch * args.gpus)
    flops = cost.flops * accumulate * args.gpus
    images = len(open_dataset(args.data or "toy", size, args.val, args.stage == "prior")[0])
    print(
        f"{n:,} parameters on {args.gpus} GPU(s)"
        + (f", sharded among {shards}" if shards > 1 else ", a replica on each"),
        f"batch {hp.batch_size}: {accumulate} micro-batch(es) of {micro_batch} on each GPU; "
        f"{hp.batch_size * tokens:,} tokens a step",
        f"{hp.steps:,} steps: {hp.batch_size * tokens * hp.steps:.3g} tokens, "
        f"{flops * hp.steps:.3g} FLOPs; {flops:.3g} FLOPs a step",
        "an epoch: "
        + (f"{images:,} images, {images * tokens:,} tokens, {images / hp.batch_size:,.1f} steps"
           if images < 2**31 else "the data have no end"),
        "memory of each GPU, in GB:",
        *(f"{size / GB:>10.2f}  {name}" for name, size in memory.items()),
        f"{total:>10.2f}  in all, of {args.gpu_memory:g}",
        sep="\n",
    )  # fmt: skip
    if total > 0.9 * args.gpu_memory:
        untried = {"--dtype bf16": bits == 32}
        if args.stage == "prior":
            untried |= {"--checkpoint-activations": not args.checkpoint_activations}
            untried |= {"--shard": shards == 1}
        more = "".join(f"{option}, " for option, is_left in untried.items() if is_left)
        print(
            "this does not fit (a tenth is left to kernels and fragments): try a smaller "
            f"--micro-batch, {more}or more GPUs"
        )
    else:
        print("this fits")


if __name__ == "__main__":
    start(main)
