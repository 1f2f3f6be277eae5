"""LLM: text in, text out. Loads a model with its tokenizer and chat template, and carries out plans on its engine.

Each method builds a query; `templates.plans` says what it asks of the engine. Multi-turn chats reuse what is already
encoded: the cache of the last single request is kept, and a new prompt that begins the same way continues from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch

from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.contents import generation_of, purpose_of, tokenizer_of
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.load import load
from sfumato.checkpoints.locate import resolve
from sfumato.engine import arguments
from sfumato.engine.kept import NOTHING, EngineKeeper
from sfumato.engine.plan import Ask, Plan, PlanEnd, advance
from sfumato.engine.request import Request
from sfumato.engine.run import Run
from sfumato.errors import CheckpointError, InputError
from sfumato.events import Completion, Decision, Done, Edited, Event, Filled
from sfumato.model.network import Model
from sfumato.model.prompt import Prompt
from sfumato.model.purpose import Purpose
from sfumato.options import LoadOptions, Options
from sfumato.remote import Remote
from sfumato.templates.plans import Planner
from sfumato.templates.requests import (
    AnswerQuery,
    Chat,
    Complete,
    Decide,
    Edit,
    Fill,
    Infill,
    Messages,
    QueryFor,
    Result,
    Tools,
)
from sfumato.templates.slots import Template
from sfumato.text.template import CHILDREN, ChatTemplate
from sfumato.text.tokenizer import Tokenizer

Notice = Callable[[str], None]
"""Called with a sentence about each thing that loading leaves aside, and about where weights lie."""

LoadProgress = Callable[[int, int], None]
"""Called with (bytes loaded, bytes in all)."""


class LLM:
    """A loaded model. `LLM.load` makes one; `defaults` are the checkpoint's own values for options left open."""

    has_token_ids: bool = True
    """Whether results carry token ids beside the text: always."""
    is_remote: bool = False
    """Whether the model runs in another process or machine.

    Here False: the engine stands still while the caller handles an event."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        defaults: Mapping[str, Any] | None = None,
        name: str = "",
        purpose: Purpose | None = None,
    ) -> None:
        self.model, self.tokenizer, self.template, self.name = model, tokenizer, template, name
        length = {} if purpose is None or purpose.max_tokens is None else {"max_tokens": purpose.max_tokens}
        self.defaults = length | dict(defaults or {})
        self.purpose = purpose
        """What the model is for, where it is for one thing alone."""
        self.planner = Planner(model.config, tokenizer, template, self.defaults, name)
        self.has_drafts = model.config.is_diffusion
        """Whether the model has a canvas, so that answers can come with a draft of every step."""
        self._engines = EngineKeeper()

    @classmethod
    def load(
        cls,
        path: str | Path = "nano",
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        ops: str = "auto",
        quantize: str | None = None,
        notice: Notice | None = None,
        progress: LoadProgress | None = None,
        memory_limit: int | None = None,
    ) -> LLM:
        """Load a model with its tokenizer and chat template.

        `path` is a checkpoint folder in any known format, a .gguf file, a hub id ("owner/name"), or "nano", the model
        inside this package. `device` "auto" is a GPU where there is one. `dtype` None keeps the checkpoint's own.
        `ops` "auto" takes the fastest operations for device, dtype and formats. `quantize` packs weights to fewer bits
        while they are loaded, by a recipe: "int8", "fp8", "int4", "int4-fp8", "nvfp4", "int4-small"; a quantised
        checkpoint needs no such word. `memory_limit`, bytes of weights on the device, streams the rest from the host.
        `notice` is called with a sentence about each thing that is left aside, and about where weights lie; `progress`
        with (bytes loaded, bytes in all).

        CheckpointError names what is wrong with a file, InputError what is wrong with an argument, CapacityError a
        limit that is too low."""
        name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
        options = LoadOptions(path, device, name, ops, quantize, memory_limit)
        return cls.open(options, notice=notice, progress=progress)

    @classmethod
    def open(cls, options: LoadOptions, *, notice: Notice | None = None, progress: LoadProgress | None = None) -> LLM:
        """The same as `load`, from one value."""
        CHILDREN.start()  # it reads the template, while this process reads the rest
        checkpoint = open_checkpoint(resolve(options.model))
        tokenizer, template = _tokenizer_and_template(checkpoint)
        model = load(checkpoint, options, notice=notice, progress=progress)
        defaults, _ = generation_of(checkpoint)
        return cls(model, tokenizer, template, defaults, str(options.model), purpose_of(checkpoint))

    @classmethod
    def connect(cls, url: str, api_key: str | None = None, model: str | None = None) -> Remote:
        """The model of a server at `url`, Sfumato's or any with OpenAI's API: see `Remote`."""
        return Remote(url, api_key, model)

    # ---- options, and what is kept ----------------------------------------------------------------------------------

    def check(self, options: Options, is_chat: bool = True) -> None:
        """InputError if `options` is not an `Options`. `is_chat` matters to `Remote` alone."""
        arguments.check_options(options)

    def forget(self) -> None:
        """Free what the last call left: the cache of its conversation, and the steps that were recorded for it."""
        self._engines.forget()

    # ---- answers ----------------------------------------------------------------------------------------------------

    def run(self, query: QueryFor[Result]) -> Result:
        """Carry out any query (`templates.requests`) and return its result."""
        result: Result = self._carry_out(self.planner.plan(query))
        return result

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
        completions = self._carry_out(self.planner.answers([Complete(text, options) for text in texts]))
        return completions[0] if isinstance(prompt, str) else completions

    def chat(
        self,
        messages: Messages,
        tools: Tools | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Completion:
        """Answer a conversation; thought and tool calls are told apart from the answer's text."""
        arguments.check_options(options)
        return self.run(Chat(messages, tools, replace(options, drafts=False)))

    def stream(
        self,
        prompt: str | Messages | Sequence[int] | Prompt,
        options: Options = Options(),  # noqa: B008 - frozen
        tools: Tools | None = None,
    ) -> Iterator[Event]:
        """The events of one answer: Draft (if options.drafts), Commit, Done.

        A string (or token ids, or a `Prompt`) is continued, messages are answered, and then thoughts and tool calls are
        told apart from the text. The texts of the Commits joined are the text of Done."""
        return self._events([self.planner.ask_answer(_answer_to(prompt, tools, options))])

    def encode(self, prompt: str | Messages, tools: Tools | None = None, thinking: bool = False) -> Prompt:
        """A prompt in tokens: plain text behind the begin-of-text token, or a conversation through the template."""
        return self.planner.prompts.encode(prompt, tools, thinking)

    def events(
        self,
        prompts: Sequence[Sequence[int] | Prompt],
        options: Options | Sequence[Options] = Options(),  # noqa: B008 - frozen
        pins: Sequence[Mapping[int, int]] | None = None,
    ) -> Iterator[Event]:
        """Events with text for a batch of prompts (or token ids), with positions of the answers that stay fixed."""
        arguments.check_kind("the prompts", prompts, (list, tuple), "a list of prompts, each a list of token ids")
        each = [options] * len(prompts) if isinstance(options, Options) else options
        places = [{}] * len(prompts) if pins is None else pins
        for name, values in ("options", each), ("pins", places):
            arguments.check_kind(name, values, (list, tuple), f"a list, one for each of {len(prompts)} prompts")
            if len(values) != len(prompts):
                raise InputError(f"{len(prompts)} prompts came with {len(values)} {name}; give one for each prompt")
        for prompt in prompts:
            ids = prompt.tokens if isinstance(prompt, Prompt) else prompt
            arguments.check_ids("a prompt", ids, self.model.config.vocab_size)
        rows = zip(map(Prompt.of, prompts), each, places, strict=True)
        return self._events([self.planner.ask(Request(ids, o, pins=fixed)) for ids, o, fixed in rows])

    # ---- templates --------------------------------------------------------------------------------------------------

    def fill(
        self,
        template: Template,
        prompt: str | Messages | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Filled:
        """Fill the slots of a template: fixed texts and `Slot`s, filled jointly; fixed text stays byte for byte.

        `prompt` is what the template answers: messages through the chat template, or a text that it continues; None:
        it stands alone. InputError for a template or constraint that cannot be, CapacityError for one with no room."""
        return self.run(Fill(template, prompt, options))

    def infill(
        self,
        prefix: str,
        suffix: str,
        length: int | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
        at_most: int | None = None,
    ) -> Filled:
        """Write what stands between two texts, in `length` tokens; None finds the length, up to `at_most` (64)."""
        return self.run(Infill(prefix, suffix, length, at_most, options))

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
        return self.run(Edit(text, instruction, spans, strength, options))

    def decide(
        self,
        prompt: str | Messages,
        fields: Mapping[str, Sequence[str]],
        steps: int = 1,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> dict[str, Decision]:
        """Answer questions with given choices: field -> choices in, field -> likeliest choice and probabilities out.

        All fields stand on one canvas as "field: choice" lines and are read in one denoise pass (`steps` of them)."""
        return self.run(Decide(prompt, fields, steps, options))

    # ---- plans ------------------------------------------------------------------------------------------------------

    def plan(self, query: QueryFor[Any]) -> Plan[Any]:
        """The plan of a query: see `Planner.plan`."""
        return self.planner.plan(query)

    def must_compile(self, query: QueryFor[Any]) -> bool:
        """Whether a query holds a constraint that is not compiled yet, which may take seconds."""
        return self.planner.must_compile(query)

    def _carry_out(self, plan: Plan[Result]) -> Result:
        """Run a plan's requests on this caller's engine."""
        asks = advance(plan)
        while not isinstance(asks, PlanEnd):
            endings = {event.row: event for event in self._events(asks) if isinstance(event, Done)}
            asks = advance(plan, [endings[row] for row in range(len(asks))])
        return asks.result

    def _events(self, asks: list[Ask]) -> Iterator[Event]:
        rows = [ask.row(self.model.config, str(n), f"prompt {n}") for n, ask in enumerate(asks)]
        engine = self._engines.take(self.model, [row.prompt for row in rows])
        try:
            run = Run(self.model, rows, engine=engine)
        except InputError:  # refused before any work
            if engine is not None:
                self._engines.put_back(engine)
            raise
        try:
            for event in run:
                yield asks[event.row].reader.with_text(event)
        except GeneratorExit:  # the caller stopped reading
            self._engines.put_back(run.engine)
            raise
        row, encoded = run.rows[0], run.cache.lengths[0]
        conversation = row.prompt.extended(row.tokens).first(encoded)
        is_whole = len(asks) == 1 and len(conversation) == encoded
        self._engines.put_back(run.engine, conversation if is_whole else NOTHING)


def _tokenizer_and_template(checkpoint: Checkpoint) -> tuple[Tokenizer, ChatTemplate | None]:
    """Tokenizer and chat template, from within the file or from the files beside it."""
    vocabulary, folder = checkpoint.vocabulary, checkpoint.path
    if vocabulary is not None:
        tokenizer = tokenizer_of(vocabulary)
        template = vocabulary.template
        return tokenizer, None if template is None else ChatTemplate(template, tokenizer.special)
    if folder.is_file():
        raise CheckpointError(f"{folder} carries no tokenizer; convert it from a checkpoint that has one")
    tokenizer = Tokenizer.from_folder(folder)
    has_template = any((folder / name).exists() for name in ("chat_template.jinja", "tokenizer_config.json"))
    return tokenizer, ChatTemplate.from_folder(folder, tokenizer.special) if has_template else None


def _answer_to(prompt: Any, tools: Tools | None, options: Options) -> AnswerQuery:
    """The query for a prompt of any kind: what is neither text nor token ids is taken as a conversation."""
    is_ids = isinstance(prompt, (list, tuple)) and bool(prompt) and not isinstance(prompt[0], Mapping)
    return Complete(prompt, options) if isinstance(prompt, (str, Prompt)) or is_ids else Chat(prompt, tools, options)
