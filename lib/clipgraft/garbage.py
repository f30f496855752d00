"""Garbage: how often Python looks through all objects for cycles, in processes that import torch.

Imports leave 230,000 objects that stay. While they come, all of them are looked through four times, and again when the
process ends: 0.8 of the 2.3 seconds that it takes to import what a job with a model needs and to leave again.
"""

from __future__ import annotations

import atexit
import gc

_MIDDLE_BETWEEN_WHOLE = (
    100  # collections of the middle generation before one of all objects; Python's own: 10
)


def collect_seldom() -> None:
    """Look through all objects seldom, and not at the end; to be called once, before imports. Young objects as ever."""
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _MIDDLE_BETWEEN_WHOLE)
    atexit.register(gc.freeze)
