"""The profile: what sbatch is really asked for, and what must hold of its file and of the plugin's version."""

from __future__ import annotations

import importlib.metadata
import json
import re
import signal

import pytest
import yaml
from cluster_site import ROOT, Site, copy_site, plugin_folder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sandbox import wait_until

from clipgraft.config import load_config
from clipgraft.planning import plan_runs

PROFILES = ROOT / "workflow/profiles"


def profile(name):
    return yaml.safe_load((PROFILES / name / "config.yaml").read_text())


def test_the_profile_takes_over_what_it_replaces():
    assert profile("default").items() <= profile("slurm").items()


def test_only_the_profile_has_retries():
    assert profile("slurm")["retries"] > 0
    for path in (ROOT / "rules").glob("*.smk"):
        assert "retries:" not in path.read_text(), path


def test_what_the_plugin_needs_is_pinned_for_all():
    if not plugin_folder().is_dir():
        pytest.skip("no SLURM plugin here (envs/slurm.txt)")
    (about,) = importlib.metadata.distributions(
        name="snakemake-executor-plugin-slurm", path=[str(plugin_folder())]
    )
    files = [(ROOT / f"envs/{name}.txt").read_text() for name in ("cpu", "slurm")]
    pinned = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", "\n".join(files), re.MULTILINE))
    assert pinned["snakemake-executor-plugin-slurm"] == about.version
    for text in about.requires or []:
        need = Requirement(text)
        if need.marker is None:
            assert pinned[canonicalize_name(need.name)] in need.specifier, text


@pytest.fixture
def waiting(sandbox, tmp_path):
    """A site whose first training could be submitted: what it reads seems to be there."""
    copy_site(tmp_path, "slurm.yaml")
    path = tmp_path / "config.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["resources"]["pretrain"] = {
        "gpu": 4,
        "nodes": 2,
        "threads": 3,
        "mem_mb": 2500,
        "runtime": 90,
    }
    path.write_text(yaml.safe_dump(raw))
    path = tmp_path / "workflow/profiles/slurm/config.yaml"
    text = path.read_text().replace("# slurm_account: lab", "slurm_account: lab")
    path.write_text(text.replace("# slurm_partition: gpu", "slurm_partition: scavenge"))
    return Site(tmp_path, sandbox)


@pytest.mark.parametrize(
    ("devices", "kind", "per_node", "in_all"),
    [
        ("gres", "", "gres:gpu:2", None),
        ("gpus", "", "gres:gpu:2", "gres:gpu:4"),
        ("both", "fake", "gres:gpu:fake:2", "gres:gpu:fake:4"),
    ],
)
def test_slurm_is_asked_for_devices_as_the_site_wants_it(waiting, devices, kind, per_node, in_all):
    site = {"devices": devices, "device_type": kind, "extra": "--hold"}
    for stage in ("download", "index", "shard"):
        for folder in planned(waiting, stage):
            (waiting.root / folder).mkdir(parents=True)
            (waiting.root / folder / "manifest.json").write_text("{}")
    process = waiting.begin("--config", f"slurm={json.dumps(site)}", "--until", "pretrain")
    try:
        ask = ("squeue", "--noheader", "--format=%A|%Z|%k")
        mine = f"|{waiting.root}|rule_pretrain"
        wait_until(
            lambda: mine in waiting.sandbox.ask(*ask) or process.poll() is not None, "the job"
        )
        rows = [row for row in waiting.sandbox.ask(*ask).splitlines() if mine in row]
        assert rows, (waiting.root / "printed.txt").read_text()
        job = waiting.sandbox.ask("scontrol", "show", "job", rows[0].split("|")[0])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    about = dict(word.split("=", 1) for word in job.split() if "=" in word)
    assert about["NumNodes"] == "2-2" and about["CPUs/Task"] == "3" and about["Requeue"] == "1"
    assert about["Account"] == "lab" and about["Partition"] == "scavenge"
    assert about["MinMemoryNode"] == "2500M" and about["TimeLimit"] == "01:30:00"
    assert about.get("TresPerNode") == per_node
    assert about.get("TresPerJob") == in_all
    assert "TresPerTask" not in about


def planned(site, stage):
    """Folders of a stage's jobs."""
    jobs = plan_runs(load_config(yaml.safe_load((site.root / "config.yaml").read_text())), {})
    return {f"results/{job.folder}" for job in jobs["small"] if job.stage == stage}
