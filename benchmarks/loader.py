"""The loader beside open_clip's own pipeline: training images per second on one core, and what it takes in memory.

open_clip 3.3 reads webdataset tars, decodes with Pillow, and crops, resizes and normalises with torchvision; here the
same public pieces are put together in this process. Ours is the real `Loader` with one thread, text included, on
shards that the stage `shard` wrote. Batches of ours are uint8: normalising is the device's work, and is also measured.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import simplejpeg
import torch
import webdataset
from _common import Row, arguments, faster, one_core, rates, report, within  # first: sets threads
from _photos import write_photos
from open_clip.transform import image_transform

from clipgraft.cluster import cluster
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.labels import read_labels
from clipgraft.data.loader import Loader
from clipgraft.data.sampler import UniformBatches
from clipgraft.data.shards import Shards, write_shards
from clipgraft.data.tokens import Tokens
from clipgraft.models.build import normalize
from clipgraft.settings import ClusterJob, IndexJob, ShardJob
from clipgraft.sources import TarSource

SIZE, BATCH, TEXT_LENGTH = 112, 256, 16
USUAL, CLIPA = (0.9, 1.0), (0.4, 1.0)  # crop_scale: open_clip's own, and that of long runs
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MANY, DRAWN = 10_000_000, 4096


def prepare(folder: Path, num: int) -> str:
    """Photos, an index, and shards: stage-sized, as they came, and raw."""
    made_of = write_photos(folder / "photos", num)
    for stage in ("download", "index", "staged", "wide", "originals", "raw"):
        (folder / stage).mkdir()
    source = TarSource(kind="tars", tars=str(folder / "photos/*.tar"))
    download(source, folder / "download", 1)
    build_index(
        IndexJob(tokenize=True, drop_duplicates=False), folder / "download", folder / "index", 1
    )
    for name, settings in {
        "staged": ShardJob(image_size=SIZE, oversize=1.05),  # as the workflow makes them for USUAL
        "wide": ShardJob(image_size=SIZE, oversize=1.58),  # and for CLIPA
        "originals": ShardJob(image_size=SIZE, oversize=8),  # small enough: bytes are kept
        "raw": ShardJob(image_size=SIZE, oversize=1.58, format="raw"),
    }.items():
        write_shards(settings, folder / "index", folder / name, 1)
    return made_of


def ours(
    folder: Path,
    name: str,
    epochs: int = 4,
    with_normalize: bool = False,
    crop_scale: tuple[float, float] = USUAL,
):
    """Some epochs of our loader on a shard folder; returns a function that runs them."""
    shards, tokens = Shards.open(folder / name), Tokens.open(folder / "index")

    def work() -> int:
        sampler = UniformBatches(len(shards), BATCH, 0)
        loader = Loader(
            shards,
            tokens,
            sampler,
            image_size=SIZE,
            text_length=TEXT_LENGTH,
            crop_scale=crop_scale,
            seed=0,
            num_steps=epochs * sampler.num_batches,
        )
        count = 0
        for batch in loader:
            images = (
                normalize(batch.images_BCHW, MEAN, STD) if with_normalize else batch.images_BCHW
            )
            count += len(images)
        return count

    return work


def open_clips(folder: Path, pattern: str, crop_scale: tuple[float, float] = USUAL):
    """An epoch of open_clip's pipeline on tars."""
    transform = image_transform(
        SIZE, is_train=True, mean=MEAN, std=STD, aug_cfg={"scale": crop_scale}
    )
    tars = sorted(str(path) for path in folder.glob(pattern))

    def work() -> int:
        dataset = webdataset.DataPipeline(
            webdataset.SimpleShardList(tars),
            webdataset.tarfile_to_samples(),
            webdataset.decode("pilrgb"),
            webdataset.rename(image="jpg;png;jpeg;webp"),
            webdataset.map_dict(image=transform),
            webdataset.to_tuple("image"),
            webdataset.batched(BATCH, partial=False),
        )
        return sum(len(images) for (images,) in dataset)

    return work


def bare(folder: Path, name: str):
    """Decoding the same JPEGs, from memory, and nothing else."""
    shards = Shards.open(folder / name)
    data = [shards.jpeg(row) for row in range(len(shards))]

    def work() -> int:
        for each in 4 * data:
            simplejpeg.decode_jpeg(each)
        return 4 * len(data)

    return work


