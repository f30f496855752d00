"""Work spread over processes, one of which is killed."""

import os
import signal

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
