"""Laws of the loader, on shards and tokens that are made up here."""

import threading

import numpy as np
import pytest
import torch
from pictures import jpeg

from clipgraft.config import ConfigError
from clipgraft.data.images import decode, resize_center
from clipgraft.data.loader import Loader
from clipgraft.data.sampler import HomogeneousBatches, UniformBatches

N = 12


class Pictures:
    samples_id = "a"

    def __init__(self, broken=None):
        self.images = [jpeg(24 + i, 20, i) for i in range(N)]
        self.broken = broken

    def jpeg(self, row):
        return b"rubbish" if row == self.broken else self.images[row]


class Captions:
    """Sample i has the captions [i, 0], [i, 1], [i, 2] ..., as numbers."""

    samples_id = "a"

    def batch(self, rows, text_length, choice):
        text = np.zeros((len(rows), text_length), np.int64)
        text[:, 0], text[:, 1] = rows, choice % 3
        return text


def batches(pictures=None, sampler=None, **changes):
    settings = {
        "image_size": 16,
        "text_length": 4,
        "crop_scale": (0.5, 1.0),
        "seed": 3,
        "num_steps": 6,
    }
    sampler = sampler or UniformBatches(N, 4, 0)
    return list(Loader(pictures or Pictures(), Captions(), sampler, **(settings | changes)))


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a.images_BCHW, b.images_BCHW)
        and torch.equal(a.text_BL, b.text_BL)
        and torch.equal(a.rows_B, b.rows_B)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_batches_have_the_documented_shapes_and_types():
    batch = batches()[0]
    assert (batch.images_BCHW.shape, batch.images_BCHW.dtype) == ((4, 3, 16, 16), torch.uint8)
    assert (batch.text_BL.shape, batch.text_BL.dtype) == ((4, 4), torch.int64)
    assert (batch.rows_B.dtype, batch.is_mixed) == (torch.int64, False)


def test_the_number_of_threads_changes_nothing():
    assert same(batches(num_threads=1), batches(num_threads=5))


def test_beginning_later_continues_the_same_sequence():
    assert same(batches(start_step=2), batches()[2:])


def test_ranks_together_make_the_global_batch():
    whole = batches()
    parts = [batches(rank=rank, world=2) for rank in range(2)]
    for k, batch in enumerate(whole):
        for name in ("images_BCHW", "text_BL", "rows_B"):
            both = torch.cat([getattr(part[k], name) for part in parts])
            assert torch.equal(both, getattr(batch, name))


def test_image_and_caption_are_those_of_the_row():
    pictures = Pictures()
    for batch in batches(pictures, crop_scale=(1.0, 1.0)):
        np.testing.assert_array_equal(batch.text_BL[:, 0], batch.rows_B)
        for image, row in zip(batch.images_BCHW, batch.rows_B, strict=True):
            expected = resize_center(decode(pictures.images[int(row)]), 16)
            np.testing.assert_array_equal(image.permute(1, 2, 0), expected)


def test_each_epoch_crops_anew_and_draws_captions_anew():
    seen = [{}, {}]
    for step, batch in enumerate(batches()):  # three batches are an epoch
        for image, text, row in zip(batch.images_BCHW, batch.text_BL, batch.rows_B, strict=True):
            seen[step // 3][int(row)] = (image, int(text[1]))
    differ = [not torch.equal(seen[0][row][0], seen[1][row][0]) for row in range(N)]
    assert sum(differ) >= N - 2  # so small a picture has few crops; two draws may agree
    assert any(seen[0][row][1] != seen[1][row][1] for row in range(N))
    assert {choice for epoch in seen for _, choice in epoch.values()} == {0, 1, 2}


def test_crops_do_not_depend_on_the_batch_a_row_comes_in():
    by_row = [
        {
            int(row): image
            for batch in batches(sampler=sampler, num_steps=3)
            for image, row in zip(batch.images_BCHW, batch.rows_B, strict=True)
        }
        for sampler in (UniformBatches(N, 4, 0), UniformBatches(N, 4, 1))
    ]
    assert all(torch.equal(by_row[0][row], by_row[1][row]) for row in range(N))


def test_mixed_batches_say_so():
    labels = np.array([0] * 7 + [1] * 5)
    sampler = HomogeneousBatches(labels, 4, 0)
    told = [batch.is_mixed for batch in batches(sampler=sampler)]
    assert told == [sampler.batch(step)[1] for step in range(6)]
    assert sorted(told[:3]) == [False, False, True]


def test_an_error_in_a_thread_reaches_the_consumer():
    with pytest.raises(ValueError, match="undecodable"):
        batches(Pictures(broken=7), num_threads=3)


def test_leaving_early_ends_the_threads():
    loader = iter(
        Loader(
            Pictures(),
            Captions(),
            UniformBatches(N, 4, 0),
            image_size=8,
            text_length=4,
            crop_scale=(1, 1),
            seed=0,
            num_steps=1000,
        )
    )
    next(loader)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    loader.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())
    assert not list(loader)


def test_parts_of_different_samples_are_refused():
    other = Captions()
    other.samples_id = "b"
    with pytest.raises(ConfigError, match="samples a, the tokens of b"):
        Loader(
            Pictures(),
            other,
            UniformBatches(N, 4, 0),
            image_size=8,
            text_length=4,
            crop_scale=(1, 1),
            seed=0,
            num_steps=1,
        )


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="batch_size = 4 cannot be shared by 3"):
        batches(world=3)
