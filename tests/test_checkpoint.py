import json
import os
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from clipgraft.checkpoint import (
    SPEC,
    TOKENIZERS,
    WEIGHTS,
    load_model,
    save_model,
)
from clipgraft.config import ConfigError
from clipgraft.job import WRITING
from clipgraft.models.build import build, describe, mlp_parameters
from clipgraft.models.moe import insert_experts, router_parameters, upcycle

TEXT = torch.tensor([[38, 5, 39, 0, 0, 0, 0, 0], [38, 9, 8, 7, 6, 39, 0, 0]])


@pytest.fixture
def merges(tmp_path) -> Path:
    path = tmp_path / "tokens" / TOKENIZERS[0]
    path.parent.mkdir()
    path.write_bytes(b"merges")
    return path


@pytest.fixture
def dense(tmp_path, tiny_config, merges) -> Path:
    """The folder of a dense model."""
    torch.manual_seed(0)
    folder = tmp_path / "base"
    folder.mkdir()
    save_model(folder, build(tiny_config), describe(tiny_config), merges)
    return folder


def fill(folder: Path, value: float) -> None:
    """A model of the same shapes whose weights are all one number."""
    weights = {
        name: torch.full_like(tensor, value) for name, tensor in load_file(folder / WEIGHTS).items()
    }
    save_file(weights, folder / WEIGHTS)


def features(model) -> torch.Tensor:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.cat(model(images, TEXT)[:2])


def test_dense_model_comes_back_as_it_was(tmp_path, tiny_config, merges):
    model = build(tiny_config)
    spec = {**describe(tiny_config), "samples_seen": 77}
    save_model(tmp_path, model, spec, merges)
    loaded = load_model(tmp_path)
    assert torch.equal(features(loaded.model), features(model))
    assert loaded.spec == {**spec, "kind": "dense", "base": None}
    assert loaded.tokenizer == tmp_path / merges.name
    assert loaded.tokenizer.read_bytes() == b"merges"


def test_weights_may_be_read_by_whoever_may_read_their_folder(dense, tiny_config, merges, tmp_path):
    for rights, of_weights in ((0o755, 0o644), (0o770, 0o660), (0o700, 0o600)):
        folder = tmp_path / oct(rights)
        folder.mkdir()
        folder.chmod(rights)
        save_model(folder, build(tiny_config), describe(tiny_config), merges)
        assert (folder / WEIGHTS).stat().st_mode & 0o777 == of_weights


def test_a_model_keeps_the_tokenizer_it_has(tmp_path, tiny_config, merges):
    pieces = merges.with_name("vocab.txt")
    pieces.write_bytes(b"pieces")
    save_model(tmp_path, build(tiny_config), describe(tiny_config), pieces)
    assert load_model(tmp_path).tokenizer == tmp_path / "vocab.txt"
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer, neither merges.txt.gz nor vocab.txt"):
        load_model(tmp_path)


def test_dense_weights_and_config_open_in_open_clip(dense):
    spec = json.loads((dense / SPEC).read_text())
    about = {"model_cfg": spec["config"], "preprocess_cfg": spec["preprocess"]}
    (dense / "open_clip_config.json").write_text(json.dumps(about))
    os.link(dense / WEIGHTS, dense / "open_clip_model.safetensors")
    theirs = open_clip.create_model(f"local-dir:{dense}")
    assert torch.equal(features(theirs), features(load_model(dense).model))


def test_mixture_comes_back_as_it_was(dense, tmp_path, merges):
    base = load_model(dense)
    layers = {"image_layers": [1], "text_layers": "all"}
    spec = upcycle(
        base.model, [base.model.state_dict()] * 3, top_k=2, generator=torch.Generator(), **layers
    )
    folder = tmp_path / "moe"
    folder.mkdir()
    save_model(folder, base.model, {**base.spec, "moe": spec}, merges)
    with pytest.raises(ConfigError, match="a dense model is needed here"):
        load_model(folder)
    loaded = load_model(folder, insert_experts=insert_experts)
    assert loaded.spec["kind"] == "moe"
    assert set(router_parameters(loaded.model)) == set(router_parameters(base.model))
    assert torch.equal(features(loaded.model), features(base.model))


