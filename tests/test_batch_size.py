"""The batch-size finder, on real trainings of a finished run; memory is bounded by what a trial was seen to take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clipgraft.batch_size import (
    SCRIPTS,
    Trials,
    advice,
    check_processes,
    find_job,
    finished_inputs,
    group_mb,
    main,
    watched,
)
from clipgraft.config import ConfigError
from clipgraft.orphan import name_place
from clipgraft.provenance import MANIFEST
from clipgraft.settings import PretrainJob

SMALL = Path(__file__).parent / "config" / "small.yaml"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Index and shards of a run whose activations take far more memory than its weights."""
    root = tmp_path_factory.mktemp("sizes")
    raw = yaml.safe_load(SMALL.read_text())
    raw["model"]["config"]["vision_cfg"]["patch_size"] = 2
    full = {**raw["pretrain"][1], "watch": None}
    raw["pretrain"] = [{**full, "batch_size": 62, "samples_seen": 1000}]
    (root / "config.yaml").write_text(yaml.safe_dump(raw))
    phase = find_job("small", "pretrain/full", [root / "config.yaml"])
    index, shard = phase.inputs["index"], phase.inputs["shard"]
    for job in (index.inputs["download"], index, shard):
        words = ["--settings", json.dumps(job.settings), "--out", root / "results" / job.folder]
        for name, of in job.inputs.items():
            words += ["--input", f"{name}={root / 'results' / of.folder / MANIFEST}"]
        subprocess.run([sys.executable, SCRIPTS / f"{job.stage}.py", *words], check=True)
    return root / "results"


def trials_of(results: Path, memory_mb: int | None) -> Trials:
    job = find_job("small", "pretrain", [results.parent / "config.yaml"])
    return Trials(job, finished_inputs(job, results), 1, memory_mb)


def test_the_largest_part_that_fits_is_found_by_real_steps(results, tmp_path, capsys):
    peaks_mb = []
    for size, num_parts in ((31, 2), (62, 1)):
        out = tmp_path / str(size)
        out.mkdir()
        said, peak_mb, is_over = watched(
            trials_of(results, None).command(size, num_parts, out), None
        )
        assert (out / MANIFEST).exists() and not is_over, said
        peaks_mb.append(peak_mb)
    assert peaks_mb[0] + 30 < peaks_mb[1]
    trials = trials_of(results, sum(peaks_mb) // 2)
    assert trials.largest() == 31
    tried = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(words[0], words[6:]) for words in tried] == [
        ("2", ["fits"]),
        ("31", ["fits"]),
        ("62", ["does", "not", "fit"]),
    ]
    assert advice(trials, 31) == (
        "pretrain/full: batch_size 62 over 1 process, 31 at a time: accumulate: 2 (instead of 1)"
    )


