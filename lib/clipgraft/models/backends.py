"""Tokens through their experts: three ways of execution, one result.

`loop` sorts the rows (token, choice) by expert and runs each expert on its rows, and on a few more, so that their
numbers repeat: on CPUs it is as fast as the products allow. `grouped` runs the sorted rows through one grouped
product per matrix, so that the host never waits for the device to learn how many rows an expert has; it is taken for
bf16 on compute capability 9, where torch's is fast and known to be right. `dense` runs all experts on all tokens, E / K
times the work, and no shape in it depends on the data: for export, and to test the others. Rows are brought to experts
and back by permutations, forward and backward, never by sums in the order in which threads arrive: the same result on
every run. Which way is taken is no setting, for it changes nothing but speed.
"""

# Shapes: T tokens, P = T * K choices, R >= P rows that experts run on, D width, F hidden, E experts, K top-k

from __future__ import annotations

import functools
import logging
import operator
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from clipgraft.config import ConfigError
from clipgraft.models.padding import pick_rows

log = logging.getLogger(__name__)

VARIABLE = "CLIPGRAFT_MOE_BACKEND"
BACKENDS = ("auto", "loop", "grouped", "dense")
# Below 9 torch's grouped product is a loop that waits for the device. On 10 gradients of experts without rows were
# garbage (pytorch issue 172439, open). CUTLASS 4.3, older than torch 2.11, has a fix, but nobody has yet run
# `tests/models/test_backends.py` on such a device.
_FAST_MAJORS = (9,)
_ALIGNMENT = 8  # bf16 numbers in the 16 bytes that strides must be multiples of

_LEAST_STEP, _STEPS = 32, 128  # of the rows of an expert on the host
_probed: dict[int | None, bool] = {}


class Experts(NamedTuple):
    """The MLPs of a layer, stacked."""

    fc_EFD: Tensor
    fc_bias_EF: Tensor
    proj_EDF: Tensor
    proj_bias_ED: Tensor
    gelu: Callable[[Tensor], Tensor]


def wished_backend(width: int, hidden: int) -> str:
    """What CLIPGRAFT_MOE_BACKEND asks for, by default `auto`.

    Args:
        width: D of the layers.
        hidden: F of the layers.

    Raises:
        ConfigError: if there is no such backend, or it cannot run these layers.
    """
    wish = os.environ.get(VARIABLE, "auto")
    if wish not in BACKENDS:
        raise ConfigError(f"{VARIABLE} = {wish!r} is unknown. Hint: {', '.join(BACKENDS)}")
    if wish == "grouped" and not _fits_grouped(width, hidden):
        raise ConfigError(
            f"{VARIABLE} = grouped: torch {torch.__version__} cannot for MLPs of {width} and {hidden}. Hint: torch 2.10 "
            f"or later and multiples of {_ALIGNMENT}; or leave {VARIABLE} unset"
        )
    return wish


def choose_backend(wish: str, x_TD: Tensor, hidden: int) -> str:
    """The backend for these tokens: `grouped` where it is fast, else `loop`, unless one is wished for."""
    if wish != "auto":
        return wish
    is_fast = (
        x_TD.is_cuda
        and compute_dtype(x_TD) == torch.bfloat16
        and _fits_grouped(x_TD.shape[1], hidden)
        and _grouped_works(x_TD.device)
    )
    return "grouped" if is_fast else "loop"


