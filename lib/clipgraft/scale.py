"""What the published presets need at scale, as tables: `python -m clipgraft.scale`.

Memory of a device, bytes over the network, disk, hours, and what breaks first, at several numbers of devices and of
pairs. The arithmetic is `footprint`'s, the GPU and the share of its peak (MFU) are assumptions of `plan`; the tables of
`workflow/docs/scale.md` are this command's output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgraft import cost, plan
from clipgraft import footprint as fp
from clipgraft.architectures import architecture
from clipgraft.config import ConfigError
from clipgraft.recipes import PhaseSettings
from clipgraft.schedule import num_steps

PRESETS = Path(__file__).resolve().parent.parent.parent / "presets"
STUDIES = {  # ours, but for the first one, which pretrains nothing
    "clipmoe_l14",
    "experts_routers",
    "experts_small_batch",
    "experts_study",
    "inverse_scaling",
    "losses_reference",
    "losses_study",
}
DEVICES, PAIRS = (8, 64, 512), (1_000_000, 400_000_000, 2_000_000_000)
EXPERTS = 4  # as CLIP-MoE has
CORES, NODE_MEMORY, DISK, DAYS = (
    64,
    1e12,
    1e15,
    7.0,
)  # of a machine; what may be had, and waited for

Rows = Iterator[list[str]]


@dataclass(frozen=True)
class Preset:
    """A published schedule: its name, its model and its phases."""

    name: str
    config: dict[str, Any]
    phases: list[PhaseSettings]

    @property
    def largest(self) -> PhaseSettings:
        """The phase that takes most memory."""
        layout = fp.Layout(DEVICES[0])
        return max(self.phases, key=lambda each: fp.memory_of(self.config, each, layout).total)


@dataclass(frozen=True)
class Machine:
    """What is assumed: usable bytes of a GPU, and the FLOP/s that it reaches."""

    memory: float
    flops: float


def read_presets(paths: Sequence[Path]) -> list[Preset]:
    """Presets by name; of runs that share phases, the first.

    Raises:
        ConfigError: if one cannot be read, or the cost of its architecture is not known.
    """
    found = []
    for path in paths:
        model, phases = next(iter(plan.read([path]).values()))
        preset = Preset(path.stem, architecture(model), phases)
        cost.num_parameters(preset.config, phases[0])
        found.append(preset)
    return found


def published() -> list[Path]:
    """Presets of published schedules."""
    return [path for path in sorted(PRESETS.glob("*.yaml")) if path.stem not in STUDIES]


def memory_rows(presets: Sequence[Preset], machine: Machine) -> Rows:
    """Each device's memory in the fullest phase of each preset, every device with all weights; and what fits."""
    yield [
        *("preset", "phase", "parameters", "weights", "gradients", "moments"),
        *(f"activations {num}" for num in DEVICES),
        *(f"loss {num}" for num in DEVICES),
        *(f"fits {num}" for num in DEVICES),
    ]
    for preset in presets:
        phase = preset.largest
        each = [fp.memory_of(preset.config, phase, fp.Layout(num)) for num in DEVICES]
        fits = [
            fp.first_that_fits(preset.config, phase, num, machine.memory)
            if phase.batch_size % num == 0
            else None
            for num in DEVICES
        ]
        yield [
            *(preset.name, phase.name),
            f"{sum(cost.num_parameters(preset.config, phase)) / 1e6:,.0f} M",
            *map(_gb, (each[0].weights, each[0].gradients, each[0].moments)),
            *(_gb(memory.activations) for memory in each),
            *(_gb(memory.loss) for memory in each),
            *("no" if layout is None else str(layout) for layout in fits),
        ]


def state_rows(presets: Sequence[Preset]) -> Rows:
    """Weights, gradients and moments of each device, of models with and without unlocked experts."""
    yield ["model", "parameters", "ddp", *(f"fsdp {num}" for num in DEVICES)]
    for preset in presets:
        phase = preset.phases[-1]
        dense = sum(cost.num_parameters(preset.config, phase))
        mlps = sum(
            num * (2 * width * hidden + width + hidden)
            for num, width, hidden in cost.mlps(preset.config)
        )
        for num_experts in (1, EXPERTS):
            parameters = dense + (num_experts - 1) * mlps
            yield [
                preset.name
                + (f", {num_experts} experts in every block" if num_experts > 1 else ""),
                f"{parameters / 1e6:,.0f} M",
                _gb(fp.STATE * parameters),
                *(_gb(fp.STATE * parameters / num) for num in DEVICES),
            ]


