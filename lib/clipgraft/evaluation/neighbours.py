"""Nearest neighbours: how well the images most like an image tell its label, by cosine of the embeddings.

Nothing is trained, so this is a probe without a setting to tune but k. The halves are those of the linear probe: one half
votes, the other is judged, several times over.
"""

# Shapes: N samples, D embedding

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import config_context
from sklearn.neighbors import KNeighborsClassifier

from clipgraft.config import ConfigError
from clipgraft.evaluation.probe import halves, labelled, summary

_MEGABYTES = 64  # of distances that scikit-learn holds at a time


def nearest_neighbours(
    image_ND: np.ndarray, label_N: np.ndarray, num_neighbours: int, where: str
) -> dict[str, Any]:
    """Accuracy of scikit-learn's KNeighborsClassifier, every neighbour having one vote.

    Args:
        image_ND: embeddings.
        label_N: class numbers; -1 where a sample has none, which is left out.
        num_neighbours: how many vote.
        where: for the message.
    Returns:
        `acc`, `spread` and `chance` as of the linear probe; `num_neighbours`, `num_samples`, `num_classes`.
    Raises:
        ConfigError: with too few samples, or all of one class.
    """
    image_ND, label_N = labelled(image_ND, label_N, where)
    if num_neighbours > len(label_N) // 2:
        raise ConfigError(
            f"{where}: num_neighbours = {num_neighbours}, but half of {len(label_N):,} samples vote. Hint: fewer"
        )
    accs, guesses = [], []
    for train, test in halves(len(label_N)):
        classifier = KNeighborsClassifier(num_neighbours, metric="cosine", algorithm="brute")
        with config_context(working_memory=_MEGABYTES):
            found = classifier.fit(image_ND[train], label_N[train]).predict(image_ND[test])
        accs.append(float((found == label_N[test]).mean()))
        guesses.append(float((label_N[test] == np.bincount(label_N[train]).argmax()).mean()))
    return {**summary(accs, guesses, label_N), "num_neighbours": num_neighbours}
