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
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import ROOT, Row, command_line, faster, rates, report, within  # first: sets threads

from clipgraft.config import ConfigError
from clipgraft.data.corpus import write_tokens
from clipgraft.data.draws import as_uniform, draw_bits
from clipgraft.data.shapes import draw_sample
from clipgraft.data.tokens import Tokens
from clipgraft.data.words import load_tagger
from clipgraft.reductions import SyntaxText

TEXT_LENGTH, BATCH = 8, 4096
SYNTAX = SyntaxText(kind="syntax")
REACH_RATIO, REACH_SECONDS, REACH_BYTES, REACH_BATCH_SECONDS = 200, 2.0, 1e9, 0.020


def main() -> None:
    """Measure and report."""
    parser = command_line()
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
        index(captions, small)
        rows = compare_syntax(small, captions, source, 3 if args.quick else 7)
        write_big(small, big, num_rows)
        rows += measure_big(big, num_rows)
    report("text_reduction", rows)


def index(captions: Sequence[str], folder: Path) -> int:
    """Split, tag and encode captions as the stage `index` does; returns how many there are."""
    kinds = [["caption"]] * len(captions)
    write_tokens([[text] for text in captions], kinds, "full", "textblob", "-", folder / "tokens")
    return len(captions)


def compare_syntax(folder: Path, captions: list[str], source: str, repeats: int) -> list[Row]:
    """Captions per second, ours from the index, theirs from the text, in turns."""
    name = f"batches of reduced text (syntax, T={TEXT_LENGTH}), {source}"
    try:
        peer = open_clips_syntax()
    except ConfigError as error:
        return [Row(name, None, None, "captions/s", None, REACH_RATIO, note=str(error))]
    tokens, numbers = Tokens.open(folder), itertools.count()
    some = random.Random(0).sample(captions, min(500, len(captions)))
    batches = np.random.default_rng(0).integers(0, len(captions), (50, BATCH))

    def ours() -> int:
        for batch in batches:
            tokens.encode(batch, TEXT_LENGTH, SYNTAX)
        return batches.size

    def peers() -> int:
        for text in some:
            peer([text])
        return len(some)

    def indexing() -> int:
        again = folder / f"again{next(numbers)}"
        again.mkdir()
        return index(captions, again)

    measured = rates({"ours": ours, "peer": peers, "indexing": indexing}, repeats)
    whole = [
        1 / (1 / reading + 1 / indexing)
        for reading, indexing in zip(measured["ours"], measured["indexing"], strict=True)
    ]
    unequal = (
        "not the same work: ours reads what was split, tagged and encoded once, when the data set was indexed; the peer "
        "tokenises and tags each text whenever it comes. The next row counts both"
    )
    once = (
        f"indexing: {np.median(measured['indexing']):,.0f} captions/s in one process, with textblob as a tagger; the "
        "peer has nltk's. One caption per sample, each read once: the ratio of a first epoch. An epoch draws one of a "
        "sample's captions, and all are indexed"
    )
    return [
        faster(name, measured["ours"], measured["peer"], "captions/s", REACH_RATIO, unequal),
        faster(f"{name}, indexing spread over one epoch", whole, measured["peer"], "captions/s", None, once),
    ]  # fmt: skip


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


def measure_big(folder: Path, num_rows: int) -> list[Row]:
    """Opening an index of many rows, and batches of random rows from it."""
    command = [sys.executable, __file__, "--draw", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    drawn = json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout)
    size = f"{num_rows / 1e6:g} million rows"
    return [
        within(f"open an index of {size}", [drawn["open_seconds"]], REACH_SECONDS, "s"),
        within(f"resident after {drawn['num_batches']} batches of {BATCH:,} from {size}", [drawn["resident"]], REACH_BYTES, "bytes"),
        within(f"batch of {BATCH:,} random labels and captions of {size}", drawn["batch_seconds"], REACH_BATCH_SECONDS, "s"),
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


def write_big(source: Path, target: Path, num_rows: int) -> None:
    """Write tokens and labels of at least `num_rows` samples, by repeating the tokens of a small index.

    Whatever files `index` writes are repeated: offsets go on, other arrays begin again, and what is no array stays.
    """
    (target / "tokens").mkdir()
    times = -(-num_rows // (len(np.load(source / "tokens/sample_offsets.npy")) - 1))
    for path in (source / "tokens").iterdir():
        copy = target / "tokens" / path.name
        if path.suffix != ".npy":
            shutil.copy(path, copy)
        elif path.stem.endswith("offsets"):
            lengths = np.tile(np.diff(np.load(path)), times)
            np.save(copy, np.concatenate([[0], np.cumsum(lengths)]))
        else:
            np.save(copy, np.tile(np.load(path), times))
    np.save(target / "labels.npy", np.arange(num_rows, dtype=np.int32) % 81)


if __name__ == "__main__":
    main()
