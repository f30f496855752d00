"""Zero-shot classification: each class is the mean of what prompts say of it; the nearest class wins.

As in CLIP: features of the prompts of a class are L2-normalised, averaged and normalised again.
Equal scores count as a coin would decide, as in `retrieval`, so that a model whose features are all
alike scores 1 / number of classes and not the share of the class that happens to come first.
"""

# Shapes: N images, C classes, T templates, D embedding

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.config import ConfigError
from clipgraft.evaluation.retrieval import recall_at
from clipgraft.evaluation.rows import Rows, blocks_of

MAX_CONFUSION = 2_000  # classes; of 10,000 each result would have 300 MB


def zero_shot_weights(
    encode: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """One direction per class.

    Args:
        encode: texts to L2-normalised features.
        classes: class names.
        templates: prompts with `{c}` where the class name goes.
    Returns:
        `[C, D]`, L2-normalised.
    """
    prompts = [template.replace("{c}", name) for name in classes for template in templates]
    feature_CTD = encode(prompts).view(len(classes), len(templates), -1)
    return F.normalize(feature_CTD.mean(dim=1), dim=-1)


def evaluate_zero_shot(
    image_ND: Rows, weight_CD: Tensor, label_N: Tensor, classes: Sequence[str]
) -> dict[str, Any]:
    """Accuracy, recall per class, confusion (None of more than `MAX_CONFUSION` classes), and what guessing would give.

    Args:
        image_ND: L2-normalised features of all images.
        weight_CD: from `zero_shot_weights`, of the same size.
        label_N: class number of each image; -1 where it has none, which leaves it out.
        classes: class names.
    """
    known_N = label_N >= 0
    cutoffs = (1, 5) if len(classes) > 5 else (1,)
    rows, label_N = known_N.nonzero().squeeze(1), label_N[known_N]
    hit_NK = recall_at(image_ND, weight_CD, rows, label_N, cutoffs=cutoffs)[known_N]
    count_C = torch.bincount(label_N, minlength=len(classes))
    hits_C = torch.zeros(len(classes), dtype=torch.float64).scatter_add_(0, label_N, hit_NK[:, 0])
    recall_C = hits_C[count_C > 0] / count_C[count_C > 0]
    return {
        "acc1": _rounded(hit_NK[:, 0].mean()),
        "acc5": _rounded(hit_NK[:, 1].mean()) if len(cutoffs) > 1 else None,
        "mean_per_class_recall": _rounded(recall_C.mean()),
        "num_classes": len(classes),
        "num_samples": len(label_N),
        "chance": 1 / len(classes),
        "chance5": 5 / len(classes) if len(cutoffs) > 1 else None,
        "majority": _rounded(count_C.max() / len(label_N)),
        "classes": list(classes),
        "confusion": _confusion(image_ND, weight_CD, rows, label_N),
    }


def _confusion(
    image_ND: Rows, weight_CD: Tensor, rows: Tensor, label_N: Tensor
) -> list[list[int]] | None:
    """How many images of each class are taken for each."""
    num_classes = len(weight_CD)
    if num_classes > MAX_CONFUSION:
        return None
    # Only here the first of equal classes wins: a table of counts cannot hold halves.
    pair_N = label_N * num_classes + best_classes(image_ND, weight_CD)[rows]
    return torch.bincount(pair_N, minlength=num_classes**2).view(num_classes, -1).tolist()


def best_classes(image_ND: Rows, weight_CD: Tensor) -> Tensor:
    """The class of the highest score of each image, on the CPU; of equal ones the first."""
    return torch.cat([(each @ weight_CD.T).argmax(1).cpu() for each in blocks_of(image_ND)])


def check_templates(templates: Sequence[str], where: str) -> None:
    """Check that each prompt has room for a class name.

    Raises:
        ConfigError: names the first that has not.
    """
    for template in templates:
        if "{c}" not in template:
            raise ConfigError(
                f"{where}: the template {template!r} has no {{c}}. "
                "Hint: {c} is where the class name goes, as in 'a photo of a {c}'"
            )


def _rounded(value: Tensor) -> float:
    return round(float(value), 6)
