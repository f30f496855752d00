"""Versions: what changes one, what does not, and what an edit of the code reaches."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from clipgraft.config import ConfigError, load_config, merge, sweep_points
from clipgraft.job import Job
from clipgraft.local_files import local_files, sampled, spelled_out
from clipgraft.planning import plan_run, plan_runs
from clipgraft.settings import DownloadJob, IndexJob
from clipgraft.sources import TarSource, UrlSource
from clipgraft.versions import deciding, sources_of

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
            {"moe": {"router_init": "centroids"}},
            {"assemble", "finetune_router", "evaluate", "report"},
        ),
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
        ({"resources": {"pretrain": {"nodes": 2}, "embed": {"jobs": 8}}}, set()),
        ({"slurm": {"devices": "gres", "device_type": "a100"}}, set()),
    ],
)
def test_a_setting_changes_its_stage_and_what_follows(overlay, stages):
    assert differing(overlay) == stages


def test_each_expert_begins_as_the_base_or_as_the_one_before():
    for init, begins in (
        ("base", ["pretrain/full"] * 3),
        ("previous", ["pretrain/full", "finetune_expert/1", "finetune_expert/2"]),
    ):
        overlay = {"moe": {"num_experts": 4}, "finetune_expert": {"init": init}}
        run = load_config(merge(copy.deepcopy(SMALL), overlay))["small"]
        jobs = {job.name: job for job in plan_run("small", run)}
        inits = [jobs[f"finetune_expert/{k}"].inputs["init"] for k in (1, 2, 3)]
        assert [job.name for job in inits] == begins


def with_phases(**changes: object) -> dict:
    return {"pretrain": [{**phase, **changes} for phase in SMALL["pretrain"]]}


def test_how_fast_a_training_is_changes_no_version_but_a_precision_that_is_asked_for_does():
    assert differing(with_phases(compile=True, cuda_graphs=True, precision=None)) == set()
    assert "pretrain" in differing(with_phases(precision="fp32"))
    assert differing({"finetune_router": {"precision": "bf16"}}) == {
        "finetune_router",
        "evaluate",
        "report",
    }


def test_each_round_is_handed_its_own_numbers_of_clusters():
    def jobs(**overlay) -> dict:
        run = load_config(merge(copy.deepcopy(SMALL), overlay))["small"]
        return {job.name: job for job in plan_run("small", run)}

    before, after = jobs(), jobs(cluster={"image_clusters": [2, 5], "text_clusters": [2, 2]})
    second = after["cluster/2"].settings
    assert (second["image_clusters"], second["text_clusters"], second["joint_clusters"]) == (
        5,
        2,
        None,
    )
    assert before["cluster/1"].version == after["cluster/1"].version
    own = jobs(cluster={"by": "joint", "image_clusters": None, "text_clusters": None})
    assert own["cluster/2"].settings["joint_clusters"] == 9
    assert own["cluster/2"].settings["image_clusters"] is None


def test_the_order_of_batches_leaves_controls_alone():
    before, after = versions({}), versions({"finetune_expert": {"batch_order": "round_robin"}})
    changed = {name for name in before if before[name] != after[name]}
    assert "finetune_expert/1" in changed and "finetune_expert/control" not in changed


def test_a_router_setting_leaves_the_evaluation_of_other_models_alone():
    before, after = versions({}), versions({"finetune_router": {"samples_seen": 32}})
    assert {name for name in before if before[name] != after[name]} == {
        "finetune_router/moe",
        "evaluate/moe/renders",
        "report",
    }


def test_assembling_reads_samples_for_routers_of_centroids_only():
    for router_init in ("random", "zero", "centroids"):
        raw = merge(copy.deepcopy(SMALL), {"moe": {"router_init": router_init}})
        jobs = {job.name: job for job in plan_run("small", load_config(raw)["small"])}
        experts = {"expert_0", "expert_1", "expert_2"}
        samples = {"index": jobs["index/train"], "shard": jobs["shard/full"]}
        inputs = jobs["assemble/moe"].inputs
        assert inputs.keys() - experts == (samples.keys() if router_init == "centroids" else set())
        assert all(inputs[name] == samples[name] for name in inputs.keys() - experts)


def test_the_same_settings_give_the_same_versions_in_another_process():
    code = (
        "import json, yaml; from clipgraft.config import load_config; from clipgraft.planning import plan_run;"
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
    assert evaluated == {"short", "base", "expert_1", "expert_2", "mlp", "upcycled", "moe"}
    seen: set[str] = set()
    for job in jobs:
        assert {of.name for of in job.inputs.values()} <= seen
        seen.add(job.name)


def test_a_task_that_probes_also_measures_the_untrained_architecture():
    probing = {"evaluate": {"tasks": {"renders": {"probe": ["colour"], "given": [["size"]]}}}}
    jobs = {job.name: job for job in plan_run("small", load_config(merge(SMALL, probing))["small"])}
    untrained = jobs["evaluate/untrained/renders"]
    assert untrained.inputs["model"] == jobs["evaluate/base/renders"].inputs["model"]
    assert untrained.settings["untrained"] is not None
    assert untrained.settings["probe"] == ["colour"]
    assert not any(untrained.settings[key] for key in ("retrieval", "zero_shot", "given"))
    assert untrained in jobs["report"].inputs.values()
    others = [job for job in jobs.values() if job.stage == "evaluate" and job is not untrained]
    assert others and all(job.settings["untrained"] is None for job in others)
    changed = {name for name, version in versions({}).items() if jobs[name].version != version}
    assert {name.split("/")[0] for name in changed} == {"evaluate", "report"}


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
    assert edit("lib/clipgraft/cost.py") == {"report", "scaling"}
    assert edit("lib/clipgraft/cluster.py") == {"cluster"}
    assert edit("lib/clipgraft/models/moe.py") == {"assemble", "finetune_router", "evaluate"}
    assert edit("lib/clipgraft/experts.py") == {"finetune_expert"}
    for name in ("job", "aside", "spelling", "model_settings"):
        assert edit(f"lib/clipgraft/{name}.py") == set()


def test_an_import_is_followed_however_it_is_written(code: Path):
    module = code / "lib/clipgraft/objectives.py"
    (code / "lib/clipgraft/losses/own.py").write_text("WEIGHT = 1\n")
    module.write_text(module.read_text() + "\nfrom .losses.own import WEIGHT as WEIGHT\n")
    before = fingerprints(code)
    (code / "lib/clipgraft/losses/own.py").write_text("WEIGHT = 2\n")
    assert "pretrain" in touched(code, before)


def test_a_later_setting_at_the_value_that_changes_nothing_is_in_no_version(monkeypatch):
    monkeypatch.setattr("clipgraft.versions.LATER", {"loss.beta": 0.0, "noise": None})
    before = {"loss": {"kind": "contrastive"}, "lr": 1.0}
    assert deciding({**before, "noise": None}, {})[0] == before
    assert deciding({"loss": {"kind": "contrastive", "beta": 0.0}, "lr": 1.0}, {})[0] == before
    changed = {"loss": {"kind": "contrastive", "beta": 0.5}, "lr": 1.0}
    assert deciding(changed, {})[0] == changed


def test_when_a_download_fails_is_in_no_version():
    """And at its default, which stood in versions before, it is as it was."""
    source = UrlSource(kind="urls", table="t.csv").model_dump(mode="json")
    assert deciding({"source": source}, {}) == ({"source": source}, {})
    assert deciding({"source": source | {"min_success": 0.1}}, {}) == ({"source": source}, {})
    tars = TarSource(kind="tars", tars="x.tar").model_dump(mode="json")
    assert deciding({"source": tars}, {}) == ({"source": tars}, {})


def test_a_glob_that_matches_nothing_or_an_unset_variable_is_named(tmp_path: Path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no file matches.*\*\.tar"):
        local_files(str(tmp_path / "*.tar"))
    with pytest.raises(ConfigError, match="environment variable"):
        local_files("$CLIPGRAFT_SURELY_UNSET/x.tar")
    with pytest.raises(ConfigError, match=r"is a folder, not a file. Hint: .*/\*'"):
        local_files(str(tmp_path))
    (tmp_path / "b.tar").touch()
    (tmp_path / "a.tar").touch()
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    assert [path.name for path in local_files("$SOME_DATA/*.tar")] == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "tars", "tars": "data/**.tar"}, r"'data/\*\*\.tar' names no files. Hint"),
        ({"kind": "tars", "tars": "."}, r"'\.' names no files. Hint: 'folder/\*\.tar'"),
        ({"kind": "urls", "table": "$TRAIN"}, r"'\$TRAIN' names no files"),
        ({"kind": "folder", "folder": "~surely-no-user/x"}, "there is no such home folder"),
        ({"kind": "parquet", "files": "/", "captions": {"caption": "c"}}, "'/' names no files"),
    ],
)
def test_what_is_no_name_of_files_is_named(source, message, monkeypatch):
    monkeypatch.setenv("TRAIN", "")
    with pytest.raises(ConfigError, match=message):
        versions({"download": {"train": source}})


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    closed = tmp_path / "closed.tar"
    closed.write_bytes(b"")
    opened = Path.open

    def refusing(path, *words, **others):  # root, who may run tests, may read anything
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *words, **others)

    monkeypatch.setattr(Path, "open", refusing)
    for over in (
        {"download": {"train": {"kind": "tars", "tars": str(closed)}}},
        {"model": {"pretrained": str(closed)}},
    ):
        with pytest.raises(
            ConfigError, match=rf"{closed}' cannot be read: Permission denied. Hint"
        ):
            versions(over)


def test_braces_are_spelled_out_as_in_a_shell():
    for pattern in ("x{0..11}.tar", "x{08..11}", "x{001..3}", "{3..1}-{a,b}", "{10..8}"):
        shell = subprocess.run(
            ["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True
        )
        assert spelled_out(pattern) == shell.stdout.split()


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
        told.append(list(sources_of(settings)))
    assert len(told[0]) == 1 and told[0] != told[1]
    vocabulary.unlink()
    with pytest.raises(ConfigError, match=r"no file matches.*vocab\.txt"):
        list(sources_of(settings))


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


def test_references_that_cannot_be_are_found_when_jobs_are_planned(tmp_path):
    def planned(reference: dict, **distillation: float) -> None:
        phase = {"reference": reference, "distillation": distillation}
        versions({"pretrain": {"short": phase}})

    with pytest.raises(ConfigError, match=r"pretrain.short.references: ViT-B-32/model.json does"):
        planned({"model": "ViT-B-32"}, feature=1)
    with pytest.raises(ConfigError, match=r"model = 'ViT-B-23' is no .* did you mean ViT-B-32"):
        planned({"model": "ViT-B-23", "pretrained": "openai"}, feature=1)
    with pytest.raises(
        ConfigError, match=r"equal dimensions: .*ViT-B-32 has 512, the model has 16"
    ):
        planned({"model": "ViT-B-32", "pretrained": "openai"}, interactive=1)
    (tmp_path / "model.json").write_text(json.dumps({"config": {"embed_dim": 24}}))
    with pytest.raises(ConfigError, match=r"has 24, the model has 16. Hint: feature or affinity"):
        planned({"model": str(tmp_path)}, interactive=1)
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"model.json is no model spec"):
        planned({"model": str(tmp_path)}, affinity=1)
    planned({"model": "ViT-B-32", "pretrained": "openai"}, affinity=1, feature=1)


@pytest.mark.parametrize(
    ("model", "vocabulary", "words"),
    [
        ("ViT-B-32", "corpus", "index.vocabulary = corpus gives. Hint: index: {vocabulary: full}"),
        ("ViT-L-14-CLIPA", "full", "= full gives. Hint: index: {vocabulary: wordpiece}"),
        ("hf-hub:someone/clip", "corpus", "Hint: index: {vocabulary: full}"),
        ("ViT-B-16-SigLIP", "full", "init_from: ViT-B-16-SigLIP: a timm image tower and"),
        ("ViT-B-32", "full", None),
        ("hf-hub:someone/clip", "full", None),
    ],
)
def test_a_start_from_a_public_reference_needs_its_vocabulary(model, vocabulary, words):
    """Found when jobs are planned: training would say so after hours of data."""
    phase = {"reference": {"model": model, "pretrained": "openai"}, "init_from": "reference"}
    overlay = {"pretrain": {"short": phase}, "index": {"vocabulary": vocabulary}}
    if words is None:
        assert versions(overlay)
        return
    with pytest.raises(ConfigError) as error:
        versions(overlay)
    assert str(error.value).startswith("pretrain.short.init_from") and words in str(error.value)


def test_a_start_from_a_folder_of_ours_may_have_the_words_of_the_data(teacher):
    phase = {"reference": {"model": str(teacher)}, "init_from": "reference"}
    assert versions({"pretrain": {"short": phase}})


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """What planning reads of a model folder; its weights are larger than what is hashed whole."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    about = {"config": {"embed_dim": 16}, "preprocess": {"size": 16}}
    (folder / "model.json").write_text(json.dumps(about))
    (folder / "model.safetensors").write_bytes(bytes(2**21))
    return folder


