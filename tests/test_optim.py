import math

import pytest
import torch
from open_clip_train.scheduler import cosine_lr as open_clip_cosine
from pydantic import ValidationError
from test_train import phase
from torch import nn

from clipgraft.loss_settings import LossSettings
from clipgraft.models.build import build
from clipgraft.models.moe import upcycle
from clipgraft.optim import TEMPERATURE, build_optimizer, parameter_groups, set_rates, tau_lr
from clipgraft.recipes import OptimSettings
from clipgraft.schedule import cosine_lr
from clipgraft.training_state import TrainingState


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


START = {
    "weight": [[0.5, -1.0, 2.0], [0.1, 0.0, -0.3]],
    "zeros.weight": [[0.0, 0.0], [0.0, 0.0]],  # no norm: no trust ratio
    "idle.weight": [[0.0, 0.0]],  # nor an update
    "late.weight": [[1.0, -2.0]],  # no gradient in the first steps
    "bias": [0.3, -0.2],
    "logit_scale": 2.6,
}
SETTINGS = {
    "adamw": {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3},
    "lamb": {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3},
    "lion": {"beta1": 0.8, "beta2": 0.9},
    "sgd": {"momentum": 0.7},
}
RATES = [(0.1, 0.02), (0.3, 0.02), (0.2, 0.01), (0.1, 0.01), (0.05, 0.005)]
DECAY = 0.2


def drawn_gradients(dtype: torch.dtype) -> list[dict[str, torch.Tensor | None]]:
    generator, steps = torch.Generator().manual_seed(0), []
    for step in range(len(RATES)):
        steps.append(
            {
                name: torch.randn(torch.tensor(p).shape, generator=generator, dtype=torch.float64)
                for name, p in START.items()
            }
        )
        steps[-1]["idle.weight"].zero_()
        if step < 2:
            steps[-1]["late.weight"] = None
    return [
        {name: None if g is None else g.to(dtype) for name, g in step.items()} for step in steps
    ]


def started(name: str, dtype: torch.dtype):
    named = {key: nn.Parameter(torch.tensor(p, dtype=dtype)) for key, p in START.items()}
    settings = OptimSettings(name=name, lr=9.0, weight_decay=DECAY, **SETTINGS[name])
    return named, build_optimizer(named, settings, lr=9.0, temperature_apart=True)


def take_step(named, optimizer, gradients, step: int) -> None:
    for key, p in named.items():
        gradient = gradients[step][key]
        p.grad = None if gradient is None else gradient.clone()
    for group in optimizer.param_groups:
        group["lr"] = RATES[step][group.get("name") == TEMPERATURE]
    optimizer.step()


def loop_over_numbers(
    name: str, start: list[float], gradients: list, rates: list[float], decay: float
):
    """The formulas of the papers, one number at a time."""
    chosen = SETTINGS[name]
    beta1, beta2, eps = (chosen.get(key, 0.0) for key in ("beta1", "beta2", "eps"))
    p, m, v, t = list(start), [0.0] * len(start), [0.0] * len(start), 0
    for gradient, lr in zip(gradients, rates, strict=True):
        if gradient is None:
            continue
        t += 1
        directions = []
        for i, g in enumerate(gradient):
            if name == "sgd":
                g += decay * p[i]
                m[i] = g if t == 1 else chosen["momentum"] * m[i] + g
                directions.append(m[i])
            elif name == "lion":
                blend = beta1 * m[i] + (1 - beta1) * g
                directions.append((blend > 0) - (blend < 0) + decay * p[i])
                m[i] = beta2 * m[i] + (1 - beta2) * g
            else:
                m[i] = beta1 * m[i] + (1 - beta1) * g
                v[i] = beta2 * v[i] + (1 - beta2) * g * g
                size = math.sqrt(v[i] / (1 - beta2**t)) + eps
                directions.append(m[i] / (1 - beta1**t) / size + decay * p[i])
        trust = 1.0
        if name == "lamb" and decay:
            norm, update = (math.sqrt(sum(x * x for x in xs)) for xs in (p, directions))
            trust = norm / update if norm and update else 1.0
        p = [x - lr * trust * d for x, d in zip(p, directions, strict=True)]
    return p


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", SETTINGS)
def test_an_optimizer_takes_the_published_steps(name, dtype, rel):
    named, optimizer = started(name, dtype)
    gradients = drawn_gradients(dtype)
    for step in range(len(RATES)):
        take_step(named, optimizer, gradients, step)
    for key, p in named.items():
        start = torch.tensor(START[key], dtype=dtype).flatten().tolist()
        drawn = [None if step[key] is None else step[key].flatten().tolist() for step in gradients]
        rates = [rate[key == "logit_scale"] for rate in RATES]
        decay = DECAY if key.endswith("weight") else 0.0
        expected = loop_over_numbers(name, start, drawn, rates, decay)
        assert p.flatten().tolist() == pytest.approx(expected, rel=rel, abs=rel), key
    assert torch.equal(named["idle.weight"], torch.zeros(1, 2, dtype=dtype))


