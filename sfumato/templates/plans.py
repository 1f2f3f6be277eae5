"""Plans: what each kind of query asks of an engine, and what it makes of the answers.

`Planner.plan` matches a query by its type; a new kind of query is a class in `requests` and a plan here. A plan yields
requests of the engine and is sent what they ended with (`engine.plan`), so that one caller's engine and everybody's
batch carry out the same. It deliberately lacks the model: a planner runs nothing. The adapter that a query names is
looked up once, for all that its plan asks for: what is loaded later under the same name is another one.
"""

from __future__ import annotations

import copy
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from sfumato.checkpoints.calibration import Calibration
from sfumato.engine import arguments
from sfumato.engine.plan import Ask, Plan
from sfumato.engine.request import GrammarSpan, Inspect, Request
from sfumato.engine.scores import PromptScores
from sfumato.errors import CapacityError, InputError
from sfumato.events import Completion, Decisions, Edited, Filled, Scored, TokenCount
from sfumato.model.adapters import Adapters
from sfumato.model.config import ModelConfig
from sfumato.model.loaded import LoadedAdapter
from sfumato.model.prompt import Prompt
from sfumato.options import OPTIONS, Options
from sfumato.templates import adapters, scores
from sfumato.templates.checks import check_query
from sfumato.templates.deciding import Deciding
from sfumato.templates.grammars import AnswerParts, GrammarCache, parts_of
from sfumato.templates.layout import EncodedTemplate, Sheet, lay_out, spans_of
from sfumato.templates.lengths import LENGTH_STEPS, LONGEST, LengthScore, candidates
from sfumato.templates.prompts import PromptEncoder
from sfumato.templates.requests import (
    DECISION_OPTIONS,
    AdapterQuery,
    AnswerQuery,
    Chat,
    Complete,
    CountTokens,
    Decide,
    Edit,
    Fill,
    Infill,
    Likelihood,
    LoadAdapter,
    Messages,
    Query,
    QueryFor,
    UnloadAdapter,
)
from sfumato.templates.slots import Slot, check_template, span_template
from sfumato.text.reader import Reader
from sfumato.text.replies import PromptEnd, ReplyParser
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer

STRENGTH = 0.5
"""The share of an edited text that starts as noise, where the caller leaves it open."""


