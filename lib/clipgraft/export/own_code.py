"""Folders for transformers with the code of the model in them: mixtures of experts, and what `CLIPModel` cannot hold."""

from __future__ import annotations

import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from clipgraft.aside import write_json
from clipgraft.checkpoint import Loaded, save_tensors
from clipgraft.config import ConfigError
from clipgraft.data.tokens import Tokenizer
from clipgraft.data.wordpiece import WordPieces
from clipgraft.export.forms import ANY, TEXT_SIZES, VISION_SIZES, Form, check_form, spelled_out
from clipgraft.export.hugging_face import write_image_processor, write_processor
from clipgraft.models.build import is_padding_unseen

log = logging.getLogger(__name__)

_MOST_APART = 0.01  # of the length of features
CODE = Path(__file__).with_name("modeling_clipgraft.py")
OUR_CODE = Form(
    "the code that goes beside the weights",
    vision=VISION_SIZES
    | dict.fromkeys(("no_ln_pre", "final_ln_after_pool", "ls_init_value"), ANY)
    | {"pool_type": ("avg",)},
    text=TEXT_SIZES
    | dict.fromkeys(("no_causal_mask", "proj_bias", "ls_init_value", "eos_id"), ANY)
    | {"pool_type": ("first", "last")},
    logit_bias=True,
    hint="the format open_clip, for a dense model",
)
USAGE = """```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
inputs = processor(text=["a photo of a dog"], images=picture, return_tensors="pt", padding=True, truncation=True)
scores = model(**inputs).logits_per_image.softmax(dim=1)
```
"""


def write_code(loaded: Loaded, out: Path) -> None:
    """Write both towers, their code, tokenizer and image processor.

    Raises:
        ConfigError: names what the code cannot do.
    """
    check_form(loaded.spec["config"], OUR_CODE)
    names = {
        "AutoModel": "ClipgraftModel",
        "AutoModelForZeroShotImageClassification": "ClipgraftModel",
    }
    write_json(out / "config.json", _config(loaded, names) | {"text_cfg": _text_config(loaded)})
    _write_weights(loaded, out, "")
    write_processor(loaded, out, "CLIPProcessor")
    _check(loaded, out, names["AutoModel"])


def write_vision_code(loaded: Loaded, out: Path) -> None:
    """Write the image tower alone, its code and image processor.

    Raises:
        ConfigError: names what the code cannot do.
    """
    check_form({**loaded.spec["config"], "text_cfg": {}}, OUR_CODE)
    names = {"AutoModel": "ClipgraftVisionModel"}
    write_json(out / "config.json", _config(loaded, names) | {"text_cfg": None})
    _write_weights(loaded, out, "visual.")
    write_image_processor(loaded.spec["preprocess"], out, "CLIPImageProcessor")
    _check(loaded, out, names["AutoModel"])


def _check(loaded: Loaded, out: Path, name: str) -> None:
    """Hold what was written against the model itself: its code is a copy, which an edit of the model's own leaves behind."""
    if find_spec("transformers") is None:
        log.warning("its code was not tried, which needs the package transformers")
        return
    from clipgraft.export import modeling_clipgraft as code

    model, config = loaded.model, code.ClipgraftConfig.from_pretrained(out)
    written = getattr(code, name)(config).eval()
    written.load_state_dict(load_file(out / "model.safetensors"))
    size, length = config.image_size, loaded.spec["config"]["text_cfg"]["context_length"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    texts = torch.from_numpy(Tokenizer(loaded.tokenizer).encode_batch(["a dog", "two"], length))
    with torch.inference_mode():
        pooled = written.visual.pool(written.visual.states(images)[-1])
        found = {"images": (pooled @ model.visual.proj, model.encode_image(images))}
        if config.text_cfg:
            found["texts"] = (written.text(texts), model.encode_text(texts))
    for what, (theirs, ours) in found.items():
        # Rounding alone may send a token to another expert, which changes little.
        if (theirs - ours).norm() > _MOST_APART * ours.norm():
            raise ConfigError(
                f"the code beside the weights gives other features of {what} than the model. Hint: what was changed in how "
                f"a model computes has to be changed in export/{CODE.name}, too"
            )


def _config(loaded: Loaded, names: dict[str, str]) -> dict[str, Any]:
    config = loaded.spec["config"]
    module = {auto: f"{CODE.stem}.{name}" for auto, name in names.items()}
    return {
        "architectures": [names["AutoModel"]],
        "model_type": "clipgraft",
        "auto_map": {"AutoConfig": f"{CODE.stem}.ClipgraftConfig", **module},
        "torch_dtype": "float32",
        "embed_dim": config["embed_dim"],
        "quick_gelu": bool(config.get("quick_gelu")),
        "has_logit_bias": config.get("init_logit_bias") is not None,
        "vision_cfg": spelled_out(config)[0],
        "moe": loaded.spec["moe"],
    }


def _text_config(loaded: Loaded) -> dict[str, Any]:
    return {
        **spelled_out(loaded.spec["config"])[1],
        "has_end_token": loaded.tokenizer.name != WordPieces.file,
        "sees_padding": not is_padding_unseen(loaded.model.text),
    }


def _write_weights(loaded: Loaded, out: Path, prefix: str) -> None:
    state = {
        name: tensor.contiguous()
        for name, tensor in loaded.model.state_dict().items()
        if name.startswith(prefix) and not (prefix and name == "visual.proj")
    }
    for name in state.keys() & {"logit_scale", "logit_bias"}:
        state[name] = state[name].reshape(())  # [1] where the config asks for that
    save_tensors(state, out / "model.safetensors")
    shutil.copyfile(CODE, out / CODE.name)
