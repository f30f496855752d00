"""CLIPA's released weights load: checkpoints of random numbers with the names and shapes that were published.

Names and shapes are spelled out here; models of full width but one block, and of full size without numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor

from clipgraft.architectures import architecture
from clipgraft.config import ConfigError
from clipgraft.model_settings import ModelSettings
from clipgraft.models.build import build, model_config, pretrained_state
from clipgraft.models.weights import check_fit

V1 = ["ViT-B-16-CL16", "ViT-L-16-CL16-Syntax-GAP", "ViT-L-16-CL8-Syntax-GAP", "ViT-L-16-CL32-GAP"]
V2 = ["ViT-L-14-CLIPA", "ViT-H-14-CLIPA-336", "ViT-bigG-14-CLIPA"]

# model: embedding, vocabulary; image width, hidden, depth, patch; text width, depth
SIZES = {
    "ViT-B-16-CL16": (512, 49408, (768, 3072, 12, 16), (512, 12)),
    "ViT-L-16-CL16-Syntax-GAP": (768, 49408, (1024, 4096, 24, 16), (768, 12)),
    "ViT-L-16-CL8-Syntax-GAP": (768, 49408, (1024, 4096, 24, 16), (768, 12)),
    "ViT-L-16-CL32-GAP": (768, 49408, (1024, 4096, 24, 16), (768, 12)),
    "ViT-L-14-CLIPA": (768, 32000, (1024, 4096, 24, 14), (768, 12)),
    "ViT-H-14-CLIPA-336": (1024, 32000, (1280, 5120, 32, 14), (1024, 24)),
    "ViT-bigG-14-CLIPA": (1280, 32000, (1664, 8192, 48, 14), (1280, 32)),
}


def blocks(tower: str, width: int, hidden: int, depth: int) -> Iterator[tuple[str, list[int]]]:
    for number in range(depth):
        block = f"{tower}transformer.resblocks.{number}."
        for norm in ("ln_1", "ln_2"):
            yield block + f"{norm}.weight", [width]
            yield block + f"{norm}.bias", [width]
        yield block + "attn.in_proj_weight", [3 * width, width]
        yield block + "attn.in_proj_bias", [3 * width]
        yield block + "attn.out_proj.weight", [width, width]
        yield block + "attn.out_proj.bias", [width]
        yield block + "mlp.c_fc.weight", [hidden, width]
        yield block + "mlp.c_fc.bias", [hidden]
        yield block + "mlp.c_proj.weight", [width, hidden]
        yield block + "mlp.c_proj.bias", [width]


def published(name: str, size: int, length: int, depth: int | None = None) -> dict[str, list[int]]:
    """Names and shapes of a released checkpoint, in the form of the class CLIP."""
    embed, vocabulary, (width, hidden, layers, patch), (text_width, text_layers) = SIZES[name]
    shapes = {
        "positional_embedding": [length, text_width],
        "text_projection": [text_width, embed],
        "logit_scale": [],
        "visual.class_embedding": [width],
        "visual.positional_embedding": [(size // patch) ** 2 + 1, width],
        "visual.proj": [width, embed],
        "visual.conv1.weight": [width, 3, patch, patch],
        "visual.ln_post.weight": [width],
        "visual.ln_post.bias": [width],
        "token_embedding.weight": [vocabulary, text_width],
        "ln_final.weight": [text_width],
        "ln_final.bias": [text_width],
    }
    if name in V1:
        shapes |= {"visual.ln_pre.weight": [width], "visual.ln_pre.bias": [width]}
    shapes |= dict(blocks("visual.", width, hidden, depth or layers))
    return shapes | dict(blocks("", text_width, 4 * text_width, depth or text_layers))


def random_state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}


def shallow(name: str) -> dict[str, Any]:
    config = architecture(ModelSettings(name=name))
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = 1
    return config


def features(model: torch.nn.Module, size: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    with torch.inference_mode():
        return model.eval().encode_image(torch.randn(2, 3, size, size)), model.encode_text(tokens)


def open_clips(config: dict[str, Any], state: dict[str, Tensor], size: int, length: int):
    """open_clip's own class with the checkpoint in it."""
    config = copy.deepcopy(config)
    config["vision_cfg"]["image_size"] = size
    config["text_cfg"]["context_length"] = length
    model = open_clip.CLIP(**config)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", [*V1, *V2])
