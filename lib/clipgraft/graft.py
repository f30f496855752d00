"""Stage `assemble`: graft the experts into one CLIP-MoE (Diversified Multiplet Upcycling).

The trunk (attention, norms, embeddings, projections, temperature) is that of expert 0; in each chosen block the MLPs
of all experts stand side by side behind a fresh router. Because gates sum to 1, identical experts give exactly the
dense model, whatever the routers say. With `copies` that is where sparse upcycling starts from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.centroids import centroid_routers
from clipgraft.checkpoint import load_model, save_model, whole_weights
from clipgraft.config import ConfigError
from clipgraft.models.build import mlp_parameters
from clipgraft.models.moe import router_parameters, upcycle
from clipgraft.settings import AssembleJob
from clipgraft.training_data import Data

log = logging.getLogger(__name__)


def assemble(
    settings: AssembleJob,
    experts: list[Path],
    out: Path,
    *,
    index: Path | None = None,
    shard: Path | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """Write the assembled model.

    Args:
        settings: number of experts, top_k, layers, how routers and copies begin, seed.
        experts: model folders, expert 0 (the base) first; one folder for copies.
        out: folder for the model.
        index: folder with tokens, for `router_init: centroids`.
        shard: folder with images, likewise.
        threads: for decoding.
    Returns:
        Facts for the manifest.
    Raises:
        ConfigError: if the number of folders is not `num_experts`, or one for copies, architectures differ, or data
            are missing.
    """
    num_folders = 1 if settings.copies else settings.num_experts
    if len(experts) != num_folders:
        raise ConfigError(
            f"num_experts = {settings.num_experts}, copies = {settings.copies}: {len(experts)} experts were given. "
            f"Hint: {num_folders}"
        )
    base = load_model(experts[0])
    model, own = base.model, base.model.state_dict()
    dense = sum(p.numel() for p in model.parameters())
    routers: dict[str, Tensor] = {}
    if settings.router_init == "centroids":
        if index is None or shard is None:
            raise ConfigError(
                "router_init: centroids needs training samples. Hint: --input index=MANIFEST --input shard=MANIFEST"
            )
        routers = centroid_routers(settings, base, Data.open(index, shard), threads=threads)
    if settings.copies:
        names = list(mlp_parameters(model))
        states = noisy_copies(own, names, settings.num_experts, settings.noise, settings.seed + 1)
    else:
        states = [own, *(whole_weights(folder) for folder in experts[1:])]
    moe = upcycle(
        model,
        states,
        top_k=settings.top_k,
        image_layers=settings.image_layers,
        text_layers=settings.text_layers,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    with torch.no_grad():
        for name, router_ED in router_parameters(model).items():
            if settings.router_init == "zero":
                router_ED.zero_()
            elif settings.router_init == "centroids":
                router_ED.copy_(routers[name])
    save_model(out, model, {**base.spec, "moe": moe}, base.tokenizer)
    total = sum(p.numel() for p in model.parameters())
    log.info(
        "%d experts, top %d: %s parameters (dense %s)",
        settings.num_experts,
        settings.top_k,
        f"{total:,}",
        f"{dense:,}",
    )
    return {"parameters": total, "dense_parameters": dense, "num_experts": settings.num_experts}


def noisy_copies(
    state: Mapping[str, Tensor], names: list[str], num_copies: int, noise: float, seed: int
) -> list[Mapping[str, Tensor]]:
    """Copies of one model for `upcycle`, the first exact, noise on the others.

    Args:
        state: of the model.
        names: tensors that get noise: those of the MLPs.
        num_copies: with the first.
        noise: in standard deviations of each tensor; a constant one, such as fresh biases, stays as it is.
        seed: of the noise.
    """
    if not noise:
        return [state] * num_copies
    generator = torch.Generator().manual_seed(seed)

    def noisy(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator)
        return tensor + noise * tensor.float().std(correction=0) * drawn

    return [state, *({name: noisy(state[name]) for name in names} for _ in range(num_copies - 1))]
