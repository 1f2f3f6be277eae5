"""What `convert` writes, by name. Without torch: help and the shell's completion show it too."""

from __future__ import annotations

from sfumato.errors import InputError
from sfumato.quant import recipes

TARGETS = {
    **{name: f"Sfumato: {recipe.summary}" for name, recipe in recipes.RECIPES.items()},
    "bf16": "the released layout in bfloat16, which transformers reads too",
    "compressed-fp8": "compressed-tensors, FP8 with dynamic activations: vLLM",
    **{f"mlx-{bits}bit": f"MLX affine, {bits} bits in groups of 64" for bits in (3, 4, 5, 6, 8)},
    "mlx-mxfp4": "MLX mxfp4, 4-bit floats in groups of 32",
    "gguf-q8_0": "one GGUF file: llama.cpp",
    "gguf-bf16": "one GGUF file in full precision",
}
"""What `convert` writes, by name; how, `_PLANS` and `_to_gguf` say."""


def target_name(name: str) -> str:
    """The target of this name, bfloat16 being bf16 too; InputError where there is none."""
    name = name.replace("bfloat16", "bf16")
    if name not in TARGETS:
        raise InputError(f"there is no format {name!r} to convert to; choose one of {', '.join(TARGETS)}", option="to")
    return name
