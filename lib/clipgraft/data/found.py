"""What a download left: its samples, and the captions and labels that came with each."""

from __future__ import annotations

import json
import logging
import os
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipgraft.config import ConfigError
from clipgraft.data.captions import clean_caption
from clipgraft.data.images import SUFFIXES, BadImage
from clipgraft.data.outcomes import OUTCOMES, Outcome, read_outcomes
from clipgraft.data.tars import Members, list_tars, read_range, too_large
from clipgraft.data.utf8 import clean

log = logging.getLogger(__name__)

# Label name -> names of its classes.
ClassNames = dict[str, list[str]]

_CAPTION = "caption"  # kind of a caption that says nothing else


@dataclass(frozen=True, slots=True)
class Found:
    """A sample as the download left it.

    Attributes:
        uid: its name, unique in the index.
        file: tar or image file, relative to the root of the downloads, or absolute.
        path: the same, to open.
        members: where its files' bytes are; of an image file, only the image.
        source: name of its part of a mixed data set; else empty.
        is_named: the user's data names it, by a column or a key of its JSON; such names stay.
        is_in_tar: else its image is a file.
        captions, caption_kinds, labels: as the outcome has them.
    """

    uid: str
    file: str
    path: Path
    members: Members
    source: str = ""
    is_named: bool = False
    is_in_tar: bool = False
    captions: list[str] | None = None
    caption_kinds: list[str] | None = None
    labels: str | None = None


def root_of(downloads: Mapping[str, Path]) -> Path:
    """The folder that files of the samples are relative to."""
    folders = list(downloads.values())
    return folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders))


def find(downloads: Mapping[str, Path], threads: int) -> list[Found]:
    """All samples that were downloaded, sorted by uid.

    Args:
        downloads: source name to the folder of its download; the name is empty if there is one source.
        threads: processes.

    Raises:
        ConfigError: if two samples cannot be told apart, or a tar is damaged.
    """
    root = root_of(downloads)
    found: list[Found] = []
    for source, download in downloads.items():
        samples = _with_unique_uids(_find_one(download, threads))
        prefix = f"{source}/" if source else ""
        from_root = {
            file: file if os.path.isabs(file) else os.path.relpath(download / file, root)
            for file in {each.file for each in samples}
        }
        found += [
            replace(each, uid=prefix + each.uid, source=source, file=from_root[each.file])
            for each in samples
        ]
    return sorted(found, key=lambda each: each.uid)


def read_class_names(downloads: Mapping[str, Path]) -> dict[str, ClassNames]:
    """The classes of each source: what numbers in its `.cls` mean."""
    classes = {}
    for source, download in downloads.items():
        file = download / "classes.json"
        classes[source] = json.loads(file.read_text()) if file.is_file() else {}
    return classes


def join_class_names(by_source: Mapping[str, ClassNames]) -> ClassNames:
    """The classes of all sources together: equal names are one class."""
    joined: dict[str, dict[str, None]] = {}
    for class_names in by_source.values():
        for label, names in class_names.items():
            joined.setdefault(label, {}).update(dict.fromkeys(names))
    return {label: list(names) for label, names in joined.items()}


def read_captions(found: Found) -> tuple[list[str], list[str]]:
    """Captions of a sample without the empty ones, and the kind of each.

    Those of the outcome; else the list in its JSON, else its text, else the one of its JSON.
    """
    captions: list[Any]
    if found.captions is not None:
        captions, kinds = found.captions, found.caption_kinds or []
    else:
        about = read_json(found)
        several = about.get("captions")
        kinds = about.get("caption_kinds") or []
        if isinstance(several, list) and several:
            captions = several
        elif (text := read_text(found, "txt")) is not None:
            captions, kinds = [text], []
        else:
            captions, kinds = [about.get("caption")], []
    if not isinstance(kinds, list) or len(kinds) != len(captions):
        kinds = [_CAPTION] * len(captions)
    kept = [
        (caption, sys.intern(clean(str(kind))))
        for text, kind in zip(captions, kinds, strict=True)
        if isinstance(text, str) and (caption := clean_caption(text))
    ]
    return [text for text, _ in kept], [kind for _, kind in kept]


