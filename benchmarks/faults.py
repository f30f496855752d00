"""Kills at random moments over the demo DAG: does the same command always finish, with the same bits?

The DAG is run once without a fault; states of its trainings are kept as they come. Then, again and again, a moment of
that run is drawn, and a checkout is made to look as it did then: what was done is there, and of what was at work its
last state. The command for what was at work is given, one of its processes gets SIGKILL (Snakemake, a job, or a worker
of a job), everything must leave by itself, and the same command is given again, to be killed some more times. When it
has finished, all outputs must be those of the run without a fault, but for the times of a training (`campaign.bits`);
the same command must have nothing to do, and no temporary file may be left (but one: `workflow/docs/faults.md`). So no kill pays for what came before it.
Two such checkouts are at work at a time, with one thread for each job.

    python benchmarks/faults.py --folder DIR --kills 200

What has happened is appended to DIR/faults.jsonl, and the next call with the same folder goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import ROOT, Row, commit, report

sys.path.insert(0, str(ROOT / "tests/faults"))
from campaign import Place, bits, kill, wait_for

NUM_STREAMS = 2
KILLS = range(2, 7)  # of one moment
SHARE_OF_STARTS = 0.25  # of kills that come before the jobs are at work
SECONDS_TO_START = 6.0  # of Snakemake and of a job
SECONDS_TO_LEAVE = 120.0
SECONDS_FOR_OTHERS = 1800.0  # Snakemake lets other jobs end when one was killed
SECONDS_TO_NOTICE = 60.0  # what a job may do without a worker, or not
SAVE_SECONDS = 5.0
TINY = "not measured: no kill yet, or a tiny DAG"
PARTS = ("lib", "scripts", "rules", "workflow", "presets")
OF_ONE_CALL = ("locks", "log", "present", "tmp")  # in `.snakemake`


@dataclass(frozen=True)
class Done:
    """A job of the run without a fault: its folder below `results`, and when it began and ended."""

    folder: str
    began: float
    ended: float

    @classmethod
    def of(cls, manifest: Path) -> Done:
        """As its manifest tells."""
        ended = manifest.stat().st_mtime
        seconds = json.loads(manifest.read_text())["seconds"]
        return cls("/".join(manifest.parts[-3:-1]), ended - seconds, ended)


class Campaign:
    """One folder with a run without a fault, the states of its trainings, checkouts, and what has happened so far."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.folder, self.config, self.words = given.folder, given.config, given.words
        self.records, self.kills = given.folder / "faults.jsonl", given.kills
        self.deadline = time.monotonic() + 60 * given.minutes
        self.lock = threading.Lock()
        codes = {each["code"] for each in self.events("whole")}
        if codes - {commit()}:
            raise SystemExit(
                f"{given.folder} is the campaign of {', '.join(codes)}, and here is {commit()}. Hint: another --folder"
            )
        self.whole = self.place("whole")
        if not (given.folder / "bits.json").exists():
            self.run_whole()
        self.bits = json.loads((given.folder / "bits.json").read_text())
        manifests = self.whole.root.glob("results/*/*/manifest.json")
        self.jobs = sorted(map(Done.of, manifests), key=lambda job: job.began)

    def place(self, name: str) -> Place:
        """A checkout in which nothing has run."""
        place = Place(
            self.folder / name / "checkout", self.folder / name / "tmp", save_seconds=SAVE_SECONDS
        )
        if not place.root.exists():
            for part in PARTS:
                ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(ROOT / part, place.root / part, ignore=ignore)
            shutil.copy(self.config, place.root / "config.yaml")
        return place

    def command(self, place: Place, *words: str) -> list[str | Path]:
        """Bits depend on the number of threads, and two checkouts share the machine."""
        return place.snakemake("--cores", "2", "--max-threads", "1", *words)

    def run_whole(self) -> None:
        """Run the DAG without a fault, and keep the states of its trainings."""
        begun, output = time.monotonic(), self.folder / "whole/output.txt"
        process = self.whole.start(self.command(self.whole, *self.words), output)
        results, states = self.whole.root / "results", self.folder / "states"
        while process.poll() is None:
            for path in results.glob("*/*/.resume/*.pt"):
                kept = states / "/".join(path.parts[-4:-2]) / path.name
                kept.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, kept)
                except (FileExistsError, FileNotFoundError):
                    continue
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"the run without a fault has failed: {output}")
        self.say(event="whole", seconds=round(time.monotonic() - begun, 1), code=commit())
        (self.folder / "bits.json").write_text(json.dumps(bits(results), indent=1))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Records of a kind."""
        lines = self.records.read_text().splitlines() if self.records.exists() else []
        return [each for each in map(json.loads, lines) if each["event"] == kind]

    @property
    def is_over(self) -> bool:
        """Whether there were kills enough, or time has run out."""
        with self.lock:
            done = sum(len(each["kills"]) for each in self.events("moment"))
        return done >= self.kills or time.monotonic() > self.deadline

    def say(self, **record: Any) -> None:
        """Add a record, and print it."""
        with self.lock, self.records.open("a") as file:
            file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)

    def rows(self) -> list[Row]:
        """What has been found so far."""
        moments = self.events("moment")
        kills = [each for moment in moments for each in moment["kills"]]
        victims = Counter(each["victim"] for each in kills)
        of_each = ", ".join(f"{num} {victim}" for victim, num in victims.most_common())
        same = sum(bool(each["compared"]) and not each["differing"] for each in moments)
        compared = sum(each["compared"] for each in moments)
        done = sum(not each["planned"] for each in moments)
        clean = sum(not each["unfinished"] for each in moments)
        early = sum(len(each["early"]) for each in moments)
        quiet = sum(not each["orphans"] for each in kills)
        row = Row("minutes of two cores for 200 kills", None, 60.0, "minutes", None, 1.0, note=TINY)
        if kills and not self.words:
            once = sum(each["seconds"] for each in self.events("whole")) / 60
            each_kill = sum(each["seconds"] for each in moments) / NUM_STREAMS / 60 / len(kills)
            needed = once + 200 * each_kill
            row = Row(row.name, needed, 60.0, row.unit, 60.0 / needed, 1.0)
        return [
            _share(
                "moments that ended with the bits of a run without a fault",
                same,
                moments,
                "moments",
                f"{compared:,} outputs of killed jobs compared",
            ),
            _share("moments after which nothing was planned", done, moments, "moments"),
            _share(
                "moments that left no temporary file",
                clean,
                moments,
                "moments",
                f"but {early} empty folders of Snakemakes that had not yet read the workflow",
            ),
            _share(
                "kills that left no process and were gone on from", quiet, kills, "kills", of_each
            ),
            row,
        ]


class Stream:
    """One checkout in which moments of the run without a fault are made again."""

    def __init__(self, campaign: Campaign, number: int) -> None:
        self.campaign, self.place = campaign, campaign.place(f"stream{number}")
        self.output = campaign.folder / f"stream{number}/output.txt"
        self.random = random.Random(time.monotonic_ns() + number)

    def run(self) -> None:
        """One moment after the other."""
        while not self.campaign.is_over:
            first, last = self.campaign.jobs[0], max(job.ended for job in self.campaign.jobs)
            self.at(self.random.uniform(first.began, last))

    def at(self, moment: float) -> None:
        """Go back to a moment, kill what was at work some times, let it end, and compare."""
        begun = time.monotonic()
        running = self._go_back_to(moment)
        targets = [f"results/{job.folder}/manifest.json" for job in running]
        command = self.campaign.command(self.place, *targets)
        end = max(job.ended for job in running)
        num = min(self.random.choice(KILLS), -(-self.campaign.kills // NUM_STREAMS)) - 1
        moments = [moment, *sorted(self.random.uniform(moment, end) for _ in range(num))]
        kills: list[dict[str, Any]] = []
        for each in moments:
            found = self._killed(command, each - self._goes_on_from(running))
            if found is None:
                break
            kills.append(found)
        process = self.place.start(command, self.output)
        if process.wait():
            self._stuck(process.returncode)
        planned = self._planned(command)
        orphans = self.place.wait_until_empty(SECONDS_TO_LEAVE)
        expected, found_bits = self.campaign.bits, bits(self.place.root / "results")
        ours = tuple(f"{job.folder}/" for job in running)
        wanted = {name for name in expected if name.startswith(ours)}
        wrong = {name for name, value in found_bits.items() if expected.get(name) != value}
        left = self.place.unfinished()
        early = [name for name in left if _is_of_snakemake(Path(name))]
        differing = sorted(wrong | (wanted - found_bits.keys()))
        self.campaign.say(
            event="moment",
            at=round(moment - self.campaign.jobs[0].began, 1),
            jobs=[job.folder for job in running],
            kills=kills,
            seconds=round(time.monotonic() - begun, 1),
            compared=len(wanted),
            differing=differing,
            planned=planned,
            unfinished=[*(name for name in left if name not in early), *orphans.values()],
            early=early,
        )
        if differing:
            raise SystemExit(f"other bits than without a fault: {', '.join(differing)}")
        if planned:
            raise SystemExit(f"the same command would do more: {planned}")

    def _go_back_to(self, moment: float) -> list[Done]:
        """Link what was done then, and the last states; returns what was at work, or else came next."""
        root, whole, jobs = self.place.root, self.campaign.whole.root, self.campaign.jobs
        for folder in (root / "results", root / "logs", root / ".snakemake", self.place.tmp):
            shutil.rmtree(folder, ignore_errors=True)
        self.place.tmp.mkdir()  # what one moment left is not held against the next
        ignore = shutil.ignore_patterns(*OF_ONE_CALL)
        shutil.copytree(whole / ".snakemake", root / ".snakemake", ignore=ignore)
        running = [job for job in jobs if job.began <= moment < job.ended]
        running = running or [job for job in jobs if job.began > moment][:1]
        before = min(job.began for job in running)
        for job in jobs:
            if job.ended <= max(moment, before):
                source, target = whole / "results" / job.folder, root / "results" / job.folder
                shutil.copytree(source, target, copy_function=os.link, symlinks=True)
        for job in running:
            states = (self.campaign.folder / "states" / job.folder).glob("*.pt")
            saved = [path for path in states if path.stat().st_mtime <= moment]
            if saved:
                newest = max(saved, key=lambda path: path.stat().st_mtime)
                resume = root / "results" / job.folder / ".resume"
                resume.mkdir(parents=True)
                os.link(newest, resume / newest.name)
        return running

    def _goes_on_from(self, running: list[Done]) -> float:
        """When the job that has come least far would have been there, in the run without a fault."""
        reached = []
        for job in running:
            states = self.campaign.folder / "states" / job.folder
            if (self.place.root / "results" / job.folder / "manifest.json").exists():
                continue
            steps = [
                _step(path) for path in self.place.root.glob(f"results/{job.folder}/.resume/*.pt")
            ]
            known = [
                path.stat().st_mtime
                for path in states.glob("*.pt")
                if _step(path) <= max(steps, default=0)
            ]
            reached.append(max([job.began, *known]))
        return min(reached, default=0.0)

    def _killed(self, command: list[str | Path], seconds: float) -> dict[str, Any] | None:
        """Start, kill one of the processes after so many seconds of work, and wait for the others to leave.

        Returns:
            What happened; None if all was done before.
        """
        is_at_start = self.random.random() < SHARE_OF_STARTS
        pause = SECONDS_TO_START * (self.random.random() if is_at_start else 1.0)
        seconds = pause + (0.0 if is_at_start else max(0.0, seconds))
        process = self.place.start(command, self.output)
        if wait_for(lambda: process.poll() is not None, seconds):
            if process.returncode:
                self._stuck(process.returncode)
            return None
        found = {
            pid: _kind(words, pid == process.pid) for pid, words in self.place.processes().items()
        }
        kind = self.random.choice(sorted(set(found.values()) or {"snakemake"}))
        victims = [pid for pid, each in found.items() if each == kind] or [process.pid]
        kill(self.random.choice(victims))
        killed = time.monotonic()
        patience = SECONDS_TO_NOTICE if kind == "worker" else SECONDS_FOR_OTHERS
        if not wait_for(lambda: process.poll() is not None, patience):
            process.kill()
        code = process.wait()
        orphans = self.place.wait_until_empty(SECONDS_TO_LEAVE)
        for pid in orphans:
            kill(pid)
        return {
            "victim": kind,
            "after": round(seconds, 1),
            "code": code,
            "seconds_to_leave": round(time.monotonic() - killed, 1),
            "orphans": list(orphans.values()),
        }

    def _planned(self, command: list[str | Path]) -> str:
        """What a dry run of the same command still plans; empty if nothing."""
        log = self.output.with_name("planned.txt")
        log.unlink(missing_ok=True)
        code = self.place.start([*command, "-n"], log).wait()
        said = log.read_text()
        return "" if code == 0 and "Nothing to be done" in said else said[-2000:]

    def _stuck(self, code: int) -> None:
        last = self.output.read_text()[-2000:]
        self.campaign.say(event="stuck", code=code, output=last)
        raise SystemExit("the same command has not finished")


def _share(name: str, good: int, of: list[Any], unit: str, note: str = "") -> Row:
    return Row(name, good, len(of), unit, good / len(of) if of else None, 1.0, note=note)


def _is_of_snakemake(path: Path) -> bool:
    """Whether a Snakemake made it before it read the workflow, which has the next call remove what it makes later."""
    return path.name.startswith("snakemake") and path.is_dir() and not any(path.iterdir())


def _step(state: Path) -> int:
    return int(state.name.split("-")[1])


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
    parser.add_argument("--minutes", type=float, default=600, help="no moment is begun later")
    given = parser.parse_args()
    given.words = []
    if given.quick:
        given.folder = Path(tempfile.mkdtemp())
        given.config, given.kills = ROOT / "tests/config/small.yaml", 3
        given.words = ["--until", "shard"]
    given.folder, given.config = given.folder.resolve(), given.config.resolve()
    given.folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(given)
    streams = [Stream(campaign, number) for number in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        for done in [pool.submit(stream.run) for stream in streams]:
            done.result()
    report("faults", campaign.rows())
    if given.quick:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
