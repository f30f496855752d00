"""Texts without their padding have the numbers of open_clip's tower, which computes all of it."""

import copy
import functools
from typing import Any

import pytest
import torch
from test_training_blocks import (
    KINDS,
    assert_same,
    batch_of,
    distance,
    model_of,
    published,
    quick,
    run,
    with_experts,
)
from torch import Tensor, nn

from clipgraft.compiled import compile_blocks
from clipgraft.models import padding
from clipgraft.models.padding import Packing, packing, real_tokens
from clipgraft.models.training_blocks import OneTokenTextTransformer, tell_padding
from clipgraft.recipes import TrainSettings

CPU = torch.device("cpu")
NUM = 24  # texts, of 9 tokens with padding: so many that packing pays
UNSEEN = ("class token", "QuickGELU", "tanh", "one block", "projection with a bias")
SEEN = sorted(kind for kind in KINDS if "text" in kind)


def told(model: nn.Module) -> nn.Module:
    """The model, whose text tower is told before each forward of texts, as training does it."""
    forward, model.packed = model.forward, []

    def tell(images: Tensor, texts: Tensor) -> Any:
        tell_padding(model, texts.cpu(), texts.device)
        model.packed.append(model.text.packing)
        return forward(images, texts)

    model.forward = tell
    return model


@pytest.mark.parametrize("kind", UNSEEN)
def test_features_and_gradients_are_those_of_open_clip(kind):
    plain = model_of(**KINDS[kind])
    model = told(quick(plain))
    assert_same(model, plain, NUM)
    [found] = model.packed
    num_real = int(real_tokens(batch_of(plain, NUM)[1]).sum())
    assert num_real < len(found.kept_T) == 128 < NUM * 9  # the next multiple of 32


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14"])
def test_published_shapes_have_the_numbers_of_open_clip(name):
    plain = published(name, 2)
    model = told(quick(plain))
    assert_same(model, plain, 3)
    assert isinstance(model.packed[0], Packing)


def test_as_many_tokens_as_there_are_and_no_more(monkeypatch):
    """Not rounded, nothing but real tokens is computed."""
    monkeypatch.setattr(padding, "_LEAST_STEP", 1)
    monkeypatch.setattr(padding, "_STEPS", 1000)
    plain = model_of()
    model, widths = told(quick(plain)), set()
    mlps = [block.mlp for block in model.text.transformer.resblocks]
    for mlp in mlps:
        mlp.register_forward_hook(lambda _, x, __: widths.add(x[0].shape))
    assert_same(model, plain, NUM)
    num = int(real_tokens(batch_of(plain, NUM)[1]).sum())
    assert widths == {(1, num, 32), (NUM, 1, 32)}  # the last block computes end tokens


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ),
    ],
)
def test_in_bf16_the_error_is_that_of_bf16(device):
    plain = published("ViT-B-32", 2).to(device)
    model, exact, found = told(quick(plain)), run(plain, 4), []
    for each in (model, plain):
        features, grads = run(each, 4, is_mixed=True)
        both = zip(features, exact[0], strict=True)
        own, other = (torch.cat([g[n].flatten() for n in exact[1]]) for g in (grads, exact[1]))
        found.append([*(distance(a.float(), b) for a, b in both), distance(own, other)])
    assert isinstance(model.packed[0], Packing)
    for ours, theirs in zip(*found, strict=True):
        assert 0 < ours < 1.25 * theirs, found


def test_checkpointing_changes_nothing():
    model = told(quick(model_of()))
    features, grads = run(model, NUM)
    model.set_grad_checkpointing(True)
    again, their_grads = run(model, NUM)
    assert len(model.packed) == 2 and None not in model.packed
    assert all(torch.equal(a, b) for a, b in zip(features, again, strict=True))
    assert all(torch.equal(grads[name], their_grads[name]) for name in grads)


def test_a_telling_is_of_one_batch():
    model = quick(model_of())
    _, texts = batch_of(model, NUM)
    tell_padding(model, texts, CPU)
    with pytest.raises(AssertionError, match="another shape"):
        model.encode_text(texts[:5])
    tell_padding(model, texts, CPU)
    first = model.encode_text(texts)
    assert model.text.packing is None  # the next batch is whole, unless something is said of it
    torch.testing.assert_close(model.encode_text(texts), first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [with_experts, *(lambda k=k: model_of(**KINDS[k]) for k in SEEN)])
