"""Fetch: img2dataset, wrapped so that none of its traps reaches the user.

It runs as a program in a process group of its own (`fetch_process.py`), and is never taken at its word: it
exits with 0 when everything failed, so what it wrote is counted, shard by shard. It is told not to touch the
images either (it would lose orientation tags and turn 16-bit greys white): each finished shard is
rewritten at once in the order of the table, with large images shrunk, so that temporary files stay
few and tars are reproducible.

A work folder keeps what is finished, so that a stopped fetch goes on: `finished/` holds a tar and a table of
outcomes per shard, `round/` the shards of img2dataset. When a round is over, the next fetch in the same folder
is another round, of the rows that failed.
"""

from __future__ import annotations

import json
import logging
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
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipgraft.aside import link, written_aside
from clipgraft.data import fetch_process
from clipgraft.data.images import BadImage, shrink
from clipgraft.data.outcomes import OUTCOMES, Outcome, read_outcomes, write_outcomes
from clipgraft.data.parallel import Progress, worker_pool
from clipgraft.data.samples import read_columns
from clipgraft.data.tars import add_member, list_samples, read_range
from clipgraft.versions import LIBRARY

log = logging.getLogger(__name__)

# Rows per tar. Never a function of the machine, or tars would differ between machines.
SHARD = 2_000

_THREADS = 8  # of one img2dataset process; more were slower
_JPEG_QUALITY = 95
_POLL_SECONDS = 0.2
_PATIENCE = 6  # an image may take this many times as long as one socket operation


@dataclass(frozen=True)
class Limits:
    """How images are fetched.

    Attributes:
        short_side: larger images are shrunk to it.
        timeout_seconds: per socket operation.
        retries: per URL.
        allow_private: let URLs reach loopback, private and link-local addresses.
        allow_files: let `file://` URLs read local files.
    """

    short_side: int
    timeout_seconds: int = 60
    retries: int = 0
    allow_private: bool = False
    allow_files: bool = False


def fetch(table: pa.Table, work: Path, threads: int, limits: Limits) -> list[Outcome]:
    """Fetch the URLs of a table into tars in `work/finished`; what an earlier fetch has is kept.

    Args:
        table: row (int, names the sample), url, caption (for the .txt, or null) and about (struct, for the
            JSON).
        work: folder of this table, kept until the tars were taken over.
        threads: processes of img2dataset, and of the rewriting that follows it.
        limits: size, patience and what is allowed.

    Returns:
        One outcome per row, by row.
    """
    finished, current = work / "finished", work / "round"
    finished.mkdir(parents=True, exist_ok=True)
    if not (current / "first_shard").is_file():  # else it was stopped in the middle
        shutil.rmtree(current, ignore_errors=True)
        told = last_outcomes(finished)
        had = [row for row, outcome in told.items() if outcome.status == "ok"]
        wanted = table.filter(pc.invert(pc.is_in(table["row"], pa.array(had, pa.int64()))))
        if not wanted.num_rows:
            return [told[row] for row in table["row"].to_pylist()]
        if told:
            log.info("fetching again the %s images that failed", f"{wanted.num_rows:,}")
        (current / "shards").mkdir(parents=True)
        pq.write_table(wanted, current / "rows.parquet")
        pq.write_table(wanted.select(["row", "url"]), current / "urls.parquet")
        stems = [int(path.stem) for path in finished.glob("*.parquet")]
        (current / "first_shard").write_text(str(max(stems, default=-1) + 1))
    _run_round(current, finished, threads, limits)
    shutil.rmtree(current)
    told = last_outcomes(finished)
    return [told[row] for row in table["row"].to_pylist()]


