"""What a training needs of each device, of the network and of disks, by arithmetic on configs, without torch.

Each number is of what this code keeps or sends; the sizes that depend on pictures and captions, and all rates, were
measured here or published, and are named with their source. Estimates leave out what libraries and allocators take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clipgraft import cost
from clipgraft.recipes import PhaseSettings

FP32, BF16 = 4, 2
MOMENTS = 2 * FP32  # of Adam
STATE = FP32 + BF16 + FP32 + MOMENTS  # per parameter: weight, its copy, gradient, moments
TILE = (
    3 * FP32 * 1024 * 8192
)  # of the pair engine on a GPU: similarities and what is computed of them
SCALARS = 8  # numbers per sample that losses gather beside features

# Of a sample on disk or in memory, in bytes.
PIXEL_BYTES = (
    0.7  # JPEG of quality 95, measured on Flickr8k at 88 px (0.67) and 67 px (0.84); less if larger
)
ASPECT = 4 / 3  # of a photo; its short side is what is stored
ROW = 200  # samples.parquet, measured on Flickr8k (198)
TOKEN = 2 + 1 + 4  # id, word class, frequency
CAPTION = (
    8 + 1 + 4 + 8
)  # offset, kind, sentence; and the offset of its sample, with one caption each
CAPTION_TOKENS = 16  # without start and end; Flickr8k has 12, web captions are longer
INDEXING = 1541  # memory of `index`: how its peak grew from 50,000 to 150,000 samples of tars with .txt and .json
PLACE = 28  # offsets.npy of shards
LOG_U = 2 * FP32
LABEL = 4
ORDER = 16  # rows and visits of an epoch, int64, in every process

# Rates in samples per second; the second word of a source is the file in benchmarks/results.
DOWNLOAD = 100e6 / (20 * 3600)  # img2dataset, README: 100 M URLs in 20 h on one machine
INDEX = 942.7  # per core; benchmarks index
SHARD = 1 / (1 / 383.1 - 1 / 942.7)  # per core; benchmarks index
DECODE = {0.9: 9253.0, 0.4: 5286.0}  # per core, by the smallest crop; benchmarks loader
KMEANS = 103500.0  # of both sides, per core, 3 tries of all points; benchmarks cluster

LINK_NEAR, LINK_FAR = 300e9, 25e9  # bytes/s of a device: A100's NVLink one way; 200 Gb/s InfiniBand
NODE = 8  # devices per machine
WRITE = 1e9  # bytes/s of a file system
SAVE_SHARE = 0.02  # of the time may go into saving (`training_state.Pace`): more state, less often
LOST = 1800.0  # seconds of training that a kill may cost


@dataclass(frozen=True)
class Layout:
    """How a training is laid out over devices.

    Attributes:
        devices: processes in all.
        is_sharded: `parallel: fsdp`.
        recomputes: `grad_checkpointing`.
        num_parts: `accumulate`.
    """

    devices: int
    is_sharded: bool = False
    recomputes: bool = False
    num_parts: int = 1

    @classmethod
    def of(cls, phase: PhaseSettings, devices: int) -> Layout:
        """As a phase is set."""
        return cls(devices, phase.parallel == "fsdp", phase.grad_checkpointing, phase.accumulate)

    @property
    def settings(self) -> str:
        """What a phase is to be given for it, beside the defaults."""
        given = ["parallel: fsdp"] if self.is_sharded else []
        given += ["grad_checkpointing: true"] if self.recomputes else []
        given += [f"accumulate: {self.num_parts}"] if self.num_parts > 1 else []
        return ", ".join(given)

    def __str__(self) -> str:
        """As short as a cell of a table."""
        words = ["fsdp" if self.is_sharded else "ddp"]
        words += ["gc"] if self.recomputes else []
        words += [f"/{self.num_parts}"] if self.num_parts > 1 else []
        return " ".join(words)


@dataclass(frozen=True)
class Memory:
    """Of one device, in bytes: fp32 and bf16 weights, gradients, moments, activations, loss."""

    weights: float
    gradients: float
    moments: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.activations + self.loss


def memory_of(config: Mapping[str, Any], phase: PhaseSettings, layout: Layout) -> Memory:
    """Estimated memory of each device when all weights are trained by AdamW.

    With FSDP a device has its share of fp32 weights, gradients and moments, and two blocks and what is outside of blocks
    whole, for a while; over parts of a batch, gradients add up whole.
    """
    parameters = sum(cost.num_parameters(config, phase))
    own = parameters / layout.devices if layout.is_sharded else parameters
    weights, gradients = FP32 * own, FP32 * own
    if layout.is_sharded:
        passing = min(parameters, passing_parameters(config, phase))
        weights += (FP32 + BF16) * passing
        gradients += FP32 * (parameters if layout.num_parts > 1 else passing)
    else:
        weights += BF16 * own  # autocast keeps its copies until the step is over
    on_device = math.ceil(phase.batch_size / layout.devices)
    kept = activation_bytes(config, phase, layout.recomputes)
    activations = math.ceil(on_device / layout.num_parts) * kept
    return Memory(weights, gradients, MOMENTS * own, activations, loss_bytes(config, phase, layout))


def passing_parameters(config: Mapping[str, Any], phase: PhaseSettings) -> float:
    """What is whole on a device at a time: two blocks of the wider tower, and what of both is in no block."""
    towers, blocks = cost.num_parameters(config, phase), cost.blocks(config)
    outside = sum(towers) - sum(num * size for num, _, size in blocks)
    return float(outside + 2 * max(size for *_, size in blocks))


def activation_bytes(config: Mapping[str, Any], phase: PhaseSettings, recomputes: bool) -> float:
    """What blocks keep of one sample; with recomputation the input of each, and one block's as it is computed again."""
    lengths = cost.image_tokens(config, phase), phase.text_length
    whole = cost.activation_bytes(config, *lengths)
    if not recomputes:
        return whole
    blocks = cost.blocks(config)
    inputs = [
        BF16 * num * width * length for (num, width, _), length in zip(blocks, lengths, strict=True)
    ]
    return sum(inputs) + whole / min(num for num, *_ in blocks)


