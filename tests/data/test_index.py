"""Laws of the index: what is accepted, what is rejected and why, and that rows are identities."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pictures import encoded, jpeg, write_tar
from PIL import Image

from clipgraft import footprint
from clipgraft.config import ConfigError
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.sampler import Visits
from clipgraft.data.samples import Captions, Samples, picture_sizes, read_columns
from clipgraft.data.shards import write_shards
from clipgraft.data.tars import read_range
from clipgraft.data.tokens import Tokens
from clipgraft.settings import IndexJob, ShardJob
from clipgraft.sources import FolderSource, TarSource

ROOT = Path(__file__).resolve().parents[2]
TRAIN = IndexJob(tokenize=True)
TEST = IndexJob(tokenize=False)

BAD = {
    "empty": (b"", "undecodable"),
    "html": (b"<html>not found</html>", "undecodable"),
    "cut": (jpeg()[:-300], "truncated"),
    "tiny": (jpeg(8, 40), "too small"),
    "banner": (jpeg(200, 20), "aspect ratio"),
    "huge": (encoded(Image.new("1", (1200, 1200)), "PNG"), "too many pixels"),
}


def indexed(base: Path, files, settings=TRAIN, classes=None, threads=1) -> Path:
    """Index of one tar, or of several by name."""
    tars = files if isinstance(next(iter(files.values())), dict) else {"in": files}
    (base / "tars").mkdir()
    for name, members in tars.items():
        write_tar(base / "tars" / f"{name}.tar", members)
    if classes:
        (base / "classes.txt").write_text("\n".join(classes))
    for stage in ("download", "index"):
        (base / stage).mkdir()
    given = str(base / "classes.txt") if classes else None
    source = TarSource(kind="tars", tars=str(base / "tars" / "*.tar"), classes=given)
    download(source, base / "download", threads)
    build_index(settings, base / "download", base / "index", threads)
    return base / "index"


def rejects(index: Path) -> dict[str, str]:
    rows = pq.read_table(index / "rejects.parquet").to_pylist()
    assert all(row["detail"] for row in rows)
    return {row["uid"]: row["reason"] for row in rows}


def test_every_bad_image_has_its_reason_and_its_neighbours_are_kept(tmp_path):
    files = {}
    for seed, (name, (image, _)) in enumerate(BAD.items()):
        files |= {f"{name}-before.jpg": jpeg(seed=seed), f"{name}-before.txt": "good"}
        files |= {f"{name}.jpg": image, f"{name}.txt": "bad"}
    files |= {"alone.txt": "no picture"}
    index = indexed(tmp_path, files, IndexJob(tokenize=True, max_megapixels=1))
    assert rejects(index) == {name: reason for name, (_, reason) in BAD.items()} | {
        "alone": "no image"
    }
    assert Samples.open(index).uids() == sorted(f"{name}-before" for name in BAD)


def test_captions_come_from_the_best_place_and_are_never_empty(tmp_path):
    files = {
        "a.jpg": jpeg(seed=0), "a.txt": "text", "a.json": {"captions": ["one", " ", "two\n lines"], "caption": "no"},
        "b.jpg": jpeg(seed=1), "b.txt": "text", "b.json": {"caption": "json"},
        "c.jpg": jpeg(seed=2), "c.json": {"caption": "json"},
        "d.jpg": jpeg(seed=3), "d.json": "{broken", "d.txt": "text",
        "e.jpg": jpeg(seed=4), "e.txt": " \n",
        "f.jpg": jpeg(),
        "g.jpg": jpeg(seed=6), "g.json": {"captions": ["", None]},
    }  # fmt: skip
    index = indexed(tmp_path, files)
    samples = Samples.open(index)
    assert dict(zip(samples.uids(), samples.all_captions(), strict=True)) == {
        "a": ["one", "two lines"],
        "b": ["text"],
        "c": ["json"],
        "d": ["text"],
    }
    assert rejects(index) == {"e": "empty caption", "f": "no caption", "g": "no caption"}


def copies() -> dict:
    """Three pictures, and copies of the first: the very file, another format, another size."""
    first = jpeg(80, 60, seed=1)
    picture = Image.open(io.BytesIO(first))
    images = {
        "a": jpeg(80, 60, seed=2),
        "b": first,
        "c": encoded(picture, "PNG"),
        "d": encoded(picture.resize((60, 45)), "PNG"),
        "e": jpeg(80, 60, seed=3),
        "f": first,
    }
    files = {}
    for uid, image in images.items():
        files |= {f"{uid}.jpg": image, f"{uid}.txt": f"caption of {uid}"}
    return files


def told(index: Path) -> dict[str, tuple[str, str]]:
    rows = pq.read_table(index / "rejects.parquet").to_pylist()
    return {row["uid"]: (row["reason"], row["detail"]) for row in rows}


def test_copies_in_a_training_set_name_the_first_one(tmp_path):
    index = indexed(tmp_path, copies())
    assert Samples.open(index).uids() == ["a", "b", "d", "e"]
    assert told(index) == {
        uid: ("duplicate", "the pixels of b, which takes 1 caption") for uid in "cf"
    }


def test_a_copy_leaves_its_captions_to_the_first_one_of_each_kind_once(tmp_path):
    image, other = jpeg(80, 60, seed=1), jpeg(80, 60, seed=2)
    captions = {"a": ["x"], "b": ["x", "y"], "c": ["z", "y"], "d": ["y"], "e": ["alone"]}
    files = {}
    for uid, said in captions.items():
        files[f"{uid}.jpg"] = other if uid == "e" else image
        files[f"{uid}.json"] = json.dumps({"captions": said})
    index = indexed(tmp_path, files)
    samples = Samples.open(index)
    assert samples.uids() == ["a", "e"]
    assert samples.all_captions() == [["x", "y", "z"], ["alone"]]
    kinds = pq.read_table(index / "samples.parquet")["caption_kinds"].to_pylist()
    assert list(map(len, kinds)) == [3, 1] and len({kind for row in kinds for kind in row}) == 1
    assert {uid: detail for uid, (_, detail) in told(index).items()} == {
        "b": "the pixels of a, which takes 1 caption",
        "c": "the pixels of a, which takes 1 caption",
        "d": "the pixels of a, and its captions",
    }


def test_a_picture_that_is_everywhere_takes_so_many_captions_and_no_more(tmp_path):
    image = jpeg(80, 60, seed=1)
    files = {}
    for number in range(80):
        files |= {f"{number:03d}.jpg": image, f"{number:03d}.txt": f"page {number}"}
    index = indexed(tmp_path, files)
    (captions,) = Samples.open(index).all_captions()
    assert captions == [f"page {number}" for number in range(65)]
    details = [detail for _, detail in told(index).values()]
    assert sum("takes 1 caption" in detail for detail in details) == 64
    assert sum("takes no more" in detail for detail in details) == 15


def test_near_copies_go_only_if_that_is_asked_for(tmp_path):
    index = indexed(tmp_path, copies(), IndexJob(tokenize=True, near_duplicates=8))
    assert Samples.open(index).uids() == ["a", "b", "e"]
    reason, detail = told(index)["d"]
    assert reason == "near duplicate" and detail.endswith(" of 64 bits differ from b")
    assert rejects(index) == {"c": "duplicate", "d": "near duplicate", "f": "duplicate"}


@pytest.mark.parametrize(
    "settings",
    [IndexJob(tokenize=False, near_duplicates=8), IndexJob(tokenize=True, drop_duplicates=False)],
)
def test_copies_stay_in_evaluation_sets_and_where_they_are_wanted(tmp_path, settings):
    index = indexed(tmp_path, copies(), settings)
    assert Samples.open(index).uids() == list("abcdef")
    hashes = pq.read_table(index / "samples.parquet")["pixel_hash"].to_pylist()
    assert hashes[1] == hashes[2] == hashes[5] and len(set(hashes)) == 4


def test_images_of_an_evaluation_set_are_kept_out_of_training(tmp_path):
    first = jpeg(80, 60, seed=1)
    (tmp_path / "eval").mkdir()
    evaluation = indexed(tmp_path / "eval", {"x.jpg": first, "x.txt": "shown"}, TEST)
    indexed(tmp_path, copies())
    for bits, expected in ((None, ["a", "d", "e"]), (8, ["a", "e"])):
        out = tmp_path / f"index-{bits}"
        out.mkdir()
        settings = IndexJob(tokenize=True, near_duplicates=bits, not_in=["flickr"])
        build_index(settings, tmp_path / "download", out, 1, {"flickr": evaluation})
        assert Samples.open(out).uids() == expected
        assert {told(out)[uid] for uid in "bcf"} == {("in flickr", "the pixels of x")}
    assert told(out)["d"][0] == "near one in flickr" and told(out)["d"][1].endswith("from x")


def test_the_script_hands_evaluation_sets_over(tmp_path):
    def run(stage: str, name: str, settings: dict, **inputs: str) -> Path:
        command = [sys.executable, ROOT / f"scripts/{stage}.py", "--threads", "1"]
        command += ["--settings", json.dumps(settings), "--out", tmp_path / name]
        for slot, folder in inputs.items():
            command += ["--input", f"{slot}={tmp_path / folder / 'manifest.json'}"]
        subprocess.run(command, check=True, capture_output=True)
        return tmp_path / name

    write_tar(tmp_path / "eval.tar", {"x.jpg": jpeg(80, 60, seed=1), "x.txt": "shown"})
    write_tar(tmp_path / "train.tar", copies())
    for name in ("eval", "train"):
        source = {"kind": "tars", "tars": str(tmp_path / f"{name}.tar")}
        run("download", f"download_{name}", {"source": source})
    run("index", "index_eval", {"tokenize": False}, download="download_eval")
    settings = {"tokenize": True, "not_in": ["eval"]}
    index = run("index", "index", settings, download="download_train", not_in_eval="index_eval")
    assert rejects(index) == dict.fromkeys("bcf", "in eval")


def test_an_evaluation_set_without_hashes_is_refused(tmp_path):
    indexed(tmp_path, {"a.jpg": jpeg(), "a.txt": "a"})
    pq.write_table(
        pq.read_table(tmp_path / "index/samples.parquet").drop(["pixel_hash"]),
        tmp_path / "index/samples.parquet",
    )
    with pytest.raises(ConfigError, match=r"not_in: .*no index with hashes.*Hint"):
        build_index(TRAIN, tmp_path / "download", tmp_path, 1, {"old": tmp_path / "index"})


def test_rejects_lead_back_to_their_images(tmp_path):
    image = jpeg(8, 40)
    files = {"a.jpg": jpeg(), "a.txt": "a", "b.txt": "small", "b.jpg": image, "c.txt": "no picture"}
    index = indexed(tmp_path, files)
    small, lost = pq.read_table(index / "rejects.parquet").to_pylist()
    assert read_range(Path(small["tar"]), small["image_offset"], small["image_bytes"]) == image
    assert (lost["tar"], lost["image_offset"], lost["image_bytes"]) == (None, None, None)


def test_rows_lead_back_to_the_very_bytes(tmp_path):
    files = {}
    for i in range(7):
        files |= {f"{i}.jpg": jpeg(30 + i, 20, seed=i), f"{i}.txt": f"number {i}"}
    samples = Samples.open(indexed(tmp_path, files))
    for i in range(7):
        assert samples.image_bytes(i) == files[f"{i}.jpg"]
        assert samples.image(i).size == (30 + i, 20)
        assert samples.captions(i) == [f"number {i}"]


def test_samples_id_is_the_hash_of_the_uids(tmp_path):
    samples = Samples.open(
        indexed(tmp_path, {"b.jpg": jpeg(seed=1), "b.txt": "b", "a.jpg": jpeg(), "a.txt": "a"})
    )
    assert samples.samples_id == hashlib.sha256(b"a\nb").hexdigest()[:16]
    assert Tokens.open(tmp_path / "index").samples_id == samples.samples_id


def test_width_and_height_are_those_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    index = indexed(tmp_path, {"a.jpg": jpeg(40, 30, exif=exif), "a.txt": "turned"})
    row = pq.read_table(index / "samples.parquet").to_pylist()[0]
    assert (row["width"], row["height"]) == (30, 40) == Samples.open(index).image(0).size


def test_class_numbers_become_class_names_and_need_no_caption(tmp_path):
    files = {
        "a.jpg": jpeg(),
        "a.cls": "1",
        "b.jpg": jpeg(),
        "b.cls": "0\n",
        "c.jpg": jpeg(),
        "c.cls": "2",
    }
    index = indexed(tmp_path, files, TEST, classes=["cat", "dog"])
    samples = Samples.open(index)
    np.testing.assert_array_equal(samples.labels("class"), [1, 0])
    assert (samples.label_names, samples.all_captions()) == ({"class": ["cat", "dog"]}, [[], []])
    assert rejects(index) == {"c": "unknown class"}
    with pytest.raises(ConfigError, match=r"no label 'colour'.*its labels: class"):
        samples.labels("colour")


def test_a_training_set_of_labels_alone_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no sample .* can be used: 1 no caption.*needs captions"
    ):
        indexed(tmp_path, {"a.jpg": jpeg(), "a.cls": "0"}, TRAIN, classes=["cat"])


def test_class_numbers_without_names_are_no_labels(tmp_path):
    with pytest.raises(ConfigError, match="`classes` was not given"):
        indexed(tmp_path, {"a.jpg": jpeg(), "a.cls": "0"}, TEST)


def test_keys_that_repeat_over_tars_are_told_apart(tmp_path):
    one = {"0.jpg": jpeg(seed=1), "0.txt": "first"}
    two = {"0.jpg": jpeg(seed=2), "0.txt": "second", "1.jpg": jpeg(seed=3), "1.txt": "third"}
    samples = Samples.open(indexed(tmp_path, {"x": one, "y": two}))
    assert samples.uids() == ["x/0", "y/0", "y/1"]
    assert samples.all_captions() == [["first"], ["second"], ["third"]]


def test_a_key_that_repeats_in_a_tar_is_rejected_the_second_time(tmp_path):
    files = [
        ("0.jpg", jpeg(seed=1)),
        ("0.txt", "first"),
        ("0.jpg", jpeg(seed=2)),
        ("0.txt", "second"),
    ]
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "in.tar", files)
    for stage in ("download", "index"):
        (tmp_path / stage).mkdir()
    download(TarSource(kind="tars", tars=str(tmp_path / "in.tar")), tmp_path / "download", 1)
    build_index(TRAIN, tmp_path / "download", tmp_path / "index", 1)
    assert Samples.open(tmp_path / "index").all_captions() == [["first"]]
    assert rejects(tmp_path / "index") == {"0": "repeated key"}


def test_workers_change_nothing(tmp_path):
    files = {}
    for i in range(1100):  # enough for a second worker
        files |= {
            f"{i}.jpg": jpeg(16, 16, seed=i % 7) if i % 10 else b"",
            f"{i}.txt": f"number {i}",
        }
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    settings = IndexJob(tokenize=True, drop_duplicates=False)
    alone = indexed(tmp_path / "one", files, settings, threads=1)
    together = indexed(tmp_path / "two", files, settings, threads=2)
    for name in ("tokens/ids.npy", "tokens/merges.txt.gz", "tokens/tokens.json"):
        assert (alone / name).read_bytes() == (together / name).read_bytes()
    for table, num_rows in (("samples", 990), ("rejects", 110)):
        ours, theirs = (
            pq.read_table(index / f"{table}.parquet").drop(["tar"]) for index in (alone, together)
        )
        assert ours.equals(theirs) and len(ours) == num_rows


def test_folders_are_indexed_in_place(tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.png"):
        Image.open(io.BytesIO(jpeg())).save(pictures / name)
        (pictures / name).with_suffix(".txt").write_text(f"caption of {name}")
    for stage in ("download", "index"):
        (tmp_path / stage).mkdir()
    download(FolderSource(kind="folder", folder=str(pictures)), tmp_path / "download", 1)
    build_index(TRAIN, tmp_path / "download", tmp_path / "index", 1)
    samples = Samples.open(tmp_path / "index")
    assert (samples.uids(), samples.captions(1)) == (["a", "sub/b"], ["caption of sub/b.png"])
    assert samples.image_bytes(1) == (pictures / "sub/b.png").read_bytes()


def test_a_table_in_chunks_tells_what_one_in_a_piece_does(tmp_path, monkeypatch):
    files = {}
    for number in range(7):
        about = {"captions": [f"{number}.{i}" for i in range(1 + number % 3)]}
        files |= {f"{number}.jpg": jpeg(seed=number), f"{number}.json": about, f"{number}.cls": "0"}
    tables = []
    for rows in (100, 2):
        monkeypatch.setattr("clipgraft.data.samples.ROWS", rows)
        monkeypatch.setattr("clipgraft.data.index.ROWS", rows)
        (base := tmp_path / f"{rows}").mkdir()
        index = indexed(base, files, classes=["cat", "dog"])
        assert read_columns(index / "samples.parquet")["captions"].num_chunks == -(-7 // rows)
        samples, captions = Samples.open(index), Captions(index)
        assert len(samples) == 7
        of_rows = [
            (samples.captions(row), samples.image_bytes(row), samples.checksum(row),
             samples.pixels(row).tolist(), samples.image(row).size, samples.place(row)[1:])
            for row in range(7)
        ]  # fmt: skip
        whole = (samples.uids(), samples.all_captions(), samples.all_caption_kinds())
        read = [captions.of_rows(first, stop) for first, stop in ((0, 7), (1, 4), (6, 7))]
        numbers = (samples.labels("class").tolist(), picture_sizes(index).tolist())
        visits = Visits.of_index(index, 7, {"": 2}, 0)._source_N.tolist()
        tables.append((of_rows, whole, read, numbers, visits, samples.samples_id))
    assert tables[0] == tables[1]
    assert tables[0][1][1][5] == ["5.0", "5.1", "5.2"]


def test_an_index_is_made_in_the_memory_that_scale_says(tmp_path):
    """Of Python's objects, which are most of it; samples that are found are not kept beside those that are accepted."""
    peaks, images = [], [jpeg(seed=seed) for seed in range(9)]
    for number in (10, 300, 900):  # the first loads what is loaded once
        (base := tmp_path / f"{number}").mkdir()
        for first in range(0, number, 50):
            files = {}
            for row in range(first, min(first + 50, number)):
                key, text = f"{row:09d}", f"caption {row:020d}"
                files |= {f"{key}.jpg": images[row % 9], f"{key}.txt": text, f"{key}.json": "{}"}
            write_tar(base / f"{first}.tar", files)
        out, index, tars = base / "out", base / "index", str(base / "*.tar")
        out.mkdir()
        index.mkdir()
        download(TarSource(kind="tars", tars=tars, captions={"caption": "txt"}), out, 1)
        tracemalloc.start()
        build_index(TEST, out, index, 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    per_sample = (peaks[2] - peaks[1]) / 600
    assert 0.6 * footprint.INDEXING < per_sample < footprint.INDEXING


def test_an_index_finds_its_download_after_both_have_moved(tmp_path):
    (tmp_path / "old").mkdir()
    pictures = {"a.jpg": jpeg(), "a.txt": "a"}
    index = indexed(tmp_path / "old", pictures)
    about = json.loads((index / "samples.json").read_text())
    assert about["download"] == os.path.join("..", "download")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = Samples.open(tmp_path / "new" / index.relative_to(tmp_path / "old"))
    assert len(moved) == 1 and moved.captions(0) == ["a"]
    assert (about["num_samples"], about["num_captions"], about["label_names"]) == (1, 1, {})


@pytest.mark.parametrize(("change", "words"), [("gone", "is gone"), ("cut", "is shorter than")])
def test_tars_that_are_no_longer_what_was_indexed_are_said_plainly(tmp_path, change, words):
    files = {}
    for uid in "ab":
        files |= {f"{uid}.jpg": jpeg(seed=ord(uid)), f"{uid}.txt": uid}
    index = indexed(tmp_path, files)
    tar = tmp_path / "tars/in.tar"
    if change == "gone":
        tar.rename(tmp_path / "elsewhere.tar")
    else:
        os.truncate(tar, 700)
    with pytest.raises(ConfigError, match=rf"in\.tar {words}.*Hint"):
        Samples.open(index).image(1)
    (tmp_path / "shard").mkdir()
    with pytest.raises(ConfigError, match=words):
        write_shards(ShardJob(image_size=16), index, tmp_path / "shard", 1)


@pytest.mark.skipif(
    "REALDATA" not in os.environ, reason="REALDATA, a folder of real image sets, is not set"
)
def test_flickr8k_is_accepted_whole(tmp_path):
    for stage in ("download", "index"):
        (tmp_path / stage).mkdir()
    source = TarSource(kind="tars", tars="$REALDATA/flickr8k/val-*.tar")
    download(source, tmp_path / "download", 2)
    facts = build_index(TRAIN, tmp_path / "download", tmp_path / "index", 2)
    assert (facts["num_samples"], facts["num_captions"], facts["rejected"]) == (1000, 5000, {})
