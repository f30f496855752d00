"""Numbers of the page are those of the run, by another way."""

import json
from itertools import chain

import numpy as np
import pyarrow.parquet as pq
import pytest
from pages import Page, csv_rows
from sklearn.metrics import normalized_mutual_info_score

from clipgraft.data.reduce import room_for_text
from clipgraft.data.samples import Samples
from clipgraft.report.facts import run_section
from clipgraft.report.read import Run
from clipgraft.report.sections import _caption_lengths, experts_section, pretraining_section


def test_numbers_on_the_page_are_those_of_the_results(full, tree):
    result = json.loads((tree["evaluate/moe/renders"] / "result.json").read_text())
    rows = {row["model"]: row for row in csv_rows(full / "results.csv")}
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


def test_costs_are_those_of_the_manifests_and_a_job_of_two_names_counts_once(full, tree):
    """By a plain loop over the folders."""
    manifests = [
        json.loads((folder / "manifest.json").read_text())
        for folder in {folder.resolve() for folder in tree.values()}
    ]
    seconds = sum(m["seconds"] for m in manifests if m["stage"] == "pretrain")
    page = Page((full / "report.html").read_text())
    start = page.text.index("device hours")
    cells = [text.strip() for text in page.text[start:] if text.strip()]
    row = cells[cells.index("pretrain") :][:7]
    assert row[1:3] == ["2", f"{seconds / 60:,.1f}"]
    assert row[4] == "52k" and row[6] == "2.0"
    everything = cells[cells.index("all") :][:3]
    assert everything[1:] == [
        str(len(manifests)),
        f"{sum(m['seconds'] for m in manifests) / 60:,.1f}",
    ]


def test_curves_go_on_in_samples_and_in_hours_from_phase_to_phase(full, tree):
    rows = csv_rows(full / "figures/pretraining_curves.csv")
    own = {
        phase: [
            json.loads(line)
            for line in (tree[f"pretrain/{phase}"] / "metrics.jsonl").read_text().splitlines()
        ]
        for phase in ("short", "full")
    }
    last = {
        phase: max((r for r in rows if r["phase"] == phase), key=lambda r: float(r["hours"]))
        for phase in own
    }
    total = own["short"][-1]["seconds"] + own["full"][-1]["seconds"]
    assert float(last["full"]["hours"]) == pytest.approx(total / 3600)
    assert int(last["full"]["samples_seen"]) == 52_000
    for row, of in zip(rows, [*own["short"], *own["full"]], strict=True):
        assert float(row["tokens_per_second"]) == pytest.approx(35 * of["samples_per_second"])


def test_labels_of_a_round_are_split_into_those_of_the_next(full, tree):
    """Sizes and parents against plain counting."""
    rows = csv_rows(full / "figures/experts_label_flow.csv")
    before_N = None
    for name in ("1", "2", "3"):
        label_N = np.load(tree[f"cluster/{name}"] / "labels.npy")
        mine = {r["block"]: r for r in rows if r["round"] == name}
        own = {int(block): r for block, r in mine.items() if block.isdigit()}
        assert sum(int(r["samples"]) for r in mine.values()) == len(label_N)
        assert sum(int(r["labels"]) for r in mine.values()) == len(np.unique(label_N))
        assert own and all(
            int(r["samples"]) == (label_N == label).sum() for label, r in own.items()
        )
        if before_N is not None:
            assert all(
                set(before_N[label_N == label]) == {int(r["parent"])} for label, r in own.items()
            )
        before_N = label_N


def test_agreement_of_models_is_that_of_their_answers(full, tree):
    rows = csv_rows(full / "figures/experts_answers.csv")
    table = {
        key: pq.read_table(tree[f"evaluate/{key}/renders"] / "answers.parquet").to_pylist()
        for key in ("expert_1", "moe")
    }
    row = next(
        r for r in rows if (r["question"], r["model"], r["other"]) == ("shape", "expert_1", "moe")
    )
    pairs = list(zip(table["expert_1"], table["moe"], strict=True))
    assert float(row["same"]) == np.mean([one["shape"] == other["shape"] for one, other in pairs])
    alone = [one["shape_right"] and not other["shape_right"] for one, other in pairs]
    assert float(row["only_model_right"]) == np.mean(alone)


