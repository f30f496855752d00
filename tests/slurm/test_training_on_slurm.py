"""A training on a cluster whose user stops it, whose Snakemake is killed, or whose data are damaged."""

from __future__ import annotations

import shutil
import signal

import pytest
from cluster_site import Site
from interrupted import UNTIL, Training, prepare
from sandbox import wait_until

pytestmark = pytest.mark.timeout(1200)  # where cores are shared each of them takes minutes


@pytest.fixture(scope="module")
def prepared(sandbox, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("prepared"))


def test_a_failed_job_shows_its_log(sandbox, prepared, tmp_path):
    shutil.copytree(prepared / "site", tmp_path / "site")
    (path,) = (tmp_path / "site/results/index").glob("*/tokens/ids.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    printed = Site(tmp_path / "site", sandbox).snakemake(*UNTIL, "--retries", "0", code=1)
    assert "ids.npy is damaged: its sha256 is" in printed
    assert "run snakemake again" in printed


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


def test_a_killed_snakemake_leaves_a_job_that_the_next_one_ends_and_takes_over(
    sandbox, prepared, tmp_path
):
    training = Training.begin(prepared, tmp_path / "site", sandbox)
    orphan = training.job
    training.kill(signal.SIGKILL)
    assert training.job == orphan
    with training.held():
        training.again("--unlock")
        assert training.process.wait(timeout=200) == 0
        training.again("--slurm-keep-successful-logs")
    training.finish(prepared / "reference")
    assert f"job {orphan} is at this work, too" in training.slurm_log(str(int(orphan) + 1))
