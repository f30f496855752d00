"""Stage `assemble`: graft the experts into one CLIP-MoE (Diversified Multiplet Upcycling).

The trunk (attention, norms, embeddings, projections, temperature) is that of expert 0; in each chosen block the MLPs
of all experts stand side by side behind a fresh router. Because gates sum to 1, identical experts would give exactly
the dense model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from clipgraft.checkpoint import load_model, read_weights, save_model
from clipgraft.config import ConfigError
from clipgraft.models.moe import upcycle
from clipgraft.settings import AssembleJob

log = logging.getLogger(__name__)


def assemble(settings: AssembleJob, experts: list[Path], out: Path) -> dict[str, Any]:
    """Write the assembled model.

    Args:
        settings: number of experts, top_k, layers, seed of the routers.
        experts: model folders, expert 0 (the base) first.
        out: folder for the model.
    Returns:
        Facts for the manifest.
    Raises:
        ConfigError: if the number of folders is not `num_experts`, or architectures differ.
    """
    if len(experts) != settings.num_experts:
        raise ConfigError(
            f"num_experts = {settings.num_experts}, but {len(experts)} experts were given"
        )
    base = load_model(experts[0])
    model = base.model
    states = [model.state_dict(), *(read_weights(folder) for folder in experts[1:])]
    dense = sum(p.numel() for p in model.parameters())
    moe = upcycle(
        model,
        states,
        top_k=settings.top_k,
        image_layers=settings.image_layers,
        text_layers=settings.text_layers,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    save_model(out, model, {**base.spec, "moe": moe}, base.tokenizer)
    total = sum(p.numel() for p in model.parameters())
    log.info(
        "%d experts, top %d: %s parameters (dense %s)",
        len(experts),
        settings.top_k,
        f"{total:,}",
        f"{dense:,}",
    )
    return {"parameters": total, "dense_parameters": dense, "num_experts": len(experts)}