def cached(teacher: Path, crops: int = 1, **changes) -> dict:
    """A phase's settings with a cached reference."""
    reference = {"model": str(teacher), "cached": True, "crops": crops, **changes}
    return {"references": [reference], "distillation": {"feature": 1.0}}


def embeds(overlay: dict) -> dict[str, str]:
    """Versions of the jobs that embed references."""
    return {
        name.removeprefix("embed/"): version
        for name, version in versions(overlay).items()
        if name.startswith("embed/") and "." in name
    }


def test_a_cached_reference_is_embedded_before_its_phase_and_nothing_else_changes(teacher):
    overlay = {"pretrain": {"full": cached(teacher)}}
    run = load_config(merge(copy.deepcopy(SMALL), overlay))["small"]
    jobs = {job.name: job for job in plan_run("small", run)}
    embed, phase = jobs["embed/full.reference_0"], jobs["pretrain/full"]
    assert phase.inputs["reference_0"] is embed
    assert embed.inputs == {
        "index": jobs["index/train"],
        "shard": jobs["shard/full.reference_0"],
    }
    assert embed.settings == {
        "model": str(teacher),
        "pretrained": None,
        "image_size": 16,
        "crops": 1,
        "augmentation": None,
        "seed": 0,
    }
    before, after = versions({}), versions(overlay)
    assert {name for name in before if not name.startswith("pretrain/full")} <= after.keys()
    for name in ("download/train", "index/train", "shard/short", "shard/full", "pretrain/short"):
        assert before[name] == after[name]
    assert before["pretrain/full"] != after["pretrain/full"]
    # The shards of a reference of 16 pixels are those of the phase of 16 pixels.
    assert after["shard/full.reference_0"] == after["shard/short"] != after["shard/full"]


