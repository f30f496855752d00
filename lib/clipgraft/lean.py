"""open_clip without the part of its import that no model here uses.

Every job that holds a model pays for `import open_clip` before its first step: five seconds, of which torch takes two.
Two more go to torch's compiler, which torchvision asks for one function that no one calls, and to timm's image towers,
which only a reference model may have. These are left out during the import alone: whoever asks for them later gets them.
Import open_clip through this module, or the saving is gone.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


class _Later(ModuleType):
    """Stands for a module while others are imported; its functions import the real one when they are called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if sys.modules.get(self.__name__) is self:
                _forget(self)
            return getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)

        return call


def _forget(*placeholders: ModuleType) -> None:
    for name in [name for name, module in sys.modules.items() if module in placeholders]:
        del sys.modules[name]


@contextmanager
def _left_out() -> Iterator[None]:
    """Without the compiler and timm, unless someone has imported them already."""
    later = {name: _Later(name) for name in _COMPILER if _COMPILER[0] not in sys.modules}
    # None: an ImportError, which open_clip expects.
    hidden = {"timm": None} if "timm" not in sys.modules else {}
    sys.modules.update({**later, **hidden})  # type: ignore[arg-type]
    try:
        yield
    finally:
        _forget(*later.values())
        for name in hidden:
            sys.modules.pop(name, None)


with _left_out(), warnings.catch_warnings():
    # Its merges file waits for the garbage collector.
    warnings.simplefilter("ignore", ResourceWarning)
    import open_clip

__all__ = ["open_clip", "with_timm"]


def with_timm() -> None:
    """Let open_clip build timm's image towers; costs their import, once."""
    if open_clip.timm_model.timm is None:
        # Runs in the same namespace again, so that the class that open_clip.model has taken finds timm there, too.
        importlib.reload(open_clip.timm_model)
