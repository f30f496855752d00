"""Stage `finetune_router`: train the routers of an assembled CLIP-MoE, and nothing else.

The loss is contrastive plus, averaged over layers and with both towers equal, a balance loss (1 when even) and the
router z-loss. CLIP-MoE pools the balance loss over layers, which hides a layer that has collapsed; here each layer
has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft import dist
from clipgraft.checkpoint import TrainingState, load_model, save_model
from clipgraft.config import ConfigError
from clipgraft.losses.balance import balance_loss, z_loss
from clipgraft.models.moe import Routing, insert_experts, router_parameters, routings
from clipgraft.objectives import Features, pair_loss
from clipgraft.settings import RouterJob
from clipgraft.train import Data, ExtraLoss, Fit, ordinary_batches


def finetune_router(
    settings: RouterJob,
    init: Path,
    index: Path,
    shard: Path,
    out: Path,
    *,
    threads: int = 1,
    state: TrainingState | None = None,
) -> dict[str, Any]:
    """Train the routers on ordinary batches, everything else frozen, the temperature included.

    Args:
        settings: length, batch, optimizer, loss weights, seed.
        init: folder of the assembled model.
        index: folder with tokens.
        shard: folder with images.
        out: folder for the model and `metrics.jsonl`.
        threads: CPU threads.
        state: where to save and find training state.
    Returns:
        Facts for the manifest.
    Raises:
        ConfigError: if `init` has no routers.
    """
    torch.manual_seed(settings.seed)
    with dist.world() as world:
        data = Data.open(index, shard)
        loaded = load_model(init, insert_experts=insert_experts)
        model, spec = loaded.model, loaded.spec
        trained = router_parameters(model)
        if not trained:
            raise ConfigError(f"{init} has no routers. Hint: give an assembled model")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        vision, text = spec["config"]["vision_cfg"], spec["config"]["text_cfg"]

        def objective(features: Features, *_: object) -> tuple[Tensor, dict[str, Tensor]]:
            pair = pair_loss(world, features)
            return pair, {"contrastive": pair.detach()}

        fit = Fit(
            model,
            objective,
            settings,
            data,
            ordinary_batches(data, settings, settings.seed),
            vision["image_size"],
            text["context_length"],
            spec["preprocess"],
            settings.seed,
            world,
            threads,
            state,
            extra_loss=routing_loss(settings),
        )
        facts = fit.run(out)
        if world.is_first:
            spec = spec | {"samples_seen": spec["samples_seen"] + facts["samples_seen"]}
            save_model(out, model, spec, loaded.tokenizer)
        return facts


def routing_loss(settings: RouterJob) -> ExtraLoss:
    """What keeps routers healthy; logs the load of every expert in every layer."""

    def extra_loss(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        by_layer = routings(model)
        balance, z = mean_over_towers(by_layer, balance_of), mean_over_towers(by_layer, z_of)
        loss = settings.balance_weight * balance + settings.z_weight * z
        extras = {"balance": balance.detach(), "z": z.detach()}
        extras |= {f"load_{tower}": loads for tower, loads in expert_loads(by_layer).items()}
        return loss, extras | {"entropy": mean_over_towers(by_layer, entropy_of).detach()}

    return extra_loss


def balance_of(routing: Routing) -> Tensor:
    """Balance loss of one layer."""
    return balance_loss(routing.probs_TE, routing.topk_TK)


def z_of(routing: Routing) -> Tensor:
    """Router z-loss of one layer."""
    return z_loss(routing.logits_TE)


def entropy_of(routing: Routing) -> Tensor:
    """Mean entropy of a token's router distribution, in nats; log E where the router has no opinion."""
    return -(routing.probs_TE * routing.probs_TE.clamp_min(1e-9).log()).sum(1).mean()


def mean_over_towers(by_layer: dict[str, Routing], value_of: Callable[[Routing], Tensor]) -> Tensor:
    """Mean over the layers of a tower, then over towers."""
    towers: dict[str, list[Tensor]] = {}
    for layer, routing in by_layer.items():
        towers.setdefault(layer.split(".")[0], []).append(value_of(routing))
    return torch.stack([torch.stack(values).mean() for values in towers.values()]).mean()


def expert_loads(by_layer: dict[str, Routing]) -> dict[str, Tensor]:
    """Share of the choices that went to each expert: tower to [layers, experts]; uniform is 1/E."""
    towers: dict[str, list[Tensor]] = {}
    for layer, routing in by_layer.items():
        num_experts = routing.probs_TE.shape[1]
        counts_E = torch.bincount(routing.topk_TK.flatten(), minlength=num_experts)
        tower = "image" if layer.startswith("visual") else "text"
        towers.setdefault(tower, []).append(counts_E / counts_E.sum())
    return {tower: torch.stack(loads) for tower, loads in towers.items()}
