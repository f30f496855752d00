"""What a model answers, question by question, so that the report can say whether models agree.

Rates hide whether two models are right on the same pictures. For a few thousand pictures, the same ones for every
model, `answers.parquet` has the caption that is retrieved and the class that is said, and whether that is right.
"""

# Shapes: N images, U distinct captions, D embedding, C classes, Q rows that are asked about

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clipgraft.evaluation.retrieval import Captions, best_candidates
from clipgraft.evaluation.rows import Rows, spread

MAX_QUESTIONS = 2000
CAPTION = "caption"  # the question that is no label


def answers_of(
    image_ND: Rows,
    text_UD: Rows | None,
    captions: Captions | None,
    weights: Mapping[str, Tensor],
    label_Ns: Mapping[str, np.ndarray],
) -> pa.Table:
    """Answers of a model, evenly spread over the data set.

    Args:
        image_ND: L2-normalised features of all images.
        text_UD: of all captions; None without retrieval.
        captions: which belong to which image; None likewise.
        weights: label to the directions of its classes, `[C, D]`.
        label_Ns: label to the class of each image, -1 where it has none.
    Returns:
        `row`, and of each question its answer and `<question>_right`; null where there is no right answer.
    """
    num = len(image_ND)
    rows = spread(num, MAX_QUESTIONS)
    asked_QD = image_ND[torch.from_numpy(rows)]
    columns = {"row": pa.array(rows)}
    if text_UD is not None and captions is not None:
        _, best_Q1 = best_candidates(asked_QD, text_UD, 1)
        best_Q = best_Q1[:, 0].cpu().numpy()
        pairs = captions.image_P.numpy() * len(captions.texts) + captions.text_P.numpy()
        is_right_Q = np.isin(rows * len(captions.texts) + best_Q, pairs)
        has_one_Q = np.isin(rows, captions.image_P.numpy())
        columns |= _columns(CAPTION, best_Q, is_right_Q, has_one_Q)
    for label, weight_CD in weights.items():
        label_N = label_Ns[label]
        said_Q = (asked_QD @ weight_CD.T).argmax(dim=1).cpu().numpy()
        columns |= _columns(label, said_Q, said_Q == label_N[rows], label_N[rows] >= 0)
    return pa.table(columns)


def _columns(
    name: str, answer_Q: np.ndarray, is_right_Q: np.ndarray, has_one_Q: np.ndarray
) -> dict[str, pa.Array]:
    right = pa.array(is_right_Q, mask=~has_one_Q)
    return {name: pa.array(answer_Q), f"{name}_right": right}
