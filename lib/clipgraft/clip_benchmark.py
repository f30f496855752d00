"""CLIP_benchmark on our models, mixtures of experts included.

    python -m clipgraft.clip_benchmark eval --model_type clipgraft --model NAME --pretrained MODEL_FOLDER --dataset ...

All other words are CLIP_benchmark's own, which must be installed. It has no plugins, but a table of loaders: ours is
added before it reads its command line. NAME is what its results call the model.
"""

from __future__ import annotations

import sys
from typing import Any

import clipgraft
from clipgraft.config import ConfigError

MODEL_TYPE = "clipgraft"


def load_clipgraft(
    model_name: str, pretrained: str, cache_dir: str | None = None, device: str = "cpu"
) -> tuple[Any, Any, Any]:
    """What CLIP_benchmark asks of a loader: model, image transform, tokenizer.

    Args:
        model_name: not used; their results carry it.
        pretrained: a model folder.
        cache_dir: not used; nothing is downloaded.
        device: where the model goes.
    """
    try:
        return clipgraft.load(pretrained, device)
    except ConfigError as error:
        sys.exit(f"error: --pretrained: {error}")


def main() -> None:
    """Run CLIP_benchmark's command line with our loader."""
    try:
        from clip_benchmark import cli, models
    except ImportError as error:
        sys.exit(f"error: {error}. Hint: pip install clip-benchmark")
    models.TYPE2FUNC[MODEL_TYPE] = load_clipgraft
    models.MODEL_TYPES.append(MODEL_TYPE)
    cli.main()


if __name__ == "__main__":
    main()
