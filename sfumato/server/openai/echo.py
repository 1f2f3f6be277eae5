"""`echo` with `logprobs`: the prompts again, with the log-probabilities of their tokens, as evaluations ask for them.

They come from one encode pass. An answer of no token, or of one, comes from the same pass; a longer one is written
behind it, as without `echo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.types import Scope

from sfumato.events import Scored, ScoredToken, Usage
from sfumato.options import Options
from sfumato.server.http.service import Service
from sfumato.server.openai.chat import finite
from sfumato.templates.requests import Likelihood


async def scores_of(
    service: Service, scope: Scope, prompts: Sequence[str | list[int]], options: Options
) -> list[Scored]:
    """The log-probabilities of these prompts, in their order; `options` are of the token behind each."""
    results: dict[int, Scored] = {}
    queries = [Likelihood(prompt, None, options) for prompt in prompts]
    async with aclosing(service.events(scope, queries)) as events:
        async for number, event in events:
            if isinstance(event, Scored):
                results[number] = event
    return [results[number] for number in range(len(prompts))]


def echoed(prompt: str | list[int], scored: Scored) -> str:
    """The text of a prompt."""
    return prompt if isinstance(prompt, str) else scored.text


def usage_of_score(scored: Scored, tokens: int) -> Usage:
    """What a score took, for an answer of so many tokens."""
    return replace(scored.usage, tokens=tokens, steps=0)


def logprobs_of(scored: Scored, top: int, more: int) -> dict[str, Any]:
    """The log-probabilities of a prompt, and of `more` tokens behind it (0 or 1), in OpenAI's older form."""
    tokens = [*scored.tokens, scored.following][: len(scored.tokens) + more]
    return {
        "tokens": [one.piece for one in tokens],
        "token_logprobs": [None if one.logprob is None else finite(one.logprob) for one in tokens],
        "top_logprobs": [_likeliest(one, top) for one in tokens] if top else None,
        "text_offset": [one.offset for one in tokens],
    }


def _likeliest(one: ScoredToken, top: int) -> dict[str, float] | None:
    if one.logprob is None:
        return None
    return {piece: finite(value) for piece, value in list(one.top.items())[:top]}
