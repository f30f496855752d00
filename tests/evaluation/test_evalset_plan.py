"""Laws of planning and adding up evaluation folders; no model is needed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from evalsets import pictures, write_arrow, write_classes, write_mmvp

from clipgraft.config import ConfigError, load_config, merge
from clipgraft.evalset_tasks import AGGREGATES, AVERAGED, TASKS, chosen
from clipgraft.evaluation.evalset.aggregate import aggregate, results_lines, summary
from clipgraft.planning import plan_runs
from clipgraft.report.evalset import means_of, rows_of

SMALL = yaml.safe_load((Path(__file__).parents[1] / "config" / "small.yaml").read_text())


@pytest.fixture
def root(tmp_path) -> Path:
    names = list("abcdefghij")
    write_classes(tmp_path / "wds_cifar10_test", pictures(4), range(4), names)
    write_classes(tmp_path / "wds_own_test", pictures(4), range(4), names)
    write_mmvp(tmp_path / "MMVP_VLM", pictures(2), ["red", "blue"], ["Color"])
    return tmp_path


def planned(evalset: dict) -> dict[str, object]:
    raw = merge(copy.deepcopy(SMALL), {"evaluate": {"evalset": evalset}})
    return {job.name: job for job in plan_runs(load_config(raw), {})["small"]}


def test_each_task_that_is_there_is_a_job_of_each_model(root):
    jobs = planned({"folder": str(root)})
    tasks = {name.partition("/evalset/")[2] for name in jobs if "/evalset/" in name}
    assert tasks == {"cifar10", "mmvp_vlm", "own"}
    models = {name.split("/")[1] for name in jobs if "/evalset/" in name}
    renders = [name.split("/") for name in jobs]
    assert models == {parts[1] for parts in renders if parts[::2] == ["evaluate", "renders"]}
    job = jobs["evaluate/moe/evalset/cifar10"]
    assert job.settings == {"folder": str(root), "evalset": "cifar10"}
    assert job.inputs == {"model": jobs["finetune_router/moe"]}
    assert "evaluate/moe/evalset/cifar10" in jobs["report"].inputs
    assert "evaluate/base/evalset/cifar10" not in planned({"folder": str(root), "tasks": ["own"]})


def test_changed_data_change_what_a_job_is_told_and_not_its_version(root):
    before = planned({"folder": str(root)})
    (root / "wds_cifar10_test" / "classnames.txt").write_text("\n".join("abcdefghik2"))
    after = planned({"folder": str(root)})
    one, other = (jobs["evaluate/base/evalset/cifar10"] for jobs in (before, after))
    assert one.version == other.version and one.sources != other.sources
    one, other = (jobs["evaluate/base/evalset/own"] for jobs in (before, after))
    assert one.sources == other.sources


@pytest.mark.parametrize(
    ("evalset", "message"),
    [
        ({"folder": "nowhere"}, "evaluation folder nowhere does not exist"),
        ({"folder": ".", "tasks": ["cifar01"]}, "is no evaluation folder|did you mean `cifar10`"),
        ({"folder": ".", "tasks": []}, "evaluate.evalset.tasks"),
        ({"folder": ".", "task": ["cifar10"]}, "unknown key `task` in evaluate.evalset"),
    ],
)
def test_mistakes_are_found_before_anything_runs(evalset, message):
    with pytest.raises(ConfigError, match=message):
        planned(evalset)


def test_a_task_cannot_have_the_name_of_the_folder_of_results(root):
    tasks = {"evalset": {"data": "renders", "retrieval": True}}
    changes = {"evaluate": {"evalset": {"folder": str(root)}, "tasks": tasks}}
    with pytest.raises(ConfigError, match=r"evaluate\.tasks\.evalset.* Hint: another name"):
        load_config(merge(copy.deepcopy(SMALL), changes))


def test_the_table_is_that_of_datacomp():
    assert len(TASKS) == 41 and len(AVERAGED) == 38
    assert sum(task.num_classes or 0 for task in AVERAGED) == 5630
    sizes = {name: len(keys) for name, keys in AGGREGATES.items()}
    assert sizes == {
        "ImageNet": 1,
        "ImageNet dist. shifts": 6,
        "VTAB": 13,
        "Retrieval": 3,
        "Average": 38,
    }
    assert all(key in TASKS for keys in AGGREGATES.values() for key in keys)


def results(values: dict[str, float | None]) -> dict[str, dict]:
    return {
        key: {
            "dataset": TASKS[key].name,
            "metrics": {"acc1": value, "main_metric": value},
            "main_metric": TASKS[key].main_metric,
            "chance": 0.5,
            "size": 9,
            "partial": [],
        }
        for key, value in values.items()
    }


def published_average(lines: str) -> dict[str, float]:
    """What DataComp's own script makes of a file: it wants exactly 38 lines with a main metric."""
    rows = [json.loads(line) for line in lines.splitlines()]
    main = {row["dataset"]: row["metrics"]["main_metric"] for row in rows}
    main = {name: value for name, value in main.items() if value is not None}
    assert len(main) == 38
    shifts = "ImageNet Sketch|ImageNet v2|ImageNet-A|ImageNet-O|ImageNet-R|ObjectNet".split("|")
    vtab = (
        "Caltech-101|CIFAR-100|CLEVR Counts|CLEVR Distance|Describable Textures|EuroSAT|KITTI Vehicle Distance|"
        "Oxford Flowers-102|Oxford-IIIT Pet|PatchCamelyon|RESISC45|SVHN|SUN397"
    ).split("|")
    return {
        "ImageNet": main["ImageNet 1k"],
        "ImageNet dist. shifts": float(np.mean([main[name] for name in shifts])),
        "VTAB": float(np.mean([main[name] for name in vtab])),
        "Retrieval": float(np.mean([main[name] for name in ("Flickr", "MSCOCO", "WinoGAViL")])),
        "Average": float(np.mean(list(main.values()))),
    }


