"""Laws of shards. Oracles: tarfile, webdataset, Pillow."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from pictures import encoded, jpeg, write_tar
from PIL import Image

from clipgraft.config import ConfigError
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.shards import Shards, write_shards
from clipgraft.settings import IndexJob, ShardJob, TarSource

SETTINGS = ShardJob(image_size=16, oversize=1.25, samples_per_tar=2)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Five samples: small, wide, tall, PNG, small."""
    base = tmp_path_factory.mktemp("data")
    images = [jpeg(20, 20, 0), jpeg(80, 40, 1), jpeg(40, 80, 2), b"", jpeg(17, 30, 4)]
    files = {}
    for i, image in enumerate(images):
        files[f"{i}.png" if not image else f"{i}.jpg"] = image or encoded(
            Image.new("RGB", (30, 30), "red"), "PNG"
        )
        files[f"{i}.txt"] = f"picture {i} é"
    write_tar(base / "in.tar", files)
    for stage in ("download", "index"):
        (base / stage).mkdir()
    download(TarSource(kind="tars", tars=str(base / "in.tar")), base / "download", 1)
    build_index(IndexJob(tokenize=True), base / "download", base / "index", 1)
    return base / "index"


@pytest.fixture(scope="module")
def shards(index, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    write_shards(SETTINGS, index, out, 1)
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
    assert about == [{"captions": [f"picture {i} é"], "uid": str(i)} for i in range(5)]


def test_tars_hold_as_many_samples_as_asked(shards):
    counts = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            counts.append(len(tar.getnames()) // 2)
    assert counts == [2, 2, 1]


def test_neither_time_nor_owner_nor_number_of_workers_shows(index, shards, tmp_path):
    write_shards(SETTINGS, index, tmp_path, 2)
    for name in ("000000.tar", "000001.tar", "000002.tar", "offsets.npy", "shard.json"):
        assert (tmp_path / name).read_bytes() == (shards / name).read_bytes()
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_shards_carry_the_samples_they_belong_to(index, shards):
    assert (
        Shards.open(shards).samples_id
        == json.loads((index / "samples.json").read_text())["samples_id"]
    )


def test_a_tar_that_was_cut_is_noticed_on_opening(index, tmp_path):
    write_shards(SETTINGS, index, tmp_path, 1)
    last = tmp_path / "000002.tar"
    last.write_bytes(last.read_bytes()[:600])
    with pytest.raises(ConfigError, match=r"000002\.tar is too short"):
        Shards.open(tmp_path)
    with pytest.raises(ConfigError, match="holds no shards"):
        Shards.open(tmp_path / "nothing")


def test_offsets_are_int64_triples(shards):
    places = np.load(shards / "offsets.npy")
    assert (places.dtype, places.shape) == (np.int64, (5, 3))
