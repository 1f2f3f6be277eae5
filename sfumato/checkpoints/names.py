"""The model's own names of its tensors and the released checkpoint's, from one table; and how other tools spell these.

Every reader of a foreign format gives names as the file has them; `open_checkpoint` spells all of them as the release
does. The model and everything above it know its own names alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from sfumato.errors import CheckpointError

_NAMES = (  # ours, released; {} stands for the same in both, and the first line that fits counts
    ("{}.encode_scalar", "model.encoder.language_model.{}.layer_scalar"),
    ("{}.denoise_scalar", "model.decoder.{}.layer_scalar"),
    ("lm_head.{}", "lm_head.{}"),
    ("{}", "model.decoder.{}"),
)
DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
"""What released names begin with, of the pass that denoises and of the pass that encodes."""
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
"""What released names begin with, of what turns images into embeddings."""
EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
"""The released names of the embedding, and of a matrix that reads logits out where that is another one."""
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""What data parallelism, compilation and an adapter that was merged in place put before every name."""
_SPELLINGS = (  # what other tools begin names with, and the release; the first line that fits counts
    ("model.decoder.", DECODER),
    ("model.encoder.", "model.encoder."),
    ("model.lm_head.", "lm_head."),
    ("language_model.lm_head.", "lm_head."),
    # transformers' model without its head
    ("decoder.", DECODER),
    ("encoder.", "model.encoder."),
    # Gemma 4, and tools that take this model for one; mlx-vlm puts "model." behind
    ("model.language_model.model.", DECODER),
    ("language_model.model.", DECODER),
    ("model.language_model.", DECODER),
    ("language_model.", DECODER),
    *(
        (f"{model}{part}.", f"model.encoder.{part}.")
        for part in ("vision_tower", "embed_vision")
        for model in ("model.", "")
    ),
)


def released_name(own: str) -> str:
    """The released checkpoint's name of a tensor of `Model.state_dict()`."""
    return _translate(own, 0) or own


def own_name(released: str) -> str | None:
    """The name in `Model.state_dict()` of a tensor under its released name; None: it is no tensor of the model."""
    own = _translate(released, 1)
    return own if own and released_name(own) == released else None


def decoder_twin(released: str) -> str | None:
    """The decoder's name of a tensor that the encoder shares with it; None: it is not the encoder's, or its alone."""
    shared = released.removeprefix(ENCODER)
    if shared == released or "self_conditioning." in shared or own_name(released):
        return None
    return DECODER + shared


def released_spelling(name: str) -> str:
    """A tensor's name in a file, as the release would spell it; what is spelled in no known way is left as it is."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    for begin, released in _SPELLINGS:
        if name.startswith(begin):
            return released + name.removeprefix(begin)
    return name


def released_spellings(names: Iterable[str]) -> dict[str, str]:
    """`released_spelling` of all names of a file, by the names there. CheckpointError where two become one."""
    by_released: dict[str, str] = {}
    for name in names:
        other = by_released.setdefault(released_spelling(name), name)
        if other != name:
            raise CheckpointError(f"the tensors {other[:200]!r} and {name[:200]!r} are the same one; one must go")
    return {name: released for released, name in by_released.items()}


def _translate(name: str, column: int) -> str | None:
    for line in _NAMES:
        before, after = line[column].split("{}")
        if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
            return line[1 - column].replace("{}", name[len(before) : len(name) - len(after)])
    return None
