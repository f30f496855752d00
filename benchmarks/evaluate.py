"""Evaluation beside CLIP_benchmark: the same numbers, the wall time of both, and retrieval that is too large for memory.

All sides are whole processes, as a user starts them, with all cores that this one may use, and read the same JPEGs of
$REALDATA with the same random weights: CLIP_benchmark an open_clip folder and WebDataset tars, our stage a model folder
and the index of the same tars, our evaluation folders the tars as they are. An index is made once for all models, so its
seconds are told apart.
CLIP_benchmark goes to a folder of its own and borrows our torch and open_clip, so that neither side has other kernels;
it has its own defaults (batches of 64), but for float32, which ours always is. In a first round, which does not count,
CLIP_benchmark runs with each of WORKERS; the fastest has the rows with a target, and its default rows of its own. Quick,
there is no such round, and CLIP_benchmark has its default.

The models are those that this repository trains on a CPU: that of `make demo`, and that of tests/config/flickr8k.yaml,
which does six times the work for an image. Both have the vocabulary and the 77 tokens of CLIP, as public models do. The
larger a model, the more of the time of either side are products of matrices, and the ratio goes to that of these alone:
about 2 on an AMD processor, where torch's own products are MKL's and ours oneDNN's; less is to be expected on Intel's.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from _common import ROOT, THREADS, Row, arguments, faster, report, within  # first: sets threads
from safetensors.torch import save_file

from clipgraft.checkpoint import save_model
from clipgraft.data.index import build_index
from clipgraft.data.vocabulary import Encoder
from clipgraft.lean import open_clip
from clipgraft.models.build import build, describe
from clipgraft.provenance import content_id, describe_outputs
from clipgraft.settings import IndexJob

# The second is imported, not used; of the third, the last that makes a number of an array of one.
PEER = ["clip-benchmark==1.6.1", "pycocoevalcap==1.2", "numpy==2.2.6"]
CACHE = Path.home() / ".cache" / "clipgraft" / PEER[0].replace("==", "-")
TEMPLATES = ["a {c}", "a photo of a {c}", "a picture of a {c}", "a {c} outside", "the {c}"]
MODELS = {"demo": "config.yaml", "flickr8k": "tests/config/flickr8k.yaml"}
IMAGE_SIZE = 48  # of the last phase of both
SHARDS = 4  # CLIP_benchmark's workers want one each
WORKERS, DEFAULT_WORKERS = (0, 1, 4), 4  # of CLIP_benchmark
CORES = len(os.sched_getaffinity(0))  # threads of every side
EQUAL = 1e-6
MEMORY_MB = 2048


def install_peer() -> None:
    """CLIP_benchmark at its pinned version, without most of its dependencies: ours serve it."""
    if (CACHE / "clip_benchmark").is_dir():
        return
    words = [
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--python",
        sys.executable,
        "--target",
        str(CACHE),
    ]
    subprocess.run([str(Path(sys.executable).parent / "uv"), *words, *PEER], check=True)


def members(folder: Path, num: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files of the first samples of the test tars of a real data set."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("test-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if key not in found and len(found) == num:
                    yield from found.items()
                    return
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[suffix] = file.read()
    yield from found.items()


def write_data(source: Path, folder: Path, num: int) -> int:
    """CLIP_benchmark's layout, whose tars ours indexes too; returns how many images.

    Args:
        source: `cifar10` or `flickr8k` of the real data.
        folder: to write.
        num: at most so many images.
    """
    (folder / "test").mkdir(parents=True)
    (folder / "test/nshards.txt").write_text(f"{SHARDS}\n")
    if (source / "classes.txt").exists():
        shutil.copy(source / "classes.txt", folder / "classnames.txt")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    else:
        (folder / "dataset_type.txt").write_text("retrieval")
    samples = list(members(source, num))
    for shard in range(SHARDS):
        with tarfile.open(folder / f"test/{shard}.tar", "w") as tar:
            for key, files in samples[shard::SHARDS]:
                if "json" in files:
                    files["txt"] = "\n".join(json.loads(files["json"])["captions"]).encode()
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return len(samples)


def towers(file: str) -> dict:
    """The architecture in a config of this repository, with CLIP's vocabulary and context."""
    config = yaml.safe_load((ROOT / file).read_text())["model"]["config"]
    vision = {**config["vision_cfg"], "image_size": IMAGE_SIZE}
    text = {**config["text_cfg"], "context_length": 77, "vocab_size": 49408}
    whole = {"quick_gelu": False, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    return {**config, **whole}


def write_model(folder: Path, config: dict) -> None:
    """The same random weights as a model folder of ours and as an open_clip folder."""
    torch.manual_seed(0)
    model, spec = build(config), describe(config)
    for name in ("ours", "peer"):
        (folder / name).mkdir(parents=True)
    merges = folder / Encoder.file
    shutil.copy(Path(open_clip.tokenizer.default_bpe()), merges)
    save_model(folder / "ours", model, spec, merges)
    write_manifest(folder / "ours", "pretrain")
    keys = ("mean", "std", "interpolation", "resize_mode")
    about = {"model_cfg": config, "preprocess_cfg": {key: spec["preprocess"][key] for key in keys}}
    (folder / "peer/open_clip_config.json").write_text(json.dumps(about))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "peer/open_clip_model.safetensors")


