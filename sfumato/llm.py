"""LLM: text in, text out. Joins a model, its tokenizer and its chat template; adds text to the engine's events.

Multi-turn chats reuse what is already encoded: the cache of the last single request is kept, and a new prompt that
begins the same way continues from there.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from sfumato import calls, chat, weights
from sfumato.cache import KVCache
from sfumato.constrain import Grammar
from sfumato.edit import (
    MOST,
    Sheet,
    Slot,
    Template,
    candidates,
    check_template,
    lay_out,
    share_out,
    span_template,
    spans_of,
)
from sfumato.engine import Run
from sfumato.events import (
    CapacityError,
    CheckpointError,
    Commit,
    Completion,
    Decision,
    Done,
    Draft,
    Edited,
    Event,
    Filled,
    InputError,
    Options,
)
from sfumato.forms import KINDS
from sfumato.guided import Span
from sfumato.interop import Checkpoint
from sfumato.interop.detect import open_checkpoint
from sfumato.model import Model
from sfumato.tokenizer import Detokeniser, Tokenizer

Messages = list[dict[str, Any]]

GRAMMARS_KEPT = 16
"""Compiled constraints that are kept."""

LENGTH_STEPS = 2
"""Steps after which a slot's length is decided."""

LENGTH_BEHIND = 16
"""Fixed tokens behind a slot that have a say in its length."""


