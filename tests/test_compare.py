"""One table over seeds: what counts as one model, and the numbers by another way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipgraft.compare import compare
from clipgraft.config import ConfigError
from clipgraft.runs import link_run, shown

HEAD = "model,samples_seen,minutes,samples_after,flops_after,flops_per_pair"
METRICS = ("renders/mean_R@1", "renders/image_to_text_R@5", "renders/shape_acc1", "new/mean_R@1")


def job(store: Path, stage: str, version: str, settings: dict, **inputs: Path) -> Path:
    """The manifest of a job, as others find it."""
    folder = store / stage / version
    folder.mkdir(parents=True, exist_ok=True)
    links = {
        slot: {"manifest": os.path.relpath(of / "manifest.json", folder)}
        for slot, of in inputs.items()
    }
    about = {"stage": stage, "settings": settings, "inputs": links}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "outputs": {}, **about}))
    return folder


def run(store: Path, name: str, seed: int, train: str, scores: dict[str, list[float]]) -> None:
    """A run with a base and a MoE, of which the base does not depend on how the MoE is trained."""
    base = job(store, "pretrain", f"p{seed}", {"lr": 1, "seed": seed})
    moe = job(store, "finetune_router", f"{train}{seed}", {"train": train, "seed": 9}, init=base)
    lock, lines = {}, [",".join([HEAD, *METRICS])]
    lines.append(",".join(["chance", "", "", "", "", "", "0.01", "0.05", "0.25", "0.01"]))
    for model, of in (("base", base), ("moe", moe)):
        folder = job(store, "evaluate", f"{model}-{of.name}", {"task": "renders"}, model=of)
        lock[f"evaluate/{model}/renders"] = str(folder.relative_to(store))
        after = ["", "", "860"] if model == "base" else ["12000", "3.4e15", "1400"]
        lines.append(",".join([model, "50000", "2.5", *after, *map(str, scores[model])]))
    page = store / "runs" / name / "report"
    page.mkdir(parents=True)
    (page / "results.csv").write_text("\n".join(lines) + "\n")
    (store / "runs" / name / "versions.json").write_text(json.dumps(lock))


BASES = [[0.30, 0.5, 0.8, 0.2], [0.40, 0.5, 0.7, 0.1], [0.35, 0.5, 0.9, 0.3]]
ROUTERS = [[0.33, 0.5, 0.8, 0.2], [0.41, 0.5, 0.8, 0.2], [0.36, 0.5, 0.7, 0.2]]
UNLOCKED = [[0.40, 0.5, 0.6, 0.3], [0.50, 0.5, 0.6, 0.3]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for seed in range(3):
        scores = {"base": BASES[seed], "moe": ROUTERS[seed]}
        run(tmp_path, f"routers_{seed}", seed, "routers", scores)
    for seed in range(2):
        scores = {"base": BASES[seed], "moe": UNLOCKED[seed]}
        run(tmp_path, f"unlocked_{seed}", seed, "experts", scores)
    return tmp_path


def lines_of(text: str) -> dict[str, list[str]]:
    """Model to its cells; cells are two blanks apart."""
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def said(values: list[float], sign: str = "") -> str:
    points = 100 * np.array(values)
    spread = f" +- {points.std(ddof=1):.1f}" if len(points) > 1 else ""
    return f"{points.mean():{sign}.1f}{spread}"


ALL = ["routers_0", "routers_1", "routers_2", "unlocked_0", "unlocked_1"]


def test_seeds_of_one_recipe_are_one_row_and_what_runs_share_counts_once(store):
    rows = lines_of(compare(ALL, store))
    assert set(rows) >= {"model", "chance", "base", "moe (routers)", "moe (unlocked)"}
    assert [rows[name][0] for name in ("base", "moe (routers)", "moe (unlocked)")] == [
        "3",
        "3",
        "2",
    ]
    assert rows["base"][4].rstrip("*") == said([each[0] for each in BASES])
    assert rows["moe (routers)"][4].rstrip("*") == said([each[0] for each in ROUTERS])
    assert rows["moe (unlocked)"][4] == said([each[0] for each in UNLOCKED]) + "*"
    assert rows["base"][5] == said([each[2] for each in BASES]) + "*"


def test_gains_are_over_the_base_of_the_same_run(store):
    rows = lines_of(compare(ALL, store))
    for name, scores in (("moe (routers)", ROUTERS), ("moe (unlocked)", UNLOCKED)):
        pairs = zip(scores, BASES, strict=False)
        assert rows[name][-1] == said([own[0] - base[0] for own, base in pairs], "+")
    assert rows["base"][-1] == "-"


def test_main_metrics_and_costs_are_shown(store):
    rows = lines_of(compare(ALL, store))
    assert rows["model"][:4] == ["seeds", "after", "FLOP", "FLOP/pair"]
    assert rows["model"][4:7] == ["renders/R@1", "renders/shape", "new/R@1"]
    assert rows["moe (routers)"][1:4] == ["12k", "3.4P", "1.4k"]
    assert rows["base"][1:4] == ["-", "-", "860"]
    assert rows["chance"] == ["1.0", "25.0", "1.0"]


def test_one_run_has_no_spread_and_names_no_runs(store):
    rows = lines_of(compare(["unlocked_1"], store))
    assert rows["moe"][4] == "50.0*" and rows["moe"][-1] == "+10.0"
    assert compare(["unlocked_1"] * 2, store) == compare(["unlocked_1"], store)


def test_a_setting_far_upstream_makes_another_row_and_a_seed_does_not(store):
    for seed, recipe in ((0, {"lr": 1}), (1, {"lr": 2})):
        path = store / f"pretrain/p{seed}/manifest.json"
        about = json.loads(path.read_text())
        path.write_text(json.dumps(about | {"settings": recipe | {"seed": 40 + seed}}))
    rows = lines_of(compare(["routers_0", "routers_1", "routers_2"], store))
    counts = {name: cells[0] for name, cells in rows.items() if name.startswith("moe")}
    assert counts == {"moe (routers)": "2", "moe (routers_1)": "1"}


def test_how_fast_a_training_is_and_what_watches_it_make_no_other_row(store):
    base = store / "pretrain/p1"
    watch = {"task": "renders", "every": 8, "best": False}
    changes = {"compile": True, "parallel": "fsdp", "watch": watch}
    job(store, "pretrain", "p1", {"lr": 1, "seed": 1, **changes}, watched=store / "nowhere")
    assert "watched" in (base / "manifest.json").read_text()
    plain = job(store, "pretrain", "p0", {"lr": 1, "seed": 0, "watch": None, "compile": False})
    assert plain.exists()
    rows = lines_of(compare(ALL[:2], store))
    assert rows["base"][0] == rows["moe"][0] == "2"


def test_probes_have_a_table_of_their_own_with_random_weights_of_all_seeds(store):
    for seed, guess in enumerate(("0.2", "0.4")):
        folder = job(store, "evaluate", f"untrained-{seed}", {"task": "renders", "untrained": seed})
        lock = store / f"runs/routers_{seed}/versions.json"
        about = json.loads(lock.read_text())
        about["evaluate/untrained/renders"] = str(folder.relative_to(store))
        lock.write_text(json.dumps(about))
        page = store / f"runs/routers_{seed}/report/results.csv"
        head, chance, base, moe = page.read_text().splitlines()
        empty = "untrained" + "," * head.count(",")
        probed = [f"{head},renders/probe_size_acc", f"{chance},0.5", f"{base},0.9", f"{moe},0.8"]
        page.write_text("\n".join([*probed, f"{empty},{guess}"]) + "\n")
    main, probes, note = compare(["routers_0", "routers_1"], store).split("\n\n")
    assert "untrained" not in main and "probe" not in main and note.startswith("per cent")
    assert lines_of(probes) == {
        "model": ["seeds", "renders/probe:size"],
        "chance": ["50.0"],
        "base": ["2", "90.0 +- 0.0*"],
        "moe": ["2", "80.0 +- 0.0"],
        "untrained": ["2", said([0.2, 0.4])],
    }


def test_a_run_without_a_report_is_named(store):
    with pytest.raises(ConfigError, match=r"run 'nil' has no .*results.csv. Hint: snakemake"):
        compare(["routers_0", "nil"], store)
    command = [sys.executable, "-m", "clipgraft.runs", "compare", "nil"]
    done = subprocess.run(command, cwd=store, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("compare: run 'nil' has no results/runs")
    store.rename(store.with_name("results"))
    command[3:] = ["show", "nil"]
    done = subprocess.run(command, cwd=store.parent, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("show: run 'nil' has no results/runs/nil/report/results.txt")
    assert "routers_2, unlocked_0" in done.stderr


def test_a_job_may_take_the_place_of_a_folder_of_jobs(tmp_path):
    link_run("x", {"download/train/a": "download/1", "download/train/b": "download/2"}, tmp_path)
    link_run("x", {"download/train": "download/3"}, tmp_path)
    assert os.readlink(tmp_path / "runs/x/download/train") == "../../../download/3"
    link_run("x", {"download/train/a": "download/1"}, tmp_path)
    assert os.readlink(tmp_path / "runs/x/download/train/a") == "../../../../download/1"


def test_a_table_is_shown_after_a_run_only_if_its_page_is_the_planned_one(tmp_path):
    for version in ("old", "new"):
        (tmp_path / "report" / version).mkdir(parents=True)
        (tmp_path / "report" / version / "results.txt").write_text(f"{version} table")
    assert list(shown({"x": "report/old"}, tmp_path)) == []  # not linked yet
    link_run("x", {"report": "report/old"}, tmp_path)
    (table,) = shown({"x": "report/old", "y": "report/old"}, tmp_path)
    assert "old table" in table
    assert list(shown({"x": "report/new"}, tmp_path)) == []


def test_runs_with_other_metrics_each_have_their_own_best_expert(store):
    for name in ("routers_0", "routers_1"):
        folder = store / "runs" / name
        lock, lines = json.loads((folder / "versions.json").read_text()), []
        for k in (1, 2):
            expert = job(store, "finetune_expert", f"{name}{k}", {"round": k})
            done = job(store, "evaluate", f"{name}-{k}", {"task": "renders"}, model=expert)
            lock[f"evaluate/expert_{k}/renders"] = str(done.relative_to(store))
            lines.append(f"expert_{k},1,1,1,1,1,{k / 10},0.5,0.5,0.5\n")
        (folder / "versions.json").write_text(json.dumps(lock))
        page = folder / "report/results.csv"
        page.write_text(page.read_text() + "".join(lines))
    page = store / "runs/routers_1/report/results.csv"
    page.write_text(page.read_text().replace("mean_R@1", "mean_R@10"))  # accuracy leads
    for order in (["routers_0", "routers_1"], ["routers_1", "routers_0"]):
        assert any(name.startswith("best expert") for name in lines_of(compare(order, store)))


def test_the_best_expert_of_each_run_is_a_row(store):
    scores = [[0.1, 0.6, 0.2], [0.5, 0.2, 0.4], [0.2, 0.1, 0.3]]
    for seed, of in enumerate(scores):
        folder = store / f"runs/routers_{seed}"
        lock = json.loads((folder / "versions.json").read_text())
        for k, score in enumerate(of, start=1):
            base = store / f"pretrain/p{seed}"
            expert = job(store, "finetune_expert", f"e{k}{seed}", {"round": k}, init=base)
            done = job(store, "evaluate", f"e{k}-{seed}", {"task": "renders"}, model=expert)
            lock[f"evaluate/expert_{k}/renders"] = str(done.relative_to(store))
            with (folder / "report/results.csv").open("a") as file:
                file.write(f"expert_{k},1,1,1,1,1,{score},0.5,0.5,0.5\n")
        (folder / "versions.json").write_text(json.dumps(lock))
    rows = lines_of(compare(ALL[:3], store))
    assert rows["best expert"][0] == "3"
    assert rows["best expert"][4].rstrip("*") == said([max(of) for of in scores])
    gains = [max(of) - base[0] for of, base in zip(scores, BASES, strict=True)]
    assert rows["best expert"][-1] == said(gains, "+")
    assert rows["expert 1"][4] == said([of[0] for of in scores])


def measure_also(store: Path, name: str, task: str, templates: str, scores: dict[str, str]) -> None:
    """Give a run a second task; jobs are shared by runs that set it alike."""
    folder = store / "runs" / name
    lock = json.loads((folder / "versions.json").read_text())
    for model in ("base", "moe"):
        first = Path(lock[f"evaluate/{model}/renders"])
        of = (store / first / "manifest.json").read_text()
        seen = (store / first / json.loads(of)["inputs"]["model"]["manifest"]).resolve().parent
        version = f"{first.name}-{task}-{templates}"
        done = job(store, "evaluate", version, {"task": task, "templates": templates}, model=seen)
        lock[f"evaluate/{model}/{task}"] = str(done.relative_to(store))
    (folder / "versions.json").write_text(json.dumps(lock))
    page = folder / "report/results.csv"
    head, chance, *models = page.read_text().splitlines()
    told = [f"{line},{scores.get(line.partition(',')[0], '')}" for line in models]
    page.write_text("\n".join([f"{head},{task}/class_acc1", f"{chance},0.1", *told]) + "\n")


def test_seeds_whose_second_task_was_set_differently_are_not_averaged(store):
    for seed, templates in enumerate(("plain", "prompts", "prompts")):
        scores = {"base": f"0.{seed + 1}", "moe": f"0.{seed + 2}"}
        measure_also(store, f"routers_{seed}", "cifar", templates, scores)
    rows = lines_of(compare(ALL[:3], store))
    assert rows["base (routers_0)"][0] == "1" and rows["base (routers)"][0] == "2"
    assert rows["base (routers_0)"][7] == "10.0"
    assert rows["base (routers)"][7] == said([0.2, 0.3])


def test_runs_of_one_model_with_other_second_tasks_both_keep_their_numbers(store):
    run(store, "again", 0, "routers", {"base": BASES[0], "moe": ROUTERS[0]})
    measure_also(store, "routers_0", "cifar", "plain", {"base": "0.2", "moe": "0.3"})
    measure_also(store, "again", "cifar", "prompts", {"base": "0.8", "moe": "0.9"})
    rows = lines_of(compare(["routers_0", "again"], store))
    assert [rows[f"moe ({name})"][7] for name in ("routers_0", "again")] == ["30.0", "90.0*"]


@pytest.mark.parametrize("last", ["routers_0", "again"])
def test_a_run_with_fewer_tasks_takes_no_numbers_from_another(store, last):
    run(store, "again", 0, "routers", {"base": BASES[0], "moe": ROUTERS[0]})
    measure_also(store, "routers_0", "cifar", "plain", {"base": "0.2", "moe": "0.3"})
    first = "again" if last == "routers_0" else "routers_0"
    rows = lines_of(compare([first, last], store))
    assert rows["moe (routers_0)"][7] == "30.0*" and rows["moe (again)"][7] == "-"
    assert rows["moe (routers_0)"][4] == rows["moe (again)"][4] == "33.0*"


def test_a_metric_that_no_model_has_is_a_column_of_dashes(store):
    measure_also(store, "routers_0", "cifar", "plain", {})
    rows = lines_of(compare(["routers_0"], store))
    assert rows["base"][7] == rows["moe"][7] == "-"


def test_the_average_of_a_part_of_an_evaluation_folder_is_shown_and_leads(store):
    for name in ("routers_0", "routers_1"):
        page = store / f"runs/{name}/report/results.csv"
        head, chance, base, moe = page.read_text().splitlines()
        head = f"{HEAD},evalset/VTAB (1/13),evalset/Average (3/38),evalset/mnist,evalset/cifar10"
        costs = [",".join(line.split(",")[:6]) for line in (chance, base, moe)]
        scores = ["0.1,0.2,0.1,0.1", "0.5,0.6,0.7,0.7", "0.5,0.8,0.9,0.9"]
        lines = [f"{cost},{score}" for cost, score in zip(costs, scores, strict=True)]
        page.write_text("\n".join([head, *lines]) + "\n")
    rows = lines_of(compare(["routers_0", "routers_1"], store))
    assert rows["model"][4:] == ["evalset/Average (3/38)", "over base"]
    assert rows["chance"] == ["20.0"]
    assert rows["moe"][4:] == ["80.0 +- 0.0*", "+20.0 +- 0.0"]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (["evalset/own", "evalset/mmvp_vlm"], ["evalset/own", "evalset/mmvp_vlm"]),
        (["evalset/VTAB (2/13)", "evalset/vtab/dtd"], ["evalset/VTAB (2/13)"]),
        (["evalset/Average", "evalset/VTAB", "evalset/cifar10"], ["evalset/Average"]),
    ],
)
def test_of_a_folder_without_an_average_its_own_metrics_are_shown(store, columns, shown):
    for path in store.glob("runs/*/report/results.csv"):
        lines = [line.split(",")[:6] for line in path.read_text().splitlines()]
        scores = [columns, ["0.1"] * 3, ["0.3", "0.2", "0.4"], ["0.5", "0.4", "0.6"]]
        with_scores = [
            [*line, *own[: len(columns)]] for line, own in zip(lines, scores, strict=True)
        ]
        path.write_text("".join(",".join(line) + "\n" for line in with_scores))
    rows = lines_of(compare(["routers_0"], store))
    assert rows["model"][4:] == [*shown, "over base"]
    assert rows["moe"][4] == "50.0*" and rows["moe"][-1] == "+20.0"
