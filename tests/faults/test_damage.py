"""Laws of damage: a byte that changed, a manifest that does not belong, a file that is late: named, never used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from campaign import bits

from clipgraft import integrity, provenance
from clipgraft.checkpoint import read_weights
from clipgraft.config import ConfigError
from clipgraft.data.samples import Samples
from clipgraft.data.shards import Shards
from clipgraft.integrity import Inputs, to_the_present


@pytest.fixture
def run(finished) -> Path:
    """The folder with the links to the jobs of the run."""
    return finished.root / "results/runs/small"


@contextmanager
def flipped(path: Path, place: int) -> Iterator[None]:
    """One bit of a file is wrong; its size and its time are as before."""
    stat = path.stat()

    def flip() -> None:
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0x10]))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    flip()
    try:
        yield
    finally:
        flip()


def replay(run: Path, job: str, out: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a finished job again, elsewhere."""
    script = run.parents[2] / f"scripts/{job.split('/')[0]}.py"
    code = (
        f"import runpy, sys; from clipgraft import integrity; {before}\nsys.argv = sys.argv[1:]\n"
    )
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [script, run / job / "manifest.json", "--out", out, "--threads", "1"]
    environment = {**os.environ, "CLIPGRAFT_LATENCY_SECONDS": "0"}
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True
    )


def is_checked_when_read(folder: Path, name: str) -> bool:
    patterns = integrity.CHECKED_WHEN_READ
    stage = "" if folder.parent.name == "download" else folder.parent.name
    of_stage = (*patterns["*"], *patterns.get(stage, ()))
    return any(Path(name).match(pattern) for pattern in of_stage)


def read_images(folder: Path) -> None:
    shards = Shards.open(folder)
    rows = np.arange(len(shards))
    box = np.tile(np.array([0.0, 0, 1, 1], np.float32), (len(rows), 1))
    shards.squares(rows, box, np.empty((len(rows), 8, 8, 3), np.uint8))


def test_a_changed_byte_of_any_file_of_any_job_is_named(finished):
    folders = [path.parent for path in (finished.root / "results").glob("*/*/manifest.json")]
    assert len({folder.parent.name for folder in folders}) == 11  # all stages of the DAG
    for folder in folders:
        reader = "index" if folder.parent.name == "download" else "cluster"
        Inputs([folder], reader).finish()
        for name, about in json.loads((folder / "manifest.json").read_text())["outputs"].items():
            path, size = folder / name, about["bytes"]
            if is_checked_when_read(folder, name):
                continue
            for place in {0, size // 2, size - 1} if size else set():
                with (
                    flipped(path, place),
                    pytest.raises(ConfigError, match=re.escape(f"{path} is damaged")),
                ):
                    Inputs([folder], reader).finish()


def test_a_changed_byte_of_weights_is_named_by_whoever_reads_them(finished):
    paths = list((finished.root / "results").glob("*/*/**/model.safetensors"))
    assert any(path.parent.name == "best" for path in paths)
    for path in paths:
        read_weights(path.parent)
        with (
            flipped(path, path.stat().st_size - 3),
            pytest.raises(ConfigError, match=re.escape(str(path))),
        ):
            read_weights(path.parent)


def test_a_changed_byte_of_any_stored_image_is_named(run):
    folder = (run / "shard/full").resolve()
    read_images(folder)
    shards = Shards.open(folder)
    for row in (0, len(shards) - 1):
        place = np.load(folder / "offsets.npy")[row]
        path = folder / f"{place['file']:06d}.tar"
        for offset in (0, int(place["length"]) // 2, int(place["length"]) - 1):
            named = rf"{re.escape(str(path))}: image of row {row}: it is damaged"
            with (
                flipped(path, int(place["offset"]) + offset),
                pytest.raises(ConfigError, match=named),
            ):
                read_images(folder)


def test_a_changed_byte_of_the_table_of_stored_images_is_not_believed(run, tmp_path):
    folder = shutil.copytree((run / "shard/full").resolve(), tmp_path / "shard")
    whole = np.load(folder / "offsets.npy")
    for column in whole.dtype.names[1:]:  # the first says which of the tars, here one
        places = whole.copy()
        places[column][5] += 1
        np.save(folder / "offsets.npy", places)
        with pytest.raises(ConfigError, match="image of row 5"):
            read_images(folder)


def test_a_changed_byte_of_a_download_is_named_by_those_who_read_it_through_the_index(
    run, tmp_path
):
    tar, offset, size = Samples.open(run / "index/train").place(7)
    with flipped(tar, offset + size // 2):
        done = replay(run, "shard/full", tmp_path / "shard")
    assert done.returncode == 1 and f"{tar.name} is not what it was" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "shard/manifest.json").exists()


def test_the_base_of_an_expert_is_checked_where_the_expert_is_read(run, tmp_path):
    base = (run / "pretrain/full/model.safetensors").resolve()
    with flipped(base, base.stat().st_size - 5):
        done = replay(run, "embed/1", tmp_path / "embed")
    assert done.returncode == 1 and f"{base} is damaged" in done.stderr
    assert not (tmp_path / "embed/manifest.json").exists()


def test_outputs_appear_after_the_checksums_of_large_inputs_which_are_computed_meanwhile(
    run, tmp_path
):
    embedding = (run / "embed/0/image.npy").resolve()
    with flipped(embedding, embedding.stat().st_size - 1):
        done = replay(run, "cluster/1", tmp_path / "cluster", "integrity.BYTES_BEFORE = 0")
    assert done.returncode == 1 and f"{embedding} is damaged" in done.stderr
    assert not (tmp_path / "cluster/manifest.json").exists()
    assert not (tmp_path / "cluster/clusters.npy").exists()


def test_damage_explains_the_failure_that_it_causes(run, tmp_path):
    embedding = (run / "embed/0/image.npy").resolve()
    with flipped(embedding, 0):  # no npy file any more
        done = replay(run, "cluster/1", tmp_path / "cluster", "integrity.BYTES_BEFORE = 0")
    assert done.returncode == 1
    assert f"{embedding} is damaged" in done.stderr.splitlines()[-1]


# --- manifests ----------------------------------------------------------------------------------------------


def changed(path: Path, edit) -> str:
    manifest = json.loads(path.read_text())
    edit(manifest)
    return json.dumps(manifest)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda m: m["settings"].update(image_size=64), "was changed after it was written"),
        (lambda m: m["outputs"].popitem(), "was changed after it was written"),
        (lambda m: m.update(stage="embed"), "was changed after it was written"),
        (lambda m: m.pop("stage"), "is not a manifest"),
    ],
    ids=["another setting", "a file less", "another stage", "no stage"],
)
def test_an_edited_manifest_is_refused(run, tmp_path, monkeypatch, how, said):
    monkeypatch.setattr(integrity, "LATENCY_SECONDS", 0)
    folder = shutil.copytree((run / "shard/full").resolve(), tmp_path / "shard")
    text = changed(folder / "manifest.json", how)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=f"{folder / 'manifest.json'} {said}"):
        Inputs([folder], "index")


