"""Laws of the page of a sweep, drawn from made-up runs that follow a known law."""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sweeps

from clipgraft.config import ConfigError, validate
from clipgraft.report.scaling import scaling
from clipgraft.report.style import themed
from clipgraft.settings import ScalingJob

SLOPES = {32: 3.0, 64: 2.0, 128: 1.0}  # points per halving, by width
SIZES = sweeps.size_axis("tiny", "small", "large")


def tokens(first: Mapping[str, Any]) -> int:
    return (first["image_size"] // 8) ** 2 + 1


def law(first: Mapping[str, Any], is_last: bool) -> float:
    """50 % at full length, less by the planted slope; seeds differ by a tenth of a point."""
    a = SLOPES[first["model"]["config"]["vision_cfg"]["width"]]
    points = 50 - a * np.log2(26 / tokens(first)) - 0.5 * a * np.log2(16 / first["text_length"])
    points += 0.1 * (-1) ** (first["seed"] % 2) + (0.0 if is_last else -2.0)
    return (points + (0.7 if first["text_reduction"]["kind"] == "syntax" else 0.0)) / 100


def flat(first: Mapping[str, Any], is_last: bool) -> float:
    """The same loss for all sizes; seeds differ by a point or so."""
    rng = np.random.default_rng(first["seed"] + first["image_size"])
    return (50 - 2 * np.log2(26 / tokens(first)) + rng.normal()) / 100


def draw(folder: Path, raw: Mapping[str, Any], score=law, **changes: Any) -> Path:
    """The page of a sweep with these results."""
    settings, inputs = sweeps.write_sweep(folder / "results", raw, score)
    out = folder / "page"
    out.mkdir()
    scaling(validate(ScalingJob, settings | changes), inputs, out)
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


AXES = {"size": SIZES, "image": sweeps.image_axis(40, 24, 16), "seed": sweeps.seed_axis(2)}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("law"), sweeps.config(AXES))


def test_planted_slopes_stand_in_the_table_and_the_law_is_said_to_be_shown(page):
    rows = rows_of(page / "figures/scaling_slopes.csv")
    assert [float(row["slope"]) for row in rows] == pytest.approx([3, 2, 1], abs=0.15)
    assert {row["side"] for row in rows} == {"image"}
    assert all(float(row["low"]) <= float(row["slope"]) <= float(row["high"]) for row in rows)
    text = (page / "scaling.html").read_text()
    assert "the sweep shows that it falls with size" in text
    assert "96 samples of shapes, 5k samples seen, 2 seeds per setting" in text
    assert "the sweep shows that it falls with size" in (page / "results.txt").read_text()


def test_without_a_law_none_is_claimed(tmp_path):
    text = (draw(tmp_path, sweeps.config(AXES), flat) / "scaling.html").read_text()
    assert "the sweep does not show that it falls with size" in text
    assert "shows that it" not in text


def test_losses_are_those_of_the_results(page):
    rows = rows_of(page / "figures/scaling_image_drop.csv")
    assert [int(row["tokens"]) for row in rows] == [26, 10, 5] * 3
    for row in rows:
        width = {"tiny": 32, "small": 64, "large": 128}[row["size"].split()[0]]
        expected = SLOPES[width] * np.log2(26 / int(row["tokens"]))
        # A tenth of a point up or down for each of two seeds, here and in the longest run.
        assert float(row["drop"]) == pytest.approx(expected, abs=0.21)
        assert float(row["drop_low"]) <= float(row["drop"]) <= float(row["drop_high"])


def test_the_full_phase_gains_what_it_was_made_to_gain(page):
    for row in rows_of(page / "figures/scaling_image_gain.csv"):
        assert float(row["gain"]) == pytest.approx(2.0)
        assert float(row["reduction"]) == pytest.approx(26 / int(row["tokens"]))


def test_no_run_beats_one_on_the_front_and_every_other_is_beaten(page):
    rows = rows_of(page / "figures/scaling_cost.csv")
    assert len(rows) == 2 * 9  # nine settings, before and after; seeds are averaged
    for unit in ("macs", "hours"):
        for part in ("before", "after"):
            points = [
                (float(row[unit]), -float(row["score"]), row[f"{unit}_front"])
                for row in rows
                if row["part"] == part
            ]
            best = np.inf
            for _, loss, front in sorted(points):
                assert (front == "True") == (loss < best)
                best = min(best, loss)


