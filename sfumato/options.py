"""Every choice, declared once: how to generate (`Options`) and how to load a model (`LoadOptions`).

A field is annotated with its type and an `About`: its range, where it applies, and its sentence. Checks, the command
line, the HTTP schema, the page's settings and the tables in docs/ are made from these (`OPTIONS`, `LOAD_OPTIONS`); a
new option is one more field here, and its use. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from sfumato.declarations import (
    BIG,
    CONSTRAINTS,
    DTYPE_NAMES,
    ELSEWHERE,
    LEAST,
    OTHER_NAMES,
    About,
    Option,
    Use,
    constraint_of,
    declared,
    differences,
    dtype_name,
    repr_of,
    unknown_option,
)
from sfumato.errors import InputError

__all__ = [
    "BIG",
    "CONSTRAINTS",
    "DTYPE_NAMES",
    "ELSEWHERE",
    "FALLBACK_DEFAULTS",
    "LEAST",
    "LOAD_OPTIONS",
    "MOST_REPEATS",
    "MOST_STEPS",
    "OPTIONS",
    "OTHER_NAMES",
    "SHAPING",
    "About",
    "LoadOptions",
    "Option",
    "OptionFields",
    "Options",
    "OptionsLike",
    "Use",
    "constraint_of",
    "declared",
    "differences",
    "dtype_name",
]

MOST_STEPS = 4096
"""The most denoising steps of a canvas."""

MOST_REPEATS = 16
"""So many of a canvas's last steps are remembered, to see what repeats."""
MOST_REDOS = 64
"""The most times that a canvas is denoised again."""

_MODES: tuple[Use, ...] = ("canvas", "autoregressive")
_ANSWER: tuple[Use, ...] = ("complete", "chat")
_ALL: tuple[Use, ...] = ("complete", "chat", "templates")
_CANVAS: tuple[Use, ...] = ("canvas", *_ALL)
_CANVAS_ANSWER: tuple[Use, ...] = ("canvas", *_ANSWER)
_EVERYWHERE: tuple[Use, ...] = (*_MODES, *_ALL)


