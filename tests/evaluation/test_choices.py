"""Laws of what tokens choose, against the blocks looked at by hand."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from clipgraft.evaluation.choices import (
    Recorder,
    TowerChoices,
    _dealt,
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


def recorder_of(model, num_images=0, num_texts=0):
    """A recorder that keeps every choice."""
    num_items = {"image": num_images, "text": num_texts}
    shown = {tower: range(num) for tower, num in num_items.items()}
    return Recorder(model, (START, END), num_items, shown)


def tokens_of(found):
    """What was kept, end to end: item, key and experts of each token."""
    kept = [(np.full(len(keys), item), keys, e) for item, (keys, e) in sorted(found.shown.items())]
    return tuple(map(np.concatenate, zip(*kept, strict=True)))


def counted(item_R, key_R, expert_RM, num_experts=3):
    """Choices written out, counted one by one."""
    counts = []
    for row_R in (item_R, key_R):
        count = np.zeros((max(row_R) + 1, expert_RM.shape[1], num_experts), np.int64)
        for row, experts in zip(row_R, expert_RM, strict=True):
            for layer, expert in enumerate(experts):
                count[row, layer, expert] += 1
        counts.append(count)
    of_item = [item_R == item for item in range(max(item_R) + 1)]
    shown = {item: (key_R[own], expert_RM[own]) for item, own in enumerate(of_item)}
    return TowerChoices(list(range(expert_RM.shape[1])), *counts, shown)


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
    recorder, expected = recorder_of(moe, num_images=5), []
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
    assert found.layers == [1] and found.num_experts == 3 and expected_NP.shape == (5, 4)
    item_R, key_R, expert_RM = tokens_of(found)
    assert expert_RM[:, 0].tolist() == expected_NP.reshape(-1).tolist()
    keys, experts = found.shown[3]
    assert keys.tolist() == [0, 1, 2, 3] and experts[:, 0].tolist() == expected_NP[3].tolist()
    assert len(set(expected_NP.reshape(-1))) > 1  # else nothing was compared
    plain = counted(item_R, key_R, expert_RM)
    assert np.array_equal(found.count_IME, plain.count_IME)
    assert np.array_equal(found.count_KME, plain.count_KME)


@torch.no_grad()
def test_of_many_images_counts_are_kept_and_not_tokens(moe):
    recorder = Recorder(moe, (START, END), {"image": 120, "text": 0}, {"image": [7], "text": []})
    for _ in range(3):
        moe.encode_image(torch.randn(40, 3, 16, 16))
        recorder.see_images(40)
    arrays = recorder.of_images()
    assert sum(array.nbytes for array in arrays.values()) < 120 * 4 + 200  # 4 patches each
    again = Recorder(moe, (START, END), {"image": 120, "text": 0}, {"image": [7], "text": []})
    again.see_again(arrays)
    one, other = recorder.towers()["image"], again.towers()["image"]
    assert one.layers == other.layers and list(one.shown) == list(other.shown) == [7]
    assert np.array_equal(one.shown[7][1], other.shown[7][1])
    assert one.count_IME.sum() == one.count_KME.sum() == 120 * 4


@torch.no_grad()
def test_tokens_of_captions_without_start_end_and_padding(moe):
    recorder = recorder_of(moe, num_texts=3)
    blocks = list(moe.text.transformer.resblocks)
    first, second = inputs_of(moe, blocks, lambda: moe.encode_text(TEXTS))
    recorder.see_texts(TEXTS)
    found = recorder.towers()["text"]
    item_R, key_R, expert_RM = tokens_of(found)
    assert key_R.tolist() == [5, 0, 7, 8, 1, 2, 3, 4, 5, 6]
    assert item_R.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    places = [(0, 1), (1, 1), (1, 2), (1, 3), *((2, n) for n in range(1, 7))]
    for layer, x_BLD in enumerate((first, second)):
        chosen_BL = first_choice(blocks[layer].mlp, x_BLD)
        assert expert_RM[:, layer].tolist() == [chosen_BL[place] for place in places]
    plain = counted(item_R, key_R, expert_RM)
    assert np.array_equal(found.count_IME, plain.count_IME)
    assert np.array_equal(found.count_KME[:9], plain.count_KME)
    assert len(found.count_KME) == moe.vocab_size and not found.count_KME[9:].any()


@torch.no_grad()
def test_texts_are_recorded_alike_where_padding_is_routed(moe):
    """As in towers whose features are those of the last position."""
    plain = recorder_of(moe, num_texts=3)
    moe.encode_text(TEXTS)
    plain.see_texts(TEXTS)
    moe.text._forward_pre_hooks.clear()
    state = moe.text.moe_state
    state.real_BL = state.real_T = None
    state.is_forward = True
    everything = recorder_of(moe, num_texts=3)
    moe.encode_text(TEXTS)
    everything.see_texts(TEXTS)
    one, other = (tokens_of(each.towers()["text"]) for each in (plain, everything))
    assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


@torch.no_grad()
def test_a_class_token_behind_each_text_is_left_out(tiny_config):
    torch.manual_seed(0)
    tiny_config["text_cfg"]["embed_cls"] = True
    model = build(tiny_config)
    insert_experts(model, 3, 2, image_layers=[], text_layers="all")
    for name, tensor in model.named_parameters():
        if "router" in name or "mlp" in name:
            torch.nn.init.normal_(tensor, std=0.3)
    recorder = recorder_of(model.eval(), num_texts=3)
    blocks = list(model.text.transformer.resblocks)
    inputs = inputs_of(model, blocks, lambda: model.encode_text(TEXTS))
    assert inputs[0].shape[1] == TEXTS.shape[1] + 1
    recorder.see_texts(TEXTS)
    _, key_R, expert_RM = tokens_of(recorder.towers()["text"])
    assert key_R.tolist() == [5, 0, 7, 8, 1, 2, 3, 4, 5, 6]
    places = [(0, 1), (1, 1), (1, 2), (1, 3), *((2, n) for n in range(1, 7))]
    for layer, x_BLD in enumerate(inputs):
        chosen_BL = first_choice(blocks[layer].mlp, x_BLD)
        assert expert_RM[:, layer].tolist() == [chosen_BL[place] for place in places]


@torch.no_grad()
def test_a_dense_model_has_nothing_to_record(tiny_config):
    model = build(tiny_config).eval()
    recorder = recorder_of(model, num_images=2, num_texts=3)
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


def tokens_that_follow(label_N, num_patches=3, seed=0):
    """Layer 0 follows the label, layer 1 the place, layer 2 neither."""
    rng = np.random.default_rng(seed)
    item_R = np.repeat(np.arange(len(label_N)), num_patches)
    key_R = np.tile(np.arange(num_patches), len(label_N))
    columns = [label_N[item_R] % 3, key_R % 3, rng.integers(0, 3, len(item_R))]
    return item_R, key_R, np.stack(columns, 1)


def test_information_tells_what_a_layer_follows():
    label_N = np.random.default_rng(1).integers(0, 6, 300)
    choices = counted(*tokens_that_follow(label_N))
    found = information(choices, np.arange(300), {"colour": label_N}, "patch")
    shares = {name: [entry["share"] for entry in layers] for name, layers in found.items()}
    assert shares["colour"][0] == pytest.approx(1) and shares["patch"][1] == pytest.approx(1)
    assert max(shares["colour"][1:]) < 0.02 and shares["patch"][0] < 0.02
    shuffled = [entry["shuffled"] for layers in found.values() for entry in layers]
    assert 0 < max(shuffled) < 0.05


def test_information_is_that_of_the_tokens_written_out():
    """A caption of several images counts for each of them; a sample without the label for none."""
    rng = np.random.default_rng(2)
    item_R, key_R, expert_RM = tokens_that_follow(rng.integers(0, 4, 12))
    item_P = np.array([0, 0, 1, 5, 7, 7, 9, 11, 3])
    class_P = np.array([1, 2, 1, 0, 2, -1, 1, 0, 2])
    choices = counted(item_R, key_R, expert_RM)
    found = information(choices, item_P, {"shape": class_P}, "patch")
    for layer in range(3):
        pairs = [
            (label, expert)
            for item, label in zip(item_P, class_P, strict=True)
            if label >= 0
            for expert in expert_RM[item_R == item, layer]
        ]
        for name, (labels, experts) in {
            "shape": zip(*pairs, strict=True),
            "patch": (key_R, expert_RM[:, layer]),
        }.items():
            bits = mutual_info_score(labels, experts) / np.log(2)
            share_E = np.bincount(experts)[np.bincount(experts) > 0] / len(experts)
            entropy = -(share_E * np.log2(share_E)).sum()
            assert found[name][layer]["bits"] == pytest.approx(bits, abs=1e-6)
            assert found[name][layer]["share"] == pytest.approx(bits / entropy, abs=1e-6)


def test_a_layer_with_one_expert_says_nothing():
    item_R, key_R, expert_RM = tokens_that_follow(np.arange(8) % 4)
    choices = counted(item_R, key_R, np.full_like(expert_RM, 2))
    found = information(choices, np.arange(8), {"colour": np.arange(8) % 4}, "patch")
    assert all(entry == {"bits": 0, "share": 0, "shuffled": 0} for entry in found["colour"])


def test_dealt_counts_are_those_of_keys_in_random_order():
    """Each table comes as often as by permutations of the tokens."""
    key_R, expert_R = np.array([0, 0, 0, 1, 1, 2, 3]), np.array([0, 1, 1, 1, 2, 2, 2])
    count_KE = np.zeros((4, 3), np.int64)
    np.add.at(count_KE, (key_R, expert_R), 1)
    rng, often = np.random.default_rng(0), [Counter(), Counter()]
    for _ in range(4000):
        permuted_KE = np.zeros((4, 3), np.int64)
        np.add.at(permuted_KE, (rng.permutation(key_R), expert_R), 1)
        dealt_KE = _dealt(count_KE, rng)
        assert np.array_equal(dealt_KE.sum(0), count_KE.sum(0))
        assert np.array_equal(dealt_KE.sum(1), count_KE.sum(1))
        for counter, table_KE in zip(often, (permuted_KE, dealt_KE), strict=True):
            counter[table_KE.tobytes()] += 1
    assert often[0].keys() == often[1].keys() and len(often[0]) == 30
    differences = [abs(often[0][table] - often[1][table]) for table in often[0] | often[1]]
    assert sum(differences) < 800  # of 8000; by chance about 450


def test_keys_are_dealt_however_many_there_are():
    count_KE = np.array([[9, 1, 0], [4, 4, 4], [0, 0, 0], [1, 2, 3]]) * 10**8
    dealt_KE = _dealt(count_KE, np.random.default_rng(0))
    expected_KE = count_KE.sum(1, keepdims=True) * count_KE.sum(0) / count_KE.sum()
    assert np.abs(dealt_KE - expected_KE).max() < 2e5


def test_examples_are_maps_of_the_items_asked_for():
    choices = counted(*tokens_that_follow(np.array([2, 1, 0])))
    shown = examples({"image": choices, "text": choices}, [2, 0], [1], (1, 3), ["a", "b-", "c"])
    assert [each["row"] for each in shown["image"]] == [2, 0]
    assert shown["image"][0]["experts"][:2] == [[0, 0, 0], [0, 1, 2]]
    assert shown["text"][0]["words"] == ["a", "b-", "c"]
    assert shown["text"][0]["experts"][0] == [1, 1, 1]
    assert shown["towers"]["image"] == {"layers": [0, 1, 2], "num_experts": 3}
    about = [(each["word"], each["count"], each["shares"][1]) for each in shown["frequent"]]
    assert about == [("a", 3, [1, 0, 0]), ("b-", 3, [0, 1, 0]), ("c", 3, [0, 0, 1])]
