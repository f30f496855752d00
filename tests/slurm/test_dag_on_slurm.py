"""The whole DAG on a real cluster of two nodes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from cluster_site import LONG, Site, copy_site

STAGES = (
    "download index shard pretrain embed cluster finetune_expert assemble finetune_router soup evaluate report"
).split()

pytestmark = LONG


@pytest.fixture(scope="module")
def finished(sandbox, tmp_path_factory):
    """The DAG of slurm.yaml, run on the cluster."""
    root = tmp_path_factory.mktemp("site")
    copy_site(root, "slurm.yaml")
    site = Site(root, sandbox)
    printed = site.snakemake()
    (root / "first.txt").write_text(printed)
    return site


def manifests(root, stage="*"):
    paths = (root / "results").glob(f"{stage}/*/manifest.json")
    return {str(path.parent.relative_to(root)): json.loads(path.read_text()) for path in paths}


def test_every_stage_is_submitted(finished):
    printed = (finished.root / "first.txt").read_text()
    submitted = set(re.findall(r"rule_(\w+)/[0-9a-f]{8}", printed))
    assert submitted >= set(STAGES)
    assert "embed_part" in submitted
    assert (finished.root / "results/runs/small/report/report.html").exists()


def test_the_same_config_gives_the_same_weights_and_embeddings_locally(finished, tmp_path):
    copy_site(tmp_path, "slurm.yaml")
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--until", "finetune_router"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    paths = [path.relative_to(tmp_path) for path in tmp_path.glob("results/*/*/*.*")]
    compared = [path for path in paths if path.suffix in (".safetensors", ".npy")]
    for path in compared:
        assert (finished.root / path).read_bytes() == (tmp_path / path).read_bytes(), path
    stages = {path.parts[1] for path in compared}
    assert stages >= {"pretrain", "embed", "cluster", "finetune_expert", "finetune_router"}


def test_trainings_ran_on_both_nodes(finished):
    for stage in ("pretrain", "finetune_expert"):
        (about,) = manifests(finished.root, stage).values()
        assert about["num_processes"] == 2


def test_where_it_runs_is_no_reason_to_run_again(finished):
    path = finished.root / "config.yaml"
    path.write_text(path.read_text().replace("jobs: 3", "jobs: 2").replace("nodes: 2", "nodes: 1"))
    assert "Nothing to be done" in finished.snakemake()
