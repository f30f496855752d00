"""What a phase costs: tokens, multiply-accumulates, parameters and memory, by arithmetic on configs, without torch.

Counted are the matrix products of open_clip's transformers, as torch's FLOP counter counts them: stem, blocks and
final projections; attention as if nothing were masked. Norms, softmax and activations are left out (under 1 %).
A training step of all weights costs three forward passes, and a multiply-accumulate is two FLOPs; what gradient
checkpointing would compute a second time is no progress and never counted. Where only a part is trained, a step costs
less (`sample_flops`): products with frozen weights have no gradient of the weights, and what comes before the first
trained weight has none at all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clipgraft.config import ConfigError
from clipgraft.recipes import PhaseSettings
from clipgraft.reductions import num_kept

FLOPS_PER_MAC = 6  # in training: 2, times a forward pass and a backward pass of twice its cost

# open_clip's defaults (tests/test_cost.py holds them against open_clip's own).
VISION = {"layers": 12, "width": 768, "mlp_ratio": 4.0, "patch_size": 16, "no_ln_pre": False}
TEXT = {"layers": 12, "width": 512, "mlp_ratio": 4.0, "vocab_size": 49408}
UNCOUNTED = """
    timm_model_name attentional_pool ls_init_value qk_norm scale_heads scale_attn_inner
    scale_attn scale_fc block_type hf_model_name embed_cls proj_bias
