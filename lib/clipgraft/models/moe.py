"""Mixture-of-experts MLPs, grafted in place of the dense MLPs of an open_clip model.

Each token goes through the top_k experts that a linear router likes best; their outputs are summed with the
renormalised probabilities, which add up to 1, so that identical experts are the dense model exactly. Decisions:
weights of all experts of a layer are stacked, `[E, F, D]`; the router is float32 whatever autocast says; no token
is ever dropped; padding after the end token is not routed at all and gets a zero where nothing that is used later
can see it, and is routed like any token where it can (no causal mask, or features of the last position). Towers, not
layers, know which tokens are padding and whether this is a real forward or the second one of gradient checkpointing:
hooks on the tower tell its layers through a `TowerState`. How experts are run is in `backends.py`.
"""

# Shapes: B batch, L sequence, T tokens, D width, F hidden, E experts, K top-k

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft import devices
from clipgraft.config import ConfigError
from clipgraft.models.backends import (
    Experts,
    choose_backend,
    mix,
    wished_backend,
)
from clipgraft.models.build import Layers, is_padding_unseen, layer_numbers
from clipgraft.models.padding import pick_rows, places, real_tokens, with_padding

TOWERS = ("visual", "text")
_MLP_TENSORS = ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")


@dataclass(frozen=True)
class Routing:
    """What the router of one layer decided in the last forward; rows are tokens, padding left out."""

    logits_TE: Tensor
    probs_TE: Tensor
    topk_TK: Tensor


@dataclass
class TowerState:
    """What the MoE layers of a tower must know of the forward they are in."""

    is_forward: bool = False  # false while gradient checkpointing computes a block again
    real_BL: Tensor | None = None  # tokens that are not padding; None: all are, or padding is seen
    real_T: Tensor | None = None  # their places in the flattened batch, found once for all layers
    place_N: Tensor | None = None  # the way back: of each token its number among them; of padding T
    told: tuple[Tensor, Tensor] | None = None  # both of the next batch, from `tell_real_tokens`
    is_padding_unseen: bool = False
    backend: str = "auto"

    def tell_real_tokens(self, text_BL: Tensor, device: torch.device) -> None:
        """Find those of the next texts before they are sent to the device.

        Without it the text tower looks itself, and a GPU waits until the host knows how many there are.
        """
        if self.is_padding_unseen:
            real_T, place_N = places(real_tokens(text_BL).flatten())
            self.told = devices.send(real_T, device), devices.send(place_N, device)


class MoeMlp(nn.Module):
    """Experts and their router, in place of the MLP of one block."""

    def __init__(self, dense: nn.Module, num_experts: int, top_k: int, state: TowerState) -> None:
        """Take over the activation and the sizes of a dense MLP; weights are left uninitialised.

        Args:
            dense: open_clip's `Sequential(c_fc, gelu, c_proj)`.
            num_experts: E.
            top_k: experts per token.
            state: shared by the layers of a tower.
        """
        super().__init__()
        width, hidden = dense.c_fc.in_features, dense.c_fc.out_features
        like = dense.c_fc.weight
        self.c_fc_weight = nn.Parameter(like.new_empty(num_experts, hidden, width))
        self.c_fc_bias = nn.Parameter(like.new_empty(num_experts, hidden))
        self.c_proj_weight = nn.Parameter(like.new_empty(num_experts, width, hidden))
        self.c_proj_bias = nn.Parameter(like.new_empty(num_experts, width))
        self.router = nn.Parameter(like.new_empty(num_experts, width, dtype=torch.float32))
        self.gelu = dense.gelu
        self.top_k = top_k
        self.state = state
        self.routing: Routing | None = None

    @property
    def c_fc(self) -> SimpleNamespace:
        """For open_clip, which looks up the dtype of a tower at `mlp.c_fc.weight` of its first block."""
        return SimpleNamespace(weight=self.c_fc_weight)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Route each real token to its experts; padding gets zeros."""
        state, x_ND = self.state, x_BLD.flatten(0, 1)
        if state.real_T is None:
            return self._mix(x_ND).view(x_BLD.shape)
        assert state.real_BL is not None and state.place_N is not None
        assert state.real_BL.shape == x_BLD.shape[:2], "the tower has seen another batch since"
        y_TD = self._mix(pick_rows(x_ND, state.real_T, state.place_N))
        return with_padding(y_TD, state.real_T, state.place_N).view(x_BLD.shape)

    def _mix(self, x_TD: Tensor) -> Tensor:
        gates_TK, topk_TK = self._route(x_TD)
        experts = Experts(
            self.c_fc_weight, self.c_fc_bias, self.c_proj_weight, self.c_proj_bias, self.gelu
        )
        backend = choose_backend(self.state.backend, x_TD, self.c_fc_bias.shape[1])
        return mix(experts, x_TD, gates_TK, topk_TK, backend)

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        # Written out again in `export/modeling_clipgraft.py`, which stands alone; `models/released.py` stores its weights.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.router.float())
            probs_TE = logits_TE.softmax(1)
            gates_TK, topk_TK = probs_TE.topk(self.top_k, dim=1)
            gates_TK = gates_TK / gates_TK.sum(1, keepdim=True)
        if self.state.is_forward:
            self.routing = Routing(logits_TE, probs_TE, topk_TK)
        return gates_TK, topk_TK


def upcycle(
    model: nn.Module,
    expert_state_dicts: Sequence[Mapping[str, Tensor]],
    *,
    top_k: int,
    image_layers: Layers,
    text_layers: Layers,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Make a dense model a mixture of experts, in place.

    Everything but the MLPs stays as it is in `model` (expert 0).

    Args:
        model: dense.
        expert_state_dicts: one per expert, expert 0 first; at least the MLP tensors, named as in the dense model.
        top_k: experts per token.
        image_layers: blocks of the image tower that get experts, or "all".
        text_layers: the same for the text tower.
        generator: for the routers, U(-1/sqrt(D), 1/sqrt(D)).

    Returns:
        What `insert_experts` needs to make this model again: the `moe` entry of `model.json`.

    Raises:
        ConfigError: if a block does not exist, an expert lacks a tensor or has another shape, or top_k is too large.
    """
    moe_spec = insert_experts(
        model, len(expert_state_dicts), top_k, image_layers=image_layers, text_layers=text_layers
    )
    for path, moe in _moe_layers(model):
        bound = 1 / math.sqrt(moe.router.shape[1])
        values = torch.rand(moe.router.shape, generator=generator, dtype=torch.float32)
        with torch.no_grad():
            moe.router.copy_((2 * values - 1) * bound)
            for tensor in _MLP_TENSORS:
                stack = getattr(moe, tensor.replace(".", "_"))
                for e, expert in enumerate(expert_state_dicts):
                    stack[e].copy_(_expert_tensor(expert, f"{path}.{tensor}", e, stack[e]))
    return moe_spec


