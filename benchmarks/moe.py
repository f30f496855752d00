"""What experts cost: a training step beside its FLOPs, other ways to run experts, and texts cut to their longest.

    python benchmarks/moe.py [--quick]

A step is forward and backward of both towers at full length in training's precision, all weights trained, in open_clip's
own blocks. The peer of the first row is the dense model: its samples per second over the FLOPs of top 2 of 4 experts
over its own. The row "as trainings run it" has the same sides in the blocks of trainings, where the last block of a
dense tower computes the one token that is read, that of a mixture all; FLOPs are what each computes.

The public loop is CLIP-MoE's, written from its description: for each expert, torch.where finds its tokens, they are
gathered, and index_add brings them back. Texts are padded to 248 tokens there, and their padding is routed; lengths are
those of Flickr8k (12.1 +- 4.0 tokens, and start and end), and of longer captions (65 +- 20). Widths are those of B/16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from _common import Row, arguments, faster, one_core, rates, report  # first: sets threads
from token_reduction import VOCABULARY, b16
from torch import Tensor, nn

from clipgraft.cost import forward_macs
from clipgraft.devices import attention, precision
from clipgraft.models.build import build
from clipgraft.models.moe import MoeMlp, keep_kernels, upcycle
from clipgraft.models.training_blocks import speed_up
from clipgraft.router import KERNELS

E, K = 4, 2
SIZE, LENGTH, LONG = 224, 77, 248  # pixels, text tokens, text tokens of the published way
REACH_STEP, REACH_TEXT = 1 / 1.10, 3
CAPTIONS = {"Flickr8k": (14.1, 4.0), "longer captions": (65.0, 20.0)}


class PublicLoop(nn.Module):
    """The same weights, run as the public code is said to do: one expert after the other, found by torch.where."""

    def __init__(self, moe: MoeMlp) -> None:
        """Share the weights of a layer."""
        super().__init__()
        self.moe = moe

    @property
    def c_fc(self) -> object:
        """For open_clip, which looks up the dtype of a tower there."""
        return self.moe.c_fc

    def forward(self, x_BLD: Tensor) -> Tensor:
        """All tokens are routed, padding too."""
        moe, x_TD = self.moe, x_BLD.flatten(0, 1)
        gates_TK, topk_TK = moe._route(x_TD)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for e in range(E):
            token, choice = torch.where(topk_TK == e)
            h = moe.gelu(nn.functional.linear(x_TD[token], moe.c_fc_weight[e], moe.c_fc_bias[e]))
            y = nn.functional.linear(h, moe.c_proj_weight[e], moe.c_proj_bias[e])
            y_TD = y_TD.index_add(0, token, y * gates_TK[token, choice, None])
        return y_TD.to(x_BLD.dtype).view(x_BLD.shape)


def models(layers: int, text_length: int, device: torch.device) -> dict[str, nn.Module]:
    """Dense, ours with experts that differ, and the public way to run the same experts."""
    keep_kernels(KERNELS)  # as a training of routers does
    torch.manual_seed(0)
    dense = build(b16(layers, SIZE, text_length))
    states = [dense.state_dict(), *(build(b16(layers, SIZE, text_length)).state_dict() for _ in range(E - 1))]  # fmt: skip
    ours = copy.deepcopy(dense)
    every = {"image_layers": "all", "text_layers": "all"}
    upcycle(ours, states, top_k=K, generator=torch.Generator().manual_seed(0), **every)  # type: ignore[arg-type]
    public = copy.deepcopy(ours)
    for tower in (public.visual, public.text):
        for block in tower.transformer.resblocks:
            block.mlp = PublicLoop(block.mlp)
    named = {"dense": dense, "ours": ours, "public": public}
    return {name: model.to(device).train() for name, model in named.items()}


def texts(batch: int, length: int, lengths: tuple[float, float] | None = None) -> Tensor:
    """Random words with start and end; all as long as they may be, or with this mean and spread."""
    generator = np.random.default_rng(0)
    num_B = np.full(batch, length)
    if lengths is not None:
        num_B = np.clip(generator.normal(*lengths, batch).round(), 3, length).astype(int)
    text_BL = generator.integers(1, VOCABULARY - 2, (batch, length))
    text_BL[:, 0] = VOCABULARY - 2
    for row, num in enumerate(num_B):
        text_BL[row, num - 1] = VOCABULARY - 1
        text_BL[row, num:] = 0
    return torch.from_numpy(text_BL)


def step(forward: Callable[[], Tensor], model: nn.Module, batch: int, device: torch.device) -> int:
    """Forward and backward as in training, with a loss that costs nothing; how many samples that were."""
    model.zero_grad(set_to_none=True)
    with in_training(device):
        forward().float().square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return batch


def in_training(device: torch.device) -> ExitStack:
    """Training's precision and attention."""
    stack, dtype = ExitStack(), precision(device)
    stack.enter_context(attention(device))
    stack.enter_context(torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
    return stack


def step_rates(
    sides: Mapping[str, nn.Module], batch: int, device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Samples per second of a whole step of each side."""
    images = torch.randn(batch, 3, SIZE, SIZE, device=device)
    text = texts(batch, LENGTH).to(device)

    def forward(model: nn.Module) -> Tensor:
        return torch.stack(model(images, text)[:2])

    work = {
        name: partial(step, partial(forward, model), model, batch, device)
        for name, model in sides.items()
    }
    return rates(work, repeats)


def step_rows(layers: int, batch: int, device: torch.device, repeats: int) -> list[Row]:
    """Samples per second of a whole training step: the cost of experts."""
    measured = step_rates(models(layers, LENGTH, device), batch, device, repeats)
    share = flops_ratio(layers)
    by_flops = [rate / share for rate in measured["dense"]]
    note = f"B/16 widths, {layers} layers, batch {batch}, {about(device)}"
    cost = f"{note}; peer: dense ({np.median(measured['dense']):,.1f} samples/s) over the FLOP ratio {share:.2f}"
    name = f"{device.type}: top {K} of {E}, forward and backward"
    return [
        faster(f"{name}, beside FLOPs", measured["ours"], by_flops, "samples/s", REACH_STEP, cost),
        faster(
            f"{name}, beside the public loop",
            measured["ours"],
            measured["public"],
            "samples/s",
            None,
            note,
        ),
    ]


def training_row(layers: int, batch: int, device: torch.device, repeats: int) -> Row:
    """The same as trainings run it."""
    sides = models(layers, LENGTH, device)
    del sides["public"]
    for model in sides.values():
        speed_up(model)
    measured = step_rates(sides, batch, device, repeats)
    share = flops_ratio(layers, one_token=True)
    cost = (
        f"B/16 widths, {layers} layers, batch {batch}, {about(device)}; peer: dense "
        f"({np.median(measured['dense']):,.1f} samples/s) over the FLOP ratio {share:.2f}; "
        f"{flops_ratio(layers):.2f} if its last blocks computed all tokens"
    )
    by_flops = [rate / share for rate in measured["dense"]]
    name = f"{device.type}: top {K} of {E} as trainings run it, beside FLOPs"
    return faster(name, measured["ours"], by_flops, "samples/s", None, cost)


def flops_ratio(layers: int, *, one_token: bool = False) -> float:
    """FLOPs of top K over those of the dense model: each further expert of a token is another MLP.

    Args:
        layers: of each tower.
        one_token: of the last blocks of the dense model, all but keys and values is of one token.
    """
    config, tokens = b16(layers, SIZE, LENGTH), (SIZE // 16) ** 2 + 1
    dense = forward_macs(config, tokens, LENGTH)
    widths = ((config["vision_cfg"]["width"], tokens), (config["text_cfg"]["width"], LENGTH))
    mlps = sum(layers * 8 * width**2 * length for width, length in widths)
    spared = sum((10 * width**2 + 2 * width * length) * (length - 1) for width, length in widths)
    return (dense + (K - 1) * mlps) / (dense - spared * one_token)


def text_rows(layers: int, batch: int, device: torch.device, repeats: int) -> list[Row]:
    """Captions per second of the text tower: cut to the longest of the batch, beside padded to 248 and routed."""
    sides = models(layers, LONG, device)
    rows = []
    for source, lengths in CAPTIONS.items():
        padded = texts(batch, LONG, lengths).to(device)
        longest = int(padded.argmax(1).max()) + 1
        given = {"ours": padded[:, :longest], "public": padded}
        work = {
            side: partial(step, partial(sides[side].encode_text, text), sides[side], batch, device)  # type: ignore[operator]
            for side, text in given.items()
        }
        measured = rates(work, repeats)
        note = f"B/16 widths, {layers} layers, batch {batch}, longest {longest} tokens, {about(device)}"
        name = f"{device.type}: text tower, {source}, beside padded to {LONG}"
        rows.append(faster(name, measured["ours"], measured["public"], "captions/s", REACH_TEXT, note))  # fmt: skip
    return rows


def backend_rows(layers: int, batch: int, device: torch.device, repeats: int) -> list[Row]:
    """Samples per second of the image tower, the grouped product beside the loop."""
    base = models(layers, LENGTH, device)["ours"]
    images = torch.randn(batch, 3, SIZE, SIZE, device=device)
    work = {}
    for backend in ("grouped", "loop"):
        model = copy.deepcopy(base)
        model.visual.moe_state.backend = backend  # type: ignore[union-attr,assignment]
        forward = partial(model.encode_image, images)  # type: ignore[operator]
        work[backend] = partial(step, forward, model, batch, device)
    measured = rates(work, repeats)
    note = f"B/16 widths, {layers} layers, batch {batch}, {about(device)}"
    name = f"{device.type}: image tower, experts grouped, beside the loop"
    return [faster(name, measured["grouped"], measured["loop"], "samples/s", None, note)]


def about(device: torch.device) -> str:
    """What it ran on, and in which precision."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "one core"
    return f"{str(precision(device)).removeprefix('torch.')} on {what}"


def rows_of(*, quick: bool) -> Iterator[Row]:
    """All rows, as they are measured."""
    cpu = torch.device("cpu")
    layers, batch, repeats = (2, 4, 3) if quick else (2, 32, 7)
    yield from step_rows(layers, batch, cpu, repeats)
    yield training_row(3 * layers, batch, cpu, repeats)  # of which one is the last
    yield from text_rows(layers, 4 * batch, cpu, repeats)
    if not torch.cuda.is_available():
        name = f"cuda: top {K} of {E}, texts, and the grouped product"
        yield Row(name, None, None, "samples/s", None, None, note="no CUDA device")
        return
    cuda = torch.device("cuda")
    yield from step_rows(12, 256, cuda, 9)
    yield from text_rows(12, 1024, cuda, 9)
    yield from backend_rows(12, 256, cuda, 9)


def main() -> None:
    """Measure and report."""
    args = arguments()
    one_core()
    torch.set_num_threads(1)
    report("moe", rows_of(quick=args.quick))


if __name__ == "__main__":
    main()
