"""The job: what every script of `scripts/` is handed, and how its outputs appear, all at once or not at all.

A script is `Job.run(main, __doc__)`. All scripts have the same command line: settings as JSON, named inputs (the
manifests of earlier jobs) and an output folder; or a finished job's manifest, to replay it with a change.
Imports of torch and the like belong inside `main`, after the command line is read and threads are limited.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel

from clipgraft import log as logging_setup
from clipgraft import provenance
from clipgraft.arguments import parse, with_change
from clipgraft.aside import sync, write_json
from clipgraft.config import ConfigError, validate
from clipgraft.disk import disk_trouble
from clipgraft.integrity import Inputs, to_the_present
from clipgraft.lock import locked
from clipgraft.orphan import NOTHING_TO_DO, SNAKEMAKE, is_left, leave_when_asked, leave_with_parents
from clipgraft.startup import all_is_written, collect_seldom, without_pandas
from clipgraft.versions import deciding, fingerprint, weights_of

log = logging.getLogger(__name__)
S = TypeVar("S", bound=BaseModel)

WRITING = ".writing"
RESUME = ".resume"
LEFT = ".left"  # has the manifest of a job that was done when its Snakemake was gone
REQUEUE = os.EX_TEMPFAIL  # stopped on request with its state saved; run it again


@dataclass
class Job:
    """One run of one stage.

    Attributes:
        stage: the stage, as the script is called.
        name: for log lines, e.g. `finetune_expert/2`.
        raw_settings: settings as they came; use `settings(Model)`.
        inputs: input name to the folder of the job it comes from.
        out: output folder.
        threads: CPU threads this process may use.
        code: fingerprint of the code this script reaches.
        checked: of the first process: whether the inputs are whole.
        facts: what goes into the manifest beside settings and files; use `record`.
    """

    stage: str
    name: str
    raw_settings: dict[str, Any]
    inputs: dict[str, Path]
    out: Path
    threads: int
    code: str
    checked: Inputs | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @staticmethod
    def run(main: Callable[[Job], None], doc: str | None) -> None:
        """Read the command line, run `main` and leave with an exit code; a user's mistake is one message."""
        script = Path(sys.argv[0]).resolve()
        arguments = parse(doc or script.stem)
        logging_setup.set_up(arguments.name or script.stem, arguments.log)
        collect_seldom()
        leave_when_asked()
        leave_with_parents()
        job = None
        try:
            job = _job(script, arguments)
            _limit_threads(job.threads)
            without_pandas()
            main(job)
            all_is_written()
        except ConfigError as error:
            log.error("error: %s", error)
            _fail(job)
        except Exception:
            sys.excepthook(*sys.exc_info())
            _fail(job)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)

    def settings(self, model: type[S]) -> S:
        """The settings, validated."""
        return validate(model, self.raw_settings)

    def folder(self, name: str) -> Path:
        """Folder of a required input."""
        if name not in self.inputs:
            given = ", ".join(self.inputs) or "none"
            raise ConfigError(
                f"{self.stage} needs the input `{name}` (given: {given}). Hint: --input {name}=MANIFEST"
            )
        return self.inputs[name]

    def optional(self, name: str) -> Path | None:
        """Folder of an input that may be left out."""
        return self.inputs.get(name)

    def folders(self, prefix: str = "") -> dict[str, Path]:
        """Folders of all inputs whose name begins with `prefix`, in the order given."""
        return {name: folder for name, folder in self.inputs.items() if name.startswith(prefix)}

    @property
    def is_first(self) -> bool:
        """Whether this process writes (rank 0)."""
        return os.environ.get("RANK", "0") == "0"

    @property
    def resume(self) -> Path:
        """Folder for training state; it survives a failed job and is removed when the job is done."""
        return self.out / RESUME

    @property
    def tag(self) -> str:
        """What saved state must agree with to be continued: settings, inputs, local weights and code."""
        return _tag(self.stage, self.raw_settings, self._ids(), self.code, self.weights)

    @cached_property
    def weights(self) -> list[str]:
        """What tells that local weights, read beside the inputs, have changed; as the job began."""
        return weights_of(self.stage, self.raw_settings, is_start="init" not in self.inputs)

    def _ids(self) -> dict[str, str]:
        """Of the inputs."""
        folders = self.inputs.items()
        return {name: provenance.read_manifest(folder)["id"] for name, folder in folders}

    def record(self, **facts: Any) -> None:
        """Put facts into the manifest: `samples_seen=`, `metrics=` and so on (JSON-able)."""
        self.facts |= facts

    @contextmanager
    def outputs(self) -> Iterator[Path]:
        """A folder to write into; on leaving without error its files appear in `out`, the manifest last.

        Raises:
            ConfigError: if another process is writing the same outputs.
        """
        writing = self.out / WRITING
        if not self.is_first:  # other ranks compute, rank 0 writes
            yield writing
            return
        with disk_trouble(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            with locked(self.out / ".lock"):
                shutil.rmtree(writing, ignore_errors=True)
                self._take_over()
                writing.mkdir()
                try:
                    yield writing
                    with _undisturbed():
                        if self.checked is not None:
                            self.checked.finish()
                        self._publish(writing)
                        shutil.rmtree(self.resume, ignore_errors=True)
                except SystemExit:
                    if (
                        NOTHING_TO_DO in os.environ
                    ):  # what the processes have made until they learned it
                        shutil.rmtree(self.resume, ignore_errors=True)
                    raise
                finally:
                    shutil.rmtree(writing, ignore_errors=True)
        log.info(
            "done in %s: wrote %s (%s)",
            _duration(time.monotonic() - self.started),
            self.out,
            _size(self.out),
        )

    @contextmanager
    def part(self) -> Iterator[Path]:
        """The output folder itself, for a job whose share of the work another one gathers."""
        with disk_trouble(self.out):
            yield self.out

    def _take_over(self) -> None:
        """End here if this was done by a job that had lost its Snakemake, before this one got the lock.

        By hand, without Snakemake, a job is done whatever is there.
        """
        left = self.out / LEFT
        try:
            manifest = provenance.read_manifest(left)
            provenance.check_outputs(self.out, manifest)
        except ConfigError:
            manifest = None
        is_done = manifest is not None and SNAKEMAKE in os.environ and self._is_same(manifest)
        if is_done:
            to_the_present(self.inputs.values())
            write_json(self.out / provenance.MANIFEST, manifest)
            shutil.rmtree(self.resume, ignore_errors=True)
            log.info("done by a job that had lost its Snakemake: %s", self.out)
        shutil.rmtree(left, ignore_errors=True)
        if is_done and os.environ.get("WORLD_SIZE", "1") == "1":
            sys.exit(0)
        if is_done:
            os.environ[NOTHING_TO_DO] = "1"  # the other processes learn it from `dist.world`

    def _is_same(self, manifest: Mapping[str, Any]) -> bool:
        """Whether a job of the same settings, inputs, local weights and code has written it."""
        ids = {name: about["id"] for name, about in manifest["inputs"].items()}
        stage, settings, code = (manifest[key] for key in ("stage", "settings", "code"))
        return self.tag == _tag(stage, settings, ids, code, manifest.get("weights", []))

    def _outputs_before(self) -> set[str]:
        """Files of the run before, by other code maybe."""
        try:
            return set(provenance.read_manifest(self.out)["outputs"])
        except ConfigError:
            return set()

    def _publish(self, writing: Path) -> None:
        outputs = provenance.describe_outputs(writing)
        for name in self._outputs_before() - outputs.keys():
            (self.out / name).unlink(missing_ok=True)
        (self.out / provenance.MANIFEST).unlink(missing_ok=True)
        to_the_present(self.inputs.values())
        for name in outputs:
            sync(writing / name)
            target = self.out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(writing / name, target)
        manifest = {
            "format": 1,
            "stage": self.stage,
            "name": self.name,
            "id": provenance.content_id(self.stage, self.raw_settings, outputs),
            "settings": self.raw_settings,
            "code": self.code,
            "git": provenance.git_commit(Path(__file__).parent),
            "inputs": {
                name: {
                    "manifest": os.path.relpath(folder / provenance.MANIFEST, self.out.resolve()),
                    "id": provenance.read_manifest(folder)["id"],
                }
                for name, folder in self.inputs.items()
            },
            "weights": self.weights,
            "outputs": outputs,
            "packages": provenance.package_versions(),
            "hardware": provenance.hardware(),
            "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
            "threads": self.threads,
            "seconds": round(time.monotonic() - self.started, 2),
            "peak_memory_mb": peak_memory_mb(),
            **self.facts,
        }
        write_json(self.out / provenance.MANIFEST, manifest)
        if is_left():  # the next Snakemake removes the manifest, since it was told of no end
            (self.out / LEFT).mkdir(exist_ok=True)
            write_json(self.out / LEFT / provenance.MANIFEST, manifest)


def _tag(
    stage: str,
    settings: Mapping[str, Any],
    ids: Mapping[str, str],
    code: str,
    weights: Sequence[str],
) -> str:
    parts = [stage, *deciding(settings, ids), code, *weights]
    return json.dumps(parts, sort_keys=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What is done is not thrown away because someone asks this process to leave."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory_mb() -> int:
    """Largest resident size of this process or of one of its children so far."""
    kilobytes = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return kilobytes // 1024


def _job(script: Path, arguments: argparse.Namespace) -> Job:
    settings, inputs, recorded = arguments.settings, {}, {}
    if arguments.manifest is not None:
        recorded = provenance.read_manifest(arguments.manifest)
        if recorded["stage"] != script.stem:
            raise ConfigError(
                f"{arguments.manifest} is of stage {recorded['stage']}, not {script.stem}"
            )
        settings = recorded["settings"] | settings
        here = arguments.manifest.resolve().parent
        inputs = {name: here / about["manifest"] for name, about in recorded["inputs"].items()}
    for pair in arguments.input:
        name, _, path = pair.partition("=")
        inputs[name] = Path(path)
    folders = {}
    for name, path in inputs.items():
        # Resolved, because runs/<run>/ holds links, and manifests record relative paths.
        folders[name] = (path.parent if path.name == provenance.MANIFEST else path).resolve()
    for pair in arguments.set:
        settings = with_change(settings, *pair.partition("=")[::2])
    is_first = os.environ.get("RANK", "0") == "0"
    checked = Inputs(folders.values(), script.stem) if is_first else None
    code = fingerprint(script)
    name = arguments.name or recorded.get("name") or script.stem
    threads = max(1, arguments.threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return Job(script.stem, name, settings, folders, arguments.out, threads, code, checked)


def _limit_threads(threads: int) -> None:
    """`threads` is per node: processes on a node share them."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


def _fail(job: Job | None) -> NoReturn:
    """Leave; an input that is damaged explains a failure better."""
    try:
        if job is not None and job.checked is not None:
            job.checked.finish()
    except ConfigError as error:
        log.error("error: %s", error)
    if os.environ.get("WORLD_SIZE", "1") != "1":  # at Python's own end NCCL may wait for the others
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(1)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"


def _size(folder: Path) -> str:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{total / 2**20:,.1f} MB"
