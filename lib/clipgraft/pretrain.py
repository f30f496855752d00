"""Stage `pretrain`: one phase of contrastive training, from scratch, public weights or the phase before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipgraft import dist
from clipgraft.checkpoint import TrainingState, load_model, save_model
from clipgraft.config import ConfigError
from clipgraft.data.tokens import Tokens
from clipgraft.models.build import build, describe, model_config, pretrained_state, token_rows
from clipgraft.models.patches import drop_patches
from clipgraft.models.positions import start_positions
from clipgraft.recipes import vocabulary_misfit
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
        init: model folder of the phase before; its position tables are carried over.
        out: folder for the model and `metrics.jsonl`.
        threads: CPU threads.
        state: where to save and find training state.
    Returns:
        Facts for the manifest.
    """
    torch.manual_seed(settings.seed)
    with dist.world() as world:
        data = Data.open(index, shard)
        model, spec = start_model(settings, data.tokens, init)
        config, positions = start_positions(
            model, spec["config"], settings, is_carried=bool(init or settings.model.pretrained)
        )
        spec = spec | {"config": config, "positions": positions}
        drop_patches(model, settings.image_reduction)
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
            save_model(out, model, spec, data.tokens.tokenizer)
        return facts | {"positions": positions}


def start_model(
    settings: PretrainJob, tokens: Tokens, init: Path | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model before the first step, and its description for `model.json`.

    Raises:
        ConfigError: if the model cannot read the vocabulary of the data.
    """
    size, length = settings.image_size, settings.text_length
    if init is not None:
        before = load_model(
            init, image_size=size, text_length=length, text_positions=settings.text_pos_resize
        )
        text = before.spec["config"]["text_cfg"]
        has, needs = text["vocab_size"], token_rows(text, tokens.vocab_size)
        if has != needs or before.tokenizer.name != tokens.tokenizer.name:
            raise ConfigError(
                f"{init} has {has:,} tokens of {before.tokenizer.name}, the data have {needs:,} of "
                f"{tokens.tokenizer.name}. Hint: phases must share an index"
            )
        return before.model, before.spec
    config = model_config(settings.model, tokens.vocab_size, size, length)
    misfit = vocabulary_misfit(config["text_cfg"], tokens.vocabulary)
    if misfit:
        raise ConfigError(f"model: {misfit}")
    model = build(config, temperature=settings.temperature)
    if settings.model.pretrained:
        rule = settings.text_pos_resize
        model.load_state_dict(pretrained_state(settings.model, config, rule))
    return model, describe(config, settings.model)
