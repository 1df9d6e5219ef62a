"""
What keeps a run alive around the loop that a trainer spells out: processes, signals, updates that
must be skipped, micro-batches, precision, saving, resuming, the log. It calls nothing back.

    with Run("prior", args) as run:
        batches = run.batches(train, prepare, hp.batch_size)
        model = run.begin(Transformer, config, hp)        # from here on files are written
        adamw, ema = ..., run.average(model, hp.ema)
        run.track(model, adamw, ema)                      # with --resume, restored
        for step in run.steps(hp.steps):
            for images, text in run.passes(batches):      # this process's micro-batches
                tokens = dvae.encode(images).flatten(1)
                run.backward(run.loss(model, text, tokens))
            run.update(adamw, lr, clip=hp.clip)
            if run.due():
                run.save()
                run.report(evaluate(...))

The relaxation's noise derives from the seed, the step, the rank and the micro-batch, all other
draws from the sample (data/loader.py): so a resumed run repeats an uninterrupted one.
"""

import argparse
import math
import os
import platform
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bpe import BPE
from data.loader import Samples, derive, held_out, images_to, micro_batches
from engine import checkpoint, state
from engine.cli import Stop, check_batches, is_out_of_memory, newest_run, pick_device
from engine.log import Bar, Log, beside_shipped, draw_curves, going_on
from scale.fast import use_convolutions
from scale.formats import matrices
from scale.gradient_scales import GradientScales, sum_bias_gradients_in_32_bits
from scale.parallel import (
    Loss,
    all_finite,
    average_in_backward,
    check_scale,
    checkpoint_activations,
    clip_gradients,
    fill,
    launch,
    machine_mesh,
    replicate,
    shard,
    shut_down,
)
from scale.powersgd import PowerSGD

# what a stage finds in its run directory
NEEDS = {"dvae": (), "prior": ("dvae.pt",), "clip": ("bpe.json", "dvae.pt")}
# whose preset and data a stage goes on with, the first that is there; with --resume its own
GOES_ON_FROM = {"dvae": [], "prior": ["dvae.pt"], "clip": ["prior.pt", "dvae.pt"]}
# of these a resumed run keeps its own, and the next stage the filters of the same data
DEFAULTS = {
    "seed": 0, "filters": False, "dtype": "fp32", "micro_batch": None, "tokens": "argmax",
    "moments": 32,
}  # fmt: skip
# what a new run of a stage replaces: keeping it would mix two runs
REPLACES = {
    "dvae": ("dvae.pt", "bpe.json", "prior.pt", "clip.pt", "log.jsonl"),
    "prior": ("prior.pt",),
    "clip": ("clip.pt",),
}


