"""Retrieval: does an image find its captions, and a caption its image?

Three decisions shaped this module:

- Equal captions are one text. Whoever retrieves a text that is, letter for letter, a caption of the
  image has found what was asked for, from whichever sample it came; likewise any image that has the
  caption. Pictures with short captions would otherwise have many "wrong" answers that are right.
- A tie is worth what a coin would make of it: recall is the expected one if equal scores were put
  into random order. So a model whose features are all alike scores exactly chance, neither 1 (as
  with `rank = number of better candidates`) nor 0.
- Scores are computed and forgotten block by block; queries x candidates never exists as a whole.
"""

# Shapes: Q queries, C candidates, D embedding, P right pairs, K cut-offs, N images, U distinct texts

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipgraft.config import ConfigError

CUTOFFS = (1, 5, 10)
BLOCK_SCORES = 2**24  # scores held at a time: 64 MiB


@dataclass(frozen=True)
class Captions:
    """The captions of a data set with equal ones counted once.

    Attributes:
        texts: distinct captions, in order of appearance.
        count_U: how many captions each one stands for.
        image_P: image of each right (image, text) pair; sorted.
        text_P: text of each right pair.
        num_images: including images without a caption, which are candidates but no queries.
    """

    texts: list[str]
    count_U: Tensor
    image_P: Tensor
    text_P: Tensor
    num_images: int

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]]) -> Captions:
        """Count the captions of each image.

        Raises:
            ConfigError: if there is none.
        """
        number: dict[str, int] = {}
        counts: list[int] = []
        pairs: set[tuple[int, int]] = set()
        for row, text in ((row, text) for row, texts in enumerate(captions) for text in texts):
            u = number.setdefault(text, len(number))
            if u == len(counts):
                counts.append(0)
            counts[u] += 1
            pairs.add((row, u))
        if not pairs:
            raise ConfigError(
                f"retrieval needs captions, and none of the {len(captions):,} samples has one. "
                "Hint: set retrieval: false for this task"
            )
        image_P, text_P = torch.tensor(sorted(pairs)).T
        return cls(list(number), torch.tensor(counts), image_P, text_P, len(captions))


