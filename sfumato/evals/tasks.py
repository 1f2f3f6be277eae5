"""A task, run on a model: items that it has not seen, its answers, and how many of them are right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sfumato.events import Done, Usage
from sfumato.llm import LLM
from sfumato.options import Options
from sfumato.tasks.task import Task, held_out_items, messages


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


def fresh(task: Task, count: int, seed: int) -> Exercise:
    """So many items that no run trains on, the same ones for the same seed."""
    return Exercise(task, held_out_items(task, count, seed))


def answers(llm: LLM, task: Task, items: Sequence[str], options: Options, batch: int = 60) -> Iterator[TaskAnswer]:
    """Have the model answer items, `batch` at a time, in order. What an item says of its answer is pinned.

    An answer is a canvas long at most, unless the options say how long."""
    if options.max_tokens is None:
        options = replace(options, max_tokens=llm.model.config.canvas_length)
    for start in range(0, len(items), batch):
        some = items[start : start + batch]
        ids = [list(llm.encode(messages(task, item))) for item in some]
        pins = [_pins(llm, task, item) for item in some]
        texts: dict[int, TaskAnswer] = {}
        for event in llm.events(ids, options=options, pins=pins):
            if isinstance(event, Done):
                texts[event.row] = judged(task, some[event.row], event.text, event.usage)
        yield from (texts[row] for row in range(len(some)))


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


def rate(results: Sequence[TaskAnswer]) -> float:
    """The share that is right."""
    return sum(result.is_right for result in results) / max(1, len(results))
