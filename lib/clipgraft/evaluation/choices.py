"""Which expert tokens choose: recorded while a mixture of experts is evaluated, and what the choice has to do with labels.

A token's choice is its first expert. Images count by their patches, captions by their own tokens: class, start and end
tokens are not part of either. How much a choice says of an attribute is their mutual information, as a share of the
entropy of the choice: 0 if the choice knows nothing of the attribute, 1 if it follows from it. The tokens of one picture
are not independent, so even labels dealt out at random get a small share; it stands beside (`shuffled`).
"""

# Shapes: B batch, L sequence, R tokens, I items (images or texts), S images shown, M layers, E experts, P pairs or patches,
# K keys, C classes

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
    """First choices of the tokens of one tower, counted.

    Attributes:
        layers: numbers of the blocks with experts.
        count_IME: tokens of each image or text, by layer and expert.
        count_KME: tokens of each key, what a token is: its place among the patches, or its id.
        shown: keys [R] and choices [R, M] of all tokens, in order, of the few items that are shown.
    """

    layers: list[int]
    count_IME: np.ndarray
    count_KME: np.ndarray
    shown: dict[int, tuple[np.ndarray, np.ndarray]]

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.count_KME.shape[2])


class Recorder:
    """Reads the routing of a model after each batch, and counts: all tokens of a large data set are too many to keep."""

    def __init__(
        self,
        model: nn.Module,
        special_ids: Sequence[int | None],
        num_items: Mapping[str, int],
        shown: Mapping[str, Sequence[int]],
    ) -> None:
        """Begin with nothing recorded.

        Args:
            model: whose routing is read.
            special_ids: of the start token and, if there is one, of the end token.
            num_items: how many there are of `image` and of `text`.
            shown: of which of them every choice is kept.
        """
        self._model = model
        self._special_ids = [number for number in special_ids if number is not None]
        self._num_items = num_items
        self._shown = shown
        self._num_seen = {"image": 0, "text": 0}
        self._layers: dict[str, list[int]] = {}
        self._num_experts = 0
        self._towers: dict[str, TowerChoices] = {}

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
            expert_RM = patches_BLM.reshape(len(key_R), -1)
            self._count("image", length_B, key_R, expert_RM, num_patches, num_patches)

    def of_images(self) -> dict[str, np.ndarray]:
        """What was recorded of images, as arrays; none without experts."""
        if "image" not in self._towers:
            return {}
        found = self._towers["image"]
        shown_SPM = np.stack([found.shown[item][1] for item in self._shown["image"]])
        counts = {"count_IME": found.count_IME, "count_KME": found.count_KME}
        return {**counts, "shown_SPM": shown_SPM, "layers": np.array(found.layers)}

    def see_again(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `of_images` gave before, of the same images shown."""
        if "layers" in arrays:
            key_P = np.arange(len(arrays["count_KME"]))
            items = zip(self._shown["image"], arrays["shown_SPM"], strict=True)
            shown = {item: (key_P, expert_PM) for item, expert_PM in items}
            counts = (arrays["count_IME"], arrays["count_KME"])
            self._towers["image"] = TowerChoices(arrays["layers"].tolist(), *counts, shown)

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
        tokens = (own_BL.sum(1), ids_BL[own_BL], taken[own_BL[real_BL]])
        sizes = (self._model.vocab_size, self._model.context_length)
        self._count("text", *tokens, *map(int, sizes))  # type: ignore[arg-type]

    def towers(self) -> dict[str, TowerChoices]:
        """All that was recorded, of towers with experts."""
        return self._towers

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

    def _count(
        self,
        tower: str,
        length_B: np.ndarray,
        key_R: np.ndarray,
        expert_RM: np.ndarray,
        num_keys: int,
        longest: int,
    ) -> None:
        """Add the tokens of the next items, of at most `longest` each, end to end."""
        num_layers, num_experts = expert_RM.shape[1], self._num_experts
        if tower not in self._towers:
            small = np.min_scalar_type(longest)  # there may be millions of items
            count_IME = np.zeros((self._num_items[tower], num_layers, num_experts), small)
            count_KME = np.zeros((num_keys, num_layers, num_experts), np.int64)
            self._towers[tower] = TowerChoices(self._layers[tower], count_IME, count_KME, {})
        found, num = self._towers[tower], len(length_B)
        first = self._num_seen[tower]
        self._num_seen[tower] += num
        item_R = np.repeat(np.arange(num), length_B)
        cell_RM = np.arange(num_layers) * num_experts + expert_RM
        cells = num_layers * num_experts
        flat_RM = item_R[:, None] * cells + cell_RM
        count_B = np.bincount(flat_RM.reshape(-1), minlength=num * cells)
        found.count_IME[first : first + num] = count_B.reshape(num, num_layers, num_experts)
        np.add.at(found.count_KME.reshape(-1), (key_R[:, None] * cells + cell_RM).reshape(-1), 1)
        for item in self._shown[tower]:
            if first <= item < first + num:
                own = slice(*np.searchsorted(item_R, [item - first, item - first + 1]))
                found.shown[item] = (key_R[own].copy(), expert_RM[own].copy())


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
        the choice, and the share for labels in random order (`shuffled`), drawn anew for each layer.
    """
    rng = np.random.default_rng(0)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in [*labels_P, key_name]}
    for layer in range(len(choices.layers)):
        count_IE, count_KE = choices.count_IME[:, layer], choices.count_KME[:, layer]
        for name, class_P in labels_P.items():
            has = class_P >= 0
            items, classes = item_P[has], class_P[has]
            true_CE, dealt_CE = (
                _by_class(count_IE, items, of) for of in (classes, rng.permutation(classes))
            )
            found[name].append(_entry(true_CE, dealt_CE))
        found[key_name].append(_entry(count_KE, _dealt(count_KE, rng)))
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
        images: which images, of those whose choices were kept.
        texts: which texts, likewise.
        grid: rows and columns of patches.
        pieces: text of each token id.
    """
    shown: dict[str, Any] = {"image": [], "text": []}
    for row in images if "image" in towers else []:
        _, expert_RM = towers["image"].shown[row]
        shown["image"].append({"row": int(row), "experts": expert_RM.T.tolist()})
    shown["frequent"] = _frequent_words(towers["text"], pieces) if "text" in towers else []
    for text in texts if "text" in towers else []:
        ids_R, expert_RM = towers["text"].shown[text]
        words = [pieces[number] for number in ids_R]
        shown["text"].append({"words": words, "experts": expert_RM.T.tolist()})
    about = {
        tower: {"layers": of.layers, "num_experts": of.num_experts} for tower, of in towers.items()
    }
    return {"towers": about, "grid": list(map(int, grid)), **shown}


def _frequent_words(choices: TowerChoices, pieces: Sequence[str]) -> list[dict[str, Any]]:
    """How the most frequent tokens divide their choices between experts, layer by layer."""
    count_K = choices.count_KME[:, 0].sum(1)
    found = np.argsort(-count_K, kind="stable")[: min(NUM_WORDS, np.count_nonzero(count_K))]
    return [
        {
            "word": pieces[key],
            "count": int(count_K[key]),
            "shares": (choices.count_KME[key] / count_K[key]).round(4).tolist(),
        }
        for key in found
    ]


def _by_class(count_IE: np.ndarray, item_P: np.ndarray, class_P: np.ndarray) -> np.ndarray:
    """How often each class goes with each expert, an item's tokens counting for each of its classes."""
    num_classes = int(class_P.max(initial=-1)) + 1
    return np.stack(
        [np.bincount(class_P, count_I[item_P], num_classes) for count_I in count_IE.T], axis=1
    )


def _dealt(count_KE: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The count of keys in random order, without the order: each expert in turn draws its number of those left."""
    left_K, dealt_KE = count_KE.sum(1), np.zeros_like(count_KE)
    for expert, num in enumerate(count_KE.sum(0)):
        if left_K.sum() < 10**9:
            dealt_KE[:, expert] = rng.multivariate_hypergeometric(left_K, num, method="marginals")
        else:  # numpy draws from no more; whether keys are put back makes no difference there
            dealt_KE[:, expert] = rng.multinomial(num, left_K / left_K.sum())
        left_K = np.maximum(0, left_K - dealt_KE[:, expert])
    return dealt_KE


def _entry(count_KE: np.ndarray, dealt_KE: np.ndarray) -> dict[str, float]:
    (bits, entropy), (chance, of_chance) = map(mutual_information, (count_KE, dealt_KE))
    share = bits / entropy if entropy else 0.0
    shuffled = chance / of_chance if of_chance else 0.0
    return {"bits": round(bits, 6), "share": round(share, 6), "shuffled": round(shuffled, 6)}
