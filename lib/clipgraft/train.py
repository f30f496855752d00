"""The training loop shared by pretrain, finetune_expert and finetune_router.

A stage brings a model, the parameters to train and an objective; the loop brings data, optimizer, schedule,
data parallelism, logging and resume. Length is counted in samples seen, batch sizes are global, and all state is
saved as one step number plus tensors: data order, crops and captions are functions of (seed, step).
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipgraft import dist
from clipgraft.checkpoint import TrainingState, save_model
from clipgraft.config import ConfigError
from clipgraft.data.augment import augment, augments
from clipgraft.data.cached import ReferenceCache
from clipgraft.data.loader import Batch, Loader
from clipgraft.data.memory import SampleMemory
from clipgraft.data.sampler import (
    HomogeneousBatches,
    RoundRobinBatches,
    UniformBatches,
    Visits,
)
from clipgraft.data.shards import Shards
from clipgraft.data.tokens import Tokens
from clipgraft.gradcache import backward_in_parts
from clipgraft.job import REQUEUE
from clipgraft.loss_settings import LossSettings
from clipgraft.meter import Meter
from clipgraft.models.build import normalize, trimmed
from clipgraft.models.patches import PartialVisionTransformer, num_patches
from clipgraft.objectives import Features, Loss, Objective, Reference, ReferenceFeatures, encode
from clipgraft.optim import TEMPERATURE, build_optimizer, tau_lr
from clipgraft.recipes import TrainSettings
from clipgraft.schedule import cosine_lr, num_steps, num_warmup_steps, peak_lr

log = logging.getLogger(__name__)

PROJECTIONS = "projections"  # what their names in the saved state begin with
SAVE_SECONDS = float(os.environ.get("CLIPGRAFT_SAVE_SECONDS", "60"))

Sampler = UniformBatches | HomogeneousBatches | RoundRobinBatches


class ExtraLoss(Protocol):
    """What is added to the loss: it looks at what the model did with a batch, not at the features."""

    def read(self, model: nn.Module) -> Tensor:
        """Sums over what went through the model last, with gradient; those of parts of a batch are added."""

    def loss(self, sums: Tensor) -> Loss:
        """The loss of the sums of this process's batch, and numbers worth logging."""

    def watch(self, row: Mapping[str, Any]) -> None:
        """Look at a new row of the metrics, and warn."""


