"""What an implementation of the operations is: the record of its functions, and what they take and give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

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
    """(rng_counter_X4, step_X, temperature_XS, at_B, length, vocab_size) -> uniform_BL, tokens_BL and temperature_B:
    the bits that `noise.CountedNoise` has for the steps of these rows, and their temperatures, in one call. None: that
    class itself counts."""
    conclude_: Callable[..., None] | None = None
    """(state, at_B, ReadOut, noise_BL, hidden_BLD, soft_BLD, embed_VD, scale): the end of a step in which no grammar
    has a say, written to the state. None: `step.conclude_`, which is what it means."""