def network_rows(presets: Sequence[Preset], machine: Machine) -> Rows:
    """What each device receives in a step of the phase that sends most for its work, and how long that takes."""
    yield [
        *("preset", "phase"),
        *(f"features {num}" for num in DEVICES),
        *("gradients ddp", "fsdp"),
        *(f"step {num}" for num in DEVICES),
        *(f"network {num}" for num in DEVICES),
    ]
    for preset in presets:
        phase = max(preset.phases, key=lambda x: network_share(preset, x, DEVICES[-1], machine))
        every = [fp.traffic_of(preset.config, phase, fp.Layout(num)) for num in DEVICES]
        sharded = fp.traffic_of(preset.config, phase, fp.Layout(DEVICES[-1], is_sharded=True))
        steps = [fp.step_seconds(preset.config, phase, num, machine.flops) for num in DEVICES]
        shares = [network_share(preset, phase, num, machine) for num in DEVICES]
        yield [
            *(preset.name, phase.name),
            *(_gb(each.features) for each in every),
            *(_gb(every[-1].gradients), _gb(sharded.gradients)),
            *(f"{1000 * seconds:,.0f} ms" for seconds in steps),
            *(f"{share:.0%}" for share in shares),
        ]


def network_share(preset: Preset, phase: PhaseSettings, devices: int, machine: Machine) -> float:
    """Network over computing, of a step."""
    traffic = fp.traffic_of(preset.config, phase, fp.Layout(devices))
    step = fp.step_seconds(preset.config, phase, devices, machine.flops)
    return traffic.seconds(devices) / step


def disk_rows(presets: Sequence[Preset]) -> Rows:
    """Terabytes of what is written per sample: by preset what depends on it, then what does not."""
    yield ["what", "bytes per sample", *(_count(num) for num in PAIRS)]
    for preset in presets:
        sides = ", ".join(str(fp.stored_side(phase)) for phase in preset.phases)
        yield _per_sample(
            f"{preset.name}: shards of {sides} px",
            sum(fp.shard_bytes(phase) for phase in preset.phases),
        )
    dims = sorted({preset.config["embed_dim"]: preset.config for preset in presets}.items())
    for dim, config in dims:
        yield _per_sample(f"embeddings of a model of {dim} dimensions", fp.embedding_bytes(config))
    yield _per_sample("index, with tokens", fp.index_bytes())
    yield _per_sample("index, in memory of the machine that makes it", fp.INDEXING)
    yield _per_sample("labels of a round", fp.LABEL)
    yield _per_sample("u, in memory of each machine and in each saved state", fp.LOG_U)
    yield _per_sample("u and tau of each sample (rgcl), likewise", 4 * fp.LOG_U)
    yield _per_sample(
        f"order of an epoch, in memory of each machine of {fp.NODE} devices", fp.NODE * fp.ORDER
    )


def hours_rows(presets: Sequence[Preset], machine: Machine) -> Rows:
    """Hours of training, and passes over the data."""
    yield [
        *("preset", "steps", "samples"),
        *(f"hours {num}" for num in DEVICES),
        *(f"passes {_count(num)}" for num in PAIRS),
        "cores per device",
    ]
    for preset in presets:
        flops = sum(
            cost.FLOPS_PER_MAC * cost.training_macs(preset.config, x) for x in preset.phases
        )
        seen = sum(phase.samples_seen for phase in preset.phases)
        cores = max(fp.decoding_cores(preset.config, x, machine.flops) for x in preset.phases)
        yield [
            *(preset.name, f"{sum(map(num_steps, preset.phases)):,}", _count(seen)),
            *(f"{flops / machine.flops / num / 3600:,.1f}" for num in DEVICES),
            *(f"{seen / num:,.1f}" for num in PAIRS),
            f"{cores:.1f}",
        ]


def preparation_rows(presets: Sequence[Preset], machine: Machine) -> Rows:
    """Hours of the stages that see each sample once, on one machine."""
    yield [f"stage, on {CORES} cores and {fp.NODE} devices", "samples/s", *map(_count, PAIRS)]
    yield _hours("download (published)", fp.DOWNLOAD)
    yield _hours("index", fp.INDEX * CORES)
    yield _hours("shard, one size", fp.SHARD * CORES)
    for name in ("clipa_b16_i50_t16", "clipa_v2_h14"):
        for preset in (each for each in presets if each.name == name):
            macs = cost.phase_macs(preset.config, preset.phases[0])
            rate = machine.flops / (2 * macs) * fp.NODE
            yield _hours(f"embed, {name} at {preset.phases[0].image_size} px", rate)
    yield _hours("cluster, both sides, one core", fp.KMEANS)


def first_rows(presets: Sequence[Preset], machine: Machine) -> Rows:
    """What is needed most beyond what there is."""
    yield ["preset", *(f"{num} devices" for num in DEVICES)]
    for preset in presets:
        yield [preset.name, *(_worst(needs(preset, num, machine)) for num in DEVICES)]
    yield ["data", *map(_count, PAIRS)]
    for preset in presets:
        yield [preset.name, *(_worst(data_needs(preset, num)) for num in PAIRS)]


