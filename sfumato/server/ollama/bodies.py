"""The bodies of Ollama's routes, and what they ask of the model.

As in Ollama, a field that is not known has no effect, and the answer's header says so; an option that would change the
text and that there is not is refused by its name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sfumato.errors import InputError
from sfumato.options import BIG, CONSTRAINTS, OPTIONS, Options
from sfumato.server.backend import ModelCard
from sfumato.server.http.bodies import Body, Most, only, reading_of
from sfumato.server.http.checks import check_chat, check_length
from sfumato.server.http.errors import Refusal
from sfumato.server.http.options import resolved
from sfumato.server.ollama.context import read_context, written_context
from sfumato.server.openai.bodies import ANY_OBJECT, Function, chat_options, shown_tools
from sfumato.templates.requests import Chat, Complete, Infill, Query

LATEST = ":latest"
"""Ollama's tag of a model that is named without one."""


class OllamaBody(Body):
    """An object of Ollama's API, where a field that is not known has no effect."""

    is_open = True


# --- options -------------------------------------------------------------------------------------------------------

_RENAMED = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
"""What Ollama calls an option -> its name here."""

_UNUSED = {
    *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa", "low_vram", "f16_kv"),
    *("use_mmap", "use_mlock", "vocab_only", "logits_all", "embedding_only", "repeat_last_n", "penalize_newline"),
    *("mirostat_tau", "mirostat_eta", "draft_num_predict"),
}
"""Options of how a model is loaded, or that mean nothing without another one."""

_NEUTRAL: dict[str, tuple[float, ...]] = {
    "typical_p": (0, 1),
    "tfs_z": (0, 1),
    "mirostat": (0,),
}
"""Options that there are not, and the values that ask for nothing."""

_BY_FIELDS = ("drafts", "logprobs", "top_logprobs", "must_call", "thinking", *CONSTRAINTS)
"""Options here that fields of the request set, or none."""


