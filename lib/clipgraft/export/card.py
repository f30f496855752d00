"""A model card: what a model is, how it was made and what it can do, from the manifests of its job and those before.

Settings that could hold a path of this machine are not in it, only what kinds of data were used and how much of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipgraft.checkpoint import Loaded
from clipgraft.config import ConfigError
from clipgraft.provenance import MANIFEST, read_manifest

BEST = "best"  # folder beside the last weights of a training that was watched
Jobs = Sequence[tuple[Path, Mapping[str, Any]]]  # folder and manifest

_LIBRARY = {
    "open_clip": "open_clip",
    "onnx": "onnx",
    "hugging_face": "transformers",
    "vision": "transformers",
}
_NONE = "Nothing is known: its folder has no manifest, as no stage of clipgraft wrote it.\n"


def write_card(loaded: Loaded, folder: Path, out: Path, form: str, usage: str) -> None:
    """Write `README.md`.

    Args:
        loaded: the model.
        folder: its model folder, with the manifest beside it, or without one.
        out: folder of the exported model.
        form: what it was exported as.
        usage: how it is used there, in Markdown; FOLDER stands for the folder, capitals for sizes.
    """
    folder = folder.resolve()
    is_best = folder.name == BEST and not (folder / MANIFEST).is_file()
    chain = list(_chain(folder.parent if is_best else folder))
    name = chain[-1][1]["name"] if chain else folder.name
    if is_best and chain:
        name += f", the best of its looks, after {chain[-1][1]['best']['samples_seen']:,} samples"
    parts = [
        _head(form),
        f"# {name}\n",
        f"{_in_words(loaded)}\n",
        f"## Use\n\n{_filled(usage, loaded, out.name)}",
        f"## What it is\n\n{_table(_facts(loaded))}",
        f"## How it was made\n\n{_steps(chain) if chain else _NONE}",
        *_data(chain),
        *([] if is_best else _results(folder, chain)),  # those are of the last weights
        "## Limits\n\nIt knows what its training data show, and their biases. Nobody has checked it for uses in which a wrong "
        "answer does harm.\n",
    ]
    (out / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _head(form: str) -> str:
    library = _LIBRARY.get(form, "pytorch")
    task = "image-feature-extraction" if form == "vision" else "zero-shot-image-classification"
    return f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n- clip\n- clipgraft\n---\n"


def _in_words(loaded: Loaded) -> str:
    config, moe = loaded.spec["config"], loaded.spec["moe"]
    vision = config["vision_cfg"]
    kind = "A CLIP model"
    if moe:
        layers = f"{len(moe['image_layers'])} image and {len(moe['text_layers'])} text layers"
        kind = f"A CLIP model with {moe['num_experts']} experts in {layers}; each token goes through {moe['top_k']} of them"
    return (
        f"{kind}. Images of {vision['image_size']} pixels and texts of up to {config['text_cfg']['context_length']} tokens "
        f"become features of {config['embed_dim']} numbers. Trained with clipgraft."
    )


def _filled(usage: str, loaded: Loaded, name: str) -> str:
    config = loaded.spec["config"]
    vision = config["vision_cfg"]
    side, patch = vision["image_size"], vision.get("patch_size", 16)
    words = {
        "FOLDER": name,
        "NUM_PATCHES": (side // patch) ** 2,
        "WIDTH": vision.get("width", 768),
        "SIDE": side,
        "EMBED": config["embed_dim"],
        "LENGTH": config["text_cfg"]["context_length"],
        "TOP_K": (loaded.spec["moe"] or {"top_k": 1})["top_k"],
    }
    return re.sub("|".join(words), lambda found: str(words[found[0]]), usage)


def _facts(loaded: Loaded) -> list[tuple[str, str]]:
    config, preprocess = loaded.spec["config"], loaded.spec["preprocess"]
    vision, text = config["vision_cfg"], config["text_cfg"]
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    rows = [
        ("", ""),
        ("kind", loaded.spec["kind"]),
        ("parameters", f"{parameters:,}"),
        ("image tower", _short(vision)),
        ("text tower", _short(text)),
        ("activation", "QuickGELU" if config.get("quick_gelu") else "GELU"),
        ("vocabulary", f"{text['vocab_size']:,} tokens, {loaded.tokenizer.name}"),
        ("images", ", ".join(f"{key} {preprocess[key]}" for key in sorted(preprocess))),
        ("temperature", f"{float((-loaded.model.logit_scale).exp()):.4g}"),
        ("samples seen", f"{loaded.spec.get('samples_seen', 0):,}"),
    ]
    if loaded.spec["moe"]:
        rows.append(("experts", _short(loaded.spec["moe"])))
    return rows


def _short(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)


def _chain(folder: Path, known: set[Path] | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All jobs that led to a model, each once and inputs first, and that which made it; none without a manifest."""
    known = set() if known is None else known
    folder = folder.resolve()
    if folder in known or not (folder / MANIFEST).is_file():
        return
    known.add(folder)
    manifest = read_manifest(folder)
    for about in manifest["inputs"].values():
        yield from _chain(folder / about["manifest"].removesuffix(MANIFEST), known)
    yield folder, manifest


