"""AutoAWQ checkpoints, 4 bits in the GEMM layout, read as ours.

A module keeps its weight transposed: `X.qweight` int32 [I, O / 8], `X.qzeros` int32 [I / group, O / 8], `X.scales`
[I / group, O]; value = (code - zero) x scale. A word holds eight neighbouring outputs, from the lowest bits on those of
the places 0 2 4 6 1 3 5 7. Experts are modules of their own. What is not quantised lies under its released name.
It lacks the layouts gemv, exllama and marlin, and other widths.

Source: AutoAWQ, awq/utils/packing_utils.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, FormatReader
from sfumato.checkpoints.formats.experts import fused
from sfumato.checkpoints.shards import Stored, short, stored_tensors
from sfumato.errors import CheckpointError
from sfumato.model.config import ModelConfig, read_json
from sfumato.ops.packed import Packed

FLOATS = ("BF16", "F16", "F32")
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word, in fours of bits, the eight outputs lie."""


def open_awq(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a folder whose config.json (`config`) says quant_method "awq"; headers alone are read.

    CheckpointError names the tensor or the setting that is wrong."""
    source = str(folder / "config.json")
    model = ModelConfig.from_dict(config, source)
    group, is_symmetric = _settings(config.get("quantization_config"), source)
    stored = stored_tensors(folder)
    entries: dict[str, Entry] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            if f"{module}.weight" in stored:
                raise CheckpointError(f"{short(module)} has both weight and qweight in {tensor.file}; one must go")
            scales, zeros = stored.get(f"{module}.scales"), stored.get(f"{module}.qzeros")
            if not scales or not (zeros or is_symmetric):
                lacking = "qzeros" if scales else "scales"
                raise CheckpointError(f"{short(module)}.{lacking} is missing; it belongs to {short(name)}")
            entries[f"{module}.weight"] = _awq(f"{module}.weight", tensor, scales, zeros, group)
        elif part not in ("scales", "qzeros") or f"{module}.qweight" not in stored:
            if tensor.dtype not in FLOATS:
                raise CheckpointError(
                    f"{short(name)} in {tensor.file} is stored as {short(tensor.dtype)}; what is not quantised must be "
                    f"{', '.join(FLOATS)}"
                )
            entries[name] = Entry(name, tensor.shape, tensor.nbytes, tensor.dtype, tensor.read)
    generation = folder / "generation_config.json"
    return Checkpoint(
        path=folder,
        format="AWQ 4-bit",
        config={name: value for name, value in config.items() if name != "quantization_config"},
        entries=fused(entries, model.num_experts),
        generation=read_json(generation) if generation.exists() else {},
    )


def _is_awq(folder: Path, quantization: dict[str, Any]) -> bool:
    return quantization.get("quant_method") == "awq"


READER = FormatReader("awq", _is_awq, open_awq)


def _settings(settings: Any, source: str) -> tuple[int, bool]:
    """The group, -1 for one a row, and whether modules may lack zero points."""
    if not isinstance(settings, dict) or settings.get("quant_method", "awq") != "awq":
        raise CheckpointError(f"{source} has no quantization_config with quant_method 'awq'; this is no AWQ checkpoint")
    bits, version = settings.get("bits", 4), settings.get("version", "gemm")
    if bits != 4 or str(version).lower() != "gemm":
        raise CheckpointError(
            f"{source}: quantization_config says bits {short(repr(bits))}, version {short(repr(version))}; of "
            "AWQ's formats, bits 4 in version gemm is supported"
        )
    group = settings.get("group_size", 128)
    if isinstance(group, bool) or not isinstance(group, int) or (group != -1 and (group < 2 or group % 2)):
        raise CheckpointError(
            f"{source}: quantization_config says group_size {short(group)}; it must be an even number, or -1 for "
            "one scale an output"
        )
    return group, settings.get("zero_point") is False


def _awq(name: str, weight: Stored, scales: Stored, zeros: Stored | None, group: int) -> Entry:
    for part, dtypes in ((weight, ("I32",)), (scales, FLOATS), (zeros, ("I32",))):
        if part and (part.dtype not in dtypes or len(part.shape) != 2 or 0 in part.shape):
            raise CheckpointError(
                f"{short(part.name)} in {part.file} is {short(part.dtype)} of shape {short(list(part.shape))}; it must "
                f"be a matrix of {' or '.join(dtypes)}"
            )
    inputs, outputs = weight.shape[0], weight.shape[1] * 8
    group = inputs if group == -1 else group
    for part, expected in ((scales, (inputs // group, outputs)), (zeros, (inputs // group, outputs // 8))):
        if part and (part.shape != expected or inputs % group or group % 2):
            raise CheckpointError(
                f"{short(part.name)} in {part.file} has the shape {list(part.shape)}; qweight of {list(weight.shape)} "
                f"in groups of {group} asks for {list(expected)}, and the groups must be whole and even"
            )
    # With float32 scales code x scale + bias is rounded three times: `packed` differs in the last bits.
    is_exact = scales.dtype != "F32" or zeros is None

    def parts(first: int, last: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes [O, I], scales and zeros [O, I / group] of these outputs."""
        scale = scales.read()
        if not (scale.float() * 15).isfinite().all():
            raise CheckpointError(
                f"{short(scales.name)} in {scales.file} has values that are not finite; it is damaged"
            )
        return (
            _codes(weight.read(), first, last),
            scale[:, first:last].T.contiguous(),
            _codes(zeros.read(), first, last) if zeros else None,
        )

    def packed(first: int, last: int) -> Packed:
        code, scale, zero = parts(first, last)
        data = code[:, ::2] | code[:, 1::2] << 4
        bias = None
        if zero is not None:
            scale = scale.float()
            bias = zero.float() * -scale
        return Packed("int4", (last - first, inputs), data, scale, group, bias)

    def read(first: int, last: int) -> Tensor:
        if is_exact:
            return packed(first, last).dense()
        code, scale, zero = parts(first, last)
        assert zero is not None
        values: Tensor = code.unflatten(1, (-1, group)).float() - zero[..., None]
        return (values * scale[..., None]).flatten(1)

    return Entry(
        name=name,
        shape=(outputs, inputs),
        nbytes=weight.nbytes + scales.nbytes + (zeros.nbytes if zeros else 0),
        stored=f"AWQ 4-bit, group {group}, {scales.dtype}" + ", symmetric" * (zeros is None),
        read=read,
        packed=packed,
    )


def _codes(words: Tensor, first: int, last: int) -> Tensor:
    """Words [N, O / 8] -> codes of the outputs first to last, uint8 [last - first, N]."""
    begin, end = first // 8, -(-last // 8)
    pairs = words[:, begin:end].contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    halves = torch.stack([pairs & 15, pairs >> 4], -1).flatten(2)[..., list(PLACES)].flatten(1)
    return halves[:, first - begin * 8 : last - begin * 8].T.contiguous()
