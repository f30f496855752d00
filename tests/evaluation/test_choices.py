"""Laws of what tokens choose, against the blocks looked at by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from clipgraft.evaluation.choices import (
    Recorder,
    TowerChoices,
    examples,
    information,
    mutual_information,
)
from clipgraft.models.build import build
from clipgraft.models.moe import insert_experts

START, END = 38, 39
TEXTS = torch.tensor(
    [[38, 5, 39, 0, 0, 0, 0, 0], [38, 0, 7, 8, 39, 0, 0, 0], [38, 1, 2, 3, 4, 5, 6, 39]]
)


@pytest.fixture
def moe(tiny_config):
    torch.manual_seed(0)
    model = build(tiny_config)
    insert_experts(model, 3, 2, image_layers=[1], text_layers="all")
    for name, tensor in model.named_parameters():
        if "router" in name or "mlp" in name:
            torch.nn.init.normal_(tensor, std=0.3)
    return model.eval()


def inputs_of(model, blocks, forward):
    """What each MLP of some blocks was given, `[B, L, D]`, sequence second."""
    taken = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, given: taken.append(given[0].detach()))
        for block in blocks
    ]
    forward()
    for hook in hooks:
        hook.remove()
    return taken


def first_choice(mlp, x_BLD):
    return (x_BLD @ mlp.router.T).argmax(-1).numpy()


@torch.no_grad()
def test_patches_choose_what_their_router_likes_best(moe):
    torch.manual_seed(1)
    batches = torch.randn(5, 3, 16, 16).split([3, 2])
    recorder, expected = Recorder(moe, (START, END)), []
    for images in batches:
        (x_BLD,) = inputs_of(
            moe,
            [moe.visual.transformer.resblocks[1]],
            lambda images=images: moe.encode_image(images),
        )
        recorder.see_images(len(images))
        expected.append(first_choice(moe.visual.transformer.resblocks[1].mlp, x_BLD)[:, 1:])
    found = recorder.towers()["image"]
    expected_NP = np.concatenate(expected)
    assert found.layers == [1] and expected_NP.shape == (5, 4)
    assert found.expert_RM[:, 0].tolist() == expected_NP.reshape(-1).tolist()
    keys, experts = found.of_item(3)
    assert keys.tolist() == [0, 1, 2, 3] and experts[:, 0].tolist() == expected_NP[3].tolist()
    assert len(set(expected_NP.reshape(-1))) > 1  # else nothing was compared


@torch.no_grad()
def test_tokens_of_captions_without_start_end_and_padding(moe):
    recorder = Recorder(moe, (START, END))
    blocks = list(moe.text.transformer.resblocks)
    first, second = inputs_of(moe, blocks, lambda: moe.encode_text(TEXTS))
    recorder.see_texts(TEXTS)
    found = recorder.towers()["text"]
    assert found.key_R.tolist() == [5, 0, 7, 8, 1, 2, 3, 4, 5, 6]
    assert found.item_R.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    places = [(0, 1), (1, 1), (1, 2), (1, 3), *((2, n) for n in range(1, 7))]
    for layer, x_BLD in enumerate((first, second)):
        chosen_BL = first_choice(blocks[layer].mlp, x_BLD)
        assert found.expert_RM[:, layer].tolist() == [chosen_BL[place] for place in places]


@torch.no_grad()
def test_texts_are_recorded_alike_where_padding_is_routed(moe):
    """As in towers whose features are those of the last position."""
    plain = Recorder(moe, (START, END))
    moe.encode_text(TEXTS)
    plain.see_texts(TEXTS)
    moe.text._forward_pre_hooks.clear()
    state = moe.text.moe_state
    state.real_BL = state.real_T = None
    state.is_forward = True
    everything = Recorder(moe, (START, END))
    moe.encode_text(TEXTS)
    everything.see_texts(TEXTS)
    one, other = plain.towers()["text"], everything.towers()["text"]
    assert one.key_R.tolist() == other.key_R.tolist()
    assert one.expert_RM.tolist() == other.expert_RM.tolist()


@torch.no_grad()
def test_a_class_token_behind_each_text_is_left_out(tiny_config):
    torch.manual_seed(0)
    tiny_config["text_cfg"]["embed_cls"] = True
    model = build(tiny_config)
    insert_experts(model, 3, 2, image_layers=[], text_layers="all")
    for name, tensor in model.named_parameters():
        if "router" in name or "mlp" in name:
            torch.nn.init.normal_(tensor, std=0.3)
    recorder = Recorder(model.eval(), (START, END))
    blocks = list(model.text.transformer.resblocks)
    inputs = inputs_of(model, blocks, lambda: model.encode_text(TEXTS))
    assert inputs[0].shape[1] == TEXTS.shape[1] + 1
    recorder.see_texts(TEXTS)
    found = recorder.towers()["text"]
    assert found.key_R.tolist() == [5, 0, 7, 8, 1, 2, 3, 4, 5, 6]
    places = [(0, 1), (1, 1), (1, 2), (1, 3), *((2, n) for n in range(1, 7))]
    for layer, x_BLD in enumerate(inputs):
        chosen_BL = first_choice(blocks[layer].mlp, x_BLD)
        assert found.expert_RM[:, layer].tolist() == [chosen_BL[place] for place in places]


@torch.no_grad()
def test_a_dense_model_has_nothing_to_record(tiny_config):
    model = build(tiny_config).eval()
    recorder = Recorder(model, (START, END))
    model.encode_text(TEXTS)
    recorder.see_texts(TEXTS)
    model.encode_image(torch.zeros(2, 3, 16, 16))
    recorder.see_images(2)
    assert recorder.towers() == {}


def test_mutual_information_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 4, 500), rng.integers(0, 3, 500)
    other[:300] = one[:300] % 3
    count = np.zeros((4, 3))
    np.add.at(count, (one, other), 1)
    bits, entropy = mutual_information(count)
    assert bits == pytest.approx(mutual_info_score(one, other) / np.log(2))
    share_E = np.bincount(other) / 500
    assert entropy == pytest.approx(-(share_E * np.log2(share_E)).sum())
    assert mutual_information(np.zeros((0, 3))) == (0.0, 0.0)


def choices_that_follow(label_N, num_patches=3, seed=0):
    """Layer 0 follows the label, layer 1 the place, layer 2 neither."""
    rng = np.random.default_rng(seed)
    item_R = np.repeat(np.arange(len(label_N)), num_patches)
    key_R = np.tile(np.arange(num_patches), len(label_N))
    columns = [label_N[item_R] % 3, key_R % 3, rng.integers(0, 3, len(item_R))]
    return TowerChoices([0, 1, 2], 3, item_R, key_R, np.stack(columns, 1))


def test_information_tells_what_a_layer_follows():
    label_N = np.random.default_rng(1).integers(0, 6, 300)
    choices = choices_that_follow(label_N)
    found = information(choices, np.arange(300), {"colour": label_N}, "patch")
    shares = {name: [entry["share"] for entry in layers] for name, layers in found.items()}
    assert shares["colour"][0] == pytest.approx(1) and shares["patch"][1] == pytest.approx(1)
    assert max(shares["colour"][1:]) < 0.02 and shares["patch"][0] < 0.02
    shuffled = [entry["shuffled"] for layers in found.values() for entry in layers]
    assert max(shuffled) < 0.05


def test_information_is_that_of_the_tokens_written_out():
    """A caption of several images counts for each of them; a sample without the label for none."""
    rng = np.random.default_rng(2)
    choices = choices_that_follow(rng.integers(0, 4, 12))
    item_P = np.array([0, 0, 1, 5, 7, 7, 9, 11, 3])
    class_P = np.array([1, 2, 1, 0, 2, -1, 1, 0, 2])
    found = information(choices, item_P, {"shape": class_P}, "patch")
    for layer in range(3):
        pairs = [
            (label, expert)
            for item, label in zip(item_P, class_P, strict=True)
            if label >= 0
            for expert in choices.expert_RM[choices.item_R == item, layer]
        ]
        labels, experts = zip(*pairs, strict=True)
        bits = mutual_info_score(labels, experts) / np.log(2)
        assert found["shape"][layer]["bits"] == pytest.approx(bits, abs=1e-6)


def test_a_layer_with_one_expert_says_nothing():
    choices = choices_that_follow(np.arange(8) % 4)
    choices.expert_RM[:] = 2
    found = information(choices, np.arange(8), {"colour": np.arange(8) % 4}, "patch")
    assert all(entry == {"bits": 0, "share": 0, "shuffled": 0} for entry in found["colour"])


def test_examples_are_maps_of_the_items_asked_for():
    choices = choices_that_follow(np.array([2, 1, 0]))
    shown = examples({"image": choices, "text": choices}, [2, 0], [1], (1, 3), ["a", "b-", "c"])
    assert [each["row"] for each in shown["image"]] == [2, 0]
    assert shown["image"][0]["experts"][:2] == [[0, 0, 0], [0, 1, 2]]
    assert shown["text"][0]["words"] == ["a", "b-", "c"]
    assert shown["text"][0]["experts"][0] == [1, 1, 1]
