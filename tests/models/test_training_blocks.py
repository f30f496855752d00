"""Towers to train with have the numbers of open_clip's own: features, gradients, whatever is frozen or masked."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reduced import image_reduction
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from clipgraft import devices
from clipgraft.lean import open_clip
from clipgraft.models.build import build
from clipgraft.models.moe import insert_experts, routings
from clipgraft.models.patches import drop_patches, split_patches
from clipgraft.models.training_blocks import (
    LastTrainingBlock,
    TrainingBlock,
    attend,
    attend_by_torch,
    speed_up,
)

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 9, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2},
}
BATCH = 3

KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean of patches": {"vision_cfg": {"pool_type": "avg"}},
    "norm behind the mean": {"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True}},
    "norm behind the token": {"vision_cfg": {"final_ln_after_pool": True}},
    "fixed positions": {"vision_cfg": {"pos_embed_type": "sin_cos_2d", "no_ln_pre": True}},
    "QuickGELU": {"quick_gelu": True},
    "tanh": {
        "vision_cfg": {"act_kwargs": {"approximate": "tanh"}},
        "text_cfg": {"act_kwargs": {"approximate": "tanh"}},
    },
    "text seen whole": {"text_cfg": {"no_causal_mask": True, "pool_type": "last"}},
    "first of the text": {"text_cfg": {"no_causal_mask": True, "pool_type": "first"}},
    "last of a causal text": {"text_cfg": {"pool_type": "last"}},
    "end of the text by its number": {"text_cfg": {"pool_type": "eos", "eos_id": 59}},
    "class token of the text": {"text_cfg": {"embed_cls": True}},
    "one block": {"vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1}},
    "projection with a bias": {"text_cfg": {"proj_bias": True}},
    "scaled layers": {"vision_cfg": {"ls_init_value": 0.1}},
    "other blocks": {"vision_cfg": {"qk_norm": True}, "text_cfg": {"scale_fc": True}},
    "pooled by attention": {"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2}},
}


def model_of(**changes: Any) -> nn.Module:
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    torch.manual_seed(0)
    model = build(config)
    for (
        parameter
    ) in model.parameters():  # biases and norms that are 0 or 1 would hide what is left out
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model.train()


def batch_of(model: nn.Module, num: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num, 3, *model.visual.image_size, generator=generator)
    end, length = model.text.vocab_size - 1, model.text.context_length
    texts = torch.randint(1, end, (num, length), generator=generator)
    for row, place in enumerate(torch.randint(1, length, (num,), generator=generator).tolist()):
        texts[row, place:] = 0
        texts[row, place] = end
    return images.to(model.logit_scale.dtype), texts


def run(
    model: nn.Module, num: int = BATCH, is_mixed: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Features, and the gradients of a loss in which each of them counts differently."""
    device = model.logit_scale.device
    images, texts = (each.to(device) for each in batch_of(model, num))
    model.zero_grad()
    with devices.attention(device):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_mixed):
            features = model(images, texts)[:2]
        weights = torch.linspace(-1, 1, features[0].numel(), device=device).view_as(features[0])
        sum((each.float() * weights).sum() for each in features).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [each.detach().cpu() for each in features], {n: x.cpu() for n, x in grads.items()}


def distance(own: Tensor, other: Tensor) -> float:
    return ((own - other).norm() / other.norm().clamp_min(1e-9)).item()


def errors(own: nn.Module, other: nn.Module, num: int = BATCH) -> tuple[float, float]:
    """The largest relative error of features and that of gradients."""
    (features, grads), (their_features, their_grads) = run(own, num), run(other, num)
    assert grads.keys() == their_grads.keys()
    # What is zero but for rounding, as the gradient of a bias of keys, has no relative error.
    least = 1e-3 * max(grad.norm().item() for grad in their_grads.values())
    of_grads = {
        name: (grads[name] - grad).norm().item() / max(grad.norm().item(), least)
        for name, grad in their_grads.items()
    }
    return max(map(distance, features, their_features)), max(of_grads.values())


