"""Figure of what watched trainings did, look by look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure as Canvas

from clipgraft.report.style import MUTED, Figure, canvas, counts_on, draw, hide_unused

Rows = Sequence[Mapping[str, Any]]


def plot_looks(
    name: str, series: Mapping[str, Rows], titles: Mapping[str, str], colours: Mapping[str, str]
) -> Figure:
    """Every number of every look, a panel for each, and what guessing gives.

    Args:
        name: of the figure.
        series: looks of each training: `samples_seen`, `seconds`, `watch` (numbers by name) and `chance` (the same).
        titles: training to its name for people.
        colours: training to its colour.
    """
    names = list(
        dict.fromkeys(each for looks in series.values() for look in looks for each in look["watch"])
    )
    rows = [
        {
            "training": key,
            **{about: look[about] for about in ("step", "samples_seen", "seconds")},
            **{each: look["watch"].get(each) for each in names},
            **{f"chance {each}": look["chance"].get(each) for each in names},
        }
        for key, looks in series.items()
        for look in looks
    ]

    def plot() -> Canvas:
        num_columns = min(3, len(names))
        num_rows = -(-len(names) // num_columns)
        figure, axes = canvas(0.4 + 2.1 * num_rows, num_rows, num_columns, sharex=True)
        for axis, each in zip(hide_unused(axes, len(names)), names, strict=True):
            values, guesses = [], []
            for key, looks in series.items():
                mine = [look for look in looks if each in look["watch"]]
                x = [look["samples_seen"] for look in mine]
                y = [100 * look["watch"][each] for look in mine]
                axis.plot(x, y, color=colours[key], marker="o", markersize=2.5, label=titles[key])
                values += y
                guesses += [100 * look["chance"][each] for look in mine]
            # Far above guessing and nearly level: a scale from 0 would hide what changes.
            if min(values) < max(max(values) / 2, 2 * max(guesses)):
                axis.hlines(
                    sorted(set(guesses)),
                    0,
                    1,
                    MUTED,
                    "--",
                    linewidth=1,
                    transform=axis.get_yaxis_transform(),
                )
                axis.set_ylim(0, None)
            axis.set_title(f"{each.replace('_', ' ')}, %")
            axis.set_xlim(0, None)
            counts_on(axis.xaxis)
        for axis in axes[-1]:
            axis.set_xlabel("samples seen")
        if len({colours[key] for key in series}) > 1:
            handles, labels = axes[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        return figure

    caption = (
        "The model in training, measured on a few samples of a task (watch); dashed: guessing, where it is in sight. "
        "They are too few for a table of results, and a curve jumps by a sample or two. Bad: a curve that stays at the "
        "dashed line, or one that falls while the loss falls, too: training then learns what does not carry over."
    )
    return draw(name, "On samples held out, while training", caption, rows, plot)