class Answered(OllamaBody):
    """What the bodies of chats and of prompts share."""

    model: str = Field(min_length=1)
    stream: bool | None = Field(None, description="false: one object; by default a line for every part.")
    options: dict[str, Any] | None = Field(None, description="Ollama's options, or those of GET /v1/options.")
    format: Literal["", "json"] | dict[str, Any] | None = Field(None, description='"json", or a JSON Schema.')
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    keep_alive: str | Annotated[float, Field(ge=-BIG, le=BIG)] | None = Field(
        None, description="0 asks for nothing but a word: the model stays."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("options")
    @classmethod
    def _without_unused(cls, options: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        reading = reading_of(info)
        for name in sorted((options or {}).keys() & _UNUSED):
            if reading.is_strict:
                raise ValueError(f"{name} has no effect here, and this server is strict; leave it out")
            reading.leave_out(f"options.{name}")
        return {name: value for name, value in (options or {}).items() if name not in _UNUSED}

    def answer_options(self, card: ModelCard, is_template: bool = False, **more: Any) -> Options:
        """How to answer; `more` goes before what the options say."""
        values = dict(self._chosen())
        if self.logprobs:
            values |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.think is not None:
            values["thinking"] = bool(self.think)
        return resolved(values | more, card, is_template)

    def schema_of_answer(self) -> dict[str, Any] | None:
        """The schema that the answer obeys; None: it is text."""
        if self.format in (None, ""):
            return None
        return ANY_OBJECT if not isinstance(self.format, dict) else self.format

    def _chosen(self) -> Iterator[tuple[str, Any]]:
        """The options by our names. InputError for one that there is not."""
        for name, value in (self.options or {}).items():
            if value is None:
                continue
            own = _RENAMED.get(name, name)
            if own == "max_tokens" and isinstance(value, (int, float)) and value < 0:  # to the end of the context
                continue
            if own in OPTIONS and own not in _BY_FIELDS:
                yield own, _of_kind(OPTIONS[own].kind, value)
            elif isinstance(value, bool) or value not in _NEUTRAL.get(own, ()):
                near = difflib.get_close_matches(name, [*_RENAMED, *OPTIONS], 1)
                hint = f"; is {near[0]!r} meant?" if near else "; leave it out"
                raise InputError(f"there is no option {name[:80]!r} here{hint}", option=f"options.{name[:80]}")


def _of_kind(kind: type, value: Any) -> Any:
    """A value as its option takes it: other languages write whole numbers as 5.0, and one text in place of a list."""
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return [value] if kind is tuple and isinstance(value, str) else value


# --- chat ----------------------------------------------------------------------------------------------------------


class OllamaFunction(OllamaBody):
    """The function of a call."""

    name: str
    arguments: dict[str, Any] | None = None


class OllamaCall(OllamaBody):
    """A call that an assistant's message holds."""

    id: str | None = None
    function: OllamaFunction


class OllamaMessage(OllamaBody):
    """A message of a conversation."""

    place = "messages[]."
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Any = only([])
    tool_calls: Annotated[list[OllamaCall], Most("max_tools", "calls")] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaDeclaration(Function):
    """A function that the model may call."""

    is_open = True


class OllamaTool(OllamaBody):
    """A tool; all are functions."""

    type: Literal["function"] | None = None
    function: OllamaDeclaration


class OllamaChatRequest(Answered):
    """The body of /api/chat."""

    messages: Annotated[list[OllamaMessage], Most("max_messages", "messages")] | None = None
    tools: Annotated[list[OllamaTool], Most("max_tools", "tools")] | None = None

    def query(self, card: ModelCard) -> Chat:
        """What is asked of the model."""
        check_chat(card)
        functions: list[Function] = [tool.function for tool in self.tools or []]
        more = chat_options(functions, "auto", None, None, self.schema_of_answer())
        return Chat(
            _conversation(self.messages or []), shown_tools(functions, "auto"), self.answer_options(card, **more)
        )


def _conversation(messages: list[OllamaMessage]) -> list[dict[str, Any]]:
    """The messages as a chat template takes them. Calls get ids, by which results find them: by name, or in order."""
    conversation: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []  # (name, id)
    for number, one in enumerate(messages):
        message: dict[str, Any] = {"role": one.role, "content": one.content or ""}
        if one.thinking:
            message["reasoning_content"] = one.thinking
        if one.tool_calls:
            message["tool_calls"] = []
            for place, call in enumerate(one.tool_calls):
                id = call.id or f"call_{number}_{place}"
                function = {"name": call.function.name, "arguments": call.function.arguments or {}}
                message["tool_calls"].append({"id": id, "type": "function", "function": function})
                open_calls.append((call.function.name, id))
        if one.role == "tool":
            answers = [call for call in open_calls if one.tool_call_id in (None, call[1])]
            answers = [call for call in answers if one.tool_name in (None, call[0])] or answers
            answer = answers[0][1] if answers else one.tool_call_id
            open_calls = [call for call in open_calls if call[1] != answer]
            message |= {name: value for name, value in (("tool_call_id", answer), ("name", one.tool_name)) if value}
        conversation.append(message)
    return conversation


# --- generate ------------------------------------------------------------------------------------------------------


class GenerateRequest(Answered):
    """The body of /api/generate."""

    prompt: str | None = None
    suffix: str | None = Field(None, description="What stands behind the text to write, which is then an infill.")
    system: str | None = None
    template: Any = only("")
    images: Any = only([])
    raw: bool | None = Field(None, description="true: the prompt goes on, without the chat template.")
    context: Annotated[list[Annotated[int, Field(ge=0, le=BIG)]], Most("max_ids", "numbers")] | None = Field(
        None, description="The conversation so far, as the answer before gave it."
    )

    @property
    def is_raw(self) -> bool:
        """Whether the text is continued as it is, without a conversation."""
        return bool(self.raw or self.suffix)

    def query(self, card: ModelCard) -> Query:
        """What is asked of the model."""
        schema = self.schema_of_answer()
        more: dict[str, Any] = {} if schema is None else {"schema": schema}
        prompt = self.prompt or ""
        if self.suffix:
            most = dict(self._chosen()).get("max_tokens")
            check_length("options.num_predict", most, card)
            options = self.answer_options(card, is_template=True, **more, max_tokens=None)
            return Infill(prompt, self.suffix, None, most, options)
        if self.raw or not card.has_chat:
            if self.system or self.context:
                name = "system" if self.system else "context"
                raise Refusal(400, f"{name} needs the model's chat template; leave it or raw out", param=name)
            return Complete(prompt, self.answer_options(card, **more))
        return Chat(self._messages(), None, self.answer_options(card, **more))

    def _messages(self) -> list[dict[str, Any]]:
        before = read_context(self.context or [])
        if self.system:
            before = [{"role": "system", "content": self.system}, *(one for one in before if one["role"] != "system")]
        return [*before, {"role": "user", "content": self.prompt or ""}]

    def context_with(self, answer: str) -> list[int]:
        """The conversation with its answer, for the next request; nothing where there is none."""
        return [] if self.is_raw else written_context([*self._messages(), {"role": "assistant", "content": answer}])


# --- the model -----------------------------------------------------------------------------------------------------


class ShowRequest(OllamaBody):
    """The body of /api/show."""

    model: str | None = None
    name: str | None = Field(None, description="The older name of `model`.")
    verbose: bool | None = None
