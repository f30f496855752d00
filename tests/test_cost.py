"""What a phase costs, against torch's FLOP counter, models on the meta device and published figures."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from typing import Any

import open_clip
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipgraft import cost
from clipgraft.architectures import OURS, architecture
from clipgraft.config import ConfigError
from clipgraft.model_settings import ModelSettings
from clipgraft.models import backends
from clipgraft.models.build import build
from clipgraft.models.moe import insert_experts
from clipgraft.recipes import PhaseSettings

CLIPA = ["ViT-L-14-CLIPA", "ViT-H-14-CLIPA", "ViT-bigG-14-CLIPA", "ViT-H-14-CLIPA-336"]
OURS_BY_NAME = [path.stem for path in sorted(OURS.glob("*.json"))]


def named(name: str) -> dict[str, Any]:
    return architecture(ModelSettings(name=name))


def phase(image_size: int, text_length: int, **more: Any) -> PhaseSettings:
    plain = {"name": "x", "samples_seen": 1000, "batch_size": 16, "optim": {"lr": 1e-3}}
    return PhaseSettings(**{**plain, "image_size": image_size, "text_length": text_length, **more})


def wide(config: dict[str, Any]) -> dict[str, Any]:
    """The tiny config with towers of different depth and MLP."""
    config = copy.deepcopy(config)
    config["vision_cfg"] |= {"mlp_ratio": 3.3, "layers": 3}
    config["text_cfg"] |= {"mlp_ratio": 2.0}
    return config


def test_macs_are_half_of_the_flops_that_torch_counts(tiny_config):
    config = wide(tiny_config)
    model = build(config).train()
    images, text = torch.randn(4, 3, 16, 16), torch.randint(1, 40, (4, 8))
    with FlopCounterMode(display=False) as counter:
        model.encode_image(images), model.encode_text(text)
    assert counter.get_total_flops() == 4 * 2 * cost.forward_macs(config, 5, 8)


def test_a_training_step_is_three_forward_passes(tiny_config):
    """But for the stem, which needs no gradient of its input."""
    model = build(tiny_config).train()
    images, text = torch.randn(4, 3, 16, 16), torch.randint(1, 40, (4, 8))
    with FlopCounterMode(display=False) as counter:
        (model.encode_image(images).sum() + model.encode_text(text).sum()).backward()
    stem = 4 * 2 * 4 * 3 * 8**2 * 32
    expected = 4 * cost.FLOPS_PER_MAC * cost.forward_macs(tiny_config, 5, 8) - stem
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


MOE = {"num_experts": 3, "top_k": 2, "image_layers": [0, 2], "text_layers": [1]}
PARTS = {
    "dense, all": (cost.Trained("all"), None),
    "dense, image locked": (cost.Trained("all", image_layers=()), None),
    "dense, MLPs": (cost.Trained("mlps"), None),
    "dense, some MLPs": (cost.Trained("mlps", image_layers=[1], text_layers=()), None),
    "dense, nothing": (cost.Trained(), None),
    "mixture, routers": (cost.Trained("routers"), MOE),
    "mixture, experts": (cost.Trained("experts"), MOE),
    "mixture, all": (cost.Trained("all"), MOE),
    "mixture, nothing": (cost.Trained(), MOE),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_trained_costs_what_torch_counts(tiny_config, name, monkeypatch):
    """Exactly: whatever is frozen, dense or a mixture, and whichever block is the first that is trained."""
    monkeypatch.setattr(backends, "_row_step", lambda num_rows: 1)  # rows that nobody reads
    trained, moe = PARTS[name]
    config = wide(tiny_config)
    model = build(config).train()
    if moe:
        insert_experts(model, **moe)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    freeze(model, trained)
    images = torch.randn(4, 3, 16, 16)
    text = torch.cat([torch.randint(1, 38, (4, 7)), torch.full((4, 1), 39)], 1)  # no padding
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = model.encode_image(images).sum() + model.encode_text(text).sum()
        if features.requires_grad:
            features.backward()
    counted = counter.get_total_flops() / 4
    assert counted == cost.sample_flops(config, 5, 8, trained, moe)


def freeze(model: torch.nn.Module, trained: cost.Trained) -> None:
    """Leave only what is trained with a gradient, by the names of the parameters."""
    layers = {"visual": trained.image_layers, "text": trained.text_layers}
    for name, parameter in model.named_parameters():
        tower, number = name.split(".")[0], re.search(r"resblocks\.(\d+)", name)
        chosen = layers.get(tower, ())
        is_router, is_expert = (
            name.endswith("router"),
            ".mlp." in name and not name.endswith("router"),
        )
        parameter.requires_grad_(
            {
                "none": False,
                "all": chosen == "all",
                "mlps": is_expert and (chosen == "all" or int(number[1]) in chosen),
                "routers": is_router,
                "experts": is_router or name.split(".")[-1].startswith(("c_fc_", "c_proj_")),
            }[trained.weights]
        )


def test_published_costs_of_a_mixture():
    """Units of a dense forward pass, ViT-L/14 with top 2 of 4: forward 1.64, MLPs alone 2.67, routers alone 3.3."""
    config = named("ViT-L-14")
    moe = {"num_experts": 4, "top_k": 2, "image_layers": range(24), "text_layers": range(12)}
    forward = cost.sample_flops(config, 257, 248)
    assert forward == 2 * cost.forward_macs(config, 257, 248)
    assert cost.sample_flops(config, 257, 248, moe=moe) / forward == pytest.approx(1.64, abs=0.02)
    for weights, of, expected in (("all", None, 3.0), ("mlps", None, 2.67), ("routers", moe, 3.3)):
        flops = cost.sample_flops(config, 257, 248, cost.Trained(weights), of)
        assert flops / forward == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize(
    ("name", "gigaflops"), [("ViT-B-32", 14.78), ("ViT-B-16", 41.09), ("ViT-S-16", 12.58)]
)
def test_full_models_cost_what_open_clips_profile_says(name, gigaflops):
    config = named(name)
    patches = (224 // config["vision_cfg"]["patch_size"]) ** 2
    assert round(2 * cost.forward_macs(config, patches + 1, 77) / 1e9, 2) == gigaflops


def test_both_towers_of_b_32_cost_what_open_clips_profile_says():
    stem = 3 * 32**2 * 768 * 49
    assert round(2 * (cost.tower_macs(12, 768, 50) + stem) / 1e9, 2) == 8.82
    assert round(2 * cost.tower_macs(12, 512, 77) / 1e9, 2) == 5.96


@pytest.mark.parametrize("name", [*OURS_BY_NAME, *CLIPA, "ViT-B-32"])
def test_parameters_are_those_of_the_built_model(name):
    config = named(name)
    size, length = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    with torch.device("meta"):
        model = build(config)
    towers = [sum(p.numel() for p in tower.parameters()) for tower in (model.visual, model.text)]
    assert towers == list(cost.num_parameters(config, phase(size, length)))


def test_activations_are_what_autograd_keeps(tiny_config):
    """In bf16, on the CPU; weights are kept, too, and are counted as such."""
    tiny_config["vision_cfg"] |= {"width": 128, "head_width": 64, "layers": 4, "image_size": 64}
    tiny_config["text_cfg"] |= {"width": 64, "heads": 1, "layers": 3, "context_length": 16}
    model = build(tiny_config).train()
    weights = {p.data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, text = torch.randn(8, 3, 64, 64), torch.randint(1, 40, (8, 16))
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda x: x):
        features = model.encode_image(images), model.encode_text(text)
    assert features
    assert sum(kept.values()) / 8 == pytest.approx(
        cost.activation_bytes(tiny_config, 65, 16), rel=0.1
    )


@pytest.mark.parametrize(
    ("size", "patch", "tokens"),
    [
        *[(64, 16, 17), (80, 16, 26), (96, 16, 37), (112, 16, 50), (160, 16, 101), (224, 16, 197)],
        *[(70, 14, 26), (84, 14, 37), (112, 14, 65), (224, 14, 257), (336, 14, 577)],
    ],
)
def test_tokens_of_an_image_are_its_patches_and_the_class_token(tiny_config, size, patch, tokens):
    tiny_config["vision_cfg"]["patch_size"] = patch
    assert cost.image_tokens(tiny_config, phase(size, 8)) == tokens


@pytest.mark.parametrize(
    ("size", "patch", "reduction", "patches"),
    [
        (224, 14, {"kind": "random", "keep": 0.7}, 179),
        (336, 14, {"kind": "random", "keep": 0.6}, 345),
        (224, 16, "grid", 49),
        (224, 16, "block", 49),
        (224, 16, "random", 98),
        (224, 16, "resize", 196),
    ],
)
def test_patches_kept_by_a_strategy(tiny_config, size, patch, reduction, patches):
    tiny_config["vision_cfg"]["patch_size"] = patch
    assert cost.num_patches(tiny_config, phase(size, 8, image_reduction=reduction)) == patches


def test_cost_of_the_published_inverse_scaling_figure():
    """Units of 1e11 GMAC x samples, read off the figure: 2.56 G reduced samples, 131 M at full length, T = 32."""
    published = {
        "ViT-B-16": [(160, 0.274), (112, 0.162), (96, 0.134), (64, 0.090)],
        "ViT-L-16": [(160, 0.926), (112, 0.532), (96, 0.432), (64, 0.280)],
    }
    for name, points in published.items():
        config = named(name)
        full = cost.training_macs(config, phase(224, 32, samples_seen=131_072_000))
        for size, figure in points:
            macs = cost.training_macs(config, phase(size, 32, samples_seen=2_560_000_000)) + full
            assert macs / 1e20 == pytest.approx(figure, rel=0.04)


def test_what_cannot_be_counted_is_refused(tiny_config):
    tiny_config["vision_cfg"]["attentional_pool"] = True
    with pytest.raises(ConfigError, match=r"vision_cfg.attentional_pool = True is not known"):
        cost.forward_macs(tiny_config, 5, 8)


def test_defaults_are_open_clips():
    for ours, theirs in [
        (cost.VISION, open_clip.CLIPVisionCfg),
        (cost.TEXT, open_clip.CLIPTextCfg),
    ]:
        defaults = {field.name: field.default for field in dataclasses.fields(theirs)}
        assert ours.items() <= defaults.items()


def test_architectures_of_open_clip_are_read_as_open_clip_reads_them():
    for name in open_clip.list_models():
        assert named(name) == open_clip.get_model_config(name)


def test_an_architecture_of_ours_is_one_for_open_clip_too():
    open_clip.add_model_config(OURS)
    for name in OURS_BY_NAME:
        assert open_clip.get_model_config(name) == json.loads((OURS / f"{name}.json").read_text())
