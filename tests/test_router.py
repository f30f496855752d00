"""Router training: what is trained, that the batch is judged as a whole, and what is said of collapse.

Run as a script, this file is one of several processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from test_compiled import has_compiler
from test_train import folder, make_data, phase, saving_until

from clipgraft import dist, router, training_state
from clipgraft.checkpoint import load_model, read_weights
from clipgraft.config import ConfigError
from clipgraft.graft import assemble
from clipgraft.losses.balance import routing_sums
from clipgraft.models.moe import insert_experts
from clipgraft.pretrain import pretrain
from clipgraft.router import RoutingLoss, collapse, finetune_router, trained_parameters
from clipgraft.settings import AssembleJob, RouterJob
from clipgraft.training_state import TrainingState

E, K = 4, 2
LAYERS = {"image_layers": [0, 1], "text_layers": [1]}
DENSE = "text.transformer.resblocks.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLIPGRAFT_PRECISION", "fp32")


@pytest.fixture(scope="module")
def moe(data, tmp_path_factory) -> Path:
    """Noisy copies of a base with frozen image positions; one text layer is dense."""
    config = phase().model.model_dump()["config"]
    config["vision_cfg"] |= {"layers": 2, "pos_embed_type": "sin_cos_2d"}
    config["text_cfg"] |= {"layers": 2}
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("moe")
    pretrain(phase(model={"config": config}, samples_seen=64), *data, None, base)
    settings = AssembleJob(num_experts=E, top_k=K, copies=True, noise=0.5, seed=0, **LAYERS)
    assemble(settings, [base], out)
    return out


def job(**changes: object) -> RouterJob:
    """Steep and simple, so that every part of the gradient shows."""
    raw = {
        "samples_seen": 48,
        "batch_size": 16,
        "optim": {"name": "sgd", "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0},
        "balance_weight": 1.0,
        "z_weight": 0.1,
        "seed": 0,
    }
    return RouterJob(**{**raw, **changes})


def changed_by(settings: RouterJob, moe: Path, data: tuple[Path, Path], out: Path) -> set[str]:
    before, weights = read_weights(moe), trained_by(settings, moe, data, out)
    return {name for name in before if not torch.equal(before[name], weights[name])}


def trained_by(
    settings: RouterJob, moe: Path, data: tuple[Path, Path], out: Path
) -> dict[str, torch.Tensor]:
    finetune_router(settings, moe, *data, folder(out))
    return read_weights(out)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_each_choice_trains_what_it_says_and_nothing_else(moe, data, tmp_path):
    names = read_weights(moe).keys()
    grafted = [f"visual.transformer.resblocks.{n}.mlp." for n in (0, 1)]
    grafted += ["text.transformer.resblocks.1.mlp."]
    routers = {f"{layer}router" for layer in grafted}
    of_layers = {name for name in names if name.startswith(tuple(grafted))}
    assert len(of_layers) == 3 * 5
    kept = {"logit_scale", "visual.positional_embedding"}  # the temperature, and sines and cosines
    expected = {"routers": routers, "experts": of_layers, "all": names - kept}
    for train, which in expected.items():
        found = changed_by(job(train=train), moe, data, tmp_path / train)
        # What no token uses gets no gradient, but everything else must have moved.
        unused = which - found
        assert found <= which
        assert not unused & of_layers
        assert len(unused) <= 1, (train, unused)


def test_experts_have_the_learning_rate_that_they_are_given(moe, data, tmp_path):
    before = read_weights(moe)
    one_step = {"samples_seen": 16, "train": "experts"}
    same = trained_by(job(**one_step), moe, data, tmp_path / "same")
    slow = trained_by(job(**one_step, lr_experts=0.05), moe, data, tmp_path / "slow")
    for name in before:
        change, slower = same[name] - before[name], slow[name] - before[name]
        factor = 0.1 if ".mlp.c_" in name else 1.0
        torch.testing.assert_close(slower, factor * change, rtol=1e-3, atol=1e-6)
    assert (same["text.transformer.resblocks.1.mlp.c_fc_weight"] != 0).any()


@has_compiler
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_a_mixture_with_a_compiled_block_ends_with_the_same_weights_but_for_rounding(
    moe, data, tmp_path
):
    """The one block without experts is compiled, and its gradient passes through those with experts."""
    ours, plain = (
        trained_by(job(train="all", compile=compile), moe, data, tmp_path / str(compile))
        for compile in (True, False)
    )
    before = read_weights(moe)
    assert not torch.equal(plain[DENSE], before[DENSE])
    for name, weight in plain.items():
        distance = (ours[name] - weight).norm()
        assert distance <= 1e-3 * (weight - before[name]).norm(), name


def test_a_stopped_training_goes_on_with_both_learning_rates(moe, data, tmp_path, monkeypatch):
    settings = job(train="experts", lr_experts=0.1)
    whole = trained_by(settings, moe, data, tmp_path / "whole")
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(TrainingState, "save", saving_until(2, TrainingState.save))
    state = TrainingState(tmp_path / "resume", "tag")
    out = folder(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        finetune_router(settings, moe, *data, out, state=state)
    assert state.load()["step"] == 2
    finetune_router(settings, moe, *data, out, state=state)
    state.close()
    assert all(torch.equal(value, whole[name]) for name, value in read_weights(out).items())


def test_a_collapse_from_before_a_stop_is_named_after_it(moe, data, tmp_path, monkeypatch, caplog):
    """It has lasted for a tenth of the training in its second step, and only the first one is before the stop."""
    monkeypatch.setattr(router, "collapse", lambda *_: "expert 0 gets 100 % of the tokens")
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(TrainingState, "save", saving_until(1, TrainingState.save))
    state = TrainingState(tmp_path / "resume", "tag")
    settings, out = job(samples_seen=32), folder(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        finetune_router(settings, moe, *data, out, state=state)
    assert "has collapsed" not in caplog.text
    finetune_router(settings, moe, *data, out, state=state)
    state.close()
    assert caplog.text.count("has collapsed, from step 1 to 2: expert 0 gets 100 %") == 3


def test_a_batch_in_parts_is_judged_as_a_whole(moe, data, tmp_path):
    whole, parts = (
        trained_by(job(accumulate=num), moe, data, tmp_path / str(num)) for num in (1, 4)
    )
    assert_same(whole, parts, tmp_path / "1", tmp_path / "4", read_weights(moe))


def assert_same(whole, other, whole_out, other_out, before):
    for name, value in whole.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6, msg=name)
    routers = [name for name in whole if name.endswith("router")]
    assert min((whole[name] - before[name]).abs().max() for name in routers) > 1e-3
    for one, two in zip(rows_of(whole_out), rows_of(other_out), strict=True):
        for key in ("loss", "contrastive", "balance", "z", "entropy"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
        for key in ("load_image", "load_text", "entropy_image", "entropy_text"):
            torch.testing.assert_close(torch.tensor(two[key]), torch.tensor(one[key]), msg=key)


def test_two_processes_equal_one_with_and_without_parts(moe, data, tmp_path):
    """Captions differ in length, so processes differ in how many tokens they route."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    alone = {
        "whole": job(),
        "pooled": job(balance="pooled"),
        "experts": job(train="experts", samples_seen=16),
    }
    together = {**alone, "parts": job(accumulate=2)}
    one = {
        name: trained_by(each, moe, data, tmp_path / f"one_{name}") for name, each in alone.items()
    }
    for name in together:
        folder(tmp_path / f"two_{name}")
    given = {name: each.model_dump_json() for name, each in together.items()}
    words = [__file__, str(moe), *map(str, data), str(tmp_path), json.dumps(given)]
    processes = [
        subprocess.Popen([sys.executable, *words, str(rank)], env=environment) for rank in (0, 1)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    for name in together:
        like = "whole" if name == "parts" else name
        outs = tmp_path / f"one_{like}", tmp_path / f"two_{name}"
        assert_same(one[like], read_weights(outs[1]), *outs, read_weights(moe))


def test_load_and_entropy_of_every_layer_are_logged(moe, data, tmp_path):
    trained_by(job(balance="pooled"), moe, data, tmp_path / "out")
    for row in rows_of(tmp_path / "out"):
        assert torch.tensor(row["load_image"]).shape == (2, E)
        assert torch.tensor(row["load_text"]).shape == (1, E)
        for load_E in row["load_image"] + row["load_text"]:
            assert sum(load_E) == pytest.approx(1) and max(load_E) <= 1 / K + 1e-6
        assert len(row["entropy_image"]) == 2 and len(row["entropy_text"]) == 1
        mean = (sum(row["entropy_image"]) / 2 + row["entropy_text"][0]) / 2
        assert row["entropy"] == pytest.approx(mean, rel=1e-5)
        assert row["balance_pooled"] > row["balance"] > 0.9  # about K, and about 1
        terms = row["contrastive"] + row["balance_pooled"] + 0.1 * row["z"]
        assert row["loss"] == pytest.approx(terms, rel=1e-5)


def collapsed_apart() -> torch.Tensor:
    """Sums of two image layers, each on two experts of its own, and of an even text layer."""
    left = torch.tensor([[9.0, 8.0, -9.0, -9.0], [8.0, 9.0, -9.0, -9.0]])
    even = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    sums = []
    for logits in (left, left.flip(1), even):
        probs = logits.softmax(1)
        sums.append(routing_sums(logits, probs, probs.topk(K, dim=1).indices))
    return torch.stack(sums)


def test_layers_that_collapse_apart_are_seen_layer_by_layer_and_not_pooled():
    losses = {}
    for balance in ("per_layer", "pooled"):
        settings = job(balance=balance, z_weight=0.0)
        extra = RoutingLoss(settings, {"top_k": K, **LAYERS}, is_first=True)
        losses[balance], logged = extra.loss(collapsed_apart())
        assert logged["balance"].item() == pytest.approx((E / K + 1) / 2, rel=1e-4)
    assert losses["per_layer"].item() == pytest.approx((E / K + 1) / 2, rel=1e-4)
    assert losses["pooled"].item() == pytest.approx(K, rel=1e-4)  # its minimum


def test_both_terms_are_trained_by_their_weights():
    def gradient(balance_weight: float, z_weight: float) -> torch.Tensor:
        settings = job(balance_weight=balance_weight, z_weight=z_weight)
        extra = RoutingLoss(settings, {"top_k": K, **LAYERS}, is_first=True)
        sums_LS = collapsed_apart().requires_grad_()
        return torch.autograd.grad(extra.loss(sums_LS)[0], sums_LS)[0]

    balance_LS, z_LS = gradient(1.0, 0.0), gradient(0.0, 1.0)
    used_LE = collapsed_apart()[:, :E] > 0
    assert torch.equal(
        balance_LS[:, E : 2 * E] > 0, used_LE
    )  # of experts that nobody chose it says nothing
    assert (z_LS[:, -3] > 0).all()
    torch.testing.assert_close(gradient(2.0, 0.1), 2 * balance_LS + 0.1 * z_LS)


def test_a_tower_without_experts_takes_no_part():
    sums = collapsed_apart()[2:]
    about = {"top_k": K, "image_layers": [], "text_layers": [1]}
    loss, logged = RoutingLoss(job(z_weight=0.0), about, is_first=True).loss(sums)
    assert loss.item() == pytest.approx(1) and "load_image" not in logged


def watched(extra: RoutingLoss, steps: range, image: list[float], text: list[float]) -> None:
    """Rows in which the first image layer and the text layer have these loads."""
    for step in steps:
        load_image = [image, [1 / E] * E]
        extra.watch({"step": step, "load_image": load_image, "load_text": [text]})


def test_a_layer_that_stays_collapsed_is_named_once_and_a_short_collapse_is_not(caplog):
    even, bad, worse = [1 / E] * E, [0.5, 0.5, 0, 0], [0.5, 0.3, 0.2, 0]
    extra = RoutingLoss(job(samples_seen=1600), {"top_k": K, **LAYERS}, is_first=True)
    with caplog.at_level("WARNING"):
        watched(extra, range(1, 11), bad, even)
        watched(extra, range(11, 12), even, even)
        watched(extra, range(12, 22), bad, worse)
        assert caplog.text == ""  # never for 10 of the 100 steps on end
        watched(extra, range(22, 40), bad, worse)
        for layer in ("image layer 0", "text layer 1"):
            said = f"{layer} has collapsed, from step 12 to 22: expert 0 gets 100"
            assert caplog.text.count(said) == 1
        assert len(caplog.records) == 2
        silent = RoutingLoss(job(), {"top_k": K, **LAYERS}, is_first=False)
        watched(silent, range(1, 40), bad, bad)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("load", "top_k", "expected"),
    [
        ([0.25] * 4, 1, []),
        ([0.93, 0.03, 0.02, 0.02], 1, [0]),
        ([0.92, 0.03, 0.03, 0.02], 1, []),  # below nine tenths of the way from 0.25 to 1
        ([0.4975, 0.3, 0.2, 0.0025], 2, [0]),
        ([0.4, 0.3, 0.2985, 0.0015], 2, [3]),  # 0.6 % of even use
        ([0.5, 0.5], 2, []),  # every token takes both: there is no choice
        ([1 / 3, 1 / 3, 1 / 3], 2, []),
    ],
)
def test_collapse_is_an_idle_expert_or_one_that_nearly_every_token_takes(load, top_k, expected):
    said = collapse(load, top_k)
    assert [e for e in range(len(load)) if f"expert {e} " in said] == expected


