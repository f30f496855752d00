"""transformers gives the features of our models: its own CLIPModel, and the code that we put beside the weights."""

from __future__ import annotations

import ast
import sys

import pytest
import torch
from small_models import LENGTH, SIDE, TEXTS, VOCABULARIES, images

import clipgraft
from clipgraft.config import ConfigError
from clipgraft.export.__main__ import export
from clipgraft.export.own_code import CODE
from clipgraft.models.moe import MoeMlp

CLIP_MODELS = [
    {},
    {"quick_gelu": True, "vision_cfg": {"mlp_ratio": 2.0, "final_ln_after_pool": True}},
    {"vision_cfg": {"pos_embed_type": "sin_cos_2d", "patch_size": 16}, "text_cfg": {"heads": 2}},
]


def tokenized(processor, texts=TEXTS):
    return processor(text=texts, return_tensors="pt", padding=True, truncation=True).input_ids


def assert_close(theirs, ours):
    assert theirs.shape == ours.shape
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-5), (theirs - ours).abs().max()
    assert ours.abs().max() > 0.01


@pytest.mark.parametrize("changes", CLIP_MODELS)
def test_clip_model_gives_the_same_features(model_folder, tmp_path, transformers, changes):
    folder, out = model_folder(changes), tmp_path / "out"
    model, _, tokenizer = clipgraft.load(folder)
    export("hugging_face", folder, out)
    theirs = transformers.CLIPModel.from_pretrained(out).eval()
    ids = tokenized(transformers.CLIPProcessor.from_pretrained(out))
    with torch.inference_mode():
        found = theirs(input_ids=ids, pixel_values=images())
        image, text = model.encode_image(images()), model.encode_text(tokenizer(TEXTS))
        assert_close(theirs.get_image_features(images()).pooler_output, image)
        assert_close(theirs.get_text_features(ids).pooler_output, text)
        assert_close(found.logits_per_image, model.get_logits(images(), tokenizer(TEXTS))[0])


@pytest.mark.parametrize("vocabulary", ["corpus", "full"])
def test_the_processor_reads_and_sees_as_we_do(
    model_folder, tmp_path, transformers, picture, vocabulary
):
    folder, out = model_folder(vocabulary=vocabulary), tmp_path / "out"
    _, preprocess, tokenizer = clipgraft.load(folder)
    export("hugging_face", folder, out)
    processor = transformers.CLIPProcessor.from_pretrained(out)
    found = processor(
        text=TEXTS, images=picture, return_tensors="pt", padding="max_length", truncation=True
    )
    assert found.input_ids.shape == (len(TEXTS), LENGTH)
    ours, end = tokenizer(TEXTS), processor.tokenizer.eos_token_id
    is_real = torch.arange(LENGTH) <= (ours == end).int().argmax(1, keepdim=True)
    assert torch.equal(torch.where(is_real, found.input_ids, 0), ours)
    assert (found.input_ids[~is_real] == end).all()
    pillow = transformers.CLIPImageProcessorPil.from_pretrained(out)
    exact = pillow(picture, return_tensors="pt").pixel_values
    assert torch.allclose(exact[0], preprocess(picture), atol=1e-5)
    level = 1 / 255 / 0.26  # torchvision rounds otherwise when it resizes
    assert (found.pixel_values[0] - preprocess(picture)).abs().max() <= 2 * level


def test_squashed_images_stay_squashed(model_folder, tmp_path, transformers, picture):
    folder, out = model_folder(), tmp_path / "out"
    spec = (folder / "model.json").read_text()
    spec = spec.replace('"shortest"', '"squash"').replace('"bicubic"', '"bilinear"')
    (folder / "model.json").write_text(spec)
    export("hugging_face", folder, out)
    pillow = transformers.CLIPImageProcessorPil.from_pretrained(out)
    exact = pillow(picture, return_tensors="pt").pixel_values
    assert torch.allclose(exact[0], clipgraft.load(folder)[1](picture), atol=1e-5)


