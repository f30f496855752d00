"""What settings ask for that cannot be, told in a line: checked before anything runs, and again where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipgraft.recipes import PhaseSettings


def position_kind(phase: PhaseSettings, was_frozen: bool) -> str:
    """What image positions are in a phase: `learned`, `sincos_frozen` or `sincos_init`.

    Args:
        phase: may leave it to the model.
        was_frozen: whether the table before was sines and cosines, or the model's `pos_embed_type` is `sin_cos_2d`.
    """
    return phase.pos_embed or ("sincos_frozen" if was_frozen else "learned")


def position_misfit(phase: PhaseSettings, was_frozen: bool, is_carried: bool) -> str:
    """Why a phase cannot have its image positions; empty if it can.

    Args:
        phase: what it asks for.
        was_frozen: as in `position_kind`.
        is_carried: whether the table comes from a phase before, or with public weights.
    """
    kind, recompute = position_kind(phase, was_frozen), phase.pos_resize == "recompute"
    if recompute and kind == "learned":
        return (
            f"pretrain.{phase.name}.pos_resize = recompute: the position table is learned, so there is nothing to "
            "compute it from. Hint: pos_resize: interpolate, or pos_embed: sincos_frozen or sincos_init"
        )
    if is_carried and kind == "sincos_frozen" and not was_frozen and not recompute:
        return (
            f"pretrain.{phase.name}.pos_embed = sincos_frozen: the table before was learned, and interpolation would "
            "freeze what is no sin-cos table. Hint: pos_resize: recompute, or pos_embed: learned"
        )
    return ""


def start_misfit(phase: PhaseSettings, is_carried: bool, has_pretrained: bool) -> str:
    """Why a phase cannot start as it asks; empty if it can.

    Args:
        phase: what it asks for.
        is_carried: whether there is a phase before.
        has_pretrained: whether the model starts from public weights.
    """
    where = f"pretrain.{phase.name}"
    if phase.init_from and (is_carried or has_pretrained):
        other = "the phase before" if is_carried else "model.pretrained"
        return f"{where}.init_from = reference: the weights are those of {other}. Hint: remove one"
    if is_carried or has_pretrained or phase.init_from:
        return _bounds_misfit(phase, has_weights=True)
    kept = [f"lock = [{', '.join(phase.lock)}]"] if phase.lock else []
    kept += ["loss.temperature = locked"] if phase.loss.tau == "locked" else []
    kept += ["text_pos_resize = stretch"] if phase.text_pos_resize == "stretch" else []
    if kept:
        return (
            f"{where}.{kept[0]}: there are no initial weights to keep. Hint: model.pretrained, init_from: reference, "
            "or a phase before"
        )
    return _bounds_misfit(phase, has_weights=False)


def _bounds_misfit(phase: PhaseSettings, has_weights: bool) -> str:
    """A learned temperature comes with the weights, where there are any, and a fixed one has no bounds."""
    low, high = phase.loss.tau_bounds
    starts = phase.loss.tau == "per_sample" or (phase.loss.tau == "learned" and not has_weights)
    if not starts or low <= phase.temperature <= high:
        return ""
    return (
        f"pretrain.{phase.name}.temperature = {phase.temperature} is outside of loss.tau_bounds = [{low}, {high}]. "
        "Hint: a temperature within"
    )


def stretch_misfit(keep: int, num_rows: int) -> str:
    """Why a table of text positions cannot be stretched; empty if it can.

    Args:
        keep: `text_pos_keep`.
        num_rows: of the table.
    """
    if keep < num_rows and num_rows > 1:
        return ""
    return (
        f"text_pos_keep = {keep}: the text has {num_rows} positions, so nothing is left to stretch. "
        f"Hint: less than {num_rows}, or text_pos_resize: linear"
    )


def interactive_misfit(phase: PhaseSettings, reference: str, dim: int, reference_dim: int) -> str:
    """Why a reference is nothing for interactive distillation; empty if it is, or there is none.

    Args:
        phase: what it asks for.
        reference: its model.
        dim: of the model's features.
        reference_dim: of the reference's.
    """
    if not phase.distillation.interactive or dim == reference_dim:
        return ""
    return (
        f"pretrain.{phase.name}.distillation.interactive needs equal dimensions: reference {reference} has "
        f"{reference_dim}, the model has {dim}. Hint: feature or affinity, which take any"
    )


def tower_misfit(config: Mapping[str, Any]) -> str:
    """Why towers and tokenizer of a model are none of open_clip's own that give one vector; empty if they are.

    Args:
        config: in open_clip's form.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    foreign = [
        *(["a timm image tower"] if vision.get("timm_model_name") else []),
        *(["a ResNet image tower"] if isinstance(vision.get("layers"), list | tuple) else []),
        *(["a Hugging Face text tower"] if text.get("hf_model_name") else []),
        *(["a Hugging Face tokenizer"] if not reads_our_tokens(text) else []),
        *(["a captioner (CoCa)"] if config.get("multimodal_cfg") else []),
    ]
    if not foreign:
        return _outputs_misfit(config)
    return (
        f"{' and '.join(foreign)} is not supported: experts are grafted into open_clip's own transformers, and captions "
        "become tokens of CLIP's vocabulary, or of BERT's without [SEP]. Hint: e.g. ViT-B-16"
    )


