"""LLM: text in, text out. Joins a model, its tokenizer and its chat template; adds text to the engine's events.

Multi-turn chats reuse what is already encoded: the cache of the last single request is kept, and a new prompt that
begins the same way continues from there.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from sfumato.checkpoints import weights
from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.constraints import calls
from sfumato.constraints.constrain import Grammar
from sfumato.engine import arguments
from sfumato.engine.engine import Engine
from sfumato.engine.plan import Ask, Plan
from sfumato.engine.request import Inspect, Request, Span
from sfumato.engine.run import Run
from sfumato.errors import CapacityError, CheckpointError, InputError
from sfumato.events import Completion, Decision, Done, Edited, Event, Filled
from sfumato.model.network import Model
from sfumato.model.prompt import Prompt
from sfumato.options import CONSTRAINTS, OPTIONS, Options
from sfumato.remote import Remote
from sfumato.templates.layout import (
    MOST,
    Sheet,
    candidates,
    choices_of,
    lay_out,
    share_out,
    span_template,
    spans_of,
    tokens_of,
)
from sfumato.templates.slots import Slot, Template, check_template, pieces_of
from sfumato.text import chat
from sfumato.text.reader import Reader
from sfumato.text.tokenizer import Tokenizer

Messages = list[dict[str, Any]]

T = TypeVar("T")

GRAMMARS_KEPT = 16
"""Compiled constraints that are kept."""

MOST_STEPS = 4096
"""Most steps of a decision."""

LENGTH_STEPS = 2
"""Steps after which a slot's length is decided."""

LENGTH_BEHIND = 16
"""Fixed tokens behind a slot that have a say in its length."""


MOST_IDLE = 1 << 30
"""Bytes of a cache that holds nothing, beyond which it is given back between two calls."""

MARKED = 64
"""Tokens of instructions from which on it pays to keep them encoded for others."""

NOTHING = Prompt(())
"""No conversation."""

_FIRST = ("system", "developer")


@dataclass
class _Kept:
    """The engine of the last call, without rows: warm, its steps recorded where they can be."""

    engine: Engine
    prompt: Prompt
    """The beginning of the last conversation: what its first seat still holds."""


