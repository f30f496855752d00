"""Resume: what saving takes, a restart to its first step, Snakemake with nothing to do, and two processes on two cores.

    python benchmarks/resume.py [--quick]

Snakemake runs the demo's whole DAG in a folder of its own first, and everything is measured on what it left there: real
scripts, started as the rules do. Quick, it is the small config of the tests up to its first phase, which says that the
benchmark works and little else: its model is too small for two processes.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from _common import ROOT, Row, arguments, report, within  # first: sets threads
from token_reduction import b16
from torch import nn

from clipgraft.checkpoint import load_model
from clipgraft.config import load_config, sweep_points
from clipgraft.launch import local_command
from clipgraft.models.build import build
from clipgraft.optim import build_optimizer
from clipgraft.planning import plan_runs
from clipgraft.recipes import OptimSettings
from clipgraft.training_state import SAVE_SECONDS, SAVE_SHARE, Parts, TrainingState
from clipgraft.versions import PlannedJob

RESTART_SECONDS, NO_OP_SECONDS, EFFICIENCY = 15.0, 3.0, 0.9


@dataclass(frozen=True)
class Finished:
    """A folder in which Snakemake has run, how it was called, and the first phase."""

    root: Path
    words: list[str]
    phase: PlannedJob

    @classmethod
    def make(cls, root: Path, *, quick: bool) -> Finished:
        """Run the DAG."""
        config = ROOT / ("tests/config/small.yaml" if quick else "config.yaml")
        raw = yaml.safe_load(config.read_text())
        [jobs] = plan_runs(load_config(raw), sweep_points(raw)).values()
        phase = next(job for job in jobs if job.name == "pretrain/short")
        options = ["--snakefile", ROOT / "workflow/Snakefile", "--directory", root]
        options += ["--configfile", config, "--cores", "2"]
        words = [sys.executable, "-m", "snakemake", *map(str, options)]
        finished = cls(
            root, words + ([f"results/{phase.folder}/manifest.json"] if quick else []), phase
        )
        finished.snakemake()
        return finished

    def snakemake(self) -> str:
        """What it printed."""
        done = subprocess.run(self.words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    def training(self, out: Path, num: int = 1, **changes: object) -> list[str]:
        """The command that trains the first phase again, in one process or more."""
        settings = json.dumps({**self.phase.settings, "watch": None, **changes})
        words = [str(ROOT / "scripts/pretrain.py"), "--settings", settings, "--out", str(out)]
        for name, of in self.phase.inputs.items():
            if name != "watched":
                words += ["--input", f"{name}={self.root}/results/{of.folder}/manifest.json"]
        return local_command(num, [*words, "--threads", str(num)])


def started(command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
    """A process, and all that it starts, in a group of their own."""
    path = {"PYTHONPATH": str(ROOT / "lib")}
    out = subprocess.DEVNULL
    env = {**os.environ, **path, **environment}
    return subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)


def killed(process: subprocess.Popen[bytes]) -> None:
    """With SIGKILL, and all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def save_seconds(model: nn.Module, folder: Path, repeats: int) -> list[float]:
    """Of AdamW's whole state, with all its checks, until it is on the disk."""
    trained = dict(model.named_parameters())
    optimizer = build_optimizer(
        trained, OptimSettings(lr=1e-3), 1e-3, temperature_apart=False, lr_of={}
    )
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parts, cpu = Parts(trained, optimizer, None, None), torch.device("cpu")
    state, took = TrainingState(folder, "tag"), []
    for step in range(repeats):
        start = time.perf_counter()
        parts.check_finite(step, repeats, cpu)
        state.save({"step": step, **parts.captured(is_first=True)})
        took.append(time.perf_counter() - start)
    state.close()
    return took


def saving(name: str, model: nn.Module, folder: Path, repeats: int) -> Row:
    """The share of the time that saving takes: the next one is due a pause after the one before."""
    took = save_seconds(model, folder, repeats)
    shares = [each / (each + max(SAVE_SECONDS, each / SAVE_SHARE)) for each in took]
    size = sum(path.stat().st_size for path in folder.glob("*.pt")) / 2 / 2**20
    note = f"{size:,.0f} MB in {statistics.median(took):.3g} s, at most every {SAVE_SECONDS:g} s"
    return within(f"saving state, {name}", shares, SAVE_SHARE, "share", note)


