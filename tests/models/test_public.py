"""References: models of open_clip's architectures, and ours, with open_clip's own loading as the judge."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from clipgraft.checkpoint import load_reference, save_model
from clipgraft.config import ConfigError
from clipgraft.data.tokens import Tokenizer
from clipgraft.data.vocabulary import clip_merges, write_merges
from clipgraft.lean import with_timm
from clipgraft.model_settings import ModelSettings
from clipgraft.models import public
from clipgraft.models.build import build, describe, model_config
from clipgraft.models.inherit import inherit
from clipgraft.models.moe import insert_experts, upcycle

TEXT = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
TIMM = {"image_size": 160, "timm_model_pretrained": True}  # its weights are not to be downloaded
TOWERS: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "timm-vit": TIMM | {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
    "timm-convnext": TIMM
    | {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"},
    # as SigLIP's: its own pooling and no projection
    "timm-siglip": TIMM | {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
}
SIGLIP_TEXT = {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}


@pytest.fixture(scope="module", autouse=True)
def _open_clip_is_whole() -> None:
    """The judge has all towers, whatever was imported before; a test below has a process of its own for that."""
    with_timm()


def reference(model: Any, pretrained: Any = None, image_size: int | None = None) -> SimpleNamespace:
    """The settings of one, as far as loading reads them."""
    pretrained = None if pretrained is None else str(pretrained)
    return SimpleNamespace(model=str(model), pretrained=pretrained, image_size=image_size)


def architecture(tower: str, **more: Any) -> dict[str, Any]:
    is_siglip = tower == "timm-siglip"
    config = {"embed_dim": 64 if is_siglip else 16, "vision_cfg": TOWERS[tower], "text_cfg": TEXT}
    if is_siglip:
        config |= {"custom_text": True, "init_logit_bias": -10, "text_cfg": TEXT | SIGLIP_TEXT}
    return copy.deepcopy(config | more)


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Make an architecture known to us, and to open_clip as the judge."""
    monkeypatch.setattr("clipgraft.architectures.OURS", tmp_path)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))

    def _add(name: str, config: dict[str, Any]) -> str:
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.factory._MODEL_CONFIGS[name] = copy.deepcopy(config)
        return name

    return _add


def trained(name: str, path: Path, prefix: str = "") -> Path:
    """A checkpoint of open_clip's own model of that name, norms and all not as they began."""
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    with torch.no_grad():
        for part in [*model.parameters(), *model.buffers()]:
            if part.is_floating_point():
                part.add_(torch.rand_like(part) * 0.1)
    torch.save(
        {"state_dict": {prefix + key: part for key, part in model.state_dict().items()}}, path
    )
    return path


