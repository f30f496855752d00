"""The command, the model card, and the released form."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from small_models import images

import clipgraft
from clipgraft.checkpoint import load_model
from clipgraft.clipmoe import main as read_clip_moe
from clipgraft.config import ConfigError
from clipgraft.export.__main__ import export, main
from clipgraft.export.card import _table
from clipgraft.models.moe import insert_experts
from clipgraft.models.released import read_released


def manifest(folder: Path, stage: str, number: str, inputs: dict[str, Path], **facts) -> Path:
    """A manifest as a stage leaves it behind."""
    folder.mkdir(parents=True, exist_ok=True)
    links = {
        name: {"manifest": f"../../{of.parent.name}/{of.name}/manifest.json", "id": of.name}
        for name, of in inputs.items()
    }
    about = {"stage": stage, "name": f"{stage}/{number}", "id": folder.name, "inputs": links}
    about |= {"outputs": {}, "settings": {}, "seconds": 1234.5, "git": "0123456789ab"}
    (folder / "manifest.json").write_text(json.dumps(about | facts))
    return folder


@pytest.fixture
def store(tmp_path, model_folder) -> Path:
    """A store with a trained model, what it was trained on, and two evaluations, one of another model."""
    source = {"source": {"kind": "tars", "path": "/secret/place"}}
    download = manifest(tmp_path / "store/download/aa", "download", "train", {}, settings=source)
    facts = {"num_samples": 12345, "num_captions": 23456, "rejected": {"truncated": 7, "small": 8}}
    index = manifest(tmp_path / "store/index/bb", "index", "train", {"download": download}, **facts)
    made = model_folder()
    (tmp_path / "store/pretrain").mkdir()
    model = made.rename(tmp_path / "store/pretrain/cc")
    facts = {"samples_seen": 3456789, "settings": {"seed": 4242}}
    manifest(model, "pretrain", "full", {"index": index}, **facts)
    other = manifest(tmp_path / "store/pretrain/dd", "pretrain", "other", {})
    for name, of, value in (("ee", model, 0.4567), ("ff", other, 0.8901)):
        metrics = {"mean_R@1": value, "given colour: R@1": value}
        facts = {"settings": {"task": "flowers"}, "metrics": metrics}
        folder = tmp_path / f"store/evaluate/{name}"
        manifest(folder, "evaluate", "flowers", {"model": of}, **facts)
        chance, given = ({"chance": {"mean_R@1": guess}} for guess in (0.0123, 0.0456))
        result = {"retrieval": chance, "given": {"colour": given}}
        (folder / "result.json").write_text(json.dumps(result))
    return model


def test_the_card_says_what_the_manifests_say(store, tmp_path):
    export("hugging_face", store, tmp_path / "my-model")
    card = (tmp_path / "my-model/README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    for words in (
        "# pretrain/full",
        "3,456,789",
        "4242",
        "0123456789ab",
        "12,345",
        "23,456",
        "tars",
    ):
        assert words in body, words
    assert "| flowers | mean_R@1 | 45.67 | 1.23 |" in body and "89.01" not in body
    assert "| flowers | given colour: R@1 | 45.67 | 4.56 |" in body
    assert "| 15 |" in body  # rejected
    steps = [
        body.index(f"| {name} |") for name in ("download/train", "index/train", "pretrain/full")
    ]
    assert steps == sorted(steps)
    assert 'CLIPModel.from_pretrained("my-model")' in body
    assert str(tmp_path) not in card and "/secret" not in card


def test_the_card_says_what_was_not_evaluated_since_the_model_was_made_anew(store, tmp_path):
    """The numbers may be of other weights; a task that was measured anew is told of no more."""
    about = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(about | {"id": "anew"}))
    export("open_clip", store, tmp_path / "first")
    card = (tmp_path / "first" / "README.md").read_text()
    said = "## Results\n\nNot evaluated since the model was made anew: flowers."
    assert said in card and "45.67" not in card and "| task |" not in card
    folder = tmp_path / "store/evaluate/gg"
    facts = {"settings": {"task": "trees"}, "metrics": {"mean_R@1": 0.1234}}
    manifest(folder, "evaluate", "trees", {"model": store}, **facts)
    measured = json.loads((folder / "manifest.json").read_text())
    measured["inputs"]["model"]["id"] = "anew"
    for task, number in (("trees", "gg"), ("flowers", "hh")):
        (tmp_path / f"store/evaluate/{number}").mkdir(exist_ok=True)
        path = tmp_path / f"store/evaluate/{number}/manifest.json"
        path.write_text(json.dumps(measured | {"settings": {"task": task}}))
        export("open_clip", store, tmp_path / number)
    card = (tmp_path / "gg" / "README.md").read_text()
    assert "| trees | mean_R@1 | 12.34 |" in card and "made anew: flowers." in card
    assert "made anew" not in (tmp_path / "hh" / "README.md").read_text()


def test_the_card_of_the_best_weights_is_of_their_training_without_the_results_of_the_last(
    store, tmp_path
):
    about = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(about | {"best": {"samples_seen": 4096}}))
    best = store / "best"
    best.mkdir()
    for path in store.iterdir():
        if path.is_file() and path.name != "manifest.json":
            shutil.copy(path, best)
    export("open_clip", best, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the best of its looks, after 4,096 samples" in card and "no manifest" not in card
    assert "## Data" in card and "## Results" not in card


def test_a_model_without_a_manifest_has_a_card_that_says_so(model_folder, tmp_path):
    export("vision", model_folder(), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "no manifest" in card and "[1, 16, 32]" in card


def test_the_card_keeps_names_and_tables_whole(model_folder, tmp_path):
    export("onnx", model_folder(), tmp_path / "MY_SIDE_EMBEDDER")
    assert "MY_SIDE_EMBEDDER" in (tmp_path / "MY_SIDE_EMBEDDER" / "README.md").read_text()
    assert _table([("task", "value"), ("a|b\nc", "1")]).splitlines()[-1] == "| a\\|b c | 1 |"


def test_an_expert_is_exported_with_the_rest_of_its_base(model_folder, tmp_path):
    from clipgraft.checkpoint import save_model

    base = model_folder()
    loaded = load_model(base)
    with torch.no_grad():
        loaded.model.visual.transformer.resblocks[0].mlp.c_fc.bias.add_(1)
    expert = tmp_path / "expert"
    expert.mkdir()
    only = ["visual.transformer.resblocks.0.mlp.c_fc.bias"]
    save_model(expert, loaded.model, loaded.spec, loaded.tokenizer, only=only, base=base)
    export("open_clip", expert, tmp_path / "out")
    import open_clip

    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    with torch.inference_mode():
        found = theirs.encode_image(images())
        assert torch.equal(found, clipgraft.load(expert)[0].encode_image(images()))
        assert not torch.equal(found, clipgraft.load(base)[0].encode_image(images()))


def test_the_released_form_comes_back_as_it_was(model_folder, tmp_path):
    sizes = {"width": 64, "head_width": 64}
    changes = {"quick_gelu": True, "vision_cfg": sizes, "text_cfg": {"width": 64, "heads": 1}}
    folder = model_folder(changes, "full", num_experts=2, text_layers="all")
    main(["clip_moe", str(folder), str(tmp_path / "out")])
    model, spec = read_released(tmp_path / "out/clip_moe.pt")
    ours = load_model(folder, insert_experts=insert_experts)
    assert spec["moe"] == ours.spec["moe"]
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_card_of_the_released_form_says_how_many_experts_a_token_goes_to(
    model_folder, tmp_path, top_k
):
    sizes = {"width": 64, "head_width": 64}
    changes = {"quick_gelu": True, "vision_cfg": sizes, "text_cfg": {"width": 64, "heads": 1}}
    folder = model_folder(changes, "full", num_experts=3, text_layers="all", top_k=top_k)
    main(["clip_moe", str(folder), str(tmp_path / "out")])
    command = re.search(
        r"clipgraft\.clipmoe (read [^`]*)`", (tmp_path / "out/README.md").read_text()
    )
    words = command[1].replace("out/", f"{tmp_path}/out/").replace("OUT", f"{tmp_path}/back")
    read_clip_moe(words.split())
    back, ours = (
        load_model(of, insert_experts=insert_experts) for of in (tmp_path / "back", folder)
    )
    assert back.spec["moe"] == ours.spec["moe"] and ours.spec["moe"]["top_k"] == top_k


WRONG = [
    (["onnx", "MODEL", "OUT", "--code"], "--code has no effect on onnx"),
    (["onnx", "MODEL", "MODEL"], "exists. Hint: the name of a new folder"),
    (["onnx", "NOWHERE", "OUT"], "model.json does not exist. Hint: is .* a model folder"),
    (["clip_moe", "MODEL", "OUT"], "reads texts with CLIP's 49,408"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_what_cannot_be_is_said_in_one_line(model_folder, tmp_path, words, message):
    model_folder()
    paths = {name: str(tmp_path / name.lower()) for name in ("MODEL", "OUT", "NOWHERE")}
    with pytest.raises(SystemExit, match=message) as error:
        main([paths.get(word, word) for word in words])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".export-*"))


def test_an_unknown_format_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["onxn", "a", "b"])
    assert "invalid choice: 'onxn'" in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"is .* a model folder"):
        clipgraft.load(tmp_path)