def restart_seconds(finished: Finished, folder: Path, repeats: int) -> list[float]:
    """From the start of the script until state shows one more step than before."""
    command = finished.training(folder, samples_seen=10**8)
    launched = [sys.executable, "-m", "clipgraft.launch", "--", *command[1:]]
    took = []
    for number in range(repeats + 1):
        before, start = newest_step(folder), time.monotonic()
        process = started(launched, CLIPGRAFT_SAVE_SECONDS="0")
        while newest_step(folder) <= before:
            assert process.poll() is None, "the training has ended"
            time.sleep(0.01)
        if number:  # at first there was no state
            took.append(time.monotonic() - start)
        killed(process)
    return took


def newest_step(folder: Path) -> int:
    """Of the state that is saved; 0 without."""
    names = [path.name.split("-") for path in (folder / ".resume").glob("*.pt")]
    return max((int(name[1]) for name in names), default=0)


def no_op_seconds(finished: Finished, repeats: int) -> list[float]:
    """Of Snakemake where all is done."""
    took = []
    for _ in range(repeats):
        start = time.monotonic()
        printed = finished.snakemake()
        took.append(time.monotonic() - start)
        assert "Nothing to be done" in printed, printed[-3000:]
    return took


def rate(out: Path) -> float:
    """Samples per second of the second half of a training."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    middle, last = rows[len(rows) // 2], rows[-1]
    return float(
        (last["samples_seen"] - middle["samples_seen"]) / (last["seconds"] - middle["seconds"])
    )


def two_processes(finished: Finished, folder: Path, num_samples: int, repeats: int) -> Row:
    """One process, two of one training, and two trainings of half the batch, in turns; each process has one thread.

    The last have the work of the second, and nothing to say to one another.
    """
    batch = int(finished.phase.settings["batch_size"])
    sides: Mapping[str, list[tuple[str, int, int]]] = {
        "one": [("one", 1, 1)],
        "two": [("two", 2, 1)],
        "apart": [("left", 1, 2), ("right", 1, 2)],
    }
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats):
        for side, trainings in sides.items():
            outs = [folder / f"{name}{number}" for name, *_ in trainings]
            commands: list[Any] = [
                finished.training(
                    out, num, samples_seen=num_samples // share, batch_size=batch // share
                )
                for out, (_, num, share) in zip(outs, trainings, strict=True)
            ]
            codes = [process.wait() for process in [started(command) for command in commands]]
            assert set(codes) == {0}, commands
            measured[side].append(sum(rate(out) for out in outs))
    ratios = [two / (2 * one) for one, two in zip(measured["one"], measured["two"], strict=True)]
    one, two, apart = (statistics.median(measured[side]) for side in sides)
    note = f"of two trainings of half the batch that know nothing of one another: {two / apart:.2f}"
    spread = (min(ratios), max(ratios))
    efficiency = statistics.median(ratios)
    name = "two processes on two cores, of twice one"
    return Row(name, two, 2 * one, "img/s", efficiency, EFFICIENCY, spread, two / apart, note)


def main() -> None:
    """Print the table."""
    quick = arguments().quick
    repeats = 1 if quick else 5
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        finished = Finished.make(folder / "dag", quick=quick)
        what = "the small config's first phase" if quick else "the demo"
        no_op = no_op_seconds(finished, repeats)
        model = load_model(finished.root / "results" / finished.phase.folder).model
        rows = [saving(what, model, folder / "state", 4 * repeats)]
        if not quick:
            rows.append(saving("ViT-B/16", build(b16(12, 224, 77)), folder / "large", repeats))
        restarts = restart_seconds(finished, folder / "restart", repeats)
        rows += [
            within(f"restart to first step, {what}", restarts, RESTART_SECONDS, "s"),
            within(f"snakemake with nothing to do, {what}", no_op, NO_OP_SECONDS, "s"),
            two_processes(finished, folder, 3200 if quick else 38400, repeats if quick else 3),
        ]
    report("resume", rows)


if __name__ == "__main__":
    main()
