"""Laws of the tables."""

import csv
import io

import pytest

from clipgraft.compare import human
from clipgraft.report.costs import Cost
from clipgraft.report.page_tables import failures_table, results_table
from clipgraft.report.read import UNTRAINED, Model
from clipgraft.report.tables import (
    PROBE,
    columns_of,
    lead_column,
    results_csv,
    results_text,
    to_csv,
)


def result(i2t: float, t2i: float, shape: float) -> dict:
    ways = {"image_to_text": {"R@1": i2t, "R@5": 0.9}, "text_to_image": {"R@1": t2i, "R@5": 0.8}}
    chance = {f"{way}_{k}": 0.01 for way in ways for k in ("R@1", "R@5")}
    retrieval = {**ways, "mean_R@1": (i2t + t2i) / 2, "num_images": 100, "num_texts": 100}
    zero_shot = {"acc1": shape, "acc5": None, "mean_per_class_recall": shape, "chance": 0.25}
    about = {"num_classes": 4, "num_samples": 100}
    return {
        "retrieval": {**retrieval, "chance": chance},
        "zero_shot": {"shape": {**zero_shot, **about}},
    }


@pytest.fixture
def models() -> list[Model]:
    base = Model("base", "#000", Cost(50_000, 3.25), {"renders": result(0.5, 0.31, 0.8)})
    spent = Cost(1_250_000, 130.0)
    moe = Model("moe", "#fff", spent, {"renders": result(0.123456, 0.62, 0.80001)})
    return [base, moe]


def test_the_best_of_a_column_is_marked_equals_share_it_and_where_all_are_equal_none_is(models):
    lines = results_text(models, columns_of(models)).splitlines()
    chance, base, moe = (
        next(x for x in lines if x.startswith(n)) for n in ("chance", "base", "moe")
    )
    assert chance.split()[1:] == ["1.0", "1.0", "1.0", "25.0"]
    assert base.split()[1:] == ["50k", "3.2", "50.0*", "31.0", "40.5*", "80.0"]
    assert moe.split()[1:] == ["1.25M", "130", "12.3", "62.0*", "37.2", "80.0"]
    worse = Model("expert_1", "", Cost(1_000, 1.0), {"renders": result(0.1, 0.1, 0.5)})
    lines = results_text([*models, worse], columns_of([*models, worse])).splitlines()
    assert [line.split()[-1] for line in lines[2:6]] == ["25.0", "80.0*", "80.0*", "50.0"]


def test_columns_of_the_terminal_stand_below_their_heads(models):
    _, head, *rows = results_text(models, columns_of(models)).splitlines()[:5]
    ends = [head.index(name) + len(name) for name in ("i2t R@1", "t2i R@1", "shape")]
    for row in rows:
        assert all(row[end - 1].isdigit() for end in ends)


def test_csv_keeps_all_digits_and_all_metrics(models):
    rows = list(csv.DictReader(io.StringIO(results_csv(models, columns_of(models)))))
    assert [row["model"] for row in rows] == ["chance", "base", "moe"]
    assert float(rows[2]["renders/image_to_text_R@1"]) == 0.123456
    assert float(rows[2]["renders/image_to_text_R@5"]) == 0.9
    assert float(rows[1]["renders/shape_mean_per_class_recall"]) == 0.8
    assert float(rows[0]["renders/shape_acc1"]) == 0.25
    assert "renders/shape_acc5" not in rows[0]


def test_a_task_that_a_model_lacks_is_left_blank(models):
    models[0].results["other"] = result(0.1, 0.1, 0.1)
    columns = columns_of(models)
    rows = list(csv.DictReader(io.StringIO(results_csv(models, columns))))
    assert rows[2]["other/shape_acc1"] == ""
    assert results_text(models, columns).count("\nmoe ") == 1