class Planner:
    """Plans queries for one model. `defaults` are the checkpoint's own values of options that are left open.

    It may be used from several threads."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        defaults: Mapping[str, Any],
        name: str,
        bank: Adapters,
    ) -> None:
        self.bank = bank
        """The adapters that queries may name."""
        self._adapter: LoadedAdapter | None = None
        """That of all asks, in a planner of one query."""
        self.calibration = Calibration()
        """How sure decisions are, of plans from then on; an adapter has its own temperatures."""
        self.context = config.max_position
        """Tokens that whoever carries plans out allows a request; decisions say what does not fit, and think within."""
        self.config, self.tokenizer, self.defaults = config, tokenizer, defaults
        self.prompts = PromptEncoder(config, tokenizer, template, name)
        self.fillers = frozenset((*config.eos_ids, config.pad_id))
        """Tokens that end an answer, or pad what it leaves of its canvas."""
        self.grammars = GrammarCache(tokenizer, config.vocab_size, sorted(self.fillers))

    def plan(self, query: QueryFor[Any]) -> Plan[Any]:
        """The plan of a query, which ends with the query's result.

        What is wrong with the query is an InputError or CapacityError, here or at the plan's first step."""
        if isinstance(query, Query):
            check_query(query)
        planner = self._for(query) if isinstance(query, QueryFor) else self
        match query:
            case Complete() | Chat():
                return planner.answer(query)
            case Infill():
                return planner.infill(query)
            case Fill():
                return planner.fill(query)
            case Edit():
                return planner.edit(query)
            case Decide():
                return planner.decide(query)
            case Likelihood():
                return planner.score(query)
            case CountTokens():
                return planner.count(query)
            case LoadAdapter():
                return adapters.loading(self.bank, query)
            case UnloadAdapter():
                return adapters.unloading(self.bank, query)
        names = ", ".join(kind.__name__ for kind in get_args(Query))
        raise InputError(f"there is no request {reprlib.repr(query)}; there are {names}")

    def must_compile(self, query: QueryFor[Any]) -> bool:
        """Whether a query holds a constraint that is not compiled yet, or names a file: that may take seconds."""
        if isinstance(query, AdapterQuery):
            return True
        options = query.options
        constraints = [options.constraint]
        must_obey = options.strict or options.must_call
        if isinstance(query, Chat) and query.tools:
            if must_obey or options.constraint is not None:  # calls beside it
                constraints.append(("calls", list(query.tools)))
        elif must_obey:
            return True
        if isinstance(query, Fill):
            constraints += [piece.constraint for piece in query.template if isinstance(piece, Slot)]
        return any(one is not None and not self.grammars.has(*one) for one in constraints)

    def _for(self, query: QueryFor[Any]) -> Planner:
        """A planner whose asks all have the adapter of this query. InputError where that is not loaded."""
        options = query.query.options if isinstance(query, CountTokens) else query.options
        if (adapter := self._adapter_of(options)) is None:
            return self
        planner = copy.copy(self)
        planner._adapter = adapter
        return planner

    def _adapter_of(self, options: Options) -> LoadedAdapter | None:
        """The adapter that options name, or the checkpoint's defaults; InputError where it is not loaded."""
        name = self.defaults.get("adapter") if options.adapter is None else options.adapter
        if not name:
            return None
        return self._adapter or self.bank.get(name)

    # ---- answers ----------------------------------------------------------------------------------------------------

    def answer(self, query: AnswerQuery) -> Plan[Completion]:
        """The plan of one answer."""
        (completion,) = yield from self.answers([query])
        return completion

    def answers(self, queries: Sequence[AnswerQuery]) -> Plan[list[Completion]]:
        """The plan of several answers that run together. InputError where there is none."""
        endings = yield [self.ask_answer(query) for query in queries]
        return [Completion.of(done) for done in endings]

    def ask_answer(self, query: AnswerQuery) -> Ask:
        """What an answer asks of an engine."""
        check_query(query)
        prompt = self._prompt_of(query)
        if isinstance(query, Complete):
            return replace(self.ask(Request(prompt, query.options)), is_answer=True)
        parts = parts_of(query.options, query.tools)
        marks = self.prompts.marks(prompt, query.conversation, query.tools)
        spans = [] if parts is None else self._spans(parts, prompt, query.options)
        request = Request(prompt, query.options, spans=spans, marks=marks)
        parser = ReplyParser(self.tokenizer, self.config.eos_ids, query.tools, prompt.tokens)
        return replace(self.ask(request, parser), is_answer=True)

    def _spans(self, parts: AnswerParts, prompt: Prompt, options: Options) -> list[GrammarSpan]:
        """What keeps the answer to a chat to its parts, behind a thought where one can come."""
        kind = "" if options.constraint is None else options.constraint[0]
        self.config.check_canvas("must_call" if options.must_call else kind or "strict")
        end = PromptEnd.of(self.tokenizer, prompt.tokens)
        if end.thought == "open":
            parts = replace(parts, thought="open")
        elif options.thinking and end.thought == "none":
            parts = replace(parts, thought="allowed")
        return [GrammarSpan(0, None, self.grammars.compose(parts))]

    def count(self, query: CountTokens) -> Plan[TokenCount]:
        """The plan of a count, which asks nothing of an engine."""
        yield from ()
        return TokenCount(len(self._prompt_of(query.query)))

    def _prompt_of(self, query: AnswerQuery) -> Prompt:
        """The prompt that an answer goes on from."""
        if isinstance(query, Complete):
            return self._continued(query.prompt)
        return self.prompts.encode(query.conversation, query.tools, query.options.thinking, query.is_continued)

    def _continued(self, prompt: str | Sequence[int] | Prompt) -> Prompt:
        """What a `Complete` goes on from: text, token ids or a prompt."""
        if isinstance(prompt, str):
            return self.prompts.encode(prompt)
        arguments.check_ids(
            "the prompt", prompt.tokens if isinstance(prompt, Prompt) else prompt, self.config.vocab_size
        )
        return Prompt.of(prompt)

    def ask(self, request: Request, parser: ReplyParser | None = None) -> Ask:
        """A request of the engine with its options filled in, and a reader of its text; `parser` reads a chat's answer.

        A constraint in its options rules the whole answer, unless it has spans of its own."""
        arguments.check_options(request.options)
        options = self.resolve(request.options.with_defaults(self.defaults))
        request = replace(request, prompt=Prompt.of(request.prompt).adapted(self._adapter_of(options)))
        reader = Reader(self.tokenizer, options.stop, self.config.eos_ids, parser)
        return Ask(replace(request, options=options, spans=request.spans or self._whole_answer(options)), reader)

    def resolve(self, options: Options) -> Options:
        """Options with a seed, and the checkpoint's own values where they are left open and a template has them too."""
        if options.constraint is not None:
            self.config.check_canvas(options.constraint[0])
        seed = secrets.randbits(32) if options.seed is None else options.seed
        shared = {name: value for name, value in self.defaults.items() if "templates" in OPTIONS[name].about.uses}
        return replace(options.with_defaults(shared), seed=seed)

    def _whole_answer(self, options: Options) -> list[GrammarSpan]:
        if options.constraint is None:
            return []
        return [GrammarSpan(0, None, self.grammars.compile(*options.constraint))]

    # ---- templates --------------------------------------------------------------------------------------------------

    def infill(self, query: Infill) -> Plan[Filled]:
        """The plan of a template with one slot between two texts."""
        middle = Slot("middle", length=query.length, at_most=query.at_most)
        return (yield from self.fill(Fill([query.prefix, middle, query.suffix], None, query.options)))

    def fill(self, query: Fill) -> Plan[Filled]:
        """The plan of a template: the lengths that are open one after the other, then all slots together."""
        self.config.check_canvas("a template")
        pieces, options = check_template(query.template), self.resolve(_of_templates(query.options))
        query = replace(query, template=pieces, options=options)
        template = EncodedTemplate.of(pieces, self.tokenizer)
        slots = {piece.name: piece for piece in pieces if isinstance(piece, Slot)}
        grammars = {name: self.grammars.compile(*slot.constraint) for name, slot in slots.items() if slot.constraint}
        widths = {name: slots[name].at_most or 2 * grammar.shortest() + 8 for name, grammar in grammars.items()}
        widths |= {name: 1 for name, slot in slots.items() if slot.is_open}
        for name, slot in slots.items():
            if slot.is_open:
                widths[name] = yield from self._search_width(query, template, slot, widths)
        sheet = self._sheet(template, widths, options)
        (done,) = yield [self._ask_sheet(sheet, query.prompt, options, spans_of(sheet, grammars))]
        values, lengths = (
            sheet.texts(done.tokens, self.tokenizer, self.fillers),
            sheet.lengths(done.tokens, self.fillers),
        )
        return Filled(sheet.read(values), values, done.usage, done.seed, lengths)

    def edit(self, query: Edit) -> Plan[Edited]:
        """The plan of a text that starts as it is: spans of it as slots, or the whole of it as a warm canvas."""
        self.config.check_canvas("edit")
        text, instruction, spans = query.text, query.instruction, query.spans
        strength = STRENGTH if query.strength is None else query.strength
        options = self.resolve(_of_templates(query.options))
        prompt = None if instruction is None else [{"role": "user", "content": f"{instruction}\n\n{text}"}]
        if spans:
            filled = yield from self.fill(Fill(span_template(text, spans, strength), prompt, options))
            return Edited(filled.text, text, filled.usage, filled.seed)
        template = EncodedTemplate.of(check_template([Slot("text", text=text, strength=strength)]), self.tokenizer)
        sheet = lay_out(template, self.config, {}, options.seed or 0, is_open_ended=True)
        canvas, ends = self.config.canvas_length, self.config.eos_ids
        whole = -(-(sheet.length + 1) // canvas) * canvas
        warm = sheet.warm | dict.fromkeys(range(sheet.length, whole), ends[0])
        before = self.prompts.encode_before(prompt, sheet)
        self._check_room(len(before), whole)
        (done,) = yield [self.ask(Request(before, replace(options, max_tokens=whole), warm=warm))]
        return Edited(done.text, text, done.usage, done.seed)

    def decide(self, query: Decide) -> Plan[Decisions]:
        """The plan of decisions: see `deciding`."""
        self.config.check_canvas("decide")
        arguments.check_options(query.options)
        for name, option in OPTIONS.items():
            value = getattr(query.options, name)
            if name not in DECISION_OPTIONS and value != option.default:
                raise InputError(
                    f"{name} is {reprlib.repr(value)}; a decision reads the model's own probabilities and takes "
                    f"{' and '.join(DECISION_OPTIONS)} alone, leave it out",
                    option=name,
                )
        seed = query.options.seed or 0  # the same question has the same answer
        options = self.resolve(replace(query.options, seed=seed))
        adapter = self._adapter_of(query.options)
        temperatures = self.calibration.temperatures if adapter is None else adapter.temperatures
        config = replace(self.config, max_position=self.context)
        deciding = Deciding(query, config, self.tokenizer, self.prompts, self.ask, temperatures)
        return (yield from deciding.plan(options))

    def score(self, query: Likelihood) -> Plan[Scored]:
        """The plan of log-probabilities: one encode pass, and the token that the model would write behind it."""
        if not isinstance(query.prompt, str):
            ids = [*query.prompt, *(query.continuation or ())]
            arguments.check_ids("the prompt", ids, self.config.vocab_size)
        options = scores.following_options(query.options)
        prompt, first = scores.prompt_of(query, self.prompts)
        collected = PromptScores(first, max(1, options.top_logprobs))
        (done,) = yield [replace(self.ask(Request(prompt, options)), scores=collected)]
        return scores.scored_of(query, prompt, collected, done, self.tokenizer)

    def _search_width(self, query: Fill, template: EncodedTemplate, slot: Slot, widths: Mapping[str, int]) -> Plan[int]:
        """The width of a slot that agrees best with the rest of its template: see `lengths`."""
        canvas = self.config.canvas_length
        sizes = candidates(min(slot.at_most or LONGEST, canvas))
        sheets = [self._sheet(template, {**widths, slot.name: size}, query.options) for size in sizes]
        number = [place.slot.name for place in sheets[0].places].index(slot.name)
        # Canvases behind the one that the slot begins on have no say in it.
        ends = [(sheet.places[number].start // canvas + 1) * canvas for sheet in sheets]
        sheets = [replace(sheet, length=min(sheet.length, end)) for sheet, end in zip(sheets, ends, strict=True)]
        fits = [LengthScore(sheet, number, canvas) for sheet in sheets]
        quick = replace(
            query.options, max_steps=LENGTH_STEPS, confidence=0.0, early=False, short=False, redos=0, drafts=False
        )
        rows = zip(sheets, fits, strict=True)
        yield [self._ask_sheet(sheet, query.prompt, quick, [], fit) for sheet, fit in rows]
        return sizes[min(range(len(sizes)), key=lambda row: (fits[row].value, row))]

    def _sheet(self, template: EncodedTemplate, widths: Mapping[str, int], options: Options) -> Sheet:
        return lay_out(template, self.config, widths, options.seed or 0, is_short=options.short)

    def _ask_sheet(
        self,
        sheet: Sheet,
        prompt: str | Messages | None,
        options: Options,
        spans: list[GrammarSpan],
        inspect: Inspect | None = None,
    ) -> Ask:
        before = self.prompts.encode_before(prompt, sheet)
        self._check_room(len(before), sheet.length)
        options = replace(options, stop=(), max_tokens=sheet.length, min_tokens=sheet.length)
        control = sorted(self.tokenizer.special_ids)  # a slot is text
        ask = self.ask(Request(before, options, sheet.pins, sheet.warm, spans, control))
        return replace(ask, inspect=inspect)

    def _check_room(self, before: int, length: int) -> None:
        """CapacityError where so many positions, in whole canvases, do not fit behind so many tokens."""
        canvas, most = self.config.canvas_length, self.config.max_position
        if before + -(-length // canvas) * canvas > most:
            raise CapacityError(
                f"the template takes {length} positions behind {before} tokens, beyond the context of {most}; shorten "
                "its slots or the text before them"
            )


def _of_templates(options: Options) -> Options:
    """The options; InputError for one that means nothing where a template says what is written."""
    arguments.check_options(options)
    for name, option in OPTIONS.items():
        if "templates" not in option.about.uses and getattr(options, name) != option.default:
            message = f"{name} does not apply to a template, whose slots say what is written; leave it out"
            raise InputError(message, option=name)
    return options
