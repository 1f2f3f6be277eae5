"""What a host sends, as our records: the chunks of an answer as events, a body as the result of its query.

A chunk or body of another shape than it should have is a KeyError, TypeError or ValueError here; `Host.reading` makes
the sentence.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from sfumato.errors import InputError, SfumatoError
from sfumato.events import Commit, Completion, Done, Draft, Edited, Event, Filled, Scored, ScoredToken, Usage
from sfumato.options import Options
from sfumato.templates.requests import Edit, Fill, Infill, Likelihood, QueryFor


class AnswerReader:
    """One answer as it grows, from a host's chunks."""

    def __init__(self, options: Options) -> None:
        self.finish_reason: str | None = None
        self._options = options
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: dict[int, tuple[list[str], list[str]]] = {}
        """Index -> fragments of the name and of the arguments."""
        self._logprobs: list[float] = []
        self._stop: str | None = None
        self._seed, self._canvas, self._steps = options.seed or 0, 0, 0
        self._usage: Mapping[str, Any] = {}
        self._first: float | None = None

    def read(self, chunk: Mapping[str, Any], seconds: float) -> list[Event]:
        """The events of one chunk, which came after so many seconds. KeyError, TypeError… for one of another shape."""
        events: list[Event] = []
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        if chunk.get("seed") is not None:
            self._seed = int(chunk["seed"])
        if chunk.get("draft"):
            draft = _draft(chunk["draft"])
            self._canvas, self._steps = draft.canvas, draft.step
            events.append(draft)
        for choice in chunk.get("choices") or []:
            events += self._read_choice(choice, seconds)
        return events

    def _read_choice(self, choice: Mapping[str, Any], seconds: float) -> list[Event]:
        """The commit that a choice brings; none where it brings no text."""
        delta = choice.get("delta") or choice.get("message") or {}
        text = text_of(delta.get("content") or choice.get("text") or "")
        thought = text_of(delta.get("reasoning_content") or delta.get("reasoning") or "")
        pieces, logprobs, top_logprobs = self._read_logprobs(choice.get("logprobs") or {})
        for number, call in enumerate(delta.get("tool_calls") or []):
            index = call.get("index")
            name, arguments = self._calls.setdefault(number if index is None else int(index), ([], []))
            name.append(text_of(call["function"].get("name") or ""))
            arguments.append(text_of(call["function"].get("arguments") or ""))
        commits: list[Event] = []
        if text or thought or logprobs:
            self._first = seconds if self._first is None else self._first
            self._texts.append(text)
            self._thoughts.append(thought)
            self._logprobs += logprobs or []
            commit = Commit(0, self._canvas, self._steps, [], logprobs, text, thought)
            commits.append(dataclasses.replace(commit, pieces=pieces, top_logprobs=top_logprobs))
        if choice.get("finish_reason"):
            self.finish_reason = text_of(choice["finish_reason"])
            reason = choice.get("stop_reason")
            self._stop = reason if isinstance(reason, str) and reason in self._options.stop else None
        return commits

    def end(self, seconds: float) -> list[Event]:
        """The calls, whose arguments may come in fragments, and Done."""
        calls = [_call("".join(name), "".join(arguments)) for _, (name, arguments) in sorted(self._calls.items())]
        commits: list[Event] = [Commit(0, self._canvas, self._steps, [], tool_calls=calls)] if calls else []
        done = Done(
            0,
            "length" if self.finish_reason == "length" else "stop",
            [],
            usage_of({"seconds": seconds, "first_commit_seconds": self._first, **self._usage}),
            self._seed,
            "".join(self._texts),
            self._stop,
            self._logprobs if self._options.logprobs else None,
            "".join(self._thoughts) or None,
            calls,
        )
        return [*commits, done]

    def _read_logprobs(
        self, body: Mapping[str, Any]
    ) -> tuple[list[str] | None, list[float] | None, list[dict[str, float]] | None]:
        """Pieces, log-probabilities and the likeliest, from a chat's form or the older one."""
        if not self._options.logprobs or not body:
            return None, None, None
        wants_top = self._options.top_logprobs > 0
        if "token_logprobs" in body:
            pieces, tops = body["tokens"], body.get("top_logprobs") or []
            logprobs = [float(value or 0) for value in body["token_logprobs"]]
        else:
            content = body.get("content") or []
            pieces, logprobs = [one["token"] for one in content], [float(one["logprob"]) for one in content]
            tops = [{top["token"]: top["logprob"] for top in one.get("top_logprobs") or []} for one in content]
        likeliest = [{text_of(piece): float(value) for piece, value in (top or {}).items()} for top in tops]
        return [text_of(piece) for piece in pieces], logprobs, likeliest if wants_top else None


