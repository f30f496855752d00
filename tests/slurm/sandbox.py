"""A real SLURM of our own: slurmctld, munged and a slurmd per node, all on loopback, for as long as a `with` lasts.

    python tests/slurm/sandbox.py FOLDER [COMMAND ...]     run a command (a shell) with it, and stop it

Debian's build of SLURM lets several slurmd live on one host. Each start has its own folder, its own ports and its own
munge key, so that several do not collide, and nothing is written to /etc. Devices are null devices by other names.
There is no accounting (no database): `sacct` is there and fails, as on many a cluster.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
NUM_NODES, NUM_GPUS = 2, 4

# cred_expire: a job that SLURM requeues waits that long, two minutes where it is not set. cpus and memory are made up
# (config_overrides). SlurmdTimeout: a node that is silent so long is down, and its jobs have failed.
CONF = """
ClusterName=sandbox
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,requeue_delay=1
MinJobAge=300
KillWait=30
SlurmctldTimeout=60
SlurmdTimeout=10
InactiveLimit=0
Waittime=0
CompleteWait=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=1-00:00:00 DefMemPerCPU=256 PriorityTier=10 PreemptMode=OFF
PartitionName=scavenge Nodes=ALL MaxTime=1-00:00:00 DefMemPerCPU=256 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
"""
NODE = (
    "NodeName=node{k} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=16 ThreadsPerCore=1 RealMemory=32768 Gres=gpu:fake:{gpus} State=UNKNOWN"
)


def missing() -> str:
    """Why there can be no sandbox here; empty where there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if lacking:
        return f"no {', '.join(lacking)} here (Debian: slurmctld slurmd slurm-client munge)"
    if os.getuid():
        return "slurmd has to be root"
    with suppress(OSError):
        if socket.gethostbyname(socket.gethostname()).startswith("127."):
            return ""
    return f"{socket.gethostname()} is no loopback address, and srun listens on it"


