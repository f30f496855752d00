"""Text of a batch: reduction against open_clip's syntax tokenizer, and drawing from an index of ten million rows.

    NLTK_DATA=... [REALDATA=...] python benchmarks/text_reduction.py [--quick]

Captions are those of Flickr8k where REALDATA is set, else of the built-in generator. open_clip's tokenizer downloads
nltk's models at first use; here its downloads are switched off, the tagger comes from NLTK_DATA, and where the sentence
splitter `punkt_tab` is not there either, sentences are not split, which saves it work. The big index is the small one
repeated; it is opened in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipgraft.config import ConfigError
from clipgraft.data.corpus import write_tokens
from clipgraft.data.draws import as_uniform, draw_bits
from clipgraft.data.shapes import draw_sample
from clipgraft.data.tokens import Tokens
from clipgraft.data.words import load_tagger
from clipgraft.reductions import SyntaxText

ROOT = Path(__file__).resolve().parent.parent
TEXT_LENGTH, BATCH = 8, 4096
SYNTAX = SyntaxText(kind="syntax")
REACH_RATIO, REACH_SECONDS, REACH_BYTES, REACH_BATCH_SECONDS = 200, 2.0, 1e9, 0.020


def main() -> None:
    """Measure, print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller; writes no result")
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        print(json.dumps(draw_batches(args.draw)))
        return
    num_rows, num_captions = (1_000_000, 5_000) if args.quick else (10_000_000, 30_000)
    source, captions = read_captions(num_captions)
    with tempfile.TemporaryDirectory() as name:
        small, big = Path(name, "small"), Path(name, "big")
        for folder in (small, big):
            folder.mkdir()
        one_each = [[caption] for caption in captions]
        write_tokens(one_each, [["caption"]] * len(captions), "full", "textblob", "-", small / "tokens")  # fmt: skip
        rows = [compare_syntax(Tokens.open(small), captions, source, 3 if args.quick else 7)]
        repeat(small / "tokens", big / "tokens", num_rows)
        rows += measure_big(big, num_rows)
    report("text_reduction", rows, is_kept=not args.quick)


def compare_syntax(
    tokens: Tokens, captions: list[str], source: str, repeats: int
) -> dict[str, Any]:
    """Captions per second, ours from the index, theirs from the text, in turns."""
    row = {"name": f"batches of reduced text (syntax, T={TEXT_LENGTH}), {source}"}
    row |= {"unit": "captions/s", "target": REACH_RATIO, "limit_share": None}
    try:
        peer = open_clips_syntax()
    except ConfigError as error:
        return row | {"ours": None, "peer": None, "ratio": None, "why": str(error)}
    some = random.Random(0).sample(captions, min(500, len(captions)))
    batches = np.random.default_rng(0).integers(0, len(captions), (50, BATCH))
    ours, theirs = [], []
    for repeat_number in range(repeats + 1):
        mine = len(batches) * BATCH / seconds(
            lambda: [tokens.encode(batch, TEXT_LENGTH, SYNTAX) for batch in batches]
        )  # fmt: skip
        other = len(some) / seconds(lambda: [peer([text]) for text in some])
        if repeat_number:  # the first warms up
            ours.append(mine)
            theirs.append(other)
    return row | compared(ours, theirs)


def open_clips_syntax() -> Callable[[list[str]], Any]:
    """open_clip's SimpleTokenizer with its syntax mask, offline.

    Raises:
        ConfigError: if nltk has no tagger.
    """
    load_tagger("nltk")
    import nltk
    import open_clip.tokenizer

    open_clip.tokenizer._nltk_init = True
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        split = functools.partial(nltk.tokenize.word_tokenize, preserve_line=True)
        nltk.tokenize.word_tokenize = split
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        tokenizer = open_clip.tokenizer.SimpleTokenizer(
            context_length=TEXT_LENGTH, reduction_mask="syntax"
        )
    return tokenizer


def measure_big(index: Path, num_rows: int) -> list[dict[str, Any]]:
    """Opening an index of many rows, and batches of random rows from it."""
    command = [sys.executable, __file__, "--draw", str(index)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    drawn = json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout)
    size = f"{num_rows / 1e6:g} million rows"
    return [
        bound(f"open an index of {size}", [drawn["open_seconds"]], "s", REACH_SECONDS),
        bound(f"resident after {drawn['num_batches']} batches of {BATCH:,} from {size}", [drawn["resident"]], "bytes", REACH_BYTES),
        bound(f"batch of {BATCH:,} random labels and captions of {size}", drawn["batch_seconds"], "s", REACH_BATCH_SECONDS),
    ]  # fmt: skip


