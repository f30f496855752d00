"""A whole results tree as a planned run would leave it: real samples, made-up training."""

import io
import json
import math
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from clipgraft.baseline_settings import KINDS
from clipgraft.data.index import build_index
from clipgraft.data.samples import Samples
from clipgraft.data.shapes import ATTRIBUTES, draw_sample
from clipgraft.evaluation.answers import answers_of
from clipgraft.evaluation.choices import TowerChoices, examples, information
from clipgraft.evaluation.evaluate import retrieval_examples
from clipgraft.evaluation.given import evaluate_given, groups_of
from clipgraft.evaluation.retrieval import Captions, evaluate_retrieval
from clipgraft.evaluation.zero_shot import evaluate_zero_shot
from clipgraft.planning import plan_run
from clipgraft.run_settings import RunSettings
from clipgraft.settings import IndexJob
from clipgraft.versions import PlannedJob

SECONDS = {
    "pretrain": 120.0,
    "embed": 6.0,
    "cluster": 3.0,
    "finetune_expert": 60.0,
    "assemble": 1.5,
}
ROUND_ATTRIBUTES = ("colour", "shape", "texture")  # what the clusters of round 1, 2, 3 find


# One as long as an expert, and all kinds that cost as much as experts and routers together.
BASELINES = {"short_mlp": {"kind": "mlp", "samples_seen": 6_000}, **{kind: {} for kind in KINDS}}


def settings(
    num_experts: int = 4,
    phases: int = 2,
    labels: tuple[str, ...] = ("colour", "shape", "texture"),
    baselines: Mapping[str, Any] = BASELINES,
) -> RunSettings:
    """Settings of a small run."""
    optim = {"lr": 1e-3}
    train = {"batch_size": 64, "optim": optim}
    phase = [
        {"name": "short", "image_size": 32, "text_length": 9, "samples_seen": 40_000, **train},
        {"name": "full", "image_size": 64, "text_length": 18, "samples_seen": 12_000, **train},
    ]
    zero_shot = [{"label": label} for label in labels]
    learnt = {"probe": labels, "given": [labels[:1], labels[:2]] if labels else []}
    learnt |= {"knn": list(labels) or None, "robustness": {"image": ["grid"], "text": [9]}}
    tasks = {
        split: {"data": split, "retrieval": True, "zero_shot": zero_shot, **learnt}
        for split in ("renders", "combinations")
    }
    sources = {
        name: {"kind": "shapes", "split": name, "num_samples": num}
        for name, num in (("train", 240), ("renders", 90), ("combinations", 60))
    }
    return RunSettings.model_validate(
        {
            "seed": 3,
            "download": sources,
            "model": {"config": {"embed_dim": 16, "vision_cfg": {}, "text_cfg": {}}},
            "pretrain": phase[2 - phases :],
            "finetune_expert": {"samples_seen": 6_000, **train},
            "moe": {"num_experts": num_experts},
            "baselines": baselines,
            "finetune_router": {"samples_seen": 4_000, **train},
            "evaluate": {"tasks": tasks},
        }
    )


def build_tree(results: Path, run: RunSettings, *, with_labels: bool = True) -> dict[str, Path]:
    """Write every job of a run but the report; job name to folder, as `report` is given them."""
    jobs = [job for job in plan_run("demo", run) if job.stage != "report"]
    for job in jobs:
        folder = results / job.folder
        folder.mkdir(parents=True, exist_ok=True)
        facts = _WRITERS[job.stage](results, job, folder, with_labels) or {}
        _write_manifest(results, job, folder, facts)
    return {job.name: results / job.folder for job in jobs}