@pytest.mark.parametrize("num_experts", [2, 3, 5, 6, 7])
def test_where_every_token_takes_every_expert_none_is_crowded_in_float32(num_experts):
    load_E = torch.full((num_experts,), 1 / num_experts).tolist()
    assert collapse(load_E, num_experts) == ""


def test_a_model_without_routers_is_refused(data, tmp_path):
    base = folder(tmp_path / "base")
    pretrain(phase(samples_seen=16), *data, None, base)
    with pytest.raises(ConfigError, match=r"has no routers. Hint: give an assembled model"):
        finetune_router(job(), base, *data, folder(tmp_path / "out"))


def test_all_leaves_out_what_the_objective_does_not_use(moe):
    model = load_model(moe, insert_experts=insert_experts).model
    trained = trained_parameters(model, "all")
    assert "logit_scale" not in trained and "visual.positional_embedding" not in trained
    assert "text.token_embedding.weight" in trained


def main(moe: Path, index: Path, shard: Path, out: Path, jobs: dict[str, str], rank: int) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=2)
    dist.world = lambda: nullcontext(dist.World(rank, 2, torch.device("cpu")))  # one group for all
    for name, each in jobs.items():
        settings = RouterJob.model_validate_json(each)
        finetune_router(settings, moe, index, shard, out / f"two_{name}")
    dist.barrier()
    torch_dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]), json.loads(sys.argv[5]), int(sys.argv[6]))
