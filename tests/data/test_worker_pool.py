"""Work spread over processes, one of which is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipgraft.config import ConfigError
from clipgraft.data.parallel import parallel_map


def killed_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_said_and_not_waited_for():
    with pytest.raises(ConfigError, match=r"one of 2 worker processes was killed.*memory"):
        list(parallel_map(killed_at_three, range(20), 2))


KILLED = """
import os, signal
from clipgraft.data.parallel import parallel_map

if __name__ == "__main__":
    for number in parallel_map(abs, range(-9, 0), 2):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_is_killed_leaves_no_temporary_file(tmp_path: Path):
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    # Its workers hold the pipe, too: it is at its end when they have left.
    command = [sys.executable, tmp_path / "killed.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list((tmp_path / "tmp").iterdir())
