"""Laws of the pictures and words that stand for a cluster."""

import base64
import io
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipgraft.report.pictures import (
    nearest,
    rejects_sheet,
    sample_sheet,
    telling_words,
    thumbnail,
)
from clipgraft.report.read import Run


class Captions:
    """Samples of which only the captions matter."""

    def __init__(self, *captions: str) -> None:
        self.texts = captions

    def __len__(self) -> int:
        return len(self.texts)

    def captions(self, row: int) -> list[str]:
        return [self.texts[row]] if self.texts[row] else []


def test_nearest_are_the_most_similar_of_the_rows_given():
    points = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.99, 0.14]], np.float16)
    assert nearest(points, np.array([1.0, 0.0]), np.array([1, 2, 3])).tolist() == [3, 1, 2]
    assert nearest(points, np.array([1.0, 0.0]), np.array([], int)).tolist() == []


def test_telling_words_are_those_that_others_lack():
    samples = Captions("a red cat", "a red dog", "a Red, cow", "a blue cat", "a blue dog", "")
    words = telling_words(samples, np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1]))
    assert words[0][0] == ("red", 1.0)
    assert words[1][0][0] == "blue"
    said = {word for found in words.values() for word, _ in found}
    assert "cow" in said and "dog" not in {word for word, _ in words[0]}


def test_thumbnails_are_small_jpegs_and_never_enlarged():
    for size, expected in (((640, 320), (96, 48)), ((30, 40), (30, 40))):
        url = thumbnail(Image.new("RGB", size, "red"))
        head, data = url.split(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert (image.format, image.size) == ("JPEG", expected)


def test_a_sheet_spans_the_data_set_without_repeats(tree):
    samples = Run.open(tree).samples("train")
    rows = [picture.row for picture in sample_sheet(samples, 7)]
    assert rows == sorted(set(rows)) and rows[0] == 0 and rows[-1] == len(samples) - 1
    assert len(sample_sheet(samples, 10_000)) == len(samples)
    assert sample_sheet(samples, 0) == []


def test_rejected_images_are_shown_as_far_as_they_decode(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((60, 40), 50).convert("RGB").save(buffer, "JPEG")
    whole = buffer.getvalue()
    data = {"cut": whole[:-200], "none": b"<html>", "small": whole, "small too": whole}
    rows, offset = [], 0
    with (tmp_path / "bytes").open("wb") as file:
        for uid, image in data.items():
            file.write(image)
            rows.append({"uid": uid, "reason": uid.split()[0], "detail": f"why {uid}"})
            rows[-1] |= {"tar": "bytes", "image_offset": offset, "image_bytes": len(image)}
            offset += len(image)
    lost = {"tar": None, "image_offset": None, "image_bytes": None}
    rows.append({"uid": "lost", "reason": "no image", "detail": "why lost", **lost})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rejects.parquet")
    sheet = rejects_sheet(tmp_path, tmp_path, 10)
    shown = {each.uid: bool(each.url) for each in sheet}
    assert shown == {"small": True, "small too": True, "cut": True, "none": False, "lost": False}
    assert [each.detail for each in sheet if each.uid == "cut"] == ["why cut"]
    few = [each.reason for each in rejects_sheet(tmp_path, tmp_path, 4)]
    assert sorted(few) == ["cut", "no image", "none", "small"]


def test_a_sheet_of_rejects_reads_batches_and_shows_the_most_frequent_reason_first(tmp_path):
    num = 300_000
    place = pa.nulls(num, pa.int64())
    columns = {
        "uid": pa.array(range(num)).cast(pa.string()),
        "reason": pa.array(["rare"] + ["often"] * (num - 1)),
        "detail": pa.array(["why"] * num),
        "tar": pa.nulls(num, pa.string()),
        "image_offset": place,
        "image_bytes": place,
    }
    pq.write_table(pa.table(columns), tmp_path / "rejects.parquet")
    tracemalloc.start()
    try:
        sheet = rejects_sheet(tmp_path, tmp_path, 4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [(each.uid, each.reason) for each in sheet] == [
        ("1", "often"), ("2", "often"), ("3", "often"), ("0", "rare")
    ]  # fmt: skip
    assert peak < 25 * num  # bytes; the reasons of all rows have twice that and more
