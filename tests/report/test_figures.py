"""Laws of the figures: their numbers, and their form."""

import re

import numpy as np

from clipgraft.report.costs import Cost
from clipgraft.report.figures import MAX_SIZES, plot_caption_lengths, plot_rejects, size_counts
from clipgraft.report.figures_attributes import plot_probes
from clipgraft.report.figures_experts import plot_router, plot_router_layers
from clipgraft.report.figures_results import noise_of, plot_metrics, worst_classes
from clipgraft.report.figures_rounds import _blocks, effective_number, flow_rows, plot_label_flow
from clipgraft.report.figures_training import loss_panels
from clipgraft.report.read import Model
from clipgraft.report.style import INK, draw, themed
from clipgraft.report.tables import Column

REASONS = [{"data": "train", "reason": "too small & <odd>", "samples": 3}]


def test_sizes_are_counted_and_many_are_put_together_within_five_per_cent():
    sizes, counts = size_counts(np.array([64, 64, 80]), np.array([48, 48, 48]))
    assert sizes.tolist() == [[64, 48], [80, 48]] and counts.tolist() == [2, 1]
    rng = np.random.default_rng(0)
    width, height = rng.integers(32, 400, (2, 20_000))
    sizes, counts = size_counts(width, height)
    assert counts.sum() == 20_000
    assert (
        len(sizes) < len({*zip(width.tolist(), height.tolist(), strict=True)}) / 4 > MAX_SIZES / 4
    )
    order = np.sort(width)
    assert np.abs(np.sort(np.repeat(sizes[:, 0], counts)) / order - 1).max() < 0.04


def test_numbers_of_a_figure_are_the_data():
    lengths = np.array([5, 5, 9, 12])
    figure = plot_caption_lengths(lengths, "tokens", {"short": 8, "full": 16})
    assert figure.rows == [
        {"tokens": 5, "captions": 2}, {"tokens": 9, "captions": 1}, {"tokens": 12, "captions": 1}
    ]  # fmt: skip
    assert "short 50.0 %, full 0.0 %" in figure.caption


def test_names_inside_a_figure_are_its_own_and_refer_to_itself():
    svg = plot_rejects(REASONS).svg
    names = re.findall(r'\bid="([^"]+)"', svg)
    assert names and all(name.startswith("data_rejects-") for name in names)
    referred = re.findall(r'(?:url\(|xlink:href=")#([^")]+)', svg)
    assert referred and set(referred) <= set(names)


def test_dollars_are_drawn_as_they_are_written():
    """And never read as a formula, which may not even be one."""
    reason = "not downloaded: GET a/$x_{$"
    svg = plot_rejects([{"data": "train", "reason": reason, "samples": 3}]).svg
    assert f"train: {reason}" in svg


def test_a_router_without_numbers_has_no_figure():
    assert plot_router([{"samples_seen": 1, "loss": 2.0}], 4) is None


def test_as_many_lines_as_there_are_have_a_line_in_the_legend():
    names = [f"run {number}" for number in range(40)]
    rows = [
        {"model": name, "samples_seen": n, "hours": n, "loss": 1.0}
        for name in names
        for n in (1, 2)
    ]
    titles = {name: name for name in names}
    svg = draw(
        "x", "x", "x", rows, lambda: loss_panels(rows, titles, dict.fromkeys(names, INK))
    ).svg
    height = float(re.search(r'viewBox="0 0 \S+ (\S+)"', svg)[1])
    found = {name: float(y) for y, name in re.findall(r'translate\(\S+ (\S+)\)">(run \d+)<', svg)}
    placed = found or {
        name: float(y) for y, name in re.findall(r'y="([\d.]+)"[^>]*>(run \d+)<', svg)
    }
    assert set(placed) == set(names)
    assert all(0 < y < height for y in placed.values())


def test_a_figure_is_drawn_the_same_twice_and_carries_no_date():
    first, second = plot_rejects(REASONS).svg, plot_rejects(REASONS).svg
    assert first == second
    assert "metadata" not in first and "<dc:date>" not in first
    assert "too small &amp; &lt;odd&gt;" in first


