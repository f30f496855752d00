"""Our vocabularies as files of Hugging Face's tokenizers.

Written as data, without that library. The pieces of a text are the same; what clipgraft and open_clip do to a text
before, mending Unicode (ftfy) and resolving HTML, is no part of those files: whoever has such texts cleans them first.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipgraft.data.vocabulary import read_merges
from clipgraft.data.wordpiece import WordPieces
from clipgraft.lean import open_clip

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def write_tokenizer(file: Path, text_length: int, out: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, and what older readers ask for.

    Args:
        file: of our tokenizer, merges or pieces.
        text_length: tokens of a text, with start and end.
        out: folder.
    """
    write = _write_pieces if file.name == WordPieces.file else _write_merges
    config = write(file, out)
    config |= {"model_max_length": text_length, "clean_up_tokenization_spaces": False}
    _write(out / "tokenizer_config.json", config)


def _write_merges(file: Path, out: Path) -> dict[str, Any]:
    merges = [" ".join(merge) for merge in read_merges(file)]
    *pieces, _, _ = _tokenizer(
        file
    ).encoder  # in the order of their ids; open_clip names the last two otherwise
    id_of = {piece: number for number, piece in enumerate([*pieces, START, END])}
    normal = [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": _WORD},
        "behavior": "Removed",
        "invert": True,
    }
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    about = {
        "normalizer": {"type": "Sequence", "normalizers": normal},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**as_bytes, "use_regex": False}],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, id_of[END]],
            "cls": [START, id_of[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {**as_bytes, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": id_of,
            "merges": merges,
        },
    }
    _write_json(out, about, {START: id_of[START], END: id_of[END]})
    _write(out / "vocab.json", id_of)
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    return {"tokenizer_class": "CLIPTokenizer", **names}


def _tokenizer(file: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its file to the collector
        return open_clip.SimpleTokenizer(bpe_path=str(file))


def _write_pieces(file: Path, out: Path) -> dict[str, Any]:
    pieces = WordPieces.read(file)
    id_of = {piece: number for number, piece in enumerate(pieces.pieces)}
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    names |= {"sep_token": "[SEP]"} if "[SEP]" in id_of else {}
    start = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    about = {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": True,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        # A start and no end, as CLIPA-v2's towers are trained.
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, second],
            "special_tokens": {
                "[CLS]": {"id": "[CLS]", "ids": [pieces.start_id], "tokens": ["[CLS]"]}
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": id_of,
        },
    }
    _write_json(out, about, {name: id_of[name] for name in sorted(set(names.values()))})
    return {"tokenizer_class": "PreTrainedTokenizerFast", **names}


def _write_json(out: Path, about: Mapping[str, Any], special: Mapping[str, int]) -> None:
    added = [
        {
            "id": number,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name, number in sorted(special.items(), key=lambda item: item[1])
    ]
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    _write(out / "tokenizer.json", {**head, **about})


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
