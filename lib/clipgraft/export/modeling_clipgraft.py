"""CLIP and mixtures of experts grown from it, for transformers: torch and transformers are all that it needs.

Written by clipgraft beside the weights, which keep the names that they have there. Load it with
`AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

# Shapes: B batch, C channels, H side of an image, L sequence, T tokens, D width, F hidden, E experts, K top-k

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


class ClipgraftConfig(PretrainedConfig):
    """Sizes of both towers, as open_clip names them, and of the experts."""

    model_type = "clipgraft"

    def __init__(
        self,
        embed_dim: int = 512,
        quick_gelu: bool = False,
        vision_cfg: dict[str, Any] | None = None,
        text_cfg: dict[str, Any] | None = None,
        moe: dict[str, Any] | None = None,
        has_logit_bias: bool = False,
        **others: Any,
    ) -> None:
        """Take over what `config.json` says.

        Args:
            embed_dim: of the features.
            quick_gelu: the activation; else GELU.
            vision_cfg: the image tower, every key spelled out.
            text_cfg: the text tower, likewise; None: there is none.
            moe: `num_experts`, `top_k`, `image_layers`, `text_layers`; None: no experts.
            has_logit_bias: as models of a sigmoid loss have.
            others: transformers' own.
        """
        self.embed_dim, self.quick_gelu, self.has_logit_bias = embed_dim, quick_gelu, has_logit_bias
        self.vision_cfg, self.text_cfg, self.moe = vision_cfg or {}, text_cfg or {}, moe
        super().__init__(**others)

    @property
    def hidden_size(self) -> int:
        """Of the image tower, by the name that programs around it ask for; so are those below."""
        return int(self.vision_cfg["width"])

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of the image tower."""
        return int(self.vision_cfg["layers"])

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return int(self.vision_cfg["image_size"])

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.vision_cfg["patch_size"])


class QuickGELU(nn.Module):
    """OpenAI's activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Like GELU, but for the third digit."""
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    """A factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale."""
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention with torch's parameter names."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, is_causal: bool) -> Tensor:
        """Each token looks at all, or at those before it."""
        qkv = F.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The dense MLP of a block."""

    def __init__(self, width: int, hidden: int, gelu: nn.Module) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(width, hidden), gelu, nn.Linear(hidden, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Up, activation, down."""
        return self.c_proj(self.gelu(self.c_fc(x_BLD)))


class MoeMlp(nn.Module):
    """Experts in place of an MLP: each token goes through the top_k that the router likes best."""

    def __init__(
        self, width: int, hidden: int, gelu: nn.Module, num_experts: int, top_k: int
    ) -> None:
        super().__init__()
        self.top_k, self.gelu = top_k, gelu
        self.c_fc_weight = nn.Parameter(torch.zeros(num_experts, hidden, width))
        self.c_fc_bias = nn.Parameter(torch.zeros(num_experts, hidden))
        self.c_proj_weight = nn.Parameter(torch.zeros(num_experts, width, hidden))
        self.c_proj_bias = nn.Parameter(torch.zeros(num_experts, width))
        self.router = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Sum over the chosen experts, weighted with what the router gives them, which adds up to 1."""
        x_TD = x_BLD.flatten(0, 1)
        with torch.autocast(x_TD.device.type, enabled=False):
            probs_TE = F.linear(x_TD.float(), self.router.float()).softmax(1)
            gates_TK, topk_TK = probs_TE.topk(self.top_k, dim=1)
            gates_TK = gates_TK / gates_TK.sum(1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for e in range(len(self.router)):
            token, choice = (topk_TK == e).nonzero(as_tuple=True)
            hidden = self.gelu(F.linear(x_TD[token], self.c_fc_weight[e], self.c_fc_bias[e]))
            out = F.linear(hidden, self.c_proj_weight[e], self.c_proj_bias[e])
            y_TD.index_add_(0, token, (gates_TK[token, choice, None] * out).to(y_TD.dtype))
        return y_TD.view_as(x_BLD)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around a shortcut."""

    def __init__(
        self, tower: dict[str, Any], num_heads: int, gelu: nn.Module, moe: dict[str, Any] | None
    ) -> None:
        super().__init__()
        width, hidden = tower["width"], int(tower["width"] * tower["mlp_ratio"])
        has_scale = tower["ls_init_value"] is not None
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.ls_1: nn.Module = LayerScale(width) if has_scale else nn.Identity()
        self.ls_2: nn.Module = LayerScale(width) if has_scale else nn.Identity()
        self.mlp: nn.Module = Mlp(width, hidden, gelu)
        if moe is not None:
            self.mlp = MoeMlp(width, hidden, gelu, moe["num_experts"], moe["top_k"])

    def forward(self, x_BLD: Tensor, is_causal: bool) -> Tensor:
        """One block."""
        x_BLD = x_BLD + self.ls_1(self.attn(self.ln_1(x_BLD), is_causal))
        return x_BLD + self.ls_2(self.mlp(self.ln_2(x_BLD)))


