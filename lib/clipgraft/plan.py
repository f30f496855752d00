"""What a schedule will cost, before there are data or devices: `python -m clipgraft.plan --preset presets/x.yaml`.

Tokens, parameters, FLOPs, steps and learning rates are facts of the preset (`cost`, `recipes`); hours and price stand
on one assumption, which share of its peak the GPU reaches (MFU), and memory is an estimate.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgraft import cost
from clipgraft import footprint as fp
from clipgraft.architectures import architecture
from clipgraft.config import ConfigError, raw_runs, read_layers, validate
from clipgraft.model_settings import ModelSettings
from clipgraft.recipes import PhaseSettings
from clipgraft.schedule import num_steps, num_warmup_steps, peak_lr

# Dense bf16 TFLOP/s (fp16 on the V100, which has no bf16) and GB of memory, as their makers state them.
GPUS = {
    "V100-32GB": (125, 32),
    "A100-40GB": (312, 40),
    "A100-80GB": (312, 80),
    "H100-PCIe": (756, 80),
    "H100-SXM": (989, 80),
    "H200": (989, 141),
    "L40S": (362, 48),
    "RTX-4090": (165, 24),
}
DEFAULT_GPU = "A100-80GB"
FILLED = 0.9  # share of a GPU's memory that may be planned with
COLUMNS = """
    phase|px|image tokens|text|samples|batch|steps|peak lr|warm-up|GMAC|GFLOP|EFLOP|memory|GPU h|hours|price
