"""Laws of what the report says of outcomes, of which there are millions."""

import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipgraft.report.page_tables import data_table
from clipgraft.report.read import Run
from clipgraft.report.sections import _rejects

NUM = 200_000


@pytest.fixture
def run(tmp_path) -> Run:
    """A data set of which every tenth image failed, and three that came were rejected."""
    index, download = tmp_path / "index", tmp_path / "download"
    index.mkdir()
    download.mkdir()
    about = {"label_names": {}, "num_samples": NUM * 9 // 10 - 3, "num_captions": NUM}
    (index / "samples.json").write_text(json.dumps(about))
    pq.write_table(pa.table({"reason": ["small", "broken", "small"]}), index / "rejects.parquet")
    cycle = [("failed", None), *[("ok", "")] * 9, ("failed", "x" * 70 + "a"), *[("ok", "")] * 9]
    cycle += [("failed", ""), *[("ok", "")] * 9, ("failed", "x" * 70 + "b"), *[("ok", "")] * 9]
    status, message = zip(*cycle * (NUM // 40), strict=True)
    table = pa.table({"captions": [["a"]] * NUM, "status": status, "message": message})
    pq.write_table(table, download / "outcomes.parquet")
    manifest = {"settings": {"source": {"kind": "urls"}}}
    folders: dict[str, Path] = {"index/train": index, "download/train": download}
    return Run(folders, {"download/train": manifest})


def test_outcomes_are_counted_by_what_became_of_them(run):
    assert [cell.text for cell in data_table(run).rows[0]][:5] == [
        "train", "urls", "200,000", "180,000", "3"
    ]  # fmt: skip
    counts = {row["reason"]: row["samples"] for row in _rejects(run)}
    assert counts == {
        "not downloaded: ?": NUM // 20,
        f"not downloaded: {'x' * 60}": NUM // 20,
        "small": 2,
        "broken": 1,
    }


@pytest.mark.parametrize("count", [data_table, _rejects])
def test_counting_outcomes_makes_no_python_object_of_each(run, count):
    count(run)
    tracemalloc.start()
    try:
        count(run)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < NUM  # bytes; a list alone has 8 of each
