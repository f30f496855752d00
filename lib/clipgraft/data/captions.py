"""Captions as they are kept: one line of text that can be read and written."""

from __future__ import annotations

import unicodedata


def clean_caption(text: str) -> str:
    """A caption on one line, without control characters and byte order marks; empty if nothing is left to see.

    Half a character, which JSON can hold and no file can, becomes a question mark.
    """
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = text.encode("utf-8", "replace").decode()
    text = "".join(" " if _is_control(each) else each for each in text)
    is_visible = any(unicodedata.category(each)[0] in "LNPS" for each in text)
    return " ".join(text.split()) if is_visible else ""


def _is_control(character: str) -> bool:
    return character == "\ufeff" or unicodedata.category(character) == "Cc"