def test_the_figure_of_layers_has_the_least_and_the_most_used_expert_of_each():
    """A layer that collapses is a line of its own, whatever the others do."""
    rows = [
        {
            "samples_seen": 10 * step,
            "load_image": [[0.25] * 4, [0.4, 0.3, 0.3 - share, share]],
            "entropy_image": [1.3, 1.0 - step / 10],
        }
        for step, share in ((1, 0.2), (2, 0.001))
    ]
    figure = plot_router_layers(rows, {"image": [0, 3]}, (0.0025, 0.475))
    assert figure.rows[-1] == {
        "samples_seen": 20,
        "tower": "image",
        "layer": 3,
        "least": 0.001,
        "most": 0.4,
        "entropy": 0.8,
    }
    assert [row["layer"] for row in figure.rows] == [0, 3, 0, 3]
    assert "layer 3" in figure.svg and "Bad:" in figure.caption


def test_noise_is_two_standard_errors_of_a_mean_of_shares():
    rng = np.random.default_rng(0)
    shares = [(0.5, 400), (0.1, 90), (0.8, 2_000)]
    hits = np.mean([rng.binomial(num, p, 100_000) / num for p, num in shares], axis=0)
    assert abs(noise_of(shares) - 200 * hits.std()) < 0.05
    assert abs(noise_of(shares[:1]) - 5) < 1e-9


def test_every_sample_flows_through_one_block_of_each_round_however_small_its_label():
    """Labels of very different size, most of them too small to be drawn by themselves."""
    rng = np.random.default_rng(0)
    first_N = rng.choice(4, 5000, p=[0.6, 0.35, 0.048, 0.002])
    second_N = np.unique(first_N * 40 + rng.geometric(0.3, 5000).clip(max=39), return_inverse=True)[
        1
    ]
    third_N = np.unique(second_N * 9 + rng.integers(0, 9, 5000), return_inverse=True)[1]
    rows = flow_rows({"1": first_N, "2": second_N, "3": third_N})
    home: dict = {}
    before = {""}
    for name in ("1", "2", "3"):
        blocks, home = _blocks([row for row in rows if row["round"] == name], home)
        assert sum(block.samples for block in blocks) == 5000
        assert {block.parent for block in blocks} <= before
        assert any(block.label is None for block in blocks) and set(home.values()) == {
            block.name for block in blocks
        }
        before = {block.name for block in blocks}
    figure = plot_label_flow(rows, {0: "0 x 1"})
    assert "0 x 1" in figure.svg and "Bad:" in figure.caption


def test_the_effective_number_of_labels_of_one_size_is_their_number():
    assert abs(effective_number([7] * 5) - 5) < 1e-9
    assert 1 < effective_number([1000, 1]) < 1.02


def test_colours_that_follow_the_page_are_variables_there_and_plain_in_files():
    svg = plot_rejects(REASONS).svg
    assert "var(" not in svg and INK in svg
    page = themed(svg)
    assert INK not in page and page.count("var(--ink)") == svg.count(INK)
    assert themed("#0072B2") == "#0072B2" and themed("#333333") == themed("#333333".upper())


def test_rows_are_as_high_as_the_models_in_them_need():
    def height(plot, num: int) -> float:
        told = {"t": {"probe": {"k": {"spread": 0.0}}}}
        models = [Model(f"m{each}", "#000000", Cost(1, 1.0), told) for each in range(num)]
        values = {model.key: 0.5 for model in models}
        svg = plot(models, [Column("t", "k", "g", "k", "k", True, values, 0.1)]).svg
        return float(re.search(r'viewBox="0 0 \S+ (\S+)"', svg)[1])

    for plot in (plot_metrics, plot_probes):
        assert height(plot, 24) > height(plot, 17) + 10  # three lines of legend, both


def test_of_labels_without_a_confusion_no_class_is_the_worst():
    few = {"classes": ["a", "b"], "confusion": [[9, 1], [4, 6]], "num_classes": 2}
    many = {"classes": ["c", "d"], "confusion": None, "num_classes": 2}
    assert [row["class"] for row in worst_classes({"many": many, "few": few})] == ["b", "a"]
