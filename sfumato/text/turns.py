"""The answers of a conversation as token ids: what the model would have to write, and the prompt that asks for it.

A template writes whole conversations, and does not say where in one an answer begins. So each answer is rendered three
times: the prompt that asks for it, the messages before it without being asked, and with it. What the last adds to the
first, or else to the second, is the answer. As in `template`, no text can make a control token.

Deliberately absent: answers that a template renders in another way once more follows; they are errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sfumato.errors import InputError
from sfumato.text.messages import check_messages, check_tools
from sfumato.text.replies import ENDS
from sfumato.text.template import TURNS, ChatTemplate, Guard, with_open_turn
from sfumato.text.tokenizer import Tokenizer

_CHANNEL = ("<|channel>", "<channel|>")
"""The control tokens around a thought, in Gemma's format."""


class AnsweredTurn(NamedTuple):
    """An answer of a conversation as token ids: the prompt that asks for it, and what the model writes."""

    message: int
    """Its number in the conversation."""
    prompt: list[int]
    tokens: list[int]
    """Up to the control token that ends the turn, that one included where the template writes one."""


class Dialogue(NamedTuple):
    """What a template renders: messages, tools, and whether thinking is on."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking: bool = False


def answers(
    template: ChatTemplate, tokenizer: Tokenizer, dialogue: Dialogue, numbers: Iterable[int]
) -> Iterator[AnsweredTurn]:
    """The answers of a conversation, those of the assistant's messages with these numbers, one after the other.

    The prompt of each is what `ChatTemplate.encode` gives for the messages before it. The answer is what the template
    adds for the message, without the header of its turn, up to the token at which generation ends: `<turn|>`, or
    `<|tool_response>` where results follow its calls. A message with a thought is asked for with thinking on, and its
    thought stands before the answer even where the template leaves it out of a history.
    """
    marked = _MarkedDialogue(template, tokenizer, dialogue)
    for number in numbers:
        try:
            yield marked.answer(number, template.renderings(marked.variables(number)))
        except InputError as error:
            raise InputError(f"message {number}: {marked.guard.unmark(str(error))}") from None


def answers_of_many(
    template: ChatTemplate, tokenizer: Tokenizer, dialogues: Sequence[tuple[Dialogue, Sequence[int]]]
) -> list[list[AnsweredTurn]] | None:
    """The answers of several conversations, rendered in one call, each with the numbers of its messages.

    None where one of them cannot be: `answers` of each then says which. See there."""
    try:
        marked = [(_MarkedDialogue(template, tokenizer, dialogue), numbers) for dialogue, numbers in dialogues]
        variables = [one for dialogue, numbers in marked for number in numbers for one in dialogue.variables(number)]
        texts = iter(template.renderings(variables))
        return [
            [dialogue.answer(number, [next(texts) for _ in range(3)]) for number in numbers]
            for dialogue, numbers in marked
        ]
    except InputError:
        return None


class _MarkedDialogue:
    """A conversation, marked, of which answers are asked for."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, dialogue: Dialogue) -> None:
        messages, tools = check_messages(dialogue.messages), check_tools(dialogue.tools)
        self.template, self.tokenizer, self.thinking = template, tokenizer, dialogue.thinking
        inputs = [template.source, messages, tools, template.special]
        self.guard = Guard({*tokenizer.control_tokens, *TURNS}, inputs)
        self.messages: list[dict[str, Any]] = self.guard.mark(messages)
        self.tools = self.guard.mark(tools)

    def variables(self, number: int) -> list[dict[str, Any]]:
        """Of three renderings: the prompt for a message, the same without being asked, and with the message."""
        behind = number + 1
        while behind < len(self.messages) and self.messages[behind]["role"] == "tool":
            behind += 1
        thinking = self.thinking or bool(self._thought(number))
        parts = ((number, True), (number, False), (behind, False))
        return [self.template.variables(self.messages[:end], self.tools, thinking, asks) for end, asks in parts]

    def answer(self, number: int, texts: Sequence[str]) -> AnsweredTurn:
        """The answer in these renderings."""
        prompt, before, whole = texts
        prompt, thought = with_open_turn(prompt), self._thought(number)
        text = _addition(prompt, before, whole)
        if thought and _CHANNEL[0] not in text and all(self.tokenizer.id(token) is not None for token in _CHANNEL):
            text = f"{_CHANNEL[0]}thought\n{thought}\n{_CHANNEL[1]}{text}"
        ids = [self.guard.ids(self.tokenizer, part) for part in (prompt, _until_end(self.tokenizer, text))]
        return AnsweredTurn(number, *ids)

    def _thought(self, number: int) -> str:
        return str(self.messages[number].get("reasoning_content", "")).strip()


def _addition(prompt: str, before: str, whole: str) -> str:
    """What the template writes for an answer: `whole` has it, `before` ends before it, `prompt` asks for it."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    if whole.startswith(before):  # the prompt says more than the history will, such as a thought that is left empty
        return whole[len(before) :].removeprefix(f"{TURNS[0]}model\n")
    raise InputError(
        "the chat template writes what stands before this answer in another way once the answer is there, so that its "
        "tokens cannot be told from the prompt's; end the conversation with an answer before it"
    )


def _until_end(tokenizer: Tokenizer, text: str) -> str:
    """A turn up to the first control token at which generation ends, that one included; all of it without one."""
    end = 0
    for piece, control in tokenizer.pieces(text):
        end += len(piece)
        if control is not None and piece in ENDS:
            return text[:end]
    return text.rstrip("\n")
