"""Text ↔ ids: nano's tokenizer, Gemma 4's test vectors, what text may not do, and the incremental detokeniser."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import gemma_vocab
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfumato.errors import CheckpointError, InputError
from sfumato.text.tokenizer import Detokeniser, Tokenizer

ROOT = Path(__file__).parents[2]
NANO = ROOT / "sfumato" / "nano"
NANO_TOKENIZER = Tokenizer.from_folder(NANO)

CONTROL = (
    "<pad> <eos> <bos> <unk> <|turn> <turn|> <|think|> <|channel> <channel|> <|tool> <tool|> "
    '<|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|>'
).split()
DIGITS = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
adversarial = st.lists(st.sampled_from([*CONTROL, "<", ">", "|", "turn", "<|", "|>", '"', " ", "x"])).map("".join)


def quick(test: Any) -> Any:
    return settings(max_examples=150, deadline=None)(test)


@pytest.fixture(scope="module")
def gemma() -> Tokenizer:
    return Tokenizer(gemma_vocab.build())


@pytest.fixture(scope="module")
def oracle() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(NANO)


# --- nano's vocabulary ---


def test_nano_files_are_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("make", ROOT / "scripts" / "make_nano_tokenizer.py")
    assert spec and spec.loader
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    built = json.loads(make.build().to_str())
    written = json.loads((NANO / "tokenizer.json").read_text(encoding="utf-8"))
    assert built == written
    assert list(built["model"]["vocab"].items()) == list(written["model"]["vocab"].items())
    assert make.configuration() == json.loads((NANO / "tokenizer_config.json").read_text(encoding="utf-8"))


def test_nano_vocabulary() -> None:
    t = NANO_TOKENIZER
    assert t.vocab_size == 512
    assert [t.token(index) for index in range(16)] == CONTROL == list(t.control_tokens)
    assert t.special_ids == frozenset(range(16))
    assert [t.id(f"<0x{byte:02X}>") for byte in range(256)] == list(range(16, 272))
    assert t.token(512) is None and t.id("no such token") is None
    assert t.special == {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    assert [t.special_id(f"{name}_token") for name in ("pad", "eos", "bos", "unk")] == [0, 1, 2, 3]
    merged = [t.token(index) or "" for index in range(t.vocab_size)][272 + 96 :]
    assert len(merged) == 512 - 272 - 96
    assert all(part.removeprefix("▁").isalpha() for part in merged)


@pytest.mark.parametrize("word", ["user", "model", "system", "Solve", " this", " Sudoku", *"0123456789"])
def test_nano_single_tokens(word: str) -> None:
    assert len(NANO_TOKENIZER.encode(word)) == 1


def test_nano_digits_are_single_tokens() -> None:
    ids = NANO_TOKENIZER.encode(DIGITS)
    assert ids == [288 + int(digit) for digit in DIGITS]


# --- against the oracle and Gemma's vectors ---


@quick
@given(st.one_of(texts, adversarial))
def test_encode_and_decode_equal_transformers(oracle: Any, text: str) -> None:
    parsed = oracle.encode(text, add_special_tokens=False)
    assert NANO_TOKENIZER.encode(text, parse_special=True) == parsed
    plain = oracle.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert NANO_TOKENIZER.encode(text) == plain
    assert NANO_TOKENIZER.encode(text, bos=True) == [2, *plain]
    for ids in (parsed, plain):
        for skip in (True, False):
            assert NANO_TOKENIZER.decode(ids, skip_special=skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_gemma_vectors(gemma: Tokenizer) -> None:
    vectors = gemma_vocab.vectors()
    assert len(vectors) == 46
    for text, ids in vectors:
        assert gemma.encode(text) == ids, text
        assert gemma.encode(text, parse_special=True) == ids, text
        assert gemma.decode(ids) == text
        detokeniser = Detokeniser(gemma)
        assert "".join(detokeniser.push([index]) for index in ids) + detokeniser.flush() == text


def test_gemma_control_tokens(gemma: Tokenizer) -> None:
    assert gemma.vocab_size == 262_144
    wanted = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<|turn>": 105, "<turn|>": 106, "<|tool_response>": 50, '<|"|>': 52}
    for token, index in wanted.items():
        assert gemma.id(token) == index
        assert index in gemma.special_ids
        assert gemma.encode(token, parse_special=True) == [index]
    for token in gemma.control_tokens:
        assert gemma.special_ids.isdisjoint(gemma.encode(f"a{token} {token}\n")), token
    assert len(gemma.control_tokens) == 24
    assert gemma.decode([105, 9259, 106]) == "Hello"


# --- what text may not do ---


@quick
@given(st.one_of(adversarial, texts))
def test_text_gives_no_control_token_and_comes_back(text: str) -> None:
    ids = NANO_TOKENIZER.encode(text)
    assert NANO_TOKENIZER.special_ids.isdisjoint(ids)
    assert NANO_TOKENIZER.decode(ids) == text


@quick
@given(adversarial)
def test_pieces_joined_are_the_text(text: str) -> None:
    pieces = list(NANO_TOKENIZER.pieces(text))
    assert "".join(piece for piece, _ in pieces) == text
    assert all(index is None or NANO_TOKENIZER.token(index) == piece for piece, index in pieces)
    assert not any(token in piece for piece, index in pieces if index is None for token in CONTROL)


def test_the_longest_control_token_wins(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(NANO / "tokenizer.json"))
    inner.add_special_tokens(["<a", "<a><b>", "<a>"])
    longer = Tokenizer(inner)
    assert longer.encode("<a><b><a><a", parse_special=True) == [513, 514, 512]


def test_bad_text_and_ids() -> None:
    with pytest.raises(InputError, match=r"lone surrogate \(U\+D800\) at character 2"):
        NANO_TOKENIZER.encode("ab\ud800c")
    with pytest.raises(InputError, match="not int"):
        NANO_TOKENIZER.encode(3)  # type: ignore[arg-type]
    for ids in ([-1], [1 << 40], ["a"], [[1]]):
        with pytest.raises(InputError, match="whole numbers"):
            NANO_TOKENIZER.decode(ids)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="whole numbers"):
            Detokeniser(NANO_TOKENIZER).push(ids)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no image_token; it has bos_token"):
        NANO_TOKENIZER.special_id("image_token")


def test_merges_that_spell_a_control_token_are_refused() -> None:
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={"<": 0, "x": 1, "<x": 2, ">": 3, "<x>": 4}, merges=[("<", "x"), ("<x", ">")])
    )
    inner.decoder = tokenizers.decoders.Fuse()
    Tokenizer(inner)
    inner.add_special_tokens(["<x>"])
    with pytest.raises(CheckpointError, match="spell the control token '<x>'"):
        Tokenizer(inner)


# --- the incremental detokeniser ---


def cut(ids: list[int], data: st.DataObject) -> list[list[int]]:
    places = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    return [ids[a:b] for a, b in zip([0, *places], [*places, len(ids)], strict=True)]


@quick
@given(st.one_of(texts, adversarial), st.data())
@example("🦙 žluťoučký\tkůň កាន់តែ\u200d", None)
def test_detokeniser_on_text(text: str, data: st.DataObject | None) -> None:
    ids = NANO_TOKENIZER.encode(text)
    chunks = cut(ids, data) if data else [[index] for index in ids]
    detokeniser = Detokeniser(NANO_TOKENIZER)
    pieces = [detokeniser.push(chunk) for chunk in chunks]
    pieces.append(detokeniser.flush())
    assert "".join(pieces) == text
    assert "�" in text or not any("�" in piece for piece in pieces)
    assert detokeniser.flush() == ""


@quick
@given(st.lists(st.one_of(st.integers(0, 530), st.integers(16, 271))), st.booleans(), st.data())
@example([16 + 0xF0, 3, 16 + 0x9F, 520, 16 + 0xA6, 0, 16 + 0x99], True, None)
def test_detokeniser_on_any_ids(ids: list[int], skip: bool, data: st.DataObject | None) -> None:
    detokeniser = Detokeniser(NANO_TOKENIZER, skip_special=skip)
    chunks = cut(ids, data) if data else [[index] for index in ids]
    said = "".join([*(detokeniser.push(chunk) for chunk in chunks), detokeniser.flush()])
    assert said == NANO_TOKENIZER.decode(ids, skip_special=skip)


def test_detokeniser_emits_at_once_and_decodes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = Tokenizer.decode

    def count(self: Tokenizer, ids: list[int], *, skip_special: bool = True) -> str:
        decoded.extend(ids)
        return decode(self, ids, skip_special=skip_special)

    ids = NANO_TOKENIZER.encode("model é 🦙 user\n")
    monkeypatch.setattr(Tokenizer, "decode", count)
    detokeniser = Detokeniser(NANO_TOKENIZER)
    pieces = [detokeniser.push([index]) for index in ids]
    assert pieces == ["model", " ", "", "", "é ", "", "", "", "", "🦙 ", "user", "\n"]
    assert decoded == ids


# --- files ---


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
    monkeypatch.setattr("sfumato.text.tokenizer.MAX_FILE_BYTES", 1000)
    with pytest.raises(CheckpointError, match="more than the 1000 allowed"):
        Tokenizer.from_file(NANO / "tokenizer.json")


def test_special_names_in_either_spelling(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<turn|>"}, "bos_token": None, "extra_special_tokens": {"sot_token": "<|turn>"}}
    loaded = Tokenizer.from_folder(folder(tmp_path, tokenizer=NANO_JSON, tokenizer_config=json.dumps(config)))
    assert loaded.special == {"eos_token": "<turn|>", "sot_token": "<|turn>"}
    assert loaded.special_id("eos_token") == 5
    alone = Tokenizer.from_file(NANO / "tokenizer.json")
    assert alone.special == NANO_TOKENIZER.special


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
AGAIN = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
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
    capfd.readouterr()  # the library's own word on it


def test_whatever_the_library_raises_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 makes it: no Exception."""

    class Failing:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def __getattr__(self, name: str) -> Any:
            def fail(*_: Any, **__: Any) -> None:
                raise self.error

            return fail

    tokenizer = Tokenizer.from_folder(NANO)
    for error in (PanicException("called `Option::unwrap()`\non a `None` value"), Exception("no unk token")):
        monkeypatch.setattr(tokenizer, "_inner", Failing(error))
        for call in (
            lambda: tokenizer.encode("a"),
            lambda: tokenizer.decode([20]),
            lambda: tokenizer.id("a"),
            lambda: tokenizer.token(20),
            lambda: tokenizer.to_json(),
            lambda: Detokeniser(tokenizer).push([20]),
        ):
            with pytest.raises(InputError, match=r"the tokenizer fails here: .*un.*; give another text") as caught:
                call()
            assert "\n" not in str(caught.value)
    for other in (KeyboardInterrupt(), SystemExit(), MemoryError()):
        monkeypatch.setattr(tokenizer, "_inner", Failing(other))
        with pytest.raises(type(other)):
            tokenizer.encode("a")


