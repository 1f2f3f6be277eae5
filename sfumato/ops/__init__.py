"""Operations: mathematics with more than one implementation, in one record, chosen once and passed.

`Ops` names the mathematics; `load` picks the code. An implementation never falls back to another in silence:

    reference   plain PyTorch, the specification and the oracle
    fused       torch's own fused calls, any device; differentiable, so that training uses it
    cpu         a small compiled extension: AMX or AVX-512 for bf16, int8 and int4, portable vectors for float32
    triton      CUDA kernels: bf16, int8, FP8, int4 and NVFP4 weights

Every one of them takes a weight in fewer bits (`packed.Packed`) in place of a plain one, or says that it does not;
reference and fused unpack it with every product.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.events import InputError
from sfumato.ops.packed import Packed

NEVER = -1e30
"""A logit that stands for "impossible": finite, so that 0 x log 0 stays 0."""


class ReadOut(NamedTuple):
    """What one step reads from the canvas. Entropies in nats, of the temperature-scaled distribution."""

    sample_BL: Tensor
    argmax_BL: Tensor
    entropy_BL: Tensor
    logits_BLV: Tensor
    """Temperature-scaled, in the weights' dtype: what the soft embedding is taken from."""
    tiles: Any = None
    """What an implementation's read-out learned of each tile of the vocabulary, for its own soft embedding."""


class Layer(NamedTuple):
    """The weights of a block, packed where a product takes them, for an implementation that runs it whole."""

    input_norm: Any
    q: Any
    k: Any
    v: Any
    """None: the values are the raw keys."""
    o: Any
    q_norm: Any
    k_norm: Any
    after_attention: Any
    before_dense: Any
    gate: Any
    up: Any
    down: Any
    after_dense: Any
    router_scale: Any
    router: Any
    per_expert: Any
    before_experts: Any
    gate_up: Any
    expert_down: Any
    after_experts: Any
    after: Any
    top_k: int
    eps: float

    @property
    def weights(self) -> tuple[Any, ...]:
        return self[:-2]


class After(NamedTuple):
    """What comes behind a block: a norm, and the products that take what it gives; none at the end of the stack."""

    norm: Any
    products: tuple[Any, ...]


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation. Shapes and meaning are documented in `reference.py`."""

    name: str
    pack: Callable[..., Any]
    linear: Callable[..., Any]
    rms_norm: Callable[..., Any]
    norm_rope: Callable[..., Any]
    norm_add: Callable[..., Any]
    attention: Callable[..., Any]
    feed_forward: Callable[..., Any]
    route: Callable[..., Any]
    experts: Callable[..., Any]
    join: Callable[..., Any]
    read_out: Callable[..., Any]
    soft_embedding: Callable[..., Any]
    settle: Callable[[Tensor], None] | None = None
    """Make a weight that is read as it lies, the embedding, faster to read; its place and numbers stay."""
    block: Callable[..., Any] | None = None
    """(x_BTD, Layer, cos, sin, k ring, v ring, mask, scalar, what the block before handed on, After) -> x_BTD, the new
    k_BTGK and v_BTGK, and what it hands on: the operations of a block in one call, where that pays. None: the model
    calls them one by one.

    k and v are None where the block has put them into the rings itself. Handed on is x_BTD behind the norm that comes
    next, in whatever form the next block takes; at the end of the stack the hidden states themselves, in which a row
    that is not finite stays so. None: whoever comes next takes x_BTD. After is None where nothing may be handed on."""
    is_recordable: bool = False
    """Nothing in a step waits for the host, no shape hangs on a number on the device: a CUDA graph can hold it."""
    noise: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    """(words_X4, step_X, heat_XS, at_B, length, vocab_size) -> uniform_BL, tokens_BL and heat_B: the bits that
    `diffusion.CountedDice` has for the steps of these rows, and their temperatures, in one call. None: that class
    itself counts."""
    conclude_: Callable[..., None] | None = None
    """(state, at_B, ReadOut, noise_BL, hidden_BLD, soft_BLD, embed_VD, scale): the end of a step in which no grammar
    has a say, written to the state. None: `step.conclude_`, which is what it means."""


NAMES = ("reference", "fused", "cpu", "triton")


def load(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: Collection[Packed] = (),
) -> Ops:
    """The implementation of this name. "auto" takes the fastest that this device can run with weights of this dtype,
    some of them packed like these; where neither compiler nor kernels are there, that is fused.
    InputError for an unknown name, and for one that this machine cannot run: it says why."""
    if name == "auto":
        name = _fastest(torch.device(device), dtype, packed)
    if name == "reference":
        from sfumato.ops import reference

        return reference.OPS
    if name == "fused":
        from sfumato.ops import fused

        return fused.OPS
    if name == "cpu":
        from sfumato.ops import cpu

        return cpu.load(dtype)
    if name == "triton":
        from sfumato.ops import triton

        return triton.load(device)
    raise InputError(f"there are no operations named {name!r}; choose one of auto, {', '.join(NAMES)}")


def _fastest(device: torch.device, dtype: torch.dtype | None, packed: Collection[Packed]) -> str:
    if device.type == "cpu":
        from sfumato.ops import cpu

        return "fused" if cpu.obstacle(dtype, packed) else "cpu"
    if device.type == "cuda":
        from sfumato.ops import triton

        return "fused" if triton.obstacle(device, packed) else "triton"
    return "fused"


class Standing(NamedTuple):
    """How one implementation stands on a device."""

    name: str
    obstacle: str | None
    """Why it cannot run there, or only slower than another; None where nothing is in its way."""
    is_auto: bool
    """Whether "auto" takes it."""


def survey(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, packed: Collection[Packed] = ()
) -> tuple[Standing, ...]:
    """Every implementation on this device, for a model in this dtype with some weights packed like these. Says what
    `load` would do, and loads nothing; a warning on the way is part of the answer, and is not given twice."""
    device = torch.device(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = _fastest(device, dtype, packed)
        return tuple(Standing(name, _obstacle(name, device, dtype, packed), name == chosen) for name in NAMES)


def _obstacle(name: str, device: torch.device, dtype: torch.dtype | None, packed: Collection[Packed]) -> str | None:
    if name == "cpu":
        from sfumato.ops import cpu

        return cpu.obstacle(dtype, packed) if device.type == "cpu" else "they need a processor as the device"
    if name == "triton":
        from sfumato.ops import triton

        return triton.obstacle(device, packed)
    return None