def mix(experts: Experts, x_TD: Tensor, gates_TK: Tensor, topk_TK: Tensor, backend: str) -> Tensor:
    """Sum over the K experts of each token, weighted with its gates.

    Args:
        experts: of one layer.
        x_TD: tokens.
        gates_TK: float32; their gradient is that of the weighted sum.
        topk_TK: which experts.
        backend: `loop`, `grouped` or `dense`.

    Returns:
        [T, D], in the precision of the products; gradients of experts without tokens are zero, not missing.
    """
    x_TD = x_TD.to(compute_dtype(x_TD))  # before it is repeated
    if backend == "dense":
        return _dense(experts, x_TD, gates_TK, topk_TK)
    expert_P, order_P = topk_TK.flatten().sort(stable=True)
    run = _grouped if backend == "grouped" else _loop
    y_PD = run(experts, x_TD, expert_P, order_P, topk_TK.shape[1])
    return _Weigh.apply(y_PD.view(*topk_TK.shape, y_PD.shape[1]), gates_TK)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products of this tensor are computed in: autocast's precision, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _loop(experts: Experts, x_TD: Tensor, expert_P: Tensor, order_P: Tensor, top_k: int) -> Tensor:
    """One expert after the other, each on its rows, made up to whole steps with rows that nobody reads.

    oneDNN makes a kernel for each shape it meets, which takes longer than a small product itself.
    """
    step = _row_step(len(expert_P))
    num_E = expert_P.bincount(minlength=len(experts.fc_EFD))
    room_E = (num_E + step - 1) // step * step
    moved_E = (room_E - num_E).cumsum(0) - (room_E - num_E)
    number_P = torch.arange(len(order_P), device=order_P.device)
    place_P = torch.empty_like(order_P).index_copy_(0, order_P, number_P + moved_E[expert_P])
    rooms = room_E.tolist()
    nobody = len(order_P)
    choice_R = order_P.new_full([sum(rooms)], nobody).index_copy_(0, place_P, number_P)
    x_RD = _Repeat.apply(x_TD, choice_R.clamp(max=nobody - 1) // top_k, place_P, top_k)
    # An expert without rows is run all the same, for its gradient.
    gelu = experts.gelu
    parts = zip(
        x_RD.split(rooms),
        *(_unstacked(tensor, x_RD.dtype) for tensor in experts[:4]),
        strict=True,
    )
    y_RD = torch.cat([F.linear(gelu(F.linear(x, w1, b1)), w2, b2) for x, w1, b1, w2, b2 in parts])
    return pick_rows(y_RD, place_P, choice_R)


def _row_step(num_rows: int) -> int:
    """A power of two: few hundred numbers of rows are left, and an expert has less than a 64th of all rows too many."""
    return max(_LEAST_STEP, 1 << (num_rows // _STEPS).bit_length())


def _grouped(
    experts: Experts, x_TD: Tensor, expert_P: Tensor, order_P: Tensor, top_k: int
) -> Tensor:
    """With biases as products, too: their gradients, sums over the rows of an expert, come out the same every time."""
    place_P = order_P.argsort()
    x_PD = _Repeat.apply(x_TD, order_P // top_k, place_P, top_k)
    dtype = x_PD.dtype
    number_E = torch.arange(len(experts.fc_EFD), device=x_PD.device)
    ends_E = torch.searchsorted(expert_P, number_E, right=True).int()
    with torch.autocast(x_PD.device.type, enabled=False):  # it does not know grouped products
        fc_EFD, fc_bias_EF, proj_EDF, proj_bias_ED = (tensor.to(dtype) for tensor in experts[:4])
        is_expert_PE = (expert_P[:, None] == number_E).to(dtype)
        h_PF = F.grouped_mm(x_PD, fc_EFD.transpose(1, 2), offs=ends_E)
        h_PF = experts.gelu(h_PF.addmm(is_expert_PE, fc_bias_EF))
        y_PD = F.grouped_mm(h_PF, proj_EDF.transpose(1, 2), offs=ends_E)
        return pick_rows(y_PD.addmm(is_expert_PE, proj_bias_ED), place_P, order_P)


def _dense(experts: Experts, x_TD: Tensor, gates_TK: Tensor, topk_TK: Tensor) -> Tensor:
    num_experts, gelu = len(experts.fc_EFD), experts.gelu
    # Not len(x_TD), which would be a constant in what torch.export makes of it.
    gates_TE = gates_TK.new_zeros(x_TD.shape[0], num_experts).scatter(1, topk_TK, gates_TK)
    parts = zip(gates_TE.unbind(1), *(tensor.unbind() for tensor in experts[:4]), strict=True)
    y_TD = sum(
        gate_T[:, None] * F.linear(gelu(F.linear(x_TD, w1, b1)), w2, b2)
        for gate_T, w1, b1, w2, b2 in parts
    )
    assert isinstance(y_TD, Tensor)
    return y_TD.to(compute_dtype(x_TD))


def _unstacked(stack: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The experts of a stack, in this precision; on a CPU what is not trained is brought to it once, not in each step."""
    if stack.requires_grad:
        return _Unstack.apply(stack, dtype)
    is_kept = stack.device.type == "cpu" and stack.dtype != dtype
    if not is_kept or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
        return stack.to(dtype).unbind()
    version, copy = _copies.get(stack, (-1, stack))
    if version != stack._version or copy.dtype != dtype:
        copy = stack.to(dtype)
        _copies[stack] = stack._version, copy
    return copy.unbind()


_copies = WeakIdKeyDictionary()


class _Unstack(torch.autograd.Function):
    """The experts of a stack, in this precision; backward, each gradient is written once, to its place in the stack."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        ctx.dtype = stack.dtype
        return stack.to(dtype).unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        stack = grads[0].new_empty(len(grads), *grads[0].shape, dtype=ctx.dtype)
        for place, grad in zip(stack, grads, strict=True):
            place.copy_(grad)
        return stack, None


class _Repeat(torch.autograd.Function):
    """A token for each of R rows; backward, the sum over its K choices. Rows that are no choice's are not looked at."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, place_P: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place_P)
        ctx.top_k = top_k
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        (place_P,) = ctx.saved_tensors
        grad_TKD = grad_RD.index_select(0, place_P).view(-1, ctx.top_k, grad_RD.shape[1])
        return _sum(grad_TKD), None, None, None


class _Weigh(torch.autograd.Function):
    """The sum over the K choices of each token, weighted with its gates, in float32."""

    @staticmethod
    def forward(ctx: Any, y_TKD: Tensor, gates_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_TKD, gates_TK)
        return _sum(y_TKD, gates_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
        y_TKD, gates_TK = ctx.saved_tensors
        grad_T1D = grad_TD.to(_exact(y_TKD))[:, None]
        grad_TKD = (grad_T1D * gates_TK[..., None]).to(y_TKD.dtype)
        return grad_TKD, (grad_T1D * y_TKD.to(grad_T1D.dtype)).sum(2).to(gates_TK.dtype)


def _sum(x_TKD: Tensor, gates_TK: Tensor | None = None) -> Tensor:
    """Over the K of each token, maybe weighted; float32 on the way.

    On a CPU one after the other: torch's own sum over a short axis that is not the last takes five times as long there,
    and a product of numbers of 16 and of 32 bits three times.
    """
    if x_TKD.device.type != "cpu":
        weighted = x_TKD if gates_TK is None else x_TKD * gates_TK[..., None]
        return weighted.sum(1).to(x_TKD.dtype)
    parts = [x_TD.to(_exact(x_TKD)) for x_TD in x_TKD.unbind(1)]
    if gates_TK is not None:
        parts = [
            x_TD * gate_T[:, None] for x_TD, gate_T in zip(parts, gates_TK.unbind(1), strict=True)
        ]
    return functools.reduce(operator.add, parts).to(x_TKD.dtype)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fits_grouped(width: int, hidden: int) -> bool:
    return hasattr(F, "grouped_mm") and width % _ALIGNMENT == 0 and hidden % _ALIGNMENT == 0


def _grouped_works(device: torch.device) -> bool:
    """Whether torch's grouped product is the fast one on this device, and runs; asked once per device."""
    if device.index not in _probed:
        is_fast = torch.cuda.get_device_capability(device)[0] in _FAST_MAJORS
        _probed[device.index] = is_fast and probe_grouped(device)
    return _probed[device.index]


def probe_grouped(device: torch.device) -> bool:
    """Whether a small grouped product runs on this device, forward and backward; says so in the log if it does not."""
    try:
        with torch.inference_mode(False), torch.enable_grad():  # an evaluation may ask
            x_PD = torch.ones(16, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
            ends_E = torch.tensor([16, 16], device=device, dtype=torch.int32)
            y_PD = F.grouped_mm(x_PD, torch.stack([x_PD, x_PD]), offs=ends_E)
            torch.autograd.grad(y_PD, x_PD, torch.ones_like(y_PD))  # rows and weights: of both
    except RuntimeError as error:  # NotImplementedError is one, too
        log.warning("experts run one by one: no grouped product on %s: %s", device, error)
        return False
    return True
