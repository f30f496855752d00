"""Laws of the figures: their numbers, and their form."""

import re

import numpy as np
import pytest
import torch

from clipgraft.losses.balance import RoutingMeans, balance_loss, routing_sums
from clipgraft.report import figures_training
from clipgraft.report.costs import Cost
from clipgraft.report.figures import MAX_SIZES, plot_caption_lengths, plot_rejects, size_counts
from clipgraft.report.figures_attributes import plot_probes
from clipgraft.report.figures_experts import (
    MAX_RANKS,
    plot_cluster_sizes,
    plot_router,
    plot_router_layers,
)
from clipgraft.report.figures_results import noise_of, plot_metrics, worst_classes
from clipgraft.report.figures_rounds import (
    effective_number,
    flow_rows,
    mean_splits,
    plot_label_flow,
)
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
    assert plot_router([{"samples_seen": 1, "loss": 2.0}], 4, 2) is None


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (4, 1), (8, 3)])
def test_the_balance_of_experts_that_take_all_is_the_one_that_the_caption_warns_of(
    num_experts, top_k
):
    logits_TE = torch.full((5, num_experts), -50.0)
    logits_TE[:, 0] = 50.0
    topk_TK = torch.arange(top_k).expand(5, top_k)
    sums_S = routing_sums(logits_TE, logits_TE.softmax(1), topk_TK)
    worst = float(balance_loss(RoutingMeans.of(sums_S[None])))
    figure = plot_router([{"samples_seen": 1, "balance": 1.0}], num_experts, top_k)
    (said,) = re.findall(r"rising towards (\S+) ", figure.caption)
    assert float(said) == pytest.approx(worst, abs=0.005)
    assert f"({top_k} of {num_experts} experts take all)" in figure.caption


def drawn(monkeypatch, losses: list[float], candidates: dict[str, int]):
    """Caption and figure of two phases, half of the losses in each."""
    half = len(losses) // 2
    rows = [
        {"phase": "short" if i < half else "full", "samples_seen": i, "hours": i / 10, "loss": loss}
        | dict.fromkeys(("tau", "lr", "samples_per_second", "tokens_per_second"), 1.0)
        for i, loss in enumerate(losses)
    ]
    middle, end = half - 1, len(losses) - 1
    spans = {
        name: {"samples_seen": (a, b), "hours": (a / 10, b / 10)}
        for name, a, b in (("short", 0, middle), ("full", middle, end))
    }
    monkeypatch.setattr(figures_training, "draw", lambda *about: (about[2], about[4]()))
    return figures_training.plot_pretraining(rows, spans, candidates)


def test_a_loss_below_zero_is_inside_its_panels(monkeypatch):
    """As global losses are, once anything is learnt."""
    losses = [0.01, -0.3, -0.5, -0.6]
    caption, figure = drawn(monkeypatch, losses, {})
    for axis in figure.axes[:2]:
        low, high = axis.get_ylim()
        assert low < min(losses) and max(losses) < high
        assert [line for line in axis.lines if line.get_linestyle() == "--"] == []
    assert "dashed" not in caption.lower() and "guessing" not in caption


def test_the_loss_of_guessing_is_that_of_each_phase_over_its_own_span(monkeypatch):
    caption, figure = drawn(monkeypatch, [9.0, 5.0, 6.0, 4.0], {"short": 65_536, "full": 8_192})
    for axis, scale in zip(figure.axes[:2], (1, 6), strict=True):  # samples, minutes
        levels = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert [line.get_ydata()[0] for line in levels] == pytest.approx(np.log([65_536, 8_192]))
        assert [list(line.get_xdata()) for line in levels] == [[0, scale], [scale, 3 * scale]]
        assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > np.log(65_536)
    assert "ln 65,536 = 11.09 in short, ln 8,192 = 9.01 in full" in caption


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
    labels = {"1": first_N, "2": second_N, "3": third_N}
    rows = flow_rows(labels)
    before = {""}
    for name, label_N in labels.items():
        blocks = [row for row in rows if row["round"] == name]
        assert sum(block["samples"] for block in blocks) == 5000
        assert sum(block["labels"] for block in blocks) == len(np.unique(label_N))
        assert {block["parent"] for block in blocks} <= before
        assert any(block["first"] == "" for block in blocks)
        before = {block["block"] for block in blocks}
    splits = mean_splits(labels)
    parts = [np.bincount(second_N[first_N == label]) for label in range(4)]
    numbers = [effective_number(each[each > 0].tolist()) for each in parts]
    assert abs(splits["2"] - np.average(numbers, weights=np.bincount(first_N))) < 1e-9
    figure = plot_label_flow(rows, splits, {0: "0 x 1"})
    assert "0 x 1" in figure.svg and "Bad:" in figure.caption


def test_figures_of_very_many_labels_stay_small_and_say_so():
    rng = np.random.default_rng(0)
    first_N = rng.integers(0, 9, 60_000)
    second_N = np.unique(first_N * 9_000 + rng.integers(0, 9_000, 60_000), return_inverse=True)[1]
    sizes = {"1": np.bincount(first_N).tolist(), "2": np.bincount(second_N).tolist()}
    num = len(sizes["2"])
    assert num > 10 * MAX_RANKS
    figure = plot_cluster_sizes({name: {"sizes": of} for name, of in sizes.items()}, 2)
    listed = [row for row in figure.rows if row["round"] == "2"]
    assert [row["rank"] for row in listed][:: MAX_RANKS - 1] == [1, num]
    assert len(listed) == MAX_RANKS and len(figure.rows) == MAX_RANKS + 9
    ordered = sorted(sizes["2"], reverse=True)
    assert all(
        row["size"] == sizes["2"][row["label"]] == ordered[row["rank"] - 1] for row in listed
    )
    assert f"more than {MAX_RANKS:,} labels" in figure.caption and f"{num:,} labels" in figure.svg
    labels = {"1": first_N, "2": second_N}
    flow = plot_label_flow(flow_rows(labels), mean_splits(labels), {})
    assert len(flow.rows) == 18 and f"{num:,} labels" in flow.svg
    assert len(figure.svg) + len(flow.svg) < 300_000
    assert "more than" not in plot_cluster_sizes({"1": {"sizes": sizes["1"]}}, 2).caption


def test_what_becomes_of_small_labels_is_said_as_it_is():
    rounds = {"1": {"sizes": [70, 20, 10]}}
    packed = plot_cluster_sizes(rounds, 32).caption
    assert (
        "share one, with fewer negatives (samples in labels below the line: round 1 30 %)" in packed
    )
    lost = plot_cluster_sizes(rounds, 32, loses_small=True).caption
    assert "are never seen" in lost and "round 1 30 %" in lost and "share one" not in lost


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
