"""The training loop of pretrain, finetune_expert and finetune_router.

A stage brings a model, the parameters to train and an objective; the loop brings data, optimizer, schedule,
data parallelism, logging and resume. Length is counted in samples seen, batch sizes are global, and all state is
saved as one step number plus tensors: data order, crops and captions are functions of (seed, step).
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clipgraft import devices, dist, parallel
from clipgraft.checkpoint import save_model
from clipgraft.compiled import begin_step, compile_blocks, uncompiled
from clipgraft.config import ConfigError
from clipgraft.data.augment import augments
from clipgraft.data.cached import ReferenceCache
from clipgraft.data.loader import Batch, Loader
from clipgraft.data.memory import SampleMemory
from clipgraft.data.sampler import HomogeneousBatches, RoundRobinBatches, UniformBatches
from clipgraft.encoding import Encoding
from clipgraft.gradcache import backward_in_parts
from clipgraft.job import REQUEUE
from clipgraft.loss_settings import LossSettings
from clipgraft.meter import Meter, announce
from clipgraft.models.patches import PartialVisionTransformer, num_patches
from clipgraft.models.training_blocks import speed_up
from clipgraft.objectives import ExtraLoss, Features, Loss, Objective, Reference
from clipgraft.optim import build_optimizer, set_rates
from clipgraft.recipes import TrainSettings
from clipgraft.schedule import num_steps, peak_lr
from clipgraft.training_data import Data, split
from clipgraft.training_state import (
    Pace,
    Parts,
    Stop,
    TrainingState,
    Watcher,
    check_alike,
    stop_requests,
)

log = logging.getLogger(__name__)

PROJECTIONS = "projections"  # what their names in the saved state begin with

# What a process wishes after a step; the most that one does is done.
GO_ON, SPEAK, SAVE, LEAVE = range(4)

Sampler = UniformBatches | HomogeneousBatches | RoundRobinBatches


@dataclass
class Fit:
    """One training: its fixed parts, and how far it is.

    Attributes:
        model: with the right parameters frozen.
        objective: the loss of the features of a batch.
        settings: length, batch size, optimizer.
        data: the training set.
        sampler: which rows are in which batch.
        spec: what `model.json` says of the model: its sizes, and how it wants images.
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
        short_captions: kind of a second caption (of the loader); texts are then a sample's drawn and short one in turn.
        watch: looks at the model now and then.
    """

    model: nn.Module
    objective: Objective
    settings: TrainSettings
    data: Data
    sampler: Sampler
    spec: Mapping[str, Any]
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
    _logit_scale: Callable[[], Tensor] | None = None  # as the step before left it, read late

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        return num_steps(self.settings)

    @property
    def _sizes(self) -> tuple[int, int]:
        """Side of the crops in pixels, and tokens per caption."""
        config = self.spec["config"]
        return config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]

    @cached_property
    def _encoding(self) -> Encoding:
        device, preprocess = self.world.device, self.spec["preprocess"]
        dtype = devices.precision(device, self.settings.precision)
        return Encoding(self.model, preprocess, self.references, self.settings, device, dtype)

    @property
    def _precision(self) -> str:
        return str(self._encoding.dtype).removeprefix("torch.")

    def run(self, out: Path) -> dict[str, Any]:
        """Train, write `metrics.jsonl`, and return facts for the manifest.

        Raises:
            ConfigError: if the loss is not finite (names the steps), or the batch does not divide.
            SystemExit: with `REQUEUE`, after saving, when told to stop.
        """
        num_parts = self.world.size * self.settings.accumulate
        if self.settings.batch_size % num_parts:
            fewer = self.settings.batch_size // num_parts * num_parts
            in_parts = f" x accumulate = {self.settings.accumulate}"
            raise ConfigError(
                f"batch_size = {self.settings.batch_size} does not divide by {self.world.size} processes"
                f"{in_parts if self.settings.accumulate > 1 else ''}. "
                f"Hint: {f'{fewer}, or fewer processes' if fewer else 'fewer processes, or a smaller accumulate'}"
            )
        devices.keep_freed_memory(self.world.device)
        for each in (self.model, self.projections):
            each.to(self.world.device)
        speed_up(self.model)
        compile_blocks(self.model, self.settings, self.world.device)
        parallel.fit_into_memory(self.model, self.settings, self.world)
        projected = self.projections.named_parameters(prefix=PROJECTIONS)
        every = (*self.model.named_parameters(), *projected)
        trained = {name: p for name, p in every if p.requires_grad}
        optimizer = build_optimizer(
            trained,
            self.settings.optim,
            peak_lr(self.settings),
            temperature_apart=self.loss.lr_tau is not None,
            lr_of=self.lr_of,
        )
        parts = Parts(trained, optimizer, self.memory, self.watch)
        with stop_requests() as stop:  # one that comes early is heard after the first step
            first_step = self._resume(parts)
            announce(
                self.settings,
                self.model,
                sum(p.numel() for p in trained.values()),
                len(self.data.shards),
                self._sizes,
                self.world,
                f"{self._precision} on {devices.device_name(self.world.device)}",
            )
            if first_step < self.num_steps:
                self._loop(parts, first_step, stop)
        parallel.make_whole(self.model, self.world.is_first)
        if self.world.is_first:
            looks = [] if self.watch is None else self.watch.rows
            rows = sorted([*self.rows, *looks], key=lambda row: row["step"])
            (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {
            "samples_seen": self.num_steps * self.settings.batch_size,
            "num_steps": self.num_steps,
            "image_tokens": 1 + num_patches(self.model)[0],
            "text_tokens": self._sizes[1],
            "train_seconds": self.rows[-1]["seconds"] if self.rows else 0.0,
            "precision": self._precision,
            "num_processes": self.world.size,
            **devices.device_memory(self.world.device),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_parameters": sum(p.numel() for p in trained.values()),
            "metrics": {"loss": self.rows[-1]["loss"] if self.rows else None},
            "best": _about(self.watch.best) if self.watch is not None else None,
        }

    def save(
        self,
        out: Path,
        tokenizer: Path,
        only: Collection[str] | None = None,
        base: Path | None = None,
    ) -> None:
        """Write the trained model, and beside it in `best/` the one that did best, if that is kept.

        The model has the weights that were written last.

        Args:
            out: folder to write.
            tokenizer: its file.
            only: as for `save_model`.
            base: likewise.
        """
        if not self.world.is_first:
            return
        spec, seen = dict(self.spec), self.spec["samples_seen"]
        last = spec | {"samples_seen": seen + self.num_steps * self.settings.batch_size}
        save_model(out, self.model, last, tokenizer, only, base)
        best = self.watch.best if self.watch is not None else None
        if best is not None:
            parallel.put_back(self.model, best["weights"])
            (out / "best").mkdir()
            then = spec | {"samples_seen": seen + best["samples_seen"]}
            save_model(out / "best", self.model, then, tokenizer, only, base)

    def _loop(self, parts: Parts, first_step: int, stop: Stop) -> None:
        model = parallel.in_all_processes(self.model, self.world)
        gradients = parallel.GradientMean(self.model, self.projections)
        image_size, text_length = self._sizes
        loader = Loader(
            self.data.shards,
            self.data.tokens,
            self.sampler,
            image_size=image_size,
            text_length=text_length,
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
        pace = Pace()
        with devices.attention(self.world.device):
            if first_step == 0:
                self._look(meter, 0)
            for step, batch in enumerate(loader, start=first_step):
                # Asked before the step and answered after it, so that nobody waits for the others.
                agreed = dist.ask_largest(lambda: self._wish(stop, pace, meter))
                loss, lr, extras = self._step(model, parts, gradients, batch, step)
                done = step + 1
                meter.add(done, loss, lr, loader.wait_seconds, extras)
                self._look(meter, done)
                wish = agreed()
                if done == self.num_steps:
                    break
                if wish == SPEAK:
                    meter.glance(done)
                if wish >= SAVE:
                    meter.flush(done)
                    with pace.saving():
                        self._save(parts, done)
                if wish == LEAVE:
                    dist.barrier()  # torchrun ends the others when one leaves
                    log.info("told to stop: saved at step %d/%d, leaving", done, self.num_steps)
                    sys.exit(REQUEUE)
        meter.flush(self.num_steps)
        parts.check_finite(self.num_steps, self.num_steps, self.world.device)

    def _wish(self, stop: Stop, pace: Pace, meter: Meter) -> int:
        """Anyone may be told to stop; clocks are the first process's, which alone writes and speaks."""
        if stop.requested:
            return LEAVE
        if not self.world.is_first:
            return GO_ON
        return SAVE if pace.is_due() else SPEAK if meter.is_due() else GO_ON

    def _look(self, meter: Meter, step: int) -> None:
        if self.watch is None or not self.watch.is_due(step):
            return
        self.model.logit_scale.item()  # the step ends before the clock stops
        start = time.monotonic()
        with uncompiled(self.settings):
            self.watch.look(self.model, step, meter.seconds)
        meter.pause(time.monotonic() - start)

    def _step(
        self,
        model: nn.Module,
        parts: Parts,
        gradients: parallel.GradientMean,
        batch: Batch,
        step: int,
    ) -> tuple[Tensor, float, dict[str, Tensor]]:
        begin_step(self.settings, self.world.device)
        parts.optimizer.zero_grad(set_to_none=True)
        loss, extras = self._backward(model, batch, step / self.sampler.num_batches)
        gradients.take()
        if self.settings.optim.max_grad_norm is not None:
            parallel.clip_gradients(parts.trained.values(), self.settings.optim.max_grad_norm)
        lr = set_rates(parts.optimizer, self.settings, self.loss, step, self._tau)
        parts.optimizer.step()
        if self.memory is not None:
            self.memory.settle()
        if self.model.logit_scale.requires_grad:
            low, high = (-math.log(tau) for tau in reversed(self.loss.tau_bounds))
            self.model.logit_scale.data.clamp_(low, high)
        if self.loss.lr_tau_schedule == "step_thresh":
            self._logit_scale = devices.fetch_later(self.model.logit_scale)
        return loss, lr, extras

    def _tau(self) -> float:
        if self._logit_scale is None:
            self._logit_scale = devices.fetch_later(self.model.logit_scale)
        return math.exp(-self._logit_scale().item())

    def _backward(
        self, model: nn.Module, batch: Batch, epoch: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        num_parts = self.settings.accumulate
        parts = split(batch, num_parts)
        references = self._encoding.of_references(parts)
        read = self.extra_loss.read if self.extra_loss is not None else None

        def loss_of(*features: Tensor) -> Loss:
            num = len(Features._fields)
            loss, extras = self.objective(Features(*features[:num]), references, batch, epoch)
            if self.extra_loss is None:
                return loss, extras
            extra, more = self.extra_loss.loss(features[num])
            return loss + extra, extras | more

        if num_parts == 1:
            features = self._encoding.features(model, batch)
            loss, extras = loss_of(*features, *([] if read is None else [read(self.model)]))
            loss.backward()
            return loss.detach(), extras
        return backward_in_parts(
            model,
            num_parts,
            lambda model, part: self._encoding.features(model, parts[part]),
            loss_of,
            read,
        )

    def _save(self, parts: Parts, step: int) -> None:
        parts.check_finite(step, self.num_steps, self.world.device)
        captured = parts.captured(self.world.is_first)
        if self.state is not None and self.world.is_first:
            self.state.save({"step": step, **captured, "rows": json.dumps(self.rows)})

    def _resume(self, parts: Parts) -> int:
        saved = self.state.load() if self.state is not None else None
        step = 0 if saved is None else int(saved["step"])
        check_alike(step, self.world.device)
        if saved is not None:
            parts.restore(saved)
            self.rows = json.loads(saved["rows"])
            log.info("resumed at step %d/%d", step, self.num_steps)
            if self.extra_loss is not None:
                for row in self.rows:  # what it warned of before was said in a log that is gone
                    self.extra_loss.watch(row)
        return step


def _about(best: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of the model that did best, for the manifest."""
    return best and {key: best[key] for key in ("step", "samples_seen", "score")}
