"""What processes tell one another through memory; threads stand for them, as each has its own end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from clipgraft import exchange
from clipgraft.config import ConfigError
from clipgraft.exchange import Exchange, SharedMean


def _maker(size: int, patience: float = 60) -> Callable[[int], Exchange]:
    """What makes the end of a process, if one does so for each together."""
    barrier, said = threading.Barrier(size), [""] * size

    def make(rank: int) -> Exchange:
        def say(text: str) -> list[str]:
            said[rank] = text
            barrier.wait(10)
            all_said = list(said)
            barrier.wait(10)
            return all_said

        return Exchange(rank, size, say, patience)

    return make


@contextmanager
def ends(
    size: int, patience: float = 60
) -> Iterator[Callable[[Callable[[int, Exchange], Any]], list[Any]]]:
    """A function that lets all ends do something together."""
    with ThreadPoolExecutor(size) as pool:
        made = list(pool.map(_maker(size, patience), range(size)))
        yield lambda do: list(pool.map(do, range(size), made))
        for each in made:
            if hasattr(each, "_buffers"):  # else it has left
                each.close()


KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 3), (7,), (1, 2, 2), (0, 3)])
def test_rows_of_all_are_gathered_in_their_order(size, kind, shape):
    rows = [(torch.arange(12).reshape(4, 3) + 100 * rank) % 7 for rank in range(size)]
    rows = [each.flatten()[: torch.Size(shape).numel()].reshape(shape).to(kind) for each in rows]
    with ends(size) as all_do:
        for found in all_do(lambda rank, end: end.gather(rows[rank])):
            assert found.dtype == kind
            assert torch.equal(found, torch.cat(rows))


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_larger_than_a_buffer_goes_in_pieces(size, monkeypatch):
    monkeypatch.setattr(exchange, "BUFFER", 64)
    vectors = [torch.rand(101, dtype=torch.float64) for _ in range(size)]
    with ends(size) as all_do:
        for found in all_do(lambda rank, end: end.total(vectors[rank])):
            assert torch.equal(found, sum(vectors[1:], start=vectors[0]))
        for found in all_do(lambda rank, end: end.gather(vectors[rank][:, None])):
            assert torch.equal(found, torch.cat(vectors)[:, None])


@pytest.mark.parametrize("size, num", [(2, 101), (3, 101), (3, 2), (5, 7)])
def test_means_of_vectors_are_the_same_bits_for_all_and_each_has_its_own(size, num):
    """One is late at each filling and at each reading, and changes what it has read."""
    vectors = [[torch.randn(num) for _ in range(size)] for _ in range(6)]

    def work(rank: int, end: Exchange) -> list[torch.Tensor]:
        mean, found = SharedMean(end, num, torch.float32), []
        for step, vectors_R in enumerate(vectors):
            time.sleep(0.003 * ((step + rank) % size == 0))
            mean.vector_X.copy_(vectors_R[rank])
            mean.compute(7)
            time.sleep(0.003 * ((step + rank) % size == 1))
            found.append(mean.vector_X.clone())
            mean.vector_X.mul_(0.5)
        return found

    with ends(size) as all_do:
        for found in all_do(work):
            for mean_X, vectors_R in zip(found, vectors, strict=True):
                assert torch.equal(mean_X, sum(vectors_R[1:], start=vectors_R[0]) / size)


def test_a_mean_of_what_is_not_alike_is_an_error():
    def work(rank: int, end: Exchange) -> None:
        with pytest.raises(RuntimeError, match="processes of one training say different things"):
            SharedMean(end, 3, torch.float32).compute(5 + rank)

    with ends(2) as all_do:
        all_do(work)


def test_nobody_fills_a_buffer_that_another_one_still_reads():
    """One is late at each reading; sums would be those of later rounds."""

    def work(rank: int, end: Exchange) -> list[int]:
        sums = []
        for number in range(40):
            for _, said_RX in end._said(torch.tensor([number])):
                time.sleep(0.002 * ((number + rank) % 3 == 0))
                sums.append(int(said_RX.sum()))
        return sums

    with ends(3) as all_do:
        assert all_do(work) == [[3 * number for number in range(40)]] * 3


def test_an_answer_may_wait_while_other_things_are_said():
    def work(rank: int, end: Exchange) -> list[Any]:
        first = end.tell(10 + rank)
        gathered = end.gather(torch.tensor([rank]))
        second = end.tell(20 + rank)
        return [sorted(end.hear(second)), sorted(end.hear(first)), gathered.tolist()]

    with ends(3) as all_do:
        for rank, found in enumerate(all_do(work)):
            others = [other for other in range(3) if other != rank]
            wanted = [[number + other for other in others] for number in (20, 10)]
            assert found == [*wanted, [0, 1, 2]]


def test_who_waits_for_one_that_has_left_learns_it():
    def work(rank: int, end: Exchange) -> str:
        if rank == 1:
            end.close()
            return "left"
        with pytest.raises(ConfigError, match="another process of this training has ended"):
            for _ in range(2):
                end.gather(torch.ones(2))
        return "told"

    with ends(3) as all_do:
        assert all_do(work) == ["told", "left", "told"]


def test_who_waits_for_one_that_says_nothing_learns_it():
    def work(rank: int, end: Exchange) -> None:
        if rank == 0:
            said = "another process of this training has said nothing for 0.05 s"
            with pytest.raises(RuntimeError, match=said):
                end.gather(torch.ones(2))

    with ends(2, patience=0.05) as all_do:
        all_do(work)


def test_different_sizes_are_an_error_and_no_numbers():
    def work(rank: int, end: Exchange) -> None:
        with pytest.raises(RuntimeError, match="processes of one training say different things"):
            end.gather(torch.ones(2 + rank))

    with ends(2) as all_do:
        all_do(work)


def _opened() -> set[str]:
    folder = f"/proc/{os.getpid()}/fd"
    found = set()
    for end in os.listdir(folder):
        try:
            found.add(os.readlink(f"{folder}/{end}"))
        except OSError:
            continue
    return {each for each in found if "clipgraft" in each or each.startswith("pipe:")}


def test_nothing_stays_open():
    before = _opened()
    with ends(3) as all_do:
        all_do(lambda rank, end: end.gather(torch.ones(2)))
        assert len(_opened() - before) == 6 + 1  # pipes, and the memory, which its map keeps
    assert _opened() == before


@pytest.mark.parametrize(
    "name, num_before",
    [
        ("os.memfd_create", 0),
        ("os.ftruncate", 0),
        ("os.pipe", 0),
        ("os.pipe", 5),
        ("os.open", 0),
        ("os.open", 5),
        ("mmap.mmap", 0),
        ("mmap.mmap", 2),
    ],
)
def test_what_one_may_not_do_none_does_and_nothing_stays_open(name, num_before, monkeypatch):
    """As in a container that forbids it: a call of one end fails, after others that work."""
    module, _, function = name.partition(".")
    place = getattr(exchange, module)
    before, real, lock, num_calls = _opened(), getattr(place, function), threading.Lock(), 0

    def refuse_one(*how: Any) -> Any:
        nonlocal num_calls
        with lock:
            num_calls += 1
            if num_calls == num_before + 1:
                raise PermissionError(1, "Operation not permitted")
        return real(*how)

    monkeypatch.setattr(place, function, refuse_one)
    make = _maker(3)

    def why(rank: int) -> str:
        with pytest.raises(OSError) as caught:
            make(rank)
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(why, range(3))) == ["[Errno 1] Operation not permitted"] * 3
    assert num_calls > num_before
    assert _opened() == before


TOGETHER = """
import os, sys, time
import torch
from clipgraft import dist

with dist.world() as world:
    assert dist.shares_memory()
    for step in range(10**9):
        dist.gather(torch.ones(4))
        if step == 20:
            print("on", flush=True)
"""


def test_a_killed_process_is_no_wait_for_the_others():
    """Two real processes, one of which gets a SIGKILL."""
    about = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(), "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER],
            env={**os.environ, **about, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "on\n"
        processes[1].send_signal(signal.SIGKILL)
        _, said = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 1
        assert "another process of this training has ended" in said
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])
