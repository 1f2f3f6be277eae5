"""Low-rank factors beside a weight: what an adapter adds to a product, for several adapters in one pass.

y = x Wᵀ + (x Aᵀ) B, where each token has the factors of its own adapter. A stack of them lies beside the base, one a
*lane*; which lane a token has is a fact of the pass (`Lanes`), which all adapted weights of a model read through one
`LaneSwitch`. So a batch of rows with different adapters is one pass, and no operation takes a further argument.

This is the form that every implementation packs, and the plain way to multiply with it. What it deliberately lacks:
names, files and loading (`model.adapters`), and dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.ops.contract import Matrix, dense, round_input, tensors_of

NO_LANE = -1
"""The lane of a token that no adapter changes."""


class LanePair(NamedTuple):
    """The lanes of a row: that of what it encodes, and that of its canvas."""

    encode: int = NO_LANE
    denoise: int = NO_LANE


class LaneRun(NamedTuple):
    """Tokens of a pass, one behind the other, that have one lane."""

    first: int
    size: int
    lane: int


class Lanes:
    """The lane of each token of a pass, in the order in which its products meet them, [N] flattened.

    `runs` say it on the host: in order, neighbours of one lane joined, without those of `NO_LANE`. `lane_N`, int64 on
    the device, says it of every token. `is_static`: only the device knows, since `lane_N` changes under a recorded
    step, and there are no runs."""

    def __init__(self, runs: tuple[LaneRun, ...], lane_N: Tensor, is_static: bool = False) -> None:
        self.runs, self.lane_N, self.is_static = runs, lane_N, is_static

    @classmethod
    def of(cls, rows: list[LanePair], encode: int, canvas: int, device: torch.device | str) -> Lanes:
        """Of a pass whose rows bring so many tokens to encode, and then so many positions of a canvas."""
        parts = [part for lane in rows for part in ((lane.encode, encode), (lane.denoise, canvas))]
        runs: list[LaneRun] = []
        at = 0
        for lane, count in parts:
            if count and runs and runs[-1].lane == lane:
                runs[-1] = runs[-1]._replace(size=runs[-1].size + count)
            elif count:
                runs.append(LaneRun(at, count, lane))
            at += count
        lane_N = torch.tensor([lane for lane, count in parts for _ in range(count)], dtype=torch.long, device=device)
        return cls(tuple(run for run in runs if run.lane != NO_LANE), lane_N)

    @property
    def has_any(self) -> bool:
        """Whether a token may have a lane."""
        return self.is_static or bool(self.runs)

    @property
    def common(self) -> int | None:
        """The lane that all tokens have; None where they have several, or only the device knows."""
        if self.is_static:
            return None
        if not self.runs:
            return NO_LANE
        is_one = len(self.runs) == 1 and self.runs[0].size == len(self.lane_N)
        return self.runs[0].lane if is_one else None


NOBODY = Lanes((), torch.empty(0, dtype=torch.long))
"""No token has a lane."""


class LaneSwitch:
    """Where a pass says which lanes its tokens have, before each of its blocks."""

    def __init__(self) -> None:
        self.lanes = NOBODY


@dataclass(frozen=True, eq=False)
class LowRank:
    """A weight [O, I], or a stack [E, O, I], in any form, with the factors of so many lanes S beside it."""

    base: Matrix
    a: Tensor
    """[S, R, I] or [S, E, R, I]: what x meets first. Zeros where a lane has no factors here, or fewer than R."""
    b: Tensor
    """[S, R, O] or [S, E, R, O]: outputs innermost."""
    switch: LaneSwitch
    scale: float = 1.0
    """Times the product of both; what is served has it in `b` already."""

    @property
    def shape(self) -> tuple[int, ...]:
        """See `contract.Weight`."""
        return tuple(self.base.shape)

    @property
    def nbytes(self) -> int:
        """See `contract.Weight`."""
        return sum(part.nbytes for part in self.tensors)

    @property
    def stored(self) -> str | None:
        """The base's."""
        return None if isinstance(self.base, Tensor) else self.base.stored

    @property
    def product(self) -> str | None:
        """The base's."""
        return None if isinstance(self.base, Tensor) else self.base.product

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The base's, then both stacks of factors."""
        return (*tensors_of(self.base), self.a, self.b)

    def each(self, change: Callable[[Tensor], Tensor]) -> LowRank:
        """This with every tensor changed."""
        base = change(self.base) if isinstance(self.base, Tensor) else self.base.each(change)
        return replace(self, base=base, a=change(self.a), b=change(self.b))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The plain weight for the lane that all tokens of the pass have; ValueError where they have several."""
        lane = self.switch.lanes.common
        if lane is None:
            raise ValueError("tokens of several adapters meet one plain weight; multiply with its base and factors")
        plain = dense(self.base, dtype)
        if lane == NO_LANE:
            return plain
        return (plain.float() + self.scale * self.b[lane].float().mT @ self.a[lane].float()).to(dtype)

    def round_input(self, x: Tensor) -> Tensor:
        """As the base's format has it; the factors meet x as it is."""
        return round_input(x, self.base)

    def __getitem__(self, expert: int) -> LowRank:
        """One matrix of a stack."""
        return replace(self, base=self.base[expert], a=self.a[:, expert], b=self.b[:, expert])


def plus_low_rank(y: Tensor, x: Tensor, weight: LowRank, token_M: Tensor | None = None) -> Tensor:
    """Y + (x Aᵀ) B, each token with the factors of its lane; the plain way, for any device, with gradients.

    x is [.., I] and y [.., O], both M tokens flattened: all of the pass, in its order, or those that `token_M` names
    by their number in the pass."""
    lanes = weight.switch.lanes
    if lanes.is_static:
        return _by_mask(y, x, weight, lanes.lane_N if token_M is None else lanes.lane_N[token_M])
    if not lanes.runs:
        return y
    if (lane := lanes.common) is not None:
        return y + _product(x, weight, lane)
    x_MI, y_MO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if token_M is None:
        parts, end = [], 0
        for run in lanes.runs:
            stop = run.first + run.size
            part = slice(run.first, stop)
            parts += [y_MO[end : run.first], y_MO[part] + _product(x_MI[part], weight, run.lane)]
            end = stop
        return torch.cat([*parts, y_MO[end:]]).view_as(y)
    lane_M = lanes.lane_N[token_M]
    for lane in dict.fromkeys(run.lane for run in lanes.runs):
        at = (lane_M == lane).nonzero()[:, 0]
        if len(at):
            y_MO = y_MO.index_add(0, at, _product(x_MI[at], weight, lane))
    return y_MO.view_as(y)


def _product(x: Tensor, weight: LowRank, lane: int) -> Tensor:
    """(x Aᵀ) B of one lane, in x's dtype."""
    inner = torch.nn.functional.linear(x, weight.a[lane].to(x.dtype)) * weight.scale
    return inner @ weight.b[lane].to(x.dtype)


def _by_mask(y: Tensor, x: Tensor, weight: LowRank, lane_M: Tensor) -> Tensor:
    """The same where no shape may hang on who has which lane: all lanes of every token, of which its own counts."""
    x_MI, y_MO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    for lane in range(len(weight.a)):
        y_MO = torch.where((lane_M == lane)[:, None], y_MO + _product(x_MI, weight, lane), y_MO)
    return y_MO.view_as(y)
