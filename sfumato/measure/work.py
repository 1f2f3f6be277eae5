"""Counted from a config alone, no weights: parameters, bytes, operations, and what hardware publishes.

Memory is what a model needs where it runs (`needs`); time is the floor that a machine's memory bandwidth and arithmetic
set under a step. The floor lacks activations, kernels and everything else that only makes a step slower: it is no
forecast.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sfumato import ops
from sfumato.engine.engine import PREFILL_CHUNK
from sfumato.errors import InputError
from sfumato.model.config import LayerConfig, ModelConfig
from sfumato.model.network import Model
from sfumato.quant import recipes
from sfumato.quant.formats import Format, pack
from sfumato.quant.recipes import RECIPES

# ---- parameters -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Weights of the text model by where they are. The embedding, tied with the output projection, counts once."""

    embedding: int
    experts: int
    """Of all layers together."""
    attention: int
    dense: int
    """The feed-forward beside the experts, in all layers."""
    self_conditioning: int
    rest: int
    """Routers and norms."""
    chosen: float
    """The share of the experts that works on one token."""

    @classmethod
    def of(cls, config: ModelConfig) -> Parameters:
        """The parameters of a model of this configuration."""
        width, count, inner = config.hidden_size, len(config.layers), config.intermediate_size
        return cls(
            embedding=config.vocab_size * width * (2 if config.has_head else 1),
            experts=count * 3 * config.num_experts * config.expert_size * width,
            attention=sum(_attention(config, layer) for layer in config.layers),
            dense=count * 3 * width * inner,
            self_conditioning=(3 * width * inner + width) if config.is_diffusion else 0,
            rest=count * (width * config.num_experts + width + config.num_experts + 7 * width) + width,
            chosen=config.top_k_experts / config.num_experts,
        )

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.experts + self.other

    @property
    def other(self) -> int:
        """Everything but embedding and experts."""
        return self.attention + self.dense + self.self_conditioning + self.rest

    @property
    def active(self) -> int:
        """What works on one token: everything but the experts that were not chosen for it."""
        return self.embedding + round(self.experts * self.chosen) + self.other


def _attention(config: ModelConfig, layer: LayerConfig) -> int:
    queries, keys = config.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
    projections = 2 * queries + keys * (2 if layer.is_sliding else 1)  # full layers have no v_proj
    return projections * config.hidden_size + 2 * layer.head_dim


# ---- weights ---------------------------------------------------------------------------------------------------------

PLAIN = {"float32": 4, "bf16": 2}
"""Bytes of a weight that no recipe touches, by the name of the number format."""
PRECISIONS = (*PLAIN, *RECIPES)
"""The ways to hold a model's weights: in full, or by a recipe over bf16."""


@dataclass(frozen=True)
class Kept:
    """How some of the weights are kept, and what they are multiplied as."""

    bits: float
    """Each, scales included."""
    product: str
    """"bf16", "int8", "fp8" or "float32"."""


