"""Stage `embed`: image and text embeddings of the whole training set by one model, row = sample.

Two kinds of models are embedded with. An expert, for the clustering of the next round: one embedding of the picture and
one of the captions of each sample. And a reference, for training to read instead of running it: all captions, and the
picture as in evaluation or several random crops, which training then shows as well.

Both read shards. Those of a reference have its own image size, so that what is stored depends on nothing but the data and
the reference; where a phase has the same size and `oversize` they are the phase's own, and the reference sees the very
bytes that the model will. (Originals would be decoded once less, but at full size, on the machine with the devices; and
the crops of training come from shards.)
"""

# Shapes: N samples, A stored crops of each, C captions, D embedding, B batch, L tokens

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft import dist
from clipgraft.checkpoint import Loaded, Reference, load_model, load_reference
from clipgraft.data.augment import augment, augments
from clipgraft.data.cached import ABOUT
from clipgraft.data.filling import Filling
from clipgraft.data.loader import Batch, Loader
from clipgraft.data.parallel import Progress
from clipgraft.data.reduce import spread
from clipgraft.data.sampler import Rows
from clipgraft.data.samples import Captions, picture_sizes
from clipgraft.data.tokens import Tokenizer, Tokens
from clipgraft.data.vocabulary import is_same_vocabulary
from clipgraft.devices import device_name
from clipgraft.evaluation.encode import true_float32
from clipgraft.models.build import normalize, trimmed
from clipgraft.models.public import Encode
from clipgraft.recipes import AugmentationSettings
from clipgraft.settings import EmbedSettings, ReferenceJob
from clipgraft.training_data import Data

log = logging.getLogger(__name__)

BATCH = 256
_WHOLE = AugmentationSettings(crop_scale=(1.0, 1.0))  # the middle square, and nothing else

# Of samples first .. stop - 1: the first row of text.npy, and the rows from there on.
Texts = Callable[[int, int], tuple[int, Tensor]]


def embed(
    settings: EmbedSettings,
    model: Path,
    index: Path,
    shard: Path,
    out: Path,
    *,
    threads: int = 1,
    resume: Path | None = None,
    tag: str = "",
) -> dict[str, Any]:
    """Write `image.npy` and `text.npy` [N, D] float16, L2-normalised, and `embed.json`.

    Images come from the shards, resized as in training; their middle or the whole, as the model wants, never augmented;
    in float32, so that clusters do not depend on the hardware's bf16.
    With several processes each fills its own rows of the same files, and so does each job of several (`dist.part`): what
    gathers them is the one that runs after them, which finds no rows left to fill.

    Args:
        settings: what the text embedding of a sample with several captions is.
        model: model folder.
        index: folder with tokens.
        shard: folder with images.
        out: folder to write.
        threads: for decoding.
        resume: where unfinished work is kept; it is continued if its tag is the same.
        tag: settings, inputs and code.
    Returns:
        Facts for the manifest.
    """
    with dist.world() as world, torch.no_grad(), true_float32():
        data = Data.open(index, shard)
        encoder = _Encoder.of(load_model(model), world.device)
        num, dim = len(data.shards), encoder.dim
        shapes = {"image.npy": (num, dim), "text.npy": (num, dim)}
        filling = _filling(resume or out / ".filling", tag, shapes, num, world)

        def texts(first: int, stop: int) -> tuple[int, Tensor]:
            rows_B = np.arange(first, stop)
            return first, _mean_texts(encoder, data.tokens, rows_B, settings.captions)

        _fill(filling, encoder, data, texts, _WHOLE, threads=threads)
        if dist.part():
            filling.leave()
            return {}
        filling.finish(out, world, is_kept=resume is not None)
        if world.is_first:
            about = {"samples_id": data.shards.samples_id, "num_samples": num, "dim": dim}
            (out / "embed.json").write_text(json.dumps(about, indent=1) + "\n")
    return {"num_samples": num, "dim": dim}


