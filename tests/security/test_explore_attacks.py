"""Laws of the explore page under attack: served by the real command, asked as no browser of ours would ask."""

import http.client
import json
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from explore_server import START, Server
from PIL import Image
from tiny_run import make_run

from clipgraft.data.samples import SCHEMA
from clipgraft.provenance import describe_outputs

SECRET = b"the secret of another folder"
EVIL = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"


class Attacked(Server):
    """A page beside files that are none of its business."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_run(folder / "results")
        plant(folder / "results")
        for name in ("secret.txt", ".hidden", "results/secret.txt"):
            (folder / name).write_bytes(SECRET)
        Image.new("RGB", (40, 40), "red").save(folder / "private.png")
        super().__init__(folder)

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and body; the path goes as it stands."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        link.putrequest("GET" if body is None else "POST", path, skip_host=True)
        for name, value in {"Host": f"127.0.0.1:{self.port}", **headers}.items():
            link.putheader(name.replace("_", "-"), value)
        if body is not None:
            link.putheader("Content-Length", str(len(body)))
        link.endheaders(body)
        answer = link.getresponse()
        said = answer.status, answer.read()
        link.close()
        return said

    def call(self, name: str, *data: object) -> str:
        """What a function of the page answers."""
        base = f"http://127.0.0.1:{self.port}/gradio_api/call/{name}"
        body = json.dumps({"data": data}).encode()
        asked = urllib.request.Request(base, body, {"Content-Type": "application/json"})
        event = json.load(urllib.request.urlopen(asked))["event_id"]
        return urllib.request.urlopen(f"{base}/{event}", timeout=100).read().decode()

    def upload(self, name: str, data: bytes, **headers: str) -> tuple[int, bytes]:
        """Send a file as a form does."""
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        body = head.encode() + b"Content-Type: image/png\r\n\r\n" + data + b"\r\n--x--\r\n"
        kind = {"Content_Type": "multipart/form-data; boundary=x"}
        return self.ask("/gradio_api/upload", body, **kind, **headers)


def plant(results: Path) -> None:
    """Captions and class names of a run as an attacker would write them."""
    index = next(path.parent for path in results.glob("index/*/manifest.json") if has_24(path))
    table = pq.read_table(index / "samples.parquet").to_pylist()
    rows = [{**row, "captions": [f"{EVIL} {text}" for text in row["captions"]]} for row in table]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), index / "samples.parquet")
    rewrite(index)
    for path in results.glob("evaluate/*/result.json"):
        about = json.loads(path.read_text())
        classes = about["zero_shot"]["colour"]["classes"]
        classes[:] = [f"{EVIL} {name}" for name in classes]
        path.write_text(json.dumps(about))
        rewrite(path.parent)


def has_24(manifest: Path) -> bool:
    return pq.read_metadata(manifest.parent / "samples.parquet").num_rows == 24


def rewrite(folder: Path) -> None:
    path = folder / "manifest.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "outputs": describe_outputs(folder)}))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed")
    server = Attacked(tmp_path_factory.mktemp("attacked"))
    yield server
    server.close()


def test_it_listens_on_loopback_alone(server):
    assert server.listening() == [f"0100007F:{server.port:04X}"]


def test_no_address_of_the_page_gives_a_file_of_the_machine(server):
    outside = [
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "../../../../../../../../etc/passwd",
        "secret.txt",
        ".hidden",
        "results/secret.txt",
        "/proc/self/environ",
        str(server.folder / "secret.txt"),
        str(server.temporary / ".." / "secret.txt"),
        "file:///etc/passwd",
        *(str(path) for path in server.folder.glob("results/*/*/manifest.json")),
    ]
    roots = ["/gradio_api/file=", "/file=", "/file/", "/static/", "/assets/", "/svelte/"]
    roots += ["/static/../../../../../../../..", "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f.."]
    roots += ["/custom_component/0/component/"]
    for root in roots:
        for name in outside:
            status, body = server.ask(f"{root}{name}")
            assert status in (400, 403, 404, 422) and SECRET not in body, (root, name, status)
            assert b"root:" not in body and b'"outputs"' not in body, (root, name)


def test_it_fetches_nothing_for_others(server):
    asked = []

    class Inside(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    inside = ThreadingHTTPServer(("127.0.0.1", 0), Inside)
    thread = Thread(target=inside.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{inside.server_port}/a.png"
    try:
        assert server.ask(f"/gradio_api/proxy={url}")[0] == 400
        assert server.ask(f"/gradio_api/file={url}")[0] == 403
        for given in ({"path": url}, {"path": url, "url": url}):
            for meta in ({}, {"meta": {"_type": "gradio.FileData"}}):
                said = server.call("answer_2", "moe", "renders", {**given, **meta}, [], "", "a {c}")
                assert "event: error" in said, said
    finally:
        inside.shutdown()
        inside.server_close()
        thread.join()
    assert asked == []


def test_a_picture_is_one_that_was_uploaded(server):
    private = str(server.folder / "private.png")
    for meta in ({}, {"meta": {"_type": "gradio.FileData"}}):
        for path in (private, "private.png", "/etc/passwd", f"{server.temporary}/../private.png"):
            given = {"path": path, **meta}
            said = server.call("answer_2", "moe", "renders", given, [], "", "a {c}")
            assert "event: error" in said and "cosine" not in said, (given, said)
    data = Path(private).read_bytes()
    status, body = server.upload("mine.png", data)
    assert status == 200
    given = {"path": json.loads(body)[0], "meta": {"_type": "gradio.FileData"}}
    assert "cosine" in server.call("answer_2", "moe", "renders", given, [], "", "a {c}")


def test_uploads_stay_in_their_folder_and_have_an_end(server):
    before = {path for path in server.folder.rglob("*") if server.temporary not in path.parents}
    status, body = server.upload("../../../../evil.png", b"abc")
    assert status == 200
    assert Path(json.loads(body)[0]).resolve().is_relative_to(server.temporary.resolve())
    after = {path for path in server.folder.rglob("*") if server.temporary not in path.parents}
    assert after == before
    assert server.upload("large.png", bytes(65 * 2**20))[0] == 413


def test_a_page_elsewhere_is_not_answered(server):
    """DNS rebinding: the name `evil.test` leads to 127.0.0.1, and the browser asks for it there."""
    for host in ("evil.test", f"evil.test:{server.port}", "127.0.0.1.evil.test", "0.0.0.0"):
        assert server.ask("/config", Host=host)[0] == 400, host
    for host in ("localhost:9000", "127.0.0.1"):  # the first is what a tunnel may be called
        assert server.ask("/config", Host=host)[0] == 200, host
    for origin in ("http://evil.test", "null", "http://127.0.0.1.evil.test"):
        assert server.ask("/config", Origin=origin)[0] == 403, origin
        assert server.upload("a.png", b"abc", Origin=origin)[0] == 403, origin
    assert server.ask("/config", Origin="http://localhost:9000")[0] == 200


def test_names_that_are_not_offered_are_refused(server):
    for model, data in (("../../etc", "renders"), ("moe", "../../etc")):
        assert "event: error" in server.call("answer", model, data, "red", 4)
    assert "event: error" in server.call("answer", "moe", "renders", "red", 10**9)


def test_captions_and_class_names_are_text_in_a_browser(server, chromium):
    page = chromium.new_context().new_page()
    page.set_default_timeout(START * 1000)
    page.goto(f"http://127.0.0.1:{server.port}")
    page.wait_for_function("document.querySelector('#about')?.innerText.includes('moe')")
    page.click("#data input")
    page.get_by_role("option", name="renders").click()
    page.fill("#query textarea, #query input", f"a red star {EVIL}")
    page.click("#search")
    page.wait_for_selector("#found .caption-label")
    assert EVIL in page.locator("#found .caption-label").first.inner_text()
    page.locator("#found .thumbnail-item").first.click()
    page.wait_for_selector("#classes .bars span")
    assert EVIL in page.locator("#classes .bars span").first.inner_text()
    assert EVIL in page.locator("#captions .bars").inner_text()
    assert page.evaluate("window.pwned") is None
    assert page.locator("img[src=x]").count() == 0
