"""Training state on disk: whole or not there, one's own or not used; and how often it is saved.

Kills are real: at every change of the folder, and at any byte of the file.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import resource
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from clock import Clock
from trainings import FORKS, exit_codes

from clipgraft import dist, training_state
from clipgraft.config import ConfigError
from clipgraft.train import GO_ON, LEAVE, SAVE, SPEAK, Fit
from clipgraft.training_state import Pace, Parts, Stop, TrainingState


def state_of(step: int) -> dict:
    return {
        "step": step,
        "weights": {"a": torch.full((3,), float(step))},
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(2)}},
            "groups": [{"lr": 0.1, "betas": (0.9, 0.98)}],
        },
        "note": None,
    }


def generations(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pt"))


def test_state_comes_back_as_saved(tmp_path):
    state = TrainingState(tmp_path, "tag")
    assert state.load() is None
    state.save(state_of(5))
    loaded = state.load()
    assert torch.equal(loaded["weights"]["a"], torch.full((3,), 5.0))
    assert {**loaded, "weights": 0, "optimizer": 0} == {
        "step": 5,
        "weights": 0,
        "optimizer": 0,
        "note": None,
    }
    assert loaded["optimizer"]["groups"] == [{"lr": 0.1, "betas": (0.9, 0.98)}]


def test_the_newest_two_generations_are_kept(tmp_path):
    state = TrainingState(tmp_path, "tag")
    for step in (8, 9, 10, 100):
        state.save(state_of(step))
    assert len(generations(tmp_path)) == 2
    assert state.load()["step"] == 100


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no state" * 99]
)
def test_a_damaged_generation_falls_back_to_the_one_before_and_says_so(tmp_path, damage, caplog):
    state = TrainingState(tmp_path, "tag")
    state.save(state_of(1))
    state.save(state_of(2))
    first, second = generations(tmp_path)
    second.write_bytes(damage(second.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert state.load()["step"] == 1
    assert f"{second} is damaged" in caplog.text
    first.write_bytes(damage(first.read_bytes()))
    assert state.load() is None
    assert "starting afresh" in caplog.text


def test_after_a_fall_back_the_damaged_file_is_not_taken_for_the_newest(tmp_path):
    state = TrainingState(tmp_path, "tag")
    for step in (10, 20):
        state.save(state_of(step))
    generations(tmp_path)[-1].write_bytes(b"")
    state.save(state_of(15))
    assert state.load()["step"] == 15
    assert len(generations(tmp_path)) == 2


def test_state_of_another_tag_is_not_used_and_said_so(tmp_path, caplog):
    old = TrainingState(tmp_path, "old settings")
    old.save(state_of(50))
    old.close()
    new = TrainingState(tmp_path, "new settings")
    with caplog.at_level(logging.WARNING):
        assert new.load() is None
    assert "starting afresh" in caplog.text
    new.save(state_of(3))
    assert new.load()["step"] == 3


def test_who_takes_a_change_back_goes_on_from_where_it_was(tmp_path):
    """Of code that was edited while it trained, say; older ones make room."""
    for number, tag in enumerate(["oldest", "old"]):
        state = TrainingState(tmp_path, tag)
        for step in (40 + number, 50 + number):
            state.save(state_of(step))
        state.close()
    assert len(generations(tmp_path)) == 3
    new = TrainingState(tmp_path, "new")
    for step in (3, 4, 5):
        new.save(state_of(step))
        assert len(generations(tmp_path)) == (2 if step == 3 else 3)
    new.close()
    back = TrainingState(tmp_path, "old")
    assert back.load()["step"] == 51
    back.close()
    assert TrainingState(tmp_path, "oldest").load() is None


@pytest.mark.parametrize("length", [0, 100, -100])
def test_who_is_shown_a_part_of_the_state_that_the_first_process_found_says_so(
    length, tmp_path, monkeypatch, caplog
):
    first = TrainingState(tmp_path, "tag")
    first.save(state_of(7))
    [path] = generations(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(dist, "said_by_first", lambda _: path.name)
    with caplog.at_level(logging.WARNING):
        assert TrainingState(tmp_path, "tag").load() is None
    assert "cannot be read, not used" in caplog.text


def test_two_trainers_never_share_a_folder(tmp_path):
    first = TrainingState(tmp_path, "tag")
    with pytest.raises(ConfigError, match="another trainer uses"):
        TrainingState(tmp_path, "tag")
    first.close()
    TrainingState(tmp_path, "tag").close()


def load(rank: int, port: int, folder: Path, found: Path) -> None:
    """Load as one of two processes."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with dist.world():
        before = bytes_read()
        loaded = TrainingState(folder, "tag").load()
        read = bytes_read() - before
    (found / str(rank)).write_text(json.dumps([loaded["step"], loaded["large"].sum().item(), read]))


