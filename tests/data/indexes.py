"""Indexes of pictures that are made up, through the real stages."""

from pathlib import Path

from pictures import write_tar

from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.settings import IndexJob
from clipgraft.sources import TarSource


def make_index(folder: Path, images: list[bytes], captions: list[list[str]]) -> Path:
    """Index of images with captions; row i is image i."""
    files = {}
    for i, (image, texts) in enumerate(zip(images, captions, strict=True)):
        files[f"{i:05d}.jpg"] = image
        files[f"{i:05d}.json"] = {"captions": texts}
    write_tar(folder / "in.tar", files)
    for stage in ("download", "index"):
        (folder / stage).mkdir()
    download(TarSource(kind="tars", tars=str(folder / "in.tar")), folder / "download", 1)
    build_index(IndexJob(tokenize=True), folder / "download", folder / "index", 1)
    return folder / "index"
