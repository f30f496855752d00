"""A whole training beside `open_clip_train.main`: images per second of processes, from JPEG photos, data included.

    python benchmarks/train_run.py [--quick] [--json FILE]

Ours reads shards of 112 px, which its own stages made of tars of photos first. open_clip has rows for both: the tars of
photos, and our shards, the same JPEGs with captions as the .txt files that it wants. "With preparation", beside it on photos,
adds the seconds that index and shards took to a training of ours; they serve all trainings of that size. The models are those
that this repository trains on a CPU, with patches of 16. Same architecture, full vocabulary, 16 text tokens (longer captions
are cut; "texts whole" has 77, open_clip's default, where none is), batch, number of samples, AdamW settings, clipping,
schedule, crops of 90 to 100 % of the area and precision. Each side has all cores: torch's threads and ours for decoding,
torch's threads and --workers processes of open_clip's, whose default is 4; the number that was fastest in the first round has
rows of its own. Other differences: open_clip writes a log line for every step, which gives the times, and one checkpoint at the
end; ours writes the model, and state when it is due. The loss of both is the mean of the last quarter of the steps. Profiles
are of a few more steps of each.

"Excluding start-up" is the second half of the steps: ours from `metrics.jsonl`, open_clip from the times of its batches.
"Including" is from the start of the process to its end.

On a GPU: `python benchmarks/train_run.py --json FILE`, under ten minutes; open_clip then has about one worker per core alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import webdataset
import yaml
from _common import ROOT, Row, command_line, faster, report, within  # first: sets threads
from _photos import write_photos
from train_step import config_of, small

from clipgraft.config import load_config, sweep_points
from clipgraft.devices import precision
from clipgraft.planning import plan_runs
from clipgraft.versions import PlannedJob

LARGER = "Flickr8k model"
MODELS = {"demo model": "config.yaml", LARGER: "tests/config/flickr8k.yaml"}
SIZE, CONTEXT, WHOLE, VOCABULARY = 112, 16, 77, 49_408
REACH, DATA_WAIT = 2.5, 0.03
CORES = len(os.sched_getaffinity(0))
DEFAULT_WORKERS = 4  # of open_clip
SOURCES = {"photos": "photos", "shards": "our shards"}  # what open_clip reads: folder, name
OPTIM = {"lr": 5.0e-4, "weight_decay": 0.2, "beta2": 0.98, "eps": 1.0e-6, "max_grad_norm": 1.0}
PROGRAMS = str(ROOT / "benchmarks/_programs.py")
STEP = re.compile(r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+),.* Loss: ([\d.]+)")


@dataclass(frozen=True)
class Plan:
    """What both train.

    Attributes:
        config: of the model, in open_clip's form.
        num_photos: that differ.
        batch: samples of a step.
        steps: in all.
        warmup: steps of them.
        sources: what open_clip reads.
    """

    config: dict[str, Any]
    num_photos: int
    batch: int
    steps: int
    warmup: int
    sources: tuple[str, ...] = tuple(SOURCES)

    @property
    def context(self) -> int:
        """Tokens of a text at most."""
        return int(self.config["text_cfg"]["context_length"])

    @property
    def samples(self) -> int:
        """Of the whole training."""
        return self.batch * self.steps


@dataclass(frozen=True)
class Outcome:
    """How a training went.

    Attributes:
        rate: images per second of the second half of the steps.
        whole: the same of the whole process.
        wait: share of the second half that was spent waiting for data.
        loss: mean of the last quarter of the steps.
    """

    rate: float
    whole: float
    wait: float
    loss: float


def plans(*, quick: bool) -> dict[str, Plan]:
    """On CPUs those of the demo and of Flickr8k, on a GPU ViT-B/16; next to nothing where it is quick."""
    b16 = config_of("B/16", SIZE, CONTEXT)
    if quick:
        config = small(b16)
        config["text_cfg"]["vocab_size"] = VOCABULARY
        return {"small model": Plan(config, 64, 16, 8, 2)}
    if torch.cuda.is_available():
        # So many steps that a row of ours is of four: to close one, the host waits for the device.
        return {"ViT-B/16": Plan(b16, 2048, 512, 400, 40)}
    cut = {name: Plan(config_in(file), 4096, 256, 48, 5) for name, file in MODELS.items()}
    whole = Plan(config_in(MODELS[LARGER], WHOLE), 4096, 256, 24, 3, ("shards",))
    return {**cut, f"{LARGER}, texts whole": whole}


def config_in(file: str, context: int = CONTEXT) -> dict[str, Any]:
    """The architecture in a config of this repository, for pictures and texts of this benchmark."""
    raw = yaml.safe_load((ROOT / file).read_text())["model"]["config"]
    vision = {**raw["vision_cfg"], "image_size": SIZE, "patch_size": 16}
    text = {**raw["text_cfg"], "context_length": context, "vocab_size": VOCABULARY}
    return {**raw, "vision_cfg": vision, "text_cfg": text}


class Both:
    """Photos, shards and the model's config in a folder, and the commands of both sides."""

    def __init__(self, root: Path, plan: Plan) -> None:
        """Write the photos, and make shards of them, for open_clip too."""
        self.root, self.plan = root, plan
        per_tar = max(plan.num_photos // 16, 8)
        self.made_of = write_photos(root / "photos", plan.num_photos, per_tar)
        config = {**plan.config, "custom_text": True, "quick_gelu": False}
        (root / "benchmark.json").write_text(json.dumps(config))
        self.phase = self._phase()
        start = time.monotonic()
        for job in self.phase.inputs.values():
            self._make(job)
        self.prepared = time.monotonic() - start
        self._write_shards_again(per_tar)

    def _make(self, job: PlannedJob) -> None:
        """What a job needs, and the job, as its rule would."""
        out = self._folder(job)
        if not out.exists():
            for each in job.inputs.values():
                self._make(each)
            self._run(self._script(job, out), self.root / f"{job.stage}.log")

    def _write_shards_again(self, per_tar: int) -> None:
        """Our shards with captions in .txt files: open_clip passes over samples without."""
        (self.root / "shards").mkdir()
        tars = sorted(map(str, self._folder(self.phase.inputs["shard"]).glob("*.tar")))
        form = str(self.root / "shards/%05d.tar")
        with webdataset.ShardWriter(form, maxcount=per_tar, verbose=0) as writer:
            for sample in webdataset.WebDataset(tars, shardshuffle=False):
                [caption] = json.loads(sample["json"])["captions"]
                names = {"__key__": sample["__key__"], "jpg": sample["jpg"], "txt": caption}
                writer.write(names)

    def _script(self, job: PlannedJob, out: Path) -> list[str]:
        words = [ROOT / f"scripts/{job.stage}.py", "--settings", json.dumps(job.settings)]
        for slot, of in job.inputs.items():
            words += ["--input", f"{slot}={self._folder(of)}/manifest.json"]
        return [sys.executable, *map(str, [*words, "--out", out, "--threads", CORES])]

    def _folder(self, job: PlannedJob) -> Path:
        return self.root / "results" / job.folder

    def _phase(self) -> PlannedJob:
        vision, text = (dict(self.plan.config[name]) for name in ("vision_cfg", "text_cfg"))
        del vision["image_size"], text["context_length"], text["vocab_size"]
        phase = {
            "name": "full",
            "image_size": SIZE,
            "text_length": self.plan.context,
            "samples_seen": self.plan.samples,
            "batch_size": self.plan.batch,
            "crop_scale": [0.9, 1.0],
            "optim": {**OPTIM, "warmup_steps": self.plan.warmup},
        }
        raw = {
            "download": {
                "train": {"kind": "tars", "tars": str(self.root / "photos/*.tar")},
                "renders": {"kind": "shapes", "split": "renders", "num_samples": 24},
            },
            "index": {"vocabulary": "full", "drop_duplicates": False},
            "model": {"config": {**self.plan.config, "vision_cfg": vision, "text_cfg": text}},
            "pretrain": [phase],
            "moe": None,
            "evaluate": {"tasks": {"renders": {"data": "renders", "retrieval": True}}},
            "runs": {"train_run": {}},
        }
        [jobs] = plan_runs(load_config(raw), sweep_points(raw)).values()
        return next(job for job in jobs if job.name == "pretrain/full")

    def ours(self, name: str) -> Outcome:
        """Train with the script that the rule runs."""
        out = self.root / name
        seconds = self._run(self._script(self.phase, out), self.root / f"{name}.log")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        half = [row for row in rows if row["step"] > self.plan.steps // 2]
        before = rows[-len(half) - 1]
        took = half[-1]["seconds"] - before["seconds"]
        waits = [row["data_wait"] / row["samples_per_second"] for row in half]
        share = sum(waits) / sum(1 / row["samples_per_second"] for row in half)
        rate = (half[-1]["samples_seen"] - before["samples_seen"]) / took
        losses = [row["loss"] for row in rows if row["step"] > self.plan.steps * 3 // 4]
        return Outcome(rate, self.plan.samples / seconds, share, statistics.fmean(losses))

    def open_clip(self, name: str, source: str, workers: int) -> Outcome:
        """Train with open_clip's program on a folder of tars."""
        log = self.root / f"{name}.log"
        seconds = self._run(self._open_clip("-", name, source, workers), log)
        steps = [tuple(map(float, found)) for found in STEP.findall(log.read_text())]
        assert len(steps) == self.plan.steps, log.read_text()[-3000:]
        half = steps[self.plan.steps // 2 :]
        waited, took = (sum(column) for column in list(zip(*half, strict=True))[:2])
        loss = statistics.fmean(step[2] for step in steps[self.plan.steps * 3 // 4 :])
        rate = len(half) * self.plan.batch / took
        return Outcome(rate, self.plan.samples / seconds, waited / took, loss)

    def profiles(self, workers: Mapping[str, int]) -> dict[str, dict[str, float]]:
        """Where the time of some steps goes, data included.

        Args:
            workers: of open_clip, by source.
        """
        python, *script = self._script(self.phase, self.root / "profiled")
        file = self.root / "profile.json"
        commands = {"ours": [python, PROGRAMS, "ours", str(file), *script]}
        for source, num in workers.items():
            side = f"open_clip on {SOURCES[source]}"
            commands[side] = self._open_clip(str(file), f"profiled {source}", source, num)
        found = {}
        for side, command in commands.items():
            self._run(command, self.root / f"{side}.log")
            found[side] = json.loads(file.read_text())
            file.unlink()
        return found

    def _open_clip(self, profile: str, name: str, source: str, workers: int) -> list[str]:
        is_gpu = torch.cuda.is_available()
        mixed = precision(torch.device("cuda" if is_gpu else "cpu")) == torch.bfloat16
        options = {
            "model": "benchmark",
            "precision": "amp_bf16" if mixed else "fp32",
            "device": "cuda" if is_gpu else "cpu",
            "train-data": "::".join(self.tars_of(source, workers)),
            "train-num-samples": self.plan.samples,
            "dataset-type": "webdataset",
            "batch-size": self.plan.batch,
            "workers": workers,
            "epochs": 1,
            "lr": OPTIM["lr"],
            "wd": OPTIM["weight_decay"],
            "beta1": 0.9,
            "beta2": OPTIM["beta2"],
            "eps": OPTIM["eps"],
            "grad-clip-norm": OPTIM["max_grad_norm"],
            "warmup": self.plan.warmup,
            "log-every-n-steps": 1,
            "logs": self.root / "open_clip",
            "name": name,
        }
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        config = str(self.root / "benchmark.json")
        return [sys.executable, PROGRAMS, "open_clip", profile, config, *words]

    def tars_of(self, source: str, workers: int) -> list[str]:
        """Named so often that each of open_clip's workers has as many, and a whole batch; or it would bring none."""
        tars = sorted(map(str, (self.root / source).glob("*.tar")))
        times = workers // math.gcd(workers, len(tars))
        return tars * (times * -(-self.plan.batch * workers // (self.plan.num_photos * times)))

    def _run(self, command: list[str], log: Path) -> float:
        """Seconds of a process that may use all cores."""
        limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = {key: value for key, value in os.environ.items() if key not in limits}
        path = {"PYTHONPATH": str(ROOT / "lib")}
        start = time.monotonic()
        with log.open("w") as output:
            done = subprocess.run(command, env=environment | path, stdout=output, stderr=output)
        assert done.returncode == 0, log.read_text()[-3000:]
        return time.monotonic() - start


def measure(model: str, both: Both, repeats: int) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Trainings of both sides in turns; the first round tries how many workers open_clip wants."""
    is_gpu = torch.cuda.is_available()
    # Of these numbers of workers, each brings as many batches as any other; else open_clip would train more steps.
    possible = [number for number in range(1, CORES + 1) if both.plan.steps % number == 0]
    tried = possible[-1:] if is_gpu or repeats == 1 else sorted({1, possible[-1], DEFAULT_WORKERS})
    ours = [both.ours("ours0")]
    peers = {
        (source, workers): [both.open_clip(f"{source}{workers}-0", source, workers)]
        for source in both.plan.sources
        for workers in tried
    }
    best = {
        source: max(tried, key=lambda n: peers[source, n][0].rate) for source in both.plan.sources
    }
    kept = [
        (source, workers)
        for source in best
        for workers in sorted({best[source], DEFAULT_WORKERS} & set(tried))
    ]
    for number in range(1, repeats):
        ours.append(both.ours(f"ours{number}"))
        for source, workers in kept:
            name = f"{source}{workers}-{number}"
            peers[source, workers].append(both.open_clip(name, source, workers))
    rows = []
    for source, workers in kept:
        is_best = workers == best[source]
        marks = ", its best" * (is_best and len(tried) > 1)
        marks += ", its default" * (workers == DEFAULT_WORKERS)
        beside = f"open_clip on {SOURCES[source]}, {workers} workers{marks}"
        what = f"{model}: {{}}, {beside}"
        target = REACH if is_best else None
        rows += _rows(both, ours, peers[source, workers], what, target, source == "photos")
    least = 1e-4  # what `metrics.jsonl` may round to 0
    waits = [max(each.wait, least) for each in ours]
    note = "open_clip's: " + ", ".join(
        f"{statistics.median(x.wait for x in peers[source, workers]):.1%} on {SOURCES[source]}"
        for source, workers in best.items()
    )
    if min(waits) == least:
        note += f"; {least:.2%} stands for at most that"
    wait = within(f"{model}: share of time that waits for data", waits, DATA_WAIT, "share", note)
    rows.append(wait if is_gpu else replace(wait, target=None))
    return rows, {f"{model}, {side}": table for side, table in both.profiles(best).items()}


def _rows(
    both: Both,
    ours: list[Outcome],
    peers: list[Outcome],
    what: str,
    target: float | None,
    are_photos: bool,
) -> list[Row]:
    """Ours beside one way to run open_clip (`what`, but for what is counted); the target is for the rate without start-up."""
    mine, theirs = (statistics.median(each.loss for each in side) for side in (ours, peers))
    note = f"{both.made_of}; {both.prepared:,.0f} s for index and shards, once; batch {both.plan.batch}, "
    note += f"{both.plan.steps} steps; loss of the last quarter {mine:.3f} (ours), {theirs:.3f}"
    rates = [x.rate for x in ours], [x.rate for x in peers]
    wholes = [x.whole for x in ours], [x.whole for x in peers]
    rows = [
        faster(what.format("excluding start-up"), *rates, "images/s", target, note),
        faster(what.format("including start-up"), *wholes, "images/s", None, note),
    ]
    if are_photos:
        prepared = [1 / (1 / rate + both.prepared / both.plan.samples) for rate in wholes[0]]
        name = what.format("with preparation")
        rows.append(faster(name, prepared, wholes[1], "images/s", None, note))
    return rows


def main() -> None:
    """Measure and report."""
    parser = command_line()
    parser.add_argument("--json", type=Path, help="write JSON there; the table comes last")
    args = parser.parse_args()
    rows, profiles = list[Row](), dict[str, dict[str, float]]()
    repeats = 1 if args.quick or torch.cuda.is_available() else 3
    for model, plan in plans(quick=args.quick).items():
        with tempfile.TemporaryDirectory() as scratch:
            more, of_model = measure(model, Both(Path(scratch), plan), repeats)
        rows, profiles = rows + more, profiles | of_model
    if not torch.cuda.is_available():
        name = f"cuda: share of time that waits for data, of {DATA_WAIT}"
        rows.append(Row(name, None, None, "share", None, None, note="no CUDA device"))
    report("train_run", rows, profiles, args.json)


if __name__ == "__main__":
    main()
