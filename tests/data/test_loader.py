"""Laws of the loader, on shards and tokens of made-up pictures, through the real stages."""

import gc
import io
import json
import shutil
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from indexes import make_index
from pictures import jpeg
from PIL import Image
from reduced import text_reduction

from clipgraft.config import ConfigError
from clipgraft.data.corpus import write_tokens
from clipgraft.data.draws import draw_bits
from clipgraft.data.loader import Loader
from clipgraft.data.sampler import HomogeneousBatches, UniformBatches, Visits
from clipgraft.data.shards import Shards, write_shards
from clipgraft.data.tokens import Tokenizer, Tokens
from clipgraft.settings import ShardJob
from clipgraft.training_data import Data

N = 12
SETTINGS = {
    "image_size": 16,
    "text_length": 6,
    "crop_scale": (0.5, 1.0),
    "seed": 3,
    "num_steps": 6,
}
CAPTIONS = [[f"picture {row} version {k}" for k in "abc"] for row in range(N)]


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def folders(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("data")
    index = make_index(base, [jpeg(24 + i, 20, i) for i in range(N)], CAPTIONS)
    (base / "shard").mkdir()
    settings = ShardJob(image_size=16, samples_per_tar=5, format=request.param)
    write_shards(settings, index, base / "shard", 1)
    return index, base / "shard"


@pytest.fixture(scope="module")
def batches(folders):
    index, shard = folders

    def load(sampler=None, shard=shard, **changes):
        sampler = sampler or UniformBatches(N, 4, 0)
        settings = SETTINGS | changes
        return list(Loader(Shards.open(shard), Tokens.open(index), sampler, **settings))

    return load


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(ours, theirs, strict=True)
        for name in ("images_BCHW", "text_BL", "rows_B", "uniform_BK", "image_bits_B")
        if getattr(a, name) is not None
    )


def test_batches_have_the_documented_shapes_and_types(batches):
    batch = batches(augment=True)[0]
    assert (batch.images_BCHW.shape, batch.images_BCHW.dtype) == ((4, 3, 16, 16), torch.uint8)
    assert batch.images_BCHW.permute(0, 2, 3, 1).is_contiguous()
    assert (batch.text_BL.shape, batch.text_BL.dtype) == ((4, 6), torch.int64)
    assert (batch.rows_B.dtype, batch.group_B) == (torch.int64, None)
    assert (batch.uniform_BK.shape, batch.uniform_BK.dtype) == ((4, 7), torch.float32)
    assert batches()[0].uniform_BK is None and batch.image_bits_B is None
    bits = batches(drops_patches=True)[0].image_bits_B
    assert (bits.shape, bits.dtype) == ((4,), torch.int64)


def test_the_number_of_threads_changes_nothing(batches):
    both = {"augment": True, "drops_patches": True}
    assert same(batches(num_threads=1, **both), batches(num_threads=5, **both))


def test_beginning_later_continues_the_same_sequence(batches):
    assert same(batches(start_step=2), batches()[2:])


@pytest.mark.parametrize("asked", ["augment", "drops_patches"])
def test_what_is_drawn_besides_leaves_crops_and_captions_as_they_are(batches, asked):
    for plain, more in zip(batches(), batches(**{asked: True}), strict=True):
        assert torch.equal(plain.images_BCHW, more.images_BCHW)
        assert torch.equal(plain.text_BL, more.text_BL)


