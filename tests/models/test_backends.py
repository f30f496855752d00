"""The three ways to run experts, against every token and choice by itself in float64; and two processes against one."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.config import ConfigError
from clipgraft.models import backends as execution
from clipgraft.models.backends import (
    Experts,
    choose_backend,
    mix,
    probe_grouped,
    wished_backend,
)
from clipgraft.models.build import build, mlp_parameters
from clipgraft.models.moe import routings, upcycle

T, D, H, E = 23, 16, 32, 4  # H: hidden
WAYS = ("loop", "grouped", "dense")
TEXT = torch.tensor(
    [[38, 5, 0, 39, 0, 0, 0, 0], [38, 9, 8, 7, 6, 39, 0, 0], [38, 1, 2, 3, 4, 5, 6, 39]]
)


def drawn(top_k: int, idle: int | None = None, seed: int = 0, num: int = T) -> list[Tensor]:
    """Tokens, gates, stacked weights, all wanting gradients, and choices; expert `idle` has no tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num, D), (num, top_k), (E, H, D), (E, H), (E, D, H), (E, D)]
    leaves = [torch.randn(shape, generator=generator) * 0.5 for shape in shapes]
    choices = [e for e in range(E) if e != idle]
    rows = [torch.randperm(len(choices), generator=generator)[:top_k] for _ in range(num)]
    topk_TK = torch.tensor(choices)[torch.stack(rows)]
    return [*(leaf.requires_grad_() for leaf in leaves), topk_TK]


def one_by_one(x, gates, w1, b1, w2, b2, topk) -> Tensor:
    """The definition: sum over the choices of a token of gate times MLP."""
    rows = []
    for t in range(len(x)):
        row = torch.zeros(D, dtype=x.dtype)
        for k, e in enumerate(topk[t].tolist()):
            row = row + gates[t, k] * (w2[e] @ F.gelu(w1[e] @ x[t] + b1[e]) + b2[e])
        rows.append(row)
    return torch.stack(rows)


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    return list(torch.autograd.grad((y * weight.to(y)).sum(), leaves))


CHOICES = [(1, None), (2, None), (3, 2), (4, None), (1, 0)]


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize(("top_k", "idle"), CHOICES)
def test_every_way_is_the_definition_forward_and_backward(backend, top_k, idle):
    *leaves, topk = drawn(top_k, idle)
    x, gates, *weights = leaves
    y = mix(Experts(*weights, F.gelu), x, gates, topk, backend)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = one_by_one(*exact, topk)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(y, leaves), gradients(expected, exact)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-5)
    if idle is not None:
        assert all((grad[idle] == 0).all() for grad in ours[2:])


