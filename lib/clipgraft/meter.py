"""The meter of a training: averages of what its steps compute, as rows of `metrics.jsonl` and as log lines."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft import dist
from clipgraft.config import ConfigError
from clipgraft.models.patches import num_patches
from clipgraft.recipes import TrainSettings
from clipgraft.schedule import num_steps

log = logging.getLogger(__name__)

LOG_SECONDS = 10.0
NUM_ROWS = 100  # rows of a whole training, about


class Meter:
    """Averages between two rows, of which there are about `NUM_ROWS` and one for each save; speaks every `LOG_SECONDS`."""

    def __init__(
        self,
        num_steps: int,
        batch_size: int,
        logit_scale: Tensor,
        rows: list[dict[str, Any]],
        watch: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Begin, or go on after a resume.

        Args:
            num_steps: steps of the whole training.
            batch_size: global batch size.
            logit_scale: of the model, read when a row is due.
            rows: those of the time before a resume; new ones are appended.
            watch: is shown each new row.
        """
        self.num_steps, self.batch_size = num_steps, batch_size
        self.logit_scale, self.rows, self.watch = logit_scale, rows, watch
        self.every = max(1, num_steps // NUM_ROWS)
        self.sums: dict[str, Tensor] = {}
        self.start_step = self.row_step = rows[-1]["step"] if rows else 0
        self.seconds_before = rows[-1]["seconds"] if rows else 0.0
        self.count, self.lr, self.waited, self.row_waited = 0, 0.0, 0.0, 0.0
        self.row_time = self.start = self.spoke = time.monotonic()

    def add(
        self, step: int, loss: Tensor, lr: float, waited: float, extras: Mapping[str, Tensor]
    ) -> None:
        """Count one step; values stay on the device until a row is due.

        Args:
            step: steps done.
            loss: of this step, without gradient.
            lr: of this step.
            waited: seconds that training has waited for data since its start.
            extras: what else is to be averaged.
        """
        for name, value in {"loss": loss, **extras}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count, self.lr, self.waited = self.count + 1, lr, waited
        if step % self.every == 0:
            self.flush(step)

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return self.seconds_before + time.monotonic() - self.start

    def pause(self, seconds: float) -> None:
        """Leave out so much time, in which something else was done."""
        self.start, self.row_time = self.start + seconds, self.row_time + seconds

    def flush(self, step: int) -> None:
        """Close the current row, if it has steps."""
        if not self.count:
            return
        row, now = self._row(step)
        self.rows.append(row)
        if self.watch is not None:
            self.watch(row)
        self.sums, self.count = {}, 0
        self.row_time, self.row_step, self.row_waited = now, step, self.waited
        if self.is_due() or step == self.num_steps:
            self.speak(row, now)

    def is_due(self) -> bool:
        """Whether it is time to speak."""
        return time.monotonic() - self.spoke > LOG_SECONDS

    def glance(self, step: int) -> None:
        """Speak in the middle of a row, if it has steps; by all processes together."""
        if self.count:
            self.speak(*self._row(step))

    def _row(self, step: int) -> tuple[dict[str, Any], float]:
        """The current row as it is after a step, and the time when that was over.

        Raises:
            ConfigError: if the loss is not finite.
        """
        values = self._means()
        now = time.monotonic()
        seconds, samples = now - self.row_time, (step - self.row_step) * self.batch_size
        row = {
            "step": step,
            "samples_seen": step * self.batch_size,
            "seconds": round(self.seconds_before + now - self.start, 3),
            "lr": self.lr,
            "tau": 1 / math.exp(self.logit_scale.item()),
            "samples_per_second": round(samples / max(seconds, 1e-9), 1),
            "data_wait": round((self.waited - self.row_waited) / max(seconds, 1e-9), 4),
            **values,
        }
        if not math.isfinite(row["loss"]):
            raise ConfigError(
                f"the loss is {row['loss']} between steps {self.row_step} and {step} of {self.num_steps} (tau "
                f"{row['tau']:.4g}, lr {self.lr:.3g}). Hint: a lower optim.lr, a longer warmup, or max_grad_norm"
            )
        return row, now

    def _means(self) -> dict[str, Any]:
        """Of steps and processes, in one collective and one look at the device."""
        totals = [total.float().flatten() for total in self.sums.values()]
        flat = dist.mean(torch.cat(totals) / self.count).cpu()
        means = flat.split([len(total) for total in totals])
        return {
            name: mean.view(total.shape).tolist()
            for (name, total), mean in zip(self.sums.items(), means, strict=True)
        }

    def speak(self, row: Mapping[str, Any], now: float) -> None:
        """One line for people."""
        total, step = self.num_steps, row["step"]
        rate = (now - self.start) / max(step - self.start_step, 1)
        eta = round(rate * (total - step))
        log.info(
            "step %5d/%d %5.1f%%  loss %.3f  tau %.4f%s  lr %.1e  %s img/s  data %.0f%%  eta %dm%02ds",
            step,
            total,
            100 * step / total,
            row["loss"],
            row["tau"],
            f"  gamma {row['gamma']:.2f}" if "gamma" in row else "",
            row["lr"],
            f"{row['samples_per_second']:,.0f}",
            100 * row["data_wait"],
            *divmod(eta, 60),
        )
        self.spoke = now


def announce(
    settings: TrainSettings,
    model: nn.Module,
    num_trained: int,
    num_samples: int,
    sizes: tuple[int, int],
    world: dist.World,
    how: str,
) -> None:
    """Say what is going to be trained.

    Args:
        settings: length and batch.
        model: its size, and how many patches it sees.
        num_trained: parameters.
        num_samples: of the training set.
        sizes: side of an image in pixels, and tokens of a text.
        world: this process.
        how: precision and device.
    """
    total = sum(p.numel() for p in model.parameters())
    log.info(
        "%s params, %s trained   %s samples", _human(total), _human(num_trained), f"{num_samples:,}"
    )
    kept, patches = num_patches(model)
    share = f"{kept} of {patches}" if kept < patches else f"{patches}"
    log.info("image %d px = %s patches, text %d tokens", sizes[0], share, sizes[1])
    size, steps = settings.batch_size, num_steps(settings)
    log.info(
        "batch %s = %d %s x %d%s   %s steps = %.1f passes   %s",
        f"{size:,}",
        world.size,
        "process" if world.size == 1 else "processes",
        size // world.size // settings.accumulate,
        f" x {settings.accumulate} parts" if settings.accumulate > 1 else "",
        f"{steps:,}",
        steps * size / num_samples,
        how,
    )


def _human(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"
