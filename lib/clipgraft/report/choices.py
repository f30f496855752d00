"""What tokens choose, from the evaluation of mixtures of experts to figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from clipgraft.data.images import prepare
from clipgraft.data.samples import Samples
from clipgraft.report.figures_choices import (
    MAX_SAMPLES,
    plot_frequent_words,
    plot_information,
    plot_patch_choices,
    plot_word_choices,
)
from clipgraft.report.read import Model, Run, expert_colours, read_json
from clipgraft.report.style import Figure

_SIDE = 64  # pixels of a picture under a map


def choices_figures(run: Run, models: Sequence[Model]) -> list[Figure]:
    """Maps over pictures and captions of the last mixture of experts, and what the choices of all say of attributes."""
    mixed = [
        (model, task)
        for model in models
        for task, result in model.results.items()
        if result.get("choices")
    ]
    if not mixed:
        return []
    final = mixed[-1][0]
    task = next(task for model, task in mixed if model is final)
    rows = [row for model, name in mixed for row in _information(model, name)]
    return [
        *_maps(run, f"{final.key}/{task}"),
        plot_information(rows, final.key, task, final.title),
    ]


def _maps(run: Run, name: str) -> Iterator[Figure]:
    shown = read_json(run.folders[f"evaluate/{name}"] / "choices.json")
    towers, data = shown["towers"], run.manifest("evaluate", name)["settings"]["data"]
    if shown["image"] and f"index/{data}" in run.folders:
        about, maps = towers["image"], shown["image"][:MAX_SAMPLES]
        pictures = [_pixels(run.samples(data), each["row"], shown) for each in maps]
        colours = expert_colours(about["num_experts"])
        yield plot_patch_choices(pictures, maps, shown["grid"], about["layers"], colours)
    if any(each["words"] for each in shown["text"]):
        about = towers["text"]
        colours = expert_colours(about["num_experts"])
        yield plot_word_choices(shown["text"], about["layers"], colours)
        yield plot_frequent_words(shown["frequent"], about["layers"], colours)


def _pixels(samples: Samples, row: int, shown: dict[str, Any]) -> Any:
    """A picture as the model sees it, but for its size."""
    return prepare(samples.pixels(row), _SIDE, shown["resize_mode"], shown["interpolation"])


def _information(model: Model, task: str) -> Iterator[dict[str, Any]]:
    for tower, about in model.results[task]["choices"].items():
        for name, entries in about["information"].items():
            for layer, entry in zip(about["layers"], entries, strict=True):
                place = {"model": model.key, "task": task, "tower": tower, "layer": layer}
                yield {**place, "about": name, **entry}
