"""One caller's engine: prompts in, events out, until all have ended. Many callers share one in `batch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sfumato.engine.engine import Engine
from sfumato.engine.guided import Span
from sfumato.engine.request import Failure, Request, Row
from sfumato.errors import InputError
from sfumato.events import Event
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.options import Options

ROUND = 256
"""Rows have room for a multiple of so many tokens: a cache seldom changes its shape, and what was recorded stays."""


class Run:
    """A generation of its own: iterate it for its events; `cache` afterwards holds what was encoded.

    `cache` continues from earlier work: row i of it must hold exactly the first cache.lengths[i] tokens of prompt i,
    and not all of them. `engine` is one without rows, that has run before and is warm: its first seats may hold the
    beginnings of the prompts. `dice` take the place of those that are counted from the seeds. `chunk`, `record`, `lag`:
    see `Engine`. InputError and CapacityError before any work."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]] | Sequence[Request],
        options: Options | Sequence[Options] = Options(),  # noqa: B008 - frozen
        *,
        pins: Sequence[Mapping[int, int]] | None = None,
        warm: Sequence[Mapping[int, int]] | None = None,
        spans: Sequence[Sequence[Span]] | None = None,
        watch: Callable[[int, list[int]], int | None] | None = None,
        cache: KVCache | None = None,
        engine: Engine | None = None,
        **more: Any,
    ) -> None:
        each = [options] * len(prompts) if isinstance(options, Options) else list(options)
        if not prompts or len(each) != len(prompts):
            raise InputError(f"{len(prompts)} prompts with {len(each)} sets of options; give one set for each prompt")
        requests = []
        given: dict[str, Any] = {"pins": pins, "warm": warm, "spans": spans}
        for name, what in ("pins", "pins"), ("warm", "warm starts"), ("spans", "spans"):
            if given[name] is not None and len(given[name]) != len(prompts):
                raise InputError(
                    f"{len(prompts)} prompts came with {len(given[name])} sets of {what}; give one for each prompt"
                )
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, Request):
                request = prompt
            else:
                own: dict[str, Any] = {name: some[i] for name, some in given.items() if some is not None}
                own["watch"] = None if watch is None else partial(watch, i)
                request = Request(list(prompt), each[i], **own)  # type: ignore[call-overload]
            requests.append(replace(request, name=f"prompt {i}").checked(model.config))
        if cache is not None and cache.batch != len(prompts):
            raise InputError(
                f"{len(prompts)} prompts came with a cache of {cache.batch} rows; give one for each prompt"
            )
        need = max(request.capacity(model.config) for request in requests)
        need = max(need, min(-(-need // ROUND) * ROUND, model.config.max_position))
        if cache is not None and cache.capacity < need:
            cache = cache.fork(list(range(cache.batch)), need)
        self.engine = engine or Engine(model, len(prompts), need, cache=cache, **more)
        if engine is not None and (len(engine.rows) < len(prompts) or engine.cache.capacity < need):
            engine.resize(max(len(engine.rows), len(prompts)), max(engine.cache.capacity, need))
        for request in requests:
            self.engine.join(request)

    @property
    def rows(self) -> list[Row]:
        return [row for row in self.engine.rows if row is not None]

    @property
    def cache(self) -> KVCache:
        return self.engine.cache

    def __iter__(self) -> Iterator[Event]:
        while self.engine.live:
            for event in self.engine.turn():
                if isinstance(event, Failure):
                    raise event.error
                yield event


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    options: Options | Sequence[Options] = Options(),  # noqa: B008 - frozen
    **more: Any,
) -> Iterator[Event]:
    """Generate for one or more prompts (token ids); yields Draft (if asked for), Commit and, once a row, Done.

    `more` goes to `Run`. InputError and CapacityError before any work."""
    return iter(Run(model, prompts, options, **more))