def test_phases_and_runs_share_the_embeddings_of_a_reference(teacher):
    both = {"pretrain": {"short": cached(teacher), "full": cached(teacher)}}
    told = embeds(both)
    assert set(told) == {"short.reference_0", "full.reference_0"} and len(set(told.values())) == 1
    changes = [
        {"seed": 5},
        {"pretrain": {"full": {"optim": {"lr": 0.5}, "crop_scale": [0.3, 1.0], "flip_prob": 0.5}}},
        {"pretrain": {"full": {**cached(teacher, scale=3.0), "distillation": {"affinity": 1}}}},
        {"pretrain": {"full": {"image_size": 64}}},
    ]
    for change in changes:
        assert set(embeds(merge(both, change)).values()) == set(told.values()), change


@pytest.mark.parametrize(
    "change",
    [
        {"crops": 2},
        {"image_size": 32},
        {"model": "ViT-B-32", "pretrained": "openai"},
    ],
)
def test_what_a_reference_is_or_sees_makes_new_embeddings(teacher, change):
    plain = embeds({"pretrain": {"full": cached(teacher)}})
    other = embeds(
        {"pretrain": {"full": {**cached(teacher, **change), "distillation": {"affinity": 1}}}}
    )
    assert plain.keys() == other.keys() and plain != other


