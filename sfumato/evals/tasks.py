"""A task, run on a model: items that it has not seen, its answers, and how many of them are right.

Each item has noise of its own, counted from the seed and the item: an answer does not depend on what stands beside it,
two models or two settings see the same noise, and one lucky draw does not decide over all items. A model behind a URL
answers the same items; what an item says of its answer is pinned there by a template.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, cast

from sfumato.errors import CapacityError, InputError
from sfumato.events import Completion, Done, Edited, Filled, Usage
from sfumato.llm import LLM
from sfumato.options import BIG, Options
from sfumato.tasks.task import Task, held_out_items, messages
from sfumato.templates.interface import LanguageModel
from sfumato.templates.patience import run_patiently
from sfumato.templates.requests import Chat, Edit, Fill
from sfumato.templates.slots import Slot

FIRST_LOOK = 8
"""Items of which one must be answered: where the model can take none of them, it is the options that are wrong."""


@dataclass(frozen=True)
class Exercise:
    """Items of a task, in order: what an evaluation runs, and what settings are compared on."""

    task: Task
    items: Sequence[str]


@dataclass(frozen=True)
class TaskAnswer:
    """What became of one item."""

    item: str
    text: str
    is_right: bool
    steps: int
    """Denoising steps of all its canvases."""
    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """From the request's start to its end; in a batch the others' time is in it."""
    kind: str = ""
    measures: Mapping[str, float] = field(default_factory=dict)
    """See `Task.measures`."""
    cost_seconds: float = 0.0
    """Its part of the time that its batch took, by its part of the passes: the parts of a batch add up to that time."""
    error: str = ""
    """Why the model could not answer, which counts as wrong; "": it did."""


def fresh(task: Task, count: int, seed: int) -> Exercise:
    """So many items that no run trains on, the same ones for the same seed."""
    return Exercise(task, held_out_items(task, count, seed))


def answers(
    llm: LanguageModel, task: Task, items: Sequence[str], options: Options, batch: int = 60
) -> Iterator[TaskAnswer]:
    """Have the model answer items, `batch` at a time, in order. What an item says of its answer is pinned.

    An answer is a canvas long at most, unless the options say how long. An item that is too large for the model has an
    answer with an error; InputError where that is so of the first items, all of them."""
    errors: list[str] = []
    for start in range(0, len(items), batch):
        some = items[start : start + batch]
        began = time.perf_counter()
        is_query = llm.is_remote or _is_in_place(task, options)
        results = _by_queries(llm, task, some, options) if is_query else _here(cast("LLM", llm), task, some, options)
        took = time.perf_counter() - began
        errors += [result.error for result in results if result.error]
        passes = sum(result.passes for result in results)
        for result in results:
            part = result.passes / passes if passes else 1 / len(some)
            yield replace(result, cost_seconds=part * took)
        if len(errors) == start + len(some) and (len(errors) >= FIRST_LOOK or len(errors) == len(items)):
            raise InputError(f"{llm.name} could answer none of the items; {errors[0]}")


def judged(task: Task, item: str, text: str, usage: Usage) -> TaskAnswer:
    """An answer and what its checker says of it."""
    return TaskAnswer(
        item,
        text,
        task.is_right(text, item),
        usage.steps,
        usage.passes,
        usage.tokens,
        usage.seconds,
        "" if task.kind is None else task.kind(item),
        {} if task.measures is None else task.measures(text, item),
    )


def seeded(options: Options, item: str) -> Options:
    """The options with a seed of the item's own, made of theirs and the item; without a seed they stay."""
    if options.seed is None:
        return options
    digest = hashlib.sha256(item.encode("utf-8", "surrogatepass")).digest()
    return replace(options, seed=(options.seed + int.from_bytes(digest[:6])) % BIG)


def rate(results: Sequence[TaskAnswer]) -> float:
    """The share that is right."""
    return sum(result.is_right for result in results) / max(1, len(results))


# ---- a model here ----------------------------------------------------------------------------------------------------


def endings(
    llm: LLM, prompts: Sequence[Sequence[int]], options: Sequence[Options], pins: Sequence[Mapping[int, int]]
) -> list[Done]:
    """The ends of answers that run together, in the order of their prompts; one canvas long at most, where it is open.

    CapacityError, before any work, where one of them is too large."""
    events = llm.events([*prompts], options=[answer_options(one, llm) for one in options], pins=pins)
    rows = {event.row: event for event in events if isinstance(event, Done)}
    return [rows[row] for row in range(len(prompts))]