def test_a_released_checkpoint_has_the_names_and_shapes_of_our_model(name):
    config = architecture(ModelSettings(name=name))
    size, length = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    with torch.device("meta"):
        model = build(config)
        state = {key: torch.empty(s) for key, s in published(name, size, length).items()}
    check_fit(convert_to_custom_text_state_dict(state), model, name)


def test_a_checkpoint_of_the_first_version_gives_open_clips_features(tmp_path: Path):
    """As its trainer saved it: names of the class CLIP behind `module.`, with the optimizer beside them."""
    state = random_state(published("ViT-B-16-CL16", 112, 16, depth=1))
    behind = {f"module.{name}": tensor for name, tensor in state.items()}
    saved = {"epoch": 6, "name": "clipa", "state_dict": behind, "optimizer": {"state": {}}}
    torch.save(saved, tmp_path / "b16.pt")
    settings = ModelSettings(config=shallow("ViT-B-16-CL16"), pretrained=str(tmp_path / "b16.pt"))
    config = model_config(settings, 49408, 112, 16)
    model = build(config)
    model.load_state_dict(pretrained_state(settings, config))
    tokens = torch.tensor([[49406, 320, 1929, 49407] + [0] * 12, [49406, *range(9, 23), 49407]])
    theirs = open_clips(shallow("ViT-B-16-CL16"), state, 112, 16)
    for ours, other in zip(
        features(model, 112, tokens), features(theirs, 112, tokens), strict=True
    ):
        assert torch.allclose(ours, other, atol=1e-5)


def test_a_checkpoint_of_the_second_version_gives_open_clips_features(tmp_path: Path):
    """No class token in the mean, no causal mask, the last position of the text: all by open_clip's config."""
    state = random_state(published("ViT-L-14-CLIPA", 84, 8, depth=1))
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    path = str(tmp_path / "open_clip_pytorch_model.bin")
    settings = ModelSettings(config=shallow("ViT-L-14-CLIPA"), pretrained=path)
    config = model_config(settings, 30522, 84, 8)  # BERT's vocabulary, in a table of 32,000 rows
    model = build(config)
    model.load_state_dict(pretrained_state(settings, config))
    tokens = torch.tensor([[101, 1037, 3899, 0, 0, 0, 0, 0], [101, *range(2000, 2007)]])
    theirs = open_clips(shallow("ViT-L-14-CLIPA"), state, 84, 8)
    for ours, other in zip(features(model, 84, tokens), features(theirs, 84, tokens), strict=True):
        assert torch.allclose(ours, other, atol=1e-5)


def test_a_checkpoint_of_the_second_version_may_have_the_names_of_either_class(tmp_path: Path):
    state = random_state(published("ViT-L-14-CLIPA", 84, 8, depth=1))
    custom = convert_to_custom_text_state_dict(state)
    assert "text.token_embedding.weight" in custom
    config = shallow("ViT-L-14-CLIPA")
    loaded = []
    for number, form in enumerate((state, custom)):
        torch.save(form, tmp_path / f"{number}.pt")
        settings = ModelSettings(name="ViT-L-14-CLIPA", pretrained=str(tmp_path / f"{number}.pt"))
        loaded.append(pretrained_state(settings, config))
    assert all(torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])
    assert loaded[0]["visual.positional_embedding"].shape == (257, 1024)  # from 37
    assert loaded[0]["text.positional_embedding"].shape == (32, 768)  # from 8


def test_weights_of_another_size_are_refused_by_name(tmp_path: Path):
    torch.save(random_state(published("ViT-B-16-CL16", 112, 16, depth=1)), tmp_path / "b16.pt")
    settings = ModelSettings(name="ViT-L-16-CL16-Syntax-GAP", pretrained=str(tmp_path / "b16.pt"))
    with pytest.raises(ConfigError, match="holds another architecture"):
        pretrained_state(settings, shallow("ViT-L-16-CL16-Syntax-GAP"))


def test_weights_with_the_names_of_transformers_are_said_to_be_so(tmp_path: Path):
    torch.save({"vision_model.post_layernorm.weight": torch.ones(8)}, tmp_path / "hf.pt")
    settings = ModelSettings(name="ViT-L-14-CLIPA", pretrained=str(tmp_path / "hf.pt"))
    with pytest.raises(ConfigError, match=r"hf\.pt has transformers' names .*Hint: .*open_clip"):
        pretrained_state(settings, shallow("ViT-L-14-CLIPA"))
