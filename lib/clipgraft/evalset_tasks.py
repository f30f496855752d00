"""The tasks of an evaluation folder as DataComp's `download_evalsets.py` fills it, and which of them are there.

Only names and files are looked at here, so that a plan can be made without torch. A folder may hold any subset; what it
lacks is named, never averaged away. Beside the 40 tasks of the table it may hold MMVP-VLM, and further data sets in
CLIP_benchmark's layout (`wds_<name>_test`), which are measured but are part of no average.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipgraft.config import ConfigError
from clipgraft.spelling import hint

# key | name | samples | classes | main metric, as in DataComp's tasklist.yml (arXiv:2304.14108, appendix N).
_TABLE = """
vtab/caltech101 | Caltech-101 | 6085 | 102 | mean_per_class_recall
cifar10 | CIFAR-10 | 10000 | 10 | acc1
vtab/cifar100 | CIFAR-100 | 10000 | 100 | acc1
vtab/clevr_count_all | CLEVR Counts | 15000 | 8 | acc1
vtab/clevr_closest_object_distance | CLEVR Distance | 15000 | 6 | acc1
country211 | Country211 | 21100 | 211 | acc1
vtab/dtd | Describable Textures | 1880 | 47 | acc1
vtab/eurosat | EuroSAT | 5400 | 10 | acc1
fgvc_aircraft | FGVC Aircraft | 3333 | 100 | mean_per_class_recall
food101 | Food-101 | 25250 | 101 | acc1
gtsrb | GTSRB | 12630 | 43 | acc1
imagenet1k | ImageNet 1k | 50000 | 1000 | acc1
imagenet_sketch | ImageNet Sketch | 50889 | 1000 | acc1
imagenetv2 | ImageNet v2 | 10000 | 1000 | acc1
imagenet-a | ImageNet-A | 7500 | 200 | acc1
imagenet-o | ImageNet-O | 2000 | 200 | acc1
imagenet-r | ImageNet-R | 30000 | 200 | acc1
vtab/kitti_closest_vehicle_distance | KITTI Vehicle Distance | 711 | 4 | acc1
mnist | MNIST | 10000 | 10 | acc1
objectnet | ObjectNet | 18574 | 113 | acc1
vtab/flowers | Oxford Flowers-102 | 6149 | 102 | mean_per_class_recall
vtab/pets | Oxford-IIIT Pet | 3669 | 37 | mean_per_class_recall
voc2007 | Pascal VOC 2007 | 14976 | 20 | acc1
vtab/pcam | PatchCamelyon | 32768 | 2 | acc1
renderedsst2 | Rendered SST2 | 1821 | 2 | acc1
vtab/resisc45 | RESISC45 | 6300 | 45 | acc1
cars | Stanford Cars | 8041 | 196 | acc1
stl10 | STL-10 | 8000 | 10 | acc1
sun397 | SUN397 | 108754 | 397 | acc1
vtab/svhn | SVHN | 26032 | 10 | acc1
retrieval/flickr_1k_test_image_text_retrieval | Flickr | 1000 | - | mean_recall@1
retrieval/mscoco_2014_5k_test_image_text_retrieval | MSCOCO | 5000 | - | mean_recall@1
misc/winogavil | WinoGAViL | 3563 | - | jaccard_score_10-12
wilds/iwildcam | iWildCam | 42791 | 182 | F1-macro_all
wilds/camelyon17 | Camelyon17 | 85054 | 2 | acc1
wilds/fmow | FMoW | 22108 | 62 | acc_worst_region
fairness/dollar_street | Dollar Street | 3503 | 58 | acc_top5_wg
fairness/geode | GeoDE | 12488 | 40 | acc_wg
fairness/fairface | FairFace | 10954 | - | -
fairness/utkface | UTKFace | 23703 | - | -
"""
WINOGAVIL, MMVP = "misc/winogavil", "mmvp_vlm"
FACES = ("fairness/fairface", "fairness/utkface")


@dataclass(frozen=True)
class EvalsetTask:
    """One data set of an evaluation folder.

    Attributes:
        key: as in `eval_results.jsonl`.
        name: for people.
        size: how many samples it has when it is whole; None where that is not known.
        num_classes: likewise; None also where there are no classes.
        main_metric: the one that stands for it; None: it has several, and none.
        is_averaged: whether it is one of the 38.
    """

    key: str
    name: str
    size: int | None
    num_classes: int | None
    main_metric: str | None
    is_averaged: bool


def _read_table() -> dict[str, EvalsetTask]:
    tasks = {}
    for line in _TABLE.strip().splitlines():
        key, name, size, classes, metric = (
            None if cell == "-" else cell for cell in line.split(" | ")
        )
        assert key and name and size
        count = int(classes) if classes else None
        tasks[key] = EvalsetTask(key, name, int(size), count, metric, metric is not None)
    tasks[MMVP] = EvalsetTask(MMVP, "MMVP-VLM", 270, None, "pair_accuracy", False)
    return tasks


TASKS = _read_table()
AVERAGED = [task for task in TASKS.values() if task.is_averaged]
# DataComp's groups by the names of their tasks (aggregate_scores.py).
AGGREGATES = {
    "ImageNet": ["imagenet1k"],
    "ImageNet dist. shifts": [
        "imagenet_sketch",
        "imagenetv2",
        "imagenet-a",
        "imagenet-o",
        "imagenet-r",
        "objectnet",
    ],
    "VTAB": [key for key in TASKS if key.startswith("vtab/")] + ["sun397"],
    "Retrieval": [
        "retrieval/flickr_1k_test_image_text_retrieval",
        "retrieval/mscoco_2014_5k_test_image_text_retrieval",
        WINOGAVIL,
    ],
    "Average": [task.key for task in AVERAGED],
}


def chosen(root: Path, names: Sequence[str] | None = None) -> list[EvalsetTask]:
    """The tasks whose data are in a folder, in the order of the table; whether they can be read is its own matter.

    Args:
        root: the folder.
        names: keys of those that are wanted; None: all that are there.

    Raises:
        ConfigError: if there is no such folder, it holds no task, a name is unknown, or the data of a named task are
            missing.
    """
    if not root.is_dir():
        raise ConfigError(
            f"evaluation folder {root} does not exist. Hint: {Path().resolve()} is here"
        )
    known = TASKS | {task.key: task for task in _further(root)}
    wanted = known if names is None else names
    there = [task for task in known.values() if task.key in wanted and is_there(root, task)]
    absent = [name for name in names or () if name not in {task.key for task in there}]
    if there and not absent:
        return there
    every = [task.key for task in known.values() if is_there(root, task)]
    if not every:
        raise ConfigError(
            f"{root} is no evaluation folder: it has neither wds_<task>_test/test/nshards.txt nor hf_cache nor MMVP_VLM. "
            "Hint: the folder that DataComp's download_evalsets.py has filled"
        )
    if absent[0] not in known:
        raise ConfigError(f"unknown evaluation task {absent[0]!r}{hint(absent[0], known)}")
    raise ConfigError(
        f"evaluation task {absent[0]}: its data are not in {root}. Hint: {_expected(absent[0])}; "
        f"there are {', '.join(every)}"
    )


def missing(keys: Sequence[str]) -> list[str]:
    """Names of the tasks of the average that are not among some keys."""
    return [task.name for task in AVERAGED if task.key not in keys]


def task_of(root: Path, key: str) -> EvalsetTask:
    """A task by its key."""
    return (TASKS | {task.key: task for task in _further(root)})[key]


def is_there(root: Path, task: EvalsetTask) -> bool:
    """Whether a folder holds data of a task."""
    return (
        tars_of(root, task.key) is not None
        or bool(_hub_copies(root, task.key))
        or (task.key == MMVP and mmvp_folder(root).is_dir())
    )


def data_folder(root: Path, key: str) -> Path:
    """The folder with the data of a task that is there; of several copies the one that holds them."""
    copies = _hub_copies(root, key)
    in_cache = Path(os.path.commonpath(copies)) if copies else None
    return tars_of(root, key) or in_cache or mmvp_folder(root)


def tars_of(root: Path, key: str) -> Path | None:
    """The folder of a data set in tars: `wds_vtab-dtd_test`, without the prefix `fairness` and, if it must be, others.

    A retrieval set may lie there as CLIP_benchmark writes it, instead of in Hugging Face's cache.
    """
    names = [key.removeprefix("fairness/").replace("/", "-"), key.rpartition("/")[2]]
    for name in dict.fromkeys(names):
        for folder in (root / f"wds_{name}_test", root / f"wds_{name}"):
            if (folder / "test" / "nshards.txt").is_file():
                return folder
    return None


def the_tars(root: Path, key: str) -> Path | None:
    """The same folder, to read it.

    Raises:
        ConfigError: if the data set is there twice, with `_test` in its name and without.
    """
    folder = tars_of(root, key)
    if folder is None:
        return None
    other = folder.with_name(folder.name.removesuffix("_test"))
    if other != folder and (other / "test" / "nshards.txt").is_file():
        raise ConfigError(f"{key} is in 2 folders: {folder}, {other}. Hint: keep one")
    return folder


def mmvp_folder(root: Path) -> Path:
    """Where the data set MMVP/MMVP_VLM lies."""
    return root / "MMVP_VLM"


def hub_files(root: Path, key: str) -> list[Path]:
    """Arrow or parquet files of the split `test` of a data set in Hugging Face's cache; none if it is not there.

    Raises:
        ConfigError: if there are several copies.
    """
    copies = _hub_copies(root, key)
    if len(copies) > 1:
        folders = ", ".join(sorted(map(str, copies)))
        name = key.partition("/")[2]
        raise ConfigError(f"{name} is in {len(copies)} folders: {folders}. Hint: keep one")
    return sorted(*copies.values()) if copies else []


def _hub_copies(root: Path, key: str) -> dict[Path, list[Path]]:
    """Those files by their folders; more than one where the cache has several versions."""
    if not key.startswith(("retrieval/", "misc/")):
        return {}
    name = key.partition("/")[2]
    for suffix in ("arrow", "parquet"):
        copies: dict[Path, list[Path]] = {}
        for path in _cached_files(root / "hf_cache", suffix):
            if name in str(path.relative_to(root)).lower():
                copies.setdefault(path.parent, []).append(path)
        if copies:
            return copies
    return {}


_TEST = re.compile(r"(^|[-_.])test(-\d+-of-\d+)?(-[0-9a-f]{8,})?\.(arrow|parquet)$")


def _cached_files(folder: Path, suffix: str) -> list[Path]:
    """Files of the split `test`; what was downloaded to make them is left aside, and so is what `map` has cached."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "downloads"]
        for name in names:
            is_split = _TEST.search(name) or Path(place).name == "test"
            if name.endswith(f".{suffix}") and is_split and not name.startswith("cache-"):
                found.append(Path(place) / name)
    return found


