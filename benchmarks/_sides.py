"""The two sides of a training step: the real training programs, ours and open_clip's, on prepared batches.

`Fit.run` and `open_clip_train.main` themselves, with `Turns` in place of their loaders: no step is copied here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import reduce
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _profile import marked
from _turns import NUM_BATCHES, NUM_STEPS, Case, Turns, batch_of
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

import clipgraft
from clipgraft import dist, train
from clipgraft.data.loader import Batch
from clipgraft.data.sampler import UniformBatches
from clipgraft.devices import precision
from clipgraft.experts import expert_objective
from clipgraft.experts import trained_parameters as trained_in_expert
from clipgraft.loss_settings import LossSettings
from clipgraft.models.build import build, describe, normalize
from clipgraft.models.moe import keep_kernels, upcycle
from clipgraft.models.training_blocks import attend_by_torch
from clipgraft.objectives import objective_of
from clipgraft.recipes import TrainSettings
from clipgraft.router import KERNELS, RoutingLoss
from clipgraft.router import trained_parameters as trained_in_router
from clipgraft.settings import ExpertJob, RouterJob

TOP_K = 2
OPTIM = {  # of both
    "lr": 1e-4,
    "beta1": 0.9,
    "beta2": 0.98,
    "eps": 1e-6,
    "weight_decay": 0.2,
    "max_grad_norm": 1.0,
    "warmup_steps": 1,
}
MEAN_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Ours:
    """`Fit.run`.

    Attributes:
        part: what is trained: all, mlps (of a dense model), routers (of a mixture).
        changes: settings of a training.
        environment: variables.
        without: keys of `REPLACED`: what they name below `clipgraft` stands back for its values.
        processes: of which each has a share of a batch.
        vocabulary: of the model, if it is larger than that of its texts.
    """

    part: str = "all"
    changes: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    processes: int = 1
    vocabulary: int | None = None

    def is_possible(self) -> bool:
        """Whether this version of ours has the settings that are changed."""
        return self.changes.keys() <= TrainSettings.model_fields.keys()

    def size(self, case: Case) -> int:
        """Samples of a step."""
        return case.batch

    def run(self, case: Case, orders: Connection, folder: Path) -> None:
        """Train until the turns end."""
        os.environ.update(self.environment)
        for key in self.without:
            name = key.split()[0]
            *modules, leaf = name.split(".")
            place = reduce(getattr, modules, clipgraft)
            assert hasattr(place, leaf), f"clipgraft has no {name}"
            setattr(place, leaf, REPLACED[key])
        torch.manual_seed(0)
        if self.processes == 1:
            self._train(case, orders, folder, dist.World(0, 1, torch.device(case.device)))
            return
        with dist.world() as world:
            self._train(case, orders, folder, world)

    def _train(self, case: Case, orders: Connection, folder: Path, world: dist.World) -> None:
        if case.num_experts:
            keep_kernels(KERNELS)  # as its stage does
        text = case.config["text_cfg"]
        text = {**text, "vocab_size": self.vocabulary or text["vocab_size"]}
        config = {**case.config, "text_cfg": text}
        model, spec = build(config), describe(config)
        moe = mixture(model, case.num_experts) if case.num_experts else None
        raw = {"samples_seen": NUM_STEPS * case.batch, "batch_size": case.batch, "optim": OPTIM}
        raw |= self.changes
        settings = TrainSettings.model_validate(raw)
        objective = objective_of(world, LossSettings(), settings.optim, None, 1.0)
        routing, trained = None, None
        if moe is not None:
            router = RouterJob.model_validate({**raw, "seed": 0})
            routing, trained = RoutingLoss(router, moe, is_first=True), trained_in_router(model, self.part)  # fmt: skip
        elif self.part == "mlps":
            expert = ExpertJob.model_validate({**raw, "batches": "ordinary", "seed": 0})
            objective, trained = expert_objective(world, expert), trained_in_expert(model, expert)  # fmt: skip
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained is None or name in trained)
        batches = [our_batch(case, number, world.rank, world.size) for number in range(NUM_BATCHES)]
        turns = Turns(case, orders, batches)
        turns.model, num = model, 16 * case.batch
        train.Loader = lambda *_, **__: turns  # type: ignore[assignment,misc]
        train.Fit(
            model,
            marked("loss", objective),
            settings,
            SimpleNamespace(shards=range(num), tokens=None),  # type: ignore[arg-type]  # for the loader
            UniformBatches(num, case.batch, 0),
            spec,
            0,
            world,
            extra_loss=routing,
        ).run(folder)


def mixture(model: nn.Module, num_experts: int) -> dict[str, Any]:
    """Make all MLPs experts, all alike; returns what `model.json` would say of them."""
    states, generator = [model.state_dict()] * num_experts, torch.Generator().manual_seed(0)
    layers = {"image_layers": "all", "text_layers": "all"}
    return upcycle(model, states, top_k=TOP_K, generator=generator, **layers)


def our_batch(case: Case, number: int, rank: int = 0, world: int = 1) -> Batch:
    """As our loader would bring it to a process, but on the device."""
    everyone = batch_of(case, number, case.config["text_cfg"]["context_length"])
    images_BCHW, text_BL, rows_B = (
        each.chunk(world)[rank] for each in (*everyone, torch.arange(case.batch))
    )
    return Batch(images_BCHW.to(case.device), text_BL, rows_B, rows_B)


def _unfused(*args: Any, **how: Any) -> torch.optim.Optimizer:
    optimizer = _BUILT(*args, **how)
    for group in optimizer.param_groups:
        group["fused"] = None
    return optimizer


def _copied(model: nn.Module, world: dist.World) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def _static(model: nn.Module, world: dist.World) -> nn.Module:
    return nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, broadcast_buffers=False, static_graph=True
    )


_BUILT = train.build_optimizer
# What a switch replaces in `clipgraft`, in the processes of its side alone: the first word says where.
REPLACED: dict[str, Callable[..., Any]] = {
    "devices.attention": lambda device: nullcontext(),  # the kernel that torch chooses
    "devices.keep_freed_memory": lambda device: None,  # freed memory goes back to the kernel
    "models.training_blocks.WholeVisionTransformer": VisionTransformer,  # the stem is a convolution
    "models.training_blocks.attend": attend_by_torch,
    "models.training_blocks.reads_one": lambda tower, last: False,  # last blocks compute all tokens
    "parallel.in_all_processes copied": _copied,  # DDP without views of what it sends
    "parallel.in_all_processes static": _static,  # DDP with a static graph
    "train.build_optimizer": _unfused,  # torch's AdamW as open_clip builds it
    "train.speed_up": lambda model: None,  # open_clip's own towers
    "encoding.tell_padding": lambda model, text_BL, device: None,  # blocks compute padding, too
    "encoding.trimmed": lambda model, text_BL: text_BL,  # texts stay padded to the context
}


@dataclass(frozen=True)
class OpenClip:
    """`open_clip_train.main`.

    Attributes:
        context: its texts are padded to so many tokens.
        compiled: with --torchcompile.
    """

    context: int
    compiled: bool = False

    @property
    def processes(self) -> int:
        """It runs alone."""
        return 1

    def size(self, case: Case) -> int:
        """Samples of a step."""
        return case.batch

    def run(self, case: Case, orders: Connection, folder: Path) -> None:
        """Train until the turns end."""
        import open_clip
        from open_clip_train import main as program
        from open_clip_train.data import DataInfo

        config = {**case.config, "custom_text": True, "quick_gelu": False}
        (folder / "benchmark.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / "benchmark.json")
        turns = Turns(case, orders, [self.batch(case, number) for number in range(NUM_BATCHES)])
        epoch = program.train_one_epoch

        def train_one_epoch(model, data, loss, *rest, **how):
            turns.model = model
            return epoch(model, data, marked("loss", loss), *rest, **how)

        program.get_data = lambda *_, **__: {"train": DataInfo(turns)}  # type: ignore[arg-type]
        program.train_one_epoch = train_one_epoch
        is_mixed = precision(torch.device(case.device)) == torch.bfloat16
        options = {
            "model": "benchmark",
            "precision": "amp_bf16" if is_mixed else "fp32",
            "device": case.device,
            "force-context-length": self.context,
            "batch-size": case.batch,
            "epochs": 1,
            "lr": OPTIM["lr"],
            "beta1": OPTIM["beta1"],
            "beta2": OPTIM["beta2"],
            "eps": OPTIM["eps"],
            "wd": OPTIM["weight_decay"],
            "warmup": OPTIM["warmup_steps"],
            "grad-clip-norm": OPTIM["max_grad_norm"],
            "workers": 0,
            "train-data": "prepared",
            "dataset-type": "webdataset",
            "logs": folder,
            "name": "benchmark",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        program.main([*words, *(["--torchcompile"] if self.compiled else [])])

    def batch(self, case: Case, number: int) -> tuple[Tensor, Tensor]:
        """As its loader would bring it, but on the device."""
        images_BCHW, text_BL = batch_of(case, number, self.context)
        images_BCHW = normalize(images_BCHW, *MEAN_STD).contiguous()
        return images_BCHW.to(case.device), text_BL.to(case.device)


@dataclass(frozen=True)
class Matmul:
    """Square matrix products in training's precision: what the hardware does at best.

    Attributes:
        side: of the matrices.
    """

    side: int

    @property
    def processes(self) -> int:
        """It runs alone."""
        return 1

    def size(self, case: Case) -> int:
        """FLOPs of a product."""
        return 2 * self.side**3

    def run(self, case: Case, orders: Connection, folder: Path) -> None:
        """Multiply until the turns end."""
        device = torch.device(case.device)
        a, b = (torch.randn(self.side, self.side, device=device).to(precision(device)) for _ in "ab")  # fmt: skip
        for _ in Turns(case, orders, [None]):
            a @ b