def write_manifest(folder: Path, stage: str) -> None:
    """What a job needs to know of a folder that no job has made."""
    outputs = describe_outputs(folder)
    about = {"stage": stage, "settings": {}, "inputs": {}, "outputs": outputs}
    about["id"] = content_id(stage, {}, outputs)
    (folder / "manifest.json").write_text(json.dumps(about))


def index_of(data: Path, out: Path) -> float:
    """Seconds that it takes to index the tars."""
    download = out / "download"
    download.mkdir(parents=True)
    source = {"kind": "tars", "tars": str(data / "test/*.tar")}
    if (data / "classnames.txt").exists():
        source["classes"] = str(data / "classnames.txt")
    started = time.perf_counter()
    words = ["--settings", json.dumps({"source": source}), "--out", str(download)]
    run([sys.executable, str(ROOT / "scripts/download.py"), *words])
    (out / "index").mkdir()
    build_index(IndexJob(tokenize=False), download, out / "index", threads=1)
    seconds = time.perf_counter() - started
    write_manifest(out / "index", "index")
    return seconds


def ours(models: Path, index: Path, out: Path, task: dict) -> tuple[float, dict]:
    """Seconds and result of our stage."""
    settings = {"data": "data", "task": "task", **task}
    words = ["--settings", json.dumps(settings), "--out", str(out), "--threads", str(CORES)]
    words += ["--input", f"model={models / 'ours'}", "--input", f"index={index}"]
    started = time.perf_counter()
    run([sys.executable, str(ROOT / "scripts/evaluate.py"), *words])
    seconds = time.perf_counter() - started
    return seconds, json.loads((out / "result.json").read_text())


def as_folder(models: Path, data: Path, out: Path) -> tuple[float, dict]:
    """Seconds and metrics of our evaluation of a folder of data sets, without an index."""
    words = [str(models / "ours"), str(data.parent), "--tasks", key_of(data), "--out", str(out)]
    started = time.perf_counter()
    run([sys.executable, "-m", "clipgraft.evalset", *words])
    seconds = time.perf_counter() - started
    lines = (out / "eval_results.jsonl").read_text().splitlines()
    return seconds, {each["key"]: each["metrics"] for each in map(json.loads, lines)}[key_of(data)]


def key_of(data: Path) -> str:
    """What our evaluation of folders calls a data set."""
    return data.name.removeprefix("wds_").removesuffix("_test")


