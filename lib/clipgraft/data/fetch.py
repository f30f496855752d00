"""Fetch: img2dataset, wrapped so that none of its traps reaches the user.

It runs as a program in a process group of its own, and is never taken at its word: it exits with 0
when everything failed, so what it wrote is counted, shard by shard. It is told not to touch the
images either (it would lose orientation tags and turn 16-bit greys white): each finished shard is
rewritten at once in the order of the table, with large images shrunk, so that temporary files stay
few and tars are reproducible.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipgraft.data.images import BadImage, shrink
from clipgraft.data.parallel import Progress, worker_pool
from clipgraft.data.tars import add_member, list_samples, read_range

# Rows per tar. Never a function of the machine, or tars would differ between machines.
SHARD = 2_000

_THREADS = 8  # of one img2dataset process; more were slower
_JPEG_QUALITY = 95
_MAX_MEGAPIXELS = 200.0  # a small file can claim to be a huge picture
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """What became of one requested image; a row of `outcomes.parquet`.

    Attributes:
        key: names the sample in its file.
        file: tar or image; relative names are inside the download folder.
        status: ok or failed.
        message: why it failed.
    """

    key: str
    file: str
    status: str
    message: str = ""


def fetch(
    table: pa.Table, out: Path, threads: int, *, short_side: int, timeout_seconds: int, retries: int
) -> list[Outcome]:
    """Fetch all URLs of a table into tars in `out`.

    Args:
        table: row (int, names the sample), url, caption; other columns go into the JSON of each sample.
        out: where tars appear.
        threads: processes of img2dataset, and of the rewriting that follows it.
        short_side: larger images are shrunk to it.
        timeout_seconds: per socket operation.
        retries: per URL.

    Returns:
        One outcome per row.
    """
    if not table.num_rows:
        return []
    work = out / ".fetching"
    shards = work / "shards"  # img2dataset's alone: a foreign JSON in it would crash it
    shards.mkdir(parents=True)
    pq.write_table(table, work / "urls.parquet")
    extra = [name for name in table.column_names if name not in ("url", "caption")]
    num_shards = -(-table.num_rows // SHARD)
    progress = Progress("fetched", table.num_rows)
    pending: list[Future[list[Outcome]]] = []
    num_failed = 0
    try:
        with (
            worker_pool(threads) as pool,
            _img2dataset(
                work, extra, min(threads, num_shards), timeout_seconds, retries
            ) as process,
        ):
            for stems in _finished_shards(process, shards, num_shards):
                for stem in stems:
                    rows = table["row"].slice(int(stem) * SHARD, SHARD).to_pylist()
                    pending.append(pool.submit(_rewrite, shards, stem, rows, out, short_side))
                    num_failed += _num_failed(shards, stem)
                    progress.add(len(rows))
                progress.add(
                    0, f"   {num_failed:,} failed   {_megabytes(shards):,.0f} MB under way"
                )
            finished = [future.result() for future in pending]
        progress.done()
        if len(finished) != num_shards:
            tail = (work / "output.txt").read_text(errors="replace").strip()[-1500:]
            raise RuntimeError(
                f"img2dataset finished {len(finished)} of {num_shards} shards (exit code {process.returncode}). "
                f"Its last words:\n{tail}"
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return sorted((each for shard in finished for each in shard), key=lambda each: each.key)


@contextmanager
def _img2dataset(
    work: Path, extra: list[str], processes: int, timeout_seconds: int, retries: int
) -> Iterator[subprocess.Popen[bytes]]:
    """Run img2dataset; on leaving, whatever is left of it and its workers is killed."""
    flags = {
        "url_list": "urls.parquet",  # relative names: its command line takes a comma for a list
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": json.dumps(extra),
        "output_folder": "shards",
        "output_format": "webdataset",
        "disable_all_reencoding": True,
        "number_sample_per_shard": SHARD,
        "processes_count": processes,
        "thread_count": _THREADS,
        "timeout": timeout_seconds,
        "retries": retries,
        "extract_exif": False,
        "compute_hash": None,
        "enable_wandb": False,
    }
    command = [sys.executable, "-c", "from img2dataset import main; main()"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = {**os.environ, "PYTHONPATH": _without_idle_imports(work)}
    with (work / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=work, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _without_idle_imports(work: Path) -> str:
    """A PYTHONPATH on which modules that img2dataset imports, but does not use here, are empty.

    Each of its processes (it has two beside the workers) would spend five seconds on torch, which webdataset
    can do without, wandb and albumentations, which also asks the package index for news.
    """
    idle = work / "idle_imports"
    idle.mkdir()
    (idle / "torch.py").write_text(
        'raise ModuleNotFoundError("not needed to download", name="torch")\n'
    )
    for module in ("wandb", "albumentations"):
        (idle / f"{module}.py").touch()
    return os.pathsep.join(filter(None, (str(idle), os.environ.get("PYTHONPATH"))))


def _finished_shards(
    process: subprocess.Popen[bytes], shards: Path, num_shards: int
) -> Iterator[list[str]]:
    """Again and again, the shards that img2dataset has finished since; statistics are written last.

    It ends with the last shard, or with img2dataset: nothing after the last shard is worth waiting for.
    """
    seen: set[str] = set()
    while True:
        is_over = process.poll() is not None
        stems = {
            path.name.removesuffix("_stats.json") for path in shards.glob("*_stats.json")
        } - seen
        ready = sorted(stem for stem in stems if is_over or _is_json(shards / f"{stem}_stats.json"))
        seen |= set(ready)
        yield ready
        if is_over or len(seen) == num_shards:
            return
        time.sleep(_POLL_SECONDS)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:  # still being written
        return False
    return True


def _num_failed(shards: Path, stem: str) -> int:
    about = json.loads((shards / f"{stem}_stats.json").read_text())
    return int(about["count"] - about["successes"])


def _megabytes(shards: Path) -> float:
    """Size of the tars that are still being written or rewritten."""
    size = 0
    for path in shards.glob("*.tar"):
        with suppress(FileNotFoundError):  # rewritten since
            size += path.stat().st_size
    return size / 1e6


def _rewrite(shards: Path, stem: str, rows: list[int], out: Path, short_side: int) -> list[Outcome]:
    """Turn one shard of img2dataset into a reproducible tar: sorted, large images shrunk, no times.

    Args:
        shards: img2dataset's folder; the shard's tar is deleted.
        stem: name of the shard.
        rows: rows of the table that the shard is about; those it says nothing of have failed too.
        out: where the tar goes.
        short_side: larger images are shrunk to it.
    """
    told = {each["row"]: each for each in pq.read_table(shards / f"{stem}.parquet").to_pylist()}
    source, file = shards / f"{stem}.tar", f"{stem}.tar"
    has_images = any(each["status"] == "success" for each in told.values())
    members = dict(list_samples(source)) if has_images else {}
    outcomes = []
    with tarfile.open(out / file, "w") as tar:
        for row in rows:
            about = told.get(row, {"status": "lost", "error_message": "img2dataset lost this row"})
            place = members.get(about.get("key", ""), {}).get("jpg")
            if about["status"] != "success" or place is None:
                message = about["error_message"] or "img2dataset wrote no image"
                outcomes.append(Outcome(key_of(row), file, "failed", message))
                continue
            try:
                image = shrink(
                    read_range(source, *place), short_side, _JPEG_QUALITY, _MAX_MEGAPIXELS
                )
            except BadImage as error:
                outcomes.append(Outcome(key_of(row), file, "failed", str(error)))
                continue
            _add_sample(tar, key_of(row), image, about)
            outcomes.append(Outcome(key_of(row), file, "ok"))
    source.unlink()
    if all(each.status == "failed" for each in outcomes):
        (out / file).unlink()  # an empty tar is an error everywhere else
    return outcomes


def _add_sample(tar: tarfile.TarFile, key: str, image: bytes, about: dict[str, Any]) -> None:
    add_member(tar, f"{key}.jpg", image)
    if about["caption"] is not None:
        add_member(tar, f"{key}.txt", about["caption"].encode("utf-8", "replace"))
    private = {
        "key",
        "status",
        "error_message",
        "width",
        "height",
        "original_width",
        "original_height",
        "row",
    }
    if about["url"].startswith("file:"):
        private.add("url")  # where a file was on some machine is nobody's business
    told = {name: value for name, value in about.items() if name not in private}
    add_member(tar, f"{key}.json", json.dumps(told, ensure_ascii=False).encode("utf-8", "replace"))


def key_of(row: int) -> str:
    """Key of a row of the table."""
    return f"{row:09d}"
