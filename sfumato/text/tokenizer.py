"""Text to token ids and back, around one `tokenizers.Tokenizer`; the only file that knows that library.

Two ideas. **Control tokens** (`<|turn>`, `<eos>`, …) are never read out of plain text: `encode` spells them out in
ordinary tokens unless the caller passes `parse_special=True`, so that text from a user cannot end a turn. **The
incremental detokeniser** cuts only where two tokens do not influence each other, so its pieces joined are the decoding
of the whole, and no token is decoded twice.

A file is checked before the library compiles it (`tokenizer_file`). Where the library fails all the same, a panic
included, that is an InputError.

Deliberately absent: training, padding, truncation, and any decoder but Gemma's (under another, a cut between tokens
would not be safe).
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
from sfumato.system.files import replacing
from sfumato.text import tokenizer_file

GEMMA_NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
"""Gemma's control tokens by name, for a checkpoint without a tokenizer_config.json."""

LONG = 16 << 10
"""Characters: a longer text is encoded as a batch of one, because the library lets other threads run only then."""

_CONTROL_FORM = re.compile(r"<\|.*>|<.*\|>", re.DOTALL)
_BAD_IDS = "token ids are whole numbers from 0 up; give a flat list of them"
_CUTTABLE_DECODERS = {"Replace", "ByteFallback"}
"""Decoders that look at one token, or at a run of byte tokens, and at nothing else."""

P = ParamSpec("P")
R = TypeVar("R")


