"""Watching a training: nothing of it changes, and what is seen is what `evaluate` sees.

Run as a script, this file is one of several processes that watch the same training.
"""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from test_train import folder, make_data, phase, saving_until

from clipgraft import dist, training_state
from clipgraft import meter as meter_module
from clipgraft import train as train_module
from clipgraft.checkpoint import load_model, read_weights
from clipgraft.config import ConfigError, load_config, merge
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.evaluation import watch as watch_module
from clipgraft.evaluation.evaluate import evaluate
from clipgraft.evaluation.rows import spread
from clipgraft.evaluation.watch import Watch, share
from clipgraft.evaluation_settings import TaskSettings
from clipgraft.experts import finetune_expert
from clipgraft.graft import assemble
from clipgraft.planning import plan_run
from clipgraft.pretrain import pretrain
from clipgraft.report.figures_watch import plot_looks
from clipgraft.report.read import read_looks, read_metrics
from clipgraft.router import finetune_router
from clipgraft.settings import AssembleJob, ExpertJob, IndexJob, PretrainJob, RouterJob
from clipgraft.sources import ShapesSource
from clipgraft.training_state import TrainingState

ROOT = Path(__file__).resolve().parent.parent
SMALL = yaml.safe_load((ROOT / "tests/config/small.yaml").read_text())
NUM = 24
TASK = {"retrieval": True, "zero_shot": [{"label": "colour"}, {"label": "shape"}]}
WATCH = {"task": "renders", "every": 48, "best": True, **TASK}
TRAINING = {"samples_seen": 160, "batch_size": 16, "optim": {"lr": 1e-2}, "seed": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of samples with captions and labels, none of them trained on."""
    root = tmp_path_factory.mktemp("held_out")
    source = ShapesSource(kind="shapes", split="renders", num_samples=NUM, image_size=32)
    download(source, folder(root / "download"), threads=1)
    settings = IndexJob(tokenize=False)
    build_index(settings, root / "download", folder(root / "index"), threads=1)
    return root / "index"


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLIPGRAFT_PRECISION", "fp32")


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("base")
    pretrain(phase(samples_seen=32), *data, None, out)
    return out


SCORES = [
    0.1,
    0.5,
    0.3,
    0.5,
    0.2,
]  # given to the five looks: the second is the best, and the first of its like
BEST_STEP = 3


@pytest.fixture(scope="module")
def watched(data, held_out, tmp_path_factory) -> Path:
    """A phase that was watched and did best at its second look, and the state that was saved right after that."""
    out = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPGRAFT_PRECISION", "fp32")
        patch.setattr(watch_module, "score_of", scores_in_turn())
        patch.setattr(training_state, "SAVE_SECONDS", 0.0)
        patch.setattr(TrainingState, "save", keeping(BEST_STEP, out, TrainingState.save))
        state = TrainingState(out / "resume", "tag")
        settings = phase(**TRAINING, watch=WATCH)
        pretrain(settings, *data, None, out, state=state, watched=held_out)
        state.close()
    return out


def scores_in_turn() -> Callable[[object], float]:
    scores = iter(SCORES)
    return lambda _: next(scores)


def keeping(step: int, out: Path, save: Callable[..., None]) -> Callable[..., None]:
    """Keeps the state of a step."""

    def save_and_keep(self: TrainingState, state: dict) -> None:
        save(self, state)
        if state["step"] == step:
            torch.save(state["trained"], out / "trained.pt")

    return save_and_keep


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out)]


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"image_reduction": "random", "text_reduction": "random", "image_size": 32},
        {"loss": {"kind": "rgcl_g", "rho": 0.5}, "temperature": 0.1, "accumulate": 2},
    ],
    ids=["patches dropped", "a memory, in parts"],
)
def test_a_watched_phase_ends_with_the_same_bits(data, held_out, tmp_path, changes, best):
    alone, seen = folder(tmp_path / "alone"), folder(tmp_path / "seen")
    changes |= {"model": {"config": {**phase().model.config, "vision_cfg": VISION}}}
    pretrain(phase(**changes), *data, None, alone)
    settings = phase(**changes, watch=WATCH | {"best": best})
    pretrain(settings, *data, None, seen, watched=held_out)
    assert len(read_looks(seen)) == 5
    assert losses(alone) == losses(seen)
    assert (alone / "model.safetensors").read_bytes() == (seen / "model.safetensors").read_bytes()
    assert (seen / "best").exists() is best


VISION = {"patch_size": 4, "width": 32, "layers": 1, "head_width": 16, "patch_dropout": 0.2}


def test_a_watched_expert_and_watched_routers_end_with_the_same_bits(
    data, held_out, base, tmp_path
):
    expert = ExpertJob(**TRAINING, batches="ordinary")
    graft = AssembleJob(num_experts=2, top_k=1, copies=True, noise=0.5, seed=0)
    assemble(graft, [base], folder(tmp_path / "moe"))
    routers = RouterJob(**TRAINING, train="experts")
    for settings, run in (
        (
            expert,
            lambda each, out, index: finetune_expert(each, base, *data, None, out, watched=index),
        ),
        (
            routers,
            lambda each, out, index: finetune_router(
                each, tmp_path / "moe", *data, out, watched=index
            ),
        ),
    ):
        outs = [folder(tmp_path / f"{type(settings).__name__}{number}") for number in (0, 1)]
        run(settings, outs[0], None)
        run(type(settings)(**settings.model_dump() | {"watch": WATCH}), outs[1], held_out)
        alone, seen = ((out / "model.safetensors").read_bytes() for out in outs)
        assert alone == seen and len(read_looks(outs[1])) == 5


def test_a_look_leaves_generators_and_the_model_alone(data, held_out, base):
    settings, loaded = phase(watch=WATCH), load_model(base)
    world = dist.World(0, 1, torch.device("cpu"))
    watch = Watch(settings, settings.watch, held_out, loaded.spec, loaded.tokenizer, world)
    before = copy.deepcopy(loaded.model.state_dict())
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    watch.look(loaded.model.train(), 0, 0.0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]
    assert all(
        torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items()
    )
    assert all(module.training for module in loaded.model.modules())
    assert all(p.grad is None and p.requires_grad for p in loaded.model.parameters())


def evaluated(model: Path, index: Path, out: Path) -> dict:
    task = TaskSettings(data="renders", **TASK)
    evaluate(task, model, index, folder(out), task_name="renders")
    return json.loads((out / "result.json").read_text())


def numbers(result: dict) -> dict[str, float]:
    retrieval = result["retrieval"]
    ways = {f"{way}_R@1": retrieval[way]["R@1"] for way in ("image_to_text", "text_to_image")}
    labels = {f"{label}_acc1": about["acc1"] for label, about in result["zero_shot"].items()}
    return {**ways, "mean_R@1": retrieval["mean_R@1"], **labels}


def test_a_look_sees_what_evaluate_sees(watched, held_out, tmp_path):
    looks = read_looks(watched)
    assert [look["samples_seen"] for look in looks] == [0, 48, 96, 144, 160]
    last = evaluated(watched, held_out, tmp_path / "last")
    assert looks[-1]["watch"] == pytest.approx(numbers(last), abs=1e-6)
    assert looks[-1]["watch"] != pytest.approx(looks[0]["watch"], abs=1e-3)
    guessing = {f"{label}_acc1": about["chance"] for label, about in last["zero_shot"].items()}
    ways = {name: last["retrieval"]["chance"][name] for name in numbers(last) if "R@1" in name}
    assert looks[-1]["chance"] == pytest.approx(ways | guessing, abs=1e-6)


def test_the_best_model_is_that_of_the_best_look(watched, held_out, tmp_path):
    then = torch.load(watched / "trained.pt", weights_only=True)
    best, last = read_weights(watched / "best"), read_weights(watched)
    assert all(torch.equal(best[name], value) for name, value in then.items())
    assert all(not torch.equal(last[name], value) for name, value in then.items())
    found = numbers(evaluated(watched / "best", held_out, tmp_path / "best"))
    assert found == pytest.approx(read_looks(watched)[1]["watch"], abs=1e-6)
    spec = json.loads((watched / "best/model.json").read_text())
    assert spec["samples_seen"] == 16 * BEST_STEP


def test_the_best_expert_finds_its_base(data, held_out, base, tmp_path):
    """It is a delta, one folder further down, and made in the folder that a job writes in."""
    out = folder(folder(tmp_path / "expert") / ".writing")
    settings = ExpertJob(**TRAINING, batches="ordinary", watch=WATCH)
    facts = finetune_expert(settings, base, *data, None, out, watched=held_out)
    for path in sorted(out.iterdir()):
        path.rename(tmp_path / "expert" / path.name)
    best = load_model(tmp_path / "expert" / "best").model.state_dict()
    last = load_model(tmp_path / "expert").model.state_dict()
    assert best.keys() == last.keys()
    looks = read_looks(tmp_path / "expert")
    assert facts["best"]["score"] == max(look["watch"]["mean_R@1"] for look in looks)


def test_a_killed_training_goes_on_with_its_looks_and_its_best(
    data, held_out, watched, tmp_path, monkeypatch
):
    settings = phase(**TRAINING, watch=WATCH)
    monkeypatch.setattr(watch_module, "score_of", scores_in_turn())
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(TrainingState, "save", saving_until(7, TrainingState.save))
    state, out = TrainingState(tmp_path / "resume", "tag"), folder(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings, *data, None, out, state=state, watched=held_out)
    pretrain(settings, *data, None, out, state=state, watched=held_out)
    state.close()
    for name in ("model.safetensors", "best/model.safetensors"):
        assert (out / name).read_bytes() == (watched / name).read_bytes()
    untimed = [
        [{key: row[key] for key in ("step", "watch", "chance")} for row in read_looks(each)]
        for each in (out, watched)
    ]
    assert untimed[0] == untimed[1]


def test_a_training_that_nobody_watched_may_be_watched_from_its_resume_on(
    data, held_out, tmp_path, monkeypatch
):
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(TrainingState, "save", saving_until(4, TrainingState.save))
    state, out = TrainingState(tmp_path / "resume", "tag"), folder(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        pretrain(phase(), *data, None, out, state=state)
    settings = phase(watch=WATCH | {"best": False})
    pretrain(settings, *data, None, out, state=state, watched=held_out)
    state.close()
    assert [look["step"] for look in read_looks(out)] == [6, 9, 10]


def test_time_spent_looking_is_no_training_time(data, held_out, tmp_path, monkeypatch):
    """By a clock that a look puts forward by a day."""
    look, days = Watch.look, []

    def look_for_a_day(*words: object) -> None:
        look(*words)
        days.append(1)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 86_400 * len(days))
    for module in (train_module, meter_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(Watch, "look", look_for_a_day)
    out = folder(tmp_path / "out")
    facts = pretrain(phase(watch=WATCH), *data, None, out, watched=held_out)
    rows = read_metrics(out)
    assert len(read_looks(out)) == len(days) == 5
    assert facts["train_seconds"] == rows[-1]["seconds"] < 3600
    assert all(row["samples_per_second"] > 16 / 3600 for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_several_processes_see_what_one_sees(data, held_out, base, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    words = [str(held_out), str(base), str(tmp_path)]
    done = subprocess.run([*torchrun, __file__, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    several = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    see(dist.World(0, 1, torch.device("cpu")), held_out, base, tmp_path / "one.json")
    one = json.loads((tmp_path / "one.json").read_text())
    assert several[0]["watch"] == several[1]["watch"] == several[2]["watch"]
    assert several[0]["watch"] == pytest.approx(one["watch"], abs=1e-6)
    assert [each["images"] for each in (*several, one)] == [7, 7, 7, 20]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_sees_what_the_cpu_sees(held_out, base, tmp_path):
    for name in ("cpu", "cuda"):
        see(dist.World(0, 1, torch.device(name)), held_out, base, tmp_path / name)
    on_cpu, on_gpu = (json.loads((tmp_path / name).read_text()) for name in ("cpu", "cuda"))
    assert on_gpu["watch"] == pytest.approx(on_cpu["watch"], abs=0.06)  # one sample of twenty
    assert on_gpu["chance"] == on_cpu["chance"]


def see(world: dist.World, held_out: Path, base: Path, out: Path) -> None:
    """One look, with a number of samples that does not divide."""
    settings, loaded = phase(watch=WATCH | {"num_samples": 20}), load_model(base)
    watch = Watch(settings, settings.watch, held_out, loaded.spec, loaded.tokenizer, world)
    watch.look(loaded.model.to(world.device), 0, 0.0)
    out.write_text(json.dumps(watch.rows[0] | {"images": len(watch.images_RHHC)}))


@pytest.mark.parametrize(("num", "size"), [(1, 4), (4, 4), (5, 4), (12, 5)])
def test_shares_are_equal_and_put_together_are_everything(num, size):
    shares = [share(num, dist.World(rank, size, torch.device("cpu"))) for rank in range(size)]
    assert len({len(each) for each in shares}) == 1
    dealt = [each[turn] for turn in range(len(shares[0])) for each in shares]
    assert dealt[:num] == list(range(num))


@pytest.mark.parametrize(("num", "wanted"), [(3, 10), (10, 10), (10, 4), (1000, 7)])
def test_chosen_rows_are_spread_evenly(num, wanted):
    rows = spread(num, wanted).tolist()
    assert len(rows) == min(num, wanted) and rows == sorted(set(rows))
    assert (rows[0], rows[-1]) == (0, num - 1)
    gaps = np.diff(rows).tolist()
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("every", "batch", "total"), [(48, 16, 160), (50, 16, 160), (16, 16, 48)])
def test_a_look_is_due_wherever_the_interval_is_passed(every, batch, total):
    due, next_one = {0, total // batch}, every
    for step in range(1, total // batch + 1):
        if step * batch >= next_one:
            due.add(step)
            while next_one <= step * batch:
                next_one += every
    watch = object.__new__(Watch)
    watch.settings = PretrainJob(**phase().model_dump() | {"watch": WATCH | {"every": every}}).watch
    watch.batch_size, watch.num_steps = batch, total // batch
    assert {step for step in range(total // batch + 1) if watch.is_due(step)} == due


# --- settings and versions ------------------------------------------------------------------------


def jobs(overlay: dict) -> dict:
    run = load_config(merge(copy.deepcopy(SMALL), overlay))["small"]
    return {job.name: job for job in plan_run("small", run)}


def everywhere(**changes: object) -> dict:
    """An overlay that watches every training of the small config."""
    watch = {"task": "renders", "every": 32, "num_samples": 1000, "best": False, **changes}
    phases = [{**each, "watch": watch} for each in SMALL["pretrain"]]
    return {
        "pretrain": phases,
        "finetune_expert": {"watch": watch},
        "finetune_router": {"watch": watch},
    }


def unwatched() -> dict:
    return {
        "pretrain": [{**each, "watch": None} for each in SMALL["pretrain"]],
        "finetune_expert": {"watch": None},
        "finetune_router": {"watch": None},
    }


def test_watching_changes_no_version_but_keeping_the_best_does():
    plain, seen = jobs(unwatched()), jobs(everywhere())
    assert {name: job.version for name, job in plain.items()} == {
        name: job.version for name, job in seen.items()
    }
    trainings = [job for job in seen.values() if "pretrain" in job.stage or "finetune" in job.stage]
    assert len(trainings) == 6  # two phases, two experts, a baseline, the routers
    for job in trainings:
        assert job.inputs["watched"] == seen["index/renders"]
        assert job.settings["watch"]["zero_shot"] == [{"label": "colour", "templates": []}]
    best = jobs(everywhere(best=True))
    assert all(best[job.name].version != job.version for job in trainings)
    other = jobs(everywhere(best=True, num_samples=10))
    assert all(best[job.name].version != other[job.name].version for job in trainings)


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        (
            {"task": "rendrs"},
            "pretrain.short.watch.task = 'rendrs' is no task .*did you mean `renders`",
        ),
        ({"task": "probed"}, "has neither retrieval nor zero_shot.* Hint: evaluate.tasks.probed"),
        ({"every": 15}, "watch.every = 15 is less than a batch: batch_size = 16"),
        ({"every": None}, "watch.every"),
        ({"steps": 3}, "unknown key `steps`.*watch"),
    ],
)
def test_a_watch_that_cannot_be_is_found_before_anything_runs(watch, message):
    overlay = everywhere(**watch)
    overlay["evaluate"] = {"tasks": {"probed": {"data": "renders", "probe": ["colour"]}}}
    with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)):
        jobs(overlay)


def test_a_watch_of_no_training_is_an_error():
    phases = [
        {**SMALL["pretrain"][0], "watch": {"task": "renders", "every": 32}, "samples_seen": 0}
    ]
    with pytest.raises(ConfigError, match="watch has no effect: samples_seen = 0"):
        jobs({"pretrain": phases})


def test_a_watch_without_its_samples_is_an_error(data, held_out, tmp_path):
    with pytest.raises(ConfigError, match="--input watched=MANIFEST"):
        pretrain(phase(watch=WATCH), *data, None, folder(tmp_path / "none"))
    settings = phase(watch=WATCH | {"zero_shot": [{"label": "smell", "templates": ["a {c} one"]}]})
    with pytest.raises(ConfigError, match="no label 'smell' in the data"):
        pretrain(settings, *data, None, folder(tmp_path / "label"), watched=held_out)


# --- report ---------------------------------------------------------------------------------------


def test_the_figure_has_every_look_of_every_training(watched):
    looks = read_looks(watched)
    bare = [{**look, "watch": {"mean_R@1": 0.5}, "chance": {"mean_R@1": 0.1}} for look in looks[:2]]
    series = {"short": looks, "full": bare}
    figure = plot_looks(
        "watch", series, {key: key for key in series}, dict.fromkeys(series, "#000000")
    )
    assert [row["training"] for row in figure.rows] == ["short"] * len(looks) + ["full"] * 2
    assert len({tuple(row) for row in figure.rows}) == 1, "a table: all rows have the same columns"
    for row, look in zip(figure.rows, looks, strict=False):
        assert {name: row[name] for name in look["watch"]} == look["watch"]
    assert figure.rows[-1]["colour_acc1"] is None and figure.rows[-1]["chance mean_R@1"] == 0.1
    assert "<svg" in figure.svg


if __name__ == "__main__":
    with dist.world() as here:
        see(here, Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) / f"{here.rank}.json")
