"""Stages in 1 to 4 real processes (gloo, loopback, and shared memory), whole and sharded: the gradients of one process.

The gradients are those that the optimizer is given, step by step. Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
import yaml
from test_references import made
from test_train import LOSSES, folder, make_data, phase
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import profile

from clipgraft import dist
from clipgraft.checkpoint import read_weights
from clipgraft.config import ConfigError, load_config
from clipgraft.data.memory import SampleMemory
from clipgraft.data.tokens import Tokens
from clipgraft.experts import finetune_expert
from clipgraft.graft import assemble
from clipgraft.parallel import GradientMean, in_all_processes, sharded_dim
from clipgraft.pretrain import pretrain
from clipgraft.router import finetune_router
from clipgraft.settings import AssembleJob, ExpertJob, RouterJob
from clipgraft.training_state import TrainingState

SIZES = (1, 2, 3, 4)
NEAR = (2, 3)  # that also share memory, as processes of one machine do
BATCH, STEPS = 24, 2
ADAM = {"lr": 1e-2, "eps": 1e-2}  # with a small eps, Adam takes whole steps for rounding
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.5}
OPTIMIZERS = {
    "adamw": ADAM,
    "lamb": {"name": "lamb", **ADAM},
    "lion": {"name": "lion", "lr": 1e-3},
    "sgd": SGD,
}
GUIDED = {"kind": "rgcl_g", "rho": 0.5, "margins": "reference", "weight": 0.5}
TERMS = {"feature": 0.5, "affinity": 1.0}
PARTS = {"accumulate": 2}
CLIPPED = {"optim": ADAM | {"max_grad_norm": 0.1}}

# Settings of a training, by stage and name; each must be the same in 1, 2, 3 and 4 processes.
EXACT: dict[str, dict[str, Any]] = {
    **{
        f"pretrain {name}": {"loss": LOSSES[name]} for name in ("siglip", "v0", "v2", "v3", "scent")
    },
    "pretrain contrastive": {},
    "pretrain clipped": CLIPPED,
    "pretrain v3 in parts": {"loss": LOSSES["v3"], **PARTS},
    "pretrain guided": {"loss": GUIDED, "references": ["near"], "distillation": TERMS},
    "pretrain projected": {"references": ["far"], "distillation": TERMS},
    "expert homogeneous": {"batches": "homogeneous"},
    "expert ordinary": {"batches": "ordinary", "label_smoothing": 0.0},
    "expert short captions": {"batches": "homogeneous", "short_captions": {}},
    "router": {},
    "router pooled in parts": {"balance": "pooled", **PARTS},
    "router all": {"train": "all"},
}
AGAIN = {"grad_checkpointing": True, **PARTS}
WAYS = [
    (size, is_near) for size in reversed(SIZES) for is_near in (False, True)[: 1 + (size in NEAR)]
]
# What is sharded over two processes must be the same as without: of those above, and of others.
SAME = ("pretrain siglip", "pretrain v3 in parts", "expert homogeneous")
OTHERS: dict[str, dict[str, Any]] = {
    **{f"pretrain {name}": {"loss": LOSSES["v3"], "optim": OPTIMIZERS[name]} for name in OPTIMIZERS},
    "pretrain clipped, projected": {**CLIPPED, **EXACT["pretrain projected"]},
    "pretrain in parts, computed again": AGAIN,
    "router": {},
    "router all": {"train": "all"},
    "router all in parts, computed again": {"train": "all", **AGAIN},
}  # fmt: skip
COMPILED: dict[str, dict[str, Any]] = {
    "pretrain contrastive": {},
    "pretrain in parts, computed again": AGAIN,
}
LONGER = {"loss": LOSSES["v3"], "optim": ADAM, "samples_seen": 4 * BATCH}
WATCH = {
    "task": "train",
    "every": BATCH,
    "best": True,
    "num_samples": 16,
    "retrieval": True,
    "zero_shot": [],
}


@dataclass(frozen=True)
class Inputs:
    """Folders that trainings read."""

    root: Path

    @property
    def data(self) -> tuple[Path, Path]:
        return self.root / "index", self.root / "shard"

    def train(self, case: str, changes: dict[str, Any], out: Path, **more: Any) -> None:
        """Train as a case says."""
        out.mkdir(exist_ok=True)
        stage = case.split()[0]
        # In float64 no rounding hides a term that is wrong; references, a watch and routers are float32 always, and
        # FSDP takes weights of one kind.
        is_rounded = changes.keys() & {"references", "watch"}
        is_mixed = stage == "router" and "parallel" in changes
        torch.set_default_dtype(torch.float32 if is_rounded or is_mixed else torch.float64)
        raw = {"samples_seen": BATCH * STEPS, "batch_size": BATCH, "optim": SGD, **changes}
        if stage == "pretrain":
            named = [{"model": str(self.root / name)} for name in raw.pop("references", [])]
            settings = phase(temperature=0.1, references=named, **raw)
            pretrain(settings, *self.data, None, out, **more)
        elif stage == "expert":
            labels = self.root / "labels" if raw.pop("batches") == "homogeneous" else None
            batches = "homogeneous" if labels else "ordinary"
            settings = ExpertJob(batches=batches, stop_ratio=None, seed=0, **raw)
            finetune_expert(settings, self.root / "base", *self.data, labels, out, **more)
        else:
            settings = RouterJob(seed=0, balance_weight=1.0, z_weight=0.1, **raw)
            finetune_router(settings, self.root / "moe", *self.data, out, **more)


def make_inputs(root: Path) -> Inputs:
    """Data, two references, a base with two blocks in each tower, labels, and a mixture of three experts."""
    make_data(root)
    tokens = Tokens.open(root / "index")
    for name, dim in (("near", 16), ("far", 24)):
        made(root / name, tokens.tokenizer, vocab_size=tokens.vocab_size, dim=dim)
    model = phase().model.model_dump()
    for tower in ("vision_cfg", "text_cfg"):
        model["config"][tower]["layers"] = 2
    pretrain(
        phase(model=model, text_length=20),
        root / "index",
        root / "shard",
        None,
        folder(root / "base"),
    )
    folder(root / "labels")
    labels_N = np.repeat(np.arange(3), [26, 10, 4]).astype(
        np.int32
    )  # one fills a batch, two share one
    np.save(root / "labels" / "labels.npy", labels_N)
    about = {"samples_id": tokens.samples_id, "rounds": 1}
    (root / "labels" / "clusters.json").write_text(json.dumps(about))
    settings = AssembleJob(num_experts=3, top_k=2, copies=True, noise=0.5, seed=0)
    assemble(settings, [root / "base"], folder(root / "moe"))
    return Inputs(root)


# --- one process ------------------------------------------------------------------------------------------------


@contextmanager
def gradients(found: list[list[torch.Tensor]]) -> Iterator[None]:
    """Collect what optimizers are given, in an order that does not depend on how parameters are grouped."""

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        step = [dist.whole(p.grad).double().clone() for p in every if p.grad is not None]
        found.append(sorted(step, key=lambda x: (x.shape, x.norm().item())))

    hook = register_optimizer_step_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def told_to_stop(step: int) -> Iterator[None]:
    """The first process gets a SIGTERM in its n-th step."""
    steps = iter(range(1, 1000))

    def count(*_: object) -> None:
        if next(steps) == step and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_pre_hook(count)
    try:
        yield
    except SystemExit as left:
        assert left.code == 75
    finally:
        hook.remove()


def collectives(train: Callable[[], None]) -> dict[str, int]:
    """How often each collective runs, as torch's profiler sees it."""
    with profile() as seen:
        train()
    counts: dict[str, int] = {}
    for event in seen.events():
        if event.name.startswith("gloo:"):
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts


