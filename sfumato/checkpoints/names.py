"""The model's own names of its tensors and the released checkpoint's, from one table.

Every reader of a foreign format gives released names; the model and everything above it know its own names alone.
"""

from __future__ import annotations

_NAMES = (  # ours, released; {} stands for the same in both, and the first line that fits counts
    ("{}.encode_scalar", "model.encoder.language_model.{}.layer_scalar"),
    ("{}.denoise_scalar", "model.decoder.{}.layer_scalar"),
    ("{}", "model.decoder.{}"),
)
DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
"""What released names begin with, of the pass that denoises and of the pass that encodes."""
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
"""What released names begin with, of what turns images into embeddings."""


def released_name(own: str) -> str:
    """The released checkpoint's name of a tensor of `Model.state_dict()`."""
    return _translate(own, 0) or own


def own_name(released: str) -> str | None:
    """The name in `Model.state_dict()` of a tensor under its released name; None: it is no tensor of the model."""
    own = _translate(released, 1)
    return own if own and released_name(own) == released else None


def repeated(released: str) -> str | None:
    """The own name of the tensor that this one is a tied copy of; None: it is no copy.

    lm_head repeats the embedding, and the encoder repeats what it shares with the decoder."""
    if released == "lm_head.weight":
        return "embed_tokens.weight"
    shared = released.removeprefix(ENCODER)
    return None if shared == released or "self_conditioning." in shared else own_name(DECODER + shared)


def _translate(name: str, column: int) -> str | None:
    for line in _NAMES:
        before, after = line[column].split("{}")
        if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
            return line[1 - column].replace("{}", name[len(before) : len(name) - len(after)])
    return None
