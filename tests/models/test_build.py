import copy
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from clipgraft.config import ConfigError
from clipgraft.model_settings import ModelSettings
from clipgraft.models.build import (
    build,
    describe,
    mlp_parameters,
    model_config,
    normalize,
    pretrained_state,
)
from clipgraft.models.positions import TextResize


def inline(config: dict, **more) -> ModelSettings:
    return ModelSettings(config=config, **more)


def test_named_architecture_is_open_clips_own_with_our_sizes_filled_in():
    config = model_config(
        ModelSettings(name="ViT-S-16"), vocab_size=99, image_size=32, text_length=7
    )
    theirs = open_clip.get_model_config("ViT-S-16")
    assert config["embed_dim"] == theirs["embed_dim"]
    assert config["vision_cfg"] == {**theirs["vision_cfg"], "image_size": 32}
    assert config["text_cfg"] == {**theirs["text_cfg"], "context_length": 7, "vocab_size": 99}


def test_text_masks_of_a_config_are_read_elsewhere_and_not_kept(tiny_config):
    tiny_config["text_cfg"] |= {
        "text_mask": "syntax",
        "tokenizer_kwargs": {"reduction_mask": "syntax"},
    }
    config = model_config(inline(tiny_config), vocab_size=40, image_size=16, text_length=8)
    assert "text_mask" not in config["text_cfg"]
    assert config["text_cfg"]["tokenizer_kwargs"] == {}
    build(config)


def test_config_builds_the_same_model_in_open_clip(tiny_config, tmp_path):
    torch.manual_seed(0)
    model = build(tiny_config).eval()
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": tiny_config, "preprocess_cfg": {}})
    )
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images, text = torch.randn(2, 3, 16, 16), torch.tensor([[38, 5, 39, 0, 0, 0, 0, 0]] * 2)
    for ours, other in zip(model(images, text), theirs(images, text), strict=True):
        assert torch.equal(ours, other)


def test_random_weights_follow_the_callers_seed(tiny_config):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in build(tiny_config).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_temperature_sets_logit_scale(tiny_config):
    model = build(tiny_config, temperature=0.02)
    assert model.logit_scale.exp().item() == pytest.approx(50)


def test_text_may_be_shorter_than_the_context_and_padding_changes_nothing(tiny_config):
    model = build(tiny_config).eval()
    short = torch.tensor([[38, 7, 39]])
    padded = F.pad(short, (0, 5))
    assert torch.allclose(model.encode_text(short), model.encode_text(padded), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["vision_cfg"].update(timm_model_name="x"), "timm image tower"),
        (lambda c: c["vision_cfg"].update(layers=[1, 1, 1, 1]), "ResNet"),
        (lambda c: c["text_cfg"].update(hf_tokenizer_name="x"), "Hugging Face tokenizer"),
        (lambda c: c["text_cfg"].update(hf_tokenizer_name="bert-base-uncased"), "without .SEP."),
        (lambda c: c.update(output_dict=True), "output_dict: a tower gives more than one vector"),
        (lambda c: c["text_cfg"].update(output_tokens=True), r"text_cfg\.output_tokens: a tower"),
        (
            lambda c: c["vision_cfg"].update(pool_type="none"),
            r"vision_cfg\.pool_type: none: a tower",
        ),
        (lambda c: c["vision_cfg"].update(attentional_pool="cascade"), "attentional_pool: a tower"),
        (
            lambda c: c["text_cfg"].update(proj_type="none", width=24),
            r"proj_type = none: .* width: 1",
        ),
    ],
)
def test_wrong_config_is_named(tiny_config, change, message):
    change(tiny_config)
    with pytest.raises(ConfigError, match=message):
        model_config(inline(tiny_config), 40, 16, 8)


@pytest.mark.parametrize("pool", ["eos", "argmax"])
def test_the_feature_of_a_text_is_read_at_the_end_token_whatever_its_number(tiny_config, pool):
    tiny_config["text_cfg"]["pool_type"] = pool
    config = model_config(inline(tiny_config), 40, 16, 8)
    torch.manual_seed(0)
    model = build(config)
    text_BL = torch.tensor([[38, 5, 6, 39, 0, 0, 0, 0], [38, 7, 39, 0, 0, 0, 0, 0]])
    first, second = model.encode_text(text_BL)
    assert not torch.allclose(first, second)
    tiny_config["text_cfg"]["pool_type"] = {"eos": "argmax", "argmax": "eos"}[pool]
    other = build(model_config(inline(tiny_config), 40, 16, 8))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.encode_text(text_BL)[0], first)


