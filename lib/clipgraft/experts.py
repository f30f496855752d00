"""Stage `finetune_expert`: the MLPs of the base, fine-tuned on homogeneous batches (multistage contrastive learning).

All negatives of a pair come from its own accumulated cluster, so what the earlier models already tell apart no
longer helps, and the MLPs must learn something else. Everything but the MLPs is frozen, the temperature included.
With `batches: ordinary` the same training is a baseline that shows what the clusters are worth; with `weights: all`,
what freezing is worth.

A round whose loss ends where guessing would be stops the run: its clusters hold nothing that tells samples apart. The
loss that is judged is InfoNCE without label smoothing (which has a floor of its own), and guessing is the log of the
number of candidates, row by row where a batch is packed from several labels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clipgraft import devices, dist
from clipgraft.checkpoint import load_model
from clipgraft.config import ConfigError
from clipgraft.data.labels import read_labels
from clipgraft.data.loader import Batch
from clipgraft.data.sampler import (
    HomogeneousBatches,
    RoundRobinBatches,
    labels_by_pass,
    share_homogeneous,
)
from clipgraft.evaluation.watch import open_watch
from clipgraft.models.build import mlp_parameters
from clipgraft.moe_settings import MlpSettings
from clipgraft.objectives import Features, Loss, Objective, expert_loss
from clipgraft.settings import ExpertJob
from clipgraft.train import Fit, Sampler
from clipgraft.training_data import Data, ordinary_batches
from clipgraft.training_state import TrainingState

log = logging.getLogger(__name__)

_MODULES = {"image": "visual.", "text": "text."}


def finetune_expert(
    settings: ExpertJob,
    init: Path,
    index: Path,
    shard: Path,
    labels: Path | None,
    out: Path,
    *,
    threads: int = 1,
    state: TrainingState | None = None,
    watched: Path | None = None,
) -> dict[str, Any]:
    """Fine-tune MLPs, or all weights, and store only them.

    Args:
        settings: length, batch, optimizer, label smoothing, which MLPs, seed.
        init: model folder to start from.
        index: folder with tokens.
        shard: folder with images.
        labels: cluster folder with accumulated pseudo labels; None for ordinary batches.
        out: folder for the changed weights and `metrics.jsonl`.
        threads: CPU threads.
        state: where to save and find training state.
        watched: index of the samples that the training is watched on.
    Returns:
        Facts for the manifest.
    Raises:
        ConfigError: if the round had nothing to learn, or a tower has no such block.
    """
    torch.manual_seed(settings.seed)
    with dist.world() as world:
        data = Data.open(index, shard)
        loaded = load_model(init)
        model, spec = loaded.model, loaded.spec
        trained = trained_parameters(model, settings)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        groups = None if labels is None else read_labels(labels, data.shards.samples_id)
        fit = Fit(
            model,
            expert_objective(world, settings),
            settings,
            data,
            sampler_of(settings, data, groups),
            spec,
            settings.seed,
            world,
            threads,
            state,
            short_captions=settings.short_captions.kind if settings.short_captions else None,
            watch=open_watch(settings, watched, spec, loaded.tokenizer, world, threads),
        )
        facts = fit.run(out)
        if labels is not None:
            check_learnable(settings, fit.rows, fit.num_steps, labels)
        fit.save(out, loaded.tokenizer, only=list(trained), base=init)
        return facts


def trained_parameters(model: nn.Module, settings: ExpertJob) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name: those of MLPs, or all that a phase would train but the temperature."""
    if settings.weights == "mlps":
        layers = {"image": settings.image_layers, "text": settings.text_layers}
        image, text = (() if tower in settings.lock else layers[tower] for tower in layers)
        return mlp_parameters(model, image, text)
    fixed = ("logit_", *(_MODULES[tower] for tower in settings.lock))
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(fixed)
    }


