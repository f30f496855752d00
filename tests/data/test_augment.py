"""Laws of augmentation. Oracle: torchvision's functions, picture by picture, with the same factors."""

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from clipgraft.data.augment import NUM_UNIFORM, augment, augments
from clipgraft.recipes import TrainSettings

B = 16


def settings(**changes):
    return TrainSettings(samples_seen=8, batch_size=2, optim={"lr": 1e-3}, **changes)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def pictures(seed=0):
    """Noise, with greys, black, white and pure colours among the pixels, where hue has its corners."""
    images = torch.randint(
        0, 256, (B, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    corners = torch.cartesian_prod(*[torch.tensor([0, 128, 255])] * 3).T.to(torch.uint8)
    images[:, :, 0, :] = corners[:, :10]
    images[:, :, 1, :] = corners[:, 10:20]
    images[:, :, 2, :7] = corners[:, 20:]
    return images


def numbers(seed=1):
    return torch.rand((B, NUM_UNIFORM), generator=torch.Generator().manual_seed(seed))


def theirs(image, u, given):
    """One picture as torchvision does it, in 0..1; `u` as the columns are documented."""
    flip, jitter, *amounts, gray = u.tolist()
    ranges = given.color_jitter
    factors = [
        max(0, 1 - r) + x * (1 + r - max(0, 1 - r))
        for x, r in zip(amounts[:3], ranges[:3], strict=True)
    ]
    image = image.float() / 255
    if flip < given.flip_prob:
        image = tv.horizontal_flip(image)
    if jitter < given.color_jitter_prob:
        image = tv.adjust_brightness(image, factors[0])
        image = tv.adjust_contrast(image, factors[1])
        image = tv.adjust_saturation(image, factors[2])
        image = tv.adjust_hue(image, (2 * amounts[3] - 1) * ranges[3])
    if gray < given.gray_scale_prob:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    return image


@pytest.mark.parametrize(
    "given",
    [
        {"flip_prob": 0.5},
        {"gray_scale_prob": 0.5},
        {"color_jitter": (0.4, 0, 0, 0)},
        {"color_jitter": (0, 0.4, 0, 0)},
        {"color_jitter": (0, 0, 1.7, 0)},
        {"color_jitter": (0, 0, 0, 0.5)},
        {
            "flip_prob": 0.5,
            "color_jitter": (0.32, 0.32, 0.32, 0.08),
            "color_jitter_prob": 0.8,
            "gray_scale_prob": 0.2,
        },
    ],
    ids=str,
)
def test_each_picture_is_what_torchvision_makes_of_it(given, device):
    given, images, uniform = settings(**given), pictures(), numbers()
    ours = augment(images.to(device), uniform.to(device), given)
    assert ours.dtype == torch.float32 and ours.device.type == device
    expected = torch.stack(
        [theirs(image, u, given) for image, u in zip(images, uniform, strict=True)]
    )
    # Half of a step of 256 is 0.002; rounding at the corners of hue is far below.
    torch.testing.assert_close(ours.cpu() / 255, expected, rtol=0, atol=1e-4)
    assert not torch.equal(ours.cpu(), images.float())


def test_probabilities_are_shares_of_the_pictures():
    images, uniform = torch.zeros((4000, 3, 2, 2), dtype=torch.uint8), torch.rand(4000, NUM_UNIFORM)
    images[:, 0, :, 0] = 200
    mirrored = augment(images, uniform, settings(flip_prob=0.3))[:, 0, 0, 1] == 200
    assert mirrored.float().mean() == pytest.approx(0.3, abs=0.04)
    gray = augment(images, uniform, settings(gray_scale_prob=0.1))[:, 2, 0, 0] > 0
    assert gray.float().mean() == pytest.approx(0.1, abs=0.03)
    jittered = augment(
        images, uniform, settings(color_jitter=(0.9, 0, 0, 0), color_jitter_prob=0.6)
    )
    changed = jittered[:, 0, 0, 0] != 200
    assert changed.float().mean() == pytest.approx(0.6, abs=0.04)


def test_a_picture_does_not_depend_on_the_others_of_its_batch():
    given = settings(color_jitter=(0.4, 0.4, 0.4, 0.1), flip_prob=0.5, gray_scale_prob=0.2)
    images, uniform = pictures(), numbers()
    whole = augment(images, uniform, given)
    for i in range(B):
        alone = augment(images[i : i + 1], uniform[i : i + 1], given)
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "given", [{}, {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0}], ids=str
)
def test_off_leaves_the_bytes_themselves(given):
    images = pictures()
    assert not augments(settings(**given))
    assert augment(images, None, settings(**given)) is images