def evaluate_retrieval(image_ND: Tensor, text_UD: Tensor, captions: Captions) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, and what random ranking gives.

    Args:
        image_ND: L2-normalised features of all images.
        text_UD: L2-normalised features of `captions.texts`.
        captions: which belong together.
    """
    image_P, text_P = captions.image_P, captions.text_P
    text_weight = captions.count_U.double()
    has_caption = torch.bincount(image_P, minlength=captions.num_images) > 0
    directions = {
        "image_to_text": (image_ND, text_UD, image_P, text_P, text_weight, has_caption.double()),
        "text_to_image": (text_UD, image_ND, text_P, image_P, None, text_weight),
    }
    result: dict[str, Any] = {}
    chance: dict[str, float] = {}
    for name, (query_QD, candidate_CD, query_P, right_P, weight_C, weight_Q) in directions.items():
        hit_QK = recall_at(query_QD, candidate_CD, query_P, right_P, candidate_weight_C=weight_C)
        guess_QK = chance_at(len(query_QD), len(candidate_CD), query_P, right_P, weight_C)
        result[name] = _named(_mean(hit_QK, weight_Q))
        guessed = _named(_mean(guess_QK, weight_Q))
        chance |= {f"{name}_{key}": value for key, value in guessed.items()}
    both = ("image_to_text", "text_to_image")
    result["mean_R@1"] = float(np.mean([result[name]["R@1"] for name in both]))
    result["num_images"] = captions.num_images
    result["num_texts"] = int(captions.count_U.sum())
    result["num_distinct_texts"] = len(captions.texts)
    chance["mean_R@1"] = float(np.mean([chance[f"{name}_R@1"] for name in both]))
    return {**result, "chance": chance}


def recall_at(
    query_QD: Tensor,
    candidate_CD: Tensor,
    query_P: Tensor,
    right_P: Tensor,
    *,
    candidate_weight_C: Tensor | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
) -> Tensor:
    """How probably each query has a right candidate among its best k, ties being put in random order.

    Args:
        query_QD: features of the queries.
        candidate_CD: features of the candidates.
        query_P: query of each right pair.
        right_P: candidate of each right pair.
        candidate_weight_C: how many equal candidates each stands for (default: one).
        cutoffs: the k.
    Returns:
        Probabilities `[Q, K]`, float64, on the CPU: 0 or 1 where nothing is tied.
    """
    weight_C = _weights(candidate_weight_C, len(candidate_CD)).to(candidate_CD.device)
    order = torch.argsort(query_P, stable=True)
    query_P, right_P = query_P[order], right_P[order]
    hits = []
    for rows, score_QC in _blocks(query_QD, candidate_CD):
        inside = slice(*torch.searchsorted(query_P, torch.tensor([rows.start, rows.stop])).tolist())
        q = (query_P[inside] - rows.start).to(score_QC.device)
        c = right_P[inside].to(score_QC.device)
        right_score = score_QC[q, c]
        best_Q = score_QC.new_full((len(score_QC),), -torch.inf)
        best_Q.scatter_reduce_(0, q, right_score, "amax")
        above_Q = (score_QC > best_Q[:, None]).to(weight_C.dtype) @ weight_C
        tied_Q = (score_QC == best_Q[:, None]).to(weight_C.dtype) @ weight_C
        counted = weight_C[c] * (right_score == best_Q[q])
        right_Q = torch.zeros_like(tied_Q).scatter_add_(0, q, counted)
        hits.append(_hit_probability(above_Q, right_Q, tied_Q - right_Q, cutoffs).cpu())
    return torch.cat(hits)


def chance_at(
    num_queries: int,
    num_candidates: int,
    query_P: Tensor,
    right_P: Tensor,
    candidate_weight_C: Tensor | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
) -> Tensor:
    """What `recall_at` is on average over all orders of the candidates, `[Q, K]`."""
    weight_C = _weights(candidate_weight_C, num_candidates).double()
    right_Q = torch.zeros(num_queries, dtype=torch.float64)
    right_Q.scatter_add_(0, query_P, weight_C[right_P])
    return _hit_probability(torch.zeros_like(right_Q), right_Q, weight_C.sum() - right_Q, cutoffs)


def best_candidates(query_QD: Tensor, candidate_CD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and numbers of the k best candidates of each query, best first, on the CPU."""
    k = min(k, len(candidate_CD))
    tops = [score_QC.topk(k, dim=1) for _, score_QC in _blocks(query_QD, candidate_CD)]
    return torch.cat([top.values for top in tops]).cpu(), torch.cat([t.indices for t in tops]).cpu()


def _hit_probability(
    above_Q: Tensor, right_Q: Tensor, wrong_Q: Tensor, cutoffs: Sequence[int]
) -> Tensor:
    """Probability that a right candidate is in the first k.

    `above` candidates come first and are all wrong, then `right + wrong` in random order: the k -
    above places left are drawn without putting back, and miss with a product of shares.
    """
    above, right, wrong = above_Q.double(), right_Q.double(), wrong_Q.double()
    miss, hits = torch.ones_like(above), {}
    for place in range(max(cutoffs)):
        drawn = place - above  # from the tied ones, before this place
        share = (wrong - drawn).clamp(min=0) / (right + wrong - drawn).clamp(min=1)
        miss = torch.where(drawn >= 0, miss * share, miss)
        hits[place + 1] = torch.where(right > 0, 1 - miss, 0.0)
    return torch.stack([hits[k] for k in cutoffs], dim=1)


def _blocks(query_QD: Tensor, candidate_CD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    size = max(1, BLOCK_SCORES // len(candidate_CD))
    starts = [*range(0, len(query_QD), size), len(query_QD)]
    for start, stop in itertools.pairwise(starts):
        yield slice(start, stop), query_QD[start:stop] @ candidate_CD.T


def _weights(weight_C: Tensor | None, num_candidates: int) -> Tensor:
    # float32 counts exactly up to 2**24, and halves the memory of the comparisons.
    return torch.ones(num_candidates) if weight_C is None else weight_C.float()


def _mean(value_QK: Tensor, weight_Q: Tensor) -> Tensor:
    return (value_QK * weight_Q[:, None]).sum(dim=0) / weight_Q.sum()


def _named(value_K: Tensor) -> dict[str, float]:
    return {f"R@{k}": round(float(v), 6) for k, v in zip(CUTOFFS, value_K, strict=True)}
