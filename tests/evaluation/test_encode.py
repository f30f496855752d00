"""Features of images: who computes them changes nothing, and leaves nothing behind."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from clipgraft.config import ConfigError
from clipgraft.evaluation import encode, rows
from clipgraft.evaluation.encode import encode_images, own_batch
from clipgraft.evaluation.ensemble import Ensemble
from clipgraft.evaluation.evalset.pictures import Pictures
from clipgraft.models.build import build, describe
from clipgraft.models.fused import fuse
from clipgraft.models.moe import insert_experts

NUM, SIZE, BATCH = 23, 16, 5
CPU = torch.device("cpu")
TORCH_THREADS = 3


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(TORCH_THREADS)
    yield
    torch.set_num_threads(before)


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(*broken: int) -> Pictures:
    files = [b"no picture" if number in broken else png(number) for number in range(NUM)]
    return Pictures([f"picture {number}" for number in range(NUM)], files.__getitem__)


def model_of(config: dict[str, Any], num_experts: int = 0) -> nn.Module:
    torch.manual_seed(0)
    model = build(config).eval()
    if num_experts:
        insert_experts(model, num_experts, 1, image_layers="all", text_layers=[])
        for parameter in model.visual.parameters():
            nn.init.normal_(parameter, std=0.1)
    fuse(model)
    return model


def encoded(model: nn.Module, config: dict[str, Any], threads: int, **more: Any) -> torch.Tensor:
    preprocess = describe(config)["preprocess"]
    more = {"samples": pictures(), "batch_size": BATCH, **more}
    with torch.inference_mode():
        return encode_images(model, preprocess, device=CPU, threads=threads, **more)


def torch_threads() -> list[int]:
    """Of this thread, and of one that is new."""
    with ThreadPoolExecutor(1) as pool:
        return [torch.get_num_threads(), pool.submit(torch.get_num_threads).result()]


def threads_of(model: nn.Module) -> set[tuple[bool, int]]:
    """Filled by each forward: whether it is in this thread, and torch's number there."""
    main, seen = threading.get_ident(), set()

    def see(*_: Any) -> None:
        seen.add((threading.get_ident() == main, torch.get_num_threads()))

    for each in getattr(model, "models", [model]):
        each.visual.register_forward_pre_hook(see)
    return seen


def test_features_are_the_same_to_the_bit_for_any_number_of_threads(tiny_config):
    model = model_of(tiny_config)
    one = encoded(model, tiny_config, 1)
    for threads in (2, 3):
        assert torch.equal(encoded(model, tiny_config, threads), one)

    preprocess = describe(tiny_config)["preprocess"]
    pixels = np.stack([pictures().pixels(row) for row in range(NUM)]) / 255
    inputs = (pixels - preprocess["mean"]) / preprocess["std"]
    torch.manual_seed(0)
    with torch.inference_mode():
        plain = build(tiny_config).eval()
        whole = plain.encode_image(torch.from_numpy(inputs).float().permute(0, 3, 1, 2))
    torch.testing.assert_close(one, F.normalize(whole, dim=-1), rtol=1e-5, atol=1e-5)


def test_each_thread_has_one_of_torch_and_torch_has_its_own_again(tiny_config):
    model = model_of(tiny_config)
    seen = threads_of(model)
    encoded(model, tiny_config, 2)
    assert seen == {(False, 1)} and torch_threads() == [TORCH_THREADS] * 2


def test_an_image_that_does_not_decode_in_a_late_batch_is_named(tiny_config):
    model = model_of(tiny_config)
    with pytest.raises(ConfigError, match=r"^picture 21: the image does not decode"):
        encoded(model, tiny_config, 2, samples=pictures(21, 22))
    assert torch_threads() == [TORCH_THREADS] * 2


def test_torch_has_its_threads_again_when_features_cannot_be_written(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(rows, "LARGE_BYTES", 0)
    with pytest.raises(FileNotFoundError):
        encoded(model_of(tiny_config), tiny_config, 2, file=tmp_path / "none/images")
    assert torch_threads() == [TORCH_THREADS] * 2


@pytest.mark.parametrize("num_experts", [0, 2])
def test_a_line_tells_how_far_it_is_every_ten_seconds(
    tiny_config, num_experts, monkeypatch, caplog
):
    seconds = itertools.count(0, 6)
    monkeypatch.setattr(encode, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with caplog.at_level("INFO"):
        encoded(model_of(tiny_config, num_experts), tiny_config, 2)
    assert caplog.messages == ["10 of 23 images  1/s", "20 of 23 images  1/s"]


def test_few_batches_are_begun_ahead():
    begun = []

    def batches() -> Iterator[range]:
        for number in range(100):
            begun.append(number)
            yield range(number, number + 1)

    parts = encode._in_threads(lambda rows: torch.tensor([rows.start]), batches(), 3)
    assert next(parts).item() == 0 and len(begun) == 6
    assert next(parts).item() == 1 and len(begun) == 7
    parts.close()
    assert torch_threads() == [TORCH_THREADS] * 2


def test_what_looks_into_the_model_finds_one_batch_at_a_time(tiny_config):
    model = model_of(tiny_config)
    seen, told = threads_of(model), []
    more = {"ahead": told.append, "watch": told.append}
    found = encoded(model, tiny_config, 2, **more)
    batches = [range(first, min(first + BATCH, NUM)) for first in range(0, NUM, BATCH)]
    assert told == [each for batch in batches for each in (batch, len(batch))]
    assert seen == {(True, TORCH_THREADS)}
    torch.testing.assert_close(found, encoded(model, tiny_config, 2), rtol=1e-5, atol=1e-5)


def test_experts_have_one_batch_at_a_time(tiny_config):
    beside = [model_of(tiny_config), model_of(tiny_config, num_experts=2)]
    for model in (model_of(tiny_config, num_experts=2), Ensemble(beside)):
        seen = threads_of(model)
        encoded(model, tiny_config, 2)
        assert seen == {(True, TORCH_THREADS)}
    dense = Ensemble([model_of(tiny_config)] * 2)
    seen = threads_of(dense)
    encoded(dense, tiny_config, 2)
    assert seen == {(False, 1)}


def test_many_threads_have_small_batches():
    assert [own_batch(threads) for threads in (1, 2, 8, 16, 64)] == [48, 48, 48, 24, 8]


def test_a_picture_too_narrow_for_the_model_is_named():
    buffer = io.BytesIO()
    Image.new("RGB", (1, 65_000)).save(buffer, "PNG")
    narrow = Pictures(["narrow"], lambda _: buffer.getvalue())
    config = {"size": 224, "resize_mode": "shortest", "interpolation": "bicubic"}
    told = (
        "picture 0 of the data set cannot be shown to the model: too many pixels: 1 x 65000 at 224"
    )
    with pytest.raises(ConfigError, match=told):
        encode_images(nn.Identity(), config, narrow, CPU, 1)
