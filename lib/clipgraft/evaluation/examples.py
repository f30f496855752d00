"""Examples of retrieval for the report: a few queries each way, evenly spread, the same for every model."""

# Shapes: N images, U texts, D embedding

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipgraft.evaluation.retrieval import Captions, best_candidates
from clipgraft.evaluation.rows import Rows, spread

NUM_EXAMPLES = 8  # queries each way
NUM_RETRIEVED = 5


def retrieval_examples(image_ND: Rows, text_UD: Rows, captions: Captions) -> dict[str, Any]:
    """A few queries each way, evenly spread over the data set, with what was retrieved."""
    image_P, text_P = captions.image_P, captions.text_P
    images, texts = (few(of.unique()) for of in (image_P, text_P))
    texts_of = {image: text_P[image_P == image].tolist() for image in images}
    images_of = {text: image_P[text_P == text].tolist() for text in texts}
    scores, found = best_candidates(image_ND[images], text_UD, NUM_RETRIEVED)
    to_text = [
        {
            "row": image,
            "captions": [captions.texts[u] for u in texts_of[image]],
            "top": [
                {"text": captions.texts[u], "score": round(score, 4), "hit": u in texts_of[image]}
                for score, u in zip(scores[i].tolist(), found[i].tolist(), strict=True)
            ],
        }
        for i, image in enumerate(images)
    ]
    scores, found = best_candidates(text_UD[texts], image_ND, NUM_RETRIEVED)
    to_image = [
        {
            "text": captions.texts[u],
            "rows": images_of[u][:NUM_RETRIEVED],
            "top": [
                {"row": row, "score": round(score, 4), "hit": row in images_of[u]}
                for score, row in zip(scores[i].tolist(), found[i].tolist(), strict=True)
            ],
        }
        for i, u in enumerate(texts)
    ]
    return {"image_to_text": to_text, "text_to_image": to_image}


def few(items: Tensor) -> list[int]:
    """A few of them, evenly spread."""
    chosen: list[int] = items[torch.from_numpy(spread(len(items), NUM_EXAMPLES))].tolist()
    return chosen
