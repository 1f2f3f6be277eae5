"""What an engine is asked for (`Request`), and the row that it becomes while it is under way (`Row`).

A request is a frozen value and can be run any number of times. `Row.of` checks it before any work, so that what cannot
run is refused by one sentence, and makes what belongs to one run alone: the guides of its grammars, and who watches its
tokens. Nothing here touches a tensor.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from sfumato.constraints.answers import AnswerGrammar, AnswerGuide
from sfumato.constraints.grammar import Grammar
from sfumato.constraints.guide import Guide
from sfumato.engine.arguments import check_ids, check_kind, check_places
from sfumato.engine.reads import Readings, Reads
from sfumato.engine.scores import PromptScores
from sfumato.engine.trials import Trial
from sfumato.errors import CapacityError, InputError
from sfumato.model.config import ModelConfig
from sfumato.model.prompt import Prompt
from sfumato.options import Options
from sfumato.sampling.distribution import RowSampler
from sfumato.sampling.rules import Rules

Watch = Callable[[list[int]], int | None]
"""Newly committed tokens -> how many of them to keep if the answer ends here, None to go on."""

Inspect = Callable[[Tensor], None]
"""Takes every read-out of its row: logits [L, V]."""

FIRST_ROOM = 4096
"""New tokens that a cache has room for at first; longer answers make it grow by doubling."""

TRY_BITS = 24
"""Below this bit of the number that noise is counted from stands the canvas, from it on the try."""

SHORT = 16
"""A canvas for a short budget is a multiple of this many positions."""

_numbers = itertools.count(1)


def _new_id() -> str:
    return f"request-{next(_numbers)}"


@dataclass(frozen=True)
class Failure:
    """A row that cannot go on, while the others can, and the error that its request ends with."""

    row: int
    """Its seat, as in every event."""
    error: Exception
    request: str = ""
    """The id of the request it belongs to."""


@dataclass(frozen=True)
class GrammarSpan:
    """Positions of an answer that are kept to a grammar: `width` of them from `start` on.

    None: to the answer's end, which then comes where the text is complete; else what the text leaves of the span is
    padding."""

    start: int
    width: int | None
    grammar: Grammar | AnswerGrammar


@dataclass(frozen=True, eq=False)
class Request:
    """One text to be written behind a prompt: a `Prompt`, or token ids.

    Options left open (None) take the released model's defaults: callers with a checkpoint's own fill them in before.
    `pins` maps positions of the answer to tokens that stay fixed there; `warm` positions to tokens that their canvas
    starts from instead of noise; `spans` keep positions to a grammar. `banned` are tokens that may not stand, as ends
    may not, among the first `min_tokens` positions."""

    prompt: Prompt | Sequence[int]
    options: Options = Options()  # noqa: RUF009 - frozen
    pins: Mapping[int, int] = field(default_factory=dict)
    warm: Mapping[int, int] = field(default_factory=dict)
    spans: Sequence[GrammarSpan] = ()
    banned: Sequence[int] = ()
    marks: Sequence[int] = ()
    """Places in the prompt where a chunk ends, so that what is encoded up to there can be kept for others."""
    reads: Reads | None = None
    """What is read behind the prompt; nothing is written then."""
    name: str = "the prompt"
    """How error messages name this prompt."""
    id: str = field(default_factory=_new_id)
    """Its identity, which its events carry; unique among the requests under way. By default a new one."""

    def checked(self, config: ModelConfig) -> Request:
        """With a `Prompt` and its mode decided; InputError or CapacityError for what this model cannot run."""
        if self.options.is_judged:
            config.check_canvas("redos" if self.options.redos else "finish")
        mode = "diffusion" if config.is_diffusion else "autoregressive"
        options = self.options.with_defaults({"mode": mode})
        check_kind(self.name, self.prompt, (list, tuple, Prompt), "a list of token ids")
        request = replace(self, options=options, prompt=Prompt.of(self.prompt))
        if options.adapter and Prompt.of(self.prompt).adapter is None:
            raise InputError(
                f"adapter is {options.adapter!r}, which no plan has looked up for {self.name}; ask an LLM that has it",
                option="adapter",
            )
        request._check_canvas(config)
        request._check_room(config)  # before each token is looked at: there may be millions
        request._check_prompt(config)
        request._check_places(config)
        for token in request.options.logit_bias or {}:
            if token >= config.vocab_size:
                message = f"logit_bias names token {token}; the vocabulary has {config.vocab_size}, give ids below that"
                raise InputError(message, option="logit_bias")
        return request

    @property
    def is_diffusion(self) -> bool:
        """Whether it is written canvas by canvas, not token by token, or read on canvases."""
        return self.options.mode == "diffusion"

    @property
    def is_written(self) -> bool:
        """Whether it is written canvas by canvas."""
        return self.is_diffusion and self.reads is None

    def check_reads(self, context: int) -> None:
        """CapacityError where what is read behind the prompt ends beyond so many tokens."""
        if self.reads is not None and len(self.prompt) + self.reads.longest > context:
            raise CapacityError(
                f"{self.name} has {len(self.prompt)} tokens, and the longest question behind it with its canvas "
                f"{self.reads.longest}, beyond the context of {context}; shorten the prompt or the question"
            )

    def canvas_length(self, config: ModelConfig) -> int:
        """The model's own, or less for a short request without room for so much."""
        whole = config.canvas_length
        if not self.options.short or self.reads is not None:
            return whole
        need = max(self.options.max_tokens or whole, max(self.pins, default=-1) + 1)
        return min(whole, -(-need // SHORT) * SHORT)

    def capacity(self, config: ModelConfig) -> int:
        """Tokens that its row of the cache should have room for at first.

        These are the prompt, and the beginning of the answer in whole canvases."""
        if self.reads is not None:
            return len(self.prompt)
        new, length = min(self.options.max_tokens or FIRST_ROOM, FIRST_ROOM), self.canvas_length(config)
        return min(len(self.prompt) + -(-new // length) * length, config.max_position)

    def room(self, span: GrammarSpan, config: ModelConfig) -> int:
        """Tokens that the text of this span may have: its width, or whole canvases up to the end of the answer."""
        if span.width is not None:
            return span.width
        canvas = config.canvas_length
        whole = (config.max_position - len(self.prompt)) // canvas * canvas
        return min(whole, self.options.max_tokens or whole) - span.start

    def guide(self, span: GrammarSpan, config: ModelConfig) -> Guide | AnswerGuide:
        """The guide of this span's text; CapacityError, which names what limits it, where the text has no room."""
        room, least = self.room(span, config), span.grammar.shortest()
        if span.width is None and room < least:
            if room == (self.options.max_tokens or 0) - span.start:
                raise CapacityError(
                    f"the constraint needs at least {least} tokens and has room for {room}; "
                    "raise max_tokens or ask for less",
                    option="max_tokens",
                )
            raise CapacityError(
                f"the constraint needs at least {least} tokens, and behind the {len(self.prompt)} of {self.name} the "
                f"context of {config.max_position} has room for {room}; shorten the prompt or ask for less"
            )
        return span.grammar.start(room)

    def _check_canvas(self, config: ModelConfig) -> None:
        needs_canvas = {
            "mode 'diffusion'": self.is_diffusion,
            "a draft": self.options.drafts,
            "a pin": bool(self.pins),
            "a warm token": bool(self.warm),
            "a span": bool(self.spans),
            "a read": self.reads is not None,
        }
        for what in (what for what, is_requested in needs_canvas.items() if is_requested):
            config.check_canvas(what)
        if self.options.is_judged and (self.spans or self.reads is not None):
            name, what = "redos" if self.options.redos else "finish", "a span with a grammar" if self.spans else "reads"
            raise InputError(f"{self.name} has {what}; {name} cannot go with that, leave it out", option=name)

    def _check_room(self, config: ModelConfig) -> None:
        if not len(self.prompt):
            raise InputError(f"{self.name} is empty; give at least one token (the begin-of-text token, say)")
        self.check_reads(config.max_position)
        need = len(self.prompt) + (self.canvas_length(config) if self.is_written else 1)
        if need > config.max_position:
            raise CapacityError(
                f"{self.name} has {len(self.prompt)} tokens and a canvas needs {need - len(self.prompt)} more, beyond "
                f"the context of {config.max_position}; shorten the prompt"
            )
        if len(self.prompt) + self.options.min_tokens > config.max_position:
            raise CapacityError(
                f"min_tokens is {self.options.min_tokens} behind the {len(self.prompt)} tokens of {self.name}, beyond "
                f"the context of {config.max_position}; lower it",
                option="min_tokens",
            )

    def _check_prompt(self, config: ModelConfig) -> None:
        prompt = Prompt.of(self.prompt)
        check_ids(self.name, prompt.tokens, config.vocab_size)
        if prompt.embeddings is not None or prompt.blocks:
            raise InputError(
                f"{self.name} has embeddings or blocks, which this version cannot encode; give tokens alone"
            )

    def _check_places(self, config: ModelConfig) -> None:
        for what, places in ("pin", self.pins), ("warm token", self.warm):
            if places and not self.is_diffusion:
                raise InputError(f"{self.name} has {what}s in mode {self.options.mode!r}; they need 'diffusion'")
            most = max(1, config.max_position - len(self.prompt))
            check_places(what, self.name, places, most, config.vocab_size)


@dataclass(eq=False, slots=True)
class RowSpan:
    """A row's own part of a `GrammarSpan`: the guide of its text."""

    start: int
    width: int | None
    guide: Guide | AnswerGuide
    path_length: int = 0
    """Tokens of its guide's last walk, on the present canvas."""

    @property
    def is_complete(self) -> bool:
        """Whether the text is a whole one, not only as long as there was room."""
        return self.guide.is_over and not (isinstance(self.guide, AnswerGuide) and self.guide.is_cut)

    def commit(self) -> None:
        """Make final what the last walk put on the canvas."""
        self.guide.commit(self.path_length)
        self.path_length = 0


@dataclass(eq=False, slots=True)
class Row:
    """One request under way. `Row.of` makes one; an engine gives it a seat."""

    request: Request
    """Checked."""
    prompt: Prompt
    rules: Rules
    length: int
    """Positions of its canvases."""
    seed: int
    rest: list[int]
    """Tokens of the prompt that are to be encoded before its first canvas can begin."""
    watch: Watch | None = None
    """Called with its newly committed tokens."""
    inspect: Inspect | None = None
    """Called with its read-outs."""
    sampler: RowSampler | None = None
    """Its sampling options; None: all are off."""
    scores: PromptScores | None = None
    """Takes the log-probabilities of its prompt."""
    readings: Readings | None = None
    """Takes what its reads show."""
    reads_done: int = 0
    """Reads that have ended."""
    glances_done: int = 0
    """Canvases of the next one that have been looked at."""
    positions_read: int = 0
    """Positions that its reads have computed."""
    spans: list[RowSpan] = field(default_factory=list)
    reused: int = 0
    """Tokens of the prompt that were encoded before it began."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    """Tokens that wait to be encoded in the next pass."""
    canvas: int = 0
    """The number of the canvas that it is on, from 0."""
    step: int = 0
    """Steps that were begun on this canvas."""
    steps: int = 0
    """Denoising steps of the canvases that it has committed; without a canvas, its tokens."""
    passes: int = 0
    """Passes of the network for its answer: steps, tokens without a canvas, encodings whose numbers are read."""
    began: float = field(default_factory=time.perf_counter)
    """When it began, or was queued, as `time.perf_counter` counts; in seconds."""
    first_commit: float | None = None
    """Seconds from `began` to its first commit; None before that."""
    finish_reason: Literal["stop", "length"] | None = None
    has_failed: bool = False
    settled: int = 0
    """Leading tokens of this canvas that were committed before the rest."""
    refused: list[Trial] = field(default_factory=list)
    """Tries of this canvas that did not stand."""
    unwritten: int = 0
    """Positions of this canvas that are still to be written one token after another, as no try of it stood."""

    @classmethod
    def of(
        cls,
        request: Request,
        config: ModelConfig,
        watch: Watch | None = None,
        inspect: Inspect | None = None,
        scores: PromptScores | None = None,
        readings: Readings | None = None,
    ) -> Row:
        """A row for a request, of which nothing is encoded yet; it can wait, and be made in any thread.

        `watch` is called with its new tokens, `inspect` with its read-outs; `scores` takes what the model says of its
        prompt, `readings` what its reads show. InputError or CapacityError for what this model cannot run. The guide of
        a grammar takes a moment."""
        request = request.checked(config)
        rules, length = Rules.of(request.options), request.canvas_length(config)
        if request.options.short:  # a step accepts one position at least, so more steps than positions are no use
            rules = replace(rules, max_steps=min(rules.max_steps, length))
        prompt = Prompt.of(request.prompt)
        row = cls(request, prompt, rules, length, request.options.seed or 0, list(prompt.tokens), watch, inspect)
        row.sampler = RowSampler.of(request.options, prompt.tokens)
        row.scores, row.readings = scores, readings
        if request.reads is not None and readings is not None:
            readings.begin(request.reads)
        row.spans = [RowSpan(span.start, span.width, request.guide(span, config)) for span in request.spans]
        return row

    def begin(self, count: int) -> None:
        """Begin behind the first `count` tokens of the prompt, which are encoded."""
        self.rest, self.reused = list(self.prompt.tokens[count:]), count

    @property
    def reusable(self) -> Prompt:
        """What of its prompt may be encoded before it begins.

        All but the last token, because something must be computed; less, where that would lose hidden states that its
        scores follow from. Behind a prompt that is only read, nothing is."""
        if self.request.reads is not None:
            return self.prompt
        return self.prompt.first(len(self.prompt) - 1 if self.scores is None else self.scores.first - 1)

    @property
    def is_over(self) -> bool:
        """Whether it has failed or ended."""
        return self.has_failed or self.finish_reason is not None

    @property
    def is_read(self) -> bool:
        """Whether something behind its prompt is still to be read."""
        return self.request.reads is not None and self.reads_done < len(self.request.reads.each)

    @property
    def read_positions(self) -> int:
        """Positions that its reads still compute, those of a begun one counted whole."""
        if self.request.reads is None:
            return 0
        return self.request.reads.positions - self.positions_read

    @property
    def is_at_cap(self) -> bool:
        """Whether every step that this canvas may take was begun: it stops, whatever the last one shows."""
        return self.step >= self.rules.max_steps

    @property
    def is_on_canvas(self) -> bool:
        """Whether its next tokens come from a canvas, not one after another."""
        return self.request.is_written and not self.unwritten

    @property
    def is_decoded(self) -> bool:
        """Whether its next token follows from those before it alone."""
        return not self.request.is_diffusion or self.unwritten > 0

    @property
    def is_hosted(self) -> bool:
        """Whether the host has a part within each of its steps."""
        return bool(self.spans or self.inspect)

    @property
    def reads_encoded(self) -> bool:
        """Whether it reads hidden states of what is encoded: the next token, or log-probabilities, follow from them."""
        return self.options.logprobs or self.options.verify is not None or not self.request.is_diffusion

    @property
    def options(self) -> Options:
        """Those of its request."""
        return self.request.options

    @property
    def room(self) -> int | None:
        """New tokens still allowed; None: as many as the context holds."""
        return None if self.options.max_tokens is None else self.options.max_tokens - len(self.tokens)

    @property
    def lacking(self) -> int:
        """How many tokens `min_tokens` still asks for before an end is allowed."""
        return self.options.min_tokens - len(self.tokens)

    @property
    def commits_whole(self) -> bool:
        """Whether a canvas commits at once, since its numbers are read, or it may begin again."""
        return self.options.logprobs or self.options.is_judged

    def is_unsure(self, trial: Trial) -> bool:
        """Whether a canvas was stopped by the cap alone, or because it repeated itself."""
        is_cut = trial.steps >= self.rules.max_steps or (self.rules.repeats > 0 and not self.options.early)
        return is_cut and trial.entropy >= self.rules.confidence > 0

    @property
    def draw(self) -> int:
        """The number that the noise of its canvas is counted from: that of the canvas, another one for each try."""
        return self.canvas + (len(self.refused) << TRY_BITS)

    @property
    def pinned_here(self) -> set[int]:
        """Positions of its canvas that are pinned."""
        first = self.canvas * self.length
        return {place - first for place in self.request.pins if 0 <= place - first < self.length}

    @property
    def moves_logits(self) -> bool:
        """Whether its sampling options change logits."""
        return self.sampler is not None and self.sampler.moves_logits

    @property
    def before_canvas(self) -> list[int]:
        """What it has committed before its present canvas."""
        return self.tokens[: len(self.tokens) - self.settled]

    def spans_here(self) -> list[tuple[RowSpan, int, int]]:
        """The spans on its canvas: from position, to position."""
        first, here = self.canvas * self.length, []
        for span in self.spans:
            last = self.length if span.width is None else min(self.length, span.start + span.width - first)
            if span.start - first < self.length and last > 0:
                here.append((span, max(0, span.start - first), last))
        return here
