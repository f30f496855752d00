"""CLIP-MoE's checkpoints, and OpenAI's as a base, against a plain forward pass written from the formulas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from clipgraft.checkpoint import load_model
from clipgraft.clipmoe import main
from clipgraft.config import ConfigError
from clipgraft.export.__main__ import main as export
from clipgraft.lean import open_clip
from clipgraft.model_settings import ModelSettings
from clipgraft.models.build import build, model_config, pretrained_state
from clipgraft.models.moe import routings, upcycle
from clipgraft.models.released import read_released, released_state

D, EMBED, PATCH, SIDE, L, VOCAB, LAYERS, E = 128, 32, 8, 16, 24, 50, 2, 3
KEEP = 20
TEXT = torch.zeros(3, L, dtype=torch.int64)
for row, words in enumerate(([48, 5, 0, 49], [48, *range(1, 22), 49], [48, *range(7, 29), 49])):
    TEXT[row, : len(words)] = torch.tensor(words)


def published(moe_layers: int, num_experts: int = E, vocab: int = VOCAB) -> dict[str, list[int]]:
    """Names and shapes as they were released: OpenAI's, experts and gates in the last blocks, two text tables."""
    shapes: dict[str, list[int]] = {
        "visual.class_embedding": [D],
        "visual.conv1.weight": [D, 3, PATCH, PATCH],
        "visual.positional_embedding": [(SIDE // PATCH) ** 2 + 1, D],
        "visual.proj": [D, EMBED],
        "positional_embedding": [L, D],
        "token_embedding.weight": [vocab, D],
        "text_projection": [D, EMBED],
        "logit_scale": [],
    }
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{norm}.weight": [D], f"{norm}.bias": [D]}
    for tower in ("visual.", ""):
        for number in range(LAYERS):
            has_experts = number >= LAYERS - moe_layers
            block = f"{tower}transformer.resblocks.{number}"
            shapes |= {
                f"{block}.attn.in_proj_weight": [3 * D, D],
                f"{block}.attn.in_proj_bias": [3 * D],
                f"{block}.attn.out_proj.weight": [D, D],
                f"{block}.attn.out_proj.bias": [D],
            }
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{norm}.weight": [D], f"{block}.{norm}.bias": [D]}
            experts = [f"experts.{e}." for e in range(num_experts)] if has_experts else [""]
            for expert in experts:
                shapes |= {
                    f"{block}.mlp.{expert}c_fc.weight": [4 * D, D],
                    f"{block}.mlp.{expert}c_fc.bias": [4 * D],
                    f"{block}.mlp.{expert}c_proj.weight": [D, 4 * D],
                    f"{block}.mlp.{expert}c_proj.bias": [D],
                }
            if has_experts:
                shapes[f"{block}.mlp.gate.weight"] = [num_experts, D]
    return shapes | {"positional_embedding_res": [L, D]}


def random_state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


# --- the plain forward pass -----------------------------------------------------------------------------------


def linear(state, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), state[f"{name}.weight"], state[f"{name}.bias"])


def mlp(state, name: str, x: Tensor) -> Tensor:
    hidden = linear(state, f"{name}.c_fc", x)
    return linear(state, f"{name}.c_proj", hidden * torch.sigmoid(1.702 * hidden))


def mixture(state, name: str, x: Tensor, top_k: int) -> Tensor:
    """Every token by itself: softmax over all experts, the likeliest k, renormalised."""
    rows = []
    for token in x.flatten(0, 1):
        probs = (state[f"{name}.gate.weight"] @ token).softmax(0)
        best = probs.argsort(descending=True)[:top_k]
        gates = probs[best] / probs[best].sum()
        rows.append(
            sum(
                g * mlp(state, f"{name}.experts.{e}", token)
                for g, e in zip(gates, best, strict=True)
            )
        )
    return torch.stack(rows).view(x.shape)


def attention(state, name: str, x: Tensor, is_causal: bool) -> Tensor:
    qkv = x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]
    heads = D // 64
    q, k, v = (part.unflatten(2, (heads, 64)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    scores = q @ k.transpose(2, 3) / 64**0.5
    if is_causal:
        scores += torch.full(scores.shape[2:], float("-inf"), dtype=scores.dtype).triu(1)
    return linear(state, f"{name}.out_proj", (scores.softmax(3) @ v).transpose(1, 2).flatten(2))


def blocks(state, tower: str, x: Tensor, top_k: int) -> Tensor:
    for number in range(LAYERS):
        name = f"{tower}transformer.resblocks.{number}"
        x = x + attention(state, f"{name}.attn", norm(state, f"{name}.ln_1", x), tower == "")
        inner, is_dense = norm(state, f"{name}.ln_2", x), f"{name}.mlp.c_fc.bias" in state
        at = f"{name}.mlp"
        x = x + (mlp(state, at, inner) if is_dense else mixture(state, at, inner, top_k))
    return x


def plain(state: dict[str, Tensor], top_k: int = 2) -> tuple[Tensor, Tensor]:
    """Features of images and texts in float64, all positions of a text computed and routed."""
    state = {name: tensor.double() for name, tensor in state.items()}
    kernel = state["visual.conv1.weight"].flatten(1)
    patches = F.unfold(images().double(), PATCH, stride=PATCH).transpose(1, 2) @ kernel.T
    first = state["visual.class_embedding"].expand(3, 1, -1)
    x = torch.cat([first, patches], dim=1) + state["visual.positional_embedding"]
    x = blocks(state, "visual.", norm(state, "visual.ln_pre", x), top_k)
    image = norm(state, "visual.ln_post", x[:, 0]) @ state["visual.proj"]
    second = state.get("positional_embedding_res", state["positional_embedding"])
    tables = torch.stack([state["positional_embedding"], second])
    position = torch.stack([tables[0 if p < KEEP else 1, p] for p in range(L)])
    x = blocks(state, "", state["token_embedding.weight"][TEXT] + position, top_k)
    ends = norm(state, "ln_final", x)[torch.arange(3), TEXT.argmax(1)]
    return image, ends @ state["text_projection"]


def assert_same(model, expected: tuple[Tensor, Tensor]) -> None:
    with torch.inference_mode():
        found = model.eval().encode_image(images()), model.encode_text(TEXT)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
        assert theirs.std() > 0.01


# --- CLIP-MoE -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("moe_layers", "top_k"), [(LAYERS, 2), (1, 2), (LAYERS, 1), (0, 2)])
def test_a_released_checkpoint_gives_the_features_of_the_formulas(tmp_path, moe_layers, top_k):
    state = random_state(published(moe_layers))
    torch.save(state, tmp_path / "moe.pt")
    model, spec = read_released(tmp_path / "moe.pt", top_k)
    assert_same(model, plain(state, top_k))
    layers = list(range(LAYERS - moe_layers, LAYERS))
    moe = {"num_experts": E, "top_k": top_k, "image_layers": layers, "text_layers": layers}
    assert spec["moe"] == (moe if moe_layers else None)
    num_tokens = {name: len(routing.probs_TE) for name, routing in routings(model).items()}
    assert num_tokens.get("text.1", 4 + 23 + 24) == 4 + 23 + 24  # their padding is not routed here


def test_both_text_tables_count_from_their_own_positions(tmp_path):
    state = random_state(published(LAYERS))
    torch.save(state, tmp_path / "moe.pt")
    table = read_released(tmp_path / "moe.pt")[0].text.positional_embedding
    assert torch.equal(table[:KEEP], state["positional_embedding"][:KEEP])
    assert torch.equal(table[KEEP:], state["positional_embedding_res"][KEEP:])
    assert not torch.equal(state["positional_embedding"], state["positional_embedding_res"])


@pytest.mark.parametrize("moe_layers", [LAYERS, 1, 0])
def test_what_is_written_has_their_names_and_shapes_and_reads_back_the_same(tmp_path, moe_layers):
    state = random_state(published(moe_layers))
    torch.save(state, tmp_path / "moe.pt")
    written = released_state(*read_released(tmp_path / "moe.pt"))
    assert {name: list(t.shape) for name, t in written.items()} == published(moe_layers)
    tables = {"positional_embedding", "positional_embedding_res"}
    assert all(torch.equal(written[name], state[name]) for name in state.keys() - tables)
    for ours, theirs in zip(plain(written), plain(state), strict=True):
        assert torch.equal(ours, theirs)  # rows that neither reads may differ


def test_folders_and_checkpoints_become_one_another_by_one_command_each(tmp_path, capsys):
    state = random_state(published(1, vocab=49408))
    torch.save(
        {"state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "a.pt"
    )
    main(["read", str(tmp_path / "a.pt"), str(tmp_path / "model")])
    with pytest.raises(SystemExit, match="exists"):
        main(["read", str(tmp_path / "a.pt"), str(tmp_path / "model")])
    export(["clip_moe", str(tmp_path / "model"), str(tmp_path / "out")])
    (tmp_path / "out/clip_moe.pt").rename(tmp_path / "b.pt")
    save_file(torch.load(tmp_path / "b.pt", weights_only=True), tmp_path / "b.safetensors")
    for name in ("b.pt", "b.safetensors"):
        main(["read", str(tmp_path / name), str(tmp_path / f"from {name}"), "--top-k", "1"])
    from clipgraft.models.moe import insert_experts

    first, *others = (
        load_model(tmp_path / name, insert_experts=insert_experts)
        for name in ("model", "from b.pt", "from b.safetensors")
    )
    assert first.spec["kind"] == "moe" and first.spec["moe"]["top_k"] == 2
    assert_same(first.model, plain(state))
    for other in others:
        assert other.spec["moe"] == {**first.spec["moe"], "top_k": 1}
        for name, tensor in first.model.state_dict().items():
            assert torch.equal(tensor, other.model.state_dict()[name])


BROKEN = [
    ("transformer.resblocks.1.mlp.experts.2.c_fc.bias", "expert 2 lacks c_fc.bias"),
    ("visual.transformer.resblocks.0.mlp.gate.weight", "gate.weight is missing"),
    ("visual.conv1.weight", "no vision transformer of OpenAI's form"),
    ("ln_final.bias", "text.ln_final.bias is missing"),
]


@pytest.mark.parametrize(("name", "message"), BROKEN)
def test_a_checkpoint_that_is_not_whole_is_named(tmp_path, name, message):
    state = random_state(published(LAYERS))
    del state[name]
    torch.save(state, tmp_path / "moe.pt")
    with pytest.raises(ConfigError, match=message):
        read_released(tmp_path / "moe.pt")


FOREIGN: list[tuple[dict[str, Any], str]] = [
    ({"quick_gelu": False}, "quick_gelu is false"),
    ({"text_cfg": {"heads": 4}}, "text_cfg.heads is 4, theirs is 2"),
    ({"text_cfg": {"pool_type": "last"}}, "text_cfg.pool_type is last"),
    ({"moe": {"image_layers": [0]}}, r"moe.image_layers is \[0\], theirs would be \[1\]"),
    ({"moe": {"text_layers": []}}, r"moe.text_layers is \[\], theirs would be \[0, 1\]"),
]


@pytest.mark.parametrize(("change", "message"), FOREIGN)
def test_a_model_that_their_reader_would_take_for_another_is_not_written(tmp_path, change, message):
    torch.save(random_state(published(LAYERS)), tmp_path / "moe.pt")
    model, spec = read_released(tmp_path / "moe.pt")
    spec = copy.deepcopy(spec)
    config, moe = spec["config"], spec["moe"]
    moe |= change.get("moe", {})
    config["text_cfg"] |= change.get("text_cfg", {})
    config["quick_gelu"] = change.get("quick_gelu", True)
    with pytest.raises(ConfigError, match=message):
        released_state(model, spec)


SETTINGS = [{"init_logit_bias": -10.0}, {"nonscalar_logit_scale": True}]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: next(iter(setting)))
def test_another_bias_or_scale_is_refused_where_it_is_written_not_where_it_is_read(
    tmp_path, setting
):
    torch.save(random_state(published(0)), tmp_path / "dense.pt")
    _, spec = read_released(tmp_path / "dense.pt")
    config = spec["config"] | setting
    with pytest.raises(ConfigError, match=next(iter(setting))):
        released_state(build(config), {**spec, "config": config})


def test_another_vocabulary_is_not_written(tmp_path):
    torch.save(random_state(published(LAYERS)), tmp_path / "moe.pt")
    with pytest.raises(SystemExit, match=r"a table of 50 tokens, .*'?index: {vocabulary: full}"):
        main(["read", str(tmp_path / "moe.pt"), str(tmp_path / "model")])


# --- public weights as the base of a mixture --------------------------------------------------------------------


def settings(quick_gelu: bool, path: Path) -> ModelSettings:
    vision = {"image_size": SIDE, "patch_size": PATCH, "width": D, "layers": LAYERS}
    text = {"context_length": L, "vocab_size": VOCAB, "width": D, "heads": 2, "layers": LAYERS}
    config = {"embed_dim": EMBED, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
    return ModelSettings(config=config, pretrained=str(path))


def grafted(given: ModelSettings):
    config = model_config(given, VOCAB, SIDE, L)
    model = build(config)
    model.load_state_dict(pretrained_state(given, config))
    layers = {"image_layers": "all", "text_layers": "all"}
    upcycle(model, [model.state_dict()] * E, top_k=2, generator=torch.Generator(), **layers)
    return model


@pytest.mark.parametrize("has_two_tables", [False, True])
def test_openais_weights_are_the_base_of_a_mixture_with_quickgelu(tmp_path, has_two_tables):
    """As in their files: half in float16, with three numbers beside; and Long-CLIP's, with a second table."""
    state = {name: t.half().float() for name, t in random_state(published(0)).items()}
    if not has_two_tables:
        del state["positional_embedding_res"]
    sizes = {"input_resolution": SIDE, "context_length": L, "vocab_size": VOCAB}
    saved = {name: tensor.half() for name, tensor in state.items()}
    torch.save(saved | {k: torch.tensor(v) for k, v in sizes.items()}, tmp_path / "openai.pt")
    assert_same(grafted(settings(True, tmp_path / "openai.pt")), plain(state))
    with pytest.raises(ConfigError, match="trained with QuickGELU, and the model has GELU"):
        grafted(settings(False, tmp_path / "openai.pt"))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clips_weights_are_the_base_of_a_mixture(tmp_path, quick_gelu):
    given = settings(quick_gelu, tmp_path / "open_clip.pt")
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**copy.deepcopy(given.config))
    torch.save(theirs.state_dict(), tmp_path / "open_clip.pt")
    with torch.inference_mode():
        expected = theirs.eval().encode_image(images()), theirs.encode_text(TEXT)
    assert_same(grafted(given), tuple(each.double() for each in expected))
