"""Bad inputs, and odd ones that only look bad, each with what must become of it. All drawn from code.

What becomes of a sample is `ok`, or the reason for which it is left out. Where several are right, as for damage
that one decoder calls this and another that, they stand side by side: `undecodable|truncated`.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

WIDTH, HEIGHT = 72, 48


@dataclass(frozen=True)
class BadImage:
    """An image file.

    Attributes:
        name: of the kind.
        data: the file.
        fate: what becomes of it.
        pixels: what an accepted one must look like, HWC.
        suffix: under which it comes.
    """

    name: str
    data: bytes = field(repr=False)
    fate: str = "ok"
    pixels: np.ndarray | None = field(default=None, repr=False)
    suffix: str = "jpg"


@dataclass(frozen=True)
class BadCaption:
    """Text beside a good image: extension to content; an accepted one must contain `caption`."""

    name: str
    files: dict[str, bytes]
    fate: str = "ok"
    caption: str = ""


@dataclass(frozen=True)
class BadTar:
    """A tar that stops the job (`error` is in the message), or the fates of its keys."""

    name: str
    data: bytes = field(repr=False)
    error: str = ""
    fates: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BadTable:
    """A table that stops the job."""

    name: str
    data: bytes = field(repr=False)
    error: str


@dataclass(frozen=True)
class BadUrl:
    """A URL; `{site}` is the server, `{local}` a local file's URL."""

    name: str
    url: str | None
    fate: str = "failed"


# --- images -----------------------------------------------------------------------------------------------------


def picture(seed: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Four quarters of different colours under smooth noise: no turn or swap of channels leaves it as it is."""
    rng = np.random.default_rng(seed)
    quarters = np.array([[(210, 40, 40), (40, 200, 40)], [(40, 40, 210), (200, 200, 60)]], float)
    quarters += rng.normal(0, 30, (2, 2, 3))
    noise = cv2.resize(rng.normal(0, 12, (6, 8, 3)), (width, height))
    large = cv2.resize(quarters, (width, height), interpolation=cv2.INTER_LINEAR)
    return (large + noise).clip(0, 255).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "JPEG", **save: Any) -> bytes:
    """Bytes of a file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}) | save)
    return buffer.getvalue()


def good_jpeg(seed: int) -> bytes:
    """An ordinary image; seeds from 10,000 on are not used by bad ones."""
    return encode(picture(10_000 + seed))


def images() -> list[BadImage]:
    """All kinds of image."""
    return _odd_images() + _turned_images() + _damaged_images() + _not_images()


