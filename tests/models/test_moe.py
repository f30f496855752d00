import copy

import pytest
import torch
import torch.nn.functional as F

from clipgraft.config import ConfigError
from clipgraft.models.build import build, mlp_parameters
from clipgraft.models.moe import MoeMlp, router_parameters, routings, upcycle

E, K = 4, 2
TEXT = torch.tensor(
    [[38, 5, 0, 39, 0, 0, 0, 0], [38, 9, 8, 7, 6, 39, 0, 0], [38, 1, 2, 3, 4, 5, 6, 39]]
)
NUM_REAL = 4 + 6 + 8  # id 0 before the end token is a word like any other


def images(num: int = 3) -> torch.Tensor:
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def dense_model(config, seed: int = 0):
    torch.manual_seed(seed)
    return build(config)


def experts_of(model, num: int = E) -> list[dict[str, torch.Tensor]]:
    """Expert 0 is the model, the others differ in their MLPs."""
    states = [copy.deepcopy(model.state_dict()) for _ in range(num)]
    generator = torch.Generator().manual_seed(7)
    for state in states[1:]:
        for name in mlp_parameters(model):
            state[name] += 0.2 * torch.randn(state[name].shape, generator=generator)
    return states


def grafted(config, states=None, *, top_k=K, image_layers="all", text_layers="all", seed=3):
    model = dense_model(config)
    generator = torch.Generator().manual_seed(seed)
    states = experts_of(model) if states is None else states
    layers = {"image_layers": image_layers, "text_layers": text_layers}
    upcycle(model, states, top_k=top_k, generator=generator, **layers)
    return model


def moe_mlps(model) -> list[MoeMlp]:
    return [module for module in model.modules() if isinstance(module, MoeMlp)]


