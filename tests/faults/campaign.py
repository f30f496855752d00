"""What tests and the long campaign (`benchmarks/faults.py`) share: start, watch, kill, and look at what is left."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MARK = "CLIPGRAFT_CAMPAIGN"  # in the environment of every process that a run starts
UNFINISHED = (".writing", ".resume", ".left", ".lock", "*.tmp", ".*.tmp")
OF_TORCH = "torchinductor_*"  # a cache, after every run, without a fault too


@dataclass(frozen=True)
class Place:
    """A checkout in which commands are run, killed and run again.

    Attributes:
        root: the checkout.
        tmp: where all its processes put their temporary files.
        save_seconds: how often training saves its state.
    """

    root: Path
    tmp: Path
    save_seconds: float = 0.0

    def start(self, command: list[str | Path], log: Path, **more: str) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own; `more` goes into its environment."""
        self.tmp.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            MARK: str(self.root),
            "TMPDIR": str(self.tmp),
            "CLIPGRAFT_SAVE_SECONDS": str(self.save_seconds),
            **more,
        }
        with log.open("ab") as file:
            return subprocess.Popen(
                command,
                cwd=self.root,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def snakemake(self, *words: str) -> list[str | Path]:
        """A call of snakemake in this checkout."""
        return [sys.executable, "-m", "snakemake", "--nocolor", *words]

    def processes(self) -> dict[int, str]:
        """All that was started here and is still alive, with their command lines."""
        found = {}
        mark = f"{MARK}={self.root}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    words = (
                        (path / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
                    if words:  # a zombie has none
                        found[int(path.name)] = words
            except OSError:
                continue
        return found

    def wait_until_empty(self, seconds: float) -> dict[int, str]:
        """Wait for all processes to leave; returns those that have not."""
        wait_for(lambda: not self.processes(), seconds)
        return self.processes()

    def unfinished(self) -> list[str]:
        """Files that only a job at work has, and temporary files."""
        results = self.root / "results"
        left = [path for pattern in UNFINISHED for path in results.rglob(pattern)]
        others = [path for path in self.tmp.iterdir() if not path.match(OF_TORCH)]
        return sorted(str(path) for path in [*left, *others])


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Look again and again; returns whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def kill(pid: int) -> None:
    """SIGKILL; who is gone already is dead, too."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


# Put before all that Python runs: the first process that gives a file this name stops itself just before it does.
STOPS = """
import os, runpy, signal, sys
runpy.run_path({no_network!r})

def stop(event, words):
    if event == "os.rename" and str(words[1]).endswith({end!r}) and ".writing" not in str(words[1]):
        os.kill(os.getpid(), signal.SIGSTOP)

sys.addaudithook(stop)
"""


def stopping_at(end: str, folder: Path) -> dict[str, str]:
    """The environment in which a process stops itself before it gives a file a name that ends like this."""
    no_network = Path(__file__).parents[1] / "no_network/sitecustomize.py"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(STOPS.format(no_network=str(no_network), end=end))
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}


def is_stopped(pid: int) -> bool:
    """Whether a process has stopped and may go on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def bits(results: Path) -> dict[str, str]:
    """What no kill may change, by path: sha256 of all outputs as they are on the disk; of a series, what `_lasting` says.

    Raises:
        AssertionError: if a file is not what its manifest says.
    """
    found = {}
    for manifest in sorted(results.glob("*/*/manifest.json")):
        for name, about in json.loads(manifest.read_text())["outputs"].items():
            path = manifest.parent / name
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            assert digest == about["sha256"], f"{path} is not what its manifest says"
            is_series = name.endswith("metrics.jsonl")
            found[str(path.relative_to(results))] = _lasting(path) if is_series else digest
    return found


def _lasting(series: Path) -> str:
    """Of a training: each look at the model, and where it ended; not times, nor means over steps since the last save."""
    rows = [json.loads(line) for line in series.read_text().splitlines()]
    looks = [{**row, "seconds": None} for row in rows if "watch" in row]
    ends = [[row[name] for name in ("step", "lr", "tau")] for row in rows if "loss" in row][-1:]
    return json.dumps([looks, ends])
