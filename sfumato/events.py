"""What comes out: the events of a run, and the results.

Everything a run does is an event on one iterator: the command line, the server, the page and the evaluations consume
the same stream. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Draft:
    """The argmax canvas after one step. `entropies` in nats, `accepted` as flags, both one a position."""

    row: int
    canvas: int
    step: int
    tokens: list[int]
    entropies: list[float]
    accepted: list[bool]
    text: str = ""
    pieces: list[str] = field(default_factory=list)
    """The text of each position's token; "" for a control token."""
    end: int = 0
    """Positions before the first end of the text."""
    request: str = ""
    """The id of the request it belongs to."""


@dataclass(frozen=True)
class Commit:
    """Tokens that are final: one canvas (or one token in autoregressive mode), cut at eos, stop and max_tokens.

    `text`, and in a chat `thought` and `tool_calls`, are what they add to the answer's. `pieces` (the text of each
    token) and `top_logprobs` (piece -> log-probability) come with log-probabilities."""

    row: int
    canvas: int
    steps: int
    tokens: list[int]
    logprobs: list[float] | None = None
    text: str = ""
    thought: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    pieces: list[str] | None = None
    top_logprobs: list[dict[str, float]] | None = None
    is_last: bool = False
    """The row ends with it."""
    request: str = ""
    """The id of the request it belongs to."""


@dataclass(frozen=True)
class Usage:
    """What an answer took. A pass is one run of the whole stack over a canvas, a prompt chunk or a token."""

    prompt_tokens: int = 0
    tokens: int = 0
    canvases: int = 0
    steps: int = 0
    passes: int = 0
    seconds: float = 0.0
    first_commit_seconds: float | None = None
    reused_tokens: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Committed tokens per pass of the stack, prompt encoding left out (as in the published comparisons)."""
        return self.tokens / self.passes if self.passes else 0.0


@dataclass(frozen=True)
class Done:
    """The end of one row. finish_reason: "stop" (end of turn or a stop string) or "length"."""

    row: int
    finish_reason: Literal["stop", "length"]
    tokens: list[int]
    usage: Usage
    seed: int = 0
    text: str = ""
    stop: str | None = None
    logprobs: list[float] | None = None
    thought: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    request: str = ""
    """The id of the request it belongs to."""


@dataclass(frozen=True)
class Completion:
    """A finished answer. `text` is the answer alone; `thought` and `tool_calls` are filled by `LLM.chat`."""

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    seed: int = 0
    logprobs: list[float] | None = None
    stop: str | None = None
    """The stop string that ended the answer, if one did."""
    thought: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, done: Done) -> Completion:
        """What the last event of an answer says."""
        told = {field.name: getattr(done, field.name) for field in dataclasses.fields(cls)}
        return cls(**told)


@dataclass(frozen=True)
class Filled:
    """A filled template. `values` are the slots' texts by name; the whole `text` is all pieces joined."""

    text: str
    values: dict[str, str]
    usage: Usage
    seed: int
    lengths: dict[str, int] = field(default_factory=dict)
    """Tokens of each slot, padding not counted."""


@dataclass(frozen=True)
class Edited:
    """An edited text beside the old one."""

    text: str
    old: str
    usage: Usage
    seed: int

    def diff(self, name: str = "text") -> str:
        """Unified, as `diff -u` prints it; "" where nothing changed."""
        lines = difflib.unified_diff(_lines(self.old), _lines(self.text), f"a/{name}", f"b/{name}")
        return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


@dataclass(frozen=True)
class Decision:
    """One answer: the likeliest choice, and the probability of each."""

    choice: str
    probabilities: dict[str, float]


Event = Draft | Commit | Done


def _lines(text: str) -> list[str]:
    """At line feeds alone, which stay: a carriage return is a change like any other."""
    return [line + "\n" for line in text.split("\n")[:-1]] + ([last] if (last := text.split("\n")[-1]) else [])
