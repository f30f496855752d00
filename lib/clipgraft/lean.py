"""open_clip without the part of its import that no model here uses.

Every job that holds a model pays for `import open_clip` before its first step: six seconds, of which torch takes two.
Most of the others go to torch's compiler, which torchvision asks for one function that no one calls, to torchvision's
own models, to Hugging Face's hub and its text towers, which no model here has, to the widths of characters in a
terminal (ftfy can tell them), and to timm's image towers, which only a reference model may have. These are left out during
the import alone: whoever asks for them later gets them. Import open_clip through this module, or the saving is gone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_COMPILER = ("torch._dynamo", "torch._dynamo.utils")
_MODELS = "torchvision.models"
_HUB = ("huggingface_hub", "huggingface_hub.utils")
_TEXTS = ("transformers", "transformers.modeling_outputs")
_TERMINAL = ("wcwidth",)


class _Later(ModuleType):
    """Stands for a module while others are imported."""

    def __getattr__(self, name: str) -> _Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(self, name)


class _Name:
    """What was imported from such a module; imports the real one when it is used."""

    def __init__(self, module: _Later, name: str) -> None:
        self._module, self._name = module, name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by whoever looks at an annotation
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def _real(self) -> Any:
        if sys.modules.get(self._module.__name__) is self._module:
            _forget(self._module)
        return getattr(importlib.import_module(self._module.__name__), self._name)


def _forget(*placeholders: ModuleType) -> None:
    for name in [name for name, module in sys.modules.items() if module in placeholders]:
        del sys.modules[name]


@contextmanager
def _left_out() -> Iterator[None]:
    """Without what no model here uses, unless someone has imported it already."""
    later: dict[str, Any] = {name: _Later(name) for name in _absent()}
    # None: an ImportError, which open_clip expects.
    hidden: dict[str, Any] = {"timm": None} if "timm" not in sys.modules else {}
    sys.modules.update({**later, **hidden})
    try:
        yield
    finally:
        _forget(*later.values())
        for name in hidden:
            sys.modules.pop(name, None)
        if _MODELS in later:
            _ask_again_for_models()


def _absent() -> list[str]:
    """Those of them that are installed and not yet imported."""
    packages = {
        "torch._dynamo": _COMPILER,
        "torchvision": (_MODELS,),
        "transformers": _TEXTS,
        "huggingface_hub": _HUB,
        "wcwidth": _TERMINAL,
    }
    return [
        module
        for name, modules in packages.items()
        if name not in sys.modules and importlib.util.find_spec(name.split(".")[0]) is not None
        for module in modules
    ]


def _ask_again_for_models() -> None:
    """Let `torchvision.models` be the real module, imported when it is first asked for."""
    torchvision = sys.modules["torchvision"]
    del torchvision.models

    def ask(name: str) -> Any:
        if name == "models":
            return importlib.import_module(_MODELS)
        raise AttributeError(f"module 'torchvision' has no attribute {name!r}")

    torchvision.__getattr__ = ask  # type: ignore[method-assign]


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