def lay_aside(folder: Path, work: Path) -> None:
    """Fill a work folder with what an earlier download has, so that a fetch in it takes what failed.

    Args:
        folder: of the download; its tars are linked. Outcomes without a file were refused, and will be again.
        work: for `fetch`; it appears as a whole.
    """
    part = work.with_name("new")
    shutil.rmtree(part, ignore_errors=True)  # left by a kill
    finished = part / "finished"
    finished.mkdir(parents=True)
    by_file: dict[str, list[Outcome]] = {}
    for each in read_outcomes(folder / OUTCOMES):
        if each.file:
            by_file.setdefault(each.file, []).append(each)
    for file, of_file in by_file.items():
        if (folder / file).is_file():
            link(folder / file, finished / file)
        write_outcomes(of_file, finished / Path(file).with_suffix(".parquet"))
    part.rename(work)


def key_of(row: int) -> str:
    """Key of a row of the table."""
    return f"{row:09d}"


def last_outcomes(finished: Path) -> dict[int, Outcome]:
    """The last word on each row; later shards fetched again what had failed in earlier ones."""
    return {
        int(each.key): each
        for path in sorted(finished.glob("*.parquet"), key=lambda path: int(path.stem))
        for each in read_outcomes(path)
    }


def _run_round(current: Path, finished: Path, threads: int, limits: Limits) -> None:
    shards = current / "shards"  # img2dataset's alone: a foreign JSON in it would crash it
    first = int((current / "first_shard").read_text())
    table = read_columns(current / "rows.parquet")
    num_shards = -(-table.num_rows // SHARD)

    def stem_of(shard: str) -> str:
        return f"{first + int(shard):05d}"

    def rows_of(shard: str) -> list[dict[str, Any]]:
        return list(table.slice(int(shard) * SHARD, SHARD).to_pylist())

    done = {
        f"{shard:05d}"
        for shard in range(num_shards)
        if (finished / f"{first + shard:05d}.parquet").is_file()
    }
    if done:
        log.info("%s of %s shards were finished before", len(done), num_shards)
    for path in shards.glob("*.tar"):  # left by a kill: whole ones are rewritten below
        if not _is_json(shards / f"{path.stem}_stats.json"):
            path.unlink()
    for path in shards.glob("*_stats.json"):
        shard = path.name.removesuffix("_stats.json")
        if not _is_json(path) or (
            shard not in done and not (shards / f"{shard}.parquet").is_file()
        ):
            path.unlink()
    left = sum(min(SHARD, table.num_rows - int(shard) * SHARD) for shard in done)
    progress = Progress("fetched", table.num_rows - left)
    pending: list[Future[None]] = []
    num_failed, num_seen = 0, 0
    if len(done) < num_shards:
        with (
            worker_pool(threads) as pool,
            _img2dataset(current, min(threads, num_shards), limits) as process,
        ):
            for fresh in _finished_shards(process, shards, done, num_shards):
                for shard in fresh:
                    rows = rows_of(shard)
                    task = (shards, shard, rows, finished / stem_of(shard), limits.short_side)
                    pending.append(pool.submit(_rewrite, *task))
                    num_failed += _num_failed(shards, shard)
                    num_seen += len(rows)
                    progress.add(len(rows))
                share = f"{1 - num_failed / num_seen:.0%} of them ok" if num_seen else ""
                progress.add(0, f"   {share}   {_megabytes(shards):,.0f} MB under way")
            for future in pending:
                future.result()
        progress.done(f"   {1 - num_failed / max(1, num_seen):.0%} of them ok")
        if len(done) + len(pending) != num_shards:
            tail = (current / "output.txt").read_text(errors="replace").strip()[-1500:]
            raise RuntimeError(
                f"img2dataset finished {len(done) + len(pending)} of {num_shards} shards "
                f"(exit code {process.returncode}). Its last words:\n{tail}"
            )


@contextmanager
def _img2dataset(
    current: Path, processes: int, limits: Limits
) -> Iterator[subprocess.Popen[bytes]]:
    """Run img2dataset; on leaving, whatever is left of it and its workers is killed."""
    flags = {
        "url_list": "urls.parquet",  # relative names: its command line takes a comma for a list
        "input_format": "parquet",
        "url_col": "url",
        "save_additional_columns": json.dumps(["row"]),
        "output_folder": "shards",
        "output_format": "webdataset",
        "disable_all_reencoding": True,
        "number_sample_per_shard": SHARD,
        "processes_count": processes,
        "thread_count": _THREADS,
        "timeout": limits.timeout_seconds,
        "retries": limits.retries,
        "extract_exif": False,
        "compute_hash": None,
        "enable_wandb": False,
    }
    command = [sys.executable, "-m", fetch_process.__name__]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(LIBRARY.parent), os.environ.get("PYTHONPATH")))
        ),
        fetch_process.PARENT: str(os.getpid()),
        fetch_process.PRIVATE: str(int(limits.allow_private)),
        fetch_process.FILES: str(int(limits.allow_files)),
        fetch_process.SECONDS: str(_PATIENCE * limits.timeout_seconds),
    }
    with (current / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=current,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _finished_shards(
    process: subprocess.Popen[bytes], shards: Path, done: set[str], num_shards: int
) -> Iterator[list[str]]:
    """Again and again, the shards that img2dataset has finished since; statistics are written last.

    It ends with the last shard, or with img2dataset: nothing after the last shard is worth waiting for.
    """
    seen = set(done)
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
    except (FileNotFoundError, ValueError):  # still being written
        return False
    return True


def _num_failed(shards: Path, shard: str) -> int:
    about = json.loads((shards / f"{shard}_stats.json").read_text())
    return int(about["count"] - about["successes"])


def _megabytes(shards: Path) -> float:
    """Size of the tars that are still being written or rewritten."""
    size = 0
    for path in shards.glob("*.tar"):
        with suppress(FileNotFoundError):  # rewritten since
            size += path.stat().st_size
    return size / 1e6


def _rewrite(
    shards: Path, shard: str, rows: list[dict[str, Any]], target: Path, short_side: int
) -> None:
    """Turn one shard of img2dataset into a reproducible tar: sorted, large images shrunk, no times.

    Args:
        shards: img2dataset's folder; the shard's tar is deleted.
        shard: its name there.
        rows: rows of the table that the shard is about; those it says nothing of have failed too.
        target: where the tar goes, without suffix; beside it a table of outcomes, written last.
        short_side: larger images are shrunk to it.
    """
    told = {each["row"]: each for each in pq.read_table(shards / f"{shard}.parquet").to_pylist()}
    source, path = shards / f"{shard}.tar", target.with_suffix(".tar")
    has_images = any(each["status"] == "success" for each in told.values())
    members = dict(list_samples(source)) if has_images else {}
    outcomes = []
    lost = {"status": "lost", "error_message": "img2dataset lost this row"}
    with tarfile.open(path, "w") as tar:
        for row in rows:
            key, about = key_of(row["row"]), told.get(row["row"], lost)
            place = members.get(about.get("key", ""), {}).get("jpg")
            if about["status"] != "success" or place is None:
                message = about["error_message"] or "img2dataset wrote no image"
                outcomes.append(Outcome(key, path.name, "failed", message))
                continue
            try:
                image = shrink(read_range(source, *place), short_side, _JPEG_QUALITY)
            except BadImage as error:
                outcomes.append(Outcome(key, path.name, "failed", str(error)))
                continue
            _add_sample(tar, key, image, row)
            outcomes.append(Outcome(key, path.name, "ok"))
    if all(each.status == "failed" for each in outcomes):
        path.unlink()  # an empty tar is an error everywhere else
    with written_aside(target.with_suffix(".parquet")) as aside:
        write_outcomes(outcomes, aside)
    source.unlink(missing_ok=True)


def _add_sample(tar: tarfile.TarFile, key: str, image: bytes, row: dict[str, Any]) -> None:
    add_member(tar, f"{key}.jpg", image)
    if row["caption"] is not None:
        add_member(tar, f"{key}.txt", row["caption"].encode("utf-8", "replace"))
    about = {
        name: value  # where a file was on some machine is nobody's business
        for name, value in row["about"].items()
        if not (row["url"].startswith("file:") and value == row["url"])
    }
    text = json.dumps(about, ensure_ascii=False, default=str)
    add_member(tar, f"{key}.json", text.encode("utf-8", "replace"))
