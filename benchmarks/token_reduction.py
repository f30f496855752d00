"""What dropping tokens saves: a training step's time beside its FLOPs, masks beside short images, words in milliseconds.

    [REALDATA=...] python benchmarks/token_reduction.py [--quick]

A step is forward, contrastive loss and backward of both towers in training's precision and attention and in open_clip's
own blocks (`train_step.py` measures those of trainings), pixels normalised beforehand; the optimizer, whose work does not depend on the length, is left out. Full length is 224 px and
77 tokens, open_clip's ViT-B-16. Widths are those of B/16 everywhere; --quick and the CPU have fewer layers, and say so.
Captions are those of Flickr8k where REALDATA is set, else made-up ones with its lengths and its shares of classes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Row, arguments, faster, one_core, rates, report, within  # first: sets threads
from pydantic import TypeAdapter
from text_reduction import index, read_captions
from torch import nn

from clipgraft import dist
from clipgraft.cost import forward_macs
from clipgraft.data.draws import draw_bits
from clipgraft.data.tokens import Tokens
from clipgraft.devices import attention, precision
from clipgraft.models.build import build
from clipgraft.models.patches import drop_patches, num_patches
from clipgraft.objectives import encode, pair_loss
from clipgraft.reductions import ImageReduction, SyntaxText

VOCABULARY = 49_408
FULL, SHORT = (224, 77), (112, 16)  # pixels, text tokens
REACH_STEP, REACH_MASK, REACH_WORDS = 1 / 1.1, 1 / 1.03, 5  # share of FLOPs, share of time, ms
MASKS = [{"kind": "random", "keep": 0.25}, {"kind": "grid"}, {"kind": "block", "keep": 0.25}]
CAPTIONS = 4096
# Shares of Flickr8k (30,000 captions): nouns, adjectives, verbs, others; tokens per caption 12.1 +- 4.0, per word 1.02.
SHARES, LENGTH, PIECES = (0.301, 0.089, 0.132, 0.478), (12.1, 4.0), 1.02
WORDS = {  # that are tagged so in any order; one of them has two pieces
    "noun": "dog man woman boy girl grass ball street beach snow dachshund wall hat bike snowboarder",
    "adjective": "brown white black young small red large blue",
    "verb": "runs playing sitting holding wearing walks eating climbing is are",
    "other": "a the in on with of and two through an",
}


def b16(layers: int, image_size: int, text_length: int) -> dict[str, Any]:
    """Config of towers as wide as those of ViT-B/16."""
    vision = {"image_size": image_size, "patch_size": 16, "width": 768, "layers": layers}
    text = {"context_length": text_length, "vocab_size": VOCABULARY, "width": 512, "heads": 8}
    return {"embed_dim": 512, "vision_cfg": vision, "text_cfg": {**text, "layers": layers}}


def built(config: dict[str, Any], reduction: object = "resize") -> nn.Module:
    """A model in training that drops patches."""
    torch.manual_seed(0)
    model = build(config)
    drop_patches(model, TypeAdapter(ImageReduction).validate_python(reduction))
    return model.train()


def training_step(
    model: nn.Module, batch: int, image_size: int, text_length: int, device: torch.device
) -> Callable[[], int]:
    """Forward, loss and backward on made-up data; returns the number of samples."""
    model.to(device)
    images_BCHW = torch.randn(batch, 3, image_size, image_size, device=device)
    images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    text_BL = torch.randint(1, VOCABULARY - 2, (batch, text_length), device=device)
    text_BL[:, -1] = VOCABULARY - 1  # the end token
    bits_B = torch.from_numpy(draw_bits(0, np.arange(batch), 0, 1)[:, 0].view(np.int64)).to(device)
    dtype, world = precision(device), dist.World(0, 1, device)

    def step() -> int:
        model.zero_grad(set_to_none=True)
        model.visual.image_bits_B = bits_B
        is_mixed = dtype != torch.float32
        with attention(device), torch.autocast(device.type, dtype=dtype, enabled=is_mixed):
            pair_loss(world, encode(model, images_BCHW, text_BL)).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return batch

    return step


def compare_lengths(layers: int, batch: int, device: torch.device, repeats: int) -> Row:
    """Samples per second at (I50,T16), beside what the FLOPs say from those at full length."""
    sides = {
        name: training_step(built(b16(layers, *sizes)), batch, *sizes, device)
        for name, sizes in (("short", SHORT), ("full", FULL))
    }
    measured = rates(sides, repeats)
    full, short = (
        forward_macs(b16(layers, side, length), (side // 16) ** 2 + 1, length)
        for side, length in (FULL, SHORT)
    )
    gain = full / short
    by_flops = [rate * gain for rate in measured["full"]]
    note = (
        f"B/16 widths, {layers} layers, batch {batch}, {_about(device)}; peer: 224 px and T=77 "
        f"({np.median(measured['full']):,.1f} samples/s) times its {gain:.2f}-fold FLOPs"
    )
    name = f"{device.type}: step at (I50,T16) against its share of FLOPs"
    return faster(name, measured["short"], by_flops, "samples/s", REACH_STEP, note)


def compare_masks(layers: int, batch: int, device: torch.device, repeats: int) -> list[Row]:
    """Samples per second with 49 of 196 patches kept, beside images of 112 px."""
    text_length = SHORT[1]
    models = {each["kind"]: built(b16(layers, 224, text_length), each) for each in MASKS}
    assert all(num_patches(model) == (49, 196) for model in models.values())
    sides = {
        kind: training_step(model, batch, 224, text_length, device)
        for kind, model in models.items()
    }
    sides["plain"] = training_step(built(b16(layers, *SHORT)), batch, *SHORT, device)
    measured = rates(sides, repeats)
    note = f"B/16 widths, {layers} layers, batch {batch}, {_about(device)}; peer: 112 px, all 49 patches"
    return [
        faster(
            f"{device.type}: step with mask {kind}, 49 of 196 patches",
            measured[kind],
            measured["plain"],
            "samples/s",
            REACH_MASK,
            note,
        )
        for kind in models
    ]


def time_words(repeats: int) -> list[Row]:
    """Milliseconds to reduce, frame and return a batch of captions."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        source, num = write_captions(Path(name))
        tokens = Tokens.open(Path(name))
        rng = np.random.default_rng(0)
        for text_length in (8, 16):
            taken = []
            for _ in range(repeats):
                caption_B = rng.integers(0, num, CAPTIONS)
                started = time.perf_counter()
                tokens.encode(caption_B, text_length, SyntaxText(kind="syntax"))
                taken.append((time.perf_counter() - started) * 1000)
            title = f"syntax reduction of {CAPTIONS:,} captions to T={text_length}"
            rows.append(within(title, taken[repeats // 5 :], REACH_WORDS, "ms", source))
    return rows


def write_captions(folder: Path, num: int = 20_000) -> tuple[str, int]:
    """Write `tokens/` as `index` does; returns where captions come from, and how many there are."""
    if os.environ.get("REALDATA"):
        source, captions = read_captions(num)
    else:
        source, captions = "made-up captions with the lengths and classes of Flickr8k", make_up(num)
    return source, index(captions, folder)


def make_up(num: int) -> list[str]:
    """Captions of random words, in which classes and lengths are about as often as in Flickr8k."""
    rng = np.random.default_rng(0)
    length_C = np.maximum((rng.normal(*LENGTH, num) / PIECES).round(), 3).astype(np.int64)
    num_W = length_C.sum()
    class_W = rng.choice(list(WORDS), num_W, p=np.array(SHARES) / sum(SHARES))
    word_W = np.empty(num_W, object)
    for name, words in WORDS.items():
        is_of = class_W == name
        word_W[is_of] = rng.choice(words.split(), is_of.sum())
    return [" ".join(each) for each in np.split(word_W, np.cumsum(length_C)[:-1])]


def _about(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "one core"
    return f"{str(precision(device)).removeprefix('torch.')} on {name}"


def main() -> None:
    """Measure and report."""
    quick = arguments().quick
    one_core()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    rows = time_words(50 if quick else 200)
    rows.append(compare_lengths(1 if quick else 6, 32, cpu, 3 if quick else 5))
    rows += compare_masks(1 if quick else 6, 32, cpu, 5 if quick else 9)
    if torch.cuda.is_available():
        cuda, repeats = torch.device("cuda"), 5 if quick else 20
        rows.append(compare_lengths(12, 512, cuda, repeats))
        rows += compare_masks(12, 512, cuda, repeats)
    else:
        name = "cuda: step at (I50,T16) against its share of FLOPs, and masks"
        rows.append(Row(name, None, None, "samples/s", None, None, note="no CUDA device"))
    report("token_reduction", rows)


if __name__ == "__main__":
    main()
