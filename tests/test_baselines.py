"""Baselines: that they cost what experts and routers cost, what each of them is, and that all of them run."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_train import folder, make_data, phase

from clipgraft.baseline_settings import KINDS
from clipgraft.checkpoint import load_model, read_weights
from clipgraft.config import ConfigError, load_config, merge
from clipgraft.crosschecks import unequal_steps
from clipgraft.evaluation.ensemble import load_side_by_side
from clipgraft.experts import finetune_expert
from clipgraft.planning import plan_run, plan_runs
from clipgraft.pretrain import pretrain
from clipgraft.report.report import report
from clipgraft.schedule import peak_lr
from clipgraft.settings import ExpertJob, ReportJob
from clipgraft.soup import soup
from clipgraft.versions import PlannedJob

ROOT = Path(__file__).resolve().parent.parent
SMALL = yaml.safe_load((ROOT / "tests/config/small.yaml").read_text())
ALL = {**SMALL, "baselines": {kind: {} for kind in KINDS}}


def planned(*overlays: dict) -> dict[str, PlannedJob]:
    raw = copy.deepcopy(ALL)
    for overlay in overlays:
        raw = merge(raw, overlay)
    return {job.name: job for job in plan_run("small", load_config(raw)["small"])}


def made_of(job: PlannedJob) -> dict[str, PlannedJob]:
    """A job and all before it, by version."""
    found = {job.folder: job}
    for of in job.inputs.values():
        found |= made_of(of)
    return found


def samples_after_base(jobs: dict[str, PlannedJob], model: str) -> int:
    before = made_of(jobs["pretrain/full"])
    jobs_of = made_of(jobs[f"evaluate/{model}/renders"])
    after = (job for folder, job in jobs_of.items() if folder not in before)
    return sum(job.settings.get("samples_seen", 0) for job in after)


# --- what is planned ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overlay",
    [
        {},
        {"moe": {"num_experts": 4}},
        {"finetune_expert": {"samples_seen": 320}, "finetune_router": {"samples_seen": 48}},
    ],
    ids=str,
)
def test_trained_baselines_see_what_experts_and_routers_see(overlay):
    jobs = planned(overlay)
    seen = {kind: samples_after_base(jobs, kind) for kind in (*KINDS, "moe", "upcycled")}
    assert {seen[kind] for kind in ("mlp", "full", "copies", "two_experts")} == {seen["moe"]}
    assert seen["soup"] == seen["ensemble"] == seen["upcycled"] < seen["moe"]


def test_baselines_that_take_another_number_of_steps_are_named_where_batches_differ():
    def said(expert: int, router: int, *kinds: str, **more: int) -> str:
        sizes = {"finetune_expert": expert, "finetune_router": router}
        overlay = {section: {"batch_size": size} for section, size in sizes.items()}
        raw = {**SMALL, "baselines": {kind: dict(more) for kind in kinds}}
        return unequal_steps(load_config(merge(raw, overlay))["small"])

    assert said(16, 16, *KINDS) == said(8, 16, "two_experts", "soup", "ensemble") == ""
    assert said(8, 16, "mlp", samples_seen=96) == ""
    told = said(8, 16, *KINDS)
    assert "expert.batch_size = 8, finetune_router.batch_size = 16" in told
    assert ": baselines.mlp, baselines.full, baselines.copies with as many samples" in told


def steps_after_base(jobs: dict[str, PlannedJob], model: str) -> int:
    before = made_of(jobs["pretrain/full"])
    jobs_of = made_of(jobs[f"evaluate/{model}/renders"])
    after = [job.settings for folder, job in jobs_of.items() if folder not in before]
    return sum(each["samples_seen"] // each["batch_size"] for each in after if "batch_size" in each)


def test_two_experts_take_as_many_steps_as_the_mixture_whatever_the_batches():
    jobs = planned({"finetune_expert": {"batch_size": 8}, "finetune_router": {"batch_size": 16}})
    steps = {kind: steps_after_base(jobs, kind) for kind in ("mlp", "copies", "two_experts", "moe")}
    assert steps["copies"] < steps["moe"] == steps["two_experts"] < steps["mlp"]


def test_a_baseline_of_other_length_sees_so_many_samples():
    chosen = {kind: {"samples_seen": 96} for kind in ("mlp", "full", "copies", "two_experts")}
    jobs = planned({"baselines": {**chosen, "mlp_twice": {"kind": "mlp", "samples_seen": 128}}})
    assert {samples_after_base(jobs, kind) for kind in chosen} == {96}
    assert samples_after_base(jobs, "mlp_twice") == 128


def test_baselines_are_what_their_kinds_say():
    jobs = planned({"baselines": {"copies": {"noise": 0.25}}})
    base = jobs["pretrain/full"]
    mlp, full = jobs["finetune_expert/mlp"], jobs["finetune_expert/full"]
    expert = jobs["finetune_expert/1"].settings
    differing = {key for key in expert if mlp.settings[key] != expert[key]}
    assert differing == {"samples_seen", "batches"} and mlp.inputs["init"] is base
    assert {key for key in expert if mlp.settings[key] != full.settings[key]} == {"weights"}
    copies = jobs["assemble/copies"]
    assert copies.inputs == {"expert_0": base}
    assert (copies.settings["copies"], copies.settings["noise"]) == (True, 0.25)
    assert jobs["finetune_router/copies"].settings["train"] == "experts"
    two = jobs["assemble/two_experts"]
    assert two.inputs == {"expert_0": base, "expert_1": jobs["finetune_expert/two_experts"]}
    assert (two.settings["num_experts"], two.settings["top_k"]) == (2, 2)
    assert jobs["finetune_router/two_experts"].settings == jobs["finetune_router/moe"].settings
    experts = [base, jobs["finetune_expert/1"], jobs["finetune_expert/2"]]
    assert list(jobs["soup/soup"].inputs.values()) == experts
    evaluated = jobs["evaluate/ensemble/renders"].inputs
    assert [evaluated[f"model_{k}"] for k in range(3)] == experts
    assert len([name for name in evaluated if name.startswith("model")]) == 3


def test_rates_are_those_of_experts_and_routers_unless_told():
    def rates(*overlays: dict) -> tuple[float, float]:
        about = planned(*overlays)["finetune_router/copies"].settings
        return about["optim"]["lr"], about["lr_experts"]

    tune, router = SMALL["finetune_expert"]["optim"]["lr"], 0.25
    routers = {"finetune_router": {"optim": {"lr": router}}}
    assert rates(routers) == (router, tune)
    per_256 = {"finetune_expert": {"optim": {"lr": None, "lr_per_256": 0.64}}}
    (run,) = load_config(merge(SMALL, per_256)).values()
    assert rates(routers, per_256) == (router, peak_lr(run.finetune_expert))
    unlocked = {"finetune_router": {"train": "experts", "lr_experts": 0.125}}
    assert rates(routers, unlocked) == (router, 0.125)
    own = {"baselines": {"copies": {"optim": {"lr": 0.75}, "lr_experts": 0.5}}}
    assert rates(routers, unlocked, own) == (0.75, 0.5)
    mlp = {"baselines": {"mlp": {"optim": {"lr": 0.375}}}}
    assert planned(mlp)["finetune_expert/mlp"].settings["optim"]["lr"] == 0.375
    assert planned(mlp)["finetune_expert/full"].settings["optim"]["lr"] == tune


def test_full_trains_all_blocks_whatever_experts_do():
    chosen = {"finetune_expert": {"image_layers": [1]}, "moe": {"image_layers": [1]}}
    jobs = planned(chosen)
    assert jobs["finetune_expert/mlp"].settings["image_layers"] == [1]
    assert jobs["finetune_expert/full"].settings["image_layers"] == "all"


@pytest.mark.parametrize(
    ("overlay", "unchanged"),
    [
        ({"moe": {"top_k": 1}}, {"mlp", "full", "soup", "ensemble"}),
        ({"cluster": {"num_tries": 1}}, {"mlp", "full", "copies", "two_experts"}),
        ({"finetune_expert": {"stop_ratio": 0.9}}, {"mlp", "full", "copies", "two_experts"}),
        ({"baselines": {"copies": {"noise": 0.5}}}, set(KINDS) - {"copies"}),
        ({"baselines": {"mlp": None}}, set(KINDS) - {"mlp"}),
    ],
)
def test_a_setting_that_is_not_a_baselines_leaves_it_alone(overlay, unchanged):
    before, after = planned(), planned(overlay)
    same = {
        kind
        for kind in KINDS
        if (name := f"evaluate/{kind}/renders") in after
        and after[name].version == before[name].version
    }
    assert same == unchanged


@pytest.mark.parametrize(
    ("overlay", "words"),
    [
        (
            {"baselines": {"two_experts": {"samples_seen": 64}}},
            ["baselines.two_experts: samples_seen = 64 leaves nothing", "see 64", "Hint: more"],
        ),
        (
            {"baselines": {"two_experts": {}}, "finetune_expert": {"samples_seen": 0}},
            ["baselines.two_experts: samples_seen = 64 leaves nothing", "see 64", "Hint: more"],
        ),
        (
            {"baselines": {"mlp": {"samples_seen": 8, "optim": {"lr": 1, "warmup_steps": 9}}}},
            ["baselines.mlp: ", "a warm-up of 9 steps is longer than training", "Hint"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_named_before_anything_runs(overlay, words):
    runs = load_config(merge(copy.deepcopy(ALL), overlay))
    with pytest.raises(ConfigError) as error:
        plan_runs(runs, {})
    for word in words:
        assert word in str(error.value)


def test_a_run_that_stops_at_the_base_has_no_baselines():
    assert not {name.split("/")[1] for name in planned({"moe": None}) if "/" in name} & {*KINDS} - {
        "full"
    }  # the phase


# --- what they are ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    pretrain(phase(samples_seen=64), *data, None, out)
    return out


def tuned(data, base: Path, out: Path, **changes: Any) -> Path:
    raw = {"samples_seen": 32, "batch_size": 8, "batches": "ordinary", "seed": 0}
    settings = ExpertJob(**raw | {"optim": {"lr": 1e-2}} | changes)
    finetune_expert(settings, base, *data, None, folder(out))
    return out


@pytest.fixture(scope="module")
def experts(data, base, tmp_path_factory) -> list[Path]:
    out = tmp_path_factory.mktemp("experts")
    return [base, *(tuned(data, base, out / str(k), seed=k) for k in (1, 2))]


def test_a_soup_is_the_mean_of_its_experts(experts, tmp_path):
    soup(experts, folder(tmp_path / "out"))
    mixed, base, *others = (
        load_model(path).model.state_dict() for path in (tmp_path / "out", *experts)
    )
    tensors = [name for name in base if ".mlp." in name]
    assert tensors
    for name, tensor in base.items():
        if name in tensors:
            stack = np.stack([state[name].double().numpy() for state in (base, *others)])
            np.testing.assert_allclose(mixed[name], stack.mean(0), rtol=1e-6, atol=1e-7)
            assert not torch.equal(mixed[name], tensor)
        else:
            assert torch.equal(mixed[name], tensor), name
    about = json.loads((tmp_path / "out/model.json").read_text())
    assert (about["kind"], about["base"], about["moe"]) == ("dense", None, None)


def test_a_soup_of_equal_models_is_that_model_to_the_bit(base, tmp_path):
    soup([base] * 3, folder(tmp_path / "out"))
    before, after = read_weights(base), read_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_soup_of_different_architectures_is_refused(data, base, tmp_path):
    model = phase().model.model_dump()
    model["config"]["text_cfg"]["layers"] = 3
    pretrain(phase(model=model, samples_seen=16), *data, None, folder(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"other: text\.\S+ is not as in the first model. Hint"):
        soup([base, tmp_path / "other"], folder(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"soup needs experts. Hint: --input expert_0"):
        soup([], folder(tmp_path / "none"))


def test_the_cosine_of_an_ensemble_is_the_mean_cosine_of_its_models(experts):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 16, 16, generator=generator)
    text = torch.randint(1, 40, (4, 12), generator=generator)
    with torch.inference_mode():
        together = load_side_by_side(experts).model.eval()
        image, words = together.encode_image(images), together.encode_text(text)
        expected = np.zeros((5, 4))
        for path in experts:
            model = load_model(path).model.eval()
            sides = [
                f(x).double().numpy()
                for f, x in ((model.encode_image, images), (model.encode_text, text))
            ]
            for i, v in enumerate(sides[0]):
                for j, t in enumerate(sides[1]):
                    expected[i, j] += v @ t / np.sqrt(v @ v) / np.sqrt(t @ t) / len(experts)
    assert image.shape == (5, 3 * 16)
    np.testing.assert_allclose(image.norm(dim=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(image @ words.T, expected, atol=1e-6)


def test_models_that_take_other_inputs_do_not_stand_side_by_side(base, tmp_path):
    for name, edit in (
        ("preprocess", lambda about: about["preprocess"].update(mean=[0, 0, 0])),
        ("context_length", lambda about: about["config"]["text_cfg"].update(context_length=9)),
    ):
        shutil.copytree(base, tmp_path / name)
        about = json.loads((base / "model.json").read_text())
        edit(about)
        (tmp_path / name / "model.json").write_text(json.dumps(about))
        with pytest.raises(ConfigError, match=rf"differ in their {name}, .* Hint: give experts"):
            load_side_by_side([base, tmp_path / name])


@pytest.mark.parametrize("lock", [[], ["text"]], ids=str)
def test_full_fine_tuning_moves_all_but_the_temperature_and_what_is_locked(
    data, base, tmp_path, lock
):
    out = tuned(data, base, tmp_path / "out", weights="all", lock=lock)
    before, after = load_model(base).model.state_dict(), load_model(out).model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    fixed = {name for name in before if name.startswith(tuple(f"{tower}." for tower in lock))}
    assert still == {"logit_scale"} | fixed


# --- all of them, run ---------------------------------------------------------------------------------------


def test_every_baseline_runs_and_stands_in_the_table(workflow):
    raw = {**ALL, "pretrain": SMALL["pretrain"][1:]}
    (workflow.root / "small.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    workflow.run_jobs()
    assert workflow.planned() == ["report"]
    page, store = workflow.root / "page", workflow.root / "results"
    (run,) = load_config(raw).values()
    jobs = [job for job in plan_run("small", run) if job.stage != "report"]
    report(
        ReportJob(run="small", seed=0), {job.name: store / job.folder for job in jobs}, folder(page)
    )
    rows = {
        row["model"]: row for row in csv.DictReader((page / "results.csv").read_text().splitlines())
    }
    assert {*KINDS, "base", "expert_1", "expert_2", "upcycled", "moe"} == rows.keys() - {"chance"}
    after = {name: int(rows[name]["samples_after"]) for name in rows if name != "chance"}
    assert after == {
        **dict.fromkeys(rows.keys() - {"chance"}, 192),
        **{"base": 0, "expert_1": 64, "expert_2": 128},
        **dict.fromkeys(("soup", "ensemble", "upcycled"), 128),
    }
    flops = {name: float(rows[name]["flops_after"]) for name in rows if name != "chance"}
    assert flops["mlp"] < flops["full"] < flops["copies"] and flops["two_experts"] < flops["moe"]
    pair = {name: float(rows[name]["flops_per_pair"]) for name in rows if name != "chance"}
    assert pair["ensemble"] == 3 * pair["base"] == 3 * pair["soup"]
    assert pair["base"] < pair["moe"] < pair["ensemble"]
