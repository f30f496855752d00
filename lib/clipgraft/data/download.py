"""Download: images and captions as they came, and what became of each one that was asked for.

img2dataset fetches, as a program in a process group of its own, and is never taken at its word: it exits with 0
when everything failed, so what it wrote is counted, shard by shard. It is told not to touch the images either
(it would lose orientation tags and turn 16-bit greys white): each finished shard is rewritten at once in the
order of the table, with large images shrunk, so that temporary files stay few and tars are reproducible.
Sources that are on this machine already (tars, a folder) are checked and left where they are.
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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from clipgraft.config import ConfigError, FolderSource, ShapesSource, Source, TarSource, UrlSource
from clipgraft.data.images import SUFFIXES, BadImage, shrink
from clipgraft.data.parallel import Progress, parallel_map, worker_pool
from clipgraft.data.shapes import ATTRIBUTES, draw_sample
from clipgraft.data.tars import add_member, list_samples, list_tars, read_range
from clipgraft.versions import local_files

log = logging.getLogger(__name__)

SHARD = (
    2_000  # rows per tar; never a function of the machine, or tars would differ between machines
)

_THREADS = 8  # of one img2dataset process; more were slower
_SHAPES_SEED = 0  # names the built-in data set
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


def download(source: Source, out: Path, threads: int) -> dict[str, Any]:
    """Get all images of a source.

    Args:
        source: settings.
        out: existing, empty folder to write into.
        threads: worker processes.

    Returns:
        Facts for the manifest: how many were asked for and had, and why others failed.

    Raises:
        ConfigError: if the source cannot be read, or too few images could be had.
    """
    match source:
        case ShapesSource():
            outcomes = _download_shapes(source, out, threads)
        case UrlSource():
            outcomes = _download_urls(source, out, threads)
        case TarSource():
            outcomes = _read_tars(source, out, threads)
        case FolderSource():
            outcomes = _read_folder(source)
    columns = {
        name: [getattr(each, name) for each in outcomes]
        for name in ("key", "file", "status", "message")
    }
    pq.write_table(pa.table(columns), out / "outcomes.parquet")
    failures = Counter(each.message for each in outcomes if each.status != "ok")
    num_ok = len(outcomes) - failures.total()
    log.info("%s of %s images are ok", f"{num_ok:,}", f"{len(outcomes):,}")
    for message, count in failures.most_common(5):
        log.info("failed %6s  %s", f"{count:,}", message)
    return {
        "num_requested": len(outcomes),
        "num_ok": num_ok,
        "failures": dict(failures.most_common(20)),
    }


# --- the built-in generator -----------------------------------------------------------------------------------


def _download_shapes(source: ShapesSource, out: Path, threads: int) -> list[Outcome]:
    drawn = out / ".drawn"
    drawn.mkdir()
    try:
        table = _draw(source, drawn, threads)
        outcomes = _fetch(
            table, out, threads, short_side=source.image_size, timeout_seconds=60, retries=0
        )
    finally:
        shutil.rmtree(drawn, ignore_errors=True)
    failed = [each for each in outcomes if each.status != "ok"]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(outcomes)} drawn pictures were lost: {failed[0].message}"
        )
    class_names = {name: list(values) for name, values in ATTRIBUTES.items()}
    (out / "classes.json").write_text(json.dumps(class_names, indent=1) + "\n")
    return outcomes


def _draw(source: ShapesSource, folder: Path, threads: int) -> pa.Table:
    """Draw all pictures as files; returns a table of their `file://` URLs, captions and attributes."""
    chunks = [
        range(first, min(first + 100, source.num_samples))
        for first in range(0, source.num_samples, 100)
    ]
    progress = Progress("drew", source.num_samples)
    rows: list[dict[str, Any]] = []
    for drawn in parallel_map(_draw_chunk, ((source, chunk, folder) for chunk in chunks), threads):
        rows += drawn
        progress.add(len(drawn))
    progress.done()
    return pa.Table.from_pylist(rows)


def _draw_chunk(task: tuple[ShapesSource, range, Path]) -> list[dict[str, Any]]:
    source, numbers, folder = task
    rows = []
    for i in numbers:
        sample = draw_sample(
            _SHAPES_SEED,
            source.split,
            i,
            image_size=source.image_size,
            noise=source.noise,
            mention=source.mention,
            num_captions=source.num_captions,
        )
        path = folder / f"{i:09d}.jpg"
        sample.image.save(path, quality=_JPEG_QUALITY, subsampling=0)
        row = {"row": i, "url": path.absolute().as_uri(), "caption": sample.captions[0]}
        rows.append({**row, "captions": sample.captions, **sample.attributes})
    return rows


# --- a table of URLs ------------------------------------------------------------------------------------------


def _download_urls(source: UrlSource, out: Path, threads: int) -> list[Outcome]:
    table = _read_table(source)
    schemes = {"http", "https", "file"} if source.allow_local_files else {"http", "https"}
    refusals = [_refusal(url, schemes) for url in table["url"].to_pylist()]
    refused = [
        Outcome(_key(row), "", "failed", why) for row, why in enumerate(refusals) if why is not None
    ]
    if refused:
        log.warning(
            "%s of %s URLs are refused, e.g. %s",
            f"{len(refused):,}",
            f"{len(table):,}",
            refused[0].message,
        )
    wanted = table.filter(pa.array([why is None for why in refusals]))
    fetched = _fetch(
        wanted,
        out,
        threads,
        short_side=source.image_size,
        timeout_seconds=source.timeout_seconds,
        retries=source.retries,
    )
    outcomes = sorted(refused + fetched, key=lambda each: each.key)
    _check_success(outcomes, source)
    return outcomes


def _read_table(source: UrlSource) -> pa.Table:
    """The columns row, url, caption of the user's table.

    Raises:
        ConfigError: if a file cannot be read, lacks a column or has no row.
    """
    parts = []
    for path in local_files(source.table):
        table = _read_file(path)
        for setting in ("url_column", "caption_column"):
            column = getattr(source, setting)
            if column not in table.column_names:
                raise ConfigError(
                    f"{path} has no column {column!r}. Hint: set {setting} to one of its columns: "
                    f"{', '.join(table.column_names)}; CSV and TSV need a header line"
                )
        columns = [
            pc.cast(table[name], pa.string()) for name in (source.url_column, source.caption_column)
        ]
        parts.append(pa.table(columns, names=["url", "caption"]))
    table = pa.concat_tables(parts)
    if not table.num_rows:
        raise ConfigError(f"{source.table} has no rows. Hint: it needs one row per image")
    return table.add_column(0, "row", pa.array(range(table.num_rows), pa.int64()))


def _read_file(path: Path) -> pa.Table:
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind not in ("parquet", "csv", "tsv"):
        raise ConfigError(
            f"{path}: a table is a .parquet, .csv or .tsv file (or .csv.gz, .tsv.gz), not .{kind}"
        )
    try:
        if kind == "parquet":
            return pq.read_table(path)
        delimiter = "\t" if kind == "tsv" else ","
        options = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        return pa.csv.read_csv(path, parse_options=options)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} cannot be read as {kind}: {error}") from None


def _refusal(url: str | None, schemes: set[str]) -> str | None:
    """Why a URL is not even tried; None if it is."""
    if not url or not url.strip():
        return "no URL"
    try:
        scheme = urlsplit(url.strip()).scheme.lower()
    except ValueError as error:
        return f"not a URL: {error}"
    if scheme in schemes:
        return None
    if scheme == "file":
        return "file:// URLs are refused (allow_local_files: true lets them read local files)"
    return f"{scheme}: URLs are refused" if scheme else "not a URL: it has no http:// or https://"


def _check_success(outcomes: list[Outcome], source: UrlSource) -> None:
    failures = Counter(each.message for each in outcomes if each.status != "ok")
    num_ok = len(outcomes) - failures.total()
    if num_ok >= source.min_success * len(outcomes):
        return
    reasons = "; ".join(f"{count:,} x {message}" for message, count in failures.most_common(5))
    raise ConfigError(
        f"only {num_ok:,} of {len(outcomes):,} images of {source.table} could be had, fewer than "
        f"min_success = {source.min_success:g}. Most frequent: {reasons}. "
        "Hint: check the network and the table, or lower min_success"
    )


# --- img2dataset ----------------------------------------------------------------------------------------------


def _fetch(
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
                outcomes.append(Outcome(_key(row), file, "failed", message))
                continue
            try:
                image = shrink(
                    read_range(source, *place), short_side, _JPEG_QUALITY, _MAX_MEGAPIXELS
                )
            except BadImage as error:
                outcomes.append(Outcome(_key(row), file, "failed", str(error)))
                continue
            _add_sample(tar, _key(row), image, about)
            outcomes.append(Outcome(_key(row), file, "ok"))
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


def _key(row: int) -> str:
    return f"{row:09d}"


# --- what is on this machine already ----------------------------------------------------------------------------


def _read_tars(source: TarSource, out: Path, threads: int) -> list[Outcome]:
    """Check that the user's tars are whole; they stay where they are."""
    paths = [path.absolute() for path in local_files(source.tars)]
    if source.classes is not None:
        names = _read_classes(source.classes)
        (out / "classes.json").write_text(json.dumps({"class": names}, indent=1) + "\n")
    outcomes = []
    for path, samples in zip(paths, list_tars(paths, threads), strict=True):
        outcomes += [
            Outcome(key, str(path), "ok") for key in dict.fromkeys(key for key, _ in samples)
        ]
    log.info("%s tars, all whole", f"{len(paths):,}")
    return outcomes


