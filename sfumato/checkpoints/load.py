"""Checkpoint → Model: streamed tensor by tensor, checked before a byte is believed; never pickle.

Loading builds the Model on the meta device, holds every file's header against it, and only then reads: one tensor at a
time, straight from the file into its place, packed to fewer bits on the way if a recipe says so. So a checkpoint is
refused before it costs memory, and the peak is the finished model plus one tensor. How a format stores its tensors is
`formats`'; here none is known by name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checkpoints.checkpoint import Checkpoint, Entry
from sfumato.checkpoints.contents import described, match
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.formats.released import joined, packed_parts, places
from sfumato.checkpoints.locate import resolve
from sfumato.errors import CapacityError, InputError
from sfumato.model import offload
from sfumato.model.network import Model, products, replace_
from sfumato.ops import load as load_ops
from sfumato.ops.contract import Ops
from sfumato.ops.packed import BLOCK, Packed
from sfumato.options import LoadOptions
from sfumato.quant.formats import Format, pack
from sfumato.quant.recipes import Recipe, named

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""What a model may compute in, by safetensors' names for what is stored so."""
PLAIN = LoadOptions(device="cpu", ops="fused")
"""On the processor, with plain tensors where the checkpoint has such, or is `in_full`: a model that can be saved and
trained."""