def _outputs_misfit(config: Mapping[str, Any]) -> str:
    """Why towers do not give one vector of `embed_dim` numbers of each picture and text."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    given = [
        *(["output_dict"] if config.get("output_dict") else []),
        *(["vision_cfg.output_tokens"] if vision.get("output_tokens") else []),
        *(["text_cfg.output_tokens"] if text.get("output_tokens") else []),
        *(["vision_cfg.pool_type: none"] if vision.get("pool_type") == "none" else []),
        *(["text_cfg.pool_type: none"] if text.get("pool_type") == "none" else []),
        *(
            ["vision_cfg.attentional_pool"]
            if isinstance(vision.get("attentional_pool"), str)
            else []
        ),
    ]
    if given:
        return (
            f"{' and '.join(given)}: a tower gives more than one vector of a picture or a text, and training compares "
            "vectors. Hint: leave it out"
        )
    width, dim = text.get("width", 512), config["embed_dim"]  # as open_clip
    if text.get("proj_type") == "none" and width != dim:
        return (
            f"text_cfg.proj_type = none: features of texts have width = {width} numbers, those of pictures embed_dim = "
            f"{dim}. Hint: leave it out, or width: {dim}"
        )
    return ""


def reads_our_tokens(text: Mapping[str, Any]) -> bool:
    """Whether we have the tokenizer: byte pairs, or WordPiece as CLIPA-v2 uses it."""
    name, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    is_bert = str(name).split("/")[-1] == "bert-base-uncased"
    return not name or (is_bert and bool(options.get("strip_sep_token")))


def vocabulary_misfit(text_cfg: Mapping[str, Any], vocabulary: str) -> str:
    """Why a text tower cannot read the captions of an index; empty if it can.

    Args:
        text_cfg: as in open_clip's model configs.
        vocabulary: `corpus`, `full` or `wordpiece`.
    """
    tokenizer, pool = text_cfg.get("hf_tokenizer_name"), text_cfg.get("pool_type", "argmax")
    if vocabulary == "wordpiece" and pool not in ("first", "last"):
        return (
            f"text_cfg.pool_type = {pool} takes the feature at the end token, and index.vocabulary = wordpiece has "
            "none. Hint: text_cfg: {pool_type: last, no_causal_mask: true}"
        )
    if vocabulary != "wordpiece" and tokenizer is not None:
        return (
            f"text_cfg.hf_tokenizer_name = {tokenizer} is not what index.vocabulary = {vocabulary} gives. "
            "Hint: index: {vocabulary: wordpiece}"
        )
    return ""
