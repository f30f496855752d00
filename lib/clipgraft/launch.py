"""The launcher: starts a script as one process or many, on devices leased for it.

Rules call `python -m clipgraft.launch --gpu WISH ... --threads T -- scripts/x.py ...`. Snakemake counts devices
but hands out no ids, so each job leases its devices with one file lock per device, which the kernel drops when the
job ends, however it ends. A scheduler that sets CUDA_VISIBLE_DEVICES has chosen already.

On SLURM the executor strips SLURM's variables from the job, so `srun` is given the whole geometry, and the
rendezvous is taken from the first node's own host name. Signals must reach the trainer: every start is an `exec`.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import IO
from urllib.parse import quote

from clipgraft.lock import try_lock
from clipgraft.orphan import TORCHRUN, is_on_slurm, leave_with_parents

# `--`: torchrun would take the script's `--log` for an abbreviation of its own options.
NODE_SCRIPT = (
    f"export {TORCHRUN}=$$; "
    'exec "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$0" '
    '--master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" -- "$@"'
)
HIDE_DEVICES = (
    "export CUDA_VISIBLE_DEVICES="  # by each node itself: SLURM takes it off what it hands on
)
_QUESTIONS = 150
_WSL = Path("/dev/dxg")  # stands there for all GPUs, of any maker
SECONDS_TO_SAVE = 300  # torchrun kills workers this long after SIGTERM
_FOR_EVER = 10**7  # seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Replace this process by the script, or by what starts the script on all devices."""
    given = _parse(arguments)
    leave_with_parents()  # also while it waits for devices
    on_slurm = is_on_slurm()  # which kills by itself, when the time that it has given is over
    seconds = _FOR_EVER if on_slurm else SECONDS_TO_SAVE
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(seconds))
    # What torchrun passes on to its workers; of a signal that it does not know it would die alone.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    # Its own logs, of which there are none: of each start it would leave an empty folder in TMPDIR.
    os.environ.setdefault("PET_LOG_DIR", os.devnull)
    if given.part:
        os.environ["CLIPGRAFT_PART"] = given.part
    if is_slurm_allocation():
        end_twins(int(os.environ["SLURM_JOB_ID"]), given.seconds_to_save)
        os.environ |= {
            "PYTHON": sys.executable,
            "MASTER_ADDR": socket.gethostname(),
            "MASTER_PORT": str(_free_port()),
        }
        processes = per_node(given.nodes, given.gpus_per_node, given.batch_size)
        command = srun_command(
            given.nodes,
            processes,
            given.threads,
            given.command,
            has_devices=given.gpus_per_node > 0,
        )
    elif given.gpus_per_node or given.nodes == 1:
        if given.gpus_per_node and not given.gpu and not on_slurm:
            print(
                "launch: no GPUs: --resources gpu=0, or slurm.devices = gres, which belongs into "
                "workflow/profiles/slurm/config.yaml",
                file=sys.stderr,
            )
        wish = given.gpus_per_node if on_slurm else given.gpu
        devices = lease_wish(wish, given.batch_size)
        command = local_command(len(devices), given.command)
    else:  # the processes that SLURM would start
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        command = local_command(given.nodes, given.command)
    os.environ[TORCHRUN] = str(os.getpid())  # which it stays, as all that follows here
    os.execvp(command[0], command)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", type=int, default=0, help="devices wished for, over all nodes")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="of them, on SLURM")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per node")
    parser.add_argument("--batch-size", type=int, default=0, help="global; devices must divide it")
    parser.add_argument("--seconds-to-save", type=int, default=0, help="that SLURM gives")
    parser.add_argument("--part", help="K-of-N: the share of the work that is this job's")
    parser.add_argument("command", nargs="+", help="script and its arguments")
    return parser.parse_args(arguments)


def end_twins(job: int, seconds_to_save: int) -> None:
    """Have an older job of the same rule, wildcards and folder save and leave, and wait until it has.

    There is one if its Snakemake was killed: the next one knows nothing of it and submits the same again. It has the time
    that the site gives for saving, and at least SECONDS_TO_SAVE; then it is ended.
    """
    seconds = max(SECONDS_TO_SAVE, seconds_to_save)
    rows = {row[0]: row[1:] for row in _queue(f"--user={os.getuid()}")}
    own = rows.get(str(job), ("", ""))
    if not own[1].startswith("rule_"):  # not of Snakemake, which may itself run in a job
        return
    twins = [name for name, row in rows.items() if row == own and int(name) < job]
    if not twins:
        return
    jobs = ",".join(twins)
    print(f"launch: job {jobs} is at this work, too: told to save and leave", file=sys.stderr)
    subprocess.run(["scancel", "--state=PENDING", *twins], check=False)
    subprocess.run(["scancel", "--signal=TERM", *twins], check=False)
    begun = time.monotonic()
    while _queue(f"--jobs={jobs}"):
        if time.monotonic() - begun > 2 * seconds:
            sys.exit(f"launch: error: job {jobs} does not end. Hint: squeue --jobs={jobs}, scancel")
        if time.monotonic() - begun > seconds:
            subprocess.run(["scancel", *twins], check=False)
        time.sleep(2)


def _queue(which: str) -> list[tuple[str, ...]]:
    """Id, folder and comment (the rule and its wildcards) of jobs that are not over; waits while nobody answers."""
    command = ["squeue", "--noheader", "--format=%A|%Z|%k", which]
    for _ in range(_QUESTIONS):
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            return [tuple(line.split("|", 2)) for line in asked.stdout.splitlines()]
        if "Invalid job id" in asked.stderr:  # over, and forgotten
            return []
        time.sleep(2)
    sys.exit(f"launch: error: squeue does not answer: {asked.stderr.strip()}")


