"""Gemma 4 26B-A4B beside DiffusionGemma: the same layers under other names, without canvas and self-conditioning.

`ModelConfig` reads its config.json; here are the names. A layer has one `layer_scalar`, which stands for both of ours:
encode's alone is ever used. It lacks images, like the rest of the engine: their tensors keep DiffusionGemma's names for
them, so that they are left aside as those are. Tensors for audio have no name, as config.json may not ask for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from sfumato.checkpoints.checkpoint import Entry
from sfumato.errors import CheckpointError

_TEXT, _DECODER, _ENCODER = "model.language_model.", "model.decoder.", "model.encoder.language_model."
_SCALAR = re.compile(r"layers\.\d+\.layer_scalar", re.ASCII)
_IMAGES = ("vision_tower.", "embed_vision.")


def released_name_of(name: str) -> str | None:
    """The released DiffusionGemma's name of a tensor of Gemma 4; None where that model has none.

    A layer_scalar is the decoder's here: `released` gives it to the encoder too."""
    if name == "lm_head.weight":
        return name
    if name.startswith(_TEXT):
        return _DECODER + name.removeprefix(_TEXT)
    inner = name.removeprefix("model.")
    return f"model.encoder.{inner}" if inner != name and inner.startswith(_IMAGES) else None


def name_of(released: str) -> str | None:
    """The other way, for what is saved; None for what a Gemma 4 checkpoint does not hold: self-conditioning, and the
    decoder's layer_scalar, since the encoder's is the one that runs."""
    if released == "lm_head.weight":
        return released
    inner = released.removeprefix(_ENCODER)
    if inner != released:
        return _TEXT + inner if _SCALAR.fullmatch(inner) else None
    inner = released.removeprefix("model.encoder.")
    if inner != released:
        return f"model.{inner}" if inner.startswith(_IMAGES) else None
    inner = released.removeprefix(_DECODER)
    if inner == released or inner.startswith("self_conditioning.") or _SCALAR.fullmatch(inner):
        return None
    return _TEXT + inner


def released(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries under Gemma 4's names -> the same under DiffusionGemma's, each layer_scalar for both directions.

    What bears such a name already, as our own files do, keeps it. CheckpointError names a tensor that has no place, or
    whose place is taken."""
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        new = name if name.startswith((_DECODER, "model.encoder.")) else released_name_of(name)
        if new is None:
            raise CheckpointError(f"there is an unexpected tensor {name[:200]!r}; Gemma 4 has none of that name")
        if new in found:
            raise CheckpointError(f"the tensors {name[:200]!r} and {new[:200]!r} are the same one; there must be one")
        found[new] = replace(entry, name=new)
    for name in list(found):
        inner = name.removeprefix(_DECODER)
        if inner != name and _SCALAR.fullmatch(inner):
            found.setdefault(_ENCODER + inner, replace(found[name], name=_ENCODER + inner))
    return found
