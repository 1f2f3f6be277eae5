"""GPTQ checkpoints, by GPTQModel, AutoGPTQ or AutoRound, 2, 3, 4 or 8 bits, read as ours.

A module keeps its weight transposed: `X.qweight` int32 [I x bits / 32, O], `X.qzeros` int32 [groups, O x bits / 32],
`X.scales` [groups, O], and mostly `X.g_idx` [I], the group of each input; value = (code - zero) x scale. Words hold
codes from the lowest bit on, over their borders. What a module's tensors are says how many bits and which groups it
has, so that settings for single modules (`dynamic`, `extra_config`) need not be read. Three conventions for zeros:

    gptq          the file has zero - 1; a word is added to as one number, as GPTQModel does
    auto_gptq     the same by AutoRound, which adds to each zero alone
    gptq_v2, auto_round     as they are

AutoRound's other packings are those of their own files (`awq`, `linears`). Where the inputs are not in the order of
their groups ("act order"), no code of ours says the same: `Entry.fallback`. It lacks GPTQModel's planar words (5, 6 and
7 bits), Marlin's, and AutoRound's rotations and integer microscaling: each refused by name.

Sources: GPTQModel 7.7, nn_modules/qlinear (`dequantize_weight`), utils/model.py (`convert_gptq_v1_to_v2..`);
AutoRound 0.16, auto_round_extension/torch/qlinear_torch.py and qlinear_torch_zp.py, inference/backend.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import FALLBACK, Checkpoint, Entry, FormatReader
from sfumato.checkpoints.formats.awq import open_awq
from sfumato.checkpoints.formats.bits import unpacked
from sfumato.checkpoints.formats.groups import group_index, grouped, values
from sfumato.checkpoints.formats.linears import check_name, check_whole, entry_of, open_linears
from sfumato.checkpoints.formats.scales import SCALES, Codes, finite
from sfumato.checkpoints.shards import Stored, short
from sfumato.errors import CheckpointError
from sfumato.model.config import read_json
from sfumato.ops.packed import Packed

OWN_FILE = "quantize_config.json"
"""Where older tools say how weights are quantised, if config.json does not."""
AUTO_ROUND = ("auto-round", "intel/auto-round", "autoround")
"""How AutoRound calls itself in quant_method."""
_MINUS_ONE, _EACH_MINUS_ONE, _AS_IS = "minus one", "each minus one", "as is"
_FORMATS = {"gptq": _MINUS_ONE, "gptq_v2": _AS_IS}
_PACKINGS = {"auto_round:auto_gptq": _EACH_MINUS_ONE, "auto_round": _AS_IS, "auto_round:gptqmodel": _AS_IS}
_FLOATS = ("nv_fp", "mx_fp", "fp")
"""What `data_type` begins with where AutoRound writes modules as compressed-tensors does."""
LARGEST = 1 << 20
"""Inputs of a group."""
_PARTS = ("qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Convention:
    """What a file's settings say of all its modules."""

    label: str
    bits: int
    group: int
    """-1: all inputs."""
    zeros: str
    is_planar: bool
    """Whether 5, 6 and 7 bits lie in planes, not one after another."""


