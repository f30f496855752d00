"""The loss of a phase, all terms and weights, against loops over one pair at a time; processes are threads here."""

# Shapes: B local batch, G global batch, D embedding; 2: as image and as text

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft import dist
from clipgraft.data.loader import Batch
from clipgraft.gradcache import backward_in_parts
from clipgraft.loss_settings import DistillationSettings, LossSettings
from clipgraft.losses.distillation import Projection
from clipgraft.objectives import Features, ReferenceFeatures, memory_of, objective_of
from clipgraft.recipes import OptimSettings

G, D, TAU = 6, 5, 0.25
WEIGHTS = {"feature": 0.7, "affinity": 1.3, "interactive": 0.4}
EPS, RHO = 1e-3, 0.5
NUM_PARTS = 3
LOSSES = {
    "contrastive": {},
    "siglip": {"kind": "siglip"},
    "gcl": {"kind": "gcl", "temperature": "learned", "eps": EPS},
    "rgcl": {"kind": "rgcl", "rho": RHO, "eps": EPS, "lr_tau": 1e-3, "lr_tau_schedule": "const"},
    "rgcl_g": {"kind": "rgcl_g", "rho": RHO, "eps": EPS},
}
DRRHO = {
    f"{name}_reference": {**LOSSES[name], "margins": "reference"}
    for name in ("gcl", "rgcl", "rgcl_g")
}
ALL = {**LOSSES, **DRRHO}


class Ranks:
    """As many threads as processes, each with a part of the batch; `gather` is theirs."""

    def __init__(self, num: int) -> None:
        self.num, self.barrier = num, threading.Barrier(num, timeout=20)
        self.here, self.slots = threading.local(), [None] * num

    def gather(self, local: Tensor) -> Tensor:
        if self.num == 1:
            return local
        self.slots[self.here.rank] = local.detach()
        self.barrier.wait()
        whole = torch.cat(self.slots)
        self.barrier.wait()
        return whole

    def run(self, work):
        """What each rank makes of its number, in order."""

        def of(rank: int):
            self.here.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.num) as pool:
            return list(pool.map(of, range(self.num)))


class Case:
    """Features, references and projections of a batch, as leaves in one precision."""

    def __init__(self, num_references: int, dtype: torch.dtype, equal_dims: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)

        def drawn(dim: int) -> list[Tensor]:
            sides = torch.randn(2, G, dim, generator=generator, dtype=torch.float64)
            return [F.normalize(side, dim=1).to(dtype) for side in sides]

        dims = [D] * num_references if equal_dims else [3, D, 7][:num_references]
        self.image, self.text = (x.requires_grad_() for x in drawn(D))
        self.scale = torch.tensor(1 / TAU, dtype=dtype, requires_grad=True)
        self.bias = torch.tensor(-2.0, dtype=dtype, requires_grad=True)
        self.references = [drawn(dim) for dim in dims]
        self.scales = [torch.tensor(each, dtype=dtype) for each in (8.0, 3.0, 20.0)][: len(dims)]
        self.projections = [
            None if dim == D else Projection(D, dim, seed=dim).to(dtype) for dim in dims
        ]

    @property
    def leaves(self) -> list[Tensor]:
        maps = [p for each in self.projections if each is not None for p in each.parameters()]
        return [self.image, self.text, self.scale, self.bias, *maps]

    def like(self) -> Case:
        """The same numbers in float64, as other leaves."""
        other = Case.__new__(Case)
        for name in ("image", "text", "scale", "bias"):
            setattr(other, name, getattr(self, name).detach().double().requires_grad_())
        other.references = [[x.double() for x in each] for each in self.references]
        other.scales = [x.double() for x in self.scales]
        other.projections = []
        for each in self.projections:
            copy = None
            if each is not None:
                copy = Projection(D, len(each.image), seed=0).double()
                copy.load_state_dict(each.state_dict())
            other.projections.append(copy)
        return other


