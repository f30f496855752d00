"""Versions: what changes one, what does not, and what an edit of the code reaches."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from clipgraft.config import ConfigError, load_config, merge, sweep_points
from clipgraft.settings import IndexJob
from clipgraft.versions import _sources, local_files, plan_run, plan_runs

ROOT = Path(__file__).resolve().parent.parent
SMALL = yaml.safe_load((ROOT / "tests/config/small.yaml").read_text())


def versions(overlay: dict) -> dict[str, str]:
    run = load_config(merge(copy.deepcopy(SMALL), overlay))["small"]
    return {job.name: job.version for job in plan_run("small", run)}


def differing(overlay: dict) -> set[str]:
    before, after = versions({}), versions(overlay)
    return {name.split("/")[0] for name in before if before[name] != after.get(name)}


@pytest.mark.parametrize(
    ("overlay", "stages"),
    [
        ({"report": {"title": "x"}}, {"report"}),
        ({"finetune_router": {"samples_seen": 32}}, {"finetune_router", "evaluate", "report"}),
        ({"moe": {"top_k": 1}}, {"assemble", "finetune_router", "evaluate", "report"}),
        (
            {"cluster": {"num_tries": 1}},
            {
                "cluster",
                "embed",
                "finetune_expert",
                "assemble",
                "finetune_router",
                "evaluate",
                "report",
            },
        ),
        ({"resources": {"pretrain": {"gpu": 8, "threads": 2}}}, set()),
    ],
)
def test_a_setting_changes_its_stage_and_what_follows(overlay, stages):
    assert differing(overlay) == stages


def test_a_router_setting_leaves_the_evaluation_of_other_models_alone():
    before, after = versions({}), versions({"finetune_router": {"samples_seen": 32}})
    assert {name for name in before if before[name] != after[name]} == {
        "finetune_router",
        "evaluate/moe/renders",
        "report",
    }


def test_the_same_settings_give_the_same_versions_in_another_process():
    code = (
        "import json, yaml; from clipgraft.config import load_config; from clipgraft.versions import plan_run;"
        f"raw = yaml.safe_load(open({str(ROOT / 'tests/config/small.yaml')!r}));"
        "print(json.dumps({j.name: j.version for j in plan_run('small', load_config(raw)['small'])}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == versions({})


def test_names_of_data_sets_and_runs_are_no_part_of_versions():
    raw = merge(copy.deepcopy(SMALL), {"download": {"again": SMALL["download"]["train"]}})
    jobs = {job.name: job for job in plan_run("other", load_config(raw)["small"])}
    assert jobs["download/again"].version == jobs["download/train"].version
    renamed, before = {name: job.version for name, job in jobs.items()}, versions({})
    assert {name for name in before if renamed[name] != before[name]} == {"report"}


def test_every_model_meets_every_task_and_inputs_come_before_users():
    jobs = plan_run("small", load_config(SMALL)["small"])
    evaluated = {job.name.split("/")[1] for job in jobs if job.stage == "evaluate"}
    assert evaluated == {"short", "base", "expert_1", "expert_2", "control", "upcycled", "moe"}
    seen: set[str] = set()
    for job in jobs:
        assert {of.name for of in job.inputs.values()} <= seen
        seen.add(job.name)


def test_a_run_without_experts_stops_at_the_base_and_shares_it():
    raw = {key: value for key, value in SMALL.items() if not key.startswith("finetune")}
    raw["moe"] = None
    jobs = {job.name: job.version for job in plan_run("small", load_config(raw)["small"])}
    stages = {name.split("/")[0] for name in jobs}
    assert stages == {"download", "index", "shard", "pretrain", "evaluate", "report"}
    evaluated = {name for name in jobs if name.startswith("evaluate")}
    assert evaluated == {"evaluate/short/renders", "evaluate/base/renders"}
    whole = versions({})
    assert {name for name in jobs if jobs[name] != whole[name]} == {"report"}
    assert plan_run("small", load_config(merge(SMALL, {"moe": None}))["small"]) == plan_run(
        "small", load_config(raw)["small"]
    )


WIDER = {"model": {"config": {"vision_cfg": {"width": 64}}}}
SWEEP = {
    "size": {"one": None, "two": WIDER},
    "image": {"i16": {}, "i8": {"pretrain": {"short": {"image_size": 8}}}},
    "seed": {"s0": {"seed": 0}, "s1": {"seed": 1}},
}


def planned_sweep() -> dict[str, list]:
    raw = {**copy.deepcopy(SMALL), "moe": None, "sweep": SWEEP}
    return plan_runs(load_config(raw), sweep_points(raw))


def test_runs_of_a_sweep_share_their_data_and_differ_in_training():
    plans = planned_sweep()
    jobs = {(job.stage, job.version): job for plan in plans.values() for job in plan}
    counts = Counter(stage for stage, _ in jobs)
    # `small` is a run beside the sweep, and is one of its points: it adds a report only.
    assert counts == {
        "download": 2,
        "index": 2,
        "shard": 3,  # 8, 16 and 32 px
        "pretrain": 16,
        "evaluate": 16,
        "report": 9,
        "scaling": 1,
    }


def test_the_page_of_a_sweep_reads_the_phases_of_its_runs_and_how_they_did():
    plans = planned_sweep()
    [page] = plans.pop("sweep")
    points = {each["run"]: each["point"] for each in page.settings["runs"]}
    assert points["two-i8-s1"] == {"size": "two", "image": "i8", "seed": "s1"}
    assert list(points)[:2] == ["one-i16-s0", "one-i16-s1"] and len(points) == 8
    wanted = ("pretrain/short", "pretrain/full", "evaluate/short/renders", "evaluate/base/renders")
    assert set(page.inputs) == {f"{run}/{job}" for run in points for job in wanted}
    for name, job in page.inputs.items():
        run, _, rest = name.partition("/")
        assert job in plans[run] and job.name == rest


@pytest.fixture
def code(tmp_path: Path) -> Path:
    for folder in ("lib", "scripts"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def fingerprints(root: Path) -> dict[str, str]:
    program = (
        "import json, sys; from pathlib import Path; from clipgraft.versions import fingerprint;"
        "print(json.dumps({p.stem: fingerprint(p) for p in Path(sys.argv[1]).glob('*.py')}))"
    )
    command = [sys.executable, "-c", program, str(root / "scripts")]
    environment = {"PYTHONPATH": str(root / "lib")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


def touched(root: Path, before: dict[str, str]) -> set[str]:
    after = fingerprints(root)
    return {stage for stage in before if before[stage] != after[stage]}


def test_comments_docstrings_and_layout_are_not_code(code: Path):
    before = fingerprints(code)
    for file in (code / "lib/clipgraft/cluster.py", code / "scripts/cluster.py"):
        text = file.read_text()
        head, _, tail = text.partition('"""')
        _, _, rest = tail.partition('"""')
        file.write_text(f'{head}"""Another docstring."""\n# a comment\n\n\n{rest}\n# the end\n')
    assert touched(code, before) == set()