def open_gptq(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a folder that GPTQModel, AutoGPTQ or AutoRound has written; `config` is what config.json says.

    Headers are read, and the groups of inputs. CheckpointError names the setting or the tensor that is wrong."""
    source, settings = folder / "config.json", config.get("quantization_config")
    if settings is None:
        source = folder / OWN_FILE
        settings = read_json(source)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{source} has no quantization_config, an object that says how the weights are stored")
    if settings.get("quant_method") in AUTO_ROUND:
        return _open_auto_round(folder, config, settings, source)
    if settings.get("rotation"):
        raise CheckpointError(f"{source}: rotation is {short(settings['rotation'])}; rotated weights are not read")
    layout = settings.get("checkpoint_format", settings.get("format", "gptq"))
    if not isinstance(layout, str) or layout not in _FORMATS or settings.get("pack_dtype", "int32") != "int32":
        raise CheckpointError(
            f"{source}: checkpoint_format is {short(layout)}, pack_dtype {short(settings.get('pack_dtype', 'int32'))}; "
            f"of GPTQ's formats, {' and '.join(_FORMATS)} in words of int32 are read"
        )
    bits, group = _numbers(settings, source)
    return _open(folder, config, Convention("GPTQ", bits, group, _FORMATS[layout], True))


def _open_auto_round(folder: Path, config: dict[str, Any], settings: dict[str, Any], source: Path) -> Checkpoint:
    kind, packing = settings.get("data_type", "int"), settings.get("packing_format", "auto_round:auto_gptq")
    for key in ("rotation_config", "spinquant_config", "transform_config"):
        if settings.get(key):
            raise CheckpointError(f"{source}: {key} is {short(settings[key])}; rotated weights are not read")
    if isinstance(kind, str) and kind.startswith(_FLOATS):
        return open_linears(folder, config, f"AutoRound {kind}")
    if kind != "int" or not isinstance(packing, str):
        raise CheckpointError(
            f"{source}: data_type is {short(kind)}, packing_format {short(packing)}; of AutoRound's formats, int and "
            "those that begin with nv_fp, mx_fp and fp are read"
        )
    bits, group = _numbers(settings, source)
    if "awq" in packing:
        own = {"quant_method": "awq", "bits": bits, "group_size": group}
        return open_awq(folder, {**config, "quantization_config": own})
    # A back end may stand behind the packing: "auto_round:auto_gptq:exllamav2".
    name = next((name for name in sorted(_PACKINGS, key=len, reverse=True) if f"{packing}:".startswith(f"{name}:")), "")
    if not name or (name == "auto_round" and packing.count(":") and packing.split(":")[1] in ("fake", "mlx")):
        raise CheckpointError(
            f"{source}: packing_format is {short(packing)}; of AutoRound's, {', '.join(_PACKINGS)} and awq are read"
        )
    return _open(folder, config, Convention("AutoRound", bits, group, _PACKINGS[name], False))


def _numbers(settings: dict[str, Any], source: Path) -> tuple[int, int]:
    bits, group = settings.get("bits", 4), settings.get("group_size", 128)
    if type(bits) is not int or not 2 <= bits <= 8:
        raise CheckpointError(f"{source}: bits is {short(bits)}; it must be a number from 2 to 8")
    if type(group) is not int or (group != -1 and not 1 <= group <= LARGEST):
        raise CheckpointError(
            f"{source}: group_size is {short(group)}; it must be from 1 to {LARGEST}, or -1 for a row"
        )
    return bits, group


def _open(folder: Path, config: dict[str, Any], convention: Convention) -> Checkpoint:
    def own(stored: dict[str, Stored]) -> dict[str, Entry]:
        entries = {}
        for name in [name for name in stored if name.endswith(".qweight")]:
            weight, module = stored.pop(name), name.removesuffix(".qweight")
            check_name(weight)
            parts = {part: stored.pop(f"{module}.{part}") for part in _PARTS if f"{module}.{part}" in stored}
            entries[f"{module}.weight"] = _module(f"{module}.weight", weight, parts, convention)
        return entries

    return open_linears(folder, config, f"{convention.label} {convention.bits}-bit", own=own)


def _module(name: str, weight: Stored, parts: dict[str, Stored], convention: Convention) -> Entry:
    for part in ("qzeros", "scales"):
        if part not in parts:
            raise CheckpointError(
                f"{weight.file} lacks {name.removesuffix('weight')}{part}; it belongs to {weight.name}"
            )
    check_whole(weight, *parts.values())
    for one, dtypes in ((weight, ("I32",)), (parts["qzeros"], ("I32",)), (parts["scales"], SCALES)):
        if one.dtype not in dtypes or len(one.shape) != 2 or 0 in one.shape:
            raise CheckpointError(
                f"{one.name} in {one.file} is {short(one.dtype)} of shape {short(list(one.shape))}; it must be a "
                f"matrix of {' or '.join(dtypes)}"
            )
    bits, inputs, group = _sizes(weight, parts, convention)
    if bits in (5, 6, 7) and convention.is_planar:
        raise CheckpointError(f"{weight.name} in {weight.file} has {bits} bits in planes; read are 2, 3, 4 and 8 bits")
    group_of = group_index(parts.get("g_idx"), inputs, parts["scales"].shape[0], group)
    return entry_of(name, (weight, *parts.values()), _codes(weight, parts, (bits, inputs, group), group_of, convention))


def _sizes(weight: Stored, parts: dict[str, Stored], convention: Convention) -> tuple[int, int, int]:
    """Bits, inputs and the group of a module, from the shapes of its tensors; the settings decide what these leave."""
    (words, outputs), (groups, across) = weight.shape, parts["scales"].shape
    zeros, index = parts["qzeros"].shape, parts.get("g_idx")
    for bits in sorted(range(2, 9), key=lambda bits: bits != convention.bits):
        inputs = index.shape[0] if index and index.shape else words * 32 // bits
        fits = inputs > 0 and inputs % 2 == 0 and -(-inputs * bits // 32) == words
        if fits and across == outputs and zeros == (groups, -(-outputs * bits // 32)):
            own = inputs if convention.group == -1 else convention.group
            for group in (own, -(-inputs // groups)):
                if -(-inputs // group) == groups:
                    return bits, inputs, group
    raise CheckpointError(
        f"{weight.name} in {weight.file} has the shape {list(weight.shape)}, its qzeros {list(zeros)} and its scales "
        f"{list(parts['scales'].shape)}; they do not go together in any width from 2 to 8 bits"
    )


def _codes(
    weight: Stored,
    parts: dict[str, Stored],
    sizes: tuple[int, int, int],
    group_of: Tensor | None,
    convention: Convention,
) -> Codes:
    (bits, inputs, group), outputs = sizes, weight.shape[1]

    def read_parts(first: int, last: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes [O, I], scales and zeros [O, G] of these outputs; zeros None where all are the middle of the codes."""
        code = unpacked(weight.read()[:, first:last].T, bits, inputs)
        zero = _zeros(parts["qzeros"].read(), bits, outputs, convention.zeros)
        is_middle = bool((zero == 1 << bits - 1).all())
        return code, finite(parts["scales"]).T[first:last], None if is_middle else zero.T[first:last]

    def packed(first: int, last: int) -> Packed:
        code, scale, zero = read_parts(first, last)
        return grouped(code, bits, scale, zero, group)

    def read(first: int, last: int) -> Tensor:
        code, scale, zero = read_parts(first, last)
        return values(code, bits, scale, zero, torch.arange(inputs) // group if group_of is None else group_of)

    label = f"{convention.label} {bits}-bit, group {group}"
    if group_of is None:
        return Codes(label, (outputs, inputs), packed, read)
    return Codes(f"{label}, act order", (outputs, inputs), None, read, FALLBACK)


def _zeros(words: Tensor, bits: int, count: int, stored: str) -> Tensor:
    """Zeros [G, O] of words [G, O x bits / 32], for each convention."""
    if stored == _MINUS_ONE and bits in (2, 4, 8):
        ones = sum(1 << place for place in range(0, 32, bits))
        words = (words.long() + ones & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        return unpacked(words, bits, count)
    zeros = unpacked(words, bits, count)
    if stored == _AS_IS:
        return zeros
    more = zeros.to(torch.int16) + 1
    return more & (1 << bits) - 1 if stored == _MINUS_ONE else more


def _is_gptq(folder: Path, quantization: dict[str, Any]) -> bool:
    if not quantization:
        return (folder / OWN_FILE).exists()
    return quantization.get("quant_method") in ("gptq", *AUTO_ROUND)


READER = FormatReader("gptq, auto-round", _is_gptq, open_gptq)