def test_a_whole_folder_adds_up_to_the_published_averages():
    rng = np.random.default_rng(0)
    found = results(
        {key: float(rng.random()) if task.main_metric else None for key, task in TASKS.items()}
    )
    found["own"] = {**found["cifar10"], "dataset": "own"}
    expected = published_average(results_lines(found))
    total = aggregate(found)
    assert {name: total[name] for name in expected} == pytest.approx(expected)
    assert total["missing"] == [] and summary(total) == "38/38 averaged tasks"
    assert total["not_averaged"] == {
        key: found[key]["metrics"]["main_metric"] for key in ("mmvp_vlm", "own")
    }


def test_what_is_missing_is_named_and_not_averaged_away():
    found = results({"cifar10": 0.5, "vtab/dtd": 0.25, "imagenet1k": 0.125})
    found["vtab/dtd"]["partial"] = ["3 samples instead of 1,880"]
    found["mnist"] = {"failed": "0.tar is damaged"}
    total = aggregate(found)
    assert total["ImageNet"] == 0.125
    assert total["VTAB"] is None and total["Average"] is None
    assert total["present"]["Average"] == "3/38" and total["present"]["VTAB"] == "1/13"
    assert total["mean_of_present"]["Average"] == pytest.approx(0.875 / 3)
    assert "MNIST" not in total["missing"] and "Flickr" in total["missing"]
    assert len(total["missing"]) == 34
    assert total["failed"] == {"mnist": "0.tar is damaged"}
    assert "failed: mnist" in summary(total) and "missing: Caltech-101, " in summary(total)
    assert [json.loads(line)["key"] for line in results_lines(found).splitlines()] == [
        "cifar10",
        "vtab/dtd",
        "imagenet1k",
    ]


def test_a_partial_task_keeps_an_average_from_its_name():
    found = results({task.key: 0.5 for task in AVERAGED})
    assert aggregate(found)["Average"] == 0.5
    found["mnist"]["partial"] = ["1 of 2 tars missing: 0.tar"]
    assert aggregate(found)["Average"] is None and aggregate(found)["Retrieval"] == 0.5


def test_models_are_compared_on_the_same_tasks_alone():
    base = results({"cifar10": 0.5, "mnist": 0.25})
    moe = {**results({"cifar10": 0.75}), "mnist": {"failed": "0.tar is damaged"}}
    means = {name: values for name, values, *_ in means_of({"base": base, "moe": moe})}
    assert means == {"Average (2/38)": {"base": pytest.approx(0.375)}}
    cifar, mnist = rows_of({"base": base, "moe": moe})
    assert cifar.values == {"base": 0.5, "moe": 0.75} and mnist.failed == {"moe": "failed"}
    assert mnist.notes == "0.tar is damaged"


def test_further_data_sets_are_tasks_by_the_name_of_their_folder(root):
    own = next(task for task in chosen(root) if task.key == "own")
    assert (own.main_metric, own.is_averaged, own.size) == ("acc1", False, None)
    (root / "wds_own_test" / "dataset_type.txt").write_text("retrieval")
    assert chosen(root, ["own"])[0].main_metric == "mean_recall@1"


def test_trouble_with_one_task_is_that_of_its_job_alone(root):
    """A type that is none, and two versions in the cache: each job will say so; a plan is made of all."""
    whole = set(planned({"folder": str(root)}))
    (root / "wds_own_test" / "dataset_type.txt").write_text("retrievals")
    for version in ("a", "b"):
        place = root / "hf_cache" / "nlphuji___winogavil" / version
        write_arrow(place / "winogavil-test.arrow", [{"image": b"", "caption": ["red"]}])
    jobs = planned({"folder": str(root)})
    new = {name.partition("/evalset/")[2] for name in jobs.keys() - whole}
    assert new == {"misc/winogavil"} and whole < jobs.keys()
    (place / "winogavil-test.arrow").unlink()  # mends it, so that the job must run again
    after = planned({"folder": str(root)})
    name = "evaluate/base/evalset/misc/winogavil"
    assert jobs[name].sources != after[name].sources


def test_of_named_tasks_the_others_are_not_looked_for(root, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "clipgraft.evalset_tasks.is_there", lambda root, task: asked.append(task.key) or True
    )
    assert [task.key for task in chosen(root, ["own", "cifar10"])] == ["cifar10", "own"] == asked
