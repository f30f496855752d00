"""Laws of remote files: a real S3 server and a real web server of this machine, memory, and what breaks."""

import gzip
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from mounts import mounted
from pictures import jpeg, write_tar
from server import Hub, Site

from clipgraft.config import ConfigError
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.outcomes import read_outcomes
from clipgraft.data.remote import copy_all, expand, open_file
from clipgraft.data.samples import Samples
from clipgraft.data.sources.tables import read_tables
from clipgraft.disk import disk_trouble
from clipgraft.settings import IndexJob
from clipgraft.sources import ParquetSource, TarSource, UrlSource


@pytest.fixture(scope="module")
def s3_server():
    # Beside the environment (envs/s3.in says why).
    sys.path.append(str(Path(sys.prefix) / "s3"))
    moto = pytest.importorskip("moto.server", reason="moto, an S3 server, is not installed")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A bucket `data`: a function that puts a file into it."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="data")
    yield lambda key, data: client.put_object(Bucket="data", Key=key, Body=data)
    for each in client.list_objects_v2(Bucket="data").get("Contents", []):
        client.delete_object(Bucket="data", Key=each["Key"])
    client.delete_bucket(Bucket="data")


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site(ranges=True)
    yield site
    site.close()


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def tar_bytes(folder: Path, number: int, size: int = 0) -> bytes:
    files = {f"{number}.jpg": jpeg(seed=number), f"{number}.txt": f"number {number}"}
    if size:
        files[f"{number}.bin"] = os.urandom(size)
    return write_tar(folder / "made.tar", files).read_bytes()


def fresh(path: Path) -> Path:
    path.mkdir()
    return path


def indexed(base: Path, source) -> Samples:
    out, index = fresh(base / "out"), fresh(base / "index")
    download(source, out, 2)
    build_index(IndexJob(tokenize=True, drop_duplicates=False), out, index, 1)
    return Samples.open(index)


def whole(path: Path) -> None:
    """Nothing to complain about."""


# --- S3 -------------------------------------------------------------------------------------------


def test_tars_of_a_bucket_are_copied_once_and_read(s3, tmp_path):
    for number in range(4):
        s3(f"a/x-{number:03d}.tar", tar_bytes(tmp_path, number))
    tars = ["s3://data/a/x-{000..001}.tar", "s3://data/a/*3.tar"]
    samples = indexed(tmp_path, TarSource(kind="tars", tars=tars))
    assert samples.uids() == ["0", "1", "3"]
    assert samples.image_bytes(2) == jpeg(seed=3)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"x-000.tar", "x-001.tar", "x-003.tar", "outcomes.parquet"}


def test_tables_and_missing_keys_of_a_bucket(s3, site, tmp_path):
    site.files["/a.jpg"] = jpeg()
    s3("t.csv", f"url,caption\n{site.address}/a.jpg,one\n".encode())
    source = UrlSource(kind="urls", table="s3://data/t.csv", allow_private_addresses=True)
    assert indexed(tmp_path, source).all_captions() == [["one"]]
    for name in ("s3://data/none.tar", "s3://data/none-*.tar", "s3://nowhere/x.tar"):
        with pytest.raises(ConfigError, match=r"s3://\S+ does not exist|nothing matches s3://"):
            copy_all(expand(name), tmp_path / "copies", whole)


def test_tars_of_the_same_name_in_two_folders_stay_apart(s3, tmp_path):
    for number in range(2):
        s3(f"{number}/x.tar", tar_bytes(tmp_path, number))
    samples = indexed(tmp_path, TarSource(kind="tars", tars="s3://data/*/x.tar"))
    assert sorted(samples.all_captions()) == [["number 0"], ["number 1"]]


# --- a hub ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A data set `me/photos` on a hub of this machine; where the hub is, is asked anew."""
    from huggingface_hub import HfFileSystem, constants

    hub = Hub("me/photos")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    files = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    HfFileSystem.clear_instance_cache()
    yield hub
    HfFileSystem.clear_instance_cache()
    hub.close()


def test_tars_of_a_hub_are_found_by_patterns_copied_once_and_read(hub, tmp_path):
    for number in range(3):
        hub.put(f"train/x-{number:03d}.tar", tar_bytes(tmp_path, number, size=5_000_000))
    hub.put("test/x-009.tar", tar_bytes(tmp_path, 9))
    tars = ["hf://datasets/me/photos/train/*1.tar", "hf://datasets/me/photos/train/x-00{0,2}.tar"]
    samples = indexed(tmp_path, TarSource(kind="tars", tars=tars))
    assert samples.all_captions() == [["number 0"], ["number 1"], ["number 2"]]
    assert samples.image_bytes(1) == jpeg(seed=1)
    assert 15_000_000 < hub.sent < 15_100_000


def test_what_a_hub_does_not_have_is_said(hub, tmp_path):
    hub.put("train/x.tar", tar_bytes(tmp_path, 0))
    for name, message in {
        "hf://datasets/me/photos/train/none.tar": "none.tar does not exist",
        "hf://datasets/me/photos/train/none-*.tar": "nothing matches",
        "hf://datasets/you/photos/x.tar": "you/photos",
    }.items():
        with pytest.raises(ConfigError, match=message):
            copy_all(expand(name), tmp_path / "copies", whole)


