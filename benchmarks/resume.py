"""Resume: what saving takes, a restart to its first step, Snakemake with nothing to do, and two processes on two cores.

    python benchmarks/resume.py [--quick]

Snakemake runs the demo's whole DAG in a folder of its own first, and everything is measured on what it left there: real
scripts, started as the rules do. What saving takes is measured where `Pace` decides: over a training of the demo, and, for
a model that is too large to be trained here, over real saves with its clock put forward in between. Quick, it is the small
config of the tests up to its first phase, which says that the benchmark works and little else: its model is too small for
two processes.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from _common import ROOT, Row, arguments, faster, one_core, report, within  # first: sets threads
from token_reduction import b16
from torch import nn

from clipgraft import training_state
from clipgraft.checkpoint import load_model
from clipgraft.config import load_config, sweep_points
from clipgraft.launch import local_command
from clipgraft.models.build import build
from clipgraft.optim import build_optimizer
from clipgraft.planning import plan_runs
from clipgraft.recipes import OptimSettings
from clipgraft.training_state import SAVE_SECONDS, Parts, TrainingState
from clipgraft.versions import PlannedJob

SHARE, RESTART_SECONDS, NO_OP_SECONDS, EFFICIENCY = 0.02, 15.0, 3.0, 0.9
QUICK_SAVE_SECONDS = 2.0  # quick, in place of a minute


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
    """A process, and all that it starts, in a group of their own, on CPUs."""
    own = {"PYTHONPATH": str(ROOT / "lib"), "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.DEVNULL
    env = {**os.environ, **own, **environment}
    return subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)


def killed(process: subprocess.Popen[bytes]) -> None:
    """With SIGKILL, and all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# A script as it is, with every save's begin and end, by the clock that `Pace` reads, appended to a file.
