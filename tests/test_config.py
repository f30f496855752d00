"""The config: what is accepted, and that each mistake gets one clear message."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipgraft.config import (
    ConfigError,
    load_config,
    merge,
    read_config,
    read_layers,
    schema,
    sweep_points,
)
from clipgraft.loss_settings import LossSettings
from clipgraft.moe_settings import ClusterSettings
from clipgraft.planning import plan_runs

ROOT = Path(__file__).resolve().parent.parent
SMALL = yaml.safe_load((ROOT / "tests/config/small.yaml").read_text())


def changed(path: str, value: Any) -> dict[str, Any]:
    """The small config with one value set, or removed if None."""
    raw = copy.deepcopy(SMALL)
    *parents, leaf = path.split(".")
    node = raw
    for parent in parents:
        node = node[int(parent)] if parent.isdigit() else node.setdefault(parent, {})
    if value is None:
        del node[leaf]
    else:
        node[leaf] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("pretrain.0.name", "expert_x", ["pretrain: 'expert_x'", "begin with `expert_`", "Hint"]),
        ("baselines.expert_9", {"kind": "full"}, ["baselines: 'expert_9'", "begin with `expert_`"]),
        (
            "evaluate.tasks.evalset",
            {"data": "renders", "retrieval": True},
            ["evaluate.tasks.evalset: the results of evaluate.evalset", "Hint: another name"],
        ),
        (
            "evaluate.tasks.renders.zero_shot",
            [{"label": "shape"}, {"label": "shape", "templates": ["a {c}"]}],
            ["evaluate.tasks.renders: zero_shot names shape twice", "Hint"],
        ),
        (
            "moe",
            {"num_experts": 3, "router_init": "centroids", "router_samples": 2},
            ["moe: router_samples = 2 is less than num_experts = 3", "Hint: thousands"],
        ),
        ("modle", {}, ["unknown key `modle`", "did you mean `model`"]),
        ("finetune_expert.optim.lrr", 1, ["unknown key `lrr` in finetune_expert.optim", "`lr`"]),
        ("pretrain.0.batchsize", 4, ["unknown key `batchsize` in pretrain.0", "`batch_size`"]),
        (
            "download.train.num_sample",
            4,
            ["unknown key `num_sample` in download.train", "num_samples"],
        ),
        ("resources.pretrain.gpus", 4, ["unknown key `gpus` in resources.pretrain", "`gpu`"]),
        (
            "evaluate.tasks.renders.dta",
            "x",
            ["unknown key `dta` in evaluate.tasks.renders", "`data`"],
        ),
        ("moe.top_k", "two", ["moe.top_k", '"two"', "integer"]),
        ("moe.top_k", 4, ["top_k = 4", "num_experts = 3", "Hint"]),
        ("pretrain.0.samples_seen", "1.28e3", ["samples_seen", '"1.28e3"', "Hint: 1280"]),
        ("cluster.image_clusters", -2, ["cluster.image_clusters = -2: input should be greater"]),
        ("cluster.image_clusters", [2, -1], ["cluster.image_clusters.1 = -1"]),
        ("moe.image_layers", "al", ["moe.image_layers = \"al\": input should be 'all'"]),
        ("evaluate.tasks.renders.probe", "size", ['probe = "size"', 'Hint: ["size"]']),
        ("download.train", {"split": "train"}, ["missing key `download.train.kind`"]),
        ("download.train", {"kind": "tars"}, ["missing key `download.train.tars`"]),
        ("pretrain.0.image_size", 4, ["image_size = 4 is not", "Hint: 8 or 16"]),
        ("moe.num_experts", 1, ["moe.num_experts", "1", "2"]),
        ("moe.router_init", "centroid", ["moe.router_init", '"centroid"', "'centroids'"]),
        ("moe.router_scale", 2.0, ["router_scale = 2.0", "no effect on router_init: random"]),
        ("moe.router_samples", 64, ["router_samples = 64", "Hint", "router_init: centroids"]),
        ("moe", {"image_layers": [], "text_layers": []}, ["no block has experts", "moe: null"]),
        ("finetune_router.train", "expert", ["finetune_router.train", "'experts'"]),
        ("finetune_router.lr_experts", 1e-4, ["lr_experts = 0.0001", "train: routers", "Hint"]),
        (
            "finetune_router",
            {**SMALL["finetune_router"], "balance": "pooled", "balance_weight": 0},
            ["balance = pooled has no effect with balance_weight = 0"],
        ),
        ("cluster.image_clusters", 1, ["image_clusters = 1: one cluster", "Hint: at least 2"]),
        ("cluster.by", "images", ["cluster.by", '"images"', "image_x_text"]),
        ("cluster.by", "image", ["text_clusters = 2 has no effect on by: image", "Hint"]),
        ("cluster.joint_clusters", 4, ["joint_clusters = 4 has no effect on by: image_x_text"]),
        ("cluster.max_points", 1, ["max_points = 1 is less than image_clusters = 2", "Hint"]),
        (
            "cluster.text_clusters",
            [2, 3, 4],
            [
                "cluster.text_clusters = [2, 3, 4] is for 3 rounds",
                "num_experts = 3 makes 2",
                "Hint",
            ],
        ),
        (
            "finetune_expert",
            SMALL["finetune_expert"] | {"batch_order": "round_robin", "shuffle_block": 8},
            ["shuffle_block = 8 does not go with batch_order: round_robin", "Hint"],
        ),
        (
            "pretrain.0.image_size",
            20,
            ["pretrain.short.image_size = 20", "patch size 8", "16 or 24"],
        ),
        ("pretrain.0.loss.rho", 9.0, ["pretrain.0.loss", "rho has no effect on kind: contrastive"]),
        (
            "pretrain.0.loss",
            {"kind": "rgcl_g", "gama": {}},
            ["unknown key `gama` in pretrain.0.loss", "`gamma`"],
        ),
        ("pretrain.0.loss", {"kind": "rgcl"}, ["rgcl needs lr_tau", "0.0133"]),
        (
            "pretrain.0.loss",
            {"kind": "gcl", "temperature": "per_sample"},
            ["per_sample is for rgcl"],
        ),
        ("pretrain.0.loss", {"kind": "gcl", "lr_tau": 1e-4}, ["lr_tau has no effect", "constant"]),
        ("pretrain.0.loss", {"kind": "rgcl_g", "lr_tau_schedule": "const"}, ["needs lr_tau"]),
        (
            "pretrain.0.loss",
            {"kind": "rgcl_g", "lr_tau": 1e-4, "lr_tau_threshold": 0.02},
            ["lr_tau_threshold has no effect on lr_tau_schedule: cosine", "step_thresh"],
        ),
        ("pretrain.0.loss", {"lr_tau_factor": 0.5}, ["lr_tau_factor has no effect", "Hint"]),
        (
            "pretrain.0.loss",
            {"temperature": "constant", "tau_bounds": [0.02, 0.5]},
            ["tau_bounds has no effect: the temperature is constant"],
        ),
        (
            "model.config.init_logit_scale",
            2.0,
            ["config.init_logit_scale = 2.0 has no effect", "`temperature`", "Hint"],
        ),
        (
            "pretrain.0.loss",
            {"kind": "rgcl_g", "gamma": {"schedule": "scent", "min": 0.3}},
            ["gamma.min has no effect on schedule: scent"],
        ),
        (
            "pretrain.0.loss",
            {"kind": "rgcl_g", "tau_bounds": [0.1, 0.2]},
            ["temperature = 0.07", "loss.tau_bounds = [0.1, 0.2]"],
        ),
        ("pretrain.0.accumulate", 7, ["does not divide into accumulate = 7 parts"]),
        ("pretrain.0.batch_size", 97, ["pretrain.short.batch_size = 97", "num_samples = 96"]),
        ("pretrain.0.image_reduction", "mesh", ["pretrain.0.image_reduction", "mesh", "'grid'"]),
        (
            "pretrain.0.image_reduction",
            {"kind": "random", "kep": 0.5},
            ["unknown key `kep` in pretrain.0.image_reduction", "`keep`"],
        ),
        (
            "pretrain.0.image_reduction",
            {"kind": "block", "keep": 0},
            ["pretrain.0.image_reduction.keep = 0", "greater than 0"],
        ),
        ("pretrain.0.text_reduction", "shuffle", ["pretrain.0.text_reduction", "'frequency'"]),
        (
            "pretrain.1.text_reduction",
            {"kind": "syntax", "ti": "random"},
            ["unknown key `ti` in pretrain.1.text_reduction", "`tie`"],
        ),
        ("finetune_router.batch_size", 1000, ["finetune_router.batch_size = 1000", "96"]),
        (
            "pretrain.0.source_weights",
            {"web": 2},
            ["pretrain.short.source_weights: 'web'", "not of the kind `mixed`"],
        ),
        ("evaluate.tasks.renders.data", "render", ["'render'", "did you mean `renders`"]),
        ("evaluate.tasks.renders", {"data": "renders"}, ["nothing to measure"]),
        ("evaluate.tasks.renders.probe", ["color"], ["renders.probe", "'color'", "`colour`"]),
        ("evaluate.tasks.renders.probe", ["size", "size"], ["probe names size twice"]),
        ("evaluate.tasks.renders.knn", ["color"], ["renders.knn", "'color'", "`colour`"]),
        ("evaluate.tasks.renders.knn", ["size", "size"], ["knn names size twice"]),
        ("evaluate.tasks.renders.retrieval", {"captions": ["a", "a"]}, ["names a twice"]),
        ("evaluate.tasks.renders.retrieval", {"protocol": "karpathy"}, ["five_captions"]),
        ("evaluate.tasks.renders.robustness", {}, ["nothing is reduced", "Hint"]),
        ("evaluate.tasks.renders.robustness", {"image": ["resize"]}, ["drops no patch"]),
        ("evaluate.tasks.renders.robustness", {"image": ["grid", "grid"]}, ["twice"]),
        ("evaluate.tasks.renders.robustness", {"text": [900]}, ["text_length", "Hint: fewer"]),
        ("evaluate.tasks.renders.given", [["color"]], ["renders.given", "'color'", "`colour`"]),
        ("evaluate.tasks.renders.given", [["size", "size"]], ["names size twice"]),
        (
            "evaluate.tasks.renders.given",
            [["size", "shape"], ["shape", "size"]],
            ["given names shape+size twice"],
        ),
        (
            "evaluate.tasks.renders",
            {"data": "renders", "given": [["size"]], "zero_shot": [{"label": "size"}]},
            ["is a kind of retrieval", "retrieval: true"],
        ),
        ("download.train.kind", "tar", ["download.train", '"tar"', "tars"]),
        ("download.train", None, ["no `train`"]),
        ("model.name", "ViT-B-16", ["either `name` or `config`"]),
        ("pretrain.1.name", "short", ["phase names must differ"]),
        ("seed", -1, ["seed = -1"]),
        ("model.config.vision_cfg.widht", 3, ["unknown key `widht`", "did you mean `width`"]),
        ("model.config.embed_dim", None, ["config lacks embed_dim"]),
        ("model.config.text_cfg", 3, ["config.text_cfg must be a mapping"]),
        ("model.config.embd_dim", 3, ["unknown key `embd_dim`", "did you mean `embed_dim`"]),
        ("download.train.mention", {"color": 0.5}, ["download.train.mention.color", "colour"]),
        (
            "index.vocabulary",
            "wordpiece",
            ["model.config: text_cfg.pool_type = argmax", "end token", "pool_type: last"],
        ),
        (
            "model.config.text_cfg.hf_tokenizer_name",
            "bert-base-uncased",
            ["model.config: a Hugging Face tokenizer is not supported", "BERT's without [SEP]"],
        ),
        (
            "model.config.text_cfg",
            {
                "hf_tokenizer_name": "bert-base-uncased",
                "tokenizer_kwargs": {"strip_sep_token": True},
            },
            ["hf_tokenizer_name = bert-base-uncased", "index.vocabulary = corpus", "wordpiece"],
        ),
        (
            "model.config.vision_cfg.layers",
            [1, 1, 1, 1],
            ["model.config: a ResNet image tower is not supported"],
        ),
        ("model.config.vision_cfg.patch_size", 0, ["model: config.vision_cfg.patch_size = 0"]),
        ("model.config.vision_cfg.patch_size", "8", ["patch_size = '8' must be a whole number"]),
        ("model.config.text_cfg.layers", 2.5, ["model: config.text_cfg.layers = 2.5"]),
        ("model.config.embed_dim", True, ["model: config.embed_dim = True"]),
        ("model.config.vision_cfg.width", 33, ["width = 33", "head_width = 16", "width: 32"]),
        (
            "model.config.vision_cfg.head_width",
            None,
            ["width = 32", "head_width = 64", "width: 64"],
        ),
        (
            "model.config.text_cfg.heads",
            3,
            ["config.text_cfg: width = 32", "heads = 3", "width: 30"],
        ),
        ("index.wordpiece", "vocab.txt", ["wordpiece = 'vocab.txt'", "vocabulary is corpus"]),
        ("model.preprocess", {"resize_mod": "x"}, ["`resize_mod`", "`resize_mode`"]),
        (
            "pretrain.1.pos_embed",
            "sincos_frozen",
            ["pretrain.full.pos_embed", "before was learned"],
        ),
        (
            "pretrain.0.pos_resize",
            "recompute",
            ["pretrain.short.pos_resize = recompute", "learned"],
        ),
        ("pretrain.0.pos_embed", "sincos", ["pretrain.0.pos_embed", "sincos_frozen"]),
        ("pretrain.0.optim.lr_per_256", 1.0e-5, ["either `lr` or `lr_per_256`", "null"]),
        ("moe.image_layers", [2], ["moe.image_layers = [2]", "has 2 layers", "0 to 1"]),
        ("evaluate.tasks.renders.zero_shot", [{"label": "color"}], ["'color'", "`colour`"]),
        (
            "evaluate.tasks.renders.zero_shot",
            [{"label": "colour", "templates": ["a thing"]}],
            ["'a thing' has no {c}"],
        ),
        (
            "finetune_expert.text_layers",
            [1, 2],
            ["finetune_expert.text_layers = [1, 2]", "text tower has 2 layers", "0 to 1"],
        ),
        (
            "finetune_expert.image_layers",
            [1],
            ["moe.image_layers = all, but finetune_expert.image_layers = [1]", "copies", "[1]}"],
        ),
        (
            "finetune_expert.lock",
            ["text"],
            ["moe.text_layers = all, but finetune_expert.lock = [text]", "moe: {text_layers: []}"],
        ),
        (
            "finetune_expert.image_layers",
            [],
            ["finetune_expert: image_layers = []", "lock: [image]"],
        ),
        ("finetune_expert.lock", ["text", "image"], ["nothing is left to train", "lock one"]),
        ("finetune_expert.short_captions", {"kinds": "x"}, ["`kinds`", "`kind`"]),
        ("pretrain.0.text_pos_resize", "stretch", ["pretrain.short.text_pos_resize = stretch"]),
        ("pretrain.1.text_pos_keep", 4, ["text_pos_keep = 4 has no effect", "linear", "stretch"]),
        (
            "pretrain.1.text_pos_resize",
            "stretch",
            ["pretrain.full.text_pos_keep = 20", "12 positions", "less than 12"],
        ),
        ("baselines", {"moe": {"kind": "mlp"}}, ["moe: a phase or baseline", "another model"]),
        ("baselines", {"control": {}}, ["baselines.control: its name is no kind", "two_experts"]),
        (
            "baselines",
            {"sop": {}},
            ["baselines.sop: its name is no kind", "did you mean `soup`?"],
        ),
        (
            "baselines",
            {"mlp": {"sample": 3}},
            ["unknown key `sample` in baselines.mlp", "samples_seen"],
        ),
        ("baselines", {"x": {"kind": "sup"}}, ['baselines.x.kind = "sup"', "'soup'"]),
        (
            "baselines",
            {"soup": {"samples_seen": 9}},
            ["baselines.soup: samples_seen has no effect"],
        ),
        (
            "baselines",
            {"ensemble": {"optim": {"lr": 1}}},
            ["optim has no effect on kind: ensemble"],
        ),
        ("baselines", {"mlp": {"noise": 0.1}}, ["noise has no effect on kind: mlp", "copies"]),
        ("baselines", {"full": {"lr_experts": 0.1}}, ["lr_experts has no effect on kind: full"]),
        ("baselines", {"mlp": {"samples_seen": 0}}, ["baselines.mlp.samples_seen = 0"]),
        ("finetune_expert.optim.beta2", 1.0, ["finetune_expert.optim.beta2 = 1.0", "less than 1"]),
        ("finetune_expert.crop_scale", [1.0, 0.5], ["crop_scale = [1.0, 0.5]", "rising"]),
        ("finetune_expert.optim.lr", float("inf"), ["finetune_expert.optim.lr", "finite"]),
        ("finetune_expert.optim.lr", True, ["finetune_expert.optim.lr = true", "valid number"]),
        ("pretrain.0.samples_seen", True, ["pretrain.0.samples_seen = true", "valid number"]),
        ("finetune_expert.crop_scale", [True, 1], ["crop_scale = [true, 1]", "valid number"]),
        ("pretrain.0.captions", {"caption": True}, ["captions = {", "valid number"]),
        ("resources.evaluate", {"gpu": 2}, ["resources.evaluate.gpu", "one device"]),
        ("resources.assemble", {"gpu": 2}, ["resources.assemble.gpu", "one device"]),
        ("resources.cluster", {"gpu": 1}, ["resources.cluster.gpu", "uses no devices"]),
        ("resources.shard", {"nodes": 2}, ["resources.shard.nodes", "runs on one node"]),
        ("resources.pretrain", {"jobs": 2}, ["resources.pretrain.jobs", "only embed"]),
        ("resources.pretrain", {"gpu": 3, "nodes": 2}, ["gpu = 3 does not divide", "gpu: 2"]),
        ("resources.index", {"mem_mb": 500}, ["resources.index.mem_mb = 500", "1000"]),
        ("runs", {"a": {"slurm": {}}}, ["run 'a': `slurm` is of the site", "top"]),
        (
            "resources",
            {"pretrain": {"gpu": 3, "nodes": 3}},
            ["pretrain.short.batch_size", "resources.pretrain.nodes = 3", "Hint"],
        ),
        (
            "model",
            {"name": "ViT-B-32", "pretrained": "openai"},
            ["model.pretrained = 'openai'", "index: {vocabulary: full}"],
        ),
        ("slurm", {"devices": "gpu"}, ['slurm.devices = "gpu"', "'gpus'"]),
        ("slurm", {"device_type": "a 1"}, ['slurm.device_type = "a 1"']),
        ("finetune_expert.samples_seen", None, ["missing key `finetune_expert.samples_seen`"]),
    ],
)
def test_a_mistake_is_named_with_its_place_value_and_a_hint(path, value, words):
    with pytest.raises(ConfigError) as error:
        load_config(changed(path, value))
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("expert", "moe"),
    [
        ({"image_layers": [0, 1]}, {}),
        ({"image_layers": [1], "text_layers": [0]}, {"image_layers": [1], "text_layers": []}),
        ({"lock": ["text"]}, {"text_layers": []}),
        ({"text_layers": [0, 1]}, {"text_layers": [0]}),
    ],
    ids=str,
)
def test_experts_may_be_grafted_wherever_they_were_trained(expert, moe):
    raw = copy.deepcopy(SMALL)
    raw["finetune_expert"] |= expert
    raw["moe"] |= moe
    assert load_config(raw)["small"].finetune_expert.lock == expert.get("lock", [])


@pytest.mark.parametrize(
    ("layers", "is_refused"),
    [
        ({}, True),
        ({"image_layers": [0, 1], "text_layers": [1, 0]}, True),
        ({"text_layers": [0]}, False),
    ],
    ids=str,
)
def test_routers_are_compiled_where_blocks_are_left_without_experts(layers, is_refused):
    raw = copy.deepcopy(SMALL)
    raw["moe"] |= layers
    raw["finetune_router"]["compile"] = True
    if not is_refused:
        assert load_config(raw)["small"].finetune_router.compile
        return
    with pytest.raises(
        ConfigError, match=r"finetune_router.compile = true has no effect: every block"
    ):
        load_config(raw)
    raw["moe"] = None
    assert load_config(raw)["small"].finetune_router.compile


def test_classes_of_ones_own_need_templates_before_anything_runs():
    raw = changed("download.pets", {"kind": "class_folder", "folder": "pets"})
    raw["evaluate"]["tasks"]["pets"] = {"data": "pets", "zero_shot": [{}]}
    with pytest.raises(ConfigError, match=r"pets\.zero_shot: label 'class' has no templates.*Hint"):
        load_config(raw)
    raw["evaluate"]["tasks"]["pets"]["zero_shot"] = [{"templates": ["a {c}"]}]
    assert load_config(raw)["small"].evaluate.tasks["pets"].zero_shot[0].label == "class"


def test_experts_may_be_grafted_anywhere_if_they_go_on_learning_there():
    raw = copy.deepcopy(SMALL)
    raw["finetune_expert"] |= {"lock": ["text"]}
    with pytest.raises(ConfigError, match="copies of one MLP"):
        load_config(raw)
    raw["finetune_router"] |= {"train": "experts"}
    assert load_config(raw)["small"].moe.text_layers == "all"


def test_the_example_of_long_texts_is_valid():
    page = (ROOT / "workflow/docs/long_texts.md").read_text()
    example = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    raw = changed("download.train.num_samples", 1000) | example
    run = load_config(raw)["small"]
    assert (run.pretrain[0].text_pos_keep, run.finetune_expert.short_captions.weight) == (20, 1.0)


def test_a_locked_tower_has_no_layers_to_choose():
    raw = changed("finetune_expert.lock", ["text"])
    raw["finetune_expert"]["text_layers"] = [0]
    with pytest.raises(ConfigError, match=r"text_layers = \[0\] has no effect with lock: \[text"):
        load_config(raw)


B32 = {"model": "ViT-B-32", "pretrained": "openai"}


@pytest.mark.parametrize(
    ("number", "phase", "words"),
    [
        (0, {"distillation": {"feature": 1}}, ["distillation needs a reference", "ViT-B-32"]),
        (0, {"init_from": "reference"}, ["init_from: reference needs a reference"]),
        (
            0,
            {"loss": {"kind": "gcl", "margins": "reference"}},
            ["loss.margins: reference needs a reference"],
        ),
        (
            0,
            {"loss": {"margins": "reference"}, "reference": B32},
            ["pretrain.0.loss", "margins has no effect on kind: contrastive", "rgcl_g"],
        ),
        (0, {"reference": B32}, ["references are given, but nothing uses them", "feature: 0.5"]),
        (
            0,
            {"reference": B32, "references": [B32], "distillation": {"feature": 1}},
            ["reference and references are the same setting", "null"],
        ),
        (
            0,
            {"reference": B32 | {"pretraned": "x"}, "distillation": {"feature": 1}},
            ["unknown key `pretraned` in pretrain.0.references.0", "`pretrained`"],
        ),
        (
            0,
            {"reference": B32 | {"scale": 70}, "distillation": {"feature": 1}},
            ["scale = 70.0 has no effect without distillation.affinity"],
        ),
        (
            0,
            {"reference": B32 | {"crops": 3}, "distillation": {"feature": 1}},
            ["crops has no effect without cached: true"],
        ),
        (
            0,
            {"reference": B32, "distillation": {"feature": 1, "affinity_form": "kl"}},
            ["affinity_form = kl has no effect: affinity = 0"],
        ),
        (
            0,
            {"distillation": {"features": 1}},
            ["`features` in pretrain.0.distillation", "`feature`"],
        ),
        (0, {"distillation": {"feature": -1}}, ["pretrain.0.distillation.feature = -1"]),
        (0, {"loss": {"weight": 0}}, ["loss.weight = 0", "nothing to learn", "Hint"]),
        (1, {"lock": ["image", "text"]}, ["lock = [image, text]: nothing is left to train"]),
        (1, {"lock": ["vision"]}, ["pretrain.1.lock", "vision", "'image' or 'text'"]),
        (0, {"lock": ["text"]}, ["pretrain.short.lock = [text]", "no initial weights", "Hint"]),
        (
            0,
            {"loss": {"temperature": "locked"}},
            ["pretrain.short.loss.temperature = locked", "no initial weights"],
        ),
        (
            1,
            {"loss": {"temperature": "locked"}, "temperature": 0.01},
            ["temperature = 0.01 has no effect", "locked", "constant"],
        ),
        (
            1,
            {"temperature": 0.01},
            ["pretrain.full.temperature = 0.01 has no effect", "comes with the weights", "Hint"],
        ),
        (
            1,
            {"loss": {"kind": "rgcl_g", "temperature": "locked", "lr_tau": 1e-4}},
            ["lr_tau has no effect: the temperature is locked"],
        ),
        (
            1,
            {"init_from": "reference", "reference": B32},
            ["pretrain.full.init_from = reference", "the phase before"],
        ),
    ],
)
def test_a_mistake_about_references_and_locks_is_named(number, phase, words):
    raw = copy.deepcopy(SMALL)
    raw["pretrain"][number] |= phase
    with pytest.raises(ConfigError) as error:
        load_config(raw)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_bounds_of_a_temperature_that_comes_with_weights_leave_the_phases_alone():
    """0.07, which no phase after the first starts from, need not be within; elsewhere it must."""
    raw = copy.deepcopy(SMALL)
    raw["pretrain"][1] |= {"loss": {"tau_bounds": [0.01, 0.05]}}
    (run,) = load_config(raw).values()
    assert run.pretrain[1].loss.tau_bounds == (0.01, 0.05)
    outside = r"pretrain.full.temperature = 0.07 is outside of loss.tau_bounds = \[0.01, 0.05\]"
    raw["pretrain"][1]["loss"] |= {"kind": "rgcl", "lr_tau": 0.01, "lr_tau_schedule": "const"}
    with pytest.raises(ConfigError, match=outside):
        load_config(raw)


def test_null_takes_back_what_an_overlay_inherits():
    raw = copy.deepcopy(SMALL)
    more = {"evaluate": {"tasks": {"more": raw["evaluate"]["tasks"]["renders"]}}, "seed": 3}
    taken = {
        "evaluate": {"tasks": {"more": None}},
        "seed": None,
        "cluster": None,
        "baselines": None,
    }
    (run,) = load_config({**merge(raw, more), "runs": {"a": taken}}).values()
    assert set(run.evaluate.tasks) == {"renders"}
    assert (run.seed, run.baselines) == (0, {}) and run.cluster == ClusterSettings()
    (run,) = load_config({**raw, "runs": {"a": {"moe": None}}}).values()
    assert run.moe is None
    with pytest.raises(ConfigError, match="missing key `pretrain`"):
        load_config({**raw, "pretrain": None})


def test_null_takes_back_any_setting_of_a_section():
    """A run beside a preset of another loss or optimizer, which has settings of its own."""
    raw = copy.deepcopy(SMALL)
    raw["pretrain"][0] |= {"loss": {"kind": "rgcl_g", "rho": 6.5, "gamma": {"min": 0.3}}}
    raw["pretrain"][0]["optim"] |= {"beta2": 0.95}
    phase = {"optim": {"name": "sgd", "beta2": None}, "text_reduction": None, "crop_scale": None}
    plain = {"kind": "contrastive", "rho": None, "gamma": None}
    raw["runs"] = {
        "told": {"pretrain": {"short": phase | {"loss": plain}}},
        "whole": {"pretrain": {"short": phase | {"loss": None}}},
        "inner": {"pretrain": {"short": {"loss": {"gamma": {"min": None}}}}},
    }
    told, whole, inner = (run.pretrain[0] for run in load_config(raw).values())
    assert told.loss == whole.loss == LossSettings() and told.loss.kind == "contrastive"
    assert (told.optim.name, told.optim.beta2, told.crop_scale) == ("sgd", 0.98, (0.9, 1.0))
    assert (inner.loss.rho, inner.loss.gamma.min) == (6.5, 0.2)
    raw["runs"] = {"a": {"pretrain": {"short": {"samples_seen": None}}}}
    with pytest.raises(ConfigError, match=r"missing key `pretrain.0.samples_seen`"):
        load_config(raw)


def test_one_reference_is_a_list_of_one_and_an_overlay_can_replace_it():
    raw = copy.deepcopy(SMALL)
    raw["pretrain"][0] |= {"reference": B32, "distillation": {"feature": 0.5}}
    (run,) = load_config(raw).values()
    assert [each.model for each in run.pretrain[0].references] == ["ViT-B-32"]
    two = [B32, {"model": "ViT-L-14", "pretrained": "openai"}]
    raw["runs"] = {"two": {"pretrain": {"short": {"reference": None, "references": two}}}}
    assert [each.model for each in load_config(raw)["two"].pretrain[0].references] == [
        "ViT-B-32",
        "ViT-L-14",
    ]


def test_a_mistake_in_an_overlay_names_the_run():
    with pytest.raises(ConfigError, match=r"run 'top9'.*top_k = 9"):
        load_config(changed("runs.top9", {"moe": {"top_k": 9}}))


def test_the_keys_of_models_are_those_of_open_clip():
    import dataclasses
    import inspect

    import open_clip

    from clipgraft.model_settings import MODEL_KEYS, TEXT_KEYS, VISION_KEYS

    arguments = set(inspect.signature(open_clip.CustomTextCLIP).parameters)
    assert set(MODEL_KEYS) == arguments | {"custom_text"}
    assert set(VISION_KEYS) == {f.name for f in dataclasses.fields(open_clip.CLIPVisionCfg)}
    assert set(TEXT_KEYS) == {f.name for f in dataclasses.fields(open_clip.CLIPTextCfg)}


def test_attributes_are_those_of_the_generator():
    from typing import get_args

    from clipgraft.data.shapes import ATTRIBUTES, DEFAULT_NOISE
    from clipgraft.sources import Attribute, ShapesSource

    assert get_args(Attribute) == tuple(ATTRIBUTES)
    assert ShapesSource(kind="shapes").noise == DEFAULT_NOISE


def test_an_overlay_changes_only_what_it_names():
    runs = load_config(changed("runs.one", {"moe": {"top_k": 1}}))
    assert runs["one"].moe.top_k == 1
    assert runs["one"].moe.num_experts == runs["small"].moe.num_experts
    assert runs["one"].pretrain == runs["small"].pretrain


def test_an_overlay_lays_a_phase_over_the_one_of_that_name():
    runs = load_config(changed("runs.wide", {"pretrain": {"short": {"optim": {"lr": 0.5}}}}))
    before, after = runs["small"].pretrain, runs["wide"].pretrain
    assert after[0].optim.lr == 0.5 and after[0].optim.warmup == before[0].optim.warmup
    assert after[0].image_size == before[0].image_size and after[1] == before[1]
    other = [SMALL["pretrain"][1]]
    assert len(load_config(changed("runs.one", {"pretrain": other}))["one"].pretrain) == 1


def test_two_axes_may_change_the_same_phase():
    sweep = {
        "image": {"i8": {"pretrain": {"short": {"image_size": 8}}}},
        "text": {"t6": {"pretrain": {"short": {"text_length": 6}}}, "t12": None},
        "seed": {0: {"seed": 0}, 1: {"seed": 1}},
    }
    runs = load_config(changed("sweep", sweep))
    assert list(runs) == ["i8-t6-0", "i8-t6-1", "i8-t12-0", "i8-t12-1", "small"]
    found = {
        name: (run.pretrain[0].image_size, run.pretrain[0].text_length, run.seed)
        for name, run in runs.items()
    }
    assert found["i8-t6-1"] == (8, 6, 1) and found["i8-t12-0"] == (8, 12, 0)
    assert found["small"] == (16, 12, 0)
    alone = {key: value for key, value in changed("sweep", sweep).items() if key != "runs"}
    assert list(load_config(alone)) == list(runs)[:-1]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("runs.x", {"pretrain": {"shrt": {}}}, ["run 'x'", "`shrt` in pretrain", "`short`"]),
        ("sweep.a.x", {"pretrain": {"fll": {}}}, ["run 'x'", "`fll` in pretrain", "`full`"]),
        ("sweep", ["a"], ["sweep must map names to overlays", "['a']"]),
        ("sweep.a", {}, ["sweep.a has no points"]),
        ("sweep.a.x", 3, ["sweep.a.x must be a mapping", "3"]),
        ("sweep.a.x-y", {}, ["sweep.a", "'x-y'", "joins"]),
        ("sweep.a.small", {"seed": 1}, ["runs.small", "the sweep has that name"]),
        ("runs.sweep", {}, ["runs.sweep", "the sweep has that name"]),
        ("sweep.a.x", {"scaling": {"title": "x"}}, ["sweep.a.x sets `scaling`"]),
        ("scaling.task", "render", ["scaling.task = 'render'", "`renders`"]),
        ("scaling.label", "color", ["scaling.label = 'color'", "`colour`"]),
        ("finetune_router", None, ["missing key `finetune_router`", "moe: null"]),
        (
            "pretrain",
            {"short": {"image_size": 8}},
            ["pretrain = ", "valid list", "later config files"],
        ),
    ],
)
def test_a_mistake_in_a_sweep_is_named(path, value, words):
    with pytest.raises(ConfigError) as error:
        load_config(changed(path, value))
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_another_kind_of_source_replaces_the_settings_of_the_first():
    merged = merge({"kind": "shapes", "num_samples": 3}, {"kind": "folder", "folder": "x"})
    assert merged == {"kind": "folder", "folder": "x"}


def test_a_kind_that_is_no_word_is_named_also_in_an_overlay():
    with pytest.raises(ConfigError, match=r"run 'a': download\.train = .*\['shapes'\]"):
        load_config({"runs": {"a": {"download": {"train": {"kind": ["shapes"]}}}}})


@pytest.mark.parametrize("key", ["image_reduction", "text_reduction", "text_mask"])
def test_another_kind_of_reduction_replaces_the_settings_of_the_first(key):
    base = {"pretrain": [{"name": "short", key: {"kind": "random", "keep": 0.3}}]}
    merged = merge(base, {"pretrain": {"short": {key: {"kind": "grid"}}}})
    assert merged["pretrain"][0][key] == {"kind": "grid"}


def test_another_kind_of_loss_or_baseline_keeps_what_it_is_not_told_to_change():
    raw = changed("pretrain.0.loss", {"tau_bounds": [0.02, 0.9], "weight": 0.5})
    raw["baselines"] = {"mlp": {"samples_seen": 64}}
    overlay = {"pretrain": {"short": {"loss": {"kind": "siglip"}}}}
    raw["runs"] = {"small": overlay | {"baselines": {"mlp": {"kind": "full"}}}}
    run = load_config(raw)["small"]
    loss = run.pretrain[0].loss
    assert (loss.kind, loss.tau_bounds, loss.weight) == ("siglip", (0.02, 0.9), 0.5)
    assert (run.baselines["mlp"].kind, run.baselines["mlp"].samples_seen) == ("full", 64)
    overlay = {"finetune_expert": {"short_captions": {"kind": "long"}}}
    raw["finetune_expert"]["short_captions"] = {"weight": 0.3}
    raw["runs"] = {"small": overlay}
    short = load_config(raw)["small"].finetune_expert.short_captions
    assert (short.kind, short.weight) == ("long", 0.3)


def test_an_overlay_over_a_phase_without_a_name_is_refused():
    raw = changed("pretrain.1.name", None)
    raw["runs"] = {"x": {"pretrain": {"short": {"image_size": 8}}}}
    with pytest.raises(
        ConfigError, match=r"run 'x': pretrain: 1 of 2 items have no `name` \(short"
    ):
        load_config(raw)


def test_settings_cannot_be_changed_after_validation():
    run = load_config(SMALL)["small"]
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3


@pytest.mark.parametrize(
    "path",
    [
        *sorted(ROOT.glob("tests/config/*.yaml")),
        ROOT / "config.yaml",
        ROOT / "presets/inverse_scaling.yaml",
    ],
)
def test_every_config_of_the_repository_is_valid(path: Path):
    assert read_config(path)


def test_the_overlay_of_seeds_makes_three_runs_of_flickr8k():
    paths = ("flickr8k.yaml", "overlays/flickr8k_seeds.yaml")
    runs = read_config(*(ROOT / "tests/config" / path for path in paths))
    assert {name: run.seed for name, run in runs.items()} == {
        "flickr8k": 0,
        "flickr8k_1": 1,
        "flickr8k_2": 2,
    }


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("presets/experts_*.yaml")), ids=lambda path: path.stem
)
def test_the_header_of_a_study_names_its_files_and_its_runs(path: Path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    (files,) = [line.split("--configfile ")[1].split() for line in header if "--configfile" in line]
    (compared,) = [line.split(" compare ")[1].split() for line in header if " compare " in line]
    raw = read_layers(*(ROOT / file for file in files))
    planned = plan_runs(load_config(raw), sweep_points(raw))
    assert files[-1] == f"presets/{path.name}"
    assert set(compared) <= set(planned)


def test_positions_follow_from_phase_to_phase():
    raw = changed("pretrain.0.pos_embed", "sincos_frozen")
    raw["pretrain"][1]["pos_resize"] = "recompute"
    load_config(raw)
    raw["pretrain"][1]["pos_embed"] = "learned"
    with pytest.raises(ConfigError, match=r"pretrain.full.pos_resize = recompute"):
        load_config(raw)


def test_a_file_that_is_not_there_or_not_yaml_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml does not exist"):
        read_config(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    (tmp_path / "latin.yaml").write_bytes("seed: 1 # é".encode("latin-1"))
    for name in ("bad", "latin"):
        with pytest.raises(ConfigError, match=rf"{name}\.yaml is not YAML"):
            read_config(tmp_path / f"{name}.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed: 0\nmoe: {}\nseed: 1", "`seed`.*line 1.*line 3"),
        ("a: {lr: 1, lr: 2}", "`lr`.*line 1"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path: Path, text, named):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"bad\.yaml: {named}.*Hint"):
        read_config(tmp_path / "bad.yaml")
    (tmp_path / "fine.yaml").write_text("a: &a {lr: 1}\nb: {<<: *a, lr: 2}")
    assert read_layers(tmp_path / "fine.yaml")["b"] == {"lr": 2}


def test_the_schema_for_editors_is_up_to_date():
    stored = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    assert stored == schema(), "run `make schema`"


def test_weights_name_sources_of_the_training_set():
    train = SMALL["download"]["train"]
    raw = changed("download.train", {"kind": "mixed", "sources": {"web": train, "own": train}})
    raw["finetune_expert"]["source_weights"] = {"web": 2.5, "own": 0}
    load_config(raw)
    raw["finetune_expert"]["source_weights"] = {"owns": 1}
    with pytest.raises(ConfigError, match=r"finetune_expert\.source_weights: 'owns'.*mean `own`"):
        load_config(raw)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"kind": "siglip"},
        {"kind": "gcl", "gamma": {"schedule": "scent"}},
        {"kind": "rgcl", "lr_tau": 0.0133, "lr_tau_schedule": "const"},
        {"kind": "rgcl_g", "rho": 6.5, "lr_tau": 2e-4, "lr_tau_schedule": "step_thresh"},
    ],
)
def test_a_loss_is_valid_again_when_all_its_settings_are_handed_on(raw):
    loss = LossSettings(**raw)
    assert LossSettings(**json.loads(loss.model_dump_json())) == loss


# --- reductions -----------------------------------------------------------------------------------------------


def test_a_name_alone_is_a_reduction_with_its_defaults():
    for key, name, spelled_out in (
        ("image_reduction", "random", {"kind": "random", "keep": 0.5}),
        ("image_reduction", "grid", {"kind": "grid", "cell": "random"}),
        ("image_reduction", "block", {"kind": "block", "keep": 0.25}),
        ("text_reduction", "block", {"kind": "block"}),
        ("text_reduction", "syntax", {"kind": "syntax", "tie": "first", "compat": None}),
        ("text_reduction", "frequency", {"kind": "frequency", "threshold": 1e-4}),
    ):
        for raw in (name, spelled_out):
            phase = load_config(changed(f"pretrain.0.{key}", raw))["small"].pretrain[0]
            assert phase.model_dump()[key] == spelled_out


@pytest.mark.parametrize("key", ["text_mask", "reduction_mask"])
@pytest.mark.parametrize(("value", "kind"), [("simple", "block"), ("syntax", "syntax")])
def test_the_words_of_clipa_and_open_clip_are_read(key, value, kind):
    text_cfg = "model.config.text_cfg"
    for path, raw in (
        (f"pretrain.0.{key}", value),
        (f"{text_cfg}.{key}", value),
        (f"{text_cfg}.tokenizer_kwargs", {key: value}),
    ):
        first, second = load_config(changed(path, raw))["small"].pretrain
        assert first.text_reduction.kind == kind
        # What a model config asks for, it asks for in all phases.
        assert second.text_reduction.kind == (kind if text_cfg in path else "truncate")


def test_a_phase_overrides_what_the_model_config_asks_for():
    raw = changed("model.config.text_cfg.text_mask", "syntax")
    raw["pretrain"][1]["reduction_mask"] = "random"
    phases = load_config(raw)["small"].pretrain
    assert [phase.text_reduction.kind for phase in phases] == ["syntax", "random"]


def test_two_words_for_one_reduction_are_refused():
    raw = changed("pretrain.0.text_mask", "block")
    raw["pretrain"][0]["text_reduction"] = "block"
    with pytest.raises(
        ConfigError, match=r"pretrain\.0: text_reduction and text_mask are the same"
    ):
        load_config(raw)
    raw = changed("model.config.text_cfg.text_mask", "block")
    raw["model"]["config"]["text_cfg"]["tokenizer_kwargs"] = {"reduction_mask": "random"}
    with pytest.raises(ConfigError, match="asks for several text reductions"):
        load_config(raw)


def test_a_grid_that_windows_do_not_fill_is_found_before_anything_runs():
    raw = changed("pretrain.0.image_reduction", "grid")
    assert load_config(raw)["small"].pretrain[0].image_reduction.kind == "grid"  # 16 px: 2 x 2
    raw["pretrain"][0]["image_size"] = 24
    with pytest.raises(ConfigError, match=r"pretrain\.short\.image_reduction: grid .* not 3 x 3"):
        load_config(raw)
