"""Retrieval: recall at k between images and texts, with what random ranking would give beside it.

Two decisions shape it. A caption that several images have is right for all of them, and equal captions
are one candidate that stands for several: otherwise a model would be wrong for finding the same words.
(The protocol of published numbers, `five_captions`, counts a caption as right for its own image alone.)
And candidates with equal scores are taken in random order, in expectation: a model that gives the same
score to everything (collapsed, or an untrained one in low precision) scores chance, not 1 or 0.
Scores are computed and forgotten tile by tile, once for both directions; images x texts never exists as a whole.
"""

# Shapes: Q queries, C candidates, D embedding, P right pairs, K cut-offs, N images, U texts, T queries of a tile

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipgraft.config import ConfigError
from clipgraft.evaluation.rows import Rows

CUTOFFS = (1, 5, 10)
TILE = (8192, 2048)  # scores held at a time: 64 MiB
FIVE = 5  # captions of an image in Karpathy's protocol


@dataclass(frozen=True)
class Captions:
    """The captions of a data set as retrieval counts them.

    Attributes:
        texts: in order of appearance; under the protocol `all` distinct ones.
        count_U: how many captions each one stands for.
        image_P: image of each right (image, text) pair; sorted.
        text_P: text of each right pair.
        num_images: including images without a caption, which are candidates but no queries.
        protocol: `all`, `five_captions` or `each`.
    """

    texts: list[str]
    count_U: Tensor
    image_P: Tensor
    text_P: Tensor
    num_images: int
    protocol: str = "all"

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]], protocol: str = "all") -> Captions:
        """Count the captions of each image.

        Args:
            captions: of each image; under `five_captions` those that count.
            protocol: `all`: equal captions are one text, right for every image that has it; `five_captions` and
                `each`: every caption is a text of its own, right for its own image alone.
        Raises:
            ConfigError: if there is none.
        """
        flat = [text for texts in captions for text in texts]
        if not flat:
            raise ConfigError(
                f"retrieval needs captions, and none of the {len(captions):,} samples has one. "
                "Hint: set retrieval: false for this task"
            )
        image_M = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
        if protocol != "all":
            every_M, owner_M = torch.arange(len(flat)), torch.from_numpy(image_M)
            return cls(flat, torch.ones_like(every_M), owner_M, every_M, len(captions), protocol)
        number: dict[str, int] = {}
        text_M = np.array([number.setdefault(text, len(number)) for text in flat])
        pair_P = np.unique(image_M * len(number) + text_M)
        image_P, text_P = (torch.from_numpy(of) for of in np.divmod(pair_P, len(number)))
        count_U = torch.from_numpy(np.bincount(text_M))
        return cls(list(number), count_U, image_P, text_P, len(captions), protocol)


def first_five(captions: Sequence[Sequence[str]], where: str) -> list[list[str]]:
    """The first five captions of each image, as Karpathy's protocol has them.

    Raises:
        ConfigError: if an image has fewer.
    """
    short = [row for row, texts in enumerate(captions) if len(texts) < FIVE]
    if short:
        raise ConfigError(
            f"{where}.protocol = five_captions: {len(short):,} of {len(captions):,} images have fewer than five, "
            f"e.g. sample {short[0]} has {len(captions[short[0]])}. Hint: protocol: all"
        )
    return [list(texts[:FIVE]) for texts in captions]


