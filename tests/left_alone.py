"""What stands for a Snakemake that starts a job, and is killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from clipgraft.orphan import SNAKEMAKE

WAITS = f"""
import os, sys, time
from clipgraft.orphan import name_parent
name_parent()
print(os.environ[{SNAKEMAKE!r}], flush=True)
time.sleep(600)
"""


@contextmanager
def snakemake() -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A process, and the word of it that its jobs are given in their environment."""
    command = [sys.executable, "-c", WAITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, {SNAKEMAKE: process.stdout.readline().rstrip("\n")}
        finally:
            process.kill()
