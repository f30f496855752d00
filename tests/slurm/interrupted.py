"""A training of some seconds on a cluster, to be interrupted, and what it comes to when nothing interrupts it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster_site import Site, copy_site
from sandbox import Sandbox, processes_of, wait_until

UNTIL = ("--until", "pretrain")


def prepare(root: Path) -> Path:
    """A site whose data are there, and beside it `reference/`, where the training has run as well."""
    copy_site(root / "site", "slurm_training.yaml")
    for folder, until in (("site", ("--until", "shard")), ("reference", UNTIL)):
        if folder == "reference":
            shutil.copytree(root / "site", root / folder)
        command = [sys.executable, "-m", "snakemake", "--cores", "2", *until]
        done = subprocess.run(command, cwd=root / folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    return root


def weights(site: Path) -> bytes:
    """Of the finished training."""
    (path,) = (site / "results/pretrain").glob("*/model.safetensors")
    return path.read_bytes()


def is_told(pid: int) -> bool:
    """Whether SIGTERM waits for a process that stands still."""
    try:
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    except OSError:
        return True
    pending = next(line for line in lines if line.startswith("ShdPnd:"))
    return bool(int(pending.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@dataclass
class Training:
    """A training on the cluster, in a folder of its own."""

    site: Site
    process: subprocess.Popen[str]

    @classmethod
    def begin(cls, prepared: Path, folder: Path, sandbox: Sandbox, *words: str) -> Training:
        """Submit it, and wait until its state has been saved for the first time."""
        shutil.copytree(prepared / "site", folder)
        site = Site(folder, sandbox)
        training = cls(site, site.begin(*UNTIL, *words))
        training.wait_for_state()
        return training

    @property
    def job(self) -> str:
        """The job that trains now; empty: none does."""
        query = ("squeue", "--noheader", "--states=RUNNING", "--format=%A|%Z")
        rows = [line.split("|") for line in self.site.sandbox.ask(*query).splitlines()]
        return next((job for job, folder in rows if folder == str(self.site.root)), "")

    @property
    def printed(self) -> str:
        return (self.site.root / "printed.txt").read_text()

    @property
    def log(self) -> str:
        """Of the trainer."""
        (path,) = (self.site.root / "logs/pretrain").glob("*.log")
        return path.read_text()

    def slurm_log(self, job: str) -> str:
        """What a job printed; those of finished jobs go unless they are asked to stay."""
        (path,) = (self.site.root / ".snakemake/slurm_logs").glob(f"*/*/{job}.log")
        return path.read_text()

    def state(self) -> list[Path]:
        """Files of the saved state."""
        return list(self.site.root.glob("results/pretrain/*/.resume/**/*.pt"))

    def saved(self) -> int:
        """When that was last, in ns; 0: there is none."""
        times = [0]
        for path in self.state():
            with suppress(OSError):
                times.append(path.stat().st_mtime_ns)
        return max(times)

    def processes(self) -> dict[int, list[bytes]]:
        """The words of all that were told to train: the launcher, srun, torchrun of each node, and the workers."""
        mark, found = f"{self.site.root}/scripts/pretrain.py".encode(), {}
        for pid in processes_of(self.site.sandbox):
            with suppress(OSError):
                words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
                found |= {pid: words} if mark in words else {}
        return found

    def workers(self) -> list[int]:
        """The processes that train."""
        return [pid for pid, words in self.processes().items() if words[1] == b"-u"]

    def wait_for_progress(self) -> None:
        """Wait until it has saved once more."""
        before = self.saved()
        wait_until(lambda: self.saved() > before, "a state saved later", 60)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Do something to a training that stands still, until it is told to stop: so it never ends before."""
        workers = self.workers()
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
            wait_until(lambda: all(is_told(pid) for pid in workers), "SIGTERM", 300)
        finally:
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def wait_for_state(self) -> None:
        wait_until(lambda: bool(self.state()) or self.ended(), "a saved state", 300)
        assert not self.ended(), self.printed[-4000:]

    def ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self, number: int) -> None:
        """Send snakemake, not its jobs, a signal, and wait until it is gone."""
        os.kill(self.process.pid, number)
        self.process.wait(timeout=120)

    def again(self, *words: str) -> None:
        """The same command once more."""
        self.process = self.site.begin(*UNTIL, *words)

    def finish(self, reference: Path, is_resumed: bool = True) -> None:
        """Wait until snakemake is done and nobody trains, and compare the weights with those of the reference."""
        try:
            code = self.process.wait(timeout=450)
        finally:
            self.process.send_signal(signal.SIGKILL)
        assert code == 0, self.printed[-6000:]
        assert ("resumed at step" in self.log) == is_resumed
        assert weights(self.site.root) == weights(reference)
        assert not self.state()
        wait_until(lambda: not self.processes(), "those who trained to leave", 60)
