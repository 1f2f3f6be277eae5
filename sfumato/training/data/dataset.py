"""Files to a training set and a held-out set, each a source of batches.

An epoch is a permutation of the examples. Within stretches of it, batches are formed of examples of about one length,
so that little of a batch is padding; batches, and rows within a batch, are then put in a random order. All of it is a
function of (seed, step), and nothing in memory grows with the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sfumato.errors import InputError
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.data.examples import Example, ExampleMaker, LengthLimit
from sfumato.training.data.index import ReadingProgress, TokenIndex, open_index
from sfumato.training.data.readers import files_of
from sfumato.training.loss import Examples

HELD_OUT = 0.05
"""The share of records that is not trained on where nothing else is said."""
STRETCH = 64
"""Batches that are sorted by length together."""


class PlacedExample(NamedTuple):
    """An example, and the file and line that it comes from."""

    example: Example
    place: str


class FileSource:
    """Examples of an index, those with the numbers `rows`, in an order of their own in each epoch. See `Source`."""

    def __init__(self, index: TokenIndex, rows: np.ndarray[Any, Any], seed: int, pad: int) -> None:
        self.index, self.rows, self.seed, self.pad = index, rows, seed % 2**63, pad
        self.lengths: np.ndarray[Any, Any] = index.entries["count"][rows]
        self._plan: tuple[tuple[int, int], np.ndarray[Any, Any]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, step: int, size: int, device: torch.device) -> Examples:
        """See `Source.batch`. A batch larger than the set repeats examples."""
        epoch, number = divmod(step, self.steps(size))
        examples = [self.index.example(int(self.rows[one])) for one in self._epoch(epoch, size)[number]]
        width = max(len(example.tokens) for example in examples)
        padded = [example.tokens + [self.pad] * (width - len(example.tokens)) for example in examples]
        return Examples(
            torch.tensor(padded, device=device),
            [len(example.tokens) for example in examples],
            [example.prompt for example in examples],
            [example.is_cut for example in examples],
        )

    def steps(self, size: int) -> int:
        """The steps of an epoch. Up to a batch of examples has no place in it, other ones in each."""
        return max(1, len(self) // size)

    def padding(self, size: int) -> float:
        """The share of the first epoch's positions that are padding."""
        lengths = self.lengths[self._epoch(0, size)]
        return float(1 - lengths.sum() / (lengths.max(1).sum() * size))

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        note = self.index.note
        return {
            "files": [file.name for file in self.index.files],
            "hash": note["hash"],
            "records": note["records"],
            "examples": len(self),
            "tokens": int(self.lengths.sum()),
            "prompt_tokens": int(self.index.entries["prompt"][self.rows].sum()),
            "cut": int(self.index.entries["is_cut"][self.rows].sum()),
            **{name: note[name] for name in ("left_out", "left_out_at", "max_tokens", "long")},
            "seed": self.seed,
            "selection": hashlib.sha256(self.rows.tobytes()).hexdigest()[:16],
        }

    def _epoch(self, epoch: int, size: int) -> np.ndarray[Any, Any]:
        """Which examples are in each batch of an epoch, [steps, size]."""
        if self._plan is None or self._plan[0] != (epoch, size):
            draws, steps = np.random.default_rng([self.seed, epoch]), self.steps(size)
            order = np.resize(draws.permutation(len(self)), steps * size)
            batches = []
            for at in range(0, len(order), STRETCH * size):
                stretch = order[at : at + STRETCH * size]
                stretch = stretch[np.argsort(self.lengths[stretch], kind="stable")].reshape(-1, size)
                batches.append(draws.permutation(stretch))
            # The first rows of a batch see a soft embedding (`Corruption.conditioned`): not always the shortest ones.
            self._plan = (epoch, size), draws.permuted(np.concatenate(batches), axis=1)
        return self._plan[1]


@dataclass(frozen=True)
class Dataset:
    """What is trained on, and what is held out of it."""

    train: FileSource
    held_out: FileSource | None = None

    def examples(self, count: int) -> list[PlacedExample]:
        """The first examples to train on, in the order of the files, with their places."""
        index = self.train.index
        return [PlacedExample(index.example(int(row)), index.place(int(row))) for row in self.train.rows[:count]]


def open_data(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    max_tokens: int | LengthLimit,
    seed: int = 0,
    held_out: float | Path | None = None,
    progress: ReadingProgress | None = None,
) -> Dataset:
    """The examples of files and folders for one checkpoint's tokenizer and template.

    `max_tokens` limits prompt and response together; a `LengthLimit` says too what becomes of longer examples.
    `held_out`: the share of records, above 0 and below 1, that is not trained on, chosen by content and seed, so that
    equal records are on one side; or a file or folder. InputError for bad records, by number, and where none are left;
    SfumatoError where the tokens cannot be kept on disk."""
    limit = max_tokens if isinstance(max_tokens, LengthLimit) else LengthLimit(max_tokens)

    def index_of(places: Sequence[Path]) -> TokenIndex:
        return open_index(files_of(places), ExampleMaker(tokenizer, template, limit), progress)

    def source(index: TokenIndex, rows: np.ndarray[Any, Any]) -> FileSource:
        return FileSource(index, rows, seed, tokenizer.pad_id)

    index = index_of(paths)
    every = np.arange(len(index.entries))
    if held_out is None:
        return Dataset(source(index, every))
    if isinstance(held_out, Path):
        other = index_of([held_out])
        return Dataset(source(index, every), source(other, np.arange(len(other.entries))))
    is_held = _held_out(index, held_out, seed)
    return Dataset(source(index, every[~is_held]), source(index, every[is_held]))


def held_out_of(text: str | None) -> float | Path | None:
    """What `--held-out` says: a share such as 5% or 0.05 (0: nothing), or else a file or folder. None: `HELD_OUT`."""
    if text is None:
        return HELD_OUT
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if "%" in text else 1) or None
    except ValueError:
        return Path(text)


def _held_out(index: TokenIndex, share: float, seed: int) -> np.ndarray[Any, Any]:
    """Which examples are held out: those of the records whose content, hashed with the seed, comes first."""
    if not 0 < share < 1:
        raise InputError(f"held-out is {share:g}; give a share above 0 and below 1, such as 5%, or a file")
    contents = np.unique(index.entries["content"])
    if len(contents) < 2:
        raise InputError(
            "the data has one record, and nothing to hold out of it; give more, --held-out FILE, or --held-out 0"
        )
    count = min(max(1, round(share * len(contents))), len(contents) - 1)
    keys = _mixed(contents ^ _mixed(np.uint64(seed % 2**63)))
    return np.isin(index.entries["content"], contents[np.argsort(keys, kind="stable")[:count]])


def _mixed(values: Any) -> Any:
    """A hash of 64-bit numbers (splitmix64's last step)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
