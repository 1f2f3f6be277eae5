"""A record of a file, in any of the spellings that people use, becomes a conversation or a plain text.

Read are: OpenAI's `messages` (with `tools` beside them, and `weight` 0 for answers that are not learned), TRL's prompt
and completion, Alpaca's instruction, input and output, ShareGPT's `conversations` of `from` and `value`, question and
answer, and `text`. Of a record that has several of these the first counts, in this order. Records are hostile until
checked: an InputError says what is wrong and what was expected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.errors import InputError
from sfumato.text.messages import check_messages, check_tools

EXPECTED = (
    'expected is {"messages": […]}, {"prompt": …, "response": …}, {"instruction": …, "output": …}, '
    '{"conversations": […]} or {"text": …}'
)
"""What a record may be, as the end of a sentence."""

_PAIRS = (
    ("prompt", ("response", "completion", "output", "answer")),
    ("instruction", ("output", "response", "completion")),
    ("question", ("answer", "response", "output")),
    ("input", ("output", "response", "completion")),
)
"""The keys of a question, each with those of its answer; the first that is there counts."""
_CONTEXT = ("input", "context")
"""Keys of what stands below an instruction."""
_SYSTEM = ("system", "system_prompt")
_SPEAKERS = (
    dict.fromkeys(("system", "developer"), "system")
    | dict.fromkeys(("human", "user", "prompter"), "user")
    | dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "bing", "bard"), "assistant")
    | dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool")
    | dict.fromkeys(("function_call", "tool_call"), "call")
)
"""ShareGPT's names of who speaks."""
_THOUGHT = re.compile(r"\s*<\|channel>thought\n(.*?)<channel\|>", re.DOTALL)


@dataclass(frozen=True)
class LearnedDialogue:
    """Messages and tools, checked, and which of the assistant's messages are learned, by their numbers."""

    messages: list[dict[str, Any]]
    learned: list[int]
    tools: list[dict[str, Any]]
    thinking: bool = False


@dataclass(frozen=True)
class LearnedText:
    """A text that is learned as it is, from its beginning; `is_whole`: it ends where it ends here."""

    text: str
    is_whole: bool = True


def read_record(value: object) -> LearnedDialogue | LearnedText:
    """The conversation or the text of one record; InputError where it is neither."""
    if isinstance(value, list):
        return _conversation({}, value)
    if not isinstance(value, Mapping):
        raise InputError(f"the record is {_kind(value)}; {EXPECTED}")
    if value.get("messages") is not None:
        return _conversation(value, value["messages"])
    for name in ("conversations", "conversation"):
        if value.get(name) is not None:
            return _conversation(value, _from_share_gpt(value[name], name))
    for question, answers in _PAIRS:
        answer = next((name for name in answers if value.get(name) is not None), None)
        if value.get(question) is not None and answer is not None:
            return _pair(value, question, answer)
    if value.get("text") is not None:
        return LearnedText(_text(value, "text"))
    keys = ", ".join(map(repr, list(value)[:6])) or "none"
    raise InputError(f"the record has the keys {keys[:200]}; {EXPECTED}")


def _conversation(record: Mapping[str, Any], messages: Any) -> LearnedDialogue:
    if not isinstance(messages, list) or not messages:
        raise InputError("the record has no messages, or no list of them; give at least a question and its answer")
    messages = [*_system(record, messages[0]), *(_with_thought(message) for message in messages)]
    checked = check_messages(messages)
    _check_order(checked)
    _check_arguments(checked)
    learned = [
        number
        for number, message in enumerate(checked)
        if message["role"] == "assistant" and _weight(messages[number], number)
    ]
    if not learned:
        raise InputError("the conversation has no answer to learn: no message of the assistant whose weight is not 0")
    return LearnedDialogue(checked, learned, _tools(record), _is_thinking(record))


def _pair(record: Mapping[str, Any], question: str, answer: str) -> LearnedDialogue:
    """A question and its answer; TRL gives both as lists of messages too, and learns the second alone."""
    if isinstance(record[question], list):
        question_messages, answers = record[question], record[answer]
        answers = [{"role": "assistant", "content": answers}] if isinstance(answers, str) else answers
        if not isinstance(answers, list):
            raise InputError(f"{answer!r} is {_kind(answers)}; give text or a list of messages")
        before = [{**one, "weight": 0} if isinstance(one, Mapping) else one for one in question_messages]
        return _conversation(record, [*before, *answers])
    text = _text(record, question)
    context = next((name for name in _CONTEXT if name != question and record.get(name)), None)
    if question == "instruction" and context is not None:
        text = f"{text}\n\n{_text(record, context)}"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": _text(record, answer)}]
    messages[:0] = _history(record.get("history"))
    return _conversation(record, messages)


