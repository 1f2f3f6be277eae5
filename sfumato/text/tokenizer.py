"""Text to token ids and back, around one `tokenizers.Tokenizer`; the only file that knows that library.

Two ideas. **Control tokens** (`<|turn>`, `<eos>`, …) are never read out of plain text: `encode` spells them out in
ordinary tokens unless it is told `parse_special=True`, so that text from a user cannot end a turn. **The incremental
detokeniser** cuts only where two tokens do not influence each other, so its pieces joined are the decoding of the
whole, and no token is decoded twice.

A tokenizer.json is a small program over every text, so it is checked before the library compiles it: how much it can
lengthen a text, and how large its patterns are. Where the library fails all the same, a panic included, that is an
InputError.

Deliberately absent: training, padding, truncation, and any decoder but Gemma's (a cut between tokens would not be safe
under another).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import tokenizers

from sfumato.errors import CheckpointError, InputError, SfumatoError, is_panic
from sfumato.model.config import read_json
from sfumato.system.files import replacing

MAX_FILE_BYTES = 256 << 20
"""Gemma 4's tokenizer.json is 32 MiB; a larger file than this is not one."""

MAX_GROWTH = 16
"""Times its length that a text may have after the normalizer and all else that precedes the model; Gemma's make 3 bytes
of a space. Decoders likewise."""
MAX_TOKEN = 4096
"""Characters of a token's text; Gemma's longest has 31."""
MAX_STAGES = 64
"""Normalizers, pre-tokenizers, decoders in all; Gemma has 4."""
MAX_PATTERN = 4096
"""Characters of a regular expression."""
MAX_REPEATS = 10_000
"""Repetitions that a regular expression counts out, one count times the other."""

NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
"""What Gemma calls them, for a checkpoint without a tokenizer_config.json."""

LONG = 16 << 10
"""Characters from which on a text is encoded as a batch of one: the library lets other threads run only then."""

_CONTROL_FORM = re.compile(r"<\|.*>|<.*\|>", re.DOTALL)
_BAD_IDS = "token ids are whole numbers from 0 up; give a flat list of them"
_CUTTABLE_DECODERS = {"Replace", "ByteFallback"}
"""Decoders that look at one token, or at a run of byte tokens, and at nothing else."""

P = ParamSpec("P")
R = TypeVar("R")


