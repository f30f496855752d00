"""Laws of tokens. Oracle: open_clip's SimpleTokenizer with its own vocabulary."""

import gzip

import numpy as np
import pytest
from open_clip import SimpleTokenizer

from clipgraft.config import ConfigError
from clipgraft.data.tokens import (
    Encoder,
    Tokenizer,
    Tokens,
    clip_merges,
    truncate,
    write_merges,
    write_tokens,
)

# open_clip leaves its merges file to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

CAPTIONS = [
    ["A small striped TEAL triangle, on the left!", "the dog's bone isn't here"],
    ["two  children\tplay football in 1984 &amp; laugh"],
    [
        "naïve café — ✨ 日本 &lt;b&gt;",
        "it\u2019s sheâ€™s",
        "internationalization antidisestablishmentarianism",
    ],
]
FLAT = [caption for several in CAPTIONS for caption in several]


@pytest.fixture(scope="module")
def clip():
    return SimpleTokenizer()


@pytest.fixture(scope="module", params=["corpus", "full"])
def index(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tokens(CAPTIONS, request.param, "abc", folder / "tokens")
    return folder


def pieces(tokenizer, text):
    return [tokenizer.decoder[number] for number in tokenizer.encode(text)]


def test_our_encoder_is_clips(clip):
    encoder = Encoder(clip_merges())
    assert [encoder.encode(text) for text in FLAT] == [clip.encode(text) for text in FLAT]
    assert (encoder.vocab_size, encoder.start_id, encoder.end_id) == (49408, 49406, 49407)


def test_any_vocabulary_cuts_the_corpus_as_clip_does(index, clip):
    reduced = SimpleTokenizer(bpe_path=str(index / "tokens" / "merges.txt.gz"))
    assert [pieces(reduced, text) for text in FLAT] == [pieces(clip, text) for text in FLAT]


def test_a_corpus_vocabulary_has_only_merges_that_are_used(index, clip):
    tokens = Tokens.open(index)
    full = tokens.vocab_size == 49408
    used = {piece for text in FLAT for piece in pieces(clip, text)}
    assert full or len(used) < tokens.vocab_size < 512 + 2 + 300
    assert SimpleTokenizer(bpe_path=str(tokens.merges)).vocab_size == tokens.vocab_size


def test_words_outside_the_corpus_are_still_spelt_out(index):
    reduced = SimpleTokenizer(bpe_path=str(index / "tokens" / "merges.txt.gz"))
    assert reduced.decode(reduced.encode("Xylophonic quixotry Ω")) == "xylophonic quixotry ω "


def test_stored_ids_are_what_open_clip_would_feed_the_model(index):
    tokens = Tokens.open(index)
    theirs = SimpleTokenizer(bpe_path=str(tokens.merges))
    rows, choice = np.array([2, 0, 1, 2]), np.array([1, 1, 0, 5])
    chosen = ["it\u2019s sheâ€™s", "the dog's bone isn't here", CAPTIONS[1][0], CAPTIONS[2][2]]
    for text_length in (5, 12, 40):
        ours = tokens.batch(rows, text_length, choice)
        np.testing.assert_array_equal(ours, theirs(chosen, text_length).numpy())


def test_tokenizer_is_open_clips(clip, tmp_path):
    write_merges(tmp_path / "m.gz", clip_merges())
    ours = Tokenizer(tmp_path / "m.gz").encode_batch(FLAT, 10)
    np.testing.assert_array_equal(ours, clip(FLAT, 10).numpy())


def test_special_tokens_cannot_be_smuggled_in_by_a_caption():
    encoder = Encoder(clip_merges())
    ids = encoder.encode("<end_of_text> a <start_of_text>")
    assert max(ids) < encoder.start_id


def test_truncation_keeps_the_beginning_and_both_ends():
    ids = truncate([[1, 2, 3, 4], [], [5]], 5, 8, 9)
    np.testing.assert_array_equal(ids, [[8, 1, 2, 3, 9], [8, 9, 0, 0, 0], [8, 5, 9, 0, 0]])
    assert truncate([], 5, 8, 9).shape == (0, 5)


def test_equal_merges_are_equal_bytes(tmp_path):
    for name in ("one.gz", "two.gz"):
        write_merges(tmp_path / name, [("a", "b"), ("ab", "c</w>")])
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    assert gzip.decompress((tmp_path / "one.gz").read_bytes()).split(b"\n")[1:] == [
        b"a b",
        b"ab c</w>",
    ]


def test_an_index_without_tokens_says_so(tmp_path):
    with pytest.raises(ConfigError, match="has no tokens"):
        Tokens.open(tmp_path)
