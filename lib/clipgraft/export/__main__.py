"""Take a model elsewhere.

    python -m clipgraft.export FORMAT MODEL_FOLDER OUT [--code]

open_clip     a folder for open_clip ("local-dir:OUT"); dense models
hugging_face  a folder for transformers: CLIPModel; with --code, and always for a mixture of experts, with its own code
clip_moe      a checkpoint as CLIP-MoE's
onnx          both towers as ONNX
torch         both towers as programs of torch.export
vision        the image tower alone, for transformers: CLIPVisionModel, or as above with its own code

OUT is a new folder, with a model card (README.md).
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from clipgraft.checkpoint import Loaded, load_model
from clipgraft.config import ConfigError
from clipgraft.export import clip_moe, hugging_face, open_clip_folder, own_code, programs, vision
from clipgraft.export.card import write_card
from clipgraft.models.moe import insert_experts

log = logging.getLogger(__name__)

Writer = Callable[[Loaded, Path], None]
_WRITERS: dict[str, tuple[Writer, str]] = {
    "open_clip": (open_clip_folder.write_open_clip, open_clip_folder.USAGE),
    "hugging_face": (hugging_face.write_clip_model, hugging_face.USAGE),
    "clip_moe": (clip_moe.write_clip_moe, clip_moe.USAGE),
    "onnx": (programs.write_onnx, programs.ONNX_USAGE),
    "torch": (programs.write_torch, programs.TORCH_USAGE),
    "vision": (vision.write_vision_model, vision.USAGE),
}
_WITH_CODE: dict[str, tuple[Writer, str]] = {
    "hugging_face": (own_code.write_code, own_code.USAGE),
    "vision": (own_code.write_vision_code, vision.CODE_USAGE),
}


def export(form: str, folder: Path, out: Path, *, with_code: bool = False) -> None:
    """Write a model in another program's form; all of it, or nothing.

    Args:
        form: one of the formats above.
        folder: of the model, of any kind.
        out: is made.
        with_code: write the code of the model beside a dense one, too.

    Raises:
        ConfigError: if the form cannot hold the model, or the folder is there.
    """
    if with_code and form not in _WITH_CODE:
        raise ConfigError(f"--code has no effect on {form}. Hint: {' and '.join(_WITH_CODE)} alone")
    if out.exists():
        raise ConfigError(f"{out} exists. Hint: the name of a new folder")
    loaded = load_model(folder, insert_experts=insert_experts)
    loaded.model.eval().requires_grad_(False)
    needs_code = with_code or (loaded.spec["moe"] is not None and form in _WITH_CODE)
    write, usage = _WITH_CODE[form] if needs_code else _WRITERS[form]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as name:
        part = Path(name, out.name)
        part.mkdir()
        write(loaded, part)
        write_card(loaded, folder, part, form, usage)
        part.rename(out)
    size = sum(path.stat().st_size for path in out.iterdir())
    log.info("%s: %s, %.1f MB", out, form, size / 1e6)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m clipgraft.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=list(_WRITERS), metavar="FORMAT", help="see above")
    parser.add_argument("folder", type=Path, metavar="MODEL_FOLDER", help="of any kind of model")
    parser.add_argument("out", type=Path, metavar="OUT", help="is made")
    parser.add_argument("--code", action="store_true", help="write the code of a dense model, too")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        export(given.format, given.folder, given.out, with_code=given.code)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
