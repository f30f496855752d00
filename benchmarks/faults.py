"""Kills at random moments over the demo DAG: does the same command always finish, with the same bits?

The DAG is run once without a fault, and then again and again, from nothing, while one of its processes gets SIGKILL
every now and then: Snakemake, a job, or a worker of a job. After each kill everything must leave by itself, and the
same command is given again. When it has finished, all weights, arrays and tars must be those of the run without a
fault, and no temporary file may be left.

    python benchmarks/faults.py --folder DIR --kills 200 --minutes 60

What has happened is appended to DIR/faults.jsonl, and the next call with the same folder goes on from there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _common import ROOT, Row, report

sys.path.insert(0, str(ROOT / "tests/faults"))
from campaign import Place, bits, kill, wait_for

SECONDS_TO_LEAVE = 120.0
SECONDS_FOR_OTHERS = 1800.0  # Snakemake lets other jobs end when one was killed
SECONDS_TO_NOTICE = 60.0  # what a job may do without a worker, or not
PARTS = ("lib", "scripts", "rules", "workflow", "presets")


class Campaign:
    """One folder with a checkout, what a run without a fault has made, and what has happened so far."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.place = Place(given.folder / "checkout", given.folder / "tmp", save_seconds=5.0)
        self.records = given.folder / "faults.jsonl"
        self.whole = given.folder / "bits.json"
        self.mean_seconds, self.kills = given.mean_seconds, given.kills
        self.command = self.place.snakemake("--cores", "2", *given.words)
        self.random = random.Random(time.monotonic_ns())
        if not self.place.root.exists():
            given.folder.mkdir(parents=True, exist_ok=True)
            for part in PARTS:
                ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(ROOT / part, self.place.root / part, ignore=ignore)
            shutil.copy(given.config, self.place.root / "config.yaml")
            self.say(event="begin", code=_commit(), config=given.config.name)

    def events(self) -> list[dict[str, Any]]:
        """All records."""
        return [json.loads(line) for line in self.records.read_text().splitlines()]

    @property
    def is_done(self) -> bool:
        """Whether there were kills enough, and a run was finished after the last of them."""
        events = [each["event"] for each in self.events()]
        return events[-1] == "finish" and events.count("kill") >= self.kills

    def say(self, **record: Any) -> None:
        """Add a record, and print it."""
        with self.records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def go_on(self, deadline: float) -> None:
        """Run the DAG, or what is left of it, until it is finished, a process was killed, or time is over."""
        is_first, num = not self.whole.exists(), sum(e["event"] == "kill" for e in self.events())
        seconds = self.random.expovariate(1 / self.mean_seconds)
        if is_first or num >= self.kills:
            seconds = float("inf")
        started = time.monotonic()
        process = self.place.start(self.command, self.records.with_name("output.txt"))
        seconds = min(seconds, deadline - started)
        if not wait_for(lambda: process.poll() is not None, seconds):
            self._kill(process, time.monotonic() - started, time.monotonic() >= deadline)
        elif process.returncode:
            last = self.records.with_name("output.txt").read_text()[-2000:]
            self.say(event="stuck", code=process.returncode, output=last)
            raise SystemExit("the same command has not finished")
        elif is_first:
            self.whole.write_text(json.dumps(bits(self.place.root / "results"), indent=1))
            self._begin_again()
        else:
            self._compare()

    def _kill(self, process: subprocess.Popen[bytes], seconds: float, is_over: bool) -> None:
        found = {
            pid: _kind(words, pid == process.pid) for pid, words in self.place.processes().items()
        }
        if is_over:  # no fault: this call has used up its time
            for pid in found:
                kill(pid)
            process.wait()
            return
        kind = self.random.choice(sorted(set(found.values())))
        victim = self.random.choice([pid for pid, each in found.items() if each == kind])
        kill(victim)
        killed = time.monotonic()
        patience = SECONDS_TO_NOTICE if kind == "worker" else SECONDS_FOR_OTHERS
        if not wait_for(lambda: process.poll() is not None, patience):
            process.kill()
        code = process.wait()
        orphans = self.place.wait_until_empty(SECONDS_TO_LEAVE)
        stages = sorted({each.partition(" ")[2] for each in found.values() if " " in each})
        left = round(time.monotonic() - killed, 1)
        self.say(
            event="kill",
            victim=kind,
            stages=stages,
            after=round(seconds, 1),
            code=code,
            seconds_to_leave=left,
            orphans=list(orphans.values()),
        )
        for pid in orphans:
            kill(pid)

    def _compare(self) -> None:
        expected, found = json.loads(self.whole.read_text()), bits(self.place.root / "results")
        wrong = sorted(
            name for name in {**expected, **found} if expected.get(name) != found.get(name)
        )
        self.say(event="finish", differing=wrong, unfinished=self.place.unfinished())
        if wrong:
            raise SystemExit(f"other bits than without a fault: {', '.join(wrong)}")
        self._begin_again()

    def _begin_again(self) -> None:
        for name in ("results", "logs", ".snakemake"):
            shutil.rmtree(self.place.root / name, ignore_errors=True)

    def rows(self) -> list[Row]:
        """What has been found so far; kills after the last finished run are not yet known to be harmless."""
        events = self.events()
        last = max((i for i, each in enumerate(events) if each["event"] == "finish"), default=0)
        finishes = [each for each in events if each["event"] == "finish"]
        kills = [each for each in events[:last] if each["event"] == "kill"]
        same = sum(not each["differing"] for each in finishes)
        clean = sum(not each["unfinished"] for each in finishes)
        quiet = sum(not each["orphans"] for each in kills)
        victims = Counter(each["victim"] for each in kills)
        of_each = ", ".join(f"{num} {victim}" for victim, num in victims.most_common())
        return [
            _share(
                "runs that ended with the bits of a run without a fault", same, finishes, "runs"
            ),
            _share("runs that left no temporary file", clean, finishes, "runs"),
            _share(
                "kills that left no process and were gone on from", quiet, kills, "kills", of_each
            ),
        ]


def _share(name: str, good: int, of: list[Any], unit: str, note: str = "") -> Row:
    return Row(name, good, len(of), unit, good / len(of) if of else None, 1.0, note=note)


def _kind(words: str, is_main: bool) -> str:
    """What a process is, by its command line."""
    if is_main:
        return "snakemake"
    script = next(
        (word for word in words.split() if word.endswith(".py") and "/scripts/" in word), None
    )
    if script is not None:
        return f"job {Path(script).stem}"
    return "worker"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    """Go on with the campaign, and print what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="three kills of two stages of a tiny DAG"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "try/faults")
    parser.add_argument("--config", type=Path, default=ROOT / "config.yaml")
    parser.add_argument("--kills", type=int, default=200, help="in all calls together")
    parser.add_argument("--minutes", type=float, default=600, help="of this call")
    parser.add_argument(
        "--mean-seconds", type=float, default=45, help="between the start and a kill"
    )
    given = parser.parse_args()
    given.words = []
    if given.quick:
        given.folder = Path(tempfile.mkdtemp())
        given.config, given.kills, given.mean_seconds = ROOT / "tests/config/small.yaml", 3, 5
        given.words = ["--until", "shard"]
    given.folder, given.config = given.folder.resolve(), given.config.resolve()
    campaign, deadline = Campaign(given), time.monotonic() + 60 * given.minutes
    while not campaign.is_done and time.monotonic() < deadline:
        campaign.go_on(deadline)
    report("faults", campaign.rows())
    if given.quick:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