def test_towers_that_see_padding_or_have_experts_get_all_of_it(make):
    plain = make()
    model = quick(plain)
    tell_padding(model, batch_of(plain, NUM)[1], CPU)
    assert getattr(model.text, "packing", None) is None
    assert_same(model, plain, NUM)


def test_a_mask_that_is_not_the_causal_one_is_not_left_out():
    plain = model_of()
    plain.text.attn_mask[0, 1] = 0.0
    model = told(quick(plain))
    assert not model.text.packs
    assert_same(model, plain, NUM)


def test_a_variable_turns_it_off(monkeypatch):
    model = told(quick(model_of()))
    features, _ = run(model, NUM)
    monkeypatch.setenv("CLIPGRAFT_PACK_TEXTS", "0")
    same = zip(run(model, NUM)[0], features, strict=True)
    assert isinstance(model.packed[0], Packing) and model.packed[1] is None
    for one, other in same:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_compiled_blocks_keep_their_shapes():
    model = quick(model_of())
    assert isinstance(model.text, OneTokenTextTransformer) and model.text.packs
    raw = {"samples_seen": 8, "batch_size": 8, "optim": {"lr": 1e-3}, "compile": True}
    compile_blocks(model, TrainSettings.model_validate(raw), CPU)
    tell_padding(model, batch_of(model, NUM)[1], CPU)
    assert model.text.packing is None


def texts_of(sizes: list[int], length: int) -> Tensor:
    """Id 0 is a token, too, and stands in front of ends as well as behind them."""
    text_BL = torch.zeros(len(sizes), length, dtype=torch.long)
    for row, size in zip(text_BL, sizes, strict=True):
        row[size - 1] = 99
    return text_BL


def test_what_is_kept_is_all_that_is_real_and_the_padding_that_makes_it_up():
    sizes = [1, 20, 7, 13, 2, 20, 3, 5]
    text_BL = texts_of(sizes, 20)
    found = packing(text_BL, CPU)
    assert found is not None and found.shape == (8, 20)
    kept, num = found.kept_T.tolist(), 20 * 8
    real = {20 * row + place for row, size in enumerate(sizes) for place in range(size)}
    assert kept == sorted(kept) and len(kept) == 96 and real < set(kept)  # of 71, in steps of 32
    padding_first = [place for place in range(num) if place not in real][: 96 - 71]
    assert set(kept) - real == set(padding_first)
    assert found.place_N.tolist() == [kept.index(n) if n in kept else 96 for n in range(num)]
    ends = [20 * row + size - 1 for row, size in enumerate(sizes)]
    assert found.kept_T[found.end_B].tolist() == ends
    x_BLD = torch.randn(8, 20, 3)
    there_and_back = found.unpack(found.pack(x_BLD))
    is_kept = torch.zeros(num).index_fill(0, found.kept_T, 1).view(8, 20, 1)
    assert torch.equal(there_and_back, x_BLD * is_kept)


@pytest.mark.parametrize("sizes", [[20] * 8, [18] * 8, [3], []], ids=str)
def test_where_little_is_left_out_nothing_is(sizes):
    assert packing(texts_of(sizes, 20), CPU) is None


def test_numbers_of_tokens_repeat():
    """Few shapes: steps of a large batch are at most a 32nd of it, and powers of two."""
    generator = torch.Generator().manual_seed(0)
    nums = set()
    for _ in range(50):
        sizes = torch.randint(8, 24, (512,), generator=generator).tolist()
        found = packing(texts_of(sizes, 32), CPU)
        assert found is not None and 0 <= len(found.kept_T) - sum(sizes) < 512
        nums.add(len(found.kept_T))
    assert len(nums) <= 3 and all(num % 512 == 0 for num in nums)


def test_gradients_of_rows_are_exact():
    text_BL = texts_of([1, 12, 7, 5], 16)
    found = packing(text_BL, CPU)
    assert found is not None
    x_BLD = torch.randn(4, 16, 2, dtype=torch.float64, requires_grad=True)
    x_1TD = torch.randn(1, len(found.kept_T), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(found.pack, x_BLD)
    assert torch.autograd.gradcheck(found.unpack, x_1TD)


def test_a_copy_of_a_tower_is_told_apart():
    model = quick(model_of())
    other = copy.deepcopy(model)
    texts = batch_of(model, NUM)[1]
    tell_padding(other, texts, CPU)
    assert model.text.packing is None and other.text.packing is not None
    same = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    same(other.encode_text(texts), model.encode_text(texts))
