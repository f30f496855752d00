"""Pictures of an evaluation set: read one at a time, each with a name for messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from clipgraft.config import ConfigError
from clipgraft.data.images import BadImage, decode


@dataclass(frozen=True)
class Pictures:
    """Images in order.

    Attributes:
        names: of each, for messages.
        image_bytes: from its number to its bytes.
        notes: what is not as it should be, such as missing parts; told with the result.
    """

    names: Sequence[str]
    image_bytes: Callable[[int], bytes]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, row: int) -> np.ndarray:
        """The decoded image, uint8 RGB [height, width, 3].

        Raises:
            ConfigError: if it cannot be decoded.
        """
        try:
            return decode(self.image_bytes(row))
        except BadImage as error:
            raise ConfigError(
                f"{self.names[row]}: the image does not decode, {error}. Hint: download its data set again"
            ) from None