def _answered(method: Callable[P, R]) -> Callable[P, R]:
    """What the library fails at, a panic of its Rust side included, is an InputError."""

    @functools.wraps(method)
    def call(*args: P.args, **named: P.kwargs) -> R:
        try:
            return method(*args, **named)
        except BaseException as error:
            if type(error) is not Exception and not is_panic(error):  # such are its own errors
                raise
            raise InputError(
                f"the tokenizer fails here: {_reason(error)}; give another text, or mend the patterns of its "
                "tokenizer.json"
            ) from None

    return call


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class Tokenizer:
    """Text ↔ ids.

    `special` maps the names a chat template knows (`bos_token`, …) to the tokens' text; `special_ids` holds the ids of
    all control tokens. `inner` is taken over: its special-token settings are changed here.
    """

    @_answered
    def __init__(self, inner: tokenizers.Tokenizer, special: Mapping[str, str] | None = None) -> None:
        inner.no_truncation()
        inner.no_padding()
        if special is None:
            special = {name: token for name, token in NAMED.items() if inner.token_to_id(token) is not None}
        named = {token for name, token in special.items() if name in NAMED}
        control = {
            token.content: index
            for index, token in inner.get_added_tokens_decoder().items()
            if token.special or _CONTROL_FORM.fullmatch(token.content)
        }
        control |= {token: index for token in named if (index := inner.token_to_id(token)) is not None}
        # Some converters write Gemma's tool and channel tokens as ordinary added tokens; to the library they must be
        # special, all of them, so that the next line holds for each.
        inner.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in control])
        inner.encode_special_tokens = True  # "encode them as text", in the library's words
        self._inner = inner
        self._control = control
        self._control_pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
        self._byte_ids = frozenset(
            index
            for high in "0123456789abcdefABCDEF"
            for low in "0123456789abcdefABCDEF"
            if (index := inner.token_to_id(f"<0x{high}{low}>")) is not None
        )
        self.special = dict(special)
        self.special_ids = frozenset(control.values())
        self._unknown = inner.token_to_id(special.get("unk_token", ""))  # the one control token that text may give
        self.vocab_size: int = inner.get_vocab_size()
        self._check()

    @classmethod
    def from_file(cls, path: str | Path, special: Mapping[str, str] | None = None) -> Tokenizer:
        """The tokenizer of a tokenizer.json; anything wrong with the file is a CheckpointError that names it."""
        path = Path(path)
        text = read_text(path)
        try:
            _check_file(json.loads(text, object_pairs_hook=_named_once))
            inner = tokenizers.Tokenizer.from_str(text)
            return cls(inner, special)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise CheckpointError(f"{path} is not a tokenizer.json that can be read: {_reason(error)}") from None

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """What `to_json` wrote."""
        return cls(tokenizers.Tokenizer.from_str(text))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder: tokenizer.json, and tokenizer_config.json where there is one."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json; a checkpoint folder needs one beside its weights")
        config = folder / "tokenizer_config.json"
        tokenizer = cls.from_file(folder / "tokenizer.json", _special_names(config) if config.is_file() else None)
        for name, token in tokenizer.special.items():
            if name in NAMED and tokenizer.id(token) is None:
                raise CheckpointError(f"{config} names the {name} {token!r}, which tokenizer.json does not have")
        return tokenizer

    @classmethod
    def from_vocabulary(
        cls,
        tokens: Sequence[str],
        kinds: Sequence[int],
        merges: Sequence[str],
        special: Mapping[str, str] | None = None,
    ) -> Tokenizer:
        """Gemma's tokenizer out of lists, as GGUF carries them.

        `kinds` are GGUF's (3 control, 4 user defined), one a token; `merges` are two tokens with a space between, in
        order; `special` as in the class. CheckpointError when they do not go together."""
        ids = {token: index for index, token in enumerate(tokens)}
        if len(ids) != len(tokens) or len(kinds) != len(tokens):
            raise CheckpointError(
                f"the vocabulary has {len(tokens)} tokens, {len(ids)} of them different, and {len(kinds)} kinds; "
                "each token has one kind and is there once"
            )
        _check_tokens(tokens)
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        unknown = NAMED["unk_token"] if special is None else special.get("unk_token")
        try:
            inner = tokenizers.Tokenizer(
                tokenizers.models.BPE(vocab=ids, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
            )
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise CheckpointError(f"the vocabulary's merges do not fit its tokens: {_reason(error)}") from None
        inner.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        inner.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
        )
        for kind, add in ((4, inner.add_tokens), (3, inner.add_special_tokens)):
            named = [token for token, its in zip(tokens, kinds, strict=True) if its == kind]
            add([tokenizers.AddedToken(token, normalized=False) for token in named])
        return cls(inner, special)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `from_folder`; the chat template is not the tokenizer's.

        SfumatoError when the folder is missing or full."""
        folder = Path(folder)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special, "clean_up_tokenization_spaces": False}
        texts = {"tokenizer.json": self.to_json(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
        try:
            for name, text in texts.items():
                with replacing(folder / name) as file:
                    file.write(text.encode())
        except OSError as error:
            raise SfumatoError(f"cannot write the tokenizer to {folder}: {error.strerror or error}") from error

    def encode(self, text: str, *, bos: bool = False, parse_special: bool = False) -> list[int]:
        """The ids of a text, with `<bos>` before them when asked.

        `parse_special` reads control tokens out of the text, and is for text that this program wrote. Without it no
        text gives a control token. A lone surrogate is an InputError.
        """
        ids = [self.special_id("bos_token")] if bos else []
        if not parse_special:
            return ids + self._encode_plain(text)
        for piece, control in self.pieces(text):
            ids += self._encode_plain(piece) if control is None else [control]
        return ids

    def least(self, text: str) -> int:
        """Tokens that a text gives at least, without encoding it: 0 where that cannot be told."""
        return len(text) // self._longest if self._longest else 0

    @functools.cached_property
    def _longest(self) -> int:
        """Characters of the longest token; 0 where what comes before the model could make a text shorter."""
        normalizer = self._inner.normalizer
        stages = [] if normalizer is None else list(_stages(json.loads(normalizer.__getstate__())))
        for stage in stages:
            pattern = (stage.get("pattern") or {}).get("String")
            if stage.get("type") != "Replace" or not pattern or len(stage.get("content") or "") < len(pattern):
                return 0
        return max(map(len, self._inner.get_vocab()), default=0)

    def pieces(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The text cut at its control tokens: (text, None) or (control token, its id); joined they are the text."""
        end = 0
        for match in self._control_pattern.finditer(text):
            if match.start() > end:
                yield text[end : match.start()], None
            yield match.group(), self._control[match.group()]
            end = match.end()
        if end < len(text):
            yield text[end:], None

    @_answered
    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids. Ids beyond the vocabulary have no text; bytes that are no UTF-8 become U+FFFD."""
        try:
            return self._inner.decode(list(ids), skip_special_tokens=skip_special)
        except (OverflowError, TypeError):
            raise InputError(_BAD_IDS) from None

    @_answered
    def id(self, token: str) -> int | None:
        """The id of one token by its exact text, or None."""
        return self._inner.token_to_id(token)

    @_answered
    def token(self, index: int) -> str | None:
        """The exact text of one token ("▁" and byte tokens as stored), or None."""
        try:
            return self._inner.id_to_token(index)
        except (OverflowError, TypeError):
            raise InputError(_BAD_IDS) from None

    def special_id(self, name: str) -> int:
        """The id behind a name of `special`, such as "eos_token"; an InputError where this tokenizer has none."""
        index = self.id(self.special[name]) if name in self.special else None
        if index is None:
            raise InputError(f"this tokenizer has no {name}; it has {', '.join(sorted(self.special)) or 'none at all'}")
        return index

    @_answered
    def to_json(self) -> str:
        """All of it as the text of a tokenizer.json, control tokens marked special."""
        return self._inner.to_str()

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The text of every control token, in the order of the ids."""
        return tuple(sorted(self._control, key=self._control.__getitem__))

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._ids_of(text)
        if not self.special_ids.isdisjoint(ids):
            for index in self.special_ids.intersection(ids) - {self._unknown}:
                raise InputError(f"the text spells the control token {self.token(index)!r}, which text may not hold")
        return ids

    @_answered
    def _ids_of(self, text: str) -> list[int]:
        try:
            if isinstance(text, str) and len(text) > LONG:
                return self._inner.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return self._inner.encode(text, add_special_tokens=False).ids
        except TypeError:
            lone = re.search("[\ud800-\udfff]", text) if isinstance(text, str) else None
            if lone is None:
                raise InputError(f"encode takes text, not {type(text).__name__}") from None
            raise InputError(
                f"the text has a lone surrogate (U+{ord(lone.group()):04X}) at character {lone.start()}; "
                "that is not valid Unicode, remove it"
            ) from None

    def _check(self) -> None:
        stages: list[dict[str, Any]] = []
        if self._inner.decoder is not None:
            described = json.loads(self._inner.decoder.__getstate__())
            stages = described["decoders"] if described["type"] == "Sequence" else [described]
        kinds = [stage["type"] for stage in stages]
        if not kinds or not set(kinds[:-1]) <= _CUTTABLE_DECODERS or kinds[-1] not in {*_CUTTABLE_DECODERS, "Fuse"}:
            raise CheckpointError(
                f"the tokenizer decodes with {' + '.join(kinds) or 'nothing'}; "
                "only Gemma's kind is read, Replace + ByteFallback + Fuse"
            )
        for token in self._control:
            if self.special_ids.intersection(self._ids_of(token)) - {self._unknown}:
                raise CheckpointError(f"the tokenizer's merges spell the control token {token!r}: text could inject it")


