"""Watch: a quick evaluation of a model while it trains, on a few samples of a task.

Three decisions shape it:

- It changes nothing. The model is in evaluation mode and without gradients, and no random number is drawn: training
  ends with the same bits with and without.
- No process waits for another. Each encodes an equal share of the images and of the texts on its own device; all then
  have all features, and the same numbers. Images are decoded once, and kept as bytes.
- The numbers are those of the stage `evaluate` on the same samples: the same prompts, ties and float32.

Trainings reach this module by its name alone (`versions.PLUMBING`): an edit of the evaluation trains nothing again.
"""

# Shapes: N images, U distinct captions, C classes, S processes, R rows of this one, H side, L tokens, D embedding

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft import dist
from clipgraft.config import ConfigError
from clipgraft.data.images import prepare
from clipgraft.data.samples import Samples
from clipgraft.data.tokens import Tokenizer
from clipgraft.evaluation.asked import check_label, chosen_captions
from clipgraft.evaluation.encode import true_float32
from clipgraft.evaluation.retrieval import Captions, evaluate_retrieval
from clipgraft.evaluation.rows import spread
from clipgraft.evaluation.zero_shot import evaluate_zero_shot, zero_shot_weights
from clipgraft.evaluation_settings import WatchJob
from clipgraft.models.build import normalize, trimmed
from clipgraft.recipes import TrainSettings
from clipgraft.schedule import num_steps

log = logging.getLogger(__name__)

BATCH = 256  # images or texts encoded at a time
WAYS = ("image_to_text_R@1", "text_to_image_R@1", "mean_R@1")

Encode = Callable[[Tensor], Tensor]


