"""Stage `finetune_router`: train the routers of an assembled CLIP-MoE; with `train`, its experts or all of it as well.

The loss is contrastive plus, averaged over layers and with both towers equal, a balance loss (1 when even) and the
router z-loss. Both are of the whole batch, over all its parts and processes, so that experts may differ within it.
CLIP-MoE pools the balance loss over layers, which hides a layer that has collapsed; here each layer has its own, unless
`balance: pooled` asks for the published form.
"""

# Shapes: L layers, E experts, S sums

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft import dist
from clipgraft.checkpoint import load_model
from clipgraft.config import ConfigError
from clipgraft.evaluation.watch import open_watch
from clipgraft.losses.balance import (
    RoutingMeans,
    balance_loss,
    pooled_balance_loss,
    routing_sums,
)
from clipgraft.models.moe import insert_experts, keep_kernels, router_parameters, routings
from clipgraft.objectives import Features, Loss, pair_loss
from clipgraft.schedule import num_steps
from clipgraft.settings import RouterJob
from clipgraft.train import Fit
from clipgraft.training_data import Data, ordinary_batches
from clipgraft.training_state import TrainingState

log = logging.getLogger(__name__)

TOWERS = {"image": "visual", "text": "text"}
IDLE = 0.01  # of even use: an expert that was trained for nothing
CROWDED = 0.9  # of the way from even use to all tokens: a dense model in disguise
KERNELS = 256  # of products on a CPU: with fewer, those of experts are made again in each step
PATIENCE = 0.1  # of the training: fresh routers are uneven, and first steps may be large


def finetune_router(
    settings: RouterJob,
    init: Path,
    index: Path,
    shard: Path,
    out: Path,
    *,
    threads: int = 1,
    state: TrainingState | None = None,
    watched: Path | None = None,
) -> dict[str, Any]:
    """Train the routers on ordinary batches, everything else frozen but what `train` unlocks.

    Args:
        settings: length, batch, optimizer, what is trained, loss weights, seed.
        init: folder of the assembled model.
        index: folder with tokens.
        shard: folder with images.
        out: folder for the model and `metrics.jsonl`.
        threads: CPU threads.
        state: where to save and find training state.
        watched: index of the samples that the training is watched on.
    Returns:
        Facts for the manifest.
    Raises:
        ConfigError: if `init` has no routers.
    """
    torch.manual_seed(settings.seed)
    keep_kernels(KERNELS)
    with dist.world() as world:
        data = Data.open(index, shard)
        loaded = load_model(init, insert_experts=insert_experts)
        model, spec = loaded.model, loaded.spec
        if not spec["moe"]:
            raise ConfigError(f"{init} has no routers. Hint: give an assembled model")
        trained = trained_parameters(model, settings.train)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)

        def objective(features: Features, *_: object) -> Loss:
            pair = pair_loss(world, features)
            return pair, {"contrastive": pair.detach()}

        fit = Fit(
            model,
            objective,
            settings,
            data,
            ordinary_batches(data, settings, settings.seed),
            spec,
            settings.seed,
            world,
            threads,
            state,
            extra_loss=RoutingLoss(settings, spec["moe"], is_first=world.is_first),
            lr_of=lr_of_experts(settings, trained.keys() - router_parameters(model).keys()),
            watch=open_watch(settings, watched, spec, loaded.tokenizer, world, threads),
        )
        facts = fit.run(out)
        fit.save(out, loaded.tokenizer)
        bounds = healthy_loads(spec["moe"]["num_experts"], spec["moe"]["top_k"])
        return facts | {"healthy_loads": list(bounds)}


def trained_parameters(model: nn.Module, train: str) -> dict[str, nn.Parameter]:
    """What a router phase trains, by name.

    Args:
        model: with routers.
        train: `routers`; `experts`: the layers that have routers; `all`: what pretraining would, but the temperature,
            which stays as in the training of experts.
    """
    routers = router_parameters(model)
    layers = tuple(name.removesuffix("router") for name in routers)
    kept = {"logit_scale", "logit_bias"}
    return {
        name: p
        for name, p in model.named_parameters()
        if name in routers
        or (train == "experts" and name.startswith(layers))
        or (train == "all" and p.requires_grad and name not in kept)
    }


def lr_of_experts(settings: RouterJob, names: set[str]) -> dict[str, float]:
    """Peak learning rates of what is trained beside the routers; empty where it is theirs."""
    return {} if settings.lr_experts is None else dict.fromkeys(names, settings.lr_experts)


