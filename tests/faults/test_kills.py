"""Laws of SIGKILL: the same command again ends with the same bits, and nothing is left running or lying about."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from campaign import Place, bits, is_stopped, kill, stopping_at, wait_for
from left_alone import snakemake

from clipgraft.config import load_config
from clipgraft.planning import plan_runs

SECONDS = 180  # for what takes five on an idle machine
pytestmark = pytest.mark.timeout(6 * SECONDS)


@pytest.fixture(scope="module")
def place(copy_to, tmp_path_factory) -> Place:
    """A checkout whose first phase is long enough to be killed in the middle."""
    tmp = tmp_path_factory.mktemp("killed")
    workflow = copy_to(tmp / "root")
    workflow.edit("small.yaml", "samples_seen: 96,", "samples_seen: 6400,")
    return Place(workflow.root, tmp / "tmp")


@pytest.fixture(scope="module")
def phase(place) -> Path:
    """Folder of the first phase, trained without a fault."""
    settings = load_config(yaml.safe_load((place.root / "small.yaml").read_text()))
    job = next(job for job in plan_runs(settings, {})["small"] if job.name == "pretrain/short")
    folder = place.root / "results" / job.folder
    run_to_the_end(place, command_for(place, folder))
    return folder


def command_for(place: Place, folder: Path) -> list[str | Path]:
    target = str((folder / "manifest.json").relative_to(place.root))
    return place.snakemake("--configfile", "small.yaml", "--cores", "2", target)


def run_to_the_end(place: Place, command: list[str | Path]) -> None:
    log = place.tmp.parent / "log.txt"
    code = place.start(command, log).wait(timeout=SECONDS)
    assert code == 0, log.read_text()[-3000:]


def trainers(place: Place) -> list[int]:
    words = place.processes().items()
    return [
        pid
        for pid, each in words
        if "scripts/pretrain.py" in each and "torch.distributed" not in each
    ]


def moments(place: Place, folder: Path) -> dict[str, Callable[[], object]]:
    return {
        "begins": lambda: trainers(place),
        "trains": lambda: list(folder.glob(".resume/*.pt")),
        "writes": lambda: any(map(is_stopped, trainers(place))),
    }


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        ("snakemake", "begins"),
        ("snakemake", "trains"),
        ("the trainer", "trains"),
        ("the trainer", "writes"),
        ("both", "trains"),
    ],
)
def test_the_same_command_again_ends_with_the_same_bits(place, phase, victim, moment):
    before = bits(place.root / "results")
    shutil.rmtree(phase)
    command = command_for(place, phase)
    stops = stopping_at("model.safetensors", place.tmp.parent / "stops")
    how = stops if moment == "writes" else {}
    process = place.start(command, place.tmp.parent / "killed.txt", **how)
    assert wait_for(moments(place, phase)[moment], SECONDS)
    if victim != "the trainer":
        process.kill()
    if victim != "snakemake":
        for pid in trainers(place):
            kill(pid)
    assert process.wait(timeout=SECONDS) != 0
    assert place.wait_until_empty(SECONDS) == {}
    assert not (phase / "manifest.json").exists()
    run_to_the_end(place, command)
    assert bits(place.root / "results") == before
    assert place.unfinished() == [] and place.wait_until_empty(SECONDS) == {}


@pytest.mark.parametrize("next_one", ["waits for it", "comes later"])
def test_what_a_job_finishes_without_its_snakemake_is_not_done_again(place, phase, next_one):
    before = bits(place.root / "results")
    shutil.rmtree(phase)
    command, log = command_for(place, phase), place.tmp.parent / f"{next_one}.txt"
    stops = stopping_at("model.safetensors", place.tmp.parent / "stops")
    process = place.start(command, place.tmp.parent / "killed.txt", **stops)
    assert wait_for(lambda: any(map(is_stopped, trainers(place))), SECONDS)
    [trainer] = trainers(place)
    process.kill()
    process.wait()
    if next_one == "waits for it":
        process = place.start(command, log)
        assert wait_for(lambda: "another process is writing" in log.read_text(), SECONDS)
    os.kill(trainer, signal.SIGCONT)
    if next_one == "comes later":
        assert place.wait_until_empty(SECONDS) == {}
        process = place.start(command, log)
    assert process.wait(timeout=SECONDS) == 0, log.read_text()[-3000:]
    assert "done by a job that had lost its Snakemake" in log.read_text()
    assert bits(place.root / "results") == before
    assert place.unfinished() == [] and place.wait_until_empty(SECONDS) == {}
    planned = place.start([*command, "-n"], log.with_suffix(".n.txt"))
    assert planned.wait(timeout=SECONDS) == 0
    assert "Nothing to be done" in log.with_suffix(".n.txt").read_text()


def by_two_processes(phase: Path, out: Path) -> list[str | Path]:
    launch = [sys.executable, "-m", "clipgraft.launch", "--nodes=2", "--threads=2", "--"]
    return [*launch, "scripts/pretrain.py", phase / "manifest.json", "--out", out]


@pytest.mark.parametrize("victim", ["a worker", "torchrun"])
def test_of_several_processes_none_is_left_and_all_go_on(place, phase, victim, tmp_path):
    whole, out = place.root / "results/try/whole", place.root / "results/try/killed"
    if not whole.exists():
        run_to_the_end(place, by_two_processes(phase, whole))
    process = place.start(by_two_processes(phase, out), tmp_path / "killed.txt")
    assert wait_for(lambda: list(out.glob(".resume/*.pt")), SECONDS)
    kill(process.pid if victim == "torchrun" else max(trainers(place)))
    assert process.wait(timeout=SECONDS) != 0
    assert place.wait_until_empty(SECONDS) == {}
    run_to_the_end(place, by_two_processes(phase, out))
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert place.unfinished() == []
    shutil.rmtree(out)


def test_of_several_processes_all_learn_that_there_is_nothing_left_to_do(place, phase, tmp_path):
    out, log = place.root / "results/try/alone", tmp_path / "log.txt"
    command = by_two_processes(phase, out)
    stops = stopping_at("model.safetensors", tmp_path / "stops")
    with snakemake() as (parent, word):
        process = place.start(command, log, **word, **stops)
        assert wait_for(lambda: [*map(is_stopped, trainers(place))] == [True], SECONDS)
        [trainer] = trainers(place)
        parent.kill()
        parent.wait()
        os.kill(trainer, signal.SIGCONT)
        assert process.wait(timeout=SECONDS) == 0, log.read_text()[-3000:]
    (out / "manifest.json").unlink()
    before = (out / "model.safetensors").stat().st_ino
    with snakemake() as (_, word):
        code = place.start(command, log, **word).wait(timeout=SECONDS)
    assert code == 0 and "done by a job that had lost its Snakemake" in log.read_text()
    assert (out / "manifest.json").exists()
    assert (out / "model.safetensors").stat().st_ino == before
    assert place.unfinished() == [] and place.wait_until_empty(SECONDS) == {}
    shutil.rmtree(out)
