"""Tools to a grammar: calls whose arguments obey the tools' schemas.

The grammar allows what `replies.parse_ids` reads back, in Gemma's own notation (`values.notation`) and without white
space. **Narrower than the schema, never wider**: keys come sorted, as the templates write those of declarations and
past calls, and keys that the schema does not name come only where it speaks of others, or where it names none.

Control tokens are in the grammar by name: only the real ones open and close calls and strings.

Deliberately absent: thoughts, and text beside calls, which are the answer's (`answers`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.constraints.checks import CallCheck
from sfumato.constraints.forms import GrammarSource, check_rules
from sfumato.constraints.schema import checked_schema
from sfumato.constraints.values.document import Document
from sfumato.constraints.values.facets import Conjunction
from sfumato.constraints.values.notation import CONTROL_TOKEN, CallNotation, is_bare
from sfumato.constraints.values.rules import RuleWriter, literal
from sfumato.constraints.values.writer import ValueWriter
from sfumato.errors import InputError
from sfumato.text.messages import check_tools

_OBJECT = {"type": "object"}


def source_of_calls(tools: Sequence[Mapping[str, Any]]) -> GrammarSource:
    """The grammar of one call or several of these tools (as `messages.check_tools` takes them), and nothing else.

    It comes with a check of what it cannot say. An InputError names the tool, and the place in its schema that cannot
    be kept."""
    rules = RuleWriter()
    calls = call_rule(rules, tools)
    lark = "\n".join([f"// {rules.hints()}", *rules.lines(), f"start: {calls.rule}+", ""])
    check_rules(lark, "grammar of the tools")
    source = json.dumps({"grammars": [{"lark_grammar": lark}]})
    return GrammarSource(source, lark[:1000], calls.check, calls.example)


@dataclass(frozen=True)
class WrittenCalls:
    """The calls of some tools in a grammar: the rule of one call, what the rule does not keep, and a short call."""

    rule: str
    check: CallCheck | None
    example: str | None


def call_rule(rules: RuleWriter, tools: Sequence[Mapping[str, Any]]) -> WrittenCalls:
    """One call of any of the tools, its marks included, written with all that it needs into a grammar."""
    checked = check_tools(tools)
    if not checked:
        raise InputError("a grammar of calls needs at least one tool; give tools, or leave strict out")
    calls: dict[str, str] = {}
    examples: list[str] = []
    is_inexact = False
    for tool in checked:
        name, parameters = tool["function"]["name"], tool["function"].get("parameters")
        if name in calls:
            raise InputError(f"two tools are called {name!r}; give each a name of its own")
        if not is_bare(name) or name.split() != [name] or CONTROL_TOKEN.search(name):
            raise InputError(f"the tool name {name!r} cannot be called; use letters, digits and underscores")
        writer = ValueWriter(rules, CallNotation())
        places = _arguments(name, parameters)
        calls[name] = f"{literal('call:' + name)} {writer.rule(places)}"
        is_inexact = is_inexact or writer.is_inexact
        if (example := writer.example(places)) is not None:
            examples.append(f"<|tool_call>call:{name}{example}<tool_call|>")
    rule = rules.rule(f"<|tool_call> ({' | '.join(calls.values())}) <tool_call|>")
    return WrittenCalls(rule, call_check(checked) if is_inexact else None, min(examples, key=len, default=None))


def call_check(tools: Sequence[Mapping[str, Any]]) -> CallCheck:
    """The check of a whole text that the grammar of calls of these tools may need; they are checked."""
    functions = [tool["function"] for tool in tools]
    return CallCheck({function["name"]: _schema_of(function.get("parameters")) for function in functions})


def _schema_of(parameters: Any) -> Any:
    """The schema of a tool's parameters: a tool without any has none."""
    if not parameters or parameters == _OBJECT:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return parameters


def _arguments(tool: str, schema: Any) -> Conjunction:
    """The schemas of the arguments of one tool."""
    name = f"the parameters of tool {tool!r}"
    root = Document(checked_schema(_schema_of(schema), f"the schema of {name}"), name).root
    return root, root.with_value(_OBJECT, "object")
