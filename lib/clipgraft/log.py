"""Logging: one format, to the terminal and to the job's log file. Set up by `Job` and by nothing else."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

# Names and captions of others are logged; a terminal would take some of their characters for commands.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Harmless(logging.Formatter):
    """Shows control characters as they are written in Python."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return _COMMANDS.sub(lambda found: f"\\x{ord(found[0]):02x}", super().format(record))


def set_up(name: str, file: Path | None = None) -> None:
    """Log to stderr and to `file`, of processes beside the first errors alone; uncaught exceptions land in both.

    Args:
        name: what the lines begin with, e.g. `finetune_expert/2`.
        file: log file, replaced.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if is_first:
            file.open("w").close()
        handlers.append(logging.FileHandler(file, mode="a", delay=not is_first))
        handlers[-1].setLevel(logging.INFO if is_first else logging.ERROR)
    for handler in handlers:
        handler.setFormatter(_Harmless(f"[{name}] %(message)s"))
    logging.basicConfig(
        level=logging.INFO if is_first else logging.WARNING,
        handlers=handlers,
        force=True,
    )
    for noisy in ("matplotlib", "PIL", "faiss", "fsspec", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk under the log file must not bury the message
    sys.excepthook = lambda kind, error, trace: logging.getLogger("clipgraft").error(
        "%s", error, exc_info=(kind, error, trace)
    )
