"""Optimizers: which parameters decay, and AdamW, LAMB, Lion and SGD over them.

AdamW and SGD are torch's. LAMB and Lion are here, because torch has neither, and timm's would cost the import of all of
its models.
"""

# Shapes: P parameters of a group

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft import dist
from clipgraft.loss_settings import LossSettings
from clipgraft.recipes import OptimSettings, TrainSettings
from clipgraft.schedule import cosine_lr, num_steps, num_warmup_steps, peak_lr

TEMPERATURE = (
    "temperature"  # name of the group of logit_scale, where it has a learning rate of its own
)
_UNDECAYED = ("bn", "ln", "bias", "logit_scale")  # open_clip's list


def parameter_groups(
    named_parameters: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: decayed, not decayed, frozen ones left out.

    Norms, biases and logit_scale are not decayed, as in open_clip (token and position tables are). Biases are
    recognised by name, too, because those of stacked experts have two dimensions.
    """
    trained = {name: p for name, p in named_parameters.items() if p.requires_grad}
    kept = {
        name: p
        for name, p in trained.items()
        if p.ndim < 2 or any(part in name for part in _UNDECAYED)
    }
    decayed = [p for name, p in trained.items() if name not in kept]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": list(kept.values()), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    named_parameters: Mapping[str, nn.Parameter],
    settings: OptimSettings,
    lr: float,
    temperature_apart: bool = False,
    lr_of: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of the parameters that want a gradient; the caller sets the learning rate of each step.

    Args:
        named_parameters: frozen ones are left out.
        settings: which one, weight decay, betas and the like.
        lr: the peak.
        temperature_apart: whether logit_scale gets a group of its own, called `TEMPERATURE`.
        lr_of: peaks of parameters that have their own; their groups say under `lr_factor` by how much it is higher.
    """
    apart = {"logit_scale"} if temperature_apart else set()
    parts: dict[
        tuple[float, bool], dict[str, nn.Parameter]
    ] = {}  # torch mixes no shares with others
    for name, p in named_parameters.items():
        if name not in apart:
            factor = (lr_of or {}).get(name, lr) / lr
            parts.setdefault((factor, dist.is_share(p)), {})[name] = p
    groups = [
        {**group, "lr_factor": factor}
        for (factor, _), part in parts.items()
        for group in parameter_groups(part, settings.weight_decay)
    ]
    taus = [p for name, p in named_parameters.items() if name in apart and p.requires_grad]
    if taus:
        groups.append({"params": taus, "weight_decay": 0.0, "name": TEMPERATURE})
    betas = settings.beta1, settings.beta2
    if settings.name == "lamb":
        return Lamb(groups, lr, betas, settings.eps)
    if settings.name == "lion":
        return Lion(groups, lr, betas)
    if settings.name == "sgd":
        # Not fused: torch's kernel fails where a parameter gets its first gradient later than others.
        return torch.optim.SGD(groups, lr, settings.momentum)
    devices = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(groups, lr, betas, settings.eps, fused=devices <= {"cuda", "cpu"})


class _ForEach(torch.optim.Optimizer):
    """Changes all parameters of a group that have a gradient together."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._change(group, params, [p.grad for p in params])

    def _change(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        raise NotImplementedError


class Lamb(_ForEach):
    """Adam whose steps are as long as the parameters they change (LAMB, arXiv:1904.00962, Alg. 2).

    As in FastCLIP's code, weight decay is a part of the step, and groups without it take plain Adam's: norms and biases
    begin at 0 or 1, which is no measure for their steps.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        """Groups bring their weight decay along."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    def _change(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        steps = [self._next(p) for p in params]
        means = [self.state[p]["mean"] for p in params]
        squares = [self.state[p]["square"] for p in params]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        updates = torch._foreach_div(means, [1 - beta1**step for step in steps])
        sizes = torch._foreach_sqrt(squares)
        torch._foreach_div_(sizes, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(sizes, group["eps"])
        torch._foreach_div_(updates, sizes)
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, _trust_ratios(params, updates))
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _next(self, p: Tensor) -> int:
        """Number of the step that a parameter takes now, from 1."""
        state = self.state[p]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        state["step"] += 1
        return int(state["step"])


def _trust_ratios(params: list[Tensor], updates: tuple[Tensor, ...]) -> list[Tensor]:
    """Norm of each parameter over that of its update; 1 where either is 0. Stays on the device."""
    norm_P, update_P = (torch.stack(torch._foreach_norm(each)) for each in (params, updates))
    has_both_P = (norm_P > 0) & (update_P > 0)
    return list(torch.where(has_both_P, norm_P / update_P, 1.0).unbind())


class Lion(_ForEach):
    """Steps of one size, in the direction of the sign of the momentum (Lion, arXiv:2302.06675, Alg. 2)."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        """Groups bring their weight decay along."""
        super().__init__(groups, {"lr": lr, "betas": betas})

    def _change(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["mean"] = torch.zeros_like(p)
        means = [self.state[p]["mean"] for p in params]
        beta1, beta2 = group["betas"]
        updates = torch._foreach_lerp(means, gradients, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])
        torch._foreach_lerp_(means, gradients, 1 - beta2)


def set_rates(
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    loss: LossSettings,
    step: int,
    tau: Callable[[], float],
) -> float:
    """Set the learning rates of a step, and return that of the model.

    Args:
        optimizer: from `build_optimizer`.
        settings: length, batch and schedule.
        loss: schedule of the temperature.
        step: steps done before.
        tau: as of `tau_lr`.
    """
    peak, optim = peak_lr(settings), settings.optim
    lr = cosine_lr(step, num_steps(settings), num_warmup_steps(settings), peak, optim.lr_min)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
        if group.get("name") == TEMPERATURE:
            group["lr"] = tau_lr(loss, lr / peak, tau)
    return lr


def tau_lr(loss: LossSettings, progress: float, tau: Callable[[], float]) -> float:
    """Learning rate of logit_scale, where it has one of its own.

    Args:
        loss: its schedule.
        progress: the model's learning rate now, over its peak.
        tau: reads what it is now, for which a device is waited for; `step_thresh` alone does, and depends on nothing
            else, so that a resumed run needs no memory.
    """
    assert loss.lr_tau is not None
    if loss.lr_tau_schedule == "cosine":
        return loss.lr_tau * progress
    is_low = loss.lr_tau_schedule == "step_thresh" and tau() <= loss.lr_tau_threshold
    return loss.lr_tau * (loss.lr_tau_factor if is_low else 1)