def run(
    case: Case,
    loss: LossSettings,
    distillation: DistillationSettings,
    num_ranks,
    monkeypatch,
    steps=1,
):
    """Total, its gradients and what is logged: mean over processes."""
    ranks, memory = Ranks(num_ranks), memory_of(loss, 20, TAU)
    monkeypatch.setattr(dist, "gather", ranks.gather)
    rows = torch.arange(G) * 3
    num = G // num_ranks

    def work(rank: int):
        own = slice(rank * num, (rank + 1) * num)
        world = dist.World(rank, num_ranks, torch.device("cpu"))
        objective = objective_of(
            world, loss, OptimSettings(lr=1.0), memory, 3, distillation, case.projections
        )
        batch = Batch(torch.empty(num), torch.empty(num), rows[own], rows[own])
        references = [
            ReferenceFeatures(image[own], text[own], scale)
            for (image, text), scale in zip(case.references, case.scales, strict=True)
        ]
        features = Features(case.image[own], case.text[own], case.scale, case.bias)
        return objective(features, references, batch, 0.0)

    results = ranks.run(work)
    total = torch.stack([each for each, _ in results]).mean()
    extras = {
        name: torch.stack([each[name].double() for _, each in results]).mean()
        for name in results[0][1]
    }
    grads = torch.autograd.grad(total, case.leaves, allow_unused=True)
    return (
        total,
        [torch.zeros_like(x) if d is None else d for x, d in zip(case.leaves, grads, strict=True)],
        extras,
    )


# --- the definitions ----------------------------------------------------------------------------------------


def similarities(case: Case, is_excess: bool) -> list[list[Tensor]]:
    sims = [[(case.image[i] * case.text[j]).sum() for j in range(G)] for i in range(G)]
    if is_excess:
        for i in range(G):
            for j in range(G):
                others = [(image[i] * text[j]).sum() for image, text in case.references]
                sims[i][j] = sims[i][j] - sum(others) / len(others)
    return sims


def pair_loop(case: Case, loss: LossSettings) -> tuple[Tensor, Tensor]:
    """Value, and what has the published gradient: u is a constant that g / (eps + u) is the gradient's share of."""
    sims = similarities(case, loss.margins == "reference")
    value = surrogate = torch.zeros((), dtype=torch.float64)
    tau = 1 / case.scale
    if loss.kind == "siglip":
        for i in range(G):
            for j in range(G):
                sign = 1 if i == j else -1
                value = value + (1 + (-sign * (sims[i][j] * case.scale + case.bias)).exp()).log()
        return value / G, value / G
    for side in (0, 1):
        for i in range(G):
            row = [sims[i][j] if side == 0 else sims[j][i] for j in range(G)]
            if loss.kind == "contrastive":
                log_sum = sum((x * case.scale).exp() for x in row).log()
                value = surrogate = value + log_sum - row[i] * case.scale
                continue
            own_tau = torch.tensor(TAU).double() if loss.kind == "rgcl" else tau
            g = sum(((row[j] - row[i]) / own_tau).exp() for j in range(G) if j != i) / (G - 1)
            v = EPS + g.item()
            if loss.kind == "gcl":
                value, surrogate = value + math.log(v), surrogate + g / v
            else:
                outer = own_tau * (math.log(v) + RHO)
                value = value + outer.item()
                surrogate = surrogate + own_tau.detach() * g / v + outer
    return value / (2 * G), surrogate / (2 * G)


def feature_loop(case: Case) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for (image, text), projection in zip(case.references, case.projections, strict=True):
        maps = (None, None) if projection is None else (projection.image, projection.text)
        for rows, others, weight in ((case.image, image, maps[0]), (case.text, text, maps[1])):
            for i in range(G):
                row = rows[i] if weight is None else weight @ rows[i]
                row = row if weight is None else row / (row * row).sum().sqrt()
                total = total + ((row - others[i]) ** 2).sum() / G / len(case.references)
    return total