def test_a_cached_checkpoint_says_its_image_size(tmp_path):
    """Its weights may be of another size than its architecture's, and online they would be run at that."""
    weights = tmp_path / "b32.pt"
    weights.write_bytes(b"not opened")
    reference = {"model": "ViT-B-32", "pretrained": str(weights)}
    with pytest.raises(ConfigError, match=r"ViT-B-32/.*b32.pt is not known .* give `image_size`"):
        versions({"pretrain": {"full": cached(weights, **reference)}})
    assert embeds({"pretrain": {"full": cached(weights, **reference, image_size=112)}})
    assert embeds({"pretrain": {"full": cached(weights, **reference | {"pretrained": "openai"})}})


def test_several_crops_depend_on_what_they_are_drawn_with_and_on_no_seed_or_rate(teacher):
    def told(**change) -> dict[str, str]:
        return embeds({"pretrain": {"full": {**cached(teacher, 3), **change}}})

    assert told() == told(optim={"lr": 0.5}) == told(samples_seen=32)
    several = [told(), told(flip_prob=0.5), told(crop_scale=[0.5, 1.0]), told(gray_scale_prob=0.1)]
    assert len({tuple(each.values()) for each in several}) == 4


def test_a_reference_that_no_step_compares_with_is_not_embedded(teacher):
    reference = cached(teacher)["references"]
    phase = {"references": reference, "init_from": "reference"}
    assert embeds({"pretrain": {"short": phase}}) == {}