def stopped_and_resumed(inputs: Inputs, root: Path, first: str, then: str) -> None:
    """Four steps, the second of which is the last of one way, and the others of another."""
    name = f"{first} to {then}"
    out = root / name
    state = TrainingState(root / f"state of {name}", "tag")
    with told_to_stop(2):
        inputs.train("pretrain", {**LONGER, "parallel": first}, out, state=state)
    assert not (out / "model.safetensors").exists()
    inputs.train("pretrain", {**LONGER, "parallel": then}, out, state=state)
    state.close()


def sharded(inputs: Inputs, root: Path) -> dict[str, Any]:
    """What two processes find."""
    found: dict[str, Any] = {}
    for way, cases in (("ddp", OTHERS), ("fsdp", {case: EXACT[case] for case in SAME} | OTHERS)):
        for case, changes in cases.items():
            steps: list[list[torch.Tensor]] = []
            with gradients(steps):
                inputs.train(case, {**changes, "parallel": way}, root / f"{way} {case}")
            found[f"{way} {case}"] = steps
        for parts in (1, 3):
            changes = {"accumulate": parts, "parallel": way}
            train = functools.partial(inputs.train, "pretrain", changes, root / f"{way} {parts}")
            found[f"{way} {parts}"] = collectives(train)
        inputs.train("pretrain", {**LONGER, "parallel": way}, root / f"{way} uninterrupted")
        watched = {**LONGER, "watch": WATCH, "parallel": way}
        inputs.train("pretrain", watched, root / f"{way} watched", watched=inputs.root / "index")
        for then in ("ddp", "fsdp"):
            stopped_and_resumed(inputs, root, way, then)
    with pytest.MonkeyPatch.context() as patch:
        compile_ = torch.nn.Module.compile  # without code of its own, which takes a compiler
        eager = functools.partial(compile_, backend="aot_eager")
        patch.setattr(torch.nn.Module, "compile", lambda module, mode=None: eager(module))
        patch.setattr("clipgraft.compiled.check_compiler", lambda: None)
        for case, changes in COMPILED.items():
            found[f"compiled {case}"] = steps = []
            changes = {**changes, "compile": True, "parallel": "fsdp"}
            with gradients(steps):
                inputs.train(case, changes, root / f"compiled {case}")
    found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


