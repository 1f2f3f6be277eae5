"""The contract of the operations: a `Protocol` for each, the values that they exchange, and the record of them all.

`reference.py` is the specification in code, and these docstrings have the shapes: B rows, T new positions, L canvas,
X rows of the cache, R slots of its ring, D width, H query heads, G key-value heads, K head size, E experts, F hidden,
J experts of a token, V vocabulary, N = B·T or B·L flattened. An implementation is an `Ops`, built by keyword; it may
narrow neither shapes nor dtypes in silence, and refuses a weight that it cannot take with an InputError.

A weight of a product is a plain tensor or a `Weight`: a form of its own, such as fewer bits (`packed.Packed`), an
implementation's layout, or a base with low-rank factors. It lacks a registry: `ops.load` knows the implementations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from sfumato.ops.masks import Mask

NEVER = -1e30
"""A logit that stands for "impossible": finite, so that 0 x log 0 stays 0."""


# ---- weights ---------------------------------------------------------------------------------------------------------


@runtime_checkable
class Weight(Protocol):
    """A weight [O, I], or a stack [E, O, I], in a form of its own, which may hold further weights.

    `tensors` and `each` reach all of its tensors, so that it can be counted and moved whatever it means
    (`model/offload.py`). A weight may depend on whose rows are multiplied with it (`lowrank.LowRank`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        ...

    @property
    def stored(self) -> str | None:
        """The name of its codes, as `Packed.kind` has it; None where it lies in plain numbers."""
        ...

    @property
    def product(self) -> str | None:
        """The number format of its products, where it has one of its own ("int8"); None: they are in x's."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of its tensors, those of weights inside it too, always in the same order."""
        ...

    def each(self, change: Callable[[Tensor], Tensor], /) -> Self:
        """This with each of `tensors` changed, in their order; what it means stays."""
        ...

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The plain weight that it stands for, in this dtype."""
        ...

    def round_input(self, x: Tensor) -> Tensor:
        """The left side of a product with this weight as its format defines it, in x's dtype: x itself, or rounded."""
        ...

    def __getitem__(self, expert: int, /) -> Weight:
        """One matrix [O, I] of a stack."""
        ...


Matrix = Tensor | Weight
"""A weight of a product: plain, or in a form of its own."""


def dense(weight: Matrix, dtype: torch.dtype) -> Tensor:
    """The plain weight: a tensor as it is, any other form in this dtype."""
    return weight if isinstance(weight, Tensor) else weight.dense(dtype)


def tensors_of(weight: Matrix) -> tuple[Tensor, ...]:
    """A plain weight itself, or all tensors of any other form."""
    return (weight,) if isinstance(weight, Tensor) else weight.tensors


def round_input(x: Tensor, weight: Matrix) -> Tensor:
    """The left side of a product with this weight; only some formats round it (`Weight.round_input`)."""
    return x if isinstance(weight, Tensor) else weight.round_input(x)


class Layer(NamedTuple):
    """The weights of a block, products in the form that `Ops.pack` gives them.

    Norms and scales are [D], or [K] for queries and keys."""

    input_norm: Tensor
    q: Matrix
    k: Matrix
    v: Matrix | None
    """None: the values are the raw keys."""
    o: Matrix
    q_norm: Tensor
    k_norm: Tensor
    after_attention: Tensor
    before_dense: Tensor
    gate: Matrix
    up: Matrix
    down: Matrix
    after_dense: Tensor
    router_scale: Tensor
    router: Matrix
    """[E, D], never packed: a tensor, or one with low-rank factors beside it."""
    per_expert: Tensor
    """[E]."""
    before_experts: Tensor
    gate_up: Matrix
    expert_down: Matrix
    after_experts: Tensor
    after: Tensor
    top_k: int
    eps: float

    @property
    def weights(self) -> tuple[Any, ...]:
        """All of them, without the two numbers."""
        return self[:-2]


# ---- what goes into an operation, and what comes out -----------------------------------------------------------------


class JoinNorms(NamedTuple):
    """The three norms at the end of a block, [D] each."""

    dense_D: Tensor
    sparse_D: Tensor
    joined_D: Tensor


class ReadOut(NamedTuple):
    """What one step reads from the canvas. Entropies in nats, of the temperature-scaled distribution."""

    sample_BL: Tensor
    argmax_BL: Tensor
    entropy_BL: Tensor
    logits_BLV: Tensor
    """Temperature-scaled, in the weights' dtype: what the soft embedding is taken from."""
    tiles: Any = None
    """What an implementation's read-out knows of each tile of the vocabulary; its own soft embedding takes it."""


class BlockPass(NamedTuple):
    """What a block takes from its pass: angles and mask of its kind of layer, its rings, its scalar."""

    cos_BTK: Tensor
    sin_BTK: Tensor
    k_XRGK: Tensor
    v_XRGK: Tensor
    mask: Mask
    scale_N1: Tensor
    """The layer scalar of each token, or one for all, [1]."""


class After(NamedTuple):
    """What comes behind a block: a norm, and the products that take what it gives; none at the end of the stack."""

    norm: Tensor
    products: tuple[Matrix, ...]


class BlockResult(NamedTuple):
    """What a block gives."""

    x_BTD: Tensor
    k_BTGK: Tensor | None
    """The new keys; None where the block itself has put them into the ring, and so for values."""
    v_BTGK: Tensor | None
    next_input: Any
    """x_BTD behind the norm that comes next, in whatever form the next block takes; at the end of the stack the hidden
    states themselves, in which a row that is not finite stays so. None: whoever comes next takes x_BTD."""


class StepRules(Protocol):
    """The tensors of `sampling.rules.RowRules` that the end of a step reads."""

    max_steps_X: Tensor
    entropy_bound_X: Tensor
    stability_X: Tensor
    confidence_X: Tensor


class CanvasState(Protocol):
    """The tensors of `sampling.canvases.Canvases` that the end of a step reads and writes; the rows are X."""

    canvas_XL: Tensor
    soft_XLD: Tensor
    pin_XL: Tensor
    argmax_XL: Tensor
    still_XL: Tensor
    entropy_XL: Tensor
    accepted_XL: Tensor
    step_X: Tensor
    is_done_X: Tensor
    is_finite_X: Tensor

    @property
    def rules(self) -> StepRules:
        """The rules of the rows."""
        ...

    room_X: Tensor
    early_X: Tensor
    settled_X: Tensor
    eos_E: Tensor
    has_pins: bool
    has_early: bool


# ---- the operations --------------------------------------------------------------------------------------------------


class Pack(Protocol):
    """A weight in the form that `linear`, `feed_forward` and `experts` of this implementation take.

    Of a base with low-rank factors the base alone is packed: lanes are filled in place where they lie."""

    def __call__(self, weight: Matrix, /) -> Matrix:
        """InputError for a form that this implementation cannot take."""
        ...


class Linear(Protocol):
    """x Wᵀ for each of these weights."""

    def __call__(self, x: Tensor, /, *weights: Matrix) -> tuple[Tensor, ...]:
        """Of x [.., I] and weights [O, I] the products [.., O]; several products of one input are one operation."""
        ...


class RMSNorm(Protocol):
    """x / rms(x) x weight over the last axis, in float32."""

    def __call__(self, x: Tensor, weight: Tensor | None, eps: float, /) -> Tensor:
        """Of x [.., D] and weight [D] (None: ones), [.., D] in x's dtype."""
        ...


class NormRope(Protocol):
    """The norm of each head, then its pairs (i, i + K/2) rotated by the position's angles."""

    def __call__(self, x_BTHK: Tensor, weight_K: Tensor, eps: float, cos_BTK: Tensor, sin_BTK: Tensor, /) -> Tensor:
        """[B, T, H, K]."""
        ...


class NormAdd(Protocol):
    """residual + rms_norm(x)."""

    def __call__(self, residual: Tensor, x: Tensor, weight_D: Tensor, eps: float, /) -> Tensor:
        """[.., D], as both are."""
        ...


class Attend(Protocol):
    """softmax(q kT) v with grouped key-value heads and scale 1, over the ring and the new positions."""

    def __call__(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, k_XRGK: Tensor, v_XRGK: Tensor, mask: Mask, /
    ) -> Tensor:
        """[B, T, H, K].

        Rings hold all rows X of the cache in R = mask.ring + 1 slots; `mask` says who sees whom. What padding attends
        to does not matter, but the result there is finite."""
        ...


class FeedForward(Protocol):
    """down(gelu(gate(x)) x up(x))."""

    def __call__(self, x: Tensor, gate_FD: Matrix, up_FD: Matrix, down_DF: Matrix, /) -> Tensor:
        """[.., D], as x is."""
        ...


class Route(Protocol):
    """The experts of each token, and how much of each."""

    def __call__(
        self, residual_ND: Tensor, scale_D: Tensor, proj_ED: Matrix, per_expert_E: Tensor, top_k: int, eps: float, /
    ) -> tuple[Tensor, Tensor]:
        """Indices [N, J] int64 and weights [N, J] float32, renormalised, times the scale of each expert.

        The input is the raw residual; it is normed here, without a learned scale."""
        ...


class RunExperts(Protocol):
    """The sum over a token's experts of weight x down(gated(gate_up(x)))."""

    def __call__(
        self, x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up_EFD: Matrix, down_EDF: Matrix, /
    ) -> Tensor:
        """[N, D]. `gate_up_EFD` is [E, 2F, D], gate first."""
        ...


class Join(Protocol):
    """The end of a block: (residual + rms_norm(rms_norm(dense) + rms_norm(sparse))) x the layer's scalar."""

    def __call__(
        self,
        residual_ND: Tensor,
        dense_ND: Tensor,
        sparse_ND: Tensor,
        norms: JoinNorms,
        eps: float,
        scale_N1: Tensor,
        /,
    ) -> Tensor:
        """[N, D]. The scalar is one a token, or one for all as a tensor [1]."""
        ...


class ReadCanvas(Protocol):
    """Softcapped logits over the temperature; a sample, the argmax and the entropy of each position."""

    def __call__(
        self,
        hidden_BLD: Tensor,
        embed_VD: Tensor,
        softcap: float,
        temperature_B: Tensor,
        uniform_BL: Tensor | None = None,
        gumbel_BLV: Tensor | None = None,
        banned: tuple[Tensor, Tensor] | None = None,
    ) -> ReadOut:
        """All of `ReadOut`; the sample is the argmax where there is neither `uniform_BL` nor `gumbel_BLV`.

        It is the inverse of the cumulative distribution at `uniform_BL` in [0, 1); or, where a caller brings the
        oracle's noise, the argmax of logits + `gumbel_BLV`. `banned` is (positions [B, L] as booleans, token ids):
        these tokens can come out at none of these positions."""
        ...


class EmbedSoftly(Protocol):
    """softmax(logits) @ E x embedding scale: what the next step is conditioned on."""

    def __call__(self, logits_BLV: Tensor, embed_VD: Tensor, scale: Tensor, tiles: Any = None, /) -> Tensor:
        """[B, L, D] in the dtype of `embed_VD`.

        `tiles` is the read-out's: tiles of the vocabulary that hold next to nothing may be left out where it is
        passed, never without it."""
        ...


class PlaceEmbedding(Protocol):
    """Make a weight that is read as it lies, the embedding, faster to read; its place and numbers stay."""

    def __call__(self, weight: Tensor, /) -> None:
        """In place."""
        ...


class RunBlock(Protocol):
    """The operations of a block in one call, where that pays."""

    def __call__(
        self,
        x_BTD: Tensor,
        layer: Layer,
        block_pass: BlockPass,
        next_input: Any = None,
        after: After | None = None,
        /,
    ) -> BlockResult:
        """Hidden states [B, T, D] behind the block, and what `BlockResult` has beside them.

        `next_input` is what the block before gave under that name. `after` is None where nothing may be prepared for
        what comes behind."""
        ...


class DrawNoise(Protocol):
    """The bits that `CountedNoise` has for the steps of these rows, and their temperatures, in one call."""

    def __call__(
        self,
        rng_counter_X4: Tensor,
        step_X: Tensor,
        temperature_XS: Tensor,
        at_B: Tensor,
        length: int,
        vocab_size: int,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`uniform_BL` in [0, 1), float32; `tokens_BL`, int64; `temperature_B`, float32."""
        ...


class Conclude(Protocol):
    """The end of a step in which no grammar has a say, written to the state."""

    def __call__(
        self,
        state: CanvasState,
        at_B: Tensor,
        read: ReadOut,
        noise_BL: Tensor,
        hidden_BLD: Tensor,
        soft_BLD: Tensor,
        embedding: tuple[Tensor, Tensor],
        /,
    ) -> None:
        """Accept, renoise and stop the rows `at_B` of the state, whose pass gave these tensors.

        `noise_BL` takes the place of tokens that are not accepted; `embedding` is embed_VD and its scale. What is
        pinned is read as its token, with no entropy."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One implementation of every operation; where an optional one is None, the caller has its own plain way."""

    name: str
    pack: Pack
    linear: Linear
    rms_norm: RMSNorm
    norm_rope: NormRope
    norm_add: NormAdd
    attention: Attend
    feed_forward: FeedForward
    route: Route
    experts: RunExperts
    join: Join
    read_out: ReadCanvas
    soft_embedding: EmbedSoftly
    place_embedding_: PlaceEmbedding | None = None
    block: RunBlock | None = None
    """None: the model calls a block's operations one by one."""
    is_recordable: bool = False
    """Nothing in a step waits for the host, no shape depends on a number on the device: a CUDA graph can hold it."""
    noise: DrawNoise | None = None
    """None: `sampling.noise.CountedNoise` itself counts."""
    conclude_: Conclude | None = None
    """None: `sampling.step.conclude_`, which is the specification."""