class RoutingLoss:
    """What keeps routers healthy; logs the load of every expert and the entropy of every router, and warns."""

    def __init__(self, settings: RouterJob, moe: Mapping[str, Any], *, is_first: bool) -> None:
        """Begin.

        Args:
            settings: weights and form of the losses, length of the training.
            moe: entry of `model.json`: which layers have experts.
            is_first: whether this process speaks.
        """
        self.settings, self.top_k, self.is_first = settings, moe["top_k"], is_first
        layers = {tower: list(moe[f"{tower}_layers"]) for tower in TOWERS}
        self.layers = {tower: numbers for tower, numbers in layers.items() if numbers}
        self.since: dict[tuple[str, int], int] = {}  # the step in which a layer was found collapsed
        self.warned: set[tuple[str, int]] = set()

    def read(self, model: nn.Module) -> Tensor:
        """Sums of what each router did with the last batch [L, S]: image tower, then text."""
        by_layer = routings(model)
        rows = [
            by_layer[f"{TOWERS[tower]}.{number}"]
            for tower, numbers in self.layers.items()
            for number in numbers
        ]
        return torch.stack([routing_sums(x.logits_TE, x.probs_TE, x.topk_TK) for x in rows])

    def loss(self, sums_LS: Tensor) -> Loss:
        """Balance and z-loss of the whole batch, the same on every process; and what is logged."""
        split = dist.total(sums_LS).split([len(numbers) for numbers in self.layers.values()])
        sums = dict(zip(self.layers, split, strict=True))
        means = {tower: RoutingMeans.of(each) for tower, each in sums.items()}
        values = {
            "balance": _mean([balance_loss(each).mean() for each in means.values()]),
            "z": _mean([each.z_L.mean() for each in means.values()]),
        }
        form = "balance"
        if self.settings.balance == "pooled":  # the balance of each layer is logged all the same
            form = "balance_pooled"
            values[form] = _mean([pooled_balance_loss(each) for each in sums.values()])
        total = self.settings.balance_weight * values[form] + self.settings.z_weight * values["z"]
        values["entropy"] = _mean([each.entropy_L.mean() for each in means.values()])
        for tower, each in means.items():
            values |= {f"load_{tower}": each.load_LE, f"entropy_{tower}": each.entropy_L}
        return total.float(), {name: value.detach() for name, value in values.items()}

    def watch(self, row: Mapping[str, Any]) -> None:
        """Warn once of each layer that stays collapsed for a tenth of the training."""
        for tower, numbers in self.layers.items():
            for number, load_E in zip(numbers, row[f"load_{tower}"], strict=True):
                layer, found = (tower, number), collapse(load_E, self.top_k)
                if not found:
                    self.since.pop(layer, None)
                    continue
                since = self.since.setdefault(layer, row["step"])
                is_short = row["step"] - since < PATIENCE * num_steps(self.settings)
                if is_short or layer in self.warned:
                    continue
                self.warned.add(layer)
                if self.is_first:
                    log.warning(
                        "%s layer %d has collapsed, from step %d to %d: %s. Hint: a larger balance_weight or optim.lr, "
                        "or fewer experts",
                        *layer,
                        since,
                        row["step"],
                        found,
                    )


def collapse(load_E: Sequence[float], top_k: int) -> str:
    """Which experts of a layer get too little or too much, in words; empty if none does.

    Args:
        load_E: shares of the choices.
        top_k: choices per token; an expert's share is 1 / top_k if every token chooses it.
    """
    low, high = healthy_loads(len(load_E), top_k)
    return ", ".join(
        f"expert {expert} gets {100 * load * top_k:.3g} % of the tokens"
        for expert, load in enumerate(load_E)
        if not low <= load <= high
    )


def healthy_loads(num_experts: int, top_k: int) -> tuple[float, float]:
    """Loads of an expert beyond which its layer has collapsed.

    It is idle below a hundredth of even use, and takes all from nine tenths of the way between even use and every token
    on. (Where top_k is near the number of experts even use is near every token, so a fixed share would not do.)
    """
    even, every = 1 / num_experts, 1 / top_k
    high = even + CROWDED * (every - even)
    return IDLE * even, high * (1 + 1e-6)  # loads are float32: 1 / 3 of them is above 1 / 3


def _mean(of_towers: list[Tensor]) -> Tensor:
    return torch.stack(of_towers).mean()