def test_delta_holds_the_changed_tensors_and_is_whole_with_its_base(dense, tmp_path, merges):
    base = load_model(dense)
    trained = mlp_parameters(base.model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    folder = tmp_path / "expert"
    folder.mkdir()
    save_model(folder, base.model, base.spec, merges, only=trained, base=dense)
    assert load_file(folder / WEIGHTS).keys() == trained.keys()
    assert json.loads((folder / SPEC).read_text())["base"] == "../base"
    loaded = load_model(folder)
    assert loaded.spec["kind"] == "delta"
    assert torch.equal(features(loaded.model), features(base.model))


def test_delta_finds_its_base_where_the_job_puts_its_files_and_through_links(
    dense, tmp_path, merges
):
    base = load_model(dense)
    writing = tmp_path / "expert" / WRITING
    writing.mkdir(parents=True)
    save_model(writing, base.model, base.spec, merges, only=mlp_parameters(base.model), base=dense)
    for path in list(writing.iterdir()):
        path.rename(path.parent.parent / path.name)
    far = tmp_path / "runs" / "main"
    far.mkdir(parents=True)
    (far / "expert").symlink_to("../../expert")
    assert torch.equal(features(load_model(far / "expert").model), features(base.model))


def test_delta_of_a_delta_has_the_trunk_of_the_first_base(dense, tmp_path, merges):
    base = load_model(dense)
    for name, before in (("first", dense), ("second", tmp_path / "first")):
        (tmp_path / name).mkdir()
        trained = mlp_parameters(base.model)
        save_model(tmp_path / name, base.model, base.spec, merges, only=trained, base=before)
    fill(tmp_path / "first", 0.5)
    second = load_model(tmp_path / "second").model
    assert torch.equal(features(second), features(load_model(dense).model))


def test_other_sizes_interpolate_positions_and_the_spec_says_so(dense):
    loaded = load_model(dense, image_size=32, text_length=16)
    before = load_model(dense).model.state_dict()
    expected = F.interpolate(
        before["text.positional_embedding"].T[None], 16, mode="linear", align_corners=False
    )[0].T
    assert torch.allclose(loaded.model.text.positional_embedding, expected)
    assert loaded.model.visual.positional_embedding.shape == (17, 32)
    assert loaded.spec["config"]["vision_cfg"]["image_size"] == 32
    assert loaded.spec["config"]["text_cfg"]["context_length"] == 16
    assert loaded.spec["preprocess"]["size"] == 32


@pytest.mark.parametrize("name", [WEIGHTS, SPEC])
def test_missing_file_is_named(dense, name):
    (dense / name).unlink()
    with pytest.raises(ConfigError, match=rf"base/{name} does not exist"):
        load_model(dense)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_weights_are_named(dense, kept):
    whole = (dense / WEIGHTS).read_bytes()
    (dense / WEIGHTS).write_bytes(whole[:kept])
    with pytest.raises(ConfigError, match=rf"{WEIGHTS} \([\d,]+ bytes\) is damaged"):
        load_model(dense)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2}'])
def test_spec_that_is_none_is_named(dense, text):
    (dense / SPEC).write_text(text)
    with pytest.raises(ConfigError, match=r"model\.json (is no model spec|has format 2)"):
        load_model(dense)


def test_weights_of_another_architecture_are_one_message_with_shapes(dense):
    weights = load_file(dense / WEIGHTS)
    weights["text.ln_final.bias"] = torch.zeros(7)
    del weights["visual.proj"]
    save_file(weights, dense / WEIGHTS)
    message = r"text.ln_final.bias is \[7\], the model has \[32\]; visual.proj is missing"
    with pytest.raises(ConfigError, match=message):
        load_model(dense)


def test_delta_of_another_architecture_is_named(dense, tmp_path, merges):
    base = load_model(dense)
    (tmp_path / "expert").mkdir()
    trained = mlp_parameters(base.model)
    save_model(tmp_path / "expert", base.model, base.spec, merges, only=trained, base=dense)
    save_file({"text.block.mlp": torch.zeros(2)}, tmp_path / "expert" / WEIGHTS)
    with pytest.raises(ConfigError, match=r"expert/.* text.block.mlp is not in the model"):
        load_model(tmp_path / "expert")
