"""Factors of experts in a file of peft's: stacked in two matrices, one expert after the other, or as our own stacks.

peft (`target_parameters`) folds the experts of a stack [E, O, I] into the rank: A is [E R, I], experts outermost, and
B is [O, R E], experts innermost. Before 0.19.1 it took O for inputs: A is [E R, O], B is [I, R E]. With both weights
of a layer adapted the one lies within the other, as `experts.base_layer`; shapes say which is which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.checkpoints.shards import Stored, short
from sfumato.errors import CheckpointError
from sfumato.model.adapters import Factors

_STACKS = ("gate_up_proj", "down_proj")
_EXPERTS = re.compile(r"(?P<experts>layers\.\d{1,6}\.experts)(?P<rest>(?:\.\w+){0,2})", re.ASCII)
_APART = re.compile(r"\.(?P<expert>\d{1,6})\.(?P<part>gate_proj|up_proj|gate_up_proj|down_proj)", re.ASCII)


class Lying(NamedTuple):
    """How a pair of factors lies in a file."""

    weight: str
    """The model's name of the stack."""
    how: str
    """"turned" or "straight" of peft, "stack" as [E, R, I] and [E, O, R], or one expert's "gate", "up", "whole"."""
    experts: int
    expert: int | None = None

    def rank(self, a: Stored) -> int:
        """Of one expert."""
        if self.how in ("turned", "straight"):
            return a.shape[0] // self.experts
        return a.shape[-2]

    def path(self, module: str) -> str:
        """What patterns of peft call the weight whose factors lie at this module."""
        leaf = self.weight.rpartition(".")[2]
        return module if module.endswith(f".{leaf}") else f"{module.removesuffix('.base_layer')}.{leaf}"


ExpertPart = tuple[Lying, Tensor, Tensor, float]
"""How a pair lies, A, B, and what their product is multiplied with."""


def is_of_experts(module: str) -> bool:
    """Whether this is where factors of experts lie."""
    return ".experts" in module


def lying_of(
    module: str, a: Stored, b: Stored, shapes: Mapping[str, tuple[int, ...]], is_turned: bool | None, source: str
) -> Lying:
    """How a pair at this module lies. CheckpointError where that cannot be, or cannot be known.

    `shapes` are the model's, by weight; `is_turned`: the writer has peft's layout since 0.19.1, None: nobody knows."""
    match = _EXPERTS.fullmatch(module)
    names = [f"{match['experts']}.{leaf}" for leaf in _STACKS] if match else []
    if match is None or any(name not in shapes for name in names):
        raise CheckpointError(
            f"{source} changes {short(module)}, which this model does not have; it is for another model"
        )
    rest = match["rest"]
    if apart := _APART.fullmatch(rest):
        ways = _apart(names, shapes, int(apart["expert"]), apart["part"], a, b)
    elif rest in ("", ".base_layer"):
        ways = [way for name in names for way in _folded(name, shapes[name], a, b)]
    elif rest[1:] in _STACKS:
        name = f"{match['experts']}{rest}"
        ways = _stacked(name, shapes[name], a, b) or _folded(name, shapes[name], a, b)
    else:
        ways = []
    if is_turned is not None and len(ways) == 2:  # of a square weight
        ways = [way for way in ways if (way.how == "turned") == is_turned]
    if len(ways) == 1:
        return ways[0]
    if not ways:
        stacks = " and ".join(f"{name.rpartition('.')[2]} {list(shapes[name])}" for name in names)
        raise CheckpointError(
            f"{source} has factors {list(a.shape)} and {list(b.shape)} for {short(module)}, which fit none of "
            f"this model's {stacks}; it is for another model"
        )
    raise CheckpointError(
        f"{source} has factors of square experts ({short(module)}) and does not say which way they lie; put "
        "peft_version, of the peft that wrote it, into adapter_config.json"
    )


def _folded(name: str, shape: tuple[int, ...], a: Stored, b: Stored) -> list[Lying]:
    count, outputs, inputs = shape
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % count or not a.shape[0]:
        return []
    sides = a.shape[1], b.shape[0]
    ways = []
    if sides == (inputs, outputs):
        ways.append(Lying(name, "turned", count))
    if sides == (outputs, inputs):
        ways.append(Lying(name, "straight", count))
    return ways