def insert_experts(
    model: nn.Module,
    num_experts: int,
    top_k: int,
    *,
    image_layers: Layers,
    text_layers: Layers,
) -> dict[str, Any]:
    """Replace dense MLPs by uninitialised `MoeMlp`, in place; for `upcycle`, and for loading.

    Returns:
        The arguments, with layers spelled out.

    Raises:
        ConfigError: if a block does not exist, or top_k is too large.
    """
    keep_kernels(32)  # buffers of float32 products take gigabytes
    if not 1 <= top_k <= num_experts:
        raise ConfigError(
            f"moe.top_k = {top_k} of {num_experts} experts. Hint: 1 to {num_experts}; num_experts counts expert 0"
        )
    spelled_out: dict[str, list[int]] = {}
    for tower, layers in zip(TOWERS, (image_layers, text_layers), strict=True):
        module = getattr(model, tower)
        blocks = module.transformer.resblocks
        numbers = layer_numbers(layers, len(blocks), tower)
        state = TowerState()
        for number in numbers:
            _check_plain(blocks[number].mlp, f"{tower}.{number}")
            c_fc = blocks[number].mlp.c_fc
            state.backend = wished_backend(c_fc.in_features, c_fc.out_features)
            blocks[number].mlp = MoeMlp(blocks[number].mlp, num_experts, top_k, state)
        if numbers:
            _hook(module, state, is_text=tower == "text")
        spelled_out["image_layers" if tower == "visual" else "text_layers"] = numbers
    return {"num_experts": num_experts, "top_k": top_k, **spelled_out}


def keep_kernels(num: int) -> None:
    """How many kernels oneDNN keeps with their buffers, one for each shape of a product; its default is 1,024.

    Read at a process's first product; who asks first is heard, and ONEDNN_PRIMITIVE_CACHE_CAPACITY before all.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(num))


def routings(model: nn.Module) -> dict[str, Routing]:
    """Routing of each MoE layer in the last forward of its tower, e.g. `visual.3`; handed over, not kept."""
    taken = {}
    for path, moe in _moe_layers(model):
        if moe.routing is not None:
            tower, number = path.split(".")[0], path.split(".")[3]
            taken[f"{tower}.{number}"] = moe.routing
            moe.routing = None
    return taken


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The routers, by parameter name."""
    return {f"{path}.router": moe.router for path, moe in _moe_layers(model)}


def _moe_layers(model: nn.Module) -> list[tuple[str, MoeMlp]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, MoeMlp)]


def _expert_tensor(expert: Mapping[str, Tensor], name: str, number: int, like: Tensor) -> Tensor:
    if name not in expert or expert[name].shape != like.shape:
        has = f"has {list(expert[name].shape)} for" if name in expert else "lacks"
        raise ConfigError(
            f"expert {number} {has} {name}, the model has {list(like.shape)}. Hint: all experts must be "
            "fine-tuned from the same base model"
        )
    return expert[name]


def _check_plain(mlp: nn.Module, where: str) -> None:
    if not isinstance(getattr(mlp, "ln", nn.Identity()), nn.Identity):
        raise ConfigError(
            f"moe: the MLP of {where} has a norm inside (scale_fc). Hint: not supported"
        )


def _hook(tower: nn.Module, state: TowerState, *, is_text: bool) -> None:
    """Tell the layers of a tower which forward they are in, and which tokens nothing will look at."""
    tower.moe_state = state  # found through the tower, so that a deep copy has its own
    state.is_padding_unseen = is_text and is_padding_unseen(tower)
    tower.register_forward_pre_hook(_before_text if state.is_padding_unseen else _before)
    tower.register_forward_hook(_after, always_call=True)


def _before(tower: nn.Module, _: tuple[Any, ...]) -> None:
    tower.moe_state.is_forward = True


def _before_text(tower: nn.Module, arguments: tuple[Any, ...]) -> None:
    _before(tower, arguments)
    state, text_BL = tower.moe_state, arguments[0]
    state.real_BL = real_tokens(text_BL)
    told, state.told = state.told, None
    state.real_T, state.place_N = told or places(state.real_BL.flatten())


def _after(tower: nn.Module, *_: Any) -> None:
    tower.moe_state.is_forward = False  # real_BL stays, for blocks computed again in backward
