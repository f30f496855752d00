"""Laws of folders that came from elsewhere: what stands in their files leads to nothing outside of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipgraft.config import ConfigError
from clipgraft.evaluation.evalset.hub import image_bytes, read_table
from clipgraft.launch import lease
from clipgraft.provenance import read_manifest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = '''"""Write a number."""
from clipgraft.job import Job

def main(job):
    with job.outputs() as out:
        (out / "number.txt").write_text("7")

if __name__ == "__main__":
    Job.run(main, __doc__)
'''


def manifest(folder: Path, **about: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"stage": "number", "id": "x", "settings": {}, "inputs": {}, "outputs": {}, **about}
    (folder / "manifest.json").write_text(json.dumps(whole))
    return folder / "manifest.json"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("name", ["../victim.txt", "part/../../victim.txt", "ABSOLUTE"])
def test_outputs_of_a_manifest_lead_to_no_file_outside(name, tmp_path):
    """The files that a manifest lists are deleted when its job runs again."""
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    name = str(victim) if name == "ABSOLUTE" else name
    outputs = {name: {"bytes": len("precious"), "sha256": "0"}}
    path = manifest(tmp_path / "out", outputs=outputs)
    with pytest.raises(ConfigError, match="leads out of its folder"):
        read_manifest(path)
    (tmp_path / "number.py").write_text(SCRIPT)
    done = run(tmp_path / "number.py", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert victim.read_text() == "precious"
    assert list(read_manifest(path)["outputs"]) == ["number.txt"]


@pytest.mark.parametrize("where", ["../../secret", "/etc", "../../../../../../../../etc/passwd"])
def test_inputs_of_a_manifest_lead_to_finished_jobs_alone(where, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").write_text("secret")
    (tmp_path / "number.py").write_text(SCRIPT)
    path = manifest(tmp_path / "store/out", inputs={"data": {"manifest": where, "id": "x"}})
    done = run(tmp_path / "number.py", path, "--out", tmp_path / "new")
    assert done.returncode == 1 and "manifest.json" in done.stderr, done.stderr
    assert "error: " in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "new").exists()


def test_a_table_of_pictures_names_none_outside_of_its_cache(tmp_path):
    private = tmp_path / "private.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(private)
    cache = tmp_path / "evalset/hf_cache"
    folder = cache / "someone___flickr/x/1.0/abc"
    folder.mkdir(parents=True)
    (cache / "downloads/extracted").mkdir(parents=True)
    own = cache / "downloads/extracted/own.png"
    own.write_bytes(private.read_bytes())
    (cache / "downloads/link.png").symlink_to(private)
    named = [
        str(private),
        "/etc/passwd",
        "downloads/../../../private.png",
        str(cache / "../../private.png"),
        "downloads/link.png",
        os.path.relpath(private),
    ]
    moved = "/home/someone/hf_cache/downloads/extracted/own.png"
    paths = [*named, str(own), moved]
    images = [{"bytes": None, "path": path} for path in paths]
    table = pa.table({"image": images, "caption": ["a"] * len(paths)})
    pq.write_table(table, folder / "flickr_1k_test_image_text_retrieval-test.parquet")
    files = [folder / "flickr_1k_test_image_text_retrieval-test.parquet"]
    cells = read_table(files, ("image", "caption"))["image"].to_pylist()
    for cell in cells[: len(named)]:
        with pytest.raises(ConfigError, match="neither bytes nor a file in"):
            image_bytes(cell, "row", files)
    for cell in cells[len(named) :]:
        assert image_bytes(cell, "row", files) == private.read_bytes()


def test_locks_of_devices_are_not_opened_in_a_folder_of_another_user(tmp_path):
    """In /tmp anyone may have made it first, with links to files of this user where the locks will be."""
    victim, trap = tmp_path / "victim", tmp_path / "trap"
    victim.write_text("precious")
    trap.mkdir()
    (trap / "gpu0.lock").symlink_to(victim)
    (tmp_path / "link").symlink_to(trap)
    with pytest.raises(SystemExit, match="is no folder of this user"):
        lease(["0"], 1, tmp_path / "link")
    if os.getuid() == 0:
        os.chown(trap, 12345, 12345)
        with pytest.raises(SystemExit, match="is no folder of this user"):
            lease(["0"], 1, trap)
    assert victim.read_text() == "precious"


def test_names_that_are_commands_of_a_terminal_are_shown_and_not_obeyed(tmp_path):
    code = (
        "import logging, sys; from pathlib import Path; from clipgraft.log import set_up\n"
        "set_up('job', Path(sys.argv[1]))\n"
        "logging.getLogger('x').info('rejected %s\\n  next', '\\x1b]0;title\\x07\\x1b[2J\\x9b1m a\\tb')\n"
    )
    done = run("-c", code, tmp_path / "log")
    shown = r"[job] rejected \x1b]0;title\x07\x1b[2J\x9b1m a" + "\tb\n  next\n"
    assert done.stderr == shown
    assert (tmp_path / "log").read_text() == shown