class Transformer(nn.Module):
    """The blocks of a tower."""

    def __init__(
        self, config: ClipgraftConfig, tower: dict[str, Any], num_heads: int, layers: str
    ) -> None:
        super().__init__()
        gelu = QuickGELU() if config.quick_gelu else nn.GELU()
        moe = config.moe or {layers: []}
        self.resblocks = nn.ModuleList(
            Block(tower, num_heads, gelu, config.moe if number in moe[layers] else None)
            for number in range(tower["layers"])
        )

    def forward(self, x_BLD: Tensor, is_causal: bool = False) -> list[Tensor]:
        """What goes into the first block, and what comes out of each."""
        states = [x_BLD]
        for block in self.resblocks:
            states.append(block(states[-1], is_causal))
        return states


class VisionTower(nn.Module):
    """Images to features."""

    def __init__(self, config: ClipgraftConfig, has_projection: bool = True) -> None:
        super().__init__()
        tower = self.config = config.vision_cfg
        width, patch = tower["width"], tower["patch_size"]
        num_patches = (tower["image_size"] // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(num_patches + 1, width))
        self.ln_pre: nn.Module = nn.Identity() if tower["no_ln_pre"] else nn.LayerNorm(width)
        num_heads = width // tower["head_width"]
        self.transformer = Transformer(config, tower, num_heads, "image_layers")
        self.ln_post = nn.LayerNorm(width)
        self.proj: nn.Parameter | None = None
        if has_projection:
            self.proj = nn.Parameter(torch.zeros(width, config.embed_dim))

    def states(self, images_BCHH: Tensor) -> list[Tensor]:
        """Tokens [B, 1 + patches, D] before the first block, and behind each."""
        x_BLD = self.conv1(images_BCHH.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        cls_B1D = self.class_embedding.expand(len(x_BLD), 1, -1)
        x_BLD = torch.cat([cls_B1D, x_BLD], dim=1) + self.positional_embedding
        states: list[Tensor] = self.transformer(self.ln_pre(x_BLD))
        return states

    def pool(self, x_BLD: Tensor) -> Tensor:
        """One vector per image, before the projection."""
        if self.config["pool_type"] == "tok":
            return self.ln_post(x_BLD[:, 0])
        if self.config["final_ln_after_pool"]:
            return self.ln_post(x_BLD[:, 1:].mean(1))
        return self.ln_post(x_BLD)[:, 1:].mean(1)

    def forward(self, images_BCHH: Tensor) -> Tensor:
        """Features [B, embed_dim], not normalised."""
        assert self.proj is not None
        return self.pool(self.states(images_BCHH)[-1]) @ self.proj


class TextTower(nn.Module):
    """Token ids to features."""

    def __init__(self, config: ClipgraftConfig) -> None:
        super().__init__()
        tower = self.config = config.text_cfg
        width, length = tower["width"], tower["context_length"]
        self.token_embedding = nn.Embedding(tower["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.transformer = Transformer(config, tower, tower["heads"], "text_layers")
        self.ln_final = nn.LayerNorm(width)
        self.text_projection: nn.Parameter | nn.Linear
        if tower["proj_bias"]:
            self.text_projection = nn.Linear(width, config.embed_dim)
        else:
            self.text_projection = nn.Parameter(torch.zeros(width, config.embed_dim))

    def forward(self, text_BL: Tensor) -> Tensor:
        """Features [B, embed_dim], not normalised."""
        text_BL = self._as_trained(text_BL)
        x_BLD = self.token_embedding(text_BL) + self.positional_embedding[: text_BL.shape[1]]
        x_BLD = self.transformer(x_BLD, not self.config["no_causal_mask"])[-1]
        x_BD = self.ln_final(x_BLD)[
            torch.arange(len(x_BLD), device=x_BLD.device), self._place(text_BL)
        ]
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(x_BD)
        return x_BD @ self.text_projection

    def _as_trained(self, text_BL: Tensor) -> Tensor:
        """Zeros behind the end token, whatever a tokenizer pads with, and as far as the model was trained."""
        if self.config["has_end_token"]:
            is_end_BL = (text_BL == self.config["vocab_size"] - 1).long()
            text_BL = text_BL.masked_fill(is_end_BL.cumsum(1) > is_end_BL, 0)
        if self.config["sees_padding"]:
            text_BL = F.pad(text_BL, (0, self.config["context_length"] - text_BL.shape[1]))
        return text_BL

    def _place(self, text_BL: Tensor) -> Tensor:
        """Which token stands for the text."""
        place = {"first": 0, "last": text_BL.shape[1] - 1}.get(self.config["pool_type"])
        if place is not None:
            return torch.full((len(text_BL),), place, device=text_BL.device)
        return text_BL.argmax(1)


@dataclass
class ClipgraftOutput(ModelOutput):
    """As transformers' CLIP: scores, and features of length 1."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class ClipgraftPreTrainedModel(PreTrainedModel):
    """What both models below are to transformers."""

    config_class = ClipgraftConfig
    base_model_prefix = "clipgraft"
    main_input_name = "pixel_values"
    _no_split_modules = ("Block",)


class ClipgraftModel(ClipgraftPreTrainedModel):
    """Both towers."""

    def __init__(self, config: ClipgraftConfig) -> None:
        super().__init__(config)
        self.visual, self.text = VisionTower(config), TextTower(config)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(())) if config.has_logit_bias else None
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Tensor:
        """Features [B, embed_dim] of images, not normalised."""
        features: Tensor = self.visual(pixel_values)
        return features

    def get_text_features(self, input_ids: Tensor, **_: Any) -> Tensor:
        """Features [B, embed_dim] of texts, not normalised."""
        features: Tensor = self.text(input_ids)
        return features

    def forward(self, input_ids: Tensor, pixel_values: Tensor, **_: Any) -> ClipgraftOutput:
        """Scores of each image with each text; an attention mask says nothing that the ids do not."""
        image_BD = F.normalize(self.get_image_features(pixel_values), dim=-1)
        text_BD = F.normalize(self.get_text_features(input_ids), dim=-1)
        logits = self.logit_scale.exp() * image_BD @ text_BD.T
        logits = logits if self.logit_bias is None else logits + self.logit_bias
        return ClipgraftOutput(logits, logits.T, text_BD, image_BD)


class ClipgraftVisionModel(ClipgraftPreTrainedModel):
    """The image tower alone, for models that look at its patches."""

    def __init__(self, config: ClipgraftConfig) -> None:
        super().__init__(config)
        self.visual = VisionTower(config, has_projection=False)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Tokens [B, 1 + patches, D], the class token first: `hidden_states[0]` before the first block, -1 behind the last."""
        states = self.visual.states(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=self.visual.pool(states[-1]),
            hidden_states=tuple(states),
        )