class Run:
    """A run of a stage, "dvae", "prior" or "clip", with the options of `engine.cli`.

    `dir` is its directory; `preset`, `data` and `val` are what the options say, or else those of
    the run so far, or else the defaults. `values` are those of the preset or, where a run is
    resumed without naming one, its own. ValueError where something that the stage needs is not
    there.
    """

    def __init__(self, stage: str, args: argparse.Namespace):
        self.stage, self.args = stage, args
        self.world = launch(pick_device(args.device), bool(args.device))
        self.device = self.world.device
        if not 0 <= args.workers <= 64:
            raise ValueError(f"--workers is {args.workers}; expected 0 to 64")
        for name in ("data", "val"):
            if getattr(args, name) == "":
                raise ValueError(f"--{name} is empty: expected toy, a folder, a table or tars")
        own = f"{stage}.pt"
        if stage == "dvae":
            preset = args.preset or ("small" if self.device.type == "cuda" else "tiny")
            goes_on = args.resume and not args.preset
            newest = self.world.share(lambda: newest_run(own)) if goes_on else None
            self.dir = args.run_dir or newest or Path("runs") / preset
        else:
            needs = [own] * args.resume + [*NEEDS[stage]]
            self.dir = args.run_dir or self.world.share(
                lambda: newest_run(*needs) or newest_run("dvae.pt")
            )
            if self.dir is None:
                raise ValueError("no run holds a dvae.pt yet; train it with: python train_dvae.py")
            checkpoint.check_holds(self.dir, *NEEDS[stage])
            self.dvae = checkpoint.load(self.dir / "dvae.pt")
            self.image_size = self.dvae.get("image_size")
        states = [self.dir / name for name in checkpoint.state_names(stage)]
        if args.resume and not self.world.share(lambda: any(path.exists() for path in states)):
            self.say(f"nothing to resume: {self.dir} holds no {stage}_state; starting afresh")
            args.resume = False
        sources = [self.dir / name for name in [own] * args.resume + GOES_ON_FROM[stage]]
        source = next((path for path in sources if path.is_file()), None)
        about = (
            checkpoint.load(source, weights=False) if source else dict(preset=preset, data="toy")
        )
        self.preset, self.data = args.preset or about.get("preset"), args.data or about.get("data")
        self.val = args.val if args.val or args.data else about.get("val")
        self.values, was = dict(args.presets.get(self.preset, {})), about.get("run", {})
        is_own = source == self.dir / own
        if is_own and not args.preset:
            self.values |= about.get("config", {}) | was
        for name, default in DEFAULTS.items():
            if getattr(args, name, default) is None:
                keeps = is_own or name == "filters" and not args.data
                setattr(args, name, was.get(name, default) if keeps else default)
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed is {args.seed}; expected 0 to 2^63 − 1")
        says_size = stage == "dvae" or self.image_size
        if self.preset not in args.presets or not self.data or not says_size:
            raise ValueError(f"{source} does not say how it was trained: make it again")
        self.start, self.step, self.begun, self.stopping = 0, 0, False, 0
        self.skipped = self.skipped_in_a_row = 0
        # in float16 a scale that is too large takes up to 125 updates for each division by √2 (D)
        self.most_in_a_row = 2000 if args.dtype == "fp16" else 100
        self.bar: Bar | None = None

    def say(self, message: str) -> None:
        """Print a line, once for all processes."""
        if self.world.is_main:
            print(message, flush=True)

    # ---- data

    def batches(self, dataset, prepare: Callable, batch_size: int) -> Iterator:
        """This process's micro-batches of the run; batch_size is that of all processes together."""
        self.batch_size = batch_size
        self.micro_batch = check_batches(batch_size, self.args.micro_batch, self.world.size)
        self.accumulate = batch_size // (self.micro_batch * self.world.size)
        if len(dataset) < batch_size:
            self.say(
                f"warning: {len(dataset)} samples are fewer than a batch of {batch_size}: "
                "each batch holds some of them more than once"
            )
        self.counts = f"{dataset.name} ({dataset.counts()})"
        samples = Samples(dataset, prepare, self.args.seed)

        def stream() -> Iterator:
            yield from micro_batches(
                samples, self.start, self.n_steps, batch_size, self.micro_batch,
                self.world.rank, self.world.size, self.args.workers, self.device.type == "cuda",
            )  # fmt: skip

        return stream()

    def held_out(self, dataset, prepare: Callable, count: int) -> list[Tensor]:
        """`count` samples of a validation set, always the same, on this process's device."""
        tensors, notes = held_out(Samples(dataset, prepare, 0), count)
        notes = sorted(set(notes) - {"cut"})
        for note in notes[:5]:
            self.say(f"skipped for validation: {note}")
        if len(notes) > 5:
            self.say(f"skipped for validation: {len(notes) - 5} more")
        return [self.to_device(tensor) for tensor in tensors]

    def to_device(self, tensor: Tensor) -> Tensor:
        """uint8 pictures [B, H, W, 3] become images [B, 3, H, W] in [0, 1]."""
        if tensor.dtype == torch.uint8:
            return images_to(self.device, tensor)
        return tensor.to(self.device, non_blocking=True)

    # ---- the beginning

    def begin(self, Model: type, config, hp) -> nn.Module:
        """The model, new or of --init-from, where it is to be trained. From here on files are
        written, and an error is that of a failed run. ValueError before that: what --resume or
        --init-from names is not there, damaged, or of other sizes."""
        args, self.config, self.hp = self.args, config, hp
        self.path = self.dir / f"{self.stage}_state.pt"
        self.settings = asdict(hp) | {"data": self.data, "val": self.val}
        for name in DEFAULTS:
            if hasattr(args, name):  # the last two are the prior's alone
                self.settings[name] = getattr(args, name)
        self.mesh = machine_mesh(self.device, args.shard) if args.shard is not None else None
        gpus = self.mesh["gpu"].size() if self.mesh else 1
        if self.stage == "prior":
            check_scale(config.d_model, gpus, self.world.size // gpus, args.powersgd_rank)
        self.state = state.to_resume(self.path, self.settings, config, args.resume, self.world)
        start_from = None
        if args.init_from:
            start_from = checkpoint.load_model(args.init_from, Model, type(config))
            checkpoint.check_config(args.init_from, asdict(start_from.config), config)
        self.world.wait()  # until every rank has read what is now moved away
        if self.world.is_main:
            self.dir.mkdir(parents=True, exist_ok=True)
            if not os.access(self.dir, os.W_OK):
                raise ValueError(f"{self.dir} is write-protected: choose another --run-dir")
            replaced = REPLACES[self.stage]
            if self.state:  # it goes on; of a dVAE that does, the tokens change
                replaced = ("prior.pt",) if self.stage == "dvae" else ()
            checkpoint.set_aside(self.dir, *replaced)
        self.begun = True
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)
        hangup = getattr(signal, "SIGHUP", None)  # a terminal's end; Windows has none
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # as under nohup
            signal.signal(hangup, self.ask)

        self.Model, model = Model, start_from
        if model is None and (self.world.is_main or not self.mesh):
            torch.manual_seed(args.seed)
            model = Model(config)
        if self.mesh:  # rank 0's host alone holds the whole
            model = self.sharded(model.state_dict() if self.world.is_main else {})
        model = model.to(self.device).train()
        use_convolutions(model)
        self.start = self.state.about["step"] if self.state else 0
        settings = self.settings | asdict(config) | {"preset": self.preset}
        first = {"settings": settings, "versions": versions(), "commit": commit()}
        self.log = Log(self.dir, self.stage, self.start, self.world, first)
        n_params = sum(p.numel() for p in model.parameters())
        self.say(
            f"{self.stage} {self.preset}: {n_params:,} parameters; data {self.counts}; "
            f"steps {self.start} to {hp.steps} of {hp.batch_size} on {self.world.size} × "
            f"{self.device.type}, {args.dtype}; into {self.dir}"
        )
        return model

    def sharded(self, weights: dict[str, Tensor]) -> nn.Module:
        """The model with the weights that rank 0 holds, sharded among the GPUs (2.5)."""
        with torch.device("meta"):
            model = self.Model(self.config)
        # PowerSGD averages between machines itself
        shard(model, self.mesh["gpu"] if self.args.powersgd_rank else self.mesh, self.device)
        fill(model, weights)
        return model

    def average(self, model: nn.Module, decay: float) -> AveragedModel:
        """The exponential moving average of a model's parameters; its first update starts it."""
        ema = AveragedModel(
            nn.Identity() if self.mesh else model, multi_avg_fn=moving_average(decay)
        )
        if self.mesh:  # shards cannot be copied
            ema.module = self.sharded(state.whole(model))
        return ema

    def track(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: AveragedModel | None = None,
        about: dict | None = None,
        **parts,
    ) -> None:
        """What `save` saves and --resume restores, which happens here. `about` is plain data that
        joins the weights; parts are objects whose attributes are plain data."""
        args = self.args
        self.model, self.optimizer, self.ema, self.parts = model, optimizer, ema, parts
        self.about = {"config": asdict(self.config), "run": self.settings, "preset": self.preset}
        self.about |= {"data": self.data, "val": self.val} | (about or {})
        # one scale for the whole loss (A.2), or one for each resblock (2.4)
        has_blocks, is_fp16 = hasattr(model, "blocks"), args.dtype == "fp16"
        self.scales = GradientScales(model.blocks) if has_blocks and is_fp16 else None
        one_scale = is_fp16 and not has_blocks
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=one_scale)
        if args.checkpoint_activations:
            checkpoint_activations(model.blocks)
        if has_blocks and args.dtype == "bf16":
            sum_bias_gradients_in_32_bits(model.blocks)
        self.compressor = None
        if args.powersgd_rank:
            self.compressor = compress(model, args, self.mesh)
        if self.state:
            if missing := parts.keys() - self.state.about.keys():
                expected = ", ".join(missing)
                reason = f"expected its {expected}, which an earlier version does not save"
                raise Stop(f"{self.state.path} is not of such a run: {reason}", 2)
            about, own = self.state.about, [dict(group) for group in optimizer.param_groups]
            state.restore(self.state, model, ema, optimizer, self.compressor)
            for group, settings in zip(optimizer.param_groups, own):
                group.update({k: v for k, v in settings.items() if k != "params"})
            if about["scaler"]:
                self.scaler.load_state_dict(about["scaler"])
            if self.scales and about["scales"]:
                self.scales.load_state_dict(about["scales"])
            for name, part in parts.items():
                vars(part).update(about[name])
            self.state = None  # its tensors are as large as the run's
        alone = self.mesh or self.compressor  # FSDP2 or PowerSGD averages
        self.replicas = {model: Loss(model) if alone else replicate(model, self.device)}

    # ---- a step

    def steps(self, n: int) -> Iterator[int]:
        """The steps left to do. Ends early, with all saved, when a signal has asked for it."""
        self.n_steps = n
        self.bar = Bar(self.world, self.start, n, self.batch_size)
        for step in range(self.start, n):
            self.step = step
            yield step
            self.bar.resume()
            if self.stopping:
                if self.is_good():
                    self.save()
                self.bar.close()
                shut_down(self.world)
                raise Stop(
                    f"stopped after step {step + 1} of {n}; go on with --resume", self.stopping
                )
        self.bar.close()

    def passes(self, batches: Iterator) -> Iterator[list[Tensor]]:
        """This process's micro-batches of the step, on its device. The processes average their
        gradients in the backward pass of the last."""
        self.step_loss = torch.zeros((), device=self.device)
        for k in range(self.accumulate):
            tensors, notes = next(batches)
            self.bar.note(notes)
            torch.manual_seed(derive(self.args.seed, "noise", self.step, self.world.rank, k))
            is_last = k == self.accumulate - 1
            for replica in self.replicas.values():
                average_in_backward(replica, is_last and not self.compressor)
            yield [self.to_device(tensor) for tensor in tensors]

    def loss(self, model: nn.Module, *batch) -> Tensor:
        """model.loss(*batch) in the precision of --dtype. Its metrics are logged."""
        # Of a sharded model no 16-bit copies are kept for the next use of a weight: together they
        # would be the whole model.
        kind = checkpoint.DTYPES[self.args.dtype]
        with torch.autocast(self.device.type, kind, kind != torch.float32, not self.mesh):
            loss, metrics = self.replicas[model](*batch)
        self.bar.add(metrics)
        return loss

    def backward(self, loss: Tensor) -> None:
        self.step_loss += loss.detach() / self.accumulate
        self.scaler.scale(loss / self.accumulate).backward()

    def update(
        self, optimizer: torch.optim.Optimizer, lr: float, clip: float = math.inf, **schedules
    ) -> float:
        """One update with the step size `lr`, of the gradients clipped to a norm of `clip`; skipped
        where they are not finite on every process. The step's mean loss, NaN where skipped.

        `schedules` are logged with the rest. Stop after too many skipped updates in a row.
        """
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(optimizer)
        finite = self.scales is None or self.scales.finish(self.step)
        norm = self.compressor.average_gradients() if self.compressor else None
        norm = clip_gradients(self.model, clip, norm).item()
        made = finite and math.isfinite(norm)
        if made:
            self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        self.count(made)

        done = self.step + 1
        self.bar.step(done)
        self.stopping = self.world.max(self.asked) if done < self.n_steps else 0
        if done % self.hp.log_every == 0 or self.is_time() or self.stopping:
            values = self.bar.take() | {"lr": lr} | schedules
            if math.isfinite(norm):
                values["grad_norm"] = norm
            if self.skipped:
                values["skipped_updates"] = self.skipped
            if self.scales:
                values["log2_scales"] = self.scales.scales.log2().tolist()
            self.log.write(done, **values)
        return self.world.mean(self.step_loss).item() if made else math.nan

    def count(self, made: bool) -> None:
        """Stop after too many updates in a row that were skipped, on every rank alike."""
        self.skipped += not made
        self.skipped_in_a_row = 0 if made else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == self.most_in_a_row:
            raise Stop(
                "losses or gradients have not been finite since step "
                f"{self.step + 2 - self.most_in_a_row}, for {self.most_in_a_row} updates in a row; "
                "the last good checkpoint is kept. Try --resume with a smaller --lr"
            )

    # ---- looking and saving

    def keep_bpe(self, bpe: BPE) -> None:
        """The run's BPE. What belongs to another one, and its reranker, is set aside."""
        path = self.dir / "bpe.json"
        if self.world.is_main:
            if path.exists() and BPE.load(path).merges != bpe.merges:
                checkpoint.set_aside(self.dir, "clip.pt", "bpe.json")
            bpe.save(path)

    def is_time(self) -> bool:
        done = self.step + 1
        return done % self.hp.eval_every == 0 or done == self.n_steps

    def due(self) -> bool:
        """Whether to save and to look now: every `eval_every` updates and at the end, if the
        weights are good; bad ones must not replace good ones."""
        if not self.is_time() or self.stopping:
            return False
        good = self.is_good()
        if not good and self.step + 1 == self.n_steps:
            raise Stop(
                f"the weights or the last {self.skipped_in_a_row} losses are not finite; the last "
                "good checkpoint is kept. Try a smaller --lr"
            )
        return good

    def is_good(self) -> bool:
        return all_finite(self.model) and self.skipped_in_a_row <= self.most_in_a_row // 10

    def save(self) -> None:
        """The averaged weights into NAME.pt, and all that --resume needs into NAME_state."""
        shown = self.ema.module if self.ema else self.model
        weights = state.whole(shown) if self.mesh else shown.state_dict()
        step = {"step": self.step + 1}
        if self.world.is_main:
            checkpoint.save(self.dir / f"{self.stage}.pt", self.about | {"model": weights} | step)
        about = {
            "config": asdict(self.config),
            "run": self.settings,
            "n_averaged": int(self.ema.n_averaged) if self.ema else 0,
            "scaler": self.scaler.state_dict(),
            "scales": self.scales and self.scales.state_dict(),
            "errors": self.compressor is not None,
            **{name: vars(part) for name, part in self.parts.items()},
            **step,
        }
        tensors = state.tensors_of(self.model, self.ema, self.optimizer, self.compressor)
        state.save_state(self.path, about, tensors, sharded=self.mesh is not None)

    def report(self, scores: dict[str, float]) -> None:
        """Log and show what was measured, beside what the shipped run had, and draw the curves."""
        if self.mesh and self.ema:
            self.ema.module.reshard()  # the root stays gathered after a forward pass
        self.log.write(self.step + 1, **scores)
        self.bar.show(**scores)
        self.scores = scores
        if self.world.is_main:
            if line := beside_shipped(self.stage, self.step + 1, scores, self.log.shipped):
                self.bar.bar.write(line)
            with going_on(self.dir / "curves.png"):
                draw_curves([self.dir], self.dir / "curves.png")

    def picture(self, name: str, image: Image.Image) -> None:
        """Write a picture into the run's directory."""
        path = self.dir / name
        if self.world.is_main:
            with going_on(path):
                checkpoint.write_picture(path, image)

    # ---- the end

    def __enter__(self) -> "Run":
        self.asked = 0
        return self

    def ask(self, number: int, _) -> None:
        """A signal asks the loop to stop after its step; a second Ctrl-C is final."""
        self.asked = 128 + number
        # A scheduler sends SIGTERM to us and to torchrun, who passes it on: two of them are one.
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def __exit__(self, kind, error: BaseException | None, _) -> None:
        """Out of memory, a full disk, data without a readable sample or the loss of another rank
        end a run that has begun with one line and exit code 1; what was saved before stays."""
        if error is None:
            return shut_down(self.world)
        if not self.begun or isinstance(error, Stop):
            return None
        if is_out_of_memory(error):
            raise out_of_memory(error, self) from error
        if isinstance(error, dist.DistBackendError) or "gloo/" in str(error):
            reason = "another process of this run was lost; go on with --resume"
            raise Stop(f"{reason} ({str(error).splitlines()[0]})", alone=True) from error
        # what a DataLoader says of a process that was killed, as where /dev/shm is full
        if any(words in str(error) for words in ("killed by signal", "exited unexpectedly")):
            reason = f"a loading process was lost ({str(error).splitlines()[0]})"
            raise Stop(f"{reason}: try fewer --workers; go on with --resume", alone=True) from error
        if isinstance(error, (OSError, ValueError)):
            reason = str(error).strip().split("\n")[-1]  # of the traceback a loading process sends
            raise Stop(f"{reason}; what was saved before is kept", alone=True) from error


