"""Laws of the page of several runs: its numbers are those of the runs, by another way."""

import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipgraft.report.comparison import comparison

HEAD = "model,samples_seen,minutes,samples_after,flops_after,flops_per_pair,renders/mean_R@1,renders/shape_acc1"
SCORES = {"plain_0": (0.30, 0.8), "plain_1": (0.34, 0.7), "global_0": (0.42, 0.9)}
STEPS = 4
KINDS = {"plain": "contrastive", "global": "rgcl_g", "sigmoid": "siglip"}


def job(store: Path, stage: str, version: str, settings: dict, **inputs: Path) -> Path:
    folder = store / stage / version
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "stage": stage,
        "settings": settings,
        "seconds": 60.0,
        "inputs": {
            slot: {"manifest": os.path.relpath(of / "manifest.json", folder)}
            for slot, of in inputs.items()
        },
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "outputs": {}, **about}))
    return folder


def run(store: Path, name: str) -> None:
    """A run that pretrains with one loss, at lengths that differ between losses."""
    kind, seed = name.split("_")
    loss = {"kind": KINDS[kind], "rho": 8.0}
    folder = job(store, "pretrain", f"{kind}{seed}", {"loss": loss, "lr": 0.1, "seed": int(seed)})
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens = {"image_tokens": 50 if kind == "plain" else 17, "text_tokens": 16}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "samples_seen": 400, **tokens}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            row = {"samples_seen": 100 * step, "seconds": 15.0 * step, "loss": 4.0 / step}
            row |= (
                {"gcl": -1.0, "infonce": 3.0 / step} if kind == "global" else {"pair": row["loss"]}
            )
            file.write(json.dumps(row) + "\n")
    evaluated = job(store, "evaluate", f"e{kind}{seed}", {"task": "renders"}, model=folder)
    page = store / "runs" / name / "report"
    page.mkdir(parents=True)
    lines = [
        HEAD,
        "chance,,,,,,0.01,0.25",
        "base,400,2.5,,,860,{},{}".format(*SCORES.get(name, (0.2, 0.5))),
    ]
    (page / "results.csv").write_text("\n".join(lines) + "\n")
    if kind == "plain":  # reports of before did not say
        (page / "manifest.json").write_text(json.dumps({"settings": {"seed": int(seed)}}))
    lock = {"pretrain/full": folder, "evaluate/base/renders": evaluated}
    written = {name: str(of.relative_to(store)) for name, of in lock.items()}
    (page.parent / "versions.json").write_text(json.dumps(written))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("results")
    for name in SCORES:
        run(results, name)
    return results


@pytest.fixture(scope="module")
def page(store) -> str:
    return comparison(list(SCORES), store)


def rows_of(page: str, title: str) -> dict[str, list[str]]:
    """First cell of each row of a table to the others."""
    table = page.split(f"<h3>{title}</h3>")[1].split("</table>")[0]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in table.split("<tr")[1:]]
    plain = [[re.sub(r"<[^>]*>", "", cell).strip() for cell in row] for row in rows]
    return {row[0]: row[1:] for row in plain if row}


def series(page: str, figure: str) -> list[dict[str, str]]:

    carried = re.search(rf'download="{figure}.csv" href="data:text/csv;base64,([^"]*)"', page)
    assert carried, figure
    return list(csv.DictReader(io.StringIO(base64.b64decode(carried[1]).decode())))


def test_seeds_of_one_recipe_are_one_row_with_their_spread(page):
    rows = rows_of(page, "All models")
    points = 100 * np.array([SCORES["plain_0"], SCORES["plain_1"]])
    means, spreads = points.mean(axis=0), points.std(axis=0, ddof=1)
    said = [f"{m:.1f} +- {s:.1f}" for m, s in zip(means, spreads, strict=True)]
    assert rows["base (plain)"][0] == "2" and rows["base (plain)"][4:6] == said
    assert rows["base (global_0)"][4:6] == ["42.0", "90.0"]
    assert "is that of base (global_0): 42.0 %" in page


def test_what_differs_is_shown_and_what_does_not_is_not(page):
    rows = rows_of(page, "What differs")
    assert rows["pretrain/full: loss.kind"] == ["contrastive", "contrastive", "rgcl_g"]
    assert [name for name in rows if "rho" in name or "lr" in name or "seed" in name] == []


def test_each_run_stands_with_its_seed(page):
    rows = rows_of(page, "Runs")
    assert {name: rows[name][-1] for name in SCORES} == {
        "plain_0": "0",
        "plain_1": "1",
        "global_0": "-",
    }


def test_losses_are_those_of_the_metrics(page):
    rows = series(page, "compare_pretrain_loss")
    assert len(rows) == 3 * STEPS
    own = [float(r["loss"]) for r in rows if r["model"] == "global_0: full"]
    assert own == [4.0 / step for step in range(1, STEPS + 1)]
    assert float(rows[-1]["hours"]) == 60 / 3600


def test_losses_of_all_kinds_are_compared_by_infonce(page):
    rows = series(page, "compare_pretrain_infonce")
    last = {r["model"]: float(r["loss"]) for r in rows if r["samples_seen"] == "400"}
    assert last == {"plain_0: full": 1.0, "plain_1: full": 1.0, "global_0: full": 0.75}


def test_the_sigmoid_loss_is_not_taken_for_infonce(store):
    run(store, "sigmoid_0")
    page = comparison(["global_0", "sigmoid_0"], store)
    assert {r["model"] for r in series(page, "compare_pretrain_infonce")} == {"global_0: full"}


def test_runs_of_different_lengths_are_held_against_their_tokens(page, store):
    rows = series(page, "compare_tokens")
    assert [(r["run"], r["tokens"]) for r in rows] == [
        ("plain_0", "66"), ("plain_1", "66"), ("global_0", "33"),
    ]  # fmt: skip
    assert [float(r["per_cent"]) for r in rows] == [100 * each[0] for each in SCORES.values()]
    assert "compare_tokens" not in comparison(["plain_0", "plain_1"], store)


def test_the_command_writes_one_file_and_names_a_run_without_a_report(store, tmp_path):
    def told(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "clipgraft.report", "--results", str(store), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert told("plain_0", "global_0", "--page", "new/out.html").returncode == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.html"]
    done = told("plain_0", "nowhere")
    assert done.returncode == 1 and "run 'nowhere' has no" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_without_the_last_task_of_another_is_on_the_page(tmp_path):
    for name in ("plain_0", "plain_1"):
        run(tmp_path, name)
    page = tmp_path / "runs/plain_0/report/results.csv"
    page.write_text(page.read_text().replace(",0.8\n", ",\n"))  # it is in the head alone
    assert rows_of(comparison(["plain_0"], tmp_path), "All models")["base"][5] == "-"


def test_runs_on_own_data_sets_of_a_folder_have_their_results_on_the_page(tmp_path):
    for name in ("plain_0", "plain_1"):
        run(tmp_path, name)
        path = tmp_path / f"runs/{name}/report/results.csv"
        own = path.read_text().replace("renders/mean_R@1,renders/shape_acc1", "evalset/a,evalset/b")
        path.write_text(own)
    page = comparison(["plain_0", "plain_1"], tmp_path)
    means = 100 * np.mean([SCORES["plain_0"], SCORES["plain_1"]], axis=0)
    cells = rows_of(page, "All models")["base"][4:6]
    assert [cell.split(" ")[0] for cell in cells] == [f"{each:.1f}" for each in means]
    assert "The highest evalset/a is that of base" in page