def test_unknown_name_lists_close_ones():
    with pytest.raises(ConfigError, match=r"ViT-B16.*did you mean ViT-B-16"):
        model_config(ModelSettings(name="ViT-B16"), 40, 224, 77)


def test_image_size_must_divide_by_the_patch(tiny_config):
    with pytest.raises(ConfigError, match=r"image_size = 20 .* patch size 8 .*16 or 24"):
        model_config(inline(tiny_config), 40, 20, 8)


@pytest.mark.parametrize("width", [24, 12])  # not a multiple of the heads; no head at all
def test_what_open_clip_cannot_build_is_a_config_error(tiny_config, width):
    tiny_config["vision_cfg"].update(width=width, head_width=16)
    tiny_config["text_cfg"]["width"] = 31
    with pytest.raises(ConfigError, match="cannot build"):
        build(tiny_config)


def test_public_weights_need_the_full_vocabulary():
    settings = ModelSettings(name="ViT-B-32", pretrained="openai")
    with pytest.raises(ConfigError, match=r"49,408 rows.*1,000.*vocabulary: full"):
        model_config(settings, 1000, 224, 77)


@pytest.mark.parametrize(
    ("name", "tag", "is_quick"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32-quickgelu", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32-quickgelu", None, True),
        ("ViT-B-32", None, False),
    ],
)
def test_activation_is_that_of_the_weights_not_of_the_name(name, tag, is_quick):
    settings = ModelSettings(name=name, pretrained=tag)
    assert model_config(settings, 49408, 224, 77)["quick_gelu"] is is_quick


def test_description_prepares_images_as_the_weights_want(tiny_config):
    plain = describe(tiny_config)["preprocess"]
    assert plain["size"] == 16
    assert plain["mean"] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
    assert (plain["interpolation"], plain["resize_mode"]) == ("bicubic", "shortest")
    squashed = ModelSettings(name="ViT-H-14-quickgelu", pretrained="dfn5b")
    assert describe(tiny_config, squashed)["preprocess"]["resize_mode"] == "squash"


def test_text_positions_of_pretrained_weights_follow_the_rule_of_the_phase(tiny_config, tmp_path):
    model = build(tiny_config)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    settings = inline(tiny_config, pretrained=str(tmp_path / "a.safetensors"))
    config = model_config(settings, 40, 16, 12)
    tables = {
        rule: pretrained_state(settings, config, TextResize(rule))["text.positional_embedding"]
        for rule in ("linear", "pad", "none")
    }
    before = model.text.positional_embedding
    assert all(table.shape == (12, 32) for table in tables.values())
    assert torch.equal(tables["pad"][:8], before)
    assert not torch.equal(tables["none"][:8], before)


def test_settings_say_how_images_are_prepared(tiny_config):
    preprocess = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    preprocess |= {"interpolation": "bilinear", "resize_mode": "squash"}
    settings = inline(tiny_config, preprocess=preprocess)
    assert describe(tiny_config, settings)["preprocess"] == {"size": 16, **preprocess}
    weights = ModelSettings(
        name="ViT-H-14-quickgelu", pretrained="dfn5b", preprocess={"resize_mode": "shortest"}
    )
    ours = describe(tiny_config, weights)["preprocess"]
    assert (ours["interpolation"], ours["resize_mode"]) == ("bicubic", "shortest")
    with pytest.raises(ValueError, match="resize_mode"):
        inline(tiny_config, preprocess={"resize_mode": "longest"})


def test_a_checkpoint_wants_images_as_all_public_weights_of_its_architecture_do(tiny_config):
    """The file does not say how; settings that do come first."""
    theirs = open_clip.get_pretrained_cfg("ViT-H-14-CLIPA", "datacomp1b")
    keys = ("mean", "std", "interpolation", "resize_mode")
    wanted = {key: theirs[key] for key in keys} | {"size": 16}
    file = {"name": "ViT-H-14-CLIPA", "pretrained": "run/epoch_30.pt"}
    ours = describe(tiny_config, ModelSettings(**file))["preprocess"]
    assert ours == wanted | {key: list(wanted[key]) for key in ("mean", "std")}
    assert (ours["interpolation"], ours["resize_mode"]) == ("bilinear", "squash")
    told = ModelSettings(**file, preprocess={"resize_mode": "shortest"})
    assert describe(tiny_config, told)["preprocess"] == ours | {"resize_mode": "shortest"}