@dataclass(frozen=True)
class Precision:
    """How the weights of a model are kept."""

    name: str
    experts: Kept
    dense: Kept
    """Attention, and the feed-forward beside the experts."""
    conditioning: Kept
    plain: Kept
    """Embedding, routers and norms; the cache and the logits are of its kind too."""

    @property
    def width(self) -> int:
        """Bytes of a number in full: of a weight that is not packed, of the cache, of logits."""
        return round(self.plain.bits / 8)

    @classmethod
    def of(cls, config: ModelConfig, name: str) -> Precision:
        """What this recipe, or "bf16" or "float32", makes of the model.

        InputError for another name, and where the model's sizes do not fit the recipe's formats."""
        bits, product = 8 * _width(name), "float32" if name == "float32" else "bf16"
        plain = Kept(bits, product)
        stored, counts, kinds = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, product)
        for own, shape in tensors(config).items():
            group, form = group_of(own), format_of(own, shape, name)
            counts[group] += math.prod(shape)
            stored[group] += _bytes(shape, form, bits // 8)
            if form is not None:
                kinds[group] = form.product or product
        kept = {g: Kept(8 * stored[g] / counts[g], kinds[g]) if counts[g] else plain for g in GROUPS if g != "plain"}
        return cls(name, **kept, plain=plain)


GROUPS = ("experts", "dense", "conditioning", "plain")
"""Weights that a recipe treats alike, by `Precision`'s names."""


def group_of(own: str) -> str:
    """The group that a tensor of `Model.state_dict()` belongs to."""
    if own.startswith("self_conditioning."):
        return "conditioning"
    place = next((part for part in (".experts.", ".self_attn.", ".mlp.") if part in own), "")
    return {"": "plain", ".experts.": "experts"}.get(place, "dense")


@functools.lru_cache(maxsize=16)
def tensors(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of `Model.state_dict()`."""
    with torch.device("meta"):
        model = Model(config, ops.load("reference"))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def format_of(own: str, shape: tuple[int, ...], name: str) -> Format | None:
    """The format that a recipe has for a tensor; None where it stays as it is. InputError where it cannot hold it."""
    form = None if name in PLAIN else recipes.named(name).format_of(own)
    if form is not None:
        _check(form, shape[-1])
    return form


@functools.cache
def _check(form: Format, inputs: int) -> None:
    pack(torch.zeros(1, inputs), form)


def _bytes(shape: tuple[int, ...], form: Format | None, width: int) -> int:
    if form is None:
        return math.prod(shape) * width
    return sum(math.prod(part) * dtype.itemsize for dtype, part in form.parts(shape).values())


def _width(name: str) -> int:
    if name not in PRECISIONS:
        raise InputError(f"there are no weights in {name!r}; choose one of {', '.join(PRECISIONS)}")
    return PLAIN.get(name, 2)


@functools.lru_cache(maxsize=64)
def weight_bytes(config: ModelConfig, name: str) -> int:
    """Bytes of all tensors of the text model, exactly: in "float32" or "bf16", or by the recipe of this name.

    It is the same in memory and in the file, whose headers are some ten thousandths more."""
    width = _width(name)
    return sum(_bytes(shape, format_of(own, shape, name), width) for own, shape in tensors(config).items())


# ---- memory ---------------------------------------------------------------------------------------------------------


def needs(config: ModelConfig, recipe: str, context: int) -> dict[str, int]:
    """Bytes that the model needs with its weights in this recipe, or in "bf16" or "float32", for one request at a time.

        total_bytes = weight_bytes + cache_bytes + logits_bytes + activation_bytes

    `weight_bytes` are exact, and so is `cache_bytes`: what `KVCache.allocate` takes for `context` tokens, prompt and
    answer together. `logits_bytes` are one canvas of logits in the weights' dtype, all that a step holds of them.
    `activation_bytes` is the peak of reading a prompt, in chunks of 2,048 tokens: for each token the answers of its
    experts in float32, and twice its hidden state; the passes of a step need less, and find it allocated.
    `file_bytes` is the size of the checkpoint on disk.

    It lacks what is there without a model: the process, its libraries, the tokenizer, a GPU's driver (`RESERVE`). The
    fused and reference operations unpack weights of fewer bits with every product and need more. InputError for a
    context outside the model's, and for a recipe that there is not or that does not fit the model's sizes."""
    if not 1 <= context <= config.max_position:
        raise InputError(f"a context of {context} tokens is outside the model's 1 to {config.max_position}")
    width, weights = _width(recipe), weight_bytes(config, recipe)
    sizes = {
        "file_bytes": weights,
        "weight_bytes": weights,
        "cache_bytes": cache_bytes(config, context, width)[1],
        "logits_bytes": logits_bytes(config, width),
        "activation_bytes": activation_bytes(config, context, width),
    }
    return sizes | {"total_bytes": sum(sizes.values()) - sizes["file_bytes"]}


def most_context(config: ModelConfig, recipe: str, room: float) -> int:
    """The longest context that the model may have in so many bytes; 0 where there is none."""
    low, high = 0, config.max_position
    while low < high:
        middle = (low + high + 1) // 2
        if needs(config, recipe, middle)["total_bytes"] <= room:
            low = middle
        else:
            high = middle - 1
    return low


def cache_bytes(config: ModelConfig, context: int, element: int = 2) -> tuple[int, int]:
    """(bytes of one more token of context, bytes of the whole KV cache at `context` tokens), of one row.

    The second is what `KVCache.allocate` takes. Full layers grow; sliding layers stop at their window, with a canvas of
    slack."""

    def of(layer: LayerConfig, slots: int) -> int:
        return 2 * slots * layer.kv_heads * layer.head_dim * element

    growth = sum(of(layer, 1) for layer in config.layers if not layer.is_sliding)
    total = 0
    for layer in config.layers:
        ring = context if layer.window is None else min(context, layer.window - 1 + config.canvas_length)
        total += of(layer, ring + 1)  # one slot takes the padding of ragged batches
    return growth, total


def logits_bytes(config: ModelConfig, element: int = 2) -> int:
    """One canvas of logits; one token's where the model has no canvas."""
    return new_tokens(config) * config.vocab_size * element


def activation_bytes(config: ModelConfig, context: int, element: int = 2) -> int:
    """See `needs`."""
    tokens = max(min(context, PREFILL_CHUNK), new_tokens(config))
    return tokens * config.hidden_size * (4 * config.top_k_experts + 2 * element)


def new_tokens(config: ModelConfig) -> int:
    """Of a step: a canvas, or one where the model has none."""
    return config.canvas_length if config.is_diffusion else 1


# ---- work of a pass and of a step -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The least work of a part: bytes to read, and floating-point operations by the kind of product ("bf16", …)."""

    bytes: float
    flops: dict[str, float]

    def __add__(self, other: Work) -> Work:
        kinds = {**self.flops, **other.flops}
        flops = {kind: self.flops.get(kind, 0.0) + other.flops.get(kind, 0.0) for kind in kinds}
        return Work(self.bytes + other.bytes, flops)

    @property
    def all_flops(self) -> float:
        """Operations of all kinds together."""
        return sum(self.flops.values())

    def seconds(self, most: dict[str, Any]) -> float:
        """The floor: memory and arithmetic at the best that `machine.ceilings` found, perfectly overlapped."""
        rates = most["flops_per_second"]
        best = {kind: float(rates[kind if kind in rates else "bf16"]["best"]) for kind in self.flops}
        arithmetic = sum(flops / best[kind] for kind, flops in self.flops.items())
        return max(self.bytes / float(most["bytes_per_second"]["best"]), arithmetic)


def distinct_experts(config: ModelConfig, tokens: int) -> float:
    """The expected share of a layer's experts that at least one of `tokens` tokens chooses, if each is as likely."""
    return 1 - (1 - config.top_k_experts / config.num_experts) ** tokens


def pass_work(
    config: ModelConfig, precision: Precision, tokens: int, context: int, is_encode: bool = False, batch: int = 1
) -> Work:
    """One pass of the stack over `tokens` new tokens behind `context` cached ones in each row, without the vocabulary.

    Each weight is read once, of the experts those that are chosen at all, and the keys and values that are in view."""
    weights, rows = Parameters.of(config), tokens * batch
    cost = Work(0.0, {})
    for count, used, worked, kept in (
        (weights.attention + weights.dense, 1.0, 1.0, precision.dense),
        (0 if is_encode else weights.self_conditioning, 1.0, 1.0, precision.conditioning),
        (weights.rest, 1.0, 1.0, precision.plain),
        (weights.experts, distinct_experts(config, rows), weights.chosen, precision.experts),
    ):
        cost += Work(count * used * kept.bits / 8, {kept.product: 2.0 * rows * count * worked})
    for layer in config.layers:
        held = context if layer.window is None else min(context, layer.window - 1)
        if is_encode:
            in_view = sum(min(context + n, layer.window or context + n) for n in range(1, tokens + 1))
        else:
            in_view = tokens * (held + tokens)
        cost += Work(
            batch * 2.0 * held * layer.kv_heads * layer.head_dim * precision.width,
            {precision.plain.product: batch * 4.0 * config.num_heads * layer.head_dim * in_view},
        )
    return cost


def vocabulary_work(config: ModelConfig, precision: Precision, tokens: int) -> Work:
    """One product with the embedding: the logits of a read-out, or a soft embedding."""
    count = config.vocab_size * config.hidden_size
    return Work(count * precision.plain.bits / 8, {precision.plain.product: 2.0 * tokens * count})


def step_work(config: ModelConfig, precision: Precision, context: int, batch: int = 1) -> Work:
    """One denoising step: the pass, the logits, the soft embedding.

    The last two share one matrix, which a fused kernel reads once (softmax(h ET) E is attention over the vocabulary);
    read twice, it costs that much more, and so does a head of its own. Where the model has no canvas: one token,
    without the soft embedding."""
    tokens = new_tokens(config)
    logits = vocabulary_work(config, precision, tokens * batch)
    work = pass_work(config, precision, tokens, context, not config.is_diffusion, batch) + logits
    return work + Work(logits.bytes if config.has_head else 0.0, logits.flops) if config.is_diffusion else work


# ---- hardware -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker publishes it: GB, GB/s, and dense (not sparse) TFLOP/s with float32 accumulation."""

    name: str
    memory: float
    bandwidth: float | None = None
    bf16: float | None = None
    fp8: float | None = None
    reported: tuple[str, ...] = ()
    """What CUDA calls exactly this one; slower relatives of a similar name are not taken for it."""

    def rate(self, product: str) -> float | None:
        """Operations a second of our products: int8 is unpacked to bf16, and fp8 where there are no such products."""
        tera = {"bf16": self.bf16, "int8": self.bf16, "fp8": self.fp8 or self.bf16}.get(product)
        return tera * 1e12 if tera else None

    def seconds(self, cost: Work) -> tuple[float | None, float | None]:
        """(of the bytes, of the arithmetic) at the published figures; None where there is none."""
        rates = {kind: self.rate(kind) for kind in cost.flops}
        arithmetic = None if None in rates.values() else sum(n / (rates[kind] or 1) for kind, n in cost.flops.items())
        return cost.bytes / self.bandwidth / 1e9 if self.bandwidth else None, arithmetic

    @property
    def room(self) -> float:
        """Bytes for a model."""
        return self.memory * 1e9 - RESERVE


# The makers' published figures (data sheets and architecture papers), not measurements: an H200 measures about 4.3 of
# its 4.8 TB/s and 790 of its 989 TFLOP/s. DGX Spark's dense figures are its "1 PFLOP FP4, sparse" halved to dense FP4,
# then to FP8, then to bf16. DGX Station is its GB300 GPU alone, without the slower memory of its CPU. A100 80 GB is the
# SXM module.
GPUS = (
    Gpu("RTX 4060 Ti 16 GB", 16, 288, reported=("NVIDIA GeForce RTX 4060 Ti",)),
    Gpu("RTX 4080", 16, 716.8, 97.5, 194.9, ("NVIDIA GeForce RTX 4080",)),
    Gpu("RTX 5070 Ti", 16, 896, 87.9, 175.8, ("NVIDIA GeForce RTX 5070 Ti",)),
    Gpu("RTX 5080", 16, 960, 112.6, 225.1, ("NVIDIA GeForce RTX 5080",)),
    Gpu("RTX 3090", 24, 936, 71, None, ("NVIDIA GeForce RTX 3090",)),
    Gpu("RTX 4090", 24, 1008, 165.2, 330.3, ("NVIDIA GeForce RTX 4090",)),
    Gpu("L4", 24, 300, 121, 242, ("NVIDIA L4",)),
    Gpu("RTX 5090", 32, 1792, 209.5, 419, ("NVIDIA GeForce RTX 5090",)),
    Gpu("A100 40 GB", 40, 1555, 312, None, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    Gpu("A100 80 GB", 80, 2039, 312, None, ("NVIDIA A100-SXM4-80GB",)),
    Gpu("H100", 80, 3350, 989.4, 1978.9, ("NVIDIA H100 80GB HBM3",)),
    Gpu("RTX PRO 6000", 96, 1792, 503.8, 1007.6, ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition",)),
    Gpu("DGX Spark", 128, 273, 125, 250, ("NVIDIA GB10",)),
    Gpu("H200", 141, 4800, 989.4, 1978.9, ("NVIDIA H200",)),
    Gpu("B200", 180, 8000, 2250, 4500, ("NVIDIA B200",)),
    Gpu("DGX Station", 252, 7100, 2500, 5000, ("NVIDIA GB300",)),
)
RESERVE = 0.6e9
"""Bytes kept free for the driver's context, and between the blocks of an allocator, when asking whether a model fits. A
GB is taken as 10^9 bytes; most cards have a few hundredths more, which is left to a screen."""


def named_gpu(name: str) -> Gpu:
    """A GPU of the table, by name; case and spaces do not count.

    "RTX" and the memory may be left out where one GPU remains. InputError lists the names."""

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum()).removeprefix("rtx")

    for names in ({gpu: gpu.name for gpu in GPUS}, {gpu: re.sub(r" \d+ GB$", "", gpu.name) for gpu in GPUS}):
        matches = [gpu for gpu in GPUS if plain(name) == plain(names[gpu])]
        if len(matches) == 1:
            return matches[0]
    raise InputError(f"no figures for a GPU named {name!r}; choose one of {', '.join(gpu.name for gpu in GPUS)}")


def detected_gpu() -> Gpu | None:
    """The CUDA device of this machine, with published figures if the table has it; None where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver too old for torch is no GPU, not an error
        if not torch.cuda.is_available():
            return None
        device = torch.cuda.get_device_properties(0)
    known = next((gpu for gpu in GPUS if device.name in gpu.reported), Gpu(device.name, 0))
    return Gpu(known.name, device.total_memory / 1e9, known.bandwidth, known.bf16, known.fp8)


# ---- words for people ------------------------------------------------------------------------------------------------


def number(value: float, unit: str = "") -> str:
    """25.25 B, 3.84 M, 2.40 TFLOP."""
    scales = ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k"), (1, ""))
    scale, letter = next(s for s in scales if value >= s[0] or s[0] == 1)
    return f"{value / scale:.2f} {letter}{unit}".strip()


def size(count: float) -> str:
    """Bytes in powers of ten: 50.4 GB."""
    scales = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
    scale, unit = next(s for s in scales if count >= s[0] or s[0] == 1)
    return f"{three(count / scale)} {unit}"


def three(value: float) -> str:
    """Three digits: 118, 11.8, 1.18."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    """1.24 s, 83.1 ms, 412 µs."""
    if seconds is None:
        return "–"
    scale, unit = next((s for s in ((1, "s"), (1e-3, "ms")) if seconds >= s[0]), (1e-6, "µs"))
    return f"{seconds / scale:.3g} {unit}" if seconds / scale < 999.5 else f"{seconds / scale:.0f} {unit}"


def tokens(count: int) -> str:
    """Of context: 256K, 1.5K, 640; never more than there are."""
    return (
        str(count) if count < 1024 else f"{math.floor(count / 102.4) / 10:g}K" if count < 10240 else f"{count >> 10}K"
    )
