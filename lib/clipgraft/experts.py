"""Stage `finetune_expert`: the MLPs of the base, fine-tuned on homogeneous batches (multistage contrastive learning).

All negatives of a pair come from its own accumulated cluster, so what the earlier models already tell apart no
longer helps, and the MLPs must learn something else. Everything but the MLPs is frozen, the temperature included.
With `batches: ordinary` the same training is the control that shows what the clusters are worth.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipgraft import dist
from clipgraft.checkpoint import TrainingState, load_model, save_model
from clipgraft.config import ConfigError
from clipgraft.data.labels import read_labels
from clipgraft.data.loader import Batch
from clipgraft.data.sampler import HomogeneousBatches
from clipgraft.models.build import mlp_parameters
from clipgraft.objectives import Features, Loss, Objective, pair_loss
from clipgraft.settings import ExpertJob
from clipgraft.train import Data, Fit, Sampler, ordinary_batches

log = logging.getLogger(__name__)


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
) -> dict[str, Any]:
    """Fine-tune the MLPs of both towers and store only them.

    Args:
        settings: length, batch, optimizer, label smoothing, seed.
        init: model folder to start from.
        index: folder with tokens.
        shard: folder with images.
        labels: cluster folder with accumulated pseudo labels; None for ordinary batches.
        out: folder for the changed weights and `metrics.jsonl`.
        threads: CPU threads.
        state: where to save and find training state.
    Returns:
        Facts for the manifest.
    """
    torch.manual_seed(settings.seed)
    with dist.world() as world:
        data = Data.open(index, shard)
        loaded = load_model(init)
        model, spec = loaded.model, loaded.spec
        trained = mlp_parameters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        groups = None if labels is None else read_labels(labels, data.shards.samples_id)
        vision, text = spec["config"]["vision_cfg"], spec["config"]["text_cfg"]
        fit = Fit(
            model,
            expert_objective(world, settings.label_smoothing, groups),
            settings,
            data,
            sampler_of(settings, data, groups),
            vision["image_size"],
            text["context_length"],
            spec["preprocess"],
            settings.seed,
            world,
            threads,
            state,
        )
        facts = fit.run(out)
        if world.is_first:
            spec = spec | {"samples_seen": spec["samples_seen"] + facts["samples_seen"]}
            save_model(out, model, spec, loaded.tokenizer, only=list(trained), base=init)
        return facts


def sampler_of(settings: ExpertJob, data: Data, labels_N: np.ndarray | None) -> Sampler:
    """Batches of one pseudo label each, or ordinary ones."""
    if settings.batches == "homogeneous" and labels_N is None:
        raise ConfigError("batches: homogeneous needs pseudo labels. Hint: --input labels=MANIFEST")
    if labels_N is None:
        return ordinary_batches(data, settings, settings.seed)
    sizes_C = np.bincount(labels_N)
    log.info(
        "%s samples in %d pseudo labels (smallest %s, largest %s)",
        f"{len(labels_N):,}",
        len(sizes_C),
        f"{sizes_C.min():,}",
        f"{sizes_C.max():,}",
    )
    return HomogeneousBatches(
        labels_N,
        settings.batch_size,
        settings.seed,
        visits=data.visits(settings, settings.seed),
        shuffle_block=settings.shuffle_block,
    )


def expert_objective(
    world: dist.World, label_smoothing: float, labels_N: np.ndarray | None
) -> Objective:
    """The loss of MCL: in a batch packed from several clusters, negatives of other clusters are masked."""

    def objective(features: Features, _: object, batch: Batch, __: float) -> Loss:
        group_G = None
        if labels_N is not None and batch.is_mixed:
            labels_B = torch.from_numpy(labels_N[batch.rows_B.numpy()])
            group_G = dist.gather(labels_B.to(features.image_BD.device))
        return pair_loss(world, features, label_smoothing=label_smoothing, group_G=group_G), {}

    return objective
