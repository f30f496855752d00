"""Laws of tokens. Oracle: open_clip's SimpleTokenizer, and each reduction for one caption in plain Python."""

import functools
import json
import random
from collections import Counter

import numpy as np
import pytest
from open_clip import SimpleTokenizer
from reduced import text_reduction

from clipgraft.config import ConfigError
from clipgraft.data import corpus
from clipgraft.data.corpus import write_tokens
from clipgraft.data.draws import as_uniform, draw_bits
from clipgraft.data.tokens import BEGINS, CLASS, Tokenizer, Tokens
from clipgraft.data.vocabulary import clip_merges, write_merges
from clipgraft.data.words import CLASSES, split_words, tag_words

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
        "internationalization antidisestablishmentarianism of the old dog",
        "&nbsp;",
    ],
]
KINDS = [["caption", "recaption"], ["caption"], ["long", "caption", "recaption", "recaption"]]
FLAT = [caption for several in CAPTIONS for caption in several]


@pytest.fixture(scope="module")
def clip():
    return SimpleTokenizer()


@pytest.fixture(scope="module", params=["corpus", "full"])
def index(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tokens(CAPTIONS, KINDS, request.param, "textblob", "abc", folder / "tokens")
    return folder


@pytest.fixture(scope="module")
def tokens(index):
    return Tokens.open(index)


def written(index, name):
    return np.load(index / "tokens" / f"{name}.npy")


def pieces(tokenizer, text):
    return [tokenizer.decoder[number] for number in tokenizer.encode(text)]


def bits(num, seed=0):
    return draw_bits(seed, np.arange(num), 0, 1)[:, 0]


# --- what is stored -----------------------------------------------------------------------------------------


def test_any_vocabulary_cuts_the_corpus_as_clip_does(index, clip):
    reduced = SimpleTokenizer(bpe_path=str(index / "tokens" / "merges.txt.gz"))
    assert [pieces(reduced, text) for text in FLAT] == [pieces(clip, text) for text in FLAT]


def test_a_corpus_vocabulary_has_only_merges_that_are_used(tokens, clip):
    full = tokens.vocab_size == 49408
    used = {piece for text in FLAT for piece in pieces(clip, text)}
    assert full or len(used) < tokens.vocab_size < 512 + 2 + 300
    assert SimpleTokenizer(bpe_path=str(tokens.tokenizer)).vocab_size == tokens.vocab_size


def test_words_outside_the_corpus_are_still_spelt_out(index):
    reduced = SimpleTokenizer(bpe_path=str(index / "tokens" / "merges.txt.gz"))
    assert reduced.decode(reduced.encode("Xylophonic quixotry Ω")) == "xylophonic quixotry ω "


def test_every_token_knows_its_word(index, clip):
    words = [word for text in FLAT for word in split_words(text)]
    sizes = [len(clip.encode(word)) for word in words]
    counts = Counter(words)
    frequency = [counts[word] for word, size in zip(words, sizes, strict=True) for _ in range(size)]
    assert counts["the"] == 3
    assert written(index, "frequency").tolist() == frequency
    begins = [i == 0 for size in sizes for i in range(size)]
    bits = written(index, "words")
    assert ((bits & BEGINS) > 0).tolist() == begins
    classes = tag_words("textblob", [split_words(text) for text in FLAT])
    np.testing.assert_array_equal(bits & CLASS, np.repeat(classes, sizes))
    assert {CLASSES[number] for number in classes} == set(CLASSES)


def test_the_first_sentence_ends_before_a_full_stop_and_a_space(tmp_path, clip):
    """Long-CLIP's short caption: text.split(". ")[0]; a mark that sticks to the stop belongs to it."""
    captions = {
        "A dog. It runs. It barks.": "A dog",
        "A dog runs.": "A dog runs.",
        "Version 3.5 of the U.S. flag. It is new": "Version 3.5 of the U.S",
        'She says "hi". Then she leaves': 'She says "hi".',
        ". A dog": ". A dog",
        "no stop at all": "no stop at all",
        "A cat &amp; a dog.  Two\tspaces. End": "A cat & a dog",
    }
    kinds = [["caption"]] * len(captions)
    write_tokens([[c] for c in captions], kinds, "full", "textblob", "abc", tmp_path / "tokens")
    tokens, everything = Tokens.open(tmp_path), np.arange(len(captions))
    length_B = tokens.first_sentence(everything)
    expected = [len(clip.encode(first)) for first in captions.values()]
    assert length_B.tolist() == expected
    np.testing.assert_array_equal(
        tokens.encode(everything, 30, length_B=length_B), clip(list(captions.values()), 30).numpy()
    )
    cut = tokens.encode(everything, 5, length_B=length_B)
    np.testing.assert_array_equal(cut, clip(list(captions.values()), 5).numpy())


def test_arrays_are_as_small_as_they_say(index):
    types = {
        "ids": np.uint16,
        "words": np.uint8,
        "frequency": np.uint32,
        "caption_offsets": np.int64,
        "caption_kinds": np.uint8,
        "sample_offsets": np.int64,
        "sentences": np.uint32,
    }
    for name, dtype in types.items():
        assert written(index, name).dtype == dtype
    assert written(index, "sample_offsets").tolist() == [0, 2, 3, 7]
    about = json.loads((index / "tokens" / "tokens.json").read_text())
    assert (about["samples_id"], about["tagger"]) == ("abc", "textblob")


def test_workers_and_chunks_change_no_byte(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    write_tokens(CAPTIONS, KINDS, "corpus", "textblob", "abc", one)
    monkeypatch.setattr(corpus, "_CHUNK", 2)
    monkeypatch.setattr(corpus, "_WORTH_A_WORKER", 1)
    write_tokens(CAPTIONS, KINDS, "corpus", "textblob", "abc", two, threads=2)
    assert len(list(one.iterdir())) == 9
    for path in one.iterdir():
        assert (two / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_index_without_tokens_says_so(tmp_path):
    with pytest.raises(ConfigError, match="has no tokens"):
        Tokens.open(tmp_path)


# --- encoding -----------------------------------------------------------------------------------------------


def test_truncated_captions_are_what_open_clip_would_feed_the_model(tokens):
    theirs = SimpleTokenizer(bpe_path=str(tokens.tokenizer))
    order = np.array([5, 0, 3, 6, 5, 1])
    for text_length in (3, 5, 12, 40):
        ours = tokens.encode(order, text_length)
        np.testing.assert_array_equal(ours, theirs([FLAT[i] for i in order], text_length).numpy())


REDUCTIONS = [
    text_reduction(raw)
    for raw in (
        "truncate",
        "random",
        "block",
        "syntax",
        {"kind": "syntax", "tie": "random"},
        {"kind": "syntax", "compat": "clipa"},
        {"kind": "frequency", "threshold": 0.1},
    )
]


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
def test_captions_that_fit_are_only_framed(tokens, reduction):
    everything = np.arange(len(FLAT))
    plain = tokens.encode(everything, 40)
    assert (plain == tokens.encode(everything, 40, reduction, bits(len(FLAT)))).all()
    short = (plain > 0).sum(axis=1) <= 9
    reduced = tokens.encode(everything, 9, reduction, bits(len(FLAT)))
    assert 0 < short.sum() < len(FLAT)
    np.testing.assert_array_equal(reduced[short], plain[short][:, :9])


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("text_length", [3, 5, 8])
def test_long_captions_keep_an_ordered_part_between_start_and_end(tokens, reduction, text_length):
    everything = np.arange(len(FLAT))
    plain = tokens.encode(everything, 40)
    for seed in range(20):
        rows = tokens.encode(everything, text_length, reduction, bits(len(FLAT), seed))
        assert rows.shape == (len(FLAT), text_length) and rows.dtype == np.int64
        for row, whole in zip(rows.tolist(), plain.tolist(), strict=True):
            end = row.index(tokens.end_id)
            assert row[0] == tokens.start_id and not any(row[end + 1 :])
            rest = iter(whole[1 : whole.index(tokens.end_id)])
            assert all(number in rest for number in row[1:end])
            # Syntax may leave room, where the next word does not fit; frequency drops what it drops.
            is_full = end == min(text_length - 1, whole.index(tokens.end_id))
            assert is_full or reduction.kind in ("syntax", "frequency")
            assert end > 1 or whole[1] == tokens.end_id


def test_block_is_one_piece_of_the_caption(tokens):
    whole = tokens.encode(np.zeros(50, int), 40)[0].tolist()
    starts = set()
    for row in tokens.encode(np.zeros(50, int), 5, text_reduction("block"), bits(50)).tolist():
        start = next(i for i in range(1, 40) if whole[i : i + 3] == row[1:4])
        starts.add(start)
    assert starts == set(range(1, whole.index(tokens.end_id) - 2))


SYNTAX = text_reduction("syntax")


def test_syntax_keeps_nouns_then_adjectives_then_verbs_in_the_order_of_the_caption(tokens):
    theirs = SimpleTokenizer(bpe_path=str(tokens.tokenizer))
    kept = {
        3: "triangle",
        4: "small triangle",
        6: "small striped teal triangle",
        7: "small striped teal triangle left",
        9: "a small striped teal triangle, left",
    }
    for text_length, text in kept.items():
        np.testing.assert_array_equal(
            tokens.encode(np.array([0]), text_length, SYNTAX), theirs(text, text_length).numpy()
        )
    # `antidisestablishmentarianism` has more pieces than there is room for; `dog` has not.
    long = tokens.encode(np.array([5]), 6, SYNTAX)
    expected = theirs("internationalization old dog", 6).numpy()
    np.testing.assert_array_equal(long, expected)


@pytest.mark.parametrize("text_length", [4, 6, 9, 14])
def test_published_syntax_is_open_clips_with_our_words_and_a_stable_sort(
    tokens, monkeypatch, text_length
):
    import nltk
    import open_clip.tokenizer

    def tags(words):
        penn = ("NNS", "JJ", "VBD", "IN")
        return [(w, penn[c]) for w, c in zip(words, tag_words("textblob", [words]), strict=True)]

    theirs = SimpleTokenizer(bpe_path=str(tokens.tokenizer), reduction_mask="syntax")
    monkeypatch.setattr(open_clip.tokenizer, "_nltk_init", True)  # or it would download
    monkeypatch.setattr(nltk.tokenize, "word_tokenize", split_words)
    monkeypatch.setattr(nltk, "pos_tag", tags)
    monkeypatch.setattr(np, "argsort", functools.partial(np.argsort, kind="stable"))
    captions = [i for i, text in enumerate(FLAT) if split_words(text)]  # theirs fails on others
    expected = theirs([FLAT[i] for i in captions], text_length).numpy()
    published = text_reduction({"kind": "syntax", "compat": "clipa"})
    monkeypatch.undo()
    np.testing.assert_array_equal(
        tokens.encode(np.array(captions), text_length, published), expected
    )


def test_words_are_dropped_as_often_as_their_share_of_the_corpus_says(tokens, index):
    # Of the words of the first caption, each may stay with sqrt(t / share), counted here in plain Python.
    words = [word for text in FLAT for word in split_words(text)]
    count, own = Counter(words), split_words(FLAT[0])
    assert tokens.num_words == len(words)
    threshold, num = 0.01, 4000
    how = text_reduction({"kind": "frequency", "threshold": threshold})
    ids = tokens.encode(np.array([0]), 40)[0].tolist()[1 : len(own) + 1]
    rows = tokens.encode(np.zeros(num, int), len(own) + 1, how, bits(num))
    for word, number in zip(own, ids, strict=True):
        if own.count(word) == 1:
            expected = min(1, (threshold * len(words) / count[word]) ** 0.5)
            assert (rows == number).any(axis=1).mean() == pytest.approx(expected, abs=0.04)


def test_tokenizer_is_open_clips(clip, tmp_path):
    write_merges(tmp_path / "m.gz", clip_merges())
    ours = Tokenizer(tmp_path / "m.gz")
    odd = [
        "it's",
        "don\u2019t &amp; won't",
        "A\tB\n c!!12",
        "",
        "&lt;b&gt;",
        "\u4f60\u597d e\u0301 \U0001f600",
    ]
    texts = [*FLAT, *odd, "<end_of_text> of a <start_of_text>", *FLAT]
    np.testing.assert_array_equal(ours.encode_batch(texts, 10), clip(texts, 10).numpy())
    assert ours.encode_batch([], 10).shape == (0, 10)


# --- choosing among captions --------------------------------------------------------------------------------


def shares(tokens, row, weights, num=4000):
    rows = np.full(num, row)
    chosen = tokens.choose(rows, (np.arange(num) + 0.5) / num, weights)
    assert chosen.dtype == np.int64
    return {int(caption): count / num for caption, count in Counter(chosen.tolist()).items()}


def test_all_captions_of_a_sample_come_alike(tokens):
    assert shares(tokens, 0, {}) == {0: 0.5, 1: 0.5}
    assert shares(tokens, 2, {}) == {3: 0.25, 4: 0.25, 5: 0.25, 6: 0.25}


def test_kinds_come_as_often_as_their_weights_say(tokens):
    assert shares(tokens, 0, {"caption": 1, "recaption": 3}) == {0: 0.25, 1: 0.75}
    every = {"long": 2, "caption": 1, "recaption": 1}
    assert shares(tokens, 2, every) == {3: 0.5, 4: 0.25, 5: 0.125, 6: 0.125}


def test_kinds_that_a_sample_lacks_leave_their_share_to_the_others(tokens):
    assert shares(tokens, 1, {"recaption": 9, "caption": 1}) == {2: 1.0}
    assert shares(tokens, 0, {"long": 5, "recaption": 1, "caption": 1}) == {0: 0.5, 1: 0.5}


def test_kinds_without_weight_are_never_drawn(tokens):
    assert shares(tokens, 2, {"long": 1}) == {3: 1.0}
    assert shares(tokens, 2, {"long": 0, "recaption": 1}) == {5: 0.5, 6: 0.5}
    edges = np.array([0.0, 1 - 2**-53])
    assert tokens.choose(np.array([2, 2]), edges, {"caption": 0.3}).tolist() == [4, 4]


def test_a_choice_does_not_depend_on_its_batch(tokens):
    rows = np.array(random.Random(0).choices(range(3), k=200))
    uniform, weights = as_uniform(bits(200)), {"caption": 0.1, "recaption": 0.7, "long": 0.2}
    together = tokens.choose(rows, uniform, weights)
    apart = [tokens.choose(rows[i : i + 1], uniform[i : i + 1], weights)[0] for i in range(200)]
    assert together.tolist() == apart


def test_an_unknown_kind_names_those_there_are(tokens):
    message = "no captions of kind `recaptoin`, only caption, long, recaption. Hint"
    for call in (
        lambda weights: tokens.choose(np.array([0]), np.array([0.5]), weights),
        tokens.check_weights,
    ):
        with pytest.raises(ConfigError, match=message):
            call({"caption": 1, "recaptoin": 1})


def test_a_sample_without_a_caption_to_draw_is_found_before_training(tokens):
    message = r"1 of 3 samples .* sample 1, which has caption\. Hint: give caption a weight"
    with pytest.raises(ConfigError, match=message):
        tokens.check_weights({"recaption": 1})
    with pytest.raises(ConfigError, match=r"1 of 2 samples .* sample 1, which has caption"):
        tokens.choose(np.array([0, 1]), np.array([0.5, 0.5]), {"recaption": 1, "caption": 0})
    tokens.check_weights({"recaption": 1, "caption": 1e-9})
    tokens.check_weights({})


def test_captions_of_a_sample_follow_each_other(tokens):
    first, count = tokens.captions_of(np.array([2, 0]))
    assert (first.tolist(), count.tolist()) == ([3, 0], [4, 2])
