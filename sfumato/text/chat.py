"""Messages, tools and thinking to prompt text and ids, and the model's answer back into thought, text and calls.

The prompt is the checkpoint's own jinja template, rendered in a sandbox in a child process (`template`). **What a
message says stays what it says**: `ChatTemplate.encode` marks the places in the caller's strings where a control token
could begin or end, finds the control tokens in the marked rendering, and takes the marks out of the ordinary text
between them. So every control token in a prompt was put there by the template, and `parse_ids` likewise trusts only
real control tokens in an answer.

Deliberately absent: images (this engine reads text), and an incremental parser (a canvas arrives whole).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError, InputError
from sfumato.model.config import read_json
from sfumato.system import confined
from sfumato.text import template
from sfumato.text.tokenizer import Tokenizer, read_text

MAX_TEMPLATE = 256 << 10
"""Characters of template source; Gemma 4's has 17 thousand."""
MAX_DEPTH = 64
"""Lists within records within lists, in a message or a tool."""

_WHAT = "the chat template"
CHILDREN = confined.Pool()
"""Who renders."""
ROLES = ("system", "user", "assistant", "tool")
_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))


@dataclass(frozen=True)
class Reply:
    """A parsed answer. A tool call is {"name": …, "arguments": {…}}; `thought` is None where there was none."""

    text: str
    thought: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


# --- the template ---------------------------------------------------------------------------------------


