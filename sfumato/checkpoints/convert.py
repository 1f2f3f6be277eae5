"""Checkpoint → checkpoint: quantise, or change the format, tensor by tensor, in bounded memory.

What comes out of any reader of `formats` goes into any of its writers, or into our own files in fewer bits. A weight is
read, packed and written a part at a time, so that memory does not depend on the model's size; a run that is cut off is
taken up where its last finished file ends (GGUF, one file, begins anew). It lacks vision in what it quantises: this
engine reads text only.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints import calibration as calibrations
from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.contents import GENERATION, calibration_of, entries_of, tokenizer_folder, tokenizer_of
from sfumato.checkpoints.contents import TOKENIZER as TOKENIZER_FILES
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.formats import gemma4
from sfumato.checkpoints.formats.gguf_split import part_paths
from sfumato.checkpoints.formats.released import METHOD, plan_released
from sfumato.checkpoints.locate import resolve
from sfumato.checkpoints.merged import with_adapter
from sfumato.checkpoints.names import HEAD, own_name, released_name
from sfumato.checkpoints.shards import WRITING, Planned, PlannedFolder, as_json, check_empty, write_shards
from sfumato.checkpoints.targets import target_name
from sfumato.errors import CapacityError, CheckpointError, InputError
from sfumato.model import purpose
from sfumato.model.config import GEMMA4, read_json, with_every_spelling
from sfumato.quant import recipes
from sfumato.system.files import locked
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer

BESIDE = (*TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json", purpose.FILE)
"""What is copied as it is; a calibration is not, where an adapter is merged in or a model is one file."""
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Written:
    """What a conversion left behind; sizes in bytes."""

    path: Path
    source: str
    """The format that it came from."""
    read_bytes: int
    written_bytes: int
    notices: tuple[str, ...]


def convert(
    source: str | Path | Checkpoint,
    to: str,
    target: str | Path,
    progress: Callable[[int, int], None] | None = None,
    calibration: Mapping[str, Tensor] | None = None,
    force: bool = False,
    adapter: str | Path | None = None,
) -> Written:
    """Write the checkpoint `source`, an open one or whatever `resolve` understands, as `to`, one of `TARGETS`.

    `target` is a folder, or for GGUF a file. `progress(done, all)` counts bytes written; `calibration`, by the model's
    names, is `quant.calibrate`'s and for recipes alone. The adapter in the folder `adapter` is merged on the way.
    InputError and CheckpointError name what is wrong before anything is written, CapacityError a disk that is too
    small. What `target` holds already is an InputError, unless a run that was cut off has left it; with `force` it is
    replaced, and stays until the new one is whole. SfumatoError where another process writes there, or the disk says
    no."""
    target, to = Path(target).expanduser(), target_name(to)
    if not isinstance(source, Checkpoint):
        _check_apart(target, Path(source).expanduser())
        check_target(target, to, force)  # before a checkpoint is fetched from the hub
        source = open_checkpoint(resolve(source))
    checkpoint = source if adapter is None else with_adapter(source, Path(adapter).expanduser())
    for path in (checkpoint.path, *checkpoint.merged):
        _check_apart(target, path)
    notices: list[str] = []
    entries = entries_of(checkpoint, notices.append)
    read = sum(entry.nbytes for entry in entries.values())
    with locked(target):
        check_target(target, to, force)  # again: another process may just have ended
        if to.startswith("gguf-"):
            written = _to_gguf(checkpoint, to, target, progress)
        else:
            written = _to_folder(checkpoint, entries, to, target, progress, calibration, force)
    return Written(target, checkpoint.format, read, written, tuple(notices))


def _check_apart(target: Path, source: Path) -> None:
    if target.resolve() == source.resolve():
        raise InputError(f"{target} is what is read; give another place to write to")


def check_target(target: Path, to: str, force: bool) -> None:
    """InputError where `target` is no place for this format, or holds something that must not vanish unasked."""
    target_name(to)
    if to.startswith("gguf-"):
        if target.is_dir() or target.suffix != ".gguf":
            raise InputError(f"{target} is no name for one GGUF file; give a path that ends in .gguf")
        if target.exists() and not force:
            raise InputError(f"{target} is there already; give another name, or --force (force=True) to replace it")
        return
    if target.is_file():
        raise InputError(f"{target} is a file; give a folder to write {to} to")
    if not force and not (target / WRITING).exists():
        check_empty(target)


def _to_folder(
    checkpoint: Checkpoint,
    entries: Mapping[str, Any],
    to: str,
    target: Path,
    progress: Callable[[int, int], None] | None,
    calibration: Mapping[str, Tensor] | None,
    force: bool,
) -> int:
    if to in recipes.RECIPES:
        planned, changes, metadata = _in_recipe(checkpoint, entries, recipes.RECIPES[to], calibration)
    else:
        (planned, changes), metadata = _PLANS[to](checkpoint), {}
    _check_room(target, sum(tensor.nbytes for tensor in planned))
    config = with_every_spelling(checkpoint.config)
    for name in ("quantization_config", "quantization"):
        config.pop(name, None)
    with tempfile.TemporaryDirectory() as temporary:
        files = _files(checkpoint, Path(temporary))
        files["config.json"] = as_json({**config, **changes})
        if (own := calibration_of(checkpoint)).temperatures:
            files[calibrations.FILE] = as_json(own.to_dict())
        plan = PlannedFolder(planned, metadata, files, source=_fingerprint(checkpoint, to, calibration))
        write_shards(target, plan, progress, force)
    return sum(file.stat().st_size for file in target.glob("model*.safetensors"))


FolderPlan = tuple[list[Planned], dict[str, Any]]
"""The tensors of a folder, and what its config.json says beside the checkpoint's own."""