def _steps(chain: Jobs) -> str:
    rows = [("step", "version", "samples seen", "batch", "seed", "seconds", "commit")]
    for folder, manifest in chain:
        seen, settings = manifest.get("samples_seen"), manifest["settings"]
        rows.append(
            (
                str(manifest.get("name", manifest["stage"])),
                folder.name,
                f"{seen:,}" if seen else "",
                f"{settings['batch_size']:,}" if "batch_size" in settings else "",
                str(settings.get("seed", "")),
                f"{manifest.get('seconds', 0):,.0f}",
                str(manifest.get("git") or ""),
            )
        )
    packages = chain[-1][1].get("packages", {})
    return f"{_table(rows)}\nLast step with {_short(packages)}.\n"


def _data(chain: Jobs) -> list[str]:
    rows = [("data set", "kind", "samples", "captions", "rejected")]
    kinds = {
        folder: manifest["settings"].get("source", {}).get("kind", "")
        for folder, manifest in chain
        if manifest["stage"] == "download"
    }
    for folder, manifest in chain:
        if manifest["stage"] == "index":
            sources = [
                kinds.get((folder / about["manifest"].removesuffix(MANIFEST)).resolve(), "")
                for about in manifest["inputs"].values()
            ]
            rows.append(
                (
                    manifest["name"].partition("/")[2],
                    ", ".join(sorted({source for source in sources if source})),
                    f"{manifest.get('num_samples', 0):,}",
                    f"{manifest.get('num_captions', 0):,}",
                    f"{sum(manifest.get('rejected', {}).values()):,}",
                )
            )
    return [f"## Data\n\n{_table(rows)}"] if len(rows) > 1 else []


def _results(folder: Path, chain: Jobs) -> list[str]:
    """Results of this very model in the store that it lies in, and names of those from before it was made anew."""
    if not chain:
        return []
    own, store = chain[-1][1]["id"], folder.resolve().parent.parent
    rows: list[tuple[str, ...]] = [("task", "metric", "per cent", "by chance")]
    before = set()
    for path in sorted(store.glob(f"evaluate/*/{MANIFEST}")):
        try:
            manifest = read_manifest(path)
        except ConfigError:
            continue  # being written
        # The models of an ensemble have other names among the inputs.
        model, settings = manifest["inputs"].get("model"), manifest["settings"]
        if model is None or settings.get("untrained") is not None:
            continue
        task = str(settings.get("task") or settings["evalset"])
        if model["id"] != own and (path.parent / model["manifest"]).resolve() == folder / MANIFEST:
            before.add(task)
        if model["id"] == own:
            by_chance = _by_chance(path.with_name("result.json"))
            for name, value in manifest.get("metrics", {}).items():
                guess = by_chance.get(name)
                shown = "" if guess is None else f"{100 * guess:.2f}"
                rows.append((task, name, f"{100 * value:.2f}", shown))
    parts = [_table(rows)] if len(rows) > 1 else []
    if missing := sorted(before - {task for task, *_ in rows}):
        parts.append(f"Not evaluated since the model was made anew: {', '.join(missing)}.\n")
    return ["## Results\n\n" + "\n".join(parts)] if parts else []


def _by_chance(path: Path) -> dict[str, float]:
    """What guessing would give, by the names of metrics in manifests; of what `result.json` says it of."""
    result = json.loads(path.read_text()) if path.is_file() else {}
    found = dict((result.get("retrieval") or {}).get("chance", {}))
    for end, part in (("acc1", "zero_shot"), ("probe", "probe"), ("knn", "knn")):
        found |= {
            f"{name}_{end}": about["chance"]
            for name, about in (result.get(part) or {}).items()
            if "chance" in about
        }
    for names, about in (result.get("given") or {}).items():
        found[f"given {names}: R@1"] = about["chance"]["mean_R@1"]
    if (
        result.get("main_metric") and result["chance"] is not None
    ):  # of a task of an evaluation folder
        found[result["main_metric"]] = result["chance"]
    return found


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    """A bar would end it, and so would a line."""
    return " ".join(text.replace("|", "\\|").split())