def bytes_read() -> int:
    """By calls of `read`: what is mapped does not count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def test_of_two_processes_the_first_chooses_and_alone_reads_all_of_a_state(tmp_path):
    state, num = TrainingState(tmp_path / "state", "tag"), 4_000_000
    for step in (1, 2):
        state.save({"step": step, "large": torch.full((num,), float(step))})
    state.close()
    newest = generations(tmp_path / "state")[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = (port, tmp_path / "state", tmp_path)
    processes = [FORKS.Process(target=load, args=(rank, *words)) for rank in range(2)]
    for process in processes:
        process.start()
    assert exit_codes(processes) == {0}
    first, other = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first[:2] == other[:2] == [1, num]
    assert first[2] > 4 * num > 20 * other[2]


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_what_is_read_is_mapped_until_it_is_taken_over(tmp_path):
    model, other = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    before, after = parts_of(model), parts_of(other)
    model(torch.ones(1, 64)).sum().backward()
    before.optimizer.step()
    state = TrainingState(tmp_path, "tag")
    state.save({"step": 1, **before.captured(is_first=True)})
    [path] = generations(tmp_path)
    saved = state.load()
    assert is_mapped(path)
    after.restore(saved)
    del saved
    gc.collect()
    assert not is_mapped(path)  # or its room on the disk would be taken until the training ends
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(old, new)
        for key, value in before.optimizer.state[old].items():
            assert torch.equal(value, after.optimizer.state[new][key]), key
    state.close()


def parts_of(model: torch.nn.Module) -> Parts:
    optimizer = torch.optim.AdamW(model.parameters())
    return Parts(dict(model.named_parameters()), optimizer, None, None)


def test_what_could_not_be_loaded_is_refused_when_saved(tmp_path):
    state = TrainingState(tmp_path, "tag")
    with pytest.raises(AssertionError, match="Random"):
        state.save({"step": 1, "generators": [random.Random(0)]})
    assert generations(tmp_path) == []


@pytest.mark.parametrize("what", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_moments_that_are_not_finite_are_refused_like_weights(what, value):
    """Or nobody would see it: where the second moment is infinite, steps have no length, and weights stay finite."""
    model, cpu = torch.nn.Linear(2, 2), torch.device("cpu")
    parts = parts_of(model)
    model(torch.ones(1, 2)).sum().backward()
    parts.optimizer.step()
    parts.check_finite(1, 10, cpu)
    held = {"weight": model.weight.detach(), **parts.optimizer.state[model.weight]}
    held[what][1, 0] = value
    with pytest.raises(ConfigError, match="not finite after step 1 of 10"):
        parts.check_finite(1, 10, cpu)


# --- killed while it is written ------------------------------------------------------------------------------


def saves_steps(
    folder: Path, steps: range, dies_at: int | None = None, limit: int | None = None
) -> None:
    """Save one step after the other, and maybe die: at a change of the folder, or at a byte of a file."""
    state = TrainingState(folder, "tag")
    changes = 0

    def count(event: str, words: tuple) -> None:
        nonlocal changes
        writes = event == "open" and "w" in str(words[1])
        if (writes or event in ("os.rename", "os.remove")) and str(folder) in str(words[0]):
            changes += 1
            if changes == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if limit is not None:  # the kernel kills who writes past it, with no word to the process
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for step in steps:
        state.save(state_of(step))


def exit_code(*words: object) -> int | None:
    process = FORKS.Process(target=saves_steps, args=words)
    process.start()
    process.join()
    return process.exitcode


def test_killed_at_any_change_of_the_folder_there_is_a_whole_state(tmp_path):
    """A save is three changes (a file is opened, renamed, and an old one removed), and one more after a kill."""
    codes, found = [], []
    for dies_at in range(1, 12):
        folder = tmp_path / str(dies_at)
        codes.append(exit_code(folder, range(1, 4), dies_at))
        state = TrainingState(folder, "tag")
        found.append((state.load() or {"step": 0})["step"])
        state.close()
        assert exit_code(folder, range(3, 5)) == 0
        assert [path.name.split("-")[1] for path in generations(folder)] == [
            f"{n:012d}" for n in (3, 4)
        ]
        assert not list(folder.glob("*.tmp"))
    num_changes = codes.index(0)
    assert num_changes == 3 * 2 + 1 and set(codes) == {-signal.SIGKILL, 0}
    assert found[:num_changes] == [0, 0, 1, 1, 2, 2, 3]
    assert set(found[num_changes:]) == {3}


def test_killed_at_any_byte_of_the_file_there_is_the_state_before(tmp_path, caplog):
    state = TrainingState(tmp_path, "tag")
    state.save(state_of(1))
    state.close()
    [path] = generations(tmp_path)
    size = path.stat().st_size
    for limit in random.Random(0).sample(range(size), 8):
        assert exit_code(tmp_path, range(2, 3), None, limit) == -signal.SIGXFSZ
        assert [left.stat().st_size for left in tmp_path.glob("*.tmp")] == [limit]
        state = TrainingState(tmp_path, "tag")
        assert state.load()["step"] == 1
        state.close()
    assert exit_code(tmp_path, range(2, 3), None, size) == 0
    assert TrainingState(tmp_path, "tag").load()["step"] == 2


def test_a_state_is_on_the_disk_before_its_name_is_and_then_its_name(tmp_path, monkeypatch):
    """Or a power cut would leave a name without content."""
    done: list[tuple[str, str, int]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(("fsync", path.suffix or path.name, path.stat().st_size))

    def noted_replace(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(("replace", f"{source.suffix} {target.suffix}", target.stat().st_size))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    folder = tmp_path / "state"
    TrainingState(folder, "tag").save(state_of(1))
    size = generations(folder)[0].stat().st_size
    assert done[:2] == [("fsync", ".tmp", size), ("replace", ".tmp .pt", size)]
    assert [each[:2] for each in done[2:]] == [("fsync", "state")]


def test_a_save_that_fails_leaves_the_state_before_and_nothing_else(tmp_path):
    state = TrainingState(tmp_path, "tag")
    state.save(state_of(1))
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # Python leaves SIGXFSZ alone
    try:
        with pytest.raises(OSError, match="File too large"):
            state.save(state_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before
    assert state.load()["step"] == 1


@pytest.mark.parametrize("place", [0.02, 0.5, 0.99])
def test_one_flipped_bit_anywhere_is_noticed(tmp_path, place, caplog):
    """torch.load would not: it is built without the checksums of its own format."""
    state = TrainingState(tmp_path, "tag")
    large = {"weights": torch.zeros(20_000)}
    state.save({"step": 1, **large})
    state.save({"step": 2, **large})
    path = generations(tmp_path)[-1]
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert state.load()["step"] == 1
    assert f"{path} is damaged" in caplog.text
    assert not path.exists()  # or the next save would keep it, and remove the whole one


# --- how often it is saved ----------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(training_state, "time", clock)
    return clock


def test_saving_takes_its_share_of_the_time_and_no_more(clock, monkeypatch):
    """A save of two minutes is due again after fifty times two, however often it was asked for."""
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 60.0)
    pace = Pace()
    clock.let_pass(59)
    assert not pace.is_due()
    clock.let_pass(1)
    assert pace.is_due()
    with pace.saving():
        clock.let_pass(120)
    clock.let_pass(50 * 120 - 1)
    assert not pace.is_due()
    clock.let_pass(2)
    assert pace.is_due()


def test_saves_that_cost_nothing_come_as_often_as_they_were_asked_for(clock, monkeypatch):
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 60.0)
    pace = Pace()
    with pace.saving():
        clock.let_pass(0.5)
    clock.let_pass(59)
    assert not pace.is_due()
    clock.let_pass(1)
    assert pace.is_due()
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    with pace.saving():
        clock.let_pass(100)
    assert pace.is_due()  # after every step


@pytest.mark.parametrize(
    "rank, is_told, save, speak, wish",
    [
        (0, False, False, False, GO_ON),
        (0, False, False, True, SPEAK),
        (0, False, True, True, SAVE),
        (1, False, True, True, GO_ON),
        (1, True, False, False, LEAVE),
    ],
)
def test_the_process_that_writes_says_when_and_any_may_be_told_to_leave(
    rank, is_told, save, speak, wish
):
    """The others do not know how long a save takes: by their clocks it would be due every minute."""
    fit = SimpleNamespace(world=dist.World(rank, 2, torch.device("cpu")))
    pace, meter = (SimpleNamespace(is_due=lambda answer=each: answer) for each in (save, speak))
    assert Fit._wish(fit, Stop(is_told), pace, meter) == wish
