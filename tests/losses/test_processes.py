"""Objectives in real processes (gloo, loopback): each of 1, 2 or 3 holds its share of the exact gradient.

Run as a script, this file is one of the processes.
"""

# Shapes: B local batch, G global batch; 2: as image and as text

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from test_objectives import ALL, WEIGHTS, Case, loop
from test_pairs import (
    EPS,
    RHO,
    STALE,
    G,
    assert_same,
    contrastive_loop,
    features,
    global_loop,
    gradients,
    scale_of,
    siglip_loop,
)
from torch import Tensor

from clipgraft import dist
from clipgraft.loss_settings import DistillationSettings, LossSettings
from clipgraft.objectives import (
    Features,
    ReferenceFeatures,
    expert_loss,
    memory_of,
    objective_of,
)
from clipgraft.recipes import OptimSettings

SIZES = (1, 2, 3)
PRECISIONS = {torch.float64: 1e-12, torch.float32: 1e-5}
TAU, BIAS, GAMMA, SMOOTHING = 0.1, -2.0, 0.3, 0.1
GROUPS = [0, 1, 0, 0, 2, 1]
ROWS = [7, 3, 19, 0, 11, 5]
ROWS_TWICE = [7, 3, 7, 0, 3, 5]
NUM = 20
TAUS_G2 = torch.linspace(0.05, 0.4, 2 * G).reshape(G, 2)  # as remembered: in float32
OPTIM = OptimSettings(lr=1.0)

_GLOBAL = {"eps": EPS, "gamma": {"schedule": "constant", "min": GAMMA}}
CASES: dict[str, dict[str, Any]] = {
    "contrastive": {"kind": "contrastive"},
    "masked": {"kind": "contrastive"},
    "siglip": {"kind": "siglip"},
    "v0": {"kind": "gcl", "temperature": "learned", **_GLOBAL},
    "v2": {"kind": "rgcl", "rho": RHO, "lr_tau": 0.01, "lr_tau_schedule": "const", **_GLOBAL},
    "v3": {"kind": "rgcl_g", "rho": RHO, **_GLOBAL},
    "v3 fastclip": {"kind": "rgcl_g", "rho": RHO, "tau_grad": "fastclip", **_GLOBAL},
    "twice": {"kind": "rgcl_g", **_GLOBAL},
}
# Every loss with every term, of two references; and projections, where dimensions differ.
GUIDED = {f"guided {kind}": (kind, WEIGHTS, True) for kind in ALL}
GUIDED["guided, projected"] = ("rgcl_g_reference", {"feature": 0.7, "affinity": 1.3}, False)


# --- one process ------------------------------------------------------------------------------------------------


def measured(world: dist.World, case: str, dtype: torch.dtype) -> list[Tensor]:
    """Loss, gradients of images, texts, scale and bias, and what is remembered, of the global batch."""
    num = G // world.size
    own = slice(world.rank * num, (world.rank + 1) * num)
    leaves = [side.detach()[own].clone().requires_grad_() for side in features(dtype=dtype)]
    leaves += [scale_of(TAU, dtype), torch.tensor(BIAS, dtype=dtype, requires_grad=True)]
    loss, table = loss_of(world, case, Features(*leaves), own)
    loss.backward()
    sides = [dist.gather(x.grad) / world.size for x in leaves[:2]]
    scalars = [dist.mean(torch.zeros_like(x) if x.grad is None else x.grad) for x in leaves[2:]]
    return [dist.mean(loss.detach()), *sides, *scalars, table]


