"""Text to token ids and back, around one `tokenizers.Tokenizer`; the only file that knows that library.

Two ideas. **Control tokens** (`<|turn>`, `<eos>`, …) are never read out of plain text: `encode` spells them out in
ordinary tokens unless it is told `parse_special=True`, so that text from a user cannot end a turn. **The incremental
detokeniser** cuts only where two tokens do not influence each other, so its pieces joined are the decoding of the
whole, and no token is decoded twice.

Deliberately absent: training, padding, truncation, and any decoder but Gemma's (a cut between tokens would not be safe
under another).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sfumato.config import read_json
from sfumato.events import CheckpointError, InputError, SfumatoError

MAX_FILE_BYTES = 256 << 20
"""Gemma 4's tokenizer.json is 32 MiB; a larger file than this is not one."""

NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
"""What Gemma calls them, for a checkpoint without a tokenizer_config.json."""

_CONTROL_FORM = re.compile(r"<\|.*>|<.*\|>", re.DOTALL)
_BAD_IDS = "token ids are whole numbers from 0 up; give a flat list of them"
_CUTTABLE_DECODERS = {"Replace", "ByteFallback"}
"""Decoders that look at one token, or at a run of byte tokens, and at nothing else."""


class Tokenizer:
    """Text ↔ ids.

    `special` maps the names a chat template knows (`bos_token`, …) to the tokens' text; `special_ids` holds the ids of
    all control tokens. `inner` is taken over: its special-token settings are changed here.
    """

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
            inner = tokenizers.Tokenizer.from_str(text)
            return cls(inner, special)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except BaseException as error:  # a panic of the Rust side is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(f"{path} is not a tokenizer.json that can be read: {reason}") from None

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
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        unknown = NAMED["unk_token"] if special is None else special.get("unk_token")
        try:
            inner = tokenizers.Tokenizer(
                tokenizers.models.BPE(vocab=ids, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
            )
        except Exception as error:
            raise CheckpointError(f"the vocabulary's merges do not fit its tokens: {str(error)[:200]}") from None
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
        try:
            (folder / "tokenizer.json").write_text(self.to_json(), encoding="utf-8")
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
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

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids. Ids beyond the vocabulary have no text; bytes that are no UTF-8 become U+FFFD."""
        try:
            return self._inner.decode(list(ids), skip_special_tokens=skip_special)
        except (OverflowError, TypeError):
            raise InputError(_BAD_IDS) from None

    def id(self, token: str) -> int | None:
        """The id of one token by its exact text, or None."""
        return self._inner.token_to_id(token)

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

    def to_json(self) -> str:
        """All of it as the text of a tokenizer.json, control tokens marked special."""
        return self._inner.to_str()

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The text of every control token, in the order of the ids."""
        return tuple(sorted(self._control, key=self._control.__getitem__))

    def _encode_plain(self, text: str) -> list[int]:
        try:
            ids = self._inner.encode(text, add_special_tokens=False).ids
        except TypeError:
            lone = re.search("[\ud800-\udfff]", text) if isinstance(text, str) else None
            if lone is None:
                raise InputError(f"encode takes text, not {type(text).__name__}") from None
            raise InputError(
                f"the text has a lone surrogate (U+{ord(lone.group()):04X}) at character {lone.start()}; "
                "that is not valid Unicode, remove it"
            ) from None
        if not self.special_ids.isdisjoint(ids):
            for index in self.special_ids.intersection(ids) - {self._unknown}:
                raise InputError(f"the text spells the control token {self.token(index)!r}, which text may not hold")
        return ids

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
            try:
                self._encode_plain(token)
            except InputError:
                raise CheckpointError(
                    f"the tokenizer's merges spell the control token {token!r}: text could inject it"
                ) from None


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
