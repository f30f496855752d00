"""Laws of the report of an evaluation folder: one task among the others, and one line per data set."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest
from trees import with_evalset

from clipgraft.evalset_tasks import AVERAGED
from clipgraft.report.costs import Cost
from clipgraft.report.evalset import EVALSET, together, write_evalset
from clipgraft.report.facts import run_section
from clipgraft.report.figures_results import plot_metrics
from clipgraft.report.page import render
from clipgraft.report.page_tables import evalset_table, results_table
from clipgraft.report.read import Model, Run
from clipgraft.report.report import _headline
from clipgraft.report.sections import Section, results_section
from clipgraft.report.tables import columns_of, results_csv, results_text


def result(key: str, name: str, value: float | None, chance: float | None) -> dict:
    return {
        "task": f"evalset/{key}",
        "key": key,
        "dataset": name,
        "metrics": {"acc1": 0.5, "main_metric": value},
        "main_metric": None if value is None else "acc1",
        "chance": chance,
        "size": 100,
        "partial": ["100 samples instead of 10,000"],
    }


def results(cifar: float) -> dict[str, dict]:
    return {
        "cifar10": result("cifar10", "CIFAR-10", cifar, 0.1),
        "mnist": {"task": "evalset/mnist", "failed": "0.tar is damaged"},
        "fairness/fairface": result("fairness/fairface", "FairFace", None, None),
        "own": result("own", "own", 0.75, 0.25),
    }


@pytest.fixture
def run(bare_tree) -> Run:
    """A run whose base and mixture were evaluated on a folder as well."""
    return Run.open(with_evalset(bare_tree, {"base": results(0.5), "moe": results(0.25)}))


@pytest.fixture
def models(run) -> list[Model]:
    return [model for model in run.models() if model.key != "untrained"]


def test_many_tasks_are_read_as_one(models):
    by_key = {model.key: model for model in models}
    assert list(by_key["base"].results) == ["renders", "combinations", EVALSET]
    assert EVALSET not in by_key["expert_1"].results
    assert set(by_key["moe"].results[EVALSET]["tasks"]) == set(results(0))


def test_the_terminal_shows_means_and_says_of_how_many(models):
    text = results_text(models, columns_of(models))
    block = text.split("evalset: ")[1].splitlines()
    assert block[0] == "1/38 averaged tasks; 3 with partial data; failed: mnist; 36 missing"
    assert "Average (1/38)" in block[1] and "VTAB" not in block[1]
    base = next(line for line in block if line.startswith("base"))
    assert base.endswith("50.0*")


def test_the_csv_has_every_task(models):
    rows = csv.DictReader(io.StringIO(results_csv(models, columns_of(models))))
    found = {row["model"]: row for row in rows}
    assert float(found["moe"]["evalset/cifar10"]) == 0.25
    assert float(found["chance"]["evalset/own"]) == 0.25
    assert found["expert_1"]["evalset/cifar10"] == ""
    assert "evalset/fairness/fairface" not in found["base"]  # it has no main metric


def test_the_page_has_a_line_per_task(models):
    table = evalset_table(models)
    assert table.head[:4] == ["task", "metric", "images", "chance"]
    lines = {row[0].text: row for row in table.rows}
    assert [cell.text for cell in lines["CIFAR-10"]][1:6] == ["acc1", "100", "10.0", "50.0", "25.0"]
    assert [cell.is_best for cell in lines["CIFAR-10"]][4:6] == [True, False]
    assert [cell.text for cell in lines["mnist"]][3:] == [
        "-",
        "failed",
        "failed",
        "0.tar is damaged",
    ]
    assert lines["FairFace"][4].text == "-"
    assert "missing: Caltech-101, CIFAR-100, " in table.caption
    assert lines["own"][-1].text == "partial: 100 samples instead of 10,000"
    columns = [column for column in columns_of(models) if column.task == EVALSET]
    means = results_table(EVALSET, models, columns, is_first=True)
    assert means.head[-1] == "Average (1/38)" and len(means.rows) == 3
    assert evalset_table(models[1:2]) is None
    page = render(
        {
            **dict.fromkeys(("title", "run", "subtitle", "headline"), "x"),
            **{key: [] for key in ("tiles", "provenance", "jobs")},
            "sections": [Section("results", "Results", tables=[table])],
        }
    )
    assert "partial: 100 samples instead of 10,000" in page and "FairFace" in page
    assert plot_metrics(models, [c for c in columns if c.is_main]).rows
    assert "Differences below about 10.0 points" in means.caption  # of the 100 images of CIFAR-10


def test_a_model_that_failed_everywhere_leaves_the_others_their_numbers(models):
    first = models[0]
    first.results[EVALSET]["tasks"] = {"cifar10": {"task": "evalset/cifar10", "failed": "nan"}}
    columns = [column for column in columns_of(models) if column.task == EVALSET]
    assert (
        "within two standard errors"
        in results_table(EVALSET, models, columns, is_first=True).caption
    )
    assert "evalset: 1/38 averaged" in results_text(models, columns)


def confused(classes: list[str], counts: list[list[int]]) -> dict:
    about = {"classes": classes, "confusion": counts, "num_classes": len(classes)}
    return {"class": {**about, "acc1": 0.5}}


@pytest.mark.parametrize("with_own", [False, True])
def test_the_worst_classes_of_a_folder_are_those_of_all_its_tasks(run, models, with_own):
    columns, final = columns_of(models), models[-1]
    tasks = final.results[EVALSET]["tasks"]
    tasks["cifar10"]["zero_shot"] = confused(["cat", "dog"], [[9, 1], [4, 6]])
    tasks["own"]["zero_shot"] = confused(["oak", "elm"], [[10, 0], [8, 2]])
    if with_own:
        final.results["renders"]["zero_shot"] = confused(["red", "tan"], [[7, 3], [0, 9]])
    figures = {each.name: each for each in results_section(run, models, columns).figures}
    found = [(row["label"], row["class"]) for row in figures["evalset_worst_classes"].rows]
    assert found == [("own", "elm"), ("CIFAR-10", "dog"), ("CIFAR-10", "cat")]
    assert ("results_worst_classes" in figures) == with_own


def test_the_jobs_of_a_model_on_a_folder_are_one_line(run):
    tables = {table.title: table for table in run_section(run).tables}
    (jobs,) = (table for title, table in tables.items() if "jobs: versions" in title)
    assert jobs.title.startswith(f"{len(run.manifests)} jobs")
    lines = {row[0].text: [cell.text for cell in row] for row in jobs.rows}
    assert len(lines) == len(run.manifests) - 2 * len(results(0)) + 2
    assert lines["evaluate/base/evalset: 4 tasks"][2] == "10.0"
    assert lines["evaluate/moe/evalset: 4 tasks"][-1] == "folder: sets"
    assert not any("evalset" in row[0].text for row in tables["Hashes"].rows)


def test_the_public_files_stand_beside_the_page(models, tmp_path):
    write_evalset(models, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["base", "moe"]
    lines = (tmp_path / "out" / "moe" / "eval_results.jsonl").read_text().splitlines()
    assert [json.loads(line)["dataset"] for line in lines] == ["CIFAR-10", "FairFace", "own"]
    total = json.loads((tmp_path / "out" / "moe" / "aggregate.json").read_text())
    assert total["Average"] is None and total["mean_of_present"]["Average"] == 0.25


FAILED = {"imagenet1k": {"task": "evalset/imagenet1k", "failed": "0.tar is damaged. Hint: x"}}
FACES = {"fairness/fairface": result("fairness/fairface", "FairFace", None, None)}


def on_a_folder(tasks: dict[str, dict]) -> list[Model]:
    return [
        Model(key, "#333333", Cost(5, 1.0), {EVALSET: {**together(), "tasks": dict(tasks)}})
        for key in ("base", "moe")
    ]


@pytest.mark.parametrize(
    ("tasks", "said", "cell"),
    [
        (
            FAILED,
            "evalset: 0/38 averaged tasks; failed: imagenet1k; 37 missing\n\n"
            "failed: base, moe on evalset/imagenet1k: 0.tar is damaged. Hint: x\n",
            "0.tar is damaged. Hint: x",
        ),
        (
            FACES,
            "evalset: 0/38 averaged tasks; 1 with partial data; 38 missing; no main metric, see "
            "evalset/<model>/eval_results.jsonl\n",
            "FairFace",
        ),
    ],
)
def test_a_folder_without_a_main_metric_is_told_of(tasks, said, cell):
    models = on_a_folder(tasks)
    columns = columns_of(models)
    assert results_text(models, columns) == said
    section = results_section(Run({}, {}), models, columns)
    (table,) = section.tables
    assert cell in [each.text for each in table.rows[0]] and not section.is_empty


def test_a_folder_on_which_all_failed_is_told_of_beside_other_tasks(models):
    for model in models:
        if EVALSET in model.results:
            model.results[EVALSET]["tasks"] = dict(FAILED)
    text = results_text(models, columns_of(models))
    assert "\nevalset: 0/38 averaged tasks; failed: imagenet1k; 37 missing\n" in text
    assert "\nfailed: base, moe on evalset/imagenet1k: 0.tar is damaged" in text
    assert text.startswith("renders: ") and "nothing" not in text


def test_a_folder_of_data_sets_without_a_mean_has_their_metrics():
    models = on_a_folder({"own": result("own", "own", 0.75, 0.25)})
    columns = columns_of(models)
    assert results_text(models, columns).splitlines()[3].split() == ["base", "5", "1.0", "75.0"]
    section = results_section(Run({}, {}), models, columns)
    assert section.tables[0].head[-1] == "own"
    assert [figure.name for figure in section.figures] == ["results_metrics", "results_cost"]


def whole(task, value: float) -> dict:
    return {**result(task.key, task.name, value, 0.1), "size": task.size, "partial": []}


def test_the_noise_of_a_mean_is_that_of_its_own_tasks():
    """Against draws, not by adding up images of tasks."""
    models = on_a_folder({task.key: whole(task, 0.5) for task in AVERAGED})
    caption = results_table(EVALSET, models, columns_of(models), is_first=False).caption
    rng = np.random.default_rng(0)
    groups = {
        "ImageNet": [50_000],
        "Retrieval": [1_000, 5_000, 3_563],
        "Average": [task.size for task in AVERAGED],
    }
    for title, sizes in groups.items():
        mean = np.mean([rng.binomial(size, 0.5, 20_000) / size for size in sizes], axis=0)
        (said,) = re.findall(rf"([\d.]+) \([^)]*\b{title}[,)]", caption)
        assert float(said) == pytest.approx(200 * mean.std(), abs=0.06)
    assert "1.3 (Retrieval)" in caption


def test_a_difference_within_the_noise_of_the_leading_metric_is_said_to_mean_little():
    """However many images other tasks have."""
    sizes = {task.key: task for task in AVERAGED}
    models = on_a_folder({})
    for model, value in zip(models, (0.5, 0.503), strict=True):
        model.results[EVALSET]["tasks"] = {
            key: whole(sizes[key], value) for key in ("imagenet1k", "sun397")
        }
    said = _headline(models, columns_of(models))
    assert "0.3 points above" in said and "differences below 0.4 points mean little" in said
