"""Laws of reading a run."""

import pytest

from clipgraft.report.read import Run


def test_models_stand_in_pipeline_order_whatever_the_order_of_inputs(tree):
    expected = ["short", "base", "expert_1", "expert_2", "expert_3", "control", "upcycled", "moe"]
    turned_round = dict(reversed(list(tree.items())))
    for inputs in (tree, turned_round):
        assert [model.key for model in Run.open(inputs).models()] == expected


def test_every_model_has_a_colour_of_its_own(tree):
    colours = [model.colour for model in Run.open(tree).models()]
    assert len(set(colours)) == len(colours)


def test_a_model_pays_once_for_all_it_was_made_from(tree):
    models = {model.key: model for model in Run.open(tree).models()}
    seen = {key: model.samples_seen for key, model in models.items()}
    # Phases of 40k and 12k, experts and control of 6k each, routers 4k: see conftest.settings.
    assert seen["short"] == 40_000
    assert seen["base"] == 52_000
    assert seen["control"] == seen["expert_1"] == 58_000
    assert seen["expert_3"] == 70_000  # its labels come from experts 1 and 2
    assert seen["moe"] == 52_000 + 3 * 6_000 + 4_000
    # Seconds: 2 phases of 120, then per round 6 + 3 + 60, assemble 1.5, routers 4.
    assert models["moe"].minutes == pytest.approx((240 + 3 * 69 + 1.5 + 4) / 60)


def test_a_job_that_has_two_names_costs_once(tree):
    run = Run.open({**tree, "pretrain/again": tree["pretrain/short"]})
    assert run.seconds == Run.open(tree).seconds
