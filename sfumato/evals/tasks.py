"""A task, run on a model: items that it has not seen, its answers, and how many of them are right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sfumato.events import Done
from sfumato.llm import LLM
from sfumato.options import Options
from sfumato.tasks.task import Task


@dataclass(frozen=True)
class TaskAnswer:
    """What became of one item."""

    item: str
    text: str
    is_right: bool
    steps: int


def answers(llm: LLM, task: Task, items: Sequence[str], options: Options, batch: int = 60) -> Iterator[TaskAnswer]:
    """Have the model answer items, `batch` at a time, in order. What an item says of its answer is pinned.

    An answer is a canvas long at most, unless the options say how long."""
    if options.max_tokens is None:
        options = replace(options, max_tokens=llm.model.config.canvas_length)
    for start in range(0, len(items), batch):
        some = items[start : start + batch]
        ids = [list(llm.encode([{"role": "user", "content": task.prompt(item)}])) for item in some]
        pins = [_pins(llm, task, item) for item in some]
        texts: dict[int, TaskAnswer] = {}
        for event in llm.events(ids, options=options, pins=pins):
            if isinstance(event, Done):
                item = some[event.row]
                right = task.is_right(event.text, item)
                texts[event.row] = TaskAnswer(item, event.text, right, event.usage.steps)
        yield from (texts[row] for row in range(len(some)))


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
