"""CUDA kernels in Triton: one file an operation, the same signatures as `sfumato.ops.reference`.

Weights in 16 or 32 bits, or packed (`ops/packed.py`): int8, FP8, int4, NVFP4, MXFP4. A row's answer does not depend on
its batch: tile sizes hang on the shape of the weights and the GPU (`tuned.json`), never on the number of rows, and no
sum is split over programs without a fixed order. Nothing here waits for the host, so a step can be recorded as a CUDA
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields, replace
from functools import wraps
from importlib.util import find_spec
from typing import Any

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
    from sfumato.ops.triton.product import refusal

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
        linear,
        noise,
        norm,
        product,
        read_out,
        route,
        soft_embedding,
    )

    plain = Ops(
        "triton",
        product.pack,
        linear.linear,
        norm.rms_norm,
        norm.norm_rope,
        norm.norm_add,
        attention.attention,
        linear.feed_forward,
        route.route,
        experts.experts,
        norm.join,
        read_out.read_out,
        soft_embedding.soft_embedding,
        block=block.block,
        is_recordable=True,
        noise=noise.noise,
        conclude_=conclude.conclude_,
    )
    each = {f.name: getattr(plain, f.name) for f in fields(plain) if f.name != "pack"}
    launching: dict[str, Any] = {name: on_its_device(one) for name, one in each.items() if callable(one)}
    return replace(plain, **launching)


def on_its_device(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, whatever device the tensors are on: here it is that of the first one."""

    @wraps(operation)
    def guarded(*args: Any, **more: Any) -> Any:
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return operation(*args, **more)
        with torch.cuda.device(device):
            return operation(*args, **more)

    return guarded
