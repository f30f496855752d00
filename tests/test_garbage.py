"""Jobs look through all objects seldom, and not at their end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BEGIN = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))  # runs after what is registered later
before = gc.get_threshold()
"""

CODE = """
from clipgraft.garbage import collect_seldom
collect_seldom()
print(gc.isenabled() and gc.get_threshold() == (*before[:2], 100))

class Cycle:
    def __init__(self):
        self.own = self
    def __del__(self):
        gone.append(1)

gone = []
for _ in range(10_000):
    Cycle()
print(len(gone) > 5_000)  # young cycles go as ever
"""

JOB = """
from clipgraft.job import Job

def main(job):
    with job.outputs():
        print(gc.isenabled() and gc.get_threshold() == (*before[:2], 100))

Job.run(main, "A job.")
"""


def printed(*command: object) -> list[str]:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_young_cycles_are_collected_and_nothing_is_at_the_end():
    assert printed("-c", BEGIN + CODE) == ["True", "True", "True"]


def test_so_does_every_job(tmp_path: Path):
    (tmp_path / "empty.py").write_text(BEGIN + JOB)
    words = ("--settings", "{}", "--out", tmp_path / "out")
    assert printed(tmp_path / "empty.py", *words) == ["True", "True"]