def test_costs_after_the_base_stand_in_the_table_where_there_are_any_and_the_best_expert_is_marked(
    models,
):
    moe = models[-1]
    moe.cost = Cost(1_250_000, 130.0, 1_200_000, 5.43e18, 1.2e9)
    for k, i2t in ((1, 0.4), (2, 0.7), (3, 0.6)):
        spent = Cost(60_000, 4.0, 10_000, None, 8.6e8)
        models.append(Model(f"expert_{k}", "", spent, {"renders": result(i2t, 0.1, 0.5)}))
    text = results_text(models, columns_of(models))
    rows = {line.split("  ")[0]: line.split("  ", 1)[-1].split() for line in text.splitlines()[1:]}
    assert rows["base"][:5] == ["50k", "3.2", "-", "-", "-"]
    assert rows["moe"][:5] == ["1.25M", "130", "1.2M", "5.43E", "1.2G"]
    assert rows["expert 2 +"][2:5] == ["10k", "-", "860M"]  # what cannot be counted is no zero
    assert [name for name in rows if name.endswith("+")] == ["expert 2 +"]
    table = results_table("renders", models, columns_of(models), is_first=True)
    assert table.groups[:3] == [("", 3), ("after the base", 2), ("", 1)]
    assert all(len(row) == sum(span for _, span in table.groups) for row in table.rows)
    assert [row[0].text for row in table.rows if "best" in row[0].text] == [
        "expert 2 (best expert)"
    ]
    rows = list(csv.DictReader(io.StringIO(results_csv(models, columns_of(models)))))
    assert float(rows[2]["flops_after"]) == 5.43e18 and rows[3]["flops_after"] == ""


def test_a_run_without_evaluation_says_so():
    assert results_text([], []) == "nothing was evaluated\n"
    assert to_csv([]).strip() == ""


def test_a_run_of_probes_alone_says_where_they_are():
    model = Model("base", "#333333", Cost(1, 1.0))
    probe = {"size": {"acc": 0.5, "chance": 0.3, "spread": 0.1, "num_samples": 20}}
    model.results["new"] = {"retrieval": None, "zero_shot": {}, "given": {}, "probe": probe}
    learnt = columns_of([model])
    assert "new/probe_size_acc" in results_csv([model], learnt)
    shown = [column for column in learnt if column.group != PROBE]
    assert "nothing" not in results_text([model], shown)
    assert "results.csv" in results_text([model], shown)


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0"), (999, "999"), (1_000, "1k"), (12_345, "12.3k"), (999_936, "1M"), (2.5e9, "2.5G")],
)
def test_large_numbers_are_short(count, said):
    assert human(count) == said


def test_a_task_that_failed_is_said_in_every_table(models):
    models[1].results, models[1].failed = {}, {"renders": "no label. Hint: x"}
    text = results_text(models, columns_of(models))
    assert "failed: moe on renders: no label. Hint: x" in text
    table = results_table("renders", models, columns_of(models), is_first=True)
    row = next(cells for cells in table.rows if cells[0].text == "moe")
    assert {cell.text for cell in row[3:]} == {"failed"}
    models[0].results, models[0].failed = {}, {"renders": "y"}
    text = results_text(models, columns_of(models))
    assert "nothing was evaluated" in text and "failed: base on renders: y" in text
    table = failures_table(models)
    assert table is not None
    rows = table.rows
    assert [[cell.text for cell in row] for row in rows] == [
        ["base", "renders", "y"],
        ["moe", "renders", "no label. Hint: x"],
    ]


def test_the_protocol_is_named_beside_the_size(models):
    assert "100 images, 100 captions\n" in results_text(models, columns_of(models)).replace(
        ";", "\n"
    )
    for model in models:
        model.results["renders"]["retrieval"]["protocol"] = "five_captions"
    assert "100 captions (five of each image)" in results_text(models, columns_of(models))


def test_random_weights_which_have_the_probed_tasks_alone_do_not_say_which_task_leads(models):
    probe = {"shape": {"acc": 0.5, "chance": 0.25, "spread": 0.1, "num_samples": 20}}
    for model in models:
        model.results["probed"] = result(0.9, 0.9, 0.9) | {"probe": probe}
    untrained = Model(UNTRAINED, "", Cost(0, 0.0))
    untrained.results["probed"] = {"retrieval": None, "zero_shot": {}, "probe": probe}
    columns = columns_of([untrained, *models])
    assert lead_column(columns).task == "renders"
    probed = next(column for column in columns if column.group == PROBE)
    assert list(probed.values) == [UNTRAINED, "base", "moe"]