def embed_reference(
    settings: ReferenceJob,
    index: Path,
    shard: Path,
    out: Path,
    *,
    threads: int = 1,
    resume: Path | None = None,
    tag: str = "",
) -> dict[str, Any]:
    """Write what `data/cached.py` describes, L2-normalised; in float32.

    Args:
        settings: which model, and how many crops.
        index: folder with captions.
        shard: folder with images.
        out: folder to write.
        threads: as of `embed`.
        resume: as of `embed`.
        tag: as of `embed`.
    Returns:
        Facts for the manifest.
    """
    with dist.world() as world, torch.no_grad(), true_float32():
        data = Data.open(index, shard)
        loaded = load_reference(settings, settings.image_size)
        encoder = _Encoder.of(loaded, world.device)
        num, num_captions = len(data.shards), data.tokens.num_captions
        shapes = {
            "image.npy": (num, settings.crops, encoder.dim),
            "text.npy": (num_captions, encoder.dim),
        }
        filling = _filling(resume or out / ".filling", tag, shapes, num, world)
        read = caption_reader(data, loaded.tokenizer, encoder.text_length)

        def texts(first: int, stop: int) -> tuple[int, Tensor]:
            return data.tokens.span_of(first, stop)[0], encoder.texts(read(first, stop))

        log.info("%s captions, %d crops of each sample", f"{num_captions:,}", settings.crops)
        _fill(
            filling,
            encoder,
            data,
            texts,
            settings.augmentation or _WHOLE,
            num_crops=settings.crops,
            seed=settings.seed,
            sizes_N2=picture_sizes(index) if settings.crops > 1 else None,
            threads=threads,
        )
        if dist.part():
            filling.leave()
            return {}
        filling.finish(out, world, is_kept=resume is not None)
        about = settings.model_dump(mode="json") | {
            "samples_id": data.shards.samples_id,
            "num_samples": num,
            "num_captions": num_captions,
            "dim": encoder.dim,
            "scale": encoder.model.logit_scale.exp().item(),
        }
        if world.is_first:
            if settings.crops > 1:
                np.save(out / "sizes.npy", picture_sizes(index))
            (out / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return {key: about[key] for key in ("num_samples", "num_captions", "dim")}


def caption_reader(
    data: Data, tokenizer: Path | Encode, text_length: int
) -> Callable[[int, int], Tensor]:
    """What makes token ids int64 [C, L] of all captions of samples first .. stop - 1.

    Args:
        data: the training set.
        tokenizer: its file, or open_clip's own, which knows its length.
        text_length: tokens per caption, of a file's.
    """
    tokens, captions = data.tokens, Captions(data.index)
    if not isinstance(tokenizer, Path):
        return lambda first, stop: tokenizer(captions.of_rows(first, stop))
    if is_same_vocabulary(tokenizer, tokens.tokenizer):
        return lambda first, stop: torch.from_numpy(
            tokens.encode(np.arange(*tokens.span_of(first, stop)), text_length)
        )
    own = Tokenizer(tokenizer)
    return lambda first, stop: torch.from_numpy(
        own.encode_batch(captions.of_rows(first, stop), text_length)
    )


@dataclass(frozen=True)
class _Encoder:
    """A model on its device, and how it wants its input."""

    model: torch.nn.Module
    spec: dict[str, Any]
    device: torch.device

    @classmethod
    def of(cls, loaded: Loaded | Reference, device: torch.device) -> _Encoder:
        return cls(loaded.model.to(device).eval(), loaded.spec, device)

    @property
    def dim(self) -> int:
        return int(self.spec["config"]["embed_dim"])

    @property
    def text_length(self) -> int:
        return int(self.spec["config"]["text_cfg"]["context_length"])

    def images(self, batch: Batch, augmentation: AugmentationSettings) -> Tensor:
        uniform_BK = None if batch.uniform_BK is None else batch.uniform_BK.to(self.device)
        pixels_BCHW = batch.images_BCHW.to(self.device, non_blocking=True)
        pixels_BCHW = augment(pixels_BCHW, uniform_BK, augmentation)
        about = self.spec["preprocess"]
        images_BCHW = normalize(pixels_BCHW, about["mean"], about["std"])
        return self.model.encode_image(images_BCHW, normalize=True)

    def texts(self, text_CL: Tensor) -> Tensor:
        parts = [
            self.model.encode_text(  # type: ignore[operator]
                trimmed(self.model, part).to(self.device), normalize=True
            )
            for part in text_CL.split(BATCH)
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class _Chunks:
    """The loader's sampler: chunks of neighbours, all crops of one after the other; the crop counts as the visit."""

    numbers: np.ndarray
    num_samples: int
    num_crops: int
    batch_size: int = BATCH

    def batch(self, step: int) -> Rows:
        """Rows of a chunk."""
        place, crop = divmod(step, self.num_crops)
        rows_B = np.arange(*_span(int(self.numbers[place]), self.num_samples))
        return Rows(rows_B, np.full(len(rows_B), crop))


def _fill(
    filling: Filling,
    encoder: _Encoder,
    data: Data,
    texts: Texts,
    augmentation: AugmentationSettings,
    *,
    num_crops: int = 1,
    seed: int = 0,
    sizes_N2: np.ndarray | None = None,
    threads: int = 1,
) -> None:
    """Fill this process's chunks of both arrays."""
    num, chunks = len(data.shards), filling.own_todo
    preprocess = encoder.spec["preprocess"]
    loader = Loader(
        data.shards,
        data.tokens,
        _Chunks(chunks, num, num_crops),
        image_size=preprocess["size"],
        text_length=3,  # not read
        crop_scale=augmentation.crop_scale,
        seed=seed,
        num_threads=threads,
        num_steps=len(chunks) * num_crops,
        augment=augments(augmentation),
        pin_memory=encoder.device.type == "cuda",
        sizes=None if sizes_N2 is None else lambda rows_B: tuple(sizes_N2[rows_B].astype(int).T),
        squash=num_crops == 1 and preprocess["resize_mode"] == "squash",
    )
    log.info(
        "%s samples with %s%s",
        f"{num:,}",
        device_name(encoder.device),
        f"   {filling.num_done * BATCH:,} done before" if filling.num_done else "",
    )
    spans = [_span(chunk, num) for chunk in chunks.tolist()]
    batches = iter(loader)
    progress = Progress("embedded", sum(stop - first for first, stop in spans), "samples")
    for chunk, (first, stop) in zip(chunks.tolist(), spans, strict=True):
        crops = [encoder.images(next(batches), augmentation) for _ in range(num_crops)]
        row, text_BD = texts(first, stop)  # read while the device is at the images
        # Crop after crop: rows of [N, A, D] as of [N, D].
        filling.write("image.npy", first, torch.cat(crops, 1).cpu().numpy())
        filling.write("text.npy", row, text_BD.cpu().numpy())
        filling.mark(chunk)
        progress.add(stop - first)


def _filling(
    folder: Path, tag: str, shapes: dict[str, tuple[int, ...]], num_samples: int, world: dist.World
) -> Filling:
    num_chunks = -(-num_samples // BATCH)
    return Filling(folder, tag, shapes, num_chunks, world, dist.part() or (0, 1))


def _span(chunk: int, num_samples: int) -> tuple[int, int]:
    return chunk * BATCH, min((chunk + 1) * BATCH, num_samples)


def _mean_texts(encoder: _Encoder, tokens: Tokens, rows_B: np.ndarray, captions: str) -> Tensor:
    """Mean of the features of a sample's captions, or of the first one, as unit rows [B, D]."""
    first_B, count_B = tokens.captions_of(rows_B)
    if captions == "first":
        count_B = np.ones_like(count_B)
    text_CL = torch.from_numpy(tokens.encode(spread(first_B, count_B), encoder.text_length))
    features_CD = encoder.texts(text_CL)
    owner_C = torch.from_numpy(np.repeat(np.arange(len(rows_B)), count_B)).to(encoder.device)
    sums_BD = features_CD.new_zeros(len(rows_B), features_CD.shape[1])
    return F.normalize(sums_BD.index_add_(0, owner_C, features_CD), dim=1)
