"""The numbers of a training run: all that decides, with the data, which weights come out of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sfumato.errors import InputError
from sfumato.options import DTYPE_NAMES
from sfumato.training.objective import Objective
from sfumato.training.optimizers import OPTIMIZERS


@dataclass(frozen=True)
class TrainingRecipe:
    """The numbers of a run. The schedule warms up, holds the peak until `hold`, then follows a cosine to `floor`."""

    steps: int = 1000
    batch: int = 96
    lr: float = 2e-3
    warmup: int = 100
    hold: int = 0
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-2
    clip: float = 1.0
    seed: int = 0
    init: str = "plain"
    """Of a model that begins from random weights. "plain": normal(0, 0.05), norms one. "quiet": see `quiet_`."""
    optimizer: str = "adamw"
    """"adamw"; "muon": torch.optim.Muon for the matrices of the blocks, AdamW for everything else; "adamw8bit" and
    "paged": AdamW of bitsandbytes with states in 8 bits, and in memory that may leave the GPU."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other: less memory, the same step."""
    encode_response_every: int = 1
    """The response takes part in the encode pass (and its loss) on every n-th step; the prompt always does."""
    repeats: int = 1
    """Canvases (noise levels) per example: the example is encoded once for all of them."""
    conditioned: float = 0.5
    """Share of a batch that sees the soft embedding of a first pass."""
    short_canvases: float = 0.0
    """Share of steps in which the canvas of a task is only as long as its answers, of one process. 0: never."""
    drafts: float = 0.0
    """Of a task whose answers may begin from a text: the share of examples whose canvas has that in the place of noise,
    so that they are edited in place."""
    leave_one_out: bool = False
    revision_penalty: float = 0.0
    """Weight of a penalty on later passes that revise what was right. See `Objective`."""
    self_distillation: float = 0.0
    """Weight of what the same model predicts some steps later. See `Objective`."""
    distillation_steps: int = 1
    """How many steps later, 16 at most."""
    precision: str = "float32"
    """"float32", or "bfloat16": autocast, weights that are trained stay float32."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", DTYPE_NAMES.get(self.precision, self.precision))
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("init", ("plain", "quiet")),
            ("precision", ("float32", "bfloat16")),
        ):
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name} is {value!r}; choose {', '.join(map(repr, choices))}")
        for name in ("steps", "batch", "accumulate", "encode_response_every", "repeats"):
            _check(name, getattr(self, name), 1, math.inf, is_whole=True)
        for name in ("warmup", "hold", "seed"):
            _check(name, getattr(self, name), 0, math.inf, is_whole=True)
        for name, most in (
            ("lr", 10.0),
            ("floor", 1.0),
            ("conditioned", 1.0),
            ("short_canvases", 1.0),
            ("drafts", 1.0),
            ("revision_penalty", 1e3),
            ("self_distillation", 1e3),
            ("weight_decay", 10.0),
            ("clip", 1e6),
        ):
            _check(name, getattr(self, name), 0.0, most)
        _check("distillation_steps", self.distillation_steps, 1, 16, is_whole=True)
        if len(self.betas) != 2:
            raise InputError(f"betas is {self.betas}; give two numbers from 0 to 1, such as 0.95,0.99")
        for beta in self.betas:
            _check("betas", beta, 0.0, 1.0)
        if not isinstance(self.leave_one_out, bool):
            raise InputError(f"leave_one_out is {self.leave_one_out!r}; give true or false")
        if self.leave_one_out and self.self_distillation:
            raise InputError(
                f"self_distillation is {self.self_distillation:g} and leave_one_out true, whose correction needs the "
                "noise level of a canvas, and one that the sampler has written has none; set self_distillation to 0, "
                "or leave_one_out to false"
            )
        if self.batch % self.accumulate:
            raise InputError(
                f"batch is {self.batch} and accumulate {self.accumulate}, which does not divide it; change one of them"
            )

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(self.leave_one_out, self.revision_penalty, self.self_distillation, self.distillation_steps)

    @property
    def later_steps(self) -> int:
        """Steps of sampling within a step of training."""
        return self.distillation_steps if self.self_distillation else 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        start = max(self.hold, self.warmup)
        share = min(max(0.0, (step - start) / max(1, self.steps - start)), 1.0)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share)))

    def check_same(self, before: TrainingRecipe) -> None:
        """InputError where a run that began with `before` would not go on exactly with this.

        Its length may change, and in how many parts a batch is computed."""
        old, new = asdict(before), asdict(self)
        for name in old:
            if name not in ("steps", "accumulate") and old[name] != new[name]:
                raise InputError(
                    f"{name} is {new[name]} and this run began with {old[name]}; leave it out to go on, or --force to "
                    "begin anew"
                )


FULL: dict[str, Any] = {}
"""What differs from the defaults where all weights are trained."""
LORA: dict[str, Any] = {
    "batch": 16, "lr": 1.5e-4, "betas": (0.95, 0.99), "weight_decay": 1e-4, "warmup": 25, "floor": 0.1,
}  # fmt: skip
"""What differs where factors are trained: the usual recipe for this model (FACTS 4)."""


def _check(name: str, value: object, least: float, most: float, is_whole: bool = False) -> None:
    is_kind = isinstance(value, int) if is_whole else isinstance(value, (int, float))
    if isinstance(value, bool) or not is_kind or not least <= value <= most:  # type: ignore[operator]
        kind = "a whole number" if is_whole else "a number"
        limit = f"of {least:g} or more" if math.isinf(most) else f"from {least:g} to {most:g}"
        raise InputError(f"{name} is {value!r}; give {kind} {limit}")
