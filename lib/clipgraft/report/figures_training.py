"""Figures of training: curves against samples and against time, and the parts of the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from clipgraft.report.style import (
    BLUE,
    LEGEND_LINE,
    MUTED,
    ORANGE,
    TINT,
    Figure,
    canvas,
    counts_on,
    draw,
    hide_unused,
)

Rows = Sequence[Mapping[str, Any]]
Span = tuple[float, float]
# What every row of metrics has; the rest are parts of the loss and what belongs to them.
COMMON = {
    "phase", "step", "samples_seen", "seconds", "hours", "lr", "tau", "samples_per_second",
    "tokens_per_second", "data_wait", "loss",
}  # fmt: skip


def plot_pretraining(
    rows: Rows, phases: Mapping[str, Mapping[str, Span]], candidates: Mapping[str, int]
) -> Figure:
    """Loss, tau, learning rate and speed over all phases.

    Args:
        rows: of metrics, with `phase`, and with `samples_seen` and `hours` counted from the first phase on.
        phases: name to `samples_seen` and `hours` at its start and end.
        candidates: phase to its global batch size, of those whose loss is the log of it where a model guesses.
    """
    panels = [
        ("loss", "samples_seen", "loss"),
        ("loss", "hours", "loss"),
        ("tau", "samples_seen", "tau = 1/exp(logit_scale)"),
        ("lr", "samples_seen", "learning rate"),
        ("samples_per_second", "samples_seen", "samples per second"),
        ("tokens_per_second", "samples_seen", "tokens per second"),
    ]
    guessing = {phase: math.log(number) for phase, number in candidates.items()}
    losses = [row["loss"] for row in rows]

    def plot() -> Canvas:
        figure, axes = canvas(5.0, 2, 3)
        factor, unit = clock(max(row["hours"] for row in rows))
        for axis, (name, against, title) in zip(axes.flat, panels, strict=True):
            scale = factor if against == "hours" else 1.0
            _phases(axis, phases, against, scale, has_names=name == "loss")
            for phase in phases:
                mine = [row for row in rows if row["phase"] == phase]
                x, y = [scale * row[against] for row in mine], [row[name] for row in mine]
                axis.plot(x, y, color=BLUE, marker="o" if len(mine) < 3 else None, markersize=3)
            axis.set_title(title)
            axis.set_xlabel(unit if against == "hours" else "samples seen")
            if against == "samples_seen":
                counts_on(axis.xaxis)
            if name == "loss":
                for phase, level in guessing.items():
                    span = [scale * place for place in phases[phase][against]]
                    axis.plot(span, [level, level], color=ORANGE, linewidth=1, linestyle="--")
                low, high = min(0, 1.1 * min(losses)), max(*guessing.values(), *losses, 0)
                axis.set_ylim(low, high + 0.12 * (high - low))  # room for the names of phases
            elif name.endswith("_per_second"):
                axis.set_ylim(0, 1.12 * max(row[name] for row in rows))
                counts_on(axis.yaxis)
        return figure

    wait = float(np.mean([row.get("data_wait", 0.0) for row in rows]))
    levels = ", ".join(
        f"ln {number:,} = {guessing[phase]:.2f} in {phase}" for phase, number in candidates.items()
    )
    caption = f"Dashed is the loss of guessing: {levels}. " if levels else ""
    caption += (
        "A jump where a phase begins is normal and should be gone soon. Against time, a phase of short sequences should "
        "be steeper than one of full length. tau should fall and settle. Tokens are those of the image and of the text "
        f"together. Bad: a loss that stays {'at its line' if levels else 'where it began'} or jumps up within a phase; tau "
        "at 0.01, where it is held; tokens per second that fall with short sequences (the device waits for something "
        f"else); waiting for data more than a few per cent of the time ({100 * wait:.0f} % here)."
    )
    title = "Loss, temperature, learning rate, speed"
    return draw("pretraining_curves", title, caption, rows, plot)


def plot_loss_parts(rows: Rows, phases: Mapping[str, Mapping[str, Span]]) -> Figure | None:
    """What losses are made of, and what they watch, phase by phase; None if the loss is all.

    Args:
        rows: of metrics, as for `plot_pretraining`; each phase has its own parts.
        phases: as for `plot_pretraining`.
    """
    parts = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if name not in COMMON
        and any(row.get(name, row["loss"]) != row["loss"] for row in rows)
        and all(isinstance(row.get(name, 0), int | float) for row in rows)
    ]
    table = [
        {key: row.get(key, "") for key in ("phase", "samples_seen", "hours", "loss", *parts)}
        for row in rows
    ]
    if not parts:
        return None

    def plot() -> Canvas:
        columns = min(3, len(parts))
        lines = math.ceil(len(parts) / columns)
        figure, axes = canvas(2.2 * lines, lines, columns)
        for axis, name in zip(hide_unused(axes, len(parts)), parts, strict=True):
            _phases(axis, phases, "samples_seen", 1.0, has_names=name == parts[0])
            for phase in phases:
                mine = [row for row in rows if row["phase"] == phase and name in row]
                x, y = [row["samples_seen"] for row in mine], [row[name] for row in mine]
                axis.plot(x, y, color=BLUE, marker="o" if len(mine) < 3 else None, markersize=3)
            axis.set_title(name.replace("_", " "))
            axis.set_xlabel("samples seen")
            counts_on(axis.xaxis)
        return figure

    caption = (
        "What the losses of the phases add up, and what they keep an eye on; losses that differ cannot be compared by "
        "their sums, but infonce, where it stands here, is the same for all. Bad: a part that rises while the loss falls "
        "(it is being traded away), or one that stays where it began."
    )
    return draw("pretraining_parts", "Parts of the loss", caption, table, plot)


def plot_expert_losses(
    series: Mapping[str, Rows], titles: Mapping[str, str], colours: Mapping[str, str]
) -> Figure:
    """Loss of each expert and baseline against samples seen in its own fine-tuning, and against its time.

    Args:
        series: model key to its metrics.
        titles: model key to its name for people.
        colours: model key to its colour.
    """
    rows = [
        {
            "model": key,
            "samples_seen": row["samples_seen"],
            "hours": row["seconds"] / 3600,
            "loss": row["loss"],
        }
        for key, metrics in series.items()
        for row in metrics
    ]
    dashed = [key for key in series if not key.startswith("expert_")]
    caption = (
        "Experts (solid) see batches of one pseudo label each, baselines (dashed) ordinary batches. An "
        "expert's loss starts higher, because all its negatives look alike, and must fall: that fall is "
        "what it learns beyond the base. Bad: a flat line (nothing left to tell apart), or an expert "
        "whose loss equals a baseline's (its clusters separate nothing)."
    )

    def plot() -> Canvas:
        return loss_panels(rows, titles, colours, dashed)

    return draw("experts_loss", "Loss of the experts", caption, rows, plot)


def loss_panels(
    rows: Rows, titles: Mapping[str, str], colours: Mapping[str, str], dashed: Sequence[str] = ()
) -> Canvas:
    """Losses of several trainings, against samples seen and against time.

    Args:
        rows: `model`, `samples_seen`, `hours`, `loss`.
        titles: model to its name for people.
        colours: model to its colour.
        dashed: models whose lines are.
    """
    num_lines = len({row["model"] for row in rows})
    figure, axes = canvas(max(2.9, LEGEND_LINE * (num_lines + 2)), 1, 2, sharey=True)
    factor, unit = clock(max(row["hours"] for row in rows))
    panels = (("samples_seen", 1.0, "samples seen in this stage"), ("hours", factor, unit))
    for axis, (against, scale, label) in zip(axes[0], panels, strict=True):
        for key in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == key]
            x, y = [scale * row[against] for row in mine], [row["loss"] for row in mine]
            style = "--" if key in dashed else "-"
            marker = "o" if len(mine) < 3 else None
            look = {"color": colours[key], "label": titles[key], "marker": marker}
            axis.plot(x, y, style, markersize=3, **look)
        axis.set(xlabel=label, xlim=(0, None))
    axes[0, 0].set_ylabel("loss")
    counts_on(axes[0, 0].xaxis)
    axes[0, 1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def clock(hours: float) -> tuple[float, str]:
    """What hours are to be multiplied with so that a training of that length can be read, and the unit then."""
    return (1.0, "hours of training") if hours >= 2 else (60.0, "minutes of training")


def _phases(
    axis: Axes,
    phases: Mapping[str, Mapping[str, Span]],
    against: str,
    scale: float,
    *,
    has_names: bool,
) -> None:
    """Every other phase on a tint, with its name."""
    for number, (phase, spans) in enumerate(phases.items()):
        start, end = (scale * place for place in spans[against])
        if number % 2 == 0 and len(phases) > 1:
            axis.axvspan(start, end, color=TINT, zorder=0, linewidth=0)
        if has_names and len(phases) > 1:
            axis.annotate(
                phase,
                (start, 1),
                xytext=(4, -4),
                textcoords="offset points",
                xycoords=axis.get_xaxis_transform(),
                va="top",
                color=MUTED,
                fontsize=8.5,
            )
    axis.set_xlim(0, scale * max(spans[against][1] for spans in phases.values()))