def _free_port() -> int:
    """A port that nobody has on this node, the first of the allocation, where the first process will be."""
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def is_slurm_allocation() -> bool:
    """Whether this runs in a SLURM job that no `srun` has wrapped yet (a rule with the `mpi` resource)."""
    return is_on_slurm() and "SLURM_STEP_ID" not in os.environ


def per_node(nodes: int, wish: int, batch_size: int) -> int:
    """Processes of each node: as many as devices are wished for, or as many as the batch divides by."""
    processes = _dividing(batch_size, max(1, wish), nodes)
    if processes < wish:
        print(
            f"launch: {wish} GPUs a node wished for, on {nodes} nodes a batch of {batch_size} divides by {processes}: "
            f"using {processes}",
            file=sys.stderr,
        )
    return processes


def _dividing(batch_size: int, most: int, nodes: int = 1) -> int:
    """The largest number of processes of each node that the batch divides by; 0: anything goes."""
    return next(num for num in range(most, -1, -1) if num < 2 or not batch_size % (nodes * num))


def srun_command(
    nodes: int, per_node: int, threads: int, command: Sequence[str], *, has_devices: bool
) -> list[str]:
    """One torchrun per node of the allocation; without devices it sees none, also where no cgroup hides them."""
    geometry = [
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={threads}",
    ]
    return [
        "srun",
        *geometry,
        "--kill-on-bad-exit=1",
        "bash",
        "-c",
        NODE_SCRIPT if has_devices else f"{HIDE_DEVICES}; {NODE_SCRIPT}",
        str(per_node),
        *command,
    ]


def local_command(num_processes: int, command: Sequence[str]) -> list[str]:
    """Plain python for one process, torchrun for several."""
    if num_processes <= 1:
        return [sys.executable, *command]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, "--standalone", f"--nproc-per-node={num_processes}", "--", *command]


def lease_wish(wish: int, batch_size: int = 0) -> list[str]:
    """Lease the devices wished for, or those there are if fewer, and make only them visible.

    Args:
        wish: number of devices.
        batch_size: global batch, which must divide by their number; 0: anything goes.
    Returns:
        Device ids; empty where there are none, or none were wished for.
    """
    present = visible_devices()
    if wish and "CUDA_VISIBLE_DEVICES" not in os.environ and not present and _WSL.exists():
        print(
            "launch: no GPUs found: WSL does not list them. Hint: if there is one of NVIDIA, export CUDA_VISIBLE_DEVICES=0",
            file=sys.stderr,
        )
    most = min(wish, len(present))
    count = _dividing(batch_size, most)
    if 0 < count < wish:
        why = f", and a batch of {batch_size} divides by {count}" if count < most else ""
        print(
            f"launch: {wish} GPUs wished for, {len(present)} here{why}: using {count}",
            file=sys.stderr,
        )
    if "CUDA_VISIBLE_DEVICES" in os.environ and is_on_slurm():
        devices = present[:count]  # chosen for this job alone
    else:
        devices = lease(present, count, lease_folder())
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return devices


def visible_devices() -> list[str]:
    """Those of CUDA_VISIBLE_DEVICES, or all; as CUDA reads it, `-1` and what follows it is not seen."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return find_devices()
    names = (each.strip() for each in listed.split(","))
    return list(dict.fromkeys(takewhile(lambda name: name and name[0] != "-", names)))


def lease_folder() -> Path:
    """Where all jobs of this user keep their lock files.

    Each allocation of devices by SLURM has its own: where a cgroup hides the others, its devices count from 0.
    """
    is_allocated = "SLURM_JOB_GPUS" in os.environ
    allocation = f"-{os.environ['SLURM_JOB_ID']}" if is_allocated else ""
    return Path(tempfile.gettempdir()) / f"clipgraft-devices-{os.getuid()}{allocation}"


def find_devices() -> list[str]:
    """Indices of the NVIDIA devices of this machine (without asking CUDA, which takes seconds)."""
    names = sorted(
        path.name for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)
    )
    return [str(index) for index in range(len(names))]


def lease(devices: Sequence[str], count: int, folder: Path, poll_seconds: float = 1.0) -> list[str]:
    """Wait until `count` of the devices are free, and lock them until this process (or what it execs) ends.

    All or none are taken at a time, so that two jobs that each want several never wait for one another.

    Args:
        devices: ids to choose from.
        count: how many; at most `len(devices)`.
        folder: where the lock files are, shared by all jobs of this user.
        poll_seconds: pause between looks.
    """
    assert count <= len(devices), (count, devices)
    if not count:
        return []
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.lstat()
    if about.st_uid != os.getuid() or not stat.S_ISDIR(about.st_mode):
        # Its locks are opened for writing: links that another user has put there would lead to files of this one.
        sys.exit(
            f"launch: {folder} is no folder of this user. Hint: remove it, or set TMPDIR to a folder of your own"
        )
    told = False
    while True:
        held = [
            (device, file)
            for device in devices
            if (file := try_lock(folder / f"gpu{quote(device, safe='')}.lock"))  # MIG-GPU-.../1/0
        ]
        if len(held) >= count:
            for _, file in held[count:]:
                file.close()
            for _, file in held[:count]:
                os.set_inheritable(file.fileno(), True)  # the lock lives on in the exec'd process
                _held.append(file)
            return [device for device, _ in held[:count]]
        for _, file in held:
            file.close()
        if not told:
            print(
                f"launch: waiting for {count} free GPUs ({len(held)} are free now)", file=sys.stderr
            )
            told = True
        time.sleep(poll_seconds)


_held: list[IO[str]] = []  # keeps lease files open


if __name__ == "__main__":
    main()
