"""Messages and tools, checked: plain data in the shape that chat templates expect.

Messages come from outside and are hostile until checked: what is wrong is an InputError that names the message or the
tool by its number. What passes is a deep copy of plain data, so that nothing runs code when a template asks for it.

Deliberately absent: images and other attachments (this engine reads text), and the rules of a conversation (whether a
tool result follows a call), which are the template's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
"""Roles that a message can have; `developer` is read as `system`, `function` as `tool`."""
MAX_DEPTH = 64
"""Lists within records within lists, in a message, a tool or the arguments of a call."""

_OTHER_ROLES = {"developer": "system", "function": "tool"}
_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id", "tool_responses")
"""Keys of a message that templates know, beside thoughts."""
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_THOUGHT_PARTS = ("thinking", "reasoning", "redacted_thinking")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which clients send back a thought; templates read the first two."""


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A deep copy of a conversation, in the shape that templates expect.

    Keys that no template knows are left out. The role `developer` becomes `system`. Content is text, or a list of text
    parts; the parts of a system message are joined, because older templates print the list. Arguments of calls that are
    JSON text are parsed; what is no record stays text. A tool's result has the id and the name of the call that it
    answers. Thoughts are removed from what the assistant said. An InputError names the message that is wrong.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InputError('messages must be a list of at least one {"role": …, "content": …}')
    checked = [_check_message(message, f"message {index}") for index, message in enumerate(messages)]
    _link_results(checked)
    return checked


def _check_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f'{where} is {type(message).__name__}; give a record with "role" and "content"')
    if message.get("images"):
        raise InputError(f"{where} holds images; Sfumato reads text only, leave them out")
    checked = {key: _plain_copy(message[key], where) for key in _KEPT if message.get(key) is not None}
    role = checked.get("role")
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise InputError(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}")
    checked["role"] = role
    if "content" not in checked and role not in ("assistant", "tool"):
        raise InputError(f"{where} ({role}) has no content; give text")
    speech, thought_parts = checked.get("content"), list[str]()
    if role == "assistant" and isinstance(speech, list):
        speech, thought_parts = _without_thought_parts(speech)
    content = _check_content(speech, where)
    if role == "system" and isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    elif role == "assistant" and isinstance(content, list):
        content = [{**part, "text": without_thoughts(part["text"])} for part in content]
    elif role == "assistant" and isinstance(content, str):
        content = without_thoughts(content)
    checked["content"] = content
    if role == "assistant":
        thoughts = [text for key in _THOUGHTS if isinstance(text := message.get(key), str) and text]
        thoughts += ["\n".join(thought_parts)] if thought_parts else []
        checked |= dict.fromkeys(_THOUGHTS[:2], str(thoughts[0])) if thoughts else {}
        if isinstance(message.get("function_call"), Mapping):  # as OpenAI's API had it before tools
            checked.setdefault("tool_calls", [_plain_copy(message["function_call"], where)])
    elif role == "tool" and isinstance(message.get("tool_name"), str):
        checked.setdefault("name", str(message["tool_name"]))
    calls = checked.get("tool_calls")
    if calls is not None:
        if role != "assistant":
            raise InputError(f"{where} is a {role} message with tool_calls; only an assistant calls tools")
        if not isinstance(calls, list):
            raise InputError(f"{where} has tool_calls of type {type(calls).__name__}; give a list")
        checked["tool_calls"] = [
            _check_call(call, f"tool call {number} of {where}") for number, call in enumerate(calls)
        ]
    return checked


def _link_results(messages: list[dict[str, Any]]) -> None:
    """Give each tool's result the id and the name of the call that it answers.

    A result without an id answers the open call of its name, or else the first that is open; one whose id no call has
    answers the only call that is open. Of calls with one id the first is answered first, and the others get ids."""
    open_calls: list[tuple[str | None, dict[str, Any]]] = []  # each with the id that it came with
    for index, message in enumerate(messages):
        if message["role"] != "tool":
            open_calls, ids = [], set[str]()
            for number, call in enumerate(message.get("tool_calls", [])):
                open_calls.append((id := call.get("id"), call))
                if id in ids:
                    call["id"] = f"{id}_{index}_{number}"
                ids |= {id} if id else set()
            continue
        id, name = message.get("tool_call_id"), message.get("name")
        answered = [one for one in open_calls if (one[0] == id if id else name in (None, _name(one[1])))]
        if not answered and (not id or len(open_calls) == 1):
            answered = open_calls
        if answered:
            call = answered[0][1]
            message["tool_call_id"] = call.setdefault("id", f"call_{index}")
            message.setdefault("name", _name(call))
            open_calls = [one for one in open_calls if one[1] is not call]