def _further(root: Path) -> list[EvalsetTask]:
    """Data sets in tars that the table does not know; those of an unknown type have no main metric, nor any other."""
    taken = {tars_of(root, key) for key in TASKS}
    tasks = []
    for marker in sorted(root.glob("wds_*/test/nshards.txt")):
        folder = marker.parent.parent
        key = folder.name.removeprefix("wds_").removesuffix("_test")
        if folder not in taken and folder == tars_of(root, key):  # not the second of two copies
            tasks.append(EvalsetTask(key, key, None, None, _MAIN.get(_said_type(folder)), False))
    return tasks


_TYPE = "dataset_type.txt"
_MAIN: Mapping[str, str] = {
    "classification": "acc1",
    "retrieval": "mean_recall@1",
    "multilabel": "mean_average_precision",
}


def type_of(folder: Path) -> str:
    """What a data set in tars is for, by `dataset_type.txt`.

    Raises:
        ConfigError: if it is none of the three that there are.
    """
    kind = _said_type(folder)
    if kind not in _MAIN:
        raise ConfigError(
            f"{folder / _TYPE}: {kind!r} is none of {', '.join(_MAIN)}{hint(kind, _MAIN)}"
        )
    return kind


def _said_type(folder: Path) -> str:
    path = folder / _TYPE
    if not path.is_file():
        return "classification"
    return path.read_text(errors="replace").strip().lower()


def _expected(key: str) -> str:
    """Where the data of a task would be."""
    if key == MMVP:
        return "MMVP_VLM/Questions.csv"
    if key.startswith(("retrieval/", "misc/")):
        return f"hf_cache/...{key.partition('/')[2]}...test.arrow"
    return f"wds_{key.removeprefix('fairness/').replace('/', '-')}_test/test/nshards.txt"