def moving_average(decay: float) -> Callable:
    """For AveragedModel: after n updates the decay is at most (1 + n) / (10 + n). Our reading, for
    the paper does not say how it starts; the rule is TensorFlow's, lest the average of a short
    run be mostly of weights that have learned nothing yet."""

    def update(averages: list[Tensor], parameters: list[Tensor], n: Tensor) -> None:
        count = n.item()
        warm = min(decay, (1 + count) / (10 + count))
        get_ema_multi_avg_fn(warm)(averages, parameters, n)

    return update


def out_of_memory(error: BaseException, run: Run) -> Stop:
    """What to say, and what to try instead."""
    micro_batch, remedy = run.micro_batch, "a smaller model"
    if micro_batch > 1:
        part = next(micro_batch // k for k in range(2, micro_batch + 1) if micro_batch % k == 0)
        remedy = f"--micro-batch {part}, the same batch in more passes"
        if run.stage == "clip":  # every pair of its batch meets every other in one pass
            remedy = f"--batch-size {part * run.world.size}"
    reason = str(error).splitlines()[:1] or ["no memory is left"]
    return Stop(
        f"out of memory on {run.device} with {micro_batch} samples at once: try {remedy}; what "
        f"was saved before is kept ({reason[0]})",
        alone=True,
    )


def compress(model: nn.Module, args: argparse.Namespace, mesh: DeviceMesh | None) -> PowerSGD:
    """Between the machines of a mesh, or between all processes: the matrices of the resblocks are
    compressed, all else is not (E)."""
    compressed, among = matrices(model), {}
    among_them = {p for _, p in compressed}
    others = [p for p in model.parameters() if p not in among_them]
    if mesh:
        gpu = mesh["gpu"]
        among = {"shards": gpu.size(), "shard": gpu.get_local_rank()}
        among["group"] = mesh["machine"].get_group()
    return PowerSGD(
        compressed, others, args.powersgd_rank, seed=args.seed, bits=args.moments, **among
    )


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def commit() -> str | None:
    """The commit of this code, with a + where it was changed since; None outside of git."""
    root = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        done = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