def sampler_of(settings: ExpertJob, data: Data, labels_N: np.ndarray | None) -> Sampler:
    """Batches of one pseudo label each, or ordinary ones."""
    if settings.batches == "homogeneous" and labels_N is None:
        raise ConfigError("batches: homogeneous needs pseudo labels. Hint: --input labels=MANIFEST")
    if labels_N is None:
        return ordinary_batches(data, settings, settings.seed)
    sizes_C, visits = np.bincount(labels_N), data.visits(settings, settings.seed)
    shown = labels_by_pass(labels_N, visits.of_epoch(0), visits.passes)
    log.info(
        "%s samples in %d pseudo labels (smallest %s, largest %s), %.0f %% in batches of one label",
        f"{len(labels_N):,}",
        len(sizes_C),
        f"{sizes_C.min():,}",
        f"{sizes_C.max():,}",
        100 * share_homogeneous(shown, settings.batch_size),
    )
    if settings.batch_order == "round_robin":
        return RoundRobinBatches(labels_N, settings.batch_size, settings.seed)
    return HomogeneousBatches(
        labels_N,
        settings.batch_size,
        settings.seed,
        visits=visits,
        shuffle_block=settings.shuffle_block,
    )


def expert_objective(world: dist.World, settings: MlpSettings) -> Objective:
    """The loss of MCL: in a batch packed from several clusters, negatives of other clusters are masked.

    So are those of other passes over the data: a sample that is shown twice is not its own negative. With short captions,
    texts come in turn drawn and short, and each of both has the loss.
    """
    smoothing, short = settings.label_smoothing, settings.short_captions

    def objective(features: Features, _: object, batch: Batch, __: float) -> Loss:
        group_G = None
        if batch.group_B is not None:
            group_G = dist.gather(devices.send(batch.group_B, features.image_BD.device))
        if short is None:
            return expert_loss(world, features, smoothing, group_G)
        own_BD, short_BD = features.text_BD.unflatten(0, (-1, 2)).unbind(1)
        loss, extras = expert_loss(world, features._replace(text_BD=own_BD), smoothing, group_G)
        more, _ = expert_loss(world, features._replace(text_BD=short_BD), smoothing, group_G)
        terms = {"pair": loss.detach(), "short": more.detach()}
        return loss + short.weight * more, extras | terms

    return objective


def check_learnable(
    settings: MlpSettings, rows: Sequence[Mapping[str, Any]], num_steps: int, labels: Path
) -> None:
    """Look at the last tenth of a round.

    Args:
        settings: `stop_ratio` times the loss of guessing is the bound; None is without.
        rows: of metrics.
        num_steps: of the whole training.
        labels: cluster folder, which knows the round.
    Raises:
        ConfigError: if the loss is still at the bound or above.
    """
    if settings.stop_ratio is None or not rows:
        return
    loss, guessing = (mean_of_end(rows, num_steps, name) for name in ("infonce", "guessing"))
    if loss < settings.stop_ratio * guessing:
        return
    number = json.loads((labels / "clusters.json").read_text())["rounds"]
    fewer = f"moe.num_experts: {number}" if number > 1 else "moe: null"
    raise ConfigError(
        f"round {number} has nothing to learn: in the last tenth of its steps the loss within clusters is {loss:.3f}, "
        f"and the bound is finetune_expert.stop_ratio = {settings.stop_ratio} x {guessing:.3f}, the log of the number "
        f"of candidates. Hint: {fewer}, fewer clusters, or finetune_expert.stop_ratio: null to go on"
    )


def mean_of_end(rows: Sequence[Mapping[str, Any]], num_steps: int, name: str) -> float:
    """Mean of a number over the rows that end in the last tenth of the steps, weighted by their steps."""
    begins = [0, *(row["step"] for row in rows)]
    end = [
        (row["step"] - begin, row[name])
        for begin, row in zip(begins, rows, strict=False)
        if row["step"] > 0.9 * num_steps
    ]
    return sum(steps * value for steps, value in end) / sum(steps for steps, _ in end)
