"""Data parallelism: every process has all weights (DDP), or a share of them (FSDP2).

With `ddp` gradients are averaged once a step; by `GradientMean`, not torch's DDP, where processes share memory. With
`fsdp` each process keeps 1/n of weights, gradients and the optimizer's moments; a block's weights are gathered when it
runs, and its gradients are averaged and scattered. Three decisions shape it:

- Towers are sharded apart, block by block, and the model itself is not: either tower may be called alone, as a watch
  does. What belongs to neither, the temperature and a bias, every process has; their gradients are averaged here.
- What is saved is whole tensors, by name, whoever holds them. So state goes from one way to the other, and from one
  number of processes to another.
- Both average in float32, and a step is the same but for the order of sums: no version depends on the choice.
"""

# Shapes: E experts, F hidden, D width

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from clipgraft import dist
from clipgraft.recipes import TrainSettings

log = logging.getLogger(__name__)

_BLOCKS = ("resblocks", "blocks", "layers")  # what the lists of a tower's blocks are called


def fit_into_memory(model: nn.Module, settings: TrainSettings, world: dist.World) -> None:
    """Shard a model and compute activations again, in place, as the settings ask for; before its optimizer is made.

    Args:
        model: on the device of training, with the right parameters frozen.
        settings: `parallel` and `grad_checkpointing`.
        world: all processes, which call this together.
    """
    if settings.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if settings.parallel == "ddp":
        return
    if world.size == 1:
        log.warning("parallel: fsdp has no effect in one process")
        return
    _shard(model, world)


def _shard(model: Any, world: dist.World) -> None:
    from torch.distributed.fsdp import fully_shard  # half a second, for those who need it
    from torch.distributed.tensor import Shard

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(sharded_dim(parameter.shape, world.size))

    for tower in (model.visual, model.text):
        for module in (*blocks(tower), tower):
            fully_shard(module, shard_placement_fn=placement, reshard_after_forward=True)


def sharded_dim(shape: Iterable[int], num: int) -> int:
    """Which dimension of a tensor is cut into shares: the first that gives all processes as much, else the first.

    Stacked experts [E, F, D] have fewer rows than there are processes: cut along E, most would hold nothing.
    """
    return next((dim for dim, length in enumerate(shape) if length % num == 0), 0)


def blocks(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a tower, in order."""
    lists = [
        module
        for name, module in tower.named_modules()
        if name.rsplit(".", 1)[-1] in _BLOCKS and isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    return [block for each in lists for block in each]


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules whose weights are gathered and scattered together; none without FSDP."""
    return [each for each in model.modules() if hasattr(each, "set_requires_gradient_sync")]


def in_all_processes(model: nn.Module, world: dist.World) -> nn.Module:
    """What is called in training: the model itself if it is sharded or alone, or processes share memory, else in DDP.

    Without a static graph: with one, torch fails in batches of several parts (`no_sync`), and a step is no faster.
    """
    if world.size == 1 or sharded_modules(model):
        return model
    if dist.shares_memory():
        _check_same(model)
        return model
    return nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, broadcast_buffers=False
    )


def _check_same(model: nn.Module) -> None:
    """What DDP sees to elsewhere: all processes begin with the same weights.

    Raises:
        RuntimeError: if they do not.
    """
    sums_P = torch.stack([p.detach().double().sum() for p in model.parameters()])
    everyone_RP = dist.gather(sums_P[None])
    if not torch.equal(everyone_RP, everyone_RP[:1].expand_as(everyone_RP)):
        raise RuntimeError("processes of one training begin with different weights")


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Gradients are added up in each process, and averaged in a later backward."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
        return
    shards = sharded_modules(model)
    for module in shards:
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for module in shards:
            module.set_requires_gradient_sync(True, recurse=False)


