"""Laws of the built-in data set."""

import hashlib
import itertools
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from clipgraft.data.drawing import draw_picture
from clipgraft.data.shapes import (
    ATTRIBUTES,
    DEFAULT_MENTION,
    SPLITS,
    combinations_of,
    draw_sample,
    zero_shot_templates,
)

EVERYTHING = dict.fromkeys(ATTRIBUTES, 1.0)
# What a reader takes each word for; written by hand, so that it can disagree with the generator.
MEANING = {
    "colour": {
        "red": "red crimson scarlet",
        "orange": "orange tangerine",
        "yellow": "yellow golden",
        "green": "green emerald",
        "teal": "teal turquoise",
        "blue": "blue azure",
        "purple": "purple violet",
        "pink": "pink magenta",
    },
    "shape": {
        "circle": "circle disc",
        "square": "square box",
        "triangle": "triangle",
        "pentagon": "pentagon",
        "star": "star",
        "heart": "heart",
        "cross": "cross plus",
        "crescent": "crescent moon",
    },
    "texture": {
        "plain": "plain solid without",
        "striped": "striped lined stripes",
        "dotted": "dotted spotted dots",
        "checkered": "checkered checked checks",
        "zigzag": "zigzag chevron chevrons",
        "tiled": "tiled grid tiles",
    },
    "size": {"small": "small little tiny", "large": "large big huge"},
    "position": {
        "left": "left",
        "right": "right",
        "top": "top",
        "bottom": "bottom",
        "centre": "centre middle",
    },
    "background": {"cream": "cream", "grey": "grey gray", "sky": "sky", "mint": "mint"},
}


def understand(caption: str) -> dict[str, set[str]]:
    """The values of each attribute that a reader finds in a caption."""
    words = set(caption.split())
    return {
        attribute: {value for value, said in values.items() if words & set(said.split())}
        for attribute, values in MEANING.items()
    }


def combination(attributes: dict[str, str]) -> tuple[str, str, str]:
    return attributes["colour"], attributes["shape"], attributes["texture"]


def pixels(image: Image.Image, mode: str = "RGB") -> np.ndarray:
    return np.asarray(image.convert(mode)).astype(float)


def digest(samples: list) -> str:
    parts = [sample.image.tobytes() + repr(sample.captions).encode() for sample in samples]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_order_of_drawing_changes_nothing():
    forward = [draw_sample(3, "train", i) for i in range(6)]
    backward = [draw_sample(3, "train", i) for i in reversed(range(6))][::-1]
    assert digest(forward) == digest(backward)
    assert [s.attributes for s in forward] == [s.attributes for s in backward]


