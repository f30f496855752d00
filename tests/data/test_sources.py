"""Each form of data, from the form in which people have it to the captions and labels of the index."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pictures import encoded, jpeg, write_tar
from PIL import Image
from pydantic import TypeAdapter
from server import Site

from clipgraft.config import ConfigError
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.outcomes import read_outcomes
from clipgraft.data.samples import Samples
from clipgraft.data.sources import tables
from clipgraft.data.sources.annotations import first_sentence
from clipgraft.data.sources.tables import read_tables
from clipgraft.local_files import files_below, listing
from clipgraft.settings import IndexJob, IndexSettings
from clipgraft.sources import SOURCE_KINDS, OneSource, Source, UrlSource


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site()
    for number in range(6):
        site.files[f"/{number}.jpg"] = jpeg(seed=number)
    yield site
    site.close()


def downloaded(base: Path, source: dict, name="download") -> Path:
    out = base / name
    out.mkdir()
    download(TypeAdapter(OneSource).validate_python(source), out, 1)
    return out


def indexed(base: Path, source: dict, tokenize=True) -> Samples:
    out, index = downloaded(base, source), base / "index"
    index.mkdir()
    build_index(IndexJob(tokenize=tokenize, drop_duplicates=False), out, index, 1)
    return Samples.open(index)


def captions_of(samples: Samples) -> dict:
    """uid -> pairs of kind and caption."""
    rows = zip(samples.uids(), samples.all_caption_kinds(), samples.all_captions(), strict=True)
    return {uid: list(zip(kinds, texts, strict=True)) for uid, kinds, texts in rows}


def classes_of(samples: Samples) -> dict:
    names = [*samples.label_names["class"], None]
    rows = zip(samples.uids(), samples.labels("class"), strict=True)
    return {uid: names[number] for uid, number in rows}


def urls(table: Path, **settings) -> dict:
    settings = {"min_success": 0, "retries": 0, "allow_private_addresses": True, **settings}
    return {"kind": "urls", "table": str(table), **settings}


def messages(folder: Path) -> dict:
    return {each.key: each.message for each in read_outcomes(folder / "outcomes.parquet")}


# --- tables of URLs -------------------------------------------------------------------------------


def test_several_caption_columns_are_kinds_and_other_columns_stay_in_the_json(site, tmp_path):
    # The columns of Recap-DataComp.
    table = {
        "url": [f"{site.address}/0.jpg", f"{site.address}/1.jpg", f"{site.address}/2.jpg"],
        "org_caption": ["alt text", "", None],
        "re_caption": ["a longer text", "only this", " "],
        "key": ["000", "001", "002"],
        "sha256": ["ab", "cd", "ef"],
        "re_clip_score": [0.5, 0.25, None],
        "caption": ["no caption", "of this", "set"],
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    source = urls(tmp_path / "t.parquet", preset="recap_datacomp")
    assert captions_of(indexed(tmp_path, source)) == {
        "000000000": [("caption", "alt text"), ("recaption", "a longer text")],
        "000000001": [("recaption", "only this")],
    }
    rejects = pq.read_table(tmp_path / "index/rejects.parquet").to_pylist()
    assert [(row["uid"], row["reason"]) for row in rejects] == [("000000002", "empty caption")]
    with tarfile.open(tmp_path / "download/00000.tar") as tar:
        about = json.load(tar.extractfile("000000001.json"))
    assert about == {name: column[1] for name, column in table.items()}


def test_a_uid_column_names_the_samples(site, tmp_path):
    rows = {"uid": ["b" * 32, "a" * 32, None], "text": ["b", "a", "c"]}
    rows["url"] = [f"{site.address}/{number}.jpg" for number in range(3)]
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    samples = indexed(tmp_path, urls(tmp_path / "t.parquet", preset="datacomp"))
    assert captions_of(samples) == {
        "000000002": [("caption", "c")],
        "a" * 32: [("caption", "a")],
        "b" * 32: [("caption", "b")],
    }
    assert samples.image_bytes(1) == jpeg(seed=1)


@pytest.mark.parametrize("packing", ["", "gz", "zst"])
def test_conceptual_captions_have_no_header_and_quotes_that_open_nothing(site, packing, tmp_path):
    lines = f'"quoted at first\t{site.address}/0.jpg\n1e5\t{site.address}/1.jpg\nNA\t{site.address}/2.jpg\n'
    lines += f"a caption\twith a tab\t{site.address}/3.jpg\n"
    table = tmp_path / f"cc.tsv.{packing}".rstrip(".")
    pack = {"": bytes, "gz": gzip.compress, "zst": pa.Codec("zstd").compress}
    table.write_bytes(pack[packing](lines.encode()))
    samples = indexed(tmp_path, urls(table, preset="cc3m"))
    texts = [captions for captions in samples.all_captions()]
    assert texts == [['"quoted at first'], ["1e5"], ["NA"]]
    assert "3 columns, not 2" in messages(tmp_path / "download")["000000003"]


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_a_damaged_packed_table_is_named(packing, tmp_path):
    pack = {"gz": gzip, "bz2": bz2, "xz": lzma}[packing].compress
    whole = pack(b"url\tcaption\n" + b"".join(b"http://a/%d\tsome words\n" % i for i in range(9)))
    table = tmp_path / f"t.tsv.{packing}"
    for place in range(len(whole)):
        table.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with suppress(ConfigError):  # some bytes say nothing, such as the time
            read_tables(UrlSource(**urls(table)))
    table.write_bytes(whole[:-20] + bytes(10) + whole[-10:])
    with pytest.raises(ConfigError, match=rf"t\.tsv\.{packing} cannot be read as tsv"):
        read_tables(UrlSource(**urls(table)))


def test_a_header_that_there_is_after_all_is_no_row(site, tmp_path):
    (tmp_path / "t.tsv").write_text(f"url\tcaption\n{site.address}/0.jpg\tone\n")
    assert captions_of(indexed(tmp_path, urls(tmp_path / "t.tsv", preset="cc12m"))) == {
        "000000000": [("caption", "one")]
    }


def test_csv_cells_are_text_with_quotes_commas_and_newlines(site, tmp_path):
    (tmp_path / "t.csv").write_text(
        f'URL,TEXT,similarity\n{site.address}/0.jpg,"one, ""two""\nthree",0.3\n{site.address}/1.jpg,007,\n'
    )
    samples = indexed(tmp_path, urls(tmp_path / "t.csv", preset="laion"))
    assert samples.all_captions() == [['one, "two" three'], ["007"]]


@pytest.mark.parametrize(
    ("cells", "captions"),
    [
        (['"best day ever', 'says "stop"', "last"], ['"best day ever', 'says "stop"', "last"]),
        (['"he said ""hi""', '"all of it"', '""'], ['"he said ""hi""', '"all of it"', '""']),
        (['"a ""b"" c"', '"all of it"', 'no "quote'], ['a "b" c', "all of it", 'no "quote']),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_in_a_tsv_quotes_open_nothing_unless_all_are_of_whole_cells(cells, captions, end, tmp_path):
    for order in ("{1}\t{0}", "{0}\t{1}"):
        rows = [("url", "caption"), *((f"http://a/{cell[-1:]}", cell) for cell in cells)]
        table = "".join(order.format(*row) + end for row in rows)
        (tmp_path / "t.tsv").write_bytes(table.encode())
        read, bad = read_tables(UrlSource(**urls(tmp_path / "t.tsv")))
        assert read["caption"].to_pylist() == captions and not bad


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("columns", [None, ["url", "caption"]])
def test_a_line_that_is_no_row_is_told_once(kind, columns, tmp_path):
    cells = [["url", "caption"], ["http://a/0", "one"], ["http://a/1"], ["http://a/2", "two"]]
    end = {"csv": ",", "tsv": "\t"}[kind]
    path = tmp_path / f"t.{kind}"
    path.write_text("".join(end.join(row) + "\n" for row in cells[1 if columns else 0 :]))
    table, bad = read_tables(UrlSource(**urls(path, columns=columns, captions={"caption": "caption"})))  # fmt: skip
    assert table["caption"].to_pylist() == ["one", "two"]
    assert bad == ["1 columns, not 2: 'http://a/1'"]


def test_columns_of_views_are_those_of_their_texts(site, tmp_path):
    url, view = f"{site.address}/0.jpg", pa.string_view()
    table = pa.table(
        {"url": pa.array([url, None], view), "caption": pa.array(["one", "two"], view)}
    )
    table = table.append_column("raw", pa.array([b"\xff", b""], pa.binary_view()))
    pq.write_table(table, tmp_path / "t.parquet")
    assert indexed(tmp_path, urls(tmp_path / "t.parquet")).all_captions() == [["one"]]


def test_json_lines_may_hold_lists_and_broken_lines_are_told(site, tmp_path):
    rows = [
        {"url": f"{site.address}/0.jpg", "syn": ["one", "two"]},
        {"url": f"{site.address}/1.jpg", "syn": ["three"], "more": 1},
    ]
    lines = [json.dumps(rows[0]), "{broken", json.dumps(rows[1]), "[1]"]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = urls(tmp_path / "t.jsonl", captions={"synthetic": "syn"})
    assert captions_of(indexed(tmp_path, source)) == {
        "000000000": [("synthetic", "one"), ("synthetic", "two")],
        "000000001": [("synthetic", "three")],
    }
    told = messages(tmp_path / "download")
    assert "line 2 is no JSON" in told["000000002"] and "line 4" in told["000000003"]


def test_in_json_lines_texts_and_lists_go_together_and_what_is_missing_is_no_caption(
    site, tmp_path
):
    cells = ["one", ["two", "three"], None, float("nan"), [float("nan"), "four", 5]]
    rows = [
        {"url": f"{site.address}/{number}.jpg", "caption": cell}
        for number, cell in enumerate(cells)
    ]
    odd = [{}, [{}], 10**30, {"a": 10**30}, [1, "a"]]  # nobody reads them
    rows = [{**row, "meta": meta, "odd": [{}]} for row, meta in zip(rows, odd, strict=True)]
    rows[0] |= {"empty": {}, "long": 10**30}
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = indexed(tmp_path, urls(tmp_path / "t.jsonl"))
    assert samples.all_captions() == [["one"], ["two", "three"], ["four", "5"]]
    rejects = pq.read_table(tmp_path / "index/rejects.parquet").to_pylist()
    assert {row["reason"] for row in rejects} == {"empty caption"} and len(rejects) == 2


@pytest.mark.parametrize("cell", [{"en": "a dog"}, True, [{"raw": "a dog"}], [["a dog"]]])
@pytest.mark.parametrize("kind", ["urls", "tars", "parquet"])
def test_what_is_no_text_is_no_caption_and_is_named(kind, cell, tmp_path):
    captions = {"caption": "alt"}
    if kind == "tars":
        files = {"0.jpg": jpeg(), "0.json": {"alt": cell}, "1.jpg": jpeg(), "1.json": {"alt": "x"}}
        tar = write_tar(tmp_path / "x.tar", files)
        source = {"kind": "tars", "tars": str(tar), "captions": captions}
        told = messages(downloaded(tmp_path, source))
        assert "its .json: 'alt' holds a" in told["0"] and not told["1"]
        return
    if kind == "urls":
        source = urls(tmp_path / "t.jsonl", captions=captions)
        rows = [{"url": "http://a/b", "alt": "x"}, {"url": "http://a/b", "alt": cell}]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        source = {"kind": kind, "files": str(tmp_path / "t.parquet"), "captions": captions}
        pq.write_table(pa.table({"image": [jpeg()], "alt": [cell]}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"'alt' holds a \w+ where a caption is wanted"):
        downloaded(tmp_path, source)


def test_a_caption_that_is_missing_in_a_tar_or_a_parquet_file_is_none(tmp_path):
    files = {"0.jpg": jpeg(), "0.json": '{"alt": NaN, "title": "zero"}'}
    tar = write_tar(tmp_path / "x.tar", files)
    table = pa.table({"image": [jpeg()], "alt": [float("nan")], "title": ["zero"]})
    pq.write_table(table, tmp_path / "t.parquet")
    for kind, key, path in (("tars", "tars", tar), ("parquet", "files", tmp_path / "t.parquet")):
        source = {"kind": kind, key: str(path), "captions": {"alt": "alt", "title": "title"}}
        told = read_outcomes(downloaded(tmp_path, source, kind) / "outcomes.parquet")
        assert [each.captions for each in told] == [["zero"]]


def test_tables_are_several_files_with_different_columns_and_remote_ones_too(site, tmp_path):
    (tmp_path / "a.csv").write_text(f"url,caption\n{site.address}/0.jpg,one\n")
    remote = fsspec.filesystem("memory")
    with remote.open("/tables/b.csv.gz", "wb", compression="gzip") as file:
        file.write(f"caption,url,more\ntwo,{site.address}/1.jpg,x\n".encode())
    source = {**urls(""), "table": [str(tmp_path / "a.csv"), "memory://tables/*.csv.gz"]}
    try:
        assert indexed(tmp_path, source).all_captions() == [["one"], ["two"]]
    finally:
        remote.rm("/tables", recursive=True)


def test_a_table_may_have_more_in_its_lists_than_an_array_holds(tmp_path, monkeypatch):
    names = [str(tmp_path / f"{number}.parquet") for number in range(2)]
    full = pa.ListArray.from_arrays(pa.array([0, 2**31 - 1], pa.int32()), pa.nulls(2**31 - 1))
    for name in names:
        Path(name).touch()
    monkeypatch.setattr(
        tables, "_read_file", lambda name, *_: pa.table({"url": [name], "caption": full})
    )
    source = UrlSource(**urls(tmp_path / "*.parquet", captions={"caption": "caption"}))
    table, _ = read_tables(source)
    assert table["url"].to_pylist() == names and table["caption"].num_chunks == 2


def test_a_missing_header_is_recognised(tmp_path):
    (tmp_path / "t.csv").write_text("a cat,http://a/b.jpg\na dog,http://a/c.jpg\n")
    with pytest.raises(ConfigError, match=r"no header: name its columns with `columns"):
        downloaded(tmp_path, urls(tmp_path / "t.csv"))


def test_a_preset_is_the_default_of_its_columns_and_no_more():
    source = UrlSource(kind="urls", table="x", preset="laion", captions={"caption": "alt"})
    assert (source.url_column, source.captions) == ("URL", {"caption": "alt"})


def test_the_version_of_a_download_depends_on_columns_not_on_the_name_of_a_preset():
    by_name = UrlSource(kind="urls", table="x", preset="laion")
    spelled = UrlSource(kind="urls", table="x", url_column="URL", captions={"caption": "TEXT"})
    assert by_name.model_dump() == spelled.model_dump()
    assert UrlSource(**by_name.model_dump()).captions == {"caption": "TEXT"}


def test_every_example_of_the_users_guide_is_valid():
    guide = (Path(__file__).resolve().parents[2] / "workflow/docs/data.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)]
    sources = [
        TypeAdapter(Source).validate_python(source)
        for block in blocks
        for source in block.get("download", {}).values()
    ]
    assert all(block.keys() <= {"download", "index"} for block in blocks)
    assert [IndexSettings.model_validate(block["index"]) for block in blocks if "index" in block]
    assert {source.kind for source in sources} == SOURCE_KINDS - {"shapes"}


def test_the_users_guide_brings_a_table_of_file_names_into_a_folder(tmp_path):
    guide = (Path(__file__).resolve().parents[2] / "workflow/docs/data.md").read_text()
    code = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[0]
    (tmp_path / "photos/in").mkdir(parents=True)
    (tmp_path / "photos/in/a.jpg").write_bytes(jpeg())
    (tmp_path / "captions.csv").write_text(
        'filename,caption\nin/a.jpg,"one, two"\nin/a.jpg,three\n'
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    samples = indexed(tmp_path, {"kind": "folder", "folder": str(tmp_path / "photos")})
    assert captions_of(samples) == {"in/a": [("caption", "one, two"), ("caption", "three")]}


# --- folders --------------------------------------------------------------------------------------


def test_the_files_layout_of_img2dataset_is_a_folder(tmp_path):
    shard = tmp_path / "data" / "00000"
    shard.mkdir(parents=True)
    for key in ("000000000", "000000001", "000000002"):
        (shard / f"{key}.jpg").write_bytes(jpeg())
    (shard / "000000000.txt").write_text("of the text")
    (shard / "000000000.json").write_text(json.dumps({"caption": "of the JSON"}))
    (shard / "000000001.json").write_text(json.dumps({"caption": "of the JSON"}))
    (tmp_path / "data" / "00000_stats.json").write_text("{}")
    (tmp_path / "data" / "00000.parquet").write_bytes(b"")
    assert captions_of(indexed(tmp_path, {"kind": "folder", "folder": str(tmp_path / "data")})) == {
        "00000/000000000": [("caption", "of the text")],
        "00000/000000001": [("caption", "of the JSON")],
    }
    assert "no caption" in messages(tmp_path / "download")["00000/000000002"]


def class_folder(base: Path) -> dict:
    for name in ("n02084071/1.jpg", "n02084071/1.png", "tabby_cat/deep/er/2.JPG", "stray.jpg"):
        path = base / "classes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg() if name.lower().endswith("jpg") else encoded(_grey(), "PNG"))
    return {"kind": "class_folder", "folder": str(base / "classes")}


def _grey() -> Image.Image:
    return Image.open(io.BytesIO(jpeg())).convert("L")


def test_a_folder_per_class_gives_labels_and_captions(tmp_path):
    source = class_folder(tmp_path)
    source["class_names"] = {"n02084071": "dog"}
    source["templates"] = ["a photo of a {c}", "one {c} and another {c}"]
    samples = indexed(tmp_path, source)
    assert classes_of(samples) == {
        "n02084071/1.jpg": "dog",
        "n02084071/1.png": "dog",
        "tabby_cat/deep/er/2.JPG": "tabby cat",
    }
    assert samples.captions(0) == ["a photo of a dog", "one dog and another dog"]
    assert samples.captions(2) == ["a photo of a tabby cat", "one tabby cat and another tabby cat"]
    assert "in no folder" in messages(tmp_path / "download")["stray.jpg"]


def test_linked_folders_are_entered_once_each_and_a_loop_ends(tmp_path):
    kept, chosen = tmp_path / "kept", tmp_path / "chosen"
    for number, name in enumerate(("cat", "dog", "fox")):
        (kept / name / "deep").mkdir(parents=True)
        (kept / name / "deep" / "1.jpg").write_bytes(jpeg(seed=number))
    (chosen / "own").mkdir(parents=True)
    (chosen / "own" / "2.jpg").write_bytes(jpeg(seed=3))
    for name in ("cat", "dog"):
        (chosen / name).symlink_to(kept / name)
    (kept / "dog" / "up").symlink_to(chosen)
    (chosen / "also").symlink_to(chosen / "own")
    samples = indexed(tmp_path, {"kind": "class_folder", "folder": str(chosen)})
    assert classes_of(samples) == {
        "cat/deep/1.jpg": "cat",
        "dog/deep/1.jpg": "dog",
        "own/2.jpg": "own",
    }
    assert samples.image_bytes(1) == jpeg(seed=1)
    before = listing(str(chosen))
    (kept / "cat" / "deep" / "2.jpg").write_bytes(jpeg(seed=4))
    listing.cache_clear()
    assert before.startswith("3 files") and listing(str(chosen)).startswith("4 files")


def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(tmp_path, monkeypatch):
    closed = tmp_path / "photos" / "closed"
    closed.mkdir(parents=True)
    (tmp_path / "photos/a.jpg").write_bytes(jpeg())
    scandir = os.scandir

    def refusing(place):  # root, who may run tests, may read anything
        if str(place) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    message = (
        rf"{closed}' in the folder '{tmp_path}/photos' cannot be read: Permission denied. Hint"
    )
    for read in (files_below, lambda folder: listing(str(folder))):
        with pytest.raises(ConfigError, match=message):
            read(tmp_path / "photos")


def test_class_names_and_templates_that_cannot_be_meant_are_refused(tmp_path):
    source = class_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"no folder 'n02084072'.*did you mean"):
        downloaded(tmp_path, {**source, "class_names": {"n02084072": "dog"}})
    with pytest.raises(ValueError, match="templates"):
        TypeAdapter(OneSource).validate_python({**source, "templates": ["a photo"]})


# --- annotations ----------------------------------------------------------------------------------


def pictures(base: Path, *names: str) -> Path:
    for name in names:
        path = base / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())
    return base / "images"


def annotated(base: Path, kind: str, content, **settings) -> dict:
    (base / "a.json").write_text(json.dumps(content))
    files = {"annotations": str(base / "a.json"), "images": str(base / "images")}
    return {"kind": kind, **files, **settings}


def test_coco_captions_belong_to_their_images(tmp_path):
    pictures(tmp_path, "9.jpg", "7.jpg")
    content = {
        "images": [{"id": id, "file_name": f"{id}.jpg"} for id in (9, 7, 8)],
        "annotations": [
            {"image_id": image, "id": number, "caption": f"caption {number} of {image}"}
            for number, image in enumerate([9, 7, 9, 9, 7, 9, 9, 8, 5])
        ],
    }
    assert captions_of(indexed(tmp_path, annotated(tmp_path, "coco", content))) == {
        "7.jpg": [("caption", f"caption {number} of 7") for number in (1, 4)],
        "9.jpg": [("caption", f"caption {number} of 9") for number in (0, 2, 3, 5, 6)],
    }
    assert "no such file" in messages(tmp_path / "download")["8.jpg"]


def karpathy() -> dict:
    images = [
        {"filename": "1.jpg", "filepath": "train2014", "split": "train"},
        {"filename": "2.jpg", "filepath": "val2014", "split": "restval"},
        {"filename": "3.jpg", "filepath": "val2014", "split": "test"},
        {"filename": "4.jpg", "split": "train"},
    ]
    for image in images:
        image["sentences"] = [{"raw": f"{image['filename']} {n}", "tokens": []} for n in range(5)]
    return {"images": images, "dataset": "coco"}


def test_karpathys_splits_are_chosen_by_name(tmp_path):
    pictures(tmp_path, "train2014/1.jpg", "val2014/2.jpg", "val2014/3.jpg", "4.jpg")
    source = annotated(tmp_path, "coco", karpathy(), split=["train", "restval"])
    assert {uid: len(texts) for uid, texts in captions_of(indexed(tmp_path, source)).items()} == {
        "train2014/1.jpg": 5,
        "val2014/2.jpg": 5,
        "4.jpg": 5,
    }
    with pytest.raises(ConfigError, match=r"no split 'vall'.*train \(2\), restval \(1\)"):
        downloaded(tmp_path, annotated(tmp_path, "coco", karpathy(), split=["vall"]), "again")


def test_what_is_no_caption_file_is_told(tmp_path):
    pictures(tmp_path, "1.jpg")
    instances = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1}]}
    for content, words, settings in (
        (instances, "captions_", {}),
        ({"images": []}, "no list `images`", {}),
        ({**instances, "annotations": []}, "has no splits", {"split": ["train"]}),
        ({"images": [{"filename": "../a.json", "sentences": []}]}, "leads out of the folder", {}),
    ):
        with pytest.raises(ConfigError, match=words):
            downloaded(tmp_path, annotated(tmp_path, "coco", content, **settings), words[:3])


def test_sharegpt4v_has_a_long_and_a_short_caption(tmp_path):
    pictures(tmp_path, "coco/1.jpg", "coco/2.jpg")
    answer = 'The sign at the U.S. border says "Stop." A man, 1.80 m tall, waits. It rains.'
    content = [
        {
            "id": "1",
            "image": "coco/1.jpg",
            "conversations": [
                {"from": "human", "value": "What is this?\n<image>"},
                {"from": "gpt", "value": answer},
                {"from": "human", "value": "Really?"},
                {"from": "gpt", "value": "Yes."},
            ],
        },
        {"id": "2", "image": "coco/2.jpg", "conversations": [{"from": "gpt", "value": "One"}]},
        {"id": "3", "conversations": [{"from": "gpt", "value": "no picture"}]},
        {"id": "4", "image": "coco/4.jpg", "conversations": [{"from": "gpt", "value": "lost"}]},
    ]
    assert captions_of(indexed(tmp_path, annotated(tmp_path, "sharegpt4v", content))) == {
        "coco/1.jpg": [("long", answer), ("short", 'The sign at the U.S. border says "Stop."')],
        "coco/2.jpg": [("long", "One"), ("short", "One")],
    }
    told = messages(tmp_path / "download")
    assert told["entry 2"] == "the entry names no image" and "no such file" in told["coco/4.jpg"]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One. Two.", "One."),
        ("It is 3.5 m long. Two", "It is 3.5 m long."),
        ("Is it? Yes", "Is it?"),
        ("No end", "No end"),
        ("Line\none.\n\nLine two.", "Line\none."),
    ],
)
def test_the_first_sentence_ends_where_another_begins(text, first):
    assert first_sentence(text) == first


# --- parquet with image bytes ---------------------------------------------------------------------


def hugging_face_table(path: Path, rows: dict, features: dict) -> Path:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    types = {"image": image, "label": pa.int64(), "captions": pa.list_(pa.string())}
    arrays = {name: pa.array(values, types.get(name)) for name, values in rows.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(arrays).replace_schema_metadata(metadata), path)
    return path


def image(data: bytes | None) -> dict:
    return {"bytes": data, "path": "x.png"}


def test_class_names_of_a_hugging_face_data_set_come_from_its_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr("clipgraft.data.sources.parquet.SHARD", 2)  # several tars
    rows = {
        "image": [image(jpeg(seed=0)), image(encoded(_grey(), "PNG")), image(None), image(jpeg())],
        "label": [1, 0, 0, -1],
        "captions": [["one", "two", ""], ["three"], ["lost"], ["unlabelled"]],
    }
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    hugging_face_table(tmp_path / "t.parquet", rows, features)
    source = {"kind": "parquet", "files": str(tmp_path / "*.parquet"), "label_column": "label"}
    samples = indexed(tmp_path, {**source, "captions": {"human": "captions"}})
    first, second, third = "00000-00000000", "00000-00000001", "00000-00000003"
    assert classes_of(samples) == {first: "dog", second: "cat", third: None}
    assert captions_of(samples)[first] == [("human", "one"), ("human", "two")]
    assert samples.image_bytes(0) == jpeg(seed=0)
    assert "no image bytes" in messages(tmp_path / "download")["00000-00000002"]


def test_parquet_with_plain_bytes_and_names_as_labels_read_from_an_address(tmp_path):
    rows = {"jpg": [jpeg(), jpeg(seed=1)], "kind": ["dog", "cat"], "id": ["x", "y"]}
    remote = fsspec.filesystem("memory")
    with remote.open("/set/0.parquet", "wb") as file:
        pq.write_table(pa.table(rows), file)
    source = {"kind": "parquet", "files": "memory://set/0.parquet", "image_column": "jpg"}
    try:
        samples = indexed(
            tmp_path, {**source, "label_column": "kind", "uid_column": "id"}, tokenize=False
        )
    finally:
        remote.rm("/set", recursive=True)
    assert classes_of(samples) == {"x": "dog", "y": "cat"}
    assert samples.label_names == {"class": ["cat", "dog"]}


def test_numbers_without_names_and_missing_columns_are_told(tmp_path):
    hugging_face_table(tmp_path / "t.parquet", {"image": [image(jpeg())], "label": [5]}, {})
    source = {"kind": "parquet", "files": str(tmp_path / "t.parquet"), "label_column": "label"}
    with pytest.raises(ConfigError, match=r"class numbers, and the metadata no names.*`classes`"):
        downloaded(tmp_path, source)
    with pytest.raises(ConfigError, match=r"no column 'labels'.*image, label"):
        downloaded(tmp_path, {**source, "label_column": "labels"}, "2")
    with pytest.raises(ValueError, match="neither captions nor label_column"):
        TypeAdapter(OneSource).validate_python({"kind": "parquet", "files": "x"})
    (tmp_path / "names.txt").write_text("cat\ndog")
    downloaded(tmp_path, {**source, "classes": str(tmp_path / "names.txt")}, "3")
    assert "label 5: there are 2 classes" in messages(tmp_path / "3")["00000-00000000"]


@pytest.mark.parametrize(
    ("cell", "kind"),
    [("images/1.jpg", "string"), ([{"bytes": b"x"}], "list<"), ({"path": "x.jpg"}, "struct<path")],
)
def test_an_image_column_without_bytes_is_named_with_its_type(cell, kind, tmp_path):
    pq.write_table(pa.table({"image": [cell], "text": ["a"]}), tmp_path / "t.parquet")
    source = {"kind": "parquet", "files": str(tmp_path / "t.parquet")}
    with pytest.raises(ConfigError, match=rf"t\.parquet: column 'image' is of type {kind}"):
        downloaded(tmp_path, {**source, "captions": {"caption": "text"}})


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        ([1.0, 0.0, None], "cat dog", ["dog", "cat", None]),
        ([1.0, float("nan"), -1.0], "cat dog", ["dog", None, None]),
        ([True, False, None], "no yes", ["yes", "no", None]),
        ([True, False, None], None, ["True", "False", None]),
        (["dog", "cat", None], "cat dog", ["dog", "cat", None]),
    ],
)
def test_labels_are_numbers_truth_values_or_names(labels, names, classes, tmp_path):
    rows = {"image": [jpeg(seed=number) for number in range(3)], "label": labels}
    pq.write_table(pa.table({**rows, "text": ["a", "b", "c"]}), tmp_path / "t.parquet")
    source = {"kind": "parquet", "files": str(tmp_path / "t.parquet"), "label_column": "label"}
    if names:
        (tmp_path / "names.txt").write_text(names.replace(" ", "\n"))
        source["classes"] = str(tmp_path / "names.txt")
    samples = indexed(tmp_path, {**source, "captions": {"caption": "text"}})
    assert list(classes_of(samples).values()) == classes


@pytest.mark.parametrize("label", ["fox", 0.5])
def test_a_label_that_is_no_class_is_named(label, tmp_path):
    pq.write_table(pa.table({"image": [jpeg()], "label": [label]}), tmp_path / "t.parquet")
    (tmp_path / "names.txt").write_text("cat\ndog")
    source = {"kind": "parquet", "files": str(tmp_path / "t.parquet"), "label_column": "label"}
    with pytest.raises(ConfigError, match=rf"'label' has the label {label!r}, which is none of"):
        downloaded(tmp_path, {**source, "classes": str(tmp_path / "names.txt")})


def test_unpacked_files_are_kept_by_what_they_are_and_not_by_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr("clipgraft.data.sources.parquet.SHARD", 1)
    settings = {
        "kind": "parquet",
        "files": str(tmp_path / "*.parquet"),
        "captions": {"alt": "text"},
    }
    source, work = TypeAdapter(OneSource).validate_python(settings), tmp_path / "work"

    def write(name: str, *texts: str) -> None:
        rows = {"image": [jpeg(seed=len(text)) for text in texts], "text": texts}
        pq.write_table(pa.table(rows), tmp_path / name)

    def captions_after(name: str) -> list:
        (tmp_path / name).mkdir()
        download(source, tmp_path / name, 1, work)
        told = read_outcomes(tmp_path / name / "outcomes.parquet")
        assert sorted(path.name for path in (tmp_path / name).glob("*.tar")) == [
            each.file for each in told
        ]
        return [each.captions for each in told]

    write("b.parquet", "b", "b again")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ConfigError, match=r"c\.parquet"):
        captions_after("first")
    write("c.parquet", "c")
    write("a.parquet", "a")
    assert captions_after("repaired") == [["a"], ["b"], ["b again"], ["c"]]
    write("b.parquet", "another b")
    assert captions_after("replaced") == [["a"], ["another b"], ["c"]]
    (tmp_path / "c.parquet").unlink()
    assert captions_after("shorter") == [["a"], ["another b"]]

    def fail(*_):
        raise AssertionError("it was finished")

    monkeypatch.setattr("clipgraft.data.sources.parquet._open", fail)
    assert captions_after("unchanged") == [["a"], ["another b"]]


# --- tars -----------------------------------------------------------------------------------------


def test_captions_of_tars_are_taken_by_kind_and_names_from_the_json(tmp_path):
    files = {
        "a.jpg": jpeg(), "a.txt": "alt", "a.json": {"key": 7, "re": "recaption", "long": ["l1", "l2"]},
        "b.jpg": jpeg(), "b.json": {"key": "000000012", "re": ""}, "b.txt": "alone",
        "c.jpg": jpeg(), "c.txt": "no JSON",
        "d.jpg": jpeg(), "d.json": "{broken", "d.txt": "x",
    }  # fmt: skip
    tar = write_tar(tmp_path / "x.tar", files)
    source = {"kind": "tars", "tars": [str(tar)], "uid_key": "key"}
    source["captions"] = {"caption": "txt", "recaption": "re", "long": "long"}
    assert captions_of(indexed(tmp_path, source)) == {
        "000000012": [("caption", "alone")],
        "7": [("caption", "alt"), ("recaption", "recaption"), ("long", "l1"), ("long", "l2")],
    }
    told = messages(tmp_path / "download")
    assert "uid_key" in told["c"] and "cannot be read" in told["d"]


def test_a_kind_of_captions_that_no_sample_has_is_named_with_its_key(tmp_path, caplog):
    files = {"a.jpg": jpeg(), "a.json": {"re": "text"}, "b.jpg": jpeg(seed=1), "b.json": {}}
    tar = write_tar(tmp_path / "x.tar", files)
    source = {"kind": "tars", "tars": str(tar), "captions": {"caption": "re", "long": "lnog"}}
    assert captions_of(indexed(tmp_path, source)) == {"a": [("caption", "text")]}
    said = [line for line in caplog.messages if "captions." in line]
    assert len(said) == 1 and "captions.long = 'lnog': no sample has such a text. Hint: " in said[0]


def test_names_that_the_json_gives_are_never_changed(tmp_path):
    for number in range(2):
        files = {}
        for key, uid in (("a", "same"), ("b", f"other {number}")):
            files |= {f"{key}.jpg": jpeg(), f"{key}.txt": key, f"{key}.json": {"key": uid}}
        write_tar(tmp_path / f"{number}.tar", files)
    source = {"kind": "tars", "tars": str(tmp_path / "*.tar"), "uid_key": "key"}
    assert indexed(tmp_path, source).uids() == ["other 0", "other 1", "same"]
    rejects = pq.read_table(tmp_path / "index/rejects.parquet").to_pylist()
    assert [(row["uid"], row["reason"]) for row in rejects] == [("same", "repeated uid")]


def test_rows_that_name_the_same_image_are_captions_of_it_unless_it_is_another(tmp_path):
    files = {}
    for number, (seed, uid) in enumerate([(1, "x"), (1, "x"), (2, "x"), (3, "y"), (1, "x")]):
        about = {"id": uid, "caption": f"caption {min(number, 3)}"}
        files |= {f"{number}.jpg": jpeg(seed=seed), f"{number}.json": about}
    files |= {"5.jpg": "no picture", "5.json": {"id": "y", "caption": "lost"}}
    tar = write_tar(tmp_path / "x.tar", files)
    samples = indexed(tmp_path, {"kind": "tars", "tars": str(tar), "uid_key": "id"})
    assert captions_of(samples) == {
        "x": [("caption", f"caption {number}") for number in (0, 1, 3)],
        "y": [("caption", "caption 3")],
    }
    rejects = pq.read_table(tmp_path / "index/rejects.parquet").to_pylist()
    assert [(row["uid"], row["reason"], row["detail"].split(", ")[-1]) for row in rejects] == [
        ("x", "repeated uid", "which takes 1 caption"),
        ("x", "repeated uid", f"which is in {tar}"),
        ("x", "repeated uid", "which takes 1 caption"),
        ("y", "undecodable", rejects[3]["detail"]),
    ]


@pytest.mark.parametrize("folder", ["", "./", "photos/"])
def test_the_resource_forks_that_a_mac_packs_part_no_image_from_its_caption(folder, tmp_path):
    files = {".DS_Store": bytes(100)}
    for name, content in (
        ("0.jpg", jpeg()),
        ("0.txt", "zero"),
        ("1.jpg", jpeg()),
        ("1.txt", "one"),
    ):
        files |= {f"{folder}._{name}": b"\0\5\26\7" + bytes(60), f"{folder}{name}": content}
    tar = write_tar(tmp_path / "x.tar", files)
    samples = indexed(tmp_path, {"kind": "tars", "tars": str(tar)})
    assert samples.all_captions() == [["zero"], ["one"]]
    assert len(messages(tmp_path / "download")) == 2


def test_a_tar_may_have_any_name(tmp_path):
    names = ("a.TAR", "a.tar.0", "a.tar.1", "part-0")
    for number, name in enumerate(names):
        write_tar(tmp_path / name, {"0.jpg": jpeg(seed=number), "0.txt": name})
    tars = [str(tmp_path / name) for name in names]
    samples = indexed(tmp_path, {"kind": "tars", "tars": tars})
    assert captions_of(samples) == {f"{name}/0": [("caption", name)] for name in names}


def test_images_of_annotations_without_a_suffix_are_no_tars(tmp_path):
    pictures(tmp_path, "1", "2.jpg")
    content = {
        "images": [{"id": 1, "file_name": "1"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 2, "caption": "two"}],
    }
    assert indexed(tmp_path, annotated(tmp_path, "coco", content)).uids() == ["2.jpg"]


def test_tars_are_chosen_by_globs_braces_and_lists(tmp_path):
    for number in range(4):
        files = {f"{number}.jpg": jpeg(seed=number), f"{number}.txt": f"number {number}"}
        write_tar(tmp_path / f"x-{number:03d}.tar", files)
    tars = [str(tmp_path / "x-{000..001}.tar"), str(tmp_path / "x-*3.tar")]
    samples = indexed(tmp_path, {"kind": "tars", "tars": tars})
    assert samples.uids() == ["0", "1", "3"]


# --- several sources as one -----------------------------------------------------------------------


def test_a_mixed_data_set_remembers_sources_and_joins_classes(tmp_path):
    tar = write_tar(
        tmp_path / "x.tar",
        {"1.jpg": jpeg(seed=1), "1.cls": "1", "1.txt": "a wolf", "2.jpg": jpeg(), "2.cls": "0"},
    )
    (tmp_path / "classes.txt").write_text("dog\nwolf")
    (tmp_path / "results").mkdir()
    rows = {"image": [jpeg(seed=5)], "caption": ["packed"], "id": ["p"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    sources = {
        "packed": {
            "kind": "parquet",
            "files": str(tmp_path / "t.parquet"),
            "captions": {"alt": "caption"},
            "uid_column": "id",
        },
        "tars": {"kind": "tars", "tars": str(tar), "classes": str(tmp_path / "classes.txt")},
        "folders": class_folder(tmp_path),
    }
    folders = {
        name: downloaded(tmp_path / "results", source, name) for name, source in sources.items()
    }
    index = tmp_path / "index"
    index.mkdir()
    build_index(IndexJob(tokenize=True, drop_duplicates=False), folders, index, 1)
    samples = Samples.open(index)
    assert samples.label_names == {"class": ["dog", "wolf", "n02084071", "tabby cat"]}
    assert classes_of(samples)["tars/1"] == "wolf"
    assert classes_of(samples)["folders/tabby_cat/deep/er/2.JPG"] == "tabby cat"
    table = pq.read_table(index / "samples.parquet", columns=["uid", "source"])
    assert dict(zip(*table.to_pydict().values(), strict=True)) == {
        "folders/n02084071/1.jpg": "folders",
        "folders/n02084071/1.png": "folders",
        "folders/tabby_cat/deep/er/2.JPG": "folders",
        "packed/p": "packed",
        "tars/1": "tars",
    }
    assert captions_of(samples)["packed/p"] == [("alt", "packed")]
    assert samples.image_bytes(samples.uids().index("packed/p")) == jpeg(seed=5)
    assert samples.image_bytes(samples.uids().index("tars/1")) == jpeg(seed=1)


# --- text that is no text -------------------------------------------------------------------------


def test_broken_text_in_tables_becomes_replacement_characters_and_its_neighbours_stay(
    site, tmp_path
):
    first, second = (f"{site.address}/{number}.jpg" for number in range(2))
    broken = pa.array([b"x\xe9 one", b"two"], pa.binary())
    table = pa.table({"url": [first, second], "caption": _unchecked(broken)})
    pq.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_bytes(f"url,caption\n{first},x".encode() + b"\xe9 three\n")
    lone = json.dumps({"url": second, "caption": "four \ud800"})
    (tmp_path / "t.jsonl").write_text(lone)
    tables = [str(tmp_path / f"t.{kind}") for kind in ("parquet", "csv", "jsonl")]
    samples = indexed(tmp_path, {**urls(""), "table": tables})
    assert samples.all_captions() == [["x\ufffd one"], ["two"], ["x\ufffd three"], ["four ?"]]


def _unchecked(array: pa.Array) -> pa.Array:
    """As strings, whatever the bytes are."""
    return pa.StringArray.from_buffers(len(array), array.buffers()[1], array.buffers()[2])


def test_files_whose_names_are_no_utf8_are_failures_and_lone_surrogates_are_replaced(tmp_path):
    pictures(tmp_path, "good/1.jpg")
    bad = os.fsencode(tmp_path / "images/good/") + b"/x\xe9.jpg"
    with open(bad, "wb") as file:
        file.write(jpeg())
    outcomes = read_outcomes(
        downloaded(tmp_path, {"kind": "class_folder", "folder": str(tmp_path / "images")})
        / "outcomes.parquet"
    )
    assert sorted((each.status, each.key) for each in outcomes) == [
        ("failed", "good/x?.jpg"),
        ("ok", "good/1.jpg"),
    ]
    files = {
        "a\udce9.jpg": jpeg(),
        "a\udce9.txt": "x",
        "b.jpg": jpeg(),
        "b.json": '{"re": "y \\ud800"}',
    }
    tar = write_tar(tmp_path / "x.tar", files)
    source = {"kind": "tars", "tars": str(tar), "captions": {"caption": "re"}}
    told = read_outcomes(downloaded(tmp_path, source, "tars") / "outcomes.parquet")
    assert [(each.key, each.status, each.captions) for each in told] == [
        (r"a\xe9", "ok", []),
        ("b", "ok", ["y ?"]),
    ]


def test_entries_of_annotations_that_are_nonsense_do_not_hurt_the_others(tmp_path):
    pictures(tmp_path, "1.jpg")
    good = {"image": "1.jpg", "conversations": [{"from": "gpt", "value": "Good \ud800."}]}
    bad = [5, {"image": 7}, {"image": "x" * 300, "conversations": "no"}, {"conversations": [1]}]
    samples = indexed(tmp_path, annotated(tmp_path, "sharegpt4v", [*bad, good]))
    assert samples.all_captions() == [["Good ?.", "Good ?."]]
    assert len(messages(tmp_path / "download")) == 5
    nameless = {"images": [{"file_name": "1.jpg"}], "annotations": [{"caption": "x"}]}
    with pytest.raises(ConfigError, match="not as COCO's"):
        downloaded(tmp_path, annotated(tmp_path, "coco", nameless), "again")