class Detokeniser:
    """Ids in as they come, text out as soon as it is certain; `push` pieces and the `flush` joined equal `decode`.

    A run of byte tokens is held until it ends, because its last byte decides whether the first ones are characters.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after these ids; possibly empty."""
        bytes_, token = self._tokenizer._byte_ids, self._tokenizer.token
        new = [index for index in ids if token(index) is not None and index not in self._skipped]
        cut = len(new)
        while cut and new[cut - 1] in bytes_:
            cut -= 1
        if not cut:  # nothing but bytes: the run goes on
            self._held += new
            return ""
        ready, self._held = self._held + new[:cut], new[cut:]
        return self._tokenizer.decode(ready, skip_special=False)

    def flush(self) -> str:
        """What is still held, as it stands; the detokeniser is then as new."""
        ready, self._held = self._held, []
        return self._tokenizer.decode(ready, skip_special=False)


def read_text(path: Path) -> str:
    """A text file of a checkpoint, or a CheckpointError that names it."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, more than the {MAX_FILE_BYTES} allowed")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


def _special_names(path: Path) -> dict[str, str]:
    """`bos_token` and its like from a tokenizer_config.json, in either spelling: text, or a record with `content`."""
    config = read_json(path)
    names: dict[str, str] = {}
    for group in (config, config.get("extra_special_tokens"), config.get("model_specific_special_tokens")):
        for name, value in group.items() if isinstance(group, dict) else ():
            token = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(token, str):
                names.setdefault(name, token)
    return names


# ---- what a tokenizer.json may do ------------------------------------------------------------------------------------

_GROWTHS = {
    **{"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11},  # Unicode's own bounds for UTF-8 (UAX 15)
    **{"Lowercase": 1.5, "Strip": 1, "StripAccents": 1, "Nmt": 1, "BertNormalizer": 8},
    **{"Split": 1, "Punctuation": 1, "Whitespace": 1, "WhitespaceSplit": 1, "Digits": 1, "UnicodeScripts": 1},
    **{"BertPreTokenizer": 1, "CharDelimiterSplit": 1, "FixedLength": 1, "ByteLevel": 3},
}
"""Bytes at most that these make of one."""
_COUNT = re.compile(r"(?<!\\x)(?<!\\u)\{(\d*),?(\d*)\}")


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # the library reads them all, and compiles what it reads
        raise ValueError("an object names something twice")
    return found


def _check_file(record: Any) -> None:
    """CheckpointError for a tokenizer.json that could make a text much longer, or that the library compiles at length.

    What has not the form of one is left to the library, which says so."""
    if not isinstance(record, dict):
        return
    before = [stage for name in ("normalizer", "pre_tokenizer") for stage in _stages(record.get(name))]
    after = list(_stages(record.get("decoder")))
    for what, growth, stages in (
        ("normalizer and pre-tokenizer", _repeats(record.get("post_processor")), before),
        ("decoder", 1.0, [stage for stage in after if stage.get("type") == "Replace"]),  # others: see Tokenizer._check
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
        _check_tokens(value for value in model.values() if isinstance(value, str))
        vocabulary = model.get("vocab")
        _check_tokens(vocabulary if isinstance(vocabulary, dict) else _firsts(vocabulary))
    _check_tokens(token["content"] for token in added or () if isinstance(token, dict) and "content" in token)


def _check_tokens(tokens: Iterable[Any]) -> None:
    longest = max((token for token in tokens if isinstance(token, str)), key=len, default="")
    if len(longest) > MAX_TOKEN:
        raise CheckpointError(
            f"the token {longest[:20]!r}… has {len(longest)} characters, more than the {MAX_TOKEN} allowed"
        )


def _firsts(pairs: Any) -> list[Any]:
    """The tokens of a vocabulary that is a list of tokens with their scores."""
    return [pair[0] for pair in pairs if isinstance(pair, list) and pair] if isinstance(pairs, list) else []


def _stages(stage: Any) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, or those of a sequence."""
    if not isinstance(stage, dict):
        return
    parts = [part for name in ("normalizers", "pretokenizers", "decoders") for part in stage.get(name) or ()]
    if stage.get("type") != "Sequence":
        yield stage
    for part in parts:
        yield from _stages(part)


def _growth(stage: dict[str, Any]) -> float:
    """Bytes that this stage makes of one, at most. CheckpointError for a kind that is not known, or a pattern that is
    too large."""
    kind, pattern = stage.get("type"), stage.get("pattern")
    size = lambda name: len(str(stage.get(name) or "").encode(errors="replace"))  # noqa: E731
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
    repeats = 1
    for low, high in _COUNT.findall(pattern):
        repeats = min(repeats * max(1, int(low[:9] or 0), int(high[:9] or 0)), 10**9)
    if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS:
        raise CheckpointError(
            f"its pattern {pattern[:40]!r}… has {len(pattern)} characters and counts to {repeats}; at most "
            f"{MAX_PATTERN} and {MAX_REPEATS} are read"
        )


def _repeats(processor: Any) -> float:
    """How often the text is in what a post-processor makes of it."""
    if not isinstance(processor, dict):
        return 1.0
    single = processor.get("single")
    found = sum(isinstance(piece, dict) and "Sequence" in piece for piece in single) if isinstance(single, list) else 1
    times = float(max(1, found))
    for part in processor.get("processors") or ():
        times *= _repeats(part)
    return times