def affinity_loop(case: Case, is_kl: bool) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for side, (rows, columns) in enumerate(((case.image, case.text), (case.text, case.image))):
        for i in range(G):
            logit = torch.stack([case.scale * (rows[i] * columns[j]).sum() for j in range(G)])
            p = torch.zeros(G, dtype=torch.float64)
            for reference, scale in zip(case.references, case.scales, strict=True):
                theirs = [scale * reference[side][i] @ reference[1 - side][j] for j in range(G)]
                p = p + torch.stack(theirs).softmax(0) / len(case.references)
            total = total - (p * (logit - logit.exp().sum().log())).sum()
            total = total + ((p * p.log()).sum() if is_kl else 0)
    return total / (2 * G)


def interactive_loop(case: Case) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for image, text in case.references:
        for rows, columns in ((case.image, text), (case.text, image)):
            for i in range(G):
                logits = [case.scale * (rows[i] * columns[j]).sum() for j in range(G)]
                total = total + sum(x.exp() for x in logits).log() - logits[i]
    return total / (2 * G * len(case.references))


def loop(case: Case, loss: LossSettings, distillation: DistillationSettings):
    """Total, its gradients, and each term."""
    value, surrogate = pair_loop(case, loss)
    terms = {"pair": value}
    total = loss.weight * surrogate
    for name, weight in (
        ("feature", distillation.feature),
        ("affinity", distillation.affinity),
        ("interactive", distillation.interactive),
    ):
        if weight:
            is_kl = distillation.affinity_form == "kl"
            terms[name] = {
                "feature": feature_loop,
                "affinity": lambda case, is_kl=is_kl: affinity_loop(case, is_kl),
                "interactive": interactive_loop,
            }[name](case)
            total = total + weight * terms[name]
    grads = torch.autograd.grad(total, case.leaves, allow_unused=True)
    total = total + loss.weight * (value - surrogate)
    return (
        total,
        [torch.zeros_like(x) if d is None else d for x, d in zip(case.leaves, grads, strict=True)],
        terms,
    )


def assert_same(ours: list[Tensor], theirs: list[Tensor], rel: float) -> None:
    for our, its in zip(ours, theirs, strict=True):
        assert (our.double() - its).norm() <= rel * its.norm() + rel * 1e-3


COMBINATIONS = [
    set(),
    {"feature"},
    {"affinity"},
    {"interactive"},
    {"feature", "affinity"},
    {"feature", "interactive"},
    {"affinity", "interactive"},
    {"feature", "affinity", "interactive"},
]


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(sorted(names)) or "pair")
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", ALL)
def test_the_total_is_the_sum_of_its_terms_on_any_number_of_processes(
    kind, num_ranks, names, monkeypatch
):
    loss = LossSettings(weight=0.8, **ALL[kind])
    distillation = DistillationSettings(**{name: WEIGHTS[name] for name in names})
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        case = Case(2, dtype, equal_dims="interactive" in names)
        total, grads, extras = run(case, loss, distillation, num_ranks, monkeypatch)
        expected, its_grads, terms = loop(case.like(), loss, distillation)
        assert total.item() == pytest.approx(expected.item(), rel=rel)
        if (
            kind.startswith("rgcl")
            and "rgcl_g" not in kind
            and not names & {"affinity", "interactive"}
        ):
            assert grads[2] == 0
        assert_same(grads, its_grads, rel)
        for name, term in terms.items():
            assert extras[name].item() == pytest.approx(term.item(), rel=rel)
        assert {"pair", "feature", "affinity", "interactive"} & extras.keys() == terms.keys()


