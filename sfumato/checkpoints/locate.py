"""Where a checkpoint is: the embedded model, a folder, a file, or the Hugging Face hub and its offline cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sfumato.checkpoints import unreadable
from sfumato.checkpoints.shards import short
from sfumato.errors import CheckpointError, is_panic

NANO = Path(__file__).parents[1] / "nano"
"""The folder of the embedded model."""


def resolve(path: str | Path, weights: bool = True) -> Path:
    """The place of a checkpoint: "nano" (the embedded model), a folder, a .gguf file, or a hub id ("owner/name").

    A hub id is downloaded, or read from the offline cache; without `weights`, only its configuration, tokenizer and
    chat template. `Path("nano")` or "./nano" is a folder of that name. CheckpointError when there is no such thing."""
    if path == "nano":
        return NANO
    folder = os.path.expanduser(path)
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.isfile(folder):
        if folder.endswith(".gguf"):
            return Path(folder)
        raise CheckpointError(
            unreadable.sentence(Path(folder))
            or f"{path} is a file of no known kind; give a .gguf file, or the folder that holds config.json and weights"
        )
    if isinstance(path, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path, re.ASCII):
        return _from_hub(path, ["*.json", "*.jinja", *(["*.safetensors"] if weights else [])])
    raise CheckpointError(
        f"there is no folder {short(path)}; give a checkpoint folder, a .gguf file, a hub id like owner/name, or nano"
    )


def _from_hub(name: str, patterns: list[str]) -> Path:
    import huggingface_hub  # here: it takes a while to import, and local checkpoints do without

    try:
        # The hub's own rules: when the net is down or HF_HUB_OFFLINE is set, what the cache holds is used.
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except BaseException as error:  # of many families: the hub's, its HTTP library's, the disk's, a panic in hf_xet
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        kind = type(error).__name__
        known = {
            "RepositoryNotFoundError": "the hub has no such model, or it is private and needs `hf auth login`",
            "GatedRepoError": "its licence must be accepted on the hub first, then `hf auth login`",
            "LocalEntryNotFoundError": "it is not in the cache and the hub cannot be reached",
            "IncompleteSnapshotError": "the cache holds only a part of it and the hub cannot be reached",
        }
        reason = known.get(kind, short(f"{kind}: {error}"))
        raise CheckpointError(f"cannot get {name} from the hub: {reason}") from error