def test_truncation_and_padding_saved_in_the_file_do_nothing(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(NANO / "tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode(DIGITS) == NANO_TOKENIZER.encode(DIGITS)


def test_a_long_text_is_encoded_like_a_short_one_and_lets_other_threads_run() -> None:
    tokenizer = NANO_TOKENIZER
    text = "Über den Wolken 12 <|turn> " * 40_000
    gaps, is_over = [0.0], threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not is_over.is_set():
            time.sleep(0.001)
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    ids = tokenizer.encode(text)
    took = time.perf_counter() - began
    is_over.set()
    thread.join()
    assert ids == [
        token for start in range(0, len(text), 27 * 400) for token in tokenizer.encode(text[start : start + 27 * 400])
    ]
    assert max(gaps) < max(0.5 * took, 0.2)
    with pytest.raises(InputError, match=r"lone surrogate \(U\+D800\) at character 20000"):
        tokenizer.encode("a" * 20_000 + "\ud800")


def test_the_least_number_of_tokens_is_never_more_than_there_are() -> None:
    for text in ("", "a", " " * 500, "word " * 5000, "Über " * 100, "1234567890" * 50, "<|turn>" * 99):
        assert NANO_TOKENIZER.least(text) <= len(NANO_TOKENIZER.encode(text))
    assert NANO_TOKENIZER.least("word " * 100_000) > 10_000
    inner = tokenizers.Tokenizer.from_str(NANO_JSON)
    inner.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Replace("aaaa", "")])
    assert Tokenizer(inner).least("a" * 1000) == 0
