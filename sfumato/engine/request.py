"""What the engine is asked, and the row that it becomes while it is under way.

A `Request` is checked before any work: what cannot run is refused here, by one sentence. Nothing here touches a tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from sfumato.engine.arguments import check_ids, check_kind, check_places
from sfumato.engine.guided import Span
from sfumato.errors import CapacityError, InputError
from sfumato.model.config import ModelConfig
from sfumato.options import Options
from sfumato.sampling.rules import Rules

Watch = Callable[[list[int]], int | None]
"""Newly committed tokens -> how many of them to keep if the answer ends here, None to go on."""

Inspect = Callable[[Tensor], None]
"""Shown every read-out of its row: logits [L, V]."""

FIRST_ROOM = 4096
"""New tokens that a cache has room for at first; longer answers make it grow by doubling."""

SHORT = 16
"""A canvas for a short budget is a multiple of this many positions."""


@dataclass(frozen=True)
class Failure:
    """A row (its seat) that cannot go on, while the others can, and the error that its request ends with."""

    row: int
    error: Exception


@dataclass(frozen=True, eq=False)
class Request:
    """One text to be written behind a prompt (token ids).

    Options left open (None) take the released model's defaults: callers with a checkpoint's own fill them in before.
    `pins` maps positions of the answer to tokens that stay fixed there; `warm` positions to tokens that their canvas
    starts from instead of noise; `spans` keep positions to a grammar. `banned` are tokens that may not stand, as ends
    may not, among the first `min_tokens` positions."""

    prompt: Sequence[int]
    options: Options = Options()  # noqa: RUF009 - frozen
    pins: Mapping[int, int] = field(default_factory=dict)
    warm: Mapping[int, int] = field(default_factory=dict)
    spans: Sequence[Span] = ()
    banned: Sequence[int] = ()
    watch: Watch | None = None
    inspect: Inspect | None = None
    marks: Sequence[int] = ()
    """Places in the prompt where a chunk ends, so that what is encoded up to there can be kept for others."""
    name: str = "the prompt"
    """What messages call it."""
    _checked_for: ModelConfig | None = field(default=None, init=False, repr=False)
    """A copy with changes (`replace`) is unchecked again."""

    def checked(self, config: ModelConfig) -> Request:
        """With its mode decided; InputError or CapacityError for what this model cannot run. What was checked before is
        not looked at again."""
        if self._checked_for is config:
            return self
        mode = "diffusion" if config.is_diffusion else "autoregressive"
        request = replace(self, options=self.options.with_defaults({"mode": mode}))
        request._check_canvas(config)
        check_kind(self.name, self.prompt, (list, tuple), "a list of token ids")
        request._check_room(config)  # before each token is looked at: there may be millions
        check_ids(self.name, self.prompt, config.vocab_size)
        request._check_places(config)
        object.__setattr__(request, "_checked_for", config)
        return request

    @property
    def is_diffusion(self) -> bool:
        return self.options.mode == "diffusion"

    def canvas_length(self, config: ModelConfig) -> int:
        """The model's own, or less for a short request without room for so much."""
        whole = config.canvas_length
        if not self.options.short:
            return whole
        need = max(self.options.max_tokens or whole, max(self.pins, default=-1) + 1)
        return min(whole, -(-need // SHORT) * SHORT)

    def capacity(self, config: ModelConfig) -> int:
        """Tokens that its row of the cache should have room for at first: the prompt, and the beginning of the answer
        in whole canvases."""
        new, length = min(self.options.max_tokens or FIRST_ROOM, FIRST_ROOM), self.canvas_length(config)
        return min(len(self.prompt) + -(-new // length) * length, config.max_position)

    def _check_canvas(self, config: ModelConfig) -> None:
        asked = {
            "mode 'diffusion'": self.is_diffusion,
            "a draft": self.options.drafts,
            "a pin": bool(self.pins),
            "a warm token": bool(self.warm),
            "a span": bool(self.spans),
        }
        for what in (what for what, is_asked in asked.items() if is_asked):
            config.check_canvas(what)

    def _check_room(self, config: ModelConfig) -> None:
        if not self.prompt:
            raise InputError(f"{self.name} is empty; give at least one token (the begin-of-text token, say)")
        need = len(self.prompt) + (self.canvas_length(config) if self.is_diffusion else 1)
        if need > config.max_position:
            raise CapacityError(
                f"{self.name} has {len(self.prompt)} tokens and a canvas needs {need - len(self.prompt)} more, beyond "
                f"the context of {config.max_position}; shorten the prompt"
            )
        if len(self.prompt) + self.options.min_tokens > config.max_position:
            raise CapacityError(
                f"min_tokens is {self.options.min_tokens} behind the {len(self.prompt)} tokens of {self.name}, beyond "
                f"the context of {config.max_position}; lower it"
            )

    def _check_places(self, config: ModelConfig) -> None:
        for what, places in ("pin", self.pins), ("warm token", self.warm):
            if places and not self.is_diffusion:
                raise InputError(f"{self.name} has {what}s in mode {self.options.mode!r}; they need 'diffusion'")
            most = max(1, config.max_position - len(self.prompt))
            check_places(what, self.name, places, most, config.vocab_size)


@dataclass(eq=False)
class Row:
    """One request under way."""

    request: Request
    rules: Rules
    length: int
    """Positions of its canvases."""
    rest: list[int]
    """Tokens of the prompt that are to be encoded before its first canvas can begin."""
    reused: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    """Tokens that wait to be encoded in the next pass."""
    canvas: int = 0
    step: int = 0
    """Steps that were begun on this canvas."""
    steps: int = 0
    passes: int = 0
    began: float = field(default_factory=time.perf_counter)
    first_commit: float | None = None
    finish_reason: str | None = None
    has_failed: bool = False
    given: int = 0
    """Leading tokens of this canvas that were committed before the rest."""

    @classmethod
    def of(cls, request: Request, config: ModelConfig, held: int) -> Row:
        """A row whose cache already holds so many tokens of the prompt."""
        rules, length = Rules.of(request.options), request.canvas_length(config)
        if request.options.short:  # a step accepts one position at least, so more steps than positions are no use
            rules = replace(rules, max_steps=min(rules.max_steps, length))
        return cls(request, rules, length, list(request.prompt[held:]), held)

    @property
    def is_over(self) -> bool:
        return self.has_failed or self.finish_reason is not None

    @property
    def is_at_cap(self) -> bool:
        """Every step that this canvas may take was begun: it stops, whatever the last one says."""
        return self.step >= self.rules.max_steps

    @property
    def options(self) -> Options:
        return self.request.options

    @property
    def prompt(self) -> Sequence[int]:
        return self.request.prompt

    @property
    def room(self) -> int | None:
        """New tokens still allowed; None: as many as the context holds."""
        return None if self.options.max_tokens is None else self.options.max_tokens - len(self.tokens)

    @property
    def lacking(self) -> int:
        """Tokens that must come before an end may."""
        return self.options.min_tokens - len(self.tokens)

    def spans_here(self) -> list[tuple[Span, int, int]]:
        """The spans on its canvas: from position, to position."""
        first, found = self.canvas * self.length, []
        for span in self.request.spans:
            last = self.length if span.width is None else min(self.length, span.start + span.width - first)
            if span.start - first < self.length and last > 0:
                found.append((span, max(0, span.start - first), last))
        return found
