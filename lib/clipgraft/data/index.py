"""Index: look at every downloaded image once, and number what is good.

Row i of `samples.parquet` is sample i from here on, so N never changes later; everything else is told in
`rejects.parquet`, with a reason. Rows are sorted by uid: neither the order of tars nor the number of workers shows.
Copies are left out of a training set only: an evaluation set is what its authors published, repeats and all. What
the captions of a copy say and its original's do not is not lost: tables may have a row for each caption.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipgraft.config import ConfigError, local_path
from clipgraft.data.corpus import write_tokens
from clipgraft.data.duplicates import (
    find_near,
    first_equal,
    first_near,
    perceptual_hash_of,
    pixel_hash_of,
)
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
from clipgraft.data.samples import SCHEMA, samples_id_of
from clipgraft.data.tars import read_range, too_large
from clipgraft.data.wordpiece import WordPieces
from clipgraft.data.words import load_tagger
from clipgraft.job import WRITING
from clipgraft.settings import IndexJob

log = logging.getLogger(__name__)

_CHUNK = 128  # samples per task
_MAX_ADOPTED = (
    64  # captions from copies; a picture that says "not found" may be there a million times
)


@dataclass(frozen=True)
class Accepted:
    """A row of `samples.parquet`."""

    uid: str
    captions: list[str]
    caption_kinds: list[str]
    source: str
    tar: str
    image_offset: int
    image_bytes: int
    image_crc: int
    width: int
    height: int
    labels: str
    pixel_hash: str
    perceptual_hash: int


@dataclass(frozen=True)
class Rejected:
    """A row of `rejects.parquet`; where its image is, if it has one."""

    uid: str
    reason: str
    detail: str
    tar: str | None = None
    image_offset: int | None = None
    image_bytes: int | None = None


_REJECTS = pa.schema(
    {
        "uid": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
        "tar": pa.string(),
        "image_offset": pa.int64(),
        "image_bytes": pa.int64(),
    }
)


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
    log.info("%s samples to look at", f"{len(found):,}")
    accepted: list[Accepted] = []
    progress = Progress("decoded", len(found))
    tasks = ((settings, class_names, found[i : i + _CHUNK]) for i in range(0, len(found), _CHUNK))
    for results in parallel_map(_check_chunk, tasks, min(threads, len(found) // 512)):
        accepted += [each for each in results if isinstance(each, Accepted)]
        rejected += [each for each in results if isinstance(each, Rejected)]
        progress.add(len(results), f"   {len(rejected):,} rejected")
    progress.done()
    accepted, repeats = _join_named(accepted)
    accepted, copies = _without_copies(settings, accepted, not_in or {})
    rejected = sorted(rejected + repeats + copies, key=lambda each: each.uid)
    reasons = Counter(each.reason for each in rejected)
    for reason, count in reasons.most_common():
        example = next(each for each in rejected if each.reason == reason)
        log.info("rejected %6s  %s, e.g. %s: %s", f"{count:,}", reason, example.uid, example.detail)
    if not accepted:
        raise ConfigError(_nothing_left(root_of(downloads), rejected, reasons))
    facts = _write_samples(accepted, join_class_names(class_names), root_of(downloads), out)
    _write_table(rejected, _REJECTS, out / "rejects.parquet")
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
        json.dumps(labels, sort_keys=True),
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


# --- copies -------------------------------------------------------------------------------------------------


def _join_named(accepted: list[Accepted]) -> tuple[list[Accepted], list[Rejected]]:
    """The first sample of each uid, with the captions of those that show the same; all others are rejected."""
    row_of: dict[str, int] = {}
    joined: list[Accepted] = []
    rejected: list[Rejected] = []
    adopted = Counter[str]()
    for each in accepted:
        row = row_of.setdefault(each.uid, len(joined))
        if row == len(joined):
            joined.append(each)
            continue
        first = joined[row]
        if each.pixel_hash == first.pixel_hash:
            joined[row], num, done = _adopt(first, each, adopted[each.uid])
            adopted[each.uid] += num
            detail = f"the pixels of the first{done}"
        else:
            detail = f"another image than the first of this name, which is in {first.tar}"
        place = each.tar, each.image_offset, each.image_bytes
        rejected.append(Rejected(each.uid, "repeated uid", detail, *place))
    return joined, rejected


def _adopt(original: Accepted, copy: Accepted, num_adopted: int) -> tuple[Accepted, int, str]:
    """The original with what only a copy's captions say, how many it takes, and what was done in words."""
    known = set(zip(original.captions, original.caption_kinds, strict=True))
    pairs = zip(copy.captions, copy.caption_kinds, strict=True)
    new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
    if not new:
        return original, 0, ", and its captions"
    if num_adopted + len(new) > _MAX_ADOPTED:
        told = f", which has taken {num_adopted} captions of copies and takes no more"
        return original, 0, told
    captions, kinds = map(list, zip(*new, strict=True))
    taker = replace(
        original,
        captions=original.captions + captions,
        caption_kinds=original.caption_kinds + kinds,
    )
    return taker, len(new), f", which takes {_count(len(new), 'caption')}"


