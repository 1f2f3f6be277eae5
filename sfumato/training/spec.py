"""What a run of training is asked to do: a value, from the command line or a program, checked where it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import InputError
from sfumato.model.adapters import USUAL
from sfumato.training.data.examples import LengthLimit, Long

NEW = ":new"
"""What the name of a model ends with whose weights begin at random."""
USUAL_TOKENS = 4096
"""The longest example, where none is asked for and the model's context is longer."""


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank factors to train in the place of the weights themselves."""

    rank: int
    alpha: float | None = None
    """None: twice the rank."""
    targets: tuple[str, ...] = USUAL
    is_rs: bool = False
    """Scaled by the root of the rank."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"the rank of --lora is {self.rank}; give 1 or more, or leave it out to train all weights")
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)
        elif not 0 < self.alpha < math.inf:
            raise InputError(f"alpha is {self.alpha}; give a number above 0, usually twice the rank")
        if not self.targets:
            raise InputError("there are no targets to adapt; give some, such as attention,dense")


@dataclass(frozen=True)
class DataSpec:
    """What is trained on: files, tasks, or both, each with its share of every batch."""

    files: tuple[Path, ...] = ()
    held_out: str | None = None
    """A share such as 5%, or a file. None: the default of `training.data`."""
    max_tokens: int | None = None
    """The longest example; None: the model's context, 4,096 at most."""
    long: Long = "cut"
    """What becomes of a longer one: see `data.LengthLimit`."""
    tasks: tuple[str, ...] = ()
    mix: Mapping[str, float] = field(default_factory=dict)
    """Shares of tasks, and of "data", the files; what is not named divides the rest."""
    pool: int = 6000
    """Sudoku puzzles to dig."""

    def __post_init__(self) -> None:
        names = (*self.tasks, *(("data",) if self.files else ()))
        for name, share in self.mix.items():
            if name not in names:
                raise InputError(f"--mix names {name!r}, which is not trained on; that is: {', '.join(names)}")
            if not 0 < share < 1:
                raise InputError(f"the share of {name} is {share}; give a number between 0 and 1, e.g. {name}=0.3")
        if (total := sum(self.mix.values())) > 1 or (total < 1 and len(self.mix) == len(names) > 0):
            raise InputError(f"the shares of --mix are {total:g} in all; leave one out, which takes the rest")
        self.limit(max(USUAL_TOKENS, self.max_tokens or 0))

    def limit(self, context: int) -> LengthLimit:
        """The limit of an example for a model of so long a context. InputError where it is longer than that."""
        if self.max_tokens is not None and self.max_tokens > context:
            raise InputError(f"max_tokens is {self.max_tokens}, and the model's context {context}; lower it")
        return LengthLimit(min(USUAL_TOKENS, context) if self.max_tokens is None else self.max_tokens, self.long)

    def shares(self) -> dict[str, float]:
        """The share of each."""
        names = [*self.tasks, *(["data"] if self.files else [])]
        rest = [name for name in names if name not in self.mix]
        left = (1 - sum(self.mix.values())) / max(1, len(rest))
        return {name: self.mix.get(name, left) for name in names}


@dataclass(frozen=True)
class LookSpec:
    """What is looked at while it trains, and how often."""

    every: int | None = None
    """Steps between looks; 0: none; None: a tenth of the run, 500 at most."""
    tasks: tuple[str, ...] = ()
    """Their checkers run on held-out items."""
    items: int = 60
    samples: int = 2
    """Held-out prompts whose answers are written down."""
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "samples", "patience"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.patience and self.every == 0:
            raise InputError("patience counts looks at held-out examples, and eval-every 0 takes none; raise it")
        if self.items < 1:
            raise InputError(f"eval-items is {self.items}; give 1 or more")


@dataclass(frozen=True)
class RunSpec:
    """All of a run."""

    folder: Path
    model: str = "nano"
    data: DataSpec = field(default_factory=DataSpec)
    lora: LoraSpec | None = None
    looks: LookSpec = field(default_factory=LookSpec)
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of the recipe that were asked for, by name."""
    epochs: float | None = None
    """How often each example of the files is seen; sets the steps. None: 3, where no steps are asked for."""
    minutes: float | None = None
    quantize: str | None = None
    """Pack frozen weights to fewer bits, as `LoadOptions.quantize`."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.lora is None and self.quantize is not None:
            raise InputError("weights in fewer bits cannot be trained; train factors beside them, with --lora RANK")
        if self.lora is not None and self.is_new:
            raise InputError("a model with random weights is trained as a whole; leave --lora out")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"epochs is {self.epochs}; give a number above 0")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InputError(f"minutes is {self.minutes}; give a number above 0")
        if self.epochs is not None and "steps" in self.changes:
            raise InputError("epochs and steps say the same; give one of them")

    def every(self, steps: int) -> int:
        """Steps between looks, of a run of so many."""
        every = self.looks.every
        return min(500, max(1, -(-steps // 10))) if every is None else every

    @property
    def is_new(self) -> bool:
        """Whether it begins from random weights."""
        return self.model.endswith(NEW)
