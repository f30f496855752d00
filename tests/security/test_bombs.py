"""Laws of size: a small file that stands for a huge one is refused before it takes the memory.

The attacks run in a process that may have two gigabytes and no more, so that a hole is a MemoryError and not a lost machine.
"""

import bz2
import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipgraft.data.images import MAX_MEGAPIXELS

MEMORY = 2 * 2**30
LIMITED = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))\n"
MB = b"a" * 2**20


def attacked(code: str, *words: str) -> str:
    """What a program says of a file, its memory limited."""
    whole = f"import sys\nfrom pathlib import Path\n{code}"
    # Libraries map more than they use: the limit begins when they are there.
    head, _, tail = whole.partition("# --\n")
    command = [sys.executable, "-c", f"{head}\n{LIMITED}{tail}", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# --- images -----------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb() -> bytes:
    """A whole small PNG whose header says 60,000 x 60,000."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(2**24)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """A whole small JPEG whose header says 65,000 x 65,000."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


WAYS_IN = """
from clipgraft.data.images import BadImage, decode, decode_whole, shrink
# --
data = Path(sys.argv[1]).read_bytes()
for way in (decode, decode_whole, lambda data: shrink(data, 224, 95)):
    try: way(data); print("let in")
    except BadImage as error: print(error.reason)
"""


@pytest.mark.parametrize("bomb", [png_bomb, jpeg_bomb])
def test_pictures_that_claim_to_be_huge_are_refused_by_every_way_in(bomb, tmp_path):
    (tmp_path / "bomb").write_bytes(bomb())
    assert attacked(WAYS_IN, str(tmp_path / "bomb")).split("\n")[:3] == ["too many pixels"] * 3


NARROW = """
from clipgraft.data.images import BadImage, decode, prepare
# --
pixels = decode(Path(sys.argv[1]).read_bytes())
try: prepare(pixels, 224, "shortest", "bicubic")
except BadImage as error: print(error)
print(prepare(pixels, 224, "squash", "bicubic").shape)
"""


def test_a_picture_so_narrow_that_it_would_grow_huge_is_refused(tmp_path):
    """Of 65,000 pixels, in 205 bytes: as wide as a model wants it, it would be 14 million high."""
    from PIL import Image

    Image.new("RGB", (1, 65_000)).save(tmp_path / "narrow.png")
    said = attacked(NARROW, str(tmp_path / "narrow.png")).splitlines()
    assert said == ["too many pixels: 1 x 65000 at 224 pixels a side", "(224, 224, 3)"]


def test_no_setting_lets_in_more_than_the_limit():
    from clipgraft.settings import IndexSettings

    assert IndexSettings(max_megapixels=MAX_MEGAPIXELS).max_megapixels == 200
    with pytest.raises(ValueError, match="less than or equal to 200"):
        IndexSettings(max_megapixels=MAX_MEGAPIXELS + 1)


def test_a_picture_with_a_text_that_unpacks_to_a_gigabyte_is_refused_or_harmless(tmp_path):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    data = buffer.getvalue()
    packer = zlib.compressobj()
    first = packer.compress(16 * MB) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(16 * MB) + packer.flush(zlib.Z_FULL_FLUSH)
    text = first + 191 * again  # 3 GB
    bomb = data[:33] + chunk(b"zTXt", b"k\0\0" + text) + data[33:]
    (tmp_path / "bomb").write_bytes(bomb)
    said = attacked(WAYS_IN, str(tmp_path / "bomb")).split("\n")[:3]
    assert set(said) <= {"undecodable", "let in"}, said


# --- tables -----------------------------------------------------------------------------------------


TABLE = """
from clipgraft.config import ConfigError
from clipgraft.data.sources.tables import read_tables
from clipgraft.sources import UrlSource
# --
for name in sys.argv[1:]:
    try: table, _ = read_tables(UrlSource(kind="urls", table=name)); print(table.num_rows)
    except ConfigError as error: print(error)
"""


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def test_tables_that_unpack_to_gigabytes_are_refused(tmp_path):
    names = ("t.csv.gz", "t.tsv.gz", "t.jsonl.gz", "t.csv.bz2", "t.csv.zst")
    paths = [tmp_path / name for name in names]
    packs = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}
    for path in paths:
        pack = packs[path.suffix]
        head = b"url\tcaption\n" if ".tsv" in path.name else b"url,caption\n"
        path.write_bytes(pack(head) + 192 * pack(16 * MB))  # all of them may be strung together
        assert path.stat().st_size < 2**22
    said = attacked(TABLE, *map(str, paths)).splitlines()
    assert ["of a decompression bomb" in line for line in said] == [True] * 5, said


def test_parquet_that_unpacks_to_gigabytes_is_refused(tmp_path):
    schema = pa.schema({"url": pa.string(), "caption": pa.string()})
    rows = pa.table([pa.nulls(2**24, pa.string())] * 2, schema=schema)
    with pq.ParquetWriter(tmp_path / "rows.parquet", schema, compression="zstd") as writer:
        for _ in range(3):
            writer.write_table(rows, row_group_size=2**24)
    long = pa.table([pa.array(["a" * 2**27]), pa.array(["x"])], schema=schema)  # 128 MB
    with pq.ParquetWriter(
        tmp_path / "text.parquet", schema, compression="zstd", use_dictionary=False
    ) as writer:
        for _ in range(3):
            writer.write_table(long)
    names = [str(tmp_path / name) for name in ("rows.parquet", "text.parquet")]
    assert max(Path(name).stat().st_size for name in names) < 2**20
    said = attacked(TABLE, *names).splitlines()
    assert ["of a decompression bomb" in line for line in said] == [True] * 2, said