def answer_options(options: Options, llm: LLM) -> Options:
    """Options with the answer's length filled in: one canvas, or as many tokens one at a time."""
    return options if options.max_tokens is not None else replace(options, max_tokens=llm.model.config.canvas_length)


def _here(llm: LLM, task: Task, items: Sequence[str], options: Options) -> list[TaskAnswer]:
    """Answers of one batch; those of a batch that is too large one by one, so that it shows which item is."""
    has_canvas = options.mode != "autoregressive" and llm.model.config.is_diffusion
    try:
        prompts = [_encoded(llm, task, item) for item in items]
        pins = [_pins(llm, task, item) if has_canvas else {} for item in items]
        ends = endings(llm, prompts, [seeded(options, item) for item in items], pins)
    except CapacityError as error:
        if len(items) == 1:
            return [_unanswered(task, items[0], str(error).replace("prompt 0 ", "the prompt "))]
        return [result for item in items for result in _here(llm, task, [item], options)]
    return [judged(task, item, end.text, end.usage) for item, end in zip(items, ends, strict=True)]


def _encoded(llm: LLM, task: Task, item: str) -> list[int]:
    """The prompt's tokens. CapacityError for one that is too long, or that the model's chat template does not take."""
    try:
        return [*llm.encode(messages(task, item))]
    except InputError as error:
        raise CapacityError(str(error)) from None


def _unanswered(task: Task, item: str, error: str) -> TaskAnswer:
    return replace(judged(task, item, "", Usage()), is_right=False, error=error)


def _pins(llm: LLM, task: Task, item: str) -> Mapping[int, int]:
    """What the item says of its answer, as tokens; none where a character is not a token of its own."""
    if task.known is None:
        return {}
    known = task.known(item)
    answer = task.answer(item)
    tokens = llm.tokenizer.encode(answer)
    if len(tokens) != len(answer) or len(answer) > llm.model.config.canvas_length:
        return {}
    return {place: tokens[place] for place in known}


# ---- a model behind a URL --------------------------------------------------------------------------------------------


def _is_in_place(task: Task, options: Options) -> bool:
    """Whether an answer begins from a text that the task has: on a canvas."""
    return task.draft is not None and options.mode != "autoregressive"


def query_of(task: Task, item: str, options: Options, canvas_length: int | None = None) -> Chat | Edit | Fill:
    """What a model is asked for an item: an answer, a text to edit where it stands, or a template of what is known.

    The template takes it that a character is a token, and a canvas alone has one: one token after another it is an
    answer. `canvas_length` bounds an answer of open length."""
    conversation = messages(task, item)
    if task.draft is not None and _is_in_place(task, options):
        text = task.draft(item)
        instruction = task.prompt(item).removesuffix(f"\n\n{text}")  # as an edit writes it
        return Edit(text, instruction, None, task.strength, replace(options, mode=None, max_tokens=None))
    if task.known is None or options.mode == "autoregressive":
        length = canvas_length if options.max_tokens is None else options.max_tokens
        return Chat(conversation, None, replace(options, max_tokens=length))
    return Fill(template_of(len(task.answer(item)), task.known(item)), conversation, replace(options, mode=None))


def template_of(length: int, known: Mapping[int, str]) -> list[str | Slot]:
    """What is known of so many characters as fixed texts, and between them slots as long as the gaps."""
    runs = [(is_known, [*places]) for is_known, places in groupby(range(length), lambda place: place in known)]
    return [
        "".join(known[place] for place in places) if is_known else Slot(f"gap {number}", length=len(places))
        for number, (is_known, places) in enumerate(runs)
    ]


def _by_queries(llm: LanguageModel, task: Task, items: Sequence[str], options: Options) -> list[TaskAnswer]:
    length = getattr(llm, "canvas_length", None)

    async def answer(item: str) -> TaskAnswer:
        query: Any = query_of(task, item, seeded(options, item), length)
        try:
            result: Completion | Edited | Filled = await run_patiently(llm, query)
        except InputError as error:
            return _unanswered(task, item, str(error))
        return judged(task, item, result.text, result.usage)

    async def all_of_them() -> list[TaskAnswer]:
        return [*await asyncio.gather(*map(answer, items))]

    return asyncio.run(all_of_them())
