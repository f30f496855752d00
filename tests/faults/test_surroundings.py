"""Laws of what surrounds a job: other calls of snakemake, the clock, disks that are full, read-only or slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from campaign import Place, wait_for
from mounts import mounted

from clipgraft.config import load_config, sweep_points
from clipgraft.planning import SWEEP, plan_runs

SECONDS = 180  # for what takes five on an idle machine


@pytest.fixture
def place(finished, tmp_path) -> Place:
    return Place(finished.root, tmp_path / "tmp", save_seconds=60)


def manifest_of(finished, job: str) -> Path:
    folder = (finished.root / "results/runs/small" / job).resolve()
    return (folder / "manifest.json").relative_to(finished.root)


# --- two at once --------------------------------------------------------------------------------------------


def test_a_second_snakemake_for_the_same_files_is_refused_and_one_for_others_is_not(
    finished, place
):
    text = (finished.root / "small.yaml").read_text()
    long = finished.root / "long.yaml"
    long.write_text(text.replace("samples_seen: 96", "samples_seen: 64000"))
    jobs = plan_runs(load_config(yaml.safe_load(long.read_text())), {})["small"]
    folder = next(f"results/{job.folder}" for job in jobs if job.name == "pretrain/short")
    command = place.snakemake(
        "--configfile", "long.yaml", "--cores", "1", f"{folder}/manifest.json"
    )
    other = manifest_of(finished, "report")
    (finished.root / other).unlink()
    first = place.start(command, place.tmp.parent / "first.txt")
    try:
        assert wait_for(
            lambda: any("scripts/pretrain.py" in each for each in place.processes().values()),
            SECONDS,
        )
        second = place.start(command, place.tmp.parent / "second.txt")
        assert second.wait(timeout=SECONDS) == 1
        assert "cannot be locked" in (place.tmp.parent / "second.txt").read_text()
        assert any("scripts/pretrain.py" in each for each in place.processes().values())
        finished.snakemake("--cores", "1", str(other))
        assert (finished.root / other).exists() and first.poll() is None
    finally:
        first.kill()
        first.wait()
        assert place.wait_until_empty(SECONDS) == {}
    shutil.rmtree(finished.root / folder)
    long.unlink()


# --- the clock ----------------------------------------------------------------------------------------------


def test_times_of_files_decide_nothing(finished):
    manifests = sorted((finished.root / "results").glob("*/*/manifest.json"))
    for path, hours in zip(
        manifests, np.random.default_rng(0).uniform(-9, 9, len(manifests)), strict=True
    ):
        os.utime(path, (time.time() + 3600 * hours,) * 2)
    assert finished.planned() == []


def test_when_the_clock_goes_back_jobs_go_on(finished):
    for path in (finished.root / "results").glob("*/*/manifest.json"):
        os.utime(path, (time.time() + 3600,) * 2)  # as if written before
    manifest = manifest_of(finished, "report")
    (finished.root / manifest).unlink()
    finished.snakemake("--cores", "1", str(manifest))
    assert (finished.root / manifest).exists() and finished.planned() == []


# Python's clock has jumped by so many hours whenever it is looked at again; saves of state are noted.
JUMPS = """
import itertools, runpy, sys, time
runpy.run_path({no_network!r})
real, looks = time.time, itertools.count()

def note(event, words):
    if event == "os.rename" and "/.resume/" in str(words[1]):
        with open({notes!r}, "a") as file:
            file.write("saved ")