def _guarded(method: Callable[P, R]) -> Callable[P, R]:
    """A method in which a failure of the library, a panic of its Rust side included, is an InputError."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except BaseException as error:
            if type(error) is not Exception and not is_panic(error):  # the library's own errors are plain Exceptions
                raise
            raise InputError(
                f"the tokenizer fails here: {_reason(error)}; give another text, or mend the patterns of its "
                "tokenizer.json"
            ) from None

    return call


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class Tokenizer:
    """Text to token ids and back.

    `special` maps the names that a chat template knows (`bos_token`, …) to the tokens' text; `special_ids` holds the
    ids of all control tokens; `vocab_size` counts the tokens. `inner` belongs to this object from now on: its settings
    for special tokens are changed. CheckpointError for a tokenizer of another kind than Gemma's.
    """

    @_guarded
    def __init__(self, inner: tokenizers.Tokenizer, special: Mapping[str, str] | None = None) -> None:
        inner.no_truncation()
        inner.no_padding()
        if special is None:
            special = {name: token for name, token in GEMMA_NAMES.items() if inner.token_to_id(token) is not None}
        named = {token for name, token in special.items() if name in GEMMA_NAMES}
        control = {
            token.content: index
            for index, token in inner.get_added_tokens_decoder().items()
            if token.special or _CONTROL_FORM.fullmatch(token.content)
        }
        control |= {token: index for token in named if (index := inner.token_to_id(token)) is not None}
        # Some converters write Gemma's tool and channel tokens as ordinary added tokens; to the library they must be
        # special, all of them, so that the next line holds for each.
        inner.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in control])
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
        self._unknown = inner.token_to_id(
            special.get("unk_token", "")
        )  # the only control token that plain text can give
        self.vocab_size: int = inner.get_vocab_size()
        self._check()

    @classmethod
    def from_file(cls, path: str | Path, special: Mapping[str, str] | None = None) -> Tokenizer:
        """The tokenizer of a tokenizer.json; anything wrong with the file is a CheckpointError that names it."""
        path = Path(path)
        text = tokenizer_file.read_text(path)
        try:
            tokenizer_file.check_json(json.loads(text, object_pairs_hook=tokenizer_file.unique_keys))
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
        """The tokenizer that `to_json` wrote."""
        return cls(tokenizers.Tokenizer.from_str(text))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder: tokenizer.json, and tokenizer_config.json where there is one.

        CheckpointError where the files are missing, damaged or do not fit together.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json; a checkpoint folder needs one beside its weights")
        config = folder / "tokenizer_config.json"
        special = tokenizer_file.special_names(config) if config.is_file() else None
        tokenizer = cls.from_file(folder / "tokenizer.json", special)
        for name, token in tokenizer.special.items():
            if name in GEMMA_NAMES and tokenizer.id(token) is None:
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
        """Gemma's tokenizer from lists, as GGUF carries them.

        `kinds` are GGUF's (3 control, 4 user defined), one for each token; a merge is two tokens with a space between,
        in order of their rank; `special` as in the class. CheckpointError where they do not fit together.
        """
        ids = {token: index for index, token in enumerate(tokens)}
        if len(ids) != len(tokens) or len(kinds) != len(tokens):
            raise CheckpointError(
                f"the vocabulary has {len(tokens)} tokens, {len(ids)} of them different, and {len(kinds)} kinds; "
                "each token has one kind and is there once"
            )
        tokenizer_file.check_tokens(tokens)
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        unknown = GEMMA_NAMES["unk_token"] if special is None else special.get("unk_token")
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
            of_kind = [token for token, own in zip(tokens, kinds, strict=True) if own == kind]
            add([tokenizers.AddedToken(token, normalized=False) for token in of_kind])
        return cls(inner, special)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `from_folder`; the chat template is not the tokenizer's.

        SfumatoError where the folder is missing or full.
        """
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
        """The token ids of a text; `bos` puts `<bos>` before them.

        `parse_special` reads control tokens out of the text, and is for text that this program wrote. Without it no
        text gives a control token. InputError for a lone surrogate, and for what is not text.
        """
        ids = [self.special_id("bos_token")] if bos else []
        if not parse_special:
            return ids + self._encode_plain(text)
        for piece, control in self.pieces(text):
            ids += self._encode_plain(piece) if control is None else [control]
        return ids

    def least(self, text: str) -> int:
        """A lower bound on the number of a text's tokens, without encoding it; 0 where none is known."""
        return len(text) // self._longest if self._longest else 0

    @functools.cached_property
    def _longest(self) -> int:
        """Characters of the longest token; 0 where the normalizer could make a text shorter."""
        normalizer = self._inner.normalizer
        stages = [] if normalizer is None else list(tokenizer_file.stages_of(json.loads(normalizer.__getstate__())))
        for stage in stages:
            pattern = (stage.get("pattern") or {}).get("String")
            if stage.get("type") != "Replace" or not pattern or len(stage.get("content") or "") < len(pattern):
                return 0
        return max(map(len, self._inner.get_vocab()), default=0)

    def pieces(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The text cut at its control tokens: (text, None) or (control token, its id); joined, they are the text."""
        end = 0
        for match in self._control_pattern.finditer(text):
            if match.start() > end:
                yield text[end : match.start()], None
            yield match.group(), self._control[match.group()]
            end = match.end()
        if end < len(text):
            yield text[end:], None

    @_guarded
    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids.

        Ids beyond the vocabulary have no text; bytes that are not UTF-8 become U+FFFD. InputError for what is not a
        flat list of whole numbers from 0 up.
        """
        try:
            return self._inner.decode(list(ids), skip_special_tokens=skip_special)
        except (OverflowError, TypeError):
            raise InputError(_BAD_IDS) from None

    def piece(self, token: int) -> str:
        """The text of one token, a special one's too."""
        return self.decode([token], skip_special=False)

    def by_piece(self, logprobs: Mapping[Any, float]) -> dict[str, float]:
        """Log-probabilities by the tokens' text; of tokens with the same text the first counts."""
        pieces: dict[str, float] = {}
        for token, value in logprobs.items():
            pieces.setdefault(self.piece(token), value)
        return pieces

    @_guarded
    def id(self, token: str) -> int | None:
        """The id of one token by its exact text, or None."""
        return self._inner.token_to_id(token)

    @_guarded
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

    @property
    def pad_id(self) -> int:
        """What fills up shorter rows of a batch; 0 where this tokenizer names none."""
        return self.special_id("pad_token") if "pad_token" in self.special else 0

    @_guarded
    def to_json(self) -> str:
        """The whole tokenizer as the text of a tokenizer.json, control tokens marked special."""
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

    @_guarded
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
        """CheckpointError for a decoder that `Detokeniser` cannot cut, and for merges that spell a control token."""
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
    """Token ids to text while they come: the pieces of `push` and `flush`, joined, equal `Tokenizer.decode`.

    A run of byte tokens is held back until it ends: its last byte decides whether the first ones are characters.
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
        if not cut:  # byte tokens alone: the run goes on
            self._held += new
            return ""
        ready, self._held = self._held + new[:cut], new[cut:]
        return self._tokenizer.decode(ready, skip_special=False)

    def flush(self) -> str:
        """The text of the tokens that are still held back; after it the detokeniser is as new."""
        ready, self._held = self._held, []
        return self._tokenizer.decode(ready, skip_special=False)