def loss_of(world: dist.World, case: str, local: Features, own: slice) -> tuple[Tensor, Tensor]:
    if case == "masked":
        groups_G = torch.tensor(GROUPS)
        return expert_loss(world, local, SMOOTHING, groups_G)[0], torch.empty(0)
    settings = LossSettings(**CASES[case])
    rows_G = torch.tensor(ROWS_TWICE if case == "twice" else ROWS)
    memory = memory_of(settings, NUM, TAU)
    if memory is not None and case != "twice":
        memory.restore(remembered(memory.state(), rows_G))
    batch = SimpleNamespace(rows_B=rows_G[own])  # objectives look at nothing else
    loss, _ = objective_of(world, settings, OPTIM, memory, 9.0)(local, [], batch, 1.5)
    if memory is None:
        return loss, torch.empty(0)
    memory.settle()
    return loss, memory.state()


def remembered(table_NC: Tensor, rows_G: Tensor) -> Tensor:
    table_NC[rows_G, :2] = STALE
    if table_NC.shape[1] > 2:
        table_NC[rows_G, 2:4] = TAUS_G2
    return table_NC


def case_of(name: str, dtype: torch.dtype) -> tuple[Case, LossSettings, DistillationSettings]:
    kind, weights, equal_dims = GUIDED[name]
    loss = LossSettings(weight=0.8, **ALL[kind])
    return Case(2, dtype, equal_dims), loss, DistillationSettings(**weights)


def guided(world: dist.World, name: str, dtype: torch.dtype) -> list[Tensor]:
    """Total and gradients of all leaves, of the global batch."""
    case, loss, distillation = case_of(name, dtype)
    num = G // world.size
    own = slice(world.rank * num, (world.rank + 1) * num)
    references = [
        ReferenceFeatures(image[own], text[own], scale)
        for (image, text), scale in zip(case.references, case.scales, strict=True)
    ]
    memory = memory_of(loss, NUM, 0.25)
    objective = objective_of(world, loss, OPTIM, memory, 9.0, distillation, case.projections)
    local = Features(case.image[own], case.text[own], case.scale, case.bias)
    total, _ = objective(local, references, SimpleNamespace(rows_B=torch.tensor(ROWS)[own]), 0.0)
    total.backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in case.leaves]
    return [dist.mean(total.detach()), *map(dist.mean, grads)]


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    for size in reversed(SIZES):
        if rank >= size:
            break
        if size > 1:
            store = f"file://{folder}/store-{size}"
            torch_dist.init_process_group("gloo", store, rank=rank, world_size=size)
        world = dist.World(rank, size, torch.device("cpu"))
        jobs = [(measured, case) for case in CASES] + [(guided, name) for name in GUIDED]
        found = {
            f"{name} {dtype}": measure(world, name, dtype)
            for measure, name in jobs
            for dtype in PRECISIONS
        }
        if rank == 0:
            torch.save(found, folder / f"{size}.pt")
        if size > 1:
            dist.barrier()
            torch_dist.destroy_process_group()


# --- the laws -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[Tensor]]]:
    """What 1, 2 and 3 processes found: one launch of three, which leave one by one."""
    folder = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment)
        for rank in range(max(SIZES))
    ]
    assert [process.wait() for process in processes] == [0] * len(processes)
    return {size: torch.load(folder / f"{size}.pt", weights_only=True) for size in SIZES}