def load(
    source: str | Path | Checkpoint,
    options: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
    *,
    operations: Ops | None = None,
    recipe: Recipe | None = None,
    calibration: Mapping[str, Tensor] | None = None,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The Model of a checkpoint: one that is open, or whatever `resolve` understands, in any format of `formats`.

    `source` says which model; `options.model` is for whoever opens it and is not looked at here. Device "auto" is a
    GPU where there is one, dtype None the checkpoint's own. A model with packed weights runs, but is neither saved nor
    trained: the operations "cpu", and so "auto", pack all, and what the checkpoint has in fewer bits stays so, or in
    the nearest format (`Entry.fallback`). `PLAIN` and `checkpoint.in_full` keep plain tensors. `operations` and
    `recipe` stand in the place of `options.ops` and `options.quantize` for what has no name. A recipe's weights are
    packed to fewer bits as they are read, weighed by `calibration` (`quant.calibrate`, by the model's names).
    `options.memory_limit`, bytes of weights on the device, leaves the rest on the host, from where it is streamed in
    every pass (`offload`).

    `notice` gets a sentence for each kind of tensor that is left aside, and one about what lies where;
    `progress(done, all)` counts bytes. CheckpointError names the tensor or file that is wrong, before any tensor is
    read; InputError names an option, CapacityError a full device."""
    device, dtype = _device(options.device), _dtype(options.dtype)
    if recipe is None and options.quantize is not None:
        recipe = named(options.quantize)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(resolve(source))
    model = described(checkpoint)
    entries = match(model, checkpoint, notice or (lambda sentence: None))
    dtype = dtype or _own_dtype(entries)
    weights = _Weights(model, entries, recipe, device, dtype)
    samples = list(weights.samples())
    weights.announce(notice or (lambda sentence: None))
    model.use_(operations or load_ops(options.ops, device, dtype, samples))
    for sample in samples:  # refused now, if at all
        model.ops.pack(sample.to(device))
    placement = None
    if options.memory_limit is not None:
        placement = offload.plan(weights.sizes(), options.memory_limit, device)
    done, total = 0, sum(entry.nbytes for entry in entries.values())
    for name, entry in entries.items():
        try:
            weight = weights.read(name, (calibration or {}).get(name))
            is_streamed = placement is not None and placement.is_on_host(name)
            _put(model, name, offload.to_host(weight, device) if is_streamed else weight)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{device} is full after {done >> 20} of {total >> 20} MiB of weights; fewer bits (quantize=), a "
                "memory_limit, or another device may do"
            ) from error
        done += entry.nbytes
        if progress:
            progress(done, total)
    model.pack_()
    if placement is not None:
        offload.attach_(model, placement)
        if notice:
            notice(placement.sentence(offload.bandwidth(device)))
    return model


def held(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """How `load` holds a checkpoint without a recipe: by kind, as "int4" or "bfloat16", how many tensors and bytes.

    Of every kind and shape a part of one weight is read. CheckpointError where it cannot be loaded."""
    model = described(checkpoint)
    entries = match(model, checkpoint, lambda sentence: None)
    weights = _Weights(model, entries, None, torch.device("cpu"), _own_dtype(entries))
    kinds: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        kind, each = weights.held_as(name)
        count, nbytes = kinds.get(kind, (0, 0))
        kinds[kind] = count + 1, nbytes + round(each * math.prod(entry.shape))
    return kinds


class _Weights:
    """The weights of a checkpoint as the model will have them: in which format, how large, and one after another."""

    def __init__(
        self,
        model: Model,
        entries: Mapping[str, Entry],
        recipe: Recipe | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.entries, self.device, self.dtype = model, entries, device, dtype
        modules = {module: name for name, module in model.named_modules()}
        # Those that enter a product, which operations may lay out as they like.
        self.products = {f"{modules[owner]}.{leaf}" for owner, leaf in products(model)}
        self.formats = {name: recipe.format_of(name) if recipe else None for name in entries}
        self.rounded: Counter[tuple[str, str]] = Counter()
        self.known: dict[tuple[str, tuple[int, ...]], tuple[str, float]] = {}
        """By what it is stored as and its shape: what `held_as` says of a weight."""
        for name, entry in entries.items():
            if self.formats[name] is None and entry.fallback and not entry.packed and name in self.products:
                self.formats[name] = Format.named(entry.fallback)
                self.rounded[entry.stored, entry.fallback] += 1

    def announce(self, notice: Callable[[str], None]) -> None:
        """A sentence for each kind of weight that is rounded once more, for lack of codes that say the same."""
        for (stored, form), count in self.rounded.items():
            are = "weight is" if count == 1 else "weights are"
            notice(f"{count} {are} stored as {stored}, which is no format of ours; held as {form}")

    def samples(self) -> Iterator[Packed]:
        """One small packed weight of every kind and number of inputs that there will be."""
        kinds: set[tuple[str, tuple[int, ...]]] = set()
        for name, entry in self.entries.items():
            form = self.formats[name]
            stored = entry.stored if form is None else form.name, entry.shape[-1:]
            if form is not None and stored not in kinds:
                kinds.add(stored)
                yield pack(torch.zeros(32, entry.shape[-1]), form)
            elif form is None and entry.packed is not None and name in self.products and stored not in kinds:
                kinds.add(stored)
                yield entry.packed(0, entry.shape[0] if len(entry.shape) == 2 else 1)

    def held_as(self, name: str) -> tuple[str, float]:
        """The kind of a weight as it will be, and the bytes of each of its numbers."""
        entry, form = self.entries[name], self.formats[name]
        if name not in self.products or (form is None and entry.packed is None):
            return str(self.dtype).removeprefix("torch."), self.dtype.itemsize
        key = (entry.stored, entry.shape)
        if key not in self.known:
            if form is not None:
                some = pack(torch.zeros(BLOCK, entry.shape[-1]), form)
            else:
                assert entry.packed is not None
                some = entry.packed(0, 1 if len(entry.shape) == 3 else min(BLOCK, entry.shape[0]))
            self.known[key] = some.kind, some.nbytes / math.prod(some.shape)
        return self.known[key]

    def sizes(self) -> dict[str, int]:
        """Bytes of every weight as it will be: what a placement is planned with."""
        return {name: self._size(name, entry) for name, entry in self.entries.items()}

    def _size(self, name: str, entry: Entry) -> int:
        form, ops = self.formats[name], self.model.ops
        if name not in self.products:
            return math.prod(entry.shape) * self.dtype.itemsize
        if form is not None:
            return offload.packed_bytes(entry.shape, self.dtype, lambda weight: ops.pack(pack(weight, form)))
        if entry.packed is not None:
            some = 1 if len(entry.shape) == 3 else entry.shape[0]
            nbytes: int = ops.pack(entry.packed(0, some)).nbytes
            return nbytes * (entry.shape[0] // some)
        return offload.packed_bytes(entry.shape, self.dtype, ops.pack)

    def read(self, name: str, calibration: Tensor | None) -> Any:
        """A weight on the device, as the operations want it."""
        entry, form = self.entries[name], self.formats[name]
        weight: Tensor | Packed
        if form is not None:
            weight = self._in_format(entry, form, calibration)
        elif entry.packed is not None and name in self.products:
            weight = entry.packed(0, entry.shape[0]).to(self.device)
        else:
            parts = [entry.read(first, last).to(self.device).to(self.dtype) for first, last in places(entry)]
            weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.model.ops.pack(weight) if name in self.products else weight

    def _in_format(self, entry: Entry, form: Format, calibration: Tensor | None) -> Packed:
        if entry.packed is not None and entry.stored == form.name:
            return entry.packed(0, entry.shape[0]).to(self.device)
        return joined([part.to(self.device) for part in packed_parts(entry, form, calibration)])


def _put(model: nn.Module, name: str, weight: Any) -> None:
    """Put a tensor, or what the operations made of it, where its meta twin stands."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if not isinstance(weight, Tensor):
        replace_(module, leaf, weight)
    else:
        setattr(module, leaf, nn.Parameter(weight) if leaf in module._parameters else weight)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"there is no device {name!r}; give auto, cpu, cuda, cuda:1, …", option="device") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        message = f"device {name!r} cannot be used: {str(error).splitlines()[0]}"
        raise InputError(message, option="device") from error
    return device


def _own_dtype(entries: Mapping[str, Entry]) -> torch.dtype:
    """What a checkpoint computes in where nobody says otherwise: its embedding's."""
    return DTYPES.get(entries["embed_tokens.weight"].stored, torch.bfloat16)


def _dtype(name: str | None) -> torch.dtype | None:
    """The dtype that `LoadOptions` names: it has checked the name already."""
    return next((dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{name}"), None)
