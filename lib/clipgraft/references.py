"""References: trained models that another one learns from, run on every batch as it is trained on.

A reference sees what the model sees: the same augmented crops, resized to its own side, and the same captions, whole (as
far as its own context goes), whatever the phase makes of its texts. Captions come from the index as tokens where the
reference has the vocabulary of the data; else its own tokenizer reads them anew.
"""

# Shapes: B batch, C channels, H and W pixels, D embedding, L tokens

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft import devices
from clipgraft.checkpoint import load_reference
from clipgraft.config import ConfigError
from clipgraft.data.cached import ReferenceCache
from clipgraft.data.loader import Batch
from clipgraft.data.samples import Samples
from clipgraft.data.tokens import Tokenizer
from clipgraft.data.vocabulary import is_same_vocabulary
from clipgraft.loss_settings import ReferenceSettings
from clipgraft.losses.distillation import Projection
from clipgraft.misfits import interactive_misfit
from clipgraft.models.build import normalize, trimmed
from clipgraft.models.public import Encode
from clipgraft.objectives import ReferenceFeatures
from clipgraft.recipes import AugmentationSettings, PhaseSettings
from clipgraft.training_data import Data

log = logging.getLogger(__name__)


class OnlineReference:
    """A frozen model that encodes every batch.

    Attributes:
        dim: of its features.
    """

    sees_images = True

    def __init__(self, settings: ReferenceSettings, data: Data, device: torch.device) -> None:
        """Load it.

        Args:
            settings: which model, and how it is used.
            data: the training set, whose captions it reads.
            device: to run on.

        Raises:
            ConfigError: if there is no such model.
        """
        loaded = load_reference(settings)
        config = loaded.spec["config"]
        self.dim: int = config["embed_dim"]
        self._model = loaded.model.to(device).eval().requires_grad_(False)
        self._preprocess = loaded.spec["preprocess"]
        own_scale = self._model.logit_scale.exp()
        self._scale = own_scale if settings.scale is None else own_scale.new_tensor(settings.scale)
        self._text = text_reader(data, loaded.tokenizer, config["text_cfg"]["context_length"])
        log.info(
            "reference %s: image %d px, %d dimensions",
            settings.name,
            self._preprocess["size"],
            self.dim,
        )

    def features(self, images_BCHW: Tensor | None, batch: Batch) -> ReferenceFeatures:
        """Features of a batch, or a part of one.

        Args:
            images_BCHW: augmented, in 0..255, on the device of the reference.
            batch: says which captions were drawn.
        """
        assert images_BCHW is not None
        about = self._preprocess
        images_BCHW = resize(images_BCHW, about["size"], about["interpolation"])
        images_BCHW = normalize(images_BCHW, about["mean"], about["std"])
        text_BL = trimmed(self._model, self._text(batch)).contiguous()
        text_BL = devices.send(text_BL, images_BCHW.device)
        image_BD = self._model.encode_image(images_BCHW).float()
        text_BD = self._model.encode_text(text_BL).float()
        return ReferenceFeatures(
            F.normalize(image_BD, dim=1), F.normalize(text_BD, dim=1), self._scale
        )


class CachedReference:
    """A reference whose embeddings were computed before; the loader reads them along with each batch.

    Attributes:
        dim: of its features.
        cache: for the loader, which is given the caches of all references in their order.
    """

    sees_images = False

    def __init__(
        self,
        settings: ReferenceSettings,
        cache: ReferenceCache,
        first_column: int,
        device: torch.device,
    ) -> None:
        """Find its columns in what the loader reads.

        Args:
            settings: how it is used.
            cache: its embeddings.
            first_column: dimensions of the caches before it, images and texts.
            device: for the features.
        """
        self.dim, self.cache = cache.dim, cache
        self._columns = slice(first_column, first_column + 2 * cache.dim)
        self._scale = torch.tensor(settings.scale or cache.scale, device=device)
        log.info(
            "reference %s: embedded before, %d crops of each image, %d dimensions",
            settings.name,
            settings.crops,
            self.dim,
        )

    def features(self, images_BCHW: Tensor | None, batch: Batch) -> ReferenceFeatures:
        """Features of a batch, or a part of one; its images are those that were embedded, and not looked at."""
        assert batch.cached_BE is not None, "the loader was not given the cache"
        cached_BE = batch.cached_BE[:, self._columns].to(self._scale.device, non_blocking=True)
        image_BD, text_BD = cached_BE.float().split(self.dim, dim=1)
        return ReferenceFeatures(
            F.normalize(image_BD, dim=1), F.normalize(text_BD, dim=1), self._scale
        )