def by_loops(case: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients of the definitions, in float64, of the numbers that processes were given."""
    given = [x.detach().to(dtype) for x in (*features(dtype=dtype), scale_of(TAU, dtype))]
    image, text, scale = (x.double().requires_grad_() for x in given)
    bias = torch.tensor(BIAS, dtype=torch.float64, requires_grad=True)
    if case == "siglip":
        value = siglip_loop(image, text, scale, bias)
        return value, gradients(value, image, text, scale, bias)
    leaves, zero = [image, text, scale], torch.zeros((), dtype=torch.float64)
    if case in ("contrastive", "masked"):
        is_masked = case == "masked"
        groups = GROUPS if is_masked else [0] * G
        value = contrastive_loop(image, text, scale, SMOOTHING if is_masked else 0.0, groups)
        return value, [*gradients(value, *leaves), zero]
    kind = CASES[case]["kind"]
    tau = TAUS_G2.double().requires_grad_() if kind == "rgcl" else 1 / scale
    change = {"log_u": STALE.double(), "gamma": GAMMA}
    change["tau_grad"] = CASES[case].get("tau_grad", "exact")
    value, surrogate = global_loop(image, text, tau, kind, **change)
    if kind == "rgcl":
        return value, [*gradients(surrogate, image, text), zero, zero]
    return value, [*gradients(surrogate, *leaves), zero]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "twice"])
def test_processes_together_have_the_loss_and_the_gradients_of_its_definition(found, case, size):
    for dtype, rel in PRECISIONS.items():
        loss, *ours, _ = found[size][f"{case} {dtype}"]
        value, loops = by_loops(case, dtype)
        assert loss.dtype == dtype and ours[0].dtype == dtype
        assert loss.item() == pytest.approx(value.item(), rel=rel)
        assert_same(ours, loops, rel)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", GUIDED)
def test_processes_together_have_the_total_and_the_gradients_of_all_terms(found, name, size):
    for dtype, rel in PRECISIONS.items():
        total, *ours = found[size][f"{name} {dtype}"]
        case, loss, distillation = case_of(name, dtype)
        expected, grads, _ = loop(case.like(), loss, distillation)
        assert total.item() == pytest.approx(expected.item(), rel=rel)
        assert_same(ours, grads, rel)


def updated_log_u_loop(tau_G2: Tensor, before_G2: Tensor) -> list[list[float]]:
    image, text = (side.detach() for side in features())
    sims = [[float(image[i] @ text[j]) for j in range(G)] for i in range(G)]
    log_u = [[0.0, 0.0] for _ in range(G)]
    for i in range(G):
        for side in (0, 1):
            others = [sims[i][j] if side == 0 else sims[j][i] for j in range(G) if j != i]
            exps = [math.exp((other - sims[i][i]) / float(tau_G2[i, side])) for other in others]
            g, u = sum(exps) / (G - 1), math.exp(before_G2[i, side])
            u = g if math.isnan(u) else (1 - GAMMA) * u + GAMMA * g
            log_u[i][side] = math.log(u)
    return log_u


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["v0", "v2", "v3"])
def test_processes_remember_the_samples_of_all(found, case, size):
    *_, table = found[size][f"{case} {torch.float64}"]
    tau_G2 = TAUS_G2 if case == "v2" else torch.full((G, 2), TAU, dtype=torch.float64)
    expected = torch.tensor(updated_log_u_loop(tau_G2, STALE))
    torch.testing.assert_close(table[ROWS, :2], expected, rtol=1e-6, atol=1e-6)
    others = [row for row in range(NUM) if row not in ROWS]
    assert table[others, :2].isnan().all()
    if case == "v2":
        image, text = (side.detach() for side in features())
        tau = TAUS_G2.double().requires_grad_()
        change = {"log_u": STALE.double(), "gamma": GAMMA}
        (slope_G2,) = gradients(global_loop(image, text, tau, "rgcl", **change)[1], tau)
        wanted = (1 - OPTIM.beta1) * (2 * G * slope_G2).clamp(-5, 5)
        assert (wanted.abs() < 0.5 * (1 - 1e-6)).any()
        torch.testing.assert_close(table[ROWS, 4:6], wanted.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
def test_of_a_sample_that_is_in_a_batch_twice_the_last_row_counts(found, size):
    *_, table = found[size][f"twice {torch.float64}"]
    tau_G2 = torch.full((G, 2), TAU, dtype=torch.float64)
    seen = torch.tensor(updated_log_u_loop(tau_G2, torch.full((G, 2), math.nan)))
    last = {row: number for number, row in enumerate(ROWS_TWICE)}
    assert len(last) < G
    torch.testing.assert_close(
        table[list(last), :2], seen[list(last.values())], rtol=1e-6, atol=1e-6
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
