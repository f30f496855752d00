"""The floors of the library, and what may import what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parent.parent / "lib" / "clipgraft"
SCRIPTS = LIBRARY.parent.parent / "scripts"
FLOORS = [
    {
        "settings",
        "run_settings",
        "crosschecks",
        "loss_settings",
        "moe_settings",
        "evaluation_settings",
        "evalset_tasks",
        "baseline_settings",
        "recipes",
        "model_settings",
        "misfits",
        "spelling",
        "resource_settings",
        "reductions",
        "schedule",
        "sources",
        "config",
        "versions",
        "local_files",
        "planning",
        "job",
        "arguments",
        "aside",
        "disk",
        "lock",
        "orphan",
        "integrity",
        "provenance",
        "log",
        "runs",
        "compare",
        "architectures",
        "cost",
        "plan",
        "footprint",
        "startup",
        "scale",
    },
    {"compiled", "dist", "exchange", "launch", "lean", "devices", "parallel"},
    {"data", "models", "losses"},
    {
        "checkpoint",
        "optim",
        "meter",
        "objectives",
        "gradcache",
        "training_data",
        "training_state",
    },
    {"encoding"},
    {"train", "evaluation", "loading"},
    {
        "batch_size",
        "pretrain",
        "references",
        "embed",
        "cluster",
        "kmeans",
        "experts",
        "centroids",
        "graft",
        "soup",
        "router",
        "report",
        "clipmoe",
        "export",
        "clip_benchmark",
        "explore",
        "evalset",
    },
]
MODULES = sorted(path for path in LIBRARY.rglob("*.py") if path != LIBRARY / "__init__.py")


def top(module: str) -> str:
    return module.split(".")[1]


def part_of(path: Path) -> str:
    return path.relative_to(LIBRARY).with_suffix("").parts[0]


def floor_of(part: str) -> int:
    floors = [number for number, floor in enumerate(FLOORS) if part in floor]
    assert len(floors) == 1, f"{part} stands on no floor or on several"
    return floors[0]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "clipgraft":
                names |= {f"clipgraft.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_imports_only_go_down(path: Path):
    here = floor_of(part_of(path))
    for name in imported(path):
        if not name.startswith("clipgraft."):
            continue
        there = floor_of(top(name))
        same_part = top(name) == part_of(path)
        # Floors 0 and 6 are flat: their modules may use one another; on floor 2 the three parts may not.
        assert there < here or same_part or (here in (0, 1, 6) and there == here), (
            f"{path.name} (floor {here}) imports {name} (floor {there})"
        )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_the_library_never_imports_snakemake(path: Path):
    assert not any(name.split(".")[0] == "snakemake" for name in imported(path))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_losses_know_neither_processes_nor_files(path: Path):
    if part_of(path) == "losses":
        assert not imported(path) & {"torch.distributed", "os", "pathlib", "json"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_open_clip_is_imported_by_lean_alone(path: Path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert path.name == "lean.py" or "open_clip" not in roots


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_lean_leaves_the_compiler_and_foreign_models_out():
    unneeded = ["torch._dynamo", "torch._inductor", "timm", "wandb", "transformers"]
    unneeded += ["torchvision.models.resnet", "huggingface_hub"]
    assert (
        run(f"import sys, clipgraft.models.build; print(set({unneeded}) & set(sys.modules))")
        == "set()"
    )


def test_what_lean_left_out_comes_when_it_is_asked_for():
    after = """
import warnings
from clipgraft.lean import open_clip
import timm, torch, torchvision.ops
from torchvision.ops.roi_align import is_compile_supported
assert is_compile_supported("cpu") in (True, False)
assert torch._dynamo.__file__ and timm.__file__
assert torch.compile(torch.nn.Linear(2, 3), backend="eager")(torch.ones(1, 2)).shape == (1, 3)
print(torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0, 4, 4]])], 1).item())
"""
    assert float(run(after)) == 1


def test_models_that_lean_left_out_come_when_they_are_asked_for():
    after = """
from clipgraft.lean import open_clip
import torchvision
assert torchvision.models.resnet18(num_classes=2).fc.out_features == 2
assert isinstance(torchvision.models.resnet18(), torchvision.models.ResNet)
config = open_clip.hf_model.AutoConfig.for_model("bert", hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
from open_clip.pretrained import hf_hub_download
assert open_clip.pretrained.has_hf_hub()
try:
    hf_hub_download("nobody/nothing", "nowhere", local_files_only=True)
except Exception as error:
    assert type(error).__name__ == "LocalEntryNotFoundError", error
print(type(open_clip.hf_model.AutoModel.from_config(config)).__name__)
"""
    assert run(after) == "BertModel"


def test_lean_keeps_what_was_imported_before_it():
    before = "import timm, torch._dynamo; from clipgraft.lean import open_clip; import open_clip.timm_model as there; "
    assert run(before + "print(there.timm is timm)") == "True"


def test_floor_0_loads_no_torch_and_no_pandas():
    modules = ", ".join(f"clipgraft.{name}" for name in sorted(FLOORS[0]))
    code = f"import sys, {modules}; print({{'torch', 'numpy', 'pandas', 'open_clip'}} & set(sys.modules))"
    assert run(code) == "set()"


def test_every_stage_is_a_rule_a_script_and_a_section_of_words():
    from clipgraft.settings import STAGES

    rules = "".join(path.read_text() for path in (SCRIPTS.parent / "rules").glob("*.smk"))
    for stage in STAGES:
        assert (SCRIPTS / f"{stage}.py").is_file()
        assert f"\nrule {stage}:" in rules


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_are_small_and_explain_themselves(script: Path):
    assert len(script.read_text().splitlines()) < 60
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--set KEY=VALUE" in done.stdout


def test_what_is_tested_is_what_conda_and_the_image_get():
    """envs/cpu.txt is for them, envs/dev.txt for `make`."""
    pins = {
        name: set(
            re.findall(
                r"^([a-z0-9._-]+==[^ \\]+)",
                (LIBRARY.parent.parent / f"envs/{name}.txt").read_text(),
                re.MULTILINE,
            )
        )
        for name in ("cpu", "dev")
    }
    assert len(pins["cpu"]) > 100
    assert pins["cpu"] <= pins["dev"]
