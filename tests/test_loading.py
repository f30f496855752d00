"""`clipgraft.load`: what stage `evaluate` computes, in one line."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import clipgraft
from clipgraft.checkpoint import load_model, save_model
from clipgraft.config import ConfigError
from clipgraft.data.images import decode, prepare
from clipgraft.data.tokens import Tokenizer
from clipgraft.data.vocabulary import Encoder, write_merges
from clipgraft.models.build import build, describe, normalize
from clipgraft.models.moe import insert_experts, upcycle

CHANGED = {"folder": "c_fc_bias", "expert": "c_fc.bias"}  # of an MLP
TEXTS = ["a dog", "two dogs, and more than there is room for"]


@pytest.fixture
def folder(tmp_path, tiny_config):
    """A mixture of two experts."""
    encoder = Encoder([])
    write_merges(tmp_path / "merges.txt.gz", encoder.merges)
    tiny_config["text_cfg"]["vocab_size"] = encoder.vocab_size
    torch.manual_seed(0)
    model = build(tiny_config)
    experts = [model.state_dict(), build(tiny_config).state_dict()]
    layers = {"image_layers": [1], "text_layers": "all"}
    moe = upcycle(model, experts, top_k=1, generator=torch.Generator(), **layers)
    (tmp_path / "model").mkdir()
    spec = {**describe(tiny_config), "moe": moe}
    save_model(tmp_path / "model", model, spec, tmp_path / "merges.txt.gz")
    return tmp_path / "model"


def test_features_are_those_of_the_stage_evaluate(folder):
    model, preprocess, tokenizer = clipgraft.load(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    spec = json.loads((folder / "model.json").read_text())["preprocess"]
    square = prepare(decode(file.getvalue()), 16, spec["resize_mode"], spec["interpolation"])
    image = normalize(torch.tensor(square).permute(2, 0, 1)[None], spec["mean"], spec["std"])
    ids = torch.from_numpy(Tokenizer(folder / "merges.txt.gz").encode_batch(TEXTS, 8))
    ours = load_model(folder, insert_experts=insert_experts).model.eval()
    assert not model.training
    assert torch.equal(preprocess(Image.open(file)), image[0])
    assert torch.equal(tokenizer(TEXTS), ids) and torch.equal(tokenizer(TEXTS[0]), ids[:1])
    with torch.inference_mode():
        assert torch.equal(model.encode_image(image), ours.encode_image(image))
        assert torch.equal(model.encode_text(ids), ours.encode_text(ids))


@pytest.fixture
def expert(tmp_path, tiny_config, folder):
    """A dense base, and an expert that changed one tensor of it."""
    tiny_config["text_cfg"]["vocab_size"] = Encoder([]).vocab_size
    model, spec = build(tiny_config), describe(tiny_config)
    for name in ("base", "expert"):
        (tmp_path / name).mkdir()
    save_model(tmp_path / "base", model, spec, folder / "merges.txt.gz")
    changed = "text.transformer.resblocks.0.mlp.c_fc.weight"
    torch.nn.init.normal_(model.get_parameter(changed))
    save_model(
        tmp_path / "expert",
        model,
        spec,
        folder / "merges.txt.gz",
        [changed],
        tmp_path / "base",
    )
    return tmp_path / "expert"


@pytest.mark.parametrize("kind", ["folder", "expert"])
def test_a_model_that_was_changed_is_saved_whole_and_loaded_again(tmp_path, kind, request):
    like = request.getfixturevalue(kind)
    model, preprocess, tokenizer = clipgraft.load(like)
    with torch.no_grad():
        model.text.transformer.resblocks[0].mlp.get_parameter(CHANGED[kind]).add_(1)
    clipgraft.save(model, tmp_path / "new/one", like)
    again, *functions = clipgraft.load(str(tmp_path / "new/one"))
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ids = tokenizer(TEXTS)
    with torch.inference_mode():
        features = [each.encode_text(ids) for each in (model, again, clipgraft.load(like)[0])]
    assert torch.equal(features[0], features[1]) and not torch.equal(features[0], features[2])
    assert functions[0] == preprocess and torch.equal(functions[1](TEXTS), ids)
    old, new = (json.loads((each / "model.json").read_text()) for each in (like, tmp_path / "new/one"))  # fmt: skip
    assert new == {**old, "kind": "moe" if old["moe"] else "dense", "base": None}


def test_a_model_is_saved_neither_over_another_nor_as_what_it_is_not(tmp_path, folder, expert):
    model = clipgraft.load(folder)[0]
    with pytest.raises(ConfigError, match=r"base exists\. Hint: the name of a new folder"):
        clipgraft.save(model, tmp_path / "base", folder)
    with pytest.raises(ConfigError, match=r"c_fc\.bias of the model to save: none, in .*expert"):
        clipgraft.save(model, tmp_path / "new", expert)
    with pytest.raises(ConfigError, match=r"no_model/model\.json does not exist"):
        clipgraft.save(model, tmp_path / "new", tmp_path / "no_model")
    assert not (tmp_path / "new").exists()


def test_workers_of_a_data_loader_can_have_both_functions(folder):
    _, *functions = clipgraft.load(folder)
    preprocess, tokenizer = pickle.loads(pickle.dumps(functions))
    assert torch.equal(tokenizer(TEXTS), functions[1](TEXTS))
    grey = Image.new("L", (18, 17), 99)
    assert torch.equal(preprocess(grey), functions[0](grey)) and preprocess(grey).shape[0] == 3


def test_the_package_stays_light():
    code = "import sys, clipgraft; print({'torch', 'numpy', 'PIL', 'clipgraft.loading'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
