"""Laws of features that tasks share: made once, never wrong, never in the way."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from clipgraft.evaluation import stored as module
from clipgraft.evaluation.stored import key_of, stored
from clipgraft.lock import try_lock


def arrays(value: float = 1.0) -> dict[str, np.ndarray]:
    return {"image_ND": np.full((3, 4), value, np.float32), "about": np.array([2, 0, 1])}


def never() -> dict[str, np.ndarray]:
    raise AssertionError("made again")


def test_what_is_kept_is_what_was_made(tmp_path):
    path = tmp_path / "new" / "a.npz"
    first, again = stored(path, arrays), stored(path, never)
    assert again.keys() == first.keys()
    assert all(np.array_equal(again[name], first[name]) for name in first)
    assert again["image_ND"].dtype == np.float32


@pytest.mark.parametrize("place", [40, 300, -30])
def test_a_flipped_byte_or_a_cut_file_is_made_again(tmp_path, place):
    path = tmp_path / "a.npz"
    right = np.arange(100, dtype=np.float32)
    stored(path, lambda: {"image_ND": right})
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)
    assert np.array_equal(stored(path, lambda: {"image_ND": right})["image_ND"], right)
    path.write_bytes(content[: len(content) // 2])
    assert stored(path, lambda: arrays(3.0))["image_ND"].flat[0] == 3
    assert stored(path, never)["image_ND"].flat[0] == 3


def test_keys_tell_apart_all_that_they_are_made_of():
    keys = {key_of("m", "s", seed, device) for seed in (None, 0, 1) for device in ("cpu", "cuda")}
    assert len(keys) == 6


def _slow(path: Path, log: Path) -> None:
    def make() -> dict[str, np.ndarray]:
        is_first = not log.exists()
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if is_first:
            time.sleep(600)  # to be killed
        return arrays()

    stored(path, make)


def test_of_tasks_at_the_same_time_one_encodes_and_a_killed_one_blocks_nobody(tmp_path):
    context = multiprocessing.get_context("fork")
    path, log = tmp_path / "a.npz", tmp_path / "log"
    jobs = [context.Process(target=_slow, args=(path, log)) for _ in range(3)]
    for job in jobs:
        job.start()
    while not log.exists() or not log.read_text().endswith("\n"):
        time.sleep(0.01)
    os.kill(int(log.read_text().split()[0]), signal.SIGKILL)
    for job in jobs:
        job.join(60)
    assert sorted(job.exitcode for job in jobs) == [-signal.SIGKILL, 0, 0]
    assert len(log.read_text().split()) == 2  # the killed one, and one of the others
    assert {each.suffix for each in tmp_path.iterdir()} == {".npz", ""}


def test_the_oldest_go_when_there_is_no_room(tmp_path, monkeypatch):
    paths = [tmp_path / f"{name}.npz" for name in "abc"]
    for number, path in enumerate(paths):
        stored(path, arrays)
        os.utime(path, ns=(number * 10**9, number * 10**9))
    stored(paths[0], never)  # now the newest
    monkeypatch.setattr(module, "LIMIT_BYTES", 3 * paths[0].stat().st_size)
    stored(tmp_path / "d.npz", arrays)
    assert sorted(path.stem for path in tmp_path.glob("*.npz")) == ["a", "c", "d"]


def test_what_is_too_large_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 10)
    stored(tmp_path / "a.npz", arrays)
    assert not list(tmp_path.glob("*.npz"))


def test_who_waits_long_says_for_what(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.1)
    path, made = tmp_path / "a.npz", threading.Event()
    lock = try_lock(path.with_suffix(".lock"))

    def wait() -> None:
        stored(path, arrays)
        made.set()

    with caplog.at_level(logging.WARNING):
        waiting = threading.Thread(target=wait)
        waiting.start()
        for _ in range(600):
            if "waiting for it" in caplog.text:
                break
            time.sleep(0.05)
        assert not made.is_set()
        lock.close()
        waiting.join()
    assert made.is_set()
    assert f"another process is encoding the images of {path}" in caplog.text
    assert caplog.text.count("waiting for it") == 1
