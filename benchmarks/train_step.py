"""The training step beside open_clip's own: samples per second in turns, share of the hardware's matmul rate, switches.

    python benchmarks/train_step.py [--quick] [--device cpu|cuda] [--only step parts switches] [--model WORD]
        [--json FILE]

Both sides are the real loops, `Fit.run` and `open_clip_train.main`, on the same prepared batches (`_sides.py`): same
architecture, batch, precision, AdamW settings and clipping to norm 1; open_clip computes its loss under autocast as it
always does, ours in float32. Pictures lie ready on the device, as bytes for ours, which normalises them in its step, and
as normalised floats for open_clip, whose workers do that. open_clip has two rows: with texts padded to 77 tokens, which
is its default, and padded to the longest, as ours gets them, which is the claim. What padding is left then ours leaves out
of all but attention.

MFU is the model's FLOPs (three forward passes; what is computed twice and padding are not counted; attention as if
nothing were masked) over the rate of square matrix products in the same precision, in the same turns. Ours computes fewer:
of a last block one token, where no other is read. The notes say the share without what is left out, too. Bounds of trained
parts: their time over their share of the FLOPs of a full step.

On a GPU: `python benchmarks/train_step.py --device cuda --only step --json FILE`, under ten minutes; then the same with
parts and switches. FILE has the rows of all models that were finished, should time run out. What has to be compiled is
optional: without a compiler its rows say so, and the others are measured.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from _common import ROOT, Row, as_json, command_line, faster, report  # first: sets threads
from _sides import TOP_K, Matmul, OpenClip, Ours
from _turns import Case, Side, text_lengths, turns, turns_with

from clipgraft.cost import FLOPS_PER_MAC, Trained, sample_flops

CORES = len(os.sched_getaffinity(0))  # threads of every side
VOCABULARY, CONTEXT, E = 49_408, 77, 4
FLICKR8K, LONGEST = (14.1, 4.0), 32  # tokens of a caption, with start and end
REACH_SHARE = 1 / 1.1
PEERS = {  # what a row is called: our side, the other one, and the ratio to reach
    "texts to the same longest": ("ours", "open_clip", 1.5),
    "open_clip padded to 77 tokens": ("ours", "padded", None),
    "open_clip with --torchcompile": ("ours", "compiled", 1.2),
    "both compiled": ("ours_compiled", "compiled", None),
}

_TOWERS = "models.training_blocks"
# What is on by default beside what it would be without, or off by default beside what it would be with.
ON = {
    "bf16 where the hardware has it, beside fp32": Ours(
        environment={"CLIPGRAFT_PRECISION": "fp32"}
    ),
    "texts trimmed to the longest, beside padded to the context": Ours(
        without=("encoding.trimmed", "encoding.tell_padding")
    ),
    "fused AdamW, beside torch's default": Ours(without=("train.build_optimizer",)),
    "fast towers as a whole, beside open_clip's": Ours(without=("train.speed_up",)),
    "of these the stem as a product, beside a convolution": Ours(
        without=(f"{_TOWERS}.WholeVisionTransformer",)
    ),
    "of these the last block for one token, beside all": Ours(without=(f"{_TOWERS}.reads_one",)),
}
PACKED = {
    "texts without their padding, beside padded to the longest": Ours(
        without=("encoding.tell_padding",)
    ),
}
ATTENTION = "of these attention written out, beside torch's choice"
ON_CPU = {  # no choice elsewhere
    ATTENTION: Ours(without=(f"{_TOWERS}.attend", "devices.attention")),
    "freed memory kept, beside given back": Ours(without=("devices.keep_freed_memory",)),
}
OFF = {
    "grad_checkpointing": Ours(changes={"grad_checkpointing": True}),
    "accumulate: 2": Ours(changes={"accumulate": 2}),
    "compile": Ours(changes={"compile": True}),
}
OFF_ON_GPU = {  # no effect elsewhere
    "compile and cuda_graphs": Ours(changes={"compile": True, "cuda_graphs": True}),
}
# Two processes, and how their gradients meet. Two machines are told apart by how many processes each has.
SHARED, DDP = "through memory", "DDP through gloo"
_APART = {"LOCAL_WORLD_SIZE": "1"}
TOGETHER = {
    SHARED: Ours(processes=2),
    DDP: Ours(processes=2, environment=_APART),
    "copied": Ours(processes=2, environment=_APART, without=("parallel.in_all_processes copied",)),
    "static": Ours(processes=2, environment=_APART, without=("parallel.in_all_processes static",)),
}
MEETINGS = {  # what a row is called: one side, and the other
    f"gradients {SHARED}, beside {DDP}": (SHARED, DDP),
    "DDP with gradient_as_bucket_view, beside without": (DDP, "copied"),
    "DDP with a static graph (off by default)": ("static", DDP),
}


def config_of(name: str, image_size: int, context: int) -> dict[str, Any]:
    """Config of a ViT-B/32, B/16 or L/14."""
    width, words, layers = (768, 512, 12) if name[0] == "B" else (1024, 768, 24)
    vision = {"patch_size": int(name[2:]), "width": width, "layers": layers}
    text = {"width": words, "heads": words // 64, "layers": 12, "vocab_size": VOCABULARY}
    return {
        "embed_dim": words,
        "vision_cfg": {**vision, "image_size": image_size},
        "text_cfg": {**text, "context_length": context},
    }


def config_in(file: str, vocabulary: int) -> dict[str, Any]:
    """The model of a config of ours, at the sizes of its first phase."""
    raw = yaml.safe_load((ROOT / file).read_text())
    config, phase = raw["model"]["config"], raw["pretrain"][0]
    vision = {**config["vision_cfg"], "image_size": phase["image_size"]}
    text = {
        **config["text_cfg"],
        "context_length": phase["text_length"],
        "vocab_size": vocabulary,
    }
    return {**config, "vision_cfg": vision, "text_cfg": text}


def cpu_cases(*, quick: bool) -> list[Case]:
    """The demo's model, that for Flickr8k, and a B/32; quick: the demo's alone, in small batches."""
    demo = Case("demo model", config_in("config.yaml", 200), 128, 16, threads=CORES)
    if quick:
        return [replace(demo, batch=16, threads=1)]
    flickr8k = config_in("tests/config/flickr8k.yaml", 7_000)
    b32 = config_of("B/32", 224, CONTEXT)
    return [
        demo,
        Case("Flickr8k model", flickr8k, 256, 10, threads=CORES),
        Case("ViT-B/32", b32, 32, 24, lengths=FLICKR8K, threads=CORES),
    ]


def long_case(*, quick: bool) -> Case:
    """Two blocks with as many tokens as a full-length ViT-B/16 has, for the switch of attention."""
    config = config_of("B/16", 224, CONTEXT)
    for part in ("vision_cfg", "text_cfg"):
        config[part]["layers"] = 2
    case = Case("ViT-B/16 full, 2 blocks", config, 8, CONTEXT, threads=CORES)
    return replace(case, config=small(config), batch=4, threads=1) if quick else case


def gpu_cases(*, quick: bool) -> list[Case]:
    """What is claimed for a GPU; quick: the first and the last, as many tokens, narrow, on the CPU."""
    short, full, l14 = (
        config_of(*sizes) for sizes in (("B/16", 112, 16), ("B/16", 224, 77), ("L/14", 224, 77))
    )
    cases = [
        Case("ViT-B/16 (I50,T16)", short, 2048, 16, mfu=0.4),
        Case("ViT-B/16 full", full, 512, 77, mfu=0.5),
        Case("ViT-L/14", l14, 256, 77, mfu=0.5),
        Case(f"ViT-L/14 top {TOP_K} of {E}", l14, 128, 77, num_experts=E, mfu=0.5),
    ]
    if quick:
        return [replace(case, config=small(case.config), batch=4) for case in cases[::3]]
    return [replace(case, device="cuda", threads=CORES) for case in cases]


def small(config: dict[str, Any]) -> dict[str, Any]:
    """As many tokens, one narrow block."""
    vision = {**config["vision_cfg"], "width": 32, "layers": 1, "head_width": 16}
    text = {**config["text_cfg"], "width": 32, "heads": 2, "layers": 1, "vocab_size": 100}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}


def flops(case: Case, weights: Literal["all", "mlps", "routers"] = "all") -> float:
    """Of one sample of a step, mean over the texts of a batch; padding is not counted."""
    vision, text = case.config["vision_cfg"], case.config["text_cfg"]
    layers = {
        f"{side}_layers": range(x["layers"]) for side, x in (("image", vision), ("text", text))
    }
    moe = {"num_experts": case.num_experts, "top_k": TOP_K, **layers} if case.num_experts else None
    tokens, trained = 1 + (vision["image_size"] // vision["patch_size"]) ** 2, Trained(weights)
    lengths = text_lengths(case, 0).tolist()
    return statistics.fmean(sample_flops(case.config, tokens, n, trained, moe) for n in lengths)


def left_out(case: Case) -> float:
    """FLOPs of one sample of a step that `LastTrainingBlock` does not compute; blocks of experts compute all tokens."""
    if case.num_experts:
        return 0.0
    vision = case.config["vision_cfg"]
    image_tokens = 1 + (vision["image_size"] // vision["patch_size"]) ** 2
    lengths = text_lengths(case, 0).tolist()
    words = statistics.fmean(_not_read(case.config["text_cfg"], n) for n in lengths)
    return _not_read(vision, image_tokens) + words


def _not_read(tower: Mapping[str, Any], length: int) -> float:
    """Queries, attention, its projection and the MLP, of all tokens of a block but one."""
    width = tower["width"]
    hidden = int(width * tower.get("mlp_ratio", 4.0))
    macs = 2 * width**2 + 2 * width * length + 2 * width * hidden
    return float(FLOPS_PER_MAC * macs * (length - 1))


def step_rows(
    case: Case, seconds: float, repeats: int
) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Ours beside open_clip's step, with and without its compiler on a GPU; and the profiles of both.

    open_clip has no mixtures: beside ours stands its dense step, at the rate that the FLOPs of the mixture leave it.
    """
    context = case.config["text_cfg"]["context_length"]
    same = min(-(-case.longest // 8) * 8, context)  # as ours trims
    matmul = Matmul(8192 if case.device == "cuda" else 2048 if case.batch > 16 else 512)
    sides: dict[str, Side] = {"ours": Ours(), "open_clip": OpenClip(same), "matmul": matmul}
    if case.mfu is None:
        sides["padded"] = OpenClip(CONTEXT)
    rates, profiles, about, lost = turns_with(
        sides, compiled_sides(case, same), case, seconds, repeats
    )
    of_sample = flops(case)
    gain = of_sample / flops(replace(case, num_experts=0))
    pairs = zip(rates["ours"], rates["matmul"], strict=True)
    share = statistics.median(rate * of_sample / matmul for rate, matmul in pairs)
    computed = share * (1 - left_out(case) / of_sample)
    note = f"batch {case.batch}, {about}, MFU {share:.1%}, {computed:.1%} without what is left out"
    note += f", texts of {text_lengths(case, 0).mean():.1f} tokens on average"
    note += f"; peer: its dense step over the FLOP ratio {gain:.2f}" * bool(case.num_experts)
    rows = []
    for what, (side, other, target) in PEERS.items():
        name = f"{case.name}: step, {what}"
        if {side, other} <= rates.keys():
            peer = [rate / gain for rate in rates[other]]
            row = faster(name, rates[side], peer, "samples/s", target, f"{note}, {same} at most")
            rows.append(replace(row, limit_share=share if side == "ours" else None))
        elif {side, other} <= {*rates, *lost}:
            rows.append(failed(name, lost[side if side in lost else other]))
    if case.mfu is not None:
        reach = None if case.num_experts else 1.0
        name = f"{case.name}: MFU"
        rows.append(Row(name, share, case.mfu, "share", share / case.mfu, reach, None, share, note))
    named = {"ours": profiles["ours"], "open_clip": profiles["open_clip"]}
    return rows, {f"{case.name}, {side}": shares for side, shares in named.items()}


def compiled_sides(case: Case, context: int) -> dict[str, Side]:
    """What a compiler makes of both, on a GPU; of ours it leaves blocks of experts as they are."""
    if case.device != "cuda":
        return {}
    ours: dict[str, Side] = {"ours_compiled": Ours(changes={"compile": True})}
    return {"compiled": OpenClip(context, compiled=True), **({} if case.num_experts else ours)}


def part_rows(case: Case, seconds: float, repeats: int) -> list[Row]:
    """Stages that train a part: their samples per second beside those of a full step over their share of FLOPs.

    On a GPU, one that fails (memory, say) leaves the others their rows.
    """
    rows = []
    for part, used in (("mlps", case), ("routers", replace(case, num_experts=E))):
        name = f"{case.name}: only {part}, time over its FLOP share"
        sides: dict[str, Side] = {each: Ours(each) for each in ("all", part)}
        try:
            rates, _, about = turns(sides, used, seconds, repeats)
        except RuntimeError as error:
            if case.device == "cpu":
                raise
            rows.append(failed(name, error))
            continue
        share = flops(used, part) / flops(used)
        bound = [rate / share for rate in rates["all"]]
        note = f"batch {case.batch}, {about}; peer: the full step over the share {share:.2f}"
        rows.append(faster(name, rates[part], bound, "samples/s", REACH_SHARE, note))
    return rows


def switch_rows(
    case: Case,
    seconds: float,
    repeats: int,
    switches: Mapping[str, Ours],
    longest: int = 16,
    lengths: tuple[float, float] | None = None,
) -> list[Row]:
    """Ours as it is beside ours with one thing changed: above 1, the switch pays (where it is off: would pay).

    Unless `lengths` says otherwise, all texts are as long as the longest, and have no padding but behind that.
    """
    text = {**case.config["text_cfg"], "context_length": CONTEXT}  # longer than most texts
    config = {**case.config, "text_cfg": text}
    case = replace(case, config=config, longest=longest, lengths=lengths)
    rows = []
    for name, changed in switches.items():
        is_off = name in OFF or name in OFF_ON_GPU
        what = f"{case.name}: {name}{' (off by default)' * is_off}"
        if not changed.is_possible():
            rows.append(failed(what, RuntimeError("not in this version")))
            continue
        try:
            rates, _, about = turns({"as_is": Ours(), "changed": changed}, case, seconds, repeats)
        except RuntimeError as error:  # no compiler, say
            rows.append(failed(what, error))
            continue
        sides = ("changed", "as_is") if is_off else ("as_is", "changed")
        with_it, without = (rates[side] for side in sides)
        note = f"batch {case.batch}, {about}, context {CONTEXT}, longest text {longest} tokens"
        note += f", mean {case.lengths[0]}" if case.lengths is not None else ""
        rows.append(faster(what, with_it, without, "samples/s", None, note))
    return rows


def packed_rows(case: Case, seconds: float, repeats: int) -> list[Row]:
    """The switch that matters where texts differ in length."""
    return switch_rows(case, seconds, repeats, PACKED, LONGEST, FLICKR8K)


def small_vocabulary(case: Case) -> dict[str, Ours]:
    """The switch of a model whose vocabulary is that of its texts."""
    num = case.config["text_cfg"]["vocab_size"]
    name = f"vocabulary of {num:,}, beside CLIP's of {VOCABULARY:,}"
    return {name: Ours(vocabulary=VOCABULARY)} if num < VOCABULARY else {}


def process_rows(case: Case, seconds: float, repeats: int) -> list[Row]:
    """Two processes, each with half of a batch and of the threads, whose gradients meet in different ways."""
    names = {pair: f"{case.name}, two processes: {name}" for name, pair in MEETINGS.items()}
    if torch.cuda.is_available():
        here = RuntimeError("where there are CUDA devices, processes take one each")
        return [failed(name, here) for name in names.values()]
    rates, _, about = turns(TOGETHER, case, seconds, repeats)
    note = f"batch {case.batch}, {about}, {max(case.threads // 2, 1)} threads a process"
    return [
        faster(name, rates[side], rates[other], "samples/s", None, note)
        for (side, other), name in names.items()
    ]


def failed(name: str, error: RuntimeError) -> Row:
    """A row that says why it was not measured."""
    lines = str(error).strip().splitlines()
    # Torch's compiler goes on after its error, with hints that are always the same.
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Failed): ", line)]
    return Row(name, None, None, "samples/s", None, None, note=(named or lines)[-1])


def every_step(
    cases: list[Case], seconds: float, repeats: int
) -> Iterator[tuple[list[Row], dict[str, dict[str, float]]]]:
    """Steps of all models, one by one; on a GPU, one that fails (memory, say) leaves the others their rows."""
    for case in cases:
        try:
            yield step_rows(case, seconds, repeats)
        except RuntimeError as error:
            if case.device == "cpu":
                raise
            yield [failed(case.name, error)], {}


def main() -> None:
    """Measure and report."""
    parser = command_line()
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: all there are")
    what = ("step", "parts", "switches")
    parser.add_argument("--only", nargs="+", choices=what, default=what, help="default: all")
    parser.add_argument("--model", default="", help="models whose name has this in it")
    parser.add_argument("--json", type=Path, help="write JSON there; the table comes last")
    args = parser.parse_args()
    seconds, repeats = (0.1, 2) if args.quick else (1.5 if args.device == "cuda" else 4.0, 5)
    has_gpu = torch.cuda.is_available()
    of_cpu = [] if args.device == "cuda" else cpu_cases(quick=args.quick)
    of_gpu = gpu_cases(quick=args.quick) if (has_gpu and args.device != "cpu") or args.quick else []
    of_cpu, of_gpu = ([x for x in cases if args.model in x.name] for cases in (of_cpu, of_gpu))
    on_gpu = [case for case in of_gpu if case.device == "cuda"]
    rows: list[Row] = []
    profiles: dict[str, dict[str, float]] = {}

    def keep(more: list[Row], of_case: Mapping[str, dict[str, float]] | None = None) -> None:
        rows.extend(more)
        profiles.update(of_case or {})
        if args.json is not None:
            args.json.write_text(as_json("train_step", rows, profiles) + "\n")

    if "step" in args.only:
        for found in every_step([*of_cpu, *of_gpu], seconds, repeats):
            keep(*found)
    if "parts" in args.only:
        for case in [*of_cpu[:2], *on_gpu[:1]]:
            keep(part_rows(case, seconds, repeats))
    if "switches" in args.only:
        for case in of_cpu:
            keep(switch_rows(case, seconds, repeats, {**ON, **ON_CPU, **small_vocabulary(case)}))
            keep(packed_rows(case, seconds, repeats))
        for case in of_cpu[:1]:
            keep(process_rows(case, seconds, repeats))
        long = long_case(quick=args.quick)
        if args.device != "cuda" and args.model in long.name:
            attention = {ATTENTION: ON_CPU[ATTENTION]}
            keep(switch_rows(long, seconds, repeats, attention, long.longest))
        for case in on_gpu[:1]:
            keep(switch_rows(case, seconds, repeats, ON))
            keep(packed_rows(case, seconds, repeats))
        off = {name: OFF[name] for name in OFF if not (args.quick and name == "compile")}
        for case in of_cpu[:2][-1:]:  # compiling takes minutes
            keep(switch_rows(case, seconds, repeats, off))
        for case in on_gpu[:1]:
            keep(switch_rows(case, seconds, repeats, {**off, **OFF_ON_GPU}))
    if not has_gpu:
        name = "cuda: B/16 (I50,T16) and full, L/14, MoE L/14, beside open_clip; MFU"
        rows.append(Row(name, None, None, "samples/s", None, None, note="no CUDA device"))
    report("train_step", rows, profiles, args.json)


if __name__ == "__main__":
    main()
