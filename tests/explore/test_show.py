"""Laws of answers as HTML, which a browser's parser reads back."""

from html.parser import HTMLParser

import numpy as np
import pytest

from clipgraft.evaluation.choices import TowerChoices
from clipgraft.explore.show import show_captions, show_classes, show_patches, show_words

EVIL = "<script>alert('x')</script> & \"co\""


class Elements(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def chosen(layers, num_experts, expert_RM):
    """Choices of the tokens of one item; counts are not shown."""
    count = np.zeros((1, len(layers), num_experts), int)
    return TowerChoices(layers, count, count, {0: (np.arange(len(expert_RM)), expert_RM)})


@pytest.mark.parametrize(
    "html",
    [
        show_captions([(EVIL, 0.5)]),
        show_classes({EVIL: [(EVIL, 0.5)]}),
        show_words(
            [EVIL],
            chosen([0], 2, np.ones((1, 1), int)),
            EVIL,
        ),
        show_words([], None, EVIL),
    ],
)
def test_texts_stay_texts(html):
    elements = Elements(html)
    assert not elements.all("script")
    assert EVIL in "".join(elements.text)


def test_every_patch_of_every_layer_has_its_expert_in_its_place():
    expert_PM = np.array([[0, 2], [1, 2], [2, 0], [0, 1], [1, 1], [2, 2]])
    choices = chosen([3, 7], 3, expert_PM)
    elements = Elements(show_patches(np.zeros((8, 8, 3), np.uint8), (2, 3), choices, "moe"))
    tints = elements.all("rect")
    assert len(tints) == 12 and len(elements.all("svg")) == 3
    assert [(int(t["x"]), int(t["y"])) for t in tints[:6]] == [(p % 3, p // 3) for p in range(6)]
    colour_of = {}
    for tint, expert in zip(tints, expert_PM.T.ravel().tolist(), strict=True):
        assert colour_of.setdefault(expert, tint["fill"]) == tint["fill"]
    assert len(set(colour_of.values())) == 3
    assert [text for text in elements.text if text.startswith("layer")] == ["layer 3", "layer 7"]


def test_words_stand_over_their_experts():
    expert_RM = np.array([[0, 1], [2, 2]])
    choices = chosen([0, 5], 3, expert_RM)
    elements = Elements(show_words(["red", "star"], choices, "moe"))
    cells = [text for text in elements.text if text in ("red", "star", "0", "1", "2")]
    assert cells == ["red", "star", "0", "2", "1", "2"]


def test_classes_are_cut_and_the_bars_are_as_long_as_the_shares():
    elements = Elements(show_classes({"colour": [(f"c{n}", 0.5 / 2**n) for n in range(9)]}))
    widths = [each["style"] for each in elements.all("i")]
    assert widths[:2] == ["width:50.0%", "width:25.0%"] and len(widths) == 5
    assert "50.0 %" in elements.text and "c5" not in elements.text