def read_labels(class_names: ClassNames, found: Found) -> dict[str, str]:
    """Label name -> class name of a sample.

    Args:
        class_names: of its source.
        found: the sample.
    """
    if found.labels is not None:
        return dict(json.loads(found.labels))
    about = read_json(found) if class_names else {}
    labels = {
        label: about[label] for label, names in class_names.items() if about.get(label) in names
    }
    number = (read_text(found, "cls") or "").strip()
    names = class_names.get("class", [])
    if number.isdecimal() and len(number) < 10 and int(number) < len(names):
        labels["class"] = names[int(number)]
    return labels


def read_json(found: Found) -> dict[str, Any]:
    """The JSON of a sample; empty if it has none or it is broken: a caption may still stand in .txt."""
    text = read_text(found, "json")
    try:
        about = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def read_text(found: Found, extension: str) -> str | None:
    """A text file of a sample: of the same tar, or beside its image.

    Raises:
        BadImage: if it is larger than a text of a sample can be.
    """
    if found.is_in_tar:
        place = found.members.get(extension)
        return (
            None if place is None else read_range(found.path, *place).decode("utf-8-sig", "replace")
        )
    beside = found.path.with_suffix(f".{extension}")
    if extension not in ("txt", "json") or not beside.is_file():
        return None
    if detail := too_large({extension: (0, beside.stat().st_size)}):
        raise BadImage("too large", detail)
    return beside.read_text("utf-8-sig", "replace")


def _find_one(download: Path, threads: int) -> list[Found]:
    by_file: dict[str, dict[str, Outcome]] = {}
    for outcome in read_outcomes(download / OUTCOMES):
        if outcome.status == "ok":
            by_file.setdefault(outcome.file, {})[outcome.key] = outcome
    tars = [file for file in by_file if _is_tar(download / file)]
    paths = [download / file for file in tars]  # absolute names stay themselves
    found = []
    for file, path, samples in zip(tars, paths, list_tars(paths, threads), strict=True):
        found += [
            _found(by_file[file][key], path, members, is_in_tar=True)
            for key, members in samples
            if key in by_file[file]
        ]
    for file in by_file.keys() - set(tars):
        path = download / file
        members = {path.suffix[1:].lower(): (0, path.stat().st_size)}
        of_file = by_file[file].values()
        found += [_found(outcome, path, members, is_in_tar=False) for outcome in of_file]
    return found


def _is_tar(path: Path) -> bool:
    """By its name; one that says nothing is looked into."""
    suffix = path.suffix[1:].lower()
    return suffix == "tar" or (suffix not in SUFFIXES and tarfile.is_tarfile(path))


def _found(outcome: Outcome, path: Path, members: Members, is_in_tar: bool) -> Found:
    return Found(
        outcome.key if outcome.uid is None else outcome.uid,
        outcome.file,
        path,
        members,
        is_named=outcome.uid is not None,
        is_in_tar=is_in_tar,
        captions=outcome.captions,
        caption_kinds=outcome.caption_kinds,
        labels=outcome.labels,
    )


def _with_unique_uids(found: list[Found]) -> list[Found]:
    """Keys are the uids, unless two tars use the same; then the tar's name goes before them.

    Names that the data gives are kept: of samples that share one, all but the first are rejected.
    """
    clash = _clash(found)
    if clash is None:
        return found
    log.info("keys repeat, e.g. in %s and %s: uids are tar/key", *clash)
    named = [
        each
        if each.is_named
        else replace(each, uid=f"{each.path.name.removesuffix('.tar')}/{each.uid}")
        for each in found
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
        if not each.is_named and file_of.setdefault(each.uid, each.file) != each.file:
            return file_of[each.uid], each.file
    return None
