"""A change of settings on the command line of a script."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clipgraft.arguments import with_change
from clipgraft.config import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e5", 1e5),
        ("true", True),
        ("null", None),
        ("bf16", "bf16"),
        ("[0.5, 1]", [0.5, 1]),
        ("{kind: gcl}", {"kind": "gcl"}),
    ],
)
def test_a_value_is_read_as_one_of_a_config(text: str, value: Any):
    assert with_change({"optim": {"lr": 1.0}, "name": "x"}, "lr", text)["optim"] == {"lr": value}


def test_what_a_rule_hands_over_arrives_whole():
    """As `watch` in rules/common.smk: JSON writes an emoji as two halves, which YAML does not join."""
    watch = {"task": "renders", "zero_shot": [{"templates": ["a \N{GRINNING FACE} of {c}"]}]}
    assert with_change({"watch": None}, "watch", json.dumps(watch)) == {"watch": watch}


def test_a_value_that_cannot_be_read_is_one_message():
    with pytest.raises(ConfigError, match=r"--set lr=\[1,: the value is not YAML"):
        with_change({"lr": 1.0}, "lr", "[1,")
