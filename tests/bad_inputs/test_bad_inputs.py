"""Bad inputs through download, index and shard: all accounted for, nothing wrong accepted, no neighbour lost.

A good image stands before each bad one, so that a reader that loses its place, or gives up, is found out.
"""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import corpus
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_server import serve
from PIL import Image

from clipgraft.config import ConfigError
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.samples import Samples
from clipgraft.data.shards import write_shards
from clipgraft.settings import IndexJob, ShardJob
from clipgraft.sources import OneSource, TarSource, UrlSource

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

IMAGES, CAPTIONS, TARS = corpus.images(), corpus.captions(), corpus.tars()
TABLES, URLS = corpus.tables(), corpus.urls()


@dataclass
class Campaign:
    """What came of a source: fate of each sample, and of the accepted ones captions and stored pictures.

    Where a key came twice, both fates stand in one line.
    """

    fates: dict[str, str]
    captions: dict[str, list[str]]
    pictures: dict[str, np.ndarray]


def run(source: OneSource, folder: Path) -> Campaign:
    """Download, index and shard a source."""
    for stage in ("download", "index", "shard"):
        (folder / stage).mkdir(parents=True)
    download(source, folder / "download", 1)
    build_index(IndexJob(tokenize=True), folder / "download", folder / "index", 1)
    write_shards(ShardJob(image_size=256), folder / "index", folder / "shard", 1)
    samples = Samples.open(folder / "index")
    reasons = {uid: ["ok"] for uid in samples.uids()}
    for row in pq.read_table(folder / "index/rejects.parquet").to_pylist():
        reasons.setdefault(row["uid"], []).append(row["reason"])
    for row in pq.read_table(folder / "download/outcomes.parquet").to_pylist():
        if row["status"] != "ok":
            assert row["key"] not in reasons and row["message"]
            reason = row["message"].partition(":")[0]
            known = ("undecodable", "truncated", "too many pixels")
            reasons[row["key"]] = [reason if reason in known else "failed"]
    fates = {uid: " and ".join(sorted(of)) for uid, of in reasons.items()}
    stored = read_tars(folder / "shard")
    assert [json.loads(each)["uid"] for each in stored[".json"]] == samples.uids()
    pictures = {}
    for row, (uid, data) in enumerate(zip(samples.uids(), stored[".jpg"], strict=True)):
        with Image.open(io.BytesIO(data)) as image:  # as any other program would read it
            assert image.format == "JPEG"
            pictures[uid] = np.asarray(image.convert("RGB"), int)
        ours = np.asarray(samples.image(row), int)
        assert ours.shape == pictures[uid].shape and np.abs(ours - pictures[uid]).mean() < 4
    captions = dict(zip(samples.uids(), samples.all_captions(), strict=True))
    return Campaign(fates, captions, pictures)


