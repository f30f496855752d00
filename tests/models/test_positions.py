"""Laws of position tables. Oracles: open_clip's functions, and the formulas with plain loops."""

import json
import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from safetensors.torch import save_file

from clipgraft.config import ConfigError
from clipgraft.models.build import build
from clipgraft.models.positions import (
    TextResize,
    resize_positions,
    sincos_table,
    start_positions,
    stretched_table,
)
from clipgraft.recipes import PhaseSettings


def phase(**changes: object) -> PhaseSettings:
    raw = {"name": "full", "image_size": 32, "text_length": 16, "samples_seen": 10}
    return PhaseSettings(**raw, batch_size=2, optim={"lr": 0.1}, **changes)


def test_image_positions_are_interpolated_over_the_grid_and_the_class_token_kept(tiny_config):
    small, large = build(tiny_config), build(tiny_config, image_size=32)
    state = small.state_dict()
    before = state["visual.positional_embedding"].clone()
    resize_positions(state, large)
    after = state["visual.positional_embedding"]
    grid = before[1:].T.reshape(1, 32, 2, 2)
    expected = F.interpolate(grid, (4, 4), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(after[0], before[0])
    assert torch.allclose(after[1:], expected.reshape(32, 16).T)


def test_text_positions_are_interpolated_linearly(tiny_config):
    short, long = build(tiny_config), build(tiny_config, text_length=16)
    state = short.state_dict()
    before = state["text.positional_embedding"].double().numpy()
    resize_positions(state, long)
    places = np.clip((np.arange(16) + 0.5) * 8 / 16 - 0.5, 0, 7)  # align_corners=False
    expected = np.stack([np.interp(places, np.arange(8), column) for column in before.T], axis=1)
    assert np.allclose(state["text.positional_embedding"].numpy(), expected, atol=1e-6)


def random_tables(config: dict, image_size: int, text_length: int) -> dict[str, torch.Tensor]:
    state = build(config, image_size, text_length).state_dict()
    for name in ("visual.positional_embedding", "text.positional_embedding"):
        state[name] = torch.randn(state[name].shape)
    return state


@pytest.mark.parametrize("image_size", [16, 24, 56])
@pytest.mark.parametrize("text_length", [3, 8, 21])
def test_any_size_goes_to_any_other_as_in_open_clip(tiny_config, image_size, text_length):
    torch.manual_seed(0)
    ours = random_tables(tiny_config, 40, 8)
    theirs, model = dict(ours), build(tiny_config, image_size, text_length)
    resize_positions(ours, model)
    resize_pos_embed(theirs, model)
    resize_text_pos_embed(theirs, model)
    model.load_state_dict(ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_padded_text_positions_keep_their_rows_and_get_fresh_ones(tiny_config):
    torch.manual_seed(0)
    for text_length in (5, 16):
        state, model = random_tables(tiny_config, 16, 8), build(tiny_config, None, text_length)
        before = state["text.positional_embedding"]
        resize_positions(state, model, TextResize("pad"))
        after = state["text.positional_embedding"]
        assert torch.equal(after[:8], before[:text_length])
        assert len(after) == text_length
    assert 0.005 < after[8:].std() < 0.02  # open_clip's fresh tables have 0.01
    assert len(after[8:].unique(dim=0)) == 8


def test_text_positions_that_are_not_carried_begin_afresh_at_another_length_only(tiny_config):
    torch.manual_seed(0)
    state = random_tables(tiny_config, 16, 8)
    before = state["text.positional_embedding"]
    resize_positions(state, build(tiny_config), TextResize("none"))
    assert torch.equal(state["text.positional_embedding"], before)
    resize_positions(state, build(tiny_config, None, 16), TextResize("none"))
    assert state["text.positional_embedding"].abs().max() < 0.1 < before.abs().max()


# --- sines and cosines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "last"), [("mae", 0), ("moco", 1)])
@pytest.mark.parametrize(("width", "grid"), [(8, 1), (32, 2), (48, 7)])
def test_sincos_tables_are_the_published_formulas(width, grid, form, last):
    table = sincos_table(width, grid, form)
    assert table.shape == (1 + grid * grid, width) and table.dtype == torch.float32
    assert not table[0].any()
    part = width // 4
    for y in range(grid):
        for x in range(grid):
            for k in range(part):
                omega = 10000 ** (-k / (part - last))
                expected = (
                    math.sin(x * omega),
                    math.cos(x * omega),
                    math.sin(y * omega),
                    math.cos(y * omega),
                )
                got = table[1 + y * grid + x, k::part]
                assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_mae_form_is_open_clips_bit_for_bit(tiny_config):
    tiny_config["vision_cfg"]["pos_embed_type"] = "sin_cos_2d"
    for size in (16, 56):
        theirs = build(tiny_config, image_size=size).visual.positional_embedding
        assert torch.equal(theirs, sincos_table(32, size // 8, "mae"))


def test_a_width_without_four_parts_is_refused():
    with pytest.raises(ConfigError, match=r"multiple of 4 .* is 30"):
        sincos_table(30, 2, "mae")


# --- the start of a phase -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mae", "moco"])
def test_recomputed_tables_do_not_depend_on_those_before(tiny_config, form):
    model = build(tiny_config, 32)
    settings = phase(pos_embed="sincos_frozen", pos_resize="recompute", sincos_form=form)
    config, done = start_positions(model, tiny_config, settings, is_carried=True)
    assert torch.equal(model.visual.positional_embedding, sincos_table(32, 4, form))
    assert not model.visual.positional_embedding.requires_grad
    assert config["vision_cfg"]["pos_embed_type"] == "sin_cos_2d"
    assert (done["image"], done["sincos_form"]) == ("recompute", form)


@pytest.mark.parametrize("pos_embed", [None, "sincos_frozen", "learned", "sincos_init"])
def test_interpolated_tables_are_left_as_they_came(tiny_config, pos_embed):
    """CLIPA v1: frozen sin-cos first, then learned from the interpolated table."""
    tiny_config["vision_cfg"]["pos_embed_type"] = "sin_cos_2d"
    model, carried = build(tiny_config), torch.randn(5, 32)
    model.visual.positional_embedding.data.copy_(carried)
    settings = phase(pos_embed=pos_embed)
    config, _ = start_positions(model, tiny_config, settings, is_carried=True)
    is_learned = pos_embed in ("learned", "sincos_init")
    assert torch.equal(model.visual.positional_embedding, carried)
    assert model.visual.positional_embedding.requires_grad is is_learned
    kind = "learnable" if is_learned else "sin_cos_2d"
    assert config["vision_cfg"]["pos_embed_type"] == kind
    assert tiny_config["vision_cfg"]["pos_embed_type"] == "sin_cos_2d"


@pytest.mark.parametrize(
    ("pos_embed", "kind"),
    [("sincos_frozen", "sin_cos_2d"), ("sincos_init", "learnable"), ("learned", "learnable")],
)
def test_fresh_tables_are_what_the_phase_asks_for(tiny_config, pos_embed, kind):
    model = build(tiny_config)
    random = model.visual.positional_embedding.detach().clone()
    settings = phase(pos_embed=pos_embed, sincos_form="moco")
    config, _ = start_positions(model, tiny_config, settings, is_carried=False)
    expected = random if pos_embed == "learned" else sincos_table(32, 2, "moco")
    assert torch.equal(model.visual.positional_embedding, expected)
    assert model.visual.positional_embedding.requires_grad is (pos_embed != "sincos_frozen")
    assert config["vision_cfg"]["pos_embed_type"] == kind


def test_the_config_of_a_model_decides_where_the_phase_is_silent(tiny_config):
    model = build(tiny_config)
    before = model.visual.positional_embedding.detach().clone()
    config, done = start_positions(model, tiny_config, phase(), is_carried=False)
    assert config == tiny_config and done["pos_embed"] == "learned"
    assert torch.equal(model.visual.positional_embedding, before)
    tiny_config["vision_cfg"]["pos_embed_type"] = "sin_cos_2d"
    model = build(tiny_config)
    _, done = start_positions(model, tiny_config, phase(sincos_form="moco"), is_carried=False)
    assert done["pos_embed"] == "sincos_frozen"
    assert torch.equal(model.visual.positional_embedding, sincos_table(32, 2, "moco"))


def test_learned_tables_are_neither_recomputed_nor_frozen(tiny_config):
    model = build(tiny_config)
    with pytest.raises(ConfigError, match=r"pos_resize = recompute: .* is learned"):
        settings = phase(pos_embed="learned", pos_resize="recompute")
        start_positions(model, tiny_config, settings, is_carried=True)
    with pytest.raises(ConfigError, match=r"pretrain.full.pos_resize = recompute: .* is learned"):
        start_positions(model, tiny_config, phase(pos_resize="recompute"), is_carried=True)
    with pytest.raises(ConfigError, match=r"sincos_frozen: the table before was learned"):
        start_positions(model, tiny_config, phase(pos_embed="sincos_frozen"), is_carried=True)


@pytest.mark.parametrize("pos_embed", ["sincos_frozen", "sincos_init"])
@pytest.mark.parametrize("pool_type", ["tok", "avg"])
def test_open_clip_reads_a_model_with_any_table(tiny_config, tmp_path, pos_embed, pool_type):
    tiny_config["vision_cfg"]["pool_type"] = pool_type
    model = build(tiny_config).eval()
    settings = phase(pos_embed=pos_embed, sincos_form="moco")
    config, _ = start_positions(model, tiny_config, settings, is_carried=False)
    about = {"model_cfg": config, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.encode_image(images), theirs.encode_image(images))
    is_frozen = pos_embed == "sincos_frozen"
    assert theirs.visual.positional_embedding.requires_grad is not is_frozen


# --- long texts ---------------------------------------------------------------------------------------------


def random_table(num: int, width: int = 3) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(0))


def test_77_positions_are_stretched_to_248_as_long_clip_does():
    """Row by row as published: 20 rows stay, the others come every four, the last four go on as the last two do."""
    P = random_table(77).double()
    expected = [P[p] for p in range(20)]
    expected += [(1 - j / 4) * P[20 + i] + (j / 4) * P[21 + i] for i in range(56) for j in range(4)]
    expected += [P[76] + (j / 4) * (P[76] - P[75]) for j in range(4)]
    got = stretched_table(P.float(), 248, 20)
    assert got.shape == (248, 3) and got.dtype == torch.float32
    assert torch.allclose(got.double(), torch.stack(expected), atol=1e-6)
    assert torch.equal(got[:20], P[:20].float()) and torch.equal(got[20::4], P[20:].float())


@pytest.mark.parametrize(("num", "length", "keep"), [(9, 30, 4), (9, 13, 0), (9, 10, 8), (5, 4, 2)])
def test_any_length_is_stretched_by_the_same_rule(num, length, keep):
    before = random_table(num).double().tolist()
    after = stretched_table(random_table(num), length, keep).tolist()
    for p, row in enumerate(after):
        place = p if p < keep else keep + (p - keep) * (num - keep) / (length - keep)
        left = min(int(place), num - 2)
        for d, value in enumerate(row):
            slope = before[left + 1][d] - before[left][d]
            assert value == pytest.approx(before[left][d] + (place - left) * slope, abs=1e-6)


@pytest.mark.parametrize(("num", "length", "keep"), [(77, 248, 20), (8, 20, 4), (9, 9, 3)])
def test_what_was_stretched_can_be_undone(num, length, keep):
    """Where the old rows are among the new ones."""
    before = random_table(num)
    back = stretched_table(stretched_table(before, length, keep), num, keep)
    assert torch.allclose(back, before, atol=1e-6)
    assert torch.equal(stretched_table(before, keep, keep), before[:keep])


def test_a_model_is_stretched_by_its_rule_and_at_its_own_length_left_alone(tiny_config):
    rule = TextResize("stretch", 4)
    state, model = random_tables(tiny_config, 16, 8), build(tiny_config, text_length=20)
    before = state["text.positional_embedding"]
    resize_positions(state, build(tiny_config), rule)
    assert torch.equal(state["text.positional_embedding"], before)
    resize_positions(state, model, rule)
    model.load_state_dict(state)
    assert torch.equal(model.text.positional_embedding, stretched_table(before, 20, 4))
    with pytest.raises(ConfigError, match=r"text_pos_keep = 20: .* 8 positions.*less than 8"):
        resize_positions(random_tables(tiny_config, 16, 8), model, TextResize("stretch"))
