"""Laws of WordPiece. Oracles: the examples of BERT's own tests, and a plain search for the longest piece."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from reduced import text_reduction

from clipgraft.config import ConfigError
from clipgraft.data.corpus import write_tokens
from clipgraft.data.draws import draw_bits
from clipgraft.data.shapes import draw_sample
from clipgraft.data.tokens import BEGINS, CLASS, Tokenizer, Tokens
from clipgraft.data.wordpiece import WordPieces, basic_words
from clipgraft.data.words import CLASSES, tag_words

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CAPTIONS = [
    ["A small striped TEAL triangle, on the left!", "the dog's bone isn't here"],
    ["two  children\tplay football in 1984 &amp; laugh"],
    ["na\u00efve caf\u00e9 \u65e5\u672c", "the old dog plays with the small old dog"],
]
KINDS = [["caption", "caption"], ["caption"], ["caption", "caption"]]
FLAT = [caption for several in CAPTIONS for caption in several]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    write_tokens(CAPTIONS, KINDS, "wordpiece", "textblob", "abc", folder / "tokens")
    return folder


@pytest.fixture(scope="module")
def tokens(index):
    return Tokens.open(index)


def spelt(pieces: WordPieces, text: str) -> list[str]:
    return [pieces.pieces[number] for number in pieces.encode(text)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" \tHeLLo!how  \n Are yoU?  ", "hello ! how are you ?"),
        ("H\u00e9llo", "hello"),
        ("ah\u535a\u63a8zz", "ah \u535a \u63a8 zz"),
        ("UNwant\u00e9d,running", "unwanted , running"),
        ("a-b_c $5 don't", "a - b _ c $ 5 don ' t"),
        ("in 1984 &lt;b&gt; ca\u00adfe\u200b", "in 1984 < b > cafe"),
        ("[CLS] [PAD]", "[ cls ] [ pad ]"),
        (" \n&nbsp;", ""),
    ],
)
def test_words_are_those_of_bert(text, words):
    assert basic_words(text) == words.split()


def test_pieces_are_those_of_berts_examples():
    known = "want ##want ##ed wa un runn ##ing , ##aff ##able".split()
    pieces = WordPieces([*SPECIAL, *known])
    assert spelt(pieces, "UNwant\u00e9d,running") == "un ##want ##ed , runn ##ing".split()
    assert spelt(pieces, "unaffable") == "un ##aff ##able".split()
    # A word that cannot be spelt to its end is unknown as a whole, and so is one that is too long.
    assert spelt(pieces, "unwantedX running") == ["[UNK]", "runn", "##ing"]
    assert spelt(pieces, "un" + "want" * 25) == ["[UNK]"]
    assert spelt(pieces, "") == []


def longest_first(known: set[str], word: str) -> list[str] | None:
    """Pieces of a word by trying each length anew; None if it cannot be spelt."""
    rest, found = word, []
    while rest:
        fitting = [n for n in range(1, len(rest) + 1) if ("##" * bool(found)) + rest[:n] in known]
        if not fitting:
            return None
        found.append(("##" * bool(found)) + rest[: max(fitting)])
        rest = rest[max(fitting) :]
    return found


def test_the_longest_piece_is_taken_from_left_to_right():
    rng = random.Random(0)
    for _ in range(50):
        parts = ["".join(rng.choices("abc", k=rng.randint(1, 3))) for _ in range(12)]
        known = {part if rng.random() < 0.5 else "##" + part for part in parts}
        pieces = WordPieces([*SPECIAL, *sorted(known)])
        for _ in range(20):
            word = "".join(rng.choices("abc", k=rng.randint(1, 8)))
            assert spelt(pieces, word) == (longest_first(known, word) or ["[UNK]"]), (known, word)


def test_a_made_vocabulary_has_the_corpus_whole_and_spells_the_rest(index, tokens):
    pieces = WordPieces.read(tokens.tokenizer)
    words = {word for text in FLAT for word in basic_words(text)}
    assert all(len(pieces.encode_word(word)) == 1 for word in words)
    assert spelt(pieces, "dogs Quiz 7!") == "dog ##s q ##u ##i ##z 7 !".split()
    assert spelt(pieces, "\u03a9") == ["[UNK]"]
    assert pieces.vocab_size == tokens.vocab_size == len(set(pieces.pieces))


def test_equal_captions_make_equal_vocabularies_whatever_their_order(tmp_path):
    counts = Counter(word for text in FLAT for word in basic_words(text))
    for seed in range(3):
        items = random.Random(seed).sample(sorted(counts.items()), len(counts))
        WordPieces.of_words(*zip(*items, strict=True)).write(tmp_path / str(seed))
    contents = [(tmp_path / str(seed)).read_bytes() for seed in range(3)]
    assert contents[0] == contents[1] == contents[2]
    assert contents[0].startswith(b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n!\n")


def test_a_made_vocabulary_is_no_larger_than_berts():
    words = [f"w{number}" for number in range(40_000)]
    pieces = WordPieces.of_words(words, list(range(40_000)))
    assert pieces.vocab_size == 30_522
    assert len(pieces.encode_word("w39999")) == 1 < len(pieces.encode_word("w7"))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (["[UNK]", "[PAD]", "[CLS]"], r"\[PAD\] as the first"),
        (["[PAD]", "a"], r"2 pieces, \[UNK\], \[CLS\] is not"),
    ],
)
def test_files_that_are_no_vocabulary_are_named(tmp_path, pieces, message):
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    with pytest.raises(ConfigError, match=message):
        WordPieces.read(tmp_path / "vocab.txt")
    with pytest.raises(ConfigError, match=r"nothing.txt cannot be read"):
        WordPieces.read(tmp_path / "nothing.txt")


def test_a_given_vocabulary_is_taken_as_it_is(tmp_path):
    known = [*SPECIAL, "the", "dog", "##s", *"abcdefghijklmnopqrstuvwxyz"]
    text = "\n".join(known) + "\n"
    (tmp_path / "given.txt").write_text(text)
    write_tokens(
        CAPTIONS,
        KINDS,
        "wordpiece",
        "textblob",
        "abc",
        tmp_path / "tokens",
        1,
        tmp_path / "given.txt",
    )
    assert (tmp_path / "tokens" / "vocab.txt").read_text() == text
    about = json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    assert (about["vocab_size"], about["start_id"], about["end_id"]) == (len(known), 2, None)


# --- rows of a batch ----------------------------------------------------------------------------------------


def test_rows_are_a_start_the_pieces_and_zeros(tokens):
    pieces = WordPieces.read(tokens.tokenizer)
    for text_length in (3, 5, 8, 24):
        rows = tokens.encode(np.arange(len(FLAT)), text_length)
        for row, text in zip(rows.tolist(), FLAT, strict=True):
            ids = [pieces.start_id, *pieces.encode(text)][:text_length]
            assert row == ids + [0] * (text_length - len(ids))
        np.testing.assert_array_equal(
            rows, Tokenizer(tokens.tokenizer).encode_batch(FLAT, text_length)
        )


@pytest.mark.parametrize("reduction", ["random", "block", "syntax"])
def test_reductions_fill_all_places_but_the_first(tokens, reduction):
    whole = tokens.encode(np.arange(len(FLAT)), 24)
    for seed in range(20):
        bits = draw_bits(seed, np.arange(len(FLAT)), 0, 1)[:, 0]
        rows = tokens.encode(np.arange(len(FLAT)), 6, text_reduction(reduction), bits)
        for row, before in zip(rows.tolist(), whole.tolist(), strict=True):
            assert row[0] == tokens.start_id
            rest = iter(before[1:])
            assert all(number in rest for number in row[1:] if number)
            kept = sum(number > 0 for number in row)
            assert kept == min(6, sum(number > 0 for number in before))


def test_syntax_keeps_nouns_first_and_whole_words(tokens):
    pieces = WordPieces.read(tokens.tokenizer)
    row = tokens.encode(np.array([4]), 5, text_reduction("syntax"))[0]
    assert [pieces.pieces[number] for number in row] == "[CLS] old dog small dog".split()


def test_every_token_knows_its_word(index):
    split = [basic_words(text) for text in FLAT]
    pieces = WordPieces.read(index / "tokens" / "vocab.txt")
    sizes = [len(pieces.encode_word(word)) for words in split for word in words]
    bits = np.load(index / "tokens" / "words.npy")
    assert ((bits & BEGINS) > 0).tolist() == [i == 0 for size in sizes for i in range(size)]
    np.testing.assert_array_equal(bits & CLASS, np.repeat(tag_words("textblob", split), sizes))


def test_contractions_are_no_nouns():
    for caption, nouns in (
        ("he isn't here", set()),
        ("the dog's bone", {"dog", "bone"}),
        ("we don't know what she's doing", set()),
    ):
        words = basic_words(caption)
        found = zip(words, tag_words("textblob", [words]), strict=True)
        assert {word for word, number in found if CLASSES[number] == "noun"} == nouns, caption


def test_captions_of_the_built_in_data_are_words_of_one_piece(tmp_path):
    captions = [
        draw_sample(0, "train", i, image_size=8, num_captions=2).captions for i in range(30)
    ]
    kinds = [["caption"] * 2] * 30
    write_tokens(captions, kinds, "wordpiece", "textblob", "abc", tmp_path / "tokens")
    words = [len(basic_words(caption)) for several in captions for caption in several]
    assert np.diff(np.load(tmp_path / "tokens" / "caption_offsets.npy")).tolist() == words
