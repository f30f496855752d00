"""Index: look at every downloaded image once, and number what is good.

Row i of `samples.parquet` is sample i from here on, so N never changes later; everything else is told in
`rejects.parquet`, with a reason. Rows are sorted by uid: neither the order of tars nor the number of workers shows.
Copies of a picture are left to `copies`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipgraft.config import ConfigError, local_path
from clipgraft.data.copies import join_named, without_copies
from clipgraft.data.corpus import write_tokens
from clipgraft.data.duplicates import perceptual_hash_of, pixel_hash_of
from clipgraft.data.found import (
    ClassNames,
    Found,
    find,
    join_class_names,
    read_captions,
    read_class_names,
    read_labels,
    read_text,
    root_of,
)
from clipgraft.data.images import SUFFIXES, BadImage, decode_whole, open_image
from clipgraft.data.parallel import Progress, parallel_map
from clipgraft.data.samples import REJECTS, ROWS, SCHEMA, Accepted, Rejected, samples_id_of
from clipgraft.data.tars import read_range, too_large
from clipgraft.data.wordpiece import WordPieces
from clipgraft.data.words import load_tagger
from clipgraft.job import WRITING
from clipgraft.settings import IndexJob

log = logging.getLogger(__name__)

_CHUNK = 128  # samples per task


def build_index(
    settings: IndexJob,
    download: Path | Mapping[str, Path],
    out: Path,
    threads: int,
    not_in: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Decode and check all images of a download; write samples, rejects and, for training, tokens.

    Args:
        settings: what is accepted, and whether to tokenize.
        download: folder of the stage before; of a mixed data set, source name to folder.
        out: existing folder to write into.
        threads: worker processes.
        not_in: name to index folder of the evaluation sets whose images are left out.

    Returns:
        Facts for the manifest.

    Raises:
        ConfigError: if nothing is left, two samples cannot be told apart, a tar is damaged, or the tagger has no model.
    """
    if settings.tokenize:
        load_tagger(settings.tagger)  # what it lacks is said before hours of decoding
    wordpiece = None
    if settings.tokenize and settings.wordpiece is not None:
        wordpiece = local_path(settings.wordpiece)
        WordPieces.read(wordpiece)  # likewise
    downloads = {"": download} if isinstance(download, Path) else dict(download)
    class_names = read_class_names(downloads)
    found, rejected = _without_repeats(find(downloads, threads))
    num_found = len(found)
    log.info("%s samples to look at", f"{num_found:,}")
    accepted: list[Accepted] = []
    progress = Progress("decoded", num_found)
    tasks = ((settings, class_names, chunk) for chunk in _taken(found))
    for results in parallel_map(_check_chunk, tasks, min(threads, num_found // 512)):
        accepted += [each for each in results if isinstance(each, Accepted)]
        rejected += [each for each in results if isinstance(each, Rejected)]
        progress.add(len(results), f"   {len(rejected):,} rejected")
    progress.done()
    accepted, repeats = join_named(accepted)
    accepted, copies = without_copies(settings, accepted, not_in or {})
    rejected = sorted(rejected + repeats + copies, key=lambda each: each.uid)
    reasons = Counter(each.reason for each in rejected)
    for reason, count in reasons.most_common():
        example = next(each for each in rejected if each.reason == reason)
        log.info("rejected %6s  %s, e.g. %s: %s", f"{count:,}", reason, example.uid, example.detail)
    if not accepted:
        raise ConfigError(_nothing_left(root_of(downloads), rejected, reasons))
    facts = _write_samples(accepted, join_class_names(class_names), root_of(downloads), out)
    _write_table(rejected, REJECTS, out / "rejects.parquet")
    if settings.tokenize:
        facts |= write_tokens(
            [each.captions for each in accepted],
            [each.caption_kinds for each in accepted],
            settings.vocabulary,
            settings.tagger,
            facts["samples_id"],
            out / "tokens",
            threads,
            wordpiece,
        )
    return {**facts, "rejected": dict(reasons.most_common())}


def _taken(found: list[Found]) -> Iterator[list[Found]]:
    """The samples in chunks; the list is empty in the end, as what is accepted of them takes as much memory again."""
    found.reverse()
    while found:
        yield found[: -_CHUNK - 1 : -1]
        del found[-_CHUNK:]


def _without_repeats(found: list[Found]) -> tuple[list[Found], list[Rejected]]:
    """The first sample of each key, and the others: one tar holds the same key twice.

    Images that share a name which the data gives stay, until their pixels are known.
    """
    first: dict[str, Found] = {}
    kept: list[Found] = []
    repeats: list[Found] = []
    for each in found:
        known = first.setdefault(each.uid, each)
        is_named = (each.is_named or known.is_named) and _place(each)[0] is not None
        (kept if each is known or is_named else repeats).append(each)
    return kept, [
        Rejected(
            each.uid,
            "repeated key",
            f"again in {each.file}, where the files of a sample must be neighbours",
            *_place(each),
        )
        for each in repeats
    ]


# --- looking at one sample (in a worker) --------------------------------------------------------------------


def _check_chunk(
    task: tuple[IndexJob, dict[str, ClassNames], list[Found]],
) -> list[Accepted | Rejected]:
    settings, class_names, found = task
    results: list[Accepted | Rejected] = []
    for each in found:
        try:
            result = _check(settings, class_names[each.source], each)
        except BadImage as error:
            result = Rejected(each.uid, error.reason, error.detail)
        if isinstance(result, Rejected):
            tar, offset, size = _place(each)
            result = replace(result, tar=tar, image_offset=offset, image_bytes=size)
        results.append(result)
    return results


def _place(found: Found) -> tuple[str, int, int] | tuple[None, None, None]:
    """File, offset and length of the image; of several, the first of the types in `SUFFIXES`."""
    for suffix in SUFFIXES:
        if suffix in found.members:
            return found.file, *found.members[suffix]
    return None, None, None


def _check(settings: IndexJob, class_names: ClassNames, found: Found) -> Accepted | Rejected:
    file, offset, size = _place(found)
    if file is None or offset is None or size is None:
        files = ", ".join(sorted(found.members))
        return Rejected(found.uid, "no image", f"its files: {files}")
    if detail := too_large(found.members):
        return Rejected(found.uid, "too large", detail)
    labels = read_labels(class_names, found)
    captions, kinds = read_captions(found)
    needs_caption = settings.tokenize or not labels
    if not captions and needs_caption:
        return Rejected(found.uid, *_why_no_caption(class_names, found))
    data = read_range(found.path, offset, size)
    image = open_image(data, settings.max_megapixels)
    short, long = sorted(image.size)
    if short < settings.min_side:
        return Rejected(
            found.uid, "too small", f"{image.width}x{image.height}, side below {settings.min_side}"
        )
    if long / short > settings.max_aspect_ratio:
        detail = f"{image.width}x{image.height}, more than {settings.max_aspect_ratio:g} to 1"
        return Rejected(found.uid, "aspect ratio", detail)
    pixels = decode_whole(data)
    return Accepted(
        found.uid,
        captions,
        kinds,
        found.source,
        file,
        offset,
        size,
        zlib.crc32(data),
        pixels.shape[1],
        pixels.shape[0],
        sys.intern(json.dumps(labels, sort_keys=True)),
        pixel_hash_of(pixels),
        perceptual_hash_of(pixels),
    )


def _why_no_caption(class_names: ClassNames, found: Found) -> tuple[str, str]:
    if "cls" in found.members and "class" not in class_names:
        return "no caption", "it has a class number, but `classes` was not given"
    if "cls" in found.members and not read_labels(class_names, found):
        return (
            "unknown class",
            f"{(read_text(found, 'cls') or '')[:40]!r}: the data has {len(class_names['class'])} classes",
        )
    if found.captions is not None:
        return "empty caption", "none of its captions has a letter"
    text = read_text(found, "txt")
    return (
        ("no caption", "no .txt and no caption in .json")
        if text is None
        else ("empty caption", repr(text)[:60])
    )


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
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=ROWS)


def _nothing_left(download: Path, rejected: list[Rejected], reasons: Counter[str]) -> str:
    if not rejected:
        return f"download {download} has no image that is ok. Hint: outcomes.parquet there says why"
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    first = rejected[0]
    return (
        f"no sample of {download} can be used: {counts}. For example {first.uid}: {first.reason}: {first.detail}. "
        "Hint: a training set needs captions; the limits stand under `index` in the config"
    )
