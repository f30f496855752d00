"""Metrics of DataComp's tasks beside accuracy: by groups, for faces, for associations.

Groups are numbered as WILDS does it, by the values of columns of a sample's metadata. Of groups without samples nothing
is reported (WILDS reports NaN, which is no JSON); the worst group is that of the others.
"""

# Shapes: N samples, C classes, F columns of metadata

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from clipgraft.config import ConfigError

FIELDS = {
    "wilds/iwildcam": "location sequence year month day hour minute second y",
    "wilds/camelyon17": "hospital slide y",
    "wilds/fmow": "region year y",
    "fairness/dollar_street": "income_ds income_meta region",
    "fairness/geode": "region country",
    "fairness/fairface": "age gender race race_binary",
    "fairness/utkface": "age gender race race_binary",
}
_GROUPS = {
    "slide",
    "year",
    "region",
    "income_ds",
    "race",
    "race_binary",
    "gender",
    "age",
}  # of these groups are made
_WORST_OF = {
    "acc_worst_region": "region",
    "acc_top5_wg": "income_ds",
    "acc_wg": "region",
}  # main metrics, and what makes their groups
OBJECTIVES = ("race", "gender", "age", "toxic")  # of faces
WHITE = 1  # class number among races
NON_HUMAN, CRIME = range(14, 18), 18  # class numbers among toxic words: these, and from here on


def columns_of(key: str, metadata_NF: np.ndarray, where: str) -> dict[str, np.ndarray]:
    """Columns of metadata by name, int64 [N].

    Raises:
        ConfigError: if a value that makes groups is negative.
    """
    columns = {}
    for name, column_N in zip(FIELDS[key].split(), metadata_NF.T, strict=True):
        columns[name] = column_N.astype(np.int64)  # some are stored as floats
        if name in _GROUPS and (columns[name] < 0).any():
            raise ConfigError(f"{where}: column {name} of .npy is negative for some samples")
    return columns


def grouped(
    name: str, value_N: np.ndarray, columns: Mapping[str, np.ndarray], worst: str
) -> dict[str, float]:
    """Mean of a value over all samples, over each group and of the worst group.

    Args:
        name: of the metric.
        value_N: of each sample.
        columns: samples that agree on all of them are a group.
        worst: key of the worst group's mean.
    """
    metrics: dict[str, float] = {f"{name}_avg": float(value_N.mean())}
    keys_NF = np.stack(list(columns.values()), axis=1)
    groups, group_N = np.unique(keys_NF, axis=0, return_inverse=True)
    means = []
    for number, values in enumerate(groups):
        own = value_N[group_N.reshape(-1) == number]
        pairs = zip(reversed(list(columns)), values[::-1], strict=True)
        words = "_".join(f"{field}:{value}" for field, value in pairs)
        means.append(float(own.mean()))
        metrics |= {f"{name}_{words}": means[-1], f"count_{words}": float(len(own))}
    return {**metrics, worst: min(means)}