def _read_classes(file: str) -> list[str]:
    path = local_files(file)[0]
    names = [line.strip() for line in path.read_text("utf-8").splitlines()]
    while names and not names[-1]:
        names.pop()
    repeated = [name for name, count in Counter(names).items() if count > 1 or not name]
    if not names or repeated:
        problem = (
            f"line {names.index(repeated[0]) + 1}, {repeated[0]!r}, is empty or repeated"
            if names
            else "it is empty"
        )
        raise ConfigError(
            f"classes {path}: {problem}. Hint: one class name per line; line 1 is class 0"
        )
    return names


def _read_folder(source: FolderSource) -> list[Outcome]:
    """Find the images of a folder and its subfolders, and whether each has a caption beside it."""
    folder = Path(os.path.expanduser(os.path.expandvars(source.folder))).absolute()
    if not folder.is_dir():
        raise ConfigError(f"folder {folder} does not exist")
    paths = sorted(
        path for path in folder.rglob("*") if path.suffix[1:].lower() in SUFFIXES and path.is_file()
    )
    if not paths:
        raise ConfigError(
            f"folder {folder} holds no images. Hint: image files are {', '.join(SUFFIXES)}"
        )
    outcomes, keys = [], set()
    for path in paths:
        key = path.relative_to(folder).with_suffix("").as_posix()
        message = ""
        if not path.with_suffix(".txt").is_file():
            message = "no caption: there is no .txt of the same name"
        elif key in keys:
            message = "another image has the same name, and so the same caption file"
        keys.add(key)
        outcomes.append(Outcome(key, str(path), "failed" if message else "ok", message))
    return outcomes
