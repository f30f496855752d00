"""Retrieval among candidates that agree with the query on some labels.

What a model has learnt first, say colour, is of no use there: it must tell the candidates apart by the rest. So this shows
whether experts have learnt something that the base had not, where plain recall mixes both.
"""

# Shapes: N images, U distinct texts, A labels, D embedding

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipgraft.config import ConfigError
from clipgraft.evaluation.retrieval import Captions, evaluate_retrieval
from clipgraft.evaluation.rows import Rows

WAYS = ("image_to_text", "text_to_image")


def evaluate_given(
    image_ND: Rows,
    text_UD: Rows,
    captions: Captions,
    captions_of: Sequence[Sequence[str]],
    groups: Sequence[np.ndarray],
) -> dict[str, Any]:
    """R@1 both ways within each group, mean over all queries, and what random ranking gives.

    Args:
        image_ND: L2-normalised features of all images.
        text_UD: L2-normalised features of `captions.texts`.
        captions: of all images, equal ones once.
        captions_of: the same as strings, image by image.
        groups: rows of the images of each group (`groups_of`).
    """
    number = {text: u for u, text in enumerate(captions.texts)}
    sums = dict.fromkeys([*WAYS, *(f"chance_{way}" for way in WAYS)], 0.0)
    counts = dict.fromkeys(WAYS, 0)
    for rows in groups:
        own = Captions.of([captions_of[row] for row in rows], captions.protocol)
        texts = [number[text] for text in own.texts]
        found = evaluate_retrieval(image_ND[rows], text_UD[texts], own)
        queries = {
            "image_to_text": len(own.image_P.unique()),
            "text_to_image": int(own.count_U.sum()),
        }
        for way, count in queries.items():
            counts[way] += count
            sums[way] += count * found[way]["R@1"]
            sums[f"chance_{way}"] += count * found["chance"][f"{way}_R@1"]
    means = {way: sums[way] / counts[way] for way in WAYS}
    guesses = {way: sums[f"chance_{way}"] / counts[way] for way in WAYS}
    return {
        **{f"{way}_R@1": round(means[way], 6) for way in WAYS},
        "mean_R@1": round(float(np.mean(list(means.values()))), 6),
        "chance": {
            **{f"{way}_R@1": round(guesses[way], 6) for way in WAYS},
            "mean_R@1": round(float(np.mean(list(guesses.values()))), 6),
        },
        "num_groups": len(groups),
        "num_images": sum(map(len, groups)),
        "median_images": float(np.median([len(rows) for rows in groups])),
    }


def groups_of(
    labels: Mapping[str, np.ndarray], captions_of: Sequence[Sequence[str]], where: str
) -> list[np.ndarray]:
    """Rows of the images that agree on all labels, group by group.

    Images that lack a label or a caption are left out, and so are those without company: they would find
    themselves whatever the model.

    Args:
        labels: class numbers [N] by name; -1 where an image has none.
        captions_of: captions of each image.
        where: for the message.
    Raises:
        ConfigError: if no two images agree.
    """
    has_caption_N = np.array([bool(texts) for texts in captions_of])
    value_NA = np.stack(list(labels.values()), axis=1)
    rows = np.flatnonzero((value_NA >= 0).all(1) & has_caption_N)
    _, group_N, size_G = np.unique(value_NA[rows], axis=0, return_inverse=True, return_counts=True)
    group_N = group_N.reshape(-1)
    ordered = rows[np.argsort(group_N, kind="stable")]
    parts = np.split(ordered, np.cumsum(size_G)[:-1])
    groups = [part for part in parts if len(part) > 1]
    if not groups:
        raise ConfigError(
            f"{where}: no two images with captions agree on {', '.join(labels)}. Hint: fewer labels"
        )
    return groups
