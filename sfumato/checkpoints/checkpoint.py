"""Other people's checkpoints, read as ours: one file a format, and here what all of them give.

A reader opens a file or a folder, checks every header, and names each tensor as the released checkpoint does. No weight
is read before it is asked for, a part at a time; nothing in a file is executed. Which format a path has: `detect`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.ops.packed import Packed

FALLBACK = "int8"
"""The format of what has no codes of ours: faithful to 4 bits and less, and half of bfloat16."""


@dataclass(frozen=True)
class Entry:
    """A tensor under its released name, wherever and however it is stored."""

    name: str
    shape: tuple[int, ...]
    """As the released checkpoint has it: [O, I], or [E, O, I] for a stack of experts."""
    nbytes: int
    """In the file: what progress counts."""
    stored: str
    """As the file calls it: "Q4_K", "BF16", "nvfp4"."""
    read: Callable[[int, int], Tensor]
    """read(first, last): the values of these places of the first axis, floating point on the CPU, exactly what the
    format says they are (in float32, unless a smaller dtype holds them exactly)."""
    packed: Callable[[int, int], Packed] | None = None
    """The same as codes of ours, where one of our formats says the same; None where none does."""
    fallback: str | None = None
    """The format of `quant.formats` in which it is held where `packed` is None although the file has it in fewer bits:
    it is rounded once more, and never widened. None: it is stored as plain floats, or has codes of ours."""


@dataclass(frozen=True)
class StoredVocabulary:
    """A tokenizer that a file carries within itself (GGUF)."""

    tokens: list[str]
    kinds: list[int]
    """GGUF's: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte."""
    merges: list[str]
    special: Mapping[str, int] = field(default_factory=dict)
    """"bos", "eos", "pad", "unk" to ids."""
    template: str | None = None
    """The chat template."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, opened and checked: headers alone have been read."""

    path: Path
    format: str
    """As a person calls it: "GGUF", "MLX affine 4-bit"."""
    config: dict[str, Any]
    """What config.json would say, for `ModelConfig.from_dict`."""
    entries: dict[str, Entry]
    """By released name."""
    generation: dict[str, Any] = field(default_factory=dict)
    """What generation_config.json would say."""
    vocabulary: StoredVocabulary | None = None
    """None: the tokenizer's files lie in the folder."""
    notices: tuple[str, ...] = ()
    """One sentence for each kind of thing that is left aside."""
    merged: tuple[Path, ...] = ()
    """Folders of adapters that entries have merged in (`checkpoints.merged`)."""


def in_full(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every weight as plain numbers: what is trained, calibrated or saved again has no codes.

    Values are those that the file says, never rounded once more."""
    entries = {name: replace(entry, packed=None, fallback=None) for name, entry in checkpoint.entries.items()}
    return replace(checkpoint, entries=entries)


@dataclass(frozen=True)
class FormatReader:
    """How folders of one format are known and opened; each file of `formats` gives one."""

    name: str
    """As a sentence lists it: "awq"."""
    reads: Callable[[Path, dict[str, Any]], bool]
    """reads(folder, quantization): whether it is this format, where config.json says so of its quantization ({} where
    it says nothing)."""
    open: Callable[[Path, dict[str, Any]], Checkpoint]
    """open(folder, config): the checkpoint, its headers checked; `config` is what config.json says."""
