"""Stage `embed`: image and text embeddings of the whole training set by one model, row = sample."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft import dist
from clipgraft.checkpoint import load_model
from clipgraft.data.crops import center_boxes, whole_boxes
from clipgraft.data.reduce import spread
from clipgraft.lean import open_clip
from clipgraft.meter import LOG_SECONDS
from clipgraft.models.build import normalize
from clipgraft.settings import EmbedSettings
from clipgraft.train import Data, device_name

log = logging.getLogger(__name__)

BATCH = 256


def embed(
    settings: EmbedSettings, model: Path, index: Path, shard: Path, out: Path
) -> dict[str, Any]:
    """Write `image.npy` and `text.npy` [N, D] float16, L2-normalised, and `embed.json`.

    Images come from the shards, resized as in training; their middle or the whole, as the model wants, never augmented; in float32, so that clusters do not depend on the hardware's bf16.
    With several processes each fills its own rows of the same files.

    Args:
        settings: what the text embedding of a sample with several captions is.
        model: model folder.
        index: folder with tokens.
        shard: folder with images.
        out: folder to write.
    Returns:
        Facts for the manifest.
    """
    with dist.world() as world, torch.inference_mode():
        data = Data.open(index, shard)
        loaded = load_model(model)
        clip, spec = loaded.model, loaded.spec
        clip.to(world.device).eval()
        num, dim = len(data.shards), spec["config"]["embed_dim"]
        if world.is_first:
            for side in ("image", "text"):
                _allocate(out / f"{side}.npy", (num, dim))
        dist.barrier()
        image_ND, text_ND = (
            np.load(out / f"{side}.npy", mmap_mode="r+") for side in ("image", "text")
        )
        log.info("%s samples with %s", f"{num:,}", device_name(world.device))
        start = spoke = time.monotonic()
        for first in range(world.rank * BATCH, num, world.size * BATCH):
            rows_B = np.arange(first, min(first + BATCH, num))
            image_ND[rows_B] = _images(clip, spec, data, rows_B).cpu().numpy()
            text_ND[rows_B] = _texts(clip, spec, data, rows_B, settings.captions).cpu().numpy()
            if time.monotonic() - spoke > LOG_SECONDS:
                spoke = time.monotonic()
                rate = (rows_B[-1] + 1) / (spoke - start)
                log.info(
                    "%s of %s samples  %s/s", f"{rows_B[-1] + 1:,}", f"{num:,}", f"{rate:,.0f}"
                )
        for array_ND in (image_ND, text_ND):
            array_ND.flush()
        dist.barrier()
        if world.is_first:
            about = {"samples_id": data.shards.samples_id, "num_samples": num, "dim": dim}
            (out / "embed.json").write_text(json.dumps(about, indent=1) + "\n")
    return {"num_samples": num, "dim": dim}


def _allocate(path: Path, shape: tuple[int, int]) -> None:
    """An empty float16 array on disk, with its room reserved: a full disk must not kill by SIGBUS."""
    array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)


def _images(
    clip: open_clip.CustomTextCLIP, spec: dict[str, Any], data: Data, rows_B: np.ndarray
) -> Tensor:
    preprocess = spec["preprocess"]
    size = preprocess["size"]
    pixels_BHWC = np.empty((len(rows_B), size, size, 3), np.uint8)
    boxes = whole_boxes if preprocess["resize_mode"] == "squash" else center_boxes
    data.shards.squares(rows_B, boxes(*data.shards.sizes(rows_B)), pixels_BHWC)
    batch = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).to(clip.logit_scale.device)
    images = normalize(batch, preprocess["mean"], preprocess["std"])
    return clip.encode_image(images, normalize=True)


def _texts(
    clip: open_clip.CustomTextCLIP,
    spec: dict[str, Any],
    data: Data,
    rows_B: np.ndarray,
    captions: str,
) -> Tensor:
    device, length = clip.logit_scale.device, spec["config"]["text_cfg"]["context_length"]
    first_B, count_B = data.tokens.captions_of(rows_B)
    if captions == "first":
        count_B = np.ones_like(count_B)
    text_CL = torch.from_numpy(data.tokens.encode(spread(first_B, count_B), length)).to(device)
    features_CD = torch.cat(
        [clip.encode_text(part, normalize=True) for part in text_CL.split(BATCH)]
    )
    owner_C = torch.from_numpy(np.repeat(np.arange(len(rows_B)), count_B)).to(device)
    sums_BD = features_CD.new_zeros(len(rows_B), features_CD.shape[1])
    return F.normalize(sums_BD.index_add_(0, owner_C, features_CD), dim=1)
