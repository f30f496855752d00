"""What a misspelt word may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(word: str, known: Iterable[str]) -> str:
    """What a misspelt word may have meant, or what there is."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (
        f"; did you mean `{close[0]}`?"
        if close
        else (f". Known: {', '.join(known)}" if known else "")
    )