def result_of(query: QueryFor[Any], body: Mapping[str, Any]) -> Any:
    """The result that a Sfumato server's body holds for this query."""
    match query:
        case Infill():
            values, lengths = {"middle": text_of(body["middle"])}, {"middle": int(body["length"])}
            return Filled(text_of(body["text"]), values, usage_of(body["usage"]), int(body["seed"]), lengths)
        case Fill():
            values = {name: text_of(value) for name, value in body["values"].items()}
            lengths = {name: int(length) for name, length in body["lengths"].items()}
            return Filled(text_of(body["text"]), values, usage_of(body["usage"]), int(body["seed"]), lengths)
        case Edit():
            return Edited(text_of(body["text"]), query.text, usage_of(body["usage"]), int(body["seed"]))
    raise InputError(f"there is no request {query!r}; give one of templates.requests")


def scored_of(query: Likelihood, body: Mapping[str, Any]) -> Scored:
    """The log-probabilities that a body of /completions holds, with the one token behind the text."""
    (choice,) = body["choices"]
    logprobs = choice["logprobs"]
    tokens = [
        ScoredToken(-1, text_of(piece), int(offset), None if value is None else float(value), _likeliest(top))
        for piece, value, top, offset in zip(
            logprobs["tokens"],
            logprobs["token_logprobs"],
            logprobs["top_logprobs"],
            logprobs["text_offset"],
            strict=True,
        )
    ]
    *scored, following = tokens
    text, start = text_of(choice["text"]), 0
    whole, answer = text[: following.offset], text[following.offset :]
    if isinstance(query.prompt, str) and query.continuation:
        length = len(query.prompt)  # the first token that reaches beyond the prompt, and those behind it
        ends = [one.offset for one in tokens[1:]]
        start = next(place for place, end in enumerate(ends) if end > length)
    elif query.continuation:
        start = len(query.prompt)
    first = scored[start].offset if start else 0
    scored = [dataclasses.replace(one, offset=one.offset - first) for one in scored[start:]]
    following = dataclasses.replace(following, offset=following.offset - first)
    return Scored(
        scored, whole[first:], following, answer, usage_of(body.get("usage") or {}), int(body.get("seed") or 0)
    )


def _likeliest(top: Mapping[str, Any] | None) -> dict[str, float]:
    return {text_of(piece): float(value) for piece, value in (top or {}).items()}


def _draft(body: Mapping[str, Any]) -> Draft:
    pieces = [text_of(piece) for piece in body["pieces"]]
    entropies = [float(entropy) for entropy in body["entropies"]]
    accepted, end = [bool(flag) for flag in body["accepted"]], int(body["end"])
    if not len(pieces) == len(entropies) == len(accepted) or not 0 <= end <= len(pieces):
        raise ValueError
    row, canvas, step = int(body.get("index", 0)), int(body["canvas"]), int(body["step"])
    return Draft(row, canvas, step, [], entropies, accepted, "".join(pieces[:end]), pieces, end)


def _call(name: str, arguments: str) -> dict[str, Any]:
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = ()
    if not isinstance(parsed, dict | None):
        raise SfumatoError(f"the model called {name!r} with arguments that are no JSON object: {arguments[:80]!r}")
    return {"name": name, "arguments": parsed or {}}


def usage_of(body: Mapping[str, Any]) -> Usage:
    """The figures of an answer; those that a host does not give, or that are no numbers, are 0."""

    def number(value: Any) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number and 0 <= value < 1e15 else 0

    details = body.get("prompt_tokens_details") or {}
    first = body.get("first_commit_seconds")
    return Usage(
        prompt_tokens=number(body.get("prompt_tokens")),
        tokens=number(body.get("completion_tokens")),
        canvases=number(body.get("canvases")),
        steps=number(body.get("steps")),
        passes=number(body.get("passes")),
        seconds=number(body.get("seconds")),
        first_commit_seconds=None if first is None else number(first),
        reused_tokens=number(details.get("cached_tokens")),
        thought_tokens=number((body.get("completion_tokens_details") or {}).get("reasoning_tokens")),
    )


def completion_of(events: Iterable[Event]) -> Completion:
    """The finished answer that a stream of events ends with."""
    return Completion.of(next(event for event in events if isinstance(event, Done)))


def text_of(value: Any) -> str:
    """The value, which is to be text; TypeError where it is not."""
    if not isinstance(value, str):
        raise TypeError
    return value
