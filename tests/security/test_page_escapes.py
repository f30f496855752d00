"""Laws of pages: captions, class names and names of files are text on them, whatever they say.

A run is built as the tests of the report build it, then every text in its files that came with the data is rewritten
as an attacker would have written it, and the page is read by a browser's rules.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trees

from clipgraft.data.shapes import ATTRIBUTES
from clipgraft.report.report import report
from clipgraft.settings import ReportJob

EVIL = "</svg></title><img src=x onerror=pwned=1><script>pwned=1</script>\"'"
CLASSES = {value for values in ATTRIBUTES.values() for value in values}
FORBIDDEN = {"script", "iframe", "object", "embed", "base", "form", "link"}

# Such texts are longer than any figure is made for.
pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout")


class Elements(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def poisoned(value):
    """A value with every text of the data rewritten."""
    if isinstance(value, dict):
        by_class = EVIL if value.keys() <= CLASSES else ""
        return {by_class + name: poisoned(each) for name, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each) for each in value]
    is_of_data = isinstance(value, str) and (value in CLASSES or " " in value)
    return EVIL + value if is_of_data else value


def poison(results: Path) -> None:
    for path in results.rglob("*.json"):
        if path.name not in ("manifest.json", "versions.json", "model.json"):
            path.write_text(json.dumps(poisoned(json.loads(path.read_text()))))
    for path in results.rglob("*.parquet"):
        table = pq.read_table(path)
        names = [
            name for name in ("captions", "uid", "detail", "reason") if name in table.column_names
        ]
        for name in names:
            place, field = table.column_names.index(name), table.schema.field(name)
            cells = table[name].to_pylist()
            if name == "captions":
                cells = [cell and [EVIL + text for text in cell] for cell in cells]
            elif path.name == "rejects.parquet":
                cells = [cell and EVIL + cell for cell in cells]
            table = table.set_column(place, field, pa.array(cells, field.type))
        pq.write_table(table, path)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    tree = trees.build_tree(results, trees.settings(2, 1, ("colour", "shape"), {}))
    poison(results)
    out = tmp_path_factory.mktemp("poisoned")
    report(ReportJob(run="demo", seed=0), tree, out)
    return out / "report.html"


def test_nothing_of_the_data_becomes_a_tag_of_the_page(page):
    elements = Elements(page.read_text())
    told = "".join(elements.text)
    assert told.count("<script>pwned=1</script>") > 20  # or nothing was attacked
    assert not {tag for tag, _ in elements.tags} & FORBIDDEN
    for tag, attributes in elements.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href"):
            where = attributes.get(name) or "#"
            assert re.match(r"data:(image/|text/csv;)|#|\w+\.(csv|svg)$", where), (tag, attributes)


def test_figures_beside_the_page_hold_no_script(page):
    figures = list(page.parent.rglob("*.svg"))
    assert len(figures) > 10
    for figure in figures:
        kinds = {tag for tag, _ in Elements(figure.read_text()).tags}
        assert not kinds & (FORBIDDEN | {"img", "foreignobject"}), figure.name


def test_a_browser_runs_nothing_of_it(page, chromium):
    tab = chromium.new_context().new_page()
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.resolve().as_uri())
    assert tab.evaluate("window.pwned") is None
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert not [url for url in asked if url.endswith("/x")]