def near(inputs: Inputs, root: Path) -> dict[str, Any]:
    """What two processes find that share memory: sharded too, and what gloo still carries."""
    found: dict[str, Any] = {}
    for case in SAME:
        found[f"fsdp {case}"] = steps = []
        with gradients(steps):
            inputs.train(case, {**EXACT[case], "parallel": "fsdp"}, root / f"near fsdp {case}")
    for name, changes in (("short", {}), ("long", {"samples_seen": 2 * BATCH * STEPS})):
        train = functools.partial(inputs.train, "pretrain", changes, root / f"near {name}")
        found[name] = collectives(train)
    with dist.world() as world:
        model = torch.nn.Linear(3, 2, bias=False)
        torch.nn.init.constant_(model.weight, 1.0 + 1e-6 * world.rank)
        try:
            in_all_processes(model, world)
        except RuntimeError as error:
            found["told"] = str(error)
        found["lacking"], found["none"] = _averaged((0,)), _averaged(())
        try:
            _averaged((world.rank,))
        except RuntimeError as error:
            found["unlike"] = str(error)
    with pytest.MonkeyPatch.context() as patch, _warnings() as warnings:
        if os.environ["RANK"] == "0":
            patch.setattr(os, "memfd_create", _refuse)
        with dist.world() as world:
            mean = dist.mean(torch.tensor([1.0 + world.rank]))
            found["lacking in gloo"], found["none in gloo"] = _averaged((0,)), _averaged(())
            found["refused"] = dist.shares_memory(), mean.tolist(), warnings
            if world.rank == 1:
                patch.setattr(np, "memmap", _not_by_number(np.memmap))
            memory = SampleMemory(4, [0.5])
            memory.read(torch.tensor([2 * world.rank]), world.device)
            memory.write(torch.tensor([2 * world.rank]), torch.tensor([[1.0 + world.rank]]))
            memory.settle()
            found["remembered"] = memory.read(torch.arange(4), world.device).tolist()
    return found


def _averaged(with_gradient: tuple[int, ...]) -> list[list[float] | None]:
    """The gradients of two parameters after two rounds, of which some have one; that of rank r is r + 1, then 10 (r + 1)."""
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 1, bias=False) for _ in "ab")
    mean = GradientMean(torch.nn.Module(), layers)
    for scale in (1, 10):
        for number in with_gradient:
            full = torch.full((1, 2), scale * (1.0 + torch_dist.get_rank()))
            layers[number].weight.grad = full
        mean.take()
    return [None if p.grad is None else p.grad.flatten().tolist() for p in layers.parameters()]


