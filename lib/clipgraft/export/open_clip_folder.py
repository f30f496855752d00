"""A folder that open_clip opens by itself: `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

Weights have open_clip's names already. Its own tokenizer reads CLIP's whole vocabulary only, or a path that would not
travel; every other vocabulary goes the way of Hugging Face's tokenizers, which open_clip takes from the folder.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from clipgraft.aside import write_json
from clipgraft.checkpoint import Loaded, save_tensors
from clipgraft.config import ConfigError
from clipgraft.data.vocabulary import is_same_vocabulary
from clipgraft.export.tokenizer import write_tokenizer
from clipgraft.lean import open_clip
from clipgraft.models.build import is_padding_unseen

USAGE = """```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
image, text = preprocess(picture)[None], tokenizer(["a photo of a dog"])
scores = model.encode_image(image, normalize=True) @ model.encode_text(text, normalize=True).T
```

If `tokenizer.json` is in the folder, the tokenizer needs the package `transformers`.
"""


def write_open_clip(loaded: Loaded, out: Path) -> None:
    """Write `open_clip_config.json`, `open_clip_model.safetensors` and, if need be, tokenizer files.

    Raises:
        ConfigError: if the model has experts, or open_clip could not read its texts.
    """
    if loaded.spec["moe"]:
        raise ConfigError(
            "open_clip has no mixtures of experts. Hint: hugging_face, or clip_moe; or export one of its experts"
        )
    config = copy.deepcopy(loaded.spec["config"])
    config.pop("cast_dtype", None)  # open_clip gives it itself
    text = config["text_cfg"]
    if not is_same_vocabulary(loaded.tokenizer, Path(open_clip.tokenizer.default_bpe())):
        _read_by_hugging_face(loaded, text)
        write_tokenizer(loaded.tokenizer, text["context_length"], out)
    about = {"model_cfg": config, "preprocess_cfg": loaded.spec["preprocess"]}
    write_json(out / "open_clip_config.json", about)
    state = {name: tensor.contiguous() for name, tensor in loaded.model.state_dict().items()}
    save_tensors(state, out / "open_clip_model.safetensors")


def _read_by_hugging_face(loaded: Loaded, text: dict[str, Any]) -> None:
    """Say so in `text_cfg`, in place."""
    if loaded.tokenizer.suffix == ".txt":  # WordPiece
        text.setdefault("hf_tokenizer_name", "bert-base-uncased")
        return
    if not is_padding_unseen(loaded.model.text):
        raise ConfigError(
            "open_clip pads a vocabulary of one's own with the end token, and this model sees its padding, which was 0. "
            "Hint: `index: {vocabulary: full}`, or the format hugging_face with --code"
        )
    text["hf_tokenizer_name"] = "clip"  # only that there is one counts: it is read from the folder
    text["tokenizer_kwargs"] = {"clean": "lower"}
