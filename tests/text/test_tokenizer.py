"""text/tokenizer.py: nano's vocabulary, Gemma 4's vectors, what text may not do, and the incremental detokeniser."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
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
    expected = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<|turn>": 105, "<turn|>": 106, "<|tool_response>": 50, '<|"|>': 52}
    for token, index in expected.items():
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
    text = "".join([*(detokeniser.push(chunk) for chunk in chunks), detokeniser.flush()])
    assert text == NANO_TOKENIZER.decode(ids, skip_special=skip)


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


# --- the library ---


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
    assert max(gaps) < max(0.8 * took, 0.2)
    with pytest.raises(InputError, match=r"lone surrogate \(U\+D800\) at character 20000"):
        tokenizer.encode("a" * 20_000 + "\ud800")


def test_the_least_number_of_tokens_is_never_more_than_there_are() -> None:
    for text in ("", "a", " " * 500, "word " * 5000, "Über " * 100, "1234567890" * 50, "<|turn>" * 99):
        assert NANO_TOKENIZER.least(text) <= len(NANO_TOKENIZER.encode(text))
    assert NANO_TOKENIZER.least("word " * 100_000) > 10_000
    inner = tokenizers.Tokenizer.from_file(str(NANO / "tokenizer.json"))
    inner.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Replace("aaaa", "")])
    assert Tokenizer(inner).least("a" * 1000) == 0
