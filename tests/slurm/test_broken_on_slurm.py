"""What breaks under a training (a node, a daemon, the controller) costs no more than what was not saved yet."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from interrupted import Training, prepare
from sandbox import processes_of, wait_until

pytestmark = pytest.mark.timeout(1200)  # two minutes; where cores are shared several times that


@pytest.fixture(scope="module")
def prepared(sandbox, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("prepared"))


def test_a_node_that_dies_costs_nothing_but_time(sandbox, prepared, tmp_path):
    training = Training.begin(prepared, tmp_path / "site", sandbox)
    first, lost = training.job, of_node(sandbox, "node2")
    for (
        pid
    ) in lost:  # it answers nobody any more, as without power; killed, its sockets would be closed
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    sandbox.ask("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=dead")
    wait_until(lambda: not training.job, "the job to fail")
    for pid in lost:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not sandbox.pid("node2"), "the node to be gone")
    sandbox.start("node2")
    wait_until(sandbox.nodes_are_up, "the node to come back")
    training.finish(prepared / "reference")
    assert (
        training.printed.count("submitted with SLURM jobid") == 1
    )  # SLURM runs it again, nobody else
    assert "Restarts=1" in sandbox.ask("scontrol", "show", "job", first)


def of_node(sandbox, node):
    """Its daemon, the steps (which write to the daemon's log) and their tasks."""
    log, found = str(sandbox.folder / f"log/slurmd-{node}.log"), [sandbox.pid(node)]
    for pid in processes_of(sandbox):
        folder = Path("/proc") / str(pid)
        with suppress(OSError):
            is_task = f"SLURMD_NODENAME={node}".encode() in (folder / "environ").read_bytes()
            if is_task or log in {os.readlink(path) for path in (folder / "fd").iterdir()}:
                found.append(pid)
    return sorted(set(found))


def test_daemons_that_are_killed_and_started_again_go_unnoticed(sandbox, prepared, tmp_path):
    training = Training.begin(prepared, tmp_path / "site", sandbox)
    first, workers = training.job, training.workers()
    assert first and len(workers) == 2
    for node in ("node1", "node2"):  # the first one has the batch step, too
        sandbox.kill(node)
        sandbox.start(node)
    training.wait_for_progress()
    assert training.job == first and training.workers() == workers
    training.finish(prepared / "reference", is_resumed=False)
    assert training.printed.count("submitted with SLURM jobid") == 1
    assert "Restarts=0" in sandbox.ask("scontrol", "show", "job", first)


def test_a_minute_without_the_controller_goes_unnoticed(sandbox, prepared, tmp_path):
    training = Training.begin(prepared, tmp_path / "site", sandbox)
    sandbox.kill("slurmctld")
    training.wait_for_progress()
    time.sleep(60)
    assert not training.ended(), training.printed[-3000:]
    sandbox.start("slurmctld")
    training.finish(prepared / "reference", is_resumed=False)
    assert training.printed.count("submitted with SLURM jobid") == 1
