"""Trimming texts changes nothing. Oracle: the same model on texts with all their padding, in float64."""

import copy

import pytest
import torch
from torch import nn

from clipgraft.models.build import build, is_padding_unseen, trimmed
from clipgraft.models.moe import routings, upcycle

LENGTH = 24
SIZES = [3, 9, 6]  # tokens of each text, with start and end
START, END = 38, 39


def texts(sizes=SIZES, length: int = LENGTH) -> torch.Tensor:
    text_BL = torch.zeros(len(sizes), length, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for row, size in zip(text_BL, sizes, strict=True):
        row[:size] = torch.randint(0, START, (size,), generator=generator)
        row[0], row[size - 1] = START, END
    return text_BL


def model_of(config, *, has_experts: bool = False, **text):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config["text_cfg"] |= {"context_length": LENGTH, **text}
    model = build(config)
    if has_experts:
        states = [copy.deepcopy(model.state_dict()) for _ in range(3)]
        for state in states[1:]:
            for name, tensor in state.items():
                tensor += 0.2 * torch.randn(tensor.shape) if ".mlp." in name else 0
        layers = {"image_layers": [], "text_layers": "all"}
        upcycle(model, states, top_k=2, generator=torch.Generator(), **layers)
    return model.double()


def features_and_gradients(model: nn.Module, text_BL: torch.Tensor):
    model.zero_grad()
    features = model.encode_text(text_BL, normalize=True)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (features * weights).sum().backward()
    return features, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("has_experts", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trimming_changes_no_feature_and_no_gradient(tiny_config, has_experts, checkpointing):
    model, whole = model_of(tiny_config, has_experts=has_experts), texts()
    model.set_grad_checkpointing(checkpointing)
    short = trimmed(model, whole)
    assert short.shape == (3, 16) and torch.equal(short, whole[:, :16])
    expected, routed = features_and_gradients(model, whole), routings(model)
    got, routed_short = features_and_gradients(model, short), routings(model)
    assert torch.allclose(got[0], expected[0], rtol=0, atol=1e-12)
    assert got[1].keys() == expected[1].keys() and "text.positional_embedding" in got[1]
    for name, gradient in expected[1].items():
        assert torch.allclose(got[1][name], gradient, rtol=0, atol=1e-10), name
    assert len(routed) == 2 * has_experts
    for layer, routing in routed.items():
        assert len(routing.topk_TK) == sum(SIZES)
        assert torch.equal(routing.topk_TK, routed_short[layer].topk_TK)


@pytest.mark.parametrize(("longest", "columns"), [(2, 8), (8, 8), (9, 16), (17, 24), (24, 24)])
def test_texts_are_as_long_as_the_longest_rounded_up_to_eight(tiny_config, longest, columns):
    model = model_of(tiny_config)
    assert trimmed(model, texts([2, longest])).shape == (2, columns)


def test_a_context_that_is_no_multiple_of_eight_stays_as_it_is(tiny_config):
    model = model_of(tiny_config, context_length=18)
    assert trimmed(model, texts([17], 18)).shape == (1, 18)


@pytest.mark.parametrize(
    "text",
    [{"no_causal_mask": True}, {"pool_type": "last"}, {"pool_type": "first"}, {"embed_cls": True}],
    ids=str,
)
def test_texts_whose_padding_is_seen_are_left_alone(tiny_config, text):
    model, whole = model_of(tiny_config, **text), texts()
    assert not is_padding_unseen(model.text)
    assert trimmed(model, whole) is whole
    if "pool_type" not in text or text["pool_type"] == "last":  # it would make a difference
        cut = model.encode_text(whole[:, :16])
        assert not torch.allclose(cut, model.encode_text(whole), atol=1e-6)


def test_no_texts_are_none_after_trimming(tiny_config):
    assert trimmed(model_of(tiny_config), texts([])).shape == (0, LENGTH)