@pytest.mark.parametrize("form", ["cross_entropy", "kl"])
@pytest.mark.parametrize("num_references", [1, 3])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_references_of_any_dimension_are_averaged(num_ranks, num_references, form, monkeypatch):
    loss = LossSettings(**ALL["rgcl_g_reference"])
    distillation = DistillationSettings(feature=0.7, affinity=1.3, affinity_form=form)
    case = Case(num_references, torch.float64)
    total, grads, extras = run(case, loss, distillation, num_ranks, monkeypatch)
    expected, its_grads, terms = loop(case.like(), loss, distillation)
    assert len(case.leaves) == 4 + 2 * (num_references - num_references // 2)
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same(grads, its_grads, 1e-12)
    assert extras["affinity"].item() == pytest.approx(terms["affinity"].item(), rel=1e-12)


@pytest.mark.parametrize("kind", DRRHO)
def test_what_is_logged_as_infonce_is_that_of_the_model_alone(kind, monkeypatch):
    case = Case(2, torch.float64)
    _, _, extras = run(case, LossSettings(**DRRHO[kind]), DistillationSettings(), 2, monkeypatch)
    infonce, _ = pair_loop(case.like(), LossSettings())
    assert extras["infonce"].item() == pytest.approx(infonce.item(), rel=1e-6)


def test_margins_of_a_reference_that_is_the_model_are_zero(monkeypatch):
    """Nothing is in excess: all negatives weigh the same, and g is 1."""
    case = Case(1, torch.float64, equal_dims=True)
    case.references = [[case.image.detach(), case.text.detach()]]
    loss = LossSettings(kind="gcl", margins="reference", eps=1e-14)
    total, _, extras = run(case, loss, DistillationSettings(), 1, monkeypatch)
    assert total.item() == pytest.approx(0, abs=1e-12)
    assert extras["kl"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", ALL)
def test_parts_have_the_gradient_of_the_whole_with_every_term(kind, num_ranks, monkeypatch):
    loss = LossSettings(**ALL[kind])
    distillation = DistillationSettings(**WEIGHTS)
    case = Case(2, torch.float64, equal_dims=True)
    case.projections = [Projection(D, D, seed=each).double() for each in (1, 2)]
    total, grads, _ = run(case, loss, distillation, num_ranks, monkeypatch)
    ranks, memory = Ranks(num_ranks), memory_of(loss, 20, TAU)
    monkeypatch.setattr(dist, "gather", ranks.gather)
    rows, num = torch.arange(G) * 3, G // num_ranks
    lock, sums = threading.Lock(), [torch.zeros_like(x) for x in case.leaves]

    def work(rank: int):
        own = slice(rank * num, (rank + 1) * num)
        copy = case.like()
        model = Leaves(copy, own)
        world = dist.World(rank, num_ranks, torch.device("cpu"))
        objective = objective_of(
            world, loss, OptimSettings(lr=1.0), memory, 3, distillation, copy.projections
        )
        batch = Batch(torch.empty(num), torch.empty(num), rows[own], rows[own])
        references = [
            ReferenceFeatures(image[own], text[own], scale)
            for (image, text), scale in zip(copy.references, copy.scales, strict=True)
        ]
        value, _ = backward_in_parts(
            model,
            NUM_PARTS,
            model.part,
            lambda *each: objective(Features(*each), references, batch, 0.0),
        )
        with lock:
            for total, leaf in zip(sums, copy.leaves, strict=True):
                total += 0 if leaf.grad is None else leaf.grad / num_ranks
        return value

    values = ranks.run(work)
    assert torch.stack(values).mean().item() == pytest.approx(total.item(), rel=1e-12)
    assert_same(sums, grads, 1e-12)


class Leaves(torch.nn.Module):
    """A model whose features are its parameters."""

    def __init__(self, case: Case, own: slice) -> None:
        super().__init__()
        self.case, self.own = case, own

    def part(self, _: torch.nn.Module, part: int):
        num = (self.own.stop - self.own.start) // NUM_PARTS
        first = self.own.start + part * num
        rows = slice(first, first + num)
        return self.case.image[rows], self.case.text[rows], self.case.scale, self.case.bias