def test_runs_cost_their_compute(page):
    """Depth (12 w^2 L + 2 w L^2) per tower, 3 p^2 w per patch, w times the embedding of 16 for each tower."""
    for row in rows_of(page / "runs.csv"):
        width, depth = sweeps.SIZES[row["axis_size"]]
        side = int(row["axis_image"][1:])

        def forward(patches: int, width: int = width, depth: int = depth) -> float:
            towers = [(length, depth) for length in (patches + 1, 16)]
            macs = sum(d * (12 * width**2 * n + 2 * width * n**2) for n, d in towers)
            return macs + 3 * 64 * width * patches + 2 * width * 16

        expected = forward((side // 8) ** 2) * 4000 + forward(25) * 1000
        assert float(row["macs"]) == pytest.approx(expected)
        assert int(row["num_params"]) == 12 * depth * width**2


def test_names_of_axes_and_points_mean_nothing(page, tmp_path):
    renamed = {"seed": AXES["image"], "a": AXES["seed"], "b": AXES["size"]}
    other = draw(tmp_path, sweeps.config(renamed))
    for name in ("scaling_slopes", "scaling_image_drop", "scaling_image_gain"):
        assert rows_of(other / f"figures/{name}.csv") == rows_of(page / f"figures/{name}.csv")


def test_one_side_is_shown_with_the_other_at_its_longest(page, tmp_path):
    axes = {"text": sweeps.text_axis(6, 16), **AXES}
    both = draw(tmp_path, sweeps.config(axes))
    assert rows_of(both / "figures/scaling_image_drop.csv") == rows_of(
        page / "figures/scaling_image_drop.csv"
    )
    rows = rows_of(both / "figures/scaling_text_drop.csv")
    expected = [slope / 2 * np.log2(16 / 6) for slope in SLOPES.values()]
    assert [float(row["drop"]) for row in rows if row["tokens"] == "6"] == pytest.approx(
        expected, abs=0.21
    )
    assert "Shown at text t16; runs.csv has the others." in (both / "scaling.html").read_text()


def test_strategies_stand_side_by_side(tmp_path):
    syntax = {"pretrain": {"short": {"text_reduction": "syntax"}}}
    axes = {"how": {"cut": {}, "syntax": syntax}, "text": sweeps.text_axis(16, 8)}
    out = draw(tmp_path, sweeps.config({"size": SIZES, **axes}))
    rows = rows_of(out / "figures/scaling_text_strategies.csv")
    assert {(row["strategy"], row["tokens"]) for row in rows} == {
        (strategy, length) for strategy in ("truncate", "syntax") for length in ("16", "8")
    }
    assert len(rows) == 12
    assert {row["strategy"] for row in rows_of(out / "figures/scaling_text_drop.csv")} == {
        "truncate"
    }


def test_a_strategy_without_a_full_length_is_held_against_that_of_its_size(tmp_path):
    def overlay(size: int, how: str) -> dict:
        return {"pretrain": {"short": {"text_length": size, "text_reduction": how}}}

    points = {"all": {}, "cut8": overlay(8, "truncate"), "syn8": overlay(8, "syntax")}
    raw = sweeps.config({"size": SIZES, "text": points, "seed": sweeps.seed_axis(2)})
    rows = rows_of(draw(tmp_path, raw) / "figures/scaling_text_strategies.csv")
    drops = {(row["size"].split()[0], row["strategy"], row["tokens"]): row["drop"] for row in rows}
    assert float(drops["tiny", "truncate", "8"]) == pytest.approx(1.5, abs=0.21)
    assert float(drops["tiny", "syntax", "8"]) == pytest.approx(0.8, abs=0.21)


def test_one_phase_one_size_and_one_seed_are_enough_for_a_page(tmp_path):
    raw = sweeps.config({"image": sweeps.image_axis(40, 16)}, phases=1)
    out = draw(tmp_path, raw)
    drawn = {path.stem for path in (out / "figures").glob("*.svg")}
    assert drawn == {"scaling_slopes", "scaling_image_drop", "scaling_cost"}
    assert "There is one seed only" in (out / "scaling.html").read_text()


def test_a_sweep_of_seeds_alone_has_a_page_of_its_cost(tmp_path):
    out = draw(tmp_path, sweeps.config({"seed": sweeps.seed_axis(2)}))
    assert {path.stem for path in (out / "figures").glob("*.svg")} == {"scaling_cost"}


def test_an_axis_of_the_learning_rate_is_no_axis_of_seeds(tmp_path):
    rates = {f"lr{n}": {"pretrain": {"short": {"optim": {"lr": n / 1000}}}} for n in (1, 2)}
    out = draw(tmp_path, sweeps.config({"rate": rates, "image": sweeps.image_axis(40, 16)}))
    assert {row["seeds"] for row in rows_of(out / "figures/scaling_image_drop.csv")} == {"1"}
    assert "Shown at rate lr1" in (out / "scaling.html").read_text()


def test_how_fast_a_seed_was_trained_is_no_other_recipe(tmp_path):
    fast = {"seed": 1, "pretrain": {"short": {"compile": True, "grad_checkpointing": True}}}
    raw = sweeps.config(
        {"image": sweeps.image_axis(40, 16), "seed": {"s0": {"seed": 0}, "s1": fast}}
    )
    rows = rows_of(draw(tmp_path, raw) / "figures/scaling_image_drop.csv")
    assert {row["seeds"] for row in rows} == {"2"}


def test_a_metric_that_no_result_has_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"scaling\.label = 'colour'.*mean_R@1"):
        draw(tmp_path, sweeps.config(AXES), label="colour")


def test_the_page_needs_nothing_but_itself_and_repeats_itself(page, tmp_path):
    text = (page / "scaling.html").read_text()
    assert not re.search(r"<script|<link|@import|<img|url\((?!#)", text)
    for link in re.findall(r'href="([^#"]+)"', text):
        assert link.startswith("data:text/csv;base64,")
    for path in (page / "figures").glob("*.svg"):
        assert themed(path.read_text()) in text and path.with_suffix(".csv").exists()
    again = draw(tmp_path, sweeps.config(AXES))
    for path in sorted(path for path in page.rglob("*") if path.is_file()):
        assert path.read_bytes() == (again / path.relative_to(page)).read_bytes()
    assert rows_of(page / "runs.csv")[0]["run"] == "tiny-i40-s0"
