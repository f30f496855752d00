"""Reductions: the settings of which tokens of a sample are kept in training (CLIPA, arXiv 2305.07017).

Part of `settings`, in a file of its own like `sources`. A name alone stands for a reduction with its defaults. Which
tokens those are is decided in `data/reduce.py` for texts and in `models/patches.py` for images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field

from clipgraft.sources import Settings

Share = Annotated[float, Field(gt=0, le=1)]

TEXT_MASKS = ("text_mask", "reduction_mask")  # what CLIPA and open_clip call `text_reduction`


def _named(raw: Any) -> Any:
    """A name alone as a mapping; `simple` is what open_clip calls a block."""
    if isinstance(raw, str):
        return {"kind": "block" if raw == "simple" else raw}
    return raw


class PlainText(Settings):
    """The beginning, any tokens, or a run of neighbours."""

    kind: Literal["truncate", "random", "block"]


class SyntaxText(Settings):
    """Words by class: nouns, adjectives, verbs, others."""

    kind: Literal["syntax"]
    tie: Literal["first", "random"] = Field(
        "first",
        description="Words of one class: earlier ones first, or in an order drawn at each visit.",
    )
    compat: Literal["clipa"] | None = Field(
        None,
        description="clipa: count words instead of pieces and cut what is then too long at the end, as published.",
    )


class FrequencyText(Settings):
    """Frequent words are dropped at random (CLIPF, arXiv 2412.16148)."""

    kind: Literal["frequency"]
    threshold: Share = Field(
        1e-4,
        description="t of CLIPF: a word that makes up a share f of the corpus is dropped with 1 - sqrt(t / f).",
    )


_Text = Annotated[PlainText | SyntaxText | FrequencyText, Discriminator("kind")]
_TextName = Literal["truncate", "random", "block", "syntax", "frequency", "simple"]
TextReduction = Annotated[_Text, BeforeValidator(_named, json_schema_input_type=_TextName | _Text)]


class Resize(Settings):
    """Nothing is dropped: the reduction is the image size."""

    kind: Literal["resize"]


class RandomPatches(Settings):
    """Any patches."""

    kind: Literal["random"]
    keep: Share = Field(0.5, description="Share of the patches.")


class GridPatches(Settings):
    """One patch of every window of 2 x 2."""

    kind: Literal["grid"]
    cell: Literal["random", "fixed"] = Field(
        "random", description="Which one: drawn for each window, or its upper left."
    )


class BlockPatches(Settings):
    """One rectangle of neighbours."""

    kind: Literal["block"]
    keep: Share = Field(0.25, description="Share of the patches; of each side, its square root.")


_Image = Annotated[Resize | RandomPatches | GridPatches | BlockPatches, Discriminator("kind")]
_ImageName = Literal["resize", "random", "grid", "block"]
ImageReduction = Annotated[
    _Image, BeforeValidator(_named, json_schema_input_type=_ImageName | _Image)
]

REDUCTION_KINDS = {
    "text_reduction": {"truncate", "random", "block", "syntax", "frequency"},
    "image_reduction": {"resize", "random", "grid", "block"},
}
TRUNCATE, RESIZE = PlainText(kind="truncate"), Resize(kind="resize")


def text_mask_of(config: Mapping[str, Any]) -> Any:
    """The text reduction that a model config of CLIPA (`text_mask`) or open_clip (`reduction_mask`) asks for, or None.

    Raises:
        ValueError: if it asks for several.
    """
    text = config.get("text_cfg")
    parts = [text, text.get("tokenizer_kwargs")] if isinstance(text, Mapping) else []
    asked = [
        part[key]
        for part in parts
        if isinstance(part, Mapping)
        for key in TEXT_MASKS
        if part.get(key)
    ]
    if any(other != asked[0] for other in asked):
        raise ValueError(f"text_cfg asks for several text reductions: {asked}. Hint: keep one")
    return asked[0] if asked else None


def block_sides(reduction: BlockPatches, rows: int, columns: int) -> tuple[int, int]:
    """Height and width in patches of the block that is kept."""
    height, width = (max(1, round(math.sqrt(reduction.keep) * side)) for side in (rows, columns))
    return height, width


def num_kept(
    reduction: Resize | RandomPatches | GridPatches | BlockPatches, rows: int, columns: int
) -> int:
    """How many patches of a grid stay, the class token left out.

    Raises:
        ValueError: if windows of 2 x 2 do not fill the grid.
    """
    if isinstance(reduction, RandomPatches):
        # CLIPA counts int(N * (1 - r)). 0.29 * 100 is 28.999...: rounded first, so that 29 it is.
        return max(1, int(round(rows * columns * reduction.keep, 6)))
    if isinstance(reduction, BlockPatches):
        height, width = block_sides(reduction, rows, columns)
        return height * width
    if isinstance(reduction, GridPatches):
        if rows % 2 or columns % 2:
            raise ValueError(
                f"image_reduction: grid needs an even number of patches on each side, not {rows} x {columns}. "
                "Hint: an image_size that is a multiple of twice the patch size, or {kind: random, keep: 0.25}"
            )
        return rows * columns // 4
    return rows * columns
