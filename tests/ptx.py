"""The few PTX instructions that the kernels write themselves, on integers: what the interpreter cannot run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
TYPES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def assemblies(module: ModuleType, function: str) -> list[str]:
    """The assembly in this function of a module, in order."""
    source = inspect.getsource(module)
    start = re.search(rf"^def {function}\(", source, re.MULTILINE)
    assert start is not None
    return re.findall(r'"""\{(.*?)\}"""', source[start.start() :].split("\n@triton.jit")[0], re.DOTALL)


def pair(low: Tensor, high: Tensor) -> Tensor:
    """16 bits and 16 bits in a register, as int64."""
    return (low.long() & 0xFFFF) | (high.long() & 0xFFFF) << 16


def halves(register: Tensor, dtype: torch.dtype) -> Tensor:
    """The two numbers of 16 bits in a register, [..., 2]."""
    return torch.stack([register & 0xFFFF, register >> 16], -1).to(torch.uint16).view(dtype)


def run(text: str, inputs: dict[str, Tensor], outputs: int) -> list[Tensor]:
    """The outputs $0, $1, ... of this assembly, registers as int64. KeyError for an instruction that is not known."""
    registers, like = dict(inputs), next(iter(inputs.values()))

    def value(name: str) -> Tensor:
        return (
            torch.full_like(like, int(name, 16 if name.startswith("0x") else 10))
            if name[0].isdigit()
            else registers[name]
        )

    def fused(kind: str, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a, b, c = (halves(x, TYPES[kind]).double() for x in (a, b, c))
        bits = (a * b + c).to(TYPES[kind]).view(torch.int16)
        return pair(bits[..., 0], bits[..., 1])

    for line in filter(None, (part.strip() for part in text.split(";"))):
        name, *rest = re.split(r"[\s,]+", line)
        if name == ".reg":
            continue
        target, operands = rest[0], [value(each) for each in rest[1:]]
        instructions: dict[str, Callable[..., Tensor]] = {
            "mov.b32": lambda a: a,
            "and.b32": lambda a, b: a & b,
            "shl.b32": lambda a, b: a << b & LOW,
            "shr.u32": lambda a, b: a >> b,
            "lop3.b32": lambda a, b, c, table: {0xEA: a & b | c}[int(table.flatten()[0])],
            "fma.rn.bf16x2": lambda *each: fused("bf16x2", *each),
            "fma.rn.f16x2": lambda *each: fused("f16x2", *each),
        }
        registers[target] = instructions[name](*operands)
    return [registers[f"${i}"] for i in range(outputs)]
