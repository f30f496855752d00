"""Start-up and end: what processes leave out that import torch and pyarrow. A demo has forty of them.

Imports leave 230,000 objects that stay. While they come, all of them are looked through four times for cycles, again when
the process ends, and then they are freed one by one: 0.9 of the 2.3 seconds that it takes to import what a job with a
model needs and to leave again. And pyarrow imports pandas, wherever it is installed, before it makes an array of a list
or an array of numbers: 0.15 s.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys

_MIDDLE_BETWEEN_WHOLE = (
    100  # collections of the middle generation before one of all objects; Python's own: 10
)


def collect_seldom() -> None:
    """Look through all objects seldom, and not at the end; to be called once, before imports. Young objects as ever."""
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _MIDDLE_BETWEEN_WHOLE)
    atexit.register(_end)


def all_is_written() -> None:
    """Said at last by a process that has done its work: when threads and exit handlers have ended, it leaves at once, with 0."""
    _is_written.append(True)


_is_written: list[bool] = []


def _end() -> None:
    """The last of all exit handlers, as it was the first to be registered."""
    if _is_written:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    gc.freeze()


class _Absent:
    """A finder for which pandas is not installed."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def without_pandas() -> None:
    """Let pyarrow take pandas for absent, in this process and for good; what has imported pandas already keeps it."""
    if "pandas" in sys.modules:
        return
    finder = _Absent()
    sys.meta_path.insert(0, finder)
    try:
        import pyarrow as pa

        pa.array([0]).to_numpy()  # both ways look for it once
    finally:
        sys.meta_path.remove(finder)
