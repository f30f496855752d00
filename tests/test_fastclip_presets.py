"""The presets of global contrastive losses and references. Every expected number is the publications'."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clipgraft import cost, plan
from clipgraft.architectures import architecture
from clipgraft.config import load_config, merge
from clipgraft.objectives import inner_rate
from clipgraft.recipes import PhaseSettings
from clipgraft.schedule import num_steps, num_warmup_steps, peak_lr

ROOT = Path(__file__).resolve().parent.parent
PLAIN = sorted((ROOT / "presets").glob("fastclip_*.yaml"))
WITH_REFERENCE = [ROOT / f"presets/{name}.yaml" for name in ("dfn1m_reference", "drrho_dfn192m")]
PATHS = [*PLAIN, *WITH_REFERENCE]

# preset, run: model, batch, passes, samples of the data, learning rate and its minimum, decay, warm-up, and of the
# temperature its start, how it is found, learning rate and schedule; rho, last gamma, epochs until then, eps
TABLE = """
fastclip_cc3m_v3      main      | B-32 1024 37   2723840 1e-3     0    .1 10000 .07 learned    2e-4      step_thresh 6.5 .2 18 1e-14
fastclip_cc3m_v2      main      | B-32 1024 37   2723840 1e-3     0    .1 10000 .03 per_sample .0133     const       7.0 .2 18 1e-14
fastclip_cc12m_v3     main      | B-32 2048 33   9187328 4e-4     0    .1 10000 .07 learned    1e-4      step_thresh 8.5 .2 16 1e-14
fastclip_laion400m_v3 main      | B-16 5120 30 315658316 2e-4     4e-5 .2 13200 .07 learned    5e-5      step_thresh 16  .8 10 1e-6
drrho_dfn192m         fastclip  | B-16 5120  7 192160462 3.125e-4 0    .2   500 .07 learned    7.8125e-5 step_thresh 11  1  -  1e-14
drrho_dfn192m         drrho     | B-16 5120  7 192160462 3.125e-4 0    .2   500 .01 constant   -         -           -   1  -  1e-4
dfn1m_reference       fastclip  | B-16  640 30   1000000 3.125e-4 0    .2   500 .07 learned    7.8125e-5 step_thresh 11  .9 30 1e-14
dfn1m_reference       published | B-16  640 30   1000000 3.125e-4 0    .2   500 .07 learned    7.8125e-5 step_thresh 11  .9 30 1e-14
dfn1m_reference       ours      | B-16  640 30   1000000 3.125e-4 0    .2   500 -   locked     -         -           -   .9 30 1e-4
""".strip().splitlines()  # fmt: skip
KINDS = {"per_sample": "rgcl"}


def phase_of(preset: str, run: str) -> PhaseSettings:
    _, (phase,) = plan.read([ROOT / f"presets/{preset}.yaml"])[run]
    return phase


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.split("|")[0].strip())
def test_the_published_settings_are_regenerated(row):
    (preset, run), numbers = (part.split() for part in row.split("|"))
    model, batch, passes, samples, lr, lr_min, decay, warmup, *rest = numbers
    start, tau, lr_tau, schedule, rho, gamma, gamma_decay, eps = rest
    settings, (phase,) = plan.read([ROOT / f"presets/{preset}.yaml"])[run]
    optim, loss = phase.optim, phase.loss
    assert settings.name == f"ViT-{model}"
    assert (phase.image_size, phase.text_length, phase.crop_scale) == (224, 77, (0.9, 1.0))
    assert phase.batch_size == int(batch)
    assert phase.samples_seen == int(passes) * int(samples)
    assert (peak_lr(phase), optim.lr_min) == (float(lr), float(lr_min))
    assert (optim.weight_decay, num_warmup_steps(phase)) == (float(decay), int(warmup))
    assert (optim.name, optim.beta1, optim.beta2, optim.eps) == ("adamw", 0.9, 0.98, 1e-6)
    assert (loss.tau, loss.eps) == (tau, float(eps))
    assert loss.kind == KINDS.get(tau, "rgcl_g")
    assert loss.tau_bounds == (0.01, 1.0)
    if start != "-":
        assert phase.temperature == float(start)
    if lr_tau != "-":
        assert (loss.lr_tau, loss.lr_tau_schedule) == (float(lr_tau), schedule)
        assert (loss.lr_tau_threshold, loss.lr_tau_factor) == (0.03, 1 / 3)
        assert loss.rho == float(rho)
    if tau == "learned":
        assert loss.tau_grad == "fastclip"  # without it rho means something else
    first, last = (inner_rate(loss.gamma, epoch, float(passes)) for epoch in (0.9, int(passes) - 1))
    assert first == 1
    if gamma_decay == "-":
        assert last == float(gamma) == 1
    else:
        assert (loss.gamma.schedule, loss.gamma.decay) == ("cosine", float(gamma_decay))
        assert loss.gamma.min == float(gamma)


@pytest.mark.parametrize(
    ("preset", "steps"),
    [("fastclip_cc3m_v3", 37 * 2660), ("fastclip_cc3m_v2", 37 * 2660), ("fastclip_cc12m_v3", 33 * 4486)],
)  # fmt: skip
def test_where_the_data_divide_into_batches_steps_are_the_published_ones(preset, steps):
    assert num_steps(phase_of(preset, "main")) == steps


def test_the_runs_with_a_reference_differ_in_what_they_say():
    """Weight of FastCLIP's loss, of the distance of features, the margins, the start and the temperature."""
    runs = {
        ("dfn1m_reference", "fastclip"): (1.0, 0.0, "plain", None, "learned"),
        ("dfn1m_reference", "published"): (0.5, 0.5, "plain", "reference", "learned"),
        ("dfn1m_reference", "ours"): (0.5, 0.5, "reference", "reference", "locked"),
        ("drrho_dfn192m", "fastclip"): (1.0, 0.0, "plain", None, "learned"),
        ("drrho_dfn192m", "drrho"): (1.0, 0.0, "reference", None, "constant"),
    }
    for (preset, run), (weight, feature, margins, start, tau) in runs.items():
        phase = phase_of(preset, run)
        loss = phase.loss
        assert (loss.weight, phase.distillation.feature) == (weight, feature)
        assert (loss.margins, phase.init_from, loss.tau) == (margins, start, tau)
        names = [(reference.model, reference.pretrained) for reference in phase.references]
        assert names == ([] if run == "fastclip" else [("ViT-B-32", "openai")])