@pytest.mark.parametrize("name", SETTINGS)
def test_an_optimizer_goes_on_from_its_saved_state_with_the_same_bits(name, tmp_path):
    whole, gradients = started(name, torch.float32), drawn_gradients(torch.float32)
    stopped, again = started(name, torch.float32), started(name, torch.float32)
    for step in range(len(RATES)):
        take_step(*whole, gradients, step)
    for step in range(3):
        take_step(*stopped, gradients, step)
    state = TrainingState(tmp_path, "tag")
    state.save({"step": 3, "optimizer": stopped[1].state_dict(), "trained": stopped[0]})
    saved = state.load()
    state.close()
    with torch.no_grad():
        for key, p in again[0].items():
            p.copy_(saved["trained"][key])
    again[1].load_state_dict(saved["optimizer"])
    for step in range(3, len(RATES)):
        take_step(*again, gradients, step)
    for key, p in whole[0].items():
        assert torch.equal(p, again[0][key])


@pytest.mark.parametrize("name", SETTINGS)
def test_every_optimizer_descends(name):
    """A quadratic: far fewer steps would do, none of them has to be good."""
    p = nn.Parameter(torch.tensor([[3.0, -2.0]]))
    settings = OptimSettings(name=name, lr=0.02, weight_decay=1e-3)
    optimizer = build_optimizer({"weight": p}, settings, lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()
    assert p.abs().max() < 0.2


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"momentum": 0.8}, "momentum = 0.8 has no effect on name: adamw. .* name: sgd"),
        ({"name": "sgd", "beta2": 0.95}, "beta2 = 0.95 has no effect on name: sgd. .* name: adamw"),
        ({"name": "sgd", "beta1": 0.8}, "beta1 = 0.8 has no effect"),
        ({"name": "lion", "eps": 1e-8}, "eps = 1e-08 has no effect on name: lion"),
        ({"name": "lion", "momentum": 0.5}, "momentum = 0.5 has no effect"),
        ({"name": "lamb", "weight_decay": 0.0}, "this is Adam. Hint: name: adamw"),
        ({"name": "adam"}, "'adamw', 'lamb', 'lion' or 'sgd'"),
    ],
)
def test_settings_that_an_optimizer_does_not_use_are_refused(optim, message):
    with pytest.raises(ValidationError, match=message):
        OptimSettings(lr=0.1, **optim)


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


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (5, 0.7), (10, 0.4)])
def test_all_groups_fall_to_the_minimum_that_is_set_each_from_its_own_peak(step, share):
    settings = phase(samples_seen=160, optim={"lr": 0.1, "lr_min": 0.04, "warmup": 0.0})
    loss = LossSettings(kind="rgcl_g", lr_tau=1e-4, lr_tau_schedule="cosine")
    named = {name: nn.Parameter(torch.ones(2, 2)) for name in ("a", "b", "logit_scale")}
    optimizer = build_optimizer(named, settings.optim, 0.1, True, {"b": 0.02})
    assert set_rates(optimizer, settings, loss, step, lambda: 0.01) == pytest.approx(0.1 * share)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"a": 0.1 * share, "b": 0.02 * share, "logit_scale": 1e-4 * share}
    for name, rate in expected.items():
        assert rates[id(named[name])] == pytest.approx(rate), name


def test_adamw_is_fused():
    parameters = {"weight": torch.nn.Parameter(torch.ones(2, 2))}
    groups = build_optimizer(parameters, OptimSettings(lr=0.1), 0.1).param_groups
    assert [group["fused"] for group in groups] == [True]


def test_the_temperature_may_have_a_group_of_its_own_and_nothing_else_changes():
    parameters = {
        "visual.weight": torch.nn.Parameter(torch.ones(2, 2)),
        "visual.bias": torch.nn.Parameter(torch.ones(2)),
        "logit_scale": torch.nn.Parameter(torch.ones(())),
    }
    settings = OptimSettings(lr=0.1)
    together, apart = (
        build_optimizer(parameters, settings, 0.1, x).param_groups for x in (False, True)
    )
    assert [len(group["params"]) for group in together] == [1, 2]
    assert [len(group["params"]) for group in apart] == [1, 1, 1]
    assert apart[2]["name"] == TEMPERATURE and apart[2]["weight_decay"] == 0
    assert apart[2]["params"] == [parameters["logit_scale"]]
    parameters["logit_scale"].requires_grad_(False)
    assert len(build_optimizer(parameters, settings, 0.1, True).param_groups) == 2


def test_parameters_with_a_learning_rate_of_their_own_are_groups_that_say_by_how_much():
    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    parameters = {
        name: torch.nn.Parameter(torch.ones((2, 2) if "weight" in name else 2)) for name in names
    }
    own = {"b.weight": 0.01, "b.bias": 0.01}
    groups = build_optimizer(parameters, OptimSettings(lr=0.1), 0.1, lr_of=own).param_groups
    found = [(group["lr_factor"], group["weight_decay"], group["params"]) for group in groups]
    a, a_bias, b, b_bias = ([parameters[name]] for name in names)
    assert found == [
        (1, 0.2, a),
        (1, 0, a_bias),
        (pytest.approx(0.1), 0.2, b),
        (pytest.approx(0.1), 0, b_bias),
    ]


@pytest.mark.parametrize(
    ("schedule", "tau", "expected"),
    [
        ("cosine", 0.02, 0.25e-4),
        ("const", 0.02, 1e-4),
        ("step_thresh", 0.0301, 1e-4),
        ("step_thresh", 0.03, 1e-4 / 3),
    ],
)
def test_the_learning_rate_of_the_temperature_follows_its_schedule(schedule, tau, expected):
    loss = LossSettings(kind="rgcl_g", lr_tau=1e-4, lr_tau_schedule=schedule)
    assert tau_lr(loss, 0.25, lambda: tau) == pytest.approx(expected)