def features(model: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    text = torch.tensor([[38, 5, 39, 0, 0, 0, 0, 0], [38, 7, 9, 3, 8, 39, 0, 0]])
    with torch.inference_mode():
        images = torch.randn(2, 3, size, size, generator=generator)
        return model.eval().encode_image(images), model.encode_text(text)


def same(ours: nn.Module, theirs: nn.Module, size: int) -> bool:
    pairs = zip(features(ours, size), features(theirs, size), strict=True)
    return all(torch.allclose(one, other, atol=1e-5) and one.std() > 1e-3 for one, other in pairs)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("is_quick", [False, True])
def test_a_reference_of_any_tower_is_open_clips_model(add, tmp_path, tower, is_quick):
    name = add("any", architecture(tower, quick_gelu=is_quick))
    path = trained(name, tmp_path / "epoch_3.pt", "module.")
    loaded = load_reference(reference(name, path))
    theirs = open_clip.create_model(name, pretrained=str(path))
    assert same(loaded.model, theirs, TOWERS[tower]["image_size"])
    assert loaded.spec["preprocess"]["size"] == TOWERS[tower]["image_size"]


@pytest.mark.parametrize(
    ("tower", "size"), [("vit", 32), ("timm-vit", 192), ("timm-convnext", 192)]
)
def test_another_image_size_is_that_of_open_clip(add, tmp_path, tower, size):
    name = add("any", architecture(tower))
    path = trained(name, tmp_path / "a.pt")
    loaded = load_reference(reference(name, path, image_size=size))
    theirs = open_clip.create_model(name, pretrained=str(path), force_image_size=size)
    assert same(loaded.model, theirs, size)
    assert loaded.spec["config"]["vision_cfg"]["image_size"] == size
    assert loaded.spec["preprocess"]["size"] == size


def test_a_resnet_has_one_image_size(add, tmp_path):
    name = add("any", architecture("resnet"))
    path = trained(name, tmp_path / "a.pt")
    with pytest.raises(
        ConfigError, match=r"reference any/.*: image_size = 64: a ResNet .* 32 pixels"
    ):
        load_reference(reference(name, path, image_size=64))


def test_timm_comes_back_where_open_clip_was_imported_without_it(add, tmp_path):
    """In a process of its own, for here open_clip was imported with timm."""
    name = add("any", architecture("timm-vit"))
    path = trained(name, tmp_path / "a.pt")
    code = f"""
import sys, torch
from pathlib import Path
from types import SimpleNamespace
import clipgraft.architectures
clipgraft.architectures.OURS = Path({str(tmp_path)!r})
from clipgraft.checkpoint import load_reference
assert "timm" not in sys.modules
settings = SimpleNamespace(model="any", pretrained={str(path)!r}, image_size=None)
model = load_reference(settings).model
image = torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160)
print(*model.encode_image(image)[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    image = torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160)
    theirs = open_clip.create_model(name, pretrained=str(path)).eval().encode_image(image)[0]
    assert torch.allclose(torch.tensor([float(x) for x in done.stdout.split()]), theirs, atol=1e-5)


def test_sizes_are_those_of_the_weights_not_of_the_name(add, tmp_path):
    """A run with smaller images and shorter texts than the architecture of its name has."""
    small = architecture("vit")
    path = trained(add("small", small), tmp_path / "a.pt")
    large = architecture("vit")
    large["vision_cfg"]["image_size"], large["text_cfg"]["context_length"] = 32, 12
    loaded = load_reference(reference(add("large", large), path))
    assert loaded.spec["config"]["vision_cfg"]["image_size"] == 16
    assert loaded.spec["config"]["text_cfg"]["context_length"] == 8
    assert same(loaded.model, open_clip.create_model("small", pretrained=str(path)), 16)


def test_a_reference_is_not_trained_and_leaves_the_random_numbers_alone(add, tmp_path):
    name = add("any", architecture("resnet"))
    path = trained(name, tmp_path / "a.pt")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model = load_reference(reference(name, path)).model
    assert torch.equal(torch.rand(3), expected)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def of_public(monkeypatch, name: str, tag: str) -> dict[str, Any]:
    """What a tag says of a model that shall not be downloaded: its spec."""

    def no_weights(*_: Any) -> dict[str, Tensor]:
        return {}

    monkeypatch.setattr(public, "pretrained_file", lambda _: Path("weights"))
    monkeypatch.setattr(public, "read_state", no_weights)
    monkeypatch.setattr(public, "fit_state", no_weights)
    monkeypatch.setattr(public, "build", lambda _: SimpleNamespace(load_state_dict=lambda _: None))
    return public.load_public(name, tag)[1]


@pytest.mark.parametrize(
    ("name", "tag", "is_quick"),
    [
        ("ViT-B-32", "openai", True),
        ("RN50", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32-quickgelu", "run/epoch_30.pt", True),
        ("ViT-B-32", "run/epoch_30.pt", False),
    ],
)
def test_the_activation_is_that_of_the_weights(monkeypatch, name, tag, is_quick):
    assert of_public(monkeypatch, name, tag)["config"]["quick_gelu"] is is_quick


@pytest.mark.parametrize("tag", ["webli", "run/epoch_30.pt"])
def test_images_are_prepared_as_the_weights_of_an_architecture_want_them(monkeypatch, tag):
    """A checkpoint does not say how; what all public weights of that architecture agree on is taken."""
    monkeypatch.setattr(public, "_tokenizer", lambda _: Path("merges.txt.gz"))
    preprocess = of_public(monkeypatch, "ViT-B-16-SigLIP", tag)["preprocess"]
    assert (preprocess["mean"], preprocess["resize_mode"]) == ([0.5, 0.5, 0.5], "squash")
    preprocess = of_public(monkeypatch, "ViT-B-32", "run/epoch_30.pt")["preprocess"]
    assert preprocess["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert preprocess["resize_mode"] == "shortest"


def test_the_tokenizer_of_byte_pairs_is_a_file_that_we_read(add, tmp_path):
    name = add("any", architecture("vit"))
    file = load_reference(reference(name, trained(name, tmp_path / "a.pt"))).tokenizer
    texts = ["A dog, and another one!", "naïve café"]
    theirs = open_clip.get_tokenizer("ViT-B-32")(texts)
    assert torch.equal(torch.from_numpy(Tokenizer(file).encode_batch(texts, 77)), theirs)


def test_a_hugging_face_tokenizer_needs_its_package(add, tmp_path, monkeypatch):
    text = (
        TEXT
        | SIGLIP_TEXT
        | {"hf_tokenizer_name": "timm/some", "tokenizer_kwargs": {"clean": "canonicalize"}}
    )
    name = add("any", architecture("timm-siglip", text_cfg=text))
    path = trained(name, tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(public.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"reference any/.* tokenizer timm/some, which needs .*pip install"
    ):
        load_reference(reference(name, path))


def test_a_hugging_face_tokenizer_is_open_clips_where_its_package_is(add, tmp_path, monkeypatch):
    """The package itself is not needed for this: a stand-in that counts letters."""
    package = types.ModuleType("transformers")

    class AutoTokenizer:
        @staticmethod
        def from_pretrained(name: str, **_: Any) -> Any:
            assert name == "timm/some"
            return lambda texts, max_length, **_: SimpleNamespace(
                input_ids=torch.tensor([[len(text)] * max_length for text in texts])
            )

    package.AutoTokenizer = AutoTokenizer
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.setattr(public.importlib.util, "find_spec", lambda _: package)
    text = (
        TEXT
        | SIGLIP_TEXT
        | {"hf_tokenizer_name": "timm/some", "tokenizer_kwargs": {"clean": "canonicalize"}}
    )
    name = add("any", architecture("timm-siglip", text_cfg=text))
    loaded = load_reference(reference(name, trained(name, tmp_path / "a.pt")))
    assert loaded.tokenizer(["A cat!", "Cat"]).tolist() == [[5] * 8, [3] * 8]  # no marks


def test_wordpiece_is_read_from_berts_own_file(monkeypatch, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\ndog\n")
    monkeypatch.setattr(
        open_clip.pretrained, "download_pretrained_from_hf", lambda *_: str(tmp_path / "vocab.txt")
    )
    text = open_clip.get_model_config("ViT-L-14-CLIPA")["text_cfg"]
    assert Tokenizer(public._tokenizer(text)).encode_batch(["dog"], 4).tolist() == [[2, 3, 0, 0]]


def test_a_tokenizer_that_cannot_be_downloaded_is_said(monkeypatch):
    text = open_clip.get_model_config("ViT-L-14-CLIPA")["text_cfg"]
    with pytest.raises(ConfigError, match=r"its tokenizer bert-base-uncased cannot be had.*Hint"):
        public._tokenizer(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (reference("roberta-ViT-B-32", "x.pt"), "has a Hugging Face text tower, which is not supp"),
        (reference("coca_ViT-B-32", "x.pt"), r"has a captioner \(CoCa\)"),
        (reference("ViT-B-23", "openai"), r"ViT-B-23/openai: .*did you mean ViT-B-32"),
        (reference("ViT-B-32", "opneai"), "no tag of open_clip and no file. Hint: tags .*openai"),
        (reference("ViT-B-32"), "ViT-B-32 is no folder. Hint: .*`pretrained`"),
    ],
)
def test_a_reference_that_cannot_be_had_is_one_message(settings, message):
    with pytest.raises(ConfigError, match=rf"^reference .*{message}"):
        load_reference(settings)


def test_weights_of_another_architecture_are_named(add, tmp_path):
    path = trained(add("deep", architecture("timm-vit")), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"visual.class_embedding is missing"):
        load_reference(reference(add("vit", architecture("vit")), path))


def test_a_model_folder_is_a_reference_with_experts_and_without(tiny_config, tmp_path):
    merges = tmp_path / "merges.txt.gz"
    write_merges(merges, clip_merges()[:12])
    torch.manual_seed(0)
    model = build(tiny_config).eval()
    folders = {kind: tmp_path / kind for kind in ("dense", "moe")}
    for folder in folders.values():
        folder.mkdir()
    save_model(folders["dense"], model, describe(tiny_config), merges)
    moe = copy.deepcopy(model)
    spec = upcycle(
        moe,
        [model.state_dict()] * 2,
        top_k=1,
        image_layers="all",
        text_layers=[1],
        generator=torch.Generator().manual_seed(0),
    )
    save_model(folders["moe"], moe, describe(tiny_config) | {"moe": spec}, merges)
    for folder in folders.values():
        loaded = load_reference(reference(folder), insert_experts=insert_experts)
        assert same(loaded.model, model, 16)
        assert loaded.tokenizer == folder / "merges.txt.gz"
    assert (
        load_reference(reference(folders["dense"], image_size=32)).spec["preprocess"]["size"] == 32
    )
    with pytest.raises(ConfigError, match=r"reference .*moe: .* a dense model is needed here"):
        load_reference(reference(folders["moe"]))


def test_a_student_cannot_inherit_a_tower_of_timm(add, tmp_path, tiny_config):
    name = add("any", architecture("timm-vit"))
    loaded = load_reference(reference(name, trained(name, tmp_path / "a.pt")))
    with pytest.raises(ConfigError, match="timm_model_name is test_vit, the model has None"):
        inherit(tiny_config, loaded)


def test_a_student_inherits_a_checkpoint_of_a_training_run(add, tmp_path):
    """The whole way: a run's file, read as a reference, is the start of a model with smaller patches."""
    name = add("any", architecture("vit", quick_gelu=True))
    loaded = load_reference(reference(name, trained(name, tmp_path / "epoch_3.pt", "module.")))
    student = architecture("vit")
    student["vision_cfg"]["patch_size"] = 4
    config = model_config(ModelSettings(config=student), 40, 16, 8)
    state, config, _ = inherit(config, loaded)
    model = build(config).eval()
    model.load_state_dict(state)
    images = torch.randn(2, 3, 16, 16)
    large = load_reference(reference(name, tmp_path / "epoch_3.pt", image_size=32)).model
    theirs = large.encode_image(images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.allclose(model.encode_image(images), theirs, atol=1e-5)
