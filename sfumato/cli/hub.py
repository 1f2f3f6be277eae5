"""The models in the hub's cache: which of them this engine reads, how large they are, and since when they are here.

Looked up in the cache's own folders (`models--OWNER--NAME/snapshots/REVISION`), without torch and without the net, so
that the shell can ask at every key. What a model is comes from its config.json, or from the head of its .gguf file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sfumato.errors import InputError
from sfumato.system.embedded import EMBEDDED

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?::\S+)?", re.ASCII)
"""owner/name, or owner/name:QUANT for one of its GGUF files."""
_MODEL_TYPES, _ARCHITECTURE = ("diffusion_gemma", "gemma4"), "diffusion-gemma"
"""What a config.json and the head of a GGUF file say of models that are read here."""
_CONFIG_BYTES = 4 << 20
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class CachedModel:
    """A model in the hub's cache, of a kind that this engine reads."""

    id: str
    folder: Path
    """Of the cache, with all revisions."""
    format: str
    """How its weights are stored, in a word."""
    size_bytes: int
    """On disk, all revisions together."""
    date: datetime
    """When the last of its files came."""
    is_whole: bool
    """Whether it has weights; without, only its configuration was fetched (`info`)."""


def cache_folder() -> Path:
    """Where the hub's own rules put the cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_ids() -> list[str]:
    """The ids of all models that can be used, in order."""
    return [model.id for model in cached_models()]


def cached_model(name: str) -> CachedModel:
    """The model with this id; InputError where the cache has none."""
    for model in cached_models():
        if model.id == name:
            return model
    if HUB_ID.fullmatch(name) and (cache_folder() / f"models--{name.replace('/', '--')}").is_dir():
        raise InputError(f"{name} is in the hub's cache, but no model that Sfumato reads; `hf cache rm` removes it")
    raise InputError(f"the hub's cache has no {name}; `sfumato list` shows what is there")


def cached_models() -> Iterator[CachedModel]:
    """The models of kinds that are read here, by id; what is no such model or cannot be read is passed over."""
    try:
        folders = sorted(cache_folder().glob("models--*--*"))
    except OSError:
        return
    for folder in folders:
        try:
            if (model := _model_of(folder)) is not None:
                yield model
        except OSError:
            continue


def _model_of(folder: Path) -> CachedModel | None:
    """The model of a folder of the cache; None where it is of another kind, or nothing is there."""
    snapshot = _snapshot(folder)
    if snapshot is None:
        return None
    files = [file for file in snapshot.rglob("*") if file.is_file()]
    ggufs = sorted(file for file in files if file.suffix == ".gguf")
    form = _format_of_config(snapshot / "config.json") or next(filter(None, map(_format_of_gguf, ggufs)), None)
    if form is None:
        return None
    blobs = [file.stat() for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    blobs = blobs or [file.stat() for file in files]
    return CachedModel(
        id="/".join(folder.name.split("--", 2)[1:]),
        folder=folder,
        format=form,
        size_bytes=sum(blob.st_size for blob in blobs),
        date=datetime.fromtimestamp(max(blob.st_mtime for blob in blobs)),
        is_whole=bool(ggufs) or any(file.suffix == ".safetensors" for file in files),
    )


def _snapshot(folder: Path) -> Path | None:
    """The revision that is used: that of "main", else the newest; None where there is none."""
    reference = folder / "refs" / "main"
    if reference.is_file():
        snapshot = folder / "snapshots" / reference.read_text(encoding="utf-8", errors="replace").strip()
        if snapshot.is_dir():
            return snapshot
    snapshots = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def _format_of_config(path: Path) -> str | None:
    """The format that a config.json tells of; None where there is none, or the model is of another kind."""
    try:
        if not path.is_file() or path.stat().st_size > _CONFIG_BYTES:
            return None
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or config.get("model_type") not in _MODEL_TYPES:
        return None
    quantised: Any = config.get("quantization_config") or config.get("quantization")
    if not isinstance(quantised, dict):
        return str(config.get("dtype") or config.get("torch_dtype") or "safetensors")[:40]
    if "bits" in quantised and "quant_method" not in quantised:
        return f"MLX {quantised.get('bits')} bits"[:40]
    return str(quantised.get("quant_method"))[:40]


def _format_of_gguf(path: Path) -> str | None:
    """The format of a GGUF file, by its name; None where its head names no architecture of ours."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES).decode("latin-1")
    if not head.startswith("GGUF") or _ARCHITECTURE not in head:
        return None
    kind = re.search(r"(?:IQ|Q|BF|F|MXFP)\d[\w]*", path.stem.upper())
    return f"GGUF {kind[0]}" if kind else "GGUF"


def embedded() -> list[CachedModel]:
    """The models that are inside this package."""
    models = []
    for name, folder in EMBEDDED.items():
        files = [file.stat() for file in folder.iterdir() if file.is_file()]
        date = datetime.fromtimestamp(max(file.st_mtime for file in files))
        models.append(CachedModel(name, folder, "float32", sum(file.st_size for file in files), date, True))
    return models


def in_words(size: int) -> str:
    """A size on disk: 6.3 MB, 51.6 GB."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_ or unit == "MB":
            return f"{size / bytes_:.1f} {unit}"
    raise AssertionError  # the last unit takes any size
