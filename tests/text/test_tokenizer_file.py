"""text/tokenizer_file.py: files that are damaged, too large or hostile, through `Tokenizer`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chats import NANO, TOKENIZER

from sfumato.errors import CheckpointError, InputError
from sfumato.text.tokenizer import Tokenizer


def folder(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    return tmp_path


NANO_JSON = (NANO / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[" * 100_000,
        '{"model": 1}',
        NANO_JSON[: len(NANO_JSON) // 2],
        NANO_JSON.replace('"type": "ByteFallback"', '"type": "Nonsense"'),
        NANO_JSON.replace('"type": "ByteFallback"', '"type": "Metaspace"'),
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
    ],
)
def test_damaged_tokenizer_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder(tmp_path, tokenizer=text))
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("decoder", "why"),
    [
        (None, "decodes with nothing"),
        ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, "ByteLevel"),
        ({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}, r"Fuse \+ ByteFallback"),
    ],
)
def test_another_decoder_is_refused(tmp_path: Path, decoder: Any, why: str) -> None:
    changed = json.loads(NANO_JSON) | {"decoder": decoder}
    with pytest.raises(CheckpointError, match=f"tokenizer.json: the tokenizer.*{why}"):
        Tokenizer.from_folder(folder(tmp_path, tokenizer=json.dumps(changed)))


def test_missing_unreadable_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json: No such file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not UTF-8"):
        Tokenizer.from_folder(tmp_path)
    for config, why in (("{", "JSON"), ("[]", "object"), ('{"eos_token": "<end>"}', "names the eos_token '<end>'")):
        with pytest.raises(CheckpointError, match=f"tokenizer_config.json.*{why}"):
            Tokenizer.from_folder(folder(tmp_path, tokenizer=NANO_JSON, tokenizer_config=config))


def test_too_large_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.text.tokenizer_file.MAX_FILE_BYTES", 1000)
    with pytest.raises(CheckpointError, match="more than the 1000 allowed"):
        Tokenizer.from_file(NANO / "tokenizer.json")


def test_special_names_in_either_spelling(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<turn|>"}, "bos_token": None, "extra_special_tokens": {"sot_token": "<|turn>"}}
    loaded = Tokenizer.from_folder(folder(tmp_path, tokenizer=NANO_JSON, tokenizer_config=json.dumps(config)))
    assert loaded.special == {"eos_token": "<turn|>", "sot_token": "<|turn>"}
    assert loaded.special_id("eos_token") == 5
    alone = Tokenizer.from_file(NANO / "tokenizer.json")
    assert alone.special == TOKENIZER.special


# --- what a tokenizer.json may do ---


def changed(tmp_path: Path, **parts: Any) -> Path:
    return folder(tmp_path, tokenizer=json.dumps(json.loads(NANO_JSON) | parts))


def sequence(*stages: Any, of: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", of: list(stages)}


def replacing(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def splitting(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
AGAIN: dict[str, Any] = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
AGAIN["single"] = [{"Sequence": {"id": "A", "type_id": 0}}] * 9


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"normalizer": replacing(" ", "▁" * (1 << 20))}, "normalizer and pre-tokenizer can make a text more than 16"),
        ({"normalizer": sequence(*[replacing("a", "aa")] * 40)}, "normalizer and pre-tokenizer can make a text"),
        ({"normalizer": replacing("", "x" * 20)}, "can make a text"),
        ({"normalizer": replacing("a*", "x" * 20, "Regex")}, "can make a text"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 100}}, "can make a text"),
        ({"normalizer": sequence(*[{"type": "NFKC"}] * 2)}, "can make a text"),
        ({"pre_tokenizer": sequence(*[METASPACE] * 3, of="pretokenizers")}, "can make a text"),
        ({"pre_tokenizer": sequence(*[BYTES] * 40, of="pretokenizers")}, "can make a text"),
        ({"normalizer": sequence(sequence(replacing("a", "a" * 9)), replacing("b", "aa"))}, "can make a text"),
        ({"post_processor": AGAIN}, "can make a text"),
        (
            {"decoder": sequence(replacing("▁", " " * 99), {"type": "Fuse"}, of="decoders")},
            "its decoder can",
        ),
        ({"normalizer": sequence(*[replacing("a", "b")] * 99)}, "stages, more than the 64 allowed"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "stage 'Precompiled' is not known"),
        ({"pre_tokenizer": splitting("a|" * 3000)}, "has 6000 characters and counts to 1; at most 4096"),
        ({"pre_tokenizer": splitting("((a{1,999}){999}){999}")}, "counts to 997002999; at most 4096 and 10000"),
        ({"pre_tokenizer": splitting("a{99999999999999}")}, "counts to 999999999;"),
        ({"normalizer": replacing("(a{101}){100}", "", "Regex")}, "counts to 10100;"),
        ({"added_tokens": [{"id": 0, "content": "x" * 5000}]}, r"'xxxxxxxxxxxxxxxxxxxx'… has 5000 characters"),
        ({"model": {"type": "BPE", "vocab": {"y" * 4097: 0}, "merges": []}}, "has 4097 characters, more than the 4096"),
        ({"model": {"type": "Unigram", "vocab": [["z" * 4097, 0.5]]}}, "has 4097 characters"),
        ({"model": {"type": "BPE", "continuing_subword_prefix": "w" * 5000, "vocab": {}}}, "has 5000 characters"),
    ],
)
def test_a_tokenizer_that_could_end_the_process_is_refused(tmp_path: Path, parts: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "tokenizer.json")) + ".*" + why) as caught:
        Tokenizer.from_folder(changed(tmp_path, **parts))
    assert len(str(caught.value)) < 500


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """The library would compile both."""
    twice = NANO_JSON.replace('"normalizer":', '"normalizer": null, "normalizer":')
    with pytest.raises(CheckpointError, match="names something twice"):
        Tokenizer.from_folder(folder(tmp_path, tokenizer=twice))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": sequence({"type": "NFC"}, replacing(" ", "▁"))},
        {"normalizer": sequence({"type": "Prepend", "prepend": "▁"}, replacing(" ", "▁"))},
        {"normalizer": replacing(" {2,}", "▁", "Regex")},
        {"pre_tokenizer": splitting(r"\p{N}{1,3}|[\x{3040}-\x{309F}]+|[^\r\n]?\p{L}+|\s+(?!\S)")},
        {"normalizer": None, "pre_tokenizer": None},
    ],
)
def test_a_usual_tokenizer_is_read(tmp_path: Path, parts: dict[str, Any]) -> None:
    assert Tokenizer.from_folder(changed(tmp_path, **parts)).encode("Solve this 123")


def test_a_vocabulary_in_lists_has_tokens_of_bounded_length() -> None:
    with pytest.raises(CheckpointError, match="has 4097 characters"):
        Tokenizer.from_vocabulary(["<unk>", "x" * 4097], [3, 1], [])


def test_a_panic_of_the_library_is_an_input_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`(a+)+$` runs into the limit of the library for patterns, at which it panics; what follows is served."""
    tokenizer = Tokenizer.from_folder(changed(tmp_path, pre_tokenizer=splitting("(a+)+$")))
    for _ in range(2):
        with pytest.raises(InputError, match=r"the tokenizer fails here: Onig: .*retry-limit.*; give another text, or"):
            tokenizer.encode("a" * 60 + "b")
        assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    capfd.readouterr()  # the library writes there too