""".strip().split("|")


@dataclass(frozen=True)
class Hardware:
    """What trains, and what it is assumed to reach.

    Attributes:
        name: for people.
        peak: TFLOP/s.
        memory: GB per GPU; None if not known.
        num_gpus: of them.
        mfu: share of the peak that counts as progress.
        price: dollars per GPU and hour.
    """

    name: str
    peak: float
    memory: float | None
    num_gpus: int
    mfu: float
    price: float

    def gpu_hours(self, flops: float) -> float:
        """Of so much work."""
        return flops / (self.peak * 1e12 * self.mfu) / 3600


def read(paths: list[Path]) -> dict[str, tuple[ModelSettings, list[PhaseSettings]]]:
    """Model and phases of each run of presets or configs, later ones laid over earlier ones; they need no data.

    Raises:
        ConfigError: if a file cannot be read, or if a run has no model or no phases.
    """
    return {name: _run(raw) for name, raw in raw_runs(read_layers(*paths)).items()}


def _run(raw: Any) -> tuple[ModelSettings, list[PhaseSettings]]:
    for section, kind in (("model", dict), ("pretrain", list)):
        given = raw.get(section) if isinstance(raw, dict) else None
        if not isinstance(given, kind) or not given:
            raise ConfigError(f"no section `{section}` to plan. Hint: give a preset")
    phases = [
        validate(PhaseSettings, phase, f"pretrain.{number}: ")
        for number, phase in enumerate(raw["pretrain"])
    ]
    return validate(ModelSettings, raw["model"], "model: "), phases


def describe(
    model: ModelSettings, phases: list[PhaseSettings], hardware: Hardware, num_samples: int | None
) -> str:
    """The plan as text: a line per phase, totals, and what does not fit.

    Args:
        model: architecture.
        phases: in order.
        hardware: named or made up.
        num_samples: of the data set, to tell how often a phase sees each; None: not told.

    Raises:
        ConfigError: if the architecture is unknown, or if its cost is.
    """
    config = architecture(model)
    largest = max(1 + (p.image_size // _patch(config)) ** 2 for p in phases)
    image, text = cost.num_parameters(config, phases[-1])
    rows = [COLUMNS, *[_row(config, phase, largest, hardware) for phase in phases]]
    rows.append(_total(config, phases, hardware))
    lines = [
        f"{model.name or 'model.config'}: {(image + text + 1) / 1e6:,.1f} M parameters "
        f"({image / 1e6:,.1f} M image, {text / 1e6:,.1f} M text)",
        f"{hardware.num_gpus} x {hardware.name}: {hardware.mfu:.0%} of {hardware.peak:,.0f} TFLOP/s is "
        f"{hardware.mfu * hardware.peak:,.0f} TFLOP/s; ${hardware.price:,.3f} per GPU hour",
        "",
        *_aligned(rows),
        "",
        f"image tokens: after reduction, class token counted, of {largest} of the largest image",
        "GMAC: of a forward pass, per sample. GFLOP: of training on it, 6 x GMAC; EFLOP: of the phase. "
        "Recomputation is not counted",
        f"memory: GB per GPU, laid out as the phase is set: {fp.STATE} bytes per parameter, activations in bf16, loss",
    ]
    if num_samples is not None:
        passes = [f"{p.name} {p.samples_seen / num_samples:,.1f}" for p in phases]
        lines.append(f"passes over {num_samples:,} samples: {', '.join(passes)}")
    return "\n".join([*lines, *_misfits(config, phases, hardware)])


def main() -> None:
    """Command line: the plan of each run."""
    given = _arguments().parse_args()
    try:
        runs, hardware = read(given.preset), _hardware(given)
        for name, (model, phases) in runs.items():
            title = f"[{name}] " if len(runs) > 1 else ""
            print(title + describe(model, phases, hardware, given.samples))
    except ConfigError as error:
        sys.exit(f"plan: {error}")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m clipgraft.plan", description=__doc__)
    parser.add_argument("--preset", type=Path, nargs="+", required=True, metavar="YAML")
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)} (default {DEFAULT_GPU})")
    parser.add_argument("--tflops", type=float, help="dense bf16 peak of a GPU not listed")
    parser.add_argument("--num-gpus", type=int, default=8)
    parser.add_argument(
        "--mfu", type=float, default=0.27, help="share of the peak (CLIPA: 0.2-0.27)"
    )
    parser.add_argument("--price", type=float, default=1.575, help="dollars per GPU and hour")
    parser.add_argument("--samples", type=int, help="of your data set: tells the passes")
    return parser


def _hardware(given: argparse.Namespace) -> Hardware:
    name = given.gpu or (DEFAULT_GPU if given.tflops is None else "GPU")
    if given.tflops is None and name not in GPUS:
        raise ConfigError(
            f"--gpu {name}: its peak is not known. Hint: one of {', '.join(GPUS)}, or give it with --tflops"
        )
    for option in ("num_gpus", "mfu", "price", "tflops", "samples"):
        number = getattr(given, option)
        if number is not None and number <= 0:
            raise ConfigError(f"--{option.replace('_', '-')} {number}: must be above 0")
    if given.mfu > 1:
        raise ConfigError(f"--mfu {given.mfu}: a share of the peak is at most 1. Hint: 0.27")
    peak, memory = GPUS.get(name, (0, None)) if given.tflops is None else (given.tflops, None)
    return Hardware(name, peak, memory, given.num_gpus, given.mfu, given.price)


def _row(
    config: dict[str, Any], phase: PhaseSettings, largest: int, hardware: Hardware
) -> list[str]:
    macs, flops = cost.phase_macs(config, phase), _flops(config, phase)
    return [
        phase.name,
        str(phase.image_size),
        f"{cost.image_tokens(config, phase)}/{largest}",
        str(phase.text_length),
        _count(phase.samples_seen),
        f"{phase.batch_size:,}",
        f"{num_steps(phase):,}",
        f"{peak_lr(phase):.3e}",
        f"{num_warmup_steps(phase):,}",
        f"{macs / 1e9:,.2f}",
        f"{cost.FLOPS_PER_MAC * macs / 1e9:,.1f}",
        f"{flops / 1e18:,.1f}",
        f"{_memory(config, phase, hardware.num_gpus) / 1e9:,.1f}",
        *_money(flops, hardware),
    ]


def _total(config: dict[str, Any], phases: list[PhaseSettings], hardware: Hardware) -> list[str]:
    steps, flops = sum(map(num_steps, phases)), sum(_flops(config, phase) for phase in phases)
    seen = _count(sum(phase.samples_seen for phase in phases))
    total = ["all", "", "", "", seen, "", f"{steps:,}", "", "", "", "", f"{flops / 1e18:,.1f}", ""]
    return [*total, *_money(flops, hardware)]


def _money(flops: float, hardware: Hardware) -> list[str]:
    gpu_hours = hardware.gpu_hours(flops)
    hours = f"{gpu_hours / hardware.num_gpus:,.1f}"
    return [f"{gpu_hours:,.1f}", hours, f"${gpu_hours * hardware.price:,.0f}"]


def _flops(config: dict[str, Any], phase: PhaseSettings) -> float:
    return cost.FLOPS_PER_MAC * cost.training_macs(config, phase)


def _memory(config: dict[str, Any], phase: PhaseSettings, num_gpus: int) -> float:
    return fp.memory_of(config, phase, fp.Layout.of(phase, num_gpus)).total


def _misfits(config: dict[str, Any], phases: list[PhaseSettings], hardware: Hardware) -> list[str]:
    """What does not fit into memory, phase by phase, and what would help."""
    if hardware.memory is None:
        return []
    lines, usable = [], FILLED * hardware.memory * 1e9
    for phase in phases:
        if _memory(config, phase, hardware.num_gpus) > usable:
            lines.append(
                f"{phase.name} does not fit into {FILLED:.0%} of {hardware.memory:,.0f} GB. "
                f"Hint: {_remedy(config, phase, hardware.num_gpus, usable)}"
            )
    return lines


def _remedy(config: dict[str, Any], phase: PhaseSettings, num_gpus: int, usable: float) -> str:
    """The cheapest settings for these GPUs, or else for the fewest more."""
    counts = [num_gpus * 2**n for n in range(phase.batch_size.bit_length())]
    for count in counts:
        layout = (
            None if phase.batch_size % count else fp.first_that_fits(config, phase, count, usable)
        )
        if layout is not None:
            settings = f"`{layout.settings}`" if layout.settings else "as it is"
            return settings + ("" if count == num_gpus else f" on {count} of them")
    return "a GPU with more memory"


def _patch(config: dict[str, Any]) -> int:
    return int({**cost.VISION, **config["vision_cfg"]}["patch_size"])


def _count(number: int) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {letter}"
    return str(number)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    main()
