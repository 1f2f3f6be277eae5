"""One caller's engine: prompts in, events out, until all have ended. Many callers share one in `batch`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sfumato.engine.engine import Engine, EngineSettings
from sfumato.engine.request import Failure, Request, Row
from sfumato.errors import InputError
from sfumato.events import Event
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.model.prompt import Prompt
from sfumato.options import Options

ROUND = 256
"""Rows have room for a multiple of so many tokens: a cache seldom changes its shape, and what was recorded stays."""


class Run:
    """A generation of its own: iterate it for its events; `cache` afterwards holds what was encoded.

    `prompts` are token ids or `Prompt`s, with `options` (one for all, or one each) and `pins` of the answers; or
    `Request`s, or rows made of them. `cache` continues from earlier work: row i of it must hold exactly the first
    cache.lengths[i] tokens of prompt i, and not all of them. `engine` is one without rows, that has run before and is
    warm: its first seats may hold the beginnings of the prompts. `settings`: of a new engine. InputError and
    CapacityError before any work."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int] | Prompt | Request | Row],
        options: Options | Sequence[Options] = Options(),  # noqa: B008 - frozen
        *,
        pins: Sequence[Mapping[int, int]] | None = None,
        cache: KVCache | None = None,
        engine: Engine | None = None,
        settings: EngineSettings = EngineSettings(),  # noqa: B008 - frozen
    ) -> None:
        each = [options] * len(prompts) if isinstance(options, Options) else list(options)
        if not prompts or len(each) != len(prompts):
            raise InputError(f"{len(prompts)} prompts with {len(each)} sets of options; give one set for each prompt")
        if pins is not None and len(pins) != len(prompts):
            raise InputError(f"{len(prompts)} prompts came with {len(pins)} sets of pins; give one for each prompt")
        rows = []
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, Row):
                rows.append(prompt)
                continue
            if not isinstance(prompt, Request):
                prompt = Request(prompt, each[i], {} if pins is None else pins[i], id=str(i))
            rows.append(Row.of(replace(prompt, name=f"prompt {i}"), model.config))
        if cache is not None and cache.batch != len(prompts):
            raise InputError(
                f"{len(prompts)} prompts came with a cache of {cache.batch} rows; give one for each prompt"
            )
        need = max(row.request.capacity(model.config) for row in rows)
        need = max(need, min(-(-need // ROUND) * ROUND, model.config.max_position))
        if cache is not None and cache.capacity < need:
            cache = cache.fork(list(range(cache.batch)), need)
        self.engine = engine or Engine(model, len(prompts), need, cache=cache, settings=settings)
        if engine is not None and (len(engine.rows) < len(prompts) or engine.cache.capacity < need):
            engine.resize(max(len(engine.rows), len(prompts)), max(engine.cache.capacity, need))
        for row in rows:
            self.engine.join(row)

    @property
    def rows(self) -> list[Row]:
        """The rows of the prompts, in their order."""
        return [row for row in self.engine.rows if row is not None]

    @property
    def cache(self) -> KVCache:
        """What was encoded, a row for each prompt."""
        return self.engine.cache

    def __iter__(self) -> Iterator[Event]:
        return (event for events in self.turns() for event in events)

    def turns(self) -> Iterator[list[Event]]:
        """The events of one turn after the other; of some there are none."""
        while self.engine.live:
            events: list[Event] = []
            for event in self.engine.turn():
                if isinstance(event, Failure):
                    yield events
                    raise event.error
                events.append(event)
            yield events


def generate(
    model: Model,
    prompts: Sequence[Sequence[int] | Prompt | Request | Row],
    options: Options | Sequence[Options] = Options(),  # noqa: B008 - frozen
    **more: Any,
) -> Iterator[Event]:
    """Generate for one or more prompts (token ids); yields Draft (if asked for), Commit and, once a row, Done.

    `more` goes to `Run`. InputError and CapacityError before any work."""
    return iter(Run(model, prompts, options, **more))
