"""Counted from a config alone, no weights: parameters, bytes, operations, and what hardware publishes.

The floor that a GPU's memory bandwidth and arithmetic set under the time of one step. It lacks activations, kernels and
everything else that only makes a step slower: a floor is no forecast.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from sfumato.config import LayerConfig, ModelConfig
from sfumato.events import InputError

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
        width, count, inner = config.hidden_size, len(config.layers), config.intermediate_size
        return cls(
            embedding=config.vocab_size * width,
            experts=count * 3 * config.num_experts * config.expert_size * width,
            attention=sum(_attention(config, layer) for layer in config.layers),
            dense=count * 3 * width * inner,
            self_conditioning=3 * width * inner + width,
            rest=count * (width * config.num_experts + width + config.num_experts + 7 * width) + width,
            chosen=config.top_k_experts / config.num_experts,
        )

    @property
    def total(self) -> int:
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


# ---- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """How weights are stored, and at which of a GPU's rates they are multiplied."""

    name: str
    expert_bits: float
    other_bits: float
    cache_bytes: int
    arithmetic: str | None
    """"bf16" or "fp8"; None: no published rate is used."""

    def weight_bytes(self, parameters: Parameters) -> float:
        return (parameters.experts * self.expert_bits + (parameters.total - parameters.experts) * self.other_bits) / 8


PRECISIONS = (
    Precision("float32", 32, 32, 4, None),
    Precision("bf16", 16, 16, 2, "bf16"),
    Precision("fp8", 8, 8, 2, "fp8"),
    # Everything but the experts at 8 bits. The quarter bit: a 16-bit scale for 64 weights. Multiplied as bf16.
    Precision("int4 experts", 4.25, 8, 2, "bf16"),
)


def cache_bytes(config: ModelConfig, context: int, element: int = 2) -> tuple[int, int]:
    """(bytes of one more token of context, bytes of the whole KV cache at `context` tokens): what `KVCache.allocate`
    takes for one row. Full layers grow; sliding layers stop at their window, with a canvas of slack."""

    def of(layer: LayerConfig, slots: int) -> int:
        return 2 * slots * layer.kv_heads * layer.head_dim * element

    growth = sum(of(layer, 1) for layer in config.layers if not layer.is_sliding)
    total = 0
    for layer in config.layers:
        ring = context if layer.window is None else min(context, layer.window - 1 + config.canvas_length)
        total += of(layer, ring + 1)  # one slot takes the padding of ragged batches
    return growth, total


def logits_bytes(config: ModelConfig) -> int:
    """One canvas of float32 logits."""
    return config.canvas_length * config.vocab_size * 4


# ---- work of a pass and of a step -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What has to be multiplied (floating-point operations) and read from memory (bytes), at least."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, bandwidth: float, rate: float | None) -> float:
        """The floor: memory and arithmetic at full speed (bytes and operations a second), perfectly overlapped."""
        return max(self.bytes / bandwidth, self.flops / rate if rate else 0.0)


def distinct_experts(config: ModelConfig, tokens: int) -> float:
    """The expected share of a layer's experts that at least one of `tokens` tokens chooses, if each is as likely."""
    return 1 - (1 - config.top_k_experts / config.num_experts) ** tokens


def pass_work(config: ModelConfig, precision: Precision, tokens: int, context: int, is_encode: bool = False) -> Work:
    """One pass of the stack over `tokens` new tokens behind `context` cached ones, without the vocabulary: each weight
    read once, of the experts those that are chosen at all, and the keys and values that are in view."""
    weights = Parameters.of(config)
    other = weights.other - (weights.self_conditioning if is_encode else 0)
    flops = 2.0 * tokens * (other + weights.experts * weights.chosen)
    experts = weights.experts * distinct_experts(config, tokens)
    read = (other * precision.other_bits + experts * precision.expert_bits) / 8
    for layer in config.layers:
        held = context if layer.window is None else min(context, layer.window - 1)
        if is_encode:
            seen = sum(min(context + n, layer.window or context + n) for n in range(1, tokens + 1))
        else:
            seen = tokens * (held + tokens)
        flops += 4.0 * config.num_heads * layer.head_dim * seen
        read += 2.0 * held * layer.kv_heads * layer.head_dim * precision.cache_bytes
    return Work(flops, read)


def vocabulary_work(config: ModelConfig, precision: Precision, tokens: int) -> Work:
    """One product with the embedding: the logits of a read-out, or a soft embedding."""
    size = config.vocab_size * config.hidden_size
    return Work(2.0 * tokens * size, size * precision.other_bits / 8)


def step_work(config: ModelConfig, precision: Precision, context: int) -> Work:
    """One denoising step: the pass, the logits, the soft embedding. The last two share one matrix, which a fused
    kernel reads once (softmax(h ET) E is attention over the vocabulary); read twice, it costs that much more."""
    canvas = config.canvas_length
    logits = vocabulary_work(config, precision, canvas)
    return pass_work(config, precision, canvas, context) + logits + Work(logits.flops, 0)


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

    def rate(self, arithmetic: str | None) -> float | None:
        """Operations a second."""
        tera = {"bf16": self.bf16, "fp8": self.fp8}.get(arithmetic or "")
        return tera * 1e12 if tera else None


# The makers' published figures (data sheets and architecture papers), not measurements: an H200 measures about 4.3 of
# its 4.8 TB/s and 790 of its 989 TFLOP/s. DGX Spark's dense figures are its "1 PFLOP FP4, sparse" halved to dense FP4,
# then to FP8, then to bf16. DGX Station is its GB300 GPU alone, without the slower memory of its CPU.
GPUS = (
    Gpu("RTX 4090", 24, 1008, 165.2, 330.3, ("NVIDIA GeForce RTX 4090",)),
    Gpu("RTX 5090", 32, 1792, 209.5, 419, ("NVIDIA GeForce RTX 5090",)),
    Gpu("RTX PRO 6000", 96, 1792, 503.8, 1007.6, ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition",)),
    Gpu("H100", 80, 3350, 989.4, 1978.9, ("NVIDIA H100 80GB HBM3",)),
    Gpu("H200", 141, 4800, 989.4, 1978.9, ("NVIDIA H200",)),
    Gpu("B200", 180, 8000, 2250, 4500, ("NVIDIA B200",)),
    Gpu("DGX Spark", 128, 273, 125, 250, ("NVIDIA GB10",)),
    Gpu("DGX Station", 252, 7100, 2500, 5000, ("NVIDIA GB300",)),
)
RESERVE = 1e9
"""Bytes kept free for the driver and for activations when asking whether a model fits."""


def named_gpu(name: str) -> Gpu:
    """From the table, by name, case and spaces aside; InputError lists the names."""
    plain = lambda text: "".join(c for c in text.lower() if c.isalnum())  # noqa: E731
    for gpu in GPUS:
        if plain(name) in (plain(gpu.name), plain(gpu.name.removeprefix("RTX "))):
            return gpu
    raise InputError(f"no figures for a GPU named {name!r}; choose one of {', '.join(gpu.name for gpu in GPUS)}")


def detected_gpu() -> Gpu | None:
    """The CUDA device of this machine, with published figures if the table has it; None where there is none."""
    try:
        import torch
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver too old for torch is no GPU, not an error
        if not torch.cuda.is_available():
            return None
        found = torch.cuda.get_device_properties(0)
    known = next((gpu for gpu in GPUS if found.name in gpu.reported), Gpu(found.name, 0))
    return Gpu(known.name, found.total_memory / 1e9, known.bandwidth, known.bf16, known.fp8)


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
