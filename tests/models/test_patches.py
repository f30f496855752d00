"""Laws of patches. Oracles: numpy's draws, plain Python per sample, and open_clip's own stem, gathered afterwards."""

from __future__ import annotations

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from open_clip.transformer import PatchDropout
from reduced import image_reduction

from clipgraft.config import ConfigError
from clipgraft.data.draws import draw_bits
from clipgraft.models.build import build
from clipgraft.models.moe import insert_experts
from clipgraft.models.patches import (
    choose_patches,
    draw_words,
    drop_patches,
    gather_patches,
    num_patches,
)
from clipgraft.reductions import num_kept

KINDS = ["random", "grid", {"kind": "grid", "cell": "fixed"}, "block"]
TEXT = torch.tensor([[38, 5, 39, 0, 0, 0, 0, 0]] * 3)


def bits(num: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(draw_bits(seed, np.arange(num), 0, 1)[:, 0].view(np.int64))


def chosen(raw: object, num: int, grid: tuple[int, int], seed: int = 0) -> list[list[int]]:
    return choose_patches(bits(num, seed), image_reduction(raw), grid).tolist()


def model_of(config: dict, raw: object = "random", *, image_size: int = 32, **vision: object):
    """A tiny model whose positions and class token are not small beside the patches."""
    config = copy.deepcopy(config)
    config["vision_cfg"] |= {"image_size": image_size, **vision}
    torch.manual_seed(0)
    model = build(config)
    drop_patches(model, image_reduction(raw))
    return model


def images(num: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- which patches --------------------------------------------------------------------------------------------


def test_words_are_those_that_numpy_draws():
    words = draw_words(bits(50), 7).numpy().view(np.uint64)
    ours = draw_bits(0, bits(50).numpy().view(np.uint64), 0, 7)
    np.testing.assert_array_equal(words, ours)
    extreme = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    theirs = draw_bits(0, extreme.numpy().view(np.uint64), 0, 3)
    np.testing.assert_array_equal(draw_words(extreme, 3).numpy().view(np.uint64), theirs)


@pytest.mark.parametrize(("keep", "side", "count"), [(0.7, 16, 179), (0.6, 24, 345)])
def test_random_keeps_as_many_as_published(keep, side, count):
    assert num_kept(image_reduction({"kind": "random", "keep": keep}), side, side) == count


def test_random_keeps_as_many_as_open_clip_and_rounding_takes_none_away():
    for percent in range(1, 101):
        for side in (2, 7, 10, 14, 16, 24):
            exact = max(1, side * side * percent // 100)
            reduction = image_reduction({"kind": "random", "keep": percent / 100})
            assert num_kept(reduction, side, side) == exact
            dropout = PatchDropout(1 - percent / 100)
            theirs = dropout(torch.zeros(1, 1 + side * side, 1)).shape[1] - 1
            assert theirs in (
                exact,
                max(1, exact - 1),
            )  # theirs is one short where 1 - p rounds down


@pytest.mark.parametrize("raw", KINDS)
@pytest.mark.parametrize("grid", [(4, 4), (6, 8), (16, 16), (2, 2)])
def test_patches_are_different_in_rising_order_and_as_many_as_counted(raw, grid):
    for index in chosen(raw, 50, grid):
        assert index == sorted(set(index)) and 0 <= index[0] and index[-1] < grid[0] * grid[1]
        assert len(index) == num_kept(image_reduction(raw), *grid)


@pytest.mark.parametrize("cell", ["random", "fixed"])
def test_grid_keeps_exactly_one_of_every_window(cell):
    for index in chosen({"kind": "grid", "cell": cell}, 100, (6, 10)):
        windows = [(patch // 10 // 2, patch % 10 // 2) for patch in index]
        assert len(windows) == len(set(windows)) == 15
        if cell == "fixed":
            assert all(patch // 10 % 2 == patch % 10 % 2 == 0 for patch in index)


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5, 1.0])
def test_block_is_one_rectangle_whose_sides_are_the_root_of_its_share(keep):
    sides = [max(1, round(math.sqrt(keep) * side)) for side in (6, 10)]
    for index in chosen({"kind": "block", "keep": keep}, 100, (6, 10)):
        top, left = divmod(index[0], 10)
        rectangle = [
            row * 10 + column
            for row in range(top, top + sides[0])
            for column in range(left, left + sides[1])
        ]
        assert index == rectangle and top + sides[0] <= 6 and left + sides[1] <= 10


def test_random_is_the_oracle():
    for number, index in zip(bits(40).tolist(), chosen("random", 40, (4, 4)), strict=True):
        words = draw_bits(0, np.array([number % 2**64], np.uint64), 0, 16)[0].tolist()
        order = sorted(range(16), key=lambda patch, words=words: (words[patch] >> 24, patch))
        assert index == sorted(order[:8])


def is_uniform(counts: Counter, num_places: int) -> bool:
    """Chi-square with num_places - 1 degrees of freedom, within five standard deviations."""
    expected = sum(counts.values()) / num_places
    square = sum((counts[place] - expected) ** 2 / expected for place in counts)
    square += (num_places - len(counts)) * expected
    freedom = num_places - 1
    return abs(square - freedom) < 5 * math.sqrt(2 * freedom)


def test_all_places_of_a_block_all_cells_of_a_window_and_all_subsets_come_alike():
    blocks = Counter(index[0] for index in chosen("block", 20_000, (6, 6)))
    assert is_uniform(blocks, 16)
    cells = Counter(tuple(index) for index in chosen("grid", 20_000, (2, 4)))
    assert is_uniform(cells, 16)
    subsets = Counter(tuple(index) for index in chosen("random", 20_000, (2, 3)))
    assert is_uniform(subsets, 20)


def test_neighbouring_samples_and_visits_keep_unrelated_patches():
    # The same row, visit after visit: each patch is kept half of the time, whatever was kept before.
    visits = draw_bits(3, np.full(4000, 17), np.arange(4000), 14)[:, 13].view(np.int64)
    kept = torch.zeros(4000, 16).scatter_(
        1, choose_patches(torch.from_numpy(visits), image_reduction("random"), (4, 4)), 1
    )
    assert ((kept.mean(0) - 0.5).abs() < 0.04).all()
    both = (kept[1:] * kept[:-1]).mean(0)
    assert ((both - 0.25).abs() < 0.04).all()


@pytest.mark.parametrize("raw", KINDS)
def test_what_is_kept_does_not_depend_on_the_batch(raw):
    words, reduction = bits(30), image_reduction(raw)
    together = choose_patches(words, reduction, (4, 6))
    apart = torch.cat([choose_patches(word[None], reduction, (4, 6)) for word in words])
    assert torch.equal(together, apart)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("raw", KINDS)
def test_a_gpu_keeps_the_same_patches(raw):
    words, reduction = bits(300), image_reduction(raw)
    on_gpu = choose_patches(words.cuda(), reduction, (16, 16))
    assert torch.equal(on_gpu.cpu(), choose_patches(words, reduction, (16, 16)))


# --- the tower ------------------------------------------------------------------------------------------------


def test_gathered_patches_are_the_pixels_of_these_patches():
    pixels = images(2, 32).contiguous(memory_format=torch.channels_last)
    index = torch.tensor([[0, 5, 15], [3, 4, 14]])
    gathered = gather_patches(pixels, index, (4, 4))
    for image in range(2):
        for place, patch in enumerate(index[image].tolist()):
            row, column = divmod(patch, 4)
            square = pixels[image, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            assert torch.equal(gathered[image, place], square.flatten())


VARIANTS = [
    {},
    {"pool_type": "avg"},
    {"no_ln_pre": True},
    {"pos_embed_type": "sin_cos_2d", "pool_type": "avg", "final_ln_after_pool": True},
]


@pytest.mark.parametrize("raw", KINDS)
@pytest.mark.parametrize("vision", VARIANTS, ids=str)
def test_tokens_and_features_are_those_of_the_whole_stem_gathered(tiny_config, raw, vision):
    ours, whole = model_of(tiny_config, raw, **vision), model_of(tiny_config, "resize", **vision)
    ours.train()
    ours.visual.image_bits_B = bits(3)
    index = choose_patches(bits(3), image_reduction(raw), (4, 4))

    def gather(_module, arguments):
        tokens = arguments[0]
        return torch.cat(
            [tokens[:, :1], torch.stack([x[1:][i] for x, i in zip(tokens, index, strict=True)])], 1
        )

    expected = whole.visual._embeds(images())
    got = ours.visual._embeds(images())
    assert torch.equal(got[:, 0], expected[:, 0])  # the class token, bit for bit
    torch.testing.assert_close(got, gather(None, (expected,)), atol=1e-6, rtol=1e-5)
    whole.visual.transformer.register_forward_pre_hook(gather)
    for model in (ours, whole):
        model.encode_image(images()).square().sum().backward()
    torch.testing.assert_close(
        ours.encode_image(images()), whole.encode_image(images()), atol=1e-5, rtol=1e-4
    )
    for (name, a), b in zip(ours.visual.named_parameters(), whole.visual.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_keeping_everything_is_the_plain_model(tiny_config):
    ours, plain = (
        model_of(tiny_config, {"kind": "block", "keep": 1.0}),
        model_of(tiny_config, "resize"),
    )
    ours.train()
    ours.visual.image_bits_B = bits(3)
    torch.testing.assert_close(ours.encode_image(images()), plain.encode_image(images()))


@pytest.mark.parametrize("raw", KINDS)
def test_evaluation_sees_everything_and_names_stay(tiny_config, raw):
    ours, plain = model_of(tiny_config, raw), model_of(tiny_config, "resize")
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert torch.equal(ours.eval().encode_image(images()), plain.eval().encode_image(images()))


def test_training_without_words_is_refused_and_a_copy_draws_for_itself(tiny_config):
    model = model_of(tiny_config).train()
    with pytest.raises(AssertionError, match="a random word for each image"):
        model.encode_image(images())
    model.visual.image_bits_B = bits(3)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.encode_image(images()), model.encode_image(images()))
    twin.visual.image_bits_B = bits(3, seed=1)
    assert not torch.equal(twin.encode_image(images()), model.encode_image(images()))


def test_gradient_checkpointing_and_experts_see_the_same_patches(tiny_config):
    model = model_of(tiny_config, "grid").train()
    insert_experts(model, 2, 1, image_layers="all", text_layers="all")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.visual.image_bits_B = bits(3)
    gradients = []
    for checkpointing in (False, True):
        model.visual.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(images(), TEXT)[0].sum().backward()
        gradients.append([p.grad.clone() for p in model.visual.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    kept = model.visual.transformer.resblocks[0].mlp.routing.topk_TK.shape[0]
    assert kept == 3 * (1 + 4)


def test_autocast_adds_positions_in_its_own_precision_as_open_clip_does(tiny_config):
    ours, plain = model_of(tiny_config, "block"), model_of(tiny_config, "resize")
    ours.train()
    ours.visual.image_bits_B = bits(3)
    index = choose_patches(bits(3), image_reduction("block"), (4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, whole = ours.visual._embeds(images()), plain.visual._embeds(images())
    expected = torch.stack([x[1:][i] for x, i in zip(whole, index, strict=True)])
    assert got.dtype == whole.dtype and torch.equal(got[:, 0], whole[:, 0])
    torch.testing.assert_close(got[:, 1:], expected, atol=0.05, rtol=0.02)


def test_the_patch_dropout_of_a_config_works_beside(tiny_config):
    model = model_of(tiny_config, "grid", image_size=64, patch_dropout=0.5).train()
    model.visual.image_bits_B = bits(3)
    assert model.visual._embeds(images(3, 64)).shape[1] == 1 + 8
    assert num_patches(model) == (8, 64)
    alone = model_of(tiny_config, "resize", image_size=64, patch_dropout=0.5).train()
    assert alone.visual._embeds(images(3, 64)).shape[1] == 1 + 32
    assert num_patches(alone) == (32, 64)


def test_a_grid_that_windows_do_not_fill_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"grid needs an even number .* not 3 x 3\. Hint"):
        model_of(tiny_config, "grid", image_size=24)