def _without_thought_parts(parts: list[Any]) -> tuple[list[Any], list[str]]:
    """Parts of what the assistant said that are no thoughts, and the texts of those that are."""
    rest, thoughts = list[Any](), list[str]()
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") in _THOUGHT_PARTS):
            rest.append(part)
            continue
        inner = part.get("thinking") or part.get("text")
        pieces = inner if isinstance(inner, list) else [{"text": inner}]
        texts = [piece.get("text") for piece in pieces if isinstance(piece, dict)]
        thoughts += [text for text in texts if isinstance(text, str) and text]
    return rest, thoughts


def _name(call: dict[str, Any]) -> str:
    return str(call["function"]["name"])


def _check_content(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Text, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where} has content of type {type(content).__name__}; give text or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video", "file")):
            raise InputError(f"{where} holds a part of type {kind!r}; Sfumato reads text only, leave the part out")
        text = part.get("refusal" if kind == "refusal" else "text") if kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise InputError(
                f'{where} holds a part that is not {{"type": "text", "text": …}}; only text parts are read'
            )
        texts.append({"type": "text", "text": text})
    return texts


def _check_call(call: Any, where: str) -> dict[str, Any]:
    """One tool call of a message, its arguments a record, or text where they are none.

    A bare {"name": …, "arguments": …}, as answers have it, is taken as well."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f'{where} is not {{"function": {{"name": …, "arguments": …}}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed_arguments(arguments, where)
    if not isinstance(arguments, (dict, str, type(None))):
        raise InputError(f"{where} has arguments of type {type(arguments).__name__}; give a record")
    checked = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return checked | ({"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {})


def _parsed_arguments(text: str, where: str) -> Any:
    """The record that JSON text holds, be it packed twice; any other text as it is."""
    value: Any = text or {}
    for _ in range(2):
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            break
    return _plain_copy(value, where) if isinstance(value, dict) else text


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """A deep copy of the tools, each {"type": "function", "function": {"name", "description", "parameters"}}.

    A bare function record is taken as well. An InputError names the tool that is wrong.
    """
    if tools is None:
        return []
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InputError("tools must be a list of function declarations")
    checked = []
    for index, tool in enumerate(tools):
        where = f"tool {index}"
        declaration = _plain_copy(tool, where)
        function = declaration.get("function", declaration) if isinstance(declaration, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError(f'{where} is not {{"type": "function", "function": {{"name": …, "parameters": …}}}}')
        if not isinstance(function.get("parameters"), (dict, type(None))):
            raise InputError(f"{where} ({function['name']}) has parameters that are no JSON schema record")
        function = {name: value for name, value in function.items() if value is not None}
        function.setdefault("description", "")
        checked.append({"type": "function", "function": function})
    return checked


def without_thoughts(text: str) -> str:
    """The text without its thoughts, by the rule of Gemma's own template."""
    return "".join(piece.split("<|channel>")[0] for piece in text.split("<channel|>"))


def _plain_copy(value: object, where: str, depth: int = 0) -> Any:
    """A deep copy in dicts, lists, text, numbers, booleans and None: nothing that runs code when a template asks."""
    if depth > MAX_DEPTH:
        raise InputError(f"{where} nests more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        return str(value)  # a subclass such as Markup would escape the text that it is joined with
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{where} has the key {key!r}; keys are text")
        return {key: _plain_copy(inner, where, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_copy(inner, where, depth + 1) for inner in value]
    raise InputError(f"{where} holds a {type(value).__name__}; give text, numbers, booleans, lists and records")
