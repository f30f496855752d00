"""The job: what every script of `scripts/` is handed, and how its outputs appear, all at once or not at all.

A script is `Job.run(main, __doc__)`. All scripts have the same command line: settings as JSON, named inputs (the
manifests of earlier jobs) and an output folder; or a finished job's manifest, to replay it with a change.
Imports of torch and the like belong inside `main`, after the command line is read and threads are limited.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from clipgraft import log as logging_setup
from clipgraft import provenance
from clipgraft.config import ConfigError, validate
from clipgraft.integrity import Inputs, to_the_present
from clipgraft.lock import locked
from clipgraft.orphan import leave_with_parents
from clipgraft.versions import MEMORY, deciding, fingerprint

log = logging.getLogger(__name__)
S = TypeVar("S", bound=BaseModel)

WRITING = ".writing"
RESUME = ".resume"
REQUEUE = 75  # EX_TEMPFAIL: stopped on request with its state saved; run it again


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
        arguments = _parse(doc or script.stem)
        logging_setup.set_up(arguments.name or script.stem, arguments.log)
        for number in (signal.SIGTERM, signal.SIGUSR1):  # training takes them over
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        leave_with_parents()
        job = None
        try:
            job = _job(script, arguments)
            _limit_threads(job.threads)
            main(job)
        except ConfigError as error:
            log.error("error: %s", error)
            _look_for_the_cause(job)
            sys.exit(1)
        except Exception:
            sys.excepthook(*sys.exc_info())
            _look_for_the_cause(job)
            sys.exit(1)
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
        """What saved state must agree with to be continued: settings, inputs and code."""
        settings, folders = deciding(self.raw_settings, self.inputs)
        inputs = {name: provenance.read_manifest(folder)["id"] for name, folder in folders.items()}
        return json.dumps([self.stage, settings, inputs, self.code], sort_keys=True)

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
        with _disk_trouble(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            with locked(self.out / ".lock"):
                shutil.rmtree(writing, ignore_errors=True)
                writing.mkdir()
                try:
                    yield writing
                    if self.checked is not None:
                        self.checked.finish()
                    self._publish(writing)
                finally:
                    shutil.rmtree(writing, ignore_errors=True)
                shutil.rmtree(self.resume, ignore_errors=True)
        log.info(
            "done in %s: wrote %s (%s)",
            _duration(time.monotonic() - self.started),
            self.out,
            _size(self.out),
        )

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
            _sync(writing / name)
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
            "outputs": outputs,
            "packages": provenance.package_versions(),
            "hardware": provenance.hardware(),
            "threads": self.threads,
            "seconds": round(time.monotonic() - self.started, 2),
            "peak_memory_mb": peak_memory_mb(),
            **self.facts,
        }
        write_json(self.out / provenance.MANIFEST, manifest)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is there whole or not at all, and survives a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def peak_memory_mb() -> int:
    """Largest resident size of this process or of one of its children so far."""
    kilobytes = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return kilobytes // 1024


def _parse(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "manifest", nargs="?", type=Path, help="replay this finished job (its manifest.json)"
    )
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--settings", type=json.loads, default={}, help="settings as JSON")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=MANIFEST",
        help="manifest of the job an input comes from",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--name", help="what log lines begin with (default: the script's name)")
    parser.add_argument("--log", type=Path, help="also log to this file")
    return parser.parse_args()


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
        settings = _with(settings, *pair.partition("=")[::2])
    is_first = os.environ.get("RANK", "0") == "0"
    checked = Inputs(folders.values(), script.stem) if is_first else None
    code = fingerprint(script)
    name = arguments.name or recorded.get("name") or script.stem
    threads = max(1, arguments.threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return Job(script.stem, name, settings, folders, arguments.out, threads, code, checked)


def _with(settings: Mapping[str, Any], key: str, value: str) -> dict[str, Any]:
    """Settings with one value changed; `key` is a dotted path, or its last part where that is unique."""
    if key in MEMORY:  # of no version, so not among the settings that a job is handed
        return {**settings, key: _scalar(value)}
    paths = [path for path in _paths(settings) if path == key or path.endswith(f".{key}")]
    exact = [path for path in paths if path == key] or paths
    if len(exact) != 1:
        found = (
            f"is ambiguous: {', '.join(exact)}"
            if exact
            else f"is none of {', '.join(_paths(settings))}"
        )
        raise ConfigError(f"--set {key}={value}: {key} {found}")
    changed = json.loads(json.dumps(settings))
    *parents, leaf = exact[0].split(".")
    node = changed
    for parent in parents:
        node = node[parent]
    node[leaf] = _scalar(value)
    return dict(changed)


def _scalar(text: str) -> Any:
    try:
        return (
            float(text) if "e" in text.lower() else yaml.safe_load(text)
        )  # YAML reads 1e-4 as text
    except ValueError:
        return yaml.safe_load(text)


def _paths(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in settings.items():
        paths.append(prefix + key)
        if isinstance(value, Mapping):
            paths += _paths(value, f"{prefix}{key}.")
    return paths


def _limit_threads(threads: int) -> None:
    """`threads` is per node: processes on a node share them."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


@contextmanager
def _disk_trouble(out: Path) -> Iterator[None]:
    """A disk that is full or may not be written to is for the user to mend."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if _is_disk_full(error, out):
            raise ConfigError(_disk_full(error, out)) from error
        if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"{error.filename or out}: {error.strerror}. Hint: is the disk mounted read-only, or are the files "
                "someone else's?"
            ) from error
        raise


def _is_disk_full(error: OSError | RuntimeError, out: Path) -> bool:
    """Not all libraries pass the error number on; then a disk without room is taken for the cause."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    has_reason = isinstance(error, OSError) and error.errno is not None
    return not has_reason and ("No space left" in str(error) or _free_bytes(out) < 2**20)


def _disk_full(error: OSError | RuntimeError, out: Path) -> str:
    where = getattr(error, "filename", None) or out
    return (
        f"{where}: no space left on device ({_free_bytes(out) / 2**20:,.0f} MB free). Nothing of this job was kept. "
        "Hint: free some room (`make unused` lists versions that no run uses), then run snakemake again"
    )


def _free_bytes(out: Path) -> int:
    there = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _look_for_the_cause(job: Job | None) -> None:
    """An input that is damaged explains a failure better."""
    try:
        if job is not None and job.checked is not None:
            job.checked.finish()
    except ConfigError as error:
        log.error("error: %s", error)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"


def _size(folder: Path) -> str:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{total / 2**20:,.1f} MB"