FOREIGN = [
    ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type = 'avg'"),
    ({"vision_cfg": {"no_ln_pre": True}}, "vision_cfg.no_ln_pre = True"),
    ({"vision_cfg": {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value = 0.1"),
    ({"text_cfg": {"pool_type": "last"}}, "text_cfg.pool_type = 'last'"),
    ({"text_cfg": {"proj_bias": True}}, "text_cfg.proj_bias = True"),
    ({"init_logit_bias": -10.0}, "a logit bias"),
]


@pytest.mark.parametrize(("changes", "message"), FOREIGN)
def test_what_clip_model_cannot_hold_is_named(model_folder, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=f"CLIPModel cannot hold {message}. Hint: --code"):
        export("hugging_face", model_folder(changes), tmp_path / "out")
    assert [path.name for path in tmp_path.glob("*out*")] == []


def test_what_our_code_cannot_hold_is_named(model_folder, tmp_path):
    folder = model_folder({"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2}})
    with pytest.raises(ConfigError, match=r"the code .* cannot hold vision_cfg.attentional_pool"):
        export("hugging_face", folder, tmp_path / "out", with_code=True)


SEES_PADDING = {"pool_type": "last", "no_causal_mask": True, "ls_init_value": 0.1}
WITH_CODE = [
    ({"vision_cfg": {"pool_type": "avg"}}, "corpus", 3),
    (
        {"quick_gelu": True, "nonscalar_logit_scale": True, "vision_cfg": {"no_ln_pre": True}},
        "full",
        2,
    ),
    ({"text_cfg": SEES_PADDING}, "corpus", 3),
    ({"text_cfg": SEES_PADDING | {"proj_bias": True}, "init_logit_bias": -10.0}, "wordpiece", 0),
    ({"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True}}, "corpus", 0),
]


@pytest.mark.parametrize(("changes", "vocabulary", "num_experts"), WITH_CODE)
def test_the_code_beside_the_weights_gives_the_same_features(
    model_folder, tmp_path, transformers, changes, vocabulary, num_experts
):
    folder, out = model_folder(changes, vocabulary, num_experts), tmp_path / "out"
    model, _, tokenizer = clipgraft.load(folder)
    export("hugging_face", folder, out, with_code=not num_experts)
    theirs = transformers.AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    assert type(theirs).__module__.startswith("transformers_modules.")
    processor = transformers.AutoProcessor.from_pretrained(out, trust_remote_code=True)
    ids = tokenized(processor)
    with torch.inference_mode():
        image, text = model.encode_image(images()), model.encode_text(tokenizer(TEXTS))
        assert_close(theirs.get_image_features(images()), image)
        assert_close(theirs.get_text_features(ids), text)
        logits = model.get_logits(images(), tokenizer(TEXTS))[0]
        assert_close(theirs(pixel_values=images(), input_ids=ids).logits_per_image, logits)


@pytest.mark.parametrize("form", ["hugging_face", "vision"])
def test_a_model_that_computes_otherwise_than_the_code_is_not_exported(
    model_folder, tmp_path, transformers, monkeypatch, form
):
    folder, forward = model_folder(num_experts=3), MoeMlp.forward
    monkeypatch.setattr(MoeMlp, "forward", lambda mlp, x_BLD: 2 * forward(mlp, x_BLD))
    with pytest.raises(ConfigError, match=r"other features of images .*modeling_clipgraft\.py"):
        export(form, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_code_beside_the_weights_needs_torch_and_transformers_alone():
    nodes = list(ast.walk(ast.parse(CODE.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert foreign == {"torch", "transformers"}


@pytest.mark.parametrize("num_experts", [0, 2])
def test_the_image_tower_alone_gives_the_patches_before_the_last_block(
    model_folder, tmp_path, transformers, num_experts
):
    folder, out = (
        model_folder({"vision_cfg": {"pool_type": "avg"}}, "corpus", num_experts),
        tmp_path / "out",
    )
    model = clipgraft.load(folder)[0]
    export("vision", folder, out)
    reader = transformers.AutoModel if num_experts else transformers.CLIPVisionModel
    options = {"trust_remote_code": True} if num_experts else {}
    tower = reader.from_pretrained(out, **options).eval()
    with torch.inference_mode():
        states = tower(images(), output_hidden_states=True).hidden_states
        _, ours = model.visual.transformer.forward_intermediates(model.visual._embeds(images()))
    patches = states[-2][:, 1:]
    assert patches.shape == (3, (SIDE // 8) ** 2, 32)
    assert_close(patches, ours[0][:, 1:])
    assert tower.config.hidden_size == 32 and tower.config.num_hidden_layers == 2
    assert tower.config.image_size == SIDE and tower.config.patch_size == 8


def test_all_vocabularies_are_tried():
    assert set(VOCABULARIES) == {vocabulary for _, vocabulary, _ in WITH_CODE}
