"""Which folders of the store may go."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clipgraft.config import read_config
from clipgraft.planning import plan_run
from clipgraft.runs import link_run

SMALL = Path(__file__).parent / "config" / "small.yaml"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a config whose run has been trained, but not linked yet."""
    shutil.copy(SMALL, tmp_path / "config.yaml")
    for job in plan_run("small", read_config(SMALL)["small"]):
        if job.stage in ("download", "index", "shard", "pretrain"):
            folder = tmp_path / "results" / job.folder
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
    return tmp_path


def unused(place: Path, *words: str) -> set[str]:
    """Stages of the folders that are listed."""
    command = [sys.executable, "-m", "clipgraft.runs", "unused", *words]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
    return {Path(line.split()[-1]).parent.name for line in done.stdout.splitlines()[:-1]}


def test_what_a_run_has_made_that_is_not_finished_is_in_use(place):
    assert unused(place) == set()


def test_what_neither_a_plan_nor_a_lock_names_may_go(place):
    (place / "other.yaml").write_text("seed: 1\n")
    words = ("--configfile", "config.yaml", "other.yaml")
    assert unused(place, *words) == {"pretrain"}
    trained = {
        job.name: job.folder
        for job in plan_run("small", read_config(SMALL)["small"])
        if job.stage == "pretrain"
    }
    link_run("small", trained, place / "results")
    assert unused(place, *words) == set()


def test_what_was_stopped_may_go_unless_a_plan_names_it(place):
    """A stopped training has no manifest, and may be the largest folder of all; so has what `explore` has embedded."""
    results = place / "results"
    job = next(
        job for job in plan_run("small", read_config(SMALL)["small"]) if job.name == "pretrain/full"
    )
    (results / job.folder / "manifest.json").unlink()
    (results / job.folder / ".resume").mkdir()
    assert unused(place) == set()
    for stopped in (
        "pretrain/0123abcd/.resume",
        "explore/bits",
        "evalset/0123abcd",
        "runs/0123abcd",
    ):
        (results / stopped).mkdir(parents=True)
    command = [sys.executable, "-m", "clipgraft.runs", "unused"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
    listed = [line.split()[-1] for line in done.stdout.splitlines()[:-1]]
    assert listed == ["results/explore", "results/pretrain/0123abcd"]


def test_a_config_that_cannot_be_read_is_named_and_nothing_is_listed(place):
    command = [sys.executable, "-m", "clipgraft.runs", "unused", "--configfile", "none.yaml"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "unused: config file none.yaml does not exist\n"
