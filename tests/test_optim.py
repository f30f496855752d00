import pytest
import torch
from open_clip_train.scheduler import cosine_lr as open_clip_cosine
from torch import nn

from clipgraft.models.build import build
from clipgraft.models.moe import upcycle
from clipgraft.optim import build_optimizer, parameter_groups
from clipgraft.recipes import OptimSettings
from clipgraft.schedule import cosine_lr


def names_of(groups, named) -> list[set[str]]:
    by_id = {id(p): name for name, p in named.items()}
    return [{by_id[id(p)] for p in group["params"]} for group in groups]


def test_decay_is_as_in_open_clip(tiny_config):
    named = dict(build(tiny_config).named_parameters())
    groups = parameter_groups(named, 0.2)
    decayed, kept = names_of(groups, named)
    for name in (
        "visual.conv1.weight",
        "visual.positional_embedding",
        "text.token_embedding.weight",
    ):
        assert name in decayed
    for name in ("logit_scale", "visual.class_embedding", "text.ln_final.weight"):
        assert name in kept
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    assert len(decayed) + len(kept) == len(named)


def test_stacked_biases_are_not_decayed_but_stacked_weights_and_routers_are(tiny_config):
    model = build(tiny_config)
    layers = {"image_layers": "all", "text_layers": "all"}
    upcycle(model, [model.state_dict()] * 2, top_k=1, generator=torch.Generator(), **layers)
    named = dict(model.named_parameters())
    decayed, kept = names_of(parameter_groups(named, 0.2), named)
    block = "text.transformer.resblocks.0.mlp."
    assert {block + "c_fc_bias", block + "c_proj_bias"} <= kept
    assert {block + "c_fc_weight", block + "router"} <= decayed


def test_frozen_parameters_are_in_no_group():
    named = {"a": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2, 2))}
    named["a"].requires_grad_(False)
    assert names_of(parameter_groups(named, 0.1), named) == [{"b"}]


def test_optimizer_is_adamw_with_the_settings():
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(3, 3, generator=generator)
    gradients = torch.rand(4, 3, 3, generator=generator)
    p = nn.Parameter(start.clone())
    settings = OptimSettings(lr=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = build_optimizer({"p": p}, settings, lr=0.1)
    expected, m, v = start.double(), 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        p.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        step = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * step
    assert torch.allclose(p.double(), expected, atol=1e-5)


def test_schedule_is_open_clips():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = open_clip_cosine(optimizer, 0.3, 5, 40)
    for step in range(40):
        theirs(step)
        assert cosine_lr(step, 40, 5, 0.3) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_schedule_ends_at_its_minimum_and_stands_no_warm_up():
    assert cosine_lr(0, 10, 0, 1.0, 0.1) == pytest.approx(1.0)
    assert cosine_lr(10, 10, 0, 1.0, 0.1) == pytest.approx(0.1)
    assert cosine_lr(5, 10, 0, 1.0, 0.1) == pytest.approx(0.55)
    assert cosine_lr(2, 3, 3, 1.0) == pytest.approx(1.0)  # all of it is warm-up
