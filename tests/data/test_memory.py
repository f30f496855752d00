"""What a loss remembers of every sample."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

from clipgraft.data.memory import SampleMemory

CPU = torch.device("cpu")


def test_what_is_written_is_read_once_it_is_settled_and_the_last_of_a_sample_counts():
    memory = SampleMemory(5, [0.5, 2.0])
    rows_B = torch.tensor([3, 1, 3])
    assert memory.read(rows_B, CPU).tolist() == [[0.5, 2.0]] * 3
    memory.write(rows_B, torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    memory.settle()
    assert memory.read(torch.tensor([0, 1, 3]), CPU).tolist() == [
        [0.5, 2.0],
        [2.0, 2.0],
        [3.0, 3.0],
    ]


def test_values_are_those_of_the_time_of_writing():
    memory, values_BC = SampleMemory(2, [0.0]), torch.ones(1, 1)
    memory.write(torch.tensor([0]), values_BC)
    values_BC.fill_(7.0)
    memory.settle()
    assert memory.state().tolist() == [[1.0], [0.0]]


def test_reading_before_the_write_is_settled_is_a_mistake():
    memory = SampleMemory(2, [0.0])
    memory.write(torch.tensor([0]), torch.ones(1, 1))
    with pytest.raises(AssertionError):
        memory.read(torch.tensor([0]), CPU)


def test_a_table_for_which_there_is_no_room_is_said_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match=str(tmp_path)):
        SampleMemory(2**50, [0.0])
    assert not os.listdir(tmp_path)


KILLED = """
import os, signal
from clipgraft import dist
from clipgraft.data.memory import SampleMemory

dist.barrier = lambda: os.kill(os.getpid(), signal.SIGKILL)
SampleMemory(1000, [0.5])
"""


def test_a_process_that_is_killed_while_it_fills_the_table_leaves_no_file(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert not os.listdir(tmp_path)