def _write_manifest(results: Path, job: PlannedJob, folder: Path, facts: dict) -> None:
    def relative(name: str) -> str:
        return os.path.relpath(results / job.inputs[name].folder / "manifest.json", folder)

    manifest = {
        "format": 1,
        "stage": job.stage,
        "name": job.name,
        "id": f"{job.version}-id",
        "settings": job.settings,
        "git": "0123456789ab",
        "inputs": {name: {"manifest": relative(name), "id": "x"} for name in job.inputs},
        "outputs": {"model.safetensors": {"bytes": 2**20, "sha256": "ab" * 32}},
        "packages": {"python": "3.11.2", "torch": "2.11.0"},
        "hardware": {"processor": "Example CPU", "cores": 2, "devices": []},
        "seconds": SECONDS.get(job.stage, 4.0),
        "peak_memory_mb": 512,
        **facts,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _download(results: Path, job: PlannedJob, folder: Path, with_labels: bool) -> None:
    source = job.settings["source"]
    split, num = source["split"], source["num_samples"]
    outcomes = [("lost", "", "failed", "HTTP 404"), ("slow", "", "failed", "timed out")]
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(num + 3):
            sample = draw_sample(3, split, i, num_captions=2)
            key = f"{i:06d}"
            image = sample.image if i < num else sample.image.resize((8, 8))  # rejected: too small
            if i % 5 == 0 and i < num:
                image = image.resize((64 + i, 80 + i // 2))
            about = {"captions": sample.captions, **(sample.attributes if with_labels else {})}
            _add(tar, f"{key}.jpg", _jpeg(image))
            _add(tar, f"{key}.json", json.dumps(about).encode())
            outcomes.append((key, "00000.tar", "ok", ""))
    if with_labels:
        classes = {name: list(values) for name, values in ATTRIBUTES.items()}
        (folder / "classes.json").write_text(json.dumps(classes))
    columns = dict(
        zip(("key", "file", "status", "message"), zip(*outcomes, strict=True), strict=True)
    )
    pq.write_table(pa.table({k: list(v) for k, v in columns.items()}), folder / "outcomes.parquet")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _jpeg(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _index(results: Path, job: PlannedJob, folder: Path, with_labels: bool) -> dict:
    download = results / job.inputs["download"].folder
    return build_index(IndexJob(**job.settings), download, folder, threads=1)


def _nothing(results: Path, job: PlannedJob, folder: Path, with_labels: bool) -> None:
    return None


def _train_samples(results: Path, job: PlannedJob) -> Samples:
    return Samples.open(results / job.inputs["index"].folder)


def _train(results: Path, job: PlannedJob, folder: Path, with_labels: bool) -> dict:
    """Curves that fall, from a level that depends on the stage."""
    seen = job.settings["samples_seen"]
    rng = np.random.default_rng(int(job.version, 16))
    is_expert = job.name.removeprefix("finetune_expert/").isdigit()
    start = {"pretrain": 4.15, "finetune_expert": 2.9 if is_expert else 1.4}.get(job.stage, 1.3)
    if job.name == "pretrain/full" and "init" in job.inputs:
        start = 1.9
    experts = 4
    uniform = np.full(experts, 1 / experts)
    taste = rng.dirichlet(np.full(experts, 4.0), size=(2, 3))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 61):
            share = step / 60
            row = {
                "step": step,
                "samples_seen": round(seen * share),
                "seconds": 2.0 * step,
                "loss": 1.1 + (start - 1.1) * math.exp(-3 * share) + 0.03 * rng.normal(),
                "tau": 0.07 - 0.03 * share,
                "lr": 1e-3 * math.cos(share * math.pi / 2),
                "samples_per_second": 900 + 30 * rng.normal(),
                "data_wait": 0.02,
            }
            if job.name == "pretrain/short":
                row["gamma"] = 1 - 0.8 * share
            if job.stage == "finetune_router":
                load = (1 - share) * uniform + share * taste
                row |= {"contrastive": row["loss"] - 0.01, "balance": 1 + 0.2 * share**2}
                row |= {"entropy": math.log(experts) - 0.5 * share}
                row |= {"load_image": load[0].tolist(), "load_text": load[1].tolist()}
                for tower in ("image", "text"):
                    row[f"entropy_{tower}"] = [row["entropy"] - 0.1 * n * share for n in range(3)]
            file.write(json.dumps(row) + "\n")
    _model(results, job, folder, with_labels)
    tokens = {"image_tokens": 17, "text_tokens": 18}
    return {"samples_seen": seen, "healthy_loads": [0.0025, 0.475], **tokens}


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 32, "layers": 3},
    "text_cfg": {"context_length": 18, "width": 32, "layers": 3, "vocab_size": 100},
}


def _model(results: Path, job: PlannedJob, folder: Path, with_labels: bool) -> None:
    """What a model folder says of its model, as planned."""
    assembled, moe = job.inputs.get("init", job), None
    if assembled.stage == "assemble":
        layers = {"image_layers": [0, 1, 2], "text_layers": [0, 1, 2]}
        moe = {key: assembled.settings[key] for key in ("num_experts", "top_k")} | layers
    (folder / "model.json").write_text(json.dumps({"config": TINY, "moe": moe}))


def _embed(results: Path, job: PlannedJob, folder: Path, with_labels: bool) -> None:
    """Image embeddings in three heaps, by the attribute that the round is to find."""
    samples = _train_samples(results, job)
    round_number = int(job.name.rpartition("/")[2])
    np.save(folder / "image.npy", _heaps(samples, round_number, with_labels).astype(np.float16))


def _heaps(samples: Samples, round_number: int, with_labels: bool) -> np.ndarray:
    rng = np.random.default_rng(round_number)
    heap = rng.integers(0, 3, len(samples))
    if with_labels:
        heap = samples.labels(ROUND_ATTRIBUTES[round_number]) % 3
    points = np.eye(16)[heap] + 0.15 * rng.normal(size=(len(samples), 16))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _cluster(results: Path, job: PlannedJob, folder: Path, with_labels: bool) -> None:
    image_ND = np.load(results / job.inputs["embed"].folder / "image.npy").astype(float)
    image_N = image_ND[:, :3].argmax(1)
    rng = np.random.default_rng(int(job.name.rpartition("/")[2]))
    text_N = np.where(rng.random(len(image_N)) < 0.7, image_N, rng.integers(0, 3, len(image_N)))
    label_N = 3 * image_N + text_N
    if "previous" in job.inputs:
        label_N = label_N + 9 * np.load(results / job.inputs["previous"].folder / "labels.npy")
    label_N = np.unique(label_N, return_inverse=True)[1]
    np.save(folder / "clusters.npy", np.stack([image_N, text_N], 1).astype(np.int32))
    np.save(folder / "labels.npy", label_N.astype(np.int32))
    np.save(folder / "image_centroids.npy", np.eye(16, dtype=np.float32)[:3])
    sizes = np.bincount(label_N).tolist()
    sides = {
        side: {"num_clusters": 3, "sizes": np.bincount(of, minlength=3).tolist(), "inertia": 0.5}
        for side, of in (("image", image_N), ("text", text_N))
    }
    agreement = {"image": 0.08, "text": 0.21} if "previous" in job.inputs else None
    about = {"num_labels": len(sizes), "sizes": sizes, "agreement": agreement, **sides}
    (folder / "clusters.json").write_text(json.dumps(about))


# How much of the truth a model's made-up features hold.
SKILL = {
    "untrained": 0.1,
    "short": 0.22,
    "base": 0.3,
    "upcycled": 0.31,
    "moe": 0.36,
    "ensemble": 0.34,
}


def _evaluate(results: Path, job: PlannedJob, folder: Path, with_labels: bool) -> None:
    _, key, task = job.name.split("/")
    skill = SKILL.get(key, 0.32)
    if key.startswith("expert_"):
        skill = 0.3 + 0.01 * int(key[-1])
    samples = _train_samples(results, job)
    captions_of = samples.all_captions()
    captions = Captions.of(captions_of)
    generator = torch.Generator().manual_seed(1)
    truth = F.normalize(torch.randn(len(samples), 32, generator=generator), dim=-1)

    def seen(of: torch.Tensor, amount: float) -> torch.Tensor:
        noise = F.normalize(torch.randn(of.shape, generator=generator), dim=-1)
        return F.normalize(amount * of + (1 - amount) * noise, dim=-1)

    text_UD = torch.zeros(len(captions.texts), 32)
    text_UD[captions.text_P] = truth[captions.image_P]
    image_ND, text_UD = seen(truth, skill), seen(text_UD, skill)
    result = {
        "task": task,
        "retrieval": evaluate_retrieval(image_ND, text_UD, captions),
        "zero_shot": {},
    }
    directions, label_Ns = {}, {}
    for number, zero_shot in enumerate(job.settings["zero_shot"]):
        label_N = torch.from_numpy(samples.labels(zero_shot["label"]))
        classes = samples.label_names[zero_shot["label"]]
        direction = F.normalize(torch.randn(len(classes), 32, generator=generator), dim=-1)
        guess = seen(direction[label_N], skill - 0.07 * number)
        directions[zero_shot["label"]], label_Ns[zero_shot["label"]] = direction, label_N.numpy()
        scores = evaluate_zero_shot(guess, direction, label_N, classes)
        result["zero_shot"][zero_shot["label"]] = {**scores, "templates": ["a {c}"]}
    labels = {label: samples.labels(label) for label in job.settings["probe"]}
    result["probe"] = {
        name: {
            "acc": min(1.0, round(0.2 + skill * float(torch.rand((), generator=generator) + 1), 6)),
            "spread": 0.02,
            "chance": round(1 / len(samples.label_names[name]), 6),
            "num_samples": len(samples),
        }
        for name in labels
    }
    knn = (job.settings["knn"] or {"labels": []})["labels"]
    about = {"spread": 0.03, "num_neighbours": 20, "num_samples": len(samples)}
    result["knn"] = {name: {"acc": skill, "chance": 0.2, **about} for name in knn}
    result["robustness"] = []
    if job.settings["robustness"]:
        for tower, num, share in (("image", 16, 1.0), ("image", 4, 0.6), ("text", 18, 1.0)):
            about = {"tower": tower, "reduction": "none" if share == 1 else "grid random"}
            metrics = {"mean_R@1": share * result["retrieval"]["mean_R@1"]}
            result["robustness"].append({**about, "num_tokens": num, "metrics": metrics})
    result["given"] = {}
    for names in job.settings["given"]:
        rows = groups_of({name: samples.labels(name) for name in names}, captions_of, "given")
        scores = evaluate_given(image_ND, text_UD, captions, captions_of, rows)
        result["given"]["+".join(names)] = scores
    result["choices"] = {}
    measured = job.inputs.get("model")  # an ensemble has several
    if measured and measured.stage == "finetune_router":
        result["choices"] = _choices(folder, samples, captions, labels)
    if not job.settings["retrieval"]:
        result |= {"retrieval": None, "given": {}}
    if key != "untrained":
        answers = answers_of(image_ND, text_UD, captions, directions, label_Ns)
        pq.write_table(answers, folder / "answers.parquet")
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "examples.json").write_text(
        json.dumps(retrieval_examples(image_ND, text_UD, captions))
    )