@pytest.mark.parametrize("name", ["ViT-L-14-CLIPA", "ViT-H-14-CLIPA-336", "ViT-bigG-14-CLIPA"])
def test_towers_of_clipa_v2_keep_their_token_table(name):
    settings, theirs = ModelSettings(name=name), open_clip.get_model_config(name)
    config = model_config(settings, 30_522, 84, 8)
    assert config["text_cfg"] == {**theirs["text_cfg"], "context_length": 8}
    assert config["text_cfg"]["vocab_size"] == 32_000
    assert config["vision_cfg"] == {**theirs["vision_cfg"], "image_size": 84}
    with pytest.raises(ConfigError, match=r"vocab_size = 32,000, .* has 40,000 pieces"):
        model_config(settings, 40_000, 84, 8)


def test_local_checkpoint_in_clips_own_form_is_loaded_and_resized(tiny_config, tmp_path):
    theirs = {key: value for key, value in tiny_config.items() if key != "custom_text"}
    clip = open_clip.CLIP(**copy.deepcopy(theirs))
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, tmp_path / "a.pt"
    )
    settings = inline(tiny_config, pretrained=str(tmp_path / "a.pt"))
    config = model_config(settings, 40, 24, 5)
    model = build(config)
    model.load_state_dict(pretrained_state(settings, config))
    assert torch.equal(model.text.token_embedding.weight, clip.token_embedding.weight)
    assert model.visual.positional_embedding.shape == (10, 32)
    assert model.text.positional_embedding.shape == (5, 32)


def test_checkpoint_of_another_architecture_is_one_message_with_shapes(tiny_config, tmp_path):
    save_file(build(tiny_config).state_dict(), tmp_path / "a.safetensors")
    settings = inline(tiny_config, pretrained=str(tmp_path / "a.safetensors"))
    config = model_config(settings, 41, 16, 8)
    with pytest.raises(ConfigError, match=r"text.token_embedding.weight is \[40, 32\].*\[41, 32\]"):
        pretrained_state(settings, config)


def test_a_position_table_of_another_width_does_not_fit(tiny_config, tmp_path):
    wide = copy.deepcopy(tiny_config)
    wide["text_cfg"]["width"] = 64
    save_file(build(wide).state_dict(), tmp_path / "a.safetensors")
    settings = inline(tiny_config, pretrained=str(tmp_path / "a.safetensors"))
    with pytest.raises(ConfigError, match=r"another architecture.*and \d+ more"):
        pretrained_state(settings, model_config(settings, 40, 16, 8))


def test_checkpoint_that_is_no_state_dict_is_refused(tiny_config, tmp_path):
    torch.save(build(tiny_config), tmp_path / "a.pt")  # a pickled object: code, not weights
    for path, message in [("a.pt", "cannot be read"), ("b.pt", "no tag of open_clip and no file")]:
        settings = inline(tiny_config, pretrained=str(tmp_path / path))
        with pytest.raises(ConfigError, match=message):
            pretrained_state(settings, model_config(settings, 40, 16, 8))


def test_normalize_is_open_clips_transform():
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    expected = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(normalize(pixels, mean, std), expected, atol=1e-6)


def test_mlp_parameters_are_four_per_block(tiny_config):
    names = mlp_parameters(build(tiny_config))
    assert len(names) == 4 * 4
    assert "text.transformer.resblocks.0.mlp.c_proj.bias" in names
    assert all(".mlp.c_fc." in name or ".mlp.c_proj." in name for name in names)


def test_building_on_a_seed_is_not_disturbed_by_reading_pretrained_weights(tiny_config, tmp_path):
    save_file(build(tiny_config).state_dict(), tmp_path / "a.safetensors")
    settings = inline(tiny_config, pretrained=str(tmp_path / "a.safetensors"))
    torch.manual_seed(0)
    pretrained_state(settings, model_config(settings, 40, 16, 8))
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


def test_bytes_are_normalised_to_whole_planes_whatever_way_they_lie():
    pixels_BHHC = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    images_BCHW = pixels_BHHC.permute(0, 3, 1, 2)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    by_hand = (
        images_BCHW.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)
    ) / torch.tensor(std).double().view(3, 1, 1)
    seen = normalize(images_BCHW, mean, std)
    assert seen.is_contiguous() and seen.dtype == torch.float32
    torch.testing.assert_close(seen.double(), by_hand, rtol=1e-6, atol=1e-6)
    assert torch.equal(seen, normalize(images_BCHW.contiguous(), mean, std))
    kept = images_BCHW.float()
    assert torch.equal(seen, normalize(kept, mean, std)) and torch.equal(kept, images_BCHW.float())
