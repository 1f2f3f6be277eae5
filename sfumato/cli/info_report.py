"""The figures of `sfumato info`, as JSON has them: bytes, operations, milliseconds, tokens."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from sfumato.errors import CheckpointError, InputError
from sfumato.measure.work import (
    GPUS,
    PRECISIONS,
    Gpu,
    Parameters,
    Precision,
    cache_bytes,
    distinct_experts,
    logits_bytes,
    most_context,
    needs,
    new_tokens,
    step_work,
    vocabulary_work,
)
from sfumato.model.config import ModelConfig
from sfumato.quant.recipes import RECIPES

if TYPE_CHECKING:
    from sfumato.checkpoints.checkpoint import Checkpoint

CONTEXTS = (8192, 32_768, 262_144)
"""The contexts in tokens that memory is reported for, as far as the model goes."""
SUMMARIES = {"float32": "exact, slow", "bf16": "as released"} | {name: one.summary for name, one in RECIPES.items()}


class Operations(TypedDict):
    """Which operations can run on a device, for weights of each of `KINDS`."""

    device: str
    obstacles: dict[str, dict[str, str | None]]
    """By implementation and kind of weights: what is in its way, a sentence, or None."""
    auto: dict[str, str]
    """By kind of weights: the implementation that "auto" takes."""


class RecipeRow(TypedDict):
    """What one recipe needs; only `impossible` beside its name where the model's sizes do not fit its formats."""

    recipe: str
    summary: str
    impossible: NotRequired[str]
    file_bytes: NotRequired[int]
    weight_bytes: NotRequired[int]
    bits: NotRequired[dict[str, float]]
    step_bytes: NotRequired[int]
    needs: NotRequired[list[dict[str, Any]]]
    longest_context: NotRequired[dict[str, int]]
    """In tokens, by the name of a GPU; 0: it does not fit."""
    fits: NotRequired[bool]
    """On the GPU of the report, as are the fields below."""
    longest_context_here: NotRequired[int]
    memory_ms: NotRequired[float]
    arithmetic_ms: NotRequired[float | None]
    floor_ms: NotRequired[float]


class StoredKind(TypedDict):
    """How much of a file is stored as one kind, or held as one in memory."""

    kind: str
    """As the file calls it: "Q4_K", "BF16"; in memory "int4", "bfloat16"."""
    tensors: int
    bytes: int


class FileReport(TypedDict):
    """What the headers of a checkpoint's files say."""

    format: str
    """As a person calls it: "GGUF", "MLX affine 4-bit"."""
    tensors: int
    bytes: int
    has_images: bool
    """Whether there are tensors that turn images into embeddings."""
    kinds: list[StoredKind]
    """The largest first."""
    held: list[StoredKind]
    """What they are in memory without a recipe, so too; empty where the checkpoint cannot be loaded."""
    obstacle: str | None
    """Why it cannot be loaded."""
    notices: list[str]
    calibration: dict[str, Any] | None
    """How sure decisions are, as `sfumato calibrate` has written it; None: nothing is known."""


class Report(TypedDict):
    """Everything `sfumato info` says, as plain numbers."""

    model: str
    parameters: dict[str, Any]
    config: dict[str, Any]
    cache_bf16: dict[str, int]
    logits_bf16_bytes: int
    context: int
    contexts: list[int]
    step: dict[str, Any]
    gpu: dict[str, Any] | None
    gpus: list[dict[str, Any]]
    recipes: list[RecipeRow]
    operations: NotRequired[Operations]
    file: NotRequired[FileReport]
    """Where there are files of weights."""


def report(config: ModelConfig, context: int, gpu: Gpu | None = None, name: str = "") -> Report:
    """Everything `sfumato info` says, as plain numbers: bytes, operations, milliseconds, tokens."""
    if not 1 <= context <= config.max_position:
        raise InputError(f"a context of {context} tokens is outside the model's 1 to {config.max_position}")
    weights = Parameters.of(config)
    growth, at_context = cache_bytes(config, context)
    contexts = sorted({min(usual, config.max_position) for usual in CONTEXTS} | {context})
    full, new = Precision.of(config, "bf16"), new_tokens(config)
    step, vocabulary = step_work(config, full, context), vocabulary_work(config, full, new)
    return {
        "model": name,
        "parameters": {**asdict(weights), "total": weights.total, "active": weights.active},
        "config": {
            "layers": len(config.layers),
            "sliding_layers": sum(layer.is_sliding for layer in config.layers),
            "window": config.window,
            "experts": config.num_experts,
            "experts_per_token": config.top_k_experts,
            "vocabulary": config.vocab_size,
            "canvas_length": config.canvas_length if config.is_diffusion else None,
            "max_context": config.max_position,
        },
        "cache_bf16": {
            "bytes_per_token": growth,
            "fixed_bytes": cache_bytes(config, config.max_position)[1] - growth * (config.max_position + 1),
            "bytes_at_context": at_context,
            "bytes_at_max_context": cache_bytes(config, config.max_position)[1],
        },
        "logits_bf16_bytes": logits_bytes(config),
        "context": context,
        "contexts": contexts,
        "step": {
            "flops": step.all_flops,
            "vocabulary_flops": vocabulary.all_flops * (2 if config.is_diffusion else 1),
            "distinct_experts": distinct_experts(config, new),
            "second_embedding_read_bytes": round(vocabulary.bytes) if config.is_diffusion else 0,
        },
        "gpu": None if gpu is None else _as_json(gpu),
        "gpus": [_as_json(one) for one in GPUS],
        "recipes": [_row(config, recipe, context, contexts, gpu) for recipe in PRECISIONS],
    }