@dataclass
class _Kept:
    """The encoded beginning of the last conversation: row 0 of the cache holds exactly these tokens."""

    tokens: list[int]
    cache: KVCache


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
        "nvfp4", "int4-small". A quantised checkpoint needs no such word. `memory_limit`, bytes of weights on the
        device, streams the rest from the host. `notice` hears of what is left aside and what lies where;
        `progress(done, all)` counts bytes. CheckpointError names what is wrong with a file, InputError what is wrong
        with an argument, CapacityError a limit that is too low."""
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
        texts = [prompt] if isinstance(prompt, str) else prompt
        found = self._complete([self.encode(text) for text in texts], options)
        return found[0] if isinstance(prompt, str) else found

    def chat(
        self,
        messages: Messages,
        tools: list[dict[str, Any]] | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Completion:
        """Answer a conversation; thought and tool calls are parsed out of the answer's text."""
        completion = self._complete([self.encode(messages, tools, options.thinking)], _strictly(options, tools))[0]
        reply = chat.parse_ids(self.tokenizer, completion.tokens)
        text = completion.text if completion.stop is not None else reply.text
        return replace(completion, text=text, thought=reply.thought, tool_calls=reply.tool_calls)

    def stream(
        self,
        prompt: str | Messages,
        options: Options = Options(),  # noqa: B008 - frozen
        tools: list[dict[str, Any]] | None = None,
    ) -> Iterator[Event]:
        """The events of one request: Draft (if options.drafts), Commit, Done. A string is continued, messages are
        answered. The texts of the Commits joined are the text of Done."""
        return self.events([self.encode(prompt, tools, options.thinking)], _strictly(options, tools))

    def encode(
        self, prompt: str | Messages, tools: list[dict[str, Any]] | None = None, thinking: bool = False
    ) -> list[int]:
        """Prompt to token ids: plain text behind the begin-of-text token, or a conversation through the template."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        if self.template is None:
            raise InputError(f"{self.name or 'this checkpoint'} has no chat template; give plain text instead")
        return self.template.encode(self.tokenizer, prompt, tools, thinking)

    def events(
        self,
        prompts: Sequence[Sequence[int]],
        options: Options | Sequence[Options] = Options(),  # noqa: B008 - frozen
        pins: Sequence[Mapping[int, int]] | None = None,
        warm: Sequence[Mapping[int, int]] | None = None,
        spans: Sequence[Sequence[Span]] | None = None,
        inspect: Callable[[list[int], Tensor], None] | None = None,
        banned: Sequence[int] = (),
    ) -> Iterator[Event]:
        """Events with text for a batch of prompts (token ids). The rest: see `engine.Run`."""
        each = [options] * len(prompts) if isinstance(options, Options) else list(options)
        each = [self._complete_options(o) for o in each]
        if spans is None and any(o.constraint for o in each):
            spans = [self._whole_answer(ids, o) for ids, o in zip(prompts, each, strict=True)]
        readers = [_Reader(self.tokenizer, o.stop) for o in each]
        run = Run(
            self.model,
            prompts,
            each,
            pins=pins,
            warm=warm,
            spans=spans,
            inspect=inspect,
            banned=banned,
            watch=lambda row, tokens: readers[row].push(tokens),
            cache=self._continue(prompts),
        )
        for event in run:
            if isinstance(event, Draft):
                yield replace(event, text=self.tokenizer.decode(self._before_eos(event.tokens)))
            elif isinstance(event, Commit):
                is_over = run.rows[event.row].finish_reason is not None
                yield replace(event, text=readers[event.row].take(is_over))
            else:
                reader = readers[event.row]
                yield replace(event, text=reader.text, stop=reader.found)
        if len(prompts) == 1:
            held = [*run.rows[0].prompt, *run.rows[0].tokens][: run.cache.lengths[0]]
            self._kept = _Kept(held, run.cache) if len(held) == run.cache.lengths[0] else None

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
        self.model.config.check_canvas("a template")
        pieces, options = check_template(template), self._complete_options(_of_templates(options))
        slots = {piece.name: piece for piece in pieces if isinstance(piece, Slot)}
        grammars = {name: self.grammar(*slot.constraint) for name, slot in slots.items() if slot.constraint}
        widths = {name: self._width(slots[name], grammar) for name, grammar in grammars.items()}
        widths |= {name: 1 for name, slot in slots.items() if slot.is_open}
        for name, slot in slots.items():
            if slot.is_open:
                widths[name] = self._find_width(pieces, slot, widths, prompt, options)
        sheet = self._sheet(pieces, widths, options)
        done = self._denoise([(sheet, spans_of(sheet, grammars))], prompt, options)[0]
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
        slot = Slot("middle", length=length, at_most=at_most)
        return self.fill([prefix, slot, suffix], None, options)

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
        self.model.config.check_canvas("edit")
        if not text:
            raise InputError("the text is empty, so there is nothing to edit")
        if instruction is None and not spans:
            raise InputError("neither an instruction nor spans are given; say what to change, or where")
        strength, options = 0.5 if strength is None else strength, self._complete_options(_of_templates(options))
        prompt: str | Messages | None = None
        if instruction is not None:
            prompt = [{"role": "user", "content": f"{instruction}\n\n{text}"}]
        if spans:
            filled = self.fill(span_template(text, spans, strength), prompt, options)
            return Edited(filled.text, text, filled.usage, filled.seed)
        pieces = check_template([Slot("text", text=text, strength=strength)])
        sheet = lay_out(pieces, self.tokenizer, self.model.config, {}, options.seed or 0, is_open_ended=True)
        canvas, ends = self.model.config.canvas_length, self.model.config.eos_ids
        whole = -(-(sheet.length + 1) // canvas) * canvas
        warm = sheet.warm | dict.fromkeys(range(sheet.length, whole), ends[0])
        ids = self._template_prompt(prompt, sheet)
        options = replace(options, max_tokens=whole, drafts=False)
        done = next(e for e in self.events([ids], options, warm=[warm]) if isinstance(e, Done))
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
        self.model.config.check_canvas("decide")
        if not fields:
            raise InputError("there are no fields to decide; give at least one with its choices")
        tokens: dict[str, list[list[int]]] = {}
        pieces: list[str | Slot] = []
        for name, choices in fields.items():
            is_list = isinstance(choices, (list, tuple)) and all(
                isinstance(choice, str) and choice for choice in choices
            )
            if not is_list or len(choices) < 2 or len(set(choices)) < len(choices):
                raise InputError(
                    f"field {name!r} has the choices {choices!r}; give a list of two or more different texts"
                )
            tokens[name] = [self.tokenizer.encode(f" {choice}") for choice in choices]  # as it stands in a sentence
            pieces += [f"{name}:", Slot(name, length=max(map(len, tokens[name]))), "\n"]
        sheet = lay_out(check_template(pieces), self.tokenizer, self.model.config, {})
        if sheet.length > self.model.config.canvas_length:
            raise CapacityError(
                f"the fields take {sheet.length} tokens and must fit one canvas of {self.model.config.canvas_length}; "
                "ask fewer at a time"
            )
        read: list[Tensor] = []
        options = replace(_of_templates(options), max_steps=steps, t_max=1.0, t_min=1.0)
        options = self._complete_options(replace(options, temperature_steps=None))
        self._denoise([(sheet, [])], prompt, options, lambda rows, logits_BLV: read.append(logits_BLV[0]))
        found = {}
        for place in sheet.places:
            log_p = torch.log_softmax(read[-1][place.start : place.start + place.width].float(), -1)
            choices, after = fields[place.slot.name], sheet.pins[place.start + place.width]
            asked = {token for choice in tokens[place.slot.name] for token in choice} | {after}
            rows = [{token: float(row[token]) for token in asked} for row in log_p]
            rows.append({token: 0.0 for token in asked})
            probabilities = share_out(tokens[place.slot.name], rows, after)
            by_choice = dict(zip(choices, probabilities, strict=True))
            found[place.slot.name] = Decision(max(by_choice, key=by_choice.__getitem__), by_choice)
        return found

    def grammar(self, kind: str, value: Any) -> Grammar:
        """A compiled constraint, kept for the next time: see `constrain.Grammar.compile`."""
        key = kind, repr(value)
        if key not in self._grammars:
            config = self.model.config
            compiled = Grammar.compile(kind, value, self.tokenizer, config.vocab_size, sorted(self._fillers))
            while len(self._grammars) >= GRAMMARS_KEPT:
                self._grammars.pop(next(iter(self._grammars)))
            self._grammars[key] = compiled
        return self._grammars[key]

    @property
    def _fillers(self) -> frozenset[int]:
        """Tokens that end an answer or fill what it leaves."""
        return frozenset((*self.model.config.eos_ids, self.model.config.pad_id))

    def _whole_answer(self, ids: Sequence[int], options: Options) -> list[Span]:
        if options.constraint is None:
            return []
        canvas = self.model.config.canvas_length
        room = (self.model.config.max_position - len(ids)) // canvas * canvas
        if options.max_tokens is not None:
            room = min(room, options.max_tokens)
        return [Span(0, None, self.grammar(*options.constraint).start(room))]

    def _width(self, slot: Slot, grammar: Grammar) -> int:
        return slot.at_most or 2 * grammar.shortest() + 8

    def _sheet(self, pieces: Template, widths: Mapping[str, int], options: Options) -> Sheet:
        return lay_out(pieces, self.tokenizer, self.model.config, widths, options.seed or 0, is_short=options.short)

    def _find_width(
        self, pieces: Template, slot: Slot, widths: dict[str, int], prompt: str | Messages | None, options: Options
    ) -> int:
        """The length that agrees best with the rest, after a few steps in which all candidates are rows of one batch:
        how unsure the model is of the slot's tokens, and how surprised at the fixed ones behind it, in nats a token."""
        sizes = candidates(min(slot.at_most or MOST, self.model.config.canvas_length))
        each = [self._sheet(pieces, widths | {slot.name: size}, options) for size in sizes]
        sheets: list[tuple[Sheet, list[Span]]] = [(sheet, []) for sheet in each]
        length, number = self.model.config.canvas_length, [p.slot.name for p in each[0].places].index(slot.name)
        steps, scores = [0] * len(sizes), [math.inf] * len(sizes)

        def look(rows: list[int], logits_BLV: Tensor) -> None:
            for n, row in enumerate(rows):
                place, first = each[row].places[number], steps[row] // LENGTH_STEPS * length
                steps[row] += 1
                end = place.start + place.width
                behind = [p for p in range(end, end + LENGTH_BEHIND) if p in each[row].pins]
                inside = [
                    p - first for p in (*range(place.start, end), *behind) if 0 <= p - first < logits_BLV.shape[1]
                ]
                if not 0 <= place.start - first < length:
                    continue
                log_p = torch.log_softmax(logits_BLV[n, inside].float(), -1)
                split = sum(p + first < end for p in inside)
                unsure = -(log_p[:split].exp() * log_p[:split]).sum(-1).mean()
                tokens = torch.tensor([each[row].pins[p + first] for p in inside[split:]], device=log_p.device)
                surprise = -log_p[split:].gather(1, tokens[:, None]).mean() if len(tokens) else torch.tensor(0.0)
                scores[row] = float(unsure) + float(surprise)

        quick = replace(options, max_steps=LENGTH_STEPS, confidence=0.0, early=False, short=False)
        self._denoise(sheets, prompt, quick, look)
        return sizes[min(range(len(sizes)), key=lambda row: (scores[row], row))]

    def _denoise(
        self,
        sheets: Sequence[tuple[Sheet, list[Span]]],
        prompt: str | Messages | None,
        options: Options,
        inspect: Callable[[list[int], Tensor], None] | None = None,
    ) -> list[Done]:
        """One row a sheet, to their ends."""
        ids = [self._template_prompt(prompt, sheet) for sheet, _ in sheets]
        plain = replace(options, stop=(), drafts=False)
        each = [replace(plain, max_tokens=sheet.length, min_tokens=sheet.length) for sheet, _ in sheets]
        found: dict[int, Done] = {}
        pins, warm = [sheet.pins for sheet, _ in sheets], [sheet.warm for sheet, _ in sheets]
        canvas, most = self.model.config.canvas_length, self.model.config.max_position
        for tokens, (sheet, _) in zip(ids, sheets, strict=True):
            if len(tokens) + -(-sheet.length // canvas) * canvas > most:
                raise CapacityError(
                    f"the template takes {sheet.length} positions behind {len(tokens)} tokens, beyond the context of "
                    f"{most}; shorten its slots or the text before them"
                )
        control = sorted(self.tokenizer.special_ids)  # a slot is text
        for event in self.events(ids, each, pins, warm, [spans for _, spans in sheets], inspect, control):
            if isinstance(event, Done):
                found[event.row] = event
        return [found[row] for row in range(len(sheets))]

    def _template_prompt(self, prompt: str | Messages | None, sheet: Sheet) -> list[int]:
        """What the first canvas of a sheet stands behind: the prompt, then the sheet's lead."""
        if sheet.beyond and self.template is not None and not isinstance(prompt, str):
            hint = f"The text goes on later with:\n\n{sheet.beyond}"
            prompt = [*(prompt or [{"role": "user", "content": "Write the text."}])]
            prompt[-1] = {**prompt[-1], "content": f"{prompt[-1]['content']}\n\n{hint}"}
        return [*self.encode(prompt or ""), *sheet.lead]

    def forget(self) -> None:
        """Free the cache of the last conversation."""
        self._kept = None

    def _complete(self, prompts: list[list[int]], options: Options) -> list[Completion]:
        found: dict[int, Completion] = {}
        for event in self.events(prompts, replace(options, drafts=False)):
            if isinstance(event, Done):
                found[event.row] = Completion(
                    event.text,
                    event.tokens,
                    event.finish_reason,
                    event.usage,
                    event.seed,
                    event.logprobs,
                    stop=event.stop,
                )
        return [found[row] for row in range(len(prompts))]

    def _complete_options(self, options: Options) -> Options:
        if options.constraint is not None:
            self.model.config.check_canvas(options.constraint[0])
        seed = secrets.randbits(32) if options.seed is None else options.seed
        return replace(options.with_defaults(self.defaults), seed=seed)

    def _continue(self, prompts: Sequence[Sequence[int]]) -> KVCache | None:
        """The kept cache, cut back to what it has in common with the prompt, if that is anything."""
        kept, self._kept = self._kept, None
        if kept is None or len(prompts) != 1:
            return None
        shared = 0
        for ours, theirs in zip(kept.tokens, prompts[0][:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        if not shared or not kept.cache.can_truncate(0, shared):
            return None
        kept.cache.truncate_(0, shared)
        return kept.cache

    def _before_eos(self, tokens: list[int]) -> list[int]:
        ends = [n for n, token in enumerate(tokens) if token in self.model.config.eos_ids]
        return tokens[: ends[0]] if ends else tokens


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
    return replace(options, strict=False, grammar=calls.grammar(tools)) if options.strict and tools else options


def _of_templates(options: Options) -> Options:
    """InputError for an option that means nothing where a template says what is written."""
    for name in ("max_tokens", "min_tokens", "stop", "mode", "logprobs", "strict", "thinking", *KINDS):
        if getattr(options, name) != getattr(Options, name):
            raise InputError(f"{name} does not apply to a template, whose slots say what is written; leave it out")
    return options


class _Reader:
    """The text of one row as it grows: looks for stop strings, and holds back what may be the beginning of one."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._detokeniser = Detokeniser(tokenizer)
        self._stops = stops
        self._longest = max((len(stop) for stop in stops), default=0)
        self._given = 0
        self.text = ""
        self.found: str | None = None

    def push(self, tokens: list[int]) -> int | None:
        """Take new tokens; the number of them that stand before a stop string, None where there is none."""
        for n, token in enumerate(tokens):
            start = len(self.text)
            self.text += self._detokeniser.push([token])
            hits = [(at, s) for s in self._stops if (at := self.text.find(s, max(0, start - self._longest + 1))) >= 0]
            if hits:
                at, self.found = min(hits)
                self.text = self.text[:at]
                return n if at <= start else n + 1
        return None

    def take(self, is_over: bool) -> str:
        """The text that is certain and was not given yet."""
        if is_over and self.found is None:
            self.text += self._detokeniser.flush()
        end = len(self.text)
        if not is_over:
            held = (
                size
                for size in range(min(self._longest - 1, end), 0, -1)
                if any(stop.startswith(self.text[end - size :]) for stop in self._stops)
            )
            end -= next(held, 0)
        piece, self._given = self.text[self._given : end], max(end, self._given)
        return piece