def needs(preset: Preset, devices: int, machine: Machine) -> dict[str, float]:
    """What training needs over what there is, every device with all weights; above 1 does not do."""
    worst: dict[str, float] = {}
    for phase in preset.phases:
        if phase.batch_size % devices:
            return {f"batch of {phase.batch_size:,} does not divide": float("inf")}
        found = {
            "memory": fp.memory_of(preset.config, phase, fp.Layout(devices)).total / machine.memory,
            "network": network_share(preset, phase, devices, machine),
            "decoding": fp.decoding_cores(preset.config, phase, machine.flops) / (CORES / fp.NODE),
            "loss by a kill": fp.state_bytes(preset.config, phase)
            / (fp.WRITE * fp.SAVE_SHARE * fp.LOST),
        }
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in found.items()}
    return worst


def data_needs(preset: Preset, pairs: int) -> dict[str, float]:
    """The same of what grows with the data."""
    on_disk = fp.index_bytes() + sum(fp.shard_bytes(phase) for phase in preset.phases)
    remembers = fp.LOG_U * any(phase.loss.is_global for phase in preset.phases)
    day, seen = 24 * 3600 * DAYS, sum(phase.samples_seen for phase in preset.phases)
    return {
        "disk": pairs * on_disk / DISK,
        "index in memory": pairs * fp.INDEXING / NODE_MEMORY,
        "order of an epoch": pairs * fp.NODE * fp.ORDER / NODE_MEMORY,
        "u in saved state": pairs * remembers / (fp.WRITE * fp.SAVE_SHARE * fp.LOST),
        "download": pairs / fp.DOWNLOAD / day,
        "index": pairs / (fp.INDEX * CORES) / day,
        # Weights that are taken as they are (samples_seen: 0) have to see nothing.
        "samples that are never seen": pairs / seen if seen else 0.0,
    }


def _one_per_model(presets: Sequence[Preset]) -> list[Preset]:
    """The first preset of each number of parameters."""
    sizes = {sum(cost.num_parameters(x.config, x.phases[-1])) // 10**7: x for x in presets[::-1]}
    return sorted(sizes.values(), key=lambda x: sum(cost.num_parameters(x.config, x.phases[-1])))


def _worst(ratios: dict[str, float]) -> str:
    name, value = max(ratios.items(), key=lambda item: item[1])
    if value == float("inf"):
        return name
    return f"{name}, {value:.1f} x" if value > 1 else f"nothing ({name} is at {value:.0%})"


def _per_sample(what: str, num_bytes: float) -> list[str]:
    return [what, f"{num_bytes:,.0f}", *(_gb(num * num_bytes) for num in PAIRS)]


def _hours(stage: str, rate: float) -> list[str]:
    return [stage, f"{rate:,.0f}", *(f"{num / rate / 3600:,.1f} h" for num in PAIRS)]


def _gb(num_bytes: float) -> str:
    if num_bytes >= 1e12:
        return f"{num_bytes / 1e12:,.1f} TB"
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"


def _count(number: int) -> str:
    return f"{number / 1e9:g} G" if number >= 1e9 else f"{number / 1e6:g} M"


def markdown(rows: Rows) -> str:
    """A table; the first row is its head."""
    head, *body = list(rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(presets: Sequence[Preset], machine: Machine) -> dict[str, str]:
    """All tables, by title."""
    makers: dict[str, Callable[[], Rows]] = {
        "Memory of a device": lambda: memory_rows(presets, machine),
        "Models that do not fit": lambda: state_rows(_one_per_model(presets)),
        "Network in a step": lambda: network_rows(presets, machine),
        "Disk, and memory that grows with the data": lambda: disk_rows(presets),
        "Hours of training": lambda: hours_rows(presets, machine),
        "Hours before training": lambda: preparation_rows(presets, machine),
        "What breaks first": lambda: first_rows(presets, machine),
    }
    return {title: markdown(rows()) for title, rows in makers.items()}


def machine_of(name: str, mfu: float) -> Machine:
    """A GPU that `plan` knows.

    Raises:
        ConfigError: if it does not.
    """
    if name not in plan.GPUS:
        raise ConfigError(f"--gpu {name} is not known. Hint: one of {', '.join(plan.GPUS)}")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu}: a share of the peak lies between 0 and 1. Hint: 0.27")
    tflops, gigabytes = plan.GPUS[name]
    return Machine(plan.FILLED * gigabytes * 1e9, mfu * tflops * 1e12)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of the presets given, or of all published ones."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--preset", type=Path, nargs="+", metavar="YAML", default=published())
    parser.add_argument("--gpu", default=plan.DEFAULT_GPU, help=", ".join(plan.GPUS))
    parser.add_argument("--mfu", type=float, default=0.27, help="share of the peak that is reached")
    given = parser.parse_args(arguments)
    try:
        machine = machine_of(given.gpu, given.mfu)
        found = tables(read_presets(given.preset), machine)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print("\n\n".join(f"## {title}\n\n{table}" for title, table in found.items()))


if __name__ == "__main__":
    main()
