"""The launcher: what it starts, and that two jobs never lease the same device."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from clipgraft.launch import (
    SECONDS_TO_SAVE,
    end_twins,
    is_slurm_allocation,
    lease,
    lease_folder,
    lease_wish,
    local_command,
    per_node,
    srun_command,
)
from clipgraft.orphan import name_place

HOLD = """
import sys, time
from pathlib import Path
from clipgraft.launch import lease
print(",".join(lease(["0", "1", "2", "3"], int(sys.argv[2]), Path(sys.argv[1]), 0.05)), flush=True)
time.sleep(60)
"""


@contextmanager
def running(code: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed in the end."""
    command = [sys.executable, "-c", code, *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen[str]) -> list[str]:
    """The devices it says it holds."""
    assert process.stdout
    return process.stdout.readline().strip().split(",")


def is_waiting(process: subprocess.Popen[str]) -> bool:
    """Whether it says that it waits before it says what it holds, and after half a second holds nothing yet."""
    assert process.stdout and process.stderr
    first, _, _ = select.select([process.stdout, process.stderr], [], [], 60)
    return first == [process.stderr] and not select.select([process.stdout], [], [], 0.5)[0]


def test_two_jobs_never_lease_the_same_device(tmp_path):
    with running(HOLD, tmp_path, 2) as first, running(HOLD, tmp_path, 2) as second:
        assert sorted(answer(first) + answer(second)) == ["0", "1", "2", "3"]


def test_a_killed_job_gives_its_devices_back(tmp_path):
    with running(HOLD, tmp_path, 3) as first:
        assert len(answer(first)) == 3
        with running(HOLD, tmp_path, 2) as second:
            assert is_waiting(second)  # one device is free, two are wished for
            first.kill()
            first.wait()
            assert len(answer(second)) == 2


def test_a_lease_survives_exec_into_the_script(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from clipgraft.launch import lease;"
        "lease(['0'], 1, Path(sys.argv[1]));"
        "wait = 'import time; print(0, flush=True); time.sleep(60)';"
        "os.execvp(sys.executable, [sys.executable, '-c', wait])"
    )
    with running(code, tmp_path) as held:
        assert answer(held) == ["0"]
        with running(HOLD, tmp_path, 4) as waiting:
            assert is_waiting(waiting)
            held.kill()
            held.wait()
            assert len(answer(waiting)) == 4


