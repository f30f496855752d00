"""CLIP-MoE's checkpoints to model folders; `clipgraft.export` has the way back.

    python -m clipgraft.clipmoe read WEIGHTS FOLDER [--top-k 2]

WEIGHTS are `.pt` (a state dict, as theirs) or `.safetensors`. The folder is one like any other: it can be evaluated.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clipgraft.checkpoint import TOKENIZERS, save_model
from clipgraft.config import ConfigError
from clipgraft.data.vocabulary import clip_merges, is_same_vocabulary, write_merges
from clipgraft.lean import open_clip
from clipgraft.models.released import read_released

log = logging.getLogger(__name__)


def read(weights: Path, folder: Path, top_k: int = 2) -> None:
    """Make a model folder of a checkpoint.

    Args:
        weights: CLIP-MoE's; or a dense one of its making, of Long-CLIP or of OpenAI.
        folder: is made.
        top_k: experts per token.

    Raises:
        ConfigError: if the checkpoint is no such model, or the folder is there.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists. Hint: the name of a new folder")
    model, spec = read_released(weights, top_k)
    with tempfile.TemporaryDirectory() as name:
        tokenizer = Path(name, TOKENIZERS[0])
        write_merges(tokenizer, clip_merges())
        check_words(spec, tokenizer, f"{weights} has")
        folder.mkdir(parents=True)
        save_model(folder, model, spec, tokenizer)
    log.info("%s: %s", folder, _in_words(model, spec))


def check_words(spec: Mapping[str, Any], tokenizer: Path, what: str) -> None:
    """Make sure that a model reads texts with CLIP's vocabulary, as CLIP-MoE does.

    Args:
        spec: of the model.
        tokenizer: its file.
        what: for the message, with a verb.

    Raises:
        ConfigError: if it does not.
    """
    rows, clips = spec["config"]["text_cfg"]["vocab_size"], open_clip.CLIPTextCfg.vocab_size
    is_clips = is_same_vocabulary(tokenizer, Path(open_clip.tokenizer.default_bpe()))
    if rows != clips or not is_clips:
        raise ConfigError(
            f"{what} a table of {rows:,} tokens, CLIP-MoE reads texts with CLIP's {clips:,}. Hint: models trained with "
            "`index: {vocabulary: full}`"
        )


def _in_words(model: torch.nn.Module, spec: Mapping[str, Any]) -> str:
    moe, num = spec["moe"], sum(p.numel() for p in model.parameters())
    if moe is None:
        return f"dense, {num:,} parameters"
    return (
        f"{moe['num_experts']} experts, top {moe['top_k']}, in {len(moe['image_layers'])} image and "
        f"{len(moe['text_layers'])} text layers, {num:,} parameters"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    reading = verbs.add_parser("read", help="a model folder of a checkpoint")
    reading.add_argument("weights", type=Path)
    reading.add_argument("folder", type=Path)
    reading.add_argument("--top-k", type=int, default=2, help="experts per token")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        read(given.weights, given.folder, given.top_k)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