def _not_by_number(real: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(path: str, *how: Any, **named: Any) -> Any:
        if path.startswith("/proc"):
            raise PermissionError(13, "Permission denied")
        return real(path, *how, **named)

    return refuse


def _refuse(name: str) -> int:
    raise PermissionError(1, "Operation not permitted")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What `dist` warns of meanwhile."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    dist.log.addHandler(handler)
    try:
        yield said
    finally:
        dist.log.removeHandler(handler)


def main(rank: int, inputs: Inputs, root: Path) -> None:
    torch.set_num_threads(1)
    init = torch_dist.init_process_group
    stores = itertools.count()  # one for each training
    for size, is_near in WAYS:
        if rank >= size:
            break
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ["LOCAL_WORLD_SIZE"] = str(size if is_near else 1)

        def join(backend: str, size: int = size, **_: object) -> None:
            store = f"file://{root}/store-{size}-{next(stores)}"
            hook = sys.excepthook
            init(backend, store, rank=rank, world_size=size)
            sys.excepthook = hook  # or every start would put its rank before each line of an error

        torch_dist.init_process_group = join
        found: dict[str, Any] = {}
        for case, changes in EXACT.items():
            way = "near" if is_near else "ddp" if size == 2 else str(size)
            found[case] = steps = []
            with gradients(steps):
                inputs.train(case, changes, root / f"{way} {case}")
        if size == 2:
            found |= near(inputs, root) if is_near else sharded(inputs, root)
        if rank == 0:
            torch.save(found, root / f"{size}{' near' * is_near}.pt")


# --- the laws -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 1, 2, 3 and 4 processes found and wrote: one launch of four, which leave one by one."""
    root = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPGRAFT_PRECISION", "fp32")
        inputs = make_inputs(folder(root / "inputs"))
        path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
        words = [__file__, str(inputs.root), str(root)]
        processes = [
            subprocess.Popen([sys.executable, *words, str(rank)], env=environment)
            for rank in range(max(SIZES))
        ]
        try:
            assert [process.wait() for process in processes] == [0] * len(processes)
        finally:
            for process in processes:
                process.kill()
    return root


@pytest.fixture(scope="module")
def found(root) -> dict[int, dict[str, Any]]:
    return {size: torch.load(root / f"{size}.pt", weights_only=True) for size in SIZES}


def assert_same_steps(
    ours: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]], rel: float = 1e-6
):
    """All gradients of a step as one vector."""
    assert len(ours) == len(wanted) == STEPS
    for our, their in zip(ours, wanted, strict=True):
        assert [x.shape for x in our] == [x.shape for x in their]
        one, other = (torch.cat([x.flatten() for x in each]) for each in (our, their))
        assert other.norm() > 1e-4
        assert (one - other).norm() <= rel * other.norm()


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("case", EXACT)
def test_k_processes_of_b_have_the_gradients_of_one_of_k_times_b(found, case, size):
    """In float32, where references are, rounding alone is 2e-6; `test_processes` has their terms in float64."""
    rel = 5e-6 if "references" in EXACT[case] else 1e-6
    assert_same_steps(found[size][case], found[1][case], rel)


@pytest.mark.parametrize("size", NEAR)
@pytest.mark.parametrize("case", EXACT)
def test_processes_that_share_memory_have_the_gradients_of_one(found, root, case, size):
    rel = 5e-6 if "references" in EXACT[case] else 1e-6
    near = torch.load(root / f"{size} near.pt", weights_only=True)
    assert_same_steps(near[case], found[1][case], rel)
    if size == 2 and case in SAME:
        assert_same_steps(near[f"fsdp {case}"], found[1][case], rel)


@pytest.mark.parametrize("case", EXACT)
def test_two_processes_have_the_same_bits_whether_they_share_memory_or_a_network(found, root, case):
    near = torch.load(root / "2 near.pt", weights_only=True)[case]
    for our, their in zip(near, found[2][case], strict=True):
        for one, other in zip(our, their, strict=True):
            assert torch.equal(one, other)


def test_gloo_carries_nothing_of_a_step_between_processes_that_share_memory(root):
    near = torch.load(root / "2 near.pt", weights_only=True)
    assert near["short"] == near["long"]
    assert not any("reduce" in name for name in near["short"])


def test_processes_that_share_memory_begin_with_the_same_weights(root):
    near = torch.load(root / "2 near.pt", weights_only=True)
    assert near["told"] == "processes of one training begin with different weights"


@pytest.mark.parametrize("way", ["", " in gloo"])
def test_a_parameter_without_gradient_stays_without(root, way):
    found = torch.load(root / "2 near.pt", weights_only=True)
    assert found["lacking" + way] == [[15.0, 15.0], None]
    assert found["none" + way] == [None, None]


def test_processes_whose_gradients_are_of_different_parameters_are_an_error(root):
    told = torch.load(root / "2 near.pt", weights_only=True)["unlike"]
    assert told == "processes of one training say different things"


def test_where_one_may_not_share_memory_all_talk_through_gloo(root):
    shares_memory, mean, warnings = torch.load(root / "2 near.pt", weights_only=True)["refused"]
    assert not shares_memory
    assert mean == [1.5]
    [warning] = warnings
    assert "cannot share memory ([Errno 1] Operation not permitted)" in warning


def test_where_no_process_may_open_what_another_one_holds_the_table_of_a_loss_has_a_name(root):
    remembered = torch.load(root / "2 near.pt", weights_only=True)["remembered"]
    assert remembered == [[1.0], [0.5], [2.0], [0.5]]


