"""The state of the canvases under way, on the device, and how tensors travel to the device and back.

`step` moves the state on. Nothing here waits for the device but `HostCopy.wait`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfumato.model.network import Model
from sfumato.options import MOST_REPEATS, MOST_STEPS
from sfumato.sampling.rules import RowRules, Rules


@dataclass
class Canvases:
    """The state of X rows' canvases. The last row is scratch: what fills up a recorded batch is computed there."""

    canvas_XL: Tensor
    soft_XLD: Tensor
    pin_XL: Tensor
    """Tokens that stay fixed, -1 where free."""
    argmax_XL: Tensor
    """-1 before the first step."""
    still_XL: Tensor
    """For how many steps before the last one a position had the same token."""
    recent_XWL: Tensor
    """The argmax tokens of the last W steps, the n-th at place n mod W. Only steps with further rules enter theirs: a
    row that has one has it in all the steps of a canvas."""
    entropy_XL: Tensor
    accepted_XL: Tensor
    step_X: Tensor
    """Steps taken on this canvas."""
    is_done_X: Tensor
    is_finite_X: Tensor
    """Rows whose numbers were finite in every step on this canvas. One that is not is done, and never committed."""
    banned_XL: Tensor
    """Positions that may not end the answer (`min_tokens`), nor take what else is banned there."""
    rng_counter_X4: Tensor
    """Seed (low, high), request and canvas: what the noise is counted from, beside the step."""
    temperature_XS: Tensor
    """The temperature of each step, of as many as a request may ask for."""
    rules: RowRules
    room_X: Tensor
    """Leading positions that can become part of the answer."""
    early_X: Tensor
    """Rows whose leading positions may settle before the rest."""
    settled_X: Tensor
    """How many have."""
    eos_E: Tensor
    has_pins: bool
    """Whether any row of the next steps has one."""
    has_early: bool
    has_further_rules: bool = False
    """Whether any row of the next steps has a rule that the compiled ends of a step do not know."""

    @classmethod
    def allocate(
        cls,
        model: Model,
        rules: Sequence[Rules],
        seeds: Sequence[int],
        requests: Sequence[int],
        length: int | None = None,
        early: Sequence[bool] = (),
        has_pins: bool = False,
    ) -> Canvases:
        """One row for each of these rules, and the scratch row. `length` None: the model's own."""
        config, size = model.config, len(rules) + 1
        rules = [*rules, rules[-1]]
        words = [[s & 0xFFFFFFFF, s >> 32, r, 0] for s, r in zip([*seeds, 0], [*requests, 0], strict=True)]
        length, steps = length or config.canvas_length, max(MOST_STEPS, *(r.max_steps for r in rules))

        with torch.device(model.device):
            return cls(
                canvas_XL=torch.zeros(size, length, dtype=torch.long),
                soft_XLD=torch.zeros(size, length, config.hidden_size, dtype=model.dtype),
                pin_XL=torch.full((size, length), -1),
                argmax_XL=torch.full((size, length), -1),
                still_XL=torch.zeros(size, length, dtype=torch.long),
                recent_XWL=torch.zeros(size, MOST_REPEATS, length, dtype=torch.int32),
                entropy_XL=torch.zeros(size, length),
                accepted_XL=torch.zeros(size, length, dtype=torch.bool),
                step_X=torch.zeros(size, dtype=torch.long),
                is_done_X=torch.zeros(size, dtype=torch.bool),
                is_finite_X=torch.ones(size, dtype=torch.bool),
                banned_XL=torch.zeros(size, length, dtype=torch.bool),
                rng_counter_X4=torch.tensor(words),
                temperature_XS=torch.stack([_temperatures_of(r, steps + 1) for r in rules]).to(model.device),
                rules=RowRules.of(rules, model.device),
                room_X=torch.full((size,), length),
                early_X=torch.tensor([*early, *[False] * (size - len(early))]),
                settled_X=torch.zeros(size, dtype=torch.long),
                eos_E=torch.tensor(config.eos_ids, dtype=torch.long),
                has_pins=has_pins or any(early),
                has_early=any(early),
                has_further_rules=any(r.has_further for r in rules),
            )

    def seat_(self, rows: list[int], rules: Sequence[Rules], seeds: Sequence[int], early: Sequence[bool]) -> None:
        """Give rows to new requests. No request's numbers change a shape, because all rows share it."""
        device, columns = self.step_X.device, list(zip(self.rules.columns, RowRules.of(rules).columns, strict=True))
        counters = [
            [seed & 0xFFFFFFFF, seed >> 32, 0, 0, is_early] for seed, is_early in zip(seeds, early, strict=True)
        ]
        temperature_NS = torch.stack([_temperatures_of(own, self.temperature_XS.shape[1]) for own in rules])
        # One copy for all integers, and one for all that is not.
        whole = [pair for pair in columns if not pair[0].is_floating_point()]
        real = [pair for pair in columns if pair[0].is_floating_point()]
        integers = torch.cat([torch.tensor(counters), *(new_N[:, None] for _, new_N in whole)], 1)
        reals = torch.stack([new_N.to(self.temperature_XS.dtype) for _, new_N in real], 1)
        at_N, integer_NI, real_NF, temperature_NS = (
            to_device(x, device) for x in (torch.tensor(rows), integers, reals, temperature_NS)
        )
        for state_X, new_N in (
            (self.rng_counter_X4, integer_NI[:, :4]),
            (self.early_X, integer_NI[:, 4].bool()),
            (self.temperature_XS, temperature_NS),
            *((column_X, integer_NI[:, 5 + n]) for n, (column_X, _) in enumerate(whole)),
            *((column_X, real_NF[:, n]) for n, (column_X, _) in enumerate(real)),
        ):
            state_X.index_copy_(0, at_N, new_N)

    def resized(self, rows: int) -> Canvases:
        """The same rows with room for so many of them."""
        if rows + 1 == len(self.step_X):
            return self
        kept = min(rows, len(self.step_X) - 1)

        def wider(old: Tensor) -> Tensor:
            new = old[-1:].repeat(rows + 1, *[1] * (old.dim() - 1))  # the last is scratch
            new[:kept] = old[:kept]
            return new

        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: wider(old) for name, old in values.items() if name.split("_")[-1].startswith("X")}
        values["rules"] = RowRules(*map(wider, self.rules.columns))
        return Canvases(**values)

    def begin_(
        self,
        rows: list[int],
        fresh_BL: Tensor,
        pin_BL: Tensor | None,
        canvases: list[int],
        banned_BL: Tensor | None = None,
        rooms: list[int] | None = None,
    ) -> None:
        """Give these rows a canvas of noise (or of what it is to start from), pins (None: no row has one) in place.

        Tensors may lie on the host: nothing here waits for the device."""
        device = self.step_X.device
        at_B, canvas_B, room_B = to_device(torch.tensor([rows, canvases, rooms or rows]), device)  # one copy for three
        canvas_BL = to_device(fresh_BL, device)
        if pin_BL is None:
            self.pin_XL.index_fill_(0, at_B, -1)
        else:
            pin_BL = to_device(pin_BL, device)
            canvas_BL = torch.where(pin_BL >= 0, pin_BL, canvas_BL)
            self.pin_XL.index_copy_(0, at_B, pin_BL)
        self.canvas_XL.index_copy_(0, at_B, canvas_BL)
        if banned_BL is None:
            self.banned_XL.index_fill_(0, at_B, False)
        else:
            self.banned_XL.index_copy_(0, at_B, to_device(banned_BL, device))
        self.argmax_XL.index_fill_(0, at_B, -1)
        self.soft_XLD.index_fill_(0, at_B, 0.0)
        self.step_X.index_fill_(0, at_B, 0)
        self.is_done_X.index_fill_(0, at_B, False)
        self.is_finite_X.index_fill_(0, at_B, True)
        self.settled_X.index_fill_(0, at_B, 0)
        self.rng_counter_X4[:, 3].index_copy_(0, at_B, canvas_B)
        if rooms is not None:
            self.room_X.index_copy_(0, at_B, room_B)


@functools.lru_cache(64)
def _temperatures_of(rules: Rules, width: int) -> Tensor:
    """The temperatures of a canvas's steps, the last one repeated up to this width.

    Kept: most requests have the checkpoint's rules."""
    temperature = [rules.schedule.temperature(step) for step in range(rules.max_steps + 1)]
    temperature_S = torch.full((width,), temperature[-1], device="cpu")
    temperature_S[: len(temperature)] = torch.tensor(temperature, device="cpu")
    return temperature_S


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device. From the host it comes in the order of the device's work, and nobody waits for it."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class HostCopy(NamedTuple):
    """A tensor on its way to the host."""

    values: Tensor
    event: torch.Event | None
    """None: there is nothing to wait for."""

    @classmethod
    def of(cls, x: Tensor) -> HostCopy:
        """Begin to copy; the device's work goes on meanwhile. A tensor on the host is not copied."""
        if x.device.type == "cpu":
            return cls(x, None)
        values = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        values.copy_(x, non_blocking=True)
        event = torch.Event(x.device)
        event.record()
        return cls(values, event)

    def wait(self) -> npt.NDArray[np.generic]:
        """The values, when they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.values.numpy()
