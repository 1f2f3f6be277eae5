"""adapter_config.json: what peft's options say of an adapter's numbers, and the kinds of adapters that are refused.

Which weights an adapter changes its tensors say alone. The file comes from outside: its patterns are regular
expressions, of which only those are tried that end in bounded time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.checkpoints.shards import short
from sfumato.errors import CheckpointError
from sfumato.model.config import read_json

CONFIG = "adapter_config.json"
LAYOUT = "0.21.2"
"""The version of peft whose layout is written."""
_TURNED = (0, 19, 1)
"""The first version of peft that has inputs and outputs of a stack of experts the right way round."""
_MERGED = "merge it with peft (merge_and_unload, then save_pretrained) and load that model"
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in its factors (lora_bias)",
    "fan_in_fan_out": "fan_in_fan_out, for weights that lie transposed, which this model has none of",
    "layer_replication": "layer_replication, which makes another model of its base",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "trainable_token_indices": "trainable tokens (trainable_token_indices)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA, which changes the base",
}
"""Options of peft that change what an adapter computes, with their names in a sentence."""
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin (init_lora_weights) that change the base beside the adapter."""
_MAX_PATTERNS, _MAX_PATTERN, _MAX_REPEATS = 16, 200, 2
_LITERAL = re.compile(r"\^?(?:\w|\.|\\\.)+", re.ASCII)
_BOUNDED = re.compile(r"(?:\w|[.^$|()\[\]-]|\\[.dw])(?:(?:\w|[.^$|()\[\]-]|\\[.dw])|(?<!\))[*+?])*", re.ASCII)


@dataclass(frozen=True)
class Pattern:
    """Numbers by names of modules, as peft looks them up: the first key counts that a name ends with, or matches."""

    default: float
    ends: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """Literal keys, with their place in the order."""
    whole: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """Those that must be the whole name."""
    expressions: tuple[tuple[int, re.Pattern[str], float], ...] = ()

    @classmethod
    def of(cls, raw: Any, default: float, at: str) -> Pattern:
        """CheckpointError where it is no mapping to numbers, or has an expression that might take for ever."""
        if not isinstance(raw or {}, dict):
            raise CheckpointError(f"{at} is {short(raw)}; it must map names of modules to numbers")
        ends: dict[str, tuple[int, float]] = {}
        whole: dict[str, tuple[int, float]] = {}
        expressions: list[tuple[int, re.Pattern[str], float]] = []
        for order, (key, value) in enumerate((raw or {}).items()):
            number = order, _number(value, f"{at}[{short(key)!r}]")
            if _LITERAL.fullmatch(key):
                (whole if key[0] == "^" else ends).setdefault(key.removeprefix("^").replace("\\.", "."), number)
            else:
                if len(expressions) == _MAX_PATTERNS:
                    raise CheckpointError(f"{at} has more than {_MAX_PATTERNS} regular expressions; name the modules")
                expressions.append((order, _bounded(key, at), number[1]))
        return cls(default, ends, whole, tuple(expressions))

    def __getitem__(self, name: str) -> float:
        hits = [self.whole[name]] if name in self.whole else []
        parts = name.split(".")
        tails = (".".join(parts[first:]) for first in range(len(parts)))
        hits += [self.ends[tail] for tail in tails if tail in self.ends]
        hits += [(order, value) for order, expression, value in self.expressions if expression.match(name)]
        return min(hits)[1] if hits else self.default


def _bounded(key: str, at: str) -> re.Pattern[str]:
    """A regular expression without repeated groups, and with few repetitions."""
    is_small = len(key) <= _MAX_PATTERN and key.count("*") + key.count("+") <= _MAX_REPEATS
    try:
        if not is_small or not _BOUNDED.fullmatch(key):
            raise ValueError
        return re.compile(rf"(?:.*\.)?(?:{key})$", re.ASCII)
    except (ValueError, re.error) as error:
        raise CheckpointError(
            f"{at} has the pattern {short(key)!r}, which is not tried here; name the modules instead"
        ) from error


@dataclass(frozen=True)
class PeftOptions:
    """What adapter_config.json says, checked."""

    ranks: Pattern
    alphas: Pattern
    is_rs: bool
    """Scaled by the root of the rank."""
    base: str | None
    """The model that it was made for, as its maker called it."""
    is_of_peft: bool
    """Whether peft wrote it: it runs transformers' modules, encoder and decoder each with factors of their own."""
    is_tied: bool
    """A head that is tied to a replaced embedding is replaced with it."""
    is_turned: bool | None
    """Whether factors of experts lie as peft has them since 0.19.1; None: the file does not say."""

    def scale(self, name: str, rank: int) -> float:
        """What the product of the factors of a module, as the file names it, is multiplied with."""
        return self.alphas[name] / (math.sqrt(rank) if self.is_rs else rank)


def read_options(folder: Path) -> PeftOptions:
    """What the folder's adapter_config.json says. CheckpointError names what is missing, wrong or not run here."""
    path = folder / CONFIG
    raw = read_json(path)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path} says peft_type {short(kind)}; only LORA is run here: {_MERGED}")
    for name, what in _REFUSED.items():
        if raw.get(name):
            raise CheckpointError(f"{path} asks for {what}; only LoRA without it is run here: {_MERGED}")
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{path} says bias {short(raw['bias'])!r}; this model has no biases: train with 'none'")
    begin = raw.get("init_lora_weights")
    if isinstance(begin, str) and begin.startswith(_BASE_CHANGED):
        raise CheckpointError(
            f"{path} says init_lora_weights {short(begin)!r}, which has changed the base too; save it with "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    rank, alpha = (_number(raw.get(name), f"{path}: {name}") for name in ("r", "lora_alpha"))
    base, version = raw.get("base_model_name_or_path"), raw.get("peft_version")
    return PeftOptions(
        Pattern.of(raw.get("rank_pattern"), rank, f"{path}: rank_pattern"),
        Pattern.of(raw.get("alpha_pattern"), alpha, f"{path}: alpha_pattern"),
        bool(raw.get("use_rslora")),
        short(base) if isinstance(base, str) and base and base.isprintable() else None,
        "auto_mapping" in raw or version is not None,
        bool(raw.get("ensure_weight_tying")),
        _is_turned(version),
    )


def _number(value: Any, at: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 31
    if not is_number or not value > 0:
        raise CheckpointError(f"{at} is {short(value)}; it must be a number above 0 and below 2^31")
    return float(value)


def _is_turned(version: Any) -> bool | None:
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", version, re.ASCII) if isinstance(version, str) else None
    return None if numbers is None else tuple(int(number or 0) for number in numbers.groups()) >= _TURNED
