"""Examples of retrieval for the report: a few queries each way, evenly spread, the same for every model."""

# Shapes: N images, U texts, D embedding

from __future__ import annotations

from typing import Any

import numpy as np

from clipgraft.evaluation.retrieval import Captions, best_candidates
from clipgraft.evaluation.rows import Rows

NUM_EXAMPLES = 8  # queries each way
NUM_RETRIEVED = 5


def retrieval_examples(image_ND: Rows, text_UD: Rows, captions: Captions) -> dict[str, Any]:
    """A few queries each way, evenly spread over the data set, with what was retrieved."""
    right = set(zip(captions.image_P.tolist(), captions.text_P.tolist(), strict=True))
    texts_of: dict[int, list[int]] = {}
    images_of: dict[int, list[int]] = {}
    for image, text in sorted(right):
        texts_of.setdefault(image, []).append(text)
        images_of.setdefault(text, []).append(image)
    images = spread(sorted(texts_of))
    scores, found = best_candidates(image_ND[images], text_UD, NUM_RETRIEVED)
    to_text = [
        {
            "row": image,
            "captions": [captions.texts[u] for u in texts_of[image]],
            "top": [
                {"text": captions.texts[u], "score": round(score, 4), "hit": (image, u) in right}
                for score, u in zip(scores[i].tolist(), found[i].tolist(), strict=True)
            ],
        }
        for i, image in enumerate(images)
    ]
    texts = spread(sorted(images_of))
    scores, found = best_candidates(text_UD[texts], image_ND, NUM_RETRIEVED)
    to_image = [
        {
            "text": captions.texts[u],
            "rows": images_of[u][:NUM_RETRIEVED],
            "top": [
                {"row": row, "score": round(score, 4), "hit": (row, u) in right}
                for score, row in zip(scores[i].tolist(), found[i].tolist(), strict=True)
            ],
        }
        for i, u in enumerate(texts)
    ]
    return {"image_to_text": to_text, "text_to_image": to_image}


def spread(items: list[int]) -> list[int]:
    """A few of them, evenly spread."""
    places = np.linspace(0, len(items) - 1, min(NUM_EXAMPLES, len(items)))
    return [items[int(place)] for place in places]
