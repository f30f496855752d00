"""Laws of a job whose worker is killed: it says so and leaves nothing, and the same command again makes the same files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from campaign import Place, bits, is_stopped, kill, wait_for

from clipgraft.config import load_config
from clipgraft.planning import plan_runs

SECONDS = 180  # for what takes five on an idle machine
NUM_SAMPLES = 1040  # enough for two workers

# The first worker that has read so many images stops itself, so that it is killed in the middle of its work.
STOPS = """
import multiprocessing, os, runpy, signal
runpy.run_path({no_network!r})
num_read = 0

def stop(event, words):
    global num_read
    if event == "open" and str(words[0]).endswith(".tar") and multiprocessing.parent_process():
        num_read += 1
        if num_read == 200:
            try:
                os.mkdir({claim!r})
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGSTOP)

import sys
sys.addaudithook(stop)
"""


@pytest.fixture(scope="module")
def place(copy_to, tmp_path_factory) -> Place:
    """A checkout with a download, an index and shards, made without a fault."""
    tmp = tmp_path_factory.mktemp("workers")
    workflow = copy_to(tmp / "root")
    workflow.edit("small.yaml", "num_samples: 96", f"num_samples: {NUM_SAMPLES}")
    place = Place(workflow.root, tmp / "tmp")
    for name in ("download/train", "index/train", "shard/short"):
        code = place.start(command_for(place, name), tmp / "log.txt").wait(timeout=SECONDS)
        assert code == 0, (tmp / "log.txt").read_text()
    return place


def command_for(place: Place, name: str) -> list[str | Path]:
    """As its rule starts it, with two threads."""
    jobs = plan_runs(load_config(yaml.safe_load((place.root / "small.yaml").read_text())), {})
    job = next(job for job in jobs["small"] if job.name == name)
    words = ["--name", name, "--settings", json.dumps(job.settings), "--threads", "2"]
    for each, of in job.inputs.items():
        words += ["--input", f"{each}=results/{of.folder}/manifest.json"]
    return [sys.executable, f"scripts/{job.stage}.py", *words, "--out", f"results/{job.folder}"]


@pytest.mark.parametrize("name", ["index/train", "shard/short"])
def test_after_a_worker_was_killed_the_same_command_makes_the_same_files(place, name, tmp_path):
    command, log = command_for(place, name), tmp_path / "log.txt"
    out = place.root / command[-1]
    before = bits(place.root / "results")
    for path in out.rglob("*"):
        if path.is_file():
            path.unlink()
    no_network = Path(__file__).parents[1] / "no_network/sitecustomize.py"
    stops = STOPS.format(no_network=str(no_network), claim=str(tmp_path / "claim"))
    (tmp_path / "sitecustomize.py").write_text(stops)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    process = place.start(command, log, PYTHONPATH=path)
    assert wait_for(lambda: any(map(is_stopped, place.processes())), SECONDS), log.read_text()
    [worker] = filter(is_stopped, place.processes())
    assert worker != process.pid
    kill(worker)
    assert process.wait(timeout=SECONDS) == 1
    assert "one of 2 worker processes was killed. Hint: most often memory" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert place.wait_until_empty(SECONDS) == {} and place.unfinished() == []
    assert not [path for path in out.rglob("*") if path.is_file()]
    assert place.start(command, log).wait(timeout=SECONDS) == 0, log.read_text()
    assert bits(place.root / "results") == before
    assert place.wait_until_empty(SECONDS) == {} and place.unfinished() == []
