"""A clock that somebody sets, in place of the module `time`."""

from __future__ import annotations


class Clock:
    """It stands still until time passes; in it no machine is slow."""

    def __init__(self) -> None:
        """Somewhere in the life of a machine."""
        self.now = 5000.0

    def monotonic(self) -> float:
        """As `time.monotonic`."""
        return self.now

    def let_pass(self, seconds: float) -> None:
        """Put it forward."""
        self.now += seconds
