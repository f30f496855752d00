"""Resume: a training that is killed at any moment ends with the bits of one that was not.

Trainings are real processes, and die by real signals. What state is in files, and kills while it is written, are in
`test_resume_state.py`.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import LOSSES, folder, make_data, phase
from trainings import Training, exit_codes, kill, step_of

from clipgraft.graft import assemble
from clipgraft.job import REQUEUE
from clipgraft.pretrain import pretrain
from clipgraft.settings import AssembleJob
from clipgraft.training_state import TrainingState

STEP = 0.02  # seconds, about


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another dimension than what `phase` trains."""
    config = phase().model.model_dump()["config"] | {"embed_dim": 24}
    out = tmp_path_factory.mktemp("base")
    pretrain(phase(samples_seen=16, model={"config": config}), *data, None, out)
    return out


@pytest.fixture(scope="module")
def moe(base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moe")
    settings = AssembleJob(num_experts=4, top_k=2, copies=True, noise=0.5, seed=0)
    assemble(settings, [base], out)
    return out


@pytest.fixture
def pretraining(data):
    """A function that makes a phase of ten steps."""

    def make(**changes: object) -> Training:
        settings = phase(**{"temperature": 0.1, **changes})
        return Training("pretrain", settings.model_dump(mode="json"), (*data, None))

    return make


def fine_tuned(stage: str, *inputs: Path | None, **changes: object) -> Training:
    raw = {"samples_seen": 80, "batch_size": 8, "seed": 0, "optim": {"lr": 1e-2}}
    return Training(stage, {**raw, **changes}, inputs)


def ends_alike(
    training: Training, tmp_path: Path, moments: list[int], threads: tuple[int, ...] = (1,)
) -> None:
    """Kill it soon after these steps, each time with other threads of the loader, and let it end."""
    whole, killed = folder(tmp_path / "whole"), folder(tmp_path / "killed")
    expected, chance, codes = training.end(whole, pause=None), random.Random(0), set()
    for number, step in enumerate(moments):
        how = {"threads": threads[number % len(threads)], "dies": (step, chance.random() * STEP)}
        codes |= exit_codes(training.start(killed, **how))
    assert codes == {-signal.SIGALRM}
    assert not (killed / "out" / "metrics.jsonl").exists()
    assert training.end(killed, threads=threads[-1]) == expected


# --- killed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["contrastive", *LOSSES])
def test_every_loss_ends_with_the_same_bits(pretraining, tmp_path, name):
    loss = LOSSES.get(name, {"kind": "contrastive"})
    ends_alike(pretraining(loss=loss), tmp_path, [3])


def test_a_training_killed_at_random_moments_again_and_again_ends_with_the_same_bits(
    pretraining, tmp_path
):
    moments = sorted(random.Random(1).choices(range(9), k=8))
    ends_alike(pretraining(loss=LOSSES["v2"], samples_seen=192), tmp_path, moments)


def test_random_numbers_of_the_model_are_drawn_as_if_nothing_had_happened(pretraining, tmp_path):
    """Patch dropout, crops, colours, words, blocks of the order, parts of a batch, with 1 and 3 threads in turn."""
    model = phase().model.model_dump()
    model["config"]["vision_cfg"] |= {"patch_size": 4, "patch_dropout": 0.5}
    changes = {
        "accumulate": 2,
        "text_reduction": "random",
        "flip_prob": 0.5,
        "color_jitter": (0.4, 0.4, 0.4, 0.1),
        "shuffle_block": 4,
    }
    training = pretraining(model=model, **changes)
    ends_alike(training, tmp_path, [2, 5], threads=(1, 3))


def test_projections_onto_a_reference_end_with_the_same_bits(pretraining, base, tmp_path):
    terms = {"references": [{"model": str(base)}], "distillation": {"feature": 1.0}}
    ends_alike(pretraining(**terms, loss=LOSSES["v3"]), tmp_path, [3])


@pytest.mark.parametrize("batches", ["homogeneous", "round_robin", "uniform"])
def test_every_sampler_of_an_expert_ends_with_the_same_bits(data, base, labels, tmp_path, batches):
    how = {"batches": "homogeneous", "stop_ratio": None}
    if batches == "round_robin":
        how["batch_order"] = "round_robin"
    if batches == "uniform":
        how, labels = {"batches": "ordinary"}, None
    training = fine_tuned("finetune_expert", base, *data, labels, **how)
    ends_alike(training, tmp_path, [4], threads=(3, 1))


@pytest.mark.parametrize("train", ["routers", "all"])
def test_routers_end_with_the_same_bits(data, moe, tmp_path, train):
    training = fine_tuned("finetune_router", moe, *data, train=train, balance_weight=1.0)
    ends_alike(training, tmp_path, [4])


# --- asked to leave -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda each: each.name)
@pytest.mark.parametrize("num", [1, 2])
def test_a_signal_saves_and_leaves_and_loses_no_step(pretraining, tmp_path, num, number):
    """Of two processes one alone may hear it."""
    training, out = pretraining(loss=LOSSES["v3"], samples_seen=4800), folder(tmp_path / "out")
    processes = training.start(out, num, pause=0.2)
    kill(processes[-1:], out, 1, signal=number)
    assert exit_codes(processes) == {REQUEUE}
    steps = re.findall(r"told to stop: saved at step (\d+)/300", (out / "log").read_text())
    assert len(steps) == num and {int(step) for step in steps} == {step_of(out / "state")}
    assert not list((out / "out").iterdir())


def test_after_a_signal_the_training_goes_on_with_the_same_bits(pretraining, tmp_path):
    training, out = pretraining(loss=LOSSES["v2"], samples_seen=480), folder(tmp_path / "out")
    assert kill(training.start(out, pause=0.01), out, 1, signal=signal.SIGUSR1) == {REQUEUE}
    assert training.end(out) == training.end(folder(tmp_path / "whole"), pause=None)


def test_after_ctrl_c_the_training_goes_on_with_the_same_bits(pretraining, tmp_path):
    """It leaves at once: what was saved last is what there is."""
    training, out = pretraining(loss=LOSSES["v2"], samples_seen=960), folder(tmp_path / "out")
    processes = training.start(out, pause=0.01)
    assert kill(processes, out, 1, signal=signal.SIGINT) == {128 + signal.SIGINT}
    step = step_of(out / "state")
    assert 0 < step < 60 and not list((out / "out").iterdir())
    weights = training.end(out)
    log = (out / "log").read_text()
    assert f"resumed at step {step}/60" in log and "told to stop" not in log
    assert weights == training.end(folder(tmp_path / "whole"), pause=None)


WORKER = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
Path(sys.argv[1], os.environ["RANK"]).touch()
time.sleep(100)
"""


def test_the_launcher_passes_sigusr1_on_to_all_processes_and_waits_for_them(tmp_path):
    """torchrun knows SIGTERM; of SIGUSR1 it would die, and leave its workers alone."""
    (tmp_path / "worker.py").write_text(WORKER)
    started, ended = folder(tmp_path / "started"), tmp_path / "ended"
    words = ["--gpu", "2", "--", str(tmp_path / "worker.py"), str(started)]
    command = [sys.executable, "-m", "clipgraft.launch", *words]
    # Devices that are not there: the processes use none. Leases are of this test alone.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "98,99", "TMPDIR": str(tmp_path)}
    with ended.open("w") as log, subprocess.Popen(command, env=environment, stderr=log) as process:
        while process.poll() is None and len(list(started.iterdir())) < 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait() == 1  # torchrun has no other code
    assert "Received 10 death signal, shutting down workers" in ended.read_text()
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(["pgrep", "-f", str(tmp_path / "worker.py")], check=True)


# --- other processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "near"),
    [(1, 2, True), (2, 1, True), (2, 2, True), (3, 3, True), (2, 2, False), (1, 2, False)],
)
def test_another_number_of_processes_goes_on_with_all_that_is_remembered(
    pretraining, tmp_path, before, after, near
):
    """Sums of other processes round otherwise: only with as many as before are the bits the same."""
    size = {"batch_size": 24, "samples_seen": 480} if before == 3 else {"samples_seen": 320}
    training = pretraining(loss=LOSSES["v2"], optim={"lr": 1e-2, "eps": 1e-2}, **size)
    out, whole = folder(tmp_path / "out"), folder(tmp_path / "whole")
    assert -signal.SIGKILL in kill(training.start(out, before, near=near), out, 4)
    weights = training.end(out, after, near=near)
    expected = training.end(whole, before, near=near)
    assert "resumed at step" in (out / "log").read_text()
    ours, theirs = (TrainingState(each / "state", "tag").load() for each in (out, whole))
    assert ours["step"] == theirs["step"] == 19
    assert ours["memory"][:, 0].isfinite().all()  # u of every sample
    if before == after:
        assert weights == expected and torch.equal(ours["memory"], theirs["memory"])
    torch.testing.assert_close(ours["memory"], theirs["memory"], rtol=1e-4, atol=1e-4)
    for name, value in ours["trained"].items():
        torch.testing.assert_close(value, theirs["trained"][name], rtol=1e-4, atol=2e-5, msg=name)


def test_processes_that_find_other_states_say_so(pretraining, tmp_path):
    """As on a file system that shows one of them a file late."""
    training, out = pretraining(samples_seen=160), folder(tmp_path / "out")
    kill(training.start(out), out, 4)
    step = step_of(out / "state")
    assert exit_codes(training.start(out, 2, late=1)) == {1}
    said = re.findall(
        "processes found training state of steps 0 and (.*)", (out / "log").read_text()
    )
    assert len(said) == 2 and all(each.startswith(f"{step}. Hint: run it again") for each in said)


# --- what must not be continued ----------------------------------------------------------------------------


# One step makes weights infinite that were not.
SPOILED = {"name": "sgd", "lr": 3e38, "weight_decay": 1e3, "momentum": 0.0, "warmup": 0.0}


@pytest.mark.parametrize(
    ("pause", "words"),
    [
        (0.0, "weights are not finite after step 6 of 10, though the loss before was"),
        (100.0, "the loss is nan between steps 6 and 7 of 10"),
    ],
)
def test_weights_that_are_not_finite_stop_the_training_and_are_never_saved(
    pretraining, tmp_path, pause, words
):
    """Of a step whose loss was finite, too; and the state before is as it was."""
    good, bad = pretraining(optim={**SPOILED, "lr": 1e-6}), pretraining(optim=SPOILED)
    out = folder(tmp_path / "out")
    assert exit_codes(good.start(out, dies=(6, 0.0))) == {-signal.SIGKILL}
    before = newest(out)
    assert exit_codes(bad.start(out, pause=pause)) == {1}
    assert newest(out) == before
    assert words in (out / "log").read_text()
    assert not (out / "out" / "model.safetensors").exists()


def newest(out: Path) -> tuple[str, bytes]:
    path = max((out / "state").glob("*.pt"))
    return path.name, path.read_bytes()


def test_the_last_step_may_spoil_the_weights_too(pretraining, tmp_path):
    bad, out = pretraining(optim=SPOILED, samples_seen=16), folder(tmp_path / "out")
    assert exit_codes(bad.start(out)) == {1}
    assert "weights are not finite after step 1 of 1" in (out / "log").read_text()
    assert not (out / "out" / "model.safetensors").exists()
