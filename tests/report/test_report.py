"""Laws of the whole report, drawn from a made-up run."""

import csv
import re
import shutil
from base64 import b64encode

import pytest
from pages import Page, csv_rows, with_edit, write

from clipgraft.config import ConfigError
from clipgraft.report.costs import Cost
from clipgraft.report.page_tables import data_table
from clipgraft.report.read import Model, Run
from clipgraft.report.report import _tiles
from clipgraft.report.style import themed

FULL = {
    "data_caption_lengths", "data_image_sizes", "data_rejects", "pretraining_curves", "pretraining_parts",
    "experts_label_flow", "experts_answers", "results_worst_classes",
    "experts_cluster_sizes", "experts_agreement", "experts_loss", "moe_router", "moe_load",
    "moe_router_layers", "results_metrics", "results_cost", "results_confusion", "results_robustness",
    "moe_patch_choices", "moe_word_choices", "moe_words", "moe_information",
    "attributes_probes", "attributes_gains", "attributes_given",
}  # fmt: skip


def test_the_page_needs_nothing_but_itself(full):
    text = (full / "report.html").read_text()
    page = Page(text)
    assert page.sources and all(source.startswith("data:image/jpeg") for source in page.sources)
    assert not re.search(r"<script|<link|@import|url\((?!#)", text)
    inner = {link[1:] for link in page.links if link.startswith("#")}
    assert inner <= set(page.ids)
    for link in page.links:
        assert link.startswith(("#", "data:image/png;base64,", "data:text/csv;base64,"))
    assert len(text) < 5_000_000


def test_tags_are_closed_and_ids_are_unique(full):
    page = Page((full / "report.html").read_text())
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)


def test_every_figure_stands_beside_its_numbers(full):
    page = (full / "report.html").read_text()
    assert {path.stem for path in (full / "figures").glob("*.svg")} == FULL
    for name in FULL:
        with (full / "figures" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows and all(None not in row and None not in row.values() for row in rows)
        svg = (full / "figures" / f"{name}.svg").read_text()
        assert themed(svg) in page and "var(" not in svg
        carried = b64encode((full / "figures" / f"{name}.csv").read_bytes()).decode()
        assert f'download="{name}.csv" href="data:text/csv;base64,{carried}"' in page


def test_rejected_images_are_shown_with_their_reason(full):
    text = (full / "report.html").read_text()
    assert text.count('alt="rejected ') == 3  # too small, each of them
    assert "<b>too small</b>000240: 8x8, side below 16" in text
    with (full / "figures/data_rejects.csv").open() as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows[:2] == [("train", "too small", "3"), ("train", "not downloaded: HTTP 404", "1")]


def test_the_same_run_gives_the_same_bytes(full, tree, tmp_path):
    write(tree, tmp_path / "again")
    for path in sorted(path for path in full.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(full)).read_bytes()


def test_what_a_run_lacks_is_left_out(bare):
    drawn = {path.stem for path in (bare / "figures").glob("*.svg")}
    learnt = {name for name in FULL if name.startswith("attributes_")}  # there are no labels
    of_labels = {"experts_agreement", "results_confusion", "results_worst_classes"}
    of_several = {"pretraining_parts", "experts_label_flow"}  # phases that differ, rounds
    assert drawn == FULL - of_labels - of_several - learnt
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


def test_every_caption_says_what_bad_looks_like(full, bare):
    for out in (full, bare):
        captions = re.findall(
            r"<figcaption>(.*?)</figcaption>", (out / "report.html").read_text(), re.S
        )
        assert captions and all("Bad: " in caption for caption in captions)


def test_a_mixed_data_set_is_counted_over_its_parts(tree):
    parts = {"train/web": tree["download/train"], "train/own": tree["download/renders"]}
    jobs = {name: folder for name, folder in tree.items() if name != "download/train"}
    table = data_table(Run.open(jobs | {f"download/{name}": parts[name] for name in parts}))
    (row,) = (row for row in table.rows if row[0].text == "train")
    assert [cell.text for cell in row[1:4]] == ["shapes", "340", "336"]  # 245 and 95 rows


def test_a_task_that_failed_is_in_a_table_and_all_else_stands(tree, tmp_path):
    def edit(result: dict) -> None:
        result.clear()
        result |= {"task": "renders", "failed": "image 7 <b>does not</b> decode"}

    inputs = tree
    for model in ("expert_1", "untrained"):
        inputs = with_edit(inputs, f"evaluate/{model}/renders", "result.json", edit, tmp_path)
    text = write(inputs, tmp_path / "out")
    said = [text.strip() for text in Page(text).text if text.strip()]
    start = said.index("Tasks that failed")
    assert said[start + 4 : start + 7] == ["untrained", "renders", "image 7 <b>does not</b> decode"]
    assert said[start + 7] == "expert 1"
    printed = (tmp_path / "out" / "results.txt").read_text()
    assert "failed: expert 1 on renders: image 7" in printed
    rows = {row["model"]: row for row in csv_rows(tmp_path / "out" / "results.csv")}
    assert rows["expert_1"]["renders/mean_R@1"] == "" != rows["moe"]["renders/mean_R@1"]
    assert rows["expert_1"]["combinations/mean_R@1"] != ""


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


def test_the_head_has_the_seed_of_the_run_and_the_samples_of_its_last_model(full):
    text = (full / "report.html").read_text()
    assert re.search(r'<h1>clipgraft: demo</h1>\s*<div class="muted">[^<]*seed 0</div>', text)
    models = [Model("mlp_long", "", Cost(9_000_000, 1.0)), Model("moe", "", Cost(1_000, 1.0))]
    assert _tiles(Run({}, {}), models, [], 5)[1]["value"] == "1k"


def test_marks_at_the_ends_of_an_axis_are_whole(full):
    for name in ("results_metrics", "attributes_probes"):
        svg = (full / "figures" / f"{name}.svg").read_text()
        assert "<use" in svg and not re.search(r"<g clip-path[^>]*>\s*<use", svg)


def test_experts_have_the_colours_of_their_patches_in_the_dark_too(full):
    svg = (full / "figures" / "moe_patch_choices.svg").read_text()
    assert "expert 0 (base)" in svg and "#333333" not in svg  # the page turns it white in the dark