def peers(models: Path, data: Path, out: Path, task: str, workers: int) -> tuple[float, dict]:
    """Seconds and metrics of CLIP_benchmark, in float32 as we are; with its own defaults but for workers."""
    words = ["eval", "--dataset", f"wds/{key_of(data)}", "--dataset_root", str(data)]
    words += ["--task", task, "--model", f"local-dir:{models / 'peer'}", "--pretrained", "none"]
    words += ["--no_amp", "--recall_k", "1", "5", "10", "--output", str(out)]
    words += ["--num_workers", str(workers)]
    path = os.pathsep.join([str(CACHE), os.environ.get("PYTHONPATH", "")])
    started = time.perf_counter()
    run([sys.executable, "-m", "clip_benchmark.cli", *words], PYTHONPATH=path)
    return time.perf_counter() - started, json.loads(out.read_text())["metrics"]


def run(command: list[str], **environment: str) -> None:
    """Run a command with all cores; what it says is shown if it fails."""
    env = {**os.environ, **dict.fromkeys(THREADS, str(CORES)), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}")


def compared(
    models: Path, data: Path, index: Path, out: Path, repeats: int, tried: Sequence[int]
) -> list[Row]:
    """Wall time of all sides in turns, and how far their numbers are apart.

    Args:
        models: the two folders of one model.
        data: in CLIP_benchmark's layout.
        index: of the same tars.
        out: folder to write.
        repeats: rounds that count, after one that warms up and chooses where there is a choice.
        tried: how many workers CLIP_benchmark may have.
    """
    is_labelled = (data / "classnames.txt").exists()
    retrieval = {"retrieval": {"protocol": "five_captions"}}
    task = {"zero_shot": [{"templates": TEMPLATES}]} if is_labelled else retrieval
    kind = "zeroshot_classification" if is_labelled else "zeroshot_retrieval"
    count = json.loads((index / "samples.json").read_text())["num_samples"]
    kept = list(tried)
    measured: dict[str | int, list[float]] = {side: [] for side in ("stage", "folder", *tried)}
    best, has_choice = tried[0], len(tried) > 1
    for number in range(repeats + has_choice):
        here = out / str(number)
        here.mkdir(parents=True)
        took: dict[str | int, float] = {}
        took["stage"], result = ours(models, index, here / "ours", task)
        took["folder"], folder = as_folder(models, data, here / "folder")
        for workers in kept:
            file = here / f"peer{workers}.json"
            took[workers], metrics = peers(models, data, file, kind, workers)
        if has_choice and number == 0:
            best = min(tried, key=took.__getitem__)
            kept = sorted({best, DEFAULT_WORKERS} & set(tried))
            continue
        for side, seconds in took.items():
            measured[side].append(count / seconds)
    what = f"{'zero-shot' if is_labelled else 'retrieval'}, {key_of(data)}, {models.name} model"
    apart = {"stage": pairs(result, metrics), "folder": same_names(folder, metrics)}
    rows = []
    for side in apart:
        for workers in kept:
            is_best, is_default = workers == best, workers == DEFAULT_WORKERS
            fastest = f", the fastest of {', '.join(map(str, tried))}" * (is_best and has_choice)
            default = ", its default" * is_default
            note = f"{count:,} images; peer: {workers} workers{fastest}{default}"
            name = f"{side}: {what}" + ("" if is_best else f", beside {workers} workers")
            target = 3.0 if is_best else None
            rates = measured[side], measured[workers]
            rows.append(faster(name, *rates, "images/s", target, note))
    for side, values in apart.items():
        largest = max(1e-12, *(abs(a - b) for a, b in values))
        rows.append(within(f"{side}: largest difference, {what}", [largest], EQUAL, ""))
    return rows


def same_names(own: dict, metrics: dict) -> list[tuple[float, float]]:
    """What both call by the same names."""
    names = [name for name in metrics if own.get(name) is not None]
    assert len(names) >= 3, (own, metrics)
    return [(own[name], metrics[name]) for name in names]