def _choices(folder: Path, samples: Samples, captions: Captions, labels: dict) -> dict:
    """Tokens that follow the first label in one layer, their place in another, and nothing in the third."""
    rng = np.random.default_rng(4)
    label_N = next(iter(labels.values()), np.arange(len(samples)))
    lengths = {"image": np.full(len(samples), 16), "text": np.full(len(captions.texts), 5)}
    towers = {}
    for tower, length_I in lengths.items():
        item_R = np.repeat(np.arange(len(length_I)), length_I)
        key_R = np.concatenate([np.arange(length) for length in length_I])
        noise_R = rng.integers(0, 4, len(item_R))
        columns = [label_N[item_R % len(label_N)] % 4, key_R % 4, noise_R]
        expert_RM = np.stack(columns, 1)
        counts = []
        for row_R in (item_R, key_R):
            counts.append(np.zeros((max(row_R) + 1, 3, 4), np.int64))
            np.add.at(counts[-1], (row_R[:, None], np.arange(3), expert_RM), 1)
        shown = {item: (key_R[item_R == item], expert_RM[item_R == item]) for item in (0, 3, 7, 9)}
        towers[tower] = TowerChoices([0, 1, 2], *counts, shown)
    pieces = ["small", "red-", "star", "on", "mint"] * 4
    maps = examples(towers, [0, 7, 9], [0, 3], (4, 4), pieces)
    maps |= {"resize_mode": "shortest", "interpolation": "bicubic"}
    (folder / "choices.json").write_text(json.dumps(maps))
    own = {"image": (np.arange(len(samples)), labels, "patch")}
    of_texts = {name: label_N[captions.image_P.numpy()] for name, label_N in labels.items()}
    own["text"] = (captions.text_P.numpy(), of_texts, "token")
    return {
        tower: {"layers": [0, 1, 2], "num_experts": 4, "information": information(of, *own[tower])}
        for tower, of in towers.items()
    }


