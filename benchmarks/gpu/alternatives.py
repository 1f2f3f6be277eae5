"""The choices that are tried, and what a pass looks up. All are settings of `tuning.using`: a new one is a line here.

A value that an operation does not know is tried too; it changes nothing, or cannot run, and is not chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.config import ModelConfig

Config = dict[str, int]

_DENSE: tuple[Config, ...] = (
    {"BLOCK_N": 64},
    {"BLOCK_M": 64},
    {"BLOCK_N": 64, "BLOCK_M": 64, "num_warps": 4},
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
ALTERNATIVES: dict[str, tuple[Config, ...]] = {
    "linear": _DENSE,
    "gate_up": _DENSE,
    # The rows of a tile are cut for both products.
    "experts_gate_up": ({"BLOCK_M": 16}, {"BLOCK_M": 64}, {"BLOCK_M": 64, "num_warps": 8}, *_EXPERTS),
    "experts_down": _EXPERTS,
    "attention": ({"BLOCK_M": 64}, {"BLOCK_N": 32}, {"SPLITS": 1}, {"SPLITS": 2}, {"num_warps": 4}, {"num_stages": 3}),
    "read_out": ({"BLOCK_N": 128}, {"TILE": 256, "BLOCK_N": 128}, {"PART": 32}, {"BLOCK_K": 32, "num_stages": 4}),
    "read_out_walk": ({"BLOCK_K": 32}, {"STAGES": 3}, {"num_warps": 8}),
    "soft_embedding": (
        {"BLOCK_D": 256, "num_stages": 3},
        {"SPLITS": 2},
        {"SPLITS": 4},
        {"BLOCK_K": 32},
        {"num_stages": 3},
    ),
}
WHOLE: dict[str, dict[str, Config]] = {
    "experts: tiles of 16 rows": {"experts_gate_up": {"BLOCK_M": 16}},
    "experts: tiles of 64 rows, 8 warps": {
        "experts_gate_up": {"BLOCK_M": 64, "num_warps": 8},
        "experts_down": {"num_warps": 8},
    },
    "experts: tiles of 128 rows, 8 warps": {
        "experts_gate_up": {"BLOCK_M": 128, "num_warps": 8},
        "experts_down": {"num_warps": 8},
    },
    "attention: nothing split": {"attention": {"SPLITS": 1}},
}
"""Judged by whole steps alone, at one canvas and at sixteen; told, not written into the table."""


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
    dense = {"int4": "int8", "bf16": ""}.get(kind, kind)
    found = [
        Entry("experts_gate_up", kind.replace("bf16", ""), (count, 2 * hidden, width)),
        Entry("experts_down", kind.replace("bf16", ""), (count, width, hidden)),
    ]
    for layer in {layer.head_dim: layer for layer in config.layers}.values():
        queries, keys = config.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
        joined = queries + keys * (2 if layer.is_sliding else 1)
        found += [Entry("linear", dense, (joined, width)), Entry("linear", dense, (width, queries))]
    found += [Entry("gate_up", dense, (inner, width)), Entry("linear", dense, (width, inner))]
    if kind == "int4":
        found += [Entry(op, "", (words, width)) for op in ("read_out", "soft_embedding", "read_out_walk")]
        found += [Entry("attention", "", (size,)) for size in sorted({layer.head_dim for layer in config.layers})]
    return found
