"""Failed tasks: what a user or a machine has to mend is a result like others, so that all else goes on and the report says it.

`result.json` is then `{"task": ..., "failed": message}`. Such a job is tried again by every later call of snakemake, as
its cause may lie in a file that no version knows of. How often it has failed stands in a file beside its outputs, which
the rule reads as a param: each failure is a changed param, and the attempt that succeeds changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipgraft.aside import write_json
from clipgraft.config import ConfigError
from clipgraft.disk import is_disk_full, is_of_the_disk
from clipgraft.versions import FAILURES

log = logging.getLogger(__name__)

# The latter two: a file that may not be read, a disk that is gone, too little memory.
MENDABLE = (ConfigError, OSError, RuntimeError)


def or_failure(task: str, job_folder: Path, out: Path, measure: Callable[[], Any]) -> Any:
    """What `measure` returns; if there is something to mend, that as the result.

    Args:
        task: name of the task.
        job_folder: of the job; how often it has failed is kept here.
        out: where results are written.
        measure: measures and writes `result.json`.
    Returns:
        Facts for the manifest; of a failed task `failed`.
    """
    try:
        return measure()
    except MENDABLE as error:
        is_mistake = isinstance(error, ConfigError)
        if not is_mistake and (is_of_the_disk(error) or is_disk_full(error, out)):
            raise  # no result can be written
        reason = reason_of(task, error)
        write_json(out / "result.json", {"task": task, "failed": reason})
        with (job_folder / FAILURES).open("a") as file:
            file.write(f"{' '.join(reason.split())}\n")
        return {"failed": reason}


def reason_of(task: str, error: Exception) -> str:
    """Why a task has failed, in one line for tables; the log has the traceback, unless the message says it all."""
    if isinstance(error, ConfigError):
        log.error("error: task %s has failed: %s", task, error)
        return str(error)
    log.error("error: task %s has failed", task, exc_info=error)
    return f"{type(error).__name__}: {error}"
