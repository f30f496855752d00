"""Laws of reading a run."""

import json
import shutil

import pytest

from clipgraft.report.costs import Cost, cost_of
from clipgraft.report.read import Run


def test_models_stand_in_pipeline_order_whatever_the_order_of_inputs(tree):
    expected = ["untrained", "short", "base", "expert_1", "expert_2", "expert_3"]
    expected += ["mlp", "full", "copies", "two_experts", "soup", "ensemble", "short_mlp"]
    expected += ["upcycled", "moe"]
    turned_round = dict(reversed(list(tree.items())))
    for inputs in (tree, turned_round):
        assert [model.key for model in Run.open(inputs).models()] == expected


def test_every_model_has_a_colour_of_its_own(tree):
    models = Run.open(tree).models()
    assert len({model.colour for model in models}) == len(models)
    baselines = [model.marker for model in models if model.marker not in "os^D"]
    assert len(set(baselines)) == len(baselines) == 8  # with the untrained one


def test_a_model_pays_once_for_all_it_was_made_from(tree):
    models = {model.key: model for model in Run.open(tree).models()}
    seen = {key: model.cost.samples_seen for key, model in models.items()}
    # Phases of 40k and 12k, experts and the short baseline of 6k each, routers 4k: see trees.settings.
    assert seen["short"] == 40_000
    assert seen["base"] == 52_000
    assert seen["short_mlp"] == seen["expert_1"] == 58_000
    assert seen["expert_3"] == 70_000  # its labels come from experts 1 and 2
    assert seen["moe"] == 52_000 + 3 * 6_000 + 4_000
    assert seen["soup"] == seen["ensemble"] == seen["upcycled"] == 52_000 + 3 * 6_000
    # Seconds: 2 phases of 120, then per round 6 + 3 + 60, assemble 1.5, routers 4.
    assert models["moe"].cost.minutes == pytest.approx((240 + 3 * 69 + 1.5 + 4) / 60)


def test_trained_baselines_see_as_many_samples_after_the_base_as_the_mixture(tree):
    after = {model.key: model.cost.samples_after for model in Run.open(tree).models()}
    for key in ("mlp", "full", "copies", "two_experts", "moe"):
        assert after[key] == 3 * 6_000 + 4_000
    assert after["short"] == after["base"] == 0


def test_flops_are_added_up_over_the_jobs_after_the_base(tree):
    """By hand, in units of a forward pass of the dense model, of which MLPs are so large a part."""
    spent = {model.key: model.cost for model in Run.open(tree).models()}
    image, text = tower(17), tower(18)
    stem, head = 3 * 16**2 * 32 * 16, 32 * 16
    dense = 2 * (3 * (sum(image) + sum(text)) + stem + 2 * head)
    top_2 = dense + 2 * 3 * (image[2] + text[2] + 32 * 4 * (17 + 18))
    assert {key: cost.flops_per_pair for key, cost in spent.items()} == {
        **dict.fromkeys(spent, dense),
        **dict.fromkeys(("upcycled", "moe", "copies"), top_2),
        "two_experts": top_2 - 2 * 3 * 32 * 2 * (17 + 18),  # a narrower router
        "ensemble": 4 * dense,
    }
    # Behind the first MLP, attention costs its forward pass again, its products twice; MLPs cost two more.
    mlps = (
        dense
        + 2
        * sum(
            2 * linear + 2 * 2 * products + 3 * 2 * mlp - mlp // 2
            for linear, products, mlp in (image, text)
        )
        + 2 * 2 * head
    )
    assert spent["short_mlp"].flops_after == 6_000 * mlps
    embedding = 240 * dense + 240 * (2 * 3 * sum(text) + 2 * head)  # 240 samples of two captions
    for k in (1, 2, 3):
        assert spent[f"expert_{k}"].flops_after == k * (embedding + 6_000 * mlps)
    assert (
        spent["soup"].flops_after == spent["ensemble"].flops_after == 3 * (embedding + 6_000 * mlps)
    )
    whole = 3 * dense - 2 * stem
    assert spent["full"].flops_after == 22_000 * whole
    assert spent["base"].flops_after == 0
    assert spent["untrained"] == Cost(0, 0.0, 0, 0.0, dense)


def tower(length: int, width: int = 32) -> tuple[int, int, int]:
    """Multiply-accumulates of a block: of attention's weights, its two products, and of the MLP."""
    return 4 * width**2 * length, 2 * width * length**2, 8 * width**2 * length


def test_an_architecture_that_is_not_counted_has_no_flops_and_is_shown_all_the_same(tree, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tree["pretrain/full"], folder)
    about = json.loads((folder / "model.json").read_text())
    about["config"]["vision_cfg"]["attentional_pool"] = True
    (folder / "model.json").write_text(json.dumps(about))
    manifest = json.loads((folder / "manifest.json").read_text())
    for of in manifest["inputs"].values():
        of["manifest"] = str((tree["pretrain/full"] / of["manifest"]).resolve())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert cost_of([folder], [folder]) == Cost(52_000, 4.0, 0, 0, None)


def test_a_job_that_has_two_names_costs_once(tree):
    run = Run.open({**tree, "pretrain/again": tree["pretrain/short"]})
    assert run.seconds == Run.open(tree).seconds