def draw_batches(index: Path, num_batches: int = 60) -> dict[str, Any]:
    """Open an index and its labels, and draw batches (in a process of its own)."""
    start = time.perf_counter()
    tokens = Tokens.open(index)
    labels = np.load(index / "labels.npy", mmap_mode="r")
    open_seconds = time.perf_counter() - start
    rng = np.random.default_rng(0)
    weights = {"caption": 1.0}
    batch_seconds = []
    for step in range(num_batches):
        rows_B = rng.integers(0, len(labels), BATCH)
        start = time.perf_counter()
        bits_B2 = draw_bits(0, rows_B, step, 2)
        caption_B = tokens.choose(rows_B, as_uniform(bits_B2[:, 0]), weights)
        tokens.encode(caption_B, TEXT_LENGTH, SYNTAX, bits_B2[:, 1])
        labels[rows_B]
        batch_seconds.append(time.perf_counter() - start)
    # VmHWM belongs to this process image; getrusage's maximum would be inherited from the parent.
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return {
        "open_seconds": open_seconds,
        "batch_seconds": batch_seconds[5:],
        "num_batches": num_batches,
        "resident": resident,
    }


def read_captions(count: int) -> tuple[str, list[str]]:
    """Where captions come from, and so many of them."""
    realdata = os.environ.get("REALDATA")
    if not realdata:
        drawn = (
            draw_sample(0, "train", i, image_size=8, num_captions=20) for i in range(count // 20)
        )
        return "captions of shapes", [caption for sample in drawn for caption in sample.captions]
    captions: list[str] = []
    for path in sorted(Path(realdata, "flickr8k").glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    captions += json.load(tar.extractfile(member))["captions"]
    return "Flickr8k", captions[:count]


def repeat(source: Path, target: Path, num_rows: int) -> None:
    """Write tokens of `num_rows` samples with one caption each, by repeating those of a small index."""
    target.mkdir()
    for name in ("tokens.json", "merges.txt.gz"):
        (target / name).write_bytes((source / name).read_bytes())
    offsets = np.load(source / "caption_offsets.npy")
    times = -(-num_rows // (len(offsets) - 1))
    for name in ("ids", "words", "frequency", "caption_kinds"):
        np.save(target / f"{name}.npy", np.tile(np.load(source / f"{name}.npy"), times))
    lengths = np.tile(np.diff(offsets), times)
    np.save(target / "caption_offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    np.save(target / "sample_offsets.npy", np.arange(len(lengths) + 1))
    np.save(target.parent / "labels.npy", np.arange(num_rows, dtype=np.int32) % 81)


# --- the table ----------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compared(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Medians, their spread, and the median ratio of repeats."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "ours": statistics.median(ours),
        "peer": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
    }


def bound(name: str, values: list[float], unit: str, limit: float) -> dict[str, Any]:
    """A row for something that must stay below a limit."""
    value = statistics.median(values)
    ratios = [limit / max(values), limit / min(values)]
    return {"name": name, "ours": value, "peer": limit, "unit": unit, "ratio": limit / value, "ratio_spread": ratios, "target": 1, "limit_share": None}  # fmt: skip


def report(name: str, rows: list[dict[str, Any]], is_kept: bool) -> None:
    """Print the table and, as the last line, the JSON; keep it in `benchmarks/results`."""
    for row in rows:
        if row["ratio"] is None:
            print(f"{row['name']:<70} not measured: {row['why']}")
        else:
            numbers = f"{row['ours']:>12.4g} against {row['peer']:>9.4g} {row['unit']:<10}"
            print(f"{row['name']:<70} {numbers} ratio {row['ratio']:.4g}, to reach {row['target']}")
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()  # fmt: skip
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}  # fmt: skip
    line = json.dumps({"name": name, "machine": machine, "commit": commit, "rows": rows})
    if is_kept:
        folder = ROOT / "benchmarks" / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(line + "\n")
    print(line)


def cpu_name() -> str:
    """The processor, as Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