class Watch:
    """Looks at a model every so often; remembers what it saw, and the weights that did best.

    Attributes:
        rows: one per look: `step`, `samples_seen`, `seconds` of training, `watch` (numbers) and `chance`.
        best: `step`, `samples_seen`, `score` and `weights` of the best look, on the first process; None unless kept.
    """

    def __init__(
        self,
        training: TrainSettings,
        settings: WatchJob,
        index: Path,
        spec: Mapping[str, Any],
        tokenizer: Path,
        world: dist.World,
        threads: int = 1,
    ) -> None:
        """Choose the samples, and decode this process's share.

        Args:
            training: its length and batch size.
            settings: how often, and what.
            index: the samples to choose from.
            spec: of the model in training: its sizes, and how it wants images.
            tokenizer: its file.
            world: this process.
            threads: for decoding.
        Raises:
            ConfigError: if the samples have no such label, or no captions.
        """
        samples = Samples.open(index)
        rows_N = spread(len(samples), settings.num_samples).tolist()
        self.settings, self.world, self.num_images = settings, world, len(rows_N)
        self.batch_size, self.num_steps = training.batch_size, num_steps(training)
        self.preprocess = spec["preprocess"]
        self.length = spec["config"]["text_cfg"]["context_length"]
        self.tokenizer = Tokenizer(tokenizer)
        self.token_ids: dict[
            str, Tensor
        ] = {}  # this process's share of the captions, and of each label's prompts
        where = f"evaluate.tasks.{settings.task}"
        self.labels = {
            each.label: check_label(samples, each, f"{where}.zero_shot")
            for each in settings.zero_shot
        }
        self.label_N = {
            label: _known(label_N[rows_N], label, settings)
            for label, (label_N, *_) in self.labels.items()
        }
        self.captions = None
        if settings.retrieval is not None:
            captions_of = chosen_captions(samples, settings.retrieval, f"{where}.retrieval")
            texts = [captions_of[row] for row in rows_N]
            self.captions = Captions.of(texts, settings.retrieval.protocol)
        with ThreadPoolExecutor(threads) as pool:
            mine = [rows_N[place] for place in share(len(rows_N), world)]
            pixels = list(pool.map(lambda row: self._pixels(samples, row), mine))
        self.images_RHHC = torch.from_numpy(np.stack(pixels))
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        log.info(
            "watching %s: %s of %s samples, every %s samples seen",
            settings.task,
            f"{len(rows_N):,}",
            f"{len(samples):,}",
            f"{settings.every:,}",
        )

    def is_due(self, step: int) -> bool:
        """Whether to look after so many steps: before the first, after the last, and wherever `every` is passed."""
        before, after = (
            max(0, n) * self.batch_size // self.settings.every for n in (step - 1, step)
        )
        return step in (0, self.num_steps) or after > before

    def look(self, model: nn.Module, step: int, seconds: float) -> None:
        """Measure the model, and keep its weights if it did better than ever.

        Args:
            model: in training mode, which it is left in.
            step: steps done.
            seconds: of training so far.
        """
        start = time.monotonic()
        model.eval()
        # Not inference_mode: what a model might remember must be of use to training.
        with torch.no_grad(), true_float32():
            values, chance = self._measure(model)
        model.train()
        row = {"step": step, "samples_seen": step * self.batch_size, "seconds": round(seconds, 3)}
        self.rows.append({**row, "watch": values, "chance": chance})
        self._keep(model, row, score_of(values))
        numbers = "  ".join(f"{name} {100 * value:.2f}%" for name, value in values.items())
        took = time.monotonic() - start
        log.info("watch %5d/%d  %s  (%.1f s)", step, self.num_steps, numbers, took)

    def state(self) -> dict[str, Any]:
        """What a resume needs."""
        return {"rows": json.dumps(self.rows), "best": self.best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.rows, self.best = json.loads(state["rows"]), state["best"]

    def _measure(self, model: Any) -> tuple[dict[str, float], dict[str, float]]:
        """Numbers by name, and what guessing gives."""
        device = self.world.device

        def encode(pixels_RHHC: Tensor) -> Tensor:
            pixels = pixels_RHHC.to(device).permute(0, 3, 1, 2)
            mean, std = self.preprocess["mean"], self.preprocess["std"]
            return model.encode_image(normalize(pixels, mean, std))

        image_ND = self._gathered(self.images_RHHC, self.num_images, encode)
        values, chance = {}, {}
        if self.captions is not None:
            text_UD = self._text_encoder(model, "captions")(self.captions.texts)
            found = evaluate_retrieval(image_ND, text_UD, self.captions)
            for way in WAYS:
                direction, _, cutoff = way.rpartition("_")
                values[way] = found[way] if way in found else found[direction][cutoff]
                chance[way] = found["chance"][way]
        for label, (_, classes, templates) in self.labels.items():
            encoder = self._text_encoder(model, f"label {label}")
            weight_CD = zero_shot_weights(encoder, classes, templates)
            scores = evaluate_zero_shot(image_ND, weight_CD, self.label_N[label], classes)
            values[f"{label}_acc1"], chance[f"{label}_acc1"] = scores["acc1"], scores["chance"]
        return values, chance

    def _text_encoder(self, model: Any, name: str) -> Callable[[list[str]], Tensor]:
        """A function from texts, which are the same at every look, to their features."""

        def encode(text_BL: Tensor) -> Tensor:
            return model.encode_text(trimmed(model, text_BL).to(self.world.device))

        def encode_all(texts: list[str]) -> Tensor:
            if name not in self.token_ids:
                mine = [texts[place] for place in share(len(texts), self.world)]
                ids = self.tokenizer.encode_batch(mine, self.length)
                self.token_ids[name] = torch.from_numpy(ids)
            return self._gathered(self.token_ids[name], len(texts), encode)

        return encode_all

    def _gathered(self, mine: Tensor, num: int, encode: Encode) -> Tensor:
        """L2-normalised float32 features of all `num`, of which this process encodes its share."""
        parts = [F.normalize(encode(part).float(), dim=-1) for part in mine.split(BATCH)]
        everyone_SRD = dist.gather(torch.cat(parts)).unflatten(0, (self.world.size, -1))
        return everyone_SRD.transpose(0, 1).flatten(0, 1)[:num]

    def _pixels(self, samples: Samples, row: int) -> np.ndarray:
        how = (self.preprocess[key] for key in ("size", "resize_mode", "interpolation"))
        return prepare(samples.pixels(row), *how)

    def _keep(self, model: nn.Module, row: Mapping[str, Any], score: float) -> None:
        is_best = self.best is None or score > self.best["score"]
        if not self.settings.best or not dist.largest(
            self.world.is_first and is_best, self.world.device
        ):
            return
        trained = (
            (name, dist.whole(parameter.detach()))  # by all processes, for the first one
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        )
        weights = {name: p.to("cpu", copy=True) for name, p in trained if self.world.is_first}
        about = {key: row[key] for key in ("step", "samples_seen")}
        self.best = {**about, "score": score, "weights": weights}


def open_watch(
    training: TrainSettings,
    index: Path | None,
    spec: Mapping[str, Any],
    tokenizer: Path,
    world: dist.World,
    threads: int,
) -> Watch | None:
    """The watch that a training asks for, if it does.

    Raises:
        ConfigError: if there is no index to take samples from, or they are not what the task needs.
    """
    settings = training.watch
    if settings is None:
        return None
    assert isinstance(settings, WatchJob)
    if index is None:
        raise ConfigError(
            f"watch.task = {settings.task} needs samples, and no index of them was given. "
            "Hint: --input watched=MANIFEST, or --set watch=null"
        )
    return Watch(training, settings, index, spec, tokenizer, world, threads)


def score_of(values: Mapping[str, float]) -> float:
    """What tells the best look: mean R@1; without retrieval, the mean accuracy of the labels."""
    return values["mean_R@1"] if "mean_R@1" in values else float(np.mean(list(values.values())))


def share(num: int, world: dist.World) -> list[int]:
    """Every `size`-th place from this process's rank on, as many for all; past the end stands the last."""
    count = -(-num // world.size)
    return [min(world.rank + turn * world.size, num - 1) for turn in range(count)]


def _known(label_N: Tensor, label: str, settings: WatchJob) -> Tensor:
    if not (label_N >= 0).any():
        raise ConfigError(
            f"watch.task = {settings.task}: none of the {len(label_N):,} watched samples has the label {label!r}. "
            "Hint: a larger watch.num_samples"
        )
    return label_N
