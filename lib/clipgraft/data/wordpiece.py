"""WordPiece: BERT's words and their pieces, which CLIPA-v2's text towers read.

A text begins with [CLS] and has no end token; zeros follow it, and the model sees them. The vocabulary is a BERT
`vocab.txt`, one piece per line, or one made from the training captions. Written here rather than taken from a library,
because index and evaluation need 30 lines of it, and the library that open_clip asks for brings a hub client along.
Unlike there, special tokens in a caption are read as the letters they are made of.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import regex

from clipgraft.config import ConfigError
from clipgraft.data.words import clean_text

_PAD, _UNKNOWN, _START = "[PAD]", "[UNK]", "[CLS]"
_UNUSED = ("[SEP]", "[MASK]")  # other programs insist on them
_LONGEST = 100  # letters of a word; BERT does not look at longer ones
_NUM_PIECES = 30_522  # of BERT's own vocabulary: no made one is larger
_NUM_LETTERS = 2_000  # kept of a corpus, so that scripts of many letters leave room for words
_ASCII = "".join(chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper())

_IDEOGRAPH = (
    r"\u3400-\u4DBF\u4E00-\u9FFF\uF900-\uFAFF\U00020000-\U0002A6DF\U0002A700-\U0002CEAF"
    r"\U0002F800-\U0002FA1F"
)
_MARK = r"!-/:-@\[-`{-~\p{P}"  # what ASCII has between letters and digits, and all punctuation
_WORD = regex.compile(rf"[{_IDEOGRAPH}]|[{_MARK}]|[^\s{_IDEOGRAPH}{_MARK}]+")


class WordPieces:
    """Encodes words as the longest pieces that the vocabulary has, from left to right."""

    file: ClassVar[str] = "vocab.txt"
    end_id: ClassVar[None] = None

    def __init__(self, pieces: Sequence[str], where: str = "wordpiece") -> None:
        """Number the pieces in order.

        Args:
            pieces: those within a word begin with ##.
            where: what the pieces come from, for the message.

        Raises:
            ConfigError: if a special piece is missing, or padding is not 0.
        """
        self.pieces = list(pieces)
        self._id_of = {piece: number for number, piece in enumerate(self.pieces)}
        missing = [special for special in (_PAD, _UNKNOWN, _START) if special not in self._id_of]
        if missing or self._id_of[_PAD] != 0:
            raise ConfigError(
                f"{where}: {len(self.pieces):,} pieces, {', '.join(missing) or _PAD + ' as the first'} is not among "
                "them. Hint: the vocab.txt of a BERT model, e.g. bert-base-uncased"
            )
        self.start_id = self._id_of[_START]
        self.vocab_size = len(self.pieces)
        self._unknown = [self._id_of[_UNKNOWN]]

    @classmethod
    def read(cls, path: Path) -> WordPieces:
        """Read a vocabulary.

        Raises:
            ConfigError: if there is no such file, or it is none.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"index.wordpiece: {path} cannot be read: {error}. Hint: the path of a BERT vocab.txt, or null: a "
                "vocabulary is made from the captions"
            ) from None
        return cls([line.rstrip("\r") for line in text.removesuffix("\n").split("\n")], str(path))

    @classmethod
    def of_words(cls, words: Sequence[str], counts: Sequence[int]) -> WordPieces:
        """A vocabulary made from the words of a corpus: letters, alone and within words, and the most frequent words.

        Other words are spelt by the longest words they begin with, and letters.

        Args:
            words: all different.
            counts: how often each occurs.
        """
        count_of = Counter(_ASCII)
        for word, count in zip(words, counts, strict=True):
            for letter in word:
                count_of[letter] += int(count)
        letters = sorted(sorted(count_of), key=count_of.__getitem__, reverse=True)[:_NUM_LETTERS]
        letters = sorted({*letters, *_ASCII})
        pieces = [_PAD, _UNKNOWN, _START, *_UNUSED]
        pieces += [*letters, *(f"##{letter}" for letter in letters)]
        known = set(pieces)
        by_count = sorted(zip(words, counts, strict=True), key=lambda item: (-item[1], item[0]))
        pieces += [word for word, _ in by_count if word not in known and len(word) <= _LONGEST]
        return cls(pieces[:_NUM_PIECES])

    def write(self, path: Path) -> None:
        """Write the vocabulary as BERT's."""
        path.write_text("\n".join(self.pieces) + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of the pieces of a text, without start."""
        return [number for word in basic_words(text) for number in self.encode_word(word)]

    def encode_word(self, word: str) -> list[int]:
        """Ids of the pieces of one word of `basic_words`; a single [UNK] if it cannot be spelt."""
        ids: list[int] = []
        begin = 0 if len(word) <= _LONGEST else len(word) + 1
        while begin < len(word):
            prefix = "##" if begin else ""
            ends = range(len(word), begin, -1)
            end = next((end for end in ends if prefix + word[begin:end] in self._id_of), None)
            if end is None:
                return self._unknown
            ids.append(self._id_of[prefix + word[begin:end]])
            begin = end
        return ids or self._unknown


def basic_words(text: str) -> list[str]:
    """Words of a text as BERT's uncased models have them: no accents, and each mark and each ideograph alone."""
    text = clean_text(text).lower()
    if not (text.isascii() and text.isprintable()):
        spelt = (each for each in unicodedata.normalize("NFD", text) if _is_seen(each))
        text = "".join(spelt)
    return _WORD.findall(text)


def _is_seen(letter: str) -> bool:
    """Neither an accent, nor a control character, nor half of something that was damaged."""
    return unicodedata.category(letter) not in ("Mn", "Cc", "Cf", "Co", "Cs") and letter != "\ufffd"
