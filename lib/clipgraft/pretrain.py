"""Stage `pretrain`: one phase of contrastive training, from scratch, public weights or the phase before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipgraft import dist
from clipgraft.checkpoint import TrainingState, load_model, save_model
from clipgraft.config import ConfigError
from clipgraft.models.build import build, describe, model_config, pretrained_state
from clipgraft.settings import PretrainJob
from clipgraft.train import Data, Fit, contrastive_step, ordinary_batches


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
            ordinary_batches(data, settings, settings.seed),
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
            spec = spec | {"samples_seen": spec["samples_seen"] + facts["samples_seen"]}
            save_model(out, model, spec, data.tokens.merges)
        return facts


def start_model(
    settings: PretrainJob, vocab_size: int, init: Path | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model before the first step, and its description for `model.json`.

    Raises:
        ConfigError: if `init` has another vocabulary than the data.
    """
    size, length = settings.image_size, settings.text_length
    if init is not None:
        before = load_model(init, image_size=size, text_length=length)
        has = before.spec["config"]["text_cfg"]["vocab_size"]
        if has != vocab_size:
            raise ConfigError(f"{init} has {has} tokens, the data have {vocab_size}")
        return before.model, before.spec
    config = model_config(settings.model, vocab_size, size, length)
    model = build(config, temperature=settings.temperature)
    if settings.model.pretrained:
        model.load_state_dict(pretrained_state(settings.model, config))
    return model, describe(config, settings.model)