def claimed(path: Path, size: int) -> None:
    """Have a parquet file say that all of its parts unpack to so many bytes; its own numbers become longer ones of less."""
    about = pq.ParquetFile(path).metadata
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    numbers = {group.total_byte_size for group in groups}
    numbers |= {column.total_uncompressed_size for column in columns}
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[start:]
    for number in filter(lambda number: number > 2**20, numbers):
        honest = varint(2 * number)  # of Thrift, whose sign is the last bit
        assert honest in footer
        footer = footer.replace(honest, varint(2 * size, len(honest)))
    path.write_bytes(data[:start] + footer)


def varint(number: int, length: int = 0) -> bytes:
    parts = []
    while number or len(parts) < length or not parts:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts[-1] &= 0x7F
    return bytes(parts)


def test_parquet_that_lies_about_what_it_unpacks_to_is_refused(tmp_path):
    schema = pa.schema({"url": pa.string(), "caption": pa.string()})
    long = pa.table([pa.array(["a" * 2**27]), pa.array(["x"])], schema=schema)  # 128 MB
    path = tmp_path / "text.parquet"
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(20):
            writer.write_table(long)
    claimed(path, 1000)
    groups = pq.ParquetFile(path).metadata
    assert sum(groups.row_group(number).total_byte_size for number in range(20)) < 2**20
    assert "of a decompression bomb" in attacked(TABLE, str(path))


def test_an_honest_packed_table_is_read_whole(tmp_path):
    lines = "".join(f"http://x/{i}.jpg,a photo of {i}\n" for i in range(50_000))
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write("url,caption\n" + lines)
    table = pa.table({"url": [str(i) for i in range(1000)], "caption": ["same"] * 1000})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress(buffer.getvalue()))
    names = [str(tmp_path / name) for name in ("t.csv.gz", "t.parquet.gz")]
    assert attacked(TABLE, *names) == "50000\n1000\n"


# --- files of a sample --------------------------------------------------------------------------------


INDEX = """
import json
import pyarrow.parquet as pq
from clipgraft.config import ConfigError
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.settings import IndexJob
from clipgraft.sources import FolderSource, TarSource
# --
work = Path(sys.argv[1])
(work / "out").mkdir(); (work / "index").mkdir()
sources = {"tars": lambda: TarSource(kind="tars", tars=str(work / "*.tar")),
           "folder": lambda: FolderSource(kind="folder", folder=str(work / "pictures"))}
try:
    download(sources[sys.argv[2]](), work / "out", 1)
    build_index(IndexJob(tokenize=False, min_side=8), work / "out", work / "index", 1)
    rows = pq.read_table(work / "index/rejects.parquet").to_pylist()
    print(json.dumps([[row["uid"], row["reason"]] for row in rows]))
except ConfigError as error:
    print(error)
"""


def picture() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


class Zeros(io.RawIOBase):
    def readable(self):
        return True

    def readinto(self, buffer):
        buffer[:] = bytes(len(buffer))
        return len(buffer)


def write_huge_member(path: Path, name: str, size: int) -> None:
    """A tar of one good sample and one with a huge file, which takes no room on a disk that knows holes."""
    with tarfile.open(path, "w") as tar:
        for own, data in {"a.png": picture(), "a.txt": b"a", "b.png": picture()}.items():
            member = tarfile.TarInfo(own)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with path.open("r+b") as file:
        file.seek(-(-path.stat().st_size // 512) * 512)
        with tarfile.open(path) as tar:
            tar.getmembers()
            end = tar.offset
        member = tarfile.TarInfo(name)
        member.size = size
        file.seek(end)
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(end + 512 + -(-size // 512) * 512 + 1024)


@pytest.mark.parametrize("name", ["b.txt", "b.json"])
def test_a_text_of_gigabytes_in_a_tar_costs_its_sample_and_no_memory(name, tmp_path):
    write_huge_member(tmp_path / "0.tar", name, 3 * 2**30)
    assert json.loads(attacked(INDEX, str(tmp_path), "tars")) == [["b", "too large"]]


def test_a_text_of_gigabytes_beside_a_picture_costs_its_sample_and_no_memory(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for key in "ab":
        (folder / f"{key}.png").write_bytes(picture())
    (folder / "a.txt").write_text("a caption")
    with (folder / "b.txt").open("wb") as file:
        file.truncate(3 * 2**30)
    assert json.loads(attacked(INDEX, str(tmp_path), "folder")) == [["b", "too large"]]


def test_an_array_that_claims_to_be_huge_is_refused(tmp_path):
    from clipgraft.config import ConfigError
    from clipgraft.evaluation.evalset.tars import open_tars

    header = io.BytesIO()
    about = {"descr": "<f8", "fortran_order": False, "shape": (2**45,)}
    np.lib.format.write_array_header_1_0(header, about)
    (tmp_path / "test").mkdir()
    (tmp_path / "test/nshards.txt").write_text("1")
    with tarfile.open(tmp_path / "test/0.tar", "w") as tar:
        for name, data in {"a.png": picture(), "a.npy": header.getvalue()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ConfigError, match=r"its \.npy is no array"):
        open_tars(tmp_path).metadata()
