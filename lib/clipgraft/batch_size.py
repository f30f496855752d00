"""The largest part of a batch that fits into memory: `python -m clipgraft.batch_size RUN JOB`, e.g. `demo pretrain/short`.

Trains two steps of the job again and again, with its own script, data and settings, with parts of other sizes, in a
folder that is removed. The batch stays as it is, and so does the result: `accumulate`, which is printed last, says in
how many parts it goes through the model. The index and shards of the job must be there.

On a GPU a trial fits if it ends and leaves a tenth of the memory; on a CPU if it takes no more than nine tenths of what
is free now. `--memory` says how much else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clipgraft.config import ConfigError, read_config
from clipgraft.launch import local_command, visible_devices
from clipgraft.orphan import name_place
from clipgraft.planning import plan_run
from clipgraft.provenance import MANIFEST, read_manifest
from clipgraft.runs import RESULTS
from clipgraft.versions import WATCHED, PlannedJob

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FILLED = 0.9  # of the memory
STEPS = 2  # the second one has the optimizer's moments, too
_MOST = {"CLIPGRAFT_PACK_TEXTS": "0"}  # a later part may have less padding to leave out
_FULL = ("out of memory", "OutOfMemoryError", "can't allocate memory", "MemoryError", "(SIGKILL)")


@dataclass(frozen=True)
class Trials:
    """How parts of a batch are tried.

    Attributes:
        job: the training.
        inputs: its finished inputs.
        num_processes: that share a batch.
        memory_mb: bound of all processes of a CPU, or of each GPU; None: what a GPU has.
    """

    job: PlannedJob
    inputs: Mapping[str, Path]
    num_processes: int
    memory_mb: int | None

    @property
    def share(self) -> int:
        """Rows of a batch that a process has."""
        return int(self.job.settings["batch_size"]) // self.num_processes

    def largest(self) -> int:
        """The largest part that fits: between divisors of a process's share, in halves.

        Raises:
            ConfigError: if none does.
        """
        sizes = [size for size in range(1, self.share + 1) if not self.share % size]
        low, high = -1, len(sizes)
        while high - low > 1:
            middle = (low + high) // 2
            # Two parts are enough to see what a part takes.
            if self.fits(sizes[middle], min(2, self.share // sizes[middle])):
                low = middle
            else:
                high = middle
        while low >= 0 and self.share // sizes[low] > 2:  # now the whole batch
            if self.fits(sizes[low], self.share // sizes[low]):
                break
            low -= 1
        if low < 0:
            raise ConfigError(
                f"{self.job.name}: not even 1 sample at a time fits. Hint: grad_checkpointing: true, parallel: fsdp, or "
                "more memory"
            )
        return sizes[low]

    def fits(self, size: int, num_parts: int) -> bool:
        """Train with parts of some size, and tell.

        Raises:
            ConfigError: if the trial fails for another reason than memory, or sees none of the devices.
        """
        devices = visible_devices()
        with tempfile.TemporaryDirectory(prefix="clipgraft-batch-size-") as out:
            command = self.command(size, num_parts, Path(out))
            said, peak_mb, is_over = watched(command, None if devices else self.memory_mb)
            ended = (Path(out) / MANIFEST).exists()
            if ended and devices:
                facts = read_manifest(Path(out))
                if "device_mb" not in facts:
                    raise ConfigError(
                        f"{self.job.name} was tried on the CPU: torch sees none of the devices {','.join(devices)}. "
                        "Hint: nvidia-smi, and torch's CUDA; CUDA_VISIBLE_DEVICES= tries on the CPU"
                    )
                peak_mb = facts["peak_device_mb"]
                bound = self.memory_mb or round(FILLED * facts["device_mb"])
                is_over = peak_mb > bound
        if not ended and not is_over and not any(word in said for word in _FULL):
            raise ConfigError(f"{self.job.name} fails with parts of {size}:\n{said[-2000:]}")
        is_good = ended and not is_over
        # Of a GPU that was full nobody tells how much more it would have been; `peak_mb` is the host's.
        took = f"{peak_mb:12,} MB" if ended or not devices else f"{'too much':>15}"
        print(f"{size:8,} at a time {took}   {'fits' if is_good else 'does not fit'}")
        return is_good

    def command(self, size: int, num_parts: int, out: Path) -> list[str]:
        """The job's script with another length, batch and number of parts."""
        batch_size = size * num_parts * self.num_processes
        # Neither fits a run so short, with a peak rate of so small a batch.
        schedule = {**dict.fromkeys(("warmup", "warmup_steps", "warmup_samples")), "lr_min": 0.0}
        changes = {
            "batch_size": batch_size,
            "accumulate": num_parts,
            "samples_seen": STEPS * batch_size,
            "optim": {**self.job.settings["optim"], **schedule},
            "watch": None,
            "cuda_graphs": False,  # not with parts
        }
        if "stop_ratio" in self.job.settings:  # two steps teach nothing
            changes["stop_ratio"] = None
        words = [str(SCRIPTS / f"{self.job.stage}.py"), "--out", str(out)]
        words += ["--settings", json.dumps({**self.job.settings, **changes})]
        for name, manifest in self.inputs.items():
            words += ["--input", f"{name}={manifest}"]
        if not visible_devices():
            return local_command(self.num_processes, words)
        launch = [sys.executable, "-m", "clipgraft.launch", "--gpu", str(self.num_processes)]
        return [*launch, "--", *words]


