"""Makes bitsandbytes.safetensors: small weights as bitsandbytes 0.50 stores them, and what it unpacks them to.

pip install --no-deps --target /tmp/bnb bitsandbytes==0.50.2
PYTHONPATH=/tmp/bnb python tests/checkpoints/formats/record_bitsandbytes.py
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PATH = Path(__file__).with_name("bitsandbytes.safetensors")
ROWS, COLUMNS, BLOCK = 6, 128, 64  # whole blocks a row: else its CPU kernel (0.50.2) takes scales of other blocks


def main() -> None:
    """Write the file."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    tensors: dict[str, Tensor] = {}
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[2] *= 30
    for kind in ("nf4", "fp4"):
        for case, is_nested in ((kind, False), (f"{kind} nested", True)):
            codes, state = functional.quantize_4bit(weight, None, None, BLOCK, is_nested, kind)
            parts = {"": codes} | {f".{name}": part for name, part in state.as_dict(packed=True).items()}
            tensors |= {f"{case}/weight{name}": part.clone() for name, part in parts.items()}
            tensors[f"{case}/values"] = functional.dequantize_4bit(codes, state).float()
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    tensors |= {"int8/weight": codes, "int8/SCB": scales, "int8/weight_format": torch.zeros((), dtype=torch.uint8)}
    tensors["int8/values"] = functional.int8_vectorwise_dequant(codes, scales)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, PATH)


if __name__ == "__main__":
    main()