def evaluate_retrieval(image_ND: Rows, text_UD: Rows, captions: Captions) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, and what random ranking gives.

    Args:
        image_ND: L2-normalised features of all images.
        text_UD: L2-normalised features of `captions.texts`.
        captions: which belong together.
    Raises:
        ConfigError: if images and texts are not embedded alike.
    """
    _check_alike(image_ND, text_UD)
    image_P, text_P, weight_U = captions.image_P, captions.text_P, captions.count_U.double()
    has_caption_N = (torch.bincount(image_P, minlength=captions.num_images) > 0).double()
    hits = recalls(image_ND, text_UD, image_P, text_P, weight_U)
    guesses = (
        chance_at(len(image_ND), len(text_UD), image_P, text_P, weight_U),
        chance_at(len(text_UD), len(image_ND), text_P, image_P),
    )
    ways = ("image_to_text", "text_to_image")
    result: dict[str, Any] = {"protocol": captions.protocol}
    chance: dict[str, float] = {}
    for way, hit_QK, guess_QK, weight_Q in zip(
        ways, hits, guesses, (has_caption_N, weight_U), strict=True
    ):
        result[way] = _named(_mean(hit_QK, weight_Q))
        guessed = _named(_mean(guess_QK, weight_Q))
        chance |= {f"{way}_{key}": value for key, value in guessed.items()}
    result["mean_R@1"] = float(np.mean([result[way]["R@1"] for way in ways]))
    result["num_images"] = captions.num_images
    result["num_texts"] = int(captions.count_U.sum())
    result["num_distinct_texts"] = len(set(captions.texts))
    chance["mean_R@1"] = float(np.mean([chance[f"{way}_R@1"] for way in ways]))
    return {**result, "chance": chance}


def recall_at(
    query_QD: Rows,
    candidate_CD: Rows,
    query_P: Tensor,
    right_P: Tensor,
    *,
    cutoffs: Sequence[int],
) -> Tensor:
    """How probably each query has a right candidate among its best k, ties being put in random order.

    Args:
        query_QD: features of the queries.
        candidate_CD: features of the candidates.
        query_P: query of each right pair.
        right_P: candidate of each right pair; no pair twice.
        cutoffs: the k.
    Returns:
        Probabilities `[Q, K]`, float64, on the CPU: 0 or 1 where nothing is tied.
    """
    weight_C = torch.ones(len(candidate_CD))
    queries = _Standing(len(query_QD), weight_C, max(cutoffs), candidate_CD.device)
    _compare(query_QD, candidate_CD, query_P, right_P, queries, None)
    return queries.hits(cutoffs)


def recalls(
    image_ND: Rows,
    text_UD: Rows,
    image_P: Tensor,
    text_P: Tensor,
    text_weight_U: Tensor,
) -> tuple[Tensor, Tensor]:
    """`recall_at` 1, 5 and 10 of images among texts and of texts among images, with every score computed once.

    Args:
        image_ND: features of the images.
        text_UD: features of the texts.
        image_P: image of each right pair.
        text_P: text of each right pair; no pair twice.
        text_weight_U: how many equal texts each stands for as a candidate.
    Returns:
        `[N, K]` and `[U, K]`.
    """
    device, most = text_UD.device, max(CUTOFFS)
    images = _Standing(len(image_ND), text_weight_U, most, device)
    texts = _Standing(len(text_UD), torch.ones(len(image_ND)), most, device)
    _compare(image_ND, text_UD, image_P, text_P, images, texts)
    return images.hits(CUTOFFS), texts.hits(CUTOFFS)


class _Standing:
    """How the best right candidate of each query stands among the wrong ones; filled tile by tile.

    Attributes:
        best_Q: its score.
        right_Q: weight of the right candidates that have it.
        above_Q: weight of the wrong candidates above it; no longer counted where it is hopeless.
        tied_Q: weight of the wrong candidates beside it.
    """

    def __init__(self, num: int, weight_C: Tensor, most: int, device: torch.device) -> None:
        """Begin before any score.

        Args:
            num: Q.
            weight_C: of the candidates.
            most: the largest cut-off.
            device: of the scores.
        """
        # float32 counts exactly up to 2**24, and halves the memory of the comparisons.
        self._weight_C, self._most = weight_C.float().to(device), most
        self.best_Q = torch.full((num,), -torch.inf, device=device)
        self.right_Q, self.above_Q, self.tied_Q = torch.zeros(3, num, device=device).unbind()

    def see_right(self, query_T: Tensor, candidate_T: Tensor, score_T: Tensor) -> None:
        """Scores of right pairs; all of them come before the first wrong one."""
        before_Q = self.best_Q
        self.best_Q = before_Q.scatter_reduce(0, query_T, score_T, "amax")
        self.right_Q[self.best_Q > before_Q] = 0
        counted_T = self._weight_C[candidate_T] * (score_T == self.best_Q[query_T])
        self.right_Q.scatter_add_(0, query_T, counted_T)

    def see_wrong(self, queries: slice, candidates: slice, score_TC: Tensor) -> None:
        """Scores of a tile, in which right pairs are -inf."""
        best_T = self.best_Q[queries]
        # Most queries have nothing to count in most tiles, or are beyond hope.
        counts_T = (score_TC.amax(1) >= best_T) & (self.above_Q[queries] < self._most)
        place_S = counts_T.nonzero().squeeze(1)
        score_SC, best_S1 = score_TC[place_S], best_T[place_S, None]
        weight_C = self._weight_C[candidates]
        place_S = place_S + queries.start
        self.above_Q[place_S] += (score_SC > best_S1).to(weight_C.dtype) @ weight_C
        self.tied_Q[place_S] += (score_SC == best_S1).to(weight_C.dtype) @ weight_C

    def hits(self, cutoffs: Sequence[int]) -> Tensor:
        """Probabilities [Q, K] of a hit."""
        parts = (self.above_Q.cpu(), self.right_Q.cpu(), self.tied_Q.cpu())
        return _hit_probability(*parts, cutoffs)


def _compare(
    row_RD: Rows,
    column_CD: Rows,
    row_P: Tensor,
    column_P: Tensor,
    rows: _Standing,
    columns: _Standing | None,
) -> None:
    """Fill the standing of rows and columns from the scores of all tiles.

    A score is needed twice, as a right one and beside wrong ones, and must have the same bits both times: tiles with
    right pairs are computed twice, as tiles. With captions in the order of their images these are few.
    """
    pairs = _Pairs.of(row_P, column_P, len(column_CD), row_RD.device)
    for is_first in (True, False):
        for i, j, r, c in _tiles(len(row_RD), len(column_CD), pairs if is_first else None):
            if c.start == 0 or is_first:
                row_TD = row_RD[r]
            score_TC = row_TD @ column_CD[c].T
            row_T, column_T = pairs.inside(i, j)
            if is_first:
                score_T = score_TC[row_T - r.start, column_T - c.start]
                rows.see_right(row_T, column_T, score_T)
                if columns is not None:
                    columns.see_right(column_T, row_T, score_T)
                continue
            score_TC[row_T - r.start, column_T - c.start] = -torch.inf
            rows.see_wrong(r, c, score_TC)
            if columns is not None:
                columns.see_wrong(c, r, score_TC.T)


@dataclass(frozen=True)
class _Pairs:
    """Right pairs in the order of their tiles.

    Attributes:
        row_P, column_P: of the scores.
        tile_P: number of the tile, row by row of tiles; rising. On the CPU.
        num_columns: tiles in a row of tiles.
    """

    row_P: Tensor
    column_P: Tensor
    tile_P: Tensor
    num_columns: int

    @classmethod
    def of(cls, row_P: Tensor, column_P: Tensor, num_candidates: int, device: Any) -> _Pairs:
        num_columns = -(-num_candidates // TILE[1])
        tile_P = row_P // TILE[0] * num_columns + column_P // TILE[1]
        order = torch.argsort(tile_P, stable=True)
        parts = (row_P[order].to(device), column_P[order].to(device), tile_P[order].cpu())
        return cls(*parts, num_columns)

    def inside(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of the pairs in one tile."""
        number = torch.tensor([0, 1]) + i * self.num_columns + j
        own = slice(*torch.searchsorted(self.tile_P, number).tolist())
        return self.row_P[own], self.column_P[own]

    def has(self, i: int, j: int) -> bool:
        """Whether there are any."""
        return len(self.inside(i, j)[0]) > 0