class ChatTemplate:
    """A checkpoint's chat template. `special` gives it `bos_token` and its like by name (`Tokenizer.special`).

    A source that is too long or no jinja is a CheckpointError; messages and tools that do not fit are InputErrors that
    say which one.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        if len(source) > MAX_TEMPLATE:
            raise CheckpointError(
                f"the chat template has {len(source)} characters, more than the {MAX_TEMPLATE} allowed"
            )
        try:
            CHILDREN.run(template.check, source, what=_WHAT)
        except InputError as error:
            raise CheckpointError(str(error)) from None
        self.source = source
        self.special = dict(special or {})

    @classmethod
    def from_folder(cls, folder: str | Path, special: Mapping[str, str] | None = None) -> ChatTemplate:
        """The template of a checkpoint folder: chat_template.jinja, else what tokenizer_config.json holds."""
        folder = Path(folder)
        path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if path.is_file():
            source: Any = read_text(path)
        else:
            source = read_json(config).get("chat_template") if config.is_file() else None
            if isinstance(source, list):  # several, by name
                named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
                source = named.get("default")
        if not isinstance(source, str):
            raise CheckpointError(f"{folder} has no chat template; complete plain text instead, or add {path.name}")
        try:
            return cls(source, special)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as text, for reading. Do not tokenise it: what a user wrote may look like a control token."""
        return self._render(check_messages(messages), check_tools(tools), thinking, add_generation_prompt)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt as ids. Every control token in them was put there by the template, none by a message or tool."""
        messages, tools = check_messages(messages), check_tools(tools)
        guard = _Guard(tokenizer.control_tokens, [self.source, messages, tools, self.special])
        try:
            text = self._render(guard.mark(messages), guard.mark(tools), thinking, add_generation_prompt)
        except InputError as error:
            raise InputError(guard.unmark(str(error))) from None
        ids: list[int] = []
        for piece, control in tokenizer.pieces(text):
            ids += tokenizer.encode(guard.unmark(piece)) if control is None else [control]
        return ids

    def _render(self, messages: Any, tools: Any, thinking: bool, add_generation_prompt: bool) -> str:
        names = {"messages": messages, "tools": tools or None, "add_generation_prompt": add_generation_prompt}
        names |= {**self.special, "enable_thinking": thinking}
        text: str = CHILDREN.run(template.render, self.source, names, what=_WHAT)
        return text


class _Guard:
    """Marks, in the caller's strings, every place where a control token could begin or end.

    The mark is one private-use character that nothing in the rendering contains. It goes after each character that
    begins some control token and before each that ends one, so that no control token is found that starts or stops
    in a caller's string, however the template joins them.
    """

    def __init__(self, control: Iterable[str], seen: Any) -> None:
        control = [token for token in control if token]
        for token in control:
            if len(token) == 1:
                raise CheckpointError(f"the control token {token!r} is one character long: text cannot avoid it")
        used: set[str] = set()
        for text in _strings([*control, seen]):
            used.update(text)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        self._mark = next(free, "")
        if not self._mark:
            raise InputError("the messages use every private-use character of Unicode; remove some")
        first = "".join(re.escape(character) for character in sorted({token[0] for token in control}))
        last = "".join(re.escape(character) for character in sorted({token[-1] for token in control}))
        self._places = re.compile(f"(?<=[{first}])|(?=[{last}])" if control else "(?!)")

    def mark(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._places.sub(self._mark, value)
        if isinstance(value, dict):
            # A role is one of ROLES, never the caller's own words, and the template compares it.
            return {self.mark(key): one if key == "role" else self.mark(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.mark(one) for one in value]
        return value

    def unmark(self, text: str) -> str:
        return text.replace(self._mark, "")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _strings(key)
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


# --- messages and tools, checked -----------------------------------------------------------------------------------


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A deep copy of plain data, in the shape templates expect; an InputError names the message that is wrong.

    `developer` becomes `system`; content is text, or a list of text parts; a system message's parts are joined (older
    templates print the list); arguments written as JSON text are read; thoughts are stripped from what was said.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InputError('messages must be a list of at least one {"role": …, "content": …}')
    return [_check_message(message, f"message {index}") for index, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f'{where} is {type(message).__name__}; give a record with "role" and "content"')
    checked = _plain(message, where)
    role = "system" if checked.get("role") == "developer" else checked.get("role")
    if role not in ROLES:
        raise InputError(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}")
    checked["role"] = role
    content = _check_content(checked.get("content"), where)
    if role == "system" and isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    elif role == "assistant" and isinstance(content, list):
        content = [{**part, "text": without_thoughts(part["text"])} for part in content]
    elif role == "assistant" and isinstance(content, str):
        content = without_thoughts(content)
    checked["content"] = content
    calls = checked.get("tool_calls")
    if calls is not None:
        if role != "assistant":
            raise InputError(f"{where} is a {role} message with tool_calls; only an assistant calls tools")
        if not isinstance(calls, list):
            raise InputError(f"{where} has tool_calls of type {type(calls).__name__}; give a list")
        for number, call in enumerate(calls):
            _check_call(call, f"tool call {number} of {where}")
    return checked


def _check_content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where} has content of type {type(content).__name__}; give text or a list of text parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video", "file")):
            raise InputError(f"{where} holds a part of type {kind!r}; Sfumato reads text only, leave the part out")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f'{where} holds a part that is not {{"type": "text", "text": …}}; only text parts are read'
            )
    return content


def _check_call(call: Any, where: str) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f'{where} is not {{"function": {{"name": …, "arguments": …}}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise InputError(f"{where} has arguments that are no JSON: {arguments[:80]!r}") from None
    if not isinstance(arguments, (dict, type(None))):
        raise InputError(f"{where} has arguments of type {type(arguments).__name__}; give a record")
    function["arguments"] = _plain(arguments or {}, where)


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """A deep copy of the tools, each {"type": "function", "function": {"name", "description", "parameters"}}."""
    if tools is None:
        return []
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InputError("tools must be a list of function declarations")
    checked = []
    for index, tool in enumerate(tools):
        where = f"tool {index}"
        plain = _plain(tool, where)
        function = plain.get("function", plain) if isinstance(plain, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError(f'{where} is not {{"type": "function", "function": {{"name": …, "parameters": …}}}}')
        if not isinstance(function.get("parameters"), (dict, type(None))):
            raise InputError(f"{where} ({function['name']}) has parameters that are no JSON schema record")
        function = {name: value for name, value in function.items() if value is not None}
        function.setdefault("description", "")
        checked.append({"type": "function", "function": function})
    return checked


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A deep copy in dicts, lists, text, numbers, booleans and None: nothing that runs code when a template asks."""
    if depth > MAX_DEPTH:
        raise InputError(f"{where} nests more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        return str(value)  # a Markup would escape what it is joined with
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{where} has the key {key!r}; keys are text")
        return {key: _plain(one, where, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, where, depth + 1) for one in value]
    raise InputError(f"{where} holds a {type(value).__name__}; give text, numbers, booleans, lists and records")


# --- the answer, parsed --------------------------------------------------------------------------------------------

_CONTROL = re.compile(
    r"<\|channel>|<channel\|>|<\|tool_call>|<tool_call\|>|<\|tool_response>|<tool_response\|>"
    r'|<\|turn>|<turn\|>|<\|think\|>|<\|tool>|<tool\|>|<\|"\|>|<eos>|<bos>|<pad>'
)
_LABEL = re.compile(r"\Athought(\n|\Z)")
_END = {"<turn|>", "<eos>", "<|tool_response>"}
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None, "None": None}

_Piece = tuple[str, bool]
"""Text and whether it is a control token."""


def parse(text: str) -> Reply:
    """The answer's text, control tokens written out (`decode(ids, skip_special=False)`), into its parts.

    Where ids are at hand `parse_ids` is the safer one: here a call that the model merely quotes is a call.
    """
    pieces, end = [], 0
    for match in _CONTROL.finditer(text):
        pieces += [(text[end : match.start()], False), (match.group(), True)]
        end = match.end()
    return _parse([*pieces, (text[end:], False)])