def test_the_inner_rate_of_drrho_is_its_rule_for_seven_passes():
    raw = yaml.safe_load((ROOT / "presets/drrho_dfn192m.yaml").read_text())
    assert raw["pretrain"][0]["loss"]["gamma"]["min"] == min(1, 4.177 * 7**-0.7265)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_run_has_a_plan(path):
    hardware = plan.Hardware("A100-80GB", 312, 80, 8, mfu=0.27, price=1.575)
    for model, phases in plan.read([path]).values():
        assert cost.image_tokens(architecture(model), phases[0]) == (
            50 if "32" in model.name else 197
        )
        assert plan.describe(model, phases, hardware, 1_000_000).splitlines()[0].startswith("ViT-B")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_preset_and_some_lines_about_data_are_a_whole_config(path):
    """Below it may lie a model that is spelled out."""
    small = yaml.safe_load((ROOT / "tests/config/small.yaml").read_text())
    own = {
        "download": {
            "train": {"kind": "tars", "tars": "a.tar"},
            "test": {"kind": "tars", "tars": "b.tar"},
        },
        "evaluate": {"tasks": {"test": {"data": "test", "retrieval": True}}},
        "moe": None,
    }
    preset = yaml.safe_load(path.read_text())
    runs = load_config(merge(merge({"model": small["model"]}, preset), own))
    assert set(runs) == set(preset.get("runs", ["main"]))
    for run in runs.values():
        assert run.model.name == preset["model"]["name"] and run.model.config is None


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_header_of_a_preset_names_its_own_file_and_what_was_reached(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [line for line in comments if "presets/" in line]
    assert len(commands) == 3
    assert all(f"presets/{path.name}" in line for line in commands)
    assert any("FastCLIP-v" in line and "." in line.split("FastCLIP-v")[1] for line in comments)


def test_the_page_shows_what_is_printed():
    page = (ROOT / "workflow/docs/fastclip.md").read_text()
    command, printed = page.split("$ python -m clipgraft.plan ")[1].split("```")[0].split("\n", 1)
    words = [sys.executable, "-m", "clipgraft.plan", *command.split()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == printed