def speed(folder: Path, repeats: int, made_of: str) -> list[Row]:
    """Rates of all sides, in turns."""
    measured = rates(
        {
            "bare": bare(folder, "staged"),
            "bare wide": bare(folder, "wide"),
            "staged": ours(folder, "staged"),
            "open_clip": open_clips(folder, "photos/*.tar"),
            "originals": ours(folder, "originals"),
            "normalized": ours(folder, "staged", with_normalize=True),
            "wide": ours(folder, "wide", crop_scale=CLIPA),
            "open_clip wide": open_clips(folder, "photos/*.tar", crop_scale=CLIPA),
            "raw": ours(folder, "raw"),
            "open_clip staged": open_clips(folder, "staged/*.tar"),
        },
        repeats,
    )
    peer, unit = measured["open_clip"], "images/s"
    shares = [
        faster("share of bare decoding", measured["staged"], measured["bare"], unit, 0.75),
        faster("the same of 40 % and more", measured["wide"], measured["bare wide"], unit, 0.75),
    ]
    wide = measured["wide"], measured["open_clip wide"]
    bound = faster("bound", measured["bare wide"], measured["open_clip wide"], unit, None).ratio
    return [
        faster(
            "stage-sized shards, crops of 90 % and more",
            measured["staged"],
            peer,
            unit,
            15,
            made_of,
        ),
        faster(
            "stage-sized shards, crops of 40 % and more",
            *wide,
            unit,
            15,
            f"at 1.58 bare decoding alone is {bound:.1f} x the peer",
        ),
        faster("straight from the originals", measured["originals"], peer, unit, 3.5),
        *(Row(**{**vars(share), "limit_share": share.ratio}) for share in shares),
        faster("stage-sized, normalised on the CPU", measured["normalized"], peer, unit, None),
        faster("raw shards", measured["raw"], peer, unit, None),
        faster(
            "both on the stage-sized tars",
            measured["staged"],
            measured["open_clip staged"],
            unit,
            None,
        ),
    ]


def memory(folder: Path) -> Row:
    """Resident memory after the fifth epoch over that after the first."""
    process = psutil.Process()
    work = ours(folder, "staged", epochs=1)
    resident = []
    for _ in range(5):
        work()
        resident.append(process.memory_info().rss)
    growth = resident[-1] / resident[0]
    return within("memory of 5 epochs, last over first", [growth], 1.02, "ratio")


def many_rows(folder: Path, repeats: int) -> list[Row]:
    """Opening the shards and labels of ten million rows, and drawing a batch of them."""
    shard, labelled = write_many(folder, MANY)
    opened, drawn, process = [], [], psutil.Process()
    before = process.memory_info().rss
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        started = time.perf_counter()
        shards = Shards.open(shard)
        labels = read_labels(labelled, shards.samples_id)
        opened.append(time.perf_counter() - started)
        rows = rng.integers(0, MANY, DRAWN)
        started = time.perf_counter()
        assert len(shards.sizes(rows)[0]) == len(labels[rows]) == DRAWN
        drawn.append((time.perf_counter() - started) * 1000)
    grown = (process.memory_info().rss - before) / 1e9
    sampler = UniformBatches(MANY, DRAWN, 0)
    started = time.perf_counter()
    sampler.batch(0)
    order = time.perf_counter() - started
    return [
        within("opening 10 million rows of shards and labels", opened, 2, "s"),
        within("memory of that", [max(grown, 1e-3)], 1, "GB"),
        within("4,096 random rows of places and labels", drawn, 20, "ms"),
        Row(
            "the order of an epoch of 10 million rows",
            order,
            None,
            "s",
            None,
            None,
            note="once per epoch",
        ),
    ]


def write_many(folder: Path, num: int) -> tuple[Path, Path]:
    """Shards and labels of `num` rows: the rows that the stages wrote of `prepare`'s photos, again and again.

    Returns:
        The folder of the shards, and that of the labels.
    """
    shard, labelled, embed = (folder / name for name in ("many", "labelled", "embed"))
    shutil.copytree(folder / "staged", shard)
    repeat_rows(shard / "offsets.npy", num)
    samples_id, rng = Shards.open(shard).samples_id, np.random.default_rng(0)
    for each in (labelled, embed):
        each.mkdir()
    for side in ("image", "text"):
        points_ND = rng.standard_normal((len(np.load(folder / "staged/offsets.npy")), 16))
        points_ND /= np.linalg.norm(points_ND, axis=1, keepdims=True)
        np.save(embed / f"{side}.npy", points_ND.astype(np.float16))
    (embed / "embed.json").write_text(json.dumps({"samples_id": samples_id}))
    cluster(ClusterJob(seed=0), embed, None, labelled)
    repeat_rows(labelled / "labels.npy", num)
    return shard, labelled


def repeat_rows(file: Path, num: int) -> None:
    """Make an array `num` rows long by repeating the rows that it has, whatever they are."""
    np.save(file, np.resize(np.load(file), num))


def main() -> None:
    """Measure and report."""
    quick = arguments().quick
    one_core()
    torch.set_num_threads(1)
    num, repeats = (512, 3) if quick else (2048, 7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_of = prepare(folder, num)
        flat = memory(folder)  # first: memory that is there already would hide growth
        rows = [*speed(folder, repeats, made_of), flat]
        rows += many_rows(folder, repeats)
    report("loader", rows)


if __name__ == "__main__":
    main()