class Watcher(Protocol):
    """What looks at the model every so often, and changes nothing (`evaluation.watch`)."""

    rows: list[dict[str, Any]]
    best: dict[str, Any] | None

    def is_due(self, step: int) -> bool:
        """Whether to look after so many steps."""

    def look(self, model: nn.Module, step: int, seconds: float) -> None:
        """Measure the model; by all processes together."""

    def state(self) -> dict[str, Any]:
        """What a resume needs."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""


@dataclass(frozen=True)
class Data:
    """Images and tokens of the training set, row for row."""

    shards: Shards
    tokens: Tokens
    index: Path

    @classmethod
    def open(cls, index: Path, shard: Path) -> Data:
        """Open both and check that they are of the same samples.

        Raises:
            ConfigError: if they are not.
        """
        data = cls(Shards.open(shard), Tokens.open(index), index)
        if data.shards.samples_id != data.tokens.samples_id:
            raise ConfigError(
                f"{shard} holds samples {data.shards.samples_id}, {index} holds {data.tokens.samples_id}: they are not "
                "of one data set. Hint: give the shards that were made from this index"
            )
        return data

    def visits(self, settings: TrainSettings, seed: int) -> Visits:
        """What an epoch shows, after the weights of the sources."""
        return Visits.of_index(self.index, len(self.shards), settings.source_weights, seed)


def ordinary_batches(data: Data, settings: TrainSettings, seed: int) -> UniformBatches:
    """Batches of the whole data set, in the order that the settings ask for."""
    return UniformBatches(
        len(data.shards),
        settings.batch_size,
        seed,
        visits=data.visits(settings, seed),
        shuffle_block=settings.shuffle_block,
    )


@dataclass
class Fit:
    """One training: its fixed parts, and how far it is.

    Attributes:
        model: with the right parameters frozen.
        objective: the loss of the features of a batch.
        settings: length, batch size, optimizer.
        data: the training set.
        sampler: which rows are in which batch.
        image_size: side of the crops in pixels.
        text_length: tokens per caption, at most: texts are trimmed to the longest of a part where that is exact.
        preprocess: `mean` and `std` of the model.
        seed: of crops and caption choice.
        world: this process.
        threads: for decoding.
        state: where training state is saved, or None.
        loss: settings of the temperature.
        memory: what the objective remembers, saved with the state.
        extra_loss: what is added to the objective.
        lr_of: peak learning rates of parameters that have one of their own.
        references: whose features of each batch the objective is given, too.
        caches: stored embeddings that these need.
        projections: of the objective; trained, and saved with the state, but no part of the model.
        short_captions: kind of a second caption (as of the loader); texts are then in turn a sample's drawn caption and
            its short one.
        watch: looks at the model now and then.
    """

    model: nn.Module
    objective: Objective
    settings: TrainSettings
    data: Data
    sampler: Sampler
    image_size: int
    text_length: int
    preprocess: Mapping[str, Any]
    seed: int
    world: dist.World
    threads: int = 1
    state: TrainingState | None = None
    loss: LossSettings = field(default_factory=LossSettings)
    memory: SampleMemory | None = None
    extra_loss: ExtraLoss | None = None
    lr_of: Mapping[str, float] = field(default_factory=dict)
    references: Sequence[Reference] = ()
    caches: Sequence[ReferenceCache] = ()
    projections: nn.ModuleList = field(default_factory=nn.ModuleList)
    short_captions: str | None = None
    watch: Watcher | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        return num_steps(self.settings)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What autocast computes in."""
        return precision(self.world.device)

    def run(self, out: Path) -> dict[str, Any]:
        """Train, write `metrics.jsonl`, and return facts for the manifest.

        Raises:
            ConfigError: if the loss is not finite (names the steps), or the batch does not divide.
            SystemExit: with `REQUEUE`, after saving, when told to stop.
        """
        num_parts = self.world.size * self.settings.accumulate
        if self.settings.batch_size % num_parts:
            raise ConfigError(
                f"batch_size = {self.settings.batch_size} does not divide by {self.world.size} processes"
                f"{f' x accumulate = {num_parts // self.world.size}' if num_parts > self.world.size else ''}. "
                f"Hint: {self.settings.batch_size // num_parts * num_parts}"
            )
        self.model.to(self.world.device)
        self.projections.to(self.world.device)
        trained = self._trained()
        optimizer = build_optimizer(
            trained,
            self.settings.optim,
            peak_lr(self.settings),
            temperature_apart=self.loss.lr_tau is not None,
            lr_of=self.lr_of,
        )
        with (
            _stop_requests() as stop
        ):  # from here on: one that comes early is heard after the first step
            first_step = self._resume(optimizer)
            self._announce(trained, first_step)
            if first_step < self.num_steps:
                self._loop(optimizer, list(trained.values()), first_step, stop)
        if self.world.is_first:
            looks = self.watch.rows if self.watch is not None else []
            rows = sorted([*self.rows, *looks], key=lambda row: row["step"])
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (out / "metrics.jsonl").write_text(lines)
        seen = self.num_steps * self.settings.batch_size
        final = self.rows[-1]["loss"] if self.rows else None
        return {
            "samples_seen": seen,
            "num_steps": self.num_steps,
            "image_tokens": 1 + num_patches(self.model)[0],
            "text_tokens": self.text_length,
            "train_seconds": self.rows[-1]["seconds"] if self.rows else 0.0,
            "precision": str(self.dtype).removeprefix("torch."),
            "num_processes": self.world.size,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_parameters": sum(p.numel() for p in trained.values()),
            "metrics": {"loss": final},
            "best": _about(self.watch.best) if self.watch is not None else None,
        }

    def save(
        self,
        out: Path,
        spec: dict[str, Any],
        tokenizer: Path,
        only: Collection[str] | None = None,
        base: Path | None = None,
    ) -> None:
        """Write the trained model, and beside it in `best/` the one that did best, if that is kept.

        The model has the weights that were written last.

        Args:
            out: folder to write.
            spec: of the model before; the samples seen are added.
            tokenizer: its file.
            only: as for `save_model`.
            base: likewise.
        """
        if not self.world.is_first:
            return
        seen = spec["samples_seen"]
        last = spec | {"samples_seen": seen + self.num_steps * self.settings.batch_size}
        save_model(out, self.model, last, tokenizer, only, base)
        best = self.watch.best if self.watch is not None else None
        if best is not None:
            self.model.load_state_dict(best["weights"], strict=False)
            (out / "best").mkdir()
            then = spec | {"samples_seen": seen + best["samples_seen"]}
            save_model(out / "best", self.model, then, tokenizer, only, base)

    def _trained(self) -> dict[str, nn.Parameter]:
        projections = self.projections.named_parameters(prefix=PROJECTIONS)
        return {
            name: p for name, p in (*self.model.named_parameters(), *projections) if p.requires_grad
        }

    def _loop(
        self,
        optimizer: torch.optim.Optimizer,
        trained: list[nn.Parameter],
        first_step: int,
        stop: _Stop,
    ) -> None:
        model = self._parallel()
        loader = Loader(
            self.data.shards,
            self.data.tokens,
            self.sampler,
            image_size=self.image_size,
            text_length=self.text_length,
            crop_scale=self.settings.crop_scale,
            seed=self.seed,
            rank=self.world.rank,
            world=self.world.size,
            num_threads=self.threads,
            start_step=first_step,
            num_steps=self.num_steps,
            captions=self.settings.captions,
            text_reduction=self.settings.text_reduction,
            augment=augments(self.settings),
            drops_patches=isinstance(self.model.visual, PartialVisionTransformer),
            pin_memory=self.world.device.type == "cuda",
            caches=self.caches,
            short_captions=self.short_captions,
        )
        logit_scale = self.model.logit_scale
        watch = self.extra_loss.watch if self.extra_loss is not None else None
        meter = Meter(self.num_steps, self.settings.batch_size, logit_scale, self.rows, watch)
        model.train()
        saved = time.monotonic()
        with attention(self.world.device):
            if first_step == 0:
                self._look(meter, 0)
            for step, batch in enumerate(loader, start=first_step):
                loss, lr, extras = self._step(model, optimizer, trained, batch, step)
                meter.add(step + 1, loss, lr, loader.wait_seconds, extras)
                done = step + 1
                self._look(meter, done)
                if done == self.num_steps:
                    break
                must_stop = dist.any_true(stop.requested, self.world.device)
                if must_stop or dist.any_true(
                    time.monotonic() - saved > SAVE_SECONDS, self.world.device
                ):
                    meter.flush(done)
                    self._save(optimizer, done)
                    saved = time.monotonic()
                if must_stop:
                    dist.barrier()  # torchrun ends the others when one leaves
                    log.info("told to stop: saved at step %d/%d, leaving", done, self.num_steps)
                    sys.exit(REQUEUE)
        meter.flush(self.num_steps)

    def _look(self, meter: Meter, step: int) -> None:
        if self.watch is None or not self.watch.is_due(step):
            return
        self.model.logit_scale.item()  # type: ignore[operator,union-attr]  # the step ends before the clock stops
        start = time.monotonic()
        self.watch.look(self.model, step, meter.seconds)
        meter.pause(time.monotonic() - start)

    def _step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        trained: list[nn.Parameter],
        batch: Batch,
        step: int,
    ) -> tuple[Tensor, float, dict[str, Tensor]]:
        optim = self.settings.optim
        warmup_steps, peak = num_warmup_steps(self.settings), peak_lr(self.settings)
        lr = cosine_lr(step, self.num_steps, warmup_steps, peak, optim.lr_min)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
            if group.get("name") == TEMPERATURE:
                tau = math.exp(-self.model.logit_scale.item())  # type: ignore[operator,union-attr]
                group["lr"] = tau_lr(self.loss, lr / peak, tau)
        optimizer.zero_grad(set_to_none=True)
        loss, extras = self._backward(model, batch, step / self.sampler.num_batches)
        for parameter in self.projections.parameters():  # of no DDP
            assert parameter.grad is not None
            parameter.grad = dist.mean(parameter.grad)
        if optim.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
        optimizer.step()
        if self.model.logit_scale.requires_grad:
            low, high = self.loss.tau_bounds
            self.model.logit_scale.data.clamp_(-math.log(high), -math.log(low))  # type: ignore[operator,union-attr]
        return loss, lr, extras

    def _backward(
        self, model: nn.Module, batch: Batch, epoch: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        num_parts = self.settings.accumulate
        parts = split(batch, num_parts)
        references = self._features_of_references(parts)
        read = self.extra_loss.read if self.extra_loss is not None else None

        def loss_of(*features: Tensor) -> Loss:
            num = len(Features._fields)
            loss, extras = self.objective(Features(*features[:num]), references, batch, epoch)
            if self.extra_loss is None:
                return loss, extras
            extra, more = self.extra_loss.loss(features[num])
            return loss + extra, extras | more

        if num_parts == 1:
            features = self._encode(model, batch)
            loss, extras = loss_of(*features, *([] if read is None else [read(self.model)]))
            loss.backward()
            return loss.detach(), extras
        return backward_in_parts(
            model, num_parts, lambda model, part: self._encode(model, parts[part]), loss_of, read
        )

    def _features_of_references(self, parts: Sequence[Batch]) -> list[ReferenceFeatures]:
        """Of the whole local batch, encoded in the parts that the model takes it in."""
        if not self.references:
            return []
        encoded, are_seen = [], any(each.sees_images for each in self.references)
        with torch.no_grad(), self._autocast():
            for part in parts:
                pixels = self._pixels(part) if are_seen else None
                encoded.append([each.features(pixels, part) for each in self.references])
        return [ReferenceFeatures.of_parts(each) for each in zip(*encoded, strict=True)]

    def _encode(self, model: nn.Module, batch: Batch) -> Features:
        device = self.world.device
        pixels = self._pixels(batch)
        if batch.image_bits_B is not None:
            self.model.visual.image_bits_B = batch.image_bits_B.to(device, non_blocking=True)
        images = normalize(pixels, self.preprocess["mean"], self.preprocess["std"])
        text_BL = batch.text_BL
        if batch.short_BL is not None:
            text_BL = torch.stack([text_BL, batch.short_BL], 1).flatten(0, 1)
        text_BL = trimmed(self.model, text_BL).contiguous()
        with self._autocast():
            return encode(model, images, text_BL.to(device, non_blocking=True))

    def _pixels(self, batch: Batch) -> Tensor:
        device = self.world.device
        pixels = batch.images_BCHW.to(device, non_blocking=True)
        uniform_BK = batch.uniform_BK
        if uniform_BK is not None:
            uniform_BK = uniform_BK.to(device, non_blocking=True)
        return augment(pixels, uniform_BK, self.settings)

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.world.device.type, dtype=self.dtype, enabled=enabled)

    def _parallel(self) -> nn.Module:
        if self.world.size == 1:
            return self.model
        return nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def _save(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if self.state is not None and self.world.is_first:
            trained = {name: p.detach() for name, p in self._trained().items()}
            saved = {"trained": trained, "optimizer": optimizer.state_dict()}
            if self.memory is not None:
                saved["memory"] = self.memory.state()
            if self.watch is not None:
                saved["watch"] = self.watch.state()
            self.state.save({"step": step, **saved, "rows": json.dumps(self.rows)})

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        saved = self.state.load() if self.state is not None else None
        if saved is None:
            return 0
        parameters = self._trained()
        with torch.no_grad():
            for name, value in saved["trained"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        if self.memory is not None:
            self.memory.restore(saved["memory"])
        if self.watch is not None and "watch" in saved:
            self.watch.restore(saved["watch"])
        self.rows = json.loads(saved["rows"])
        log.info("resumed at step %d/%d", saved["step"], self.num_steps)
        return int(saved["step"])

    def _announce(self, trained: Mapping[str, nn.Parameter], first_step: int) -> None:
        total = sum(p.numel() for p in self.model.parameters())
        count = sum(p.numel() for p in trained.values())
        size, num = self.settings.batch_size, len(self.data.shards)
        log.info("%s params, %s trained   %s samples", _human(total), _human(count), f"{num:,}")
        kept, patches = num_patches(self.model)
        share = f"{kept} of {patches}" if kept < patches else f"{patches}"
        log.info(
            "image %d px = %s patches, text %d tokens", self.image_size, share, self.text_length
        )
        passes = self.num_steps * size / num
        log.info(
            "batch %s = %d %s x %d%s   %s steps = %.1f passes   %s on %s",
            f"{size:,}",
            self.world.size,
            "process" if self.world.size == 1 else "processes",
            size // self.world.size // self.settings.accumulate,
            f" x {self.settings.accumulate} parts" if self.settings.accumulate > 1 else "",
            f"{self.num_steps:,}",
            passes,
            str(self.dtype).removeprefix("torch."),
            device_name(self.world.device),
        )


def _about(best: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of the model that did best, for the manifest."""
    return best and {key: best[key] for key in ("step", "samples_seen", "score")}


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """Parts of a batch, each of as many rows."""
    size = len(batch.rows_B) // num_parts
    parts = []
    for first in range(0, size * num_parts, size):
        rows = {
            field.name: value[first : first + size]
            for field in fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor)
        }
        parts.append(replace(batch, **rows))
    return parts


@dataclass
class _Stop:
    requested: bool = False


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """While training, SIGTERM and SIGUSR1 mean: save and leave."""
    stop = _Stop()

    def request(*_: object) -> None:
        stop.requested = True

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def attention(device: torch.device) -> AbstractContextManager[None]:
    """Plain attention on CPUs, torch's choice elsewhere.

    torch's fused CPU kernel is made for long sequences: at the 16 to 64 tokens of short training its backward takes
    half of the step (in bf16; the plain one makes the step twice as fast).
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def precision(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it, else float32; CLIPGRAFT_PRECISION=fp32 forces the latter."""
    if os.environ.get("CLIPGRAFT_PRECISION") == "fp32":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def device_name(device: torch.device) -> str:
    """What to call the device in a log line."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )


def _human(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"
