"""What a path holds where it is no checkpoint that this engine reads: one sentence that names it and says what to do.

Files are known by their names, and a few by their first bytes; nothing is opened further. It knows what people try:
adapters, other frameworks' weights, pickles, archives, unfinished downloads, the folder above or the file within.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from sfumato.checkpoints.shards import IS_POINTER, POINTER, short

_INSTEAD = "give a folder with config.json and safetensors, or a .gguf file"
_KINDS: tuple[
    tuple[str, str], ...
] = (  # patterns of names, and the sentence behind the path; the first that fits counts
    (
        "adapter_config.json adapter_model.* *.lora",
        "is an adapter (LoRA) and no model; load its base with it (--adapter NAME=DIR), or merge both: sfumato convert "
        "BASE --adapter DIR --to bf16",
    ),
    (
        "_checkpoint_metadata manifest.ocdbt ocdbt.process_* _metadata",
        "is a JAX checkpoint (orbax); get the same model as safetensors, which the hub has of every release, or export "
        "it with the tool that trained it",
    ),
    (
        "*.keras *.h5 *.hdf5",
        "holds Keras weights; export them with KerasHub (export_to_transformers), or get the same model as safetensors",
    ),
    ("*.msgpack", "holds Flax weights; get the same model as safetensors, or convert it with transformers"),
    (
        "saved_model.pb *.data-?????-of-?????",
        "holds TensorFlow weights; get the same model as safetensors, or export it with the tool that trained it",
    ),
    (
        "*.distcp zero_pp_rank_* mp_rank_*",
        "is the sharded state of a training run; gather it with the tool that trained it and save it with "
        "save_pretrained, as safetensors",
    ),
    (
        "*.bin *.pt *.pth *.ckpt *.pkl *.pickle *.nemo",
        "holds pickled weights, which can run code when they are opened and are never read; save them as safetensors "
        "with the tool that wrote them (transformers: save_pretrained)",
    ),
    (
        "*.onnx *.onnx_data *.tflite *.task *.litertlm *.mlmodel *.mlpackage *.engine *.plan *.pte",
        f"is a model compiled for another engine (ONNX, LiteRT, Core ML, TensorRT); {_INSTEAD}",
    ),
    ("*.npz *.npy", "holds NumPy arrays; convert it to safetensors with the tool that wrote it"),
    ("*.zip *.tar *.tar.* *.tgz *.7z *.rar", "is an archive; unpack it, and give the folder that it makes"),
    (
        "*.incomplete *.part *.crdownload *.download *.aria2",
        "is a download that was not finished; fetch it again: what is there already is kept",
    ),
    ("*.ggml ggml-*.bin", "is a GGML file from before GGUF; get the model as GGUF"),
    ("*.imatrix *.mmproj", f"belongs to a model and is none; {_INSTEAD}"),
)
_MAGIC = (
    (POINTER, IS_POINTER),
    (b"lmgg", "is a GGML file from before GGUF; get the model as GGUF"),
    (b"fmgg", "is a GGML file from before GGUF; get the model as GGUF"),
    (b"tjgg", "is a GGML file from before GGUF; get the model as GGUF"),
    (
        b"algg",
        "is a LoRA adapter from before GGUF, and no model; merge it into its base with llama.cpp's llama-export-lora",
    ),
    (b"\x89HDF", "holds Keras weights; export them with KerasHub (export_to_transformers)"),
    (b"<!DOCTYPE", "is a web page and no model; the download needs a login, or another address"),
    (b"<html", "is a web page and no model; the download needs a login, or another address"),
    (b"PK\x03\x04", "is an archive; unpack it, and give the folder that it makes"),
)
_LISTED = 3


def sentence(path: Path) -> str | None:
    """What `path` is and what to do, as one sentence; None where it is nothing that is known here."""
    what = _folder(path) if path.is_dir() else _file(path)
    return None if what is None else f"{path} {what}"


def begins_oddly(path: Path) -> str | None:
    """`sentence` for a file whose name is right, and whose first bytes are not."""
    try:
        with path.open("rb") as file:
            begin = file.read(32)
    except OSError:
        return None
    return next((f"{path} {what}" for magic, what in _MAGIC if begin.startswith(magic)), None)


def _file(path: Path) -> str | None:
    if path.name.endswith((".safetensors", ".safetensors.index.json")) or path.name == "config.json":
        return "is one file of a checkpoint; give the folder that it lies in"
    if known := _known([path.name], path.parent):
        return known
    if odd := begins_oddly(path):
        return odd.removeprefix(f"{path} ")
    return None


def _folder(folder: Path) -> str | None:
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    names = [each.name for each in inside]
    if dead := [each.name for each in inside if each.is_symlink() and not os.path.exists(each)]:
        return f"has links to files that are not there ({_some(dead)}); fetch these files again"
    weights = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    has_config = "config.json" in names
    if weights and not has_config:
        return f"has weights ({_some(weights)}) and no config.json; put that of the model they were made of beside them"
    if not names:
        return f"is an empty folder; {_INSTEAD}"
    if ggufs := [name for name in names if name.lower().endswith(".gguf")]:
        return f"has no safetensors but {_some(ggufs)}; give the path of one of these files"
    if weights:
        return (
            f"has safetensors under other names than model.safetensors ({_some(weights)}) and no index of them; rename "
            "a single file, or fetch model.safetensors.index.json too"
        )
    folders = [each.name for each in inside if os.path.isdir(each) and each.name[0] != "."]
    if "snapshots" in folders and folder.name.startswith("models--"):
        return f"is the hub's cache of {folder.name.removeprefix('models--').replace('--', '/')}; give that id"
    better = [name for name in folders if os.path.exists(folder / name / "config.json")]
    if not better and (known := _known(names, folder)):
        return known
    if folders and not has_config:
        return f"is no checkpoint itself, but has folders in it ({_some(better or folders)}); give one of these"
    if has_config:
        return "has a config.json and no weights; `sfumato info` reads that much, the rest needs its safetensors"
    return f"has no config.json; {_INSTEAD}"


def _known(names: Sequence[str], folder: Path) -> str | None:
    lowered = [name.lower() for name in names]
    for patterns, what in _KINDS:
        if any(fnmatchcase(name, pattern) for pattern in patterns.split() for name in lowered):
            return what + (_base(folder) if what.startswith("is an adapter") else "")
    return None


def _base(folder: Path) -> str:
    """Which model an adapter was made for, where peft's file says so."""
    try:
        with (folder / "adapter_config.json").open("rb") as file:
            name = json.loads(file.read(1 << 16)).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return f" (its base is {short(name)})" if isinstance(name, str) and name.isprintable() else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(short(name) for name in names[:_LISTED]) + more
