"""Model → checkpoint folder, in the released layout, tensor by tensor; never pickle.

It lacks packed weights: what is packed while loading is neither saved nor trained, `convert` writes it, and
`checkpoint.in_full` is how a checkpoint in fewer bits is loaded to be saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.checkpoints.contents import GENERATION, TOKENIZER, blank
from sfumato.checkpoints.formats import gemma4
from sfumato.checkpoints.names import released_name
from sfumato.checkpoints.shards import PlannedFolder, as_json, plain, write_shards
from sfumato.errors import CheckpointError, InputError
from sfumato.model.config import ModelConfig, read_json
from sfumato.model.network import Model
from sfumato.ops.packed import Packed
from sfumato.system.files import locked


def save(
    model: Model,
    folder: str | Path,
    shard_bytes: int = 5 << 30,
    tokenizer_from: str | Path | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint in the released layout, which transformers reads too; an older one in `folder` is replaced.

    `shard_bytes` bounds a file, unless a single tensor is larger. The tokenizer's files are copied from the folder
    `tokenizer_from`; `generation` is what generation_config.json is to say, None: what that folder's says. Everything
    is written beside first: a failure (SfumatoError, also where another process writes there) leaves what was there.
    Vision tensors were left aside by `load` and are not in it."""
    tensors = model.state_dict()
    expected = blank(model.config, model.ops).state_dict()
    for name in {**expected, **tensors}:
        _check_plain(model, name)
        if name not in expected or name not in tensors or tensors[name].shape != expected[name].shape:
            raise InputError(f"{name} is not as the released layout has it; load with ops='fused' what is to be saved")
    folder, copied = Path(folder), {}
    if tokenizer_from is not None:
        source = Path(tokenizer_from)
        copied = {name: source / name for name in TOKENIZER if (source / name).is_file()}
        if "tokenizer.json" not in copied:
            raise CheckpointError(f"{source} has no tokenizer.json to copy")
        if generation is None and (source / GENERATION).exists():
            generation = read_json(source / GENERATION)
    config = {**model.config.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")}
    if replace(ModelConfig.from_dict(config), has_head=model.config.has_head) != model.config:
        raise InputError("this model's layers differ in ways that config.json cannot say")
    ids = {name: config["text_config"][name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    files: dict[str, str | Path] = {
        **copied,
        "config.json": as_json(config),
        GENERATION: as_json({**ids, **(generation or {})}),
    }
    name_of = str if model.config.is_diffusion else gemma4.name_of
    names = {own: name_of(released_name(own)) for own in tensors}
    planned = [plain(name, tensors[own]) for own, name in names.items() if name]
    with locked(folder):
        write_shards(folder, PlannedFolder(planned, files=files, shard_bytes=shard_bytes))


def _check_plain(model: Model, name: str) -> None:
    """InputError for a weight in fewer bits: it is rounded already, and this layout holds plain numbers."""
    owner, _, leaf = name.rpartition(".")
    weight = getattr(model.get_submodule(owner), leaf, None)
    if isinstance(weight, Packed):
        raise InputError(
            f"{name} is packed ({weight.kind}) and this layout holds plain numbers; write it from its own checkpoint, "
            "with `sfumato convert --to bf16`, or load that one `in_full`"
        )