class GradientMean:
    """Averages the gradients that neither way does, in one vector for each dtype, whose views they become.

    Those of projections, and of what belongs to no tower of a sharded model; where processes share memory all gradients.
    """

    def __init__(self, model: nn.Module, projections: nn.Module) -> None:
        """Of all that is trained; by all processes together."""
        is_sharded = bool(sharded_modules(model))
        alone = model.parameters(recurse=not is_sharded)
        kinds: dict[torch.dtype, list[nn.Parameter]] = {}
        if not dist.is_alone():
            for parameter in (
                *projections.parameters(),
                *(alone if is_sharded or dist.shares_memory() else ()),
            ):
                if parameter.requires_grad:
                    kinds.setdefault(parameter.dtype, []).append(parameter)
        self._kinds = [_Averaged(parameters) for parameters in kinds.values()]

    def take(self) -> None:
        """Put the mean over processes in the place of each gradient; by all processes together."""
        for kind in self._kinds:
            kind.take()


class _Averaged:
    """Parameters of one dtype, and the vector of their gradients."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        sizes, first = [p.numel() for p in parameters], parameters[0]
        self._mean = dist.mean_of_vectors(sum(sizes), first.dtype, first.device)
        parts = self._mean.vector_X.split(sizes)
        self._views = [(p, part.view_as(p)) for p, part in zip(parameters, parts, strict=True)]

    def take(self) -> None:
        filled = [(p, view, p.grad) for p, view in self._views if p.grad is not None]
        if filled:
            torch._foreach_copy_([view for _, view, _ in filled], [grad for *_, grad in filled])
        has_gradient = bytes(p.grad is not None for p, _ in self._views)
        self._mean.compute(zlib.crc32(has_gradient))  # the same parameters in all processes
        for parameter, view, _ in filled:
            parameter.grad = view


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale all gradients so that their norm, over all shares, is at most `max_norm`."""
    kinds: dict[bool, list[nn.Parameter]] = {}  # torch takes no list of both
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault(dist.is_share(parameter), []).append(parameter)
    norms = [
        dist.whole(get_total_norm([p.grad for p in kind if p.grad is not None]))
        for kind in kinds.values()
    ]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds.values():
        clip_grads_with_norm_(kind, max_norm, norm)


def state_of(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, is_first: bool
) -> dict[str, Any]:
    """Weights and optimizer as whole tensors, to be saved; by all processes together.

    Args:
        trained: parameters by name.
        optimizer: of these parameters.
        is_first: whether this process saves; the others only give their shares.

    Returns:
        `trained` and `optimizer`, by the names of parameters; empty where nothing is saved.
    """
    saved: dict[str, Any] = {"trained": {}, "optimizer": {}}
    for name, parameter in trained.items():
        parts = {"": parameter.detach(), **optimizer.state.get(parameter, {})}
        for key, part in parts.items():
            if dist.is_share(part):
                parts[key] = dist.whole(part).cpu() if is_first else dist.whole(part)
        if is_first:
            saved["trained"][name] = parts.pop("")
            saved["optimizer"][name] = parts
    return saved


def restore(
    saved: Mapping[str, Any], trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Take over what `state_of` gave, whether it was saved sharded or not."""
    names = {id(parameter): name for name, parameter in trained.items()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(share_like(parameter, saved["trained"][name]))
    state = {
        number: {
            key: share_like(p, value) for key, value in saved["optimizer"][names[id(p)]].items()
        }
        for number, p in enumerate(ordered)
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def share_like(parameter: Tensor, whole: Any) -> Any:
    """This process's share of a tensor that is cut as a parameter is; anything else as it is, but no part of a file."""
    if not dist.is_share(parameter) or getattr(whole, "shape", None) != parameter.shape:
        return whole.clone() if isinstance(whole, Tensor) else whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def put_back(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give some parameters of a whole model other values; `load_state_dict` takes none after `make_whole`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def make_whole(model: nn.Module, is_first: bool) -> None:
    """Give a sharded model its whole weights back, to be saved by the first process; by all processes together."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if dist.is_share(parameter):
                whole = dist.whole(parameter.detach())
                if is_first:
                    whole = nn.Parameter(whole.cpu(), requires_grad=parameter.requires_grad)
                    setattr(module, name, whole)
