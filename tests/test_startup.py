"""What jobs leave out: searches of all objects for cycles, and pandas."""

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
from clipgraft.startup import collect_seldom
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


ARROW = """
import sys
import pyarrow as pa

def numbers():
    assert pa.array([1, 2]).to_numpy().tolist() == [1, 2]
    return "pandas" in sys.modules
"""

ARROW_JOB = """
from clipgraft.job import Job

def main(job):
    with job.outputs():
        print(numbers())

Job.run(main, "A job.")
"""


def printed(*command: object) -> list[str]:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_young_cycles_are_collected_and_nothing_is_at_the_end():
    assert printed("-c", BEGIN + CODE) == ["True", "True", "True"]


END = """
import atexit, threading, time
from pathlib import Path
from clipgraft.startup import all_is_written, collect_seldom
atexit.register(lambda: print("ended"))  # runs after what is registered later
collect_seldom()
atexit.register(lambda: print("handler"))

def late():
    time.sleep(0.2)
    print("thread")

threading.Thread(target=late).start()
"""


def test_who_has_written_all_leaves_once_threads_and_handlers_have_ended():
    assert printed("-c", f"{END}\nall_is_written()") == ["thread", "handler"]


def test_who_has_not_ends_as_ever():
    assert printed("-c", END) == ["thread", "handler", "ended"]


def test_so_does_every_job(tmp_path: Path):
    (tmp_path / "empty.py").write_text(BEGIN + JOB)
    words = ("--settings", "{}", "--out", tmp_path / "out")
    assert printed(tmp_path / "empty.py", *words) == ["True"]  # and not what was to run after all


def test_arrow_imports_pandas_if_it_is_not_told():
    assert printed("-c", f"{ARROW}\nprint(numbers())") == ["True"]


def test_jobs_do_without_pandas(tmp_path: Path):
    (tmp_path / "empty.py").write_text(ARROW + ARROW_JOB)
    words = ("--settings", "{}", "--out", tmp_path / "out")
    assert printed(tmp_path / "empty.py", *words) == ["False"]


def test_pandas_can_be_imported_later():
    hide = "from clipgraft.startup import without_pandas\nwithout_pandas()\nprint(numbers())"
    use = "import pandas\nprint(pandas.DataFrame({'a': [1]}).a.sum())"
    assert printed("-c", f"{ARROW}\n{hide}\n{use}") == ["False", "1"]


def test_what_has_pandas_keeps_it():
    before = "import pandas\nfrom clipgraft.startup import without_pandas\nwithout_pandas()"
    use = "print(len(pa.table({'a': [1]}).to_pandas()))"
    assert printed("-c", f"{ARROW}\n{before}\n{use}") == ["1"]
