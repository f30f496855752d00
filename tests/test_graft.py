"""Assembling: experts, copies with noise, and how routers begin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import NUM, folder, make_data, phase

from clipgraft.centroids import routers_of
from clipgraft.checkpoint import load_model, read_weights
from clipgraft.config import ConfigError
from clipgraft.data.tokens import Tokens
from clipgraft.graft import assemble
from clipgraft.models.moe import insert_experts, router_parameters
from clipgraft.pretrain import pretrain
from clipgraft.settings import AssembleJob

E = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    model = phase().model.model_dump()
    for tower in ("vision_cfg", "text_cfg"):
        model["config"][tower]["layers"] = 2
    out = tmp_path_factory.mktemp("base")
    pretrain(phase(model=model, samples_seen=64), *data, None, out)
    return out


def assembled(out: Path, base: Path, data: tuple[Path, Path], **changes: object) -> Path:
    """Copies of the base, unless changes say otherwise."""
    folder(out)
    raw = {"num_experts": E, "top_k": 2, "copies": True, "seed": 5, **changes}
    assemble(AssembleJob(**raw), [base], out, index=data[0], shard=data[1])
    return out


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 40, (3, 12), generator=generator)
    return torch.randn(3, 3, 16, 16, generator=generator), text


def routers(path: Path) -> dict[str, torch.Tensor]:
    weights = read_weights(path)
    return {name: weights[name] for name in weights if name.endswith("router")}


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("router_init", ["random", "zero", "centroids"])
def test_identical_experts_equal_the_dense_model_with_any_router(
    base, data, tmp_path, router_init, top_k
):
    out = assembled(tmp_path / "moe", base, data, router_init=router_init, top_k=top_k)
    model, dense = load_model(out, insert_experts=insert_experts).model, load_model(base).model
    assert len(router_parameters(model)) == 4
    for ours, theirs in zip(model(*inputs())[:2], dense(*inputs())[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_noise_is_in_deviations_of_each_tensor_and_spares_the_first_expert_and_the_trunk(
    base, data, tmp_path
):
    exact = read_weights(assembled(tmp_path / "exact", base, data))
    noisy = read_weights(assembled(tmp_path / "noisy", base, data, noise=0.1))
    stacks = [name for name in exact if ".mlp.c_" in name]
    assert len(stacks) == 4 * 4
    for name in exact.keys() - stacks:
        assert torch.equal(noisy[name], exact[name]), name  # routers, too
    for name in stacks:
        change = noisy[name] - exact[name]
        assert (change[0] == 0).all()
        assert not torch.equal(change[1], change[2])
        if name.endswith("weight"):  # enough numbers to judge
            ratio = change[1:].std() / exact[name][0].std()
            assert ratio.item() == pytest.approx(0.1, rel=0.05), name


def test_noise_follows_the_seed(base, data, tmp_path):
    first, again, other = (
        read_weights(assembled(tmp_path / name, base, data, noise=0.1, seed=seed))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    for name in first:
        assert torch.equal(first[name], again[name])
        if ".mlp.c_" in name and name.endswith("weight"):
            assert torch.equal(first[name][0], other[name][0])
            assert not torch.equal(first[name][1:], other[name][1:])


def test_zero_routers_are_zero_and_random_ones_follow_the_seed(base, data, tmp_path):
    zero = routers(assembled(tmp_path / "zero", base, data, router_init="zero"))
    assert len(zero) == 4 and not any(router.any() for router in zero.values())
    first, again, other = (
        routers(assembled(tmp_path / name, base, data, seed=seed))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_centroid_routers_send_clusters_to_experts_of_their_own():
    """Three heaps of tokens: every heap has an expert, the largest the first; in float64 beside faiss."""
    generator = np.random.default_rng(0)
    heap_T = np.repeat([0, 1, 2], [40, 160, 100])
    centre_E = np.eye(8)[[1, 4, 6]] * 3
    x_TD = (centre_E[heap_T] + 0.2 * generator.normal(size=(300, 8))) * generator.uniform(
        0.5, 2, (300, 1)
    )
    rows_ED = routers_of(torch.from_numpy(x_TD).float(), 3, 2.5, seed=0).double().numpy()
    logits_TE = x_TD @ rows_ED.T
    assert (logits_TE.argmax(1) == np.array([2, 0, 1])[heap_T]).all()
    assert np.abs(logits_TE.mean(1)).max() < 1e-5
    assert np.sqrt((logits_TE**2).mean()) == pytest.approx(2.5, rel=1e-4)
    unit_TD = x_TD / np.linalg.norm(x_TD, axis=1, keepdims=True)
    mean_ED = np.stack([unit_TD[heap_T == heap].mean(0) for heap in (1, 2, 0)])
    centroid_ED = mean_ED / np.linalg.norm(mean_ED, axis=1, keepdims=True)  # of spherical k-means
    apart_ED = centroid_ED - centroid_ED.mean(0)
    factor = np.linalg.norm(rows_ED) / np.linalg.norm(apart_ED)
    np.testing.assert_allclose(rows_ED, factor * apart_ED, atol=1e-5)


def test_what_comes_into_mlps_is_computed_in_true_float32(base, data, tmp_path):
    """Not in TF32, which is cuDNN's default for the convolution that makes patches."""
    seen = []

    def look(module, _):
        if isinstance(module, torch.nn.Conv2d):
            seen.append(torch.backends.cudnn.allow_tf32)

    with torch.nn.modules.module.register_module_forward_pre_hook(look):
        assembled(tmp_path / "moe", base, data, router_init="centroids")
    assert seen and not any(seen)


