"""Laws of fetching by URL: what is refused, and that nothing is fetched twice, whatever was killed."""

import json
import multiprocessing.pool
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, jpeg
from PIL import Image
from server import Site

from clipgraft.config import ConfigError
from clipgraft.data import fetch_process
from clipgraft.data.download import download
from clipgraft.data.fetch import last_outcomes
from clipgraft.data.fetch_process import FILES, PARENT, PRIVATE, SECONDS, is_public
from clipgraft.data.outcomes import Outcome, read_outcomes, write_outcomes
from clipgraft.data.sources.urls import _name_of
from clipgraft.sources import UrlSource

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    site = Site()
    yield site
    site.close()


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def source_of(tmp_path: Path, addresses: list[str], **settings) -> UrlSource:
    captions = [f"caption {number}" for number in range(len(addresses))]
    pq.write_table(pa.table({"url": addresses, "caption": captions}), tmp_path / "t.parquet")
    settings = {"min_success": 0, "retries": 0, "allow_private_addresses": True, **settings}
    return UrlSource(kind="urls", table=str(tmp_path / "t.parquet"), **settings)


def told(out: Path) -> list[tuple[str, str]]:
    return [(each.status, each.message) for each in read_outcomes(out / "outcomes.parquet")]


# --- what may be connected to ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    "127.0.0.1 10.0.0.1 172.16.3.4 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 ::1 fe80::1%eth0 "
    "fd00::1 ::ffff:127.0.0.1 2002:7f00:1:: 64:ff9b::a00:1".split(),
)
def test_addresses_of_one_machine_or_one_site_are_not_public(host):
    assert not is_public(host)


