"""open_clip opens what we export, from the folder alone: the same features, bit by bit."""

from __future__ import annotations

import open_clip
import pytest
import torch
from small_models import TEXTS, VOCABULARIES, images

import clipgraft
from clipgraft.config import ConfigError
from clipgraft.export.__main__ import export

LAST = {"text_cfg": {"pool_type": "last", "no_causal_mask": True}}
SEES_PADDING = LAST["text_cfg"] | {
    "hf_tokenizer_name": "bert-base-uncased",
    "tokenizer_kwargs": {"strip_sep_token": True},
}
# A last sigma is another letter in lower case, for those who read whole words.
READ = [*TEXTS, "\u039f\u0394\u039f\u03a3 &amp; caf\u00e9"]
CHANGES = {
    "corpus": {
        "cast_dtype": "fp32",
        "vision_cfg": {"pool_type": "avg", "pos_embed_type": "sin_cos_2d"},
    },
    "full": {"quick_gelu": True, "vision_cfg": {"ls_init_value": 0.1}},
    "wordpiece": {"text_cfg": SEES_PADDING, "vision_cfg": {"no_ln_pre": True}},
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_open_clip_gives_the_same_features(
    model_folder, tmp_path, transformers, picture, vocabulary
):
    folder = model_folder(CHANGES[vocabulary], vocabulary)
    model, preprocess, tokenizer = clipgraft.load(folder)
    export("open_clip", folder, tmp_path / "out")
    name = f"local-dir:{tmp_path / 'out'}"
    theirs, _, prepare = open_clip.create_model_and_transforms(name)
    theirs.eval()
    tokenize = open_clip.get_tokenizer(name)
    with torch.inference_mode():
        assert torch.equal(theirs.encode_image(images()), model.encode_image(images()))
        assert torch.equal(theirs.encode_text(tokenize(READ)), model.encode_text(tokenizer(READ)))
    assert torch.allclose(prepare(picture), preprocess(picture), atol=1e-6)
    assert torch.equal(theirs.logit_scale, model.logit_scale)


def test_experts_are_no_model_of_open_clip(model_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no mixtures of experts. Hint: hugging_face"):
        export("open_clip", model_folder(num_experts=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_sees_padding_must_be_padded_as_it_was(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="sees its padding"):
        export("open_clip", model_folder(LAST), tmp_path / "out")
