"""Laws of what is read from others: weights and arrays are numbers, and code that lies beside them is never run."""

import ast
import gzip
import hashlib
import io
import json
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from clipgraft import load
from clipgraft.checkpoint import SPEC, WEIGHTS, load_model, save_model
from clipgraft.config import ConfigError
from clipgraft.evaluation.evalset.tars import open_tars
from clipgraft.models.build import build, describe
from clipgraft.models.released import read_released
from clipgraft.models.weights import read_state
from clipgraft.training_state import TrainingState

ROOT = Path(__file__).resolve().parents[2]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    """A file that no attack may make; that this one works is shown first."""
    marker = tmp_path / "was-run"
    pickle.loads(pickle.dumps(Evil(marker))).close()
    assert marker.exists()
    marker.unlink()
    yield marker
    assert not marker.exists()


def poisoned(path: Path, marker: Path, form: str) -> Path:
    content = {"state_dict": {"weight": torch.zeros(2)}, "optimizer": Evil(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, 2))
    elif form == "renamed zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, 2))
            archive.writestr("archive/version", "3\n")
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    return path


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "renamed zip"])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "weights"])
def test_weights_that_hold_code_are_refused(form, name, marker, tmp_path):
    path = poisoned(tmp_path / name, marker, form)
    for read in (lambda: read_state(path, "model.pretrained"), lambda: read_released(path)):
        with pytest.raises(ConfigError, match="cannot be read"):
            read()


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_training_state_that_holds_code_is_not_used(form, marker, tmp_path, caplog):
    state = TrainingState(tmp_path / "state", "tag")
    state.save({"step": 3, "weight": torch.zeros(2)})
    (path,) = (tmp_path / "state").glob("*.pt")
    checksum = hashlib.sha256(poisoned(path, marker, form).read_bytes()).hexdigest()[:16]
    path.rename(
        path.with_stem(f"{path.stem.rpartition('-')[0]}-{checksum}")
    )  # it is as it was written
    assert state.load() is None
    assert "cannot be read" in caplog.text
    state.close()


def test_arrays_that_hold_code_are_refused(marker, tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil(marker)], object), allow_pickle=True)
    (tmp_path / "test").mkdir()
    (tmp_path / "test/nshards.txt").write_text("1")
    with tarfile.open(tmp_path / "test/0.tar", "w") as tar:
        for name, data in {"a.png": b"x", "a.npy": buffer.getvalue()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ConfigError, match=r"its \.npy is no array"):
        open_tars(tmp_path).metadata()


# --- model folders ----------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, tiny_config):
    """A model folder with code in every place where some library would look for it."""
    folder, tokens = tmp_path / "model", tmp_path / "merges.txt.gz"
    folder.mkdir()
    tokens.write_bytes(gzip.compress(b"#version: 0.2\n"))
    save_model(folder, build(tiny_config), describe(tiny_config), tokens)
    code = f"open({str(tmp_path / 'was-run')!r}, 'w')\n"
    for name in ("modeling_x.py", "__init__.py", "sitecustomize.py", "conftest.py", "setup.py"):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "open_clip_pytorch_model.bin", "model.pt"):
        poisoned(folder / name, tmp_path / "was-run", "torch")
    auto = {"AutoModel": "modeling_x.X", "AutoConfig": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": auto}))
    return folder


def test_code_in_a_model_folder_is_not_run(model, marker, monkeypatch):
    monkeypatch.chdir(model)
    load_model(model)
    assert not {"modeling_x", "conftest_x"} & set(sys.modules)


@pytest.mark.parametrize(
    ("tower", "settings"),
    [
        ("text_cfg", {"hf_model_name": "FOLDER", "hf_model_pretrained": True}),
        ("vision_cfg", {"timm_model_name": "local-dir:FOLDER", "timm_model_pretrained": True}),
        ("vision_cfg", {"timm_model_name": "hf-hub:someone/x", "timm_model_pretrained": True}),
        (
            "text_cfg",
            {"hf_tokenizer_name": "FOLDER", "tokenizer_kwargs": {"trust_remote_code": True}},
        ),
    ],
)
def test_a_model_folder_names_no_other_code(tower, settings, model, marker):
    spec = json.loads((model / SPEC).read_text())
    filled = {
        key: value.replace("FOLDER", str(model)) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    spec["config"][tower] |= filled
    (model / SPEC).write_text(json.dumps(spec))
    for read in (load_model, load):
        with pytest.raises(ConfigError, match="is not supported"):
            read(model)


def test_weights_of_a_model_folder_that_hold_code_are_refused(model, marker):
    poisoned(model / WEIGHTS, marker, "torch")
    with pytest.raises(ConfigError, match="damaged or no safetensors"):
        load_model(model)


# --- our own code -----------------------------------------------------------------------------------

_CALLS = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads",
    "marshal.load", "shelve.open", "joblib.load", "dill.load", "dill.loads", "os.system", "os.popen", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.jit.load", "torch.hub.load", "pd.read_pickle",
    "shutil.unpack_archive", "tempfile.mktemp", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
_METHODS = {"extractall", "extract", "open_code"}
_FLAGS = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}


def dangers(code: str) -> list[str]:
    """Calls of a module that may run what they read."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        flags = {each.arg: getattr(each.value, "value", None) for each in node.keywords}
        is_bad = name in _CALLS or (
            isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS
        )
        is_bad |= any(key in flags and flags[key] is value for key, value in _FLAGS.items())
        is_bad |= name == "torch.load" and flags.get("weights_only") is not True
        found += [f"line {node.lineno}: {name}"] if is_bad else []
    return found


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(data)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text, yaml.Loader)",
        "tar.extractall(folder)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert dangers(line)


def test_no_code_of_ours_runs_what_it_reads():
    paths = [
        path for name in ("lib", "scripts", "benchmarks") for path in (ROOT / name).rglob("*.py")
    ]
    assert len(paths) > 150
    found = {str(path.relative_to(ROOT)): dangers(path.read_text()) for path in paths}
    assert {name: lines for name, lines in found.items() if lines} == {}