class LLM:
    """A loaded model. `LLM.load` makes one; `defaults` are the checkpoint's own values for options left open."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: chat.ChatTemplate | None = None,
        defaults: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> None:
        self.model, self.tokenizer, self.template, self.name = model, tokenizer, template, name
        self.defaults = dict(defaults or {})
        self._kept: _Kept | None = None
        self._grammars: dict[tuple[str, str], Grammar] = {}
        self._compiling = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path = "nano",
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        ops: str = "auto",
        quantize: str | None = None,
        notice: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        memory_limit: int | None = None,
    ) -> LLM:
        """From a checkpoint folder in any known format, a .gguf file, a hub id ("owner/name"), or "nano", the model
        inside this package.

        `dtype` None keeps the checkpoint's own; `ops` "auto" takes the fastest operations for device, dtype and
        formats; `quantize` packs weights to fewer bits while they are loaded, by a recipe: "int8", "fp8", "int4",
        "int4-fp8", "nvfp4", "int4-small". A quantised checkpoint needs no such word. `memory_limit`, bytes of weights
        on the device, streams the rest from the host. `notice` hears of what is left aside and what lies where;
        `progress(done, all)` counts bytes. CheckpointError names what is wrong with a file, InputError what is wrong
        with an argument, CapacityError a limit that is too low."""
        chat.CHILDREN.start()  # it reads the template, while this process reads the rest
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        checkpoint = open_checkpoint(weights.resolve(path))
        tokenizer, template = _words_of(checkpoint)
        model = weights.load(
            checkpoint,
            device=device,
            dtype=dtype,
            ops=ops,
            notice=notice,
            progress=progress,
            quantize=quantize,
            memory_limit=memory_limit,
        )
        defaults, _ = weights.generation_of(checkpoint)
        return cls(model, tokenizer, template, defaults, str(path))

    @classmethod
    def connect(cls, url: str, api_key: str | None = None, model: str | None = None) -> Remote:
        """The model of a server at `url`, Sfumato's or any with OpenAI's API: the same methods and events. See
        `Remote`."""
        return Remote(url, api_key, model)

    @overload
    def complete(self, prompt: str, options: Options = ...) -> Completion: ...
    @overload
    def complete(self, prompt: list[str], options: Options = ...) -> list[Completion]: ...
    def complete(
        self,
        prompt: str | list[str],
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Completion | list[Completion]:
        """Continue plain text, without a chat template; a list of texts runs as one batch."""
        arguments.check_kind("the prompt", prompt, (str, list, tuple), "a text, or a list of texts")
        texts = [prompt] if isinstance(prompt, str) else prompt
        for text in texts:
            arguments.check_text("the prompt", text)
        found = self._carry_out(self._plan_answers([self.ask(self.encode(text), options) for text in texts]))
        return Completion.of(found[0]) if isinstance(prompt, str) else [Completion.of(done) for done in found]

    def chat(
        self,
        messages: Messages,
        tools: list[dict[str, Any]] | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Completion:
        """Answer a conversation; thought and tool calls are told apart from the answer's text."""
        arguments.check_messages("the conversation", messages)
        arguments.check_options(options)
        ask = self.ask(messages, replace(options, drafts=False), tools)
        return Completion.of(self._carry_out(self._plan_answers([ask]))[0])

    def stream(
        self,
        prompt: str | Messages,
        options: Options = Options(),  # noqa: B008 - frozen
        tools: list[dict[str, Any]] | None = None,
    ) -> Iterator[Event]:
        """The events of one request: Draft (if options.drafts), Commit, Done. A string is continued, messages are
        answered, and then thoughts and tool calls are told apart from the text. The texts of the Commits joined are the
        text of Done."""
        return self._stream([self.ask(prompt, options, tools)])

    def encode(
        self, prompt: str | Messages, tools: list[dict[str, Any]] | None = None, thinking: bool = False
    ) -> list[int]:
        """Prompt to token ids: plain text behind the begin-of-text token, or a conversation through the template."""
        if isinstance(prompt, str):
            self._check_length("the prompt", [prompt])
            return self.tokenizer.encode(prompt, bos=True)
        if self.template is None:
            raise InputError(f"{self.name or 'this checkpoint'} has no chat template; give plain text instead")
        messages = prompt if isinstance(prompt, (list, tuple)) else []
        said = [message.get("content") for message in messages if isinstance(message, Mapping)]
        self._check_length("the conversation", [text for text in said if isinstance(text, str)])
        return self.template.encode(self.tokenizer, prompt, tools, thinking)

    def _check_length(self, what: str, texts: Sequence[str]) -> None:
        """CapacityError for texts that are too long for the context, however they are encoded."""
        least, most = sum(map(self.tokenizer.least, texts)), self.model.config.max_position
        if least > most:
            raise CapacityError(
                f"{what} has {sum(map(len, texts))} characters, which are at least {least} tokens, beyond the context "
                f"of {most}; shorten it"
            )

    def events(
        self,
        prompts: Sequence[Sequence[int]],
        options: Options | Sequence[Options] = Options(),  # noqa: B008 - frozen
        pins: Sequence[Mapping[int, int]] | None = None,
    ) -> Iterator[Event]:
        """Events with text for a batch of prompts (token ids), with positions of the answers that stay fixed."""
        arguments.check_kind("the prompts", prompts, (list, tuple), "a list of prompts, each a list of token ids")
        each = [options] * len(prompts) if isinstance(options, Options) else options
        places = [{}] * len(prompts) if pins is None else pins
        for name, some in ("options", each), ("pins", places):
            arguments.check_kind(name, some, (list, tuple), f"a list, one for each of {len(prompts)} prompts")
            if len(some) != len(prompts):
                raise InputError(f"{len(prompts)} prompts came with {len(some)} {name}; give one for each prompt")
        for ids in prompts:
            arguments.check_ids("a prompt", ids, self.model.config.vocab_size)
        rows = zip(prompts, each, places, strict=True)
        return self._stream([self.ask(list(ids), o, pins=some) for ids, o, some in rows])

    # ---- requests, and plans of several -------------------------------------------------------------------------

    def ask(
        self,
        prompt: str | Messages | list[int],
        options: Options,
        tools: list[dict[str, Any]] | None = None,
        pins: Mapping[int, int] | None = None,
        warm: Mapping[int, int] | None = None,
        spans: Sequence[Span] | None = None,
        banned: Sequence[int] = (),
        inspect: Inspect | None = None,
    ) -> Ask:
        """What to give an engine for a prompt: a text to continue, a conversation to answer, or token ids."""
        arguments.check_options(options)
        is_ids = isinstance(prompt, (list, tuple)) and bool(prompt) and not isinstance(prompt[0], Mapping)
        if is_ids:
            arguments.check_ids("the prompt", prompt, self.model.config.vocab_size)
        is_chat = not isinstance(prompt, str) and not is_ids
        if is_chat:
            options = _strictly(options, tools)
        ids: Any = prompt if is_ids else self.encode(prompt, tools, options.thinking)  # type: ignore[arg-type]
        options = self._complete_options(options)
        if spans is None:
            spans = self._whole_answer(options)
        reader = Reader(self.tokenizer, options.stop, self.model.config.eos_ids, is_chat)
        marks = self._marks(ids) if is_chat and (tools or prompt[0].get("role") in _FIRST) else []  # type: ignore
        request = Request(ids, options, pins or {}, warm or {}, spans, banned, marks)
        return Ask(request, reader, inspect=inspect)

    def _marks(self, ids: list[int]) -> list[int]:
        """Where the instructions that open a conversation end: many conversations begin with the same."""
        end = next((n for n, token in enumerate(ids) if token in self.model.config.eos_ids), 0) + 1
        return [end] if MARKED <= end < len(ids) else []

    def plan(self, kind: str, payload: Mapping[str, Any], options: Options) -> Plan[Any]:
        """The plan of the method of this name ("complete" and "chat": of one answer, which its last event tells) with
        these arguments, as plain data."""
        if kind in ("chat", "complete"):
            given = payload["messages"] if kind == "chat" else payload["prompt"]
            if kind == "chat":
                arguments.check_messages("the conversation", given)
            return self._plan_answers([self.ask(given, options, payload.get("tools"))])
        if kind == "infill":
            template = _around(payload["prefix"], payload["suffix"], payload.get("length"), payload.get("at_most"))
            return self._plan_fill(template, None, options)
        if kind == "fill":
            return self._plan_fill(pieces_of(payload["template"]), payload.get("prompt"), options)
        if kind == "edit":
            instruction, spans, strength = (payload.get(name) for name in ("instruction", "spans", "strength"))
            return self._plan_edit(payload["text"], instruction, spans, strength, options)
        if kind == "decide":
            return self._plan_decide(payload["prompt"], payload["fields"], payload.get("steps", 1), options)
        raise InputError(f"there is no method {kind!r}; there are chat, complete, infill, fill, edit, decide")

    def _plan_answers(self, asks: list[Ask]) -> Plan[list[Done]]:
        return (yield asks)

    def _carry_out(self, plan: Plan[T]) -> T:
        """Run a plan's requests on an engine of their own."""
        try:
            asks = next(plan)
            while True:
                ended = {event.row: event for event in self._stream(asks) if isinstance(event, Done)}
                asks = plan.send([ended[row] for row in range(len(asks))])
        except StopIteration as stop:
            return stop.value

    def _stream(self, asks: list[Ask]) -> Iterator[Event]:
        engine = self._take([Prompt.of(ask.request.prompt) for ask in asks])
        try:
            rows = [ask.row(self.model.config, str(n), f"prompt {n}") for n, ask in enumerate(asks)]
            run = Run(self.model, rows, engine=engine)
        except InputError:  # refused before any work
            if engine is not None:
                self._give(engine, NOTHING)
            raise
        try:
            for event in run:
                yield asks[event.row].reader.tell(event)
        except GeneratorExit:  # the caller has seen enough
            self._give(run.engine, NOTHING)
            raise
        row, encoded = run.rows[0], run.cache.lengths[0]
        conversation = row.prompt.extended(row.tokens).first(encoded)
        self._give(run.engine, conversation if len(asks) == 1 and len(conversation) == encoded else NOTHING)

    # ---- templates ----------------------------------------------------------------------------------------------

    def fill(
        self,
        template: Template,
        prompt: str | Messages | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Filled:
        """Fill the slots of a template: fixed texts and `Slot`s, filled jointly; fixed text stays byte for byte.

        `prompt` is what the template answers: messages through the chat template, or a text that it continues; None:
        it stands alone. InputError for a template or constraint that cannot be, CapacityError for one with no room."""
        return self._carry_out(self._plan_fill(template, prompt, options))

    def _plan_fill(self, template: Template, prompt: str | Messages | None, options: Options) -> Plan[Filled]:
        self.model.config.check_canvas("a template")
        arguments.check_template_prompt(prompt)
        pieces, options = check_template(template), self._complete_options(_of_templates(options))
        tokens = tokens_of(pieces, self.tokenizer)
        slots = {piece.name: piece for piece in pieces if isinstance(piece, Slot)}
        grammars = {name: self.grammar(*slot.constraint) for name, slot in slots.items() if slot.constraint}
        widths = {name: self._width(slots[name], grammar) for name, grammar in grammars.items()}
        widths |= {name: 1 for name, slot in slots.items() if slot.is_open}
        for name, slot in slots.items():
            if slot.is_open:
                widths[name] = yield from self._find_width(pieces, tokens, slot, widths, prompt, options)
        sheet = self._sheet(pieces, tokens, widths, options)
        done = (yield [self._ask_sheet(sheet, prompt, options, spans_of(sheet, grammars))])[0]
        fillers = self._fillers
        values = sheet.texts(done.tokens, self.tokenizer, fillers)
        lengths = {
            p.slot.name: sum(t not in fillers for t in done.tokens[p.start : p.start + p.width]) for p in sheet.places
        }
        return Filled(sheet.read(values), values, done.usage, done.seed, lengths)

    def infill(
        self,
        prefix: str,
        suffix: str,
        length: int | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
        at_most: int | None = None,
    ) -> Filled:
        """Write what stands between two texts, in `length` tokens; None finds the length, up to `at_most` (64)."""
        return self.fill(_around(prefix, suffix, length, at_most), None, options)

    def edit(
        self,
        text: str,
        instruction: str | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        strength: float | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Edited:
        """Rewrite a text where it stands: the canvas starts from it, a share (`strength`, 0.5) of it renoised.

        With `spans` (from character, to character) only they change, each in as many tokens as it has; without, the
        `instruction` may change any position."""
        return self._carry_out(self._plan_edit(text, instruction, spans, strength, options))

    def _plan_edit(
        self,
        text: str,
        instruction: str | None,
        spans: Sequence[tuple[int, int]] | None,
        strength: float | None,
        options: Options,
    ) -> Plan[Edited]:
        self.model.config.check_canvas("edit")
        arguments.check_text("the text", text)
        arguments.check_kind("the instruction", instruction, (str, type(None)), "text")
        if not text:
            raise InputError("the text is empty, so there is nothing to edit")
        if instruction is None and not spans:
            raise InputError("neither an instruction nor spans are given; say what to change, or where")
        strength, options = 0.5 if strength is None else strength, self._complete_options(_of_templates(options))
        prompt: str | Messages | None = None
        if instruction is not None:
            prompt = [{"role": "user", "content": f"{instruction}\n\n{text}"}]
        if spans:
            filled = yield from self._plan_fill(span_template(text, spans, strength), prompt, options)
            return Edited(filled.text, text, filled.usage, filled.seed)
        pieces = check_template([Slot("text", text=text, strength=strength)])
        sheet = lay_out(pieces, self.tokenizer, self.model.config, {}, options.seed or 0, is_open_ended=True)
        canvas, ends = self.model.config.canvas_length, self.model.config.eos_ids
        whole = -(-(sheet.length + 1) // canvas) * canvas
        warm = sheet.warm | dict.fromkeys(range(sheet.length, whole), ends[0])
        ids = self._template_prompt(prompt, sheet)
        self._check_room(len(ids), whole)
        done = (yield [self.ask(ids, replace(options, max_tokens=whole), warm=warm)])[0]
        return Edited(done.text, text, done.usage, done.seed)

    def decide(
        self,
        prompt: str | Messages,
        fields: Mapping[str, Sequence[str]],
        steps: int = 1,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> dict[str, Decision]:
        """Answer questions with given choices: field -> choices in, field -> likeliest choice and probabilities out.

        All fields stand on one canvas as "field: choice" lines and are read in one denoise pass (`steps` of them)."""
        return self._carry_out(self._plan_decide(prompt, fields, steps, options))

    def _plan_decide(
        self, prompt: str | Messages, fields: Mapping[str, Sequence[str]], steps: int, options: Options
    ) -> Plan[dict[str, Decision]]:
        self.model.config.check_canvas("decide")
        arguments.check_template_prompt(prompt)
        arguments.check_count("steps", steps, 1, MOST_STEPS)
        tokens = choices_of(fields, self.tokenizer)
        pieces: list[str | Slot] = []
        for name, each in tokens.items():
            pieces += [f"{name}:", Slot(name, length=max(map(len, each))), "\n"]
        sheet = lay_out(check_template(pieces), self.tokenizer, self.model.config, {})
        if sheet.length > self.model.config.canvas_length:
            raise CapacityError(
                f"the fields take {sheet.length} tokens and must fit one canvas of {self.model.config.canvas_length}; "
                "ask fewer at a time"
            )
        read: list[Tensor] = []
        options = replace(_of_templates(options), max_steps=steps, t_max=1.0, t_min=1.0)
        options = self._complete_options(replace(options, temperature_steps=None))
        yield [self._ask_sheet(sheet, prompt, options, [], read.append)]
        found = {}
        for place in sheet.places:
            log_p = torch.log_softmax(read[-1][place.start : place.start + place.width].float(), -1)
            choices, after = fields[place.slot.name], sheet.pins[place.start + place.width]
            probabilities = share_out(tokens[place.slot.name], _at_depths(tokens[place.slot.name], log_p, after), after)
            by_choice = dict(zip(choices, probabilities, strict=True))
            found[place.slot.name] = Decision(max(by_choice, key=by_choice.__getitem__), by_choice)
        return found

    def grammar(self, kind: str, value: Any) -> Grammar:
        """A compiled constraint, kept for the next time: see `constrain.Grammar.compile`."""
        key = kind, repr(value)
        with self._compiling:
            kept = self._grammars.get(key)
        if kept is None:  # not under the lock: others need not wait for it
            config = self.model.config
            kept = Grammar.compile(kind, value, self.tokenizer, config.vocab_size, sorted(self._fillers))
            with self._compiling:
                while len(self._grammars) >= GRAMMARS_KEPT:
                    self._grammars.pop(next(iter(self._grammars)))
                self._grammars[key] = kept
        return kept

    def must_compile(self, kind: str, payload: Mapping[str, Any], options: Options) -> bool:
        """Whether a request (see `plan`) holds a constraint that is not compiled yet, which may take seconds."""
        asked = [options.constraint, ("tools", None) if options.strict or options.must_call else None]
        if kind == "fill":
            slots = [piece for piece in payload["template"] if isinstance(piece, dict)]
            asked += [(name, slot[name]) for slot in slots for name in CONSTRAINTS if slot.get(name) is not None]
        return any((one[0], repr(one[1])) not in self._grammars for one in asked if one is not None)

    @property
    def _fillers(self) -> frozenset[int]:
        """Tokens that end an answer or fill what it leaves."""
        return frozenset((*self.model.config.eos_ids, self.model.config.pad_id))

    def _whole_answer(self, options: Options) -> list[Span]:
        if options.constraint is None:
            return []
        return [Span(0, None, self.grammar(*options.constraint))]

    def _width(self, slot: Slot, grammar: Grammar) -> int:
        return slot.at_most or 2 * grammar.shortest() + 8

    def _sheet(
        self, pieces: Template, tokens: Sequence[list[int]], widths: Mapping[str, int], options: Options
    ) -> Sheet:
        config, seed = self.model.config, options.seed or 0
        return lay_out(pieces, self.tokenizer, config, widths, seed, is_short=options.short, tokens=tokens)

    def _find_width(
        self,
        pieces: Template,
        tokens: Sequence[list[int]],
        slot: Slot,
        widths: dict[str, int],
        prompt: str | Messages | None,
        options: Options,
    ) -> Plan[int]:
        """The length that agrees best with the rest, after a few steps in which all candidates are rows of one batch:
        how unsure the model is of the slot's tokens, and how surprised at the fixed ones behind it, in nats a token."""
        sizes = candidates(min(slot.at_most or MOST, self.model.config.canvas_length))
        each = [self._sheet(pieces, tokens, widths | {slot.name: size}, options) for size in sizes]
        length, number = self.model.config.canvas_length, [p.slot.name for p in each[0].places].index(slot.name)
        # Canvases behind the one that the slot begins on have no say in it.
        until = [(sheet.places[number].start // length + 1) * length for sheet in each]
        each = [replace(sheet, length=min(sheet.length, end)) for sheet, end in zip(each, until, strict=True)]
        steps, scores = [0] * len(sizes), [math.inf] * len(sizes)

        def look(row: int, logits_LV: Tensor) -> None:
            place, first = each[row].places[number], steps[row] // LENGTH_STEPS * length
            steps[row] += 1
            end = place.start + place.width
            behind = [p for p in range(end, end + LENGTH_BEHIND) if p in each[row].pins]
            inside = [p - first for p in (*range(place.start, end), *behind) if 0 <= p - first < len(logits_LV)]
            if not 0 <= place.start - first < length:
                return
            log_p = torch.log_softmax(logits_LV[inside].float(), -1)
            split = sum(p + first < end for p in inside)
            unsure = -(log_p[:split].exp() * log_p[:split]).sum(-1).mean()
            tokens = torch.tensor([each[row].pins[p + first] for p in inside[split:]], device=log_p.device)
            surprise = -log_p[split:].gather(1, tokens[:, None]).mean() if len(tokens) else torch.tensor(0.0)
            scores[row] = float(unsure) + float(surprise)

        quick = replace(options, max_steps=LENGTH_STEPS, confidence=0.0, early=False, short=False, drafts=False)
        asks = [self._ask_sheet(sheet, prompt, quick, [], partial(look, row)) for row, sheet in enumerate(each)]
        yield [replace(ask, is_shown=False) for ask in asks]
        return sizes[min(range(len(sizes)), key=lambda row: (scores[row], row))]

    def _ask_sheet(
        self,
        sheet: Sheet,
        prompt: str | Messages | None,
        options: Options,
        spans: list[Span],
        inspect: Inspect | None = None,
    ) -> Ask:
        ids = self._template_prompt(prompt, sheet)
        self._check_room(len(ids), sheet.length)
        options = replace(options, stop=(), max_tokens=sheet.length, min_tokens=sheet.length)
        control = sorted(self.tokenizer.special_ids)  # a slot is text
        return self.ask(ids, options, pins=sheet.pins, warm=sheet.warm, spans=spans, banned=control, inspect=inspect)

    def _check_room(self, before: int, length: int) -> None:
        """CapacityError where so many positions, in whole canvases, do not fit behind so many tokens."""
        canvas, most = self.model.config.canvas_length, self.model.config.max_position
        if before + -(-length // canvas) * canvas > most:
            raise CapacityError(
                f"the template takes {length} positions behind {before} tokens, beyond the context of {most}; shorten "
                "its slots or the text before them"
            )

    def _template_prompt(self, prompt: str | Messages | None, sheet: Sheet) -> list[int]:
        """What the first canvas of a sheet stands behind: the prompt, then the sheet's lead."""
        if sheet.beyond and self.template is not None and not isinstance(prompt, str):
            hint = f"The text goes on later with:\n\n{sheet.beyond}"
            prompt = [*(prompt or [{"role": "user", "content": "Write the text."}])]
            content = prompt[-1].get("content")
            if isinstance(content, str):  # what is neither is refused below
                prompt[-1] = {**prompt[-1], "content": f"{content}\n\n{hint}"}
            elif isinstance(content, list):
                prompt[-1] = {**prompt[-1], "content": [*content, {"type": "text", "text": hint}]}
        return [*self.encode(prompt or ""), *sheet.lead]

    def forget(self) -> None:
        """Free what the last call left: the cache of its conversation, and the steps that were recorded for it."""
        self._kept = None

    def _complete_options(self, options: Options) -> Options:
        if options.constraint is not None:
            self.model.config.check_canvas(options.constraint[0])
        seed = secrets.randbits(32) if options.seed is None else options.seed
        return replace(options.with_defaults(self.defaults), seed=seed)

    def _take(self, prompts: Sequence[Prompt]) -> Engine | None:
        """The engine of the last call, if there is one and no other call has it now. Its first seat keeps what it has
        in common with the prompt, if there is one prompt."""
        kept, self._kept = self._kept, None
        if kept is None or kept.engine.model is not self.model:
            return None
        shared = min(kept.prompt.shared(prompts[0]), len(prompts[0]) - 1) if len(prompts) == 1 else 0
        shared = max(shared, 0)  # of an empty prompt, which is refused later
        engine = kept.engine
        engine.leave(0, shared if engine.cache.can_truncate(0, shared) else 0)
        return engine

    def _give(self, engine: Engine, conversation: Prompt) -> None:
        """Keep an engine for the next call, and this conversation in its first seat."""
        for seat in range(len(engine.rows)):
            engine.leave(seat, len(conversation) if seat == 0 else 0)
        if engine.cache.bytes > MOST_IDLE and not len(conversation):
            engine.resize(1, 1)
        self._kept = _Kept(engine, conversation)


def _words_of(checkpoint: Checkpoint) -> tuple[Tokenizer, chat.ChatTemplate | None]:
    """Tokenizer and chat template, from within the file or from the files beside it."""
    held, folder = checkpoint.vocabulary, checkpoint.path
    if held is not None:
        tokenizer = weights.tokenizer_of(held)
        return tokenizer, None if held.template is None else chat.ChatTemplate(held.template, tokenizer.special)
    if folder.is_file():
        raise CheckpointError(f"{folder} carries no tokenizer; convert it from a checkpoint that has one")
    tokenizer = Tokenizer.from_folder(folder)
    has_template = any((folder / name).exists() for name in ("chat_template.jinja", "tokenizer_config.json"))
    return tokenizer, chat.ChatTemplate.from_folder(folder, tokenizer.special) if has_template else None


def _strictly(options: Options, tools: list[dict[str, Any]] | None) -> Options:
    """With the grammar of calls of these tools, where that is asked for."""
    if not tools:
        if options.must_call:
            raise InputError("must_call asks for a call and there are no tools; give at least one")
        return options
    if not options.strict and not options.must_call:
        return options
    grammar = calls.grammar(tools, options.must_call)
    return replace(options, strict=False, must_call=False, grammar=grammar)


def _at_depths(choices: Sequence[Sequence[int]], log_p_TV: Tensor, after: int) -> list[dict[int, float]]:
    """The log-probabilities at each position of the tokens that a choice has there, and of the one behind the slot."""
    found = []
    for depth, log_p_V in enumerate(log_p_TV):
        asked = sorted({choice[depth] for choice in choices if depth < len(choice)} | {after})
        found.append(dict(zip(asked, log_p_V[asked].tolist(), strict=True)))
    return [*found, {after: 0.0}]


def _around(prefix: str, suffix: str, length: int | None, at_most: int | None) -> list[str | Slot]:
    arguments.check_text("the prefix", prefix)
    arguments.check_text("the suffix", suffix)
    return [prefix, Slot("middle", length=length, at_most=at_most), suffix]


def _of_templates(options: Options) -> Options:
    """InputError for an option that means nothing where a template says what is written."""
    arguments.check_options(options)
    for name, option in OPTIONS.items():
        if "templates" not in option.about.uses and getattr(options, name) != option.default:
            message = f"{name} does not apply to a template, whose slots say what is written; leave it out"
            raise InputError(message, option=name)
    return options
