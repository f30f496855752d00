"""A sweep as a user meets it: one command, from the config to the page with the law."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_grid_runs_to_its_page_and_the_page_says_what_was_measured(workflow):
    shutil.copy(ROOT / "tests/config/grid.yaml", workflow.root / "small.yaml")
    planned = workflow.planned()
    assert [planned.count(stage) for stage in ("shard", "pretrain", "evaluate")] == [2, 4, 4]
    assert planned.count("report") == 4 and planned.count("scaling") == 1
    workflow.run_jobs()
    assert workflow.planned("--", "results/runs/sweep/versions.json") == ["scaling"]
    printed = workflow.snakemake("--cores", "2", "--", "results/runs/sweep/versions.json")
    page = workflow.root / "results/runs/sweep/scaling"
    assert (page / "results.txt").read_text() in printed
    assert "There is one seed only" in (page / "scaling.html").read_text()

    # What every run reached, from the results themselves: which they are is said by their manifests.
    found = {}
    for path in (workflow.root / "results/evaluate").glob("*/manifest.json"):
        model = json.loads(path.read_text())["inputs"]["model"]["manifest"]
        trained = json.loads((path.parent / model).read_text())["settings"]
        result = json.loads((path.parent / "result.json").read_text())["retrieval"]
        width = trained["model"]["config"]["vision_cfg"]["width"]
        both = result["image_to_text"]["R@1"] + result["text_to_image"]["R@1"]
        found[width, trained["image_size"]] = 100 * both / 2
    assert len(found) == 4 and len(set(found.values())) > 1  # else there is little to get wrong
    for row in rows_of(page / "runs.csv"):
        width = {"thin": 32, "wide": 64}[row["axis_size"]]
        side = {"i32": 32, "i16": 16}[row["axis_image"]]
        assert float(row["score"]) == pytest.approx(found[width, side])
        assert int(row["image_tokens"]) == (side // 8) ** 2 + 1
        assert float(row["hours"]) > 0
    slopes = {row["size"][:4]: row for row in rows_of(page / "figures/scaling_slopes.csv")}
    for name, width in (("thin", 32), ("wide", 64)):
        expected = (found[width, 32] - found[width, 16]) / math.log2(17 / 5)
        assert float(slopes[name]["slope"]) == pytest.approx(expected)
    assert workflow.planned("--", "results/runs/sweep/versions.json") == []
