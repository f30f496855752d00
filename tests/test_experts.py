"""Experts: which weights move, what the loss is, when a round is refused, and that cutting a batch changes nothing."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import folder, make_data, phase, saving_until

from clipgraft import dist, embed, encoding, training_state
from clipgraft.checkpoint import load_model, read_weights
from clipgraft.config import ConfigError
from clipgraft.data.loader import Batch
from clipgraft.data.sampler import HomogeneousBatches, Visits
from clipgraft.data.tokens import Tokenizer, Tokens
from clipgraft.evaluation import encode
from clipgraft.experts import check_learnable, expert_objective, finetune_expert, mean_of_end
from clipgraft.graft import assemble
from clipgraft.models import build as build_module
from clipgraft.models import padding
from clipgraft.models.build import build
from clipgraft.models.moe import insert_experts
from clipgraft.models.positions import stretched_table
from clipgraft.objectives import Features
from clipgraft.pretrain import pretrain
from clipgraft.router import finetune_router
from clipgraft.settings import AssembleJob, EmbedSettings, ExpertJob, RouterJob
from clipgraft.training_state import TrainingState

NUM = 40
LENGTH = 40  # of which captions need half
STABLE = {"lr": 1e-2, "eps": 1e-2}  # with a small eps, Adam takes whole steps for rounding


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLIPGRAFT_PRECISION", "fp32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


def two_blocks(**changes: object):
    model = phase().model.model_dump()
    for tower in ("vision_cfg", "text_cfg"):
        model["config"][tower]["layers"] = 2
    return phase(model=model, text_length=LENGTH, samples_seen=640, optim={"lr": 3e-3}, **changes)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPGRAFT_PRECISION", "fp32")
        pretrain(two_blocks(), *data, None, out)
    return out


def job(**changes: object) -> ExpertJob:
    """Of few steps, in which nothing has to be learned."""
    raw = {"samples_seen": 64, "batch_size": 8, "batches": "homogeneous", "seed": 0}
    return ExpertJob(**raw | {"optim": STABLE, "stop_ratio": None} | changes)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- which weights move -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "blocks"),
    [
        ({}, ["visual.0", "visual.1", "text.0", "text.1"]),
        ({"lock": ["text"]}, ["visual.0", "visual.1"]),
        ({"lock": ["image"], "text_layers": [0]}, ["text.0"]),
        ({"image_layers": [1]}, ["visual.1", "text.0", "text.1"]),
    ],
    ids=str,
)
def test_the_chosen_mlps_move_and_nothing_else(data, base, labels, tmp_path, chosen, blocks):
    out = folder(tmp_path / "out")
    facts = finetune_expert(job(**chosen), base, *data, labels, out)
    stored, before = read_weights(out), read_weights(base)
    after = load_model(out).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    found = [re.match(r"(\w+)\.transformer\.resblocks\.(\d)\.mlp\.c_\w+\.", name) for name in moved]
    assert {f"{part[1]}.{part[2]}" for part in found} == set(blocks)
    assert moved == stored.keys() and len(moved) == 4 * len(blocks)
    assert facts["trained_parameters"] == sum(tensor.numel() for tensor in stored.values())


def test_a_block_that_the_tower_lacks_is_named(data, base, labels, tmp_path):
    with pytest.raises(
        ConfigError, match=r"image_layers = \[5\]: the image tower has 2 blocks.*0 to 1"
    ):
        finetune_expert(job(image_layers=[5]), base, *data, labels, folder(tmp_path / "out"))


def test_experts_of_some_blocks_are_grafted_with_the_others_as_in_the_base(
    data, base, labels, tmp_path
):
    first, second, moe = (folder(tmp_path / name) for name in ("first", "second", "moe"))
    settings = job(image_layers=[1])
    finetune_expert(settings, base, *data, labels, first)
    finetune_expert(settings, first, *data, labels, second)  # init: previous
    assemble(AssembleJob(num_experts=3, top_k=2, seed=0), [base, first, second], moe)
    stacks = load_model(moe, insert_experts=insert_experts).model.visual.transformer.resblocks
    dense = read_weights(base)
    for number, is_trained in ((0, False), (1, True)):
        stack = stacks[number].mlp.c_fc_weight
        key = f"visual.transformer.resblocks.{number}.mlp.c_fc.weight"
        assert torch.equal(stack[0], dense[key])
        assert torch.equal(stack[2], read_weights(second)[key] if is_trained else dense[key])
        assert is_trained is not torch.equal(stack[1], stack[2])


# --- the loss -----------------------------------------------------------------------------------------------


def masked_loss(image, text, scale: float, groups, smoothing: float) -> torch.Tensor:
    """Cross-entropy of torch, one row and its own candidates at a time, in float64."""
    losses = []
    for one, other in ((image, text), (text, image)):
        for i, row in enumerate(one):
            own = [j for j, group in enumerate(groups) if group == groups[i]]
            if len(own) > 1:
                logits = scale * torch.stack([row @ other[j] for j in own])[None]
                target = torch.tensor([own.index(i)])
                losses.append(F.cross_entropy(logits, target, label_smoothing=smoothing))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_short_caption_adds_the_same_loss_with_its_weight(is_mixed, smoothing):
    torch.manual_seed(0)
    image, text, short = F.normalize(torch.randn(3, 6, 8, dtype=torch.float64), dim=2)
    leaves = [each.clone().requires_grad_() for each in (image, text, short)]
    labels = np.array([0, 0, 1, 1, 1, 2])
    settings = job(label_smoothing=smoothing, short_captions={"weight": 0.25, "kind": "caption"})
    objective = expert_objective(dist.World(0, 1, torch.device("cpu")), settings)
    in_turn = torch.stack(leaves[1:], 1).flatten(0, 1)
    features = Features(leaves[0], in_turn, torch.tensor(7.0, dtype=torch.float64))
    rows = torch.arange(6)
    group_B = torch.from_numpy(labels) if is_mixed else None
    loss, extras = objective(features, (), Batch(rows, rows, rows, rows, group_B), 0.0)
    groups = labels if is_mixed else [0] * 6
    mine = [each.clone().requires_grad_() for each in (image, text, short)]
    own, more = (masked_loss(mine[0], each, 7.0, groups, smoothing) for each in mine[1:])
    assert loss.item() == pytest.approx((own + 0.25 * more).item(), rel=1e-9)
    assert extras["pair"].item() == pytest.approx(own.item(), rel=1e-9)
    assert extras["short"].item() == pytest.approx(more.item(), rel=1e-9)
    plain = masked_loss(image, text, 7.0, groups, 0.0)
    assert extras["infonce"].item() == pytest.approx(plain.item(), rel=1e-9)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves),
        torch.autograd.grad(own + 0.25 * more, mine),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_a_sample_that_is_shown_twice_is_not_its_own_negative():
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(2, 6, 8, dtype=torch.float64), dim=2)
    labels_N, visits = np.array([0, 0, 1]), Visits(3, 0, np.zeros(3, int), np.array([2.0]))
    drawn = HomogeneousBatches(labels_N, 6, 0, visits=visits).batch(3)
    rows, group_B = torch.from_numpy(drawn.rows_B), torch.from_numpy(drawn.group_B)
    assert sorted(rows.tolist()) == [0, 0, 1, 1, 2, 2]
    features = Features(image[rows], text[rows], torch.tensor(7.0, dtype=torch.float64))
    alone = dist.World(0, 1, torch.device("cpu"))
    objective = expert_objective(alone, job(label_smoothing=0.1))
    loss, _ = objective(features, (), Batch(rows, rows, rows, rows, group_B), 0.0)
    groups = list(zip(labels_N[drawn.rows_B], drawn.visit_B % 2, strict=True))
    wanted = masked_loss(image[rows], text[rows], 7.0, groups, 0.1)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)


def test_training_reads_drawn_and_short_captions_in_turn(data, base, labels, tmp_path):
    """Without a full stop the short caption is the drawn one, so both have the same loss."""
    plain, both = folder(tmp_path / "plain"), folder(tmp_path / "both")
    finetune_expert(job(), base, *data, labels, plain)
    short = {"short_captions": {"weight": 1.0, "kind": "first_sentence"}}
    finetune_expert(job(**short), base, *data, labels, both)
    first, second = rows_of(plain)[0], rows_of(both)[0]
    assert second["pair"] == second["short"] == pytest.approx(first["loss"], rel=1e-5)
    assert second["loss"] == pytest.approx(2 * first["loss"], rel=1e-5)


def test_of_two_captions_the_drawn_one_has_the_loss_and_the_short_one_its_weight(
    data, base, labels, tmp_path
):
    plain, both = folder(tmp_path / "plain"), folder(tmp_path / "both")
    settings = {"samples_seen": 8}
    finetune_expert(job(**settings), base, *data, labels, plain)
    short = {"short_captions": {"weight": 0.25, "kind": "caption"}}
    finetune_expert(job(**settings, **short), base, *data, labels, both)
    (first,), (second,) = rows_of(plain), rows_of(both)
    assert second["pair"] == pytest.approx(first["loss"], rel=1e-5)
    assert second["short"] != pytest.approx(second["pair"], rel=1e-4)
    assert second["loss"] == pytest.approx(second["pair"] + 0.25 * second["short"], rel=1e-5)


# --- trimming -----------------------------------------------------------------------------------------------


def untrimmed(_: object, text_BL: torch.Tensor) -> torch.Tensor:
    return text_BL


pack = padding.Packing.pack


def compute_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "trimmed", untrimmed)
    monkeypatch.setattr(encoding, "tell_padding", lambda *_: None)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Columns of the texts that training hands to the model."""
    seen = []

    def look(model, images, text_BL):
        seen.append(text_BL.shape[1])
        return Features(*model(images, text_BL))

    monkeypatch.setattr(encoding, "encode", look)
    return seen


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("reduction", ["truncate", "random"])
def test_trimmed_batches_train_the_same_expert(
    data, base, labels, tmp_path, monkeypatch, lengths, accumulate, reduction
):
    monkeypatch.setattr(build_module, "_TRIM_TO", 1)  # or so short texts would all be 16 tokens
    monkeypatch.setattr(padding, "_LEAST_STEP", 1)  # nor would it pay to leave out the rest
    packings = []
    monkeypatch.setattr(
        padding.Packing, "pack", lambda told, x: packings.append(told) or pack(told, x)
    )
    settings = job(accumulate=accumulate, text_reduction=reduction)
    trimmed, whole = folder(tmp_path / "trimmed"), folder(tmp_path / "whole")
    finetune_expert(settings, base, *data, labels, trimmed)
    assert len(set(lengths)) > 2 and max(lengths) < LENGTH and packings
    packings.clear()
    compute_padding(monkeypatch)
    lengths.clear()
    finetune_expert(settings, base, *data, labels, whole)
    assert set(lengths) == {LENGTH} and not packings
    expected, got = read_weights(whole), read_weights(trimmed)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6)
    for one, other in zip(rows_of(trimmed), rows_of(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_an_expert_goes_on_after_a_kill_with_the_same_bits(
    data, base, labels, tmp_path, monkeypatch
):
    """With short captions, reduced texts and parts, each trimmed by itself."""
    short = {"short_captions": {"kind": "caption"}, "text_reduction": "random"}
    settings = job(accumulate=2, **short)
    whole, out = folder(tmp_path / "whole"), folder(tmp_path / "out")
    finetune_expert(settings, base, *data, labels, whole)
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(TrainingState, "save", saving_until(4, TrainingState.save))
    state = TrainingState(tmp_path / "resume", "tag")
    with pytest.raises(KeyboardInterrupt):
        finetune_expert(settings, base, *data, labels, out, state=state)
    finetune_expert(settings, base, *data, labels, out, state=state)
    state.close()
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert [row["infonce"] for row in rows_of(out)] == [row["infonce"] for row in rows_of(whole)]


def test_trimmed_batches_train_the_same_routers(data, base, tmp_path, monkeypatch):
    moe, trimmed, whole = (folder(tmp_path / name) for name in ("moe", "trimmed", "whole"))
    assemble(AssembleJob(num_experts=2, top_k=1, seed=0), [base, base], moe)
    settings = RouterJob(samples_seen=64, batch_size=16, optim=STABLE, seed=0)
    finetune_router(settings, moe, *data, trimmed)
    compute_padding(monkeypatch)
    finetune_router(settings, moe, *data, whole)
    expected, got = read_weights(whole), read_weights(trimmed)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6)
    for one, other in zip(rows_of(trimmed), rows_of(whole), strict=True):
        for key in ("loss", "balance", "z", "entropy"):
            assert one[key] == pytest.approx(other[key], rel=1e-6)


def test_trimmed_texts_have_the_same_embeddings(data, base, tmp_path, monkeypatch):
    loaded = load_model(base)
    tokenizer, seen = Tokenizer(loaded.tokenizer), []

    def look(model, text_BL):
        seen.append(text_BL.shape[1])
        return encoding.trimmed(model, text_BL)

    monkeypatch.setattr(encode, "trimmed", look)
    device, texts = torch.device("cpu"), ["a red circle", "a small striped teal triangle"]
    read = encode.encoder_of_texts(loaded.model.eval(), tokenizer, LENGTH, device, 1)
    with torch.no_grad():
        got = read(texts)
        whole = torch.from_numpy(tokenizer.encode_batch(texts, LENGTH))
        expected = F.normalize(loaded.model.encode_text(whole), dim=1)
    assert seen == [LENGTH] * 2 and torch.allclose(got, expected, atol=1e-6)
    outs = [folder(tmp_path / name) for name in ("trimmed", "whole")]
    embed.embed(EmbedSettings(), base, *data, outs[0])
    monkeypatch.setattr(embed, "trimmed", untrimmed)
    embed.embed(EmbedSettings(), base, *data, outs[1])
    one, other = (np.load(out / "text.npy").astype(np.float32) for out in outs)
    np.testing.assert_allclose(one, other, atol=5e-4)  # stored in float16


# --- the stop rule ------------------------------------------------------------------------------------------


def test_a_round_that_has_nothing_to_learn_is_refused_and_may_go_on(data, labels, tmp_path):
    """An untrained base that does not move: texts that are random are no better than guessing."""
    start, out = folder(tmp_path / "start"), folder(tmp_path / "out")
    pretrain(phase(samples_seen=0, text_length=12), *data, None, start)
    stuck = {"optim": {"lr": 1e-9}, "label_smoothing": 0.1}
    assert ExpertJob.model_fields["stop_ratio"].default == 0.98
    with pytest.raises(ConfigError, match="round 2 has nothing to learn") as error:
        finetune_expert(job(**stuck, stop_ratio=0.98), start, *data, labels, out)
    loss = re.search(r"within clusters is ([\d.]+)", str(error.value))
    bound = re.search(r"stop_ratio = 0.98 x ([\d.]+)", str(error.value))
    assert float(bound[1]) < math.log(8) + 1e-3
    assert float(loss[1]) > 0.98 * float(bound[1])
    assert "moe.num_experts: 2" in str(error.value) and "stop_ratio: null" in str(error.value)
    assert not (out / "model.safetensors").exists()
    finetune_expert(job(**stuck), start, *data, labels, out)
    assert (out / "model.safetensors").exists()


def test_a_round_that_learns_goes_on_and_ordinary_batches_are_not_judged(
    data, base, labels, tmp_path
):
    out = folder(tmp_path / "out")
    learns = {"samples_seen": 1280, "optim": {"lr": 3e-3}, "label_smoothing": 0.1}
    finetune_expert(job(**learns, stop_ratio=0.98), base, *data, labels, out)
    last = rows_of(out)[-1]
    assert last["infonce"] < 0.9 * last["guessing"] and last["infonce"] < last["loss"]
    stuck = job(batches="ordinary", optim={"lr": 1e-9}, stop_ratio=1e-6)
    finetune_expert(stuck, base, *data, None, folder(tmp_path / "control"))


def row(step: int, infonce: float, guessing: float = 2.0) -> dict:
    return {"step": step, "infonce": infonce, "guessing": guessing}


@pytest.mark.parametrize(
    ("rows", "num_steps", "mean"),
    [
        ([row(1, 9), row(2, 1.5)], 2, 1.5),
        ([row(k, k) for k in range(1, 101)], 100, 95.5),
        ([row(89, 9), row(92, 1), row(100, 2)], 100, (3 * 1 + 8 * 2) / 11),
        ([row(7, 1.25)], 7, 1.25),
    ],
)
def test_the_last_tenth_of_the_steps_is_judged(rows, num_steps, mean, labels):
    assert mean_of_end(rows, num_steps, "infonce") == pytest.approx(mean)
    ratio = mean / 2
    check_learnable(job(stop_ratio=ratio * 1.01), rows, num_steps, labels)
    with pytest.raises(ConfigError, match="nothing to learn"):
        check_learnable(job(stop_ratio=ratio * 0.99), rows, num_steps, labels)


def test_a_round_without_candidates_has_nothing_to_learn_and_the_first_one_no_experts(
    tmp_path, labels
):
    with pytest.raises(ConfigError, match="nothing to learn"):
        check_learnable(job(stop_ratio=0.98), [row(1, 0.0, 0.0)], 1, labels)
    (tmp_path / "clusters.json").write_text('{"rounds": 1}')
    with pytest.raises(ConfigError, match=r"round 1 .*Hint: moe: null"):
        check_learnable(job(stop_ratio=0.98), [row(1, 2.0)], 1, tmp_path)
    check_learnable(job(stop_ratio=0.98), [], 0, labels)


# --- long texts ---------------------------------------------------------------------------------------------


def test_public_weights_are_stretched_in_a_phase_without_steps(data, tmp_path):
    """Texts that fit into the rows that stay have the same features as before."""
    tokens = Tokens.open(data[0])
    model = phase().model.model_dump()
    config = model["config"] | {"custom_text": True, "quick_gelu": False}
    text = config["text_cfg"] | {"context_length": 30, "vocab_size": tokens.vocab_size}
    vision = config["vision_cfg"] | {"image_size": 16}
    torch.manual_seed(0)
    public = build(config | {"text_cfg": text, "vision_cfg": vision})
    with torch.no_grad():
        public.text.positional_embedding.normal_()
    torch.save(public.state_dict(), tmp_path / "public.pt")
    model["pretrained"] = str(tmp_path / "public.pt")
    out = folder(tmp_path / "out")
    stretch = {"text_pos_resize": "stretch", "text_pos_keep": 20}
    settings = phase(model=model, text_length=60, samples_seen=0, **stretch)
    assert pretrain(settings, *data, None, out)["positions"]["text"] == "stretch"
    loaded = load_model(out)
    table = public.text.positional_embedding
    assert torch.equal(
        loaded.model.text.positional_embedding, stretched_table(table.detach(), 60, 20)
    )
    captions = torch.from_numpy(tokens.encode(np.arange(10), 60))
    assert captions[:, 20:].sum() == 0
    with torch.no_grad():
        before = public.eval().encode_text(captions[:, :30])
        after = loaded.model.eval().encode_text(captions)
    assert torch.allclose(after, before, atol=1e-6)


# --- processes ----------------------------------------------------------------------------------------------

EXPERT = """
import sys, json
from pathlib import Path
from clipgraft.experts import finetune_expert
from clipgraft.settings import ExpertJob
settings, *paths = sys.argv[1:]
base, index, shard, labels, out = map(Path, paths)
finetune_expert(ExpertJob(**json.loads(settings)), base, index, shard, labels, out)
"""


def test_two_processes_train_the_expert_of_one(data, base, labels, tmp_path):
    """Mixed batches, short captions and parts, each trimmed by itself."""
    script = tmp_path / "expert.py"
    script.write_text(EXPERT)
    short = {"weight": 0.5, "kind": "caption"}
    settings = job(accumulate=2, short_captions=short, label_smoothing=0.1, samples_seen=80)
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    finetune_expert(settings, base, *data, labels, one)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [settings.model_dump_json(), *map(str, (base, *data, labels, two))]
    done = subprocess.run([*torchrun, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, theirs in zip(rows_of(one), rows_of(two), strict=True):
        for key in ("loss", "pair", "short", "infonce", "guessing"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-5)
    bounds = [row["guessing"] for row in rows_of(one)]
    assert max(bounds) == pytest.approx(math.log(8)) and min(bounds) < math.log(7)
    expected, got = read_weights(one), read_weights(two)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=2e-6)