def test_references_that_want_different_crops_are_refused(teacher):
    reference = cached(teacher, 2)["references"][0]
    several = {"references": [reference, {**reference, "crops": 3}]}
    with pytest.raises(ConfigError, match=r"pretrain\.full\.references: crops = 2 and 3"):
        versions({"pretrain": {"full": {**cached(teacher), **several}}})


def test_retrained_weights_of_a_reference_are_another_source(teacher):
    def told() -> dict[str, tuple[str, ...]]:
        raw = merge(copy.deepcopy(SMALL), {"pretrain": {"full": cached(teacher)}})
        jobs = plan_run("small", load_config(raw)["small"])
        return {job.name: job.sources for job in jobs}

    before = told()
    (teacher / "model.safetensors").touch()
    assert told() == before
    (teacher / "model.safetensors").write_bytes(b"\1" * 2**21)  # of the same size
    after = told()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"embed/full.reference_0", "pretrain/full"}


def test_state_is_not_continued_with_other_local_weights(teacher, tmp_path):
    """The tag of a job that reads a local reference, or starts from a file, has what Snakemake sees of them."""
    public = tmp_path / "public.pt"
    public.write_bytes(bytes(2**21))
    overlay = {"model": {"pretrained": str(public)}, "pretrain": {"full": cached(teacher)}}
    jobs = plan_run("small", load_config(merge(copy.deepcopy(SMALL), overlay))["small"])

    def told() -> dict[str, str]:
        return {
            job.name: Job(job.stage, job.name, job.settings, {}, tmp_path, 1, "code").tag
            for job in jobs
        }

    plain = told()
    shard = next(job for job in jobs if job.name == "shard/short")
    as_before = ["shard", *deciding(shard.settings, {}), "code"]
    assert plain["shard/short"] == json.dumps(as_before, sort_keys=True)
    (teacher / "model.safetensors").write_bytes(b"\1" * 2**21)
    further = told()
    changed = {name for name in plain if plain[name] != further[name]}
    assert changed == {"embed/full.reference_0", "pretrain/full"}
    public.write_bytes(b"\1" * 2**21)
    replaced = told()
    assert replaced["pretrain/short"] != further["pretrain/short"]
    assert replaced["embed/full.reference_0"] == further["embed/full.reference_0"]


