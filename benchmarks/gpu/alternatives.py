"""The choices that are tried, and what a pass looks up. A new one is a line here.

Tile sizes are settings of `tuning`; one that an operation does not know changes nothing, and is not chosen. What is no
number is a function that stands in another's place (`APART`); one that this tree does not have is told and left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import Any

from sfumato.model.config import ModelConfig
from sfumato.model.network import Model

Config = dict[str, int]

_DENSE: tuple[Config, ...] = (
    {"BLOCK_N": 64},
    {"BLOCK_M": 64},
    {"BLOCK_N": 64, "BLOCK_M": 256},
    {"BLOCK_K": 128, "num_stages": 3},
    {"num_stages": 3},
    {"num_stages": 5},
    {"num_warps": 4},
)
_EXPERTS: tuple[Config, ...] = (
    {"BLOCK_N": 64},
    {"BLOCK_N": 256, "num_warps": 8},
    {"BLOCK_K": 128, "num_stages": 3},
    {"num_stages": 3},
    {"num_stages": 5},
    {"num_warps": 8},
)
_SMALL: tuple[Config, ...] = ({"num_warps": 4}, {"num_warps": 16})
ALTERNATIVES: dict[str, tuple[Config, ...]] = {
    "linear": _DENSE,
    "gate_up": _DENSE,
    # The rows of a tile are cut for both products of the experts.
    "experts_gate_up": (
        {"BLOCK_M": 16},
        {"BLOCK_M": 64},
        {"BLOCK_M": 64, "num_warps": 8},
        {"BLOCK_M": 128, "num_warps": 8},
        *_EXPERTS,
    ),
    "experts_down": _EXPERTS,
    "attention": ({"BLOCK_M": 64}, {"BLOCK_N": 32}, {"SPLITS": 1}, {"SPLITS": 2}, {"num_warps": 4}, {"num_stages": 3}),
    "read_out": ({"BLOCK_N": 128}, {"TILE": 256, "BLOCK_N": 128}, {"PART": 32}, {"BLOCK_K": 32, "num_stages": 4}),
    "read_out_walk": ({"BLOCK_K": 32}, {"STAGES": 3}, {"num_warps": 8}),
    "soft_embedding": (
        {"BLOCK_D": 128, "SPLITS": 3, "num_stages": 4},
        {"SPLITS": 3},
        {"SPLITS": 12},
        {"BLOCK_K": 32},
        {"num_stages": 3},
    ),
    "between": _SMALL,
    "end": _SMALL,
    "heads": _SMALL,
    "pdl": ({"ON": 1},),  # each kernel launched while the one before it drains
    "attention_combine": ({"LAST": 0},),  # a kernel joins the parts, not the program that comes last
}


@dataclass(frozen=True)
class Entry:
    """What a pass looks up in the table: an operation, a format of its weights ("": none), their shape."""

    op: str
    form: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.form or 'bf16'}"

    @property
    def dtype(self) -> str:
        """As the table spells it."""
        return f"{self.form} bfloat16".strip()


def entries(config: ModelConfig, kind: str) -> list[Entry]:
    """Of a recipe, the most expensive first. What has no weights in few bits is tried with int4 alone."""
    width, inner, words = config.hidden_size, config.intermediate_size, config.vocab_size
    count, hidden = config.num_experts, config.expert_size
    experts = {"bf16": "", "int4-fp8": "int4"}.get(kind, kind)
    dense = {"bf16": "", "int4": "int8", "int4-fp8": "fp8"}.get(kind, kind)
    sizes = {layer.head_dim: layer for layer in config.layers}
    cases = [
        Entry("experts_gate_up", experts, (count, 2 * hidden, width)),
        Entry("experts_down", experts, (count, width, hidden)),
    ]
    if kind == "int4":
        cases += [Entry(op, "", (words, width)) for op in ("soft_embedding", "read_out", "read_out_walk")]
    for layer in sizes.values():
        queries, keys = config.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
        joined = queries + keys * (2 if layer.is_sliding else 1)
        cases += [Entry("linear", dense, (joined, width)), Entry("linear", dense, (width, queries))]
    cases += [Entry("gate_up", dense, (inner, width)), Entry("linear", dense, (width, inner))]
    if kind == "int4":
        cases += [Entry("pdl", "", (1,)), *(Entry("attention", "", (size,)) for size in sizes)]
        cases += [Entry("attention_combine", "", (size,)) for size in sizes]
        small = [("between", width), ("end", width), *(("heads", size) for size in sizes)]
        cases += [Entry(op, "", (at,)) for op, at in small if find_spec(f"sfumato.ops.triton.{op}")]
    return list(dict.fromkeys(cases))


# ---- what is no number -----------------------------------------------------------------------------------------------

APART: dict[str, tuple[str, Callable[..., Any]]] = {
    "one stream": ("block._side_by_side", lambda device, one, two: (one(), two())),
    "products not split": ("linear.splits", lambda *args, **more: 1),
}
"""What stands in the place of a function of `sfumato.ops.triton`."""
WITHOUT = {"operations one by one": ("block",), "the end of a step by torch": ("noise", "conclude_")}
"""Operations that are left to what they stand for."""


@contextmanager
def standing(name: str, model: Model) -> Iterator[bool]:
    """Within, the model runs with this choice; False where there is nothing to choose."""
    ops = model.ops
    if name in WITHOUT:
        known = {field.name for field in fields(ops)}
        left = [op for op in WITHOUT[name] if op in known and getattr(ops, op) is not None]
        nothing: dict[str, Any] = dict.fromkeys(left)
        model.use_(replace(ops, **nothing))
        try:
            yield bool(left)
        finally:
            model.use_(ops)
        return
    file, _, function = APART[name][0].partition(".")
    full = f"sfumato.ops.triton.{file}"
    module = importlib.import_module(full) if find_spec("triton") and find_spec(full) else None
    if module is None or not hasattr(module, function):
        yield False
        return
    before = getattr(module, function)
    setattr(module, function, APART[name][1])
    try:
        yield True
    finally:
        setattr(module, function, before)