# --- the web --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A PEM file: a key, and a certificate of 127.0.0.1 that it signed itself."""
    sys.path.append(str(Path(sys.prefix) / "s3"))
    x509 = pytest.importorskip("cryptography.x509", reason="cryptography is not installed")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    form, pem = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        key.private_bytes(pem, form, serialization.NoEncryption()) + signed.public_bytes(pem)
    )
    return path


def test_https_is_read_where_the_certificate_is_trusted_and_refused_elsewhere(
    certificate, tmp_path, monkeypatch
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site(ranges=True, certificate=certificate)
    site.files["/0.tar"] = tar_bytes(tmp_path, 0)
    code = "import sys; from clipgraft.data.remote import open_file; print(len(open_file(sys.argv[1]).read()))"
    read = [sys.executable, "-c", code, f"{site.address}/0.tar"]
    trusting = os.environ | {"SSL_CERT_FILE": str(certificate)}
    done = subprocess.run(read, env=trusting, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(site.files["/0.tar"])
    done = subprocess.run(read, capture_output=True, text=True)
    assert done.returncode and "cannot be read" in done.stderr and "CERTIFICATE" in done.stderr
    site.close()


@pytest.mark.parametrize("ranges", [True, False])
def test_tars_come_from_a_web_server(ranges, site, tmp_path):
    site.ranges = ranges
    site.files["/t/0.tar"] = tar_bytes(tmp_path, 0, size=12_000_000)  # several blocks of fsspec's
    samples = indexed(tmp_path, TarSource(kind="tars", tars=f"{site.address}/t/0.tar"))
    assert samples.all_captions() == [["number 0"]]
    assert (tmp_path / "out/0.tar").read_bytes() == site.files["/t/0.tar"]
    with pytest.raises(ConfigError, match=r"/t/1\.tar does not exist"):
        download(
            TarSource(kind="tars", tars=f"{site.address}/t/{{0..1}}.tar"),
            fresh(tmp_path / "again"),
            1,
        )


@pytest.mark.parametrize("ranges", [True, False])
def test_tables_and_parquet_files_come_from_a_web_server(ranges, site, tmp_path):
    site.ranges = ranges
    rows = {"url": [f"http://x/{row}" for row in range(9)], "caption": [os.urandom(500_000).hex()] * 9}  # fmt: skip
    table = pa.table(rows)
    lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
    packed = gzip.compress(lines, 0)
    for name, write in {"t.parquet": pq.write_table, "t.csv": pa.csv.write_csv}.items():
        sink = io.BytesIO()
        write(table, sink, **({"use_dictionary": False} if "parquet" in name else {}))
        site.files[f"/{name}"] = sink.getvalue()
    site.files |= {"/t.jsonl": lines, "/t.jsonl.gz": packed}
    for name, data in site.files.items():
        assert len(data) > 5 * 2**20, name  # a block of fsspec's
        read, _ = read_tables(UrlSource(kind="urls", table=site.address + name))
        assert read.to_pydict() == rows
    image = {"image": [os.urandom(3_000_000), jpeg(seed=1), jpeg(seed=2)], "caption": ["no", "one", "two"]}  # fmt: skip
    pq.write_table(pa.table(image), tmp_path / "i.parquet", row_group_size=1)
    site.files["/i.parquet"] = (tmp_path / "i.parquet").read_bytes()
    source = ParquetSource(
        kind="parquet", files=f"{site.address}/i.parquet", captions={"caption": "caption"}
    )
    assert indexed(tmp_path, source).all_captions() == [["one"], ["two"]]


@pytest.mark.parametrize(
    ("kind", "write"), [("csv", pa.csv.write_csv), ("parquet", pq.write_table)]
)
def test_a_connection_that_breaks_while_a_table_is_read_is_told_by_its_address(kind, write, site):
    sink = io.BytesIO()
    write(pa.table({"url": ["http://x/1"], "caption": [os.urandom(500_000).hex()]}), sink)
    site.files[f"/t.{kind}"], site.cut_at = sink.getvalue(), 200_000
    with pytest.raises(ConfigError, match=rf"{site.address}/t\.{kind} cannot be read: .*Hint: run"):
        read_tables(UrlSource(kind="urls", table=f"{site.address}/t.{kind}"))


def test_addresses_that_differ_in_their_query_or_name_no_tar_are_copied_apart(site, tmp_path):
    names = ("/get.tar?id=1", "/get.tar?id=2", "/files/1", "/files/2/", "/files-2.tar")
    for number, name in enumerate(names):
        site.files[name] = tar_bytes(tmp_path, number)
    tars = [site.address + name for name in names]
    samples = indexed(tmp_path, TarSource(kind="tars", tars=tars))
    assert samples.all_captions() == [[f"number {number}"] for number in range(5)]
    copies = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert len(copies) == 5 and {"1.tar", "2.tar", "files-2.tar"} < set(copies)


PROGRAM = """
import sys
from pathlib import Path
from clipgraft.data.download import download
from clipgraft.sources import TarSource
tars, out, work = sys.argv[1:]
download(TarSource(kind="tars", tars=tars), Path(out), 1, Path(work))
"""


def test_a_killed_copy_goes_on_where_it_was(site, tmp_path):
    sizes = [1_000, 40_000_000]
    for number, size in enumerate(sizes):
        site.files[f"/{number}.tar"] = tar_bytes(tmp_path, number, size)
    total = sum(map(len, site.files.values()))
    out, work = fresh(tmp_path / "out"), tmp_path / "work"
    tars = f"{site.address}/{{0..1}}.tar"
    site.delay_seconds = 0.3
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, tars, out, work])
    deadline = time.monotonic() + 60
    while site.sent < 12_000_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = work.glob("1.tar.*.part")
    had = part.stat().st_size
    assert 0 < had < sizes[1] and (work / "0.tar.done").is_file()
    site.delay_seconds, first, site.sent = 0, site.asked["/0.tar"], 0
    download(TarSource(kind="tars", tars=tars), out, 1, work)
    assert site.asked["/0.tar"] == first
    assert site.sent <= total - had + 2**20  # the rest, and a look at the header
    for number in range(2):
        assert (out / f"{number}.tar").read_bytes() == site.files[f"/{number}.tar"]