def read_tars(folder: Path) -> dict[str, list[bytes]]:
    """Contents by extension, in order."""
    files: dict[str, list[bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                suffix = Path(member.name).suffix
                files.setdefault(suffix, []).append(tar.extractfile(member).read())
    return files


def wrong_fates(fates: Mapping[str, str], expected: Mapping[str, str]) -> dict[str, tuple]:
    """Where what became of a sample is not what should have."""
    return {
        key: (fates.get(key), expected.get(key))
        for key in {**fates, **expected}
        if fates.get(key) is None or fates[key] not in expected.get(key, "").split("|")
    }


def looks_like(picture: np.ndarray, pixels: np.ndarray) -> bool:
    return picture.shape == pixels.shape and np.abs(picture - pixels.astype(int)).mean() < 4


def check_pictures(campaign: Campaign, key_of: Mapping[str, str]) -> None:
    for image in IMAGES:
        if image.pixels is not None:
            assert looks_like(campaign.pictures[key_of[image.name]], image.pixels), image.name


def test_there_are_many_kinds_and_they_differ():
    kinds = [f"image {each.name}" for each in IMAGES] + [f"url {each.name}" for each in URLS]
    kinds += [f"caption {each.name}" for each in CAPTIONS] + [f"tar {each.name}" for each in TARS]
    kinds += [f"table {each.name}" for each in TABLES]
    assert len(kinds) > 120 and max(Counter(kinds).values()) == 1
    assert max(Counter(each.data for each in IMAGES).values()) == 1
    shown = [each.pixels for each in IMAGES if each.pixels is not None]
    alike = [
        (i, j)
        for i, one in enumerate(shown)
        for j, two in enumerate(shown)
        if i < j and looks_like(one.astype(int), two)
    ]
    assert alike == []  # so that no picture passes for another


def test_images_and_captions_in_tars(tmp_path):
    files, expected = {}, {}
    for number, image in enumerate(IMAGES):
        expected |= {f"good-{number}": "ok", image.name: image.fate}
        files |= {f"good-{number}.jpg": corpus.good_jpeg(number), f"good-{number}.txt": b"good"}
        files |= {f"{image.name}.{image.suffix}": image.data, f"{image.name}.txt": b"odd"}
    for number, caption in enumerate(CAPTIONS, len(IMAGES)):
        key = f"caption-{caption.name}"
        expected |= {f"good-{number}": "ok", key: caption.fate}
        files |= {f"good-{number}.jpg": corpus.good_jpeg(number), f"good-{number}.txt": b"good"}
        files[f"{key}.jpg"] = corpus.good_jpeg(300 + number)
        files |= {f"{key}.{extension}": data for extension, data in caption.files.items()}
    (tmp_path / "in.tar").write_bytes(corpus.tar(files))
    campaign = run(TarSource(kind="tars", tars=str(tmp_path / "in.tar")), tmp_path / "out")
    assert wrong_fates(campaign.fates, expected) == {}
    check_pictures(campaign, {image.name: image.name for image in IMAGES})
    for number in range(len(IMAGES) + len(CAPTIONS)):
        pixels = corpus.picture(10_000 + number)
        assert looks_like(campaign.pictures[f"good-{number}"], pixels)
    for caption in CAPTIONS:
        if campaign.fates[f"caption-{caption.name}"] == "ok":
            (text,) = campaign.captions[f"caption-{caption.name}"]
            assert caption.caption in text and text == " ".join(text.split())
            assert not {"\0", "\ufeff"} & set(text)


def test_tables_answers_and_images_from_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "secret.jpg").write_bytes(corpus.good_jpeg(860))
    local = (tmp_path / "secret.jpg").as_uri()
    with serve({f"/image/{image.name}": image.data for image in IMAGES}) as site:
        # Odd tables come first, by name; the last one asks for everything bad, with a good row before each.
        tables = sorted(corpus.readable_tables(site).items())
        texts = [text for _, (_, captions) in tables for text in captions]
        expected = {
            f"{row:09d}": "ok" if text else "failed|no caption|empty caption"
            for row, text in enumerate(texts)
        }
        urls = [(f"{site}/image/{image.name}", image.fate, image.name) for image in IMAGES]
        for each in URLS:
            url = each.url and each.url.replace("{site}", site).replace("{local}", local)
            url = url and url.replace("{SITE}", site.replace("http", "HTTP"))
            urls.append((url, each.fate, each.name))
        rows, key_of = [], {}
        for number, (url, fate, name) in enumerate(urls):
            key_of[f"good {number}"] = f"{len(texts) + len(rows):09d}"
            key_of[name] = f"{len(texts) + len(rows) + 1:09d}"
            expected |= {key_of[f"good {number}"]: "ok", key_of[name]: fate}
            rows += [(f"{site}/good/{number}.jpg", f"good {number}"), (url, name)]
        columns = {"url": [url for url, _ in rows], "caption": [text for _, text in rows]}
        table = pa.table({name: pa.array(of, pa.string()) for name, of in columns.items()})
        (tmp_path / "tables").mkdir()
        for name, (data, _) in tables:
            (tmp_path / "tables" / name).write_bytes(data)
        pq.write_table(table, tmp_path / "tables/z.parquet")
        source = UrlSource(
            kind="urls",
            table=str(tmp_path / "tables/*"),
            timeout_seconds=1,
            min_success=0.1,
            allow_private_addresses=True,
        )
        campaign = run(source, tmp_path / "out")
    names = {key: name for name, key in key_of.items()}
    wrong = wrong_fates(campaign.fates, expected)
    assert {names.get(key, key): fates for key, fates in wrong.items()} == {}
    check_pictures(campaign, key_of)
    for number in range(len(urls)):
        key = key_of[f"good {number}"]
        assert looks_like(campaign.pictures[key], corpus.picture(10_000 + number))
        assert campaign.captions[key] == [f"good {number}"]
    found = [campaign.captions.get(f"{row:09d}", [None])[0] for row in range(len(texts))]
    assert found == [text and re.sub(r"\s+", " ", text) for text in texts]


@pytest.mark.parametrize("bad", TARS, ids=lambda bad: bad.name)
def test_tars(bad, tmp_path):
    good = corpus.tar({"good.jpg": corpus.good_jpeg(0), "good.txt": b"good"})
    (tmp_path / "good.tar").write_bytes(good)
    (tmp_path / f"{bad.name}.tar").write_bytes(bad.data)
    source = TarSource(kind="tars", tars=str(tmp_path / "*.tar"))
    if bad.error:
        with pytest.raises(ConfigError, match=bad.error) as caught:
            run(source, tmp_path / "out")
        assert f"{bad.name}.tar" in str(caught.value) and "Hint: " in str(caught.value)
    else:
        campaign = run(source, tmp_path / "out")
        assert wrong_fates(campaign.fates, {"good": "ok", **bad.fates}) == {}
        assert looks_like(campaign.pictures["good"], corpus.picture(10_000))


@pytest.mark.parametrize("bad", TABLES, ids=lambda bad: bad.name)
def test_tables_that_stop_the_job(bad, tmp_path):
    (tmp_path / bad.name).write_bytes(bad.data)
    with pytest.raises(ConfigError, match=bad.error) as caught:
        run(UrlSource(kind="urls", table=str(tmp_path / bad.name)), tmp_path / "out")
    assert bad.name in str(caught.value) and "Hint: " in str(caught.value)