def watched(command: Sequence[str], memory_mb: int | None) -> tuple[str, int, bool]:
    """Run a command and its children until they end or take more memory than they may.

    Args:
        command: what to run.
        memory_mb: bound; None: any.

    Returns:
        What it said, the most that it took, in MB, and whether it was ended for that, here or by the kernel.
    """
    peak_mb, is_over = 0, False
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | _MOST,
        )
        try:
            while process.poll() is None:
                peak_mb = max(peak_mb, sum(map(own_mb, family(process.pid))))
                is_over = memory_mb is not None and peak_mb > memory_mb
                if is_over:
                    break
                time.sleep(0.02)
        finally:
            end(process)
        said.seek(0)
        is_over = (
            is_over or process.returncode == -signal.SIGKILL
        )  # by the kernel, for want of memory
        return said.read(), peak_mb, is_over


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and its children."""
    for pid in family(process.pid) if process.poll() is None else []:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += map(int, task.read_text().split())
        except OSError:  # it has just ended
            continue
    return [pid, *(each for child in children for each in family(child))]


def own_mb(pid: int) -> int:
    """The most memory that a process has had so far, but for pages of files; 0 while it is a copy of its parent."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        told = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
        words = [Path(f"/proc/{each}/cmdline").read_text() for each in (pid, told["PPid"][0])]
    except OSError:
        return 0
    if words[0] == words[1]:  # forked, and not yet another program: all it has is the parent's
        return 0
    kb = {name: int(rest[0]) for name, rest in told.items() if rest[-1:] == ["kB"]}
    return max(0, kb.get("VmHWM", 0) - kb.get("RssFile", 0)) // 1024


def free_mb() -> int:
    """What can be had without swapping, in the containers and jobs that this process is in."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return min([free // 1024, *group_mb()])


def group_mb(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """What is left of the bounds of this process's control groups (version 2)."""
    names = own.read_text().splitlines() if own.exists() else []
    paths = [line.removeprefix("0::/") for line in names if line.startswith("0::/")]
    left = []
    for group in [folder for path in paths for folder in (root / path, *(root / path).parents)]:
        with suppress(OSError, ValueError):  # no such group here; or "max", no bound
            bound = int((group / "memory.max").read_text())
            left.append(max(0, bound - int((group / "memory.current").read_text())) // 2**20)
    return left


def find_job(run: str, name: str, configs: Sequence[Path]) -> PlannedJob:
    """A training of a run, by its name or, if it is the only one, its stage.

    Raises:
        ConfigError: if there is none.
    """
    runs = read_config(*configs)
    if run not in runs:
        raise ConfigError(f"no run {run!r} in {configs[-1]}. Hint: {', '.join(runs)}")
    trainings = [job for job in plan_run(run, runs[run]) if "accumulate" in job.settings]
    found = [job for job in trainings if name in (job.name, job.stage)]
    exact = [job for job in found if job.name == name] or found
    if len(exact) != 1:
        names = ", ".join(job.name for job in trainings)
        raise ConfigError(f"{name!r} is no training of run {run}, or several. Hint: one of {names}")
    return exact[0]


def finished_inputs(job: PlannedJob, results: Path) -> dict[str, Path]:
    """Manifests of what a job reads.

    Raises:
        ConfigError: if one is not there.
    """
    inputs = {
        name: (results / of.folder / MANIFEST).resolve()
        for name, of in job.inputs.items()
        if name != WATCHED
    }
    for name, manifest in inputs.items():
        if not manifest.exists():
            of = job.inputs[name]
            raise ConfigError(
                f"{job.name} needs {of.name}, which is not there yet. Hint: snakemake --cores all "
                f"{results / of.folder / MANIFEST}"
            )
    return inputs


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: try, and say what to set."""
    given = _parse(arguments)
    try:
        job = find_job(given.run, given.job, given.configfile)
        check_processes(given.processes, job)
        memory_mb = None if given.memory is None else round(given.memory * 1000)
        if memory_mb is None and not visible_devices():
            memory_mb = round(FILLED * free_mb())
        trials = Trials(job, finished_inputs(job, given.results), given.processes, memory_mb)
        name_place(is_local=True)  # trials run here, also in a job of SLURM
        print(advice(trials, trials.largest()))
    except ConfigError as error:
        sys.exit(f"batch_size: {error}")


def check_processes(num: int, job: PlannedJob) -> None:
    """Check that so many processes can share the batch of a job here.

    Raises:
        ConfigError: if they cannot.
    """
    devices, batch_size = visible_devices(), int(job.settings["batch_size"])
    if num < 1 or batch_size % num:
        raise ConfigError(
            f"--processes {num}: {job.name}.batch_size = {batch_size:,} does not divide by it. Hint: a divisor"
        )
    if devices and num > len(devices):
        raise ConfigError(
            f"--processes {num}: this machine has {len(devices)} device{'s' * (len(devices) > 1)}"
        )


def advice(trials: Trials, size: int) -> str:
    """What to set."""
    num, given = trials.share // size, trials.job.settings["accumulate"]
    now = "as it is" if num == given else f"instead of {given}"
    return (
        f"{trials.job.name}: batch_size {trials.job.settings['batch_size']:,} over {trials.num_processes} "
        f"{'process' if trials.num_processes == 1 else 'processes'}, {size:,} at a time: accumulate: {num} ({now})"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m clipgraft.batch_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run")
    parser.add_argument("job", help="e.g. pretrain/short, finetune_expert/1, finetune_router")
    parser.add_argument("--configfile", type=Path, nargs="+", default=[Path("config.yaml")])
    parser.add_argument("--processes", type=int, default=1, help="that share a batch: devices")
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="of each GPU; of all processes of a CPU"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