def test_another_process_draws_the_same():
    program = (
        "import hashlib; from clipgraft.data.shapes import draw_sample;"
        "s = draw_sample(3, 'renders', 41, num_captions=2);"
        "print(hashlib.sha256(s.image.tobytes() + repr(s.captions).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == digest([draw_sample(3, "renders", 41, num_captions=2)])


def test_seed_split_and_place_each_change_the_picture():
    addresses = itertools.product((0, 1), SPLITS, range(4))
    digests = [digest([draw_sample(*address)]) for address in addresses]
    assert len(set(digests)) == len(digests)


def test_image_size_changes_neither_attributes_nor_captions():
    small, large = (draw_sample(0, "train", 5, image_size=size) for size in (32, 96))
    assert (small.image.size, large.image.size) == ((32, 32), (96, 96))
    assert (small.attributes, small.captions) == (large.attributes, large.captions)
    # The same scene, too: shrunk to one size, noise averages out and the pictures agree.
    tiny = [
        pixels(sample.image.resize((16, 16), Image.Resampling.BOX)) for sample in (small, large)
    ]
    assert np.abs(tiny[0] - tiny[1]).mean() < 8


def test_what_is_said_does_not_change_what_is_drawn():
    silent = draw_sample(0, "train", 5, mention=dict.fromkeys(ATTRIBUTES, 0.0))
    talkative = draw_sample(0, "train", 5, mention=EVERYTHING, num_captions=4)
    assert silent.image.tobytes() == talkative.image.tobytes()
    assert silent.attributes == talkative.attributes


def test_more_captions_keep_the_first_ones():
    one, five = (draw_sample(0, "train", 9, num_captions=n).captions for n in (1, 5))
    assert len(five) == 5
    assert five[:1] == one


def test_noise_is_what_was_asked_for():
    quiet, noisy = (draw_sample(0, "train", 3, noise=noise) for noise in (0.0, 0.05))
    assert quiet.attributes == noisy.attributes
    difference = pixels(noisy.image) - pixels(quiet.image)
    unclipped = (pixels(quiet.image) > 51) & (pixels(quiet.image) < 204)
    assert difference[unclipped].std() / 255 == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_train_and_held_out_combinations_share_out_all_there_are(seed):
    train, held_out = (set(combinations_of(seed, split)) for split in ("train", "combinations"))
    everything = set(itertools.product(*(ATTRIBUTES[a] for a in ("colour", "shape", "texture"))))
    assert not train & held_out
    assert train | held_out == everything
    assert len(held_out) == len(everything) / 8
    assert set(combinations_of(seed, "renders")) == train


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_train_has_every_pair_of_values(seed):
    train = combinations_of(seed, "train")
    for a, b in itertools.combinations(("colour", "shape", "texture"), 2):
        first, second = (("colour", "shape", "texture").index(name) for name in (a, b))
        seen = {(c[first], c[second]) for c in train}
        assert seen == set(itertools.product(ATTRIBUTES[a], ATTRIBUTES[b]))


def test_another_seed_holds_out_other_combinations():
    assert combinations_of(0, "combinations") != combinations_of(1, "combinations")


def test_drawn_combinations_are_those_of_the_split():
    for split in SPLITS:
        allowed = set(combinations_of(0, split))
        drawn = [draw_sample(0, split, i, image_size=8) for i in range(200)]
        assert all(combination(sample.attributes) in allowed for sample in drawn)


def test_every_value_of_every_attribute_occurs_equally_often():
    drawn = [draw_sample(0, "train", i, image_size=8).attributes for i in range(1200)]
    for attribute, values in ATTRIBUTES.items():
        counts = Counter(sample[attribute] for sample in drawn)
        expected = len(drawn) / len(values)
        assert set(counts) == set(values)
        assert max(abs(counts[v] - expected) for v in values) < 5 * expected**0.5


def test_captions_say_nothing_but_the_truth():
    for i in range(300):
        sample = draw_sample(0, "train", i, image_size=8, mention=EVERYTHING, num_captions=3)
        for caption in sample.captions:
            assert understand(caption) == {a: {v} for a, v in sample.attributes.items()}, caption


def test_captions_keep_silent_when_told_to():
    for i in range(50):
        sample = draw_sample(0, "train", i, image_size=8, mention=dict.fromkeys(ATTRIBUTES, 0.0))
        assert sample.captions[0] in {"a shape", "a figure"}


def test_mention_is_a_probability():
    drawn = [
        draw_sample(0, "train", i, image_size=8, mention={"texture": 0.3, "size": 0.7})
        for i in range(1000)
    ]
    understood = [understand(sample.captions[0]) for sample in drawn]
    asked = {**DEFAULT_MENTION, "texture": 0.3, "size": 0.7}
    for attribute, probability in asked.items():
        share = np.mean([bool(values[attribute]) for values in understood])
        assert abs(share - probability) <= 5 * (probability * (1 - probability) / 1000) ** 0.5


def test_captions_are_short_plain_and_grammatical():
    for i in range(300):
        for caption in draw_sample(0, "train", i, image_size=8, num_captions=4).captions:
            words = caption.split()
            assert len(words) <= 13
            assert caption == " ".join(words)
            assert caption.replace(" ", "").isalpha() and caption.islower()
            for article, following in itertools.pairwise(words):
                if article in {"a", "an"}:
                    assert (article == "an") == (following[0] in "aeiou"), caption


def test_captions_of_different_samples_are_seldom_equal():
    captions = [draw_sample(0, "renders", i, image_size=8).captions[0] for i in range(1000)]
    assert len(set(captions)) > 950


def test_colour_in_the_picture_is_the_colour_in_the_name():
    hue = dict(red=0, orange=26, yellow=50, green=125, teal=178, blue=217, purple=272, pink=325)
    for i in range(200):
        sample = draw_sample(0, "train", i, noise=0.0)
        hsv = pixels(sample.image, "HSV")
        vivid = hsv[hsv[..., 1] * hsv[..., 2] > 0.4 * 255**2]
        angles = vivid[:, 0] * (2 * np.pi / 256)
        seen = np.degrees(np.angle(np.exp(1j * angles).mean()))
        distance = {name: abs((seen - h + 180) % 360 - 180) for name, h in hue.items()}
        assert min(distance, key=distance.get) == sample.attributes["colour"]


def test_objects_are_as_large_and_where_the_attributes_say():
    rng = np.random.default_rng(0)
    plain = {"colour": "blue", "texture": "plain", "background": "cream"}
    areas: dict[str, list[int]] = {"small": [], "large": []}
    for shape, size, position in itertools.product(
        ATTRIBUTES["shape"], ATTRIBUTES["size"], ATTRIBUTES["position"]
    ):
        said = {**plain, "shape": shape, "size": size, "position": position}
        is_object = (
            pixels(draw_picture(said, rng, image_size=64, noise=0.0), "HSV")[..., 1] > 0.4 * 255
        )
        rows, columns = np.nonzero(is_object)
        assert min(rows.min(), columns.min()) > 0 and max(rows.max(), columns.max()) < 63
        x = (columns.min() + columns.max()) / 2 - 31.5
        y = (rows.min() + rows.max()) / 2 - 31.5
        along_x, along_y = {
            "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)
        }[position]  # fmt: skip
        assert (abs(x) > abs(y)) == (along_x != 0) or position == "centre"
        assert x * along_x + y * along_y > 3 or (position == "centre" and max(abs(x), abs(y)) < 7)
        areas[size].append(int(is_object.sum()))
    assert max(areas["small"]) < min(areas["large"])


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_prompts_speak_the_language_of_the_captions(attribute):
    heard = set()
    for i in range(400):
        heard |= set(draw_sample(0, "train", i, image_size=8, num_captions=2).captions[0].split())
    for template in zero_shot_templates(attribute):
        assert template.count("{c}") == 1
        for value in ATTRIBUTES[attribute]:
            prompt = template.replace("{c}", value)
            assert set(prompt.split()) <= heard
            assert understand(prompt)[attribute] == {value}


@pytest.mark.parametrize(
    "arguments",
    [
        {"split": "test"},
        {"split": "train", "mention": {"color": 1.0}},
        {"split": "train", "mention": {"size": 1.5}},
    ],
)
def test_nonsense_is_refused_with_a_hint(arguments):
    with pytest.raises(ValueError, match="Hint:"):
        draw_sample(0, i=0, **arguments)


def test_unknown_attribute_has_no_prompts():
    with pytest.raises(ValueError, match="Hint:"):
        zero_shot_templates("weight")
