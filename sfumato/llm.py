"""LLM: text in, text out. Loads a model with its tokenizer and chat template, and carries out plans on its engine.

The methods of an answer are `templates.interface`'s, which build queries; `templates.plans` says what a query asks of
the engine. Multi-turn chats reuse what is already encoded: the cache of the last single request is kept, and a new
prompt that begins the same way continues from there. A model takes one step at a time, under a lock, so that several
threads may call it, each with a run of its own; what is awaited shares one batch, in a thread of its own.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import torch

from sfumato.checkpoints.calibration import read_calibration
from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.contents import calibration_of, generation_of, purpose_of, tokenizer_folder, tokenizer_of
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.load import load
from sfumato.checkpoints.locate import resolve
from sfumato.display.loading import loading_bar
from sfumato.engine import arguments
from sfumato.engine.job_thread import JobThread
from sfumato.engine.kept import NOTHING, EngineKeeper
from sfumato.engine.limits import BatchLimits
from sfumato.engine.plan import Ask, Change, Plan, PlanEnd, advance
from sfumato.engine.request import Request
from sfumato.engine.run import Run
from sfumato.errors import InputError
from sfumato.events import Completion, Done, Draft, Event
from sfumato.model.adapters import Adapters
from sfumato.model.network import Model
from sfumato.model.prompt import Prompt
from sfumato.model.purpose import Purpose
from sfumato.options import LoadOptions, Options, OptionsLike
from sfumato.remote import Remote
from sfumato.system.fair import FairLock
from sfumato.templates.adapters import ModelAdapters
from sfumato.templates.interface import NONE, LanguageModel
from sfumato.templates.plans import Planner
from sfumato.templates.requests import AnswerQuery, ChatPrompt, QueryFor, Result, Tools
from sfumato.text.template import CHILDREN, ChatTemplate
from sfumato.text.tokenizer import Tokenizer

Notice = Callable[[str], None]
"""Called with a sentence about each thing that loading leaves aside, and about where weights lie."""

LoadProgress = Callable[[int, int], None]
"""Called with (bytes loaded, bytes in all)."""

MOST_WAITING = 1 << 20
"""Queries that may wait in the batch of what is awaited."""


@dataclass(eq=False)
class _ModelPlans:
    """What makes plans for a batch: a model and its planner, without the `LLM`, which is freed when nobody holds it."""

    model: Model
    planner: Planner
    bank: Adapters

    def plan(self, query: QueryFor[Any]) -> Plan[Any]:
        return self.planner.plan(query)

    def must_compile(self, query: QueryFor[Any]) -> bool:
        return self.planner.must_compile(query)


class LLM(LanguageModel):
    """A loaded model. `LLM.load` makes one; `defaults` are the checkpoint's own values for options left open.

    Several threads may use it: they take turns, a step each. `with LLM.load(…) as llm:` frees the model at the end."""

    has_token_ids = True
    """Whether results carry token ids beside the text: always."""
    is_remote = False
    """Whether the model runs in another process or machine.

    Here False: the engine stands still while the caller handles an event."""

    def __new__(cls, model: object = None, *rest: object, **named: object) -> Self:
        """InputError for whoever gives a checkpoint's name, as other libraries take it, instead of a network."""
        arguments.check_kind("the model", model, Model, "a network; LLM.load(…) loads a checkpoint")
        return super().__new__(cls)

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        defaults: Mapping[str, Any] | None = None,
        name: str = "",
        purpose: Purpose | None = None,
    ) -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, name
        length = {} if purpose is None or purpose.max_tokens is None else {"max_tokens": purpose.max_tokens}
        self.defaults = length | dict(defaults or {})
        self.purpose = purpose
        """What the model is for, where it is for one thing alone."""
        self.bank = Adapters(model)
        """Where adapters lie beside the weights; `adapters` changes it."""
        self.planner = Planner(model.config, tokenizer, template, self.defaults, name, self.bank)
        self.has_drafts = model.config.is_diffusion
        """Whether the model has a canvas, so that answers can come with a draft of every step."""
        self._model: Model | None = model
        self._engines = EngineKeeper()
        self._lock = FairLock()
        """Held for every step of the model."""
        self._jobs: JobThread[QueryFor[Any]] = JobThread(BatchLimits(queue=MOST_WAITING), self._lock)
        self.adapters = ModelAdapters(self.planner, self._lock, (self._engines.forget, self._jobs.forget))
        """The adapters that are loaded: their `names`, which `Options.adapter` may have; `load` and `unload`."""

    @classmethod
    def load(
        cls,
        path: str | Path = "nano",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        ops: str = "auto",
        quantize: str | None = None,
        notice: Notice | None = None,
        progress: LoadProgress | bool | None = None,
        memory_limit: int | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        calibration: str | Path | None = None,
    ) -> LLM:
        """Load a model with its tokenizer and chat template.

        `path` is a checkpoint folder in any known format, a .gguf file, a hub id ("owner/name"), or "nano", the model
        inside this package. `device` "auto" is a GPU where there is one. `dtype` None, or "auto", keeps the
        checkpoint's own. `ops` "auto" takes the fastest operations for device, dtype and formats. `quantize` packs
        weights to fewer bits while they are loaded, by a recipe: "int8", "fp8", "int4", "int4-fp8", "nvfp4",
        "int4-small"; a quantised checkpoint needs no such word. `memory_limit`, bytes of weights on the device, streams
        the rest from the host. `adapters` are folders of adapters by the names that `Options.adapter` then may have, as
        in `{"mine": "run/adapter"}`; `llm.adapters` loads more. `calibration` is a file of `sfumato calibrate`; None is
        the one beside the checkpoint, if it has one. `notice` is called with a sentence about each thing that is left
        aside, and about where weights lie; `progress` with (bytes loaded, bytes in all). Without a `progress` a bar is
        drawn on a terminal and in a notebook, where loading takes a while; `progress=False` draws none.

        CheckpointError names what is wrong with a file, InputError what is wrong with an argument, CapacityError a
        limit that is too low."""
        place = str(device) if isinstance(device, torch.device) else device
        name = str(dtype) if isinstance(dtype, torch.dtype) else dtype
        options = LoadOptions(path, place, name, ops, quantize, memory_limit, adapters, calibration)
        return cls.open(options, notice=notice, progress=True if progress is None else progress)

    @classmethod
    def open(
        cls,
        options: LoadOptions,
        *,
        notice: Notice | None = None,
        progress: LoadProgress | bool | None = None,
    ) -> LLM:
        """The same as `load`, from one value. A bar is drawn with `progress=True` alone."""
        arguments.check_kind("the options", options, LoadOptions, "a LoadOptions")
        for what, function in ("notice", notice), ("progress", progress):
            if not (function is None or callable(function) or (what == "progress" and isinstance(function, bool))):
                raise InputError(f"{what} is {function!r}; give a function", option=what)
        bar = loading_bar() if progress is True else None
        try:
            CHILDREN.start()  # it reads the template, while this process reads the rest
            checkpoint = open_checkpoint(resolve(options.model))
            return cls.of(checkpoint, options, notice=notice, progress=progress if callable(progress) else bar)
        finally:
            if bar is not None:
                bar.close()

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        options: LoadOptions,
        *,
        notice: Notice | None = None,
        progress: LoadProgress | None = None,
    ) -> LLM:
        """The model of a checkpoint that is open; `options.model` is only its name."""
        place = options.calibration
        calibration = calibration_of(checkpoint) if place is None else read_calibration(Path(place).expanduser())
        tokenizer, template = _tokenizer_and_template(checkpoint)
        model = load(checkpoint, options, notice=notice, progress=progress)
        defaults, _ = generation_of(checkpoint)
        llm = cls(model, tokenizer, template, defaults, str(options.model), purpose_of(checkpoint))
        llm.planner.calibration = calibration
        for adapter, folder in (options.adapters or {}).items():
            llm.adapters.load(adapter, folder)
        return llm

    @classmethod
    def connect(cls, url: str, api_key: str | None = None, model: str | None = None) -> Remote:
        """The model of a server at `url`, Sfumato's or any with OpenAI's API: see `Remote`."""
        return Remote(url, api_key, model)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an LLM can be neither pickled nor copied; load it in each process, or serve it and connect")

    def __repr__(self) -> str:
        name = self.name or "unnamed"
        if self._model is None:
            return f"<LLM {name}, closed>"
        config, canvas = self._model.config, ""
        if config.is_diffusion:
            canvas = f", canvas of {config.canvas_length}"
        dtype = str(self._model.dtype).removeprefix("torch.")
        return f"<LLM {name}, {dtype} on {self._model.device}, {self._model.ops.name} operations{canvas}>"

    # ---- options, and what is kept ----------------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """The network. InputError after `close`."""
        if self._model is None:
            raise InputError(f"the model {self.name or 'of this LLM'} is closed; load it again".replace("  ", " "))
        return self._model

    @model.setter
    def model(self, model: Model) -> None:
        self._model = model
        self.bank = self.planner.bank = Adapters(model)
        self._jobs.forget()

    def check(self, options: Options, is_chat: bool = True) -> None:
        """InputError if `options` is not an `Options`. `is_chat` matters to `Remote` alone."""
        arguments.check_options(options)

    def forget(self) -> None:
        """Free what the last call left: the cache of its conversation, and the steps that were recorded for it."""
        self._engines.forget()
        self._jobs.forget()

    def close(self) -> None:
        """Free the model: its weights, caches, threads and mapped files.

        What is asked of it afterwards is an InputError, and so is what other threads have under way, after its step."""
        if self._model is None:
            return
        with self._lock:
            self._model = None
            self.bank.close()
        self._jobs.close(InputError(f"the model {self.name} was closed while it answered; load it again"))
        self._engines.forget()
        gc.collect()  # what refers to itself in a circle would keep files mapped

    # ---- answers ----------------------------------------------------------------------------------------------------

    def run(self, query: QueryFor[Result]) -> Result:
        """Carry out any query (`templates.requests`) and return its result."""
        result: Result = _result_of(self._carry_out(self.plan(query)))
        return result

    def outcomes(self, query: QueryFor[Result]) -> Iterator[Draft | Result]:
        """Carry out any query: its drafts, where its options ask for them (`drafts=True`), and last its result.

        So an edit or a template is watched: `for outcome in llm.outcomes(Edit(text, "…", options=…))`. Closing the
        iterator ends the work."""
        return self._carry_out(self.plan(query))

    def encode(self, prompt: ChatPrompt, *, tools: Tools | None = None, thinking: bool = False) -> Prompt:
        """A prompt in tokens: plain text behind the begin-of-text token, or messages through the chat template."""
        if isinstance(prompt, Mapping):
            prompt = [prompt]
        if not isinstance(prompt, str):
            arguments.check_messages("the prompt", prompt)
        arguments.check_tools(tools)
        self._check_open()
        return self.planner.prompts.encode(prompt, tools, thinking)

    def events(
        self,
        prompts: Sequence[Sequence[int] | Prompt],
        *,
        options: OptionsLike | Sequence[OptionsLike] = NONE,
        pins: Sequence[Mapping[int, int]] | None = None,
    ) -> Iterator[Event]:
        """Events with text for a batch of prompts (or token ids), with positions of the answers that stay fixed."""
        arguments.check_kind("the prompts", prompts, (list, tuple), "a list of prompts, each a list of token ids")
        each = [options] * len(prompts) if isinstance(options, Options | Mapping) else options
        places = [{}] * len(prompts) if pins is None else pins
        for name, values in ("options", each), ("pins", places):
            arguments.check_kind(name, values, (list, tuple), f"a list, one for each of {len(prompts)} prompts")
            if len(values) != len(prompts):
                raise InputError(f"{len(prompts)} prompts came with {len(values)} {name}; give one for each prompt")
        for prompt in prompts:
            ids = prompt.tokens if isinstance(prompt, Prompt) else prompt
            arguments.check_ids("a prompt", ids, self.model.config.vocab_size)
        rows = zip(map(Prompt.of, prompts), [arguments.options_of(one, {}) for one in each], places, strict=True)
        return self._events([self.planner.ask(Request(ids, o, pins=fixed)) for ids, o, fixed in rows])

    # ---- plans ------------------------------------------------------------------------------------------------------

    def plan(self, query: QueryFor[Any]) -> Plan[Any]:
        """The plan of a query: see `Planner.plan`."""
        self._check_open()
        return self.planner.plan(query)

    def must_compile(self, query: QueryFor[Any]) -> bool:
        """Whether a query holds a constraint that is not compiled yet, which may take seconds."""
        return self.planner.must_compile(query)

    def _stream(self, query: AnswerQuery) -> Iterator[Event]:
        self._check_open()
        return self._events([self.planner.ask_answer(query)])

    def _answers(self, queries: Sequence[AnswerQuery]) -> list[Completion]:
        return _result_of(self._carry_out(self.planner.answers(queries)))

    def _begin(self, query: QueryFor[Any], listener: Callable[[Any], None]) -> Callable[[], None]:
        return self._jobs.begin(query, _ModelPlans(self.model, self.planner, self.bank), listener)

    def _check_open(self) -> None:
        """InputError after `close`."""
        _ = self.model

    def _carry_out(self, plan: Plan[Result]) -> Iterator[Draft | Result]:
        """Run a plan's requests on this caller's engine: their drafts, and last the plan's result."""
        asks = advance(plan)
        while not isinstance(asks, PlanEnd):
            endings: dict[int, Done] = {}
            for event in self._events(asks):
                if isinstance(event, Draft):
                    yield event
                elif isinstance(event, Done):
                    endings[event.row] = event
            asks = advance(plan, [endings[row] for row in range(len(asks))])
        if not isinstance(asks.result, Change):
            yield asks.result
            return
        with self._lock:
            self._check_open()
            changed: Result = asks.result.carry_out()
        yield changed

    def _events(self, asks: list[Ask]) -> Iterator[Event]:
        rows = [ask.row(self.model.config, str(n), f"prompt {n}") for n, ask in enumerate(asks)]
        engine = self._engines.take(self.model, [row.reusable for row in rows])
        try:
            run = Run(self.model, rows, engine=engine)
        except InputError:  # refused before any work
            if engine is not None:
                self._engines.put_back(engine)
            raise
        try:
            for event in self._turns(run):
                yield asks[event.row].reader.with_text(event)
        except GeneratorExit:  # the caller stopped reading
            self._engines.put_back(run.engine)
            raise
        row, encoded = run.rows[0], run.cache.lengths[0]
        conversation = row.prompt.extended(row.tokens).first(encoded)
        is_whole = len(asks) == 1 and len(conversation) == encoded
        self._engines.put_back(run.engine, conversation if is_whole else NOTHING)

    def _turns(self, run: Run) -> Iterator[Event]:
        """The events of a run, each of whose steps is taken when no other thread takes one."""
        turns = run.turns()
        while True:
            with self._lock:
                self._check_open()
                events = next(turns, None)
            if events is None:
                return
            yield from events


def _result_of(outcomes: Iterator[Draft | Result]) -> Result:
    """What comes last; no draft is kept."""
    last: Any = deque(outcomes, maxlen=1).pop()
    result: Result = last
    return result


def _tokenizer_and_template(checkpoint: Checkpoint) -> tuple[Tokenizer, ChatTemplate | None]:
    """Tokenizer and chat template, from within the file or from the files beside it."""
    vocabulary = checkpoint.vocabulary
    if vocabulary is not None:
        tokenizer, folder = tokenizer_of(vocabulary), checkpoint.path.parent
        if vocabulary.template is not None:
            return tokenizer, ChatTemplate(vocabulary.template, tokenizer.special)
        has_template = (folder / "chat_template.jinja").exists()
        return tokenizer, ChatTemplate.from_folder(folder, tokenizer.special) if has_template else None
    folder = tokenizer_folder(checkpoint)
    tokenizer = Tokenizer.from_folder(folder)
    has_template = any((folder / name).exists() for name in ("chat_template.jinja", "tokenizer_config.json"))
    return tokenizer, ChatTemplate.from_folder(folder, tokenizer.special) if has_template else None
