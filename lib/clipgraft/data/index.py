"""Index: look at every downloaded image once, and number what is good.

Row i of `samples.parquet` is sample i from here on, so N never changes later; everything else is told in
`rejects.parquet`, with a reason. Rows are sorted by uid: neither the order of tars nor the number of workers shows.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipgraft.config import ConfigError
from clipgraft.data.images import SUFFIXES, BadImage, open_image, to_rgb
from clipgraft.data.parallel import Progress, parallel_map
from clipgraft.data.samples import SCHEMA, samples_id_of
from clipgraft.data.tars import Members, list_tars, read_range
from clipgraft.data.tokens import write_tokens
from clipgraft.job import WRITING
from clipgraft.settings import IndexJob

log = logging.getLogger(__name__)

_CHUNK = 128  # samples per task

ClassNames = dict[str, list[str]]


@dataclass(frozen=True)
class Found:
    """A sample as the download left it.

    Attributes:
        uid: its name, unique in the index.
        file: tar or image file, as `outcomes.parquet` has it.
        path: the same, to open.
        members: where its files' bytes are; of an image file, only the image.
    """

    uid: str
    file: str
    path: Path
    members: Members


@dataclass(frozen=True)
class Accepted:
    """A row of `samples.parquet`."""

    uid: str
    captions: list[str]
    tar: str
    image_offset: int
    image_bytes: int
    width: int
    height: int
    labels: str


@dataclass(frozen=True)
class Rejected:
    """A row of `rejects.parquet`."""

    uid: str
    reason: str
    detail: str


def build_index(settings: IndexJob, download: Path, out: Path, threads: int) -> dict[str, Any]:
    """Decode and check all images of a download; write samples, rejects and, for training, tokens.

    Args:
        settings: what is accepted, and whether to tokenize.
        download: folder of the stage before.
        out: existing folder to write into.
        threads: worker processes.

    Returns:
        Facts for the manifest.

    Raises:
        ConfigError: if nothing is left, two samples cannot be told apart, or a tar is damaged.
    """
    classes_file = download / "classes.json"
    class_names: ClassNames = json.loads(classes_file.read_text()) if classes_file.is_file() else {}
    found, rejected = _without_repeats(_find(download, threads))
    log.info("%s samples to look at", f"{len(found):,}")
    accepted: list[Accepted] = []
    progress = Progress("decoded", len(found))
    tasks = ((settings, class_names, found[i : i + _CHUNK]) for i in range(0, len(found), _CHUNK))
    for results in parallel_map(_check_chunk, tasks, min(threads, len(found) // 512)):
        accepted += [each for each in results if isinstance(each, Accepted)]
        rejected += [each for each in results if isinstance(each, Rejected)]
        progress.add(len(results), f"   {len(rejected):,} rejected")
    progress.done()
    reasons = Counter(each.reason for each in rejected)
    for reason, count in reasons.most_common():
        example = next(each for each in rejected if each.reason == reason)
        log.info("rejected %6s  %s, e.g. %s: %s", f"{count:,}", reason, example.uid, example.detail)
    if not accepted:
        raise ConfigError(_nothing_left(download, rejected, reasons))
    facts = _write_samples(accepted, class_names, download, out)
    _write_table(
        rejected,
        pa.schema([(name, pa.string()) for name in ("uid", "reason", "detail")]),
        out / "rejects.parquet",
    )
    if settings.tokenize:
        captions = [each.captions for each in accepted]
        facts |= write_tokens(captions, settings.vocabulary, facts["samples_id"], out / "tokens")
    return {**facts, "rejected": dict(reasons.most_common())}


# --- what there is ------------------------------------------------------------------------------------------


def _find(download: Path, threads: int) -> list[Found]:
    """All samples that were downloaded, sorted by uid."""
    keys_of: dict[str, set[str]] = {}
    for row in pq.read_table(download / "outcomes.parquet").to_pylist():
        if row["status"] == "ok":
            keys_of.setdefault(row["file"], set()).add(row["key"])
    tars = [file for file in keys_of if file.endswith(".tar")]
    paths = [download / file for file in tars]  # absolute names stay themselves
    found = []
    for file, path, samples in zip(tars, paths, list_tars(paths, threads), strict=True):
        found += [
            Found(key, file, path, members) for key, members in samples if key in keys_of[file]
        ]
    for file in keys_of.keys() - set(tars):
        path = download / file
        members = {path.suffix[1:].lower(): (0, path.stat().st_size)}
        found += [Found(key, file, path, members) for key in keys_of[file]]
    return sorted(_with_unique_uids(found), key=lambda each: each.uid)


def _without_repeats(found: list[Found]) -> tuple[list[Found], list[Rejected]]:
    """The first sample of each uid, and the others: one tar holds the same key twice."""
    first: dict[str, Found] = {}
    repeats = [each for each in found if first.setdefault(each.uid, each) is not each]
    return list(first.values()), [
        Rejected(each.uid, "repeated key", f"again in {each.file}") for each in repeats
    ]


def _with_unique_uids(found: list[Found]) -> list[Found]:
    """Keys are the uids, unless two tars use the same; then the tar's name goes before them."""
    clash = _clash(found)
    if clash is None:
        return found
    log.info("keys repeat, e.g. in %s and %s: uids are tar/key", *clash)
    named = [
        Found(f"{each.path.stem}/{each.uid}", each.file, each.path, each.members) for each in found
    ]
    clash = _clash(named)
    if clash is not None:
        raise ConfigError(
            f"samples of {clash[0]} and {clash[1]} have the same keys, and the tars the same name. "
            "Hint: rename one of the tars"
        )
    return named