@pytest.mark.parametrize("case", [*SAME, *OTHERS])
def test_a_sharded_model_has_the_gradients_and_ends_with_the_weights_of_a_whole_one(
    found, root, case
):
    rel = 5e-6 if "references" in OTHERS.get(case, {}) else 1e-6
    wanted = found[2][case if case in SAME else f"ddp {case}"]
    assert_same_steps(found[2][f"fsdp {case}"], wanted, rel)
    assert_same_weights(root / f"fsdp {case}", root / f"ddp {case}")


@pytest.mark.parametrize("case", COMPILED)
def test_a_sharded_model_is_the_same_where_its_blocks_are_compiled(found, root, case):
    assert found[2]["graphs"] >= 2 * len(COMPILED), "a block of each tower, at least"
    wanted = found[2][case if case in EXACT else f"ddp {case}"]
    assert_same_steps(found[2][f"compiled {case}"], wanted)
    assert_same_weights(root / f"compiled {case}", root / f"ddp {case}")


def assert_same_weights(ours: Path, wanted: Path):
    weights = read_weights(ours)
    assert weights.keys() == read_weights(wanted).keys()
    for name, weight in read_weights(wanted).items():
        assert weights[name].dtype == weight.dtype
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=2e-6, msg=name)


def test_a_watch_sees_a_sharded_model_and_keeps_the_best_of_it_whole(root):
    looks = []
    for way in ("fsdp", "ddp"):
        rows = map(json.loads, (root / f"{way} watched" / "metrics.jsonl").read_text().splitlines())
        looks.append([(row["step"], row["watch"]) for row in rows if "watch" in row])
    assert looks[0] == looks[1] and len(looks[0]) == 5
    assert_same_weights(root / "fsdp watched" / "best", root / "ddp watched" / "best")
    assert_same_weights(root / "fsdp watched", root / "ddp watched")


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_parts_of_a_batch_cost_no_more_collectives_of_gradients(found, way):
    """Gloo scatters sums by an all_reduce; the weights of a sharded model are gathered for every part."""
    whole, parts = (
        {key: num for key, num in found[2][f"{way} {num_parts}"].items() if "reduce" in key}
        for num_parts in (1, 3)
    )
    assert whole == parts and sum(whole.values()) >= 2 * STEPS


@pytest.mark.filterwarnings("ignore:`broadcast_buffers`")
def test_gradients_are_averaged_where_they_are(tmp_path, monkeypatch):
    """They are views of what is sent, with no copy of their own; a group of one process is enough to see it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch_dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        whole = in_all_processes(torch.nn.Linear(3, 2), dist.World(0, 2, torch.device("cpu")))
        whole(torch.ones(1, 3)).sum().backward()
    finally:
        torch_dist.destroy_process_group()
    assert len({p.grad.untyped_storage().data_ptr() for p in whole.parameters()}) == 1


@pytest.mark.parametrize("first", ["ddp", "fsdp"])
@pytest.mark.parametrize("then", ["ddp", "fsdp"])
def test_a_stopped_training_goes_on_sharded_or_not(root, first, then):
    ours, wanted = root / f"{first} to {then}", root / f"{then} uninterrupted"
    assert_same_weights(ours, wanted)
    if first == then:
        assert (ours / "model.safetensors").read_bytes() == (
            wanted / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize(
    ("shape", "num", "dim"),
    [((512, 64), 8, 0), ((4, 3072, 768), 64, 1), ((4, 3072, 768), 4, 0), ((7, 3), 2, 0), ((5,), 8, 0)],
)  # fmt: skip
def test_stacked_experts_are_cut_so_that_all_processes_hold_as_much(shape, num, dim):
    assert sharded_dim(shape, num) == dim


def test_sharding_over_one_device_is_refused_before_anything_runs():
    raw = yaml.safe_load((Path(__file__).parent / "config" / "small.yaml").read_text())
    raw["pretrain"][1]["parallel"] = "fsdp"
    message = r"pretrain.full.parallel = fsdp has no effect on one device: resources.pretrain wishes for gpu: 0"
    with pytest.raises(ConfigError, match=message):
        load_config(raw)
    for wish in ({"gpu": 2}, {"nodes": 2}):
        load_config({**raw, "resources": {"pretrain": wish}})


if __name__ == "__main__":
    main(int(sys.argv[3]), Inputs(Path(sys.argv[1])), Path(sys.argv[2]))
