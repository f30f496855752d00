"""A real cluster for the tests of this folder; they are skipped where there can be none."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cluster_site import plugin_folder
from sandbox import Sandbox, missing, running


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """What is started in the background of a shell is deaf to it, and so is what that starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    if reason := missing():
        pytest.skip(reason)
    if not (plugin_folder() / "snakemake_executor_plugin_slurm").is_dir():
        pytest.skip("no SLURM plugin here (envs/slurm.txt)")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-"))
        try:
            cluster = stack.enter_context(running(Path(folder)))
        except (AssertionError, OSError) as error:  # not all that is installed can be run
            pytest.skip(f"SLURM does not start on this machine: {str(error)[-600:]}")
        yield cluster
