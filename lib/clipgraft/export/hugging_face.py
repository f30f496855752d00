"""Folders for transformers: `CLIPModel` where that can hold the model, or else our own code beside the weights.

`CLIPModel` is OpenAI's architecture: features of the class token, a norm before the first block, causal text, no experts.
Any sizes, vocabulary and position tables go. What goes beyond needs `trust_remote_code`, and is asked for by `code`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.aside import write_json
from clipgraft.checkpoint import Loaded, save_tensors
from clipgraft.data.tokens import Tokenizer
from clipgraft.export.forms import ANY, TEXT_SIZES, VISION_SIZES, Form, check_form, spelled_out
from clipgraft.export.tokenizer import write_tokenizer

CLIP_MODEL = Form(
    "transformers' CLIPModel",
    vision=VISION_SIZES | {"final_ln_after_pool": ANY},  # of the class token alone it is the same
    text=TEXT_SIZES,
    logit_bias=False,
    hint="--code writes the code of the model beside it, which needs trust_remote_code=True; or the format open_clip",
)
USAGE = """```python
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("FOLDER"), CLIPProcessor.from_pretrained("FOLDER")
inputs = processor(text=["a photo of a dog"], images=picture, return_tensors="pt", padding=True, truncation=True)
scores = model(**inputs).logits_per_image.softmax(dim=1)
```
"""


def write_clip_model(loaded: Loaded, out: Path) -> None:
    """Write a `CLIPModel` with its tokenizer and image processor.

    Raises:
        ConfigError: names what it cannot hold.
    """
    config = loaded.spec["config"]
    check_form(config, CLIP_MODEL)
    write_json(out / "config.json", _clip_config(loaded))
    state = {**vision_state(loaded.model.state_dict()), **_text_state(loaded.model.state_dict())}
    save_tensors(state, out / "model.safetensors")
    write_processor(loaded, out, "CLIPProcessor")


def write_processor(loaded: Loaded, out: Path, processor: str) -> None:
    """Write tokenizer and image processor."""
    write_tokenizer(loaded.tokenizer, loaded.spec["config"]["text_cfg"]["context_length"], out)
    write_image_processor(loaded.spec["preprocess"], out, processor)


def write_image_processor(preprocess: dict[str, Any], out: Path, processor: str) -> None:
    """Write how images are prepared; see `workflow/docs/export.md` for where a pixel may differ."""
    side = {"height": preprocess["size"], "width": preprocess["size"]}
    is_squashed = preprocess["resize_mode"] == "squash"
    about = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side if is_squashed else {"shortest_edge": preprocess["size"]},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess["interpolation"]],  # Pillow's numbers
        "do_center_crop": not is_squashed,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess["mean"],
        "image_std": preprocess["std"],
    }
    write_json(out / "preprocessor_config.json", about)


def vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """`CLIPVisionConfig` of a model."""
    vision, _ = spelled_out(config)
    return {
        "model_type": "clip_vision_model",
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "num_channels": 3,
        **_tower_config(config, vision, vision["width"] // vision["head_width"]),
    }


def vision_state(state: dict[str, Tensor], prefix: str = "vision_model.") -> dict[str, Tensor]:
    """Weights of the image tower by transformers' names."""
    embeddings = f"{prefix}embeddings."
    return {
        f"{embeddings}class_embedding": state["visual.class_embedding"].clone(),
        f"{embeddings}patch_embedding.weight": state["visual.conv1.weight"].clone(),
        f"{embeddings}position_embedding.weight": state["visual.positional_embedding"].clone(),
        **_norm(state, "visual.ln_pre", f"{prefix}pre_layrnorm"),  # so spelt there
        **_norm(state, "visual.ln_post", f"{prefix}post_layernorm"),
        **_blocks(state, "visual.transformer", f"{prefix}encoder"),
    }


def _clip_config(loaded: Loaded) -> dict[str, Any]:
    config, scale = loaded.spec["config"], loaded.model.logit_scale
    _, text = spelled_out(config)
    tokenizer = Tokenizer(loaded.tokenizer)
    special = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "logit_scale_init_value": float(scale),
        "torch_dtype": "float32",
        "vision_config": vision_config(config),
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            **special,
            "pad_token_id": tokenizer.end_id,
            **_tower_config(config, text, text["heads"]),
        },
    }


def _tower_config(config: dict[str, Any], tower: dict[str, Any], num_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": num_heads,
        "projection_dim": config["embed_dim"],
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
    }


def _text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    embeddings = "text_model.embeddings."
    return {
        f"{embeddings}token_embedding.weight": state["text.token_embedding.weight"].clone(),
        f"{embeddings}position_embedding.weight": state["text.positional_embedding"].clone(),
        **_norm(state, "text.ln_final", "text_model.final_layer_norm"),
        **_blocks(state, "text.transformer", "text_model.encoder"),
        "text_projection.weight": state["text.text_projection"].T.contiguous(),
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "logit_scale": state["logit_scale"].reshape(()).clone(),
    }


def _blocks(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """Each block; its one matrix of attention inputs is three there."""
    found: dict[str, Tensor] = {}
    num_blocks = sum(name.startswith(f"{ours}.") and name.endswith("ln_1.bias") for name in state)
    for number in range(num_blocks):
        block, layer = f"{ours}.resblocks.{number}", f"{theirs}.layers.{number}"
        for kind in ("weight", "bias"):
            parts = state[f"{block}.attn.in_proj_{kind}"].chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                found[f"{layer}.self_attn.{letter}_proj.{kind}"] = part.clone()
            for name, other in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                found[f"{layer}.{other}.{kind}"] = state[f"{block}.{name}.{kind}"].clone()
        found |= _norm(state, f"{block}.ln_1", f"{layer}.layer_norm1")
        found |= _norm(state, f"{block}.ln_2", f"{layer}.layer_norm2")
    return found


def _norm(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{theirs}.{kind}": state[f"{ours}.{kind}"].clone() for kind in ("weight", "bias")}
