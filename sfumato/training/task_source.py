"""A task as a source of examples: endless items with their right answers, as a chat of two turns."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.tasks.task import SPLIT, Task, drawn, messages
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.loss import Examples

ROOM_STEP = 16
"""Lengths of short canvases are multiples of this."""


def answer_room(task: Task, tokenizer: Tokenizer, items: int = 400) -> int:
    """Positions that the longest answer to so many random items takes with its end, rounded up."""
    rng = np.random.default_rng(SPLIT)
    longest = max(len(tokenizer.encode(task.answer(task.generate(rng)))) for _ in range(items)) + 1
    return -(-longest // ROOM_STEP) * ROOM_STEP


class TaskSource:
    """Items of a task as functions of (seed, step): those that are trained on, or those that are held out."""

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        seed: int = 0,
        is_held_out: bool = False,
        canvases: tuple[int, float] | None = None,
        drafts: float = 0.0,
    ) -> None:
        """`canvases`: the model's canvas, and in what share of steps the canvas is no longer than answers are.

        `drafts`: the share of examples whose canvas begins from the task's draft."""
        self.task, self.tokenizer, self.template = task, tokenizer, template
        self.seed, self.is_held_out = seed, is_held_out
        self._drafts = 0.0 if task.draft is None else drafts
        self._room, self._short = 0, 0.0
        if canvases is not None and canvases[1]:
            self._room, self._short = min(canvases[0], answer_room(task, tokenizer)), canvases[1]
        end = tokenizer.id("<turn|>")
        if end is None:
            raise InputError("this model's vocabulary has no <turn|>, with which a task's answers end")
        self._end = end

    def items(self, count: int, step: int) -> list[str]:
        """So many items of a step."""
        kind = self.task.name.partition("/")[2]  # beside the whole task it has items of its own
        own = [zlib.crc32(kind.encode())] if kind else []
        rng = np.random.default_rng([self.seed, step, int(self.is_held_out), *own])
        return drawn(self.task, count, rng, self.is_held_out)

    def batch(self, step: int, size: int, device: torch.device) -> Examples:
        """See `Source.batch`."""
        rows: list[list[int]] = []
        prompts: list[int] = []
        items = self.items(size, step)
        for item in items:
            ids = self.template.encode(self.tokenizer, messages(self.task, item))
            prompts.append(len(ids))
            rows.append([*ids, *self.tokenizer.encode(self.task.answer(item)), self._end])
        counts = [len(row) for row in rows]
        tokens = torch.zeros(size, max(counts), dtype=torch.long)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
        draws = np.random.default_rng([self.seed, step, int(self.is_held_out), 1]).random(size)
        is_cut = [bool(draw >= self.task.filled) for draw in draws]
        learned = None if self.task.is_prompt_learned else self._answers_of(rows, tokens).to(device)
        canvases, drafts = self._canvases(step, size), self._drafts_of(items, step)
        return Examples(tokens.to(device), counts, prompts, is_cut, learned, canvases, drafts)

    def _canvases(self, step: int, size: int) -> list[int] | None:
        """The canvas of each row of a step; None: the model's."""
        is_short = np.random.default_rng([self.seed, step, 2]).random() < self._short
        return [self._room] * size if is_short else None

    def _drafts_of(self, items: list[str], step: int) -> list[list[int]] | None:
        """What the canvas of each item begins from, with its end; [] for noise."""
        if not self._drafts or self.task.draft is None:
            return None
        draws = np.random.default_rng([self.seed, step, int(self.is_held_out), 3]).random(len(items))
        return [
            [*self.tokenizer.encode(self.task.draft(item)), self._end] if draw < self._drafts else []
            for item, draw in zip(items, draws, strict=True)
        ]

    def _answers_of(self, rows: list[list[int]], tokens_BT: Tensor) -> Tensor:
        """Which tokens are the model's: those of its turns, each with its end."""
        is_answer_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        prompt = self.template.encode(self.tokenizer, [{"role": "user", "content": "?"}])
        opening = prompt[len(prompt) - prompt[::-1].index(self._end) :]  # what stands between two turns
        for row, ids in enumerate(rows):
            places = range(len(opening), len(ids))
            starts = [place for place in places if ids[place - len(opening) : place] == opening]
            for start in starts:
                is_answer_BT[row, start : ids.index(self._end, start) + 1] = True
        return is_answer_BT

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {"task": self.task.name, "seed": self.seed}