def test_the_words_for_patches_do_not_depend_on_augmentation_and_differ_between_visits(batches):
    plain = batches(drops_patches=True)
    augmented = batches(drops_patches=True, augment=True)
    assert same(plain, batches(drops_patches=True))
    bits = torch.cat([batch.image_bits_B for batch in plain])
    assert torch.equal(bits, torch.cat([batch.image_bits_B for batch in augmented]))
    assert len(bits.unique()) == 2 * N  # two epochs
    for step, batch in enumerate(plain):
        others = draw_bits(SETTINGS["seed"], batch.rows_B.numpy(), step // 3, 13).view(np.int64)
        assert not np.isin(batch.image_bits_B, others).any()  # crops, captions, augmentation


@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_make_the_global_batch(batches, world):
    both = {"augment": True, "drops_patches": True}
    whole = batches(**both)
    parts = [batches(rank=rank, world=world, **both) for rank in range(world)]
    for k, batch in enumerate(whole):
        for name in ("images_BCHW", "text_BL", "rows_B", "uniform_BK", "image_bits_B"):
            assert torch.equal(
                torch.cat([getattr(part[k], name) for part in parts]), getattr(batch, name)
            )


def test_an_epoch_over_all_processes_shows_each_sample_once(batches):
    shown = [
        int(row)
        for rank in range(2)
        for batch in batches(rank=rank, world=2, num_steps=3)
        for row in batch.rows_B
    ]
    assert sorted(shown) == list(range(N))


def test_the_image_is_that_of_the_row(batches):
    for batch in batches(crop_scale=(1.0, 1.0)):
        for image, row in zip(batch.images_BCHW, batch.rows_B, strict=True):
            left = (4 + int(row)) / 2
            whole = Image.open(io.BytesIO(jpeg(24 + int(row), 20, int(row))))
            theirs = whole.resize((16, 16), Image.Resampling.BICUBIC, (left, 0, left + 20, 20))
            # Of another row it would be about 60.
            assert np.abs(image.permute(1, 2, 0).numpy() - np.asarray(theirs, int)).mean() < 10


def test_the_caption_is_one_of_the_row(batches, folders):
    tokenizer = Tokenizer(Tokens.open(folders[0]).tokenizer)
    known = [{tuple(ids) for ids in tokenizer.encode_batch(each, 6).tolist()} for each in CAPTIONS]
    seen = [set() for _ in range(N)]
    for batch in batches(num_steps=60):
        for text, row in zip(batch.text_BL.tolist(), batch.rows_B.tolist(), strict=True):
            seen[row].add(tuple(text))
    assert seen == known


def test_captions_are_drawn_by_kind_and_reduced_as_asked(folders):
    index, shard = folders
    tokens, rows = Tokens.open(index), np.arange(N)

    def load(**changes):
        settings = SETTINGS | {"text_length": 4} | changes
        return list(Loader(Shards.open(shard), tokens, UniformBatches(N, 4, 0), **settings))

    with pytest.raises(ConfigError, match="no captions of kind `long`, only caption"):
        load(captions={"long": 1.0})
    truncated = {tuple(ids) for ids in tokens.encode(np.arange(3 * N), 4).tolist()}
    kept = {
        how: {
            tuple(ids)
            for batch in load(text_reduction=text_reduction(how))
            for ids in batch.text_BL.tolist()
        }
        for how in ("truncate", "random")
    }
    assert kept["truncate"] <= truncated
    assert len(kept["random"] - truncated) > len(rows) / 2


@pytest.fixture(scope="module")
def kinds_of_captions(folders, tmp_path_factory):
    """Tokens of the same samples: two long captions and a short one each."""
    folder = tmp_path_factory.mktemp("kinds")
    texts = [[f"long {row} a. More here", f"long {row} b", f"brief {row}"] for row in range(N)]
    kinds = [["long", "long", "caption"]] * N
    samples_id = Tokens.open(folders[0]).samples_id
    write_tokens(texts, kinds, "full", "textblob", samples_id, folder / "tokens")
    return Tokens.open(folder), texts


def short_batches(folders, tokens, **changes):
    settings = SETTINGS | {"text_length": 9, "captions": {"long": 1.0}, **changes}
    return list(Loader(Shards.open(folders[1]), tokens, UniformBatches(N, 4, 0), **settings))


def test_the_second_caption_is_of_the_kind_or_how_the_drawn_one_begins(folders, kinds_of_captions):
    tokens, texts = kinds_of_captions
    clip = Tokenizer(tokens.tokenizer)
    for batch in short_batches(folders, tokens, short_captions="caption"):
        brief = [texts[row][2] for row in batch.rows_B.tolist()]
        np.testing.assert_array_equal(batch.short_BL, clip.encode_batch(brief, 9))
    seen = set()
    for batch in short_batches(folders, tokens, short_captions="first_sentence"):
        rows = batch.rows_B.tolist()
        places = (batch.captions_B - 3 * batch.rows_B).tolist()
        drawn = [texts[row][place] for row, place in zip(rows, places, strict=True)]
        np.testing.assert_array_equal(batch.text_BL, clip.encode_batch(drawn, 9))
        first = [text.split(". ")[0] for text in drawn]
        np.testing.assert_array_equal(batch.short_BL, clip.encode_batch(first, 9))
        seen |= set(places)
    assert seen == {0, 1}


def test_a_second_caption_leaves_all_else_as_it_is(folders, kinds_of_captions):
    tokens, _ = kinds_of_captions
    both = {"augment": True, "drops_patches": True}
    plain = short_batches(folders, tokens, **both)
    assert all(batch.short_BL is None for batch in plain)
    for kind in ("caption", "long", "first_sentence"):
        assert same(plain, short_batches(folders, tokens, short_captions=kind, **both))


def test_the_second_caption_is_drawn_by_numbers_of_its_own(folders, kinds_of_captions):
    """Neither those of the drawn caption, nor the word that says which patches are kept."""
    tokens, _ = kinds_of_captions
    changes = {"short_captions": "long", "drops_patches": True, "num_steps": 30}
    drawn, short, patches = [], [], []
    for batch in short_batches(folders, tokens, **changes):
        second_BL = tokens.encode(3 * batch.rows_B.numpy() + 1, 9)
        drawn += (batch.text_BL.numpy() == second_BL).all(1).tolist()
        short += (batch.short_BL.numpy() == second_BL).all(1).tolist()
        patches += (batch.image_bits_B < 0).tolist()  # the first bit: a uniform number above half
    for others in (drawn, patches):
        agree = np.mean(np.array(short) == np.array(others))
        assert 0.3 < agree < 0.7
    assert 0.3 < np.mean(short) < 0.7


def test_a_kind_of_second_captions_that_samples_lack_is_named(folders, kinds_of_captions):
    message = r"short_captions\.kind = brief: .*only caption, long.*first_sentence"
    with pytest.raises(ConfigError, match=message):
        short_batches(folders, kinds_of_captions[0], short_captions="brief")


def test_each_epoch_crops_anew(batches):
    seen = [{}, {}]
    for step, batch in enumerate(batches()):  # three batches are an epoch
        for image, row in zip(batch.images_BCHW, batch.rows_B, strict=True):
            seen[step // 3][int(row)] = image
    # So small a picture has few crops; two draws may agree.
    assert sum(not torch.equal(seen[0][row], seen[1][row]) for row in range(N)) >= N - 2


def test_visits_of_a_row_in_one_epoch_crop_and_draw_anew(batches):
    visits = Visits(N, 0, np.zeros(N, int), np.array([3.0]))
    crops = [{} for _ in range(N)]
    sampler = UniformBatches(N, 4, 0, visits=visits)
    for batch in batches(sampler=sampler, num_steps=9, augment=True):
        for image, row, uniform in zip(
            batch.images_BCHW, batch.rows_B, batch.uniform_BK, strict=True
        ):
            crops[int(row)][tuple(uniform.tolist())] = image.numpy().tobytes()
    assert [len(each) for each in crops] == [3] * N
    assert np.mean([len(set(each.values())) for each in crops]) > 2.5


def test_crops_do_not_depend_on_the_batch_a_row_comes_in(batches):
    by_row = [
        {
            int(row): image
            for batch in batches(sampler=sampler, num_steps=sampler.num_batches)
            for image, row in zip(batch.images_BCHW, batch.rows_B, strict=True)
        }
        for sampler in (UniformBatches(N, 4, 0), UniformBatches(N, 6, 1))
    ]
    assert all(torch.equal(by_row[0][row], by_row[1][row]) for row in range(N))


def test_the_numbers_of_augmentation_are_uniform_and_below_one(batches):
    uniform = torch.cat([batch.uniform_BK for batch in batches(num_steps=300, augment=True)])
    assert 0 <= uniform.min() < 0.01 and 0.99 < uniform.max() < 1
    assert ((uniform.mean(0) - 0.5).abs() < 0.05).all()
    assert torch.corrcoef(uniform.T).fill_diagonal_(0).abs().max() < 0.1


@pytest.mark.parametrize("rank", [0, 1])
def test_mixed_batches_bring_the_labels_of_their_own_rows(batches, rank):
    labels = np.array([0] * 7 + [1] * 5, np.int32)
    told = list(batches(sampler=HomogeneousBatches(labels, 4, 0), rank=rank, world=2))
    mixed = [batch for batch in told if batch.group_B is not None]
    assert (len(told), len(mixed)) == (6, 2)
    for batch in mixed:
        assert batch.group_B.dtype == torch.int64
        assert batch.group_B.tolist() == labels[batch.rows_B].tolist()


def test_an_error_in_a_thread_reaches_the_consumer_and_names_the_row(batches, folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "shard")
    place = np.load(tmp_path / "shard/offsets.npy")[7]
    raw = Shards.open(folders[1]).format == "raw"
    path = tmp_path / "shard" / ("images.npy" if raw else f"{place['file']:06d}.tar")
    with path.open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(b"rubbish" * 20)
    with pytest.raises(ConfigError, match=f"{path.name}: image of row 7: it is damaged"):
        batches(shard=tmp_path / "shard", num_threads=3)


def test_leaving_early_ends_the_threads(folders):
    index, shard = folders
    settings = SETTINGS | {"num_steps": 1000}
    sampler = UniformBatches(N, 4, 0)
    loader = iter(Loader(Shards.open(shard), Tokens.open(index), sampler, **settings))
    next(loader)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    loader.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())
    assert not list(loader)


def test_parts_of_different_samples_are_refused(folders, tmp_path):
    index, shard = folders
    assert len(Data.open(index, shard).shards) == N
    shutil.copytree(index, tmp_path / "index")
    about = tmp_path / "index/tokens/tokens.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "samples_id": "b"}))
    with pytest.raises(ConfigError, match=r"holds samples .* holds b: .*Hint"):
        Data.open(tmp_path / "index", shard)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing to pin for")
def test_batches_for_a_gpu_are_pinned(batches):
    batch = batches(pin_memory=True, augment=True)[0]
    assert batch.images_BCHW.is_pinned() and batch.text_BL.is_pinned()
    assert batch.uniform_BK.is_pinned()


# --- memory ---------------------------------------------------------------------------------------------------


def test_five_epochs_leave_no_python_object_behind(folders):
    index, shard = folders
    sampler = UniformBatches(N, 4, 0)
    settings = SETTINGS | {"num_steps": 3 * 60, "num_threads": 2, "augment": True}
    loader = Loader(Shards.open(shard), Tokens.open(index), sampler, **settings)
    held = []
    tracemalloc.start()
    try:
        for step, batch in enumerate(loader):
            if step % 30 == 20:
                del batch
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # One batch of four pictures of 16 x 16 is 3 KB; a leaked one per step would be 90 KB here.
    assert held[-1] - held[1] < 20_000


FIVE_EPOCHS = """
import sys, psutil
from pathlib import Path
from clipgraft.data.draws import draw_bits
from clipgraft.data.loader import Loader
from clipgraft.data.sampler import UniformBatches
from clipgraft.data.shards import Shards
from clipgraft.data.tokens import Tokens
index, shard = map(Path, sys.argv[1:])
sampler = UniformBatches(12, 12, 0)
loader = Loader(Shards.open(shard), Tokens.open(index), sampler, image_size=224, text_length=77,
                crop_scale=(0.5, 1), seed=0, num_threads=2, num_steps=300, augment=True)
process = psutil.Process()
for step, batch in enumerate(loader):
    if step % 60 == 59:
        print(process.memory_info().rss)
"""


def test_resident_memory_is_flat_over_epochs(folders):
    command = [sys.executable, "-c", FIVE_EPOCHS, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    resident = [int(line) for line in done.stdout.split()]
    assert len(resident) == 5
    # 240 batches of 1.8 MB each: keeping one in ten would be 43 MB.
    assert resident[-1] < resident[0] * 1.02 + 20e6
