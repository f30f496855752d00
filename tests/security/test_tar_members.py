"""Laws of tars that others wrote: a member's name is a key, and nothing of it leads anywhere."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipgraft.config import ConfigError
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.shards import write_shards
from clipgraft.data.tars import list_members
from clipgraft.evaluation.evalset.tars import open_tars
from clipgraft.settings import IndexJob, ShardJob
from clipgraft.sources import TarSource


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **settings: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in settings.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "job" not in path.relative_to(folder).parts[:1]
    }


def test_names_links_and_devices_lead_nowhere(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(99))
    (tmp_path / "secret.txt").write_text("the caption of a secret")
    names = ["../../escaped", str(tmp_path / "absolute"), "a/../../../b", "./c"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, name in enumerate(names):
            add(tar, f"{name}.png", picture(number))
            add(tar, f"{name}.txt", b"a caption")
        for kind, name in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard")):
            add(tar, f"{name}.png", type=kind, linkname=str(secret))
            add(tar, f"{name}.txt", type=kind, linkname=str(secret.with_suffix(".txt")))
        add(tar, "device.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add(tar, "pipe.png", type=tarfile.FIFOTYPE)
        add(tar, "folder.png", type=tarfile.DIRTYPE)
    before = snapshot(tmp_path)
    job = tmp_path / "job"
    out, index, shards = job / "download", job / "index", job / "shard"
    for folder in (out, index, shards):
        folder.mkdir(parents=True)
    download(TarSource(kind="tars", tars=str(tmp_path / "*.tar")), out, 1)
    build_index(IndexJob(min_side=8, tokenize=False), out, index, 1)
    write_shards(ShardJob(image_size=16), index, shards, 1)
    uids = pq.read_table(index / "samples.parquet")["uid"].to_pylist()
    assert len(uids) == len(names) and not {"soft", "hard", "device", "pipe"} & set(uids)
    assert snapshot(tmp_path) == before
    written = {str(path.relative_to(job)) for path in job.rglob("*") if path.is_file()}
    assert not [name for name in written if "escaped" in name or "absolute" in name], written
    with tarfile.open(shards / "000000.tar") as tar:
        assert tar.getnames()[:2] == ["000000000.jpg", "000000000.json"]


def test_a_member_that_leads_back_into_the_tar_ends(tmp_path):
    """CVE-2025-8194: a negative size in the header has `tarfile` read the same member again, without end."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.png", picture(0))
        add(tar, "b.png", b"")
    data = bytearray((tmp_path / "0.tar").read_bytes())
    place = data.index(b"b.png")
    data[place + 124 : place + 136] = b"\xff" + (-512).to_bytes(11, "big", signed=True)
    data[place + 148 : place + 156] = b" " * 8
    data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    (tmp_path / "0.tar").write_bytes(data)
    code = (
        "import sys; from pathlib import Path; from clipgraft.data.tars import list_members\n"
        "from clipgraft.config import ConfigError\n"
        "try: list_members(Path(sys.argv[1]))\n"
        "except ConfigError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "0.tar")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "is not whole" in done.stdout, (done.stdout, done.stderr[-800:])


def test_a_member_whose_zeros_were_left_out_is_told(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)
    words = ["tar", "--sparse", "--format=gnu", "-cf", "0.tar", "a.png"]
    subprocess.run(words, cwd=tmp_path, check=True)
    assert os.stat(tmp_path / "0.tar").st_size < 2**20
    with pytest.raises(ConfigError, match=r"a\.png is stored with its zeros left out \(sparse\)"):
        list_members(tmp_path / "0.tar")


def test_numbers_without_end_are_no_numbers(tmp_path):
    (tmp_path / "test").mkdir()
    with tarfile.open(tmp_path / "test/0.tar", "w") as tar:
        add(tar, "a.png", picture(0))
        add(tar, "a.cls", b"9" * 10**5)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    for name in ("out", "index"):
        (tmp_path / name).mkdir()
    tars, classes = str(tmp_path / "test/*.tar"), str(tmp_path / "classes.txt")
    download(TarSource(kind="tars", tars=tars, classes=classes), tmp_path / "out", 1)
    with pytest.raises(ConfigError, match="1 unknown class"):
        build_index(IndexJob(min_side=8, tokenize=False), tmp_path / "out", tmp_path / "index", 1)
    (tmp_path / "test/nshards.txt").write_text("1")
    with pytest.raises(ConfigError, match="label '9999"):
        open_tars(tmp_path).labels(2)
    (tmp_path / "test/nshards.txt").write_text("9" * 12)
    with pytest.raises(ConfigError, match="must hold the number of tars"):
        open_tars(tmp_path)


def test_the_json_of_a_sample_is_data_however_deep_or_long_its_numbers(tmp_path):
    texts = {"deep": "[" * 10**6, "long": "9" * 10**6, "name": json.dumps({"__class__": "os"})}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, (key, text) in enumerate(texts.items()):
            add(tar, f"{key}.png", picture(number))
            add(tar, f"{key}.txt", b"a caption")
            add(tar, f"{key}.json", text.encode())
    for name in ("out", "index"):
        (tmp_path / name).mkdir()
    download(TarSource(kind="tars", tars=str(tmp_path / "*.tar")), tmp_path / "out", 1)
    build_index(IndexJob(min_side=8, tokenize=False), tmp_path / "out", tmp_path / "index", 1)
    assert pq.read_table(tmp_path / "index/samples.parquet").num_rows == 3