def pairs(result: dict, metrics: dict) -> list[tuple[float, float]]:
    """Numbers of our stage and theirs, one by one."""
    if result["retrieval"] is None:
        own = result["zero_shot"]["class"]
        return [(own[key], metrics[key]) for key in ("acc1", "acc5", "mean_per_class_recall")]
    ways = {"image_to_text": "text", "text_to_image": "image"}  # theirs is named for what is found
    return [
        (result["retrieval"][way][f"R@{k}"], metrics[f"{theirs}_retrieval_recall@{k}"])
        for way, theirs in ways.items()
        for k in (1, 5, 10)
    ]


LARGE = """
import re, sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
from clipgraft.evaluation import rows
from clipgraft.evaluation.retrieval import Captions, evaluate_retrieval

folder, num, dim = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
image = torch.Generator().manual_seed(0)

def images():
    for first in range(0, num, 1000):
        yield F.normalize(torch.randn(1000, dim, generator=image), dim=-1)

def texts(of):
    noise = torch.Generator().manual_seed(1)
    for first in range(0, num, 1000):
        own = of[first : first + 1000].repeat_interleave(5, 0)
        yield F.normalize(own + 4.5 * dim**-0.5 * torch.randn(5000, dim, generator=noise), dim=-1)

image_ND = rows.collect(images(), num, folder / "images")
text_UD = rows.collect(texts(image_ND), 5 * num, folder / "texts")
captions = Captions.of([[f"{i}.{n}" for n in range(5)] for i in range(num)], "five_captions")
started = time.perf_counter()
result = evaluate_retrieval(image_ND, text_UD, captions)
seconds = time.perf_counter() - started
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(int(peak) / 1024, seconds, result["text_to_image"]["R@1"])
"""


def memory(folder: Path, num: int, dim: int) -> Row:
    """Resident memory of retrieval among so many images and five times as many texts, in a process of its own."""
    command = [sys.executable, "-c", LARGE, str(folder), str(num), str(dim)]
    env = {**os.environ, **dict.fromkeys(THREADS, str(CORES))}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    peak_mb, seconds, recall = map(float, done.stdout.split())
    scores_gb = 4 * 5 * num**2 / 1e9
    note = f"all scores at once would be {scores_gb:,.0f} GB; {seconds:,.0f} s, R@1 text to image {recall:.3f}"
    return within(f"memory, {num:,} x {5 * num:,} x {dim}", [peak_mb], MEMORY_MB, "MB", note)


def not_measured(name: str, why: str) -> Row:
    """A row that says why."""
    return Row(name, None, None, "images/s", None, 3.0, note=why)


def main() -> None:
    """Measure and report."""
    quick = arguments().quick
    real = Path(os.environ.get("REALDATA", "/nonexistent"))
    rows = []
    num, repeats = (200, 1) if quick else (10_000, 3)
    tried = (DEFAULT_WORKERS,) if quick else WORKERS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = ["demo"] if quick else list(MODELS)
        for model in models:
            write_model(folder / model, towers(MODELS[model]))
        for key in ("cifar10", "flickr8k"):
            if not (real / key).is_dir():
                why = "REALDATA is not set, see tests/config/flickr8k.yaml"
                rows.append(not_measured(key, why))
                continue
            install_peer()
            data, index = folder / f"sets/wds_{key}_test", folder / f"{key}-index"
            write_data(real / key, data, num)
            seconds = index_of(data, index)
            print(f"{key}: indexed in {seconds:.1f} s, once for all models", file=sys.stderr)
            for model in models:
                out = folder / f"{key}-{model}"
                where = folder / model, data, index / "index", out
                rows += compared(*where, repeats, tried)
        rows.append(memory(folder, *((5_000, 128) if quick else (100_000, 512))))
    report("evaluate", rows)


if __name__ == "__main__":
    main()
