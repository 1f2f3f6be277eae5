"""Tools to a grammar: an answer in free text, or tool calls whose arguments obey the tools' schemas.

The grammar allows what `replies.parse_ids` reads back, in Gemma's own notation (`values.notation`) and without white
space. **Narrower than the schema, never wider**: keys come sorted, as the templates write those of declarations and
past calls, and keys that the schema does not name come only where it speaks of others, or where it names none.

Control tokens are in the grammar by name: only the real ones open and close calls and strings.

Deliberately absent: thoughts, and text behind calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.constraints.forms import check_rules
from sfumato.constraints.schema import checked_schema
from sfumato.constraints.values.document import Document
from sfumato.constraints.values.notation import CONTROL_TOKEN, CallNotation, is_bare
from sfumato.constraints.values.rules import RuleWriter, literal
from sfumato.constraints.values.writer import ValueWriter
from sfumato.errors import InputError
from sfumato.text.messages import check_tools

_OBJECT = {"type": "object"}


def tool_grammar(tools: Sequence[Mapping[str, Any]], must_call: bool = False) -> str:
    """The Lark grammar of an answer to a prompt with these tools (as `messages.check_tools` takes them).

    It allows free text without control tokens, at least one character of it; or free text, possibly none, and calls
    behind it. With `must_call` it allows calls alone. An InputError names the tool and the place in its schema that
    cannot be guaranteed.
    """
    rules = RuleWriter()
    call = call_rule(rules, tools)
    start = [f"start: {call}+"] if must_call else [f"start: FREE | FREE? {call}+", "FREE: /(?s:.+)/"]
    lark = "\n".join([f"// {rules.hints()}", *rules.lines(), *start, ""])
    check_rules(lark, "tools' grammar")
    return lark


def call_rule(rules: RuleWriter, tools: Sequence[Mapping[str, Any]]) -> str:
    """The rule of one call of any of the tools, its marks included, written with all that it needs into a grammar."""
    checked = check_tools(tools)
    if not checked:
        raise InputError("a grammar of calls needs at least one tool; give tools, or leave strict out")
    calls: dict[str, str] = {}
    for tool in checked:
        name, parameters = tool["function"]["name"], tool["function"].get("parameters")
        if name in calls:
            raise InputError(f"two tools are called {name!r}; give each a name of its own")
        if not is_bare(name) or name.split() != [name] or CONTROL_TOKEN.search(name):
            raise InputError(f"the tool name {name!r} cannot be called; use letters, digits and underscores")
        calls[name] = f"{literal('call:' + name)} {_arguments(rules, name, parameters)}"
    return rules.rule(f"<|tool_call> ({' | '.join(calls.values())}) <tool_call|>")


def _arguments(rules: RuleWriter, tool: str, schema: Any) -> str:
    """The rule of the arguments of one tool."""
    if not schema or schema == _OBJECT:
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
    name = f"the parameters of tool {tool!r}"
    document = Document(checked_schema(schema, f"the schema of {name}"), name)
    writer = ValueWriter(rules, CallNotation())
    rule = writer.rule((document.root, document.root.with_value(_OBJECT, "object")))
    for place in writer.inexact:
        place.refuse("this cannot be kept by a grammar; write it without uniqueItems, not or oneOf")
    return rule
