"""Options: how to generate, one frozen record for Python, the command line and HTTP. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from sfumato.errors import InputError


@dataclass(frozen=True)
class Options:
    """How to generate. `None` means: what the checkpoint's generation_config says, else the released model's value.

    Sampling rules and their defaults come from the reference (transformers `generation_diffusion_gemma.py`).
    """

    max_tokens: int | None = None
    """New tokens at most; None: one answer may run to the end of the context."""
    min_tokens: int = 0
    """No end of turn among the first `min_tokens` tokens; 1 already guards against an empty answer."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer, wherever they fall in a canvas; they are not part of the text."""
    seed: int | None = None
    """Same seed, same text, alone or in a batch; None: a fresh seed, reported in the result."""
    mode: Literal["diffusion", "autoregressive"] | None = None
    """None: diffusion, where the model has a canvas."""
    max_steps: int | None = None
    """Cap on denoising steps a canvas."""
    t_max: float | None = None
    """Temperature of a canvas's first step."""
    t_min: float | None = None
    """What it falls to, in even steps, at the end of the schedule."""
    temperature_steps: int | None = None
    """Length of the temperature schedule in steps; None: max_steps, as the reference does."""
    entropy_bound: float | None = None
    """Nats of joint entropy that one step may accept."""
    stability: int | None = None
    """Steps for which the argmax canvas must stand still before the canvas stops."""
    confidence: float | None = None
    """Mean entropy in nats under which a stable canvas stops; 0 turns the adaptive stop off."""
    temperature: float = 1.0
    """Scales t_max and t_min: 1, and 0, leave them as they are. One token after another it divides the logits; 0 is
    greedy."""
    top_k: int = 0
    """Autoregressive mode only: sample among the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Autoregressive mode only: sample among the smallest set of tokens with this much probability."""
    drafts: bool = False
    """Emit a Draft after every step (a device sync each)."""
    logprobs: bool = False
    """Log-probability of every committed token, from the encode pass that commits it."""
    top_logprobs: int = 0
    """With logprobs: the log-probabilities of so many of the likeliest tokens at each place, too."""
    early: bool = False
    """Answers that arrive early: a canvas commits what has settled at its beginning before the rest, and stops when all
    up to its first end, or to the budget's, has. False: as the reference does."""
    short: bool = False
    """A budget below a canvas takes a canvas no longer than that: much faster, but the model sees fewer positions at
    once than it was trained with."""
    schema: dict[str, Any] | bool | None = None
    """The answer is JSON that obeys this JSON Schema."""
    regex: str | None = None
    """The answer matches this regular expression, as a whole."""
    grammar: str | None = None
    """The answer obeys this Lark grammar."""
    choices: tuple[str, ...] | None = None
    """The answer is one of these."""
    strict: bool = False
    """Chat with tools only: a call names one of them, and its arguments obey that tool's schema."""
    must_call: bool = False
    """Chat with tools only: the answer is a call; implies strict."""
    thinking: bool = False
    """Chat only: ask the model to think before it answers."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop is {self.stop!r}; give strings of at least one character")
        object.__setattr__(self, "stop", tuple(stop))
        for name, low, high, why in _RANGES:
            value = getattr(self, name)
            if value is None and getattr(Options, name) is None:
                continue
            whole = name in _WHOLE
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise InputError(f"{name} is {value!r}; give {'a whole' if whole else 'a'} number {why}")
            if not low <= value <= high:
                raise InputError(f"{name} is {value!r}; give a number {why}")
        for name in ("drafts", "logprobs", "early", "short", "strict", "must_call", "thinking"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}; give true or false")
        if isinstance(self.choices, list):
            object.__setattr__(self, "choices", tuple(self.choices))
        given = [name for name in ("schema", "regex", "grammar", "choices") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are given together; an answer can obey one of them")
        if given and self.mode not in (None, "diffusion"):
            raise InputError(f"{given[0]} needs mode 'diffusion'; the mode is {self.mode!r}")
        if given and (self.thinking or self.min_tokens > 1):
            raise InputError(f"{given[0]} cannot go with thinking or min_tokens above 1; drop one of them")
        if self.mode not in (None, "diffusion", "autoregressive"):
            raise InputError(f"mode is {self.mode!r}; give 'diffusion' or 'autoregressive'")
        if self.t_min is not None and self.t_max is not None and self.t_min > self.t_max:
            raise InputError(f"t_min is {self.t_min!r}, above t_max {self.t_max!r}; give t_min at most t_max")
        if self.top_logprobs and not self.logprobs:
            raise InputError(f"top_logprobs is {self.top_logprobs} without logprobs; set logprobs to true")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}; lower it")

    @property
    def constraint(self) -> tuple[str, Any] | None:
        """What the answer obeys: the name of that option and its value."""
        for name in ("schema", "regex", "grammar", "choices"):
            if (value := getattr(self, name)) is not None:
                return name, value
        return None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Options:
        """Options from a mapping (a request, a JSON file); an unknown name is an InputError that lists the names."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise InputError(f"there is no option {name!r}; the options are {', '.join(sorted(known))}")
        return cls(**values)

    def with_defaults(self, defaults: dict[str, Any]) -> Options:
        """A copy in which every `None` that `defaults` (option name -> value) knows is filled in."""
        return dataclasses.replace(
            self, **{k: v for k, v in defaults.items() if getattr(self, k) is None and v is not None}
        )


_BIG = 1 << 62
_WHOLE = {"max_tokens", "min_tokens", "seed", "max_steps", "temperature_steps", "stability", "top_k", "top_logprobs"}
_RANGES: list[tuple[str, float, float, str]] = [
    ("max_tokens", 1, _BIG, "from 1 to 2^62"),
    ("min_tokens", 0, _BIG, "from 0 to 2^62"),
    ("seed", 0, _BIG, "from 0 to 2^62"),
    ("max_steps", 1, 4096, "from 1 to 4096"),
    ("t_max", 1e-6, 100.0, "above 0, at most 100"),
    ("t_min", 1e-6, 100.0, "above 0, at most 100"),
    ("temperature_steps", 1, 4096, "from 1 to 4096"),
    ("entropy_bound", 0.0, 1e9, "from 0 to 1e9"),
    ("stability", 0, 4096, "from 0 to 4096"),
    ("confidence", 0.0, 100.0, "from 0 to 100"),
    ("temperature", 0.0, 100.0, "from 0 to 100"),
    ("top_k", 0, _BIG, "from 0 to 2^62"),
    ("top_logprobs", 0, 20, "from 0 to 20"),
    ("top_p", 1e-6, 1.0, "above 0, at most 1"),
]

FALLBACK_DEFAULTS: dict[str, Any] = {
    "max_steps": 48,
    "t_min": 0.4,
    "t_max": 0.8,
    "entropy_bound": 0.1,
    "stability": 1,
    "confidence": 0.005,
}
"""The released model's generation_config, in our names; used where a checkpoint's own says nothing."""
