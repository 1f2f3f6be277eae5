"""Endless Sudoku as a source: the task that nano was trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.tasks import sudoku
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.loss import Examples


class SudokuSource:
    """Endless Sudoku: puzzles dug by the project, given more clues and turned by symmetries, as a chat of two turns.

    The pool of `pool` puzzles is rebuilt from `seed` (6 ms each); clues are uniform in `clues`, both ends included."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        seed: int = 20261121,
        pool: int = 6000,
        clues: tuple[int, int] = (24, 50),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.stream = sudoku.Stream(sudoku.minimal_puzzles(pool, np.random.default_rng(seed), progress), seed)
        self.pool, self.clues = pool, clues
        blank = "0" * 81
        ids = template.encode(tokenizer, [{"role": "user", "content": sudoku.prompt(blank)}])
        digit_ids = tokenizer.encode("0123456789")
        start = next(i for i in range(len(ids)) if ids[i : i + 81] == [digit_ids[0]] * 81)
        self.head, self.tail = torch.tensor(ids[:start]), torch.tensor(ids[start + 81 :])
        self.digits = torch.tensor(digit_ids)
        self.end = torch.tensor([tokenizer.id("<turn|>")])

    def batch(self, step: int, size: int, device: torch.device) -> Examples:
        """See `Source.batch`."""
        clues = np.random.default_rng([self.stream.seed, step]).integers(self.clues[0], self.clues[1] + 1, size)
        puzzles, solutions = self.stream.sample(size, clues, step)

        def repeat(ids: Tensor) -> Tensor:
            return ids.expand(size, -1)

        tokens = torch.cat(
            [
                repeat(self.head),
                self.digits[torch.from_numpy(puzzles).long()],
                repeat(self.tail),
                self.digits[torch.from_numpy(solutions).long()],
                repeat(self.end),
            ],
            dim=1,
        )
        prompt = len(self.head) + 81 + len(self.tail)
        return Examples(tokens.to(device), [tokens.shape[1]] * size, [prompt] * size, [False] * size)

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {"task": "sudoku", "seed": self.stream.seed, "pool": self.pool, "clues": list(self.clues)}
