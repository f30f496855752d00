"""Which expert tokens choose: recorded while a mixture of experts is evaluated, and what the choice has to do with labels.

A token's choice is its first expert. Images count by their patches, captions by their own tokens: class, start and end
tokens are not part of either. How much a choice says of an attribute is their mutual information, as a share of the
entropy of the choice: 0 if the choice knows nothing of the attribute, 1 if it follows from it. The tokens of one picture
are not independent, so even labels dealt out at random get a small share; it stands beside (`shuffled`).
"""

# Shapes: B batch, L sequence, R recorded tokens, I items (images or texts), M layers, E experts, P pairs, K keys

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipgraft.models.moe import routings

NUM_WORDS = 30


@dataclass(frozen=True)
class TowerChoices:
    """First choices of all tokens of one tower.

    Attributes:
        layers: numbers of the blocks with experts.
        num_experts: E.
        item_R: image or text of each token.
        key_R: what the token is: its place among the patches, or its id.
        expert_RM: its first choice in each layer.
    """

    layers: list[int]
    num_experts: int
    item_R: np.ndarray
    key_R: np.ndarray
    expert_RM: np.ndarray

    def of_item(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys [R] and choices [R, M] of the tokens of one image or text, in order."""
        own = slice(*np.searchsorted(self.item_R, [item, item + 1]))
        return self.key_R[own], self.expert_RM[own]


class Recorder:
    """Reads the routing of a model after each batch."""

    def __init__(self, model: nn.Module, special_ids: Sequence[int | None]) -> None:
        """Begin with nothing recorded.

        Args:
            model: whose routing is read.
            special_ids: of the start token and, if there is one, of the end token.
        """
        self._model = model
        self._special_ids = [number for number in special_ids if number is not None]
        self._parts: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self._layers: dict[str, list[int]] = {}
        self._num_experts = 0
        self._num_items = {"image": 0, "text": 0}

    def see_images(self, num_images: int) -> None:
        """Record the patches of the images that have just been encoded."""
        taken = self._take("visual", "image")
        if taken is not None:
            rows, columns = self._model.visual.grid_size  # type: ignore[union-attr,misc]
            num_patches = int(rows) * int(columns)
            expert_BLM = taken.reshape(num_images, -1, taken.shape[1])
            patches_BLM = expert_BLM[
                :, expert_BLM.shape[1] - num_patches :
            ]  # after the class token
            key_R = np.tile(np.arange(num_patches), num_images)
            length_B = np.full(num_images, num_patches)
            self._keep("image", length_B, key_R, patches_BLM.reshape(len(key_R), -1))

    def of_images(self) -> dict[str, np.ndarray]:
        """What was recorded of images, as arrays; none without experts."""
        if "image" not in self._parts:
            return {}
        item_R, key_R, expert_RM = map(np.concatenate, zip(*self._parts["image"], strict=True))
        about = np.array([self._num_experts, *self._layers["image"]])
        return {"item_R": item_R, "key_R": key_R, "expert_RM": expert_RM, "about": about}

    def see_again(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `of_images` gave before."""
        if "about" in arrays:
            self._num_experts, *self._layers["image"] = arrays["about"].tolist()
            self._parts["image"] = [(arrays["item_R"], arrays["key_R"], arrays["expert_RM"])]

    def see_texts(self, text_BL: Tensor) -> None:
        """Record the tokens of the texts that have just been encoded; padding, start, end and class are left out."""
        taken = self._take("text", "text")
        if taken is None:
            return
        ids_BL = text_BL.cpu().numpy()
        # 0 is padding at the end of a text only; before it, it is "!".
        real_BL = np.cumsum(ids_BL[:, ::-1] != 0, axis=1)[:, ::-1] > 0
        if taken.shape[0] > ids_BL.size:  # a class token behind each text (text_cfg.embed_cls)
            expert_BLM = taken.reshape(len(ids_BL), -1, taken.shape[1])
            taken = expert_BLM[:, : ids_BL.shape[1]].reshape(ids_BL.size, -1)
        if taken.shape[0] == ids_BL.size:  # where padding is seen it is routed, too
            taken = taken[real_BL.reshape(-1)]
        assert len(taken) == real_BL.sum(), "routed tokens are not those of the texts"
        own_BL = real_BL & ~np.isin(ids_BL, self._special_ids)
        self._keep("text", own_BL.sum(1), ids_BL[own_BL], taken[own_BL[real_BL]])

    def towers(self) -> dict[str, TowerChoices]:
        """All that was recorded, of towers with experts."""
        towers = {}
        for tower, parts in self._parts.items():
            item_R, key_R, expert_RM = map(np.concatenate, zip(*parts, strict=True))
            towers[tower] = TowerChoices(
                self._layers[tower], self._num_experts, item_R, key_R, expert_RM
            )
        return towers

    def _take(self, prefix: str, tower: str) -> np.ndarray | None:
        """First choices [R, M] of the last forward, or None without experts."""
        routed = {
            name: each for name, each in routings(self._model).items() if name.startswith(prefix)
        }
        if not routed:
            return None
        self._layers[tower] = [int(name.split(".")[1]) for name in routed]
        self._num_experts = next(iter(routed.values())).probs_TE.shape[1]
        firsts = [each.topk_TK[:, 0].to(torch.int16) for each in routed.values()]
        return torch.stack(firsts, dim=1).cpu().numpy()

    def _keep(
        self, tower: str, length_B: np.ndarray, key_R: np.ndarray, expert_RM: np.ndarray
    ) -> None:
        first = self._num_items[tower]
        self._num_items[tower] += len(length_B)
        item_R = np.repeat(np.arange(first, first + len(length_B)), length_B)
        self._parts.setdefault(tower, []).append((item_R, key_R, expert_RM))


def information(
    choices: TowerChoices, item_P: np.ndarray, labels_P: Mapping[str, np.ndarray], key_name: str
) -> dict[str, list[dict[str, float]]]:
    """What the choices of a tower say of labels, and of the tokens themselves, layer by layer.

    Args:
        choices: of one tower.
        item_P: items that have a label; an item may have several, as a caption of several images.
        labels_P: class numbers of each by name; -1 where there is none.
        key_name: what to call the keys of the tokens.
    Returns:
        For each label and for the keys, one entry per layer: `bits` of mutual information, their `share` of the entropy of
        the choice, and the share for labels in random order (`shuffled`).
    """
    rng = np.random.default_rng(0)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in [*labels_P, key_name]}
    shuffled_R = choices.key_R[rng.permutation(len(choices.key_R))]
    for expert_R in choices.expert_RM.T:
        count_IE = _table(choices.item_R, expert_R, choices.num_experts)
        for name, class_P in labels_P.items():
            has = class_P >= 0
            items, classes = item_P[has], class_P[has]
            true_CE, dealt_CE = (
                _by_class(count_IE, items, of) for of in (classes, rng.permutation(classes))
            )
            found[name].append(_entry(true_CE, dealt_CE))
        key_KE, dealt_KE = (
            _table(key_R, expert_R, choices.num_experts) for key_R in (choices.key_R, shuffled_R)
        )
        found[key_name].append(_entry(key_KE, dealt_KE))
    return found