def _in_bf16(checkpoint: Checkpoint) -> FolderPlan:
    planned, _ = plan_released(checkpoint, lambda name: None, dtype=torch.bfloat16)
    if _is_gemma4(checkpoint):  # under its own names, which its other readers know
        planned = [replace(one, name=name) for one in planned if (name := gemma4.name_of(one.name))]
    return planned, {"dtype": "bfloat16"}


def _in_compressed(checkpoint: Checkpoint) -> FolderPlan:
    from sfumato.checkpoints.formats.compressed import plan_compressed

    if _is_gemma4(checkpoint):
        raise InputError("compressed-fp8 is written of DiffusionGemma alone; take bf16 or a recipe for a Gemma 4")
    return plan_compressed(checkpoint)


def _in_mlx(checkpoint: Checkpoint, bits: int = 4, mode: str = "affine") -> FolderPlan:
    from sfumato.checkpoints.formats.mlx_writer import plan_mlx

    _check_head(checkpoint, "mlx-vlm")
    return plan_mlx(checkpoint, bits, mode=mode)


def _check_head(checkpoint: Checkpoint, reader: str) -> None:
    if HEAD in checkpoint.entries:
        raise InputError(
            f"{checkpoint.path} reads logits out with a matrix of its own ({HEAD}), and {reader} with the embedding "
            "alone; take bf16 or a recipe"
        )