def test_a_change_of_every_64th_part_of_large_weights_is_seen(tmp_path):
    """They are not read as a whole: a training moves them everywhere."""
    path = tmp_path / "weights"

    def identity_with(changed: int | None) -> str:
        content = bytearray(2**21)
        if changed is not None:
            content[changed] = 1
        path.write_bytes(content)
        return sampled(path)

    places = [None, *(2**21 * part // 64 for part in range(64))]
    assert len(set(map(identity_with, places))) == 65
    assert identity_with(2**21 * 7 // 8 + 4095) != identity_with(None)


@pytest.mark.parametrize("kind", ["tars", "urls"])
def test_large_files_with_other_captions_of_the_same_length_are_other_sources(tmp_path, kind):
    """Nothing but their first and last bytes is looked at: times of a tar, statistics of a parquet file."""
    path = tmp_path / "data.parquet"

    def told(word: str, time: int) -> list[str]:
        if kind == "urls":
            table = pa.table({"url": ["x" * 64] * 2**15, "caption": [word * 8] * 2**15})
            pq.write_table(table, path, compression="none", use_dictionary=False)
            source = UrlSource(kind="urls", table=str(path))
        else:
            with tarfile.open(path, "w") as tar:
                for name, content in (("0.jpg", bytes(2**21)), ("0.txt", word.encode())):
                    member = tarfile.TarInfo(name)
                    member.size, member.mtime = len(content), time
                    tar.addfile(member, io.BytesIO(content))
            source = TarSource(kind="tars", tars=str(path))
        assert path.stat().st_size > 2**20
        return list(sources_of(DownloadJob(source=source)))

    before = told("one", 1)
    path.touch()
    assert told("one", 1) == before
    assert told("two", 2) != before


def test_replaced_weights_that_a_run_starts_from_are_another_source_of_its_first_phase(tmp_path):
    weights = tmp_path / "public.pt"

    def told() -> dict[str, tuple[str, ...]]:
        raw = merge(copy.deepcopy(SMALL), {"model": {"pretrained": str(weights)}})
        jobs = plan_run("small", load_config(raw)["small"])
        return {job.name: job.sources for job in jobs}

    weights.write_bytes(bytes(2**21))
    before = told()
    weights.touch()
    assert told() == before
    weights.write_bytes(b"\1" * 2**21)  # of the same size
    after = told()
    assert {name for name in before if before[name] != after[name]} == {"pretrain/short"}
    weights.unlink()
    with pytest.raises(ConfigError, match=r"model\.pretrained = .*public\.pt is no file\. Hint: "):
        told()


def test_weights_with_the_name_of_a_file_must_be_there_and_tags_need_not():
    for name in ("weights.safetensors", "there/weights", "~/nil.pth", "nil.npz"):
        with pytest.raises(ConfigError, match=r"model\.pretrained = .* is no file"):
            versions({"model": {"pretrained": name}})
        reference = {"model": "ViT-B-32", "pretrained": name}
        phase = {"reference": reference, "distillation": {"feature": 1}}
        with pytest.raises(
            ConfigError, match=r"pretrain\.short\.references: pretrained = .* no file"
        ):
            versions({"pretrain": {"short": phase}})
    for tag in ("openai", "laion2b_s34b_b79k", "hf-hub:timm/vit"):
        versions({"model": {"pretrained": tag}, "index": {"vocabulary": "full"}})


def test_public_weights_that_read_wordpiece_need_berts_own_pieces():
    clipa = {"name": "ViT-L-14-CLIPA", "config": None}
    phases = {"short": {"image_size": 14}, "full": {"image_size": 28}}
    start = {"reference": {"model": clipa["name"], "pretrained": "x"}, "init_from": "reference"}
    for model, short, where in (
        ({**clipa, "pretrained": "datacomp1b"}, {}, r"model\.pretrained = 'datacomp1b'"),
        (clipa, start, r"pretrain\.short\.init_from = reference"),
    ):
        overlay = {"model": model, "pretrain": merge(phases, {"short": short})}
        with pytest.raises(ConfigError, match=rf"{where}.* Hint: index: {{wordpiece: vocab.txt}}"):
            versions({**overlay, "index": {"vocabulary": "wordpiece"}})


@pytest.mark.parametrize(
    ("name", "overlay", "words"),
    [
        (
            "ViT-B-32",
            {},
            r"pretrain\.short\.image_size = 16 .* patch size 32 of ViT-B-32\. Hint: 32",
        ),
        (
            "ViT-B-16",
            {"index": {"vocabulary": "wordpiece"}},
            "model.name = ViT-B-16: text_cfg.pool",
        ),
        ("ViT-B-16", {"pretrain": {"full": {"pos_resize": "recompute"}}}, "table is learned"),
        ("RN50", {}, "model.name = RN50: a ResNet image tower"),
        ("ViT-B-16-SigLIP", {}, "a timm image tower and a Hugging Face tokenizer"),
        ("coca_ViT-B-32", {}, r"a captioner \(CoCa\)"),
    ],
)
def test_a_run_is_held_against_a_named_architecture_before_anything_runs(name, overlay, words):
    with pytest.raises(ConfigError, match=words):
        versions({"model": {"name": name, "config": None}, **overlay})


def test_blocks_of_experts_are_held_against_those_of_a_named_architecture():
    def planned(**overlay: dict) -> None:
        versions({"model": {"name": "ViT-B-16", "config": None}, **overlay})

    planned(moe={"image_layers": [0, 11]})
    with pytest.raises(
        ConfigError, match=r"moe\.image_layers = \[30\]: the vision .* has 12 layers"
    ):
        planned(moe={"image_layers": [30]})
    with pytest.raises(
        ConfigError, match=r"finetune_expert\.text_layers = \[0, 12\]: .*Hint: 0 to 11"
    ):
        planned(finetune_expert={"text_layers": [0, 12]}, moe={"text_layers": [0]})
    with pytest.raises(
        ConfigError, match=r"copies of one MLP. Hint: moe: {image_layers: \[0, 1\]}"
    ):
        planned(finetune_expert={"image_layers": [0, 1]})
    with pytest.raises(ConfigError, match=r"model\.name = 'ViT-B-23' is no architecture"):
        planned(model={"name": "ViT-B-23", "config": None})
    versions({"model": {"name": "hf-hub:timm/vit", "config": None}, "moe": {"image_layers": [30]}})
