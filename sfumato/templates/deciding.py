"""The plan of decisions: what questions about a state ask of an engine.

The state is a prompt of its own, encoded once for all its questions and kept for the next call. Each question follows
it on tokens of its own and is read on canvases of its own (`decisions`), whatever its id, its place and its neighbours.
Questions that depend on another come in a later wave, and are told the answer. Where the model is to think first, it
writes a thought behind the question, and is read again behind that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sfumato.engine.plan import Ask, Plan
from sfumato.engine.reads import Read, Readings, Reads
from sfumato.engine.request import SHORT, Request
from sfumato.errors import CapacityError, InputError
from sfumato.events import Decision, Decisions, Done
from sfumato.model.config import ModelConfig
from sfumato.model.prompt import Prompt
from sfumato.options import Options
from sfumato.questions import Question, Span
from sfumato.templates.decisions import AnswerSet, decision_of, tempered
from sfumato.templates.prompts import PromptEncoder
from sfumato.templates.requests import Decide
from sfumato.templates.waves import Waves, answer_sentence
from sfumato.text.reader import Reader
from sfumato.text.replies import PromptEnd, ReplyParser
from sfumato.text.tokenizer import Tokenizer

THOUGHT = 1024
"""Tokens that a thought may have."""

TOGETHER = 16
"""Thoughts that are written together at most."""

CHANNEL = ("<|channel>", "<channel|>")
"""The control tokens around a thought."""


@dataclass(frozen=True)
class _AnswerSheet:
    """A question with the answers that it may have."""

    id: str
    question: Question
    answers: AnswerSet
    text: str
    places: tuple[tuple[int, int], ...]


class Deciding:
    """Plans the decisions of a query. `ask` makes asks of requests; `temperatures` are the checkpoint's calibration."""

    def __init__(
        self,
        query: Decide,
        config: ModelConfig,
        tokenizer: Tokenizer,
        prompts: PromptEncoder,
        ask: Callable[[Request], Ask],
        temperatures: Mapping[str, float],
    ) -> None:
        self.query, self.config, self.tokenizer, self.prompts, self.ask = query, config, tokenizer, prompts, ask
        self.temperatures = temperatures if query.calibrated else {}
        self.endings: list[Done] = []

    def plan(self, options: Options) -> Plan[Decisions]:
        """The plan; `options` are resolved."""
        waves = Waves(self.query.questions)
        answers = waves.answers
        while wave := waves.next():
            sheets = [self._sheet(id, question, answers) for id, question in wave.items()]
            if self.query.think == "always":
                answers |= yield from self._thought_about(sheets, options)
            else:
                answers |= yield from self._read(sheets, options)
            if self.query.think == "auto":
                unsure = [sheet for sheet in sheets if answers[sheet.id].confidence < self.query.threshold]
                answers |= yield from self._thought_about(unsure, options)
        return waves.decisions((done.usage for done in self.endings), options.seed or 0)

    def _sheet(self, id: str, question: Question, answers: Mapping[str, Decision]) -> _AnswerSheet:
        """A question with its answers in tokens. InputError names the question."""
        text = question.text()
        places: list[tuple[int, int]] = []
        lead = "" if self.prompts.template is not None else " "
        try:
            if isinstance(question, Span):
                names, places, tokens = self._passages(question, lead)
            else:
                names = question.options
                tokens = [self.tokenizer.encode(f"{lead}{word}") for word in question.words]
            answer_set = AnswerSet.of(names, tokens, self._end(tokens))
        except InputError as error:
            raise InputError(f"question {id!r}: {error}", option="questions", item=id) from None
        if question.depends_on is not None:
            above = question.depends_on.id
            text = f"{answer_sentence(self.query.questions[above], answers[above])}\n{text}"
        if answer_set.deepest >= self.config.canvas_length:
            raise InputError(
                f"question {id!r} has options that are alike for {answer_set.deepest} tokens, more than a canvas of "
                f"{self.config.canvas_length} holds; reword them",
                option="questions",
                item=id,
            )
        return _AnswerSheet(id, question, answer_set, text, tuple(places))

    def _passages(self, span: Span, lead: str) -> tuple[list[str], list[tuple[int, int]], list[list[int]]]:
        """The passages that a span may quote, where they first stand, and their tokens; each but once."""
        text = self.query.text
        passages: dict[tuple[int, ...], tuple[int, int]] = {}
        for first, last in span.passages(text):
            passages.setdefault(tuple(self.tokenizer.encode(f"{lead}{text[first:last]}")), (first, last))
        places = [*passages.values()]
        return [text[first:last] for first, last in places], places, [*map(list, passages)]

    def _end(self, answers: Sequence[Sequence[int]]) -> int:
        """The token behind a complete answer: what ends a turn, or a line where there are no turns, and no answer."""
        turn = self.tokenizer.id("<turn|>")
        end = turn if turn is not None and turn in self.config.eos_ids else self.config.eos_ids[0]
        if self.prompts.template is None:
            line = self.tokenizer.encode("\n")[-1]
            return end if any(line in answer for answer in answers) else line
        return end

    # ---- reads ------------------------------------------------------------------------------------------------------

    def _read(self, sheets: Sequence[_AnswerSheet], options: Options) -> Plan[dict[str, Decision]]:
        head, tails = self._prompts(sheets, is_thinking=False)
        return (yield from self._read_behind(sheets, head, tails, options))

    def _read_behind(
        self, sheets: Sequence[_AnswerSheet], head: list[int], tails: Sequence[Sequence[int]], options: Options
    ) -> Plan[dict[str, Decision]]:
        """Read these questions, each behind its own tokens, which follow those of the state."""
        each = [
            Read(tuple(tail), sheet.answers.glances(self.query.samples), self._length(sheet))
            for sheet, tail in zip(sheets, tails, strict=True)
        ]
        for sheet, read in zip(sheets, each, strict=True):
            if len(head) + len(read.tokens) + read.length > self.config.max_position:
                most, is_long = self.config.max_position, len(read.tokens) > len(head)
                raise CapacityError(
                    f"question {sheet.id!r} has {len(read.tokens)} tokens behind a state of {len(head)}, and a canvas "
                    f"of {read.length} more, beyond the context of {most}; shorten the question or the state",
                    option="questions" if is_long else "state",
                    item=sheet.id if is_long else None,
                )
        open_reads = [read for read in each if read.glances]
        values: dict[Read, list[list[float]]] = {}
        if open_reads:
            reads = Reads(tuple(open_reads), self.query.steps)
            readings = Readings()
            request = Request(head, options, marks=[len(head)], reads=reads, name="the state")
            self.endings += yield [replace(self.ask(request), readings=readings)]
            values = dict(zip(open_reads, readings.values, strict=True))
        answers = {}
        for sheet, read in zip(sheets, each, strict=True):
            probabilities = sheet.answers.probabilities(values.get(read, []))
            probabilities = tempered(probabilities, self.temperatures.get(sheet.question.kind, 1.0))
            answers[sheet.id] = decision_of(sheet.question, sheet.answers.names, probabilities, sheet.places)
        return answers

    def _length(self, sheet: _AnswerSheet) -> int:
        """Positions of a question's canvases, which follow from nothing but the question."""
        need, whole = sheet.answers.deepest + 1, self.config.canvas_length
        if self.query.canvas is None:
            return min(whole, -(-need // SHORT) * SHORT)
        if not need <= self.query.canvas <= whole:
            raise InputError(
                f"canvas is {self.query.canvas}; question {sheet.id!r} needs {need} positions, and the model's own "
                f"canvas has {whole}",
                option="canvas",
            )
        return self.query.canvas

    def _prompts(self, sheets: Sequence[_AnswerSheet], is_thinking: bool) -> tuple[list[int], list[list[int]]]:
        try:
            return self.prompts.encode_around(self.query.beginning, [sheet.text for sheet in sheets], is_thinking)
        except CapacityError:
            raise
        except InputError as error:  # of the questions' texts all is checked already
            raise InputError(str(error), option=error.option or "state") from None

    # ---- thoughts ---------------------------------------------------------------------------------------------------

    def _thought_about(self, sheets: Sequence[_AnswerSheet], options: Options) -> Plan[dict[str, Decision]]:
        """Let the model think about each of these questions, then read them behind the thoughts."""
        if not sheets:
            return {}
        marks = [self.tokenizer.id(name) for name in CHANNEL]
        opener, closer = marks
        if self.prompts.template is None or opener is None or closer is None:
            what = "chat template" if self.prompts.template is None else f"token {CHANNEL[marks.index(None)]}"
            raise InputError(
                f"think is {self.query.think!r}, and {self.prompts.name or 'this checkpoint'} has no {what} to think "
                "with; leave think out",
                option="think",
            )
        head, tails = self._prompts(sheets, is_thinking=True)
        thoughts: list[Done] = []
        for first in range(0, len(tails), TOGETHER):
            group = zip(sheets[first : first + TOGETHER], tails[first : first + TOGETHER], strict=True)
            asks = [self._ask_thought(head, tail, sheet, options) for sheet, tail in group]
            thoughts += yield asks
        self.endings += thoughts
        behind = []
        for tail, done in zip(tails, thoughts, strict=True):
            is_open = PromptEnd.of(self.tokenizer, [*head, *tail]).thought == "open"
            thought = _thought_of(done.tokens, None if is_open else opener, closer, set(self.config.eos_ids))
            behind.append([*tail, *thought])
        answers = yield from self._read_behind(sheets, head, behind, options)
        texts = {sheet.id: done.thought for sheet, done in zip(sheets, thoughts, strict=True)}
        return {id: replace(answer, thought=texts[id]) for id, answer in answers.items()}

    def _ask_thought(self, head: list[int], tail: Sequence[int], sheet: _AnswerSheet, options: Options) -> Ask:
        """What a thought asks of an engine: a text behind the question, up to where its thought is closed."""
        tokens, most = [*head, *tail], self.config.max_position
        if len(tokens) + self.config.canvas_length > most:
            raise CapacityError(
                f"question {sheet.id!r} has {len(tail)} tokens behind a state of {len(head)}, and a thought needs a "
                f"canvas of {self.config.canvas_length} more, beyond the context of {most}; leave think out, or "
                "shorten the question or the state",
                option="think",
            )
        room = most - len(tokens) - self._length(sheet) - 1
        request = Request(Prompt.of(tokens), replace(options, max_tokens=max(1, min(THOUGHT, room))), marks=[len(head)])
        parser = ReplyParser(self.tokenizer, self.config.eos_ids, None, tokens)
        closer = self.tokenizer.id(CHANNEL[1])
        return replace(self.ask(request), reader=_ThoughtReader(self.tokenizer, closer, self.config.eos_ids, parser))


class _ThoughtReader(Reader):
    """Reads a thought, and ends the text where it is closed."""

    def __init__(self, tokenizer: Tokenizer, closer: int | None, ends: Sequence[int], parser: ReplyParser) -> None:
        super().__init__(tokenizer, (), ends, parser)
        self._closer = closer

    def push(self, tokens: list[int]) -> int | None:
        """How many of new tokens there are up to the end of the thought; None where it goes on."""
        return tokens.index(self._closer) + 1 if self._closer in tokens else None


def _thought_of(tokens: Sequence[int], opener: int | None, closer: int, ends: set[int]) -> list[int]:
    """A thought up to the token that closes it, which is put there where the model had no room for it.

    `opener` begins it (None: the prompt has). Nothing where the model did not think."""
    end = next((n for n, token in enumerate(tokens) if token == closer or token in ends), len(tokens))
    thought = list(tokens[:end])
    return [*thought, closer] if opener is None or opener in thought else []
