"""What a step of training needs in memory, part by part, from a config alone: before anything is loaded.

It counts what `training.loss` and the fused operations keep, tensor by tensor. `benchmarks/training.py` and the tests
hold the sum against what real steps hold. What nobody has measured is a part of its own: what an allocator loses
between its blocks (`SLACK`). It lacks speed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sfumato import ops
from sfumato.errors import InputError
from sfumato.measure import work
from sfumato.model.adapters import USUAL, check_rank, targeted
from sfumato.model.config import LayerConfig, ModelConfig
from sfumato.model.network import Model
from sfumato.ops.fused import FEW_EXPERTS

STATES = {"adamw": 8.0, "muon": 8.0, "adamw8bit": 2.0 + 8 / 256, "paged": 0.0}
"""Bytes that an optimiser keeps on the GPU for a trained number; those of "paged" may lie in the host's memory."""
SLACK = 0.05
"""A guess: what an allocator loses between its blocks, as a share of all that comes and goes within a step."""
GROUP = 2**25
"""Elements of the float32 logits of a group of positions: `training.vocabulary.GROUP`."""


@dataclass(frozen=True)
class TrainingSetup:
    """What is trained, over which weights, and on how many tokens at once."""

    quantize: str | None = None
    """The recipe in which weights are held that are not trained; None: in full."""
    precision: str = "bfloat16"
    """"float32" or "bfloat16": of weights that are not trained, and of products."""
    rank: int = 16
    """Of the factors, which are float32; 0: every weight is trained, in float32."""
    targets: tuple[str, ...] = USUAL
    optimizer: str = "adamw"
    is_checkpointed: bool = True
    """Whether the backward pass computes each block anew, so that of each its input alone is kept."""
    tokens: int = 1024
    """Of an example, prompt and answer, padding included."""
    examples: int = 1
    """Of a pass: those of a batch, or of one of its parts where gradients are accumulated."""
    repeats: int = 1
    """Canvases of an example."""
    is_accumulated: bool = False
    """Whether a batch is computed in parts, whose gradients wait for those of the next."""
    is_revised: bool = False
    """Whether the objective has a penalty on revisions: a second denoise pass with gradients."""
    is_distilled: bool = False
    """Whether it has self-distillation: a teacher's logits beside the model's own."""
    ranks: int = 1
    """Processes that share the plain weights, and all that is trained."""
    is_attention_plain: bool = True
    """Whether torch computes attention plainly, every score in float32: so where no kernel of its own takes heads of
    this size in groups, with a mask. On the processor it has one."""

    def __post_init__(self) -> None:
        for name in ("tokens", "examples", "repeats", "ranks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.rank < 0:
            raise InputError(f"rank is {self.rank}; give 1 or more, or 0 to train every weight")
        if self.optimizer not in STATES:
            raise InputError(f"optimizer is {self.optimizer!r}; choose {', '.join(map(repr, STATES))}")
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision is {self.precision!r}; choose 'float32' or 'bfloat16'")
        if not self.rank and self.quantize is not None:
            raise InputError(
                f"weights in {self.quantize} cannot be trained; train factors beside them (--lora 16), or leave "
                "--quantize out"
            )

    @property
    def wide(self) -> int:
        """Bytes of a plain weight, and of a number of the hidden states between products."""
        return 2 if self.rank and self.precision == "bfloat16" else 4

    @property
    def narrow(self) -> int:
        """Bytes of a number that goes into a product."""
        return 2 if self.precision == "bfloat16" else 4


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU at the fullest moment of a step."""

    weights: float
    """That are not trained."""
    trained: float
    """Factors, or all weights, in float32."""
    gradients: float
    optimizer: float
    keys_values: float
    """Of the prefix in all layers, with their gradients."""
    kept: float
    """Until the backward pass: the input of each block, or all that its operations need."""
    working: float
    """Of the block, or the group of logits, that is computed at the time."""
    gathered: float
    """Weights that processes share, whole while they are used."""
    slack: float
    """A guess: see `SLACK`."""

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return float(sum(vars(self).values()))

    @property
    def counted(self) -> float:
        """Without what is a guess."""
        return self.total - self.slack

    def fits(self, gigabytes: float) -> bool:
        """Whether a GPU of so many GB, 10^9 bytes, holds it beside its driver's context (`work.RESERVE`)."""
        return self.total <= gigabytes * 1e9 - work.RESERVE


@dataclass(frozen=True)
class _Positions:
    """Of a pass: its rows, what each brings, and what each sees that is cached."""

    rows: int
    new: int
    cached: int

    @property
    def positions(self) -> int:
        return self.rows * self.new


def memory(config: ModelConfig, setup: TrainingSetup) -> TrainingMemory:
    """What a step of training holds at most, of `setup.examples` examples at once.

    InputError for weights or targets that there are not, for sizes that do not fit a recipe, and without a canvas."""
    config.check_canvas("training")
    if setup.tokens > config.max_position:
        raise InputError(f"max_tokens is {setup.tokens}, and the model's context {config.max_position}; lower it")
    trained = trained_counts(config, setup.rank, setup.targets)
    plain, packed = _frozen(config, setup)
    numbers = sum(trained.values()) / setup.ranks
    always = {
        "weights": sum(plain.values()) / setup.ranks + packed,  # packed ones are whole in each process
        "trained": 4.0 * numbers,
        "optimizer": STATES[setup.optimizer] * numbers,
        "keys_values": 2.0 * _cache_bytes(config, setup),
        "gathered": _gathered_bytes(config, setup, plain, trained),
    }
    encode, denoise = _passes(config, setup)
    later = (denoise,) if setup.is_revised else ()
    held = 4.0 * numbers if setup.is_accumulated else 0.0
    # A weight's gradients of both passes are joined before they become, or are added to, what is there of other parts.
    moments = (
        _moment(config, setup, trained, denoise, (encode, denoise, *later)) | {"gradients": held},
        _moment(config, setup, trained, encode, (encode,)) | {"gradients": held + 4.0 * numbers},
    )
    fullest = always | max(moments, key=lambda moment: sum(moment.values()))
    moving = sum(fullest[name] for name in ("gradients", "keys_values", "kept", "working", "gathered"))
    return TrainingMemory(**fullest, slack=SLACK * moving)


def _moment(
    config: ModelConfig,
    setup: TrainingSetup,
    trained: Mapping[str, int],
    now: _Positions,
    waiting: tuple[_Positions, ...],
) -> dict[str, float]:
    """The bytes that `waiting` passes have kept, as the backward pass of one of them, `now`, begins."""
    kept = working = 0.0
    for index, layer in enumerate(config.layers):
        for one in waiting:
            whole = _of_block(config, layer, setup, one) + _copied_bytes(config, index, setup, one)
            kept += setup.wide * config.hidden_size * one.positions if setup.is_checkpointed else whole
            if one is now:
                own = whole if setup.is_checkpointed else 0.0
                working = max(working, own + _gradients_of_block(config, layer, setup, one))
    kept += setup.wide * config.hidden_size * sum(3 * one.positions for one in waiting)
    if not setup.rank:
        kept += 4.0 * len(waiting) * config.vocab_size * config.hidden_size  # the head's gradients, of both losses
    # A gradient that is joined from parts, as a stack's is.
    working += _unpacked_bytes(config, setup) + 8.0 * max(trained.values(), default=0)
    return {"kept": kept, "working": max(working, _vocabulary_bytes(config, setup))}


# ---- weights ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _meta(config: ModelConfig) -> Model:
    with torch.device("meta"):
        return Model(config, ops.load("reference"))


@functools.lru_cache(maxsize=32)
def trained_counts(config: ModelConfig, rank: int, targets: tuple[str, ...] = USUAL) -> Mapping[str, int]:
    """Numbers that are trained, by the name of their weight: all of the model for rank 0, else those of its factors.

    InputError for a target that names none, and for a rank above the model's width."""
    if not rank:
        return {name: parameter.numel() for name, parameter in _meta(config).named_parameters()}
    check_rank(rank, config)
    counts = {}
    for name, (owner, leaf) in targeted(_meta(config), targets).items():
        *stack, outputs, inputs = getattr(owner, leaf).shape
        counts[name] = math.prod(stack) * rank * (outputs + inputs)
    return counts


def _frozen(config: ModelConfig, setup: TrainingSetup) -> tuple[dict[str, float], float]:
    """Bytes of plain weights that are not trained, by name, and of all packed ones."""
    shapes = work.tensors(config)
    if not setup.rank:
        return {}, 0.0
    if setup.quantize is None:
        return {name: setup.wide * math.prod(shape) for name, shape in shapes.items()}, 0.0
    forms = {name: work.format_of(name, shape, setup.quantize) for name, shape in shapes.items()}
    plain = {name: math.prod(shape) for name, shape in shapes.items() if forms[name] is None}
    packed = work.weight_bytes(config, setup.quantize) - 2 * sum(plain.values())
    return {name: setup.wide * count for name, count in plain.items()}, float(packed)


def _gathered_bytes(
    config: ModelConfig, setup: TrainingSetup, plain: Mapping[str, float], trained: Mapping[str, int]
) -> float:
    """Two blocks, one that is computed and one that is fetched, and all that lies in no block."""
    if setup.ranks == 1:
        return 0.0
    sizes = {name: plain.get(name, 0.0) + 4.0 * trained.get(name, 0) for name in {*plain, *trained}}
    outside = sum(size for name, size in sizes.items() if not name.startswith("layers."))
    return 2 * (sum(sizes.values()) - outside) / len(config.layers) + outside * (1 - 1 / setup.ranks)


def _unpacked_bytes(config: ModelConfig, setup: TrainingSetup) -> float:
    """The largest packed matrix while it is multiplied: twice in float32 as it is unpacked, and as it is then."""
    if setup.quantize is None:
        return 0.0
    shapes = [shape for name, shape in work.tensors(config).items() if work.format_of(name, shape, setup.quantize)]
    return (8.0 + setup.narrow) * max(shape[-1] * shape[-2] for shape in shapes)


# ---- what comes and goes ---------------------------------------------------------------------------------------------


def _passes(config: ModelConfig, setup: TrainingSetup) -> tuple[_Positions, _Positions]:
    encode = _Positions(setup.examples, setup.tokens, 0)
    return encode, _Positions(setup.examples * setup.repeats, config.canvas_length, setup.tokens)


def _of_block(config: ModelConfig, layer: LayerConfig, setup: TrainingSetup, one: _Positions) -> float:
    """What the operations of a block keep for its backward pass."""
    n, w, width = setup.narrow, setup.wide, config.hidden_size
    queries, keys = config.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
    # In float32 norms keep what others keep too; else each has a copy of its input, the router's and both of the
    # feed-forwards' of the same.
    norms = 4 * ((6 if w == 4 else 8) * width + queries + (1 if w == n == 4 and not layer.is_sliding else 2) * keys)
    router = 8 * config.num_experts + 32 * config.top_k_experts
    if not setup.rank:  # the router's scale and product are trained too, and keep what they multiply
        router += (w + n) * width
    inner = config.intermediate_size
    ranks = 2 * _kept_rank(setup, (width, queries), one) + 2 * _kept_rank(setup, (width, keys), one)
    mixer = n * (2 * queries + _if_trained(config, setup, "self_attn.", width + queries + ranks))
    ranks = 3 * _kept_rank(setup, (width, inner), one)
    dense = n * (3 * inner + _if_trained(config, setup, ".mlp.", width + inner + ranks))
    visible = one.cached + one.new
    attention = n * one.rows * visible * (2 * keys + one.new)
    if setup.is_attention_plain:  # queries, keys and values of every head, and all scores, in float32
        attention += 4 * one.rows * (visible * 2 * queries + one.new * queries + config.num_heads * one.new * visible)
    return one.positions * (norms + router + mixer + dense + _of_experts(config, setup, one)) + attention


def _of_experts(config: ModelConfig, setup: TrainingSetup, one: _Positions) -> float:
    """Of a position: gathered input, gate and up, gelu, their product, and the result, of each expert that it chose.

    A few experts in plain numbers are one product, of all of them (`ops.fused.experts`)."""
    n, width, count, inner = setup.narrow, config.hidden_size, config.num_experts, config.expert_size
    if count <= FEW_EXPERTS and one.positions >= 16 * count and setup.quantize is None:
        is_plain = not _if_trained(config, setup, ".experts.", setup.rank)
        if is_plain or _is_merged(setup, (width, 2 * inner), one):
            return n * (width + 6 * count * inner)
    inputs = _if_trained(config, setup, ".experts.", width + inner + 2 * setup.rank)
    return n * config.top_k_experts * (width + 3 * inner + inputs)


def _is_merged(setup: TrainingSetup, sides: tuple[int, ...], one: _Positions) -> bool:
    """Whether factors are added to their weight before it is multiplied (`ops.fused`)."""
    is_small = math.prod(sides) <= 3 * setup.rank * sum(sides)
    return is_small and one.positions >= max(sides) and setup.narrow == 4 and setup.quantize is None


def _kept_rank(setup: TrainingSetup, sides: tuple[int, ...], one: _Positions) -> int:
    """Numbers between both factors, which they keep where they are not added to their weight."""
    return 0 if _is_merged(setup, sides, one) else setup.rank


def _copied_bytes(config: ModelConfig, index: int, setup: TrainingSetup, one: _Positions) -> float:
    """What a block keeps of what is trained: copies in bfloat16, or in float32 weights with their factors in them."""
    trained = _of_layer(trained_counts(config, setup.rank, setup.targets), index)
    if setup.narrow < 4:
        return setup.narrow * float(sum(trained.values()))
    if not setup.rank:
        return 0.0
    shapes = work.tensors(config)
    merged = [shapes[name] for name in trained if _is_merged(setup, shapes[name][-2:], one)]
    return 4.0 * sum(math.prod(shape) for shape in merged)


def _of_layer(counts: Mapping[str, int], index: int) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name.startswith(f"layers.{index}.")}


