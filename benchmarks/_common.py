"""What all benchmarks share: timing two sides in turns, rows of results, and how they are printed and kept.

A benchmark is one script per claim. It prints a table and, as its last line, one JSON object; `ratio` above 1 means
that ours is better, `target` is the ratio to reach.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

# One core, and the same for both sides; before numpy and torch are imported.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
os.environ |= dict.fromkeys(THREADS, "1")
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the package index at import

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: what was measured.
        ours: median of ours, in `unit`.
        peer: median of the peer's; of a bound, the bound.
        unit: of both.
        ratio: above 1 is better than the peer; None if not measured.
        target: ratio to reach; None if there is none.
        spread: of the ratio, lowest and highest of the rounds.
        limit_share: share of a physical limit that ours reaches.
        note: whatever a reader has to know; why, if not measured.
    """

    name: str
    ours: float | None
    peer: float | None
    unit: str
    ratio: float | None
    target: float | None
    spread: tuple[float, float] | None = None
    limit_share: float | None = None
    note: str = ""


def command_line() -> argparse.ArgumentParser:
    """What every benchmark understands."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="less data, under 50 s")
    return parser


def arguments() -> argparse.Namespace:
    """The command line of most benchmarks."""
    return command_line().parse_args()


def one_core() -> None:
    """Pin this process, and what it starts, to one core, where the system lets it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def rates(sides: Mapping[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Items per second of each side, in turns: one round of all sides warms up and does not count.

    Args:
        sides: does some work and returns how many items it was.
        repeats: rounds that count.
    """
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, work in sides.items():
            started = time.perf_counter()
            count = work()
            if number:
                measured[name].append(count / (time.perf_counter() - started))
    return measured


def faster(
    name: str, ours: list[float], peer: list[float], unit: str, target: float | None, note: str = ""
) -> Row:
    """A row of two rates; each round is a pair."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return Row(
        name,
        statistics.median(ours),
        statistics.median(peer),
        unit,
        statistics.median(ratios),
        target,
        (min(ratios), max(ratios)),
        note=note,
    )


def within(name: str, ours: list[float], bound: float, unit: str, note: str = "") -> Row:
    """A row of something that must stay below a bound: the target is 1."""
    median = statistics.median(ours)
    spread = (bound / max(ours), bound / min(ours))
    return Row(name, median, bound, unit, bound / median, 1.0, spread, note=note)


def report(
    name: str,
    rows: Iterable[Row],
    profiles: Mapping[str, Mapping[str, float]] | None = None,
    file: Path | None = None,
) -> None:
    """Print the table, each row as it comes, and the JSON object.

    Args:
        name: of the benchmark.
        rows: what was measured.
        profiles: shares of the time of a step by part, of each side that was profiled.
        file: gets the JSON object in place of the last line.
    """
    if profiles:
        _print_profiles(profiles)
    measured = []
    for row in rows:
        measured.append(row)
        reached = "" if row.ratio is None or row.target is None else _verdict(row)
        values = "  ".join(_short(value) for value in (row.ours, row.peer))
        ratio = "not measured" if row.ratio is None else f"{row.ratio:.2f}"
        spread = "" if row.spread is None else f"({row.spread[0]:.2f} to {row.spread[1]:.2f})"
        print(f"{row.name:<58} {values:>20} {row.unit:<9} {ratio:>6} {spread:<18} {reached}")
        if row.note:
            print(f"    {row.note}")
        sys.stdout.flush()
    if file is None:
        print(as_json(name, measured, profiles))
    else:
        file.write_text(as_json(name, measured, profiles) + "\n")


def as_json(
    name: str, rows: Iterable[Row], profiles: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """What `report` keeps: the JSON object, in one line."""
    about: dict[str, object] = {"name": name, "machine": _machine(), "commit": commit()}
    about |= {"rows": [_rounded(asdict(row)) for row in rows]}
    if profiles:
        about["profiles"] = {side: _rounded(shares) for side, shares in profiles.items()}
    return json.dumps(about)


def _print_profiles(profiles: Mapping[str, Mapping[str, float]]) -> None:
    parts = list(next(iter(profiles.values())))
    print(f"{'share of a step, by torch profiler':<58} {'  '.join(f'{p:>9}' for p in parts)}")
    for side, shares in profiles.items():
        values = [f"{shares[part]:>{max(9, len(part))}.1%}" for part in parts]
        print(f"{side:<58} {'  '.join(values)}")


def _verdict(row: Row) -> str:
    assert row.ratio is not None and row.target is not None
    return f"target {row.target:g}: " + ("reached" if row.ratio >= row.target else "NOT reached")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rounded(row: Mapping[str, object]) -> dict[str, object]:
    def cut(value: object) -> object:
        if isinstance(value, tuple):
            return [cut(each) for each in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return {key: cut(value) for key, value in row.items()}


def _machine() -> str:
    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def commit() -> str:
    """Of the code that is measured; `-dirty` if it has been changed since."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"
