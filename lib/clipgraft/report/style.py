"""How figures look, and how they become SVG that can stand in a page beside others.

Text stays text, so that it can be searched and read aloud and the page stays small. Names inside a
figure carry the figure's own name, since all figures share one page. Same data, same bytes.

Files have plain colours. On the page those that must differ between a light and a dark background
(`THEMED`) are variables of its style sheet; colours of models, cells and pictures are the same on both.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter, MaxNLocator

INK, MUTED, GRID, BLUE, ORANGE = "#222222", "#6B7280", "#E5E7EB", "#0072B2", "#D55E00"
PAPER, TINT, RAIL = (
    "#FEFEFE",
    "#F3F4F6",
    "#D1D5DB",
)  # the page itself, a strip of it, a thin bar on it
CELL_INK = "#111111"  # on cells, which are light on a dark page as well
WIDTH = 10.3  # inches of 96 pixels: the width of the page
LEGEND_LINE = 0.19  # inches of a legend's entry

# What a colour is called in the style sheet of the page. The last three are of models, and too dark for a dark page.
THEMED = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    PAPER: "page",
    TINT: "soft",
    RAIL: "rail",
    "#9CA3AF": "edge",
    "#333333": "base",
    "#5D4E9E": "violet",
    "#6E4B2A": "brown",
}
_HEX = re.compile("|".join(THEMED), re.IGNORECASE)

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # captions, class names and reasons may hold dollars
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#9CA3AF",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Figure:
    """One figure of the report.

    Attributes:
        name: of its files.
        title: above it.
        caption: what to look for, and what bad looks like.
        svg: to stand in a page.
        rows: its numbers.
    """

    name: str
    title: str
    caption: str
    svg: str
    rows: Sequence[Mapping[str, Any]] = field(repr=False)


def draw(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[Mapping[str, Any]],
    plot: Callable[[], Canvas],
) -> Figure:
    """Draw a figure in the style of the report.

    Args:
        name: of its files and of everything inside it.
        title: above it.
        caption: below it.
        rows: its numbers, written as CSV.
        plot: makes the figure.
    """
    with mpl.rc_context({**RC, "svg.hashsalt": name}):
        buffer = io.BytesIO()
        plot().savefig(buffer, format="svg", metadata={"Date": None})
    return Figure(name, title, caption, _for_page(buffer.getvalue().decode(), name, title), rows)


def canvas(
    height: float, num_rows: int = 1, num_columns: int = 1, **grid: Any
) -> tuple[Canvas, Any]:
    """A figure as wide as the page, and its axes as an array `[rows, columns]`."""
    figure = Canvas(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False, **grid)


def hide_unused(axes: Any, num_used: int) -> list[Axes]:
    """The first axes of a grid; the others are switched off."""
    flat = list(axes.flat)
    for axis in flat[num_used:]:
        axis.set_visible(False)
    return flat[:num_used]


def counts_on(axis: Any) -> None:
    """Ticks for whole numbers, such as 5, 20k and 1.5M."""
    axis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axis.set_major_formatter(EngFormatter(sep=""))


def heat_map(
    axis: Any,
    table: np.ndarray,
    columns: Sequence[str],
    lines: Sequence[str],
    *,
    high: float,
    text: str | None,
    is_signed: bool = False,
) -> None:
    """A table in shades of blue from 0 to `high`, and of red to `-high`; its numbers written into it."""
    cmap, low = ("RdBu", -high) if is_signed else ("Blues", 0.0)
    axis.pcolormesh(table, cmap=cmap, vmin=low, vmax=high, edgecolors=PAPER, linewidth=1.2)
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axis.set_yticks(np.arange(len(lines)) + 0.5, lines)
    axis.invert_yaxis()
    axis.tick_params(length=0)
    axis.grid(visible=False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    if text is None:
        return
    for (i, j), value in np.ndenumerate(table):
        colour = "#FFFFFF" if abs(value) > 0.6 * high else CELL_INK
        axis.text(
            j + 0.5, i + 0.5, text.format(value), ha="center", va="center", color=colour, fontsize=8
        )


def themed(style: str) -> str:
    """SVG or CSS with variables for the colours that follow the page."""
    return _HEX.sub(lambda found: f"var(--{THEMED[found[0].upper()]})", style)


def _for_page(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    label = html.escape(title)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip() + "\n"
