"""AutoAWQ checkpoints, 4 bits in the GEMM layout, read as ours.

A module keeps its weight transposed: `X.qweight` int32 [I, O / 8], `X.qzeros` int32 [I / group, O / 8], `X.scales`
[I / group, O]; value = (code - zero) x scale. A word holds eight neighbouring outputs, from the lowest bits on those of
the places 0 2 4 6 1 3 5 7. Experts are modules of their own. What is not quantised lies under its released name.
It lacks the layouts gemv, exllama and marlin, and other widths.

Source: AutoAWQ, awq/utils/packing_utils.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, FormatReader
from sfumato.checkpoints.formats.groups import grouped, values
from sfumato.checkpoints.formats.linears import check_name, check_whole, entry_of, open_linears
from sfumato.checkpoints.formats.scales import SCALES, Codes, finite
from sfumato.checkpoints.shards import Stored, short
from sfumato.errors import CheckpointError
from sfumato.ops.packed import Packed, unpaired

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word, in fours of bits, the eight outputs lie."""


def open_awq(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a folder whose config.json (`config`) says quant_method "awq"; headers alone are read.

    CheckpointError names the tensor or the setting that is wrong."""
    group, is_symmetric = _settings(config.get("quantization_config"), str(folder / "config.json"))
    return open_linears(folder, config, "AWQ 4-bit", own=partial(_own, group=group, is_symmetric=is_symmetric))


def _own(stored: dict[str, Stored], group: int, is_symmetric: bool) -> dict[str, Entry]:
    entries = {}
    for name in [name for name in stored if name.endswith(".qweight")]:
        weight, module = stored.pop(name), name.removesuffix(".qweight")
        check_name(weight)
        scales, zeros = stored.pop(f"{module}.scales", None), stored.pop(f"{module}.qzeros", None)
        if not scales or not (zeros or is_symmetric):
            lacking = "qzeros" if scales else "scales"
            raise CheckpointError(f"{module}.{lacking} is missing; it belongs to {name} in {weight.file}")
        entries[f"{module}.weight"] = _awq(f"{module}.weight", weight, scales, zeros, group)
    return entries


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
    tensors = (weight, scales, zeros) if zeros else (weight, scales)
    check_whole(*tensors)
    for part in tensors:
        dtypes = SCALES if part is scales else ("I32",)
        if part.dtype not in dtypes or len(part.shape) != 2 or 0 in part.shape:
            raise CheckpointError(
                f"{part.name} in {part.file} is {short(part.dtype)} of shape {short(list(part.shape))}; it must be a "
                f"matrix of {' or '.join(dtypes)}"
            )
    inputs, outputs = weight.shape[0], weight.shape[1] * 8
    group = inputs if group == -1 else group
    for part in tensors[1:]:
        across = outputs if part is scales else outputs // 8
        if part.shape != (inputs // group, across) or inputs % group or group % 2:
            raise CheckpointError(
                f"{part.name} in {part.file} has the shape {list(part.shape)}; qweight of {list(weight.shape)} in "
                f"groups of {group} asks for {[inputs // group, across]}, and the groups must be whole and even"
            )

    def parts(first: int, last: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes [O, I], scales and zeros [O, I / group] of these outputs."""
        zero = _codes(zeros.read(), first, last) if zeros else None
        return _codes(weight.read(), first, last), finite(scales)[:, first:last].T, zero

    def packed(first: int, last: int) -> Packed:
        code, scale, zero = parts(first, last)
        return grouped(code, 4, scale, zero, group)

    def read(first: int, last: int) -> Tensor:
        code, scale, zero = parts(first, last)
        return values(code, 4, scale, zero, torch.arange(inputs) // group)

    label = f"AWQ 4-bit, group {group}, {scales.dtype}" + ", symmetric" * (zeros is None)
    return entry_of(name, tensors, Codes(label, (outputs, inputs), packed, read))


def _codes(words: Tensor, first: int, last: int) -> Tensor:
    """Words [N, O / 8] -> codes of the outputs first to last, uint8 [last - first, N]."""
    begin, end = first // 8, -(-last // 8)
    codes = unpaired(words[:, begin:end].contiguous().view(torch.uint8)).unflatten(1, (-1, 8))
    columns: Tensor = codes[..., list(PLACES)].flatten(1)[:, first - begin * 8 : last - begin * 8]
    return columns.T.contiguous()