def test_a_part_of_a_file_that_has_changed_since_is_not_gone_on_with(site, tmp_path):
    site.files["/0.tar"] = tar_bytes(tmp_path, 0, 9_000_000)
    site.cut_at = 6_000_000
    work = tmp_path / "work"
    with pytest.raises(ConfigError, match=r"/0\.tar cannot be read"):
        copy_all([f"{site.address}/0.tar"], work, whole)
    assert list(work.glob("*.part"))
    site.cut_at = None
    site.files["/0.tar"] = tar_bytes(tmp_path, 1, 8_000_000)
    (path,) = copy_all([f"{site.address}/0.tar"], work, whole)
    assert path.read_bytes() == site.files["/0.tar"]
    assert not list(work.glob("*.part"))


# --- memory, and what is not whole ----------------------------------------------------------------


def test_a_remote_tar_that_was_cut_is_told_by_its_address_and_asked_for_again(memory, tmp_path):
    data = tar_bytes(tmp_path, 0)
    memory.pipe("/t/0.tar", data[:3000])
    source, work = TarSource(kind="tars", tars="memory://t/0.tar"), tmp_path / "work"
    with pytest.raises(ConfigError, match=r"memory://t/0\.tar: tar 0\.tar is not whole"):
        download(source, fresh(tmp_path / "1"), 1, work)
    memory.pipe("/t/0.tar", data)
    download(source, fresh(tmp_path / "2"), 1, work)
    assert [each.file for each in read_outcomes(tmp_path / "2/outcomes.parquet")] == ["0.tar"]


def test_a_disk_that_fills_up_while_a_file_is_copied_is_said_and_the_address_is_not_blamed(
    memory, tmp_path, caplog
):
    memory.pipe("/t/0.tar", tar_bytes(tmp_path, 0, 3_000_000))
    work = fresh(tmp_path / "work")
    source = TarSource(kind="tars", tars="memory://t/0.tar")
    with (
        mounted(work, "-t", "tmpfs", "-o", "size=1m", "tmpfs"),
        pytest.raises(ConfigError, match="no space left on device"),
        disk_trouble(work),
    ):
        download(source, fresh(tmp_path / "out"), 1, work)
    assert "trying again" not in caplog.text


def test_progress_of_copies_is_told_in_megabytes(memory, tmp_path, caplog):
    memory.pipe("/t/0.tar", tar_bytes(tmp_path, 0, 3_000_000))
    with caplog.at_level(logging.INFO):
        copy_all(["memory://t/0.tar"], tmp_path / "copies", whole)
        copy_all(["memory://t/0.tar"], tmp_path / "copies", whole)
    lines = [line for line in caplog.messages if line.startswith("copied")]
    assert "3/3 MB  100%" in lines[0] and "MB/s" in lines[0]
    assert "1 files, 1 of them copied before" in lines[1]


def test_local_and_remote_names_go_together_and_unknown_ones_are_told(memory, tmp_path):
    (tmp_path / "b.txt").write_text("local")
    memory.pipe("/t/a.txt", b"remote")
    names = expand([str(tmp_path / "*.txt"), "memory://t/*.txt"])
    assert names == [str(tmp_path / "b.txt"), "memory:///t/a.txt"] or names[1].endswith("t/a.txt")
    assert [open_file(name).read() for name in names] == [b"local", b"remote"]
    with pytest.raises(ConfigError, match="xyz://a cannot be read"):
        open_file("xyz://a")
    with pytest.raises(ConfigError, match="nothing matches memory://t/"):
        expand("memory://t/*.tar")