@dataclass(frozen=True, repr=False)
class Options:
    """How to generate. `None` means: what the checkpoint's generation_config says, else the released model's value.

    Sampling rules and their defaults come from the reference (transformers `generation_diffusion_gemma.py`).
    """

    max_tokens: Annotated[
        int | None,
        About("New tokens at most; None: one answer may run to the end of the context.", (*_MODES, *_ANSWER), 1, BIG),
    ] = None
    min_tokens: Annotated[
        int,
        About(
            "No end of turn among the first `min_tokens` tokens; 1 already guards against an empty answer.",
            (*_MODES, *_ANSWER),
            0,
            BIG,
        ),
    ] = 0
    stop: Annotated[
        tuple[str, ...],
        About(
            "Strings that end the answer, wherever they fall in a canvas; they are not part of the text.",
            (*_MODES, *_ANSWER),
        ),
    ] = ()
    seed: Annotated[
        int | None,
        About(
            "Same seed, same text, alone or in a batch; None: a fresh seed, reported in the result.",
            _EVERYWHERE,
            0,
            BIG,
        ),
    ] = None
    mode: Annotated[
        Literal["diffusion", "autoregressive"] | None,
        About("Whole canvases, or one token after another; None: diffusion, where the model has a canvas.", _ANSWER),
    ] = None
    max_steps: Annotated[int | None, About("Denoising steps of a canvas at most.", _CANVAS, 1, MOST_STEPS)] = None
    t_max: Annotated[float | None, About("Temperature of a canvas's first step.", _CANVAS, LEAST, 100.0)] = None
    t_min: Annotated[
        float | None, About("Temperature at the end of the schedule, reached in even steps.", _CANVAS, LEAST, 100.0)
    ] = None
    temperature_steps: Annotated[
        int | None,
        About(
            "Length of the temperature schedule in steps; None: max_steps, as the reference does.",
            _CANVAS,
            1,
            MOST_STEPS,
        ),
    ] = None
    entropy_bound: Annotated[
        float | None, About("Nats of joint entropy that one step may accept.", _CANVAS, 0.0, 1e9)
    ] = None
    stability: Annotated[
        int | None,
        About("Steps for which the argmax canvas must stand still before the canvas stops.", _CANVAS, 0, MOST_STEPS),
    ] = None
    confidence: Annotated[
        float | None,
        About(
            "Mean entropy in nats under which a stable canvas stops; 0 turns the adaptive stop off.",
            _CANVAS,
            0.0,
            100.0,
        ),
    ] = None
    repeats: Annotated[
        int,
        About(
            f"Stop a canvas, however unsure, once each position has had its likeliest token at so many of the last "
            f"{MOST_REPEATS} steps, in a row or not; 0: off, as in the reference.",
            _CANVAS,
            0,
            MOST_REPEATS,
        ),
    ] = 0
    temperature: Annotated[
        float,
        About(
            "Scales t_max and t_min; 1, and 0, leave them as they are. In autoregressive mode it divides the logits; "
            "0 is greedy.",
            _EVERYWHERE,
            0.0,
            100.0,
        ),
    ] = 1.0
    top_k: Annotated[int, About("Sample among the k most likely tokens; 0 or -1: all.", _EVERYWHERE, -1, BIG)] = 0
    top_p: Annotated[
        float,
        About(
            "Sample among the fewest likeliest tokens with this much probability together; 0: the likeliest alone.",
            _EVERYWHERE,
            0.0,
            1.0,
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        About(
            "Sample among tokens with at least this share of the likeliest one's probability; 0: all.",
            _EVERYWHERE,
            0.0,
            1.0,
        ),
    ] = 0.0
    presence_penalty: Annotated[
        float,
        About(
            "What the logit of a token loses that the answer has already: on a canvas, before its position.",
            _EVERYWHERE,
            -2.0,
            2.0,
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        About("What the logit of a token loses for each time that the answer has it already.", _EVERYWHERE, -2.0, 2.0),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        About(
            "Divides the logit of a token that prompt or answer have already, or multiplies one below 0; 1: off.",
            _EVERYWHERE,
            LEAST,
            100.0,
        ),
    ] = 1.0
    logit_bias: Annotated[
        dict[int, float] | None,
        About(
            "What is added to the logits of some tokens, by their ids, from -100 (never) to 100 (always).", _EVERYWHERE
        ),
    ] = None
    drafts: Annotated[bool, About("Emit a Draft after every step; each waits for the device.", _CANVAS)] = False
    logprobs: Annotated[
        bool,
        About("Log-probability of every committed token, from the encode pass that commits it.", (*_MODES, *_ANSWER)),
    ] = False
    top_logprobs: Annotated[
        int,
        About(
            "With logprobs: the log-probabilities of so many of the likeliest tokens at each place, too.",
            (*_MODES, *_ANSWER),
            0,
            20,
        ),
    ] = 0
    early: Annotated[
        bool,
        About(
            "Answers that arrive early: a canvas commits the positions at its beginning that have settled before the "
            "rest, and stops when all positions up to its first end, or to the end of the budget, have settled. "
            "False: as the reference does.",
            _CANVAS,
        ),
    ] = False
    redos: Annotated[
        int,
        About(
            "How often a canvas that max_steps or repeats has stopped, unsure, begins again from other noise; the "
            "surest of its tries commits. 0: as the reference does.",
            _CANVAS,
            0,
            MOST_REDOS,
        ),
    ] = 0
    verify: Annotated[
        float | None,
        About(
            "With redos or finish: a canvas is refused where the same weights, one token after another, prefer another "
            "token by more than so many nats; the likeliest of its tries commits. None: max_steps alone decides.",
            _CANVAS_ANSWER,
            0.0,
            100.0,
        ),
    ] = None
    finish: Annotated[
        bool,
        About(
            "With verify: where every try is refused, the likeliest keeps what stands before its first such token, and "
            "the rest of the canvas is written one token after another. False: it commits as it is.",
            _CANVAS_ANSWER,
        ),
    ] = False
    short: Annotated[
        bool,
        About(
            "A budget below a canvas takes a canvas no longer than that: much faster, but the model sees fewer "
            "positions at once than it was trained with.",
            _CANVAS,
        ),
    ] = False
    schema: Annotated[
        dict[str, Any] | bool | None, About("The answer is JSON that obeys this JSON Schema.", ("canvas", *_ANSWER))
    ] = None
    regex: Annotated[
        str | None, About("The answer matches this regular expression, as a whole.", ("canvas", *_ANSWER))
    ] = None
    grammar: Annotated[str | None, About("The answer obeys this Lark grammar.", ("canvas", *_ANSWER))] = None
    choices: Annotated[tuple[str, ...] | None, About("The answer is one of these.", ("canvas", *_ANSWER))] = None
    strict: Annotated[
        bool,
        About(
            "A call names one of the tools, and its arguments obey that tool's schema. Chat with tools only.",
            (*_MODES, "chat"),
        ),
    ] = False
    must_call: Annotated[
        bool, About("The answer is a call; implies strict. Chat with tools only.", (*_MODES, "chat"))
    ] = False
    thinking: Annotated[bool, About("Ask the model to think before it answers. Chat only.", (*_MODES, "chat"))] = False
    adapter: Annotated[
        str | None, About("The adapter that answers, by the name it was loaded under; None: the model as it is.")
    ] = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop is {self.stop!r}; give strings of at least one character", option="stop")
        object.__setattr__(self, "stop", tuple(stop))
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if (checked := option.checked(value)) is not value:
                object.__setattr__(self, name, checked)
        self._check_together()

    def __repr__(self) -> str:
        return repr_of(self)

    def _check_together(self) -> None:
        """InputError for options that contradict each other."""
        constraints = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(constraints) > 1:
            raise InputError(
                f"{' and '.join(constraints)} are given together; an answer can obey one of them",
                option=constraints[0],
            )
        if constraints and self.mode not in (None, "diffusion"):
            message = f"{constraints[0]} needs mode 'diffusion'; the mode is {self.mode!r}"
            raise InputError(message, option=constraints[0])
        if constraints and self.min_tokens > 1:
            message = f"{constraints[0]} cannot go with min_tokens above 1; drop one of them"
            raise InputError(message, option=constraints[0])
        self._check_redos()
        if self.t_min is not None and self.t_max is not None and self.t_min > self.t_max:
            message = f"t_min is {self.t_min!r}, above t_max {self.t_max!r}; give t_min at most t_max"
            raise InputError(message, option="t_min")
        if self.top_logprobs and not self.logprobs:
            message = f"top_logprobs is {self.top_logprobs} without logprobs; set logprobs to true"
            raise InputError(message, option="top_logprobs")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            message = f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}; lower it"
            raise InputError(message, option="min_tokens")

    def _check_redos(self) -> None:
        """InputError for what a canvas that may begin again cannot go with."""
        if self.finish and self.verify is None:
            raise InputError("finish is true without verify; set verify to a number of nats, 1 say", option="finish")
        if self.verify is not None and not self.is_judged:
            message = f"verify is {self.verify} without redos; set redos to 1 or more, or finish to true"
            raise InputError(message, option="verify")
        if not self.is_judged:
            return
        name = "redos" if self.redos else "finish"
        if self.mode not in (None, "diffusion"):
            raise InputError(f"{name} needs mode 'diffusion'; the mode is {self.mode!r}", option=name)
        if ruling := [name for name in (*CONSTRAINTS, "strict", "must_call") if getattr(self, name)]:
            message = f"{name} cannot go with {ruling[0]}, whose grammar walks a canvas once; drop one of them"
            raise InputError(message, option=name)
        moving = [name for name in MOVING if getattr(self, name) != OPTIONS[name].default]
        if self.verify is not None and moving:
            message = f"verify cannot go with {moving[0]}, which changes what the model would write; drop one of them"
            raise InputError(message, option="verify")

    @property
    def is_judged(self) -> bool:
        """Whether a canvas may be refused: it then begins again, or is finished otherwise."""
        return self.redos > 0 or self.finish

    @property
    def constraint(self) -> tuple[str, Any] | None:
        """What the answer obeys: the name of that option and its value."""
        for name in CONSTRAINTS:
            if (value := getattr(self, name)) is not None:
                return name, value
        return None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Options:
        """Options from a mapping (a request, a JSON file).

        An unknown name is an InputError that suggests the right one and lists the names."""
        return cls().with_changes(values)

    def with_changes(self, values: Mapping[str, Any]) -> Options:
        """A copy with these options changed, by their names; InputError as for `from_dict`."""
        if not isinstance(values, Mapping):
            raise InputError(f"options are {reprlib.repr(values)}; give an Options or a dict of them", option="options")
        for name in values:
            if name not in OPTIONS:
                raise InputError(unknown_option(name, OPTIONS), option=name if isinstance(name, str) else "options")
        return dataclasses.replace(self, **values) if values else self

    def with_defaults(self, defaults: Mapping[str, Any]) -> Options:
        """A copy in which every `None` that `defaults` (option name -> value) knows is filled in.

        A default of max_tokens below the min_tokens that are asked for is left out."""
        values = {k: v for k, v in defaults.items() if getattr(self, k) is None and v is not None}
        if values.get("max_tokens", BIG) < self.min_tokens:
            del values["max_tokens"]
        return dataclasses.replace(self, **values)


class OptionFields(TypedDict, total=False):
    """The options under their names, for callers who give them one by one: `llm.chat("…", max_tokens=50, seed=1)`.

    For type checkers alone: `Options` declares them, and a test holds the two together."""

    max_tokens: int | None
    min_tokens: int
    stop: str | Sequence[str]
    seed: int | None
    mode: Literal["diffusion", "autoregressive"] | None
    max_steps: int | None
    t_max: float | None
    t_min: float | None
    temperature_steps: int | None
    entropy_bound: float | None
    stability: int | None
    confidence: float | None
    repeats: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    drafts: bool
    logprobs: bool
    top_logprobs: int
    early: bool
    redos: int
    verify: float | None
    finish: bool
    short: bool
    schema: dict[str, Any] | bool | None
    regex: str | None
    grammar: str | None
    choices: Sequence[str] | None
    strict: bool
    must_call: bool
    thinking: bool
    adapter: str | None


OptionsLike = Options | OptionFields | Mapping[str, Any]
"""Wherever options are taken: an `Options`, or a dict of some of them."""

MOVING = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
"""The options that move logits."""

SHAPING = ("top_k", "top_p", "min_p", *MOVING)
"""The options that change the distribution of a position, beside the temperature."""

OPTIONS = declared(Options)
"""Every option of `Options` by its name, in their order."""

FALLBACK_DEFAULTS: dict[str, Any] = {
    "max_steps": 48,
    "t_min": 0.4,
    "t_max": 0.8,
    "entropy_bound": 0.1,
    "stability": 1,
    "confidence": 0.005,
}
"""The released model's generation_config, in our names; used where a checkpoint's own says nothing."""


@dataclass(frozen=True, repr=False)
class LoadOptions:
    """How to load a model: one value from the command line to the loader, and into the server's worker."""

    model: Annotated[
        str | Path,
        About(
            'A checkpoint folder in any known format, a .gguf file, a hub id ("owner/name"; "owner/name:Q4_K_M" is '
            "one of its GGUF files), or nano, the model inside this package."
        ),
    ] = "nano"
    device: Annotated[str, About("auto, cpu, cuda, cuda:1, …; auto: a GPU where there is one.")] = "auto"
    dtype: Annotated[
        str | None,
        About("float32, bfloat16 or float16 (fp32, bf16, fp16 too), or auto; None: auto, the checkpoint's own."),
    ] = None
    ops: Annotated[str, About("auto, reference, fused, cpu or triton operations; auto: the fastest that can run.")] = (
        "auto"
    )
    quantize: Annotated[
        str | None,
        About("Pack weights while loading: int8, fp8, int4, int4-fp8, nvfp4 or int4-small."),
    ] = None
    memory_limit: Annotated[
        int | None,
        About("Bytes of weights on the device; what is above is streamed from the host in each pass."),
    ] = None
    adapters: Annotated[
        Mapping[str, str | Path] | None,
        About("Adapters beside the weights, as folders by the names that requests ask for."),
    ] = None
    calibration: Annotated[
        str | Path | None,
        About("A file of `sfumato calibrate`, for how sure decisions are; None: the one beside the checkpoint."),
    ] = None

    def __post_init__(self) -> None:
        if isinstance(self.dtype, str):
            object.__setattr__(self, "dtype", None if self.dtype == "auto" else dtype_name(self.dtype))
        object.__setattr__(self, "adapters", _folders(self.adapters))
        if isinstance(self.calibration, os.PathLike):
            object.__setattr__(self, "calibration", os.fspath(self.calibration))
        if isinstance(self.model, os.PathLike) and not isinstance(self.model, Path):
            object.__setattr__(self, "model", Path(self.model))
        for name, option in LOAD_OPTIONS.items():
            value = getattr(self, name)
            kinds: tuple[type, ...] = (str, Path) if name == "model" else (option.kind,)
            if name == "adapters":
                continue
            is_right = (value is None and option.is_optional) or isinstance(value, kinds)
            if not is_right or isinstance(value, bool):
                words = {"model": "a folder, a file or a name", "memory_limit": "a whole number of bytes"}
                words["calibration"] = "the path of a file"
                expected = words.get(name, option.about.sentence.partition(";")[0].rstrip("."))
                raise InputError(f"{name} is {reprlib.repr(value)}; give {expected}", option=name)

    def __repr__(self) -> str:
        return repr_of(self)


def _folders(adapters: Any) -> dict[str, str] | None:
    """Names and folders of adapters, as they are kept; InputError for anything else. None: there are none."""
    if adapters is None:
        return None
    is_right = isinstance(adapters, Mapping) and all(
        isinstance(name, str) and name and isinstance(folder, str | os.PathLike) for name, folder in adapters.items()
    )
    if not is_right:
        raise InputError(
            f'adapters is {reprlib.repr(adapters)}; give folders by names, as in {{"mine": "run/adapter"}}',
            option="adapters",
        )
    return {name: os.fspath(folder) for name, folder in adapters.items()} or None


LOAD_OPTIONS = declared(LoadOptions)
"""Every option of `LoadOptions` by its name, in their order."""
