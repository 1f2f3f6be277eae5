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
from sfumato.checkpoints.names import DECODER, ENCODER, HEAD
from sfumato.errors import CheckpointError

_TEXT = "model.language_model."
_SCALAR = re.compile(r"layers\.\d+\.layer_scalar", re.ASCII)
_IMAGES = ("vision_tower.", "embed_vision.")


def name_of(released: str) -> str | None:
    """Gemma 4's name of a tensor under its released name, for what is saved; None: Gemma 4 holds no such tensor.

    It holds no self-conditioning and no layer_scalar of the decoder, since the encoder's is the one that runs."""
    if released == HEAD:
        return released
    inner = released.removeprefix(ENCODER)
    if inner != released:
        return _TEXT + inner if _SCALAR.fullmatch(inner) else None
    inner = released.removeprefix("model.encoder.")
    if inner != released:
        return f"model.{inner}" if inner.startswith(_IMAGES) else None
    inner = released.removeprefix(DECODER)
    if inner == released or inner.startswith("self_conditioning.") or _SCALAR.fullmatch(inner):
        return None
    return _TEXT + inner


def released(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries under names in the release's spelling, each layer_scalar for both directions where there is but one.

    CheckpointError names a tensor that has no place."""
    both = dict(entries)
    for name, entry in entries.items():
        if name != HEAD and not name.startswith((DECODER, "model.encoder.")):
            raise CheckpointError(f"there is an unexpected tensor {name[:200]!r}; Gemma 4 has none of that name")
        inner = name.removeprefix(DECODER)
        if inner != name and _SCALAR.fullmatch(inner) and ENCODER + inner not in both:
            both[ENCODER + inner] = replace(entry, name=ENCODER + inner)
    return both