def file_report(checkpoint: Checkpoint) -> FileReport:
    """What a checkpoint's tensors are stored as, and held as, by their bytes."""
    from sfumato.checkpoints.contents import calibration_of
    from sfumato.checkpoints.load import held
    from sfumato.checkpoints.names import VISION

    kinds: dict[str, StoredKind] = {}
    for entry in checkpoint.entries.values():
        one = kinds.setdefault(entry.stored, {"kind": entry.stored, "tensors": 0, "bytes": 0})
        one["tensors"] += 1
        one["bytes"] += entry.nbytes
    in_memory: list[StoredKind] = []
    obstacle = None
    try:
        in_memory = [{"kind": kind, "tensors": n, "bytes": size} for kind, (n, size) in held(checkpoint).items()]
    except CheckpointError as error:
        obstacle = str(error)
    calibration = calibration_of(checkpoint)
    return {
        "format": checkpoint.format,
        "tensors": len(checkpoint.entries),
        "bytes": sum(one["bytes"] for one in kinds.values()),
        "has_images": any(name.startswith(VISION) for name in checkpoint.entries),
        "kinds": sorted(kinds.values(), key=lambda one: -one["bytes"]),
        "held": sorted(in_memory, key=lambda one: -one["bytes"]),
        "obstacle": obstacle,
        "notices": list(checkpoint.notices),
        "calibration": calibration.to_dict() if calibration.temperatures else None,
    }


def adapter_facts(folder: Path) -> dict[str, Any] | None:
    """What an adapter's files say of it, as `AdapterFacts` has it, and its calibration; None where there is none."""
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").exists():
        return None
    from sfumato.checkpoints.adapters import describe_adapter
    from sfumato.checkpoints.calibration import calibration_beside

    own = calibration_beside(folder)
    return {**asdict(describe_adapter(folder)), "calibration": own.to_dict() if own.temperatures else None}


def _as_json(gpu: Gpu) -> dict[str, Any]:
    return {key: value for key, value in asdict(gpu).items() if key != "reported"}


def _row(config: ModelConfig, name: str, context: int, contexts: list[int], gpu: Gpu | None) -> RecipeRow:
    row: RecipeRow = {"recipe": name, "summary": SUMMARIES[name]}
    try:
        precision, needed = Precision.of(config, name), {at: needs(config, name, at) for at in contexts}
    except InputError as error:
        row["impossible"] = str(error)
        return row
    work = step_work(config, precision, context)
    row["file_bytes"] = needed[context]["file_bytes"]
    row["weight_bytes"] = needed[context]["weight_bytes"]
    row["bits"] = {part: getattr(precision, part).bits for part in ("experts", "dense", "conditioning", "plain")}
    row["step_bytes"] = round(work.bytes)
    row["needs"] = [
        {"context": at, **one, "fits": [card.name for card in GPUS if one["total_bytes"] <= card.room]}
        for at, one in needed.items()
    ]
    row["longest_context"] = {card.name: most_context(config, name, card.room) for card in GPUS}
    if gpu is not None:
        row["fits"] = needed[context]["total_bytes"] <= gpu.room
        row["longest_context_here"] = most_context(config, name, gpu.room)
        memory, arithmetic = gpu.seconds(work)
        if memory is not None:
            row["memory_ms"], row["arithmetic_ms"] = 1e3 * memory, None if arithmetic is None else 1e3 * arithmetic
            row["floor_ms"] = max(row["memory_ms"], row["arithmetic_ms"] or 0.0)
    return row


KINDS = ("bf16", "int8", "fp8", "int4")
"""The weights that operations are reported for: in bfloat16, and by recipe."""


def operations(device: str | None = None) -> Operations:
    """Which operations can run on this machine (its GPU, if it has one), for weights of each kind."""
    import torch

    from sfumato.ops import survey
    from sfumato.quant.apply import samples

    if device is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a driver too old for torch is no GPU, not an error
            device = "cuda" if torch.cuda.is_available() else "cpu"
    standings = {kind: survey(device, torch.bfloat16, samples(kind) if kind != "bf16" else []) for kind in KINDS}
    names = [one.name for one in standings["bf16"]]
    return {
        "device": device,
        "obstacles": {name: {kind: standings[kind][n].obstacle for kind in KINDS} for n, name in enumerate(names)},
        "auto": {kind: next(one.name for one in standings[kind] if one.is_auto) for kind in KINDS},
    }
