"""The workflow as a user meets it: what runs, what runs again after an edit, and what a mistake says."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml

from clipgraft.data.samples import Samples


def manifest_of(workflow, name: str) -> dict:
    path = workflow.root / "results/runs/small" / name / "manifest.json"
    return json.loads(path.read_text())


def test_the_whole_dag_runs_and_every_model_is_evaluated(finished):
    run = finished.root / "results/runs/small"
    models = {path.name for path in (run / "evaluate").iterdir()}
    assert models == {"short", "base", "expert_1", "expert_2", "mlp", "upcycled", "moe"}
    for model in models:
        result = json.loads((run / "evaluate" / model / "renders/result.json").read_text())
        assert 0 <= result["retrieval"]["mean_R@1"] <= 1
        assert result["zero_shot"]["colour"]["num_samples"] == 24
    lock = json.loads((run / "versions.json").read_text())
    for name, folder in lock.items():
        assert (run / name).resolve() == (finished.root / "results" / folder).resolve()
    assert "<html" in (run / "report/report.html").read_text()
    command = [sys.executable, "-m", "clipgraft.runs", "show", "small"]
    shown = subprocess.run(
        command, cwd=finished.root, capture_output=True, text=True, check=True
    ).stdout
    assert (run / "report/results.txt").read_text() in shown
    assert "\nmoe " in shown and "report.html" in shown


def test_experts_change_their_mlps_and_nothing_else(finished):
    from safetensors.torch import load_file

    run = finished.root / "results/runs/small"
    base = load_file(run / "pretrain/full/model.safetensors")
    moe = load_file(run / "finetune_router/moe/model.safetensors")
    upcycled = load_file(run / "assemble/moe/model.safetensors")
    for k in (1, 2):
        expert = load_file(run / f"finetune_expert/{k}/model.safetensors")
        assert expert and all(".mlp." in name for name in expert)
        assert all((expert[name] != base[name]).any() for name in expert if "weight" in name)
        for name, weight in expert.items():
            stacked = name.replace("c_fc.", "c_fc_").replace("c_proj.", "c_proj_")
            assert (upcycled[stacked][k] == weight).all()
            assert (upcycled[stacked][0] == base[name]).all()
    changed = {name for name in moe if (moe[name] != upcycled[name]).any()}
    assert changed and all(name.endswith(".router") for name in changed)


def test_a_finished_dag_has_nothing_to_do(finished):
    assert finished.planned() == []


def test_a_comment_reruns_nothing(finished):
    for file in ("lib/clipgraft/cluster.py", "scripts/pretrain.py", "lib/clipgraft/data/index.py"):
        path = finished.root / file
        path.write_text(path.read_text() + "\n# a comment\n")
    assert finished.planned() == []


def test_watched_trainings_tell_how_they_did(finished):
    run = finished.root / "results/runs/small"
    expected = {"pretrain/full": [0, 32, 64], "finetune_router/moe": [0, 64], "pretrain/short": []}
    for training, seen in expected.items():
        lines = (run / training / "metrics.jsonl").read_text().splitlines()
        looks = [row for row in map(json.loads, lines) if "watch" in row]
        assert [look["samples_seen"] for look in looks] == seen
    assert (run / "finetune_router/moe/best/model.safetensors").exists()
    assert not (run / "pretrain/full/best").exists()
    assert manifest_of(finished, "pretrain/full")["inputs"].keys() == {
        "init",
        "index",
        "shard",
        "watched",
    }
    assert (run / "report/figures/pretraining_watch.svg").exists()
    assert (run / "report/figures/moe_watch.svg").exists()


def test_watching_otherwise_reruns_nothing_and_keeping_the_best_does(finished):
    finished.edit("small.yaml", "every: 32}", "every: 16}")
    assert finished.planned() == []
    finished.edit("small.yaml", "    watch: {task: renders, every: 16}\n", "")
    assert finished.planned() == []
    finished.edit("small.yaml", "num_samples: 10", "num_samples: 11")
    assert sorted(finished.planned()) == ["evaluate", "finetune_router", "report"]


def test_a_new_data_set_to_watch_is_no_reason_to_train_again(finished):
    finished.edit("small.yaml", "num_samples: 24", "num_samples: 25")
    assert not {"pretrain", "embed"} & set(finished.planned())


def test_editing_the_evaluation_trains_nothing_again(finished):
    finished.edit("lib/clipgraft/evaluation/retrieval.py", "(1, 5, 10)", "(1, 5, 20)")
    assert set(finished.planned()) == {"evaluate", "report"}


def test_how_a_training_fits_into_memory_reruns_nothing(finished):
    before = "    watch: {task: renders, every: 32}\n"
    memory = "    grad_checkpointing: true\n    parallel: fsdp\n"
    finished.edit("small.yaml", before, before + memory)
    finished.edit("small.yaml", "runs:\n", "resources: {pretrain: {gpu: 2}}\nruns:\n")
    assert finished.planned() == []
    printed = finished.snakemake("-n", "-p", "--cores", "2", "--forcerun", "pretrain")
    words = [line for line in printed.splitlines() if "scripts/pretrain.py" in line]
    assert len(words) == 2  # the phases
    chosen = '--set parallel="fsdp" --set grad_checkpointing=true'
    assert sorted(chosen in line for line in words) == [False, True], words


def test_every_stage_is_a_target_with_all_that_it_needs(workflow):
    """`--until` of Snakemake ends at the first job of a rule: one phase, one round."""
    stages = ["download"] * 2 + ["index"] * 2 + ["shard"] * 2 + ["pretrain"] * 2 + ["to_pretrain"]
    assert sorted(workflow.planned("--", "to_pretrain")) == sorted(stages)
    counts = Counter(workflow.planned("--", "to_cluster"))
    assert (counts["cluster"], counts["finetune_expert"]) == (2, 1)
    assert workflow.snakemake("--cores", "2", "--", "to_download").count("to_download") > 0
    assert len(list(workflow.root.glob("results/*/*/manifest.json"))) == 2


# In place of Apptainer: notes the image and runs the command outside of it.
APPTAINER = """#!/bin/sh
[ "$1" != --version ] || exec echo apptainer version 1.3.4
while [ "${1%.sif}" = "$1" ]; do shift; done
printf '%s\\n' "$*" >> called.txt
shift
exec "$@"
"""


def test_in_the_image_rules_are_run_by_its_python(workflow):
    stand_in = workflow.root / "bin/apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text(APPTAINER)
    stand_in.chmod(0o755)
    path = [str(stand_in.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    words = ("--cores", "2", "--sdm", "apptainer", "--until", "download")
    workflow.snakemake(*words, PATH=os.pathsep.join(path))
    called = (workflow.root / "called.txt").read_text().splitlines()
    assert len(called) == len(list(workflow.root.glob("results/download/*/manifest.json"))) == 2
    for line in called:
        assert line.startswith(f"{workflow.root}/envs/clipgraft.sif ")
        assert "python3 " in line and sys.executable not in line


def test_what_an_edit_would_run_again_can_be_kept(finished):
    finished.edit("lib/clipgraft/objectives.py", "\n\n\ndef ", "\n\n\n_EDITED = 1\n\n\ndef ")
    assert {"pretrain", "finetune_expert", "finetune_router"} <= set(finished.planned())
    finished.snakemake("--touch", "--cores", "2")
    assert finished.planned() == []
    finished.edit("lib/clipgraft/objectives.py", "\n\n\n_EDITED = 1", "")
    assert "pretrain" in finished.planned()
    finished.snakemake("--touch", "--cores", "2")


def test_files_of_the_command_line_are_overlays(workflow):
    (workflow.root / "own.yaml").write_text(
        "download: {train: {kind: class_folder, folder: pictures}}\n"
        "pretrain: {short: {samples_seen: 0}}\n"
    )
    (workflow.root / "pictures/\udcff").mkdir(parents=True)  # names need not be UTF-8
    words = ("--configfile", "small.yaml", "own.yaml")
    planned = Counter(workflow.planned(*words, "--config", "moe=null", "baselines={}"))
    assert planned["pretrain"] == 2 and not planned["finetune_router"]
    assert workflow.planned("--configfile", "small.yaml").count("finetune_router") == 1


def test_a_stage_may_be_a_link_to_a_folder_of_another_name(finished, tmp_path):
    stage, elsewhere = finished.root / "results/embed", finished.root / "fast"
    stage.rename(elsewhere)
    stage.symlink_to(elsewhere)
    try:
        assert finished.planned() == []
        manifest = finished.root / "results/runs/small/cluster/1/manifest.json"
        command = [sys.executable, finished.root / "scripts/cluster.py", manifest]
        done = subprocess.run([*command, "--out", tmp_path / "try"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        stage.unlink()
        elsewhere.rename(stage)


def test_touching_files_reruns_nothing(finished):
    for path in (finished.root / "scripts").glob("*.py"):
        path.touch()
    for path in (finished.root / "results").glob("*/*/manifest.json"):
        path.touch()
    assert finished.planned() == []


def test_a_task_that_failed_is_in_the_report_and_is_tried_again(finished):
    def page() -> str:
        return (finished.root / "results/runs/small/report/report.html").read_text()

    folder = (finished.root / "results/runs/small/evaluate/moe/renders").resolve()
    tar, offset, size = Samples.open(finished.root / "results/runs/small/index/renders").place(1)
    whole = tar.read_bytes()
    tar.write_bytes(whole[:offset] + bytes(size) + whole[offset + size :])
    shutil.rmtree(finished.root / "results/evaluate/.features")  # nobody looks at the picture else
    try:
        finished.snakemake("--cores", "2", "-R", f"results/evaluate/{folder.name}/manifest.json")
        said = "is not what it was when its data set was indexed"
        assert said in json.loads((folder / "result.json").read_text())["failed"]
        assert "Tasks that failed" in page() and said in page()
        assert sorted(finished.planned()) == ["evaluate", "report"]
    finally:
        tar.write_bytes(whole)
    finished.snakemake("--cores", "2")
    assert json.loads((folder / "result.json").read_text())["retrieval"]
    assert "Tasks that failed" not in page()
    assert finished.planned() == []


def test_editing_the_clustering_reruns_it_and_what_follows_and_nothing_before(finished):
    finished.edit("lib/clipgraft/cluster.py", "about |= {", "about |= {'edited': True,")
    planned = Counter(finished.planned())
    # The embedding by the base comes before; short, base and mlp do not follow.
    assert planned == {
        "cluster": 2,
        "finetune_expert": 2,
        "embed": 1,
        "assemble": 1,
        "finetune_router": 1,
        "evaluate": 4,
        "report": 1,
    }


def test_editing_the_report_redraws_the_report_only(finished):
    path = finished.root / "lib/clipgraft/report/report.py"
    path.write_text(path.read_text() + "\nEDITED = True\n")
    assert finished.planned() == ["report"]


def test_a_changed_top_k_makes_new_versions_beside_the_old_and_back_again_runs_nothing(finished):
    store = finished.root / "results"
    before = {path: path.stat().st_mtime_ns for path in store.glob("*/*/manifest.json")}
    finished.edit("small.yaml", "top_k: 2", "top_k: 1")
    assert Counter(finished.planned()) == {
        "assemble": 1,
        "finetune_router": 1,
        "evaluate": 2,
        "report": 1,
    }
    finished.snakemake("--cores", "2")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(store.glob("assemble/*/manifest.json"))) == 2
    assert manifest_of(finished, "assemble/moe")["settings"]["top_k"] == 1
    finished.edit("small.yaml", "top_k: 1", "top_k: 2")
    assert finished.planned() == []
    finished.snakemake("--cores", "2")
    assert manifest_of(finished, "assemble/moe")["settings"]["top_k"] == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    listed = subprocess.run(
        [sys.executable, "-m", "clipgraft.runs", "unused", "--configfile", "small.yaml"],
        cwd=finished.root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split()[-1].split("/")[1] for line in listed.splitlines()[:-1]} == {
        "assemble",
        "finetune_router",
        "evaluate",
        "report",
    }


def test_two_runs_that_differ_in_the_router_share_every_earlier_file(finished):
    config = yaml.safe_load((finished.root / "small.yaml").read_text())
    config["runs"]["slow"] = {"finetune_router": {"optim": {"lr": 1.0e-4}}}
    (finished.root / "small.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert Counter(finished.planned()) == {"finetune_router": 1, "evaluate": 1, "report": 1}


def test_a_recorded_job_is_replayed_by_hand_with_a_change(finished, tmp_path):
    manifest = finished.root / "results/runs/small/cluster/1/manifest.json"  # a link
    command = [sys.executable, finished.root / "scripts/cluster.py", manifest]
    command += ["--out", tmp_path / "try", "--set", "image_clusters=3"]
    subprocess.run(command, check=True, capture_output=True)
    about = json.loads((tmp_path / "try/clusters.json").read_text())
    assert about["image"]["num_clusters"] == 3
    assert about["text"]["num_clusters"] == 2
    replayed = json.loads((tmp_path / "try/manifest.json").read_text())
    recorded = tmp_path / "try" / replayed["inputs"]["embed"]["manifest"]
    assert recorded.samefile(finished.root / "results/runs/small/embed/0/manifest.json")
    assert finished.planned() == []


def test_a_full_disk_is_said_by_every_stage_and_leaves_nothing_behind(finished, tmp_path):
    run = finished.root / "results/runs/small"
    names = ["download/train", "index/train", "shard/full", "pretrain/short", "embed/0"]
    names += ["finetune_expert/1", "assemble/moe", "finetune_router/moe", "report"]

    def on_a_small_disk(name: str) -> None:
        manifest, disk = run / name / "manifest.json", tmp_path / name.replace("/", "_")
        needed = sum(each["bytes"] for each in json.loads(manifest.read_text())["outputs"].values())
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={max(needed // 2, 8192)}", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.strip()}")
        try:
            script = f"scripts/{name.split('/')[0]}.py"
            command = [sys.executable, script, str(manifest), "--out", str(disk / "out")]
            done = subprocess.run(command, cwd=finished.root, capture_output=True, text=True)
            assert done.returncode == 1, (name, done.stderr)
            assert "no space left on device" in done.stderr, (name, done.stderr)
            assert "Traceback" not in done.stderr, (name, done.stderr)
            left = {path.name for path in (disk / "out").rglob("*") if path.is_file()}
            assert left <= {".lock"}, name
        finally:
            subprocess.run(["umount", disk], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(on_a_small_disk, names))


def test_two_processes_train_the_routers_as_one_does(finished, tmp_path):
    manifest = finished.root / "results/runs/small/finetune_router/moe/manifest.json"
    script = finished.root / "scripts/finetune_router.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    rows = []
    for words in ([], torchrun):
        out = tmp_path / f"out{len(rows)}"
        command = [sys.executable, *words, script, manifest, "--out", out]
        environment = {**os.environ, "CLIPGRAFT_PRECISION": "fp32"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        rows.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*rows, strict=True):
        if "watch" in one:
            assert two["watch"] == pytest.approx(one["watch"], abs=1e-6)
            continue
        assert two["contrastive"] == pytest.approx(one["contrastive"], rel=1e-4)
        assert two["balance"] == pytest.approx(one["balance"], rel=1e-4)
        assert np.shape(two["load_image"]) == np.shape(one["load_image"]) == (2, 3)
        np.testing.assert_allclose(two["load_image"], one["load_image"], atol=1e-3)


def test_a_dry_run_loads_no_torch(finished):
    code = (
        "import sys; from snakemake.cli import main\n"
        "try: main(['-n', '--cores', '2', '--configfile', 'small.yaml'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'open_clip', 'faiss', 'sklearn', 'pyarrow'} & set(sys.modules)\n"
        "print('LOADED', sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=finished.root, capture_output=True, text=True, check=True
    )
    assert "LOADED []" in done.stdout
    assert "Nothing to be done" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("top_k: 2", "topk: 2", ["unknown key `topk` in moe", "did you mean `top_k`"]),
        ("top_k: 2", "top_k: 4", ["top_k = 4", "num_experts = 3"]),
        ("num_samples: 96", "num_samples: many", ["download.train.num_samples", '"many"']),
        ("image_size: 16,", "image_size: 20,", ["image_size = 20", "patch size 8"]),
    ],
)
def test_a_mistake_in_the_config_is_said_before_anything_runs(workflow, old, new, words):
    workflow.edit("small.yaml", old, new)
    printed = workflow.snakemake("--cores", "2", check=False)
    for word in words:
        assert word in printed
    assert "Traceback" not in printed
    assert not (workflow.root / "results").exists()


def test_a_source_that_is_not_there_is_said_before_anything_runs(workflow):
    config = yaml.safe_load((workflow.root / "small.yaml").read_text())
    config["download"]["train"] = {"kind": "tars", "tars": "data/train-*.tar"}
    (workflow.root / "small.yaml").write_text(yaml.safe_dump(config))
    printed = workflow.snakemake("--cores", "2", check=False)
    assert "no file matches 'data/train-*.tar'" in printed
    assert not (workflow.root / "results").exists()


def training(workflow) -> list[int]:
    """Processes that train in this copy of the workflow."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        script = str(workflow.root / "scripts/pretrain.py").encode()
        if script in words and not words[0].endswith(b"bash"):
            found.append(int(path.parent.name))
    return found


