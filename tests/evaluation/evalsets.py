"""Small evaluation folders of every layout, with random pictures; made with nothing of clipgraft."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 16


def picture(seed: int) -> np.ndarray:
    """Coarse noise, uint8 [SIDE, SIDE, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    return [picture(1000 * seed + number) for number in range(count)]


def encoded(pixels: np.ndarray, kind: str = "PNG", **save) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **save)
    return buffer.getvalue()


def npy(values) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


def write_tars(folder: Path, samples: list[dict[str, bytes]], num_tars: int = 2) -> Path:
    """Samples as extension to bytes, in numbered tars."""
    test = folder / "test"
    test.mkdir(parents=True)
    (test / "nshards.txt").write_text(f"{num_tars}\n")
    rows = np.array_split(np.arange(len(samples)), num_tars)
    for number, own in enumerate(rows):
        with tarfile.open(test / f"{number}.tar", "w") as tar:
            for row in own:
                for extension, data in samples[row].items():
                    member = tarfile.TarInfo(f"s{row:07d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def write_classes(
    folder: Path, images, labels, classes, templates=("a {c}", "one {c} more"), metadata=None
) -> Path:
    """A data set for zero-shot classification; `metadata` is a row per sample."""
    samples = [
        {"cls": str(label).encode(), "webp": encoded(image, "WEBP", lossless=True)}
        for image, label in zip(images, labels, strict=True)
    ]
    for number, row in enumerate(metadata if metadata is not None else []):
        samples[number]["npy"] = npy(row)
    write_tars(folder, samples)
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    return folder


def write_captions(folder: Path, images, captions) -> Path:
    """A retrieval set as CLIP_benchmark exports it."""
    samples = [
        {"png": encoded(image), "txt": "\n".join(texts).encode()}
        for image, texts in zip(images, captions, strict=True)
    ]
    write_tars(folder, samples)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SCHEMA = {
    "image": IMAGE,
    "caption": pa.list_(pa.string()),
    "candidates": pa.list_(pa.string()),
    "candidate_images": pa.list_(IMAGE),
    "cue": pa.string(),
    "associations": pa.list_(pa.string()),
}


def write_arrow(path: Path, rows: list[dict], kind: str = "stream") -> Path:
    """A table as Hugging Face's library caches it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, pa.schema({name: SCHEMA[name] for name in rows[0]}))
    if kind == "parquet":
        pq.write_table(table, path)
        return path
    with pa.OSFile(str(path), "wb") as sink:
        writer = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind](sink, table.schema)
        writer.write_table(table, max_chunksize=3)
        writer.close()
    return path


def cell(pixels: np.ndarray) -> dict:
    return {"bytes": encoded(pixels), "path": None}


def write_mmvp(folder: Path, images, statements, kinds) -> Path:
    """MMVP-VLM as it is published: `kinds` is the attribute of each pair."""
    rows = []
    for number, (image, statement) in enumerate(zip(images, statements, strict=True), start=1):
        kind = kinds[(number - 1) // 2]
        path = folder / "MLLM_VLM Images" / kind / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image, "JPEG", quality=95))
        rows.append([number, kind, statement])
    with (folder / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["Question ID", "Type", "Statement"], *rows])
    return folder
