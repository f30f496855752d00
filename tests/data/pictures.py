"""Small pictures and tars, made with nothing of clipgraft."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(width=40, height=30, seed=0, **save) -> bytes:
    """Smooth noise, so that JPEG keeps it nearly as it is."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return encoded(
        coarse.resize((width, height), Image.Resampling.BICUBIC), "JPEG", quality=95, **save
    )


def encoded(image: Image.Image, kind: str, **save) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes | str | dict] | list) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            if isinstance(content, dict):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
