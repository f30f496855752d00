"""WebDataset tars as a source: local ones stay where they are, remote ones are copied once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from clipgraft.aside import link
from clipgraft.config import ConfigError
from clipgraft.data.outcomes import Outcome, collect_captions
from clipgraft.data.parallel import parallel_map
from clipgraft.data.remote import copy_all, expand, is_remote
from clipgraft.data.sources.classes import read_classes, write_classes
from clipgraft.data.tars import Members, list_samples, read_range, too_large
from clipgraft.data.utf8 import clean, is_utf8
from clipgraft.sources import TarSource

log = logging.getLogger(__name__)


def download_tars(source: TarSource, out: Path, work: Path, threads: int) -> list[Outcome]:
    """Check that all tars are whole, and read captions and names if the settings say where they are.

    Raises:
        ConfigError: if a tar is missing or not whole.
    """
    names = expand(source.tars)
    remote = [name for name in names if is_remote(name)]
    if source.classes is not None:
        write_classes(read_classes(source.classes), out)
    copies: dict[str, Path] = {}
    if remote:
        copies = dict(zip(remote, copy_all(remote, work, list_samples, ".tar"), strict=True))
    for path in copies.values():
        link(path, out / path.name)
    tasks = [
        (source, out / copies[name].name, copies[name].name)
        if name in copies
        else (source, Path(name), name)
        for name in names
    ]
    # A few tars are read sooner than processes start.
    read = parallel_map(_read_tar, tasks, threads if len(tasks) > 16 else 1)
    outcomes = [each for of_tar in read for each in of_tar]
    log.info("%s tars, all whole", f"{len(names):,}")
    kinds = {kind for each in outcomes for kind in each.caption_kinds or ()}
    for kind, key in (source.captions or {}).items():
        if kind not in kinds and any(each.status == "ok" for each in outcomes):
            log.warning(
                "captions.%s = %r: no sample has such a text. Hint: a key of the .json beside each image, or txt",
                kind,
                key,
            )
    return outcomes


def _read_tar(task: tuple[TarSource, Path, str]) -> list[Outcome]:
    source, path, file = task
    samples: dict[str, Members] = {}
    for key, members in list_samples(path):
        samples.setdefault(key, members)  # `index` tells of those that come again
    return [_read_sample(source, path, file, key, members) for key, members in samples.items()]


def _read_sample(source: TarSource, path: Path, file: str, key: str, members: Members) -> Outcome:
    if not is_utf8(key):
        return Outcome(clean(key), file, "failed", "its name is no UTF-8")
    if source.captions is None and source.uid_key is None:
        return Outcome(key, file, "ok")
    if message := too_large(members):
        return Outcome(key, file, "failed", message)
    about: dict[str, Any] = {}
    if "json" in members:
        try:
            about = json.loads(read_range(path, *members["json"]))
        except (ValueError, RecursionError) as error:
            return Outcome(key, file, "failed", f"its .json cannot be read: {error}")
        if not isinstance(about, dict):
            return Outcome(key, file, "failed", "its .json is no object")
    if "txt" in members and source.captions and "txt" in source.captions.values():
        about["txt"] = read_range(path, *members["txt"]).decode("utf-8", "replace")
    uid = None
    if source.uid_key is not None:
        if about.get(source.uid_key) in (None, ""):
            return Outcome(key, file, "failed", f"its .json has no {source.uid_key!r} (uid_key)")
        uid = clean(str(about[source.uid_key]))
    captions, kinds = (None, None)
    if source.captions is not None:
        try:
            captions, kinds = collect_captions(about, source.captions)
        except ConfigError as error:
            return Outcome(key, file, "failed", f"its .json: {str(error).split('. Hint')[0]}")
    return Outcome(key, file, "ok", "", uid, captions, kinds)