def _clash(found: list[Found]) -> tuple[str, str] | None:
    """Two files that use the same uid."""
    file_of: dict[str, str] = {}
    for each in found:
        if file_of.setdefault(each.uid, each.file) != each.file:
            return file_of[each.uid], each.file
    return None


# --- looking at one sample (in a worker) --------------------------------------------------------------------


def _check_chunk(task: tuple[IndexJob, ClassNames, list[Found]]) -> list[Accepted | Rejected]:
    settings, class_names, found = task
    results: list[Accepted | Rejected] = []
    for each in found:
        try:
            results.append(_check(settings, class_names, each))
        except BadImage as error:
            results.append(Rejected(each.uid, error.reason, error.detail))
    return results


def _check(settings: IndexJob, class_names: ClassNames, found: Found) -> Accepted | Rejected:
    image_type = next((suffix for suffix in SUFFIXES if suffix in found.members), None)
    if image_type is None:
        files = ", ".join(sorted(found.members))
        return Rejected(found.uid, "no image", f"its files: {files}")
    labels = _read_labels(class_names, found)
    captions = _read_captions(found)
    needs_caption = settings.tokenize or not labels
    if not captions and needs_caption:
        return Rejected(found.uid, *_why_no_caption(class_names, found))
    offset, size = found.members[image_type]
    image = open_image(read_range(found.path, offset, size), settings.max_megapixels)
    short, long = sorted(image.size)
    if short < settings.min_side:
        return Rejected(
            found.uid, "too small", f"{image.width}x{image.height}, side below {settings.min_side}"
        )
    if long / short > settings.max_aspect_ratio:
        detail = f"{image.width}x{image.height}, more than {settings.max_aspect_ratio:g} to 1"
        return Rejected(found.uid, "aspect ratio", detail)
    width, height = to_rgb(image).size
    return Accepted(
        found.uid,
        captions,
        found.file,
        offset,
        size,
        width,
        height,
        json.dumps(labels, sort_keys=True),
    )


def _read_captions(found: Found) -> list[str]:
    """Captions of a sample without the empty ones: the list in its JSON, else its text, else JSON's one."""
    about = _read_json(found)
    several = about.get("captions")
    if isinstance(several, list) and several:
        captions = [text for text in several if isinstance(text, str)]
    elif (text := _read_text(found, "txt")) is not None:
        captions = [text]
    else:
        captions = [about["caption"]] if isinstance(about.get("caption"), str) else []
    return [" ".join(text.split()) for text in captions if text.strip()]


def _read_labels(class_names: ClassNames, found: Found) -> dict[str, str]:
    about = _read_json(found) if class_names else {}
    labels = {
        label: about[label] for label, names in class_names.items() if about.get(label) in names
    }
    number = (_read_text(found, "cls") or "").strip()
    names = class_names.get("class", [])
    if number.isdecimal() and int(number) < len(names):
        labels["class"] = names[int(number)]
    return labels


def _why_no_caption(class_names: ClassNames, found: Found) -> tuple[str, str]:
    if "cls" in found.members and "class" not in class_names:
        return "no caption", "it has a class number, but `classes` was not given"
    if "cls" in found.members and not _read_labels(class_names, found):
        return (
            "unknown class",
            f"{_read_text(found, 'cls')!r}: the data has {len(class_names['class'])} classes",
        )
    text = _read_text(found, "txt")
    return (
        ("no caption", "no .txt and no caption in .json")
        if text is None
        else ("empty caption", repr(text)[:60])
    )


def _read_json(found: Found) -> dict[str, Any]:
    text = _read_text(found, "json")
    if text is None:
        return {}
    try:
        about = json.loads(text)
    except ValueError:  # a caption may still stand in .txt
        return {}
    return about if isinstance(about, dict) else {}


def _read_text(found: Found, extension: str) -> str | None:
    if found.path.suffix != ".tar":
        beside = found.path.with_suffix(f".{extension}")
        return (
            beside.read_text("utf-8", "replace")
            if extension == "txt" and beside.is_file()
            else None
        )
    place = found.members.get(extension)
    return None if place is None else read_range(found.path, *place).decode("utf-8", "replace")


# --- writing ------------------------------------------------------------------------------------------------


def _write_samples(
    accepted: list[Accepted], class_names: ClassNames, download: Path, out: Path
) -> dict[str, Any]:
    samples_id = samples_id_of(each.uid for each in accepted)
    folder = (
        out.parent if out.name == WRITING else out
    )  # where the files will be once the job is done
    about = {
        "num_samples": len(accepted),
        "num_captions": sum(len(each.captions) for each in accepted),
        "samples_id": samples_id,
        "download": os.path.relpath(download, folder),
        "label_names": class_names,
    }
    _write_table(accepted, SCHEMA, out / "samples.parquet")
    (out / "samples.json").write_text(json.dumps(about, indent=1) + "\n")
    facts = {name: about[name] for name in ("num_samples", "num_captions", "samples_id")}
    log.info(
        "accepted %s samples with %s captions", f"{len(accepted):,}", f"{about['num_captions']:,}"
    )
    return facts


def _write_table(rows: list[Accepted] | list[Rejected], schema: pa.Schema, path: Path) -> None:
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    pq.write_table(pa.table(columns, schema=schema), path)


def _nothing_left(download: Path, rejected: list[Rejected], reasons: Counter[str]) -> str:
    if not rejected:
        return f"download {download} has no image that is ok. Hint: outcomes.parquet there says why"
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    first = rejected[0]
    return (
        f"no sample of {download} can be used: {counts}. For example {first.uid}: {first.reason}: {first.detail}. "
        "Hint: a training set needs captions; the limits stand under `index` in the config"
    )
