"""Laws of downloads: the real img2dataset on files and on a server of this machine, and damaged sources."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, jpeg, write_tar
from PIL import Image

from clipgraft.config import ConfigError
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.samples import Samples
from clipgraft.data.shapes import ATTRIBUTES, draw_sample
from clipgraft.settings import IndexJob
from clipgraft.sources import FolderSource, ShapesSource, TarSource, UrlSource


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder and the address under which it is served."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def outcomes(out: Path) -> list[dict]:
    return pq.read_table(out / "outcomes.parquet").to_pylist()


def write_table(path: Path, rows: list[tuple]) -> str:
    urls, captions = zip(*rows, strict=True)
    pq.write_table(
        pa.table({"url": pa.array(urls, pa.string()), "caption": pa.array(captions, pa.string())}),
        path,
    )
    return str(path)


def indexed(out: Path, tokenize=True) -> Samples:
    index = out.parent / "index"
    index.mkdir()
    build_index(IndexJob(tokenize=tokenize, drop_duplicates=False), out, index, 1)
    return Samples.open(index)


def test_every_row_of_a_table_has_an_outcome_and_every_good_one_an_image(site, out, tmp_path):
    folder, address = site
    (folder / "small.jpg").write_bytes(jpeg(40, 30))
    (folder / "large.png").write_bytes(encoded(Image.open(io.BytesIO(jpeg(200, 120))), "PNG"))
    (folder / "page.jpg").write_text("<html>sorry</html>")
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    rows = [
        (f"{address}/large.png", "large"),
        (f"{address}/missing.jpg", "missing"),
        ((tmp_path / "secret.jpg").as_uri(), "local"),
        (f"{address}/small.jpg", "small, with a comma"),
        (f"{address}/page.jpg", "no image"),
        (None, "nothing"),
        ("ftp://127.0.0.1/a.jpg", "ftp"),
        (f"{address}/small.jpg", None),
    ]
    source = UrlSource(
        kind="urls",
        table=write_table(tmp_path / "t.parquet", rows),
        image_size=60,
        min_success=0.3,
        retries=0,
        allow_private_addresses=True,
    )
    facts = download(source, out, 1)
    told = outcomes(out)
    assert [row["key"] for row in told] == [f"{row:09d}" for row in range(8)]
    assert [row["status"] for row in told] == [
        "ok",
        "failed",
        "failed",
        "ok",
        "failed",
        "failed",
        "failed",
        "ok",
    ]
    reasons = [row["message"] for row in told]
    assert "404" in reasons[1] and "file://" in reasons[2] and "undecodable" in reasons[4]
    assert (reasons[5], "ftp" in reasons[6]) == ("no URL", True)
    assert (facts["num_requested"], facts["num_ok"]) == (8, 3)
    assert {path.name for path in out.iterdir()} == {"00000.tar", "outcomes.parquet"}

    samples = indexed(out)
    assert samples.all_captions() == [["large"], ["small, with a comma"]]
    assert samples.image(0).size == (100, 60)
    assert samples.image_bytes(1) == jpeg(40, 30)


def test_a_download_that_runs_again_keeps_what_it_had_and_tries_the_rest(site, out, tmp_path):
    """As after an edit of its code, when its manifest is gone; images may be gone from the web, too."""
    folder, address = site
    (folder / "a.jpg").write_bytes(jpeg(40, 30))
    table = write_table(tmp_path / "t.parquet", [(f"{address}/{name}.jpg", name) for name in "ab"])
    source = UrlSource(
        kind="urls",
        table=table,
        image_size=60,
        min_success=0.3,
        retries=0,
        allow_private_addresses=True,
    )
    (out / ".resume").mkdir()
    assert download(source, out, 1, out / ".resume")["num_ok"] == 1
    shutil.rmtree(out / ".resume")
    (folder / "a.jpg").rename(folder / "b.jpg")
    new = out / ".writing"
    new.mkdir()
    (out / ".resume").mkdir()
    assert download(source, new, 1, out / ".resume")["num_ok"] == 2
    assert [row["status"] for row in outcomes(new)] == ["ok", "ok"]


def test_csv_and_tsv_tables_are_read(site, out, tmp_path):
    folder, address = site
    (folder / "a.jpg").write_bytes(jpeg())
    (tmp_path / "t.tsv").write_text(f"title\tlink\nan apple, red\t{address}/a.jpg\n")
    source = UrlSource(
        kind="urls",
        table=str(tmp_path / "t.tsv"),
        url_column="link",
        captions={"caption": "title"},
        allow_private_addresses=True,
    )
    download(source, out, 1)
    assert indexed(out).all_captions() == [["an apple, red"]]


def test_local_files_are_read_if_that_is_allowed(out, tmp_path):
    (tmp_path / "a b,c.jpg").write_bytes(jpeg())
    table = write_table(tmp_path / "t.parquet", [((tmp_path / "a b,c.jpg").as_uri(), "local")])
    download(UrlSource(kind="urls", table=table, allow_local_files=True), out, 1)
    assert indexed(out).image_bytes(0) == jpeg()


def test_too_few_successes_are_an_error_with_the_reasons(out, tmp_path):
    rows = [("file:///etc/passwd", "a"), ("nonsense", "b"), ("file:///etc/passwd", "c")]
    source = UrlSource(kind="urls", table=write_table(tmp_path / "t.parquet", rows))
    with pytest.raises(
        ConfigError,
        match=r"only 0 of 3 .*min_success = 0\.5.*2 x file://.*1 x not a URL.*kind: folder",
    ):
        download(source, out, 1)


def test_a_missing_column_is_named_with_those_there_are(out, tmp_path):
    (tmp_path / "t.csv").write_text("link,text\nhttp://a,b\n")
    with pytest.raises(ConfigError, match=r"t\.csv has no column 'url'.*url_column.*link, text"):
        download(UrlSource(kind="urls", table=str(tmp_path / "t.csv")), out, 1)
    (tmp_path / "t.csv").write_text("url,caption\n")
    with pytest.raises(ConfigError, match="has no rows"):
        download(UrlSource(kind="urls", table=str(tmp_path / "t.csv")), out, 1)
    (tmp_path / "t.parquet").write_text("rubbish")
    with pytest.raises(ConfigError, match="cannot be read as parquet"):
        download(UrlSource(kind="urls", table=str(tmp_path / "t.parquet")), out, 1)


def test_shapes_come_out_as_they_were_drawn_and_twice_the_same(out, tmp_path, monkeypatch):
    monkeypatch.setattr("clipgraft.data.fetch.SHARD", 5)  # several tars
    source = ShapesSource(
        kind="shapes", split="renders", num_samples=12, image_size=32, num_captions=2
    )
    download(source, out, 1)
    again = tmp_path / "again"
    again.mkdir()
    download(source, again, 2)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["00000.tar", "00001.tar", "00002.tar", "classes.json", "outcomes.parquet"]
    for name in names:
        assert (out / name).read_bytes() == (again / name).read_bytes()

    samples = indexed(out)
    assert samples.label_names == {name: list(values) for name, values in ATTRIBUTES.items()}
    for row in range(12):
        drawn = draw_sample(0, "renders", row, image_size=32, noise=source.noise, num_captions=2)
        assert samples.captions(row) == drawn.captions
        difference = np.asarray(samples.image(row), int) - np.asarray(drawn.image, int)
        assert np.abs(difference).mean() < 6  # noise, after JPEG; another picture is 30 off
        numbers = {name: samples.labels(name)[row] for name in ATTRIBUTES}
        assert numbers == {
            name: ATTRIBUTES[name].index(value) for name, value in drawn.attributes.items()
        }
    assert str(tmp_path).encode() not in (out / "00000.tar").read_bytes()


def test_tars_stay_where_they_are(out, tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(), "a.cls": "0"})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    download(TarSource(kind="tars", tars=str(tar), classes=str(tmp_path / "classes.txt")), out, 1)
    assert [(row["key"], row["file"], row["status"]) for row in outcomes(out)] == [
        ("a", str(tar), "ok")
    ]
    assert json.loads((out / "classes.json").read_text()) == {"class": ["cat", "dog"]}
    assert not list(out.glob("*.tar"))


@pytest.mark.parametrize("length", [100, 600, 1536 + 512, 1536 + 700, 2560])
def test_a_tar_that_was_cut_anywhere_is_named_with_its_last_good_member(length, out, tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a.txt": "x" * 600, "b.txt": "y" * 100})
    tar.write_bytes(tar.read_bytes()[:length])
    with pytest.raises(ConfigError) as caught:
        download(TarSource(kind="tars", tars=str(tar)), out, 1)
    assert str(tar) in str(caught.value)
    if length >= 1536:
        last = (
            "b.txt, which ends at byte 2,148"
            if length >= 2148
            else "a.txt, which ends at byte 1,112"
        )
        assert f"last whole member is {last}" in str(caught.value)


def test_empty_missing_and_compressed_tars_are_the_users_mistakes(out, tmp_path):
    (tmp_path / "empty.tar").touch()
    with pytest.raises(ConfigError, match=r"empty\.tar is empty"):
        download(TarSource(kind="tars", tars=str(tmp_path / "empty.tar")), out, 1)
    with pytest.raises(ConfigError, match="no file matches"):
        download(TarSource(kind="tars", tars=str(tmp_path / "none-*.tar")), out, 1)
    (tmp_path / "gz.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(ConfigError, match="is compressed"):
        download(TarSource(kind="tars", tars=str(tmp_path / "gz.tar")), out, 1)
    write_tar(tmp_path / "nothing.tar", {})
    with pytest.raises(ConfigError, match="holds no files"):
        download(TarSource(kind="tars", tars=str(tmp_path / "nothing.tar")), out, 1)


def test_class_names_must_be_unique(out, tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(), "a.cls": "0"})
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(ConfigError, match="'cat'"):
        download(
            TarSource(kind="tars", tars=str(tar), classes=str(tmp_path / "classes.txt")), out, 1
        )


def test_class_names_are_utf8_with_or_without_a_mark(out, tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(), "a.cls": "0"})
    names = tmp_path / "classes.txt"
    source = TarSource(kind="tars", tars=str(tar), classes=str(names))
    names.write_text("caf\u00e9\ntea\n", "utf-8-sig")
    download(source, out, 1)
    assert json.loads((out / "classes.json").read_text()) == {"class": ["caf\u00e9", "tea"]}
    names.write_text("caf\u00e9\ntea\n", "latin-1")
    with pytest.raises(ConfigError, match=r"classes\.txt is not UTF-8"):
        download(source, out, 1)


def test_an_image_without_a_caption_file_is_a_failed_outcome(out, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (pictures / name).write_bytes(jpeg())
    (pictures / "a.txt").write_text("captioned")
    download(FolderSource(kind="folder", folder=str(pictures)), out, 1)
    assert [(row["key"], row["status"]) for row in outcomes(out)] == [("a", "ok"), ("b", "failed")]
    assert "no .txt" in outcomes(out)[1]["message"]
    with pytest.raises(ConfigError, match="does not exist"):
        download(FolderSource(kind="folder", folder=str(tmp_path / "nowhere")), out, 1)


def test_a_stopped_download_leaves_no_process_behind(out, tmp_path):
    # A server that accepts and never answers keeps img2dataset busy.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        table = write_table(tmp_path / "t.parquet", [(f"http://127.0.0.1:{port}/a.jpg", "a")] * 4)
        program = (
            "import signal, sys\nfrom pathlib import Path\n"
            "from clipgraft.sources import UrlSource\nfrom clipgraft.data.download import download\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
            f"download(UrlSource(kind='urls', table={table!r}, timeout_seconds=60, allow_private_addresses=True), Path({str(out)!r}), 1)\n"
        )
        environment = {**os.environ, "no_proxy": "127.0.0.1"}
        process = subprocess.Popen([sys.executable, "-c", program], env=environment)
        silent.settimeout(180)
        connection, _ = silent.accept()  # it is at work now
        assert _processes_in(out)
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 143
        connection.close()
    deadline = time.monotonic() + 180
    while _processes_in(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _processes_in(out)
    assert not list(out.iterdir())


def _processes_in(folder: Path) -> list[int]:
    """Processes that work in a folder or below."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if str(link.readlink()).startswith(str(folder)):
                found.append(int(link.parent.name))
        except OSError:
            continue
    return found