sys.addaudithook(note)
time.time = lambda: real() + 3600 * {hours} * next(looks)
"""


def trained(finished, folder: Path, hours: int) -> tuple[bytes, int]:
    """Weights of the first phase, and how often state was saved."""
    folder.mkdir()
    no_network = Path(__file__).parents[1] / "no_network/sitecustomize.py"
    notes = folder / "notes.txt"
    notes.touch()
    code = JUMPS.format(no_network=str(no_network), notes=str(notes), hours=hours)
    (folder / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    out = folder / "out"
    done = replay(finished, "pretrain/short", out, CLIPGRAFT_SAVE_SECONDS="0", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    return (out / "model.safetensors").read_bytes(), len(notes.read_text().split())


def test_a_clock_that_jumps_during_training_changes_no_bit_and_no_save(finished, tmp_path):
    whole = trained(finished, tmp_path / "still", 0)
    assert whole[1] > 3
    assert trained(finished, tmp_path / "back", -1) == whole
    assert trained(finished, tmp_path / "forward", 1) == whole


# --- disks --------------------------------------------------------------------------------------------------


def replay(finished, job: str, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    manifest = str(finished.root / manifest_of(finished, job))
    return run_script(finished, job.split("/")[0], [manifest], out, **env)


def run_script(
    finished, stage: str, words: list[str], out: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    script = finished.root / f"scripts/{stage}.py"
    return subprocess.run(
        [sys.executable, script, *words, "--out", out, "--threads", "1"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def words_for(finished, job: str) -> list[str]:
    """Of a job of the run, its manifest; of a stage that the run has not, settings and inputs."""
    if job == "soup":
        settings, inputs = {}, {"expert_0": finished.root / manifest_of(finished, "pretrain/full")}
    elif job == "scaling":  # of points that are all the run
        raw = yaml.safe_load((finished.root / "small.yaml").read_text())
        raw["sweep"] = {"seed": {"s0": {"seed": 0}, "s1": {"seed": 1}}}
        [planned] = plan_runs(load_config(raw), sweep_points(raw))[SWEEP]
        settings, jobs = planned.settings, [name.partition("/")[2] for name in planned.inputs]
        names = zip(planned.inputs, jobs, strict=True)
        inputs = {name: finished.root / manifest_of(finished, of) for name, of in names}
    else:
        return [str(finished.root / manifest_of(finished, job))]
    given = [word for name, path in inputs.items() for word in ("--input", f"{name}={path}")]
    return ["--settings", json.dumps(settings), *given]


@pytest.mark.parametrize("job", ["cluster/1", "evaluate/base/renders", "soup", "scaling"])
def test_a_full_disk_is_said_by_stages_that_write_little_or_that_the_run_has_not(
    finished, tmp_path, job
):
    words = words_for(finished, job)
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=4096", "tmpfs"):
        done = run_script(finished, job.split("/")[0], words, tmp_path / "out")
        left = [
            path for path in tmp_path.rglob("*") if path.is_file() and ".features" not in path.parts
        ]
    assert done.returncode == 1 and "no space left on device" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and left == []


def test_a_disk_that_fills_up_while_state_is_saved_is_said_and_the_state_before_is_kept(
    finished, tmp_path
):
    outputs = json.loads((finished.root / manifest_of(finished, "pretrain/short")).read_text())[
        "outputs"
    ]
    needed = outputs["model.safetensors"]["bytes"]
    # Room for one state, of three times the weights, and not for the next beside it.
    with mounted(tmp_path, "-t", "tmpfs", "-o", f"size={needed * 5}", "tmpfs"):
        done = replay(finished, "pretrain/short", tmp_path / "out", CLIPGRAFT_SAVE_SECONDS="0")
        states = list(tmp_path.glob("out/.resume/*.pt"))
        left = [path.name for path in tmp_path.glob("out/*") if path.name != ".resume"]
    assert done.returncode == 1 and "no space left on device" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(states) == 1 and left == []


RUN = ["download", "index", "shard", "pretrain", "embed", "cluster", "finetune_expert", "assemble"]
RUN += ["finetune_router", "evaluate", "report"]


@pytest.mark.parametrize("stage", RUN)
def test_a_read_only_disk_is_said_by_every_stage(finished, tmp_path, stage):
    words = [str(min((finished.root / "results").glob(f"{stage}/*/manifest.json")))]
    with mounted(tmp_path, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        done = run_script(finished, stage, words, tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    [error] = [line for line in done.stderr.splitlines() if "error:" in line]
    assert f"error: {tmp_path}/out: Read-only file system. Hint:" in error


def test_a_read_only_disk_is_said_and_the_same_command_finishes_when_it_is_not(finished):
    results, manifest = finished.root / "results", manifest_of(finished, "report")
    folder = (finished.root / manifest).parent
    folder.rename(finished.root / "aside")
    with mounted(results, "--bind", str(results)):
        subprocess.run(["mount", "-o", "remount,ro,bind", results], check=True)
        printed = finished.snakemake("--cores", "1", str(manifest), check=False)
    assert "Read-only file system" in printed and "Traceback" not in printed, printed
    assert not folder.exists()
    finished.snakemake("--cores", "1", str(manifest))
    shutil.rmtree(finished.root / "aside")
    assert (folder / "report.html").exists()


LATE = """
import os, runpy, subprocess, sys
runpy.run_path({no_network!r})
replace = os.replace

def late(source, target):
    if str(target).endswith("manifest.json") and "scripts/" in sys.argv[0]:
        subprocess.Popen(["sh", "-c", 'sleep 3; mv "$0" "$1"', source, target], start_new_session=True)
    else:
        replace(source, target)

os.replace = late
"""


def test_a_manifest_that_shows_itself_late_is_waited_for(finished, tmp_path):
    no_network = Path(__file__).parents[1] / "no_network/sitecustomize.py"
    (tmp_path / "sitecustomize.py").write_text(LATE.format(no_network=str(no_network)))
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    manifest = manifest_of(finished, "report")
    (finished.root / manifest).unlink()
    finished.snakemake("--cores", "1", "--latency-wait", "60", str(manifest), PYTHONPATH=path)
    assert (finished.root / manifest).exists() and finished.planned() == []