""".split()


@dataclass(frozen=True)
class Trained:
    """What of a model a training step changes.

    Attributes:
        weights: `all`; the `mlps` of a dense model; of a mixture `experts`, their routers too, or `routers` alone;
            `none`, for a forward pass.
        image_layers: blocks of the image tower that are trained; of a mixture those with experts count. With `all`
            weights it is every block, or none in a locked tower.
        text_layers: the same of the text tower.
        num_texts: per picture.
    """

    weights: Literal["none", "mlps", "routers", "experts", "all"] = "none"
    image_layers: Literal["all"] | Collection[int] = "all"
    text_layers: Literal["all"] | Collection[int] = "all"
    num_texts: float = 1


def tower_macs(depth: int, width: int, length: int, mlp_ratio: float = 4.0) -> float:
    """Multiply-accumulates of the blocks of a transformer for one sequence.

    Args:
        depth: blocks.
        width: of a token.
        length: tokens.
        mlp_ratio: hidden width of the MLP over `width`.
    """
    products = 4 * width**2 + 2 * width * int(width * mlp_ratio)  # q, k, v, out; MLP
    return depth * (products * length + 2 * width * length**2)


def forward_macs(config: Mapping[str, Any], image_tokens: int, text_tokens: int) -> float:
    """Multiply-accumulates of a forward pass of both towers for one sample.

    Args:
        config: in open_clip's form.
        image_tokens: with the class token; the stem is paid for the others.
        text_tokens: with start and end token.

    Raises:
        ConfigError: if the model has parts that are not counted.
    """
    vision, text = _towers(config)
    stem = 3 * vision["patch_size"] ** 2 * vision["width"] * (image_tokens - 1)
    projections = (vision["width"] + text["width"]) * config["embed_dim"]
    lengths = ((vision, image_tokens), (text, text_tokens))
    blocks = sum(tower_macs(x["layers"], x["width"], n, x["mlp_ratio"]) for x, n in lengths)
    return float(blocks + stem + projections)


def sample_flops(
    config: Mapping[str, Any],
    image_tokens: int,
    text_tokens: int,
    trained: Trained | None = None,
    moe: Mapping[str, Any] | None = None,
) -> float:
    """FLOPs of one sample: of a training step, or of a forward pass where nothing is trained.

    A weight costs three products: of the forward pass, of the gradient of its input, and of its own, the last only if
    it is trained, the one before only behind the first trained weight of the tower. The two products of attention have
    no weights, but two inputs each. Padding is counted as if it were computed.

    Args:
        config: in open_clip's form.
        image_tokens: with the class token.
        text_tokens: with start and end token.
        trained: what is; None: nothing.
        moe: that entry of `model.json`; None: dense.

    Raises:
        ConfigError: if the model has parts that are not counted.
    """
    trained, moe = trained or Trained(), moe or {}
    vision, text = _towers(config)
    stem = 3 * vision["patch_size"] ** 2 * vision["width"] * (image_tokens - 1)
    image = _tower_flops(vision, image_tokens, stem, config["embed_dim"], trained, moe, "image")
    words = _tower_flops(text, text_tokens, 0, config["embed_dim"], trained, moe, "text")
    return image + trained.num_texts * words


def _tower_flops(
    tower: Mapping[str, Any],
    length: int,
    stem: int,
    embed_dim: int,
    trained: Trained,
    moe: Mapping[str, Any],
    side: Literal["image", "text"],
) -> float:
    layers = trained.image_layers if side == "image" else trained.text_layers
    is_whole = trained.weights == "all" and (layers == "all" or bool(layers))
    width, head = tower["width"], tower["width"] * embed_dim
    forward, backward, flows = stem + head, stem * is_whole, is_whole
    for number in range(tower["layers"]):
        is_moe, is_here = (
            number in moe.get(f"{side}_layers", ()),
            layers == "all" or number in layers,
        )
        half = width * int(width * tower["mlp_ratio"]) * length * (moe["top_k"] if is_moe else 1)
        router = width * moe["num_experts"] * length if is_moe else 0
        linear, products = 4 * width**2 * length, 2 * width * length**2
        has_mlp = is_whole or (is_here and trained.weights == ("experts" if is_moe else "mlps"))
        has_router = is_moe and is_here and trained.weights in ("routers", "experts", "all")
        forward += linear + products + 2 * half + router
        if flows:  # gradients of what enters attention, the first half of the MLP, and the router
            backward += linear + 2 * products + half + router
        if flows or has_mlp:
            backward += half
        backward += linear * is_whole + 2 * half * has_mlp + router * has_router
        flows = flows or has_mlp or has_router
    return float(2 * (forward + backward + head * flows + head * is_whole))


def image_tokens(config: Mapping[str, Any], phase: PhaseSettings) -> int:
    """Tokens of an image in training, after reduction, with the class token (open_clip's models have one)."""
    return 1 + num_patches(config, phase)


def num_patches(config: Mapping[str, Any], phase: PhaseSettings) -> int:
    """Patches of an image that training sees."""
    side = phase.image_size // int(_towers(config)[0]["patch_size"])
    return num_kept(phase.image_reduction, side, side)


def phase_macs(config: Mapping[str, Any], phase: PhaseSettings) -> float:
    """Multiply-accumulates of a forward pass for one sample of a phase."""
    return forward_macs(config, image_tokens(config, phase), phase.text_length)


def training_macs(config: Mapping[str, Any], phase: PhaseSettings) -> float:
    """Multiply-accumulates of the forward passes of all samples of a phase; `FLOPS_PER_MAC` makes it FLOPs."""
    return phase_macs(config, phase) * phase.samples_seen


def num_parameters(config: Mapping[str, Any], phase: PhaseSettings) -> tuple[int, int]:
    """Parameters of the image and of the text tower, with position tables of the phase's sizes."""
    vision, text = _towers(config)
    width, patch = vision["width"], vision["patch_size"]
    positions = (phase.image_size // patch) ** 2 + 1
    norms = 2 * width * (1 if vision["no_ln_pre"] else 2)
    image = 3 * patch**2 * width + width + positions * width + norms + width * config["embed_dim"]
    words = text["vocab_size"] + phase.text_length + 2 + config["embed_dim"]  # 2: last norm
    return image + _block_parameters(vision), words * text["width"] + _block_parameters(text)


def activation_bytes(config: Mapping[str, Any], image_tokens: int, text_tokens: int) -> float:
    """What the blocks keep of one sample for the backward pass, in bf16 and without checkpointing.

    Per token, with width w and hidden width h: input and output of both norms, q, k, v and the attention's output
    (8 w), the MLP before and after its activation (2 h).
    """
    vision, text = _towers(config)
    kept = [
        x["layers"] * length * (8 * x["width"] + 2 * int(x["width"] * x["mlp_ratio"]))
        for x, length in ((vision, image_tokens), (text, text_tokens))
    ]
    return float(2 * sum(kept))


def blocks(config: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Of the image and the text tower: blocks, their width, parameters of each."""
    return [
        (each["layers"], each["width"], _block_parameters(each) // each["layers"])
        for each in _towers(config)
    ]


def mlps(config: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Of the image and the text tower: blocks, their width, hidden width of their MLPs."""
    return [
        (each["layers"], each["width"], int(each["width"] * each["mlp_ratio"]))
        for each in _towers(config)
    ]


def _block_parameters(tower: Mapping[str, Any]) -> int:
    width, hidden = tower["width"], int(tower["width"] * tower["mlp_ratio"])
    weights = 4 * width**2 + 2 * width * hidden
    return int(tower["layers"] * (weights + 9 * width + hidden))  # biases and two norms


def _towers(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    for name in ("vision_cfg", "text_cfg"):
        odd = [key for key in UNCOUNTED if config[name].get(key)]
        if isinstance(config[name].get("layers"), list):
            odd.append("layers")
        if odd:
            raise ConfigError(
                f"model: the cost of {name}.{odd[0]} = {config[name][odd[0]]!r} is not known. "
                "Hint: only plain transformers are counted, e.g. ViT-B-16"
            )
    return {**VISION, **config["vision_cfg"]}, {**TEXT, **config["text_cfg"]}