def test_a_killed_job_loses_nothing_and_goes_on_where_it_was(finished):
    finished.edit("small.yaml", "samples_seen: 96", "samples_seen: 400000")
    target = next(
        job
        for job in finished.snakemake("-n", "--cores", "2").split()
        if job.startswith("results/pretrain/")
    ).strip(",;")
    command = [sys.executable, "-m", "snakemake", "--configfile", "small.yaml", "--cores", "2"]
    with subprocess.Popen(
        [*command, target],
        cwd=finished.root,
        env={**os.environ, "CLIPGRAFT_SAVE_SECONDS": "0.5"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        folder = (finished.root / target).parent
        deadline = time.monotonic() + 120
        while not list(folder.glob(".resume/*.pt")) and time.monotonic() < deadline:
            time.sleep(0.1)
        for trainer in training(finished):
            os.kill(trainer, 9)
        if process.poll() is None and not list(folder.glob(".resume/*.pt")):
            process.kill()
        assert process.wait(timeout=60) != 0
    assert not (folder / "manifest.json").exists()
    assert list(folder.glob(".resume/*.pt"))
    # The next start goes on from there: told to stop at once, it says where it resumed.
    with subprocess.Popen(
        [*command, target],
        cwd=finished.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "resumed at step" in line:
                for trainer in training(finished):
                    os.kill(trainer, 15)
        process.wait(timeout=60)
    printed = "".join(lines)
    assert "resumed at step" in printed
    assert "saved at step" in printed


@pytest.mark.parametrize("where", ["here", "in a child"])
def test_the_network_is_out_of_reach_and_loopback_is_not(where):
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    if where == "here":
        with pytest.raises(OSError, match="without a network"):
            exec(code)
    else:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "tests run without a network" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_snakemakes_own_report_has_our_pages_tables_and_figures_with_captions(finished):
    printed = finished.snakemake("--report", "all.html", "--cores", "1")
    assert "WARNING" not in printed
    text = (finished.root / "all.html").read_text()
    runs = [
        path for path in (finished.root / "results/runs").iterdir() if (path / "report").exists()
    ]
    figures = {path.name for run in runs for path in (run / "report" / "figures").glob("*.svg")}
    assert runs and figures
    assert [name for name in figures if f'"name": "{name}"' not in text] == []
    for said in ("below a baseline that costs no more", "whose tokens all go to one expert"):
        assert said in " ".join(text.replace("\\n", " ").split())