def test_a_manifest_of_another_version_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "LATENCY_SECONDS", 0)
    short, full = ((run / f"shard/{name}").resolve() for name in ("short", "full"))
    own = tmp_path / "results/shard" / full.name
    shutil.copytree(full, own)
    Inputs([own], "index")
    shutil.copy(short / "manifest.json", own / "manifest.json")
    with pytest.raises(ConfigError, match=f"so {own} is not whole"):  # other files
        Inputs([own], "index")
    shutil.rmtree(own)
    shutil.copytree(short, own)  # all of another version
    with pytest.raises(ConfigError, match=f"does not belong here: it is of shard/{short.name}"):
        Inputs([own], "index")


# --- clocks and slow file systems ---------------------------------------------------------------------------


def test_a_file_that_shows_itself_late_is_waited_for_and_one_that_never_does_is_named(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(integrity, "LATENCY_SECONDS", 10)
    folder = shutil.copytree((run / "shard/full").resolve(), tmp_path / "shard")
    for name in ("manifest.json", "offsets.npy"):
        (folder / name).rename(tmp_path / name)
        late = threading.Timer(1, (tmp_path / name).rename, [folder / name])
        late.start()
        Inputs([folder], "index").finish()
        late.join()
    (folder / "offsets.npy").unlink()
    monkeypatch.setattr(integrity, "LATENCY_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=r"offsets.npy is missing"):
        Inputs([folder], "index")


def test_a_manifest_from_the_future_comes_to_the_present_and_others_stay(tmp_path):
    now = time.time()
    for name, seconds in (("past", -100), ("future", 1000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
        os.utime(tmp_path / name / "manifest.json", (now + seconds, now + seconds))
    to_the_present([tmp_path / "past", tmp_path / "future", tmp_path / "nowhere"])
    times = {path.parent.name: path.stat().st_mtime - now for path in tmp_path.glob("*/*.json")}
    assert times["past"] == pytest.approx(-100, abs=1)
    assert 0 <= times["future"] < 500


def test_two_runs_differ_in_any_output_but_not_in_the_times_of_a_training(tmp_path):
    folder = tmp_path / "evaluate/0123abcd"
    folder.mkdir(parents=True)
    outputs = {name: name for name in ("result.json", "answers.parquet", "page.html")}
    watch = {"step": 2, "seconds": 0.5, "watch": {"mean_R@1": 0.25}}
    row = {"step": 4, "seconds": 0.9, "lr": 0.1, "tau": 0.07, "loss": 1.5}

    def found(*rows: dict, **others: str) -> dict[str, str]:
        series = "".join(json.dumps(each) + "\n" for each in rows)
        for name, text in (outputs | others | {"metrics.jsonl": series}).items():
            (folder / name).write_text(text)
        about = {"outputs": provenance.describe_outputs(folder)}
        (folder / "manifest.json").write_text(json.dumps(about))
        return bits(tmp_path)

    before = found(watch, row)
    assert len(before) == 4
    assert found(row | {"step": 3}, watch | {"seconds": 7}, row | {"seconds": 8}) == before
    assert found(watch | {"watch": {"mean_R@1": 0.5}}, row) != before
    assert found(watch, row | {"tau": 0.08}) != before
    for name in outputs:
        assert found(watch, row, **{name: "other"}) != before
    assert found(watch, row) == before
    (folder / "page.html").write_text("page.htmk")  # of the same size
    with pytest.raises(AssertionError, match=r"page\.html is not what its manifest says"):
        bits(tmp_path)