def loss_bytes(config: Mapping[str, Any], phase: PhaseSettings, layout: Layout) -> float:
    """Features of both sides: this device's with gradient, and those of all; a tile of similarities."""
    own = math.ceil(phase.batch_size / layout.devices)
    return float(2 * FP32 * config["embed_dim"] * (2 * own + phase.batch_size) + TILE)


def first_that_fits(
    config: Mapping[str, Any], phase: PhaseSettings, devices: int, memory: float
) -> Layout | None:
    """The layout that fits and costs least: network before a forward pass more, that before a batch in parts.

    Args:
        config: in open_clip's form.
        phase: of training.
        devices: in all.
        memory: bytes of each that may be used.
    """
    plain = Layout(devices)
    tried = [
        replace(plain, is_sharded=is_sharded, recomputes=recomputes)
        for recomputes in (False, True)
        for is_sharded in (False, True)
    ]
    on_device = phase.batch_size // devices
    parts = [2**n for n in range(1, 20) if on_device and on_device % 2**n == 0]
    for num in parts:
        tried += [
            replace(plain, num_parts=num, recomputes=True, is_sharded=each)
            for each in (False, True)
        ]
    return next((x for x in tried if memory_of(config, phase, x).total <= memory), None)


@dataclass(frozen=True)
class Traffic:
    """What a device receives in a step, in bytes."""

    features: float
    gradients: float

    def seconds(self, devices: int) -> float:
        """On the link between them, with nothing computed meanwhile."""
        return (self.features + self.gradients) / (LINK_NEAR if devices <= NODE else LINK_FAR)


def traffic_of(config: Mapping[str, Any], phase: PhaseSettings, layout: Layout) -> Traffic:
    """Features of the others, and gradients; with FSDP also weights, for the forward and the backward pass.

    A ring sends each device 2 (n - 1) / n of what is summed for all, (n - 1) / n of what is gathered or scattered.
    """
    others = (layout.devices - 1) / layout.devices
    parameters = sum(cost.num_parameters(config, phase))
    features = phase.batch_size * others * FP32 * (2 * config["embed_dim"] + SCALARS)
    if not layout.is_sharded:
        return Traffic(features, 2 * others * FP32 * parameters)
    passes = 2 if layout.num_parts == 1 else 3 * layout.num_parts
    return Traffic(features, (passes + 1) * others * FP32 * parameters)


def step_seconds(
    config: Mapping[str, Any], phase: PhaseSettings, devices: int, flops: float
) -> float:
    """Computing of a step at so many FLOP/s of a device."""
    return cost.FLOPS_PER_MAC * cost.phase_macs(config, phase) * phase.batch_size / devices / flops


def stored_side(phase: PhaseSettings) -> int:
    """Short side of stored pictures: such that no crop is enlarged."""
    return math.ceil(phase.image_size / math.sqrt(phase.crop_scale[0]))


def shard_bytes(phase: PhaseSettings) -> float:
    """Of one sample in a phase's shards: a picture, the header and padding of a tar's members, its place."""
    return PIXEL_BYTES * ASPECT * stored_side(phase) ** 2 + 1536 + PLACE


def index_bytes() -> float:
    """Of one sample in an index, with its tokens."""
    return float(ROW + CAPTION_TOKENS * TOKEN + CAPTION)


def embedding_bytes(config: Mapping[str, Any]) -> float:
    """Of one sample, both sides in float16."""
    return float(2 * 2 * config["embed_dim"])


def state_bytes(config: Mapping[str, Any], phase: PhaseSettings) -> float:
    """Of saved training state without u: weights and moments."""
    return float((FP32 + MOMENTS) * sum(cost.num_parameters(config, phase)))


def decoding_cores(config: Mapping[str, Any], phase: PhaseSettings, flops: float) -> float:
    """Cores that feed one device."""
    images = flops / (cost.FLOPS_PER_MAC * cost.phase_macs(config, phase))
    return images / DECODE[0.9 if phase.crop_scale[0] >= 0.9 else 0.4]
