"""CUDA kernels in Triton: one file an operation, the same signatures as `sfumato.ops.reference`.

Weights in 16 or 32 bits, or packed (`ops/packed.py`): int8, FP8, int4, NVFP4, MXFP4; any of them with the factors of
adapters beside it (`ops/lowrank.py`). Nothing here has gradients. A row's answer does not depend on
its batch: tile sizes hang on the shape of the weights and the GPU (`tuned.json`), never on the number of rows, and no
sum is split over programs without a fixed order. Nothing here waits for the host, so a step can be recorded as a CUDA
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch

from sfumato.errors import InputError
from sfumato.ops.contract import Ops
from sfumato.ops.packed import Packed


def obstacle(device: torch.device, packed: Collection[Packed] = ()) -> str | None:
    """Why these operations cannot run there, or not with some weights packed like these; None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return "they need a CUDA device"
    if torch.version.hip:
        return "they are written for NVIDIA's GPUs, and this build of torch is for AMD's (ROCm)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "they need a GPU of compute capability 8.0 or later"
    from sfumato.ops.triton.forms import refusal

    return next(filter(None, map(refusal, packed)), None)


def load(device: torch.device | str = "cuda") -> Ops:
    """The record. InputError where this machine cannot run it."""
    if reason := obstacle(torch.device(device)):
        raise InputError(f"the triton operations cannot be used: {reason}; choose fused")
    return record()


def record() -> Ops:
    """The record, wherever it may run: on a GPU, or under Triton's interpreter on any machine."""
    from sfumato.ops.triton import (
        attention,
        block,
        conclude,
        experts,
        forms,
        linear,
        noise,
        norm,
        read_out,
        route,
        soft_embedding,
    )

    return Ops(
        name="triton",
        pack=forms.pack,
        linear=on_its_device(linear.linear),
        rms_norm=on_its_device(norm.rms_norm),
        norm_rope=on_its_device(norm.norm_rope),
        norm_add=on_its_device(norm.norm_add),
        attention=on_its_device(attention.attention),
        feed_forward=on_its_device(linear.feed_forward),
        route=on_its_device(route.route),
        experts=on_its_device(experts.experts),
        join=on_its_device(norm.join),
        read_out=on_its_device(read_out.read_out),
        soft_embedding=on_its_device(soft_embedding.soft_embedding),
        block=on_its_device(block.block),
        is_recordable=True,
        noise=on_its_device(noise.noise),
        conclude_=on_its_device(conclude.conclude_),
    )


Operation = TypeVar("Operation", bound=Callable[..., Any])


def on_its_device(operation: Operation) -> Operation:
    """This operation, launched on the device of its first tensor; Triton by itself takes the current one."""

    @wraps(operation)
    def guarded(*arguments: Any, **named: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return operation(*arguments, **named)
        with torch.cuda.device(device):
            return operation(*arguments, **named)

    return cast(Operation, guarded)
