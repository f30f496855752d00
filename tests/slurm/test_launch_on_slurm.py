"""The launcher under real `sbatch` and `srun`: who is started where, with which devices; and orphans of a killed Snakemake."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from shlex import join

import pytest
from sandbox import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent

SAY = """
import json, os, sys
from pathlib import Path
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NODEID", "CUDA_VISIBLE_DEVICES")
about = {name: os.environ.get(name) for name in names}
(Path(sys.argv[1]) / f"{about['RANK']}.json").write_text(json.dumps(about))
"""

# Trains until it is told to stop, and then takes a moment to save.
TRAIN = """
import signal, sys, time
from pathlib import Path
here = Path(sys.argv[1])
def stop(*_):
    time.sleep(2)
    (here / "saved").write_text("")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(here / f"began{sys.argv[2]}").write_text(str((here / "saved").exists()))
if sys.argv[2] != "2":
    time.sleep(100)
"""


def submit(sandbox, folder, options, *command):
    """Submit a call of the launcher, as the rules have it; returns the id of the job."""
    words = ["sbatch", "--parsable", f"--chdir={folder}", f"--output={folder}/%j.log", *options]
    words += [
        "--export=ALL",
        f"--wrap={join([sys.executable, '-m', 'clipgraft.launch', *command])}",
    ]
    return sandbox.ask(*words)


def wait_for(sandbox, folder, job):
    wait_until(lambda: job_state(sandbox, job) not in ("PENDING", "RUNNING", "COMPLETING"), job)
    assert job_state(sandbox, job) == "COMPLETED", (folder / f"{job}.log").read_text()


def job_state(sandbox, job):
    return sandbox.ask("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}")


@pytest.mark.parametrize("gpus", [0, 2])
def test_torchrun_starts_on_both_nodes_with_their_devices(sandbox, tmp_path, gpus):
    (tmp_path / "say.py").write_text(SAY)
    options = ["--nodes=2", "--mem=2000", "--cpus-per-task=2"]
    options += [f"--gres=gpu:{gpus}", f"--gpus={2 * gpus}"] if gpus else []
    command = ["--gpu", f"{2 * gpus}", "--gpus-per-node", f"{gpus}", "--nodes", "2"]
    command += ["--threads", "2", "--", f"{tmp_path}/say.py", str(tmp_path), "--log", "x"]
    wait_for(sandbox, tmp_path, submit(sandbox, tmp_path, options, *command))
    said = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    size = 2 * max(1, gpus)
    assert sorted(int(each["RANK"]) for each in said) == list(range(size))
    assert {each["WORLD_SIZE"] for each in said} == {str(size)}
    assert sorted({each["SLURM_NODEID"] for each in said}) == ["0", "1"]
    assert {each["CUDA_VISIBLE_DEVICES"] for each in said} == {"0,1" if gpus else ""}


def test_an_orphan_saves_and_leaves_before_the_same_work_begins_again(sandbox, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    options = ["--mem=1000", "--comment=rule_train_wildcards_x"]
    command = ["--", f"{tmp_path}/train.py", str(tmp_path)]
    first = submit(sandbox, tmp_path, options, *command, "1")
    other = submit(
        sandbox, tmp_path, [options[0], "--comment=rule_train_wildcards_y"], *command, "3"
    )
    wait_until((tmp_path / "began1").exists, "the orphan")
    wait_until((tmp_path / "began3").exists, "the other work")
    second = submit(sandbox, tmp_path, options, *command, "2")
    wait_for(sandbox, tmp_path, second)
    assert (tmp_path / "began2").read_text() == "True"
    assert job_state(sandbox, first) == "FAILED"
    assert job_state(sandbox, other) == "RUNNING"  # another work is left alone
    sandbox.ask("scancel", other)


def test_the_launcher_outside_of_slurm_starts_as_many_processes_as_there_would_be_nodes(tmp_path):
    import subprocess

    (tmp_path / "say.py").write_text(SAY)
    command = [sys.executable, "-m", "clipgraft.launch", "--nodes", "2", "--", f"{tmp_path}/say.py"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    subprocess.run(
        [*command, str(tmp_path), "--log", "x"], check=True, env=env, capture_output=True
    )
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["0.json", "1.json"]
