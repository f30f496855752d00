"""Laws of shards. Oracles: tarfile, webdataset, Pillow."""

import io
import json
import os
import resource
import subprocess
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
import webdataset
from indexes import make_index
from pictures import encoded, jpeg
from PIL import Image

from clipgraft.config import ConfigError
from clipgraft.data.samples import Samples
from clipgraft.data.shards import Shards, write_shards
from clipgraft.settings import ShardJob

SETTINGS = ShardJob(image_size=16, oversize=1.25, samples_per_tar=2)
RAW = ShardJob(image_size=16, oversize=1.25, format="raw")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Five samples: small, wide, tall, PNG, small."""
    red = encoded(Image.new("RGB", (30, 30), "red"), "PNG")
    images = [jpeg(20, 20, 0), jpeg(80, 40, 1), jpeg(40, 80, 2), red, jpeg(17, 30, 4)]
    return make_index(
        tmp_path_factory.mktemp("data"), images, [[f"picture {i} é"] for i in range(5)]
    )


@pytest.fixture(scope="module")
def shards(index, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    write_shards(SETTINGS, index, out, 1)
    return out


@pytest.fixture(scope="module")
def raw(index, tmp_path_factory):
    out = tmp_path_factory.mktemp("raw")
    write_shards(RAW, index, out, 1)
    return out


def test_row_i_is_the_image_of_sample_i_at_the_size_of_the_phase(shards):
    sizes = [Image.open(io.BytesIO(Shards.open(shards).jpeg(row))).size for row in range(5)]
    assert sizes == [(20, 20), (40, 20), (20, 40), (20, 20), (17, 30)]


def test_small_jpegs_are_copied_byte_for_byte(shards):
    stored = Shards.open(shards)
    assert (stored.jpeg(0), stored.jpeg(4)) == (jpeg(20, 20, 0), jpeg(17, 30, 4))


@pytest.mark.filterwarnings(  # webdataset leaves its files to the garbage collector
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_webdataset_reads_the_same_samples_in_row_order(shards):
    tars = sorted(str(path) for path in shards.glob("*.tar"))
    theirs = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    stored = Shards.open(shards)
    assert [sample["__key__"] for sample in theirs] == [f"{row:09d}" for row in range(len(stored))]
    assert [sample["jpg"] for sample in theirs] == [stored.jpeg(row) for row in range(len(stored))]
    about = [json.loads(sample["json"]) for sample in theirs]
    assert about == [{"captions": [f"picture {i} é"], "uid": f"{i:05d}"} for i in range(5)]


def test_tars_hold_as_many_samples_as_asked(shards):
    counts = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            counts.append(len(tar.getnames()) // 2)
    assert counts == [2, 2, 1]


def test_neither_time_nor_owner_shows(shards):
    with tarfile.open(shards / "000000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_the_number_of_workers_does_not_show(tmp_path, form):
    images = [jpeg(24, 20 + i % 7, i) for i in range(1030)]  # fewer are not worth a process
    index = make_index(tmp_path, images, [[f"picture {i}"] for i in range(len(images))])
    settings = ShardJob(image_size=16, samples_per_tar=400, format=form)
    for threads in (1, 2):
        (tmp_path / str(threads)).mkdir()
        write_shards(settings, index, tmp_path / str(threads), threads)
    names = {"offsets.npy", "shard.json"}
    names |= {"images.npy"} if form == "raw" else {f"{i:06d}.tar" for i in range(3)}
    assert {path.name for path in (tmp_path / "1").iterdir()} == names
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_shards_carry_the_samples_they_belong_to(index, shards):
    assert (
        Shards.open(shards).samples_id
        == json.loads((index / "samples.json").read_text())["samples_id"]
    )


@pytest.mark.parametrize(
    ("settings", "names"), [(SETTINGS, ["000000.tar", "000002.tar"]), (RAW, ["images.npy"])]
)
def test_a_file_that_was_cut_or_lost_is_noticed_on_opening(index, tmp_path, settings, names):
    for name in names:
        write_shards(settings, index, tmp_path, 1)
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:600])
        with pytest.raises(ConfigError, match=rf"{name} has 600 bytes instead of .*Hint"):
            Shards.open(tmp_path)
        path.unlink()
        with pytest.raises(ConfigError, match=rf"{name} is missing"):
            Shards.open(tmp_path)
    with pytest.raises(ConfigError, match="holds no shards"):
        Shards.open(tmp_path / "nothing")


def test_offsets_say_where_an_image_is_in_its_tar(shards):
    for row, place in enumerate(np.load(shards / "offsets.npy")):
        with tarfile.open(shards / f"{place['file']:06d}.tar") as tar:
            member = tar.getmember(f"{row:09d}.jpg")
            assert (member.offset_data, member.size) == (place["offset"], place["length"])
            size = Image.open(tar.extractfile(member)).size
            assert size == (place["width"], place["height"])


def test_plain_tar_reads_every_image(shards):
    stored = Shards.open(shards)
    for row in range(5):
        tar, name = shards / f"{row // 2:06d}.tar", f"{row:09d}.jpg"
        done = subprocess.run(["tar", "-xOf", tar, name], capture_output=True, check=True)
        assert done.stdout == stored.jpeg(row)
        listed = subprocess.run(["tar", "-tf", tar], capture_output=True, check=True, text=True)
        assert name in listed.stdout.split()


def test_shards_that_are_dropped_close_their_files(shards):
    before = len(os.listdir("/dev/fd"))
    stored = Shards.open(shards)
    assert len(os.listdir("/dev/fd")) >= before + 3
    del stored
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("size", [(512, 384), (1023, 777), (333, 501)])
def test_large_originals_are_halved_while_decoding_and_cut_in_the_same_place(tmp_path, size):
    data = jpeg(*size)
    index = make_index(tmp_path, [data], [["picture"]])
    (tmp_path / "shard").mkdir()
    write_shards(ShardJob(image_size=64, oversize=20), index, tmp_path / "shard", 1)
    stored = Shards.open(tmp_path / "shard")
    assert stored.jpeg(0) == data
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for side in (24, 64, 150):
        for box in ([0, 0, 1, 1], [0.3, 0.1, 0.8, 0.7], [0.5, 0.5, 1, 1]):
            out = np.empty((1, side, side, 3), np.uint8)
            stored.squares(np.array([0]), np.array([box], float), out)
            part = tuple(np.array(box) * np.tile(size, 2))
            theirs = image.resize((side, side), Image.Resampling.BICUBIC, box=part)
            # A 24th of the part aside, the difference is 5 and more.
            assert np.abs(out[0] - np.asarray(theirs, int)).mean() < 3


# --- raw ------------------------------------------------------------------------------------------------------


def test_raw_is_one_array_of_squares_in_row_order(raw, index):
    array = np.load(raw / "images.npy", mmap_mode="r")
    assert (array.shape, array.dtype) == ((5, 20, 20, 3), np.uint8)
    for row, name in enumerate([(20, 20), (80, 40), (40, 80), (30, 30), (17, 30)]):
        image = Samples.open(index).image(row)
        assert image.size == name
        theirs = np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC), int)
        assert np.abs(array[row] - theirs).max() < 12


def test_both_formats_cut_out_the_same_part_of_a_picture(shards, raw, index):
    rows = np.array([1, 2, 3, 4, 1])
    box_B4 = np.array(
        [[0.25, 0, 0.75, 1], [0, 0.1, 1, 0.6], [0, 0, 1, 1], [0.1, 0.2, 0.9, 0.8], [0.5, 0, 1, 0.9]]
    )
    for folder in (shards, raw):
        stored = Shards.open(folder)
        assert [each.tolist() for each in stored.sizes(np.array([0, 3]))] == (
            [[20, 20], [20, 20]] if folder == shards else [[20, 30], [20, 30]]
        )
        out = np.empty((5, 16, 16, 3), np.uint8)
        stored.squares(rows, box_B4, out)
        for row, box, ours in zip(rows, box_B4, out, strict=True):
            image = Samples.open(index).image(row)
            part = tuple(box * np.tile(image.size, 2))
            theirs = image.resize((16, 16), Image.Resampling.BICUBIC, box=part)
            # JPEG keeps half of the colour resolution; another part would differ by 30 and more.
            assert np.abs(ours - np.asarray(theirs, int)).mean() < 9


# --- size -----------------------------------------------------------------------------------------------------


def many(folder, num, per_file):
    """A shard folder of `num` rows whose tars are all links to one, the files being read and not made here."""
    one = jpeg(20, 20, 0)
    (folder / "one").write_bytes(one)
    num_files = -(-num // per_file)
    for number in range(num_files):
        (folder / f"{number:06d}.tar").symlink_to(folder / "one")
    names = ("length", "width", "height", "crc")
    dtype = np.dtype([("file", "<u4"), ("offset", "<u8"), *((name, "<u4") for name in names)])
    places = np.zeros(num, dtype)
    places["crc"] = zlib.crc32(np.array([20, 20], "<u4").tobytes() + one)
    places["file"] = np.arange(num) // per_file
    places["length"], places["width"], places["height"] = len(one), 20, 20
    np.save(folder / "offsets.npy", places)
    names = {f"{number:06d}.tar": len(one) for number in range(num_files)}
    about = {"samples_id": "a", "short_side": 20, "format": "jpeg", "file_bytes": names}
    (folder / "shard.json").write_text(json.dumps(about))
    return one


def test_ten_million_rows_are_opened_without_being_read(tmp_path):
    one = many(tmp_path, 10_000_000, 10_000_000)
    tracemalloc.start()
    try:
        stored = Shards.open(tmp_path)
        width_B, _ = stored.sizes(np.random.default_rng(0).integers(0, 10_000_000, 4096))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(stored) == 10_000_000 and set(width_B) == {20}
    assert stored.jpeg(9_999_999) == one
    assert peak < 2e6  # of 280 MB


def test_more_tars_than_files_a_process_may_usually_open(tmp_path):
    one = many(tmp_path, 3000, 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] < 4000:
        pytest.skip(f"the system allows {limits[1]} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        stored = Shards.open(tmp_path)
        assert stored.jpeg(2999) == one
        del stored
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
