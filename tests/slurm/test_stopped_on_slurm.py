"""A training that SLURM stops has saved, goes on when it is started again, and ends with the same weights."""

from __future__ import annotations

import re

import pytest
from interrupted import Training, prepare

pytestmark = pytest.mark.timeout(1200)  # two minutes; where cores are shared several times that


@pytest.fixture(scope="module")
def prepared(sandbox, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("prepared"))


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