def _tiles(
    num_rows: int, num_columns: int, pairs: _Pairs | None
) -> Iterator[tuple[int, int, slice, slice]]:
    """Numbers and ranges of all tiles, row by row; if pairs are given, of those that have some."""
    for i, r in enumerate(range(0, num_rows, TILE[0])):
        for j, c in enumerate(range(0, num_columns, TILE[1])):
            if pairs is None or pairs.has(i, j):
                rows, columns = min(r + TILE[0], num_rows), min(c + TILE[1], num_columns)
                yield i, j, slice(r, rows), slice(c, columns)


def chance_at(
    num_queries: int,
    num_candidates: int,
    query_P: Tensor,
    right_P: Tensor,
    candidate_weight_C: Tensor | None = None,
) -> Tensor:
    """What `recall_at` 1, 5 and 10 is on average over all orders of the candidates, `[Q, K]`; of weight 1 by default."""
    weight_C = candidate_weight_C
    if weight_C is None:
        weight_C = torch.ones(num_candidates, dtype=torch.float64)
    right_Q = torch.zeros(num_queries, dtype=torch.float64)
    right_Q.scatter_add_(0, query_P, weight_C[right_P])
    return _hit_probability(torch.zeros_like(right_Q), right_Q, weight_C.sum() - right_Q, CUTOFFS)


def best_candidates(query_QD: Tensor, candidate_CD: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Scores and numbers of the k best candidates of each query, best first, on the CPU.

    Args:
        query_QD: a few.
        candidate_CD: any number.
        k: how many of them; all, if they are fewer.
    """
    num = len(candidate_CD)
    score_QB = query_QD.new_empty(len(query_QD), 0)
    number_QB = torch.empty_like(score_QB, dtype=torch.long)
    for start in range(0, num, TILE[0]):
        stop = min(start + TILE[0], num)
        own_QC = query_QD @ candidate_CD[start:stop].T
        numbers_QC = torch.arange(start, stop, device=own_QC.device).expand_as(own_QC)
        score_QB = torch.cat([score_QB, own_QC], 1)
        top = score_QB.topk(min(k, score_QB.shape[1]), dim=1)
        number_QB = torch.cat([number_QB, numbers_QC], 1).gather(1, top.indices)
        score_QB = top.values
    return score_QB.cpu(), number_QB.cpu()


def _check_alike(image_ND: Rows, text_UD: Rows) -> None:
    dims = (image_ND.shape[1], text_UD.shape[1])
    if dims[0] != dims[1]:
        raise ConfigError(
            f"the model embeds images in {dims[0]} numbers and texts in {dims[1]}, which cannot be compared. "
            "Hint: are both towers of one model? Look at its model.json"
        )


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


def _mean(value_QK: Tensor, weight_Q: Tensor) -> Tensor:
    return (value_QK * weight_Q[:, None]).sum(dim=0) / weight_Q.sum()


def _named(value_K: Tensor) -> dict[str, float]:
    return {f"R@{k}": round(float(v), 6) for k, v in zip(CUTOFFS, value_K, strict=True)}
