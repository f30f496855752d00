"""Images in a folder and their captions in one JSON file: COCO, Karpathy's splits, ShareGPT4V."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from clipgraft.config import ConfigError
from clipgraft.data.outcomes import Outcome, texts_of
from clipgraft.data.sources.folders import local_folder
from clipgraft.data.utf8 import clean, is_utf8
from clipgraft.local_files import local_files
from clipgraft.sources import CocoSource, ShareGpt4vSource

log = logging.getLogger(__name__)

# An image's name in its folder, its captions and the kind of each.
Annotated = tuple[str | None, list[str], list[str]]

_SENTENCE = re.compile(r"(?s)(.+?[.!?][\"')\]]*)(?=\s+[\"'(\[]?[A-Z0-9]|\s*$)")


def read_coco(source: CocoSource) -> list[Outcome]:
    """Images of COCO's caption JSON, or of those splits of Karpathy's that are asked for."""
    path, content = _read_json(source.annotations)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise ConfigError(
            f"{path} has no list `images`. Hint: give COCO's captions_*.json or Karpathy's "
            "dataset_*.json"
        )
    folder = local_folder(source.images)
    if "annotations" in content:
        if source.split is not None:
            raise ConfigError(
                f"split = {source.split}: {path} is COCO's own JSON, which has no splits. Hint: "
                "leave split out, or give Karpathy's dataset_coco.json"
            )
        found = _coco(path, content)
    else:
        found = _karpathy(path, images, source.split, folder)
    try:
        return _find_images(found, folder, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} has an entry that is not as COCO's and Karpathy's are: {error!r}. Hint: download "
            "it again"
        ) from None


def read_sharegpt4v(source: ShareGpt4vSource) -> list[Outcome]:
    """Images of ShareGPT4V; the first answer is the caption `long`, its first sentence `short`."""
    path, content = _read_json(source.annotations)
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{path} is no list of conversations. Hint: give ShareGPT4V's JSON")
    return _find_images(map(_conversation, content), local_folder(source.images), path)


def first_sentence(text: str) -> str:
    """Up to the first full stop that something new begins after."""
    found = _SENTENCE.match(text.strip())
    return found[1] if found else text.strip()


def _coco(path: Path, content: dict[str, Any]) -> Iterator[Annotated]:
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        if "caption" not in annotation:
            raise ConfigError(
                f"{path} has annotations without `caption`. Hint: give captions_*.json, not "
                "instances_*.json"
            )
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    known = {image["id"] for image in content["images"]}
    if lost := captions.keys() - known:
        log.warning(
            "%s: %s captions are of %s images that it does not list, e.g. id %s",
            path,
            f"{sum(len(captions[each]) for each in lost):,}",
            f"{len(lost):,}",
            next(iter(lost)),
        )
    for image in content["images"]:
        texts = captions.get(image["id"], [])
        yield image.get("file_name"), texts, ["caption"] * len(texts)


def _karpathy(
    path: Path, images: list[dict[str, Any]], splits: list[str] | None, folder: Path
) -> Iterator[Annotated]:
    there = Counter(image.get("split", "") for image in images)
    if unknown := [split for split in splits or [] if split not in there]:
        listed = ", ".join(f"{name} ({count:,})" for name, count in there.items())
        raise ConfigError(f"split: {path} has no split {unknown[0]!r}. Hint: it has {listed}")
    for image in images:
        if splits is not None and image.get("split", "") not in splits:
            continue
        name = image.get("filename")
        within = f"{image.get('filepath', '')}/{name}".lstrip("/")
        if name is not None and _is_file(folder / within):
            name = within
        texts = [sentence["raw"] for sentence in image.get("sentences", [])]
        yield name, texts, ["caption"] * len(texts)


def _conversation(entry: Any) -> Annotated:
    if not isinstance(entry, dict):
        return None, [], []
    turns = entry.get("conversations")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    answer = next((turn.get("value") for turn in turns if turn.get("from") == "gpt"), None)
    if not isinstance(answer, str) or not answer.strip():
        return entry.get("image"), [], []
    return entry.get("image"), [answer, first_sentence(answer)], ["long", "short"]


def _find_images(found: Iterable[Annotated], folder: Path, json_file: Path) -> list[Outcome]:
    """One outcome per image; captions of one that is named again are put together."""
    outcomes: dict[str, Outcome] = {}
    for number, (name, captions, kinds) in enumerate(found):
        if not isinstance(name, str) or not name:
            key = f"entry {number}"
            outcomes[key] = Outcome(key, "", "failed", "the entry names no image")
            continue
        texts = zip(captions, kinds, strict=True)
        pairs = [(text, kind) for cell, kind in texts for text in texts_of(cell, "caption")]
        captions, kinds = [text for text, _ in pairs], [kind for _, kind in pairs]
        pure, name = PurePosixPath(name), clean(name)
        known = outcomes.get(name)
        if known is not None and known.status == "ok":
            captions = [*(known.captions or []), *captions]
            kinds = [*(known.caption_kinds or []), *kinds]
        message = ""
        if pure.is_absolute() or ".." in pure.parts:
            message = "its name leads out of the folder of images"
        elif not is_utf8(str(pure)) or not _is_file(folder / pure):
            message = "there is no such file in the folder of images"
        status, file = ("failed", "") if message else ("ok", str(folder / pure))
        outcomes[name] = Outcome(name, file, status, message, None, captions, kinds)
    if not any(each.status == "ok" for each in outcomes.values()):
        first = next(iter(outcomes.values()), None)
        example = f", e.g. {first.key}: {first.message}" if first else ""
        raise ConfigError(
            f"no image that {json_file} names is in {folder}{example}. Hint: `images` is the folder "
            "that the names in the JSON start from"
        )
    return list(outcomes.values())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, for one
        return False


def _read_json(name: str) -> tuple[Path, Any]:
    path = local_files(name)[0]
    try:
        return path, json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}. Hint: download it again") from None
