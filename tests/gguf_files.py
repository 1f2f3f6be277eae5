"""GGUF files for tests: random blocks of every kind, and what a file holds, ready to be written again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.checkpoints.formats import gguf_blocks as blocks
from sfumato.checkpoints.formats import gguf_writer
from sfumato.checkpoints.formats.gguf import PlannedBlocks, read_header, write_file
from sfumato.checkpoints.formats.gguf_names import tensor_table
from sfumato.model.config import ModelConfig

SCALES = {  # where a block's float16 numbers lie; IQ1_M's is in four pieces, those of 4-bit floats have none
    **dict.fromkeys(["Q4_0", "Q5_0", "Q8_0", "Q1_0", "Q2_0"], (0,)),
    **dict.fromkeys(["IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S"], (0,)),
    **dict.fromkeys(["Q4_1", "Q5_1", "Q4_K", "Q5_K"], (0, 2)),
    **{"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82), "TQ1_0": (52,), "TQ2_0": (64,)},
}
HALVES = [0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), 2.0**-14, 6.1e-5, 0.0123, -3.7]
"""What a scale may be: zeros, the largest, the least subnormal, the least normal, a negative one."""


def random_blocks(
    kind: str, rows: int, count: int, seed: int = 0, scale: float | None = None, fill: int | None = None
) -> Tensor:
    """Rows of blocks: random bytes, or all of them `fill`; in every float16 place one of HALVES, or `scale`, varied.

    The scales of 4-bit floats are any that are numbers."""
    rng = np.random.default_rng(seed)
    size = blocks.KINDS[blocks.NUMBERS[kind]].nbytes
    raw = rng.integers(0, 256, (rows, count, size), dtype=np.uint8)
    if fill is not None:
        raw[...] = fill
    for at in SCALES.get(kind, (None,)):
        values = rng.choice(HALVES, (rows, count)) if scale is None else scale * rng.uniform(0.5, 1, (rows, count))
        put_scale(kind, raw, values.astype(np.float16), at)
    if kind in ("MXFP4", "NVFP4"):
        low, high = {"MXFP4": (0, 255), "NVFP4": (0, 127)}[kind]
        if scale is not None:
            high = {"MXFP4": 120, "NVFP4": 40}[kind]
        part = raw[..., : 1 if kind == "MXFP4" else 4]
        part[...] = rng.integers(low, high, part.shape)
    return torch.from_numpy(raw.reshape(rows, -1))


def put_scale(kind: str, raw: NDArray[np.uint8], values: NDArray[np.float16], at: int | None) -> None:
    """Write float16 numbers into blocks [.., bytes] at a place of SCALES, or where IQ1_M has it."""
    if at is not None:
        raw[..., at : at + 2] = values[..., None].view(np.uint8)
    elif kind == "IQ1_M":
        bits = values.view(np.uint16)[..., None] >> np.array([0, 4, 8, 12], np.uint16) & 15
        raw[..., 49:56:2] = raw[..., 49:56:2] & 15 | (bits << 4).astype(np.uint8)


def whole(raw: Tensor) -> Iterator[Tensor]:
    """A tensor's only part."""
    yield raw


def copied(path: Path) -> tuple[dict[str, Any], list[PlannedBlocks]]:
    """What it takes to write a file again."""
    header = read_header(path)
    stored = header.tensors.values()
    return header.metadata, [PlannedBlocks(one.name, one.kind, one.shape, partial(whole, one.read())) for one in stored]


def write_model(
    path: Path,
    config: ModelConfig,
    kind_of: Callable[[str, tuple[int, ...]], str],
    changes: Mapping[str, Any] | None = None,
    more: Sequence[PlannedBlocks] = (),
) -> dict[str, Tensor]:
    """A file of a model, every number in it random; the released names to what is stored. `kind_of` has GGUF's name and
    the shape of a tensor; `changes` are of metadata, where None takes a key away; `more` are tensors besides."""
    raws: dict[str, Tensor] = {}
    planned = []
    for at, (theirs, ours, shape) in enumerate(tensor_table(config)):
        kind = kind_of(theirs, shape)
        if kind in blocks.PLAIN:
            values = torch.randn(shape, generator=torch.Generator().manual_seed(at))
            raws[ours] = blocks.encode(kind, values * (0.1 if len(shape) > 1 else 1))
        else:
            rows = int(np.prod(shape[:-1]))
            count = shape[-1] // blocks.KINDS[blocks.NUMBERS[kind]].values
            raws[ours] = random_blocks(kind, rows, count, at, 1e-3).view(*shape[:-1], -1)
        planned.append(PlannedBlocks(theirs, kind, shape, partial(whole, raws[ours])))
    divisors = gguf_writer.divisors_of(config)
    rope = partial(whole, blocks.encode("F32", divisors))
    planned.append(PlannedBlocks("rope_freqs.weight", "F32", tuple(divisors.shape), rope))
    metadata = {**gguf_writer.metadata_of(config, "mixed"), **gguf_writer.tokenizer_of(config, None), **(changes or {})}
    write_file(path, {key: value for key, value in metadata.items() if value is not None}, [*planned, *more])
    return raws


def write_split(source: Path, folder: Path, stem: str, parts: int, **changes: Any) -> list[Path]:
    """A file's tensors in so many parts, the first with its metadata, as gguf-split writes them; `changes` of its own
    keys have a place of the part in front: `_2_no=5`."""
    metadata, plan = copied(source)
    each = -(-len(plan) // parts)
    paths = []
    for at in range(parts):
        own = {"no": at, "count": parts, "tensors.count": len(plan)}
        own |= {key.split("_", 2)[2]: value for key, value in changes.items() if key.startswith(f"_{at + 1}_")}
        head = {**(metadata if at == 0 else {}), **{f"split.{key}": value for key, value in own.items()}}
        paths.append(folder / f"{stem}-{at + 1:05}-of-{parts:05}.gguf")
        write_file(paths[-1], head, plan[at * each : (at + 1) * each])
    return paths
