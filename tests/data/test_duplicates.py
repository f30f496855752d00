"""Laws of hashes and of the search for duplicates. Oracle: every pair compared."""

import io
import logging

import cv2
import numpy as np
import pytest
from pictures import encoded
from PIL import Image, ImageEnhance

from clipgraft.data import duplicates
from clipgraft.data.duplicates import (
    find_near,
    first_equal,
    first_near,
    perceptual_hash_of,
    pixel_hash_of,
)
from clipgraft.data.images import decode


def picture(seed: int) -> Image.Image:
    """Structure at all scales, as photographs have it."""
    rng = np.random.default_rng(seed)
    layers = [rng.normal(0, 80 / side, (side, side, 3)) for side in (2, 4, 8, 16, 32)]
    total = sum(cv2.resize(each, (160, 120), interpolation=cv2.INTER_CUBIC) for each in layers)
    return Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))


def distance(one: Image.Image, two: Image.Image) -> int:
    hashes = [perceptual_hash_of(np.asarray(each.convert("RGB"))) for each in (one, two)]
    return (hashes[0] ^ hashes[1]).bit_count()


def crowd(size: int, seed: int = 0) -> np.ndarray:
    """Hashes with many near ones: each is one of a few with some bits turned."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, max(1, size // 5), dtype=np.uint64)
    hashes = centres[rng.integers(0, len(centres), size)]
    for _ in range(5):
        turn = np.uint64(1) << rng.integers(0, 64, size, dtype=np.uint64)
        hashes = np.where(rng.random(size) < 0.3, hashes ^ turn, hashes)
    return hashes


def nearest_by_hand(hashes, others, max_bits) -> list[int]:
    """The first of the others that is near enough."""
    return [
        next((j for j, b in enumerate(others) if (a ^ b).bit_count() <= max_bits), -1)
        for a in hashes
    ]


def kept_by_hand(hashes, max_bits) -> list[int]:
    kept, found = [], []
    for i, a in enumerate(hashes):
        same = next((j for j in kept if (a ^ hashes[j]).bit_count() <= max_bits), i)
        found.append(same)
        if same == i:
            kept.append(i)
    return found


def test_the_pixel_hash_is_of_pixels_and_size_and_of_nothing_else():
    pixels = np.asarray(picture(0))
    assert pixel_hash_of(pixels) == pixel_hash_of(decode(encoded(picture(0), "PNG")))
    assert pixel_hash_of(pixels) == pixel_hash_of(np.asfortranarray(pixels))
    other = pixels.copy()
    other[7, 5, 1] ^= 1
    turned = pixels.reshape(pixels.shape[1], pixels.shape[0], 3)  # the same bytes, another picture
    hashes = {pixel_hash_of(each) for each in (pixels, other, turned)}
    assert len(hashes) == 3 and all(len(each) == 16 and int(each, 16) >= 0 for each in hashes)


def test_copies_have_near_hashes_and_strangers_far_ones():
    for seed in range(20):
        one = picture(seed)
        copies = [
            one.resize((80, 60)),
            one.resize((300, 225)),
            Image.open(io.BytesIO(encoded(one, "JPEG", quality=30))),
            ImageEnhance.Brightness(one).enhance(0.8),
            one.convert("L"),
        ]
        assert max(distance(one, copy) for copy in copies) <= 8
        assert distance(one, picture(seed + 100)) >= 14
        assert distance(one, one.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) >= 14


def test_the_perceptual_hash_is_that_of_its_definition():
    pixels = np.asarray(picture(3))
    grey = np.asarray(cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA), float)  # fmt: skip
    k, n = np.arange(32)[:, None], np.arange(32)[None]
    cosine = np.cos(np.pi * (2 * n + 1) * k / 64) * np.sqrt(2 / 32)
    low = (cosine @ grey @ cosine.T)[1:9, 1:9].ravel()
    bits = "".join("1" if each > np.median(low) else "0" for each in low)
    assert (perceptual_hash_of(pixels) ^ int(bits, 2)).bit_count() <= 4  # rounding, near the median


def test_plain_pictures_are_all_alike_and_tiny_ones_have_hashes():
    plain = [
        np.full((h, w, 3), c, np.uint8) for h, w, c in ((40, 50, 0), (33, 7, 129), (1, 1, 255))
    ]
    assert {perceptual_hash_of(each) for each in plain} == {0}


def test_the_first_of_equal_ones_is_named():
    hashes = np.array(["b", "a", "b", "c", "a", "b"])
    assert first_equal(hashes).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_equal(np.zeros(0, "U16")).tolist() == []


@pytest.mark.parametrize("max_bits", [0, 1, 3, 4, 7, 8, 13])
@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("block", [7, 64])
def test_what_is_found_is_what_all_pairs_give(max_bits, banded, block, monkeypatch):
    if banded:
        monkeypatch.setattr(
            duplicates, "comb", lambda *_: 0
        )  # as if there were too many to compare
        monkeypatch.setattr(duplicates, "_MAX_PAIRS", 50)
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    hashes, others = crowd(300), np.concatenate([crowd(200), crowd(50, seed=1)])
    as_ints = [[int(each) for each in of] for of in (hashes, others)]
    expected = nearest_by_hand(*as_ints, max_bits)
    assert find_near(hashes, others, max_bits).tolist() == expected
    assert first_near(hashes, max_bits).tolist() == kept_by_hand(as_ints[0], max_bits)
    assert -1 in expected and len({*expected}) > 8


def test_rows_are_sorted_as_often_as_they_can_be_doubled_and_progress_is_told(monkeypatch, caplog):
    num_sorted, argsort = [], np.argsort
    monkeypatch.setattr(duplicates, "comb", lambda *_: 0)
    monkeypatch.setattr(duplicates, "_BLOCK", 16)
    monkeypatch.setattr("clipgraft.data.parallel.LOG_SECONDS", 0.0)
    hashes = np.random.default_rng(0).integers(0, 2**64, 2048, dtype=np.uint64)

    def counted(values, **settings):
        num_sorted.append(len(values))
        return argsort(values, **settings)

    monkeypatch.setattr(np, "argsort", counted)
    with caplog.at_level(logging.INFO):
        assert first_near(hashes, 3).tolist() == list(range(2048))
    doublings = np.log2(2048 / 16)
    assert 4 * 2048 <= sum(num_sorted) <= 4 * 2048 * (doublings + 1)
    assert "compared 1,024/2,048 images  50%" in caplog.text


def test_nothing_is_near_where_there_is_nothing():
    none = np.zeros(0, np.uint64)
    assert find_near(none, crowd(5), 3).tolist() == []
    assert find_near(crowd(5), none, 3).tolist() == [-1] * 5
    assert first_near(none, 3).tolist() == []


def test_a_chain_loses_every_second_picture_not_all():
    chain = np.array([(1 << i) - 1 for i in range(0, 24, 2)], np.uint64)
    assert first_near(chain, 2).tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]
