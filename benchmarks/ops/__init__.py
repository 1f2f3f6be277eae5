"""One file an operation: its cases at the sizes of "mid" and of the released model, and how they are all timed.

    python benchmarks/ops/experts.py --seconds 5 -o runs/bench/ops-experts.json

Every implementation that this machine can run stands in one table: time, share of the ceiling (bytes and operations of
the case at the best that the machine was measured to do), and error: relative, in the 2-norm, against the reference in
float32 on the same weights, beside that of plain PyTorch in bfloat16. What is quantised carries its quantisation in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from sfumato.errors import InputError
from sfumato.measure.machine import measure
from sfumato.measure.parts import part_row
from sfumato.measure.work import PLAIN, Work, duration
from sfumato.ops import load
from sfumato.ops.contract import Ops
from sfumato.quant.formats import Format, pack

Call = Callable[[], Tensor]
Named = dict[str, Any]


@dataclass
class Case:
    """One operation at one size. Weights and inputs are made in float32 with values that bfloat16 holds exactly."""

    name: str
    inputs: Named
    """Tensors; those of floats in `kept` stay float32, all others take the dtype that is measured."""
    weights: Named
    """What an implementation packs."""
    prepare: Callable[[Ops, Named, Named], Call]
    """(operations, inputs, weights) -> the call that is timed; it returns what the error is taken of."""
    flops: float
    kept: tuple[str, ...] = ()
    quantised: bool = True
    """Whether fewer bits change anything here."""
    moved: float = 0.0
    """Values read and written beside the weights."""
    read: float = 1.0
    """The share of the weights that is needed."""
    rows: Callable[[Named], Named] | None = None
    """The inputs of the first row alone: its answer may not depend on its batch."""
    dense: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that stay in the dtype whatever the weights are: read once, never packed."""

    def cost(self, kind: str) -> Work:
        value = 4.0 if kind == "float32" else 2.0
        stacks = sum(_stored(w, kind) for w in self.weights.values()) * self.read
        dense = sum(w.numel() for w in self.dense.values()) * value
        product = kind if kind in PLAIN else Format.named(kind).product or "bf16"
        return Work(stacks + dense + self.moved * value, {product: self.flops})

    def ready(self, ops: Ops, dtype: torch.dtype, kind: str = "", inputs: Named | None = None) -> Call:
        """The call for this implementation, everything packed; `kind` is a format's name, "" none."""
        weights = {name: w.to(dtype) for name, w in self.weights.items()}
        packed = {name: ops.pack(pack(w, kind) if kind else w) for name, w in weights.items()}
        return self.prepare(ops, self.cast(dtype, inputs), packed)

    def takes(self, kind: str) -> bool:
        """Whether weights of this format are another case, and groups of it divide these widths."""
        if not kind:
            return True
        group = Format.named(kind).group or 1
        return self.quantised and all(w.shape[-1] % group == 0 for w in self.weights.values())

    def cast(self, dtype: torch.dtype, inputs: Named | None = None) -> Named:
        inputs = {**(self.inputs if inputs is None else inputs), **self.dense}
        return {
            name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and name not in self.kept else x
            for name, x in inputs.items()
        }


def _stored(weight: Tensor, kind: str) -> float:
    """Bytes of a weight."""
    if kind in PLAIN:
        return float(weight.numel() * PLAIN[kind])
    parts = Format.named(kind).parts(tuple(weight.shape)).values()
    return float(sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts))


def exactly(*shape: int, seed: int = 0, scale: float = 1.0, device: str = "cpu") -> Tensor:
    """Normal values that bfloat16 holds exactly, in float32. Large ones repeat a block: see `random_packed`."""
    count, generator = 1, torch.Generator(device).manual_seed(seed)
    for n in shape:
        count *= n
    block = torch.randn(min(count, 1_048_573), generator=generator, device=device).mul_(scale).bfloat16().float()
    return block.repeat(-(-count // len(block)))[:count].view(shape)


CUDA = ("int8", "fp8", "int4", "nvfp4")
CPU = ("int8", "int4-g32", "int4", "int4-g128")
"""Formats whose products the operations for a GPU, and those for a processor, have."""


def implementations(device: str) -> list[tuple[str, torch.dtype, str]]:
    """(operations, dtype, format of the weights or "") that this machine can run."""
    bf16, full = torch.bfloat16, torch.float32
    if torch.device(device).type == "cuda":
        candidates = [("fused", bf16, ""), *(("triton", bf16, kind) for kind in ("", *CUDA))]
    else:
        candidates = [("reference", bf16, ""), ("fused", bf16, ""), *(("cpu", bf16, kind) for kind in ("", *CPU))]
        candidates += [("fused", full, ""), ("cpu", full, "")]
    results = []
    for name, dtype, kind in candidates:
        try:
            load(name, device, dtype)
        except InputError:
            continue
        results.append((name, dtype, kind))
    return results


def relative(got: Tensor, exact: Tensor) -> float:
    """In the 2-norm."""
    difference, size = (got.double() - exact.double()).norm(), exact.double().norm()
    return float(difference / size) if float(size) else float(difference)


def kind_of(dtype: torch.dtype, kind: str) -> str:
    return kind or ("float32" if dtype == torch.float32 else "bf16")


@torch.inference_mode()
def rows(op: str, case: Case, device: str, seconds: float, most: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each implementation of this case. One that fails says so and does not stop the others."""
    reference = load("reference")
    exact = case.ready(reference, torch.float32)().clone()
    plain = relative(case.ready(reference, torch.bfloat16)(), exact)
    for name, dtype, kind in implementations(device):
        if not case.takes(kind):
            continue
        row: dict[str, Any] = {"op": op, "case": case.name, "ops": name, "kind": kind_of(dtype, kind)}
        try:
            call = case.ready(load(name, device, dtype), dtype, kind)
            timing = measure(call, seconds, torch.device(device), repeats=50)
            row |= part_row(timing, case.cost(row["kind"]), most)
            row |= {"error": relative(call(), exact), "error_of_plain_bf16": plain}
            del call
        except (RuntimeError, ValueError, NotImplementedError) as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        yield row


def main(op: str, cases: Callable[[str, str], Iterator[Case]], about: str) -> None:
    """The command of one operation's file. `cases(size, device)` makes them one at a time."""
    parser = common.argument_parser(about, 5.0)
    parser.add_argument("--sizes", default="mid,released", help="of mid, released and tiny")
    arguments = parser.parse_args()
    most, results = common.ceiling(arguments), []
    for size in arguments.sizes.split(","):
        for case in cases(size, arguments.device):
            common.say(f"{size}: {case.name}")
            each = arguments.seconds / max(1, len(implementations(arguments.device)))
            for row in rows(op, case, arguments.device, each, most):
                results.append({"size": size, **row})
                common.finish({"what": "ops", "op": op, "rows": results, "ceilings": most}, arguments)
            del case
            common.release()
    print(show(results))


def show(results: list[dict[str, Any]]) -> str:
    lines = []
    for row in results:
        name = f"{row['size']}: {row['case']}"
        if "failed" in row:
            lines.append([name, row["ops"], row["kind"], row["failed"][:40], "", "", ""])
            continue
        lines.append(
            [
                name,
                row["ops"],
                row["kind"],
                duration(row["seconds"]),
                common.share(row["share_of_ceiling"]),
                f"{row['error']:.1e}",
                f"{row['error_of_plain_bf16']:.1e}",
            ]
        )
    return common.table(["case", "ops", "kind", "time", "of ceiling", "error", "plain bf16's"], lines)
