"""Settings of where jobs run: what a stage wishes for, and what a SLURM site does its own way.

Never part of a version: results do not depend on them (but for the number of processes, by rounding alone).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from clipgraft.sources import Settings

TRAININGS = ("pretrain", "finetune_expert", "finetune_router")
MANY_NODES = (*TRAININGS, "embed")  # stages that torchrun starts on several nodes
ONE_DEVICE = ("assemble", "evaluate")


class ResourceSettings(Settings):
    """What a job of a stage wishes for. Never part of a version: results do not depend on it."""

    gpu: NonNegativeInt = Field(0, description="Devices in all; fewer are used where fewer are.")
    nodes: PositiveInt = Field(
        1, description="With devices, only SLURM gives several. Without, one process on each."
    )
    jobs: PositiveInt = Field(
        1, description="Of `embed`: jobs that fill the same arrays, each its share of the samples."
    )
    threads: PositiveInt = Field(1, description="CPU threads per node.")
    mem_mb: int = Field(
        4000,
        ge=1000,
        description="Memory per node; Snakemake takes 350 MB of it for itself in a SLURM job.",
    )
    runtime: PositiveInt = Field(120, description="Minutes.")

    @model_validator(mode="after")
    def _divides(self) -> ResourceSettings:
        if self.gpu % self.nodes:
            raise ValueError(
                f"gpu = {self.gpu} does not divide by nodes = {self.nodes}. "
                f"Hint: gpu: {max(1, self.gpu // self.nodes) * self.nodes}"
            )
        return self

    def check(self, stage: str) -> None:
        """Refuse what has no effect on a stage.

        Raises:
            ValueError: if something is set that the stage does not use.
        """
        where = f"resources.{stage}"
        if self.gpu > 1 and stage in ONE_DEVICE:
            raise ValueError(f"{where}.gpu: a job uses one device. Hint: 0 or 1")
        if self.gpu and stage not in (*MANY_NODES, *ONE_DEVICE):
            raise ValueError(f"{where}.gpu: {stage} uses no devices. Hint: leave it out")
        if self.nodes > 1 and stage not in MANY_NODES:
            raise ValueError(
                f"{where}.nodes: a job of {stage} runs on one node. Hint: leave it out"
            )
        if self.jobs > 1 and stage != "embed":
            raise ValueError(f"{where}.jobs: only embed is split. Hint: leave it out")


class SlurmSettings(Settings):
    """What a SLURM site does its own way; `workflow/profiles/slurm` sets it."""

    devices: Literal["gres", "gpus", "both"] = Field(
        "both",
        description="How devices are asked for: `--gres=gpu:N` per node, `--gpus=N` in all, or by both.",
    )
    device_type: str = Field(
        "", pattern=r"^[A-Za-z0-9_.]*$", description="Type of the devices, e.g. a100."
    )
    seconds_to_save: PositiveInt = Field(
        600, description="A training is told to save so long before its time is up."
    )
    extra: str = Field(
        "", description="More words for sbatch of the stages that may have several nodes."
    )

    def gpu(self, wish: ResourceSettings) -> int:
        """What becomes `--gpus`; 0: not asked for in this way."""
        return 0 if self.devices == "gres" else wish.gpu

    def per_node(self, wish: ResourceSettings) -> int:
        """Devices of each node."""
        return wish.gpu // wish.nodes

    def gres(self, wish: ResourceSettings) -> str:
        """What becomes `--gres`."""
        if self.devices == "gpus" or not wish.gpu:
            return ""
        return ":".join(filter(None, ("gpu", self.device_type, str(self.per_node(wish)))))

    def model(self, wish: ResourceSettings) -> str:
        """The type within `--gpus`."""
        return self.device_type if self.gpu(wish) else ""

    def words(self, wish: ResourceSettings) -> str:
        """Words of sbatch that no resource of the plugin stands for.

        SLURM looks at the clock once a minute: a signal may come so much earlier. A job of a few minutes is told in the
        middle of its time.
        """
        seconds = min(self.seconds_to_save, wish.runtime * 30)
        even = f"--gpus-per-node={self.per_node(wish)}" if self.devices == "gpus" else ""
        even = even if wish.nodes > 1 and wish.gpu else ""
        return " ".join(filter(None, (f"--signal=TERM@{seconds}", even, self.extra)))
