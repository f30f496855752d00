"""The launcher: starts a script as one process or many, on devices leased for it.

Rules call `python -m clipgraft.launch --gpu WISH --nodes N --threads T -- scripts/x.py ...`. Snakemake counts devices
but hands out no ids, so each job leases its devices with one file lock per device, which the kernel drops when the
job ends, however it ends. A scheduler that sets CUDA_VISIBLE_DEVICES has chosen already.

On SLURM the executor strips SLURM's variables from the job, so `srun` is given the whole geometry, and the
rendezvous is taken from the first node's own host name. Signals must reach the trainer: every start is an `exec`.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

NODE_SCRIPT = (
    'exec "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$0" '
    '--master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" "$@"'
)
SECONDS_TO_SAVE = 300  # torchrun kills workers this long after SIGTERM


def main(arguments: Sequence[str] | None = None) -> None:
    """Replace this process by the script, or by what starts the script on all devices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", type=int, default=0, help="devices wished for, over all nodes")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per node")
    parser.add_argument("--batch-size", type=int, default=0, help="global; devices must divide it")
    parser.add_argument("command", nargs="+", help="script and its arguments")
    given = parser.parse_args(arguments)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    if is_slurm_allocation():
        per_node = max(1, given.gpu // given.nodes)
        job = int(os.environ["SLURM_JOB_ID"])
        os.environ |= {
            "MASTER_ADDR": socket.gethostname(),
            "MASTER_PORT": str(20_000 + job % 20_000),
        }
        command = srun_command(given.nodes, per_node, given.threads, given.command)
    else:
        devices = lease_wish(given.gpu, given.batch_size)
        command = local_command(len(devices), given.command)
    os.execvp(command[0], command)


def is_slurm_allocation() -> bool:
    """Whether this runs in a SLURM job that no `srun` has wrapped yet (a rule with the `mpi` resource)."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ


def srun_command(nodes: int, per_node: int, threads: int, command: Sequence[str]) -> list[str]:
    """One torchrun per node of the allocation."""
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
        NODE_SCRIPT,
        str(per_node),
        *command,
    ]


def local_command(num_devices: int, command: Sequence[str]) -> list[str]:
    """Plain python for one process, torchrun for several."""
    if num_devices <= 1:
        return [sys.executable, *command]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, "--standalone", f"--nproc-per-node={num_devices}", *command]


def lease_wish(wish: int, batch_size: int = 0) -> list[str]:
    """Lease the devices wished for, or those there are if fewer, and make only them visible.

    Args:
        wish: number of devices.
        batch_size: global batch, which must divide by their number; 0: anything goes.
    Returns:
        Device ids; empty where there are none, or none were wished for.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = find_devices() if listed is None else [each for each in listed.split(",") if each]
    count = min(wish, len(present))
    while batch_size and count and batch_size % count:
        count -= 1
    if 0 < count < wish:
        print(
            f"launch: {wish} GPUs wished for, {len(present)} here: using {count}", file=sys.stderr
        )
    if listed is not None and "SLURM_JOB_ID" in os.environ:
        devices = present[:count]  # chosen for this job alone
    else:
        devices = lease(present, count, lease_folder())
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return devices


def lease_folder() -> Path:
    """Where all jobs of this user keep their lock files."""
    return Path(tempfile.gettempdir()) / f"clipgraft-devices-{os.getuid()}"


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
    told = False
    while True:
        held = [
            (device, file)
            for device in devices
            if (file := _try_lock(folder / f"gpu{device}.lock"))
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


def _try_lock(path: Path) -> IO[str] | None:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


if __name__ == "__main__":
    main()