def group_metrics(
    key: str,
    hit_N: np.ndarray,
    hit5_N: np.ndarray,
    predicted_N: np.ndarray,
    label_N: np.ndarray,
    columns: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """What a task of WILDS or of fairness reports beside accuracy.

    Args:
        key: of the task.
        hit_N: how probably the best class is the right one: 0 or 1, but for ties.
        hit5_N: how probably the right one is among the best five.
        predicted_N: the best class.
        label_N: the right one.
        columns: metadata by name.
    """
    if key == "wilds/iwildcam":
        from sklearn.metrics import f1_score, recall_score  # a second that others need not wait

        present, options = np.unique(label_N), {"average": "macro", "zero_division": 0.0}
        return {
            "acc_avg": float(hit_N.mean()),
            "recall-macro_all": float(
                recall_score(label_N, predicted_N, labels=present, **options)
            ),
            "F1-macro_all": float(f1_score(label_N, predicted_N, labels=present, **options)),
        }
    if key == "wilds/camelyon17":
        return grouped("acc", hit_N, {"slide": columns["slide"]}, "acc_wg")
    if key == "wilds/fmow":
        # DataComp means to leave the region "Other" out, and does not: it knows regions by their numbers alone.
        years = grouped("acc", hit_N, {"year": columns["year"]}, "acc_worst_year")
        return years | grouped("acc", hit_N, {"region": columns["region"]}, "acc_worst_region")
    if key == "fairness/dollar_street":
        return grouped("acc_top5", hit5_N, {"income_ds": columns["income_ds"]}, "acc_top5_wg")
    assert key == "fairness/geode", key
    return grouped("acc", hit_N, {"region": columns["region"]}, "acc_wg")


def chance_of(
    metric: str | None, num_classes: int, label_N: np.ndarray, columns: Mapping[str, np.ndarray]
) -> float:
    """What naming a class at random, all alike, gives on average of a main metric.

    Args:
        metric: accuracy unless it is one of those of groups or of F1.
        num_classes: that there are to name.
        label_N: the right one.
        columns: metadata by name.
    """
    guess = min(1.0, (5 if "top5" in (metric or "") else 1) / num_classes)
    if metric == "F1-macro_all":
        return chance_of_macro_f1(label_N, num_classes)
    if metric in _WORST_OF:
        _, size_G = np.unique(columns[_WORST_OF[metric]], return_counts=True)
        return chance_of_worst(size_G, guess)
    return guess


def chance_of_worst(size_G: np.ndarray, guess: float) -> float:
    """Mean of the least accuracy among groups of these sizes, where each sample is right with one probability."""
    from scipy.stats import binom

    edges_T = np.unique(np.concatenate([np.arange(size + 1) / size for size in size_G]))
    above_T = np.ones(
        len(edges_T) - 1
    )  # probability that all are above, from each edge to the next
    for size in size_G:
        above_T *= binom.sf(np.floor(edges_T[:-1] * size + 1e-6), size, guess)
    return float((above_T * np.diff(edges_T)).sum())


def chance_of_macro_f1(label_N: np.ndarray, num_classes: int) -> float:
    """F1 with the mean numbers of hits and of times that a class is named, which is its mean for many samples."""
    count_C = np.unique(label_N, return_counts=True)[1]
    named = len(label_N) / num_classes
    return float((2 * count_C / num_classes / (count_C + named)).mean())


def face_metrics(
    predicted: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """What DataComp reports of faces (tables 3 to 6 of CLIP's study of FairFace, arXiv:2103.00020, section 7).

    Args:
        predicted: the best class of each sample, for each of `OBJECTIVES`.
        columns: metadata by name.
    """
    by_colour = {"race_binary": columns["race_binary"]}
    by_race = {"race": columns["race"]}
    right = {name: predicted[name] == columns[name] for name in ("gender", "age")}
    right["race"] = (predicted["race"] != WHITE).astype(int) == columns["race_binary"]
    metrics: dict[str, float] = {}
    for name in ("race", "gender", "age"):
        metrics |= grouped(f"acc_{name}", right[name].astype(float), by_colour, f"acc_{name}_wg")
    by_both = {"gender": columns["gender"], "race": columns["race"]}
    metrics |= grouped("acc_gender_x", right["gender"].astype(float), by_both, "acc_gender_x_wg")
    toxic = predicted["toxic"]
    for name, is_so in (
        ("toxicity_crime", toxic >= CRIME),
        ("toxicity_nonhuman", np.isin(toxic, NON_HUMAN)),
    ):
        metrics |= grouped(name, is_so.astype(float), by_race, f"{name}_wg")
    return metrics


def jaccard(chosen: ArrayLike, right: ArrayLike) -> float:
    """Share of the candidates that are chosen or right that are both."""
    chosen_C, right_C = np.asarray(chosen, bool), np.asarray(right, bool)
    return float((chosen_C & right_C).sum() / (chosen_C | right_C).sum())


def chance_of_jaccard(num_candidates: int, num_right: int) -> float:
    """Its mean when as many candidates as are right are chosen blindly."""
    wrong, total = num_candidates - num_right, comb(num_candidates, num_right)
    return sum(
        comb(num_right, both)
        * comb(wrong, num_right - both)
        / total
        * both
        / (2 * num_right - both)
        for both in range(num_right + 1)
    )


def jaccard_metrics(score_N: np.ndarray, num_candidates_N: np.ndarray) -> dict[str, float | None]:
    """WinoGAViL's means, over all and by the number of candidates; None where there are no such items."""
    chosen: dict[str, Any] = {"avg_jaccard_score": num_candidates_N > 0}
    chosen |= {f"jaccard_score_{size}": num_candidates_N == size for size in (5, 6, 10, 12)}
    chosen |= {
        "jaccard_score_5-6": num_candidates_N <= 6,
        "jaccard_score_10-12": num_candidates_N >= 10,
    }
    return {name: float(score_N[own].mean()) if own.any() else None for name, own in chosen.items()}


def mean_average_precision(score_NC: np.ndarray, is_in_NC: np.ndarray) -> tuple[float, float]:
    """Mean over the classes that occur of the average precision, and of what a blind ranking gives."""
    from sklearn.metrics import average_precision_score

    occurs = is_in_NC.any(0)
    per_class = [
        average_precision_score(is_in_NC[:, number], score_NC[:, number])
        for number in np.flatnonzero(occurs)
    ]
    return float(np.mean(per_class)), float(is_in_NC[:, occurs].mean())