def reference(moe: MoeMlp, x: torch.Tensor) -> torch.Tensor:
    """All experts on all tokens, gated: softmax over the logits of the top k."""
    logits = x @ moe.router.T
    kept, chosen = logits.topk(moe.top_k, dim=-1)
    gates = torch.zeros_like(logits).scatter(-1, chosen, kept.softmax(-1))
    outputs = [
        F.linear(moe.gelu(F.linear(x, moe.c_fc_weight[e], moe.c_fc_bias[e])), moe.c_proj_weight[e])
        + moe.c_proj_bias[e]
        for e in range(len(moe.router))
    ]
    return (gates[..., None] * torch.stack(outputs, dim=-2)).sum(-2)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_identical_experts_equal_the_dense_model(tiny_config, quick_gelu, checkpointing):
    tiny_config["quick_gelu"] = quick_gelu
    dense = dense_model(tiny_config)
    model = grafted(tiny_config, [dense.state_dict()] * E)
    for tower in (dense, model):
        tower.set_grad_checkpointing(checkpointing)
    for ours, theirs in zip(model(images(), TEXT), dense(images(), TEXT), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_model_whose_routers_always_choose_one_expert_is_that_expert(tiny_config):
    dense = dense_model(tiny_config)
    states = experts_of(dense)
    model = grafted(tiny_config, states, top_k=1)
    for moe in moe_mlps(model):
        moe._route = lambda x: (torch.ones(len(x), 1), torch.full((len(x), 1), 2))
    dense.load_state_dict(states[2])
    for ours, theirs in zip(model(images(), TEXT), dense(images(), TEXT), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sorted_dispatch_equals_all_experts_gated(tiny_config, top_k):
    moe = moe_mlps(grafted(tiny_config, top_k=top_k))[0].double()
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 32, dtype=torch.float64)
    inputs = (x, *moe.parameters())
    ours, theirs = moe(x), reference(moe, x)
    assert torch.allclose(ours, theirs, atol=1e-6)  # the router works in float32
    for our, their in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(our, their, atol=1e-5)


def test_gates_of_a_token_sum_to_one_and_fall_to_the_likeliest_experts(tiny_config):
    moe = moe_mlps(grafted(tiny_config))[0]
    gates, topk = moe._route(torch.randn(50, 32))
    assert torch.allclose(gates.sum(1), torch.ones(50))
    moe.state.is_forward = True
    gates, topk = moe._route(torch.randn(50, 32))
    probs = moe.routing.probs_TE
    assert torch.equal(topk, probs.argsort(1, descending=True)[:, :K])


def test_an_expert_without_tokens_gets_zero_gradients_not_none(tiny_config):
    moe = moe_mlps(grafted(tiny_config, top_k=1))[0]
    with torch.no_grad():
        moe.router.zero_()
        moe.router[1, 0] = 1
    x = torch.randn(3, 4, 32)
    x[..., 0] = 5  # every token prefers expert 1
    moe(x).square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
    for idle in (0, 2, 3):
        assert (moe.c_fc_weight.grad[idle] == 0).all() and (moe.c_proj_bias.grad[idle] == 0).all()
    assert (moe.c_fc_weight.grad[1] != 0).any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_changes_nothing_and_is_not_routed(tiny_config, checkpointing):
    model = grafted(tiny_config)
    model.set_grad_checkpointing(checkpointing)
    padded = model.encode_text(TEXT)
    for name, routing in routings(model).items():
        assert len(routing.probs_TE) == NUM_REAL, name
    for row, length in enumerate((4, 6, 8)):
        alone = model.encode_text(TEXT[row : row + 1, :length])
        assert torch.allclose(padded[row], alone[0], atol=1e-5)


def test_what_is_told_of_texts_is_what_the_tower_sees_and_holds_once(tiny_config):
    model = grafted(tiny_config)
    alone = model.encode_text(TEXT)
    model.text.moe_state.tell_real_tokens(TEXT, torch.device("cpu"))
    real_T, place_N = model.text.moe_state.told
    assert torch.equal(real_T, model.text.moe_state.real_T)
    assert torch.equal(place_N, model.text.moe_state.place_N)
    assert torch.equal(model.encode_text(TEXT), alone)
    assert torch.equal(model.encode_text(TEXT.flip(0)), alone.flip(0)), "these were not told"
    model.text.moe_state.told = real_T.flip(0), place_N
    assert not torch.equal(model.encode_text(TEXT), alone), "what was told was not used"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_routings_are_of_the_last_forward_once_per_layer_and_handed_over(
    tiny_config, checkpointing
):
    model = grafted(tiny_config)
    model.set_grad_checkpointing(checkpointing)
    features = model(images(2), TEXT)
    features = model(images(), TEXT)
    taken = routings(model)
    assert set(taken) == {"visual.0", "visual.1", "text.0", "text.1"}
    assert taken["visual.1"].probs_TE.shape == (3 * 5, E)
    assert taken["visual.1"].topk_TK.shape == (3 * 5, K)
    assert torch.allclose(taken["text.0"].probs_TE, taken["text.0"].logits_TE.softmax(1))
    (features[0].sum() + features[1].sum()).backward()  # computes blocks again if checkpointing
    assert routings(model) == {}


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_a_forward_that_fails_is_over(tiny_config, tower):
    """Or a block that is computed again in backward would take itself for a forward."""
    model = grafted(tiny_config)
    module = getattr(model, tower)

    def fail(*_: object) -> None:
        assert module.moe_state.is_forward
        raise RuntimeError("out of memory")

    hook = module.transformer.resblocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        module(images() if tower == "visual" else TEXT)
    assert not module.moe_state.is_forward
    hook.remove()
    model(images(), TEXT)
    assert not module.moe_state.is_forward and len(routings(model)) == 4


def test_checkpointing_changes_no_gradient_of_a_loss_on_features_and_routings(tiny_config):
    gradients = []
    for checkpointing in (False, True):
        model = grafted(tiny_config)
        model.set_grad_checkpointing(checkpointing)
        image, text, _ = model(images(), TEXT)
        auxiliary = sum(r.logits_TE.logsumexp(1).square().mean() for r in routings(model).values())
        ((image * text).sum() + auxiliary).backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_contrast_alone_trains_the_routers(tiny_config):
    model = grafted(tiny_config)
    routers = router_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in routers)
    image, text, scale = model(images(), TEXT)
    F.cross_entropy(scale * image @ text.T, torch.arange(3)).backward()
    assert set(routers) == {
        f"{tower}.transformer.resblocks.{block}.mlp.router"
        for tower in ("visual", "text")
        for block in (0, 1)
    }
    assert all((router.grad != 0).any() for router in routers.values())


