"""Fields by which clients of vLLM, llama.cpp, OpenRouter, DeepSeek and others ask for what our own fields say too.

Each is folded into the option that it means (`agreed`): several may say the same, two that differ are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field

from sfumato.options import BIG
from sfumato.server.http.bodies import Body, Choices, only
from sfumato.server.http.errors import Refusal, short

T = TypeVar("T")
EffortName = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""How much a model is to think: not at all, or as much as it does."""

_PAST = "thoughts of earlier turns are as the template has them"
_BUDGET = "thoughts have no budget of their own; max_tokens bounds both"


class TemplateVariables(Body):
    """vLLM's `chat_template_kwargs`: what the chat template is told."""

    place = "chat_template_kwargs."
    unread: ClassVar[Mapping[str, str]] = {
        "add_generation_prompt": "a model's turn always begins",
        "preserve_thinking": _PAST,
        "clear_thinking": _PAST,
        "thinking_budget": _BUDGET,
    }
    enable_thinking: bool | None = None
    thinking: bool | None = None
    reasoning_effort: EffortName | None = None


class ThinkingSwitch(Body):
    """`thinking` as DeepSeek, GLM and Anthropic write it."""

    place = "thinking."
    unread: ClassVar[Mapping[str, str]] = {
        "budget_tokens": _BUDGET,
        "clear_thinking": _PAST,
        "display": "thoughts are always apart",
    }
    type: Literal["enabled", "disabled", "adaptive"]


class ReasoningSwitch(Body):
    """OpenRouter's `reasoning` of a chat."""

    place = "reasoning."
    unread: ClassVar[Mapping[str, str]] = {
        "max_tokens": _BUDGET,
        "summary": "thoughts come in full",
        "generate_summary": "thoughts come in full",
    }
    effort: EffortName | None = None
    enabled: bool | None = None
    exclude: bool | None = None


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: at most one thing that the answer obeys."""

    place = "structured_outputs."
    unread: ClassVar[Mapping[str, str]] = {"disable_fallback": "there is one implementation"}
    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = only()
    whitespace_pattern: Any = only()
    disable_any_whitespace: Any = only(False)
    disable_additional_properties: Any = only(False)


class ConstraintSpellings(Body):
    """Other names of `schema`, `regex`, `choices`, `grammar` and `max_tokens`."""

    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's.")
    guided_json: dict[str, Any] | str | bool | None = Field(None, description="vLLM's `schema`.")
    guided_regex: str | None = Field(None, description="vLLM's `regex`.")
    guided_choice: Choices | None = Field(None, description="vLLM's `choices`.")
    guided_grammar: str | None = Field(None, description="vLLM's `grammar`, in Lark's notation.")
    guided_whitespace_pattern: Any = only()
    json_schema: dict[str, Any] | None = Field(None, description="llama.cpp's `schema`.")
    n_predict: int | None = Field(None, ge=-1, le=BIG, description="llama.cpp's `max_tokens`; -1: no bound.")

    def spelled(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options, with what these fields say; a Refusal names two that differ."""
        form = self.structured_outputs or StructuredOutputs(json=None)
        wishes: dict[str, list[tuple[str, Any]]] = {
            "schema": [
                ("guided_json", _schema(self.guided_json, "guided_json")),
                ("structured_outputs.json", _schema(form.json_, "structured_outputs.json")),
                ("structured_outputs.json_object", {"type": "object"} if form.json_object else None),
                ("json_schema", self.json_schema),
            ],
            "regex": [("guided_regex", self.guided_regex), ("structured_outputs.regex", form.regex)],
            "choices": [("guided_choice", self.guided_choice), ("structured_outputs.choice", form.choice)],
            "grammar": [("guided_grammar", self.guided_grammar), ("structured_outputs.grammar", form.grammar)],
            "max_tokens": [("n_predict", None if self.n_predict == -1 else self.n_predict)],
        }
        folded = {name: agreed((name, options.get(name)), *pairs) for name, pairs in wishes.items()}
        return options | {name: value for name, value in folded.items() if value is not None}


class ThinkingSpellings(Body):
    """Other names of `thinking` and `reasoning_effort`, and whether an answer shows its thoughts."""

    chat_template_kwargs: TemplateVariables | None = Field(None, description="vLLM's.")
    enable_thinking: bool | None = Field(None, description="Qwen's `thinking`.")
    think: bool | None = Field(None, description="Ollama's `thinking`.")
    reasoning: ReasoningSwitch | None = Field(None, description="OpenRouter's; thoughts come as `reasoning` too.")
    include_reasoning: bool | None = Field(None, description="false: thoughts are not given.")

    def thinks(self, thinking: bool | ThinkingSwitch | None) -> bool | None:
        """Whether the model is to think, as far as a field says it beside the effort."""
        variables, switch = self.chat_template_kwargs or TemplateVariables(), self.reasoning or ReasoningSwitch()
        return agreed(
            ("thinking", thinking.type != "disabled" if isinstance(thinking, ThinkingSwitch) else thinking),
            ("chat_template_kwargs.enable_thinking", variables.enable_thinking),
            ("chat_template_kwargs.thinking", variables.thinking),
            ("enable_thinking", self.enable_thinking),
            ("think", self.think),
            ("reasoning.enabled", switch.enabled),
        )

    def effort(self, effort: EffortName | None) -> EffortName | None:
        """How much the model is to think."""
        variables, switch = self.chat_template_kwargs or TemplateVariables(), self.reasoning or ReasoningSwitch()
        return agreed(
            ("reasoning_effort", effort),
            ("reasoning.effort", switch.effort),
            ("chat_template_kwargs.reasoning_effort", variables.reasoning_effort),
        )

    @property
    def thought_fields(self) -> tuple[str, ...]:
        """Under which names an answer gives its thoughts."""
        if self.include_reasoning is False or (self.reasoning is not None and self.reasoning.exclude):
            return ()
        is_other = self.include_reasoning is not None or self.reasoning is not None
        return ("reasoning_content", "reasoning") if is_other else ("reasoning_content",)


def agreed(*wishes: tuple[str, T | None]) -> T | None:
    """The value of fields that mean the same, None where none has one; a Refusal names two that differ."""
    wished = [(field, value) for field, value in wishes if value is not None]
    for field, value in wished[1:]:
        if value != wished[0][1]:
            first, other = (short(repr(one), 60) for one in (wished[0][1], value))
            message = f"{wished[0][0]} is {first} and {field} {other}; give one of them"
            raise Refusal(400, message, param=wished[0][0])
    return wished[0][1] if wished else None


def _schema(value: dict[str, Any] | str | bool | None, field: str) -> dict[str, Any] | bool | None:
    """A schema that may come as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, (dict, bool)):
        raise Refusal(400, f"{field} is {short(value, 60)!r}, which is no schema in JSON; give an object", param=field)
    return schema
