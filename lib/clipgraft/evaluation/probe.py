"""Linear probe: how well a linear classifier reads an attribute off frozen image embeddings.

Three decisions shaped it. Half of the samples train the classifier and the other half judges it; how strongly it is
regularised is decided inside the training half, on a quarter of it, so that the judging half is looked at once. The halves
are the same for all models and runs, so that differences between models are not those between halves. And the probe is made
on several halvings: their spread tells what a difference is worth.
"""

# Shapes: N samples, D embedding

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from clipgraft.config import ConfigError

NUM_SPLITS = 3
MIN_SAMPLES = 16
STRENGTHS = tuple(10.0**power for power in range(-4, 2))  # inverse: small is a strong regulariser
_MAX_ITERATIONS = 400


def linear_probe(image_ND: np.ndarray, label_N: np.ndarray, where: str) -> dict[str, Any]:
    """Accuracy of multinomial logistic regression on standardised embeddings.

    Args:
        image_ND: embeddings.
        label_N: class numbers; -1 where a sample has none, which is left out.
        where: for the message.
    Returns:
        `acc` and its standard deviation over halvings (`spread`); `chance`, the accuracy of naming the class that is most
        frequent in the training half; `strengths` as chosen; `num_samples`, `num_classes`.
    Raises:
        ConfigError: with too few samples, or all of one class.
    """
    image_ND, label_N = labelled(image_ND, label_N, where)
    accs, guesses, strengths = [], [], []
    for train, test in halves(len(label_N)):
        strength = _best_strength(image_ND[train], label_N[train])
        (acc,) = _accuracies(image_ND, label_N, train, test, [strength])
        commonest = np.bincount(label_N[train]).argmax()
        accs.append(acc)
        guesses.append(float((label_N[test] == commonest).mean()))
        strengths.append(strength)
    return {**summary(accs, guesses, label_N), "strengths": strengths}


def labelled(
    image_ND: np.ndarray, label_N: np.ndarray, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings in float64 and class numbers of the samples that have the label.

    Raises:
        ConfigError: with too few samples, or all of one class.
    """
    has = label_N >= 0
    image_ND, label_N = image_ND[has].astype(np.float64), label_N[has]
    num_classes = len(np.unique(label_N))
    if len(label_N) < MIN_SAMPLES or num_classes < 2:
        raise ConfigError(
            f"{where}: {len(label_N):,} samples have the label, in {num_classes} classes; a probe needs "
            f"{MIN_SAMPLES} and 2. Hint: leave it out"
        )
    return image_ND, label_N


def halves(num: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to learn from and rows to judge, several times; the same for all models and runs."""
    for number in range(NUM_SPLITS):
        train, test = np.array_split(np.random.default_rng(number).permutation(num), 2)
        yield train, test


def summary(accs: list[float], guesses: list[float], label_N: np.ndarray) -> dict[str, Any]:
    """Means over halvings."""
    return {
        "acc": round(float(np.mean(accs)), 6),
        "spread": round(float(np.std(accs, ddof=1)), 6),
        "chance": round(float(np.mean(guesses)), 6),
        "num_samples": len(label_N),
        "num_classes": len(np.unique(label_N)),
    }


def _best_strength(image_ND: np.ndarray, label_N: np.ndarray) -> float:
    """The one that does best on the last quarter of the rows, which are in random order; the first of equals."""
    fit, held_out = np.split(np.arange(len(label_N)), [len(label_N) * 3 // 4])
    accs = _accuracies(image_ND, label_N, fit, held_out, list(STRENGTHS))
    return STRENGTHS[int(np.argmax(accs))]


def _accuracies(
    image_ND: np.ndarray,
    label_N: np.ndarray,
    fit: np.ndarray,
    judge: np.ndarray,
    strengths: list[float],
) -> list[float]:
    """Accuracy on the rows `judge` of classifiers that have seen the rows `fit` alone, each begun at the one before."""
    if len(np.unique(label_N[fit])) < 2:  # nothing to tell apart
        return [float((label_N[judge] == label_N[fit][0]).mean())] * len(strengths)
    mean_D, std_D = image_ND[fit].mean(0), image_ND[fit].std(0)
    unit_ND = (image_ND - mean_D) / np.where(std_D > 0, std_D, 1.0)
    classifier = LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)
    accs = []
    with warnings.catch_warnings():
        # A weak regulariser may not converge; it is judged on held-out rows as it is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in strengths:
            classifier.set_params(C=strength).fit(unit_ND[fit], label_N[fit])
            accs.append(float(classifier.score(unit_ND[judge], label_N[judge])))
    return accs
