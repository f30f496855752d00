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

from clipgraft.checkpoint import MERGES, load_model, save_model
from clipgraft.config import AssembleJob, ConfigError
from clipgraft.models.moe import layer_numbers, upcycle

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
    model, spec = load_model(experts[0])
    states = [load_model(folder)[0].state_dict() for folder in experts]
    dense = sum(p.numel() for p in model.parameters())
    depths = [len(tower.transformer.resblocks) for tower in (model.visual, model.text)]
    layers = {
        "image_layers": layer_numbers(settings.image_layers, depths[0], "visual"),
        "text_layers": layer_numbers(settings.text_layers, depths[1], "text"),
    }
    generator = torch.Generator().manual_seed(settings.seed)
    upcycle(model, states, top_k=settings.top_k, generator=generator, **layers)
    moe = {"num_experts": len(experts), "top_k": settings.top_k, **layers}
    save_model(out, model, {**spec, "moe": moe}, experts[0] / MERGES)
    total = sum(p.numel() for p in model.parameters())
    log.info(
        "%d experts, top %d: %s parameters (dense %s)",
        len(experts),
        settings.top_k,
        f"{total:,}",
        f"{dense:,}",
    )
    return {"parameters": total, "dense_parameters": dense, "num_experts": len(experts)}
