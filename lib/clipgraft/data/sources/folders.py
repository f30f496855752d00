"""Folders of images as sources: captions beside the images, or a folder per class."""

from __future__ import annotations

from pathlib import Path

from clipgraft.config import ConfigError, local_path
from clipgraft.data.images import SUFFIXES
from clipgraft.data.outcomes import Outcome
from clipgraft.data.sources.classes import class_label, write_classes
from clipgraft.data.utf8 import clean, is_utf8
from clipgraft.local_files import files_below
from clipgraft.sources import ClassFolderSource, FolderSource
from clipgraft.spelling import hint


def local_folder(name: str) -> Path:
    """The folder of a setting, absolute.

    Raises:
        ConfigError: if it does not exist.
    """
    folder = local_path(name).absolute()
    if not folder.is_dir():
        raise ConfigError(f"folder {folder} does not exist")
    return folder


def read_folder(source: FolderSource) -> list[Outcome]:
    """Find the images of a folder and its subfolders, and whether each has a caption beside it."""
    folder = local_folder(source.folder)
    outcomes, keys = [], set()
    for path in _images(folder):
        key = path.relative_to(folder).with_suffix("").as_posix()
        message = ""
        if not is_utf8(str(path)):
            outcomes.append(_unnamable(key))
            continue
        if not any(path.with_suffix(suffix).is_file() for suffix in (".txt", ".json")):
            message = "no caption: there is no .txt or .json of the same name"
        elif key in keys:
            message = "another image has the same name, and so the same caption file"
        keys.add(key)
        outcomes.append(Outcome(key, str(path), "failed" if message else "ok", message))
    return outcomes


def read_class_folder(source: ClassFolderSource, out: Path) -> list[Outcome]:
    """Find the images of a folder per class; labels and captions come from the folder's name."""
    folder = local_folder(source.folder)
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    for name in source.class_names.keys() - set(folders):
        raise ConfigError(f"class_names: {folder} has no folder {name!r}{hint(name, folders)}")
    outcomes: list[Outcome] = []
    classes: dict[str, None] = {}
    for path in _images(folder):
        parts = path.relative_to(folder).parts
        key = "/".join(parts)  # with its suffix: 1.jpg and 1.png are two samples
        if not is_utf8(str(path)):
            outcomes.append(_unnamable(key))
            continue
        if len(parts) == 1:
            outcomes.append(Outcome(key, str(path), "failed", "it is in no folder of a class"))
            continue
        name = source.class_names.get(parts[0], parts[0].replace("_", " "))
        classes[name] = None
        captions = [template.replace("{c}", name) for template in source.templates]
        kinds = ["caption"] * len(captions)
        outcomes.append(Outcome(key, str(path), "ok", "", None, captions, kinds, class_label(name)))
    if not classes:
        raise ConfigError(f"folder {folder} has no folders with images. Hint: one folder per class")
    write_classes(list(classes), out)
    return outcomes


def _unnamable(key: str) -> Outcome:
    return Outcome(clean(key), "", "failed", "the name of the file or of its folder is no UTF-8")


def _images(folder: Path) -> list[Path]:
    paths = [path for path in files_below(folder) if path.suffix[1:].lower() in SUFFIXES]
    if not paths:
        raise ConfigError(
            f"folder {folder} holds no images. Hint: image files are {', '.join(SUFFIXES)}"
        )
    return paths
