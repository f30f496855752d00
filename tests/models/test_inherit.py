import copy
import math
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.config import ConfigError
from clipgraft.model_settings import ModelSettings
from clipgraft.models.build import build, describe, model_config
from clipgraft.models.inherit import area_matrix, inherit, resample_kernel
from clipgraft.models.moe import insert_experts
from clipgraft.models.positions import TextResize

KERNEL, POSITIONS = "visual.conv1.weight", "visual.positional_embedding"


def described(model: nn.Module, config: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(model=model, spec=describe(config))


def started(config: dict[str, Any], reference: Any) -> nn.Module:
    state, config, _ = inherit(config, reference)
    model = build(config)
    model.load_state_dict(state)
    return model.eval()


def at_size(config: dict[str, Any], state: dict[str, Tensor], image_size: int) -> nn.Module:
    """open_clip's own model with these weights, at a size for which it resizes its positions itself."""
    config = copy.deepcopy(config)
    config["vision_cfg"]["image_size"] = image_size
    config.pop("custom_text", None)
    model = open_clip.CustomTextCLIP(**config).eval()
    state = dict(state)
    open_clip.model.resize_pos_embed(state, model)
    model.load_state_dict(state)
    return model


def by_areas(images_BCHW: Tensor, grid: int, patch: int, wanted: int) -> Tensor:
    """Each patch drawn so fine that both pixel sizes divide it, then averaged."""
    fine = math.lcm(patch, wanted)
    fine_BCHW = F.interpolate(images_BCHW, size=grid * fine, mode="nearest")
    return F.avg_pool2d(fine_BCHW, fine // wanted)


@pytest.fixture(scope="module")
def vit_b_32() -> SimpleNamespace:
    """An architecture of OpenAI's, with its activation and its temperature, and random weights."""
    torch.manual_seed(0)
    config = model_config(ModelSettings(name="ViT-B-32-quickgelu"), 49408, 224, 77)
    model = build(config, temperature=0.01).eval()
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)
    return described(model, config)


@pytest.fixture(scope="module")
def vit_b_16(vit_b_32) -> nn.Module:
    config = model_config(ModelSettings(name="ViT-B-16"), 49408, 224, 77)
    return started(config, vit_b_32)


@pytest.fixture(scope="module")
def on_doubled_images(vit_b_32) -> tuple[Tensor, Tensor]:
    """Images, and the features of the reference for them at twice the size."""
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    large = at_size(vit_b_32.spec["config"], vit_b_32.model.state_dict(), 448)
    with torch.inference_mode():
        features = large.encode_image(images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert (features[0] - features[1]).abs().max() > 0.01, "two images must differ"
    return images, features


def difference(student: nn.Module, on_doubled_images: tuple[Tensor, Tensor]) -> float:
    images, features = on_doubled_images
    with torch.inference_mode():
        return (student.encode_image(images) - features).abs().max().item()


def test_vit_b_16_starts_as_vit_b_32_on_images_of_twice_the_size(vit_b_16, on_doubled_images):
    assert difference(vit_b_16, on_doubled_images) < 1e-4


def test_text_and_temperature_of_vit_b_16_are_those_of_vit_b_32(vit_b_16, vit_b_32):
    text = torch.tensor([[49406, 320, 1929, 49407] + [0] * 73])
    with torch.inference_mode():
        assert torch.equal(vit_b_16.encode_text(text), vit_b_32.model.encode_text(text))
    assert vit_b_16.logit_scale.exp().item() == pytest.approx(100)


@pytest.mark.parametrize("lost", ["kernel", "sum", "positions", "class token", "activation"])
def test_each_part_of_the_start_shows(vit_b_16, on_doubled_images, lost):
    """What public code lost on the way makes another model of it, so the test above can fail."""
    student = copy.deepcopy(vit_b_16)
    tower = student.visual
    if lost == "kernel":
        nn.init.normal_(tower.conv1.weight, 0, 0.02)
    elif lost == "sum":
        tower.conv1.weight.data /= 4
    elif lost == "positions":
        nn.init.normal_(tower.positional_embedding, 0, 768**-0.5)
    elif lost == "class token":
        tower.positional_embedding.data[0] = 0
    else:
        for block in tower.transformer.resblocks:
            block.mlp.gelu = nn.GELU()
    assert difference(student, on_doubled_images) > 1e-3


@pytest.mark.parametrize(("patch", "wanted"), [(8, 4), (4, 8), (8, 8), (6, 4), (4, 6), (7, 5)])
def test_a_student_is_the_reference_on_images_resampled_by_areas(tiny_config, patch, wanted):
    torch.manual_seed(0)
    reference_config, student_config = copy.deepcopy(tiny_config), copy.deepcopy(tiny_config)
    reference_config["vision_cfg"] |= {"patch_size": patch, "image_size": 2 * patch}
    student_config["vision_cfg"] |= {"patch_size": wanted, "image_size": 3 * wanted}
    reference = described(build(reference_config).eval(), reference_config)
    student = started(student_config, reference)
    images = torch.randn(2, 3, 3 * wanted, 3 * wanted)
    large = at_size(reference_config, reference.model.state_dict(), 3 * patch)
    theirs = large.encode_image(by_areas(images, 3, wanted, patch))
    assert torch.allclose(student.encode_image(images), theirs, atol=1e-5)


def test_from_32_to_16_pixels_the_kernel_is_summed_over_squares_of_two():
    kernel = torch.randn(5, 3, 32, 32)
    assert torch.allclose(resample_kernel(kernel, (16, 16)), 4 * F.avg_pool2d(kernel, 2), atol=1e-6)


@pytest.mark.parametrize("sides", [(16, 16), (14, 14), (8, 4), (40, 40)])
def test_a_constant_patch_is_answered_alike_at_any_size(sides):
    kernel = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    resampled = resample_kernel(kernel, sides)
    assert torch.allclose(resampled.sum((2, 3)), kernel.sum((2, 3)), atol=1e-12)


def test_resampling_by_areas_covers_each_pixel_once():
    matrix = area_matrix(7, 5)
    assert torch.allclose(matrix.sum(1), torch.ones(5).double())
    assert torch.allclose(matrix.sum(0), torch.full((7,), 5 / 7).double())
    assert torch.equal(area_matrix(3, 3), torch.eye(3).double())


def test_the_activation_and_its_options_are_the_references(tiny_config):
    theirs = copy.deepcopy(tiny_config) | {"quick_gelu": True}
    _, config, done = inherit(tiny_config, described(build(theirs), theirs))
    assert (config["quick_gelu"], done["activation"]) == (True, "QuickGELU")
    theirs = copy.deepcopy(tiny_config)
    theirs["vision_cfg"]["act_kwargs"] = {"approximate": "tanh"}
    _, config, done = inherit(config, described(build(theirs), theirs))
    assert (config["quick_gelu"], done["activation"]) == (False, "GELU")
    assert config["vision_cfg"]["act_kwargs"] == {"approximate": "tanh"}


def test_what_was_done_is_told(tiny_config):
    config = copy.deepcopy(tiny_config)
    config["vision_cfg"] |= {"patch_size": 4}
    reference = described(build(tiny_config, temperature=0.02), tiny_config)
    reference.spec["preprocess"]["mean"] = [0.5, 0.5, 0.5]
    _, _, done = inherit(config, reference)
    assert done["patch"] == [[8, 8], [4, 4]]
    assert (done["image_positions"], done["text_positions"]) == ([5, 17], [8, 8])
    assert done["tau"] == 0.02
    assert done["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    assert "size" not in done["preprocess"]


def test_the_reference_and_the_config_stay_as_they_are(tiny_config):
    config = copy.deepcopy(tiny_config)
    reference = described(build(tiny_config), tiny_config)
    state, _, _ = inherit(config, reference)
    state["visual.proj"] += 1
    assert config == tiny_config
    assert not torch.equal(state["visual.proj"], reference.model.visual.proj)


@pytest.mark.parametrize("rule", ["linear", "pad"])
def test_texts_of_another_length_follow_the_rule_of_the_phase(tiny_config, rule):
    config = copy.deepcopy(tiny_config)
    config["text_cfg"]["context_length"] = 12
    reference = described(build(tiny_config), tiny_config)
    state, _, _ = inherit(config, reference, TextResize(rule))
    table, before = state["text.positional_embedding"], reference.model.text.positional_embedding
    assert table.shape == (12, 32)
    assert torch.equal(table[:8], before) == (rule == "pad")


def test_siglips_bias_comes_along_where_it_is_wanted(tiny_config):
    with_bias = copy.deepcopy(tiny_config) | {"init_logit_bias": -10.0}
    other = copy.deepcopy(tiny_config) | {"init_logit_bias": -3.0}
    biased, plain = (
        described(build(with_bias), with_bias),
        described(build(tiny_config), tiny_config),
    )
    assert inherit(other, biased)[0]["logit_bias"] == -10
    assert inherit(other, plain)[0]["logit_bias"] == -3
    assert "logit_bias" not in inherit(tiny_config, biased)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["vision_cfg"].update(width=64), r"width is 64, the model has 32"),
        (lambda c: c["vision_cfg"].update(layers=3), r"vision_cfg.layers is 3, the model has 2"),
        (lambda c: c["text_cfg"].update(layers=1), r"text.*resblocks.1.*is missing"),
        (lambda c: c["text_cfg"].update(vocab_size=50), r"token_embedding.*\[50, 32\].*\[40, 32\]"),
        (lambda c: c.update(embed_dim=8), r"visual.proj is \[32, 8\], the model has \[32, 16\]"),
        # these do not show in any shape
        (lambda c: c["vision_cfg"].update(head_width=32), r"head_width is 32, the model has 16"),
        (lambda c: c["text_cfg"].update(no_causal_mask=True), r"no_causal_mask is True"),
        (lambda c: c["text_cfg"].update(pool_type="last"), r"pool_type is last"),
    ],
)
def test_what_cannot_be_carried_over_is_named(tiny_config, change, message):
    theirs = copy.deepcopy(tiny_config)
    change(theirs)
    reference = described(build(theirs), theirs)
    with pytest.raises(ConfigError, match=rf"init_from: reference: .*{message}.*Hint"):
        inherit(tiny_config, reference)


def test_a_mixture_of_experts_does_not_fit_into_a_dense_model(tiny_config):
    model = build(tiny_config)
    insert_experts(model, 2, 1, image_layers="all", text_layers=[])
    with pytest.raises(ConfigError, match=r"mlp.c_fc.weight is missing"):
        inherit(tiny_config, described(model, tiny_config))