def _stacked(name: str, shape: tuple[int, ...], a: Stored, b: Stored) -> list[Lying]:
    count, outputs, inputs = shape
    if len(a.shape) != 3 or (a.shape[0], a.shape[2]) != (count, inputs) or b.shape != (count, outputs, a.shape[1]):
        return []
    return [Lying(name, "stack", count)]


def _apart(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], expert: int, part: str, a: Stored, b: Stored
) -> list[Lying]:
    name = names[part == "down_proj"]
    count, outputs, inputs = shapes[name]
    outputs = outputs // 2 if part in ("gate_proj", "up_proj") else outputs
    is_right = len(a.shape) == 2 and a.shape[1] == inputs and b.shape == (outputs, a.shape[0]) and a.shape[0] > 0
    how = {"gate_proj": "gate", "up_proj": "up"}.get(part, "whole")
    return [Lying(name, how, count, expert)] if is_right and expert < count else []


def factors_of_experts(shape: tuple[int, ...], parts: Sequence[ExpertPart]) -> Factors:
    """The factors of a stack [E, O, I], of what lies in the file.

    CheckpointError where two parts say it differently."""
    lying, a, b, scale = parts[0]
    ways = {part[0].expert is None for part in parts}
    if len(ways) > 1 or (lying.expert is None and len(parts) > 1):
        raise CheckpointError(f"{lying.weight} has factors in more than one layout; one of them must go")
    if lying.expert is None:
        count, rank = lying.experts, b.shape[-1] // lying.experts
        if lying.how == "stack":
            return Factors(a, b.mT.contiguous(), scale)
        experts_outer = a.reshape(count, rank, a.shape[1])
        experts_inner = b.reshape(b.shape[0], rank, count).permute(2, 1, 0).contiguous()
        if lying.how == "turned":
            return Factors(experts_outer, experts_inner, scale)
        return Factors(experts_inner, experts_outer, scale)
    return _together(shape, parts)


def _together(shape: tuple[int, ...], parts: Sequence[ExpertPart]) -> Factors:
    """Experts that lie apart, as one stack: those that are missing are zeros, and where scales differ they are in b.

    Gate and up of an expert are the two halves of one weight: with one A they share its rank, with two they have half
    of a double one each."""
    count, outputs, inputs = shape
    scale = parts[0][3]
    by_expert: dict[int, list[ExpertPart]] = {}
    for lying, a, b, own in parts:
        by_expert.setdefault(lying.expert or 0, []).append(
            (lying, a, b if own == scale else b.float() * own / scale, own)
        )
    stacked = {expert: _one_expert(outputs, some) for expert, some in by_expert.items()}
    rank = max(len(a) for a, _ in stacked.values())
    dtype = parts[0][1].dtype
    whole_a, whole_b = torch.zeros(count, rank, inputs, dtype=dtype), torch.zeros(count, rank, outputs, dtype=dtype)
    for expert, (a, b) in stacked.items():
        whole_a[expert, : len(a)], whole_b[expert, : len(b)] = a, b
    return Factors(whole_a, whole_b, scale)


def _one_expert(outputs: int, parts: Sequence[ExpertPart]) -> tuple[Tensor, Tensor]:
    """The factors [R, I] and [R, O] of one expert."""
    halves: dict[str, tuple[Tensor, Tensor]] = {lying.how: (a, b) for lying, a, b, _ in parts}
    if "whole" in halves and len(parts) == 1:
        a, b = halves["whole"]
        return a, b.mT
    if "whole" in halves:
        raise CheckpointError(f"{parts[0][0].weight} has gate and up of an expert apart and together; one must go")
    is_one = len(halves) == 2 and torch.equal(halves["gate"][0], halves["up"][0])
    first = {"gate": 0, "up": outputs // 2}
    if is_one:
        return halves["gate"][0], torch.cat([halves[how][1] for how in ("gate", "up")]).mT
    rows = []
    for how, (a, b) in halves.items():
        wide = torch.zeros(len(a), outputs, dtype=b.dtype)
        wide[:, first[how] : first[how] + len(b)] = b.mT
        rows.append((a, wide))
    return torch.cat([a for a, _ in rows]), torch.cat([b for _, b in rows])
