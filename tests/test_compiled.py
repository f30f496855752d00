"""Compiled blocks: the same training but for rounding, and one clear message where there can be none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from test_train import folder, make_data, phase

from clipgraft.checkpoint import read_weights
from clipgraft.compiled import compile_blocks
from clipgraft.config import ConfigError
from clipgraft.models.build import build
from clipgraft.models.moe import upcycle
from clipgraft.pretrain import pretrain

CPU = torch.device("cpu")
has_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not os.environ.get("CLIPGRAFT_LONG_TESTS"),
    reason="minutes of g++: LONG=1, and a machine that has it",
)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLIPGRAFT_PRECISION", "fp32")


def with_experts(config: dict, layers: list[int] | str) -> torch.nn.Module:
    model, where = build(config), {"image_layers": layers, "text_layers": layers}
    upcycle(model, [model.state_dict()] * 2, top_k=1, generator=torch.Generator(), **where)
    return model


def is_compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None


def test_blocks_alone_are_compiled_and_keep_their_names(tiny_config):
    model = build(tiny_config)
    names = [name for name, _ in model.named_parameters()]
    compile_blocks(model, phase(compile=True), CPU)
    blocks = [*model.visual.transformer.resblocks, *model.text.transformer.resblocks]
    assert [m for m in model.modules() if is_compiled(m)] == blocks and len(blocks) == 4
    assert [name for name, _ in model.named_parameters()] == names


def test_blocks_with_experts_are_left_alone(tiny_config):
    model = with_experts(tiny_config, [1])
    compile_blocks(model, phase(compile=True), CPU)
    for tower in (model.visual, model.text):
        assert [is_compiled(block) for block in tower.transformer.resblocks] == [True, False]
    with pytest.raises(ConfigError, match="compile = true has no effect: every block has experts"):
        compile_blocks(with_experts(tiny_config, "all"), phase(compile=True), CPU)


def test_without_a_compiler_nothing_runs(tiny_config, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler: none of g\+\+, .* apt-get"):
        compile_blocks(build(tiny_config), phase(compile=True), CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"\$CXX = no-such-compiler is not on this machine"):
        compile_blocks(build(tiny_config), phase(compile=True), CPU)
    compile_blocks(build(tiny_config), phase(), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuda_graphs": True}, "cuda_graphs has no effect without compile: true"),
        (
            {"cuda_graphs": True, "compile": True, "accumulate": 2},
            "cuda_graphs with accumulate = 2",
        ),
        (
            {"cuda_graphs": True, "compile": True, "grad_checkpointing": True},
            "cuda_graphs with grad_checkpointing",
        ),
        (
            {"cuda_graphs": True, "compile": True, "parallel": "fsdp"},
            "cuda_graphs with parallel = fsdp",
        ),
        ({"precision": "fp16"}, "'bf16' or 'fp32'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        phase(**changes)


def test_graphs_on_a_cpu_have_no_effect_and_it_is_said(tiny_config, caplog):
    model = build(tiny_config)
    compile_blocks(model, phase(compile=True, cuda_graphs=True), CPU)
    assert "cuda_graphs has no effect on cpu" in caplog.text
    assert is_compiled(model.visual.transformer.resblocks[0])


def trained(
    data: tuple[Path, Path], out: Path, init: Path | None = None, **changes: object
) -> dict[str, torch.Tensor]:
    """Weights after three steps, whose texts are of different lengths; AdamW's eps hides no rounding."""
    optim = {"lr": 1e-2, "eps": 1e-2, "max_grad_norm": 1.0}
    settings = phase(samples_seen=48, text_length=20, optim=optim, **changes)
    pretrain(settings, *data, init, folder(out))
    return read_weights(out)


@has_compiler
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("more", [{}, {"grad_checkpointing": True}, {"accumulate": 2}], ids=str)
def test_a_compiled_training_ends_with_the_same_weights_but_for_rounding(tmp_path, more):
    data = make_data(tmp_path)
    ours = trained(data, tmp_path / "compiled", compile=True, **more)
    for name, weight in trained(data, tmp_path / "plain", **more).items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=2e-6, msg=name)


@has_compiler
@pytest.mark.filterwarnings("ignore")
def test_a_watch_leaves_all_blocks_compiled(tmp_path, monkeypatch):
    """Torch keeps so many variants of a block, and runs what comes after them as it is."""
    data, watched = make_data(tmp_path), make_data(folder(tmp_path / "watched"))[0]
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", True)
    monkeypatch.setattr("clipgraft.evaluation.watch.BATCH", 12)  # and a smaller batch after it
    watch = {"task": "renders", "every": 16, "num_samples": 20, "retrieval": True, "zero_shot": []}
    settings = phase(samples_seen=48, text_length=20, compile=True, watch=watch)
    pretrain(settings, *data, None, folder(tmp_path / "out"), watched=watched)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("lock", [[], ["image"]], ids=str)
def test_a_training_compiled_on_a_gpu_ends_with_the_same_weights_but_for_rounding(
    tmp_path, graphs, lock
):
    data, init = make_data(tmp_path), None
    if lock:  # keeps what is there
        init = tmp_path / "init"
        trained(data, init)
    ours = trained(data, tmp_path / "compiled", init, compile=True, cuda_graphs=graphs, lock=lock)
    for name, weight in trained(data, tmp_path / "plain", init, lock=lock).items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=2e-5, msg=name)


def test_a_wished_precision_is_used_whatever_the_environment_says(tmp_path):
    data = make_data(tmp_path)
    for wish in ("bf16", "fp32"):
        settings = phase(samples_seen=16, precision=wish)
        facts = pretrain(settings, *data, None, folder(tmp_path / wish))
        assert facts["precision"] == {"bf16": "bfloat16", "fp32": "float32"}[wish]
    rounded, exact = (read_weights(tmp_path / wish) for wish in ("bf16", "fp32"))
    assert any(not torch.equal(rounded[name], exact[name]) for name in exact)