def parse_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> Reply:
    """The answer's ids into its parts; only real control tokens open thoughts and calls, never spelled-out ones."""
    pieces: list[_Piece] = []
    run: list[int] = []
    for index in ids:
        if index in tokenizer.special_ids:
            pieces += [(tokenizer.decode(run), False), (tokenizer.token(index) or "", True)]
            run = []
        else:
            run.append(index)
    return _parse([*pieces, (tokenizer.decode(run), False)])


def to_history(reply: Reply) -> dict[str, Any]:
    """The assistant message that carries a reply into the next prompt.

    The thought stays behind, except beside tool calls: there `reasoning_content` holds it, and the template decides.
    """
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.tool_calls:
        message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in reply.tool_calls]
        if reply.thought:
            message["reasoning_content"] = reply.thought
    return message


def without_thoughts(text: str) -> str:
    """The text without its channels, by the rule of Gemma's own template."""
    return "".join(piece.split("<|channel>")[0] for piece in text.split("<channel|>"))


def _parse(pieces: list[_Piece]) -> Reply:
    pieces = [piece for piece in pieces if piece[0]]
    said: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    at = 0
    while at < len(pieces):
        text, is_control = pieces[at]
        at += 1
        if not is_control:
            said.append(text)
        elif text in _END:
            break
        elif text == "<|channel>":
            end = _find(pieces, at, "<channel|>")
            thought = "".join(text for text, _ in pieces[at:end])
            thoughts.append(_LABEL.sub("", thought).strip("\n"))
            at = end + (pieces[end : end + 1] == [("<channel|>", True)])
        elif text == "<|tool_call>":
            end = _find(pieces, at, "<tool_call|>")
            is_closed = pieces[end : end + 1] == [("<tool_call|>", True)]
            call = _parse_call(pieces[at:end]) if is_closed else None
            if call is None:
                said += [text for text, _ in pieces[at - 1 : end + is_closed]]
            else:
                calls.append(call)
            at = end + is_closed
    return Reply("".join(said).strip("\n"), "\n".join(filter(None, thoughts)) or None, calls)


def _find(pieces: list[_Piece], start: int, token: str) -> int:
    """Where the token, or else the end of the answer, is."""
    for index in range(start, len(pieces)):
        text, is_control = pieces[index]
        if is_control and (text == token or text in _END):
            return index
    return len(pieces)


class _Malformed(Exception):
    pass


def _parse_call(pieces: list[_Piece]) -> dict[str, Any] | None:
    """`call:name{key:value,…}`, its strings between two `<|"|>`; None where it is anything else."""
    # Atoms: a structural character as it is, a quoted string as (text,), a bare word as [text].
    atoms: list[Any] = []
    quoted: list[str] | None = None
    for text, is_control in pieces:
        if is_control and text == '<|"|>':
            if quoted is not None:
                atoms.append(("".join(quoted),))
            quoted = [] if quoted is None else None
        elif quoted is not None:
            quoted.append(text)
        elif is_control:
            return None
        else:
            for word in re.split(r"([{}\[\]:,])", text):
                if word.strip():
                    atoms.append(word if word in "{}[]:," else [word.strip()])
    if quoted is not None or len(atoms) < 5 or atoms[:2] != [["call"], ":"]:
        return None
    name, rest = atoms[2], atoms[3:]
    if not isinstance(name, list) or len(name[0].split()) != 1 or rest[0] != "{":
        return None
    try:
        arguments, end = _parse_value(rest, 0, 0)
    except (_Malformed, IndexError):
        return None
    return {"name": name[0], "arguments": arguments} if end == len(rest) else None


def _parse_value(atoms: list[Any], at: int, depth: int) -> tuple[Any, int]:
    """The value that begins at an atom, and the place after it."""
    atom = atoms[at]
    if depth > MAX_DEPTH:
        raise _Malformed
    if isinstance(atom, tuple):
        return atom[0], at + 1
    if isinstance(atom, list):
        return _bare_value(atom[0]), at + 1
    if atom not in "{[":
        raise _Malformed
    close = "}" if atom == "{" else "]"
    record: dict[str, Any] = {}
    items: list[Any] = []
    at += 1
    while atoms[at] != close:
        key = None
        if atom == "{":
            key = atoms[at]
            if isinstance(key, str) or atoms[at + 1] != ":":
                raise _Malformed
            at += 2
        value, at = _parse_value(atoms, at, depth + 1)
        if key is None:
            items.append(value)
        else:
            record[key[0]] = value
        if atoms[at] == ",":
            at += 1
        elif atoms[at] != close:
            raise _Malformed
    return record if atom == "{" else items, at + 1


def _bare_value(word: str) -> Any:
    """A number or a constant; any other word is a string whose marks the model left out."""
    if word in _WORDS:
        return _WORDS[word]
    number = _NUMBER.fullmatch(word)
    if number is None or len(word) > 400:
        return word
    if number[1] is None and number[2] is None:
        return int(word)
    value = float(word)
    return value if math.isfinite(value) else word
