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
from sfumato.errors import InputError
from sfumato.events import Decision, Decisions, Done, Usage
from sfumato.model.config import ModelConfig
from sfumato.model.prompt import Prompt
from sfumato.options import Options
from sfumato.questions import Question, Span, state_text
from sfumato.templates.decisions import AnswerSet, decision_of, tempered
from sfumato.templates.prompts import PromptEncoder
from sfumato.templates.requests import Decide
from sfumato.text.tokenizer import Tokenizer

THOUGHT = 1024
"""Tokens that a thought may have."""

CHANNEL_END = "<channel|>"
"""The control token behind a thought."""


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
        answers: dict[str, Decision] = {}
        waiting = dict(self.query.questions)
        skipped: list[str] = []
        while waiting:
            wave, waiting = self._next_wave(waiting, answers, skipped)
            sheets = [self._sheet(id, question, answers) for id, question in wave.items()]
            if self.query.think == "always":
                answers |= yield from self._thought_about(sheets, options)
            else:
                answers |= yield from self._read(sheets, options)
            if self.query.think == "auto":
                unsure = [sheet for sheet in sheets if answers[sheet.id].confidence < self.query.threshold]
                answers |= yield from self._thought_about(unsure, options)
        ordered = {id: answers[id] for id in self.query.questions if id in answers}
        return Decisions(ordered, _usage_of(self.endings), options.seed or 0, tuple(skipped))

    def _next_wave(
        self, waiting: dict[str, Question], answers: Mapping[str, Decision], skipped: list[str]
    ) -> tuple[dict[str, Question], dict[str, Question]]:
        """The questions that can be asked now, and those that cannot yet; what is not to be asked is skipped."""
        now: dict[str, Question] = {}
        later: dict[str, Question] = {}
        for id, question in waiting.items():
            above = question.depends_on
            if above is None or above.id in answers:
                if above is None or answers[above.id].choice == above.answer:
                    now[id] = question
                else:
                    skipped.append(id)
            elif above.id in skipped:
                skipped.append(id)
            else:
                later[id] = question
        return now, later

    def _sheet(self, id: str, question: Question, answers: Mapping[str, Decision]) -> _AnswerSheet:
        """A question with its answers in tokens. InputError names the question."""
        text = question.text()
        places: tuple[tuple[int, int], ...] = ()
        if isinstance(question, Span):
            state = state_text(self.query.state)
            passages = {state[first:last]: (first, last) for first, last in reversed(question.passages(state))}
            names, places = [*reversed(passages)], tuple(reversed(passages.values()))
            words = names
        else:
            names, words = question.options, question.words
        if question.depends_on is not None:
            text = f"{_told(self.query.questions[question.depends_on.id], answers[question.depends_on.id])}\n{text}"
        lead = "" if self.prompts.template is not None else " "
        tokens = [self.tokenizer.encode(f"{lead}{word}") for word in words]
        try:
            answer_set = AnswerSet.of(names, tokens, self._end())
        except InputError as error:
            raise InputError(f"question {id!r}: {error}", option="questions") from None
        if answer_set.deepest >= self.config.canvas_length:
            raise InputError(
                f"question {id!r} has options that are alike for {answer_set.deepest} tokens, more than a canvas of "
                f"{self.config.canvas_length} holds; reword them",
                option="questions",
            )
        return _AnswerSheet(id, question, answer_set, text, places)

    def _end(self) -> int:
        """The token behind a complete answer: what ends a turn, or a line where there are no turns."""
        if self.prompts.template is None:
            return self.tokenizer.encode("\n")[-1]
        turn = self.tokenizer.id("<turn|>")
        return turn if turn in self.config.eos_ids and turn is not None else self.config.eos_ids[0]

    # ---- reads ------------------------------------------------------------------------------------------------------

    def _read(self, sheets: Sequence[_AnswerSheet], options: Options) -> Plan[dict[str, Decision]]:
        if not sheets:  # a wave of which nothing is to be asked
            return {}
        head, tails = self._prompts(sheets, is_thinking=False)
        return (yield from self._read_behind(sheets, head, tails, options))

    def _read_behind(
        self, sheets: Sequence[_AnswerSheet], head: list[int], tails: Sequence[Sequence[int]], options: Options
    ) -> Plan[dict[str, Decision]]:
        """Read these questions, each behind its own tokens, which follow those of the state."""
        each = [Read(tuple(tail), s.answers.glances(self.query.samples)) for s, tail in zip(sheets, tails, strict=True)]
        open_reads = [read for read in each if read.glances]
        values = {}
        if open_reads:
            deepest = max(sheet.answers.deepest for sheet in sheets)
            reads = Reads(tuple(open_reads), self._length(deepest), self.query.steps)
            readings = Readings()
            request = Request(head, options, marks=[len(head)], reads=reads, name="the state")
            self.endings += yield [replace(self.ask(request), readings=readings)]
            values = dict(zip(map(id, open_reads), readings.values, strict=True))
        answers = {}
        for sheet, read in zip(sheets, each, strict=True):
            probabilities = sheet.answers.probabilities(values.get(id(read), []))
            probabilities = tempered(probabilities, self.temperatures.get(sheet.question.kind, 1.0))
            answers[sheet.id] = decision_of(sheet.question, sheet.answers.names, probabilities, sheet.places)
        return answers

    def _length(self, deepest: int) -> int:
        """Positions of the canvases: of all alike, so that they share passes."""
        need = deepest + 1
        if self.query.canvas is not None:
            if self.query.canvas < need or self.query.canvas > self.config.canvas_length:
                raise InputError(
                    f"canvas is {self.query.canvas}; these questions need {need} positions, and the model's own canvas "
                    f"has {self.config.canvas_length}",
                    option="canvas",
                )
            return self.query.canvas
        return min(self.config.canvas_length, -(-need // SHORT) * SHORT)

    def _prompts(self, sheets: Sequence[_AnswerSheet], is_thinking: bool) -> tuple[list[int], list[list[int]]]:
        state = self.query.conversation or state_text(self.query.state)
        return self.prompts.encode_around(state, [sheet.text for sheet in sheets], is_thinking)

    # ---- thoughts ---------------------------------------------------------------------------------------------------

    def _thought_about(self, sheets: Sequence[_AnswerSheet], options: Options) -> Plan[dict[str, Decision]]:
        """Let the model think about each of these questions, then read them behind the thoughts."""
        if not sheets:
            return {}
        close = self.tokenizer.id(CHANNEL_END)
        if self.prompts.template is None or close is None:
            raise InputError("this model has no format for thoughts; leave think out", option="think")
        head, tails = self._prompts(sheets, is_thinking=True)
        writing = replace(options, max_tokens=THOUGHT)
        prompts = [Prompt.of([*head, *tail]) for tail in tails]
        endings = yield [self.ask(Request(prompt, writing, marks=[len(head)])) for prompt in prompts]
        self.endings += endings
        thoughts = [_thought_of(done.tokens, close, set(self.config.eos_ids)) for done in endings]
        behind = [[*tail, *thought] for tail, thought in zip(tails, thoughts, strict=True)]
        answers = yield from self._read_behind(sheets, head, behind, options)
        texts = {sheet.id: self.tokenizer.decode(thought) for sheet, thought in zip(sheets, thoughts, strict=True)}
        return {id: replace(answer, thought=texts[id]) for id, answer in answers.items()}


def _thought_of(tokens: Sequence[int], close: int, ends: set[int]) -> list[int]:
    """A thought up to the token that closes it, which is put there where the model had no room for it."""
    for place, token in enumerate(tokens):
        if token == close or token in ends:
            return [*tokens[:place], close]
    return [*tokens, close]


def _told(question: Question, answer: Decision) -> str:
    """What the model is told of an answer that another question depends on."""
    word = answer.choice
    if not isinstance(question, Span):
        word = question.words[question.options.index(answer.choice)]
    return f"{question.text()}\nThe answer was: {word}\n"


def _usage_of(endings: Sequence[Done]) -> Usage:
    """What all of these took, one after the other."""
    each = [done.usage for done in endings]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in each),
        tokens=sum(usage.tokens for usage in each),
        canvases=sum(usage.canvases for usage in each),
        steps=sum(usage.steps for usage in each),
        passes=sum(usage.passes for usage in each),
        seconds=sum(usage.seconds for usage in each),
        reused_tokens=sum(usage.reused_tokens for usage in each),
    )
