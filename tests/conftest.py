"""What many tests start from: no network, and a tiny model."""

import os
import runpy
from pathlib import Path
from typing import Any

import pytest

NO_NETWORK = Path(__file__).parent / "no_network"
os.environ["CLIPGRAFT_NO_NETWORK"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(NO_NETWORK), os.environ.get("PYTHONPATH")])
)
runpy.run_path(str(NO_NETWORK / "sitecustomize.py"))  # children get it by PYTHONPATH


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
