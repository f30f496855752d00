"""`python -m clipgraft.evalset`: goes on after a failure, does nothing twice, and says what is missing."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from evalsets import pictures, write_classes

from clipgraft import evalset
from clipgraft.checkpoint import save_model
from clipgraft.data.vocabulary import Encoder, clip_merges
from clipgraft.evalset import evaluate_folder, table
from clipgraft.evaluation.evalset import evaluate
from clipgraft.evaluation.failure import or_failure
from clipgraft.models.build import build, describe
from clipgraft.settings import EvalsetJob


@pytest.fixture
def model(tiny_config, tmp_path) -> Path:
    vocabulary = Encoder(clip_merges()[:50])
    vocabulary.write(tmp_path / "merges.txt.gz")
    text = {**tiny_config["text_cfg"], "vocab_size": vocabulary.vocab_size}
    torch.manual_seed(0)
    config = {**tiny_config, "text_cfg": text}
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(folder, build(config), describe(config), tmp_path / "merges.txt.gz")
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    names = list("abcdefghij")
    for name in ("cifar10", "mnist", "own"):
        folder = tmp_path / "sets" / f"wds_{name}_test"
        write_classes(folder, pictures(4), range(4), names, templates=[f"{name} {{c}}"])
    (tmp_path / "sets" / "wds_cifar10_test" / "test" / "1.tar").write_bytes(b"cut")
    return tmp_path / "sets"


def test_a_task_that_fails_is_told_and_the_others_go_on(model, root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    results = evaluate_folder([model], root, out, names=None, threads=1)
    assert "1.tar" in results["cifar10"]["failed"]
    lines = [json.loads(line) for line in (out / "eval_results.jsonl").read_text().splitlines()]
    assert [line["dataset"] for line in lines] == ["MNIST", "own"]
    assert all(set(line) == {"key", "dataset", "metrics"} for line in lines)
    total = json.loads((out / "aggregate.json").read_text())
    assert list(total["failed"]) == ["cifar10"] and total["present"]["Average"] == "1/38"
    printed = table(results)
    assert "failed: " in printed and "partial: 4 samples instead of 10,000" in printed
    assert "1/38 averaged tasks" in printed and "missing: Caltech-101" in printed

    calls, real = [], evaluate.measure
    monkeypatch.setattr(
        evaluate, "measure", lambda root, task, of: calls.append(task.key) or real(root, task, of)
    )
    again = evaluate_folder([model], root, out, names=None, threads=1)
    assert calls == ["cifar10"] and again["own"] == results["own"]
    names = root / "wds_own_test" / "classnames.txt"
    names.write_text(names.read_text() + "k\n")
    evaluate_folder([model], root, out, names=["own", "mnist"], threads=1)
    assert calls == ["cifar10", "own"]
    part = evaluate_folder([model], root, out, names=["own"], threads=1)
    lines = [json.loads(line) for line in (out / "eval_results.jsonl").read_text().splitlines()]
    assert (
        [line["key"] for line in lines] == list(part) == ["mnist", "own"]
    )  # also what was not asked for
    assert json.loads((out / "aggregate.json").read_text())["present"]["Average"] == "1/38"


def test_a_folder_that_may_not_be_read_fails_its_own_task_alone(model, root, tmp_path, monkeypatch):
    closed, scandir = root / "wds_own_test" / "cache", os.scandir
    closed.mkdir()

    def refusing(place):  # root, who may run tests, may read anything
        if str(place) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scandir(place)

    evaluate_folder([model], root, tmp_path / "out", names=["own"], threads=1)
    monkeypatch.setattr(os, "scandir", refusing)
    results = evaluate_folder([model], root, tmp_path / "out", names=["own", "mnist"], threads=1)
    assert results["mnist"]["metrics"] and "cannot be read" in results["own"]["failed"]


def test_a_tar_that_may_not_be_read_is_the_same_failure_by_hand_and_in_a_job(
    model, root, tmp_path, caplog, monkeypatch
):
    tar = root / "wds_own_test" / "test" / "0.tar"

    def refusing(place, mode):  # root, who may run tests, may read anything
        if str(place) == str(tar):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return open(place, mode)

    monkeypatch.setattr("tarfile.bltn_open", refusing)
    out, job = tmp_path / "out", tmp_path / "job"
    found = evaluate_folder([model], root, out, names=["own", "mnist"], threads=1)
    assert found["mnist"]["metrics"] and str(tar) in found["own"]["failed"]
    (job / "writing").mkdir(parents=True)
    wanted, cache = EvalsetJob(folder=str(root), evalset="own"), out / ".classifiers"
    or_failure(
        found["own"]["task"],
        job,
        job / "writing",
        lambda: evaluate.evaluate_evalset(wanted, [model], job / "writing", cache),
    )
    assert json.loads((job / "writing" / "result.json").read_text()) == found["own"]
    assert caplog.text.count("Traceback") == 2


def test_a_job_of_the_run_writes_the_same_result(model, root, tmp_path):
    by_hand = evaluate_folder([model], root, tmp_path / "out", names=["own"], threads=1)["own"]
    (tmp_path / "job").mkdir()
    wanted = EvalsetJob(folder=str(root), evalset="own")
    cache = tmp_path / "out" / ".classifiers"
    facts = evaluate.evaluate_evalset(wanted, [model], tmp_path / "job", cache)
    assert json.loads((tmp_path / "job" / "result.json").read_text()) == by_hand
    assert facts == {"num_images": 4, "metrics": {"acc1": by_hand["metrics"]["acc1"]}}
    assert len(list(cache.iterdir())) == 1


def test_the_exit_code_tells_of_a_failure(model, root, tmp_path, monkeypatch, capsys):
    command = ["evalset", str(model), str(root), "--out", str(tmp_path / "out"), "--threads", "1"]
    for tasks, code in ((["mnist"], 0), (["mnist", "cifar10"], 1)):
        monkeypatch.setattr(sys, "argv", [*command, "--tasks", *tasks])
        with pytest.raises(SystemExit) as left:
            evalset.main()
        assert left.value.code == code
        assert "mnist" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--tasks", "mnits"])
    with pytest.raises(SystemExit, match="did you mean `mnist`"):
        evalset.main()
