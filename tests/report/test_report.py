"""Laws of the whole report, drawn from a made-up run."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from clipgraft.config import ConfigError
from clipgraft.data.samples import Samples
from clipgraft.report.report import report
from clipgraft.settings import ReportJob

FULL = {
    "data_caption_lengths", "data_image_sizes", "data_rejects", "pretraining_curves",
    "experts_cluster_sizes", "experts_agreement", "experts_loss", "moe_router", "moe_load",
    "moe_router_layers", "results_metrics", "results_cost", "results_confusion",
    "moe_patch_choices", "moe_word_choices", "moe_words", "moe_information",
    "attributes_probes", "attributes_gains", "attributes_given",
}  # fmt: skip
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
    report(ReportJob(run="demo"), inputs, out)
    return (out / "report.html").read_text()


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def full(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "full"
    write(tree, out)
    return out


@pytest.fixture(scope="module")
def bare(bare_tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "bare"
    write(bare_tree, out)
    return out


def test_the_page_needs_nothing_but_itself(full):
    text = (full / "report.html").read_text()
    page = Page(text)
    assert page.sources and all(source.startswith("data:image/jpeg") for source in page.sources)
    assert not re.search(r"<script|<link|@import|url\((?!#)", text)
    inner = {link[1:] for link in page.links if link.startswith("#")}
    assert inner <= set(page.ids)
    for link in page.links:
        assert link.startswith(("#", "data:image/png;base64,")) or (full / link).exists()
    assert len(text) < 5_000_000


def test_tags_are_closed_and_ids_are_unique(full):
    page = Page((full / "report.html").read_text())
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)


def test_every_figure_stands_beside_its_numbers(full):
    assert {path.stem for path in (full / "figures").glob("*.svg")} == FULL
    for name in FULL:
        with (full / "figures" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows and all(None not in row and None not in row.values() for row in rows)
        assert (full / "figures" / f"{name}.svg").read_text() in (full / "report.html").read_text()


def test_rejected_images_are_shown_with_their_reason(full):
    text = (full / "report.html").read_text()
    assert text.count('alt="rejected ') == 3  # too small, each of them
    assert "<b>too small</b>000240: 8x8, side below 16" in text
    with (full / "figures/data_rejects.csv").open() as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows[:2] == [("train", "too small", "3"), ("train", "not downloaded: HTTP 404", "1")]


def test_numbers_on_the_page_are_those_of_the_results(full, tree):
    result = json.loads((tree["evaluate/moe/renders"] / "result.json").read_text())
    with (full / "results.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert float(rows["moe"]["renders/mean_R@1"]) == result["retrieval"]["mean_R@1"]
    said = f"{100 * result['zero_shot']['shape']['acc1']:.1f}"
    assert said in Page((full / "report.html").read_text()).text
    line = next(x for x in (full / "results.txt").read_text().splitlines() if x.startswith("moe"))
    assert f"{100 * result['retrieval']['mean_R@1']:.1f}" in line.replace("*", "").split()


def test_an_untrained_network_stands_beside_the_probes_alone(full, tree):
    rows = csv_rows(full / "figures/attributes_probes.csv")
    result = json.loads((tree["evaluate/untrained/renders"] / "result.json").read_text())
    found = [r for r in rows if (r["task"], r["model"]) == ("renders", "untrained")]
    assert [float(r["accuracy"]) for r in found] == [p["acc"] for p in result["probe"].values()]
    assert "untrained" not in (full / "results.txt").read_text()
    line = next(r for r in csv_rows(full / "results.csv") if r["model"] == "untrained")
    assert line["samples_seen"] == "0" and float(line["minutes"]) == 0
    assert float(line["renders/probe_shape_acc"]) == result["probe"]["shape"]["acc"]
    assert line["renders/mean_R@1"] == ""


def test_gains_are_over_the_base(full, tree):
    def accuracy(model: str) -> float:
        folder = tree[f"evaluate/{model}/renders"]
        return json.loads((folder / "result.json").read_text())["probe"]["colour"]["acc"]

    rows = csv_rows(full / "figures/attributes_gains.csv")
    gain = {
        r["model"]: float(r["points"])
        for r in rows
        if r["task"] == "renders" and r["attribute"] == "colour"
    }
    assert not {"base", "untrained"} & set(gain) and {"moe", "expert_1", "soup"} <= set(gain)
    assert gain["expert_2"] == pytest.approx(100 * (accuracy("expert_2") - accuracy("base")))


def test_retrieval_given_labels_stands_below_that_of_all(full, tree):
    rows = csv_rows(full / "figures/attributes_given.csv")
    own = [r for r in rows if (r["task"], r["model"]) == ("combinations", "moe")]
    result = json.loads((tree["evaluate/moe/combinations"] / "result.json").read_text())
    expected = [result["retrieval"], *result["given"].values()]
    assert [r["given"] for r in own] == ["all", "colour", "colour+shape"]
    assert [float(r["mean_R@1"]) for r in own] == [each["mean_R@1"] for each in expected]
    assert [float(r["chance"]) for r in own] == [each["chance"]["mean_R@1"] for each in expected]


def test_maps_and_information_are_those_of_the_last_mixture(full, tree):
    shown = json.loads((tree["evaluate/moe/renders"] / "choices.json").read_text())
    rows = csv_rows(full / "figures/moe_patch_choices.csv")
    assert len(rows) == 3 * 3 * 16
    assert [int(r["expert"]) for r in rows[:48]] == list(chain(*shown["image"][0]["experts"]))
    rows = csv_rows(full / "figures/moe_information.csv")
    assert {"moe", "copies"} <= {r["model"] for r in rows}
    own = [
        r for r in rows if r["model"] == "moe" and r["tower"] == "image" and r["about"] == "colour"
    ]
    assert float(own[0]["share"]) > 0.9 > 0.2 > float(own[1]["share"])


def test_every_side_and_both_are_held_against_labels(full, tree):
    """Against scikit-learn, on what the round has stored."""
    rows = csv_rows(full / "figures/experts_agreement.csv")
    value = {(r["round"], r["clusters"], r["attribute"]): float(r["nmi"]) for r in rows}
    assert {name for _, name, _ in value} == {"image", "text", "both", "all labels"}
    clusters_N2 = np.load(tree["cluster/2"] / "clusters.npy")
    shape_N = Samples.open(tree["index/train"]).labels("shape")
    both_N = clusters_N2[:, 0] * 100 + clusters_N2[:, 1]
    for name, found_N in (("text", clusters_N2[:, 1]), ("both", both_N)):
        expected = normalized_mutual_info_score(shape_N, found_N)
        assert value["2", name, "shape"] == pytest.approx(expected)


def test_the_same_run_gives_the_same_bytes(full, tree, tmp_path):
    write(tree, tmp_path / "again")
    for path in sorted(path for path in full.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(full)).read_bytes()


def test_what_a_run_lacks_is_left_out(bare):
    drawn = {path.stem for path in (bare / "figures").glob("*.svg")}
    learnt = {name for name in FULL if name.startswith("attributes_")}  # there are no labels
    assert drawn == FULL - {"experts_agreement", "results_confusion"} - learnt
    names = {line.split("  ")[0] for line in (bare / "results.txt").read_text().splitlines()}
    assert {"base", "expert 1", "moe"} <= names and not {"short", "expert 2"} & names


def test_a_run_that_was_only_pretrained_has_a_report(bare_tree, tmp_path):
    early = ("download", "index", "shard", "pretrain")
    inputs = {name: path for name, path in bare_tree.items() if name.split("/")[0] in early}
    page = Page(write(inputs, tmp_path / "out"))
    assert {"data", "pretraining"} <= set(page.ids)
    assert not {"experts", "moe", "results"} & set(page.ids)
    assert (tmp_path / "out" / "results.txt").read_text() == "nothing was evaluated\n"


def test_a_run_without_experts_has_a_report_that_speaks_of_none(tree, tmp_path):
    models = ("evaluate/short/", "evaluate/base/")
    others = ("evaluate", "embed", "cluster", "finetune_expert", "assemble", "finetune_router")
    inputs = {
        name: path
        for name, path in tree.items()
        if name.startswith(models) or name.split("/")[0] not in others
    }
    text = write(inputs, tmp_path / "out")
    page = Page(text)
    assert {"data", "pretraining", "results"} <= set(page.ids)
    assert not {"experts", "moe"} & set(page.ids)
    said = " ".join(page.text)
    assert "base reaches" in said
    assert not re.search(r"\b(MoE|experts?|baselines?|routers?)\b", said)


def test_a_stage_that_trained_for_no_step_draws_no_curve(bare_tree, tmp_path):
    inputs = dict(bare_tree)
    for name in (
        "pretrain/full",
        "finetune_expert/1",
        "finetune_expert/mlp",
        "finetune_router/moe",
    ):
        inputs[name] = tmp_path / name.replace("/", "_")
        shutil.copytree(bare_tree[name], inputs[name])
        (inputs[name] / "metrics.jsonl").write_text("")
    write(inputs, tmp_path / "out")
    drawn = {path.stem for path in (tmp_path / "out" / "figures").glob("*.svg")}
    assert not {"pretraining_curves", "experts_loss", "moe_router", "moe_load"} & drawn
    assert "experts_cluster_sizes" in drawn


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


def test_captions_cannot_write_markup(bare_tree, tmp_path):
    def edit(examples: dict) -> None:
        examples["image_to_text"][0]["top"][0]["text"] = "<b onclick=x>& bad"

    inputs = with_edit(bare_tree, "evaluate/moe/renders", "examples.json", edit, tmp_path)
    text = write(inputs, tmp_path / "out")
    assert "<b onclick" not in text and "&lt;b onclick=x&gt;&amp; bad" in text


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        (0.9, "That is 40.0 points below base, the best model of the run."),
        (0.2, "points above"),
        (0.5, "Base is as good."),
    ],
)
def test_a_loss_is_said_as_plainly_as_a_gain(bare_tree, tmp_path, others, verdict):
    inputs = bare_tree
    for name, value in (
        ("base", others),
        ("expert_1", 0.0),
        ("mlp", 0.0),
        ("upcycled", 0.0),
        ("moe", 0.5),
    ):

        def edit(result: dict, value: float = value) -> None:
            result["retrieval"]["mean_R@1"] = value

        inputs = with_edit(inputs, f"evaluate/{name}/renders", "result.json", edit, tmp_path)
    assert verdict in write(inputs, tmp_path / "out")


def test_a_missing_manifest_is_named(bare_tree, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/manifest\.json"):
        write({**bare_tree, "pretrain/full": tmp_path / "nowhere"}, tmp_path / "out")