def _odd_images() -> list[BadImage]:
    """Those that must be accepted, and look right."""
    seeds = iter(range(100, 200))

    def draw() -> np.ndarray:
        return picture(next(seeds))

    def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        share = alpha[..., None] / 255
        return (pixels * share + 255 * (1 - share)).round().astype(np.uint8)

    def grey(pixels: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)

    fade = np.broadcast_to(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, WIDTH))
    a = [draw() for _ in range(40)]
    cmyk = Image.fromarray(a[0]).convert("CMYK")
    palette = Image.fromarray(a[1]).quantize(32)
    holes = Image.fromarray(a[2]).quantize(32)
    hole = holes.getpixel((3, 3))
    with_holes = np.asarray(holes.convert("RGB")).copy()
    with_holes[np.asarray(holes) == hole] = 255
    deep = (a[3].astype(np.uint16) << 8) + 77
    deep_grey = (grey(a[4]).astype(np.uint16) << 8) + 200
    ink = Image.fromarray(a[5]).convert("1")
    frames = [Image.fromarray(each) for each in a[6:9]]
    colours = [each.quantize(64) for each in frames]
    later = encode(colours[2], "GIF", save_all=True, append_images=colours[:2])
    keyed = a[32].clip(1, 255)
    keyed[10:20, 10:20] = 0
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 1000)
    huge_text = zlib.compress(bytes(8 << 20))
    tall = picture(99, 60, 290)  # within 5 to 1
    return [
        BadImage("jpeg", encode(a[10]), pixels=a[10]),
        BadImage("jpeg-progressive", encode(a[11], progressive=True), pixels=a[11]),
        BadImage("jpeg-grey", encode(grey(a[12])), pixels=np.dstack([grey(a[12])] * 3)),
        BadImage("jpeg-cmyk", encode(cmyk), pixels=np.asarray(cmyk.convert("RGB"))),
        BadImage("jpeg-subsampled", encode(a[13], subsampling=2), pixels=a[13]),
        BadImage("jpeg-without-its-end-marker", encode(a[14])[:-2], pixels=a[14]),
        BadImage("jpeg-with-bytes-after-its-end", encode(a[15]) + b"more" * 9, pixels=a[15]),
        BadImage("jpeg-with-broken-exif", encode(a[16], exif=b"Exif\0\0II*\0\xff\xff"), pixels=a[16]),
        BadImage("jpeg-with-restarts", _with_restarts(a[29]), pixels=a[29]),
        BadImage("jpeg-padded-before-its-end", encode(a[30])[:-2] + bytes(99) + b"\xff\xd9", pixels=a[30]),
        BadImage("jpeg-of-two-pictures", encode(a[31], "MPO", save_all=True, append_images=frames, quality=95), pixels=a[31]),
        BadImage("jpeg-called-png", encode(a[17]), pixels=a[17], suffix="png"),
        BadImage("png-called-jpg", encode(a[18], "PNG"), pixels=a[18]),
        BadImage("png-16-bit-grey", _cv_png(deep_grey), pixels=np.dstack([grey(a[4])] * 3)),
        BadImage("png-16-bit-colours", _cv_png(deep[..., ::-1]), pixels=a[3]),
        BadImage("png-palette", encode(palette, "PNG"), pixels=np.asarray(palette.convert("RGB"))),
        BadImage("png-palette-with-holes", encode(holes, "PNG", transparency=hole), pixels=with_holes),
        BadImage("png-alpha", encode(np.dstack([a[19], fade]), "PNG"), pixels=on_white(a[19], fade)),
        BadImage(
            "png-grey-alpha",
            encode(Image.fromarray(np.dstack([grey(a[20]), fade]), "LA"), "PNG"),
            pixels=on_white(np.dstack([grey(a[20])] * 3), fade),
        ),
        BadImage("png-with-a-clear-colour", encode(keyed, "PNG", transparency=(0, 0, 0)), pixels=np.where(keyed == 0, 255, keyed).astype(np.uint8)),
        BadImage("png-two-colours", encode(ink, "PNG"), pixels=np.asarray(ink.convert("RGB"))),
        BadImage("png-animated", encode(frames[0], "PNG", save_all=True, append_images=frames[1:]), pixels=a[6]),
        BadImage("png-with-text", encode(a[21], "PNG", pnginfo=text), pixels=a[21]),
        BadImage("png-without-its-last-chunk", encode(a[22], "PNG")[:-12], pixels=a[22]),
        BadImage("png-with-a-text-bomb", _with_chunk(encode(a[23], "PNG"), b"zTXt", b"k\0\0" + huge_text), "undecodable"),
        BadImage(
            "gif-animated",
            encode(colours[1], "GIF", save_all=True, append_images=colours[2:]),
            pixels=np.asarray(colours[1].convert("RGB")),
            suffix="gif",
        ),
        BadImage("gif-with-holes", encode(holes.rotate(180), "GIF", transparency=hole), pixels=with_holes[::-1, ::-1]),
        BadImage("gif-cut-after-its-first-picture", later[: len(later) * 3 // 4], pixels=np.asarray(colours[2].convert("RGB"))),
        BadImage("avif", encode(a[33], "AVIF", quality=95), pixels=a[33]),
        BadImage("webp", encode(a[24], "WEBP", lossless=True), pixels=a[24], suffix="webp"),
        BadImage("webp-alpha", encode(np.dstack([a[25], fade]), "WEBP", lossless=True, exact=True), pixels=on_white(a[25], fade)),
        BadImage("webp-animated", encode(a[26], "WEBP", lossless=True, save_all=True, append_images=frames), pixels=a[26]),
        BadImage("bmp", encode(a[27], "BMP"), pixels=a[27], suffix="bmp"),
        BadImage("tiff", encode(a[28], "TIFF"), pixels=a[28], suffix="tif"),
        BadImage("tiff-16-bit", cv2.imencode(".tiff", deep_grey.T.copy())[1].tobytes(), pixels=np.dstack([grey(a[4]).T] * 3)),
        BadImage("tall", encode(tall), pixels=tall),
        BadImage("no-larger-than-it-must-be", encode(picture(98, 16, 16), "PNG"), pixels=picture(98, 16, 16)),
    ]  # fmt: skip


def _turned_images() -> list[BadImage]:
    """Stored as a camera holds them; the tag says how to turn them upright."""
    turn: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }
    found = []
    for tag, stored in turn.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        upright = picture(200 + tag)
        pixels = np.ascontiguousarray(stored(upright))
        found.append(BadImage(f"jpeg-turned-{tag}", encode(pixels, exif=exif), pixels=upright))
    upright, other = picture(220), picture(221)
    sideways = np.ascontiguousarray(np.rot90(upright))
    exif = Image.Exif()
    exif[0x0112] = 6
    found.append(
        BadImage("png-turned", encode(sideways, "PNG", exif=exif), pixels=upright, suffix="png")
    )
    again = picture(222)
    data = encode(np.ascontiguousarray(np.rot90(again)), exif=exif)
    found.append(BadImage("jpeg-turned-without-its-end", data[:-2], pixels=again))
    exif[0x0112] = 99
    found.append(BadImage("jpeg-turned-nowhere", encode(other, exif=exif), pixels=other))
    return found


def _damaged_images() -> list[BadImage]:
    """Those of which something is missing or wrong."""
    grain = np.random.default_rng(5).integers(-20, 21, (120, 160, 3))
    noisy = (picture(300, 160, 120) + grain).clip(0, 255).astype(np.uint8)
    jpeg, png = encode(noisy), encode(noisy, "PNG")
    progressive = encode(noisy, progressive=True)
    gif, webp = encode(Image.fromarray(noisy).quantize(64), "GIF"), encode(noisy, "WEBP")
    tiff, bmp = encode(noisy, "TIFF"), encode(noisy, "BMP")
    frame = jpeg.index(b"\xff\xc0") + 5  # height and width in the frame header
    claims = jpeg[:frame] + struct.pack(">HH", 65_000, 65_000) + jpeg[frame + 4 :]
    either = "undecodable|truncated"
    return [
        BadImage("jpeg-start-alone", jpeg[:2], either),
        BadImage("jpeg-cut-in-its-header", jpeg[:200], "truncated"),
        BadImage("jpeg-cut-early", jpeg[: len(jpeg) // 4], "truncated"),
        BadImage("jpeg-cut-in-half", jpeg[: len(jpeg) // 2], "truncated"),
        BadImage("jpeg-cut-in-its-last-line", jpeg[:-20], "truncated"),
        BadImage("jpeg-cut-and-closed", jpeg[: len(jpeg) // 2] + b"\xff\xd9", "truncated"),
        BadImage("jpeg-progressive-cut", progressive[: len(jpeg) // 2], "truncated"),
        BadImage("jpeg-with-zeros-inside", jpeg[:3000] + bytes(2000) + jpeg[5000:], either),
        BadImage("jpeg-that-claims-to-be-huge", claims, "too many pixels"),
        BadImage("png-cut-in-its-header", png[:20], "truncated"),
        BadImage("png-cut-in-half", png[: len(png) // 2], "truncated"),
        BadImage("png-with-zeros-inside", png[:3000] + bytes(500) + png[3500:], either),
        BadImage("png-of-no-size", _png(0, 0), "undecodable|too small"),
        BadImage("png-bomb", _png(20_000, 20_000), "too many pixels"),
        BadImage("gif-cut", gif[: len(gif) // 2], "truncated"),
        BadImage("webp-cut", webp[: len(webp) // 2], "truncated"),
        BadImage("tiff-cut", tiff[: len(tiff) // 2], "truncated"),
        BadImage("bmp-cut", bmp[: len(bmp) // 2], "truncated"),
        BadImage("tiff-of-floats", encode(Image.new("F", (40, 40), 0.5), "TIFF"), "undecodable"),
        BadImage("one-pixel", encode(Image.new("RGB", (1, 1)), "GIF"), "too small"),
        BadImage("narrow", encode(picture(301, 15, 40), "PNG"), "too small"),
        BadImage("banner", encode(picture(302, 600, 30)), "aspect ratio"),
    ]


def _not_images() -> list[BadImage]:
    zipped = io.BytesIO()
    with gzip.GzipFile(fileobj=zipped, mode="w") as file:
        file.write(good_jpeg(999))
    files = {
        "empty": b"",
        "html": b"<!DOCTYPE html><html><body>Not found</body></html>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='90' height='90'><rect/></svg>",
        "zeros": bytes(2000),
        "noise": np.random.default_rng(1).bytes(2000),
        "text": "kein Bild, sondern ein Satz\n".encode("utf-16"),
        "compressed-jpeg": zipped.getvalue(),
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "postscript": encode(picture(400), "EPS"),
        "video": struct.pack(">I", 24) + b"ftypisom\0\0\2\0isomiso2" + bytes(500),
    }
    return [BadImage(name, data, "undecodable") for name, data in files.items()]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int) -> bytes:
    """A black picture of one bit per pixel, made without holding its pixels."""
    packer = zlib.compressobj(9)
    line = bytes(1 + -(-width // 8))
    packed = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    return png[:33] + _chunk(kind, data) + png[33:]


def _with_restarts(pixels: np.ndarray) -> bytes:
    flags = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_RST_INTERVAL, 2]
    return bytes(cv2.imencode(".jpg", pixels[..., ::-1], flags)[1].tobytes())


def _cv_png(pixels: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".png", pixels)[1].tobytes())


# --- captions ---------------------------------------------------------------------------------------------------


def captions() -> list[BadCaption]:
    """All kinds of caption."""

    def as_json(value: Any) -> dict[str, bytes]:
        return {"json": json.dumps(value).encode()}

    long = "a very long story of a dog " * 4000
    return [
        BadCaption("missing", {}, "no caption"),
        BadCaption("empty", {"txt": b""}, "empty caption"),
        BadCaption("blank", {"txt": b" \t\r\n\xc2\xa0"}, "empty caption"),
        BadCaption("long", {"txt": long.encode()}, caption=long.strip()),
        BadCaption("with-zeros", {"txt": b"a red\0 cube"}, caption="cube"),
        BadCaption("with-newlines", {"txt": b"one\r\n\n two\tthree"}, caption="one two three"),
        BadCaption("emoji", {"txt": "a \N{DOG FACE} at play \U0001f1e9\U0001f1ea".encode()}, caption="\N{DOG FACE}"),
        BadCaption("html", {"txt": b"cats &amp; dogs &lt;3 <b>bold</b>"}, caption="dogs"),
        BadCaption("not-utf-8", {"txt": b"un caf\xe9 noir"}, caption="noir"),
        BadCaption("right-to-left", {"txt": "كلب أحمر".encode()}, caption="كلب"),
        BadCaption("chinese", {"txt": "一只红色的狗".encode()}, caption="红色"),
        BadCaption("invisible", {"txt": "\u200b\ufeff \u2060".encode()}, "empty caption"),
        BadCaption("zeros-alone", {"txt": bytes(9)}, "empty caption"),
        BadCaption("marked", {"txt": b"\xef\xbb\xbfa marked dog"}, caption="a marked dog"),
        BadCaption("punctuation", {"txt": b"?!"}, "ok|empty caption"),
        BadCaption("json-list", {"json": b'["a", "b"]'}, "no caption"),
        BadCaption("json-list-beside-text", {"json": b"[1]", "txt": b"from text"}, caption="from text"),
        BadCaption("json-broken", {"json": b'{"caption": "a do'}, "no caption"),
        BadCaption("json-broken-beside-text", {"json": b"{", "txt": b"from text 2"}, caption="from text 2"),
        BadCaption("json-number", as_json({"caption": 7}), "no caption"),
        BadCaption("json-numbers", as_json({"captions": [1, 2.5, None]}), "no caption|empty caption"),
        BadCaption("json-null", as_json({"caption": None}), "no caption"),
        BadCaption("json-some-empty", as_json({"captions": ["", None, "the third"]}), caption="the third"),
        BadCaption("json-half-a-character", {"json": b'{"caption": "a \\ud83d dog, cut"}'}, caption="dog, cut"),
        BadCaption("json-deep", {"json": b"[" * 100_000}, "no caption"),
        BadCaption("json-marked", {"json": b'\xef\xbb\xbf{"caption": "a dog"}'}, caption="a dog"),
        BadCaption("json-empty", {"json": b""}, "no caption"),
        BadCaption("json-noise", {"json": bytes(range(256))}, "no caption"),
    ]  # fmt: skip


# --- tars -------------------------------------------------------------------------------------------------------


def tar(files: dict[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    """A tar of files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _pair(key: str, seed: int) -> dict[str, bytes]:
    return {f"{key}.jpg": good_jpeg(500 + seed), f"{key}.txt": f"caption of {key}".encode()}


def tars() -> list[BadTar]:
    """All kinds of tar."""
    whole = tar(_pair("a", 0) | _pair("b", 1))
    last = whole.rstrip(b"\0")
    noise = np.random.default_rng(2).bytes(4096)
    return [
        BadTar("cut-in-a-header", whole[: 512 + 2048 + 200], "not whole"),
        BadTar("cut-in-data", whole[:1000], "not whole"),
        BadTar("without-end-blocks", last + bytes(-len(last) % 512), "not whole"),
        BadTar("gzipped", gzip.compress(whole), "compressed"),
        BadTar("empty", b"", "empty"),
        BadTar("without-files", tar({}), "no files"),
        BadTar("noise", noise, "not a tar"),
        BadTar("html", b"<html>gone</html>" * 100, "not a tar"),
        BadTar("zeros", bytes(10_240), "no files|not a tar"),
        BadTar("header-damaged", b"x" * 100 + whole[100:], "not a tar"),
        BadTar(
            "same-key-again",
            tar([*_pair("k", 2).items(), *_pair("k", 3).items(), *_pair("l", 4).items()]),
            fates={"k": "ok and repeated key", "l": "ok"},
        ),
        BadTar(
            "files-not-side-by-side",
            tar([*_pair("m", 5).items()][:1] + [*_pair("n", 6).items(), *_pair("m", 5).items()][:3]),
            fates={"m": "no caption and repeated key", "n": "ok"},
        ),
        BadTar("folders", tar(_pair("x/y/o", 7) | _pair("./p", 8)), fates={"x/y/o": "ok", "p": "ok"}),
        BadTar("capitals", tar({"Q.JPG": good_jpeg(509), "Q.TXT": b"caption"}), fates={"Q": "ok"}),
        BadTar("odd-names", tar(_pair("a b,c;d", 10) | _pair("ü", 11)), fates={"a b,c;d": "ok", "ü": "ok"}),
        BadTar("names-not-utf-8", _latin(), fates={r"caf\xe9": "ok"}),
        BadTar("names-that-climb", tar(_pair("../../etc/ab", 17)), fates={"../../etc/ab": "ok"}),
        BadTar("long-names", tar(_pair("r" * 200, 12)), fates={"r" * 200: "ok"}),
        BadTar("with-dot-files", _dotted(), fates={"s": "ok", "t": "ok"}),
        BadTar("with-links-and-folders", _linked(), fates={"u": "ok", "v": "no image", "w": "ok"}),
        BadTar("no-images", tar({"z.txt": b"a", "z1.json": b"{}"} | _pair("zz", 20)), fates={"z": "no image", "z1": "no image", "zz": "ok"}),
    ]  # fmt: skip


def _latin() -> bytes:
    """Names in an old encoding."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as archive:
        for name, data in _pair("café", 18).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _dotted() -> bytes:
    """As a Mac packs it: a resource fork before each file, and the look of the folder."""
    files = {"._s.jpg": b"\0\5\26\7" + bytes(60), **_pair("s", 13), **_pair("t", 14)}
    return tar({**files, ".DS_Store": bytes(100)})


def _linked() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, to: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, to
            archive.addfile(member, io.BytesIO(data))

        add("folder", kind=tarfile.DIRTYPE)
        for name, data in _pair("u", 15).items():
            add(name, data)
        add("v.jpg", kind=tarfile.SYMTYPE, to="/etc/passwd")
        add("v.txt", b"a link")
        for name, data in _pair("w", 16).items():
            add(name, data)
    return buffer.getvalue()


# --- tables -----------------------------------------------------------------------------------------------------


def tables() -> list[BadTable]:
    """Tables that must stop the job; names are file names."""
    lines = b"url,caption\nhttp://127.0.0.1:9/a.jpg,one\nhttp://127.0.0.1:9/b.jpg,two\n"
    parquet = _parquet(url=["http://127.0.0.1:9/a.jpg"], caption=["one"])
    return [
        BadTable("no-url-column.csv", lines.replace(b"url,", b"link,"), "url"),
        BadTable("no-caption-column.csv", lines.replace(b",caption", b",text"), "caption"),
        BadTable("headerless.tsv", b"a dog\thttp://127.0.0.1:9/a.jpg\n" * 2, "header|columns"),
        # Lines of another width may count as failed rows; the others are of a server that is not there.
        BadTable("ragged.csv", lines + b"http://127.0.0.1:9/c.jpg,a,b,c\n", "ragged"),
        BadTable("empty.csv", b"", "empty|no rows|cannot be read"),
        BadTable("header-alone.csv", b"url,caption\n", "no rows"),
        BadTable("blank.csv", b"\n\n\n", "blank.csv"),
        BadTable("utf-16.csv", lines.decode().encode("utf-16"), "utf-16.csv"),
        BadTable("noise.csv", np.random.default_rng(3).bytes(3000), "noise.csv"),
        BadTable("noise.parquet", b"not parquet at all", "noise.parquet"),
        BadTable("cut.parquet", parquet[:-20], "cut.parquet"),
        BadTable("cut.csv.gz", gzip.compress(lines * 500)[:-30], "cut.csv.gz"),
        BadTable("unpacked.csv.gz", lines, "unpacked.csv.gz"),
        BadTable("no-rows.parquet", _parquet(url=pa.array([], pa.string()), caption=pa.array([], pa.string())), "no rows"),
        BadTable("lists.parquet", _parquet(url=[["http://127.0.0.1:9/a.jpg"]], caption=["one"]), "lists.parquet"),
        BadTable("sheet.xlsx", b"PK\3\4" + bytes(200), "xlsx"),
    ]  # fmt: skip


def _parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


# Tables that are read, one after the other, as one source: file name to content and the captions to come of it.
def readable_tables(site: str) -> dict[str, tuple[bytes, list[str | None]]]:
    """Odd tables that are right; `{site}/good/N` is an image each."""

    def lines(*rows: str, header: str = "url,caption") -> bytes:
        return "\n".join([header, *rows, ""]).encode()

    url = [f"{site}/good/{number}.jpg" for number in range(700, 720)]
    quoted = lines(f'"{url[0]}","two\nlines, and ""quotes"""', f"{url[1]},plain")
    return {
        "quoted.csv": (quoted, ['two lines, and "quotes"', "plain"]),
        "bom.csv": (b"\xef\xbb\xbf" + lines(f"{url[2]},after a mark"), ["after a mark"]),
        "windows.csv": (lines(f"{url[3]},dos").replace(b"\n", b"\r\n"), ["dos"]),
        "numbers.csv": (lines(f"{url[4]},12", f"{url[5]},13"), ["12", "13"]),
        "holes.csv": (lines(f"{url[6]},", f"{url[7]},kept", ",no url"), [None, "kept", None]),
        "more.csv": (
            lines(f"7,{url[8]},last,x", header="id,url,caption,other"),
            ["last"],
        ),
        "tabs.tsv": (
            lines(f'{url[9]}\ta 12" disc, black', header="url\tcaption"),
            ['a 12" disc, black'],
        ),
        "packed.csv.gz": (gzip.compress(lines(f"{url[10]},packed")), ["packed"]),
        "typed.parquet": (_parquet(caption=["typed"], url=[url[11]], more=[[1]]), ["typed"]),
    }


# --- URLs -------------------------------------------------------------------------------------------------------


def urls() -> list[BadUrl]:
    """All kinds of URL and of answers to them; what the paths answer stands in `bad_server.py`."""
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    return [
        BadUrl("none", None),
        BadUrl("empty", ""),
        BadUrl("blank", "  "),
        BadUrl("words", "not a url"),
        BadUrl("no-scheme", "127.0.0.1/a.jpg"),
        BadUrl("no-host", "http:///a.jpg"),
        BadUrl("half-an-address", "http://[::1/a.jpg"),
        BadUrl("bad-port", "http://127.0.0.1:99999/a.jpg"),
        BadUrl("closed-port", "http://127.0.0.1:9/a.jpg"),
        BadUrl("no-such-host", "http://no-such-host.invalid/a.jpg"),
        BadUrl("ftp", "ftp://127.0.0.1/a.jpg"),
        BadUrl("local-file", "{local}"),
        BadUrl("local-file-in-capitals", "FILE:///etc/passwd"),
        BadUrl("data", f"data:image/png;base64,{pixel}"),
        BadUrl("script", "javascript:alert(1)"),
        BadUrl("newline", "{site}/good/1.jpg\r\nX: y"),
        BadUrl("404", "{site}/status/404"),
        BadUrl("403", "{site}/status/403"),
        BadUrl("500", "{site}/status/500"),
        BadUrl("204", "{site}/status/204", "failed|undecodable"),
        BadUrl("short-body", "{site}/short", "failed|truncated"),
        BadUrl("loop", "{site}/loop"),
        BadUrl("sent-to-a-local-file", "{site}/to-file"),
        BadUrl("silent", "{site}/silent"),
        BadUrl("drip", "{site}/drip", "ok|failed"),
        BadUrl("html", "{site}/html", "failed|undecodable"),
        BadUrl("no-body", "{site}/empty", "failed|undecodable"),
        BadUrl("not-for-training", "{site}/noai"),
        BadUrl("flaky", "{site}/flaky", "ok"),
        BadUrl("sent-elsewhere", "{site}/elsewhere", "ok"),
        BadUrl("comma", "{site}/good/801.jpg?size=3,4&x=%2C", "ok"),
        BadUrl("fragment", "{site}/good/802.jpg#part", "ok"),
        BadUrl("capitals", "{SITE}/good/803.jpg", "ok"),
        BadUrl("not-ascii", "{site}/good/804.jpg?name=ü", "ok|failed"),
        BadUrl("spaces-around", " {site}/good/805.jpg ", "ok|failed"),
        BadUrl("again", "{site}/good/801.jpg?again", "duplicate"),
    ]