@dataclass
class Sandbox:
    """A running cluster.

    Attributes:
        folder: of its configuration, state and logs.
        env: what commands need to find it.
    """

    folder: Path
    env: dict[str, str]

    def ask(self, *command: str) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def start(self, name: str) -> None:
        """Start a daemon: `munged`, `slurmctld` or the name of a node."""
        run, log, etc = (self.folder / part for part in ("run", "log", "etc"))
        munged = ["munged", f"--key-file={etc}/munge.key", f"--socket={run}/munge.socket"]
        munged += [f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log"]
        munged += [f"--seed-file={run}/munge.seed", "--num-threads=2"]
        command = {"munged": munged, "slurmctld": ["slurmctld"]}.get(name, ["slurmd", "-N", name])
        subprocess.run(command, env=self.env, check=True, capture_output=True)

    def pid(self, name: str) -> int:
        """The process of a daemon; 0: it does not run."""
        file = name if name in ("munged", "slurmctld") else f"slurmd-{name}"
        try:
            pid = int((self.folder / "run" / f"{file}.pid").read_text())
            is_ours = str(self.folder) in (Path("/proc") / str(pid) / "environ").read_text()
        except (OSError, ValueError):
            return 0
        return pid if is_ours else 0

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a daemon at once."""
        if pid := self.pid(name):
            os.kill(pid, number)
            wait_until(lambda: not self.pid(name), f"{name} to end")

    def nodes_of(self, job: str) -> list[str]:
        """Those that have run the first `srun` of a job, after their own logs."""
        said = f"launch task StepId={job}.0 "
        logs = sorted((self.folder / "log").glob("slurmd-*.log"))
        return [log.stem.removeprefix("slurmd-") for log in logs if said in log.read_text()]

    def nodes_are_up(self) -> bool:
        """Whether all nodes take jobs."""
        states = self.ask("sinfo", "--noheader", "-N", "-p", "gpu", "-o", "%T").split()
        return len(states) == NUM_NODES and not any(
            state.strip("-") not in ("idle", "mixed", "allocated", "completing") for state in states
        )


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Look five times a second until something is so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)


@contextmanager
def running(folder: Path) -> Iterator[Sandbox]:
    """A cluster of two nodes with four devices each."""
    _write(folder)
    sandbox = Sandbox(folder, _env(folder))
    try:
        sandbox.start("munged")
        wait_until((folder / "run/munge.socket").exists, "munged")
        sandbox.start("slurmctld")
        for k in range(1, NUM_NODES + 1):
            sandbox.start(f"node{k}")
        with suppress(AssertionError):
            wait_until(lambda: _is_up(sandbox), "nodes")
        assert sandbox.nodes_are_up(), (folder / "log/slurmctld.log").read_text()[-3000:]
        yield sandbox
    finally:
        _stop(sandbox)


def _is_up(sandbox: Sandbox) -> bool:
    try:
        return sandbox.nodes_are_up()
    except AssertionError:
        return False


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _env(folder: Path) -> dict[str, str]:
    """Without the variables of a job that this may run in; the clients below come first."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {
        **env,
        "PATH": f"{folder}/bin:{_path()}",
        "SLURM_CONF": f"{folder}/etc/slurm.conf",
    }


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has now. All are held at once, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _write(folder: Path) -> None:
    for name in ("etc", "run", "log", "state", "dev", "bin"):
        (folder / name).mkdir(parents=True)
    for part in (folder, *folder.parents):  # munged wants its socket where all can reach it
        if part.stat().st_uid == os.getuid() and not part.stat().st_mode & 0o011:
            part.chmod(0o755)
    etc, host, ports = folder / "etc", socket.gethostname(), _free_ports(1 + NUM_NODES)
    (etc / "munge.key").write_bytes(os.urandom(1024))
    (etc / "munge.key").chmod(0o600)
    nodes = []
    for k, port in enumerate(ports[1:], start=1):
        (folder / "spool" / f"node{k}").mkdir(parents=True)
        nodes.append(NODE.format(k=k, host=host, port=port, gpus=NUM_GPUS))
    conf = CONF.format(folder=folder, host=host, port=ports[0], nodes="\n".join(nodes))
    (etc / "slurm.conf").write_text(conf)
    for k in range(NUM_GPUS):
        os.mknod(folder / f"dev/gpu{k}", 0o020666, os.makedev(1, 3))
    gres = f"AutoDetect=off\nName=gpu Type=fake File={folder}/dev/gpu[0-{NUM_GPUS - 1}]\n"
    (etc / "gres.conf").write_text(gres)
    (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    # The plugin's job step drops SLURM_CONF, so clients bring their own.
    for name in ("sacct", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun"):
        client = folder / "bin" / name
        client.write_text(f'#!/bin/sh\nSLURM_CONF={etc}/slurm.conf exec /usr/bin/{name} "$@"\n')
        client.chmod(0o755)


def _stop(sandbox: Sandbox) -> None:
    """Jobs first, so that no step outlives its daemon; then what is left, by the folder in its environment."""
    with suppress(AssertionError, subprocess.TimeoutExpired):
        if sandbox.pid("slurmctld"):
            sandbox.ask("scancel", "--user=root")
            wait_until(lambda: not sandbox.ask("squeue", "--noheader"), "jobs to end", 20)
    for name in (*(f"node{k}" for k in range(1, NUM_NODES + 1)), "slurmctld", "munged"):
        with suppress(AssertionError, ProcessLookupError):
            sandbox.kill(name, signal.SIGTERM)
    for pid in processes_of(sandbox):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_of(sandbox: Sandbox) -> list[int]:
    """Processes of the cluster: its configuration, or its clients, are in their environment."""
    marks = [f"{sandbox.folder}/{part}".encode() for part in ("bin:", "etc/slurm.conf")]
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit():
                about = (folder / "environ").read_bytes()
                found += [int(folder.name)] if any(mark in about for mark in marks) else []
    return [pid for pid in found if pid != os.getpid()]


if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"sandbox: {reason}")
    with running(Path(sys.argv[1]).resolve()) as cluster:
        subprocess.run(sys.argv[2:] or ["bash"], env=cluster.env)
