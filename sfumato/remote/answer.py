"""Between our records and OpenAI's JSON: chunks of an answer to events, options and conversations to what is sent.

What has another shape than it should is a KeyError, TypeError or ValueError here; `Host.reading` makes the sentence.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from sfumato.errors import InputError, SfumatoError
from sfumato.events import Commit, Completion, Done, Draft, Event, Usage
from sfumato.options import Options

Messages = list[dict[str, Any]]


class Answer:
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
        found: list[Event] = []
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        if chunk.get("seed") is not None:
            self._seed = int(chunk["seed"])
        if chunk.get("draft"):
            draft = _draft(chunk["draft"])
            self._canvas, self._steps = draft.canvas, draft.step
            found.append(draft)
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or choice.get("message") or {}
            text = text_of(delta.get("content") or choice.get("text") or "")
            thought = text_of(delta.get("reasoning_content") or delta.get("reasoning") or "")
            pieces, logprobs, top_logprobs = self._read_logprobs(choice.get("logprobs") or {})
            for number, call in enumerate(delta.get("tool_calls") or []):
                index = call.get("index")
                name, arguments = self._calls.setdefault(number if index is None else int(index), ([], []))
                name.append(text_of(call["function"].get("name") or ""))
                arguments.append(text_of(call["function"].get("arguments") or ""))
            if text or thought or logprobs:
                self._first = seconds if self._first is None else self._first
                self._texts.append(text)
                self._thoughts.append(thought)
                self._logprobs += logprobs or []
                commit = Commit(0, self._canvas, self._steps, [], logprobs, text, thought)
                found.append(dataclasses.replace(commit, pieces=pieces, top_logprobs=top_logprobs))
            if choice.get("finish_reason"):
                self.finish_reason = text_of(choice["finish_reason"])
                reason = choice.get("stop_reason")
                self._stop = reason if isinstance(reason, str) and reason in self._options.stop else None
        return found

    def end(self, seconds: float) -> list[Event]:
        """The calls, whose arguments may come in fragments, and Done."""
        calls = [_call("".join(name), "".join(arguments)) for _, (name, arguments) in sorted(self._calls.items())]
        found: list[Event] = [Commit(0, self._canvas, self._steps, [], tool_calls=calls)] if calls else []
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
        return [*found, done]

    def _read_logprobs(
        self, told: Mapping[str, Any]
    ) -> tuple[list[str] | None, list[float] | None, list[dict[str, float]] | None]:
        """Pieces, log-probabilities and the likeliest, from a chat's form or the older one."""
        if not self._options.logprobs or not told:
            return None, None, None
        wants_top = self._options.top_logprobs > 0
        if "token_logprobs" in told:
            pieces, tops = told["tokens"], told.get("top_logprobs") or []
            logprobs = [float(value or 0) for value in told["token_logprobs"]]
        else:
            content = told.get("content") or []
            pieces, logprobs = [one["token"] for one in content], [float(one["logprob"]) for one in content]
            tops = [{top["token"]: top["logprob"] for top in one.get("top_logprobs") or []} for one in content]
        likeliest = [{text_of(piece): float(value) for piece, value in (top or {}).items()} for top in tops]
        return [text_of(piece) for piece in pieces], logprobs, likeliest if wants_top else None


def _draft(told: Mapping[str, Any]) -> Draft:
    pieces = [text_of(piece) for piece in told["pieces"]]
    entropies = [float(entropy) for entropy in told["entropies"]]
    accepted, end = [bool(one) for one in told["accepted"]], int(told["end"])
    if not len(pieces) == len(entropies) == len(accepted) or not 0 <= end <= len(pieces):
        raise ValueError
    row, canvas, step = int(told.get("index", 0)), int(told["canvas"]), int(told["step"])
    return Draft(row, canvas, step, [], entropies, accepted, "".join(pieces[:end]), pieces, end)


def _call(name: str, arguments: str) -> dict[str, Any]:
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        read = ()
    if not isinstance(read, dict | None):
        raise SfumatoError(f"the model called {name!r} with arguments that are no JSON object: {arguments[:80]!r}")
    return {"name": name, "arguments": read or {}}


def usage_of(told: Mapping[str, Any]) -> Usage:
    """Figures that a host does not give, or that are none, are 0."""

    def number(value: Any) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number and 0 <= value < 1e15 else 0

    details = told.get("prompt_tokens_details") or {}
    first = told.get("first_commit_seconds")
    return Usage(
        prompt_tokens=number(told.get("prompt_tokens")),
        tokens=number(told.get("completion_tokens")),
        canvases=number(told.get("canvases")),
        steps=number(told.get("steps")),
        passes=number(told.get("passes")),
        seconds=number(told.get("seconds")),
        first_commit_seconds=None if first is None else number(first),
        reused_tokens=number(details.get("cached_tokens")),
    )


def completion_of(events: Iterable[Event]) -> Completion:
    return Completion.of(next(event for event in events if isinstance(event, Done)))


def text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def given(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not what they are by default."""
    return {f.name: value for f in dataclasses.fields(record) if (value := getattr(record, f.name)) != f.default}


def tools_out(tools: Iterable[Mapping[str, Any]], is_strict: bool) -> list[dict[str, Any]]:
    """Tools as OpenAI's API has them; `is_strict`: arguments obey their schema."""
    extra = {"strict": True} if is_strict else {}
    return [{"type": "function", "function": {**tool.get("function", tool), **extra}} for tool in tools]


def messages_out(messages: Messages, is_sfumato: bool) -> Messages:
    """A conversation as OpenAI's API has it: arguments as JSON text, an id on every call and on what answers it. A
    thought goes to a Sfumato server alone, whose template decides. InputError names the message that is wrong."""
    found: Messages = []
    waiting: list[tuple[str, str]] = []  # (name, id) of calls without an answer yet
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f'message {number} is {type(message).__name__}; give a record with "role" and "content"')
        one = dict(message)
        if not is_sfumato:
            one.pop("reasoning_content", None)
        if one.get("tool_calls"):
            one["tool_calls"] = [_call_out(call, number, place) for place, call in enumerate(one["tool_calls"])]
            waiting += [(call["function"]["name"], call["id"]) for call in one["tool_calls"]]
        if one.get("role") == "tool":
            for call in waiting:
                if one.get("name", call[0]) == call[0] and one.get("tool_call_id", call[1]) == call[1]:
                    one["tool_call_id"] = call[1]
                    waiting.remove(call)
                    break
        found.append(one)
    return found


def _call_out(call: Any, number: int, place: int) -> dict[str, Any]:
    try:
        function = {**call["function"], "name": text_of(call["function"]["name"])}
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments") or {})
        return {"id": call.get("id") or f"call_{number}_{place}", "type": "function", "function": function}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        where = f"tool call {place} of message {number}"
        raise InputError(f'{where} is not {{"function": {{"name": …, "arguments": …}}}} with JSON in it') from None