def in_bf16(
    leaves: list[Tensor], topk: Tensor, backend: str, device: str, *, enabled: bool = True
) -> list[Tensor]:
    """What a way makes of these numbers on a device, and its gradients; in float32 if not enabled."""
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    x, gates, *weights = leaves
    with torch.autocast(device, torch.bfloat16, enabled=enabled):
        y = mix(Experts(*weights, F.gelu), x, gates, topk.to(device), backend)
    return [each.detach().cpu() for each in (y, *gradients(y, leaves))]


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Within what bf16 rounds; zeros are zeros."""
    assert (ours.double() - theirs.double()).norm() <= 0.02 * theirs.double().norm()


def test_frozen_experts_are_rounded_once_until_they_change():
    x, gates, *weights, topk = drawn(2)
    frozen = [weight.detach().clone() for weight in weights]

    def mixed(stacks: list[Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mix(Experts(*stacks, F.gelu), x, gates, topk, "loop").detach()

    assert torch.equal(mixed(frozen), mixed(weights))
    kept = [execution._copies[stack][1] for stack in frozen]
    assert torch.equal(mixed(frozen), mixed(weights))
    assert all(execution._copies[a][1] is b for a, b in zip(frozen, kept, strict=True))
    frozen[0].mul_(2)
    fresh = [stack.clone().requires_grad_() for stack in frozen]
    assert torch.equal(mixed(frozen), mixed(fresh))
    assert not torch.equal(mixed(frozen), mixed(weights))
    num = len(execution._copies)
    del kept, frozen
    assert len(execution._copies) == num - 4, "what is gone is still held"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize(("top_k", "idle"), CHOICES)
def test_on_a_gpu_every_way_is_the_definition_forward_and_backward(backend, top_k, idle):
    """Where all experts have had tokens before, so that what a kernel leaves as it is in memory is not zero."""
    *others, every = drawn(2, seed=1)
    assert set(every.flatten().tolist()) == set(range(E))
    in_bf16(others, every, backend, "cuda")
    *leaves, topk = drawn(top_k, idle)
    y, *grads = in_bf16(leaves, topk, backend, "cuda")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = one_by_one(*exact, topk)
    assert_near(y, expected)
    for number, (ours, theirs) in enumerate(zip(grads, gradients(expected, exact), strict=True)):
        is_stack = number >= 2  # each expert by itself
        for our, their in zip(ours, theirs, strict=True) if is_stack else [(ours, theirs)]:
            assert_near(our, their)


@pytest.mark.parametrize("backend", WAYS)
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
@pytest.mark.parametrize("is_bf16", [False, True])
def test_the_same_numbers_come_out_the_same_bits(backend, device, is_bf16):
    """Of so many tokens that threads share them, which add up rows by index in the order in which they arrive.

    (On GPUs for every such sum, on CPUs for `index_put` in float32, which is the gradient of `x[index]`.)
    """
    if device == "cuda" and backend == "grouped" and not is_bf16:
        pytest.skip("grouped is for bf16")
    *leaves, topk = drawn(2, num=4096)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, *others = [in_bf16(leaves, topk, backend, device, enabled=is_bf16) for _ in range(6)]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("backend", WAYS)
def test_no_tokens_at_all_give_gradients_of_zero(backend):
    *leaves, topk = drawn(2)
    x, gates, *weights = leaves
    y = mix(Experts(*weights, F.gelu), x[:0], gates[:0], topk[:0], backend)
    assert y.shape == (0, D)
    assert all((grad == 0).all() for grad in gradients(y, weights))


@pytest.mark.parametrize("backend", WAYS)
def test_autocast_computes_products_in_bf16_and_weighs_in_float32(backend):
    *leaves, topk = drawn(2)
    x, gates, *weights = leaves
    with torch.autocast("cpu", torch.bfloat16):
        y = mix(Experts(*weights, F.gelu), x, gates, topk, backend)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), one_by_one(*leaves, topk), rtol=0.03, atol=0.05)
    grads = gradients(y, leaves)
    assert [grad.dtype for grad in grads] == [torch.float32] * len(leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for our, their in zip(grads, gradients(one_by_one(*exact, topk), exact), strict=True):
        assert F.cosine_similarity(our.double().flatten(), their.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("backend", WAYS)
def test_gates_weigh_products_in_float32_and_the_sum_is_rounded_once(backend):
    """With experts that change nothing, of gates that bf16 cannot hold."""
    eye_EDD = torch.eye(D).expand(E, D, D)
    none_ED = torch.zeros(E, D)
    experts = Experts(eye_EDD, none_ED, eye_EDD, none_ED, lambda x: x)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(T, D, generator=generator).bfloat16()
    gates_TK = torch.rand(T, 2, generator=generator)
    assert (gates_TK != gates_TK.bfloat16()).all()
    topk_TK = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(T)])
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = mix(experts, x_TD, gates_TK, topk_TK, backend)
    expected_TD = sum(gates_TK[:, k, None] * x_TD.float() for k in range(2))
    assert torch.equal(y_TD, expected_TD.bfloat16())


# --- whole models ---------------------------------------------------------------------------------------------


def images(num: int = 3) -> Tensor:
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def grafted(config, *, backend="auto", top_k=2, image_layers="all", text_layers="all", spread=0.2):
    """Experts that differ from expert 0, more or less."""
    torch.manual_seed(0)
    model = build(config)
    states = [copy.deepcopy(model.state_dict()) for _ in range(E)]
    generator = torch.Generator().manual_seed(7)
    for state in states[1:]:
        for name in mlp_parameters(model):
            state[name] += spread * torch.randn(state[name].shape, generator=generator)
    layers = {"image_layers": image_layers, "text_layers": text_layers}
    upcycle(model, states, top_k=top_k, generator=torch.Generator().manual_seed(3), **layers)
    for tower in (model.visual, model.text):
        if hasattr(tower, "moe_state"):
            tower.moe_state.backend = backend
    return model


def trained_once(model: nn.Module, device: str = "cpu") -> dict[str, Tensor]:
    """Features and gradients of a batch with padding."""
    image, text, _ = model(images().to(device), TEXT.to(device))
    (image @ text.T).float().square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"image": image.detach(), "text": text.detach(), **grads}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["grouped", "dense"])
def test_models_agree_whatever_runs_their_experts(tiny_config, backend, checkpointing):
    found = []
    for way in ("loop", backend):
        model = grafted(tiny_config, backend=way)
        model.set_grad_checkpointing(checkpointing)
        found.append(trained_once(model))
        assert len(routings(model)["text.0"].probs_TE) == 4 + 6 + 8  # padding is in no way routed
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["auto", "grouped", "dense"])
def test_models_on_a_gpu_agree_whatever_runs_their_experts(tiny_config, backend, checkpointing):
    """With experts in the first blocks, of whose choices no rounding of another way decides."""
    found = []
    for way in ("loop", backend):
        model = grafted(tiny_config, backend=way, image_layers=[0], text_layers=[0]).cuda()
        model.set_grad_checkpointing(checkpointing)
        with torch.autocast("cuda", torch.bfloat16):
            trained_once(model, "cuda")
            model.zero_grad()
            found.append(trained_once(model, "cuda"))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        distance = (value - found[1][name]).norm() / value.norm()
        assert distance < 0.15, (name, distance)


LAYERS = [([], "all"), ("all", []), ([0], [1]), ([1], []), ([], [])]


@pytest.mark.parametrize(("image_layers", "text_layers"), LAYERS)
def test_identical_experts_in_any_layers_equal_the_dense_model(
    tiny_config, image_layers, text_layers
):
    torch.manual_seed(0)
    dense = build(tiny_config)
    model = grafted(tiny_config, image_layers=image_layers, text_layers=text_layers, spread=0)
    for ours, theirs in zip(model(images(), TEXT), dense(images(), TEXT), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    numbers = {"visual": image_layers, "text": text_layers}
    chosen = {f"{t}.{n}" for t, ns in numbers.items() for n in ([0, 1] if ns == "all" else ns)}
    assert set(routings(model)) == chosen


has_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not os.environ.get("CLIPGRAFT_LONG_TESTS"),
    reason="a minute of g++: LONG=1, and a machine that has it",
)


# The compiler hides this warning from users, not from pytest.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("generator", "device"),
    [
        ("aot_eager", "cpu"),
        pytest.param("inductor", "cpu", marks=has_compiler),
        pytest.param(
            "inductor",
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ),
    ],
)
def test_compiled_towers_have_the_same_numbers(tiny_config, generator, device):
    """The graph breaks where the loop asks how many rows an expert has, and a tower which tokens are real."""
    torch.compiler.reset()
    plain, model = (grafted(tiny_config).to(device) for _ in range(2))
    for name, x in (("visual", images().to(device)), ("text", TEXT.to(device))):
        own = getattr(plain, name)
        compiled = torch.compile(getattr(model, name), backend=generator)
        assert (compiled(x) - own(x)).norm() <= 1e-5 * own(x).norm()
        for tower in (compiled, own):
            tower(x).square().sum().backward()
        for ours, theirs in zip(compiled.parameters(), own.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()


def test_with_all_experts_at_once_a_layer_is_one_graph(tiny_config):
    model = grafted(tiny_config, backend="dense")
    mlp, x = model.visual.transformer.resblocks[0].mlp, torch.randn(2, 5, 32)
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mlp(x))


# --- which way ------------------------------------------------------------------------------------------------


def test_the_way_is_the_loop_unless_the_device_is_fast_at_more(monkeypatch):
    monkeypatch.delenv(execution.VARIABLE, raising=False)
    x = torch.randn(5, D, dtype=torch.bfloat16)
    assert choose_backend(wished_backend(D, H), x, H) == "loop"
    for way in WAYS:
        monkeypatch.setenv(execution.VARIABLE, way)
        assert choose_backend(wished_backend(D, H), x, H) == way


def standing_in(**changes: object) -> SimpleNamespace:
    """Tokens on a GPU, as far as it is asked which way they go."""
    about = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (5, D)}
    return SimpleNamespace(**about | {"device": torch.device("cuda", 0)} | changes)


@pytest.mark.parametrize(
    ("major", "works", "changes", "hidden", "way"),
    [
        (9, True, {}, H, "grouped"),
        (9, False, {}, H, "loop"),
        (8, True, {}, H, "loop"),  # there it is a loop that waits
        (10, True, {}, H, "loop"),  # there gradients of experts without rows were wrong
        (12, True, {}, H, "loop"),
        (9, True, {"dtype": torch.float32}, H, "loop"),
        (9, True, {"dtype": torch.float16}, H, "loop"),
        (9, True, {"shape": (5, 12)}, H, "loop"),
        (9, True, {}, 36, "loop"),
        (9, True, {"is_cuda": False}, H, "loop"),
    ],
)
def test_the_grouped_product_is_taken_where_it_is_fast_and_right(
    monkeypatch, major, works, changes, hidden, way
):
    monkeypatch.setattr(execution, "_probed", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(execution, "probe_grouped", lambda _: works)
    assert choose_backend("auto", standing_in(**changes), hidden) == way


def test_a_device_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(execution, "_probed", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(
        execution, "probe_grouped", lambda device: asked.append(device.index) is None
    )
    for index in (0, 1, 0, 1):
        x = standing_in(device=torch.device("cuda", index))
        assert choose_backend("auto", x, H) == "grouped"
    assert asked == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_of_capability_9_the_grouped_product_is_taken():
    x = torch.randn(5, D, device="cuda", dtype=torch.bfloat16)
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    assert choose_backend("auto", x, H) == ("grouped" if is_hopper else "loop")
    assert choose_backend("auto", x.float(), H) == "loop"


def test_the_variable_decides_for_a_model_when_experts_are_inserted(tiny_config, monkeypatch):
    monkeypatch.setenv(execution.VARIABLE, "dense")
    torch.manual_seed(0)
    model = build(tiny_config)
    layers = {"image_layers": "all", "text_layers": "all"}
    upcycle(model, [model.state_dict()] * 2, top_k=1, generator=torch.Generator(), **layers)
    assert model.visual.moe_state.backend == model.text.moe_state.backend == "dense"


@pytest.mark.parametrize(
    ("value", "width", "message"),
    [
        ("fast", 16, "CLIPGRAFT_MOE_BACKEND = 'fast' is unknown"),
        ("grouped", 12, "cannot for MLPs of 12 and 32"),
    ],
)
def test_a_wish_that_cannot_be_met_is_named(monkeypatch, value, width, message):
    monkeypatch.setenv(execution.VARIABLE, value)
    with pytest.raises(ConfigError, match=message):
        wished_backend(width, H)


def test_where_the_grouped_product_fails_the_loop_runs_and_the_log_says_so(monkeypatch, caplog):
    device = torch.device("cpu")
    with torch.inference_mode():  # of an evaluation
        assert probe_grouped(device) and not caplog.records

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *_):
            return x.clone()

        @staticmethod
        def backward(ctx, *_):
            raise RuntimeError("not backward on this device")

    def fail(*_, **__):
        raise RuntimeError("not on this device")

    for broken, message in (
        (fail, "not on"),
        (lambda x, *_, **__: Forward.apply(x), "not backward"),
    ):
        caplog.clear()
        monkeypatch.setattr(F, "grouped_mm", broken)
        assert not probe_grouped(device)
        assert "experts run one by one" in caplog.text and f"{message} " in caplog.text


# --- two processes --------------------------------------------------------------------------------------------

# Experts 2 and 3 have no tokens at all in the first half of the batch, which is what the first process sees.
SIDES = 2


class Tokens(nn.Module):
    """A MoE layer on its own; the router follows the first coordinates."""

    def __init__(self) -> None:
        super().__init__()
        config = {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
            "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1},
        }  # fmt: skip
        self.mlp = grafted(config, top_k=1).visual.transformer.resblocks[0].mlp
        with torch.no_grad():
            self.mlp.router.copy_(torch.eye(E, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def batch() -> Tensor:
    x = 0.1 * torch.randn(8, 5, 32, generator=torch.Generator().manual_seed(4))
    for row in range(8):
        x[row, :, row % 2 if row < 4 else row % E] = 3.0
    return x


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch_dist.init_process_group("gloo", store, rank=rank, world_size=SIDES)
    model = Tokens()
    parallel = nn.parallel.DistributedDataParallel(model)
    own = batch()[rank * 4 : (rank + 1) * 4]
    for _ in range(2):  # a second step fails where a parameter was left out of the first
        model.zero_grad()
        parallel(own).square().mean().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, folder / "grads.pt")
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def test_two_processes_with_idle_experts_have_the_gradient_of_one(tmp_path: Path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment)
        for rank in range(SIDES)
    ]
    model, x = Tokens(), batch()
    model.mlp.state.is_forward = True
    for half, used in ((x[:4], {0, 1}), (x, {0, 1, 2, 3})):
        model(half)
        assert set(model.mlp.routing.topk_TK.flatten().tolist()) == used
    model(x).square().mean().backward()
    assert [process.wait() for process in processes] == [0] * SIDES
    together = torch.load(tmp_path / "grads.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)
    assert (together["mlp.c_fc_weight"][3] != 0).any()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
