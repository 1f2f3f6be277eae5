"""Tensors that a file holds twice: the encoder's copies of what it shares with the decoder, and a head of its own.

transformers ties two tensors that are equal and keeps apart two that differ, whatever config.json says of a tie. This
model has one stack of weights for both directions, so that a copy that differs is refused; each copy is compared part
by part, whenever the weight itself is read, so that nothing is in memory twice. A matrix `lm_head` is looked at first,
since it decides what the model is: equal to the embedding it is left out, otherwise logits are read out with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry
from sfumato.checkpoints.formats.released import places
from sfumato.checkpoints.names import EMBEDDING, HEAD, decoder_twin
from sfumato.errors import CheckpointError
from sfumato.ops.packed import Packed


def without_copies(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, every tensor once: under the decoder's name where both directions share it, wherever it lies.

    Reading an entry then raises CheckpointError where its copy differs; so does a copy of another shape, now."""
    entries: dict[str, Entry] = {}
    copies: dict[str, Entry] = {}
    for name, entry in checkpoint.entries.items():
        twin = decoder_twin(name)
        (copies if twin else entries)[twin or name] = entry
    twice = 0
    for name, copy in copies.items():
        if name in entries:
            entries[name] = _compared(checkpoint, entries[name], copy)
            twice += 1
        else:
            entries[name] = replace(copy, name=name)
    notices = list(checkpoint.notices)
    if twice:
        notices.append(f"{checkpoint.path} has {twice} tensors twice; the encoder's are compared with the decoder's")
    if checkpoint.config.get("tie_word_embeddings") is False and not copies:
        notices.append(
            f"{checkpoint.path} says tie_word_embeddings false and has no weights of the encoder's own; the decoder's "
            "are used for both"
        )
    _settle_head(checkpoint, entries)
    return replace(checkpoint, entries=entries, notices=tuple(notices))


def _settle_head(checkpoint: Checkpoint, entries: dict[str, Entry]) -> None:
    """Leave `lm_head` in where it is another matrix than the embedding, and only there."""
    head, embedding = entries.get(HEAD), entries.get(EMBEDDING)
    is_tied = checkpoint.config.get("tie_word_embeddings", True)
    if head is None and not is_tied:
        raise CheckpointError(
            f"{checkpoint.path} lacks {HEAD}, though its config.json says tie_word_embeddings false; say true there if "
            "logits are read out with the embedding"
        )
    if head is not None and embedding is None and is_tied:
        entries[EMBEDDING] = replace(entries.pop(HEAD), name=EMBEDDING)
    elif head is not None and embedding is not None and _are_twins(embedding, head):
        del entries[HEAD]


def _compared(checkpoint: Checkpoint, entry: Entry, copy: Entry) -> Entry:
    """An entry that is held against its copy whenever it is read."""
    if copy.shape != entry.shape:
        raise CheckpointError(
            f"{copy.name} in {checkpoint.path} has the shape {list(copy.shape)}; its twin {entry.name} has "
            f"{list(entry.shape)}"
        )
    as_stored = entry.packed

    def differ() -> CheckpointError:
        return CheckpointError(
            f"{copy.name} and {entry.name} in {checkpoint.path} differ: encoder and decoder were trained apart, and "
            "this engine runs one set of weights for both; transformers runs such a model"
        )

    def read(first: int, last: int) -> Tensor:
        values = entry.read(first, last)
        if not _are_equal(values, copy.read(first, last)):
            raise differ()
        return values

    def packed(first: int, last: int) -> Packed:
        assert as_stored is not None
        codes = as_stored(first, last)
        if copy.packed is not None and copy.stored == entry.stored:
            if not _are_same_codes(codes, copy.packed(first, last)):
                raise differ()
        elif not all(_are_equal(one, other) for one, other in _both(entry, copy, first, last)):
            raise differ()
        return codes

    nbytes = entry.nbytes + copy.nbytes
    return replace(entry, nbytes=nbytes, read=read, packed=packed if as_stored is not None else None)


def _both(one: Entry, other: Entry, first: int = 0, last: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The same parts of two entries of one shape, one after the other."""
    for start, end in places(one):
        start, end = max(start, first), end if last is None else min(end, last)
        if start < end:
            yield one.read(start, end), other.read(start, end)


def _are_twins(one: Entry, other: Entry) -> bool:
    return one.shape == other.shape and all(_are_equal(*parts) for parts in _both(one, other))


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether the values are equal, in the dtype that holds less: as they are where a model has one dtype."""
    return torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)


def _are_same_codes(one: Packed, other: Packed) -> bool:
    a, b = one.parts, other.parts
    return (one.kind, one.group, a.keys()) == (other.kind, other.group, b.keys()) and all(
        a[name].dtype == b[name].dtype and torch.equal(_as_bytes(a[name]), _as_bytes(b[name])) for name in a
    )


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