def open_cache(
    settings: PhaseSettings, number: int, data: Data, folder: Path | None
) -> ReferenceCache:
    """The embeddings of a reference of a phase.

    Args:
        settings: of the phase.
        number: of the reference.
        data: the training set.
        folder: outputs of `embed`.

    Raises:
        ConfigError: if there is no such folder, or if it is of another reference, other samples or other crops.
    """
    reference = settings.references[number]
    if folder is None:
        raise ConfigError(
            f"references: {reference.model} is cached, and its embeddings are not given. "
            f"Hint: --input reference_{number}=MANIFEST of `embed`"
        )
    expected = reference.model_dump(include={"model", "pretrained", "crops"})
    if reference.image_size is not None:
        expected["image_size"] = reference.image_size
    if reference.crops > 1:
        drawn = AugmentationSettings.model_fields.keys()
        expected["augmentation"] = settings.model_dump(mode="json", include=set(drawn))
    return ReferenceCache.open(folder, data.shards.samples_id, data.tokens.num_captions, expected)


def open_references(
    settings: PhaseSettings,
    dim: int,
    data: Data,
    device: torch.device,
    cached: Mapping[str, Path],
) -> list[OnlineReference | CachedReference]:
    """The references that a step of a phase needs the features of.

    Args:
        settings: of the phase.
        dim: of the model's features.
        data: the training set.
        device: to run on.
        cached: folders of the embeddings of cached ones, `reference_0` that of the first.

    Raises:
        ConfigError: if one cannot be loaded, or its dimension is not what a term needs.
    """
    if not settings.compares_with_references:
        return []
    references: list[OnlineReference | CachedReference] = []
    column = 0
    for number, each in enumerate(settings.references):
        if each.cached:
            cache = open_cache(settings, number, data, cached.get(f"reference_{number}"))
            references.append(CachedReference(each, cache, column, device))
            column += 2 * cache.dim
        else:
            references.append(OnlineReference(each, data, device))
        misfit = interactive_misfit(settings, each.model, dim, references[-1].dim)
        if misfit:
            raise ConfigError(misfit)
    return references


def projections_of(
    settings: PhaseSettings,
    dim: int,
    references: Sequence[OnlineReference | CachedReference],
    seed: int,
) -> list[Projection | None]:
    """What feature distillation projects features with, for each reference; None where dimensions are equal."""
    needed = [bool(settings.distillation.feature) and each.dim != dim for each in references]
    return [
        Projection(dim, each.dim, seed + number) if is_needed else None
        for number, (each, is_needed) in enumerate(zip(references, needed, strict=True))
    ]


def resize(images_BCHW: Tensor, side: int, interpolation: str) -> Tensor:
    """Images in 0..255 at another side; as they are, if they have it."""
    if images_BCHW.shape[-2:] == (side, side):
        return images_BCHW
    resized_BCHW = F.interpolate(
        images_BCHW.float(), (side, side), mode=interpolation, antialias=True
    )
    return resized_BCHW.clamp(0, 255)  # bicubic overshoots


def text_reader(
    data: Data, tokenizer: Path | Encode, text_length: int
) -> Callable[[Batch], Tensor]:
    """What makes token ids int64 [B, L] of the captions that a batch drew.

    Args:
        data: the training set.
        tokenizer: its file, or open_clip's own, which knows its length.
        text_length: tokens per caption, of a file's.
    """
    tokens = data.tokens
    if isinstance(tokenizer, Path) and is_same_vocabulary(tokenizer, tokens.tokenizer):
        return lambda batch: torch.from_numpy(tokens.encode(batch.captions_B.numpy(), text_length))
    samples = Samples.open(data.index)
    encode: Callable[[list[str]], np.ndarray | Tensor] = (
        partial(Tokenizer(tokenizer).encode_batch, text_length=text_length)
        if isinstance(tokenizer, Path)
        else tokenizer
    )

    def read(batch: Batch) -> Tensor:
        rows_B, caption_B = batch.rows_B.numpy(), batch.captions_B.numpy()
        place_B = caption_B - tokens.captions_of(rows_B)[0]
        pairs = zip(rows_B, place_B, strict=True)
        texts = [samples.captions(row)[place] for row, place in pairs]
        return torch.as_tensor(encode(texts))

    return read