def mutual_information(count_KE: np.ndarray) -> tuple[float, float]:
    """Bits that the row of a count says of its column, and entropy of the column in bits."""
    p_KE = count_KE / max(count_KE.sum(), 1)
    p_K1, p_1E = p_KE.sum(1, keepdims=True), p_KE.sum(0, keepdims=True)
    some = p_KE > 0
    bits = float((p_KE[some] * np.log2(p_KE[some] / (p_K1 * p_1E)[some])).sum())
    p_E = p_1E[p_1E > 0]
    return max(0.0, bits), float(-(p_E * np.log2(p_E)).sum())


def examples(
    towers: Mapping[str, TowerChoices],
    images: Sequence[int],
    texts: Sequence[int],
    grid: Sequence[int],
    pieces: Sequence[str],
) -> dict[str, Any]:
    """Maps of a few images and of a few captions, and the choices of the most frequent tokens, for the report.

    Args:
        towers: what was recorded.
        images: which images.
        texts: which texts.
        grid: rows and columns of patches.
        pieces: text of each token id.
    """
    shown: dict[str, Any] = {"image": [], "text": []}
    for row in images if "image" in towers else []:
        _, expert_RM = towers["image"].of_item(row)
        shown["image"].append({"row": int(row), "experts": expert_RM.T.tolist()})
    shown["frequent"] = _frequent_words(towers["text"], pieces) if "text" in towers else []
    for text in texts if "text" in towers else []:
        ids_R, expert_RM = towers["text"].of_item(text)
        words = [pieces[number] for number in ids_R]
        shown["text"].append({"words": words, "experts": expert_RM.T.tolist()})
    about = {
        tower: {"layers": of.layers, "num_experts": of.num_experts} for tower, of in towers.items()
    }
    return {"towers": about, "grid": list(map(int, grid)), **shown}


def _frequent_words(choices: TowerChoices, pieces: Sequence[str]) -> list[dict[str, Any]]:
    """How the most frequent tokens divide their choices between experts, layer by layer."""
    count_MKE = np.stack(
        [_table(choices.key_R, expert_R, choices.num_experts) for expert_R in choices.expert_RM.T]
    )
    count_K = count_MKE[0].sum(1)
    found = np.argsort(-count_K, kind="stable")[: min(NUM_WORDS, np.count_nonzero(count_K))]
    return [
        {
            "word": pieces[key],
            "count": int(count_K[key]),
            "shares": (count_MKE[:, key] / count_K[key]).round(4).tolist(),
        }
        for key in found
    ]


def _table(key_R: np.ndarray, expert_R: np.ndarray, num_experts: int) -> np.ndarray:
    """How often each key goes with each expert."""
    flat_R = key_R.astype(np.int64) * num_experts + expert_R
    size = (int(key_R.max(initial=-1)) + 1) * num_experts
    return np.bincount(flat_R, minlength=size).reshape(-1, num_experts)


def _by_class(count_IE: np.ndarray, item_P: np.ndarray, class_P: np.ndarray) -> np.ndarray:
    """How often each class goes with each expert, an item's tokens counting for each of its classes."""
    count_CE = np.zeros((int(class_P.max(initial=-1)) + 1, count_IE.shape[1]))
    is_seen_P = item_P < len(count_IE)  # the last texts may have no token of their own
    np.add.at(count_CE, class_P[is_seen_P], count_IE[item_P[is_seen_P]])
    return count_CE


def _entry(count_KE: np.ndarray, dealt_KE: np.ndarray) -> dict[str, float]:
    (bits, entropy), (chance, of_chance) = map(mutual_information, (count_KE, dealt_KE))
    share = bits / entropy if entropy else 0.0
    shuffled = chance / of_chance if of_chance else 0.0
    return {"bits": round(bits, 6), "share": round(share, 6), "shuffled": round(shuffled, 6)}
