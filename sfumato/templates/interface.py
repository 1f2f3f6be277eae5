"""What a model offers, wherever it runs: `LLM` loads one into this process, `Remote` speaks to a server.

Each method builds a query; how a query is carried out is all that the two say themselves. The command line is written
against this class alone. Nothing here imports torch.
"""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, overload

from sfumato.display.canvas import CanvasDisplay
from sfumato.engine import arguments
from sfumato.errors import InputError
from sfumato.events import Completion, Decisions, Done, Draft, Edited, Event, Filled, Scored
from sfumato.model.prompt import Prompt
from sfumato.model.purpose import Purpose
from sfumato.options import OPTIONS, OptionFields, Options, OptionsLike
from sfumato.questions import Question
from sfumato.templates.checks import check_query
from sfumato.templates.outcomes import outcomes_of, result_of_query, results_of
from sfumato.templates.requests import (
    AnswerQuery,
    Chat,
    ChatPrompt,
    Complete,
    Decide,
    Edit,
    Fill,
    Infill,
    Likelihood,
    Messages,
    QueryFor,
    Result,
    Think,
    Tools,
)
from sfumato.templates.slots import Template

NONE = Options()
"""No option set."""


Kind = TypeVar("Kind", bound=type)


def names_options(kind: Kind) -> Kind:
    """Decorate a class: the signatures of its methods name the options behind `**more`.

    So `help` shows them, and an interactive Python completes `llm.chat("…", max_` at the Tab key."""
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
        for name, option in OPTIONS.items()
    ]
    for method in filter(inspect.isfunction, vars(kind).values()):
        signature = inspect.signature(method)
        if "more" in signature.parameters:
            own = [one for one in signature.parameters.values() if one.name != "more"]
            method.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return kind


