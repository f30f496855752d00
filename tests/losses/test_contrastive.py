import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipgraft.losses.contrastive import contrastive_loss


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


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def test_equals_open_clips_loss_and_gradients():
    image, text = features()
    scale = torch.tensor(14.3, requires_grad=True)
    ours = contrastive_loss(image, text, scale)
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
    masked = contrastive_loss(
        image, text, scale, label_smoothing=smoothing, group_G=torch.tensor(groups)
    )
    assert masked.item() == pytest.approx(expected, rel=1e-5)
    if len(set(groups)) == 1:
        plain = contrastive_loss(image, text, scale, label_smoothing=smoothing)
        assert plain.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1, 1, 2, 0, 1]])
def test_mean_over_ranks_is_the_loss_of_the_global_batch(groups):
    image, text = features(8)
    scale = torch.tensor(10.0, requires_grad=True)
    group = None if groups is None else torch.tensor(groups)
    whole = contrastive_loss(image, text, scale, label_smoothing=0.1, group_G=group)
    ranks = [
        contrastive_loss(
            image[first : first + 2],
            text[first : first + 2],
            scale,
            image,
            text,
            first_row=first,
            label_smoothing=0.1,
            group_G=group,
        )
        for first in (0, 2, 4, 6)
    ]
    mean = torch.stack(ranks).mean()
    assert torch.allclose(mean, whole)
    for part, full in zip(
        gradients(mean, image, text, scale), gradients(whole, image, text, scale), strict=True
    ):
        assert torch.allclose(part, full, atol=1e-6)


def test_pairs_of_other_groups_have_no_influence():
    image, text = features()
    group = torch.tensor([0, 0, 0, 1, 1, 2])
    loss = contrastive_loss(image, text, torch.tensor(5.0), label_smoothing=0.1, group_G=group)
    d_image, d_text = gradients(loss, image, text)
    assert (d_image[5] == 0).all() and (d_text[5] == 0).all()  # alone: does not count
    alone = contrastive_loss(
        image[:5], text[:5], torch.tensor(5.0), label_smoothing=0.1, group_G=group[:5]
    )
    assert torch.allclose(loss, alone)


def test_a_batch_of_single_pairs_has_loss_zero_and_finite_gradients():
    image, text = features(4)
    loss = contrastive_loss(image, text, torch.tensor(100.0), group_G=torch.arange(4))
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, image, text))


def test_float32_inside_autocast():
    image, text = features(32)
    scale = torch.tensor(100.0)
    outside = contrastive_loss(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(image, text, scale)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_chance_is_log_of_the_batch():
    same = F.normalize(torch.ones(5, 8), dim=1)
    assert contrastive_loss(same, same, torch.tensor(14.0)).item() == pytest.approx(math.log(5))
