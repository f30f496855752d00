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
from typing import Any

import torch
from torch import nn

from clipgraft import parallel
from clipgraft.config import ConfigError
from clipgraft.recipes import TrainSettings

log = logging.getLogger(__name__)

_COMPILERS = ("g++", "clang++", "c++")


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
    has_graphs = settings.cuda_graphs and device.type == "cuda"
    for block in plain:
        block.compile(mode="reduce-overhead" if has_graphs else None)


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
