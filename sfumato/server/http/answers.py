"""What the answers of every dialect share: a draft, and what a request cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import TypedDict

from sfumato.events import Draft, Usage


class PromptTokens(TypedDict):
    """Tokens of the prompt that needed no encoding."""

    cached_tokens: int


class CompletionTokens(TypedDict):
    """Tokens of the answer that are thoughts."""

    reasoning_tokens: int


class UsageBody(TypedDict):
    """What a request took; OpenAI's fields, and ours for passes and canvases."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens
    steps: int
    passes: int
    canvases: int
    tokens_per_pass: float
    seconds: float
    first_commit_seconds: float | None


def draft_of(number: int, draft: Draft) -> dict[str, Any]:
    """A draft as every stream sends it; `number` is the answer it belongs to."""
    return {
        "index": number,
        "canvas": draft.canvas,
        "step": draft.step,
        "pieces": draft.pieces,
        "entropies": [round(entropy, 4) for entropy in draft.entropies],
        "accepted": draft.accepted,
        "end": draft.end,
    }


def usage_of(usages: Sequence[Usage], n: int = 1) -> dict[str, Any]:
    """What a request took: of each prompt's `n` answers the first counts the prompt."""
    prompt = sum(usage.prompt_tokens for usage in usages[::n])
    tokens, passes = sum(usage.tokens for usage in usages), sum(usage.passes for usage in usages)
    firsts = [usage.first_commit_seconds for usage in usages if usage.first_commit_seconds is not None]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.reused_tokens for usage in usages[::n])},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.thought_tokens for usage in usages)},
        "steps": sum(usage.steps for usage in usages),
        "passes": passes,
        "canvases": sum(usage.canvases for usage in usages),
        "tokens_per_pass": round(tokens / passes, 4) if passes else 0.0,
        "seconds": round(max((usage.seconds for usage in usages), default=0.0), 6),
        "first_commit_seconds": round(min(firsts), 6) if firsts else None,
    }
