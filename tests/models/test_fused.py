"""Fused blocks: the features of open_clip's own, token for token where a feature is made of it."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from clipgraft.lean import open_clip
from clipgraft.models.build import build
from clipgraft.models.fused import FusedBlock, LastBlock, fuse
from clipgraft.models.moe import insert_experts, routings

CONFIG = {
    "embed_dim": 16,
    "quick_gelu": False,
    "custom_text": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 9, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2},
}
END = 59


def model_of(**changes) -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return build(config).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, 16, 16, generator=generator)
    texts = torch.randint(1, END, (5, 9), generator=generator)
    for row, end in enumerate((8, 3, 5, 1, 6)):
        texts[row, end:] = 0
        texts[row, end] = END
    return images, texts


def features(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    images, texts = batch()
    with torch.inference_mode():
        return model.encode_image(images), model.encode_text(texts)


KINDS = {
    "class token": {},
    "mean of patches": {"vision_cfg": {"pool_type": "avg"}},
    "mean, norm behind it": {"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True}},
    "QuickGELU": {"quick_gelu": True},
    "text seen whole": {"text_cfg": {"no_causal_mask": True, "pool_type": "last"}},
    "text with a class token": {"text_cfg": {"embed_cls": True, "pad_id": 0}},
    "one block": {"vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_fused_features_are_those_of_open_clip(kind):
    plain = model_of(**KINDS[kind])
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert all(isinstance(b, FusedBlock) for b in fused.visual.transformer.resblocks)
    for own, other in zip(features(fused), features(plain), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_only_towers_of_one_token_compute_one_token_at_the_end():
    for kind, pools in {"class token": (True, True), "mean of patches": (False, True)}.items():
        model = model_of(**KINDS[kind])
        fuse(model)
        last = [tower.transformer.resblocks[-1] for tower in (model.visual, model.text)]
        assert tuple(isinstance(block, LastBlock) for block in last) == pools
    model = model_of(**KINDS["text seen whole"])
    fuse(model)
    assert not isinstance(model.text.transformer.resblocks[-1], LastBlock)


def test_fused_features_follow_each_batch_and_not_the_one_before():
    plain = model_of()
    fused = copy.deepcopy(plain)
    fuse(fused)
    features(fused)
    shorter = batch()[1][:2, :7]
    with torch.inference_mode():
        torch.testing.assert_close(
            fused.encode_text(shorter), plain.encode_text(shorter), rtol=1e-5, atol=1e-5
        )


def test_experts_of_fused_blocks_choose_as_before_and_for_every_token():
    plain = model_of()
    insert_experts(plain, 3, 2, image_layers="all", text_layers=[1])
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".mlp." in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    fused = copy.deepcopy(plain)
    fuse(fused)
    for own, other in zip(features(fused), features(plain), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    own, other = routings(fused), routings(plain)
    assert own.keys() == other.keys() == {"visual.0", "visual.1", "text.1"}
    for name in own:
        assert own[name].topk_TK.shape == other[name].topk_TK.shape
        torch.testing.assert_close(own[name].probs_TE, other[name].probs_TE, rtol=1e-4, atol=1e-5)


def test_blocks_of_other_kinds_stay_as_they_are():
    for change in ({"vision_cfg": {"ls_init_value": 0.1}}, {"vision_cfg": {"qk_norm": True}}):
        model = model_of(**change)
        before = [type(block) for block in model.visual.transformer.resblocks]
        expected = features(model)
        fuse(model)
        assert [type(block) for block in model.visual.transformer.resblocks] == before
        torch.testing.assert_close(features(model)[0], expected[0], rtol=0, atol=0)


def test_names_and_values_of_parameters_stay():
    plain = model_of()
    fused = copy.deepcopy(plain)
    fuse(fused)
    own, other = fused.state_dict(), plain.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert isinstance(fused.text, open_clip.transformer.TextTransformer)


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_threads_in_one_tower_have_the_tokens_of_their_own_batch(tower):
    """They wait for each other where the tower has been told of both batches and its last block has begun none."""
    plain = model_of()
    fused = copy.deepcopy(plain)
    fuse(fused)
    both = threading.Barrier(2, timeout=60)

    def wait(*_: object) -> None:
        both.wait()

    getattr(fused, tower).transformer.register_forward_pre_hook(wait)
    whole = batch()[tower == "text"]
    parts = [whole[:3], whole[3:]]

    def encode(items: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return getattr(fused, tower)(items)

    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        for own, items in zip(pool.map(encode, parts), parts, strict=True):
            torch.testing.assert_close(own, getattr(plain, tower)(items), rtol=1e-5, atol=1e-5)