def test_no_more_samples_are_clustered_than_there_are_and_none_twice(
    base, data, tmp_path, monkeypatch, caplog
):
    seen = []

    def keep(x_TD, num_experts, scale, seed):
        seen.append(len(x_TD))
        return torch.zeros(num_experts, x_TD.shape[1])

    monkeypatch.setattr("clipgraft.centroids.routers_of", keep)
    monkeypatch.setattr("clipgraft.centroids.TOKENS_PER_SAMPLE", 10**6)
    monkeypatch.setattr("clipgraft.centroids.BATCH", NUM - 2)
    settings = {"router_init": "centroids", "image_layers": [1], "text_layers": [0]}
    with caplog.at_level("INFO"):
        assembled(tmp_path / "moe", base, data, **settings)
    assert f"the tokens of {NUM // 2 * 2} samples" in caplog.text
    assert seen[0] == NUM // 2 * 2 * 5  # class token and patches


def test_centroids_are_of_the_real_tokens_that_come_into_the_mlps_of_the_base(
    base, data, tmp_path, monkeypatch
):
    """What is clustered, held against hooks on the dense model: same tokens, padding left out; each layer gets its own."""
    seen = {}

    def keep(x_TD, num_experts, scale, seed):
        seen[len(seen)] = x_TD
        return torch.full((num_experts, x_TD.shape[1]), float(len(seen)))

    monkeypatch.setattr("clipgraft.centroids.routers_of", keep)
    monkeypatch.setattr("clipgraft.centroids.TOKENS_PER_SAMPLE", 10**6)
    settings = {"router_init": "centroids", "image_layers": [1], "text_layers": [0]}
    written = routers(assembled(tmp_path / "moe", base, data, **settings))
    assert {name: rows.unique().tolist() for name, rows in written.items()} == {
        "visual.transformer.resblocks.1.mlp.router": [1],
        "text.transformer.resblocks.0.mlp.router": [2],
    }
    image_TD, text_TD = seen[0], seen[1]
    assert len(image_TD) == NUM * 5  # class token and patches
    text_CL = torch.from_numpy(Tokens.open(data[0]).encode(np.arange(2 * NUM), 24))
    model, inputs_of = load_model(base).model.eval(), []
    mlp = model.text.transformer.resblocks[0].mlp
    mlp.register_forward_pre_hook(lambda _, arguments: inputs_of.append(arguments[0]))
    with torch.no_grad():
        model.encode_text(text_CL)
    num_real_C = text_CL.argmax(1) + 1
    assert num_real_C.min() < 24
    known = torch.cat([x[:num] for x, num in zip(inputs_of[0], num_real_C, strict=True)])
    # Of each sample one of its two captions; every token is a known one, to float16.
    first, second = num_real_C.view(NUM, 2).T
    fewest, most = (int(of(first, second).sum()) for of in (torch.minimum, torch.maximum))
    assert fewest <= len(text_TD) <= most < 24 * NUM
    assert torch.cdist(text_TD, known).min(1).values.max() < 1e-2


def test_noise_without_copies_is_refused():
    with pytest.raises(ValueError, match=r"noise = 0.1 has no effect without copies. Hint"):
        AssembleJob(noise=0.1, seed=0)


@pytest.mark.parametrize(
    ("changes", "num", "words"),
    [
        ({"copies": False}, 2, ["num_experts = 3, copies = False: 2 experts", "Hint: 3"]),
        ({}, 3, ["copies = True: 3 experts", "Hint: 1"]),
        ({"router_init": "centroids"}, 1, ["centroids needs training samples", "--input index="]),
    ],
)
def test_what_is_missing_is_said(base, tmp_path, changes, num, words):
    settings = AssembleJob(**{"num_experts": E, "copies": True, "seed": 0, **changes})
    with pytest.raises(ConfigError) as error:
        assemble(settings, [base] * num, tmp_path)
    for word in words:
        assert word in str(error.value)