@pytest.mark.parametrize("host", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822"])
def test_addresses_of_the_internet_are_public(host):
    assert is_public(host)


def test_loopback_is_refused_by_number_and_by_name_unless_it_is_allowed(site, out, tmp_path):
    site.files["/a.jpg"] = jpeg()
    port = site.address.rpartition(":")[2]
    names = [
        f"{site.address}/a.jpg",
        f"http://localhost:{port}/a.jpg",
        f"http://[::1]:{port}/a.jpg",
    ]
    download(source_of(tmp_path, names, allow_private_addresses=False), out, 1)
    assert all(status == "failed" and "private" in why for status, why in told(out)), told(out)
    assert not site.asked
    again = tmp_path / "again"
    again.mkdir()
    download(source_of(tmp_path, names[:2]), again, 1)
    assert [status for status, _ in told(again)] == ["ok", "ok"]


def test_redirects_to_private_addresses_and_other_schemes_are_refused(
    site, out, tmp_path, monkeypatch
):
    site.files["/secret.jpg"] = jpeg()

    class Proxy(BaseHTTPRequestHandler):
        """Stands for the open internet: it answers for any host."""

        def do_GET(self):
            if "picture" in self.path:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(jpeg())
                return
            self.send_response(302)
            target = "ftp://93.184.216.34/x" if "ftp" in self.path else f"{site.address}/secret.jpg"
            self.send_header("Location", target)
            self.end_headers()

        def log_message(self, *_):
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
    public = "http://93.184.216.34"
    names = [f"{public}/picture.jpg", f"{public}/away.jpg", f"{public}/ftp.jpg"]
    try:
        download(source_of(tmp_path, names, allow_private_addresses=False), out, 1)
        monkeypatch.delenv("no_proxy")  # then the proxy would be asked for the private address
        again = tmp_path / "again"
        again.mkdir()
        download(source_of(tmp_path, names, allow_private_addresses=False), again, 1)
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
    for folder in (out, again):
        assert [status for status, _ in told(folder)] == ["ok", "failed", "failed"], told(folder)
        assert "private" in told(folder)[1][1] and "ftp" in told(folder)[2][1]
    assert not site.asked


# --- answers without end --------------------------------------------------------------------------


def test_answers_that_are_too_large_too_slow_or_cut_are_failures(site, out, tmp_path):
    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            block, seconds = b"x", 0.2
            if self.path == "/header.jpg":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            elif self.path == "/status.jpg":
                block = b"HTTP/1.1 100 Continue\r\n\r\n"
            else:
                self.send_response(200)
                if self.path == "/cut.jpg":
                    self.send_header("Content-Length", "100000")
                if self.path == "/large.jpg":
                    block, seconds = bytes(2**20), 0
                self.end_headers()
            with suppress(OSError):
                for _ in range(100 if self.path != "/cut.jpg" else 1):
                    self.wfile.write(block)
                    time.sleep(seconds)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    paths = ("large", "cut", "slow", "header", "status")
    names = [f"http://127.0.0.1:{server.server_port}/{name}.jpg" for name in paths]
    try:
        download(source_of(tmp_path, names, timeout_seconds=1), out, 1)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    large, cut, *slow = [message for _, message in told(out)]
    assert "more than 64 MB" in large and "IncompleteRead" in cut
    assert all("took more than 6 s" in message for message in slow), slow


def test_redirects_whose_body_has_no_end_are_failures(site, out, tmp_path):
    site.files["/a.jpg"] = jpeg()
    site.files |= {"/large.jpg": f"{site.address}/a.jpg", "/slow.jpg": f"{site.address}/a.jpg"}
    site.files["/plain.jpg"] = f"{site.address}/a.jpg"
    site.endless = {"/large.jpg": (bytes(2**20), 0.0), "/slow.jpg": (b"x", 0.2)}
    names = [f"{site.address}/{name}.jpg" for name in ("large", "slow", "plain")]
    download(source_of(tmp_path, names, timeout_seconds=1), out, 1)
    (_, large), (_, slow), plain = told(out)
    assert "more than 64 MB" in large and "took more than 6 s" in slow and plain == ("ok", "")
    assert site.asked["/a.jpg"] == 1


def test_a_small_file_that_claims_to_be_a_huge_picture_is_a_failure(site, out, tmp_path):
    site.files |= {
        "/bomb.png": encoded(Image.new("1", (15_000, 15_000)), "PNG"),
        "/good.jpg": jpeg(),
    }
    download(source_of(tmp_path, [f"{site.address}{path}" for path in site.files]), out, 1)
    (bomb, why), good = told(out)
    assert (bomb, good) == ("failed", ("ok", "")) and "too many pixels" in why


# --- going on -------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
import clipgraft.data.fetch as fetch
from clipgraft.data.download import download
from clipgraft.sources import UrlSource
fetch.SHARD = 4
table, out, work = sys.argv[1:]
if __name__ == "__main__":
    source = UrlSource(kind="urls", table=table, min_success=0, retries=0, allow_private_addresses=True)
    download(source, Path(out), 1, Path(work))
"""


def processes_in(folder: Path) -> list[int]:
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if str(link.readlink()).startswith(str(folder)):
                found.append(int(link.parent.name))
        except OSError:
            continue
    return found


def words_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_killed_fetch_leaves_nothing_running_and_goes_on_where_it_was(
    whole_group, site, out, tmp_path, monkeypatch
):
    num_images, work = 24, tmp_path / "work"
    for number in range(num_images):
        site.files[f"/{number}.jpg"] = jpeg(seed=number)
    site.held = {f"/{number}.jpg" for number in range(num_images // 2, num_images)}
    names = [f"{site.address}/{number}.jpg" for number in range(num_images)]
    source = source_of(tmp_path, names)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "program.py", source.table, out, work]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(work.glob("*/finished/*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()  # img2dataset is in a group of its own and must notice
    process.wait()
    while processes_in(work) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_in(work)
    had = {int(path.stem) for path in work.glob("*/finished/*.parquet")}
    had |= {int(path.name[:5]) for path in work.glob("*/round/shards/*_stats.json")}
    had = {row for row in range(num_images) if row // 4 in had}
    assert 8 <= len(had) <= num_images // 2
    before = site.asked.copy()

    site.released.set()
    monkeypatch.setattr("clipgraft.data.fetch.SHARD", 4)
    download(source, out, 1, work)
    assert [status for status, _ in told(out)] == ["ok"] * num_images
    again = {
        number
        for number in range(num_images)
        if site.asked[f"/{number}.jpg"] > before[f"/{number}.jpg"]
    }
    assert again == set(range(num_images)) - had
    whole = tmp_path / "whole"
    whole.mkdir()
    download(source, whole, 1)
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


@pytest.mark.parametrize("victims", ["the one that fetches", "all"])
def test_a_killed_child_of_img2dataset_is_said_and_the_next_fetch_goes_on(
    victims, site, out, tmp_path
):
    num_images, work = 12, tmp_path / "work"
    site.files |= {f"/{number}.jpg": jpeg(seed=number) for number in range(num_images)}
    site.held = {f"/{number}.jpg" for number in range(num_images // 2, num_images)}
    source = source_of(tmp_path, [f"{site.address}{path}" for path in site.files])
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "program.py", source.table, out, work]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(work.glob("*/finished/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [pid for pid in processes_in(work) if b"spawn_main" in words_of(pid)]
    if victims != "all":
        children = [max(children, key=lambda pid: len(os.listdir(f"/proc/{pid}/task")))]
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "was killed by signal 9" in said
    assert not processes_in(work)
    site.released.set()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [status for status, _ in told(out)] == ["ok"] * num_images


def test_a_worker_that_is_killed_while_the_pool_looks_is_seen(monkeypatch, capsys):
    """Its end is told to the pool a moment before its exit code can be had."""
    pool = multiprocessing.pool.Pool
    monkeypatch.setattr(pool, "_join_exited_workers", staticmethod(pool._join_exited_workers))
    monkeypatch.setattr(os, "_exit", sys.exit)
    fetch_process._end_with_a_killed_worker()

    class Worker:
        pid = 7

        def __init__(self, looks):
            self.codes = [None] * looks

        @property
        def exitcode(self):
            return self.codes.pop() if self.codes else -signal.SIGKILL

        def join(self):
            pass

    for looks in range(3):
        workers = [Worker(looks)]
        with pytest.raises(SystemExit):
            while workers:
                pool._join_exited_workers(workers)
        assert "worker 7 was killed by signal 9" in capsys.readouterr().out


def test_work_on_another_table_is_not_gone_on_with(site, out, tmp_path):
    site.files |= {"/a.jpg": jpeg(seed=1), "/b.jpg": jpeg(seed=2)}
    work = tmp_path / "work"
    download(source_of(tmp_path, [f"{site.address}/a.jpg"]), out, 1, work)
    again = tmp_path / "again"
    again.mkdir()
    download(source_of(tmp_path, [f"{site.address}/b.jpg"]), again, 1, work)
    assert site.asked == {"/a.jpg": 1, "/b.jpg": 1}
    assert jpeg(seed=2) in (again / "00000.tar").read_bytes()


def test_what_names_a_table_is_its_values_and_neither_a_version_nor_chunks(tmp_path):
    about = {"n": [1, None, 3], "t": ["é", "", None], "x": [0.1, None, 2.0], "b": [b"\xff"] * 3}
    whole = pa.table({"row": [0, 1, 2], "about": pa.table(about).to_struct_array()})
    name = _name_of(whole, 256)
    assert (
        name == "4da0feadd2c7b28a"
    )  # of all versions of pyarrow: with another one everything is fetched again
    assert _name_of(pa.concat_tables([whole.slice(0, 1), whole.slice(1)]), 256) == name
    others = [whole.slice(0, 2), whole.set_column(0, "row", pa.array([0, 1, 3]))]
    assert len({name, _name_of(whole, 128), *(_name_of(each, 256) for each in others)}) == 4


def test_after_too_few_successes_the_next_start_fetches_only_what_failed(site, out, tmp_path):
    site.files["/a.jpg"] = jpeg(seed=1)
    names = [f"{site.address}/{name}.jpg" for name in "abc"] + ["nonsense"]
    source, work = source_of(tmp_path, names, min_success=0.7), tmp_path / "work"
    with pytest.raises(ConfigError, match=r"only 1 of 4.*fetches only what failed"):
        download(source, out, 1, work)
    site.files |= {"/b.jpg": jpeg(seed=2), "/c.jpg": jpeg(seed=3)}
    download(source, out, 1, work)
    assert site.asked == {"/a.jpg": 1, "/b.jpg": 2, "/c.jpg": 2}
    assert [status for status, _ in told(out)] == ["ok", "ok", "ok", "failed"]
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]


def script(*words: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'lib'}:{os.environ['PYTHONPATH']}"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_finished_download_is_retried_in_its_folder(site, tmp_path):
    site.files["/a.jpg"] = jpeg(seed=1)
    source = source_of(tmp_path, [f"{site.address}/{name}.jpg" for name in "abc"])
    folder = tmp_path / "results"
    settings = json.dumps({"source": source.model_dump(mode="json")})
    download_script = ROOT / "scripts/download.py"
    script(download_script, "--settings", settings, "--out", folder)
    first = json.loads((folder / "manifest.json").read_text())
    assert (first["num_ok"], first["num_requested"]) == (1, 3)
    site.files["/c.jpg"] = jpeg(seed=3)
    for _ in range(2):  # the second time nothing new comes
        assert "of 3 images failed" in script("-m", "clipgraft.data.retry", folder)
        script(download_script, folder / "manifest.json", "--out", folder)
    assert site.asked == {"/a.jpg": 1, "/b.jpg": 3, "/c.jpg": 2}
    last = json.loads((folder / "manifest.json").read_text())
    assert (
        last["num_ok"] == 2 and last["id"] != first["id"] and last["settings"] == first["settings"]
    )
    assert [each.status for each in read_outcomes(folder / "outcomes.parquet")] == [
        "ok",
        "failed",
        "ok",
    ]
    assert sorted(path.name for path in folder.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert not (folder / ".resume").exists()


def test_snakemake_retries_the_downloads_of_a_mixed_data_set_and_then_indexes_again(
    site, tmp_path, workflow
):
    site.files |= {f"/{number}.jpg": jpeg(seed=number) for number in range(3)}
    addresses = [f"{site.address}/{number}.jpg" for number in range(4)]
    table = source_of(tmp_path, addresses).table
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.jpg").write_bytes(jpeg(seed=9))
    (tmp_path / "folder/x.txt").write_text("beside")
    urls = f"{{kind: urls, table: {table}, retries: 0, allow_private_addresses: true}}"
    folder = f"{{kind: folder, folder: {tmp_path / 'folder'}}}"
    workflow.edit(
        "small.yaml",
        "{kind: shapes, split: train, num_samples: 96, image_size: 32}",
        f"{{kind: mixed, sources: {{web: {urls}, own: {folder}}}}}",
    )
    index = ("--cores", "2", "--until", "index")
    workflow.snakemake(*index)
    assert _indexed(workflow.root) == {"own/x", *(f"web/{row:09d}" for row in range(3))}
    site.files["/3.jpg"] = jpeg(seed=3)
    workflow.snakemake("--cores", "2", "retry")
    assert site.asked == {"/0.jpg": 1, "/1.jpg": 1, "/2.jpg": 1, "/3.jpg": 2}
    assert workflow.planned("--until", "index") == ["index"]
    workflow.snakemake(*index)
    assert _indexed(workflow.root) == {"own/x", *(f"web/{row:09d}" for row in range(4))}


def test_a_retry_without_sources_of_urls_says_that_there_is_nothing_to_fetch(workflow):
    said = workflow.snakemake("-n", "retry")
    assert "nothing to fetch again: no source of this config is of kind `urls`" in said


def test_a_lower_min_success_goes_on_with_what_there_is_and_another_one_runs_nothing(
    site, tmp_path, workflow
):
    site.files["/0.jpg"] = jpeg()
    table = source_of(tmp_path, [f"{site.address}/{number}.jpg" for number in range(2)]).table
    keys = f"table: {table}, retries: 0, allow_private_addresses: true, min_success"
    shapes = "{kind: shapes, split: train, num_samples: 96, image_size: 32}"
    workflow.edit("small.yaml", shapes, f"{{kind: urls, {keys}: 0.6}}")
    download = ("--cores", "2", "--until", "download")
    said = workflow.snakemake(*download, check=False)
    assert "only 1 of 2 images" in said and "min_success = 0.6" in said
    workflow.edit("small.yaml", "min_success: 0.6", "min_success: 0.4")
    workflow.snakemake(*download)
    assert site.asked == {"/0.jpg": 1, "/1.jpg": 2}
    manifests = workflow.root.glob("results/download/*/manifest.json")
    sources = [json.loads(path.read_text())["settings"]["source"] for path in manifests]
    assert {each.get("min_success") for each in sources} == {None, 0.4}
    workflow.edit("small.yaml", "min_success: 0.4", "min_success: 0.3")
    assert workflow.planned("--until", "download") == []


def _indexed(root: Path) -> set[str]:
    """Uids of the training set."""
    tables = [pq.read_table(path) for path in root.glob("results/index/*/samples.parquet")]
    mixed = [table for table in tables if table["source"][0].as_py()]
    assert len(mixed) == 1
    return set(mixed[0]["uid"].to_pylist())


def test_the_last_word_on_an_image_is_that_of_the_later_shard_whatever_its_digits(tmp_path):
    write_outcomes([Outcome("7", "", "failed", "gone")], tmp_path / "30000.parquet")
    write_outcomes([Outcome("7", "207000.tar", "ok", "")], tmp_path / "207000.parquet")
    assert last_outcomes(tmp_path)[7].status == "ok"


STARTED = """
import os, runpy, sys, time
from clipgraft.data.fetch_process import PARENT
runpy.run_module("clipgraft.data.fetch_process", run_name="__mp_main__")
print(os.environ[PARENT] == str(os.getpid()), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("is_early", [True, False])
def test_a_worker_leaves_with_who_started_it_however_early_that_one_is_gone(is_early):
    with subprocess.Popen(["sleep", "600"]) as parent:
        if is_early:
            parent.kill()
            parent.wait()
        told = {PARENT: str(parent.pid), PRIVATE: "0", FILES: "0", SECONDS: "1"}
        command = [sys.executable, "-c", STARTED]
        with subprocess.Popen(
            command, env={**os.environ, **told}, stdout=subprocess.PIPE
        ) as worker:
            if not is_early:
                assert worker.stdout.readline() == b"True\n"
                parent.kill()
                parent.wait()
            assert worker.wait(120) == 1
