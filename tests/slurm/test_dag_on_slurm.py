"""The whole DAG on a real cluster of two nodes."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys

import pytest
import yaml
from cluster_site import LONG, ROOT, Site, copy_site

STAGES = (
    "download index shard pretrain embed cluster finetune_expert assemble finetune_router soup evaluate report"
).split()

# The nodes have no devices that could compute. Trainings on both, embedding in parts, the rest as it comes. One thread a
# node: both are this machine, and with two threads each on two cores a step takes seven times as long.
DEMO_RESOURCES = {
    "pretrain": {"nodes": 2, "threads": 1, "mem_mb": 3000, "runtime": 60},
    "embed": {"jobs": 3, "mem_mb": 3000, "runtime": 20},
    "finetune_expert": {"nodes": 2, "threads": 1, "mem_mb": 3000, "runtime": 30},
    "finetune_router": {"nodes": 2, "threads": 1, "mem_mb": 3000, "runtime": 30},
    "evaluate": {"threads": 1, "mem_mb": 3000, "runtime": 20},
}
MINUTES = 60  # for a DAG; the demo takes a quarter of an hour on two cores

pytestmark = pytest.mark.timeout(60 * MINUTES)


def config_of(name):
    if name == "demo":
        config = yaml.safe_load((ROOT / "config.yaml").read_text())
        return config | {"resources": DEMO_RESOURCES}
    return yaml.safe_load((ROOT / f"tests/config/{name}.yaml").read_text())


def copy_with(root, config):
    copy_site(root, "slurm.yaml")
    (root / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.fixture(scope="module", params=["slurm", pytest.param("demo", marks=LONG)])
def finished(request, sandbox, tmp_path_factory):
    """The DAG of slurm.yaml, or the demo's, run on the cluster."""
    root = tmp_path_factory.mktemp("site")
    copy_with(root, config_of(request.param))
    site = Site(root, sandbox)
    printed = site.snakemake(minutes=MINUTES)
    (root / "first.txt").write_text(printed)
    return site


def config_in(root):
    return yaml.safe_load((root / "config.yaml").read_text())


def metrics(root):
    """All that the report says of the models, but how long they took."""
    (path,) = root.glob("results/runs/*/report/results.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    return [{key: value for key, value in row.items() if key != "minutes"} for row in rows]


def manifests(root, stage="*"):
    paths = (root / "results").glob(f"{stage}/*/manifest.json")
    return {str(path.parent.relative_to(root)): json.loads(path.read_text()) for path in paths}


def test_every_stage_is_submitted(finished):
    printed = (finished.root / "first.txt").read_text()
    submitted = set(re.findall(r"rule_(\w+)/[0-9a-f]{8}", printed))
    soups = {"soup"} - set(config_in(finished.root)["baselines"])
    assert submitted >= set(STAGES) - soups
    assert "embed_part" in submitted
    assert list(finished.root.glob("results/runs/*/report/report.html"))


def test_the_same_config_gives_the_same_locally(finished, tmp_path):
    copy_with(tmp_path, config_in(finished.root))
    command = [sys.executable, "-m", "snakemake", "--cores", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    paths = [path.relative_to(tmp_path) for path in tmp_path.glob("results/*/*/*.*")]
    compared = [path for path in paths if path.suffix in (".safetensors", ".npy")]
    for path in compared:
        assert (finished.root / path).read_bytes() == (tmp_path / path).read_bytes(), path
    stages = {path.parts[1] for path in compared}
    assert stages >= {"pretrain", "embed", "cluster", "finetune_expert", "finetune_router"}
    assert metrics(finished.root) == metrics(tmp_path)


def test_trainings_ran_on_both_nodes(finished):
    for stage in ("pretrain", "finetune_expert"):
        trained = manifests(finished.root, stage)
        assert trained
        assert {about["num_processes"] for about in trained.values()} == {2}
        printed = (finished.root / "first.txt").read_text()
        jobs = re.findall(rf"SLURM jobid (\d+) \(log: \S+/rule_{stage}/", printed)
        assert len(jobs) == len(trained)
        for job in jobs:
            assert finished.sandbox.nodes_of(job) == ["node1", "node2"]


def test_where_it_runs_is_no_reason_to_run_again(finished):
    config = config_in(finished.root)
    config["resources"]["embed"]["jobs"] = 2
    config["resources"]["pretrain"]["nodes"] = 1
    (finished.root / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert "Nothing to be done" in finished.snakemake()
