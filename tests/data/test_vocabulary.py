"""Laws of the byte pair encoding. Oracle: open_clip's SimpleTokenizer with its own vocabulary."""

import gzip
from pathlib import Path

import pytest
from open_clip import SimpleTokenizer
from open_clip.tokenizer import default_bpe

from clipgraft.data.vocabulary import Encoder, clip_merges, is_same_vocabulary, write_merges
from clipgraft.data.words import split_words

# open_clip leaves its merges file to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

TEXTS = [
    "A small striped TEAL triangle, on the left!",
    "the dog's bone isn't here",
    "two  children\tplay football in 1984 &amp; laugh",
    "naïve café — ✨ 日本 &lt;b&gt;",
    "it\u2019s sheâ€™s",
    "internationalization antidisestablishmentarianism",
]


def encode(encoder, text):
    return [number for word in split_words(text) for number in encoder.encode_word(word)]


def test_our_encoder_is_clips():
    encoder, clip = Encoder(clip_merges()), SimpleTokenizer()
    assert [encode(encoder, text) for text in TEXTS] == [clip.encode(text) for text in TEXTS]
    assert (encoder.vocab_size, encoder.start_id, encoder.end_id) == (49408, 49406, 49407)


def test_special_tokens_cannot_be_smuggled_in_by_a_caption():
    encoder = Encoder(clip_merges())
    ids = encode(encoder, "<end_of_text> a <start_of_text>")
    assert max(ids) < encoder.start_id


def test_equal_merges_are_equal_bytes(tmp_path):
    for name in ("one.gz", "two.gz"):
        write_merges(tmp_path / name, [("a", "b"), ("ab", "c</w>")])
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    assert gzip.decompress((tmp_path / "one.gz").read_bytes()).split(b"\n")[1:] == [
        b"a b",
        b"ab c</w>",
    ]


def test_a_vocabulary_is_known_by_its_merges_not_by_its_file(tmp_path):
    ours, short, pieces = (tmp_path / name for name in ("merges.txt.gz", "short.gz", "vocab.txt"))
    write_merges(ours, clip_merges())
    write_merges(short, clip_merges()[:-1])
    pieces.write_text("[PAD]\n[UNK]\n[CLS]\n")
    clip = Path(default_bpe())
    assert is_same_vocabulary(ours, clip)
    assert is_same_vocabulary(pieces, pieces)
    assert not is_same_vocabulary(short, clip)
    assert not is_same_vocabulary(pieces, clip)
