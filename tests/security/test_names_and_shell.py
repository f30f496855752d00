"""Laws of names: those that become paths have no way out, and no shell ever sees one that it could take for a command."""

import copy
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from clipgraft.config import ConfigError, load_config, sweep_points
from clipgraft.planning import plan_runs
from clipgraft.versions import deciding

ROOT = Path(__file__).resolve().parents[2]
RAW = yaml.safe_load((ROOT / "tests/config/small.yaml").read_text())
EVIL = [
    "../out",
    "a/b",
    "/abs",
    "a b",
    "a;touch x",
    "$(touch x)",
    "`touch x`",
    "a'b",
    'a"b',
    "a\nb",
    "a\n",
    "",
    ".",
]
TEMPLATE = """it's "{c}" $(touch pwned-a) `touch pwned-b` ; touch pwned-c & {{x}} \\ $HOME #"""


def named(place: str, name: str) -> dict:
    """The small config with one name changed."""
    raw = copy.deepcopy(RAW)
    match place:
        case "run":
            raw["runs"] = {name: {}}
        case "sweep":
            raw["sweep"] = {"size": {name: {}, "other": {}}}
        case "data":
            raw["download"][name] = raw["download"]["train"]
        case "phase":
            raw["pretrain"][0]["name"] = name
        case "task":
            raw["evaluate"]["tasks"][name] = raw["evaluate"]["tasks"]["renders"]
        case "baseline":
            raw["baselines"] = {name: raw["baselines"]["mlp"]}
    return raw


@pytest.mark.parametrize("place", ["run", "sweep", "data", "phase", "task", "baseline"])
def test_names_of_a_config_are_no_paths_and_no_commands(place):
    for name in EVIL:
        with pytest.raises(ConfigError):
            raw = named(place, name)
            plan_runs(load_config(raw), sweep_points(raw))


@pytest.fixture
def weird(tmp_path, copy_to):
    """The workflow in a folder, and on data in another, whose names are meant for a shell."""
    root = tmp_path / 'it\'s $(touch pwned-d) `touch pwned-e`; touch pwned-f & "x" {y}'
    root.mkdir()
    workflow = copy_to(root)
    data = tmp_path / "data's $(touch pwned-g)"
    for number, name in enumerate(["$(touch pwned-h)", "a's;touch pwned-i"]):
        (data / name).mkdir(parents=True)
        for each in range(6):
            pixels = np.random.default_rng(number * 10 + each).integers(0, 255, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(data / name / f"{each}.png")
    raw = copy.deepcopy(RAW)
    train = {"kind": "class_folder", "folder": str(data), "templates": [TEMPLATE]}
    raw["download"]["train"] = train
    (root / "small.yaml").write_text(yaml.safe_dump(raw))
    return workflow


def commands(printed: str) -> list[list[str]]:
    """The words that a shell would make of each printed command; no shell is asked."""
    return [shlex.split(line) for line in printed.splitlines() if " --settings " in line]


def test_a_shell_takes_no_part_of_a_path_or_a_setting_for_a_command(weird):
    printed = weird.snakemake("-n", "-p", "--cores", "1")
    told = commands(printed)
    raw = yaml.safe_load((weird.root / "small.yaml").read_text())
    jobs = {job.folder: job for jobs in plan_runs(load_config(raw), {}).values() for job in jobs}
    assert len(told) == len(jobs) > 15
    for words in told:
        script = next(word for word in words if "/scripts/" in word)
        assert script.startswith(f"{weird.root}/scripts/"), words
        job = jobs[words[words.index("--out") + 1].removeprefix("results/")]
        settings = json.loads(words[words.index("--settings") + 1])
        assert settings == deciding(job.settings, job.inputs)[0], words
        known = {"--name", "--settings", "--out", "--threads", "--log", "--input", "--set"}
        rest = words[words.index(script) + 1 :]
        assert set(rest[::2]) <= known, rest
    assert any(
        "touch pwned-a" in word for words in told for word in words
    )  # or nothing was attacked


def test_a_workflow_runs_in_such_a_folder_and_obeys_nothing(weird):
    weird.snakemake("--cores", "1", "--until", "index")
    made = {path.name for path in weird.root.parent.rglob("pwned-*")}
    assert made == set()
    manifests = list(weird.root.glob("results/index/*/manifest.json"))
    assert len(manifests) == 2


def test_the_name_of_a_run_that_the_environment_gives_is_no_command(workflow):
    printed = workflow.snakemake(
        "--cores", "1", "explore", check=False, RUN="$(touch pwned);`touch pwned`"
    )
    assert "explore:" in printed
    assert not list(workflow.root.glob("pwned*"))


def test_the_rules_of_a_shell_quote_what_users_write():
    """What stands in a rule's command without `:q` is a number, a hash, a name that was checked, or quoted already."""
    plain = {"PYTHON", "SCRIPTS", "LAUNCH", "threads", "log", "wildcards.version", "wildcards.run"}
    plain |= {f"resources.{name}" for name in ("job", "gpu", "gpus_per_node", "nodes")}
    plain |= {f"params.{name}" for name in ("inputs", "watch", "min_success", "batch_size", "part")}
    texts = [path.read_text() for path in sorted((ROOT / "rules").glob("*.smk"))]
    shells = [each for text in texts for each in re.findall(r"shell:\n((?: {8}.*\n)+)", text)]
    fields = {each for shell in shells for each in re.findall(r"(?<!{){([^{}]+)}(?!})", shell)}
    assert len(shells) > 12 and "params.settings:q" in fields
    assert {field for field in fields if not field.endswith(":q")} <= plain
