"""CLIP_benchmark evaluates a mixture of experts through our loader: the accuracy of a plain loop.

It wants a numpy older than ours, so it comes from a folder of its own:

    uv pip install --no-deps --target peer clip-benchmark==1.6.2 pycocoevalcap==1.2 numpy==2.2.6
    PYTHONPATH=lib:peer pytest -n 0 tests/test_clip_benchmark.py
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clipgraft
from clipgraft.checkpoint import save_model
from clipgraft.data.vocabulary import Encoder, write_merges
from clipgraft.models.build import build, describe
from clipgraft.models.moe import upcycle

CLASSES, TEMPLATE, NUM = ["cat", "dog", "bird"], "a photo of a {c}", 40


@pytest.fixture
def mixture(tmp_path, tiny_config) -> Path:
    """Of experts that differ; letters are its words."""
    encoder = Encoder([])
    write_merges(tmp_path / "merges.txt.gz", encoder.merges)
    text = tiny_config["text_cfg"] | {"vocab_size": encoder.vocab_size, "context_length": 24}
    config = {**tiny_config, "text_cfg": text}
    torch.manual_seed(0)
    model, folder = build(config), tmp_path / "model"
    folder.mkdir()
    experts = [model.state_dict(), build(config).state_dict()]
    layers = {"image_layers": "all", "text_layers": "all"}
    moe = upcycle(model, experts, top_k=1, generator=torch.Generator(), **layers)
    save_model(folder, model, {**describe(config), "moe": moe}, tmp_path / "merges.txt.gz")
    return folder


@pytest.fixture
def pictures(tmp_path) -> list[Image.Image]:
    """Noise, class by turns, and as CLIP_benchmark's WebDataset."""
    draw = np.random.default_rng(0)
    drawn = [
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(NUM)
    ]
    (tmp_path / "set/test").mkdir(parents=True)
    with tarfile.open(tmp_path / "set/test/0.tar", "w") as tar:
        for number, picture in enumerate(drawn):
            file = io.BytesIO()
            picture.save(file, "PNG")
            for end, data in (("png", file.getvalue()), ("cls", str(number % 3).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "set/test/nshards.txt").write_text("1\n")
    (tmp_path / "set/classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (tmp_path / "set/zeroshot_classification_templates.txt").write_text(TEMPLATE + "\n")
    return drawn


@pytest.mark.skipif(
    find_spec("clip_benchmark") is None,
    reason="clip-benchmark is not installed: the head of this file says how",
)
def test_clip_benchmark_finds_the_accuracy_of_a_plain_loop(mixture, pictures, tmp_path):
    words = ["--model_type", "clipgraft", "--model", "moe", "--pretrained", str(mixture)]
    words += ["--dataset", "wds/noise", "--dataset_root", str(tmp_path / "set"), "--no_amp"]
    words += ["--task", "zeroshot_classification", "--num_workers", "1"]
    words += ["--output", str(tmp_path / "result.json")]
    command = [sys.executable, "-m", "clipgraft.clip_benchmark", "eval", *words]
    path = os.pathsep.join([os.environ["PYTHONPATH"], *sys.path])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    model, preprocess, tokenizer = clipgraft.load(mixture)
    texts = tokenizer([TEMPLATE.format(c=name) for name in CLASSES])
    with torch.inference_mode():
        text_CD = F.normalize(model.encode_text(texts), dim=-1)
        right = [
            int((model.encode_image(preprocess(picture)[None]) @ text_CD.T).argmax()) == number % 3
            for number, picture in enumerate(pictures)
        ]
    assert found["metrics"]["acc1"] == pytest.approx(np.mean(right), abs=1e-9)
    assert found["model"] == "moe" and 0 < sum(right) < NUM


def test_without_it_there_is_a_hint(monkeypatch):
    from clipgraft.clip_benchmark import main

    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    with pytest.raises(SystemExit, match="Hint: pip install clip-benchmark"):
        main()
