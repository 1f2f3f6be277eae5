"""text/turns.py: an answer is what a template adds for it, whatever the template does around it."""

from __future__ import annotations

from typing import Any

import pytest
from chats import TEMPLATE, TOKENIZER, call, model, user

from sfumato.errors import InputError
from sfumato.text.template import ChatTemplate
from sfumato.text.turns import Dialogue, answers, answers_of_many

TURN = "{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
OPEN = "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
THOUGHT = "{% if m.reasoning_content %}{{ '<|channel>thought\\n' + m.reasoning_content + '<channel|>' }}{% endif %}"


def shown(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special=False)


def template_of(body: str, end: str = OPEN) -> ChatTemplate:
    """A template that writes each message `m` in this way."""
    return ChatTemplate("{% for m in messages %}" + body + "{% endfor %}" + end, TOKENIZER.special)


def parts(template: ChatTemplate, *messages: Any, numbers: list[int], thinking: bool = False) -> list[tuple[str, str]]:
    dialogue = Dialogue(messages, None, thinking)
    each = list(answers(template, TOKENIZER, dialogue, numbers))
    assert answers_of_many(template, TOKENIZER, [(dialogue, numbers)] * 2) == [each, each]
    return [(shown(one.prompt), shown(one.tokens)) for one in each]


def test_the_prompts_are_those_that_the_engine_asks_with() -> None:
    turns = [user("a"), model("b"), user("c"), model("", call("f", x=1))]
    (_, first), (prompt, second) = parts(TEMPLATE, *turns, numbers=[1, 3])
    assert (first, second) == ("b<turn|>", "<|tool_call>call:f{x:1}<tool_call|><turn|>")
    assert prompt == shown(TEMPLATE.encode(TOKENIZER, turns[:3]))


def test_a_thought_that_the_template_writes_is_not_written_twice() -> None:
    template = template_of(TURN + THOUGHT + "{{ m.content }}<turn|>\n")
    ((_, answer),) = parts(template, user("a"), model("b", reasoning_content="hm"), numbers=[1])
    assert answer == "<|channel>thought\nhm<channel|>b<turn|>"


def test_a_prompt_may_say_more_than_the_history_will() -> None:
    end = "{% if add_generation_prompt %}<|turn>model\n<|channel>thought\n<channel|>{% endif %}"
    ((prompt, answer),) = parts(template_of(TURN + "{{ m.content }}<turn|>\n", end), user("a"), model("b"), numbers=[1])
    assert prompt.endswith("<|turn>model\n<|channel>thought\n<channel|>") and answer == "b<turn|>"


def test_an_answer_without_an_end_is_the_rest_of_the_turn() -> None:
    assert parts(template_of(TURN + "{{ m.content }}\n"), user("a"), model("b"), numbers=[1])[0][1] == "b"


def test_what_is_written_in_another_way_once_the_answer_is_there_is_refused() -> None:
    template = template_of(TURN + "{{ messages | length }}{{ m.content }}<turn|>\n")
    dialogue = Dialogue([user("a"), model("b")])
    with pytest.raises(InputError, match=r"^message 1: the chat template writes what stands before this answer"):
        list(answers(template, TOKENIZER, dialogue, [1]))
    assert answers_of_many(template, TOKENIZER, [(dialogue, [1])]) is None
    with pytest.raises(InputError, match="message 1: the chat template refuses: no b"):
        refusing = template_of("{% if m.content == 'b' %}{{ raise_exception('no b') }}{% endif %}")
        list(answers(refusing, TOKENIZER, dialogue, [1]))
