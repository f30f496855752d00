"""One model on one task of an evaluation folder: `result.json`, in the shape that all results have."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clipgraft.config import local_path
from clipgraft.evalset_tasks import EvalsetTask, task_of
from clipgraft.evaluation.encode import true_float32
from clipgraft.evaluation.evalset.encoder import Encoder
from clipgraft.evaluation.evalset.tasks import Measured, measure
from clipgraft.settings import EvalsetJob

log = logging.getLogger(__name__)


def evaluate_evalset(
    settings: EvalsetJob, folders: Sequence[Path], out: Path, cache: Path, *, threads: int = 1
) -> dict[str, Any]:
    """Measure a model on one data set and write `result.json`.

    Args:
        settings: the evaluation folder and the task.
        folders: the model; several stand side by side.
        out: folder to write.
        cache: where classifiers are kept.
        threads: for decoding, and on a CPU for encoding images.
    Returns:
        Facts for the manifest.
    Raises:
        ConfigError: as `measure`.
    """
    root = local_path(settings.folder)
    encoder = Encoder(folders, cache, threads=threads, scratch=out)
    result = result_of(root, task_of(root, settings.evalset), encoder)
    (out / "result.json").write_text(json.dumps(result) + "\n")
    value, name = result["metrics"]["main_metric"], result["main_metric"]
    return {"num_images": result["size"], "metrics": {} if value is None else {name: value}}


def result_of(root: Path, task: EvalsetTask, encoder: Encoder) -> dict[str, Any]:
    """The result of one task, as it is written."""
    log.info("%s (%s)", task.key, task.name)
    with encoder.for_one_task(), torch.inference_mode(), true_float32():
        found = measure(root, task, encoder)
    notes = found.notes + _too_few(task, found)
    value = found.metrics[task.main_metric] if task.main_metric else None
    for note in notes:
        log.warning("%s: partial data: %s", task.key, note)
    if value is not None:
        log.info("%-28s %6.2f %%", task.main_metric, 100 * value)
    return {
        "task": f"evalset/{task.key}",
        "samples_id": None,
        "retrieval": found.retrieval,
        "zero_shot": found.zero_shot,
        "given": {},
        "probe": {},
        "choices": {},
        "key": task.key,
        "dataset": task.name,
        "metrics": {**found.metrics, "main_metric": value},
        "main_metric": task.main_metric,
        "chance": found.chance,
        "size": found.size,
        "partial": notes,
    }


def _too_few(task: EvalsetTask, found: Measured) -> list[str]:
    """Whether samples are missing, or are too many."""
    if task.size in (None, found.size):
        return []
    return [f"{found.size:,} samples instead of {task.size:,}"]
