"""Copies: which of several samples of one picture stays, and who gets the captions of the others.

The first one stays. Copies are left out of a training set only: an evaluation set is what its authors published, repeats
and all. What the captions of a copy of equal pixels say and its original's do not is not lost: tables may have a row for
each caption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from clipgraft.config import ConfigError
from clipgraft.data.duplicates import find_near, first_equal, first_near
from clipgraft.data.samples import Accepted, Rejected
from clipgraft.settings import IndexJob

_MAX_ADOPTED = 64  # captions of copies; a picture of "not found" may be there a million times


def join_named(accepted: Sequence[Accepted]) -> tuple[list[Accepted], list[Rejected]]:
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
        detail = f"another image than the first of this name, which is in {first.tar}"
        if each.pixel_hash == first.pixel_hash:
            joined[row], done = _adopt(first, each, adopted)
            detail = f"the pixels of the first{done}"
        rejected.append(each.rejected("repeated uid", detail))
    return joined, rejected


def without_copies(
    settings: IndexJob, accepted: Sequence[Accepted], not_in: Mapping[str, Path]
) -> tuple[list[Accepted], list[Rejected]]:
    """A data set without images of evaluation sets; a training set also without the later ones of several that are alike.

    Args:
        settings: what is a copy, and whether this is a training set (`tokenize`).
        accepted: with one uid each.
        not_in: name to index folder of the evaluation sets whose images are left out.

    Returns:
        What stays, and what is rejected, in the order of `accepted`.

    Raises:
        ConfigError: if a folder of `not_in` is no index with hashes.
    """
    samples, max_bits = list(accepted), settings.near_duplicates
    pixel_N = np.array([each.pixel_hash for each in samples], "U16")
    hash_N = np.array([each.perceptual_hash for each in samples], np.uint64)
    copies: dict[int, Rejected] = {}

    def left() -> np.ndarray:
        return np.array([row for row in range(len(samples)) if row not in copies], np.int64)

    for name, folder in not_in.items():
        others = _read_hashes(folder)
        uid_of = dict(zip(reversed(others["pixel_hash"]), reversed(others["uid"]), strict=True))
        for row in left():
            if pixel_N[row] in uid_of:
                detail = f"the pixels of {uid_of[pixel_N[row]]}"
                copies[row] = samples[row].rejected(f"in {name}", detail)
        if max_bits is not None:
            rows, theirs = left(), np.array(others["perceptual_hash"], np.uint64)
            for row, other in zip(rows, find_near(hash_N[rows], theirs, max_bits), strict=True):
                if other >= 0:
                    detail = _near(hash_N[row], theirs[other], others["uid"][other])
                    copies[row] = samples[row].rejected(f"near one in {name}", detail)
    if settings.tokenize and settings.drop_duplicates:
        rows, adopted = left(), Counter[str]()
        for row, first in zip(rows, rows[first_equal(pixel_N[rows])], strict=True):
            if first != row:
                samples[first], done = _adopt(samples[first], samples[row], adopted)
                detail = f"the pixels of {samples[first].uid}{done}"
                copies[row] = samples[row].rejected("duplicate", detail)
    if settings.tokenize and max_bits is not None:
        rows = left()
        for row, first in zip(rows, rows[first_near(hash_N[rows], max_bits)], strict=True):
            if first != row:
                detail = _near(hash_N[row], hash_N[first], samples[first].uid)
                copies[row] = samples[row].rejected("near duplicate", detail)
    return [samples[row] for row in left()], [copies[row] for row in sorted(copies)]


def _adopt(original: Accepted, copy: Accepted, adopted: Counter[str]) -> tuple[Accepted, str]:
    """The original with what only a copy's captions say, and what was done in words; counts what each uid takes."""
    known = set(zip(original.captions, original.caption_kinds, strict=True))
    pairs = zip(copy.captions, copy.caption_kinds, strict=True)
    new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
    if not new:
        return original, ", and its captions"
    taken = adopted[original.uid]
    if taken + len(new) > _MAX_ADOPTED:
        return original, f", which has taken {taken} captions of copies and takes no more"
    adopted[original.uid] += len(new)
    captions, kinds = map(list, zip(*new, strict=True))
    taker = replace(
        original,
        captions=original.captions + captions,
        caption_kinds=original.caption_kinds + kinds,
    )
    return taker, f", which takes {len(new)} caption{'' if len(new) == 1 else 's'}"


def _near(ours: np.uint64, theirs: np.uint64, of: str) -> str:
    return f"{(ours ^ theirs).bit_count()} of 64 bits differ from {of}"


def _read_hashes(index: Path) -> dict[str, list[Any]]:
    path, columns = index / "samples.parquet", ["uid", "pixel_hash", "perceptual_hash"]
    if not path.is_file() or not set(columns) <= set(pq.read_schema(path).names):
        raise ConfigError(
            f"not_in: {index} is no index with hashes of its images. Hint: run its stage `index` again"
        )
    return dict(pq.read_table(path, columns=columns).to_pydict())
