"""Encoding in training: from a batch to the features of the model, and of the references that it learns from."""

# Shapes: B batch, C channels, H and W pixels, L tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft import devices
from clipgraft.data.augment import augment
from clipgraft.data.loader import Batch
from clipgraft.models.build import normalize, trimmed
from clipgraft.models.training_blocks import tell_padding
from clipgraft.objectives import Features, Reference, ReferenceFeatures, encode
from clipgraft.recipes import AugmentationSettings


@dataclass(frozen=True)
class Encoding:
    """How batches, or parts of one, are encoded.

    Attributes:
        model: that is trained.
        preprocess: its `mean` and `std`.
        references: see the same pictures.
        augmentation: of these pictures.
        device: of all.
        dtype: what autocast computes in.
    """

    model: nn.Module
    preprocess: Mapping[str, Any]
    references: Sequence[Reference]
    augmentation: AugmentationSettings
    device: torch.device
    dtype: torch.dtype

    def features(self, model: nn.Module, batch: Batch) -> Features:
        """Those of the model; called is `model`, which may be what all processes have of it.

        Texts are a sample's drawn and short one in turn, where there are two, and no longer than they have to be.
        """
        pixels_BCHW = self._pixels(batch)
        if batch.image_bits_B is not None:
            self.model.visual.image_bits_B = batch.image_bits_B.to(self.device, non_blocking=True)
        images_BCHW = normalize(pixels_BCHW, self.preprocess["mean"], self.preprocess["std"])
        text_BL = batch.text_BL
        if batch.short_BL is not None:
            text_BL = torch.stack([text_BL, batch.short_BL], 1).flatten(0, 1)
        text_BL = trimmed(self.model, text_BL).contiguous()
        experts = getattr(self.model.text, "moe_state", None)
        if experts is not None:
            experts.tell_real_tokens(text_BL, self.device)
        tell_padding(self.model, text_BL, self.device)
        with self._autocast():
            return encode(model, images_BCHW, devices.send(text_BL, self.device))

    def of_references(self, parts: Sequence[Batch]) -> list[ReferenceFeatures]:
        """Those of each reference, of all parts together."""
        if not self.references:
            return []
        encoded, are_seen = [], any(each.sees_images for each in self.references)
        with torch.no_grad(), self._autocast():
            for part in parts:
                pixels_BCHW = self._pixels(part) if are_seen else None
                encoded.append([each.features(pixels_BCHW, part) for each in self.references])
        return [ReferenceFeatures.of_parts(each) for each in zip(*encoded, strict=True)]

    def _pixels(self, batch: Batch) -> Tensor:
        uniform_BK = batch.uniform_BK
        if uniform_BK is not None:
            uniform_BK = uniform_BK.to(self.device, non_blocking=True)
        pixels_BCHW = batch.images_BCHW.to(self.device, non_blocking=True)
        return augment(pixels_BCHW, uniform_BK, self.augmentation)

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)
