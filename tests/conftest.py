"""What many tests start from."""

from typing import Any

import pytest


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """The smallest open_clip model with two blocks in each tower: 16 px, 8 tokens of 40 words."""
    return {
        "embed_dim": 16,
        "quick_gelu": False,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "width": 32,
            "head_width": 16,
            "layers": 2,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2},
    }
