"""A conversation or a text as examples: token ids, of which the first ones are the prompt.

A canvas belongs to one answer, so each answer that is learned is an example of its own: its prompt is everything before
it, as the checkpoint's template asks for that answer, and its response is what the model writes. A plain text is its
own response, behind `<bos>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from sfumato.errors import InputError
from sfumato.text.replies import ENDS
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer
from sfumato.text.turns import AnsweredTurn, Dialogue, answers, answers_of_many
from sfumato.training.data.records import LearnedDialogue, LearnedText

Long = Literal["cut", "drop", "refuse"]


@dataclass(frozen=True)
class LengthLimit:
    """The most tokens of an example, prompt and response, and what becomes of a longer one.

    "cut": the response ends there, and nothing is learned about what follows; an example whose prompt leaves no room
    for a response is left out. "drop": it is left out. "refuse": it is an error."""

    tokens: int
    long: Long = "cut"

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise InputError(f"max_tokens is {self.tokens}; give 2 or more, for a prompt and its response")
        if self.long not in get_args(Long):
            raise InputError(f"long is {self.long!r}; choose {', '.join(map(repr, get_args(Long)))}")


@dataclass(frozen=True)
class Example:
    """Token ids of which the first `prompt` ask and the others answer; `is_cut`: the limit ended it."""

    tokens: list[int]
    prompt: int
    is_cut: bool = False


class LeftOut(NamedTuple):
    """In the place of an example that is longer than the limit: why there is none."""

    reason: str


@dataclass(frozen=True)
class ExampleMaker:
    """Records to examples of one checkpoint."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    limit: LengthLimit

    def examples(self, record: LearnedDialogue | LearnedText) -> Iterator[Example | LeftOut]:
        """The examples of a record; InputError where it cannot be learned."""
        return self._of_text(record) if isinstance(record, LearnedText) else self._of_answers(self._answers(record))

    def examples_of_many(
        self, records: Sequence[LearnedDialogue | LearnedText]
    ) -> list[list[Example | LeftOut]] | None:
        """The examples of several records at once, which takes less time; None where one of them cannot be learned."""
        dialogues = [one for one in records if isinstance(one, LearnedDialogue)]
        if self.template is None or not dialogues:
            return None
        questions = [(Dialogue(one.messages, one.tools, one.thinking), one.learned) for one in dialogues]
        answered = answers_of_many(self.template, self.tokenizer, questions)
        if answered is None:
            return None
        each = iter(answered)
        try:
            return [
                list(self._of_text(one) if isinstance(one, LearnedText) else self._of_answers(next(each)))
                for one in records
            ]
        except InputError:
            return None

    def _of_answers(self, answers: Iterable[AnsweredTurn]) -> Iterator[Example | LeftOut]:
        for answer in answers:
            tokens = answer.tokens
            is_ended = bool(tokens) and self.tokenizer.token(tokens[-1]) in ENDS
            if len(tokens) - is_ended < 1:
                raise InputError(
                    f"message {answer.message} (assistant) is an answer of no tokens; give it text or a call"
                )
            tokens = tokens if is_ended else [*tokens, self.tokenizer.special_id("eos_token")]
            yield self._within([*answer.prompt, *tokens], len(answer.prompt))
            if len(answer.prompt) >= self.limit.tokens:
                return  # the prompts of later answers are longer still

    def _answers(self, record: LearnedDialogue) -> Iterator[AnsweredTurn]:
        if self.template is not None:
            dialogue = Dialogue(record.messages, record.tools, record.thinking)
            yield from answers(self.template, self.tokenizer, dialogue, record.learned)
            return
        texts = [message["content"] for message in record.messages]
        if [message["role"] for message in record.messages] != ["user", "assistant"] or record.tools:
            raise InputError(
                "this checkpoint has no chat template, so only a prompt with its response, or text, is read"
            )
        prompt, answer = (self.tokenizer.encode(text) for text in texts)
        yield AnsweredTurn(1, [self.tokenizer.special_id("bos_token"), *prompt], answer)

    def _of_text(self, record: LearnedText) -> Iterator[Example | LeftOut]:
        """A text in pieces within the limit, all but the last one cut."""
        bos, eos = (self.tokenizer.special_id(name) for name in ("bos_token", "eos_token"))
        tokens = self.tokenizer.encode(record.text)
        if not tokens:
            raise InputError("the text has no tokens; leave the record out")
        tokens += [eos] if record.is_whole else []
        size = self.limit.tokens - 1
        if len(tokens) > size and self.limit.long != "cut":
            yield self._within([bos, *tokens], 1)
            return
        for at in range(0, len(tokens), size):
            is_end = at + size >= len(tokens)
            yield Example([bos, *tokens[at : at + size]], 1, not (is_end and record.is_whole))

    def _within(self, tokens: list[int], prompt: int) -> Example | LeftOut:
        """The example, or as much of it as the limit allows."""
        limit = self.limit
        if len(tokens) <= limit.tokens:
            return Example(tokens, prompt)
        if limit.long == "refuse":
            raise InputError(
                f"the example has {len(tokens)} tokens, {prompt} of them prompt, and the limit is {limit.tokens}; "
                "raise --max-tokens, or let --long cut or drop such examples"
            )
        if limit.long == "cut" and prompt < limit.tokens:
            return Example(tokens[: limit.tokens], prompt, is_cut=True)
        return LeftOut("prompt too long" if prompt >= limit.tokens else "too long")
