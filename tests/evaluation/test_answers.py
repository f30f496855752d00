"""Laws of what models answer, against a plain loop."""

import numpy as np
import torch
import torch.nn.functional as F

from clipgraft.evaluation.answers import MAX_QUESTIONS, answers_of
from clipgraft.evaluation.retrieval import Captions

CAPTIONS = [["a", "b"], ["c"], [], ["c"], ["d"]]  # the third has none; two share one


def features(num: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num, 6, generator=generator), dim=-1)


def test_answers_are_the_nearest_and_right_where_they_belong_to_the_image():
    captions = Captions.of(CAPTIONS)
    image_ND, text_UD, weight_CD = features(5, 0), features(len(captions.texts), 1), features(3, 2)
    label_N = np.array([0, 1, 2, -1, 1])
    rows = answers_of(
        image_ND, text_UD, captions, {"shape": weight_CD}, {"shape": label_N}
    ).to_pylist()
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]
    for row, image_D, texts, label in zip(rows, image_ND.double(), CAPTIONS, label_N, strict=True):
        scores = [float(image_D @ text_D) for text_D in text_UD.double()]
        assert row["caption"] == int(np.argmax(scores))
        is_right = captions.texts[row["caption"]] in texts if texts else None
        assert row["caption_right"] == is_right
        said = int(np.argmax([float(image_D @ weight_D) for weight_D in weight_CD.double()]))
        assert row["shape"] == said
        assert row["shape_right"] == (None if label < 0 else said == label)


def test_large_sets_are_asked_evenly_and_without_retrieval_about_classes_alone():
    num = 3 * MAX_QUESTIONS
    labels = np.zeros(num, np.int64)
    table = answers_of(features(num, 0), None, None, {"shape": features(2, 1)}, {"shape": labels})
    assert table.column_names == ["row", "shape", "shape_right"]
    rows = table["row"].to_numpy()
    assert len(rows) == MAX_QUESTIONS and (rows[0], rows[-1]) == (0, num - 1)
    assert set(np.diff(rows)) <= {2, 3, 4}
