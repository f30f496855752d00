"""Fixtures of all tests: no network but loopback, here and in every process that a test starts."""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clipgraft.launch import find_devices

ROOT = Path(__file__).resolve().parent.parent
NO_NETWORK = Path(__file__).parent / "no_network"

os.environ["CLIPGRAFT_NO_NETWORK"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tests run beside one another, one per core
os.environ["PYTHONPATH"] = os.pathsep.join([str(NO_NETWORK), str(ROOT / "lib")])
runpy.run_path(str(NO_NETWORK / "sitecustomize.py"))  # children get it by PYTHONPATH
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script has it that was begun with &
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first, beside all the others; those on a SLURM of two nodes mostly wait."""
    items.sort(
        key=lambda item: item.path.name != "test_workflow.py" and "slurm" not in item.path.parts
    )


# All jobs but the last ones, as their rules would start them, in one process: torch is imported once.
JOBS = """
import json, runpy, sys
import yaml
from clipgraft.config import load_config, sweep_points
from clipgraft.planning import plan_runs

if __name__ == "__main__":
    raw = yaml.safe_load(open("small.yaml"))
    done = set()
    for jobs in plan_runs(load_config(raw), sweep_points(raw)).values():
        for job in jobs:
            if job.stage in ("report", "scaling") or job.folder in done:
                continue
            done.add(job.folder)
            words = ["--name", job.name, "--settings", json.dumps(job.settings), "--threads", "1"]
            for name, of in job.inputs.items():
                words += ["--input", f"{name}=results/{of.folder}/manifest.json"]
            sys.argv = [f"scripts/{job.stage}.py", *words, "--out", f"results/{job.folder}"]
            runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session", autouse=True)
def _no_devices_for_children() -> None:
    """What tests start sees no GPUs: processes of one training would want one each, and a CPU's numbers are expected."""
    if find_devices():
        import torch

        torch.cuda.init()  # this process has seen its own by now, for the tests that are skipped elsewhere
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Workflow:
    """A copy of the workflow, to edit and run, with a small config."""

    root: Path

    def snakemake(self, *words: str, check: bool = True, **env: str) -> str:
        """Run snakemake in the copy; returns what it printed."""
        command = [sys.executable, "-m", "snakemake", "--configfile", "small.yaml", *words]
        done = subprocess.run(
            command,
            cwd=self.root,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert not check or done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    def planned(self, *words: str) -> list[str]:
        """Stages that a dry run would run, one entry per job; `link` left out: it is no stage."""
        printed = self.snakemake("-n", "--cores", "2", *words)
        table = printed.split("Job stats:")[1] if "Job stats:" in printed else ""
        rows = [line.split() for line in table.split("Reasons:")[0].splitlines()]
        counts = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
        stages = {name: n for name, n in counts.items() if name not in ("link", "all", "total")}
        return [name for name, n in stages.items() for _ in range(n)]

    def run_jobs(self) -> None:
        """Run all jobs of all runs but their pages."""
        (self.root / "jobs.py").write_text(JOBS)
        path = os.pathsep.join([str(self.root / "lib"), os.environ["PYTHONPATH"]])
        environment = {**os.environ, "PYTHONPATH": path}
        subprocess.run([sys.executable, "jobs.py"], cwd=self.root, env=environment, check=True)

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace one place in a file."""
        path = self.root / file
        text = path.read_text()
        assert text.count(old) >= 1, (file, old)
        path.write_text(text.replace(old, new, 1))


def copy_workflow(target: Path) -> Workflow:
    """Copy what git would bring to a fresh clone and the workflow needs."""
    for folder in ("lib", "scripts", "rules", "workflow", "presets"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    shutil.copy(ROOT / "tests/config/small.yaml", target / "small.yaml")
    return Workflow(target)


@pytest.fixture
def workflow(tmp_path: Path) -> Workflow:
    """A copy of the workflow in which nothing has run."""
    return copy_workflow(tmp_path)


@pytest.fixture(scope="session")
def copy_to() -> Callable[[Path], Workflow]:
    """What makes such a copy, for fixtures of larger scope."""
    return copy_workflow


@pytest.fixture(scope="session")
def _finished_once(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """A copy for this process of what the first process to ask has run for all; the others wait for it meanwhile."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # that of all processes of these tests
    with (base / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "finished").exists():
            made = copy_workflow(tmp_path_factory.mktemp("making"))
            made.snakemake("--cores", "2")
            made.root.rename(base / "finished")
    mine = tmp_path_factory.mktemp("finished_copy") / "workflow"
    shutil.copytree(base / "finished", mine, symlinks=True)
    return Workflow(mine)


@pytest.fixture
def finished(_finished_once: Workflow) -> Iterator[Workflow]:
    """The workflow with a small DAG run to its end; edits to code and config are undone."""
    root = _finished_once.root
    paths = [path for folder in ("lib", "scripts", "rules") for path in (root / folder).rglob("*")]
    files = [path for path in paths if path.is_file() and "__pycache__" not in path.parts]
    kept = {path: (path.read_bytes(), path.stat()) for path in [*files, root / "small.yaml"]}
    yield _finished_once
    for path, (data, stat) in kept.items():
        if path.read_bytes() != data:
            path.write_bytes(data)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture(scope="module")
def labels(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clusters of round 2, of a module's `data`: one label that fills batches, and small ones that are packed."""
    import numpy as np

    from clipgraft.data.tokens import Tokens

    out = tmp_path_factory.mktemp("labels")
    np.save(out / "labels.npy", np.repeat(np.arange(4), [19, 12, 8, 1]).astype(np.int32))
    about = {"samples_id": Tokens.open(data[0]).samples_id, "rounds": 2}
    (out / "clusters.json").write_text(json.dumps(about))
    return out


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """The smallest open_clip model with two blocks in each tower: 16 px, 8 tokens of 40 words."""
    return {
        "embed_dim": 16,
        "quick_gelu": False,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "width": 32,
            "head_width": 16,
            "layers": 2,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2},
    }


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright, one for all tests of a process; skipped with its reason elsewhere."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no {' or '.join(BROWSERS)} on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # Root, as in a container, gets no sandbox; /dev/shm is often small there.
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()
