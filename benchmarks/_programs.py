"""Both training programs, each started as a process; a file's name before their words asks for a profile, and no more.

    python benchmarks/_programs.py ours FILE scripts/pretrain.py --settings ...
    python benchmarks/_programs.py open_clip FILE CONFIG --model ...

FILE is `-` for a whole training without a profile. CONFIG is that of one more model.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _profile import marked, profiled, watched
from torch import nn

PROFILED = range(2, 7)  # steps


def kept(file: str, table: dict[str, float]) -> None:
    """Write a profile, and leave."""
    Path(file).write_text(json.dumps(table))
    os._exit(0)


def ours(file: str, script: str, *words: str) -> None:
    """One of our scripts, as a rule runs it."""
    sys.argv = [script, *words]
    if file != "-":
        _watch_ours(file)
    runpy.run_path(script, run_name="__main__")


def _watch_ours(file: str) -> None:
    from clipgraft import pretrain, train

    fit, models = pretrain.Fit, list[nn.Module]()

    def marked_fit(model: nn.Module, objective: Callable[..., Any], *rest: Any, **how: Any) -> Any:
        models.append(model)
        return fit(model, marked("loss", objective), *rest, **how)

    class Loader(train.Loader):
        def __iter__(self) -> Iterator[Any]:
            device = "cuda" if self.pin_memory else "cpu"
            profile = functools.partial(profiled, models[0], device)
            return watched(super().__iter__(), profile, PROFILED, functools.partial(kept, file))

    pretrain.Fit, train.Loader = marked_fit, Loader  # type: ignore[assignment,misc]


def open_clip(file: str, config: str, *words: str) -> None:
    """Its main, with one more model, and without the mark at the end of a tar.

    open_clip 3.3 is made for webdataset up to 0.2.86, and later versions have that mark, which stops its reader.
    """
    import open_clip as library
    from open_clip_train import data
    from open_clip_train import main as program

    data.tar_file_expander = functools.partial(data.tar_file_expander, eof_value=None)
    library.add_model_config(config)
    epoch = program.train_one_epoch

    def watched_epoch(model: nn.Module, data: Any, loss: Any, *rest: Any, **how: Any) -> Any:
        device = next(model.parameters()).device.type
        profile = functools.partial(profiled, model, device)
        loader = data["train"].dataloader
        batches = watched(loader, profile, PROFILED, functools.partial(kept, file))
        data["train"].dataloader = Batches(batches, loader.num_batches, loader.num_samples)
        return epoch(model, data, marked("loss", loss), *rest, **how)

    if file != "-":
        program.train_one_epoch = watched_epoch
    program.main(list(words))


@dataclass
class Batches:
    """What open_clip asks of a loader."""

    batches: Iterator[Any]
    num_batches: int
    num_samples: int

    def __iter__(self) -> Iterator[Any]:
        """Once."""
        return self.batches


if __name__ == "__main__":
    {"ours": ours, "open_clip": open_clip}[sys.argv[1]](*sys.argv[2:])