def test_a_trial_of_a_small_part_is_valid_whatever_the_schedule(tmp_path):
    """With `lr_per_256` the peak rate falls with the batch, below an `lr_min` that the job may have."""
    raw = yaml.safe_load(SMALL.read_text())
    optim = {"lr_per_256": 1e-3, "lr_min": 1e-5, "warmup_steps": 3}
    raw["pretrain"] = [{**raw["pretrain"][1], "watch": None, "optim": optim}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    job = find_job("small", "pretrain", [tmp_path / "config.yaml"])
    words = Trials(job, {}, 1, None).command(1, 2, tmp_path)
    settings = PretrainJob(**json.loads(words[words.index("--settings") + 1]))
    assert (settings.batch_size, settings.optim.lr_per_256, settings.optim.lr_min) == (2, 1e-3, 0)


def test_what_a_fork_shares_with_its_parent_is_counted_once():
    work = "import os, time; x = b'x' * 200_000_000; pid = os.fork(); time.sleep(0.5); pid and os.wait()"
    said, peak_mb, _ = watched([sys.executable, "-c", work], None)
    assert not said and 190 < peak_mb < 300


def test_trials_leave_no_padding_out_for_other_batches_may_have_less():
    work = "import os; print(os.environ['CLIPGRAFT_PACK_TEXTS'])"
    assert watched([sys.executable, "-c", work], None)[0] == "0\n"


def test_a_job_that_fails_for_another_reason_is_no_lack_of_memory(results):
    trials = trials_of(results, None)
    trials.inputs["index"] = trials.inputs["shard"]
    with pytest.raises(ConfigError, match=r"fails with parts of 31:(.|\n)*has no tokens"):
        trials.fits(31, 2)


@pytest.mark.parametrize("step", [None, "0"])
def test_in_a_job_of_slurm_trials_have_the_devices_of_this_machine(
    step, results, tmp_path, monkeypatch
):
    """The launcher took them for stages that a Snakemake elsewhere has submitted, and hid the devices."""
    (tmp_path / "pretrain.py").write_text(
        "import os, sys; sys.exit('sees ' + os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    monkeypatch.setattr("clipgraft.batch_size.SCRIPTS", tmp_path)
    set_to = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "5,6", "TMPDIR": str(tmp_path)}
    for name, value in {**set_to, **({"SLURM_STEP_ID": step} if step else {})}.items():
        monkeypatch.setenv(name, value)
    words = ["--configfile", str(results.parent / "config.yaml"), "--results", str(results)]
    try:
        with pytest.raises(SystemExit, match=r"fails with parts of \d+:\nsees 5\n"):
            main(["small", "pretrain/full", *words])
    finally:
        name_place(is_local=False)


def test_a_trial_that_ran_on_the_cpu_tells_nothing_of_devices(results, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "99")  # listed, and not there
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"tried on the CPU: torch sees none of the devices 99"):
        trials_of(results, None).fits(1, 2)


def test_of_a_device_that_was_full_no_memory_of_the_host_is_told(
    results, tmp_path, monkeypatch, capsys
):
    (tmp_path / "pretrain.py").write_text(
        "raise SystemExit('torch.OutOfMemoryError: CUDA out of memory')"
    )
    monkeypatch.setattr("clipgraft.batch_size.SCRIPTS", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert not trials_of(results, None).fits(31, 2)
    assert capsys.readouterr().out.split() == "31 at a time too much does not fit".split()


def test_who_is_killed_by_the_kernel_wanted_too_much():
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert watched(command, None)[2]


def test_bounds_of_all_groups_around_a_process_count(tmp_path):
    inner = tmp_path / "groups/outer/inner"
    inner.mkdir(parents=True)
    for folder, bound in ((inner, "max"), (inner.parent, str(300 * 2**20))):
        (folder / "memory.max").write_text(f"{bound}\n")
        (folder / "memory.current").write_text(f"{100 * 2**20}\n")
    (tmp_path / "own").write_text("0::/outer/inner\n")
    assert group_mb(tmp_path / "groups", tmp_path / "own") == [200]
    assert group_mb(tmp_path / "groups", tmp_path / "none") == []


def test_processes_that_cannot_share_the_batch_are_refused(results):
    job = find_job("small", "pretrain", [results.parent / "config.yaml"])
    check_processes(2, job)
    for num in (0, 4, 124):
        with pytest.raises(ConfigError, match=rf"--processes {num}: .*batch_size = 62 does not"):
            check_processes(num, job)


def test_devices_that_are_hidden_are_not_counted(tmp_path, monkeypatch):
    job = find_job("small", "pretrain/full", [SMALL])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match=r"--processes 2: this machine has 1 device$"):
        check_processes(2, job)


def test_what_is_missing_or_misspelt_is_named_before_anything_runs(results, tmp_path, capsys):
    config = results.parent / "config.yaml"
    with pytest.raises(ConfigError, match=r"no run 'x' in .* Hint: small"):
        find_job("x", "pretrain", [config])
    with pytest.raises(ConfigError, match=r"no training of run small, .* pretrain/full, finetune_"):
        find_job("small", "finetune_expert", [config])  # there are two
    assert find_job("small", "finetune_expert/1", [config]).stage == "finetune_expert"
    words = ["small", "pretrain/full", "--configfile", str(config), "--results", str(tmp_path)]
    with pytest.raises(
        SystemExit, match=r"batch_size: pretrain/full needs .* snakemake .*manifest"
    ):
        main(words)
    assert capsys.readouterr().out == ""