def assert_same(own: nn.Module, other: nn.Module, num: int = BATCH) -> None:
    of_features, of_grads = errors(own, other, num)
    assert of_features < 1e-5 and of_grads < 1e-4, (of_features, of_grads)


def quick(plain: nn.Module) -> nn.Module:
    model = copy.deepcopy(plain)
    speed_up(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_gradients_are_those_of_open_clip(kind):
    plain = model_of(**KINDS[kind])
    assert_same(quick(plain), plain)


def published(name: str, layers: int | None) -> nn.Module:
    """A published shape, in few blocks unless `layers` is None."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    for part in ("vision_cfg", "text_cfg"):
        if layers is not None:
            config[part]["layers"] = layers
    config["text_cfg"]["vocab_size"] = 500
    for key in ("hf_tokenizer_name", "tokenizer_kwargs"):
        config["text_cfg"].pop(key, None)
    torch.manual_seed(0)
    return build(config).train()


# The number of blocks; None is all.
SHAPES = {
    "ViT-B-32": None,
    "ViT-B-16": None,
    "ViT-L-14": 2,
    "ViT-L-14-CLIPA": 2,
    "ViT-B-32-quickgelu": 2,
}
LONG = pytest.mark.skipif(
    not os.environ.get("CLIPGRAFT_LONG_TESTS"), reason="takes minutes: make test LONG=1"
)


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_have_the_numbers_of_open_clip(name):
    plain = published(name, SHAPES[name])
    model = quick(plain)
    for tower in (model.visual, model.text):
        assert type(tower.transformer.resblocks[0]) is TrainingBlock
    assert_same(model, plain, 2)


@LONG
@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-L-14-CLIPA"])
def test_published_models_of_whole_depth_have_the_numbers_of_open_clip(name):
    plain = published(name, None)
    assert_same(quick(plain), plain, 2)


BF16: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        kind: (functools.partial(model_of, **KINDS[kind]), 24)
        for kind in ("class token", "mean of patches", "QuickGELU", "text seen whole")
    },
    **{
        name: (functools.partial(published, name, 2), 4)
        for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-CLIPA")
    },
}


@pytest.mark.parametrize("kind", BF16)
def test_in_bf16_the_error_is_that_of_bf16(kind):
    make, num = BF16[kind]
    plain = make()
    exact = run(plain, num)
    found = []
    for model in (quick(plain), plain):
        features, grads = run(model, num, is_mixed=True)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        both = zip(features, exact[0], strict=True)
        own, other = (torch.cat([g[n].flatten() for n in exact[1]]) for g in (grads, exact[1]))
        found.append([*(distance(a.float(), b) for a, b in both), distance(own, other)])
    for ours, theirs in zip(*found, strict=True):
        assert 0 < ours < 1.25 * theirs, found


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("way", [attend, attend_by_torch])
def test_attention_is_the_formula(way, is_causal):
    torch.manual_seed(0)
    num, length, heads, width = 2, 5, 3, 4
    qkv = torch.randn(num, length, 3 * heads * width, dtype=torch.float64, requires_grad=True)
    query, key, value = qkv.view(num, length, 3, heads, width).permute(2, 0, 3, 1, 4)
    score = query @ key.transpose(-1, -2) / 2
    if is_causal:
        score = score + torch.full((length, length), float("-inf")).triu(1)
    expected = (score.exp() / score.exp().sum(-1, keepdim=True) @ value).transpose(1, 2).flatten(2)
    weights = torch.randn_like(expected)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), qkv)
    with sdpa_kernel(SDPBackend.MATH):
        got = way(qkv, heads, is_causal)
    (ours,) = torch.autograd.grad((got * weights).sum(), qkv)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours, theirs)


def test_the_stem_is_the_convolution():
    torch.manual_seed(0)
    conv, images = nn.Conv2d(3, 5, (4, 2), (4, 2), bias=False), torch.randn(2, 3, 8, 6)
    product = split_patches(images, (2, 3)) @ conv.weight.flatten(1).T
    torch.testing.assert_close(product, conv(images).flatten(2).transpose(1, 2))


def test_only_towers_of_one_token_compute_one_token_at_the_end():
    pools = {
        "class token": (True, True),
        "mean of patches": (False, True),
        "text seen whole": (True, True),
        "other blocks": (False, False),
        "pooled by attention": (False, True),
    }
    for kind, expected in pools.items():
        model = quick(model_of(**KINDS[kind]))
        last = [tower.transformer.resblocks[-1] for tower in (model.visual, model.text)]
        assert tuple(isinstance(block, LastTrainingBlock) for block in last) == expected, kind


def test_names_values_and_the_random_state_stay():
    plain = model_of()
    model = copy.deepcopy(plain)
    state = torch.get_rng_state()
    speed_up(model)
    assert torch.equal(torch.get_rng_state(), state)
    own, other = model.state_dict(), plain.state_dict()
    assert list(own) == list(other)
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert isinstance(model.text, open_clip.transformer.TextTransformer)


def test_evaluation_follows_each_batch_and_not_the_one_before():
    plain = model_of().eval()
    model = quick(plain)
    images, texts = batch_of(plain)
    with torch.inference_mode():
        model(images, texts)
        torch.testing.assert_close(
            model.encode_text(texts[:2, :7]), plain.encode_text(texts[:2, :7])
        )
        torch.testing.assert_close(model.encode_image(images[1:]), plain.encode_image(images[1:]))


@pytest.mark.parametrize("raw", ["random", "grid", "block"])
def test_towers_that_drop_patches_have_the_same_numbers(raw):
    plain = model_of()
    drop_patches(plain, image_reduction(raw))
    plain.visual.image_bits_B = torch.arange(BATCH) * 12345
    assert_same(quick(plain), plain)


def with_experts(**changes: Any) -> nn.Module:
    model = model_of(**changes)
    insert_experts(model, 3, 2, image_layers="all", text_layers=[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_experts_choose_as_before_for_every_token():
    plain = with_experts()
    model = quick(plain)
    blocks = (model.visual.transformer.resblocks[-1], model.text.transformer.resblocks[-1])
    assert [type(block) for block in blocks] == [TrainingBlock, LastTrainingBlock]
    assert_same(model, plain)
    own, other = routings(model), routings(plain)
    assert own.keys() == other.keys() == {"visual.0", "visual.1", "text.0"}
    for name in own:
        torch.testing.assert_close(own[name].logits_TE, other[name].logits_TE)


@pytest.mark.parametrize("make", [model_of, with_experts])
def test_checkpointing_changes_nothing(make):
    model = quick(make())
    features, grads = run(model)
    model.set_grad_checkpointing(True)
    again, their_grads = run(model)
    assert all(torch.equal(a, b) for a, b in zip(features, again, strict=True))
    assert all(torch.equal(grads[name], their_grads[name]) for name in grads)


# Its tracer looks at the gradients of tensors that have none, and warns itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_model_has_the_same_numbers():
    plain = model_of(quick_gelu=True)
    model = quick(plain)
    for tower in (model.visual, model.text):
        for block in tower.transformer.resblocks:
            block.compile(backend="aot_eager")
    assert_same(model, plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("kind", ["class token", "class token of the text"])
def test_what_changes_with_a_batch_is_nothing_that_compiled_blocks_take_for_fixed(kind):
    """CUDA graphs are recorded anew where it has moved."""
    model = quick(model_of(**KINDS[kind]))
    stays: dict[torch.dtype, set[bool]] = {}

    def look(graph: Any, inputs: list[Any]) -> Any:
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        for node, value in zip(nodes, inputs, strict=True):
            if isinstance(value, Tensor):
                about = node.meta.get("tensor_dict", {})
                stays.setdefault(value.dtype, set()).add("_dynamo_static_input_type" in about)
        return graph.forward

    model.text.transformer.resblocks[-1].compile(backend=look)
    model.encode_text(batch_of(model)[1])
    assert stays == {torch.float32: {False, True}, torch.int64: {False}}


def products(model: nn.Module) -> int:
    """FLOPs of the products of a backward pass."""
    images, texts = batch_of(model)
    loss = sum(each.float().square().sum() for each in model(images, texts)[:2])
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_what_is_frozen_costs_no_product():
    model = quick(model_of(vision_cfg={"pool_type": "avg"}, text_cfg={"layers": 1})).requires_grad_(
        False
    )
    width, tokens = 32, BATCH * 17
    block = model.visual.transformer.resblocks[1]
    head = 2 * BATCH * width * 16  # the projection of the feature: backward to what it is of
    fc, qkv, out = (2 * tokens * width * n * width for n in (4, 3, 1))
    attention = 4 * 2 * BATCH * 17 * 17 * width  # of queries, keys, values and shares
    block.mlp.c_proj.requires_grad_(True)
    assert products(model) == head + fc  # its weight's gradient, and nothing before it
    block.mlp.requires_grad_(True)
    assert products(model) == head + 3 * fc
    block.attn.out_proj.requires_grad_(True)
    assert products(model) == head + 4 * fc + out
    block.attn.in_proj_weight.requires_grad_(True)
    assert products(model) == head + 4 * fc + 2 * out + attention + qkv
    model.requires_grad_(False)
    model.visual.transformer.resblocks[0].mlp.requires_grad_(True)
    assert products(model) == head + 3 * fc + 2 * fc + out + attention + qkv


class Masks(TorchFunctionMode):
    """Notes how attention is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function is nn.functional.scaled_dot_product_attention:
            has_mask = named.get("attn_mask") is not None
            self.seen.append((has_mask, bool(named.get("is_causal"))))
        return function(*arguments, **named)


KINDS_OF_INPUT = torch.bfloat16, torch.float32


class Kinds(TorchDispatchMode):
    """What kind of numbers each operator is given first, norms and copies alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("native_layer_norm", "_to_copy") and args[0].dim() > 1:
            self.seen.append((name, args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _autocast_of_a_gpu():
    """As `torch.autocast("cuda")` has it, which refuses where there is none."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.usefixtures("_autocast_of_a_gpu")
def test_on_a_gpu_norms_do_not_copy_their_input_to_float32():
    """Tensors of a GPU without one: shapes and kinds alone."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        x_BLD, exact_BLD = (torch.empty(4, 5, 8, dtype=kind) for kind in KINDS_OF_INPUT)
        norms = nn.Module()
        norms.visual = norms.text = open_clip.transformer.LayerNorm(8)
        with Kinds() as plain:
            norms.visual(x_BLD)
        speed_up(norms)
        with Kinds() as ours:
            assert norms.visual(x_BLD).dtype == torch.bfloat16
            norms.visual(exact_BLD)
    copies = [("_to_copy", torch.bfloat16), ("native_layer_norm", torch.float32)]
    assert plain.seen == [*copies, ("_to_copy", torch.float32)]
    assert ours.seen == [("native_layer_norm", kind) for kind in KINDS_OF_INPUT]


def test_accelerators_are_given_no_mask_that_flash_attention_lacks():
    model = quick(model_of())
    images, texts = batch_of(model)
    model.to("meta")
    with Masks() as masks:
        model.encode_image(images.to("meta"))
        assert masks.seen == [(False, False)] * 2
        masks.seen.clear()
        model.encode_text(texts.to("meta"))
        assert masks.seen == [
            (False, True),
            (True, False),
        ]  # the last: one token sees those before it


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_has_the_same_numbers(kind):
    """As on a CPU, gradients too."""
    plain = model_of(**KINDS[kind])
    with devices.float32_products():
        assert_same(quick(plain).cuda(), plain)