TIMED = """
import json, runpy, sys, time
from contextlib import contextmanager
from clipgraft import train

class Pace(train.Pace):
    @contextmanager
    def saving(self):
        begun = time.monotonic()
        with super().saving():
            yield
        print(json.dumps([begun, time.monotonic()]), file=kept, flush=True)

if __name__ == "__main__":
    kept, train.Pace = open(sys.argv[1], "w"), Pace
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def saving(name: str, saves: Sequence[tuple[float, float]], note: str) -> Row:
    """The share of the time that saving takes, from the end of the first save to that of the last.

    Args:
        name: of the row.
        saves: when each began and ended.
        note: how they came about.
    """
    assert len(saves) >= 3, saves
    took = [ended - begun for begun, ended in saves[1:]]
    walls = [after[1] - before[1] for before, after in pairwise(saves)]
    shares = [each / wall for each, wall in zip(took, walls, strict=True)]
    between = statistics.median(wall - each for each, wall in zip(took, walls, strict=True))
    numbers = f"{len(took)} saves of {statistics.median(took):.3g} s, {between:.3g} s between them"
    row = within(f"saving state, {name}", [sum(took) / sum(walls)], SHARE, "share")
    spread = (SHARE / max(shares), SHARE / min(shares))
    return replace(row, spread=spread, note=f"{numbers}; {note}")


def saves_of_training(
    finished: Finished, folder: Path, num: int, seconds: float | None
) -> list[tuple[float, float]]:
    """Begin and end of the first saves of a training that goes on and on, and is killed after them.

    Args:
        finished: whose first phase is trained.
        folder: to train in.
        num: of saves.
        seconds: what `CLIPGRAFT_SAVE_SECONDS` says; None: nothing.
    """
    folder.mkdir()
    kept = folder / "saves.jsonl"
    python, *script = finished.training(folder / "out", samples_seen=10**8)
    changed = {} if seconds is None else {"CLIPGRAFT_SAVE_SECONDS": f"{seconds:g}"}
    process = started([python, "-c", TIMED, str(kept), *script], **changed)
    lines: list[str] = []
    while len(lines) < num:
        assert process.poll() is None, "the training has ended"
        time.sleep(0.1)
        lines = kept.read_text().split("\n")[:-1] if kept.exists() else []
    killed(process)
    return [tuple(json.loads(line)) for line in lines[:num]]


class Clock:
    """Stands where `training_state` has the module `time`: the real time, and what was put forward."""

    ahead = 0.0

    def monotonic(self) -> float:
        """Seconds."""
        return time.monotonic() + self.ahead


def saves_of_state(model: nn.Module, folder: Path, num: int) -> list[tuple[float, float]]:
    """Begin and end of saves of AdamW's whole state, with all its checks, whenever `Pace` says that one is due.

    Nothing trains in between: the clock that `Pace` reads is put forward by steps of a second.
    """
    trained = dict(model.named_parameters())
    optimizer = build_optimizer(
        trained, OptimSettings(lr=1e-3), 1e-3, temperature_apart=False, lr_of={}
    )
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parts, cpu, clock = Parts(trained, optimizer, None, None), torch.device("cpu"), Clock()
    state, saves = TrainingState(folder, "tag"), []
    with patch.object(training_state, "time", clock):
        pace = training_state.Pace()
        for number in range(num):
            while not pace.is_due():
                clock.ahead += 1
            begun = clock.monotonic()
            with pace.saving():
                parts.check_finite(number, num, cpu)
                state.save({"step": number, **parts.captured(is_first=True)})
            saves.append((begun, clock.monotonic()))
    state.close()
    return saves


def saving_of_state(name: str, model: nn.Module, folder: Path, num: int) -> Row:
    """A row of `saves_of_state`."""
    saves = saves_of_state(model, folder, num)
    size = sum(path.stat().st_size for path in folder.glob("*.pt")) / 2 / 2**20
    note = (
        f"{size:,.0f} MB; saves and their seconds are real, the interval is what the pace chose, but nothing trains in "
        "between: its clock was put forward until it said that a save was due"
    )
    return saving(name, saves, note)


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


@contextmanager
def on_one_core() -> Iterator[None]:
    """What is started meanwhile has one core, and its threads share it."""
    before = os.sched_getaffinity(0)
    one_core()
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def two_processes(finished: Finished, folder: Path, num_samples: int, repeats: int) -> list[Row]:
    """Two processes of one thread each, in turns with what would be ideal.

    With a batch for each that is twice one process on one core. With one batch for both it is two trainings of half the
    batch that have nothing to say to one another: half a batch costs more than half of a step, however it is trained.
    """
    batch = int(finished.phase.settings["batch_size"])
    sides: Mapping[str, list[tuple[str, int, int]]] = {  # name, processes, batch of all of them
        "core": [("core", 1, batch)],
        "one": [("one", 1, batch)],
        "each": [("each", 2, 2 * batch)],
        "two": [("two0", 1, batch), ("two1", 1, batch)],
        "shared": [("shared", 2, batch)],
        "halves": [("half0", 1, batch // 2), ("half1", 1, batch // 2)],
    }
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats):
        for side, trainings in sides.items():
            outs = [folder / f"{name}{number}" for name, *_ in trainings]
            commands: list[Any] = [
                finished.training(
                    out, num, samples_seen=num_samples * size // batch, batch_size=size
                )
                for out, (_, num, size) in zip(outs, trainings, strict=True)
            ]
            with on_one_core() if side == "core" else nullcontext():
                processes = [started(command) for command in commands]
            assert {process.wait() for process in processes} == {0}, commands
            measured[side].append(sum(rate(out) for out in outs))

    def told(side: str, of: str) -> str:
        twice = [2 * rate for rate in measured[of]]
        return f"{faster('', measured[side], twice, '', None).ratio:.2f}"

    twice_one_core = [2 * rate for rate in measured["core"]]
    return [
        faster(
            "two processes on two cores, a batch for each, of twice one core",
            measured["each"],
            twice_one_core,
            "img/s",
            EFFICIENCY,
            f"{batch} a process; {told('each', 'one')} of twice one process that may use both cores; two trainings that "
            f"know nothing of one another: {told('two', 'core')} of twice one core",
        ),
        faster(
            "two processes on two cores, one batch for both, of two trainings of half the batch",
            measured["shared"],
            measured["halves"],
            "img/s",
            EFFICIENCY,
            f"{batch // 2} a process; {told('shared', 'core')} of twice one core with the whole batch, {told('shared', 'one')} of "
            "twice one process that may use both",
        ),
    ]


def saving_rows(finished: Finished, folder: Path, what: str, *, quick: bool) -> list[Row]:
    """Of a real training, and of a model that is too large to be trained here."""
    seconds = QUICK_SAVE_SECONDS if quick else None
    saves = saves_of_training(finished, folder / "paced", 4, seconds)
    every = (
        f"{SAVE_SECONDS:g} s" if seconds is None else f"{seconds:g} s (by default {SAVE_SECONDS:g})"
    )
    note = f"a training with its own pace: at most every {every}"
    rows = [saving(f"{what}, as it trains", saves, note)]
    if quick:
        model = load_model(finished.root / "results" / finished.phase.folder).model
        return [*rows, saving_of_state(f"{what}, clock put forward", model, folder / "state", 4)]
    model = build(b16(12, 224, 77))
    return [*rows, saving_of_state("ViT-B/16, clock put forward", model, folder / "large", 10)]


def main() -> None:
    """Print the table."""
    quick = arguments().quick
    repeats = 1 if quick else 5
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        finished = Finished.make(folder / "dag", quick=quick)
        what = "the small config's first phase" if quick else "the demo"
        no_op = no_op_seconds(finished, repeats)
        rows = saving_rows(finished, folder, what, quick=quick)
        restarts = restart_seconds(finished, folder / "restart", repeats)
        rows += [
            within(f"restart to first step, {what}", restarts, RESTART_SECONDS, "s"),
            within(f"snakemake with nothing to do, {what}", no_op, NO_OP_SECONDS, "s"),
            *two_processes(finished, folder, 3200 if quick else 38400, repeats if quick else 3),
        ]
    report("resume", rows)


if __name__ == "__main__":
    main()