def test_the_worst_classes_are_those_of_the_confusion(full, tree):
    rows = csv_rows(full / "figures/results_worst_classes.csv")
    zero_shot = json.loads((tree["evaluate/moe/renders"] / "result.json").read_text())["zero_shot"]
    recalls = sorted(
        counts[i] / sum(counts)
        for about in zero_shot.values()
        for i, counts in enumerate(about["confusion"])
        if sum(counts) >= 5 and counts[i] < sum(counts)
    )
    assert [float(r["recall"]) for r in rows] == recalls[: len(rows)]
    first = rows[0]
    about = zero_shot[first["label"]]
    i, j = (about["classes"].index(first[key]) for key in ("class", "taken_for"))
    counts = about["confusion"][i]
    assert counts[j] == max(n for k, n in enumerate(counts) if k != i)


def test_neighbours_have_a_table_and_fewer_tokens_a_figure(full, tree):
    result = json.loads((tree["evaluate/moe/renders"] / "result.json").read_text())
    assert "renders: attributes that the nearest images tell" in (full / "report.html").read_text()
    line = next(r for r in csv_rows(full / "results.csv") if r["model"] == "moe")
    assert float(line["renders/knn_shape_acc"]) == result["knn"]["shape"]["acc"]
    rows = csv_rows(full / "figures/results_robustness.csv")
    own = [r for r in rows if (r["task"], r["model"]) == ("renders", "moe")]
    assert [(r["tower"], int(r["num_tokens"])) for r in own] == [
        ("image", 16),
        ("image", 4),
        ("text", 18),
    ]
    assert float(own[1]["value"]) == result["robustness"][1]["metrics"]["mean_R@1"]


@pytest.mark.parametrize(
    ("devices", "num_processes", "hours"),
    [
        (["NVIDIA H200"] * 8, 16, 16 * 120 / 3600),  # two nodes: hardware is that of the first
        (["NVIDIA H200"] * 8, None, 8 * 120 / 3600),
        ([], 4, 120 / 3600),  # four processes of one CPU
    ],
)
def test_device_hours_are_those_of_all_nodes(bare_tree, devices, num_processes, hours):
    run = Run.open(bare_tree)
    phase = run.manifests["pretrain/full"]
    phase["hardware"] = {**phase["hardware"], "devices": devices}
    phase["num_processes"] = num_processes
    (costs,) = (table for table in run_section(run).tables if table.title == "What it cost")
    (row,) = (row for row in costs.rows if row[0].text == "pretrain")
    assert float(row[3].text) == pytest.approx(hours, abs=1e-3)


CONTRASTIVE = {"kind": "contrastive", "weight": 1.0}


@pytest.mark.parametrize(
    ("loss", "distillation", "has_level"),
    [
        (CONTRASTIVE, {}, True),
        (CONTRASTIVE, {"affinity": 0.5}, False),
        ({**CONTRASTIVE, "weight": 0.5}, {}, False),
        ({"kind": "siglip"}, {}, False),
        ({"kind": "gcl"}, {}, False),
        ({"kind": "rgcl_g"}, {}, False),
    ],
)
def test_a_phase_has_a_loss_of_guessing_where_its_loss_is_contrastive_alone(
    tree, loss, distillation, has_level
):
    run = Run.open(tree)
    short, full = (run.manifest("pretrain", name)["settings"] for name in ("short", "full"))
    short["batch_size"] = 256
    full |= {"loss": loss, "distillation": distillation}
    curves = pretraining_section(run).figures[0]
    assert "ln 256 = 5.55 in short" in curves.caption
    assert ("ln 64 = 4.16 in full" in curves.caption) == has_level


@pytest.mark.parametrize("end_id", [49_407, None])
def test_a_caption_counts_as_cut_where_its_tokens_have_no_room(tmp_path, end_id):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "tokens.json").write_text(json.dumps({"end_id": end_id}))
    length_C = np.arange(1, 12)
    np.save(tmp_path / "tokens" / "caption_offsets.npy", np.cumsum([0, *length_C]))
    shown_C, unit = _caption_lengths(Run({"index/train": tmp_path}, {}), None)
    is_cut_C = length_C > room_for_text(8, end_id)
    assert unit == "tokens" and (shown_C > 8).tolist() == is_cut_C.tolist()


def test_experts_that_lose_small_labels_are_said_to(tree):
    def caption(order: str) -> str:
        run = Run.open(tree)
        run.manifest("finetune_expert", "2")["settings"]["batch_order"] = order
        shown = experts_section(run, run.samples("train"), []).figures
        return next(each.caption for each in shown if each.name == "experts_cluster_sizes")

    assert "are never seen" in caption("round_robin")
    assert "are never seen" not in caption("shuffled")
