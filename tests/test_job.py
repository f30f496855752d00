"""The job: outputs appear all at once or not at all, and every failure is one clear message."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from left_alone import snakemake

from clipgraft.config import ConfigError
from clipgraft.job import Job

SCRIPT = '''"""Write a number."""
import time
from clipgraft.settings import Settings
from clipgraft.job import Job

class Numbers(Settings):
    number: int
    optim: dict[str, float] = {}
    fail: bool = False
    seconds: float = 0.0
    megabytes: int = 0

def main(job):
    settings = job.settings(Numbers)
    with job.outputs() as out:
        (out / "part").mkdir()
        (out / "part" / "number.txt").write_text(str(settings.number))
        for _ in range(settings.megabytes):
            with (out / "big.bin").open("ab") as file:
                file.write(bytes(2**20))
        time.sleep(settings.seconds)
        if settings.fail:
            raise RuntimeError("broken on purpose")
        job.record(samples_seen=3, seen=settings.optim)

if __name__ == "__main__":
    Job.run(main, __doc__)
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "number.py"
    path.write_text(SCRIPT)
    return path


def run(script: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    # What is not there is not waited for.
    waits = {"CLIPGRAFT_WAIT_SECONDS": "0.5", "CLIPGRAFT_LATENCY_SECONDS": "0"}
    env = {**os.environ, **waits, **env}
    return subprocess.run([sys.executable, script, *words], env=env, capture_output=True, text=True)


@contextmanager
def begun(script: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job that has written its file and goes on for ten minutes, unless it is ended."""
    command = [sys.executable, script, "--out", str(out), *with_settings(seconds=600)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 180
            while process.poll() is None and time.monotonic() < deadline:
                if (out / ".writing/part/number.txt").exists():
                    break
                time.sleep(0.05)
            assert process.poll() is None and (out / ".writing/part/number.txt").exists()
            yield process
        finally:
            process.kill()


def with_settings(**settings: object) -> list[str]:
    return ["--settings", json.dumps({"number": 7, **settings})]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_job_has_its_files_and_a_manifest_that_tells_all(script, tmp_path):
    done = run(script, "--out", str(tmp_path / "out"), *with_settings())
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == {"manifest.json", "part/number.txt"}
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["stage"] == "number"
    assert manifest["settings"]["number"] == 7
    assert manifest["outputs"]["part/number.txt"]["bytes"] == 1
    sha = "7902699be42c8a8e46fbbb4501726517e86b22c56a189f7625a6da49081b2451"  # of "7"
    assert manifest["outputs"]["part/number.txt"]["sha256"] == sha
    assert manifest["samples_seen"] == 3
    for key in ("id", "code", "packages", "hardware", "seconds", "peak_memory_mb", "inputs"):
        assert key in manifest


def test_a_manifest_counts_the_processes_of_all_nodes(script, tmp_path):
    run(script, "--out", str(tmp_path), *with_settings(), WORLD_SIZE="16", LOCAL_WORLD_SIZE="8")
    assert json.loads((tmp_path / "manifest.json").read_text())["num_processes"] == 16


@pytest.mark.parametrize("key", ["stage", "settings", "inputs"])
def test_a_key_that_a_manifest_lacks_is_named_with_its_file(script, tmp_path, key):
    path = tmp_path / "out/manifest.json"
    run(script, "--out", str(path.parent), *with_settings())
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    done = run(script, str(path), "--out", str(tmp_path / "again"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(path) in done.stderr and key in done.stderr


def test_a_failed_job_leaves_the_outputs_of_the_run_before(script, tmp_path):
    out = tmp_path / "out"
    run(script, "--out", str(out), *with_settings())
    before = (out / "manifest.json").read_text()
    done = run(script, "--out", str(out), *with_settings(number=8, fail=True))
    assert done.returncode == 1
    assert "broken on purpose" in done.stderr
    assert (out / "manifest.json").read_text() == before
    assert (out / "part/number.txt").read_text() == "7"
    assert files(out) == {"manifest.json", "part/number.txt"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_job_has_no_manifest_and_the_next_one_clears_up(script, tmp_path, number):
    out = tmp_path / "out"
    with begun(script, out) as process:
        process.send_signal(number)
        assert process.wait(timeout=180) != 0
    assert not (out / "manifest.json").exists()
    done = run(script, "--out", str(out), *with_settings())
    assert done.returncode == 0, done.stderr
    assert files(out) == {"manifest.json", "part/number.txt"}


def test_two_jobs_never_write_the_same_outputs(script, tmp_path):
    out = tmp_path / "out"
    with begun(script, out):
        second = run(script, "--out", str(out), *with_settings())
    assert second.returncode == 1
    assert "another process is writing" in second.stderr


def test_a_recorded_job_is_replayed_with_a_change(script, tmp_path):
    run(script, "--out", str(tmp_path / "out"), *with_settings(optim={"lr": 1.0, "wd": 2.0}))
    manifest = str(tmp_path / "out/manifest.json")
    done = run(script, manifest, "--out", str(tmp_path / "try"), "--set", "lr=1e-4")
    assert done.returncode == 0, done.stderr
    replayed = json.loads((tmp_path / "try/manifest.json").read_text())
    assert replayed["settings"]["optim"] == {"lr": 1e-4, "wd": 2.0}
    assert replayed["settings"]["number"] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--settings", '{"numbr": 7}'], "unknown key `numbr`; did you mean `number`?"),
        (["--settings", '{"number": "many"}'], 'number = "many"'),
        (["--settings", '{"number": 7}', "--set", "rate=3"], "rate is none of number"),
        (["--input", "model=nowhere/manifest.json"], "nowhere/manifest.json does not exist"),
    ],
)
def test_a_users_mistake_is_one_line_without_a_traceback(script, tmp_path, words, message):
    done = run(script, "--out", str(tmp_path / "out"), *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out/manifest.json").exists()


def test_an_input_whose_files_are_gone_or_cut_is_named(script, tmp_path):
    out = tmp_path / "out"
    run(script, "--out", str(out), *with_settings())
    (out / "part/number.txt").write_text("")
    words = ["--input", f"model={out / 'manifest.json'}", *with_settings()]
    cut = run(script, "--out", str(tmp_path / "next"), *words)
    assert cut.returncode == 1
    assert "number.txt has 0 bytes instead of 1" in cut.stderr
    (out / "part/number.txt").unlink()
    gone = run(script, "--out", str(tmp_path / "next"), *words)
    assert "number.txt is missing" in gone.stderr


def test_a_full_disk_is_said_and_leaves_nothing_behind(script, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.strip()}")
    try:
        done = run(script, "--out", str(disk / "out"), *with_settings(megabytes=16))
        assert done.returncode == 1
        assert "no space left on device" in done.stderr
        assert "Hint" in done.stderr
        assert "Traceback" not in done.stderr
        assert files(disk / "out") == set()
        assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 3 * 2**20
    finally:
        subprocess.run(["umount", disk], check=True)


def test_logs_go_to_the_terminal_and_to_the_file(script, tmp_path):
    log = tmp_path / "logs/number.log"
    done = run(
        script,
        "--out",
        str(tmp_path / "out"),
        "--name",
        "number/1",
        "--log",
        str(log),
        *with_settings(),
    )
    assert "[number/1] done in" in done.stderr
    assert "[number/1] done in" in log.read_text()


# --- left alone ---------------------------------------------------------------------------------------------


STOPS = """
import os, runpy, signal, sys

def stop(event, words):
    if event == "os.rename" and str(words[1]).endswith("out/part/number.txt"):
        os.kill(os.getpid(), signal.SIGSTOP)

sys.addaudithook(stop)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def finished_alone(script, tmp_path) -> Path:
    """Outputs of a job that lost its Snakemake when it was about to publish them; Snakemake removes the manifest."""
    out = tmp_path / "out"
    (tmp_path / "stops.py").write_text(STOPS)
    command = [sys.executable, tmp_path / "stops.py", script, "--out", out, *with_settings()]
    with (
        snakemake() as (parent, word),
        subprocess.Popen(command, env={**os.environ, **word}) as job,
    ):
        _, status = os.waitpid(job.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        parent.kill()
        parent.wait()
        os.kill(job.pid, signal.SIGCONT)
        assert job.wait() == 0
    (out / "manifest.json").unlink()
    return out


def again(script: Path, out: Path, word: dict[str, str], **settings: object) -> tuple[str, bool]:
    """Run the job; what it says, and whether it wrote its file anew."""
    before = (out / "part/number.txt").stat().st_ino
    done = run(script, "--out", str(out), *with_settings(**settings), **word)
    assert done.returncode == 0, done.stderr
    return done.stderr, (out / "part/number.txt").stat().st_ino != before


def test_what_a_job_finished_without_its_snakemake_the_next_one_takes_over(script, finished_alone):
    left = json.loads((finished_alone / ".left/manifest.json").read_text())
    with snakemake() as (_, word):
        said, is_new = again(script, finished_alone, word)
        assert "done by a job that had lost its Snakemake" in said and not is_new
        assert json.loads((finished_alone / "manifest.json").read_text()) == left
        assert files(finished_alone) == {"manifest.json", "part/number.txt"}
        assert again(script, finished_alone, word)[1]  # asked for once more, it is done once more


@pytest.mark.parametrize("what", ["by hand", "other settings", "a file that is not whole"])
def test_nothing_else_is_taken_over(script, finished_alone, what):
    if what == "a file that is not whole":
        (finished_alone / "part/number.txt").write_text("too long")
    with snakemake() as (_, word):
        number = 8 if what == "other settings" else 7
        said, is_new = again(
            script, finished_alone, {} if what == "by hand" else word, number=number
        )
    assert is_new and "done by a job" not in said
    assert (finished_alone / "part/number.txt").read_text() == str(number)
    assert files(finished_alone) == {"manifest.json", "part/number.txt"}


# --- signals that an import has swallowed ----------------------------------------------------------------------

DEAF = """
import sys, time
from clipgraft import orphan
orphan.SECONDS_TO_ASK_AGAIN = 0.2
orphan.leave_when_asked()
orphan.leave_with_parents()
try:
    print("begun", flush=True)
    time.sleep(600)
except SystemExit:  # as some packages do while they are imported
    print("swallowed", flush=True)
time.sleep(600)
"""


def test_a_job_whose_import_swallows_the_signal_leaves_all_the_same():
    with snakemake() as (parent, word):
        command = [sys.executable, "-c", DEAF]
        with subprocess.Popen(
            command, env={**os.environ, **word}, stdout=subprocess.PIPE, text=True
        ) as job:
            assert job.stdout.readline() == "begun\n"
            parent.kill()
            assert job.stdout.readline() == "swallowed\n"
            assert job.wait(60) == 128 + signal.SIGTERM


DEAF_TRAINING = """
import os, signal
from clipgraft.orphan import leave_when_asked
from clipgraft.training_state import stop_requests
leave_when_asked()
with stop_requests() as stop:
    assert not stop.requested
try:
    os.kill(os.getpid(), signal.SIGUSR1)
except SystemExit:
    pass
with stop_requests() as stop:
    assert stop.requested
"""


def test_a_training_that_was_asked_to_leave_while_it_was_imported_saves_and_leaves():
    done = subprocess.run([sys.executable, "-c", DEAF_TRAINING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# One of two processes fails, and the end of a group waits for the others, as NCCL's does.
FAILS_ALONE = '''"""Fail in one of several processes."""
import logging
import time
import torch.distributed as torch_dist
from clipgraft import dist
from clipgraft.config import ConfigError
from clipgraft.job import Job

log = logging.getLogger("clipgraft.fails")
torch_dist.destroy_process_group = lambda: time.sleep(600)

def main(job):
    with dist.world() as world:
        log.info("all begin")
        log.warning("all are warned by %d", world.rank)
        if world.rank == 1:
            raise ConfigError("picture 5 is damaged")
        dist.barrier()

if __name__ == "__main__":
    Job.run(main, __doc__)
'''


def test_one_process_that_fails_says_why_and_ends_all(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS_ALONE)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--", str(script)]
    words += ["--settings", "{}", "--out", str(tmp_path / "out"), "--log", str(tmp_path / "log")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=180)
    assert done.returncode == 1
    logged = (tmp_path / "log").read_text()  # all that is shown of a job on a cluster
    for said in (done.stderr, logged):
        assert said.count("error: picture 5 is damaged") == 1
    assert "all begin" in logged and "warned by 0" in logged
    assert "warned by 1" in done.stderr and "warned by 1" not in logged


# Workers say when they are there, and wait a moment before they become jobs.
STARTS_LATE = '''"""Be a worker of torchrun."""
import os, sys, time
from pathlib import Path
(Path(sys.argv[1]) / str(os.getpid())).touch()
time.sleep(1.0)
from clipgraft.orphan import leave_with_parents
leave_with_parents()
time.sleep(60)
'''


def test_workers_leave_though_torchrun_was_killed_before_they_looked_for_it(tmp_path):
    (tmp_path / "late.py").write_text(STARTS_LATE)
    (tmp_path / "there").mkdir()
    words = ["-m", "clipgraft.launch", "--nodes", "2", "--", "late.py", "there"]
    with (tmp_path / "log").open("w") as log:
        launched = subprocess.Popen([sys.executable, *words], cwd=tmp_path, stdout=log, stderr=log)
    try:
        workers = []
        while len(workers) < 2:
            assert launched.poll() is None, (tmp_path / "log").read_text()
            workers = [int(path.name) for path in (tmp_path / "there").iterdir()]
            time.sleep(0.01)
    finally:
        launched.kill()
        launched.wait()
    deadline = time.monotonic() + 30
    while any(map(_is_alive, workers)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.1)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_share_of_the_work_has_the_same_words_for_a_full_disk(tmp_path):
    job = Job("embed", "embed/0", {}, {}, tmp_path, 1, "")
    full = OSError(errno.ENOSPC, "No space left on device", "image.npy")
    with (
        pytest.raises(ConfigError, match=r"image\.npy: no space left on device .* Hint"),
        job.part(),
    ):
        raise full


def test_a_full_temporary_folder_is_no_full_results(tmp_path, monkeypatch):
    """As of the table of u, which has its room reserved there."""
    for name in ("results", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    job = Job("pretrain", "pretrain/0", {}, {}, tmp_path / "results", 1, "")
    told = r"tmp: no space left on device .* Hint: set TMPDIR to a folder on a larger disk"
    for folder, wanted in (("tmp", told), ("results", "Hint: free some room")):
        full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / folder))
        with pytest.raises(ConfigError, match=wanted), job.part():
            raise full


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    job = Job("embed", "embed/0", {}, {}, tmp_path / "out", 1, "")
    with (
        pytest.raises(ConfigError, match=r"\.lock cannot be locked: Function .* Hint"),
        job.outputs(),
    ):
        pytest.fail("written without a lock")
