"""Laws of what a finished run has to try."""

import json
import os
import shutil

import pytest

from clipgraft.config import ConfigError
from clipgraft.evalset import model_folders
from clipgraft.explore.finished import FinishedRun, finished_runs


@pytest.fixture
def own_store(store, tmp_path):
    """A copy, to break."""
    return shutil.copytree(store, tmp_path / "results", symlinks=True)


def test_a_run_is_what_its_lock_says(store):
    run = FinishedRun.open("tiny", store)
    lock = json.loads((store / "runs/tiny/versions.json").read_text())
    assert run.models == {
        "base": [(store / lock["pretrain/full"]).resolve()],
        "expert_1": [(store / lock["finetune_expert/1"]).resolve()],
        "moe": [(store / lock["finetune_router/moe"]).resolve()],
    }
    assert set(run.indexes) == {"train", "renders"}
    assert run.stored("base", "train") == (store / lock["embed/0"]).resolve()
    assert run.stored("base", "renders") is None and run.stored("moe", "train") is None
    result = json.loads((store / lock["evaluate/moe/renders"] / "result.json").read_text())
    about = result["zero_shot"]["colour"]
    assert run.classes["colour"].names == about["classes"]
    assert run.classes["colour"].templates == about["templates"]


def test_labels_of_one_name_stand_apart_where_data_sets_differ(own_store):
    lock = json.loads((own_store / "runs/tiny/versions.json").read_text())
    folder = own_store / lock["evaluate/moe/renders"]
    result = json.loads((folder / "result.json").read_text())
    result["zero_shot"]["colour"]["classes"] = ["warm", "cold"]
    (folder / "result.json").write_text(json.dumps(result))
    run = FinishedRun.open("tiny", own_store)
    assert run.classes["colour (renders)"].names == ["warm", "cold"]
    assert len(run.classes["colour"].names) == 8


def test_classes_of_an_evaluation_folder_are_named_after_their_task(own_store):
    lock = json.loads((own_store / "runs/tiny/versions.json").read_text())
    folder = own_store / lock["evaluate/moe/renders"]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"] = {"folder": "sets", "evalset": "vtab/dtd"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    result = json.loads((folder / "result.json").read_text())
    result["zero_shot"]["colour"]["classes"] = ["warm", "cold"]
    (folder / "result.json").write_text(json.dumps(result))
    assert "colour (vtab/dtd)" in FinishedRun.open("tiny", own_store).classes


def test_the_only_run_needs_no_name(own_store):
    assert FinishedRun.open(None, own_store).name == "tiny"
    shutil.copytree(own_store / "runs/tiny", own_store / "runs/other", symlinks=True)
    assert finished_runs(own_store) == ["other", "tiny"]
    with pytest.raises(ConfigError, match=r"2 finished runs: other, tiny\. Hint: name one"):
        FinishedRun.open(None, own_store)


def test_without_a_finished_run_the_message_says_how_to_get_one(tmp_path):
    with pytest.raises(ConfigError, match=r"no finished run\. Hint: make demo"):
        FinishedRun.open(None, tmp_path)


def test_an_unfinished_run_is_named_with_what_is_missing(store):
    with pytest.raises(ConfigError, match=r"'tinny' is not finished.*Finished: tiny\. Hint: snake"):
        FinishedRun.open("tinny", store)


def test_a_run_whose_jobs_are_gone_is_not_finished(own_store):
    lock = json.loads((own_store / "runs/tiny/versions.json").read_text())
    (own_store / lock["evaluate/moe/renders"] / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="the job that writes it has not finished"):
        FinishedRun.open("tiny", own_store)


def test_a_page_without_models_has_nothing_to_try(own_store):
    path = own_store / "runs/tiny/versions.json"
    lock = json.loads(path.read_text())
    path.write_text(json.dumps({"index/train": lock["index/train"]}))
    with pytest.raises(ConfigError, match="has no model to try"):
        FinishedRun.open("tiny", own_store)
    path.write_text("[")
    with pytest.raises(ConfigError, match="is no lock of a run"):
        FinishedRun.open("tiny", own_store)


def test_what_the_run_lacks_is_named_with_what_it_has(store):
    run = FinishedRun.open("tiny", store)
    with pytest.raises(ConfigError, match="no model 'mole'; did you mean `moe`"):
        run.model_folders("mole")
    with pytest.raises(ConfigError, match="no data set 'render'; did you mean `renders`"):
        run.index("render")


def test_a_model_that_is_not_whole_is_not_read(own_store):
    run = FinishedRun.open("tiny", own_store)
    (run.models["base"][0] / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing"):
        run.model_folders("base")


def test_an_evaluation_by_hand_knows_the_same_models(own_store):
    lock_file = own_store / "runs/tiny/versions.json"
    lock = json.loads(lock_file.read_text())
    base, moe = (
        (own_store / lock[job]).resolve() for job in ("pretrain/full", "finetune_router/moe")
    )
    ensemble = shutil.copytree(own_store / lock["evaluate/moe/renders"], own_store / "evaluate/two")
    manifest = json.loads((ensemble / "manifest.json").read_text())
    model = manifest["inputs"].pop("model")
    other = {"manifest": os.path.relpath(base / "manifest.json", ensemble), "id": "x"}
    manifest["inputs"] |= {"model_0": other, "model_1": model}
    (ensemble / "manifest.json").write_text(json.dumps(manifest))
    lock_file.write_text(json.dumps({"evaluate/ensemble/renders": "evaluate/two", **lock}))
    assert model_folders("tiny", "ensemble", own_store) == [base, moe]
    assert model_folders("tiny", "base", own_store) == [base]
    assert model_folders("tiny", None, own_store) == [moe]
    assert model_folders(str(moe), None, own_store) == [moe]
    with pytest.raises(ConfigError, match="has no model 'bass'; did you mean `base`"):
        model_folders("tiny", "bass", own_store)
    with pytest.raises(ConfigError, match=r"neither a model folder .* nor a finished run"):
        model_folders("nothing", None, own_store)
