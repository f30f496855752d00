"""A copy of the workflow on a cluster, and how its user calls it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from sandbox import Sandbox

# The demo: a quarter of an hour.
LONG = pytest.mark.skipif(
    not os.environ.get("CLIPGRAFT_LONG_TESTS"), reason="takes minutes: make test LONG=1"
)

ROOT = Path(__file__).resolve().parent.parent.parent

# As a user would call it, but for how often the plugin looks.
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--workflow-profile", "workflow/profiles/slurm"]
SNAKEMAKE += ["--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "20"]


def plugin_folder() -> Path:
    """Where the plugin is: installed, or in the folder that `make slurm` would have looked into."""
    spec = importlib.util.find_spec("snakemake_executor_plugin_slurm")
    return Path(spec.origin).parent.parent if spec and spec.origin else Path(sys.prefix) / "slurm"


@dataclass(frozen=True)
class Site:
    """A copy of the workflow, on a cluster."""

    root: Path
    sandbox: Sandbox

    @property
    def env(self) -> dict[str, str]:
        """As of the guide for a site without accounting; trainings save their state every second."""
        path = [str(plugin_folder()), os.environ["PYTHONPATH"]]
        bin = self.root / "workflow/profiles/slurm/no-accounting"
        return {
            **self.sandbox.env,
            "PATH": f"{bin}:{self.sandbox.env['PATH']}",
            "CLIPGRAFT_SAVE_SECONDS": "1",
            "PYTHONPATH": os.pathsep.join(path),
        }

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Start snakemake; what it prints goes to `printed.txt`."""
        with (self.root / "printed.txt").open("w") as file:
            return subprocess.Popen(
                [*SNAKEMAKE, *words],
                cwd=self.root,
                env=self.env,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def snakemake(self, *words: str, code: int = 0, minutes: float = 7) -> str:
        """Run snakemake to its end; returns what it printed."""
        process = self.begin(*words)
        try:
            ended = process.wait(timeout=60 * minutes)
        finally:
            process.kill()
        printed = (self.root / "printed.txt").read_text()
        assert ended == code, printed[-6000:]
        return printed


def copy_site(target: Path, config: str) -> None:
    """What a fresh clone has, with a config of the tests."""
    for folder in ("lib", "scripts", "rules", "workflow", "presets"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    shutil.copy(ROOT / "tests/config" / config, target / "config.yaml")
