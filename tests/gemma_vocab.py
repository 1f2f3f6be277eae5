"""Gemma 4's vocabulary and chat template, read from the shared GGUF vocabulary file; where it is absent, tests skip.

Its own few lines of GGUF, because the gguf package takes half a minute to open a file with 800,000 strings.
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any

import pytest
import tokenizers

FILE = Path(__file__).parents[1] / ".." / "shared" / "data" / "ggml-vocab-gemma-4.gguf"
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL, USER_DEFINED = 3, 4


def needs_file() -> None:
    if not FILE.is_file():
        pytest.skip("needs ../shared/data/ggml-vocab-gemma-4.gguf, Gemma 4's vocabulary")


@functools.cache
def metadata() -> dict[str, Any]:
    needs_file()
    data = FILE.read_bytes()
    at = 0

    def number(form: str) -> Any:
        nonlocal at
        value = struct.unpack_from("<" + form, data, at)[0]
        at += struct.calcsize("<" + form)
        return value

    def string() -> str:
        nonlocal at
        length = number("Q")
        at += length
        return data[at - length : at].decode()

    def value(kind: int) -> Any:
        if kind == STRING:
            return string()
        if kind == ARRAY:
            inner, length = number("I"), number("Q")
            return [value(inner) for _ in range(length)]
        return number(NUMBERS[kind])

    assert data[:4] == b"GGUF"
    at = 16  # magic, version, number of tensors
    return {string(): value(number("I")) for _ in range(number("Q"))}


def template() -> str:
    return str(metadata()["tokenizer.chat_template"])


def build() -> tokenizers.Tokenizer:
    """Gemma 4's tokenizer, its tool and channel tokens as ordinary added tokens, as the file has them."""
    known = metadata()
    tokens, kinds = known["tokenizer.ggml.tokens"], known["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in known["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    inner.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    for kind, add in ((USER_DEFINED, inner.add_tokens), (CONTROL, inner.add_special_tokens)):
        add([tokenizers.AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == kind])
    return inner


def vectors() -> list[tuple[str, list[int]]]:
    """(text, its ids) as llama.cpp's tests have them."""
    needs_file()
    texts = FILE.with_name(FILE.name + ".inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = FILE.with_name(FILE.name + ".out").read_text(encoding="utf-8").splitlines()
    return [(text, [int(index) for index in line.split()]) for text, line in zip(texts, lines, strict=True)]
