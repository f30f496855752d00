"""A training that SLURM or its user stops has saved, goes on when it is started again, and ends with the same weights."""

from __future__ import annotations

import re
import shutil
import signal

import pytest
from cluster_site import LONG, Site
from interrupted import UNTIL, Training, prepare
from sandbox import wait_until

pytestmark = LONG


@pytest.fixture(scope="module")
def prepared(sandbox, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("prepared"))


def test_ctrl_c_cancels_jobs_which_save(sandbox, prepared, tmp_path):
    training = Training.begin(prepared, tmp_path / "site", sandbox)
    assert training.job
    with training.held():
        training.process.send_signal(signal.SIGINT)
    assert training.process.wait(timeout=200) != 0
    wait_until(lambda: not training.job, "the job to be cancelled")
    assert "told to stop: saved at step" in training.log
    training.again()
    training.finish(prepared / "reference")


def test_at_its_time_limit_a_training_saves_is_submitted_again_and_resumes(
    sandbox, prepared, tmp_path
):
    training = Training.begin(prepared, tmp_path / "site", sandbox)
    first = training.job
    with training.held():
        sandbox.ask("scontrol", "update", f"JobId={first}", "TimeLimit=1")
    training.finish(prepared / "reference")
    assert "told to stop: saved at step" in training.slurm_log(first)
    submitted = re.findall(r"SLURM jobid (\d+)", training.printed)
    assert len(submitted) == 2 and submitted[0] == first


def test_a_preempted_training_saves_and_comes_back(sandbox, prepared, tmp_path):
    cheap = ("--default-resources", "slurm_partition=scavenge", "mem_mb=2000")
    training = Training.begin(prepared, tmp_path / "site", sandbox, *cheap)
    command = ("--nodes=2", "--exclusive", "--mem=1000", "--partition=gpu", "--output=/dev/null")
    with training.held():
        urgent = sandbox.ask("sbatch", "--parsable", *command, "--wrap=sleep 3")
    training.finish(prepared / "reference")
    assert (
        sandbox.ask("squeue", "--noheader", "--states=all", f"--jobs={urgent}", "-o%T")
        == "COMPLETED"
    )


def test_a_failed_job_shows_its_log(sandbox, prepared, tmp_path):
    shutil.copytree(prepared / "site", tmp_path / "site")
    (path,) = (tmp_path / "site/results/index").glob("*/tokens/ids.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    printed = Site(tmp_path / "site", sandbox).snakemake(*UNTIL, "--retries", "0", code=1)
    assert "ids.npy is damaged: its sha256 is" in printed
    assert "run snakemake again" in printed
