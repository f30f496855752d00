"""Both towers without Python: onnxruntime and torch.export give our features, for a batch of any size."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from small_models import SIDE, TEXTS

import clipgraft
from clipgraft.config import ConfigError
from clipgraft.export.__main__ import export

SMALL = {"vision_cfg": {"layers": 1, "pool_type": "avg"}, "text_cfg": {"layers": 1}}
KINDS = [(SMALL, 2), ({}, 0)]


def inputs_of(num: int, tokenizer) -> dict[str, torch.Tensor]:
    images = torch.randn(num, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(num))
    return {"image": images, "text": tokenizer((TEXTS * 2)[:num])}


def assert_same(found: torch.Tensor, model, name: str, inputs: torch.Tensor) -> None:
    with torch.inference_mode():
        encode = model.encode_image if name == "image" else model.encode_text
        assert torch.allclose(found, encode(inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("changes", "num_experts"), KINDS)
def test_onnxruntime_gives_the_same_features(model_folder, tmp_path, caplog, changes, num_experts):
    caplog.set_level(logging.INFO)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = model_folder(changes, num_experts=num_experts, text_layers="all")
    model, _, tokenizer = clipgraft.load(folder)
    export("onnx", folder, tmp_path / "out")
    assert {record.name for record in caplog.records} == {"clipgraft.export.__main__"}
    for name, key in (("image", "pixel_values"), ("text", "input_ids")):
        session = onnxruntime.InferenceSession(tmp_path / f"out/{name}.onnx")
        for num in (1, 5):
            inputs = inputs_of(num, tokenizer)[name]
            (found,) = session.run([f"{name}_features"], {key: inputs.numpy()})
            assert_same(torch.from_numpy(found), model, name, inputs)
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["logit_scale"] == pytest.approx(model.logit_scale.detach().exp().item())


def test_programs_of_torch_give_the_same_features(model_folder, tmp_path):
    folder = model_folder(SMALL, num_experts=3, text_layers="all")
    model, _, tokenizer = clipgraft.load(folder)
    export("torch", folder, tmp_path / "out")
    for name in ("image", "text"):
        program = torch.export.load(tmp_path / f"out/{name}.pt2").module()
        for num in (1, 5):
            inputs = inputs_of(num, tokenizer)[name]
            assert_same(program(inputs).detach(), model, name, inputs)


def test_a_missing_package_is_named(model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"not installed: onnxscript. Hint: pip install"):
        export("onnx", model_folder(), tmp_path / "out")
