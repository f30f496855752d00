"""Photos for benchmarks: real ones from $REALDATA/flickr8k, enlarged, or a texture with a photo's spectrum."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, QUALITY = 512, 384, 90


def write_photos(folder: Path, num: int, per_tar: int = 512) -> str:
    """Write `num` JPEGs with a caption each (.txt, and .json for ours) as tars in webdataset's form.

    Returns:
        What they were made of.
    """
    folder.mkdir()
    sources = sorted(Path(os.environ.get("REALDATA", "")).glob("flickr8k/train-*.tar"))
    pictures = _real(sources) if "REALDATA" in os.environ and sources else _made_up()
    for first in range(0, num, per_tar):
        with tarfile.open(folder / f"{first // per_tar:05d}.tar", "w") as tar:
            for i in range(first, min(first + per_tar, num)):
                picture, caption = next(pictures)
                data = io.BytesIO()
                picture = picture.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
                picture.save(data, "JPEG", quality=QUALITY)
                about = json.dumps({"captions": [caption]}).encode()
                texts = {"json": about, "txt": caption.encode()}
                for name, content in {"jpg": data.getvalue(), **texts}.items():
                    member = tarfile.TarInfo(f"{i:07d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    kind = "flickr8k photos, enlarged" if sources else "textures (REALDATA is not set)"
    return f"{num:,} {kind} to {WIDTH}x{HEIGHT}, quality {QUALITY}"


def photo_bytes(folder: Path) -> list[bytes]:
    """The JPEGs of `write_photos`, in memory."""
    data = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    data.append(file.read())
    return data


def _real(sources):
    while True:
        for source in sources:
            with tarfile.open(source) as tar:
                picture = None
                for member in tar:  # KEY.jpg, then KEY.json
                    data = tar.extractfile(member).read()
                    if member.name.endswith(".jpg"):
                        picture = Image.open(io.BytesIO(data)).convert("RGB")
                    elif member.name.endswith(".json"):
                        yield picture, json.loads(data)["captions"][0]


def _made_up():
    """Pictures whose spectrum falls as 1/f, as that of photos does, in correlated colours."""
    rng = np.random.default_rng(0)
    fy, fx = np.meshgrid(np.fft.fftfreq(HEIGHT), np.fft.fftfreq(WIDTH), indexing="ij")
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = 1
    for i in itertools.count():
        planes = np.fft.ifft2(np.fft.fft2(rng.normal(size=(4, HEIGHT, WIDTH))) / frequency).real
        planes = planes[:3] + 2 * planes[3]
        planes = (planes - planes.mean()) / planes.std() * 50 + 128
        picture = Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        yield picture, f"photo number {i} of a small collection"
