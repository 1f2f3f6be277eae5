"""The files of a tokenizer: read, and checked before the library compiles them.

A tokenizer.json is a small program over every text. `check_json` bounds how much it can lengthen a text, how long its
tokens are and how large its patterns are: a hostile file could otherwise take minutes or all memory. `special_names`
reads the names of control tokens from a tokenizer_config.json.

Deliberately absent: whether the file is a tokenizer at all, which the library says, and which decoders this engine can
cut (`Tokenizer`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError
from sfumato.model.config import read_json

MAX_FILE_BYTES = 256 << 20
"""Gemma 4's tokenizer.json is 32 MiB; a larger file than this is not one."""

MAX_GROWTH = 16
"""Factor by which a text may grow in the normalizer and all else that precedes the model, and in the decoder; Gemma's
normalizer makes 3 bytes of a space."""
MAX_TOKEN = 4096
"""Characters of a token's text; Gemma's longest has 31."""
MAX_STAGES = 64
"""Normalizers, pre-tokenizers, decoders in all; Gemma has 4."""
MAX_PATTERN = 4096
"""Characters of a regular expression."""
MAX_REPEATS = 10_000
"""Repetitions that a regular expression counts out, all counts multiplied."""


def read_text(path: Path) -> str:
    """The text of a checkpoint's file; CheckpointError, which names the file, where it cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, more than the {MAX_FILE_BYTES} allowed")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


def special_names(path: Path) -> dict[str, str]:
    """`bos_token` and its like from a tokenizer_config.json.

    Each is text, or a record with `content`. CheckpointError where the file is not a JSON object.
    """
    config = read_json(path)
    names: dict[str, str] = {}
    for group in (config, config.get("extra_special_tokens"), config.get("model_specific_special_tokens")):
        for name, value in group.items() if isinstance(group, dict) else ():
            token = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(token, str):
                names.setdefault(name, token)
    return names


_GROWTHS = {
    **{"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11},  # Unicode's own bounds for UTF-8 (UAX 15)
    **{"Lowercase": 1.5, "Strip": 1, "StripAccents": 1, "Nmt": 1, "BertNormalizer": 8},
    **{"Split": 1, "Punctuation": 1, "Whitespace": 1, "WhitespaceSplit": 1, "Digits": 1, "UnicodeScripts": 1},
    **{"BertPreTokenizer": 1, "CharDelimiterSplit": 1, "FixedLength": 1, "ByteLevel": 3},
}
"""The most bytes that a stage of this kind makes of one byte."""
_COUNT = re.compile(r"(?<!\\x)(?<!\\u)\{(\d*),?(\d*)\}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, as `object_pairs_hook` of json.loads; ValueError where a key is there twice."""
    record = dict(pairs)
    if len(record) != len(pairs):  # the library reads them all, and compiles what it reads
        raise ValueError("an object names something twice")
    return record


def check_json(record: Any) -> None:
    """Refuse a tokenizer.json that could make a text much longer, or that takes the library long to compile.

    `record` is the parsed file; the error is a CheckpointError. Whatever does not have the form of a tokenizer.json is
    left to the library, which says so.
    """
    if not isinstance(record, dict):
        return
    before = [stage for name in ("normalizer", "pre_tokenizer") for stage in stages_of(record.get(name))]
    after = list(stages_of(record.get("decoder")))
    for what, growth, stages in (
        ("normalizer and pre-tokenizer", _repeats(record.get("post_processor")), before),
        (
            "decoder",
            1.0,
            [stage for stage in after if stage.get("type") == "Replace"],
        ),  # `Tokenizer` refuses others
    ):
        for stage in stages:
            growth *= _growth(stage)
            if growth > MAX_GROWTH:
                raise CheckpointError(
                    f"its {what} can make a text more than {MAX_GROWTH} times as long; this engine reads Gemma's kind, "
                    "which replaces a space by ▁"
                )
    if len(before) + len(after) > MAX_STAGES:
        raise CheckpointError(f"it has {len(before) + len(after)} stages, more than the {MAX_STAGES} allowed")
    model, added = record.get("model"), record.get("added_tokens")
    if isinstance(model, dict):
        check_tokens(value for value in model.values() if isinstance(value, str))
        vocabulary = model.get("vocab")
        check_tokens(vocabulary if isinstance(vocabulary, dict) else _firsts(vocabulary))
    check_tokens(token["content"] for token in added or () if isinstance(token, dict) and "content" in token)


def check_tokens(tokens: Iterable[Any]) -> None:
    """CheckpointError where a token's text is longer than `MAX_TOKEN`; what is not text is passed over."""
    longest = max((token for token in tokens if isinstance(token, str)), key=len, default="")
    if len(longest) > MAX_TOKEN:
        raise CheckpointError(
            f"the token {longest[:20]!r}… has {len(longest)} characters, more than the {MAX_TOKEN} allowed"
        )


def _firsts(pairs: Any) -> list[Any]:
    """The tokens of a vocabulary that is a list of tokens with their scores."""
    return [pair[0] for pair in pairs if isinstance(pair, list) and pair] if isinstance(pairs, list) else []


def stages_of(stage: Any) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, or those of a sequence."""
    if not isinstance(stage, dict):
        return
    parts = [part for name in ("normalizers", "pretokenizers", "decoders") for part in stage.get(name) or ()]
    if stage.get("type") != "Sequence":
        yield stage
    for part in parts:
        yield from stages_of(part)


def _growth(stage: dict[str, Any]) -> float:
    """The most bytes that this stage makes of one; CheckpointError for an unknown kind or too large a pattern."""

    def size(name: str) -> int:
        return len(str(stage.get(name) or "").encode(errors="replace"))

    kind, pattern = stage.get("type"), stage.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        _check_pattern(pattern["Regex"])
    if kind == "Replace":
        length = len(literal.encode(errors="replace")) if isinstance(literal, str) else 0
        return max(1.0, size("content") / length) if length else 1 + size("content")
    if kind == "Prepend":
        return 1 + size("prepend")  # to each piece between added tokens, which may be a byte
    if kind == "Metaspace":
        return 2 * max(1, size("replacement"))
    if kind not in _GROWTHS:
        raise CheckpointError(f"its stage {str(kind)[:40]!r} is not known; this engine reads Gemma's kind")
    return _GROWTHS[kind]


def _check_pattern(pattern: str) -> None:
    """CheckpointError for a regular expression that is too long or counts out too many repetitions."""
    repeats = 1
    for low, high in _COUNT.findall(pattern):
        repeats = min(repeats * max(1, int(low[:9] or 0), int(high[:9] or 0)), 10**9)
    if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS:
        raise CheckpointError(
            f"its pattern {pattern[:40]!r}… has {len(pattern)} characters and counts to {repeats}; at most "
            f"{MAX_PATTERN} and {MAX_REPEATS} are read"
        )


def _repeats(processor: Any) -> float:
    """How many times the text occurs in the output of a post-processor."""
    if not isinstance(processor, dict):
        return 1.0
    single = processor.get("single")
    count = sum(isinstance(piece, dict) and "Sequence" in piece for piece in single) if isinstance(single, list) else 1
    times = float(max(1, count))
    for part in processor.get("processors") or ():
        times *= _repeats(part)
    return times
