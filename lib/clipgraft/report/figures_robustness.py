"""Figure of robustness: what models keep of their accuracy when they see fewer tokens at test time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from clipgraft.report.figures_results import draw_legend
from clipgraft.report.read import Model
from clipgraft.report.style import MUTED, Figure, canvas, draw, hide_unused

_AXES = {"image": "patches", "text": "tokens of a text"}


def plot_robustness(models: Sequence[Model]) -> Figure | None:
    """One panel per task and tower: the leading metric against how many tokens are left; None if nothing was dropped.

    Args:
        models: in pipeline order.
    """
    rows = [
        {
            "task": task,
            "tower": point["tower"],
            "model": model.key,
            "reduction": point["reduction"],
            "num_tokens": point["num_tokens"],
            "metric": metric,
            "value": value,
        }
        for model in models
        for task, result in model.results.items()
        for point in result.get("robustness") or []
        for metric, value in point["metrics"].items()
    ]
    if not rows:
        return None
    panels = list(dict.fromkeys((row["task"], row["tower"]) for row in rows))
    shown = [model for model in models if any(row["model"] == model.key for row in rows)]

    def plot() -> Canvas:
        figure, axes = canvas(3.0 * math.ceil(len(panels) / 2) + 0.4, math.ceil(len(panels) / 2), 2)
        for axis, (task, tower) in zip(hide_unused(axes, len(panels)), panels, strict=True):
            inside = [row for row in rows if (row["task"], row["tower"]) == (task, tower)]
            metric = _lead(inside)
            _draw_curves(axis, shown, [row for row in inside if row["metric"] == metric])
            chance = _chance(next(m.results[task] for m in shown if task in m.results), metric)
            axis.axhline(100 * chance, color=MUTED, linewidth=1, linestyle="--")
            axis.set(
                title=task, xlabel=f"{_AXES[tower]} left", ylabel=f"{metric}, %".replace("_", " ")
            )
            axis.set_ylim(bottom=0)
        draw_legend(figure, shown)
        return figure

    caption = (
        "Tokens are dropped at test time alone, of one side, while the other is whole; rightmost is nothing dropped. Dashed: "
        "chance. Bad: a curve that falls at once, of a model that needs every token it was trained with; or one that "
        "stays flat where tokens that matter are gone, which the task then does not measure."
    )
    return draw("results_robustness", "With fewer tokens", caption, rows, plot)


def _draw_curves(axis: Axes, models: Sequence[Model], rows: Sequence[Mapping[str, Any]]) -> None:
    for model in models:
        own = sorted((r["num_tokens"], 100 * r["value"]) for r in rows if r["model"] == model.key)
        if own:
            x, y = zip(*own, strict=True)
            axis.plot(x, y, marker=model.marker, color=model.colour, linewidth=1.2, markersize=5)


def _lead(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean R@1 where there is retrieval, else the first metric."""
    metrics = [row["metric"] for row in rows]
    return "mean_R@1" if "mean_R@1" in metrics else str(metrics[0])


def _chance(result: Mapping[str, Any], metric: str) -> float:
    if metric == "mean_R@1":
        return float(result["retrieval"]["chance"]["mean_R@1"])
    return float(result["zero_shot"][metric.removesuffix("_acc1")]["chance"])