def test_without_devices_the_script_runs_as_one_plain_process(tmp_path):
    script = tmp_path / "say.py"
    script.write_text("import os, sys; print(sys.argv[1:], 'RANK' in os.environ)")
    command = [
        sys.executable,
        "-m",
        "clipgraft.launch",
        "--gpu",
        "0",
        "--",
        str(script),
        "--x",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['--x', '1'] False"


def test_a_scheduler_that_chose_devices_is_obeyed(tmp_path):
    script = tmp_path / "say.py"
    script.write_text("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    command = [sys.executable, "-m", "clipgraft.launch", "--gpu", "1", "--", str(script)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "5"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "5"


@pytest.mark.parametrize(
    ("listed", "devices"),
    [("0, 1", ["0", "1"]), ("1,1,0", ["1", "0"]), ("2,-1,3", ["2"]), ("-1", []), ("", [])],
)
def test_listed_devices_are_read_as_cuda_reads_them(listed, devices, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert lease_wish(8) == devices
    locks = sorted(path.name for path in tmp_path.glob("*/*"))
    assert locks == sorted(f"gpu{device}.lock" for device in devices)


def test_allocations_of_slurm_that_each_count_from_0_do_not_wait_for_one_another(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alone = lease_folder()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert lease_folder() == alone  # no devices were given to it: all jobs see the same ones
    monkeypatch.setenv("SLURM_JOB_GPUS", "4,5")
    one = lease_folder()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert len({alone, one, lease_folder()}) == 3


def test_a_share_of_a_device_whose_name_has_slashes_is_leased(tmp_path):
    shares = ["MIG-GPU-5a/1/0", "MIG-GPU-5a/2/0"]
    assert lease(shares, 2, tmp_path / "locks") == shares
    assert len(list((tmp_path / "locks").iterdir())) == 2


def test_several_devices_mean_one_process_each():
    assert local_command(1, ["x.py"]) == [sys.executable, "x.py"]
    assert local_command(4, ["x.py", "--y"])[-4:] == ["--nproc-per-node=4", "--", "x.py", "--y"]


def test_slurm_is_given_the_whole_geometry(monkeypatch):
    command = srun_command(2, 8, 64, ["x.py"], has_devices=True)
    for word in ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=64"):
        assert word in command
    assert command[-2:] == ["8", "x.py"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert is_slurm_allocation()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert not is_slurm_allocation()


def test_inside_a_job_of_slurm_a_local_snakemake_leases_as_anywhere(tmp_path, monkeypatch):
    """Only what the plugin has started is alone on the devices of its job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    name_place(is_local=True)
    try:
        assert not is_slurm_allocation()
        script = tmp_path / "say.py"
        script.write_text(
            "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"
        )
        words = ["--gpu", "1", "--gpus-per-node", "8", "--", str(script)]
        command = [sys.executable, "-m", "clipgraft.launch", *words]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "5,6", "TMPDIR": str(tmp_path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with (
            subprocess.Popen(command, env=environment, **pipes) as one,
            subprocess.Popen(command, env=environment, **pipes) as other,
        ):
            given = {each.stdout.readline().strip() for each in (one, other)}
            one.communicate()
            other.communicate()
        assert given == {"5", "6"}
    finally:
        name_place(is_local=False)
    assert is_slurm_allocation()


def test_processes_of_a_node_are_as_many_as_the_batch_divides_by(capsys):
    assert [per_node(2, 8, size) for size in (0, 64, 100, 7)] == [8, 8, 5, 1]
    assert "8 GPUs a node wished for, on 2 nodes a batch of 100" in capsys.readouterr().err


def test_devices_that_a_batch_does_not_divide_by_are_left_and_it_is_said(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert len(lease_wish(6, 128)) == 4
    said = capsys.readouterr().err
    assert said == "launch: 6 GPUs wished for, 8 here, and a batch of 128 divides by 4: using 4\n"


def test_under_wsl_it_is_said_how_devices_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # put back in the end
    monkeypatch.setattr("clipgraft.launch.find_devices", list)
    for place, hint in ((tmp_path / "none", ""), (tmp_path, "export CUDA_VISIBLE_DEVICES=0\n")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        monkeypatch.setattr("clipgraft.launch._WSL", place)
        assert lease_wish(1) == []
        said = capsys.readouterr().err
        assert said.endswith(hint) and bool(said) == bool(hint)


def test_no_devices_given_is_said_and_the_script_runs_without():
    """As `--resources gpu=0` has it: Snakemake scales the wish down, but not what a node would have of it."""
    words = ["--gpu", "0", "--gpus-per-node", "8", "--", "-c"]
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    command = [sys.executable, "-m", "clipgraft.launch", *words, code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "''\n", done.stderr
    assert "launch: no GPUs: --resources gpu=0" in done.stderr


def test_several_nodes_without_devices_see_none_and_leave_no_file(tmp_path):
    """One process for each of them, on this machine."""
    script = tmp_path / "say.py"
    word = "f\"{os.environ['RANK']} {os.environ['CUDA_VISIBLE_DEVICES'] == ''}\\n\""
    script.write_text(f"import os; os.write(1, {word}.encode())")  # at once: two processes write
    command = [sys.executable, "-m", "clipgraft.launch", "--nodes", "2", "--", str(script)]
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1", "TMPDIR": str(tmp)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert sorted(done.stdout.splitlines()) == ["0 True", "1 True"]
    assert not list(tmp.iterdir())


def test_in_a_job_of_slurm_nobody_but_slurm_kills_what_saves(tmp_path):
    script = tmp_path / "say.py"
    script.write_text("import os; print(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'])")
    command = [sys.executable, "-m", "clipgraft.launch", "--", str(script)]
    hidden = ("SLURM_", "TORCH_ELASTIC_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    step = {**plain, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    here, there = (
        int(subprocess.run(command, capture_output=True, check=True, env=each).stdout)
        for each in (plain, step)
    )
    assert here == SECONDS_TO_SAVE
    assert there > 30 * 24 * 3600  # more than any site gives


@pytest.mark.parametrize(("given", "has"), [(0, SECONDS_TO_SAVE), (1200, 1200)])
def test_an_older_job_of_the_same_work_has_the_time_that_the_site_gives(
    given, has, tmp_path, monkeypatch
):
    """It does not listen, so it is ended, but not before; seconds pass at once."""
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + 20 * seconds)
    )
    monkeypatch.setattr("clipgraft.launch.time", clock)
    told = []

    def run(command, **_):
        if command[0] == "scancel":
            told.append((now[0], command[1:]))
        is_over = any(words == ["6"] for _, words in told)
        rows = ["7|/x|rule_train"] + ["6|/x|rule_train"] * (not is_over)
        rows = [row for row in rows if "--jobs=6" not in command or row[0] == "6"]
        return SimpleNamespace(returncode=0, stdout="\n".join(rows), stderr="")

    monkeypatch.setattr("clipgraft.launch.subprocess.run", run)
    end_twins(7, given)
    (asked_at, signal), (ended_at, _) = told[-2:]
    assert (asked_at, signal) == (0, ["--signal=TERM", "6"])
    assert has < ended_at <= has + 40
