"""Laws of robustness; the oracle runs the stem on all patches and takes tokens away afterwards."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reduced import image_reduction
from torch import nn

from clipgraft.config import ConfigError
from clipgraft.data.draws import draw_bits
from clipgraft.evaluation.ensemble import Ensemble
from clipgraft.evaluation.robustness import fewer_patches, robustness
from clipgraft.evaluation_settings import RobustnessSettings
from clipgraft.models.build import build
from clipgraft.models.patches import choose_patches

CPU = torch.device("cpu")
KINDS = [{"kind": "random", "keep": 0.5}, "grid", {"kind": "block", "keep": 0.25}]


def model_of(config: dict, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = {**config, "vision_cfg": {**config["vision_cfg"], "image_size": 32}}
    return build(config).eval()


def images(num: int = 5) -> torch.Tensor:
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def by_hand(model: nn.Module, x: torch.Tensor, raw: object, first: int) -> torch.Tensor:
    tower = model.visual
    rows = np.arange(first, first + len(x))
    bits_B = torch.from_numpy(draw_bits(0, rows, 0, 1)[:, 0].view(np.int64))
    index_BK = choose_patches(bits_B, image_reduction(raw), tower.grid_size)
    tokens = tower._embeds(x)  # all of them
    kept = [each[[0, *(1 + index).tolist()]] for each, index in zip(tokens, index_BK, strict=True)]
    pooled, _ = tower._pool(tower.transformer(torch.stack(kept)))
    return pooled @ tower.proj


@pytest.mark.parametrize("raw", KINDS)
@torch.no_grad()
def test_dropped_patches_are_tokens_taken_away_and_come_back(tiny_config, raw):
    model, x = model_of(tiny_config), images()
    before, expected = model.encode_image(x), by_hand(model, x, raw, first=7)
    with fewer_patches(model, image_reduction(raw), CPU) as ahead:
        ahead(range(7, 12))
        found = model.encode_image(x)
        ahead(range(9, 11))
        assert torch.allclose(model.encode_image(x[2:4]), found[2:4], atol=1e-6)  # by row alone
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, before, atol=1e-3)
    assert torch.equal(model.encode_image(x), before)


@torch.no_grad()
def test_models_side_by_side_lose_the_same_patches(tiny_config):
    models, x = [model_of(tiny_config, seed) for seed in (0, 1)], images()
    expected = [F.normalize(by_hand(model, x, "grid", first=0), dim=-1) for model in models]
    both = Ensemble(models).eval()
    with fewer_patches(both, image_reduction("grid"), CPU) as ahead:
        ahead(range(5))
        found = both.encode_image(x)
    assert torch.allclose(found, torch.cat(expected, dim=-1) / 2**0.5, atol=1e-6)


def test_a_tower_without_patches_is_refused(tiny_config):
    model = model_of(tiny_config)
    model.visual = nn.Identity()
    message = "Identity, which has no patches"
    with (
        pytest.raises(ConfigError, match=message),
        fewer_patches(model, image_reduction("grid"), CPU),
    ):
        pass
    settings = RobustnessSettings(image=["grid"])
    with pytest.raises(ConfigError, match=message):
        robustness(settings, model, 8, CPU, {"m": 1.0}, lambda _: {}, lambda _: {})


def test_curves_begin_with_nothing_dropped_and_longer_cuts_are_left_out(tiny_config):
    model, told = model_of(tiny_config), []

    def of_images(ahead):
        told.append("images")
        return {"m": 0.5}

    def of_texts(cut):
        told.append(cut)
        return {"m": cut / 10}

    settings = RobustnessSettings(image=["grid"], text=[4, 6, 8, 12])
    points = robustness(settings, model, 8, CPU, {"m": 1.0}, of_images, of_texts)
    found = [(p["tower"], p["reduction"], p["num_tokens"], p["metrics"]["m"]) for p in points]
    assert found == [
        ("image", "none", 16, 1.0),
        ("image", "grid random", 4, 0.5),
        ("text", "none", 8, 1.0),
        ("text", "cut 6", 6, 0.6),
        ("text", "cut 4", 4, 0.4),
    ]
    assert told == ["images", 6, 4]