def _system(record: Mapping[str, Any], first: object) -> list[dict[str, Any]]:
    """The system message that stands beside the others, unless they begin with one."""
    if isinstance(first, Mapping) and first.get("role") in ("system", "developer"):
        return []
    name = next((name for name in _SYSTEM if record.get(name)), None)
    return [] if name is None else [{"role": "system", "content": _text(record, name)}]


def _history(turns: object) -> list[dict[str, Any]]:
    """Alpaca's earlier turns, pairs of question and answer."""
    messages = []
    for turn in turns if isinstance(turns, list) else []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise InputError("'history' is no list of [question, answer] pairs of text")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _from_share_gpt(turns: object, name: str) -> list[Any]:
    """Messages of turns with `from` and `value`; those with `role` stay as they are."""
    if not isinstance(turns, list):
        raise InputError(f"{name!r} is {_kind(turns)}; give a list of turns")
    messages: list[Any] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or "from" not in turn:
            messages.append(turn)
            continue
        who, speech = turn["from"], turn.get("value")
        role = _SPEAKERS.get(who) if isinstance(who, str) else None
        if role is None:
            raise InputError(f"turn {number} is from {who!r:.80}; known are {', '.join(sorted(_SPEAKERS))}")
        if not isinstance(speech, str):
            raise InputError(f"turn {number} ({who}) has a value of {_kind(speech)}; give text")
        rest = {key: inner for key, inner in turn.items() if key not in ("from", "value", "role", "content")}
        if role == "call":
            messages.append({**rest, "role": "assistant", "content": "", "tool_calls": _calls(speech, number)})
        else:
            messages.append({**rest, "role": role, "content": speech})
    return messages


def _calls(text: str, number: int) -> list[Any]:
    """The calls of a turn of ShareGPT, which are JSON: a record, or a list of them."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f'turn {number} is a call that is not JSON; give {{"name": …, "arguments": …}}') from None
    return calls if isinstance(calls, list) else [calls]


def _with_thought(message: Any) -> Any:
    """A message whose thought, written in its content as the model writes it, has a place of its own."""
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return message
    content = message.get("content")
    match = _THOUGHT.match(content) if isinstance(content, str) else None
    if match is None or not isinstance(content, str):
        return message
    thought = {} if message.get("reasoning_content") else {"reasoning_content": match.group(1).strip()}
    return {**message, **thought, "content": content[match.end() :]}


def _check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    """InputError for roles out of order: what the model could not have been asked in this way."""
    before, is_answered = "", True
    for number, message in enumerate(messages):
        role, where = message["role"], f"message {number} ({message['role']})"
        if role == "system" and number:
            raise InputError(f"{where} is out of order; a system message is the first one")
        if role == "assistant" and before not in ("user", "tool"):
            raise InputError(f"{where} is out of order; an answer follows a user's message or a tool's result")
        if role == "tool" and before != "tool" and is_answered:
            raise InputError(f"{where} is out of order; a result follows the assistant's tool call")
        if role == "user" and not is_answered:
            raise InputError(f"{where} is out of order; the tool call before it has no result")
        if role == "assistant":
            is_answered = not message.get("tool_calls")
        elif role == "tool":
            is_answered = True
        before = role


def _check_arguments(messages: Sequence[Mapping[str, Any]]) -> None:
    """InputError for a call whose arguments are text that is no record: learned, it would be a call none can read."""
    for number, message in enumerate(messages):
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if isinstance(arguments, str):
                raise InputError(
                    f"message {number} calls {name!r:.80} with the arguments {arguments!r:.80}, which are no record of "
                    "JSON; give one"
                )


def _weight(message: object, number: int) -> bool:
    weight = message.get("weight") if isinstance(message, Mapping) else None
    if weight not in (None, 0, 1):
        raise InputError(f"message {number} has the weight {weight!r:.80}; give 0 or 1")
    return weight != 0


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools beside the messages, a list or the JSON text of one."""
    tools = record.get("tools") or record.get("functions")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise InputError("'tools' is text that is not JSON; give a list of function declarations") from None
    return check_tools(tools or None)


def _is_thinking(record: Mapping[str, Any]) -> bool:
    inner = record.get("chat_template_kwargs")
    value = inner.get("enable_thinking") if isinstance(inner, Mapping) else record.get("thinking")
    if value not in (None, True, False):
        raise InputError(f"'thinking' is {_kind(value)}; give true or false")
    return bool(value)


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise InputError(f"{name!r} is {_kind(value)}; give text")
    return value


def _kind(value: object) -> str:
    """What a value of JSON is, in words."""
    kinds = {dict: "a record", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)
