"""Results of many tasks together: lines in the public schema, and DataComp's averages with what they lack."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from clipgraft.evalset_tasks import AGGREGATES, TASKS, missing

Results = Mapping[str, Mapping[str, Any]]


def results_lines(results: Results) -> str:
    """`eval_results.jsonl`: one line per task, as DataComp writes and reads it; failed tasks have none.

    Its script averages all that have a main metric, so tasks that are not among the 38 have none here.

    Args:
        results: by key of the task.
    """
    lines = []
    for key, about in results.items():
        if "metrics" in about:
            hidden = {} if _is_averaged(key) else {"main_metric": None}
            line = {"key": key, "dataset": about["dataset"], "metrics": about["metrics"] | hidden}
            lines.append(f"{json.dumps(line)}\n")
    return "".join(lines)


def aggregate(results: Results) -> dict[str, Any]:
    """Means of the main metrics.

    DataComp's averages are given only where all of their tasks are there and whole, so that the same name always means
    the same; what there is of the others stands under `mean_of_present`, beside how many those are.

    Args:
        results: by key of the task; one that failed has `failed` instead of metrics.
    """
    values = {
        key: float(about["metrics"]["main_metric"])
        for key, about in results.items()
        if "metrics" in about and about["metrics"]["main_metric"] is not None
    }
    partial = {key: about["partial"] for key, about in results.items() if about.get("partial")}
    whole: dict[str, float | None] = {}
    present: dict[str, str] = {}
    means: dict[str, float] = {}
    for name, keys in AGGREGATES.items():
        own = [values[key] for key in keys if key in values]
        present[name] = f"{len(own)}/{len(keys)}"
        is_whole = len(own) == len(keys) and not partial.keys() & set(keys)
        whole[name] = sum(own) / len(own) if is_whole else None
        means |= {name: sum(own) / len(own)} if own else {}
    return {
        **whole,
        "present": present,
        "mean_of_present": means,
        "missing": missing(list(results)),
        "partial": partial,
        "failed": {key: about["failed"] for key, about in results.items() if "failed" in about},
        "not_averaged": {key: value for key, value in values.items() if not _is_averaged(key)},
    }


def _is_averaged(key: str) -> bool:
    """Whether a task is one of the 38."""
    return key in TASKS and TASKS[key].is_averaged


def summary(total: Mapping[str, Any], *, with_names: bool = True) -> str:
    """One line: how many of the 38 there are, and which are missing.

    Args:
        total: of `aggregate`.
        with_names: of those that are missing; else how many they are.
    """
    names = total["missing"]
    parts = [f"{total['present']['Average']} averaged tasks"]
    parts += [f"{len(total['partial'])} with partial data"] if total["partial"] else []
    parts += [f"failed: {', '.join(total['failed'])}"] if total["failed"] else []
    if names:
        parts.append(f"missing: {', '.join(names)}" if with_names else f"{len(names)} missing")
    return "; ".join(parts)