def test_code_reaches_exactly_the_stages_that_use_it(code: Path):
    before = fingerprints(code)

    def edit(file: str) -> set[str]:
        path = code / file
        text = path.read_text()
        path.write_text(text + "\n_EDITED = 1\n")
        reached = touched(code, before)
        path.write_text(text)
        return reached

    assert edit("scripts/embed.py") == {"embed"}
    assert edit("lib/clipgraft/losses/balance.py") == {"finetune_router"}
    assert edit("lib/clipgraft/report/report.py") == {"report"}
    assert edit("lib/clipgraft/report/scaling.py") == {"scaling"}
    assert edit("lib/clipgraft/cluster.py") == {"cluster"}
    assert edit("lib/clipgraft/models/moe.py") == {"assemble", "finetune_router", "evaluate"}
    assert edit("lib/clipgraft/experts.py") == {"finetune_expert"}
    assert edit("lib/clipgraft/job.py") == set()


def test_a_glob_that_matches_nothing_or_an_unset_variable_is_named(tmp_path: Path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no file matches.*\*\.tar"):
        local_files(str(tmp_path / "*.tar"))
    with pytest.raises(ConfigError, match="environment variable"):
        local_files("$CLIPGRAFT_SURELY_UNSET/x.tar")
    (tmp_path / "b.tar").touch()
    (tmp_path / "a.tar").touch()
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    assert [path.name for path in local_files("$SOME_DATA/*.tar")] == ["a.tar", "b.tar"]


def test_what_is_remembered_of_code_is_dropped_when_the_file_changes(tmp_path):
    shutil.copytree(
        ROOT / "lib/clipgraft", tmp_path / "clipgraft", ignore=shutil.ignore_patterns("__pycache__")
    )
    script = tmp_path / "script.py"
    command = [sys.executable, "-c", "import sys; from pathlib import Path; "]
    command[-1] += "from clipgraft.versions import fingerprint as f; print(f(Path(sys.argv[1])))"

    def told(text: str) -> str:
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([*command, script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    memo = tmp_path / "clipgraft/__pycache__/fingerprints.json"
    first = told("import clipgraft.losses.balance\nx = 1\n")
    assert str(script) in memo.read_text()
    assert told("import clipgraft.losses.balance\nx = 1\n") == first
    assert told("import clipgraft.losses.balance\nx = 2\n") != first  # as long as before
    module = tmp_path / "clipgraft/losses/balance.py"
    module.write_text(module.read_text() + "y = 1\n")
    assert told("import clipgraft.losses.balance\nx = 1\n") != first
    module.write_text(module.read_text().removesuffix("y = 1\n"))
    memo.write_text("{broken")
    assert told("import clipgraft.losses.balance\nx = 1\n") == first


def test_a_changed_vocabulary_is_another_source_of_the_index(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    told = []
    for text in ("[PAD]\na\n", "[PAD]\nb\n"):
        vocabulary.write_text(text)
        settings = IndexJob(tokenize=True, vocabulary="wordpiece", wordpiece=str(vocabulary))
        told.append(list(_sources(settings)))
    assert len(told[0]) == 1 and told[0] != told[1]
    vocabulary.unlink()
    with pytest.raises(ConfigError, match=r"no file matches.*vocab\.txt"):
        list(_sources(settings))


@pytest.mark.parametrize(
    ("crops", "given", "expected"),
    [
        ({}, None, [1.05, 1.05]),
        ({"short": 0.4}, None, [1.58, 1.05]),
        ({"router": 0.4}, None, [1.05, 1.58]),  # it reads the shards of the last phase
        ({"short": 0.4, "router": 0.5}, 1.2, [1.2, 1.2]),
    ],
)
def test_images_are_stored_as_large_as_the_smallest_crop_wants_them(crops, given, expected):
    raw = copy.deepcopy(SMALL)
    raw["shard"] = {"oversize": given}
    for section, low in crops.items():
        where = raw["pretrain"][0] if section == "short" else raw["finetune_router"]
        where["crop_scale"] = [low, 1.0]
    (settings,) = load_config(raw).values()
    shards = [job for job in plan_run("small", settings) if job.stage == "shard"]
    assert [job.settings["oversize"] for job in shards] == expected