def _is_gemma4(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("model_type") == GEMMA4


_PLANS: dict[str, Callable[[Checkpoint], FolderPlan]] = {
    "bf16": _in_bf16,
    "compressed-fp8": _in_compressed,
    **{f"mlx-{bits}bit": partial(_in_mlx, bits=bits) for bits in (3, 4, 5, 6, 8)},
    "mlx-mxfp4": partial(_in_mlx, mode="mxfp4"),
}
"""How each of `TARGETS` that is a folder, and no recipe, is planned."""


def _in_recipe(
    checkpoint: Checkpoint,
    entries: Mapping[str, Any],
    recipe: recipes.Recipe,
    calibration: Mapping[str, Tensor] | None,
) -> tuple[list[Planned], dict[str, Any], dict[str, str]]:
    released = {released_name(own): entry for own, entry in entries.items()}
    known = {released_name(own): counts for own, counts in (calibration or {}).items()}
    text = replace(checkpoint, entries=released)
    planned, metadata = plan_released(text, lambda name: recipe.format_of(own_name(name) or ""), known)
    rules = [list(rule) for rule in recipe.rules]
    return planned, {"quantization_config": {"quant_method": METHOD, "recipe": recipe.name, "rules": rules}}, metadata


def _to_gguf(checkpoint: Checkpoint, to: str, target: Path, progress: Callable[[int, int], None] | None) -> int:
    from sfumato.checkpoints.formats.gguf_writer import vocabulary_of, write_gguf

    _check_head(checkpoint, "the GGUF writer")
    vocabulary = checkpoint.vocabulary
    if vocabulary is None:
        folder = tokenizer_folder(checkpoint)
        tokenizer = Tokenizer.from_folder(folder)
        has_template = (folder / _TEMPLATE).exists() or "chat_template" in _json(folder / "tokenizer_config.json")
        template = ChatTemplate.from_folder(folder, tokenizer.special).source if has_template else None
        vocabulary = vocabulary_of(tokenizer, template)
    each = 2 if to == "gguf-bf16" else 34 / 32  # bytes a weight
    _check_room(target.parent, round(each * sum(math.prod(entry.shape) for entry in checkpoint.entries.values())))
    own, place = calibration_of(checkpoint), target.with_suffix(f".{calibrations.FILE}")
    write_gguf(checkpoint, target, to.removeprefix("gguf-").upper(), vocabulary, progress)
    if own.temperatures:
        own.write(place)
    else:
        place.unlink(missing_ok=True)  # of the file that was there
    return target.stat().st_size


def _files(checkpoint: Checkpoint, temporary: Path) -> dict[str, str | Path]:
    """What stands beside the weights: the tokenizer's files and generation_config.json."""
    vocabulary = checkpoint.vocabulary
    if vocabulary is None:
        is_folder = not checkpoint.path.is_file()
        folder = checkpoint.path if is_folder else checkpoint.path.parent
        names = (*BESIDE, GENERATION) if is_folder else BESIDE
        beside: dict[str, str | Path] = {name: folder / name for name in names if (folder / name).is_file()}
        return beside if is_folder else beside | {GENERATION: as_json(checkpoint.generation)}
    tokenizer = tokenizer_of(vocabulary)
    tokenizer.save(temporary)
    files: dict[str, str | Path] = {file.name: file for file in temporary.iterdir()}
    if vocabulary.template is not None:
        files[_TEMPLATE] = vocabulary.template
    return files | {GENERATION: as_json(checkpoint.generation)}


def _fingerprint(checkpoint: Checkpoint, to: str, calibration: Mapping[str, Tensor] | None) -> str:
    """What the tensors are made of: a run that goes on must find the same."""
    path = checkpoint.path
    files = part_paths(path) if path.is_file() else []
    for folder in (path, *checkpoint.merged) if path.is_dir() else checkpoint.merged:
        files += sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    facts = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    digest = hashlib.sha256()
    for name, counts in sorted((calibration or {}).items()):
        digest.update(name.encode() + counts.float().numpy().tobytes())
    places = [str(place.resolve()) for place in (path, *checkpoint.merged)]
    return repr((to, places, facts, digest.hexdigest()))


def _check_room(folder: Path, count: int) -> None:
    there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    written = sum(file.stat().st_size for file in folder.glob(f"{WRITING}/*")) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free
    if count - written > free:
        raise CapacityError(
            f"{there} has {free / 1e9:.1f} GB free and {count / 1e9:.1f} GB are to be written; free some, or write "
            "elsewhere"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError:
        return {}
