"""Stage `pretrain`: one phase of contrastive training, from scratch, public weights or the phase before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipgraft import dist
from clipgraft.checkpoint import load_model, load_reference
from clipgraft.config import ConfigError
from clipgraft.data.tokens import Tokens
from clipgraft.data.vocabulary import is_same_vocabulary
from clipgraft.evaluation.watch import open_watch
from clipgraft.misfits import start_misfit, vocabulary_misfit
from clipgraft.models.build import build, describe, model_config, pretrained_state, token_rows
from clipgraft.models.inherit import inherit
from clipgraft.models.patches import drop_patches
from clipgraft.models.positions import TextResize, start_positions
from clipgraft.objectives import memory_of, objective_of
from clipgraft.recipes import PhaseSettings
from clipgraft.references import (
    CachedReference,
    open_references,
    projections_of,
)
from clipgraft.settings import PretrainJob
from clipgraft.train import Fit
from clipgraft.training_data import Data, ordinary_batches
from clipgraft.training_state import TrainingState

SIGLIP_BIAS = -10.0  # most pairs are negatives, and are taken for such at the start (SigLIP)


def pretrain(
    settings: PretrainJob,
    index: Path,
    shard: Path,
    init: Path | None,
    out: Path,
    *,
    threads: int = 1,
    state: TrainingState | None = None,
    cached: Mapping[str, Path] | None = None,
    watched: Path | None = None,
) -> dict[str, Any]:
    """Train with a loss over pairs (minibatch contrastive, sigmoid or global contrastive), and maybe from references.

    Args:
        settings: the phase, the architecture and the seed.
        index: folder with tokens.
        shard: folder with images.
        init: model folder of the phase before; its position tables are carried over.
        out: folder for the model and `metrics.jsonl`.
        threads: CPU threads.
        state: where to save and find training state.
        cached: folders of the embeddings of cached references, `reference_0` that of the first.
        watched: index of the samples that the phase is watched on.
    Returns:
        Facts for the manifest.
    """
    torch.manual_seed(settings.seed)
    with dist.world() as world:
        data = Data.open(index, shard)
        model, spec = start_model(settings, data.tokens, init)
        config, positions = start_positions(
            model,
            spec["config"],
            settings,
            is_carried=bool(init or settings.model.pretrained or settings.init_from),
        )
        spec = spec | {"config": config, "positions": positions}
        drop_patches(model, settings.image_reduction)
        loss, sampler = settings.loss, ordinary_batches(data, settings, settings.seed)
        memory = memory_of(loss, len(data.shards), settings.temperature)
        num_epochs = settings.samples_seen / settings.batch_size / sampler.num_batches
        set_trained(model, settings)
        dim = spec["config"]["embed_dim"]
        references = open_references(settings, dim, data, world.device, cached or {})
        projections = projections_of(settings, dim, references, settings.seed)
        fit = Fit(
            model,
            objective_of(
                world,
                loss,
                settings.optim,
                memory,
                num_epochs,
                settings.distillation,
                projections,
            ),
            settings,
            data,
            sampler,
            spec,
            settings.seed,
            world,
            threads,
            state,
            loss,
            memory,
            references=references,
            caches=[each.cache for each in references if isinstance(each, CachedReference)],
            projections=nn.ModuleList(each for each in projections if each is not None),
            watch=open_watch(settings, watched, spec, data.tokens.tokenizer, world, threads),
        )
        facts = fit.run(out)
        fit.save(out, data.tokens.tokenizer)
        return facts | {"positions": positions}


def set_trained(model: nn.Module, settings: PhaseSettings) -> None:
    """Freeze what a phase locks, and give a temperature that is no parameter of the model's its value."""
    loss = settings.loss
    towers: dict[str, Any] = {"image": model.visual, "text": model.text}
    for name in settings.lock:
        towers[name].requires_grad_(False)
    model.logit_scale.requires_grad_(loss.tau == "learned")
    if loss.tau in ("constant", "per_sample"):
        model.logit_scale.data.fill_(math.log(1 / settings.temperature))
    if model.logit_bias is not None:
        model.logit_bias.requires_grad_(loss.kind == "siglip")


def start_model(
    settings: PretrainJob, tokens: Tokens, init: Path | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model before the first step, and its description for `model.json`.

    Raises:
        ConfigError: if the model cannot read the vocabulary of the data, or there are no weights to keep or take.
    """
    misfit = start_misfit(settings, init is not None, settings.model.pretrained is not None)
    if misfit:
        raise ConfigError(misfit)
    size, length = settings.image_size, settings.text_length
    rule = TextResize(settings.text_pos_resize, settings.text_pos_keep)
    if init is not None:
        before = load_model(init, image_size=size, text_length=length, text_positions=rule)
        text = before.spec["config"]["text_cfg"]
        has, needs = text["vocab_size"], token_rows(text, tokens.vocab_size)
        if has != needs or before.tokenizer.name != tokens.tokenizer.name:
            raise ConfigError(
                f"{init} has {has:,} tokens of {before.tokenizer.name}, the data have {needs:,} of "
                f"{tokens.tokenizer.name}. Hint: phases must share an index"
            )
        if settings.loss.kind == "siglip" and before.model.logit_bias is None:
            before.model.logit_bias = nn.Parameter(torch.tensor(SIGLIP_BIAS))
            before.spec["config"]["init_logit_bias"] = SIGLIP_BIAS
        return before.model, before.spec
    config = model_config(settings.model, tokens.vocab_size, size, length)
    misfit = vocabulary_misfit(config["text_cfg"], tokens.vocabulary)
    if misfit:
        raise ConfigError(f"model: {misfit}")
    if settings.loss.kind == "siglip":
        config.setdefault("init_logit_bias", SIGLIP_BIAS)
    if settings.init_from:
        return start_as_reference(settings, config, tokens, rule)
    model = build(config, temperature=settings.temperature)
    if settings.model.pretrained:
        model.load_state_dict(pretrained_state(settings.model, config, rule))
    return model, describe(config, settings.model)


def start_as_reference(
    settings: PretrainJob, config: dict[str, Any], tokens: Tokens, text_positions: TextResize
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with the weights of the first reference, and its description; says there what was resampled.

    Raises:
        ConfigError: if the reference reads another vocabulary, or its weights cannot be carried over.
    """
    first = settings.references[0].model_copy(update={"image_size": None})
    reference = load_reference(first)  # as it is: nothing is resampled twice
    tokenizer = reference.tokenizer
    if not isinstance(tokenizer, Path) or not is_same_vocabulary(tokenizer, tokens.tokenizer):
        raise ConfigError(
            f"init_from: reference: {first.model} reads another vocabulary than the data have. Hint: "
            "index: {vocabulary: full} for weights that read CLIP's byte pairs"
        )
    state, config, done = inherit(config, reference, text_positions)
    model = build(config)
    model.load_state_dict(state)
    spec, given = describe(config), settings.model.preprocess.model_dump(exclude_none=True)
    spec["preprocess"] |= done.pop("preprocess") | given
    return model, spec | {"init_from": done}