@names_options
class LanguageModel(ABC):
    """A model that answers queries: by a method each, or any of them through `run`.

    Wherever a conversation is taken, it is a text (one user message), one message, or a list of messages. `options` is
    an `Options` or a dict of some of them; each can also be given by its name (`max_tokens=50`), which wins. Every
    method raises InputError for an argument that is wrong and CapacityError for one that is too large."""

    name: str
    """What the model is called."""
    has_drafts: bool
    """Whether the model has a canvas, so that answers can come with a draft of every step."""
    has_token_ids: bool
    """Whether results carry token ids beside the text."""
    is_remote: bool
    """Whether the model runs in another process or machine, so that it works on while the caller handles an event."""
    purpose: Purpose | None
    """What the model is for, where it is for one thing alone."""

    # ---- what each says itself --------------------------------------------------------------------------------------

    @abstractmethod
    def check(self, options: Options, is_chat: bool = True) -> None:
        """Refuse options that this model can never take: InputError names the option."""

    @abstractmethod
    def forget(self) -> None:
        """Free what is kept of the last conversation."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; what is asked of the model afterwards is an InputError. A `with` statement does it."""

    @abstractmethod
    def run(self, query: QueryFor[Result]) -> Result:
        """Carry out any query (`sfumato.Chat`, `Complete`, `Fill`, …) and return its result."""

    @abstractmethod
    def _stream(self, query: AnswerQuery) -> Iterator[Event]:
        """The events of an answer."""

    @abstractmethod
    def _answers(self, queries: Sequence[AnswerQuery]) -> list[Completion]:
        """Several answers together."""

    @abstractmethod
    def _begin(self, query: QueryFor[Any], listener: Callable[[Any], None]) -> Callable[[], None]:
        """Begin a query in another thread: see `outcomes.Begin`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- answers ----------------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: ChatPrompt,
        *,
        tools: Tools | None = None,
        options: OptionsLike = NONE,
        **more: Unpack[OptionFields],
    ) -> Completion:
        """Answer a conversation: `chat("Why is the sky blue?", max_tokens=200, seed=1)`.

        Every field of `Options` can be given by its name. Thought and tool calls are told apart from the text."""
        return self.run(Chat(messages, tools, _without_drafts(options, more)))

    def chat_many(
        self,
        conversations: Sequence[ChatPrompt],
        *,
        tools: Tools | None = None,
        options: OptionsLike = NONE,
        **more: Unpack[OptionFields],
    ) -> list[Completion]:
        """Answer several conversations, which run together; with the same seeds the answers are those of `chat`."""
        expected = "a list of conversations, each a text, a message or a list of messages"
        arguments.check_list("conversations", conversations, expected)
        chosen = _without_drafts(options, more)
        queries = [Chat(conversation, tools, chosen) for conversation in conversations]
        for query in queries:  # before the first of them runs
            check_query(query)
        return results_of(self._begin, queries)

    @overload
    def complete(self, prompt: str, *, options: OptionsLike = ..., **more: Unpack[OptionFields]) -> Completion: ...
    @overload
    def complete(
        self, prompt: list[str], *, options: OptionsLike = ..., **more: Unpack[OptionFields]
    ) -> list[Completion]: ...
    def complete(
        self, prompt: str | list[str], *, options: OptionsLike = NONE, **more: Unpack[OptionFields]
    ) -> Completion | list[Completion]:
        """Continue plain text, without a chat template: `complete("Once upon a time", max_tokens=50)`.

        Every field of `Options` can be given by its name. The texts of a list run together, and come back as a list."""
        queries = _continuations(prompt, _without_drafts(options, more))
        return self.run(queries[0]) if isinstance(prompt, str) else self._answers(queries)

    def stream(
        self,
        prompt: ChatPrompt | AnswerQuery | Sequence[int] | Prompt,
        *,
        tools: Tools | None = None,
        options: OptionsLike = NONE,
        **more: Unpack[OptionFields],
    ) -> Iterator[Event]:
        """The events of one answer, for `for event in llm.stream("…")`: Draft (with `drafts=True`), Commit, Done.

        A conversation is answered, as by `chat`: a text is one user message. `stream(Complete("…"))` continues a text;
        token ids and a `Prompt` are continued too. The texts of the Commits joined are the text of Done. Closing the
        iterator ends the answer."""
        return self._stream(_answer_to(prompt, tools, options, more))

    def watch(
        self,
        prompt: ChatPrompt | AnswerQuery,
        *,
        delay: float = 0.0,
        tools: Tools | None = None,
        options: OptionsLike = NONE,
        **more: Unpack[OptionFields],
    ) -> Completion:
        """Answer as `stream` does, with the canvas denoising live in a notebook; InputError where none runs.

        A pause of `delay` seconds after each frame lets an eye follow."""
        query = _answer_to(prompt, tools, options, more)
        display = CanvasDisplay()
        drafts = self.has_drafts and query.options.mode != "autoregressive"
        for event in self._stream(replace(query, options=replace(query.options, drafts=drafts))):
            display.show(event)
            if isinstance(event, Draft):
                time.sleep(delay)
            elif isinstance(event, Done):
                done = event
        return Completion.of(done)

    # ---- templates --------------------------------------------------------------------------------------------------

    def fill(
        self,
        template: Template,
        prompt: str | Mapping[str, Any] | Messages | None = None,
        *,
        options: OptionsLike = NONE,
        **more: Unpack[OptionFields],
    ) -> Filled:
        """Fill the slots of a template: fixed texts and `Slot`s, filled jointly; fixed text stays byte for byte.

        `prompt` is what the template answers: messages through the chat template, or a text that it continues; None:
        it stands alone. InputError for a template or constraint that cannot be, CapacityError for one with no room."""
        return self.run(Fill(template, _in_list(prompt), arguments.options_of(options, more)))

    def infill(
        self,
        prefix: str,
        suffix: str,
        length: int | None = None,
        *,
        at_most: int | None = None,
        options: OptionsLike = NONE,
        **more: Unpack[OptionFields],
    ) -> Filled:
        """Write what stands between two texts, in `length` tokens; None finds the length, up to `at_most` (64)."""
        return self.run(Infill(prefix, suffix, length, at_most, arguments.options_of(options, more)))

    def edit(
        self,
        text: str,
        instruction: str | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        strength: float | None = None,
        *,
        options: OptionsLike = NONE,
        **more: Unpack[OptionFields],
    ) -> Edited:
        """Rewrite a text where it stands: the canvas starts from it, a share (`strength`, 0.5) of it renoised.

        With `spans` (from character, to character) only they change, each in as many tokens as it has; without, the
        `instruction` may change any position."""
        return self.run(Edit(text, instruction, spans, strength, arguments.options_of(options, more)))

    def decide(
        self,
        state: Any,
        questions: Mapping[str, Question | Sequence[str] | Mapping[str, Any]],
        *,
        steps: int = 1,
        samples: int = 1,
        canvas: int | None = None,
        think: Think = "never",
        threshold: float = 0.5,
        calibrated: bool = True,
        options: OptionsLike = NONE,
        **more: Unpack[OptionFields],
    ) -> Decisions:
        """Answer questions with given answers: `decide(email, {"refund": Noul("Is a refund requested?")})["refund"]`.

        `state` is what they are about: a text, a conversation, or plain data. A question is a `Noul`, `Choice`, `Score`
        or `Span`, its record, or a list of choices, for which the id is what is asked. Each is read on its own, so that
        no answer depends on the others; `Decide` has the meaning of the rest."""
        if "images" in more:
            raise InputError("images came with the state, and this version reads text alone; leave them out")
        chosen = arguments.options_of(options, more)
        values: Any = questions  # which `Decide` makes questions
        return self.run(Decide(state, values, steps, samples, canvas, think, threshold, calibrated, chosen))

    def score(
        self,
        prompt: str | Sequence[int] | Prompt,
        continuation: str | Sequence[int] | None = None,
        *,
        options: OptionsLike = NONE,
        **more: Unpack[OptionFields],
    ) -> Scored:
        """Say how likely a continuation is behind a prompt, or a whole text, token by token and in one encode pass.

        Both are texts, or lists of token ids. `top_logprobs=5` asks for the likeliest tokens in each place, too."""
        changes = {"logprobs": True, **more} if "top_logprobs" in more else more
        return self.run(Likelihood(prompt, continuation, _without_drafts(options, changes)))

    # ---- the same, awaited ------------------------------------------------------------------------------------------

    async def arun(self, query: QueryFor[Result]) -> Result:
        """`run`, awaited.

        Queries that are awaited at the same time share a batch; one that is cancelled stops after its step."""
        return await result_of_query(self._begin, query)

    async def achat(
        self,
        messages: ChatPrompt,
        *,
        tools: Tools | None = None,
        options: OptionsLike = NONE,
        **more: Unpack[OptionFields],
    ) -> Completion:
        """`chat`, awaited."""
        return await self.arun(Chat(messages, tools, _without_drafts(options, more)))

    async def acomplete(self, prompt: str, *, options: OptionsLike = NONE, **more: Unpack[OptionFields]) -> Completion:
        """`complete` of one text, awaited."""
        arguments.check_text("the prompt", prompt)
        return await self.arun(Complete(prompt, _without_drafts(options, more)))

    def astream(
        self,
        prompt: ChatPrompt | AnswerQuery | Sequence[int] | Prompt,
        *,
        tools: Tools | None = None,
        options: OptionsLike = NONE,
        **more: Unpack[OptionFields],
    ) -> AsyncIterator[Event]:
        """`stream` for `async for`. The model does not wait for whoever reads; where nobody does, it stops."""
        return outcomes_of(self._begin, _answer_to(prompt, tools, options, more))


def _without_drafts(options: Any, more: Mapping[str, Any]) -> Options:
    """The options of a call that shows no draft."""
    return replace(arguments.options_of(options, more), drafts=False)


def _in_list(prompt: Any) -> Any:
    """One message as a list of it; anything else as it is."""
    return [prompt] if isinstance(prompt, Mapping) else prompt


def _continuations(prompt: Any, options: Options) -> list[AnswerQuery]:
    """A query for each of the texts to continue; InputError for what is neither a text nor a list of some."""
    if not isinstance(prompt, str):
        arguments.check_list("the prompt", prompt, "a text, or a list of texts")
    texts = [prompt] if isinstance(prompt, str) else prompt
    for text in texts:
        arguments.check_text("the prompt", text)
    return [Complete(text, options) for text in texts]


def _answer_to(prompt: Any, tools: Tools | None, options: Any, more: Mapping[str, Any]) -> AnswerQuery:
    """The query for a prompt of any kind: what is neither a query nor token ids is taken as a conversation."""
    if isinstance(prompt, AnswerQuery):
        if tools is not None or more or options is not NONE:
            raise InputError("a query came with options or tools beside its own; put them into the query")
        return prompt
    chosen = arguments.options_of(options, more)
    is_ids = isinstance(prompt, (list, tuple)) and not all(isinstance(one, Mapping | str) for one in prompt)
    if isinstance(prompt, Prompt) or is_ids:
        if tools is not None:
            raise InputError("tools came with token ids, which are continued as they are; give a conversation")
        return Complete(prompt, chosen)
    return Chat(prompt, tools, chosen)
