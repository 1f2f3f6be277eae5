"""Transformers' own FP8 (quant_method "fp8"): e4m3 codes, `weight_scale_inv` for blocks or the whole, experts fused.

Each Linear keeps `weight` and `weight_scale_inv` under its own name. Experts are modules of their own, or as the model
has them: stacks `experts.gate_up_proj` and `experts.down_proj` with `.._scale_inv` beside them. The config's
`weight_block_size` says of which blocks, null that there is one scale a matrix; scales are float32, or exponents of two
(`scale_fmt` "ue8m0"), which for blocks of 1 x 32 is MXFP8. Experts of 4-bit floats (`expert_dtype` "fp4") are MXFP4.
Scales of activations are left aside: what multiplies FP8 is rounded to it with a scale a row, where transformers takes
one for 128 inputs, or the file's.

Source: transformers, integrations/finegrained_fp8.py (`FP8Linear`, `FP8Experts`, `Fp8Dequantize`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, FormatReader
from sfumato.checkpoints.formats.compressed import LARGEST, block_of
from sfumato.checkpoints.formats.eight_bits import BlockSize, eight_bits, mxfp4_stack
from sfumato.checkpoints.formats.linears import check_name, check_whole, entry_of, open_linears
from sfumato.checkpoints.shards import Stored, short
from sfumato.errors import CheckpointError
from sfumato.ops.packed import BLOCK

METHOD = "fp8"
_STACK = re.compile(r"(.*\.experts\.(?:gate|up|gate_up|down)_proj)_scale_inv", re.ASCII | re.DOTALL)
_ACTIVATIONS = re.compile(r".*\.experts\.(?:gate|up|gate_up|down)_proj_activation_scale", re.ASCII | re.DOTALL)


def open_fp8(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a folder whose config.json (`config`) says quant_method "fp8"; headers alone are read.

    CheckpointError names the setting or the tensor that is not as its layout has it."""
    quantization, source = config.get("quantization_config"), folder / "config.json"
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(f"{source} has no quantization_config with quant_method 'fp8'; this is no FP8 checkpoint")
    block = block_of(quantization.get("weight_block_size", [BLOCK, BLOCK]), source, "weight_block_size")
    block = block or (LARGEST, LARGEST)  # null: all of a matrix
    return open_linears(folder, config, "transformers FP8", (), block, lambda stored: _stacks(stored, block))


def _stacks(stored: dict[str, Stored], block: BlockSize) -> dict[str, Entry]:
    """The stacks of experts that have scales, taken out of `stored`."""
    entries = {}
    for name in list(stored):
        if _ACTIVATIONS.fullmatch(name):
            del stored[name]
        elif match := _STACK.fullmatch(name):
            scale = stored.pop(name)
            check_name(scale)
            codes = stored.pop(match[1], None)
            if codes is None:
                raise CheckpointError(f"{scale.file} has the scales {name} without the stack that they belong to")
            check_whole(codes, scale)
            if len(codes.shape) != 3 or 0 in codes.shape or codes.dtype not in ("F8_E4M3", "I8"):
                raise CheckpointError(
                    f"{codes.name} in {codes.file} is {short(codes.dtype)} of shape {short(list(codes.shape))}; beside "
                    "scales it must be a stack [E, O, I] of F8_E4M3, or of I8 for 4-bit floats"
                )
            together = mxfp4_stack(codes, scale) if codes.dtype == "I8" else eight_bits(codes, scale, block)
            entries[match[1]] = entry_of(match[1], (codes, scale), together)
    return entries


def _is_fp8(folder: Path, quantization: dict[str, Any]) -> bool:
    return quantization.get("quant_method") == METHOD


READER = FormatReader(METHOD, _is_fp8, open_fp8)
