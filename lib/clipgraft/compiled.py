"""Compiled blocks: `compile` and `cuda_graphs` of a training.

Blocks are compiled one by one, in place, so that parameters keep their names and FSDP, checkpointing and hooks see the
modules they know; blocks of one shape share their code. Those with experts are left alone: how many rows an expert
gets is known on the device only.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from clipgraft import parallel
from clipgraft.config import ConfigError
from clipgraft.recipes import TrainSettings

log = logging.getLogger(__name__)

_COMPILERS = ("g++", "clang++", "c++")
# Of the code that all blocks share: shapes, the last block's own, with gradients and without. Torch's 8 are too few, and
# beyond them blocks would run as they are, without a word.
_VARIANTS = 64


def compile_blocks(model: Any, settings: TrainSettings, device: torch.device) -> None:
    """Compile the blocks of both towers as the settings ask for; they are compiled when they first run.

    Args:
        model: before it is sharded.
        settings: `compile` and `cuda_graphs`.
        device: of training.

    Raises:
        ConfigError: if there is no C++ compiler, or no block that can be compiled.
    """
    if not settings.compile:
        return
    check_compiler()
    blocks = [*parallel.blocks(model.visual), *parallel.blocks(model.text)]
    plain = [block for block in blocks if not has_experts(block)]
    if not plain:
        raise ConfigError(
            "compile = true has no effect: every block has experts. Hint: compile: false"
        )
    if settings.cuda_graphs and device.type != "cuda":
        log.warning("cuda_graphs has no effect on %s", device.type)
    from torch._dynamo import config  # seconds, for those who compile

    config.recompile_limit = _VARIANTS
    for block in plain:
        block.compile(mode="reduce-overhead" if has_graphs(settings, device) else None)
    # Without padding the number of tokens changes with the batch, and code is of fixed shapes.
    model.text.packs = False


def has_graphs(settings: TrainSettings, device: torch.device) -> bool:
    """Whether compiled blocks are CUDA graphs."""
    return settings.cuda_graphs and device.type == "cuda"


def begin_step(settings: TrainSettings, device: torch.device) -> None:
    """Tell CUDA graphs that what the step before has made is no longer read.

    Left to themselves they take each compiled block that wants no gradient for a step, and the output of the one before
    it, which it reads, for free memory.
    """
    if has_graphs(settings, device):
        torch.compiler.cudagraph_mark_step_begin()


def uncompiled(settings: TrainSettings) -> AbstractContextManager[object]:
    """A context in which blocks run as they are: a look at the model has other shapes, and compiles nothing for them."""
    return torch.compiler.set_stance("force_eager") if settings.compile else nullcontext()


def has_experts(block: nn.Module) -> bool:
    """Whether a mixture of experts is in a block, told by its router: `models.moe` is not the code of every training."""
    return any(name.endswith(".router") for name, _ in block.named_parameters())


def check_compiler() -> None:
    """Look for what the generated code is compiled with.

    Raises:
        ConfigError: if there is none.
    """
    wished = os.environ.get("CXX")
    if any(map(shutil.which, shlex.split(wished)[:1] if wished else _COMPILERS)):
        return
    where = f"$CXX = {wished}" if wished else f"none of {', '.join(_COMPILERS)}"
    raise ConfigError(
        f"compile = true needs a C++ compiler: {where} {'is not' if wished else 'is'} on this machine. "
        "Hint: apt-get install g++, or compile: false"
    )
