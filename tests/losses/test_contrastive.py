import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipgraft.losses.contrastive import (
    contrastive_loss,
    guessing,
    infonce,
    log_odds,
    softmax_bias,
)
from clipgraft.losses.pairs import Pairs


def features(num: int = 6, dim: int = 8, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, num, dim, generator=generator, dtype=torch.float64).unbind()
    return (
        F.normalize(image, dim=1).to(dtype).requires_grad_(),
        F.normalize(text, dim=1).to(dtype).requires_grad_(),
    )


def double_loop(image, text, scale, groups, smoothing: float) -> float:
    """The definition: one row and one column at a time, in Python floats."""
    total, num_counted = 0.0, 0
    for rows, columns in ((image, text), (text, image)):
        for i, row in enumerate(rows):
            allowed = [j for j in range(len(columns)) if groups[j] == groups[i]]
            if len(allowed) == 1:
                continue
            logits = {j: scale * float(row @ columns[j]) for j in allowed}
            log_sum = math.log(sum(math.exp(value) for value in logits.values()))
            spread = sum(log_sum - logits[j] for j in allowed) / len(allowed)
            total += (1 - smoothing) * (log_sum - logits[i]) + smoothing * spread
            num_counted += 1
    return total / max(1, num_counted)


def contrastive(image, text, scale, label_smoothing=0.0, group_G=None, num_ranks=1, tile=None):
    """Mean over processes, which are slices of the batch here."""
    num_rows = len(image) // num_ranks
    rows = [slice(first, first + num_rows) for first in range(0, len(image), num_rows)]
    whole = (None, None) if num_ranks == 1 else (image, text)
    ranks = [Pairs.of(image[r], text[r], *whole, r.start, group_G, tile) for r in rows]
    odds = [log_odds(pairs, scale) for pairs in ranks]
    bias = torch.cat(
        [softmax_bias(pairs, scale, odd) for pairs, odd in zip(ranks, odds, strict=True)]
    )
    losses = [
        contrastive_loss(image[r], text[r], scale, pairs, odd, bias, label_smoothing)
        for r, pairs, odd in zip(rows, ranks, odds, strict=True)
    ]
    return torch.stack(losses).mean()


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def test_equals_open_clips_loss_and_gradients():
    image, text = features()
    scale = torch.tensor(14.3, requires_grad=True)
    ours = contrastive(image, text, scale)
    theirs = open_clip.ClipLoss()(image, text, scale)
    assert torch.allclose(ours, theirs)
    pairs = zip(
        gradients(ours, image, text, scale), gradients(theirs, image, text, scale), strict=True
    )
    for our, their in pairs:
        assert torch.allclose(our, their, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "groups", [[0] * 6, [0, 0, 1, 1, 1, 0], [0, 1, 1, 2, 2, 2], [3, 3, 4, 5, 6, 7]]
)
def test_equals_the_definition(groups, smoothing):
    image, text = features()
    expected = double_loop(image.detach().double(), text.detach().double(), 20.0, groups, smoothing)
    scale = torch.tensor(20.0)
    masked = contrastive(
        image, text, scale, label_smoothing=smoothing, group_G=torch.tensor(groups)
    )
    assert masked.item() == pytest.approx(expected, rel=1e-5)
    if len(set(groups)) == 1:
        plain = contrastive(image, text, scale, label_smoothing=smoothing)
        assert plain.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1, 1, 2, 0, 1]])
def test_mean_over_ranks_is_the_loss_of_the_global_batch(groups, num_ranks):
    image, text = features(8)
    scale = torch.tensor(10.0, requires_grad=True)
    group = None if groups is None else torch.tensor(groups)
    whole = contrastive(image, text, scale, 0.1, group)
    mean = contrastive(image, text, scale, 0.1, group, num_ranks)
    assert torch.allclose(mean, whole)
    for part, full in zip(
        gradients(mean, image, text, scale), gradients(whole, image, text, scale), strict=True
    ):
        assert torch.allclose(part, full, atol=1e-6)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "groups", [[0] * 8, [0, 0, 1, 1, 1, 2, 0, 1], [*range(8)], [5, 5, 0, 1, 2, 3, 4, 6]]
)
def test_what_is_judged_is_the_loss_without_smoothing_and_the_log_of_the_candidates(
    groups, num_ranks
):
    image, text = features(8)
    group_G = None if len(set(groups)) == 1 else torch.tensor(groups)
    scale, num_rows = torch.tensor(9.0), 8 // num_ranks
    ranks = [
        Pairs.of(image[r], text[r], image, text, r.start, group_G)
        for r in (slice(first, first + num_rows) for first in range(0, 8, num_rows))
    ]
    losses = torch.stack([infonce(pairs, log_odds(pairs, scale)) for pairs in ranks])
    bounds = torch.stack([guessing(pairs) for pairs in ranks])
    expected = double_loop(image.detach().double(), text.detach().double(), 9.0, groups, 0.0)
    assert losses.mean().item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    sizes = [n for n in map(groups.count, groups) if n > 1]
    bound = sum(map(math.log, sizes)) / max(1, len(sizes))
    assert bounds.tolist() == pytest.approx([bound] * num_ranks, rel=1e-6)
    blind = torch.ones_like(image) / 8**0.5
    pairs = Pairs.of(blind, blind, group_G=group_G)
    assert infonce(pairs, log_odds(pairs, scale)).item() == pytest.approx(bound, abs=1e-6)
    assert not losses.requires_grad


def test_pairs_of_other_groups_have_no_influence():
    image, text = features()
    group = torch.tensor([0, 0, 0, 1, 1, 2])
    loss = contrastive(image, text, torch.tensor(5.0), label_smoothing=0.1, group_G=group)
    d_image, d_text = gradients(loss, image, text)
    assert (d_image[5] == 0).all() and (d_text[5] == 0).all()  # alone: does not count
    alone = contrastive(
        image[:5], text[:5], torch.tensor(5.0), label_smoothing=0.1, group_G=group[:5]
    )
    assert torch.allclose(loss, alone)


def test_a_batch_of_single_pairs_has_loss_zero_and_finite_gradients():
    image, text = features(4)
    loss = contrastive(image, text, torch.tensor(100.0), group_G=torch.arange(4))
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, image, text))


def test_float32_inside_autocast():
    image, text = features(32)
    scale = torch.tensor(100.0)
    outside = contrastive(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive(image, text, scale)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_chance_is_log_of_the_batch():
    same = F.normalize(torch.ones(5, 8), dim=1)
    assert contrastive(same, same, torch.tensor(14.0)).item() == pytest.approx(math.log(5))