def _if_trained(config: ModelConfig, setup: TrainingSetup, part: str, count: int) -> int:
    """What products keep of their inputs, where weights of this part of a block have gradients."""
    return count if any(part in name for name in trained_counts(config, setup.rank, setup.targets)) else 0


def _gradients_of_block(config: ModelConfig, layer: LayerConfig, setup: TrainingSetup, one: _Positions) -> float:
    """What the backward pass of a block holds beside what was kept, at most: in the experts, or in attention."""
    n, width = setup.narrow, config.hidden_size
    experts = one.positions * config.top_k_experts * n * (2 * width + 4 * config.expert_size)
    scores = 8 * config.num_heads * one.rows * one.new * (one.cached + one.new) if setup.is_attention_plain else 0
    return max(experts, scores) + 4 * one.positions * setup.wide * width


def _cache_bytes(config: ModelConfig, setup: TrainingSetup) -> float:
    """Keys and values of what is encoded; where examples have several canvases, of each canvas once more."""
    rows = setup.examples * (1 + (setup.repeats if setup.repeats > 1 else 0))
    heads = sum(layer.kv_heads * layer.head_dim for layer in config.layers)
    return 2.0 * rows * (setup.tokens + 1) * heads * setup.wide


def _vocabulary_bytes(config: ModelConfig, setup: TrainingSetup) -> float:
    """A group of float32 logits, their tanh, a teacher's, and what goes into products; a trained head's gradient."""
    positions = max(one.positions for one in _passes(config, setup))
    group = 4 * min(max(config.vocab_size, GROUP), positions * config.vocab_size)
    head = config.vocab_size * config.hidden_size
    copy = setup.narrow * head if setup.narrow < setup.wide else 0
    return (
        (3 if setup.is_distilled else 2) * group
        + (group / 2 if setup.narrow < 4 else 0)
        + copy
        + (0 if setup.rank else 4 * head)
    )
