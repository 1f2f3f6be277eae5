"""What lm-evaluation-harness asks of a model, as queries that any model answers: likelihoods, and continued texts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sfumato.evals.tasks import seeded
from sfumato.events import Completion, Scored, Usage
from sfumato.options import Options
from sfumato.templates.interface import LanguageModel
from sfumato.templates.patience import run_patiently
from sfumato.templates.requests import Complete, Likelihood

LONGEST = 256
"""Tokens of a text that a task asks for, where neither the task nor the options say."""

Advance = Callable[[int], None]
"""Called with how many requests have been answered."""


class HarnessRequests:
    """What such a task asks of a model, `batch` requests at a time, with what each took by its text."""

    def __init__(self, llm: LanguageModel, options: Options, batch: int, advance: Advance) -> None:
        self.llm, self.options, self.batch, self.advance = llm, options, batch, advance
        self.usages: dict[str, Usage] = {}
        """By the text that was asked about."""
        self.seconds = 0.0
        """In which the model worked."""

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """The log-probability of each continuation behind its context, in nats; and whether it is the greedy one."""
        queries = [Likelihood(context, continuation, self.options) for context, continuation in pairs]
        results: list[Scored] = self._run(queries, [context for context, _ in pairs])
        return [(one.logprob, one.is_greedy) for one in results]

    def text_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text as a whole."""
        results: list[Scored] = self._run([Likelihood(text, None, self.options) for text in texts], texts)
        return [one.logprob for one in results]

    def texts(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The continuation of each context, up to the strings at which the task stops."""
        queries = [Complete(context, self._options_of(context, wishes)) for context, wishes in requests]
        results: list[Completion] = self._run(queries, [context for context, _ in requests])
        return [one.text for one in results]

    def _options_of(self, context: str, wishes: Mapping[str, Any]) -> Options:
        until = wishes.get("until") or ()
        stop = (*self.options.stop, *((until,) if isinstance(until, str) else tuple(one for one in until if one)))
        most = self.options.max_tokens or wishes.get("max_gen_toks") or wishes.get("max_new_tokens") or LONGEST
        return seeded(replace(self.options, stop=stop, max_tokens=int(most)), context)

    def _run(self, queries: Sequence[Any], texts: Sequence[str]) -> list[Any]:
        results: list[Any] = []
        began = time.perf_counter()
        for start in range(0, len(queries), self.batch):
            some = queries[start : start + self.batch]
            results += asyncio.run(self._all(some))
            self.advance(len(some))
        self.seconds += time.perf_counter() - began
        for text, result in zip(texts, results, strict=True):
            self.usages[text] = Usage.total([self.usages.get(text, Usage()), result.usage])
        return results

    async def _all(self, queries: Sequence[Any]) -> list[Any]:
        return [*await asyncio.gather(*(run_patiently(self.llm, query) for query in queries))]
