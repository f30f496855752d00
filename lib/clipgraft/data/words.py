"""Words: captions split as CLIP's tokenizer splits them, and the class of every word.

A tagger gets the tokenizer's own words, so that each piece of an encoding belongs to exactly one tagged word. That
costs two corrections, because taggers were taught other words: CLIP cuts `isn't` into `isn` and `'t`, and BERT into
`isn`, `'` and `t`, which they would take for nouns, and what has no letter (digits, punctuation, emoji) is told apart
before they guess.
Words are in lower case, as the model sees them; on Flickr8k the perceptron then gives 99.7 % the same classes.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import ftfy
import numpy as np
import regex

from clipgraft.config import ConfigError

CLASSES = ("noun", "adjective", "verb", "other")  # in the order of their worth (CLIPA)

Tag = Callable[[Sequence[str]], Iterable[Sequence[str]]]  # words to (word, Penn tag)

_OTHER = CLASSES.index("other")
_CLASS_OF = {"NN": 0, "JJ": 1, "VB": 2}  # by the first letters of Penn tags
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_ENDINGS = ("s", "t", "re", "ve", "m", "ll", "d")
_MODEL = "averaged_perceptron_tagger_eng"


def split_words(text: str) -> list[str]:
    """Words of a text as CLIP's tokenizer has them: cleaned, lower case."""
    return _WORD.findall(clean_text(text).lower())


def clean_text(text: str) -> str:
    """A text as open_clip cleans it before all its tokenizers: mended Unicode, no HTML, single spaces."""
    # Plain text needs no mending, and mending is what takes the time.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def first_sentence(text: str) -> str | None:
    """What stands before the first full stop that a space follows (Long-CLIP's short caption); None if that is all."""
    first, stop, _ = clean_text(text).partition(". ") if "." in text else (text, "", "")
    return first if stop and first.strip() else None


def tag_words(tagger: str, captions: Iterable[Sequence[str]]) -> np.ndarray:
    """Classes of words in their captions.

    Args:
        tagger: `textblob` or `nltk`.
        captions: words of each, as `split_words` or `wordpiece.basic_words` gives them.

    Returns:
        Place in `CLASSES` of each word, captions end to end, uint8.

    Raises:
        ConfigError: if the tagger has no model.
    """
    find_tags = load_tagger(tagger)
    classes = bytearray()
    for words in captions:
        tagged = find_tags(_as_taught(words))
        classes += bytes(
            _CLASS_OF.get(tag[:2], _OTHER) if word[-1].isalpha() else _OTHER
            for word, (_, tag) in zip(words, tagged, strict=True)
        )
    return np.frombuffer(bytes(classes), np.uint8)


def load_tagger(tagger: str) -> Tag:
    """The tagger and its model, in memory.

    Raises:
        ConfigError: if the model is not there or damaged: where it was looked for, and how to get it.
    """
    return {"textblob": _load_textblob, "nltk": _load_nltk}[tagger]()


@cache
def _load_textblob() -> Tag:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the collector
        from textblob.en import parser

        parser.find_tags(["a"])  # reads the lexicon
    return parser.find_tags


@cache
def _load_nltk() -> Tag:
    import nltk.data
    from nltk.tag.perceptron import PerceptronTagger

    fix = (
        f"Hint: `python -m nltk.downloader -d FOLDER {_MODEL}`, with NLTK_DATA=FOLDER set there and here; "
        "or `tagger: textblob`, which brings its model along"
    )
    try:
        return PerceptronTagger().tag
    except LookupError:
        looked = ", ".join(nltk.data.path)
        raise ConfigError(
            f"index.tagger = nltk: no model taggers/{_MODEL} in {looked}. {fix}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"index.tagger = nltk: its model {_MODEL} is damaged: {error}. {fix}"
        ) from None


def _as_taught(words: Sequence[str]) -> Sequence[str]:
    """The same number of words, with `isn`, `'t` as `is`, `n't`; and both `'` and `s` of BERT's `'`, `s` as `'s`."""
    if "'t" not in words and "'" not in words:
        return words
    taught = list(words)
    for i in range(1, len(words)):
        if words[i - 1] == "'" and words[i] in _ENDINGS:
            taught[i - 1 : i + 1] = ["'" + words[i]] * 2
    for i in range(1, len(words)):
        if taught[i] == "'t" and words[i - 1].endswith("n"):
            taught[i - 1 : i + 1] = words[i - 1][:-1] or "n't", "n't"
            if taught[i + 1 : i + 2] == ["'t"]:  # BERT's t
                taught[i + 1] = "n't"
    return taught
