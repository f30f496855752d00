"""One model of a run, ready to encode single pictures and texts, and to say which expert each of their tokens chose."""

# Shapes: D embedding, U texts, H height, W width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.data.images import prepare
from clipgraft.data.tokens import Tokenizer
from clipgraft.evaluation.choices import Recorder, TowerChoices
from clipgraft.evaluation.encode import encoder_of_texts, true_float32
from clipgraft.evaluation.ensemble import load_side_by_side
from clipgraft.models.build import normalize


@dataclass(frozen=True)
class Encoder:
    """A model on its device.

    Attributes:
        model: in evaluation mode.
        spec: as in `model.json`.
        tokenizer: its own.
        device: where it is.
    """

    model: nn.Module
    spec: dict[str, Any]
    tokenizer: Tokenizer
    device: torch.device

    @classmethod
    def open(cls, folders: Sequence[Path]) -> Encoder:
        """Read a model, or several side by side, to the device if there is one.

        Raises:
            ConfigError: if it cannot be read.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_side_by_side(folders)
        model = loaded.model.to(device).eval().requires_grad_(False)
        return cls(model, loaded.spec, Tokenizer(loaded.tokenizer), device)

    @property
    def scale(self) -> float:
        """What cosines are multiplied with before a softmax; of models side by side the mean of theirs."""
        models = getattr(self.model, "models", [self.model])
        return float(np.mean([model.logit_scale.exp().item() for model in models]))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, of a model that is not several."""
        rows, columns = self.model.visual.grid_size  # type: ignore[union-attr,misc]
        return int(rows), int(columns)

    def see(self, pixels_HW3: np.ndarray) -> tuple[np.ndarray, TowerChoices | None]:
        """Unit features [D] of a picture, and which expert its patches chose, if the image tower has experts."""
        about = self.spec["preprocess"]
        square = self.square(pixels_HW3, about["size"])
        image = torch.from_numpy(square.copy()).permute(2, 0, 1)[None].to(self.device)
        recorder = self._recorder()
        with torch.inference_mode(), true_float32():
            features = self.model.encode_image(normalize(image, about["mean"], about["std"]))  # type: ignore[operator]
            recorder.see_images(1)
        return _unit(features)[0], recorder.towers().get("image")

    def read(self, text: str) -> tuple[np.ndarray, TowerChoices | None]:
        """Unit features [D] of a text, and which expert its tokens chose, if the text tower has experts."""
        recorder = self._recorder()
        with torch.inference_mode(), true_float32():
            features = self._texts(recorder.see_texts)([text])
        return _unit(features)[0], recorder.towers().get("text")

    def texts(self) -> Callable[[list[str]], Tensor]:
        """A function from texts to unit features on the device."""
        return self._texts(None)

    def square(self, pixels_HW3: np.ndarray, size: int) -> np.ndarray:
        """A picture as the model sees it, but for its size."""
        about = self.spec["preprocess"]
        return prepare(pixels_HW3, size, about["resize_mode"], about["interpolation"])

    def _recorder(self) -> Recorder:
        """Of one picture or one text."""
        special_ids = (self.tokenizer.start_id, self.tokenizer.end_id)
        num_items, shown = {"image": 1, "text": 1}, {"image": [0], "text": [0]}
        return Recorder(self.model, special_ids, num_items, shown)

    def _texts(self, watch: Callable[[Any], None] | None) -> Callable[[list[str]], Tensor]:
        length = int(self.spec["config"]["text_cfg"]["context_length"])
        return encoder_of_texts(self.model, self.tokenizer, length, self.device, watch=watch)


def _unit(features_UD: Tensor) -> np.ndarray:
    return F.normalize(features_UD.float(), dim=-1).cpu().numpy()
