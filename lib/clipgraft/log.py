"""Logging: one format, to the terminal and to the job's log file. Set up by `Job` and by nothing else."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path


def set_up(name: str, file: Path | None = None) -> None:
    """Log to stderr and, on the first process, to `file`; uncaught exceptions land in both.

    Args:
        name: what the lines begin with, e.g. `finetune_expert/2`.
        file: log file, replaced.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None and is_first:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, mode="w"))
    logging.basicConfig(
        level=logging.INFO if is_first else logging.WARNING,
        format=f"[{name}] %(message)s",
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