def _without_copies(
    settings: IndexJob, accepted: list[Accepted], not_in: Mapping[str, Path]
) -> tuple[list[Accepted], list[Rejected]]:
    """A training set without images of evaluation sets, and without the later ones of several that are alike."""
    pixel_N = np.array([each.pixel_hash for each in accepted], "U16")
    hash_N = np.array([each.perceptual_hash for each in accepted], np.uint64)
    max_bits = settings.near_duplicates
    copies: dict[int, Rejected] = {}

    adopted = Counter[int]()

    def adopt(row: int, first: int) -> str:
        """Give the captions of a copy to its original; returns what was done."""
        accepted[first], num, done = _adopt(accepted[first], accepted[row], adopted[first])
        adopted[first] += num
        return done

    def reject(
        row: int, reason: str, of: str, other_hash: np.uint64 | None = None, adopted: str = ""
    ) -> None:
        detail = f"the pixels of {of}{adopted}"
        if other_hash is not None:
            detail = f"{(hash_N[row] ^ other_hash).bit_count()} of 64 bits differ from {of}"
        each = accepted[row]
        place = each.tar, each.image_offset, each.image_bytes
        copies[row] = Rejected(each.uid, reason, detail, *place)

    def left() -> np.ndarray:
        return np.array([row for row in range(len(accepted)) if row not in copies], np.int64)

    for name, folder in not_in.items():
        others = _read_hashes(folder)
        uid_of = dict(zip(reversed(others["pixel_hash"]), reversed(others["uid"]), strict=True))
        for row in left():
            if pixel_N[row] in uid_of:
                reject(row, f"in {name}", uid_of[pixel_N[row]])
        if max_bits is not None:
            rows, theirs = left(), np.array(others["perceptual_hash"], np.uint64)
            for row, other in zip(rows, find_near(hash_N[rows], theirs, max_bits), strict=True):
                if other >= 0:
                    reject(row, f"near one in {name}", others["uid"][other], theirs[other])
    if settings.tokenize and settings.drop_duplicates:
        rows = left()
        for row, first in zip(rows, rows[first_equal(pixel_N[rows])], strict=True):
            if first != row:
                reject(row, "duplicate", accepted[first].uid, adopted=adopt(row, first))
    if settings.tokenize and max_bits is not None:
        rows = left()
        for row, first in zip(rows, rows[first_near(hash_N[rows], max_bits)], strict=True):
            if first != row:
                reject(row, "near duplicate", accepted[first].uid, hash_N[first])
    return [accepted[row] for row in left()], [copies[row] for row in sorted(copies)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _read_hashes(index: Path) -> dict[str, list[Any]]:
    path, columns = index / "samples.parquet", ["uid", "pixel_hash", "perceptual_hash"]
    if not path.is_file() or not set(columns) <= set(pq.read_schema(path).names):
        raise ConfigError(
            f"not_in: {index} is no index with hashes of its images. Hint: run its stage `index` again"
        )
    return dict(pq.read_table(path, columns=columns).to_pydict())


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
