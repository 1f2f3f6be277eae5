"""A checkpoint with an adapter merged into it, while its weights are read: no model, and no weight as a whole.

An entry that the adapter changes gives the sum, in float32, of what the checkpoint says and of the product of both
factors, for just the places that are asked for. So any reader's checkpoint goes into any writer. What the file has in
fewer bits is unpacked for it, and packed anew by whoever writes. It lacks adapters that differ in encode and denoise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sfumato.checkpoints.adapters import read_adapter
from sfumato.checkpoints.checkpoint import FALLBACK, Checkpoint, Entry
from sfumato.checkpoints.contents import described, match
from sfumato.checkpoints.names import EMBEDDING, HEAD, released_name
from sfumato.checkpoints.shards import NAMES
from sfumato.model.adapters import Factors, check_mergeable


def with_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the adapter of a folder merged into what its entries read.

    CheckpointError and InputError where the adapter is none, is for another model, or is not the same for encode and
    denoise; nothing of the checkpoint's weights is read for that."""
    model = described(checkpoint)
    match(model, checkpoint, lambda sentence: None)
    adapter = read_adapter(folder, model)
    check_mergeable(adapter)
    entries, notices = dict(checkpoint.entries), list(adapter.notices)
    anew: list[Entry] = []
    for own, factors in adapter.factors.items():
        entry = entries[released_name(own)]
        anew += [entry] if entry.packed is not None or entry.fallback is not None else []
        entries[entry.name] = _plus(entry, factors)
    for own, tensor in adapter.whole.items():
        name = released_name(own)
        there = entries.get(name, entries[EMBEDDING] if name == HEAD else None)
        assert there is not None, "an adapter that fits replaces weights that are there"
        entries[name] = _instead(replace(there, name=name), tensor)
    if anew:
        kinds = ", ".join(sorted({entry.stored for entry in anew}))
        notices.append(
            f"{len(anew)} weights of {checkpoint.path} are stored as {kinds}: each is unpacked, merged in float32 and "
            "rounded anew, so that the result is less exact than a merge into the full weights"
        )
    entries = {name: entries[name] for name in [*checkpoint.entries, *(entries.keys() - checkpoint.entries.keys())]}
    return replace(
        checkpoint, entries=entries, notices=(*checkpoint.notices, *notices), merged=(*checkpoint.merged, folder)
    )


def _plus(entry: Entry, factors: Factors) -> Entry:
    """An entry with the product of both factors added, for the places of the first axis that are read."""
    is_stack = len(entry.shape) == 3

    def read(first: int, last: int) -> Tensor:
        a = factors.a[first:last] if is_stack else factors.a
        b = factors.b[first:last] if is_stack else factors.b[:, first:last]
        return Factors(a, b, factors.scale).delta().add_(entry.read(first, last))

    is_packed = entry.packed is not None
    return replace(entry, read=read, packed=None, fallback=entry.fallback or (FALLBACK if is_packed else None))


def _instead(entry: Entry, tensor: Tensor) -> Entry:
    """An entry that gives another tensor."""

    def read(first: int, last: int) -> Tensor:
        return tensor[first:last] if entry.shape else tensor

    stored = NAMES.get(tensor.dtype, "F32")
    return replace(entry, stored=stored, nbytes=tensor.nbytes, read=read, packed=None, fallback=None)