_WRITERS = {
    "download": _download,
    "index": _index,
    "shard": _nothing,
    "pretrain": _train,
    "embed": _embed,
    "cluster": _cluster,
    "finetune_expert": _train,
    "assemble": _model,
    "finetune_router": _train,
    "soup": _model,
    "evaluate": _evaluate,
}


def build_bare_tree(results: Path) -> dict[str, Path]:
    """A run with one phase, two experts, and data without labels."""
    run = settings(num_experts=2, phases=1, labels=(), baselines={"mlp": {"samples_seen": 6_000}})
    return build_tree(results, run, with_labels=False)


def with_evalset(
    tree: Mapping[str, Path], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Path]:
    """A tree some of whose models were evaluated on a folder as well.

    Args:
        tree: of `build_tree`; it gets more folders.
        results: of each model by key of the task.
    """
    inputs = dict(tree)
    for model, tasks in results.items():
        before = tree[f"evaluate/{model}/renders"]
        for key, about in tasks.items():
            folder = before.parent / f"{model}-{key.replace('/', '-')}"
            folder.mkdir(exist_ok=True)
            manifest = json.loads((before / "manifest.json").read_text())
            manifest |= {"settings": {"folder": "sets", "evalset": key}, "seconds": 2.5}
            (folder / "manifest.json").write_text(json.dumps(manifest))
            (folder / "result.json").write_text(json.dumps(about))
            inputs[f"evaluate/{model}/evalset/{key}"] = folder
    return inputs


def add_looks(tree: Mapping[str, Path]) -> None:
    """Have every training watched: numbers that rise from what guessing gives."""
    chance = {"image_to_text_R@1": 0.01, "text_to_image_R@1": 0.01, "colour_acc1": 0.125}
    for name, folder in tree.items():
        if name.split("/")[0] not in ("pretrain", "finetune_expert", "finetune_router"):
            continue
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        with (folder / "metrics.jsonl").open("a") as file:
            for row in rows[::6]:
                look = {key: row[key] for key in ("step", "samples_seen", "seconds")}
                values = {key: guess + 0.01 * row["step"] for key, guess in chance.items()}
                file.write(json.dumps({**look, "watch": values, "chance": chance}) + "\n")