def test_bf16_autocast_keeps_the_router_in_float32(tiny_config):
    dense = dense_model(tiny_config)
    model = grafted(tiny_config, [dense.state_dict()] * E)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(images(), TEXT), dense(images(), TEXT)
    assert all(routing.logits_TE.dtype == torch.float32 for routing in routings(model).values())
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert torch.allclose(our.float(), their.float(), atol=0.02)
    ours[0].float().sum().backward()
    assert router_parameters(model)["visual.transformer.resblocks.0.mlp.router"].grad is not None


def test_a_deep_copy_is_a_mixture_of_its_own(tiny_config):
    model = grafted(tiny_config)
    twin = copy.deepcopy(model)
    assert torch.equal(model(images(), TEXT)[1], twin(images(), TEXT)[1])
    routings(model)
    assert len(routings(twin)["text.1"].probs_TE) == NUM_REAL
    assert routings(model) == {}


def test_layers_not_chosen_stay_dense(tiny_config):
    model = dense_model(tiny_config)
    generator = torch.Generator()
    spec = upcycle(
        model, experts_of(model), top_k=1, image_layers=[1], text_layers=[], generator=generator
    )
    assert spec == {"num_experts": E, "top_k": 1, "image_layers": [1], "text_layers": []}
    model(images(), TEXT)
    assert set(routings(model)) == {"visual.1"}


def test_routers_follow_their_generator_and_differ_between_layers(tiny_config):
    first, again, other = (
        list(router_parameters(grafted(tiny_config, seed=seed)).values()) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    assert first[0].abs().max() <= 32**-0.5


def test_experts_take_over_the_trained_mlps(tiny_config):
    states = experts_of(dense_model(tiny_config))
    moe = moe_mlps(grafted(tiny_config, states))[-1]
    name = "text.transformer.resblocks.1.mlp.c_proj.weight"
    for e in range(E):
        assert torch.equal(moe.c_proj_weight[e], states[e][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, "top_k = 5 of 4 experts"),
        ({"image_layers": [0, 2]}, r"image_layers = \[0, 2\]: the image tower has 2 blocks"),
        ({"text_layers": [-1]}, r"text_layers = \[-1\]: the text tower has 2 blocks"),
    ],
)
def test_impossible_grafts_are_named(tiny_config, change, message):
    with pytest.raises(ConfigError, match=message):
        grafted(tiny_config, **change)


def test_expert_of_another_base_is_named(tiny_config):
    states = experts_of(dense_model(tiny_config))
    name = "visual.transformer.resblocks.1.mlp.c_fc.bias"
    for value, message in [(torch.zeros(3), r"expert 2 has \[3\] for"), (None, "expert 2 lacks")]:
        states[2].pop(name, None)
        if value is not None:
            states[2][name] = value
        with pytest.raises(ConfigError, match=message):
            grafted(tiny_config, states)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "change", [{"no_causal_mask": True, "pool_type": "last"}, {"pool_type": "last"}]
)
def test_padding_that_is_seen_is_routed_like_any_token(tiny_config, change, checkpointing):
    """CLIPA-v2: no mask, features of the last position, which may be padding."""
    tiny_config["text_cfg"] |= change
    dense = dense_model(tiny_config)
    model = grafted(tiny_config, [dense.state_dict()] * E)
    model.set_grad_checkpointing(checkpointing)
    assert torch.allclose(model.encode_text(TEXT), dense.encode_text(TEXT), atol=1e-5)
    for name, routing in routings(model).items():
        assert len(routing.probs_TE) == TEXT.numel(), name
