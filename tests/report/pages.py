"""Writing a page and reading it again."""

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

from clipgraft.report.report import report
from clipgraft.settings import ReportJob

VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """What a page refers to, its ids, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        about = dict(attributes)
        self.ids += [about["id"]] if "id" in about else []
        self.links += [about[name] for name in ("href", "xlink:href") if name in about]
        self.sources += [about["src"]] if "src" in about else []
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def write(inputs: dict[str, Path], out: Path) -> str:
    out.mkdir()
    report(ReportJob(run="demo", seed=0), inputs, out)
    return (out / "report.html").read_text()


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def with_edit(
    inputs: dict[str, Path], name: str, file: str, edit, tmp_path: Path
) -> dict[str, Path]:
    """The inputs with one file of one evaluation changed."""
    folder = tmp_path / name.replace("/", "_")
    shutil.copytree(inputs[name], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    model = inputs[name] / manifest["inputs"]["model"]["manifest"]
    manifest["inputs"]["model"]["manifest"] = str(model.resolve())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    content = json.loads((folder / file).read_text())
    edit(content)
    (folder / file).write_text(json.dumps(content))
    return {**inputs, name: folder}
