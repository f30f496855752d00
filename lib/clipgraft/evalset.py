"""A model on an evaluation folder, by hand: `python -m clipgraft.evalset RUN|MODEL_FOLDER DIR`.

    python -m clipgraft.evalset demo evalsets                  the final model of the run `demo`
    python -m clipgraft.evalset demo evalsets --model base     another of its models
    python -m clipgraft.evalset path/to/model evalsets --tasks imagenet1k vtab/dtd

Writes `eval_results.jsonl` (the public schema), `aggregate.json` and a result per task. What is done is not done again
unless the model, its data or the code have changed; a task that fails is told in the table, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from clipgraft import log as logging_setup
from clipgraft.aside import write_json
from clipgraft.compare import LOCK
from clipgraft.config import ConfigError, local_path
from clipgraft.evalset_tasks import EvalsetTask, chosen, data_folder
from clipgraft.explore.finished import FinishedRun
from clipgraft.local_files import listing
from clipgraft.startup import all_is_written, collect_seldom, without_pandas

log = logging.getLogger(__name__)

RESULTS = Path("results")


def evaluate_folder(
    folders: Sequence[Path], root: Path, out: Path, *, names: Sequence[str] | None, threads: int
) -> dict[str, dict[str, Any]]:
    """Measure a model on all tasks of an evaluation folder.

    Args:
        folders: the model; several stand side by side.
        root: the evaluation folder.
        out: folder to write; what is there already and still right is kept.
        names: keys of the tasks; None: all that are there.
        threads: for decoding, and on a CPU for encoding images.
    Returns:
        Results by key, those from before among them; those of tasks that failed say why under `failed`.
    Raises:
        ConfigError: if there is no such model, folder or task.
    """
    from clipgraft.evaluation.evalset.aggregate import aggregate, results_lines
    from clipgraft.evaluation.evalset.encoder import Encoder

    listing.cache_clear()
    tasks, wanted = chosen(root), chosen(root, names)
    encoder = Encoder(folders, out / ".classifiers", threads=threads, scratch=out)
    (out / "tasks").mkdir(parents=True, exist_ok=True)
    found = {task.key: _from_before(root, task, encoder, out) for task in tasks}
    for task in wanted:
        if found[task.key] is None:
            found[task.key] = _result(root, task, encoder, out)
        else:
            log.info("%s: done before", task.key)
        results = {key: about for key, about in found.items() if about is not None}
        (out / "eval_results.jsonl").write_text(results_lines(results))
        write_json(out / "aggregate.json", aggregate(results))
    return results


def _from_before(root: Path, task: EvalsetTask, encoder: Any, out: Path) -> dict[str, Any] | None:
    """A result that is there, if it still holds."""
    path = _result_file(out, task)
    if not path.is_file():
        return None
    before = json.loads(path.read_text())
    # Data that cannot be read may be of a task that nobody asks for; else it is said when it is measured.
    with suppress(ConfigError):
        if before["made_of"] == _made_of(root, task, encoder):
            return dict(before["result"])
    return None


def _result(root: Path, task: EvalsetTask, encoder: Any, out: Path) -> dict[str, Any]:
    """A new result, or why there is none."""
    from clipgraft.evaluation.evalset.evaluate import result_of
    from clipgraft.evaluation.failure import MENDABLE, reason_of

    try:
        result = result_of(root, task, encoder)
        about = {"made_of": _made_of(root, task, encoder), "result": result}
    except MENDABLE as error:
        name = f"evalset/{task.key}"
        return {"task": name, "failed": reason_of(name, error)}
    write_json(_result_file(out, task), about)
    return result


def _made_of(root: Path, task: EvalsetTask, encoder: Any) -> list[Any]:
    """What a result depends on."""
    return [encoder.identity, listing(str(data_folder(root, task.key)))]


def _result_file(out: Path, task: EvalsetTask) -> Path:
    return out / "tasks" / f"{task.key.replace('/', '-')}.json"


def table(results: dict[str, dict[str, Any]]) -> str:
    """The main metrics in per cent, one line per task, and the averages."""
    from clipgraft.evaluation.evalset.aggregate import aggregate, summary

    lines = [["task", "images", "metric", "%", "chance", ""]]
    for key, about in results.items():
        if "failed" in about:
            lines.append([key, "", "", "-", "", f"failed: {about['failed']}"])
            continue
        value, chance = about["metrics"]["main_metric"], about["chance"]
        notes = "; ".join(f"partial: {note}" for note in about["partial"])
        name = about["main_metric"] or "no summary metric"
        lines.append([key, f"{about['size']:,}", name, _percent(value), _percent(chance), notes])
    total = aggregate(results)
    for name, present in total["present"].items():
        if name in total["mean_of_present"]:
            mean = total["mean_of_present"][name]
            note = "" if total[name] is not None else f"not the whole: {present}"
            lines.append([name, "", "mean", _percent(mean), "", note])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = (
        f"{key:<{widths[0]}}  {size:>{widths[1]}}  {name:<{widths[2]}}  {value:>5}  {chance:>6}  {note}".rstrip()
        for key, size, name, value, chance, note in lines
    )
    return "\n".join([*texts, summary(total)])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def model_folders(name: str, model: str | None, results: Path = RESULTS) -> list[Path]:
    """A model folder as it is, or those of a model of a run: one, of an ensemble several.

    Args:
        name: path of a model folder, or name of a run.
        model: of a run, as its report calls it: base, expert_1, upcycled, moe or a baseline; None: the last one.
        results: where runs are.

    Raises:
        ConfigError: if there is neither, or the run has no such model.
    """
    if (local_path(name) / "model.json").is_file():
        if model is not None:
            raise ConfigError(
                f"--model {model}: {name} is a model folder, not a run. Hint: leave it out"
            )
        return [local_path(name)]
    lock = results / "runs" / name / LOCK
    if not lock.is_file():
        raise ConfigError(
            f"{name} is neither a model folder (no model.json) nor a finished run ({lock} does not exist)"
        )
    run = FinishedRun.open(name, results)
    return run.model_folders(model or list(run.models)[-1])


def main() -> None:
    """Command line; leaves with 1 if a task failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN|MODEL_FOLDER")
    parser.add_argument("folder", metavar="DIR", help="evaluation folder")
    parser.add_argument(
        "--model", dest="which", help="of a run: base, expert_1, ensemble, moe (default: the last)"
    )
    parser.add_argument("--tasks", nargs="+", help="keys of tasks (default: all that are there)")
    parser.add_argument("--out", type=Path, help="default: results/evalset/<model>")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    logging_setup.set_up("evalset", None)
    try:
        folders = model_folders(given.model, given.which)
        out = given.out or RESULTS / "evalset" / _name(given.model, given.which)
        results = evaluate_folder(
            folders, local_path(given.folder), out, names=given.tasks, threads=given.threads
        )
    except ConfigError as error:
        sys.exit(f"evalset: {error}")
    print(table(results))
    print(f"wrote {out}")
    if any("failed" in about for about in results.values()):
        sys.exit(1)
    all_is_written()
    sys.exit(0)


def _name(model: str, which: str | None) -> str:
    """A folder of its own for each model: of its path all that can stand in a name."""
    words = re.sub(r"[^A-Za-z0-9_]+", "-", model).strip("-")
    return words if which is None else f"{words}-{which}"


if __name__ == "__main__":
    collect_seldom()
    without_pandas()
    main()
