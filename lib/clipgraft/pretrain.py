"""Stage `pretrain`: one phase of contrastive training, from scratch, public weights or the phase before."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft import dist
from clipgraft.checkpoint import TrainingState, load_model, save_model
from clipgraft.config import ConfigError, PretrainJob
from clipgraft.data.loader import Batch
from clipgraft.data.sampler import UniformBatches
from clipgraft.losses.contrastive import contrastive_loss
from clipgraft.models.build import build, describe, model_config, pretrained_state
from clipgraft.train import Data, Fit

log = logging.getLogger(__name__)


def pretrain(
    settings: PretrainJob,
    index: Path,
    shard: Path,
    init: Path | None,
    out: Path,
    *,
    threads: int = 1,
    state: TrainingState | None = None,
) -> dict[str, Any]:
    """Train all parameters with the minibatch contrastive loss (InfoNCE, as open_clip).

    Args:
        settings: the phase, the architecture and the seed.
        index: folder with tokens.
        shard: folder with images.
        init: model folder of the phase before; its position tables are interpolated.
        out: folder for the model and `metrics.jsonl`.
        threads: CPU threads.
        state: where to save and find training state.
    Returns:
        Facts for the manifest.
    """
    torch.manual_seed(settings.seed)
    with dist.world() as world:
        data = Data.open(index, shard)
        model, spec = start_model(settings, data.tokens.vocab_size, init)
        fit = Fit(
            model,
            contrastive_step(world),
            settings,
            data,
            UniformBatches(len(data.shards), settings.batch_size, settings.seed),
            settings.image_size,
            settings.text_length,
            spec["preprocess"],
            settings.seed,
            world,
            threads,
            state,
        )
        facts = fit.run(out)
        if world.is_first:
            save_model(out, model, spec, data.tokens.merges)
        return facts


def start_model(settings: PretrainJob, vocab_size: int, init: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """The model before the first step, and its description for `model.json`."""
    if init is not None:
        before = load_model(init, image_size=settings.image_size, text_length=settings.text_length)
        if before.spec["config"]["text_cfg"]["vocab_size"] != vocab_size:
            raise ConfigError(f"{init} has another vocabulary than the data ({vocab_size} tokens)")
        return before.model, before.spec
    config = model_config(settings.model, vocab_size, settings.image_size, settings.text_length)
    weights = pretrained_state(settings.model, config) if settings.model.pretrained else None
    model = build(config)
    if weights is None:
        nn.init.constant_(model.logit_scale, math.log(1 / settings.temperature))
    else:
        model.load_state_dict(weights)
    return model, describe(config)


def contrastive_step(world: dist.World, label_smoothing: float = 0.0):
    """The step of plain contrastive training, over the features of all processes."""

    def step(model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        features = encode(model, images, batch.text_BL.to(images.device, non_blocking=True))
        return pair_loss(world, *features, label_smoothing=label_smoothing), {}

    return step


def encode(model: nn.Module, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised features of both towers and 1/tau, through the module's forward (which DDP hooks)."""
    output = model(images, text)
    if isinstance(output, dict):
        return output["image_features"], output["text_features"], output["logit_scale"]
    return output[0], output[1], output[2]


def pair_loss(
    world: dist.World,
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    *,
    label_smoothing: float = 0.0,
    group_G: Tensor | None = None,
) -> Tensor:
    """Contrastive loss of this process's rows against the rows of all; `contrastive_loss` says the rest."""
    return contrastive_loss(
        image_BD,
        text_BD,
        logit_scale,
        dist.gather(image_BD),
        dist.gather(text_BD),
        first_row=world.rank * image_BD.shape[0],
        label_smoothing=label_smoothing,
        group_G=group_G,
    )
