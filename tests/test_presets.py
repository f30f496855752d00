"""The presets: CLIPA's published tables regenerated from them. Every expected number is the publications'."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import yaml
from PIL import Image

from clipgraft import architectures, cost, plan
from clipgraft.architectures import architecture
from clipgraft.config import ConfigError, load_config, merge
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.samples import Samples
from clipgraft.data.tokens import Tokens
from clipgraft.model_settings import ModelSettings
from clipgraft.planning import plan_run
from clipgraft.recipes import PhaseSettings
from clipgraft.run_settings import RunSettings
from clipgraft.schedule import num_steps, num_warmup_steps, peak_lr
from clipgraft.settings import IndexJob
from clipgraft.sources import ShareGpt4vSource

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted((ROOT / "presets").glob("clipa_*.yaml"))
CLIPMOE = ROOT / "presets/clipmoe_l14.yaml"
DATACOMP = (
    1_281_167 * 10_000
)  # samples of CLIPA-v2's pretraining: ten thousand passes of ImageNet's size

# preset, phase: pixels, image tokens (with the class token), text tokens, batch, peak learning rate, warm-up, steps
TABLE = """
clipa_b16_i50_t16 short | 112  50 16 65536 2.048e-3  782 37.3k
clipa_b16_i50_t16 full  | 224 197 16  8192 2.56e-5  3072 16000
clipa_l16_i17_t16 short |  64  17 16 32768 1.024e-3 1563 74.6k
clipa_l16_i17_t16 full  | 224 197 16  7168 2.24e-5  3571 18286
clipa_l16_i37_t8  short |  96  37  8 32768 1.024e-3 1563 74.6k
clipa_l16_i37_t8  full  | 224 197 32  7168 2.24e-5  3571 18286
clipa_v2_h14      short |  84  37  8 65536 2.048e-3 3200 195.5k
clipa_v2_h14      full  | 224 180 32 32768 5.12e-5   800 16000
clipa_v2_h14      large | 336 346 32 16384 6.4e-6   1600 8000
clipa_v2_h14_70   short |  70  26  8 65536 2.048e-3 3200 195.5k
clipa_v2_h14_70   full  | 224 180 32 32768 5.12e-5   800 16000
clipa_v2_h14_70   large | 336 346 32 16384 6.4e-6   1600 8000
clipa_v2_l14      short |  84  37  8 65536 2.048e-3  800 195.5k
clipa_v2_bigg14   short |  70  26  8 65536 1.024e-3 3200 195.5k
clipa_v2_bigg14   full  | 224 154 32 16384 2.56e-5     0 32000
clipa_v2_bigg14   large | 336 346 32 16384 6.4e-6   1600 8000
""".strip().splitlines()
SAMPLES = {"v1": {"short": 2.44e9, "full": 131.07e6}}
SAMPLES["v2"] = {"short": DATACOMP, "full": 524.288e6, "large": 131.072e6}

# preset: 80 GB A100 hours without and with the phase `large`, and TFLOP/s of each A100 that they imply (6 x MACs)
HOURS = {
    "clipa_b16_i50_t16": (2 * 24 * 8, None, 62),
    "clipa_l16_i17_t16": (3 * 24 * 8, None, 70),
    "clipa_l16_i37_t8": (4 * 24 * 8, None, 81),
    "clipa_v2_h14": (7776, 8640, 83),
    "clipa_v2_h14_70": (5920, None, 84),
}
PRICES = {4008: 6318, 4520: 7124, 7776: 12247, 8640: 13613, 5920: 9324, 21998: 34646}


def phases(preset: str) -> dict[str, PhaseSettings]:
    ((_, phases),) = plan.read([ROOT / f"presets/{preset}.yaml"]).values()
    return {phase.name: phase for phase in phases}


def config_of(preset: str) -> dict[str, Any]:
    ((model, _),) = plan.read([ROOT / f"presets/{preset}.yaml"]).values()
    return architecture(model)


def of_table(row: str) -> tuple[str, str, list[str]]:
    name, numbers = row.split("|")
    preset, phase = name.split()
    return preset, phase, numbers.split()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.split("|")[0].strip())
def test_the_published_schedule_is_regenerated(row):
    preset, name, (size, image, text, batch, lr, warmup, steps) = of_table(row)
    phase = phases(preset)[name]
    assert phase.image_size == int(size)
    assert cost.image_tokens(config_of(preset), phase) == int(image)
    assert phase.text_length == int(text)
    assert phase.batch_size == int(batch)
    assert peak_lr(phase) == pytest.approx(float(lr), rel=1e-12)
    assert num_warmup_steps(phase) == int(warmup)
    if steps.endswith("k"):
        assert round(num_steps(phase) / 1000, 1) == float(steps[:-1])
    else:
        assert num_steps(phase) == int(steps)
    published = SAMPLES["v2" if "v2" in preset else "v1"][name]
    assert float(f"{phase.samples_seen:.3g}") == float(f"{published:.3g}")


@pytest.mark.parametrize(
    ("preset", "seen"),
    [
        ("clipa_b16_i50_t16", {"full": 16_000 * 8192}),
        ("clipa_v2_h14", {"short": DATACOMP, "full": 16_000 * 32768, "large": 8_000 * 16384}),
        ("clipa_v2_bigg14", {"short": DATACOMP, "full": 524_288_000, "large": 131_072_000}),
    ],
)
def test_samples_that_are_published_to_the_last_one(preset, seen):
    assert seen.items() <= {name: p.samples_seen for name, p in phases(preset).items()}.items()


def test_warm_up_in_samples_is_the_published_one():
    """51.2 M in the first version; 52.4 M and 26.2 M in the second."""
    for preset, name, millions in [
        ("clipa_b16_i50_t16", "short", 51.2),
        ("clipa_l16_i17_t16", "short", 51.2),
        ("clipa_v2_l14", "short", 52.4),
        ("clipa_v2_h14", "full", 26.2),
    ]:
        phase = phases(preset)[name]
        seen = num_warmup_steps(phase) * phase.batch_size / 1e6
        assert seen == pytest.approx(millions, abs=phase.batch_size / 1e6)


@pytest.mark.parametrize(
    ("preset", "name", "kept"),
    [
        ("clipa_v2_h14", "full", 179),
        ("clipa_v2_h14", "large", 345),
        ("clipa_v2_bigg14", "full", 153),
        ("clipa_v2_bigg14", "large", 345),
        ("clipa_v2_h14", "short", 36),
        ("clipa_v2_h14_70", "short", 25),
    ],
)
def test_patches_kept_are_the_published_ones(preset, name, kept):
    assert cost.num_patches(config_of(preset), phases(preset)[name]) == kept


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_what_all_published_schedules_share(path):
    for phase in phases(path.stem).values():
        optim = phase.optim
        assert (optim.beta1, optim.beta2, optim.weight_decay) == (0.9, 0.95, 0.2)
        assert (optim.lr_min, optim.max_grad_norm) == (0, None)
        assert optim.eps == (1e-8 if "v2" in path.stem else 1e-6)
        assert phase.crop_scale == (0.4, 1.0)
        assert phase.flip_prob == 0
        assert phase.temperature == 0.07
        jitters = path.stem not in ("clipa_b16_i50_t16", "clipa_v2_l14")
        assert phase.color_jitter == ((0.32, 0.32, 0.32, 0.08) if jitters else (0, 0, 0, 0))
        assert phase.gray_scale_prob == (0.2 if jitters else 0)
        assert phase.color_jitter_prob == (0.8 if jitters else 1)


def test_images_of_the_second_version_are_prepared_as_open_clip_prepares_them():
    published = open_clip.get_pretrained_cfg("ViT-H-14-CLIPA-336", "datacomp1b")
    for path in PRESETS:
        ((model, _),) = plan.read([path]).values()
        given = model.preprocess.model_dump()
        if "v2" in path.stem:
            assert given == {key: published[key] for key in given}
        else:
            assert set(given.values()) == {None}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_and_some_lines_about_data_are_a_whole_config(path):
    """Below it may lie a model that is spelled out."""
    small = yaml.safe_load((ROOT / "tests/config/small.yaml").read_text())
    del small["finetune_router"]["watch"]  # of a task that is not here
    below = {key: small[key] for key in ("model", "finetune_expert", "finetune_router")}
    own = {
        "download": {
            "train": {"kind": "tars", "tars": "a.tar"},
            "test": {"kind": "tars", "tars": "b.tar"},
        },
        "evaluate": {"tasks": {"test": {"data": "test", "retrieval": True}}},
    }
    preset = yaml.safe_load(path.read_text())
    (run,) = load_config(merge(merge(below, preset), own)).values()
    assert [phase.name for phase in run.pretrain][:2] == ["short", "full"]
    assert run.model.name == preset["model"]["name"]


def clipmoe() -> RunSettings:
    """The preset of CLIP-MoE with data, over what the demo has of a model and its training."""
    shapes = {"kind": "shapes", "num_samples": 2000}
    own = {
        "download": {"train": shapes, "test": shapes},
        "evaluate": {"tasks": {"test": {"data": "test", "retrieval": True}}},
    }
    demo = yaml.safe_load((ROOT / "config.yaml").read_text())
    below = {key: demo[key] for key in ("model", "cluster", "finetune_expert", "finetune_router")}
    preset = yaml.safe_load(CLIPMOE.read_text())
    (run,) = load_config(merge(merge(below, preset), own)).values()
    return run


def test_clip_moe_is_published_with_four_experts_of_openais_model_and_248_tokens():
    run = clipmoe()
    assert (run.model.name, run.model.pretrained, run.model.config) == ("ViT-L-14", "openai", None)
    (base,) = run.pretrain
    assert (base.samples_seen, base.image_size, base.text_length) == (0, 224, 77 * 4 - 60)
    assert (base.text_pos_resize, base.text_pos_keep) == ("stretch", 20)
    assert run.cluster.by == "image_x_text"
    assert run.cluster.of_round(3) == {"image_clusters": 3, "text_clusters": 3}
    moe = run.moe
    assert (moe.num_experts, moe.top_k, moe.router_init) == (4, 2, "random")
    assert moe.image_layers == moe.text_layers == "all"
    jobs = {job.name for job in plan_run("main", run)}
    assert {"finetune_expert/3", "finetune_router/moe"} <= jobs and "finetune_expert/4" not in jobs


def test_clip_moe_trains_experts_and_routers_as_its_code_does_unless_told():
    run = clipmoe()
    expert, router = run.finetune_expert, run.finetune_router
    for job, lr, decay in ((expert, 1e-5, 0.2), (router, 1e-6, 0.01)):
        assert (job.batch_size, num_steps(job), num_warmup_steps(job)) == (8 * 100, 1545, 200)
        optim = job.optim
        assert (optim.lr, optim.lr_min, optim.weight_decay) == (lr, 0, decay)
        assert optim.max_grad_norm is None
        assert (optim.name, optim.beta1, optim.beta2, optim.eps) == ("adamw", 0.9, 0.999, 1e-8)
        assert job.crop_scale == (1, 1) and job.flip_prob == 0
    assert (expert.init, expert.batch_order) == ("base", "round_robin")
    assert (expert.label_smoothing, expert.stop_ratio, expert.lock) == (0.1, None, [])
    assert (router.train, router.balance) == ("routers", "pooled")
    assert (router.balance_weight, router.z_weight) == (0.01, 0)


def test_clip_moe_is_trained_on_the_long_captions_of_sharegpt4v_alone(tmp_path):
    entries = []
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
        answer = {"from": "gpt", "value": f"A picture. It is {number}."}
        entries.append({"image": f"{number}.png", "conversations": [answer]})
    (tmp_path / "x.json").write_text(json.dumps(entries))
    about = {"annotations": str(tmp_path / "x.json"), "images": str(tmp_path)}
    for name in ("download", "index"):
        (tmp_path / name).mkdir()
    download(ShareGpt4vSource(kind="sharegpt4v", **about), tmp_path / "download", 1)
    build_index(IndexJob(tokenize=True), tmp_path / "download", tmp_path / "index", 1)

    run, tokens, rows_B = clipmoe(), Tokens.open(tmp_path / "index"), np.arange(3).repeat(50)
    first_B, count_B = tokens.captions_of(rows_B)
    assert set(count_B) == {2} and run.embed.captions == "first"
    for training in (run.finetune_expert, run.finetune_router):
        uniform_B = np.random.default_rng(0).random(len(rows_B))
        assert (tokens.choose(rows_B, uniform_B, training.captions) == first_B).all()
    kinds = Samples.open(tmp_path / "index").all_caption_kinds()
    assert [kind for kind, *_ in kinds] == ["long"] * 3


def test_the_base_of_clip_moe_has_a_plan_and_needs_no_training():
    done = run_plan("--preset", f"presets/{CLIPMOE.name}", "--samples", "1236000")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ViT-L-14: 427.")
    assert "passes over 1,236,000 samples: long 0.0" in done.stdout.splitlines()


@pytest.mark.parametrize("path", [*PRESETS, CLIPMOE], ids=lambda path: path.stem)
def test_the_header_of_a_preset_names_its_own_file(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [line for line in comments if "presets/" in line]
    assert len(commands) == 3
    assert all(f"presets/{path.name}" in line for line in commands)


@pytest.mark.parametrize("preset", HOURS)
def test_flops_over_the_published_hours_are_the_published_rate(preset):
    hours, _, teraflops = HOURS[preset]
    config, both = config_of(preset), list(phases(preset).values())[:2]
    flops = 6 * sum(cost.training_macs(config, phase) for phase in both)
    assert flops / (hours * 3600) / 1e12 == pytest.approx(teraflops, rel=0.05)


@pytest.mark.parametrize("preset", HOURS)
def test_the_plan_expects_the_published_hours_at_their_mfu(preset):
    hours, _, teraflops = HOURS[preset]
    config, both = config_of(preset), list(phases(preset).values())[:2]
    a100 = plan.Hardware("A100-80GB", 312, 80, 64, mfu=teraflops / 312, price=1.575)
    expected = sum(a100.gpu_hours(6 * cost.training_macs(config, phase)) for phase in both)
    assert expected == pytest.approx(hours, rel=0.05)


def test_the_default_price_is_the_published_one():
    for hours, dollars in PRICES.items():
        assert hours * 1.575 == pytest.approx(dollars, rel=0.001)


def test_a_sample_of_b_16_costs_what_was_counted_by_hand():
    """4.9 GMAC forward, 29.5 GFLOP in training."""
    config, short = config_of("clipa_b16_i50_t16"), phases("clipa_b16_i50_t16")["short"]
    macs = cost.forward_macs(config, cost.image_tokens(config, short), short.text_length)
    assert round(macs / 1e9, 1) == 4.9
    assert 6 * macs / 1e9 == pytest.approx(29.5, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "share"),
    [
        ("clipa_b16_i50_t16", 0.16),
        ("clipa_l16_i37_t8", 0.22),
        ("clipa_l16_i17_t16", 0.34),
        ("clipa_v2_h14", 0.17),
    ],
)
def test_share_of_the_compute_that_the_full_phase_takes(preset, share):
    config = config_of(preset)
    short, full = (cost.training_macs(config, p) for p in list(phases(preset).values())[:2])
    assert full / (short + full) == pytest.approx(share, abs=0.01)


def run_plan(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clipgraft.plan", *words], cwd=ROOT, capture_output=True, text=True
    )


def test_the_plan_is_printed_without_torch():
    code = "import sys, runpy; sys.argv[0] = 'plan'; runpy.run_module('clipgraft.plan', run_name='__main__')"
    check = "; print({'torch', 'numpy', 'open_clip'} & set(sys.modules))"
    words = ["--preset", "presets/clipa_v2_h14.yaml", "--num-gpus", "64", "--samples", "1000000000"]
    done = subprocess.run(
        [sys.executable, "-c", code + check, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "set()"
    head = next(line for line in lines if line.startswith("phase"))
    large = next(line for line in lines if line.startswith("large"))
    for word in ("image tokens", "peak lr", "warm-up", "GFLOP", "memory", "price"):
        assert word in head
    for word in ("346/577", "131.07 M", "16,384", "8,000", "6.400e-06", "1,600"):
        assert word in large
    assert "passes over 1,000,000,000 samples: short 12.8, full 0.5, large 0.1" in lines


def test_the_page_shows_what_is_printed():
    page = (ROOT / "workflow/docs/clipa.md").read_text()
    command, printed = page.split("$ python -m clipgraft.plan ")[1].split("```")[0].split("\n", 1)
    assert run_plan(*command.split()).stdout == printed


def test_the_price_of_a_plan_is_its_hours_times_the_price_of_one():
    done = run_plan("--preset", "presets/clipa_v2_h14.yaml", "--num-gpus", "10", "--price", "2")
    total = next(line for line in done.stdout.splitlines() if line.startswith("all")).split()
    gpu_hours, hours, dollars = (float(word.strip("$").replace(",", "")) for word in total[-3:])
    assert dollars == pytest.approx(2 * gpu_hours, abs=1)
    assert gpu_hours == pytest.approx(10 * hours, abs=1)


def test_what_does_not_fit_is_told_with_what_would(tmp_path):
    preset = "presets/clipa_v2_h14.yaml"
    few = run_plan("--preset", preset, "--num-gpus", "64").stdout
    many = run_plan("--preset", preset, "--num-gpus", "256").stdout
    assert "short does not fit into 90% of 80 GB. Hint: `parallel: fsdp`\n" in few
    assert "large does not fit into 90% of 80 GB. Hint: `grad_checkpointing: true`\n" in few
    assert "does not fit" not in many
    told = "runs: {main: {pretrain: {short: {parallel: fsdp}, full: {grad_checkpointing: true}, large: {grad_checkpointing: true}}}}"
    (tmp_path / "told.yaml").write_text(told)
    after = run_plan("--preset", preset, str(tmp_path / "told.yaml"), "--num-gpus", "64").stdout
    assert "does not fit" not in after


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--gpu", "A1000"],
            "--gpu A1000: its peak is not known. Hint: one of V100-32GB, A100-40GB",
        ),
        (["--mfu", "27"], "--mfu 27.0"),
        (["--num-gpus", "0"], "--num-gpus 0"),
        (["--tflops", "0"], "--tflops 0.0: must be above 0"),
        (["--samples", "-1"], "--samples -1: must be above 0"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(words, message):
    done = run_plan("--preset", "presets/clipa_b16_i50_t16.yaml", *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {name: ViT-B-16-CL17}\npretrain: [PHASE]", "did you mean ViT-B-16-CL16"),
        ("pretrain: []", "no section `model`"),
        ("model: {name: ViT-B-16}\npretrain: []", "no section `pretrain`"),
        ("model: {name: ViT-B-16}\npretrain: [{images: x}]", "pretrain.0: unknown key `images`"),
    ],
)
def test_a_mistake_in_a_preset_is_one_message(tmp_path, text, message):
    phase = (
        "{name: x, image_size: 32, text_length: 8, samples_seen: 9, batch_size: 3, optim: {lr: 1}}"
    )
    (tmp_path / "x.yaml").write_text(text.replace("PHASE", phase))
    done = run_plan("--preset", str(tmp_path / "x.yaml"))
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"embed_dim": 3, "vision_cfg": {}}', r"mine\.json: config lacks text_cfg"),
        (
            '{"embed_dim": "3", "vision_cfg": {}, "text_cfg": {}}',
            r"mine\.json: config\.embed_dim = '3'",
        ),
        ("{", r"mine\.json is not JSON"),
    ],
)
def test_a_mistake_in_an_architecture_of_ours_names_its_file(text, words, tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "OURS", tmp_path)
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        architectures.architecture(ModelSettings(name="mine"))


def test_an_edited_architecture_of_ours_re_runs_what_trains_it(tmp_path, monkeypatch):
    small = yaml.safe_load((ROOT / "tests/config/small.yaml").read_text())
    (run,) = load_config(merge(small, {"model": {"name": "mine", "config": None}})).values()
    monkeypatch.setattr(architectures, "OURS", tmp_path)
    seen = []
    for dim in (3, 4):
        (tmp_path / "mine.json").write_text(
            json.dumps(small["model"]["config"] | {"embed_dim": dim})
        )
        first = next(job for job in plan_run("x", run) if job.name == "pretrain/short")
        seen.append((first.version, first.sources))
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]
